/* caching/features/magcache.c - MagCache: fast video generation with magnitude-aware cache, arXiv 2506.09045.
 *
 * A table measured once for a model: gamma_s = mean over tokens of |r_s| / |r_(s-1)|, r the residual of the stack. At
 * run time, from step start = int(retain T) on
 *   ratio *= gamma_s,  n += 1,  err += |1 - ratio|
 *   err <= threshold and n <= max_skips  SKIP: x_out = x_in + r of the last computed step
 *   else                                 FULL, ratio = 1, n = 0, err = 0
 * A table of another length is resampled by nearest neighbour. Every branch has a table and sums of its own; the first
 * to ask for FULL decides for both. Data is never looked at: the schedule is known before the run.
 *
 * Carried: sums begin empty with step 0, as if a FULL step stood in front of it.
 *
 * Order of tests: s < start FULL (sums stay empty); last step FULL (if `last`, which the reference does not have);
 * sums; FULL resets.
 * Pitfalls - `<=` as in most of the reference (Wan's copy has `<`; they differ only where err meets the threshold to
 *            the bit).
 *          - table=flux brings two rules of its own: start = int(retain T + .5), and the step at index 11 of the table
 *            is FULL.
 *          - gamma 1 after a FULL step gives err 0, which is no more than any threshold: threshold=0 is taken as "never
 *            skips", as is max_skips=0. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"
#include "core/memory.h"

enum { THRESHOLD, MAX_SKIPS, RETAIN, TABLE, LAST, NUM_OPTIONS };

#define MAX_TABLE       1024
#define FLUX_FULL_INDEX 11

static const rf_policy_option options[NUM_OPTIONS] = {
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.12", 0, 1000, NULL,
                   "summed error of magnitude above which a step is computed; 0 never skips"},
    [MAX_SKIPS] = {"max_skips", RF_OPTION_INT, "4", 0, 1000, NULL, "most steps skipped in a row; 0 never skips"},
    [RETAIN] = {"retain", RF_OPTION_DOUBLE, "0.2", 0, 1, NULL, "share of the steps computed at the start"},
    [TABLE] =
        {"table", RF_OPTION_TEXT, "auto", 0, 0, NULL,
         "magnitude ratios: auto (the model's own, from refrain calibrate magcache), flux, hunyuan, flat:G (G at every "
         "step), or numbers g0:g1:..., stretched over the run"},
    [LAST] = {"last", RF_OPTION_BOOL, "false", 0, 1, NULL, "the last step is always computed"},
};

static const double flux[] = {1,       1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125,
                              1.02344, .98047,  1.01562, 1.00781, 1,      1.00781, 1,       1.00781, 1,       1,
                              .99609,  .99609,  .98047,  .98828,  .96484, .95703,  .93359,  .89062};
static const double hunyuan[] = {
    1,       1.0754,  1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679, 1.02556,
    1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161, 1.02968, 1.00544, 1.02822,
    1.00689, 1.02119, 1.0105,  1.01044, 1.01572, 1.02972, 1.0094,  1.02368, 1.0226,  .98965,  1.01588, 1.02146, 1.0018,
    1.01687, .99436,  1.00283, 1.01139, .97122,  .98251,  .94513,  .97656,  .90943,  .85703,  .75456};

/* layout.tables */
typedef struct {
    int start, flux_full; /* flux_full: that step is FULL, -1 none */
    double gamma[];       /* [branches * num_steps] */
} mag_tables;

typedef struct {
    double ratio[2], err[2];
    int num; /* steps since the last FULL one */
} mag_state;

/* ---- tables ---- */

/* Nearest neighbour, ends on ends. */
static int source_index(int step, int num_steps, int length) {
    if (num_steps < 2) return 0;
    return (int)rint((double)step * (length - 1) / (num_steps - 1));
}

static void resample(double *gamma, int num_steps, const double *table, int length) {
    for (int s = 0; s < num_steps; s++) gamma[s] = table[source_index(s, num_steps, length)];
}

static bool is_gamma(double g) {
    return isfinite(g) && g > 0;
}

/* One branch of {"magcache": {"ratios": [[...], ...]}} */
static int read_row(const rf_json_value *row, double *table) {
    int num = 0;
    if (!row || !rf_json_is_array(row) || rf_json_count(row) > MAX_TABLE) return 0;
    for (const rf_json_value *v = rf_json_first(row); v; v = rf_json_next(v), num++) {
        table[num] = rf_json_number(v);
        if (!is_gamma(table[num])) return 0;
    }
    return num;
}

static rf_status read_calibration(const rf_cache_shape *shape, double *gamma, rf_error *err) {
    const rf_json_value *own = shape->calibration ? rf_json_get(shape->calibration, "magcache") : NULL;
    const rf_json_value *rows = own ? rf_json_get(own, "ratios") : NULL;
    if (!own) {
        return rf_fail(
            err, RF_ERR_MISSING,
            "policy magcache: %s has no table of magnitude ratios; run `refrain calibrate magcache` once, or "
            "give one (table=flat:1.02, table=1:1.05:..., table=flux, table=hunyuan)",
            shape->model);
    }
    size_t num_rows = rows && rf_json_is_array(rows) ? rf_json_count(rows) : 0;
    double table[MAX_TABLE];
    for (int b = 0; b < shape->branches; b++) {
        size_t row = (size_t)b < num_rows ? (size_t)b : 0; /* measured without guidance: the same for both */
        int num = num_rows > 0 ? read_row(rf_json_at(rows, row, NULL), table) : 0;
        if (num == 0) {
            return rf_fail(err, RF_ERR_CONFIG,
                           "%s: cache.json: magcache.ratios must be a list of 1..%d numbers above 0 for every branch",
                           shape->model, MAX_TABLE);
        }
        resample(gamma + (size_t)b * (size_t)shape->num_steps, shape->num_steps, table, num);
    }
    return RF_OK;
}

static rf_status bad_table(const char *text, rf_error *err) {
    return rf_fail(
        err, RF_ERR_ARGUMENT,
        "policy magcache: table='%.80s' is none of auto, flux, hunyuan, flat:G, and up to %d numbers above 0 "
        "g0:g1:...",
        text, MAX_TABLE);
}

static rf_status parse_table(const char *text, double *table, int *num, rf_error *err) {
    bool flat = strncmp(text, "flat:", 5) == 0;
    const char *at = text + (flat ? 5 : 0);
    *num = 0;
    for (;;) {
        char *end;
        double g = strtod(at, &end);
        if (end == at || (*end && *end != ':') || !is_gamma(g) || *num == MAX_TABLE) return bad_table(text, err);
        table[(*num)++] = g;
        if (!*end) break;
        at = end + 1;
    }
    return flat && *num > 1 ? bad_table(text, err) : RF_OK;
}

static rf_status make_gamma(const rf_policy *policy, const rf_cache_shape *shape, double *gamma, rf_error *err) {
    const char *text = rf_policy_text(policy, TABLE);
    if (strcmp(text, "auto") == 0) return read_calibration(shape, gamma, err);
    double given[MAX_TABLE];
    const double *table = given;
    int num = 0;
    if (strcmp(text, "flux") == 0) {
        table = flux;
        num = (int)(sizeof flux / sizeof flux[0]);
    } else if (strcmp(text, "hunyuan") == 0) {
        table = hunyuan;
        num = (int)(sizeof hunyuan / sizeof hunyuan[0]);
    } else {
        rf_status st = parse_table(text, given, &num, err);
        if (st != RF_OK) return st;
    }
    for (int b = 0; b < shape->branches; b++) {
        resample(gamma + (size_t)b * (size_t)shape->num_steps, shape->num_steps, table, num);
    }
    return RF_OK;
}

/* ---- the rule ---- */

static bool never_skips(const rf_policy *policy) {
    return rf_policy_int(policy, MAX_SKIPS) == 0 || rf_policy_double(policy, THRESHOLD) <= 0;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    bool is_flux = strcmp(rf_policy_text(policy, TABLE), "flux") == 0;
    int num_steps = shape->num_steps;
    int start = (int)(rf_policy_double(policy, RETAIN) * num_steps + (is_flux ? 0.5 : 0));
    if (start < 1) start = 1;
    if (!never_skips(policy)) {
        int min_steps = rf_policy_double(policy, RETAIN) < 1 ? 2 + rf_policy_bool(policy, LAST) : 2;
        rf_status st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
        if (st != RF_OK) return st;
    }
    mag_tables *t = rf_alloc(sizeof *t + (size_t)shape->branches * (size_t)num_steps * sizeof t->gamma[0]);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "policy magcache: no memory for %d steps", num_steps);
    rf_status st = make_gamma(policy, shape, t->gamma, err);
    if (st != RF_OK) {
        rf_free(t);
        return st;
    }
    t->start = start;
    t->flux_full = -1;
    layout->tables = t;
    layout->is_static = true;
    rf_schedule_keep_last(shape, layout, 1);
    layout->spans[0].delta = true;
    if (is_flux) t->flux_full = FLUX_FULL_INDEX;
    return RF_OK;
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    const mag_tables *t = ctx->layout->tables;
    mag_state *s = state;
    int num_steps = ctx->shape->num_steps;
    bool full = ctx->force_full || ctx->num_stored == 0 || rf_ctx_warms_up(ctx, t->start) || never_skips(policy) ||
                (rf_policy_bool(policy, LAST) && ctx->step == num_steps - 1);
    rf_schedule_begin_plan(ctx, plan);
    if (ctx->step == 0) *s = (mag_state){.ratio = {1, 1}};
    if (!full) {
        plan->threshold = rf_policy_double(policy, THRESHOLD);
        plan->statistic = 0;
        s->num++;
        for (int b = 0; b < ctx->shape->branches; b++) {
            s->ratio[b] *= t->gamma[b * num_steps + ctx->step];
            s->err[b] += fabs(1 - s->ratio[b]);
            if (s->err[b] > plan->statistic) plan->statistic = s->err[b];
        }
        full = !(plan->statistic <= plan->threshold) || s->num > rf_policy_int(policy, MAX_SKIPS) ||
               (t->flux_full >= 0 &&
                source_index(ctx->step, num_steps, (int)(sizeof flux / sizeof flux[0])) == t->flux_full);
    }
    if (full) *s = (mag_state){.ratio = {1, 1}};
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = RF_PRODUCE_SPAN;
    if (ctx->num_stored > 0) plan->num_terms = rf_predict_reuse(plan->weights[0]);
}

const rf_policy_def rf_policy_magcache = {
    .name = "magcache",
    .family = "feature",
    .level = "step",
    .paper = "MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045",
    .summary = "skips while measured ratios of residual magnitudes say that little is lost",
    .fits =
        "models with a measured table (refrain calibrate magcache); a solver that adds no noise, at 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(mag_state),
    .setup = setup,
    .plan = plan_step,
};
