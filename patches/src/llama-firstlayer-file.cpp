#include "gguf.h"
#include "llama-arch.h"
#include "llama-cpp.h"
#include "llama-firstlayer-request.h"
#include "llama-firstlayer.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>

static const char * const KV_VERSION          = "firstlayer.version";
static const char * const KV_SITE_NAME        = "firstlayer.site.name";
static const char * const KV_SITE_RECIPE      = "firstlayer.site.recipe";
static const char * const KV_SITE_TABLE       = "firstlayer.site.table";
static const char * const KV_SITE_COLUMN      = "firstlayer.site.column";
static const char * const KV_SITE_WIDTH       = "firstlayer.site.width";
static const char * const KV_ELIDED_NAME      = "firstlayer.elided.name";
static const char * const KV_ELIDED_TYPE      = "firstlayer.elided.type";
static const char * const KV_ELIDED_DIMENSION = "firstlayer.elided.dimension";
static const char * const KV_SPARE_NAME       = "firstlayer.spare.name";
static const char * const KV_SOURCE_NAME      = "firstlayer.source.name";
static const char * const KV_SOURCE_SAMPLE    = "firstlayer.source.sample";

static const uint32_t VERSION = 1;

//
// file
//

// index of an array of n elements, -1 if it is optional and absent; n is set by the first array of a group
static int64_t find_array(const gguf_context * meta, const char * key, gguf_type type, size_t & n, bool required) {
    const int64_t id = gguf_find_key(meta, key);
    if (id < 0 && !required) {
        return -1;
    }
    if (id < 0 || gguf_get_kv_type(meta, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, id) != type) {
        throw std::runtime_error(format("key '%s' is missing or is not an array of %s", key, gguf_type_name(type)));
    }
    if (n == 0) {
        n = gguf_get_arr_n(meta, id);
    }
    if (n == 0 || gguf_get_arr_n(meta, id) != n) {
        throw std::runtime_error(format("key '%s' has %zu elements, expected %zu", key, gguf_get_arr_n(meta, id), n));
    }
    return id;
}

static const uint32_t * get_u32(const gguf_context * meta, const char * key, size_t & n) {
    return (const uint32_t *) gguf_get_arr_data(meta, find_array(meta, key, GGUF_TYPE_UINT32, n, true));
}

// whether the tables in a sidecar were computed from this model: the bytes in the middle of its weights are the same
static bool is_source(llama_model_loader & ml, const gguf_context * meta) {
    size_t          n_weights = 0;
    const int64_t   id_name   = find_array(meta, KV_SOURCE_NAME, GGUF_TYPE_STRING, n_weights, true);
    size_t          n_bytes   = n_weights * llama_firstlayer::N_SAMPLE;
    const uint8_t * sample =
        (const uint8_t *) gguf_get_arr_data(meta, find_array(meta, KV_SOURCE_SAMPLE, GGUF_TYPE_UINT8, n_bytes, true));

    for (size_t i = 0; i < n_weights; ++i) {
        const auto * weight = ml.get_weight(gguf_get_arr_str(meta, id_name, i));
        const size_t size   = weight ? ggml_nbytes(weight->tensor) : 0;
        uint8_t      found[llama_firstlayer::N_SAMPLE];
        if (size < sizeof(found)) {
            return false;
        }
        ml.files[weight->idx]->seek(weight->offs + (size - sizeof(found)) / 2, SEEK_SET);
        ml.files[weight->idx]->read_raw(found, sizeof(found));
        if (memcmp(found, sample + i * sizeof(found), sizeof(found)) != 0) {
            return false;
        }
    }
    return true;
}

// The metadata of the sidecar that the user named; its tensors become tensors of the model, like those of a split file.
// nullptr if none was named, or if it belongs to another model: a draft model is loaded with the overrides of its target
static gguf_context_ptr load_sidecar(llama_model_loader & ml, const char * path) {
    if (!*path) {
        return nullptr;
    }

    auto             file = std::make_unique<llama_file>(path, "rb", ml.use_direct_io);  // throws if it does not exist
    ggml_context *   ctx  = nullptr;
    gguf_context_ptr meta(gguf_init_from_file(path, { /*.no_alloc =*/true, /*.ctx =*/&ctx }));
    ggml_context_ptr tensors(ctx);
    if (!meta || gguf_find_key(meta.get(), KV_SOURCE_NAME) < 0) {
        throw std::runtime_error(format("'%s' is no file that gguf-firstlayer convert --sidecar wrote", path));
    }
    const bool is_converted = gguf_find_key(ml.metadata, KV_VERSION) >= 0;
    if (!is_source(ml, meta.get())) {
        LLAMA_LOG_WARN("%s: %s, so '%s' is not used\n", __func__,
                       is_converted ? "the model has tables of its own" : "the tables belong to another model", path);
        return nullptr;
    }
    if (is_converted) {
        throw std::runtime_error(format("the model has tables of its own: load it without '%s'", path));
    }

    ml.files.push_back(std::move(file));
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (strncmp(ggml_get_name(t), "firstlayer.", strlen("firstlayer.")) != 0) {
            throw std::runtime_error(format("'%s' has a tensor that is no table: '%s'", path, ggml_get_name(t)));
        }
        const llama_model_loader::llama_tensor_weight weight(ml.files.back().get(), ml.files.size() - 1, meta.get(), t);
        if (!ml.weights_map.emplace(ggml_get_name(t), weight).second) {
            throw std::runtime_error(format("tensor '%s' is in the model and in '%s'", ggml_get_name(t), path));
        }
        ml.n_tensors++;
    }
    ml.contexts.push_back(std::move(tensors));
    return meta;
}

// Tables hold their sites side by side, from multiples of four values on, and nothing else, so a lookup takes no more memory than
// the sites need; and all tensors that are named like tables are.
static void check_columns(const llama_firstlayer & fl, const llama_model_loader & ml) {
    std::vector<std::vector<std::pair<int64_t, int64_t>>> columns(fl.tables.size());
    for (const auto & site : fl.sites) {
        columns[site.table].emplace_back(site.column, GGML_PAD(site.width, 4));
    }
    std::set<std::string> names;
    for (size_t i = 0; i < fl.tables.size(); ++i) {
        const std::string name = "firstlayer." + fl.tables[i].suffix;
        int64_t           end  = 0;
        std::sort(columns[i].begin(), columns[i].end());
        for (const auto & [first, width] : columns[i]) {
            if (first != end) {
                throw std::runtime_error(
                    format("the sites of table '%s' overlap, or have gaps between them", name.c_str()));
            }
            end += width;
        }
        names.insert(name);
        if (end != ml.get_tensor_meta(name.c_str())->ne[0]) {
            throw std::runtime_error(format("table '%s' has columns that belong to no site", name.c_str()));
        }
    }
    for (const auto & [name, _] : ml.weights_map) {
        if (name.rfind("firstlayer.", 0) == 0 && !names.count(name)) {
            throw std::runtime_error(format("tensor '%s' is the table of no site", name.c_str()));
        }
    }
}

thread_local llama_firstlayer * llama_firstlayer::loading = nullptr;

std::unique_ptr<llama_firstlayer> llama_firstlayer::load(llama_model_loader & ml, uint32_t n_vocab) {
    auto res = std::make_unique<llama_firstlayer>();
    loading  = res.get();

    const auto without_tables = [&] {
        return res->cache_bytes > 0 || res->demand_rows ? std::move(res) : nullptr;
    };

    const llama_firstlayer_request request = llama_firstlayer_get_request(ml);

    res->cache_bytes = request.cache_mib < 0.0 ? CACHE_AUTO : (size_t) std::min(request.cache_mib * 0x1p20, 0x1p62);
    res->demand_rows = request.demand != "none";
    res->demand_embeddings = request.demand == "embeddings";
    if (ml.files.empty()) {
        if (ml.metadata && gguf_find_key(ml.metadata, KV_VERSION) >= 0) {
            throw std::runtime_error("first-layer tables can only be read from a file");
        }
        return without_tables();
    }
    const gguf_context_ptr sidecar = load_sidecar(ml, request.tables.c_str());
    const gguf_context *   meta    = sidecar ? sidecar.get() : ml.metadata;

    const int64_t id_version = gguf_find_key(meta, KV_VERSION);
    if (id_version < 0) {
        return without_tables();
    }
    if (res->cache_bytes > 0) {
        LLAMA_LOG_INFO("%s: the model has tables, so rows are not cached\n", __func__);
        res->cache_bytes = 0;
    }
    if (gguf_get_kv_type(meta, id_version) != GGUF_TYPE_UINT32 || gguf_get_val_u32(meta, id_version) != VERSION) {
        throw std::runtime_error(format(
            "unknown %s, this build reads version %u: update it, or convert the model again", KV_VERSION, VERSION));
    }

    if (n_vocab == 0) {
        throw std::runtime_error("first-layer tables of a model without tokens");
    }

    res->is_sidecar = sidecar != nullptr;
    res->check_all  = request.check_tables;

    size_t           n_sites   = 0;
    const int64_t    id_name   = find_array(meta, KV_SITE_NAME, GGUF_TYPE_STRING, n_sites, true);
    const int64_t    id_recipe = find_array(meta, KV_SITE_RECIPE, GGUF_TYPE_STRING, n_sites, true);
    const uint32_t * table     = get_u32(meta, KV_SITE_TABLE, n_sites);
    const uint32_t * column    = get_u32(meta, KV_SITE_COLUMN, n_sites);
    const uint32_t * width     = get_u32(meta, KV_SITE_WIDTH, n_sites);

    for (size_t i = 0; i < n_sites; ++i) {
        if (table[i] > res->tables.size()) {
            throw std::runtime_error(
                format("first-layer site %zu is in table %u, expected %zu at most", i, table[i], res->tables.size()));
        }
        const std::string suffix = std::to_string(table[i]) + ".table";
        if (table[i] == res->tables.size()) {
            res->tables.push_back({ suffix, nullptr, nullptr });
        }

        const std::string   name = "firstlayer." + suffix;
        const ggml_tensor * t    = ml.require_tensor_meta(name);
        // the types that get_rows can dequantize: Q8_1 and Q8_K are for activations only
        const bool is_float      = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16;
        if (!is_float && (!ggml_is_quantized(t->type) || t->type == GGML_TYPE_Q8_1 || t->type == GGML_TYPE_Q8_K)) {
            throw std::runtime_error(
                format("table '%s' has type %s, which no lookup can read", name.c_str(), ggml_type_name(t->type)));
        }
        if (t->ne[1] != n_vocab || t->ne[2] != 1 || t->ne[3] != 1) {
            throw std::runtime_error(format("table '%s' has shape [%s], expected one row for each of %u tokens",
                                            name.c_str(), llama_format_tensor_shape(t).c_str(), n_vocab));
        }
        if (width[i] == 0 || (int64_t) column[i] + width[i] > t->ne[0]) {
            throw std::runtime_error(format("first-layer site %zu has columns %u to %lld of table '%s', which has %lld",
                                            i, column[i], (long long) column[i] + width[i], name.c_str(),
                                            (long long) t->ne[0]));
        }
        if (column[i] % ggml_blck_size(t->type) != 0 || width[i] % ggml_blck_size(t->type) != 0) {
            throw std::runtime_error(format(
                "first-layer site %zu has columns %u to %lld of table '%s', whose blocks "
                "have %lld values",
                i, column[i], (long long) column[i] + width[i], name.c_str(), (long long) ggml_blck_size(t->type)));
        }
        res->sites.push_back({ gguf_get_arr_str(meta, id_name, i), gguf_get_arr_str(meta, id_recipe, i), table[i],
                               column[i], width[i], false });
    }

    check_columns(*res, ml);

    size_t        n_spares = 0;
    const int64_t id_spare = find_array(meta, KV_SPARE_NAME, GGUF_TYPE_STRING, n_spares, false);
    for (size_t i = 0; i < n_spares; ++i) {
        res->spares.insert(gguf_get_arr_str(meta, id_spare, i));
    }

    size_t        n_elided  = 0;
    const int64_t id_elided = find_array(meta, KV_ELIDED_NAME, GGUF_TYPE_STRING, n_elided, false);
    if (id_elided < 0) {
        return res;
    }

    const uint32_t * type  = get_u32(meta, KV_ELIDED_TYPE, n_elided);
    size_t           n_dim = n_elided * GGML_MAX_DIMS;
    const auto *     dim =
        (const int64_t *) gguf_get_arr_data(meta, find_array(meta, KV_ELIDED_DIMENSION, GGUF_TYPE_INT64, n_dim, true));

    const ggml_init_params params = {
        /*.mem_size   =*/ggml_tensor_overhead() * n_elided,
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    res->ctx_phantom.reset(ggml_init(params));

    for (size_t i = 0; i < n_elided; ++i, dim += GGML_MAX_DIMS) {
        const std::string name = gguf_get_arr_str(meta, id_elided, i);

        bool ok = name.size() < GGML_MAX_NAME && type[i] < GGML_TYPE_COUNT && ggml_blck_size((ggml_type) type[i]) > 0;
        int64_t n_max = INT32_MAX * (int64_t) 64;
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            ok = ok && dim[d] > 0 && dim[d] <= n_max;
            n_max /= ok ? dim[d] : 1;
        }
        ok = ok && dim[0] % ggml_blck_size((ggml_type) type[i]) == 0;
        if (!ok) {
            throw std::runtime_error(format("elided weight '%s' has an invalid name, type or shape", name.c_str()));
        }

        ggml_tensor * t = ggml_new_tensor(res->ctx_phantom.get(), (ggml_type) type[i], GGML_MAX_DIMS, dim);
        ggml_set_name(t, name.c_str());

        const auto * present = ml.get_weight(name.c_str());
        if (sidecar && (!present || present->tensor->type != t->type || !ggml_are_same_shape(present->tensor, t))) {
            throw std::runtime_error(format(
                "weight '%s' is missing or differs in type or shape: load the model that the tables were computed from",
                name.c_str()));
        }
        if (sidecar) {
            res->spares.insert(name);
        } else {
            // the loader looks up shapes and types in several ways, so its map has phantoms too; their offs is never used
            auto weight   = ml.weights_map.begin()->second;
            weight.tensor = t;
            if (!ml.weights_map.emplace(name, weight).second) {
                throw std::runtime_error(format("weight '%s' is in the file, but is said to be elided", name.c_str()));
            }
            ml.n_tensors++;
            res->phantoms[name] = t;
        }
    }

    return res;
}

bool llama_firstlayer::decides(llama_model_loader & ml, const ggml_tensor & meta, bool & is_lazy) {
    const std::string name = ggml_get_name(&meta);
    if (!loading || (!loading->elides(name) && !(loading->lazy && loading->spares.count(name)))) {
        return false;
    }
    if (!loading->elides(name)) {
        const llama_lazy_mode mode = ml.lazy.mode;

        ml.lazy.mode = LLAMA_LAZY_MODE_ON;
        is_lazy      = ml.lazy.add(name, &meta, ml.no_alloc ? nullptr : &ml.require_weight(name.c_str()));
        ml.lazy.mode = mode;
    }
    return true;
}

ggml_tensor * llama_firstlayer::phantom(llama_model_loader & ml, const ggml_tensor & meta) {
    if (!loading || !loading->elides(ggml_get_name(&meta))) {
        return nullptr;
    }
    ggml_tensor * res = loading->phantoms.at(ggml_get_name(&meta));

    // the shape may differ from the one in the file, see TENSOR_ALLOW_RESHAPE
    std::copy_n(meta.ne, GGML_MAX_DIMS, res->ne);
    std::copy_n(meta.nb, GGML_MAX_DIMS, res->nb);

    ml.n_created++;
    ml.size_data -= ggml_nbytes(&meta);

    return res;
}

void llama_firstlayer::create_tables(llama_model_base & model, llama_model_loader & ml, llama_lazy_mode requested) {
    // By default llama.cpp reads nothing below 4 GiB lazily, and nothing at all beside a device that cannot map memory. A text
    // touches few rows, and those are in host memory, so that would waste memory.
    const llama_lazy_mode mode = ml.lazy.mode;
    lazy                       = requested != LLAMA_LAZY_MODE_OFF;
    ml.lazy.mode               = lazy ? LLAMA_LAZY_MODE_ON : LLAMA_LAZY_MODE_OFF;
    for (auto & table : tables) {
        const auto          tn   = LLM_TN(model.arch)(LLM_TENSOR_FIRSTLAYER, table.suffix.c_str());
        const ggml_tensor * meta = ml.require_tensor_meta(tn.str());

        table.tensor = model.create_tensor(ml, tn, { meta->ne[0], meta->ne[1] }, llama_model_loader::TENSOR_READ_LAZY);
        if (ml.lazy.has(table.tensor)) {
            model.can_prefetch.insert(table.tensor);
            table.fetched = std::make_unique<std::atomic<bool>[]>(meta->ne[1]);
        }
        // the model has as many parameters as its source
        ml.n_elements -= is_sidecar ? 0 : ggml_nelements(meta);
    }
    for (const auto & [_, t] : phantoms) {
        ml.n_elements += ggml_nelements(t);
    }
    ml.lazy.mode = mode;
}
