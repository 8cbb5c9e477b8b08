// What the two forms of attention.cpp implement: the queries of one group of heads that belong to one thread.
#pragma once

#include <cstdint>

namespace reroute::attention_forms {

// The heads that share keys and values. Query i is row i / heads of head i % heads.
struct Group {
    const float* q;       // of the first head; heads one after the other, rows at `pitch` floats
    float* out;           // likewise
    const float* keys;    // [before + rows, size], rows at `key_pitch` floats
    const float* values;  // [before + rows, size]
    std::int64_t heads, size, pitch, key_pitch, before;
    float scale;

    // Rows of keys that query i sees, which are the first ones.
    std::int64_t seen(std::int64_t i) const { return before + i / heads + 1; }
    // Where query i begins in q, and its result in out.
    std::int64_t place(std::int64_t i) const { return i / heads * pitch + i % heads * size; }
};

struct Form {
    // Floats of scratch memory for queries of which the last sees `seen` rows of `size`.
    std::int64_t (*scratch)(std::int64_t seen, std::int64_t size);
    // Queries first..last - 1.
    void (*attend)(const Group& group, std::int64_t first, std::int64_t last, float* scratch);
    // Adds to `sums`, of each row that it sees, the probabilities that the heads of the first row give to it.
    void (*rank)(const Group& group, float* sums, float* scratch);
};

extern const Form kPortable;
// For processors with AVX-512; the portable form where the compiler knows no such.
extern const Form kFast;

}  // namespace reroute::attention_forms
