// What the kernels share. Elements are worked on in groups of two vectors; a group at an end of a
// tile that is not full goes through small padded buffers, so there is one path for the arithmetic.

constexpr int kGroup = 2 * kLanes;
constexpr int64_t kBlock = 256;  // entries of loops that the compiler vectorises

FM_INLINE Words load_words(const uint32_t* from) { return bits(load(F32(), from)); }

// 0, 1, 2, ... in a vector's plain order.
FM_INLINE Words lane_numbers() {
    alignas(64) static constexpr uint32_t kNumbers[] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                        8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(kLanes <= 16);
    return load_words(kNumbers);
}

// Halves are for instruction sets that say how.
template <class T, class How>
FM_INLINE void load_group(T type, const void* from, Floats* x, How) {
    load_group(type, from, x);
}

struct Part {
    int first, last;  // the group's elements that exist
};

template <class T>
__attribute__((noinline)) void read_part(T type, const char* group, Part part, Floats* x) {
    char padded[kGroup * 4] = {};
    std::memcpy(padded + part.first * T::kBytes, group + part.first * T::kBytes,
                static_cast<size_t>(part.last - part.first) * T::kBytes);
    load_group(type, padded, x);
}

template <class T>
__attribute__((noinline)) void write_part(T type, char* group, Part part, const Floats* x) {
    char padded[kGroup * 4];
    store_group(type, padded, x);
    std::memcpy(group + part.first * T::kBytes, padded + part.first * T::kBytes,
                static_cast<size_t>(part.last - part.first) * T::kBytes);
}

// How far ahead of its reads a loop asks for memory. The hardware's own prefetcher stops at every
// page, which is every bf16 tile: asking took 60 % off a Gram pass, 25 % off a trim's passes and 43
// % off DARE's (1, 2 and 4 KiB ahead alike).
constexpr int64_t kPrefetchBytes = 2048;

// A group; `group` is where its element 0 would be.
template <bool kPartial, class T>
FM_INLINE void read(T type, const char* group, Part part, Floats* x) {
    if (kPartial) return read_part(type, group, part, x);
    for (int line = 0; line < kGroup * T::kBytes; line += 64)
        __builtin_prefetch(group + kPrefetchBytes + line);
    load_group(type, group, x);
}

template <bool kPartial, class T>
FM_INLINE void write(T type, char* group, Part part, const Floats* x) {
    kPartial ? write_part(type, group, part, x) : store_group(type, group, x);
}

// Lanes of the group's vector that exist, where only the end is cut.
FM_INLINE Mask present(int vector, Part part) {
    return signed_above(spread(static_cast<uint32_t>(part.last)), group_numbers(vector));
}

// kAhead: `in` is in memory rather than in the cache.
template <class From, class To, bool kAhead>
void convert(const void* in, void* out, int64_t count) {
    const char* from = static_cast<const char*>(in);
    char* to = static_cast<char*>(out);
    int64_t i = 0;
    constexpr int64_t kLine = 64 / From::kBytes;
    static_assert(kLine % kLanes == 0);
    for (; i + kLine <= count; i += kLine) {
        if (kAhead) __builtin_prefetch(from + From::kBytes * i + kPrefetchBytes);
        for (int64_t at = i; at < i + kLine; at += kLanes)
            store(To(), to + To::kBytes * at, load(From(), from + From::kBytes * at));
    }
    for (; i + kLanes <= count; i += kLanes)
        store(To(), to + To::kBytes * i, load(From(), from + From::kBytes * i));
    if (i == count) return;
    Floats x[2];
    const Part rest = {0, static_cast<int>(count - i)};
    read<true>(From(), from + From::kBytes * i, rest, x);
    write<true>(To(), to + To::kBytes * i, rest, x);
}
template <class T>
void widen(const void* in, float* out, int64_t count) {
    convert<T, F32, true>(in, out, count);
}
template <class T>
void narrow(const float* in, void* out, int64_t count) {
    convert<F32, T, false>(in, out, count);
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
