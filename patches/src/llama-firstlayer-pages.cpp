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

// whole pages only: others may hold what is mapped to be read on demand
static void change_pages(const llama_memory_ranges & mapped, bool want) {
#ifdef __linux__
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (const auto & range : mapped) {
        const uintptr_t first = GGML_PAD((uintptr_t) range.addr, page);
        const uintptr_t last  = ((uintptr_t) range.addr + range.size) / page * page;
        if (first < last) {
            madvise((void *) first, last - first, want ? MADV_POPULATE_READ : MADV_DONTNEED);
        }
    }
#else
    GGML_UNUSED(mapped);
    GGML_UNUSED(want);
#endif
}

void llama_firstlayer_populate(llama_memory_ranges mapped) {
    std::sort(mapped.begin(), mapped.end(), [](const auto & a, const auto & b) { return a.addr < b.addr; });
    change_pages(mapped, true);
}

void llama_firstlayer_release(const llama_memory_ranges & mapped) {
    change_pages(mapped, false);
}
