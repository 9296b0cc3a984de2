#include "primitives/divergence.h"

#include <cmath>

namespace fastmerge {

namespace {

// Of longer rows the exponentials are computed again where they are read.
constexpr int64_t kKept = 1 << 16;

double add_moves(double* lanes) {
    for (int half = kMoveLanes / 2; half >= kSumLanes; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return add_lanes(lanes);
}

// A row that is near the base's.
class Moves {
   public:
    Moves(const Span& x, const Span& base) : x_(x), base_(base) {}

    // Whether it is near enough.
    bool seek(int64_t begin, int64_t end) {
        begin_ = begin;
        kept_ = end - begin <= kKept;
        weights_.resize(static_cast<size_t>(kept_ ? end - begin : kTile));
        moved_.resize(weights_.size());
        weight_ = products_ = 0;
        bool near = true;
        for_each_tile(begin, end, [&](int64_t at, int64_t next) {
            if (!near) return;
            MoveSums sums = fill(at, next);
            near = sums.far == 0;
            weight_ += add_moves(sums.weights);
            products_ += add_moves(sums.products);
        });
        return near;
    }
    double divergence(int64_t end) {
        const double mean = products_ / weight_;
        double total = 0;
        for_each_tile(begin_, end, [&](int64_t at, int64_t next) {
            if (!kept_) fill(at, next);
            double lanes[kMoveLanes] = {};
            table_.moved_divergence(
                {weights_.data() + place(at), moved_.data() + place(at), static_cast<float>(mean),
                 static_cast<float>(1 / (1 + mean)), static_cast<float>(2e-8 * weight_), next - at},
                lanes);
            total += add_moves(lanes);
        });
        return total / weight_;
    }

   private:
    int64_t place(int64_t at) const { return kept_ ? at - begin_ : 0; }
    const float* widened(const Span& span, int64_t at, int64_t next, float* to) {
        float stored[kTile];
        const void* from = span.read(at, next - at, stored);
        table_.widen[static_cast<size_t>(span.dtype)](from, to, next - at);
        return to;
    }
    MoveSums fill(int64_t at, int64_t next) {
        float x[kTile], base[kTile];
        MoveSums sums = {};
        table_.moves({widened(x_, at, next, x), widened(base_, at, next, base),
                      weights_.data() + place(at), moved_.data() + place(at), next - at},
                     sums);
        return sums;
    }

    const Span &x_, &base_;
    const Kernels& table_ = kernels();
    std::vector<float> weights_, moved_;
    int64_t begin_ = 0;
    bool kept_ = true;
    double weight_ = 0, products_ = 0;
};

// A row's e^(x - largest) and their sum.
class Softmax {
   public:
    explicit Softmax(const Span& span) : span_(span) {}

    void seek(int64_t begin, int64_t end) {
        begin_ = begin;
        kept_ = end - begin <= kKept;
        row_.resize(static_cast<size_t>(kept_ ? end - begin : kTile));
        values_.resize(row_.size());
        most_ = -INFINITY;
        for_each_tile(begin, end, [&](int64_t at, int64_t next) {
            widen(at, next);
            most_ = table_.largest_of(row_.data() + place(at), next - at, most_);
        });
        double sum = 0;
        for_each_tile(begin, end, [&](int64_t at, int64_t next) {
            if (!kept_) widen(at, next);
            sum += fill(at, next);
        });
        factor_ = 1 / sum;
    }
    double factor() const { return factor_; }
    const double* at(int64_t at, int64_t next) {
        if (!kept_) {
            widen(at, next);
            fill(at, next);
        }
        return values_.data() + place(at);
    }

   private:
    int64_t place(int64_t at) const { return kept_ ? at - begin_ : 0; }
    void widen(int64_t at, int64_t next) {
        float stored[kTile];
        const void* from = span_.read(at, next - at, stored);
        table_.widen[static_cast<size_t>(span_.dtype)](from, row_.data() + place(at), next - at);
    }
    double fill(int64_t at, int64_t next) {
        double lanes[kSumLanes] = {};
        table_.exponentials(row_.data() + place(at), next - at, most_, values_.data() + place(at),
                            lanes);
        return add_lanes(lanes);
    }

    const Span& span_;
    const Kernels& table_ = kernels();
    std::vector<float> row_;  // fp32
    std::vector<double> values_;
    int64_t begin_ = 0;
    bool kept_ = true;
    float most_ = 0;
    double factor_ = 0;
};

double divergence(Moves& moves, Softmax& p, Softmax& q, int64_t begin, int64_t end) {
    if (moves.seek(begin, end)) return moves.divergence(end);
    p.seek(begin, end);
    q.seek(begin, end);
    double total = 0;
    for_each_tile(begin, end, [&](int64_t at, int64_t next) {
        double lanes[kSumLanes] = {};
        kernels().divergence({p.at(at, next), q.at(at, next), p.factor(), q.factor(), next - at},
                             lanes);
        total += add_lanes(lanes);
    });
    return total;
}

}  // namespace

std::vector<double> divergences(Pool& pool, const Span& x, const Span& base, int64_t cols) {
    check_inputs({x}, &base, base.count);
    if (cols < 1 || base.count % cols != 0)
        throw std::invalid_argument("cols must divide the element count");
    const int64_t rows = base.count / cols;
    const int64_t together = std::max<int64_t>(1, kSumBlock / cols);  // rows to a task
    std::vector<double> found(static_cast<size_t>(rows));
    pool.run((rows + together - 1) / together, [&](int64_t task) {
        Moves moves(x, base);
        Softmax p(x), q(base);
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); ++row)
            found[static_cast<size_t>(row)] = divergence(moves, p, q, row * cols, (row + 1) * cols);
    });
    return found;
}

}  // namespace fastmerge
