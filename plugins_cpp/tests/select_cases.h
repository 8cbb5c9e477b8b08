// The cases that every implementation of RerouteSelect goes through.
#pragma once

#include <string>

#include "inputs.h"

struct SelectCase {
    std::string name;
    reroute::SelectShape shape;
    inputs::Fill fill = inputs::Fill::kRandom;
    bool shuffled = false;  // slots in any order
};

// Shape in the order B, S, N, T, H, G, d, K.
inline reroute::SelectShape select_shape(std::int64_t b, std::int64_t s, std::int64_t n, std::int64_t t, std::int64_t h,
                                         std::int64_t g, std::int64_t d, std::int64_t k,
                                         reroute::DType dtype = reroute::DType::kFloat32) {
    return {b, s, n, t, h, g, d, k, 1.0F / std::sqrt(static_cast<float>(d)), dtype};
}

inline std::vector<SelectCase> select_cases() {
    using inputs::Fill;
    constexpr auto kF16 = reroute::DType::kFloat16;
    constexpr auto kBF16 = reroute::DType::kBFloat16;
    return {
        {"one token", select_shape(1, 1, 0, 1, 2, 1, 8, 4)},
        {"one candidate, kept", select_shape(1, 2, 1, 1, 2, 1, 8, 1)},
        {"one candidate, not kept", select_shape(1, 2, 1, 1, 2, 1, 8, 0)},
        {"N = 0", select_shape(2, 5, 0, 5, 2, 2, 16, 3)},
        {"K = N", select_shape(2, 40, 33, 7, 4, 2, 16, 33)},
        {"K > N", select_shape(1, 40, 33, 7, 4, 2, 16, 1000)},
        {"K = N - 1", select_shape(1, 40, 33, 7, 4, 2, 16, 32)},
        {"T = 0", select_shape(1, 33, 33, 0, 4, 4, 16, 5)},
        {"T = 0 and K = 0", select_shape(1, 33, 33, 0, 4, 4, 16, 0)},
        {"empty batch", select_shape(0, 40, 33, 7, 4, 2, 16, 5)},
        {"slots left out", select_shape(2, 100, 40, 20, 4, 1, 32, 9)},
        {"any order", select_shape(3, 70, 50, 20, 4, 2, 16, 11), Fill::kRandom, true},
        {"fp16", select_shape(2, 100, 70, 30, 4, 2, 64, 17, kF16)},
        {"bf16", select_shape(2, 100, 70, 30, 4, 2, 64, 17, kBF16)},
        {"fp16, odd head size", select_shape(1, 70, 60, 10, 3, 1, 7, 17, kF16)},
        {"head of 80", select_shape(1, 70, 60, 10, 4, 4, 80, 17, kF16)},
        {"head of 300", select_shape(1, 40, 30, 10, 2, 1, 300, 7, kF16)},
        {"seven heads share a key head", select_shape(1, 70, 60, 10, 14, 2, 64, 17, kBF16)},
        {"all equal", select_shape(2, 100, 70, 30, 4, 2, 16, 17), Fill::kAllEqual},
        {"few values", select_shape(2, 200, 170, 30, 1, 1, 4, 60), Fill::kFewValues},
        {"few values, fp16, any order", select_shape(2, 200, 170, 30, 1, 1, 8, 60, kF16), Fill::kFewValues, true},
        {"huge logits", select_shape(1, 100, 70, 30, 2, 1, 16, 17), Fill::kHuge},
        {"denormal", select_shape(1, 100, 70, 30, 2, 1, 16, 17), Fill::kDenormal},
        {"half the keys masked by -inf", select_shape(1, 100, 70, 30, 2, 1, 16, 50), Fill::kMasked},
        {"a NaN key", select_shape(1, 100, 70, 30, 2, 1, 16, 17), Fill::kOneNaN},
        {"an infinite key", select_shape(1, 100, 70, 30, 2, 1, 16, 17), Fill::kOneInfinity},
        {"4,096 tokens", select_shape(1, 4160, 4096, 64, 2, 1, 32, 512, kF16)},
    };
}

// Scores given, the choice alone: exact on every implementation.
struct ChooseCase {
    std::string name;
    reroute::SelectShape shape;
    std::vector<float> scores;
    bool shuffled = false;
};

inline std::vector<ChooseCase> choose_cases(inputs::Random& random) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    std::vector<ChooseCase> cases;
    const auto add = [&](std::string name, std::int64_t n, std::int64_t t, std::int64_t k, auto score, bool shuffled) {
        ChooseCase c{std::move(name), select_shape(2, n + t + 3, n, t, 1, 1, 1, k), {}, shuffled};
        for (std::int64_t i = 0; i < 2 * n; ++i) c.scores.push_back(score(i));
        cases.push_back(std::move(c));
    };
    const auto uniform = [&](std::int64_t) { return random.uniform() * 0.5F + 0.5F; };
    const auto levels = [&](std::int64_t) { return static_cast<float>(random.below(4)) * 0.25F; };
    for (const std::int64_t n : {1, 2, 31, 32, 33, 511, 513, 576, 4096}) {
        const std::string size = "N = " + std::to_string(n);
        for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, n / 9 + 1, n - 1, n}) {
            if (k > n || (n > 600 && k != n / 9 + 1)) continue;
            add("uniform, " + size + ", K = " + std::to_string(k), n, 5, k, uniform, false);
            add("ties, " + size + ", K = " + std::to_string(k), n, 5, k, levels, n % 2 == 1);
        }
    }
    add("largest N", reroute::kMaxCandidates, 64, 1000, uniform, false);
    add("all equal", 576, 64, 100, [](std::int64_t) { return 1.0F / 576; }, false);
    add("all zero, both signs", 100, 4, 37, [](std::int64_t i) { return i % 3 == 0 ? -0.0F : 0.0F; }, true);
    add(
        "denormal and zero", 300, 4, 100,
        [&](std::int64_t) { return static_cast<float>(random.below(9) - 4) * 0x1p-149F; }, false);
    add(
        "one bit apart", 300, 4, 100,
        [&](std::int64_t) {
            return reroute::float_of_bits(0x3A000000U + static_cast<std::uint32_t>(random.below(64)));
        },
        false);
    add(
        "any sign and infinity", 300, 4, 100,
        [&](std::int64_t i) { return i % 50 == 7   ? kInf
                                     : i % 50 == 9 ? -kInf
                                                   : random.uniform() * 1e30F; }, true);
    return cases;
}
