// How the CPU kernels divide work, and which form of them runs.
#pragma once

#include <cstddef>

namespace reroute {

// Who runs `count` calls of task(data, index), in any order and at once; returns when all are done.
struct Pool {
    void (*run)(void* context, std::size_t count, void (*task)(void* data, std::size_t index), void* data) = nullptr;
    void* context = nullptr;
    int threads = 1;
};

// One after the other, in this thread.
Pool serial_pool() noexcept;

// The instructions in use: "avx512_vnni" or "portable". The portable forms are right and slow.
const char* cpu_instructions() noexcept;

// For tests: the portable forms whatever the processor has.
void cpu_use_portable(bool portable) noexcept;

}  // namespace reroute
