#pragma once
#include <vector>

#include "primitives/selection.h"
#include "primitives/tiles.h"

namespace fastmerge {

struct Agreement {
    bool elect, normalize;
    float scale;
    int64_t origin;  // flat index of the first element, a multiple of kTile
    Votes votes;
    bool counted;  // a share is 1, not the weight
};

// out = base + scale * merge of the selected, rescaled, weighted deltas. Returns the number of NaN
// and Inf stored.
int64_t consensus(Pool& pool, const std::vector<Span>& inputs, const Span& base,
                  const std::vector<float>& weights, const std::vector<Selection>& selections,
                  Sink& out, const Agreement& agreement);

}  // namespace fastmerge
