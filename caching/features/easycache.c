/* caching/features/easycache.c - EasyCache: training-free video diffusion acceleration, arXiv 2507.02860.
 *
 * With x the model's input and out its output
 *   kappa = mean |out_s - out_s'| / mean |x_s - x_s'|       of the last two FULL steps s, s'
 *   eps   = kappa mean |x_s - x_(s-1)| / mean |out_F|       at every step, out_F of the last FULL step;   acc += eps
 *   acc < threshold  SKIP: out = x + (out - x) of the last FULL step;   else FULL, acc = 0
 * Input and output have the same columns (those the solver uses), so sums stand for means.
 *
 * Order of tests: s < first FULL, acc = 0; last step FULL (if `last`); fewer than 2 FULL steps FULL; acc + eps >=
 * threshold FULL; else SKIP. The conditional branch decides for both (branch=any: the larger acc). Nothing of the model
 * runs on a SKIP. threshold=0 never skips. eps that cannot be formed (input at rest or output 0 while the other moves)
 * asks for FULL. Carried: step 0 takes the carried difference; after that the rule, with no first steps: two FULL steps
 * have to tell kappa. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { THRESHOLD, FIRST, LAST, BRANCH, NUM_OPTIONS };
enum { COND, ANY };

#define UNKNOWN_CHANGE 1e30 /* finite: it is shown to people */

static const rf_policy_option options[NUM_OPTIONS] = {
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.025", 0, 1000, NULL,
                   "summed change of the output, as estimated, at which a step is computed; 0 never skips"},
    [FIRST] = {"first", RF_OPTION_INT, "5", 1, 1000, NULL, "steps computed at the start"},
    [LAST] = {"last", RF_OPTION_BOOL, "true", 0, 1, NULL, "the last step is always computed"},
    [BRANCH] = {"branch", RF_OPTION_CHOICE, "cond", 0, 0, "cond any",
                "which branch's change counts: the conditional one's, or the larger"},
};

typedef struct {
    double acc[2];
} easy_state;

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    if (rf_policy_double(policy, THRESHOLD) > 0) {
        int first = (int)rf_policy_int(policy, FIRST);
        int min_steps = (first > 2 ? first : 2) + rf_policy_bool(policy, LAST) + 1;
        rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
        if (st != RF_OK) return st;
    }
    if (shape->pred_cols != shape->in_cols) {
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "policy easycache: %s must put out what it takes in, %lld columns a token, found %lld",
                       shape->model, (long long)shape->in_cols, (long long)shape->pred_cols);
    }
    layout->output_depth = 1;
    layout->output_delta = true;
    layout->signals = (1u << RF_SIGNAL_INPUT_STEP) | (1u << RF_SIGNAL_INPUT_REFRESH) |
                      (1u << RF_SIGNAL_OUTPUT_REFRESH) | (1u << RF_SIGNAL_OUTPUT_SIZE);
    return RF_OK;
}

static bool never_or_last(const rf_policy *policy, const rf_step_ctx *ctx) {
    return ctx->force_full || rf_policy_double(policy, THRESHOLD) <= 0 ||
           rf_ctx_warms_up(ctx, rf_policy_int(policy, FIRST)) ||
           (rf_policy_bool(policy, LAST) && ctx->step == ctx->shape->num_steps - 1);
}

/* Computed whatever the signals say. */
static bool is_fixed(const rf_policy *policy, const rf_step_ctx *ctx) {
    return ctx->num_stored < 2 || never_or_last(policy, ctx);
}

static bool wants_signals(const rf_policy *policy, const void *state, const rf_step_ctx *ctx) {
    return !is_fixed(policy, ctx);
}

/* a / b, 0 if both are 0, UNKNOWN_CHANGE if only b is. */
static double ratio(double a, double b) {
    if (a == 0 && b == 0) return 0;
    double r = b > 0 ? a / b : UNKNOWN_CHANGE;
    return r <= UNKNOWN_CHANGE ? r : UNKNOWN_CHANGE; /* and NaN */
}

static double change_of(const rf_step_ctx *ctx, int branch) {
    double moved = ctx->signals[RF_SIGNAL_INPUT_STEP][branch][0];
    double kappa =
        ratio(ctx->signals[RF_SIGNAL_OUTPUT_REFRESH][branch][0], ctx->signals[RF_SIGNAL_INPUT_REFRESH][branch][0]);
    if (kappa >= UNKNOWN_CHANGE) return UNKNOWN_CHANGE;
    return ratio(kappa * moved, ctx->signals[RF_SIGNAL_OUTPUT_SIZE][branch][0]);
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    easy_state *s = state;
    int branches = rf_policy_int(policy, BRANCH) == COND ? 1 : ctx->shape->branches;
    bool full = !(rf_ctx_on_carried(ctx) && ctx->step == 0) || never_or_last(policy, ctx);
    rf_schedule_begin_plan(ctx, plan);
    if (!is_fixed(policy, ctx)) {
        double change[2] = {0};
        for (int b = 0; b < branches; b++) change[b] = change_of(ctx, b);
        full = rf_schedule_add_up(s->acc, change, branches, rf_policy_double(policy, THRESHOLD), plan);
    }
    if (full) s->acc[0] = s->acc[1] = 0;
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = RF_PRODUCE_OUTPUT;
    if (ctx->num_stored > 0) plan->num_terms = rf_predict_reuse(plan->weights[0]);
}

const rf_policy_def rf_policy_easycache = {
    .name = "easycache",
    .family = "feature",
    .level = "step",
    .paper =
        "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching, arXiv 2507.02860",
    .summary = "skips while the output's change, estimated from the input's, stays small",
    .fits = "every model that puts out what it takes in; a solver that adds no noise, at 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(easy_state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan_step,
};
