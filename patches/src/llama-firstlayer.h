#pragma once

#include "llama.h"

// First-layer precompute: what the first layer computes before position enters is looked up, in tables that hold it for every token
// of the vocabulary, or in a cache of the tokens that were seen. ref: https://arxiv.org/abs/2402.13388

#ifdef __cplusplus
extern "C" {
#endif

//
// analysis of a model file, for converters
//

// Functions that fail return NULL or a negative number; llama_firstlayer_error() then says why.

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
    int64_t      n_slices;       // rows or experts that it selects from, 1 if it reads the whole weight
    int64_t      n_used;         // how many of these one token reads
    int64_t      multiply_adds;  // in a prefill of n_batch tokens, with logits for the last token only
    bool         replaced;       // not computed if all sites come from tables
};

// multiply-adds of the products of matrices in a graph, attention included
struct llama_firstlayer_products {
    int64_t all;
    int64_t read;  // of which demand leaves these
};

// message of the last error in this thread, "" if there was none
LLAMA_API const char * llama_firstlayer_error(void);

// For programs: a mapped file that cannot be read any more, or that has become shorter, ends the process with a message on stderr
// and exit code 1, instead of by a signal. The message must stay valid. Does nothing on Windows
LLAMA_API void llama_firstlayer_explain_bus_errors(const char * message);

// Then also remove a file, and the folder that holds nothing else; nullptr: do not. The paths must stay valid until then
LLAMA_API void llama_firstlayer_remove_on_bus_error(const char * file, const char * folder);

// Find the sites of the model in a GGUF file. Only metadata is read; weights are mapped when rows are evaluated.
// n_batch: tokens evaluated at once; n_threads: 0 for all; load_vocab: load the whole vocabulary (slow), not just its size
LLAMA_API struct llama_firstlayer_analysis * llama_firstlayer_init(const char * path_model,
                                                                   int32_t      n_batch,
                                                                   int32_t      n_threads,
                                                                   bool         load_vocab);

// The same with rows from the kernels of a device, so that they are those of the model on that device. device: its name, such as
// "CUDA0", or HOST:PORT of an RPC server
LLAMA_API struct llama_firstlayer_analysis * llama_firstlayer_init_on(const char * path_model,
                                                                      const char * device,
                                                                      int32_t      n_batch,
                                                                      int32_t      n_threads,
                                                                      bool         load_vocab);

// The same for the sites of a row cache, whose rows are F32 in memory, and few
LLAMA_API struct llama_firstlayer_analysis * llama_firstlayer_init_for_cache(const char * path_model, int32_t n_batch);

LLAMA_API void llama_firstlayer_free(struct llama_firstlayer_analysis * an);

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

// Find the elidable weights that batches of embeddings read in a model that is made for such batches: images, audio, hidden
// states. Its graph for them is then written otherwise than the one for tokens, or its positions have several axes. Returns their
// number. Some architectures have no such graph, and abort the process.
LLAMA_API int32_t llama_firstlayer_find_spares(struct llama_firstlayer_analysis * an);

// Names of these, NULL past the last
LLAMA_API const char * llama_firstlayer_get_spare(const struct llama_firstlayer_analysis * an, int32_t i);

// What the model's graph reads; nothing if there is no site. For a model with an encoder and a decoder: the decoder's graph
LLAMA_API int32_t llama_firstlayer_n_uses(const struct llama_firstlayer_analysis * an);

LLAMA_API int32_t llama_firstlayer_get_use(const struct llama_firstlayer_analysis * an,
                                           int32_t                                  i,
                                           struct llama_firstlayer_use *            use);

// Why the model has no site
LLAMA_API const char * llama_firstlayer_get_blocker(const struct llama_firstlayer_analysis * an);

// Tokenize a text, with the tokens that mark its start and end. Returns the number of tokens, 0 without a tokenizer.
LLAMA_API int32_t llama_firstlayer_tokenize(const struct llama_firstlayer_analysis * an,
                                            const char *                             text,
                                            int32_t                                  n_text,
                                            llama_token *                            tokens,
                                            int32_t                                  n_tokens_max);

// Compute the rows of some tokens.
// rows: F32 [n_tokens][sum of the widths of all sites], in the order of the sites
LLAMA_API int32_t llama_firstlayer_eval(struct llama_firstlayer_analysis * an,
                                        const llama_token *                tokens,
                                        int32_t                            n_tokens,
                                        float *                            rows);

// Set the file, written by convert --sidecar, with the tables for the models that this thread loads from now on; NULL for
// none. Models that the tables do not belong to are loaded without them. The string override "firstlayer.file" does the
// same for a single model; a long path goes on in "firstlayer.file.1", "firstlayer.file.2" and so on
LLAMA_API void llama_firstlayer_set_tables(const char * path);

// MiB for the rows that models keep which this thread loads from now on, without tables; 0 for none, negative for "auto". The model
// parameter for the same is the override "firstlayer.cache", a number or the string "auto"
LLAMA_API void llama_firstlayer_set_cache(double mib);

// What is left out of the graphs of the models that this thread loads from now on, since nobody reads it: "none", "rows" or
// "embeddings". The model parameter for the same is the string override "firstlayer.demand":
//   rows        rows of the last layers that are no output and that no output needs
//   embeddings  besides, logits where a context gives embeddings; llama_get_logits then returns NULL
LLAMA_API void llama_firstlayer_set_demand(const char * what);

// Count what demand saves for a text of n_tokens tokens in a single batch, after n_past others, without reading weights.
// pooling: LLAMA_POOLING_TYPE_UNSPECIFIED for logits of the last token; otherwise, for an embedding without logits
LLAMA_API int32_t llama_firstlayer_count_products(const char *                       path_model,
                                                  int32_t                            n_tokens,
                                                  int32_t                            n_past,
                                                  enum llama_pooling_type            pooling,
                                                  struct llama_firstlayer_products * products);

// Check whether a converted file can be loaded: build its graphs as loading does, but without reading weights.
LLAMA_API int32_t llama_firstlayer_check(const char * path_model);

//
// run: a model that decodes one text, or embeds texts, to measure its output and its speed
//

struct llama_firstlayer_run;

// n_ctx: tokens of the text; n_batch: maximum number of tokens decoded at once; n_threads: 0 for all
// constants: the sites of a converted model come from constants instead of its tables. The output is wrong, but as nothing
//            is looked up, the speed is the most that tables can give
// pooling: LLAMA_POOLING_TYPE_UNSPECIFIED for logits; otherwise, every batch is a text of its own, and gives its embedding
// an: analysis of the model, or NULL. If given, the model runs on the CPU, and its sites come from rows in memory
LLAMA_API struct llama_firstlayer_run * llama_firstlayer_run_init(const char *                             path_model,
                                                                  int32_t                                  n_ctx,
                                                                  int32_t                                  n_batch,
                                                                  int32_t                                  n_threads,
                                                                  bool                                     constants,
                                                                  enum llama_pooling_type                  pooling,
                                                                  const struct llama_firstlayer_analysis * an);

LLAMA_API void llama_firstlayer_run_free(struct llama_firstlayer_run * run);

LLAMA_API int32_t llama_firstlayer_run_n_vocab(const struct llama_firstlayer_run * run);

// F32 [n_vocab][widths of all sites, each padded to a multiple of 4], not initialized; may be changed between batches.
// NULL without an analysis
LLAMA_API float * llama_firstlayer_run_rows(struct llama_firstlayer_run * run);

// Decode the next tokens of the text in a single batch.
// Returns the logits of every token, F32 [n_tokens][n_vocab], valid until the next call
LLAMA_API const float * llama_firstlayer_run_decode(struct llama_firstlayer_run * run,
                                                    const llama_token *           tokens,
                                                    int32_t                       n_tokens);

// The same with logits for the last token only, F32 [n_vocab], as in generation; or the embedding of these tokens, F32 [n_out]
LLAMA_API const float * llama_firstlayer_run_last(struct llama_firstlayer_run * run,
                                                  const llama_token *           tokens,
                                                  int32_t                       n_tokens);

// n_vocab, or the width of embeddings
LLAMA_API int32_t llama_firstlayer_run_n_out(const struct llama_firstlayer_run * run);

// The same in batches of n_batch tokens, each with logits for its last token only, or an embedding.
// Returns the time it took, in microseconds
LLAMA_API int64_t llama_firstlayer_run_time(struct llama_firstlayer_run * run,
                                            const llama_token *           tokens,
                                            int32_t                       n_tokens,
                                            int32_t                       n_batch);

// Forget all but the first n tokens. Returns false if this kind of model cannot forget a part of its memory
LLAMA_API bool llama_firstlayer_run_keep(struct llama_firstlayer_run * run, int32_t n);

// Whether demand has left anything out so far
LLAMA_API bool llama_firstlayer_run_left_out(const struct llama_firstlayer_run * run);

LLAMA_API const struct llama_model * llama_firstlayer_run_get_model(const struct llama_firstlayer_run * run);

//
// what a loaded model uses
//

// of the model's tables, or of its row cache; 0 if it has neither
LLAMA_API int32_t llama_model_firstlayer_n_sites(const struct llama_model * model);

LLAMA_API int32_t llama_model_firstlayer_get_site(const struct llama_model *     model,
                                                  int32_t                        i,
                                                  struct llama_firstlayer_site * site);

// the rows of the first layer that a model keeps
struct llama_firstlayer_cache_data {
    int64_t n_rows;    // that are in use
    int64_t n_rows_max;
    int64_t n_hits;    // tokens whose row was there, or was computed for the same batch
    int64_t n_misses;  // rows computed
    int64_t n_bytes;   // of the rows in use
    int64_t n_bytes_max;
    int64_t t_us;      // microseconds that computing rows took
};

// -1 if the model has no cache
LLAMA_API int32_t llama_model_firstlayer_get_cache(const struct llama_model *           model,
                                                   struct llama_firstlayer_cache_data * data);

// Log it in a line, among a context's timings. Nothing if the model has no cache
LLAMA_API void llama_model_firstlayer_print_cache(const struct llama_model * model);

// Sums over all loaded models that have a cache, as metrics in the text format of Prometheus; "" if there are none. Valid until
// the next call in this thread
LLAMA_API const char * llama_firstlayer_metrics(void);

#ifdef __cplusplus
}
#endif

//
// llama_firstlayer
//

#ifdef __cplusplus

#    include "ggml-cpp.h"

#    include <atomic>
#    include <functional>
#    include <memory>
#    include <string>
#    include <unordered_map>
#    include <unordered_set>
#    include <vector>

struct ggml_cgraph;

struct llama_firstlayer_cache;
struct llama_firstlayer_demand_kinds;
struct llama_firstlayer_walk;
struct llama_model;
struct llama_model_base;
struct llama_model_loader;
struct llama_ubatch;
struct llm_graph_params;

class llm_graph_result;

// The first-layer tables of a model, and the graph rewrite that uses them
struct llama_firstlayer {
    llama_firstlayer();
    ~llama_firstlayer();

    struct table {
        std::string   suffix;                          // of the tensor name "firstlayer.<suffix>"
        ggml_tensor * tensor;                          // [row width, n_vocab]

        std::unique_ptr<std::atomic<bool>[]> fetched;  // rows whose pages were requested

        bool dropped = false;                          // not used, since not all of its sites are in the graph
    };

    struct site {
        std::string name;
        std::string recipe;
        uint32_t    table;
        int64_t     column;
        int64_t     width;

        bool used;  // by a graph built while loading
    };

    // Read the `firstlayer.*` keys and announce the elided weights to the loader; nullptr if the file has no such keys. Until
    // check() has run, the result is `loading`. Throws std::runtime_error if they are malformed.
    static std::unique_ptr<llama_firstlayer> load(llama_model_loader & ml, uint32_t n_vocab);

    // number of bytes by which a sidecar recognizes a weight
    static constexpr size_t N_SAMPLE = 32;

    // of the model that this thread is loading, nullptr if there is none
    static thread_local llama_firstlayer * loading;

    // Whether it is for `loading` to say how a weight is loaded: not at all if it is elided, mapped lazily in host memory if only
    // batches of embeddings and graphs whose sites must be computed read it.
    static bool decides(llama_model_loader & ml, const ggml_tensor & meta, bool & is_lazy);

    // a tensor of the given shape and type without data, nullptr if the weight is not elided
    static ggml_tensor * phantom(llama_model_loader & ml, const ggml_tensor & meta);

    // Whether adapters may use a weight; logs an error if not.
    bool can_adapt(const char * name) const;

    // requested: what the user said; the loader's own mode may be another one
    void create_tables(llama_model_base & model, llama_model_loader & ml, llama_lazy_mode requested);

    // Record the weights of the loaded model, to recognize them in graphs. Several threads may build graphs at once, so this
    // is not left to the first graph.
    void set_weights(const llama_model & model);

    // Build graphs of the loaded model once. Throws std::runtime_error if they would read an elided weight.
    void check(llama_model_base & model);

    // Whether the loaded model can be written to a file; logs an error if not.
    bool can_save() const;

    // whether weights that sites are computed from, or spares, are trained: then the sites are computed
    bool is_trained() const;

    // Replace sites by table lookups, and leave out what nobody reads. Returns nullptr if the graph would read an elided weight.
    ggml_cgraph * apply(const llama_model & model, const llm_graph_params & params);

    // whether a context computes no logits
    bool drops_logits(bool embeddings, bool has_samplers) const;

    // Take the sites from constants, the first n_tokens rows of each table, for batches of up to n_tokens tokens. Throws
    // std::runtime_error.
    void use_constants(const llama_model & model, int64_t n_tokens);

    // rows of a cache are computed before llama.cpp sets the pool of threads for a batch, so on the last one's, which may be
    // gone by then
    static void forget_threadpool(const llama_model & model, ggml_backend_t cpu);

    // whether a graph is only built to reserve memory for batches of its kind
    static bool is_reserve(const llama_ubatch & ubatch);

    // if set, graphs are passed to it instead of being rewritten
    std::function<void(const llm_graph_params & params, const llama_firstlayer_walk & walk)> observe;

    std::vector<table> tables;
    std::vector<site>  sites;

    // demand has left something out, and has been told in the log
    std::atomic<bool> told_demand = false;

    // of a model that was not converted: rows that are computed when they are first needed
    std::unique_ptr<llama_firstlayer_cache> cache;

  private:
    static constexpr size_t CACHE_AUTO = SIZE_MAX;

    // Find the sites of the loaded model, and make a cache for them. If there is nothing to gain, log why.
    void create_cache(llama_model & model);
    void find_cache_sites(llama_model & model);

    struct row_sample;

    // Read what is not lazy at once. llama.cpp has the system do so only for files without lazy weights (MAP_POPULATE); the first token
    // would come later, as it would wait for one page after another.
    void populate(const llama_model & model) const;

    // Build a graph of one token and one of several, without memory for them. Returns false if the model has none of its own.
    bool build_graphs(llama_model & model);

    // Copy what rows are computed from, to check some after building.
    void take_sample(const llm_graph_params & params, const llama_firstlayer_walk & walk);

    // Recompute some rows, or all, if the weights that they were computed from are there. Throws std::runtime_error if they are not
    // those of the tables.
    void check_rows();

    bool   check_all         = false;  // all rows of the tables, not only some
    size_t cache_bytes       = 0;      // for rows that are computed; 0 for none
    bool   demand_rows       = false;  // leave out rows that nobody reads
    bool   demand_embeddings = false;  // and logits beside embeddings

    std::unique_ptr<llama_firstlayer_demand_kinds> demand_kinds;
    std::shared_ptr<row_sample>                    sample;          // while check() runs

    std::function<void(const llm_graph_params & params)> checking;  // while check() runs: called with each graph

    ggml_cgraph * use_rows(const llama_model & model, const llm_graph_params & params);
    void          leave_out(const llama_model & model, const llm_graph_params & params);

    // an elided weight that a graph reads, nullptr if none
    const ggml_tensor * find_phantom(ggml_cgraph * gf) const;

    void rewrite(const llama_model & model, const llm_graph_params & params, const llama_firstlayer_walk & walk);

    // the tensor whose rows are those of table i for the tokens of the batch; index: which rows these are, I32 [n_tokens]
    ggml_tensor * look_up(const llama_model & model, const llm_graph_params & params, uint32_t i, ggml_tensor * index);

    bool elides(const std::string & name) const { return phantoms.count(name) > 0; }

    // spares that could be trained, but are mapped from the file, so nothing can be written to them
    std::vector<ggml_tensor *> mapped_spares() const;

    // Give weights memory of their own. Returns false if there is none.
    bool unmap(const std::vector<ggml_tensor *> & mapped);

    ggml_context_ptr                               ctx_phantom;
    ggml_context_ptr                               ctx_unmapped;
    ggml_backend_buffer_ptr                        buf_unmapped;
    ggml_context_ptr                               ctx_constants;
    ggml_backend_buffer_ptr                        buf_constants;
    std::vector<ggml_tensor *>                     constants;  // F32 [row width, n_tokens] for each table, if used
    std::unordered_map<std::string, ggml_tensor *> phantoms;
    std::unordered_set<std::string>                spares;     // weights that are there, but not for tokens
    std::vector<ggml_tensor *>                     spare_weights;
    std::unordered_set<const ggml_tensor *>        weights;    // all model weights, phantoms included
    std::unordered_set<const ggml_tensor *>        sources;    // those that sites are computed from
    std::string                                    problem;    // found by apply() while check() runs
    bool                                           is_sidecar = false;
    bool                                           lazy       = false;  // tables and spares are mapped lazily
    std::unique_ptr<llm_graph_result>              res_encoder;         // the last encoder graph built here
    std::atomic<bool>                              saw_training = false;
};

#endif
