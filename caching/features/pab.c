/* caching/features/pab.c - PAB: pyramid attention broadcast, arXiv 2408.12588 (VideoSys; diffusers).
 *
 * Each kind of part has a range n. Its output (before the gate) is computed where
 *   count % n == 0   or   the timestep is not inside lo < t < hi
 * and otherwise given again as it was last computed; count is the number of calls so far, that is the step. A part
 * computed on a step where others are reused renews its ring in place. A step is FULL if all kinds are computed, SKIP
 * if none is, else PARTIAL.
 * The paper's spatial range is `self`, which parallel blocks (attention and MLP in one) follow. The paper broadcasts
 * MLPs only in some blocks at listed timesteps: mlp is 1, off, by default.
 * Defaults: self 2, temporal 4 and cross 6 of its table; window 100-850 of OpenSora-Plan and CogVideoX.
 *
 * Order of tests per kind: forced, no history, window, count. The count goes on through forced steps. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { SELF, TEMPORAL, CROSS, MLP, LO, HI, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [SELF] = {"self", RF_OPTION_INT, "2", 1, 10000, NULL,
              "self-attention is computed every how many-th step; 1 = always"},
    [TEMPORAL] = {"temporal", RF_OPTION_INT, "4", 1, 10000, NULL,
                  "attention over frames likewise, in models that have it"},
    [CROSS] = {"cross", RF_OPTION_INT, "6", 1, 10000, NULL, "cross-attention likewise"},
    [MLP] = {"mlp", RF_OPTION_INT, "1", 1, 10000, NULL, "MLPs likewise"},
    [LO] = {"lo", RF_OPTION_DOUBLE, "100", -1, 1001, NULL, "reuse only at timesteps above this"},
    [HI] = {"hi", RF_OPTION_DOUBLE, "850", -1, 1001, NULL, "reuse only at timesteps below this"},
};

static int64_t range_of(const rf_policy *policy, int kind) {
    switch (kind) {
    case RF_CACHE_TEMPORAL: return rf_policy_int(policy, TEMPORAL);
    case RF_CACHE_CROSS: return rf_policy_int(policy, CROSS);
    case RF_CACHE_MLP: return rf_policy_int(policy, MLP);
    default: return rf_policy_int(policy, SELF);
    }
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st = rf_policy_refuse_few_steps(policy, shape, RF_SCHEDULE_MIN_STEPS, err);
    if (st != RF_OK) return st;
    layout->is_static = true;
    rf_schedule_keep_parts(shape, layout, 1);
    for (int kind = 0; kind < RF_CACHE_NUM_KINDS; kind++) {
        if (range_of(policy, kind) == 1) layout->part_depth[kind] = 0; /* never asked for */
    }
    return RF_OK;
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    const rf_cache_shape *shape = ctx->shape;
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored == 0) return;
    for (int kind = 0; kind < RF_CACHE_NUM_KINDS; kind++) {
        if (ctx->layout->part_depth[kind] > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    }
    double t = (double)shape->timesteps[ctx->step];
    if (ctx->force_full || !(t > rf_policy_double(policy, LO) && t < rf_policy_double(policy, HI))) return;
    bool computes = false, reuses = false;
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (shape->part_kinds[i] == RF_CACHE_NO_PART) continue;
        bool reuse = ctx->step % range_of(policy, shape->part_kinds[i]) != 0;
        out->parts[i] = reuse ? RF_DO_PRODUCE : RF_DO_COMPUTE;
        reuses |= reuse;
        computes |= !reuse;
    }
    out->kind = !reuses ? RF_STEP_FULL : computes ? RF_STEP_PARTIAL : RF_STEP_SKIP;
}

const rf_policy_def rf_policy_pab = {
    .name = "pab",
    .family = "feature",
    .level = "part",
    .paper = "Real-time video generation with pyramid attention broadcast, arXiv 2408.12588",
    .summary = "reuses attention outputs (and MLPs if asked) over a range of steps of its own for each kind of part",
    .fits = "any denoiser, any solver; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .setup = setup,
    .plan = plan,
};
