#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-firstlayer-api.h"
#include "llama-firstlayer.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <stdexcept>
#include <thread>

//
// trial
//

struct llama_firstlayer_trial {
    llama_firstlayer_trial(const char *                      path_model,
                           const llama_firstlayer_analysis * an,
                           int32_t                           n_ctx,
                           int32_t                           n_batch);

    ~llama_firstlayer_trial() { llama_batch_free(batch); }

    const float * decode(const llama_token * tokens, int32_t n_tokens, llama_pos first);

    ggml_context_ptr        ctx_rows;
    ggml_backend_buffer_ptr buf_rows;
    llama_model_ptr         model;
    llama_context_ptr       ctx;
    llama_batch             batch;
    float *                 rows;
};

llama_firstlayer_trial::llama_firstlayer_trial(const char *                      path_model,
                                               const llama_firstlayer_analysis * an,
                                               int32_t                           n_ctx,
                                               int32_t                           n_batch) {
    static ggml_backend_dev_t devices[] = { nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices            = devices;
    params.n_gpu_layers       = 0;

    model.reset(llama_model_load_from_file(path_model, params));
    if (!model) {
        throw std::runtime_error("llama.cpp cannot load the model");
    }
    if (llama_model_has_encoder(model.get())) {
        throw std::runtime_error("a model with an encoder has no next-token distribution of its own");
    }

    // sites begin at multiples of 4 columns, as in a file
    auto    firstlayer = std::make_unique<llama_firstlayer>();
    int64_t width      = 0;
    for (int32_t i = 0; i < llama_firstlayer_n_sites(an); ++i) {
        llama_firstlayer_site site;
        llama_firstlayer_get_site(an, i, &site);
        firstlayer->sites.push_back({ site.name, site.recipe, 0, width, site.width, true });
        width += GGML_PAD(site.width, 4);
    }

    // the memory of rows that are never used is never touched
    const ggml_init_params rows_params = {
        /*.mem_size   =*/ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ctx_rows.reset(ggml_init(rows_params));
    ggml_tensor * table = ggml_new_tensor_2d(ctx_rows.get(), GGML_TYPE_F32, width, model->vocab.n_tokens());
    buf_rows.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_rows.get(), ggml_backend_cpu_buffer_type()));
    if (!buf_rows) {
        throw std::runtime_error("cannot allocate the rows");
    }
    ggml_backend_buffer_set_usage(buf_rows.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);

    firstlayer->tables.push_back({ "0.table", table });
    firstlayer->set_weights(*model);
    model->firstlayer = std::move(firstlayer);
    rows              = (float *) table->data;

    const int32_t n_threads = std::max(1u, std::thread::hardware_concurrency());

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = n_ctx;
    cparams.n_batch              = n_batch;
    cparams.n_ubatch             = n_batch;
    cparams.n_threads            = n_threads;
    cparams.n_threads_batch      = n_threads;
    cparams.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // every architecture runs without

    ctx.reset(llama_init_from_model(model.get(), cparams));
    if (!ctx) {
        throw std::runtime_error("llama.cpp cannot run this model on its own");
    }
    if (!ctx->get_gf_res_reserve()->get_logits()) {
        throw std::runtime_error("the model has no next-token distribution");
    }
    batch = llama_batch_init(n_batch, 0, 1);  // after all that throws
}

const float * llama_firstlayer_trial::decode(const llama_token * tokens, int32_t n_tokens, llama_pos first) {
    if (n_tokens < 1 || n_tokens > (int32_t) llama_n_batch(ctx.get())) {
        throw std::runtime_error(format("%d tokens are no batch of up to %d", n_tokens, llama_n_batch(ctx.get())));
    }
    if (first == 0) {
        llama_memory_clear(llama_get_memory(ctx.get()), true);
    }
    batch.n_tokens = n_tokens;
    for (int32_t i = 0; i < n_tokens; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = first + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    if (llama_decode(ctx.get(), batch) != 0) {
        throw std::runtime_error("llama.cpp cannot decode");
    }
    return llama_get_logits(ctx.get());
}

llama_firstlayer_trial * llama_firstlayer_trial_open(const char *                      path_model,
                                                     const llama_firstlayer_analysis * an,
                                                     int32_t                           n_ctx,
                                                     int32_t                           n_batch) {
    return llama_firstlayer_guarded([&] { return new llama_firstlayer_trial(path_model, an, n_ctx, n_batch); },
                                    (llama_firstlayer_trial *) nullptr);
}

void llama_firstlayer_trial_close(llama_firstlayer_trial * trial) {
    delete trial;
}

float * llama_firstlayer_trial_rows(llama_firstlayer_trial * trial) {
    return trial->rows;
}

const float * llama_firstlayer_trial_decode(llama_firstlayer_trial * trial,
                                            const llama_token *      tokens,
                                            int32_t                  n_tokens,
                                            int32_t                  first) {
    return llama_firstlayer_guarded([&] { return trial->decode(tokens, n_tokens, first); }, (const float *) nullptr);
}
