/* caching/features/spectrum.c - Spectrum: features as Chebyshev polynomials of time, arXiv 2603.01623 (CVPR 2026).
 *
 * Kept: the last block's output (or the model's output) of all FULL steps. A skipped step is
 *   blend * ridge + (1 - blend) * linear
 *   ridge    w' = b(tau)' (B'B + lambda I)^-1 B',  rows of B = T_0..T_degree at the snapshots,  tau = 2 s / span - 1
 *   linear   through the newest two snapshots
 * Schedule, with a window W that starts at `window` and grows:
 *   s < first                                             FULL
 *   (skips since FULL + 1) mod max(1, floor(W)) = 0       FULL, and W += flex (rounded to 3 decimals)
 *   else                                                  SKIP
 *
 * Order of tests: s < first; last step (if `last`, which the reference does not have; no growth); window. A step forced
 * FULL after `first` makes the window grow as any other. window=1,flex=0 never skips.
 * Pitfalls - lambda = .1 shrinks: the ridge's weights have a sum of .88 to .94 (blend=.5 halves that). Paper: blend=1;
 *            ports: .5.
 *          - span is 50 in the reference whatever the number of steps is; 0 takes the number of steps.
 *          - All snapshots are kept, as many as the schedule will use before its last skip, at most `history`.
 * Weights are the same for both branches; data is never looked at. */
#include <math.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { FIRST, WINDOW, FLEX, DEGREE, LAMBDA, BLEND, SPAN, HISTORY, LEVEL, LAST, NUM_OPTIONS };
enum { HIDDEN, OUTPUT };

static const rf_policy_option options[NUM_OPTIONS] = {
    [FIRST] = {"first", RF_OPTION_INT, "5", 1, 1000, NULL, "steps computed at the start"},
    [WINDOW] = {"window", RF_OPTION_DOUBLE, "2", 1, 1000, NULL,
                "one step in so many is computed at first; 1 with flex=0 never skips"},
    [FLEX] = {"flex", RF_OPTION_DOUBLE, "0.75", 0, 1000, NULL, "growth of the window with every computed step"},
    [DEGREE] = {"degree", RF_OPTION_INT, "4", 0, 15, NULL, "degree of the Chebyshev polynomial"},
    [LAMBDA] = {"lambda", RF_OPTION_DOUBLE, "0.1", 0, 1000, NULL, "weight of the ridge; 0 fits without"},
    [BLEND] = {"blend", RF_OPTION_DOUBLE, "0.5", 0, 1, NULL,
               "share of the polynomial; the rest is linear extrapolation"},
    [SPAN] = {"span", RF_OPTION_INT, "50", 0, 10000, NULL, "steps that the polynomial spans; 0 = those of the run"},
    [HISTORY] = {"history", RF_OPTION_INT, "64", 1, RF_CACHE_MAX_TERMS, NULL, "most snapshots kept"},
    [LEVEL] = {"level", RF_OPTION_CHOICE, "hidden", 0, 0, "hidden output",
               "what is kept: the last block's output, or the model's (far smaller)"},
    [LAST] = {"last", RF_OPTION_BOOL, "false", 0, 1, NULL, "the last step is always computed"},
};

typedef struct {
    double grown; /* window - its start */
} spectrum_state;

static bool never_skips(const rf_policy *policy) {
    return rf_policy_double(policy, WINDOW) < 2 && rf_policy_double(policy, FLEX) == 0;
}

/* Decides a step and moves the window on; skips: since the last FULL step. */
static bool decide(const rf_policy *policy, spectrum_state *s, int step, int num_steps, int skips, bool forced) {
    if (step < rf_policy_int(policy, FIRST)) return true;
    if (rf_policy_bool(policy, LAST) && step == num_steps - 1) return true;
    int window = (int)floor(rf_policy_double(policy, WINDOW) + s->grown);
    if (window < 1) window = 1;
    if (!forced && (skips + 1) % window != 0) return false;
    s->grown = rint((s->grown + rf_policy_double(policy, FLEX)) * 1000) / 1000;
    return true;
}

/* Snapshots that there are when the last skipped step is predicted, without forced steps. */
static int count_snapshots(const rf_policy *policy, int num_steps) {
    spectrum_state s = {0};
    int num_full = 0, last_full = 0, used = 1;
    for (int step = 0; step < num_steps; step++) {
        if (decide(policy, &s, step, num_steps, step - last_full - 1, false)) {
            num_full++;
            last_full = step;
        } else {
            used = num_full;
        }
    }
    return used;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    if (!never_skips(policy)) {
        int min_steps = (int)rf_policy_int(policy, FIRST) + rf_policy_bool(policy, LAST) + 1;
        rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
        if (st != RF_OK) return st;
    }
    int depth = count_snapshots(policy, shape->num_steps), most = (int)rf_policy_int(policy, HISTORY);
    if (depth > most) depth = most;
    layout->is_static = true;
    if (rf_policy_int(policy, LEVEL) == OUTPUT) {
        layout->output_depth = depth;
    } else {
        rf_schedule_keep_last(shape, layout, depth);
    }
    return RF_OK;
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    bool output = rf_policy_int(policy, LEVEL) == OUTPUT;
    int depth = output ? ctx->layout->output_depth : ctx->layout->spans[0].depth;
    int num = ctx->num_stored < depth ? ctx->num_stored : depth;
    double span = (double)rf_policy_int(policy, SPAN);
    int skips = ctx->num_stored > 0 ? ctx->step - ctx->stored[0] - 1 : 0;
    bool full = decide(policy, state, ctx->step, ctx->shape->num_steps, skips, ctx->force_full);
    rf_schedule_begin_plan(ctx, plan);
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = output ? RF_PRODUCE_OUTPUT : RF_PRODUCE_SPAN;
    plan->num_terms = rf_predict_chebyshev(plan->weights[0], ctx->stored, num, ctx->step,
                                           (int)rf_policy_int(policy, DEGREE), rf_policy_double(policy, LAMBDA),
                                           span > 0 ? span : ctx->shape->num_steps, rf_policy_double(policy, BLEND));
}

const rf_policy_def rf_policy_spectrum = {
    .name = "spectrum",
    .family = "feature",
    .level = "step",
    .paper = "Spectrum: adaptive spectral feature forecasting, arXiv 2603.01623",
    .summary = "computes ever more rarely, forecasts by a ridge fit of Chebyshev polynomials over all computed steps",
    .fits = "every model with room for its snapshots; a solver that adds no noise, at 9 steps or more (best near 50)",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(spectrum_state),
    .setup = setup,
    .plan = plan_step,
};
