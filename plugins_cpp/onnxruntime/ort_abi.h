// The part of ONNX Runtime's C interface that this library uses. ONNX Runtime's Python packages bring no header, and a
// library for them should be built where they are. The interface is a table that only grows, so what is used is
// declared by its place. Where the header is at hand (ORT_INCLUDE_DIR), ort_abi_check.cpp compares every place with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reroute::ort {

// Version 17 (ONNX Runtime 1.17) is the first with all of this.
constexpr std::uint32_t kApiVersion = 17;

struct Error;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct CustomOp;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

// A table of functions.
struct Api;

template <int Place, typename Signature>
struct Entry;

template <int Place, typename Result, typename... Arguments>
struct Entry<Place, Result(Arguments...)> {
    static constexpr int place = Place;
    static Result call(const Api* api, Arguments... arguments) {
        using Function = Result (*)(Arguments...);
        return reinterpret_cast<Function>(reinterpret_cast<void* const*>(api)[Place])(arguments...);
    }
};

using CreateStatus = Entry<0, Error*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Entry<26, Error*(const char*, Domain**)>;
using CustomOpDomainAdd = Entry<27, Error*(Domain*, const CustomOp*)>;
using AddCustomOpDomain = Entry<28, Error*(SessionOptions*, Domain*)>;
using GetTensorMutableData = Entry<51, Error*(Value*, void**)>;
using GetDimensionsCount = Entry<61, Error*(const TensorInfo*, std::size_t*)>;
using GetDimensions = Entry<62, Error*(const TensorInfo*, std::int64_t*, std::size_t)>;
using GetTensorShapeElementCount = Entry<64, Error*(const TensorInfo*, std::size_t*)>;
using GetTensorTypeAndShape = Entry<65, Error*(const Value*, TensorInfo**)>;
using KernelInfoGetAttributeFloat = Entry<85, Error*(const KernelInfo*, const char*, float*)>;
using KernelInfoGetAttributeInt64 = Entry<86, Error*(const KernelInfo*, const char*, std::int64_t*)>;
using KernelContextGetInput = Entry<90, Error*(const KernelContext*, std::size_t, const Value**)>;
using KernelContextGetOutput =
    Entry<91, Error*(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(TensorInfo*)>;
using KernelContextParallelFor =
    Entry<274, Error*(const KernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*)>;

struct ApiBase {
    const Api* (*get_api)(std::uint32_t version);
    const char* (*get_version)();
};

// OrtCustomOp, up to the members that version 17 reads.
struct CustomOp {
    std::uint32_t version;
    void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    ElementType (*input_type)(const CustomOp*, std::size_t);
    std::size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, std::size_t);
    std::size_t (*output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy)(void*);
    Characteristic (*input_characteristic)(const CustomOp*, std::size_t);
    Characteristic (*output_characteristic)(const CustomOp*, std::size_t);
    MemoryType (*input_memory)(const CustomOp*, std::size_t);
    int (*variadic_input_min)(const CustomOp*);
    int (*variadic_input_same)(const CustomOp*);
    int (*variadic_output_min)(const CustomOp*);
    int (*variadic_output_same)(const CustomOp*);
    Error* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
    Error* (*compute_v2)(void*, KernelContext*);
    Error* (*infer_shape)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    void* later[4];  // of versions after 17
};

}  // namespace reroute::ort
