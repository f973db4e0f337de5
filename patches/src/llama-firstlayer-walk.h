#pragma once

#include "ggml.h"
#include "llama-firstlayer-ops.h"

#include <bitset>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

class llm_graph_result;

//
// llama_firstlayer_walk
//

// Splits a compute graph into what depends on the token ids alone and the rest:
//
//   - a constant is computed from model weights only
//   - a row-pure tensor is computed from token ids and constants, row by row: the row of a token depends on its id only
//   - everything else (positions, KV cache, masks, LoRA, vector embeddings) is impure
//
// A site is a row-pure tensor that contains a matrix product and feeds impure nodes. It can be read from a table.
struct llama_firstlayer_walk {
    // where the rows of a site are found
    struct row_ref {
        ggml_tensor * rows;    // F32 [row width, n_tokens]
        size_t        offset;  // of the site's first value in a row, in bytes
    };

    // a node, and an operand of it that is a model weight or computed from weights alone
    struct use {
        const ggml_tensor * node;
        const ggml_tensor * operand;
        int64_t             n_slices;       // rows or experts that the node selects from, 1 if it reads everything
        int64_t             n_used;         // how many of these a token reads
        int64_t             multiply_adds;  // if the node is a product with it
    };

    using tensor_set = std::unordered_set<const ggml_tensor *>;

    // Deeper expressions count as impure. The deepest one of llama.cpp's architectures has 29 levels; a hostile model could let
    // recipes, whose printing takes stack and time for each level, reach through all of its layers.
    static constexpr int MAX_DEPTH = 128;

    // weights: all of the model's; kept by reference
    llama_firstlayer_walk(const llm_graph_result & res, const tensor_set & weights, const ggml_tensor * tok_embd);

    // graph inputs that hold token ids, I32 [n_tokens]
    const std::vector<ggml_tensor *> & tokens() const { return inp_tokens; }

    // whether these are the tokens of the batch as they are, not ids that the architecture substitutes for them
    bool has_batch_tokens() const { return batch_tokens; }

    // the sites, in graph order, for tables of n_rows rows
    std::vector<ggml_tensor *> sites(int64_t n_rows, int64_t bytes_per_value) const;

    // all tensors that a file could name as sites, in graph order
    std::vector<ggml_tensor *> possible_sites() const;

    // the nodes that known sites stand for, in graph order, each with the index of its site; a site has a recipe and a width
    template <typename Sites> std::vector<std::pair<ggml_tensor *, size_t>> find(const Sites & sites) const;

    // bytes of weights that a token need not read if the tensors in `cut` are given
    int64_t bytes_saved(const tensor_set & cut) const;

    // values per token
    int64_t width(const ggml_tensor * t) const;

    // F32 [width, n_tokens], contiguous: the values of a row-pure tensor, those of each token in the order of its columns
    ggml_tensor * as_rows(ggml_context * ctx, ggml_tensor * t) const;

    // the expression that computes t, in canonical form; a repeated subexpression is labelled `$n:=` where it first occurs
    std::string recipe(const ggml_tensor * t) const;

    // everything that t is computed from, including t
    tensor_set ancestors(const ggml_tensor * t) const;

    // the tensors that the graph still reads if those in `cut` are given
    tensor_set live(const tensor_set & cut) const;

    // what each node reads of the model's weights, in graph order
    std::vector<use> uses() const;

    // why there is no site: what the first node that leaves the row-pure region mixes in
    std::string blocker() const;

    // Replace sites with rows, in place, and rebuild the graph from what is still live. Sites that cannot be replaced are taken
    // out of row_refs. Returns the nodes that are gone.
    tensor_set replace(ggml_context *                               ctx,
                       ggml_cgraph *                                gf,
                       std::unordered_map<ggml_tensor *, row_ref> & row_refs) const;

  private:
    enum purity {
        PURITY_IMPURE,
        PURITY_CONSTANT,
        PURITY_PURE,
    };

    struct info {
        purity  kind    = PURITY_IMPURE;
        bool    product = false;  // contains a matrix product
        bool    alias   = false;  // impure, but a layout operation on a pure tensor
        uint8_t axes    = 0;      // bit d: the tokens extend along axis d. Axes of size 1 may be included: that is
                                  // harmless, and without them a batch of one token would look different
        size_t  stride  = 0;      // bytes between tokens if the values of a token lie together in memory, 0 otherwise
        int     depth   = 0;      // of the expression that computes it
    };

    const info &             get(const ggml_tensor * t) const;
    void                     set(const ggml_tensor * t, const info & cur);
    llama_firstlayer_operand operand(const ggml_tensor * t) const;

    static bool is_layout_op(const ggml_tensor * t) {
        return llama_firstlayer_get_op(t).is(LLAMA_FIRSTLAYER_OP_LAYOUT);
    }

    // the tensors that can be sites and match one of the given hints; printing all recipes would take longer
    std::vector<ggml_tensor *> candidates(const std::unordered_set<std::string> & hints) const;
    static std::string         hint(const std::string & recipe, int64_t width);

    static tensor_set reach(std::vector<const ggml_tensor *> stack, const tensor_set & cut);

    info classify(const ggml_tensor * t) const;
    bool classify_row_wise(const ggml_tensor * t, info & res) const;
    bool classify_layout(const ggml_tensor * t, info & res) const;

    // for a view that selects a range of each axis: the base's axis for each axis of t (-1 for none), and the first index
    static bool map_view(const ggml_tensor * t,
                         const ggml_tensor * base,
                         int                 axis[GGML_MAX_DIMS],
                         int64_t             first[GGML_MAX_DIMS]);

    // the strides of a site that is read from rows, and the translation of a layout operation on the site to them
    void row_strides(const ggml_tensor * t, size_t stride, size_t nb[GGML_MAX_DIMS]) const;
    bool translate_layout(const ggml_tensor * t,
                          const ggml_tensor * site,
                          const size_t        site_nb[GGML_MAX_DIMS],
                          size_t              stride,
                          size_t              nb[GGML_MAX_DIMS],
                          size_t &            offset) const;

    // how a site becomes rows
    struct placement {
        bool   as_views = true;    // of the rows, if all readers can cope with these; otherwise the site is a copy
        size_t nb[GGML_MAX_DIMS];  // strides of the site in the rows

        // the site and the layout operations on it, and these as views: strides, and offsets from the site's first value
        std::vector<std::pair<ggml_tensor *, ggml_tensor>> layouts;
    };

    // false if the site must be computed
    bool place_site(ggml_tensor *      site,
                    const row_ref &    row_ref,
                    const tensor_set & is_live,
                    const tensor_set & cut,
                    placement &        res) const;
    void replace_site(ggml_context * ctx, ggml_tensor * site, const row_ref & row_ref, const placement & to) const;

    // the affected nodes that are live, and everything that the pure ones among them are computed from
    tensor_set live_affected(const tensor_set & cut) const;

    use     make_use(const ggml_tensor * t, int i_src) const;
    bool    can_be_site(const ggml_tensor * t) const;
    int64_t bytes_read(const ggml_tensor * t) const;

    static std::string op_name(const ggml_tensor * t);

    size_t      of_one_token(const ggml_tensor * t, size_t address) const;
    std::string shape(const ggml_tensor * t) const;
    void        print(const ggml_tensor *                            t,
                      std::unordered_map<const ggml_tensor *, int> & labels,
                      int &                                          n_labels,
                      std::string &                                  out) const;

    int64_t n_tokens     = 0;
    bool    batch_tokens = false;

    std::vector<ggml_tensor *> inp_tokens;
    std::vector<ggml_tensor *> nodes;     // in graph order
    std::vector<ggml_tensor *> affected;  // those that are pure or read a pure one: a site can touch no others

    const tensor_set * weights;

    // what is not impure, and aliases. Of a graph's nodes these are few, and a lookup would be the larger part of the walk: a
    // bit for all tensors with the same remainder tells most of the others
    std::unordered_map<const ggml_tensor *, info> infos;
    std::bitset<4096>                             has_info;

    static size_t bit(const ggml_tensor * t) { return (uintptr_t) t / sizeof(*t) % 4096; }
};

template <typename Sites>
std::vector<std::pair<ggml_tensor *, size_t>> llama_firstlayer_walk::find(const Sites & sites) const {
    std::unordered_set<std::string> hints;
    for (const auto & site : sites) {
        hints.insert(hint(site.recipe, site.width));
    }

    std::vector<std::pair<ggml_tensor *, size_t>> res;
    for (ggml_tensor * t : candidates(hints)) {
        const std::string found = recipe(t);
        for (size_t i = 0; i < sites.size(); ++i) {
            if (sites[i].recipe == found && sites[i].width == width(t)) {
                res.emplace_back(t, i);
                break;
            }
        }
    }
    return res;
}
