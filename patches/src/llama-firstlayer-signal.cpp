#include "llama-firstlayer.h"

#ifndef _WIN32
#    include <unistd.h>

#    include <csignal>
#    include <cstring>

static const char * bus_error_message;
static const char * file_to_remove;
static const char * folder_to_remove;

static void on_bus_error(int /*signal*/) {
    // only calls that are allowed in a signal handler
    const ssize_t ignored = write(STDERR_FILENO, bus_error_message, strlen(bus_error_message));
    (void) ignored;
    if (file_to_remove) {
        unlink(file_to_remove);
        rmdir(folder_to_remove);
    }
    _exit(1);
}
#endif

void llama_firstlayer_explain_bus_errors(const char * message) {
#ifndef _WIN32
    bus_error_message = message;
    signal(SIGBUS, on_bus_error);
#else
    (void) message;
#endif
}

void llama_firstlayer_remove_on_bus_error(const char * file, const char * folder) {
#ifndef _WIN32
    folder_to_remove = folder;
    file_to_remove   = file;
#else
    (void) file;
    (void) folder;
#endif
}
