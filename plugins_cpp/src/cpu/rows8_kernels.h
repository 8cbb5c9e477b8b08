// What the two forms of rows8.cpp implement: the parts of a product that belong to one thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reroute/rows8.h"

namespace reroute::rows8 {

// Quantised rows: values int8 [rows, stride] in the order that a form likes, steps [rows], the sums of each 64 values
// [rows, stride / 64], and of all: what is stored as w + 128 adds 128 times that.
struct Rows {
    std::int64_t count = 0;
    std::int64_t stride = 0;  // a multiple of 64
    std::int8_t* values = nullptr;
    float* steps = nullptr;
    std::int32_t* sums = nullptr;
    std::int32_t* totals = nullptr;

    std::int64_t blocks() const { return stride / 64; }
};

struct Kernels {
    // x float [rows.count, width]. Fills values up to the stride with zeros.
    void (*quantize)(const float* x, std::int64_t width, const Rows& rows);
    // Columns of blocks first..last - 1 of y float [rows.count, pitch].
    void (*linear)(const Rows& rows, const Matrix& weight, std::int64_t first, std::int64_t last, float* y,
                   std::int64_t pitch);
    // silu(gate) * up, the same columns of both, which have equal bits.
    void (*gated)(const Rows& rows, const Matrix& gate, const Matrix& up, std::int64_t first, std::int64_t last,
                  float* y, std::int64_t pitch);
    // The norm of reroute/rows8.h: x and y float [count, width].
    void (*norm)(const float* x, std::int64_t count, std::int64_t width, const float* weight, float epsilon, float* y);
    // y += x
    void (*add)(const float* x, float* y, std::int64_t count);
};

extern const Kernels kPortable;
// For processors with AVX-512 VNNI; the portable ones where the compiler knows no such.
extern const Kernels kFast;

}  // namespace reroute::rows8
