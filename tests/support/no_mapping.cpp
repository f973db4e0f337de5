// Preloaded by a test: devices say that they cannot map memory, as llama.cpp's integrated GPUs do.

#include "ggml-backend.h"

#include <dlfcn.h>

#include <cstdio>

void ggml_backend_dev_get_props(ggml_backend_dev_t device, struct ggml_backend_dev_props * props) {
    static const auto real = (decltype(&ggml_backend_dev_get_props)) dlsym(RTLD_NEXT, "ggml_backend_dev_get_props");
    real(device, props);
    if (props->type != GGML_BACKEND_DEVICE_TYPE_CPU) {
        props->caps.mmap_support = false;
        fputs("this device cannot map\n", stderr);
    }
}
