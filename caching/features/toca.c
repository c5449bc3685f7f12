/* caching/features/toca.c - ToCa: token-wise feature caching, arXiv 2410.05317; the rules of its code for DiT.
 *
 * s' counts down from T - 1 (the first step) to 0 (the last). FULL at the first step and wherever s' % thr == 0,
 * where thr belongs to the last FULL step of the schedule (s'_F), not to the step at hand:
 *   thr = max(1, round(interval / (1 + w - 2 w s'_F / T)))   w = schedule_weight .4, rounding half to even
 *   thr = 2 if s'_F is in [.2 T, .4 T)                         window
 * In between, part by part, of `tokens` rows
 *   rows = floor(tokens * clamp(ratio * layer * step * module, 0, 1))
 *   step = 1 + w - 2 w s' / T     layer = 1 + w - 2 w l / (L - 1)     each w its own option
 *   module = 1 + .6 w for the MLP, 1 - .4 w for attention to text
 * (attention over frames as the MLP: its keys of other frames are kept, so that any rows can be computed alone) and
 * self-attention is reused, or (attention=rows, not in the released settings, whose factor for attention is 0)
 * renewed for as many rows as the MLP's. Rows are chosen on the device (kernels/cache.h, rf_token_select_args):
 *   score = s1 + age_weight * age / interval (the released code's fresh_threshold), then bonus * score for the best row of every cell x cell square of the grid
 * Order of tests: force, no history, first step, interval 1: FULL; s' % thr. A step whose parts all compute all rows
 * is made a FULL step, which leaves thr alone; one whose parts all compute none is a SKIP of parts.
 *
 * Never skips with interval=1 (the released code would: its thr is round(1 / .62) = 2), or with ratio=1,attention=rows
 * and the weights of step, layer and module 0. ratio=0 reuses everything in between; the released code then also
 * drops schedule_weight and window, which are options here.
 * Defaults: DiT, DDIM, 50 steps. Others of the paper
 *   DiT, DDPM, 250 steps   interval=4,step_weight=.4,layer_weight=.8
 *   PixArt                 ratio=.3,step_weight=-.9,layer_weight=.6,module_weight=1
 *   FLUX                   interval=5,ratio=.1, all weights 0
 * Trap: with step_weight 2 the factor is negative in the first quarter of the run, so nothing is computed there. */
#include "caching/features/toca.h"

#include <math.h>

#include "caching/features/schedule.h"

static const rf_policy_option options[RF_TOCA_NUM_OPTIONS] = {RF_TOCA_OPTIONS("0.07", "attention")};

/* ---- rules ---- */

static double factor(double weight, int position, int length) {
    return 1 + weight - 2 * weight * position / length;
}

int rf_toca_threshold(int interval, double schedule_weight, int countdown, int num_steps) {
    double threshold = rint(interval / factor(schedule_weight, countdown, num_steps));
    return threshold < 1 ? 1 : (int)threshold;
}

/* The interval that a full step sets for the steps after it. */
static int interval_from(const rf_policy *policy, int countdown, int num_steps) {
    int64_t s = countdown, t = num_steps;
    if (rf_policy_bool(policy, RF_TOCA_WINDOW) && 5 * s >= t && 5 * s < 2 * t) return 2;
    return rf_toca_threshold((int)rf_policy_int(policy, RF_TOCA_INTERVAL),
                             rf_policy_double(policy, RF_TOCA_SCHEDULE_WEIGHT), countdown, num_steps);
}

static double module_factor(const rf_policy *policy, int kind) {
    double w = rf_policy_double(policy, RF_TOCA_MODULE_WEIGHT);
    return kind == RF_CACHE_CROSS ? 1 - 0.4 * w : 1 + 0.6 * w;
}

int32_t rf_toca_rows(const rf_policy *policy, const rf_cache_shape *shape, int step, int block, int kind) {
    bool attends = kind == RF_CACHE_SELF || kind == RF_CACHE_PARALLEL;
    if (attends && rf_policy_int(policy, RF_TOCA_ATTENTION) == RF_TOKENS_CACHED) return 0;
    int countdown = shape->num_steps - 1 - step, last = shape->num_blocks - 1;
    double layer = factor(rf_policy_double(policy, RF_TOCA_LAYER_WEIGHT), block, last > 0 ? last : 1);
    double at = factor(rf_policy_double(policy, RF_TOCA_STEP_WEIGHT), countdown, shape->num_steps);
    double share = rf_policy_double(policy, RF_TOCA_RATIO) * layer * at * module_factor(policy, kind);
    if (!(share > 0)) return 0;
    return share >= 1 ? (int32_t)shape->tokens : (int32_t)floor(share * (double)shape->tokens);
}

/* ---- setup ---- */

void rf_tokens_fill_score(const rf_policy *policy, int first, int period, const rf_cache_shape *shape,
                          rf_cache_layout *layout) {
    int score = (int)rf_policy_int(policy, first);
    layout->tokens.used = true;
    layout->tokens.value_score = score == RF_TOKENS_BY_VALUE;
    layout->tokens.random = score == RF_TOKENS_RANDOM;
    /* the operator divides an age by the number of tokens */
    layout->tokens.age_weight = (float)(rf_policy_double(policy, first + 1) * (double)shape->tokens / period);
    layout->tokens.bonus = (float)rf_policy_double(policy, first + 2);
    layout->tokens.cell = (int)rf_policy_int(policy, first + 3);
    layout->tokens.seed = layout->tokens.random ? (uint64_t)rf_policy_int(policy, first + 4) : 0;
}

rf_status rf_toca_setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    rf_status st = rf_policy_refuse_few_steps(policy, shape, RF_SCHEDULE_MIN_STEPS, err);
    if (st != RF_OK) return st;
    layout->is_static = true;
    rf_schedule_keep_parts(shape, layout, 1);
    bool any = false, attention = false; /* rows: only then is there anything to score and keep */
    for (int step = 0; step < shape->num_steps; step++) {
        for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
            int kind = shape->part_kinds[i];
            if (kind == RF_CACHE_NO_PART) continue;
            int32_t rows = rf_toca_rows(policy, shape, step, i / shape->num_parts, kind);
            if (rows <= 0 || rows >= shape->tokens) continue;
            any = true;
            attention |= kind == RF_CACHE_SELF || kind == RF_CACHE_PARALLEL;
        }
    }
    if (!any) return RF_OK;
    rf_tokens_fill_score(policy, RF_TOCA_SCORE, (int)rf_policy_int(policy, RF_TOCA_INTERVAL), shape, layout);
    layout->tokens.attention_rows = attention;
    return RF_OK;
}

/* ---- plan ---- */

bool rf_toca_is_full(const rf_policy *policy, rf_toca_state *state, const rf_step_ctx *ctx) {
    int num_steps = ctx->shape->num_steps, countdown = num_steps - 1 - ctx->step;
    bool full = ctx->force_full || ctx->num_stored == 0 || ctx->step == 0 || state->interval < 1 ||
                rf_policy_int(policy, RF_TOCA_INTERVAL) == 1 || countdown % state->interval == 0;
    if (full) state->interval = interval_from(policy, countdown, num_steps);
    return full;
}

void rf_tokens_set_kind(const rf_cache_shape *shape, rf_step_plan *plan) {
    bool all_computed = true, all_produced = true;
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (shape->part_kinds[i] == RF_CACHE_NO_PART) continue;
        all_computed &= plan->parts[i] == RF_DO_COMPUTE;
        all_produced &= plan->parts[i] == RF_DO_PRODUCE;
    }
    plan->kind = all_computed ? RF_STEP_FULL : all_produced ? RF_STEP_SKIP : RF_STEP_PARTIAL;
    plan->produce = RF_PRODUCE_NONE;
}

void rf_toca_fill_parts(const rf_policy *policy, const rf_step_ctx *ctx, rf_step_plan *plan) {
    const rf_cache_shape *shape = ctx->shape;
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (shape->part_kinds[i] == RF_CACHE_NO_PART) continue;
        int32_t rows = rf_toca_rows(policy, shape, ctx->step, i / shape->num_parts, shape->part_kinds[i]);
        plan->parts[i] = rows <= 0 ? RF_DO_PRODUCE : rows >= shape->tokens ? RF_DO_COMPUTE : RF_DO_ROWS;
        plan->rows[i] = plan->parts[i] == RF_DO_ROWS ? rows : 0;
    }
    rf_tokens_set_kind(shape, plan);
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    if (!rf_toca_is_full(policy, memory, ctx)) rf_toca_fill_parts(policy, ctx, out);
}

const rf_policy_def rf_policy_toca = {
    .name = "toca",
    .family = "feature",
    .level = "token",
    .paper = "Accelerating diffusion transformers with token-wise feature caching (ToCa), arXiv 2410.05317",
    .summary = "between full steps attention is reused and each MLP computes only the token rows that matter most",
    .fits = "blocks of one self-attention and MLPs; any solver; 9 steps or more",
    .options = options,
    .num_options = RF_TOCA_NUM_OPTIONS,
    .state_bytes = sizeof(rf_toca_state),
    .setup = rf_toca_setup,
    .plan = plan,
};
