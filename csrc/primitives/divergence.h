#pragma once
#include <vector>

#include "primitives/tiles.h"

namespace fastmerge {

// Of each row of `cols` elements: sum p ln(p / q), p and q the softmax of x and base plus 1e-8
// each.
std::vector<double> divergences(Pool& pool, const Span& x, const Span& base, int64_t cols);

}  // namespace fastmerge
