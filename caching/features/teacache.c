/* caching/features/teacache.c - TeaCache: Timestep Embedding Aware Cache, arXiv 2411.19108 (CVPR 2025).
 *
 * Signal m_s: the modulated input of block 0, or the timestep embedding (some models of the paper's code). Every step
 *   rho = mean |m_s - m_(s-1)| / mean |m_(s-1)|,  acc += P(rho),  P a polynomial of degree 4 fitted to the model
 *   acc < threshold  SKIP: x_out = x_in + r of the last computed step;   else FULL, acc = 0
 * m_(s-1) is that of the step before, computed or not.
 *
 * Order of tests: s < first FULL, acc = 0; s >= T - last FULL, acc = 0; acc + P(rho) >= threshold FULL, acc = 0; else
 * SKIP.
 * Carried: no first steps; nothing is known of what lies between the carried residual and step 0, which counts as 0.
 * Branches have an acc each; branch=any computes both when one of them asks, branch=cond asks the conditional
 * branch only. threshold=0 never skips (said apart, because P may be negative).
 * Pitfalls - P may be negative and then lowers acc; it is not clamped. Outside the range of its fit it means nothing:
 *            thresholds are in units of P and do not carry from model to model. A rho that cannot be formed (m_(s-1) =
 *            0) asks for FULL.
 *          - signal=timestep looks at no data: the schedule is known before the run, both branches share it.
 * Coefficients, highest power first: those of the paper's code for its models by name; *-e0 are for the projected
 * embedding. auto: the model's own if they were measured for this signal, else P(rho) = rho. The reference decides each
 * branch by itself on models that run branches one after the other; here they share a decision. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"
#include "core/memory.h"

enum { THRESHOLD, SIGNAL, COEFFICIENTS, FIRST, LAST, BRANCH, NUM_OPTIONS };
enum { MODULATED, TIMESTEP };
enum { ANY, COND };

#define NUM_COEFFICIENTS 5
#define LARGEST_RHO      1e6  /* more is a division by next to nothing */
#define UNKNOWN_CHANGE   1e30 /* finite: it is shown to people */

static const rf_policy_option options[NUM_OPTIONS] = {
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.1", 0, 1000, NULL,
                   "summed change, as the polynomial rates it, at which a step is computed; 0 never skips"},
    [SIGNAL] = {"signal", RF_OPTION_CHOICE, "modulated", 0, 0, "modulated timestep",
                "change of what: the modulated input of block 0, or the timestep embedding (a fixed schedule)"},
    [COEFFICIENTS] =
        {"coefficients", RF_OPTION_TEXT, "auto", 0, 0, NULL,
         "auto (the model's own, else identity), identity, c4:c3:c2:c1:c0, or a model of the paper's code: flux, "
         "hunyuan, cogvideox-2b, cogvideox-5b, cogvideox1.5-5b, cogvideox1.5-5b-i2v, wan2.1-t2v-1.3b, "
         "wan2.1-t2v-14b, wan2.1-i2v-480p, wan2.1-i2v-720p (these four also with -e0), ltx, mochi, cosmos, "
         "lumina, lumina2-v2, hidream, opensora, latte, opensora-plan"},
    [FIRST] = {"first", RF_OPTION_INT, "1", 1, 1000, NULL, "steps computed at the start"},
    [LAST] = {"last", RF_OPTION_INT, "1", 0, 1000, NULL, "steps computed at the end"},
    [BRANCH] = {"branch", RF_OPTION_CHOICE, "any", 0, 0, "any cond",
                "which branch's change counts: the larger, or the conditional one's"},
};

static const struct {
    const char *name;
    double c[NUM_COEFFICIENTS];
} models[] = {
    {"identity", {0, 0, 0, 1, 0}},
    {"flux", {498.651651, -283.781631, 55.8554382, -3.82021401, .264230861}},
    {"hunyuan", {733.226126, -401.131952, 67.5869174, -3.149878, .0961237896}},
    {"cogvideox-2b", {-31.0658903, 25.4732368, -5.92380459, 1.75769064, -.00361568434}},
    {"cogvideox-5b", {-1538.80483, 843.202495, -134.363087, 7.97131516, -.0523162339}},
    {"cogvideox1.5-5b", {250.210439, -165.061612, 35.7804877, -.781551492, .0358559703}},
    {"cogvideox1.5-5b-i2v", {122.842302, -104.088754, 26.2981677, -.306009921, .037121322}},
    {"wan2.1-t2v-1.3b", {2396.76752, -1311.10545, 201.331979, -8.29855975, .137887774}},
    {"wan2.1-t2v-14b", {-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404}},
    {"wan2.1-i2v-480p", {-302.33167, 223.948934, -52.546397, 5.8734844, -.201973289}},
    {"wan2.1-i2v-720p", {-114.36346466, 65.26524496, -18.82220707, 4.91518089, -.23412683}},
    {"wan2.1-t2v-1.3b-e0", {-52186.2437, 9230.41404, -528.275948, 13.6987616, -.0499875664}},
    {"wan2.1-t2v-14b-e0", {-303318.725, 49053.7029, -2655.30556, 58.7365115, -.315583525}},
    {"wan2.1-i2v-480p-e0", {257151.496, -35422.9917, 1402.86849, -13.5890334, .132517977}},
    {"wan2.1-i2v-720p-e0", {8107.0546, 2133.93892, -372.934672, 16.6203073, -.0417769401}},
    {"ltx", {21.4700694, -12.8016453, 2.31279151, .792487521, .00969274326}},
    {"mochi", {-3512.41319, 811.675948, -60.9400215, 2.42429681, .00305291719}},
    {"cosmos", {271.156237, -91.9775607, 2.2443725, 2.08355751, .14177633}},
    {"lumina", {393.76566581, -603.50993606, 209.10239044, -23.00726601, .86377344}},
    {"lumina2-v2", {225.70420198, -608.84537166, 304.18699423, 124.21267720, -1.40890669}},
    {"hidream", {-31360.5009, -712.425503, 49.1363285, 8.2651549, .108053901}},
    {"opensora", {217.546007, -118.329252, 26.8662585, -.0459364272, .048442624}},
    {"latte", {-2464.34137, 308.044764, 80.7447667, -4.11385132, .111001402}},
    {"opensora-plan", {205943.668, -14875.9286, 306.085986, 1.3141808, .00239658469}},
};

/* layout.tables */
typedef struct {
    double c[NUM_COEFFICIENTS];
    double change[]; /* [num_steps] P(rho) of signal=timestep */
} tea_tables;

typedef struct {
    double acc[2];
} tea_state;

static double poly(const double *c, double rho) {
    double v = c[0];
    for (int i = 1; i < NUM_COEFFICIENTS; i++) v = v * rho + c[i];
    return v;
}

/* ---- coefficients ---- */

static const double *find_model(const char *name) {
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        if (strcmp(models[i].name, name) == 0) return models[i].c;
    }
    return NULL;
}

static rf_status parse_list(const char *text, double *c, rf_error *err) {
    const char *at = text;
    for (int i = 0; i < NUM_COEFFICIENTS; i++) {
        char *end;
        c[i] = strtod(at, &end);
        char want = i + 1 < NUM_COEFFICIENTS ? ':' : 0;
        if (end == at || *end != want || !isfinite(c[i])) {
            return rf_fail(
                err, RF_ERR_ARGUMENT,
                "policy teacache: coefficients='%.80s' is neither auto, identity, a model that is known (see "
                "the help of coefficients), nor five numbers c4:c3:c2:c1:c0",
                text);
        }
        at = end + 1;
    }
    return RF_OK;
}

/* {"teacache": {"signal": "modulated" | "timestep", "coefficients": [c4, c3, c2, c1, c0]}}; *found: for this signal. */
static rf_status read_calibration(const rf_cache_shape *shape, int signal, double *c, bool *found, rf_error *err) {
    *found = false;
    const rf_json_value *own = shape->calibration ? rf_json_get(shape->calibration, "teacache") : NULL;
    if (!own) return RF_OK;
    const char *fitted = rf_json_string(rf_json_get(own, "signal"));
    if (fitted && strcmp(fitted, signal == TIMESTEP ? "timestep" : "modulated") != 0) return RF_OK;
    if (!fitted && signal == TIMESTEP) return RF_OK;
    const rf_json_value *list = rf_json_get(own, "coefficients");
    bool good = list && rf_json_is_array(list) && rf_json_count(list) == NUM_COEFFICIENTS;
    for (int i = 0; good && i < NUM_COEFFICIENTS; i++) {
        c[i] = rf_json_number(rf_json_at(list, (size_t)i, NULL));
        good = isfinite(c[i]);
    }
    if (!good) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: teacache.coefficients must be %d numbers", shape->model,
                       NUM_COEFFICIENTS);
    }
    *found = true;
    return RF_OK;
}

static rf_status resolve(const rf_policy *policy, const rf_cache_shape *shape, double *c, rf_error *err) {
    const char *text = rf_policy_text(policy, COEFFICIENTS);
    if (strcmp(text, "auto") == 0) {
        bool found;
        rf_status st = read_calibration(shape, (int)rf_policy_int(policy, SIGNAL), c, &found, err);
        if (st != RF_OK || found) return st;
        text = "identity";
    }
    const double *known = find_model(text);
    if (!known) return parse_list(text, c, err);
    memcpy(c, known, NUM_COEFFICIENTS * sizeof *c);
    return RF_OK;
}

/* ---- the rule ---- */

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    bool from_timestep = rf_policy_int(policy, SIGNAL) == TIMESTEP;
    rf_status st = RF_OK;
    if (rf_policy_double(policy, THRESHOLD) > 0) {
        int min_steps = (int)(rf_policy_int(policy, FIRST) + rf_policy_int(policy, LAST)) + 1;
        st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
    }
    double c[NUM_COEFFICIENTS] = {0};
    if (st == RF_OK) st = resolve(policy, shape, c, err);
    if (st != RF_OK) return st;
    tea_tables *t = rf_alloc(sizeof *t + (size_t)shape->num_steps * sizeof t->change[0]);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "policy teacache: no memory for %d steps", shape->num_steps);
    memcpy(t->c, c, sizeof c);
    for (int s = 0; s < shape->num_steps; s++) t->change[s] = poly(c, from_timestep ? shape->temb_change[s] : 0);
    layout->tables = t;
    layout->is_static = from_timestep;
    layout->signals = from_timestep ? 0 : 1u << RF_SIGNAL_MODULATED_STEP;
    rf_schedule_keep_last(shape, layout, 1);
    layout->spans[0].delta = true;
    return RF_OK;
}

/* Computed whatever the signal says. */
static bool is_fixed(const rf_policy *policy, const rf_step_ctx *ctx) {
    return ctx->force_full || ctx->num_stored == 0 || rf_policy_double(policy, THRESHOLD) <= 0 ||
           rf_ctx_warms_up(ctx, rf_policy_int(policy, FIRST)) ||
           ctx->step >= ctx->shape->num_steps - rf_policy_int(policy, LAST);
}

static bool wants_signals(const rf_policy *policy, const void *state, const rf_step_ctx *ctx) {
    return !is_fixed(policy, ctx) && ctx->step > 0;
}

static double change_of(const rf_policy *policy, const rf_step_ctx *ctx, int branch) {
    const tea_tables *t = ctx->layout->tables;
    if (rf_policy_int(policy, SIGNAL) == TIMESTEP) return t->change[ctx->step];
    double rho = rf_ctx_rel1(ctx, RF_SIGNAL_MODULATED_STEP, branch);
    return rho <= LARGEST_RHO ? poly(t->c, rho) : UNKNOWN_CHANGE;
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    tea_state *s = state;
    int branches = rf_policy_int(policy, BRANCH) == COND ? 1 : ctx->shape->branches;
    bool full = true;
    rf_schedule_begin_plan(ctx, plan);
    if (!is_fixed(policy, ctx)) {
        double change[2] = {0};
        for (int b = 0; b < branches && ctx->step > 0; b++) change[b] = change_of(policy, ctx, b);
        full = rf_schedule_add_up(s->acc, change, branches, rf_policy_double(policy, THRESHOLD), plan);
    }
    if (full) s->acc[0] = s->acc[1] = 0;
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = RF_PRODUCE_SPAN;
    if (ctx->num_stored > 0) plan->num_terms = rf_predict_reuse(plan->weights[0]);
}

const rf_policy_def rf_policy_teacache = {
    .name = "teacache",
    .family = "feature",
    .level = "step",
    .paper = "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108",
    .summary = "skips while the summed change of the first modulated input stays small",
    .fits = "every model; best with coefficients of its own; a solver that adds no noise, at 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(tea_state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan_step,
};
