// Attention with AVX-512: scores and weighted values are products of small tiles, whose operands stay in a core's first
// cache. A panel of queries goes over all its keys, then over all its values, so that a softmax sees a whole row of scores
// and nothing is rescaled.
#include "attention_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <algorithm>
#include <utility>

#include "avx512.h"

namespace reroute::attention_forms {
namespace {

using cpu::exponential;
using cpu::lanes;

constexpr int kRows = 6, kVectors = 4;         // of a tile: 24 of 32 registers are sums
constexpr std::int64_t kPanel = 4 * kRows;     // queries
constexpr std::int64_t kKeys = kVectors * 16;  // of a block: a tile's width

// c(i, :) = or += sum over k < n of a(i, k) b(k, :) for R rows and V vectors of 16, of the last one only `last`.
template <int R, int V>
REROUTE_AVX512 __attribute__((noinline)) void tile(const float* const* a, std::int64_t n, const float* b,
                                                   std::int64_t pitch, __mmask16 last, float* const* c, bool add) {
    __m512 sum[R][V];
    const float* row[R];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
        row[i] = a[i];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __mmask16 mask = !add ? __mmask16(0) : v == V - 1 ? last : __mmask16(0xffff);
            sum[i][v] = _mm512_maskz_loadu_ps(mask, c[i] + v * 16);
        }
    }
    for (std::int64_t k = 0; k < n; ++k, b += pitch) {
        __m512 w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = _mm512_maskz_loadu_ps(v == V - 1 ? last : __mmask16(0xffff), b + v * 16);
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) {
            const __m512 x = _mm512_set1_ps(row[i][k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] = _mm512_fmadd_ps(x, w[v], sum[i][v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            _mm512_mask_storeu_ps(c[i] + v * 16, v == V - 1 ? last : __mmask16(0xffff), sum[i][v]);
        }
    }
}

using Tile = void (*)(const float* const*, std::int64_t, const float*, std::int64_t, __mmask16, float* const*, bool);
template <int R>
constexpr Tile kWide[kVectors] = {tile<R, 1>, tile<R, 2>, tile<R, 3>, tile<R, 4>};
constexpr const Tile* kTiles[kRows] = {kWide<1>, kWide<2>, kWide<3>, kWide<4>, kWide<5>, kWide<6>};

// Columns of 16 rows as rows.
REROUTE_AVX512 inline void transpose(__m512 (&x)[16]) {
    __m512 y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(y[i + j]), high = _mm512_castps_pd(y[i + j + 2]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    // x[4 g + c] has, in its quarter q, column 4 q + c of rows 4 g..4 g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512 even = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88),
                     odd = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
        y[c] = _mm512_shuffle_f32x4(even, even2, 0x88);
        y[8 + c] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        y[4 + c] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        y[12 + c] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// The first `count` keys as blocks [size, kKeys], the last one filled up with zeros.
REROUTE_AVX512 void pack(const Group& group, std::int64_t count, float* packed) {
    const std::int64_t size = group.size;
    for (std::int64_t j = 0; j < (count + kKeys - 1) / kKeys * kKeys; j += 16) {
        float* block = packed + j / kKeys * size * kKeys + j % kKeys;
        for (std::int64_t c = 0; c < size; c += 16) {
            __m512 x[16];
            const __mmask16 mask = lanes(size - c);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const bool there = j + i < count;
                x[i] = _mm512_maskz_loadu_ps(there ? mask : __mmask16(0),
                                             group.keys + (there ? (j + i) * group.key_pitch + c : 0));
            }
            transpose(x);
            const int columns = static_cast<int>(std::min<std::int64_t>(16, size - c));
            for (int i = 0; i < columns; ++i) _mm512_storeu_ps(block + (c + i) * kKeys, x[i]);
        }
    }
}

// exp(scale * (x - max)) of the first `own` scores, zeros up to `all`; returns their sum.
REROUTE_AVX512 float soften(float* scores, std::int64_t own, std::int64_t all, float scale) {
    const __m512 lowest = _mm512_set1_ps(-3.4e38f), factor = _mm512_set1_ps(scale);
    __m512 most = lowest, total = _mm512_setzero_ps();
    for (std::int64_t j = 0; j < own; j += 16) {
        const __mmask16 mask = lanes(own - j);
        const __m512 scaled = _mm512_maskz_mul_ps(mask, _mm512_maskz_loadu_ps(mask, scores + j), factor);
        _mm512_mask_storeu_ps(scores + j, mask, scaled);
        most = _mm512_mask_max_ps(most, mask, most, scaled);
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (std::int64_t j = 0; j < all; j += 16) {
        const __mmask16 mask = lanes(own - j);
        const __m512 odds = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + j), largest));
        const __m512 part = _mm512_maskz_mov_ps(mask, odds);
        total = _mm512_add_ps(total, part);
        _mm512_mask_storeu_ps(scores + j, lanes(all - j), part);
    }
    return _mm512_reduce_add_ps(total);
}

// Queries that run through a tile together.
struct Span {
    std::int64_t from;  // in the panel
    int count;
    std::int64_t seen;  // rows that the last of them sees
};

// Queries that go over the keys together, in spans of equal size.
struct Panel {
    std::int64_t first, queries, count;
    Span spans[kPanel / kRows];

    Panel(const Group& group, std::int64_t begin, std::int64_t last)
        : first(begin), queries(std::min(kPanel, last - begin)), count((queries + kRows - 1) / kRows) {
        for (std::int64_t s = 0; s < count; ++s) {
            const std::int64_t from = queries * s / count, to = queries * (s + 1) / count;
            spans[s] = {from, static_cast<int>(to - from), group.seen(first + to - 1)};
        }
    }
};

// exp(x - max) of the scores of a panel with packed keys, [queries, wide], zeros behind what a query sees as far as its
// span does; and the sum of each.
REROUTE_AVX512 void odds(const Group& group, const Panel& panel, const float* packed, std::int64_t wide, float* scores,
                         float* totals) {
    const float* a[kRows];
    float* c[kRows];
    for (std::int64_t block = 0; block < wide; block += kKeys) {
        for (std::int64_t s = 0; s < panel.count; ++s) {
            const Span& span = panel.spans[s];
            const std::int64_t vectors = (std::min(span.seen - block, kKeys) + 15) / 16;
            if (vectors <= 0) continue;
            for (int i = 0; i < span.count; ++i) {
                a[i] = group.q + group.place(panel.first + span.from + i);
                c[i] = scores + (span.from + i) * wide + block;
            }
            const float* keys = packed + block * group.size;
            kTiles[span.count - 1][vectors - 1](a, group.size, keys, kKeys, __mmask16(0xffff), c, false);
        }
    }
    for (std::int64_t s = 0; s < panel.count; ++s) {
        const Span& span = panel.spans[s];
        for (std::int64_t i = span.from; i < span.from + span.count; ++i) {
            totals[i] = soften(scores + i * wide, group.seen(panel.first + i), span.seen, group.scale);
        }
    }
}

std::int64_t width(std::int64_t seen) { return (seen + kKeys - 1) / kKeys * kKeys; }

REROUTE_AVX512 void attend(const Group& group, std::int64_t first, std::int64_t last, float* scratch) {
    const std::int64_t size = group.size, wide = width(group.seen(last - 1));
    float* const scores = scratch + size * wide;  // [kPanel, wide]
    pack(group, group.seen(last - 1), scratch);
    for (std::int64_t begin = first; begin < last; begin += kPanel) {
        const Panel panel(group, begin, last);
        float totals[kPanel];
        odds(group, panel, scratch, wide, scores, totals);
        const float* a[kRows];
        float* c[kRows];
        for (std::int64_t column = 0; column < size; column += kKeys) {
            const std::int64_t vectors = (std::min(size - column, kKeys) + 15) / 16;
            const __mmask16 mask = lanes(size - column, vectors - 1);
            for (std::int64_t block = 0; block < wide; block += kKeys) {
                for (std::int64_t s = 0; s < panel.count; ++s) {
                    const Span& span = panel.spans[s];
                    const std::int64_t keys = std::min(span.seen - block, kKeys);
                    if (keys <= 0) continue;
                    for (int i = 0; i < span.count; ++i) {
                        a[i] = scores + (span.from + i) * wide + block;
                        c[i] = group.out + group.place(begin + span.from + i) + column;
                    }
                    const float* values = group.values + block * size + column;
                    kTiles[span.count - 1][vectors - 1](a, keys, values, size, mask, c, block > 0);
                }
            }
        }
        for (std::int64_t i = 0; i < panel.queries; ++i) {
            float* out = group.out + group.place(begin + i);
            const __m512 share = _mm512_set1_ps(1.0f / totals[i]);
            for (std::int64_t column = 0; column < size; column += 16) {
                const __mmask16 mask = lanes(size - column);
                const __m512 sum = _mm512_maskz_loadu_ps(mask, out + column);
                _mm512_mask_storeu_ps(out + column, mask, _mm512_mul_ps(sum, share));
            }
        }
    }
}

REROUTE_AVX512 void rank(const Group& group, float* sums, float* scratch) {
    const std::int64_t seen = group.seen(0), wide = width(seen);
    float* const scores = scratch + group.size * wide;
    pack(group, seen, scratch);
    for (std::int64_t begin = 0; begin < group.heads; begin += kPanel) {
        const Panel panel(group, begin, group.heads);
        float totals[kPanel];
        odds(group, panel, scratch, wide, scores, totals);
        for (std::int64_t i = 0; i < panel.queries; ++i) {
            const __m512 share = _mm512_set1_ps(1.0f / totals[i]);
            for (std::int64_t j = 0; j < seen; j += 16) {
                const __mmask16 mask = lanes(seen - j);
                const __m512 part = _mm512_maskz_loadu_ps(mask, scores + i * wide + j);
                const __m512 sum = _mm512_maskz_loadu_ps(mask, sums + j);
                _mm512_mask_storeu_ps(sums + j, mask, _mm512_fmadd_ps(part, share, sum));
            }
        }
    }
}

std::int64_t scratch(std::int64_t seen, std::int64_t size) { return width(seen) * (size + kPanel); }

}  // namespace

const Form kFast{scratch, attend, rank};

}  // namespace reroute::attention_forms
#else
namespace reroute::attention_forms {
const Form kFast = kPortable;
}  // namespace reroute::attention_forms
#endif
