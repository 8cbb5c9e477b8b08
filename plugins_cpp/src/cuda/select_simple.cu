// RerouteSelect, simple: one thread per result, nothing shared between threads, no sorting. A candidate is chosen when
// fewer than K candidates beat it, and its place is the number of chosen slots below it. Quadratic, and easy to
// believe.
#include "select_call.h"

namespace reroute {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void logit_per_thread(SelectSizes s, const T* q_last, const T* keys, float* logits) {
    const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int head = static_cast<int>(blockIdx.y);
    const std::size_t b = blockIdx.z;
    if (row >= s.rows) return;
    const T* query = q_last + (b * s.heads + head) * s.head_size;
    const T* key = keys + (b * s.rows + row) * s.row_width + head / s.share * s.head_size;
    float product = 0.0F;
    for (int i = 0; i < s.head_size; ++i) product += to_float(query[i]) * to_float(key[i]);
    logits[(b * s.heads + head) * s.pitch + row] = product * s.scale;
}

// Softmax of one head of one batch row: the largest logit and the sum, in the first part of the row.
__global__ void softmax_per_thread(SelectSizes s, int items, const float* logits, SoftmaxPart* parts) {
    const int item = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (item >= items) return;
    const float* row = logits + static_cast<std::size_t>(item) * s.pitch;
    float largest = -INFINITY;
    for (int i = 0; i < s.rows; ++i) largest = fmaxf(largest, row[i]);
    float sum = 0.0F;
    for (int i = 0; i < s.rows; ++i) sum += expf(row[i] - largest);
    parts[static_cast<std::size_t>(item) * s.tiles] = {largest, sum};
}

__global__ void score_per_thread(SelectSizes s, const float* logits, const SoftmaxPart* parts,
                                 const std::int64_t* candidates, float* scores) {
    const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const std::size_t b = blockIdx.y;
    if (n >= s.candidates) return;
    const std::int64_t slot = candidates[b * s.candidates + n];
    float sum = 0.0F;
    for (int head = 0; head < s.heads; ++head) {
        const std::size_t item = b * s.heads + head;
        const SoftmaxPart part = parts[item * s.tiles];
        if (slot >= 0 && slot < s.rows) sum += expf(logits[item * s.pitch + slot] - part.largest) / part.sum;
    }
    scores[b * s.candidates + n] = sum / static_cast<float>(s.heads);
}

__device__ bool in_range(std::int64_t slot, const SelectSizes& s) { return slot >= 0 && slot < s.rows; }

// chosen[n] = whether candidate n runs. NaN ranks last, equal scores by index.
__global__ void choose_per_thread(SelectSizes s, const float* scores, const std::int64_t* candidates,
                                  std::int32_t* chosen, std::uint32_t* flags) {
    const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const std::size_t b = blockIdx.y;
    if (n >= s.candidates) return;
    int better = 0;
    if (s.keep < s.candidates) {
        const float* row = scores + b * s.candidates;
        const bool nan = is_nan(row[n]);
        if (nan) atomicOr(&flags[b], kFlagNotANumber);
        for (int other = 0; other < s.candidates; ++other) {
            const bool equal = row[other] == row[n] || (nan && is_nan(row[other]));
            const bool above = row[other] > row[n] || (nan && !is_nan(row[other]));
            better += above || (equal && other < n) ? 1 : 0;
        }
    }
    chosen[b * s.candidates + n] = better < s.keep && in_range(candidates[b * s.candidates + n], s) ? 1 : 0;
}

// Thread i places candidate i, or always[i - N], after every chosen slot that is lower.
__global__ void place_per_thread(SelectSizes s, const std::int64_t* candidates, const std::int64_t* always,
                                 const std::int32_t* chosen, std::int64_t* slots, std::uint32_t* flags) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const std::size_t b = blockIdx.y;
    if (i >= s.candidates + s.always) return;
    candidates += b * s.candidates;
    always += b * s.always;
    chosen += b * s.candidates;
    const std::int64_t slot = i < s.candidates ? candidates[i] : always[i - s.candidates];
    if (!in_range(slot, s)) {
        atomicOr(&flags[b], kFlagSlotOutOfRange);
        return;
    }
    int same = 0;
    int below = 0;
    for (int n = 0; n < s.candidates; ++n) {
        same += candidates[n] == slot ? 1 : 0;
        below += chosen[n] != 0 && candidates[n] < slot ? 1 : 0;
    }
    for (int t = 0; t < s.always; ++t) {
        same += always[t] == slot ? 1 : 0;
        below += always[t] >= 0 && always[t] < slot ? 1 : 0;
    }
    if (same > 1) atomicOr(&flags[b], kFlagSlotRepeated);
    if (i >= s.candidates || chosen[i] != 0) slots[b * s.length + below] = slot;
}

__global__ void start_per_thread(SelectSizes s, std::int64_t* slots, std::uint32_t* flags) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const std::size_t b = blockIdx.y;
    if (i == 0) flags[b] = 0;
    // Places that refused slots leave open stay in range for whoever gathers by them.
    if (i < s.length) slots[b * s.length + i] = s.rows - 1;
}

template <typename T>
Status score(const SelectShape& shape, const SelectInputs& in, float* scores, Workspace workspace, Stream stream) {
    const SelectWorkspace w(shape, workspace.data);
    const SelectSizes s = select_sizes(shape);
    const auto batch = static_cast<unsigned>(shape.batch);
    const int items = s.heads * static_cast<int>(batch);
    Status status = launch(logit_per_thread<T>,
                           {{blocks_for(s.rows, kThreads), static_cast<unsigned>(s.heads), batch}, kThreads, 0, stream},
                           s, static_cast<const T*>(in.q_last), static_cast<const T*>(in.keys), w.logits);
    if (status != Status::kOk) return status;
    status =
        launch(softmax_per_thread, {blocks_for(items, kThreads), kThreads, 0, stream}, s, items, w.logits, w.parts);
    if (status != Status::kOk) return status;
    return launch(score_per_thread, {{blocks_for(s.candidates, kThreads), batch}, kThreads, 0, stream}, s, w.logits,
                  w.parts, in.candidates, scores);
}

}  // namespace

Status select_scores_cuda_simple(const SelectShape& shape, const SelectInputs& in, float* scores, Workspace workspace,
                                 Stream stream) noexcept {
    Status status = check_scores(shape, in, scores);
    if (status != Status::kOk || nothing_to_score(shape)) return status;
    status = check_workspace(shape, workspace);
    if (status != Status::kOk) return status;
    switch (shape.dtype) {
        case DType::kFloat32:
            return score<float>(shape, in, scores, workspace, stream);
        case DType::kFloat16:
            return score<Half>(shape, in, scores, workspace, stream);
        case DType::kBFloat16:
            return score<BFloat16>(shape, in, scores, workspace, stream);
    }
    return Status::kInvalidShape;
}

Status select_choose_cuda_simple(const SelectShape& shape, const float* scores, const SelectInputs& in,
                                 std::int64_t* slots, Workspace workspace, Stream stream) noexcept {
    Status status = check_choose(shape, scores, in, slots);
    if (status != Status::kOk || nothing_to_choose(shape)) return status;
    status = check_workspace(shape, workspace);
    if (status != Status::kOk) return status;
    const SelectWorkspace w(shape, workspace.data);
    const SelectSizes s = select_sizes(shape);
    const auto batch = static_cast<unsigned>(shape.batch);
    const auto grid = [batch, stream](std::int64_t threads) {
        return Launch{{blocks_for(threads < 1 ? 1 : threads, kThreads), batch}, kThreads, 0, stream};
    };
    status = launch(start_per_thread, grid(s.length), s, slots, w.flags);
    if (status != Status::kOk) return status;
    status = launch(choose_per_thread, grid(s.candidates), s, scores, in.candidates, w.chosen, w.flags);
    if (status != Status::kOk) return status;
    return launch(place_per_thread, grid(s.candidates + s.always), s, in.candidates, in.always, w.chosen, slots,
                  w.flags);
}

Status select_cuda_simple(const SelectShape& shape, const SelectInputs& in, std::int64_t* slots, Workspace workspace,
                          Stream stream) noexcept {
    return select_in_halves(shape, in, slots, workspace, stream, select_scores_cuda_simple, select_choose_cuda_simple);
}

}  // namespace reroute
