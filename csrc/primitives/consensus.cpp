#include "primitives/consensus.h"

#include <cmath>
#include <string>

namespace fastmerge {

int64_t consensus(Pool& pool, const std::vector<Span>& inputs, const Span& base,
                  const std::vector<float>& weights, const std::vector<Selection>& selections,
                  Sink& out, const Agreement& agreement) {
    const size_t k = inputs.size();
    check_inputs(inputs, &base, out.count());
    if (weights.size() != k || selections.size() != k)
        throw std::invalid_argument("one weight and one selection per input are needed");
    if (out.dtype() == DType::kRaw) throw std::invalid_argument("the output must not be RAW");
    if (agreement.origin < 0 || agreement.origin % kTile != 0)
        throw std::invalid_argument("origin must be a multiple of " + std::to_string(kTile));

    std::vector<RoundKeys> keys;
    for (const Selection& selection : selections) keys.push_back(round_keys(selection.key));
    float divisor = 0;
    for (const float weight : weights) divisor += agreement.counted ? 1.0f : weight;
    if (std::fabs(divisor) < 1e-8f) divisor = 1;

    std::vector<Term> every(k);
    for (size_t j = 0; j < k; ++j) {
        Term& term = every[j];
        term.weight = weights[j];
        term.share = agreement.counted ? 1.0f : weights[j];
        term.rescaled = selections[j].rescale != 1.0f;
        // Without a rescale, delta * mask * weight is delta * (mask * weight): exact either way.
        const bool weighted = !agreement.elect || agreement.votes == Votes::kWeighted;
        term.on = term.rescaled ? selections[j].rescale : weighted ? weights[j] : 1.0f;
        term.off = 0.0f * term.on;
    }

    const auto make = [&] {
        return [&, terms = every, scratch = std::vector<float>(k * kConsensusScratch)](
                   TileReader& reader, int64_t begin, int64_t end, char* to) mutable {
            const auto index = static_cast<uint64_t>(agreement.origin + begin);
            for (size_t j = 0; j < k; ++j)
                terms[j].keep = keep_in_tile(selections[j], keys[j], index);
            reader.seek(begin, end - begin);
            ConsensusArgs args = {};
            args.inputs = reader.inputs();
            args.base = reader.base();
            args.out = to;
            args.terms = terms.data();
            args.inputs_count = static_cast<int>(k);
            args.elect = agreement.elect;
            args.normalize = agreement.normalize;
            args.votes = agreement.votes;
            args.divisor = divisor;
            args.scale = agreement.scale;
            args.index = index;
            args.count = end - begin;
            args.scratch = scratch.data();
            kernels().consensus[reader.type()](args);
        };
    };
    return fill_sink(pool, inputs, &base, out, make, kTile, out.dtype());
}

}  // namespace fastmerge
