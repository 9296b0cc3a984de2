// The steps of `select`, each over all the deltas that need it. Private to select*.cpp.
#pragma once
#include <functional>
#include <vector>

#include "selection.h"
#include "tiles.h"

namespace fastmerge {

// The tensors a step reads, and the pool it runs on.
struct Deltas {
    Pool& pool;
    const std::vector<Span>& inputs;
    const Span& base;
    int64_t count() const { return base.count; }
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
    std::vector<Span> inputs;
    for (const size_t j : which) inputs.push_back(deltas.inputs[j]);
    const int64_t blocks = (deltas.count() + block - 1) / block;
    deltas.pool.run(blocks, [&](int64_t index) {
        TileReader reader(inputs, &deltas.base, deltas.base.dtype);
        Task task = make();
        for_each_tile(index * block, std::min(deltas.count(), (index + 1) * block),
                      [&](int64_t begin, int64_t end) {
                          reader.seek(begin, end - begin);
                          DeltaArgs args = {};
                          args.inputs = reader.inputs();
                          args.base = reader.base();
                          args.inputs_count = static_cast<int>(inputs.size());
                          args.index = static_cast<uint64_t>(begin);
                          args.count = end - begin;
                          body(task, args, reader.type());
                      });
        done(task, index);
    });
}

}  // namespace fastmerge
