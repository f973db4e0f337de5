#pragma once

#include "ggml-backend.h"
#include "ggml.h"

// Lookups of rows in host memory. Small ones are ggml's; large ones run on all threads, and rows for a device go there as they
// are stored, to become F32 where they are used: ggml's lookup has one thread, and turns rows into F32 on the host.

// F32 [row width, n_tokens]: rows of a table, for layer 0 on `dev`; index: I32 [n_tokens]
ggml_tensor * llama_firstlayer_gather(ggml_context *     ctx,
                                      ggml_tensor *      table,
                                      ggml_tensor *      index,
                                      ggml_backend_dev_t dev);

// Do the same for a lookup that a graph has, in place. Nothing changes without a device, or if it cannot turn the type into F32.
void llama_firstlayer_gather_in_place(ggml_context * ctx, ggml_tensor * lookup, ggml_backend_dev_t dev);

// the node that reads the table, of a lookup or its copy; nullptr if t is neither
ggml_tensor * llama_firstlayer_gathered(ggml_tensor * t);
