// The thread pool: several callers may run jobs at once; workers take tasks from the oldest job
// first, so a window of tensors in flight keeps every core busy while the output stays in file
// order.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace fastmerge {

// Counts forks on the way to this process: its id may be its parent's, in another namespace.
unsigned forks();

class Pool {
   public:
    explicit Pool(int threads);  // throws std::invalid_argument below 1
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    int threads() const { return threads_; }
    // In which tasks are handed out.
    enum class Order {
        kAscending,
        // The caller takes the first, workers the last: of a job like the one before each core then
        // takes what its caches hold. Linear merges of 4 MiB that follow one another take 80 us
        // from the third on, for 90 from the eighth on.
        kFromBothEnds,
    };
    // Calls task(0) ... task(tasks - 1) on the workers and on the caller, no more than `threads` at
    // a time in all, and returns when all are done; a single task runs on the caller. A caller
    // helps with its own job alone, and only where that is the oldest, so that order is kept. The
    // first exception a task throws is rethrown here; the job's remaining tasks are skipped. Safe
    // to call from several threads at once. Must not be called from a worker. In a forked child,
    // which has none of its parent's threads, the first call starts new ones.
    void run(int64_t tasks, const std::function<void(int64_t)>& task,
             Order order = Order::kAscending);

   private:
    struct State;
    State& state();
    const int threads_;
    std::atomic<State*> state_;
};

}  // namespace fastmerge
