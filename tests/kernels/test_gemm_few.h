/* tests/kernels/test_gemm_few.h - what test_gemv.c and test_gemm_stream.c share: every config of an own kernel for few
 * rows against sums in double, the same bits every time, and chains in a graph, where each GEMM's x is the y of a
 * kernel that has not ended when it starts. */
#ifndef RF_TESTS_KERNELS_TEST_GEMM_FEW_H
#define RF_TESTS_KERNELS_TEST_GEMM_FEW_H

#include "harness.h"

#define GUARD 64 /* elements behind y */

/* The functions of an own kernel's header. */
typedef struct {
    int (*num_configs)(void);
    const char *(*config_name)(int config);
    rf_status (*check)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
    rf_status (*force)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
    double f32_bound; /* relative L2 of f32 results without an act: tensor cores cut off where they add */
} few_kernel;

typedef enum { ADD_NONE, ADD_Y0, ADD_IN_PLACE } few_addend;

typedef struct {
    int64_t m, n, k;
    rf_act act;
    bool bias;
    few_addend addend;
    rf_dtype y_dtype;
    int pad; /* extra elements between rows of every operand */
    float alpha, beta;
    int min_configs; /* that must take it */
} few_case;

/* act(alpha x w^T + bias) + beta y0 where the GEMM writes, the old value elsewhere. */
static void few_reference(double *want, const few_case *c, const rf_gemm_args *g, const operand *x, const operand *w,
                          const operand *bias, const operand *y0, size_t num_y) {
    for (size_t i = 0; i < num_y; i++) want[i] = c->addend == ADD_IN_PLACE ? (double)y0->host[i] : NAN;
    for (int64_t i = 0; i < c->m; i++) {
        for (int64_t j = 0; j < c->n; j++) {
            const float *xi = x->host + i * g->ldx, *wj = w->host + j * g->ldw;
            double sum = 0;
            for (int64_t l = 0; l < c->k; l++) sum += (double)xi[l] * (double)wj[l];
            size_t at = (size_t)(i * g->ldy + j);
            double u = ref_act((double)c->alpha * sum + (c->bias ? (double)bias->host[j] : 0), c->act);
            want[at] = u + (c->addend != ADD_NONE ? (double)c->beta * (double)y0->host[at] : 0);
        }
    }
}

static void few_check_case(const few_kernel *kernel, const few_case *c) {
    size_t num_y = (size_t)(c->m * (c->n + c->pad)) + GUARD;
    operand x = op_normal(RF_DTYPE_BF16, (size_t)(c->m * (c->k + c->pad)), 0, 1);
    operand w = op_normal(RF_DTYPE_BF16, (size_t)(c->n * (c->k + c->pad)), 0, 1 / sqrt((double)c->k));
    operand bias = op_normal(c->y_dtype, (size_t)c->n, 0, 1), y0 = op_normal(c->y_dtype, num_y, 0, 1);
    operand y = op_poison(c->y_dtype, num_y);
    double *want = host_doubles(num_y);
    float *first = rf_alloc(num_y * sizeof *first);
    ck_assert_ptr_nonnull(first);

    rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, c->m, c->n, c->k);
    args.x = x.dev;
    args.w = w.dev;
    args.bias = c->bias ? bias.dev : NULL;
    args.y = y.dev;
    args.y0 = c->addend == ADD_NONE ? NULL : c->addend == ADD_Y0 ? y0.dev : y.dev;
    args.y_dtype = c->y_dtype;
    args.act = c->act;
    args.alpha = c->alpha;
    args.beta = c->beta;
    args.ldx = args.ldw = c->k + c->pad;
    args.ldy = c->n + c->pad;
    few_reference(want, c, &args, &x, &w, &bias, &y0, num_y);

    /* bf16: one rounding of the result. f32: only the inputs were rounded, and the reference saw that; an act takes the
     * hardware's exponential. */
    double bound = c->y_dtype == RF_DTYPE_BF16 ? 3e-3 : c->act == RF_ACT_NONE ? kernel->f32_bound : 1e-4;
    int num_run = 0;
    for (int config = 0; config < kernel->num_configs(); config++) {
        rf_error err = {0};
        const char *name = kernel->config_name(config);
        if (kernel->check(test_stream(), &args, config, &err) != RF_OK) {
            ck_assert_msg(err.message[0] != 0, "%s: refused without a message", name);
            continue;
        }
        num_run++;
        for (int run = 0; run < 8; run++) {
            for (size_t i = 0; i < num_y; i++) y.host[i] = c->addend == ADD_IN_PLACE ? y0.host[i] : NAN;
            op_upload(&y);
            args.w_is_constant = run % 2 == 0;
            int again = c->addend == ADD_IN_PLACE ? 0 : run % 3; /* over itself, too */
            for (int i = 0; i <= again; i++)
                ck_assert_msg(kernel->force(test_stream(), &args, config, &err) == RF_OK, "%s: %s", name, err.message);
            if (run == 0)
                expect_close(&y, want, bound, name, "m %d n %d k %d act %d%s addend %d %s pad %d", (int)c->m, (int)c->n,
                             (int)c->k, (int)c->act, c->bias ? " bias" : "", (int)c->addend, rf_dtype_name(c->y_dtype),
                             c->pad);
            else
                op_download(&y);
            if (run == 0)
                memcpy(first, y.host, num_y * sizeof *first);
            else
                ck_assert_msg(memcmp(first, y.host, num_y * sizeof *first) == 0, "%s m %d n %d k %d: run %d differs",
                              name, (int)c->m, (int)c->n, (int)c->k, run);
        }
    }
    ck_assert_msg(num_run >= c->min_configs, "%d configs take %lldx%lldx%lld, wanted %d", num_run, (long long)c->m,
                  (long long)c->n, (long long)c->k, c->min_configs);
    rf_free(first);
}

/* --- chains ----------------------------------------------------------------------------------------------------------
 * */

#define CHAIN_LAYERS 3
#define CHAIN_WIDTH  1024
#define CHAIN_HIDDEN 4096

typedef struct {
    int64_t m;
    bool with_norms; /* kernels that also start early, but let the next one go only when they run themselves */
    operand wide, narrow, normed, input[2], want[2], w[2 * CHAIN_LAYERS], bias;
} few_chain;

/* narrow += w1 silu(w0 narrow), layer by layer: in place, so that every y is also a buffer the kernel before read from.
 * */
static rf_status few_queue_chain(const few_kernel *kernel, few_chain *c, int config, bool constant, bool wait,
                                 rf_error *err) {
    rf_status st = RF_OK;
    for (int i = 0; i < 2 * CHAIN_LAYERS && st == RF_OK; i++) {
        bool up = i % 2 == 0;
        rf_gemm_args g =
            rf_gemm_args_default(RF_DTYPE_BF16, c->m, up ? CHAIN_HIDDEN : CHAIN_WIDTH, up ? CHAIN_WIDTH : CHAIN_HIDDEN);
        g.x = up ? (c->with_norms ? c->normed.dev : c->narrow.dev) : c->wide.dev;
        g.w = c->w[i].dev;
        g.bias = c->bias.dev;
        g.y = up ? c->wide.dev : c->narrow.dev;
        g.act = up ? RF_ACT_SILU : RF_ACT_NONE;
        g.y0 = up ? NULL : c->narrow.dev;
        g.beta = up ? 0.0f : 1.0f;
        g.w_is_constant = constant;
        if (up && c->with_norms) {
            rf_norm_args n = {.x = c->narrow.dev,
                              .y = c->normed.dev,
                              .x_dtype = RF_DTYPE_BF16,
                              .y_dtype = RF_DTYPE_BF16,
                              .num_rows = c->m,
                              .cols = CHAIN_WIDTH,
                              .eps = 1e-6f,
                              .shift = -1,
                              .scale = -1};
            st = test_ops()->norm(test_stream(), &n, err);
        }
        if (st == RF_OK && wait) st = rf_stream_synchronize(test_stream(), err);
        if (st == RF_OK) st = kernel->force(test_stream(), &g, config, err);
        if (st == RF_OK && wait) st = rf_stream_synchronize(test_stream(), err);
    }
    return st;
}

static bool few_chain_is_taken(const few_kernel *kernel, int64_t m, const void *any, int config) {
    for (int up = 0; up < 2; up++) {
        rf_gemm_args g =
            rf_gemm_args_default(RF_DTYPE_BF16, m, up ? CHAIN_HIDDEN : CHAIN_WIDTH, up ? CHAIN_WIDTH : CHAIN_HIDDEN);
        g.x = g.w = any;
        if (kernel->check(test_stream(), &g, config, NULL) != RF_OK) return false;
    }
    return true;
}

static void few_check_chain(const few_kernel *kernel, int64_t m, bool with_norms) {
    few_chain c = {.m = m, .with_norms = with_norms};
    size_t num = (size_t)(m * CHAIN_WIDTH);
    c.wide = op_poison(RF_DTYPE_BF16, (size_t)(m * CHAIN_HIDDEN));
    c.narrow = op_poison(RF_DTYPE_BF16, num);
    c.normed = op_poison(RF_DTYPE_BF16, num);
    c.bias = op_normal(RF_DTYPE_BF16, CHAIN_HIDDEN, 0, 0.1);
    for (int i = 0; i < 2 * CHAIN_LAYERS; i++)
        c.w[i] = op_normal(RF_DTYPE_BF16, CHAIN_WIDTH * CHAIN_HIDDEN, 0,
                           1 / sqrt((double)(i % 2 == 0 ? CHAIN_WIDTH : CHAIN_HIDDEN)));
    for (int i = 0; i < 2; i++) {
        c.input[i] = op_normal(RF_DTYPE_BF16, num, 0, 1);
        c.want[i] = op_poison(RF_DTYPE_BF16, num);
    }
    int num_run = 0;
    for (int config = 0; config < kernel->num_configs(); config++) {
        rf_error why = {0};
        const char *name = kernel->config_name(config);
        if (!few_chain_is_taken(kernel, m, c.w[0].dev, config)) continue;
        num_run++;
        for (int i = 0; i < 2; i++) {
            expect_ok(rf_stream_copy(test_stream(), c.narrow.dev, c.input[i].dev, num * 2, &err));
            expect_ok(few_queue_chain(kernel, &c, config, false, true, &err));
            expect_ok(rf_stream_copy(test_stream(), c.want[i].dev, c.narrow.dev, num * 2, &err));
            op_download(&c.want[i]);
            for (size_t e = 0; e < num; e++) ck_assert(isfinite(c.want[i].host[e]));
        }
        ck_assert_int_ne(memcmp(c.want[0].host, c.want[1].host, num * sizeof(float)), 0);

        rf_graph *graph = NULL;
        ck_assert_msg(rf_graph_begin(test_stream(), &why) == RF_OK, "%s", why.message);
        rf_status st = few_queue_chain(kernel, &c, config, true, false, &why);
        rf_status end = rf_graph_end(&graph, test_stream(), &why);
        ck_assert_msg(st == RF_OK && end == RF_OK, "%s: %s", name, why.message);
        for (int run = 0; run < 50; run++) {
            const operand *expected = &c.want[run & 1];
            st = rf_stream_zero(test_stream(), c.wide.dev, c.wide.num * 2, &why); /* what an early reader would find */
            if (st == RF_OK) st = rf_stream_zero(test_stream(), c.normed.dev, num * 2, &why);
            if (st == RF_OK) st = rf_stream_copy(test_stream(), c.narrow.dev, c.input[run & 1].dev, num * 2, &why);
            if (st == RF_OK && run % 3 == 2) /* not captured, still early */
                st = few_queue_chain(kernel, &c, config, true, false, &why);
            else if (st == RF_OK)
                st = rf_graph_launch(graph, test_stream(), &why);
            ck_assert_msg(st == RF_OK, "%s: %s", name, why.message);
            op_download(&c.narrow);
            ck_assert_msg(memcmp(c.narrow.host, expected->host, num * sizeof(float)) == 0,
                          "chain %s m %d: run %d differs from single steps", name, (int)m, run);
        }
        rf_graph_destroy(graph);
    }
    ck_assert_msg(num_run > 0, "no config takes the chain at m %d", (int)m);
}

/* The operator gives the bits of the forced config for weights that are constant. */
static void few_check_default(const few_kernel *kernel, int config, int64_t m, int64_t n, int64_t k) {
    operand x = op_normal(RF_DTYPE_BF16, (size_t)(m * k), 0, 1);
    operand w = op_normal(RF_DTYPE_BF16, (size_t)(n * k), 0, 1 / sqrt((double)k));
    operand y = op_poison(RF_DTYPE_BF16, (size_t)(m * n)), want = op_poison(RF_DTYPE_BF16, (size_t)(m * n));
    rf_gemm_args args = rf_gemm_args_default(RF_DTYPE_BF16, m, n, k);
    args.x = x.dev;
    args.w = w.dev;
    args.y = want.dev;
    args.w_is_constant = true;
    expect_ok(kernel->force(test_stream(), &args, config, &err));
    args.y = y.dev;
    expect_ok(test_ops()->gemm(test_stream(), &args, &err));
    expect_same_bits(&y, &want, "gemm", "default, m %d n %d k %d", (int)m, (int)n, (int)k);
}

#endif
