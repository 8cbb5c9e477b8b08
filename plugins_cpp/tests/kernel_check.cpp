// reroute_kernel_check: the simple and the fast CUDA kernels against the CPU reference.
//
//   reroute_kernel_check               every check; exit code 77 (CTest: skipped) where there is no GPU
//   reroute_kernel_check --benchmark   microseconds and bandwidth as JSON on stdout
//   compute-sanitizer reroute_kernel_check
//
// reroute_kernel_check_emulated is the same program with the same kernel sources under the block emulator.
#include "kernel_check.h"

#include <cstring>

#include "check.h"
#include "device_memory.h"

namespace {
constexpr int kSkipped = 77;
constexpr int kUsage = 2;
}  // namespace

int main(int argc, char** argv) {
    const bool benchmark = argc == 2 && std::strcmp(argv[1], "--benchmark") == 0;
    if (argc > 1 && !benchmark) {
        std::fprintf(stderr, "error: unknown argument %s\n\nhint: reroute_kernel_check [--benchmark]\n", argv[1]);
        return kUsage;
    }
    if (const char* reason = device::why_not()) {
        std::printf("reroute_kernel_check: LEFT OUT, no GPU to run on (%s). The CUDA kernels were compiled only.\n",
                    reason);
        return kSkipped;
    }
    try {
#if !defined(REROUTE_EMULATE_CUDA)
        if (benchmark) return run_benchmark();
#endif
        std::printf("device: %s\n", device::name().c_str());
#if defined(REROUTE_EMULATE_CUDA)
        for (const auto order : {emulator::Order::kAscending, emulator::Order::kDescending}) {
            emulator::set_order(order);
            check_select();
            check_rows();
        }
        std::printf("left out: a real GPU, graph capture, misuse of memory ordering between warps\n");
#else
        check_select();
        check_rows();
#endif
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return check::finish(device::kEmulated ? "reroute_kernel_check_emulated" : "reroute_kernel_check");
}
