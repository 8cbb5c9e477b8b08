// RerouteGather and RerouteScatter on the CPU: the reference, and the same with rows divided among threads.
#include "reroute/rows.h"

#include <algorithm>
#include <cstring>

#include "../calls.h"
#include "tasks.h"

namespace reroute {
namespace {

using Byte = unsigned char;

// All slots, before any byte is written.
Status check_slots(const RowsShape& s, const std::int64_t* slots, bool must_ascend) {
    for (std::int64_t i = 0; i < s.batch * s.picked; ++i) {
        if (slots[i] < 0 || slots[i] >= s.rows) return Status::kSlotOutOfRange;
        if (must_ascend && i % s.picked != 0 && slots[i] <= slots[i - 1]) return Status::kSlotsNotAscending;
    }
    return Status::kOk;
}

constexpr std::int64_t kBytesOfTask = 1 << 18;  // fewer are not worth a second thread

// How many tasks `rows` rows are worth.
std::int64_t tasks(std::int64_t rows, std::int64_t row_bytes, const Pool& pool) {
    const std::int64_t worth = rows * row_bytes / kBytesOfTask;
    return std::min<std::int64_t>(std::max<std::int64_t>(worth, 1), std::max(pool.threads, 1));
}

}  // namespace

Status gather_cpu(const RowsShape& s, const void* full, const std::int64_t* slots, void* picked) noexcept {
    return gather_cpu_fast(s, full, slots, picked, serial_pool());
}

Status scatter_cpu(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                   void* updated) noexcept {
    Status status = check_scatter(s, full, slots, picked, updated);
    if (status != Status::kOk || nothing_to_update(s)) return status;
    status = check_slots(s, slots, true);
    if (status != Status::kOk) return status;

    if (updated != full) std::memcpy(updated, full, static_cast<std::size_t>(s.batch * s.rows * s.row_bytes));
    const auto bytes = static_cast<std::size_t>(s.row_bytes);
    for (std::int64_t i = 0; i < s.batch * s.picked; ++i) {
        const std::int64_t row = i / s.picked * s.rows + slots[i];
        std::memcpy(static_cast<Byte*>(updated) + row * s.row_bytes, static_cast<const Byte*>(picked) + i * s.row_bytes,
                    bytes);
    }
    return Status::kOk;
}

Status gather_cpu_fast(const RowsShape& s, const void* full, const std::int64_t* slots, void* picked,
                       const Pool& pool) noexcept {
    Status status = check_gather(s, full, slots, picked);
    if (status != Status::kOk || nothing_picked(s)) return status;
    status = check_slots(s, slots, false);
    if (status != Status::kOk) return status;

    const auto bytes = static_cast<std::size_t>(s.row_bytes);
    const std::int64_t rows = s.batch * s.picked, count = tasks(rows, s.row_bytes, pool);
    cpu::run(pool, count, [&](std::int64_t task) {
        for (std::int64_t i = rows * task / count; i < rows * (task + 1) / count; ++i) {
            const std::int64_t row = i / s.picked * s.rows + slots[i];
            std::memcpy(static_cast<Byte*>(picked) + i * s.row_bytes,
                        static_cast<const Byte*>(full) + row * s.row_bytes, bytes);
        }
    });
    return Status::kOk;
}

Status scatter_cpu_fast(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                        void* updated, const Pool& pool) noexcept {
    Status status = check_scatter(s, full, slots, picked, updated);
    if (status != Status::kOk || nothing_to_update(s)) return status;
    status = check_slots(s, slots, true);
    if (status != Status::kOk) return status;

    // Slots ascend, so those of a task's rows stand together.
    const auto bytes = static_cast<std::size_t>(s.row_bytes);
    const std::int64_t rows = s.batch * s.rows, count = tasks(rows, s.row_bytes, pool);
    cpu::run(pool, count, [&](std::int64_t task) {
        std::int64_t row = rows * task / count;
        const std::int64_t end = rows * (task + 1) / count;
        while (row < end) {
            const std::int64_t item = row / s.rows, item_end = std::min(end, (item + 1) * s.rows);
            const std::int64_t *first = slots + item * s.picked, *last = first + s.picked;
            const std::int64_t* next = std::lower_bound(first, last, row - item * s.rows);
            for (; row < item_end; ++row) {
                const bool ran = next != last && *next == row - item * s.rows;
                if (ran || updated != full) {
                    const Byte* from = ran ? static_cast<const Byte*>(picked) + (next - slots) * s.row_bytes
                                           : static_cast<const Byte*>(full) + row * s.row_bytes;
                    std::memcpy(static_cast<Byte*>(updated) + row * s.row_bytes, from, bytes);
                }
                next += ran;
            }
        }
    });
    return Status::kOk;
}

}  // namespace reroute
