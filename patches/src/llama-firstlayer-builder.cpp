#include "llama-firstlayer-builder.h"

#include "gguf.h"
#include "llama-context.h"
#include "llama-firstlayer-request.h"
#include "llama-memory.h"

#include <algorithm>
#include <stdexcept>
#include <thread>

// Overrides that reduce a model's vocabulary to its size: graphs need nothing else of it, and loading it takes longer than
// everything else. The list ends with an empty override.
static std::vector<llama_model_kv_override> without_vocab(const char * path_model) {
    std::vector<llama_model_kv_override> res;

    const gguf_context_ptr meta(gguf_init_from_file(path_model, { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
    if (!meta) {
        throw std::runtime_error("llama.cpp cannot read the file");
    }
    const int64_t id_arch   = gguf_find_key(meta.get(), "general.architecture");
    const int64_t id_tokens = gguf_find_key(meta.get(), "tokenizer.ggml.tokens");
    if (id_arch >= 0 && gguf_get_kv_type(meta.get(), id_arch) == GGUF_TYPE_STRING && id_tokens >= 0 &&
        gguf_get_kv_type(meta.get(), id_tokens) == GGUF_TYPE_ARRAY) {
        llama_model_kv_override model = {};
        model.tag                     = LLAMA_KV_OVERRIDE_TYPE_STR;
        snprintf(model.key, sizeof(model.key), "tokenizer.ggml.model");
        snprintf(model.val_str, sizeof(model.val_str), "no_vocab");
        res.push_back(model);

        llama_model_kv_override size = {};
        size.tag                     = LLAMA_KV_OVERRIDE_TYPE_INT;
        snprintf(size.key, sizeof(size.key), "%s.vocab_size", gguf_get_val_str(meta.get(), id_arch));
        size.val_i64 = gguf_get_arr_n(meta.get(), id_tokens);
        res.push_back(size);
    }
    res.push_back({});
    return res;
}

llama_model_ptr llama_firstlayer_load_metadata(const char * path_model, bool load_vocab, ggml_backend_dev_t dev) {
    ggml_backend_dev_t devices[] = { dev, nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices            = devices;
    params.n_gpu_layers       = dev ? -1 : 0;
    params.load_mode          = LLAMA_LOAD_MODE_NONE;
    params.no_alloc           = true;
    params.load_mtp           = true;

    std::vector<llama_model_kv_override> overrides;
    if (!load_vocab) {
        overrides           = without_vocab(path_model);
        params.kv_overrides = overrides.data();
    }

    const llama_firstlayer_no_request no_request;
    llama_model_ptr                   res(llama_model_load_from_file(path_model, params));
    if (!res) {
        throw std::runtime_error("llama.cpp cannot load the model");
    }
    return res;
}

static llama_context_params small_context(const llama_model & model, uint32_t n_batch) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 2 * n_batch;
    params.n_batch              = n_batch;
    params.n_ubatch             = n_batch;
    params.n_seq_max            = llama_model_is_recurrent(&model) || llama_model_is_hybrid(&model) ? 2 : 1;
    params.n_threads_batch      = std::min<int32_t>(params.n_threads_batch, std::thread::hardware_concurrency());
    params.flash_attn_type      = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // every architecture runs without it
    return params;
}

llama_firstlayer_builder::llama_firstlayer_builder(llama_model & model, uint32_t n_batch) :
    llama_firstlayer_builder(model, small_context(model, n_batch)) {}

llama_firstlayer_builder::llama_firstlayer_builder(llama_model & model, const llama_context_params & params) :
    ctx(llama_init_from_model(&model, params)),
    n_seqs(params.n_seq_max) {
    if (!ctx) {
        throw std::runtime_error("llama.cpp cannot build a graph of this model on its own");
    }
}

void llama_firstlayer_builder::build(uint32_t n_tokens, uint32_t n_outputs) const {
    llama_memory_context_ptr mctx;
    if (ctx->get_memory()) {
        mctx = ctx->get_memory()->init_full();
    }
    if (!ctx->graph_reserve(n_tokens, n_seqs, n_outputs, mctx.get(), /*split_only =*/true)) {
        throw std::runtime_error("llama.cpp cannot build a graph of this model");
    }
}
