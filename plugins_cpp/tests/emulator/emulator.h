// A block emulator: runs CUDA kernel sources on a CPU, one block at a time, every thread of it a fiber.
//
// It exists because most machines that build this project have no GPU. It proves indexing, barriers, warp shuffles and
// bounds (under the sanitizers), in two thread orders, so that a result that depends on the order within a block shows.
// It proves nothing about memory ordering between warps, occupancy, speed, or what nvcc makes of the sources.
//
// Strict where CUDA is undefined: every thread must reach every barrier, and shuffles need the full warp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
    std::uint32_t x, y;
};

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
struct CUstream_st;

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, CUstream_st*) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Threads of a block start, and resume after a barrier, in ascending or in descending order.
enum class Order { kAscending, kDescending };
void set_order(Order order);

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared_memory();

void block_barrier();
// Exchanges a value within the warp: returns what lane `source` gave.
std::uint32_t exchange(std::uint32_t value, unsigned source);

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <typename T>
T exchange_as(T value, unsigned source) {
    static_assert(sizeof(T) == sizeof(std::uint32_t), "32-bit shuffles only");
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = exchange(bits, source);
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned offset) {
    return emulator::exchange_as(value, emulator::lane() ^ offset);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
    const unsigned lane = emulator::lane();
    return emulator::exchange_as(value, lane >= offset ? lane - offset : lane);
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}

template <typename T>
T atomicOr(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}

inline int __popc(std::uint32_t word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
