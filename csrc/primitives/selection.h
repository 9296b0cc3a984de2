// The C++ face of fastmerge.selection: what a sparse merge keeps of each delta.
#pragma once
#include <array>
#include <cstdint>
#include <optional>

#include "isa/table.h"

namespace fastmerge {

enum class Sparsity : int { kAll = 0, kMagnitude = 1, kRandom = 2, kRanked = 3, kLast = kRanked };
enum class TieRule : int { kMixed = 0, kIndex = 1, kEvery = 2, kLast = kEvery };

struct Sparsify {
    Sparsity kind = Sparsity::kAll;
    int64_t keep = 0, skip = 0;
    TieRule tie_rule = TieRule::kMixed;
    uint64_t keep_below = 0;  // 0 ... 2^32
    uint64_t key = 0;
    bool rescale = false;
    uint64_t keep_below_top = 0;
    int64_t length = 0, stride = 1;
};

struct Selection {
    Sparsity kind = Sparsity::kAll;
    int32_t threshold_bits = 0;         // of the fp32 magnitude
    std::optional<uint64_t> tie_bound;  // none: every tied entry survives
    int32_t ceiling_bits = 0x7FFFFFFF;  // what lies above is dropped
    std::optional<uint64_t> ceiling_bound = 0;
    const uint32_t* mask = nullptr;  // kRanked, kRandom where it was kept: bits by flat index
    TieRule tie_rule = TieRule::kMixed;
    uint64_t keep_below = 0;
    uint64_t key = 0;
    float rescale = 1.0f;
    int64_t kept = 0;
};

// As far as it follows from the request alone, and whether that is all.
Selection asked(const Sparsify& spec, int64_t count);
inline bool is_settled(const Sparsify& spec) {
    return spec.kind == Sparsity::kAll || (spec.kind == Sparsity::kRandom && !spec.rescale);
}

using RoundKeys = std::array<uint64_t, 20>;
RoundKeys round_keys(uint64_t key);

// Among the order words of the tile at `index`, the largest whose order is below `bound`, of all
// without one; false where there is none.
bool largest_order_word(std::optional<uint64_t> bound, TieRule rule, uint64_t index,
                        uint32_t& largest);

// The selection as the kernels take it, for the tile at `index`.
Keep keep_in_tile(const Selection& selection, const RoundKeys& keys, uint64_t index);

}  // namespace fastmerge
