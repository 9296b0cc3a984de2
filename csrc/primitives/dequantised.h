// Codes of few bits with scales, read as the fp32 numbers that they stand for.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace fastmerge {

// kMxfp4: E2M1, two to a byte, the low half first, with E8M0 scales (OCP Microscaling
// Formats v1.0), each matrix stored as its transpose.
enum class Coding : uint8_t { kE4M3, kE5M2, kMxfp4 };

constexpr int64_t kMxfp4Group = 32;  // numbers to a scale

Coding coding_named(const std::string& name);  // throws std::invalid_argument

// The first scale that is no finite number above 0; raw ones are E8M0, whose one such is NaN.
std::optional<int64_t> bad_scale(const Span& scales);

// Matrices of (rows, cols), one after another; each has a scale for every block of `block_rows` by
// `block_cols`, those at its ends cut short.
class Dequantised : public Elements {
   public:
    // Throws std::invalid_argument where codes or scales are not as many as the shape has.
    Dequantised(Coding coding, const Span& codes, const Span& scales, int64_t rows, int64_t cols,
                int64_t block_rows, int64_t block_cols);

    int64_t count() const { return count_; }
    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override;

   private:
    void read_row(int64_t row, int64_t col, int64_t count, float* out) const;
    void read_column(int64_t row, int64_t col, int64_t count, float* out) const;

    Coding coding_;
    const uint8_t* codes_;
    const uint8_t* exponents_ = nullptr;  // kMxfp4's scales, where they lie: one for 16 bytes
    std::vector<float> scales_;           // the others'
    int64_t count_, rows_, cols_, block_rows_, block_cols_;
};

}  // namespace fastmerge
