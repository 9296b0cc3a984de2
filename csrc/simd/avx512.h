// The vector vocabulary (see scalar.h) in AVX-512 F, BW, VL and DQ.
// Included inside namespace fastmerge::avx512 and its target region.

constexpr int kLanes = 16;
constexpr int kPhiloxVectors = 2;

struct Floats {
    __m512 v;
};
struct Words {
    __m512i v;
};
struct Mask {
    __mmask16 v;
};
struct Doubles {
    __m512d v;
};

inline __m256i load_half(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Floats load(F32, const void* from) { return {_mm512_loadu_ps(from)}; }
inline Floats load(F16, const void* from) { return {_mm512_cvtph_ps(load_half(from))}; }
inline Floats load(BF16, const void* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from)), 16))};
}
inline void store(F32, void* to, Floats a) { _mm512_storeu_ps(to, a.v); }
inline void store(F16, void* to, Floats a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// Not vcvtneps2bf16: it flushes subnormals to zero.
inline void store(BF16, void* to, Floats a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    const __m512i chosen = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q),
                                                bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(static_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

inline Floats spread(float a) { return {_mm512_set1_ps(a)}; }
inline Words spread(uint32_t a) { return {_mm512_set1_epi32(static_cast<int>(a))}; }
inline Words lane_numbers() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Words operator*(Words a, Words b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.v, b.v)}; }
inline Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.v, b.v)}; }
inline Mask without(Mask a, Mask b) { return {_kandn_mask16(b.v, a.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
template <int kBits>
inline Words shift_right(Words a) {
    return {_mm512_srli_epi32(a.v, kBits)};
}
inline Words bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline Floats floats(Words a) { return {_mm512_castsi512_ps(a.v)}; }

inline Mask above(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask at_least(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask equal(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask signed_above(Words a, Words b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
inline Mask at_most(Words a, Words b) { return {_mm512_cmple_epu32_mask(a.v, b.v)}; }
inline Mask equal(Words a, Words b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }

inline Floats choose(Mask m, Floats yes, Floats no) {
    return {_mm512_mask_blend_ps(m.v, no.v, yes.v)};
}
inline Floats keep(Mask m, Floats a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }
inline bool any(Mask m) { return m.v != 0; }
inline Words count(Words counter, Mask m) {
    return {_mm512_mask_add_epi32(counter.v, m.v, counter.v, _mm512_set1_epi32(1))};
}
inline int64_t sum(Words a) { return static_cast<uint32_t>(_mm512_reduce_add_epi32(a.v)); }
// Not the compressing store, which is microcoded on Zen 4.
inline int compress(void* to, Words a, Mask m) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m.v, a.v));
    return __builtin_popcount(m.v);
}

// As in avx2.h, eight counters at once.
inline void philox(uint64_t counter, const uint64_t* round_keys, Words* words) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter & 0xFFFFFFFFu)),
                                  _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c1 = _mm512_set1_epi64(static_cast<int64_t>(counter >> 32));
    __m512i c2 = _mm512_setzero_si512(), c3 = _mm512_setzero_si512();
    constexpr int kXor3 = 0x96;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i k0 = _mm512_set1_epi64(static_cast<int64_t>(round_keys[2 * round]));
        const __m512i k1 = _mm512_set1_epi64(static_cast<int64_t>(round_keys[2 * round + 1]));
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, kXor3);
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, kXor3);
        c1 = p1;
        c3 = p0;
    }
    const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    words[0].v = _mm512_unpacklo_epi64(w01, w23);
    words[1].v = _mm512_unpackhi_epi64(w01, w23);
}

inline Doubles load_sums(const double* from) { return {_mm512_loadu_pd(from)}; }
inline void store_sums(double* to, Doubles a) { _mm512_storeu_pd(to, a.v); }
inline Doubles load_doubles(F32, const void* from) {
    return {_mm512_cvtps_pd(_mm256_loadu_ps(static_cast<const float*>(from)))};
}
inline Doubles load_doubles(F16, const void* from) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))))};
}
inline Doubles load_doubles(BF16, const void* from) {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return {
        _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)))};
}
// a - b rounded to fp32: two roundings of fp32 values' difference are as one (53 >= 2 * 24 + 2
// bits).
inline Doubles subtract_single(Doubles a, Doubles b) {
    return {_mm512_cvtps_pd(_mm512_cvtpd_ps(_mm512_sub_pd(a.v, b.v)))};
}
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
inline Doubles accumulate(Doubles c, Floats a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    return {_mm512_add_pd(_mm512_add_pd(c.v, low), high)};
}
inline Doubles accumulate(Doubles c, Floats first, Floats second) {
    return accumulate(accumulate(c, first), second);
}
