// The passes behind `select`: count magnitudes against a window, count tied entries by their order,
// and measure L1 masses. A tile is small enough to stay in the first-level cache, so each delta
// takes its own turn over it, with its constants and counters in registers.

template <class T, bool kPartial>
struct Deltas {
    const char* x;
    const char* base;
    Floats operator()(int64_t at, int vector, Part part) const {
        return read<kPartial>(T(), x + at * T::kBytes, vector, part) -
               read<kPartial>(T(), base + at * T::kBytes, vector, part);
    }
};

struct KeyCounters {
    Words above, peak0, peak1;
};

// kOneKey: the window is its first peak alone and nothing is ever gathered.
template <class T, bool kOneKey, bool kPartial>
inline void count_keys_group(const Deltas<T, kPartial>& deltas, Window& window, int64_t at,
                             Part part, KeyCounters& counters) {
    const Words high = spread(static_cast<uint32_t>(window.high));
    const Words below = spread(static_cast<uint32_t>(window.low - 1));
    const Words peak0 = spread(static_cast<uint32_t>(window.peaks[0]));
    const Words peak1 = spread(static_cast<uint32_t>(window.peaks[1]));
    Words key[2];
    Mask rest[2];
    for (int v = 0; v < 2; ++v) {
        key[v] = magnitude(deltas(at, v, part));
        Mask over = signed_above(key[v], high), at0 = equal(key[v], peak0);
        if (kPartial) over = over & present(v, part), at0 = at0 & present(v, part);
        counters.above = count(counters.above, over);
        counters.peak0 = count(counters.peak0, at0);
        if (kOneKey) continue;
        Mask at1 = equal(key[v], peak1), from_low = signed_above(key[v], below);
        if (kPartial) at1 = at1 & present(v, part), from_low = from_low & present(v, part);
        counters.peak1 = count(counters.peak1, at1);
        rest[v] = without(from_low, over | at0 | at1);
    }
    if (!kOneKey && any(rest[0] | rest[1]))
        for (int v = 0; v < 2; ++v)
            window.gathered_count +=
                compress(window.gathered + window.gathered_count, key[v], rest[v]);
}

template <class T, bool kOneKey>
void count_keys_tile(const DeltaArgs& args, int j, Window& window) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    KeyCounters counters = {spread(0u), spread(0u), spread(0u)};
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        count_keys_group<T, kOneKey>(Deltas<T, false>{x, base}, window, at, {}, counters);
    if (at < args.count)
        count_keys_group<T, kOneKey>(Deltas<T, true>{x, base}, window, at,
                                     {0, static_cast<int>(args.count - at)}, counters);
    window.above += sum(counters.above);
    window.at_peak[0] += sum(counters.peak0);
    window.at_peak[1] += sum(counters.peak1);
}

template <class T>
void count_keys(const DeltaArgs& args, Window* windows) {
    for (int j = 0; j < args.inputs_count; ++j) {
        Window& window = windows[j];
        if (window.low == window.high && window.low == window.peaks[0])
            count_keys_tile<T, true>(args, j, window);
        else
            count_keys_tile<T, false>(args, j, window);
    }
}

template <class T, bool kMixed, bool kPartial>
inline void count_ties_group(const Deltas<T, kPartial>& deltas, TieWindow& window, uint64_t index,
                             int64_t at, Part part, Words& below_counter) {
    const Words key = spread(static_cast<uint32_t>(window.key));
    Mask tied[2];
    for (int v = 0; v < 2; ++v) {
        tied[v] = equal(magnitude(deltas(at, v, part)), key);
        if (kPartial) tied[v] = tied[v] & present(v, part);
    }
    // Two multiplications per order word: half of the pass, where one entry in 200 is tied.
    if (!any(tied[0] | tied[1])) return;
    const Mask any_below = equal(spread(window.any_below ? 1u : 0u), spread(1u));
    Words order[2];
    Mask inside[2];
    for (int v = 0; v < 2; ++v) {
        order[v] = kMixed ? mixed_order(index, v) : flat_order(index, v);
        const Mask below = at_most(order[v], spread(window.below)) & tied[v] & any_below;
        below_counter = count(below_counter, below);
        inside[v] = without(at_most(order[v], spread(window.last)) & tied[v], below);
    }
    if (any(inside[0] | inside[1]))
        for (int v = 0; v < 2; ++v)
            window.gathered_count +=
                compress(window.gathered + window.gathered_count, order[v], inside[v]);
}

template <class T, bool kMixed>
void count_ties_tile(const DeltaArgs& args, int j, TieWindow& window) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    Words below_counter = spread(0u);
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        count_ties_group<T, kMixed>(Deltas<T, false>{x, base}, window,
                                    args.index + static_cast<uint64_t>(at), at, {}, below_counter);
    if (at < args.count)
        count_ties_group<T, kMixed>(Deltas<T, true>{x, base}, window,
                                    args.index + static_cast<uint64_t>(at), at,
                                    {0, static_cast<int>(args.count - at)}, below_counter);
    window.below_count += sum(below_counter);
}

template <class T>
void count_ties(const DeltaArgs& args, TieWindow* windows) {
    for (int j = 0; j < args.inputs_count; ++j) {
        if (!windows[j].any) continue;
        if (windows[j].mixed)
            count_ties_tile<T, true>(args, j, windows[j]);
        else
            count_ties_tile<T, false>(args, j, windows[j]);
    }
}

template <class T, int kKind, bool kPartial>
inline void measure_group(const Deltas<T, kPartial>& deltas, const Keep& keep_rule, uint64_t index,
                          int64_t at, Part part, Doubles& all, Doubles& kept, Words& counter) {
    Words random[2] = {spread(0u), spread(0u)};
    if (kKind == Keep::kRandom) random_words(keep_rule, index, random);
    Floats size[2], kept_size[2];
    for (int v = 0; v < 2; ++v) {
        const Words key = magnitude(deltas(at, v, part));
        Mask survives;
        if (kKind == Keep::kRandom) {
            survives = at_most(random[v], spread(keep_rule.word_max));
        } else {
            const Words threshold = spread(static_cast<uint32_t>(keep_rule.threshold));
            survives = signed_above(key, threshold);
            if (kKind == Keep::kAboveOrTie) {
                const Words order = keep_rule.mixed ? mixed_order(index, v) : flat_order(index, v);
                survives = survives |
                           (equal(key, threshold) & at_most(order, spread(keep_rule.order_max)));
            }
        }
        if (kPartial) survives = survives & present(v, part);
        counter = count(counter, survives);
        size[v] = floats(key);
        kept_size[v] = keep(survives, size[v]);
    }
    all = accumulate(all, size[0], size[1]);
    kept = accumulate(kept, kept_size[0], kept_size[1]);
}

template <class T, int kKind>
void measure_tile(const DeltaArgs& args, int j, Mass& mass) {
    const char* x = static_cast<const char*>(args.inputs[j]);
    const char* base = static_cast<const char*>(args.base);
    Doubles all = load_sums(mass.all), kept = load_sums(mass.kept);
    Words counter = spread(0u);
    int64_t at = 0;
    for (; at + kGroup <= args.count; at += kGroup)
        measure_group<T, kKind>(Deltas<T, false>{x, base}, mass.keep,
                                args.index + static_cast<uint64_t>(at), at, {}, all, kept, counter);
    if (at < args.count)
        measure_group<T, kKind>(Deltas<T, true>{x, base}, mass.keep,
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
            case Keep::kRandom:
                measure_tile<T, Keep::kRandom>(args, j, masses[j]);
                break;
        }
}
