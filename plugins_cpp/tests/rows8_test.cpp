// linear and mlp, of 8 and 4 bits: the fast form against the portable one, both against their definition, however work is divided.
#include "reroute/rows8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

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
    Matrix matrix() const { return {rows, columns, bits, values.data(), bits == 8 ? scales.data() : nullptr}; }

    void pack() {
        const Matrix shape = matrix();
        values.assign(static_cast<std::size_t>(shape.bytes()), bits == 8 ? 128 : 0x88);
        for (std::int64_t n = 0; n < columns; ++n) {
            for (std::int64_t k = 0; k < rows; ++k) {
                if (bits == 8) {
                    byte((n / 16 * shape.row_blocks() + k / 4) * 64 + n % 16 * 4 + k % 4) =
                        static_cast<std::uint8_t>(at(k, n) + 128);
                    continue;
                }
                const std::int64_t block = (n / 16 * shape.row_blocks() + k / 64) * 576;
                std::uint8_t& pair = byte(block + k % 64 / 8 * 64 + n % 16 * 4 + k % 4);
                const int value = at(k, n) + 8;
                pair = static_cast<std::uint8_t>(k / 4 % 2 == 0 ? (pair & 0xf0) | value : (pair & 0x0f) | value << 4);
                const float one = scale(k, n);
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

// Each task in a thread of its own.
Pool threads(int count) {
    return {[](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
                std::vector<std::thread> all;
                for (std::size_t i = 0; i < tasks; ++i) all.emplace_back(task, data, i);
                for (auto& one : all) one.join();
            },
            nullptr, count};
}

void linear_is_its_definition(int bits) {
    std::mt19937 random(1);
    for (const auto& [k, n] : {std::pair{64, 48}, {896, 33}, {37, 130}, {4, 16}, {1, 1}, {513, 17}, {130, 300}}) {
        const Weight weight(k, n, bits, random);
        for (const int rows : {1, 2, 7, 12, 13, 24, 25, 49, 97}) {
            const auto x = normal(rows * k, random);
            const auto want = defined(weight, rows, x);
            for (const bool portable : {true, false}) {
                rows8_use_portable(portable);
                for (const int count : {1, 2, 3, 8}) {
                    check::context = "linear " + std::to_string(bits) + " bits " + std::to_string(k) + "x" +
                                     std::to_string(n) + ", " + std::to_string(rows) + " rows, " +
                                     std::to_string(count) + " threads, " + rows8_instructions();
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

void mlp_is_made_of_linears(int bits) {
    std::mt19937 random(2);
    for (const auto& [d, f, n] : {std::tuple{64, 160, 64}, {50, 75, 21}}) {
        const Weight gate(d, f, bits, random), up(d, f, bits, random), down(f, n, bits, random);
        for (const int rows : {1, 3, 17, 100}) {
            const auto x = normal(rows * d, random);
            auto hidden = defined(gate, rows, x);
            const auto other = defined(up, rows, x);
            for (std::size_t i = 0; i < hidden.size(); ++i)
                hidden[i] = hidden[i] / (1.0f + std::exp(-hidden[i])) * other[i];
            const auto want = defined(down, rows, hidden);
            for (const bool portable : {true, false}) {
                rows8_use_portable(portable);
                for (const int count : {1, 2, 5}) {
                    check::context = "mlp " + std::to_string(bits) + " bits, " + std::to_string(rows) + " rows, " +
                                     std::to_string(count) + " threads, " + rows8_instructions();
                    std::vector<float> y(want.size());
                    CHECK(mlp(gate.matrix(), up.matrix(), down.matrix(), rows, x.data(), y.data(), threads(count)) ==
                          Status::kOk);
                    // An exponential's last bit can move a hidden value by one step of 254.
                    CHECK(difference(y, want) < 2e-3);
                }
            }
        }
    }
}

void a_row_does_not_see_the_others() {
    std::mt19937 random(3);
    const Weight weight(96, 40, 8, random);
    auto x = normal(30 * 96, random);
    std::vector<float> before(30 * 40), after(30 * 40);
    rows8_use_portable(false);
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
    rows8_use_portable(false);
    check::context = "the largest sums";
    std::mt19937 random(4);
    Weight weight(kMaxRows8 - 4, 16, 8, random);
    std::fill(weight.values.begin(), weight.values.end(), std::uint8_t{255});
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
    CHECK(linear({8, 16, 8, nullptr, nullptr}, 1, x.data(), y.data(), serial_pool()) == Status::kNullPointer);
    CHECK(linear({kMaxRows8 + 1, 16, 8, a.values.data(), a.scales.data()}, 1, x.data(), y.data(), serial_pool()) ==
          Status::kInvalidShape);
    CHECK(linear(a.matrix(), 0, nullptr, nullptr, serial_pool()) == Status::kOk);
    CHECK(mlp(a.matrix(), a.matrix(), c.matrix(), 1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    CHECK(mlp(a.matrix(), c.matrix(), b.matrix(), 1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    CHECK(mlp(a.matrix(), d.matrix(), b.matrix(), 1, x.data(), y.data(), serial_pool()) == Status::kInvalidShape);
    CHECK(linear({8, 16, 5, a.values.data(), a.scales.data()}, 1, x.data(), y.data(), serial_pool()) ==
          Status::kInvalidShape);
}

}  // namespace

int main() {
    for (const int bits : {8, 4}) {
        linear_is_its_definition(bits);
        mlp_is_made_of_linears(bits);
    }
    a_row_does_not_see_the_others();
    extremes_stay_exact();
    wrong_calls_are_refused();
    rows8_use_portable(false);
    std::printf("instructions: %s\n", rows8_instructions());
    return check::finish("rows8_test");
}
