// Products of int8 activations, with a step for each row that is found at run time, and weights of 8 or 4 bits, for the
// CPU. With 8 bits a column has one scale: the arithmetic of the form ROWS8 of engines/quantize.py, in one pass over the
// activations. With 4 bits each 64 weights of a column have one.
//
//   step(m) = max |x(m, :)| / 127            a(m, k) = round(x(m, k) / step(m))            integers -127..127
//   linear    y(m, n) = step(m) * sum over k of a(m, k) w(k, n) scale(k / 64, n)           sums of equal scale in int32
//   mlp       y = linear(silu(linear(x, gate)) * linear(x, up), down)
//
// Rows are divided among threads, not columns, as soon as there are enough: no two threads then write to one line of a
// cache, and what belongs to a row stays with its thread. A step of one row divides columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reroute/status.h"

namespace reroute {

// A matrix [K, N], in columns of 16: `values` are [ceil(N / 16)] of
//
//   8 bits    [ceil(K / 4)] of 64 bytes: byte (n % 16) * 4 + k % 4 is w(k, n) + 128; `scales` is float [N]
//   4 bits    [ceil(K / 64)] of 576 bytes: 8 times 64 bytes, of which the low halves are w(k, n) + 8 of 4 rows, in the
//             order above, and the high halves those of the next 4; then the float scales of the 16 columns
//
// K and N are filled up with zeros, which are stored as 128 or 8.
struct Matrix {
    std::int64_t rows = 0;     // K
    std::int64_t columns = 0;  // N
    int bits = 8;
    const std::uint8_t* values = nullptr;
    const float* scales = nullptr;

    std::int64_t row_blocks() const { return bits == 8 ? (rows + 3) / 4 : (rows + 63) / 64; }
    std::int64_t block_bytes() const { return bits == 8 ? 64 : 576; }
    std::int64_t column_blocks() const { return (columns + 15) / 16; }
    std::int64_t bytes() const { return row_blocks() * column_blocks() * block_bytes(); }
};

// K at which sums of products could leave int32.
constexpr std::int64_t kMaxRows8 = 65536;

// Who runs `count` calls of task(data, index), in any order and at once; returns when all are done.
struct Pool {
    void (*run)(void* context, std::size_t count, void (*task)(void* data, std::size_t index), void* data) = nullptr;
    void* context = nullptr;
    int threads = 1;
};

// One after the other, in this thread.
Pool serial_pool() noexcept;

// x float [M, K], y float [M, N].
Status linear(const Matrix& weight, std::int64_t rows, const float* x, float* y, const Pool& pool) noexcept;

// x float [M, D], y float [M, D']; gate and up [D, F], of equal bits, down [F, D'].
Status mlp(const Matrix& gate, const Matrix& up, const Matrix& down, std::int64_t rows, const float* x, float* y,
           const Pool& pool) noexcept;

// The instructions in use: "avx512_vnni" or "portable". The portable form is right and slow.
const char* rows8_instructions() noexcept;

// For tests: the portable form whatever the processor has.
void rows8_use_portable(bool portable) noexcept;

}  // namespace reroute
