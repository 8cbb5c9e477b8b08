// RerouteGather and RerouteScatter, CPU reference.
#include "reroute/rows.h"

#include <cstring>

#include "../calls.h"

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

// Calls copy(full row index, picked row index) for every slot.
template <typename Copy>
void for_each_slot(const RowsShape& s, const std::int64_t* slots, Copy copy) {
    for (std::int64_t i = 0; i < s.batch * s.picked; ++i) copy(i / s.picked * s.rows + slots[i], i);
}

}  // namespace

Status gather_cpu(const RowsShape& s, const void* full, const std::int64_t* slots, void* picked) noexcept {
    Status status = check_gather(s, full, slots, picked);
    if (status != Status::kOk || nothing_picked(s)) return status;
    status = check_slots(s, slots, false);
    if (status != Status::kOk) return status;

    const auto bytes = static_cast<std::size_t>(s.row_bytes);
    for_each_slot(s, slots, [&](std::int64_t row, std::int64_t i) {
        std::memcpy(static_cast<Byte*>(picked) + i * s.row_bytes, static_cast<const Byte*>(full) + row * s.row_bytes,
                    bytes);
    });
    return Status::kOk;
}

Status scatter_cpu(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                   void* updated) noexcept {
    Status status = check_scatter(s, full, slots, picked, updated);
    if (status != Status::kOk || nothing_to_update(s)) return status;
    status = check_slots(s, slots, true);
    if (status != Status::kOk) return status;

    if (updated != full) std::memcpy(updated, full, static_cast<std::size_t>(s.batch * s.rows * s.row_bytes));
    const auto bytes = static_cast<std::size_t>(s.row_bytes);
    for_each_slot(s, slots, [&](std::int64_t row, std::int64_t i) {
        std::memcpy(static_cast<Byte*>(updated) + row * s.row_bytes, static_cast<const Byte*>(picked) + i * s.row_bytes,
                    bytes);
    });
    return Status::kOk;
}

}  // namespace reroute
