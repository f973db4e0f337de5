#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-firstlayer-analysis.h"
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
    ggml_backend_dev_t         dev   = ggml_backend_get_device(backend.get());
    const size_t               align = ggml_backend_buft_get_alignment(buft);

    t->buffer = nullptr;
    t->data   = nullptr;

    std::vector<no_init<uint8_t>> buf(ml->use_mmap ? 0 : size);
    void *                        data = const_cast<void *>(ml->load_data_range(weight, 0, size, buf.data()));

    if (ml->use_mmap && buft == ggml_backend_dev_buffer_type(dev) && (uintptr_t) data % align == 0) {
        bufs.emplace_back(ggml_backend_dev_buffer_from_host_ptr(dev, data, size, size));
        ggml_backend_tensor_alloc(bufs.back().get(), t, data);
        return;
    }

    bufs.emplace_back(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, t)));
    if (!bufs.back()) {
        throw std::runtime_error(format("cannot allocate %zu bytes for weight '%s'", size, ggml_get_name(t)));
    }
    ggml_backend_buffer_set_usage(bufs.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_alloc(bufs.back().get(), t, ggml_backend_buffer_get_base(bufs.back().get()));
    ggml_backend_tensor_set(t, data, 0, size);
}

void llama_firstlayer_analysis::prepare_eval() {
    model->firstlayer->observe = [this](const llm_graph_params & params, const llama_firstlayer_walk & walk) {
        walks.insert_or_assign(params.gtype, walk);
    };
    builder->build(n_batch, n_batch);

    std::vector<std::string> splits;
    ml = std::make_unique<llama_model_loader>(nullptr, nullptr, nullptr, path, splits, nullptr, LLAMA_LOAD_MODE_MMAP,
                                              false, false, true, nullptr, nullptr);
    ml->init_mappings(/*prefetch =*/false);

    backend.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend) {
        throw std::runtime_error("no CPU backend found");
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    if (auto * set_n_threads =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set_n_threads(backend.get(), n_threads);
    }

    const size_t           max_nodes = builder->ctx->graph_max_nodes(n_batch);
    const ggml_init_params params    = {
        /*.mem_size   =*/ggml_graph_overhead_custom(max_nodes, false),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx_eval.reset(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(ctx_eval.get(), max_nodes, false);

    roots.clear();
    for (const auto & site : sites) {
        const auto &  walk = walks.at(site.gtype);
        ggml_tensor * root = find_sites(walk).at(site.recipe);
        ggml_set_output(root->view_src ? root->view_src : root);
        ggml_build_forward_expand(graph, root);
        roots.push_back({ &walk, root });
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

    alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
    if (!ggml_gallocr_alloc_graph(alloc.get(), graph)) {
        throw std::runtime_error("cannot allocate the memory for computing rows");
    }

    gf = graph;
}

void llama_firstlayer_analysis::eval(const llama_token * tokens, int32_t n_tokens, float * rows) {
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

    for (int32_t first = 0; first < n_tokens; first += n_batch) {
        const int32_t n = std::min(n_batch, n_tokens - first);

        std::vector<llama_token> batch(tokens + first, tokens + first + n);
        batch.resize(n_batch, batch.back());
        for (const auto & [_, walk] : walks) {
            for (ggml_tensor * inp : walk.tokens()) {
                if (inp->buffer) {
                    ggml_backend_tensor_set(inp, batch.data(), 0, ggml_nbytes(inp));
                }
            }
        }

        if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error("computing rows failed");
        }

        int64_t column = 0;
        for (const auto & [walk, root] : roots) {
            int64_t i[GGML_MAX_DIMS];
            for (i[3] = 0; i[3] < root->ne[3]; ++i[3]) {
                for (i[2] = 0; i[2] < root->ne[2]; ++i[2]) {
                    for (i[1] = 0; i[1] < root->ne[1]; ++i[1]) {
                        // the values along axis 0 belong to one token
                        int64_t token;
                        int64_t offset;
                        i[0] = 0;
                        walk->locate(root, i, token, offset);
                        if (token < n) {
                            const char * src = (const char *) root->data + i[1] * root->nb[1] + i[2] * root->nb[2] +
                                               i[3] * root->nb[3];
                            memcpy(rows + (first + token) * row_width + column + offset, src,
                                   root->ne[0] * sizeof(float));
                        }
                    }
                }
            }
            column += walk->width(root);
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
