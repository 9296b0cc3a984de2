// Storage types as tags for overloading, and their conversions one element at a time: the fallback
// of instruction sets without them, and the definition the vector versions must match bit for bit.
#pragma once
#include <cstdint>
#include <cstring>

// For the vector vocabulary and the bodies of hot loops: called out of line, they would load their
// constants anew every time.
#define FM_INLINE __attribute__((always_inline)) inline

namespace fastmerge {

struct F32 {
    static constexpr int kBytes = 4;
};
struct F16 {
    static constexpr int kBytes = 2;
};
struct BF16 {
    static constexpr int kBytes = 2;
};

// How a group is stored: through the caches, or past them, at a multiple of 64 bytes or of its own
// size, and final only after settle().
struct Cached {};
struct Past {};

// How it is loaded: at once, or where that would cross lines of 64 bytes each time, by vectors of
// half their length, of which every other one does: of fp32 that AVX-512 reads, the sum of two
// tensors of 4 MiB in the caches takes 0.8 of the time.
struct Whole {};
struct Halves {};

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float float_from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31,
                   mantissa = half & 0x3FF;
    if (exponent == 0)  // zero or subnormal: mantissa * 2^-24, exact
        return bit_cast<float>(
            sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * bit_cast<float>(0x33800000u)));
    if (exponent == 31)
        return bit_cast<float>(sign | 0x7F800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
    return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t half_from_float(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t half;
    if (magnitude > 0x7F800000u)
        half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    else if (magnitude >= 0x477FF000u)  // 65520, halfway to 65536
        half = 0x7C00u;
    else if (magnitude <
             0x38800000u)  // subnormal: the ulp of 0.5f is 2^-24, the half's smallest step
        half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    else
        half = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    return static_cast<uint16_t>(sign | half);
}

inline uint16_t bfloat_from_float(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded =
        (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
    return static_cast<uint16_t>(rounded >> 16);
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

}  // namespace fastmerge
