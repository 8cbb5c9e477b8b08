// Inputs of the kernel tests: seeded, the same on every platform, random and adversarial.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "reroute/half.h"
#include "reroute/select.h"

namespace inputs {

// SplitMix64: std:: distributions differ between libraries.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t bits() {
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15ULL;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
        return z ^ (z >> 31);
    }
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n)); }
    float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24F * 2.0F - 1.0F; }  // [-1, 1)

  private:
    std::uint64_t state_;
};

enum class Fill {
    kRandom,
    kFewValues,  // small integers: products are exact, so equal rows tie exactly
    kAllEqual,
    kHuge,      // logits of thousands: all but the largest underflow
    kDenormal,  // values below the smallest normal, and both zeros
    kMasked,    // the middle half is -inf: rows, and whole tiles, of probability 0
    kOneNaN,
    kOneInfinity  // infinity minus infinity: every probability of the head is NaN
};

inline std::vector<float> floats(std::size_t count, Fill fill, Random& random) {
    std::vector<float> values(count);
    for (float& value : values) {
        switch (fill) {
            case Fill::kFewValues:
                value = static_cast<float>(random.below(3) - 1);
                break;
            case Fill::kAllEqual:
                value = 0.5F;
                break;
            case Fill::kHuge:
                value = static_cast<float>(random.below(3) - 1) * 1024.0F;
                break;
            case Fill::kDenormal:
                value = static_cast<float>(random.below(5) - 2) * 0x1p-140F;
                break;
            default:
                value = random.uniform();
                break;
        }
        if (fill == Fill::kDenormal && value == 0.0F && random.below(2) == 0) value = -0.0F;
    }
    if (fill == Fill::kMasked) {
        std::fill(values.begin() + static_cast<std::ptrdiff_t>(count / 4),
                  values.begin() + static_cast<std::ptrdiff_t>(count / 4 * 3), -std::numeric_limits<float>::infinity());
    }
    if (!values.empty() && fill == Fill::kOneNaN) values[count / 2] = std::numeric_limits<float>::quiet_NaN();
    if (!values.empty() && fill == Fill::kOneInfinity) values[count / 2] = std::numeric_limits<float>::infinity();
    return values;
}

// The query that goes with keys of a fill: exact products, and positive where infinite keys must stay what they are.
inline Fill query_fill(Fill keys) {
    if (keys == Fill::kRandom) return Fill::kRandom;
    return keys == Fill::kMasked || keys == Fill::kOneInfinity ? Fill::kAllEqual : Fill::kFewValues;
}

// The bytes of the values in a type.
inline std::vector<unsigned char> encode(const std::vector<float>& values, reroute::DType dtype) {
    const std::size_t size = dtype == reroute::DType::kFloat32 ? 4 : 2;
    std::vector<unsigned char> bytes(values.size() * size);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const reroute::Half half = reroute::to_half(values[i]);
        const reroute::BFloat16 brain = reroute::to_bfloat16(values[i]);
        const void* source = &values[i];
        if (dtype == reroute::DType::kFloat16) source = &half;
        if (dtype == reroute::DType::kBFloat16) source = &brain;
        std::memcpy(&bytes[i * size], source, size);
    }
    return bytes;
}

// Splits slots 0..rows-1 at random into candidates and always, ascending or shuffled; unused slots stay out.
struct Slots {
    std::vector<std::int64_t> candidates, always;

    Slots(const reroute::SelectShape& s, bool shuffled, Random& random) {
        for (std::int64_t b = 0; b < s.batch; ++b) {
            std::vector<std::int64_t> all(static_cast<std::size_t>(s.rows));
            for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
            for (std::size_t i = all.size(); i > 1; --i) {
                std::swap(all[i - 1], all[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(i)))]);
            }
            const auto middle = all.begin() + s.candidates;
            const auto end = middle + s.always;
            if (!shuffled) {
                std::sort(all.begin(), middle);
                std::sort(middle, end);
            }
            candidates.insert(candidates.end(), all.begin(), middle);
            always.insert(always.end(), middle, end);
        }
    }
};

// Strictly ascending slots of every batch row, as RerouteSelect makes them.
inline std::vector<std::int64_t> ascending_slots(std::int64_t batch, std::int64_t rows, std::int64_t count,
                                                 Random& random) {
    reroute::SelectShape shape;
    shape.batch = batch;
    shape.rows = rows;
    shape.candidates = count;
    return Slots(shape, false, random).candidates;
}

inline std::vector<unsigned char> bytes(std::int64_t count, Random& random) {
    std::vector<unsigned char> values(static_cast<std::size_t>(count));
    for (auto& value : values) value = static_cast<unsigned char>(random.bits());
    return values;
}

}  // namespace inputs
