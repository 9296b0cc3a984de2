// Element types and untyped spans: the vocabulary of every kernel. No Python in here.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastmerge {

enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kRaw = 3 };  // kRaw: bytes, copied only

constexpr int kDTypes = 3;  // types with kernels: F32, F16, BF16
constexpr size_t item_bytes(DType t) { return t == DType::kF32 ? 4 : t == DType::kRaw ? 1 : 2; }

// `count` contiguous elements at `data`; no alignment beyond one byte is promised (safetensors
// gives 8 in practice, but offsets into a tensor and foreign buffers may have less).
struct Span {
    const void* data = nullptr;
    int64_t count = 0;
    DType dtype = DType::kF32;
    const char* at(int64_t index) const {
        return static_cast<const char*>(data) + index * static_cast<int64_t>(item_bytes(dtype));
    }
};

}  // namespace fastmerge
