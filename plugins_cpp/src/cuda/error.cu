#include "device.h"

namespace reroute {
namespace {
thread_local const char* last_message = "no CUDA error";
}

Status cuda_status(cudaError_t error) noexcept {
    if (error == cudaSuccess) return Status::kOk;
    last_message = cudaGetErrorString(error);
    return Status::kCuda;
}

const char* cuda_error_message() noexcept { return last_message; }

}  // namespace reroute
