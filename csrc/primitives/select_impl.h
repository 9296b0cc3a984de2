// The steps of `select`, each over all the deltas that need it. Private to select*.cpp.
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "primitives/select.h"

namespace fastmerge {

// The tensors a step reads, and the pool it runs on: one tensor of each model, or several that are
// trimmed as one long vector.
struct Deltas {
    Pool& pool;
    const std::vector<Part>& parts;
    const Pieces* pieces = nullptr;
    int64_t count() const {
        int64_t total = 0;
        for (const Part& part : parts) total += part.base.count;
        return total;
    }
    // One past the last flat index.
    int64_t end() const { return parts.back().first + parts.back().base.count; }
    size_t inputs() const { return parts.front().inputs.size(); }
    bool same(size_t i, size_t j) const {
        return std::all_of(parts.begin(), parts.end(), [&](const Part& part) {
            return same_elements(part.inputs[i], part.inputs[j]);
        });
    }
};

// Numbers as bytes, as one process leaves them to another of the same build.
class Bytes {
   public:
    explicit Bytes(std::string text = {}) : text_(std::move(text)) {}
    template <class T>
    void put(const T& value) {
        static_assert(std::is_arithmetic_v<T>);
        text_.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
    template <class T>
    void put_all(const std::vector<T>& values) {
        put(static_cast<int64_t>(values.size()));
        for (const T& value : values) put(value);
    }
    template <class T>
    T take() {
        if (text_.size() - at_ < sizeof(T)) throw std::invalid_argument("a piece's count is cut");
        T value;
        std::memcpy(&value, text_.data() + at_, sizeof value);
        at_ += sizeof value;
        return value;
    }
    template <class T>
    void take_all(std::vector<T>& values) {
        for (auto left = take<int64_t>(); left > 0; --left) values.push_back(take<T>());
    }
    std::string text() && { return std::move(text_); }

   private:
    std::string text_;
    size_t at_ = 0;
};

// The results of one pass, of the deltas whole or of each of their pieces, in order.
inline std::vector<std::string> run_pass(const Deltas& deltas,
                                         const std::function<std::string(const Deltas&)>& count) {
    if (!deltas.pieces) return {count(deltas)};
    const auto& ends = deltas.pieces->ends;
    return deltas.pieces->pass(ends.size(), [&](size_t piece) {
        const auto begin = static_cast<int64_t>(piece ? ends[piece - 1] : 0);
        const auto end = static_cast<int64_t>(ends[piece]);
        const std::vector<Part> own(deltas.parts.begin() + begin, deltas.parts.begin() + end);
        return count(Deltas{deltas.pool, own});
    });
}

// One pass, in which `count(deltas)` clears and fills every search; in pieces, each search is then
// the sum of what all processes counted.
template <class Search, class Count>
void count_in_pieces(const Deltas& deltas, const std::vector<Search*>& searches, Count&& count) {
    if (!deltas.pieces) return count(deltas);
    const auto found = run_pass(deltas, [&](const Deltas& piece) {
        count(piece);
        Bytes bytes;
        for (const Search* search : searches) search->put(bytes);
        return std::move(bytes).text();
    });
    for (Search* search : searches) search->clear();
    for (const std::string& text : found) {
        Bytes bytes(text);
        for (Search* search : searches) search->add(bytes);
    }
}

constexpr int64_t kSelectBlock = 1 << 18;  // elements per task where sums have no order to keep

// What the pass for a threshold finds out on its way about the ties at the key that is likely to be
// it: how many have order words below `first`, and the words from there to `last`. Only where all
// flat indices have 32 bits, so that words are orders.
struct TieGuess {
    int32_t key = -1;  // none is likely to be
    uint32_t first = 0, last = 0;
    int64_t under = 0;
    std::vector<uint32_t> words;
    size_t room = 0;  // more words than this are not all of them
};

// The exact `keep`-th largest magnitude (1 <= keep <= count) and how many entries are above and at
// it.
struct Threshold {
    int64_t keep = 0;
    TieRule rule = TieRule::kMixed;
    int32_t key = 0;
    int64_t above = 0;
    int64_t ties = 0;
    TieGuess guess;
};
void find_thresholds(const Deltas& deltas, const std::vector<size_t>& which,
                     std::vector<Threshold>& thresholds);

// The tie bound that keeps exactly `wanted` of `ties` entries whose magnitude is `key`.
struct TieBound {
    int32_t key = 0;
    TieRule rule = TieRule::kMixed;
    int64_t ties = 0;
    int64_t wanted = 0;  // 1 ... ties - 1
    const TieGuess* guess = nullptr;
    uint64_t bound = 0;
};
void find_tie_bounds(const Deltas& deltas, const std::vector<size_t>& which,
                     std::vector<TieBound>& bounds);

// Runs body(reader, begin, end) over the tiles of each of the blocks on the pool, only the deltas
// in `which` being read, and done(task) at the end of each block with the same task object.
template <class Task, class Make, class Body, class Done>
void for_each_block(const Deltas& deltas, const std::vector<size_t>& which, int64_t block,
                    const Make& make, const Body& body, const Done& done) {
    std::vector<std::vector<Span>> inputs(deltas.parts.size());
    std::vector<int64_t> firsts(1, 0);  // the number of each part's first block
    for (size_t p = 0; p < deltas.parts.size(); ++p) {
        for (const size_t j : which) inputs[p].push_back(deltas.parts[p].inputs[j]);
        firsts.push_back(firsts.back() + blocks_of(deltas.parts[p].base.count, block));
    }
    deltas.pool.run(firsts.back(), [&](int64_t index) {
        const auto after = std::upper_bound(firsts.begin(), firsts.end(), index);
        const auto p = static_cast<size_t>(after - firsts.begin()) - 1;
        const Part& part = deltas.parts[p];
        const int64_t own = index - firsts[p];
        TileReader reader(inputs[p], &part.base, part.base.dtype);
        Task task = make();
        for_each_tile(own * block, std::min(part.base.count, (own + 1) * block),
                      [&](int64_t begin, int64_t end) {
                          reader.seek(begin, end - begin);
                          DeltaArgs args = {};
                          args.inputs = reader.inputs();
                          args.base = reader.base();
                          args.inputs_count = static_cast<int>(which.size());
                          args.index = static_cast<uint64_t>(part.first + begin);
                          args.count = end - begin;
                          body(task, args, reader.type());
                      });
        done(task, index);
    });
}

// Passes over the deltas `which`, each for the searches that are still open, until all are found:
// count(inputs, open) fills in a pass's results, resolve(search) reads them.
template <class Search, class Count, class Resolve>
void run_searches(const std::vector<size_t>& which, std::vector<Search>& searches,
                  const Count& count, const Resolve& resolve) {
    for (;;) {
        std::vector<size_t> inputs;
        std::vector<Search*> open;
        for (size_t i = 0; i < which.size(); ++i) {
            if (searches[i].found) continue;
            inputs.push_back(which[i]);
            open.push_back(&searches[i]);
        }
        if (open.empty()) return;
        count(inputs, open);
        for (Search* search : open) resolve(*search);
    }
}

}  // namespace fastmerge
