#include "primitives/low_rank.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa/table.h"

namespace fastmerge {

LowRank::LowRank(const Span& base, const Span& left, const Span& right, int64_t rank, float scale,
                 std::vector<float> factors, bool by_column, int64_t matrices)
    : base_(base),
      left_(left),
      rank_(rank),
      cols_(rank > 0 && matrices > 0 ? right.count / rank / matrices : 0),
      rows_(rank > 0 && matrices > 0 ? left.count / rank / matrices : 0),
      scale_(scale),
      factors_(std::move(factors)),
      by_column_(by_column) {
    if (base.dtype == DType::kRaw) throw std::invalid_argument("the base must not be RAW");
    if (left.dtype != DType::kF32 || right.dtype != DType::kF32 || left.elements || right.elements)
        throw std::invalid_argument("the factors must be F32 and have an address");
    if (matrices < 1) throw std::invalid_argument("there must be a matrix");
    if (rank < 1 || left.count % rank || right.count % rank || cols_ < 1 ||
        left.count != matrices * rows_ * rank || right.count != matrices * cols_ * rank)
        throw std::invalid_argument("the factors must be rows x rank and rank x cols");
    const int64_t rows = left.count / rank;
    if (rows > base.count / cols_ || rows * cols_ != base.count)
        throw std::invalid_argument("rows times cols must be the base's element count");
    const int64_t wanted = by_column ? cols_ : rows_;
    if (!factors_.empty() && (matrices > 1 || static_cast<int64_t>(factors_.size()) != wanted))
        throw std::invalid_argument("one factor for each row or column is needed");
    right_.reserve(static_cast<size_t>(right.count));
    const float* whole = reinterpret_cast<const float*>(right.at(0));
    for (int64_t matrix = 0; matrix < matrices; ++matrix, whole += rank_ * cols_)
        for (int64_t block = 0; block < cols_; block += width())
            for (int64_t k = 0; k < rank_; ++k)
                right_.insert(right_.end(), whole + k * cols_ + block,
                              whole + k * cols_ + std::min(cols_, block + width()));
}

const void* LowRank::read(int64_t first, int64_t count, DType, void* buffer) const {
    alignas(64) float stored[kTile];
    LowRankArgs args = {};
    args.rank = rank_;
    args.scale = scale_;
    args.per_element = by_column_;
    const float* const left = reinterpret_cast<const float*>(left_.at(0));
    const int64_t last = first + count, size = rows_ * cols_;
    for (int64_t at = first; at < last;) {  // what is read of one matrix
        const int64_t matrix = at / size;
        const int64_t stop = std::min(last, (matrix + 1) * size);
        const float* const right = right_.data() + matrix * rank_ * cols_;
        for (int64_t block = 0; block < cols_; block += width()) {
            const int64_t block_end = std::min(cols_, block + width());
            args.cols = block_end - block;
            for (int64_t row = at / cols_; row * cols_ + block < stop; ++row) {
                const int64_t begin = std::max(at, row * cols_ + block);
                const int64_t end = std::min(stop, row * cols_ + block_end);
                if (begin >= end) continue;
                const int64_t column = begin - row * cols_;
                args.count = end - begin;
                args.base = base_.read(begin, args.count, stored);
                args.left = left + row * rank_;
                args.right = right + block * rank_ + (column - block);
                if (!factors_.empty()) args.factors = factors_.data() + (by_column_ ? column : row);
                args.out = static_cast<float*>(buffer) + (begin - first);
                kernels().low_rank[static_cast<size_t>(base_.dtype)](args);
            }
        }
        at = stop;
    }
    return buffer;
}

// 16 KiB of a block; full vectors of every instruction set, and a tile at most.
int64_t LowRank::width() const { return std::clamp<int64_t>(4096 / rank_ / 128 * 128, 128, kTile); }

int64_t LowRank::together() const { return 8 * kTile; }

}  // namespace fastmerge
