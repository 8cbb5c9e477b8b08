// RerouteSelect on the CPU: the reference, the definition in reroute/select.h written down in its order, and the same with
// scores by the kernels of attention, groups of heads divided among threads.
#include "reroute/select.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../calls.h"
#include "attention_kernels.h"
#include "reroute/half.h"
#include "tasks.h"

namespace reroute {
namespace {

// Score of every row, fp32 [S], for one batch row.
template <typename T>
std::vector<float> score_rows(const SelectShape& s, const T* q_last, const T* keys) {
    const auto rows = static_cast<std::size_t>(s.rows);
    const std::int64_t share = s.heads / s.kv_heads;
    const std::int64_t row_width = s.kv_heads * s.head_size;
    std::vector<float> mean(rows, 0.0F);
    std::vector<float> logits(rows);
    for (std::int64_t head = 0; head < s.heads; ++head) {
        const T* query = q_last + head * s.head_size;
        const T* first_key = keys + head / share * s.head_size;
        float largest = -INFINITY;
        for (std::size_t row = 0; row < rows; ++row) {
            const T* key = first_key + static_cast<std::int64_t>(row) * row_width;
            float product = 0.0F;
            for (std::int64_t i = 0; i < s.head_size; ++i) product += to_float(query[i]) * to_float(key[i]);
            logits[row] = product * s.scale;
            largest = std::max(largest, logits[row]);
        }
        float sum = 0.0F;
        for (float& logit : logits) {
            logit = std::exp(logit - largest);  // NaN if any logit is, or if infinities meet: refused later
            sum += logit;
        }
        for (std::size_t row = 0; row < rows; ++row) mean[row] += logits[row] / sum;
    }
    for (float& value : mean) value /= static_cast<float>(s.heads);
    return mean;
}

bool in_range(std::int64_t slot, std::int64_t rows) { return slot >= 0 && slot < rows; }

template <typename T>
Status score_candidates(const SelectShape& s, const SelectInputs& in, float* scores) {
    const T* q_last = static_cast<const T*>(in.q_last);
    const T* keys = static_cast<const T*>(in.keys);
    for (std::int64_t b = 0; b < s.batch; ++b) {
        const auto by_row =
            score_rows(s, q_last + b * s.heads * s.head_size, keys + b * s.rows * s.kv_heads * s.head_size);
        for (std::int64_t n = 0; n < s.candidates; ++n) {
            const std::int64_t slot = in.candidates[b * s.candidates + n];
            if (!in_range(slot, s.rows)) return Status::kSlotOutOfRange;
            scores[b * s.candidates + n] = by_row[static_cast<std::size_t>(slot)];
        }
    }
    return Status::kOk;
}

// One batch row. `scores` may be null when everything is kept.
Status choose_row(const SelectShape& s, const float* scores, const std::int64_t* candidates, const std::int64_t* always,
                  std::int64_t* slots) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(s.candidates));
    std::iota(order.begin(), order.end(), 0);

    std::vector<bool> seen(static_cast<std::size_t>(s.rows), false);
    const auto visit = [&](std::int64_t slot) {
        if (!in_range(slot, s.rows)) return Status::kSlotOutOfRange;
        if (seen[static_cast<std::size_t>(slot)]) return Status::kSlotRepeated;
        seen[static_cast<std::size_t>(slot)] = true;
        return Status::kOk;
    };
    for (std::int64_t n = 0; n < s.candidates + s.always; ++n) {
        const Status status = visit(n < s.candidates ? candidates[n] : always[n - s.candidates]);
        if (status != Status::kOk) return status;
    }

    if (select_scores_matter(s)) {
        if (std::any_of(scores, scores + s.candidates, [](float score) { return std::isnan(score); })) {
            return Status::kNotANumber;
        }
        std::stable_sort(order.begin(), order.end(),
                         [scores](std::int64_t a, std::int64_t b) { return scores[a] > scores[b]; });
        order.resize(static_cast<std::size_t>(s.keep));
    }
    std::int64_t* end = std::copy(always, always + s.always, slots);
    end = std::transform(order.begin(), order.end(), end, [candidates](std::int64_t n) { return candidates[n]; });
    std::sort(slots, end);
    return Status::kOk;
}

// The choice of all batch rows by the scores that `score` makes, if any are needed.
template <typename Score>
Status select_by(const SelectShape& s, const SelectInputs& in, std::int64_t* slots, const Score& score) {
    Status status = check(s);
    if (status != Status::kOk) return status;
    std::vector<float> scores;
    if (select_scores_matter(s)) {
        scores.resize(static_cast<std::size_t>(s.batch * s.candidates));
        status = score(scores.data());
        if (status != Status::kOk) return status;
    }
    return select_choose_cpu(s, scores.empty() ? nullptr : scores.data(), in, slots);
}

}  // namespace

Status select_scores_cpu(const SelectShape& s, const SelectInputs& in, float* scores) {
    const Status status = check_scores(s, in, scores);
    if (status != Status::kOk || nothing_to_score(s)) return status;
    switch (s.dtype) {
        case DType::kFloat32:
            return score_candidates<float>(s, in, scores);
        case DType::kFloat16:
            return score_candidates<Half>(s, in, scores);
        case DType::kBFloat16:
            return score_candidates<BFloat16>(s, in, scores);
    }
    return Status::kInvalidShape;
}

Status select_choose_cpu(const SelectShape& s, const float* scores, const SelectInputs& in, std::int64_t* slots) {
    const Status status = check_choose(s, scores, in, slots);
    if (status != Status::kOk || nothing_to_choose(s)) return status;
    const std::int64_t length = select_length(s);
    for (std::int64_t b = 0; b < s.batch; ++b) {
        const Status chosen =
            choose_row(s, scores == nullptr ? nullptr : scores + b * s.candidates, in.candidates + b * s.candidates,
                       in.always + b * s.always, slots + b * length);
        if (chosen != Status::kOk) return chosen;
    }
    return Status::kOk;
}

Status select_cpu(const SelectShape& s, const SelectInputs& in, std::int64_t* slots) {
    return select_by(s, in, slots, [&](float* scores) { return select_scores_cpu(s, in, scores); });
}

Status select_scores_cpu_fast(const SelectShape& s, const SelectInputs& in, float* scores, const Pool& pool) {
    const Status status = check_scores(s, in, scores);
    if (status != Status::kOk || nothing_to_score(s)) return status;
    if (s.dtype != DType::kFloat32) return Status::kInvalidShape;
    const auto& form = cpu::fast() ? attention_forms::kFast : attention_forms::kPortable;
    const std::int64_t heads = s.heads / s.kv_heads, width = s.kv_heads * s.head_size;
    std::vector<float> sums(static_cast<std::size_t>(s.batch * s.kv_heads * s.rows), 0.0F);
    const bool good = cpu::run(pool, s.batch * s.kv_heads, [&](std::int64_t index) {
        const std::int64_t item = index / s.kv_heads, group_index = index % s.kv_heads;
        attention_forms::Group group{};
        group.q = static_cast<const float*>(in.q_last) + index * heads * s.head_size;
        group.keys = static_cast<const float*>(in.keys) + item * s.rows * width + group_index * s.head_size;
        group.heads = heads;
        group.size = s.head_size;
        group.key_pitch = width;
        group.before = s.rows - 1;  // the last row sees all of them
        group.scale = s.scale;
        thread_local cpu::Scratch mine;
        form.rank(group, sums.data() + index * s.rows, mine.take<float>(form.scratch(s.rows, s.head_size)));
    });
    if (!good) return Status::kOutOfMemory;
    for (std::int64_t i = 0; i < s.batch * s.candidates; ++i) {
        if (!in_range(in.candidates[i], s.rows)) return Status::kSlotOutOfRange;
        const float* sum = sums.data() + i / s.candidates * s.kv_heads * s.rows + in.candidates[i];
        float total = 0;
        for (std::int64_t g = 0; g < s.kv_heads; ++g) total += sum[g * s.rows];
        scores[i] = total / static_cast<float>(s.heads);
    }
    return Status::kOk;
}

Status select_cpu_fast(const SelectShape& s, const SelectInputs& in, std::int64_t* slots, const Pool& pool) {
    return select_by(s, in, slots, [&](float* scores) { return select_scores_cpu_fast(s, in, scores, pool); });
}

}  // namespace reroute
