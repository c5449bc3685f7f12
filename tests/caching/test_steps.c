/* tests/caching/test_steps.c - predictors, and the step-level policies: published schedules, never skipping, the drift
 * guard's force, every option's effect. */
#include "tests/test_util.h"

#include "tests/caching/sim.h"

#define NUM_POLICIES 6
static const char *const step_policies[NUM_POLICIES] = {"interval", "teacache", "easycache",
                                                        "magcache", "spectrum", "adacache"};

/* Options with which each of them skips on the signals of `busy`. */
static const char *const skipping[NUM_POLICIES] = {
    "interval=4",     "threshold=0.3,first=2", "threshold=0.25,first=4", "threshold=0.3,table=hunyuan",
    "first=3,last=1", "codebook=long"};

/* Signals that differ by step, signal and branch; x moves more than it matters. */
static void busy(void *user, int step, rf_signal signal, float out[2][4]) {
    for (int b = 0; b < 2; b++) {
        double rel = 0.02 + 0.1 * sim_noise(7, step, (int)signal, b);
        out[b][0] = (float)rel;
        out[b][1] = 1;
        out[b][2] = (float)(rel * rel);
        out[b][3] = 1;
    }
    if (signal == RF_SIGNAL_OUTPUT_SIZE) out[0][0] = out[1][0] = 1;
}

static sim_options busy_run(const char *policy, const char *options) {
    return (sim_options){.policy = policy, .options = options, .measure = busy};
}

/* ---- predictors ---- */

static double predicted(const float *w, int num, const int *stored, double (*f)(double)) {
    double sum = 0;
    for (int j = 0; j < num; j++) sum += (double)w[j] * f(stored[j]);
    return sum;
}

static double constant(double s) {
    return 3 + 0 * s;
}
static double linear(double s) {
    return 5 - 0.5 * s;
}
static double square(double s) {
    return s * s;
}
static double cubic(double s) {
    return 0.01 * s * s * s - s;
}

START_TEST(predictors_reuse_a_constant_exactly) {
    const int stored[] = {17, 14, 9, 8, 2};
    float w[RF_CACHE_MAX_TERMS];
    for (int num = 1; num <= 5; num++) {
        for (int order = 0; order <= 4; order++) {
            for (int k = 1; k <= 6; k++) {
                int terms = num < order + 1 ? num : order + 1;
                ck_assert_int_eq(rf_predict_taylor(w, stored, num, 17 + k, order), terms);
                ck_assert_double_eq_tol(predicted(w, terms, stored, constant), 3, 1e-4);
                ck_assert_int_eq(rf_predict_newton(w, stored, num, 17 + k, order), terms);
                ck_assert_double_eq_tol(predicted(w, terms, stored, constant), 3, 1e-3);
                ck_assert_int_eq(rf_predict_hermite(w, stored, num, 17 + k, order, 0.5), terms);
                ck_assert_double_eq_tol(predicted(w, terms, stored, constant), 3, 1e-4);
            }
        }
    }
    ck_assert_int_eq(rf_predict_reuse(w), 1);
    ck_assert(w[0] == 1);
    ck_assert_int_eq(rf_predict_taylor(w, stored, 0, 3, 1), 0);
    ck_assert_int_eq(rf_predict_newton(w, stored, 0, 3, 1), 0);
    ck_assert_int_eq(rf_predict_hermite(w, stored, 0, 3, 1, 0.5), 0);
    ck_assert_int_eq(rf_predict_chebyshev(w, stored, 0, 3, 4, 0.1, 50, 1), 0);
}
END_TEST

START_TEST(order_1_follows_a_line_and_hermite_scales_its_slope) {
    const int stored[] = {12, 8, 4};
    float w[RF_CACHE_MAX_TERMS];
    for (int k = 1; k <= 6; k++) {
        int n = rf_predict_taylor(w, stored, 3, 12 + k, 1);
        ck_assert_int_eq(n, 2);
        ck_assert(w[0] == 1 + (float)k / 4 && w[1] == -(float)k / 4);
        ck_assert_double_eq_tol(predicted(w, n, stored, linear), linear(12 + k), 1e-6);
        n = rf_predict_newton(w, stored, 3, 12 + k, 1);
        ck_assert_double_eq_tol(predicted(w, n, stored, linear), linear(12 + k), 1e-6);
        for (int i = 0; i < 3; i++) {
            double sigma = i == 0 ? 0.5 : i == 1 ? sqrt(0.5) : 0.9;
            n = rf_predict_hermite(w, stored, 3, 12 + k, 1, sigma);
            ck_assert_double_eq_tol(predicted(w, n, stored, linear), linear(12) - 0.5 * k * 2 * sigma * sigma, 1e-5);
        }
    }
}
END_TEST

START_TEST(order_2_on_a_square) {
    float w[RF_CACHE_MAX_TERMS];
    for (int gap = 1; gap <= 5; gap++) {
        const int stored[] = {2 * gap, gap, 0};
        for (int k = 1; k <= 6; k++) {
            int n = rf_predict_taylor(w, stored, 3, 2 * gap + k, 2);
            ck_assert_int_eq(n, 3);
            ck_assert_double_eq_tol(predicted(w, n, stored, square) - square(2 * gap + k), -k * gap, 1e-3);
            n = rf_predict_newton(w, stored, 3, 2 * gap + k, 2);
            ck_assert_double_eq_tol(predicted(w, n, stored, square), square(2 * gap + k), 1e-3);
            double h = k / (double)gap, d = 0.5 * h * (h + 1); /* weights of backward differences */
            ck_assert_double_eq_tol(w[0], 1 + h + d, 1e-5);
            ck_assert_double_eq_tol(w[1], -h - 2 * d, 1e-5);
            ck_assert_double_eq_tol(w[2], d, 1e-5);
        }
    }
}
END_TEST

START_TEST(order_2_at_one_gap_ahead) {
    const int stored[] = {6, 3, 0};
    float w[RF_CACHE_MAX_TERMS];
    rf_predict_newton(w, stored, 3, 9, 2);
    ck_assert_double_eq_tol(w[0], 3, 1e-6);
    ck_assert_double_eq_tol(w[1], -3, 1e-6);
    ck_assert_double_eq_tol(w[2], 1, 1e-6);
    rf_predict_taylor(w, stored, 3, 9, 2);
    ck_assert_double_eq_tol(w[0], 2.5, 1e-6);
    ck_assert_double_eq_tol(w[1], -2, 1e-6);
    ck_assert_double_eq_tol(w[2], 0.5, 1e-6);
}
END_TEST

START_TEST(uneven_gaps_follow_the_recursion_or_the_polynomial) {
    const int stored[] = {20, 15, 13, 6};
    const double y[] = {1, 4, -2, 7};
    float w[RF_CACHE_MAX_TERMS];
    /* TaylorSeer's factors, formed as its code does, at each FULL step from the factors of the one before */
    double f1_13 = (y[2] - y[3]) / 7, f1_15 = (y[1] - y[2]) / 2, f1_20 = (y[0] - y[1]) / 5;
    double f2_15 = (f1_15 - f1_13) / 2, f2_20 = (f1_20 - f1_15) / 5, f3_20 = (f2_20 - f2_15) / 5;
    double k = 3, sum = 0;
    int n = rf_predict_taylor(w, stored, 4, 23, 3);
    for (int j = 0; j < n; j++) sum += (double)w[j] * y[j];
    ck_assert_double_eq_tol(sum, y[0] + f1_20 * k + f2_20 * k * k / 2 + f3_20 * k * k * k / 6, 1e-5);
    double x = 0.7 * k, s = 0.7;
    n = rf_predict_hermite(w, stored, 4, 23, 3, 0.7);
    sum = 0;
    for (int j = 0; j < n; j++) sum += (double)w[j] * y[j];
    ck_assert_double_eq_tol(sum,
                            y[0] + f1_20 * s * 2 * x + f2_20 / 2 * s * s * (4 * x * x - 2) +
                                f3_20 / 6 * s * s * s * (8 * x * x * x - 12 * x),
                            1e-4);
    n = rf_predict_newton(w, stored, 4, 23, 3);
    ck_assert_double_eq_tol(predicted(w, n, stored, cubic), cubic(23), 1e-3);
    n = rf_predict_newton(w, stored, 4, 23, 2);
    ck_assert_double_eq_tol(predicted(w, n, stored, square), square(23), 1e-3);
}
END_TEST

START_TEST(chebyshev_weights_are_the_published_ones) {
    const int stored[] = {4, 3, 2, 1, 0};
    const double want[] = {0.6174, 0.4158, 0.2006, -0.0275, -0.2677};
    float w[RF_CACHE_MAX_TERMS];
    double sum = 0;
    ck_assert_int_eq(rf_predict_chebyshev(w, stored, 5, 5, 4, 0.1, 50, 1), 5);
    for (int j = 0; j < 5; j++) {
        ck_assert_double_eq_tol(w[j], want[j], 6e-5);
        sum += w[j];
    }
    ck_assert_double_eq_tol(sum, 0.9387, 6e-5);
    const int twelve[] = {31, 25, 20, 15, 11, 8, 6, 4, 3, 2, 1, 0};
    sum = 0;
    ck_assert_int_eq(rf_predict_chebyshev(w, twelve, 12, 37, 4, 0.1, 50, 1), 12);
    for (int j = 0; j < 12; j++) sum += w[j];
    ck_assert_double_eq_tol(sum, 0.875, 6e-4);
    float linear_w[2], mixed[RF_CACHE_MAX_TERMS];
    rf_predict_taylor(linear_w, twelve, 12, 37, 1);
    rf_predict_chebyshev(mixed, twelve, 12, 37, 4, 0.1, 50, 0.25);
    for (int j = 0; j < 12; j++) {
        ck_assert_double_eq_tol(mixed[j], 0.25 * w[j] + 0.75 * (j < 2 ? linear_w[j] : 0), 1e-6);
    }
    /* no ridge: through all points, as far as there are enough of them */
    int n = rf_predict_chebyshev(w, stored, 5, 7, 2, 0, 50, 1);
    ck_assert_double_eq_tol(predicted(w, n, stored, square), 49, 1e-3);
    n = rf_predict_chebyshev(w, stored, 2, 7, 9, 0, 50, 1);
    ck_assert_int_eq(n, 2);
    ck_assert_double_eq_tol(predicted(w, n, stored, linear), linear(7), 1e-4);
    ck_assert_int_eq(rf_predict_chebyshev(w, stored, 1, 5, 4, 0, 50, 1), 1);
    ck_assert_double_eq_tol(w[0], 1, 1e-6);
}
END_TEST

/* ---- schedules ---- */

static void assert_schedule(const sim_options *o, const int *want, int num_want) {
    sim_result r;
    sim_run(&r, o);
    sim_assert_full_list(&r, want, num_want);
    sim_free(&r);
}

#define assert_full(policy_, options_, steps_, ...)                                                                    \
    assert_schedule(&(sim_options){.policy = (policy_), .options = (options_), .num_steps = (steps_)},                 \
                    (const int[]){__VA_ARGS__}, (int)(sizeof((const int[]){__VA_ARGS__}) / sizeof(int)))

START_TEST(interval_makes_the_published_schedules) {
    assert_full("interval", "interval=3,first=2,last=false", 50, 0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40,
                43, 46, 49);
    assert_full("interval", "interval=4,first=2,last=false", 50, 0, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49);
    assert_full("interval", "interval=5,first=2,last=false", 50, 0, 1, 6, 11, 16, 21, 26, 31, 36, 41, 46);
    assert_full("interval", "interval=4,first=3,last=false", 50, 0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46);
    assert_full("interval", "interval=7,first=3,last=false", 50, 0, 1, 2, 9, 16, 23, 30, 37, 44);
    assert_full("interval", "interval=5,last=false", 50, 0, 5, 10, 15, 20, 25, 30, 35, 40, 45);
    assert_full("interval", "interval=5", 50, 0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 49);
}
END_TEST

START_TEST(magcache_makes_the_published_schedules) {
    assert_full("magcache", "table=hunyuan,threshold=0.24,max_skips=6", 50, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 18, 23,
                29, 34, 41, 46, 48, 49);
    assert_full("magcache", "table=hunyuan,threshold=0.12,max_skips=4", 50, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 18,
                22, 25, 29, 33, 38, 43, 46, 48, 49);
    assert_full("magcache", "table=flux,threshold=0.24,max_skips=5,retain=0.1", 28, 0, 1, 2, 5, 9, 11, 17, 23, 26);
}
END_TEST

START_TEST(spectrum_makes_the_published_schedules) {
    assert_full("spectrum", "", 50, 0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46);
    assert_full("spectrum", "flex=3", 50, 0, 1, 2, 3, 4, 6, 11, 19, 30, 44);
    sim_result r;
    sim_run(&r, &(sim_options){.policy = "spectrum"});
    ck_assert_int_eq(r.layout.spans[0].depth, 14);
    ck_assert_int_eq(r.steps[5].plan.num_terms, 5);
    ck_assert_int_eq(r.steps[49].plan.num_terms, 14);
    sim_free(&r);
    sim_run(&r, &(sim_options){.policy = "spectrum", .options = "history=6,level=output,flex=3,last=true"});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 6, 11, 19, 30, 44, 49);
    ck_assert_int_eq(r.layout.output_depth, 6);
    ck_assert_int_eq(r.steps[48].plan.num_terms, 6);
    sim_free(&r);
    sim_run(&r, &(sim_options){.policy = "spectrum", .options = "flex=3,last=true"});
    ck_assert_int_eq(r.layout.spans[0].depth, 10); /* the last step's snapshot is never used */
    sim_free(&r);
}
END_TEST

/* rel1 of every signal is *user, in both branches. */
static void steady(void *user, int step, rf_signal signal, float out[2][4]) {
    sim_set_rel1(out, *(const double *)user);
    if (signal == RF_SIGNAL_OUTPUT_SIZE) out[0][0] = out[1][0] = 1;
}

START_TEST(teacache_evaluates_the_published_polynomials) {
    static const struct {
        const char *name;
        double p[5];
    } want[] = {
        {"flux", {.264231, .207978, .180503, .206847, .261995}},
        {"hunyuan", {.096124, .057069, .062038, .129196, .133731}},
        {"cogvideox-5b", {-.052316, .059864, .106125, .090506, .450956}},
        {"wan2.1-t2v-1.3b", {.137888, .042344, .077381, .249923, -.122561}},
        {"wan2.1-t2v-14b", {-13.022524, -8.578884, -4.091814, -.635951, .125989}},
        {"opensora", {.048443, .057359, .099880, .215937, .515345}},
        {"identity", {0, .02, .05, .10, .20}},
        {"0:0:2:0:1", {1, 1.0008, 1.005, 1.02, 1.08}},
    };
    static const double rho[] = {0, .02, .05, .10, .20};
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        for (int j = 0; j < 5; j++) {
            char options[128];
            double rel = rho[j];
            sim_result r;
            snprintf(options, sizeof options, "threshold=1000,coefficients=%s", want[i].name);
            sim_run(&r, &(sim_options){.policy = "teacache", .options = options, .measure = steady, .user = &rel});
            ck_assert_double_eq_tol(r.steps[1].plan.statistic, want[i].p[j], 2e-6);
            ck_assert_double_eq_tol(r.steps[2].plan.statistic, 2 * want[i].p[j], 4e-6);
            sim_free(&r);
        }
    }
}
END_TEST

START_TEST(teacache_adds_up_and_starts_again) {
    double rel = 0.03; /* .03 .06 .09 .12 >= .1 */
    sim_result r;
    sim_run(&r, &(sim_options){.policy = "teacache", .num_steps = 12, .measure = steady, .user = &rel});
    sim_assert_full(&r, 0, 4, 8, 11);
    ck_assert_double_eq_tol(r.steps[3].plan.statistic, 0.09, 1e-6);
    ck_assert_double_eq_tol(r.steps[4].plan.statistic, 0.12, 1e-6);
    ck_assert(r.steps[4].plan.threshold == 0.1);
    ck_assert(isnan(r.steps[0].plan.statistic) && isnan(r.steps[11].plan.statistic));
    ck_assert_int_eq(r.num_read_backs, 10); /* the first and the last step are decided without */
    ck_assert_int_eq(r.layout.spans[0].depth, 1);
    ck_assert(r.layout.spans[0].delta);
    sim_free(&r);
    sim_run(&r,
            &(sim_options){
                .policy = "teacache", .num_steps = 12, .options = "first=3,last=2", .measure = steady, .user = &rel});
    sim_assert_full(&r, 0, 1, 2, 6, 10, 11);
    sim_free(&r);
    /* one summand is at the threshold to the bit */
    rel = 0.25;
    sim_run(
        &r,
        &(sim_options){
            .policy = "teacache", .num_steps = 12, .options = "threshold=0.5,last=0", .measure = steady, .user = &rel});
    sim_assert_full(&r, 0, 2, 4, 6, 8, 10);
    sim_free(&r);
}
END_TEST

START_TEST(teacache_of_the_timestep_is_fixed_before_the_run) {
    float change[12] = {0};
    for (int i = 1; i < 12; i++) change[i] = i < 6 ? 0.019f : 0.06f;
    sim_result r;
    sim_run(&r,
            &(sim_options){.policy = "teacache", .num_steps = 12, .options = "signal=timestep", .temb_change = change});
    ck_assert(r.layout.is_static && r.layout.signals == 0);
    sim_assert_full(&r, 0, 6, 8, 10, 11); /* .095 .155 | .06 .12 | .06 .12 | last */
    sim_free(&r);
}
END_TEST

/* Branch 0 moves by .01, branch 1 by .04. */
static void lopsided(void *user, int step, rf_signal signal, float out[2][4]) {
    sim_set_rel1(out, 0.04);
    out[0][0] = 0.01f;
    if (signal == RF_SIGNAL_OUTPUT_SIZE) out[0][0] = out[1][0] = 1;
    if (signal == RF_SIGNAL_OUTPUT_REFRESH) out[0][0] = out[1][0] = 0.04f;
    if (signal == RF_SIGNAL_INPUT_REFRESH) out[0][0] = out[1][0] = 0.04f;
}

START_TEST(branches_share_a_decision) {
    sim_result r;
    sim_options o = {.policy = "teacache", .num_steps = 12, .measure = lopsided};
    sim_run(&r, &o); /* .04 .08 .12 */
    sim_assert_full(&r, 0, 3, 6, 9, 11);
    sim_free(&r);
    o.options = "branch=cond,threshold=0.045"; /* .01 .02 .03 .04 .05 */
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 5, 10, 11);
    sim_free(&r);
    o = (sim_options){
        .policy = "easycache", .num_steps = 14, .measure = lopsided, .options = "first=2,threshold=0.045"};
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 6, 11, 13);
    sim_free(&r);
    o.options = "first=2,threshold=0.045,branch=any";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 3, 5, 7, 9, 11, 13);
    sim_free(&r);
    o.options = "first=2,threshold=0.045,branch=any";
    o.branches = 1;
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 6, 11, 13);
    sim_free(&r);
    /* two tables: the second branch's asks first */
    o = (sim_options){.policy = "magcache",
                      .num_steps = 12,
                      .options = "threshold=0.1,max_skips=9,retain=0.1",
                      .calibration = "{\"magcache\":{\"num_steps\":12,\"ratios\":[[1,1,1,1,1,1,1,1,1,1,1,1],"
                                     "[1,1.04,1.04,1.04,1.04,1.04,1.04,1.04,1.04,1.04,1.04,1.04]]}}"};
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 2, 4, 6, 8, 10);
    sim_free(&r);
    o.branches = 1;
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 10);
    sim_free(&r);
}
END_TEST

/* x moves by 1, 2, 3, ... ; out by twice as much between FULL steps; |out| = 100. */
static void easy_signals(void *user, int step, rf_signal signal, float out[2][4]) {
    for (int b = 0; b < 2; b++) {
        out[b][0] = signal == RF_SIGNAL_INPUT_STEP      ? (float)step
                    : signal == RF_SIGNAL_INPUT_REFRESH ? 8
                    : signal == RF_SIGNAL_OUTPUT_SIZE   ? 100
                                                        : 16;
    }
}

START_TEST(easycache_estimates_the_outputs_change) {
    sim_result r;
    /* eps = 2 step / 100: from step 3 on .06 .08 (.14) .10 (.24) | .12 .14 (.26) | .16 .18 (.34) | .20 | ... */
    sim_run(&r,
            &(sim_options){
                .policy = "easycache", .num_steps = 13, .options = "first=3,threshold=0.2", .measure = easy_signals});
    sim_assert_full(&r, 0, 1, 2, 5, 7, 9, 10, 11, 12);
    ck_assert_double_eq_tol(r.steps[5].plan.statistic, 0.24, 1e-9);
    ck_assert_double_eq_tol(r.steps[6].plan.statistic, 0.12, 1e-9);
    ck_assert_int_eq(r.num_read_backs, 9);
    ck_assert(r.layout.output_depth == 1 && r.layout.output_delta);
    sim_free(&r);
    /* there is no kappa before two steps are computed */
    sim_run(&r,
            &(sim_options){
                .policy = "easycache", .num_steps = 13, .options = "first=1,threshold=1000", .measure = easy_signals});
    sim_assert_full(&r, 0, 1, 12);
    sim_free(&r);
}
END_TEST

static void resting_input(void *user, int step, rf_signal signal, float out[2][4]) {
    sim_set_rel1(out, 0.1);
    if (signal == RF_SIGNAL_INPUT_REFRESH || signal == *(const rf_signal *)user) out[0][0] = out[1][0] = 0;
}

static void broken(void *user, int step, rf_signal signal, float out[2][4]) {
    sim_set_rel1(out, NAN);
}

START_TEST(changes_that_cannot_be_formed_ask_for_computing) {
    static const char *const options[] = {"threshold=1000,coefficients=wan2.1-t2v-14b", "threshold=1000,first=2",
                                          "codebook=long"};
    static const char *const names[] = {"teacache", "easycache", "adacache"};
    for (int i = 0; i < 3; i++) {
        sim_result r;
        sim_run(&r, &(sim_options){.policy = names[i], .options = options[i], .measure = broken});
        for (int s = 0; s < r.num_steps; s++)
            ck_assert(isnan(r.steps[s].plan.statistic) || isfinite(r.steps[s].plan.statistic));
        if (i < 2) ck_assert_int_eq(r.num_full, 50);
        sim_free(&r);
    }
    sim_result r;
    rf_signal also = RF_SIGNAL_COUNT;
    sim_options o = {.policy = "easycache", .options = "threshold=1000", .measure = resting_input, .user = &also};
    sim_run(&r, &o);
    ck_assert_int_eq(r.num_full, 50);
    sim_free(&r);
    also = RF_SIGNAL_OUTPUT_REFRESH; /* nothing moves: nothing is to be computed */
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 3, 4, 49);
    sim_free(&r);
}
END_TEST

START_TEST(magcache_reads_tables) {
    sim_result r;
    rf_error err = {0};
    sim_options o = {.policy = "magcache", .num_steps = 20};
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_MISSING, "refrain calibrate magcache");
    sim_free(&r);
    /* K = 4 is what stops a flat table; K = 2 and 1 likewise */
    o.options = "table=flat:1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 3, 8, 13, 18);
    ck_assert(r.layout.is_static);
    sim_free(&r);
    o.options = "table=flat:1,max_skips=2,last=true,retain=0.1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 4, 7, 10, 13, 16, 19);
    sim_free(&r);
    /* |1 - 1.05|, |1 - 1.05^2| : .05, .1525 */
    o.options = "table=flat:1.05,retain=0.1,threshold=0.1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19);
    ck_assert_double_eq_tol(r.steps[3].plan.statistic, 0.1525, 1e-12);
    sim_free(&r);
    /* 3 entries over 20 steps, by nearest neighbour: steps 0-4, 5-14, 15-19 (4.75 rounds to 5: 2 s / 19 from .5 on) */
    o.options = "table=1:1:2,retain=0.05,max_skips=100";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 15, 16, 17, 18, 19);
    sim_free(&r);
    o.options = "";
    o.calibration = "{\"magcache\":{\"num_steps\":20,\"ratios\":[[1,1,1]]}}";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 3, 8, 13, 18);
    sim_free(&r);
    static const char *const bad_files[] = {
        "{\"magcache\":{}}",
        "{\"magcache\":{\"ratios\":[]}}",
        "{\"magcache\":{\"ratios\":[1,2]}}",
        "{\"magcache\":{\"ratios\":[[1,\"2\"]]}}",
        "{\"magcache\":{\"ratios\":[[1,0]]}}",
        "{\"magcache\":{\"ratios\":[[1],[]]}}",
    };
    for (size_t i = 0; i < sizeof bad_files / sizeof bad_files[0]; i++) {
        o.calibration = bad_files[i];
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_CONFIG, "magcache.ratios must be");
        sim_free(&r);
    }
    o.calibration = "{\"teacache\":{}}";
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_MISSING, "calibrate");
    sim_free(&r);
    static const char *const bad_tables[] = {"", "wan", "flat:", "flat:1:2", "flat:-1", "1:2:", "1:x", "1:0", "1 2"};
    o.calibration = NULL;
    for (size_t i = 0; i < sizeof bad_tables / sizeof bad_tables[0]; i++) {
        char options[64];
        snprintf(options, sizeof options, "table=%s", bad_tables[i]);
        o.options = options;
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_ARGUMENT, "none of auto, flux, hunyuan, flat:G");
        sim_free(&r);
    }
}
END_TEST

START_TEST(teacache_reads_coefficients) {
    rf_error err = {0};
    sim_result r;
    double rel = 0.05;
    sim_options o = {.policy = "teacache",
                     .options = "threshold=1000",
                     .measure = steady,
                     .user = &rel,
                     .calibration = "{\"teacache\":{\"signal\":\"modulated\",\"coefficients\":[0,0,0,2,1]}}"};
    sim_run(&r, &o);
    ck_assert_double_eq_tol(r.steps[1].plan.statistic, 1.1, 1e-6);
    sim_free(&r);
    o.options = "threshold=1000,coefficients=identity";
    sim_run(&r, &o);
    ck_assert_double_eq_tol(r.steps[1].plan.statistic, 0.05, 1e-6);
    sim_free(&r);
    o.options = "threshold=1000,signal=timestep"; /* fitted for the other signal */
    sim_run(&r, &o);
    ck_assert_double_eq_tol(r.steps[1].plan.statistic, 0.1, 1e-6);
    sim_free(&r);
    o.calibration = "{\"teacache\":{\"signal\":\"timestep\",\"coefficients\":[0,0,0,2,1]}}";
    sim_run(&r, &o);
    ck_assert_double_eq_tol(r.steps[1].plan.statistic, 1.2, 1e-6);
    sim_free(&r);
    o.options = "";
    static const char *const bad_files[] = {
        "{\"teacache\":{}}",
        "{\"teacache\":{\"coefficients\":[1,2,3,4]}}",
        "{\"teacache\":{\"coefficients\":[1,2,3,4,null]}}",
        "{\"teacache\":{\"coefficients\":\"flux\"}}",
    };
    for (size_t i = 0; i < sizeof bad_files / sizeof bad_files[0]; i++) {
        o.calibration = bad_files[i];
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_CONFIG, "teacache.coefficients must be 5 numbers");
        sim_free(&r);
    }
    o.calibration = NULL;
    static const char *const bad[] = {"", "fluks", "1:2:3:4", "1:2:3:4:5:6", "1:2:3:4:x", "1:2:3:4:nan"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char options[64];
        snprintf(options, sizeof options, "coefficients=%s", bad[i]);
        o.options = options;
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_ARGUMENT, "five numbers c4:c3:c2:c1:c0");
        sim_free(&r);
    }
}
END_TEST

START_TEST(adacache_follows_its_codebook) {
    sim_result r;
    rf_error err = {0};
    double rel = 0.08;
    sim_options o = {.policy = "adacache", .num_steps = 30, .measure = steady, .user = &rel, .options = "last=false"};
    /* .08 over 1 step: interval 3; over 3 steps .0267: 3 */
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28);
    ck_assert_double_eq_tol(r.steps[2].plan.statistic, 0.08, 1e-6);
    ck_assert_double_eq_tol(r.steps[5].plan.statistic, 0.08 / 3, 1e-6);
    ck_assert(r.steps[2].plan.threshold == 3);
    ck_assert_int_eq(r.num_read_backs, 10); /* at the step after each FULL one from the second on */
    sim_free(&r);
    o.options = "codebook=fast"; /* .39: 2, over 2 steps .195: 4, then .0975: 5, .078: 6, .065: 6 */
    rel = 0.39;
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 3, 7, 12, 18, 24, 29);
    sim_free(&r);
    o.options = "codebook=slow";
    rel = 1.5; /* 1 for ever */
    sim_run(&r, &o);
    ck_assert_int_eq(r.num_full, 30);
    sim_free(&r);
    o.options = "codebook=long,last=false"; /* above the last pair: its interval */
    rel = 9;
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28);
    sim_free(&r);
    o.options = "codebook=0.5:2/0.6:4,first=3,last=false";
    rel = 1.2; /* .  1.2: 4, .3: 2, .6: 4 */
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 6, 8, 12, 14, 18, 20, 24, 26);
    sim_free(&r);
    static const char *const bad[] = {"",        "quick", "1",      "1:0", "1:2/", "1:2/1:3", "0.2:3/0.1:2",
                                      "0.1:2:3", "-1:2",  "1:2000", "1:x"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char options[64];
        snprintf(options, sizeof options, "codebook=%s", bad[i]);
        o.options = options;
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_ARGUMENT, "none of slow, fast, long");
        sim_free(&r);
    }
}
END_TEST

/* ---- what all must do ---- */

START_TEST(never_skip_settings_never_skip) {
    static const struct {
        const char *policy, *options;
    } never[] = {
        {"interval", "interval=1"},
        {"interval", "interval=1,level=hidden,order=2"},
        {"teacache", "threshold=0"},
        {"teacache", "threshold=0,signal=timestep"},
        {"teacache", "threshold=0,coefficients=wan2.1-t2v-14b"},
        {"easycache", "threshold=0"},
        {"magcache", "table=hunyuan,max_skips=0"},
        {"magcache", "table=flat:1,threshold=0"},
        {"spectrum", "window=1,flex=0"},
        {"adacache", "codebook=1:1"},
    };
    double still = 0;
    for (size_t i = 0; i < sizeof never / sizeof never[0]; i++) {
        for (int quiet = 0; quiet < 2; quiet++) {
            sim_result r;
            sim_options o = busy_run(never[i].policy, never[i].options);
            if (quiet) {
                o.measure = steady;
                o.user = &still;
            }
            o.num_steps = 4; /* and with as many steps as there may be: few, with noise */
            o.stochastic = true;
            sim_run(&r, &o);
            ck_assert_msg(r.num_full == 4, "%s (%s) skips", never[i].policy, never[i].options);
            ck_assert_int_eq(r.num_read_backs, 0);
            sim_free(&r);
            o.num_steps = 60;
            o.stochastic = false;
            sim_run(&r, &o);
            ck_assert_msg(r.num_full == 60, "%s (%s) skips", never[i].policy, never[i].options);
            ck_assert_int_eq(r.num_read_backs, 0);
            sim_free(&r);
        }
    }
}
END_TEST

START_TEST(skipping_settings_skip_from_history_alone) {
    sim_result r;
    sim_options o = busy_run(step_policies[_i], skipping[_i]);
    sim_run(&r, &o);
    ck_assert_msg(r.num_full >= 5 && r.num_full <= 35, "%s: %d of 50 steps are FULL", o.policy, r.num_full);
    ck_assert_int_eq(r.num_partial, 0);
    ck_assert_int_eq(r.steps[0].kind, RF_STEP_FULL);
    ck_assert_int_eq(r.steps[0].plan.num_terms, 0);
    for (int s = 1; s < r.num_steps; s++) { /* FULL steps say what they would have predicted, for the drift guard */
        const rf_step_plan *p = &r.steps[s].plan;
        ck_assert_int_ge(p->num_terms, 1);
        ck_assert_int_ne(p->produce, RF_PRODUCE_NONE);
        ck_assert_int_ge(p->horizon, 1);
    }
    sim_free(&r);
}
END_TEST

START_TEST(reading_signals_more_often_changes_nothing) {
    for (unsigned seed = 0; seed < 8; seed++) {
        bool force[50] = {false};
        for (int s = 0; s < 50; s++) force[s] = seed > 3 && sim_noise(seed, s, 0, 0) < 0.1;
        sim_result lazy, eager;
        sim_options o = busy_run(step_policies[_i], skipping[_i]);
        o.force_full = force;
        sim_run(&lazy, &o);
        o.read_always = true;
        sim_run(&eager, &o);
        ck_assert_int_eq(sim_first_difference(&lazy, &eager), -1);
        for (int s = 0; s < 50; s++) {
            double a = lazy.steps[s].plan.statistic, b = eager.steps[s].plan.statistic;
            ck_assert(a == b || (isnan(a) && isnan(b)));
        }
        sim_free(&lazy);
        sim_free(&eager);
    }
}
END_TEST

START_TEST(forced_steps_are_computed_and_counted) {
    for (unsigned seed = 0; seed < 20; seed++) {
        bool force[50] = {false};
        for (int s = 0; s < 50; s++) force[s] = sim_noise(seed, s, 1, 0) < 0.15;
        sim_result r;
        sim_options o = busy_run(step_policies[_i], skipping[_i]);
        o.force_full = force;
        sim_run(&r, &o);
        for (int s = 0; s < 50; s++) ck_assert(!force[s] || r.steps[s].kind == RF_STEP_FULL);
        sim_free(&r);
    }
}
END_TEST

START_TEST(forced_steps_restart_the_rule) {
    bool force[50] = {false};
    double rel = 0.03;
    force[2] = force[3] = true;
    sim_options o = {.policy = "interval",
                     .num_steps = 14,
                     .options = "interval=4",
                     .force_full = force,
                     .measure = steady,
                     .user = &rel};
    sim_result r;
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 2, 3, 7, 11, 13);
    sim_free(&r);
    o.policy = "teacache";
    o.options = "";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 2, 3, 7, 11, 13);
    sim_free(&r);
    o.policy = "easycache"; /* eps = .03 */
    o.options = "first=2,threshold=0.1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 3, 7, 11, 13);
    sim_free(&r);
    o.policy = "magcache";
    o.options = "table=flat:1,retain=0,max_skips=3,last=true";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 2, 3, 7, 11, 13);
    sim_free(&r);
    o.policy = "spectrum"; /* windows 3, then 4 after the first forced one, 5, ... */
    o.options = "first=1,window=3,flex=1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 2, 3, 8);
    sim_free(&r);
    o.policy = "adacache"; /* .03 a step or less: every 4 */
    o.options = "codebook=0.03:4/1:1";
    sim_run(&r, &o);
    sim_assert_full(&r, 0, 1, 2, 3, 7, 11, 13);
    sim_free(&r);
}
END_TEST

START_TEST(misfits_are_refused_unless_forced) {
    rf_error err = {0};
    sim_result r;
    sim_options o = busy_run(step_policies[_i], skipping[_i]);
    o.stochastic = true;
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_UNSUPPORTED, "adds no noise");
    sim_free(&r);
    o.force = true;
    sim_run(&r, &o);
    sim_free(&r);
    o.stochastic = o.force = false;
    o.num_steps = 4;
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_UNSUPPORTED, "needs at least 9 steps");
    sim_free(&r);
    o.force = true;
    sim_run(&r, &o);
    sim_free(&r);
    o.num_steps = 1;
    sim_run(&r, &o);
    ck_assert_int_eq(r.num_full, 1);
    sim_free(&r);
}
END_TEST

START_TEST(warm_up_that_leaves_nothing_is_refused) {
    rf_error err = {0};
    sim_result r;
    static const char *const options[NUM_POLICIES] = {
        "first=20", "first=20", "first=20", "table=flat:1,retain=1", "first=20,last=1", "first=20"};
    sim_options o = busy_run(step_policies[_i], options[_i]);
    o.num_steps = 21;
    if (strcmp(o.policy, "magcache") == 0) { /* a share: the whole of it is a choice, not a misfit */
        sim_run(&r, &o);
        ck_assert_int_eq(r.num_full, 21);
    } else {
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_UNSUPPORTED, "needs at least 22 steps");
    }
    sim_free(&r);
}
END_TEST

/* Two values of every option that must make two different runs. */
static const struct {
    const char *policy, *option, *base, *a, *b;
} effects[] = {
    {"interval", "interval", "", "3", "4"},
    {"interval", "first", "", "1", "2"},
    {"interval", "last", "interval=4", "true", "false"},
    {"interval", "level", "", "output", "residual"},
    {"interval", "level", "", "residual", "hidden"},
    {"interval", "order", "", "0", "1"},
    {"interval", "order", "first=4", "2", "3"},
    {"interval", "predictor", "order=2", "taylor", "newton"},
    {"teacache", "threshold", "", "0.1", "0.2"},
    {"teacache", "signal", "", "modulated", "timestep"},
    {"teacache", "coefficients", "", "auto", "flux"},
    {"teacache", "coefficients", "", "identity", "0:0:0:2:0"},
    {"teacache", "first", "threshold=0.3", "1", "3"},
    {"teacache", "last", "threshold=0.3", "0", "2"},
    {"teacache", "branch", "threshold=0.3", "any", "cond"},
    {"easycache", "threshold", "", "0.1", "0.3"},
    {"easycache", "first", "threshold=0.3", "5", "7"},
    {"easycache", "last", "threshold=1000", "true", "false"},
    {"easycache", "branch", "threshold=0.3", "any", "cond"},
    {"magcache", "threshold", "table=hunyuan", "0.12", "0.24"},
    {"magcache", "max_skips", "table=flat:1", "3", "4"},
    {"magcache", "retain", "table=hunyuan", "0.1", "0.2"},
    {"magcache", "table", "", "flux", "hunyuan"},
    {"magcache", "table", "", "flat:1", "flat:1.1"},
    {"magcache", "last", "table=flat:1,max_skips=6", "true", "false"},
    {"spectrum", "first", "", "4", "5"},
    {"spectrum", "window", "", "2", "3"},
    {"spectrum", "flex", "", "0.75", "1"},
    {"spectrum", "degree", "", "3", "4"},
    {"spectrum", "lambda", "", "0.1", "0.2"},
    {"spectrum", "blend", "", "0.5", "1"},
    {"spectrum", "span", "num_steps differs", "50", "0"},
    {"spectrum", "history", "", "64", "5"},
    {"spectrum", "level", "", "hidden", "output"},
    {"spectrum", "last", "", "true", "false"},
    {"adacache", "codebook", "", "slow", "fast"},
    {"adacache", "codebook", "", "fast", "0.5:9"},
    {"adacache", "first", "codebook=fast", "2", "5"},
    {"adacache", "last", "codebook=fast", "true", "false"},
};

START_TEST(options_change_what_is_done) {
    sim_result r[2];
    for (int i = 0; i < 2; i++) {
        char options[256];
        bool other_length = strchr(effects[_i].base, ' ') != NULL;
        snprintf(options, sizeof options, "%s%s%s=%s", other_length ? "" : effects[_i].base,
                 effects[_i].base[0] && !other_length ? "," : "", effects[_i].option,
                 i ? effects[_i].b : effects[_i].a);
        sim_options o = busy_run(effects[_i].policy, options);
        o.num_steps = 40;
        sim_run(&r[i], &o);
    }
    ck_assert_msg(!sim_same(&r[0], &r[1]), "%s: %s=%s and =%s do the same", effects[_i].policy, effects[_i].option,
                  effects[_i].a, effects[_i].b);
    sim_free(&r[0]);
    sim_free(&r[1]);
}
END_TEST

START_TEST(no_option_is_without_a_test_of_its_effect) {
    const rf_policy_def *def = rf_policy_find(step_policies[_i]);
    for (int i = 0; i < def->num_options; i++) {
        bool there = false;
        for (size_t e = 0; e < sizeof effects / sizeof effects[0]; e++) {
            there |= strcmp(effects[e].policy, def->name) == 0 && strcmp(effects[e].option, def->options[i].name) == 0;
        }
        ck_assert_msg(there, "%s: %s", def->name, def->options[i].name);
    }
}
END_TEST

START_TEST(easycache_needs_outputs_like_inputs) {
    rf_error err = {0};
    rf_policy *p = NULL;
    rf_assert_ok(rf_policy_create(&p, "easycache", &err), err);
    rf_cache_shape shape = {.model = "m", .num_steps = 50, .in_cols = 16, .pred_cols = 8};
    rf_cache_layout layout = {0};
    rf_assert_fails(rf_policy_get_def(p)->setup(p, &shape, &layout, &err), err, RF_ERR_UNSUPPORTED, "16 columns");
    rf_policy_destroy(p);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("step-level policies");
    TCase *tc = tcase_create("predictors");
    tcase_add_test(tc, predictors_reuse_a_constant_exactly);
    tcase_add_test(tc, order_1_follows_a_line_and_hermite_scales_its_slope);
    tcase_add_test(tc, order_2_on_a_square);
    tcase_add_test(tc, order_2_at_one_gap_ahead);
    tcase_add_test(tc, uneven_gaps_follow_the_recursion_or_the_polynomial);
    tcase_add_test(tc, chebyshev_weights_are_the_published_ones);
    suite_add_tcase(suite, tc);
    tc = tcase_create("schedules");
    tcase_add_test(tc, interval_makes_the_published_schedules);
    tcase_add_test(tc, magcache_makes_the_published_schedules);
    tcase_add_test(tc, spectrum_makes_the_published_schedules);
    tcase_add_test(tc, teacache_evaluates_the_published_polynomials);
    tcase_add_test(tc, teacache_adds_up_and_starts_again);
    tcase_add_test(tc, teacache_of_the_timestep_is_fixed_before_the_run);
    tcase_add_test(tc, teacache_reads_coefficients);
    tcase_add_test(tc, branches_share_a_decision);
    tcase_add_test(tc, easycache_estimates_the_outputs_change);
    tcase_add_test(tc, easycache_needs_outputs_like_inputs);
    tcase_add_test(tc, changes_that_cannot_be_formed_ask_for_computing);
    tcase_add_test(tc, magcache_reads_tables);
    tcase_add_test(tc, adacache_follows_its_codebook);
    suite_add_tcase(suite, tc);
    tc = tcase_create("all");
    tcase_add_test(tc, never_skip_settings_never_skip);
    tcase_add_loop_test(tc, skipping_settings_skip_from_history_alone, 0, NUM_POLICIES);
    tcase_add_loop_test(tc, reading_signals_more_often_changes_nothing, 0, NUM_POLICIES);
    tcase_add_loop_test(tc, forced_steps_are_computed_and_counted, 0, NUM_POLICIES);
    tcase_add_test(tc, forced_steps_restart_the_rule);
    tcase_add_loop_test(tc, misfits_are_refused_unless_forced, 0, NUM_POLICIES);
    tcase_add_loop_test(tc, warm_up_that_leaves_nothing_is_refused, 0, NUM_POLICIES);
    tcase_add_loop_test(tc, options_change_what_is_done, 0, (int)(sizeof effects / sizeof effects[0]));
    tcase_add_loop_test(tc, no_option_is_without_a_test_of_its_effect, 0, NUM_POLICIES);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
