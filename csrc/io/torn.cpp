#include "io/torn.h"

#include <signal.h>

#include <atomic>
#include <cerrno>
#include <cstdint>

#include "io/system.h"

namespace fastmerge {

// A signal handler takes no lock and frees nothing: ranges lie in blocks that are only ever added.
// `end` is cleared before `begin` changes and set after it, so that equal ends around a read of
// `begin` mean that the two belong together.
struct Range {
    std::atomic<bool> taken{false};
    std::atomic<bool> torn{false};
    std::atomic<uintptr_t> begin{0};
    std::atomic<uintptr_t> end{0};  // 0: no range
};

namespace {

struct Block {
    Range ranges[64];
    std::atomic<Block*> next{nullptr};
};

const uintptr_t kPage = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
Block first;
std::atomic<const struct sigaction*> before{nullptr};  // what handled SIGBUS until we did
std::atomic<int64_t> passing_on{0};                    // the thread that is inside it
std::atomic<int64_t> passed_on{0};                     // the thread that was, after a fault

bool patch(uintptr_t address) {
    for (Block* block = &first; block; block = block->next) {
        for (Range& range : block->ranges) {
            const uintptr_t end = range.end;
            const uintptr_t begin = range.begin;
            if (end == 0 || address < begin || address >= end || end != range.end) continue;
            const uintptr_t from = address & ~(kPage - 1);
            void* zeros = ::mmap(reinterpret_cast<void*>(from), end - from, PROT_READ,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            if (zeros == MAP_FAILED) return false;
            range.torn = true;
            return true;
        }
    }
    return false;
}

// As if we were not here. A handler that gives way to its own predecessor and raises the signal
// again may come back to us (Python's faulthandler, enabled after our first file), at once or when
// we return: then there is nobody left to ask.
void pass_on(int number, siginfo_t* info, void* context) {
    const struct sigaction* old = before;
    const int64_t self = thread_number();
    const bool sent = info->si_code <= 0;  // by kill or raise: no instruction will fault again
    const bool again = passing_on == self || (info->si_code == kSentToThread && passed_on == self);
    const bool handles =
        (old->sa_flags & SA_SIGINFO) || (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN);
    if (handles && !again) {
        passing_on = self;
        if (old->sa_flags & SA_SIGINFO)
            old->sa_sigaction(number, info, context);
        else
            old->sa_handler(number);
        passing_on = 0;
        if (!sent) passed_on = self;
        return;
    }
    if (sent && !handles && old->sa_handler == SIG_IGN) return;
    struct sigaction fatal = {};
    fatal.sa_handler = SIG_DFL;
    ::sigaction(number, &fatal, nullptr);
    if (sent) ::raise(number);
}

void on_sigbus(int number, siginfo_t* info, void* context) {
    const int error = errno;
    if (info->si_code <= 0 || !patch(reinterpret_cast<uintptr_t>(info->si_addr)))
        pass_on(number, info, context);
    errno = error;
}

// With every file, as others may have put themselves in our place since.
void install() {
    struct sigaction now;
    if (::sigaction(SIGBUS, nullptr, &now)) return;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) return;
    before = new struct sigaction(now);  // never freed: a handler may be reading the last one
    struct sigaction ours = {};
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);  // a macro elsewhere
    ::sigaction(SIGBUS, &ours, nullptr);
}

Range* take() {
    for (Block* block = &first;;) {
        for (Range& range : block->ranges)
            if (!range.taken.exchange(true)) return &range;
        Block* next = block->next;
        if (!next) {
            auto* made = new Block;
            if (block->next.compare_exchange_strong(next, made)) {
                next = made;
            } else {
                delete made;  // another thread was faster: `next` is its block
            }
        }
        block = next;
    }
}

}  // namespace

Watch::Watch(void* data, size_t nbytes) {
    install();  // first: it may find no memory
    range_ = take();
    const auto begin = reinterpret_cast<uintptr_t>(data);
    range_->torn = false;
    range_->begin = begin;
    range_->end = (begin + nbytes + kPage - 1) & ~(kPage - 1);
}

Watch::~Watch() {
    range_->end = 0;
    range_->begin = 0;
    range_->taken = false;
}

bool Watch::torn() const { return range_->torn; }

}  // namespace fastmerge
