#include "primitives/divergence.h"

#include <cmath>

namespace fastmerge {

namespace {

// Of longer rows the exponentials are computed again where they are read.
constexpr int64_t kKept = 1 << 16;

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

double divergence(Softmax& p, Softmax& q, int64_t begin, int64_t end) {
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
        Softmax p(x), q(base);
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); ++row)
            found[static_cast<size_t>(row)] = divergence(p, q, row * cols, (row + 1) * cols);
    });
    return found;
}

}  // namespace fastmerge
