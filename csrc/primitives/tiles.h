// How the primitives cut tensors up, and how they feed kernels that take one element type.
#pragma once
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "isa/table.h"
#include "pool.h"
#include "sink.h"

namespace fastmerge {

// Sums run over blocks of this many elements, whatever the threads, and the blocks' results are
// added in order.
constexpr int64_t kSumBlock = 1 << 16;

// Adds the lanes of a block's sum in one fixed tree.
inline double add_lanes(const double* lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
           ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

inline void check_inputs(const std::vector<Span>& inputs, const Span* base, int64_t count) {
    if (inputs.empty()) throw std::invalid_argument("no inputs");
    for (const Span& span : inputs) {
        if (span.dtype == DType::kRaw) throw std::invalid_argument("inputs must not be RAW");
        if (span.count != count) throw std::invalid_argument("inputs differ in element count");
    }
    if (base && (base->dtype == DType::kRaw || base->count != count))
        throw std::invalid_argument("base must not be RAW and must have the inputs' element count");
}

inline bool same_elements(const Span& a, const Span& b) {
    return a.elements == b.elements && a.data == b.data && a.first == b.first && a.dtype == b.dtype;
}

// One task's view of the inputs, a tile at a time: pointers into the tensors where every element
// type is the wanted one, else into fp32 copies of the tile; gathered rows and what is computed are
// copied.
class TileReader {
   public:
    TileReader(const std::vector<Span>& inputs, const Span* base, DType wanted,
               int64_t tile = kTile)
        : inputs_(inputs), base_(base), table_(kernels()), tile_(tile) {
        bool uniform = !base || base->dtype == wanted;
        for (const Span& span : inputs) uniform = uniform && span.dtype == wanted;
        dtype_ = uniform ? wanted : DType::kF32;
        pointers_.resize(inputs.size());
        bool gathers = base && base->elements;
        for (const Span& span : inputs) gathers = gathers || span.elements;
        if (!uniform || gathers)
            scratch_.reset(new float[(inputs.size() + 1) * static_cast<size_t>(tile)]);
        if (!uniform && gathers) stored_.reset(new float[static_cast<size_t>(tile)]);
        for (size_t j = 0; j < inputs.size(); ++j) {
            first_.push_back(j);
            for (size_t i = 0; i < j && first_[j] == j; ++i)
                if (same_elements(inputs[i], inputs[j])) first_[j] = i;
        }
    }

    DType dtype() const { return dtype_; }
    size_t type() const { return static_cast<size_t>(dtype_); }
    const void* const* inputs() const { return pointers_.data(); }
    const void* base() const { return base_pointer_; }

    void seek(int64_t begin, int64_t count) {
        for (size_t j = 0; j < inputs_.size(); ++j)
            pointers_[j] = first_[j] < j ? pointers_[first_[j]]
                                         : at(inputs_[j], begin, count, static_cast<int64_t>(j));
        if (base_) base_pointer_ = at(*base_, begin, count, static_cast<int64_t>(inputs_.size()));
    }

   private:
    const void* at(const Span& span, int64_t begin, int64_t count, int64_t slot) {
        float* tile = scratch_ ? scratch_.get() + slot * tile_ : nullptr;
        if (span.dtype == dtype_) return span.read(begin, count, tile);
        const void* from = span.read(begin, count, stored_.get());
        table_.widen[static_cast<size_t>(span.dtype)](from, tile, count);
        return tile;
    }

    const std::vector<Span>& inputs_;
    const Span* base_;
    const Kernels& table_;
    const int64_t tile_;  // elements at most
    DType dtype_;
    std::vector<const void*> pointers_;
    std::vector<size_t> first_;  // the first input that is the same as this one
    const void* base_pointer_ = nullptr;
    std::unique_ptr<float[]> scratch_;  // a tile of each
    std::unique_ptr<float[]> stored_;   // a tile of gathered rows, before it is widened
};

// What two cores' caches hold, in bytes.
constexpr int64_t kCaches = int64_t{32} << 20;

// How passes over tensors are cut: as files are read, or where the caches may hold all of them from
// one pass to the next, so that each core finds its own part again.
inline Pool::Order order_of(const std::vector<Span>& inputs, int64_t output_bytes) {
    int64_t bytes = output_bytes;
    for (const Span& span : inputs)
        bytes += span.count * static_cast<int64_t>(item_bytes(span.dtype));
    return bytes <= kCaches ? Pool::Order::kFromBothEnds : Pool::Order::kAscending;
}

// Calls body(begin, end) for the parts of [begin, end) between multiples of the tile.
template <class Body>
void for_each_tile(int64_t begin, int64_t end, const Body& body, int64_t tile = kTile) {
    for (int64_t at = begin; at < end;) {
        const int64_t next = std::min(end, (at / tile + 1) * tile);
        body(at, next);
        at = next;
    }
}

// The tile for kernels that take any number of elements: what the inputs are best read by.
inline int64_t tile_for(const std::vector<Span>& inputs) {
    int64_t tile = kTile;
    for (const Span& span : inputs)
        if (span.elements) tile = std::max(tile, span.elements->together());
    return tile;
}

// Fills a sink piece by piece on the pool: make() gives a piece its fill(reader, begin, end, to),
// which writes the elements [begin, end) of one tile as reader.dtype() to `to`: the sink's type, or
// fp32 where `reads` or the inputs say so. Returns how many of the elements stored are NaN or Inf.
template <class Make>
int64_t fill_sink(Pool& pool, const std::vector<Span>& inputs, const Span* base, Sink& out,
                  const Make& make, int64_t tile, DType reads) {
    const Kernels& table = kernels();
    const auto type = static_cast<size_t>(out.dtype());
    const auto item = static_cast<int64_t>(item_bytes(out.dtype()));
    std::vector<int64_t> nonfinite(static_cast<size_t>(out.pieces()));
    const auto run = [&](int64_t piece) {
        int64_t begin = 0, end = 0, found = 0;
        out.range(piece, begin, end);
        char* to = static_cast<char*>(out.open(piece));
        TileReader reader(inputs, base, reads, tile);
        auto fill = make();
        const bool narrows = reader.dtype() != out.dtype();
        std::vector<float> wide(narrows ? static_cast<size_t>(tile) : 0);
        const auto body = [&](int64_t tile_begin, int64_t tile_end) {
            char* target = to + (tile_begin - begin) * item;
            if (wide.empty()) {
                fill(reader, tile_begin, tile_end, target);
            } else {
                fill(reader, tile_begin, tile_end, reinterpret_cast<char*>(wide.data()));
                table.narrow[type](wide.data(), target, tile_end - tile_begin);
            }
            if (out.checked()) found += table.nonfinite[type](target, tile_end - tile_begin);
        };
        for_each_tile(begin, end, body, tile);
        out.close(piece);
        nonfinite[static_cast<size_t>(piece)] = found;
    };
    pool.run(out.pieces(), run,
             out.in_memory() ? order_of(inputs, out.count() * item) : Pool::Order::kAscending);
    int64_t total = 0;
    for (const int64_t found : nonfinite) total += found;
    return total;
}

// Which elements form one vector.
enum class Axis { kAll, kRows, kColumns };

struct Vectors {
    Axis axis = Axis::kAll;
    int64_t rows = 1, cols = 0;

    int64_t count() const { return axis == Axis::kAll ? 1 : axis == Axis::kRows ? rows : cols; }
    void check(int64_t elements) const {
        if (axis == Axis::kAll) return;
        if (rows < 0 || cols < 0 || (rows > 0 && cols > elements / rows) || rows * cols != elements)
            throw std::invalid_argument("rows times cols must be the element count");
    }
};

}  // namespace fastmerge
