// A draw by rank in each vector, whose keys lie in the first or second cache level; integers only,
// so nothing here depends on the instruction set or on who ranks which vector.
#include "primitives/draw.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace fastmerge {

namespace {

constexpr int64_t kStrip = 32;  // neighbouring vectors whose elements are read together
constexpr int64_t kTaskElements = 1 << 16;

// murmur3's 32-bit finaliser (Appleby), which spreads the positions in a vector.
uint32_t mixed(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

// By position in a vector, the order among entries of one magnitude: as in a trim the smallest
// mixed index counts as the largest.
std::vector<uint32_t> tie_orders(int64_t length) {
    std::vector<uint64_t> keys(static_cast<size_t>(length));
    for (size_t at = 0; at < keys.size(); ++at) {
        const auto position = static_cast<uint32_t>(at);
        keys[at] = static_cast<uint64_t>(~mixed(position)) << 32 | position;
    }
    std::sort(keys.begin(), keys.end());
    std::vector<uint32_t> orders(keys.size());
    for (size_t order = 0; order < keys.size(); ++order)
        orders[keys[order] & UINT32_MAX] = static_cast<uint32_t>(order);
    return orders;
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

// Which entries of a vector their words keep. The bound rises with the rank, so a word outside the
// bounds decides by itself, and a rank that is known to lie in a bucket of keys decides nearly
// every other: only where a word lies between its bucket's first bound and its last is the entry's
// rank counted.
class Ranker {
   public:
    Ranker(const std::vector<uint32_t>& orders, const std::vector<uint64_t>& bounds)
        : orders_(orders),
          bounds_(bounds),
          keys_(orders.size()),
          places_(orders.size() + kRoom),
          tied_(orders.size() + kRoom),
          seen_(orders.size() / 64 + 1),
          seen_before_(seen_.size()) {
        while (bits_ < kMostBits && size_t{64} << bits_ < orders.size()) ++bits_;
        counts_.resize(kCounters * ((kBinades << bits_) + 1));
        starts_.resize((kBinades << bits_) + 2);
    }

    // Writes 0 or 1 for each position.
    void draw(const float* deltas, const uint32_t* words, uint8_t* kept) {
        const Kernels& table = kernels();
        const auto entries = static_cast<int64_t>(keys_.size());
        const uint64_t low = bounds_.front(), span = bounds_.back() - low;
        if (low > UINT32_MAX) return void(std::fill_n(kept, entries, uint8_t{1}));
        const int64_t open = table.undecided(words, entries, static_cast<uint32_t>(low),
                                             static_cast<uint32_t>(span - 1), kept, places_.data());
        if (span == 0) return;
        count(table.magnitudes(deltas, entries, keys_.data()));
        crossed_.clear();
        for (int64_t i = 0; i < open; ++i) {
            const uint32_t at = places_[static_cast<size_t>(i)];
            const size_t bucket = bucket_of(keys_[at]);
            const uint64_t first = bounds_[starts_[bucket]],
                           last = bounds_[starts_[bucket + 1] - 1];
            kept[at] = words[at] < first;
            if (words[at] - first < last - first) crossed_.push_back(at);
        }
        rank(table, words, kept);
    }

   private:
    // A bucket is a part of a binade, of which there are as many as leave it some 30 members; the
    // lowest has all that is below 2^-16 of the largest.
    static constexpr size_t kBinades = 16;
    static constexpr int kMostBits = 12;
    // Neighbours in one bucket do not wait for each other's count.
    static constexpr size_t kCounters = 4;
    static constexpr size_t kRoom = 16;  // a vector
    static constexpr size_t kMany = 4;   // so many of one key share a look at the others' orders

    size_t bucket_of(uint32_t key) const {
        const int32_t over = static_cast<int32_t>(key >> (23 - bits_)) - lowest_;
        return over > 0 ? static_cast<size_t>(over) : 0;
    }

    // Each bucket's first rank.
    void count(uint32_t most) {
        lowest_ =
            static_cast<int32_t>(most >> (23 - bits_)) - static_cast<int32_t>(kBinades << bits_);
        std::fill(counts_.begin(), counts_.end(), 0u);
        for (size_t at = 0; at < keys_.size(); ++at)
            ++counts_[kCounters * bucket_of(keys_[at]) + at % kCounters];
        uint32_t rank = 0;
        for (size_t bucket = 0; bucket + 1 < starts_.size(); ++bucket) {
            starts_[bucket] = rank;
            for (size_t c = 0; c < kCounters; ++c) rank += counts_[kCounters * bucket + c];
        }
        starts_.back() = rank;
    }

    void rank(const Kernels& table, const uint32_t* words, uint8_t* kept) {
        const auto entries = static_cast<int64_t>(keys_.size());
        if (crossed_.size() >= kMany)
            std::sort(crossed_.begin(), crossed_.end(),
                      [&](uint32_t a, uint32_t b) { return keys_[a] < keys_[b]; });
        const auto decide = [&](uint32_t at, int64_t rank) {
            kept[at] = words[at] < bounds_[static_cast<size_t>(rank)];
        };
        for (size_t i = 0, next; i < crossed_.size(); i = next) {
            const uint32_t key = keys_[crossed_[i]];
            for (next = i; next < crossed_.size() && keys_[crossed_[next]] == key;) ++next;
            const auto rank_of = [&](uint32_t order) {
                return table.entries_before(keys_.data(), orders_.data(), entries, key, order);
            };
            if (next - i < kMany) {
                for (size_t c = i; c < next; ++c)
                    decide(crossed_[c], rank_of(orders_[crossed_[c]]));
                continue;
            }
            const int64_t first = rank_of(0);
            see(table, key);
            for (size_t c = i; c < next; ++c) {
                const uint32_t order = orders_[crossed_[c]];
                const uint64_t below = seen_[order / 64] & ((uint64_t{1} << order % 64) - 1);
                decide(crossed_[c], first + seen_before_[order / 64] + __builtin_popcountll(below));
            }
        }
    }

    // The orders of a key's entries as bits, and how many of them lie before each word of those.
    void see(const Kernels& table, uint32_t key) {
        const int64_t found = table.orders_of(
            keys_.data(), orders_.data(), static_cast<int64_t>(keys_.size()), key, tied_.data());
        std::fill(seen_.begin(), seen_.end(), 0u);
        for (size_t i = 0; i < static_cast<size_t>(found); ++i)
            seen_[tied_[i] / 64] |= uint64_t{1} << tied_[i] % 64;
        uint32_t before = 0;
        for (size_t i = 0; i < seen_.size(); ++i) {
            seen_before_[i] = before;
            before += static_cast<uint32_t>(__builtin_popcountll(seen_[i]));
        }
    }

    const std::vector<uint32_t>& orders_;  // by position, among equal keys
    const std::vector<uint64_t>& bounds_;  // by rank
    int bits_ = 1;                         // of the mantissa that tell buckets apart
    int32_t lowest_ = 0;                   // the lowest bucket's exponent and bits
    std::vector<uint32_t> keys_;           // by position
    std::vector<uint32_t> counts_, starts_;
    std::vector<uint32_t> places_, crossed_;  // whose words lie within the bounds, their bucket's
    std::vector<uint32_t> tied_;
    std::vector<uint64_t> seen_;
    std::vector<uint32_t> seen_before_;
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
    Worker(const Draw& draw, const std::vector<uint32_t>& orders)
        : draw_(draw),
          ranker_(orders, draw.bounds),
          length_(draw.spec.length),
          stride_(draw.spec.stride),
          width_(std::min(stride_, kStrip)),
          deltas_(static_cast<size_t>(length_ * width_)),
          words_(deltas_.size()),
          column_deltas_(stride_ == 1 ? 0 : static_cast<size_t>(length_)),
          column_words_(column_deltas_.size()),
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
        if (stride_ == 1) {
            ranker_.draw(deltas_.data(), words_.data(), kept_.data());
            return pack(first);
        }
        for (int64_t position = 0; position < length_; ++position) {
            const auto at = static_cast<size_t>(position * width + column);
            column_deltas_[static_cast<size_t>(position)] = deltas_[at];
            column_words_[static_cast<size_t>(position)] = words_[at];
        }
        ranker_.draw(column_deltas_.data(), column_words_.data(), kept_.data());
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
    std::vector<float> column_deltas_;
    std::vector<uint32_t> column_words_;
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
    const std::vector<uint32_t> orders = tie_orders(alike.length);
    // A task takes so many slices that it begins at a word of the mask, which no other then writes.
    const int64_t slice = alike.length * alike.stride;
    const int64_t step = 32 / std::gcd(slice, int64_t{32});
    const int64_t block = std::max<int64_t>(1, kTaskElements / slice / step) * step * slice;
    const int64_t blocks = (count + block - 1) / block;
    pool.run(blocks * static_cast<int64_t>(draws.size()), [&](int64_t task) {
        const Draw& draw = draws[static_cast<size_t>(task / blocks)];
        const int64_t begin = task % blocks * block, end = std::min(count, begin + block);
        std::fill(draw.mask + begin / 32, draw.mask + (end + 31) / 32, 0u);
        Worker worker(draw, orders);
        for (int64_t first = begin; first < end; first += slice) worker.slice(first);
    });
}

}  // namespace fastmerge
