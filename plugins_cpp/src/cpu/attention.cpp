// Attention: checks, the caches, and which thread does what.
#include "reroute/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "attention_kernels.h"
#include "tasks.h"

namespace reroute {
namespace {

using attention_forms::Form;
using attention_forms::Group;

bool valid(const AttentionShape& s) {
    if (s.batch < 0 || s.rows < 0 || s.groups <= 0 || s.heads <= 0 || s.size <= 0 || s.heads % s.groups != 0)
        return false;
    return s.rows <= s.valid && s.valid <= s.capacity;
}

// The new rows of one group, of which cache rows are `size` and new ones `pitch` floats apart; `past` may be `cache`.
void append(const AttentionShape& s, const float* rows, const float* past, float* cache) {
    const std::int64_t before = s.valid - s.rows, pitch = s.groups * s.size;
    const auto bytes = [](std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); };
    if (past != cache) std::memcpy(cache, past, bytes(before * s.size));
    for (std::int64_t r = 0; r < s.rows; ++r) {
        std::memcpy(cache + (before + r) * s.size, rows + r * pitch, bytes(s.size));
    }
}

// The first query of part `part` of `parts`, which see equally many rows altogether: of all A rows, the first r see
// r * before + r^2 / 2.
std::int64_t boundary(const AttentionShape& s, std::int64_t part, std::int64_t parts) {
    const double before = static_cast<double>(s.valid - s.rows), rows = static_cast<double>(s.rows);
    const double work = (2 * before + rows) * rows * static_cast<double>(part) / static_cast<double>(parts);
    const double row = std::sqrt(before * before + work) - before;
    const std::int64_t queries = s.rows * (s.heads / s.groups);
    return std::min<std::int64_t>(queries, std::llround(row * static_cast<double>(s.heads / s.groups)));
}

}  // namespace

Status attention(const AttentionShape& shape, const float* q, const float* k, const float* v, const float* past_keys,
                 const float* past_values, float* keys, float* values, float* out, const Pool& pool) noexcept try {
    if (!valid(shape)) return Status::kInvalidShape;
    if (shape.batch == 0 || shape.rows == 0) return Status::kOk;
    for (const float* one : {q, k, v, past_keys, past_values, static_cast<const float*>(keys),
                             static_cast<const float*>(values), static_cast<const float*>(out)}) {
        if (one == nullptr) return Status::kNullPointer;
    }
    const AttentionShape& s = shape;
    const Form& form = cpu::fast() ? attention_forms::kFast : attention_forms::kPortable;
    const std::int64_t heads = s.heads / s.groups, groups = s.batch * s.groups, queries = s.rows * heads;
    const auto divide = [&](std::int64_t work) { return work < cpu::kAlone ? serial_pool() : pool; };

    const std::int64_t cache = s.capacity * s.size, rows = s.rows * s.size;
    bool good = cpu::run(divide(groups * rows), groups, [&](std::int64_t index) {
        const std::int64_t from = index / s.groups * s.groups * rows + index % s.groups * s.size;
        append(s, k + from, past_keys + index * cache, keys + index * cache);
        append(s, v + from, past_values + index * cache, values + index * cache);
    });

    // As many tasks as make equal shares for all threads.
    const Pool attending = divide(s.batch * s.heads * s.rows * (2 * s.valid - s.rows) * s.size);
    const std::int64_t threads = std::max(attending.threads, 1);
    const std::int64_t parts = std::min(queries, threads / std::gcd(threads, groups));
    good = good && cpu::run(attending, groups * parts, [&](std::int64_t task) {
               const std::int64_t index = task / parts, part = task % parts;
               const std::int64_t first = boundary(s, part, parts), last = boundary(s, part + 1, parts);
               if (first == last) return;
               const std::int64_t at = index / s.groups * s.rows * s.heads * s.size + index % s.groups * heads * s.size;
               Group group{};
               group.q = q + at;
               group.out = out + at;
               group.keys = keys + index * cache;
               group.values = values + index * cache;
               group.heads = heads;
               group.size = group.key_pitch = s.size;
               group.pitch = s.heads * s.size;
               group.before = s.valid - s.rows;
               group.scale = s.scale;
               thread_local cpu::Scratch mine;
               form.attend(group, first, last, mine.take<float>(form.scratch(group.seen(last - 1), s.size)));
           });
    return good ? Status::kOk : Status::kOutOfMemory;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

}  // namespace reroute
