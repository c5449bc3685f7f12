/* caching/features/schedule.h - what the policies with a schedule of steps share: when to compute, which parts are
 * predicted.
 *
 * Schedule (TaylorSeer, arXiv 2503.06923; HiCache uses the same): FULL while s < first, then FULL whenever interval - 1
 * steps have been skipped. It counts from the last stored step, so a step forced FULL restarts the count.
 * A carried snapshot counts as stored at its step below 0.
 * History: the reference forms differences at a FULL step only if s > first - 2, so steps before first - 2 are never
 * used. */
#ifndef RF_CACHING_FEATURES_SCHEDULE_H
#define RF_CACHING_FEATURES_SCHEDULE_H

#include <math.h>

#include "caching/policy.h"

/* Models made for so few steps change too much from one to the next for a rule that does not look at them. */
#define RF_SCHEDULE_MIN_STEPS 9

static inline int rf_schedule_min_steps(int for_rule) {
    return for_rule > RF_SCHEDULE_MIN_STEPS ? for_rule : RF_SCHEDULE_MIN_STEPS;
}

static inline bool rf_schedule_is_full(const rf_step_ctx *ctx, int first, int interval) {
    return ctx->force_full || ctx->num_stored == 0 || rf_ctx_warms_up(ctx, first) ||
           ctx->step - ctx->stored[0] >= interval;
}

/* FULL steps of this run so far. */
static inline int rf_schedule_num_full(const rf_step_ctx *ctx) {
    return rf_ctx_on_carried(ctx) ? 0 : ctx->num_stored;
}

/* Steps since the last stored one, 0 without any. */
static inline int rf_schedule_horizon(const rf_step_ctx *ctx) {
    return ctx->num_stored > 0 ? ctx->step - ctx->stored[0] : 0;
}

/* How many of ctx->stored a predictor may use. */
static inline int rf_schedule_history(const rf_step_ctx *ctx, int first) {
    int known = ctx->num_stored < RF_CACHE_MAX_TERMS ? ctx->num_stored : RF_CACHE_MAX_TERMS, num = 0;
    while (num < known && ctx->stored[num] >= first - 2) num++;
    return num == 0 && known > 0 ? 1 : num;
}

/* A plan on which nothing was compared. */
static inline void rf_schedule_begin_plan(const rf_step_ctx *ctx, rf_step_plan *plan) {
    plan->horizon = rf_schedule_horizon(ctx);
    plan->statistic = NAN;
    plan->threshold = NAN;
}

/* A ring of this depth for every part that the model has. */
static inline void rf_schedule_keep_parts(const rf_cache_shape *shape, rf_cache_layout *layout, int depth) {
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (shape->part_kinds[i] < RF_CACHE_NUM_KINDS) layout->part_depth[shape->part_kinds[i]] = depth;
    }
}

/* One ring of hidden states after the last block. */
static inline void rf_schedule_keep_last(const rf_cache_shape *shape, rf_cache_layout *layout, int depth) {
    layout->spans[0] = (rf_cache_span){.begin = 0, .end = shape->num_blocks, .depth = depth};
}

#define RF_SCHEDULE_MAX_LAST_ORDER 3 /* four hidden states */

/* Setup of TaylorSeer and HiCache: rings for a prediction of this order, of all parts or of the last hidden state. */
static inline rf_status rf_schedule_setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout,
                                          int order, int first, bool last, rf_error *err) {
    if (last && order > RF_SCHEDULE_MAX_LAST_ORDER)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: mode=last keeps at most %d hidden states, order %d needs %d",
                       rf_policy_get_def(policy)->name, RF_SCHEDULE_MAX_LAST_ORDER + 1, order, order + 1);
    if (order > 0) RF_TRY(rf_policy_refuse_stochastic(policy, shape, err));
    RF_TRY(rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(first + 1), err));
    layout->is_static = true;
    if (last)
        rf_schedule_keep_last(shape, layout, order + 1);
    else
        rf_schedule_keep_parts(shape, layout, order + 1);
    return RF_OK;
}

/* A threshold on sums kept by branch: adds change[b], and says whether any sum has reached the threshold. The larger sum is what the
 * plan reports; what is not a number asks for a FULL step. */
static inline bool rf_schedule_add_up(double sums[2], const double change[2], int branches, double threshold,
                                      rf_step_plan *plan) {
    bool full = false;
    plan->threshold = threshold;
    for (int b = 0; b < branches; b++) {
        sums[b] += change[b];
        full |= !(sums[b] < threshold);
        if (b == 0 || !(sums[b] <= plan->statistic)) plan->statistic = sums[b];
    }
    return full;
}

/* No block runs: every part comes from its ring. */
static inline void rf_schedule_skip_parts(const rf_cache_shape *shape, rf_step_plan *plan) {
    plan->kind = RF_STEP_SKIP;
    plan->produce = RF_PRODUCE_NONE;
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        plan->parts[i] = shape->part_kinds[i] == RF_CACHE_NO_PART ? RF_DO_COMPUTE : RF_DO_PRODUCE;
    }
}

/* A FULL or skipped step of a policy that keeps either all parts or the last hidden state; weights are filled by the
 * caller. */
static inline void rf_schedule_set_kind(const rf_cache_shape *shape, rf_step_plan *plan, bool full, bool last) {
    if (last) {
        plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
        plan->produce = RF_PRODUCE_SPAN;
        plan->span = 0;
    } else if (full) {
        plan->kind = RF_STEP_FULL;
        plan->produce = RF_PRODUCE_NONE;
    } else {
        rf_schedule_skip_parts(shape, plan);
    }
}

#endif
