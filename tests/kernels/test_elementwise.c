/* tests/kernels/test_elementwise.c - maps, layouts, embeddings, row copies and statistics against loops in double. */
#include "harness.h"

/* ---- elementwise ---- */

typedef struct {
    int rows, cols, add; /* add: 0 none, 1 periodic, 2 by index */
    rf_act act;
    float scale, shift;
} map_case;

static const map_case map_cases[] = {
    {8, 1152, 0, RF_ACT_SILU, 1, 0},       {3, 33, 0, RF_ACT_NONE, 1, 0},
    {16, 64, 1, RF_ACT_NONE, 1, 0},        {17, 100, 2, RF_ACT_NONE, 1, 0},
    {5, 7, 2, RF_ACT_SILU, 0.5f, -1},      {1, 1, 1, RF_ACT_GELU_TANH, 3, 0.25f},
    {100, 6, 0, RF_ACT_GELU_ERF, 1, 0.5f}, {2, 4096, 0, RF_ACT_NONE, 5.4890f, 0.1f},
    {257, 8, 1, RF_ACT_SILU, -1, 0},
};
#define NUM_MAP_CASES ((int)(sizeof map_cases / sizeof map_cases[0]))
#define PERIOD        6

static void run_map(const map_case *c, rf_dtype x_dtype, rf_dtype add_dtype, rf_dtype y_dtype) {
    size_t num = (size_t)c->rows * (size_t)c->cols;
    operand x = op_normal(x_dtype, num, 0, 2), y = op_poison(y_dtype, num);
    operand add = op_normal(add_dtype, (size_t)(PERIOD * c->cols), 0, 1);
    int32_t *index = (int32_t *)host_doubles((size_t)c->rows);
    for (int r = 0; r < c->rows; r++) index[r] = (r * 5) % (PERIOD + 2) - 1; /* -1 and PERIOD add nothing */
    rf_elementwise_args a = rf_elementwise_args_default(x_dtype, y_dtype, c->rows, c->cols);
    a.x = x.dev;
    a.y = y.dev;
    a.act = c->act;
    a.x_scale = c->scale;
    a.x_shift = c->shift;
    if (c->add) {
        a.add = add.dev;
        a.add_dtype = add_dtype;
        a.add_period = PERIOD;
        if (c->add == 2) a.add_index = dev_i32(index, (size_t)c->rows);
    }
    expect_ok(test_ops()->elementwise(NULL, &a, &err));
    expect_ok(test_ops()->elementwise(test_stream(), &a, &err));
    double *want = host_doubles(num);
    for (int r = 0; r < c->rows; r++) {
        int row = c->add == 2 ? index[r] : r % PERIOD;
        for (int e = 0; e < c->cols; e++) {
            size_t at = (size_t)(r * c->cols + e);
            double u = (double)c->scale * (double)x.host[at] + (double)c->shift;
            if (c->add && row >= 0 && row < PERIOD) u += (double)add.host[row * c->cols + e];
            want[at] = ref_act(u, c->act);
        }
    }
    expect_close(&y, want, dtype_bound(y_dtype), "elementwise", "%d x %d add %d act %d from %s + %s", c->rows, c->cols,
                 c->add, (int)c->act, rf_dtype_name(x_dtype), rf_dtype_name(add_dtype));
    if (x_dtype != y_dtype) return;
    a.y = x.dev;
    expect_ok(test_ops()->elementwise(test_stream(), &a, &err));
    expect_same_bits(&x, &y, "elementwise", "%d x %d in place", c->rows, c->cols);
}

START_TEST(map_matches_double) {
    run_map(&map_cases[_i], RF_DTYPE_F32, RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST
START_TEST(map_between_dtypes_matches_double) {
    const rf_dtype f = RF_DTYPE_F32, b = RF_DTYPE_BF16;
    run_map(&map_cases[_i], b, b, b);
    run_map(&map_cases[_i], f, b, b);
    run_map(&map_cases[_i], b, f, f);
    run_map(&map_cases[_i], f, f, b);
}
END_TEST

START_TEST(layout_changes_move_every_pixel) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][3] = {{1, 4, 64}, {2, 3, 35}, {3, 1, 7}, {1, 128, 33}, {2, 5, 1}, {1, 3, 4096}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int n = shapes[i][0], c = shapes[i][1], p = shapes[i][2];
        size_t num = (size_t)n * (size_t)c * (size_t)p;
        operand planar = op_normal(RF_DTYPE_F32, num, 0, 1), last = op_poison(dtype, num);
        rf_elementwise_args a = rf_elementwise_args_default(RF_DTYPE_F32, dtype, n, c * p);
        a.x = planar.dev;
        a.y = last.dev;
        a.planar_to_last = true;
        a.channels = c;
        a.x_scale = 1.5f;
        a.x_shift = 0.25f;
        expect_ok(test_ops()->elementwise(NULL, &a, &err));
        expect_ok(test_ops()->elementwise(test_stream(), &a, &err));
        double *want = host_doubles(num);
        for (int b = 0; b < n; b++)
            for (int e = 0; e < c; e++)
                for (int q = 0; q < p; q++)
                    want[(b * p + q) * c + e] = 1.5 * (double)planar.host[(b * c + e) * p + q] + 0.25;
        expect_close(&last, want, dtype_bound(dtype), "elementwise", "planar to last %d x %d x %d", n, c, p);

        operand back = op_poison(RF_DTYPE_F32, num);
        a = rf_elementwise_args_default(dtype, RF_DTYPE_F32, n, c * p);
        a.x = last.dev;
        a.y = back.dev;
        a.last_to_planar = true;
        a.channels = c;
        expect_ok(test_ops()->elementwise(NULL, &a, &err));
        expect_ok(test_ops()->elementwise(test_stream(), &a, &err));
        for (int b = 0; b < n; b++)
            for (int e = 0; e < c; e++)
                for (int q = 0; q < p; q++) want[(b * c + e) * p + q] = last.host[(b * p + q) * c + e];
        expect_close(&back, want, 0, "elementwise", "last to planar %d x %d x %d", n, c, p);
    }
}
END_TEST

/* ---- timestep embedding ---- */

START_TEST(timestep_embedding_matches_double) {
    rf_dtype dtype = test_dtype(_i);
    const struct {
        int num, dim;
        float shift, period;
    } shapes[] = {{50, 256, 1, 10000}, {1, 256, 0, 10000}, {7, 2, 0, 10000}, {3, 96, 0.5f, 1000}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int num = shapes[i].num, half = shapes[i].dim / 2;
        double *ts = host_doubles((size_t)num);
        for (int j = 0; j < num; j++) ts[j] = num == 1 ? 999 : j * 999.0 / (num - 1);
        operand t = op_values(RF_DTYPE_F32, (size_t)num, ts), out = op_poison(dtype, (size_t)(num * 2 * half));
        rf_timestep_embed_args a = {.t = t.dev,
                                    .out = out.dev,
                                    .dtype = dtype,
                                    .num = num,
                                    .dim = 2 * half,
                                    .freq_shift = shapes[i].shift,
                                    .max_period = shapes[i].period};
        expect_ok(test_ops()->timestep_embed(NULL, &a, &err));
        expect_ok(test_ops()->timestep_embed(test_stream(), &a, &err));
        double *want = host_doubles(out.num);
        for (int n = 0; n < num; n++) {
            for (int j = 0; j < half; j++) {
                double f = pow((double)a.max_period, -j / (half - (double)a.freq_shift));
                want[n * 2 * half + j] = cos((double)t.host[n] * f);
                want[n * 2 * half + half + j] = sin((double)t.host[n] * f);
            }
        }
        /* The angle is an f32 of up to 999: half a unit in its last place is 3e-5. */
        expect_abs(&out, want, dtype == RF_DTYPE_F32 ? 2e-4 : 5e-3, "timestep_embed", "%d x %d shift %g", num, 2 * half,
                   (double)a.freq_shift);
    }
}
END_TEST

/* ---- patchify ---- */

START_TEST(patchify_orders_columns_by_channel_then_patch) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][9] = {/* batch, branches, channels, f, h, w, pt, ph, pw */
                             {2, 2, 4, 1, 8, 8, 1, 2, 2},
                             {1, 1, 3, 1, 6, 10, 1, 2, 2},
                             {3, 2, 1, 1, 4, 4, 1, 1, 1},
                             {2, 2, 16, 4, 6, 8, 2, 3, 4},
                             {1, 2, 4, 3, 18, 32, 1, 2, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const int *s = shapes[i];
        size_t num = (size_t)(s[0] * s[2] * s[3] * s[4] * s[5]);
        operand latent = op_normal(RF_DTYPE_F32, num, 0, 1);
        const double scales[12] = {9, 9, 9, 9, 9, 9, 0.5, 9, 9, 9, 9, 9};
        operand scale = op_values(RF_DTYPE_F32, 12, scales);
        const int32_t step = 2;
        for (int scaled = 0; scaled < 2; scaled++) {
            operand out = op_poison(dtype, num * (size_t)s[1]);
            rf_patchify_args a = {.latent = latent.dev,
                                  .out = out.dev,
                                  .dtype = dtype,
                                  .batch = s[0],
                                  .branches = s[1],
                                  .channels = s[2],
                                  .frames = s[3],
                                  .height = s[4],
                                  .width = s[5],
                                  .pt = s[6],
                                  .ph = s[7],
                                  .pw = s[8],
                                  .scale = scaled ? scale.dev : NULL,
                                  .step = scaled ? dev_i32(&step, 1) : NULL,
                                  .scale_stride = 3};
            expect_ok(test_ops()->patchify(NULL, &a, &err));
            expect_ok(test_ops()->patchify(test_stream(), &a, &err));
            double *want = host_doubles(out.num);
            size_t at = 0;
            for (int br = 0; br < s[1]; br++)
                for (int b = 0; b < s[0]; b++)
                    for (int f = 0; f < s[3]; f += s[6])
                        for (int y = 0; y < s[4]; y += s[7])
                            for (int x = 0; x < s[5]; x += s[8])
                                for (int c = 0; c < s[2]; c++)
                                    for (int df = 0; df < s[6]; df++)
                                        for (int dy = 0; dy < s[7]; dy++)
                                            for (int dx = 0; dx < s[8]; dx++)
                                                want[at++] =
                                                    (scaled ? 0.5 : 1) *
                                                    (double)
                                                        latent.host[(((b * s[2] + c) * s[3] + f + df) * s[4] + y + dy) *
                                                                        s[5] +
                                                                    x + dx];
            expect_close(&out, want, dtype == RF_DTYPE_F32 ? 0 : dtype_bound(dtype), "patchify",
                         "b%d branches %d c%d %dx%dx%d scale %d", s[0], s[1], s[2], s[3], s[4], s[5], scaled);
        }
    }
}
END_TEST

/* ---- rows ---- */

START_TEST(gather_and_scatter_copy_rows) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][3] = {{10, 4, 1}, {64, 64, 72}, {100, 33, 1152}, {7, 3, 5}, {300, 1, 4096}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int src_rows = shapes[i][0], num = shapes[i][1], cols = shapes[i][2];
        operand src = op_normal(dtype, (size_t)(src_rows * cols), 0, 1);
        operand packed = op_poison(dtype, (size_t)(num * cols)), spread = op_poison(dtype, (size_t)(src_rows * cols));
        int32_t *list = (int32_t *)host_doubles((size_t)src_rows);
        random_permutation(list, src_rows, 5);
        const int32_t *dev_list = dev_i32(list, (size_t)num);
        rf_rows_args a = {
            .src = src.dev, .dst = packed.dev, .rows = dev_list, .dtype = dtype, .num_rows = num, .cols = cols};
        expect_ok(test_ops()->gather_rows(NULL, &a, &err));
        expect_ok(test_ops()->gather_rows(test_stream(), &a, &err));
        double *want = host_doubles(packed.num), *want_spread = host_doubles(spread.num);
        for (size_t j = 0; j < spread.num; j++) want_spread[j] = NAN;
        for (int r = 0; r < num; r++) {
            for (int e = 0; e < cols; e++) {
                want[r * cols + e] = src.host[list[r] * cols + e];
                want_spread[list[r] * cols + e] = src.host[list[r] * cols + e];
            }
        }
        expect_close(&packed, want, 0, "gather_rows", "%d of %d x %d", num, src_rows, cols);
        a.src = packed.dev;
        a.dst = spread.dev;
        expect_ok(test_ops()->scatter_rows(NULL, &a, &err));
        expect_ok(test_ops()->scatter_rows(test_stream(), &a, &err));
        expect_close(&spread, want_spread, 0, "scatter_rows", "%d of %d x %d", num, src_rows, cols);
        int32_t *repeated = (int32_t *)host_doubles((size_t)num); /* a gather may repeat rows */
        a.src = src.dev;
        a.dst = packed.dev;
        a.rows = dev_i32(repeated, (size_t)num);
        expect_ok(test_ops()->gather_rows(test_stream(), &a, &err));
        for (int r = 0; r < num; r++)
            for (int e = 0; e < cols; e++) want[r * cols + e] = src.host[e];
        expect_close(&packed, want, 0, "gather_rows", "%d times row 0", num);
    }
}
END_TEST

/* ---- statistics ---- */

START_TEST(reduce_matches_double_and_repeats) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][3] = {{1, 256, 216}, {4, 1, 1}, {3, 77, 33}, {2, 1000, 64}, {1, 1, 5000}, {5, 129, 1152}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int form = 0; form < 4; form++) { /* bit 0: no b; bit 1: row weights */
            int groups = shapes[i][0], rows = shapes[i][1], cols = shapes[i][2];
            size_t num = (size_t)groups * (size_t)rows * (size_t)cols;
            operand x = op_normal(dtype, num, 0.1, 1), b = op_normal(dtype, num, 0, 2);
            operand w = op_normal(RF_DTYPE_F32, (size_t)rows, 0.5, 0.1);
            operand out = op_poison(RF_DTYPE_F32, (size_t)groups * 4), again = op_poison(RF_DTYPE_F32, out.num);
            rf_reduce_pair_args a = {.a = x.dev,
                                     .b = form & 1 ? NULL : b.dev,
                                     .a_dtype = dtype,
                                     .b_dtype = dtype,
                                     .groups = groups,
                                     .rows = rows,
                                     .cols = cols,
                                     .row_weight = form & 2 ? w.dev : NULL,
                                     .out = out.dev,
                                     .workspace_bytes = (size_t)groups * 256 * 4 * sizeof(float)};
            a.workspace = dev_bytes(a.workspace_bytes);
            expect_ok(test_ops()->reduce_pair(NULL, &a, &err));
            expect_ok(test_ops()->reduce_pair(test_stream(), &a, &err));
            a.out = again.dev;
            expect_ok(test_ops()->reduce_pair(test_stream(), &a, &err));
            double *want = host_doubles(out.num);
            for (int g = 0; g < groups; g++) {
                for (int r = 0; r < rows; r++) {
                    double f = form & 2 ? (double)w.host[r] : 1;
                    for (int e = 0; e < cols; e++) {
                        size_t at = ((size_t)g * (size_t)rows + (size_t)r) * (size_t)cols + (size_t)e;
                        double bv = form & 1 ? 0 : b.host[at], d = (double)x.host[at] - bv;
                        want[g * 4] += f * fabs(d);
                        want[g * 4 + 1] += f * fabs(bv);
                        want[g * 4 + 2] += f * d * d;
                        want[g * 4 + 3] += f * bv * bv;
                    }
                }
            }
            /* f32 partial sums; inputs are exact in either dtype. */
            expect_close(&out, want, 5e-6, "reduce_pair", "%d x %d x %d%s%s", groups, rows, cols,
                         form & 1 ? " no b" : "", form & 2 ? " weights" : "");
            expect_same_bits(&out, &again, "reduce_pair", "twice");
        }
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

START_TEST(bad_map_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    static float some[64];
    rf_elementwise_args good = rf_elementwise_args_default(dtype, dtype, 4, 12);
    expect_ok(test_ops()->elementwise(NULL, &good, &err));
    REFUSED(rf_elementwise_args, elementwise, good, a.rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_elementwise_args, elementwise, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_elementwise_args, elementwise, good, (a.add = some, a.add_period = 0), RF_ERR_SHAPE);
    REFUSED(rf_elementwise_args, elementwise, good, a.act = (rf_act)4, RF_ERR_ARGUMENT);
    REFUSED(rf_elementwise_args, elementwise, good, a.x_scale = NAN, RF_ERR_ARGUMENT);
    REFUSED(rf_elementwise_args, elementwise, good, a.x_shift = INFINITY, RF_ERR_ARGUMENT);
    REFUSED(rf_elementwise_args, elementwise, good, (a.planar_to_last = true, a.last_to_planar = true),
            RF_ERR_ARGUMENT);
    good.x_dtype = RF_DTYPE_F32;
    REFUSED(rf_elementwise_args, elementwise, good, (a.planar_to_last = true, a.channels = 5), RF_ERR_SHAPE);
    REFUSED(rf_elementwise_args, elementwise, good, (a.planar_to_last = true, a.channels = 0), RF_ERR_SHAPE);
    REFUSED(rf_elementwise_args, elementwise, good, (a.planar_to_last = true, a.channels = 3, a.add = some),
            RF_ERR_ARGUMENT);
    REFUSED(rf_elementwise_args, elementwise, good,
            (a.planar_to_last = true, a.channels = 3, a.x_dtype = RF_DTYPE_BF16), RF_ERR_DTYPE);
    REFUSED(rf_elementwise_args, elementwise, good,
            (a.last_to_planar = true, a.channels = 3, a.y_dtype = RF_DTYPE_BF16), RF_ERR_DTYPE);
    REFUSED(rf_elementwise_args, elementwise, good, a.x_dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rf_elementwise_args, elementwise, good, a.y_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_elementwise_args, elementwise, good, (a.add = some, a.add_dtype = RF_DTYPE_U8), RF_ERR_DTYPE);
    if (!test_is_cuda()) REFUSED(rf_elementwise_args, elementwise, good, a.y_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_status(test_ops()->elementwise(test_stream(), &good, &err), RF_ERR_ARGUMENT);

    rf_timestep_embed_args t = {.dtype = dtype, .num = 4, .dim = 256, .freq_shift = 1, .max_period = 10000};
    expect_ok(test_ops()->timestep_embed(NULL, &t, &err));
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.dim = 255, RF_ERR_SHAPE);
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.dim = 0, RF_ERR_SHAPE);
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.num = -1, RF_ERR_SHAPE);
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.max_period = 0, RF_ERR_ARGUMENT);
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.freq_shift = 128, RF_ERR_ARGUMENT);
    REFUSED(rf_timestep_embed_args, timestep_embed, t, a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_status(test_ops()->timestep_embed(test_stream(), &t, &err), RF_ERR_ARGUMENT);

    rf_patchify_args p = {.dtype = dtype,
                          .batch = 1,
                          .branches = 2,
                          .channels = 4,
                          .frames = 1,
                          .height = 8,
                          .width = 8,
                          .pt = 1,
                          .ph = 2,
                          .pw = 2};
    expect_ok(test_ops()->patchify(NULL, &p, &err));
    REFUSED(rf_patchify_args, patchify, p, a.ph = 3, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.pt = 0, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.width = 0, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.branches = 0, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.channels = 0, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.scale_stride = -1, RF_ERR_SHAPE);
    REFUSED(rf_patchify_args, patchify, p, a.dtype = RF_DTYPE_I64, RF_ERR_DTYPE);
    expect_status(test_ops()->patchify(test_stream(), &p, &err), RF_ERR_ARGUMENT);
}
END_TEST

START_TEST(bad_row_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_rows_args r = {.dtype = dtype, .num_rows = 4, .cols = 8};
    expect_ok(test_ops()->gather_rows(NULL, &r, &err));
    expect_ok(test_ops()->scatter_rows(NULL, &r, &err));
    REFUSED(rf_rows_args, gather_rows, r, a.num_rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_rows_args, scatter_rows, r, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_rows_args, gather_rows, r, a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_status(test_ops()->gather_rows(test_stream(), &r, &err), RF_ERR_ARGUMENT);
    operand both = op_normal(dtype, 32, 0, 1);
    const int32_t list[4] = {0, 1, 2, 3};
    r.src = r.dst = both.dev;
    r.rows = dev_i32(list, 4);
    expect_status(test_ops()->scatter_rows(test_stream(), &r, &err), RF_ERR_ARGUMENT); /* aliases */
    r.num_rows = 0;
    expect_ok(test_ops()->scatter_rows(test_stream(), &r, &err));

    rf_reduce_pair_args p = {.a_dtype = dtype, .b_dtype = dtype, .groups = 1, .rows = 4, .cols = 8};
    expect_ok(test_ops()->reduce_pair(NULL, &p, &err));
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.groups = -1, RF_ERR_SHAPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.a_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    expect_status(test_ops()->reduce_pair(test_stream(), &p, &err), RF_ERR_ARGUMENT);
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("elementwise");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, map_matches_double, 0, NUM_MAP_CASES);
    if (test_is_cuda()) tcase_add_loop_test(tc, map_between_dtypes_matches_double, 0, NUM_MAP_CASES);
    add_for_dtypes(tc, layout_changes_move_every_pixel);
    add_for_dtypes(tc, timestep_embedding_matches_double);
    add_for_dtypes(tc, patchify_orders_columns_by_channel_then_patch);
    add_for_dtypes(tc, gather_and_scatter_copy_rows);
    add_for_dtypes(tc, reduce_matches_double_and_repeats);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_map_arguments_are_refused);
    add_for_dtypes(tc, bad_row_arguments_are_refused);
    return run_kernel_suite(suite);
}
