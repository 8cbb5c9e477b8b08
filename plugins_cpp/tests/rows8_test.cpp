// Products of 8 and 4 bits: the fast form against the portable one, both against their definition, however work is divided.
#include "reroute/rows8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "threads.h"

namespace {

using namespace reroute;

struct Weight {
    std::int64_t rows, columns;
    int bits;
    std::vector<int> plain;     // [K, N], -127..127 or -8..7
    std::vector<float> scales;  // of each column, or [ceil(K / 64), N]
    std::vector<std::uint8_t> values;

    Weight(std::int64_t k, std::int64_t n, int b, std::mt19937& random) : rows(k), columns(n), bits(b) {
        const int levels = bits == 8 ? 255 : 16, middle = bits == 8 ? 127 : 8;
        for (std::int64_t i = 0; i < k * n; ++i) plain.push_back(static_cast<int>(random() % levels) - middle);
        for (std::int64_t i = 0; i < (bits == 8 ? 1 : (k + 63) / 64) * n; ++i) {
            scales.push_back(0.001f * static_cast<float>(1 + random() % 9));
        }
        pack();
    }

    int at(std::int64_t k, std::int64_t n) const { return plain[static_cast<std::size_t>(k * columns + n)]; }
    float scale(std::int64_t k, std::int64_t n) const {
        return scales[static_cast<std::size_t>((bits == 8 ? 0 : k / 64) * columns + n)];
    }
    Matrix matrix() const { return {rows, columns, bits, values.data()}; }

    void pack() {
        const Matrix shape = matrix();
        values.assign(static_cast<std::size_t>(shape.bytes()), bits == 8 ? 128 : 0x88);
        for (std::int64_t n = 0; n < columns; ++n) {
            for (std::int64_t k = 0; k < rows; ++k) {
                const std::int64_t columns16 = n / 16 * shape.block_bytes();
                const float one = scale(k, n);
                if (bits == 8) {
                    byte(columns16 + k / 4 * 64 + n % 16 * 4 + k % 4) = static_cast<std::uint8_t>(at(k, n) + 128);
                    std::memcpy(&byte(columns16 + shape.row_blocks() * 64 + n % 16 * 4), &one, sizeof one);
                    continue;
                }
                const std::int64_t block = columns16 + k / 64 * 576;
                std::uint8_t& pair = byte(block + k % 64 / 8 * 64 + n % 16 * 4 + k % 4);
                const int value = at(k, n) + 8;
                pair = static_cast<std::uint8_t>(k / 4 % 2 == 0 ? (pair & 0xf0) | value : (pair & 0x0f) | value << 4);
                std::memcpy(&byte(block + 512 + n % 16 * 4), &one, sizeof one);
            }
        }
    }
    std::uint8_t& byte(std::int64_t index) { return values[static_cast<std::size_t>(index)]; }
};

std::vector<float> normal(std::int64_t count, std::mt19937& random) {
    std::normal_distribution<float> distribution;
    std::vector<float> made(static_cast<std::size_t>(count));
    for (auto& value : made) value = distribution(random);
    return made;
}

// The definition, in double but for what the kernels round to float.
std::vector<float> defined(const Weight& weight, std::int64_t rows, const std::vector<float>& x) {
    std::vector<float> y(static_cast<std::size_t>(rows * weight.columns));
    for (std::int64_t m = 0; m < rows; ++m) {
        const float* row = x.data() + m * weight.rows;
        float largest = 1e-30f;
        for (std::int64_t k = 0; k < weight.rows; ++k) largest = std::max(largest, std::fabs(row[k]));
        const float inverse = 127.0f / largest, step = largest / 127.0f;
        for (std::int64_t n = 0; n < weight.columns; ++n) {
            double sum = 0;
            for (std::int64_t k = 0; k < weight.rows; ++k) {
                sum += static_cast<double>(std::nearbyint(row[k] * inverse)) * weight.at(k, n) *
                       static_cast<double>(weight.scale(k, n));
            }
            y[static_cast<std::size_t>(m * weight.columns + n)] = static_cast<float>(sum * static_cast<double>(step));
        }
    }
    return y;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
    double most = 0, size = 1e-30;
    for (std::size_t i = 0; i < a.size(); ++i) {
        most = std::max(most, static_cast<double>(std::fabs(a[i] - b[i])));
        size = std::max(size, static_cast<double>(std::fabs(b[i])));
    }
    return most / size;
}

void linear_is_its_definition(int bits) {
    std::mt19937 random(1);
    for (const auto& [k, n] : {std::pair{64, 48}, {896, 33}, {37, 130}, {4, 16}, {1, 1}, {513, 17}, {130, 300}}) {
        const Weight weight(k, n, bits, random);
        for (const int rows : {1, 2, 7, 12, 13, 24, 25, 49, 97}) {
            const auto x = normal(rows * k, random);
            const auto want = defined(weight, rows, x);
            for (const bool portable : {true, false}) {
                cpu_use_portable(portable);
                for (const int count : {1, 2, 3, 8}) {
                    check::context = "linear " + std::to_string(bits) + " bits " + std::to_string(k) + "x" +
                                     std::to_string(n) + ", " + std::to_string(rows) + " rows, " +
                                     std::to_string(count) + " threads, " + cpu_instructions();
                    // Guards behind the output.
                    std::vector<float> y(want.size() + 16, -7.0f);
                    CHECK(linear(weight.matrix(), rows, x.data(), y.data(), threads(count)) == Status::kOk);
                    CHECK(std::all_of(y.end() - 16, y.end(), [](float v) { return v == -7.0f; }));
                    y.resize(want.size());
                    CHECK(difference(y, want) < 1e-6);
                }
            }
        }
    }
}

// Runs `call(y, pool)` in both forms with several divisions, and compares.
template <typename Call>
void every_way(const std::string& what, const std::vector<float>& want, double within, const Call& call) {
    for (const bool portable : {true, false}) {
        cpu_use_portable(portable);
        for (const int count : {1, 2, 5}) {
            check::context = what + ", " + std::to_string(count) + " threads, " + cpu_instructions();
            std::vector<float> y(want.size());
            CHECK(call(y.data(), threads(count)) == Status::kOk);
            CHECK(difference(y, want) < within);
        }
    }
}

std::vector<float> gated(const Weight& gate, const Weight& up, const Weight& down, std::int64_t rows,
                         const std::vector<float>& x) {
    auto hidden = defined(gate, rows, x);
    const auto other = defined(up, rows, x);
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] = hidden[i] / (1.0f + std::exp(-hidden[i])) * other[i];
    return defined(down, rows, hidden);
}

std::vector<float> normed(const std::vector<float>& x, const std::vector<float>& weight, float epsilon) {
    auto y = x;
    const std::size_t width = weight.size();
    for (std::size_t m = 0; m < x.size(); m += width) {
        double squares = 0;
        for (std::size_t k = m; k < m + width; ++k) squares += static_cast<double>(x[k]) * static_cast<double>(x[k]);
        const double size = std::sqrt(squares / static_cast<double>(width) + static_cast<double>(epsilon));
        for (std::size_t k = 0; k < width; ++k) {
            y[m + k] = static_cast<float>(static_cast<double>(x[m + k]) / size * static_cast<double>(weight[k]));
        }
    }
    return y;
}

// What is quantised behind a sum or an exponential can differ by one step of 254 where their last bits differ.
constexpr double kStep = 3e-3;

void mlp_is_made_of_linears(int bits) {
    std::mt19937 random(2);
    for (const auto& [d, f, n] : {std::tuple{64, 160, 64}, {50, 75, 21}}) {
        const Weight gate(d, f, bits, random), up(d, f, bits, random), down(f, n, bits, random);
        const Mlp weights{gate.matrix(), up.matrix(), down.matrix()};
        for (const int rows : {1, 3, 17, 100}) {
            const auto x = normal(rows * d, random);
            every_way("mlp " + std::to_string(bits) + " bits, " + std::to_string(rows) + " rows",
                      gated(gate, up, down, rows, x), kStep,
                      [&](float* y, const Pool& pool) { return mlp(weights, rows, x.data(), y, pool); });
        }
    }
}

void the_rest_of_a_layer_is_made_of_its_parts(int output_bits, int bits) {
    std::mt19937 random(6);
    for (const auto& [k, d, f] : {std::tuple{48, 64, 160}, {30, 50, 75}}) {
        const Weight output(k, d, output_bits, random);
        const Weight gate(d, f, bits, random), up(d, f, bits, random), down(f, d, bits, random);
        const Mlp weights{gate.matrix(), up.matrix(), down.matrix()};
        const auto scale = normal(d, random);
        const Norm norm{scale.data(), 0.5f};
        for (const int rows : {1, 3, 17, 100}) {
            const auto h = normal(rows * d, random), a = normal(rows * k, random);
            auto residual = defined(output, rows, a);
            for (std::size_t i = 0; i < residual.size(); ++i) residual[i] += h[i];
            auto want = gated(gate, up, down, rows, normed(residual, scale, norm.epsilon));
            for (std::size_t i = 0; i < want.size(); ++i) want[i] += residual[i];
            every_way("rest of a layer, " + std::to_string(bits) + " bits, " + std::to_string(rows) + " rows", want,
                      kStep, [&](float* y, const Pool& pool) {
                          return rest_of_layer(output.matrix(), norm, weights, rows, h.data(), a.data(), y, pool);
                      });
        }
    }
}

void linears_share_their_rows() {
    std::mt19937 random(7);
    const Weight q(70, 96, 8, random), k(70, 40, 4, random), v(70, 5, 8, random);
    const Matrix weights[] = {q.matrix(), k.matrix(), v.matrix()};
    const auto scale = normal(70, random);
    for (const int rows : {1, 2, 9, 60}) {
        const auto x = normal(rows * 70, random);
        for (const float* norm : {static_cast<const float*>(nullptr), scale.data()}) {
            const auto in = norm == nullptr ? x : normed(x, scale, 1e-5f);
            std::vector<float> want;
            for (const Weight* one : {&q, &k, &v}) {
                const auto y = defined(*one, rows, in);
                want.insert(want.end(), y.begin(), y.end());
            }
            every_way(std::to_string(rows) + " rows, three matrices", want, norm == nullptr ? 1e-6 : kStep,
                      [&](float* y, const Pool& pool) {
                          float* const ys[] = {y, y + rows * 96, y + rows * 136};
                          return linears({norm, 1e-5f}, weights, ys, 3, rows, x.data(), pool);
                      });
        }
    }
}

void a_row_does_not_see_the_others() {
    std::mt19937 random(3);
    const Weight weight(96, 40, 8, random);
    auto x = normal(30 * 96, random);
    std::vector<float> before(30 * 40), after(30 * 40);
    cpu_use_portable(false);
    check::context = "a row with a large value";
    CHECK(linear(weight.matrix(), 30, x.data(), before.data(), serial_pool()) == Status::kOk);
    x[4 * 96 + 7] = 1e6f;
    std::fill(x.begin() + 9 * 96, x.begin() + 10 * 96, 0.0f);
    CHECK(linear(weight.matrix(), 30, x.data(), after.data(), serial_pool()) == Status::kOk);
    for (std::size_t m = 0; m < 30; ++m) {
        if (m != 4 && m != 9) CHECK(std::equal(&before[m * 40], &before[m * 40] + 40, &after[m * 40]));
    }
    CHECK(std::all_of(&after[9 * 40], &after[9 * 40] + 40, [](float v) { return v == 0.0f; }));
}

void extremes_stay_exact() {
    cpu_use_portable(false);
    check::context = "the largest sums";
    std::mt19937 random(4);
    Weight weight(kMaxRows8 - 4, 16, 8, random);
    std::fill(weight.values.begin(), weight.values.end() - 64, std::uint8_t{255});  // all but the scales
    const std::vector<float> x(static_cast<std::size_t>(weight.rows), 3.0f);
    std::vector<float> y(16);
    CHECK(linear(weight.matrix(), 1, x.data(), y.data(), serial_pool()) == Status::kOk);
    const double want =
        127.0 * 127.0 * static_cast<double>(weight.rows) * (3.0 / 127) * static_cast<double>(weight.scales[0]);
    CHECK(std::fabs(y[0] / want - 1) < 1e-5);
}

void wrong_calls_are_refused() {
    check::context = "wrong calls";
    std::mt19937 random(5);
    const Weight a(8, 16, 8, random), b(16, 8, 8, random), c(8, 8, 8, random), d(8, 16, 4, random);
    std::vector<float> x(8), y(16);
    CHECK(linear(a.matrix(), -1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    CHECK(linear(a.matrix(), 1, nullptr, y.data(), serial_pool()) == Status::kNullPointer);
    CHECK(linear({8, 16, 8, nullptr}, 1, x.data(), y.data(), serial_pool()) == Status::kNullPointer);
    CHECK(linear({kMaxRows8 + 1, 16, 8, a.values.data()}, 1, x.data(), y.data(), serial_pool()) ==
          Status::kInvalidShape);
    CHECK(linear(a.matrix(), 0, nullptr, nullptr, serial_pool()) == Status::kOk);
    CHECK(linear({8, 16, 5, a.values.data()}, 1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    const Matrix unlike[] = {a.matrix(), b.matrix()};
    float* const two[] = {y.data(), y.data()};
    CHECK(linears({}, unlike, two, 2, 1, x.data(), serial_pool()) == Status::kInvalidShape);
    float* const one_missing[] = {y.data(), nullptr};
    const Matrix same[] = {a.matrix(), c.matrix()};
    CHECK(linears({}, same, one_missing, 2, 1, x.data(), serial_pool()) == Status::kNullPointer);
    for (const Mlp& wrong : {Mlp{a.matrix(), a.matrix(), c.matrix()},
                             {a.matrix(), c.matrix(), b.matrix()},
                             {a.matrix(), d.matrix(), b.matrix()}}) {
        CHECK(mlp(wrong, 1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    }
    const Mlp good{a.matrix(), a.matrix(), b.matrix()};
    const Norm norm{x.data(), 1e-5f};
    CHECK(rest_of_layer(c.matrix(), norm, good, 1, x.data(), x.data(), y.data(), serial_pool()) == Status::kOk);
    CHECK(rest_of_layer(a.matrix(), norm, good, 1, x.data(), x.data(), y.data(), serial_pool()) ==
          Status::kInvalidShape);
    CHECK(rest_of_layer(c.matrix(), {}, good, 1, x.data(), x.data(), y.data(), serial_pool()) == Status::kNullPointer);
}

}  // namespace

int main() {
    for (const int bits : {8, 4}) {
        linear_is_its_definition(bits);
        mlp_is_made_of_linears(bits);
        the_rest_of_a_layer_is_made_of_its_parts(bits, 4);
        the_rest_of_a_layer_is_made_of_its_parts(bits, 8);
    }
    linears_share_their_rows();
    a_row_does_not_see_the_others();
    extremes_stay_exact();
    wrong_calls_are_refused();
    cpu_use_portable(false);
    std::printf("instructions: %s\n", cpu_instructions());
    return check::finish("rows8_test");
}
