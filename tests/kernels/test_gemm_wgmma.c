/* tests/kernels/test_gemm_wgmma.c - every tile shape of the library's own Hopper GEMM against the operator, which the tuner
 * would otherwise pick only where it is fastest. One k step first, then rings that wrap, then ragged edges. */
#include "harness.h"

#include "kernels/gemm_wgmma.h"

static const struct {
    int64_t m, n, k;
    rf_act act;
    bool bias, addend;
    rf_dtype y_dtype;
} cases[] = {
    {64, 64, 64, RF_ACT_NONE, false, false, RF_DTYPE_BF16},
    {128, 256, 128, RF_ACT_NONE, true, false, RF_DTYPE_BF16},
    {512, 1152, 1152, RF_ACT_NONE, true, false, RF_DTYPE_BF16},
    {512, 1152, 4608, RF_ACT_NONE, true, true, RF_DTYPE_BF16},
    {512, 4608, 1152, RF_ACT_GELU_TANH, true, false, RF_DTYPE_BF16},
    {300, 136, 72, RF_ACT_SILU, true, false, RF_DTYPE_F32},
    {65, 88, 72, RF_ACT_NONE, true, false, RF_DTYPE_BF16},
    {1, 8, 8, RF_ACT_NONE, false, false, RF_DTYPE_F32},
    {2048, 3456, 1152, RF_ACT_NONE, true, false, RF_DTYPE_BF16},
};

START_TEST(every_tile_agrees_with_the_operator) {
    if (!test_is_cuda()) return;
    int64_t m = cases[_i].m, n = cases[_i].n, k = cases[_i].k;
    rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, m, n, k);
    operand x = op_normal(RF_DTYPE_BF16, (size_t)(m * k), 0, 1),
            w = op_normal(RF_DTYPE_BF16, (size_t)(n * k), 0, 1 / sqrt((double)k));
    operand bias = op_normal(cases[_i].y_dtype, (size_t)n, 0, 1),
            y0 = op_normal(cases[_i].y_dtype, (size_t)(m * n), 0, 1);
    operand want = op_poison(cases[_i].y_dtype, (size_t)(m * n));
    args.x = x.dev;
    args.w = w.dev;
    args.bias = cases[_i].bias ? bias.dev : NULL;
    args.y0 = cases[_i].addend ? y0.dev : NULL;
    args.beta = cases[_i].addend ? 1.0f : 0.0f;
    args.y_dtype = cases[_i].y_dtype;
    args.act = cases[_i].act;
    args.y = want.dev;
    rf_error err = {0};
    ck_assert_msg(test_ops()->gemm(test_stream(), &args, &err) == RF_OK, "%s", err.message);
    op_download(&want);
    for (int config = 0; config < rf_gemm_wgmma_num_configs(); config++) {
        if (rf_gemm_wgmma_check(test_stream(), &args, config, &err) != RF_OK) {
            ck_assert_msg(rf_backend_sm(test_backend()) != 90, "%s: %s", rf_gemm_wgmma_config_name(config),
                          err.message);
            continue; /* not a Hopper card */
        }
        operand y = op_poison(cases[_i].y_dtype, (size_t)(m * n));
        args.y = y.dev;
        ck_assert_msg(rf_gemm_wgmma_force(test_stream(), &args, config, &err) == RF_OK, "%s", err.message);
        op_download(&y);
        double diff = 0, norm = 0;
        size_t worst = 0;
        double worst_abs = -1;
        for (size_t i = 0; i < y.num; i++) {
            double d = fabs((double)y.host[i] - want.host[i]);
            if (!(d <= worst_abs)) {
                worst_abs = d;
                worst = i;
            }
            diff += d * d;
            norm += (double)want.host[i] * want.host[i];
        }
        double rel = sqrt(diff / norm);
        /* both round the same f32 sums once; unfused activations of the operator round twice */
        ck_assert_msg(rel <= 5e-3, "%lldx%lldx%lld tile %s: relative L2 %g, worst at row %lld column %lld: %g, want %g",
                      (long long)m, (long long)n, (long long)k, rf_gemm_wgmma_config_name(config), rel,
                      (long long)(worst / (size_t)n), (long long)(worst % (size_t)n), (double)y.host[worst],
                      (double)want.host[worst]);
    }
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("gemm_wgmma");
    TCase *tc = kernel_tcase(suite, "tiles");
    tcase_add_loop_test(tc, every_tile_agrees_with_the_operator, 0, (int)(sizeof cases / sizeof cases[0]));
    return run_kernel_suite(suite);
}
