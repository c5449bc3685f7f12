/* tests/caching/test_blocks_parts.c - worldcache and the policies of block and part level: schedules, weights,
 * decisions, refusals.
 *
 * The expected step lists are those published or worked out from the papers' rules by hand; every other expected number
 * is made here from the formula, independently of the policy. */
#include <math.h>

#include "kernels/ops.h"
#include "tests/caching/sim.h"
#include "tests/test_util.h"

#define ALL_STEPS 50

static const char *const mine[] = {"worldcache", "fbcache", "dbcache", "deltacache", "fora",
                                   "taylorseer", "hicache", "speca",   "pab"};
#define NUM_MINE ((int)(sizeof mine / sizeof mine[0]))

static const uint8_t three_kinds[] = {RF_CACHE_SELF,  RF_CACHE_CROSS, RF_CACHE_MLP,   RF_CACHE_SELF,
                                      RF_CACHE_CROSS, RF_CACHE_MLP,   RF_CACHE_SELF,  RF_CACHE_CROSS,
                                      RF_CACHE_MLP,   RF_CACHE_SELF,  RF_CACHE_CROSS, RF_CACHE_MLP};
static const uint8_t four_kinds[] = {RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP};

static sim_result run_with(sim_options options) {
    sim_result r;
    sim_run(&r, &options);
    return r;
}

static sim_result run(const char *policy, const char *options) {
    return run_with((sim_options){.policy = policy, .options = options});
}

/* The FULL steps before step, newest first. */
static int stored_before(const sim_result *r, int step, int *stored) {
    int num = 0;
    for (int s = step - 1; s >= 0; s--) {
        if (r->steps[s].kind == RF_STEP_FULL) stored[num++] = s;
    }
    return num;
}

/* What a plan predicts for a trajectory known at the stored steps. */
static double predict(const sim_result *r, int step, int row_class, double (*trajectory)(double)) {
    int stored[ALL_STEPS];
    int num = stored_before(r, step, stored);
    const rf_step_plan *p = &r->steps[step].plan;
    ck_assert_int_le(p->num_terms, num);
    double sum = 0;
    for (int j = 0; j < p->num_terms; j++) sum += (double)p->weights[row_class][j] * trajectory(stored[j]);
    return sum;
}

static double constant(double s) {
    return 3 + 0 * s;
}

static double line(double s) {
    return 3 - 0.5 * s;
}

static double square(double s) {
    return s * s;
}

/* ---- golden schedules ---- */

#define assert_schedule(policy, options, ...)                                                                          \
    do {                                                                                                               \
        sim_result r_ = run((policy), (options));                                                                      \
        sim_assert_full(&r_, __VA_ARGS__);                                                                             \
        sim_free(&r_);                                                                                                 \
    } while (0)

START_TEST(schedules_of_taylorseer) {
    assert_schedule("taylorseer", "interval=3,first=2", 0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46,
                    49);
    assert_schedule("taylorseer", "interval=4,first=2", 0, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49);
    assert_schedule("taylorseer", "interval=5,first=2", 0, 1, 6, 11, 16, 21, 26, 31, 36, 41, 46);
    assert_schedule("taylorseer", "interval=5,first=1", 0, 5, 10, 15, 20, 25, 30, 35, 40, 45);
    assert_schedule("taylorseer", "interval=4,first=2,mode=last", 0, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49);
}
END_TEST

START_TEST(schedules_of_flux) {
    const char *both[] = {"taylorseer", "hicache"};
    for (int i = 0; i < 2; i++) {
        assert_schedule(both[i], "first=3,interval=4", 0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46);
        assert_schedule(both[i], "first=3,interval=5", 0, 1, 2, 7, 12, 17, 22, 27, 32, 37, 42, 47);
        assert_schedule(both[i], "first=3,interval=6", 0, 1, 2, 8, 14, 20, 26, 32, 38, 44);
        assert_schedule(both[i], "first=3,interval=7", 0, 1, 2, 9, 16, 23, 30, 37, 44);
    }
}
END_TEST

START_TEST(schedules_of_worldcache) {
    assert_schedule("worldcache", "warmup=5,max_skips=6", 0, 1, 2, 3, 4, 11, 18, 25, 32, 39, 46, 49);
    assert_schedule("worldcache", "warmup=10,max_skips=2", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 18, 21, 24, 27, 30, 33,
                    36, 39, 42, 45, 48, 49);
    for (int n = 2; n <= 6; n += 4) {
        for (int cas = 0; cas < 2; cas++) { /* where the threshold never fires, adaptive is the interval */
            char text[64];
            snprintf(text, sizeof text, "warmup=5,max_skips=%d,skip=%s", n, cas ? "cas" : "interval");
            sim_result r = run_with((sim_options){.policy = "worldcache", .options = text, .num_steps = 40});
            ck_assert_int_eq(r.num_full, n == 2 ? 17 : 10);
            ck_assert_int_eq(r.num_skip, 40 - r.num_full);
            ck_assert_int_eq(r.layout.is_static, !cas);
            sim_free(&r);
        }
    }
    assert_schedule("worldcache", "warmup=0,max_skips=16,threshold=9", 0, 1, 2, 19, 36, 49);
}
END_TEST

START_TEST(schedules_of_fora) {
    assert_schedule("fora", "interval=3", 0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46, 49);
    assert_schedule("fora", "interval=10", 0, 9, 19, 29, 39, 49);
    assert_schedule("fora", "interval=10,count=up", 0, 10, 20, 30, 40);
}
END_TEST

/* ---- never skip, forced steps ---- */

START_TEST(never_skip_settings) {
    static const struct {
        const char *policy, *options;
    } list[] = {
        {"worldcache", "threshold=0"},
        {"worldcache", "max_skips=0"},
        {"worldcache", "skip=interval,max_skips=0"},
        {"worldcache", "warmup=48"},
        {"fbcache", "threshold=0"},
        {"fbcache", "max_skips=0,threshold=9"},
        {"dbcache", "threshold=0"},
        {"dbcache", "max_cached=0"},
        {"dbcache", "max_continuous=0,threshold=2"},
        {"deltacache", "interval=1"},
        {"deltacache", "fraction=0"},
        {"fora", "interval=1"},
        {"fora", "interval=1,count=up"},
        {"taylorseer", "interval=1"},
        {"taylorseer", "interval=1,mode=last"},
        {"hicache", "interval=1"},
        {"speca", "max=0"},
        {"pab", "self=1,cross=1,mlp=1"},
        {"pab", "lo=900,hi=100"},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        bool force = strcmp(list[i].options, "warmup=48") == 0;
        sim_result r = run_with((sim_options){.policy = list[i].policy,
                                              .options = list[i].options,
                                              .kinds = three_kinds,
                                              .num_parts = 3,
                                              .force = force,
                                              .num_steps = force ? 49 : 50});
        ck_assert_msg(r.num_full == r.num_steps && r.num_read_backs == 0, "%s %s: %d full, %d read back",
                      list[i].policy, list[i].options, r.num_full, r.num_read_backs);
        sim_free(&r);
    }
}
END_TEST

START_TEST(forced_steps_are_full) {
    static const char *const options[] = {
        "max_skips=6", "threshold=.5", "threshold=.5,max_continuous=6", "interval=4", NULL, NULL, NULL, "base=5", NULL};
    bool force_full[ALL_STEPS] = {false};
    force_full[6] = force_full[7] = force_full[23] = force_full[49] = true;
    for (int i = 0; i < NUM_MINE; i++) {
        sim_result plain = run(mine[i], options[i]);
        sim_result r = run_with((sim_options){.policy = mine[i], .options = options[i], .force_full = force_full});
        for (int s = 0; s < ALL_STEPS; s++) {
            if (force_full[s]) ck_assert_int_eq(r.steps[s].kind, RF_STEP_FULL);
        }
        ck_assert_int_lt(r.num_full, ALL_STEPS);
        ck_assert_msg(!sim_same(&plain, &r), "%s", mine[i]);
        sim_free(&plain);
        sim_free(&r);
    }
    /* the count restarts where the rule counts from the last full step, and goes on where it goes by index */
    memset(force_full, 0, sizeof force_full);
    force_full[7] = true;
    sim_result r = run_with((sim_options){.policy = "taylorseer", .options = "interval=10", .force_full = force_full});
    sim_assert_full(&r, 0, 1, 7, 17, 27, 37, 47);
    sim_free(&r);
    r = run_with((sim_options){.policy = "fora", .options = "interval=10", .force_full = force_full});
    sim_assert_full(&r, 0, 7, 9, 19, 29, 39, 49);
    sim_free(&r);
    r = run_with((sim_options){.policy = "worldcache", .options = "max_skips=9,threshold=9", .force_full = force_full});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 7, 17, 27, 37, 47, 49);
    sim_free(&r);
}
END_TEST

/* ---- weights ---- */

/* Acceptance 3, and what the drift guard compares: every plan with history has weights. */
START_TEST(constant_trajectories_stay) {
    for (int i = 0; i < NUM_MINE; i++) {
        bool world = strcmp(mine[i], "worldcache") == 0;
        sim_result r = run(mine[i], NULL);
        for (int s = 1; s < ALL_STEPS; s++) {
            const rf_step_plan *p = &r.steps[s].plan;
            if (!world || s >= 3) ck_assert_msg(p->num_terms > 0, "%s, step %d", mine[i], s);
            for (int c = 0; c < (world ? 3 : 1) && p->num_terms > 0; c++) {
                ck_assert_double_eq_tol(predict(&r, s, c, constant), 3, 1e-5);
            }
        }
        sim_free(&r);
    }
}
END_TEST

/* Acceptance 4. */
START_TEST(linear_trajectories) {
    const char *exact[] = {"order=1,interval=6", "order=1,predictor=newton", "order=2", "order=3,interval=5",
                           "order=3,predictor=newton"};
    for (int i = 0; i < 5; i++) {
        sim_result r = run("taylorseer", exact[i]);
        for (int s = 2; s < ALL_STEPS; s++) {
            if (r.steps[s].kind == RF_STEP_SKIP) ck_assert_double_eq_tol(predict(&r, s, 0, line), line(s), 1e-4);
        }
        sim_free(&r);
    }
    for (int time = 0; time < 2; time++) { /* on a uniform grid timesteps are steps */
        sim_result r = run("worldcache", time ? "max_skips=6,time=timestep" : "max_skips=6");
        for (int s = 5; s < ALL_STEPS; s++) {
            if (r.steps[s].kind != RF_STEP_SKIP) continue;
            int last = s - r.steps[s].plan.horizon;
            ck_assert_double_eq_tol(predict(&r, s, 0, line), line(last), 1e-4);
            ck_assert_double_eq_tol(predict(&r, s, 1, line), line(s), 1e-4);
            ck_assert_double_eq_tol(predict(&r, s, 2, line), line(s), 1e-4);
        }
        sim_free(&r);
    }
    const double sigmas[] = {0.5, 0.7};
    for (int i = 0; i < 2; i++) {
        char text[64];
        snprintf(text, sizeof text, "order=1,sigma=%.1f", sigmas[i]);
        sim_result r = run("hicache", text);
        for (int s = 3; s < ALL_STEPS; s++) {
            if (r.steps[s].kind != RF_STEP_SKIP) continue;
            int k = r.steps[s].plan.horizon;
            double want = line(s - k) - 0.5 * k * 2 * sigmas[i] * sigmas[i];
            ck_assert_double_eq_tol(predict(&r, s, 0, line), want, 1e-4);
        }
        sim_free(&r);
    }
}
END_TEST

/* Acceptance 5, and HiCache's order 2 against its formula. */
START_TEST(quadratic_trajectories) {
    const double interval = 4;
    sim_result taylor = run("taylorseer", "order=2"), newton = run("taylorseer", "order=2,predictor=newton");
    sim_result hermite = run("hicache", "order=2,interval=4,first=2,sigma=.6");
    int checked = 0;
    for (int s = 10; s < ALL_STEPS; s++) { /* from where the three newest are equally far apart */
        if (taylor.steps[s].kind != RF_STEP_SKIP) continue;
        double k = taylor.steps[s].plan.horizon, last = s - k, d1 = 2 * last - interval, d2 = 2;
        if (s >= 14) {
            ck_assert_double_eq_tol(predict(&taylor, s, 0, square) - square(s), -k * interval, 2e-3);
            double x = 0.6 * k, want = square(last) + d1 * 0.6 * 2 * x + d2 / 2 * 0.36 * (4 * x * x - 2);
            ck_assert_double_eq_tol(predict(&hermite, s, 0, square), want, 2e-3);
            checked++;
        }
        ck_assert_double_eq_tol(predict(&newton, s, 0, square), square(s), 2e-3);
    }
    ck_assert_int_gt(checked, 20);
    sim_free(&taylor);
    sim_free(&newton);
    sim_free(&hermite);
}
END_TEST

/* Differences reach back to step first - 2 and no further. */
START_TEST(history_of_taylor) {
    sim_result r = run("taylorseer", "order=3,first=3");
    ck_assert_int_eq(r.steps[3].plan.num_terms, 2); /* steps 2 and 1, not 0 */
    ck_assert_int_eq(r.steps[7].plan.num_terms, 3);
    ck_assert_int_eq(r.steps[11].plan.num_terms, 4);
    sim_free(&r);
    r = run("taylorseer", "order=3,first=2");
    ck_assert_int_eq(r.steps[2].plan.num_terms, 2);
    ck_assert_int_eq(r.steps[6].plan.num_terms, 3);
    sim_free(&r);
    r = run("taylorseer", "order=2,first=1,interval=5");
    ck_assert_int_eq(r.steps[1].plan.num_terms, 1);
    ck_assert_int_eq(r.steps[6].plan.num_terms, 2);
    sim_free(&r);
}
END_TEST

/* ---- worldcache ---- */

static const struct {
    int max_skips, k;
    double alpha, c, d;
} damped[] = {
    {2, 1, .5, .5, .5},           {2, 2, 1, 0, 2},      {6, 1, .0741, .9259, .0741},
    {6, 2, .2593, 1.4815, .5185}, {6, 3, .5, 1.5, 1.5}, {6, 4, .7407, 1.0370, 2.9630},
    {6, 5, .9259, .3704, 4.6296}, {6, 6, 1, 0, 6},
};

/* The table of the damped predictor, through weights with gaps that differ, and the drift's step weights. */
START_TEST(worldcache_weights) {
    bool force_full[ALL_STEPS] = {false};
    force_full[12] = true; /* gaps of 3 and then others */
    for (int n = 2; n <= 6; n += 4) {
        char text[64];
        snprintf(text, sizeof text, "max_skips=%d,threshold=9", n);
        sim_result r = run_with((sim_options){.policy = "worldcache", .options = text, .force_full = force_full});
        int seen = 0;
        for (int s = 5; s < ALL_STEPS; s++) {
            const rf_step_plan *p = &r.steps[s].plan;
            if (r.steps[s].kind != RF_STEP_SKIP) continue;
            int at[ALL_STEPS], k = p->horizon;
            stored_before(&r, s, at);
            ck_assert_int_eq(p->produce, RF_PRODUCE_OUTPUT);
            ck_assert_int_eq(p->num_terms, 3);
            ck_assert_int_eq(k, s - at[0]);
            double gap0 = at[0] - at[1], gap1 = at[1] - at[2];
            double linear[3] = {1 + k / gap0, -k / gap0, 0}, reuse[3] = {1, 0, 0};
            for (size_t i = 0; i < sizeof damped / sizeof damped[0]; i++) {
                if (damped[i].max_skips != n || damped[i].k != k) continue;
                double x = (double)k / n, alpha = 3 * x * x - 2 * x * x * x, c = k * (1 - alpha), d = k * alpha;
                ck_assert_double_eq_tol(alpha, damped[i].alpha, 6e-5);
                ck_assert_double_eq_tol(c, damped[i].c, 6e-5);
                ck_assert_double_eq_tol(d, damped[i].d, 6e-5);
                double chaotic[3] = {1 + c / gap0, -c / gap0 + d / gap1, -d / gap1};
                for (int j = 0; j < 3; j++) {
                    ck_assert_double_eq((double)p->weights[0][j], reuse[j]);
                    ck_assert_double_eq_tol((double)p->weights[1][j], linear[j], 1e-6 * (1 + fabs(linear[j])));
                    ck_assert_double_eq_tol((double)p->weights[2][j], chaotic[j], 1e-6 * (1 + fabs(chaotic[j])));
                }
                seen++;
            }
        }
        ck_assert_int_eq(seen, r.num_skip);
        static const double a6[] = {.9259, .5556, .0185, -.4630, -.6667, -.3704};
        static const double b6[] = {.0741, .4444, .9815, 1.4630, 1.6667, 1.3704};
        static const double a2[] = {.5, -.5}, b2[] = {.5, 1.5};
        ck_assert_int_eq(r.layout.curvature.horizon, n);
        for (int k = 0; k < n; k++) {
            ck_assert_double_eq_tol((double)r.layout.curvature.step_a[k], (n == 2 ? a2 : a6)[k], 6e-5);
            ck_assert_double_eq_tol((double)r.layout.curvature.step_b[k], (n == 2 ? b2 : b6)[k], 6e-5);
        }
        sim_free(&r);
    }
}
END_TEST

/* Acceptance 7: what one more step changes, from weights and from the closed form, on made-up rows. */
START_TEST(worldcache_closed_form) {
    enum { COLS = 8, SKIPS = 5 };
    sim_result r = run("worldcache", "max_skips=5,threshold=9");
    int first = 11 + 6; /* a full step with gaps of 6 behind it */
    ck_assert_int_eq(r.steps[first - 1].kind, RF_STEP_FULL);
    int at[ALL_STEPS];
    stored_before(&r, first, at);
    double gap0 = at[0] - at[1], gap1 = at[1] - at[2];
    for (unsigned row = 0; row < 20; row++) {
        double y[3][COLS], v0[COLS], v1[COLS], aa = 0, bb = 0, cc = 0, before[COLS];
        for (int i = 0; i < COLS; i++) {
            for (int j = 0; j < 3; j++) y[j][i] = sim_noise(row, i, j, 0) - 0.5;
            v0[i] = (y[0][i] - y[1][i]) / gap0;
            v1[i] = (y[1][i] - y[2][i]) / gap1;
            aa += v0[i] * v0[i];
            bb += v0[i] * v1[i];
            cc += v1[i] * v1[i];
            before[i] = y[0][i];
        }
        for (int k = 1; k <= SKIPS; k++) {
            const rf_step_plan *p = &r.steps[first + k - 1].plan;
            ck_assert_int_eq(p->horizon, k);
            double explicit_sum = 0, now[COLS];
            for (int i = 0; i < COLS; i++) {
                now[i] = 0;
                for (int j = 0; j < 3; j++) now[i] += (double)p->weights[2][j] * y[j][i];
                explicit_sum += (now[i] - before[i]) * (now[i] - before[i]);
                before[i] = now[i];
            }
            double a = (double)r.layout.curvature.step_a[k - 1], b = (double)r.layout.curvature.step_b[k - 1];
            double closed = sqrt(a * a * aa + 2 * a * b * bb + b * b * cc);
            ck_assert_double_eq_tol(sqrt(explicit_sum), closed, 1e-5 * closed + 1e-7);
        }
    }
    sim_free(&r);
}
END_TEST

/* Drift of a made-up run: E(k) = step / 1000 + k / 100 in branch 0, twice that in branch 1. */
static void rising_drift(void *user, int step, int branch, float *e, int horizon) {
    const double *factor = user;
    for (int k = 1; k <= horizon; k++) {
        e[k - 1] = (float)((step / 1000.0 + k / 100.0) * factor[branch]);
    }
}

static void level_drift(void *user, int step, int branch, float *e, int horizon) {
    for (int k = 0; k < horizon; k++) e[k] = (float)((const double *)user)[branch];
}

/* The pseudo-code of the paper's rule: after a full step, J = smallest j with E(1) + .. + E(j) >= threshold, else
 * max_skips. */
START_TEST(worldcache_adaptive_schedule) {
    static const double by_branch[3][2] = {{1, 2}, {2, 1}, {2, 2}};
    for (int which = 0; which < 3; which++) {
        const double threshold = 0.3, *factor = by_branch[which];
        sim_result r = run_with((sim_options){.policy = "worldcache",
                                              .options = "max_skips=8,threshold=.3,warmup=4",
                                              .drift = rising_drift,
                                              .user = (void *)factor});
        bool full[ALL_STEPS] = {true, true, true, true};
        int reads = 0, s = 3;
        while (s < ALL_STEPS - 1) {
            int j = 0;
            double sum = 0;
            while (j < 8) {
                j++;
                sum += (double)(float)((s / 1000.0 + j / 100.0) * 2); /* the larger branch decides */
                if (sum >= threshold) break;
            }
            if (s + 2 < ALL_STEPS - 1) reads++;
            s = s + j + 1 < ALL_STEPS - 1 ? s + j + 1 : ALL_STEPS - 1;
            full[s] = true;
        }
        for (int i = 0; i < ALL_STEPS; i++) {
            ck_assert_msg((r.steps[i].kind == RF_STEP_FULL) == full[i], "run %d, step %d", which, i);
        }
        ck_assert_int_eq(r.num_read_backs, reads); /* one for each full step, none in warm-up or for the last step */
        ck_assert_int_gt(r.num_full, 4 + 50 / 9);
        sim_free(&r);
    }
    /* a threshold that the first drift passes: the second step after a full one is full */
    double factor[2] = {100, 0};
    sim_result r = run_with((sim_options){
        .policy = "worldcache", .options = "max_skips=8", .drift = rising_drift, .user = factor, .num_steps = 14});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 6, 8, 10, 12, 13);
    sim_free(&r);
    /* a sum that is just the threshold is full: .25 a step, .5 allowed */
    factor[0] = factor[1] = 0.25;
    r = run_with((sim_options){.policy = "worldcache",
                               .options = "max_skips=8,threshold=.5",
                               .drift = level_drift,
                               .user = factor,
                               .num_steps = 14});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 7, 10, 13);
    sim_free(&r);
    /* one skip in a row never needs the drift */
    r = run("worldcache", "max_skips=1,threshold=9");
    ck_assert_int_eq(r.num_read_backs, 0);
    sim_free(&r);
}
END_TEST

static void nan_drift(void *user, int step, int branch, float *e, int horizon) {
    for (int k = 0; k < horizon; k++) e[k] = branch == *(int *)user ? NAN : 0;
}

START_TEST(worldcache_nan_is_full) {
    for (int branch = 0; branch < 2; branch++) {
        sim_result r = run_with((sim_options){
            .policy = "worldcache", .options = "max_skips=8", .drift = nan_drift, .user = &branch, .num_steps = 12});
        sim_assert_full(&r, 0, 1, 2, 3, 4, 6, 8, 10, 11);
        sim_free(&r);
    }
}
END_TEST

/* time=timestep on a grid that is far from uniform; acceptance 8: another unit of time changes nothing. */
START_TEST(worldcache_timesteps) {
    float t[2][ALL_STEPS];
    for (int s = 0; s < ALL_STEPS; s++) {
        double x = 1 - s / 50.0;
        t[0][s] = (float)(330 * 7 * x / (1 + 6 * x));
        t[1][s] = 3 * t[0][s];
    }
    sim_options o = {.policy = "worldcache", .options = "max_skips=4,threshold=9,time=timestep", .timesteps = t[0]};
    sim_result r = run_with(o);
    o.timesteps = t[1];
    sim_result scaled = run_with(o);
    ck_assert(r.layout.curvature.timestep_gaps);
    int checked = 0;
    for (int s = 5; s < ALL_STEPS; s++) {
        const rf_step_plan *p = &r.steps[s].plan;
        if (r.steps[s].kind != RF_STEP_SKIP) continue;
        int at[ALL_STEPS];
        stored_before(&r, s, at);
        double x = (double)p->horizon / 4, alpha = 3 * x * x - 2 * x * x * x;
        double gap0 = (double)t[0][at[1]] - (double)t[0][at[0]], gap1 = (double)t[0][at[2]] - (double)t[0][at[1]];
        double ahead = (double)t[0][at[0]] - (double)t[0][s];
        double c = ahead * (1 - alpha) / gap0, d = ahead * alpha / gap1;
        double want[3][3] = {{1, 0, 0}, {1 + ahead / gap0, -ahead / gap0, 0}, {1 + c, d - c, -d}};
        for (int i = 0; i < 3; i++) {
            for (int j = 0; j < 3; j++) {
                ck_assert_double_eq_tol((double)p->weights[i][j], want[i][j], 1e-6 * (1 + fabs(want[i][j])));
                ck_assert_double_eq_tol((double)scaled.steps[s].plan.weights[i][j], want[i][j],
                                        1e-4 * (1 + fabs(want[i][j])));
            }
        }
        checked++;
    }
    ck_assert_int_gt(checked, 20);
    sim_free(&r);
    sim_free(&scaled);

    /* drift measured for a spacing of 1 counts times the spacing: 20 here */
    double factor[2] = {1 / 40.0, 1 / 40.0};
    sim_options adaptive = {
        .policy = "worldcache", .options = "max_skips=8,threshold=.1", .drift = rising_drift, .user = factor};
    double in_steps[2] = {0.5, 0.5};
    sim_options steps = adaptive;
    steps.user = in_steps;
    adaptive.options = "max_skips=8,threshold=.1,time=timestep";
    r = run_with(adaptive);
    scaled = run_with(steps);
    for (int s = 0; s < ALL_STEPS; s++) ck_assert_int_eq(r.steps[s].kind, scaled.steps[s].kind);
    ck_assert_int_gt(r.num_read_backs, 3);
    ck_assert_int_gt(r.num_full, 10); /* without a threshold */
    sim_free(&r);
    sim_free(&scaled);

    /* equal timesteps: no velocity, no infinity */
    for (int s = 0; s < ALL_STEPS; s++) t[0][s] = (float)(1000 - s / 4 * 80);
    o.timesteps = t[0];
    r = run_with(o);
    ck_assert_int_gt(r.num_skip, 20);
    sim_free(&r);
}
END_TEST

/* ---- worldcache's layout through the host's curvature operator: acceptance 6, 7 and 8 as a run would see them ---- */

enum { ROWS = 40, COLS = 6 };

typedef struct {
    float kappa[ROWS], drift[RF_CACHE_MAX_HORIZON];
    uint8_t row_class[ROWS];
} curvature_result;

static curvature_result measure_curvature(const rf_cache_layout *l, float (*y)[ROWS][COLS], double gap0, double gap1) {
    curvature_result out;
    rf_error err = {0};
    rf_backend *backend;
    rf_stream *stream;
    rf_assert_ok(rf_backend_open(&backend, "cpu", 1, &err), err);
    rf_assert_ok(rf_stream_create(&stream, backend, &err), err);
    size_t bytes = rf_curvature_workspace_bytes(1, ROWS);
    void *workspace;
    rf_assert_ok(rf_backend_alloc(backend, &workspace, bytes, &err), err);
    const int32_t slots[3] = {0, 1, 2};
    const float gaps[2] = {(float)gap0, (float)gap1};
    rf_curvature_args args = {
        .ring = y[0][0],
        .slot_stride = ROWS * COLS,
        .ld = COLS,
        .cols = COLS,
        .rows = ROWS,
        .num_sets = 1,
        .groups_per_set = 1,
        .slots = slots,
        .gaps = gaps,
        .p_stable = l->curvature.p_stable,
        .p_chaotic = l->curvature.p_chaotic,
        .eps = l->curvature.eps,
        .floor = l->curvature.floor,
        .mean_over_all = l->curvature.mean_over_all,
        .horizon = l->curvature.horizon,
        .row_class = out.row_class,
        .kappa = out.kappa,
        .drift = out.drift,
        .workspace = workspace,
        .workspace_bytes = bytes,
    };
    memcpy(args.step_a, l->curvature.step_a, sizeof args.step_a);
    memcpy(args.step_b, l->curvature.step_b, sizeof args.step_b);
    rf_assert_ok(rf_ops_for(backend)->curvature(stream, &args, &err), err);
    rf_backend_free(backend, workspace);
    rf_stream_destroy(stream);
    rf_backend_close(backend);
    return out;
}

/* The rule in plain loops over what the plan predicts: mean over rows of kappa |y(k) - y(k-1)|, chaotic rows only. */
static double explicit_drift(const sim_result *r, int full, int k, const curvature_result *c, float (*y)[ROWS][COLS],
                             int num_mean) {
    double sum = 0;
    for (int i = 0; i < ROWS; i++) {
        double moved = 0;
        for (int x = 0; x < COLS && c->row_class[i] == 2; x++) {
            double now = 0, before = (double)y[0][i][x];
            for (int j = 0; j < 3; j++) {
                now += (double)r->steps[full + k].plan.weights[2][j] * (double)y[j][i][x];
                if (k > 1) {
                    before += ((double)r->steps[full + k - 1].plan.weights[2][j] - (j == 0)) * (double)y[j][i][x];
                }
            }
            moved += (now - before) * (now - before);
        }
        sum += (double)c->kappa[i] * sqrt(moved);
    }
    return sum / num_mean;
}

START_TEST(worldcache_measured) {
    float y[3][ROWS][COLS], scaled[3][ROWS][COLS], straight[3][ROWS][COLS];
    for (int i = 0; i < 3 * ROWS * COLS; i++) {
        int age = i / (ROWS * COLS), row = i / COLS % ROWS, col = i % COLS;
        y[age][row][col] =
            (float)(sim_noise(3, row, col, 0) - 0.3 * age * (1 + sim_noise(4 + (unsigned)age, row, col, 1)));
        scaled[age][row][col] = 7 * y[age][row][col];
        straight[age][row][col] = (float)(row - 4 * age * (col + 1)); /* exact in f32 at a gap of 4 */
    }
    const char *rules[] = {"code", "paper"}, *times[] = {"step", "timestep"};
    for (int which = 0; which < 4; which++) {
        char text[96];
        snprintf(text, sizeof text, "max_skips=3,threshold=9,rule=%s,time=%s", rules[which % 2], times[which / 2]);
        sim_result r = run("worldcache", text);
        int full = 16; /* 4, 8, 12, 16: gaps of 4 steps, of 80 in timesteps */
        double unit = which / 2 ? 20 : 1, gap = 4 * unit;
        ck_assert_int_eq(r.steps[full].kind, RF_STEP_FULL);
        curvature_result c = measure_curvature(&r.layout, y, gap, gap);
        int groups[3] = {0};
        for (int i = 0; i < ROWS; i++) groups[c.row_class[i]]++;
        ck_assert(groups[0] == 12 && groups[1] == 12 && groups[2] == 16); /* 30, 30 and 40 percent */
        int num_mean = which % 2 ? groups[2] : ROWS;
        for (int k = 1; k <= 3; k++) {
            double want = explicit_drift(&r, full, k, &c, y, num_mean);
            ck_assert_double_gt(want, 1e-3);
            /* the policy takes drift times the spacing of the grid */
            ck_assert_double_eq_tol((double)c.drift[k - 1] * unit, want, 1e-5 * want);
        }
        /* features times 7: same classes, same drift */
        curvature_result other = measure_curvature(&r.layout, scaled, gap, gap);
        ck_assert_mem_eq(other.row_class, c.row_class, ROWS);
        for (int k = 0; k < 3; k++) {
            ck_assert_double_eq_tol((double)other.drift[k], (double)c.drift[k], 1e-4 * (double)c.drift[k]);
        }
        /* a unit of time a third as long: three times the gaps and three times the spacing */
        other = measure_curvature(&r.layout, y, 3 * gap, 3 * gap);
        ck_assert_mem_eq(other.row_class, c.row_class, ROWS);
        for (int k = 0; k < 3; k++) {
            ck_assert_double_eq_tol(3 * (double)other.drift[k], (double)c.drift[k], 1e-3 * (double)c.drift[k]);
        }
        /* straight lines: no curvature, no stable row, all chaotic, no drift; and the prediction is exact */
        c = measure_curvature(&r.layout, straight, 4, 4);
        for (int i = 0; i < ROWS; i++) ck_assert(c.kappa[i] == 0 && c.row_class[i] == 2);
        for (int k = 0; k < 3; k++) {
            ck_assert_float_eq(c.drift[k], 0);
            ck_assert_double_eq_tol(predict(&r, full + 1 + k, 2, line), line(full + 1 + k), 1e-4);
        }
        sim_free(&r);
    }
}
END_TEST

START_TEST(worldcache_variants) {
    static const struct {
        const char *name;
        int row;
    } same_row[] = {{"reuse", 0}, {"linear", 1}, {"damped", 2}};
    sim_result grouped = run("worldcache", "max_skips=6");
    for (int i = 0; i < 3; i++) {
        char text[64];
        snprintf(text, sizeof text, "max_skips=6,predictor=%s", same_row[i].name);
        sim_result r = run("worldcache", text);
        for (int s = 5; s < ALL_STEPS; s++) {
            ck_assert_int_eq(r.steps[s].kind, grouped.steps[s].kind);
            for (int c = 0; c < 3; c++) {
                ck_assert_mem_eq(r.steps[s].plan.weights[c], grouped.steps[s].plan.weights[same_row[i].row],
                                 3 * sizeof(float));
            }
        }
        sim_free(&r);
    }
    sim_free(&grouped);
    /* without groups and without the drift nothing needs the curvature */
    sim_result r = run("worldcache", "predictor=reuse,skip=interval");
    ck_assert(!r.layout.curvature.used && r.layout.num_classes <= 1 && r.layout.is_static);
    sim_free(&r);
    r = run("worldcache", "rule=paper,floor=.5,pooled=true");
    ck_assert(!r.layout.curvature.mean_over_all && r.layout.curvature.pooled && r.layout.curvature.used);
    ck_assert_float_eq(r.layout.curvature.floor, 0.5f);
    sim_free(&r);
    r = run("worldcache", NULL);
    ck_assert(r.layout.curvature.mean_over_all && !r.layout.curvature.pooled);
    ck_assert_int_eq(r.layout.output_depth, 3);
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++) ck_assert_int_eq(r.layout.spans[i].depth, 0);
    sim_free(&r);
}
END_TEST

/* ---- fbcache and dbcache ---- */

static void by_step(void *user, int step, rf_signal signal, float out[2][4]) {
    const double *values = user; /* [step] */
    sim_set_rel1(out, signal == RF_SIGNAL_PROBE ? values[step] : 0.1);
}

START_TEST(fbcache_decisions) {
    double values[ALL_STEPS];
    for (int s = 0; s < ALL_STEPS; s++) values[s] = s % 7 == 3 ? 0.05 : s % 5 == 2 ? 0.2 : 0.04;
    sim_result r =
        run_with((sim_options){.policy = "fbcache", .options = "threshold=.05", .measure = by_step, .user = values});
    ck_assert_int_eq(r.layout.probe_blocks, 1);
    ck_assert(r.layout.spans[0].begin == 1 && r.layout.spans[0].end == 4 && r.layout.spans[0].delta);
    ck_assert_int_eq(r.num_read_backs, 0); /* of the start of a step; the probe's own are not counted here */
    for (int s = 0; s < ALL_STEPS; s++) {
        const rf_step_plan *p = &r.steps[s].plan;
        bool full = s == 0 || !((float)values[s] < 0.05f);
        ck_assert_int_eq(r.steps[s].kind, full ? RF_STEP_FULL : RF_STEP_PARTIAL);
        ck_assert_int_eq(r.steps[s].probed, s > 0);
        if (s == 0) continue;
        ck_assert_int_eq(p->produce, RF_PRODUCE_SPAN);
        ck_assert_int_eq(p->num_terms, 1);
        ck_assert_double_eq_tol(p->statistic, values[s], 1e-7);
        ck_assert_double_eq(p->threshold, 0.05);
    }
    sim_free(&r);
    for (int s = 0; s < ALL_STEPS; s++) values[s] = 0;
    r = run_with(
        (sim_options){.policy = "fbcache", .options = "max_skips=3,warmup=4", .measure = by_step, .user = values});
    sim_assert_full(&r, 0, 1, 2, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47);
    sim_free(&r);
    r = run_with((sim_options){.policy = "fbcache", .measure = by_step, .user = values});
    sim_assert_full(&r, 0);
    sim_free(&r);
    values[20] = 0.25; /* equal to the threshold is not below it */
    r = run_with((sim_options){.policy = "fbcache", .options = "threshold=.25", .measure = by_step, .user = values});
    sim_assert_full(&r, 0, 20);
    sim_free(&r);
}
END_TEST

/* Branches differ: the larger change decides for both. */
static void second_branch_moves(void *user, int step, rf_signal signal, float out[2][4]) {
    int branch = *(int *)user;
    sim_set_rel1(out, 0.01);
    if (step % 3 == 0) out[branch][0] = 0.5f;
}

START_TEST(one_decision_for_both_branches) {
    for (int branch = 0; branch < 2; branch++) {
        const char *both[] = {"fbcache", "dbcache"};
        for (int i = 0; i < 2; i++) {
            sim_result r = run_with((sim_options){.policy = both[i],
                                                  .options = "warmup=0",
                                                  .num_steps = 10,
                                                  .measure = second_branch_moves,
                                                  .user = &branch});
            sim_assert_full(&r, 0, 3, 6, 9);
            sim_free(&r);
        }
    }
}
END_TEST

START_TEST(dbcache_decisions) {
    double values[ALL_STEPS];
    for (int s = 0; s < ALL_STEPS; s++) values[s] = 0.05;
    sim_options o = {.policy = "dbcache", .measure = by_step, .user = values, .num_blocks = 8, .num_steps = 20};

    o.options = "fn=2,bn=1,warmup=3,max_continuous=-1";
    sim_result r = run_with(o);
    sim_assert_full(&r, 0, 1, 2);
    ck_assert_int_eq(r.layout.probe_blocks, 2);
    ck_assert(r.layout.spans[0].begin == 2 && r.layout.spans[0].end == 7);
    ck_assert_int_eq(r.layout.spans[0].depth, 1);
    sim_free(&r);

    o.options = "warmup=3,max_continuous=4";
    r = run_with(o);
    sim_assert_full(&r, 0, 1, 2, 7, 12, 17);
    sim_free(&r);

    o.options = "warmup=3,max_continuous=4,max_cached=6";
    r = run_with(o);
    sim_assert_full(&r, 0, 1, 2, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19);
    ck_assert_int_eq(r.num_partial, 6);
    sim_free(&r);

    o.options = "warmup=8,interval=3,max_continuous=-1";
    r = run_with(o);
    sim_assert_full(&r, 0, 3, 6);
    sim_free(&r);

    o.options = "max_continuous=-1,warmup=8,mask=1001";
    r = run_with(o);
    sim_assert_full(&r, 0, 3);
    sim_free(&r);

    o.options = "max_continuous=-1,warmup=1,accumulate=true,threshold=.12"; /* .05, .10, .15 */
    r = run_with(o);
    sim_assert_full(&r, 0, 3, 6, 9, 12, 15, 18);
    ck_assert_double_eq_tol(r.steps[5].plan.statistic, 0.10, 1e-6);
    ck_assert_double_eq_tol(r.steps[6].plan.statistic, 0.15, 1e-6);
    sim_free(&r);

    o.options =
        "max_continuous=1,warmup=1,accumulate=true,threshold=.12"; /* a full step by the bound starts anew, too */
    r = run_with(o);
    sim_assert_full(&r, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18);
    sim_free(&r);

    o.options = "warmup=2,max_continuous=5,threshold=1";
    r = run_with(o);
    sim_assert_full(&r, 0, 1, 7, 13, 19);
    ck_assert(r.layout.is_static && r.layout.probe_blocks == 0);
    for (int s = 0; s < 20; s++) ck_assert(!r.steps[s].probed);
    sim_free(&r);

    o.options = "warmup=4,max_continuous=3,calibrator=taylor,order=2";
    r = run_with(o);
    ck_assert_int_eq(r.layout.spans[0].depth, 3);
    ck_assert_int_eq(r.steps[3].plan.num_terms, 2); /* from step 1 on */
    ck_assert_int_eq(r.steps[4].plan.num_terms, 3);
    ck_assert_double_eq_tol(predict(&r, 5, 0, line), line(5), 1e-5);
    sim_free(&r);
}
END_TEST

/* ---- deltacache ---- */

START_TEST(deltacache_ranges) {
    sim_result r = run_with(
        (sim_options){.policy = "deltacache", .options = "interval=3,fraction=.3,split=.4,first=2", .num_blocks = 10});
    ck_assert(r.layout.is_static);
    ck_assert(r.layout.spans[0].begin == 0 && r.layout.spans[0].end == 3 && r.layout.spans[0].delta);
    ck_assert(r.layout.spans[1].begin == 7 && r.layout.spans[1].end == 10 && r.layout.spans[1].delta);
    for (int s = 0; s < ALL_STEPS; s++) {
        bool full = s < 2 || (s - 1) % 3 == 0;
        ck_assert_int_eq(r.steps[s].kind, full ? RF_STEP_FULL : RF_STEP_PARTIAL);
        if (s > 0) ck_assert_int_eq(r.steps[s].plan.span, s < 20 ? 1 : 0);
    }
    sim_free(&r);
    r = run("deltacache", "fraction=1");
    ck_assert_int_eq(r.num_skip, 25);
    ck_assert_int_eq(r.layout.spans[1].depth, 0);
    sim_free(&r);
    r = run("deltacache", "split=1");
    ck_assert_int_eq(r.layout.spans[0].depth, 0);
    ck_assert_int_eq(r.layout.spans[1].depth, 1);
    sim_free(&r);
    r = run("deltacache", "split=0");
    ck_assert_int_eq(r.layout.spans[1].depth, 0);
    sim_free(&r);
}
END_TEST

/* ---- parts ---- */

START_TEST(part_level_layouts) {
    uint8_t kinds[8] = {RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_PARALLEL, RF_CACHE_NO_PART,
                        RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_PARALLEL, RF_CACHE_NO_PART};
    const char *both[] = {"fora", "taylorseer", "hicache", "speca", "pab"};
    const int depths[] = {1, 2, 3, 5, 1};
    for (int i = 0; i < 5; i++) {
        sim_result r = run_with((sim_options){.policy = both[i], .kinds = kinds});
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_SELF], depths[i]);
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_PARALLEL], depths[i]);
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_CROSS], 0);
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_MLP], i < 4 ? depths[i] : 0);
        for (int s = 0; s < ALL_STEPS; s++) {
            const rf_step_plan *p = &r.steps[s].plan;
            if (r.steps[s].kind == RF_STEP_FULL) continue;
            ck_assert_int_eq(p->produce, RF_PRODUCE_NONE);
            for (int j = 0; j < 8; j++) {
                bool produced = kinds[j] != RF_CACHE_NO_PART && (i < 4 || kinds[j] != RF_CACHE_MLP);
                ck_assert_int_eq(p->parts[j], produced ? RF_DO_PRODUCE : RF_DO_COMPUTE);
            }
        }
        sim_free(&r);
    }
    const char *last[] = {"taylorseer", "hicache"};
    for (int i = 0; i < 2; i++) {
        for (int order = 1; order <= 3; order++) {
            char text[64];
            snprintf(text, sizeof text, "mode=last,order=%d", order);
            sim_result r = run(last[i], text);
            ck_assert(r.layout.spans[0].begin == 0 && r.layout.spans[0].end == 4 && !r.layout.spans[0].delta);
            ck_assert_int_eq(r.layout.spans[0].depth, order + 1);
            ck_assert_int_eq(r.layout.part_depth[RF_CACHE_SELF], 0);
            ck_assert_int_eq(r.num_partial, 0);
            sim_free(&r);
        }
    }
}
END_TEST

START_TEST(pab_ranges) {
    sim_result r = run_with((sim_options){.policy = "pab",
                                          .options = "self=2,cross=6,mlp=3,lo=200,hi=800",
                                          .kinds = three_kinds,
                                          .num_parts = 3,
                                          .num_steps = 100});
    ck_assert(r.layout.is_static);
    for (int s = 0; s < 100; s++) {
        double t = 1000 - 10 * s;
        bool inside = t > 200 && t < 800;
        const int range[3] = {2, 6, 3};
        int computed = 0;
        for (int i = 0; i < 3; i++) {
            bool compute = !inside || s % range[i] == 0;
            computed += compute;
            if (r.steps[s].kind == RF_STEP_FULL) continue;
            for (int b = 0; b < 4; b++) {
                ck_assert_int_eq(r.steps[s].plan.parts[3 * b + i], compute ? RF_DO_COMPUTE : RF_DO_PRODUCE);
            }
        }
        ck_assert_int_eq(r.steps[s].kind, computed == 3 ? RF_STEP_FULL : computed ? RF_STEP_PARTIAL : RF_STEP_SKIP);
    }
    ck_assert_int_gt(r.num_skip, 10);
    ck_assert_int_gt(r.num_partial, 20);
    sim_free(&r);
}
END_TEST

/* Blocks of a space-time transformer: attention over frames is a part of its own. */
START_TEST(temporal_parts) {
    sim_options o = {.policy = "pab", .options = "lo=-1,hi=1001", .kinds = four_kinds, .num_parts = 4};
    sim_result r = run_with(o);
    ck_assert_int_eq(r.layout.part_depth[RF_CACHE_TEMPORAL], 1);
    ck_assert_int_eq(r.layout.part_depth[RF_CACHE_MLP], 0);
    for (int s = 1; s < ALL_STEPS; s++) {
        ck_assert_int_eq(r.steps[s].kind, s % 4 ? RF_STEP_PARTIAL : RF_STEP_FULL);
        for (int i = 0; i < 16 && s % 4; i++) {
            bool reused = four_kinds[i] == RF_CACHE_TEMPORAL || (four_kinds[i] == RF_CACHE_SELF && s % 2);
            ck_assert_int_eq(r.steps[s].plan.parts[i], reused ? RF_DO_PRODUCE : RF_DO_COMPUTE);
        }
    }
    sim_free(&r);
    o.options = "self=1,temporal=1,cross=1,mlp=1";
    r = run_with(o);
    ck_assert_int_eq(r.num_full, ALL_STEPS);
    sim_free(&r);
    static const char *const others[] = {"fora", "taylorseer", "hicache", "speca"};
    const int depths[] = {1, 2, 3, 5};
    for (int i = 0; i < 4; i++) {
        r = run_with((sim_options){.policy = others[i], .kinds = four_kinds, .num_parts = 4});
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_TEMPORAL], depths[i]);
        sim_result plain = run(others[i], NULL);
        for (int s = 0; s < ALL_STEPS; s++) {
            ck_assert_int_eq(r.steps[s].kind, plain.steps[s].kind);
            for (int p = 0; p < 16 && r.steps[s].kind == RF_STEP_SKIP; p++)
                ck_assert_int_eq(r.steps[s].plan.parts[p], RF_DO_PRODUCE);
        }
        sim_free(&plain);
        sim_free(&r);
    }
}
END_TEST

/* ---- carried ---- */

static void noise(void *user, int step, rf_signal signal, float out[2][4]) {
    for (int b = 0; b < 2; b++)
        for (int k = 0; k < 4; k++) out[b][k] = (float)(1 + sim_noise(5, step, (int)signal, 4 * b + k));
}

/* FULL steps of a run that begins with a snapshot at -1 or -4, and what it predicts from. */
START_TEST(runs_that_begin_with_a_snapshot) {
    static const struct {
        const char *policy, *options;
        int from, full[6], num; /* of 10 steps, at rel1 .1 a step */
    } list[] = {
        {"interval", "interval=3", -1, {2, 5, 8, 9}, 4},
        {"interval", "interval=3", -4, {0, 3, 6, 9}, 4},
        {"interval", "interval=5,order=2,first=4,last=false", -1, {4, 9}, 2},
        {"teacache", "threshold=.35", -1, {4, 8, 9}, 3}, /* step 0 adds nothing */
        {"teacache", "threshold=.35,first=3", -1, {4, 8, 9}, 3},
        {"easycache", "threshold=3.5,first=3", -1, {1, 2, 6, 9}, 4},
        {"magcache", "table=flat:1,max_skips=3,retain=.5", -1, {3, 7}, 2},
        {"adacache", "codebook=.2:4/1:1,first=5", -1, {1, 2, 6, 9}, 4},
        {"worldcache", "max_skips=2,threshold=9", -1, {2, 3, 4, 7, 9}, 5},
        {"worldcache", "max_skips=2,threshold=9", -4, {0, 1, 2, 5, 8, 9}, 6},
        {"worldcache", "max_skips=5,threshold=9,warmup=6,skip=interval", -1, {5, 6, 7, 9}, 4},
        {"fbcache", "threshold=.2,max_skips=3", -1, {3, 7}, 2},
        {"fbcache", "threshold=.05", -1, {0, 1, 2, 3, 4, 5}, 6},
        {"dbcache", "threshold=.2,max_continuous=3", -1, {3, 7}, 2},
        {"dbcache", "threshold=1,max_cached=3", -1, {3, 4, 5, 6, 7, 8}, 6},
        {"dbcache", "threshold=1,mask=1", -1, {0, 5}, 2},
        {"deltacache", "interval=4", -1, {3, 7}, 2},
        {"fora", "interval=4", -1, {1, 5, 9}, 3},
        {"fora", "interval=4,count=up", -1, {0, 4, 8}, 3},
        {"taylorseer", "interval=4", -1, {3, 7}, 2},
        {"taylorseer", "interval=4", -4, {0, 4, 8}, 3},
        {"hicache", "interval=4,mode=last", -1, {3, 7}, 2},
        {"speca", "max=3,base=9", -1, {3, 7}, 2},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        sim_options o = {
            .policy = list[i].policy, .options = list[i].options, .num_steps = 10, .carried = list[i].from};
        sim_result r = run_with(o);
        int full[10], num = sim_full_steps(&r, full);
        if (list[i].num < 6) {
            sim_assert_full_list(&r, list[i].full, list[i].num);
        } else {
            ck_assert_int_ge(num, 6);
            ck_assert_mem_eq(full, list[i].full, sizeof list[i].full);
        }
        for (int s = 0; s < num; s++) {
            const rf_step_plan *p = &r.steps[s].plan;
            if (s >= full[0]) break;
            ck_assert_int_eq(p->num_terms, 1); /* one snapshot has no slope */
            ck_assert_float_eq(p->weights[0][0], 1);
            ck_assert_int_eq(p->horizon, s - list[i].from);
        }
        sim_free(&r);
        /* what reading back more often would tell, and the guard */
        bool force_full[10] = {true};
        o.measure = noise;
        r = run_with(o);
        o.read_always = true;
        sim_result always = run_with(o);
        ck_assert_msg(sim_same(&r, &always), "%s", list[i].policy);
        sim_free(&always);
        sim_free(&r);
        o.force_full = force_full;
        r = run_with(o);
        ck_assert_int_eq(r.steps[0].kind, RF_STEP_FULL);
        sim_free(&r);
    }
    for (int i = 0; i < rf_policy_count(); i++) { /* every one that carries is in the list */
        bool there = false;
        for (size_t k = 0; k < sizeof list / sizeof *list; k++)
            there |= strcmp(list[k].policy, rf_policy_at(i)->name) == 0;
        ck_assert_msg(there == rf_policy_at(i)->carries, "%s", rf_policy_at(i)->name);
    }
}
END_TEST

/* Derivatives begin with the second FULL step of the run itself. */
START_TEST(no_slope_across_runs) {
    static const char *const list[][2] = {{"taylorseer", "interval=3,order=2"},
                                          {"hicache", "interval=3,order=2"},
                                          {"speca", "max=2,base=9"},
                                          {"interval", "interval=3,order=2"},
                                          {"interval", "interval=3,order=2,predictor=newton"},
                                          {"dbcache", "threshold=1,calibrator=taylor,order=2,max_continuous=2"}};
    for (int i = 0; i < 6; i++) {
        sim_result r =
            run_with((sim_options){.policy = list[i][0], .options = list[i][1], .num_steps = 12, .carried = -1});
        for (int s = 0; s < 11; s++) ck_assert_int_eq(r.steps[s].plan.num_terms, s < 6 ? 1 : s < 9 ? 2 : 3);
        sim_free(&r);
    }
}
END_TEST

/* ---- streams ---- */

static void drift_of_streams(void *user, int step, int branch, float *e, int horizon) {
    const double *per_step = user; /* [stream * 2 + branch] */
    for (int k = 0; k < horizon; k++) e[k] = (float)per_step[branch];
}

START_TEST(worldcache_streams) {
    /* max_skips 6, threshold .2: k - 1 steps of the largest drift, whichever stream and branch it is of */
    for (int largest = 0; largest < 6; largest++) {
        double e[6] = {.01, .01, .01, .01, .01, .01};
        e[largest] = .07;
        sim_result r = run_with((sim_options){.policy = "worldcache",
                                              .options = "max_skips=6",
                                              .num_steps = 20,
                                              .drift = drift_of_streams,
                                              .user = e,
                                              .num_streams = 3});
        sim_assert_full(&r, 0, 1, 2, 3, 4, 8, 12, 16, 19);
        ck_assert_double_eq_tol(r.steps[7].plan.statistic, .14, 1e-6);
        sim_free(&r);
    }
    double e[6] = {.01, .01, .01, .01, .5, .5}; /* of a stream that there is not */
    sim_result r = run_with((sim_options){.policy = "worldcache",
                                          .options = "max_skips=6",
                                          .num_steps = 20,
                                          .drift = drift_of_streams,
                                          .user = e,
                                          .num_streams = 2});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 11, 18, 19);
    sim_free(&r);
    e[3] = NAN;
    r = run_with((sim_options){.policy = "worldcache",
                               .options = "max_skips=6",
                               .num_steps = 20,
                               .drift = drift_of_streams,
                               .user = e,
                               .num_streams = 2});
    sim_assert_full(&r, 0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 19);
    sim_free(&r);
}
END_TEST

/* ---- speca ---- */

typedef struct {
    double error[2]; /* of the branches */
} verify_user;

static void verify_errors(void *user, int step, rf_signal signal, float out[2][4]) {
    const verify_user *v = user;
    for (int b = 0; b < 2; b++) out[b][0] = (float)(v->error[b] * 16 * 64); /* tokens * width of the made-up run */
}

START_TEST(speca_decisions) {
    /* allowed: max(.01, .1 * .01^(s / 50)) = .1, .0631 at 5, .0398 at 10, .0251 at 15, .01 from 25 on */
    verify_user v = {{0.001, 0.02}};
    sim_options o = {.policy = "speca", .measure = verify_errors, .user = &v};
    for (int which = 0; which < 2; which++) {
        sim_result r = run_with(o);
        int drafted = 0, reads = 0, full_by_error = 0;
        bool asked = false;
        for (int s = 0; s < ALL_STEPS; s++) {
            const rf_step_plan *p = &r.steps[s].plan;
            double allowed = fmax(0.01, 0.1 * pow(0.01, s / 50.0));
            bool full = s < 3 || drafted >= 5;
            if (!full && asked) {
                reads++;
                ck_assert(r.steps[s].read_back);
                ck_assert_double_eq_tol(p->statistic, 0.02, 1e-6);
                ck_assert_double_eq_tol(p->threshold, allowed, 1e-12);
                if (0.02 > allowed) {
                    full = true;
                    full_by_error++;
                }
            }
            drafted = full ? 0 : drafted + 1;
            asked = !full && drafted >= 2;
            ck_assert_int_eq(r.steps[s].kind, full ? RF_STEP_FULL : asked ? RF_STEP_PARTIAL : RF_STEP_SKIP);
            ck_assert_int_eq(p->verify, asked);
            ck_assert(!p->use_verified);
        }
        ck_assert_int_eq(r.num_read_backs, reads);
        ck_assert_int_gt(full_by_error, 5);
        sim_free(&r);
        v = (verify_user){{0.02, 0.001}}; /* the larger error decides, whichever branch it is in */
    }
    o.options = "output=verified";
    sim_result r = run_with(o);
    for (int s = 0; s < ALL_STEPS; s++) ck_assert_int_eq(r.steps[s].plan.use_verified, r.steps[s].plan.verify);
    sim_free(&r);
    o.options = "base=5,decay=1,max=7"; /* never fires */
    r = run_with(o);
    sim_assert_full(&r, 0, 1, 2, 10, 18, 26, 34, 42);
    sim_free(&r);
    v = (verify_user){{9, 9}};
    o.options = "min=3,max=7,first=1"; /* always fires */
    r = run_with(o);
    sim_assert_full(&r, 0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48);
    sim_free(&r);
    v = (verify_user){{NAN, 0}};
    r = run_with(o);
    sim_assert_full(&r, 0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48);
    sim_free(&r);
    o.options = "min=4,max=3"; /* nothing is verified */
    r = run_with(o);
    ck_assert(r.layout.is_static);
    ck_assert_int_eq(r.num_partial, 0);
    sim_free(&r);
    o.options = "min=4,max=4"; /* verified, and nothing to ask about */
    r = run_with(o);
    ck_assert_int_eq(r.num_partial, 9);
    ck_assert_int_eq(r.num_read_backs, 0);
    sim_free(&r);
}
END_TEST

/* ---- every option does something ---- */

static const struct {
    const char *policy, *option, *base, *first, *second;
} variations[] = {
    {"worldcache", "p_stable", "", "0.2", "0.4"},
    {"worldcache", "p_chaotic", "", "0.5", "0.8"},
    {"worldcache", "max_skips", "", "2", "6"},
    {"worldcache", "threshold", "max_skips=6", "0.1", "0.4"},
    {"worldcache", "warmup", "", "5", "10"},
    {"worldcache", "rule", "", "code", "paper"},
    {"worldcache", "time", "", "step", "timestep"},
    {"worldcache", "pooled", "", "false", "true"},
    {"worldcache", "floor", "", "0", "0.1"},
    {"worldcache", "predictor", "", "grouped", "damped"},
    {"worldcache", "predictor", "", "linear", "reuse"},
    {"worldcache", "predictor", "", "hermite", "linear"},
    {"worldcache", "predictor", "", "hermite", "damped"},
    {"worldcache", "skip", "max_skips=6", "cas", "interval"},
    {"fbcache", "threshold", "", "0.05", "0.15"},
    {"fbcache", "warmup", "threshold=.5", "0", "5"},
    {"fbcache", "max_skips", "threshold=.5", "-1", "2"},
    {"dbcache", "fn", "", "1", "2"},
    {"dbcache", "bn", "", "0", "1"},
    {"dbcache", "warmup", "", "4", "8"},
    {"dbcache", "interval", "warmup=8", "1", "2"},
    {"dbcache", "max_cached", "", "-1", "5"},
    {"dbcache", "max_continuous", "", "4", "2"},
    {"dbcache", "threshold", "", "0.05", "0.15"},
    {"dbcache", "accumulate", "", "false", "true"},
    {"dbcache", "calibrator", "", "none", "taylor"},
    {"dbcache", "order", "calibrator=taylor", "1", "2"},
    {"dbcache", "mask", "", "1", "1011"},
    {"deltacache", "interval", "", "2", "3"},
    {"deltacache", "fraction", "", "0.5", "0.75"},
    {"deltacache", "split", "", "0.5", "0.2"},
    {"deltacache", "first", "", "1", "4"},
    {"fora", "interval", "", "2", "3"},
    {"fora", "count", "", "down", "up"},
    {"taylorseer", "interval", "", "4", "5"},
    {"taylorseer", "order", "", "1", "2"},
    {"taylorseer", "order", "", "3", "4"},
    {"taylorseer", "first", "", "2", "4"},
    {"taylorseer", "mode", "", "parts", "last"},
    {"taylorseer", "predictor", "order=2", "taylor", "newton"},
    {"hicache", "interval", "", "5", "6"},
    {"hicache", "order", "", "1", "2"},
    {"hicache", "sigma", "", "0.5", "0.7"},
    {"hicache", "first", "", "3", "5"},
    {"hicache", "mode", "", "parts", "last"},
    {"speca", "order", "", "4", "2"},
    {"speca", "base", "", "0.1", "0.3"},
    {"speca", "decay", "", "0.01", "1"},
    {"speca", "min", "", "2", "3"},
    {"speca", "max", "base=5", "5", "8"},
    {"speca", "first", "", "3", "5"},
    {"speca", "output", "", "draft", "verified"},
    {"pab", "self", "", "2", "3"},
    {"pab", "temporal", "", "4", "3"},
    {"pab", "cross", "", "6", "4"},
    {"pab", "mlp", "", "1", "2"},
    {"pab", "lo", "", "100", "300"},
    {"pab", "hi", "", "850", "600"},
};
#define NUM_VARIATIONS ((int)(sizeof variations / sizeof variations[0]))

static void lively(void *user, int step, rf_signal signal, float out[2][4]) {
    for (int b = 0; b < 2; b++) {
        double v = 0.15 * sim_noise(7, step, (int)signal, b);
        out[b][0] = (float)(signal == RF_SIGNAL_VERIFY ? v * 16 * 64 : v);
        out[b][1] = out[b][3] = 1;
        out[b][2] = (float)(v * v);
    }
}

static void lively_drift(void *user, int step, int branch, float *e, int horizon) {
    for (int k = 1; k <= horizon; k++) e[k - 1] = (float)(0.08 * k * sim_noise(9, step, k, branch));
}

static sim_result run_variation(int i, const char *value) {
    char text[128];
    snprintf(text, sizeof text, "%s%s%s=%s", variations[i].base, variations[i].base[0] ? "," : "", variations[i].option,
             value);
    float timesteps[ALL_STEPS];
    for (int s = 0; s < ALL_STEPS; s++) timesteps[s] = 1000 * (1 - (float)(s * s) / 2600);
    bool temporal = strcmp(variations[i].option, "temporal") == 0;
    return run_with((sim_options){.policy = variations[i].policy,
                                  .options = text,
                                  .kinds = temporal ? four_kinds : three_kinds,
                                  .num_parts = temporal ? 4 : 3,
                                  .timesteps = timesteps,
                                  .measure = lively,
                                  .drift = lively_drift});
}

START_TEST(every_option_changes_something) {
    for (int i = 0; i < NUM_VARIATIONS; i++) {
        sim_result a = run_variation(i, variations[i].first), again = run_variation(i, variations[i].first);
        sim_result b = run_variation(i, variations[i].second);
        ck_assert_msg(sim_same(&a, &again), "%s %s: two equal runs differ", variations[i].policy, variations[i].option);
        ck_assert_msg(!sim_same(&a, &b), "%s: %s=%s and %s do the same", variations[i].policy, variations[i].option,
                      variations[i].first, variations[i].second);
        sim_free(&a);
        sim_free(&again);
        sim_free(&b);
    }
    for (int p = 0; p < NUM_MINE; p++) {
        const rf_policy_def *def = rf_policy_find(mine[p]);
        ck_assert_ptr_nonnull(def);
        for (int o = 0; o < def->num_options; o++) {
            bool covered = false;
            for (int i = 0; i < NUM_VARIATIONS; i++) {
                covered |= strcmp(variations[i].policy, mine[p]) == 0 &&
                           strcmp(variations[i].option, def->options[o].name) == 0;
            }
            ck_assert_msg(covered, "%s: option %s is not varied", mine[p], def->options[o].name);
        }
    }
}
END_TEST

/* Reading more often than asked must change nothing: no plan looks at what it did not ask for. */
START_TEST(signals_are_asked_for) {
    for (int i = 0; i < NUM_MINE; i++) {
        sim_options o = {
            .policy = mine[i], .kinds = three_kinds, .num_parts = 3, .measure = lively, .drift = lively_drift};
        sim_result asked = run_with(o);
        o.read_always = true;
        sim_result always = run_with(o);
        ck_assert_msg(sim_same(&asked, &always), "%s", mine[i]);
        sim_free(&asked);
        sim_free(&always);
    }
}
END_TEST

/* ---- refusals ---- */

static void assert_refused(sim_options o, rf_status status, const char *part) {
    sim_result r;
    rf_error err = {0};
    rf_assert_fails(sim_try(&r, &o, &err), err, status, part);
    sim_free(&r);
}

static void assert_accepted(sim_options o) {
    sim_result r = run_with(o);
    sim_free(&r);
}

START_TEST(refusals) {
    static const struct {
        const char *policy, *options;
        bool smooth; /* needs a solver without noise */
        int steps;   /* the least */
    } list[] = {
        {"worldcache", NULL, true, 9},
        {"worldcache", "warmup=10", true, 12},
        {"fbcache", NULL, false, 2},
        {"fbcache", "warmup=4", false, 5},
        {"dbcache", NULL, false, 5},
        {"dbcache", "calibrator=taylor", true, 5},
        {"deltacache", NULL, false, 9},
        {"fora", NULL, false, 9},
        {"taylorseer", NULL, true, 9},
        {"taylorseer", "order=0", false, 9},
        {"taylorseer", "first=12", true, 13},
        {"hicache", NULL, true, 9},
        {"speca", NULL, true, 9},
        {"pab", NULL, false, 9},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        sim_options o = {.policy = list[i].policy, .options = list[i].options, .stochastic = true};
        if (list[i].smooth) {
            assert_refused(o, RF_ERR_UNSUPPORTED, "noise");
            o.force = true;
        }
        assert_accepted(o);
        o = (sim_options){.policy = list[i].policy, .options = list[i].options, .num_steps = list[i].steps};
        assert_accepted(o);
        o.num_steps--;
        char number[32];
        snprintf(number, sizeof number, " %d steps", list[i].steps);
        assert_refused(o, RF_ERR_UNSUPPORTED, number);
        o.force = true;
        assert_accepted(o);
    }
    assert_refused((sim_options){.policy = "worldcache", .options = "p_stable=.7"}, RF_ERR_ARGUMENT, "p_chaotic");
    assert_refused((sim_options){.policy = "fbcache", .num_blocks = 1}, RF_ERR_UNSUPPORTED, "nothing is left");
    assert_refused((sim_options){.policy = "dbcache", .options = "fn=2,bn=2"}, RF_ERR_UNSUPPORTED, "leave nothing");
    assert_refused((sim_options){.policy = "dbcache", .options = "fn=4"}, RF_ERR_UNSUPPORTED, "leave nothing");
    assert_refused((sim_options){.policy = "dbcache", .options = "mask=1012"}, RF_ERR_ARGUMENT, "mask");
    assert_refused((sim_options){.policy = "taylorseer", .options = "mode=last,order=4"}, RF_ERR_ARGUMENT,
                   "hidden states");
    assert_refused((sim_options){.policy = "hicache", .options = "mode=last,order=4"}, RF_ERR_ARGUMENT,
                   "hidden states");
    assert_accepted((sim_options){.policy = "dbcache", .options = "fn=2,bn=1"});
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching: worldcache, blocks, parts");
    TCase *schedules = tcase_create("schedules");
    tcase_add_test(schedules, schedules_of_taylorseer);
    tcase_add_test(schedules, schedules_of_flux);
    tcase_add_test(schedules, schedules_of_worldcache);
    tcase_add_test(schedules, schedules_of_fora);
    tcase_add_test(schedules, never_skip_settings);
    tcase_add_test(schedules, forced_steps_are_full);
    suite_add_tcase(suite, schedules);
    TCase *weights = tcase_create("weights");
    tcase_add_test(weights, constant_trajectories_stay);
    tcase_add_test(weights, linear_trajectories);
    tcase_add_test(weights, quadratic_trajectories);
    tcase_add_test(weights, history_of_taylor);
    tcase_add_test(weights, worldcache_weights);
    tcase_add_test(weights, worldcache_closed_form);
    tcase_add_test(weights, worldcache_timesteps);
    tcase_add_test(weights, worldcache_measured);
    suite_add_tcase(suite, weights);
    TCase *decisions = tcase_create("decisions");
    tcase_add_test(decisions, worldcache_adaptive_schedule);
    tcase_add_test(decisions, worldcache_nan_is_full);
    tcase_add_test(decisions, worldcache_variants);
    tcase_add_test(decisions, fbcache_decisions);
    tcase_add_test(decisions, one_decision_for_both_branches);
    tcase_add_test(decisions, dbcache_decisions);
    tcase_add_test(decisions, deltacache_ranges);
    tcase_add_test(decisions, part_level_layouts);
    tcase_add_test(decisions, pab_ranges);
    tcase_add_test(decisions, temporal_parts);
    tcase_add_test(decisions, worldcache_streams);
    tcase_add_test(decisions, runs_that_begin_with_a_snapshot);
    tcase_add_test(decisions, no_slope_across_runs);
    tcase_add_test(decisions, speca_decisions);
    suite_add_tcase(suite, decisions);
    TCase *options = tcase_create("options");
    tcase_add_test(options, every_option_changes_something);
    tcase_add_test(options, signals_are_asked_for);
    tcase_add_test(options, refusals);
    suite_add_tcase(suite, options);
    return rf_run_suite(suite);
}
