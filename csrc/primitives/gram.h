#pragma once
#include <vector>

#include "primitives/tiles.h"

namespace fastmerge {

// fp64 inner products of the inputs, or of [base, inputs - base] with fp32 differences: m x m
// numbers, row by row, for each vector that `vectors` makes of the tensors.
std::vector<double> gram(Pool& pool, const std::vector<Span>& inputs, const Span* base,
                         const Vectors& vectors);

}  // namespace fastmerge
