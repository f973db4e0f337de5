#include "llama-firstlayer-walk.h"

#include <algorithm>
#include <cstring>

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
