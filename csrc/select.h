#pragma once
#include <vector>

#include "selection.h"
#include "tiles.h"

namespace fastmerge {

// For each delta inputs[j] - base (fp32), which entries survive. Exact; never sorts a tensor;
// memory beyond a few MiB per thread never depends on the tensors' size.
std::vector<Selection> select(Pool& pool, const std::vector<Span>& inputs, const Span& base,
                              const std::vector<Sparsify>& specs);

}  // namespace fastmerge
