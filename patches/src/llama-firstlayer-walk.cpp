#include "llama-firstlayer-walk.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <set>

bool llama_firstlayer_walk::is_layout_op(const ggml_tensor * t) {
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

static bool is_product_op(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID;
}

// axes of size 1 hold no second element to mix up, whatever they are counted as
static bool spans(const ggml_tensor * t, uint8_t axes, int d) {
    return (axes >> d & 1) && t->ne[d] > 1;
}

//
// classification
//

llama_firstlayer_walk::llama_firstlayer_walk(const llm_graph_result & res,
                                             const tensor_set &       weights,
                                             const ggml_tensor *      tok_embd) :
    weights(&weights) {
    ggml_cgraph * gf = res.get_gf();

    infos.reserve(2 * ggml_graph_n_nodes(gf));

    if (res.get_inp_tokens()) {
        inp_tokens.push_back(res.get_inp_tokens());
    }
    for (const auto & input : res.inputs) {
        const auto * inp = dynamic_cast<const llm_graph_input_embd *>(input.get());
        if (inp && inp->tokens && inp->tokens != res.get_inp_tokens()) {
            inp_tokens.push_back(inp->tokens);
        }
    }

    // without them, the one input that indexes the token embedding is token ids: architectures may substitute some
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
        cur.kind   = KIND_PURE;
        cur.axes   = 0xf;
        cur.stride = ggml_element_size(t);
        infos[t]   = cur;
    }

    nodes.reserve(ggml_graph_n_nodes(gf));
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * t = ggml_graph_node(gf, i);
        nodes.push_back(t);

        info cur     = classify(t);
        bool is_near = cur.kind == KIND_PURE;
        for (int j = 0; j < GGML_MAX_SRC && !is_near; ++j) {
            const ggml_tensor * src = t->src[j];
            is_near = src && src != t && src->op != GGML_OP_NONE && (get(src).kind == KIND_PURE || get(src).alias);
        }
        cur.alias = is_near && cur.kind == KIND_IMPURE && is_layout_op(t);
        if (is_near) {
            near.push_back(t);
        }
        if (cur.kind != KIND_IMPURE || cur.alias) {
            infos[t] = cur;
        }
    }
}

const llama_firstlayer_walk::info & llama_firstlayer_walk::get(const ggml_tensor * t) const {
    static const info impure;
    static const info constant{ KIND_CONSTANT };

    const auto it = infos.find(t);
    if (it != infos.end()) {
        return it->second;
    }
    return t->op == GGML_OP_NONE && weights->count(t) ? constant : impure;
}

llama_firstlayer_walk::info llama_firstlayer_walk::classify(const ggml_tensor * t) const {
    info res;

    // a node that writes into another tensor has a side effect
    if (t->view_src && !is_layout_op(t)) {
        return res;
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
        if (cur.kind == KIND_IMPURE) {
            return res;
        }
        n_src++;
        pure        = pure || cur.kind == KIND_PURE;
        constant    = constant && cur.kind == KIND_CONSTANT;
        res.product = res.product || cur.product;
    }

    if (n_src == 0) {
        return res;
    }

    if (constant) {
        res.kind = KIND_CONSTANT;
        return res;
    }

    res.product = res.product || is_product_op(t);

    const bool ok = is_layout_op(t) ? classify_layout(t, res) : classify_pure(t, res);
    if (!ok) {
        return info();
    }

    res.kind = KIND_PURE;

    if (!is_layout_op(t)) {
        // the result of a computation is contiguous: the values of a token lie together if no axis of theirs is above
        // the tokens'
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

// the operations that compute a row of the result from the same row of their operands
bool llama_firstlayer_walk::classify_pure(const ggml_tensor * t, info & res) const {
    const ggml_tensor * a = t->src[0];
    const ggml_tensor * b = t->src[1];
    const ggml_tensor * c = t->src[2];

    const info & ia = get(a);

    res.axes = ia.axes;

    // the axes along which the tokens of x extend, one axis up: what looking x up in a constant results in
    const auto shifted = [&](const ggml_tensor * x) -> uint8_t {
        return get(x).axes << 1 & 0xf;
    };

    const auto same_axes = [&](const ggml_tensor * x, const ggml_tensor * y) {
        bool same = get(x).kind == KIND_PURE && get(y).kind == KIND_PURE;
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            same = same && spans(x, get(x).axes, d) == spans(y, get(y).axes, d);
        }
        return same;
    };

    switch (t->op) {
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_LOG:
        case GGML_OP_SIN:
        case GGML_OP_COS:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_LEAKY_RELU:
        case GGML_OP_UNARY:
        case GGML_OP_DUP:
            return true;

        case GGML_OP_CPY:
            return ggml_are_same_shape(a, t);

        case GGML_OP_CONT:
            {
                if (ggml_are_same_shape(a, t)) {
                    return true;
                }
                // a reshape as well: the values of a token stay together unless an axis of theirs is above the tokens'
                size_t width = 1;
                bool   above = false;
                for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                    above = above || spans(a, ia.axes, d);
                    if (!(ia.axes >> d & 1)) {
                        if (above && a->ne[d] > 1) {
                            return false;
                        }
                        width *= a->ne[d];
                    }
                }
                res.axes = 0;
                for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                    res.axes |= t->nb[d] >= width * t->nb[0] ? 1 << d : 0;
                }
                return is_packed(t, res.axes, width * t->nb[0], 0);
            }

        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_SUM_ROWS:
        case GGML_OP_MEAN:
        case GGML_OP_CUMSUM:
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K:
            res.axes &= 0xe;
            return !spans(a, ia.axes, 0);

        case GGML_OP_SOFT_MAX:
            res.axes &= 0xe;
            return !spans(a, ia.axes, 0) && b == nullptr && c == nullptr;

        case GGML_OP_GLU:
            res.axes &= 0xe;
            return !spans(a, ia.axes, 0) && (b == nullptr || same_axes(a, b));

        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            {
                if (ia.kind != KIND_PURE) {
                    // a constant that spans the tokens would have to be as long as the batch
                    return false;
                }
                const info & ib = get(b);
                for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                    const bool ta = ia.axes >> d & 1;
                    const bool tb = ib.kind == KIND_PURE && (ib.axes >> d & 1);
                    if (ib.kind == KIND_CONSTANT ? ta && b->ne[d] != 1 :
                        ta                       ? b->ne[d] != a->ne[d] || (!tb && b->ne[d] > 1) :
                                                   tb && b->ne[d] != 1) {
                        return false;
                    }
                }
                return true;
            }

        case GGML_OP_MUL_MAT:
            {
                // a matrix for each token, or the same ones for all: a stack of them must not be spread over the tokens
                const bool    own    = ia.kind == KIND_PURE;
                const uint8_t tokens = get(b).axes;
                for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                    const bool wrong = d < 2 ? own || d == 0 : own ? b->ne[d] != a->ne[d] : a->ne[d] > 1;
                    if (spans(b, tokens, d) && wrong) {
                        return false;
                    }
                }
                res.axes = tokens & 0xe;
                return get(b).kind == KIND_PURE && (!own || same_axes(a, b));
            }

        case GGML_OP_MUL_MAT_ID:  // [m, n_used, n_tokens] = as [k, m, n_expert], b [k, 1 or n_used, n_tokens], ids [n_used, n_tokens]
            res.axes = get(b).axes & 0xc;
            return ia.kind == KIND_CONSTANT && get(b).kind == KIND_PURE && get(c).kind == KIND_PURE &&
                   !spans(b, get(b).axes, 0) && !spans(b, get(b).axes, 1) && !spans(c, get(c).axes, 0);

        case GGML_OP_ADD_ID:  // a [m, n_used, n_tokens], b [m, n_expert], ids [n_used, n_tokens]
            res.axes &= 0xc;
            return ia.kind == KIND_PURE && get(b).kind == KIND_CONSTANT && get(c).kind == KIND_PURE &&
                   !spans(a, ia.axes, 0) && !spans(a, ia.axes, 1) && !spans(c, get(c).axes, 0);

        case GGML_OP_GET_ROWS:
            if (get(b).kind != KIND_PURE) {
                return false;
            }
            res.axes = shifted(b);
            if (ia.kind == KIND_CONSTANT) {
                return a->ne[2] == 1 && a->ne[3] == 1;
            }
            // a [m, n, n_tokens], b [n_used, n_tokens]: every token picks from its own rows
            return !spans(a, ia.axes, 0) && !spans(a, ia.axes, 1) && !spans(b, get(b).axes, 0);

        case GGML_OP_CONCAT:
            {
                const int dim = t->op_params[0];
                res.axes      = ia.axes & get(b).axes & ~(1 << dim);
                return same_axes(a, b) && !spans(a, ia.axes, dim) && !spans(b, get(b).axes, dim);
            }

        case GGML_OP_DSV4_HC_PRE:  // a [m, n, n_tokens], b [n, n_tokens] or of a's shape
            res.axes = (ia.axes & 0xc) >> 1;
            return ia.kind == KIND_PURE && get(b).kind == KIND_PURE && !spans(a, ia.axes, 0) && !spans(a, ia.axes, 1) &&
                   !spans(b, get(b).axes, 0) && spans(a, ia.axes, 2) == spans(b, get(b).axes, t->op_params[1] ? 2 : 1);

        case GGML_OP_DSV4_HC_COMB:  // [n, n, n_tokens] = a [m, n_tokens]
            res.axes = shifted(a) & 0xc;
            return ia.kind == KIND_PURE && get(b).kind == KIND_CONSTANT && get(c).kind == KIND_CONSTANT &&
                   !spans(a, ia.axes, 0);

        case GGML_OP_REPEAT:
        case GGML_OP_PAD:
            for (int d = 0; d < GGML_MAX_DIMS; ++d) {
                if (t->ne[d] != a->ne[d]) {
                    if (spans(a, ia.axes, d)) {
                        return false;
                    }
                    res.axes &= ~(1 << d);
                }
            }
            return true;

        default:
            return false;
    }
}

// Layout operations move no data. Where the values of a token lie together, the token axes of the result are those whose
// stride is no smaller than the distance between tokens: sizes would not tell, since any axis may have size 1.
bool llama_firstlayer_walk::classify_layout(const ggml_tensor * t, info & res) const {
    const ggml_tensor * a  = t->src[0];
    const info &        ia = get(a);

    if (ia.stride > 0) {
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            res.axes |= t->nb[d] >= ia.stride ? 1 << d : 0;
        }
        res.stride = ia.stride;
        return is_packed(t, res.axes, ia.stride, t->view_offs);
    }

    // axis of the operand that each axis of the result is, -1 for none
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

// whether a view holds all tokens in their order, and nothing that crosses from one token to the next
bool llama_firstlayer_walk::is_packed(const ggml_tensor * t, uint8_t axes, size_t stride, size_t offset) const {
    size_t next = stride;
    size_t last = offset + ggml_type_size(t->type);

    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (t->ne[d] == 1) {
            continue;
        }
        if (axes >> d & 1) {
            if (t->nb[d] != next) {
                return false;
            }
            next *= t->ne[d];
        } else {
            last += (t->ne[d] - 1) * t->nb[d];
        }
    }

    return last <= stride && next == stride * n_tokens;
}

//
// sites
//

bool llama_firstlayer_walk::can_be_site(const ggml_tensor * t) const {
    const info & cur = get(t);
    // the values of a token must be the ones along axis 0
    return cur.kind == KIND_PURE && cur.product && t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) &&
           !spans(t, cur.axes, 0);
}

std::string llama_firstlayer_walk::hint(const std::string & recipe, int64_t width) {
    return recipe.substr(0, recipe.find_first_of("[(")) + std::to_string(width);
}

std::vector<ggml_tensor *> llama_firstlayer_walk::candidates(const std::unordered_set<std::string> & hints) const {
    std::vector<ggml_tensor *> res;

    for (ggml_tensor * t : near) {
        if (can_be_site(t) && hints.count(hint(op_name(t), width(t)))) {
            res.push_back(t);
        }
    }

    return res;
}

int64_t llama_firstlayer_walk::width(const ggml_tensor * t) const {
    return ggml_nelements(t) / n_tokens;
}

void llama_firstlayer_walk::locate(const ggml_tensor * t,
                                   const int64_t       i[GGML_MAX_DIMS],
                                   int64_t &           token,
                                   int64_t &           column) const {
    const uint8_t axes = get(t).axes;

    int64_t n[2] = { 1, 1 };
    token        = 0;
    column       = 0;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        const bool is_token = axes >> d & 1;
        (is_token ? token : column) += i[d] * n[is_token];
        n[is_token] *= t->ne[d];
    }
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
            (get(t).kind == KIND_IMPURE || (t->flags & GGML_TENSOR_FLAG_OUTPUT))) {
            roots.push_back(t);
        }
    }
    return reach(std::move(roots), cut);
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::live_near(const tensor_set & cut) const {
    std::vector<const ggml_tensor *> roots;
    std::vector<const ggml_tensor *> readers;
    for (const ggml_tensor * t : near) {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        if (get(t).kind == KIND_IMPURE) {
            readers.push_back(t);
            std::copy_if(std::begin(t->src), std::end(t->src), std::back_inserter(roots),
                         [&](const ggml_tensor * src) { return src && get(src).kind == KIND_PURE; });
        } else if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
            roots.push_back(t);
        }
    }
    tensor_set res = reach(std::move(roots), cut);
    res.insert(readers.begin(), readers.end());
    return res;
}

llama_firstlayer_walk::use llama_firstlayer_walk::make_use(const ggml_tensor * t, int i_src) const {
    const ggml_tensor * src = t->src[i_src];

    use res = { t, src, 1, 1, 0 };
    if (t->op == GGML_OP_GET_ROWS && i_src == 0) {
        res.n_slices = ggml_nrows(src);
        res.n_used   = std::max<int64_t>(1, ggml_nelements(t->src[1]) / n_tokens);
    }
    if (t->op == GGML_OP_MUL_MAT_ID && i_src == 0) {
        res.n_slices = src->ne[2];
        res.n_used   = t->src[2]->ne[0];
    }
    if ((t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID) && i_src == 0) {
        res.multiply_adds = src->ne[0] * ggml_nelements(t);
    }
    return res;
}

std::vector<llama_firstlayer_walk::use> llama_firstlayer_walk::uses() const {
    std::vector<use> res;
    for (const ggml_tensor * t : nodes) {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE) || get(t).kind == KIND_CONSTANT) {
            continue;
        }
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (t->src[i] && get(t->src[i]).kind == KIND_CONSTANT) {
                res.push_back(make_use(t, i));
            }
        }
    }
    return res;
}

std::string llama_firstlayer_walk::blocker() const {
    for (const ggml_tensor * t : nodes) {
        if (get(t).kind != KIND_IMPURE || !(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }

        bool                             reads_tokens = false;
        std::vector<const ggml_tensor *> stack;
        for (const ggml_tensor * src : t->src) {
            if (src == nullptr) {
                continue;
            }
            if (get(src).kind == KIND_PURE) {
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
            if (src->op == GGML_OP_NONE && get(src).kind == KIND_IMPURE) {
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
