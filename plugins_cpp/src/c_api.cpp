#include "reroute/c_api.h"

#include <new>

#include "reroute/rows.h"
#include "reroute/select.h"

namespace {

reroute::SelectShape from_c(const reroute_select_shape& c) {
    return {c.batch,    c.rows,      c.candidates, c.always, c.heads,
            c.kv_heads, c.head_size, c.keep,       c.scale,  static_cast<reroute::DType>(c.dtype)};
}

reroute::RowsShape from_c(const reroute_rows_shape& c) { return {c.batch, c.rows, c.picked, c.row_bytes}; }

// Runs body(shape) and turns what must not cross a C boundary into a code.
template <typename Shape, typename Body>
std::int32_t guarded(const Shape* shape, Body body) {
    if (shape == nullptr) return static_cast<std::int32_t>(reroute::Status::kNullPointer);
    try {
        return static_cast<std::int32_t>(body(from_c(*shape)));
    } catch (const std::bad_alloc&) {
        return static_cast<std::int32_t>(reroute::Status::kOutOfMemory);
    }
}

}  // namespace

const char* reroute_describe(int32_t status) { return reroute::describe(static_cast<reroute::Status>(status)); }

int32_t reroute_select_scores(const reroute_select_shape* shape, const void* q_last, const void* keys,
                              const int64_t* candidates, float* scores) {
    return guarded(shape, [=](const reroute::SelectShape& s) {
        return reroute::select_scores_cpu(s, {q_last, keys, candidates, nullptr}, scores);
    });
}

int32_t reroute_select_choose(const reroute_select_shape* shape, const float* scores, const int64_t* candidates,
                              const int64_t* always, int64_t* slots) {
    return guarded(shape, [=](const reroute::SelectShape& s) {
        return reroute::select_choose_cpu(s, scores, {nullptr, nullptr, candidates, always}, slots);
    });
}

int32_t reroute_select(const reroute_select_shape* shape, const void* q_last, const void* keys,
                       const int64_t* candidates, const int64_t* always, int64_t* slots) {
    return guarded(shape, [=](const reroute::SelectShape& s) {
        return reroute::select_cpu(s, {q_last, keys, candidates, always}, slots);
    });
}

int32_t reroute_gather(const reroute_rows_shape* shape, const void* full, const int64_t* slots, void* picked) {
    return guarded(shape, [=](const reroute::RowsShape& s) { return reroute::gather_cpu(s, full, slots, picked); });
}

int32_t reroute_scatter(const reroute_rows_shape* shape, const void* full, const int64_t* slots, const void* picked,
                        void* updated) {
    return guarded(shape,
                   [=](const reroute::RowsShape& s) { return reroute::scatter_cpu(s, full, slots, picked, updated); });
}
