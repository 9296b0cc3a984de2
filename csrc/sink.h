// Where a kernel's output goes, one tensor at a time, in pieces that pool workers fill in any
// order. Kernels write through this and never know whether a piece is memory, or a staging buffer
// on its way to disk.
#pragma once
#include "tensor.h"

namespace fastmerge {

class Sink {
   public:
    virtual ~Sink() = default;
    virtual DType dtype() const = 0;
    virtual int64_t count() const = 0;   // elements
    virtual int64_t pieces() const = 0;  // disjoint, ascending, covering [0, count)
    // First and one-past-last element of a piece.
    virtual void range(int64_t piece, int64_t& begin, int64_t& end) const = 0;
    // Where the piece's first element goes. May block until a staging buffer is free; may throw
    // (I/O).
    virtual void* open(int64_t piece) = 0;
    // Whether it is memory that the caller keeps, whose pieces may be filled in any order.
    virtual bool in_memory() const { return false; }
    // Whether NaN and Inf among what is written are counted; where not, their number is 0.
    virtual bool checked() const { return true; }
    // The piece's bytes are final. Called once after open, by the same thread.
    virtual void close(int64_t piece) = 0;
};

// A plain block of memory that the caller keeps alive, cut into pieces of 128 Ki elements, or of
// down to 32 Ki where that would leave `threads` idle (32 of them take a sum of 4 MiB a fifth
// longer than 8), or of 1 MiB where bytes are only copied: a GPU's pinned ring takes 40 GB/s, 40
// 000 tasks a second.
class MemorySink final : public Sink {
   public:
    MemorySink(void* data, int64_t count, DType dtype, bool checked = true, int threads = 8)
        : data_(static_cast<char*>(data)),
          count_(count),
          dtype_(dtype),
          piece_(piece_of(count, dtype, threads)),
          checked_(checked) {}
    DType dtype() const override { return dtype_; }
    int64_t count() const override { return count_; }
    int64_t pieces() const override { return (count_ + piece_ - 1) / piece_; }
    void range(int64_t piece, int64_t& begin, int64_t& end) const override {
        begin = piece * piece_;
        end = begin + piece_ < count_ ? begin + piece_ : count_;
    }
    void* open(int64_t piece) override {
        return data_ + piece * piece_ * static_cast<int64_t>(item_bytes(dtype_));
    }
    void close(int64_t) override {}
    bool in_memory() const override { return true; }
    bool checked() const override { return checked_; }

   private:
    // Powers of two, as kernels cut at multiples of a tile.
    static int64_t piece_of(int64_t count, DType dtype, int64_t threads) {
        if (dtype == DType::kRaw) return 1 << 20;
        int64_t piece = 1 << 15;
        while (piece < 1 << 17 && 4 * threads * piece < count) piece *= 2;
        return piece;
    }

    char* data_;
    int64_t count_;
    DType dtype_;
    int64_t piece_;  // elements
    bool checked_;
};

}  // namespace fastmerge
