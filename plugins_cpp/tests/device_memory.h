// What the kernel check needs of a device: memory, a stream, a graph. On a GPU these are CUDA's; under the emulator
// device memory is host memory, and the same kernels run on it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "reroute/status.h"
#include "reroute/types.h"

#if defined(REROUTE_EMULATE_CUDA)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace device {

#if defined(REROUTE_EMULATE_CUDA)

inline constexpr bool kEmulated = true;
inline const char* why_not() { return nullptr; }
inline std::string name() { return "block emulator on the CPU"; }
inline void* allocate(std::size_t bytes) {
    void* data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (data == nullptr) throw std::bad_alloc();
    return data;
}
inline void release(void* data) { std::free(data); }
inline void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);  // an empty vector has no address, and memcpy wants one
}
inline reroute::Stream stream() { return nullptr; }
inline void synchronize() {}

template <typename Body>
reroute::Status captured(Body body) {
    return body();
}

#else

inline constexpr bool kEmulated = false;

inline void must(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Null when a device can be used, otherwise the runtime's reason.
inline const char* why_not() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return count > 0 ? nullptr : "no CUDA device";
}

inline std::string name() {
    cudaDeviceProp properties{};
    must(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
}

inline void* allocate(std::size_t bytes) {
    void* data = nullptr;
    must(cudaMalloc(&data, bytes), "cudaMalloc");
    return data;
}
inline void release(void* data) { cudaFree(data); }
inline void copy(void* to, const void* from, std::size_t bytes) {
    must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
    // From pageable memory it may return before the data is there, and our stream does not wait for the default one.
    must(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

// One stream that does not wait for the default stream, so that a missing stream argument shows.
inline reroute::Stream stream() {
    static const reroute::Stream stream = [] {
        cudaStream_t made = nullptr;
        must(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
        return made;
    }();
    return stream;
}
inline void synchronize() { must(cudaStreamSynchronize(stream()), "cudaStreamSynchronize"); }

// Runs body() as it is, which also loads its kernels, then captures it in a graph and launches that twice: what an
// engine with CUDA graphs does.
template <typename Body>
reroute::Status captured(Body body) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    const reroute::Status plain = body();
    synchronize();
    if (plain != reroute::Status::kOk) return plain;
    must(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const reroute::Status status = body();
    must(cudaStreamEndCapture(stream(), &graph), "cudaStreamEndCapture");
    must(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    must(cudaGraphLaunch(executable, stream()), "cudaGraphLaunch");
    must(cudaGraphLaunch(executable, stream()), "cudaGraphLaunch");
    synchronize();
    must(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    must(cudaGraphDestroy(graph), "cudaGraphDestroy");
    return status;
}

#endif

// `count` values of T on the device, `offset` bytes past an aligned address, so that misaligned rows can be tested.
template <typename T>
class Buffer {
  public:
    explicit Buffer(std::size_t count, std::size_t offset = 0)
        : count_(count), base_(allocate(count * sizeof(T) + offset + 1)), offset_(offset) {
        const std::vector<unsigned char> garbage(count * sizeof(T), 0x5A);
        copy(data(), garbage.data(), garbage.size());
    }
    explicit Buffer(const std::vector<T>& values, std::size_t offset = 0) : Buffer(values.size(), offset) {
        copy(data(), values.data(), values.size() * sizeof(T));
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(base_); }

    T* data() { return reinterpret_cast<T*>(static_cast<unsigned char*>(base_) + offset_); }
    std::vector<T> read() {
        synchronize();
        std::vector<T> values(count_);
        copy(values.data(), data(), count_ * sizeof(T));
        return values;
    }

  private:
    std::size_t count_;
    void* base_;
    std::size_t offset_;
};

}  // namespace device
