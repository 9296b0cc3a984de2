// Ranks by a stable radix sort of each vector's keys, which lie in the first or second cache level;
// integers only, so nothing here depends on the instruction set or on who ranks which vector.
#include "primitives/draw.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace fastmerge {

namespace {

constexpr int32_t kNaN = 0x7FC00000;  // every NaN is one key
constexpr int64_t kStrip = 32;        // neighbouring vectors whose elements are read together
constexpr int64_t kTaskElements = 1 << 16;
constexpr int kDigits = 4;

// murmur3's 32-bit finaliser (Appleby), which spreads the positions in a vector.
uint32_t mixed(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

// The positions in a vector as entries of one magnitude rank: as in a trim the smallest mixed index
// counts as the largest.
std::vector<uint32_t> tie_order(int64_t length) {
    std::vector<uint64_t> keys(static_cast<size_t>(length));
    for (size_t at = 0; at < keys.size(); ++at) {
        const auto position = static_cast<uint32_t>(at);
        keys[at] = static_cast<uint64_t>(~mixed(position)) << 32 | position;
    }
    std::sort(keys.begin(), keys.end());
    return std::vector<uint32_t>(keys.begin(), keys.end());  // the low words
}

// By rank, from the smallest on, the bound below which an entry's word keeps it.
std::vector<uint64_t> bounds_of(const Sparsify& spec) {
    const auto length = static_cast<uint64_t>(spec.length);
    if (length == 1) return {(spec.keep_below + spec.keep_below_top) / 2};
    std::vector<uint64_t> bounds(length);
    const uint64_t last = length - 1, rise = spec.keep_below_top - spec.keep_below;
    for (uint64_t rank = 0; rank < length; ++rank)
        bounds[rank] = spec.keep_below + (rank * rise + last / 2) / last;
    return bounds;
}

class Ranker {
   public:
    explicit Ranker(const std::vector<uint32_t>& order)
        : order_(order), from_(order.size()), to_(order.size()) {}

    // The positions (the low words) from the smallest magnitude up; deltas lie `step` apart.
    const std::vector<uint64_t>& sort(const float* deltas, int64_t step) {
        std::memset(counts_, 0, sizeof counts_);
        for (size_t i = 0; i < order_.size(); ++i) {
            int32_t key;
            std::memcpy(&key, deltas + order_[i] * step, sizeof key);
            key = std::min(key & 0x7FFFFFFF, kNaN);
            from_[i] = static_cast<uint64_t>(key) << 32 | order_[i];
            for (int digit = 0; digit < kDigits; ++digit) ++counts_[digit][key >> 8 * digit & 255];
        }
        for (int digit = 0; digit < kDigits; ++digit) {
            const int shift = 32 + 8 * digit;
            uint32_t* places = counts_[digit];
            if (places[from_[0] >> shift & 255] == order_.size()) continue;  // all the same
            uint32_t next = 0;
            for (int value = 0; value < 256; ++value) next += std::exchange(places[value], next);
            for (const uint64_t entry : from_) to_[places[entry >> shift & 255]++] = entry;
            from_.swap(to_);
        }
        return from_;
    }

   private:
    const std::vector<uint32_t>& order_;
    std::vector<uint64_t> from_, to_;
    uint32_t counts_[kDigits][256];
};

// What one delta's draw needs, whoever draws.
struct Draw {
    const Span& input;
    const Span& base;
    const Sparsify& spec;
    RoundKeys round_keys;
    std::vector<uint64_t> bounds;
    uint32_t* mask;
};

class Worker {
   public:
    Worker(const Draw& draw, const std::vector<uint32_t>& order)
        : draw_(draw),
          ranker_(order),
          length_(draw.spec.length),
          stride_(draw.spec.stride),
          width_(std::min(stride_, kStrip)),
          deltas_(static_cast<size_t>(length_ * width_)),
          words_(deltas_.size()),
          kept_(stride_ == 1 ? static_cast<size_t>(length_) + 32 : 0) {}

    // The vectors of the `length` times `stride` elements from `first` on.
    void slice(int64_t first) {
        for (int64_t column = 0; column < stride_; column += kStrip) {
            const int64_t width = std::min(kStrip, stride_ - column);
            if (stride_ == 1) {
                read(first, length_, 0);
            } else {
                for (int64_t at = 0; at < length_; ++at)
                    read(first + at * stride_ + column, width, at * width);
            }
            for (int64_t c = 0; c < width; ++c) draw(first + column + c, c, width);
        }
    }

   private:
    void read(int64_t begin, int64_t count, int64_t to) {
        const Kernels& table = kernels();
        table.random_words(draw_.round_keys.data(), static_cast<uint64_t>(begin), count,
                           words_.data() + to);
        for (int64_t done = 0; done < count;) {
            const int64_t part = std::min(kTile, count - done);
            float* x = deltas_.data() + to + done;
            const auto widen = [&](const Span& span, float* wide) {
                const void* from = span.read(begin + done, part, stored_);
                table.widen[static_cast<size_t>(span.dtype)](from, wide, part);
            };
            widen(draw_.input, x);
            widen(draw_.base, base_);
            table.subtract(base_, x, part);
            done += part;
        }
    }

    void draw(int64_t first, int64_t column, int64_t width) {
        const std::vector<uint64_t>& sorted = ranker_.sort(deltas_.data() + column, width);
        const uint32_t* words = words_.data() + column;
        const uint64_t* bounds = draw_.bounds.data();
        if (stride_ == 1) {
            for (size_t rank = 0; rank < sorted.size(); ++rank) {
                const auto position = static_cast<uint32_t>(sorted[rank]);
                kept_[position] = words[position] < bounds[rank];
            }
            return pack(first);
        }
        for (size_t rank = 0; rank < sorted.size(); ++rank) {
            const auto position = static_cast<uint32_t>(sorted[rank]);
            const int64_t at = first + position * stride_;
            const uint32_t bit = words[position * width] < bounds[rank];
            draw_.mask[at / 32] |= bit << at % 32;
        }
    }

    // Sets the bits from `first` on; kept_ has zeros after the vector.
    void pack(int64_t first) {
        uint32_t* to = draw_.mask + first / 32;
        const auto shift = static_cast<unsigned>(first % 32);
        for (int64_t at = 0; at < length_; at += 32, ++to) {
            uint32_t bits = 0;
            for (int byte = 0; byte < 32; byte += 8) {
                uint64_t eight;  // bytes of 0 or 1; the product gathers them in its highest
                std::memcpy(&eight, kept_.data() + at + byte, sizeof eight);
                bits |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << byte;
            }
            *to |= bits << shift;
            if (shift && bits >> (32 - shift)) to[1] |= bits >> (32 - shift);
        }
    }

    const Draw& draw_;
    Ranker ranker_;
    int64_t length_, stride_, width_;
    std::vector<float> deltas_;
    std::vector<uint32_t> words_;
    std::vector<uint8_t> kept_;
    float base_[kTile], stored_[kTile];
};

}  // namespace

void draw_by_rank(Pool& pool, const Part& part, const std::vector<size_t>& which,
                  const std::vector<Sparsify>& specs, const std::vector<uint32_t*>& masks) {
    const int64_t count = part.base.count;
    if (which.empty() || count == 0) return;
    const Sparsify& alike = specs[which[0]];
    std::vector<Draw> draws;
    for (const size_t j : which) {
        const Sparsify& spec = specs[j];
        const bool fits = spec.length > 0 && spec.stride > 0 && spec.length <= 0xFFFFFFFF &&
                          spec.length <= count / spec.stride &&
                          count % (spec.length * spec.stride) == 0;
        if (!fits || spec.length != alike.length || spec.stride != alike.stride)
            throw std::invalid_argument("length times stride must divide the element count");
        if (spec.keep_below > spec.keep_below_top || spec.keep_below_top > uint64_t{1} << 32)
            throw std::invalid_argument("keep_below must not be above keep_below_top, nor 2**32");
        if (j >= masks.size() || !masks[j]) throw std::invalid_argument("a draw needs a mask");
        draws.push_back(
            {part.inputs[j], part.base, spec, round_keys(spec.key), bounds_of(spec), masks[j]});
    }
    const std::vector<uint32_t> order = tie_order(alike.length);
    // A task takes so many slices that it begins at a word of the mask, which no other then writes.
    const int64_t slice = alike.length * alike.stride;
    const int64_t step = 32 / std::gcd(slice, int64_t{32});
    const int64_t block = std::max<int64_t>(1, kTaskElements / slice / step) * step * slice;
    const int64_t blocks = (count + block - 1) / block;
    pool.run(blocks * static_cast<int64_t>(draws.size()), [&](int64_t task) {
        const Draw& draw = draws[static_cast<size_t>(task / blocks)];
        const int64_t begin = task % blocks * block, end = std::min(count, begin + block);
        std::fill(draw.mask + begin / 32, draw.mask + (end + 31) / 32, 0u);
        Worker worker(draw, order);
        for (int64_t first = begin; first < end; first += slice) worker.slice(first);
    });
}

}  // namespace fastmerge
