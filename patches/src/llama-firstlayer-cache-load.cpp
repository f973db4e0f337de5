#include "llama-firstlayer-builder.h"
#include "llama-firstlayer-cache.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

static const size_t MIB = 1024 * 1024;

// what `auto` takes: rows for the distinct tokens of some 35,000 to 57,000 tokens of text, unless that is much of the model's own size
static const int64_t AUTO_ROWS     = 4096;
static const size_t  AUTO_SHARE    = 32;
static const size_t  AUTO_AT_LEAST = 16 * MIB;

//
// loading
//

std::vector<ggml_tensor *> llama_firstlayer_cache::choose_sites(const llama_firstlayer_walk & walk) {
    return walk.sites(AUTO_ROWS, sizeof(float));
}

// whether all weights that t is computed from are where the CPU computes with them
static bool is_on_cpu(const llama_firstlayer_walk & walk, const ggml_tensor * t) {
    const auto sources = walk.ancestors(t);
    return std::all_of(sources.begin(), sources.end(), [](const ggml_tensor * from) {
        if (!from->buffer || ggml_backend_buffer_is_host(from->buffer)) {
            return true;
        }
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(from->buffer));
        return dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
    });
}

void llama_firstlayer::create_cache(llama_model & model) {
    if (model.hparams.no_alloc) {
        return;
    }
    set_weights(model);
    try {
        find_cache_sites(model);
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: the first layer is computed without a cache: %s\n", __func__, err.what());
        sites.clear();
        tables.clear();
        cache.reset();
    }
    observe = nullptr;
}

void llama_firstlayer::find_cache_sites(llama_model & model) {
    using look_t = std::function<void(const llm_graph_params &, const llama_firstlayer_walk &)>;

    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("split mode 'tensor' leaves no rows whole");
    }

    const llama_firstlayer_builder builder(model, llama_firstlayer_cache::MAX_FILL);
    const auto                     show = [&](uint32_t n_tokens, const look_t & look) {
        observe = [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
            if (!llama_firstlayer_cache::is_other_graph(model, params) && walk.has_batch_tokens()) {
                look(params, walk);
            }
        };
        builder.build(n_tokens, n_tokens);
    };

    std::string blocker = "it only encodes, or replaces token ids";
    int64_t     saved   = 0;
    bool on_cpu = !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_ACCEL);  // like BLAS, which takes large batches
    show(llama_firstlayer_cache::MAX_FILL, [&](const llm_graph_params &, const llama_firstlayer_walk & walk) {
        llama_firstlayer_walk::tensor_set cut;
        for (ggml_tensor * t : llama_firstlayer_cache::choose_sites(walk)) {
            cut.insert(t);
            const std::string recipe = walk.recipe(t);
            if (std::any_of(sites.begin(), sites.end(), [&](const site & s) { return s.recipe == recipe; })) {
                continue;
            }
            sites.push_back({ ggml_get_name(t), recipe, 0, 0, walk.width(t), false });
            on_cpu = on_cpu && is_on_cpu(walk, t);
        }
        saved   = walk.bytes_saved(cut);
        blocker = walk.blocker();
    });
    show(builder.n_seqs, [&](const llm_graph_params &, const llama_firstlayer_walk & walk) {
        for (const auto & [_, i] : walk.find(sites)) {
            sites[i].used = true;
        }
    });
    sites.erase(std::remove_if(sites.begin(), sites.end(), [](const site & s) { return !s.used; }), sites.end());
    if (sites.empty()) {
        throw std::runtime_error(blocker);
    }

    int64_t width = 0;
    for (auto & site : sites) {
        site.column = width;
        width += GGML_PAD(site.width, 4);  // kernels may read four values at once
    }
    const size_t row_size  = width * sizeof(float);
    size_t       max_bytes = cache_bytes;
    if (cache_bytes == CACHE_AUTO) {
        if (saved <= (int64_t) row_size) {
            throw std::runtime_error("looking up a row would read more than computing it");
        }
        max_bytes = std::min<size_t>(AUTO_ROWS * row_size, std::max<size_t>(model.size() / AUTO_SHARE, AUTO_AT_LEAST));
    }
    cache = std::make_unique<llama_firstlayer_cache>(model.dev_layer(0), width, model.vocab.n_tokens(), max_bytes);

    for (const uint32_t size : llama_firstlayer_cache::fill_sizes(on_cpu)) {
        bool added = false;
        show(size, [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
            added = cache->add_template(params.res->get_ctx(), walk, sites);
            if (added && size == llama_firstlayer_cache::MAX_FILL) {
                cache->keep_equal_sizes(params);
            }
        });
        if (!added) {
            throw std::runtime_error("what its graph computes from the token ids depends on the shape of the batch");
        }
    }
    tables.push_back({ "cache", cache->rows, nullptr });

    const auto data = cache->get_data();
    LLAMA_LOG_WARN("%s: rows of the first layer are cached (%zu sites, up to %" PRId64 " rows in %.1f MiB)\n", __func__,
                   sites.size(), data.n_rows_max, data.n_bytes_max / (double) MIB);
}

//
// what users are told
//

int32_t llama_model_firstlayer_get_cache(const llama_model * model, llama_firstlayer_cache_data * data) {
    if (!model->firstlayer || !model->firstlayer->cache) {
        return -1;
    }
    *data = model->firstlayer->cache->get_data();
    return 0;
}

void llama_model_firstlayer_print_cache(const llama_model * model) {
    llama_firstlayer_cache_data data;
    if (llama_model_firstlayer_get_cache(model, &data) != 0) {
        return;
    }
    // a warning, since tools show no information
    LLAMA_LOG_WARN("%s: first layer = %" PRId64 " of %" PRId64 " rows cached (%.1f MiB), %" PRId64 " hits, %" PRId64
                   " misses (%.2f ms)\n",
                   __func__, data.n_rows, data.n_rows_max, data.n_bytes / (double) MIB, data.n_hits, data.n_misses,
                   data.t_us / 1000.0);
}

const char * llama_firstlayer_metrics(void) {
    static thread_local std::string res;
    res.clear();

    llama_firstlayer_cache_data sum = {};
    if (!llama_firstlayer_cache::add_up(sum)) {
        return res.c_str();
    }
    const auto add = [](const char * name, const char * type, const char * help, double value) {
        res += format("# HELP llamacpp:firstlayer_cache_%s %s\n# TYPE llamacpp:firstlayer_cache_%s %s\n", name, help,
                      name, type);
        res += format("llamacpp:firstlayer_cache_%s %.17g\n", name, value);
    };
    add("hits_total", "counter", "Tokens whose first-layer row was cached", sum.n_hits);
    add("misses_total", "counter", "First-layer rows computed", sum.n_misses);
    add("seconds_total", "counter", "Total time spent computing first-layer rows", sum.t_us / 1e6);
    add("rows", "gauge", "First-layer rows cached", sum.n_rows);
    add("bytes", "gauge", "Memory of the cached first-layer rows", sum.n_bytes);
    return res.c_str();
}
