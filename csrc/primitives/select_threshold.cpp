// The exact k-th magnitude: a fixed sample brackets it, one pass counts the keys above the bracket
// and inside it, and where the bracket misses or holds too many values the next pass narrows it.
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <utility>

#include "primitives/select_impl.h"

namespace fastmerge {

namespace {

constexpr int32_t kLargestKey = 0x7FFFFFFF;
constexpr int64_t kChunk = 32;  // neighbouring elements sampled together
// A larger sample takes longer to sort, a smaller leaves more keys between its bounds: at the least
// of both it grows with the power 2/3 of the tensor's size.
constexpr int64_t kChunks = 4096, kFewestChunks = 128;      // of tensors from 61 Mi, up to 256 Ki
constexpr size_t kChunksAhead = 16;                         // asked for while one is read
constexpr int64_t kSampleAll = 2 * kFewestChunks * kChunk;  // up to here they are their own sample

int64_t chunks_of(int64_t count) {
    int64_t chunks = kFewestChunks;
    for (int64_t size = 1 << 18; size < count && chunks < kChunks; size *= 3) chunks *= 2;
    return chunks;
}
// Half the bracket, in standard deviations of the rank; of the orders that are kept of ties, too.
// Where it misses, in one of 16 000 tensors, there is one more pass.
constexpr double kSigmas = 4;
// A key of which a sample's bracket has fewer is not worth a comparison with every other key.
constexpr int64_t kFewestOfPeak = 16;
constexpr int64_t kBins = 2048;
// Keys that a pass keeps, 8 MiB of all deltas, so that no other one has to look into the bin that
// is left: of three deltas of 26 Mi entries without frequent keys, all between the bounds.
constexpr size_t kKeptAtMost = 1 << 21;

// Keys of one delta that a pass gathered, of one of the window's equal parts: how many there are,
// and between which they lie. No branch asks what is there already: it would be guessed wrong.
struct Bin {
    int64_t count = 0;
    int32_t least = kLargestKey, most = 0;

    void add(int64_t more, int32_t lowest, int32_t highest) {
        count += more;
        least = std::min(least, lowest);
        most = std::max(most, highest);
    }
};

struct Search {
    Threshold* threshold = nullptr;
    int32_t low = 0, high = kLargestKey;
    int32_t peaks[2] = {-1, -1};
    int shift = 0;
    bool found = false;
    bool guesses = false;  // the next pass is for threshold->guess, too
    // Results of a pass.
    int64_t above = 0;
    int64_t at_peak[2] = {0, 0};
    std::vector<Bin> bins;
    bool keeps = false;
    std::vector<int32_t> kept;  // the bins' keys, if it keeps them, unless they are too many

    // Those of the pieces that other processes may have counted.
    void put(Bytes& bytes) const {
        for (const int64_t count : {above, at_peak[0], at_peak[1]}) bytes.put(count);
        const auto full = [](const Bin& bin) { return bin.count > 0; };
        bytes.put(static_cast<int64_t>(std::count_if(bins.begin(), bins.end(), full)));
        for (size_t b = 0; b < bins.size(); ++b) {
            if (!full(bins[b])) continue;
            bytes.put(static_cast<int32_t>(b));
            bytes.put(bins[b].count);
            bytes.put(bins[b].least);
            bytes.put(bins[b].most);
        }
    }
    void add(Bytes& bytes) {
        above += bytes.take<int64_t>();
        for (int64_t& count : at_peak) count += bytes.take<int64_t>();
        for (auto left = bytes.take<int64_t>(); left > 0; --left) {
            const auto b = static_cast<size_t>(bytes.take<int32_t>());
            const auto more = bytes.take<int64_t>();
            const auto least = bytes.take<int32_t>();
            bins.at(b).add(more, least, bytes.take<int32_t>());
        }
    }
    void clear() {
        above = at_peak[0] = at_peak[1] = 0;
        bins.assign(kBins, Bin());
        kept.clear();
    }
    void narrow(int32_t new_low, int32_t new_high) {
        low = new_low;
        high = new_high;
        shift = 0;
        while (static_cast<int64_t>(high - low) >> shift >= kBins) ++shift;
    }
    size_t bin_of(int32_t key) const { return static_cast<size_t>((key - low) >> shift); }
};

// Appends the keys of some elements of a part.
void read_keys(const Part& part, size_t j, int64_t begin, int64_t length,
               std::vector<int32_t>& keys) {
    float x[kTile], base[kTile], stored[kTile];
    const Kernels& table = kernels();
    const auto widen = [&](const Span& span, float* to) {
        const void* from = span.read(begin, length, stored);
        table.widen[static_cast<size_t>(span.dtype)](from, to, length);
    };
    widen(part.inputs[j], x);
    widen(part.base, base);
    table.subtract(base, x, length);
    const size_t end = keys.size();
    keys.resize(end + static_cast<size_t>(length));
    std::memcpy(keys.data() + end, x, static_cast<size_t>(length) * sizeof *x);
    for (size_t i = end; i < keys.size(); ++i) keys[i] &= kLargestKey;
}

std::vector<int32_t> sample_keys(const Deltas& deltas, size_t j) {
    const int64_t count = deltas.count();
    std::vector<int32_t> keys;
    if (count <= kSampleAll) {
        keys.reserve(static_cast<size_t>(count));
        for (const Part& part : deltas.parts)
            for_each_tile(0, part.base.count, [&](int64_t begin, int64_t end) {
                read_keys(part, j, begin, end - begin, keys);
            });
        return keys;
    }
    // One chunk per equal part of the tensor, at a scattered place in it, or a matrix whose row
    // length divides the step would be sampled in a few columns only.
    const int64_t chunks = chunks_of(count), step = count / chunks;
    struct Place {
        const Part& part;
        int64_t at, length;
    };
    std::vector<Place> places;
    places.reserve(static_cast<size_t>(chunks));
    auto part = deltas.parts.begin();
    int64_t before = 0;  // elements of the parts before it
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t scattered = static_cast<uint32_t>(chunk) * 0x9E3779B9u;
        // Below 2**32 chunks of 2**31 elements: the product has room in 64 bits.
        const int64_t offset = static_cast<int64_t>(scattered) * (step - kChunk) >> 32;
        int64_t at = chunk * step + offset - before;
        while (at >= part->base.count) {
            at -= part->base.count;
            before += part->base.count;
            ++part;
        }
        places.push_back({*part, at, std::min(kChunk, part->base.count - at)});
    }
    keys.reserve(static_cast<size_t>(chunks * kChunk));
    for (size_t i = 0; i < places.size(); ++i) {
        // Nothing else would ask for what lies anywhere: that took two thirds of a sample's time.
        if (i + kChunksAhead < places.size()) {
            const Place& ahead = places[i + kChunksAhead];
            for (const Span* span : {&ahead.part.inputs[j], &ahead.part.base}) {
                if (span->elements) continue;
                __builtin_prefetch(span->at(ahead.at));
                __builtin_prefetch(span->at(ahead.at + ahead.length) - 1);
            }
        }
        read_keys(places[i].part, j, places[i].at, places[i].length, keys);
    }
    return keys;
}

// Descending; many of them by eleven bits at a time.
void sort_keys(std::vector<int32_t>& keys) {
    constexpr size_t kMany = 512;
    constexpr int kDigit = 11;
    constexpr uint32_t kDigits = 1 << kDigit;
    if (keys.size() < kMany) return std::sort(keys.begin(), keys.end(), std::greater<>());
    std::vector<int32_t> sorted(keys.size());
    for (int shift = 0; shift < 31; shift += kDigit) {
        const auto digit = [&](int32_t key) {
            return static_cast<size_t>(~static_cast<uint32_t>(key) >> shift & (kDigits - 1));
        };
        std::array<size_t, kDigits> ends = {};
        for (const int32_t key : keys) ++ends[digit(key)];
        size_t begin = 0;
        for (size_t& end : ends) begin += std::exchange(end, begin);
        for (const int32_t key : keys) sorted[ends[digit(key)]++] = key;
        keys.swap(sorted);
    }
}

// Reads the threshold off all the keys, sorted, which no pass need count then.
void settle(const std::vector<int32_t>& keys, Threshold& threshold) {
    threshold.key = keys[static_cast<size_t>(threshold.keep - 1)];
    const auto tied = std::equal_range(keys.begin(), keys.end(), threshold.key, std::greater<>());
    threshold.above = tied.first - keys.begin();
    threshold.ties = tied.second - tied.first;
}

// Which key is likely to be the threshold, and between which orders its last kept entry lies.
// `keys`: a sample of `count`, sorted; `end`: one past the last flat index.
TieGuess guess_ties(const std::vector<int32_t>& keys, int64_t count, int64_t end,
                    const Threshold& threshold, size_t room) {
    TieGuess guess;
    guess.room = room;
    if (threshold.rule == TieRule::kEvery || end > int64_t{1} << 32) return guess;
    const auto size = static_cast<double>(keys.size());
    const double share = static_cast<double>(threshold.keep) / static_cast<double>(count);
    const int32_t key = keys[std::min(keys.size() - 1, static_cast<size_t>(share * size))];
    const auto tied = std::equal_range(keys.begin(), keys.end(), key, std::greater<>());
    const auto ties = static_cast<double>(tied.second - tied.first);
    if (ties < static_cast<double>(kFewestOfPeak)) return guess;
    const double centre = (share * size - static_cast<double>(tied.first - keys.begin())) / ties;
    const double half = (kSigmas * std::sqrt(size * share * (1 - share)) + 4) / ties;
    const double from = std::max(0.0, centre - half), to = std::min(1.0, centre + half);
    if ((to - from) * ties / size * static_cast<double>(count) > static_cast<double>(room))
        return guess;
    const double last = threshold.rule == TieRule::kMixed ? 0xFFFFFFFFu : static_cast<double>(end);
    guess.key = key;
    guess.first = static_cast<uint32_t>(from * last);
    guess.last = static_cast<uint32_t>(to * last);
    return guess;
}

// `keys`: a sample of `count`, sorted.
Search bracket(const std::vector<int32_t>& keys, int64_t count, Threshold& threshold) {
    Search search;
    search.threshold = &threshold;
    const auto size = static_cast<int64_t>(keys.size());
    if (size == count) {
        settle(keys, threshold);
        search.found = true;
        return search;
    }
    const double share = static_cast<double>(threshold.keep) / static_cast<double>(count);
    const auto half = static_cast<int64_t>(kSigmas * std::sqrt(size * share * (1 - share))) + 8;
    // Ranks from the largest key down, the first being 0.
    const auto rank = static_cast<int64_t>(share * size);
    const int64_t first = std::max<int64_t>(0, rank - half);
    const int64_t last = std::min(size - 1, rank + half);
    search.narrow(rank + half < size ? keys[static_cast<size_t>(last)] : 0,
                  rank - half >= 0 ? keys[static_cast<size_t>(first)] : kLargestKey);
    // The two most frequent keys of the bracket are counted without being gathered: a fifth of a
    // bf16 delta can have one magnitude.
    int64_t best[2] = {kFewestOfPeak, kFewestOfPeak};
    for (int64_t at = first; at <= last;) {
        int64_t end = at;
        const int32_t key = keys[static_cast<size_t>(at)];
        while (end <= last && keys[static_cast<size_t>(end)] == key) ++end;
        const int slot = end - at > best[0] ? 0 : 1;
        if (end - at > best[slot]) {
            if (slot == 0) best[1] = best[0], search.peaks[1] = search.peaks[0];
            best[slot] = end - at, search.peaks[slot] = key;
        }
        at = end;
    }
    if (threshold.guess.key >= 0) {
        search.guesses = true;
        if (search.peaks[0] != threshold.guess.key)
            search.peaks[1] = std::exchange(search.peaks[0], threshold.guess.key);
    }
    return search;
}

// One task's ties at a guessed key, if there is one.
struct TieCounts {
    TieWindow window = {};
    std::vector<uint32_t> places, gathered;  // a tile's
    std::vector<uint32_t> words;

    explicit TieCounts(const Search& search) {
        if (!search.guesses) return;
        const TieGuess& guess = search.threshold->guess;
        places.resize(kTile + 16);
        gathered.resize(kTile + 16);
        window.mixed = search.threshold->rule == TieRule::kMixed;
        window.any = true;
        window.any_below = guess.first > 0;
        window.below = guess.first - 1;
        window.last = guess.last;
        window.gathered = gathered.data();
    }
    void add(int64_t number, uint64_t index, size_t room) {
        kernels().count_orders(places.data(), number, index, window);
        if (words.size() <= room)
            words.insert(words.end(), gathered.begin(), gathered.begin() + window.gathered_count);
        window.gathered_count = 0;
    }
};

// One task's counts.
struct Counts {
    std::vector<Window> windows;
    std::vector<std::vector<int32_t>> gathered;  // a tile's
    std::vector<std::vector<Bin>> bins;          // empty until something was gathered
    std::vector<std::vector<int32_t>> kept;
    std::vector<TieCounts> ties;
};

void count_piece(const Deltas& deltas, const std::vector<size_t>& which,
                 const std::vector<Search*>& searches) {
    std::mutex mutex;
    for (Search* search : searches) search->clear();
    for_each_block<Counts>(
        deltas, which, kSelectBlock,
        [&] {
            Counts counts;
            counts.bins.resize(searches.size());
            counts.kept.resize(searches.size());
            for (const Search* search : searches) {
                counts.gathered.emplace_back(kTile + 16);
                Window window = {};
                window.low = search->low;
                window.high = search->high;
                window.peaks[0] = search->peaks[0];
                window.peaks[1] = search->peaks[1];
                window.gathered = counts.gathered.back().data();
                counts.ties.emplace_back(*search);
                if (search->guesses) window.tied = counts.ties.back().places.data();
                counts.windows.push_back(window);
            }
            return counts;
        },
        [&](Counts& counts, const DeltaArgs& args, size_t type) {
            kernels().count_keys[type](args, counts.windows.data());
            for (size_t s = 0; s < searches.size(); ++s) {
                Window& window = counts.windows[s];
                if (window.tied_count > 0)
                    counts.ties[s].add(window.tied_count, args.index,
                                       searches[s]->threshold->guess.room);
                if (window.gathered_count == 0) continue;
                std::vector<Bin>& bins = counts.bins[s];
                if (bins.empty()) bins.resize(kBins);
                const int32_t* const begin = window.gathered;
                const int32_t* const end = begin + window.gathered_count;
                for (const int32_t* key = begin; key < end; ++key)
                    bins[searches[s]->bin_of(*key)].add(1, *key, *key);
                if (searches[s]->keeps) counts.kept[s].insert(counts.kept[s].end(), begin, end);
                window.gathered_count = 0;
            }
        },
        [&](const Counts& counts, int64_t) {
            const std::lock_guard<std::mutex> lock(mutex);
            for (size_t s = 0; s < searches.size(); ++s) {
                Search& search = *searches[s];
                search.above += counts.windows[s].above;
                search.at_peak[0] += counts.windows[s].at_peak[0];
                search.at_peak[1] += counts.windows[s].at_peak[1];
                const std::vector<Bin>& bins = counts.bins[s];
                for (size_t b = 0; b < bins.size(); ++b)
                    search.bins[b].add(bins[b].count, bins[b].least, bins[b].most);
                const std::vector<int32_t>& kept = counts.kept[s];
                if (search.kept.size() + kept.size() <= kKeptAtMost / searches.size())
                    search.kept.insert(search.kept.end(), kept.begin(), kept.end());
                TieGuess& guess = search.threshold->guess;
                guess.under += counts.ties[s].window.below_count;
                if (guess.words.size() <= guess.room)
                    guess.words.insert(guess.words.end(), counts.ties[s].words.begin(),
                                       counts.ties[s].words.end());
            }
        });
    for (Search* search : searches) search->guesses = false;
}

void count_window(const Deltas& deltas, const std::vector<size_t>& which,
                  const std::vector<Search*>& searches) {
    // Processes tell one another of their pieces no more than the bins.
    for (Search* search : searches) search->keeps = !deltas.pieces && search->peaks[0] < 0;
    count_in_pieces(deltas, searches,
                    [&](const Deltas& piece) { count_piece(piece, which, searches); });
}

// Looks for the threshold among a bin's keys, above which there are `above`; false where not all of
// them were kept.
bool find_among_kept(Search& search, const Bin& bin, int64_t above) {
    const auto inside = [&](int32_t key) { return key >= bin.least && key <= bin.most; };
    std::vector<int32_t> keys;
    for (const int32_t key : search.kept)
        if (inside(key)) keys.push_back(key);
    if (static_cast<int64_t>(keys.size()) != bin.count) return false;
    sort_keys(keys);
    Threshold own = *search.threshold;
    own.keep -= above;
    settle(keys, own);
    own.keep += above;
    own.above += above;
    *search.threshold = own;
    return search.found = true;
}

// Reads a pass's counts: either the threshold is known, or the window is smaller or elsewhere.
void resolve(Search& search) {
    Threshold& threshold = *search.threshold;
    if (threshold.keep <= search.above) return search.narrow(search.high + 1, kLargestKey);
    for (int peak = 0; peak < 2; ++peak) {
        const int32_t key = search.peaks[peak];
        if (key >= search.low && key <= search.high)
            search.bins[search.bin_of(key)].add(search.at_peak[peak], key, key);
    }
    int64_t above = search.above;
    for (int64_t b = kBins - 1; b >= 0; --b) {
        const Bin& bin = search.bins[static_cast<size_t>(b)];
        if (threshold.keep > above + bin.count) {
            above += bin.count;
            continue;
        }
        if (bin.least == bin.most) {
            threshold.key = bin.least;
            threshold.above = above;
            threshold.ties = bin.count;
            search.found = true;
            return;
        }
        if (!find_among_kept(search, bin, above)) search.narrow(bin.least, bin.most);
        return;
    }
    search.narrow(0, search.low - 1);
}

}  // namespace

void find_thresholds(const Deltas& deltas, const std::vector<size_t>& which,
                     std::vector<Threshold>& thresholds) {
    std::vector<std::vector<size_t>> sampled;  // the searches of each delta, which share its sample
    for (size_t i = 0; i < which.size(); ++i) {
        const auto own = std::find_if(sampled.begin(), sampled.end(), [&](const auto& others) {
            return deltas.same(which[others[0]], which[i]);
        });
        if (own == sampled.end())
            sampled.push_back({i});
        else
            own->push_back(i);
    }
    std::vector<Search> searches(which.size());
    const auto number = static_cast<int64_t>(sampled.size()), count = deltas.count();
    const int64_t together = count <= kTile ? number : 1;  // less than to wake a thread
    // Processes tell one another of no ties.
    const size_t room = deltas.pieces ? 0 : kKeptAtMost / which.size();
    deltas.pool.run(blocks_of(number, together), [&](int64_t task) {
        for (int64_t d = task * together; d < std::min(number, (task + 1) * together); ++d) {
            const std::vector<size_t>& own = sampled[static_cast<size_t>(d)];
            std::vector<int32_t> keys = sample_keys(deltas, which[own[0]]);
            sort_keys(keys);
            for (const size_t i : own) {
                thresholds[i].guess = guess_ties(keys, count, deltas.end(), thresholds[i], room);
                searches[i] = bracket(keys, count, thresholds[i]);
            }
        }
    });
    run_searches(
        which, searches,
        [&](const std::vector<size_t>& inputs, const std::vector<Search*>& open) {
            count_window(deltas, inputs, open);
        },
        resolve);
}

}  // namespace fastmerge
