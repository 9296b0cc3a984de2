// The passes behind `select`: count magnitudes against a window, count tied entries by their order,
// and measure L1 masses. A tile is small enough to stay in the first-level cache, so each delta
// takes its own turn over it, with its constants and counters in registers.

template <class T, bool kPartial>
struct Deltas {
    const char* x;
    const char* base;
    // Their magnitudes' bit patterns.
    FM_INLINE void keys(int64_t at, Part part, Words* key) const {
        Floats tuned[2], origin[2];
        read<kPartial>(T(), x + at * T::kBytes, part, tuned);
        read<kPartial>(T(), base + at * T::kBytes, part, origin);
        for (int v = 0; v < 2; ++v) key[v] = magnitude(tuned[v] - origin[v]);
    }
};

struct KeyCounters {
    Words above, peak0, peak1;
};

// What a window asks for: kOne, its first peak alone, and nothing is ever gathered; kPeaks, which
// are counted and not gathered; kPlain, where no key is frequent.
enum class Ask { kOne, kPeaks, kPlain };

// kTied: the places in the tile of the entries at the first peak are written down, too.
template <class T, Ask kAsk, bool kTied, bool kPartial>
FM_INLINE void count_keys_group(const Deltas<T, kPartial>& deltas, const Window& window, int64_t at,
                                Part part, KeyCounters& counters, int32_t*& gathered,
                                uint32_t*& tied) {
    const Words high = spread(static_cast<uint32_t>(window.high));
    const Words below = spread(static_cast<uint32_t>(window.low - 1));
    const Words peak0 = spread(static_cast<uint32_t>(window.peaks[0]));
    const Words peak1 = spread(static_cast<uint32_t>(window.peaks[1]));
    Words key[2];
    Mask rest[2], first[2];
    deltas.keys(at, part, key);
    for (int v = 0; v < 2; ++v) {
        Mask over = signed_above(key[v], high);
        if (kPartial) over = over & present(v, part);
        counters.above = count(counters.above, over);
        if (kAsk != Ask::kPlain) {
            first[v] = equal(key[v], peak0);
            if (kPartial) first[v] = first[v] & present(v, part);
            if (!kTied) counters.peak0 = count(counters.peak0, first[v]);
            over = over | first[v];
        }
        if (kAsk == Ask::kOne) continue;
        Mask from_low = signed_above(key[v], below);
        if (kPartial) from_low = from_low & present(v, part);
        if (kAsk == Ask::kPeaks) {
            Mask at1 = equal(key[v], peak1);
            if (kPartial) at1 = at1 & present(v, part);
            counters.peak1 = count(counters.peak1, at1);
            over = over | at1;
        }
        rest[v] = without(from_low, over);
    }
    if (kTied && !(kDearCompress && !any(first[0] | first[1])))
        for (int v = 0; v < 2; ++v)
            tied += compress(tied, flat_order(static_cast<uint64_t>(at), v), first[v]);
    if (kAsk == Ask::kOne || (kDearCompress && !any(rest[0] | rest[1]))) return;
    for (int v = 0; v < 2; ++v) gathered += compress(gathered, key[v], rest[v]);
}

template <class T, Ask kAsk, bool kTied>
void count_keys_tile(const DeltaArgs& args, int j, Window& window) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    KeyCounters counters = {spread(0u), spread(0u), spread(0u)};
    int32_t* gathered = window.gathered + window.gathered_count;
    uint32_t* tied = window.tied;
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        count_keys_group<T, kAsk, kTied>(Deltas<T, false>{x, base}, window, at, {}, counters,
                                         gathered, tied);
    if (at < args.count)
        count_keys_group<T, kAsk, kTied>(Deltas<T, true>{x, base}, window, at,
                                         {0, static_cast<int>(args.count - at)}, counters, gathered,
                                         tied);
    window.gathered_count = gathered - window.gathered;
    window.tied_count = tied - window.tied;
    window.above += sum(counters.above);
    window.at_peak[0] += kTied ? window.tied_count : sum(counters.peak0);
    window.at_peak[1] += sum(counters.peak1);
}

template <class T, Ask kAsk>
void count_keys_of(const DeltaArgs& args, int j, Window& window) {
    window.tied ? count_keys_tile<T, kAsk, true>(args, j, window)
                : count_keys_tile<T, kAsk, false>(args, j, window);
}

template <class T>
void count_keys(const DeltaArgs& args, Window* windows) {
    for (int j = 0; j < args.inputs_count; ++j) {
        Window& window = windows[j];
        if (window.peaks[0] < 0)
            count_keys_tile<T, Ask::kPlain, false>(args, j, window);
        else if (window.low == window.high && window.low == window.peaks[0])
            count_keys_of<T, Ask::kOne>(args, j, window);
        else
            count_keys_of<T, Ask::kPeaks>(args, j, window);
    }
}

// Writes the places in the tile of a group's entries with that key.
template <class T, bool kPartial>
FM_INLINE void tied_in_group(const Deltas<T, kPartial>& deltas, Words tied_key, int64_t at,
                             Part part, uint32_t*& places) {
    Words key[2];
    Mask tied[2];
    deltas.keys(at, part, key);
    for (int v = 0; v < 2; ++v) {
        tied[v] = equal(key[v], tied_key);
        if (kPartial) tied[v] = tied[v] & present(v, part);
    }
    if (kDearCompress && !any(tied[0] | tied[1])) return;
    for (int v = 0; v < 2; ++v)
        places += compress(places, flat_order(static_cast<uint64_t>(at), v), tied[v]);
}

// Of entries of a tile that are tied, the orders; `places` has room for one more vector.
inline void count_orders(uint32_t* places, int64_t number, uint64_t index, TieWindow& window) {
    uint32_t* const end = places + number;
    for (int lane = 0; lane < kLanes; ++lane) end[lane] = 0;
    Words below_counter = spread(0u);
    for (const uint32_t* from = places; from < end; from += kLanes) {
        const Mask here = signed_above(spread(static_cast<uint32_t>(end - from)), lane_numbers());
        const Words flat = load_words(from) + spread(static_cast<uint32_t>(index));
        const Words order = window.mixed ? mixed_orders(flat, index) : flat;
        Mask inside = at_most(order, spread(window.last)) & here;
        if (window.any_below) {
            const Mask below = at_most(order, spread(window.below)) & here;
            below_counter = count(below_counter, below);
            inside = without(inside, below);
        }
        window.gathered_count += compress(window.gathered + window.gathered_count, order, inside);
    }
    window.below_count += sum(below_counter);
}

// First which entries are tied, then the orders of those alone: half of all groups may have one, so
// that a branch in between would be guessed wrong.
template <class T>
void count_ties_tile(const DeltaArgs& args, int j, TieWindow& window) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    const Words key = spread(static_cast<uint32_t>(window.key));
    uint32_t places[kTile + kGroup], *end = places;
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        tied_in_group(Deltas<T, false>{x, base}, key, at, {}, end);
    if (at < args.count)
        tied_in_group(Deltas<T, true>{x, base}, key, at, {0, static_cast<int>(args.count - at)},
                      end);
    count_orders(places, end - places, args.index, window);
}

template <class T>
void count_ties(const DeltaArgs& args, TieWindow* windows) {
    for (int j = 0; j < args.inputs_count; ++j)
        if (windows[j].any) count_ties_tile<T>(args, j, windows[j]);
}

template <class T, int kKind, bool kPartial>
FM_INLINE void measure_group(const Deltas<T, kPartial>& deltas, const Mass& mass, uint64_t index,
                             int64_t at, Part part, Doubles& all, Doubles& kept, Words& counter) {
    const Keep& keep_rule = mass.keep;
    Words random[2] = {spread(0u), spread(0u)};
    words_of(keep_rule, kKind, index, random);
    Words key[2];
    Floats size[2], kept_size[2];
    Mask stays[2];
    deltas.keys(at, part, key);
    for (int v = 0; v < 2; ++v) {
        const bool orders = kKind == Keep::kAboveOrTie || kKind == Keep::kBand;
        const Words order =
            orders && keep_rule.mixed ? mixed_order(index, v) : flat_order(index, v);
        stays[v] = survives(keep_rule, kKind, key[v], order, random[v]);
        if (kPartial) stays[v] = stays[v] & present(v, part);
        counter = count(counter, stays[v]);
        size[v] = floats(key[v]);
        kept_size[v] = keep(stays[v], size[v]);
    }
    if (kKind == Keep::kRandom && mass.drawn) write_mask(stays, index, mass.drawn);
    all = accumulate(all, size);
    kept = accumulate(kept, kept_size);
}

template <class T, int kKind>
void measure_tile(const DeltaArgs& args, int j, Mass& mass) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    Doubles all = load_sums(mass.all), kept = load_sums(mass.kept);
    Words counter = spread(0u);
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        measure_group<T, kKind>(Deltas<T, false>{x, base}, mass,
                                args.index + static_cast<uint64_t>(at), at, {}, all, kept, counter);
    if (at < args.count)
        measure_group<T, kKind>(Deltas<T, true>{x, base}, mass,
                                args.index + static_cast<uint64_t>(at), at,
                                {0, static_cast<int>(args.count - at)}, all, kept, counter);
    store_sums(mass.all, all);
    store_sums(mass.kept, kept);
    mass.count += sum(counter);
}

template <class T>
void measure(const DeltaArgs& args, Mass* masses) {
    for (int j = 0; j < args.inputs_count; ++j) switch (masses[j].keep.kind) {
            case Keep::kAll:
                break;
            case Keep::kAbove:
                measure_tile<T, Keep::kAbove>(args, j, masses[j]);
                break;
            case Keep::kAboveOrTie:
                measure_tile<T, Keep::kAboveOrTie>(args, j, masses[j]);
                break;
            case Keep::kBand:
                measure_tile<T, Keep::kBand>(args, j, masses[j]);
                break;
            case Keep::kRandom:
                measure_tile<T, Keep::kRandom>(args, j, masses[j]);
                break;
            case Keep::kMasked:
                measure_tile<T, Keep::kMasked>(args, j, masses[j]);
                break;
        }
}

inline void fill_random(const uint64_t* round_keys, uint64_t index, int64_t count, uint32_t* out) {
    Keep keep;
    keep.round_keys = round_keys;
    for (int64_t at = -static_cast<int64_t>(index % kGroup); at < count; at += kGroup) {
        Words words[2];
        random_words(keep, index + static_cast<uint64_t>(at), words);
        const Floats raw[2] = {floats(words[0]), floats(words[1])};
        char* to = reinterpret_cast<char*>(out) + at * F32::kBytes;
        const Part part = {at < 0 ? static_cast<int>(-at) : 0,
                           count - at < kGroup ? static_cast<int>(count - at) : kGroup};
        if (part.first == 0 && part.last == kGroup)
            write<false>(F32(), to, part, raw);
        else
            write<true>(F32(), to, part, raw);
    }
}
