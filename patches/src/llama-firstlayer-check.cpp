#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama-context.h"
#include "llama-firstlayer-fill.h"
#include "llama-firstlayer-pages.h"
#include "llama-firstlayer-walk.h"
#include "llama-firstlayer.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

//
// check
//

// rows that are recomputed while loading, if that reads weights of no more than so many bytes; and at once, if all are
static constexpr int64_t N_ROWS      = 32;
static constexpr size_t  MAX_WEIGHTS = 64 << 20;
static constexpr int64_t N_ROWS_ALL  = 512;

// allowed error of a row: relative to the row, for other kernels, plus relative to the rounding error of the recomputed row
static constexpr double ROW_ERROR    = 0.02;
static constexpr double ROW_ROUNDING = 1.5;

// what the rows of a batch are computed from, copied from a graph
struct llama_firstlayer::row_sample {
    int64_t                    n_rows;
    ggml_context_ptr           ctx;
    ggml_cgraph *              gf = nullptr;
    std::vector<ggml_tensor *> rows;    // of each site, nullptr for those that were not found
    std::vector<ggml_tensor *> inputs;  // the tokens

    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;
};

void llama_firstlayer::take_sample(const llm_graph_params & params, const llama_firstlayer_walk & walk) {
    if (params.ubatch.n_tokens != sample->n_rows) {
        return;
    }
    if (!sample->gf) {
        const size_t           n    = 2 * params.res->get_max_nodes();  // those of an encoder and of a decoder
        const ggml_init_params init = {
            /*.mem_size   =*/2 * n * ggml_tensor_overhead() + ggml_graph_overhead_custom(n, false),
            /*.mem_buffer =*/nullptr,
            /*.no_alloc   =*/true,
        };
        sample->ctx.reset(ggml_init(init));
        sample->gf = ggml_new_graph_custom(sample->ctx.get(), n, false);
    }
    for (const auto & [t, i] : walk.find(sites)) {
        if (!sample->rows[i]) {
            ggml_tensor * from = walk.as_rows(sample->ctx.get(), t);
            sample->rows[i]    = llama_firstlayer_copy(sample->ctx.get(), from, sample->copies);
        }
    }
    for (const ggml_tensor * t : walk.tokens()) {
        if (sample->copies.count(t)) {
            sample->inputs.push_back(sample->copies.at(t));
        }
    }
}

bool llama_firstlayer::build_graphs(llama_model & model) {
    const uint32_t n_tokens = check_all ? N_ROWS_ALL : N_ROWS;
    if (!model.hparams.no_alloc && (phantoms.empty() || check_all)) {
        sample = std::make_shared<row_sample>(row_sample{ n_tokens, nullptr, nullptr, {}, {}, {} });
        sample->rows.resize(sites.size());
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 8 * n_tokens;
    params.n_batch              = n_tokens;
    params.n_ubatch             = n_tokens;
    params.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // every architecture runs without it

    // the constructor builds many graphs: it is left with its first, once there is one of the other kind, of one token or of several
    struct enough {};

    bool is_first = true;
    checking      = [&](const llm_graph_params & first) {
        if (first.gtype == LLM_GRAPH_TYPE_ENCODER || !std::exchange(is_first, false)) {
            return;
        }
        llama_batch_allocr allocr(model.hparams.n_pos_per_embd());
        llm_graph_result   res(first.res->get_max_nodes());
        llm_graph_params   other = first;
        other.ubatch             = allocr.ubatch_reserve(first.ubatch.n_tokens == 1 ? n_tokens : 1, 1);
        other.n_outputs          = other.ubatch.n_tokens;
        other.res                = &res;
        model.build_graph(other);
        throw enough();
    };

    // only graphs are built: no KV cache is allocated, and no compute buffers
    const bool no_alloc    = model.hparams.no_alloc;
    model.hparams.no_alloc = true;
    bool is_built          = true;
    try {
        llama_context ctx(model, params);
    } catch (const enough &) {
    } catch (const std::exception & err) {
        LLAMA_LOG_DEBUG("%s: %s\n", __func__, err.what());
        is_built = false;
    }
    checking               = nullptr;
    model.hparams.no_alloc = no_alloc;
    res_encoder.reset();
    return is_built;
}

static double norm(const std::vector<float> & a, const std::vector<float> & b) {
    return std::sqrt(std::inner_product(a.begin(), a.end(), b.begin(), 0.0, std::plus<>(),
                                        [](double x, double y) { return (x - y) * (x - y); }));
}

static std::vector<float> to_float(const std::vector<uint8_t> & data, ggml_type type, int64_t width) {
    std::vector<float> res(width);
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), data.data(), data.size());
    } else {
        ggml_get_type_traits(type)->to_float(data.data(), res.data(), width);
    }
    return res;
}

// the values of a row as they are after quantization
static std::vector<float> rounded(const std::vector<float> & row, ggml_type type) {
    const std::vector<float> importance(row.size(), 1.0f);  // required by the smallest types
    std::vector<uint8_t>     data(ggml_row_size(type, row.size()));
    ggml_quantize_chunk(type, row.data(), data.data(), 0, 1, row.size(), importance.data());
    return to_float(data, type, row.size());
}

// Whether ggml can quantize these values: for the smallest types it compares products of four of them, and aborts if those are
// infinite
static bool can_round(const std::vector<float> & row, ggml_type type) {
    const float max = ggml_is_quantized(type) ? 1e8f : 1e15f;
    return std::all_of(row.begin(), row.end(), [=](float x) { return std::abs(x) <= max; });
}

static std::vector<float> stored(const ggml_tensor * table, int64_t row, int64_t column, int64_t width) {
    std::vector<uint8_t> data(ggml_row_size(table->type, width));
    ggml_backend_tensor_get(table, data.data(), row * table->nb[1] + ggml_row_size(table->type, column), data.size());
    return to_float(data, table->type, width);
}

void llama_firstlayer::check_rows() {
    if (!sample) {
        return;
    }
    const ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    bool                   here    = phantoms.empty() && backend;
    const int64_t          n_vocab = tables[0].tensor->ne[1];
    const int64_t          n_batch = sample->n_rows;

    auto &        rows = sample->rows;
    ggml_cgraph * gf   = sample->gf;
    for (size_t i = 0; i < sites.size(); ++i) {
        rows[i] = sites[i].used ? rows[i] : nullptr;
        if (rows[i]) {
            ggml_set_output(rows[i]->view_src ? rows[i]->view_src : rows[i]);
            ggml_build_forward_expand(gf, rows[i]);
        }
    }

    // what is read of the weights, all of them if not only some rows are
    size_t              size = 0;
    llama_memory_ranges mapped;
    for (int i = 0; gf && i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        for (const ggml_tensor * t : node->src) {
            if (weights.count(t)) {
                here = here && t->buffer &&
                       ggml_backend_supports_buft(backend.get(), ggml_backend_buffer_get_type(t->buffer));
                size += node->op == GGML_OP_GET_ROWS ? n_batch * t->nb[1] : ggml_nbytes(t);
                if (node->op != GGML_OP_GET_ROWS && lazy && spares.count(ggml_get_name(t)) &&
                    llama_firstlayer_is_mapped(t)) {
                    mapped.push_back({ t->data, ggml_nbytes(t) });
                }
            }
        }
    }
    if (!here && check_all) {
        throw std::runtime_error(
            "tables can only be checked with the weights that they were computed from, on the CPU");
    }
    if (!here || (!check_all && size > MAX_WEIGHTS)) {
        return;
    }

    const ggml_gallocr_ptr alloc(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    if (!gf || !ggml_gallocr_alloc_graph(alloc.get(), gf)) {
        return;
    }

    llama_prefetch(mapped);  // at once, where pages would be read one by one

    std::vector<int32_t> tokens(check_all ? n_vocab : n_batch);
    std::random_device   random;  // which rows, nobody who made the file can know
    for (size_t i = 0; i < tokens.size(); ++i) {
        tokens[i] = check_all ? i : random() % n_vocab;
    }
    tokens.resize(GGML_PAD(tokens.size(), n_batch), tokens.back());
    for (const auto & table : tables) {
        if (table.fetched && !check_all) {
            llama_prefetch_rows(table.tensor, tokens.data(), tokens.size());
        }
    }

    // a router that is undecided between two experts may choose another one with other kernels, so a sample tells by most of its
    // rows whose tables these are
    const int64_t        n_allowed = check_all ? 0 : n_batch / 2;
    std::vector<int64_t> n_wrong(sites.size(), 0);

    for (size_t first = 0; first < tokens.size(); first += n_batch) {
        for (ggml_tensor * t : sample->inputs) {
            if (t->buffer) {  // not if only sites that are not read from tables need it
                ggml_backend_tensor_set(t, &tokens[first], 0, ggml_nbytes(t));
            }
        }
        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("computing rows failed");
        }
        for (size_t i = 0; i < sites.size(); ++i) {
            const ggml_tensor * table = tables[sites[i].table].tensor;
            std::vector<float>  row(sites[i].width);
            for (int64_t j = 0; rows[i] && j < n_batch; ++j) {
                ggml_backend_tensor_get(rows[i], row.data(), j * row.size() * sizeof(float),
                                        row.size() * sizeof(float));
                const auto   found   = stored(table, tokens[first + j], sites[i].column, sites[i].width);
                const double error   = norm(found, row);
                const double allowed = !can_round(row, table->type) ?
                                           0.0 :
                                           ROW_ERROR * norm(row, std::vector<float>(row.size())) +
                                               ROW_ROUNDING * norm(rounded(row, table->type), row);
                if (!(error <= allowed) && ++n_wrong[i] > n_allowed) {
                    throw std::runtime_error(
                        format("the tables are not of this model: '%s' of token %d is another one than its weights "
                               "give; convert the model again",
                               sites[i].name.c_str(), tokens[first + j]));
                }
            }
        }
    }
    llama_firstlayer_release(mapped);  // memory that is read on demand is not held because a check has read it
}

void llama_firstlayer::populate(const llama_model & model) const {
    auto *     cpu     = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto is_numa = (decltype(ggml_is_numa) *) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu),
                                                                                      "ggml_backend_cpu_is_numa");
    if (!lazy || (is_numa && is_numa())) {
        return;
    }
    llama_memory_ranges mapped;
    for (const auto & [name, t] : model.tensors_by_name) {
        if (llama_firstlayer_is_mapped(t) && !model.can_prefetch.count(t) && !spares.count(name)) {
            mapped.push_back({ t->data, ggml_nbytes(t) });
        }
    }
    llama_firstlayer_populate(mapped);
}

void llama_firstlayer::check(llama_model_base & model) {
    loading = nullptr;
    if (cache_bytes > 0) {
        create_cache(model);
        return;
    }
    if (tables.empty()) {
        return;
    }
    // so that they can be recognized in graphs, and graphs, whose room llama.cpp bounds by the number of weights, have the source's
    model.tensors_by_name.insert(model.tensors_by_name.end(), phantoms.begin(), phantoms.end());
    set_weights(model);
    populate(model);

    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        // the rows are on the host, and their copies on the devices are not split like the KV cache
        if (!phantoms.empty() || !spares.empty()) {
            throw std::runtime_error(
                "tables cannot be used with split mode 'tensor': choose another one, or convert the "
                "model again with --keep-weights");
        }
        LLAMA_LOG_WARN("%s: tables are not used with split mode 'tensor'\n", __func__);
        sites.clear();
        return;
    }

    const bool is_built = build_graphs(model);
    if (!is_built && !problem.empty()) {
        throw std::runtime_error(problem);
    }
    if (!is_built) {
        // some models only run together with another one; apply() still checks every graph
        LLAMA_LOG_DEBUG("%s: cannot build a graph of this model on its own\n", __func__);
        return;
    }
    for (const auto & site : sites) {
        if (site.used) {
            continue;
        }
        if (!phantoms.empty()) {
            throw std::runtime_error(
                format("no node of the graph matches the recipe of '%s': %s. This build of llama.cpp "
                       "computes it otherwise, convert the model again with the matching "
                       "gguf-firstlayer",
                       site.name.c_str(), site.recipe.c_str()));
        }
        LLAMA_LOG_WARN("%s: no node of the graph matches the recipe of '%s', its table is not used: %s\n", __func__,
                       site.name.c_str(), site.recipe.c_str());
    }
    if (!problem.empty()) {
        throw std::runtime_error(problem);
    }
    // columns that nobody needs would take memory for each token of a batch
    for (const auto & site : sites) {
        tables[site.table].dropped = tables[site.table].dropped || !site.used;
    }
    for (auto & site : sites) {
        site.used = site.used && !tables[site.table].dropped;
    }
    check_rows();
    sample.reset();

    // a warning, since tools do not show info messages
    const auto is_used = [](const site & s) {
        return s.used;
    };
    const size_t n_used = std::count_if(sites.begin(), sites.end(), is_used);
    if (n_used > 0) {
        LLAMA_LOG_WARN("%s: the first layer comes from tables (%zu of %zu sites)\n", __func__, n_used, sites.size());
    }
}
