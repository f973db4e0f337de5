#pragma once

#include "llama.h"

// First-layer precompute: for every token of the vocabulary, what the first layer computes before position enters is
// stored in tables in the GGUF, and looked up at run time. ref: https://arxiv.org/abs/2402.13388

#ifdef __cplusplus
extern "C" {
#endif

//
// analysis of a model file, for converters
//

// Functions that fail return NULL or a negative number; llama_firstlayer_error() then tells why.

struct llama_firstlayer_analysis;

struct llama_firstlayer_site {
    const char * name;    // of the graph node, e.g. "Qcur-0"
    const char * recipe;  // the expression it stands for
    int64_t      width;   // F32 values per token

    // only for the sites of a loaded model
    const char * table;   // name of the table tensor, NULL in an analysis
    int64_t      column;  // first column in the table
    bool         used;    // a node of the model's graph has this recipe
};

// what a node of the graph reads of a weight
struct llama_firstlayer_use {
    const char * weight;
    int64_t      n_slices;       // rows or experts that it selects from, 1 if it reads all of the weight
    int64_t      n_used;         // of these, for one token
    int64_t      multiply_adds;  // in a prefill of n_batch tokens, of whose last token logits are wanted
    bool         replaced;       // not computed if all sites come from tables
};

// message of the last error in this thread, "" if there was none
LLAMA_API const char * llama_firstlayer_error(void);

// Find the sites of the model in a GGUF file. Only metadata is read; weights are mapped when rows are evaluated.
// n_batch: tokens evaluated at once; n_threads: 0 for all; load_vocab: more than its size, which takes long
LLAMA_API struct llama_firstlayer_analysis * llama_firstlayer_open(const char * path_model,
                                                                   int32_t      n_batch,
                                                                   int32_t      n_threads,
                                                                   bool         load_vocab);

LLAMA_API void llama_firstlayer_close(struct llama_firstlayer_analysis * an);

LLAMA_API int32_t llama_firstlayer_n_vocab(const struct llama_firstlayer_analysis * an);
LLAMA_API int32_t llama_firstlayer_n_sites(const struct llama_firstlayer_analysis * an);

LLAMA_API int32_t llama_firstlayer_get_site(const struct llama_firstlayer_analysis * an,
                                            int32_t                                  i,
                                            struct llama_firstlayer_site *           site);

// Names of the weights that a site is computed from, NULL past the last
LLAMA_API const char * llama_firstlayer_get_site_weight(const struct llama_firstlayer_analysis * an,
                                                        int32_t                                  i,
                                                        int32_t                                  j);

// Names of the weights that no graph of the model reads if all sites come from tables, NULL past the last
LLAMA_API const char * llama_firstlayer_get_elidable(const struct llama_firstlayer_analysis * an, int32_t i);

// What the model's graph reads, none if there is no site. Of a model with an encoder and a decoder: the decoder's
LLAMA_API int32_t llama_firstlayer_n_uses(const struct llama_firstlayer_analysis * an);

LLAMA_API int32_t llama_firstlayer_get_use(const struct llama_firstlayer_analysis * an,
                                           int32_t                                  i,
                                           struct llama_firstlayer_use *            use);

// Why the model has no site
LLAMA_API const char * llama_firstlayer_get_blocker(const struct llama_firstlayer_analysis * an);

// Tokens of a text, with those that mark its begin and end. Returns their number, 0 if the model has no tokenizer.
LLAMA_API int32_t llama_firstlayer_tokenize(const struct llama_firstlayer_analysis * an,
                                            const char *                             text,
                                            int32_t                                  n_text,
                                            llama_token *                            tokens,
                                            int32_t                                  n_tokens_max);

// Compute the rows of some tokens.
// rows: F32 [n_tokens][sum of the widths of all sites], the sites in their order
LLAMA_API int32_t llama_firstlayer_eval(struct llama_firstlayer_analysis * an,
                                        const llama_token *                tokens,
                                        int32_t                            n_tokens,
                                        float *                            rows);

// Whether a converted file can be loaded: as loading does, build its graphs, but without reading weights.
LLAMA_API int32_t llama_firstlayer_check(const char * path_model);

//
// trial: a model whose sites come from rows in memory, to measure what tables would do to its output
//

struct llama_firstlayer_trial;

// The model of an analysis, with its weights, on the CPU.
// n_ctx: tokens of a text; n_batch: tokens that are decoded at once
LLAMA_API struct llama_firstlayer_trial * llama_firstlayer_trial_open(const char * path_model,
                                                                      const struct llama_firstlayer_analysis * an,
                                                                      int32_t                                  n_ctx,
                                                                      int32_t                                  n_batch);

LLAMA_API void llama_firstlayer_trial_close(struct llama_firstlayer_trial * trial);

// F32 [n_vocab][widths of all sites, each padded to a multiple of 4], not initialized; may be changed between batches
LLAMA_API float * llama_firstlayer_trial_rows(struct llama_firstlayer_trial * trial);

// Decode tokens at positions from `first` on, where 0 begins a new text.
// Returns the logits of every token, F32 [n_tokens][n_vocab], valid until the next call
LLAMA_API const float * llama_firstlayer_trial_decode(struct llama_firstlayer_trial * trial,
                                                      const llama_token *             tokens,
                                                      int32_t                         n_tokens,
                                                      int32_t                         first);

//
// what a loaded model uses
//

// 0 if the model was not converted
LLAMA_API int32_t llama_model_firstlayer_n_sites(const struct llama_model * model);

LLAMA_API int32_t llama_model_firstlayer_get_site(const struct llama_model *     model,
                                                  int32_t                        i,
                                                  struct llama_firstlayer_site * site);

#ifdef __cplusplus
}
#endif

//
// llama_firstlayer
//

#ifdef __cplusplus
struct llama_firstlayer;
#endif

#if defined(__cplusplus) && defined(LLAMA_BUILD)

#    include "ggml-cpp.h"

#    include <functional>
#    include <memory>
#    include <string>
#    include <unordered_map>
#    include <unordered_set>
#    include <vector>

struct ggml_cgraph;

struct llama_firstlayer_walk;
struct llama_model;
struct llama_model_base;
struct llama_model_loader;
struct llm_graph_params;

class llm_graph_result;

// The first-layer tables of a model, and the graph rewrite that uses them
struct llama_firstlayer {
    llama_firstlayer();
    ~llama_firstlayer();

    struct table {
        std::string   suffix;  // of the tensor name "firstlayer.<suffix>"
        ggml_tensor * tensor;  // [row width, n_vocab]
    };

    struct site {
        std::string name;
        std::string recipe;
        uint32_t    table;
        int64_t     column;
        int64_t     width;

        bool used;  // by a graph built while loading
    };

    // Read the `firstlayer.*` keys and announce the elided weights to the loader; nullptr if the file has no such keys.
    // Throws std::runtime_error if they are malformed.
    static std::unique_ptr<llama_firstlayer> load(llama_model_loader & ml, uint32_t n_vocab);

    bool elides(const std::string & name) const { return phantoms.count(name) > 0; }

    // Whether a weight can be given out, for adapters; logs an error if not.
    bool can_adapt(const char * name, const llama_model & model) const;

    // a tensor of the given shape and type that has no data, nullptr if the weight is not elided
    ggml_tensor * phantom(llama_model_loader & ml, const ggml_tensor & meta);

    void create_tables(llama_model_base & model, llama_model_loader & ml);

    // Tell the weights of the loaded model, which graphs are made of. Graphs are built by several threads at once, so this
    // is not left to the first of them.
    void set_weights(const llama_model & model);

    // Build the graphs of the loaded model once. Throws std::runtime_error if they would read an elided weight.
    void check(llama_model_base & model);

    // Replace sites by table lookups. Returns nullptr if the graph would read an elided weight.
    ggml_cgraph * apply(const llama_model & model, const llm_graph_params & params);

    // if set, graphs are shown to it instead of being rewritten
    std::function<void(const llm_graph_params & params, const llama_firstlayer_walk & walk)> observe;

    std::vector<table> tables;
    std::vector<site>  sites;

  private:
    void rewrite(const llama_model & model, const llm_graph_params & params, const llama_firstlayer_walk & walk);

    ggml_context_ptr                               ctx_phantom;
    std::unordered_map<std::string, ggml_tensor *> phantoms;
    std::unordered_set<const ggml_tensor *>        weights;      // all model weights, phantoms included
    std::string                                    problem;      // found by apply() while check() runs
    bool                                           checking = false;
    std::unique_ptr<llm_graph_result>              res_encoder;  // last one that was checked or observed
};

#endif
