#include "llama-firstlayer-ops.h"

// After an upgrade of ggml, look at its new operations. One without a row below is taken as not row-wise: that is always
// safe, but may leave something to compute that tables could hold.
static_assert(GGML_OP_COUNT == 101, "ggml's operations have changed: add rows for the new ones below where needed");

using operand = llama_firstlayer_operand;

bool llama_firstlayer_is_packed(const ggml_tensor * t, uint8_t axes, size_t stride, size_t offset, int64_t n_tokens) {
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

bool llama_firstlayer_shrink(size_t & address, size_t stride, int64_t n, int64_t m) {
    if (address / stride % n != 0) {
        return false;
    }
    address = address % stride + address / (stride * n) * (stride * m);
    return true;
}

void llama_firstlayer_restart(ggml_context * ctx, ggml_cgraph * gf) {
    ggml_graph_clear(gf);
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->op == GGML_OP_NONE && (t->flags & GGML_TENSOR_FLAG_INPUT)) {
            ggml_build_forward_order(gf, t);
        }
    }
}

void llama_firstlayer_add_node(ggml_cgraph * gf, ggml_tensor * t) {
    if (t->flags & GGML_TENSOR_FLAG_COMPUTE) {
        ggml_build_forward_expand(gf, t);
    } else {
        ggml_build_forward_order(gf, t);
    }
}

//
// rules for the axes of the tokens
//

// the axes along which the tokens of x extend, one axis up: those of the result when x is looked up in a constant
static uint8_t shifted(const operand & x) {
    return x.axes << 1 & 0xf;
}

static bool same_axes(const operand & x, const operand & y) {
    bool same = x.pure && y.pure;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        same = same && x.spans(d) == y.spans(d);
    }
    return same;
}

// each value of the result is computed from the operand's value at the same place
static bool axes_by_value(const ggml_tensor *, const operand *, uint8_t &) {
    return true;
}

static bool axes_of_cast(const ggml_tensor * t, const operand * src, uint8_t &) {
    return ggml_are_same_shape(src[0].t, t);
}

// may also reshape: the values of a token stay together unless one of their axes is above a token axis
static bool axes_of_cont(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    if (ggml_are_same_shape(a.t, t)) {
        return true;
    }
    int64_t width = 1;
    bool    above = false;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        above = above || a.spans(d);
        if (!(a.axes >> d & 1)) {
            if (above && a.t->ne[d] > 1) {
                return false;
            }
            width *= a.t->ne[d];
        }
    }
    const size_t stride = width * t->nb[0];
    axes                = 0;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        axes |= t->nb[d] >= stride ? 1 << d : 0;
    }
    return llama_firstlayer_is_packed(t, axes, stride, 0, ggml_nelements(a.t) / width);
}

// mixes the values along axis 0
static bool axes_by_row(const ggml_tensor *, const operand * src, uint8_t & axes) {
    axes &= 0xe;
    return !src[0].spans(0);
}

static bool axes_of_soft_max(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    return axes_by_row(t, src, axes) && !src[1].t && !src[2].t;  // without a mask or sinks
}

static bool axes_of_glu(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    return axes_by_row(t, src, axes) && (!src[1].t || same_axes(src[0], src[1]));
}

// the second operand is broadcast
static bool axes_of_broadcast(const ggml_tensor *, const operand * src, uint8_t &) {
    const operand & a = src[0];
    const operand & b = src[1];
    if (!a.pure) {
        // a constant that spans the tokens would have to be as long as the batch
        return false;
    }
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        const bool ta = a.axes >> d & 1;
        const bool tb = b.pure && (b.axes >> d & 1);
        if (b.constant ? ta && b.t->ne[d] != 1 :
            ta         ? b.t->ne[d] != a.t->ne[d] || (!tb && b.t->ne[d] > 1) :
                         tb && b.t->ne[d] != 1) {
            return false;
        }
    }
    return true;
}

// one matrix per token, or the same matrices for all tokens: a stack of them must not be spread over the tokens
static bool axes_of_mul_mat(const ggml_tensor *, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    const operand & b = src[1];
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        const bool wrong = d < 2 ? a.pure || d == 0 : a.pure ? b.t->ne[d] != a.t->ne[d] : a.t->ne[d] > 1;
        if (b.spans(d) && wrong) {
            return false;
        }
    }
    axes = b.axes & 0xe;
    return b.pure && (!a.pure || same_axes(a, b));
}

// [m, n_used, n_tokens] = as [k, m, n_expert], b [k, 1 or n_used, n_tokens], ids [n_used, n_tokens]
static bool axes_of_mul_mat_id(const ggml_tensor *, const operand * src, uint8_t & axes) {
    const operand & b = src[1];
    axes              = b.axes & 0xc;
    return src[0].constant && b.pure && src[2].pure && !b.spans(0) && !b.spans(1) && !src[2].spans(0);
}

// a [m, n_used, n_tokens], b [m, n_expert], ids [n_used, n_tokens]
static bool axes_of_add_id(const ggml_tensor *, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    axes &= 0xc;
    return a.pure && src[1].constant && src[2].pure && !a.spans(0) && !a.spans(1) && !src[2].spans(0);
}

// from a constant; or from a [m, n, n_tokens] with b [n_used, n_tokens], where every token picks from its own rows
static bool axes_of_get_rows(const ggml_tensor *, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    const operand & b = src[1];
    axes              = shifted(b);
    return b.pure && (a.constant ? a.t->ne[2] == 1 && a.t->ne[3] == 1 : !a.spans(0) && !a.spans(1) && !b.spans(0));
}

static bool axes_of_concat(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    const int dim = t->op_params[0];
    axes          = src[0].axes & src[1].axes & ~(1 << dim);
    return same_axes(src[0], src[1]) && !src[0].spans(dim) && !src[1].spans(dim);
}

// a [m, n, n_tokens], b [n, n_tokens] or of a's shape
static bool axes_of_hc_pre(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    const operand & b = src[1];
    axes              = (a.axes & 0xc) >> 1;
    return a.pure && b.pure && !a.spans(0) && !a.spans(1) && !b.spans(0) &&
           a.spans(2) == b.spans(t->op_params[1] ? 2 : 1);
}

// [n, n, n_tokens] = a [m, n_tokens]
static bool axes_of_hc_comb(const ggml_tensor *, const operand * src, uint8_t & axes) {
    const operand & a = src[0];
    axes              = shifted(a) & 0xc;
    return a.pure && src[1].constant && src[2].constant && !a.spans(0);
}

// grows only along axes that are not token axes
static bool axes_of_repeat(const ggml_tensor * t, const operand * src, uint8_t & axes) {
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (t->ne[d] != src[0].t->ne[d]) {
            if (src[0].spans(d)) {
                return false;
            }
            axes &= ~(1 << d);
        }
    }
    return true;
}

//
// rules for the rows that are read
//

// each element by itself, or with what is broadcast along the axis
static bool rows_by_value(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = t->src[i];
        if (!src || src == t) {  // ggml_cast refers to itself
            continue;
        }
        if (src->ne[axis] == t->ne[axis]) {
            src_axes[i] = axis;
        } else if (src->ne[axis] != 1) {
            return false;
        }
    }
    return true;
}

// mixes the values along axis 0
static bool rows_by_row(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    return axis > 0 && rows_by_value(t, axis, src_axes);
}

// only along axis 1: the axes above pick a slope or a sink
static bool rows_of_soft_max(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    return axis == 1 && rows_by_value(t, axis, src_axes);
}

static bool rows_of_concat(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    return axis != t->op_params[0] && rows_by_value(t, axis, src_axes);
}

// keeps the order of the elements
static bool rows_of_reshape(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    const ggml_tensor * a     = t->src[0];
    int64_t             below = 1;
    for (int d = 0; d < axis; ++d) {
        below *= t->ne[d];
    }
    int64_t n = 1;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (n == below && a->ne[d] == t->ne[axis]) {
            src_axes[0] = d;
            return true;
        }
        n *= a->ne[d];
    }
    return false;
}

// moves no data: the axis of the operand is the one with the same stride
static bool rows_of_view(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    const ggml_tensor * a      = t->src[0];
    const size_t        stride = t->nb[axis];
    const int64_t       n      = t->ne[axis];

    size_t offset = t->view_offs - a->view_offs;
    if (!llama_firstlayer_shrink(offset, stride, n, n)) {
        return false;
    }
    size_t last = offset % stride + ggml_type_size(t->type);
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        size_t nb = t->nb[d];
        if (d == axis || t->ne[d] == 1) {
            continue;
        }
        if (!llama_firstlayer_shrink(nb, stride, n, n)) {
            return false;
        }
        last += (t->ne[d] - 1) * (nb % stride);
    }
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (a->ne[d] == n && a->nb[d] == stride) {
            src_axes[0] = d;
        }
    }
    return last <= stride && src_axes[0] != LLAMA_FIRSTLAYER_ALL_ROWS;
}

// the rows of b, with all of a, or with the matrix at the same place in a stack
static bool rows_of_mul_mat(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    const ggml_tensor * a = t->src[0];
    if (axis >= 2 && a->ne[axis] == t->ne[axis]) {
        src_axes[0] = axis;
    } else if (axis == 0 || (axis >= 2 && a->ne[axis] != 1)) {
        return false;
    }
    src_axes[1] = axis;
    return true;
}

// [m, n_used, n_tokens] = as [k, m, n_expert], b [k, 1 or n_used, n_tokens], ids [n_used, n_tokens]
static bool rows_of_mul_mat_id(const ggml_tensor *, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[1] = 2;
    src_axes[2] = 1;
    return axis == 2;
}

// a [m, n_used, n_tokens], b [m, n_expert], ids [n_used, n_tokens]
static bool rows_of_add_id(const ggml_tensor *, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[0] = 2;
    src_axes[2] = 1;
    return axis == 2;
}

// [m, n_used, n_tokens] = a [m, n, n_tokens], b [n_used, n_tokens]
static bool rows_of_get_rows(const ggml_tensor *, int axis, llama_firstlayer_row_axes & src_axes) {
    if (axis >= 2) {
        src_axes[0] = axis;
    }
    src_axes[1] = axis - 1;
    return axis > 0;
}

// a [n, n_head, n_tokens], positions [n_tokens], or all first ones of the tokens, then all second ones, ...
static bool rows_of_rope(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[0] = 2;
    src_axes[1] = 0;
    return axis == 2 && t->src[1]->ne[0] % t->ne[2] == 0;
}

// [n, n_head, n_tokens] = q [n, n_tokens, n_head], k, v, mask [n_kv, n_tokens], sinks
static bool rows_of_flash_attn(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    const ggml_tensor * mask = t->src[3];
    src_axes[0]              = 1;
    if (mask) {
        src_axes[3] = 1;
    }
    return axis == 2 && (!mask || mask->ne[1] == t->ne[2]);
}

// [m, n_tokens] = a [m, n, n_tokens], b [n, n_tokens] or of a's shape
static bool rows_of_hc_pre(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[0] = 2;
    src_axes[1] = t->op_params[1] ? 2 : 1;
    return axis == 1;
}

// [n, n, n_tokens] = a [m, n_tokens]
static bool rows_of_hc_comb(const ggml_tensor *, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[0] = 1;
    return axis == 2;
}

// [m, n, n_tokens] = x [m, n_tokens], residual [m, n, n_tokens], post [n, n_tokens], comb [n, n, n_tokens]
static bool rows_of_hc_post(const ggml_tensor *, int axis, llama_firstlayer_row_axes & src_axes) {
    src_axes[0] = 1;
    src_axes[1] = 2;
    src_axes[2] = 1;
    src_axes[3] = 2;
    return axis == 2;
}

//
// the table
//

static constexpr uint32_t LAYOUT       = LLAMA_FIRSTLAYER_OP_LAYOUT;
static constexpr uint32_t COPY         = LLAMA_FIRSTLAYER_OP_COPY;
static constexpr uint32_t PRODUCT      = LLAMA_FIRSTLAYER_OP_PRODUCT;
static constexpr uint32_t READS_GAPS   = LLAMA_FIRSTLAYER_OP_READS_GAPS;
static constexpr uint32_t HAS_TARGET   = LLAMA_FIRSTLAYER_OP_HAS_TARGET;
static constexpr uint32_t PICKS_ROWS   = LLAMA_FIRSTLAYER_OP_PICKS_ROWS;
static constexpr uint32_t PICKS_EXPERT = LLAMA_FIRSTLAYER_OP_PICKS_EXPERT;
static constexpr uint32_t PRINTS_SHAPE = LLAMA_FIRSTLAYER_OP_PRINTS_SHAPE;
static constexpr uint32_t PRINTS_TYPE  = LLAMA_FIRSTLAYER_OP_PRINTS_TYPE;

// Recipes in files are compared with those printed by this table, so what it prints for an operation must never change
static constexpr struct {
    ggml_op             op;
    llama_firstlayer_op row;
} ROWS[] = {
    // clang-format off
    // move no data
    { GGML_OP_RESHAPE,      { nullptr,            rows_of_reshape,    LAYOUT | PRINTS_SHAPE } },
    { GGML_OP_VIEW,         { nullptr,            rows_of_view,       LAYOUT | PRINTS_SHAPE } },
    { GGML_OP_PERMUTE,      { nullptr,            rows_of_view,       LAYOUT } },
    { GGML_OP_TRANSPOSE,    { nullptr,            rows_of_view,       LAYOUT } },
    // copy
    { GGML_OP_DUP,          { axes_by_value,      rows_by_value,      COPY } },
    { GGML_OP_CPY,          { axes_of_cast,       rows_by_value,      COPY | READS_GAPS | HAS_TARGET | PRINTS_TYPE } },
    { GGML_OP_CONT,         { axes_of_cont,       rows_of_reshape,    COPY | READS_GAPS | PRINTS_SHAPE } },
    { GGML_OP_SET_ROWS,     { nullptr,            nullptr,            READS_GAPS | HAS_TARGET } },
    { GGML_OP_CONCAT,       { axes_of_concat,     rows_of_concat,     READS_GAPS,                     { "dim" } } },
    { GGML_OP_REPEAT,       { axes_of_repeat,     rows_by_value,      PRINTS_SHAPE } },
    { GGML_OP_PAD,          { axes_of_repeat,     nullptr,            0 } },
    { GGML_OP_GET_ROWS,     { axes_of_get_rows,   rows_of_get_rows,   PICKS_ROWS } },
    // each value by itself
    { GGML_OP_SQR,          { axes_by_value,      rows_by_value,      0 } },
    { GGML_OP_SQRT,         { axes_by_value,      rows_by_value,      0 } },
    { GGML_OP_LOG,          { axes_by_value,      rows_by_value,      0 } },
    { GGML_OP_SIN,          { axes_by_value,      rows_by_value,      0 } },
    { GGML_OP_COS,          { axes_by_value,      rows_by_value,      0 } },
    { GGML_OP_SCALE,        { axes_by_value,      rows_by_value,      0,                              { "scale:f", "bias:f" } } },
    { GGML_OP_CLAMP,        { axes_by_value,      rows_by_value,      0,                              { "min:f", "max:f" } } },
    { GGML_OP_LEAKY_RELU,   { axes_by_value,      rows_by_value,      0,                              { "slope:f" } } },
    { GGML_OP_UNARY,        { axes_by_value,      rows_by_value,      0,                              { "", "p1:f", "p2:f", "p3:f", "p4:f" } } },  // xielu has four
    // each row by itself
    { GGML_OP_NORM,         { axes_by_row,        rows_by_row,        READS_GAPS,                     { "eps:f" } } },
    { GGML_OP_RMS_NORM,     { axes_by_row,        rows_by_row,        READS_GAPS,                     { "eps:f" } } },
    { GGML_OP_L2_NORM,      { axes_by_row,        rows_by_row,        0,                              { "eps:f" } } },
    { GGML_OP_SUM_ROWS,     { axes_by_row,        rows_by_row,        0 } },
    { GGML_OP_MEAN,         { axes_by_row,        rows_by_row,        0 } },
    { GGML_OP_CUMSUM,       { axes_by_row,        rows_by_row,        0 } },
    { GGML_OP_ARGSORT,      { axes_by_row,        rows_by_row,        0,                              { "order" } } },
    { GGML_OP_TOP_K,        { axes_by_row,        rows_by_row,        PRINTS_SHAPE } },
    { GGML_OP_SOFT_MAX,     { axes_of_soft_max,   rows_of_soft_max,   0,                              { "scale:f", "max_bias:f" } } },
    { GGML_OP_GLU,          { axes_of_glu,        rows_by_row,        0,                              { "", "swapped", "alpha:f", "limit:f" } } },
    { GGML_OP_ROPE,         { nullptr,            rows_of_rope,       READS_GAPS } },
    { GGML_OP_FLASH_ATTN_EXT, { nullptr,          rows_of_flash_attn, 0 } },
    // two operands
    { GGML_OP_ADD,          { axes_of_broadcast,  rows_by_value,      READS_GAPS } },
    { GGML_OP_SUB,          { axes_of_broadcast,  rows_by_value,      READS_GAPS } },
    { GGML_OP_MUL,          { axes_of_broadcast,  rows_by_value,      READS_GAPS } },
    { GGML_OP_DIV,          { axes_of_broadcast,  rows_by_value,      READS_GAPS } },
    { GGML_OP_ADD_ID,       { axes_of_add_id,     rows_of_add_id,     0 } },
    // the precision of the activations is left out: it is a policy that comes with the weight
    { GGML_OP_MUL_MAT,      { axes_of_mul_mat,    rows_of_mul_mat,    PRODUCT,                        { "prec", "hint", "", "" } } },
    { GGML_OP_MUL_MAT_ID,   { axes_of_mul_mat_id, rows_of_mul_mat_id, PRODUCT | PICKS_EXPERT,         { "prec", "hint", "", "" } } },
    // fused for one architecture
    { GGML_OP_DSV4_HC_PRE,  { axes_of_hc_pre,     rows_of_hc_pre,     0,                              { "scale:f", "gated" } } },
    { GGML_OP_DSV4_HC_COMB, { axes_of_hc_comb,    rows_of_hc_comb,    0,                              { "eps:f", "n_iter" } } },
    { GGML_OP_DSV4_HC_POST, { nullptr,            rows_of_hc_post,    0 } },
    // clang-format on
};

const std::array<llama_firstlayer_op, GGML_OP_COUNT> LLAMA_FIRSTLAYER_OPS = [] {
    std::array<llama_firstlayer_op, GGML_OP_COUNT> res{};
    for (const auto & cur : ROWS) {
        res[cur.op] = cur.row;
    }
    return res;
}();
