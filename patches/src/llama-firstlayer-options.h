#pragma once

#include "arg.h"
#include "common.h"

#include <algorithm>
#include <filesystem>
#include <regex>
#include <string>

// The options of the tools. They become overrides of the model, see llama-firstlayer-request.cpp.

// Set a string override, in several parts where it is long. The last of several options counts.
inline void llama_firstlayer_override(common_params & params, const std::string & key, const std::string & value) {
    static constexpr size_t N_BYTES = sizeof(llama_model_kv_override::val_str) - 1;

    auto &     all    = params.kv_overrides;
    const auto is_old = [&](const llama_model_kv_override & cur) {
        return cur.key[0] == 0 ||
               std::string(cur.key).rfind(key, 0) == 0;  // the end of the list, or a part of this one
    };
    all.erase(std::remove_if(all.begin(), all.end(), is_old), all.end());

    for (size_t i = 0; i == 0 || i * N_BYTES < value.size(); ++i) {
        llama_model_kv_override part = {};
        part.tag                     = LLAMA_KV_OVERRIDE_TYPE_STR;
        (i == 0 ? key : key + "." + std::to_string(i)).copy(part.key, sizeof(part.key) - 1);
        value.copy(part.val_str, N_BYTES, i * N_BYTES);
        all.push_back(part);
    }
}

template <typename F> void llama_firstlayer_add_options(F && add_opt) {
    add_opt(common_arg(
                { "--firstlayer" }, "FNAME",
                "tables of the model's first layer, from gguf-firstlayer convert --sidecar; with -hf, those beside the "
                "model in its repository are used by default",
                [](common_params & params, const std::string & value) {
                    llama_firstlayer_override(params, "firstlayer.file", value);
                })
                .set_env("LLAMA_ARG_FIRSTLAYER"));
    add_opt(common_arg({ "--firstlayer-cache" }, "N",
                       "MiB for rows of the first layer, which are computed once for each token; 0 for none, or 'auto' "
                       "(default: 0)",
                       [](common_params & params, const std::string & value) {
                           llama_firstlayer_override(params, "firstlayer.cache", value);
                       })
                .set_env("LLAMA_ARG_FIRSTLAYER_CACHE"));
    add_opt(common_arg({ "--check-tables" },
                       "before a converted model runs, compute all rows of its tables again, not only some, and refuse "
                       "the tables if they differ; the weights that they replace must be there",
                       [](common_params & params) { llama_firstlayer_override(params, "firstlayer.check", "all"); }));
    add_opt(common_arg({ "--demand" }, "{none,rows,embeddings}",
                       "what to leave out since nobody reads it: 'rows' of the last layers that no output needs; "
                       "'embeddings' for these, and for logits beside embeddings (default: none)",
                       [](common_params & params, const std::string & value) {
                           llama_firstlayer_override(params, "firstlayer.demand", value);
                       })
                .set_env("LLAMA_ARG_DEMAND")
                .set_excludes({ LLAMA_EXAMPLE_TTS }));  // which samples from logits of a context that gives embeddings
}

//
// -hf
//

// The path of a model's sidecar beside it, "" if the model is not named like one. -hf user/repo:QUANT looks for "QUANT." or
// "QUANT-", so even stock llama.cpp does not take this for a model
inline std::string llama_firstlayer_sidecar(const std::string & model) {
    static const std::regex ending("(-[0-9]{5}-of-[0-9]{5})?\\.gguf$");
    return std::regex_search(model, ending) ? std::regex_replace(model, ending, "_firstlayer.gguf") : "";
}

inline bool llama_firstlayer_is_sidecar(const std::string & path) {
    static const std::regex ending("_firstlayer\\.gguf$");
    return std::regex_search(path, ending);
}

// Use the sidecar that was downloaded with a model, unless the user named one.
inline void llama_firstlayer_use_sidecar(common_params & params) {
    const auto & all      = params.kv_overrides;
    const bool   is_named = std::any_of(all.begin(), all.end(), [](const llama_model_kv_override & cur) {
        return std::string(cur.key) == "firstlayer.file";
    });
    const auto   sidecar  = llama_firstlayer_sidecar(params.model.path);
    if (!params.model.hf_repo.empty() && !is_named && std::filesystem::exists(std::filesystem::u8path(sidecar))) {
        llama_firstlayer_override(params, "firstlayer.file", sidecar);
        params.kv_overrides.emplace_back();  // its end: a server downloads after the list was closed
    }
}
