#pragma once
#include <vector>

#include "primitives/selection.h"
#include "primitives/tiles.h"

namespace fastmerge {

// One tensor of every model; ``first`` is its first element's flat index, a multiple of kTile.
struct Part {
    std::vector<Span> inputs;
    Span base;
    int64_t first = 0;
};

// For each delta inputs[j] - base (fp32) of all parts as one vector, which entries survive. Exact;
// never sorts a tensor; `masks`, where a draw by rank is asked for, get its answer; memory beyond a
// few MiB per thread never depends on the tensors' size.
std::vector<Selection> select(Pool& pool, const std::vector<Part>& parts,
                              const std::vector<Sparsify>& specs,
                              const std::vector<uint32_t*>& masks = {});

}  // namespace fastmerge
