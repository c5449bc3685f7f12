/* tests/kernels/test_cache_stats.c - curvature, token selection and row scores against their plain definitions: sorting,
 * predictions written out, the attention map itself. */
#include "harness.h"

static void download(void *host, const void *dev, size_t bytes) {
    rf_error err = {0};
    ck_assert_int_eq(rf_stream_download(test_stream(), host, dev, bytes, &err), RF_OK);
    ck_assert_int_eq(rf_stream_synchronize(test_stream(), &err), RF_OK);
}

/* ---- curvature ---- */

#define MAX_HORIZON 16

typedef struct {
    int sets, per_set, all_groups, rows, cols, ld, horizon;
    double p_stable, p_chaotic, floor;
    bool over_all, permuted;
} curve_case;

static const curve_case curve_cases[] = {
    {2, 1, 2, 256, 32, 32, 6, .3, .6, 0, false, false},  {3, 2, 7, 97, 16, 16, 2, .2, .8, 0, true, true},
    {1, 2, 2, 1024, 32, 36, 6, .3, .7, 0, false, true},  {2, 1, 4, 33, 17, 19, 16, .3, .6, .1, false, true},
    {1, 1, 1, 5, 64, 64, 1, .3, .6, 0, true, false},     {1, 1, 1, 1, 8, 8, 3, .3, .6, 0, false, false},
    {1, 2, 3, 20000, 16, 16, 2, .3, .6, 0, false, true}, {1, 1, 2, 300, 150, 152, 4, .25, .5, .01, true, true},
    {2, 2, 4, 513, 3, 3, 5, 0, 1, 0, false, false},      {4, 1, 4, 64, 40, 40, 2, 1, 1, 2, false, true},
    {1, 1, 1, 2, 4, 4, 2, .5, .5, 0, false, false},
};
#define NUM_CURVE_CASES ((int)(sizeof curve_cases / sizeof curve_cases[0]))

typedef struct {
    rf_curvature_args a;
    operand ring, gaps, kappa, drift;
    void *classes;
    int32_t *index, *slots; /* host copies */
    uint8_t *class_of;
} curve;

/* Steps of the smoothstep blend with horizon n: u(k) = (1 - s) v0 + s v1, s = 3 x^2 - 2 x^3, x = k / n. */
static void blend(double k, double n, double *c, double *d) {
    double x = k / n, s = x * x * (3 - 2 * x);
    *c = k * (1 - s);
    *d = k * s;
}

/* Columns past cols, slots that no group names, and outputs are NaN. */
static curve curve_new(const curve_case *c) {
    curve t = {0};
    const int groups = c->sets * c->per_set;
    const size_t slot = (size_t)(c->all_groups * c->rows * c->ld);
    t.ring = op_normal(RF_DTYPE_F32, 3 * slot, 0.3, 1);
    for (size_t i = 0; i < 3 * slot; i++)
        if ((int)(i % (size_t)c->ld) >= c->cols) t.ring.host[i] = NAN;
    op_upload(&t.ring);
    t.index = (int32_t *)host_doubles((size_t)c->all_groups);
    random_permutation(t.index, c->all_groups, 5);
    t.slots = (int32_t *)host_doubles((size_t)c->all_groups * 3);
    double *gaps = host_doubles((size_t)c->all_groups * 2);
    for (int g = 0; g < c->all_groups; g++) {
        random_permutation(t.slots + g * 3, 3, (uint64_t)g);
        gaps[g * 2] = 1 + g % 3;
        gaps[g * 2 + 1] = 2 + g % 4;
        if (!c->permuted) t.index[g] = g;
    }
    t.gaps = op_values(RF_DTYPE_F32, (size_t)c->all_groups * 2, gaps);
    t.kappa = op_poison(RF_DTYPE_F32, (size_t)(c->all_groups * c->rows));
    t.drift = op_poison(RF_DTYPE_F32, (size_t)(c->all_groups * c->horizon));
    t.classes = dev_bytes((size_t)(c->all_groups * c->rows));
    t.class_of = (uint8_t *)host_doubles((size_t)(c->all_groups * c->rows));
    t.a = (rf_curvature_args){.ring = t.ring.dev,
                              .slot_stride = (int64_t)slot,
                              .ld = c->ld,
                              .cols = c->cols,
                              .rows = c->rows,
                              .num_sets = c->sets,
                              .groups_per_set = c->per_set,
                              .index = c->permuted ? dev_i32(t.index, (size_t)groups) : NULL,
                              .slots = dev_i32(t.slots, (size_t)c->all_groups * 3),
                              .gaps = t.gaps.dev,
                              .p_stable = (float)c->p_stable,
                              .p_chaotic = (float)c->p_chaotic,
                              .eps = 1e-8f,
                              .floor = (float)c->floor,
                              .mean_over_all = c->over_all,
                              .horizon = c->horizon,
                              .row_class = t.classes,
                              .kappa = t.kappa.dev,
                              .drift = t.drift.dev,
                              .workspace_bytes = rf_curvature_workspace_bytes(groups, c->rows)};
    t.a.workspace = dev_bytes(t.a.workspace_bytes);
    for (int k = 1; k <= c->horizon; k++) {
        double c1, d1, c0, d0;
        blend(k, c->horizon, &c1, &d1);
        blend(k - 1, c->horizon, &c0, &d0);
        t.a.step_a[k - 1] = (float)(c1 - c0);
        t.a.step_b[k - 1] = (float)(d1 - d0);
    }
    return t;
}

static void curve_run(curve *t) {
    expect_ok(test_ops()->curvature(NULL, &t->a, &err));
    expect_ok(test_ops()->curvature(test_stream(), &t->a, &err));
    download(t->class_of, t->classes, t->kappa.num);
    op_download(&t->kappa);
    op_download(&t->drift);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double quantile(const double *sorted, int num, double p) {
    double at = (double)((float)p * (float)(num - 1)), low = floor(at); /* a float product, as torch has it */
    double v = sorted[(int)low], next = sorted[(int)low + 1 < num ? (int)low + 1 : num - 1];
    return at == low || v == next ? v : v + (at - low) * (next - v);
}

static const float *snapshot(const curve *t, int age, int g, int r) {
    return t->ring.host + t->slots[g * 3 + age] * t->a.slot_stride + (g * t->a.rows + r) * t->a.ld;
}

/* Checks one run: kappa from its definition; classes from sorted kappas as they came back; drift from predictions written
 * out, over the rows that came back chaotic. */
static void curve_expect(curve *t, const char *what) {
    const rf_curvature_args *a = &t->a;
    const int rows = (int)a->rows, num = a->groups_per_set * rows, cols = (int)a->cols;
    double *want = host_doubles(t->kappa.num), *want_drift = host_doubles(t->drift.num);
    uint8_t *touched = (uint8_t *)host_doubles(t->kappa.num);
    for (size_t i = 0; i < t->kappa.num; i++) want[i] = NAN;
    for (size_t i = 0; i < t->drift.num; i++) want_drift[i] = NAN;
    for (int s = 0; s < (int)a->num_sets; s++) {
        double *sorted = host_doubles((size_t)num), *v = host_doubles((size_t)(2 * cols));
        double mean = 0;
        for (int pass = 0; pass < 2; pass++) { /* the mean speed, then the rows */
            for (int i = 0; i < num; i++) {
                const int g = t->index[(i / rows) * a->num_sets + s], r = i % rows;
                const double gap0 = (double)t->gaps.host[g * 2], gap1 = (double)t->gaps.host[g * 2 + 1];
                double speed = 0, bend = 0;
                for (int c = 0; c < cols; c++) {
                    double y0 = snapshot(t, 0, g, r)[c], y1 = snapshot(t, 1, g, r)[c], y2 = snapshot(t, 2, g, r)[c];
                    double v0 = (y0 - y1) / gap0, v1 = (y1 - y2) / gap1;
                    speed += v0 * v0;
                    bend += (v0 - v1) / gap0 * ((v0 - v1) / gap0);
                }
                if (pass == 0) {
                    mean += speed / num;
                    continue;
                }
                want[g * rows + r] = sqrt(bend) / (speed + (double)a->eps + (double)a->floor * mean);
                sorted[i] = (double)t->kappa.host[g * rows + r];
                touched[g * rows + r] = 1;
            }
        }
        qsort(sorted, (size_t)num, sizeof *sorted, by_value);
        const double q_s = quantile(sorted, num, (double)a->p_stable);
        const double q_c = quantile(sorted, num, (double)a->p_chaotic);
        double sums[MAX_HORIZON] = {0};
        int chaotic = 0;
        for (int i = 0; i < num; i++) {
            const int g = t->index[(i / rows) * a->num_sets + s], r = i % rows, at = g * rows + r;
            const double kappa = (double)t->kappa.host[at];
            const int class = kappa >= q_c ? 2 : kappa < q_s ? 0 : 1;
            ck_assert_msg(t->class_of[at] == class, "%s: row %d of group %d has class %d, want %d (kappa %g, %g, %g)",
                          what, r, g, t->class_of[at], class, kappa, q_s, q_c);
            if (class != 2) continue;
            chaotic++;
            const double gap0 = (double)t->gaps.host[g * 2], gap1 = (double)t->gaps.host[g * 2 + 1];
            for (int c = 0; c < cols; c++) {
                double y0 = snapshot(t, 0, g, r)[c], y1 = snapshot(t, 1, g, r)[c], y2 = snapshot(t, 2, g, r)[c];
                v[c] = (y0 - y1) / gap0;
                v[cols + c] = (y1 - y2) / gap1;
            }
            for (int k = 1; k <= a->horizon; k++) { /* | yhat(k) - yhat(k - 1) | */
                double c1, d1, c0, d0, square = 0;
                blend(k, a->horizon, &c1, &d1);
                blend(k - 1, a->horizon, &c0, &d0);
                for (int c = 0; c < cols; c++) {
                    double now = c1 * v[c] + d1 * v[cols + c], before = c0 * v[c] + d0 * v[cols + c];
                    square += (now - before) * (now - before);
                }
                sums[k - 1] += kappa * sqrt(square);
            }
        }
        ck_assert_msg(chaotic > 0, "%s: no chaotic row", what);
        for (int m = 0; m < a->groups_per_set; m++)
            for (int k = 0; k < a->horizon; k++)
                want_drift[t->index[m * a->num_sets + s] * a->horizon + k] =
                    sums[k] / (a->mean_over_all ? num : chaotic);
    }
    for (size_t i = 0; i < t->kappa.num; i++)
        ck_assert_msg(touched[i] || t->class_of[i] == 255, "%s: class %zu was written", what, i);
    expect_close(&t->kappa, want, 5e-6, "curvature kappa", "%s", what);
    expect_close(&t->drift, want_drift, 1e-5, "curvature drift", "%s", what);
}

START_TEST(curvature_is_its_definition) {
    curve t = curve_new(&curve_cases[_i]);
    curve_run(&t);
    char what[32];
    snprintf(what, sizeof what, "case %d", _i);
    curve_expect(&t, what);
}
END_TEST

/* The same bits whatever ran before, and on every run. */
START_TEST(curvature_repeats_its_bits) {
    curve t = curve_new(&curve_cases[2]);
    curve_run(&t);
    operand kappa = op_clone(&t.kappa), drift = op_clone(&t.drift);
    curve_run(&t);
    expect_same_bits(&t.kappa, &kappa, "curvature kappa", "again");
    expect_same_bits(&t.drift, &drift, "curvature drift", "again");
}
END_TEST

/* y(step) = base + step * slope in whole numbers: nothing bends. All kappas are equal, so that >= makes every row chaotic
 * and < none stable; the drift of kappa 0 is 0. */
START_TEST(straight_lines_have_no_curvature) {
    const curve_case c = {2, 1, 2, 50, 24, 24, 6, .3, .6, 0, false, true};
    curve t = curve_new(&c);
    for (int g = 0; g < 2; g++) {
        const double gap0 = 2, gap1 = 4;
        t.gaps.host[g * 2] = (float)gap0;
        t.gaps.host[g * 2 + 1] = (float)gap1;
        for (int r = 0; r < c.rows; r++)
            for (int i = 0; i < c.cols; i++) {
                const float base = (float)(r * 3 - i), slope = (float)((r + i * 7) % 11 - 4);
                const float steps[3] = {6, 4, 0};
                for (int age = 0; age < 3; age++) ((float *)snapshot(&t, age, g, r))[i] = base + slope * steps[age];
            }
    }
    op_upload(&t.ring);
    op_upload(&t.gaps);
    curve_run(&t);
    for (size_t i = 0; i < t.kappa.num; i++) {
        ck_assert_msg(t.kappa.host[i] == 0, "kappa %zu is %g", i, (double)t.kappa.host[i]);
        ck_assert_int_eq(t.class_of[i], 2);
    }
    for (size_t i = 0; i < t.drift.num; i++) ck_assert_msg(t.drift.host[i] == 0, "drift %g", (double)t.drift.host[i]);
}
END_TEST

/* kappa |dy| has no unit: other features and another clock change neither classes nor drift. */
START_TEST(classes_and_drift_have_no_unit) {
    const curve_case c = {2, 2, 4, 200, 16, 16, 6, .3, .6, 0, false, false};
    curve t = curve_new(&c);
    t.a.eps = 0;
    curve_run(&t);
    double *drift = host_doubles(t.drift.num), *kappa = host_doubles(t.kappa.num);
    uint8_t *class_of = (uint8_t *)host_doubles(t.kappa.num);
    for (size_t i = 0; i < t.drift.num; i++) drift[i] = (double)t.drift.host[i];
    for (size_t i = 0; i < t.kappa.num; i++) kappa[i] = (double)t.kappa.host[i] / 7;
    memcpy(class_of, t.class_of, t.kappa.num);
    for (size_t i = 0; i < t.ring.num; i++) t.ring.host[i] *= 7;
    for (size_t i = 0; i < t.gaps.num; i++) t.gaps.host[i] *= 3;
    for (int k = 0; k < c.horizon; k++) t.a.step_a[k] *= 3, t.a.step_b[k] *= 3;
    op_upload(&t.ring);
    op_upload(&t.gaps);
    curve_run(&t);
    ck_assert_mem_eq(class_of, t.class_of, t.kappa.num);
    expect_close(&t.drift, drift, 2e-6, "curvature drift", "scaled");
    expect_close(&t.kappa, kappa, 2e-6, "curvature kappa", "scaled");
}
END_TEST

/* A range of rows and columns is measured where it stands as it is alone; classes go to every cell of a row, and nothing else is
 * written. */
START_TEST(a_stream_of_the_outputs_is_measured_alone) {
    static const struct { int row, col, per_set; } starts[] = {{0, 0, 1}, {40, 8, 2}, {7, 3, 1}, {0, 12, 2}};
    const int row = starts[_i].row, col = starts[_i].col, rows = 57, cols = 20, cells = 5, cell = 1, num_cells = 3;
    const curve_case outer = {2, starts[_i].per_set, 4, 100, 36, 36, 4, .3, .6, .01, true, true};
    curve_case inner = outer;
    inner.rows = rows, inner.cols = inner.ld = cols;
    curve t = curve_new(&outer), alone = curve_new(&inner);
    for (int slot = 0; slot < 3; slot++)
        for (int g = 0; g < outer.all_groups; g++)
            for (int r = 0; r < rows; r++)
                memcpy(alone.ring.host + slot * alone.a.slot_stride + (g * rows + r) * cols,
                       t.ring.host + slot * t.a.slot_stride + (g * outer.rows + row + r) * outer.ld + col,
                       (size_t)cols * sizeof(float));
    op_upload(&alone.ring);
    curve_run(&alone);

    const size_t num = (size_t)(outer.all_groups * outer.rows);
    uint8_t *classes = dev_bytes(num * (size_t)cells), *class_of = (uint8_t *)host_doubles(num * (size_t)cells);
    t.a.ring += row * outer.ld + col;
    t.a.cols = cols, t.a.rows = rows, t.a.group_rows = outer.rows;
    t.a.class_ld = cells, t.a.num_classes_per_row = num_cells;
    t.a.row_class = classes + row * cells + cell;
    t.a.kappa += row;
    expect_ok(test_ops()->curvature(NULL, &t.a, &err));
    expect_ok(test_ops()->curvature(test_stream(), &t.a, &err));
    download(class_of, classes, num * (size_t)cells);
    op_download(&t.kappa);
    op_download(&t.drift);
    bool computed[4] = {false};
    for (int i = 0; i < outer.sets * outer.per_set; i++) computed[t.index[i]] = true;
    for (int g = 0; g < outer.all_groups; g++)
        for (int r = 0; r < outer.rows; r++) {
            const bool inside = computed[g] && r >= row && r < row + rows;
            const int at = g * outer.rows + r, from = g * rows + r - row;
            if (inside)
                ck_assert_msg(fabsf(t.kappa.host[at] - alone.kappa.host[from]) <= 1e-6f * alone.kappa.host[from],
                              "kappa %d of %d is %g, want %g", r, g, (double)t.kappa.host[at],
                              (double)alone.kappa.host[from]);
            else
                ck_assert(isnan(t.kappa.host[at]));
            for (int c = 0; c < cells; c++) {
                const bool touched = inside && c >= cell && c < cell + num_cells;
                ck_assert_int_eq(class_of[at * cells + c], touched ? alone.class_of[from] : 255);
            }
        }
    double *drift = host_doubles(t.drift.num);
    for (size_t i = 0; i < t.drift.num; i++) drift[i] = (double)alone.drift.host[i];
    expect_close(&t.drift, drift, 1e-6, "curvature drift", "of a stream");
}
END_TEST

/* Row `to` becomes row `from`: equal kappas to the bit. */
static void copy_row(curve *t, int g, int to, int from) {
    for (int age = 0; age < 3; age++)
        memcpy((float *)snapshot(t, age, g, to), snapshot(t, age, g, from), (size_t)t->a.cols * sizeof(float));
}

START_TEST(equal_curvatures_are_chaotic_and_ties_share_a_class) {
    const curve_case c = {1, 1, 1, 40, 12, 12, 4, .3, .6, 0, false, false};
    curve t = curve_new(&c);
    for (int r = 1; r < c.rows; r++) copy_row(&t, 0, r, 0);
    op_upload(&t.ring);
    curve_run(&t);
    curve_expect(&t, "all equal");
    for (int r = 0; r < c.rows; r++) ck_assert_int_eq(t.class_of[r], 2);
    ck_assert(t.drift.host[0] > 0);

    /* Two kinds of rows, half each. */
    t = curve_new(&c);
    for (int r = 2; r < c.rows; r++) copy_row(&t, 0, r, r % 2);
    op_upload(&t.ring);
    curve_run(&t);
    const int high = t.kappa.host[1] > t.kappa.host[0];
    for (int r = 0; r < c.rows; r++) ck_assert_int_eq(t.class_of[r], r % 2 == high ? 2 : 1); /* Q.3 is the low value */
    t.a.p_stable = t.a.p_chaotic = 0.5f; /* between the two values */
    curve_run(&t);
    for (int r = 0; r < c.rows; r++) ck_assert_int_eq(t.class_of[r], r % 2 == high ? 2 : 0);
    t.a.p_stable = 0, t.a.p_chaotic = 1;
    curve_run(&t);
    for (int r = 0; r < c.rows; r++) ck_assert_int_eq(t.class_of[r], r % 2 == high ? 2 : 1);
}
END_TEST

/* A row that is not a number must end a run of predictions, not begin one: +inf, chaotic, and so is the drift. */
START_TEST(not_a_number_counts_as_infinite) {
    const curve_case c = {2, 1, 2, 40, 12, 12, 4, .3, .6, 0, false, false};
    curve t = curve_new(&c);
    ((float *)snapshot(&t, 1, 0, 7))[3] = NAN;
    op_upload(&t.ring);
    curve_run(&t);
    ck_assert(isinf(t.kappa.host[7]) && t.class_of[7] == 2);
    for (int k = 0; k < c.horizon; k++) {
        ck_assert(isinf(t.drift.host[k]) && t.drift.host[k] > 0);
        ck_assert(isfinite(t.drift.host[c.horizon + k]));
    }
    int counts[2][3] = {{0}};
    for (int i = 0; i < 80; i++) counts[i / 40][t.class_of[i]]++;
    for (int i = 0; i < 3; i++) ck_assert_int_eq(counts[0][i], counts[1][i]);
}
END_TEST

/* Fewer than three snapshots: nothing of the ring and no slot is looked at. In a pooled set one such group is enough. */
START_TEST(short_history_is_chaotic_without_drift) {
    for (int per_set = 1; per_set <= 2; per_set++) {
        const curve_case c = {3, per_set, 6, 70, 16, 16, 3, .3, .6, 0, false, true};
        curve t = curve_new(&c);
        const int short_group = t.index[per_set == 2 ? 3 + 1 : 1], partner = t.index[1]; /* of set 1 */
        t.gaps.host[short_group * 2] = 0;
        op_upload(&t.gaps);
        for (int i = 0; i < 3; i++) t.slots[short_group * 3 + i] = -1000000000;
        t.a.slots = dev_i32(t.slots, 18);
        curve_run(&t);
        for (int s = 0; s < 3; s++)
            for (int m = 0; m < per_set; m++) {
                const int g = t.index[m * 3 + s];
                const bool is_short = g == short_group || g == partner;
                int chaotic = 0;
                for (int r = 0; r < c.rows; r++) {
                    chaotic += t.class_of[g * c.rows + r] == 2;
                    ck_assert((t.kappa.host[g * c.rows + r] == 0) == is_short);
                }
                ck_assert((chaotic == c.rows) == is_short);
                for (int k = 0; k < c.horizon; k++) ck_assert((t.drift.host[g * c.horizon + k] == 0) == is_short);
            }
    }
}
END_TEST

/* ---- token selection ---- */

typedef struct {
    int sites, groups, all_groups, frames, h, w, cell;
    double age_weight, bonus;
    int levels; /* s1 takes so many values, 0 = any */
    bool permuted;
} pick_case;

static const pick_case pick_cases[] = {
    {3, 2, 2, 1, 16, 16, 2, .25, .6, 0, false},  {2, 3, 5, 1, 4, 4, 2, .25, .6, 3, true},
    {4, 2, 4, 1, 7, 9, 2, 0, .6, 2, true},       {2, 1, 2, 3, 5, 6, 4, 1, 2, 0, true},
    {1, 2, 2, 1, 32, 32, 0, .25, .6, 4, false},  {2, 2, 3, 1, 64, 32, 3, .25, .4, 0, true},
    {1, 1, 2, 2, 64, 128, 2, .25, .6, 50, true}, {2, 4, 4, 1, 1, 33, 1, -.5, .6, 0, false},
    {1, 1, 1, 1, 1, 1, 2, .25, .6, 0, false},    {2, 2, 2, 1, 25, 41, 2, .25, 0, 1, false},
};
#define NUM_PICK_CASES ((int)(sizeof pick_cases / sizeof pick_cases[0]))

typedef struct {
    rf_token_select_args a;
    operand s1, age;
    int32_t *index, *counts;
    void *packed, *state;
    int32_t *got_packed, *got_state, *got_place;
    size_t list_num;
    int tokens;
} pick;

#define UNPLACED 0x7eadbeef /* what place holds before it is written */

static pick pick_new(const pick_case *c) {
    pick t = {.tokens = c->frames * c->h * c->w};
    const size_t num = (size_t)(c->sites * c->all_groups * t.tokens);
    t.s1 = op_normal(RF_DTYPE_F32, num, 0, 1);
    t.age = op_normal(RF_DTYPE_F32, num, 0, 1);
    for (size_t i = 0; i < num; i++) {
        if (c->levels) t.s1.host[i] = floorf(t.s1.host[i] * (float)c->levels) / (float)c->levels;
        t.age.host[i] = c->levels ? 2 : floorf(fabsf(t.age.host[i]) * 5);
    }
    op_upload(&t.s1);
    op_upload(&t.age);
    t.index = (int32_t *)host_doubles((size_t)c->all_groups);
    random_permutation(t.index, c->all_groups, 9);
    for (int g = 0; g < c->all_groups && !c->permuted; g++) t.index[g] = g;
    t.counts = (int32_t *)host_doubles((size_t)c->sites);
    for (int s = 0; s < c->sites; s++) t.counts[s] = s == 2 ? 0 : s == 3 ? t.tokens : 1 + (int)(uniform() * t.tokens);
    const int64_t stride = c->groups * t.tokens + 3;
    t.list_num = (size_t)(c->sites * stride);
    t.packed = dev_bytes(t.list_num * 4);
    t.state = dev_bytes(t.list_num * 4);
    t.got_packed = (int32_t *)host_doubles(t.list_num);
    t.got_state = (int32_t *)host_doubles(t.list_num);
    t.got_place = (int32_t *)host_doubles(t.list_num);
    for (size_t i = 0; i < t.list_num; i++) t.got_place[i] = UNPLACED;
    t.a = (rf_token_select_args){.s1 = t.s1.dev,
                                 .age = t.age.dev,
                                 .counts = dev_i32(t.counts, (size_t)c->sites),
                                 .index = c->permuted ? dev_i32(t.index, (size_t)c->groups) : NULL,
                                 .rows_packed = t.packed,
                                 .rows_state = t.state,
                                 .place = (int32_t *)dev_i32(t.got_place, t.list_num),
                                 .list_stride = stride,
                                 .num_sites = c->sites,
                                 .groups = c->groups,
                                 .all_groups = c->all_groups,
                                 .tokens = t.tokens,
                                 .frames = c->frames,
                                 .grid_h = c->h,
                                 .grid_w = c->w,
                                 .cell = c->cell,
                                 .age_weight = (float)c->age_weight,
                                 .bonus = (float)c->bonus,
                                 .workspace_bytes = (size_t)(c->sites * c->groups * t.tokens) * 4};
    t.a.workspace = dev_bytes(t.a.workspace_bytes);
    return t;
}

static void pick_run(pick *t) {
    expect_ok(test_ops()->token_select(NULL, &t->a, &err));
    expect_ok(test_ops()->token_select(test_stream(), &t->a, &err));
    download(t->got_packed, t->packed, t->list_num * 4);
    download(t->got_state, t->state, t->list_num * 4);
    if (t->a.place) download(t->got_place, t->a.place, t->list_num * 4);
}

typedef struct {
    float score;
    int row;
} ranked;

static int best_first(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->row - y->row;
}

static int by_row(const void *a, const void *b) {
    return ((const ranked *)a)->row - ((const ranked *)b)->row;
}

/* The score of row r after the bonus: every row of its cell is looked at. */
static float with_bonus(const rf_token_select_args *a, const float *score, int r) {
    const int w = (int)a->grid_w, h = (int)a->grid_h, f = r / (h * w), y = r / w % h, x = r % w;
    for (int yi = 0; yi < h; yi++) {
        for (int xi = 0; xi < w && yi / a->cell == y / a->cell; xi++) {
            const int i = (f * h + yi) * w + xi;
            if (xi / a->cell != x / a->cell) continue;
            if (score[i] > score[r] || (score[i] == score[r] && i < r)) return score[r];
        }
    }
    return score[r] + a->bonus * score[r];
}

static void pick_expect(pick *t, const operand *old_age, const char *what) {
    const rf_token_select_args *a = &t->a;
    const int tokens = t->tokens;
    double *want_age = host_doubles(t->age.num);
    for (size_t i = 0; i < t->age.num; i++) want_age[i] = (double)old_age->host[i]; /* other groups keep theirs */
    int32_t step = 0;
    if (a->random) download(&step, a->step, sizeof step);
    ranked *all = malloc((size_t)tokens * sizeof *all);
    float *score = malloc((size_t)tokens * sizeof *score);
    for (int s = 0; s < (int)a->num_sites; s++) {
        const int count = t->counts[s];
        for (int p = 0; p < (int)a->groups; p++) {
            const int g = t->index[p];
            const size_t at = (size_t)((s * (int)a->all_groups + g) * tokens);
            for (int r = 0; r < tokens; r++) {
                const float age = old_age->host[at + (size_t)r];
                score[r] = t->s1.host[at + (size_t)r] + a->age_weight * age / (float)tokens;
                if (a->random) {
                    const uint32_t counter[4] = {(uint32_t)r, (uint32_t)(g / a->groups_per_branch), (uint32_t)s,
                                                 (uint32_t)step};
                    const uint32_t key[2] = {(uint32_t)a->seed, (uint32_t)(a->seed >> 32)};
                    uint32_t words[4];
                    rf_philox4x32(counter, key, words);
                    score[r] = (float)(words[0] >> 8) / 16777216;
                }
            }
            for (int r = 0; r < tokens; r++) {
                all[r].row = r;
                all[r].score = !a->random && a->cell > 0 && a->bonus != 0 ? with_bonus(a, score, r) : score[r];
                want_age[at + (size_t)r]++;
            }
            qsort(all, (size_t)tokens, sizeof *all, best_first);
            qsort(all, (size_t)count, sizeof *all, by_row);
            for (int i = 0; i < count; i++) {
                const size_t from = (size_t)(s * a->list_stride + p * count + i);
                ck_assert_msg(t->got_packed[from] == p * tokens + all[i].row &&
                                  t->got_state[from] == g * tokens + all[i].row,
                              "%s: entry %d of site %d group %d is %d, %d; want row %d of %d, %d", what, i, s, p,
                              t->got_packed[from], t->got_state[from], all[i].row, p, g);
                want_age[at + (size_t)all[i].row] = 0;
            }
        }
        const int32_t *place = t->got_place + s * a->list_stride;
        int placed = 0;
        for (int64_t i = 0; i < a->list_stride; i++) {
            const bool chosen = placed < a->groups * count && t->got_packed[s * a->list_stride + placed] == i;
            const int32_t want = chosen ? placed : i < a->groups * tokens ? -1 : UNPLACED;
            if (place[i] != want)
                ck_abort_msg("%s: place %d of site %d is %d, want %d", what, (int)i, s, place[i], want);
            placed += chosen;
        }
        for (int64_t i = a->groups * count; i < a->list_stride; i++) {
            ck_assert_int_eq(t->got_packed[s * a->list_stride + i], -1); /* not written */
            ck_assert_int_eq(t->got_state[s * a->list_stride + i], -1);
        }
    }
    free(all);
    free(score);
    expect_abs(&t->age, want_age, 0, "token_select age", "%s", what);
}

START_TEST(token_select_is_sorting) {
    pick t = pick_new(&pick_cases[_i]);
    operand old_age = op_clone(&t.age);
    pick_run(&t);
    char what[32];
    snprintf(what, sizeof what, "case %d", _i);
    pick_expect(&t, &old_age, what);
    for (size_t i = 0; i < t.list_num; i++) t.got_packed[i] = -1;
    operand older = op_clone(&t.age); /* again with the ages that it left; the lists are as long */
    pick_run(&t);
    pick_expect(&t, &older, "again");
    int32_t *packed = (int32_t *)host_doubles(t.list_num); /* the same without place */
    memcpy(packed, t.got_packed, t.list_num * 4);
    memcpy(t.age.host, older.host, t.age.num * sizeof(float));
    op_upload(&t.age);
    t.a.place = NULL;
    pick_run(&t);
    ck_assert_mem_eq(t.got_packed, packed, t.list_num * 4);
    pick_expect(&t, &older, "without place");
}
END_TEST

START_TEST(no_row_and_every_row) {
    for (int big = 0; big < 2; big++) {
        const pick_case c = {2, 2, 3, 1, 20, big ? 500 : 10, 2, .25, .6, 0, true};
        pick t = pick_new(&c);
        t.counts[0] = 0, t.counts[1] = t.tokens;
        t.a.counts = dev_i32(t.counts, 2);
        operand old_age = op_clone(&t.age);
        pick_run(&t);
        if (!big) pick_expect(&t, &old_age, "none and all");
        for (int i = 0; i < 2 * t.tokens; i++) ck_assert_int_eq(t.got_packed[t.a.list_stride + i], i);
        ck_assert_int_eq(t.got_packed[0], -1);
        for (int i = 0; i < 2 * t.tokens; i++)
            if (t.got_place[i] != -1 || t.got_place[t.a.list_stride + i] != i) ck_abort_msg("place %d", i);
        /* Counts outside 0..tokens are the nearer end. */
        t.counts[0] = -5, t.counts[1] = t.tokens + 7;
        t.a.counts = dev_i32(t.counts, 2);
        pick_run(&t);
        ck_assert_int_eq(t.got_packed[0], -1);
        ck_assert_int_eq(t.got_packed[t.a.list_stride + 2 * t.tokens - 1], 2 * t.tokens - 1);
        ck_assert_int_eq(t.got_packed[t.a.list_stride + 2 * t.tokens], -1);
    }
}
END_TEST

/* Zeros of both signs are one score; a score that is not a number is computed first. */
START_TEST(odd_scores_have_an_order) {
    const pick_case c = {1, 1, 1, 1, 1, 8, 0, 0, 0, 0, false};
    pick t = pick_new(&c);
    const float scores[8] = {-0.0f, 0.0f, -0.0f, -1.0f, NAN, -INFINITY, 0.0f, -0.0f};
    memcpy(t.s1.host, scores, sizeof scores);
    op_upload(&t.s1);
    t.counts[0] = 4;
    t.a.counts = dev_i32(t.counts, 1);
    pick_run(&t);
    const int32_t want[4] = {0, 1, 2, 4};
    ck_assert_mem_eq(t.got_packed, want, sizeof want);
}
END_TEST

START_TEST(random_rows_follow_seed_and_step) {
    const pick_case c = {2, 2, 4, 1, 16, 24, 2, .25, .6, 0, true};
    const int32_t steps[2] = {3, 4};
    int32_t *lists[4];
    for (int run = 0; run < 4; run++) { /* the same twice, another step, another seed */
        pick t = pick_new(&c);
        t.counts[0] = t.counts[1] = 100;
        t.a.counts = dev_i32(t.counts, 2);
        t.a.random = true;
        t.a.groups_per_branch = 2; /* groups 0 and 1 choose the same rows, 2 and 3 others */
        t.a.seed = run == 3 ? 8 : 7 + ((uint64_t)1 << 40);
        t.a.step = dev_i32(&steps[run == 2], 1);
        t.a.s1 = NULL; /* not read */
        operand old_age = op_clone(&t.age);
        pick_run(&t);
        pick_expect(&t, &old_age, "random");
        lists[run] = t.got_packed;
        ck_assert(memcmp(t.got_packed, t.got_packed + t.a.list_stride, 400) != 0); /* sites differ */
        int same = 0, low = 0;
        for (int i = 0; i < 100; i++) {
            for (int j = 0; j < 100; j++) same += t.got_packed[100 + j] - t.tokens == t.got_packed[i];
            low += t.got_packed[i] < t.tokens / 2;
        }
        ck_assert(same > 5 && same < 60); /* groups differ: 26 expected */
        ck_assert(low > 30 && low < 70);  /* 50 expected */
    }
    ck_assert_mem_eq(lists[0], lists[1], 800);
    ck_assert(memcmp(lists[0], lists[2], 400) != 0);
    ck_assert(memcmp(lists[0], lists[3], 400) != 0);
}
END_TEST

/* ---- row scores ---- */

typedef struct {
    int groups, all_groups, rows, heads, head_dim;
} score_case;

static const score_case score_cases[] = {
    {2, 3, 64, 3, 64},    {3, 3, 100, 2, 72},    {1, 2, 257, 4, 80},   {2, 2, 33, 2, 96},    {1, 4, 130, 2, 128},
    {4, 4, 1, 1, 64},     {5, 6, 16, 2, 72},     {48, 48, 70, 16, 64}, {48, 50, 70, 16, 72}, {48, 48, 70, 16, 80},
    {48, 48, 65, 16, 96}, {48, 48, 70, 16, 128}, {1, 1, 1100, 1, 64},  {2, 2, 40, 3, 5},     {1, 2, 70, 2, 33},
};
#define NUM_SCORE_CASES ((int)(sizeof score_cases / sizeof score_cases[0]))

typedef struct {
    rf_row_score_args a;
    operand qkv, lse, out;
    int32_t *index;
} score;

/* [group, row][3][heads][head_dim], 8 elements of NaN after each row. */
static score score_new(const score_case *c, rf_dtype dtype, rf_row_score kind) {
    score t = {0};
    const int64_t d = c->head_dim, width = (int64_t)c->heads * d, row = 3 * width + 8;
    const size_t num = (size_t)(c->groups * c->rows * row);
    t.qkv = op_normal(dtype, num, 0.05, kind == RF_ROW_SCORE_VALUE ? 0.1 : 1);
    for (size_t i = 0; i < num; i++)
        if ((int64_t)(i % (size_t)row) >= 3 * width) t.qkv.host[i] = NAN;
    op_upload(&t.qkv);
    t.lse = op_poison(RF_DTYPE_F32, (size_t)(c->groups * c->heads * c->rows));
    t.out = op_poison(RF_DTYPE_F32, (size_t)(c->all_groups * c->rows));
    t.index = (int32_t *)host_doubles((size_t)c->all_groups);
    random_permutation(t.index, c->all_groups, 3);
    const size_t bytes = rf_dtype_bytes(dtype);
    t.a = (rf_row_score_args){.kind = kind,
                              .q = t.qkv.dev,
                              .k = (char *)t.qkv.dev + (size_t)width * bytes,
                              .v = (char *)t.qkv.dev + (size_t)width * 2 * bytes,
                              .dtype = dtype,
                              .groups = c->groups,
                              .rows = c->rows,
                              .num_heads = c->heads,
                              .head_dim = c->head_dim,
                              .batch_stride = c->rows * row,
                              .row_stride = row,
                              .head_stride = d,
                              .softmax_scale = (float)(1 / sqrt((double)d)),
                              .lse = kind == RF_ROW_SCORE_ATTENTION ? t.lse.dev : NULL,
                              .out = t.out.dev,
                              .index = dev_i32(t.index, (size_t)c->groups),
                              .workspace_bytes = rf_row_score_workspace_bytes(c->groups, c->rows, c->heads)};
    t.a.workspace = dev_bytes(t.a.workspace_bytes);
    if (kind == RF_ROW_SCORE_VALUE) t.a.q = t.a.k = NULL; /* not read */
    if (kind == RF_ROW_SCORE_ATTENTION) t.a.v = NULL;
    return t;
}

static const float *part_of(const score *t, int which, int g, int h, int r) {
    const rf_row_score_args *a = &t->a;
    return t->qkv.host + g * a->batch_stride + r * a->row_stride + h * a->head_stride +
           which * a->num_heads * a->head_dim;
}

static double dot(const float *x, const float *y, int num) {
    double sum = 0;
    for (int i = 0; i < num; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

/* Column sums of explicit softmax maps; also fills in the log-sums. blind: a query that takes no part, or -1. */
static void add_maps(score *t, int g, int blind, double *sum) {
    const int rows = (int)t->a.rows;
    double *map = malloc((size_t)rows * sizeof *map);
    for (int h = 0; h < t->a.num_heads; h++) {
        for (int i = 0; i < rows; i++) {
            double top = -INFINITY, total = 0;
            for (int j = 0; j < rows; j++) {
                map[j] =
                    (double)t->a.softmax_scale * dot(part_of(t, 0, g, h, i), part_of(t, 1, g, h, j), t->a.head_dim);
                top = fmax(top, map[j]);
            }
            for (int j = 0; j < rows; j++) total += exp(map[j] - top);
            t->lse.host[(g * t->a.num_heads + h) * rows + i] = i == blind ? -INFINITY : (float)(top + log(total));
            for (int j = 0; j < rows && i != blind; j++) sum[j] += exp(map[j] - top) / total;
        }
    }
    free(map);
}

static void score_expect(score *t, int blind, double bound, const char *what, int number) {
    const int rows = (int)t->a.rows;
    double *want = host_doubles(t->out.num);
    for (size_t i = 0; i < t->out.num; i++) want[i] = NAN;
    for (int g = 0; g < (int)t->a.groups; g++) {
        double *sum = want + t->index[g] * rows, norm = 0;
        for (int r = 0; r < rows; r++) sum[r] = 0;
        if (t->a.kind == RF_ROW_SCORE_ATTENTION) add_maps(t, g, blind, sum);
        for (int r = 0; r < rows; r++) {
            for (int h = 0; h < t->a.num_heads && t->a.kind == RF_ROW_SCORE_VALUE; h++)
                sum[r] += 1 - sqrt(dot(part_of(t, 2, g, h, r), part_of(t, 2, g, h, r), t->a.head_dim));
            norm += sum[r] * sum[r];
        }
        for (int r = 0; r < rows && norm > 0; r++) sum[r] /= sqrt(norm);
    }
    op_upload(&t->lse);
    expect_ok(test_ops()->row_score(NULL, &t->a, &err));
    expect_ok(test_ops()->row_score(test_stream(), &t->a, &err));
    expect_close(&t->out, want, bound, "row_score", "%s %d, head_dim %d", what, number, t->a.head_dim);
}

/* Products of bf16 are exact and the result is f32; tensor cores cut off low bits of a sum. */
static double map_bound(rf_dtype dtype) {
    return dtype == RF_DTYPE_F32 ? 5e-6 : 2e-5;
}

START_TEST(attention_scores_are_column_sums_of_the_map) {
    const score_case *c = &score_cases[_i];
    for (int i = 0; i < test_num_dtypes(); i++) {
        if (test_dtype(i) == RF_DTYPE_BF16 && (c->head_dim < 64 || c->head_dim % 8 != 0)) continue;
        score t = score_new(c, test_dtype(i), RF_ROW_SCORE_ATTENTION);
        score_expect(&t, -1, map_bound(t.a.dtype), "case", _i);
    }
}
END_TEST

START_TEST(value_scores_are_small_norms) {
    const score_case *c = &score_cases[_i];
    for (int i = 0; i < test_num_dtypes(); i++) {
        score t = score_new(c, test_dtype(i), RF_ROW_SCORE_VALUE);
        score_expect(&t, -1, 2e-5, "value case", _i); /* 1 - |v| cancels */
    }
}
END_TEST

START_TEST(row_scores_repeat_their_bits_and_skip_blind_queries) {
    const score_case c = {2, 2, 150, 3, 72};
    for (int i = 0; i < test_num_dtypes(); i++) {
        score t = score_new(&c, test_dtype(i), RF_ROW_SCORE_ATTENTION);
        score_expect(&t, 141, map_bound(t.a.dtype), "blind", 0);
        operand first = op_clone(&t.out);
        expect_ok(test_ops()->row_score(test_stream(), &t.a, &err));
        expect_same_bits(&t.out, &first, "row_score", "again");
    }
}
END_TEST

/* Values of length 1 score 0 everywhere: divided by 1, not by 0. */
START_TEST(scores_of_zero_stay_zero) {
    const score_case c = {1, 1, 20, 2, 64};
    score t = score_new(&c, RF_DTYPE_F32, RF_ROW_SCORE_VALUE);
    for (int r = 0; r < c.rows; r++)
        for (int h = 0; h < c.heads; h++)
            for (int i = 0; i < c.head_dim; i++) ((float *)part_of(&t, 2, 0, h, r))[i] = i == r ? -1 : 0;
    op_upload(&t.qkv);
    expect_ok(test_ops()->row_score(test_stream(), &t.a, &err));
    op_download(&t.out);
    for (int r = 0; r < c.rows; r++) ck_assert(t.out.host[r] == 0);
}
END_TEST

/* ---- arguments ---- */

#define REFUSED(type, op, good, change, status)                                                                        \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(NULL, &a, &err), status);                                                         \
    } while (0)
#define REFUSED_RUN(type, op, good, change, status)                                                                    \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(test_stream(), &a, &err), status);                                                \
    } while (0)

START_TEST(bad_curvature_arguments_are_refused) {
    curve t = curve_new(&curve_cases[0]);
#define NO(change, status) REFUSED(rf_curvature_args, curvature, t.a, change, status)
    NO(a.groups_per_set = 3, RF_ERR_SHAPE);
    NO(a.groups_per_set = 0, RF_ERR_SHAPE);
    NO(a.num_sets = -1, RF_ERR_SHAPE);
    NO(a.rows = -1, RF_ERR_SHAPE);
    NO(a.rows = INT32_MAX, RF_ERR_SHAPE);
    NO(a.cols = 0, RF_ERR_SHAPE);
    NO(a.ld = a.cols - 1, RF_ERR_SHAPE);
    NO(a.slot_stride -= 1, RF_ERR_SHAPE);
    NO(a.group_rows = a.rows - 1, RF_ERR_SHAPE);
    NO(a.num_classes_per_row = -1, RF_ERR_SHAPE);
    NO(a.num_classes_per_row = 3; a.class_ld = 2, RF_ERR_SHAPE);
    NO(a.horizon = 0, RF_ERR_SHAPE);
    NO(a.horizon = 17, RF_ERR_SHAPE);
    NO(a.p_stable = -0.1f, RF_ERR_ARGUMENT);
    NO(a.p_chaotic = 1.1f, RF_ERR_ARGUMENT);
    NO(a.p_stable = 0.7f, RF_ERR_ARGUMENT); /* above p_chaotic */
    NO(a.eps = NAN, RF_ERR_ARGUMENT);
    NO(a.eps = -1, RF_ERR_ARGUMENT);
    NO(a.floor = INFINITY, RF_ERR_ARGUMENT);
    NO(a.step_b[5] = NAN, RF_ERR_ARGUMENT);
#undef NO
#define NO(change, status) REFUSED_RUN(rf_curvature_args, curvature, t.a, change, status)
    NO(a.ring = NULL, RF_ERR_ARGUMENT);
    NO(a.slots = NULL, RF_ERR_ARGUMENT);
    NO(a.gaps = NULL, RF_ERR_ARGUMENT);
    NO(a.row_class = NULL, RF_ERR_ARGUMENT);
    NO(a.kappa = NULL, RF_ERR_ARGUMENT);
    NO(a.drift = NULL, RF_ERR_ARGUMENT);
    NO(a.workspace = NULL, RF_ERR_WORKSPACE);
    NO(a.workspace_bytes -= 4, RF_ERR_WORKSPACE);
#undef NO
    expect_status(test_ops()->curvature(NULL, NULL, &err), RF_ERR_ARGUMENT);
    rf_curvature_args none = t.a;
    none.num_sets = 0, none.ring = NULL, none.workspace = NULL;
    expect_ok(test_ops()->curvature(test_stream(), &none, &err));
    t.a.ring = NULL, t.a.workspace = NULL, t.a.slots = NULL, t.a.gaps = NULL;
    expect_ok(test_ops()->curvature(NULL, &t.a, &err));
}
END_TEST

START_TEST(bad_token_select_arguments_are_refused) {
    pick t = pick_new(&pick_cases[0]);
#define NO(change, status) REFUSED(rf_token_select_args, token_select, t.a, change, status)
    NO(a.num_sites = -1, RF_ERR_SHAPE);
    NO(a.groups = -1, RF_ERR_SHAPE);
    NO(a.all_groups = a.groups - 1, RF_ERR_SHAPE);
    NO(a.tokens = 0, RF_ERR_SHAPE);
    NO(a.tokens = 65537, RF_ERR_SHAPE);
    NO(a.all_groups = 1 << 24, RF_ERR_SHAPE);
    NO(a.list_stride = -1, RF_ERR_SHAPE);
    NO(a.list_stride = a.groups * a.tokens - 1, RF_ERR_SHAPE); /* place is given */
    NO(a.cell = -1, RF_ERR_SHAPE);
    NO(a.grid_w = 15, RF_ERR_SHAPE);
    NO(a.frames = 0, RF_ERR_SHAPE);
    NO(a.bonus = -0.1f, RF_ERR_ARGUMENT);
    NO(a.bonus = NAN, RF_ERR_ARGUMENT);
    NO(a.age_weight = INFINITY, RF_ERR_ARGUMENT);
#undef NO
#define NO(change, status) REFUSED_RUN(rf_token_select_args, token_select, t.a, change, status)
    NO(a.s1 = NULL, RF_ERR_ARGUMENT);
    NO(a.age = NULL, RF_ERR_ARGUMENT);
    NO(a.counts = NULL, RF_ERR_ARGUMENT);
    NO(a.rows_packed = NULL, RF_ERR_ARGUMENT);
    NO(a.rows_state = NULL, RF_ERR_ARGUMENT);
    NO(a.random = true; a.groups_per_branch = 1, RF_ERR_ARGUMENT); /* no step */
    NO(a.random = true, RF_ERR_SHAPE);                             /* no groups_per_branch */
    NO(a.workspace_bytes -= 4, RF_ERR_WORKSPACE);
#undef NO
    expect_status(test_ops()->token_select(NULL, NULL, &err), RF_ERR_ARGUMENT);
    rf_token_select_args a = t.a;
    a.grid_w = 15, a.cell = 0; /* no bonus, no grid */
    expect_ok(test_ops()->token_select(NULL, &a, &err));
    a = t.a;
    a.groups = 0, a.age = NULL, a.workspace = NULL;
    expect_ok(test_ops()->token_select(test_stream(), &a, &err));
}
END_TEST

START_TEST(bad_row_score_arguments_are_refused) {
    const rf_dtype dtype = test_dtype(_i);
    score t = score_new(&score_cases[0], dtype, RF_ROW_SCORE_ATTENTION);
#define NO(change, status) REFUSED(rf_row_score_args, row_score, t.a, change, status)
    NO(a.kind = (rf_row_score)2, RF_ERR_ARGUMENT);
    NO(a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    if (!test_is_cuda()) NO(a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    NO(a.groups = -1, RF_ERR_SHAPE);
    NO(a.rows = -1, RF_ERR_SHAPE);
    NO(a.num_heads = 0, RF_ERR_SHAPE);
    NO(a.head_dim = 0, RF_ERR_SHAPE);
    NO(a.row_stride = a.head_dim - 1, RF_ERR_SHAPE);
    NO(a.head_stride = a.head_dim - 1, RF_ERR_SHAPE);
    NO(a.batch_stride = -1, RF_ERR_SHAPE);
    NO(a.softmax_scale = NAN, RF_ERR_ARGUMENT);
    if (dtype == RF_DTYPE_BF16) {
        NO(a.head_dim = 48, RF_ERR_SHAPE);
        NO(a.row_stride += 4, RF_ERR_SHAPE);
        NO(a.q = (const char *)a.q + 2, RF_ERR_ARGUMENT);
    }
#undef NO
#define NO(change, status) REFUSED_RUN(rf_row_score_args, row_score, t.a, change, status)
    NO(a.q = NULL, RF_ERR_ARGUMENT);
    NO(a.k = NULL, RF_ERR_ARGUMENT);
    NO(a.lse = NULL, RF_ERR_ARGUMENT);
    NO(a.out = NULL, RF_ERR_ARGUMENT);
    NO(a.kind = RF_ROW_SCORE_VALUE, RF_ERR_ARGUMENT); /* no v */
    NO(a.workspace = NULL, RF_ERR_WORKSPACE);
    NO(a.workspace_bytes -= 4, RF_ERR_WORKSPACE);
#undef NO
    expect_status(test_ops()->row_score(NULL, NULL, &err), RF_ERR_ARGUMENT);
    t.a.rows = 0, t.a.q = NULL, t.a.out = NULL;
    expect_ok(test_ops()->row_score(test_stream(), &t.a, &err));
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("cache statistics");
    TCase *tc = kernel_tcase(suite, "curvature");
    tcase_add_loop_test(tc, curvature_is_its_definition, 0, NUM_CURVE_CASES);
    tcase_add_test(tc, curvature_repeats_its_bits);
    tcase_add_loop_test(tc, a_stream_of_the_outputs_is_measured_alone, 0, 4);
    tcase_add_test(tc, straight_lines_have_no_curvature);
    tcase_add_test(tc, classes_and_drift_have_no_unit);
    tcase_add_test(tc, equal_curvatures_are_chaotic_and_ties_share_a_class);
    tcase_add_test(tc, not_a_number_counts_as_infinite);
    tcase_add_test(tc, short_history_is_chaotic_without_drift);
    tc = kernel_tcase(suite, "token selection");
    tcase_add_loop_test(tc, token_select_is_sorting, 0, NUM_PICK_CASES);
    tcase_add_test(tc, no_row_and_every_row);
    tcase_add_test(tc, odd_scores_have_an_order);
    tcase_add_test(tc, random_rows_follow_seed_and_step);
    tc = kernel_tcase(suite, "row scores");
    tcase_add_loop_test(tc, attention_scores_are_column_sums_of_the_map, 0, NUM_SCORE_CASES);
    tcase_add_loop_test(tc, value_scores_are_small_norms, 0, NUM_SCORE_CASES);
    tcase_add_test(tc, row_scores_repeat_their_bits_and_skip_blind_queries);
    tcase_add_test(tc, scores_of_zero_stay_zero);
    tc = kernel_tcase(suite, "arguments");
    tcase_add_test(tc, bad_curvature_arguments_are_refused);
    tcase_add_test(tc, bad_token_select_arguments_are_refused);
    add_for_dtypes(tc, bad_row_score_arguments_are_refused);
    return run_kernel_suite(suite);
}
