#pragma once
#include <functional>
#include <string>
#include <vector>

#include "primitives/selection.h"
#include "primitives/tiles.h"

namespace fastmerge {

// One tensor of every model; ``first`` is its first element's flat index, a multiple of kTile.
struct Part {
    std::vector<Span> inputs;
    Span base;
    int64_t first = 0;
};

// A selection over parts of which other processes count some. Piece i ends before part ends[i]; the
// last one ends with the parts. `pass` is called for each pass over the deltas, in the same order
// by every process, and gives all pieces' results in order, for each either count(piece) or what
// another process's count gave.
struct Pieces {
    std::vector<size_t> ends;
    std::function<std::vector<std::string>(size_t pieces,
                                           const std::function<std::string(size_t)>& count)>
        pass;
};

// For each delta inputs[j] - base (fp32) of all parts as one vector, which entries survive. Exact;
// never sorts a tensor; `masks`, where a draw by rank is asked for, get its answer, and so does
// that of a random draw of one part that is measured, which then is not drawn again; memory beyond
// a few MiB per thread and some 20 MiB in all never depends on the tensors' size.
std::vector<Selection> select(Pool& pool, const std::vector<Part>& parts,
                              const std::vector<Sparsify>& specs,
                              const std::vector<uint32_t*>& masks = {},
                              const Pieces* pieces = nullptr);

}  // namespace fastmerge
