/* tests/kernels/test_norm.c - row norms, the gated residual and GroupNorm against loops in double. */
#include "harness.h"

/* ---- references ---- */

static void ref_norm_row(double *y, const double *x, int64_t cols, rf_norm_kind kind, double eps, const float *weight,
                         const float *bias, const float *shift, const float *scale) {
    double mean = 0, var = 0;
    if (kind == RF_NORM_LAYER) {
        for (int64_t c = 0; c < cols; c++) mean += x[c] / (double)cols;
    }
    for (int64_t c = 0; c < cols; c++) var += (x[c] - mean) * (x[c] - mean) / (double)cols;
    for (int64_t c = 0; c < cols; c++) {
        double n = (x[c] - mean) / sqrt(var + eps);
        if (weight) n *= weight[c];
        if (bias) n += bias[c];
        if (scale) n *= 1 + (double)scale[c];
        if (shift) n += shift[c];
        y[c] = n;
    }
}

/* Rounding of x - mean in f32 grows with mean / std. */
static double norm_bound(rf_dtype dtype, double mean) {
    return dtype_bound(dtype) + 3e-7 * fabs(mean);
}

/* ---- norm ---- */

typedef struct {
    int num_rows, cols;
    rf_norm_kind kind;
    bool weight, bias, shift, scale, index, list;
    int rows_per_group;
    double mean;
} norm_case;

static const norm_case norm_cases[] = {
    {64, 216, RF_NORM_LAYER, false, false, true, true, true, false, 16, 0},
    {64, 1152, RF_NORM_LAYER, false, false, true, true, false, false, 16, 0},
    {1, 4, RF_NORM_LAYER, false, false, false, false, false, false, 1, 0},
    {3, 64, RF_NORM_LAYER, true, true, false, false, false, false, 1, 0},
    {3, 72, RF_NORM_LAYER, true, false, true, false, true, false, 1, 0},
    {17, 100, RF_NORM_LAYER, false, true, false, true, false, true, 5, 0},
    {33, 260, RF_NORM_LAYER, true, true, true, true, true, true, 7, 0},
    {5, 4096, RF_NORM_RMS, true, false, false, false, false, false, 1, 0},
    {9, 128, RF_NORM_RMS, false, false, true, true, true, false, 3, 0},
    {9, 64, RF_NORM_RMS, true, true, true, true, true, true, 1, 0},
    {2, 16384, RF_NORM_LAYER, false, false, true, true, false, false, 2, 0},
    {8, 1152, RF_NORM_LAYER, false, false, true, true, true, false, 4, 100},
    {8, 640, RF_NORM_LAYER, true, true, false, false, false, false, 4, -1000},
    /* few, some and many rows: other shapes of block on CUDA */
    {144, 1024, RF_NORM_LAYER, false, false, true, true, true, false, 144, 0},
    {31, 2044, RF_NORM_RMS, true, true, true, true, false, true, 4, 0},
    {300, 1028, RF_NORM_LAYER, true, true, true, true, true, false, 16, 50},
    {1100, 1028, RF_NORM_LAYER, false, true, true, false, true, false, 16, 0},
};
#define NUM_NORM_CASES ((int)(sizeof norm_cases / sizeof norm_cases[0]))

#define TABLE_ROWS 9

typedef struct {
    operand table;
    int32_t index[256];
    rf_modulation mod;
} table;

static table make_table(rf_dtype dtype, int64_t stride, bool index, int rows_per_group, int64_t num_groups) {
    int64_t rows = index ? TABLE_ROWS : num_groups;
    table t = {.table = op_normal(dtype, (size_t)(rows * stride), 0, 0.5)};
    for (int g = 0; g < 256; g++) t.index[g] = (g * 5 + 2) % TABLE_ROWS;
    t.mod = (rf_modulation){.table = t.table.dev, .dtype = dtype, .stride = stride, .rows_per_group = rows_per_group};
    if (index) t.mod.index = dev_i32(t.index, 256);
    return t;
}

static const float *table_row(const table *t, int64_t row, int64_t offset) {
    int64_t g = row / t->mod.rows_per_group;
    return t->table.host + (t->mod.index ? t->index[g] : g) * t->mod.stride + offset;
}

/* dtypes: x, y, table */
static void run_norm(const norm_case *c, rf_dtype x_dtype, rf_dtype y_dtype, rf_dtype table_dtype) {
    int src_rows = c->list ? 2 * c->num_rows : c->num_rows;
    int64_t cols = c->cols, shift = 8, scale = 2 * cols + 16;
    operand x = op_normal(x_dtype, (size_t)(src_rows * cols), c->mean, 1);
    operand y = op_poison(y_dtype, (size_t)(c->num_rows * cols));
    operand w = op_normal(RF_DTYPE_F32, (size_t)cols, 1, 0.3), b = op_normal(RF_DTYPE_F32, (size_t)cols, 0, 0.3);
    table t = make_table(table_dtype, 3 * cols + 16, c->index, c->rows_per_group, src_rows / c->rows_per_group + 1);
    int32_t *list = (int32_t *)host_doubles((size_t)src_rows);
    random_permutation(list, src_rows, 3);
    rf_norm_args a = {.x = x.dev,
                      .y = y.dev,
                      .x_dtype = x_dtype,
                      .y_dtype = y_dtype,
                      .num_rows = c->num_rows,
                      .cols = cols,
                      .rows = c->list ? dev_i32(list, (size_t)c->num_rows) : NULL,
                      .kind = c->kind,
                      .eps = 1e-6f,
                      .weight = c->weight ? w.dev : NULL,
                      .bias = c->bias ? b.dev : NULL,
                      .mod = t.mod,
                      .shift = c->shift ? shift : -1,
                      .scale = c->scale ? scale : -1};
    expect_ok(test_ops()->norm(NULL, &a, &err));
    expect_ok(test_ops()->norm(test_stream(), &a, &err));
    double *want = host_doubles(y.num), *row = host_doubles((size_t)cols);
    for (int i = 0; i < c->num_rows; i++) {
        int64_t r = c->list ? list[i] : i;
        for (int64_t e = 0; e < cols; e++) row[e] = x.host[r * cols + e];
        ref_norm_row(want + i * cols, row, cols, c->kind, (double)a.eps, c->weight ? w.host : NULL,
                     c->bias ? b.host : NULL, c->shift ? table_row(&t, r, shift) : NULL,
                     c->scale ? table_row(&t, r, scale) : NULL);
    }
    expect_close(&y, want, norm_bound(y_dtype, c->mean), "norm", "%d x %d kind %d w%d b%d shift%d scale%d%s%s x %s",
                 c->num_rows, c->cols, (int)c->kind, c->weight, c->bias, c->shift, c->scale, c->index ? " index" : "",
                 c->list ? " list" : "", rf_dtype_name(x_dtype));
    if (c->list || x_dtype != y_dtype) return;
    a.y = x.dev;
    expect_ok(test_ops()->norm(test_stream(), &a, &err));
    expect_same_bits(&x, &y, "norm", "%d x %d in place", c->num_rows, c->cols);
}

START_TEST(norm_matches_double) {
    run_norm(&norm_cases[_i], RF_DTYPE_F32, RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST
START_TEST(norm_matches_double_in_bf16) {
    run_norm(&norm_cases[_i], RF_DTYPE_BF16, RF_DTYPE_BF16, RF_DTYPE_BF16);
}
END_TEST
START_TEST(norm_of_an_f32_stream_gives_bf16) {
    run_norm(&norm_cases[_i], RF_DTYPE_F32, RF_DTYPE_BF16, RF_DTYPE_F32);
}
END_TEST

/* ---- residual ---- */

typedef struct {
    int num_rows, cols, num_terms;
    bool weights, weight_row, base, gate, list, norm;
    rf_norm_kind kind;
    bool norm_weight, norm_mod;
} residual_case;

static const residual_case residual_cases[] = {
    {64, 216, 1, false, false, false, true, false, true, RF_NORM_LAYER, false, true},
    {64, 1152, 1, false, false, false, true, false, true, RF_NORM_LAYER, false, true},
    {10, 72, 1, false, false, false, false, false, false, RF_NORM_LAYER, false, false},
    {10, 72, 0, false, false, false, false, false, true, RF_NORM_LAYER, true, false},
    {10, 72, 0, false, false, true, false, false, false, RF_NORM_LAYER, false, false},
    {32, 64, 1, false, false, true, false, false, true, RF_NORM_LAYER, false, true},
    {12, 100, 2, true, false, false, true, false, true, RF_NORM_RMS, true, false},
    {12, 100, 3, true, true, false, true, true, true, RF_NORM_LAYER, false, true},
    {30, 260, 8, true, true, false, false, false, true, RF_NORM_LAYER, true, true},
    {30, 516, 8, true, true, true, true, true, true, RF_NORM_LAYER, true, true},
    {7, 128, 4, false, false, false, true, true, false, RF_NORM_LAYER, false, false},
    {1, 4096, 5, true, false, false, false, false, true, RF_NORM_RMS, true, false},
    {2, 16384, 1, false, false, false, true, false, true, RF_NORM_LAYER, false, true},
    {144, 1024, 1, false, false, false, true, false, true, RF_NORM_LAYER, false, true},
    {144, 1024, 2, true, true, true, true, true, true, RF_NORM_LAYER, true, true},
    {270, 1028, 1, false, false, false, true, false, true, RF_NORM_LAYER, true, true},
};
#define NUM_RESIDUAL_CASES ((int)(sizeof residual_cases / sizeof residual_cases[0]))
#define BASE_PERIOD        8
#define WEIGHT_ROWS        3

static void run_residual(const residual_case *c, rf_dtype x_dtype, rf_dtype dtype) {
    int64_t cols = c->cols, src_rows = c->list ? 2 * c->num_rows : c->num_rows, rpg = 4;
    int64_t gate = cols, shift = 0, scale = 2 * cols;
    operand x = op_normal(x_dtype, (size_t)(src_rows * cols), 0, 1);
    operand base = op_normal(dtype, (size_t)(BASE_PERIOD * cols), 0, 1);
    operand terms[RF_MAX_TERMS];
    double weights[WEIGHT_ROWS * RF_MAX_TERMS];
    for (int i = 0; i < WEIGHT_ROWS * RF_MAX_TERMS; i++) weights[i] = 2 * uniform() - 1;
    operand w = op_values(RF_DTYPE_F32, (size_t)(WEIGHT_ROWS * (c->num_terms ? c->num_terms : 1)), weights);
    uint8_t *weight_row = (uint8_t *)host_doubles((size_t)c->num_rows);
    for (int i = 0; i < c->num_rows; i++) weight_row[i] = (uint8_t)((i * 7) % WEIGHT_ROWS);
    int32_t *list = (int32_t *)host_doubles((size_t)src_rows);
    random_permutation(list, (int)src_rows, 9);
    table t = make_table(dtype, 3 * cols, true, (int)rpg, 0);
    table t2 = make_table(dtype, 4 * cols, false, 3, src_rows / 3 + 1);
    operand nw = op_normal(RF_DTYPE_F32, (size_t)cols, 1, 0.3), nb = op_normal(RF_DTYPE_F32, (size_t)cols, 0, 0.3);
    operand norm_y = op_poison(dtype, c->norm ? (size_t)(c->num_rows * cols) : 0);
    operand before = op_clone(&x);

    rf_residual_args a = {.x = x.dev,
                          .base = c->base ? base.dev : NULL,
                          .base_period = BASE_PERIOD,
                          .num_terms = c->num_terms,
                          .weights = c->weights ? (const float *)w.dev : NULL,
                          .rows = c->list ? dev_i32(list, (size_t)c->num_rows) : NULL,
                          .x_dtype = x_dtype,
                          .base_dtype = dtype,
                          .y_dtype = dtype,
                          .num_rows = c->num_rows,
                          .cols = cols,
                          .gate_mod = t.mod,
                          .gate = c->gate ? gate : -1,
                          .norm_y = norm_y.dev,
                          .norm_y_dtype = dtype,
                          .norm_kind = c->kind,
                          .norm_eps = 1e-6f,
                          .norm_weight = c->norm_weight ? nw.dev : NULL,
                          .norm_bias = c->norm_weight ? nb.dev : NULL,
                          .norm_mod = t2.mod,
                          .norm_shift = c->norm_mod ? shift : -1,
                          .norm_scale = c->norm_mod ? scale : -1};
    if (c->weight_row) a.weight_row = dev_u8(weight_row, (size_t)c->num_rows);
    for (int i = 0; i < c->num_terms; i++) {
        terms[i] = op_normal(dtype, (size_t)(c->num_rows * cols), 0, 1);
        a.terms[i] = terms[i].dev;
    }
    expect_ok(test_ops()->residual(NULL, &a, &err));
    expect_ok(test_ops()->residual(test_stream(), &a, &err));

    double *want = host_doubles(x.num), *want_y = host_doubles(norm_y.num ? norm_y.num : 1);
    for (size_t i = 0; i < x.num; i++) want[i] = before.host[i];
    for (int i = 0; i < c->num_rows; i++) {
        int64_t r = c->list ? list[i] : i;
        double *row = want + r * cols;
        for (int64_t e = 0; e < cols; e++) {
            double sum = 0;
            for (int m = 0; m < c->num_terms; m++) {
                double wm = c->weights ? w.host[(c->weight_row ? weight_row[i] : 0) * c->num_terms + m] : 1;
                sum += wm * (double)terms[m].host[i * cols + e];
            }
            if (c->gate) sum *= (double)table_row(&t, r, gate)[e];
            row[e] = (c->base ? (double)base.host[r % BASE_PERIOD * cols + e] : row[e]) + sum;
        }
        if (c->norm)
            ref_norm_row(want_y + i * cols, row, cols, c->kind, (double)a.norm_eps, c->norm_weight ? nw.host : NULL,
                         c->norm_weight ? nb.host : NULL, c->norm_mod ? table_row(&t2, r, shift) : NULL,
                         c->norm_mod ? table_row(&t2, r, scale) : NULL);
    }
    char text[160];
    snprintf(text, sizeof text, "%d x %d terms %d%s%s%s%s%s norm %d x %s", c->num_rows, c->cols, c->num_terms,
             c->weights ? " weights" : "", c->weight_row ? " per row" : "", c->base ? " base" : "",
             c->gate ? " gate" : "", c->list ? " list" : "", c->norm, rf_dtype_name(x_dtype));
    expect_close(&x, want, dtype_bound(x_dtype), "residual x", "%s", text);
    if (!c->norm) return;
    expect_close(&norm_y, want_y, dtype_bound(dtype), "residual norm_y", "%s", text);
    if (x_dtype != RF_DTYPE_F32) return; /* the fused norm sees x before it is rounded */

    /* In two steps: the same sum, then the norm operator. */
    operand norm_2 = op_poison(dtype, norm_y.num), x2 = op_clone(&before);
    a.x = x2.dev;
    a.norm_y = NULL;
    expect_ok(test_ops()->residual(test_stream(), &a, &err));
    expect_same_bits(&x2, &x, "residual without norm", "%s", text);
    rf_norm_args n = {.x = x2.dev,
                      .y = norm_2.dev,
                      .x_dtype = x_dtype,
                      .y_dtype = dtype,
                      .num_rows = c->num_rows,
                      .cols = cols,
                      .rows = a.rows,
                      .kind = c->kind,
                      .eps = a.norm_eps,
                      .weight = a.norm_weight,
                      .bias = a.norm_bias,
                      .mod = a.norm_mod,
                      .shift = a.norm_shift,
                      .scale = a.norm_scale};
    expect_ok(test_ops()->norm(test_stream(), &n, &err));
    expect_same_bits(&norm_2, &norm_y, "residual then norm", "%s", text);
}

START_TEST(residual_matches_double) {
    run_residual(&residual_cases[_i], RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST
START_TEST(residual_matches_double_in_bf16) {
    run_residual(&residual_cases[_i], RF_DTYPE_BF16, RF_DTYPE_BF16);
}
END_TEST
START_TEST(residual_of_an_f32_stream_takes_bf16) {
    run_residual(&residual_cases[_i], RF_DTYPE_F32, RF_DTYPE_BF16);
}
END_TEST

/* ---- group norm ---- */

typedef struct {
    int batch, pixels, channels, groups;
    bool silu;
    double mean;
} group_case;

static const group_case group_cases[] = {
    {2, 64, 128, 32, true, 0},     {1, 1000, 64, 32, false, 0}, {1, 77, 512, 32, true, 0},
    {3, 1, 64, 1, false, 0},       {1, 300, 96, 1, true, 0},    {2, 130, 320, 1, false, 0},
    {1, 4097, 32, 32, true, 0},    {1, 257, 256, 32, true, 30}, {1, 900, 128, 4, false, 1000},
    {1, 5000, 64, 32, true, -200},
};
#define NUM_GROUP_CASES ((int)(sizeof group_cases / sizeof group_cases[0]))

START_TEST(group_norm_matches_double) {
    for (int t = 0; t < test_num_dtypes(); t++) {
        const group_case *c = &group_cases[_i];
        rf_dtype dtype = test_dtype(t);
        size_t num = (size_t)c->batch * (size_t)c->pixels * (size_t)c->channels;
        int width = c->channels / c->groups;
        operand x = op_normal(dtype, num, c->mean, 1), y = op_poison(dtype, num);
        operand w = op_normal(RF_DTYPE_F32, (size_t)c->channels, 1, 0.3);
        operand b = op_normal(RF_DTYPE_F32, (size_t)c->channels, 0, 0.3);
        rf_group_norm_args a = {.x = x.dev,
                                .y = y.dev,
                                .dtype = dtype,
                                .batch = c->batch,
                                .pixels = c->pixels,
                                .channels = c->channels,
                                .num_groups = c->groups,
                                .eps = 1e-6f,
                                .weight = w.dev,
                                .bias = b.dev,
                                .silu = c->silu};
        a.workspace_bytes = rf_group_norm_workspace_bytes(&a);
        a.workspace = dev_bytes(a.workspace_bytes);
        expect_ok(test_ops()->group_norm(NULL, &a, &err));
        expect_ok(test_ops()->group_norm(test_stream(), &a, &err));
        double *want = host_doubles(num);
        for (int s = 0; s < c->batch; s++) {
            for (int g = 0; g < c->groups; g++) {
                double mean = 0, var = 0, count = (double)c->pixels * width;
#define AT(p, e) (((size_t)s * (size_t)c->pixels + (size_t)(p)) * (size_t)c->channels + (size_t)(g * width + (e)))
                for (int p = 0; p < c->pixels; p++)
                    for (int e = 0; e < width; e++) mean += (double)x.host[AT(p, e)] / count;
                for (int p = 0; p < c->pixels; p++)
                    for (int e = 0; e < width; e++) var += pow((double)x.host[AT(p, e)] - mean, 2) / count;
                for (int p = 0; p < c->pixels; p++) {
                    for (int e = 0; e < width; e++) {
                        double v = ((double)x.host[AT(p, e)] - mean) / sqrt(var + (double)a.eps);
                        v = v * (double)w.host[g * width + e] + (double)b.host[g * width + e];
                        want[AT(p, e)] = c->silu ? ref_act(v, RF_ACT_SILU) : v;
                    }
                }
#undef AT
            }
        }
        /* bf16 keeps 8 bits: with a large mean the input itself lies on a coarse grid, the reference sees that grid. */
        expect_close(&y, want, norm_bound(dtype, c->mean), "group_norm", "b%d p%d c%d g%d silu %d mean %g", c->batch,
                     c->pixels, c->channels, c->groups, c->silu, c->mean);
        a.y = x.dev;
        expect_ok(test_ops()->group_norm(test_stream(), &a, &err));
        expect_same_bits(&x, &y, "group_norm", "in place");
    }
}
END_TEST

/* ---- arguments ---- */

#define REFUSED(type, op, good, change, status)                                                                        \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(NULL, &a, &err), status);                                                         \
    } while (0)

START_TEST(bad_norm_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_norm_args good = {.x_dtype = dtype,
                         .y_dtype = dtype,
                         .num_rows = 4,
                         .cols = 64,
                         .eps = 1e-6f,
                         .shift = 0,
                         .scale = 64,
                         .mod = {.dtype = dtype, .stride = 128, .rows_per_group = 2}};
    expect_ok(test_ops()->norm(NULL, &good, &err));
    REFUSED(rf_norm_args, norm, good, a.num_rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.cols = 16388, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.mod.stride = 127, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.shift = -2, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.scale = 65, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.mod.rows_per_group = 0, RF_ERR_SHAPE);
    REFUSED(rf_norm_args, norm, good, a.kind = (rf_norm_kind)4, RF_ERR_ARGUMENT);
    REFUSED(rf_norm_args, norm, good, a.eps = -1, RF_ERR_ARGUMENT);
    REFUSED(rf_norm_args, norm, good, a.eps = NAN, RF_ERR_ARGUMENT);
    REFUSED(rf_norm_args, norm, good, a.x_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_norm_args, norm, good, a.y_dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rf_norm_args, norm, good, a.mod.dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    if (!test_is_cuda()) {
        REFUSED(rf_norm_args, norm, good, a.x_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_norm_args, norm, good, a.y_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_norm_args, norm, good, a.mod.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    }
    /* Without offsets the table is not looked at. */
    good.shift = good.scale = -1;
    good.mod = (rf_modulation){0};
    expect_ok(test_ops()->norm(NULL, &good, &err));
    good.num_rows = 0;
    expect_ok(test_ops()->norm(test_stream(), &good, &err));
    good.num_rows = 4;
    expect_status(test_ops()->norm(test_stream(), &good, &err), RF_ERR_ARGUMENT); /* no pointers */
}
END_TEST

START_TEST(bad_residual_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    static float some[64];
    rf_residual_args good = {.base = some,
                             .base_period = 4,
                             .num_terms = 1,
                             .x_dtype = dtype,
                             .base_dtype = dtype,
                             .y_dtype = dtype,
                             .num_rows = 4,
                             .cols = 64,
                             .gate_mod = {.dtype = dtype, .stride = 64, .rows_per_group = 2},
                             .norm_y = some,
                             .norm_y_dtype = dtype,
                             .norm_eps = 1e-6f,
                             .norm_mod = {.dtype = dtype, .stride = 192, .rows_per_group = 2},
                             .norm_shift = 64,
                             .norm_scale = 128};
    expect_ok(test_ops()->residual(NULL, &good, &err));
    REFUSED(rf_residual_args, residual, good, a.num_terms = 9, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.num_terms = -1, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.num_rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.base_period = 0, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.gate = 1, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.gate_mod.rows_per_group = 0, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.norm_scale = 129, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, good, a.norm_kind = (rf_norm_kind)-1, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, good, a.norm_eps = NAN, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, good, a.x_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, good, a.y_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, good, a.base_dtype = RF_DTYPE_I64, RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, good, a.gate_mod.dtype = RF_DTYPE_I64, RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, good, a.norm_y_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, good, a.norm_mod.dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    if (!test_is_cuda()) {
        REFUSED(rf_residual_args, residual, good, a.x_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_residual_args, residual, good, a.y_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_residual_args, residual, good, a.base_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_residual_args, residual, good, a.norm_y_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    }
    good.base = NULL;
    good.norm_y = NULL;
    expect_status(test_ops()->residual(test_stream(), &good, &err), RF_ERR_ARGUMENT);
    good.num_rows = 0;
    expect_ok(test_ops()->residual(test_stream(), &good, &err));
}
END_TEST

START_TEST(bad_group_norm_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_group_norm_args good = {
        .dtype = dtype, .batch = 1, .pixels = 16, .channels = 64, .num_groups = 32, .eps = 1e-6f};
    expect_ok(test_ops()->group_norm(NULL, &good, &err));
    REFUSED(rf_group_norm_args, group_norm, good, a.num_groups = 0, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.num_groups = 7, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.num_groups = 128, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.channels = 0, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.pixels = -1, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.batch = -1, RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good,
            (a.batch = INT32_MAX, a.pixels = INT32_MAX, a.channels = INT32_MAX / 32 * 32), RF_ERR_SHAPE);
    REFUSED(rf_group_norm_args, group_norm, good, a.eps = INFINITY, RF_ERR_ARGUMENT);
    REFUSED(rf_group_norm_args, group_norm, good, a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    if (!test_is_cuda()) REFUSED(rf_group_norm_args, group_norm, good, a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_status(test_ops()->group_norm(test_stream(), &good, &err), RF_ERR_ARGUMENT);
    good.batch = 0;
    expect_ok(test_ops()->group_norm(test_stream(), &good, &err));
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("norm");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, norm_matches_double, 0, NUM_NORM_CASES);
    tcase_add_loop_test(tc, residual_matches_double, 0, NUM_RESIDUAL_CASES);
    if (test_is_cuda()) {
        tcase_add_loop_test(tc, norm_matches_double_in_bf16, 0, NUM_NORM_CASES);
        tcase_add_loop_test(tc, norm_of_an_f32_stream_gives_bf16, 0, NUM_NORM_CASES);
        tcase_add_loop_test(tc, residual_matches_double_in_bf16, 0, NUM_RESIDUAL_CASES);
        tcase_add_loop_test(tc, residual_of_an_f32_stream_takes_bf16, 0, NUM_RESIDUAL_CASES);
    }
    tcase_add_loop_test(tc, group_norm_matches_double, 0, NUM_GROUP_CASES);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_norm_arguments_are_refused);
    add_for_dtypes(tc, bad_residual_arguments_are_refused);
    add_for_dtypes(tc, bad_group_norm_arguments_are_refused);
    return run_kernel_suite(suite);
}
