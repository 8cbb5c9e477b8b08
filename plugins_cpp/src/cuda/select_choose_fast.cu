// RerouteSelect, fast, second half: the choice, one block per batch row and no sorting.
//
//   1  scores become integers of the same order; four radix passes find the K-th largest, the threshold, and how many of
//      its equals run
//   2  candidates above the threshold, and its first equals, mark their slot in a bitmap of S bits; so does `always`
//   3  the bitmap, compacted by a scan, is the ascending result: merging comes for free
#include "select_call.h"
#include "warp.h"

namespace reroute {
namespace {

constexpr unsigned kChooseThreads = 512;
constexpr unsigned kDigitBits = 8;
constexpr unsigned kDigits = 1U << kDigitBits;

// Larger float, larger key. Both zeros are one key, and NaN is below -inf.
__device__ std::uint32_t ordered_key(float score) {
    if (is_nan(score)) return 0;
    const std::uint32_t bits = score == 0.0F ? 0U : bits_of_float(score);
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

struct Threshold {
    std::uint32_t key;      // the K-th largest
    unsigned equal_wanted;  // of the candidates with this key, the first so many run
};

// `wanted` is at least 1 and at most `count`.
__device__ Threshold find_threshold(const std::uint32_t* keys, unsigned count, unsigned wanted, unsigned* warp_totals) {
    __shared__ unsigned histogram[kDigits];
    __shared__ unsigned digit;
    __shared__ unsigned still_wanted;
    std::uint32_t known = 0;  // bits of the threshold found so far, and where they are
    std::uint32_t mask = 0;
    for (unsigned shift = 32; shift > 0;) {
        shift -= kDigitBits;
        if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
        __syncthreads();
        for (unsigned n = threadIdx.x; n < count; n += blockDim.x) {
            if ((keys[n] & mask) == known) atomicAdd(&histogram[(keys[n] >> shift) % kDigits], 1U);
        }
        __syncthreads();
        // Thread t looks at digit 255 - t, so the scan counts what is above it.
        const unsigned mine = kDigits - 1 - threadIdx.x;
        const unsigned here = threadIdx.x < kDigits ? histogram[mine] : 0;
        const unsigned above = block_scan(here, warp_totals).before;
        if (above < wanted && wanted <= above + here) {
            digit = mine;
            still_wanted = wanted - above;
        }
        __syncthreads();
        known |= digit << shift;
        mask |= (kDigits - 1) << shift;
        wanted = still_wanted;
    }
    return {known, wanted};
}

struct Bitmap {
    std::uint32_t* words;
    int rows;

    // Flags of what is wrong with the slot, or 0.
    __device__ std::uint32_t mark(std::int64_t slot) const {
        if (slot < 0 || slot >= rows) return kFlagSlotOutOfRange;
        const std::uint32_t bit = 1U << (slot % 32);
        return (atomicOr(&words[slot / 32], bit) & bit) != 0 ? kFlagSlotRepeated : 0;
    }
};

// Every thread takes a run of neighbours, so that a scan over threads is a scan in order.
struct Run {
    unsigned begin;
    unsigned end;

    __device__ explicit Run(unsigned count) {
        const unsigned length = (count + blockDim.x - 1) / blockDim.x;
        begin = threadIdx.x * length < count ? threadIdx.x * length : count;
        end = begin + length < count ? begin + length : count;
    }
};

// Writes the marked rows in ascending order and returns how many they are.
__device__ unsigned write_marked(Bitmap bitmap, unsigned words, std::int64_t* slots, unsigned* warp_totals) {
    const Run run(words);
    unsigned mine = 0;
    for (unsigned w = run.begin; w < run.end; ++w) mine += static_cast<unsigned>(__popc(bitmap.words[w]));
    const Scan scan = block_scan(mine, warp_totals);
    std::int64_t* out = slots + scan.before;
    for (unsigned w = run.begin; w < run.end; ++w) {
        for (std::uint32_t word = bitmap.words[w]; word != 0; word &= word - 1) {
            *out++ = static_cast<std::int64_t>(w) * 32 + __ffs(static_cast<int>(word)) - 1;
        }
    }
    return scan.total;
}

// Shared memory: uint32 bitmap[words], then uint32 keys[N] if scores matter.
__global__ void __launch_bounds__(kChooseThreads)
    choose_block(SelectSizes s, const float* scores, const std::int64_t* candidates, const std::int64_t* always,
                 std::int64_t* slots, std::uint32_t* flags) {
    __shared__ unsigned warp_totals[kMaxWarps];
    __shared__ std::uint32_t wrong;
    const unsigned words = (static_cast<unsigned>(s.rows) + 31) / 32;
    const auto count = static_cast<unsigned>(s.candidates);
    const Bitmap bitmap{dynamic_shared<std::uint32_t>(), s.rows};
    std::uint32_t* keys = bitmap.words + words;
    const std::size_t b = blockIdx.x;
    candidates += b * s.candidates;
    always += b * s.always;
    slots += b * s.length;

    const bool ranked = s.keep < s.candidates;
    std::uint32_t mine_wrong = 0;
    if (threadIdx.x == 0) wrong = 0;
    for (unsigned w = threadIdx.x; w < words; w += blockDim.x) bitmap.words[w] = 0;
    for (unsigned n = threadIdx.x; ranked && n < count; n += blockDim.x) {
        const float score = scores[b * s.candidates + n];
        if (is_nan(score)) mine_wrong |= kFlagNotANumber;
        keys[n] = ordered_key(score);
        // What is left out is not marked, so look at its slot here.
        if (candidates[n] < 0 || candidates[n] >= s.rows) mine_wrong |= kFlagSlotOutOfRange;
    }
    __syncthreads();

    if (!ranked) {
        for (unsigned n = threadIdx.x; n < count; n += blockDim.x) mine_wrong |= bitmap.mark(candidates[n]);
    } else if (s.keep > 0) {
        const Threshold threshold = find_threshold(keys, count, static_cast<unsigned>(s.keep), warp_totals);
        const Run run(count);
        unsigned equal = 0;
        for (unsigned n = run.begin; n < run.end; ++n) equal += keys[n] == threshold.key ? 1U : 0U;
        unsigned equal_before = block_scan(equal, warp_totals).before;
        for (unsigned n = run.begin; n < run.end; ++n) {
            const bool runs =
                keys[n] > threshold.key || (keys[n] == threshold.key && equal_before++ < threshold.equal_wanted);
            if (runs) mine_wrong |= bitmap.mark(candidates[n]);
        }
    }
    for (unsigned t = threadIdx.x; t < static_cast<unsigned>(s.always); t += blockDim.x) {
        mine_wrong |= bitmap.mark(always[t]);
    }
    if (mine_wrong != 0) atomicOr(&wrong, mine_wrong);
    __syncthreads();

    const unsigned written = write_marked(bitmap, words, slots, warp_totals);
    // Places that refused slots leave open stay in range for whoever gathers by them.
    for (unsigned i = written + threadIdx.x; i < static_cast<unsigned>(s.length); i += blockDim.x) {
        slots[i] = s.rows - 1;
    }
    if (threadIdx.x == 0) flags[b] = wrong;
}

}  // namespace

Status select_choose_cuda_fast(const SelectShape& shape, const float* scores, const SelectInputs& in,
                               std::int64_t* slots, Workspace workspace, Stream stream) noexcept {
    Status status = check_choose(shape, scores, in, slots);
    if (status != Status::kOk || nothing_to_choose(shape)) return status;
    status = check_workspace(shape, workspace);
    if (status != Status::kOk) return status;
    const auto words = static_cast<std::size_t>((shape.rows + 31) / 32);
    const std::size_t keys = select_scores_matter(shape) ? static_cast<std::size_t>(shape.candidates) : 0;
    const Launch grid{static_cast<unsigned>(shape.batch), kChooseThreads, (words + keys) * sizeof(std::uint32_t),
                      stream};
    return launch(choose_block, grid, select_sizes(shape), scores, in.candidates, in.always, slots,
                  SelectWorkspace(shape, workspace.data).flags);
}

Status select_cuda_fast(const SelectShape& shape, const SelectInputs& in, std::int64_t* slots, Workspace workspace,
                        Stream stream) noexcept {
    return select_in_halves(shape, in, slots, workspace, stream, select_scores_cuda_fast, select_choose_cuda_fast);
}

}  // namespace reroute
