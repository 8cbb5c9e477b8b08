// Attention in plain C++: what the fast form is compared with.
#include <algorithm>
#include <cmath>

#include "attention_kernels.h"

namespace reroute::attention_forms {
namespace {

// exp(x - max) of the scores of query i, and their sum.
float odds(const Group& group, std::int64_t i, float* scores) {
    const std::int64_t seen = group.seen(i);
    const float* q = group.q + group.place(i);
    float most = -INFINITY, total = 0;
    for (std::int64_t j = 0; j < seen; ++j) {
        float product = 0;
        for (std::int64_t c = 0; c < group.size; ++c) {
            product = std::fma(q[c], group.keys[j * group.key_pitch + c], product);
        }
        most = std::max(most, scores[j] = product * group.scale);
    }
    for (std::int64_t j = 0; j < seen; ++j) total += scores[j] = std::exp(scores[j] - most);
    return total;
}

void attend(const Group& group, std::int64_t first, std::int64_t last, float* scratch) {
    const std::int64_t d = group.size;
    for (std::int64_t i = first; i < last; ++i) {
        const float total = odds(group, i, scratch);
        float* out = group.out + group.place(i);
        std::fill(out, out + d, 0.0f);
        for (std::int64_t j = 0; j < group.seen(i); ++j) {
            for (std::int64_t c = 0; c < d; ++c) out[c] = std::fma(scratch[j], group.values[j * d + c], out[c]);
        }
        for (std::int64_t c = 0; c < d; ++c) out[c] /= total;
    }
}

void rank(const Group& group, float* sums, float* scratch) {
    for (std::int64_t i = 0; i < group.heads; ++i) {
        const float total = odds(group, i, scratch);
        for (std::int64_t j = 0; j < group.seen(i); ++j) sums[j] += scratch[j] / total;
    }
}

std::int64_t scratch(std::int64_t seen, std::int64_t) { return seen; }

}  // namespace

const Form kPortable{scratch, attend, rank};

}  // namespace reroute::attention_forms
