#pragma once

#include <string>

struct llama_model_loader;

// What the user of a model asked for, by an override of the model or else for all models that this thread loads
struct llama_firstlayer_request {
    std::string tables;        // path of a sidecar, "" for none
    double      cache_mib;     // for rows that are computed when they are first needed; 0 for none, negative for "auto"
    std::string demand;        // what is left out since nobody reads it: "none", "rows" or "embeddings"
    bool        check_tables;  // all rows, not only some
};

// While it exists, this thread asks for nothing: not for the models that the analysis loads.
struct llama_firstlayer_no_request {
    llama_firstlayer_no_request();
    ~llama_firstlayer_no_request();

  private:
    const std::string path_tables;
    const double      cache_mib;
    const std::string demand;
};

// Throws std::runtime_error if an override has no such meaning.
llama_firstlayer_request llama_firstlayer_get_request(const llama_model_loader & ml);
