// Numbers to codes of few bits with scales.
#pragma once
#include "pool.h"
#include "primitives/dequantised.h"
#include "sink.h"

namespace fastmerge {

// What rounding to codes came to: how many of the source are NaN or Inf, and sums over the finite
// ones of (code * scale - x)^2 and x^2.
struct Rounding {
    int64_t nonfinite = 0;
    double error = 0, size = 0;
};

// Fills `codes` (RAW) and `scales` (F32, F16, BF16, or RAW for E8M0) from fp32 numbers at one
// address; layouts and `power_of_two` as in _C.pyi. Throws std::invalid_argument.
Rounding quantise(Pool& pool, const Span& source, Coding coding, int64_t rows, int64_t cols,
                  int64_t block_rows, int64_t block_cols, bool power_of_two, Sink& codes,
                  Sink& scales);

}  // namespace fastmerge
