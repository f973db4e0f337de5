#pragma once

#include "ggml-alloc.h"
#include "llama-cpp.h"
#include "llama-firstlayer-builder.h"
#include "llama-firstlayer-walk.h"
#include "llama-graph.h"
#include "llama-model-loader.h"

#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

// The sites of a model file, what its graph reads (llama-firstlayer-analysis.cpp), and rows (llama-firstlayer-eval.cpp)
struct llama_firstlayer_analysis {
    struct site {
        std::string              name;
        std::string              recipe;
        int64_t                  width;
        std::vector<std::string> weights;
        llm_graph_type           gtype;  // of the graph it was found in
    };

    // dev: whose kernels compute rows, nullptr for the CPU
    llama_firstlayer_analysis(const char *       path_model,
                              ggml_backend_dev_t dev,
                              int32_t            n_batch,
                              int32_t            n_threads,
                              bool               load_vocab,
                              bool               for_cache);

    // see llama_firstlayer_find_spares
    void find_spares();

    void eval(const llama_token * tokens, int32_t n_tokens, float * rows);

    llama_model_ptr                           model;
    std::unique_ptr<llama_firstlayer_builder> builder;

    struct use {
        std::string weight;
        int64_t     n_slices;
        int64_t     n_used;
        int64_t     multiply_adds;
        bool        replaced;
    };

    std::vector<site>        sites;
    std::vector<use>         uses;
    std::vector<std::string> elidable;
    std::vector<std::string> spares;
    std::string              blocker;

  private:
    std::vector<ggml_tensor *> choose_sites(const llama_firstlayer_walk & walk) const;

    void collect_sites(llm_graph_type gtype, const llama_firstlayer_walk & walk);
    void collect_uses();
    void collect_elidable();

    // names of the model weights among tensors
    std::set<std::string> names(const llama_firstlayer_walk::tensor_set & tensors) const;

    std::unordered_map<std::string, ggml_tensor *> find_sites(const llama_firstlayer_walk & walk) const;

    // what a graph still reads and computes if its sites come from tables
    llama_firstlayer_walk::tensor_set live_after(const llama_firstlayer_walk & walk) const;

    void prepare_eval();
    void load_weight(ggml_tensor * t);

    const std::string        path;
    const ggml_backend_dev_t dev;
    const int32_t            n_batch;
    const int32_t            n_threads;
    const bool               for_cache;

    std::set<llm_graph_type> seen;

    // evaluation
    std::unique_ptr<llama_model_loader>  ml;
    ggml_context_ptr                     ctx_eval;
    std::vector<ggml_tensor *>           inputs;  // I32 [n_batch], all with the same tokens
    std::vector<ggml_tensor *>           rows;    // F32 [width, n_batch] of each site
    ggml_cgraph *                        gf = nullptr;
    std::vector<ggml_backend_ptr>        backends;
    ggml_backend_sched_ptr               sched;
    std::vector<ggml_backend_buffer_ptr> bufs;
};
