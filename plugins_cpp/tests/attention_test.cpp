// attention: the fast form and the portable one against the definition, however work is divided.
#include "reroute/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "threads.h"

namespace {

using namespace reroute;
using Floats = std::vector<float>;

constexpr float kGuard = -7.0f;
const float kNan = std::numeric_limits<float>::quiet_NaN();

Floats normal(std::int64_t count, std::mt19937& random) {
    std::normal_distribution<float> distribution;
    Floats made(static_cast<std::size_t>(count));
    for (auto& value : made) value = distribution(random);
    return made;
}

// A step: new rows, and caches whose rows behind the valid ones are not numbers.
struct Step {
    AttentionShape s;
    Floats q, k, v, keys, values;

    Step(const AttentionShape& shape, std::mt19937& random) : s(shape) {
        q = normal(s.batch * s.rows * s.heads * s.size, random);
        k = normal(s.batch * s.rows * s.groups * s.size, random);
        v = normal(s.batch * s.rows * s.groups * s.size, random);
        for (Floats* cache : {&keys, &values}) {
            *cache = normal(s.batch * s.groups * s.capacity * s.size, random);
            for (std::size_t i = 0; i < cache->size(); ++i) {
                const auto row = static_cast<std::int64_t>(i) / s.size % s.capacity;
                if (row >= s.valid - s.rows) (*cache)[i] = kNan;
            }
        }
    }

    std::size_t place(std::int64_t b, std::int64_t g, std::int64_t row) const {
        return static_cast<std::size_t>(((b * s.groups + g) * s.capacity + row) * s.size);
    }
    std::size_t fresh(std::int64_t b, std::int64_t row, std::int64_t head, std::int64_t heads) const {
        return static_cast<std::size_t>(((b * s.rows + row) * heads + head) * s.size);
    }

    // The caches after the step.
    void append() {
        for (std::int64_t b = 0; b < s.batch; ++b) {
            for (std::int64_t g = 0; g < s.groups; ++g) {
                for (std::int64_t r = 0; r < s.rows; ++r) {
                    const auto to = static_cast<std::ptrdiff_t>(place(b, g, s.valid - s.rows + r));
                    const auto from = static_cast<std::ptrdiff_t>(fresh(b, r, g, s.groups));
                    std::copy_n(k.begin() + from, s.size, keys.begin() + to);
                    std::copy_n(v.begin() + from, s.size, values.begin() + to);
                }
            }
        }
    }

    // The definition, in double, of appended caches.
    Floats defined() const {
        Floats out(q.size());
        const auto size = static_cast<std::size_t>(s.size);
        for (std::int64_t b = 0; b < s.batch; ++b) {
            for (std::int64_t h = 0; h < s.heads; ++h) {
                for (std::int64_t r = 0; r < s.rows; ++r) {
                    const std::size_t at = fresh(b, r, h, s.heads);
                    const std::int64_t seen = s.valid - s.rows + r + 1, g = h / (s.heads / s.groups);
                    std::vector<double> odds;
                    for (std::int64_t j = 0; j < seen; ++j) {
                        double product = 0;
                        for (std::size_t c = 0; c < size; ++c) {
                            product += static_cast<double>(q[at + c]) * static_cast<double>(keys[place(b, g, j) + c]);
                        }
                        odds.push_back(product * static_cast<double>(s.scale));
                    }
                    const double most = *std::max_element(odds.begin(), odds.end());
                    double total = 0;
                    for (double& one : odds) total += one = std::exp(one - most);
                    for (std::size_t c = 0; c < size; ++c) {
                        double sum = 0;
                        for (std::int64_t j = 0; j < seen; ++j) {
                            sum += odds[static_cast<std::size_t>(j)] * static_cast<double>(values[place(b, g, j) + c]);
                        }
                        out[at + c] = static_cast<float>(sum / total);
                    }
                }
            }
        }
        return out;
    }
};

double difference(const Floats& a, const Floats& b) {
    double most = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
        const double one = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        most = one > most || std::isnan(one) ? one : most;
    }
    return most;
}

bool same(const Floats& a, const Floats& b) {
    const auto equal = [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); };
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
}

void attention_is_its_definition() {
    std::mt19937 random(1);
    struct Case {
        std::int64_t batch, rows, heads, groups, size, before;
    };
    const Case cases[] = {{1, 1, 14, 2, 64, 0},    {1, 1, 14, 2, 64, 640}, {1, 70, 14, 2, 64, 0},
                          {1, 200, 4, 4, 128, 0},  {2, 33, 6, 3, 80, 17},  {1, 65, 3, 1, 8, 63},
                          {3, 5, 2, 2, 20, 1},     {1, 129, 2, 1, 1, 3},   {2, 1, 8, 1, 256, 100},
                          {1, 7, 32, 32, 16, 9},   {1, 31, 5, 5, 96, 64},  {1, 2, 7, 1, 33, 127},
                          {1, 300, 14, 2, 64, 100}};
    for (const Case& one : cases) {
        const AttentionShape shape{one.batch,
                                   one.rows,
                                   one.heads,
                                   one.groups,
                                   one.size,
                                   one.before + one.rows + 5,
                                   one.before + one.rows,
                                   1.0f / std::sqrt(static_cast<float>(one.size))};
        const Step before(shape, random);
        Step after = before;
        after.append();
        const Floats want = after.defined();
        for (const bool portable : {true, false}) {
            cpu_use_portable(portable);
            for (const int count : {1, 2, 3, 8}) {
                for (const bool in_place : {true, false}) {
                    check::context = "batch " + std::to_string(one.batch) + ", " + std::to_string(one.rows) +
                                     " rows behind " + std::to_string(one.before) + ", heads " +
                                     std::to_string(one.heads) + "/" + std::to_string(one.groups) + " of " +
                                     std::to_string(one.size) + ", " + std::to_string(count) + " threads, " +
                                     cpu_instructions() + (in_place ? ", in place" : ", copied");
                    Step run = before;
                    Floats out(want.size() + 16, kGuard), keys(run.keys.size(), kNan), values(run.values.size(), kNan);
                    Floats &new_keys = in_place ? run.keys : keys, &new_values = in_place ? run.values : values;
                    CHECK(attention(shape, run.q.data(), run.k.data(), run.v.data(), run.keys.data(), run.values.data(),
                                    new_keys.data(), new_values.data(), out.data(), threads(count)) == Status::kOk);
                    CHECK(std::all_of(out.end() - 16, out.end(), [](float v) { return v == kGuard; }));
                    CHECK(difference(out, want) < 2e-6);
                    CHECK(same(new_keys, after.keys) && same(new_values, after.values));
                    if (!in_place) CHECK(same(run.keys, before.keys) && same(run.values, before.values));
                }
            }
        }
    }
}

void large_scores_do_not_overflow() {
    std::mt19937 random(2);
    const AttentionShape shape{1, 9, 4, 2, 32, 40, 29, 50.0f};
    Step step(shape, random);
    for (float& one : step.q) one *= 40;
    Step after = step;
    after.append();
    for (const bool portable : {true, false}) {
        cpu_use_portable(portable);
        check::context = std::string("large scores, ") + cpu_instructions();
        Floats out(step.q.size());
        CHECK(attention(shape, step.q.data(), step.k.data(), step.v.data(), step.keys.data(), step.values.data(),
                        step.keys.data(), step.values.data(), out.data(), serial_pool()) == Status::kOk);
        CHECK(difference(out, after.defined()) < 5e-2);  // a score of 10,000 has three digits behind the point
    }
}

// A query that sees what is not a number is not a number; the rows before do not see it.
void what_is_not_a_number_stays_so() {
    std::mt19937 random(3);
    const AttentionShape shape{1, 40, 2, 1, 16, 64, 50, 0.25f};
    for (const bool portable : {true, false}) {
        cpu_use_portable(portable);
        check::context = std::string("not a number, ") + cpu_instructions();
        Step step(shape, random);
        step.k[20 * 16 + 3] = kNan;
        Floats out(step.q.size());
        CHECK(attention(shape, step.q.data(), step.k.data(), step.v.data(), step.keys.data(), step.values.data(),
                        step.keys.data(), step.values.data(), out.data(), serial_pool()) == Status::kOk);
        bool right = true;
        for (std::size_t i = 0; i < out.size(); ++i) right = right && std::isnan(out[i]) == (i >= 20 * 32);
        CHECK(right);
    }
}

void wrong_calls_are_refused() {
    check::context = "wrong calls";
    Floats x(64, 0.0f);
    const auto call = [&](const AttentionShape& s, const float* q) {
        return attention(s, q, x.data(), x.data(), x.data(), x.data(), x.data(), x.data(), x.data(), serial_pool());
    };
    CHECK(call({1, 1, 3, 2, 4, 8, 1, 1}, x.data()) == Status::kInvalidShape);  // heads that groups do not divide
    CHECK(call({1, 2, 2, 2, 4, 8, 1, 1}, x.data()) == Status::kInvalidShape);  // fewer valid rows than new ones
    CHECK(call({1, 1, 2, 2, 4, 8, 9, 1}, x.data()) == Status::kInvalidShape);  // more than there is room for
    CHECK(call({1, -1, 2, 2, 4, 8, 1, 1}, x.data()) == Status::kInvalidShape);
    CHECK(call({1, 1, 2, 2, 4, 8, 1, 1}, nullptr) == Status::kNullPointer);
    CHECK(call({1, 0, 2, 2, 4, 8, 1, 1}, nullptr) == Status::kOk);
}

}  // namespace

int main() {
    attention_is_its_definition();
    large_scores_do_not_overflow();
    what_is_not_a_number_stays_so();
    wrong_calls_are_refused();
    cpu_use_portable(false);
    std::printf("instructions: %s\n", cpu_instructions());
    return check::finish("attention_test");
}
