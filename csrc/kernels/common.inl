// What the kernels share. Elements are worked on in groups of two vectors; a group at an end of a
// tile that is not full goes through small padded buffers, so there is one path for the arithmetic.

// For the body of a hot loop: called out of line, it would load its constants anew for every group.
#ifndef FM_INLINE
#define FM_INLINE __attribute__((always_inline)) inline
#endif

constexpr int kGroup = 2 * kLanes;

struct Part {
    int first, last;  // the group's elements that exist
};

inline int clamp_lane(int lane) { return lane < 0 ? 0 : lane > kLanes ? kLanes : lane; }

// How far ahead of its reads a loop asks for memory. The hardware's own prefetcher stops at every
// page, which is every bf16 tile: asking took 60 % off a Gram pass, 25 % off a trim's passes and 43
// % off DARE's (1, 2 and 4 KiB ahead alike).
constexpr int64_t kPrefetchBytes = 2048;

// The group's vector 0 or 1; `group` is where element 0 of the group would be.
template <bool kPartial, class T>
inline Floats read(T type, const char* group, int vector, Part part) {
    const char* from = group + static_cast<int64_t>(vector) * kLanes * T::kBytes;
    if (!kPartial) {
        __builtin_prefetch(from + kPrefetchBytes);
        return load(type, from);
    }
    const int first = clamp_lane(part.first - vector * kLanes);
    const int last = clamp_lane(part.last - vector * kLanes);
    char padded[kLanes * 4] = {};
    if (first < last)
        std::memcpy(padded + first * T::kBytes, from + first * T::kBytes,
                    static_cast<size_t>(last - first) * T::kBytes);
    return load(type, padded);
}

template <bool kPartial, class T>
inline void write(T type, char* group, int vector, Part part, Floats a) {
    char* to = group + static_cast<int64_t>(vector) * kLanes * T::kBytes;
    if (!kPartial) return store(type, to, a);
    const int first = clamp_lane(part.first - vector * kLanes);
    const int last = clamp_lane(part.last - vector * kLanes);
    char padded[kLanes * 4];
    store(type, padded, a);
    if (first < last)
        std::memcpy(to + first * T::kBytes, padded + first * T::kBytes,
                    static_cast<size_t>(last - first) * T::kBytes);
}

// Lanes of the group's vector that exist, where only the end is cut.
inline Mask present(int vector, Part part) {
    const Words lanes = lane_numbers() + spread(static_cast<uint32_t>(vector * kLanes));
    return signed_above(spread(static_cast<uint32_t>(part.last)), lanes);
}

inline Words magnitude(Floats delta) { return bits(delta) & spread(0x7FFFFFFFu); }

inline Words flat_order(uint64_t index, int vector) {
    return lane_numbers() +
           spread(static_cast<uint32_t>(index) + static_cast<uint32_t>(vector * kLanes));
}

// The high word of fastmerge.sparsity.mixed_index: murmur3's 32-bit finaliser (Appleby).
inline Words mixed_order(uint64_t index, int vector) {
    const uint32_t high = static_cast<uint32_t>(index >> 32) * 0x9E3779B9u;
    Words h = flat_order(index, vector) ^ spread(high);
    h = (h ^ shift_right<16>(h)) * spread(0x85EBCA6Bu);
    h = (h ^ shift_right<13>(h)) * spread(0xC2B2AE35u);
    return h ^ shift_right<16>(h);
}

inline void random_words(const Keep& keep, uint64_t index, Words* words) {
    for (int vector = 0; vector < 2; vector += kPhiloxVectors)
        philox((index + static_cast<uint64_t>(vector * kLanes)) / 4, keep.round_keys,
               words + vector);
}

template <class T>
void widen(const void* in, float* out, int64_t count) {
    const char* from = static_cast<const char*>(in);
    char* to = reinterpret_cast<char*>(out);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(F32(), to + 4 * i, load(T(), from + T::kBytes * i));
    const Part rest = {0, static_cast<int>(count - i)};
    if (i < count)
        write<true>(F32(), to + 4 * i, 0, rest, read<true>(T(), from + T::kBytes * i, 0, rest));
}

template <class T>
void narrow(const float* in, void* out, int64_t count) {
    const char* from = reinterpret_cast<const char*>(in);
    char* to = static_cast<char*>(out);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(T(), to + T::kBytes * i, load(F32(), from + 4 * i));
    const Part rest = {0, static_cast<int>(count - i)};
    if (i < count)
        write<true>(T(), to + T::kBytes * i, 0, rest, read<true>(F32(), from + 4 * i, 0, rest));
}

// Elements whose exponent bits are all ones. The compiler vectorises this; 16-bit counters let it
// work on full vectors of 16-bit elements.
template <class Item, Item kExponent>
int64_t nonfinite(const void* in, int64_t count) {
    const char* from = static_cast<const char*>(in);
    int64_t total = 0;
    for (int64_t begin = 0; begin < count; begin += kTile) {
        const int64_t end = begin + kTile < count ? begin + kTile : count;
        Item found = 0;
        for (int64_t i = begin; i < end; ++i) {
            Item item;
            std::memcpy(&item, from + i * static_cast<int64_t>(sizeof item), sizeof item);
            found = static_cast<Item>(found + ((item & kExponent) == kExponent));
        }
        total += found;
    }
    return total;
}
