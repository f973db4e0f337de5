#include "llama-firstlayer-builder.h"

#include "llama-context.h"
#include "llama-memory.h"

#include <algorithm>
#include <stdexcept>
#include <thread>

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
