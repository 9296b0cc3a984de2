#include "primitives/rows.h"

#include <algorithm>
#include <cstring>

#include "isa/table.h"

namespace fastmerge {

const void* RowTable::read(int64_t first, int64_t count, DType dtype, void* buffer) const {
    const auto item = static_cast<int64_t>(item_bytes(dtype));
    const int64_t row_bytes = cols * item;
    const int64_t last_row = (first + std::max<int64_t>(count, 1) - 1) / cols;
    int64_t row = first / cols, column = first % cols;
    const char* const start = rows[static_cast<size_t>(row)];
    bool in_place = true;
    for (int64_t r = row; r <= last_row && in_place; ++r) {
        const auto at = static_cast<size_t>(r);
        in_place = rows[at] == start + (r - row) * row_bytes && types[at] == dtype;
    }
    if (in_place) return start + column * item;

    char* to = static_cast<char*>(buffer);
    for (int64_t left = count; left > 0; ++row, column = 0) {
        const int64_t part = std::min(left, cols - column);
        const DType type = types[static_cast<size_t>(row)];
        const char* from =
            rows[static_cast<size_t>(row)] + column * static_cast<int64_t>(item_bytes(type));
        if (type == dtype)
            std::memcpy(to, from, static_cast<size_t>(part * item));
        else
            kernels().widen[static_cast<size_t>(type)](from, reinterpret_cast<float*>(to), part);
        to += part * item;
        left -= part;
    }
    return buffer;
}

}  // namespace fastmerge
