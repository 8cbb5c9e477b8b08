// RerouteGather and RerouteScatter: rows of a stage out of the full sequence, and back into it.
//
//   gather    picked[b, i] = full[b, slots[b, i]]
//   scatter   updated = full, with updated[b, slots[b, i]] = picked[b, i]; every other row stays bit-identical
//
// Rows are bytes: any element type and any row size, with 16-byte accesses where addresses and size allow them.
// A slot outside 0..S-1 is refused by the CPU reference; on the device gather writes a row of zeros and scatter skips
// it. The slots of a scatter ascend strictly, as RerouteSelect writes them; on the device other orders give unspecified
// rows, never an access out of bounds. No rows, or rows of no bytes, are a no-op.
#pragma once

#include "reroute/pool.h"
#include "reroute/status.h"
#include "reroute/types.h"

namespace reroute {

// Letters: B batch, S rows of the full sequence, A rows picked.
struct RowsShape {
    std::int64_t batch = 1;
    std::int64_t rows = 0;
    std::int64_t picked = 0;
    std::int64_t row_bytes = 0;
};

// Limits of one call: B * S and B * A, row_bytes, and the bytes of either tensor.
constexpr std::int64_t kMaxTotalRows = std::int64_t{1} << 30;
constexpr std::int64_t kMaxRowBytes = std::int64_t{1} << 25;
constexpr std::int64_t kMaxTotalBytes = std::int64_t{1} << 38;

Status check(const RowsShape& shape) noexcept;

Status gather_cpu(const RowsShape& shape, const void* full, const std::int64_t* slots, void* picked) noexcept;
Status gather_cpu_fast(const RowsShape&, const void* full, const std::int64_t* slots, void* picked,
                       const Pool&) noexcept;
Status gather_cuda_simple(const RowsShape&, const void* full, const std::int64_t* slots, void* picked, Stream) noexcept;
Status gather_cuda_fast(const RowsShape&, const void* full, const std::int64_t* slots, void* picked, Stream) noexcept;

// `updated` may be `full` itself: then only the picked rows are written. Any other overlap is not allowed.
Status scatter_cpu(const RowsShape& shape, const void* full, const std::int64_t* slots, const void* picked,
                   void* updated) noexcept;
Status scatter_cpu_fast(const RowsShape&, const void* full, const std::int64_t* slots, const void* picked,
                        void* updated, const Pool&) noexcept;
Status scatter_cuda_simple(const RowsShape&, const void* full, const std::int64_t* slots, const void* picked,
                           void* updated, Stream) noexcept;
Status scatter_cuda_fast(const RowsShape&, const void* full, const std::int64_t* slots, const void* picked,
                         void* updated, Stream) noexcept;

}  // namespace reroute
