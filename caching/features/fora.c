/* caching/features/fora.c - FORA: fast-forward caching in diffusion transformer acceleration, arXiv 2407.01425.
 *
 * Every interval-th step is FULL; between them each part of each block gives what it gave at the last FULL step, before
 * its gate:
 *   x += gate(t_s) * y_cached, for attention and MLP of every block, gates and modulations of the current step
 * Which steps: the released code counts steps downwards, i = T - 1 - s, and computes where i % interval == 0 and at the
 * first step, so the last step is always FULL (count=down). count=up counts s as the paper's text does.
 *
 * Order of tests: forced, no history, i % interval. The schedule is by index: a forced step does not shift it. Carried:
 * the first step is as i says, no more FULL in any case. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { INTERVAL, COUNT, NUM_OPTIONS };
enum { DOWN, UP };

static const rf_policy_option options[NUM_OPTIONS] = {
    [INTERVAL] = {"interval", RF_OPTION_INT, "3", 1, 10000, NULL,
                  "steps from one full step to the next; 1 = never reuse"},
    [COUNT] = {"count", RF_OPTION_CHOICE, "down", 0, 0, "down up",
               "count steps from the last one (so that it is full) or from the first"},
};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st = rf_policy_refuse_few_steps(policy, shape, RF_SCHEDULE_MIN_STEPS, err);
    if (st != RF_OK) return st;
    layout->is_static = true;
    rf_schedule_keep_parts(shape, layout, 1);
    return RF_OK;
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    int count = rf_policy_int(policy, COUNT) == UP ? ctx->step : ctx->shape->num_steps - 1 - ctx->step;
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    bool full = ctx->force_full || ctx->num_stored == 0 || count % rf_policy_int(policy, INTERVAL) == 0;
    rf_schedule_set_kind(ctx->shape, out, full, false);
}

const rf_policy_def rf_policy_fora = {
    .name = "fora",
    .family = "feature",
    .level = "part",
    .paper = "FORA: fast-forward caching in diffusion transformer acceleration, arXiv 2407.01425",
    .summary = "between full steps reuses the output of every attention and MLP",
    .fits = "any denoiser, any solver; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .plan = plan,
};
