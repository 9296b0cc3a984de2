#include "primitives/selection.h"

#include "simd/items.h"

namespace fastmerge {

Selection asked(const Sparsify& spec, int64_t count) {
    Selection selection;
    selection.kind = spec.kind;
    selection.tie_rule = spec.tie_rule;
    selection.keep_below = spec.keep_below;
    selection.key = spec.key;
    selection.kept = count;
    return selection;
}

RoundKeys round_keys(uint64_t key) {
    RoundKeys keys;
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (size_t round = 0; round < kPhiloxRounds; ++round) {
        keys[2 * round] = k0;
        keys[2 * round + 1] = k1;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return keys;
}

bool largest_order_word(std::optional<uint64_t> bound, TieRule rule, uint64_t index,
                        uint32_t& largest) {
    largest = 0xFFFFFFFFu;
    if (!bound) return true;
    const uint64_t high = index >> 32, bound_high = *bound >> 32, bound_low = *bound & 0xFFFFFFFFu;
    uint64_t below;  // how many order words are below the bound: 0 ... 2^32
    if (rule == TieRule::kMixed)
        below = bound_high + (high < bound_low ? 1 : 0);
    else
        below = high < bound_high ? uint64_t{1} << 32 : high > bound_high ? 0 : bound_low;
    if (below == 0) return false;
    largest = static_cast<uint32_t>(below - 1);
    return true;
}

namespace {

// Makes of a threshold and its tie bound a pair for key > threshold - (order word <= order_max), in
// the tile at `index`; false where no key is that large.
bool cut_in_tile(int32_t bits, std::optional<uint64_t> bound, TieRule rule, uint64_t index,
                 int32_t& threshold, uint32_t& order_max) {
    threshold = bits;
    if (largest_order_word(bound, rule, index, order_max)) return true;
    order_max = 0xFFFFFFFFu;  // no tied entry: every one from the next key on
    if (bits == 0x7FFFFFFF) return false;
    threshold = bits + 1;
    return true;
}

}  // namespace

Keep keep_in_tile(const Selection& selection, const RoundKeys& keys, uint64_t index) {
    Keep keep;
    keep.mixed = selection.tie_rule == TieRule::kMixed;
    keep.threshold = selection.threshold_bits;
    keep.round_keys = keys.data();
    if (selection.kind == Sparsity::kMagnitude) {
        const bool some =
            largest_order_word(selection.tie_bound, selection.tie_rule, index, keep.order_max);
        keep.kind = some ? Keep::kAboveOrTie : Keep::kAbove;
        if (some && keep.order_max == 0xFFFFFFFFu) {  // key >= threshold: the order does not matter
            keep.kind = Keep::kAbove;
            keep.threshold -= 1;
        }
        if (cut_in_tile(selection.ceiling_bits, selection.ceiling_bound, selection.tie_rule, index,
                        keep.ceiling, keep.ceiling_order_max) &&
            cut_in_tile(selection.threshold_bits, selection.tie_bound, selection.tie_rule, index,
                        keep.threshold, keep.order_max))
            keep.kind = Keep::kBand;
    } else if (selection.kind == Sparsity::kRanked) {
        keep.kind = Keep::kMasked;
        keep.mask = selection.mask;
    } else if (selection.kind == Sparsity::kRandom) {
        keep.kind = Keep::kRandom;
        keep.word_max = static_cast<uint32_t>(selection.keep_below - 1);
        if (selection.mask) {
            keep.kind = Keep::kMasked;
            keep.mask = selection.mask;
            keep.word_max = 0;
        } else if (selection.keep_below == 0) {  // no key is above the largest
            keep.kind = Keep::kAbove;
            keep.threshold = 0x7FFFFFFF;
        } else if (selection.keep_below > 0xFFFFFFFFu) {
            keep.kind = Keep::kAll;
        }
    }
    return keep;
}

}  // namespace fastmerge
