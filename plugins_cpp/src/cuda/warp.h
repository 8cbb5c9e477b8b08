// Reductions and scans over warps and blocks. Every thread of the warp (block) calls them.
#pragma once

#include "device.h"

namespace reroute {

constexpr unsigned kMaxWarps = 32;

// Over aligned groups of `lanes` threads, a power of two; every lane gets the result.
__device__ inline float lanes_sum(float value, unsigned lanes = kWarp) {
    for (unsigned offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
    return value;
}

__device__ inline float warp_max(float value) {
    for (unsigned offset = kWarp / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
}

struct Scan {
    unsigned before;  // sum over the threads of a lower index
    unsigned total;   // sum over the block
};

// Block-wide exclusive sum. `warp_totals` is shared memory for kMaxWarps values and may be used again at once.
__device__ inline Scan block_scan(unsigned value, unsigned* warp_totals) {
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned warp = threadIdx.x / kWarp;
    unsigned inclusive = value;
    for (unsigned offset = 1; offset < kWarp; offset *= 2) {
        const unsigned left = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (lane >= offset) inclusive += left;
    }
    __syncthreads();  // readers of an earlier scan are done
    if (lane == kWarp - 1) warp_totals[warp] = inclusive;
    __syncthreads();
    Scan scan{inclusive - value, 0};
    for (unsigned other = 0; other < blockDim.x / kWarp; ++other) {
        if (other < warp) scan.before += warp_totals[other];
        scan.total += warp_totals[other];
    }
    return scan;
}

}  // namespace reroute
