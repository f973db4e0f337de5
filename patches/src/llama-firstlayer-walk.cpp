#include "llama-firstlayer-walk.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <iterator>
#include <set>

//
// classification
//

llama_firstlayer_walk::llama_firstlayer_walk(const llm_graph_result & res,
                                             const tensor_set &       weights,
                                             const ggml_tensor *      tok_embd) :
    weights(&weights) {
    ggml_cgraph * gf = res.get_gf();

    if (res.get_inp_tokens()) {
        inp_tokens.push_back(res.get_inp_tokens());
    }
    for (const auto & input : res.inputs) {
        const auto * inp = dynamic_cast<const llm_graph_input_embd *>(input.get());
        if (inp && inp->tokens && inp->tokens != res.get_inp_tokens()) {
            inp_tokens.push_back(inp->tokens);
        }
    }

    batch_tokens = !inp_tokens.empty();

    // if there are none, use the only input that indexes the token embedding: some architectures substitute ids first
    if (inp_tokens.empty()) {
        std::set<ggml_tensor *> ids;
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            const ggml_tensor * t = ggml_graph_node(gf, i);
            if (t->op == GGML_OP_GET_ROWS && t->src[0] == tok_embd && (t->src[1]->flags & GGML_TENSOR_FLAG_INPUT)) {
                ids.insert(t->src[1]);
            }
        }
        if (ids.size() == 1) {
            inp_tokens.push_back(*ids.begin());
        }
    }

    for (ggml_tensor * t : inp_tokens) {
        n_tokens = t->ne[0];

        info cur;
        cur.kind   = PURITY_PURE;
        cur.axes   = 0xf;
        cur.stride = ggml_element_size(t);
        set(t, cur);
    }

    nodes.reserve(ggml_graph_n_nodes(gf));
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * t = ggml_graph_node(gf, i);
        nodes.push_back(t);

        info cur         = classify(t);
        bool is_affected = cur.kind == PURITY_PURE;
        for (int j = 0; j < GGML_MAX_SRC && !is_affected; ++j) {
            const ggml_tensor * src = t->src[j];
            if (src && src != t && src->op != GGML_OP_NONE) {
                const info & of = get(src);
                is_affected     = of.kind == PURITY_PURE || of.alias;
            }
        }
        cur.alias = is_affected && cur.kind == PURITY_IMPURE && is_layout_op(t);
        if (is_affected) {
            affected.push_back(t);
        }
        if (cur.kind != PURITY_IMPURE || cur.alias) {
            set(t, cur);
        }
    }
}

void llama_firstlayer_walk::set(const ggml_tensor * t, const info & cur) {
    infos[t] = cur;
    has_info.set(bit(t));
}

const llama_firstlayer_walk::info & llama_firstlayer_walk::get(const ggml_tensor * t) const {
    static const info impure;
    static const info constant{ PURITY_CONSTANT };

    if (has_info.test(bit(t))) {
        const auto it = infos.find(t);
        if (it != infos.end()) {
            return it->second;
        }
    }
    return t->op == GGML_OP_NONE && weights->count(t) ? constant : impure;
}

llama_firstlayer_walk::info llama_firstlayer_walk::classify(const ggml_tensor * t) const {
    info res;

    // a node that writes into another tensor has a side effect
    if (t->view_src && !is_layout_op(t)) {
        return res;
    }
    // most nodes have an impure operand that is no leaf, which takes no lookup
    for (const ggml_tensor * src : t->src) {
        if (src && src != t && src->op != GGML_OP_NONE && get(src).kind == PURITY_IMPURE) {
            return res;
        }
    }

    int  n_src    = 0;
    bool pure     = false;
    bool constant = true;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = t->src[i];
        if (src == nullptr || src == t) {  // ggml_cast refers to itself
            continue;
        }
        const info & cur = get(src);
        if (cur.kind == PURITY_IMPURE) {
            return res;
        }
        n_src++;
        pure        = pure || cur.kind == PURITY_PURE;
        constant    = constant && cur.kind == PURITY_CONSTANT;
        res.product = res.product || cur.product;
        res.depth   = std::max(res.depth, cur.depth + 1);
    }

    if (n_src == 0 || res.depth > MAX_DEPTH) {
        return info();
    }

    if (constant) {
        res.kind = PURITY_CONSTANT;
        return res;
    }

    res.product = res.product || llama_firstlayer_get_op(t).is(LLAMA_FIRSTLAYER_OP_PRODUCT);

    const bool ok = is_layout_op(t) ? classify_layout(t, res) : classify_row_wise(t, res);
    if (!ok) {
        return info();
    }

    res.kind = PURITY_PURE;

    if (!is_layout_op(t)) {
        // the result of a computation is contiguous: the values of a token lie together if none of their axes is above
        // the token axes
        int first = 0;
        while (first < GGML_MAX_DIMS && !(res.axes >> first & 1)) {
            first++;
        }
        bool together = first < GGML_MAX_DIMS;
        for (int d = first; d < GGML_MAX_DIMS; ++d) {
            together = together && ((res.axes >> d & 1) || t->ne[d] == 1);
        }
        if (together) {
            res.axes |= 0xf << first & 0xf;
            res.stride = t->nb[first];
        } else {
            res.stride = 0;
        }
    }

    int64_t n = 1;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        n *= res.axes >> d & 1 ? t->ne[d] : 1;
    }

    return n == n_tokens ? res : info();
}

llama_firstlayer_operand llama_firstlayer_walk::operand(const ggml_tensor * t) const {
    if (!t) {
        return {};
    }
    const info & cur = get(t);
    return { t, cur.kind == PURITY_PURE, cur.kind == PURITY_CONSTANT, cur.axes };
}

// the operations that compute a row of the result from the same row of their operands
bool llama_firstlayer_walk::classify_row_wise(const ggml_tensor * t, info & res) const {
    const auto rule = llama_firstlayer_get_op(t).axis_rule;
    if (!rule) {
        return false;
    }
    const llama_firstlayer_operand src[] = { operand(t->src[0]), operand(t->src[1]), operand(t->src[2]) };

    res.axes = src[0].axes;
    return rule(t, src, res.axes);
}

// Layout operations move no data. Where the values of a token lie together, the token axes of the result are those whose
// stride is at least the distance between tokens. Sizes cannot identify them, since any axis may have size 1.
bool llama_firstlayer_walk::classify_layout(const ggml_tensor * t, info & res) const {
    const ggml_tensor * a  = t->src[0];
    const info &        ia = get(a);

    if (ia.stride > 0) {
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            res.axes |= t->nb[d] >= ia.stride ? 1 << d : 0;
        }
        res.stride = ia.stride;
        return llama_firstlayer_is_packed(t, res.axes, ia.stride, t->view_offs, n_tokens);
    }

    // the operand's axis for each axis of the result, -1 for none
    int axis[GGML_MAX_DIMS] = { 1, 0, 2, 3 };
    switch (t->op) {
        case GGML_OP_TRANSPOSE:
            break;
        case GGML_OP_PERMUTE:
            for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                axis[t->op_params[d]] = d;
            }
            break;
        case GGML_OP_VIEW:
            {
                int64_t first[GGML_MAX_DIMS];
                if (!map_view(t, a, axis, first)) {
                    return false;
                }
                break;
            }
        default:
            return false;
    }

    int last = -1;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (axis[d] < 0 || !(ia.axes >> axis[d] & 1)) {
            continue;
        }
        res.axes |= 1 << d;
        if (a->ne[axis[d]] > 1) {
            if (axis[d] < last) {
                return false;  // the tokens are no longer in order
            }
            last = axis[d];
        }
    }

    return true;
}

bool llama_firstlayer_walk::map_view(const ggml_tensor * t,
                                     const ggml_tensor * base,
                                     int                 axis[GGML_MAX_DIMS],
                                     int64_t             first[GGML_MAX_DIMS]) {
    int order[GGML_MAX_DIMS] = { 3, 2, 1, 0 };
    std::stable_sort(order, order + GGML_MAX_DIMS, [&](int d, int e) { return base->nb[d] > base->nb[e]; });

    size_t offset = t->view_offs - base->view_offs;
    for (const int e : order) {
        first[e] = base->ne[e] > 1 ? offset / base->nb[e] : 0;
        offset -= first[e] * base->nb[e];
    }

    uint8_t used = 0;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        axis[d] = -1;
        for (int e = 0; e < GGML_MAX_DIMS && axis[d] < 0; ++e) {
            if (!(used >> e & 1) && t->nb[d] == base->nb[e] && first[e] + t->ne[d] <= base->ne[e]) {
                axis[d] = e;
                used |= 1 << e;
            }
        }
        if (axis[d] < 0 && t->ne[d] > 1) {
            return false;
        }
    }

    return offset == 0;
}

//
// sites
//

bool llama_firstlayer_walk::can_be_site(const ggml_tensor * t) const {
    const info & cur = get(t);
    // the values of a token must be the ones along axis 0
    return cur.kind == PURITY_PURE && cur.product && width(t) > 0 && t->type == GGML_TYPE_F32 &&
           t->nb[0] == sizeof(float) && !operand(t).spans(0);
}

std::vector<ggml_tensor *> llama_firstlayer_walk::possible_sites() const {
    std::vector<ggml_tensor *> res;
    std::copy_if(affected.begin(), affected.end(), std::back_inserter(res),
                 [&](const ggml_tensor * t) { return can_be_site(t) && (t->flags & GGML_TENSOR_FLAG_COMPUTE); });
    return res;
}

std::string llama_firstlayer_walk::hint(const std::string & recipe, int64_t width) {
    return recipe.substr(0, recipe.find_first_of("[(")) + std::to_string(width);
}

std::vector<ggml_tensor *> llama_firstlayer_walk::candidates(const std::unordered_set<std::string> & hints) const {
    std::vector<ggml_tensor *> res;

    for (ggml_tensor * t : affected) {
        if (can_be_site(t) && hints.count(hint(op_name(t), width(t)))) {
            res.push_back(t);
        }
    }

    return res;
}

int64_t llama_firstlayer_walk::width(const ggml_tensor * t) const {
    return ggml_nelements(t) / n_tokens;
}

ggml_tensor * llama_firstlayer_walk::as_rows(ggml_context * ctx, ggml_tensor * t) const {
    // ggml_permute takes the place of each axis: first those of the values, then those of the tokens
    const uint8_t axes = get(t).axes;

    int place[GGML_MAX_DIMS];
    int next = 0;
    for (const bool of_tokens : { false, true }) {
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            if ((axes >> d & 1) == of_tokens) {
                place[d] = next++;
            }
        }
    }
    ggml_tensor * res = ggml_permute(ctx, t, place[0], place[1], place[2], place[3]);
    return ggml_is_contiguous(res) ? ggml_reshape_2d(ctx, res, width(t), n_tokens) :
                                     ggml_cont_2d(ctx, res, width(t), n_tokens);
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::reach(std::vector<const ggml_tensor *> stack,
                                                               const tensor_set &               cut) {
    tensor_set res;
    while (!stack.empty()) {
        const ggml_tensor * t = stack.back();
        stack.pop_back();
        if (!res.insert(t).second || cut.count(t)) {
            continue;
        }
        for (const ggml_tensor * src : t->src) {
            if (src) {
                stack.push_back(src);
            }
        }
    }
    return res;
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::ancestors(const ggml_tensor * t) const {
    return reach({ t }, {});
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::live(const tensor_set & cut) const {
    std::vector<const ggml_tensor *> roots;
    for (const ggml_tensor * t : nodes) {
        if ((t->flags & GGML_TENSOR_FLAG_COMPUTE) &&
            (get(t).kind == PURITY_IMPURE || (t->flags & GGML_TENSOR_FLAG_OUTPUT))) {
            roots.push_back(t);
        }
    }
    return reach(std::move(roots), cut);
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::live_affected(const tensor_set & cut) const {
    std::vector<const ggml_tensor *> roots;
    std::vector<const ggml_tensor *> readers;
    for (const ggml_tensor * t : affected) {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        if (get(t).kind == PURITY_IMPURE) {
            readers.push_back(t);
            std::copy_if(std::begin(t->src), std::end(t->src), std::back_inserter(roots),
                         [&](const ggml_tensor * src) { return src && get(src).kind == PURITY_PURE; });
        } else if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
            roots.push_back(t);
        }
    }
    tensor_set res = reach(std::move(roots), cut);
    res.insert(readers.begin(), readers.end());
    return res;
}
