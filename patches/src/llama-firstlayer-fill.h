#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

struct llm_graph_params;
class llm_graph_input_i;

// A copy of t and of what it is computed from, except for weights and the rows of a cache. copies: those of earlier calls
ggml_tensor * llama_firstlayer_copy(ggml_context *                                           ctx,
                                    ggml_tensor *                                            t,
                                    std::unordered_map<const ggml_tensor *, ggml_tensor *> & copies);

// a graph that computes the rows of `tokens` into the slots of a cache
struct llama_firstlayer_fill_graph {
    ggml_context_ptr           ctx;
    ggml_cgraph *              gf;
    std::vector<ggml_tensor *> tokens;  // I32 [n_tokens], all with the same content
    ggml_tensor *              slots;   // I64 [n_tokens]

    // a copy of the nodes that `roots` are computed from, which may be fewer than n_tensors; weights stay what they are
    static llama_firstlayer_fill_graph copy(const std::vector<ggml_tensor *> & roots,
                                            const std::vector<ggml_tensor *> & tokens,
                                            const ggml_tensor *                slots,
                                            size_t                             n_tensors);
};

// The fill graphs of a context, on its backends: rows come from the kernels and the threads that its own graphs run with. And the
// slots of the batch that it is about to compute, or computes.
struct llama_firstlayer_fill {
    // templates: smallest first. Throws std::runtime_error if there is no memory
    llama_firstlayer_fill(const llama_firstlayer_fill_graph * templates,
                          size_t                              n_templates,
                          const llm_graph_params &            params);

    // Compute the row of each token into its slot. padding: the first slot of those that hold nothing
    bool compute(const std::vector<llama_token> & tokens, const std::vector<int32_t> & slots, int32_t padding);

    std::vector<int32_t>      taken;                // one for each token
    size_t                    n_missing = 0;        // rows that were computed since tokens were last counted
    const llm_graph_input_i * reader    = nullptr;  // of the graph that reads them

  private:
    struct graph : llama_firstlayer_fill_graph {
        ggml_backend_sched_ptr sched;
    };

    std::vector<graph> graphs;
};
