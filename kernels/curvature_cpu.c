/* kernels/curvature_cpu.c
 * Maths    velocities, curvature, classes and drift of the last three outputs; see cache.h. A row that does not move along a
 *          curve (|a| = 0) has kappa 0 whatever its speed; a NaN counts as +inf, in kappa and in the drift.
 * Sums     in double: per row, then rows in order.
 * Tasks    rows of a set; the order statistics of a set by one thread.
 * Scratch  four f32 per row: kappa, A = |v0|^2, B = <v0, v1>, C = |v1|^2, each [num_sets][groups_per_set][rows]. */
#include "kernels/cache_checks.h"
#include "kernels/cpu.h"
#include "kernels/select.h"

#define PLANES    4
#define MAX_STEPS 16

/* ---- checks ---- */

size_t rf_curvature_workspace_bytes(int64_t all_groups, int64_t rows) {
    if (all_groups <= 0 || rows <= 0) return 0;
    return (size_t)all_groups * (size_t)rows * PLANES * sizeof(float);
}

rf_status rf_curvature_check(const rf_curvature_args *a, rf_error *err) {
    const char *op = "curvature";
    if (!a) return rf_fail(err, RF_ERR_ARGUMENT, "%s: no arguments", op);
    RF_TRY(rf_check_size(op, "num_sets", a->num_sets, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "groups_per_set", a->groups_per_set, 1, 2, err));
    RF_TRY(rf_check_size(op, "rows", a->rows, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "cols", a->cols, 1, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "ld", a->ld, a->cols, INT32_MAX, err));
    RF_TRY(rf_check_count(op, "kappa", a->num_sets, a->groups_per_set, a->rows, err));
    if (a->group_rows != 0) RF_TRY(rf_check_size(op, "group_rows", a->group_rows, a->rows, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "num_classes_per_row", a->num_classes_per_row, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "class_ld", a->class_ld, a->num_classes_per_row, INT32_MAX, err));
    int64_t group_rows = a->group_rows ? a->group_rows : a->rows;
    RF_TRY(rf_check_count(op, "ring", a->num_sets, a->groups_per_set, group_rows, err));
    /* of the last group only what counts: ring may point into the first one */
    int64_t slot = a->rows > 0 ? (a->num_sets * a->groups_per_set - 1) * group_rows + a->rows : 0;
    if (slot > 0 && (a->slot_stride / slot < a->ld || a->slot_stride > INT64_MAX / 8))
        return rf_fail(err, RF_ERR_SHAPE, "%s: slot_stride is %lld, must be at least %lld * %lld", op,
                       (long long)a->slot_stride, (long long)slot, (long long)a->ld);
    RF_TRY(rf_check_size(op, "horizon", a->horizon, 1, MAX_STEPS, err));
    RF_TRY(rf_check_value(op, "p_chaotic", a->p_chaotic, 0, 1, err));
    RF_TRY(rf_check_value(op, "p_stable", a->p_stable, 0, a->p_chaotic, err));
    RF_TRY(rf_check_value(op, "eps", a->eps, 0, 1e30f, err));
    RF_TRY(rf_check_value(op, "floor", a->floor, 0, 1e30f, err));
    for (int k = 0; k < a->horizon; k++) {
        RF_TRY(rf_check_value(op, "step_a", a->step_a[k], -1e30f, 1e30f, err));
        RF_TRY(rf_check_value(op, "step_b", a->step_b[k], -1e30f, 1e30f, err));
    }
    return RF_OK;
}

rf_status rf_curvature_check_run(const rf_curvature_args *a, rf_error *err) {
    const char *op = "curvature";
    RF_TRY(rf_curvature_check(a, err));
    if (a->num_sets == 0 || a->rows == 0) return RF_OK;
    RF_TRY(rf_check_pointer(op, "ring", a->ring, err));
    RF_TRY(rf_check_pointer(op, "slots", a->slots, err));
    RF_TRY(rf_check_pointer(op, "gaps", a->gaps, err));
    RF_TRY(rf_check_pointer(op, "row_class", a->row_class, err));
    RF_TRY(rf_check_pointer(op, "kappa", a->kappa, err));
    RF_TRY(rf_check_pointer(op, "drift", a->drift, err));
    return rf_check_workspace(op, a->workspace, a->workspace_bytes,
                              rf_curvature_workspace_bytes(a->num_sets * a->groups_per_set, a->rows), err);
}

/* ---- one row ---- */

typedef struct {
    double v0v0, v0v1, v1v1, aa;
} row_dots;

RF_HOT static row_dots dots_of(const float *y0, const float *y1, const float *y2, int64_t cols, float gap0,
                               float gap1) {
    double v0v0 = 0, v0v1 = 0, v1v1 = 0, aa = 0;
#pragma omp simd reduction(+ : v0v0, v0v1, v1v1, aa)
    for (int64_t c = 0; c < cols; c++) {
        float v0 = (y0[c] - y1[c]) / gap0, v1 = (y1[c] - y2[c]) / gap1;
        double a = (double)((v0 - v1) / gap0), p = (double)v0, q = (double)v1;
        v0v0 += p * p;
        v0v1 += p * q;
        v1v1 += q * q;
        aa += a * a;
    }
    return (row_dots){v0v0, v0v1, v1v1, aa};
}

/* ---- one set ---- */

/* The value at p * (num - 1) of the sorted values, linearly between its neighbours. */
static double quantile(const float *values, int64_t num, float p) {
    double at = (double)(p * (float)(num - 1)); /* as torch does: 0.6f * 15 is 9 only when it is rounded */
    int64_t low = (int64_t)at;
    double rest = at - (double)low;
    rf_selected found = rf_select_rank(values, num, low);
    double v = (double)rf_key_float(found.key);
    if (rest <= 0 || low + 1 >= num || found.rank + 1 < found.equal) return v;
    float next = INFINITY;
    for (int64_t i = 0; i < num; i++)
        if (rf_float_key(values[i]) > found.key && values[i] < next) next = values[i];
    return v + rest * ((double)next - v);
}

static int64_t group_of(const rf_curvature_args *a, int64_t set, int member) {
    int64_t packed = member * a->num_sets + set;
    return a->index ? a->index[packed] : packed;
}

/* class: of every cell of a row. */
static void set_class(const rf_curvature_args *a, int64_t group_rows, int64_t group, int64_t row, uint8_t class) {
    int64_t ld = a->class_ld ? a->class_ld : 1, num = a->num_classes_per_row ? a->num_classes_per_row : 1;
    memset(a->row_class + (group * group_rows + row) * ld, class, (size_t)num);
}

static void classify_set(rf_stream *stream, const rf_curvature_args *a, int64_t set) {
    const int64_t rows = a->rows, num = a->groups_per_set * rows, group_rows = a->group_rows ? a->group_rows : rows;
    float *plane[PLANES];
    for (int i = 0; i < PLANES; i++) plane[i] = a->workspace + (i * a->num_sets + set) * num;
    float *kappa = plane[0];
    bool valid = true;
    for (int m = 0; m < a->groups_per_set; m++) valid &= a->gaps[group_of(a, set, m) * 2] > 0;
    if (!valid) {
        for (int m = 0; m < a->groups_per_set; m++) {
            int64_t g = group_of(a, set, m);
            for (int64_t r = 0; r < rows; r++) {
                set_class(a, group_rows, g, r, 2);
                a->kappa[g * group_rows + r] = 0;
            }
            for (int k = 0; k < a->horizon; k++) a->drift[g * a->horizon + k] = 0;
        }
        return;
    }

#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (num * a->cols > 8192)
    for (int64_t i = 0; i < num; i++) {
        int64_t g = group_of(a, set, i >= rows), r = i % rows;
        const float *at = a->ring + (g * group_rows + r) * a->ld;
        const int32_t *slots = a->slots + g * 3;
        row_dots dots = dots_of(at + slots[0] * a->slot_stride, at + slots[1] * a->slot_stride,
                                at + slots[2] * a->slot_stride, a->cols, a->gaps[g * 2], a->gaps[g * 2 + 1]);
        kappa[i] = (float)sqrt(dots.aa);
        plane[1][i] = (float)dots.v0v0;
        plane[2][i] = (float)dots.v0v1;
        plane[3][i] = (float)dots.v1v1;
    }

    double guard = (double)a->eps;
    if (a->floor > 0) {
        double sum = 0;
        for (int64_t i = 0; i < num; i++) sum += (double)plane[1][i];
        guard += (double)a->floor * sum / (double)num;
    }
    for (int64_t i = 0; i < num; i++) {
        float ratio = kappa[i] == 0 ? 0.0f : (float)((double)kappa[i] / ((double)plane[1][i] + guard));
        kappa[i] = isnan(ratio) ? INFINITY : ratio;
    }

    double q_stable = quantile(kappa, num, a->p_stable), q_chaotic = quantile(kappa, num, a->p_chaotic);
    double sums[MAX_STEPS] = {0};
    int64_t num_chaotic = 0;
    for (int64_t i = 0; i < num; i++) {
        int64_t g = group_of(a, set, i >= rows);
        double k0 = (double)kappa[i];
        uint8_t class = k0 >= q_chaotic ? 2 : k0 < q_stable ? 0 : 1;
        a->kappa[g * group_rows + i % rows] = kappa[i];
        set_class(a, group_rows, g, i % rows, class);
        if (class != 2) continue;
        num_chaotic++;
        for (int k = 0; k < a->horizon; k++) {
            double x = (double)a->step_a[k], y = (double)a->step_b[k];
            double square = x * x * (double)plane[1][i] + 2 * x * y * (double)plane[2][i] + y * y * (double)plane[3][i];
            double term = k0 * sqrt(square > 0 ? square : 0);
            sums[k] += isnan(term) ? INFINITY : term;
        }
    }
    double count = (double)(a->mean_over_all ? num : num_chaotic);
    for (int m = 0; m < a->groups_per_set; m++)
        for (int k = 0; k < a->horizon; k++)
            a->drift[group_of(a, set, m) * a->horizon + k] = (float)(count > 0 ? sums[k] / count : 0.0);
}

rf_status rf_curvature_cpu(rf_stream *stream, const rf_curvature_args *a, rf_error *err) {
    RF_TRY(stream ? rf_curvature_check_run(a, err) : rf_curvature_check(a, err));
    if (!stream || a->num_sets == 0 || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "curvature");
    for (int64_t set = 0; set < a->num_sets; set++) classify_set(stream, a, set);
    return RF_OK;
}
