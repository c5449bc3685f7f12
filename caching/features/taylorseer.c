/* caching/features/taylorseer.c - TaylorSeer: from reusing to forecasting, arXiv 2503.06923 (ICCV 2025).
 *
 * Kept: the output of every part of every block before its gate (mode=parts), or only the hidden state after the last
 * block (mode=last, order + 1 hidden states), of the last order + 1 FULL steps. With differences, newest gap D0 for all
 * orders,
 *   F0 = Y, F(i+1) = (F(i) of this FULL step - F(i) of the one before) / D0
 * a step k after the last FULL one gives sum_i F(i) k^i / i!. For equal gaps D the second-order term is k^2 / 2, not
 * the Newton form's k (k + D) / 2: on s^2 the reference is off by -k D, predictor=newton is exact. At uneven gaps F(2)
 * is no divided difference either; it is kept as in the reference.
 * Schedule: FULL while s < first, then FULL whenever interval - 1 steps have been skipped. Differences reach back to
 * step first - 2.
 *
 * Order of tests: forced, no history, s < first, interval. A forced step restarts the count. Carried: no first steps, the
 * carried snapshot is reused (order 0), and order 1 has to wait for the second FULL step of the run.
 * Defaults: DiT's interval 4 and first 2, and order 1, which the releases for FLUX, HunyuanVideo and Wan use; DiT's own
 * is 4. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { INTERVAL, ORDER, FIRST, MODE, PREDICTOR, NUM_OPTIONS };
enum { PARTS, LAST };
enum { TAYLOR, NEWTON };

static const rf_policy_option options[NUM_OPTIONS] = {
    [INTERVAL] = {"interval", RF_OPTION_INT, "4", 1, 10000, NULL,
                  "steps from one full step to the next; 1 = never skip"},
    [ORDER] = {"order", RF_OPTION_INT, "1", 0, 4, NULL, "order of the expansion; mode=last: at most 3"},
    [FIRST] = {"first", RF_OPTION_INT, "2", 1, 10000, NULL, "first steps that are always full"},
    [MODE] = {"mode", RF_OPTION_CHOICE, "parts", 0, 0, "parts last",
              "predict every part of every block, or only the hidden state after the last block"},
    [PREDICTOR] = {"predictor", RF_OPTION_CHOICE, "taylor", 0, 0, "taylor newton",
                   "the paper's sum, or Newton's form, exact for polynomials"},
};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    return rf_schedule_setup(policy, shape, layout, (int)rf_policy_int(policy, ORDER),
                             (int)rf_policy_int(policy, FIRST), rf_policy_int(policy, MODE) == LAST, err);
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    int first = (int)rf_policy_int(policy, FIRST), order = (int)rf_policy_int(policy, ORDER);
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) {
        int known = rf_schedule_history(ctx, first);
        out->num_terms = rf_policy_int(policy, PREDICTOR) == NEWTON
                             ? rf_predict_newton(out->weights[0], ctx->stored, known, ctx->step, order)
                             : rf_predict_taylor(out->weights[0], ctx->stored, known, ctx->step, order);
    }
    bool full = rf_schedule_is_full(ctx, first, (int)rf_policy_int(policy, INTERVAL));
    rf_schedule_set_kind(ctx->shape, out, full, rf_policy_int(policy, MODE) == LAST);
}

const rf_policy_def rf_policy_taylorseer = {
    .name = "taylorseer",
    .family = "feature",
    .level = "part",
    .paper =
        "TaylorSeer: from reusing to forecasting: accelerating diffusion models with TaylorSeers, arXiv 2503.06923",
    .summary =
        "between full steps extrapolates the output of every part, or the last hidden state, by finite differences",
    .fits = "any denoiser; solvers that add no noise (order 0: any); 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .plan = plan,
};
