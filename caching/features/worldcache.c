/* caching/features/worldcache.c - WorldCache: curvature-guided heterogeneous token caching, arXiv 2603.06331.
 *
 * Kept: the last three outputs y0 (newest), y1, y2 of FULL steps, gaps D0 = s(y0) - s(y1), D1 = s(y1) - s(y2).
 * Per token row
 *   v0 = (y0 - y1) / D0, v1 = (y1 - y2) / D1, kappa = |(v0 - v1) / D0| / (|v0|^2 + 1e-8)
 * and, by quantiles of kappa over the rows of a branch (pooled: of both), three classes
 *   stable   kappa <  Q(p_stable)    y(k) = y0
 *   chaotic  kappa >= Q(p_chaotic)   y(k) = y0 + c_k v0 + d_k v1,  c_k = k (1 - alpha), d_k = k alpha,
 *                                    alpha = 3 x^2 - 2 x^3, x = min(k / max_skips, 1)
 *   linear   the rest                y(k) = y0 + k v0
 * Skipping (CAS): E(k) = mean of kappa |y(k) - y(k-1)| of chaotic rows; E_acc sums E over the predicted steps so far.
 * y(k) - y(k-1) = a_k v0 + b_k v1 with a_k = c_k - c_(k-1), b_k = d_k - d_(k-1), so all E(k) are known at the FULL
 * step: one read-back each, made when the second step after it is decided, the first at which E_acc is not 0.
 *
 * Order of tests: s < warmup FULL; last step FULL; fewer than 3 FULL outputs FULL; E_acc >= threshold FULL; k >
 * max_skips FULL; else SKIP. A step is never taken back: E_acc holds the drift of earlier steps. Both branches have
 * their own E_acc; the first to ask for FULL decides for both.
 * Carried: no warm-up; the carried output is reused for all rows until k > max_skips; then three FULL steps, as nothing
 * is known of this run's curvature.
 *
 * Streams (shape.streams: colour, depth, ...; the paper's models put out several). Each has quantiles, classes and an E
 * of its own, and the first whose E_acc reaches the threshold asks for FULL: a stream of few rows is not outvoted. (The
 * released code pools a batch's modalities: one quantile over the tokens of all, one mean.) kappa has the unit 1/output
 * and |dy| that of the output, so E has none: neither scale nor clock of a stream changes a decision, as long as |v0|^2
 * is far above 1e-8.
 *
 * Paper and released code differ; both are here:
 *   rule=paper E averages over the chaotic rows; rule=code over all rows, the others counted as 0. So the same run has
 *              E(paper) = E(code) / (1 - p_chaotic), and thresholds convert in the same way.
 *   time=timestep is the paper's t, time=step the code's index. With timestep D0, D1 (layout.curvature.timestep_gaps)
 *              and the k of c_k, d_k are differences of timesteps; alpha still counts steps. E is measured for a grid
 *              of spacing 1 and taken here times the mean spacing of the k steps ahead: exact for k = 1 and wherever
 *              the grid is uniform.
 * Defaults are the code's for 40-50 steps without a video model's long warm-up (LingBot: p .30/.60, max_skips 2,
 * threshold .2, warmup 5, rule=code); Aether is the same with warmup=10, Voyager is max_skips=6,threshold=1. The
 * quantile set is one branch; the reference pools both where it runs them as one batch (pooled=true).
 *
 * Variants that the paper does not have: floor (rows that stand still have v0 = 0 and so a huge kappa out of rounding
 * alone; floor * mean |v0|^2 is added to the denominator), predictor=hermite (the polynomial of HiCache, order 2,
 * sigma .5).
 * Ablations of its tables 5 and 6: predictor=reuse|linear|damped for all rows (E stays what it is for grouped, so the
 * schedule is comparable), skip=interval (always max_skips between FULL steps, E unused). */
#include <math.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"

enum { P_STABLE, P_CHAOTIC, MAX_SKIPS, THRESHOLD, WARMUP, RULE, TIME, POOLED, FLOOR, PREDICTOR, SKIP, NUM_OPTIONS };
enum { RULE_CODE, RULE_PAPER };
enum { TIME_STEP, TIME_TIMESTEP };
enum { GROUPED, HERMITE, LINEAR, REUSE, DAMPED };
enum { SKIP_CAS, SKIP_INTERVAL };
enum { STABLE, LINEAR_ROWS, CHAOTIC };

static const rf_policy_option options[NUM_OPTIONS] = {
    [P_STABLE] = {"p_stable", RF_OPTION_DOUBLE, "0.3", 0, 1, NULL, "rows below this quantile of curvature are reused"},
    [P_CHAOTIC] = {"p_chaotic", RF_OPTION_DOUBLE, "0.6", 0, 1, NULL,
                   "rows from this quantile of curvature on get the damped predictor and drive skipping"},
    [MAX_SKIPS] = {"max_skips", RF_OPTION_INT, "2", 0, RF_CACHE_MAX_HORIZON, NULL,
                   "most skipped steps in a row; 0 = never skip"},
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.2", 0, 1e6, NULL,
                   "accumulated drift that asks for a full step; 0 = never skip"},
    [WARMUP] = {"warmup", RF_OPTION_INT, "5", 0, 10000, NULL, "first steps that are always full (3 at least)"},
    [RULE] =
        {"rule", RF_OPTION_CHOICE, "code", 0, 0, "code paper",
         "drift is a mean over all rows (code) or over chaotic rows (paper: thresholds are 1/(1-p_chaotic) larger)"},
    [TIME] = {"time", RF_OPTION_CHOICE, "step", 0, 0, "step timestep",
              "velocities per step (code) or per unit of timestep (paper)"},
    [POOLED] = {"pooled", RF_OPTION_BOOL, "false", 0, 0, NULL,
                "quantiles and drift over the rows of both branches together"},
    [FLOOR] = {"floor", RF_OPTION_DOUBLE, "0", 0, 1e6, NULL,
               "variant: adds this share of the mean squared velocity to curvature's denominator"},
    [PREDICTOR] = {"predictor", RF_OPTION_CHOICE, "grouped", 0, 0, "grouped hermite linear reuse damped",
                   "one predictor for all rows instead of one for each group (ablation)"},
    [SKIP] = {"skip", RF_OPTION_CHOICE, "cas", 0, 0, "cas interval",
              "adaptive skipping, or always max_skips steps (ablation)"},
};

typedef struct {
    int known_from;                        /* the FULL step that sums belong to, plus 1; 0 = none */
    double sums[RF_CACHE_MAX_HORIZON + 1]; /* [k] = E(1) + .. + E(k), the largest of branches and streams */
} state;

/* alpha of the blend, k steps ahead. */
static double blend(int k, int max_skips) {
    double x = max_skips > 0 && k < max_skips ? (double)k / max_skips : 1;
    return x * x * (3 - 2 * x);
}

static bool needs_curvature(const rf_policy *policy) {
    return rf_policy_int(policy, MAX_SKIPS) > 0 &&
           (rf_policy_int(policy, PREDICTOR) == GROUPED || rf_policy_int(policy, SKIP) == SKIP_CAS);
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    int max_skips = (int)rf_policy_int(policy, MAX_SKIPS), warmup = (int)rf_policy_int(policy, WARMUP);
    double p_stable = rf_policy_double(policy, P_STABLE), p_chaotic = rf_policy_double(policy, P_CHAOTIC);
    if (p_stable > p_chaotic) {
        return rf_fail(err, RF_ERR_ARGUMENT, "worldcache: p_stable %g is above p_chaotic %g", p_stable, p_chaotic);
    }
    rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
    if (st != RF_OK) return st;
    st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps((warmup > 3 ? warmup : 3) + 2), err);
    if (st != RF_OK) return st;

    layout->output_depth = 3;
    layout->is_static =
        rf_policy_int(policy, SKIP) == SKIP_INTERVAL || max_skips == 0 || rf_policy_double(policy, THRESHOLD) <= 0;
    if (!layout->is_static) layout->signals = 1u << RF_SIGNAL_CURVATURE;
    if (!needs_curvature(policy)) return RF_OK;
    layout->num_classes = 3;
    layout->curvature.used = true;
    layout->curvature.pooled = rf_policy_bool(policy, POOLED);
    layout->curvature.mean_over_all = rf_policy_int(policy, RULE) == RULE_CODE;
    layout->curvature.timestep_gaps = rf_policy_int(policy, TIME) == TIME_TIMESTEP;
    layout->curvature.p_stable = (float)p_stable;
    layout->curvature.p_chaotic = (float)p_chaotic;
    layout->curvature.eps = 1e-8f;
    layout->curvature.floor = (float)rf_policy_double(policy, FLOOR);
    layout->curvature.horizon = max_skips;
    double c = 0, d = 0;
    for (int k = 1; k <= max_skips; k++) {
        double alpha = blend(k, max_skips), next_c = k * (1 - alpha), next_d = k * alpha;
        layout->curvature.step_a[k - 1] = (float)(next_c - c);
        layout->curvature.step_b[k - 1] = (float)(next_d - d);
        c = next_c;
        d = next_d;
    }
    return RF_OK;
}

/* ---- decision ---- */

typedef enum { VERDICT_FULL, VERDICT_SKIP, VERDICT_DRIFT } verdict;

/* All tests but the one that needs E. */
static verdict judge(const rf_policy *policy, const rf_step_ctx *ctx) {
    int s = ctx->step;
    if (ctx->force_full || rf_ctx_warms_up(ctx, rf_policy_int(policy, WARMUP))) return VERDICT_FULL;
    if (s == ctx->shape->num_steps - 1 || (ctx->num_stored < 3 && !rf_ctx_on_carried(ctx))) return VERDICT_FULL;
    bool cas = rf_policy_int(policy, SKIP) == SKIP_CAS;
    if (cas && rf_policy_double(policy, THRESHOLD) <= 0) return VERDICT_FULL; /* E_acc starts at 0 */
    int k = s - ctx->stored[0];
    if (k > rf_policy_int(policy, MAX_SKIPS)) return VERDICT_FULL;
    return cas && k > 1 && !rf_ctx_on_carried(ctx) ? VERDICT_DRIFT : VERDICT_SKIP;
}

static bool wants_signals(const rf_policy *policy, const void *memory, const rf_step_ctx *ctx) {
    const state *st = memory;
    return judge(policy, ctx) == VERDICT_DRIFT && st->known_from != ctx->stored[0] + 1;
}

static void learn_drift(const rf_policy *policy, state *st, const rf_step_ctx *ctx) {
    if (st->known_from == ctx->stored[0] + 1) return;
    st->known_from = ctx->stored[0] + 1;
    const float *t = rf_policy_int(policy, TIME) == TIME_TIMESTEP ? ctx->shape->timesteps : NULL;
    int from = ctx->stored[0], last = ctx->shape->num_steps - 1;
    int streams = ctx->shape->num_streams > 1 ? ctx->shape->num_streams : 1;
    double sums[2 * RF_CACHE_MAX_STREAMS] = {0};
    for (int k = 1; k <= ctx->layout->curvature.horizon; k++) {
        st->sums[k] = 0;
        double spacing = t ? ((double)t[from] - (double)t[from + k < last ? from + k : last]) / k : 1;
        for (int i = 0; i < 2 * streams; i++) {
            if (i % 2 >= ctx->shape->branches) continue;
            sums[i] += (double)ctx->drift[i][k - 1] * spacing;
            if (!(sums[i] <= st->sums[k]) && !isnan(st->sums[k])) st->sums[k] = sums[i]; /* a NaN asks for FULL */
        }
    }
}

/* ---- prediction ---- */

/* Newest, then the velocities: w = y0 + c v0 + d v1. A gap of 0 (equal timesteps) has no velocity. */
static void set_weights(float *w, double c, double d, double gap0, double gap1) {
    double first = gap0 != 0 ? c / gap0 : 0, second = gap1 != 0 ? d / gap1 : 0;
    w[0] = (float)(1 + first);
    w[1] = (float)(second - first);
    w[2] = (float)-second;
}

static void fill_weights(const rf_policy *policy, const rf_step_ctx *ctx, rf_step_plan *plan) {
    const int *at = ctx->stored;
    int k = ctx->step - at[0];
    double gap0 = at[0] - at[1], gap1 = at[1] - at[2], ahead = k;
    if (rf_policy_int(policy, TIME) == TIME_TIMESTEP) {
        const float *t = ctx->shape->timesteps;
        gap0 = (double)t[at[1]] - (double)t[at[0]];
        gap1 = (double)t[at[2]] - (double)t[at[1]];
        ahead = (double)t[at[0]] - (double)t[ctx->step];
    }
    double alpha = blend(k, (int)rf_policy_int(policy, MAX_SKIPS));
    float rows[RF_CACHE_MAX_CLASSES][3];
    set_weights(rows[STABLE], 0, 0, gap0, gap1);
    set_weights(rows[LINEAR_ROWS], ahead, 0, gap0, gap1);
    set_weights(rows[CHAOTIC], ahead * (1 - alpha), ahead * alpha, gap0, gap1);

    plan->num_terms = 3;
    int kind = (int)rf_policy_int(policy, PREDICTOR), classes = ctx->layout->num_classes > 1 ? 3 : 1;
    for (int i = 0; i < classes; i++) {
        if (kind == HERMITE) {
            plan->num_terms = rf_predict_hermite(plan->weights[i], at, 3, ctx->step, 2, 0.5);
            continue;
        }
        int row = kind == REUSE ? STABLE : kind == LINEAR ? LINEAR_ROWS : kind == DAMPED ? CHAOTIC : i;
        for (int j = 0; j < 3; j++) plan->weights[i][j] = rows[row][j];
    }
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    state *st = memory;
    rf_schedule_begin_plan(ctx, out);
    out->produce = RF_PRODUCE_OUTPUT;
    if (rf_ctx_on_carried(ctx)) {
        for (int i = 0; i < RF_CACHE_MAX_CLASSES; i++) out->num_terms = rf_predict_reuse(out->weights[i]);
    } else if (ctx->num_stored >= 3) {
        fill_weights(policy, ctx, out);
    }
    verdict v = judge(policy, ctx);
    bool skip = v == VERDICT_SKIP;
    if (v != VERDICT_FULL && rf_policy_int(policy, SKIP) == SKIP_CAS) {
        int k = ctx->step - ctx->stored[0];
        out->threshold = rf_policy_double(policy, THRESHOLD);
        out->statistic = 0;
        if (v == VERDICT_DRIFT) {
            learn_drift(policy, st, ctx);
            out->statistic = st->sums[k - 1];
            skip = out->statistic < out->threshold;
        }
    }
    out->kind = skip ? RF_STEP_SKIP : RF_STEP_FULL;
}

const rf_policy_def rf_policy_worldcache = {
    .name = "worldcache",
    .family = "feature",
    .level = "step",
    .paper = "WorldCache: curvature-guided heterogeneous token caching for world models, arXiv 2603.06331",
    .summary =
        "predicts the model's output row by row (reused, linear or damped by curvature) and skips until drift adds up",
    .fits = "any denoiser; solvers that add no noise; 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan,
};
