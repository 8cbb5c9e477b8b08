/* The CPU reference behind a C ABI, for ctypes and the like. Contracts: reroute/select.h and reroute/rows.h.
 * Every function returns a reroute::Status as int32; 0 is success. */
#ifndef REROUTE_C_API_H_
#define REROUTE_C_API_H_

#include <stdint.h>

#if defined(__GNUC__)
#define REROUTE_API __attribute__((visibility("default")))
#else
#define REROUTE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct reroute_select_shape {
    int64_t batch, rows, candidates, always, heads, kv_heads, head_size, keep;
    float scale;
    int32_t dtype; /* reroute::DType */
} reroute_select_shape;

typedef struct reroute_rows_shape {
    int64_t batch, rows, picked, row_bytes;
} reroute_rows_shape;

REROUTE_API const char* reroute_describe(int32_t status);

REROUTE_API int32_t reroute_select_scores(const reroute_select_shape* shape, const void* q_last, const void* keys,
                                          const int64_t* candidates, float* scores);
REROUTE_API int32_t reroute_select_choose(const reroute_select_shape* shape, const float* scores,
                                          const int64_t* candidates, const int64_t* always, int64_t* slots);
REROUTE_API int32_t reroute_select(const reroute_select_shape* shape, const void* q_last, const void* keys,
                                   const int64_t* candidates, const int64_t* always, int64_t* slots);
REROUTE_API int32_t reroute_gather(const reroute_rows_shape* shape, const void* full, const int64_t* slots,
                                   void* picked);
REROUTE_API int32_t reroute_scatter(const reroute_rows_shape* shape, const void* full, const int64_t* slots,
                                    const void* picked, void* updated);

#ifdef __cplusplus
}
#endif

#endif /* REROUTE_C_API_H_ */
