#include "llama-firstlayer.h"

#ifndef _WIN32
#    include <unistd.h>

#    include <csignal>
#    include <cstring>

static const char * bus_error_message;

static void on_bus_error(int /*signal*/) {
    // only calls that are allowed in a signal handler
    const ssize_t ignored = write(STDERR_FILENO, bus_error_message, strlen(bus_error_message));
    (void) ignored;
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
