#include "llama-firstlayer.h"

#include "llama-cpp.h"
#include "llama-firstlayer-cache.h"
#include "llama-firstlayer-demand.h"
#include "llama-firstlayer-gather.h"
#include "llama-firstlayer-pages.h"
#include "llama-firstlayer-walk.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

llama_firstlayer::llama_firstlayer() : demand_kinds(std::make_unique<llama_firstlayer_demand_kinds>()) {}

llama_firstlayer::~llama_firstlayer() {
    if (loading == this) {
        loading = nullptr;
    }
}

//
// run time
//

void llama_firstlayer::set_weights(const llama_model & model) {
    for (const auto & [name, t] : model.tensors_by_name) {
        weights.insert(t);
        if (spares.count(name)) {
            spare_weights.push_back(t);
        }
    }
}

bool llama_firstlayer::can_adapt(const char * name) const {
    const auto is_it = [&](const ggml_tensor * t) {
        return strcmp(ggml_get_name(t), name) == 0;
    };
    if (phantoms.empty() || (!elides(name) && std::none_of(sources.begin(), sources.end(), is_it))) {
        return true;
    }
    LLAMA_LOG_ERROR(
        "%s: tables were computed from weight '%s', so it cannot be adapted: convert the model again with "
        "--keep-weights\n",
        __func__, name);
    return false;
}

bool llama_firstlayer::can_save() const {
    if (phantoms.empty()) {
        return true;
    }
    LLAMA_LOG_ERROR(
        "%s: weight '%s' was replaced by a table, so the model cannot be saved: load the model it was converted from\n",
        __func__, phantoms.begin()->first.c_str());
    return false;
}

bool llama_firstlayer::is_trained() const {
    const auto is_it = [](const ggml_tensor * t) {
        return t->flags & GGML_TENSOR_FLAG_PARAM;
    };
    return std::any_of(sources.begin(), sources.end(), is_it) ||
           std::any_of(spare_weights.begin(), spare_weights.end(), is_it);
}

std::vector<ggml_tensor *> llama_firstlayer::mapped_spares() const {
    std::vector<ggml_tensor *> res;
    std::copy_if(spare_weights.begin(), spare_weights.end(), std::back_inserter(res), [](const ggml_tensor * t) {
        return t->type == GGML_TYPE_F32 && llama_firstlayer_is_mapped(t);  // others are not trained
    });
    return res;
}

bool llama_firstlayer::unmap(const std::vector<ggml_tensor *> & mapped) {
    const ggml_init_params params = {
        /*.mem_size   =*/ggml_tensor_overhead() * mapped.size(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx_unmapped.reset(ggml_init(params));

    std::vector<ggml_tensor *> copies;
    for (const ggml_tensor * t : mapped) {
        copies.push_back(ggml_dup_tensor(ctx_unmapped.get(), t));
    }
    buf_unmapped.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_unmapped.get(), ggml_backend_cpu_buffer_type()));
    if (!buf_unmapped) {
        return false;
    }
    ggml_backend_buffer_set_usage(buf_unmapped.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (size_t i = 0; i < mapped.size(); ++i) {
        ggml_backend_tensor_copy(mapped[i], copies[i]);
        mapped[i]->buffer = copies[i]->buffer;
        mapped[i]->data   = copies[i]->data;
    }
    return true;
}

// has no tensor in the graph: it prefetches the rows of each batch's tokens before they are looked up, where they are mapped
struct llm_graph_input_firstlayer : llm_graph_input_i {
    llm_graph_input_firstlayer(const llama_firstlayer & owner, llama_firstlayer::table & table) :
        owner(owner),
        table(table) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (!table.fetched) {
            return;
        }
        // each row only once: a prefetch costs a system call, and pages that were read are likely to stay in memory
        std::vector<int32_t> rows;
        for (uint32_t i = 0; ubatch->token && i < ubatch->n_tokens; ++i) {
            if (!table.fetched[ubatch->token[i]].exchange(true, std::memory_order_relaxed)) {
                rows.push_back(ubatch->token[i]);
            }
        }
        llama_prefetch_rows(table.tensor, rows.data(), rows.size());
    }

    bool can_reuse(const llm_graph_params &) override { return !owner.is_trained(); }

    const llama_firstlayer &  owner;
    llama_firstlayer::table & table;
};

ggml_tensor * llama_firstlayer::look_up(const llama_model &      model,
                                        const llm_graph_params & params,
                                        uint32_t                 i,
                                        ggml_tensor *            index) {
    if (!constants.empty()) {
        return constants[i];
    }

    ggml_tensor * table = tables[i].tensor;
    ggml_tensor * rows  = llama_firstlayer_gather(params.res->get_ctx(), table, index, model.dev_layer(0));
    ggml_format_name(rows, "firstlayer.%u (device)", i);
    ggml_format_name(llama_firstlayer_gathered(rows), "firstlayer.%u", i);
    if (!cache) {
        params.res->add_input(std::make_unique<llm_graph_input_firstlayer>(*this, tables[i]));
    }
    return rows;
}

void llama_firstlayer::use_constants(const llama_model & model, int64_t n_tokens) {
    const ggml_init_params params = {
        /*.mem_size   =*/ggml_tensor_overhead() * tables.size(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx_constants.reset(ggml_init(params));
    for (const auto & table : tables) {
        constants.push_back(ggml_new_tensor_2d(ctx_constants.get(), GGML_TYPE_F32, table.tensor->ne[0], n_tokens));
    }
    buf_constants.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_constants.get(),
                                                                 ggml_backend_dev_buffer_type(model.dev_layer(0))));
    if (!buf_constants) {
        throw std::runtime_error("cannot allocate the constants");
    }
    ggml_backend_buffer_set_usage(buf_constants.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    for (size_t i = 0; i < tables.size(); ++i) {
        const ggml_tensor *  table    = tables[i].tensor;
        const auto           to_float = ggml_get_type_traits(table->type)->to_float;
        std::vector<uint8_t> row(ggml_row_size(table->type, table->ne[0]));
        std::vector<float>   values(table->ne[0]);
        for (int64_t j = 0; j < n_tokens; ++j) {
            ggml_backend_tensor_get(table, row.data(), j % table->ne[1] * table->nb[1], row.size());
            if (table->type == GGML_TYPE_F32) {
                memcpy(values.data(), row.data(), row.size());
            } else {
                to_float(row.data(), values.data(), values.size());
            }
            ggml_backend_tensor_set(constants[i], values.data(), j * constants[i]->nb[1], constants[i]->nb[1]);
        }
    }
}

void llama_firstlayer::rewrite(const llama_model &           model,
                               const llm_graph_params &      params,
                               const llama_firstlayer_walk & walk) {
    ggml_context * ctx = params.res->get_ctx();
    ggml_cgraph *  gf  = params.res->get_gf();

    const auto found = walk.find(sites);
    if (found.empty() || (cache && !walk.has_batch_tokens())) {
        return;
    }
    ggml_tensor * index = cache ? cache->add_slots(params) : walk.tokens().front();
    if (!index) {
        return;
    }

    std::vector<ggml_tensor *>                                        rows(tables.size(), nullptr);
    std::unordered_map<ggml_tensor *, llama_firstlayer_walk::row_ref> row_refs;
    for (const auto & [t, i] : found) {
        const auto & site = sites[i];
        if (tables[site.table].dropped) {
            continue;
        }
        if (!rows[site.table]) {
            rows[site.table] = look_up(model, params, site.table, index);
        }
        row_refs[t] = { rows[site.table], site.column * sizeof(float) };
        for (const ggml_tensor * from : checking ? walk.ancestors(t) : llama_firstlayer_walk::tensor_set()) {
            if (weights.count(from)) {
                sources.insert(from);
            }
        }
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * t = ggml_graph_node(gf, i);
        if (t->op == GGML_OP_GET_ROWS && weights.count(t->src[0]) && (t->src[1]->flags & GGML_TENSOR_FLAG_INPUT)) {
            llama_firstlayer_gather_in_place(ctx, t, model.dev_layer(0));
        }
    }
    const auto gone = walk.replace(ctx, gf, row_refs);
    for (const auto & [t, i] : found) {
        if (checking && row_refs.count(t)) {  // later, other threads may be here too
            sites[i].used = true;
        }
    }

    // llama_context disables a fused operation if it is not on its layer's device: drop those that are gone
    auto & fused = const_cast<std::vector<llm_graph_fused_node> &>(params.res->get_fused_nodes());
    fused.erase(std::remove_if(fused.begin(), fused.end(),
                               [&](const llm_graph_fused_node & node) {
                                   return gone.count(node.tensor) || row_refs.count(node.tensor);
                               }),
                fused.end());
}

bool llama_firstlayer::is_reserve(const llama_ubatch & ubatch) {
    // as llama_context makes them; the ids of a batch have a place of their own
    return ubatch.seq_id[0] == nullptr || ubatch.seq_id[0] == ubatch.seq_id_unq;
}

ggml_cgraph * llama_firstlayer::apply(const llama_model & model, const llm_graph_params & params) {
    ggml_cgraph * gf = use_rows(model, params);
    if (checking) {
        checking(params);
    }
    if (gf && demand_rows && !observe) {
        leave_out(model, params);
    }
    return gf;
}

bool llama_firstlayer::drops_logits(bool embeddings, bool has_samplers) const {
    return demand_embeddings && embeddings && !has_samplers;
}

void llama_firstlayer::leave_out(const llama_model & model, const llm_graph_params & params) {
    const auto & cparams = params.cparams;
    // callbacks see all rows, and so does the loss in training
    if (cparams.cb_eval || cparams.training) {
        return;
    }
    // of such models, T5 has a buffer for its logits in any case
    const bool              both        = llama_model_has_encoder(&model) && llama_model_has_decoder(&model);
    const bool              with_logits = both || !drops_logits(cparams.embeddings, !params.samplers.empty());
    llama_firstlayer_demand demand(params, with_logits);
    if (demand.apply(*demand_kinds) && !is_reserve(params.ubatch) && !told_demand.exchange(true)) {
        // a warning, since tools do not show info messages
        LLAMA_LOG_WARN("%s: not computed, since nobody reads it: %s\n", __func__, demand.describe().c_str());
    }
}

const ggml_tensor * llama_firstlayer::find_phantom(ggml_cgraph * gf) const {
    // told by their addresses: this looks at all operands of all nodes of a graph, and reads none of them
    const char * begin = (const char *) ggml_get_mem_buffer(ctx_phantom.get());
    const char * end   = begin + ggml_get_mem_size(ctx_phantom.get());
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        for (const ggml_tensor * src : t->src) {
            if (begin <= (const char *) src && (const char *) src < end && (t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                return src;
            }
        }
    }
    return nullptr;
}

ggml_cgraph * llama_firstlayer::use_rows(const llama_model & model, const llm_graph_params & params) {
    ggml_cgraph * gf = params.res->get_gf();

    if (!observe && phantoms.empty() && (sites.empty() || (cache && !cache->serves(model, params)))) {
        return gf;
    }
    if (!observe && is_trained()) {
        if (!saw_training.exchange(true)) {
            if (!phantoms.empty()) {
                LLAMA_LOG_WARN("%s: weights that were replaced by tables are not trained\n", __func__);
            }
            const auto mapped = mapped_spares();
            if (!mapped.empty()) {
                if (!unmap(mapped)) {
                    LLAMA_LOG_ERROR("%s: there is no memory for weights that are trained\n", __func__);
                    return nullptr;
                }
                params.res->reset();  // it may have views of them
                return model.build_graph(params);
            }
        }
        if (phantoms.empty()) {
            return gf;
        }
    }

    if ((checking || observe) && params.gtype != LLM_GRAPH_TYPE_ENCODER && llama_model_has_encoder(&model)) {
        // contexts build the encoder's graph only when they encode
        res_encoder = std::make_unique<llm_graph_result>(params.res->get_max_nodes());

        llm_graph_params encoder = params;
        encoder.gtype            = LLM_GRAPH_TYPE_ENCODER;
        encoder.mctx             = nullptr;
        encoder.res              = res_encoder.get();
        model.build_graph(encoder);
    }

    {
        const llama_firstlayer_walk walk(*params.res, weights, model.tok_embd);
        if (observe) {
            observe(params, walk);
            return gf;
        }
        if (checking && sample) {
            take_sample(params, walk);
        }
        rewrite(model, params, walk);
    }

    const ggml_tensor * missing = phantoms.empty() ? nullptr : find_phantom(gf);
    if (!missing) {
        return gf;
    }

    if (params.cparams.warmup) {
        // a warmup graph routes tokens through all experts, which tables do not hold: build the usual graph instead
        llm_graph_params usual = params;
        usual.cparams.warmup   = false;
        params.res->reset();
        return model.build_graph(usual);
    }

    const std::string message =
        format("%s needs weight '%s', which was replaced by a table: convert the model again with --keep-weights",
               params.ubatch.token ? "the graph" : "a batch of embeddings", ggml_get_name(missing));

    if (checking) {
        problem = message;
        return gf;
    }
    if (is_reserve(params.ubatch)) {
        // memory is only being reserved; an actual batch fails below
        return gf;
    }
    LLAMA_LOG_ERROR("%s: %s\n", __func__, message.c_str());
    return nullptr;
}

int32_t llama_model_firstlayer_n_sites(const llama_model * model) {
    return model->firstlayer ? model->firstlayer->sites.size() : 0;
}

int32_t llama_model_firstlayer_get_site(const llama_model * model, int32_t i, llama_firstlayer_site * site) {
    if (i < 0 || i >= llama_model_firstlayer_n_sites(model)) {
        return -1;
    }
    const auto & cur = model->firstlayer->sites[i];

    *site = { cur.name.c_str(), cur.recipe.c_str(),
              cur.width,        ggml_get_name(model->firstlayer->tables[cur.table].tensor),
              cur.column,       cur.used };
    return 0;
}
