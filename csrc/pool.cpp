#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastmerge {

namespace {

// Threads inherit the creator's floating-point mode, and a caller has its own; another library may
// have asked for flushing denormals to zero (torch.set_flush_denormal), which would change results.
#if defined(__x86_64__)
// Of SSE's alone, which is all that computes here: fesetenv sets x87's too, in 0.1 us.
using FloatMode = unsigned;
constexpr FloatMode kDefaultMode = 0x1F80;  // all exceptions masked, to nearest, no flushing
FloatMode float_mode() { return _mm_getcsr(); }
void set_default_mode() { _mm_setcsr(kDefaultMode); }
void set_mode(const FloatMode& mode) { _mm_setcsr(mode); }
#else
using FloatMode = std::fenv_t;
FloatMode float_mode() {
    FloatMode mode;
    std::fegetenv(&mode);
    return mode;
}
void set_default_mode() { std::fesetenv(FE_DFL_ENV); }
void set_mode(const FloatMode& mode) { std::fesetenv(&mode); }
#endif

class DefaultFloats {
   public:
    DefaultFloats() { set_default_mode(); }
    ~DefaultFloats() { set_mode(before_); }
    DefaultFloats(const DefaultFloats&) = delete;
    DefaultFloats& operator=(const DefaultFloats&) = delete;

   private:
    const FloatMode before_ = float_mode();
};

struct Job {
    const std::function<void(int64_t)>* task;
    int64_t tasks;
    Pool::Order order;
    int64_t next = 0;     // first task not handed out yet
    int64_t end = tasks;  // and the first after it that is, or there is none
    int64_t running = 0;  // handed out, not finished
    std::exception_ptr error{};
    std::atomic<bool> done{false};
    std::condition_variable finished{};
};

// How long a thread without work looks for some before it sleeps: to wake one takes 20 to 50 us on
// a virtual machine, which is as long as the kernels of a tensor of 1 MiB. A caller in Python comes
// back after 10 us, after a pause, with cold caches, 40 to 90.
constexpr std::chrono::microseconds kPatience{100};

// Whether `ready` came true in that time.
template <class Ready>
bool soon(const Ready& ready) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

// A thread is often woken on the core of the caller that it should help, and waits for it: where
// other programs keep the other cores busy, and on two cores where the other one is idle, too
// (linear merges of 4 MiB after a pause took 350 us for 220). So it sleeps with that core
// forbidden, and may be moved back afterwards.
#if defined(__linux__)
int this_core() { return sched_getcpu(); }  // -1: not known
class Elsewhere {
   public:
    explicit Elsewhere(int core) {
        if (core < 0 || sched_getaffinity(0, sizeof all_, &all_) != 0) return;
        others_ = all_;
        CPU_CLR(static_cast<size_t>(core), &others_);
        // The only core there is, or of more than a set has room for: it stays.
        moved_ = CPU_COUNT(&others_) != 0 && sched_setaffinity(0, sizeof others_, &others_) == 0;
    }
    ~Elsewhere() {
        cpu_set_t now;  // or somebody said meanwhile where it may be
        if (moved_ && sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &others_))
            sched_setaffinity(0, sizeof all_, &all_);
    }
    Elsewhere(const Elsewhere&) = delete;
    Elsewhere& operator=(const Elsewhere&) = delete;

   private:
    cpu_set_t all_, others_;
    bool moved_ = false;
};
#else
int this_core() { return -1; }
class Elsewhere {
   public:
    explicit Elsewhere(int) {}
};
#endif

std::atomic<unsigned> generation{0};
const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++generation; });

}  // namespace

unsigned forks() { return generation; }

struct Pool::State {
    const unsigned born = generation;
    const int most;  // tasks at a time, callers' among them
    std::mutex mutex;
    std::condition_variable work;
    std::deque<Job*> jobs;  // those with tasks to hand out, oldest first
    std::atomic<unsigned> posted{0};
    std::atomic<int> callers_core{this_core()};  // of the last job
    int active = 0;                              // tasks that are running
    int looking = 0;                             // threads that find work without being woken
    int watching = 0;                            // callers that look whether their job is done
    bool stopping = false;
    std::vector<std::thread> threads;

    bool has_work() const { return !jobs.empty() && active < most; }

    // Whether a core is idle: one that looks beside as many tasks as there are cores slows them.
    bool may_look() const { return active + looking + watching < most; }

    // Hands out the oldest job's next task to this thread, which holds the lock but while it works.
    void step(std::unique_lock<std::mutex>& lock, bool is_caller) {
        Job& job = *jobs.front();
        const bool first = is_caller || job.order == Pool::Order::kAscending;
        const int64_t index = first ? job.next++ : --job.end;
        if (job.next == job.end) jobs.pop_front();
        ++job.running;
        ++active;
        lock.unlock();
        std::exception_ptr error;
        try {
            (*job.task)(index);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        --active;
        --job.running;
        if (error && !job.error) {
            job.error = error;
            jobs.erase(std::remove(jobs.begin(), jobs.end(), &job), jobs.end());
            job.next = job.end;
        }
        if (job.next == job.end && job.running == 0) {
            job.done = true;
            job.finished.notify_all();
        }
    }

    // Until there is work, which another thread may take.
    void sleep() {
        const int core = callers_core;
        {
            const Elsewhere elsewhere(core);
            std::unique_lock<std::mutex> lock(mutex);
            work.wait(lock, [this] { return stopping || has_work(); });
        }
        const int now = callers_core;
        if (now != core && now == this_core()) Elsewhere{now};
    }

    void serve() {
        const DefaultFloats mode;
        std::unique_lock<std::mutex> lock(mutex);
        for (bool fresh = true;; fresh = false) {
            if (!fresh && !has_work() && may_look() && !stopping) {
                const unsigned seen = posted;
                ++looking;
                lock.unlock();
                soon([&] { return posted != seen; });
                lock.lock();
                --looking;
            }
            if (!stopping && !has_work()) {
                lock.unlock();
                sleep();
                lock.lock();
            }
            if (jobs.empty()) {
                if (stopping) return;
            } else if (stopping || has_work()) {  // or another thread was faster
                step(lock, false);
            }
        }
    }

    // Runs a job, with this thread's help where no older one is waiting.
    void run(Job& job) {
        const DefaultFloats mode;
        std::unique_lock<std::mutex> lock(mutex);
        jobs.push_back(&job);
        callers_core = this_core();
        ++posted;
        const auto helpers = std::min<int64_t>(job.tasks, most) - (jobs.front() == &job ? 1 : 0);
        for (int64_t i = looking; i < helpers; ++i) work.notify_one();
        while (has_work() && jobs.front() == &job) step(lock, true);
        if (has_work()) work.notify_one();  // this thread's place is free
        if (!job.done) {
            if (may_look()) {
                ++watching;
                lock.unlock();
                soon([&job] { return job.done.load(); });
                lock.lock();
                --watching;
            }
            job.finished.wait(lock, [&job] { return job.done.load(); });
        }
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
        }
        work.notify_all();
        for (std::thread& thread : threads) thread.join();
        threads.clear();
    }

    explicit State(int count) : most(count) {
        try {
            for (int i = 0; i < count; ++i) threads.emplace_back([this] { serve(); });
        } catch (...) {  // the system refused a thread: those already started must be joined
            stop();
            throw;
        }
    }
    ~State() { stop(); }
};

Pool::Pool(int threads) : threads_(threads), state_(nullptr) {
    if (threads < 1)
        throw std::invalid_argument("a pool needs at least 1 thread, not " +
                                    std::to_string(threads));
    state_ = new State(threads);
}

// What a forked child inherits is left as it lies, never locked, joined or freed: none of its
// threads exist there, and its mutex may be one that such a thread held.
Pool::~Pool() {
    State* state = state_;
    if (state->born == generation) delete state;
}

Pool::State& Pool::state() {
    State* found = state_;
    if (found->born == generation) return *found;
    auto made = std::make_unique<State>(threads_);
    if (state_.compare_exchange_strong(found, made.get())) return *made.release();
    return *found;  // another thread of the child was faster
}

void Pool::run(int64_t tasks, const std::function<void(int64_t)>& task, Order order) {
    if (tasks <= 0) return;
    if (tasks == 1) {  // nothing to share: spare the tens of microseconds of the hand-over
        const DefaultFloats mode;
        task(0);
        return;
    }
    Job job{&task, tasks, order};
    state().run(job);
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastmerge
