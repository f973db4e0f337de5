#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>

// What this project knows of ggml's operations: one row for each, in llama-firstlayer-ops.cpp.

// An operand of a node, and where its tokens are
struct llama_firstlayer_operand {
    const ggml_tensor * t        = nullptr;
    bool                pure     = false;  // computed from token ids, row by row
    bool                constant = false;
    uint8_t             axes     = 0;      // bit d: the tokens extend along axis d; axes of size 1 may be counted in

    // axes of size 1 hold no second element to mix up, whatever they are counted as
    bool spans(int d) const { return (axes >> d & 1) && t->ne[d] > 1; }
};

// Whether a row of t needs only the same row of its operands, and the axes of t along which the tokens then extend.
// src: the operands, of which the first is there; axes: those of the first, to be changed
using llama_firstlayer_axis_rule = bool (*)(const ggml_tensor *              t,
                                            const llama_firstlayer_operand * src,
                                            uint8_t &                        axes);

enum llama_firstlayer_op_trait : uint32_t {
    LLAMA_FIRSTLAYER_OP_LAYOUT       = 1 << 0,  // moves no data
    LLAMA_FIRSTLAYER_OP_COPY         = 1 << 1,
    LLAMA_FIRSTLAYER_OP_PRODUCT      = 1 << 2,  // of matrices
    LLAMA_FIRSTLAYER_OP_READS_GAPS   = 1 << 3,  // reads rows with gaps between them on every backend, unless in place
    LLAMA_FIRSTLAYER_OP_HAS_TARGET   = 1 << 4,  // what it writes into is an operand, so it reads gaps even so
    LLAMA_FIRSTLAYER_OP_PICKS_ROWS   = 1 << 5,  // of its first operand, a token reads some rows
    LLAMA_FIRSTLAYER_OP_PICKS_EXPERT = 1 << 6,  // of its first operand, a token reads some matrices
    LLAMA_FIRSTLAYER_OP_PRINTS_SHAPE = 1 << 7,  // its recipe prints the shape of the result instead of parameters
    LLAMA_FIRSTLAYER_OP_PRINTS_TYPE  = 1 << 8,  // or its type
};

struct llama_firstlayer_op {
    // nullptr: not row-wise, as far as is known; of layout operations, strides tell
    llama_firstlayer_axis_rule axis_rule = nullptr;
    uint32_t                   traits    = 0;
    // names of its parameters in a recipe, in the order of their words: ":f" marks a float, "" one that is no part of the
    // expression; those without a name are called by their number
    const char *               params[5] = {};

    bool is(llama_firstlayer_op_trait trait) const { return traits & trait; }
};

extern const std::array<llama_firstlayer_op, GGML_OP_COUNT> LLAMA_FIRSTLAYER_OPS;

inline const llama_firstlayer_op & llama_firstlayer_get_op(const ggml_tensor * t) {
    return LLAMA_FIRSTLAYER_OPS[t->op];
}

// whether a view holds all tokens in their order, and nothing that crosses from one token to the next
bool llama_firstlayer_is_packed(const ggml_tensor * t, uint8_t axes, size_t stride, size_t offset, int64_t n_tokens);
