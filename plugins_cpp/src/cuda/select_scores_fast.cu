// RerouteSelect, fast, first half: the scores, in two launches.
//
//   tile_logits        one block per (32 rows, key head, batch row): reads every key once, with 16-byte loads, for all
//                      query heads that share it; leaves logits and, per tile, the parts of the softmax
//   score_candidates   one block per (32 candidates, batch row): joins the parts of every head, sums over heads
//
// Equal keys get bit-equal scores: the order of every sum depends on the shape alone, never on the row.
#include "select_call.h"
#include "warp.h"

namespace reroute {
namespace {

constexpr unsigned kTileThreads = 256;
constexpr int kHeadsAtOnce = 4;     // query heads that share one load of the key
constexpr unsigned kHeadParts = 8;  // warps of score_candidates: each sums a part of the heads

// Loaded as one access, or as two where floats stand against 16-bit keys.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Chunk {
    T values[kWidth];
};

template <int kWidth, typename T>
__device__ Chunk<T, kWidth> load_chunk(const T* row, int index) {
    return reinterpret_cast<const Chunk<T, kWidth>*>(row)[index];
}

// Shared memory: float query[share][head_size], then float tile[share][kTileRows].
template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads)
    tile_logits(SelectSizes s, unsigned lanes, const T* q_last, const T* keys, float* logits, SoftmaxPart* parts) {
    float* query = dynamic_shared<float>();
    float* tile = query + s.share * s.head_size;
    const std::size_t b = blockIdx.z;
    const std::size_t first_head = b * s.heads + static_cast<std::size_t>(blockIdx.y) * s.share;
    const int first_row = static_cast<int>(blockIdx.x * kTileRows);

    const T* group_query = q_last + first_head * s.head_size;
    for (int i = static_cast<int>(threadIdx.x); i < s.share * s.head_size; i += static_cast<int>(kTileThreads)) {
        query[i] = to_float(group_query[i]);
    }
    __syncthreads();

    // `lanes` threads work on one row. The loops run equally often in all of a warp, because shuffles need every lane.
    const int chunks = s.head_size / kWidth;
    const int lane = static_cast<int>(threadIdx.x % lanes);
    const int group = static_cast<int>(threadIdx.x / lanes);
    const int groups = static_cast<int>(kTileThreads / lanes);
    for (int base = 0; base < kTileRows; base += groups) {
        const int tile_row = base + group;
        const int row = first_row + tile_row;
        const bool valid = tile_row < kTileRows && row < s.rows;
        const T* key = keys + (b * s.rows + (valid ? row : 0)) * s.row_width + blockIdx.y * s.head_size;
        for (int head = 0; head < s.share; head += kHeadsAtOnce) {
            float products[kHeadsAtOnce] = {};
            for (int c = lane; valid && c < chunks; c += static_cast<int>(lanes)) {
                const auto part = load_chunk<kWidth>(key, c);
                REROUTE_UNROLL
                for (int j = 0; j < kHeadsAtOnce; ++j) {
                    if (head + j >= s.share) continue;
                    const auto q = load_chunk<kWidth>(query + (head + j) * s.head_size, c);
                    REROUTE_UNROLL
                    for (int i = 0; i < kWidth; ++i) products[j] += q.values[i] * to_float(part.values[i]);
                }
            }
            REROUTE_UNROLL
            for (int j = 0; j < kHeadsAtOnce; ++j) {
                if (head + j >= s.share) continue;
                const float product = lanes_sum(products[j], lanes);
                if (valid && lane == 0) tile[(head + j) * kTileRows + tile_row] = product * s.scale;
            }
        }
    }
    __syncthreads();

    // A warp per head, a lane per row. A row of -inf counts nothing; a NaN must survive, which fmaxf alone would lose.
    const unsigned row_lane = threadIdx.x % kWarp;
    const bool valid = first_row + static_cast<int>(row_lane) < s.rows;
    for (int head = static_cast<int>(threadIdx.x / kWarp); head < s.share; head += kTileThreads / kWarp) {
        const float logit = valid ? tile[head * kTileRows + row_lane] : -INFINITY;
        const float largest = warp_max(logit);
        const float sum = lanes_sum(logit == -INFINITY ? 0.0F : expf(logit - largest));
        const std::size_t item = first_head + head;
        logits[item * s.pitch + first_row + row_lane] = logit;
        if (row_lane == 0) parts[item * s.tiles + blockIdx.x] = {largest, sum};
    }
}

// The softmax of one head from the parts of its tiles, by one warp.
__device__ SoftmaxPart join(const SoftmaxPart* parts, int tiles) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    float largest = -INFINITY;
    for (int i = lane; i < tiles; i += kWarp) largest = fmaxf(largest, parts[i].largest);
    largest = warp_max(largest);
    float sum = 0.0F;
    for (int i = lane; i < tiles; i += kWarp) {
        // A tile of -inf alone has the sum 0, or NaN if there was one.
        sum += parts[i].largest == -INFINITY ? parts[i].sum : parts[i].sum * expf(parts[i].largest - largest);
    }
    return {largest, lanes_sum(sum)};
}

// Shared memory: SoftmaxPart joined[heads], then float partial[kHeadParts][kWarp].
__global__ void __launch_bounds__(kWarp* kHeadParts)
    score_candidates(SelectSizes s, const float* logits, const SoftmaxPart* parts, const std::int64_t* candidates,
                     float* scores) {
    auto* joined = dynamic_shared<SoftmaxPart>();
    auto* partial = reinterpret_cast<float*>(joined + s.heads);
    const std::size_t b = blockIdx.y;
    const std::size_t first_head = b * s.heads;
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned part = threadIdx.x / kWarp;
    for (int head = static_cast<int>(part); head < s.heads; head += kHeadParts) {
        const SoftmaxPart whole = join(parts + (first_head + head) * s.tiles, s.tiles);
        if (lane == 0) joined[head] = whole;
    }
    __syncthreads();

    const int n = static_cast<int>(blockIdx.x * kWarp + lane);
    const std::int64_t slot = n < s.candidates ? candidates[b * s.candidates + n] : -1;
    float sum = 0.0F;
    if (slot >= 0 && slot < s.rows) {
        for (int head = static_cast<int>(part); head < s.heads; head += kHeadParts) {
            sum += expf(logits[(first_head + head) * s.pitch + slot] - joined[head].largest) / joined[head].sum;
        }
    }
    partial[part * kWarp + lane] = sum;
    __syncthreads();
    if (part == 0 && n < s.candidates) {
        float total = 0.0F;
        for (unsigned i = 0; i < kHeadParts; ++i) total += partial[i * kWarp + lane];
        scores[b * s.candidates + n] = total / static_cast<float>(s.heads);
    }
}

template <typename T, int kWidth>
Status launch_tiles(const SelectShape& shape, const SelectInputs& in, const SelectWorkspace& w, Stream stream) {
    const SelectSizes s = select_sizes(shape);
    unsigned lanes = 1;
    while (lanes < kWarp && static_cast<int>(lanes) * kWidth < s.head_size) lanes *= 2;
    const std::size_t shared = sizeof(float) * static_cast<std::size_t>(s.share) * (s.head_size + kTileRows);
    const dim3 grid(static_cast<unsigned>(s.tiles), static_cast<unsigned>(shape.kv_heads),
                    static_cast<unsigned>(shape.batch));
    return launch(tile_logits<T, kWidth>, {grid, kTileThreads, shared, stream}, s, lanes,
                  static_cast<const T*>(in.q_last), static_cast<const T*>(in.keys), w.logits, w.parts);
}

template <typename T>
Status score(const SelectShape& shape, const SelectInputs& in, float* scores, Workspace workspace, Stream stream) {
    constexpr int kWidth = 16 / sizeof(T);
    const SelectWorkspace w(shape, workspace.data);
    const bool aligned = reinterpret_cast<std::uintptr_t>(in.keys) % 16 == 0 && shape.head_size % kWidth == 0;
    const Status status =
        aligned ? launch_tiles<T, kWidth>(shape, in, w, stream) : launch_tiles<T, 1>(shape, in, w, stream);
    if (status != Status::kOk) return status;
    const SelectSizes s = select_sizes(shape);
    const std::size_t shared = sizeof(SoftmaxPart) * s.heads + sizeof(float) * kHeadParts * kWarp;
    const dim3 grid(blocks_for(s.candidates, kWarp), static_cast<unsigned>(shape.batch));
    return launch(score_candidates, {grid, kWarp * kHeadParts, shared, stream}, s, w.logits, w.parts, in.candidates,
                  scores);
}

}  // namespace

Status select_scores_cuda_fast(const SelectShape& shape, const SelectInputs& in, float* scores, Workspace workspace,
                               Stream stream) noexcept {
    Status status = check_scores(shape, in, scores);
    if (status != Status::kOk || nothing_to_score(shape)) return status;
    status = check_workspace(shape, workspace);
    if (status != Status::kOk) return status;
    switch (shape.dtype) {
        case DType::kFloat32:
            return score<float>(shape, in, scores, workspace, stream);
        case DType::kFloat16:
            return score<Half>(shape, in, scores, workspace, stream);
        case DType::kBFloat16:
            return score<BFloat16>(shape, in, scores, workspace, stream);
    }
    return Status::kInvalidShape;
}

}  // namespace reroute
