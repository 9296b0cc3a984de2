// A file mapped read-only. A file truncated by someone else while it is mapped raises SIGBUS on
// access: that is out of our hands, so callers check sizes when they open and tell users not to
// change inputs.
#pragma once
#include <cstdint>
#include <string>

namespace fastmerge {

class Mapping {
   public:
    explicit Mapping(const std::string& path);  // throws IoError
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    int64_t size() const { return size_; }
    // The byte at offset; throws std::invalid_argument unless [offset, offset + nbytes) is inside
    // the file.
    const char* at(int64_t offset, int64_t nbytes) const;
    void prefetch(int64_t offset, int64_t nbytes) const;
    void drop(int64_t offset, int64_t nbytes) const;

   private:
    char* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace fastmerge
