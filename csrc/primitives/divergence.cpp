#include "primitives/divergence.h"

#include <cmath>

namespace fastmerge {

namespace {

// fp32 tiles of a row, in place or in `wide`.
template <class Body>
void each_tile(const Span& span, int64_t begin, int64_t end, const Body& body) {
    float wide[kTile], stored[kTile];
    for_each_tile(begin, end, [&](int64_t at, int64_t next) {
        const void* from = span.read(at, next - at, stored);
        kernels().widen[static_cast<size_t>(span.dtype)](from, wide, next - at);
        body(wide, at, next - at);
    });
}

// Of longer rows the exponentials are computed again where they are read.
constexpr int64_t kKept = 1 << 16;

// A row's e^(x - largest) and their sum.
class Softmax {
   public:
    explicit Softmax(const Span& span) : span_(span) {}

    void seek(int64_t begin, int64_t end) {
        begin_ = begin;
        kept_ = end - begin <= kKept;
        values_.resize(static_cast<size_t>(kept_ ? end - begin : kTile));
        most_ = -INFINITY;
        each_tile(span_, begin, end, [&](const float* x, int64_t, int64_t count) {
            most_ = kernels().largest_of(x, count, most_);
        });
        double sum = 0;
        each_tile(span_, begin, end,
                  [&](const float* x, int64_t at, int64_t count) { sum += fill(x, at, count); });
        factor_ = 1 / sum;
    }
    double factor() const { return factor_; }
    const double* at(int64_t begin, int64_t end) {
        if (!kept_)
            each_tile(span_, begin, end,
                      [&](const float* x, int64_t at, int64_t count) { fill(x, at, count); });
        return place(begin);
    }

   private:
    double* place(int64_t at) { return values_.data() + (kept_ ? at - begin_ : 0); }
    double fill(const float* x, int64_t at, int64_t count) {
        double lanes[kSumLanes] = {};
        kernels().exponentials(x, count, most_, place(at), lanes);
        return add_lanes(lanes);
    }

    const Span& span_;
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
