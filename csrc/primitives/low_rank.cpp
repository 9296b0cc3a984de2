#include "primitives/low_rank.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa/table.h"

namespace fastmerge {

LowRank::LowRank(const Span& base, const Span& left, const Span& right, int64_t rank, float scale,
                 std::vector<float> factors, bool by_column)
    : base_(base),
      left_(left),
      right_(right),
      rank_(rank),
      cols_(rank > 0 ? right.count / rank : 0),
      scale_(scale),
      factors_(std::move(factors)),
      by_column_(by_column) {
    if (base.dtype == DType::kRaw) throw std::invalid_argument("the base must not be RAW");
    if (left.dtype != DType::kF32 || right.dtype != DType::kF32 || left.elements || right.elements)
        throw std::invalid_argument("the factors must be F32 and have an address");
    if (rank < 1 || left.count % rank || right.count % rank || cols_ < 1)
        throw std::invalid_argument("the factors must be rows x rank and rank x cols");
    const int64_t rows = left.count / rank;
    if (rows > base.count / cols_ || rows * cols_ != base.count)
        throw std::invalid_argument("rows times cols must be the base's element count");
    const int64_t wanted = by_column ? cols_ : rows;
    if (!factors_.empty() && static_cast<int64_t>(factors_.size()) != wanted)
        throw std::invalid_argument("one factor for each row or column is needed");
}

const void* LowRank::read(int64_t first, int64_t count, DType, void* buffer) const {
    alignas(64) float stored[kTile];
    LowRankArgs args = {};
    args.rank = rank_;
    args.cols = cols_;
    args.scale = scale_;
    args.per_element = by_column_;
    const float* const left = reinterpret_cast<const float*>(left_.at(0));
    const float* const right = reinterpret_cast<const float*>(right_.at(0));
    for (int64_t at = first, end = first + count; at < end; at += args.count) {
        const int64_t row = at / cols_, column = at % cols_;
        args.count = std::min({end - at, cols_ - column, kTile});
        args.base = base_.read(at, args.count, stored);
        args.left = left + row * rank_;
        args.right = right + column;
        if (!factors_.empty()) args.factors = factors_.data() + (by_column_ ? column : row);
        args.out = static_cast<float*>(buffer) + (at - first);
        kernels().low_rank[static_cast<size_t>(base_.dtype)](args);
    }
    return buffer;
}

}  // namespace fastmerge
