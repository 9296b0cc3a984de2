// A matrix (or several, one after another) plus a product of two thin ones, computed where it is
// read.
#pragma once
#include <vector>

#include "tensor.h"

namespace fastmerge {

class LowRank : public Elements {
   public:
    // left: rows x rank; right: rank x cols; both F32, in place, and as many times as there are
    // matrices. factors: none, or one for each row or, by_column, each column, of one matrix.
    // Throws std::invalid_argument where sizes do not fit the base's.
    LowRank(const Span& base, const Span& left, const Span& right, int64_t rank, float scale,
            std::vector<float> factors, bool by_column, int64_t matrices);

    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override;
    int64_t together() const override;
    int64_t count() const { return base_.count; }

   private:
    int64_t width() const;  // columns that are worked on together

    Span base_, left_;
    int64_t rank_, cols_, rows_;  // of one matrix
    // Each matrix's right, cut into blocks of that many columns, each of which is rank rows: a
    // block stays in the first-level cache for all rows of a read. In place, rows of 8 KiB lie in
    // the same sets of that cache: 1.4 times the CPU time at rank 16, 1.7 at 64 (loaded machine,
    // 5632 x 2048).
    std::vector<float> right_;
    float scale_;
    std::vector<float> factors_;
    bool by_column_;
};

}  // namespace fastmerge
