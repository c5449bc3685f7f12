/* tests/kernels/test_gemm.c - the Linear layer against loops in double. */
#include "harness.h"

typedef struct {
    int64_t m, n, k;
    rf_act act;
    bool bias, addend, in_place, w_is_kn;
    int pad; /* extra elements between rows of every operand */
    int64_t batches;
    bool share_w, share_x;
    float alpha, beta;
    double x_std;
} gemm_case;

static const gemm_case cases[] = {
    /* DiT layers of the shipped model and of DiT-XL/2 */
    {2048, 648, 216, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {512, 864, 216, RF_ACT_GELU_TANH, true, false, false, false, 0, 1, false, false, 1, 0, 3},
    {512, 216, 864, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {64, 1152, 1152, RF_ACT_NONE, true, true, true, false, 0, 1, false, false, 1, 1, 1},
    {2, 6912, 1152, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {8, 1152, 256, RF_ACT_SILU, true, false, false, false, 0, 1, false, false, 1, 0, 2},
    /* rows that fill no tile; a column block border; one row, one column */
    {1, 8, 8, RF_ACT_NONE, false, false, false, false, 0, 1, false, false, 1, 0, 1},
    {1, 1000, 64, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {3, 33, 16, RF_ACT_GELU_ERF, true, false, false, false, 0, 1, false, false, 1, 0, 3},
    {257, 200, 72, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {255, 385, 40, RF_ACT_SILU, false, true, false, false, 0, 1, false, false, 1, 0.5f, 1},
    {129, 1, 104, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {65, 32, 16, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    /* addends: another buffer, y itself, under an act */
    {100, 72, 144, RF_ACT_NONE, true, true, false, false, 0, 1, false, false, 1, 1, 1},
    {100, 72, 144, RF_ACT_NONE, false, true, true, false, 0, 1, false, false, 0.5f, -2, 1},
    {300, 136, 64, RF_ACT_GELU_TANH, true, true, true, false, 0, 1, false, false, 1, 0.25f, 3},
    {70, 136, 64, RF_ACT_SILU, false, true, false, false, 8, 1, false, false, 1, 1, 3},
    /* strides, [k, n] weights, alpha */
    {31, 48, 24, RF_ACT_NONE, true, false, false, false, 8, 1, false, false, 1, 0, 1},
    {77, 64, 128, RF_ACT_NONE, false, false, false, true, 0, 1, false, false, 0.125f, 0, 1},
    {77, 64, 128, RF_ACT_GELU_TANH, true, false, false, true, 16, 1, false, false, 1, 0, 2},
    /* batches: own, shared w, shared x */
    {33, 40, 32, RF_ACT_NONE, false, false, false, false, 0, 3, false, false, 1, 0, 1},
    {33, 40, 32, RF_ACT_NONE, true, true, true, false, 8, 3, true, false, 1, 1, 1},
    {300, 512, 64, RF_ACT_NONE, false, false, false, true, 0, 2, false, true, 1, 0, 1},
    {64, 64, 512, RF_ACT_NONE, false, false, false, false, 0, 17, false, false, 1, 0, 1},
    /* sizes that only the CPU takes: k no multiple of 4 */
    {5, 7, 3, RF_ACT_NONE, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {40, 130, 1, RF_ACT_GELU_TANH, true, false, false, false, 0, 1, false, false, 1, 0, 1},
    {66, 19, 77, RF_ACT_NONE, true, true, true, true, 3, 2, false, false, 1, 1, 1},
};
#define NUM_CASES ((int)(sizeof cases / sizeof cases[0]))

static void run_case(const gemm_case *c, rf_dtype dtype, rf_dtype y_dtype) {
    int64_t ldx = c->k + c->pad, ldw = (c->w_is_kn ? c->n : c->k) + c->pad, ldy = c->n + c->pad;
    int64_t w_rows = c->w_is_kn ? c->k : c->n;
    size_t num_x = (size_t)((c->share_x ? 1 : c->batches) * c->m * ldx);
    size_t num_w = (size_t)((c->share_w ? 1 : c->batches) * w_rows * ldw), num_y = (size_t)(c->batches * c->m * ldy);
    operand x = op_normal(dtype, num_x, 0, c->x_std), w = op_normal(dtype, num_w, 0, 1 / sqrt((double)c->k));
    operand bias = op_normal(y_dtype, (size_t)c->n, 0, 1), y0 = op_normal(y_dtype, num_y, 0, 1);
    operand y = c->in_place ? op_clone(&y0) : op_poison(y_dtype, num_y);

    rf_gemm_args g = rf_gemm_args_default(dtype, c->m, c->n, c->k);
    g.y_dtype = y_dtype;
    g.x = x.dev;
    g.w = w.dev;
    g.bias = c->bias ? bias.dev : NULL;
    g.y = y.dev;
    g.y0 = !c->addend ? NULL : c->in_place ? y.dev : y0.dev;
    g.ldx = ldx;
    g.ldw = ldw;
    g.ldy = ldy;
    g.w_is_kn = c->w_is_kn;
    g.act = c->act;
    g.alpha = c->alpha;
    g.beta = c->beta;
    g.num_batches = c->batches;
    g.x_batch_stride = c->share_x ? 0 : c->m * ldx;
    g.w_batch_stride = c->share_w ? 0 : w_rows * ldw;
    g.y_batch_stride = c->m * ldy;

    int unit = dtype == RF_DTYPE_BF16 ? 8 : 4;
    if (test_is_cuda() && (c->k % unit || ldx % unit || ldw % unit)) {
        expect_status(test_ops()->gemm(NULL, &g, &err), RF_ERR_SHAPE);
        return;
    }
    if (test_is_cuda() && c->act != RF_ACT_NONE && c->in_place) {
        expect_status(test_ops()->gemm(NULL, &g, &err), RF_ERR_UNSUPPORTED);
        return;
    }
    expect_ok(test_ops()->gemm(NULL, &g, &err));
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));

    double *want = host_doubles(num_y);
    for (size_t i = 0; i < num_y; i++) want[i] = c->in_place ? y0.host[i] : NAN;
    for (int64_t b = 0; b < c->batches; b++) {
        const float *xb = x.host + b * g.x_batch_stride, *wb = w.host + b * g.w_batch_stride;
        for (int64_t i = 0; i < c->m; i++) {
            for (int64_t j = 0; j < c->n; j++) {
                double sum = 0;
                for (int64_t l = 0; l < c->k; l++)
                    sum += (double)xb[i * ldx + l] * (double)(c->w_is_kn ? wb[l * ldw + j] : wb[j * ldw + l]);
                double u = ref_act(c->alpha * sum + (c->bias ? bias.host[j] : 0), c->act);
                size_t at = (size_t)(b * g.y_batch_stride + i * ldy + j);
                want[at] = u + (c->addend ? c->beta * y0.host[at] : 0);
            }
        }
    }
    /* f32 out of bf16 in: only the inputs were rounded, and the reference saw that; an act may use the hardware's tanh. */
    double bound = dtype_bound(y_dtype);
    if (dtype == RF_DTYPE_BF16 && y_dtype == RF_DTYPE_F32) bound = c->act == RF_ACT_NONE ? 1e-5 : 1e-3;
    expect_close(&y, want, bound, "gemm", "m %d n %d k %d act %d%s%s%s%s pad %d batches %d", (int)c->m, (int)c->n,
                 (int)c->k, (int)c->act, c->bias ? " bias" : "", c->addend ? " addend" : "", c->in_place ? "=y" : "",
                 c->w_is_kn ? " kn" : "", c->pad, (int)c->batches);
}

START_TEST(matches_double) {
    run_case(&cases[_i], RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST

START_TEST(matches_double_in_bf16) {
    run_case(&cases[_i], RF_DTYPE_BF16, RF_DTYPE_BF16);
}
END_TEST

START_TEST(bf16_inputs_give_f32_results) {
    run_case(&cases[_i], RF_DTYPE_BF16, RF_DTYPE_F32);
}
END_TEST

/* What cancels in a tanh form does not here: large negative and positive inputs. */
START_TEST(activations_keep_their_tails) {
    const double xs[] = {-100, -20, -10, -5, -3, -1, -1e-3, -1e-30, 0, 1e-30, 1e-3, 1, 3, 5, 10, 20, 100, 1000};
    enum { N = sizeof xs / sizeof xs[0] };
    for (int act = RF_ACT_NONE; act <= RF_ACT_SILU; act++) {
        double x8[N * 8] = {0}, w8[8] = {1}, want[N];
        for (int i = 0; i < N; i++) x8[i * 8] = xs[i];
        operand x = op_values(RF_DTYPE_F32, N * 8, x8), w = op_values(RF_DTYPE_F32, 8, w8);
        operand y = op_poison(RF_DTYPE_F32, N);
        rf_gemm_args g = rf_gemm_args_default(RF_DTYPE_F32, N, 1, 8);
        g.x = x.dev;
        g.w = w.dev;
        g.y = y.dev;
        g.act = (rf_act)act;
        expect_ok(test_ops()->gemm(test_stream(), &g, &err));
        op_download(&y);
        for (int i = 0; i < N; i++) {
            want[i] = ref_act((double)x.host[i * 8], (rf_act)act);
            double diff = fabs((double)y.host[i] - want[i]);
            /* The CPU's rf_exp is good to 2e-7; CUDA's f32 functions to a few units more. */
            double bound = (test_is_cuda() ? 1e-6 : 2e-7) * fmax(1, fabs(want[i]));
            ck_assert_msg(diff <= bound, "act %d of %g is %.9g, want %.9g", act, xs[i], (double)y.host[i], want[i]);
        }
    }
}
END_TEST

START_TEST(no_rows_is_nothing_to_do) {
    rf_gemm_args g = rf_gemm_args_default(test_dtype(_i), 0, 64, 64);
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));
    g = rf_gemm_args_default(test_dtype(_i), 16, 64, 64);
    g.num_batches = 0;
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));
}
END_TEST

START_TEST(repeats_with_the_same_bits) {
    rf_dtype dtype = test_dtype(_i);
    operand x = op_normal(dtype, 300 * 1152, 0, 1), w = op_normal(dtype, 1152 * 1152, 0, 0.03);
    operand y1 = op_poison(dtype, 300 * 1152), y2 = op_poison(dtype, 300 * 1152);
    rf_gemm_args g = rf_gemm_args_default(dtype, 300, 1152, 1152);
    g.x = x.dev;
    g.w = w.dev;
    g.y = y1.dev;
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));
    g.y = y2.dev;
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));
    expect_same_bits(&y1, &y2, "gemm", "twice");
}
END_TEST

START_TEST(bad_arguments_are_refused_at_plan_time) {
    const rf_ops *ops = test_ops();
    rf_gemm_args good = rf_gemm_args_default(test_dtype(_i), 16, 32, 64);
    expect_ok(ops->gemm(NULL, &good, &err));
#define REFUSED(change, status)                                                                                        \
    do {                                                                                                               \
        rf_gemm_args g = good;                                                                                         \
        change;                                                                                                        \
        expect_status(ops->gemm(NULL, &g, &err), status);                                                              \
    } while (0)
    REFUSED(g.m = -1, RF_ERR_SHAPE);
    REFUSED(g.n = 0, RF_ERR_SHAPE);
    REFUSED(g.k = 0, RF_ERR_SHAPE);
    REFUSED(g.m = (int64_t)1 << 40, RF_ERR_SHAPE);
    REFUSED(g.ldx = 56, RF_ERR_SHAPE);
    REFUSED(g.ldw = 56, RF_ERR_SHAPE);
    REFUSED((g.w_is_kn = true, g.ldw = 24), RF_ERR_SHAPE);
    REFUSED(g.ldy = 24, RF_ERR_SHAPE);
    REFUSED(g.num_batches = -1, RF_ERR_SHAPE);
    REFUSED((g.num_batches = 2, g.y_batch_stride = 0), RF_ERR_SHAPE);
    REFUSED(g.x_batch_stride = -1, RF_ERR_SHAPE);
    REFUSED(g.w_batch_stride = -64, RF_ERR_SHAPE);
    REFUSED(g.act = (rf_act)9, RF_ERR_ARGUMENT);
    REFUSED(g.alpha = NAN, RF_ERR_ARGUMENT);
    REFUSED(g.beta = INFINITY, RF_ERR_ARGUMENT);
    REFUSED(g.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(g.dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(g.y_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    REFUSED((g.dtype = RF_DTYPE_F32, g.y_dtype = RF_DTYPE_BF16), RF_ERR_DTYPE);
    if (!test_is_cuda()) REFUSED(g.dtype = g.y_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
#undef REFUSED
    expect_status(ops->gemm(NULL, NULL, &err), RF_ERR_ARGUMENT);
}
END_TEST

START_TEST(missing_pointers_are_refused_at_run_time) {
    operand x = op_normal(RF_DTYPE_F32, 64, 0, 1), y = op_poison(RF_DTYPE_F32, 64);
    rf_gemm_args g = rf_gemm_args_default(RF_DTYPE_F32, 8, 8, 8);
    expect_status(test_ops()->gemm(test_stream(), &g, &err), RF_ERR_ARGUMENT);
    g.x = x.dev;
    g.w = x.dev;
    expect_status(test_ops()->gemm(test_stream(), &g, &err), RF_ERR_ARGUMENT);
    g.y = x.dev;
    expect_status(test_ops()->gemm(test_stream(), &g, &err), RF_ERR_ARGUMENT);
    g.y = y.dev;
    expect_ok(test_ops()->gemm(test_stream(), &g, &err));
}
END_TEST

START_TEST(tuning_calls_are_harmless_on_the_host) {
    rf_error err = {0};
    rf_backend *cpu = NULL;
    rf_stream *s = NULL;
    ck_assert_int_eq(rf_backend_open(&cpu, "cpu", 1, &err), RF_OK);
    ck_assert_int_eq(rf_stream_create(&s, cpu, &err), RF_OK);
    ck_assert_int_eq(rf_gemm_set_tuning(s, true, &err), RF_OK);
    ck_assert_int_eq(rf_gemm_tuning_load(s, "/nowhere/at/all", &err), RF_OK);
    ck_assert_int_eq(rf_gemm_tuning_save(s, "/nowhere/at/all", &err), RF_OK);
    ck_assert(!rf_gemm_tuning_changed(s));
    rf_stream_destroy(s);
    rf_backend_close(cpu);
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("gemm");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, matches_double, 0, NUM_CASES);
    if (test_is_cuda()) {
        tcase_add_loop_test(tc, matches_double_in_bf16, 0, NUM_CASES);
        tcase_add_loop_test(tc, bf16_inputs_give_f32_results, 0, NUM_CASES);
    }
    tcase_add_test(tc, activations_keep_their_tails);
    add_for_dtypes(tc, repeats_with_the_same_bits);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, no_rows_is_nothing_to_do);
    add_for_dtypes(tc, bad_arguments_are_refused_at_plan_time);
    tcase_add_test(tc, missing_pointers_are_refused_at_run_time);
    tcase_add_test(tc, tuning_calls_are_harmless_on_the_host);
    return run_kernel_suite(suite);
}
