// RerouteGather and RerouteScatter, simple: one thread per byte.
#include "../calls.h"
#include "device.h"

namespace reroute {
namespace {

using Byte = unsigned char;

constexpr int kThreads = 256;

// Byte i of the picked rows: where its row stands in the full sequence, or -1 for a slot out of range.
__device__ std::int64_t full_row(const RowsShape& s, const std::int64_t* slots, std::int64_t picked_row) {
    const std::int64_t slot = slots[picked_row];
    return slot < 0 || slot >= s.rows ? -1 : picked_row / s.picked * s.rows + slot;
}

__global__ void gather_per_byte(RowsShape s, const Byte* full, const std::int64_t* slots, Byte* picked) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= s.batch * s.picked * s.row_bytes) return;
    const std::int64_t row = full_row(s, slots, i / s.row_bytes);
    picked[i] = row < 0 ? Byte{0} : full[row * s.row_bytes + i % s.row_bytes];
}

__global__ void scatter_per_byte(RowsShape s, const std::int64_t* slots, const Byte* picked, Byte* updated) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= s.batch * s.picked * s.row_bytes) return;
    const std::int64_t row = full_row(s, slots, i / s.row_bytes);
    if (row >= 0) updated[row * s.row_bytes + i % s.row_bytes] = picked[i];
}

Launch per_byte(const RowsShape& s, Stream stream) {
    return {blocks_for(s.batch * s.picked * s.row_bytes, kThreads), kThreads, 0, stream};
}

}  // namespace

Status gather_cuda_simple(const RowsShape& s, const void* full, const std::int64_t* slots, void* picked,
                          Stream stream) noexcept {
    const Status status = check_gather(s, full, slots, picked);
    if (status != Status::kOk || nothing_picked(s)) return status;
    return launch(gather_per_byte, per_byte(s, stream), s, static_cast<const Byte*>(full), slots,
                  static_cast<Byte*>(picked));
}

Status scatter_cuda_simple(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                           void* updated, Stream stream) noexcept {
    Status status = check_scatter(s, full, slots, picked, updated);
    if (status != Status::kOk || nothing_to_update(s)) return status;
    if (updated != full) {
        const auto bytes = static_cast<std::size_t>(s.batch * s.rows * s.row_bytes);
        status = cuda_status(cudaMemcpyAsync(updated, full, bytes, cudaMemcpyDeviceToDevice, stream));
        if (status != Status::kOk) return status;
    }
    if (nothing_picked(s)) return Status::kOk;
    return launch(scatter_per_byte, per_byte(s, stream), s, slots, static_cast<const Byte*>(picked),
                  static_cast<Byte*>(updated));
}

}  // namespace reroute
