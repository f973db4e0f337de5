#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-firstlayer-fill.h"
#include "llama-firstlayer-walk.h"
#include "llama-firstlayer.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

struct llm_graph_params;

// Rows of the first layer, computed when their token is first seen, and kept until others need their place. All contexts of a
// model share it; those on other threads wait while one computes rows.
struct llama_firstlayer_cache {
    // Batches in which rows are computed. Rows must not depend on how many are missing: of the sizes on the CPU, those are kept
    // that have the kernels of large batches, see keep_equal_sizes; on devices, there is but one.
    static constexpr uint32_t    MAX_FILL = 64;
    static constexpr int32_t     N_TRIED  = 16;  // rows that are computed to find them
    static std::vector<uint32_t> fill_sizes(bool on_cpu);

    // the sites of a graph at the price of F32 rows in memory
    static std::vector<ggml_tensor *> choose_sites(const llama_firstlayer_walk & walk);

    // max_bytes: of memory for rows; a few for padding come on top. Throws std::runtime_error if there is none, or no room
    llama_firstlayer_cache(ggml_backend_dev_t dev, int64_t row_width, int64_t n_vocab, size_t max_bytes);
    ~llama_firstlayer_cache();

    // Keep a copy of the nodes that compute the sites of a graph, to compute rows in batches of this size. False if a site is
    // missing.
    bool add_template(ggml_context *                              ctx,
                      const llama_firstlayer_walk &               walk,
                      const std::vector<llama_firstlayer::site> & sites);

    // Drop the templates that do not compute the rows of some tokens to the same bits as the largest.
    void keep_equal_sizes(const llm_graph_params & params);

    // Add an input to a graph: the slots of the batch's tokens, I32 [n_tokens]. nullptr if the batch must be computed as usual,
    // because its tokens do not fit or rows cannot be computed.
    ggml_tensor * add_slots(const llm_graph_params & params);

    // of a model with an encoder and a decoder, rows are those of the decoder
    static bool is_other_graph(const llama_model & model, const llm_graph_params & params);

    // whether the rows may stand in for what this graph computes
    bool serves(const llama_model & model, const llm_graph_params & params) const;

    // whether the weights that rows are computed from change, as in training
    bool is_trained() const;

    // Take slots for the tokens of a batch instead of those of the last one, one for each of them, and compute the rows that are
    // missing. Nothing overwrites the slots until they are released. False, and no slots, if that cannot be done.
    bool acquire(llama_firstlayer_fill & fill, const llama_token * tokens, uint32_t n_tokens);
    void release(llama_firstlayer_fill & fill);

    // Count the tokens of a batch that reads the slots taken.
    void count(llama_firstlayer_fill & fill);

    llama_firstlayer_cache_data get_data() const;

    // Add the data of all caches of this process. False if there is none.
    static bool add_up(llama_firstlayer_cache_data & sum);

    ggml_tensor *      rows;  // F32 [row width, slots and padding]
    ggml_backend_dev_t dev;

  private:
    struct slot {
        llama_token token;
        uint32_t    n_pins;
        bool        recent;  // used since the hand passed
    };

    static constexpr int32_t NONE    = -1;
    static constexpr int32_t PENDING = -2;

    void    pin(int32_t i);
    void    unpin(std::vector<int32_t> & slots);
    int32_t take_slot();

    std::shared_ptr<llama_firstlayer_fill> get_fill(const llm_graph_params & params);

    ggml_context_ptr                         ctx;
    ggml_backend_buffer_ptr                  buf;
    std::vector<llama_firstlayer_fill_graph> templates;
    llama_firstlayer_walk::tensor_set        weights;  // that rows are computed from

    mutable std::mutex   mutex;                        // for all that follows
    std::vector<int32_t> slot_of;                      // by token
    std::vector<slot>    slots;                        // those that have been used
    int32_t              n_slots;                      // most that fit
    int32_t              n_pinned = 0;
    int32_t              hand     = 0;                 // of the clock that says which slot is used again
    int64_t              n_hits   = 0;
    int64_t              n_misses = 0;
    int64_t              t_us     = 0;

    // by a backend of the context; inputs of its graphs keep them alive
    std::unordered_map<ggml_backend_t, std::weak_ptr<llama_firstlayer_fill>> fills;
};
