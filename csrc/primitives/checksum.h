// What a tensor's bytes add up to, taken while they are in the cache: it finds out later whether
// they are still the ones that were written. It says nothing against whoever can write the sums
// too.
//
// The bytes are cut into blocks of 4096, counted from the tensor's first one, the last block filled
// up with zeros. A block is 1024 words of 32 bits, little endian, and its sum is
//     sum over j of word_j * key_j mod 2^64,
// key_j being output j of splitmix64 from state 0 (Steele, Lea and Flood 2014). A sum of products
// can be added up in any order and from any parts, so pieces of any size and number of threads give
// the same. A change of one word always changes its block's sum (no key is 0 in its low 33 bits);
// any other, if it knows nothing of the keys, leaves it as it was once in 2^64.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "pool.h"
#include "tensor.h"

namespace fastmerge {

class Checksum {
   public:
    explicit Checksum(int64_t nbytes);  // throws std::invalid_argument below 0
    int64_t nbytes() const { return nbytes_; }
    // Bytes [begin, begin + nbytes) of the tensor; each once, in any order, from any thread.
    void add(int64_t begin, const void* data, int64_t nbytes);
    // One for each block. Throws std::logic_error before every byte was added.
    std::vector<uint64_t> sums() const;

   private:
    const int64_t nbytes_;
    const int64_t blocks_;
    const std::unique_ptr<std::atomic<uint64_t>[]> sums_;
    std::atomic<int64_t> added_{0};
};

// Adds a whole tensor, which must have an address.
void add_all(Pool& pool, const Span& tensor, Checksum& checksum);

}  // namespace fastmerge
