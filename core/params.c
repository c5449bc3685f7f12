/* core/params.c - slabs of device memory, filled through one page-locked staging buffer.
 *
 * A tensor of a slab's size or more gets a slab of its own; smaller ones share the open slab, so that a model of hundreds
 * of tensors costs a few device allocations. On the host backend device memory is host memory and nothing is staged. */
#include "core/params.h"

#include <string.h>

#include "core/arena.h"
#include "core/memory.h"

#define SLAB_BYTES    ((size_t)32 << 20)
#define STAGING_BYTES ((size_t)4 << 20)

struct rf_params {
    rf_backend *backend;
    void **slabs;
    size_t num_slabs, cap_slabs;
    rf_arena open; /* over the newest shared slab; base NULL before the first */
    size_t bytes;
    int64_t num_elems;
    size_t tensor_bytes;
    rf_stream *stream; /* with staging: made by the first copy to a device that is not the host */
    void *staging;
};

rf_status rf_params_create(rf_params **out, rf_backend *backend, rf_error *err) {
    *out = rf_alloc_zero(1, sizeof **out);
    if (!*out) return rf_fail(err, RF_ERR_MEMORY, "params: no memory");
    (*out)->backend = backend;
    return RF_OK;
}

void rf_params_destroy(rf_params *params) {
    if (!params) return;
    rf_stream_destroy(params->stream);
    rf_backend_free_pinned(params->backend, params->staging);
    for (size_t i = 0; i < params->num_slabs; i++) rf_backend_free(params->backend, params->slabs[i]);
    rf_free(params->slabs);
    rf_free(params);
}

static rf_status add_slab(rf_params *params, void **out, size_t bytes, rf_error *err) {
    if (params->num_slabs == params->cap_slabs) {
        size_t cap = params->cap_slabs ? 2 * params->cap_slabs : 8;
        void **grown = rf_realloc(params->slabs, cap * sizeof *grown);
        if (!grown) return rf_fail(err, RF_ERR_MEMORY, "params: no memory for a list of %zu slabs", cap);
        params->slabs = grown;
        params->cap_slabs = cap;
    }
    rf_status st = rf_backend_alloc(params->backend, out, bytes, err);
    if (st != RF_OK) return rf_fail_prefix(err, st, "params, %zu bytes held", params->bytes);
    params->slabs[params->num_slabs++] = *out;
    params->bytes += bytes;
    return RF_OK;
}

rf_status rf_params_take(rf_params *params, void **out, rf_dtype dtype, size_t num, rf_error *err) {
    *out = NULL;
    size_t elem_bytes = rf_dtype_bytes(dtype), bytes;
    if (elem_bytes == 0) return rf_fail(err, RF_ERR_DTYPE, "params: dtype %d is not known", (int)dtype);
    if (num == 0) return rf_fail(err, RF_ERR_ARGUMENT, "params: a tensor of 0 elements");
    if (__builtin_mul_overflow(num, elem_bytes, &bytes) || bytes > PTRDIFF_MAX) {
        return rf_fail(err, RF_ERR_MEMORY, "params: %zu elements of %s pass the address space", num,
                       rf_dtype_name(dtype));
    }

    if (bytes >= SLAB_BYTES) {
        rf_status st = add_slab(params, out, bytes, err);
        if (st != RF_OK) return st;
    } else if (!params->open.base || rf_arena_take(&params->open, out, "tensor", num, elem_bytes, NULL) != RF_OK) {
        void *slab;
        rf_status st = add_slab(params, &slab, SLAB_BYTES, err);
        if (st != RF_OK) return st;
        rf_arena_init(&params->open, slab, SLAB_BYTES);
        st = rf_arena_take(&params->open, out, "tensor", num, elem_bytes, err);
        if (st != RF_OK) return st;
    }
    params->num_elems += (int64_t)num;
    params->tensor_bytes += num * rf_dtype_bytes(dtype);
    return RF_OK;
}

rf_status rf_params_write(rf_params *params, void *device, rf_dtype dtype, const float *host, size_t num,
                          rf_error *err) {
    if (dtype != RF_DTYPE_F32 && dtype != RF_DTYPE_F16 && dtype != RF_DTYPE_BF16) {
        return rf_fail(err, RF_ERR_DTYPE, "params: floats cannot be stored as %s", rf_dtype_name(dtype));
    }
    if (rf_backend_get_kind(params->backend) == RF_BACKEND_CPU) {
        rf_convert(device, dtype, host, RF_DTYPE_F32, num);
        return RF_OK;
    }

    rf_status st = RF_OK;
    if (!params->stream) st = rf_stream_create(&params->stream, params->backend, err);
    if (st == RF_OK && !params->staging) {
        st = rf_backend_alloc_pinned(params->backend, &params->staging, STAGING_BYTES, err);
    }
    size_t elem_bytes = rf_dtype_bytes(dtype), chunk = STAGING_BYTES / elem_bytes;
    for (size_t done = 0; st == RF_OK && done < num; done += chunk) {
        size_t now = num - done < chunk ? num - done : chunk;
        rf_convert(params->staging, dtype, host + done, RF_DTYPE_F32, now);
        st = rf_stream_upload(params->stream, (char *)device + done * elem_bytes, params->staging, now * elem_bytes,
                              err);
        /* the next chunk overwrites the staging buffer */
        if (st == RF_OK) st = rf_stream_synchronize(params->stream, err);
    }
    return st;
}

rf_status rf_params_put(rf_params *params, void **out, rf_dtype dtype, const float *host, size_t num, rf_error *err) {
    rf_status st = rf_params_take(params, out, dtype, num, err);
    if (st == RF_OK) st = rf_params_write(params, *out, dtype, host, num, err);
    return st;
}

size_t rf_params_bytes(const rf_params *params) {
    return params->bytes;
}

size_t rf_params_tensor_bytes(const rf_params *params) {
    return params->tensor_bytes;
}

int64_t rf_params_num_elems(const rf_params *params) {
    return params->num_elems;
}

rf_status rf_weights_read_f32(const rf_weights *w, const char *name, int rank, const int64_t *shape, float **out,
                              rf_error *err) {
    *out = NULL;
    rf_tensor t;
    rf_status st = rf_weights_get_shaped(w, name, rank, shape, &t, err);
    if (st != RF_OK) return st;
    if (t.dtype != RF_DTYPE_F32 && t.dtype != RF_DTYPE_F16 && t.dtype != RF_DTYPE_BF16) {
        return rf_fail(err, RF_ERR_DTYPE, "%s: dtype %s where f32, f16 or bf16 is wanted", name,
                       rf_dtype_name(t.dtype));
    }
    size_t num = (size_t)rf_tensor_num_elems(&t), bytes;
    if (__builtin_mul_overflow(num, sizeof **out, &bytes) || !(*out = rf_alloc(bytes))) {
        return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu floats", name, num);
    }
    rf_convert(*out, RF_DTYPE_F32, t.data, t.dtype, num);
    return RF_OK;
}
