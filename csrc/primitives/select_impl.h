// The steps of `select`, each over all the deltas that need it. Private to select*.cpp.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "primitives/select.h"

namespace fastmerge {

// The tensors a step reads, and the pool it runs on: one tensor of each model, or several that are
// trimmed as one long vector.
struct Deltas {
    Pool& pool;
    const std::vector<Part>& parts;
    int64_t count() const {
        int64_t total = 0;
        for (const Part& part : parts) total += part.base.count;
        return total;
    }
    // One past the last flat index.
    int64_t end() const { return parts.back().first + parts.back().base.count; }
    size_t inputs() const { return parts.front().inputs.size(); }
};

constexpr int64_t kSelectBlock = 1 << 18;  // elements per task where sums have no order to keep

// The exact `keep`-th largest magnitude (1 <= keep <= count) and how many entries are above and at
// it.
struct Threshold {
    int64_t keep = 0;
    int32_t key = 0;
    int64_t above = 0;
    int64_t ties = 0;
};
void find_thresholds(const Deltas& deltas, const std::vector<size_t>& which,
                     std::vector<Threshold>& thresholds);

// The tie bound that keeps exactly `wanted` of `ties` entries whose magnitude is `key`.
struct TieBound {
    int32_t key = 0;
    TieRule rule = TieRule::kMixed;
    int64_t ties = 0;
    int64_t wanted = 0;  // 1 ... ties - 1
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
