// The vector vocabulary (see scalar.h) in NEON, which every 64-bit Arm CPU has.
// Included inside namespace fastmerge::neon.

constexpr int kLanes = 4;
constexpr int kPhiloxVectors = 2;
constexpr bool kDearCompress = true;

struct Floats {
    float32x4_t v;
};
struct Words {
    uint32x4_t v;
};
struct Mask {
    uint32x4_t v;
};
struct Doubles {
    float64x2_t v[kSumLanes / 2];
};
// One Floats in fp64.
struct Wide {
    float64x2_t low, high;
};

// Loads and stores by bytes: tensors promise no alignment.
FM_INLINE uint8x16_t load_bytes(const void* from) {
    return vld1q_u8(static_cast<const uint8_t*>(from));
}
FM_INLINE uint8x8_t load_half(const void* from) {
    return vld1_u8(static_cast<const uint8_t*>(from));
}
FM_INLINE Floats load(F32, const void* from) { return {vreinterpretq_f32_u8(load_bytes(from))}; }
FM_INLINE Floats load(F16, const void* from) {
    return {vcvt_f32_f16(vreinterpret_f16_u8(load_half(from)))};
}
FM_INLINE Floats load(BF16, const void* from) {
    const uint32x4_t bits = vmovl_u16(vreinterpret_u16_u8(load_half(from)));
    return {vreinterpretq_f32_u32(vshlq_n_u32(bits, 16))};
}
FM_INLINE void store(F32, void* to, Floats a) {
    vst1q_u8(static_cast<uint8_t*>(to), vreinterpretq_u8_f32(a.v));
}
FM_INLINE void store(F16, void* to, Floats a) {
    vst1_u8(static_cast<uint8_t*>(to), vreinterpret_u8_f16(vcvt_f16_f32(a.v)));
}
FM_INLINE void store(BF16, void* to, Floats a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t chosen = vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet);
    vst1_u8(static_cast<uint8_t*>(to), vreinterpret_u8_u16(vshrn_n_u32(chosen, 16)));
}

FM_INLINE Words group_numbers(int vector) {
    const uint32_t numbers[kLanes] = {0, 1, 2, 3};
    return {vaddq_u32(vld1q_u32(numbers), vdupq_n_u32(static_cast<uint32_t>(vector * kLanes)))};
}
template <class T>
FM_INLINE void load_group(T type, const void* from, Floats* x) {
    x[0] = load(type, from);
    x[1] = load(type, static_cast<const char*>(from) + kLanes * T::kBytes);
}
// Of stores past the caches it has none.
FM_INLINE void settle() {}
template <class T, class How = Cached>
FM_INLINE void store_group(T type, void* to, const Floats* x, How = {}) {
    store(type, to, x[0]);
    store(type, static_cast<char*>(to) + kLanes * T::kBytes, x[1]);
}

FM_INLINE Floats spread(float a) { return {vdupq_n_f32(a)}; }
FM_INLINE Words spread(uint32_t a) { return {vdupq_n_u32(a)}; }

FM_INLINE Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.v, b.v)}; }
FM_INLINE Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.v, b.v)}; }
FM_INLINE Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.v, b.v)}; }
FM_INLINE Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.v, b.v)}; }
FM_INLINE Words operator+(Words a, Words b) { return {vaddq_u32(a.v, b.v)}; }
FM_INLINE Words operator*(Words a, Words b) { return {vmulq_u32(a.v, b.v)}; }
FM_INLINE Words operator^(Words a, Words b) { return {veorq_u32(a.v, b.v)}; }
FM_INLINE Words operator&(Words a, Words b) { return {vandq_u32(a.v, b.v)}; }
FM_INLINE Mask operator&(Mask a, Mask b) { return {vandq_u32(a.v, b.v)}; }
FM_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.v, b.v)}; }
FM_INLINE Mask without(Mask a, Mask b) { return {vbicq_u32(a.v, b.v)}; }
FM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
template <int kBits>
FM_INLINE Words shift_right(Words a) {
    return {vshrq_n_u32(a.v, kBits)};
}
FM_INLINE Words bits(Floats a) { return {vreinterpretq_u32_f32(a.v)}; }
FM_INLINE Floats floats(Words a) { return {vreinterpretq_f32_u32(a.v)}; }

FM_INLINE Mask above(Floats a, Floats b) { return {vcgtq_f32(a.v, b.v)}; }
FM_INLINE Mask not_at_least(Floats a, Floats b) { return {vmvnq_u32(vcgeq_f32(a.v, b.v))}; }
FM_INLINE Mask equal(Floats a, Floats b) { return {vceqq_f32(a.v, b.v)}; }
FM_INLINE Mask signed_above(Words a, Words b) {
    return {vcgtq_s32(vreinterpretq_s32_u32(a.v), vreinterpretq_s32_u32(b.v))};
}
FM_INLINE Mask at_most(Words a, Words b) { return {vcleq_u32(a.v, b.v)}; }
FM_INLINE Mask equal(Words a, Words b) { return {vceqq_u32(a.v, b.v)}; }

FM_INLINE Floats choose(Mask m, Floats yes, Floats no) { return {vbslq_f32(m.v, yes.v, no.v)}; }
FM_INLINE Floats keep(Mask m, Floats a) {
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), m.v))};
}
FM_INLINE bool any(Mask m) { return vmaxvq_u32(m.v) != 0; }
FM_INLINE uint32_t lane_bits(Mask m) {
    static constexpr uint32_t kBits[kLanes] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m.v, vld1q_u32(kBits)));
}
FM_INLINE Words decrease(Words a, Mask m) { return {vaddq_u32(a.v, m.v)}; }
FM_INLINE Words count(Words counter, Mask m) { return {vsubq_u32(counter.v, m.v)}; }
FM_INLINE int64_t sum(Words a) { return static_cast<int64_t>(vaddlvq_u32(a.v)); }
FM_INLINE int compress(void* to, Words a, Mask m) {
    uint32_t lanes[kLanes], chosen[kLanes], packed[kLanes] = {};
    vst1q_u32(lanes, a.v);
    vst1q_u32(chosen, m.v);
    int written = 0;
    for (int lane = 0; lane < kLanes; ++lane)
        if (chosen[lane]) packed[written++] = lanes[lane];
    std::memcpy(to, packed, sizeof packed);
    return written;
}

// Two counters at once.
FM_INLINE void philox(uint64_t counter, const uint64_t* round_keys, Words* words) {
    const uint32_t low = static_cast<uint32_t>(counter);
    uint32x2_t c0 = vset_lane_u32(low + 1, vdup_n_u32(low), 1);
    uint32x2_t c1 = vdup_n_u32(static_cast<uint32_t>(counter >> 32));
    uint32x2_t c2 = vdup_n_u32(0), c3 = vdup_n_u32(0);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint32x2_t k0 = vdup_n_u32(static_cast<uint32_t>(round_keys[2 * round]));
        const uint32x2_t k1 = vdup_n_u32(static_cast<uint32_t>(round_keys[2 * round + 1]));
        const uint64x2_t p0 = vmull_n_u32(c0, kPhiloxM0), p1 = vmull_n_u32(c2, kPhiloxM1);
        c0 = veor_u32(veor_u32(vshrn_n_u64(p1, 32), c1), k0);
        c2 = veor_u32(veor_u32(vshrn_n_u64(p0, 32), c3), k1);
        c1 = vmovn_u64(p1);
        c3 = vmovn_u64(p0);
    }
    words[0].v = vcombine_u32(vzip1_u32(c0, c1), vzip1_u32(c2, c3));
    words[1].v = vcombine_u32(vzip2_u32(c0, c1), vzip2_u32(c2, c3));
}

FM_INLINE Doubles load_sums(const double* from) {
    return {{vld1q_f64(from), vld1q_f64(from + 2), vld1q_f64(from + 4), vld1q_f64(from + 6)}};
}
FM_INLINE void store_sums(double* to, Doubles a) {
    for (int i = 0; i < kSumLanes / 2; ++i) vst1q_f64(to + 2 * i, a.v[i]);
}
FM_INLINE Doubles widen_group(const Floats* x) {
    return {{vcvt_f64_f32(vget_low_f32(x[0].v)), vcvt_high_f64_f32(x[0].v),
             vcvt_f64_f32(vget_low_f32(x[1].v)), vcvt_high_f64_f32(x[1].v)}};
}
template <class T>
FM_INLINE Doubles load_doubles(T type, const void* from) {
    Floats x[2];
    load_group(type, from, x);
    return widen_group(x);
}
// a - b rounded to fp32: two roundings of fp32 values' difference are as one.
FM_INLINE Doubles subtract_single(Doubles a, Doubles b) {
    for (int i = 0; i < kSumLanes / 2; ++i)
        a.v[i] = vcvt_f64_f32(vcvt_f32_f64(vsubq_f64(a.v[i], b.v[i])));
    return a;
}
FM_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    for (int i = 0; i < kSumLanes / 2; ++i) c.v[i] = vfmaq_f64(c.v[i], a.v[i], b.v[i]);
    return c;
}
FM_INLINE Doubles accumulate(Doubles c, const Floats* x) {
    const Doubles wide = widen_group(x);
    for (int i = 0; i < kSumLanes / 2; ++i) c.v[i] = vaddq_f64(c.v[i], wide.v[i]);
    return c;
}
FM_INLINE Wide spread(double a) { return {vdupq_n_f64(a), vdupq_n_f64(a)}; }
// c + a * b, the product and the sum each rounded.
FM_INLINE Wide add_product(Floats a, Wide b, Wide c) {
    return {vaddq_f64(c.low, vmulq_f64(vcvt_f64_f32(vget_low_f32(a.v)), b.low)),
            vaddq_f64(c.high, vmulq_f64(vcvt_high_f64_f32(a.v), b.high))};
}
FM_INLINE Floats narrow(Wide a) { return {vcvt_high_f32_f64(vcvt_f32_f64(a.low), a.high)}; }
