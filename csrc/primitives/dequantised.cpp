#include "primitives/dequantised.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "isa/table.h"
#include "simd/items.h"

namespace fastmerge {

namespace {

constexpr uint8_t kNotANumber = 0xFF;  // in E8M0

// Sign, two bits of exponent, one of mantissa.
constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// 2^(code - 127), the smallest of them subnormal.
const std::array<float, 256>& e8m0() {
    static const std::array<float, 256> table = [] {
        std::array<float, 256> made{};
        for (int code = 0; code < 255; ++code)
            made[static_cast<size_t>(code)] = std::ldexp(1.0f, code - 127);
        made[kNotANumber] = bit_cast<float>(0x7FC00000u);
        return made;
    }();
    return table;
}

const uint8_t* bytes_of(const Span& span) { return reinterpret_cast<const uint8_t*>(span.at(0)); }

std::vector<float> widened(const Span& scales) {
    std::vector<float> made(static_cast<size_t>(scales.count));
    if (scales.dtype == DType::kRaw) {
        const uint8_t* codes = bytes_of(scales);
        std::transform(codes, codes + scales.count, made.begin(),
                       [](uint8_t code) { return e8m0()[code]; });
    } else {
        kernels().widen[static_cast<size_t>(scales.dtype)](scales.at(0), made.data(), scales.count);
    }
    return made;
}

}  // namespace

Coding coding_named(const std::string& name) {
    if (name == "e4m3") return Coding::kE4M3;
    if (name == "e5m2") return Coding::kE5M2;
    if (name == "mxfp4") return Coding::kMxfp4;
    throw std::invalid_argument("no coding '" + name + "'");
}

std::optional<int64_t> bad_scale(const Span& scales) {
    if (scales.dtype == DType::kRaw) {
        const void* from = scales.at(0);
        const void* found = std::memchr(from, kNotANumber, static_cast<size_t>(scales.count));
        if (!found) return std::nullopt;
        return static_cast<const char*>(found) - static_cast<const char*>(from);
    }
    const std::vector<float> numbers = widened(scales);
    const auto found = std::find_if(numbers.begin(), numbers.end(),
                                    [](float x) { return !(x > 0 && std::isfinite(x)); });
    if (found == numbers.end()) return std::nullopt;
    return found - numbers.begin();
}

Dequantised::Dequantised(Coding coding, const Span& codes, const Span& scales, int64_t rows,
                         int64_t cols, int64_t block_rows, int64_t block_cols)
    : coding_(coding),
      codes_(bytes_of(codes)),
      count_(codes.count * (coding == Coding::kMxfp4 ? 2 : 1)),
      rows_(rows),
      cols_(cols),
      block_rows_(block_rows),
      block_cols_(block_cols) {
    if (codes.dtype != DType::kRaw) throw std::invalid_argument("codes are raw bytes");
    if (rows < 1 || cols < 1 || block_rows < 1 || block_cols < 1 || count_ % rows != 0 ||
        count_ / rows % cols != 0)
        throw std::invalid_argument("the codes make no whole number of matrices");
    const int64_t each = blocks_of(rows, block_rows) * blocks_of(cols, block_cols);
    if (scales.count != count_ / rows / cols * each)
        throw std::invalid_argument("one scale for each block is needed");
    if (coding != Coding::kMxfp4) {
        scales_ = widened(scales);
        return;
    }
    if (scales.dtype != DType::kRaw || rows % kMxfp4Group != 0 || block_rows != kMxfp4Group ||
        block_cols != 1)
        throw std::invalid_argument("mxfp4 has an E8M0 scale for every 32 numbers of a column");
    exponents_ = bytes_of(scales);
}

const void* Dequantised::read(int64_t first, int64_t count, DType dtype, void* buffer) const {
    if (dtype != DType::kF32) throw std::invalid_argument("codes are read as F32");
    auto* out = static_cast<float*>(buffer);
    for (int64_t at = first; at < first + count;) {
        const int64_t row = at / cols_, col = at % cols_;
        const int64_t length = std::min(first + count - at, cols_ - col);
        if (coding_ == Coding::kMxfp4)
            read_column(row, col, length, out);
        else
            read_row(row, col, length, out);
        out += length;
        at += length;
    }
    return buffer;
}

// Part of a row; rows are numbered through all matrices.
void Dequantised::read_row(int64_t row, int64_t col, int64_t count, float* out) const {
    const int64_t matrix = row / rows_, across = blocks_of(cols_, block_cols_);
    const int64_t band = matrix * blocks_of(rows_, block_rows_) + row % rows_ / block_rows_;
    const float* scales = scales_.data() + band * across;
    const uint8_t* codes = codes_ + row * cols_;
    const auto dequantise = kernels().dequantise[static_cast<size_t>(coding_)];
    for (const int64_t end = col + count; col < end;) {
        const int64_t block = col / block_cols_;
        const int64_t length = std::min(end, (block + 1) * block_cols_) - col;
        dequantise(codes + col, scales[block], out, length);
        out += length;
        col += length;
    }
}

// The same of a transpose: its bytes lie a stored row apart. The next rows find the same cache
// lines, which hold 128 numbers of theirs.
void Dequantised::read_column(int64_t row, int64_t col, int64_t count, float* out) const {
    const int64_t stored = row / rows_ * cols_ + col, place = row % rows_;
    const uint8_t* codes = codes_ + stored * (rows_ / 2) + place / 2;
    const uint8_t* exponents = exponents_ + stored * (rows_ / kMxfp4Group) + place / kMxfp4Group;
    const int shift = place % 2 ? 4 : 0;
    const float* const powers = e8m0().data();
    for (int64_t i = 0; i < count; ++i) {
        const int code = codes[i * (rows_ / 2)] >> shift & 15;
        out[i] = kE2M1[code] * powers[exponents[i * (rows_ / kMxfp4Group)]];
    }
}

}  // namespace fastmerge
