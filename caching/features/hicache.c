/* caching/features/hicache.c - HiCache: plug-and-play Hermite polynomial feature forecasting, arXiv 2508.16984.
 *
 * Slots, differences F(i) and schedule are TaylorSeer's (taylorseer.c); only the basis differs. k after the last FULL
 * step
 *   Y + sum_{i=1..order} F(i) / i! * sigma^i * H_i(sigma k),  H_1 = 2x, H_2 = 4x^2 - 2, H_(n+1) = 2x H_n - 2n H_(n-1)
 * Order 1 is Taylor with its slope times 2 sigma^2: sigma = .5 halves it, sigma = sqrt(.5) is Taylor. Trap: the
 * second-order term changes sign at sigma k = sqrt(.5) and does not vanish as k goes to 0.
 *
 * Order of tests: forced, no history, s < first, interval. Carried: as taylorseer.c. Defaults: sigma .5 as in the code (its launcher passes .7),
 * first 3, interval 5 and order 2 out of its 5-7 and 1-2. */
#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { INTERVAL, ORDER, SIGMA, FIRST, MODE, NUM_OPTIONS };
enum { PARTS, LAST };

static const rf_policy_option options[NUM_OPTIONS] = {
    [INTERVAL] = {"interval", RF_OPTION_INT, "5", 1, 10000, NULL,
                  "steps from one full step to the next; 1 = never skip"},
    [ORDER] = {"order", RF_OPTION_INT, "2", 1, 4, NULL, "highest Hermite polynomial; mode=last: at most 3"},
    [SIGMA] = {"sigma", RF_OPTION_DOUBLE, "0.5", 0.01, 2, NULL, "contraction of the basis; smaller = closer to reuse"},
    [FIRST] = {"first", RF_OPTION_INT, "3", 1, 10000, NULL, "first steps that are always full"},
    [MODE] = {"mode", RF_OPTION_CHOICE, "parts", 0, 0, "parts last",
              "predict every part of every block, or only the hidden state after the last block"},
};

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    return rf_schedule_setup(policy, shape, layout, (int)rf_policy_int(policy, ORDER),
                             (int)rf_policy_int(policy, FIRST), rf_policy_int(policy, MODE) == LAST, err);
}

static void plan(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *out) {
    int first = (int)rf_policy_int(policy, FIRST);
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) {
        out->num_terms = rf_predict_hermite(out->weights[0], ctx->stored, rf_schedule_history(ctx, first), ctx->step,
                                            (int)rf_policy_int(policy, ORDER), rf_policy_double(policy, SIGMA));
    }
    bool full = rf_schedule_is_full(ctx, first, (int)rf_policy_int(policy, INTERVAL));
    rf_schedule_set_kind(ctx->shape, out, full, rf_policy_int(policy, MODE) == LAST);
}

const rf_policy_def rf_policy_hicache = {
    .name = "hicache",
    .family = "feature",
    .level = "part",
    .paper = "HiCache: a plug-and-play scaled-Hermite upgrade for Taylor-style cache-then-forecast, arXiv 2508.16984",
    .summary = "TaylorSeer's schedule and differences with contracted Hermite polynomials in place of powers",
    .fits = "any denoiser; solvers that add no noise; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .setup = setup,
    .plan = plan,
};
