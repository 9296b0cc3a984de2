/* Preloaded before libc: counts the calls that can fail in a process, and fails one of them.
 *
 * A point is a call that changes or opens a file under a folder, maps or reads one, asks for memory
 * or starts a thread, while `faults_arm` is in force. Of memory: whatever C++ asks for (operator
 * new, called from the extension or from libstdc++), and from anybody else 64 KiB or more: a smaller
 * piece is the interpreter's own, and it has no way on without it.
 *
 * benchmarks/faults.py compiles and drives it; docs/security.md says what is proved with it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHANGES = 1, OPENS = 2, MEMORY = 4, THREADS = 8 };
enum { LARGE = 64 << 10, LOG_BYTES = 8 << 20, RANGES = 8 };

static atomic_int armed;
static atomic_long counted;
static long fail_at;    /* the point to fail, from 1; 0: none */
static int fail_with;   /* an errno; negative: a signal to this process */
static int fail_on;     /* whether every later point fails too: a disk that stays full */
static int no_exchange; /* whether renameat2 is one of an old file system */
static int fail_kinds;  /* which kinds of points count */
static char folder[4096];
static size_t folder_length;
static char* record;
static atomic_long recorded;
static struct {
    uintptr_t begin, end;
} cplusplus[RANGES];
static int ranges;
static __thread int inside; /* in a wrapper's own work */

/* Shared: what a child wrote before it died is read by its parent. */
__attribute__((constructor)) static void begin(void) {
    record = mmap(NULL, LOG_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static int range_of(struct dl_phdr_info* info, size_t size, void* unused) {
    (void)size, (void)unused;
    const char* name = strrchr(info->dlpi_name, '/');
    if (!name || (strncmp(name, "/_C.", 4) && strncmp(name, "/libstdc++", 10)) || ranges == RANGES)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr)* part = &info->dlpi_phdr[i];
        if (part->p_type != PT_LOAD || !(part->p_flags & PF_X) || ranges == RANGES) continue;
        cplusplus[ranges].begin = info->dlpi_addr + part->p_vaddr;
        cplusplus[ranges].end = info->dlpi_addr + part->p_vaddr + part->p_memsz;
        ++ranges;
    }
    return 0;
}

/* Counts from here on. Points of `kinds` under `path`; the `at`-th gets `with`, later ones if `on`.
 */
void faults_arm(const char* path, int kinds, long at, int with, int on) {
    armed = 0;
    ranges = 0;
    dl_iterate_phdr(range_of, NULL);
    folder_length = strlen(path);
    memcpy(folder, path, folder_length + 1);
    fail_kinds = kinds, fail_at = at, fail_with = with, fail_on = on;
    counted = recorded = 0;
    record[0] = 0;
    armed = 1;
}

void faults_no_exchange(int whether) { no_exchange = whether; }

/* How many points there were. */
long faults_disarm(void) {
    armed = 0;
    return counted;
}

/* A line for each: "function path". */
const char* faults_log(void) { return record; }

static void note(const char* function, const char* path) {
    char line[600];
    const int length = snprintf(line, sizeof line, "%s %.500s\n", function, path);
    const long at = atomic_fetch_add(&recorded, length);
    if (at + length + 1 < LOG_BYTES) memcpy(record + at, line, (size_t)length + 1);
}

/* What happens to this call: 0 nothing, an errno, or a signal before it, negative. */
static int point(int kind, const char* function, const char* path) {
    if (!(fail_kinds & kind)) return 0;
    const long number = atomic_fetch_add(&counted, 1) + 1;
    note(function, path);
    if (!fail_at || number < fail_at || (number > fail_at && !fail_on)) return 0;
    return fail_with >= 0 || number == fail_at ? fail_with : 0;
}

static int of_path(int kind, const char* function, int at, const char* path) {
    if (!armed || inside || !path) return 0;
    char whole[9000], link[64];
    inside = 1;
    const char* rest = path;
    int descriptor = at;
    if (!strncmp(path, "/proc/self/fd/", 14)) {
        char* end;
        descriptor = (int)strtol(path + 14, &end, 10);
        rest = end;
    } else if (path[0] == '/') {
        descriptor = -1;
    }
    size_t length = 0;
    if (descriptor != -1) {
        snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d",
                 descriptor);
        const ssize_t got = readlink(link, whole, 4096);
        length = got < 0 ? 0 : (size_t)got;
        if (rest[0] != '/') whole[length++] = '/';
    }
    snprintf(whole + length, sizeof whole - length, "%.4000s", rest);
    int error = 0;
    if (!strncmp(whole, folder, folder_length))
        error = point(kind, function, whole + folder_length);
    inside = 0;
    return error;
}

static int of_file(int kind, const char* function, int descriptor) {
    return descriptor < 0 ? 0 : of_path(kind, function, descriptor, "");
}

static int from_cplusplus(const void* caller) {
    const uintptr_t address = (uintptr_t)caller;
    for (int i = 0; i < ranges; ++i)
        if (cplusplus[i].begin <= address && address < cplusplus[i].end) return 1;
    return 0;
}

static int of_memory(const char* function, size_t size, int counts) {
    if (!armed || inside || !counts) return 0;
    inside = 1;
    char text[32];
    snprintf(text, sizeof text, "%zu", size);
    const int error = point(MEMORY, function, text);
    inside = 0;
    return error;
}

#define REAL(name)                 \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);

/* Returns `result` for an error; `half` is done before that, and before a kill. */
#define FAIL_IF(outcome, half, result)              \
    do {                                            \
        const int e_ = outcome;                     \
        if (e_ > 0 || e_ == -SIGKILL) (void)(half); \
        if (e_ < 0) kill(getpid(), -e_);            \
        if (e_ > 0) {                               \
            errno = e_;                             \
            return result;                          \
        }                                           \
    } while (0)

/* --- files --- */

static int kind_of(int flags) { return flags & (O_CREAT | O_TRUNC) ? CHANGES : OPENS; }

#define OPEN(name, declared, at, called)                                                \
    int name declared {                                                                 \
        va_list list;                                                                   \
        va_start(list, flags);                                                          \
        const mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                                   \
        REAL(name)                                                                      \
        FAIL_IF(of_path(kind_of(flags), "open", at, path), 0, -1);                      \
        return real called;                                                             \
    }
OPEN(open, (const char* path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char* path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int at, const char* path, int flags, ...), at, (at, path, flags, mode))
OPEN(openat64, (int at, const char* path, int flags, ...), at, (at, path, flags, mode))

/* half: what arrives before the disk is full, or the process dead. */
#define ON_FILE(type, kind, name, declared, called, half) \
    type name declared {                                  \
        REAL(name)                                        \
        FAIL_IF(of_file(kind, #name, file), half, -1);    \
        return real called;                               \
    }
#define SOME (size / 2 / 4096 * 4096)
ON_FILE(ssize_t, CHANGES, write, (int file, const void* data, size_t size), (file, data, size),
        real(file, data, size / 2))
ON_FILE(ssize_t, CHANGES, pwrite, (int file, const void* data, size_t size, off_t offset),
        (file, data, size, offset), real(file, data, SOME, offset))
ON_FILE(ssize_t, CHANGES, pwrite64, (int file, const void* data, size_t size, off64_t offset),
        (file, data, size, offset), real(file, data, SOME, offset))
ON_FILE(ssize_t, OPENS, read, (int file, void* data, size_t size), (file, data, size), 0)
ON_FILE(ssize_t, OPENS, pread, (int file, void* data, size_t size, off_t offset),
        (file, data, size, offset), 0)
ON_FILE(ssize_t, OPENS, pread64, (int file, void* data, size_t size, off64_t offset),
        (file, data, size, offset), 0)
ON_FILE(int, CHANGES, fsync, (int file), (file), 0)
ON_FILE(int, CHANGES, fdatasync, (int file), (file), 0)
ON_FILE(int, CHANGES, fchmod, (int file, mode_t mode), (file, mode), 0)
ON_FILE(int, CHANGES, flock, (int file, int how), (file, how), 0)
ON_FILE(int, CHANGES, ftruncate, (int file, off_t size), (file, size), 0)
ON_FILE(int, CHANGES, ftruncate64, (int file, off64_t size), (file, size), 0)
ON_FILE(int, CHANGES, fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size),
        0)
ON_FILE(int, CHANGES, fallocate64, (int file, int mode, off64_t at, off64_t size),
        (file, mode, at, size), 0)
/* The descriptor is gone all the same; a network file system says only here that a write failed. */
ON_FILE(int, CHANGES, close, (int file), (file), real(file))

#define ON_PATH(name, declared, at, called)                \
    int name declared {                                    \
        REAL(name)                                         \
        FAIL_IF(of_path(CHANGES, #name, at, path), 0, -1); \
        return real called;                                \
    }
ON_PATH(mkdir, (const char* path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(mkdirat, (int at, const char* path, mode_t mode), at, (at, path, mode))
ON_PATH(rmdir, (const char* path), AT_FDCWD, (path))
ON_PATH(unlink, (const char* path), AT_FDCWD, (path))
ON_PATH(unlinkat, (int at, const char* path, int flags), at, (at, path, flags))
ON_PATH(rename, (const char* path, const char* to), AT_FDCWD, (path, to))
ON_PATH(renameat, (int at, const char* path, int to_at, const char* to), at, (at, path, to_at, to))
ON_PATH(link, (const char* path, const char* to), AT_FDCWD, (path, to))
ON_PATH(linkat, (int at, const char* path, int to_at, const char* to, int flags), at,
        (at, path, to_at, to, flags))

int renameat2(int at, const char* path, int to_at, const char* to, unsigned flags) {
    REAL(renameat2)
    FAIL_IF(of_path(CHANGES, "renameat2", at, path), 0, -1);
    FAIL_IF(no_exchange ? EINVAL : 0, 0, -1);
    return real(at, path, to_at, to, flags);
}
DIR* opendir(const char* path) {
    REAL(opendir)
    FAIL_IF(of_path(OPENS, "opendir", AT_FDCWD, path), 0, NULL);
    return real(path);
}
DIR* fdopendir(int file) {
    REAL(fdopendir)
    FAIL_IF(of_file(OPENS, "fdopendir", file), 0, NULL);
    return real(file);
}

/* --- memory and threads --- */

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void _ZSt17__throw_bad_allocv(void) __attribute__((noreturn));

void* malloc(size_t size) {
    FAIL_IF(of_memory("malloc", size, size >= LARGE), 0, NULL);
    return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
    FAIL_IF(of_memory("calloc", size * count, count && size >= LARGE / count), 0, NULL);
    return __libc_calloc(count, size);
}
void* realloc(void* data, size_t size) {
    FAIL_IF(of_memory("realloc", size, size >= LARGE), 0, NULL);
    return __libc_realloc(data, size);
}

static int new_fails(size_t size, const void* caller) {
    FAIL_IF(of_memory("new", size, size >= LARGE || from_cplusplus(caller)), 0, 1);
    return 0;
}
static void* new_(size_t size, size_t alignment, const void* caller) {
    void* data = NULL;
    if (!new_fails(size, caller))
        data = alignment ? __libc_memalign(alignment, size) : __libc_malloc(size ? size : 1);
    if (!data) _ZSt17__throw_bad_allocv();
    return data;
}
void* _Znwm(size_t size) { return new_(size, 0, __builtin_return_address(0)); }
void* _Znam(size_t size) { return new_(size, 0, __builtin_return_address(0)); }
void* _ZnwmSt11align_val_t(size_t size, size_t alignment) {
    return new_(size, alignment, __builtin_return_address(0));
}

#define MMAP(name, offset_type)                                                                    \
    void* name(void* at, size_t size, int protection, int flags, int file, offset_type offset) {   \
        REAL(name)                                                                                 \
        FAIL_IF(file < 0 ? of_memory(#name, size, size >= LARGE) : of_file(OPENS, #name, file), 0, \
                MAP_FAILED);                                                                       \
        return real(at, size, protection, flags, file, offset);                                    \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* given) {
    REAL(pthread_create)
    FAIL_IF(armed && !inside ? point(THREADS, "pthread_create", "") : 0, 0, e_);
    return real(thread, attributes, start, given);
}
