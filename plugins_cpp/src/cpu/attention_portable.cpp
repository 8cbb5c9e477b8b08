// Attention in plain C++: what the fast form is compared with.
#include <algorithm>
#include <cmath>

#include "attention_kernels.h"

namespace reroute::attention_forms {
namespace {

void attend(const Group& group, std::int64_t first, std::int64_t last, float* scratch) {
    const std::int64_t d = group.size;
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t seen = group.seen(i);
        const float* q = group.q + group.place(i);
        float* out = group.out + group.place(i);
        float most = -INFINITY, total = 0;
        for (std::int64_t j = 0; j < seen; ++j) {
            float product = 0;
            for (std::int64_t c = 0; c < d; ++c) product = std::fma(q[c], group.keys[j * d + c], product);
            most = std::max(most, scratch[j] = product * group.scale);
        }
        std::fill(out, out + d, 0.0f);
        for (std::int64_t j = 0; j < seen; ++j) {
            const float odds = std::exp(scratch[j] - most);
            total += odds;
            for (std::int64_t c = 0; c < d; ++c) out[c] = std::fma(odds, group.values[j * d + c], out[c]);
        }
        for (std::int64_t c = 0; c < d; ++c) out[c] /= total;
    }
}

std::int64_t scratch(std::int64_t seen, std::int64_t) { return seen; }

}  // namespace

const Form kPortable{scratch, attend};

}  // namespace reroute::attention_forms
