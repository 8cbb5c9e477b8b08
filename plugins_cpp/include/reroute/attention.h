// Attention of the new rows of a step over a cache, in float32, for the CPU: what the op RerouteAttention of export/ops.py
// says (grouped queries, causal from the lower right), with nothing computed of what the causal mask hides.
//
//   keys, values   rows before..valid - 1 of every group become k and v; before = valid - rows
//   out(r, h)      = sum over j <= before + r of softmax(scale q(r, h) . keys(j)) values(j)
#pragma once

#include <cstdint>

#include "reroute/pool.h"
#include "reroute/status.h"

namespace reroute {

// B dialogues, A new rows, H query heads over G key heads of d numbers, caches of C rows.
struct AttentionShape {
    std::int64_t batch = 1;     // B
    std::int64_t rows = 0;      // A
    std::int64_t heads = 0;     // H, a multiple of G
    std::int64_t groups = 0;    // G
    std::int64_t size = 0;      // d
    std::int64_t capacity = 0;  // C
    std::int64_t valid = 0;     // rows of a cache in use after the step, A..C
    float scale = 1;
};

// q and out float [B, A, H * d]; k and v [B, A, G * d]; caches [B, G, C, d]. keys and values may be the past ones;
// otherwise their valid rows are copied. Rows past the valid ones are neither read nor written.
Status attention(const AttentionShape& shape, const float* q, const float* k, const float* v, const float* past_keys,
                 const float* past_values, float* keys, float* values, float* out, const Pool& pool) noexcept;

}  // namespace reroute
