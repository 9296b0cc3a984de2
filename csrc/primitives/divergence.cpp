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

struct Softmax {
    float most = -INFINITY;
    double sum = 0;

    Softmax(const Span& span, int64_t begin, int64_t end) {
        each_tile(span, begin, end, [&](const float* x, int64_t, int64_t count) {
            most = kernels().largest_of(x, count, most);
        });
        each_tile(span, begin, end, [&](const float* x, int64_t, int64_t count) {
            double lanes[kSumLanes] = {};
            kernels().exponentials(x, count, most, lanes);
            sum += add_lanes(lanes);
        });
    }
};

double divergence(const Span& x, const Span& base, int64_t begin, int64_t end) {
    const Softmax p(x, begin, end), q(base, begin, end);
    double total = 0;
    each_tile(x, begin, end, [&](const float* own, int64_t at, int64_t count) {
        each_tile(base, at, at + count, [&](const float* other, int64_t, int64_t) {
            double lanes[kSumLanes] = {};
            kernels().divergence({own, other, p.most, q.most, p.sum, q.sum, count}, lanes);
            total += add_lanes(lanes);
        });
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
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); ++row)
            found[static_cast<size_t>(row)] = divergence(x, base, row * cols, (row + 1) * cols);
    });
    return found;
}

}  // namespace fastmerge
