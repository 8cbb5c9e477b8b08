// RerouteSelect: which rows run until the next decision layer (arXiv 2606.12412).
//
//   score[n] = mean over heads of softmax_fp32(scale * q_last . keys^T, over all S rows)[candidates[n]]
//   slots    = always and the `keep` candidates of the highest score, ascending
//
// Equal scores go to the candidate that comes first. keep >= N and N = 0 select everything, and nothing is scored.
// A NaN score is refused: the CPU reference returns kNotANumber; on the device a NaN ranks below every number, so the
// result is deterministic and in range, and the row's flag says so (select_flags, select_status).
//
// Every implementation stands twice: `select_*` from tensors to slots, and its two halves `select_scores_*` and
// `select_choose_*`, so that the choice can be checked bit for bit on given scores.
#pragma once

#include "reroute/pool.h"
#include "reroute/status.h"
#include "reroute/types.h"

namespace reroute {

// Letters: B batch, S rows, N candidates, T always, H query heads, G key/value heads, d head size, K keep.
struct SelectShape {
    std::int64_t batch = 1;
    std::int64_t rows = 0;
    std::int64_t candidates = 0;
    std::int64_t always = 0;
    std::int64_t heads = 1;
    std::int64_t kv_heads = 1;
    std::int64_t head_size = 0;
    std::int64_t keep = 0;
    float scale = 1.0F;
    DType dtype = DType::kFloat32;
};

struct SelectInputs {
    const void* q_last = nullptr;              // dtype [B, H*d]
    const void* keys = nullptr;                // dtype [B, S, G*d]
    const std::int64_t* candidates = nullptr;  // [B, N], distinct slots in any order
    const std::int64_t* always = nullptr;      // [B, T], distinct from each other and from the candidates
};

// Limits of one call, the same for every implementation. They keep each kernel within the 48 KiB of shared memory that
// every GPU offers without asking.
constexpr std::int64_t kMaxCandidates = 8192;
constexpr std::int64_t kMaxRows = 65536;
constexpr std::int64_t kMaxBatch = 65535;
constexpr std::int64_t kMaxHeads = 1024;
constexpr std::int64_t kMaxGroupHeads = 64;    // H / G: query heads that share a key head
constexpr std::int64_t kMaxGroupWidth = 8192;  // (H / G) * d

Status check(const SelectShape& shape) noexcept;

// T + min(K, N): slots per batch row.
std::int64_t select_length(const SelectShape& shape) noexcept;

// Whether anything is left out, that is K < N. Otherwise q_last and keys are not read.
bool select_scores_matter(const SelectShape& shape) noexcept;

// Enough for every CUDA implementation. Does not shrink when a size of the shape grows.
std::size_t select_workspace_bytes(const SelectShape& shape) noexcept;

// After a CUDA call has run, the workspace starts with one word of flags per batch row: copy B words and decode them.
constexpr std::uint32_t kFlagNotANumber = 1;
constexpr std::uint32_t kFlagSlotOutOfRange = 2;
constexpr std::uint32_t kFlagSlotRepeated = 4;
Status select_status(std::uint32_t flags) noexcept;

// scores: fp32 [B, N]. slots: [B, select_length()]. On an error the output is unspecified.
Status select_scores_cpu(const SelectShape& shape, const SelectInputs& in, float* scores);
Status select_choose_cpu(const SelectShape& shape, const float* scores, const SelectInputs& in, std::int64_t* slots);
Status select_cpu(const SelectShape& shape, const SelectInputs& in, std::int64_t* slots);

// The same of fp32, scored by the kernels of attention; another type is kInvalidShape.
Status select_scores_cpu_fast(const SelectShape&, const SelectInputs&, float* scores, const Pool&);
Status select_cpu_fast(const SelectShape&, const SelectInputs&, std::int64_t* slots, const Pool&);

// CUDA: only enqueues kernels on `stream`. No allocation, no synchronisation; may be captured in a graph.
Status select_scores_cuda_simple(const SelectShape&, const SelectInputs&, float* scores, Workspace, Stream) noexcept;
Status select_choose_cuda_simple(const SelectShape&, const float* scores, const SelectInputs&, std::int64_t* slots,
                                 Workspace, Stream) noexcept;
Status select_cuda_simple(const SelectShape&, const SelectInputs&, std::int64_t* slots, Workspace, Stream) noexcept;

Status select_scores_cuda_fast(const SelectShape&, const SelectInputs&, float* scores, Workspace, Stream) noexcept;
Status select_choose_cuda_fast(const SelectShape&, const float* scores, const SelectInputs&, std::int64_t* slots,
                               Workspace, Stream) noexcept;
Status select_cuda_fast(const SelectShape&, const SelectInputs&, std::int64_t* slots, Workspace, Stream) noexcept;

}  // namespace reroute
