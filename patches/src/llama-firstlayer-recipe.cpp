#include "llama-firstlayer-walk.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <iterator>
#include <locale>
#include <sstream>

//
// recipes
//

// shortest decimal that reads back as the same float, in any locale
static const std::string & print_float(int32_t bits) {
    // all graphs share the same few values
    static thread_local std::unordered_map<int32_t, std::string> known;

    std::string & res = known[bits];
    if (!res.empty()) {
        return res;
    }

    float value;
    memcpy(&value, &bits, sizeof(value));
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

static std::string print_list(const std::vector<std::string> & list) {
    std::string res;
    for (const auto & item : list) {
        res += (res.empty() ? "" : ",") + item;
    }
    return res;
}

// an address in a tensor's memory as it would be with one token
size_t llama_firstlayer_walk::of_one_token(const ggml_tensor * t, size_t address) const {
    for (int d = GGML_MAX_DIMS - 1; d >= 0; --d) {
        if (get(t).axes >> d & 1) {
            llama_firstlayer_shrink(address, t->nb[d], t->ne[d], 1);
        }
    }
    return address;
}

// the shape, with the token axes written as one '*'; for views, also strides and offset, which must not depend on the batch
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
        const size_t stride = t->op == GGML_OP_VIEW ? of_one_token(t->src[0], t->nb[d]) : t->nb[d];
        nb.push_back(std::to_string(stride));
        packed = packed && (t->ne[d] == 1 || stride == next);
        next   = d == 0 ? ggml_row_size(t->type, t->ne[0]) : next * t->ne[d];
    }
    while (ne.size() > 1 && ne.back() == "1") {
        ne.pop_back();
    }

    std::string res = print_list(ne);
    if (t->op == GGML_OP_VIEW) {
        const size_t offset = t->view_offs - (t->src[0]->view_src ? t->src[0]->view_offs : 0);
        res += packed ? "" : ";nb=" + print_list(nb);
        res += offset == 0 ? "" : ";offset=" + std::to_string(of_one_token(t->src[0], offset));
    }
    return res;
}

std::string llama_firstlayer_walk::op_name(const ggml_tensor * t) {
    std::string res = llama_firstlayer_get_op(t).is(LLAMA_FIRSTLAYER_OP_PRINTS_TYPE) ? "cast" : ggml_op_desc(t);
    std::transform(res.begin(), res.end(), res.begin(), [](unsigned char c) { return std::tolower(c); });
    return res;
}

void llama_firstlayer_walk::print(const ggml_tensor *                            t,
                                  std::unordered_map<const ggml_tensor *, int> & labels,
                                  int &                                          n_labels,
                                  std::string &                                  out) const {
    if (t->op == GGML_OP_NONE) {
        out += get(t).kind == PURITY_PURE ? "tokens" : t->name;
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

    const auto &             op = llama_firstlayer_get_op(t);
    std::vector<std::string> params;
    if (op.is(LLAMA_FIRSTLAYER_OP_PRINTS_SHAPE)) {
        params.push_back(shape(t));
    } else if (op.is(LLAMA_FIRSTLAYER_OP_PRINTS_TYPE)) {
        params.push_back(ggml_type_name(t->type));
    } else {
        for (size_t i = 0; i < GGML_MAX_OP_PARAMS / sizeof(int32_t); ++i) {
            const char * name = i < std::size(op.params) ? op.params[i] : nullptr;
            if (t->op_params[i] == 0 || (name && !*name)) {
                continue;
            }
            const std::string key   = name ? name : "p" + std::to_string(i);
            const size_t      colon = key.find(':');
            params.push_back(
                key.substr(0, colon) + "=" +
                (colon == std::string::npos ? std::to_string(t->op_params[i]) : print_float(t->op_params[i])));
        }
    }

    out += op_name(t);
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
