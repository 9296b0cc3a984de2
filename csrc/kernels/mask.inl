// Which entries of a delta survive: the keys, orders and random words that Keep rules ask for, as
// select, measure and consensus share them.

FM_INLINE Words magnitude(Floats delta) { return bits(delta) & spread(0x7FFFFFFFu); }

FM_INLINE Words flat_order(uint64_t index, int vector) {
    return group_numbers(vector) + spread(static_cast<uint32_t>(index));
}

// The high words of mixed indices (fastmerge.selection): murmur3's 32-bit finaliser (Appleby).
// `index`: any with their high word.
FM_INLINE Words mixed_orders(Words flat, uint64_t index) {
    const uint32_t high = static_cast<uint32_t>(index >> 32) * 0x9E3779B9u;
    Words h = flat ^ spread(high);
    h = (h ^ shift_right<16>(h)) * spread(0x85EBCA6Bu);
    h = (h ^ shift_right<13>(h)) * spread(0xC2B2AE35u);
    return h ^ shift_right<16>(h);
}
FM_INLINE Words mixed_order(uint64_t index, int vector) {
    return mixed_orders(flat_order(index, vector), index);
}

FM_INLINE void random_words(const Keep& keep, uint64_t index, Words* words) {
    for (int vector = 0; vector < 2; vector += kPhiloxVectors)
        philox((index + static_cast<uint64_t>(vector * kLanes)) / 4, keep.round_keys,
               words + vector);
}

// Words that are 0 where the group's bit in the mask is set.
FM_INLINE void masked_words(const Keep& keep, uint64_t index, Words* words) {
    alignas(64) static constexpr uint32_t kBits[] = {
        1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
        1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
        1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
        1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};
    static_assert(32 % kGroup == 0, "a group's bits lie in one word");
    const uint32_t own = keep.mask[index / 32] >> index % 32;
    Floats bit[2];
    load_group(F32(), kBits, bit);
    for (int v = 0; v < 2; ++v) words[v] = (spread(own) & bits(bit[v])) ^ bits(bit[v]);
}

// Writes a group's bits in the mask, of which every four are in its two vectors by turns.
FM_INLINE void write_mask(const Mask* kept, uint64_t index, uint32_t* mask) {
    uint32_t both = 0;
    for (int v = 0; v < 2; ++v) {
        uint32_t own = lane_bits(kept[v]);
        own = (own | own << 8) & 0x00FF00FFu;
        own = (own | own << 4) & 0x0F0F0F0Fu;
        both |= own << 4 * v;
    }
    static_assert(kGroup % 8 == 0, "a group's bits are whole bytes");
    std::memcpy(reinterpret_cast<char*>(mask) + index / 8, &both, kGroup / 8);
}

// What decides by itself whether a group's entries survive, where the rule's kind has that.
FM_INLINE void words_of(const Keep& keep, int kind, uint64_t index, Words* words) {
    if (kind == Keep::kRandom) random_words(keep, index, words);
    if (kind == Keep::kMasked) masked_words(keep, index, words);
}

// A vector's entries that a rule of this kind (rule.kind, where that is not known before) keeps, by
// their magnitudes, orders in a tie and random words; only what the kind asks for is looked at.
FM_INLINE Mask survives(const Keep& rule, int kind, Words key, Words order, Words random) {
    if (kind == Keep::kRandom || kind == Keep::kMasked)
        return at_most(random, spread(rule.word_max));
    Words threshold = spread(static_cast<uint32_t>(rule.threshold));
    // One less where the entry would survive a tie, so that key > threshold decides either way.
    if (kind == Keep::kAboveOrTie || kind == Keep::kBand)
        threshold = decrease(threshold, at_most(order, spread(rule.order_max)));
    if (kind != Keep::kBand) return signed_above(key, threshold);
    const Words ceiling = decrease(spread(static_cast<uint32_t>(rule.ceiling)),
                                   at_most(order, spread(rule.ceiling_order_max)));
    return without(signed_above(key, threshold), signed_above(key, ceiling));
}
