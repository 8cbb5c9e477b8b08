// Element types and handles of the raw-pointer interface. No CUDA header: a stream is a forward-declared handle, the
// same type as cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace reroute {

using Stream = CUstream_st*;

enum class DType : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Device memory of the caller, 256-byte aligned (as cudaMalloc and TensorRT give it). One per stream.
struct Workspace {
    void* data = nullptr;
    std::size_t bytes = 0;
};

}  // namespace reroute
