#pragma once

#include "ggml.h"
#include "llama-mmap.h"

// The pages of weights that are mapped from a file. Where the system has no such advice, nothing happens.

// whether a weight lies in a file that is mapped: advice about other memory would clear it
bool llama_firstlayer_is_mapped(const ggml_tensor * t);

// Read memory and map its pages now.
void llama_firstlayer_populate(llama_memory_ranges mapped);

// Give pages back to the system.
void llama_firstlayer_release(const llama_memory_ranges & mapped);
