#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>

// What this project knows about ggml's operations: one row for each, in llama-firstlayer-ops.cpp.

// An operand of a node, and where its tokens are
struct llama_firstlayer_operand {
    const ggml_tensor * t        = nullptr;
    bool                pure     = false;  // computed from token ids, row by row
    bool                constant = false;
    uint8_t             axes     = 0;      // bit d: the tokens extend along axis d; axes of size 1 may be included

    // an axis of size 1 has no second element to mix up, so its bit does not matter
    bool spans(int d) const { return (axes >> d & 1) && t->ne[d] > 1; }
};

// Whether a row of t needs only the same row of its operands, and the axes of t along which the tokens then extend.
// src: the operands, the first of which always exists; axes: in, those of the first operand; out, those of t
using llama_firstlayer_axis_rule = bool (*)(const ggml_tensor *              t,
                                            const llama_firstlayer_operand * src,
                                            uint8_t &                        axes);

// For each operand of a node, the axis along which some of its rows are needed; ALL where it is needed as a whole
using llama_firstlayer_row_axes = std::array<int8_t, GGML_MAX_SRC>;

static constexpr int LLAMA_FIRSTLAYER_ALL_ROWS = -1;

// Whether t is row-wise along an axis: its element i there needs only element i of its operands, along their axes, and what
// they need as a whole. src_axes: in, all ALL; out, the axes.
using llama_firstlayer_row_rule = bool (*)(const ggml_tensor * t, int axis, llama_firstlayer_row_axes & src_axes);

enum llama_firstlayer_op_trait : uint32_t {
    LLAMA_FIRSTLAYER_OP_LAYOUT       = 1 << 0,  // moves no data
    LLAMA_FIRSTLAYER_OP_COPY         = 1 << 1,
    LLAMA_FIRSTLAYER_OP_PRODUCT      = 1 << 2,  // of matrices
    LLAMA_FIRSTLAYER_OP_READS_GAPS   = 1 << 3,  // reads rows with gaps between them on every backend, unless in place
    LLAMA_FIRSTLAYER_OP_HAS_TARGET   = 1 << 4,  // its destination is an operand, so it reads gaps even in place
    LLAMA_FIRSTLAYER_OP_PICKS_ROWS   = 1 << 5,  // a token reads only some rows of its first operand
    LLAMA_FIRSTLAYER_OP_PICKS_EXPERT = 1 << 6,  // a token reads only some matrices of its first operand
    LLAMA_FIRSTLAYER_OP_PRINTS_SHAPE = 1 << 7,  // its recipe prints the shape of the result instead of parameters
    LLAMA_FIRSTLAYER_OP_PRINTS_TYPE  = 1 << 8,  // its recipe prints the type of the result instead
};

struct llama_firstlayer_op {
    // nullptr: not known to be row-wise; layout operations are judged by their strides instead
    llama_firstlayer_axis_rule axis_rule = nullptr;
    // nullptr: not known to be row-wise in the other direction
    llama_firstlayer_row_rule  row_rule  = nullptr;
    uint32_t                   traits    = 0;
    // names of its parameters in a recipe, in the order of the words of op_params: ":f" marks a float, "" a parameter that
    // recipes leave out; a parameter without a name is printed under its number
    const char *               params[5] = {};

    bool is(llama_firstlayer_op_trait trait) const { return traits & trait; }
};

extern const std::array<llama_firstlayer_op, GGML_OP_COUNT> LLAMA_FIRSTLAYER_OPS;

inline const llama_firstlayer_op & llama_firstlayer_get_op(const ggml_tensor * t) {
    return LLAMA_FIRSTLAYER_OPS[t->op];
}

// Translate an address to the same one in memory where there are m instead of n tokens, `stride` bytes apart; false if it is
// not one of token 0
bool llama_firstlayer_shrink(size_t & address, size_t stride, int64_t n, int64_t m);

// whether a view holds all tokens in order, and nothing in it crosses from one token to the next
bool llama_firstlayer_is_packed(const ggml_tensor * t, uint8_t axes, size_t stride, size_t offset, int64_t n_tokens);

// Begin a graph anew, with the inputs of a context: they are set for every batch, so they must be allocated, even those that
// nothing reads
void llama_firstlayer_restart(ggml_context * ctx, ggml_cgraph * gf);

// add a node of the graph as it was
void llama_firstlayer_add_node(ggml_cgraph * gf, ggml_tensor * t);
