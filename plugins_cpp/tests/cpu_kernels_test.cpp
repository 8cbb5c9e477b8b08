// The CPU reference against brute force: scores in double precision, the choice by counting, rows by index.
#include <string>

#include "check.h"
#include "inputs.h"
#include "reroute/rows.h"
#include "reroute/select.h"
#include "select_cases.h"
#include "threads.h"

namespace {

using reroute::SelectInputs;
using reroute::SelectShape;
using reroute::Status;

// Probability of every candidate, straight from the definition.
std::vector<double> brute_scores(const SelectShape& s, const std::vector<float>& q, const std::vector<float>& k,
                                 const std::vector<std::int64_t>& candidates) {
    std::vector<double> scores(candidates.size(), 0.0);
    const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
    for (std::int64_t b = 0; b < s.batch; ++b) {
        for (std::int64_t h = 0; h < s.heads; ++h) {
            std::vector<double> logits;
            for (std::int64_t r = 0; r < s.rows; ++r) {
                double product = 0;
                const std::int64_t key = (b * s.rows + r) * s.kv_heads + h / (s.heads / s.kv_heads);
                for (std::int64_t i = 0; i < s.head_size; ++i) {
                    product += double{q[at((b * s.heads + h) * s.head_size + i)]} * k[at(key * s.head_size + i)];
                }
                logits.push_back(product * s.scale);
            }
            const double largest = *std::max_element(logits.begin(), logits.end());
            double sum = 0;
            for (double& logit : logits) sum += logit = std::exp(logit - largest);
            for (std::int64_t n = 0; n < s.candidates; ++n) {
                const std::int64_t i = b * s.candidates + n;
                scores[at(i)] += logits[at(candidates[at(i)])] / sum / static_cast<double>(s.heads);
            }
        }
    }
    return scores;
}

// Row by row: a candidate runs when fewer than K beat it; then everything that runs, ascending.
std::vector<std::int64_t> brute_choice(const SelectShape& s, const std::vector<float>& scores,
                                       const inputs::Slots& slots) {
    std::vector<std::int64_t> all;
    for (std::int64_t b = 0; b < s.batch; ++b) {
        std::vector<std::int64_t> row(slots.always.begin() + b * s.always, slots.always.begin() + (b + 1) * s.always);
        const auto score = [&](std::int64_t n) { return scores[static_cast<std::size_t>(b * s.candidates + n)]; };
        for (std::int64_t n = 0; n < s.candidates; ++n) {
            std::int64_t better = 0;
            for (std::int64_t m = 0; m < s.candidates && s.keep < s.candidates; ++m) {
                better += score(m) > score(n) || (score(m) == score(n) && m < n) ? 1 : 0;
            }
            if (better < s.keep) row.push_back(slots.candidates[static_cast<std::size_t>(b * s.candidates + n)]);
        }
        std::sort(row.begin(), row.end());
        all.insert(all.end(), row.begin(), row.end());
    }
    return all;
}

std::vector<float> rounded(std::vector<float> values, reroute::DType dtype) {
    for (float& value : values) {
        if (dtype == reroute::DType::kFloat16) value = to_float(reroute::to_half(value));
        if (dtype == reroute::DType::kBFloat16) value = to_float(reroute::to_bfloat16(value));
    }
    return values;
}

void test_select() {
    inputs::Random random(1);
    for (const SelectCase& c : select_cases()) {
        check::context = c.name;
        const SelectShape& s = c.shape;
        const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
        const auto q =
            rounded(inputs::floats(size(s.batch * s.heads * s.head_size), inputs::query_fill(c.fill), random), s.dtype);
        const auto k =
            rounded(inputs::floats(size(s.batch * s.rows * s.kv_heads * s.head_size), c.fill, random), s.dtype);
        const inputs::Slots slots(s, c.shuffled, random);
        const auto q_bytes = inputs::encode(q, s.dtype);
        const auto k_bytes = inputs::encode(k, s.dtype);
        const SelectInputs in{q_bytes.data(), k_bytes.data(), slots.candidates.data(), slots.always.data()};
        std::vector<float> scores(slots.candidates.size());
        std::vector<std::int64_t> chosen(size(s.batch * select_length(s)));
        const auto expected = brute_scores(s, q, k, slots.candidates);
        const auto check_form = [&](const std::string& form, const auto& score, const auto& select) {
            check::context = c.name + form;
            if (c.fill == inputs::Fill::kOneNaN || c.fill == inputs::Fill::kOneInfinity) {
                CHECK(select() == Status::kNotANumber);
                return;
            }
            CHECK(score() == Status::kOk);
            double worst = 0;
            for (std::size_t i = 0; i < scores.size(); ++i) {
                worst = std::max(worst, std::abs(expected[i] - double{scores[i]}) / (expected[i] + 1e-30));
            }
            CHECK(worst < 1e-4);
            CHECK(select() == Status::kOk);
            CHECK(chosen == brute_choice(s, scores, slots));
        };
        check_form(
            "", [&] { return reroute::select_scores_cpu(s, in, scores.data()); },
            [&] { return reroute::select_cpu(s, in, chosen.data()); });
        if (s.dtype != reroute::DType::kFloat32) {
            CHECK(reroute::select_scores_cpu_fast(s, in, scores.data(), reroute::serial_pool()) ==
                  (s.batch * s.candidates == 0 ? Status::kOk : Status::kInvalidShape));
            continue;
        }
        for (const bool portable : {true, false}) {
            reroute::cpu_use_portable(portable);
            for (const int count : {1, 3}) {
                check_form(
                    std::string(", fast, ") + reroute::cpu_instructions(),
                    [&] { return reroute::select_scores_cpu_fast(s, in, scores.data(), threads(count)); },
                    [&] { return reroute::select_cpu_fast(s, in, chosen.data(), threads(count)); });
            }
        }
    }
}

void test_choice() {
    inputs::Random random(2);
    for (const ChooseCase& c : choose_cases(random)) {
        check::context = c.name;
        const inputs::Slots slots(c.shape, c.shuffled, random);
        std::vector<std::int64_t> chosen(static_cast<std::size_t>(c.shape.batch * select_length(c.shape)));
        const SelectInputs in{nullptr, nullptr, slots.candidates.data(), slots.always.data()};
        CHECK(reroute::select_choose_cpu(c.shape, c.scores.data(), in, chosen.data()) == Status::kOk);
        CHECK(chosen == brute_choice(c.shape, c.scores, slots));
    }
}

void test_refusals() {
    check::context = "refusals";
    const float q[] = {1.0F};
    const float k[] = {1.0F, 2.0F, 3.0F};
    const std::int64_t candidates[] = {0, 1};
    const std::int64_t repeated[] = {1, 1};
    const std::int64_t outside[] = {0, 3};
    const std::int64_t always[] = {2};
    std::int64_t out[3];
    SelectShape s = select_shape(1, 3, 2, 1, 1, 1, 1, 1);
    CHECK(reroute::select_cpu(s, {q, k, candidates, always}, out) == Status::kOk);
    CHECK(out[0] == 1 && out[1] == 2);
    CHECK(reroute::select_cpu(s, {q, k, repeated, always}, out) == Status::kSlotRepeated);
    CHECK(reroute::select_cpu(s, {q, k, outside, always}, out) == Status::kSlotOutOfRange);
    CHECK(reroute::select_cpu(s, {nullptr, k, candidates, always}, out) == Status::kNullPointer);
    CHECK(reroute::select_cpu(s, {q, k, candidates, nullptr}, out) == Status::kNullPointer);
    const auto refused = [&](auto change) {
        SelectShape changed = s;
        change(changed);
        return reroute::select_cpu(changed, {q, k, candidates, always}, out);
    };
    CHECK(refused([](SelectShape& c) { c.rows = 2; }) == Status::kInvalidShape);
    CHECK(refused([](SelectShape& c) { c.keep = -1; }) == Status::kInvalidShape);
    CHECK(refused([](SelectShape& c) { c.heads = 0; }) == Status::kInvalidShape);
    CHECK(refused([](SelectShape& c) { c.heads = 3, c.kv_heads = 2; }) == Status::kInvalidShape);
    CHECK(refused([](SelectShape& c) { c.dtype = static_cast<reroute::DType>(7); }) == Status::kInvalidShape);
    CHECK(refused([](SelectShape& c) { c.rows = reroute::kMaxRows + 1; }) == Status::kTooLarge);
    CHECK(refused([](SelectShape& c) { c.head_size = reroute::kMaxGroupWidth + 1; }) == Status::kTooLarge);
    for (int code = 0; code <= 10; ++code) {
        CHECK(std::string(reroute::describe(static_cast<Status>(code))) != "unknown status");
    }
    CHECK(std::string(reroute::describe(static_cast<Status>(11))) == "unknown status");
}

void test_workspace() {
    check::context = "workspace size";
    const SelectShape s = select_shape(1, 640, 576, 64, 32, 32, 128, 64);
    const std::size_t bytes = reroute::select_workspace_bytes(s);
    for (auto size : {&SelectShape::batch, &SelectShape::rows, &SelectShape::heads}) {
        SelectShape larger = s;
        larger.*size *= 2;
        CHECK(reroute::select_workspace_bytes(larger) > bytes);
    }
    CHECK(bytes < (std::size_t{1} << 20));
}

void test_rows() {
    inputs::Random random(3);
    for (const std::int64_t row_bytes : {1, 3, 16, 100, 200'000}) {
        for (const std::int64_t picked : {0, 1, 5, 9}) {
            check::context = "rows of " + std::to_string(row_bytes) + ", A = " + std::to_string(picked);
            const reroute::RowsShape s{2, 9, picked, row_bytes};
            const auto full = inputs::bytes(s.batch * s.rows * row_bytes, random);
            const auto slots = inputs::ascending_slots(s.batch, s.rows, picked, random);
            std::vector<unsigned char> rows(static_cast<std::size_t>(s.batch * picked * row_bytes));
            CHECK(gather_cpu(s, full.data(), slots.data(), rows.data()) == Status::kOk);
            const auto full_at = [&](std::int64_t i, std::int64_t byte) {
                return static_cast<std::size_t>(
                    ((i / picked) * s.rows + slots[static_cast<std::size_t>(i)]) * row_bytes + byte);
            };
            auto expected = full;
            for (std::int64_t i = 0; i < s.batch * picked; ++i) {
                bool same = true;
                for (std::int64_t byte = 0; byte < row_bytes; ++byte) {
                    auto& value = rows[static_cast<std::size_t>(i * row_bytes + byte)];
                    same = same && value == full[full_at(i, byte)];
                    value = static_cast<unsigned char>(~value);
                    expected[full_at(i, byte)] = value;
                }
                CHECK(same);
            }
            std::vector<unsigned char> updated(full.size());
            CHECK(scatter_cpu(s, full.data(), slots.data(), rows.data(), updated.data()) == Status::kOk);
            CHECK(updated == expected);
            for (const int count : {1, 2, 7}) {
                const auto pool = threads(count);
                std::vector<unsigned char> again(rows.size());
                CHECK(gather_cpu_fast(s, expected.data(), slots.data(), again.data(), pool) == Status::kOk);
                CHECK(again == rows);
                std::fill(updated.begin(), updated.end(), static_cast<unsigned char>(7));
                CHECK(scatter_cpu_fast(s, full.data(), slots.data(), rows.data(), updated.data(), pool) == Status::kOk);
                CHECK(updated == expected);
                updated = full;  // in place
                CHECK(scatter_cpu_fast(s, updated.data(), slots.data(), rows.data(), updated.data(), pool) ==
                      Status::kOk);
                CHECK(updated == expected);
            }
        }
    }
    check::context = "refused rows";
    const unsigned char full[4] = {};
    unsigned char out[4] = {};
    const std::int64_t descending[] = {1, 0};
    const std::int64_t outside[] = {0, 2};
    const reroute::RowsShape s{1, 2, 2, 2};
    CHECK(gather_cpu(s, full, descending, out) == Status::kOk);
    CHECK(scatter_cpu(s, full, descending, full, out) == Status::kSlotsNotAscending);
    const auto pool = reroute::serial_pool();
    CHECK(gather_cpu_fast(s, full, descending, out, pool) == Status::kOk);
    CHECK(scatter_cpu_fast(s, full, descending, full, out, pool) == Status::kSlotsNotAscending);
    CHECK(gather_cpu_fast(s, full, outside, out, pool) == Status::kSlotOutOfRange);
    CHECK(gather_cpu(s, full, outside, out) == Status::kSlotOutOfRange);
    CHECK(scatter_cpu(s, full, outside, full, out) == Status::kSlotOutOfRange);
    CHECK(gather_cpu(s, nullptr, descending, out) == Status::kNullPointer);
    CHECK(reroute::gather_cpu({1, 2, 2, -1}, full, descending, out) == Status::kInvalidShape);
    CHECK(reroute::gather_cpu({1, 2, 2, reroute::kMaxRowBytes + 1}, full, descending, out) == Status::kTooLarge);
    CHECK(reroute::gather_cpu({1, 0, 0, 2}, nullptr, nullptr, nullptr) == Status::kOk);
}

// Every fp16 and bf16 pattern survives the round trip; rounding goes to even.
void test_half() {
    check::context = "half";
    int wrong = 0;
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto pattern = static_cast<std::uint16_t>(bits);
        const float half = to_float(reroute::Half{pattern});
        const float brain = to_float(reroute::BFloat16{pattern});
        if (!std::isnan(half) && reroute::to_half(half).bits != pattern) ++wrong;
        if (!std::isnan(brain) && reroute::to_bfloat16(brain).bits != pattern) ++wrong;
        if (std::isnan(half) && !std::isnan(to_float(reroute::to_half(half)))) ++wrong;
    }
    CHECK(wrong == 0);
    CHECK(to_float(reroute::Half{0x3C00}) == 1.0F && to_float(reroute::Half{0x0001}) == 0x1p-24F);
    CHECK(to_float(reroute::Half{0x7BFF}) == 65504.0F);
    CHECK(reroute::to_half(1.0F + 0x1p-11F).bits == 0x3C00);  // a tie, to even
    CHECK(reroute::to_half(1.0F + 0x1.8p-10F).bits == 0x3C02);
    CHECK(reroute::to_half(65520.0F).bits == 0x7C00);
    CHECK(reroute::to_half(0x1p-25F).bits == 0x0000 && reroute::to_half(0x1.8p-25F).bits == 0x0001);
}

}  // namespace

int main() {
    test_select();
    test_choice();
    test_refusals();
    test_workspace();
    test_rows();
    test_half();
    return check::finish("cpu_kernels_test");
}
