/* caching/features/deltacache.c - Delta-DiT: training-free acceleration of diffusion transformers, arXiv 2406.01125.
 *
 * What a range of n blocks adds to the hidden state (its delta, x after minus x before) is kept from every FULL step
 * and added to the current hidden state between them. Rear blocks make detail, front blocks the outline, so
 *   s < split * T    the rear blocks [L - n, L) are replaced
 *   later            the front blocks [0, n)
 * FULL while s < first, then every interval-th step, counted from the last FULL one. n = fraction * L, rounded; with
 * n = L no block runs on the steps between, and there is one range only.
 * The paper's split and counts were not at hand: the defaults are half the steps, and three quarters of the blocks
 * every second step, which computes 1 / 1.6 of the blocks, the speed-up that the paper claims.
 *
 * Order of tests: forced, no history, s < first, interval. Overlapping ranges (n > L / 2) are each complete by
 * themselves. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { INTERVAL, FRACTION, SPLIT, FIRST, NUM_OPTIONS };
enum { FRONT, REAR };

static const rf_policy_option options[NUM_OPTIONS] = {
    [INTERVAL] = {"interval", RF_OPTION_INT, "2", 1, 10000, NULL,
                  "steps from one full step to the next; 1 = never reuse"},
    [FRACTION] = {"fraction", RF_OPTION_DOUBLE, "0.75", 0, 1, NULL,
                  "share of the blocks that is replaced; 0 = never reuse"},
    [SPLIT] = {"split", RF_OPTION_DOUBLE, "0.5", 0, 1, NULL,
               "share of the steps that replace rear blocks; the steps after replace front blocks"},
    [FIRST] = {"first", RF_OPTION_INT, "1", 1, 10000, NULL, "first steps that are always full"},
};

static int replaced_blocks(const rf_policy *policy, const rf_cache_shape *shape) {
    return (int)lround(rf_policy_double(policy, FRACTION) * shape->num_blocks);
}

/* Which range step replaces; with all n = L blocks they are the same. */
static int range_of(const rf_policy *policy, const rf_cache_shape *shape, int step) {
    bool early = step < rf_policy_double(policy, SPLIT) * shape->num_steps;
    return early && replaced_blocks(policy, shape) < shape->num_blocks ? REAR : FRONT;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st =
        rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps((int)rf_policy_int(policy, FIRST) + 1), err);
    if (st != RF_OK) return st;
    layout->is_static = true;
    int n = replaced_blocks(policy, shape), num_blocks = shape->num_blocks;
    if (n == 0) return RF_OK;
    for (int s = 0; s < shape->num_steps; s++) {
        int range = range_of(policy, shape, s);
        layout->spans[range] = (rf_cache_span){.begin = range == REAR ? num_blocks - n : 0,
                                               .end = range == REAR ? num_blocks : n,
                                               .depth = 1,
                                               .delta = true};
    }
    return RF_OK;
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    const rf_cache_shape *shape = ctx->shape;
    int n = replaced_blocks(policy, shape);
    rf_schedule_begin_plan(ctx, out);
    if (n == 0) return;
    out->produce = RF_PRODUCE_SPAN;
    out->span = range_of(policy, shape, ctx->step);
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    if (rf_schedule_is_full(ctx, (int)rf_policy_int(policy, FIRST), (int)rf_policy_int(policy, INTERVAL))) return;
    out->kind = n == shape->num_blocks ? RF_STEP_SKIP : RF_STEP_PARTIAL;
}

const rf_policy_def rf_policy_deltacache = {
    .name = "deltacache",
    .family = "feature",
    .level = "block",
    .paper = "Delta-DiT: a training-free acceleration method tailored for diffusion transformers, arXiv 2406.01125",
    .summary = "between full steps reuses what rear blocks (early steps) or front blocks (late steps) added",
    .fits = "any denoiser, any solver; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .plan = plan,
};
