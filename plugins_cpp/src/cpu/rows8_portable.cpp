// int8 products in plain C++: what the fast form is compared with, to the bit but for the exponential.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "rows8_kernels.h"

namespace reroute::rows8 {
namespace {

// The scale of a column, of the 16 that are stored there.
float float_at(const std::uint8_t* scales, std::int64_t column) {
    float scale;
    std::memcpy(&scale, scales + column % 16 * 4, sizeof scale);
    return scale;
}

float product8(const Rows& rows, std::int64_t row, const Matrix& weight, std::int64_t column) {
    const std::int64_t blocks = weight.row_blocks();
    const std::uint8_t *block = weight.block(column / 16), *w = block + column % 16 * 4;
    const std::int8_t* a = rows.values + row * rows.stride;
    std::int32_t total = 0;
    for (std::int64_t k = 0; k < blocks; ++k, w += 64, a += 4) {
        total += a[0] * w[0] + a[1] * w[1] + a[2] * w[2] + a[3] * w[3];
    }
    const float scale = float_at(block + blocks * 64, column);
    return static_cast<float>(total - 128 * rows.totals[row]) * (scale * rows.steps[row]);
}

float product4(const Rows& rows, std::int64_t row, const Matrix& weight, std::int64_t column) {
    const std::int64_t blocks = weight.row_blocks();
    const std::uint8_t* block = weight.block(column / 16);
    const std::int8_t* a = rows.values + row * rows.stride;
    float total = 0;
    for (std::int64_t b = 0; b < blocks; ++b, block += 576) {
        std::int32_t sum = -8 * rows.sums[row * rows.blocks() + b];
        for (int k = 0; k < 64; ++k, ++a) {
            const std::uint8_t pair = block[k / 8 * 64 + column % 16 * 4 + k % 4];
            sum += *a * (k / 4 % 2 == 0 ? pair & 15 : pair >> 4);
        }
        total = std::fma(static_cast<float>(sum), float_at(block + 512, column), total);
    }
    return total * rows.steps[row];
}

float product(const Rows& rows, std::int64_t row, const Matrix& weight, std::int64_t column) {
    return weight.bits == 8 ? product8(rows, row, weight, column) : product4(rows, row, weight, column);
}

void quantize(const float* x, std::int64_t width, const Rows& rows) {
    for (std::int64_t m = 0; m < rows.count; ++m, x += width) {
        float largest = 1e-30f;
        for (std::int64_t k = 0; k < width; ++k) largest = std::max(largest, std::fabs(x[k]));
        const float inverse = 127.0f / largest;
        std::int8_t* a = rows.values + m * rows.stride;
        std::int32_t* sums = rows.sums + m * rows.blocks();
        std::fill(sums, sums + rows.blocks(), 0);
        for (std::int64_t k = 0; k < width; ++k) {
            const float rounded = std::nearbyint(x[k] * inverse);
            a[k] = static_cast<std::int8_t>(std::min(127.0f, std::max(-127.0f, rounded)));
            sums[k / 64] += a[k];
        }
        rows.totals[m] = std::accumulate(sums, sums + rows.blocks(), 0);
        std::fill(a + width, a + rows.stride, std::int8_t{0});
        rows.steps[m] = largest / 127.0f;
    }
}

void linear(const Rows& rows, const Matrix& weight, std::int64_t first, std::int64_t last, float* y,
            std::int64_t pitch) {
    const std::int64_t end = std::min(last * 16, weight.columns);
    for (std::int64_t m = 0; m < rows.count; ++m) {
        for (std::int64_t n = first * 16; n < end; ++n) y[m * pitch + n] = product(rows, m, weight, n);
    }
}

void gated(const Rows& rows, const Matrix& gate, const Matrix& up, std::int64_t first, std::int64_t last, float* y,
           std::int64_t pitch) {
    const std::int64_t end = std::min(last * 16, gate.columns);
    for (std::int64_t m = 0; m < rows.count; ++m) {
        for (std::int64_t n = first * 16; n < end; ++n) {
            const float g = product(rows, m, gate, n);
            y[m * pitch + n] = g / (1.0f + std::exp(-g)) * product(rows, m, up, n);
        }
    }
}

void norm(const float* x, std::int64_t count, std::int64_t width, const float* weight, float epsilon, float* y) {
    for (std::int64_t m = 0; m < count; ++m, x += width, y += width) {
        float squares = 0;
        for (std::int64_t k = 0; k < width; ++k) squares = std::fma(x[k], x[k], squares);
        const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
        for (std::int64_t k = 0; k < width; ++k) y[k] = x[k] * factor * weight[k];
    }
}

void add(const float* x, float* y, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) y[i] += x[i];
}

}  // namespace

const Kernels kPortable{quantize, linear, gated, norm, add};

}  // namespace reroute::rows8
