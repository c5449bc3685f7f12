/* kernels/checks.c - argument checks shared by the operator tables. See checks.h for what each pair promises. */
#include "kernels/checks.h"

#include <math.h>

/* ---- small checks: each names the field ---- */

static rf_status given(const char *op, const void *args, rf_error *err) {
    return args ? RF_OK : rf_fail(err, RF_ERR_ARGUMENT, "%s: no arguments", op);
}

/* Sizes fit 32 bits, so that a product of two fits 64 and BLAS can take them. */
static rf_status size_in(const char *op, const char *field, int64_t value, int64_t min, int64_t max, rf_error *err) {
    if (value >= min && value <= max) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s is %lld, must be %lld..%lld", op, field, (long long)value, (long long)min,
                   (long long)max);
}

static rf_status size_from(const char *op, const char *field, int64_t value, int64_t min, rf_error *err) {
    return size_in(op, field, value, min, INT32_MAX, err);
}

/* The number of elements of a whole operand stays below 2^62, whatever its factors. */
static rf_status product_fits(const char *op, const char *what, const int64_t *factors, int num, rf_error *err) {
    int64_t product = 1;
    for (int i = 0; i < num; i++) {
        if (__builtin_mul_overflow(product, factors[i], &product) || product > INT64_MAX / 2)
            return rf_fail(err, RF_ERR_SHAPE, "%s: %s has too many elements", op, what);
    }
    return RF_OK;
}

/* Strides are in elements and may be large; a negative or overlapping one is refused. */
static rf_status stride_from(const char *op, const char *field, int64_t value, int64_t min, rf_error *err) {
    if (value >= min && value <= INT64_MAX / 2) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s is %lld, must be at least %lld", op, field, (long long)value,
                   (long long)min);
}

static rf_status float_dtype(const char *op, const char *field, rf_dtype dtype, rf_error *err) {
    if (dtype == RF_DTYPE_F32 || dtype == RF_DTYPE_BF16) return RF_OK;
    return rf_fail(err, RF_ERR_DTYPE, "%s: %s is %s, must be f32 or bf16", op, field, rf_dtype_name(dtype));
}

static rf_status enum_in(const char *op, const char *field, int value, int last, rf_error *err) {
    if (value >= 0 && value <= last) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is %d, must be 0..%d", op, field, value, last);
}

static rf_status finite_value(const char *op, const char *field, double value, rf_error *err) {
    if (isfinite(value)) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is not finite", op, field);
}

static rf_status eps_value(const char *op, float eps, rf_error *err) {
    if (isfinite(eps) && eps >= 0) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: eps is %g, must be a number >= 0", op, (double)eps);
}

static rf_status pointer(const char *op, const char *field, const void *p, rf_error *err) {
    return p ? RF_OK : rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is NULL", op, field);
}

static rf_status not_same(const char *op, const char *a, const void *pa, const char *b, const void *pb, rf_error *err) {
    if (pa != pb || !pa) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s may not be the buffer of %s", op, a, b);
}

rf_status rf_check_workspace(const char *op, const void *workspace, size_t have_bytes, size_t need_bytes,
                             rf_error *err) {
    if (need_bytes == 0) return RF_OK;
    if (!workspace) have_bytes = 0;
    if (have_bytes >= need_bytes) return RF_OK;
    return rf_fail(err, RF_ERR_WORKSPACE, "%s: the workspace needs %zu bytes, has %zu", op, need_bytes, have_bytes);
}

rf_status rf_check_f32(const char *what, rf_dtype dtype, rf_error *err) {
    if (dtype == RF_DTYPE_F32) return RF_OK;
    return rf_fail(err, RF_ERR_DTYPE, "%s is %s; the CPU computes in f32 only", what, rf_dtype_name(dtype));
}

/* ---- gemm ---- */

rf_status rf_gemm_check(const rf_gemm_args *a, rf_error *err) {
    const char *op = "gemm";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(float_dtype(op, "y_dtype", a->y_dtype, err));
    if (a->dtype == RF_DTYPE_F32 && a->y_dtype != RF_DTYPE_F32)
        return rf_fail(err, RF_ERR_DTYPE, "%s: y_dtype is %s with f32 inputs, must be f32", op,
                       rf_dtype_name(a->y_dtype));
    RF_TRY(size_from(op, "m", a->m, 0, err));
    RF_TRY(size_from(op, "n", a->n, 1, err));
    RF_TRY(size_from(op, "k", a->k, 1, err));
    RF_TRY(size_from(op, "num_batches", a->num_batches, 0, err));
    RF_TRY(size_from(op, "ldx", a->ldx, a->k, err));
    RF_TRY(size_from(op, "ldw", a->ldw, a->w_is_kn ? a->n : a->k, err));
    RF_TRY(size_from(op, "ldy", a->ldy, a->n, err));
    RF_TRY(stride_from(op, "x_batch_stride", a->x_batch_stride, 0, err));
    RF_TRY(stride_from(op, "w_batch_stride", a->w_batch_stride, 0, err));
    RF_TRY(stride_from(op, "y_batch_stride", a->y_batch_stride, a->num_batches > 1 ? a->n : 0, err));
    RF_TRY(enum_in(op, "act", (int)a->act, RF_ACT_SILU, err));
    RF_TRY(finite_value(op, "alpha", a->alpha, err));
    return finite_value(op, "beta", a->beta, err);
}

rf_status rf_gemm_check_run(const rf_gemm_args *a, rf_error *err) {
    const char *op = "gemm";
    RF_TRY(rf_gemm_check(a, err));
    if (a->m == 0 || a->num_batches == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "w", a->w, err));
    RF_TRY(pointer(op, "y", a->y, err));
    RF_TRY(not_same(op, "y", a->y, "x", a->x, err));
    RF_TRY(not_same(op, "y", a->y, "w", a->w, err));
    return not_same(op, "y", a->y, "bias", a->bias, err);
}

/* ---- attention ---- */

rf_status rf_attention_check(const rf_attention_args *a, rf_error *err) {
    const char *op = "attention";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_in(op, "num_q_heads", a->num_q_heads, 1, 65535, err));
    RF_TRY(size_in(op, "num_kv_heads", a->num_kv_heads, 1, 65535, err));
    RF_TRY(size_in(op, "head_dim", a->head_dim, 1, 65536, err));
    if (a->num_q_heads % a->num_kv_heads != 0)
        return rf_fail(err, RF_ERR_SHAPE, "%s: num_q_heads is %d, not a multiple of num_kv_heads, %d", op,
                       a->num_q_heads, a->num_kv_heads);
    RF_TRY(size_from(op, "q_len", a->q_len, 0, err));
    RF_TRY(size_from(op, "kv_len", a->kv_len, 0, err));
    int64_t d = a->head_dim;
    RF_TRY(stride_from(op, "q_batch_stride", a->q_batch_stride, 0, err));
    RF_TRY(stride_from(op, "q_row_stride", a->q_row_stride, a->q_len > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "q_head_stride", a->q_head_stride, a->num_q_heads > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "kv_batch_stride", a->kv_batch_stride, 0, err));
    RF_TRY(stride_from(op, "kv_row_stride", a->kv_row_stride, a->kv_len > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "kv_head_stride", a->kv_head_stride, a->num_kv_heads > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "out_batch_stride", a->out_batch_stride, a->batch > 1 && a->q_len > 0 ? d : 0, err));
    RF_TRY(stride_from(op, "out_row_stride", a->out_row_stride, a->q_len > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "out_head_stride", a->out_head_stride, a->num_q_heads > 1 ? d : 0, err));
    RF_TRY(stride_from(op, "q_batch_stride_rows", a->q_batch_stride_rows, 0, err));
    RF_TRY(stride_from(op, "kv_batch_stride_rows", a->kv_batch_stride_rows, 0, err));
    RF_TRY(finite_value(op, "softmax_scale", a->softmax_scale, err));
    RF_TRY(enum_in(op, "mask", (int)a->mask, RF_MASK_BLOCK_CAUSAL, err));
    RF_TRY(enum_in(op, "kernel", (int)a->kernel, RF_ATTENTION_SMALL, err));
    if (a->mask == RF_MASK_BLOCK_CAUSAL && a->causal_block < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: causal_block is %d, must be at least 1", op, (int)a->causal_block);
    if ((a->mask != RF_MASK_NONE || a->rope) && a->q_pos_offset < 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: q_pos_offset is %d, must be at least 0", op, (int)a->q_pos_offset);
    if (a->rope) RF_TRY(size_in(op, "rope_pairs", a->rope_pairs, 1, a->head_dim / 2, err));
    if (a->num_ranges < 0 || a->num_ranges > RF_MAX_KEY_RANGES)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: num_ranges is %d, must be 0..%d", op, a->num_ranges,
                       RF_MAX_KEY_RANGES);
    if (a->num_ranges > 0 && (a->kv_rows || a->kv_lens))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: key ranges exclude %s", op, a->kv_rows ? "kv_rows" : "kv_lens");
    int64_t last_end = 0;
    for (int i = 0; i < a->num_ranges; i++) {
        rf_key_range r = a->ranges[i];
        if (r.begin < last_end || r.end < r.begin || r.end > a->kv_len)
            return rf_fail(err, RF_ERR_SHAPE,
                           "%s: key range %d is [%d, %d), ranges must ascend without overlap inside [0, %lld)", op, i,
                           (int)r.begin, (int)r.end, (long long)a->kv_len);
        last_end = r.end;
    }
    return RF_OK;
}

rf_status rf_attention_check_run(const rf_attention_args *a, rf_error *err) {
    const char *op = "attention";
    RF_TRY(rf_attention_check(a, err));
    if (a->batch == 0 || a->q_len == 0) return RF_OK;
    RF_TRY(pointer(op, "q", a->q, err));
    RF_TRY(pointer(op, "out", a->out, err));
    if (a->kv_len > 0) {
        RF_TRY(pointer(op, "k", a->k, err));
        RF_TRY(pointer(op, "v", a->v, err));
    }
    RF_TRY(not_same(op, "out", a->out, "q", a->q, err));
    RF_TRY(not_same(op, "out", a->out, "k", a->k, err));
    return not_same(op, "out", a->out, "v", a->v, err);
}

rf_status rf_attention_merge_check(const rf_attention_merge_args *a, rf_error *err) {
    const char *op = "attention_merge";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    if (a->out_a_dtype != RF_DTYPE_F32 && a->out_a_dtype != a->dtype)
        return rf_fail(err, RF_ERR_DTYPE, "%s: out_a_dtype is %s, must be f32 or dtype (%s)", op,
                       rf_dtype_name(a->out_a_dtype), rf_dtype_name(a->dtype));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_in(op, "num_heads", a->num_heads, 1, 65535, err));
    RF_TRY(size_in(op, "head_dim", a->head_dim, 1, 65536, err));
    return product_fits(op, "out", (int64_t[]){a->rows, a->num_heads, a->head_dim}, 3, err);
}

rf_status rf_attention_merge_check_run(const rf_attention_merge_args *a, rf_error *err) {
    const char *op = "attention_merge";
    RF_TRY(rf_attention_merge_check(a, err));
    if (a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "out_a", a->out_a, err));
    RF_TRY(pointer(op, "out_b", a->out_b, err));
    RF_TRY(pointer(op, "lse_a", a->lse_a, err));
    RF_TRY(pointer(op, "lse_b", a->lse_b, err));
    RF_TRY(pointer(op, "out", a->out, err));
    RF_TRY(not_same(op, "out", a->out, "out_b", a->out_b, err));
    if (a->out_a_dtype != a->dtype) RF_TRY(not_same(op, "out", a->out, "out_a of another dtype", a->out_a, err));
    return not_same(op, "lse", a->lse, "lse_b", a->lse_b, err);
}

rf_status rf_softmax_check(const rf_softmax_args *a, rf_error *err) {
    const char *op = "softmax";
    RF_TRY(given(op, a, err));
    if (a->x_dtype != RF_DTYPE_F32)
        return rf_fail(err, RF_ERR_DTYPE, "%s: x_dtype is %s, must be f32", op, rf_dtype_name(a->x_dtype));
    RF_TRY(float_dtype(op, "y_dtype", a->y_dtype, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    return finite_value(op, "scale", a->scale, err);
}

rf_status rf_softmax_check_run(const rf_softmax_args *a, rf_error *err) {
    const char *op = "softmax";
    RF_TRY(rf_softmax_check(a, err));
    if (a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    if (a->x_dtype != a->y_dtype) RF_TRY(not_same(op, "y", a->y, "x of another dtype", a->x, err));
    return RF_OK;
}

/* ---- norms ---- */

/* A modulation table that serves the column offsets (each -1 or >= 0); without offsets nothing of it is used. */
static rf_status modulation(const char *op, const char *name, const rf_modulation *mod, const int64_t *offsets,
                            int num_offsets, int64_t cols, rf_error *err) {
    bool used = false;
    for (int i = 0; i < num_offsets; i++) {
        if (offsets[i] < -1)
            return rf_fail(err, RF_ERR_SHAPE, "%s: a column offset of %s is %lld, must be -1 or more", op, name,
                           (long long)offsets[i]);
        if (offsets[i] < 0) continue;
        used = true;
        if (offsets[i] > mod->stride - cols)
            return rf_fail(err, RF_ERR_SHAPE, "%s: %s needs columns %lld..%lld, its stride is %lld", op, name,
                           (long long)offsets[i], (long long)(offsets[i] + cols - 1), (long long)mod->stride);
    }
    if (!used) return RF_OK;
    if (mod->rows_per_group < 1)
        return rf_fail(err, RF_ERR_SHAPE, "%s: rows_per_group of %s is %lld, must be at least 1", op, name,
                       (long long)mod->rows_per_group);
    return float_dtype(op, name, mod->dtype, err);
}

rf_status rf_norm_check(const rf_norm_args *a, rf_error *err) {
    const char *op = "norm";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "x_dtype", a->x_dtype, err));
    RF_TRY(float_dtype(op, "y_dtype", a->y_dtype, err));
    RF_TRY(size_from(op, "num_rows", a->num_rows, 0, err));
    RF_TRY(size_in(op, "cols", a->cols, 1, 16384, err));
    RF_TRY(enum_in(op, "kind", (int)a->kind, RF_NORM_RMS, err));
    RF_TRY(eps_value(op, a->eps, err));
    return modulation(op, "mod", &a->mod, (int64_t[]){a->shift, a->scale}, 2, a->cols, err);
}

rf_status rf_norm_check_run(const rf_norm_args *a, rf_error *err) {
    const char *op = "norm";
    RF_TRY(rf_norm_check(a, err));
    if (a->num_rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    if (a->shift >= 0 || a->scale >= 0) RF_TRY(pointer(op, "mod.table", a->mod.table, err));
    if (a->rows) return not_same(op, "y of listed rows", a->y, "x", a->x, err);
    if (a->x_dtype != a->y_dtype) return not_same(op, "y", a->y, "x of another dtype", a->x, err);
    return RF_OK;
}

rf_status rf_residual_check(const rf_residual_args *a, rf_error *err) {
    const char *op = "residual";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "x_dtype", a->x_dtype, err));
    RF_TRY(float_dtype(op, "y_dtype", a->y_dtype, err));
    RF_TRY(size_from(op, "num_rows", a->num_rows, 0, err));
    RF_TRY(size_in(op, "cols", a->cols, 1, 16384, err));
    RF_TRY(size_in(op, "num_terms", a->num_terms, 0, RF_MAX_TERMS, err));
    if (a->base) {
        RF_TRY(float_dtype(op, "base_dtype", a->base_dtype, err));
        RF_TRY(size_from(op, "base_period", a->base_period, 1, err));
    }
    RF_TRY(
        modulation(op, "gate_mod", &a->gate_mod, (int64_t[]){a->gate, a->extra ? a->extra_gate : -1}, 2, a->cols, err));
    if (a->term_group) {
        RF_TRY(size_from(op, "rows_per_term_group", a->rows_per_term_group, 1, err));
        if (a->num_rows % a->rows_per_term_group != 0)
            return rf_fail(err, RF_ERR_SHAPE, "%s: num_rows is %lld, not a multiple of rows_per_term_group, %lld", op,
                           (long long)a->num_rows, (long long)a->rows_per_term_group);
        if (a->weight_row) return rf_fail(err, RF_ERR_ARGUMENT, "%s: term_group and weight_row exclude each other", op);
    }
    if (a->rows && (a->term_group || a->extra))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: rows may not be given with %s", op,
                       a->term_group ? "term_group" : "extra");
    if (!a->rows && (a->term_rows || a->store))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s needs rows", op, a->term_rows ? "term_rows" : "store");
    if (a->store && a->num_terms != 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: store needs one term, there are %d", op, a->num_terms);
    if (!a->norm_y) return RF_OK;
    RF_TRY(float_dtype(op, "norm_y_dtype", a->norm_y_dtype, err));
    RF_TRY(enum_in(op, "norm_kind", (int)a->norm_kind, RF_NORM_RMS, err));
    RF_TRY(eps_value(op, a->norm_eps, err));
    return modulation(op, "norm_mod", &a->norm_mod, (int64_t[]){a->norm_shift, a->norm_scale}, 2, a->cols, err);
}

rf_status rf_residual_check_run(const rf_residual_args *a, rf_error *err) {
    const char *op = "residual";
    RF_TRY(rf_residual_check(a, err));
    if (a->num_rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    for (int t = 0; t < a->num_terms; t++) {
        RF_TRY(pointer(op, "a term", a->terms[t], err));
        RF_TRY(not_same(op, "x", a->x, "a term", a->terms[t], err));
    }
    if (a->term_group && a->num_terms > 0) RF_TRY(pointer(op, "weights (of term_group)", a->weights, err));
    RF_TRY(not_same(op, "x", a->x, "extra", a->extra, err));
    if (a->store) {
        RF_TRY(pointer(op, "store_rows", a->store_rows, err));
        RF_TRY(not_same(op, "store", a->store, "x", a->x, err));
        RF_TRY(not_same(op, "store", a->store, "a term", a->terms[0], err));
        RF_TRY(not_same(op, "store", a->store, "norm_y", a->norm_y, err));
    }
    if (a->gate >= 0 || (a->extra && a->extra_gate >= 0)) RF_TRY(pointer(op, "gate_mod.table", a->gate_mod.table, err));
    if (!a->norm_y) return RF_OK;
    RF_TRY(not_same(op, "norm_y", a->norm_y, "x", a->x, err));
    if (a->norm_shift >= 0 || a->norm_scale >= 0) RF_TRY(pointer(op, "norm_mod.table", a->norm_mod.table, err));
    return RF_OK;
}

rf_status rf_group_norm_check(const rf_group_norm_args *a, rf_error *err) {
    const char *op = "group_norm";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_from(op, "pixels", a->pixels, 0, err));
    RF_TRY(size_from(op, "channels", a->channels, 1, err));
    RF_TRY(size_in(op, "num_groups", a->num_groups, 1, a->channels, err));
    if (a->channels % a->num_groups != 0)
        return rf_fail(err, RF_ERR_SHAPE, "%s: channels is %lld, not a multiple of num_groups, %d", op,
                       (long long)a->channels, a->num_groups);
    RF_TRY(product_fits(op, "x", (int64_t[]){a->batch, a->pixels, a->channels}, 3, err));
    return eps_value(op, a->eps, err);
}

rf_status rf_group_norm_check_run(const rf_group_norm_args *a, rf_error *err) {
    const char *op = "group_norm";
    RF_TRY(rf_group_norm_check(a, err));
    if (a->batch == 0 || a->pixels == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    RF_TRY(pointer(op, "weight", a->weight, err));
    return pointer(op, "bias", a->bias, err);
}

/* ---- elementwise ---- */

rf_status rf_timestep_embed_check(const rf_timestep_embed_args *a, rf_error *err) {
    const char *op = "timestep_embed";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "num", a->num, 0, err));
    RF_TRY(size_from(op, "dim", a->dim, 2, err));
    if (a->dim % 2 != 0) return rf_fail(err, RF_ERR_SHAPE, "%s: dim is %lld, must be even", op, (long long)a->dim);
    if (!(isfinite(a->max_period) && a->max_period > 0))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: max_period is %g, must be positive", op, (double)a->max_period);
    if (!(isfinite(a->freq_shift) && (double)a->freq_shift < (double)(a->dim / 2)))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: freq_shift is %g, must be below dim / 2", op, (double)a->freq_shift);
    return RF_OK;
}

rf_status rf_timestep_embed_check_run(const rf_timestep_embed_args *a, rf_error *err) {
    const char *op = "timestep_embed";
    RF_TRY(rf_timestep_embed_check(a, err));
    if (a->num == 0) return RF_OK;
    RF_TRY(pointer(op, "t", a->t, err));
    return pointer(op, "out", a->out, err);
}

rf_status rf_elementwise_check(const rf_elementwise_args *a, rf_error *err) {
    const char *op = "elementwise";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "x_dtype", a->x_dtype, err));
    RF_TRY(float_dtype(op, "y_dtype", a->y_dtype, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    RF_TRY(enum_in(op, "act", (int)a->act, RF_ACT_SILU, err));
    RF_TRY(finite_value(op, "x_scale", a->x_scale, err));
    RF_TRY(finite_value(op, "x_shift", a->x_shift, err));
    if (a->planar_to_last && a->last_to_planar)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: planar_to_last and last_to_planar exclude each other", op);
    if (a->planar_to_last || a->last_to_planar) {
        if (a->add) return rf_fail(err, RF_ERR_ARGUMENT, "%s: a layout change takes no add", op);
        RF_TRY(size_in(op, "channels", a->channels, 1, a->cols, err));
        if (a->cols % a->channels != 0)
            return rf_fail(err, RF_ERR_SHAPE, "%s: cols is %lld, not a multiple of channels, %lld", op,
                           (long long)a->cols, (long long)a->channels);
        rf_dtype planar = a->planar_to_last ? a->x_dtype : a->y_dtype;
        if (planar != RF_DTYPE_F32)
            return rf_fail(err, RF_ERR_DTYPE, "%s: the planar side is %s, must be f32", op, rf_dtype_name(planar));
        return RF_OK;
    }
    if (a->add) {
        RF_TRY(float_dtype(op, "add_dtype", a->add_dtype, err));
        RF_TRY(size_from(op, "add_period", a->add_period, 1, err));
    }
    return RF_OK;
}

rf_status rf_elementwise_check_run(const rf_elementwise_args *a, rf_error *err) {
    const char *op = "elementwise";
    RF_TRY(rf_elementwise_check(a, err));
    if (a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    if (a->planar_to_last || a->last_to_planar) return not_same(op, "y of another layout", a->y, "x", a->x, err);
    if (a->x_dtype != a->y_dtype) return not_same(op, "y", a->y, "x of another dtype", a->x, err);
    return RF_OK;
}

/* Latent sizes and the patch that divides them. */
static rf_status patch_grid(const char *op, int64_t frames, int64_t height, int64_t width, int pt, int ph, int pw,
                            rf_error *err) {
    RF_TRY(size_from(op, "frames", frames, 1, err));
    RF_TRY(size_from(op, "height", height, 1, err));
    RF_TRY(size_from(op, "width", width, 1, err));
    RF_TRY(size_from(op, "pt", pt, 1, err));
    RF_TRY(size_from(op, "ph", ph, 1, err));
    RF_TRY(size_from(op, "pw", pw, 1, err));
    if (frames % pt == 0 && height % ph == 0 && width % pw == 0) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: a latent of %lld x %lld x %lld does not divide into patches of %d x %d x %d",
                   op, (long long)frames, (long long)height, (long long)width, pt, ph, pw);
}

rf_status rf_patchify_check(const rf_patchify_args *a, rf_error *err) {
    const char *op = "patchify";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_from(op, "branches", a->branches, 1, err));
    RF_TRY(size_from(op, "channels", a->channels, 1, err));
    RF_TRY(patch_grid(op, a->frames, a->height, a->width, a->pt, a->ph, a->pw, err));
    RF_TRY(stride_from(op, "scale_stride", a->scale_stride, 0, err));
    return product_fits(op, "out", (int64_t[]){a->branches, a->batch, a->channels, a->frames, a->height, a->width}, 6,
                        err);
}

rf_status rf_patchify_check_run(const rf_patchify_args *a, rf_error *err) {
    const char *op = "patchify";
    RF_TRY(rf_patchify_check(a, err));
    if (a->batch == 0) return RF_OK;
    RF_TRY(pointer(op, "latent", a->latent, err));
    return pointer(op, "out", a->out, err);
}

/* ---- convolution ---- */

int64_t rf_conv2d_out_size(const rf_conv2d_args *a, int64_t in_size) {
    int64_t padded = in_size * (a->upsample ? 2 : 1) + a->pad_before + a->pad_after;
    if (padded < a->kernel || a->stride < 1) return 0;
    return (padded - a->kernel) / a->stride + 1;
}

rf_status rf_conv2d_check(const rf_conv2d_args *a, rf_error *err) {
    const char *op = "conv2d";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_in(op, "height", a->height, 1, 1 << 24, err));
    RF_TRY(size_in(op, "width", a->width, 1, 1 << 24, err));
    RF_TRY(
        size_in(op, "in_channels", a->in_channels, 1, INT32_MAX / 9, err)); /* kernel^2 * in_channels is a GEMM's k */
    RF_TRY(size_from(op, "out_channels", a->out_channels, 1, err));
    if (a->kernel != 1 && a->kernel != 3)
        return rf_fail(err, RF_ERR_SHAPE, "%s: kernel is %d, must be 1 or 3", op, a->kernel);
    RF_TRY(size_in(op, "stride", a->stride, 1, 2, err));
    RF_TRY(size_in(op, "pad_before", a->pad_before, 0, a->kernel - 1, err));
    RF_TRY(size_in(op, "pad_after", a->pad_after, 0, a->kernel - 1, err));
    int64_t out_h = rf_conv2d_out_size(a, a->height), out_w = rf_conv2d_out_size(a, a->width);
    if (out_h < 1 || out_w < 1)
        return rf_fail(err, RF_ERR_SHAPE, "%s: %lld x %lld pixels are too few for kernel %d with padding %d + %d", op,
                       (long long)a->height, (long long)a->width, a->kernel, a->pad_before, a->pad_after);
    RF_TRY(product_fits(op, "x", (int64_t[]){a->batch, a->height, a->width, a->in_channels}, 4, err));
    return product_fits(op, "y", (int64_t[]){a->batch, out_h, out_w, a->out_channels}, 4, err);
}

rf_status rf_conv2d_check_run(const rf_conv2d_args *a, rf_error *err) {
    const char *op = "conv2d";
    RF_TRY(rf_conv2d_check(a, err));
    if (a->batch == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "w", a->w, err));
    RF_TRY(pointer(op, "y", a->y, err));
    RF_TRY(not_same(op, "y", a->y, "x", a->x, err));
    return not_same(op, "y", a->y, "w", a->w, err);
}

rf_status rf_upsample2x_check(const rf_upsample2x_args *a, rf_error *err) {
    const char *op = "upsample2x";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_in(op, "height", a->height, 1, 1 << 24, err));
    RF_TRY(size_in(op, "width", a->width, 1, 1 << 24, err));
    RF_TRY(size_from(op, "channels", a->channels, 1, err));
    return product_fits(op, "y", (int64_t[]){a->batch, 2 * a->height, 2 * a->width, a->channels}, 4, err);
}

rf_status rf_upsample2x_check_run(const rf_upsample2x_args *a, rf_error *err) {
    const char *op = "upsample2x";
    RF_TRY(rf_upsample2x_check(a, err));
    if (a->batch == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    return not_same(op, "y", a->y, "x", a->x, err);
}

/* ---- rows and statistics ---- */

rf_status rf_rows_check(const rf_rows_args *a, rf_error *err) {
    const char *op = "rows";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "num_rows", a->num_rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    if (a->src_ld != 0) RF_TRY(stride_from(op, "src_ld", a->src_ld, a->cols, err));
    if (a->dst_ld != 0) RF_TRY(stride_from(op, "dst_ld", a->dst_ld, a->cols, err));
    return RF_OK;
}

rf_status rf_rows_check_run(const rf_rows_args *a, rf_error *err) {
    const char *op = "rows";
    RF_TRY(rf_rows_check(a, err));
    if (a->num_rows == 0) return RF_OK;
    RF_TRY(pointer(op, "src", a->src, err));
    RF_TRY(pointer(op, "dst", a->dst, err));
    RF_TRY(pointer(op, "rows", a->rows, err));
    return not_same(op, "dst", a->dst, "src", a->src, err);
}

rf_status rf_reduce_pair_check(const rf_reduce_pair_args *a, rf_error *err) {
    const char *op = "reduce_pair";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "a_dtype", a->a_dtype, err));
    if (a->b) RF_TRY(float_dtype(op, "b_dtype", a->b_dtype, err));
    RF_TRY(enum_in(op, "kind", (int)a->kind, RF_REDUCE_ROW_NORMS, err));
    RF_TRY(size_from(op, "groups", a->groups, 0, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    if (a->a_ld != 0) RF_TRY(stride_from(op, "a_ld", a->a_ld, a->cols, err));
    if (a->b && a->b_ld != 0) RF_TRY(stride_from(op, "b_ld", a->b_ld, a->cols, err));
    RF_TRY(product_fits(op, "a", (int64_t[]){a->rows, a->a_ld ? a->a_ld : a->cols, a->groups}, 3, err));
    if (!a->b) return RF_OK;
    return product_fits(op, "b", (int64_t[]){a->rows, a->b_ld ? a->b_ld : a->cols, a->groups}, 3, err);
}

rf_status rf_reduce_pair_check_run(const rf_reduce_pair_args *a, rf_error *err) {
    const char *op = "reduce_pair";
    RF_TRY(rf_reduce_pair_check(a, err));
    if (a->groups == 0) return RF_OK;
    if (a->rows > 0) RF_TRY(pointer(op, "a", a->a, err));
    if (a->rows > 0 && a->kind != RF_REDUCE_PLAIN) RF_TRY(pointer(op, "b (of a ratio)", a->b, err));
    return pointer(op, "out", a->out, err);
}

/* ---- caching ---- */

rf_status rf_group_copy_check(const rf_group_copy_args *a, rf_error *err) {
    const char *op = "group_copy";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "a_dtype", a->a_dtype, err));
    RF_TRY(float_dtype(op, "dst_dtype", a->dst_dtype, err));
    RF_TRY(size_from(op, "groups", a->groups, 0, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    RF_TRY(stride_from(op, "a_ld", a->a_ld, a->cols, err));
    RF_TRY(stride_from(op, "dst_ld", a->dst_ld, a->cols, err));
    RF_TRY(product_fits(op, "a", (int64_t[]){a->rows, a->a_ld, a->groups}, 3, err));
    RF_TRY(product_fits(op, "dst", (int64_t[]){a->rows, a->dst_ld, a->groups}, 3, err));
    if (a->b) {
        RF_TRY(float_dtype(op, "b_dtype", a->b_dtype, err));
        RF_TRY(size_in(op, "b_cols", a->b_cols, 1, a->cols, err));
        RF_TRY(stride_from(op, "b_ld", a->b_ld, a->b_cols, err));
        RF_TRY(product_fits(op, "b", (int64_t[]){a->rows, a->b_ld, a->groups}, 3, err));
    }
    if (a->dst_slot) RF_TRY(stride_from(op, "dst_slot_stride", a->dst_slot_stride, a->rows * a->dst_ld, err));
    return RF_OK;
}

/* dst may be the buffer of `name` if an element of one is the same element of the other. */
static rf_status same_elements(const char *op, const char *name, const void *dst, const void *p, bool same,
                               rf_error *err) {
    if (dst != p || same) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: dst may not be the buffer of %s with another dtype, ld or index", op,
                   name);
}

rf_status rf_group_copy_check_run(const rf_group_copy_args *a, rf_error *err) {
    const char *op = "group_copy";
    RF_TRY(rf_group_copy_check(a, err));
    if (a->groups == 0 || a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "a", a->a, err));
    RF_TRY(pointer(op, "dst", a->dst, err));
    RF_TRY(same_elements(op, "a", a->dst, a->a,
                         a->a_dtype == a->dst_dtype && a->a_ld == a->dst_ld && a->a_index == a->dst_index, err));
    return same_elements(op, "b", a->dst, a->b,
                         a->b_dtype == a->dst_dtype && a->b_ld == a->dst_ld && a->b_index == a->dst_index, err);
}

rf_status rf_combine_check(const rf_combine_args *a, rf_error *err) {
    const char *op = "combine";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "ring_dtype", a->ring_dtype, err));
    RF_TRY(float_dtype(op, "dst_dtype", a->dst_dtype, err));
    RF_TRY(size_in(op, "num_slots", a->num_slots, 1, 64, err));
    RF_TRY(size_in(op, "num_classes", a->num_classes, 1, 256, err));
    RF_TRY(size_from(op, "groups", a->groups, 0, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    RF_TRY(stride_from(op, "dst_ld", a->dst_ld, a->cols, err));
    RF_TRY(product_fits(op, "dst", (int64_t[]){a->rows, a->dst_ld, a->groups}, 3, err));
    if (a->num_slots > 1) {
        RF_TRY(stride_from(op, "slot_stride", a->slot_stride, a->rows * a->cols, err));
        RF_TRY(product_fits(op, "ring", (int64_t[]){a->num_slots, a->slot_stride}, 2, err));
    }
    if (!a->base) return RF_OK;
    RF_TRY(float_dtype(op, "base_dtype", a->base_dtype, err));
    RF_TRY(size_in(op, "base_cols", a->base_cols, 1, a->cols, err));
    RF_TRY(stride_from(op, "base_ld", a->base_ld, a->base_cols, err));
    return product_fits(op, "base", (int64_t[]){a->rows, a->base_ld, a->groups}, 3, err);
}

rf_status rf_combine_check_run(const rf_combine_args *a, rf_error *err) {
    const char *op = "combine";
    RF_TRY(rf_combine_check(a, err));
    if (a->groups == 0 || a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "ring", a->ring, err));
    RF_TRY(pointer(op, "weights", a->weights, err));
    RF_TRY(pointer(op, "dst", a->dst, err));
    RF_TRY(not_same(op, "dst", a->dst, "ring", a->ring, err));
    return same_elements(op, "base", a->dst, a->base,
                         a->base_dtype == a->dst_dtype && a->base_ld == a->dst_ld && a->base_index == a->dst_index,
                         err);
}

rf_status rf_row_merge_check(const rf_row_merge_args *a, rf_error *err) {
    const char *op = "row_merge";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "x_dtype", a->x_dtype, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "groups", a->groups, 0, err));
    RF_TRY(size_from(op, "rows", a->rows, 0, err));
    RF_TRY(size_from(op, "groups * rows", a->groups * a->rows, 0, err)); /* place numbers them in int32 */
    RF_TRY(size_from(op, "cols", a->cols, 1, err));
    return modulation(op, "mod", &a->mod, (int64_t[]){a->ring_a ? a->gate_a : -1, a->gate_b}, 2, a->cols, err);
}

rf_status rf_row_merge_check_run(const rf_row_merge_args *a, rf_error *err) {
    const char *op = "row_merge";
    RF_TRY(rf_row_merge_check(a, err));
    if (a->groups == 0 || a->rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "y", a->y, err));
    RF_TRY(pointer(op, "ring_b", a->ring_b, err));
    RF_TRY(pointer(op, "place", a->place, err));
    if ((a->ring_a && a->gate_a >= 0) || a->gate_b >= 0) RF_TRY(pointer(op, "mod.table", a->mod.table, err));
    RF_TRY(not_same(op, "x", a->x, "y", a->y, err));
    RF_TRY(not_same(op, "x", a->x, "ring_a", a->ring_a, err));
    RF_TRY(not_same(op, "x", a->x, "ring_b", a->ring_b, err));
    RF_TRY(not_same(op, "ring_b", a->ring_b, "y", a->y, err));
    return not_same(op, "ring_b", a->ring_b, "ring_a", a->ring_a, err);
}

/* ---- rotary positions ---- */

rf_status rf_rope_check(const rf_rope_args *a, rf_error *err) {
    const char *op = "rope";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "num_rows", a->num_rows, 0, err));
    RF_TRY(size_in(op, "num_heads", a->num_heads, 1, 65535, err));
    RF_TRY(size_in(op, "head_dim", a->head_dim, 2, 65536, err));
    RF_TRY(size_in(op, "num_pairs", a->num_pairs, 1, a->head_dim / 2, err));
    RF_TRY(size_from(op, "period", a->period, 1, err));
    if (a->num_rows > 1) RF_TRY(stride_from(op, "row_stride", a->row_stride, (int64_t)a->num_heads * a->head_dim, err));
    return product_fits(op, "x", (int64_t[]){a->num_rows, a->row_stride}, 2, err);
}

rf_status rf_rope_check_run(const rf_rope_args *a, rf_error *err) {
    const char *op = "rope";
    RF_TRY(rf_rope_check(a, err));
    if (a->num_rows == 0) return RF_OK;
    RF_TRY(pointer(op, "x", a->x, err));
    return pointer(op, "table", a->table, err);
}

rf_status rf_temporal_attention_check(const rf_temporal_attention_args *a, rf_error *err) {
    const char *op = "temporal_attention";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    RF_TRY(size_from(op, "samples", a->samples, 0, err));
    RF_TRY(size_in(op, "frames", a->frames, 1, RF_MAX_WINDOW, err));
    RF_TRY(size_from(op, "tokens", a->tokens, 1, err));
    RF_TRY(size_in(op, "num_heads", a->num_heads, 1, 65535, err));
    RF_TRY(size_in(op, "head_dim", a->head_dim, 2, 65536, err));
    if (a->head_dim % 2 != 0) return rf_fail(err, RF_ERR_SHAPE, "%s: head_dim is %d, must be even", op, a->head_dim);
    RF_TRY(size_in(op, "num_pairs", a->num_pairs, 0, a->head_dim / 2, err));
    RF_TRY(size_from(op, "slots", a->slots, 0, err));
    if (a->rows) {
        RF_TRY(size_from(op, "num_rows", a->num_rows, 0, err));
        if (a->frames != 1)
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: rows are for one new frame, there are %lld", op,
                           (long long)a->frames);
        if (a->sample_index) return rf_fail(err, RF_ERR_ARGUMENT, "%s: rows exclude sample_index", op);
        RF_TRY(product_fits(op, "qkv", (int64_t[]){a->num_rows, 3, a->num_heads, a->head_dim}, 4, err));
    }
    const int64_t qkv[] = {a->samples, a->frames, a->tokens, 3, a->num_heads, a->head_dim};
    RF_TRY(product_fits(op, "qkv", qkv, 6, err));
    return product_fits(op, "kv of a sample", (int64_t[]){a->tokens, a->num_heads, 2, a->slots, a->head_dim}, 5, err);
}

rf_status rf_temporal_attention_check_run(const rf_temporal_attention_args *a, rf_error *err) {
    const char *op = "temporal_attention";
    RF_TRY(rf_temporal_attention_check(a, err));
    if (a->rows ? a->num_rows == 0 : a->samples == 0) return RF_OK;
    RF_TRY(pointer(op, "qkv", a->qkv, err));
    RF_TRY(pointer(op, "out", a->out, err));
    RF_TRY(pointer(op, "window", a->window, err));
    if (a->num_pairs > 0) RF_TRY(pointer(op, "table", a->table, err));
    if (a->store) RF_TRY(pointer(op, "kv (to store into)", a->kv, err));
    if (a->kv) RF_TRY(size_from(op, "slots", a->slots, 1, err));
    RF_TRY(not_same(op, "out", a->out, "qkv", a->qkv, err));
    return not_same(op, "kv", a->kv, "qkv", a->qkv, err);
}

/* ---- sampler ---- */

rf_status rf_sampler_step_check(const rf_sampler_step_args *a, rf_error *err) {
    const char *op = "sampler_step";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "model_dtype", a->model_dtype, err));
    RF_TRY(size_from(op, "batch", a->batch, 0, err));
    RF_TRY(size_in(op, "branches", a->branches, 1, 2, err));
    RF_TRY(size_in(op, "channels", a->channels, 1, INT32_MAX / 2, err));
    if (a->out_channels != a->channels && a->out_channels != 2 * a->channels)
        return rf_fail(err, RF_ERR_SHAPE, "%s: out_channels is %lld, must be %lld or %lld", op,
                       (long long)a->out_channels, (long long)a->channels, (long long)(2 * a->channels));
    if (a->learned_variance && a->out_channels != 2 * a->channels)
        return rf_fail(err, RF_ERR_SHAPE, "%s: a learned variance needs out_channels %lld, has %lld", op,
                       (long long)(2 * a->channels), (long long)a->out_channels);
    RF_TRY(patch_grid(op, a->frames, a->height, a->width, a->pt, a->ph, a->pw, err));
    RF_TRY(size_in(op, "guided_channels", a->guided_channels, 0, a->channels, err));
    RF_TRY(finite_value(op, "guidance_scale", a->guidance_scale, err));
    return product_fits(op, "model_out",
                        (int64_t[]){a->branches, a->batch, a->out_channels, a->frames, a->height, a->width}, 6, err);
}

rf_status rf_sampler_step_check_run(const rf_sampler_step_args *a, rf_error *err) {
    const char *op = "sampler_step";
    RF_TRY(rf_sampler_step_check(a, err));
    if (a->batch == 0) return RF_OK;
    RF_TRY(pointer(op, "model_out", a->model_out, err));
    RF_TRY(pointer(op, "x", a->x, err));
    RF_TRY(pointer(op, "x0_prev", a->x0_prev, err));
    RF_TRY(pointer(op, "coefs", a->coefs, err));
    return pointer(op, "step", a->step, err);
}

rf_status rf_post_check(const rf_post_args *a, rf_error *err) {
    if (a->num < 0 || a->stride < a->num)
        return rf_fail(err, RF_ERR_SHAPE, "post: %lld numbers with a stride of %lld", (long long)a->num,
                       (long long)a->stride);
    return RF_OK;
}

rf_status rf_post_check_run(const rf_post_args *a, rf_error *err) {
    const char *op = "post";
    RF_TRY(rf_post_check(a, err));
    RF_TRY(pointer(op, "src", a->src, err));
    RF_TRY(pointer(op, "host", a->host, err));
    RF_TRY(pointer(op, "step", a->step, err));
    RF_TRY(pointer(op, "count", a->count, err));
    return pointer(op, "host_count", a->host_count, err);
}

rf_status rf_step_advance_check(const rf_step_advance_args *a, rf_error *err) {
    const char *op = "step_advance";
    RF_TRY(given(op, a, err));
    RF_TRY(size_from(op, "num_groups", a->num_groups, 0, err));
    RF_TRY(size_from(op, "rows_per_step", a->rows_per_step, 0, err));
    return size_from(op, "steps_per_chunk", a->steps_per_chunk, 1, err);
}

rf_status rf_step_advance_check_run(const rf_step_advance_args *a, rf_error *err) {
    const char *op = "step_advance";
    RF_TRY(rf_step_advance_check(a, err));
    RF_TRY(pointer(op, "step", a->step, err));
    if (a->num_groups == 0) return RF_OK;
    RF_TRY(pointer(op, "slots", a->slots, err));
    return pointer(op, "mod_index", a->mod_index, err);
}

rf_status rf_fill_normal_check(const rf_fill_normal_args *a, rf_error *err) {
    const char *op = "fill_normal";
    RF_TRY(given(op, a, err));
    RF_TRY(float_dtype(op, "dtype", a->dtype, err));
    if (a->num < 0 || a->num > INT64_MAX / 8)
        return rf_fail(err, RF_ERR_SHAPE, "%s: num is %lld, must be at least 0", op, (long long)a->num);
    RF_TRY(finite_value(op, "mean", a->mean, err));
    return finite_value(op, "std", a->std, err);
}

rf_status rf_fill_normal_check_run(const rf_fill_normal_args *a, rf_error *err) {
    RF_TRY(rf_fill_normal_check(a, err));
    if (a->num == 0) return RF_OK;
    return pointer("fill_normal", "out", a->out, err);
}
