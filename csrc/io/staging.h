// Output files filled out of order by many threads, in bounded memory.
//
// A file is cut into aligned chunks of one buffer each. A chunk takes a buffer when its first piece
// opens; when its last byte is final an I/O thread writes the whole chunk and the buffer is free
// again. Callers that work on at most W tensors in file order hold at most 2 W + 1 unfinished
// chunks (the W + 1 chunks that tensors share at their ends, and the chunk each tensor is in the
// middle of), so 2 W + 2 buffers keep them moving and a few more (one per pool thread and I/O
// thread) keep everyone busy. With fewer buffers, or in any other order, nothing stalls either:
// when every buffer holds an unfinished chunk and nothing is on its way to the file, the one
// untouched for longest is written as it is and read back when its next piece opens.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "primitives/checksum.h"
#include "sink.h"

namespace fastmerge {

class StagedFile;

class Staging {
   public:
    // buffer_bytes: a power of two, at least 4096. Throws std::invalid_argument, std::bad_alloc.
    Staging(int64_t buffer_bytes, int buffers, int threads);
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;
    int64_t bytes_written() const { return bytes_written_; }
    int64_t spills() const { return spills_; }
    // Whether this process is a forked child of the one that made it. None of its threads exist
    // here, and its mutex may be one that such a thread held: it and its files are left as they
    // lie, never closed or freed.
    bool inherited() const { return born_ != forks(); }
    // Lets the I/O threads write what is queued and end. Later writes throw.
    void close();

   private:
    friend class StagedFile;
    struct Buffer {
        char* data = nullptr;
        StagedFile* file = nullptr;  // null: free
        int64_t chunk = 0;
        uint64_t touched = 0;
    };
    void serve();
    void spill_one();  // mutex_ held
    int take();        // mutex_ held; -1: none free
    void release(int buffer);

    const unsigned born_ = forks();
    const int64_t buffer_bytes_;
    size_t mapped_bytes_ = 0;
    char* mapped_ = nullptr;
    std::vector<Buffer> buffers_;
    std::vector<int> free_;   // last in, first out, so that memory never needed is never touched
    std::vector<int> queue_;  // buffers whose chunk is to be written; room for all
    int busy_ = 0;            // buffers queued or being written
    bool stopping_ = false;
    uint64_t clock_ = 0;
    std::atomic<int64_t> bytes_written_{0};
    std::atomic<int64_t> spills_{0};
    std::mutex mutex_;  // guards everything here and every file's chunks; never held across I/O
    std::condition_variable work_;      // for I/O threads
    std::condition_variable progress_;  // for everyone who waits for a buffer, a chunk or a file
    std::vector<std::thread> threads_;
};

class StagedFile : public std::enable_shared_from_this<StagedFile> {
   public:
    enum class Io { kAuto, kDirect, kBuffered };
    // Creates the file (or, on resume, opens what is there) and reserves its space. Throws IoError.
    StagedFile(std::shared_ptr<Staging> staging, std::string path, int64_t size, Io io,
               bool resume);
    ~StagedFile();
    StagedFile(const StagedFile&) = delete;
    StagedFile& operator=(const StagedFile&) = delete;

    bool direct() const { return direct_; }
    const Staging& staging() const { return *staging_; }
    // With a checksum, to which the tensor's bytes are added from its byte `first` on.
    std::shared_ptr<Sink> sink(int64_t offset, int64_t count, DType dtype,
                               std::shared_ptr<Checksum> checksum = nullptr, int64_t first = 0);
    void write(int64_t offset, const char* data, int64_t nbytes);
    bool done(int64_t offset, int64_t nbytes);
    void keep(int64_t offset, int64_t nbytes);
    void finish();
    void abandon();

   private:
    friend class Staging;
    friend class StagedSink;
    enum class State : uint8_t { kEmpty, kLoading, kFilling, kQueued, kSpilling, kWritten };
    struct Chunk {
        int64_t remaining = 0;  // bytes that are not final yet
        int buffer = -1;
        int pins = 0;  // pieces open now
        State state = State::kEmpty;
        bool preload = false;  // the file holds bytes of it that must survive
    };
    char* open(int64_t offset);
    const char* opened(int64_t offset) const;  // of a piece that is open
    void close(int64_t offset, int64_t nbytes);
    void check(int64_t offset, int64_t nbytes) const;
    void raise_if_dead() const;  // mutex_ held
    int write_chunk(int64_t chunk, const char* data);
    int read_chunk(int64_t chunk, char* data);
    int64_t chunk_bytes(int64_t chunk) const;
    void stop(std::unique_lock<std::mutex>& lock);
    int descriptor(int& error);  // opens the file if it is not; -1: see error
    int close_descriptor();      // errno, or 0

    const std::shared_ptr<Staging> staging_;
    const std::string path_;
    const int64_t size_;
    const Io io_;
    std::atomic<bool> direct_{false};
    // Open from the first chunk that is written or read back to the last: a merge into hundreds of
    // shards has a few open at a time, whatever `ulimit -n` says.
    int fd_ = -1;
    std::mutex fd_mutex_;  // guards fd_ alone; taken last
    bool finished_ = false;
    size_t unwritten_ = 0;  // chunks that are not in the file for good
    std::vector<Chunk> chunks_;
    int writing_ = 0;  // its chunks in the hands of I/O threads or being read back
    int error_ = 0;    // the first errno
    bool abandoned_ = false;
};

}  // namespace fastmerge
