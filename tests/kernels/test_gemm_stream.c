/* tests/kernels/test_gemm_stream.c - Linear layers of up to 64 rows with large weights on Hopper: see test_gemm_few.h.
 * */
#include "test_gemm_few.h"

#include "kernels/gemm_stream.h"

static const few_kernel streamed = {rf_gemm_stream_num_configs, rf_gemm_stream_config_name, rf_gemm_stream_check,
                                    rf_gemm_stream_force, 1e-4};

#define BF16 RF_DTYPE_BF16
#define F32  RF_DTYPE_F32

static const few_case cases[] = {
    /* every width of the token tile, full and not; k of several rounds of the ring, and shorter than it */
    {1, 1024, 4096, RF_ACT_NONE, false, ADD_NONE, BF16, 0, 1, 0, 8},
    {5, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 8},
    {8, 2048, 2048, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {9, 2048, 2048, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {16, 2048, 2048, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 8},
    {17, 2048, 2048, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {32, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {33, 1024, 4096, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 8},
    {48, 520, 1032, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {63, 1024, 2048, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 8},
    {64, 1024, 2048, RF_ACT_NONE, true, ADD_NONE, F32, 0, 1, 0, 8},
    /* tiles of 128 rows and more; several tiles a block, the last one ragged */
    {32, 16384, 512, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 4},
    {64, 24584, 256, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 4},
    {16, 40008, 328, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 4},
    {8, 70008, 192, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 3},
    /* long k, through clusters too */
    {32, 512, 12288, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 12},
    {64, 264, 14336, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 12},
    {24, 4096, 1024, RF_ACT_NONE, true, ADD_NONE, BF16, 0, 1, 0, 12},
    /* ragged n and k, row strides, alpha, beta, acts, addends in place and apart */
    {1, 8, 8, RF_ACT_NONE, false, ADD_NONE, F32, 0, 1, 0, 4},
    {12, 136, 1032, RF_ACT_SILU, true, ADD_NONE, BF16, 8, 1, 0, 8},
    {37, 72, 600, RF_ACT_NONE, true, ADD_Y0, F32, 16, 0.5f, -2, 8},
    {31, 1000, 3592, RF_ACT_NONE, false, ADD_IN_PLACE, BF16, 8, 1, 1, 8},
    {64, 1544, 520, RF_ACT_NONE, true, ADD_IN_PLACE, F32, 0, 1, 1, 8},
    {50, 2056, 136, RF_ACT_GELU_TANH, true, ADD_IN_PLACE, BF16, 8, 1, 0.5f, 4},
    {7, 40, 4104, RF_ACT_GELU_TANH, true, ADD_Y0, F32, 8, 2, 1, 12},
};

static bool is_hopper(void) {
    return test_is_cuda() && rf_backend_sm(test_backend()) == 90;
}

START_TEST(every_config_agrees_with_double) {
    if (is_hopper()) few_check_case(&streamed, &cases[_i]);
}
END_TEST

START_TEST(a_captured_chain_gives_the_bits_of_single_steps) {
    static const int64_t rows[] = {8, 32, 64};
    if (is_hopper()) few_check_chain(&streamed, rows[_i / 2], _i % 2 != 0);
}
END_TEST

/* What the last warpgroup reads behind a tile that is no multiple of 64 rows, and TMA's zeros, must not reach y:
 * weights of NaN in the rows behind each block's tile spoil their own outputs only. */
START_TEST(rows_of_w_do_not_mix) {
    if (!is_hopper()) return;
    int64_t m = 32, n = 4096, k = 1024;
    operand x = op_normal(BF16, (size_t)(m * k), 0, 1), w = op_normal(BF16, (size_t)(n * k), 0, 0.03);
    operand y = op_poison(F32, (size_t)(m * n)), clean = op_poison(F32, (size_t)(m * n));
    rf_gemm_args args = rf_gemm_args_default(BF16, m, n, k);
    args.y_dtype = F32;
    args.x = x.dev;
    args.w = w.dev;
    int num_run = 0;
    for (int config = 0; config < rf_gemm_stream_num_configs(); config++) {
        rf_gemm_stream_shape shape;
        args.y = clean.dev;
        args.w = w.dev;
        if (rf_gemm_stream_get_shape(test_stream(), &args, config, &shape, NULL) != RF_OK) continue;
        num_run++;
        expect_ok(rf_gemm_stream_force(test_stream(), &args, config, &err));
        op_download(&clean);
        operand spoiled = op_clone(&w);
        for (int64_t j = 0; j < n; j++)
            if (j / shape.rows % 2 != 0) spoiled.host[j * k + j % k] = NAN;
        op_upload(&spoiled);
        args.w = spoiled.dev;
        args.y = y.dev;
        expect_ok(rf_gemm_stream_force(test_stream(), &args, config, &err));
        op_download(&y);
        for (int64_t i = 0; i < m * n; i++) {
            bool nan = i % n / shape.rows % 2 != 0;
            ck_assert_msg(nan ? isnan(y.host[i]) != 0 : y.host[i] == clean.host[i], "%s: row %d column %d is %g",
                          rf_gemm_stream_config_name(config), (int)(i / n), (int)(i % n), (double)y.host[i]);
        }
    }
    ck_assert_int_ge(num_run, 12);
}
END_TEST

START_TEST(the_default_is_taken_for_constant_weights_only) {
    if (!is_hopper()) return;
    operand x = op_normal(BF16, 64, 0, 1); /* alignment is all that is looked at */
    static const int64_t shapes[][2] = {{12288, 4096}, {4096, 4096},  {24576, 4096}, {4096, 12288},
                                        {6144, 4096},  {28672, 4096}, {3584, 18944}, {126464, 4096}};
    static const int64_t rows[] = {5, 16, 32, 64};
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
            rf_gemm_args args = rf_gemm_args_default(BF16, rows[r], shapes[s][0], shapes[s][1]);
            rf_gemm_stream_shape shape;
            args.x = args.w = args.y = x.dev;
            ck_assert_int_eq(rf_gemm_stream_default(test_stream(), &args), -1);
            args.w_is_constant = true;
            int config = rf_gemm_stream_default(test_stream(), &args);
            if (config < 0) { /* a card with fewer multiprocessors, or shared with others */
                printf("no default of %lldx%lldx%lld\n", (long long)args.m, (long long)args.n, (long long)args.k);
                continue;
            }
            expect_ok(rf_gemm_stream_get_shape(test_stream(), &args, config, &shape, &err));
            printf("default of %lldx%lldx%lld: %s, %d tiles of %d rows, %d blocks, %d stages of %d, %zu bytes\n",
                   (long long)args.m, (long long)args.n, (long long)args.k, rf_gemm_stream_config_name(config),
                   shape.num_tiles, shape.rows, shape.num_blocks, shape.num_stages, shape.stage_columns,
                   shape.shared_bytes);
            ck_assert_int_le(shape.num_blocks, shape.resident * shape.split);
            ck_assert_int_ge(shape.num_tiles * shape.rows, (int)args.n);
            args.m = 65;
            ck_assert_int_eq(rf_gemm_stream_default(test_stream(), &args), -1);
        }
    }
    rf_gemm_args args = rf_gemm_args_default(BF16, 20, 4104, 4096);
    args.x = args.w = args.y = x.dev;
    args.w_is_constant = true;
    int config = rf_gemm_stream_default(test_stream(), &args);
    if (config >= 0) few_check_default(&streamed, config, 20, 4104, 4096);
    args.n = 1024;
    ck_assert_int_eq(rf_gemm_stream_default(test_stream(), &args), -1); /* small weights */
}
END_TEST

START_TEST(what_it_does_not_take_is_refused) {
    if (!is_hopper()) return;
    operand x = op_normal(BF16, 64 * 64, 0, 1), y = op_poison(BF16, 64 * 64);
    rf_gemm_args good = rf_gemm_args_default(BF16, 64, 64, 64);
    good.x = x.dev;
    good.w = x.dev;
    good.y = y.dev;
    rf_error ok = {0};
    ck_assert_msg(rf_gemm_stream_check(test_stream(), &good, 0, &ok) == RF_OK, "%s", ok.message);
#define REFUSED(status, change)                                                                                        \
    do {                                                                                                               \
        rf_gemm_args g = good;                                                                                         \
        change;                                                                                                        \
        expect_status(rf_gemm_stream_force(test_stream(), &g, 0, &err), status);                                       \
    } while (0)
    REFUSED(RF_ERR_UNSUPPORTED, g.w_is_kn = true);
    REFUSED(RF_ERR_UNSUPPORTED, g.num_batches = 2);
    REFUSED(RF_ERR_UNSUPPORTED, g.act = RF_ACT_GELU_ERF);
    REFUSED(RF_ERR_DTYPE, g.dtype = RF_DTYPE_F32);
    REFUSED(RF_ERR_SHAPE, g.m = 0);
    REFUSED(RF_ERR_SHAPE, g.m = 65);
    REFUSED(RF_ERR_SHAPE, g.n = 60);
    REFUSED(RF_ERR_SHAPE, g.k = 60);
    REFUSED(RF_ERR_SHAPE, g.ldx = 68);
    REFUSED(RF_ERR_ARGUMENT, g.x = (const char *)x.dev + 8);
    REFUSED(RF_ERR_ARGUMENT, (g.y0 = (const char *)x.dev + 8, g.beta = 1));
#undef REFUSED
    expect_status(rf_gemm_stream_force(test_stream(), &good, -1, &err), RF_ERR_ARGUMENT);
    expect_status(rf_gemm_stream_force(test_stream(), &good, rf_gemm_stream_num_configs(), &err), RF_ERR_ARGUMENT);
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("gemm_stream");
    TCase *tc = kernel_tcase(suite, "configs");
    tcase_add_loop_test(tc, every_config_agrees_with_double, 0, (int)(sizeof cases / sizeof cases[0]));
    tcase_add_test(tc, rows_of_w_do_not_mix);
    tc = kernel_tcase(suite, "chains");
    tcase_add_loop_test(tc, a_captured_chain_gives_the_bits_of_single_steps, 0, 6);
    tc = kernel_tcase(suite, "operator");
    tcase_add_test(tc, the_default_is_taken_for_constant_weights_only);
    tcase_add_test(tc, what_it_does_not_take_is_refused);
    return run_kernel_suite(suite);
}
