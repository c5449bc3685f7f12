/* tests/kernels/test_sampler_kernels.c - sampler step, step counter, normal fill against straightforward code in double. */
#include "harness.h"

typedef struct {
    int batch, branches, channels, frames, height, width, pt, ph, pw, guided;
    bool variance_half, learned;
    double guidance;
} step_case;

static const step_case step_cases[] = {
    {2, 2, 4, 1, 8, 8, 1, 2, 2, 4, true, false, 4},   {1, 1, 4, 1, 16, 16, 1, 2, 2, 4, true, true, 1},
    {2, 2, 4, 1, 6, 10, 1, 2, 2, 3, true, true, 1.5}, {3, 2, 16, 1, 8, 6, 1, 2, 2, 0, false, false, 7.5},
    {1, 2, 3, 4, 6, 8, 2, 3, 4, 3, true, true, 3},    {1, 1, 1, 1, 5, 7, 1, 1, 1, 1, false, false, 2},
};
#define NUM_STEP_CASES ((int)(sizeof step_cases / sizeof step_cases[0]))

/* in_scale, timestep, x0_x, x0_out, clip, x, x0, x0_prev, out, noise, log_min, log_max */
static const rf_sampler_coefs coefs[] = {
    {1, 999, 1.2f, -0.8f, 0, 0, 0.9f, 0, 0.3f, 0, 0, 0},               /* like DDIM: x0_prev and noise not read */
    {1, 500, 1.1f, -0.7f, 1, 0.4f, 0.5f, 0, 0, 0.2f, -4, -2},          /* like DDPM with clipping */
    {1, 300, 1.05f, -0.3f, 0, 0.6f, 0.7f, -0.2f, 0, 0, 0, 0},          /* like DPM-Solver++ 2M */
    {1, 200, 0.9f, -0.3f, 0.5f, 0.3f, 0.4f, 0.1f, 0.2f, 0.5f, -3, -1}, /* everything */
    {1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0},                              /* x not read either */
};
#define NUM_COEFS ((int)(sizeof coefs / sizeof coefs[0]))

START_TEST(sampler_step_matches_double) {
    const step_case *c = &step_cases[_i];
    int out_channels = c->variance_half ? 2 * c->channels : c->channels;
    int gf = c->frames / c->pt, gh = c->height / c->ph, gw = c->width / c->pw, patch = c->pt * c->ph * c->pw;
    size_t num = (size_t)(c->batch * c->channels * c->frames * c->height * c->width);
    size_t cols = (size_t)(out_channels * patch), rows = (size_t)(c->batch * gf * gh * gw);
    void *dev_coefs = dev_bytes(sizeof coefs);
    rf_error up = {0};
    ck_assert_int_eq(rf_stream_upload(test_stream(), dev_coefs, coefs, sizeof coefs, &up), RF_OK);
    for (int t = 0; t < test_num_dtypes(); t++) {
        for (int step = 0; step < NUM_COEFS; step++) {
            const rf_sampler_coefs *k = &coefs[step];
            operand model = op_normal(test_dtype(t), (size_t)c->branches * rows * cols, 0, 1);
            operand x = op_normal(RF_DTYPE_F32, num, 0, 1), prev = op_normal(RF_DTYPE_F32, num, 0, 1);
            operand noise = op_normal(RF_DTYPE_F32, num * (size_t)NUM_COEFS, 0, 1);
            /* What has weight 0 is not read: it may be NaN. */
            if (k->x0_prev == 0) prev = op_poison(RF_DTYPE_F32, num);
            if (k->x == 0 && k->x0_x == 0) x = op_poison(RF_DTYPE_F32, num);
            if (k->noise == 0) noise = op_poison(RF_DTYPE_F32, num * (size_t)NUM_COEFS);
            double *want_x = host_doubles(num), *want_prev = host_doubles(num);
            const int32_t at_step = step;
            rf_sampler_step_args a = {.model_out = model.dev,
                                      .model_dtype = model.dtype,
                                      .x = x.dev,
                                      .x0_prev = prev.dev,
                                      .noise = noise.dev,
                                      .coefs = dev_coefs,
                                      .step = dev_i32(&at_step, 1),
                                      .batch = c->batch,
                                      .branches = c->branches,
                                      .channels = c->channels,
                                      .out_channels = out_channels,
                                      .frames = c->frames,
                                      .height = c->height,
                                      .width = c->width,
                                      .pt = c->pt,
                                      .ph = c->ph,
                                      .pw = c->pw,
                                      .guidance_scale = (float)c->guidance,
                                      .guided_channels = c->guided,
                                      .learned_variance = c->learned};
            size_t at = 0;
            for (int b = 0; b < c->batch; b++)
                for (int ch = 0; ch < c->channels; ch++)
                    for (int f = 0; f < c->frames; f++)
                        for (int y = 0; y < c->height; y++)
                            for (int xx = 0; xx < c->width; xx++, at++) {
                                size_t row = (size_t)(((b * gf + f / c->pt) * gh + y / c->ph) * gw + xx / c->pw);
                                size_t in = (size_t)((f % c->pt * c->ph + y % c->ph) * c->pw + xx % c->pw);
                                const float *cond = model.host + row * cols, *uncond = cond + rows * cols;
                                double out = cond[(size_t)(ch * patch) + in];
                                if (c->branches == 2 && ch < c->guided) {
                                    double u = uncond[(size_t)(ch * patch) + in];
                                    out = u + c->guidance * (out - u);
                                }
                                double old = k->x == 0 && k->x0_x == 0 ? 0 : (double)x.host[at];
                                double x0 = (double)k->x0_x * old + (double)k->x0_out * out;
                                if (k->clip > 0) x0 = fmin((double)k->clip, fmax(-(double)k->clip, x0));
                                double next = (double)k->x * old + (double)k->x0 * x0 + (double)k->out * out;
                                if (k->x0_prev != 0) next += (double)k->x0_prev * (double)prev.host[at];
                                if (k->noise != 0) {
                                    double s = k->noise;
                                    if (c->learned) {
                                        double v = cond[(size_t)((c->channels + ch) * patch) + in];
                                        double frac = (v + 1) / 2;
                                        s *= exp(0.5 * (frac * (double)k->log_max + (1 - frac) * (double)k->log_min));
                                    }
                                    next += s * (double)noise.host[(size_t)step * num + at];
                                }
                                want_x[at] = next;
                                want_prev[at] = x0;
                            }
            expect_ok(test_ops()->sampler_step(NULL, &a, &err));
            expect_ok(test_ops()->sampler_step(test_stream(), &a, &err));
            expect_close(&x, want_x, 2e-6, "sampler_step x", "case %d coefs %d model %s", _i, step,
                         rf_dtype_name(model.dtype));
            expect_close(&prev, want_prev, 2e-6, "sampler_step x0", "case %d coefs %d model %s", _i, step,
                         rf_dtype_name(model.dtype));
        }
    }
}
END_TEST

START_TEST(noise_may_be_missing_where_no_step_has_any) {
    operand model = op_normal(RF_DTYPE_F32, 64, 0, 1), x = op_normal(RF_DTYPE_F32, 64, 0, 1);
    operand prev = op_poison(RF_DTYPE_F32, 64);
    const int32_t zero = 0;
    void *dev_coefs = dev_bytes(sizeof coefs[0]);
    rf_error up = {0};
    ck_assert_int_eq(rf_stream_upload(test_stream(), dev_coefs, coefs, sizeof coefs[0], &up), RF_OK);
    rf_sampler_step_args a = {.model_out = model.dev,
                              .model_dtype = RF_DTYPE_F32,
                              .x = x.dev,
                              .x0_prev = prev.dev,
                              .coefs = dev_coefs,
                              .step = dev_i32(&zero, 1),
                              .batch = 1,
                              .branches = 1,
                              .channels = 1,
                              .out_channels = 1,
                              .frames = 1,
                              .height = 8,
                              .width = 8,
                              .pt = 1,
                              .ph = 1,
                              .pw = 1,
                              .guidance_scale = 1,
                              .guided_channels = 1};
    double want[64];
    for (int i = 0; i < 64; i++) {
        double x0 = (double)coefs[0].x0_x * (double)x.host[i] + (double)coefs[0].x0_out * (double)model.host[i];
        want[i] = (double)coefs[0].x0 * x0 + (double)coefs[0].out * (double)model.host[i];
    }
    expect_ok(test_ops()->sampler_step(test_stream(), &a, &err));
    expect_close(&x, want, 2e-6, "sampler_step", "no noise buffer");
}
END_TEST

static void download_i32(int32_t *host, const int32_t *dev, size_t num) {
    expect_ok(rf_stream_download(test_stream(), host, dev, num * sizeof *host, &err));
}

START_TEST(step_advance_counts_and_points_at_rows) {
    enum { GROUPS = 300 };
    int32_t slots[GROUPS], got[GROUPS], step = 3;
    for (int g = 0; g < GROUPS; g++) slots[g] = g % 7;
    int32_t *dev_step = (int32_t *)dev_i32(&step, 1), *index = (int32_t *)dev_bytes(sizeof got);
    rf_step_advance_args a = {.step = dev_step,
                              .increment = 0,
                              .slots = dev_i32(slots, GROUPS),
                              .mod_index = index,
                              .num_groups = GROUPS,
                              .rows_per_step = 8,
                              .steps_per_chunk = 5};
    expect_ok(test_ops()->step_advance(NULL, &a, &err));
    for (int i = 0; i < 6; i++) {
        expect_ok(test_ops()->step_advance(test_stream(), &a, &err));
        int32_t want_step = 3 + i;
        download_i32(&step, dev_step, 1);
        download_i32(got, index, GROUPS);
        ck_assert_int_eq(step, want_step);
        for (int g = 0; g < GROUPS; g++) ck_assert_int_eq(got[g], want_step % 5 * 8 + slots[g]);
        a.increment = 1;
    }
    a.num_groups = 0;
    a.slots = NULL;
    a.mod_index = NULL;
    expect_ok(test_ops()->step_advance(test_stream(), &a, &err));
    download_i32(&step, dev_step, 1);
    ck_assert_int_eq(step, 9);
}
END_TEST

START_TEST(fill_normal_is_the_counter_generator) {
    rf_dtype dtype = test_dtype(_i);
    const int nums[] = {1, 3, 4, 1000, 4096, 4097, 100003};
    for (size_t i = 0; i < sizeof nums / sizeof nums[0]; i++) {
        size_t num = (size_t)nums[i];
        operand out = op_poison(dtype, num);
        rf_fill_normal_args a = {.out = out.dev,
                                 .dtype = dtype,
                                 .num = nums[i],
                                 .seed = 42 + ((uint64_t)1 << 40),
                                 .key = 7,
                                 .mean = 0.5f,
                                 .std = 0.02f};
        expect_ok(test_ops()->fill_normal(NULL, &a, &err));
        expect_ok(test_ops()->fill_normal(test_stream(), &a, &err));
        float *draws = (float *)host_doubles(num);
        double *want = host_doubles(num);
        rf_rng_normal_at(a.seed, a.key, 0, draws, num);
        for (size_t j = 0; j < num; j++) want[j] = (double)a.mean + (double)a.std * (double)draws[j];
        expect_close(&out, want, dtype_bound(dtype), "fill_normal", "%d", nums[i]);
    }
}
END_TEST

#define REFUSED(type, op, good, change, status)                                                                        \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(NULL, &a, &err), status);                                                         \
    } while (0)

START_TEST(bad_arguments_are_refused_at_plan_time) {
    rf_dtype dtype = test_dtype(_i);
    rf_sampler_step_args s = {.model_dtype = dtype,
                              .batch = 1,
                              .branches = 2,
                              .channels = 4,
                              .out_channels = 8,
                              .frames = 1,
                              .height = 8,
                              .width = 8,
                              .pt = 1,
                              .ph = 2,
                              .pw = 2,
                              .guidance_scale = 4,
                              .guided_channels = 3,
                              .learned_variance = true};
    expect_ok(test_ops()->sampler_step(NULL, &s, &err));
    REFUSED(rf_sampler_step_args, sampler_step, s, a.out_channels = 4, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.out_channels = 6, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.branches = 3, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.branches = 0, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.guided_channels = 5, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.width = 7, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.pw = 0, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.channels = 0, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.batch = -1, RF_ERR_SHAPE);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.guidance_scale = NAN, RF_ERR_ARGUMENT);
    REFUSED(rf_sampler_step_args, sampler_step, s, a.model_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    if (!test_is_cuda()) REFUSED(rf_sampler_step_args, sampler_step, s, a.model_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_status(test_ops()->sampler_step(test_stream(), &s, &err), RF_ERR_ARGUMENT);
    s.batch = 0;
    expect_ok(test_ops()->sampler_step(test_stream(), &s, &err));

    rf_step_advance_args v = {.num_groups = 2, .rows_per_step = 4, .steps_per_chunk = 10};
    expect_ok(test_ops()->step_advance(NULL, &v, &err));
    REFUSED(rf_step_advance_args, step_advance, v, a.num_groups = -1, RF_ERR_SHAPE);
    REFUSED(rf_step_advance_args, step_advance, v, a.steps_per_chunk = 0, RF_ERR_SHAPE);
    REFUSED(rf_step_advance_args, step_advance, v, a.rows_per_step = -1, RF_ERR_SHAPE);
    expect_status(test_ops()->step_advance(test_stream(), &v, &err), RF_ERR_ARGUMENT);

    rf_fill_normal_args f = {.dtype = dtype, .num = 4, .std = 1};
    expect_ok(test_ops()->fill_normal(NULL, &f, &err));
    REFUSED(rf_fill_normal_args, fill_normal, f, a.num = -1, RF_ERR_SHAPE);
    REFUSED(rf_fill_normal_args, fill_normal, f, a.mean = NAN, RF_ERR_ARGUMENT);
    REFUSED(rf_fill_normal_args, fill_normal, f, a.std = INFINITY, RF_ERR_ARGUMENT);
    REFUSED(rf_fill_normal_args, fill_normal, f, a.dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    expect_status(test_ops()->fill_normal(test_stream(), &f, &err), RF_ERR_ARGUMENT);
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("sampler kernels");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, sampler_step_matches_double, 0, NUM_STEP_CASES);
    tcase_add_test(tc, noise_may_be_missing_where_no_step_has_any);
    tcase_add_test(tc, step_advance_counts_and_points_at_rows);
    add_for_dtypes(tc, fill_normal_is_the_counter_generator);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_arguments_are_refused_at_plan_time);
    return run_kernel_suite(suite);
}
