#include "select_plugin.h"

#include <algorithm>

namespace reroute::trt {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::PluginFieldType;

namespace {
enum Input { kQuery, kKeys, kCandidates, kAlways };
}

SelectPlugin::SelectPlugin(const SelectAttributes& attributes)
    : RoutingPlugin("RerouteSelect", {{false, 2}, {false, 3}, {true, 2}, {true, 2}, {true, 2}}),
      attributes_(attributes) {}

SelectShape SelectPlugin::shape_of(const Call& call, bool bounds) const {
    SelectShape shape;
    shape.batch = call.dims[kKeys].d[0];
    shape.rows = call.dims[kKeys].d[1];
    shape.candidates = call.dims[kCandidates].d[1];
    shape.always = call.dims[kAlways].d[1];
    shape.heads = attributes_.num_heads;
    shape.kv_heads = attributes_.num_kv_heads;
    shape.head_size = call.dims[kQuery].d[1] / attributes_.num_heads;
    shape.keep = attributes_.keep;
    shape.scale = attributes_.scale;
    shape.dtype = call.type == DataType::kHALF   ? DType::kFloat16
                  : call.type == DataType::kBF16 ? DType::kBFloat16
                                                 : DType::kFloat32;
    // The largest N and the largest T of a profile need not occur together.
    if (bounds) shape.rows = std::max(shape.rows, shape.candidates + shape.always);
    return shape;
}

std::string SelectPlugin::problem(const Call& call, bool bounds) const {
    const SelectShape shape = shape_of(call, bounds);
    const auto& query = call.dims[kQuery];
    const auto& keys = call.dims[kKeys];
    if (query.d[1] != shape.heads * shape.head_size || keys.d[2] != shape.kv_heads * shape.head_size) {
        return "q_last " + text_of(query) + " and keys " + text_of(keys) +
               " do not fit num_heads = " + std::to_string(shape.heads) +
               " and num_kv_heads = " + std::to_string(shape.kv_heads);
    }
    for (const auto& dims : call.dims) {
        if (dims.d[0] != shape.batch) {
            return "batch sizes differ: " + text_of(dims) + " and keys " + text_of(keys);
        }
    }
    const Status status = check(shape);
    if (status == Status::kOk) return {};
    return std::string(describe(status)) + ": keys " + text_of(keys) + ", candidates " +
           text_of(call.dims[kCandidates]) + ", always " + text_of(call.dims[kAlways]) + "; limits are " +
           std::to_string(kMaxRows) + " rows and " + std::to_string(kMaxCandidates) + " candidates";
}

nvinfer1::DimsExprs SelectPlugin::output_shape(nvinfer1::DimsExprs const* in, nvinfer1::IExprBuilder& builder) const {
    nvinfer1::DimsExprs out{};
    out.nbDims = 2;
    out.d[0] = in[kAlways].d[0];
    const auto* kept =
        builder.operation(DimensionOperation::kMIN, *builder.constant(attributes_.keep), *in[kCandidates].d[1]);
    out.d[1] = builder.operation(DimensionOperation::kSUM, *in[kAlways].d[1], *kept);
    return out;
}

std::size_t SelectPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t in_count,
                                           nvinfer1::DynamicPluginTensorDesc const*, std::int32_t) const noexcept {
    if (in_count != inputs()) return 0;
    return select_workspace_bytes(shape_of(largest_call(in), true));
}

Status SelectPlugin::run(const Call& call, void const* const* in, void* out, void* workspace,
                         cudaStream_t stream) const {
    const SelectShape shape = shape_of(call, false);
    const SelectInputs inputs{in[kQuery], in[kKeys], static_cast<const std::int64_t*>(in[kCandidates]),
                              static_cast<const std::int64_t*>(in[kAlways])};
    // TensorRT does not say how much it gave; getWorkspaceSize asked for the largest shape of the profile.
    const Workspace memory{workspace, select_workspace_bytes(shape)};
    return select_cuda_fast(shape, inputs, static_cast<std::int64_t*>(out), memory, stream);
}

std::vector<nvinfer1::PluginField> SelectPlugin::fields() const {
    return {{"keep", &attributes_.keep, PluginFieldType::kINT32, 1},
            {"num_heads", &attributes_.num_heads, PluginFieldType::kINT32, 1},
            {"num_kv_heads", &attributes_.num_kv_heads, PluginFieldType::kINT32, 1},
            {"scale", &attributes_.scale, PluginFieldType::kFLOAT32, 1}};
}

}  // namespace reroute::trt
