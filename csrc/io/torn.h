// Mapped files that lose pages while they are read: truncated by somebody, or on a disk that fails.
//
// The kernel answers a read of such a page with SIGBUS, which would end the process. Here the page,
// and all of the mapping after it, is replaced by zeros and the mapping is marked: the read goes
// on, and whoever asks `torn` afterwards throws its result away. Nothing is added to a read that
// goes well. Faults anywhere else go to the handler that was there before.
#pragma once
#include <cstddef>

namespace fastmerge {

class Watch {
   public:
    // The range must be mapped for as long as the watch lives; data begins a page.
    Watch(void* data, size_t nbytes);
    ~Watch();
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;
    bool torn() const;

   private:
    struct Range* range_;
};

}  // namespace fastmerge
