// How the CUDA implementations of RerouteSelect cut up their workspace.
#pragma once

#include "reroute/select.h"

namespace reroute {

// Rows of one block of the fast scoring pass. One warp then reduces a tile with a lane per row.
constexpr std::int64_t kTileRows = 32;

// The largest logit of a tile and the sum of exp(logit - largest): softmax in pieces (arXiv 1805.02867).
struct alignas(8) SoftmaxPart {
    float largest;
    float sum;
};

struct SelectWorkspace {
    std::uint32_t* flags;  // [B], first, so that a caller finds it
    float* scores;         // [B, N]
    std::int32_t* chosen;  // [B, N], simple only
    float* logits;         // [B, H, padded rows]
    SoftmaxPart* parts;    // [B, H, tiles]; the simple version uses the first tile for the whole row
    std::int64_t tiles;    // per row of logits
    std::int64_t pitch;    // padded rows
    std::size_t bytes;

    SelectWorkspace(const SelectShape& shape, void* base) noexcept
        : tiles((shape.rows + kTileRows - 1) / kTileRows), pitch(tiles * kTileRows), bytes(0) {
        const std::int64_t batch = shape.batch;
        flags = take<std::uint32_t>(base, batch);
        scores = take<float>(base, batch * shape.candidates);
        chosen = take<std::int32_t>(base, batch * shape.candidates);
        logits = take<float>(base, batch * shape.heads * pitch);
        parts = take<SoftmaxPart>(base, batch * shape.heads * tiles);
    }

  private:
    template <typename T>
    T* take(void* base, std::int64_t count) noexcept {
        constexpr std::size_t kAlignment = 256;
        const std::size_t offset = bytes;
        bytes += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return base == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<unsigned char*>(base) + offset);
    }
};

}  // namespace reroute
