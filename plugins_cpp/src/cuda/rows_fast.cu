// RerouteGather and RerouteScatter, fast: the widest unit (16 bytes down to 1) that addresses and row size allow,
// several loads in flight per thread before the first store, and one pass over the data. A scatter writes each row of
// `updated` once: a binary search in the ascending slots says whether the row comes from `picked` or from `full`.
#include "../calls.h"
#include "device.h"

namespace reroute {
namespace {

using Byte = unsigned char;

constexpr unsigned kThreads = 256;
constexpr int kLoads = 4;  // units per thread

struct RowsSizes {
    std::int64_t out_rows;  // of the whole batch
    int rows, picked;
    std::int64_t units;  // per row
};

// Copies the thread's units of one row: threads x of the block side by side, blockIdx.y over the pieces of a long row.
// A null source means zeros.
template <typename Unit>
__device__ void copy_row(const Unit* source, Unit* target, std::int64_t units) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kLoads * blockDim.x + threadIdx.x;
    Unit loaded[kLoads] = {};
    REROUTE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
        const std::int64_t unit = first + static_cast<std::int64_t>(i) * blockDim.x;
        if (source != nullptr && unit < units) loaded[i] = source[unit];
    }
    REROUTE_UNROLL
    for (int i = 0; i < kLoads; ++i) {
        const std::int64_t unit = first + static_cast<std::int64_t>(i) * blockDim.x;
        if (unit < units) target[unit] = loaded[i];
    }
}

__device__ std::int64_t out_row() { return static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    gather_rows(RowsSizes s, const Unit* full, const std::int64_t* slots, Unit* picked) {
    const std::int64_t row = out_row();
    if (row >= s.out_rows) return;
    const std::int64_t slot = slots[row];
    const std::int64_t b = row / s.picked;
    const bool valid = slot >= 0 && slot < s.rows;
    copy_row(valid ? full + (b * s.rows + slot) * s.units : nullptr, picked + row * s.units, s.units);
}

// Place of `slot` among the ascending slots of one batch row, or -1.
__device__ int find_slot(const std::int64_t* slots, int count, std::int64_t slot) {
    int low = 0;
    int high = count;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (slots[middle] < slot) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && slots[low] == slot ? low : -1;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    merge_rows(RowsSizes s, const Unit* full, const std::int64_t* slots, const Unit* picked, Unit* updated) {
    const std::int64_t row = out_row();
    if (row >= s.out_rows) return;
    const std::int64_t b = row / s.rows;
    const int place = find_slot(slots + b * s.picked, s.picked, row - b * s.rows);
    const Unit* source = place < 0 ? full + row * s.units : picked + (b * s.picked + place) * s.units;
    copy_row(source, updated + row * s.units, s.units);
}

// updated == full: only the picked rows move.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    write_rows(RowsSizes s, const std::int64_t* slots, const Unit* picked, Unit* updated) {
    const std::int64_t row = out_row();
    if (row >= s.out_rows) return;
    const std::int64_t slot = slots[row];
    const std::int64_t b = row / s.picked;
    if (slot < 0 || slot >= s.rows) return;
    copy_row(picked + row * s.units, updated + (b * s.rows + slot) * s.units, s.units);
}

// Blocks of kThreads: as many threads side by side as a row can feed, the others on further rows.
Launch grid_for(const RowsSizes& s, Stream stream) {
    unsigned across = 1;
    while (across < kThreads && across * kLoads < s.units) across *= 2;
    const dim3 block(across, kThreads / across);
    return {dim3(blocks_for(s.out_rows, block.y), blocks_for(s.units, std::int64_t{across} * kLoads)), block, 0,
            stream};
}

RowsSizes sizes_for(const RowsShape& s, std::int64_t rows_out, std::int64_t unit_bytes) {
    return {s.batch * rows_out, static_cast<int>(s.rows), static_cast<int>(s.picked), s.row_bytes / unit_bytes};
}

// Calls run(Unit{}) with the widest unit that divides every address and the row size.
template <typename Run, typename... Pointers>
Status with_unit(const RowsShape& s, Run run, Pointers... pointers) {
    const std::uintptr_t bits =
        (static_cast<std::uintptr_t>(s.row_bytes) | ... | reinterpret_cast<std::uintptr_t>(pointers));
    if (bits % 16 == 0) return run(uint4{});
    if (bits % 8 == 0) return run(uint2{});
    if (bits % 4 == 0) return run(std::uint32_t{});
    if (bits % 2 == 0) return run(std::uint16_t{});
    return run(Byte{});
}

}  // namespace

Status gather_cuda_fast(const RowsShape& s, const void* full, const std::int64_t* slots, void* picked,
                        Stream stream) noexcept {
    const Status status = check_gather(s, full, slots, picked);
    if (status != Status::kOk || nothing_picked(s)) return status;
    const auto run = [&](auto unit) {
        using Unit = decltype(unit);
        const RowsSizes sizes = sizes_for(s, s.picked, sizeof(Unit));
        return launch(gather_rows<Unit>, grid_for(sizes, stream), sizes, static_cast<const Unit*>(full), slots,
                      static_cast<Unit*>(picked));
    };
    return with_unit(s, run, full, picked);
}

Status scatter_cuda_fast(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                         void* updated, Stream stream) noexcept {
    const Status status = check_scatter(s, full, slots, picked, updated);
    if (status != Status::kOk || nothing_to_update(s)) return status;
    const bool in_place = updated == full;
    if (in_place && nothing_picked(s)) return Status::kOk;
    const auto run = [&](auto unit) {
        using Unit = decltype(unit);
        const RowsSizes sizes = sizes_for(s, in_place ? s.picked : s.rows, sizeof(Unit));
        const Launch grid = grid_for(sizes, stream);
        const auto* from = static_cast<const Unit*>(picked);
        auto* to = static_cast<Unit*>(updated);
        if (in_place) return launch(write_rows<Unit>, grid, sizes, slots, from, to);
        return launch(merge_rows<Unit>, grid, sizes, static_cast<const Unit*>(full), slots, from, to);
    };
    return with_unit(s, run, full, picked, updated);
}

}  // namespace reroute
