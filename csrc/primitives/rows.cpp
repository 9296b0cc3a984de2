#include "primitives/rows.h"

#include <algorithm>
#include <cstring>

#include "isa/table.h"

namespace fastmerge {

const void* read(const Span& span, int64_t begin, int64_t count, void* buffer) {
    if (!span.table) return span.at(begin);
    const RowTable& table = *span.table;
    const auto item = static_cast<int64_t>(item_bytes(span.dtype));
    const int64_t first = span.first + begin, row_bytes = table.cols * item;
    const int64_t last_row = (first + std::max<int64_t>(count, 1) - 1) / table.cols;
    int64_t row = first / table.cols, column = first % table.cols;
    const char* const start = table.rows[static_cast<size_t>(row)];
    bool in_place = true;
    for (int64_t r = row; r <= last_row && in_place; ++r) {
        const auto at = static_cast<size_t>(r);
        in_place = table.rows[at] == start + (r - row) * row_bytes && table.types[at] == span.dtype;
    }
    if (in_place) return start + column * item;

    char* to = static_cast<char*>(buffer);
    for (int64_t left = count; left > 0; ++row, column = 0) {
        const int64_t part = std::min(left, table.cols - column);
        const DType type = table.types[static_cast<size_t>(row)];
        const char* from =
            table.rows[static_cast<size_t>(row)] + column * static_cast<int64_t>(item_bytes(type));
        if (type == span.dtype)
            std::memcpy(to, from, static_cast<size_t>(part * item));
        else
            kernels().widen[static_cast<size_t>(type)](from, reinterpret_cast<float*>(to), part);
        to += part * item;
        left -= part;
    }
    return buffer;
}

}  // namespace fastmerge
