#pragma once
#include <vector>

#include "primitives/tiles.h"

namespace fastmerge {

// out = (sum_j c_j x_j) / divisor; coefficients: vectors x inputs, row by row. `wide`: in fp64,
// without a divisor. Returns the number of NaN and Inf stored.
int64_t combine(Pool& pool, const std::vector<Span>& inputs,
                const std::vector<double>& coefficients, Sink& out, const double* divisor,
                const Vectors& vectors, bool wide = false);

// Copies bytes.
void copy(Pool& pool, const Span& source, Sink& out);

// Whether two tensors are of one type and have the same bytes; reads little where they differ
// early.
bool equal(Pool& pool, const Span& a, const Span& b);

}  // namespace fastmerge
