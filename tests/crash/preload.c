/* Lets the n-th call that changes something under one directory fail, or kills the process there.
 *
 * Loaded with LD_PRELOAD, it stands between libc and everything above it: SQLite, Python, NumPy, llama.cpp. The counter
 * lives in shared memory, so that the calls of processes forked later count along.
 *
 * With a second directory it keeps there what has been synced, by inode: what a file held when it was, and the names
 * a directory had. That is what a power cut leaves. Inodes must not be used again, so what is unlinked gets a name there.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define DESCRIPTORS 65536

static char directory[4096];
static _Atomic long *calls;  /* shared; NULL: not armed */
static long failing;         /* the call that fails, counted from 1; 0: none does */
static int error;            /* what it fails with; 0: SIGKILL instead */
static int lasting;          /* whether every later call fails too */
static unsigned char ours[DESCRIPTORS];
static char synced[4096]; /* where what was synced is kept; empty: nowhere */

/* Starts to count calls under `path`. */
void fault_arm(const char *path, long n, int number, int stays) {
    if (!calls)
        calls = mmap(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    atomic_store(calls, 0);
    snprintf(directory, sizeof directory, "%s", path);
    failing = n, error = number, lasting = stays;
}

/* Keeps what is synced from now on in `path`; an empty one ends that. */
void fault_keep(const char *path) { snprintf(synced, sizeof synced, "%s", path); }

long fault_calls(void) { return calls ? atomic_load(calls) : 0; }

static int fails(void) {
    long n = atomic_fetch_add(calls, 1) + 1;
    if (!failing || (lasting ? n < failing : n != failing))
        return 0;
    if (!error)
        kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

static int inside(const char *path) {
    size_t length = strlen(directory);
    return calls && length && path && !strncmp(path, directory, length);
}

static int open_inside(int descriptor) {
    return calls && descriptor >= 0 && descriptor < DESCRIPTORS && ours[descriptor];
}

static void keep_file(int descriptor, const char *target) {
    char buffer[65536], temporary[4200];
    off_t at = 0;
    ssize_t n;
    snprintf(temporary, sizeof temporary, "%s.new", target);
    int copy = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    /* The descriptor may be for writing only. */
    char own[64];
    snprintf(own, sizeof own, "/proc/self/fd/%d", descriptor);
    int source = open(own, O_RDONLY);
    while ((n = pread(source, buffer, sizeof buffer, at)) > 0)
        at += write(copy, buffer, n);
    close(source), close(copy);
    rename(temporary, target);
}

static void keep_directory(int descriptor, const char *target) {
    char temporary[4200];
    snprintf(temporary, sizeof temporary, "%s.new", target);
    FILE *names = fopen(temporary, "w");
    DIR *open_directory = fdopendir(openat(descriptor, ".", O_RDONLY | O_DIRECTORY));
    for (struct dirent *entry; (entry = readdir(open_directory));)
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            fprintf(names, "%lu %d %s\n", (unsigned long)entry->d_ino, entry->d_type == DT_DIR, entry->d_name);
    closedir(open_directory);
    fclose(names);
    rename(temporary, target);
}

static void keep(int descriptor) {
    struct stat about;
    char target[4160];
    int before = errno;
    if (synced[0] && !fstat(descriptor, &about)) {
        snprintf(target, sizeof target, "%s/%lu", synced, (unsigned long)about.st_ino);
        (S_ISDIR(about.st_mode) ? keep_directory : keep_file)(descriptor, target);
    }
    errno = before;
}

static void keep_inode(const char *path) {
    static _Atomic long number;
    char target[4160];
    int before = errno;
    if (synced[0]) {
        snprintf(target, sizeof target, "%s/gone-%d-%ld", synced, getpid(), atomic_fetch_add(&number, 1));
        (void)!link(path, target);
    }
    errno = before;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        int known = inside(path);                                                                                      \
        if (known && flags & (O_CREAT | O_TRUNC) && fails())                                                           \
            return -1;                                                                                                 \
        int descriptor = real(path, flags, mode);                                                                      \
        if (descriptor >= 0 && descriptor < DESCRIPTORS)                                                               \
            ours[descriptor] = known;                                                                                  \
        return descriptor;                                                                                             \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        REAL(name);                                                                                                    \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        int known = inside(path);                                                                                      \
        if (known && flags & (O_CREAT | O_TRUNC) && fails())                                                           \
            return -1;                                                                                                 \
        int descriptor = real(at, path, flags, mode);                                                                  \
        if (descriptor >= 0 && descriptor < DESCRIPTORS)                                                               \
            ours[descriptor] = known;                                                                                  \
        return descriptor;                                                                                             \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int descriptor) {
    REAL(close);
    if (descriptor >= 0 && descriptor < DESCRIPTORS)
        ours[descriptor] = 0;
    return real(descriptor);
}

#define ON_DESCRIPTOR(type, name, parameters, ...)                                                                     \
    type name parameters {                                                                                             \
        REAL(name);                                                                                                    \
        if (open_inside(descriptor) && fails())                                                                        \
            return -1;                                                                                                 \
        return real(__VA_ARGS__);                                                                                      \
    }
ON_DESCRIPTOR(ssize_t, write, (int descriptor, const void *data, size_t n), descriptor, data, n)
ON_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *data, size_t n, off_t at), descriptor, data, n, at)
ON_DESCRIPTOR(ssize_t, pwrite64, (int descriptor, const void *data, size_t n, off64_t at), descriptor, data, n, at)
ON_DESCRIPTOR(int, ftruncate, (int descriptor, off_t size), descriptor, size)
ON_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t size), descriptor, size)

#define SYNC(name)                                                                                                     \
    int name(int descriptor) {                                                                                         \
        REAL(name);                                                                                                    \
        if (open_inside(descriptor) && fails())                                                                        \
            return -1;                                                                                                 \
        int failed = real(descriptor);                                                                                 \
        if (!failed && open_inside(descriptor))                                                                        \
            keep(descriptor);                                                                                          \
        return failed;                                                                                                 \
    }
SYNC(fsync)
SYNC(fdatasync)

#define ON_PATH(name, parameters, ...)                                                                                 \
    int name parameters {                                                                                              \
        REAL(name);                                                                                                    \
        if (inside(path) && fails())                                                                                   \
            return -1;                                                                                                 \
        return real(__VA_ARGS__);                                                                                      \
    }
ON_PATH(rmdir, (const char *path), path)
ON_PATH(chmod, (const char *path, mode_t mode), path, mode)

int rename(const char *path, const char *to) {
    REAL(rename);
    if (inside(path)) {
        if (fails())
            return -1;
        keep_inode(to);
    }
    return real(path, to);
}

int unlink(const char *path) {
    REAL(unlink);
    if (inside(path)) {
        if (fails())
            return -1;
        keep_inode(path);
    }
    return real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    struct stat about;
    char target[4160];
    if (inside(path) && fails())
        return -1;
    int failed = real(path, mode);
    /* The inode may have been that of a directory that is gone; this one has no names yet. */
    if (!failed && inside(path) && synced[0] && !stat(path, &about)) {
        snprintf(target, sizeof target, "%s/%lu", synced, (unsigned long)about.st_ino);
        unlink(target);
    }
    return failed;
}
