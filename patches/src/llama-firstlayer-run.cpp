#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-cpp.h"
#include "llama-firstlayer-guard.h"
#include "llama-firstlayer.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <stdexcept>
#include <thread>

//
// run
//

struct llama_firstlayer_run {
    llama_firstlayer_run(const char *                      path_model,
                         int32_t                           n_ctx,
                         int32_t                           n_batch,
                         int32_t                           n_threads,
                         bool                              constants,
                         enum llama_pooling_type           pooling,
                         const llama_firstlayer_analysis * an);

    ~llama_firstlayer_run() { llama_batch_free(batch); }

    void set_rows(const llama_firstlayer_analysis * an);

    // decode the next tokens of the text, or embed them
    void decode(const llama_token * tokens, int32_t n_tokens, bool all_logits);

    // logits of the last token, or the embedding; waits until they are computed
    const float * last() const;

    int32_t n_out() const;
    bool    keep(int32_t n);

    bool embeds() const { return pooling != LLAMA_POOLING_TYPE_UNSPECIFIED; }

    ggml_context_ptr        ctx_rows;
    ggml_backend_buffer_ptr buf_rows;
    llama_model_ptr         model;
    llama_context_ptr       ctx;
    llama_batch             batch;
    enum llama_pooling_type pooling;
    float *                 rows   = nullptr;
    llama_pos               n_past = 0;
};

llama_firstlayer_run::llama_firstlayer_run(const char *                      path_model,
                                           int32_t                           n_ctx,
                                           int32_t                           n_batch,
                                           int32_t                           n_threads,
                                           bool                              constants,
                                           enum llama_pooling_type           pooling,
                                           const llama_firstlayer_analysis * an) :
    pooling(pooling) {
    static ggml_backend_dev_t devices[] = { nullptr };

    llama_model_params params = llama_model_default_params();
    if (an) {
        params.devices      = devices;
        params.n_gpu_layers = 0;
    }

    model.reset(llama_model_load_from_file(path_model, params));
    if (!model) {
        throw std::runtime_error("llama.cpp cannot load the model");
    }
    if (llama_model_has_encoder(model.get())) {
        if (!embeds()) {
            throw std::runtime_error("a model with an encoder has no next-token distribution of its own");
        }
        if (llama_model_has_decoder(model.get())) {
            throw std::runtime_error(
                "a model with an encoder and a decoder, or with hidden states as input, cannot run on its own");
        }
    }
    if (an) {
        set_rows(an);
    }
    if (constants) {
        if (!model->firstlayer || model->firstlayer->tables.empty()) {
            throw std::runtime_error("the model has no tables");
        }
        model->firstlayer->use_constants(*model, n_batch);
    }

    if (n_threads <= 0) {
        n_threads = std::max(1u, std::thread::hardware_concurrency());
    }
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = n_ctx;
    cparams.n_batch              = n_batch;
    cparams.n_ubatch             = n_batch;
    cparams.n_threads            = n_threads;
    cparams.n_threads_batch      = n_threads;
    cparams.embeddings           = embeds();
    cparams.pooling_type         = pooling;
    if (an) {
        cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // every architecture runs without it
    }

    ctx.reset(llama_init_from_model(model.get(), cparams));
    if (!ctx) {
        throw std::runtime_error("llama.cpp cannot run this model on its own");
    }
    if (!embeds() && !ctx->get_gf_res_reserve()->get_logits()) {
        throw std::runtime_error("the model has no next-token distribution");
    }
    batch = llama_batch_init(n_batch, 0, 1);  // last: an exception after it would leak it
}

void llama_firstlayer_run::set_rows(const llama_firstlayer_analysis * an) {
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

    firstlayer->tables.push_back({ "0.table", table, nullptr });
    firstlayer->set_weights(*model);
    model->firstlayer = std::move(firstlayer);
    rows              = (float *) table->data;
}

void llama_firstlayer_run::decode(const llama_token * tokens, int32_t n_tokens, bool all_logits) {
    if (n_tokens < 1 || n_tokens > (int32_t) llama_n_batch(ctx.get())) {
        throw std::runtime_error(format("cannot decode %d tokens: give 1 to %d", n_tokens, llama_n_batch(ctx.get())));
    }
    if (embeds()) {
        keep(0);
    }
    batch.n_tokens = n_tokens;
    for (int32_t i = 0; i < n_tokens; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = n_past + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = all_logits || i == n_tokens - 1;
    }
    if (llama_decode(ctx.get(), batch) != 0) {
        throw std::runtime_error("llama.cpp cannot decode");
    }
    n_past += n_tokens;
}

const float * llama_firstlayer_run::last() const {
    const float * res = !embeds()                          ? llama_get_logits_ith(ctx.get(), -1) :
                        pooling == LLAMA_POOLING_TYPE_NONE ? llama_get_embeddings_ith(ctx.get(), -1) :
                                                             llama_get_embeddings_seq(ctx.get(), 0);
    if (!res) {
        throw std::runtime_error("llama.cpp gives no output");
    }
    return res;
}

int32_t llama_firstlayer_run::n_out() const {
    return !embeds()                          ? model->vocab.n_tokens() :
           pooling == LLAMA_POOLING_TYPE_RANK ? (int32_t) llama_model_n_cls_out(model.get()) :
                                                llama_model_n_embd_out(model.get());
}

bool llama_firstlayer_run::keep(int32_t n) {
    const llama_memory_t memory = llama_get_memory(ctx.get());
    if (n == 0) {
        llama_memory_clear(memory, true);
    } else if (!llama_memory_seq_rm(memory, 0, n, -1)) {
        return false;
    }
    n_past = n;
    return true;
}

llama_firstlayer_run * llama_firstlayer_run_init(const char *                      path_model,
                                                 int32_t                           n_ctx,
                                                 int32_t                           n_batch,
                                                 int32_t                           n_threads,
                                                 bool                              constants,
                                                 enum llama_pooling_type           pooling,
                                                 const llama_firstlayer_analysis * an) {
    return llama_firstlayer_guarded(
        [&] { return new llama_firstlayer_run(path_model, n_ctx, n_batch, n_threads, constants, pooling, an); },
        (llama_firstlayer_run *) nullptr);
}

void llama_firstlayer_run_free(llama_firstlayer_run * run) {
    delete run;
}

int32_t llama_firstlayer_run_n_vocab(const llama_firstlayer_run * run) {
    return run->model->vocab.n_tokens();
}

float * llama_firstlayer_run_rows(llama_firstlayer_run * run) {
    return run->rows;
}

const float * llama_firstlayer_run_decode(llama_firstlayer_run * run, const llama_token * tokens, int32_t n_tokens) {
    return llama_firstlayer_guarded(
        [&] {
            run->decode(tokens, n_tokens, true);
            return (const float *) llama_get_logits(run->ctx.get());
        },
        (const float *) nullptr);
}

const float * llama_firstlayer_run_last(llama_firstlayer_run * run, const llama_token * tokens, int32_t n_tokens) {
    return llama_firstlayer_guarded(
        [&] {
            run->decode(tokens, n_tokens, false);
            return run->last();
        },
        (const float *) nullptr);
}

int32_t llama_firstlayer_run_n_out(const llama_firstlayer_run * run) {
    return run->n_out();
}

int64_t llama_firstlayer_run_time(llama_firstlayer_run * run,
                                  const llama_token *    tokens,
                                  int32_t                n_tokens,
                                  int32_t                n_batch) {
    return llama_firstlayer_guarded(
        [&] {
            const int64_t start = ggml_time_us();
            for (int32_t i = 0; i < n_tokens; i += n_batch) {
                run->decode(tokens + i, std::min(n_batch, n_tokens - i), false);
                run->last();
            }
            return ggml_time_us() - start;
        },
        (int64_t) -1);
}

bool llama_firstlayer_run_left_out(const llama_firstlayer_run * run) {
    return run->model->firstlayer && run->model->firstlayer->told_demand;
}

const llama_model * llama_firstlayer_run_get_model(const llama_firstlayer_run * run) {
    return run->model.get();
}

bool llama_firstlayer_run_keep(llama_firstlayer_run * run, int32_t n) {
    return run->keep(n);
}
