// Preloaded into a process: from its n-th call of a function on, those on files in a folder fail. FAULT is FUNCTION:N:ERRNO, and
// FAULT_FOLDER the folder; a file FAULT_FIRED is made once one has.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static bool in_folder(const char * path) {
    const char * folder = getenv("FAULT_FOLDER");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static bool in_folder(int fd) {
    char          path[PATH_MAX];
    const ssize_t n = readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof(path) - 1);
    path[n < 0 ? 0 : n] = '\0';
    return in_folder(path);
}

template <typename T> static bool fails(const char * function, T file) {
    static int   calls = 0;
    const char * fault = getenv("FAULT");
    char         name[32];
    int          first, error;
    if (!fault || sscanf(fault, "%31[^:]:%d:%d", name, &first, &error) != 3 || strcmp(name, function) != 0 ||
        !in_folder(file) || ++calls < first) {
        return false;
    }
    close(creat(getenv("FAULT_FIRED"), 0600));
    errno = error;
    return true;
}

template <typename F> static F next(const char * name) {
    return (F) dlsym(RTLD_NEXT, name);
}

// takes what the system's function takes; the file comes first
#define FAULT(result, function, parameters, arguments, file)                 \
    extern "C" result function parameters {                                  \
        using type = result (*) parameters;                                  \
        return fails(#function, file) ? -1 : next<type>(#function) arguments; \
    }

FAULT(ssize_t, write, (int fd, const void * data, size_t n), (fd, data, n), fd)
FAULT(int, fsync, (int fd), (fd), fd)
FAULT(int, ftruncate64, (int fd, off64_t n), (fd, n), fd)
FAULT(int, truncate64, (const char * path, off64_t n), (path, n), path)
FAULT(int, mkdir, (const char * path, mode_t mode), (path, mode), path)
FAULT(int, link, (const char * from, const char * to), (from, to), from)
FAULT(int, linkat, (int a, const char * from, int b, const char * to, int flags), (a, from, b, to, flags), from)
FAULT(int, rename, (const char * from, const char * to), (from, to), from)
FAULT(int, flock, (int fd, int how), (fd, how), fd)

extern "C" int open64(const char * path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    const mode_t mode = va_arg(list, mode_t);
    va_end(list);
    using type = int (*)(const char *, int, ...);
    return (flags & O_ACCMODE) != O_RDONLY && fails("open64", path) ? -1 : next<type>("open64")(path, flags, mode);
}
