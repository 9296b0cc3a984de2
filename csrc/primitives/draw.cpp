// A draw by rank in each vector, whose keys lie in the first or second cache level; integers only,
// so nothing here depends on the instruction set or on who ranks which vector.
#include "primitives/draw.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace fastmerge {

namespace {

constexpr uint32_t kNaN = 0x7FC00000;  // every NaN is one key
constexpr int64_t kStrip = 32;         // neighbouring vectors whose elements are read together
constexpr int64_t kTaskElements = 1 << 16;

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

// Which entries of a vector their words keep. The bound rises with the rank, so a rank that is
// known to lie in a bucket of keys decides nearly every entry: only where a word lies between its
// bucket's first bound and its last are the bucket's members put in order.
class Ranker {
   public:
    Ranker(const std::vector<uint32_t>& order, const std::vector<uint64_t>& bounds)
        : order_(order), bounds_(bounds), keys_(order.size()) {
        while (bits_ < kMostBits && size_t{64} << bits_ < order.size()) ++bits_;
        buckets_.resize((kBinades << bits_) + 1);
        counts_.resize(2 * buckets_.size());
    }

    // Writes 0 or 1 for each position; deltas and words lie `step` apart.
    void draw(const float* deltas, const uint32_t* words, int64_t step, uint8_t* kept) {
        count(deltas, step);
        bound();
        crossed_.clear();
        for (size_t at = 0; at < keys_.size(); ++at) {
            Bucket& own = buckets_[bucket_of(keys_[at])];
            const uint64_t word = words[static_cast<int64_t>(at) * step];
            kept[at] = word < own.low;
            if (word - own.low < own.width) {
                own.width = 0;
                own.grow = 1;
                crossed_.push_back(&own);
            }
        }
        if (!crossed_.empty()) order(words, step, kept);
    }

   private:
    struct Bucket {
        uint64_t low, width;    // the bound of its first rank, and from there to that of its last
        uint32_t first, count;  // rank, members
        uint32_t next, grow;    // where its next member goes, and 1 where its members are gathered
    };
    // A bucket is a part of a binade, of which there are as many as leave it some 30 members; the
    // lowest has all that is below 2^-16 of the largest.
    static constexpr size_t kBinades = 16;
    static constexpr int kMostBits = 9;
    static constexpr size_t kFew = 256;  // fewer are sorted by comparison

    size_t bucket_of(uint32_t key) const {
        const int32_t over = static_cast<int32_t>(key >> (23 - bits_)) - lowest_;
        return over > 0 ? static_cast<size_t>(over) : 0;
    }

    void count(const float* deltas, int64_t step) {
        uint32_t most = 0;
        for (size_t at = 0; at < keys_.size(); ++at) {
            uint32_t key;
            std::memcpy(&key, deltas + static_cast<int64_t>(at) * step, sizeof key);
            keys_[at] = std::min(key & 0x7FFFFFFF, kNaN);
            most = std::max(most, keys_[at]);
        }
        lowest_ =
            static_cast<int32_t>(most >> (23 - bits_)) - static_cast<int32_t>(kBinades << bits_);
        std::fill(counts_.begin(), counts_.end(), 0u);
        // Two tables in turn: neighbours in one bucket do not wait for each other's count.
        for (size_t at = 0; at < keys_.size(); ++at) ++counts_[2 * bucket_of(keys_[at]) + (at & 1)];
    }

    void bound() {
        uint32_t rank = 0;
        for (size_t b = 0; b < buckets_.size(); ++b) {
            const uint32_t count = counts_[2 * b] + counts_[2 * b + 1];
            if (count == 0) continue;
            const uint64_t low = bounds_[rank];
            buckets_[b] = {low, bounds_[rank + count - 1] - low, rank, count, 0, 0};
            rank += count;
        }
    }

    void order(const uint32_t* words, int64_t step, uint8_t* kept) {
        uint32_t room = 1;  // the first place takes what is not gathered: no branch for each entry
        for (Bucket* own : crossed_) {
            own->next = room;
            room += own->count;
        }
        entries_.resize(room);
        for (size_t tie = 0; tie < order_.size(); ++tie) {
            const uint32_t key = keys_[order_[tie]];
            Bucket& own = buckets_[bucket_of(key)];
            entries_[own.next] = static_cast<uint64_t>(key) << 32 | tie;
            own.next += own.grow;
        }
        for (const Bucket* own : crossed_) {
            uint64_t* const end = entries_.data() + own->next;
            uint64_t* const begin = end - own->count;
            sort(begin, end);
            for (uint32_t i = 0; i < own->count; ++i) {
                const uint32_t position = order_[begin[i] & UINT32_MAX];
                kept[position] = words[position * step] < bounds_[own->first + i];
            }
        }
    }

    // Equal keys lie in their ties' order, so a long run's keys are all that is looked at.
    void sort(uint64_t* begin, uint64_t* end) {
        const auto size = static_cast<size_t>(end - begin);
        if (std::is_sorted(begin, end)) return;
        if (size <= kFew) return std::sort(begin, end);
        spare_.resize(size);
        uint64_t *from = begin, *to = spare_.data();
        for (int shift = 32; shift < 64; shift += 8) {
            uint32_t places[256] = {};
            for (size_t i = 0; i < size; ++i) ++places[from[i] >> shift & 255];
            if (places[from[0] >> shift & 255] == size) continue;  // all the same
            uint32_t next = 0;
            for (uint32_t& place : places) next += std::exchange(place, next);
            for (size_t i = 0; i < size; ++i) to[places[from[i] >> shift & 255]++] = from[i];
            std::swap(from, to);
        }
        if (from != begin) std::copy(from, from + size, begin);
    }

    const std::vector<uint32_t>& order_;   // positions as entries of one magnitude rank
    const std::vector<uint64_t>& bounds_;  // by rank
    int bits_ = 1;                         // of the mantissa that tell buckets apart
    int32_t lowest_ = 0;                   // the lowest bucket's exponent and bits
    std::vector<uint32_t> keys_, counts_;
    std::vector<Bucket> buckets_;
    std::vector<Bucket*> crossed_;  // by a word
    std::vector<uint64_t> entries_, spare_;
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
          ranker_(order, draw.bounds),
          length_(draw.spec.length),
          stride_(draw.spec.stride),
          width_(std::min(stride_, kStrip)),
          deltas_(static_cast<size_t>(length_ * width_)),
          words_(deltas_.size()),
          kept_(static_cast<size_t>(length_) + 32) {}

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
        ranker_.draw(deltas_.data() + column, words_.data() + column, width, kept_.data());
        if (stride_ == 1) return pack(first);
        for (int64_t position = 0; position < length_; ++position) {
            const int64_t at = first + position * stride_;
            draw_.mask[at / 32] |= uint32_t{kept_[static_cast<size_t>(position)]} << at % 32;
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
