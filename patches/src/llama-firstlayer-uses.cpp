#include "llama-firstlayer-walk.h"
#include "llama-impl.h"

#include <algorithm>
#include <set>

//
// what the graph reads of the weights, and what keeps it from having sites
//

llama_firstlayer_walk::use llama_firstlayer_walk::make_use(const ggml_tensor * t, int i_src) const {
    const ggml_tensor * src = t->src[i_src];

    use res = { t, src, 1, 1, 0 };
    if (i_src > 0) {
        return res;
    }
    const auto & op = llama_firstlayer_get_op(t);
    if (op.is(LLAMA_FIRSTLAYER_OP_PICKS_ROWS)) {
        res.n_slices = ggml_nrows(src);
        res.n_used   = std::max<int64_t>(1, ggml_nelements(t->src[1]) / n_tokens);
    }
    if (op.is(LLAMA_FIRSTLAYER_OP_PICKS_EXPERT)) {
        res.n_slices = src->ne[2];
        res.n_used   = t->src[2]->ne[0];
    }
    if (op.is(LLAMA_FIRSTLAYER_OP_PRODUCT)) {
        res.multiply_adds = src->ne[0] * ggml_nelements(t);
    }
    return res;
}

std::vector<llama_firstlayer_walk::use> llama_firstlayer_walk::uses() const {
    std::vector<use> res;
    for (const ggml_tensor * t : nodes) {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE) || get(t).kind == PURITY_CONSTANT) {
            continue;
        }
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (t->src[i] && get(t->src[i]).kind == PURITY_CONSTANT) {
                res.push_back(make_use(t, i));
            }
        }
    }
    return res;
}

std::string llama_firstlayer_walk::blocker() const {
    for (const ggml_tensor * t : nodes) {
        if (get(t).kind != PURITY_IMPURE || !(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }

        bool                             reads_tokens = false;
        std::vector<const ggml_tensor *> stack;
        for (const ggml_tensor * src : t->src) {
            if (src == nullptr) {
                continue;
            }
            if (get(src).kind == PURITY_PURE) {
                reads_tokens = true;
            } else {
                stack.push_back(src);
            }
        }
        if (!reads_tokens) {
            continue;
        }

        std::set<std::string> mixed;
        for (const ggml_tensor * src : reach(std::move(stack), {})) {
            if (src->op == GGML_OP_NONE && get(src).kind == PURITY_IMPURE) {
                mixed.insert(std::string(src->name).rfind("leaf_", 0) == 0 ? "an unnamed input" : src->name);
            }
        }

        std::string names;
        for (const auto & name : mixed) {
            names += (names.empty() ? "" : ", ") + name;
        }
        return format("%s '%s' mixes the embedding with %s before any matrix product", ggml_op_desc(t), t->name,
                      names.empty() ? "the rows of other tokens" : names.c_str());
    }

    return "no node of its graph depends on the token ids";
}
