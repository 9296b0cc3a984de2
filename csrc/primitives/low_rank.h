// A matrix plus a product of two thin ones, computed where it is read.
#pragma once
#include <vector>

#include "tensor.h"

namespace fastmerge {

class LowRank : public Elements {
   public:
    // left: rows x rank; right: rank x cols; both F32, in place. factors: none, or one for each row
    // or, by_column, each column. Throws std::invalid_argument where sizes do not fit the base's.
    LowRank(const Span& base, const Span& left, const Span& right, int64_t rank, float scale,
            std::vector<float> factors, bool by_column);

    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override;
    int64_t count() const { return base_.count; }

   private:
    Span base_, left_, right_;
    int64_t rank_, cols_;
    float scale_;
    std::vector<float> factors_;
    bool by_column_;
};

}  // namespace fastmerge
