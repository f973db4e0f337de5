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

llama_firstlayer_walk::llama_firstlayer_walk(const llm_graph_result & res, const tensor_set & weights) {
    for (const auto & input : res.inputs) {
        const auto * inp = dynamic_cast<const llm_graph_input_embd *>(input.get());
        if (inp && inp->tokens) {
            inp_tokens.push_back(inp->tokens);
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

    for (const ggml_tensor * t : weights) {
        infos[t].kind = KIND_CONSTANT;
    }

    ggml_cgraph * gf = res.get_gf();

    nodes.reserve(ggml_graph_n_nodes(gf));
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        nodes.push_back(ggml_graph_node(gf, i));
        infos[nodes.back()] = classify(nodes.back());
    }
}

const llama_firstlayer_walk::info & llama_firstlayer_walk::get(const ggml_tensor * t) const {
    static const info impure;

    const auto it = infos.find(t);
    return it == infos.end() ? impure : it->second;
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
                if (ia.kind != KIND_CONSTANT || spans(b, get(b).axes, 0)) {
                    return false;
                }
                // a stack of matrices must not be spread over the tokens
                for (int d = 2; d < GGML_MAX_DIMS; ++d) {
                    if (a->ne[d] > 1 && spans(b, get(b).axes, d)) {
                        return false;
                    }
                }
                res.axes = get(b).axes & 0xe;
                return true;
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

    if (t->op != GGML_OP_PERMUTE && t->op != GGML_OP_TRANSPOSE) {
        return false;
    }

    // result axis of each source axis
    int axis[GGML_MAX_DIMS] = { 1, 0, 2, 3 };
    if (t->op == GGML_OP_PERMUTE) {
        std::copy_n(t->op_params, GGML_MAX_DIMS, axis);
    }

    int last = -1;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        res.axes |= (ia.axes >> d & 1) << axis[d];
        if (spans(a, ia.axes, d)) {
            if (axis[d] < last) {
                return false;  // the tokens are no longer in order
            }
            last = axis[d];
        }
    }

    return true;
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

ggml_tensor * llama_firstlayer_walk::site_of(ggml_tensor * t) const {
    // what follows the last F32 computation is cheap, and is done again from the table
    while (get(t).kind == KIND_PURE && (is_layout_op(t) || t->op == GGML_OP_CONT || t->op == GGML_OP_CPY ||
                                        t->op == GGML_OP_DUP || t->type != GGML_TYPE_F32)) {
        if (t->src[0] == nullptr) {
            return nullptr;
        }
        t = t->src[0];
    }

    // the values of a token must be the ones along axis 0
    const info & cur = get(t);
    return cur.kind == KIND_PURE && cur.product && !spans(t, cur.axes, 0) ? t : nullptr;
}

std::vector<ggml_tensor *> llama_firstlayer_walk::sites() const {
    std::unordered_set<ggml_tensor *> found;

    for (ggml_tensor * t : nodes) {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        if (get(t).kind == KIND_PURE) {
            if (t->flags & GGML_TENSOR_FLAG_OUTPUT) {
                found.insert(site_of(t));
            }
            continue;
        }
        for (ggml_tensor * src : t->src) {
            if (src && get(src).kind == KIND_PURE) {
                found.insert(site_of(src));
            }
        }
    }

    std::vector<ggml_tensor *> res;
    for (ggml_tensor * t : nodes) {
        if (found.count(t)) {
            res.push_back(t);
        }
    }

    return res;
}

std::vector<ggml_tensor *> llama_firstlayer_walk::candidates(const std::unordered_set<int64_t> & widths) const {
    std::vector<ggml_tensor *> res;

    for (ggml_tensor * t : nodes) {
        const info & cur = get(t);
        if (cur.kind == KIND_PURE && cur.product && !is_layout_op(t) && t->type == GGML_TYPE_F32 &&
            widths.count(width(t))) {
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
            if (src->op == GGML_OP_NONE) {
                mixed.insert(src->name[0] ? src->name : "an unnamed input");
            }
        }

        std::string names;
        for (const auto & name : mixed) {
            names += (names.empty() ? "" : ", ") + name;
        }
        return format("%s '%s' combines the embedding with %s before any matrix product", ggml_op_desc(t), t->name,
                      names.empty() ? "other rows" : names.c_str());
    }

    return "no node of its graph depends on the token ids";
}
