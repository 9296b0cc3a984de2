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
    // The piece's bytes are final. Called once after open, by the same thread.
    virtual void close(int64_t piece) = 0;
};

// A plain block of memory that the caller keeps alive, cut into pieces of 128 Ki elements.
class MemorySink final : public Sink {
   public:
    static constexpr int64_t kPiece = 1 << 17;
    MemorySink(void* data, int64_t count, DType dtype)
        : data_(static_cast<char*>(data)), count_(count), dtype_(dtype) {}
    DType dtype() const override { return dtype_; }
    int64_t count() const override { return count_; }
    int64_t pieces() const override { return (count_ + kPiece - 1) / kPiece; }
    void range(int64_t piece, int64_t& begin, int64_t& end) const override {
        begin = piece * kPiece;
        end = begin + kPiece < count_ ? begin + kPiece : count_;
    }
    void* open(int64_t piece) override {
        return data_ + piece * kPiece * static_cast<int64_t>(item_bytes(dtype_));
    }
    void close(int64_t) override {}

   private:
    char* data_;
    int64_t count_;
    DType dtype_;
};

}  // namespace fastmerge
