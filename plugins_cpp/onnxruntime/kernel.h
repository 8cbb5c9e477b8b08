// What the operators of this library share: tensors of a call, its threads, and the table that describes an operator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <thread>

#include "ort_abi.h"
#include "reroute/pool.h"
#include "reroute/status.h"

namespace reroute::ort {

inline Error* fail(const Api* api, ErrorCode code, const char* message) {
    return CreateStatus::call(api, code, message);
}

// What a call's kernel returns to ONNX Runtime.
inline Error* finish(const Api* api, Error* failed, Status status) {
    if (failed != nullptr) return failed;
    return status == Status::kOk ? nullptr : fail(api, kFail, describe(status));
}

// Threads of the machine that this process may use: what the session has is not told.
inline int machine_threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

// The threads of a session, for one call.
class Threads {
  public:
    Threads(const Api* api, const KernelContext* context, int threads)
        : api_(api), context_(context), threads_(threads) {}

    Pool pool() { return {run, this, threads_}; }
    Error* failed() const { return failed_; }

  private:
    static void run(void* self, std::size_t count, void (*task)(void*, std::size_t), void* data) {
        auto& all = *static_cast<Threads*>(self);
        Error* error = KernelContextParallelFor::call(all.api_, all.context_, task, count, 0, data);
        if (error != nullptr) all.failed_ = error;
    }

    const Api* api_;
    const KernelContext* context_;
    int threads_;
    Error* failed_ = nullptr;
};

constexpr std::size_t kMaxRank = 8;

struct Shape {
    std::int64_t sizes[kMaxRank] = {};
    std::size_t rank = 0;

    std::int64_t last() const { return rank > 0 ? sizes[rank - 1] : 0; }
};

template <typename T>
Error* data_of(const Api* api, const Value* value, T** data) {
    void* address = nullptr;
    Error* error = GetTensorMutableData::call(api, const_cast<Value*>(value), &address);
    *data = static_cast<T*>(address);
    return error;
}

// A tensor's shape, of `kMaxRank` dimensions at most.
inline Error* shape_of(const Api* api, const Value* value, Shape* shape) {
    TensorInfo* info = nullptr;
    if (Error* error = GetTensorTypeAndShape::call(api, value, &info)) return error;
    Error* error = GetDimensionsCount::call(api, info, &shape->rank);
    if (error == nullptr && shape->rank <= kMaxRank) error = GetDimensions::call(api, info, shape->sizes, shape->rank);
    ReleaseTensorTypeAndShapeInfo::call(api, info);
    if (error == nullptr && shape->rank > kMaxRank)
        error = fail(api, kInvalidArgument, "a tensor has too many dimensions");
    return error;
}

template <typename T>
Error* input(const Api* api, const KernelContext* context, std::size_t index, Shape* shape, const T** data) {
    const Value* value = nullptr;
    if (Error* error = KernelContextGetInput::call(api, context, index, &value)) return error;
    if (Error* error = shape_of(api, value, shape)) return error;
    return data_of(api, value, data);
}

template <typename T>
Error* output(const Api* api, KernelContext* context, std::size_t index, const Shape& shape, T** data) {
    Value* value = nullptr;
    if (Error* error = KernelContextGetOutput::call(api, context, index, shape.sizes, shape.rank, &value)) return error;
    return data_of(api, value, data);
}

// An operator whose inputs and outputs are all there; names, types, counts and functions are the caller's.
inline CustomOp described() {
    CustomOp op{};
    op.version = kApiVersion;
    op.provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
    op.output_type = [](const CustomOp*, std::size_t) { return kFloat; };
    op.input_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    op.output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    op.input_memory = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
    op.variadic_input_min = [](const CustomOp*) { return 1; };
    op.variadic_input_same = [](const CustomOp*) { return 1; };
    op.variadic_output_min = [](const CustomOp*) { return 1; };
    op.variadic_output_same = [](const CustomOp*) { return 1; };
    op.start_version = [](const CustomOp*) { return 1; };
    op.end_version = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
    return op;
}

// The operators, see products.cpp, attention.cpp and routing.cpp.
CustomOp linear_op();
CustomOp linears_op();
CustomOp mlp_op();
CustomOp rest_of_layer_op();
CustomOp attention_op();
CustomOp select_op();
CustomOp gather_op();
CustomOp scatter_op();

}  // namespace reroute::ort
