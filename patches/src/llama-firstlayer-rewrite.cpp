#include "llama-firstlayer-gather.h"
#include "llama-firstlayer-walk.h"

#include <algorithm>
#include <cstring>
#include <iterator>

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

// Whether t, which reads `before`, can read `after`. Kernels rely on values that lie one after the other, and some on memory
// without gaps.
static bool can_read(const ggml_tensor * t, const ggml_tensor & before, const ggml_tensor & after, bool aligned) {
    const bool keeps_values = before.nb[0] != ggml_type_size(before.type) || after.nb[0] == before.nb[0];
    const bool adds_no_gaps = (!ggml_is_contiguous_0(&before) || ggml_is_contiguous_0(&after)) &&
                              (!ggml_is_contiguous_1(&before) || ggml_is_contiguous_1(&after)) &&
                              (!ggml_is_contiguous_2(&before) || ggml_is_contiguous_2(&after));
    return keeps_values && (adds_no_gaps || (aligned && takes_strided_rows(t)));
}

bool llama_firstlayer_walk::place_site(ggml_tensor *      site,
                                       const row_ref &    row_ref,
                                       const tensor_set & is_live,
                                       const tensor_set & cut,
                                       placement &        res) const {
    const size_t        stride    = row_ref.rows->nb[1];
    const ggml_tensor * memory    = site->view_src ? site->view_src : site;
    const bool          unchanged = memory == site && stride == get(site).stride;
    const bool          aligned = stride % 16 == 0 && row_ref.offset % 16 == 0;  // required by kernels that read float4

    row_strides(site, stride, res.nb);
    res.as_views  = !(site->flags & GGML_TENSOR_FLAG_OUTPUT);
    bool in_place = false;  // whether a reader writes its result to the same memory

    const auto find = [&](const ggml_tensor * t) {
        return std::find_if(res.layouts.begin(), res.layouts.end(), [&](const auto & cur) { return cur.first == t; });
    };
    res.layouts.emplace_back(site, *site);
    res.layouts[0].second.view_offs = 0;
    std::copy_n(unchanged ? site->nb : res.nb, GGML_MAX_DIMS, res.layouts[0].second.nb);

    for (ggml_tensor * t : affected) {
        if (cut.count(t) || !is_live.count(t)) {
            continue;
        }
        if (is_layout_op(t) && find(t->src[0]) != res.layouts.end()) {
            ggml_tensor & cur = res.layouts.emplace_back(t, *t).second;
            res.as_views      = res.as_views && !(t->flags & GGML_TENSOR_FLAG_OUTPUT) &&
                                (unchanged || translate_layout(t, site, res.nb, stride, cur.nb, cur.view_offs));
            continue;
        }
        for (const ggml_tensor * src : t->src) {
            const auto cur = find(src);
            if (src == t || cur == res.layouts.end()) {
                continue;
            }
            in_place     = in_place || t->view_src == memory;
            res.as_views = res.as_views && !in_place && can_read(t, *src, cur->second, aligned);
        }
    }
    // a copy can stand in for memory of the site's own, and for such memory as a view without gaps sees
    return res.as_views || memory == site || (ggml_is_contiguous(site) && !in_place);
}

void llama_firstlayer_walk::replace_site(ggml_context *    ctx,
                                         ggml_tensor *     site,
                                         const row_ref &   row_ref,
                                         const placement & to) const {
    std::fill(std::begin(site->src), std::end(site->src), nullptr);
    memset(site->op_params, 0, sizeof(site->op_params));

    if (to.as_views) {
        site->op     = GGML_OP_VIEW;
        site->src[0] = row_ref.rows;
        for (const auto & [t, as_view] : to.layouts) {
            make_view(t, row_ref, as_view.nb, as_view.view_offs);
        }
        return;
    }

    site->op     = GGML_OP_CONT;
    site->src[0] = ggml_view_4d(ctx, row_ref.rows, site->ne[0], site->ne[1], site->ne[2], site->ne[3], to.nb[1],
                                to.nb[2], to.nb[3], row_ref.offset);
    if (site->view_src) {
        const size_t offset = site->view_offs;
        for (const auto & [t, _] : to.layouts) {
            t->view_src = t == site ? nullptr : site;
            t->view_offs -= offset;
        }
    }
}

llama_firstlayer_walk::tensor_set llama_firstlayer_walk::replace(
    ggml_context *                               ctx,
    ggml_cgraph *                                gf,
    std::unordered_map<ggml_tensor *, row_ref> & row_refs) const {
    // All sites are placed before one is replaced: if one cannot be, it is computed, and what it is computed from, other sites
    // perhaps, has further readers.
    std::vector<std::pair<ggml_tensor *, placement>> placed;
    tensor_set                                       is_live;
    for (bool complete = false; !complete;) {
        tensor_set cut;
        for (const auto & [site, _] : row_refs) {
            cut.insert(site);
        }
        is_live  = live_affected(cut);
        complete = true;
        placed.clear();
        for (ggml_tensor * t : affected) {
            const auto it = row_refs.find(t);
            if (it == row_refs.end() || !is_live.count(t)) {
                continue;
            }
            placed.emplace_back(t, placement());
            if (!place_site(t, it->second, is_live, cut, placed.back().second)) {
                row_refs.erase(it);
                complete = false;
                break;
            }
        }
    }
    for (const auto & [site, to] : placed) {
        replace_site(ctx, site, row_refs.at(site), to);
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

    // llama.cpp's allocator keeps its plan for a graph with as many nodes, which may be this one as it was: that of a batch for
    // which a row cache has no room
    if (ggml_graph_n_nodes(gf) == (int) nodes.size()) {
        ggml_tensor * leaf = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
        ggml_set_input(leaf);
        ggml_build_forward_expand(gf, ggml_view_1d(ctx, leaf, 1, 0));
    }

    tensor_set gone;
    std::copy_if(affected.begin(), affected.end(), std::inserter(gone, gone.end()),
                 [&](const ggml_tensor * t) { return get(t).kind == PURITY_PURE && !is_live.count(t); });
    return gone;
}
