// The vector vocabulary (see scalar.h) in AVX2, FMA and F16C.
// Included inside namespace fastmerge::avx2 and its target region.

constexpr int kLanes = 8;
constexpr int kPhiloxVectors = 2;
constexpr bool kDearCompress = false;

struct Floats {
    __m256 v;
};
struct Words {
    __m256i v;
};
struct Mask {
    __m256i v;
};
struct Doubles {
    __m256d low, high;
};
using Wide = Doubles;  // one Floats in fp64

FM_INLINE __m128i load_half(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
FM_INLINE Floats load(F32, const void* from) {
    return {_mm256_loadu_ps(static_cast<const float*>(from))};
}
FM_INLINE Floats load(F16, const void* from) { return {_mm256_cvtph_ps(load_half(from))}; }
FM_INLINE Floats load(BF16, const void* from) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16))};
}
FM_INLINE void store(F32, void* to, Floats a) { _mm256_storeu_ps(static_cast<float*>(to), a.v); }
FM_INLINE void store(F16, void* to, Floats a) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// float32 bits rounded to nearest even in their high halves; NaN is for the caller.
FM_INLINE __m256i round_to_bfloat(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
}
FM_INLINE __m256i quiet_nan(__m256 a, __m256i rounded) {
    const __m256 quiet = _mm256_or_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
FM_INLINE void store(BF16, void* to, Floats a) {
    const __m256i high = _mm256_srli_epi32(quiet_nan(a.v, round_to_bfloat(a.v)), 16);
    _mm_storeu_si128(
        static_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

// A group of two vectors: elements 0-3 and 8-11 in the first, 4-7 and 12-15 in the second. It is
// the order that unpacking and packing 16-bit elements take in place, without crossing 128-bit
// lanes.
FM_INLINE Words group_numbers(int vector) {
    const int first = 4 * vector;
    return {
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11), _mm256_set1_epi32(first))};
}
FM_INLINE void load_group(BF16, const void* from, Floats* x) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    x[0].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, half));
    x[1].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, half));
}
FM_INLINE void load_group(F16, const void* from, Floats* x) {
    const __m256i half = _mm256_permute4x64_epi64(
        _mm256_loadu_si256(static_cast<const __m256i*>(from)), _MM_SHUFFLE(3, 1, 2, 0));
    x[0].v = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    x[1].v = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
FM_INLINE void load_group(F32, const void* from, Floats* x) {
    const float* f = static_cast<const float*>(from);
    x[0].v = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(f)), _mm_loadu_ps(f + 8), 1);
    x[1].v =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(f + 4)), _mm_loadu_ps(f + 12), 1);
}
FM_INLINE void put(Cached, void* to, __m256i a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), a);
}
FM_INLINE void put(Past, void* to, __m256i a) { _mm256_stream_si256(static_cast<__m256i*>(to), a); }
FM_INLINE void settle() { _mm_sfence(); }
template <class How = Cached>
FM_INLINE void store_group(BF16, void* to, const Floats* x, How how = {}) {
    __m256i first = round_to_bfloat(x[0].v), second = round_to_bfloat(x[1].v);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(x[0].v, x[1].v, _CMP_UNORD_Q)), 0)) {
        first = quiet_nan(x[0].v, first);
        second = quiet_nan(x[1].v, second);
    }
    put(how, to, _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16)));
}
template <class How = Cached>
FM_INLINE void store_group(F16, void* to, const Floats* x, How how = {}) {
    const __m128i first = _mm256_cvtps_ph(x[0].v, _MM_FROUND_TO_NEAREST_INT);
    const __m128i second = _mm256_cvtps_ph(x[1].v, _MM_FROUND_TO_NEAREST_INT);
    put(how, to,
        _mm256_set_m128i(_mm_unpackhi_epi64(first, second), _mm_unpacklo_epi64(first, second)));
}
template <class How = Cached>
FM_INLINE void store_group(F32, void* to, const Floats* x, How how = {}) {
    float* f = static_cast<float*>(to);
    put(how, f, _mm256_castps_si256(_mm256_permute2f128_ps(x[0].v, x[1].v, 0x20)));
    put(how, f + 8, _mm256_castps_si256(_mm256_permute2f128_ps(x[0].v, x[1].v, 0x31)));
}

FM_INLINE Floats spread(float a) { return {_mm256_set1_ps(a)}; }
FM_INLINE Words spread(uint32_t a) { return {_mm256_set1_epi32(static_cast<int>(a))}; }

FM_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
FM_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
FM_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
FM_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
FM_INLINE Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
FM_INLINE Words operator*(Words a, Words b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
FM_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
FM_INLINE Words operator&(Words a, Words b) { return {_mm256_and_si256(a.v, b.v)}; }
FM_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_si256(a.v, b.v)}; }
FM_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_si256(a.v, b.v)}; }
FM_INLINE Mask without(Mask a, Mask b) { return {_mm256_andnot_si256(b.v, a.v)}; }
FM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
template <int kBits>
FM_INLINE Words shift_right(Words a) {
    return {_mm256_srli_epi32(a.v, kBits)};
}
FM_INLINE Words bits(Floats a) { return {_mm256_castps_si256(a.v)}; }
FM_INLINE Floats floats(Words a) { return {_mm256_castsi256_ps(a.v)}; }

template <int kPredicate>
FM_INLINE Mask compare(Floats a, Floats b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, kPredicate))};
}
FM_INLINE Mask above(Floats a, Floats b) { return compare<_CMP_GT_OQ>(a, b); }
FM_INLINE Mask not_at_least(Floats a, Floats b) { return compare<_CMP_NGE_UQ>(a, b); }
FM_INLINE Mask equal(Floats a, Floats b) { return compare<_CMP_EQ_OQ>(a, b); }
FM_INLINE Mask signed_above(Words a, Words b) { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
FM_INLINE Mask at_most(Words a, Words b) {
    return {_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), b.v)};
}
FM_INLINE Mask equal(Words a, Words b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }

FM_INLINE Floats choose(Mask m, Floats yes, Floats no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(m.v))};
}
FM_INLINE Floats keep(Mask m, Floats a) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(m.v))}; }
// A bit for each lane.
FM_INLINE uint32_t lane_bits(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m.v)));
}
FM_INLINE bool any(Mask m) { return !_mm256_testz_si256(m.v, m.v); }
// a - 1 in the lanes of m.
FM_INLINE Words decrease(Words a, Mask m) { return {_mm256_add_epi32(a.v, m.v)}; }
FM_INLINE Words count(Words counter, Mask m) { return {_mm256_sub_epi32(counter.v, m.v)}; }
FM_INLINE int64_t sum(Words a) {
    uint32_t lanes[kLanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), a.v);
    int64_t total = 0;
    for (const uint32_t lane : lanes) total += lane;
    return total;
}

// For each set of lanes, their numbers one after another.
struct CompressTable {
    uint8_t order[256][8];
    constexpr CompressTable() : order() {
        for (int set = 0; set < 256; ++set)
            for (int lane = 0, chosen = 0; lane < 8; ++lane)
                if (set >> lane & 1) order[set][chosen++] = static_cast<uint8_t>(lane);
    }
};
constexpr CompressTable kCompress;
FM_INLINE int compress(void* to, Words a, Mask m) {
    const int set = lane_bits(m);
    const __m256i order = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.order[set])));
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(a.v, order));
    return __builtin_popcount(static_cast<unsigned>(set));
}

// Four counters at once, each word in the low half of a 64-bit lane: what the multiplication reads.
// The last two unpacks leave the words in a group's order.
FM_INLINE void philox(uint64_t counter, const uint64_t* round_keys, Words* words) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter & 0xFFFFFFFFu)),
                                  _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_set1_epi64x(static_cast<int64_t>(counter >> 32));
    __m256i c2 = _mm256_setzero_si256(), c3 = _mm256_setzero_si256();
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m256i k0 = _mm256_set1_epi64x(static_cast<int64_t>(round_keys[2 * round]));
        const __m256i k1 = _mm256_set1_epi64x(static_cast<int64_t>(round_keys[2 * round + 1]));
        const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), k0);
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), k1);
        c1 = p1;
        c3 = p0;
    }
    const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    words[0].v = _mm256_unpacklo_epi64(w01, w23);
    words[1].v = _mm256_unpackhi_epi64(w01, w23);
}

FM_INLINE Doubles load_sums(const double* from) {
    return {_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4)};
}
FM_INLINE void store_sums(double* to, Doubles a) {
    _mm256_storeu_pd(to, a.low);
    _mm256_storeu_pd(to + 4, a.high);
}
FM_INLINE Doubles load_doubles(F32, const void* from) {
    const float* f = static_cast<const float*>(from);
    return {_mm256_cvtps_pd(_mm_loadu_ps(f)), _mm256_cvtps_pd(_mm_loadu_ps(f + 4))};
}
template <class T>
FM_INLINE Doubles load_doubles(T type, const void* from) {
    const __m256 a = load(type, from).v;
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
            _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
// a - b rounded to fp32: two roundings of fp32 values' difference are as one (53 >= 2 * 24 + 2
// bits).
FM_INLINE Doubles subtract_single(Doubles a, Doubles b) {
    return {_mm256_cvtps_pd(_mm256_cvtpd_ps(_mm256_sub_pd(a.low, b.low))),
            _mm256_cvtps_pd(_mm256_cvtpd_ps(_mm256_sub_pd(a.high, b.high)))};
}
FM_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
FM_INLINE __m256d widen_low(Floats a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)); }
FM_INLINE __m256d widen_high(Floats a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)); }
FM_INLINE Doubles accumulate(Doubles c, const Floats* x) {
    return {_mm256_add_pd(_mm256_add_pd(c.low, widen_low(x[0])), widen_high(x[0])),
            _mm256_add_pd(_mm256_add_pd(c.high, widen_low(x[1])), widen_high(x[1]))};
}
FM_INLINE Wide spread(double a) { return {_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
// c + a * b, the product and the sum each rounded.
FM_INLINE Wide add_product(Floats a, Wide b, Wide c) {
    return {_mm256_add_pd(c.low, _mm256_mul_pd(widen_low(a), b.low)),
            _mm256_add_pd(c.high, _mm256_mul_pd(widen_high(a), b.high))};
}
FM_INLINE Floats narrow(Wide a) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(a.high), _mm256_cvtpd_ps(a.low))};
}
