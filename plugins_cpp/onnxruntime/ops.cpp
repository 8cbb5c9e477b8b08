// Products for ONNX Runtime on the CPU: libreroute_onnxruntime.so, domain "reroute.cpu".
//
//   Linear8 (x, values, scales) -> y                                             attributes K, N
//   Linear4 (x, values) -> y
//   Mlp8 (x, gate values, gate scales, up ..., down ...) -> y                    attributes K, F, N
//   Mlp4 (x, gate values, up values, down values) -> y
//
// x is float [..., K]; matrices are as in reroute/rows8.h. Work is divided among the session's own threads.
#include <atomic>
#include <limits>
#include <mutex>
#include <new>
#include <thread>

#include "ort_abi.h"
#include "reroute/rows8.h"

namespace {

using namespace reroute::ort;
using reroute::Matrix;
using reroute::Pool;

Error* fail(const Api* api, ErrorCode code, const char* message) { return CreateStatus::call(api, code, message); }

// What a node is made from.
struct Kernel {
    const Api* api = nullptr;
    std::int64_t inner = 0, hidden = 0, outer = 0;  // K, F (0 of a linear), N
    int bits = 8;
    std::atomic<bool> checked{false};  // that its matrices are of their size: they are the graph's and do not change
    int threads = 1;                   // of the machine that this process may use: what the session has is not told
};

struct Parallel {
    const Kernel& kernel;
    const KernelContext* context;
    Error* failed = nullptr;

    static void run(void* self, std::size_t count, void (*task)(void*, std::size_t), void* data) {
        auto& parallel = *static_cast<Parallel*>(self);
        Error* error = KernelContextParallelFor::call(parallel.kernel.api, parallel.context, task, count, 0, data);
        if (error != nullptr) parallel.failed = error;
    }
    Pool pool() { return {run, this, kernel.threads}; }
};

template <typename T>
Error* data_of(const Api* api, const Value* value, T** data) {
    void* address = nullptr;
    Error* error = GetTensorMutableData::call(api, const_cast<Value*>(value), &address);
    *data = static_cast<T*>(address);
    return error;
}

// Refuses a tensor that is not of `count` elements.
Error* require_count(const Api* api, const Value* value, std::int64_t count) {
    TensorInfo* info = nullptr;
    if (Error* error = GetTensorTypeAndShape::call(api, value, &info)) return error;
    std::size_t have = 0;
    Error* error = GetTensorShapeElementCount::call(api, info, &have);
    ReleaseTensorTypeAndShapeInfo::call(api, info);
    if (error != nullptr || have == static_cast<std::size_t>(count)) return error;
    return fail(api, kInvalidArgument, "a matrix is not of the size that the node says");
}

// The next matrix of the inputs, which begin at `index`.
Error* next_matrix(const Kernel& k, const KernelContext* context, std::size_t* index, std::int64_t rows,
                   std::int64_t columns, Matrix* matrix) {
    *matrix = {rows, columns, k.bits, nullptr, nullptr};
    const Value* values = nullptr;
    if (Error* error = KernelContextGetInput::call(k.api, context, (*index)++, &values)) return error;
    if (!k.checked) {
        if (Error* error = require_count(k.api, values, matrix->bytes())) return error;
    }
    if (Error* error = data_of(k.api, values, &matrix->values)) return error;
    if (k.bits == 4) return nullptr;
    const Value* scales = nullptr;
    if (Error* error = KernelContextGetInput::call(k.api, context, (*index)++, &scales)) return error;
    if (!k.checked) {
        if (Error* error = require_count(k.api, scales, columns)) return error;
    }
    return data_of(k.api, scales, &matrix->scales);
}

// The rows of x, whose last dimension is K, and the output of its shape but for that dimension.
Error* rows_of(const Kernel& k, KernelContext* context, std::int64_t* rows, const float** x, float** y) {
    const Value* input = nullptr;
    if (Error* error = KernelContextGetInput::call(k.api, context, 0, &input)) return error;
    TensorInfo* info = nullptr;
    if (Error* error = GetTensorTypeAndShape::call(k.api, input, &info)) return error;
    std::size_t rank = 0;
    std::int64_t shape[8] = {};
    Error* error = GetDimensionsCount::call(k.api, info, &rank);
    if (error == nullptr && rank > 0 && rank <= 8) error = GetDimensions::call(k.api, info, shape, rank);
    ReleaseTensorTypeAndShapeInfo::call(k.api, info);
    if (error != nullptr) return error;
    if (rank == 0 || rank > 8 || shape[rank - 1] != k.inner) {
        return fail(k.api, kInvalidArgument, "the last dimension of x is not the matrix's");
    }
    *rows = 1;
    for (std::size_t i = 0; i + 1 < rank; ++i) *rows *= shape[i];
    shape[rank - 1] = k.outer;
    Value* output = nullptr;
    error = KernelContextGetOutput::call(k.api, context, 0, shape, rank, &output);
    if (error == nullptr) error = data_of(k.api, input, x);
    if (error == nullptr) error = data_of(k.api, output, y);
    return error;
}

Error* compute(void* self, KernelContext* context) {
    Kernel& k = *static_cast<Kernel*>(self);
    std::int64_t rows = 0;
    const float* x = nullptr;
    float* y = nullptr;
    if (Error* error = rows_of(k, context, &rows, &x, &y)) return error;
    Parallel parallel{k, context};
    reroute::Status result;
    std::size_t index = 1;
    if (k.hidden == 0) {
        Matrix weight;
        if (Error* error = next_matrix(k, context, &index, k.inner, k.outer, &weight)) return error;
        result = reroute::linear(weight, rows, x, y, parallel.pool());
    } else {
        Matrix gate, up, down;
        if (Error* error = next_matrix(k, context, &index, k.inner, k.hidden, &gate)) return error;
        if (Error* error = next_matrix(k, context, &index, k.inner, k.hidden, &up)) return error;
        if (Error* error = next_matrix(k, context, &index, k.hidden, k.outer, &down)) return error;
        result = reroute::mlp(gate, up, down, rows, x, y, parallel.pool());
    }
    k.checked = true;
    if (parallel.failed != nullptr) return parallel.failed;
    return result == reroute::Status::kOk ? nullptr : fail(k.api, kFail, reroute::describe(result));
}

template <bool Mlp, int Bits>
Error* create(const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
    auto* made = new (std::nothrow) Kernel;
    if (made == nullptr) return fail(api, kFail, "out of memory");
    made->api = api;
    made->bits = Bits;
    made->threads = static_cast<int>(std::thread::hardware_concurrency());
    Error* error = KernelInfoGetAttributeInt64::call(api, info, "K", &made->inner);
    if (error == nullptr) error = KernelInfoGetAttributeInt64::call(api, info, "N", &made->outer);
    if (error == nullptr && Mlp) error = KernelInfoGetAttributeInt64::call(api, info, "F", &made->hidden);
    if (error != nullptr) {
        delete made;
        return error;
    }
    *kernel = made;
    return nullptr;
}

template <bool Mlp, int Bits>
CustomOp op() {
    CustomOp made{};
    made.version = kApiVersion;
    made.name = [](const CustomOp*) { return Bits == 8 ? (Mlp ? "Mlp8" : "Linear8") : (Mlp ? "Mlp4" : "Linear4"); };
    made.provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
    made.input_type = [](const CustomOp*, std::size_t index) {
        const bool values = Bits == 4 ? index > 0 : index % 2 == 1;
        return values ? kUint8 : kFloat;
    };
    made.input_count = [](const CustomOp*) { return std::size_t{1 + (Mlp ? 3 : 1) * (Bits == 8 ? 2 : 1)}; };
    made.output_type = [](const CustomOp*, std::size_t) { return kFloat; };
    made.output_count = [](const CustomOp*) { return std::size_t{1}; };
    made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.input_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    made.output_characteristic = [](const CustomOp*, std::size_t) { return kRequired; };
    made.input_memory = [](const CustomOp*, std::size_t) { return kDefaultMemory; };
    made.variadic_input_min = [](const CustomOp*) { return 1; };
    made.variadic_input_same = [](const CustomOp*) { return 1; };
    made.variadic_output_min = [](const CustomOp*) { return 1; };
    made.variadic_output_same = [](const CustomOp*) { return 1; };
    made.create_kernel_v2 = create<Mlp, Bits>;
    made.compute_v2 = compute;
    made.start_version = [](const CustomOp*) { return 1; };
    made.end_version = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
    return made;
}

}  // namespace

extern "C" {

// ONNX Runtime calls this when a session is given the library.
__attribute__((visibility("default"))) reroute::ort::Error* RegisterCustomOps(SessionOptions* options,
                                                                              const ApiBase* base) {
    static const CustomOp ops[] = {op<false, 8>(), op<true, 8>(), op<false, 4>(), op<true, 4>()};
    static std::mutex mutex;
    static Domain* domain = nullptr;  // of the process: all its sessions refer to it
    const Api* api = base->get_api(kApiVersion);
    if (api == nullptr) return nullptr;  // an older one: it will not know the operators, and say so
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
        Domain* made = nullptr;
        if (auto* error = CreateCustomOpDomain::call(api, "reroute.cpu", &made)) return error;
        for (const CustomOp& one : ops) {
            if (auto* error = CustomOpDomainAdd::call(api, made, &one)) return error;
        }
        domain = made;
    }
    return AddCustomOpDomain::call(api, options, domain);
}

// For `reroute build`, which refuses a processor that has only the portable form.
__attribute__((visibility("default"))) const char* reroute_rows8_instructions() {
    return reroute::rows8_instructions();
}
}
