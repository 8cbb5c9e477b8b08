// The few things the kernels need from their compiler: CUDA, or the block emulator of tests/emulator, which runs the
// same sources on a CPU. Kernels are launched through launch(), because <<< >>> is CUDA's alone.
#pragma once

#include "reroute/half.h"
#include "reroute/status.h"
#include "reroute/types.h"

#if defined(REROUTE_EMULATE_CUDA)
#include "emulator.h"
#define REROUTE_UNROLL
#else
#include <cuda_runtime.h>
#define REROUTE_UNROLL _Pragma("unroll")
#endif

namespace reroute {

constexpr unsigned kWarp = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFU;

struct Launch {
    dim3 grid;
    dim3 block;
    std::size_t shared_bytes = 0;
    Stream stream = nullptr;
};

// Keeps the runtime's message for cuda_error_message().
Status cuda_status(cudaError_t error) noexcept;

#if defined(REROUTE_EMULATE_CUDA)

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& shape, Arguments... arguments) noexcept {
    emulator::run(shape.grid, shape.block, shape.shared_bytes, [=] { kernel(arguments...); });
    return Status::kOk;
}

template <typename T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(emulator::dynamic_shared_memory());
}

#else

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& shape, Arguments... arguments) noexcept {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = shape.stream;
    return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <typename T>
__device__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char reroute_dynamic_shared[];
    return reinterpret_cast<T*>(reroute_dynamic_shared);
}

#endif

// isnan() is a macro, a function or a template, depending on who compiles.
__device__ inline bool is_nan(float value) { return value != value; }

inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace reroute
