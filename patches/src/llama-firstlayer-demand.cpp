#include "llama-firstlayer-demand.h"

#include "llama-firstlayer-builder.h"
#include "llama-firstlayer-guard.h"
#include "llama-firstlayer.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cstdlib>
#include <functional>
#include <stdexcept>

static bool is_layout(const ggml_tensor * t) {
    return llama_firstlayer_get_op(t).is(LLAMA_FIRSTLAYER_OP_LAYOUT);
}

llama_firstlayer_demand::llama_firstlayer_demand(const llm_graph_params & params, bool with_logits) :
    params(params),
    ctx(params.res->get_ctx()),
    gf(params.res->get_gf()),
    n_tokens(params.ubatch.n_tokens),
    nodes(ggml_graph_nodes(gf), ggml_graph_nodes(gf) + ggml_graph_n_nodes(gf)) {
    find_index();
    find_outputs(with_logits);
}

//
// what is read
//

// llama_context reads these tensors of a graph, depending on its parameters
void llama_firstlayer_demand::find_outputs(bool with_logits) {
    const auto &             cparams = params.cparams;
    const llm_graph_result & res     = *params.res;

    const bool gives_embd = cparams.embeddings || params.gtype == LLM_GRAPH_TYPE_ENCODER || !res.t_logits;

    // one tensor may be several of them
    tensor_set kept;
    const auto add = [&](const ggml_tensor * t, bool is_read) {
        if (t) {
            (is_read ? kept : dropped).insert(t);
        }
    };
    add(res.t_logits, with_logits);
    add(res.t_embd, gives_embd && !res.t_embd_pooled);
    add(res.t_embd_pooled, true);
    add(res.t_h_nextn, cparams.embeddings_nextn);
    for (size_t il = 0; il < cparams.embeddings_layer_inp.size(); ++il) {
        add(cparams.embeddings_layer_inp[il] ? res.t_layer_inp[il] : nullptr, true);
    }
    for (const ggml_tensor * t : kept) {
        dropped.erase(t);
    }
    if (with_logits || !res.t_logits) {
        return;
    }
    for (const ggml_tensor * t : nodes) {
        for (const ggml_tensor * src : t->src) {
            if (src != t) {
                has_readers.insert(src);
            }
        }
    }
}

void llama_firstlayer_demand::find_index() {
    std::vector<ggml_tensor *> outputs;
    std::vector<ggml_tensor *> pooled;
    for (const auto & input : params.res->inputs) {
        const auto * out_ids = dynamic_cast<const llm_graph_input_out_ids *>(input.get());
        const auto * cls     = dynamic_cast<const llm_graph_input_cls *>(input.get());
        if (out_ids && out_ids->out_ids->ne[0] == n_tokens) {
            identities.insert(out_ids->out_ids);
        } else if (out_ids) {
            outputs.push_back(out_ids->out_ids);
        } else if (cls && cls->cls->ne[0] < n_tokens) {
            pooled.push_back(cls->cls);
        }
    }
    const auto & list = outputs.empty() ? pooled : outputs;
    if (!list.empty() && n_tokens > 1) {  // the axis of a single token cannot be told from others
        index = list.front();
        indices.insert(list.begin(), list.end());
    }
}

bool llama_firstlayer_demand::is_selection(const ggml_tensor * t) const {
    return t->op == GGML_OP_GET_ROWS && indices.count(t->src[1]) && t->src[0]->type == GGML_TYPE_F32 &&
           t->src[0]->ne[1] == n_tokens && ggml_is_matrix(t->src[0]);
}

// whether a node must compute all rows
bool llama_firstlayer_demand::is_whole(const ggml_tensor * t) const {
    const bool has_target = t->view_src && !is_layout(t);
    return is_output(t) || !(t->flags & GGML_TENSOR_FLAG_COMPUTE) || has_target || whole.count(t);
}

bool llama_firstlayer_demand::row_axes(const ggml_tensor * t, narrowed & rows) const {
    if (t->op == GGML_OP_GET_ROWS && identities.count(t->src[1])) {
        rows.src_axes[0] = rows.axis;
        return rows.axis == 1 && ggml_is_matrix(t->src[0]) && t->src[0]->type == GGML_TYPE_F32;
    }
    const auto rule = llama_firstlayer_get_op(t).row_rule;
    return rule && rule(t, rows.axis, rows.src_axes);
}

void llama_firstlayer_demand::read(const ggml_tensor * t, int axis) {
    const auto [it, is_new] = reads.emplace(t, axis);
    const bool was_open     = !is_new && it->second != ALL;
    if (!is_new && it->second != axis) {
        it->second = ALL;
    }
    if (t->op != GGML_OP_NONE) {
        n_open += (it->second != ALL) - was_open;
    }
}

bool llama_firstlayer_demand::spread() {
    reads.clear();
    narrow.clear();
    dead.clear();
    n_open = std::count_if(nodes.begin(), nodes.end(), [&](const ggml_tensor * t) { return is_selection(t); });

    // once nothing above is affected, the rest of the graph need not be looked at
    for (auto it = nodes.rbegin(); it != nodes.rend() && (n_open > 0 || drops_logits()); ++it) {
        const ggml_tensor * t       = *it;
        const auto          found   = reads.find(t);
        const bool          is_read = found != reads.end();
        narrowed            rows    = { is_read ? found->second : ALL, {} };
        rows.src_axes.fill(ALL);
        n_open -= (rows.axis != ALL) + is_selection(t);

        if (drops_logits() && !is_read && (dropped.count(t) || has_readers.count(t)) && !is_whole(t)) {
            dead.insert(t);
            continue;
        }
        if (rows.axis != ALL && t->ne[rows.axis] == n_tokens && !is_whole(t) && row_axes(t, rows)) {
            narrow.emplace(t, rows);
        } else {
            rows.src_axes.fill(ALL);
            rows.src_axes[0] = is_selection(t) ? 1 : ALL;
        }
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (t->src[i] && t->src[i] != t) {
                read(t->src[i], rows.src_axes[i]);
            }
        }
    }

    const size_t n_whole = whole.size();
    selected.clear();
    for (const auto & [t, rows] : narrow) {
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (!t->src[i] || rows.src_axes[i] == ALL || narrow.count(t->src[i])) {
                continue;
            }
            selected[{ t->src[i], rows.src_axes[i] }] = nullptr;
            if (!can_select(t->src[i], rows.src_axes[i])) {
                whole.insert(t);
            }
        }
    }
    return whole.size() == n_whole;
}

static int64_t multiply_adds(const ggml_tensor * t) {
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        const ggml_tensor * k = t->src[1];
        const ggml_tensor * v = t->src[2];
        return ggml_nrows(t->src[0]) * k->ne[1] * (k->ne[0] + v->ne[0]);
    }
    return llama_firstlayer_get_op(t).is(LLAMA_FIRSTLAYER_OP_PRODUCT) ? ggml_nelements(t) * t->src[0]->ne[0] : 0;
}

// whether it takes less time to rewrite the graph than to compute what is left out
bool llama_firstlayer_demand::is_worth_it() const {
    static const bool always = getenv("LLAMA_FIRSTLAYER_DEMAND_ALWAYS");  // for tests, whose models are tiny

    int64_t saved = 0;
    for (const auto & [t, _] : narrow) {
        saved += multiply_adds(t) / n_tokens * (n_tokens - index->ne[0]);
    }
    for (const ggml_tensor * t : dead) {
        saved += multiply_adds(t);
    }
    return (always && saved > 0) || saved > MIN_SAVED * (int64_t) nodes.size();
}

//
// rewrite
//

bool llama_firstlayer_demand::can_select(const ggml_tensor * t, int axis) const {
    const bool has_rows = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_I32;
    return has_rows && ggml_is_contiguous(t) && t->ne[axis] % n_tokens == 0;
}

ggml_tensor * llama_firstlayer_demand::select(ggml_tensor * t, int axis) {
    ggml_tensor *& res = selected[{ t, axis }];
    if (res) {
        return res;
    }
    int64_t ne[GGML_MAX_DIMS];
    std::copy(std::begin(t->ne), std::end(t->ne), ne);
    ne[axis] = ne[axis] / n_tokens * index->ne[0];

    // an axis may hold the tokens several times, and others may be above it
    const int64_t width = t->nb[axis] / t->nb[0];
    const int64_t n     = ggml_nelements(t) / (width * n_tokens);

    ggml_tensor * ids = n == 1 ? index : ggml_repeat_4d(ctx, index, index->ne[0], n, 1, 1);
    res               = ggml_get_rows(ctx, ggml_reshape_3d(ctx, t, width, n_tokens, n), ids);
    ggml_format_name(res, "%s (rows read)", ggml_get_name(t));
    if (res->type != t->type) {
        res = ggml_cast(ctx, res, t->type);
    }
    res = ggml_reshape_4d(ctx, res, ne[0], ne[1], ne[2], ne[3]);
    return res;
}

// let a view start `offset` bytes into its operand
static void look_at(ggml_tensor * t, size_t offset) {
    t->view_src  = t->src[0]->view_src ? t->src[0]->view_src : t->src[0];
    t->view_offs = t->src[0]->view_offs + offset;
}

// A selection of rows from what has no others becomes a view, or a copy: the memory of an output is kept only if it is its own
void llama_firstlayer_demand::keep_rows(ggml_tensor * t) const {
    t->src[1] = nullptr;
    if (is_output(t) || !ggml_is_contiguous(t->src[0])) {
        t->op = GGML_OP_CONT;
        return;
    }
    t->op = GGML_OP_VIEW;
    look_at(t, 0);
}

// the rows that are read are all that a node computes
void llama_firstlayer_demand::shrink(ggml_tensor * t, const narrowed & rows) {
    const ggml_tensor old    = *t;
    const size_t      stride = old.nb[rows.axis];
    before.emplace(t, old);

    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (t->src[i] && rows.src_axes[i] != ALL && !narrow.count(t->src[i])) {
            t->src[i] = select(t->src[i], rows.src_axes[i]);
        }
    }
    t->ne[rows.axis] = index->ne[0];
    for (int d = 0; d < GGML_MAX_DIMS; ++d) {
        if (d != rows.axis) {
            llama_firstlayer_shrink(t->nb[d], stride, n_tokens, index->ne[0]);
        }
    }
    if (is_layout(t)) {
        const auto found  = before.find(old.src[0]);
        size_t     offset = old.view_offs - (found != before.end() ? &found->second : old.src[0])->view_offs;
        llama_firstlayer_shrink(offset, stride, n_tokens, index->ne[0]);
        look_at(t, offset);
    } else if (t->op == GGML_OP_GET_ROWS && identities.count(t->src[1])) {
        keep_rows(t);
    }
}

size_t llama_firstlayer_demand_kinds::n_leafs(size_t kind) {
    const std::lock_guard<std::mutex> lock(mutex);

    const auto found = std::find(known.begin(), known.end(), kind);
    if (found == known.end()) {
        if (known.size() == MAX) {
            return 0;
        }
        known.push_back(kind);
        return known.size() * N_LEAFS;
    }
    return (found - known.begin() + 1) * N_LEAFS;
}

// a number for what decides which tensors a rewritten graph has, and how long each is needed
size_t llama_firstlayer_demand::kind() const {
    std::string text;
    for (const ggml_tensor * t : nodes) {
        const auto found = narrow.find(t);
        text += (char) t->op;
        text += found == narrow.end() ? (dead.count(t) ? 'd' : 'w') : (char) ('0' + found->second.axis);
        text += is_output(t) ? 'o' : ' ';
    }
    return std::hash<std::string>()(text);
}

bool llama_firstlayer_demand::has_room(size_t n_leafs) const {
    const size_t n_new  = n_leafs + N_SELECT * selected.size() + 1;
    const size_t n_free = (ggml_get_mem_size(ctx) - ggml_used_mem(ctx)) / ggml_tensor_overhead();

    tensor_set leafs;  // as llama_firstlayer_restart and llama_firstlayer_add_node add them
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->op == GGML_OP_NONE && (t->flags & GGML_TENSOR_FLAG_INPUT)) {
            leafs.insert(t);
        }
    }
    for (const ggml_tensor * t : nodes) {
        std::copy_if(std::begin(t->src), std::end(t->src), std::inserter(leafs, leafs.end()),
                     [](const ggml_tensor * src) { return src && src->op == GGML_OP_NONE; });
    }
    const size_t n_all = nodes.size() + leafs.size() + n_new;

    // the scheduler has a hash table of as many entries as nodes are allowed, rounded up to a prime that is at most 32 above a
    // power of two (ggml_hash_size)
    size_t n_entries = 1;
    while (n_entries + 32 < (size_t) params.res->get_max_nodes()) {
        n_entries *= 2;
    }
    return n_new <= n_free && n_all <= n_entries;
}

bool llama_firstlayer_demand::apply(llama_firstlayer_demand_kinds & kinds) {
    if (!index && !drops_logits()) {
        return false;
    }
    while (!spread()) {
    }
    if (!is_worth_it()) {
        return false;
    }
    const size_t n_leafs = kinds.n_leafs(kind());
    if (n_leafs == 0 || !has_room(n_leafs)) {
        return false;
    }
    for (ggml_tensor * t : nodes) {
        if (dropped.count(t)) {
            t->flags &= ~GGML_TENSOR_FLAG_OUTPUT;
        }
    }
    if (drops_logits()) {
        params.res->t_logits = nullptr;
    }
    for (size_t i = 0; i < n_leafs; ++i) {
        ggml_set_input(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1));
    }
    for (ggml_tensor * t : nodes) {
        const auto found = narrow.find(t);
        if (found != narrow.end()) {
            shrink(t, found->second);
        } else if (t->op == GGML_OP_GET_ROWS && indices.count(t->src[1]) && narrow.count(t->src[0])) {
            keep_rows(t);
        }
    }

    llama_firstlayer_restart(ctx, gf);
    for (ggml_tensor * t : nodes) {
        if (!dead.count(t)) {
            llama_firstlayer_add_node(gf, t);
        }
    }
    return true;
}

std::string llama_firstlayer_demand::describe() const {
    std::string res;
    if (!narrow.empty()) {
        res = format("%zu of %zu nodes compute %" PRId64 " of %" PRId64 " rows", narrow.size(), nodes.size(),
                     index->ne[0], n_tokens);
    }
    if (!dead.empty()) {
        res += format("%s%zu nodes are left out", res.empty() ? "" : ", ", dead.size());
    }
    return res;
}

int64_t llama_firstlayer_multiply_adds(ggml_cgraph * gf) {
    int64_t res = 0;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        if (t->flags & GGML_TENSOR_FLAG_COMPUTE) {
            res += multiply_adds(t);
        }
    }
    return res;
}

//
// what it saves
//

static llama_firstlayer_products count_products(const char *            path_model,
                                                int32_t                 n_tokens,
                                                int32_t                 n_past,
                                                enum llama_pooling_type pooling) {
    const auto model  = llama_firstlayer_load_metadata(path_model, /*load_vocab =*/false);
    const bool embeds = pooling != LLAMA_POOLING_TYPE_UNSPECIFIED;

    if (llama_model_has_encoder(model.get()) && llama_model_has_decoder(model.get())) {
        throw std::runtime_error("llama.cpp encodes and decodes with this model in turn");
    }
    if (!model->firstlayer) {
        model->firstlayer = std::make_unique<llama_firstlayer>();
    }
    llama_firstlayer_products res        = {};
    bool                      has_output = false;
    model->firstlayer->observe           = [&](const llm_graph_params & params, const llama_firstlayer_walk &) {
        has_output = embeds || params.res->get_logits();
        res.all    = llama_firstlayer_multiply_adds(params.res->get_gf());
        llama_firstlayer_demand_kinds kinds;
        llama_firstlayer_demand(params, /*with_logits =*/!embeds).apply(kinds);
        res.read = llama_firstlayer_multiply_adds(params.res->get_gf());
    };

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = n_past + n_tokens;
    cparams.n_batch              = n_tokens;
    cparams.n_ubatch             = n_tokens;
    cparams.embeddings           = embeds;
    cparams.pooling_type         = pooling;
    cparams.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // every architecture runs without it
    llama_firstlayer_builder(*model, cparams).build(n_tokens, embeds ? n_tokens : 1);
    if (!has_output) {
        throw std::runtime_error("the model gives no logits");
    }
    return res;
}

int32_t llama_firstlayer_count_products(const char *                path_model,
                                        int32_t                     n_tokens,
                                        int32_t                     n_past,
                                        enum llama_pooling_type     pooling,
                                        llama_firstlayer_products * products) {
    return llama_firstlayer_guarded(
        [&] {
            *products = count_products(path_model, n_tokens, n_past, pooling);
            return 0;
        },
        -1);
}
