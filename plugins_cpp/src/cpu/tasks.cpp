#include "tasks.h"

#include <atomic>

namespace reroute {
namespace {

std::atomic<bool> use_portable{false};

bool has_avx512_vnni() noexcept {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

}  // namespace

bool cpu::fast() noexcept {
    static const bool has = has_avx512_vnni();
    return has && !use_portable.load(std::memory_order_relaxed);
}

const char* cpu_instructions() noexcept { return cpu::fast() ? "avx512_vnni" : "portable"; }
void cpu_use_portable(bool portable) noexcept { use_portable = portable; }

Pool serial_pool() noexcept {
    return {[](void*, std::size_t count, void (*task)(void*, std::size_t), void* data) {
                for (std::size_t i = 0; i < count; ++i) task(data, i);
            },
            nullptr, 1};
}

}  // namespace reroute
