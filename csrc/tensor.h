// Element types and untyped spans: the vocabulary of every kernel. No Python in here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace fastmerge {

enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kRaw = 3 };  // kRaw: bytes, copied only

constexpr int kDTypes = 3;  // types with kernels: F32, F16, BF16
constexpr size_t item_bytes(DType t) { return t == DType::kF32 ? 4 : t == DType::kRaw ? 1 : 2; }

// How many blocks cover a length, the last cut short.
constexpr int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Elements that are in no one place.
struct Elements {
    virtual ~Elements() = default;
    // `count` of them from `first` on as `dtype`: where they lie, or copied to `buffer`, which has
    // room for them.
    virtual const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const = 0;
    // How many are best read at once, where that is more than a tile.
    virtual int64_t together() const { return 0; }
};

// Nothing but zeros, in any number.
struct Zeros : Elements {
    const void* read(int64_t, int64_t count, DType dtype, void* buffer) const override {
        return std::memset(buffer, 0, static_cast<size_t>(count) * item_bytes(dtype));
    }
};

// `count` contiguous elements at `data`; no alignment beyond one byte is promised (safetensors
// gives 8 in practice, but offsets into a tensor and foreign buffers may have less). With
// `elements` they are some of those, from `first` on, and `read` gives them.
struct Span {
    const void* data = nullptr;
    int64_t count = 0;
    DType dtype = DType::kF32;
    const Elements* elements = nullptr;
    int64_t first = 0;
    const char* at(int64_t index) const {
        if (elements) throw std::logic_error("these elements have no one address");
        return static_cast<const char*>(data) + index * static_cast<int64_t>(item_bytes(dtype));
    }
    // Elements [begin, begin + count): in place, or copied to `buffer`, which has room for them.
    const void* read(int64_t begin, int64_t count, void* buffer) const {
        return elements ? elements->read(first + begin, count, dtype, buffer) : at(begin);
    }
};

}  // namespace fastmerge
