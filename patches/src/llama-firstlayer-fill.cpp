#include "llama-firstlayer-fill.h"

#include "ggml-cpu.h"
#include "llama-firstlayer.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

ggml_tensor * llama_firstlayer_copy(ggml_context *                                           ctx,
                                    ggml_tensor *                                            t,
                                    std::unordered_map<const ggml_tensor *, ggml_tensor *> & copies) {
    if (!t || (t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT))) {
        return t;
    }
    ggml_tensor *& known = copies[t];
    if (known) {
        return known;
    }
    ggml_tensor * res = ggml_dup_tensor(ctx, t);
    known             = res;

    std::copy_n(t->nb, GGML_MAX_DIMS, res->nb);
    std::copy(std::begin(t->op_params), std::end(t->op_params), res->op_params);
    ggml_set_name(res, ggml_get_name(t));
    res->op        = t->op;
    res->flags     = t->flags;
    res->view_offs = t->view_offs;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        res->src[i] = llama_firstlayer_copy(ctx, t->src[i], copies);
    }
    res->view_src = llama_firstlayer_copy(ctx, t->view_src, copies);
    return res;
}

llama_firstlayer_fill_graph llama_firstlayer_fill_graph::copy(const std::vector<ggml_tensor *> & roots,
                                                              const std::vector<ggml_tensor *> & tokens,
                                                              const ggml_tensor *                slots,
                                                              size_t                             n_tensors) {
    const ggml_init_params params = {
        /*.mem_size   =*/n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    llama_firstlayer_fill_graph res;
    res.ctx.reset(ggml_init(params));
    res.gf = ggml_new_graph_custom(res.ctx.get(), n_tensors, false);

    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;
    for (ggml_tensor * root : roots) {
        ggml_build_forward_expand(res.gf, llama_firstlayer_copy(res.ctx.get(), root, copies));
    }
    for (const ggml_tensor * t : tokens) {
        const auto it = copies.find(t);
        if (it != copies.end()) {
            res.tokens.push_back(it->second);
        }
    }
    res.slots = copies.at(slots);
    return res;
}

static void clear_threadpool(ggml_backend_t cpu) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    if (auto * set_threadpool = (decltype(ggml_backend_cpu_set_threadpool) *) ggml_backend_reg_get_proc_address(
            reg, "ggml_backend_cpu_set_threadpool")) {
        set_threadpool(cpu, nullptr);
    }
}

llama_firstlayer_fill::llama_firstlayer_fill(const llama_firstlayer_fill_graph * templates,
                                             size_t                              n_templates,
                                             const llm_graph_params &            params) {
    std::vector<ggml_backend_t> backends;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(params.sched); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(params.sched, i));
    }

    for (size_t i = 0; i < n_templates; ++i) {
        const auto &               from = templates[i];
        std::vector<ggml_tensor *> roots(ggml_graph_nodes(from.gf),
                                         ggml_graph_nodes(from.gf) + ggml_graph_n_nodes(from.gf));
        const size_t               n_tensors = 2 * roots.size() + GGML_DEFAULT_GRAPH_SIZE;

        graph cur;
        static_cast<llama_firstlayer_fill_graph &>(cur) =
            llama_firstlayer_fill_graph::copy(roots, from.tokens, from.slots, n_tensors);
        cur.sched.reset(ggml_backend_sched_new(backends.data(), nullptr, backends.size(), n_tensors, false, false));
        if (!cur.sched || !ggml_backend_sched_alloc_graph(cur.sched.get(), cur.gf)) {
            throw std::runtime_error("cannot allocate the memory for computing rows");
        }
        graphs.push_back(std::move(cur));
    }

    // until a first graph of the context sets the number; the last one's pool may have fewer threads
    ggml_backend_t     cpu = backends.back();
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    if (auto * set_n_threads =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        clear_threadpool(cpu);
        set_n_threads(cpu, params.cparams.n_threads_batch);
    }
}

void llama_firstlayer::forget_threadpool(const llama_model & model, ggml_backend_t cpu) {
    if (model.firstlayer && model.firstlayer->cache) {
        clear_threadpool(cpu);
    }
}

bool llama_firstlayer_fill::compute(const std::vector<llama_token> & tokens,
                                    const std::vector<int32_t> &     slots,
                                    int32_t                          padding) {
    for (size_t first = 0; first < tokens.size();) {
        const size_t n_left = tokens.size() - first;

        // the smallest that holds them all with little padding, or else the largest that is full
        const auto size_of = [](const graph & g) {
            return (size_t) g.slots->ne[0];
        };
        auto cur = std::find_if(graphs.begin(), graphs.end(), [&](const graph & g) { return size_of(g) >= n_left; });
        if (cur != graphs.begin() && (cur == graphs.end() || 2 * size_of(*cur) > 3 * n_left)) {
            --cur;
        }
        const size_t size = size_of(*cur);
        const size_t n    = std::min(size, n_left);

        std::vector<llama_token> ids(tokens.begin() + first, tokens.begin() + first + n);
        std::vector<int64_t>     rows(slots.begin() + first, slots.begin() + first + n);
        while (ids.size() < size) {
            ids.push_back(ids.front());
            rows.push_back(padding + rows.size() - n);
        }
        for (ggml_tensor * t : cur->tokens) {
            ggml_backend_tensor_set(t, ids.data(), 0, ggml_nbytes(t));
        }
        ggml_backend_tensor_set(cur->slots, rows.data(), 0, ggml_nbytes(cur->slots));

        if (ggml_backend_sched_graph_compute(cur->sched.get(), cur->gf) != GGML_STATUS_SUCCESS) {
            return false;
        }
        first += n;
    }
    return true;
}
