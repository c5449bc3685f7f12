/* caching/features/interval.c - a step in `interval` is computed, the others are predicted: the static control of every
 * method here.
 *
 * No paper of its own: FORA (arXiv 2407.01425) and TaylorSeer (arXiv 2503.06923) with one feature kept for the whole
 * stack, their "lite" forms. What is kept is the model's output, the residual of the stack (output - input of all
 * blocks) or its last hidden state; it is predicted by reuse (order 0), Taylor differences or the polynomial through
 * the last order + 1 snapshots.
 *
 * Order of tests: s < first FULL; last step FULL (if `last`); s - s_F >= interval FULL; else SKIP with k = s - s_F.
 * interval=1 never skips. A step forced FULL restarts the count. Carried: counted from the carried snapshot's step. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { INTERVAL, FIRST, LAST, LEVEL, ORDER, PREDICTOR, NUM_OPTIONS };
enum { LEVEL_OUTPUT, LEVEL_RESIDUAL, LEVEL_HIDDEN };
enum { TAYLOR, NEWTON };

static const rf_policy_option options[NUM_OPTIONS] = {
    [INTERVAL] = {"interval", RF_OPTION_INT, "3", 1, 1000, NULL, "one step in so many is computed; 1 never skips"},
    [FIRST] = {"first", RF_OPTION_INT, "1", 1, 1000, NULL, "steps computed at the start"},
    [LAST] = {"last", RF_OPTION_BOOL, "true", 0, 1, NULL, "the last step is always computed"},
    [LEVEL] = {"level", RF_OPTION_CHOICE, "output", 0, 0, "output residual hidden",
               "what is kept: the model's output, what all blocks add to their input, or what they put out"},
    [ORDER] = {"order", RF_OPTION_INT, "0", 0, 3, NULL, "order of the prediction; 0 reuses the newest"},
    [PREDICTOR] = {"predictor", RF_OPTION_CHOICE, "taylor", 0, 0, "taylor newton",
                   "for order 2 and 3, and uneven gaps: TaylorSeer's differences, or the exact polynomial"},
};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    int depth = (int)rf_policy_int(policy, ORDER) + 1, level = (int)rf_policy_int(policy, LEVEL);
    if (rf_policy_int(policy, INTERVAL) > 1) {
        int min_steps = (int)rf_policy_int(policy, FIRST) + rf_policy_bool(policy, LAST) + 1;
        rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
        if (st != RF_OK) return st;
    }
    layout->is_static = true;
    if (level == LEVEL_OUTPUT) {
        layout->output_depth = depth;
    } else {
        rf_schedule_keep_last(shape, layout, depth);
        layout->spans[0].delta = level == LEVEL_RESIDUAL;
    }
    return RF_OK;
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    int order = (int)rf_policy_int(policy, ORDER);
    bool full = rf_schedule_is_full(ctx, (int)rf_policy_int(policy, FIRST), (int)rf_policy_int(policy, INTERVAL));
    full |= rf_policy_bool(policy, LAST) && ctx->step == ctx->shape->num_steps - 1;
    rf_schedule_begin_plan(ctx, plan);
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = rf_policy_int(policy, LEVEL) == LEVEL_OUTPUT ? RF_PRODUCE_OUTPUT : RF_PRODUCE_SPAN;
    plan->num_terms = rf_policy_int(policy, PREDICTOR) == NEWTON
                          ? rf_predict_newton(plan->weights[0], ctx->stored, ctx->num_stored, ctx->step, order)
                          : rf_predict_taylor(plan->weights[0], ctx->stored, ctx->num_stored, ctx->step, order);
}

const rf_policy_def rf_policy_interval = {
    .name = "interval",
    .family = "feature",
    .level = "step",
    .paper = "static control; as FORA (arXiv 2407.01425) and TaylorSeer (arXiv 2503.06923) on one feature",
    .summary = "computes one step in N, reuses or extrapolates the others",
    .fits = "every model, with a solver that adds no noise, at 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .plan = plan_step,
};
