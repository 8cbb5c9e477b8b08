// Every place and member of ort_abi.h against ONNX Runtime's own header, at compile time.
#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace {

using namespace reroute::ort;

#define SAME_PLACE(entry, member) \
    static_assert(entry::place * sizeof(void*) == offsetof(OrtApi, member), #member " is at another place")
#define SAME_MEMBER(own, member) \
    static_assert(offsetof(CustomOp, own) == offsetof(OrtCustomOp, member), #member " is at another place")

SAME_PLACE(CreateStatus, CreateStatus);
SAME_PLACE(CreateCustomOpDomain, CreateCustomOpDomain);
SAME_PLACE(CustomOpDomainAdd, CustomOpDomain_Add);
SAME_PLACE(AddCustomOpDomain, AddCustomOpDomain);
SAME_PLACE(GetTensorMutableData, GetTensorMutableData);
SAME_PLACE(GetDimensionsCount, GetDimensionsCount);
SAME_PLACE(GetDimensions, GetDimensions);
SAME_PLACE(GetTensorShapeElementCount, GetTensorShapeElementCount);
SAME_PLACE(GetTensorTypeAndShape, GetTensorTypeAndShape);
SAME_PLACE(KernelInfoGetAttributeFloat, KernelInfoGetAttribute_float);
SAME_PLACE(KernelInfoGetAttributeInt64, KernelInfoGetAttribute_int64);
SAME_PLACE(KernelContextGetInput, KernelContext_GetInput);
SAME_PLACE(KernelContextGetOutput, KernelContext_GetOutput);
SAME_PLACE(ReleaseTensorTypeAndShapeInfo, ReleaseTensorTypeAndShapeInfo);
SAME_PLACE(KernelContextParallelFor, KernelContext_ParallelFor);

SAME_MEMBER(create_kernel, CreateKernel);
SAME_MEMBER(name, GetName);
SAME_MEMBER(provider, GetExecutionProviderType);
SAME_MEMBER(input_type, GetInputType);
SAME_MEMBER(input_count, GetInputTypeCount);
SAME_MEMBER(output_type, GetOutputType);
SAME_MEMBER(output_count, GetOutputTypeCount);
SAME_MEMBER(compute, KernelCompute);
SAME_MEMBER(destroy, KernelDestroy);
SAME_MEMBER(input_characteristic, GetInputCharacteristic);
SAME_MEMBER(output_characteristic, GetOutputCharacteristic);
SAME_MEMBER(input_memory, GetInputMemoryType);
SAME_MEMBER(variadic_input_min, GetVariadicInputMinArity);
SAME_MEMBER(variadic_input_same, GetVariadicInputHomogeneity);
SAME_MEMBER(variadic_output_min, GetVariadicOutputMinArity);
SAME_MEMBER(variadic_output_same, GetVariadicOutputHomogeneity);
SAME_MEMBER(create_kernel_v2, CreateKernelV2);
SAME_MEMBER(compute_v2, KernelComputeV2);
SAME_MEMBER(infer_shape, InferOutputShapeFn);
SAME_MEMBER(start_version, GetStartVersion);
SAME_MEMBER(end_version, GetEndVersion);

static_assert(static_cast<int>(kFloat) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
              static_cast<int>(kUint8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 &&
              static_cast<int>(kInt32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 &&
              static_cast<int>(kInt64) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && static_cast<int>(kFail) == ORT_FAIL &&
              static_cast<int>(kInvalidArgument) == ORT_INVALID_ARGUMENT &&
              static_cast<int>(kRequired) == INPUT_OUTPUT_REQUIRED &&
              static_cast<int>(kOptional) == INPUT_OUTPUT_OPTIONAL &&
              static_cast<int>(kDefaultMemory) == OrtMemTypeDefault);

}  // namespace
