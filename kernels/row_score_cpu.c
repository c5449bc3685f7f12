/* kernels/row_score_cpu.c
 * Maths    column sums of the attention map, or 1 - |v|, per head; summed over heads and divided by the L2 norm over the rows
 *          of a group; see cache.h.
 * Sums     over queries in double, in order; over heads in double, in order.
 * Tasks    64 key rows of a head each, a GEMM for every 64 queries; then one group each. */
#include "kernels/cache_checks.h"
#include "kernels/cpu.h"

#define KEYS    64
#define QUERIES 64 /* at once */

/* ---- checks ---- */

size_t rf_row_score_workspace_bytes(int64_t groups, int64_t rows, int num_heads) {
    if (groups <= 0 || rows <= 0 || num_heads <= 0) return 0;
    return (size_t)groups * (size_t)rows * (size_t)num_heads * sizeof(float);
}

rf_status rf_row_score_check(const rf_row_score_args *a, rf_error *err) {
    const char *op = "row_score";
    if (!a) return rf_fail(err, RF_ERR_ARGUMENT, "%s: no arguments", op);
    if ((int)a->kind < 0 || a->kind > RF_ROW_SCORE_VALUE)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: kind is %d, must be 0..%d", op, (int)a->kind, RF_ROW_SCORE_VALUE);
    if (a->dtype != RF_DTYPE_F32 && a->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "%s: dtype is %s, must be f32 or bf16", op, rf_dtype_name(a->dtype));
    RF_TRY(rf_check_size(op, "groups", a->groups, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "num_heads", a->num_heads, 1, 65535, err));
    RF_TRY(rf_check_size(op, "head_dim", a->head_dim, 1, 65536, err));
    RF_TRY(rf_check_count(op, "lse", a->groups, a->rows, a->num_heads, err));
    const int64_t most = INT64_MAX / 8;
    RF_TRY(rf_check_size(op, "batch_stride", a->batch_stride, 0, most, err));
    RF_TRY(rf_check_size(op, "row_stride", a->row_stride, a->rows > 1 ? a->head_dim : 0, most, err));
    RF_TRY(rf_check_size(op, "head_stride", a->head_stride, a->num_heads > 1 ? a->head_dim : 0, most, err));
    return rf_check_value(op, "softmax_scale", a->softmax_scale, -1e30f, 1e30f, err);
}

rf_status rf_row_score_check_run(const rf_row_score_args *a, rf_error *err) {
    const char *op = "row_score";
    RF_TRY(rf_row_score_check(a, err));
    if (a->groups == 0 || a->rows == 0) return RF_OK;
    if (a->kind == RF_ROW_SCORE_ATTENTION) {
        RF_TRY(rf_check_pointer(op, "q", a->q, err));
        RF_TRY(rf_check_pointer(op, "k", a->k, err));
        RF_TRY(rf_check_pointer(op, "lse", a->lse, err));
    } else {
        RF_TRY(rf_check_pointer(op, "v", a->v, err));
    }
    RF_TRY(rf_check_pointer(op, "out", a->out, err));
    return rf_check_workspace(op, a->workspace, a->workspace_bytes,
                              rf_row_score_workspace_bytes(a->groups, a->rows, a->num_heads), err);
}

/* ---- one head ---- */

RF_HOT static void add_exp(double *sum, const float *s, int64_t num, float lse) {
    for (int64_t i = 0; i < num; i++) sum[i] += (double)rf_exp(s[i] - lse);
}

/* part[key] for keys first .. end - 1 of a head. */
static void attention_keys(const rf_row_score_args *a, int64_t group, int64_t head, int64_t first, int64_t end,
                           float *part) {
    const int64_t base = group * a->batch_stride + head * a->head_stride;
    const float *q = (const float *)a->q + base, *k = (const float *)a->k + base;
    const float *lse = a->lse + (group * a->num_heads + head) * a->rows;
    double sum[KEYS] = {0};
    float s[QUERIES * KEYS];
    for (int64_t i0 = 0; i0 < a->rows; i0 += QUERIES) {
        int64_t num = rf_min64(QUERIES, a->rows - i0);
        rf_cpu_sgemm(num, end - first, a->head_dim, a->softmax_scale, q + i0 * a->row_stride, a->row_stride,
                     k + first * a->row_stride, a->row_stride, true, 0.0f, s, KEYS);
        for (int64_t i = 0; i < num; i++) /* a query that saw no key adds nothing */
            if (lse[i0 + i] != -INFINITY) add_exp(sum, s + i * KEYS, end - first, lse[i0 + i]);
    }
    for (int64_t j = first; j < end; j++) part[j] = (float)sum[j - first];
}

static void value_keys(const rf_row_score_args *a, int64_t group, int64_t head, int64_t first, int64_t end,
                       float *part) {
    const float *v = (const float *)a->v + group * a->batch_stride + head * a->head_stride;
    for (int64_t j = first; j < end; j++) {
        const float *row = v + j * a->row_stride;
        double square = 0;
        for (int64_t c = 0; c < a->head_dim; c++) square += (double)row[c] * (double)row[c];
        part[j] = (float)(1.0 - sqrt(square));
    }
}

/* ---- all ---- */

rf_status rf_row_score_cpu(rf_stream *stream, const rf_row_score_args *a, rf_error *err) {
    RF_TRY(stream ? rf_row_score_check_run(a, err) : rf_row_score_check(a, err));
    RF_TRY(rf_check_f32("row_score: dtype", a->dtype, err));
    if (!stream || a->groups == 0 || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "row_score");
    const int64_t tiles = rf_div_up(a->rows, KEYS);
    rf_cpu_blas_single_thread();
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t task = 0; task < a->groups * a->num_heads * tiles; task++) {
        int64_t tile = task % tiles, head = task / tiles % a->num_heads, group = task / tiles / a->num_heads;
        int64_t first = tile * KEYS, end = rf_min64(a->rows, first + KEYS);
        float *part = a->workspace + (group * a->num_heads + head) * a->rows;
        if (a->kind == RF_ROW_SCORE_ATTENTION)
            attention_keys(a, group, head, first, end, part);
        else
            value_keys(a, group, head, first, end, part);
    }
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t group = 0; group < a->groups; group++) {
        const float *part = a->workspace + group * a->num_heads * a->rows;
        float *out = a->out + (a->index ? a->index[group] : group) * a->rows;
        double square = 0;
        for (int64_t r = 0; r < a->rows; r++) {
            double sum = 0;
            for (int64_t head = 0; head < a->num_heads; head++) sum += (double)part[head * a->rows + r];
            out[r] = (float)sum;
            square += sum * sum;
        }
        double norm = square > 0 ? sqrt(square) : 1.0;
        for (int64_t r = 0; r < a->rows; r++) out[r] = (float)((double)out[r] / norm);
    }
    return RF_OK;
}
