/* kernels/kvq_checks.h - what both tables check about the operators of kvq.h: sizes, strides, dtypes, enums, alignment of what is
 * given; no pointer is read. */
#ifndef RF_KERNELS_KVQ_CHECKS_H
#define RF_KERNELS_KVQ_CHECKS_H

#include "kernels/kv_checks.h"
#include "kernels/kvq.h"

#define RF_KVQ_MAX_HEAD_DIM 256
#define RF_KVQ_ALIGNMENT    16

static inline rf_status rf_kvq_aligned(const char *op, const char *field, const void *pointer, rf_error *err) {
    if ((uintptr_t)pointer % RF_KVQ_ALIGNMENT == 0) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is not a multiple of %d bytes", op, field, RF_KVQ_ALIGNMENT);
}

static inline rf_status rf_kvq_stride(const char *op, const char *field, int64_t stride, int64_t units, size_t least,
                                      rf_error *err) {
    RF_TRY(rf_text_size(op, field, stride, units > 1 ? (int64_t)least : 0, RF_KV_MAX_STRIDE, err));
    if (stride % RF_KVQ_ALIGNMENT == 0) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s is %lld, must be a multiple of %d", op, field, (long long)stride,
                   RF_KVQ_ALIGNMENT);
}

static inline rf_status rf_kvq_store_check(const char *op, const rf_kvq_store *s, int64_t units, int64_t most,
                                           rf_error *err) {
    RF_TRY(rf_text_dtype(op, "dtype", s->dtype, err));
    RF_TRY(rf_text_size(op, "units", units, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "most", most, 0, INT32_MAX - RF_KVQ_BLOCK, err));
    RF_TRY(rf_text_size(op, "head_dim", s->head_dim, 16, RF_KVQ_MAX_HEAD_DIM, err));
    if (s->head_dim % 16 != 0)
        return rf_fail(err, RF_ERR_SHAPE, "%s: head_dim is %d, must be a multiple of 16", op, s->head_dim);
    switch (s->format) {
    case RF_KVQ_INT:
        if (s->bits != 2 && s->bits != 4 && s->bits != 8)
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: bits is %d, must be 2, 4 or 8", op, s->bits);
        if (s->group < 8 || s->group % 8 != 0 || s->head_dim % s->group != 0)
            return rf_fail(err, RF_ERR_SHAPE, "%s: group is %d, must be a multiple of 8 that divides head_dim %d", op,
                           s->group, s->head_dim);
        break;
    case RF_KVQ_FP8: break;
    case RF_KVQ_DIRECTION:
        if (s->k_factor || s->v_factor) return rf_fail(err, RF_ERR_ARGUMENT, "%s: directions have no factors", op);
        break;
    default: return rf_fail(err, RF_ERR_ARGUMENT, "%s: format is %d, must be one of rf_kvq_format", op, (int)s->format);
    }
    RF_TRY(rf_kvq_stride(op, "codes_stride", s->codes_stride, units, rf_kvq_codes_bytes(s, most), err));
    RF_TRY(rf_kvq_stride(op, "scales_stride", s->scales_stride, units, rf_kvq_scales_bytes(s, most), err));
    RF_TRY(rf_kvq_aligned(op, "k_codes", s->k_codes, err));
    RF_TRY(rf_kvq_aligned(op, "v_codes", s->v_codes, err));
    RF_TRY(rf_kvq_aligned(op, "k_scales", s->k_scales, err));
    return rf_kvq_aligned(op, "v_scales", s->v_scales, err);
}

/* Source rows and lists, after the store. */
static inline rf_status rf_kvq_rows_check(const char *op, const rf_kvq_store *s, int64_t row_stride,
                                          int64_t head_stride, int64_t list_stride, int64_t units, int64_t most,
                                          rf_error *err) {
    RF_TRY(rf_text_size(op, "row_stride", row_stride, s->head_dim, RF_KV_MAX_STRIDE, err));
    RF_TRY(rf_text_size(op, "head_stride", head_stride, 0, RF_KV_MAX_STRIDE, err));
    return rf_text_size(op, "list_stride", list_stride, units > 1 ? most : 0, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kvq_pack_check(const rf_kvq_pack_args *a, rf_error *err) {
    static const char op[] = "kvq_pack";
    RF_TRY(rf_kvq_store_check(op, &a->store, a->units, a->most, err));
    if (a->store.format == RF_KVQ_DIRECTION)
        return rf_fail(err, RF_ERR_ARGUMENT, "kvq_pack: directions are made by kvq_direction");
    return rf_kvq_rows_check(op, &a->store, a->row_stride, a->head_stride, a->list_stride, a->units, a->most, err);
}

static inline rf_status rf_kvq_unpack_check(const rf_kvq_unpack_args *a, rf_error *err) {
    static const char op[] = "kvq_unpack";
    RF_TRY(rf_kvq_store_check(op, &a->store, a->units, a->most, err));
    if (a->out_dtype != RF_DTYPE_F32 && a->out_dtype != a->store.dtype)
        return rf_fail(err, RF_ERR_DTYPE, "kvq_unpack: out_dtype is %s, must be f32 or the store's %s",
                       rf_dtype_name(a->out_dtype), rf_dtype_name(a->store.dtype));
    return rf_text_size(op, "out_stride", a->out_stride, a->most, INT32_MAX, err);
}

static inline rf_status rf_kvq_attention_check(const rf_kvq_attention_args *a, rf_error *err) {
    static const char op[] = "kvq_attention";
    RF_TRY(rf_kvq_store_check(op, &a->store, a->units, a->most, err));
    RF_TRY(rf_text_size(op, "group_heads", a->group_heads, 1, 65535, err));
    RF_TRY(rf_text_size(op, "units", a->units, 0, INT32_MAX / a->group_heads, err));
    RF_TRY(rf_kv_number(op, "scale", a->scale, err));
    if (!a->logits) return RF_OK;
    return rf_text_size(op, "logits_stride", a->logits_stride, a->most, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kvq_direction_check(const rf_kvq_direction_args *a, rf_error *err) {
    static const char op[] = "kvq_direction";
    RF_TRY(rf_kvq_store_check(op, &a->store, a->units, a->most, err));
    if (a->store.format != RF_KVQ_DIRECTION)
        return rf_fail(err, RF_ERR_ARGUMENT, "kvq_direction: format is %d, must be RF_KVQ_DIRECTION",
                       (int)a->store.format);
    if (!(a->t >= 0.0f && a->t <= 1.0f))
        return rf_fail(err, RF_ERR_ARGUMENT, "kvq_direction: t is %g, must be 0..1", (double)a->t);
    RF_TRY(rf_kvq_rows_check(op, &a->store, a->row_stride, a->head_stride, a->list_stride, a->units, a->most, err));
    RF_TRY(rf_kvq_aligned(op, "later_k_scales", a->later_k_scales, err));
    return rf_kvq_aligned(op, "later_v_scales", a->later_v_scales, err);
}

/* Pointers of a store at run time. */
static inline rf_status rf_kvq_store_pointers(const char *op, const rf_kvq_store *s, rf_error *err) {
    const void *const needed[] = {s->k_codes, s->v_codes, s->k_scales, s->v_scales};
    return rf_text_pointers(op, needed, 4, err);
}

#endif
