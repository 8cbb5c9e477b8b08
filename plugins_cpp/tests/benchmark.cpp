// reroute_kernel_check --benchmark: microseconds of each op at the shapes of a 7B model, as one JSON object on stdout.
//
// A sample is one launch of a graph that holds the op `kInGraph` times, divided by kInGraph: no launch gaps of the
// host, as in an engine with CUDA graphs. Buffers are reused, so they are in L2 where they fit, as they are inside a
// layer. Bandwidth is the bytes that the op must move at least, as a share of a device copy moving as many, timed the
// same way.
#include <algorithm>
#include <cstdio>
#include <functional>

#include "device_memory.h"
#include "inputs.h"
#include "kernel_check.h"
#include "reroute/rows.h"
#include "select_cases.h"

namespace {

using reroute::Status;

constexpr int kInGraph = 20;
constexpr int kWarmUp = 5;
constexpr int kSamples = 50;

struct Timing {
    double median_us, min_us;
};

Timing timed(const std::function<Status()>& body) {
    const cudaStream_t stream = device::stream();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    if (body() != Status::kOk) throw std::runtime_error(reroute::cuda_error_message());  // loads the kernels
    device::synchronize();
    device::must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    Status status = Status::kOk;
    for (int i = 0; i < kInGraph && status == Status::kOk; ++i) status = body();
    device::must(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    if (status != Status::kOk) throw std::runtime_error(reroute::describe(status));
    device::must(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaEvent_t start = nullptr;
    cudaEvent_t stop = nullptr;
    device::must(cudaEventCreate(&start), "cudaEventCreate");
    device::must(cudaEventCreate(&stop), "cudaEventCreate");
    std::vector<double> samples;
    for (int i = 0; i < kWarmUp + kSamples; ++i) {
        device::must(cudaEventRecord(start, stream), "cudaEventRecord");
        device::must(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
        device::must(cudaEventRecord(stop, stream), "cudaEventRecord");
        device::must(cudaEventSynchronize(stop), "cudaEventSynchronize");
        float milliseconds = 0.0F;
        device::must(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
        if (i >= kWarmUp) samples.push_back(double{milliseconds} * 1000.0 / kInGraph);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    std::sort(samples.begin(), samples.end());
    return {samples[samples.size() / 2], samples.front()};
}

// `bytes` are read and written together; a copy of half of them moves as many.
void report(const char* op, const char* version, std::int64_t candidates, std::int64_t bytes,
            const std::function<Status()>& body) {
    static bool first = true;
    const auto half = static_cast<std::size_t>(bytes / 2);
    device::Buffer<unsigned char> from(half);
    device::Buffer<unsigned char> to(half);
    const Timing copy = timed([&] {
        const cudaError_t error =
            cudaMemcpyAsync(to.data(), from.data(), half, cudaMemcpyDeviceToDevice, device::stream());
        return error == cudaSuccess ? Status::kOk : Status::kCuda;
    });
    const Timing timing = timed(body);
    std::printf(
        "%s\n  {\"op\": \"%s\", \"version\": \"%s\", \"n\": %lld, \"median_us\": %.3f, \"min_us\": %.3f, \"bytes\": "
        "%lld, "
        "\"gb_per_s\": %.1f, \"copy_median_us\": %.3f, \"share_of_copy\": %.3f}",
        first ? "" : ",", op, version, static_cast<long long>(candidates), timing.median_us, timing.min_us,
        static_cast<long long>(bytes), static_cast<double>(bytes) / timing.median_us / 1000.0, copy.median_us,
        copy.median_us / timing.median_us);
    first = false;
}

void benchmark_at(std::int64_t n) {
    constexpr std::int64_t kText = 64, kKeep = 64, kHeads = 32, kHead = 128, kHidden = 4096;
    const std::int64_t rows = n + kText;
    const reroute::SelectShape s =
        select_shape(1, rows, n, kText, kHeads, kHeads, kHead, kKeep, reroute::DType::kFloat16);
    inputs::Random random(8);
    const inputs::Slots host(s, false, random);
    device::Buffer<unsigned char> q(
        inputs::encode(inputs::floats(static_cast<std::size_t>(kHidden), inputs::Fill::kRandom, random), s.dtype));
    device::Buffer<unsigned char> keys(inputs::encode(
        inputs::floats(static_cast<std::size_t>(rows * kHidden), inputs::Fill::kRandom, random), s.dtype));
    device::Buffer<std::int64_t> candidates(host.candidates);
    device::Buffer<std::int64_t> always(host.always);
    device::Buffer<std::int64_t> slots(static_cast<std::size_t>(select_length(s)));
    const std::size_t bytes = select_workspace_bytes(s);
    device::Buffer<unsigned char> scratch(bytes);
    const reroute::SelectInputs in{q.data(), keys.data(), candidates.data(), always.data()};
    const auto stream = device::stream();
    const auto select = [&](auto version) {
        return [&, version] { return version(s, in, slots.data(), {scratch.data(), bytes}, stream); };
    };
    const std::int64_t key_bytes = rows * kHidden * 2;
    report("select", "fast", n, key_bytes, select(reroute::select_cuda_fast));
    report("select", "simple", n, key_bytes, select(reroute::select_cuda_simple));

    const reroute::RowsShape r{1, rows, select_length(s), kHidden * 2};
    device::Buffer<unsigned char> full(static_cast<std::size_t>(r.rows * r.row_bytes));
    device::Buffer<unsigned char> picked(static_cast<std::size_t>(r.picked * r.row_bytes));
    device::Buffer<unsigned char> updated(static_cast<std::size_t>(r.rows * r.row_bytes));
    const auto gather = [&](auto version) {
        return [&, version] { return version(r, full.data(), slots.data(), picked.data(), stream); };
    };
    const auto scatter = [&](auto version) {
        return [&, version] { return version(r, full.data(), slots.data(), picked.data(), updated.data(), stream); };
    };
    report("gather", "fast", n, 2 * r.picked * r.row_bytes, gather(reroute::gather_cuda_fast));
    report("gather", "simple", n, 2 * r.picked * r.row_bytes, gather(reroute::gather_cuda_simple));
    report("scatter", "fast", n, 2 * r.rows * r.row_bytes, scatter(reroute::scatter_cuda_fast));
    report("scatter", "simple", n, 2 * r.rows * r.row_bytes, scatter(reroute::scatter_cuda_simple));
}

}  // namespace

int run_benchmark() {
    int runtime = 0;
    int driver = 0;
    device::must(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    device::must(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    std::printf(
        "{\"device\": \"%s\", \"cuda_runtime\": %d, \"cuda_driver\": %d, \"dtype\": \"float16\", \"heads\": 32, "
        "\"head_size\": 128, \"text\": 64, \"keep\": 64, \"hidden\": 4096, \"in_graph\": %d, \"samples\": %d, "
        "\"l2\": \"warm\", \"results\": [",
        device::name().c_str(), runtime, driver, kInGraph, kSamples);
    for (const std::int64_t n : {576, 4096}) benchmark_at(n);
    std::printf("\n]}\n");
    return 0;
}
