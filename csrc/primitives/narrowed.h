// float64 numbers, read as fp32.
#pragma once
#include <cstring>
#include <stdexcept>

#include "tensor.h"

namespace fastmerge {

// Each is rounded once, to nearest even.
class Narrowed : public Elements {
   public:
    // Throws std::invalid_argument where they are no whole number of bytes.
    explicit Narrowed(const Span& numbers)
        : bytes_(static_cast<const char*>(numbers.at(0))),
          count_(numbers.count / static_cast<int64_t>(sizeof(double))) {
        if (numbers.dtype != DType::kRaw || numbers.count % static_cast<int64_t>(sizeof(double)))
            throw std::invalid_argument("float64 numbers are raw bytes, eight for each");
    }

    int64_t count() const { return count_; }

    const void* read(int64_t first, int64_t count, DType dtype, void* buffer) const override {
        if (dtype != DType::kF32) throw std::invalid_argument("float64 numbers are read as F32");
        const char* from = bytes_ + first * static_cast<int64_t>(sizeof(double));
        auto* out = static_cast<float*>(buffer);
        for (int64_t i = 0; i < count; ++i) {
            double number;  // at any address
            std::memcpy(&number, from + i * static_cast<int64_t>(sizeof number), sizeof number);
            out[i] = static_cast<float>(number);
        }
        return buffer;
    }

   private:
    const char* bytes_;
    int64_t count_;
};

}  // namespace fastmerge
