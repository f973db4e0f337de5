#include "llama-firstlayer-analysis.h"

#include "llama-context.h"
#include "llama-firstlayer-cache.h"
#include "llama-firstlayer-guard.h"
#include "llama-firstlayer.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <thread>

//
// analysis
//

thread_local std::string llama_firstlayer_last_error;

const char * llama_firstlayer_error(void) {
    return llama_firstlayer_last_error.c_str();
}

// a device by its name, or the one of an RPC server
static ggml_backend_dev_t find_device(const std::string & name) {
    ggml_backend_dev_t res = ggml_backend_dev_by_name(name.c_str());
    if (!res && name.find(':') != std::string::npos) {
        using add_server_t     = ggml_backend_reg_t (*)(const char * endpoint);
        ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
        const auto         add_server =
            rpc ? (add_server_t) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server") : nullptr;
        ggml_backend_reg_t server = add_server ? add_server(name.c_str()) : nullptr;
        if (server && ggml_backend_reg_dev_count(server) > 0) {
            ggml_backend_register(server);
            res = ggml_backend_reg_dev_get(server, 0);
        }
    }
    if (!res) {
        std::string known;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            known += std::string(i ? ", " : "") + ggml_backend_dev_name(ggml_backend_dev_get(i));
        }
        throw std::runtime_error(format("there is no device '%s'; known are %s", name.c_str(), known.c_str()));
    }
    return ggml_backend_dev_type(res) == GGML_BACKEND_DEVICE_TYPE_CPU ? nullptr : res;
}

llama_firstlayer_analysis::llama_firstlayer_analysis(const char *       path_model,
                                                     ggml_backend_dev_t dev,
                                                     int32_t            n_batch,
                                                     int32_t            n_threads,
                                                     bool               load_vocab,
                                                     bool               for_cache) :
    path(path_model),
    dev(dev),
    n_batch(n_batch),
    n_threads(n_threads > 0 ? n_threads : std::max(1u, std::thread::hardware_concurrency())),
    for_cache(for_cache) {
    model = llama_firstlayer_load_metadata(path_model, load_vocab, dev);
    if (model->firstlayer && !model->firstlayer->tables.empty()) {
        throw std::runtime_error("the model is already converted");
    }

    builder = std::make_unique<llama_firstlayer_builder>(*model, n_batch);

    model->firstlayer = std::make_unique<llama_firstlayer>();
    model->firstlayer->set_weights(*model);
    model->firstlayer->observe = [this](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
        collect_sites(params.gtype, walk);
    };

    // a site must exist in the graphs of both prefill and decode
    builder->build(n_batch, n_batch);
    builder->build(builder->n_seqs, builder->n_seqs);

    if (!sites.empty()) {
        collect_uses();
        collect_elidable();
    }
}

std::vector<ggml_tensor *> llama_firstlayer_analysis::choose_sites(const llama_firstlayer_walk & walk) const {
    return for_cache ? llama_firstlayer_cache::choose_sites(walk) :
                       walk.sites(model->vocab.n_tokens(), /*bytes_per_value =*/1);
}

std::set<std::string> llama_firstlayer_analysis::names(const llama_firstlayer_walk::tensor_set & tensors) const {
    std::set<std::string> res;
    for (const auto & [name, t] : model->tensors_by_name) {
        if (tensors.count(t)) {
            res.insert(name);
        }
    }
    return res;
}

std::unordered_map<std::string, ggml_tensor *> llama_firstlayer_analysis::find_sites(
    const llama_firstlayer_walk & walk) const {
    std::unordered_map<std::string, ggml_tensor *> res;
    for (const auto & [t, i] : walk.find(sites)) {
        res.emplace(sites[i].recipe, t);
    }
    return res;
}

void llama_firstlayer_analysis::collect_sites(llm_graph_type gtype, const llama_firstlayer_walk & walk) {
    if (seen.insert(gtype).second) {
        for (ggml_tensor * t : choose_sites(walk)) {
            const std::string recipe = walk.recipe(t);
            const bool        known =
                std::any_of(sites.begin(), sites.end(), [&](const site & s) { return s.recipe == recipe; });
            if (!known) {
                const auto reads = names(walk.ancestors(t));
                sites.push_back({
                    ggml_get_name(t), recipe, walk.width(t), { reads.begin(), reads.end() },
                       gtype
                });
            }
        }
        if (sites.empty()) {
            blocker = walk.blocker();
        }
        return;
    }

    const auto found = find_sites(walk);
    sites.erase(std::remove_if(sites.begin(), sites.end(),
                               [&](const site & s) { return s.gtype == gtype && !found.count(s.recipe); }),
                sites.end());
    if (sites.empty() && blocker.empty()) {
        blocker = "what its graph computes from the token ids depends on the shape of the batch";
    }
}

llama_firstlayer_walk::tensor_set llama_firstlayer_analysis::live_after(const llama_firstlayer_walk & walk) const {
    llama_firstlayer_walk::tensor_set cut;
    const auto                        found = find_sites(walk);
    for (const auto & site : sites) {
        const auto it = found.find(site.recipe);
        if (it != found.end()) {
            cut.insert(it->second);
        }
    }
    auto res = walk.live(cut);
    for (const ggml_tensor * t : cut) {
        res.erase(t);
    }
    return res;
}

void llama_firstlayer_analysis::collect_uses() {
    model->firstlayer->observe = [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
        if (params.gtype == LLM_GRAPH_TYPE_ENCODER && llama_model_has_decoder(model.get())) {
            return;
        }
        const auto live = live_after(walk);
        for (const auto & use : walk.uses()) {
            for (const auto & name : names(walk.ancestors(use.operand))) {
                uses.push_back({ name, use.n_slices, use.n_used, use.multiply_adds, live.count(use.node) == 0 });
            }
        }
    };
    builder->build(n_batch, builder->n_seqs);
}

void llama_firstlayer_analysis::collect_elidable() {
    std::set<std::string> before;
    std::set<std::string> after;

    model->firstlayer->observe = [&](const llm_graph_params &, const llama_firstlayer_walk & walk) {
        before.merge(names(walk.live({})));
        after.merge(names(live_after(walk)));
    };

    builder->build(n_batch, n_batch);
    builder->build(builder->n_seqs, builder->n_seqs);

    if (model->hparams.n_layer_nextn > 0 && model->hparams.router_layer < 0) {
        llama_context_params cparams = llama_context_default_params();
        cparams.n_ctx                = 256;
        cparams.n_batch              = 32;
        cparams.n_ubatch             = 32;
        cparams.ctx_type             = LLAMA_CONTEXT_TYPE_MTP;
        cparams.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;
        if (!llama_context_ptr(llama_init_from_model(model.get(), cparams))) {
            throw std::runtime_error("llama.cpp cannot build the graph of the model's MTP layers");
        }
    }

    // draft models read the token embedding of their target, and so does llama_model_get_tok_embd()
    if (model->tok_embd) {
        after.insert(ggml_get_name(model->tok_embd));
    }

    std::set_difference(before.begin(), before.end(), after.begin(), after.end(), std::back_inserter(elidable));
}

// whether two graphs compute the same in the same order; which branch of a selection is computed makes no difference
static bool is_written_alike(ggml_cgraph * a, ggml_cgraph * b) {
    const auto is_alike = [](const ggml_tensor * s, const ggml_tensor * t) {
        return s->op == t->op && s->type == t->type && ggml_are_same_shape(s, t) &&
               memcmp(s->op_params, t->op_params, sizeof(s->op_params)) == 0;
    };
    return std::equal(ggml_graph_nodes(a), ggml_graph_nodes(a) + ggml_graph_n_nodes(a), ggml_graph_nodes(b),
                      ggml_graph_nodes(b) + ggml_graph_n_nodes(b), is_alike);
}

void llama_firstlayer_analysis::find_spares() {
    llm_graph_result      res(builder->ctx->graph_max_nodes(n_batch));
    std::set<std::string> read;
    ggml_cgraph *         of_tokens = nullptr;

    model->firstlayer->observe = [&](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
        if (llama_firstlayer_cache::is_other_graph(*model, params)) {
            return;
        }
        if (params.ubatch.embd) {
            if (model->hparams.n_pos_per_embd() > 1 || !is_written_alike(of_tokens, params.res->get_gf())) {
                read.merge(names(walk.live({})));
            }
            return;
        }
        static float     vectors  = 0.0f;  // which nobody reads
        llm_graph_params embedded = params;
        embedded.ubatch.token     = nullptr;
        embedded.ubatch.embd      = &vectors;
        embedded.res              = &res;
        of_tokens                 = params.res->get_gf();
        res.reset();
        model->build_graph(embedded);
    };
    builder->build(n_batch, n_batch);

    spares.clear();
    std::copy_if(elidable.begin(), elidable.end(), std::back_inserter(spares),
                 [&](const std::string & name) { return read.count(name); });
}

static llama_firstlayer_analysis * analyse(const char * path_model,
                                           const char * device,
                                           int32_t      n_batch,
                                           int32_t      n_threads,
                                           bool         load_vocab,
                                           bool         for_cache) {
    return llama_firstlayer_guarded(
        [&] {
            return new llama_firstlayer_analysis(path_model, device ? find_device(device) : nullptr,
                                                 std::max(2, GGML_PAD(n_batch, 2)), n_threads, load_vocab, for_cache);
        },
        (llama_firstlayer_analysis *) nullptr);
}

llama_firstlayer_analysis * llama_firstlayer_init(const char * path_model,
                                                  int32_t      n_batch,
                                                  int32_t      n_threads,
                                                  bool         load_vocab) {
    return analyse(path_model, nullptr, n_batch, n_threads, load_vocab, /*for_cache =*/false);
}

llama_firstlayer_analysis * llama_firstlayer_init_on(const char * path_model,
                                                     const char * device,
                                                     int32_t      n_batch,
                                                     int32_t      n_threads,
                                                     bool         load_vocab) {
    return analyse(path_model, device, n_batch, n_threads, load_vocab, /*for_cache =*/false);
}

llama_firstlayer_analysis * llama_firstlayer_init_for_cache(const char * path_model, int32_t n_batch) {
    return analyse(path_model, nullptr, n_batch, /*n_threads =*/0, /*load_vocab =*/false, /*for_cache =*/true);
}

int32_t llama_firstlayer_check(const char * path_model) {
    return llama_firstlayer_guarded(
        [&] {
            llama_firstlayer_load_metadata(path_model, true);
            return 0;
        },
        -1);
}

void llama_firstlayer_free(llama_firstlayer_analysis * an) {
    delete an;
}

int32_t llama_firstlayer_n_vocab(const llama_firstlayer_analysis * an) {
    return an->model->vocab.n_tokens();
}

int32_t llama_firstlayer_n_sites(const llama_firstlayer_analysis * an) {
    return an->sites.size();
}

int32_t llama_firstlayer_get_site(const llama_firstlayer_analysis * an, int32_t i, llama_firstlayer_site * site) {
    if (i < 0 || i >= (int32_t) an->sites.size()) {
        llama_firstlayer_last_error = format("there is no site %d", i);
        return -1;
    }
    *site = { an->sites[i].name.c_str(), an->sites[i].recipe.c_str(), an->sites[i].width, nullptr, 0, true };
    return 0;
}

static const char * get_name(const std::vector<std::string> & list, int32_t i) {
    return i >= 0 && i < (int32_t) list.size() ? list[i].c_str() : nullptr;
}

const char * llama_firstlayer_get_site_weight(const llama_firstlayer_analysis * an, int32_t i, int32_t j) {
    return i >= 0 && i < (int32_t) an->sites.size() ? get_name(an->sites[i].weights, j) : nullptr;
}

int32_t llama_firstlayer_n_uses(const llama_firstlayer_analysis * an) {
    return an->uses.size();
}

int32_t llama_firstlayer_get_use(const llama_firstlayer_analysis * an, int32_t i, llama_firstlayer_use * use) {
    if (i < 0 || i >= (int32_t) an->uses.size()) {
        llama_firstlayer_last_error = format("there is no weight use %d", i);
        return -1;
    }
    const auto & cur = an->uses[i];

    *use = { cur.weight.c_str(), cur.n_slices, cur.n_used, cur.multiply_adds, cur.replaced };
    return 0;
}

const char * llama_firstlayer_get_elidable(const llama_firstlayer_analysis * an, int32_t i) {
    return get_name(an->elidable, i);
}

int32_t llama_firstlayer_find_spares(llama_firstlayer_analysis * an) {
    return llama_firstlayer_guarded(
        [&] {
            an->find_spares();
            return (int32_t) an->spares.size();
        },
        -1);
}

const char * llama_firstlayer_get_spare(const llama_firstlayer_analysis * an, int32_t i) {
    return get_name(an->spares, i);
}

const char * llama_firstlayer_get_blocker(const llama_firstlayer_analysis * an) {
    return an->blocker.c_str();
}

int32_t llama_firstlayer_tokenize(const llama_firstlayer_analysis * an,
                                  const char *                      text,
                                  int32_t                           n_text,
                                  llama_token *                     tokens,
                                  int32_t                           n_tokens_max) {
    return llama_firstlayer_guarded(
        [&] {
            const llama_vocab * vocab = llama_model_get_vocab(an->model.get());
            if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
                return 0;
            }
            const int32_t n = llama_tokenize(vocab, text, n_text, tokens, n_tokens_max, true, false);
            if (n < 0) {
                throw std::runtime_error(format("the text has more than %d tokens", n_tokens_max));
            }
            return n;
        },
        -1);
}
