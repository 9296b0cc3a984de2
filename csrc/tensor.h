// Element types and untyped spans: the vocabulary of every kernel. No Python in here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastmerge {

enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kRaw = 3 };  // kRaw: bytes, copied only

constexpr int kDTypes = 3;  // types with kernels: F32, F16, BF16
constexpr size_t item_bytes(DType t) { return t == DType::kF32 ? 4 : t == DType::kRaw ? 1 : 2; }

// Where the rows of a matrix lie that is in no one place, and what each is stored as.
struct RowTable {
    std::vector<const char*> rows;
    std::vector<DType> types;
    int64_t cols = 0;
};

// `count` contiguous elements at `data`; no alignment beyond one byte is promised (safetensors
// gives 8 in practice, but offsets into a tensor and foreign buffers may have less). With `table`
// they are those of its rows from element `first` on, and `read` of primitives/rows.h gives them.
struct Span {
    const void* data = nullptr;
    int64_t count = 0;
    DType dtype = DType::kF32;
    const RowTable* table = nullptr;
    int64_t first = 0;
    const char* at(int64_t index) const {
        if (table) throw std::logic_error("gathered rows have no one address");
        return static_cast<const char*>(data) + index * static_cast<int64_t>(item_bytes(dtype));
    }
};

}  // namespace fastmerge
