// What a draw by rank (primitives/draw.cpp) asks of one vector: of its keys, the fp32 bit patterns
// of |delta| with every NaN as one, of its entries' orders among equal keys, and of their random
// words; all in plain order.

inline uint32_t magnitudes(const float* deltas, int64_t count, uint32_t* keys) {
    constexpr uint32_t kNaN = 0x7FC00000;
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t key;
        std::memcpy(&key, deltas + i, sizeof key);
        key &= 0x7FFFFFFF;
        key = key < kNaN ? key : kNaN;
        keys[i] = key;
        most = most < key ? key : most;
    }
    return most;
}

// Writes whether each word is below `low`, and the places of those from `low` to `low + span`: the
// others' entries are kept or not at every rank. Returns how many; `places` has room for a vector
// more.
inline int64_t undecided(const uint32_t* words, int64_t count, uint32_t low, uint32_t span,
                         uint8_t* kept, uint32_t* places) {
    for (int64_t i = 0; i < count; ++i) kept[i] = words[i] < low;
    int64_t found = 0, i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Words over = load_words(words + i) + spread(0 - low);
        found += compress(places + found, lane_numbers() + spread(static_cast<uint32_t>(i)),
                          at_most(over, spread(span)));
    }
    for (; i < count; ++i)
        if (words[i] - low <= span) places[found++] = static_cast<uint32_t>(i);
    return found;
}

// The entries that come before one of this key and order.
inline int64_t entries_before(const uint32_t* keys, const uint32_t* orders, int64_t entries,
                              uint32_t key, uint32_t order) {
    Words less = spread(0u), tied = spread(0u);
    int64_t i = 0;
    for (; i + kLanes <= entries; i += kLanes) {
        const Words own = load_words(keys + i);
        less = count(less, signed_above(spread(key), own));
        tied = count(
            tied, without(equal(own, spread(key)), at_most(spread(order), load_words(orders + i))));
    }
    int64_t before = sum(less) + sum(tied);
    for (; i < entries; ++i) before += keys[i] < key || (keys[i] == key && orders[i] < order);
    return before;
}

// Writes the orders of the entries of one key; returns how many. `out` has room for a vector more.
inline int64_t orders_of(const uint32_t* keys, const uint32_t* orders, int64_t count, uint32_t key,
                         uint32_t* out) {
    int64_t found = 0, i = 0;
    for (; i + kLanes <= count; i += kLanes)
        found +=
            compress(out + found, load_words(orders + i), equal(load_words(keys + i), spread(key)));
    for (; i < count; ++i)
        if (keys[i] == key) out[found++] = orders[i];
    return found;
}
