#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-firstlayer-analysis.h"
#include "llama-firstlayer-fill.h"
#include "llama-firstlayer-guard.h"
#include "llama-firstlayer.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

//
// evaluation
//

void llama_firstlayer_analysis::load_weight(ggml_tensor * t) {
    const auto & weight = ml->require_weight(ggml_get_name(t));
    const size_t size   = ggml_nbytes(t);

    // the buffer type that llama.cpp would load this weight into
    ggml_backend_buffer_type_t buft  = ggml_backend_buffer_get_type(t->buffer);
    ggml_backend_dev_t         cpu   = ggml_backend_get_device(backends.back().get());
    const size_t               align = ggml_backend_buft_get_alignment(buft);

    std::vector<no_init<uint8_t>> buf(ml->use_mmap ? 0 : size);
    void *                        data = const_cast<void *>(ml->load_data_range(weight, 0, size, buf.data()));

    if (ml->use_mmap && buft == ggml_backend_dev_buffer_type(cpu) && (uintptr_t) data % align == 0) {
        bufs.emplace_back(ggml_backend_dev_buffer_from_host_ptr(cpu, data, size, size));
        t->buffer = nullptr;
        t->data   = nullptr;
        ggml_backend_tensor_alloc(bufs.back().get(), t, data);
        return;
    }

    bufs.emplace_back(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, t)));
    if (!bufs.back()) {
        throw std::runtime_error(format("cannot allocate %zu bytes for weight '%s'", size, ggml_get_name(t)));
    }
    ggml_backend_buffer_set_usage(bufs.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    t->buffer = nullptr;
    t->data   = nullptr;
    ggml_backend_tensor_alloc(bufs.back().get(), t, ggml_backend_buffer_get_base(bufs.back().get()));
    ggml_backend_tensor_set(t, data, 0, size);
}

void llama_firstlayer_analysis::prepare_eval() {
    // a graph of its own, since the context's scheduler changes the one that it gets
    std::unordered_map<const ggml_tensor *, ggml_tensor *> copies;

    const size_t           max_nodes = builder->ctx->graph_max_nodes(n_batch);
    const ggml_init_params params    = {
        /*.mem_size   =*/max_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx_eval.reset(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(ctx_eval.get(), max_nodes, false);

    inputs.clear();
    rows.assign(sites.size(), nullptr);
    model->firstlayer->observe = [&](const llm_graph_params & cur, const llama_firstlayer_walk & walk) {
        const auto found = find_sites(walk);
        for (size_t i = 0; i < sites.size(); ++i) {
            if (sites[i].gtype == cur.gtype) {
                ggml_tensor * t = walk.as_rows(cur.res->get_ctx(), found.at(sites[i].recipe));
                rows[i]         = llama_firstlayer_copy(ctx_eval.get(), t, copies);
                ggml_set_output(rows[i]->view_src ? rows[i]->view_src : rows[i]);
                ggml_build_forward_expand(graph, rows[i]);
            }
        }
        for (ggml_tensor * t : walk.tokens()) {
            if (copies.count(t)) {
                inputs.push_back(copies.at(t));
            }
        }
    };
    builder->build(n_batch, n_batch);

    std::vector<std::string> splits;
    ml = std::make_unique<llama_model_loader>(nullptr, nullptr, nullptr, path, splits, nullptr, LLAMA_LOAD_MODE_MMAP,
                                              false, false, true, nullptr, nullptr);
    ml->init_mappings(/*prefetch =*/false);

    backends.clear();
    if (dev) {
        backends.emplace_back(ggml_backend_dev_init(dev, nullptr));
    }
    backends.emplace_back(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    std::vector<ggml_backend_t> used;
    for (const auto & backend : backends) {
        if (!backend) {
            throw std::runtime_error("the device or the CPU cannot be used");
        }
        used.push_back(backend.get());
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(used.back()));
    if (auto * set_n_threads =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(used.back(), n_threads);
    }

    llama_firstlayer_walk::tensor_set read;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        read.insert(std::begin(t->src), std::end(t->src));
    }
    for (const auto & [_, t] : model->tensors_by_name) {
        if (read.count(t)) {
            load_weight(t);
        }
    }

    sched.reset(ggml_backend_sched_new(used.data(), nullptr, used.size(), max_nodes, false, false));
    if (!sched || !ggml_backend_sched_alloc_graph(sched.get(), graph)) {
        throw std::runtime_error("cannot allocate the memory for computing rows");
    }

    gf = graph;
}

void llama_firstlayer_analysis::eval(const llama_token * tokens, int32_t n_tokens, float * out) {
    if (!gf) {
        prepare_eval();
    }

    const int32_t n_vocab = model->vocab.n_tokens();
    if (n_tokens < 0 ||
        std::any_of(tokens, tokens + n_tokens, [&](llama_token id) { return id < 0 || id >= n_vocab; })) {
        throw std::runtime_error(format("token id out of range, the vocabulary has %d entries", n_vocab));
    }

    int64_t row_width = 0;
    for (const auto & site : sites) {
        row_width += site.width;
    }

    std::vector<float> values;
    for (int32_t first = 0; first < n_tokens; first += n_batch) {
        const int32_t n = std::min(n_batch, n_tokens - first);

        std::vector<llama_token> batch(tokens + first, tokens + first + n);
        batch.resize(n_batch, batch.back());
        for (ggml_tensor * t : inputs) {
            ggml_backend_tensor_set(t, batch.data(), 0, ggml_nbytes(t));
        }

        if (ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("computing rows failed");
        }

        float * to = out + first * row_width;
        for (size_t i = 0; i < sites.size(); ++i) {
            const int64_t width = sites[i].width;
            values.resize(n * width);
            ggml_backend_tensor_get(rows[i], values.data(), 0, values.size() * sizeof(float));
            for (int32_t j = 0; j < n; ++j) {
                std::copy_n(values.data() + j * width, width, to + j * row_width);
            }
            to += width;
        }
    }
}

int32_t llama_firstlayer_eval(llama_firstlayer_analysis * an,
                              const llama_token *         tokens,
                              int32_t                     n_tokens,
                              float *                     rows) {
    return llama_firstlayer_guarded(
        [&] {
            an->eval(tokens, n_tokens, rows);
            return 0;
        },
        -1);
}
