/* caching/features/fbcache.c - First-Block-Cache (ParaAttention; huggingface/diffusers hooks/first_block_cache),
 * documentation only.
 *
 *   p = block_0(x_in), d = p - x_in, rho = sum |d - d_ref| / sum |d_ref|, d_ref = d of the last computed step
 *   rho < threshold: blocks 1..L-1 are left out, x_out = p + r, r = (x after the last block) - p of that computed step
 *   else they run, and d_ref and r are renewed
 * Nothing is accumulated: rho is against the last computed step, so it grows by itself while steps are left out. In the
 * base form nothing else bounds a run of them; warmup and max_skips do (both off by default).
 *
 * Order of tests: forced, no history, s < warmup, threshold <= 0, run of skips at max_skips: FULL with no probe; then
 * the probe; rho < threshold reuses. rho is the larger of the branches': both take one decision. Carried: d_ref is the
 * carried snapshot's, so the probe says whether it will do. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { THRESHOLD, WARMUP, MAX_SKIPS, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.05", 0, 1e6, NULL,
                   "reuse while the first block's change is below this; 0 = never"},
    [WARMUP] = {"warmup", RF_OPTION_INT, "0", 0, 10000, NULL, "first steps that are always full (1 at least)"},
    [MAX_SKIPS] = {"max_skips", RF_OPTION_INT, "-1", -1, 10000, NULL,
                   "most reusing steps in a row; -1 = no bound, 0 = never reuse"},
};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    int warmup = (int)rf_policy_int(policy, WARMUP);
    if (shape->num_blocks < 2) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "fbcache: model '%s' has %d block, nothing is left after the first",
                       shape->model, shape->num_blocks);
    }
    rf_status st = rf_policy_refuse_few_steps(policy, shape, (warmup > 1 ? warmup : 1) + 1, err);
    if (st != RF_OK) return st;
    layout->probe_blocks = 1;
    layout->spans[0] = (rf_cache_span){.begin = 1, .end = shape->num_blocks, .depth = 1, .delta = true};
    layout->signals = 1u << RF_SIGNAL_PROBE;
    return RF_OK;
}

/* Only the probe's signal counts, and that is always read. */
static bool wants_signals(const rf_policy *policy, const void *state, const rf_step_ctx *ctx) {
    return false;
}

static void plan_reuse(const rf_step_ctx *ctx, rf_step_plan *out) {
    rf_schedule_begin_plan(ctx, out);
    out->produce = RF_PRODUCE_SPAN;
    out->span = 0;
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    int max_skips = (int)rf_policy_int(policy, MAX_SKIPS);
    plan_reuse(ctx, out);
    bool full = ctx->force_full || ctx->num_stored == 0 || rf_ctx_warms_up(ctx, rf_policy_int(policy, WARMUP)) ||
                rf_policy_double(policy, THRESHOLD) <= 0 || (max_skips >= 0 && out->horizon > max_skips);
    out->kind = full ? RF_STEP_FULL : RF_STEP_PROBE;
}

static void plan_probe(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    plan_reuse(ctx, out);
    out->statistic = rf_ctx_max_rel1(ctx, RF_SIGNAL_PROBE);
    out->threshold = rf_policy_double(policy, THRESHOLD);
    out->kind = out->statistic < out->threshold ? RF_STEP_PARTIAL : RF_STEP_FULL;
}

const rf_policy_def rf_policy_fbcache = {
    .name = "fbcache",
    .family = "feature",
    .level = "block",
    .paper = "First-Block-Cache (ParaAttention, diffusers; no paper)",
    .summary = "runs the first block; if its change is small, reuses what the other blocks added",
    .fits = "models of 2 blocks or more; any solver; any number of steps",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan,
    .plan_probe = plan_probe,
};
