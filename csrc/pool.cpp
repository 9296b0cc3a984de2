#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fastmerge {

namespace {

// Threads inherit the creator's floating-point mode, and a caller has its own; another library may
// have asked for flushing denormals to zero (torch.set_flush_denormal), which would change results.
class DefaultFloats {
   public:
    DefaultFloats() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloats() { std::fesetenv(&before_); }
    DefaultFloats(const DefaultFloats&) = delete;
    DefaultFloats& operator=(const DefaultFloats&) = delete;

   private:
    std::fenv_t before_;
};

struct Job {
    const std::function<void(int64_t)>* task;
    int64_t tasks;
    int64_t next = 0;     // first task not handed out yet
    int64_t running = 0;  // handed out, not finished
    std::exception_ptr error;
    std::condition_variable finished;
    bool done() const { return next == tasks && running == 0; }
};

std::atomic<unsigned> generation{0};
const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++generation; });

}  // namespace

unsigned forks() { return generation; }

struct Pool::State {
    const unsigned born = generation;
    std::mutex mutex;
    std::condition_variable work;
    std::deque<Job*> jobs;  // those with tasks to hand out, oldest first
    bool stopping = false;
    std::vector<std::thread> threads;

    void serve() {
        const DefaultFloats mode;
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            work.wait(lock, [this] { return stopping || !jobs.empty(); });
            if (jobs.empty()) return;
            Job& job = *jobs.front();
            const int64_t index = job.next++;
            if (job.next == job.tasks) jobs.pop_front();
            ++job.running;
            lock.unlock();
            std::exception_ptr error;
            try {
                (*job.task)(index);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            --job.running;
            if (error && !job.error) {
                job.error = error;
                jobs.erase(std::remove(jobs.begin(), jobs.end(), &job), jobs.end());
                job.next = job.tasks;
            }
            if (job.done()) job.finished.notify_all();
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

    explicit State(int count) {
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

void Pool::run(int64_t tasks, const std::function<void(int64_t)>& task) {
    if (tasks <= 0) return;
    if (tasks == 1) {  // nothing to share: spare the tens of microseconds of the hand-over
        const DefaultFloats mode;
        task(0);
        return;
    }
    Job job;
    job.task = &task;
    job.tasks = tasks;
    State& state = this->state();
    std::unique_lock<std::mutex> lock(state.mutex);
    state.jobs.push_back(&job);
    state.work.notify_all();
    job.finished.wait(lock, [&job] { return job.done(); });
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastmerge
