#include "io/staging.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>

#include "io/error.h"
#include "io/system.h"

namespace fastmerge {

namespace {

constexpr int64_t kAlign = 4096;             // what direct I/O needs on every common disk
constexpr int64_t kPieceBytes = 512 * 1024;  // a tensor of 4 MiB still keeps eight workers busy
constexpr int64_t kHugePage = 2 << 20;

int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

// The sink of one tensor. Pieces end at multiples of kPieceBytes in the file, so none crosses a
// chunk.
class StagedSink final : public Sink {
   public:
    StagedSink(std::shared_ptr<StagedFile> file, int64_t offset, int64_t count, DType dtype,
               int64_t piece_bytes, std::shared_ptr<Checksum> checksum, int64_t first_byte)
        : file_(std::move(file)),
          offset_(offset),
          count_(count),
          dtype_(dtype),
          item_(static_cast<int64_t>(item_bytes(dtype))),
          piece_bytes_(piece_bytes),
          first_(offset / piece_bytes),
          checksum_(std::move(checksum)),
          first_byte_(first_byte) {}
    DType dtype() const override { return dtype_; }
    int64_t count() const override { return count_; }
    int64_t pieces() const override {
        return count_ ? (offset_ + count_ * item_ - 1) / piece_bytes_ - first_ + 1 : 0;
    }
    void range(int64_t piece, int64_t& begin, int64_t& end) const override {
        begin = std::max<int64_t>(0, ((first_ + piece) * piece_bytes_ - offset_) / item_);
        end = std::min(count_, ((first_ + piece + 1) * piece_bytes_ - offset_) / item_);
    }
    void* open(int64_t piece) override {
        int64_t begin, end;
        range(piece, begin, end);
        return file_->open(offset_ + begin * item_);
    }
    void close(int64_t piece) override {
        int64_t begin, end;
        range(piece, begin, end);
        if (checksum_)
            checksum_->add(first_byte_ + begin * item_, file_->opened(offset_ + begin * item_),
                           (end - begin) * item_);
        file_->close(offset_ + begin * item_, (end - begin) * item_);
    }

   private:
    const std::shared_ptr<StagedFile> file_;
    const int64_t offset_, count_;
    const DType dtype_;
    const int64_t item_, piece_bytes_, first_;
    const std::shared_ptr<Checksum> checksum_;
    const int64_t first_byte_;
};

// --- Staging ---

Staging::Staging(int64_t buffer_bytes, int buffers, int threads) : buffer_bytes_(buffer_bytes) {
    if (buffer_bytes < kAlign || (buffer_bytes & (buffer_bytes - 1)))
        throw std::invalid_argument("buffer_bytes must be a power of two, at least 4096");
    if (buffers < 1 || threads < 1)
        throw std::invalid_argument("buffers and threads must be at least 1");
    buffers_.resize(static_cast<size_t>(buffers));
    free_.reserve(buffers_.size());
    queue_.reserve(buffers_.size());  // no memory is asked for once a chunk's state has changed
    mapped_bytes_ = static_cast<size_t>(buffer_bytes * buffers + kHugePage);
    void* mapped =
        ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<char*>(mapped);
    char* data = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(mapped_), kHugePage));
    // Direct I/O pins every page of a buffer for every write: 2 huge pages instead of 1024 small
    // ones.
    use_huge_pages(data, static_cast<size_t>(buffer_bytes * buffers));
    for (int i = buffers - 1; i >= 0; --i) {
        buffers_[static_cast<size_t>(i)].data = data + i * buffer_bytes;
        free_.push_back(i);
    }
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {  // the system refused a thread: those already started must be joined
        close();
        ::munmap(mapped_, mapped_bytes_);
        throw;
    }
}

Staging::~Staging() {
    close();
    ::munmap(mapped_, mapped_bytes_);
}

void Staging::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    work_.notify_all();
    progress_.notify_all();
    for (auto& thread : threads_)
        if (thread.joinable()) thread.join();
}

int Staging::take() {
    if (free_.empty()) return -1;
    const int buffer = free_.back();
    free_.pop_back();
    return buffer;
}

void Staging::release(int buffer) {
    buffers_[static_cast<size_t>(buffer)].file = nullptr;
    free_.push_back(buffer);
    progress_.notify_all();
}

void Staging::spill_one() {
    Buffer* oldest = nullptr;
    for (auto& buffer : buffers_) {
        if (!buffer.file) continue;
        const auto& chunk = buffer.file->chunks_[static_cast<size_t>(buffer.chunk)];
        if (chunk.state != StagedFile::State::kFilling || chunk.pins) continue;
        if (!oldest || buffer.touched < oldest->touched) oldest = &buffer;
    }
    if (!oldest) return;
    oldest->file->chunks_[static_cast<size_t>(oldest->chunk)].state = StagedFile::State::kSpilling;
    ++oldest->file->writing_;
    ++busy_;
    ++spills_;
    queue_.push_back(static_cast<int>(oldest - buffers_.data()));
    work_.notify_one();
}

void Staging::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        const int index = queue_.front();
        queue_.erase(queue_.begin());
        Buffer& buffer = buffers_[static_cast<size_t>(index)];
        StagedFile& file = *buffer.file;  // alive: its destructor waits until writing_ is 0
        const int64_t number = buffer.chunk;
        int error = ECANCELED;
        if (!file.error_ && !file.abandoned_) {
            lock.unlock();
            error = file.write_chunk(number, buffer.data);
            lock.lock();
        }
        auto& chunk = file.chunks_[static_cast<size_t>(number)];
        const bool whole = chunk.state == StagedFile::State::kQueued;
        chunk.state = whole && !error ? StagedFile::State::kWritten : StagedFile::State::kEmpty;
        chunk.preload = !whole;
        chunk.buffer = -1;
        if (error && !file.error_) file.error_ = error;
        if (chunk.state == StagedFile::State::kWritten && --file.unwritten_ == 0) {
            lock.unlock();  // a network file system writes now, and may say only now that it failed
            error = file.close_descriptor();
            lock.lock();
            if (error) file.error_ = error;
        }
        --file.writing_;
        --busy_;
        release(index);
    }
}

// --- StagedFile ---

StagedFile::StagedFile(std::shared_ptr<Staging> staging, std::string path, int64_t size, Io io,
                       bool resume)
    : staging_(std::move(staging)), path_(std::move(path)), size_(size), io_(io) {
    if (size < 0) throw std::invalid_argument("size must not be negative");
    const int flags = O_RDWR | O_CLOEXEC | (resume ? 0 : O_CREAT | O_TRUNC);
    if (io != Io::kBuffered) {
        fd_ = ::open(path_.c_str(), flags | kDirect, 0666);
        direct_ = fd_ >= 0;
        if (fd_ >= 0 && (!kDirect || in_memory(fd_))) {
            ::close(fd_);
            fd_ = -1;
            errno = EINVAL;
            direct_ = false;
        }
        if (fd_ < 0 && (io == Io::kDirect || errno != EINVAL)) throw IoError(errno, path_);
    }
    if (fd_ < 0) fd_ = ::open(path_.c_str(), flags, 0666);
    if (fd_ < 0) throw IoError(errno, path_);
    // Reserving the space finds a full disk before any work is done. Padded, so that the last
    // direct write fits.
    const int64_t reserved = round_up(size, kAlign);
    const int failed = reserved ? reserve(fd_, reserved) : 0;
    ::close(fd_);
    fd_ = -1;
    if (failed) throw IoError(failed, path_);
    const int64_t chunk = staging_->buffer_bytes_;
    chunks_.resize(static_cast<size_t>((size + chunk - 1) / chunk));
    for (size_t i = 0; i < chunks_.size(); ++i)
        chunks_[i].remaining = chunk_bytes(static_cast<int64_t>(i));
    unwritten_ = chunks_.size();
}

StagedFile::~StagedFile() {
    abandon();
    std::lock_guard<std::mutex> lock(staging_->mutex_);
    // No sink is left, so a piece still open belongs to a kernel that failed midway.
    for (const auto& chunk : chunks_)
        if (chunk.buffer >= 0) staging_->release(chunk.buffer);
}

int64_t StagedFile::chunk_bytes(int64_t chunk) const {
    return std::min(staging_->buffer_bytes_, size_ - chunk * staging_->buffer_bytes_);
}

void StagedFile::check(int64_t offset, int64_t nbytes) const {
    if (offset < 0 || nbytes < 0 || offset > size_ || nbytes > size_ - offset)
        throw std::invalid_argument("range outside " + path_);
}

void StagedFile::raise_if_dead() const {
    if (error_) throw IoError(error_, path_);
    if (abandoned_ || staging_->stopping_) throw IoError(ECANCELED, path_);
}

std::shared_ptr<Sink> StagedFile::sink(int64_t offset, int64_t count, DType dtype,
                                       std::shared_ptr<Checksum> checksum, int64_t first) {
    const int64_t item = static_cast<int64_t>(item_bytes(dtype));
    if (count < 0 || count > size_ / item) throw std::invalid_argument("range outside " + path_);
    check(offset, count * item);
    if (offset % item) throw std::invalid_argument("offset must be a multiple of the item size");
    if (checksum && (first < 0 || count * item > checksum->nbytes() - first))
        throw std::invalid_argument("range outside the checksum's tensor");
    return std::make_shared<StagedSink>(shared_from_this(), offset, count, dtype,
                                        std::min(kPieceBytes, staging_->buffer_bytes_),
                                        std::move(checksum), first);
}

void StagedFile::write(int64_t offset, const char* data, int64_t nbytes) {
    const auto out = sink(offset, nbytes, DType::kRaw);
    for (int64_t piece = 0; piece < out->pieces(); ++piece) {
        int64_t begin, end;
        out->range(piece, begin, end);
        std::memcpy(out->open(piece), data + begin, static_cast<size_t>(end - begin));
        out->close(piece);
    }
}

char* StagedFile::open(int64_t offset) {
    const int64_t number = offset / staging_->buffer_bytes_;
    Chunk& chunk = chunks_[static_cast<size_t>(number)];
    std::unique_lock<std::mutex> lock(staging_->mutex_);
    for (;;) {
        raise_if_dead();
        if (chunk.state == State::kQueued || chunk.state == State::kWritten)
            throw std::logic_error("bytes written twice in " + path_);
        if (chunk.state == State::kEmpty) {
            chunk.buffer = staging_->take();
            if (chunk.buffer >= 0) {
                auto& buffer = staging_->buffers_[static_cast<size_t>(chunk.buffer)];
                buffer.file = this;
                buffer.chunk = number;
                if (chunk.preload) {
                    chunk.state = State::kLoading;
                    ++writing_;
                    lock.unlock();
                    const int error = read_chunk(number, buffer.data);
                    lock.lock();
                    --writing_;
                    if (error && !error_) error_ = error;
                    staging_->progress_.notify_all();
                }
                chunk.state = State::kFilling;
                if (error_ || abandoned_) {
                    chunk.state = State::kEmpty;
                    staging_->release(chunk.buffer);
                    chunk.buffer = -1;
                    continue;
                }
            } else if (staging_->busy_ == 0) {
                staging_->spill_one();
            }
        }
        if (chunk.state == State::kFilling) {
            auto& buffer = staging_->buffers_[static_cast<size_t>(chunk.buffer)];
            buffer.touched = ++staging_->clock_;
            ++chunk.pins;
            return buffer.data + (offset - number * staging_->buffer_bytes_);
        }
        staging_->progress_.wait(lock);
    }
}

const char* StagedFile::opened(int64_t offset) const {
    // Nobody changes a chunk's buffer while a piece of it is open.
    const int64_t number = offset / staging_->buffer_bytes_;
    const auto buffer = static_cast<size_t>(chunks_[static_cast<size_t>(number)].buffer);
    return staging_->buffers_[buffer].data + (offset - number * staging_->buffer_bytes_);
}

void StagedFile::close(int64_t offset, int64_t nbytes) {
    Chunk& chunk = chunks_[static_cast<size_t>(offset / staging_->buffer_bytes_)];
    std::lock_guard<std::mutex> lock(staging_->mutex_);
    --chunk.pins;
    chunk.remaining -= nbytes;
    if (error_ || abandoned_) {
        if (chunk.pins == 0 && chunk.state == State::kFilling) {
            chunk.state = State::kEmpty;
            staging_->release(chunk.buffer);
            chunk.buffer = -1;
        }
    } else if (chunk.remaining == 0) {
        chunk.state = State::kQueued;
        ++writing_;
        ++staging_->busy_;
        staging_->queue_.push_back(chunk.buffer);
        staging_->work_.notify_one();
    } else if (chunk.pins == 0 && staging_->free_.empty()) {
        staging_->progress_.notify_all();  // it may be spilled now
    }
}

bool StagedFile::done(int64_t offset, int64_t nbytes) {
    check(offset, nbytes);
    if (nbytes == 0) return true;
    const int64_t size = staging_->buffer_bytes_;
    std::lock_guard<std::mutex> lock(staging_->mutex_);
    for (int64_t i = offset / size; i <= (offset + nbytes - 1) / size; ++i)
        if (chunks_[static_cast<size_t>(i)].state != State::kWritten) return false;
    return true;
}

void StagedFile::keep(int64_t offset, int64_t nbytes) {
    check(offset, nbytes);
    const int64_t size = staging_->buffer_bytes_, end = offset + nbytes;
    std::lock_guard<std::mutex> lock(staging_->mutex_);
    for (int64_t at = offset; at < end;) {
        const int64_t number = at / size, past = std::min(end, (number + 1) * size);
        Chunk& chunk = chunks_[static_cast<size_t>(number)];
        if (chunk.state != State::kEmpty || chunk.remaining < past - at)
            throw std::logic_error("bytes kept twice, or after writing began, in " + path_);
        chunk.preload = true;
        chunk.remaining -= past - at;
        if (chunk.remaining == 0) {
            chunk.state = State::kWritten;
            --unwritten_;
        }
        at = past;
    }
}

int StagedFile::descriptor(int& error) {
    std::lock_guard<std::mutex> lock(fd_mutex_);
    if (fd_ < 0) fd_ = ::open(path_.c_str(), O_RDWR | O_CLOEXEC | (direct_ ? kDirect : 0));
    error = fd_ < 0 ? errno : 0;
    return fd_;
}

int StagedFile::close_descriptor() {
    std::lock_guard<std::mutex> lock(fd_mutex_);
    const int failed = fd_ >= 0 && ::close(fd_) ? errno : 0;
    fd_ = -1;
    return failed;
}

int StagedFile::write_chunk(int64_t number, const char* data) {
    int error = 0;
    const int fd = descriptor(error);
    if (error) return error;
    const int64_t begin = number * staging_->buffer_bytes_;
    const int64_t exact = chunk_bytes(number);
    int64_t nbytes = exact;
    if (direct_) {
        nbytes = round_up(exact, kAlign);
        std::memset(const_cast<char*>(data) + exact, 0, static_cast<size_t>(nbytes - exact));
    }
    for (int64_t at = 0; at < nbytes;) {
        const ssize_t wrote = ::pwrite(fd, data + at, static_cast<size_t>(nbytes - at), begin + at);
        if (wrote > 0) {
            at += wrote;
        } else if (wrote < 0 && errno == EINVAL && direct_ && io_ == Io::kAuto) {
            // Some file systems take the flag at open and refuse the write.
            if (::fcntl(fd, F_SETFL, 0)) return errno;
            direct_ = false;
        } else if (wrote == 0 || errno != EINTR) {
            return wrote == 0 ? EIO : errno;
        }
    }
    // Start the disk now: the fsync at the end would find everything still to do.
    if (!direct_) start_writing(fd, begin, nbytes);
    staging_->bytes_written_ += exact;
    return 0;
}

int StagedFile::read_chunk(int64_t number, char* data) {
    const int64_t begin = number * staging_->buffer_bytes_;
    const int64_t nbytes = chunk_bytes(number);
    int error = 0;
    const int fd = descriptor(error);
    if (error) return error;
    for (int64_t at = 0; at < nbytes;) {
        const size_t ask = static_cast<size_t>(round_up(nbytes, kAlign) - at);
        const ssize_t got = ::pread(fd, data + at, ask, begin + at);
        if (got > 0) {
            at += got;
        } else if (got == 0 || errno != EINTR) {
            return got == 0 ? EIO : errno;
        }
    }
    return 0;
}

void StagedFile::stop(std::unique_lock<std::mutex>& lock) {
    staging_->progress_.wait(lock, [this] { return writing_ == 0; });
}

void StagedFile::finish() {
    std::unique_lock<std::mutex> lock(staging_->mutex_);
    if (finished_) throw std::logic_error("finished twice: " + path_);
    stop(lock);
    raise_if_dead();
    for (const auto& chunk : chunks_)
        if (chunk.state != State::kWritten)
            throw std::logic_error("bytes never written in " + path_);
    finished_ = true;
    lock.unlock();
    int error = 0;
    const int fd = descriptor(error);
    if (error || ::ftruncate(fd, size_) || ::fsync(fd)) throw IoError(error ? error : errno, path_);
    if (const int failed = close_descriptor()) throw IoError(failed, path_);
}

void StagedFile::abandon() {
    std::unique_lock<std::mutex> lock(staging_->mutex_);
    abandoned_ = true;
    staging_->progress_.notify_all();
    stop(lock);
    for (auto& chunk : chunks_) {
        if (chunk.state != State::kFilling || chunk.pins)
            continue;  // a pinned one goes when its piece closes
        chunk.state = State::kEmpty;
        staging_->release(chunk.buffer);
        chunk.buffer = -1;
    }
    close_descriptor();
}

}  // namespace fastmerge
