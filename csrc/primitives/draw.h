#pragma once
#include <cstdint>

#include "primitives/select.h"

namespace fastmerge {

// For each delta in `which`, the entries that a draw by rank keeps (fastmerge.selection's RANKED)
// as bits from masks[delta] on, one per element, which has room for them in whole words. Memory is
// a few times one vector's keys a thread, and not the tensor's size.
void draw_by_rank(Pool& pool, const Part& part, const std::vector<size_t>& which,
                  const std::vector<Sparsify>& specs, const std::vector<uint32_t*>& masks);

}  // namespace fastmerge
