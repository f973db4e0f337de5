#include "llama-firstlayer-gather.h"

#include <cstring>

// From this size on, a lookup is shared by all threads. They sleep while a device computes: waking eight of them took 0.3 ms on a
// server with 16 cores, where lookups of up to 4 MB were faster with one thread, and of 8 MB with eight.
static const size_t N_BYTES_PARALLEL = 4 * 1024 * 1024;

// a custom operation: row i of the result is row index[i] of the table, as stored or as F32
static void compute_rows(ggml_tensor * dst, int ith, int nth, void *) {
    const ggml_tensor * table    = dst->src[0];
    const auto *        index    = (const int32_t *) dst->src[1]->data;
    const auto          to_float = dst->type == table->type ? nullptr : ggml_get_type_traits(table->type)->to_float;

    for (int64_t i = dst->ne[1] * ith / nth; i < dst->ne[1] * (ith + 1) / nth; ++i) {
        const char * from = (const char *) table->data + index[i] * table->nb[1];
        char *       to   = (char *) dst->data + i * dst->nb[1];
        if (to_float) {
            to_float(from, (float *) to, dst->ne[0]);
        } else {
            memcpy(to, from, dst->nb[1]);
        }
    }
}

static ggml_tensor * gather_as(ggml_context * ctx, ggml_type type, ggml_tensor * table, ggml_tensor * index) {
    const size_t  n_bytes = ggml_row_size(type, table->ne[0]) * index->ne[0];
    ggml_tensor * src[]   = { table, index };
    return ggml_custom_4d(ctx, type, table->ne[0], index->ne[0], 1, 1, src, 2, compute_rows,
                          n_bytes >= N_BYTES_PARALLEL ? GGML_N_TASKS_MAX : 1, nullptr);
}

static ggml_tensor * gather_f32(ggml_context * ctx, ggml_tensor * table, ggml_tensor * index) {
    const size_t n_bytes = sizeof(float) * table->ne[0] * index->ne[0];
    return n_bytes >= N_BYTES_PARALLEL ? gather_as(ctx, GGML_TYPE_F32, table, index) : ggml_get_rows(ctx, table, index);
}

static bool is_host(const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_is_host(t->buffer);
}

static bool is_device(ggml_backend_dev_t dev) {
    return ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

// Whether a device turns rows of a type into F32. A remote one says yes to everything, so these are only the types that CUDA,
// Metal, Vulkan and SYCL know.
static bool can_cast(ggml_backend_dev_t dev, const ggml_tensor * cast) {
    switch (cast->src[0]->type) {
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            return ggml_backend_dev_supports_op(dev, cast);
        default:
            return false;
    }
}

ggml_tensor * llama_firstlayer_gather(ggml_context *     ctx,
                                      ggml_tensor *      table,
                                      ggml_tensor *      index,
                                      ggml_backend_dev_t dev) {
    if (!is_host(table)) {
        return ggml_get_rows(ctx, table, index);  // where the table is
    }
    if (!is_device(dev)) {
        return gather_f32(ctx, table, index);
    }
    ggml_tensor * cast = ggml_cast(ctx, gather_as(ctx, table->type, table, index), GGML_TYPE_F32);
    // a copy, since the scheduler would take each view of the rows to the device separately
    return can_cast(dev, cast) ? cast : ggml_cont(ctx, gather_f32(ctx, table, index));
}

void llama_firstlayer_gather_in_place(ggml_context * ctx, ggml_tensor * lookup, ggml_backend_dev_t dev) {
    ggml_tensor * table = lookup->src[0];
    ggml_tensor * index = lookup->src[1];
    if (!is_device(dev) || !is_host(table) || !ggml_is_vector(index) || !ggml_is_matrix(table)) {
        return;
    }
    ggml_tensor * cast = ggml_cast(ctx, gather_as(ctx, table->type, table, index), GGML_TYPE_F32);
    if (can_cast(dev, cast)) {
        ggml_format_name(cast->src[0], "%s (stored)", ggml_get_name(lookup));
        lookup->op     = cast->op;
        lookup->src[0] = cast->src[0];
        lookup->src[1] = lookup;  // as ggml_cast has it
    }
}

ggml_tensor * llama_firstlayer_gathered(ggml_tensor * t) {
    if (t->op == GGML_OP_CONT || t->op == GGML_OP_CPY) {
        t = t->src[0];
    }
    return t->op == GGML_OP_GET_ROWS || t->op == GGML_OP_CUSTOM ? t : nullptr;
}
