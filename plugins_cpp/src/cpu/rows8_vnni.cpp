// Products of int8 rows with AVX-512 VNNI. vpdpbusd multiplies unsigned by signed bytes; the unsigned ones are the
// weights, in a register, so that four bytes of an activation can be broadcast from memory by the instruction itself.
#include "rows8_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx512.h"

namespace reroute::rows8 {
namespace {

using cpu::exponential;
using cpu::lanes;

constexpr int kTile = 12;  // rows of a tile: with two blocks of columns, 24 of 32 registers are sums

// Rows are quantised into groups, one for each tile: values[k / 4][row of the group][k % 4], so that a tile reads one
// stream. A group of rows `from` and on begins where these rows would begin one after the other.
struct Groups {
    std::int64_t rows, count;
    explicit Groups(std::int64_t all) : rows(all), count((all + kTile - 1) / kTile) {}
    std::int64_t from(std::int64_t group) const { return rows * group / count; }
};

REROUTE_AVX512 inline __m512i four(const std::int8_t* a) {
    std::int32_t word;
    std::memcpy(&word, a, sizeof word);
    return _mm512_set1_epi32(word);
}

// Sums of `R` rows with two blocks of columns. A function of its own: inlined, GCC 12 keeps the sums in memory.
template <int R>
REROUTE_AVX512 __attribute__((noinline)) void tile(const std::int8_t* a, std::int64_t blocks, const std::uint8_t* left,
                                                   const std::uint8_t* right, __m512i (&l)[R], __m512i (&r)[R]) {
    __m512i x[R], y[R];  // of this function alone: they stay in registers
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) x[i] = y[i] = _mm512_setzero_si512();
    // Bytes fetched ahead: many rows wait for the next cache only, a single one for memory, over the end of a page.
    constexpr std::int64_t ahead = R == 1 ? 2048 : 512;
#pragma GCC unroll 2
    for (std::int64_t k = 0; k < blocks; ++k, a += R * 4) {
        const __m512i wl = _mm512_loadu_si512(left + k * 64), wr = _mm512_loadu_si512(right + k * 64);
        _mm_prefetch(reinterpret_cast<const char*>(left + k * 64 + ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(right + k * 64 + ahead), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const __m512i word = four(a + i * 4);
            x[i] = _mm512_dpbusd_epi32(x[i], wl, word);
            y[i] = _mm512_dpbusd_epi32(y[i], wr, word);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) l[i] = x[i], r[i] = y[i];
}

// Of one row: what was summed, as float, without what 128 at each weight added.
REROUTE_AVX512 inline __m512 exact(__m512i sum, std::int32_t total) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(128 * total)));
}

// The products of `R` rows of a group with a block of columns of `left` and one of `right`, in float.
template <int R>
REROUTE_AVX512 inline void products8(const Rows& rows, std::int64_t from, const Matrix& left, std::int64_t left_block,
                                     const Matrix& right, std::int64_t right_block, __m512 (&l)[R], __m512 (&r)[R]) {
    __m512i x[R], y[R];
    const std::int64_t blocks = left.row_blocks();
    const std::uint8_t *wl = left.block(left_block), *wr = right.block(right_block);
    tile<R>(rows.values + from * rows.stride, blocks, wl, wr, x, y);
    const __m512 sl = _mm512_loadu_ps(wl + blocks * 64), sr = _mm512_loadu_ps(wr + blocks * 64);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
        const std::int32_t total = rows.totals[from + i];
        const __m512 step = _mm512_set1_ps(rows.steps[from + i]);
        l[i] = _mm512_mul_ps(exact(x[i], total), _mm512_mul_ps(sl, step));
        r[i] = _mm512_mul_ps(exact(y[i], total), _mm512_mul_ps(sr, step));
    }
}

// The same of 4 bits. A group may have more rows than there are registers for: `Part` of them at a time.
template <int R, int Part>
REROUTE_AVX512 inline void part4(const Rows& rows, std::int64_t from, int begin, const Matrix& left,
                                 std::int64_t left_block, const Matrix& right, std::int64_t right_block, __m512* l,
                                 __m512* r) {
    constexpr std::int64_t ahead = R == 1 ? 2304 : 576;
    const std::int64_t blocks = left.row_blocks();
    const std::uint8_t *wl = left.block(left_block), *wr = right.block(right_block);
    const std::int8_t* a = rows.values + from * rows.stride + begin * 4;
    const std::int32_t* sums = rows.sums + (from + begin) * rows.blocks();
    const __m512i low = _mm512_set1_epi8(15);
    __m512 fl[Part], fr[Part];
#pragma GCC unroll 12
    for (int i = 0; i < Part; ++i) fl[i] = fr[i] = _mm512_setzero_ps();
    for (std::int64_t b = 0; b < blocks; ++b, wl += 576, wr += 576) {
        __m512i x[Part], y[Part];
#pragma GCC unroll 12
        for (int i = 0; i < Part; ++i) x[i] = y[i] = _mm512_set1_epi32(-8 * sums[i * rows.blocks() + b]);
        for (int pair = 0; pair < 8; ++pair, a += R * 8) {
            const __m512i bl = _mm512_loadu_si512(wl + pair * 64), br = _mm512_loadu_si512(wr + pair * 64);
            _mm_prefetch(reinterpret_cast<const char*>(wl + pair * 64 + ahead), _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(wr + pair * 64 + ahead), _MM_HINT_T0);
            const __m512i l0 = _mm512_and_si512(bl, low), l1 = _mm512_and_si512(_mm512_srli_epi16(bl, 4), low);
            const __m512i r0 = _mm512_and_si512(br, low), r1 = _mm512_and_si512(_mm512_srli_epi16(br, 4), low);
#pragma GCC unroll 12
            for (int i = 0; i < Part; ++i) {
                const __m512i first = four(a + i * 4), second = four(a + R * 4 + i * 4);
                x[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(x[i], l0, first), l1, second);
                y[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(y[i], r0, first), r1, second);
            }
        }
        const __m512 sl = _mm512_loadu_ps(wl + 512), sr = _mm512_loadu_ps(wr + 512);
#pragma GCC unroll 12
        for (int i = 0; i < Part; ++i) {
            fl[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x[i]), sl, fl[i]);
            fr[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(y[i]), sr, fr[i]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < Part; ++i) {
        const __m512 step = _mm512_set1_ps(rows.steps[from + begin + i]);
        l[begin + i] = _mm512_mul_ps(fl[i], step);
        r[begin + i] = _mm512_mul_ps(fr[i], step);
    }
}

template <int R>
REROUTE_AVX512 inline void products4(const Rows& rows, std::int64_t from, const Matrix& left, std::int64_t left_block,
                                     const Matrix& right, std::int64_t right_block, __m512 (&l)[R], __m512 (&r)[R]) {
    constexpr int half = (R + 1) / 2;
    if constexpr (R <= 6) {
        part4<R, R>(rows, from, 0, left, left_block, right, right_block, l, r);
    } else {
        part4<R, half>(rows, from, 0, left, left_block, right, right_block, l, r);
        part4<R, R - half>(rows, from, half, left, left_block, right, right_block, l, r);
    }
}

REROUTE_AVX512 inline __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    return _mm512_div_ps(x, below);
}

REROUTE_AVX512 void quantize(const float* x, std::int64_t width, const Rows& rows) {
    const Groups groups(rows.count);
    for (std::int64_t group = 0; group < groups.count; ++group) {
        const std::int64_t from = groups.from(group), size = groups.from(group + 1) - from;
        for (std::int64_t m = from; m < from + size; ++m) {
            const float* row = x + m * width;
            __m512 most = _mm512_set1_ps(1e-30f);
            for (std::int64_t k = 0; k < width; k += 16) {
                most = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(width - k), row + k)), most);
            }
            const float largest = _mm512_reduce_max_ps(most);
            const __m512 inverse = _mm512_set1_ps(127.0f / largest);
            std::int8_t* a = rows.values + from * rows.stride + (m - from) * 4;
            rows.totals[m] = 0;
            for (std::int64_t block = 0; block < rows.blocks(); ++block) {
                __m512i total = _mm512_setzero_si512();
                for (std::int64_t k = block * 64; k < block * 64 + 64; k += 16) {
                    const __m512 part = _mm512_maskz_loadu_ps(lanes(width - k), row + k);
                    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(part, inverse));
                    whole = _mm512_max_epi32(_mm512_min_epi32(whole, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
                    total = _mm512_add_epi32(total, whole);
                    alignas(16) std::int32_t words[4];
                    _mm_store_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(whole));
                    for (int i = 0; i < 4; ++i) std::memcpy(a + (k / 4 + i) * size * 4, words + i, 4);
                }
                const std::int32_t sum = _mm512_reduce_add_epi32(total);
                rows.sums[m * rows.blocks() + block] = sum;
                rows.totals[m] += sum;
            }
            rows.steps[m] = largest / 127.0f;
        }
    }
}

template <int R, int Bits>
REROUTE_AVX512 inline void products(const Rows& rows, std::int64_t from, const Matrix& left, std::int64_t left_block,
                                    const Matrix& right, std::int64_t right_block, __m512 (&l)[R], __m512 (&r)[R]) {
    if constexpr (Bits == 8) {
        products8<R>(rows, from, left, left_block, right, right_block, l, r);
    } else {
        products4<R>(rows, from, left, left_block, right, right_block, l, r);
    }
}

// Two blocks of columns of R rows from `from` on.
template <int R, int Bits>
struct Linear {
    REROUTE_AVX512 static void run(std::int64_t from, const Rows& rows, const Matrix& weight, std::int64_t block,
                                   bool two, float* y, std::int64_t pitch) {
        __m512 l[R], r[R];
        const std::int64_t second = two ? block + 1 : block;
        products<R, Bits>(rows, from, weight, block, weight, second, l, r);
        const __mmask16 left = lanes(weight.columns, block);
        const __mmask16 right = two ? lanes(weight.columns, second) : __mmask16(0);
        for (int i = 0; i < R; ++i) {
            float* out = y + (from + i) * pitch;
            _mm512_mask_storeu_ps(out + block * 16, left, l[i]);
            _mm512_mask_storeu_ps(out + second * 16, right, r[i]);
        }
    }
};

// A block of columns of silu(gate) * up.
template <int R, int Bits>
struct Gated {
    REROUTE_AVX512 static void run(std::int64_t from, const Rows& rows, const Matrix& gate, const Matrix& up,
                                   std::int64_t block, float* y, std::int64_t pitch) {
        __m512 l[R], r[R];
        products<R, Bits>(rows, from, gate, block, up, block, l, r);
        const __mmask16 mask = lanes(gate.columns, block);
        for (int i = 0; i < R; ++i) {
            _mm512_mask_storeu_ps(y + (from + i) * pitch + block * 16, mask, _mm512_mul_ps(silu(l[i]), r[i]));
        }
    }
};

// Calls Run<R, Bits>::run(from) for a group of `size` rows.
template <template <int, int> class Run, int Bits, int R = kTile, typename... Arguments>
REROUTE_AVX512 inline void group(int size, std::int64_t from, const Arguments&... arguments) {
    if constexpr (R > 0) {
        if (size == R) {
            Run<R, Bits>::run(from, arguments...);
        } else {
            group<Run, Bits, R - 1>(size, from, arguments...);
        }
    }
}

template <template <int, int> class Run, typename... Arguments>
REROUTE_AVX512 inline void each_group(int bits, std::int64_t rows, const Arguments&... arguments) {
    const Groups groups(rows);
    for (std::int64_t i = 0; i < groups.count; ++i) {
        const std::int64_t from = groups.from(i);
        const int size = static_cast<int>(groups.from(i + 1) - from);
        if (bits == 8) {
            group<Run, 8>(size, from, arguments...);
        } else {
            group<Run, 4>(size, from, arguments...);
        }
    }
}

REROUTE_AVX512 void linear(const Rows& rows, const Matrix& weight, std::int64_t first, std::int64_t last, float* y,
                           std::int64_t pitch) {
    for (std::int64_t block = first; block < last; block += 2) {
        each_group<Linear>(weight.bits, rows.count, rows, weight, block, block + 1 < last, y, pitch);
    }
}

REROUTE_AVX512 void gated(const Rows& rows, const Matrix& gate, const Matrix& up, std::int64_t first, std::int64_t last,
                          float* y, std::int64_t pitch) {
    for (std::int64_t block = first; block < last; ++block) {
        each_group<Gated>(gate.bits, rows.count, rows, gate, up, block, y, pitch);
    }
}

REROUTE_AVX512 void norm(const float* x, std::int64_t count, std::int64_t width, const float* weight, float epsilon,
                         float* y) {
    for (std::int64_t m = 0; m < count; ++m, x += width, y += width) {
        __m512 squares = _mm512_setzero_ps();
        for (std::int64_t k = 0; k < width; k += 16) {
            const __m512 part = _mm512_maskz_loadu_ps(lanes(width - k), x + k);
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
        for (std::int64_t k = 0; k < width; k += 16) {
            const __mmask16 mask = lanes(width - k);
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), factor);
            _mm512_mask_storeu_ps(y + k, mask, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, weight + k)));
        }
    }
}

REROUTE_AVX512 void add(const float* x, float* y, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lanes(count - i);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_maskz_loadu_ps(mask, y + i));
        _mm512_mask_storeu_ps(y + i, mask, sum);
    }
}

}  // namespace

const Kernels kFast{quantize, linear, gated, norm, add};

}  // namespace reroute::rows8
#else
namespace reroute::rows8 {
const Kernels kFast = kPortable;
}  // namespace reroute::rows8
#endif
