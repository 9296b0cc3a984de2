#include "primitives/select.h"

#include "primitives/draw.h"
#include "primitives/select_impl.h"

namespace fastmerge {

namespace {

struct Masses {
    std::vector<Mass> of;
};

// Of blocks in order, of each delta in turn: sum |delta|, sum |kept delta|, kept entries.
struct Sums {
    std::vector<double> all, kept;
    std::vector<int64_t> counts;
};

void measure_piece(const Deltas& deltas, const std::vector<size_t>& which,
                   const std::vector<RoundKeys>& keys, const std::vector<Selection>& selections,
                   const std::vector<uint32_t*>& drawn, Sums& sums) {
    int64_t blocks = 0;
    for (const Part& part : deltas.parts) blocks += blocks_of(part.base.count, kSumBlock);
    const size_t k = which.size();
    sums.all.resize(static_cast<size_t>(blocks) * k);
    sums.kept.resize(sums.all.size());
    sums.counts.resize(sums.all.size());
    for_each_block<Masses>(
        deltas, which, kSumBlock, [&] { return Masses{std::vector<Mass>(k)}; },
        [&](Masses& masses, const DeltaArgs& args, size_t type) {
            for (size_t i = 0; i < k; ++i) {
                masses.of[i].keep = keep_in_tile(selections[which[i]], keys[i], args.index);
                masses.of[i].drawn = drawn[i];
            }
            kernels().measure[type](args, masses.of.data());
        },
        [&](const Masses& masses, int64_t block) {
            for (size_t i = 0; i < k; ++i) {
                const size_t at = static_cast<size_t>(block) * k + i;
                sums.all[at] = add_lanes(masses.of[i].all);
                sums.kept[at] = add_lanes(masses.of[i].kept);
                sums.counts[at] = masses.of[i].count;
            }
        });
}

// sum |delta| and sum |kept delta| in fixed blocks and order, and the number of kept entries; what
// was drawn at random is kept where there is a mask for it.
void measure(const Deltas& deltas, const std::vector<size_t>& which,
             const std::vector<Sparsify>& specs, const std::vector<uint32_t*>& masks,
             std::vector<Selection>& selections) {
    const size_t k = which.size();
    std::vector<RoundKeys> keys;
    std::vector<uint32_t*> drawn;
    for (const size_t j : which) {
        keys.push_back(round_keys(selections[j].key));
        const bool draws = selections[j].kind == Sparsity::kRandom && j < masks.size();
        drawn.push_back(draws ? masks[j] : nullptr);
    }
    const auto found = run_pass(deltas, [&](const Deltas& piece) {
        Sums sums;
        measure_piece(piece, which, keys, selections, drawn, sums);
        Bytes bytes;
        bytes.put_all(sums.all);
        bytes.put_all(sums.kept);
        bytes.put_all(sums.counts);
        return std::move(bytes).text();
    });
    std::vector<double> all, kept;
    std::vector<int64_t> counts;
    for (const std::string& text : found) {
        Bytes bytes(text);
        bytes.take_all(all);
        bytes.take_all(kept);
        bytes.take_all(counts);
    }
    if (kept.size() != all.size() || counts.size() != all.size())
        throw std::invalid_argument("a piece's sums are not of its blocks");
    for (size_t i = 0; i < k; ++i) {
        double all_sum = 0, kept_sum = 0;
        int64_t count = 0;
        for (size_t at = i; at < all.size(); at += k) {
            all_sum += all[at];
            kept_sum += kept[at];
            count += counts[at];
        }
        Selection& selection = selections[which[i]];
        selection.kept = count;
        if (drawn[i]) selection.mask = drawn[i];
        // mergekit 0.1.5 leaves a delta alone whose L1 norm is below 1e-7.
        if (specs[which[i]].rescale && !(all_sum < 1e-7) && !(kept_sum < 1e-7))
            selection.rescale = static_cast<float>(all_sum / kept_sum);
    }
}

// Whether the i-th trim is the second of its delta, above which entries are dropped.
bool is_ceiling(const std::vector<size_t>& trimmed, size_t i) {
    return i > 0 && trimmed[i - 1] == trimmed[i];
}

}  // namespace

std::vector<Selection> select(Pool& pool, const std::vector<Part>& parts,
                              const std::vector<Sparsify>& specs,
                              const std::vector<uint32_t*>& masks, const Pieces* pieces) {
    if (parts.empty()) throw std::invalid_argument("no inputs");
    int64_t free = 0;
    for (const Part& part : parts) {
        check_inputs(part.inputs, &part.base, part.base.count);
        if (specs.size() != part.inputs.size())
            throw std::invalid_argument("one request per input is needed");
        if (part.first < free || part.first % kTile != 0)
            throw std::invalid_argument("parts must follow each other, at multiples of a tile");
        free = part.first + part.base.count;
    }
    const Deltas deltas = {pool, parts, pieces};
    const int64_t count = deltas.count();

    std::vector<Selection> selections(specs.size());
    std::vector<size_t> ranked;
    std::vector<size_t> trimmed, measured;  // one that skips its largest is trimmed twice
    std::vector<Threshold> thresholds;
    const auto trim = [&](size_t j, int64_t rank) {
        trimmed.push_back(j);
        thresholds.emplace_back();
        thresholds.back().keep = rank;
        thresholds.back().rule = specs[j].tie_rule;
    };
    for (size_t j = 0; j < specs.size(); ++j) {
        const Sparsify& spec = specs[j];
        Selection& selection = selections[j] = asked(spec, count);
        if (spec.kind == Sparsity::kMagnitude) {
            if (spec.keep < 0 || spec.skip < 0 || spec.skip > count ||
                spec.keep > count - spec.skip)
                throw std::invalid_argument(
                    "keep and skip must be between 0 and the element count, and so must their sum");
            selection.kept = spec.keep;
            // To keep nothing: no key is above the largest, none is tied with it.
            selection.threshold_bits = 0x7FFFFFFF;
            selection.tie_bound = 0;
            if (spec.keep > 0) trim(j, spec.skip + spec.keep);
            if (spec.keep > 0 && spec.skip > 0) trim(j, spec.skip);
            if (spec.keep > 0 && spec.keep < count && spec.rescale) measured.push_back(j);
        } else if (spec.kind == Sparsity::kRanked) {
            if (parts.size() > 1) throw std::invalid_argument("a draw by rank is of one tensor");
            ranked.push_back(j);
            measured.push_back(j);
            if (j < masks.size()) selection.mask = masks[j];
        } else if (spec.kind == Sparsity::kRandom) {
            if (spec.keep_below > uint64_t{1} << 32)
                throw std::invalid_argument("keep_below must be at most 2**32");
            if (spec.keep_below == 0) selection.kept = 0;
            if (spec.keep_below > 0 && spec.keep_below <= 0xFFFFFFFFu) measured.push_back(j);
        }
    }

    draw_by_rank(pool, parts[0], ranked, specs, masks);
    if (!trimmed.empty()) find_thresholds(deltas, trimmed, thresholds);
    std::vector<size_t> tied;
    std::vector<bool> of_ceiling;
    std::vector<TieBound> bounds;
    for (size_t i = 0; i < trimmed.size(); ++i) {
        Selection& selection = selections[trimmed[i]];
        const bool ceiling = is_ceiling(trimmed, i);
        (ceiling ? selection.ceiling_bits : selection.threshold_bits) = thresholds[i].key;
        (ceiling ? selection.ceiling_bound : selection.tie_bound).reset();
        const int64_t wanted = thresholds[i].keep - thresholds[i].above;
        if (wanted == thresholds[i].ties || selection.tie_rule == TieRule::kEvery) continue;
        tied.push_back(trimmed[i]);
        of_ceiling.push_back(ceiling);
        TieBound bound;
        bound.key = thresholds[i].key;
        bound.rule = selection.tie_rule;
        bound.guess = &thresholds[i].guess;
        bound.ties = thresholds[i].ties;
        bound.wanted = wanted;
        bounds.push_back(bound);
    }
    if (!tied.empty()) find_tie_bounds(deltas, tied, bounds);
    for (size_t i = 0; i < tied.size(); ++i) {
        Selection& selection = selections[tied[i]];
        (of_ceiling[i] ? selection.ceiling_bound : selection.tie_bound) = bounds[i].bound;
    }
    if (!measured.empty()) measure(deltas, measured, specs, masks, selections);
    return selections;
}

}  // namespace fastmerge
