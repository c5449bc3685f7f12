/* kernels/norm_cpu.c
 * Maths    row norms with modulation and the gated residual in front of them; see norm.h.
 * Sums     in double; the mean is kept as a pair of floats so that x - mean is exact for rows with a large mean.
 * Tasks    one row each. */
#include "kernels/cpu.h"

RF_HOT static double row_sum(const float *x, int64_t cols) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < cols; c++) sum += (double)x[c];
    return sum;
}

RF_HOT static double row_sum_squares(const float *x, int64_t cols, float mean_hi, float mean_lo) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < cols; c++) {
        double d = (x[c] - mean_hi) - mean_lo;
        sum += d * d;
    }
    return sum;
}

RF_HOT static void row_normalise(float *y, const float *x, int64_t cols, float mean_hi, float mean_lo, float inv_std) {
    for (int64_t c = 0; c < cols; c++) y[c] = ((x[c] - mean_hi) - mean_lo) * inv_std;
}

RF_HOT static void row_scale(float *y, int64_t cols, const float *factor, float plus) {
    for (int64_t c = 0; c < cols; c++) y[c] *= factor[c] + plus;
}

RF_HOT static void row_shift(float *y, int64_t cols, const float *addend) {
    for (int64_t c = 0; c < cols; c++) y[c] += addend[c];
}

void rf_cpu_norm_row(float *y, const float *x, int64_t cols, rf_norm_kind kind, float eps, const float *weight,
                     const float *bias, const float *shift, const float *scale) {
    float mean_hi = 0, mean_lo = 0;
    if (kind == RF_NORM_LAYER) {
        double mean = row_sum(x, cols) / (double)cols;
        mean_hi = (float)mean;
        mean_lo = (float)(mean - mean_hi);
    }
    double var = row_sum_squares(x, cols, mean_hi, mean_lo) / (double)cols;
    row_normalise(y, x, cols, mean_hi, mean_lo, (float)(1.0 / sqrt(var + eps)));
    if (weight) row_scale(y, cols, weight, 0.0f);
    if (bias) row_shift(y, cols, bias);
    if (scale) row_scale(y, cols, scale, 1.0f);
    if (shift) row_shift(y, cols, shift);
}

static rf_status check_table(const char *what, const rf_modulation *mod, bool used, rf_error *err) {
    return used ? rf_check_f32(what, mod->dtype, err) : RF_OK;
}

rf_status rf_norm_cpu(rf_stream *stream, const rf_norm_args *a, rf_error *err) {
    RF_TRY(stream ? rf_norm_check_run(a, err) : rf_norm_check(a, err));
    RF_TRY(rf_check_f32("norm: x_dtype", a->x_dtype, err));
    RF_TRY(rf_check_f32("norm: y_dtype", a->y_dtype, err));
    RF_TRY(check_table("norm: mod", &a->mod, a->shift >= 0 || a->scale >= 0, err));
    if (!stream || a->num_rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "norm");
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_rows * a->cols > RF_SERIAL_WORK)
    for (int64_t i = 0; i < a->num_rows; i++) {
        int64_t row = a->rows ? a->rows[i] : i;
        rf_cpu_norm_row((float *)a->y + i * a->cols, (const float *)a->x + row * a->cols, a->cols, a->kind, a->eps,
                        a->weight, a->bias, rf_cpu_modulation_row(&a->mod, row, a->shift),
                        rf_cpu_modulation_row(&a->mod, row, a->scale));
    }
    return RF_OK;
}

/* x = base + gate * sum_t w_t * term_t over a row; w and gate may be NULL (1). x may be base. */
RF_HOT static void residual_row(float *x, const float *base, const float *gate, const float *const *terms,
                                const float *weights, int num_terms, int64_t cols) {
    for (int64_t c0 = 0; c0 < cols; c0 += 256) {
        float sum[256];
        int64_t num = cols - c0 < 256 ? cols - c0 : 256;
        for (int64_t c = 0; c < num; c++) sum[c] = 0;
        for (int t = 0; t < num_terms; t++) {
            float w = weights ? weights[t] : 1.0f;
            const float *term = terms[t] + c0;
            for (int64_t c = 0; c < num; c++) sum[c] += w * term[c];
        }
        if (gate)
            for (int64_t c = 0; c < num; c++) sum[c] *= gate[c0 + c];
        for (int64_t c = 0; c < num; c++) x[c0 + c] = base[c0 + c] + sum[c];
    }
}

RF_HOT void rf_cpu_add_gated_row(float *x, const float *term, const float *gate, int64_t cols) {
    if (gate)
        for (int64_t c = 0; c < cols; c++) x[c] += gate[c] * term[c];
    else
        for (int64_t c = 0; c < cols; c++) x[c] += term[c];
}

rf_status rf_residual_cpu(rf_stream *stream, const rf_residual_args *a, rf_error *err) {
    RF_TRY(stream ? rf_residual_check_run(a, err) : rf_residual_check(a, err));
    RF_TRY(rf_check_f32("residual: x_dtype", a->x_dtype, err));
    RF_TRY(rf_check_f32("residual: y_dtype", a->y_dtype, err));
    if (a->base) RF_TRY(rf_check_f32("residual: base_dtype", a->base_dtype, err));
    RF_TRY(check_table("residual: gate_mod", &a->gate_mod, a->gate >= 0 || (a->extra && a->extra_gate >= 0), err));
    if (a->norm_y) {
        RF_TRY(rf_check_f32("residual: norm_y_dtype", a->norm_y_dtype, err));
        RF_TRY(check_table("residual: norm_mod", &a->norm_mod, a->norm_shift >= 0 || a->norm_scale >= 0, err));
    }
    if (!stream || a->num_rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "residual");
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_rows * a->cols > RF_SERIAL_WORK)
    for (int64_t i = 0; i < a->num_rows; i++) {
        int64_t row = a->rows ? a->rows[i] : i;
        float *x = (float *)a->x + row * a->cols;
        const float *base = a->base ? (const float *)a->base + row % a->base_period * a->cols : x;
        const float *terms[RF_MAX_TERMS] = {NULL}, *weights = a->weights;
        float used_weights[RF_MAX_TERMS];
        int num_terms = 0;
        int64_t term_row = a->term_rows ? a->term_rows[i] : i;
        if (a->term_group) { /* only terms that have a weight */
            int64_t group = a->term_group[i / a->rows_per_term_group];
            term_row = group * a->rows_per_term_group + i % a->rows_per_term_group;
            for (int t = 0; t < a->num_terms; t++) {
                float w = a->weights[group * a->num_terms + t];
                if (w == 0) continue;
                used_weights[num_terms] = w;
                terms[num_terms++] = (const float *)a->terms[t] + term_row * a->cols;
            }
            weights = used_weights;
        } else {
            for (; num_terms < a->num_terms; num_terms++)
                terms[num_terms] = (const float *)a->terms[num_terms] + term_row * a->cols;
            if (weights && a->weight_row) weights += a->weight_row[i] * a->num_terms;
        }
        if (a->store) memcpy((float *)a->store + a->store_rows[i] * a->cols, terms[0], (size_t)a->cols * sizeof(float));
        if (num_terms > 0 || base != x)
            residual_row(x, base, rf_cpu_modulation_row(&a->gate_mod, row, a->gate), terms, weights, num_terms,
                         a->cols);
        if (a->extra)
            rf_cpu_add_gated_row(x, (const float *)a->extra + term_row * a->cols,
                                 rf_cpu_modulation_row(&a->gate_mod, row, a->extra_gate), a->cols);
        if (a->norm_y)
            rf_cpu_norm_row((float *)a->norm_y + i * a->cols, x, a->cols, a->norm_kind, a->norm_eps, a->norm_weight,
                            a->norm_bias, rf_cpu_modulation_row(&a->norm_mod, row, a->norm_shift),
                            rf_cpu_modulation_row(&a->norm_mod, row, a->norm_scale));
    }
    return RF_OK;
}
