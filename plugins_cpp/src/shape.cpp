// What can be said of a call before its data is read.
#include <algorithm>

#include "reroute/rows.h"
#include "reroute/select.h"
#include "select_workspace.h"

namespace reroute {

Status check(const SelectShape& s) noexcept {
    const bool negative = s.batch < 0 || s.rows < 0 || s.candidates < 0 || s.always < 0 || s.keep < 0;
    if (negative || s.heads < 1 || s.kv_heads < 1 || s.head_size < 1) return Status::kInvalidShape;
    if (s.heads % s.kv_heads != 0) return Status::kInvalidShape;
    if (s.dtype != DType::kFloat32 && s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) {
        return Status::kInvalidShape;
    }
    // Limits first: they keep the arithmetic below far from overflow.
    if (s.batch > kMaxBatch || s.rows > kMaxRows || s.candidates > kMaxCandidates || s.heads > kMaxHeads) {
        return Status::kTooLarge;
    }
    const std::int64_t share = s.heads / s.kv_heads;
    if (share > kMaxGroupHeads || s.head_size > kMaxGroupWidth / share) return Status::kTooLarge;
    if (s.always > s.rows || s.candidates > s.rows - s.always) return Status::kInvalidShape;
    return Status::kOk;
}

Status check(const RowsShape& s) noexcept {
    if (s.batch < 0 || s.rows < 0 || s.picked < 0 || s.row_bytes < 0) return Status::kInvalidShape;
    if (s.row_bytes > kMaxRowBytes || s.batch > kMaxTotalRows) return Status::kTooLarge;
    const std::int64_t most = s.batch == 0 ? kMaxTotalRows : kMaxTotalRows / s.batch;
    if (s.rows > most || s.picked > most) return Status::kTooLarge;
    return s.batch * std::max(s.rows, s.picked) * s.row_bytes > kMaxTotalBytes ? Status::kTooLarge : Status::kOk;
}

std::int64_t select_length(const SelectShape& s) noexcept { return s.always + std::min(s.keep, s.candidates); }

bool select_scores_matter(const SelectShape& s) noexcept { return s.keep < s.candidates; }

std::size_t select_workspace_bytes(const SelectShape& s) noexcept {
    return check(s) == Status::kOk ? SelectWorkspace(s, nullptr).bytes : 0;
}

Status select_status(std::uint32_t flags) noexcept {
    if ((flags & kFlagSlotOutOfRange) != 0) return Status::kSlotOutOfRange;
    if ((flags & kFlagSlotRepeated) != 0) return Status::kSlotRepeated;
    if ((flags & kFlagNotANumber) != 0) return Status::kNotANumber;
    return Status::kOk;
}

}  // namespace reroute
