/* tests/kernels/test_gemv.c - Linear layers of one to eight rows on CUDA cores: see test_gemm_few.h. */
#include "test_gemm_few.h"

#include "kernels/gemv.h"

static const few_kernel gemv = {rf_gemv_num_configs, rf_gemv_config_name, rf_gemv_check, rf_gemv_force, 1e-5};

#define BF16 RF_DTYPE_BF16
#define F32  RF_DTYPE_F32

static const few_case cases[] = {
    /* every number of rows; a layer's output projection, with more warps than groups in part of the blocks */
    {1, 1024, 4096, RF_ACT_NONE, false, ADD_NONE, BF16, 0, 1, 0, 3},
    {2, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 3},
    {3, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 3},
    {4, 1024, 4096, RF_ACT_NONE, false, ADD_NONE, BF16, 0, 1, 0, 3},
    {5, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 4},
    {6, 520, 1024, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 2},
    {7, 520, 1024, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 2},
    {8, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 4},
    /* several rounds a warp: more groups than the card holds warps */
    {1, 14344, 1024, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 1},
    {2, 28672, 512, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 1},
    {4, 9001, 1032, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 2},
    {8, 12290, 520, RF_ACT_NONE, false, ADD_NONE, BF16, 0, 1, 0, 2},
    /* long k */
    {1, 600, 14336, RF_ACT_NONE, false, ADD_NONE, BF16, 0, 1, 0, 4},
    {2, 600, 18944, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 4},
    {4, 256, 14336, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 4},
    /* ragged n and k, row strides, alpha, beta, acts, addends in place and apart */
    {1, 1, 8, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 1},
    {1, 33, 24, RF_ACT_SILU, true, ADD_NONE, BF16, 8, 1, 0, 1},
    {2, 7, 1032, RF_ACT_NONE, true, ADD_Y0, F32, 16, 0.5f, -2, 2},
    {3, 1001, 3584, RF_ACT_NONE, false, ADD_IN_PLACE, BF16, 8, 1, 1, 3},
    {1, 3584, 3584, RF_ACT_NONE, true, ADD_IN_PLACE, F32, 0, 1, 1, 3},
    {4, 130, 2056, RF_ACT_GELU_TANH, true, ADD_IN_PLACE, BF16, 8, 1, 0.5f, 2},
    {5, 34, 40, RF_ACT_GELU_TANH, true, ADD_Y0, F32, 8, 2, 1, 1},
    {8, 101, 1000, RF_ACT_SILU, false, ADD_IN_PLACE, F32, 24, 1, 1, 2},
    {8, 77, 16, RF_ACT_NONE, true, ADD_Y0, BF16, 8, 1, 3, 1},
};

START_TEST(every_config_agrees_with_double) {
    if (test_is_cuda()) few_check_case(&gemv, &cases[_i]);
}
END_TEST

START_TEST(a_captured_chain_gives_the_bits_of_single_steps) {
    static const int64_t rows[] = {1, 2, 4, 8};
    if (test_is_cuda()) few_check_chain(&gemv, rows[_i / 2], _i % 2 != 0);
}
END_TEST

/* A row's neighbours are not seen: the same class of m gives the same bits for a row wherever it stands. */
START_TEST(rows_do_not_mix) {
    if (!test_is_cuda()) return;
    int64_t n = 512, k = 2048;
    operand x = op_normal(BF16, (size_t)(4 * k), 0, 1), w = op_normal(BF16, (size_t)(n * k), 0, 0.02);
    operand y = op_poison(F32, (size_t)(4 * n)), swapped = op_poison(F32, (size_t)(4 * n));
    rf_gemm_args args = rf_gemm_args_default(BF16, 4, n, k);
    args.y_dtype = F32;
    args.x = x.dev;
    args.w = w.dev;
    args.y = y.dev;
    expect_ok(rf_gemv_force(test_stream(), &args, 0, &err));
    op_download(&y);
    args.m = 3; /* rows 1, 2, 3 as rows 0, 1, 2; row 0 is out of sight */
    args.x = (const char *)x.dev + k * 2;
    args.y = swapped.dev;
    expect_ok(rf_gemv_force(test_stream(), &args, 0, &err));
    op_download(&swapped);
    ck_assert_int_eq(memcmp(y.host + n, swapped.host, (size_t)(3 * n) * sizeof(float)), 0);
    for (int64_t i = 3 * n; i < 4 * n; i++) ck_assert(isnan(swapped.host[i]));
}
END_TEST

START_TEST(the_default_is_taken_for_constant_weights_only) {
    if (!test_is_cuda()) return;
    rf_gemm_args args = rf_gemm_args_default(BF16, 1, 4096, 4096);
    operand x = op_normal(BF16, 64, 0, 1); /* alignment is all that is looked at */
    args.x = args.w = args.y = x.dev;
    ck_assert_int_eq(rf_gemv_default(test_stream(), &args), -1);
    args.w_is_constant = true;
    ck_assert_int_eq(rf_gemv_default(test_stream(), &args) >= 0, 1);
    args.m = 4;
    ck_assert_int_eq(rf_gemv_default(test_stream(), &args) >= 0, 1);
    args.m = 9;
    ck_assert_int_eq(rf_gemv_default(test_stream(), &args), -1);
    args.m = 1;
    args.n = args.k = 512; /* small */
    ck_assert_int_eq(rf_gemv_default(test_stream(), &args), -1);
    args = rf_gemm_args_default(BF16, 3, 2072, 1016);
    args.x = args.w = args.y = x.dev;
    args.w_is_constant = true;
    int config = rf_gemv_default(test_stream(), &args);
    ck_assert_int_ge(config, 0);
    few_check_default(&gemv, config, 3, 2072, 1016);
}
END_TEST

START_TEST(what_it_does_not_take_is_refused) {
    if (!test_is_cuda()) return;
    operand x = op_normal(BF16, 64 * 64, 0, 1), y = op_poison(BF16, 64 * 64);
    rf_gemm_args good = rf_gemm_args_default(BF16, 4, 64, 64);
    good.x = x.dev;
    good.w = x.dev;
    good.y = y.dev;
    rf_error ok = {0};
    ck_assert_msg(rf_gemv_check(test_stream(), &good, 0, &ok) == RF_OK, "%s", ok.message);
#define REFUSED(status, change)                                                                                        \
    do {                                                                                                               \
        rf_gemm_args g = good;                                                                                         \
        change;                                                                                                        \
        expect_status(rf_gemv_force(test_stream(), &g, 0, &err), status);                                              \
    } while (0)
    REFUSED(RF_ERR_UNSUPPORTED, g.w_is_kn = true);
    REFUSED(RF_ERR_UNSUPPORTED, g.num_batches = 2);
    REFUSED(RF_ERR_UNSUPPORTED, g.act = RF_ACT_GELU_ERF);
    REFUSED(RF_ERR_DTYPE, g.dtype = RF_DTYPE_F32);
    REFUSED(RF_ERR_SHAPE, g.m = 0);
    REFUSED(RF_ERR_SHAPE, g.m = 9);
    REFUSED(RF_ERR_SHAPE, g.k = 60);
    REFUSED(RF_ERR_SHAPE, g.ldx = 68);
    REFUSED(RF_ERR_SHAPE, g.k = g.ldx = g.ldw = 1 << 20); /* x does not fit into shared memory */
    REFUSED(RF_ERR_ARGUMENT, g.x = (const char *)x.dev + 8);
#undef REFUSED
    expect_status(rf_gemv_force(test_stream(), &good, -1, &err), RF_ERR_ARGUMENT);
    expect_status(rf_gemv_force(test_stream(), &good, rf_gemv_num_configs(), &err), RF_ERR_ARGUMENT);
    expect_status(rf_gemv_force(test_stream(), &good, 1, &err), RF_ERR_SHAPE); /* one step cannot be shared */
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("gemv");
    TCase *tc = kernel_tcase(suite, "configs");
    tcase_add_loop_test(tc, every_config_agrees_with_double, 0, (int)(sizeof cases / sizeof cases[0]));
    tcase_add_test(tc, rows_do_not_mix);
    tc = kernel_tcase(suite, "chains");
    tcase_add_loop_test(tc, a_captured_chain_gives_the_bits_of_single_steps, 0, 8);
    tc = kernel_tcase(suite, "operator");
    tcase_add_test(tc, the_default_is_taken_for_constant_weights_only);
    tcase_add_test(tc, what_it_does_not_take_is_refused);
    return run_kernel_suite(suite);
}
