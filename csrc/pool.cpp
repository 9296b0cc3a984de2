#include "pool.h"

#include <algorithm>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fastmerge {

namespace {

struct Job {
    const std::function<void(int64_t)>* task;
    int64_t tasks;
    int64_t next = 0;     // first task not handed out yet
    int64_t running = 0;  // handed out, not finished
    std::exception_ptr error;
    std::condition_variable finished;
    bool done() const { return next == tasks && running == 0; }
};

}  // namespace

struct Pool::State {
    std::mutex mutex;
    std::condition_variable work;
    std::deque<Job*> jobs;  // those with tasks to hand out, oldest first
    bool stopping = false;
    std::vector<std::thread> threads;

    void serve() {
        // Threads inherit the creator's floating-point mode; another library may have asked for
        // flushing denormals to zero (torch.set_flush_denormal), which would change the results.
        std::fesetenv(FE_DFL_ENV);
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
    }
};

Pool::Pool(int threads) : state_(new State) {
    if (threads < 1)
        throw std::invalid_argument("a pool needs at least 1 thread, not " +
                                    std::to_string(threads));
    try {
        for (int i = 0; i < threads; ++i)
            state_->threads.emplace_back([state = state_.get()] { state->serve(); });
    } catch (...) {  // the system refused a thread: those already started must be joined
        state_->stop();
        throw;
    }
}

Pool::~Pool() { state_->stop(); }

int Pool::threads() const { return static_cast<int>(state_->threads.size()); }

void Pool::run(int64_t tasks, const std::function<void(int64_t)>& task) {
    if (tasks <= 0) return;
    Job job;
    job.task = &task;
    job.tasks = tasks;
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->jobs.push_back(&job);
    state_->work.notify_all();
    job.finished.wait(lock, [&job] { return job.done(); });
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastmerge
