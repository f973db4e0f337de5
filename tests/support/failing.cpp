// Preloaded by tests: graphs that rows are computed with, one of which can be made to end with an exception. Others, of llama.cpp itself,
// are computed by another function.

#include <dlfcn.h>

#include <atomic>
#include <new>

static std::atomic<bool> fails{ false };

extern "C" void fail_once() {
    fails = true;
}

extern "C" int ggml_backend_sched_graph_compute(void * sched, void * graph) {
    if (fails.exchange(false)) {
        throw std::bad_alloc();
    }
    static void *     base = dlopen("libggml-base.so", RTLD_LAZY | RTLD_NOLOAD);
    static const auto next = (int (*)(void *, void *)) dlsym(base, "ggml_backend_sched_graph_compute");
    return next(sched, graph);
}
