// fp16 and bf16 as bit patterns that convert to float the same way on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define REROUTE_HOST_DEVICE __host__ __device__
#else
#define REROUTE_HOST_DEVICE
#endif

namespace reroute {

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

REROUTE_HOST_DEVICE inline float float_of_bits(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

REROUTE_HOST_DEVICE inline std::uint32_t bits_of_float(float value) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

REROUTE_HOST_DEVICE inline float to_float(float value) { return value; }

REROUTE_HOST_DEVICE inline float to_float(BFloat16 value) { return float_of_bits(std::uint32_t{value.bits} << 16); }

REROUTE_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(value.bits));
#else
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
    const std::uint32_t mantissa = value.bits & 0x3FFu;
    if (exponent == 0x1F) return float_of_bits(sign | 0x7F800000u | (mantissa << 13));
    if (exponent != 0) return float_of_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal or zero
    return sign != 0 ? -magnitude : magnitude;
#endif
}

// Round to nearest, ties to even. For hosts: tests and tools make their inputs with it.
inline BFloat16 to_bfloat16(float value) {
    const std::uint32_t bits = bits_of_float(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

inline Half to_half(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    std::uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {
        half = 0x7C00u;  // 65520 and up round to infinity
    } else if (magnitude < 0x38800000u) {
        // Below the smallest normal: adding 0.5 makes the float unit round at 2^-24, which is what half stores.
        half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace reroute
