// A file mapped read-only. Where somebody truncates it meanwhile, or the disk fails, the pages that
// are gone read as zeros and the mapping is `torn`: what was computed from it is worth nothing.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "io/torn.h"

namespace fastmerge {

class Mapping {
   public:
    explicit Mapping(const std::string& path);  // throws IoError
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    int64_t size() const { return size_; }
    bool torn() const { return watch_ && watch_->torn(); }
    // The byte at offset; throws std::invalid_argument unless [offset, offset + nbytes) is inside
    // the file.
    const char* at(int64_t offset, int64_t nbytes) const;
    void prefetch(int64_t offset, int64_t nbytes) const;
    void drop(int64_t offset, int64_t nbytes) const;

   private:
    char* data_ = nullptr;
    int64_t size_ = 0;
    std::unique_ptr<Watch> watch_;
};

}  // namespace fastmerge
