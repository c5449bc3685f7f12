/* caching/features/speca.c - SpeCa: speculative feature caching, arXiv 2509.11628 (ACM MM 2025).
 *
 * Draft: every part of every block predicted as by TaylorSeer of the given order (taylorseer.c). Verification: the last
 * block is also computed from its predicted input, and
 *   error = mean of |x - xhat| / (|xhat| + 1e-10), x computed, xhat predicted (the larger of the branches)
 * Step s is FULL if the error of the step before is above max(.01, base * decay^(s / T)); nothing is taken back. The
 * reference goes on with the draft; output=verified goes on with the computed last block, at no further cost.
 *
 * Order of tests, n = steps drafted since the last FULL one: forced, no history, s < first: FULL; n >= max: FULL;
 * n < min: draft unasked; error above the threshold: FULL; else draft. A draft is verified from the min-th in a row on,
 * whether or not anyone will ask: with output=verified it is the better value. max = 0 never drafts. Carried: no first
 * steps; drafts reuse the carried snapshot, and are counted from its step. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { ORDER, BASE, DECAY, MIN, MAX, FIRST, OUTPUT, NUM_OPTIONS };
enum { DRAFT, VERIFIED };
#define LEAST_THRESHOLD 0.01

static const rf_policy_option options[NUM_OPTIONS] = {
    [ORDER] = {"order", RF_OPTION_INT, "4", 1, 4, NULL, "order of the draft's Taylor expansion"},
    [BASE] = {"base", RF_OPTION_DOUBLE, "0.1", 0, 1e6, NULL, "error allowed at the first step (0.01 at least)"},
    [DECAY] = {"decay", RF_OPTION_DOUBLE, "0.01", 1e-6, 1, NULL, "factor on the allowed error over the whole run"},
    [MIN] = {"min", RF_OPTION_INT, "2", 1, 10000, NULL, "drafted steps that are taken unasked after a full one"},
    [MAX] = {"max", RF_OPTION_INT, "5", 0, 10000, NULL, "most drafted steps in a row; 0 = never draft"},
    [FIRST] = {"first", RF_OPTION_INT, "3", 1, 10000, NULL, "first steps that are always full"},
    [OUTPUT] = {"output", RF_OPTION_CHOICE, "draft", 0, 0, "draft verified",
                "on verified steps go on with the prediction, or with the last block as computed"},
};

typedef struct {
    int verified; /* the step verified last, plus 1; 0 = none */
} state;

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
    if (st != RF_OK) return st;
    st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps((int)rf_policy_int(policy, FIRST) + 1), err);
    if (st != RF_OK) return st;
    rf_schedule_keep_parts(shape, layout, (int)rf_policy_int(policy, ORDER) + 1);
    layout->is_static = rf_policy_int(policy, MAX) < rf_policy_int(policy, MIN); /* nothing is ever verified */
    if (!layout->is_static) layout->signals = 1u << RF_SIGNAL_VERIFY;
    return RF_OK;
}

typedef enum { VERDICT_FULL, VERDICT_DRAFT, VERDICT_ERROR } verdict;

/* All tests but the one that needs the error. */
static verdict judge(const rf_policy *policy, const state *st, const rf_step_ctx *ctx) {
    if (ctx->force_full || ctx->num_stored == 0 || rf_ctx_warms_up(ctx, rf_policy_int(policy, FIRST)))
        return VERDICT_FULL;
    int drafted = ctx->step - ctx->stored[0] - 1;
    if (drafted >= rf_policy_int(policy, MAX)) return VERDICT_FULL;
    bool verified = ctx->step > 0 && st->verified == ctx->step;
    return drafted >= rf_policy_int(policy, MIN) && verified ? VERDICT_ERROR : VERDICT_DRAFT;
}

static bool wants_signals(const rf_policy *policy, const void *memory, const rf_step_ctx *ctx) {
    return judge(policy, memory, ctx) == VERDICT_ERROR;
}

static double error_of(const rf_step_ctx *ctx) {
    double count = (double)ctx->shape->tokens * (double)ctx->shape->width, worst = 0;
    for (int b = 0; b < ctx->shape->branches; b++) {
        double error = (double)ctx->signals[RF_SIGNAL_VERIFY][b][0] / count;
        if (!(error <= worst) && !isnan(worst)) worst = error; /* a NaN asks for FULL */
    }
    return worst;
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    state *st = memory;
    const rf_cache_shape *shape = ctx->shape;
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) {
        out->num_terms =
            rf_predict_taylor(out->weights[0], ctx->stored, rf_schedule_history(ctx, (int)rf_policy_int(policy, FIRST)),
                              ctx->step, (int)rf_policy_int(policy, ORDER));
    }
    verdict v = judge(policy, st, ctx);
    bool full = v == VERDICT_FULL;
    if (v == VERDICT_ERROR) {
        double progress = (double)ctx->step / shape->num_steps;
        out->threshold =
            fmax(LEAST_THRESHOLD, rf_policy_double(policy, BASE) * pow(rf_policy_double(policy, DECAY), progress));
        out->statistic = error_of(ctx);
        full = !(out->statistic <= out->threshold);
    }
    rf_schedule_set_kind(shape, out, full, false);
    if (full || ctx->step - ctx->stored[0] < rf_policy_int(policy, MIN)) return;
    st->verified = ctx->step + 1;
    out->kind = RF_STEP_PARTIAL; /* the last block runs */
    out->verify = true;
    out->use_verified = rf_policy_int(policy, OUTPUT) == VERIFIED;
}

const rf_policy_def rf_policy_speca = {
    .name = "speca",
    .family = "feature",
    .level = "part",
    .paper = "SpeCa: accelerating diffusion transformers with speculative feature caching, arXiv 2509.11628",
    .summary = "drafts steps by Taylor expansion and checks the last block; an error above the threshold makes the "
               "next step full",
    .fits = "any denoiser; solvers that add no noise; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan,
};
