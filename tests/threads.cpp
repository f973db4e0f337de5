// Contexts on threads of their own share the row cache of one model. Built with ThreadSanitizer by scripts/test-threads.
//
//     threads MODEL.gguf MIB    prints a sum of logits for each context and repetition

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

static const int N_CONTEXTS    = 4;
static const int N_REPETITIONS = 3;
static const int N_BATCHES     = 12;

static float decode(llama_model * model, int id) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_batch              = 32;
    params.n_ubatch             = 32;
    params.n_threads            = 1 + id % 2;
    params.n_threads_batch      = params.n_threads;

    llama_context * ctx     = llama_init_from_model(model, params);
    const int       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::mt19937    rng(id);
    float           sum = 0.0f;
    for (int i = 0; i < N_BATCHES; ++i) {
        // prompts and pairs, of those that all contexts use often and of all; F32 weights have another kernel for a single
        // token, by which rows that find no room are computed
        std::vector<llama_token> tokens(i % 3 ? 2 : 20);
        for (auto & token : tokens) {
            token = rng() % (i % 2 ? 40 : n_vocab);
        }
        if (llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) != 0) {
            abort();
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        for (int j = 0; j < n_vocab; ++j) {
            sum += logits[j];
        }
    }
    llama_free(ctx);
    return sum;
}

int main(int, char ** argv) {
    llama_model_kv_override overrides[2] = {};
    overrides[0].tag                     = LLAMA_KV_OVERRIDE_TYPE_FLOAT;
    overrides[0].val_f64                 = atof(argv[2]);
    strcpy(overrides[0].key, "firstlayer.cache");

    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.kv_overrides       = overrides;
    params.n_gpu_layers       = 0;
    llama_model * model       = llama_model_load_from_file(argv[1], params);

    float                    sums[N_CONTEXTS][N_REPETITIONS];
    std::vector<std::thread> threads;
    for (int id = 0; id < N_CONTEXTS; ++id) {
        threads.emplace_back([&sums, model, id] {
            for (float & sum : sums[id]) {
                sum = decode(model, id);
            }
        });
    }
    for (auto & thread : threads) {
        thread.join();
    }
    llama_model_free(model);

    for (const auto & line : sums) {
        for (const float sum : line) {
            printf("%.6f ", sum);
        }
        printf("\n");
    }
}
