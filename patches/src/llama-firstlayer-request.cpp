#include "llama-firstlayer-request.h"

#include "llama-firstlayer.h"
#include "llama-impl.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

// overrides of a model, no keys of a file
static const char * const KV_FILE   = "firstlayer.file";
static const char * const KV_CACHE  = "firstlayer.cache";
static const char * const KV_DEMAND = "firstlayer.demand";
static const char * const KV_CHECK  = "firstlayer.check";

static thread_local std::string path_tables;
static thread_local double      cache_mib = 0.0;
static thread_local std::string demand    = "none";

void llama_firstlayer_set_tables(const char * path) {
    path_tables = path ? path : "";
}

void llama_firstlayer_set_cache(double mib) {
    cache_mib = mib;
}

void llama_firstlayer_set_demand(const char * what) {
    demand = what ? what : "none";
}

llama_firstlayer_no_request::llama_firstlayer_no_request() :
    path_tables(std::exchange(::path_tables, "")),
    cache_mib(std::exchange(::cache_mib, 0.0)),
    demand(std::exchange(::demand, "none")) {}

llama_firstlayer_no_request::~llama_firstlayer_no_request() {
    ::path_tables = path_tables;
    ::cache_mib   = cache_mib;
    ::demand      = demand;
}

// An override holds 127 bytes, so a long path comes in several.
static std::string requested_tables(const llama_model_loader & ml) {
    std::string res = path_tables;
    std::string key = KV_FILE;
    for (int i = 1; path_tables.empty(); ++i) {
        const auto it = ml.kv_overrides.find(key);
        if (it == ml.kv_overrides.end()) {
            break;
        }
        if (it->second.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
            throw std::runtime_error(format("override '%s' must be a string: the path of a sidecar", key.c_str()));
        }
        res += it->second.val_str;
        key = format("%s.%d", KV_FILE, i);
    }
    return res;
}

// MiB for a cache, negative for "auto", NaN if it is neither
static double parse_cache(const llama_model_kv_override & value) {
    double mib = NAN;
    if (value.tag == LLAMA_KV_OVERRIDE_TYPE_INT) {
        mib = value.val_i64;
    } else if (value.tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT) {
        mib = value.val_f64;
    } else if (value.tag == LLAMA_KV_OVERRIDE_TYPE_STR) {
        if (strcmp(value.val_str, "auto") == 0) {
            return -1.0;
        }
        std::istringstream in(value.val_str);
        in.imbue(std::locale::classic());
        if (!(in >> mib) || !in.eof()) {
            return NAN;
        }
    }
    return mib < 0.0 ? NAN : mib;
}

static double requested_cache(const llama_model_loader & ml) {
    const auto   it  = ml.kv_overrides.find(KV_CACHE);
    const double mib = it == ml.kv_overrides.end() ? cache_mib : parse_cache(it->second);
    if (!(mib <= 1024.0 * 1024.0)) {
        throw std::runtime_error(format("override '%s' must be a number of MiB or \"auto\"", KV_CACHE));
    }
    return mib;
}

// the value of an override, one of some words
static std::string requested(const llama_model_loader &       ml,
                             const char *                     key,
                             const std::string &              fallback,
                             const std::vector<std::string> & words) {
    const auto  it        = ml.kv_overrides.find(key);
    const bool  is_string = it != ml.kv_overrides.end() && it->second.tag == LLAMA_KV_OVERRIDE_TYPE_STR;
    std::string res       = it == ml.kv_overrides.end() ? fallback : is_string ? it->second.val_str : "";
    if (std::find(words.begin(), words.end(), res) == words.end()) {
        std::string known;
        for (const auto & word : words) {
            known += std::string(known.empty() ? "" : word == words.back() ? " or " : ", ") + '"' + word + '"';
        }
        throw std::runtime_error(format("override '%s' must be %s", key, known.c_str()));
    }
    return res;
}

llama_firstlayer_request llama_firstlayer_get_request(const llama_model_loader & ml) {
    return {
        requested_tables(ml),
        requested_cache(ml),
        requested(ml, KV_DEMAND, demand, { "none", "rows", "embeddings" }),
        requested(ml, KV_CHECK, "some", { "some", "all" }) == "all",
    };
}
