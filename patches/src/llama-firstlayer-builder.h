#pragma once

#include "llama-cpp.h"

#include <cstdint>

// A model without its weights, on the CPU or a device: the buffer types there decide which kernels compute rows. Without the
// vocabulary, of which graphs need only the size, it loads faster. Throws std::runtime_error
llama_model_ptr llama_firstlayer_load_metadata(const char *       path_model,
                                               bool               load_vocab,
                                               ggml_backend_dev_t dev = nullptr);

// Builds graphs of a model as a context does before it runs, so that llama_firstlayer::observe can look at them.
struct llama_firstlayer_builder {
    // n_batch: most tokens in a graph, an even number. Throws std::runtime_error if the model only runs beside another one
    llama_firstlayer_builder(llama_model & model, uint32_t n_batch);

    // with a context like that; likewise
    llama_firstlayer_builder(llama_model & model, const llama_context_params & params);

    // n_tokens: a multiple of n_seqs. Throws std::runtime_error
    void build(uint32_t n_tokens, uint32_t n_outputs) const;

    llama_context_ptr ctx;
    uint32_t          n_seqs;  // sequences in a batch: recurrent states split it by these
};
