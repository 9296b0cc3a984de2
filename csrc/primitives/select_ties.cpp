// The tie bound: the `wanted`-th smallest order among tied entries. Mixed indices are spread evenly
// over 64 bits, so their number brackets the bound: one pass counts those below the bracket and
// gathers the few inside it.
#include <cmath>
#include <mutex>

#include "primitives/select_impl.h"

namespace fastmerge {

namespace {

constexpr size_t kGatherAtMost = 1 << 18;
constexpr double kSigmas = 6;
constexpr uint64_t kLast = ~uint64_t{0};

// What is known: `below` tied entries have orders under `first`, `inside` lie in [first, last].
// Each pass looks at [from, to] within that.
struct Search {
    TieBound* bound = nullptr;
    uint64_t first = 0, last = kLast;
    int64_t below = 0, inside = 0;
    uint64_t from = 0, to = kLast;
    int passes = 0;
    bool found = false;
    // Results of a pass.
    int64_t under = 0, gathered_count = 0;
    std::vector<uint64_t> gathered;  // all of [from, to], unless there are more than kGatherAtMost

    // Those of the pieces that other processes may have counted. What a piece gathers is all of it
    // or nothing, whatever the order of its blocks: every process must read the same.
    void put(Bytes& bytes) const {
        const bool all = gathered_count <= static_cast<int64_t>(kGatherAtMost);
        bytes.put(under);
        bytes.put(gathered_count);
        bytes.put_all(all ? gathered : std::vector<uint64_t>());
    }
    void add(Bytes& bytes) {
        under += bytes.take<int64_t>();
        gathered_count += bytes.take<int64_t>();
        bytes.take_all(gathered);
    }
    void clear() {
        under = gathered_count = 0;
        gathered.clear();
    }

    void aim() {
        // Not spread evenly, and so few that one more pass gathers all of them.
        if (passes > 0 && inside <= static_cast<int64_t>(kGatherAtMost)) {
            from = first;
            to = last;
            return;
        }
        const double width = static_cast<double>(last - first) + 1;
        const double share =
            (static_cast<double>(bound->wanted - below) - 0.5) / static_cast<double>(inside);
        double half = 0.25;  // halve the range when the orders turn out not to be even
        if (passes++ < 3)
            half = kSigmas * std::sqrt(share * (1 - share) / static_cast<double>(inside)) +
                   4.0 / static_cast<double>(inside);
        const double centre = passes <= 3 ? share : 0.5;
        const auto at = [&](double part) {
            return part <= 0 ? first
                   : part >= 1
                       ? last
                       : first + std::min(last - first, static_cast<uint64_t>(part * width));
        };
        from = at(centre - half);
        to = at(centre + half);
    }
};

struct Counts {
    std::vector<TieWindow> windows;
    std::vector<std::vector<uint32_t>> words;  // one tile's
    std::vector<std::vector<uint64_t>> orders;
    std::vector<int64_t> gathered_counts;
};

void count_piece(const Deltas& deltas, const std::vector<size_t>& which,
                 const std::vector<Search*>& searches) {
    std::mutex mutex;
    for (Search* search : searches) search->clear();
    for_each_block<Counts>(
        deltas, which, kSelectBlock,
        [&] {
            Counts counts;
            counts.orders.resize(searches.size());
            counts.gathered_counts.resize(searches.size());
            for (const Search* search : searches) {
                const TieBound* bound = search->bound;
                counts.words.emplace_back(kTile + 16);
                TieWindow window = {};
                window.key = bound->key;
                window.mixed = bound->rule == TieRule::kMixed;
                window.gathered = counts.words.back().data();
                counts.windows.push_back(window);
            }
            return counts;
        },
        [&](Counts& counts, const DeltaArgs& args, size_t type) {
            for (size_t s = 0; s < searches.size(); ++s) {
                TieWindow& window = counts.windows[s];
                const Search& search = *searches[s];
                const TieRule rule = search.bound->rule;
                std::optional<uint64_t> end;
                if (search.to < kLast) end = search.to + 1;
                window.any_below = largest_order_word(search.from, rule, args.index, window.below);
                window.any = largest_order_word(end, rule, args.index, window.last);
            }
            kernels().count_ties[type](args, counts.windows.data());
            const uint64_t high = args.index >> 32;
            for (size_t s = 0; s < searches.size(); ++s) {
                TieWindow& window = counts.windows[s];
                counts.gathered_counts[s] += window.gathered_count;
                if (counts.orders[s].size() <= kGatherAtMost)
                    for (int64_t i = 0; i < window.gathered_count; ++i) {
                        const uint64_t word = window.gathered[i];
                        counts.orders[s].push_back(window.mixed ? word << 32 | high
                                                                : high << 32 | word);
                    }
                window.gathered_count = 0;
            }
        },
        [&](const Counts& counts, int64_t) {
            const std::lock_guard<std::mutex> lock(mutex);
            for (size_t s = 0; s < searches.size(); ++s) {
                Search& search = *searches[s];
                search.under += counts.windows[s].below_count;
                search.gathered_count += counts.gathered_counts[s];
                if (search.gathered.size() <= kGatherAtMost)
                    search.gathered.insert(search.gathered.end(), counts.orders[s].begin(),
                                           counts.orders[s].end());
            }
        });
}

void count_orders(const Deltas& deltas, const std::vector<size_t>& which,
                  const std::vector<Search*>& searches) {
    count_in_pieces(deltas, searches,
                    [&](const Deltas& piece) { count_piece(piece, which, searches); });
}

// The numbers change between passes only where a file is torn or written to, which its reader tells
// afterwards. No bound fits then: the search ends with any.
void give_up(Search& search) {
    search.bound->bound = search.first;
    search.found = true;
}

void resolve(Search& search) {
    TieBound& bound = *search.bound;
    if (bound.wanted <= search.under) {
        if (search.from == search.first) return give_up(search);
        search.last = search.from - 1;
        search.inside = search.under - search.below;
    } else if (bound.wanted > search.under + search.gathered_count) {
        if (search.to == search.last) return give_up(search);
        search.first = search.to + 1;
        search.inside -= search.under + search.gathered_count - search.below;
        search.below = search.under + search.gathered_count;
    } else if (search.gathered.size() == static_cast<size_t>(search.gathered_count)) {
        const auto nth = search.gathered.begin() + (bound.wanted - search.under - 1);
        std::nth_element(search.gathered.begin(), nth, search.gathered.end());
        bound.bound = *nth + 1;
        search.found = true;
    } else {
        search.first = search.from;
        search.last = search.to;
        search.below = search.under;
        search.inside = search.gathered_count;
    }
    if (search.found) return;
    if (search.inside < 1 || bound.wanted <= search.below) return give_up(search);
    search.aim();
}

// The `rank`-th smallest word of those from `first` to `last`, among which they are spread evenly.
uint32_t nth_word(const TieGuess& guess, int64_t rank) {
    constexpr uint32_t kBins = 4096;
    int shift = 0;
    while ((guess.last - guess.first) >> shift >= kBins) ++shift;
    std::vector<int64_t> counts(kBins);
    for (const uint32_t word : guess.words) ++counts[(word - guess.first) >> shift];
    uint32_t bin = 0;
    while (rank > counts[bin]) rank -= counts[bin++];
    std::vector<uint32_t> own;
    for (const uint32_t word : guess.words)
        if ((word - guess.first) >> shift == bin) own.push_back(word);
    std::nth_element(own.begin(), own.begin() + (rank - 1), own.end());
    return own[static_cast<size_t>(rank - 1)];
}

// Whether the pass for the threshold has found the bound, which spares one over all the deltas.
bool was_guessed(TieBound& bound) {
    const TieGuess& guess = *bound.guess;
    const auto known = static_cast<int64_t>(guess.words.size());
    if (guess.key != bound.key || guess.words.size() > guess.room) return false;
    if (bound.wanted <= guess.under || bound.wanted > guess.under + known) return false;
    const uint64_t last = nth_word(guess, bound.wanted - guess.under);
    bound.bound = (bound.rule == TieRule::kMixed ? last << 32 : last) + 1;
    return true;
}

}  // namespace

void find_tie_bounds(const Deltas& deltas, const std::vector<size_t>& which,
                     std::vector<TieBound>& bounds) {
    std::vector<Search> searches(which.size());
    deltas.pool.run(static_cast<int64_t>(which.size()), [&](int64_t i) {
        searches[static_cast<size_t>(i)].found = was_guessed(bounds[static_cast<size_t>(i)]);
    });
    for (size_t i = 0; i < which.size(); ++i) {
        searches[i].bound = &bounds[i];
        searches[i].inside = bounds[i].ties;
        if (bounds[i].rule == TieRule::kIndex)
            searches[i].last = static_cast<uint64_t>(deltas.end() - 1);
        searches[i].aim();
    }
    run_searches(
        which, searches,
        [&](const std::vector<size_t>& inputs, const std::vector<Search*>& open) {
            count_orders(deltas, inputs, open);
        },
        resolve);
}

}  // namespace fastmerge
