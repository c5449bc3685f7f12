/* tests/kernels/test_gemm_skinny.c - the library's own Hopper GEMM for few rows: every config against the operator, twenty
 * times the same bits, and chains in a graph, where each GEMM's x is the y of a kernel that has not ended when it starts. */
#include "harness.h"

#include "kernels/gemm_skinny.h"

#define GUARD 64 /* elements behind y */

typedef struct {
    int64_t m, n, k;
    rf_act act;
    bool bias;
    rf_dtype y_dtype;
    int pad; /* extra elements between rows of every operand */
    float alpha;
} skinny_case;

static const skinny_case cases[] = {
    /* one stage; the four layers of a world model's frame */
    {16, 64, 64, RF_ACT_NONE, false, RF_DTYPE_F32, 0, 1},
    {144, 3072, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {144, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {144, 4096, 1024, RF_ACT_GELU_TANH, true, RF_DTYPE_BF16, 0, 1},
    {144, 1024, 4096, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {144, 1024, 4096, RF_ACT_NONE, false, RF_DTYPE_F32, 0, 1},
    /* every width of the token tile, full and with a last row missing */
    {1, 1024, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {15, 256, 512, RF_ACT_SILU, true, RF_DTYPE_F32, 0, 1},
    {32, 256, 1024, RF_ACT_SILU, true, RF_DTYPE_BF16, 0, 1},
    {31, 256, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {48, 512, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {64, 512, 512, RF_ACT_GELU_TANH, true, RF_DTYPE_F32, 0, 1},
    {72, 512, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {95, 512, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {96, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {127, 512, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {143, 512, 576, RF_ACT_NONE, true, RF_DTYPE_F32, 0, 1},
    {160, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {192, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {255, 512, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {288, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {320, 1024, 1024, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {511, 256, 512, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    /* ragged n and k, row strides, alpha; k that goes round the ring */
    {37, 136, 1032, RF_ACT_GELU_TANH, true, RF_DTYPE_BF16, 8, 1},
    {144, 72, 600, RF_ACT_NONE, true, RF_DTYPE_F32, 16, 0.5f},
    {100, 1000, 520, RF_ACT_SILU, false, RF_DTYPE_BF16, 8, 1},
    {24, 4096, 12288, RF_ACT_NONE, true, RF_DTYPE_BF16, 0, 1},
    {200, 256, 8192, RF_ACT_NONE, true, RF_DTYPE_F32, 0, 1},
};

static bool is_hopper(void) {
    return test_is_cuda() && rf_backend_sm(test_backend()) == 90;
}

static rf_gemm_args make_args(const skinny_case *c, const operand *x, const operand *w, const operand *bias) {
    rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, c->m, c->n, c->k);
    args.x = x->dev;
    args.w = w->dev;
    args.bias = c->bias ? bias->dev : NULL;
    args.y_dtype = c->y_dtype;
    args.act = c->act;
    args.alpha = c->alpha;
    args.ldx = args.ldw = c->k + c->pad;
    args.ldy = c->n + c->pad;
    return args;
}

static void force(const rf_gemm_args *args, int config) {
    rf_error err = {0};
    ck_assert_msg(rf_gemm_skinny_force(test_stream(), args, config, &err) == RF_OK, "%s: %s",
                  rf_gemm_skinny_config_name(config), err.message);
}

START_TEST(every_config_agrees_with_the_operator) {
    if (!is_hopper()) return;
    const skinny_case *c = &cases[_i];
    size_t num_y = (size_t)(c->m * (c->n + c->pad)) + GUARD;
    operand x = op_normal(RF_DTYPE_BF16, (size_t)(c->m * (c->k + c->pad)), 0, 1);
    operand w = op_normal(RF_DTYPE_BF16, (size_t)(c->n * (c->k + c->pad)), 0, 1 / sqrt((double)c->k));
    operand bias = op_normal(c->y_dtype, (size_t)c->n, 0, 1), want = op_poison(c->y_dtype, num_y);
    operand y = op_poison(c->y_dtype, num_y);
    float *first = rf_alloc(num_y * sizeof *first);
    ck_assert_ptr_nonnull(first);
    rf_gemm_args args = make_args(c, &x, &w, &bias);
    args.y = want.dev;
    expect_ok(test_ops()->gemm(test_stream(), &args, &err));
    op_download(&want);
    args.y = y.dev;
    int num_run = 0;
    for (int config = 0; config < rf_gemm_skinny_num_configs(); config++) {
        rf_error err = {0};
        const char *name = rf_gemm_skinny_config_name(config);
        if (rf_gemm_skinny_check(test_stream(), &args, config, &err) != RF_OK) {
            ck_assert_msg(err.message[0] != 0, "%s: refused without a message", name);
            continue; /* too many rows, k too short for the split, or no different from another config */
        }
        num_run++;
        for (int run = 0; run < 20; run++) {
            for (size_t i = 0; i < num_y; i++) y.host[i] = NAN;
            op_upload(&y);
            args.w_is_constant = run % 2 == 0;
            for (int again = 0; again <= run % 3; again++) force(&args, config); /* over itself, too */
            op_download(&y);
            if (run == 0)
                memcpy(first, y.host, num_y * sizeof *first);
            else
                ck_assert_msg(memcmp(first, y.host, num_y * sizeof *first) == 0, "%s: run %d differs", name, run);
        }
        double diff = 0, norm = 0, worst_abs = -1;
        size_t worst = 0, ldy = (size_t)args.ldy;
        for (size_t i = 0; i < num_y; i++) {
            if (i / ldy >= (size_t)c->m || i % ldy >= (size_t)c->n) {
                ck_assert_msg(isnan(y.host[i]), "%s: wrote outside y, at element %zu", name, i);
                continue;
            }
            double d = fabs((double)y.host[i] - want.host[i]);
            if (!(d <= worst_abs)) {
                worst_abs = d;
                worst = i;
            }
            diff += d * d;
            norm += (double)want.host[i] * want.host[i];
        }
        double rel = sqrt(diff / norm);
        /* bf16: both round the same f32 sums once; unfused activations of the operator round twice. f32: its fused GELU is
         * 1e-5 off. */
        ck_assert_msg(rel <= (c->y_dtype == RF_DTYPE_F32 ? 1e-4 : 5e-3),
                      "%lldx%lldx%lld %s: relative L2 %g, worst at row %zu column %zu: %g, want %g", (long long)c->m,
                      (long long)c->n, (long long)c->k, name, rel, worst / ldy, worst % ldy, (double)y.host[worst],
                      (double)want.host[worst]);
    }
    ck_assert_msg(num_run > 0, "no config takes %lldx%lldx%lld", (long long)c->m, (long long)c->n, (long long)c->k);
    rf_free(first);
}
END_TEST

/* --- chains ---------------------------------------------------------------------------------------------------------- */

#define ROWS   144
#define WIDTH  1024
#define LAYERS 6

typedef struct {
    rf_gemm_args gemms[LAYERS * 4];
    rf_norm_args norms[LAYERS];
    bool with_norms; /* kernels that also start early, but release the next one only at their end */
    int configs[4];
} chain;

/* qkv, out (of qkv's first third), fc1, fc2; one set of buffers for all layers, so that every y is also a buffer some earlier
 * kernel read from. */
static rf_status queue_chain(const chain *c, bool constant, bool wait, rf_error *err) {
    rf_status st = RF_OK;
    for (int i = 0; i < LAYERS * 4 && st == RF_OK; i++) {
        rf_gemm_args args = c->gemms[i];
        args.w_is_constant = constant;
        if (c->with_norms && i % 4 == 0) st = test_ops()->norm(test_stream(), &c->norms[i / 4], err);
        if (st == RF_OK && wait) st = rf_stream_synchronize(test_stream(), err);
        if (st == RF_OK) st = rf_gemm_skinny_force(test_stream(), &args, c->configs[i % 4], err);
        if (st == RF_OK && wait) st = rf_stream_synchronize(test_stream(), err);
    }
    return st;
}

static int config_named(const char *name) {
    int config = 0;
    while (strcmp(rf_gemm_skinny_config_name(config), name) != 0) config++;
    return config;
}

/* config -1: the default of each shape, or r64k4 where cuBLASLt is the default. input and want: two of each; at: y of each GEMM. */
static void run_chain(chain *c, int config, const operand *input, operand *want, operand *at) {
    rf_error why = {0};
    const char *name = config < 0 ? "default" : rf_gemm_skinny_config_name(config);
    bool taken = true;
    for (int g = 0; g < 4; g++) {
        rf_gemm_args args = c->gemms[g];
        args.w_is_constant = true;
        c->configs[g] = config < 0 ? rf_gemm_skinny_default(test_stream(), &args) : config;
        if (c->configs[g] < 0) c->configs[g] = config_named("r64k4");
        if (rf_gemm_skinny_check(test_stream(), &args, c->configs[g], &why) == RF_OK) continue;
        if (config >= 0 && strchr(name, 'h') != NULL) { /* no narrower than another config here */
            char wide[16];
            snprintf(wide, sizeof wide, "%.*s", (int)(strlen(name) - 1), name);
            c->configs[g] = config_named(wide);
        } else {
            taken = false;
        }
    }
    if (!taken) {
        printf("chain %s: %s\n", name, why.message);
        return;
    }
    for (int i = 0; i < 2; i++) {
        expect_ok(rf_stream_copy(test_stream(), at[3].dev, input[i].dev, ROWS * WIDTH * 2, &err));
        expect_ok(queue_chain(c, false, true, &err));
        expect_ok(rf_stream_copy(test_stream(), want[i].dev, at[3].dev, ROWS * WIDTH * 2, &err));
        op_download(&want[i]);
        for (size_t e = 0; e < want[i].num; e++) ck_assert(isfinite(want[i].host[e]));
    }
    ck_assert_int_ne(memcmp(want[0].host, want[1].host, want[0].num * sizeof(float)), 0);

    rf_graph *graph = NULL;
    ck_assert_msg(rf_graph_begin(test_stream(), &why) == RF_OK, "%s", why.message);
    rf_status st = queue_chain(c, true, false, &why);
    rf_status end = rf_graph_end(&graph, test_stream(), &why);
    ck_assert_msg(st == RF_OK && end == RF_OK, "%s: %s", name, why.message);
    for (int run = 0; run < (config < 0 ? 100 : 20); run++) {
        operand *expected = &want[run & 1];
        for (int g = 0; g < 3; g++) /* what an early reader would find */
            st = st == RF_OK ? rf_stream_zero(test_stream(), at[g].dev, at[g].num * 2, &why) : st;
        if (st == RF_OK) st = rf_stream_copy(test_stream(), at[3].dev, input[run & 1].dev, ROWS * WIDTH * 2, &why);
        if (st == RF_OK && run % 3 == 2) /* not captured, still early */
            st = queue_chain(c, true, false, &why);
        else if (st == RF_OK)
            st = rf_graph_launch(graph, test_stream(), &why);
        ck_assert_msg(st == RF_OK, "%s: %s", name, why.message);
        op_download(&at[3]);
        ck_assert_msg(memcmp(at[3].host, expected->host, expected->num * sizeof(float)) == 0,
                      "chain %s: run %d differs from single steps", name, run);
    }
    rf_graph_destroy(graph);
}

/* Plain, with norms between; the default configs, then every config that takes all four shapes. */
START_TEST(a_captured_chain_gives_the_bits_of_single_steps) {
    if (!is_hopper()) return;
    static const int64_t n_of[4] = {3 * WIDTH, WIDTH, 4 * WIDTH, WIDTH}, k_of[4] = {WIDTH, WIDTH, WIDTH, 4 * WIDTH};
    operand input[2], want[2], at[4]; /* at[i]: y of GEMM i; at[3] is also the next layer's x */
    operand normed = op_poison(RF_DTYPE_BF16, ROWS * WIDTH), w[4], bias = op_normal(RF_DTYPE_BF16, 4 * WIDTH, 0, 0.1);
    chain c = {.with_norms = _i & 1};
    for (int i = 0; i < 2; i++) {
        input[i] = op_normal(RF_DTYPE_BF16, ROWS * WIDTH, 0, 1);
        want[i] = op_poison(RF_DTYPE_BF16, ROWS * WIDTH);
    }
    for (int g = 0; g < 4; g++) {
        at[g] = op_poison(RF_DTYPE_BF16, (size_t)(ROWS * n_of[g]));
        w[g] = op_normal(RF_DTYPE_BF16, (size_t)(LAYERS * n_of[g] * k_of[g]), 0, 1.2 / sqrt((double)k_of[g]));
    }
    for (int i = 0; i < LAYERS * 4; i++) {
        int g = i % 4;
        rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, ROWS, n_of[g], k_of[g]);
        args.x = g == 0 && c.with_norms ? normed.dev : at[(g + 3) % 4].dev;
        if (g == 1) args.ldx = 3 * WIDTH;
        args.w = (const char *)w[g].dev + (size_t)(i / 4 * n_of[g] * k_of[g]) * 2;
        args.bias = bias.dev;
        args.y = at[g].dev;
        args.act = g == 2 ? RF_ACT_GELU_TANH : RF_ACT_NONE;
        c.gemms[i] = args;
        c.norms[i / 4] = (rf_norm_args){.x = at[3].dev,
                                        .y = normed.dev,
                                        .x_dtype = RF_DTYPE_BF16,
                                        .y_dtype = RF_DTYPE_BF16,
                                        .num_rows = ROWS,
                                        .cols = WIDTH,
                                        .eps = 1e-6f,
                                        .shift = -1,
                                        .scale = -1};
    }
    for (int config = -1; config < rf_gemm_skinny_num_configs(); config++) run_chain(&c, config, input, want, at);
}
END_TEST

/* --- the operator's choice ------------------------------------------------------------------------------------------- */

START_TEST(the_default_is_taken_for_constant_weights_only) {
    if (!is_hopper()) return;
    int64_t m = 137, n = 1024, k = 4096; /* a shape no other test plans */
    operand x = op_normal(RF_DTYPE_BF16, (size_t)(m * k), 0, 1), w = op_normal(RF_DTYPE_BF16, (size_t)(n * k), 0, 0.03);
    operand y = op_poison(RF_DTYPE_BF16, (size_t)(m * n)), want = op_poison(RF_DTYPE_BF16, (size_t)(m * n));
    rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, m, n, k);
    args.x = x.dev;
    args.w = w.dev;
    args.y = want.dev;
    ck_assert_int_eq(rf_gemm_skinny_default(test_stream(), &args), -1);
    args.w_is_constant = true;
    int config = rf_gemm_skinny_default(test_stream(), &args);
    printf("default of %lldx%lldx%lld: %s\n", (long long)m, (long long)n, (long long)k,
           config < 0 ? "none" : rf_gemm_skinny_config_name(config));
    if (config < 0) return; /* a card with fewer multiprocessors, or shared with others */
    force(&args, config);
    args.y = y.dev;
    expect_ok(test_ops()->gemm(test_stream(), &args, &err));
    expect_same_bits(&y, &want, "gemm", "default");
    args.m = 1024;
    ck_assert_int_eq(rf_gemm_skinny_default(test_stream(), &args), -1);
}
END_TEST

START_TEST(what_it_does_not_take_is_refused) {
    if (!is_hopper()) return;
    operand x = op_normal(RF_DTYPE_BF16, 64 * 64, 0, 1), y = op_poison(RF_DTYPE_BF16, 64 * 64);
    rf_gemm_args good = rf_gemm_args_default(RF_DTYPE_BF16, 64, 64, 64);
    good.x = x.dev;
    good.w = x.dev;
    good.y = y.dev;
    rf_error ok = {0};
    ck_assert_msg(rf_gemm_skinny_check(test_stream(), &good, 0, &ok) == RF_OK, "%s", ok.message);
#define REFUSED(status, change)                                                                                        \
    do {                                                                                                               \
        rf_gemm_args g = good;                                                                                         \
        change;                                                                                                        \
        expect_status(rf_gemm_skinny_force(test_stream(), &g, 0, &err), status);                                       \
    } while (0)
    REFUSED(RF_ERR_UNSUPPORTED, g.w_is_kn = true);
    REFUSED(RF_ERR_UNSUPPORTED, g.num_batches = 2);
    REFUSED(RF_ERR_UNSUPPORTED, (g.y0 = x.dev, g.beta = 1));
    REFUSED(RF_ERR_UNSUPPORTED, g.act = RF_ACT_GELU_ERF);
    REFUSED(RF_ERR_DTYPE, g.dtype = RF_DTYPE_F32);
    REFUSED(RF_ERR_SHAPE, g.m = 0);
    REFUSED(RF_ERR_SHAPE, g.m = 513);
    REFUSED(RF_ERR_SHAPE, g.n = 60);
    REFUSED(RF_ERR_SHAPE, g.k = 60);
    REFUSED(RF_ERR_SHAPE, g.ldx = 68);
    REFUSED(RF_ERR_ARGUMENT, g.x = (const char *)x.dev + 8);
#undef REFUSED
    expect_status(rf_gemm_skinny_force(test_stream(), &good, -1, &err), RF_ERR_ARGUMENT);
    expect_status(rf_gemm_skinny_force(test_stream(), &good, rf_gemm_skinny_num_configs(), &err), RF_ERR_ARGUMENT);
    expect_status(rf_gemm_skinny_force(test_stream(), &good, 1, &err), RF_ERR_SHAPE); /* one k block cannot be split */
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("gemm_skinny");
    TCase *tc = kernel_tcase(suite, "configs");
    tcase_add_loop_test(tc, every_config_agrees_with_the_operator, 0, (int)(sizeof cases / sizeof cases[0]));
    tc = kernel_tcase(suite, "chains");
    tcase_add_loop_test(tc, a_captured_chain_gives_the_bits_of_single_steps, 0, 2);
    tc = kernel_tcase(suite, "operator");
    tcase_add_test(tc, the_default_is_taken_for_constant_weights_only);
    tcase_add_test(tc, what_it_does_not_take_is_refused);
    return run_kernel_suite(suite);
}
