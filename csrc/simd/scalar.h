// The vector vocabulary in plain C++, four lanes wide (one Philox block); compilers turn the loops
// into the baseline's vectors where it has them. Included inside namespace fastmerge::scalar.

constexpr int kLanes = 4;
constexpr int kPhiloxVectors = 1;  // vectors that one call of philox fills
// Whether compress is so dear that a branch around it pays where there is nothing to compress.
constexpr bool kDearCompress = true;

struct Floats {
    float v[kLanes];
};
struct Words {
    uint32_t v[kLanes];
};
struct Mask {
    uint32_t v[kLanes];  // 0 or all ones
};
struct Doubles {
    double v[kSumLanes];
};
// One Floats in fp64.
struct Wide {
    double v[kLanes];
};

#define FM_EACH for (int lane = 0; lane < kLanes; ++lane)

FM_INLINE Floats load(F32, const void* from) {
    Floats r;
    std::memcpy(r.v, from, sizeof r.v);
    return r;
}
FM_INLINE Floats load(F16, const void* from) {
    uint16_t half[kLanes];
    std::memcpy(half, from, sizeof half);
    Floats r;
    FM_EACH r.v[lane] = float_from_half(half[lane]);
    return r;
}
FM_INLINE Floats load(BF16, const void* from) {
    uint16_t half[kLanes];
    std::memcpy(half, from, sizeof half);
    uint32_t bits[kLanes];
    FM_EACH bits[lane] = static_cast<uint32_t>(half[lane]) << 16;
    return bit_cast<Floats>(bits);
}
FM_INLINE void store(F32, void* to, Floats a) { std::memcpy(to, a.v, sizeof a.v); }
FM_INLINE void store(F16, void* to, Floats a) {
    uint16_t half[kLanes];
    FM_EACH half[lane] = half_from_float(a.v[lane]);
    std::memcpy(to, half, sizeof half);
}
FM_INLINE void store(BF16, void* to, Floats a) {
    uint16_t half[kLanes];
    FM_EACH half[lane] = bfloat_from_float(a.v[lane]);
    std::memcpy(to, half, sizeof half);
}

// A group is two vectors; instruction sets choose where in it each element lies.
FM_INLINE Words group_numbers(int vector) {
    Words r;
    FM_EACH r.v[lane] = static_cast<uint32_t>(vector * kLanes + lane);
    return r;
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

FM_INLINE Floats spread(float a) {
    Floats r;
    FM_EACH r.v[lane] = a;
    return r;
}
FM_INLINE Words spread(uint32_t a) {
    Words r;
    FM_EACH r.v[lane] = a;
    return r;
}

#define FM_BINARY(TYPE, NAME, EXPRESSION) \
    FM_INLINE TYPE NAME(TYPE a, TYPE b) { \
        TYPE r;                           \
        FM_EACH r.v[lane] = EXPRESSION;   \
        return r;                         \
    }
FM_BINARY(Floats, operator+, a.v[lane] + b.v[lane])
FM_BINARY(Floats, operator-, a.v[lane] - b.v[lane])
FM_BINARY(Floats, operator*, a.v[lane] * b.v[lane])
FM_BINARY(Floats, operator/, a.v[lane] / b.v[lane])
FM_BINARY(Words, operator+, a.v[lane] + b.v[lane])
FM_BINARY(Words, operator*, a.v[lane] * b.v[lane])
FM_BINARY(Words, operator^, a.v[lane] ^ b.v[lane])
FM_BINARY(Words, operator&, a.v[lane] & b.v[lane])
FM_BINARY(Mask, operator&, a.v[lane] & b.v[lane])
FM_BINARY(Mask, operator|, a.v[lane] | b.v[lane])
FM_BINARY(Mask, without, a.v[lane] & ~b.v[lane])
#undef FM_BINARY

FM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    Floats r;
    FM_EACH r.v[lane] = std::fmaf(a.v[lane], b.v[lane], c.v[lane]);
    return r;
}
template <int kBits>
FM_INLINE Words shift_right(Words a) {
    FM_EACH a.v[lane] >>= kBits;
    return a;
}
FM_INLINE Words bits(Floats a) { return bit_cast<Words>(a); }
FM_INLINE Floats floats(Words a) { return bit_cast<Floats>(a); }

#define FM_COMPARE(TYPE, NAME, EXPRESSION)                 \
    FM_INLINE Mask NAME(TYPE a, TYPE b) {                  \
        Mask r;                                            \
        FM_EACH r.v[lane] = EXPRESSION ? 0xFFFFFFFFu : 0u; \
        return r;                                          \
    }
FM_COMPARE(Floats, above, a.v[lane] > b.v[lane])
FM_COMPARE(Floats, not_at_least, !(a.v[lane] >= b.v[lane]))
FM_COMPARE(Floats, equal, a.v[lane] == b.v[lane])
FM_COMPARE(Words, signed_above, static_cast<int32_t>(a.v[lane]) > static_cast<int32_t>(b.v[lane]))
FM_COMPARE(Words, at_most, a.v[lane] <= b.v[lane])
FM_COMPARE(Words, equal, a.v[lane] == b.v[lane])
#undef FM_COMPARE

FM_INLINE Floats choose(Mask m, Floats yes, Floats no) {
    Floats r;
    FM_EACH r.v[lane] = m.v[lane] ? yes.v[lane] : no.v[lane];
    return r;
}
FM_INLINE Floats keep(Mask m, Floats a) {
    const Words masked = bits(a) & bit_cast<Words>(m);
    return floats(masked);
}
FM_INLINE bool any(Mask m) { return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0; }
// A bit for each lane.
FM_INLINE uint32_t lane_bits(Mask m) {
    uint32_t found = 0;
    FM_EACH found |= (m.v[lane] & 1u) << lane;
    return found;
}
// a - 1 in the lanes of m.
FM_INLINE Words decrease(Words a, Mask m) {
    FM_EACH a.v[lane] += m.v[lane];
    return a;
}
FM_INLINE Words count(Words counter, Mask m) {
    FM_EACH counter.v[lane] -= m.v[lane];
    return counter;
}
FM_INLINE int64_t sum(Words a) {
    int64_t total = 0;
    FM_EACH total += a.v[lane];
    return total;
}
// Writes the chosen lanes one after another; may write all lanes' room. Returns how many were
// chosen.
FM_INLINE int compress(void* to, Words a, Mask m) {
    uint32_t packed[kLanes] = {};
    int chosen = 0;
    FM_EACH if (m.v[lane]) packed[chosen++] = a.v[lane];
    std::memcpy(to, packed, sizeof packed);
    return chosen;
}

// The words of kLanes * kPhiloxVectors consecutive elements, the first at 4 * counter.
FM_INLINE void philox(uint64_t counter, const uint64_t* round_keys, Words* words) {
    uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0];
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
        c[0] =
            static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ static_cast<uint32_t>(round_keys[2 * round]);
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^
               static_cast<uint32_t>(round_keys[2 * round + 1]);
        c[3] = static_cast<uint32_t>(p0);
    }
    FM_EACH words->v[lane] = c[lane];
}

#define FM_EACH_SUM for (int lane = 0; lane < kSumLanes; ++lane)

FM_INLINE Doubles load_sums(const double* from) {
    Doubles r;
    std::memcpy(r.v, from, sizeof r.v);
    return r;
}
FM_INLINE void store_sums(double* to, const Doubles& a) { std::memcpy(to, a.v, sizeof a.v); }
template <class T>
FM_INLINE Doubles load_doubles(T type, const void* from) {
    const Floats low = load(type, from);
    const Floats high = load(type, static_cast<const char*>(from) + kLanes * T::kBytes);
    Doubles r;
    FM_EACH r.v[lane] = low.v[lane];
    FM_EACH r.v[lane + kLanes] = high.v[lane];
    return r;
}
// a - b rounded to fp32; both are fp32 values.
FM_INLINE Doubles subtract_single(Doubles a, const Doubles& b) {
    FM_EACH_SUM a.v[lane] = static_cast<float>(a.v[lane]) - static_cast<float>(b.v[lane]);
    return a;
}
// c + a * b; the product of two fp32 values is exact in fp64, so this is the fused operation's
// result.
FM_INLINE Doubles multiply_add(const Doubles& a, const Doubles& b, Doubles c) {
    FM_EACH_SUM c.v[lane] += a.v[lane] * b.v[lane];
    return c;
}
// Adds a group's elements, the first being a multiple of kSumLanes.
FM_INLINE Doubles accumulate(Doubles c, const Floats* x) {
    FM_EACH c.v[lane] += x[0].v[lane];
    FM_EACH c.v[lane + kLanes] += x[1].v[lane];
    return c;
}
FM_INLINE Wide spread(double a) {
    Wide r;
    FM_EACH r.v[lane] = a;
    return r;
}
// c + a * b, the product and the sum each rounded.
FM_INLINE Wide add_product(const Floats& a, const Wide& b, Wide c) {
    FM_EACH c.v[lane] += static_cast<double>(a.v[lane]) * b.v[lane];
    return c;
}
FM_INLINE Floats narrow(const Wide& a) {
    Floats r;
    FM_EACH r.v[lane] = static_cast<float>(a.v[lane]);
    return r;
}
#undef FM_EACH_SUM
#undef FM_EACH
