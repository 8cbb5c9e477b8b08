// What the CUDA implementations of RerouteSelect share on the host side.
#pragma once

#include "../calls.h"
#include "../select_workspace.h"
#include "device.h"

namespace reroute {

inline Status check_workspace(const SelectShape& shape, Workspace workspace) noexcept {
    if (workspace.data == nullptr) return Status::kNullPointer;
    return workspace.bytes < select_workspace_bytes(shape) ? Status::kWorkspaceTooSmall : Status::kOk;
}

// Scores if they matter, then the choice: the whole op out of its two halves.
template <typename Scores, typename Choose>
Status select_in_halves(const SelectShape& shape, const SelectInputs& in, std::int64_t* slots, Workspace workspace,
                        Stream stream, Scores score, Choose choose) noexcept {
    Status status = check(shape);
    if (status != Status::kOk) return status;
    const bool scored = shape.batch > 0 && select_scores_matter(shape);
    float* scores = nullptr;
    if (scored) {
        status = check_workspace(shape, workspace);
        if (status != Status::kOk) return status;
        scores = SelectWorkspace(shape, workspace.data).scores;
        status = score(shape, in, scores, workspace, stream);
        if (status != Status::kOk) return status;
    }
    return choose(shape, scores, in, slots, workspace, stream);
}

// Kernel parameters: 32-bit sizes, which check() made safe.
struct SelectSizes {
    int rows, candidates, always, heads, share, head_size, row_width, keep, length, pitch, tiles;
    float scale;
};

inline SelectSizes select_sizes(const SelectShape& s) noexcept {
    const SelectWorkspace w(s, nullptr);
    const auto narrow = [](std::int64_t value) { return static_cast<int>(value); };
    const std::int64_t keep = s.keep < s.candidates ? s.keep : s.candidates;
    return {narrow(s.rows),
            narrow(s.candidates),
            narrow(s.always),
            narrow(s.heads),
            narrow(s.heads / s.kv_heads),
            narrow(s.head_size),
            narrow(s.kv_heads * s.head_size),
            narrow(keep),
            narrow(select_length(s)),
            narrow(w.pitch),
            narrow(w.tiles),
            s.scale};
}

}  // namespace reroute
