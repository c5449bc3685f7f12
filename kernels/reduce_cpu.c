/* kernels/reduce_cpu.c
 * Maths    four sums per group, see reduce.h.
 * Order    rows are cut into at most 64 runs by their number alone; a run is summed row by row in double, runs are added
 *          in order: the same bits for every number of threads. */
#include "kernels/cpu.h"

#define MAX_RUNS 64

typedef struct {
    double abs_diff, abs_b, sq_diff, sq_b;
} pair_sums;

RF_HOT static pair_sums sum_row(const float *a, const float *b, int64_t cols) {
    double abs_diff = 0, abs_b = 0, sq_diff = 0, sq_b = 0;
    if (b) {
#pragma omp simd reduction(+ : abs_diff, abs_b, sq_diff, sq_b)
        for (int64_t c = 0; c < cols; c++) {
            double d = (double)a[c] - (double)b[c], e = (double)b[c];
            abs_diff += fabs(d);
            sq_diff += d * d;
            abs_b += fabs(e);
            sq_b += e * e;
        }
    } else {
#pragma omp simd reduction(+ : abs_diff, sq_diff)
        for (int64_t c = 0; c < cols; c++) {
            double d = (double)a[c];
            abs_diff += fabs(d);
            sq_diff += d * d;
        }
    }
    return (pair_sums){abs_diff, abs_b, sq_diff, sq_b};
}

/* The same, with |d| / (|b| + 1e-10) in place of |d|. */
RF_HOT static pair_sums sum_row_ratio(const float *a, const float *b, int64_t cols) {
    double ratio = 0, abs_b = 0, sq_diff = 0, sq_b = 0;
#pragma omp simd reduction(+ : ratio, abs_b, sq_diff, sq_b)
    for (int64_t c = 0; c < cols; c++) {
        double d = (double)a[c] - (double)b[c], e = (double)b[c];
        ratio += fabs(d) / (fabs(e) + 1e-10);
        sq_diff += d * d;
        abs_b += fabs(e);
        sq_b += e * e;
    }
    return (pair_sums){ratio, abs_b, sq_diff, sq_b};
}

RF_HOT static double sum_row_squares(const float *a, int64_t cols) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < cols; c++) sum += (double)a[c] * (double)a[c];
    return sum;
}

static pair_sums sum_row_of(rf_reduce_kind kind, const float *a, const float *b, int64_t cols) {
    if (kind == RF_REDUCE_RATIO) return sum_row_ratio(a, b, cols);
    pair_sums sums = sum_row(a, b, cols);
    if (kind == RF_REDUCE_ROW_NORMS) sums.abs_diff = sums.sq_b > 0 ? sqrt(sum_row_squares(a, cols) / sums.sq_b) : 0;
    return sums;
}

static void add_scaled(pair_sums *to, pair_sums from, double weight) {
    to->abs_diff += weight * from.abs_diff;
    to->abs_b += weight * from.abs_b;
    to->sq_diff += weight * from.sq_diff;
    to->sq_b += weight * from.sq_b;
}

rf_status rf_reduce_pair_cpu(rf_stream *stream, const rf_reduce_pair_args *a, rf_error *err) {
    RF_TRY(stream ? rf_reduce_pair_check_run(a, err) : rf_reduce_pair_check(a, err));
    RF_TRY(rf_check_f32("reduce_pair: a_dtype", a->a_dtype, err));
    if (a->b) RF_TRY(rf_check_f32("reduce_pair: b_dtype", a->b_dtype, err));
    if (!stream || a->groups == 0) return RF_OK;
    rf_stream_note_launch(stream, "reduce_pair");
    int64_t a_ld = a->a_ld ? a->a_ld : a->cols, b_ld = a->b_ld ? a->b_ld : a->cols;
    int64_t run_len = rf_max64(1, rf_div_up(a->rows, MAX_RUNS));
    int64_t runs = rf_div_up(a->rows, run_len);
    for (int64_t group = 0; group < a->groups; group++) {
        pair_sums partial[MAX_RUNS] = {{0}};
        const float *group_a = (const float *)a->a + (a->a_index ? a->a_index[group] : group) * a->rows * a_ld;
        const float *group_b = NULL;
        if (a->b) group_b = (const float *)a->b + (a->b_index ? a->b_index[group] : group) * a->rows * b_ld;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (a->rows * a->cols > 8192)
        for (int64_t run = 0; run < runs; run++) {
            int64_t end = rf_min64(a->rows, (run + 1) * run_len);
            for (int64_t row = run * run_len; row < end; row++) {
                const float *pb = group_b ? group_b + row * b_ld : NULL;
                add_scaled(&partial[run], sum_row_of(a->kind, group_a + row * a_ld, pb, a->cols),
                           a->row_weight ? (double)a->row_weight[row] : 1.0);
            }
        }
        pair_sums sum = {0};
        for (int64_t run = 0; run < runs; run++) add_scaled(&sum, partial[run], 1.0);
        float *out = a->out + (a->out_index ? a->out_index[group] : group) * 4;
        out[0] = (float)sum.abs_diff;
        out[1] = (float)sum.abs_b;
        out[2] = (float)sum.sq_diff;
        out[3] = (float)sum.sq_b;
    }
    return RF_OK;
}
