#include "primitives/gram.h"

namespace fastmerge {

namespace {

constexpr int64_t kColumnTile = 256;

// Computes sums over ranges of the tensors; one per task.
class Gram {
   public:
    Gram(const std::vector<Span>& inputs, const Span* base)
        : table_(kernels()),
          vectors_(static_cast<int>(inputs.size()) + (base ? 1 : 0)),
          pairs_(vectors_ * (vectors_ + 1) / 2) {
        if (base) all_.push_back(*base);
        all_.insert(all_.end(), inputs.begin(), inputs.end());
        deltas_ = base != nullptr;
        fused_ = vectors_ == 2 || vectors_ == 3;
        for (const Span& span : all_) fused_ = fused_ && span.dtype == all_[0].dtype;
        pointers_.resize(all_.size());
        wide_.resize(all_.size());
        if (!fused_) scratch_.resize(all_.size() * kTile);
        gathered_.resize(all_.size());
        for (size_t j = 0; j < all_.size(); ++j)
            if (all_[j].elements) {
                gathered_[j].resize(kTile);
                gathers_ = true;
            }
    }

    int vectors() const { return vectors_; }
    int pairs() const { return pairs_; }

    // One block's sums, one number per pair.
    void block(int64_t begin, int64_t end, double* sums) {
        std::vector<double> lanes(static_cast<size_t>(pairs_) * kSumLanes);
        if (fused_) {
            const auto type = static_cast<size_t>(all_[0].dtype);
            const auto& kernels = vectors_ == 2 ? table_.gram2 : table_.gram3;
            const auto kernel = kernels[deltas_ ? 1 : 0][type];
            // What lies in memory is taken at once; the lanes are the same for any cut.
            const int64_t step = gathers_ ? kTile : kSumBlock;
            for (int64_t at = begin; at < end; at += step) {
                const int64_t count = std::min(step, end - at);
                for (size_t j = 0; j < all_.size(); ++j)
                    pointers_[j] = all_[j].read(at, count, gathered_[j].data());
                kernel(pointers_.data(), count, lanes.data());
            }
        } else {
            for (int64_t at = begin; at < end; at += kTile) {
                const int64_t count = std::min(kTile, end - at);
                widen(at, count);
                table_.gram(wide_.data(), vectors_, count, lanes.data());
            }
        }
        for (int p = 0; p < pairs_; ++p) sums[p] = add_lanes(lanes.data() + p * kSumLanes);
    }

    // Adds a row's products to sums[pair][column].
    void columns(int64_t begin, int64_t count, double* sums) {
        widen(begin, count);
        table_.gram_columns(wide_.data(), vectors_, count, sums);
    }

    // The whole matrix from its upper triangle, sums[pair * stride].
    void spread(const double* sums, int64_t stride, double* matrix) const {
        for (int a = 0, p = 0; a < vectors_; ++a)
            for (int b = a; b < vectors_; ++b, ++p)
                matrix[a * vectors_ + b] = matrix[b * vectors_ + a] = sums[p * stride];
    }

   private:
    // fp32 vectors of the tile, base subtracted where there is one.
    void widen(int64_t begin, int64_t count) {
        if (scratch_.empty()) scratch_.resize(all_.size() * kTile);
        for (size_t j = 0; j < all_.size(); ++j) {
            float* tile = scratch_.data() + j * kTile;
            const void* from = all_[j].read(begin, count, gathered_[j].data());
            table_.widen[static_cast<size_t>(all_[j].dtype)](from, tile, count);
            if (deltas_ && j > 0) table_.subtract(wide_[0], tile, count);
            wide_[j] = tile;
        }
    }

    const Kernels& table_;
    std::vector<Span> all_;
    int vectors_, pairs_;
    bool deltas_, fused_, gathers_ = false;
    std::vector<const void*> pointers_;
    std::vector<const float*> wide_;
    std::vector<float> scratch_;
    std::vector<std::vector<float>> gathered_;  // a tile of each that lies in no one place
};

}  // namespace

std::vector<double> gram(Pool& pool, const std::vector<Span>& inputs, const Span* base,
                         const Vectors& vectors) {
    const int64_t count = inputs.empty() ? 0 : inputs[0].count;
    check_inputs(inputs, base, count);
    vectors.check(count);
    const Gram layout(inputs, base);
    const int64_t pairs = layout.pairs();
    const int64_t size = static_cast<int64_t>(layout.vectors()) * layout.vectors();
    std::vector<double> result(static_cast<size_t>(vectors.count() * size));

    if (vectors.axis == Axis::kAll) {
        const int64_t blocks = (count + kSumBlock - 1) / kSumBlock;
        std::vector<double> partial(static_cast<size_t>(blocks * pairs));
        const auto run = [&](int64_t block) {
            const int64_t begin = block * kSumBlock;
            Gram(inputs, base)
                .block(begin, std::min(count, begin + kSumBlock), partial.data() + block * pairs);
        };
        pool.run(blocks, run, order_of(inputs, 0));
        std::vector<double> total(static_cast<size_t>(pairs));
        for (int64_t i = 0; i < blocks * pairs; ++i)
            total[static_cast<size_t>(i % pairs)] += partial[static_cast<size_t>(i)];
        layout.spread(total.data(), 1, result.data());
    } else if (vectors.axis == Axis::kRows) {
        const int64_t group = std::max<int64_t>(1, kSumBlock / std::max<int64_t>(1, vectors.cols));
        pool.run((vectors.rows + group - 1) / group, [&](int64_t task) {
            Gram gram(inputs, base);
            std::vector<double> partial(static_cast<size_t>(pairs));
            for (int64_t row = task * group; row < std::min(vectors.rows, (task + 1) * group);
                 ++row) {
                std::vector<double> total(static_cast<size_t>(pairs));
                const int64_t end = (row + 1) * vectors.cols;
                for (int64_t at = row * vectors.cols; at < end; at += kSumBlock) {
                    gram.block(at, std::min(end, at + kSumBlock), partial.data());
                    for (size_t p = 0; p < total.size(); ++p) total[p] += partial[p];
                }
                gram.spread(total.data(), 1, result.data() + row * size);
            }
        });
    } else {
        pool.run((vectors.cols + kColumnTile - 1) / kColumnTile, [&](int64_t task) {
            Gram gram(inputs, base);
            const int64_t first = task * kColumnTile;
            const int64_t width = std::min(kColumnTile, vectors.cols - first);
            std::vector<double> sums(static_cast<size_t>(pairs * width));
            for (int64_t row = 0; row < vectors.rows; ++row)
                gram.columns(row * vectors.cols + first, width, sums.data());
            for (int64_t column = 0; column < width; ++column)
                gram.spread(sums.data() + column, width, result.data() + (first + column) * size);
        });
    }
    return result;
}

}  // namespace fastmerge
