/* caching/features/duca.c - DuCa: dual feature caching, arXiv 2412.18911.
 *
 * FULL steps as in toca.c. With k = steps since the last full one
 *   k odd    token rows as in toca.c
 *   k even   no block runs: the output of the last full step is taken again
 * The released code takes over what its last layer left behind; here that is the model's output, of which only full
 * steps keep a snapshot. Rows are scored by value norm, s1 = sum over heads of 1 - |v|, which fused attention can give.
 * Order of tests: those of toca.c, then k. The drift guard compares outputs. Never skips with interval=1. An odd step
 * whose parts all compute all rows is a FULL step, and k counts from it; one whose parts compute none skips parts.
 * Defaults: DiT, ratio .05. PixArt: ratio=.75 with the weights named in toca.c. */
#include "caching/features/schedule.h"
#include "caching/features/toca.h"

static const rf_policy_option options[RF_TOCA_NUM_OPTIONS] = {RF_TOCA_OPTIONS("0.05", "value")};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st = rf_toca_setup(policy, shape, layout, err);
    layout->output_depth = 1;
    return st;
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    out->produce = RF_PRODUCE_OUTPUT;
    if (rf_toca_is_full(policy, memory, ctx)) return;
    if (out->horizon % 2 == 0) {
        out->kind = RF_STEP_SKIP;
    } else {
        rf_toca_fill_parts(policy, ctx, out);
        if (out->kind == RF_STEP_FULL) out->produce = RF_PRODUCE_OUTPUT;
    }
}

const rf_policy_def rf_policy_duca = {
    .name = "duca",
    .family = "feature",
    .level = "token",
    .paper = "Accelerating diffusion transformers with dual feature caching (DuCa), arXiv 2412.18911",
    .summary = "between full steps, in turn: token rows as in toca, and the whole output taken again",
    .fits = "blocks of one self-attention and MLPs; any solver; 9 steps or more",
    .options = options,
    .num_options = RF_TOCA_NUM_OPTIONS,
    .state_bytes = sizeof(rf_toca_state),
    .setup = setup,
    .plan = plan,
};
