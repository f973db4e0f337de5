#include "llama-firstlayer-walk.h"

#include "llama-graph.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>
#include <locale>
#include <set>
#include <sstream>

static bool is_layout_op(const ggml_tensor * t) {
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

//
// recipes
//

// shortest decimal that reads back as the same float, in any locale
static std::string print_float(float value) {
    std::string res;
    for (int precision = 6; precision <= 9; ++precision) {
        std::ostringstream out;
        out.imbue(std::locale::classic());
        out.precision(precision);
        out << value;
        res = out.str();

        std::istringstream in(res);
        in.imbue(std::locale::classic());
        float back = 0.0f;
        if (in >> back && back == value) {
            break;
        }
    }
    return res;
}

// names of the parameters of an operation, in the order of their words; a trailing ':f' marks a float
static std::vector<const char *> param_names(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
            return { "eps:f" };
        case GGML_OP_SCALE:
            return { "scale:f", "bias:f" };
        case GGML_OP_CLAMP:
            return { "min:f", "max:f" };
        case GGML_OP_SOFT_MAX:
            return { "scale:f", "max_bias:f" };
        case GGML_OP_LEAKY_RELU:
            return { "slope:f" };
        case GGML_OP_ARGSORT:
            return { "order" };
        case GGML_OP_CONCAT:
            return { "dim" };
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            // the precision of the activations is a policy that comes with the weight, not part of the expression
            return { "prec", "hint", nullptr, nullptr };
        case GGML_OP_UNARY:
            return { nullptr, "p1:f", "p2:f", "p3:f", "p4:f" };  // xielu has four
        case GGML_OP_GLU:
            return { nullptr, "swapped", "alpha:f", "limit:f" };
        default:
            return {};
    }
}

static std::string print_list(const std::vector<std::string> & list) {
    std::string res;
    for (const auto & item : list) {
        res += (res.empty() ? "" : ",") + item;
    }
    return res;
}

// the shape without its token axes, which are written as one '*'; strides and offset of views
std::string llama_firstlayer_walk::shape(const ggml_tensor * t) const {
    const info & cur = get(t);

    std::vector<std::string> ne;
    std::vector<std::string> nb;

    bool   packed = true;
    size_t next   = ggml_type_size(t->type);
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (cur.axes >> d & 1) {
            if (ne.empty() || ne.back() != "*") {
                ne.push_back("*");
            }
            continue;
        }
        ne.push_back(std::to_string(t->ne[d]));
        nb.push_back(std::to_string(t->nb[d]));
        packed = packed && (t->ne[d] == 1 || t->nb[d] == next);
        next   = d == 0 ? ggml_row_size(t->type, t->ne[0]) : next * t->ne[d];
    }
    while (ne.size() > 1 && ne.back() == "1") {
        ne.pop_back();
    }

    std::string res = print_list(ne);
    if (t->op == GGML_OP_VIEW) {
        const size_t offset = t->view_offs - (t->src[0]->view_src ? t->src[0]->view_offs : 0);
        res += packed ? "" : ";nb=" + print_list(nb);
        res += offset == 0 ? "" : ";offset=" + std::to_string(offset);
    }
    return res;
}

void llama_firstlayer_walk::print(const ggml_tensor *                            t,
                                  std::unordered_map<const ggml_tensor *, int> & labels,
                                  int &                                          n_labels,
                                  std::string &                                  out) const {
    if (t->op == GGML_OP_NONE) {
        out += get(t).kind == KIND_PURE ? "tokens" : t->name;
        return;
    }

    const auto label = labels.find(t);
    if (label != labels.end()) {
        if (label->second > 0) {
            out += "$" + std::to_string(label->second);
            return;
        }
        label->second = ++n_labels;
        out += "$" + std::to_string(n_labels) + ":=";
    }

    std::string name = t->op == GGML_OP_CPY ? "cast" : ggml_op_desc(t);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });

    std::vector<std::string> params;
    switch (t->op) {
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_CONT:
        case GGML_OP_REPEAT:
        case GGML_OP_TOP_K:
            params.push_back(shape(t));
            break;
        case GGML_OP_CPY:
            params.push_back(ggml_type_name(t->type));
            break;
        default:
            {
                const auto names = param_names(t);
                for (size_t i = 0; i < GGML_MAX_OP_PARAMS / sizeof(int32_t); ++i) {
                    const std::string key = i < names.size() ? (names[i] ? names[i] : "") : "p" + std::to_string(i);
                    if (key.empty() || t->op_params[i] == 0) {
                        continue;
                    }
                    const size_t colon = key.find(':');
                    if (colon == std::string::npos) {
                        params.push_back(key + "=" + std::to_string(t->op_params[i]));
                    } else {
                        float value;
                        memcpy(&value, &t->op_params[i], sizeof(value));
                        params.push_back(key.substr(0, colon) + "=" + print_float(value));
                    }
                }
            }
    }

    out += name;
    if (!params.empty()) {
        out += "[" + print_list(params) + "]";
    }
    out += "(";
    bool first = true;
    for (const ggml_tensor * src : t->src) {
        if (src == nullptr || src == t) {
            continue;
        }
        out += first ? "" : ", ";
        first = false;
        print(src, labels, n_labels, out);
    }
    out += ")";
}

std::string llama_firstlayer_walk::recipe(const ggml_tensor * t) const {
    // without labels the text of a deep graph would grow exponentially
    std::unordered_map<const ggml_tensor *, int> n_uses;
    std::vector<const ggml_tensor *>             stack = { t };
    while (!stack.empty()) {
        const ggml_tensor * cur = stack.back();
        stack.pop_back();
        if (cur->op == GGML_OP_NONE || n_uses[cur]++ > 0) {
            continue;
        }
        for (const ggml_tensor * src : cur->src) {
            if (src && src != cur) {
                stack.push_back(src);
            }
        }
    }

    std::unordered_map<const ggml_tensor *, int> labels;
    for (const auto & [cur, n] : n_uses) {
        if (n > 1) {
            labels[cur] = 0;
        }
    }

    std::string res;
    int         n_labels = 0;
    print(t, labels, n_labels, res);
    return res;
}

//
// rewrite
//

// operations that read rows with gaps between them, on every backend
static bool takes_strided_rows(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_CPY:
        case GGML_OP_SET_ROWS:
            return true;
        case GGML_OP_ROPE:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_CONT:
        case GGML_OP_CONCAT:
            return !t->view_src;  // one that works in place would need new strides itself
        default:
            return false;
    }
}

void llama_firstlayer_walk::row_strides(const ggml_tensor * t, size_t stride, size_t nb[GGML_MAX_DIMS]) const {
    const uint8_t axes = get(t).axes;

    size_t next = ggml_type_size(t->type);
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        size_t & cur = axes >> d & 1 ? stride : next;
        nb[d]        = cur;
        cur *= t->ne[d];
    }
}

bool llama_firstlayer_walk::translate_layout(const ggml_tensor * t,
                                             const ggml_tensor * site,
                                             const size_t        site_nb[GGML_MAX_DIMS],
                                             size_t              stride,
                                             size_t              nb[GGML_MAX_DIMS],
                                             size_t &            offset) const {
    const size_t stride_old = get(site).stride;

    if (stride_old > 0) {
        // tokens move apart, the values of a token stay as they are
        size_t last = t->view_offs % stride_old + ggml_type_size(t->type);
        for (int d = 0; d < GGML_MAX_DIMS; ++d) {
            if (t->nb[d] < stride_old) {
                nb[d] = t->nb[d];
                last += (t->ne[d] - 1) * t->nb[d];
            } else if (t->nb[d] % stride_old == 0) {
                nb[d] = t->nb[d] / stride_old * stride;
            } else if (t->ne[d] == 1) {
                nb[d] = stride;
            } else {
                return false;
            }
        }
        offset = t->view_offs / stride_old * stride + t->view_offs % stride_old;
        return last <= stride_old;
    }

    // a permutation of the site's axes
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        nb[d] = stride;
        if (t->ne[d] == 1) {
            continue;
        }
        int e = 0;
        while (e < GGML_MAX_DIMS && !(site->ne[e] == t->ne[d] && site->nb[e] == t->nb[d])) {
            e++;
        }
        if (e == GGML_MAX_DIMS) {
            return false;
        }
        nb[d] = site_nb[e];
    }
    offset = t->view_offs;
    return offset == 0;
}

void llama_firstlayer_walk::replace(ggml_context *                                  ctx,
                                    ggml_cgraph *                                   gf,
                                    const std::unordered_map<ggml_tensor *, slot> & slots) const {
    tensor_set cut;
    for (const auto & [site, _] : slots) {
        cut.insert(site);
    }
    const tensor_set is_live = live(cut);

    struct layout {
        ggml_tensor * t;
        size_t        nb[GGML_MAX_DIMS];
        size_t        offset;
    };

    for (const auto & [site, slot] : slots) {
        if (!is_live.count(site)) {
            continue;
        }

        const size_t stride = slot.rows->nb[1];

        size_t nb[GGML_MAX_DIMS];
        row_strides(site, stride, nb);

        // the consumers see the rows where they are, if all of them can
        std::vector<layout> layouts;
        bool                output  = site->flags & GGML_TENSOR_FLAG_OUTPUT;
        const bool          gaps    = stride != get(site).stride;
        bool                strided = stride % 16 == 0 && slot.offset % 16 == 0;  // as kernels that read float4 want it
        for (ggml_tensor * t : nodes) {
            if (!is_live.count(t)) {
                continue;
            }
            if (is_layout_op(t) && t->view_src == site) {
                layouts.push_back({ t, {}, 0 });
                output  = output || (t->flags & GGML_TENSOR_FLAG_OUTPUT);
                strided = strided && translate_layout(t, site, nb, stride, layouts.back().nb, layouts.back().offset);
                continue;
            }
            for (const ggml_tensor * src : t->src) {
                if (src && (src == site || src->view_src == site)) {
                    strided = strided && takes_strided_rows(t);
                }
            }
        }

        std::fill(std::begin(site->src), std::end(site->src), nullptr);
        memset(site->op_params, 0, sizeof(site->op_params));

        if (output || (gaps && !strided)) {
            site->op     = GGML_OP_CONT;
            site->src[0] = ggml_view_4d(ctx, slot.rows, site->ne[0], site->ne[1], site->ne[2], site->ne[3], nb[1],
                                        nb[2], nb[3], slot.offset);
            continue;
        }

        const auto to_view = [&](ggml_tensor * t, const size_t * t_nb, size_t offset) {
            t->view_src  = slot.rows;
            t->view_offs = slot.offset + offset;
            std::copy_n(t_nb, GGML_MAX_DIMS, t->nb);
            if (t->op != GGML_OP_PERMUTE && t->op != GGML_OP_TRANSPOSE) {
                t->op = GGML_OP_VIEW;
                memcpy(t->op_params, &t->view_offs, sizeof(t->view_offs));
            }
        };

        for (const auto & cur : layouts) {
            if (gaps) {
                to_view(cur.t, cur.nb, cur.offset);
            } else {
                to_view(cur.t, cur.t->nb, cur.t->view_offs);
            }
        }
        site->src[0] = slot.rows;
        to_view(site, gaps ? nb : site->nb, 0);
    }

    ggml_graph_clear(gf);

    // inputs are set for every batch, so they must be allocated, even those that nothing reads
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->op == GGML_OP_NONE && (t->flags & GGML_TENSOR_FLAG_INPUT)) {
            ggml_build_forward_order(gf, t);
        }
    }

    // the impure nodes keep their order; the others come in where they are needed
    for (ggml_tensor * t : nodes) {
        if (get(t).kind != KIND_IMPURE && !(t->flags & GGML_TENSOR_FLAG_OUTPUT)) {
            continue;
        }
        if (t->flags & GGML_TENSOR_FLAG_COMPUTE) {
            ggml_build_forward_expand(gf, t);
        } else {
            ggml_build_forward_order(gf, t);
        }
    }
}
