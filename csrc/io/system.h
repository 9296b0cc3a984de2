// Linux's own calls for files, memory and threads, and what stands for them elsewhere. There the
// sources compile (for macOS on arm64, by its SDK's headers), which is all that is known of it.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <signal.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#else
#include <pthread.h>
#endif

namespace fastmerge {

#if defined(__linux__)

constexpr int kDirect = O_DIRECT;

// File systems in memory accept O_DIRECT and then copy all the same; nobody must claim otherwise.
inline bool in_memory(int fd) {
    constexpr unsigned long kTmpfs = 0x01021994, kRamfs = 0x858458f6;
    struct statfs info;
    if (::fstatfs(fd, &info)) return false;
    const auto type = static_cast<unsigned long>(info.f_type) & 0xffffffffUL;
    return type == kTmpfs || type == kRamfs;
}

// 0, or the number of the error that says that there is no room.
inline int reserve(int fd, int64_t nbytes) {
    if (!::fallocate(fd, 0, 0, nbytes)) return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS) return errno;
    return ::ftruncate(fd, nbytes) ? errno : 0;
}

inline void start_writing(int fd, int64_t begin, int64_t nbytes) {
    ::sync_file_range(fd, begin, nbytes, SYNC_FILE_RANGE_WRITE);
}

inline void use_huge_pages(void* data, size_t nbytes) { ::madvise(data, nbytes, MADV_HUGEPAGE); }

inline int64_t thread_number() { return ::syscall(SYS_gettid); }

constexpr int kSentToThread = SI_TKILL;  // si_code of raise()

#else

constexpr int kDirect = 0;  // none: files are written through the page cache

inline bool in_memory(int) { return false; }

inline int reserve(int fd, int64_t nbytes) { return ::ftruncate(fd, nbytes) ? errno : 0; }

inline void start_writing(int, int64_t, int64_t) {}

inline void use_huge_pages(void*, size_t) {}

inline int64_t thread_number() {
    uint64_t number = 0;
    ::pthread_threadid_np(nullptr, &number);
    return static_cast<int64_t>(number);
}

constexpr int kSentToThread = 0;  // as of every signal that no instruction caused

#endif

}  // namespace fastmerge
