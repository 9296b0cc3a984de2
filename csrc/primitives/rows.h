// A matrix whose rows may lie anywhere.
#pragma once
#include <vector>

#include "tensor.h"

namespace fastmerge {

// Rows of another type than is asked for, which is then fp32, are widened.
struct RowTable : Elements {
    std::vector<const char*> rows;
    std::vector<DType> types;
    int64_t cols = 0;

    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override;
};

}  // namespace fastmerge
