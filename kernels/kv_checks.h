/* kernels/kv_checks.h - what both tables check about the operators of kv.h: sizes, strides, dtypes, enums; no pointer is read.
 * What belongs to an operand that may be missing, or is not known while a plan is made (lists, lse, outputs), is checked where
 * its pointer is not NULL. */
#ifndef RF_KERNELS_KV_CHECKS_H
#define RF_KERNELS_KV_CHECKS_H

#include <math.h>

#include "kernels/kv.h"
#include "kernels/text_checks.h"

#define RF_KV_MAX_STRIDE (INT64_MAX / 4)

static inline rf_status rf_kv_number(const char *op, const char *field, float value, rf_error *err) {
    if (isfinite(value)) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is %g, must be finite", op, field, (double)value);
}

/* Heads of keys alone. */
static inline rf_status rf_kv_heads(const char *op, int num_kv_heads, int head_dim, rf_error *err) {
    RF_TRY(rf_text_size(op, "num_kv_heads", num_kv_heads, 1, 65535, err));
    return rf_text_size(op, "head_dim", head_dim, 1, 1024, err);
}

/* After the heads. */
static inline rf_status rf_kv_source_check(const char *op, const rf_kv_source *s, int num_kv_heads, int head_dim,
                                           rf_error *err) {
    RF_TRY(rf_text_size(op, "num_keys", s->num_keys, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "row_stride", s->row_stride, head_dim, RF_KV_MAX_STRIDE, err));
    if (s->rows) return rf_text_size(op, "rows_stride", s->rows_stride, s->num_keys, RF_KV_MAX_STRIDE, err);
    if (s->lens) return rf_fail(err, RF_ERR_ARGUMENT, "%s: lens without rows", op);
    return rf_text_size(op, "head_stride", s->head_stride, num_kv_heads > 1 ? head_dim : 0, RF_KV_MAX_STRIDE, err);
}

/* Queries of columns and losses, after the heads. */
static inline rf_status rf_kv_queries_check(const char *op, const rf_kv_source *source, int64_t num_queries,
                                            int64_t q_row_stride, int64_t width, const float *lse, int64_t lse_stride,
                                            float scale, bool causal, int64_t first_position, rf_error *err) {
    RF_TRY(rf_text_size(op, "num_queries", num_queries, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "q_row_stride", q_row_stride, num_queries > 1 ? width : 0, RF_KV_MAX_STRIDE, err));
    if (lse) RF_TRY(rf_text_size(op, "lse_stride", lse_stride, num_queries, RF_KV_MAX_STRIDE, err));
    RF_TRY(rf_kv_number(op, "scale", scale, err));
    if (!causal) return RF_OK;
    if (source->rows) return rf_fail(err, RF_ERR_ARGUMENT, "%s: causal needs dense keys, here they are listed", op);
    return rf_text_size(op, "first_position", first_position, 0, INT32_MAX, err);
}

static inline rf_status rf_kv_columns_check(const rf_kv_columns_args *a, rf_error *err) {
    static const char op[] = "kv_columns";
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_text_heads(op, a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_source_check(op, &a->source, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_queries_check(op, &a->source, a->num_queries, a->q_row_stride, (int64_t)a->num_q_heads * a->head_dim,
                               a->lse, a->lse_stride, a->scale, a->causal, a->first_position, err));
    if (a->s1 || a->s2 || a->peak)
        RF_TRY(rf_text_size(op, "out_stride", a->out_stride, a->source.num_keys, RF_KV_MAX_STRIDE, err));
    if (!a->entropy) return RF_OK;
    return rf_text_size(op, "entropy_keys", a->entropy_keys, 0, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kv_loss_check(const rf_kv_loss_args *a, rf_error *err) {
    static const char op[] = "kv_loss";
    const int64_t width = (int64_t)a->num_q_heads * a->head_dim;
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_text_heads(op, a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_source_check(op, &a->source, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_queries_check(op, &a->source, a->num_queries, a->q_row_stride, width, a->lse, a->lse_stride, a->scale,
                               a->causal, a->first_position, err));
    if ((int)a->loss < RF_KV_LOSS_REMOVAL || a->loss > RF_KV_LOSS_JOINT)
        return rf_fail(err, RF_ERR_ARGUMENT, "kv_loss: loss is %d, must be one of rf_kv_loss", (int)a->loss);
    if (a->loss != RF_KV_LOSS_VALUE)
        RF_TRY(
            rf_text_size(op, "o_row_stride", a->o_row_stride, a->num_queries > 1 ? width : 0, RF_KV_MAX_STRIDE, err));
    if (!a->out) return RF_OK;
    return rf_text_size(op, "out_stride", a->out_stride, a->source.num_keys, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kv_norms_check(const rf_kv_norms_args *a, rf_error *err) {
    static const char op[] = "kv_norms";
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_kv_heads(op, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_source_check(op, &a->source, a->num_kv_heads, a->head_dim, err));
    if (!a->key_norm && !a->value_norm && !a->key_cosine) return RF_OK;
    return rf_text_size(op, "out_stride", a->out_stride, a->source.num_keys, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kv_copy_check(const rf_kv_copy_args *a, rf_error *err) {
    static const char op[] = "kv_copy";
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_kv_heads(op, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_kv_source_check(op, &a->source, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_text_size(op, "num", a->num, 0, a->from ? INT32_MAX : a->source.num_keys, err));
    if (a->from || a->to || a->turn)
        RF_TRY(rf_text_size(op, "list_stride", a->list_stride, a->num, RF_KV_MAX_STRIDE, err));
    if (a->to)
        RF_TRY(rf_text_size(op, "out_row_stride", a->out_row_stride, a->head_dim, RF_KV_MAX_STRIDE, err));
    else
        RF_TRY(rf_text_size(op, "out_head_stride", a->out_head_stride, a->num_kv_heads > 1 ? a->num * a->head_dim : 0,
                            RF_KV_MAX_STRIDE, err));
    if (!a->turn) return RF_OK;
    return rf_text_size(op, "pairs", a->pairs, 1, a->head_dim / 2, err);
}

static inline rf_status rf_kv_append_check(const rf_kv_append_args *a, rf_error *err) {
    static const char op[] = "kv_append";
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_text_size(op, "heads", a->heads, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "head_dim", a->head_dim, 1, 1024, err));
    if (!a->lens) return RF_OK;
    return rf_text_size(op, "rows_stride", a->rows_stride, 1, RF_KV_MAX_STRIDE, err);
}

static inline rf_status rf_kv_append_pointers(const rf_kv_append_args *a, rf_error *err) {
    bool lists = a->lens && !a->k && !a->v && !a->k_pool && !a->v_pool; /* alone */
    const void *any = a->new_rows;
    const void *const needed[] = {
        lists ? any : a->k,     lists ? any : a->v, lists ? any : a->k_pool, lists ? any : a->v_pool, any,
        a->lens ? a->rows : any};
    return rf_text_pointers("kv_append", needed, 6, err);
}

static inline rf_status rf_kv_evict_check(const rf_kv_evict_args *a, rf_error *err) {
    static const char op[] = "kv_evict";
    RF_TRY(rf_text_dtype(op, "dtype", a->dtype, err));
    RF_TRY(rf_text_heads(op, a->num_q_heads, a->num_kv_heads, a->head_dim, err));
    RF_TRY(rf_text_size(op, "sequences", a->sequences, 0, INT32_MAX / a->num_q_heads, err));
    RF_TRY(rf_text_size(op, "max_len", a->max_len, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "rows_stride", a->rows_stride, a->max_len, RF_KV_MAX_STRIDE, err));
    RF_TRY(rf_text_size(op, "sinks", a->sinks, 0, INT32_MAX, err));
    RF_TRY(rf_text_size(op, "recents", a->recents, 0, INT32_MAX, err));
    RF_TRY(rf_kv_number(op, "scale", a->scale, err));
    RF_TRY(rf_kv_number(op, "decay", a->decay, err));
    if ((int)a->mode >= RF_KV_EVICT_SUM && a->mode <= RF_KV_EVICT_AGE) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "kv_evict: mode is %d, must be one of rf_kv_evict_mode", (int)a->mode);
}

#endif
