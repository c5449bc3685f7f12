/* caching/features/measure.c - computes everything and records what other policies would look at.
 *
 * Every step is FULL. The trace then holds, step by step and branch by branch, the change of the model's input, of the modulated
 * input, of the output and of the residual of the block stack, and the ratio of residual norms: what `refrain calibrate`
 * fits tables from (TeaCache's polynomial, MagCache's ratios). The drift is that of plain reuse. */
#include "caching/features/features.h"

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    layout->spans[0] = (rf_cache_span){.begin = 0, .end = shape->num_blocks, .depth = 1, .delta = true};
    layout->signals = 1u << RF_SIGNAL_INPUT_STEP | 1u << RF_SIGNAL_MODULATED_STEP | 1u << RF_SIGNAL_INPUT_REFRESH |
                      1u << RF_SIGNAL_OUTPUT_REFRESH | 1u << RF_SIGNAL_OUTPUT_SIZE | 1u << RF_SIGNAL_SPAN_REFRESH |
                      1u << RF_SIGNAL_SPAN_NORMS;
    layout->is_static = true;
    return RF_OK;
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    out->produce = RF_PRODUCE_SPAN;
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
}

const rf_policy_def rf_policy_measure = {
    .name = "measure",
    .family = "feature",
    .level = "step",
    .paper = "none: a recorder",
    .summary = "computes everything and records in the trace what the other policies look at",
    .fits = "every model and sampler",
    .setup = setup,
    .plan = plan,
};
