#pragma once

#include "ggml.h"
#include "llama-firstlayer-ops.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

struct llm_graph_params;

// The kinds of rewritten graphs of a model. llama.cpp's allocator keeps its plan for a graph with as many nodes and leafs as the one
// that it planned, because llama.cpp builds all graphs of a context alike. Rewritten ones are not, so each kind gets a number of
// leafs of its own.
struct llama_firstlayer_demand_kinds {
    static constexpr size_t MAX     = 32;
    static constexpr size_t N_LEAFS = 16;  // more than a rewrite removes

    // leafs to add to a graph of this kind; 0 if there are too many kinds
    size_t n_leafs(size_t kind);

  private:
    std::mutex          mutex;
    std::vector<size_t> known;
};

// Leaves out of a graph what nobody reads: the walk in the other direction. Where the graph selects rows - those of the tokens
// that are output, or those that pooling takes - the selection moves up through row-wise operations, and through attention on
// the side of its queries. It stops at what other rows need: keys, values, states.
struct llama_firstlayer_demand {
    llama_firstlayer_demand(const llm_graph_params & params, bool with_logits);

    // Rewrite the graph, in place. False if all of it is read, or if that is not worth it; then it stays as it is.
    bool apply(llama_firstlayer_demand_kinds & kinds);

    // in the log: what is left out
    std::string describe() const;

  private:
    static constexpr int ALL = LLAMA_FIRSTLAYER_ALL_ROWS;

    // multiply-adds for each node of a graph: what a core or two do in the time that it takes to rewrite it
    static constexpr int64_t MIN_SAVED = 32 * 1024;

    // most tensors that `select` makes
    static constexpr size_t N_SELECT = 5;

    // a node that computes only the rows that are read
    struct narrowed {
        int                       axis;
        llama_firstlayer_row_axes src_axes;
    };

    using tensor_set = std::unordered_set<const ggml_tensor *>;

    void   find_outputs(bool with_logits);
    void   find_index();
    size_t kind() const;

    bool is_selection(const ggml_tensor * t) const;
    bool is_whole(const ggml_tensor * t) const;
    bool row_axes(const ggml_tensor * t, narrowed & rows) const;
    void read(const ggml_tensor * t, int axis);

    // Find what is read of each node, against the order of the graph. False if `whole` has grown: then once more.
    bool spread();

    bool is_worth_it() const;

    // whether the context's tensors, and its scheduler, have room for these leafs and for what is selected
    bool has_room(size_t n_leafs) const;

    bool drops_logits() const { return !has_readers.empty(); }

    bool is_output(const ggml_tensor * t) const { return (t->flags & GGML_TENSOR_FLAG_OUTPUT) && !dropped.count(t); }

    bool          can_select(const ggml_tensor * t, int axis) const;
    ggml_tensor * select(ggml_tensor * t, int axis);
    void          shrink(ggml_tensor * t, const narrowed & rows);
    void          keep_rows(ggml_tensor * t) const;

    const llm_graph_params &   params;
    ggml_context *             ctx;
    ggml_cgraph *              gf;
    int64_t                    n_tokens;
    std::vector<ggml_tensor *> nodes;  // in graph order

    ggml_tensor * index = nullptr;     // I32: which rows are read
    tensor_set    indices;             // the inputs that are the same
    tensor_set    identities;          // those that select all rows, in order

    tensor_set dropped;                // outputs that nobody reads,
    tensor_set dead;                   // and what is computed for them alone
    tensor_set has_readers;            // if logits are dropped: in the graph as it was
    tensor_set whole;                  // nodes that cannot be narrowed, since their operands cannot

    std::unordered_map<const ggml_tensor *, int>         reads;   // axis of the rows that are read, or ALL
    int64_t                                              n_open;  // selections and nodes that are still to be looked at
    std::unordered_map<const ggml_tensor *, narrowed>    narrow;
    std::unordered_map<const ggml_tensor *, ggml_tensor> before;  // narrowed nodes as they were

    // rows of tensors that are computed whole, by their axis
    std::map<std::pair<const ggml_tensor *, int>, ggml_tensor *> selected;
};

// multiply-adds of the products of matrices in a graph, attention included
int64_t llama_firstlayer_multiply_adds(ggml_cgraph * gf);
