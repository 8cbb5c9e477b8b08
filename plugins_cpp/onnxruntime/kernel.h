// What the operators of this library share: tensors of a call, its threads, and the table that describes an operator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <new>
#include <thread>

#include "ort_abi.h"
#include "reroute/pool.h"
#include "reroute/status.h"

namespace reroute::ort {

inline Error* fail(const Api* api, ErrorCode code, const char* message) {
    return CreateStatus::call(api, code, message);
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

// Reads a node's attributes one after the other; the first error stays.
class Attributes {
  public:
    Attributes(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

    std::int64_t whole(const char* name) {
        std::int64_t value = 0;
        if (error_ == nullptr) error_ = KernelInfoGetAttributeInt64::call(api_, info_, name, &value);
        return value;
    }
    float real(const char* name) {
        float value = 0;
        if (error_ == nullptr) error_ = KernelInfoGetAttributeFloat::call(api_, info_, name, &value);
        return value;
    }
    Error* error() const { return error_; }

  private:
    const Api* api_;
    const KernelInfo* info_;
    Error* error_ = nullptr;
};

// What every node has.
struct Node {
    const Api* api = nullptr;
    int threads = 1;
};

template <typename Op>
Error* create(const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
    auto* made = new (std::nothrow) typename Op::Kernel;
    if (made == nullptr) return fail(api, kFail, "out of memory");
    made->api = api;
    made->threads = machine_threads();
    Attributes attributes(api, info);
    Op::make(attributes, *made);
    if (Error* error = attributes.error()) {
        delete made;
        return error;
    }
    *kernel = made;
    return nullptr;
}

template <typename Op>
Error* compute(void* self, KernelContext* context) try {
    auto& node = *static_cast<typename Op::Kernel*>(self);
    Threads threads{node.api, context, node.threads};
    Status status = Status::kOk;
    if (Error* error = Op::compute(node, context, threads.pool(), &status)) return error;
    if (threads.failed() != nullptr || status == Status::kOk) return threads.failed();
    return fail(node.api, kFail, describe(status));
} catch (const std::bad_alloc&) {
    return fail(static_cast<typename Op::Kernel*>(self)->api, kFail, describe(Status::kOutOfMemory));
}

// The operator that `Op` says:
//
//   Kernel                       a Node, and what it is made from
//   kName, kInputs, kOutputs     the name, and the types of what it takes and gives
//   kRequiredInputs, -Outputs    how many of them must be there
//   make(Attributes&, Kernel&)
//   compute(Kernel&, KernelContext*, Pool, Status*)
template <typename Op>
CustomOp described_by() {
    CustomOp op{};
    op.version = kApiVersion;
    op.name = [](const CustomOp*) { return Op::kName; };
    op.provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
    op.input_type = [](const CustomOp*, std::size_t index) { return Op::kInputs[index]; };
    op.input_count = [](const CustomOp*) { return std::size(Op::kInputs); };
    op.output_type = [](const CustomOp*, std::size_t index) { return Op::kOutputs[index]; };
    op.output_count = [](const CustomOp*) { return std::size(Op::kOutputs); };
    op.destroy = [](void* kernel) { delete static_cast<typename Op::Kernel*>(kernel); };
    op.input_characteristic = [](const CustomOp*, std::size_t index) {
        return index < Op::kRequiredInputs ? kRequired : kOptional;
    };
    op.output_characteristic = [](const CustomOp*, std::size_t index) {
        return index < Op::kRequiredOutputs ? kRequired : kOptional;
    };
    op.input_memory = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
    op.variadic_input_min = [](const CustomOp*) { return 1; };
    op.variadic_input_same = [](const CustomOp*) { return 1; };
    op.variadic_output_min = [](const CustomOp*) { return 1; };
    op.variadic_output_same = [](const CustomOp*) { return 1; };
    op.create_kernel_v2 = create<Op>;
    op.compute_v2 = compute<Op>;
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
