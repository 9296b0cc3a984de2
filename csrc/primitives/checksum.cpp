#include "primitives/checksum.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "isa/table.h"

namespace fastmerge {

namespace {

constexpr int64_t kWordBytes = 4, kBlockWords = 1024, kBlockBytes = kBlockWords * kWordBytes;
constexpr int64_t kPieceBytes = 1 << 20;

constexpr std::array<uint64_t, kBlockWords> make_keys() {
    std::array<uint64_t, kBlockWords> keys{};
    uint64_t state = 0;
    for (auto& key : keys) {
        state += 0x9E3779B97F4A7C15u;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        key = z ^ (z >> 31);
    }
    return keys;
}

constexpr auto kKeys = make_keys();

// Some bytes of one word, from byte `at` of their block on: a word is the sum of its bytes, each at
// its place.
uint64_t weigh_bytes(const unsigned char* data, int64_t at, int64_t nbytes) {
    uint64_t total = 0;
    for (int64_t i = 0; i < nbytes; ++i, ++at)
        total += (uint64_t{data[i]} << 8 * (at % kWordBytes)) *
                 kKeys[static_cast<size_t>(at / kWordBytes)];
    return total;
}

// Part of one block, from its byte `at` on.
uint64_t weigh_part(const unsigned char* data, int64_t at, int64_t nbytes) {
    const int64_t before = std::min(nbytes, -at & (kWordBytes - 1));
    const int64_t words = (nbytes - before) / kWordBytes;
    const int64_t done = before + words * kWordBytes;
    return weigh_bytes(data, at, before) +
           kernels().weigh(data + before, kKeys.data() + (at + before) / kWordBytes, words) +
           weigh_bytes(data + done, at + done, nbytes - done);
}

}  // namespace

Checksum::Checksum(int64_t nbytes)
    : nbytes_(nbytes < 0 ? throw std::invalid_argument("nbytes must not be negative") : nbytes),
      blocks_((nbytes + kBlockBytes - 1) / kBlockBytes),
      sums_(new std::atomic<uint64_t>[static_cast<size_t>(blocks_)]()) {}

void Checksum::add(int64_t begin, const void* data, int64_t nbytes) {
    if (begin < 0 || nbytes < 0 || begin > nbytes_ || nbytes > nbytes_ - begin)
        throw std::invalid_argument("range outside the tensor");
    const auto* from = static_cast<const unsigned char*>(data);
    for (int64_t done = 0; done < nbytes;) {
        const int64_t block = (begin + done) / kBlockBytes, at = (begin + done) % kBlockBytes;
        const int64_t part = std::min(nbytes - done, kBlockBytes - at);
        // Two pieces may end in one block.
        sums_[static_cast<size_t>(block)].fetch_add(weigh_part(from + done, at, part),
                                                    std::memory_order_relaxed);
        done += part;
    }
    added_.fetch_add(nbytes, std::memory_order_release);
}

std::vector<uint64_t> Checksum::sums() const {
    if (added_.load(std::memory_order_acquire) != nbytes_)
        throw std::logic_error("the sums of a tensor that is not complete");
    std::vector<uint64_t> found(static_cast<size_t>(blocks_));
    for (size_t i = 0; i < found.size(); ++i) found[i] = sums_[i].load(std::memory_order_relaxed);
    return found;
}

void add_all(Pool& pool, const Span& tensor, Checksum& checksum) {
    const int64_t nbytes = tensor.count * static_cast<int64_t>(item_bytes(tensor.dtype));
    const char* data = tensor.at(0);
    pool.run((nbytes + kPieceBytes - 1) / kPieceBytes, [&](int64_t piece) {
        const int64_t begin = piece * kPieceBytes;
        checksum.add(begin, data + begin, std::min(kPieceBytes, nbytes - begin));
    });
}

}  // namespace fastmerge
