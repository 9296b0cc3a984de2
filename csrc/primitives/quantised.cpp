#include "primitives/quantised.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "isa/table.h"
#include "simd/items.h"

namespace fastmerge {

namespace {

// A small float: sign, exponent, mantissa; codes above `most` are no finite numbers.
struct Format {
    int exponent_bits, mantissa_bits, bias;
    uint32_t most;
    float largest;
    float steps;  // of its subnormals, to 1
};
// By Coding.
constexpr Format kFormats[] = {{4, 3, 7, 0x7E, 448.0f, 512.0f},
                               {5, 2, 15, 0x7B, 57344.0f, 65536.0f},
                               {2, 1, 1, 7, 6.0f, 2.0f}};
constexpr int kLargestE2M1 = 2;     // the exponent of 6 = 1.5 * 2^2
constexpr int64_t kTask = 1 << 16;  // elements, about, whose largest one task finds

// The nearest code, ties to even, no larger than the largest; NaN for the caller.
uint32_t nearest_code(const Format& format, float value) {
    const uint32_t sign =
        bit_cast<uint32_t>(value) >> 31 << (format.exponent_bits + format.mantissa_bits);
    const uint32_t bits = bit_cast<uint32_t>(value) & 0x7FFFFFFFu;
    const uint32_t normal = static_cast<uint32_t>(128 - format.bias) << 23;  // the smallest one
    uint32_t code;
    if (bits < normal) {
        // Of 2^23 the unit is 1, so that the sum is rounded to whole steps of a subnormal.
        const float whole = bit_cast<float>(bits) * format.steps + 8388608.0f;
        code = bit_cast<uint32_t>(whole) - bit_cast<uint32_t>(8388608.0f);
    } else {
        const int shift = 23 - format.mantissa_bits;
        const uint32_t odd = bits >> shift & 1;
        const uint32_t rounded = (bits + ((1u << (shift - 1)) - 1) + odd) >> shift;
        code = rounded - (static_cast<uint32_t>(127 - format.bias) << format.mantissa_bits);
    }
    return sign | std::min(code, format.most);
}

float number_of(const Format& format, uint32_t code) {
    const uint32_t mantissa = code & ((1u << format.mantissa_bits) - 1);
    const uint32_t exponent = code >> format.mantissa_bits & ((1u << format.exponent_bits) - 1);
    const float whole = static_cast<float>(mantissa | (exponent ? 1u << format.mantissa_bits : 0u));
    const int power = static_cast<int>(std::max(exponent, 1u)) - format.bias - format.mantissa_bits;
    const float size = std::ldexp(whole, power);
    return code >> (format.exponent_bits + format.mantissa_bits) ? -size : size;
}

// Where things lie: which block an element is in, which scale is the block's.
struct Layout {
    int64_t rows, cols, block_rows, block_cols, down, across;
    bool transposed;

    Layout(int64_t r, int64_t c, int64_t br, int64_t bc, bool t)
        : rows(r),
          cols(c),
          block_rows(br),
          block_cols(bc),
          down(blocks_of(r, br)),
          across(blocks_of(c, bc)),
          transposed(t) {}
    int64_t scale(int64_t matrix, int64_t band, int64_t block) const {
        return transposed ? (matrix * across + block) * down + band
                          : (matrix * down + band) * across + block;
    }
};

// The largest finite size in each block.
std::vector<float> largest(Pool& pool, const float* x, int64_t matrices, const Layout& at) {
    const auto count = static_cast<size_t>(matrices * at.down * at.across);
    // Sizes order as their bits do, so that the tasks' order decides nothing.
    const std::unique_ptr<std::atomic<uint32_t>[]> found(new std::atomic<uint32_t>[count]());
    const int64_t height = std::min(at.block_rows, std::max<int64_t>(1, kTask / at.cols));
    const int64_t tasks_down = blocks_of(std::min(at.block_rows, at.rows), height);
    pool.run(matrices * at.down * tasks_down, [&](int64_t task) {
        const int64_t matrix = task / (at.down * tasks_down);
        const int64_t band = task / tasks_down % at.down;
        const int64_t first = band * at.block_rows + task % tasks_down * height;
        const int64_t last = std::min({first + height, (band + 1) * at.block_rows, at.rows});
        std::vector<uint32_t> own(static_cast<size_t>(at.across));
        for (int64_t row = first; row < last; ++row) {
            const float* from = x + (matrix * at.rows + row) * at.cols;
            for (int64_t block = 0; block < at.across; ++block) {
                const int64_t end = std::min((block + 1) * at.block_cols, at.cols);
                uint32_t most = own[static_cast<size_t>(block)];
                for (int64_t col = block * at.block_cols; col < end; ++col) {
                    const uint32_t size = bit_cast<uint32_t>(from[col]) & 0x7FFFFFFFu;
                    most = std::max(most, size < 0x7F800000u ? size : 0u);
                }
                own[static_cast<size_t>(block)] = most;
            }
        }
        for (int64_t block = 0; block < at.across; ++block) {
            auto& most = found[static_cast<size_t>(at.scale(matrix, band, block))];
            const uint32_t size = own[static_cast<size_t>(block)];
            for (uint32_t old = most; old < size && !most.compare_exchange_weak(old, size);) {
            }
        }
    });
    std::vector<float> sizes(count);
    for (size_t i = 0; i < count; ++i) sizes[i] = bit_cast<float>(found[i].load());
    return sizes;
}

uint8_t e8m0_of(int exponent) { return static_cast<uint8_t>(std::clamp(exponent + 127, 0, 254)); }

// The scales as stored, written to their sink, and as fp32 numbers in place of the sizes.
void store_scales(Pool& pool, Coding coding, bool power_of_two, std::vector<float>& sizes,
                  Sink& scales) {
    const Format& format = kFormats[static_cast<int>(coding)];
    const bool exponents = scales.dtype() == DType::kRaw;
    for (float& size : sizes) {
        int power = 0;
        if (coding == Coding::kMxfp4) {
            std::frexp(size, &power);
            power -= 1 + kLargestE2M1;
            size = std::ldexp(1.0f, e8m0_of(size > 0 ? power : 0) - 127);
            continue;
        }
        float scale = size / format.largest;
        if ((power_of_two || exponents) && scale > 0) {
            const bool exact = std::frexp(scale, &power) == 0.5f;
            scale = std::ldexp(1.0f, e8m0_of(exact ? power - 1 : power) - 127);
        }
        size = scale > 0 ? scale : 1.0f;
    }
    const auto count = static_cast<int64_t>(sizes.size());
    if (scales.count() != count) throw std::invalid_argument("one scale for each block is needed");
    const auto item = static_cast<size_t>(item_bytes(scales.dtype()));
    std::vector<char> stored(sizes.size() * item);
    if (exponents) {
        for (size_t i = 0; i < sizes.size(); ++i)
            stored[i] = static_cast<char>(e8m0_of(std::ilogb(sizes[i])));
    } else {
        const auto type = static_cast<size_t>(scales.dtype());
        kernels().narrow[type](sizes.data(), stored.data(), count);
        kernels().widen[type](stored.data(), sizes.data(), count);
        // Where the type's range ends, 1 and its largest number serve; codes saturate.
        bool changed = false;
        for (float& size : sizes) {
            if (size > 0 && std::isfinite(size)) continue;
            size = size > 0 ? 65504.0f : 1.0f;
            changed = true;
        }
        if (changed) kernels().narrow[type](sizes.data(), stored.data(), count);
    }
    pool.run(scales.pieces(), [&](int64_t piece) {
        int64_t begin = 0, end = 0;
        scales.range(piece, begin, end);
        void* to = scales.open(piece);
        std::memcpy(to, stored.data() + static_cast<size_t>(begin) * item,
                    static_cast<size_t>(end - begin) * item);
        scales.close(piece);
    });
}

struct Coder {
    const Format& format;
    float numbers[256];
    uint32_t nan;

    explicit Coder(Coding coding)
        : format(kFormats[static_cast<int>(coding)]), nan(coding == Coding::kMxfp4 ? 0 : 0x7F) {
        for (uint32_t code = 0; code < 256; ++code) numbers[code] = number_of(format, code);
    }
    uint32_t operator()(float x, float scale, Rounding& into) const {
        if (!std::isfinite(x)) {
            ++into.nonfinite;
            return std::isnan(x) ? nan : nearest_code(format, x);
        }
        const uint32_t code = nearest_code(format, x / scale);
        const double value = x, error = static_cast<double>(numbers[code] * scale) - value;
        into.error += error * error;
        into.size += value * value;
        return code;
    }
};

}  // namespace

Rounding quantise(Pool& pool, const Span& source, Coding coding, int64_t rows, int64_t cols,
                  int64_t block_rows, int64_t block_cols, bool power_of_two, Sink& codes,
                  Sink& scales) {
    const bool pairs = coding == Coding::kMxfp4;
    if (source.dtype != DType::kF32) throw std::invalid_argument("codes are made of F32 numbers");
    if (codes.dtype() != DType::kRaw || codes.count() * (pairs ? 2 : 1) != source.count)
        throw std::invalid_argument("the codes are RAW bytes, as many as the numbers take");
    if (rows < 1 || cols < 1 || block_rows < 1 || block_cols < 1 || source.count % rows != 0 ||
        source.count / rows % cols != 0)
        throw std::invalid_argument("the codes make no whole number of matrices");
    if (pairs && (rows % kMxfp4Group != 0 || block_rows != kMxfp4Group || block_cols != 1 ||
                  scales.dtype() != DType::kRaw))
        throw std::invalid_argument("mxfp4 has an E8M0 scale for every 32 numbers of a column");
    const auto* x = reinterpret_cast<const float*>(source.at(0));
    const Layout at(rows, cols, block_rows, block_cols, pairs);
    std::vector<float> found = largest(pool, x, source.count / rows / cols, at);
    store_scales(pool, coding, power_of_two, found, scales);

    const Coder code(coding);
    std::vector<Rounding> parts(static_cast<size_t>(codes.pieces()));
    pool.run(codes.pieces(), [&](int64_t piece) {
        int64_t begin = 0, end = 0;
        codes.range(piece, begin, end);
        auto* to = static_cast<uint8_t*>(codes.open(piece));
        Rounding own;
        for (int64_t byte = begin; byte < end;) {
            if (pairs) {
                const int64_t stored = byte / (rows / 2), row = byte % (rows / 2) * 2;
                const int64_t matrix = stored / cols, col = stored % cols;
                const float scale =
                    found[static_cast<size_t>(at.scale(matrix, row / block_rows, col))];
                const float* from = x + (matrix * rows + row) * cols + col;
                const uint32_t low = code(from[0], scale, own);
                *to++ = static_cast<uint8_t>(low | code(from[cols], scale, own) << 4);
                ++byte;
                continue;
            }
            const int64_t row = byte / cols, col = byte % cols, block = col / block_cols;
            const int64_t band = row % rows / block_rows;
            const float scale = found[static_cast<size_t>(at.scale(row / rows, band, block))];
            const int64_t length =
                std::min({end - byte, cols - col, (block + 1) * block_cols - col});
            for (int64_t i = 0; i < length; ++i)
                *to++ = static_cast<uint8_t>(code(x[byte + i], scale, own));
            byte += length;
        }
        codes.close(piece);
        parts[static_cast<size_t>(piece)] = own;
    });
    Rounding total;
    for (const Rounding& part : parts) {
        total.nonfinite += part.nonfinite;
        total.error += part.error;
        total.size += part.size;
    }
    return total;
}

}  // namespace fastmerge
