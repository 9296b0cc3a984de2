// The vector vocabulary (see scalar.h) in AVX-512 F, BW, VL and DQ.
// Included inside namespace fastmerge::avx512 and its target region.

constexpr int kLanes = 16;
constexpr int kPhiloxVectors = 2;
constexpr bool kDearCompress = false;

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
// One Floats in fp64.
struct Wide {
    __m512d low, high;
};

FM_INLINE __m256i load_half(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
FM_INLINE Floats load(F32, const void* from) { return {_mm512_loadu_ps(from)}; }
FM_INLINE Floats load(F16, const void* from) { return {_mm512_cvtph_ps(load_half(from))}; }
FM_INLINE Floats load(BF16, const void* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from)), 16))};
}
FM_INLINE void store(F32, void* to, Floats a) { _mm512_storeu_ps(to, a.v); }
FM_INLINE void store(F16, void* to, Floats a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// float32 bits rounded to nearest even in their high halves; NaN is for the caller. Not
// vcvtneps2bf16: it flushes subnormals to zero.
FM_INLINE __m512i round_to_bfloat(__m512 a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
}
FM_INLINE __m512i quiet_nan(__m512 a, __m512i rounded) {
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                _mm512_castps_si512(a), _mm512_set1_epi32(0x400000));
}
FM_INLINE void store(BF16, void* to, Floats a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(
                                                       quiet_nan(a.v, round_to_bfloat(a.v)), 16)));
}

// A group of two vectors: its fours of elements are in the first and the second by turns (see
// avx2.h).
FM_INLINE Words group_numbers(int vector) {
    const int first = 4 * vector;
    return {_mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
        _mm512_set1_epi32(first))};
}
FM_INLINE __m512i take(Whole, const void* from) { return _mm512_loadu_si512(from); }
FM_INLINE __m512i take(Halves, const void* from) {
    const __m512i first = _mm512_castsi256_si512(load_half(from));
    return _mm512_inserti64x4(first, load_half(static_cast<const char*>(from) + 32), 1);
}
template <class How = Whole>
FM_INLINE void load_group(BF16, const void* from, Floats* x, How how = {}) {
    const __m512i zero = _mm512_setzero_si512(), half = take(how, from);
    x[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, half));
    x[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, half));
}
template <class How = Whole>
FM_INLINE void load_group(F16, const void* from, Floats* x, How how = {}) {
    const __m512i half =
        _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), take(how, from));
    x[0].v = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    x[1].v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
template <class How = Whole>
FM_INLINE void load_group(F32, const void* from, Floats* x, How how = {}) {
    const float* f = static_cast<const float*>(from);
    const __m512 first = _mm512_castsi512_ps(take(how, f));
    const __m512 second = _mm512_castsi512_ps(take(how, f + 16));
    x[0].v = _mm512_shuffle_f32x4(first, second, _MM_SHUFFLE(2, 0, 2, 0));
    x[1].v = _mm512_shuffle_f32x4(first, second, _MM_SHUFFLE(3, 1, 3, 1));
}
FM_INLINE void put(Cached, void* to, __m512i a) { _mm512_storeu_si512(to, a); }
FM_INLINE void put(Past, void* to, __m512i a) { _mm512_stream_si512(static_cast<__m512i*>(to), a); }
FM_INLINE void settle() { _mm_sfence(); }
template <class How = Cached>
FM_INLINE void store_group(BF16, void* to, const Floats* x, How how = {}) {
    __m512i first = round_to_bfloat(x[0].v), second = round_to_bfloat(x[1].v);
    if (__builtin_expect(_mm512_cmp_ps_mask(x[0].v, x[1].v, _CMP_UNORD_Q), 0)) {
        first = quiet_nan(x[0].v, first);
        second = quiet_nan(x[1].v, second);
    }
    put(how, to, _mm512_packus_epi32(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16)));
}
template <class How = Cached>
FM_INLINE void store_group(F16, void* to, const Floats* x, How how = {}) {
    const __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtps_ph(x[0].v, _MM_FROUND_TO_NEAREST_INT)),
        _mm512_cvtps_ph(x[1].v, _MM_FROUND_TO_NEAREST_INT), 1);
    put(how, to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), both));
}
// The group's first and last half in plain order.
FM_INLINE __m512 first_half(const Floats* x) {
    const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    return _mm512_castpd_ps(
        _mm512_permutex2var_pd(_mm512_castps_pd(x[0].v), order, _mm512_castps_pd(x[1].v)));
}
FM_INLINE __m512 last_half(const Floats* x) {
    const __m512i order = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    return _mm512_castpd_ps(
        _mm512_permutex2var_pd(_mm512_castps_pd(x[0].v), order, _mm512_castps_pd(x[1].v)));
}
template <class How = Cached>
FM_INLINE void store_group(F32, void* to, const Floats* x, How how = {}) {
    float* f = static_cast<float*>(to);
    put(how, f, _mm512_castps_si512(first_half(x)));
    put(how, f + 16, _mm512_castps_si512(last_half(x)));
}

FM_INLINE Floats spread(float a) { return {_mm512_set1_ps(a)}; }
FM_INLINE Words spread(uint32_t a) { return {_mm512_set1_epi32(static_cast<int>(a))}; }

FM_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
FM_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
FM_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
FM_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
FM_INLINE Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
FM_INLINE Words operator*(Words a, Words b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
FM_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
FM_INLINE Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
FM_INLINE Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.v, b.v)}; }
FM_INLINE Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.v, b.v)}; }
FM_INLINE Mask without(Mask a, Mask b) { return {_kandn_mask16(b.v, a.v)}; }
FM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
template <int kBits>
FM_INLINE Words shift_right(Words a) {
    return {_mm512_srli_epi32(a.v, kBits)};
}
FM_INLINE Words bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
FM_INLINE Floats floats(Words a) { return {_mm512_castsi512_ps(a.v)}; }

FM_INLINE Mask above(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FM_INLINE Mask not_at_least(Floats a, Floats b) {
    return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ)};
}
FM_INLINE Mask equal(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FM_INLINE Mask signed_above(Words a, Words b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
FM_INLINE Mask at_most(Words a, Words b) { return {_mm512_cmple_epu32_mask(a.v, b.v)}; }
FM_INLINE Mask equal(Words a, Words b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }

FM_INLINE Floats choose(Mask m, Floats yes, Floats no) {
    return {_mm512_mask_blend_ps(m.v, no.v, yes.v)};
}
FM_INLINE Floats keep(Mask m, Floats a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }
FM_INLINE bool any(Mask m) { return m.v != 0; }
// By hand: gcc 12 may spill the two bytes of a mask and count the bits of four (seen in the thread
// sanitizer's build, where ties were then counted twice).
FM_INLINE uint32_t lane_bits(Mask m) {
    uint32_t bits;
    asm("kmovw %1, %0" : "=r"(bits) : "k"(m.v));
    return bits;
}
FM_INLINE Words decrease(Words a, Mask m) {
    return {_mm512_mask_sub_epi32(a.v, m.v, a.v, _mm512_set1_epi32(1))};
}
FM_INLINE Words count(Words counter, Mask m) {
    return {_mm512_mask_add_epi32(counter.v, m.v, counter.v, _mm512_set1_epi32(1))};
}
FM_INLINE int64_t sum(Words a) { return static_cast<uint32_t>(_mm512_reduce_add_epi32(a.v)); }
// Not the compressing store, which is microcoded on Zen 4.
FM_INLINE int compress(void* to, Words a, Mask m) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m.v, a.v));
    return __builtin_popcount(lane_bits(m));
}

// As in avx2.h, eight counters at once.
FM_INLINE void philox(uint64_t counter, const uint64_t* round_keys, Words* words) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter & 0xFFFFFFFFu)),
                                  _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
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

FM_INLINE Doubles load_sums(const double* from) { return {_mm512_loadu_pd(from)}; }
FM_INLINE void store_sums(double* to, Doubles a) { _mm512_storeu_pd(to, a.v); }
FM_INLINE Doubles load_doubles(F32, const void* from) {
    return {_mm512_cvtps_pd(_mm256_loadu_ps(static_cast<const float*>(from)))};
}
FM_INLINE Doubles load_doubles(F16, const void* from) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))))};
}
FM_INLINE Doubles load_doubles(BF16, const void* from) {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return {
        _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)))};
}
// a - b rounded to fp32: two roundings of fp32 values' difference are as one (53 >= 2 * 24 + 2
// bits).
FM_INLINE Doubles subtract_single(Doubles a, Doubles b) {
    return {_mm512_cvtps_pd(_mm512_cvtpd_ps(_mm512_sub_pd(a.v, b.v)))};
}
FM_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
FM_INLINE Wide widen(Floats a) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
FM_INLINE Doubles add_half(Doubles c, __m512 half) {
    const Wide wide = widen(Floats{half});
    return {_mm512_add_pd(_mm512_add_pd(c.v, wide.low), wide.high)};
}
FM_INLINE Doubles accumulate(Doubles c, const Floats* x) {
    return add_half(add_half(c, first_half(x)), last_half(x));
}
FM_INLINE Wide spread(double a) { return {_mm512_set1_pd(a), _mm512_set1_pd(a)}; }
// c + a * b, the product and the sum each rounded.
FM_INLINE Wide add_product(Floats a, Wide b, Wide c) {
    const Wide x = widen(a);
    return {_mm512_add_pd(c.low, _mm512_mul_pd(x.low, b.low)),
            _mm512_add_pd(c.high, _mm512_mul_pd(x.high, b.high))};
}
FM_INLINE Floats narrow(Wide a) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.low)),
                               _mm512_cvtpd_ps(a.high), 1)};
}
