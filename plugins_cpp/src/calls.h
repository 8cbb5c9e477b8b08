// What every implementation of an op checks before it touches data: shape, then addresses. One place, so that the CPU
// reference and the CUDA versions refuse the same calls with the same code.
#pragma once

#include "reroute/rows.h"
#include "reroute/select.h"

namespace reroute {

// Calls with nothing to do succeed; the caller asks these after the check.
inline bool nothing_to_score(const SelectShape& s) noexcept { return s.batch * s.candidates == 0; }
inline bool nothing_to_choose(const SelectShape& s) noexcept { return s.batch * (s.candidates + s.always) == 0; }
inline bool nothing_picked(const RowsShape& s) noexcept { return s.batch * s.picked * s.row_bytes == 0; }
inline bool nothing_to_update(const RowsShape& s) noexcept { return s.batch * s.rows * s.row_bytes == 0; }

inline Status check_scores(const SelectShape& s, const SelectInputs& in, const float* scores) noexcept {
    const Status status = check(s);
    if (status != Status::kOk || nothing_to_score(s)) return status;
    const bool missing = in.q_last == nullptr || in.keys == nullptr || in.candidates == nullptr || scores == nullptr;
    return missing ? Status::kNullPointer : Status::kOk;
}

inline Status check_choose(const SelectShape& s, const float* scores, const SelectInputs& in,
                           const std::int64_t* slots) noexcept {
    const Status status = check(s);
    if (status != Status::kOk || nothing_to_choose(s)) return status;
    const bool missing = (select_scores_matter(s) && scores == nullptr) ||
                         (s.candidates > 0 && in.candidates == nullptr) || (s.always > 0 && in.always == nullptr) ||
                         (select_length(s) > 0 && slots == nullptr);
    return missing ? Status::kNullPointer : Status::kOk;
}

inline Status check_gather(const RowsShape& s, const void* full, const std::int64_t* slots,
                           const void* picked) noexcept {
    const Status status = check(s);
    if (status != Status::kOk || nothing_picked(s)) return status;
    if (s.rows == 0) return Status::kSlotOutOfRange;  // there is no row that a slot could name
    const bool missing = full == nullptr || slots == nullptr || picked == nullptr;
    return missing ? Status::kNullPointer : Status::kOk;
}

inline Status check_scatter(const RowsShape& s, const void* full, const std::int64_t* slots, const void* picked,
                            const void* updated) noexcept {
    const Status status = check(s);
    if (status != Status::kOk) return status;
    if (s.picked > s.rows) return Status::kInvalidShape;  // ascending slots cannot be more than the rows
    if (nothing_to_update(s)) return Status::kOk;
    const bool missing =
        full == nullptr || updated == nullptr || (s.picked > 0 && (slots == nullptr || picked == nullptr));
    return missing ? Status::kNullPointer : Status::kOk;
}

}  // namespace reroute
