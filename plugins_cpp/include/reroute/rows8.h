// Products of int8 activations, with a step for each row that is found at run time, and weights of 8 or 4 bits, for the
// CPU. With 8 bits a column has one scale: the arithmetic of the form ROWS8 of engines/quantize.py, in one pass over the
// activations. With 4 bits each 64 weights of a column have one.
//
//   step(m) = max |x(m, :)| / 127            a(m, k) = round(x(m, k) / step(m))            integers -127..127
//   x * w     y(m, n) = step(m) * sum over k of a(m, k) w(k, n) scale(k / 64, n)           sums of equal scale in int32
//   norm      y(m, k) = x(m, k) weight(k) / sqrt(mean of x(m, :)^2 + epsilon)              root mean square norm
//   mlp       y = (silu(x * gate) (x * up)) * down
//
// Rows are divided among threads, not columns, as soon as there are enough: no two threads then write to one line of a
// cache, and what belongs to a row stays with its thread. A step of one row divides columns.
#pragma once

#include <cstdint>

#include "reroute/pool.h"
#include "reroute/status.h"

namespace reroute {

// A matrix [K, N], in columns of 16: `values` are [ceil(N / 16)] of
//
//   8 bits    [ceil(K / 4)] of 64 bytes: byte (n % 16) * 4 + k % 4 is w(k, n) + 128; then the float scales of the columns
//   4 bits    [ceil(K / 64)] of 576 bytes: 8 times 64 bytes, of which the low halves are w(k, n) + 8 of 4 rows, in the
//             order above, and the high halves those of the next 4; then the float scales of the 16 columns
//
// K and N are filled up with zeros, which are stored as 128 or 8.
struct Matrix {
    std::int64_t rows = 0;     // K
    std::int64_t columns = 0;  // N
    int bits = 8;
    const std::uint8_t* values = nullptr;

    std::int64_t row_blocks() const { return bits == 8 ? (rows + 3) / 4 : (rows + 63) / 64; }
    std::int64_t column_blocks() const { return (columns + 15) / 16; }
    // Bytes of 16 columns.
    std::int64_t block_bytes() const { return bits == 8 ? row_blocks() * 64 + 64 : row_blocks() * 576; }
    std::int64_t bytes() const { return column_blocks() * block_bytes(); }
    const std::uint8_t* block(std::int64_t index) const { return values + index * block_bytes(); }
};

// K at which sums of products could leave int32.
constexpr std::int64_t kMaxRows8 = 65536;

// A root mean square norm; none without weights, float [K].
struct Norm {
    const float* weight = nullptr;
    float epsilon = 0;
};

// gate and up [D, F], of equal bits, down [F, D'].
struct Mlp {
    Matrix gate, up, down;
};

// x float [M, K], y float [M, N].
Status linear(const Matrix& weight, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept;

// ys[i] = norm(x) * weights[i], of `count` matrices with equal K: queries, keys and values of a layer.
Status linears(const Norm& norm, const Matrix* weights, float* const* ys, int count, std::int64_t rows, const float* x,
               const Pool& pool) noexcept;

// x float [M, D], y float [M, D'].
Status mlp(const Mlp& mlp, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept;

// What follows attention in a layer: y = r + mlp(norm(r)) with r = h + a * output. h and y float [M, D], a [M, K].
Status rest_of_layer(const Matrix& output, const Norm& norm, const Mlp& mlp, std::int64_t rows, const float* h,
                     const float* a, float* y, const Pool& pool) noexcept;

}  // namespace reroute
