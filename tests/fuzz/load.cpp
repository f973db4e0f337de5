// A libFuzzer target: the firstlayer.* keys of a file, from loading to decoding. `scripts/fuzz` builds and runs it.
//
// An input is the number of keys (u16), the number of tables (u16), the keys and the infos of the tables as they are in a file.
// What is around them comes from the model in FIRSTLAYER_FUZZ_MODEL. If that has no such keys, it runs with a row cache; always with
// demand. With FIRSTLAYER_FUZZ_LOADS, a file that does not load is a finding. With FIRSTLAYER_FUZZ_SOURCE, the file is this model's
// sidecar.

#include "gguf.h"
#include "llama-firstlayer.h"
#include "llama.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

namespace {

using bytes = std::string;

template <typename T> bytes raw(T value) {
    return bytes((const char *) &value, sizeof(value));
}

// a part of a header, as far as it can be read
struct cursor {
    const char * data;
    size_t       size;
    size_t       pos = 0;

    bool has(uint64_t n) const { return n <= size - pos; }

    template <typename T> T get() {
        T res = 0;
        if (has(sizeof(T))) {
            memcpy(&res, data + pos, sizeof(T));
            pos += sizeof(T);
        } else {
            pos = size;
        }
        return res;
    }

    bytes get(uint64_t n) {
        const bytes res(data + pos, has(n) ? n : size - pos);
        pos += res.size();
        return res;
    }

    bytes get_string() { return get(get<uint64_t>()); }
};

struct key {
    bytes              name;
    uint32_t           type  = 0;
    uint32_t           inner = 0;  // of an array
    std::vector<bytes> values;     // strings without their lengths
};

size_t size_of(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 4;
    }
}

key read_key(cursor & in) {
    key res;
    res.name                = in.get_string();
    res.type                = in.get<uint32_t>();
    const bool     is_array = res.type == GGUF_TYPE_ARRAY;
    const uint32_t type     = is_array ? res.inner = in.get<uint32_t>() : res.type;
    const uint64_t count    = is_array ? in.get<uint64_t>() : 1;
    for (uint64_t i = 0; i < count && in.pos < in.size; ++i) {
        res.values.push_back(type == GGUF_TYPE_STRING ? in.get_string() : in.get(size_of(type)));
    }
    return res;
}

bytes write_key(const key & k) {
    bytes res = raw((uint64_t) k.name.size()) + k.name + raw(k.type);
    if (k.type == GGUF_TYPE_ARRAY) {
        res += raw(k.inner) + raw((uint64_t) k.values.size());
    }
    for (const bytes & value : k.values) {
        const bool is_string = (k.type == GGUF_TYPE_ARRAY ? k.inner : k.type) == GGUF_TYPE_STRING;
        res += is_string ? raw((uint64_t) value.size()) + value : value;
    }
    return res;
}

bytes skip_info(cursor & in) {
    const size_t start = in.pos;
    in.get_string();
    in.get((uint64_t) in.get<uint32_t>() * 8);
    in.get(4 + 8);
    return bytes(in.data + start, in.pos - start);
}

struct seed_model {
    bytes    version;
    uint64_t n_keys    = 0;
    uint64_t n_tensors = 0;
    bytes    keys;
    bytes    infos;
    bytes    data;
    bytes    input;  // that gives the model itself

    explicit seed_model(const char * path) {
        FILE * file = fopen(path, "rb");
        bytes  all;
        char   buffer[1 << 16];
        for (size_t n; file && (n = fread(buffer, 1, sizeof(buffer), file)) > 0;) {
            all.append(buffer, n);
        }
        fclose(file);

        cursor in = { all.data(), all.size() };
        version   = in.get(8);

        const uint64_t all_tensors = in.get<uint64_t>();
        const uint64_t all_keys    = in.get<uint64_t>();
        bytes          own_keys, own_infos;
        for (uint64_t i = 0; i < all_keys; ++i) {
            const key  k      = read_key(in);
            const bool is_own = k.name.rfind("firstlayer.", 0) == 0;
            (is_own ? own_keys : keys) += write_key(k);
            n_keys += !is_own;
        }
        for (uint64_t i = 0; i < all_tensors; ++i) {
            const bytes info   = skip_info(in);
            const bool  is_own = info.compare(8, 11, "firstlayer.") == 0;  // these come last
            (is_own ? own_infos : infos) += info;
            n_tensors += !is_own;
        }
        data  = all.substr((in.pos + 31) / 32 * 32);
        input = raw((uint16_t) (all_keys - n_keys)) + raw((uint16_t) (all_tensors - n_tensors)) + own_keys + own_infos;
    }
};

const seed_model & seed() {
    static const seed_model res(getenv("FIRSTLAYER_FUZZ_MODEL"));
    return res;
}

void ignore(ggml_log_level /*level*/, const char * /*text*/, void * /*data*/) {}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int * /*argc*/, char *** /*argv*/) {
    llama_log_set(ignore, nullptr);
    llama_backend_init();
    if (seed().input.size() == 2 * sizeof(uint16_t)) {  // else damaged keys would mean a cache, which takes most of the time
        llama_firstlayer_set_cache(1);
    }
    llama_firstlayer_set_demand("embeddings");
    if (const char * path = getenv("FIRSTLAYER_FUZZ_SEED")) {
        FILE * file = fopen(path, "wb");
        fwrite(seed().input.data(), 1, seed().input.size(), file);
        fclose(file);
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    cursor         in        = { (const char *) data, size };
    const uint16_t n_keys    = in.get<uint16_t>();
    const uint16_t n_tensors = in.get<uint16_t>();
    const size_t   start     = in.pos;
    for (uint16_t i = 0; i < n_keys; ++i) {
        read_key(in);
    }
    const bytes keys(in.data + start, in.pos - start);
    const bytes infos = in.get(size);

    bytes file = seed().version + raw(seed().n_tensors + n_tensors) + raw(seed().n_keys + n_keys) + seed().keys + keys +
                 seed().infos + infos;
    file.resize((file.size() + 31) / 32 * 32);
    file += seed().data;

    static const int fd   = memfd_create("model", 0);
    static const auto path = "/proc/self/fd/" + std::to_string(fd);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, file.data(), file.size(), 0) != (ssize_t) file.size()) {
        abort();
    }

    llama_model_params params = llama_model_default_params();
    const char *       source = getenv("FIRSTLAYER_FUZZ_SOURCE");
    llama_firstlayer_set_tables(source ? path.c_str() : nullptr);
    llama_model * model = llama_model_load_from_file(source ? source : path.c_str(), params);
    if (!model) {
        if (getenv("FIRSTLAYER_FUZZ_LOADS")) {
            fprintf(stderr, "ERROR: the model does not load\n");
            abort();
        }
        return 0;
    }
    llama_context_params options = llama_context_default_params();
    options.n_ctx = options.n_batch = options.n_ubatch = 32;
    options.n_threads = options.n_threads_batch = 1;
    llama_context * ctx                         = llama_init_from_model(model, options);
    if (ctx) {
        llama_token tokens[] = { 1, 2, 3, 5, 1 };
        llama_decode(ctx, llama_batch_get_one(tokens, 4));
        llama_decode(ctx, llama_batch_get_one(tokens + 4, 1));
        llama_free(ctx);
    }
    llama_model_free(model);
    return 0;
}

// keeps the form of keys, most of the time: libFuzzer alone would hardly get past the lengths
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int number) {
    std::mt19937 random(number);
    if (random() % 10 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    cursor           in        = { (const char *) data, size };
    uint16_t         n_keys    = in.get<uint16_t>();
    const uint16_t   n_tensors = in.get<uint16_t>();
    std::vector<key> keys;
    for (uint16_t i = 0; i < n_keys && in.pos < size; ++i) {
        keys.push_back(read_key(in));
    }
    bytes infos = in.get(size);

    const auto mutate = [&](bytes & text) {
        const size_t room = text.size() + 64;
        const size_t n    = text.size();
        text.resize(room);
        text.resize(LLVMFuzzerMutate((uint8_t *) text.data(), n, room));
    };
    for (int i = random() % 3; i >= 0 && !keys.empty(); --i) {
        key & k = keys[random() % keys.size()];
        switch (k.values.empty() ? 0 : random() % 12) {
            case 0:
                keys.erase(keys.begin() + (&k - keys.data()));
                continue;
            case 1:
                k.values.pop_back();
                continue;
            case 2:
                k.values.push_back(bytes(k.values[random() % k.values.size()]));
                continue;
            default:
                break;
        }
        bytes &      value = k.values[random() % k.values.size()];
        const size_t n     = value.size();
        switch (random() % 9) {
            case 3:
                mutate(k.name);
                break;
            case 4:
                std::swap(value, k.values[random() % k.values.size()]);
                break;
            case 5:
                mutate(infos);
                break;
            case 6:
                value = raw((uint64_t) 1 << random() % 64).substr(0, n);
                break;
            case 7: {
                const key & other = keys[random() % keys.size()];
                value             = other.values.empty() ? value : other.values[random() % other.values.size()];
                break;
            }
            default:
                mutate(value);
        }
        if ((k.type == GGUF_TYPE_ARRAY ? k.inner : k.type) != GGUF_TYPE_STRING) {
            value.resize(n);
        }
    }
    bytes out = raw((uint16_t) keys.size()) + raw(n_tensors);
    for (const key & k : keys) {
        out += write_key(k);
    }
    out += infos;
    const size_t n = std::min(out.size(), max_size);
    memcpy(data, out.data(), n);
    return n;
}
