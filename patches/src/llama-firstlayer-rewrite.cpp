#include "llama-firstlayer-gather.h"
#include "llama-firstlayer-walk.h"

#include <algorithm>
#include <cstring>

//
// rewrite
//

// whether a node can read rows with gaps between them: one that works in place would need new strides itself
static bool takes_strided_rows(const ggml_tensor * t) {
    const auto & op = llama_firstlayer_get_op(t);
    return op.is(LLAMA_FIRSTLAYER_OP_READS_GAPS) && (!t->view_src || op.is(LLAMA_FIRSTLAYER_OP_HAS_TARGET));
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
    const size_t offset_old = t->view_offs - site->view_offs;

    // a site that is a view may skip values within a token
    size_t packed_nb[GGML_MAX_DIMS];
    row_strides(site, stride_old, packed_nb);
    bool packed = stride_old > 0;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        packed = packed && (site->ne[d] == 1 || site->nb[d] == packed_nb[d]);
    }

    if (packed) {
        // tokens move apart or closer together, the values within a token stay as they are
        size_t last = offset_old % stride_old + ggml_type_size(t->type);
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
        offset = offset_old / stride_old * stride + offset_old % stride_old;
        return last <= width(site) * ggml_type_size(t->type);
    }

    int     axis[GGML_MAX_DIMS];
    int64_t first[GGML_MAX_DIMS];
    if (!map_view(t, site, axis, first)) {
        return false;
    }
    offset = 0;
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        nb[d] = axis[d] >= 0 ? site_nb[axis[d]] : stride;
        offset += first[d] * site_nb[d];
    }
    return true;
}

static void make_view(ggml_tensor *                          t,
                      const llama_firstlayer_walk::row_ref & row_ref,
                      const size_t *                         nb,
                      size_t                                 offset) {
    t->view_src  = row_ref.rows;
    t->view_offs = row_ref.offset + offset;
    std::copy_n(nb, GGML_MAX_DIMS, t->nb);
    if (t->op != GGML_OP_PERMUTE && t->op != GGML_OP_TRANSPOSE) {
        t->op = GGML_OP_VIEW;
        memcpy(t->op_params, &t->view_offs, sizeof(t->view_offs));
    }
}

void llama_firstlayer_walk::replace_site(ggml_context *     ctx,
                                         ggml_tensor *      site,
                                         const row_ref &    row_ref,
                                         const tensor_set & is_live,
                                         const tensor_set & cut) const {
    struct layout {
        ggml_tensor * t;
        size_t        nb[GGML_MAX_DIMS];
        size_t        offset;
    };

    const size_t stride = row_ref.rows->nb[1];

    // the site and the layout operations on it become views of the rows, if their consumers can read them there
    std::vector<layout> layouts;
    tensor_set          below     = { site };
    const ggml_tensor * memory    = site->view_src ? site->view_src : site;
    const bool          unchanged = memory == site && stride == get(site).stride;
    bool                as_views  = !(site->flags & GGML_TENSOR_FLAG_OUTPUT);

    // a node that reads a view copes with gaps between the tokens anyway
    const bool aligned = stride % 16 == 0 && row_ref.offset % 16 == 0;  // required by kernels that read float4
    const bool gaps_ok = unchanged || memory != site;

    size_t nb[GGML_MAX_DIMS];
    row_strides(site, stride, nb);
    layouts.push_back({ site, {}, 0 });
    std::copy_n(unchanged ? site->nb : nb, GGML_MAX_DIMS, layouts.back().nb);

    for (ggml_tensor * t : affected) {
        if (cut.count(t) || !is_live.count(t)) {
            continue;
        }
        if (is_layout_op(t) && below.count(t->src[0])) {
            below.insert(t);
            layouts.push_back({ t, {}, t->view_offs });
            std::copy_n(t->nb, GGML_MAX_DIMS, layouts.back().nb);
            as_views = as_views && !(t->flags & GGML_TENSOR_FLAG_OUTPUT) &&
                       (unchanged || translate_layout(t, site, nb, stride, layouts.back().nb, layouts.back().offset));
            continue;
        }
        const bool consumes = std::any_of(std::begin(t->src), std::end(t->src),
                                          [&](const ggml_tensor * src) { return src && src != t && below.count(src); });
        if (consumes) {
            as_views = as_views && t->view_src != memory && (gaps_ok || (aligned && takes_strided_rows(t)));
        }
    }

    if (!as_views && memory != site) {
        return;  // computed as usual; loading fails if this needs an elided weight
    }

    std::fill(std::begin(site->src), std::end(site->src), nullptr);
    memset(site->op_params, 0, sizeof(site->op_params));

    if (!as_views) {
        site->op     = GGML_OP_CONT;
        site->src[0] = ggml_view_4d(ctx, row_ref.rows, site->ne[0], site->ne[1], site->ne[2], site->ne[3], nb[1], nb[2],
                                    nb[3], row_ref.offset);
        return;
    }

    site->op     = GGML_OP_VIEW;
    site->src[0] = row_ref.rows;
    for (const auto & cur : layouts) {
        make_view(cur.t, row_ref, cur.nb, cur.offset);
    }
}

void llama_firstlayer_walk::replace(ggml_context *                                     ctx,
                                    ggml_cgraph *                                      gf,
                                    const std::unordered_map<ggml_tensor *, row_ref> & row_refs) const {
    tensor_set cut;
    for (const auto & [site, _] : row_refs) {
        cut.insert(site);
    }
    const tensor_set is_live = live_affected(cut);

    for (ggml_tensor * t : affected) {
        const auto it = row_refs.find(t);
        if (it != row_refs.end() && is_live.count(t)) {
            replace_site(ctx, t, it->second, is_live, cut);
        }
    }

    llama_firstlayer_restart(ctx, gf);

    // lookups come first: among nodes on a device, each would interrupt it
    for (ggml_tensor * t : affected) {
        if (!is_live.count(t) || !(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        const auto it = row_refs.find(t);
        if (it != row_refs.end() || get(t).kind == PURITY_PURE) {
            ggml_tensor * lookup = llama_firstlayer_gathered(it != row_refs.end() ? it->second.rows : t);
            if (lookup) {
                ggml_build_forward_expand(gf, lookup);
            }
        }
    }

    // the impure nodes keep their order
    for (ggml_tensor * t : nodes) {
        if (get(t).kind != PURITY_IMPURE && !(t->flags & GGML_TENSOR_FLAG_OUTPUT)) {
            continue;
        }
        llama_firstlayer_add_node(gf, t);
    }
}
