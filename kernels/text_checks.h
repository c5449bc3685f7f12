/* kernels/text_checks.h - what both tables check about the operators of text.h: sizes, strides, dtypes; no pointer is read. */
#ifndef RF_KERNELS_TEXT_CHECKS_H
#define RF_KERNELS_TEXT_CHECKS_H

#include <math.h>

#include "kernels/text.h"

static inline rf_status rf_text_size(const char *op, const char *field, int64_t value, int64_t min, int64_t max,
                                     rf_error *err) {
    if (value >= min && value <= max) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s is %lld, must be %lld..%lld", op, field, (long long)value, (long long)min,
                   (long long)max);
}

static inline rf_status rf_text_dtype(const char *op, const char *field, rf_dtype dtype, rf_error *err) {
    if (dtype == RF_DTYPE_F32 || dtype == RF_DTYPE_BF16) return RF_OK;
    return rf_fail(err, RF_ERR_DTYPE, "%s: %s is %s, must be f32 or bf16", op, field, rf_dtype_name(dtype));
}

/* At run time: pointers that must be there. */
static inline rf_status rf_text_pointers(const char *op, const void *const *pointers, int num, rf_error *err) {
    for (int i = 0; i < num; i++)
        if (!pointers[i]) return rf_fail(err, RF_ERR_ARGUMENT, "%s: operand %d is NULL", op, i);
    return RF_OK;
}

static inline rf_status rf_text_heads(const char *op, int num_q_heads, int num_kv_heads, int head_dim, rf_error *err) {
    RF_TRY(rf_text_size(op, "num_kv_heads", num_kv_heads, 1, 65535, err));
    RF_TRY(rf_text_size(op, "num_q_heads", num_q_heads, 1, 65535, err));
    RF_TRY(rf_text_size(op, "head_dim", head_dim, 2, 1024, err));
    if (num_q_heads % num_kv_heads == 0) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %d query heads are not a multiple of %d key heads", op, num_q_heads,
                   num_kv_heads);
}

static inline rf_status rf_text_cache(const char *op, int num_kv_heads, int head_dim, int64_t k_batch_stride,
                                      int64_t k_row_stride, rf_error *err) {
    RF_TRY(rf_text_size(op, "k_row_stride", k_row_stride, (int64_t)num_kv_heads * head_dim, INT64_MAX / 4, err));
    return rf_text_size(op, "k_batch_stride", k_batch_stride, 0, INT64_MAX / 4, err);
}

static inline rf_status rf_embed_check(const rf_embed_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("embed", "dtype", a->dtype, err));
    RF_TRY(rf_text_dtype("embed", "out_dtype", a->out_dtype, err));
    RF_TRY(rf_text_size("embed", "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("embed", "cols", a->cols, 1, INT32_MAX, err));
    return rf_text_size("embed", "vocab", a->vocab, 1, INT32_MAX, err);
}

static inline rf_status rf_qkv_rope_check(const rf_qkv_rope_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("qkv_rope", "dtype", a->dtype, err));
    RF_TRY(rf_text_size("qkv_rope", "batch", a->batch, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("qkv_rope", "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_text_heads("qkv_rope", a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_text_size("qkv_rope", "pairs", a->pairs, 0, a->head_dim / 2, err));
    RF_TRY(rf_text_size("qkv_rope", "cache_rows", a->cache_rows, 1, INT32_MAX, err));
    RF_TRY(rf_text_size("qkv_rope", "table_rows", a->table_rows, a->pairs > 0 ? 1 : 0, INT32_MAX, err));
    return rf_text_cache("qkv_rope", a->num_kv_heads, a->head_dim, a->k_batch_stride, a->k_row_stride, err);
}

static inline rf_status rf_swiglu_check(const rf_swiglu_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("swiglu", "dtype", a->dtype, err));
    RF_TRY(rf_text_size("swiglu", "rows", a->rows, 0, INT32_MAX, err));
    return rf_text_size("swiglu", "cols", a->cols, 1, INT32_MAX / 2, err);
}

static inline rf_status rf_head_stats_check(const rf_head_stats_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("head_stats", "dtype", a->dtype, err));
    RF_TRY(rf_text_size("head_stats", "rows", a->rows, 0, INT32_MAX / 8, err));
    RF_TRY(rf_text_size("head_stats", "cols", a->cols, 1, INT32_MAX, err));
    RF_TRY(rf_text_size("head_stats", "vocab", a->vocab, 1, INT32_MAX, err));
    RF_TRY(rf_text_size("head_stats", "num_bans", a->num_bans, 0, 8, err));
    if (!(a->temperature >= 0.0f) || !isfinite(a->temperature))
        return rf_fail(err, RF_ERR_ARGUMENT, "head_stats: temperature is %g, must be a number >= 0",
                       (double)a->temperature);
    if (!isfinite(a->scale)) return rf_fail(err, RF_ERR_ARGUMENT, "head_stats: scale is not finite");
    return RF_OK;
}

static inline rf_status rf_attention_mass_check(const rf_attention_mass_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("attention_mass", "dtype", a->dtype, err));
    RF_TRY(rf_text_size("attention_mass", "batch", a->batch, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("attention_mass", "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("attention_mass", "num_queries", a->num_queries, 0, a->rows, err));
    RF_TRY(rf_text_size("attention_mass", "num_keys", a->num_keys, 0, INT32_MAX, err));
    RF_TRY(rf_text_heads("attention_mass", a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    if ((a->query_rows || a->keys) && a->batch > 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention_mass: lists are for a batch of one, here it is %lld",
                       (long long)a->batch);
    return rf_text_cache("attention_mass", a->num_kv_heads, a->head_dim, a->k_batch_stride, a->k_row_stride, err);
}

static inline rf_status rf_attention_probs_check(const rf_attention_probs_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("attention_probs", "dtype", a->dtype, err));
    RF_TRY(rf_text_size("attention_probs", "num_rows", a->num_rows, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("attention_probs", "num_keys", a->num_keys, 0, INT32_MAX, err));
    RF_TRY(rf_text_heads("attention_probs", a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_text_size("attention_probs", "q_row_stride", a->q_row_stride, (int64_t)a->num_q_heads * a->head_dim,
                        INT64_MAX / 4, err));
    return rf_text_cache("attention_probs", a->num_kv_heads, a->head_dim, 0, a->k_row_stride, err);
}

static inline rf_status rf_cosine_rows_check(const rf_cosine_rows_args *a, rf_error *err) {
    RF_TRY(rf_text_dtype("cosine_rows", "a_dtype", a->a_dtype, err));
    RF_TRY(rf_text_dtype("cosine_rows", "b_dtype", a->b_dtype, err));
    RF_TRY(rf_text_size("cosine_rows", "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_text_size("cosine_rows", "cols", a->cols, 1, INT32_MAX, err));
    RF_TRY(rf_text_size("cosine_rows", "a_ld", a->a_ld, 0, INT64_MAX / 4, err));
    RF_TRY(rf_text_size("cosine_rows", "b_ld", a->b_ld, 0, INT64_MAX / 4, err));
    return rf_text_size("cosine_rows", "col_stride", a->col_stride, 0, INT64_MAX / 4, err);
}

static inline rf_status rf_select_smallest_check(const rf_select_smallest_args *a, rf_error *err) {
    RF_TRY(rf_text_size("select_smallest", "num", a->num, 1, 32768, err));
    return rf_text_size("select_smallest", "count", a->count, 1, a->num, err);
}

static inline rf_status rf_argmax_check(const rf_argmax_args *a, rf_error *err) {
    return rf_text_size("argmax", "num", a->num, 0, INT32_MAX, err);
}

#endif
