// Delta, mask, weigh, elect, average, scale, add base, round: one pass in registers. The order of
// the fp32 operations is mergekit 0.1.5's (TIES: Yadav et al., arXiv:2306.01708): masks multiply,
// so that NaN and Inf survive them, sums start from +0, and nothing is fused. An election of
// unweighted deltas (as the paper's and PEFT's) comes before the weights.

// kKind: what all terms' Keep rules are, or kAnyKind.
constexpr int kAnyKind = -1;

enum class Elect { kNone, kWeighted, kUnweighted };

// +1, -1, or 0 (NaN, too).
FM_INLINE Floats sign_of(Floats x) {
    const Floats zero = spread(0.0f), one = spread(1.0f);
    const Floats negated = floats(bits(x) ^ bits(spread(-0.0f)));
    return keep(above(x, zero), one) - keep(above(negated, zero), one);
}

template <class T, int kInputs, int kKind, Elect kVotes, bool kPartial>
FM_INLINE void consensus_group(const ConsensusArgs& args, bool any_mixed, int64_t at, Part part) {
    constexpr bool kElect = kVotes != Elect::kNone, kUnweighted = kVotes == Elect::kUnweighted;
    const int inputs = kInputs ? kInputs : args.inputs_count;
    const uint64_t index = args.index + static_cast<uint64_t>(at);
    const Floats zero = spread(0.0f), one = spread(1.0f);
    Floats in_registers[kInputs ? kInputs : 1][2];
    Floats base[2], tuned[2], total[2] = {zero, zero};
    Words flat[2], mixed[2];
    read<kPartial>(T(), static_cast<const char*>(args.base) + at * T::kBytes, part, base);
    for (int v = 0; v < 2; ++v) {
        flat[v] = flat_order(index, v);
        mixed[v] = any_mixed ? mixed_order(index, v) : flat[v];
    }
    for (int j = 0; j < inputs; ++j) {
        const Term& term = args.terms[j];
        const Keep& rule = term.keep;
        const int kind = kKind == kAnyKind ? static_cast<int>(rule.kind) : kKind;
        const char* from = static_cast<const char*>(args.inputs[j]) + at * T::kBytes;
        Words random[2] = {flat[0], flat[1]};
        words_of(rule, kind, index, random);
        read<kPartial>(T(), from, part, tuned);
        for (int v = 0; v < 2; ++v) {
            Floats delta = tuned[v] - base[v];
            Floats factor = spread(term.on);
            if (kind != Keep::kAll) {
                const Words order = rule.mixed ? mixed[v] : flat[v];
                const Mask kept = survives(rule, kind, magnitude(delta), order, random[v]);
                // Sums start from +0, so the sign of a masked zero never shows; a factor that is
                // not finite makes NaN of it.
                factor =
                    kKind == kAnyKind ? choose(kept, factor, spread(term.off)) : keep(kept, factor);
            }
            delta = delta * factor;
            if (!kUnweighted && term.rescaled) delta = delta * spread(term.weight);
            const bool signs = kUnweighted && args.votes == Votes::kFrequency;
            total[v] = total[v] + (signs ? sign_of(delta) : delta);
            if (!kElect) continue;
            if (kInputs)
                in_registers[j][v] = delta;
            else
                store(F32(), args.scratch + j * kConsensusScratch + v * kLanes, delta);
        }
    }
    for (int v = 0; v < 2; ++v) {
        if (kElect) {
            const Floats minority_sign = keep(not_at_least(total[v], zero), spread(-0.0f));
            Floats sum = zero, weights = zero;
            for (int j = 0; j < inputs; ++j) {
                Floats delta = kInputs
                                   ? in_registers[j][v]
                                   : load(F32(), args.scratch + j * kConsensusScratch + v * kLanes);
                const Mask agrees = above(floats(bits(delta) ^ bits(minority_sign)), zero);
                if (kUnweighted) delta = delta * spread(args.terms[j].weight);
                sum = sum + delta * keep(agrees, one);
                weights = weights + keep(agrees, spread(args.terms[j].share));
            }
            total[v] = sum;
            if (args.normalize) total[v] = sum / choose(equal(weights, zero), one, weights);
        } else if (args.normalize) {
            total[v] = total[v] / spread(args.divisor);
        }
        if (args.scale != 1.0f) total[v] = total[v] * spread(args.scale);
        total[v] = base[v] + total[v];
    }
    write<kPartial>(T(), static_cast<char*>(args.out) + at * T::kBytes, part, total);
}

template <class T, int kInputs, int kKind, Elect kVotes>
void consensus_end(const ConsensusArgs& args, bool any_mixed, int64_t at) {
    const int64_t left = args.count - at;
    const Part part = {at < 0 ? static_cast<int>(-at) : 0,
                       left < kGroup ? static_cast<int>(left) : kGroup};
    consensus_group<T, kInputs, kKind, kVotes, true>(args, any_mixed, at, part);
}

template <class T, int kInputs, int kKind, Elect kVotes>
void consensus_tile(const ConsensusArgs& args) {
    bool any_mixed = false;
    for (int j = 0; j < args.inputs_count; ++j)
        any_mixed |= args.terms[j].keep.mixed && (args.terms[j].keep.kind == Keep::kAboveOrTie ||
                                                  args.terms[j].keep.kind == Keep::kBand);
    // Groups lie at multiples of kGroup in the flat index; the first and the last may be cut.
    int64_t at = -static_cast<int64_t>(args.index % kGroup);
    for (; at < args.count; at += kGroup) {
        if (at >= 0 && at + kGroup <= args.count)
            consensus_group<T, kInputs, kKind, kVotes, false>(args, any_mixed, at, {});
        else
            consensus_end<T, kInputs, kKind, kVotes>(args, any_mixed, at);
    }
}

template <class T, int kInputs>
void consensus_any(const ConsensusArgs& args) {
    if (!args.elect) return consensus_tile<T, kInputs, kAnyKind, Elect::kNone>(args);
    if (args.votes == Votes::kWeighted)
        return consensus_tile<T, kInputs, kAnyKind, Elect::kWeighted>(args);
    return consensus_tile<T, kInputs, kAnyKind, Elect::kUnweighted>(args);
}

template <class T, int kInputs>
void consensus_inputs(const ConsensusArgs& args) {
    int kind = args.terms[0].keep.kind;
    for (int j = 1; j < args.inputs_count; ++j)
        if (args.terms[j].keep.kind != kind) kind = kAnyKind;
    for (int j = 0; j < args.inputs_count; ++j)
        if (args.terms[j].off != 0) kind = kAnyKind;
    if (!args.elect || args.votes != Votes::kWeighted) return consensus_any<T, kInputs>(args);
    if (kind == Keep::kAboveOrTie)
        return consensus_tile<T, kInputs, Keep::kAboveOrTie, Elect::kWeighted>(args);
    if (kind == Keep::kBand) return consensus_tile<T, kInputs, Keep::kBand, Elect::kWeighted>(args);
    if (kind == Keep::kRandom)
        return consensus_tile<T, kInputs, Keep::kRandom, Elect::kWeighted>(args);
    if (kind == Keep::kMasked)
        return consensus_tile<T, kInputs, Keep::kMasked, Elect::kWeighted>(args);
    return consensus_any<T, kInputs>(args);
}

template <class T>
void consensus(const ConsensusArgs& args) {
    switch (args.inputs_count) {
        case 2:
            return consensus_inputs<T, 2>(args);
        case 3:
            return consensus_inputs<T, 3>(args);
        default:
            return consensus_any<T, 0>(args);
    }
}
