/* caching/features/dbcache.c - DBCache, dual block cache, and its Taylor calibrator (cache-dit; documentation only).
 *
 * The first fn blocks and the last bn always run. The residual r of the blocks between, (x before the last bn) - (x
 * after the first fn), is kept. With d = what the first fn blocks add and d_ref = d of the last computed step:
 *   rho = sum |d - d_ref| / sum |d_ref|; accumulate: rho is summed over the steps since the last full one
 *   rho < threshold: x := x + calibrated r, then the last bn blocks
 * threshold >= 1 means always and needs no probe: a static schedule by warmup and bounds alone.
 * Calibrator taylor: r is extrapolated from the last order + 1 full steps as in TaylorSeer (from step 1 on).
 *
 * Order of tests: forced, no history; warm-up (steps 0, interval, 2 interval, .. below warmup; steps of warmup between
 * them may be reused) or, if a mask is given, its 1s instead; threshold <= 0; max_cached reached; max_continuous
 * reached; the probe.
 * Carried: no warm-up (a mask stays as it is), and d_ref is the carried snapshot's.
 * Traps: max_cached and max_continuous of -1 are no bound, of 0 never reuse. In a mask 0 means may reuse, not must. */
#include <string.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum {
    FN,
    BN,
    WARMUP,
    INTERVAL,
    MAX_CACHED,
    MAX_CONTINUOUS,
    THRESHOLD,
    ACCUMULATE,
    CALIBRATOR,
    ORDER,
    MASK,
    NUM_OPTIONS
};
enum { NONE, TAYLOR };
#define TAYLOR_FIRST 3 /* "from step > 1" in terms of rf_schedule_history */

static const rf_policy_option options[NUM_OPTIONS] = {
    [FN] = {"fn", RF_OPTION_INT, "1", 1, 10000, NULL, "first blocks that always run, and decide"},
    [BN] = {"bn", RF_OPTION_INT, "0", 0, 10000, NULL, "last blocks that always run"},
    [WARMUP] = {"warmup", RF_OPTION_INT, "4", 0, 10000, NULL, "steps of warm-up"},
    [INTERVAL] = {"interval", RF_OPTION_INT, "1", 1, 10000, NULL, "every how many-th step of warm-up is full"},
    [MAX_CACHED] = {"max_cached", RF_OPTION_INT, "-1", -1, 10000, NULL,
                    "most reusing steps of a run; -1 = no bound, 0 = never reuse"},
    [MAX_CONTINUOUS] = {"max_continuous", RF_OPTION_INT, "4", -1, 10000, NULL,
                        "most reusing steps in a row; -1 = no bound, 0 = never reuse"},
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.12", 0, 1e6, NULL,
                   "reuse while the first blocks' change is below this; 0 = never, 1 or more = always"},
    [ACCUMULATE] = {"accumulate", RF_OPTION_BOOL, "false", 0, 0, NULL,
                    "sum the change over steps since the last full one"},
    [CALIBRATOR] = {"calibrator", RF_OPTION_CHOICE, "none", 0, 0, "none taylor",
                    "how the middle's residual is predicted"},
    [ORDER] = {"order", RF_OPTION_INT, "1", 1, 4, NULL, "order of the Taylor calibrator"},
    [MASK] = {"mask", RF_OPTION_TEXT, "", 0, 0, NULL,
              "one 1 (full) or 0 (may reuse) a step, in place of warmup; steps behind its end are 0"},
};

typedef struct {
    double sum; /* of rho since the last full step */
} state;

static bool is_always(const rf_policy *policy) {
    return rf_policy_double(policy, THRESHOLD) >= 1;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    const char *mask = rf_policy_text(policy, MASK);
    if (mask[strspn(mask, "01")] != '\0') {
        return rf_fail(err, RF_ERR_ARGUMENT, "dbcache: mask '%s' has a character that is neither 0 nor 1", mask);
    }
    int64_t fn = rf_policy_int(policy, FN), bn = rf_policy_int(policy, BN);
    if (fn + bn >= shape->num_blocks) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "dbcache: fn %lld + bn %lld leave nothing of the %d blocks of '%s'",
                       (long long)fn, (long long)bn, shape->num_blocks, shape->model);
    }
    bool taylor = rf_policy_int(policy, CALIBRATOR) == TAYLOR;
    rf_status st = taylor ? rf_policy_refuse_stochastic(policy, shape, err) : RF_OK;
    if (st != RF_OK) return st;
    int warmup = mask[0] ? 1 : (int)rf_policy_int(policy, WARMUP);
    bool gaps = !mask[0] && rf_policy_int(policy, INTERVAL) > 1;
    st = rf_policy_refuse_few_steps(policy, shape, (warmup > 1 && !gaps ? warmup : 1) + 1, err);
    if (st != RF_OK) return st;

    layout->spans[0] = (rf_cache_span){.begin = (int)fn,
                                       .end = shape->num_blocks - (int)bn,
                                       .depth = taylor ? (int)rf_policy_int(policy, ORDER) + 1 : 1,
                                       .delta = true};
    layout->is_static = is_always(policy);
    if (!layout->is_static) {
        layout->probe_blocks = (int)fn;
        layout->signals = 1u << RF_SIGNAL_PROBE;
    }
    return RF_OK;
}

/* Only the probe's signal counts, and that is always read. */
static bool wants_signals(const rf_policy *policy, const void *memory, const rf_step_ctx *ctx) {
    return false;
}

static void plan_span(const rf_policy *policy, const rf_step_ctx *ctx, rf_step_plan *out) {
    rf_schedule_begin_plan(ctx, out);
    out->produce = RF_PRODUCE_SPAN;
    out->span = 0;
    if (ctx->num_stored == 0) return;
    if (rf_policy_int(policy, CALIBRATOR) == TAYLOR) {
        out->num_terms = rf_predict_taylor(out->weights[0], ctx->stored, rf_schedule_history(ctx, TAYLOR_FIRST),
                                           ctx->step, (int)rf_policy_int(policy, ORDER));
    } else {
        out->num_terms = rf_predict_reuse(out->weights[0]);
    }
}

static bool is_warming_up(const rf_policy *policy, const rf_step_ctx *ctx) {
    const char *mask = rf_policy_text(policy, MASK);
    int step = ctx->step;
    if (mask[0]) return (size_t)step < strlen(mask) && mask[step] == '1';
    return rf_ctx_warms_up(ctx, rf_policy_int(policy, WARMUP)) && step % rf_policy_int(policy, INTERVAL) == 0;
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    state *st = memory;
    int64_t max_cached = rf_policy_int(policy, MAX_CACHED), max_run = rf_policy_int(policy, MAX_CONTINUOUS);
    plan_span(policy, ctx, out);
    /* every step so far was full or reusing; horizon - 1 of them reused since the last full one */
    bool full = ctx->force_full || ctx->num_stored == 0 || is_warming_up(policy, ctx) ||
                rf_policy_double(policy, THRESHOLD) <= 0 ||
                (max_cached >= 0 && ctx->step - rf_schedule_num_full(ctx) >= max_cached) ||
                (max_run >= 0 && out->horizon > max_run);
    if (full) st->sum = 0;
    out->kind = full ? RF_STEP_FULL : is_always(policy) ? RF_STEP_PARTIAL : RF_STEP_PROBE;
}

static void plan_probe(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    state *st = memory;
    plan_span(policy, ctx, out);
    double rho = rf_ctx_max_rel1(ctx, RF_SIGNAL_PROBE);
    st->sum += rho;
    out->statistic = rf_policy_bool(policy, ACCUMULATE) ? st->sum : rho;
    out->threshold = rf_policy_double(policy, THRESHOLD);
    out->kind = out->statistic < out->threshold ? RF_STEP_PARTIAL : RF_STEP_FULL;
    if (out->kind == RF_STEP_FULL) st->sum = 0;
}

const rf_policy_def rf_policy_dbcache = {
    .name = "dbcache",
    .family = "feature",
    .level = "block",
    .paper = "DBCache, dual block cache (cache-dit; no paper)",
    .summary = "first and last blocks always run; the middle's residual is reused or extrapolated while the first ones "
               "change little",
    .fits = "models of more than fn + bn blocks; any number of steps; calibrator=taylor: solvers that add no noise",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan,
    .plan_probe = plan_probe,
};
