// Reading a span whose rows may lie anywhere.
#pragma once
#include "tensor.h"

namespace fastmerge {

// Elements [begin, begin + count) as the span's dtype: in place where they are contiguous, else
// copied to `buffer`, which has room for them. Rows of another type than the span's, which is then
// fp32, are widened.
const void* read(const Span& span, int64_t begin, int64_t count, void* buffer);

}  // namespace fastmerge
