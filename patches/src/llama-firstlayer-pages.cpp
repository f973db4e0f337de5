#include "llama-firstlayer-pages.h"

#include "ggml-backend.h"

#ifdef __linux__
#    include <sys/mman.h>
#    include <unistd.h>
#    ifndef MADV_POPULATE_READ
#        define MADV_POPULATE_READ 22  // since Linux 5.14; older C libraries do not name it
#    endif
#endif

#include <algorithm>
#include <cstring>

bool llama_firstlayer_is_mapped(const ggml_tensor * t) {
    return t->buffer && strcmp(ggml_backend_buffer_name(t->buffer), "CPU_Mapped") == 0;
}

void llama_firstlayer_populate(llama_memory_ranges mapped) {
#ifdef __linux__
    std::sort(mapped.begin(), mapped.end(), [](const auto & a, const auto & b) { return a.addr < b.addr; });
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const auto & range : mapped) {
        const uintptr_t first = (uintptr_t) range.addr / page * page;
        madvise((void *) first, GGML_PAD((uintptr_t) range.addr + range.size, page) - first, MADV_POPULATE_READ);
    }
#else
    GGML_UNUSED(mapped);
#endif
}

void llama_firstlayer_release(const llama_memory_ranges & mapped) {
#ifdef __linux__
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const auto & range : mapped) {
        const uintptr_t first = GGML_PAD((uintptr_t) range.addr, page);
        const uintptr_t last  = ((uintptr_t) range.addr + range.size) / page * page;
        if (first < last) {
            madvise((void *) first, last - first, MADV_DONTNEED);
        }
    }
#else
    GGML_UNUSED(mapped);
#endif
}
