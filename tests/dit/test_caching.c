/* tests/dit/test_caching.c - policies on the engine: what was decided is read from traces, what came of it from
 * latents.
 *
 * All runs are of dit-tiny (3 blocks of attention and MLP, 16 tokens) with DDIM and guidance 3. Two traces are compared
 * decision by decision: kinds, parts, rows, weights, statistics and thresholds count, the header and measured signals
 * do not. Where an option only changes what a trace does not name (which rows, or which feature), the latents must
 * differ instead; such rows of the table say so. Bounds: equal decisions give equal bits; a batch of another size sums
 * in another order, which moves dit-tiny's latents by less than 1e-5 of their size. */
#include "core/json.h"
#include "core/rng.h"
#include "tests/dit/dit_test_util.h"

enum { MAX_BATCH = 3, MAX_STEPS = 50, LATENT = 4 * 8 * 8, BLOCKS = 3, PARTS = 2, TOKENS = 16 };

static const int classes[MAX_BATCH] = {0, 4, 2};
static const uint64_t seeds[MAX_BATCH] = {7, 8, 9};

/* --- traces ------------------------------------------------------------------------------------------------------- */

/* What one image did at one step. */
typedef struct {
    char kind[8], produce[8], verify[8], blocks[BLOCKS * (PARTS + 1)];
    int span, horizon, num_rows, rows[BLOCKS * PARTS], num_classes, num_terms;
    bool forced, has_drift;
    double statistic, threshold, drift[2], weights[RF_CACHE_MAX_CLASSES][RF_CACHE_MAX_TERMS];
} entry;

typedef struct {
    float latents[MAX_BATCH * LATENT];
    rf_cache_counts counts;
    uint8_t kinds[MAX_BATCH * MAX_STEPS];
    int batch, steps;
    entry at[MAX_BATCH][MAX_STEPS]; /* all zero if nothing was recorded */
    char *text;                     /* header and step lines; the header ends at its first newline */
    size_t text_bytes;
} result;

static void copy_string(char *out, size_t bytes, const rf_json_value *object, const char *key) {
    const char *text = rf_json_has(object, key) ? rf_json_string(rf_json_get(object, key)) : "";
    ck_assert_ptr_nonnull(text);
    ck_assert_uint_lt(strlen(text), bytes);
    memcpy(out, text, strlen(text) + 1);
}

static double number_or_nan(const rf_json_value *object, const char *key) {
    return rf_json_has(object, key) ? rf_json_number(rf_json_get(object, key)) : (double)NAN;
}

static entry read_entry(const rf_json *doc, const rf_json_value *v) {
    entry e = {0};
    rf_error err = {0};
    copy_string(e.kind, sizeof e.kind, v, "kind");
    copy_string(e.produce, sizeof e.produce, v, "produce");
    copy_string(e.verify, sizeof e.verify, v, "verify");
    copy_string(e.blocks, sizeof e.blocks, v, "blocks");
    rf_assert_ok(rf_json_get_bool(doc, v, "forced", &e.forced, &err), err);
    e.span = (int)number_or_nan(v, "span");
    e.horizon = (int)number_or_nan(v, "horizon");
    e.statistic = number_or_nan(v, "statistic");
    e.threshold = number_or_nan(v, "threshold");
    const rf_json_value *rows = rf_json_get(v, "rows"), *drift = rf_json_get(v, "drift");
    for (const rf_json_value *r = rows ? rf_json_first(rows) : NULL; r; r = rf_json_next(r))
        e.rows[e.num_rows++] = (int)rf_json_number(r);
    e.has_drift = drift != NULL;
    for (size_t b = 0; drift != NULL && b < rf_json_count(drift); b++)
        e.drift[b] = rf_json_number(rf_json_at(drift, b, NULL));
    const rf_json_value *weights = rf_json_get(v, "weights");
    for (const rf_json_value *row = weights ? rf_json_first(weights) : NULL; row; row = rf_json_next(row)) {
        e.num_terms = 0;
        for (const rf_json_value *w = rf_json_first(row); w; w = rf_json_next(w))
            e.weights[e.num_classes][e.num_terms++] = rf_json_number(w);
        e.num_classes++;
    }
    return e;
}

/* One line of a trace: collected, and a step's also read. */
static rf_status take_line(void *user, const char *json, rf_error *err) {
    result *r = user;
    size_t bytes = strlen(json);
    char *grown = realloc(r->text, r->text_bytes + bytes + 2);
    if (grown == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a trace");
    r->text = grown;
    memcpy(r->text + r->text_bytes, json, bytes);
    r->text_bytes += bytes;
    memcpy(r->text + r->text_bytes++, "\n", 2);
    rf_json *doc = NULL;
    rf_status st = rf_json_parse(&doc, json, bytes, "trace", err);
    if (st != RF_OK) return st;
    const rf_json_value *root = rf_json_root(doc), *images = rf_json_get(root, "images");
    if (!rf_json_has(root, "trace")) {
        int step = (int)number_or_nan(root, "step");
        ck_assert(step >= 0 && step < r->steps && rf_json_is_array(images));
        for (const rf_json_value *v = rf_json_first(images); v; v = rf_json_next(v)) {
            const rf_json_value *who = rf_json_get(v, "image");
            bool many = rf_json_is_array(who);
            for (const rf_json_value *n = many ? rf_json_first(who) : who; n; n = many ? rf_json_next(n) : NULL) {
                int image = (int)rf_json_number(n);
                ck_assert(image >= 0 && image < r->batch);
                r->at[image][step] = read_entry(doc, v);
            }
        }
    }
    rf_json_close(doc);
    return RF_OK;
}

static const char *step_lines(const result *r) {
    return strchr(r->text, '\n') + 1;
}

/* Not rounding, not equal. NaN is a value like any other. */
static bool numbers_differ(double a, double b, double bound) {
    if (isnan(a) || isnan(b)) return isnan(a) != isnan(b);
    return fabs(a - b) > bound * fmax(fabs(a), fabs(b));
}

/* The first thing that two decisions differ in, NULL if nothing. bound: of statistics. */
static const char *entries_differ(const entry *a, const entry *b, double bound) {
    if (strcmp(a->kind, b->kind) != 0) return "kind";
    if (strcmp(a->produce, b->produce) != 0 || a->span != b->span) return "produce";
    if (strcmp(a->verify, b->verify) != 0) return "verify";
    if (strcmp(a->blocks, b->blocks) != 0) return "blocks";
    if (a->num_rows != b->num_rows || memcmp(a->rows, b->rows, sizeof a->rows) != 0) return "rows";
    if (a->horizon != b->horizon) return "horizon";
    if (a->forced != b->forced) return "forced";
    if (a->num_classes != b->num_classes || a->num_terms != b->num_terms) return "number of weights";
    for (int c = 0; c < a->num_classes; c++)
        for (int j = 0; j < a->num_terms; j++)
            if (fabs(a->weights[c][j] - b->weights[c][j]) > 1e-4) return "weights";
    if (numbers_differ(a->threshold, b->threshold, 1e-9)) return "threshold";
    if (numbers_differ(a->statistic, b->statistic, bound)) return "statistic";
    return NULL;
}

static const char *traces_differ(const result *a, const result *b, double bound, int *step) {
    for (int i = 0; i < a->batch; i++)
        for (*step = 0; *step < a->steps; ++*step) {
            const char *what = entries_differ(&a->at[i][*step], &b->at[i][*step], bound);
            if (what != NULL) return what;
        }
    return NULL;
}

/* --- runs --------------------------------------------------------------------------------------------------------- */

typedef struct {
    dit_device d;
    rf_image_model *model;
} engine;

static engine engine_open(void) {
    engine e = {.d = dit_device_open()};
    rf_assert_ok(rf_image_model_load(&e.model, e.d.backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &e.d.err),
                 e.d.err);
    return e;
}

static void engine_close(engine *e) {
    rf_image_model_close(e->model);
    dit_device_close(&e->d);
}

/* A run; what is left 0 is one image, 20 steps, guidance 3, DDIM, recorded. */
typedef struct {
    const char *policy, *options, *option, *value; /* option is set on top of options; its value may hold commas */
    int batch, first, steps;                       /* first: number of the batch's first image in classes and seeds */
    double max_drift;
    bool quiet, force, ddpm, uneven, unguided; /* quiet: nothing is recorded; uneven: Euler on Karras sigmas */
} job;

static rf_status make_policy(rf_policy **out, const job *j, rf_error *err) {
    *out = NULL;
    if (j->policy == NULL) return RF_OK;
    rf_status st = rf_policy_create(out, j->policy, err);
    if (st == RF_OK && j->options) st = rf_policy_set(*out, j->options, err);
    if (st == RF_OK && j->option) st = rf_policy_set_one(*out, j->option, j->value, err);
    return st;
}

static rf_image_options options_of(const job *j, const rf_policy *policy) {
    rf_image_options o = rf_image_options_default();
    o.batch = j->batch ? j->batch : 1;
    o.num_steps = j->steps ? j->steps : 20;
    o.cfg_scale = j->unguided ? 1.0 : 3.0;
    o.sampler = j->ddpm ? RF_SAMPLER_DDPM : j->uneven ? RF_SAMPLER_EULER : RF_SAMPLER_DDIM;
    o.sigmas = j->uneven ? RF_SIGMAS_KARRAS : RF_SIGMAS_DEFAULT;
    o.policy = policy;
    o.max_drift = j->max_drift;
    o.record_trace = policy != NULL && !j->quiet;
    o.force_policy = j->force;
    return o;
}

static void name_job(const job *j, char *out, size_t bytes) {
    snprintf(out, bytes, "%s %s%s%s%s%s, batch %d", j->policy ? j->policy : "no policy", j->options ? j->options : "",
             j->option ? " " : "", j->option ? j->option : "", j->option ? "=" : "", j->option ? j->value : "",
             j->batch ? j->batch : 1);
}

/* Runs a session that exists. */
static result *denoise(rf_image_session *s, const job *j, rf_error *err) {
    char name[512];
    name_job(j, name, sizeof name);
    result *r = calloc(1, sizeof *r);
    ck_assert_ptr_nonnull(r);
    r->batch = j->batch ? j->batch : 1;
    r->steps = j->steps ? j->steps : 20;
    ck_assert(r->batch + j->first <= MAX_BATCH && r->steps <= MAX_STEPS);
    rf_status st = rf_image_session_denoise(s, classes + j->first, seeds + j->first, NULL, NULL, NULL, err);
    ck_assert_msg(st == RF_OK, "%s: %s", name, err->message);
    rf_assert_ok(rf_image_session_read_latents(s, r->latents, err), *err);
    rf_image_session_info info = rf_image_session_get_info(s);
    if (info.has_cache) {
        r->counts = info.cache;
        memcpy(r->kinds, info.step_kinds, (size_t)(r->batch * r->steps));
    }
    if (j->policy == NULL || j->quiet) return r;
    st = rf_image_session_write_trace(s, 0, take_line, r, err);
    ck_assert_msg(st == RF_OK, "%s: %s", name, err->message);
    return r;
}

static result *run(engine *e, const job *j) {
    char name[512];
    rf_policy *policy = NULL;
    rf_image_session *s = NULL;
    name_job(j, name, sizeof name);
    rf_status st = make_policy(&policy, j, &e->d.err);
    rf_image_options o = options_of(j, policy);
    if (st == RF_OK) st = rf_image_session_create(&s, e->model, &o, &e->d.err);
    ck_assert_msg(st == RF_OK, "%s: %s", name, e->d.err.message);
    result *r = denoise(s, j, &e->d.err);
    rf_image_session_destroy(s);
    rf_policy_destroy(policy);
    return r;
}

static void result_free(result *r) {
    if (r == NULL) return;
    free(r->text);
    free(r);
}

static bool same_bits(const result *a, const result *b) {
    return memcmp(a->latents, b->latents, sizeof(float) * (size_t)(a->batch * LATENT)) == 0;
}

/* --- every option of every policy --------------------------------------------------------------------------------- */

typedef enum {
    BY_TRACE,   /* decisions differ */
    BY_UNEVEN,  /* the same, on steps of uneven length (Euler, Karras) */
    BY_LATENTS, /* the trace does not name what changes (which rows, which feature), the latents do */
    EXEMPT      /* see why */
} evidence;

typedef struct {
    const char *policy, *base, *option, *a, *b;
    evidence by;
    const char *why; /* of what is not BY_TRACE */
} option_case;

#define WHICH_ROWS    BY_LATENTS, "a trace counts rows, it does not list them"
#define WHICH_FEATURE BY_LATENTS, "a trace says that a span is predicted, not in what form it is kept"
#define LEVELS_FILE   "(a file)" /* stands for a table written by the test */
#define TOCA_BASE     "ratio=0.5,step_weight=0,module_weight=0"
#define SPARSE_BASE   "table=uniform"

/* Every value of a choice is in some row; so are both values of a switch. */
static const option_case option_cases[] = {
    {"interval", "", "interval", "3", "4", BY_TRACE, NULL},
    {"interval", "", "first", "1", "3", BY_TRACE, NULL},
    {"interval", "", "last", "true", "false", BY_TRACE, NULL},
    {"interval", "", "level", "output", "residual", BY_TRACE, NULL},
    {"interval", "", "level", "residual", "hidden", WHICH_FEATURE},
    {"interval", "", "order", "0", "1", BY_TRACE, NULL},
    {"interval", "order=1", "order", "1", "2", BY_TRACE, NULL},
    {"interval", "order=2", "order", "2", "3", BY_TRACE, NULL},
    {"interval", "order=2", "predictor", "taylor", "newton", BY_TRACE, NULL},
    {"teacache", "", "threshold", "0.3", "0.6", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "signal", "modulated", "timestep", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "coefficients", "identity", "0:0:0:0.5:0", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "coefficients", "auto", "flux", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "first", "1", "6", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "last", "1", "4", BY_TRACE, NULL},
    {"teacache", "threshold=0.6", "branch", "any", "cond", BY_TRACE, NULL},
    {"easycache", "", "threshold", "0.2", "0.5", BY_TRACE, NULL},
    {"easycache", "threshold=0.5", "first", "5", "8", BY_TRACE, NULL},
    {"easycache", "threshold=0.5", "last", "true", "false", BY_TRACE, NULL},
    {"easycache", "threshold=0.2", "branch", "cond", "any", BY_TRACE, NULL},
    {"magcache", "table=flat:1.02", "threshold", "0.1", "0.25", BY_TRACE, NULL},
    {"magcache", "table=flat:1.001", "max_skips", "2", "4", BY_TRACE, NULL},
    {"magcache", "table=flat:1.02", "retain", "0.2", "0.4", BY_TRACE, NULL},
    {"magcache", "", "table", "flat:1.02", "flat:1.05", BY_TRACE, NULL},
    {"magcache", "", "table", "flux", "hunyuan", BY_TRACE, NULL},
    {"magcache", "", "table", "1:1.01:1.02", "1.02:1.01:1", BY_TRACE, NULL},
    {"magcache", "table=flat:1.02", "last", "false", "true", BY_TRACE, NULL},
    {"spectrum", "", "first", "5", "7", BY_TRACE, NULL},
    {"spectrum", "", "window", "2", "3", BY_TRACE, NULL},
    {"spectrum", "", "flex", "0.75", "0.25", BY_TRACE, NULL},
    {"spectrum", "", "degree", "4", "2", BY_TRACE, NULL},
    {"spectrum", "", "lambda", "0.1", "1", BY_TRACE, NULL},
    {"spectrum", "", "blend", "0.5", "1", BY_TRACE, NULL},
    {"spectrum", "", "span", "50", "0", BY_TRACE, NULL},
    {"spectrum", "", "history", "64", "3", BY_TRACE, NULL},
    {"spectrum", "", "level", "hidden", "output", BY_TRACE, NULL},
    {"spectrum", "", "last", "false", "true", BY_TRACE, NULL},
    {"adacache", "", "codebook", "slow", "0.5:4/0.65:3/5:2", BY_TRACE, NULL},
    {"adacache", "", "codebook", "fast", "long", BY_TRACE, NULL},
    {"adacache", "codebook=0.5:4/0.65:3/5:2", "first", "2", "6", BY_TRACE, NULL},
    {"adacache", "codebook=0.5:4/0.65:3/5:3", "last", "true", "false", BY_TRACE, NULL},
    {"worldcache", "", "p_stable", "0.3", "0", BY_TRACE, NULL},
    {"worldcache", "", "p_chaotic", "0.6", "0.8", BY_TRACE, NULL},
    {"worldcache", "threshold=1", "max_skips", "2", "4", BY_TRACE, NULL},
    {"worldcache", "", "threshold", "0.2", "1", BY_TRACE, NULL},
    {"worldcache", "", "warmup", "5", "8", BY_TRACE, NULL},
    {"worldcache", "", "rule", "code", "paper", BY_TRACE, NULL},
    {"worldcache", "", "time", "step", "timestep", BY_UNEVEN, "on an even grid both count the same"},
    {"worldcache", "", "pooled", "false", "true", BY_TRACE, NULL},
    {"worldcache", "", "floor", "0", "1", BY_TRACE, NULL},
    {"worldcache", "", "predictor", "grouped", "hermite", BY_TRACE, NULL},
    {"worldcache", "", "predictor", "linear", "reuse", BY_TRACE, NULL},
    {"worldcache", "", "predictor", "linear", "damped", BY_TRACE, NULL},
    {"worldcache", "", "skip", "cas", "interval", BY_TRACE, NULL},
    {"fbcache", "", "threshold", "0.5", "0.8", BY_TRACE, NULL},
    {"fbcache", "threshold=0.8", "warmup", "0", "6", BY_TRACE, NULL},
    {"fbcache", "threshold=0.9", "max_skips", "-1", "1", BY_TRACE, NULL},
    {"dbcache", "threshold=0.8", "fn", "1", "2", BY_TRACE, NULL},
    {"dbcache", "threshold=0.8", "bn", "0", "1", BY_TRACE, NULL},
    {"dbcache", "threshold=0.8", "warmup", "4", "8", BY_TRACE, NULL},
    {"dbcache", "threshold=1", "interval", "1", "2", BY_TRACE, NULL},
    {"dbcache", "threshold=1", "max_cached", "-1", "3", BY_TRACE, NULL},
    {"dbcache", "threshold=1", "max_continuous", "4", "2", BY_TRACE, NULL},
    {"dbcache", "", "threshold", "0.5", "0.8", BY_TRACE, NULL},
    {"dbcache", "threshold=0.9", "accumulate", "false", "true", BY_TRACE, NULL},
    {"dbcache", "threshold=1", "calibrator", "none", "taylor", BY_TRACE, NULL},
    {"dbcache", "threshold=1,calibrator=taylor", "order", "1", "2", BY_TRACE, NULL},
    {"dbcache", "threshold=1", "mask", "", "11001", BY_TRACE, NULL},
    {"deltacache", "", "interval", "2", "3", BY_TRACE, NULL},
    {"deltacache", "", "fraction", "0.75", "0.4", BY_TRACE, NULL},
    {"deltacache", "", "split", "0.5", "0.2", BY_TRACE, NULL},
    {"deltacache", "", "first", "1", "4", BY_TRACE, NULL},
    {"fora", "", "interval", "3", "4", BY_TRACE, NULL},
    {"fora", "", "count", "down", "up", BY_TRACE, NULL},
    {"taylorseer", "", "interval", "4", "3", BY_TRACE, NULL},
    {"taylorseer", "", "order", "0", "1", BY_TRACE, NULL},
    {"taylorseer", "", "order", "2", "3", BY_TRACE, NULL},
    {"taylorseer", "", "order", "3", "4", BY_TRACE, NULL},
    {"taylorseer", "", "first", "2", "5", BY_TRACE, NULL},
    {"taylorseer", "", "mode", "parts", "last", BY_TRACE, NULL},
    {"taylorseer", "order=2", "predictor", "taylor", "newton", BY_TRACE, NULL},
    {"hicache", "", "interval", "5", "3", BY_TRACE, NULL},
    {"hicache", "", "order", "1", "2", BY_TRACE, NULL},
    {"hicache", "", "sigma", "0.5", "0.7", BY_TRACE, NULL},
    {"hicache", "", "first", "3", "6", BY_TRACE, NULL},
    {"hicache", "", "mode", "parts", "last", BY_TRACE, NULL},
    {"speca", "", "order", "1", "4", BY_TRACE, NULL},
    {"speca", "order=1", "base", "0.1", "1", BY_TRACE, NULL},
    {"speca", "order=1", "decay", "0.01", "0.5", BY_TRACE, NULL},
    {"speca", "order=1", "min", "2", "3", BY_TRACE, NULL},
    {"speca", "order=1,base=1000,decay=1", "max", "5", "3", BY_TRACE, NULL},
    {"speca", "order=1", "first", "3", "6", BY_TRACE, NULL},
    {"speca", "order=1", "output", "draft", "verified", BY_TRACE, NULL},
    {"pab", "", "self", "2", "3", BY_TRACE, NULL},
    {"pab", "", "cross", "6", "2", EXEMPT, "blocks of a DiT have no cross-attention"},
    {"pab", "", "temporal", "4", "2", EXEMPT, "blocks of a DiT have no attention over frames (test_world has)"},
    {"pab", "", "mlp", "1", "2", BY_TRACE, NULL},
    {"pab", "", "lo", "100", "400", BY_TRACE, NULL},
    {"pab", "", "hi", "850", "600", BY_TRACE, NULL},
#define TOCA_CASES(name)                                                                                               \
    {name, TOCA_BASE, "interval", "3", "5", BY_TRACE, NULL},                                                           \
        {name, TOCA_BASE, "ratio", "0.5", "0.25", BY_TRACE, NULL},                                                     \
        {name, TOCA_BASE, "schedule_weight", "0.4", "0", BY_TRACE, NULL},                                              \
        {name, TOCA_BASE ",interval=4", "window", "true", "false", BY_TRACE, NULL},                                    \
        {name, TOCA_BASE, "step_weight", "0", "0.5", BY_TRACE, NULL},                                                  \
        {name, TOCA_BASE, "layer_weight", "-0.2", "0.5", BY_TRACE, NULL},                                              \
        {name, TOCA_BASE, "module_weight", "0", "1", BY_TRACE, NULL},                                                  \
        {name, TOCA_BASE, "attention", "cached", "rows", BY_TRACE, NULL},                                              \
        {name, TOCA_BASE, "score", "attention", "value", WHICH_ROWS},                                                  \
        {name, TOCA_BASE, "score", "value", "random", WHICH_ROWS},                                                     \
        {name, TOCA_BASE, "age_weight", "0", "10", WHICH_ROWS}, {name, TOCA_BASE, "bonus", "0", "3", WHICH_ROWS},      \
        {name, TOCA_BASE ",bonus=3", "cell", "2", "4", WHICH_ROWS}, {                                                  \
        name, TOCA_BASE ",score=random", "seed", "0", "1", WHICH_ROWS                                                  \
    }
    TOCA_CASES("toca"),
    TOCA_CASES("duca"),
    {"diffsparse", SPARSE_BASE, "budget", "0.5", "0.7", BY_TRACE, NULL},
    {"diffsparse", "", "table", "uniform", LEVELS_FILE, BY_TRACE, NULL},
    {"diffsparse", SPARSE_BASE, "first", "1", "4", BY_TRACE, NULL},
    {"diffsparse", SPARSE_BASE, "attention", "rows", "cached", BY_TRACE, NULL},
    {"diffsparse", SPARSE_BASE, "attention", "cached", "full", BY_TRACE, NULL},
    {"diffsparse", SPARSE_BASE, "score", "attention", "value", WHICH_ROWS},
    {"diffsparse", SPARSE_BASE, "score", "value", "random", WHICH_ROWS},
    {"diffsparse", SPARSE_BASE, "age_weight", "0", "10", WHICH_ROWS},
    {"diffsparse", SPARSE_BASE, "bonus", "0", "3", WHICH_ROWS},
    {"diffsparse", SPARSE_BASE ",bonus=3", "cell", "2", "4", WHICH_ROWS},
    {"diffsparse", SPARSE_BASE ",score=random", "seed", "0", "1", WHICH_ROWS},
    {"replay", "", "file", "", "", EXEMPT, "a trace of its own; the replay test runs one for every policy"},
};
enum { NUM_OPTION_CASES = (int)(sizeof option_cases / sizeof *option_cases) };

/* Is this value of an option in some row? value NULL: the option at all. */
static bool has_row(const char *policy, const char *option, const char *value, size_t value_bytes) {
    for (int i = 0; i < NUM_OPTION_CASES; i++) {
        const option_case *c = &option_cases[i];
        if (strcmp(c->policy, policy) != 0 || strcmp(c->option, option) != 0) continue;
        if (value == NULL || c->by == EXEMPT) return true;
        for (int side = 0; side < 2; side++) {
            const char *v = side ? c->b : c->a;
            if (strlen(v) == value_bytes && memcmp(v, value, value_bytes) == 0) return true;
        }
    }
    return false;
}

START_TEST(every_option_has_a_row) {
    ck_assert_int_gt(rf_policy_count(), 0);
    for (int p = 0; p < rf_policy_count(); p++) {
        const rf_policy_def *def = rf_policy_at(p);
        for (int i = 0; i < def->num_options; i++) {
            const rf_policy_option *o = &def->options[i];
            ck_assert_msg(has_row(def->name, o->name, NULL, 0), "no test of %s:%s", def->name, o->name);
            const char *words = o->type == RF_OPTION_CHOICE ? o->choices
                                : o->type == RF_OPTION_BOOL ? "true false"
                                                            : "";
            for (const char *w = words; *w; w += strspn(w, " ")) {
                size_t bytes = strcspn(w, " ");
                ck_assert_msg(has_row(def->name, o->name, w, bytes), "no test of %s:%s=%.*s", def->name, o->name,
                              (int)bytes, w);
                w += bytes;
            }
        }
    }
    for (int i = 0; i < NUM_OPTION_CASES; i++) {
        const option_case *c = &option_cases[i];
        rf_error err = {0};
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, c->policy, &err), err);
        rf_assert_ok(rf_policy_set_one(policy, c->option, c->a, &err), err); /* the row is of an option that exists */
        rf_policy_destroy(policy);
        ck_assert_msg((c->by == BY_TRACE) == (c->why == NULL), "%s:%s needs a reason", c->policy, c->option);
    }
}
END_TEST

/* Levels 4, then 2 for four steps, 0 and 3 in turn: nothing that a budget would spread. */
static void write_levels(const char *path) {
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs("{\"levels\":[", f);
    for (int i = 0; i < 20 * BLOCKS; i++) {
        int step = i / BLOCKS;
        fprintf(f, "%s%d", i ? "," : "", step == 0 ? 4 : step < 5 ? 2 : step % 2 ? 0 : 3);
    }
    fputs("]}\n", f);
    ck_assert_int_eq(fclose(f), 0);
}

START_TEST(every_option_changes_what_is_decided) {
    const option_case *c = &option_cases[_i];
    if (c->by == EXEMPT) return;
    char dir[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/levels.json", dir);
    write_levels(path);
    engine e = engine_open();
    result *r[2];
    for (int side = 0; side < 2; side++) {
        const char *value = side ? c->b : c->a;
        job j = {.policy = c->policy,
                 .options = c->base,
                 .option = c->option,
                 .value = strcmp(value, LEVELS_FILE) == 0 ? path : value,
                 .uneven = c->by == BY_UNEVEN};
        r[side] = run(&e, &j);
    }
    int step = 0;
    const char *what = traces_differ(r[0], r[1], 1e-3, &step);
    double moved = rf_compare_f32(r[0]->latents, r[1]->latents, LATENT).rel_l2;
    if (c->by != BY_LATENTS)
        ck_assert_msg(what != NULL, "%s %s: %s=%s and %s decide the same (latents differ by %g)", c->policy, c->base,
                      c->option, c->a, c->b, moved);
    else
        ck_assert_msg(moved > 1e-4, "%s %s: %s=%s and %s give the same picture (relative L2 %g)", c->policy, c->base,
                      c->option, c->a, c->b, moved);
    result_free(r[0]);
    result_free(r[1]);
    engine_close(&e);
    rf_temp_dir_remove(dir);
}
END_TEST

/* Limits are kept to the step: by hand from the rules, 20 steps; -1 = not said. */
typedef struct {
    const char *policy, *options;
    int first;   /* full steps at the start */
    int last;    /* full steps at the end */
    int longest; /* most steps in a row that are not full */
    int total;   /* of all */
    int terms;   /* most snapshots in a prediction that is used */
} limit_case;

static const limit_case limit_cases[] = {
    {"interval", "interval=4", 1, 1, 3, 14, 1},         /* full 0 4 8 12 16 19 */
    {"interval", "interval=4,first=3", 3, 2, 3, 12, 1}, /* full 0 1 2 6 10 14 18 19 */
    {"interval", "interval=4,last=false", 1, 0, 3, 15, 1},
    {"interval", "interval=4,order=3", 1, 1, 3, 14, 4},
    {"teacache", "threshold=1000,coefficients=0:0:0:0:0", 1, 1, 18, 18, 1},
    {"teacache", "threshold=1000,first=4,last=3,coefficients=0:0:0:0:0", 4, 3, 13, 13, 1},
    {"teacache", "threshold=1,signal=timestep,coefficients=0:0:0:0:0.25", 1, 1, 3, 14, 1}, /* full 0 4 8 12 16 19 */
    {"easycache", "threshold=1000", 5, 1, 14, 14, 1},
    {"easycache", "threshold=1000,first=9,last=false", 9, 0, 11, 11, 1},
    {"magcache", "table=flat:1,max_skips=1", 4, 1, 1, 8, 1}, /* 4 skips, 5 full, .. 18, 19 full */
    {"magcache", "table=flat:1,max_skips=3,last=true", 4, 1, 3, 12, 1},
    {"magcache", "table=flat:1,retain=0.5", 10, 1, 4, 8, 1},
    {"spectrum", "first=6,window=3,flex=0", 6, 0, 2, -1, -1},
    {"spectrum", "first=6,window=3,flex=0,last=true", 6, 1, 2, -1, -1},
    {"spectrum", "history=2", 5, 0, -1, -1, 2},
    {"adacache", "codebook=1000000:4", 2, 1, 3, -1, 1},
    {"adacache", "codebook=1000000:4,first=7,last=false", 7, 0, 3, -1, 1},
    {"worldcache", "threshold=1000000,max_skips=1", 5, 2, 1, 7, 3},
    {"worldcache", "threshold=1000000,max_skips=3", 5, 1, 3, -1, 3},
    {"worldcache", "threshold=1000000,max_skips=3,warmup=9", 9, 1, 3, -1, 3},
    {"worldcache", "skip=interval,max_skips=2,warmup=0", 3, 1, 2, -1, 3},
    {"fbcache", "threshold=1000000", 1, 0, 19, 19, 1},
    {"fbcache", "threshold=1000000,max_skips=3", 1, 0, 3, 15, 1},
    {"fbcache", "threshold=1000000,warmup=7,max_skips=2", 7, 0, 2, 9, 1},
    {"dbcache", "threshold=0.999999,max_continuous=-1,max_cached=5,warmup=3", -1, -1, -1, 5, 1},
    {"dbcache", "threshold=1,max_continuous=-1,max_cached=5", 4, 11, 5, 5, 1},
    {"dbcache", "threshold=1,max_continuous=3,warmup=8", 8, 1, 3, 9, 1},
    {"dbcache", "threshold=1,warmup=8,interval=4", 1, -1, 4, -1, 1},
    {"dbcache", "threshold=1,max_continuous=-1,mask=1101", 2, 0, 16, 17, 1},
    {"dbcache", "threshold=1,calibrator=taylor,order=3", 4, -1, 4, -1, 4},
    {"deltacache", "interval=3", 1, 0, 2, 13, 1},
    {"deltacache", "interval=3,first=5", 5, 1, 2, 10, 1}, /* full 0..4 7 10 13 16 19 */
    {"fora", "interval=4", 1, 1, 3, 14, 1},               /* full 0 3 7 11 15 19 */
    {"fora", "interval=4,count=up", 1, 0, 3, 15, 1},
    {"taylorseer", "interval=5,first=2,order=3", 2, 0, 4, 15, 4}, /* full 0 1 6 11 16 */
    {"taylorseer", "interval=5,first=6,mode=last,order=2", 6, 0, 4, 12, 3},
    {"hicache", "interval=4,first=5,order=1", 5, 0, 3, -1, 2},
    {"speca", "order=1,base=1000000,decay=1,max=4,first=5", 5, 1, 4, 12, 2},
    {"speca", "order=3,base=0,min=3,max=9,first=4", 4, -1, -1, -1, 4},
    {"pab", "self=4,lo=-1,hi=1001", 1, 0, 3, 15, 1},
    {"pab", "self=4,mlp=2,lo=-1,hi=500", -1, -1, 3, -1, 1},
    {"toca", TOCA_BASE ",interval=4,schedule_weight=0,window=false", 1, 1, 3, 14, 1}, /* full 0 3 7 11 15 19 */
    {"duca", TOCA_BASE ",interval=4,schedule_weight=0,window=false", 1, 1, 3, 14, 1},
    {"diffsparse", "table=uniform,first=6", 6, -1, -1, -1, 1},
};

static bool is_full(const entry *e) {
    return strcmp(e->kind, "full") == 0;
}

START_TEST(limits_are_enforced) {
    const limit_case *c = &limit_cases[_i];
    engine e = engine_open();
    result *r = run(&e, &(job){.policy = c->policy, .options = c->options});
    int first = 0, last = 0, row = 0, longest = 0, total = 0, terms = 0;
    while (first < r->steps && is_full(&r->at[0][first])) first++;
    while (last < r->steps && is_full(&r->at[0][r->steps - 1 - last])) last++;
    for (int s = 0; s < r->steps; s++) {
        const entry *at = &r->at[0][s];
        row = is_full(at) ? 0 : row + 1;
        total += !is_full(at);
        longest = row > longest ? row : longest;
        if (!is_full(at) && at->num_terms > terms) terms = at->num_terms;
    }
    const struct {
        const char *what;
        int found, want;
    } counts[] = {{"full steps at the start", first, c->first},
                  {"full steps at the end", last, c->last},
                  {"steps in a row that are not full", longest, c->longest},
                  {"steps that are not full", total, c->total},
                  {"snapshots in a prediction", terms, c->terms}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        ck_assert_msg(counts[i].want < 0 || counts[i].found == counts[i].want, "%s %s: %d %s, expected %d", c->policy,
                      c->options, counts[i].found, counts[i].what, counts[i].want);
    ck_assert_int_eq(r->counts.steps_full + total, r->steps);
    result_free(r);
    engine_close(&e);
}
END_TEST

/* What a step that is not full computes: at its step, as written in the trace. */
typedef struct {
    const char *policy, *options;
    int step;
    const char *kind, *blocks;
    int rows[BLOCKS * PARTS]; /* [0] = -1: none are listed */
} shape_case;

static const shape_case shape_cases[] = {
    {"interval", "", 1, "skip", "-- -- --", {-1}},
    {"interval", "level=hidden", 1, "skip", "-- -- --", {-1}},
    {"fbcache", "threshold=1000000", 3, "partial", "cc -- --", {-1}},
    {"dbcache", "threshold=1,fn=1,bn=1", 5, "partial", "cc -- cc", {-1}},
    {"dbcache", "threshold=1,fn=2", 5, "partial", "cc cc --", {-1}},
    {"deltacache", "fraction=0.34", 1, "partial", "cc cc --", {-1}},
    {"deltacache", "fraction=0.34", 19, "partial", "-- cc cc", {-1}},
    {"deltacache", "fraction=0.7", 1, "partial", "cc -- --", {-1}},
    {"deltacache", "fraction=0.7,split=0", 1, "partial", "-- -- cc", {-1}},
    {"deltacache", "fraction=1", 1, "skip", "-- -- --", {-1}},
    {"fora", "count=up", 1, "skip", "rr rr rr", {-1}},
    {"taylorseer", "", 3, "skip", "pp pp pp", {-1}},
    {"speca", "", 4, "partial", "pp pp pp", {-1}},
    {"pab", "self=2,lo=-1,hi=1001", 1, "partial", "rc rc rc", {-1}},
    {"pab", "self=2,mlp=3,lo=-1,hi=1001", 3, "partial", "rc rc rc", {-1}},
    {"pab", "self=2,mlp=3,lo=-1,hi=1001", 4, "partial", "cr cr cr", {-1}},
    {"pab", "self=2,mlp=3,lo=-1,hi=1001", 5, "skip", "rr rr rr", {-1}},
    {"toca", "ratio=0.5,step_weight=0,layer_weight=0,module_weight=0", 1, "partial", "rt rt rt", {0, 8, 0, 8, 0, 8}},
    {"toca", "ratio=0.5,step_weight=0,layer_weight=0.5,module_weight=0", 1, "partial", "rt rt rt", {0, 12, 0, 8, 0, 4}},
    {"toca",
     "ratio=0.25,step_weight=0,layer_weight=0,module_weight=0,attention=rows",
     1,
     "partial",
     "tt tt tt",
     {4, 4, 4, 4, 4, 4}},
    {"duca",
     "ratio=0.25,step_weight=0,layer_weight=0,module_weight=0,schedule_weight=0,window=false",
     2,
     "partial",
     "rt rt rt",
     {0, 4, 0, 4, 0, 4}},
    {"duca",
     "ratio=0.25,step_weight=0,layer_weight=0,module_weight=0,schedule_weight=0,window=false",
     3,
     "skip",
     "-- -- --",
     {-1}},
    {"diffsparse", "table=uniform,budget=0.525", 1, "partial", "tt tt tt", {8, 8, 8, 8, 8, 8}},
};

START_TEST(steps_compute_what_their_options_say) {
    const shape_case *c = &shape_cases[_i];
    engine e = engine_open();
    result *r = run(&e, &(job){.policy = c->policy, .options = c->options});
    const entry *at = &r->at[0][c->step];
    ck_assert_msg(strcmp(at->kind, c->kind) == 0 && strcmp(at->blocks, c->blocks) == 0,
                  "%s %s: step %d is %s, %s, expected %s, %s", c->policy, c->options, c->step, at->kind, at->blocks,
                  c->kind, c->blocks);
    ck_assert_int_eq(at->num_rows, c->rows[0] < 0 ? 0 : BLOCKS * PARTS);
    for (int i = 0; i < at->num_rows; i++)
        ck_assert_msg(at->rows[i] == c->rows[i], "%s %s: part %d computes %d rows, expected %d", c->policy, c->options,
                      i, at->rows[i], c->rows[i]);
    result_free(r);
    engine_close(&e);
}
END_TEST

/* --- settings that never reuse ------------------------------------------------------------------------------------ */

typedef struct {
    const char *policy, *options;
} setting;

static const setting never_settings[] = {
    {"interval", "interval=1"},
    {"teacache", "threshold=0"},
    {"easycache", "threshold=0"},
    {"magcache", "table=flat:1,threshold=0"},
    {"magcache", "table=flat:1,max_skips=0"},
    {"spectrum", "window=1,flex=0"},
    {"adacache", "codebook=1:1"},
    {"worldcache", "threshold=0"},
    {"worldcache", "max_skips=0"},
    {"fbcache", "threshold=0"},
    {"fbcache", "max_skips=0"},
    {"dbcache", "threshold=0"},
    {"dbcache", "threshold=1,max_cached=0"},
    {"dbcache", "threshold=0.5,max_continuous=0"},
    {"deltacache", "interval=1"},
    {"deltacache", "fraction=0"},
    {"fora", "interval=1"},
    {"taylorseer", "interval=1"},
    {"taylorseer", "interval=1,mode=last,order=3"},
    {"hicache", "interval=1"},
    {"speca", "max=0"},
    {"pab", "self=1,cross=1,mlp=1"},
    {"toca", "interval=1"},
    {"toca", "ratio=1,attention=rows,step_weight=0,layer_weight=0,module_weight=0"},
    {"duca", "interval=1"},
    {"diffsparse", "table=uniform,budget=1"},
    {"diffsparse", "table=uniform,first=20"},
    {"measure", ""},
};
enum { NUM_NEVER = (int)(sizeof never_settings / sizeof *never_settings) };

START_TEST(never_reusing_is_no_policy) {
    engine e = engine_open();
    for (int batch = 1; batch <= MAX_BATCH; batch += MAX_BATCH - 1) {
        result *plain = run(&e, &(job){.batch = batch});
        for (int i = 0; i < NUM_NEVER; i++)
            for (int quiet = 0; quiet < 2; quiet++) {
                const setting *n = &never_settings[i];
                result *r = run(&e, &(job){.policy = n->policy, .options = n->options, .batch = batch, .quiet = quiet});
                ck_assert_msg(same_bits(r, plain), "%s %s, batch %d, trace %s: not the bits of no policy", n->policy,
                              n->options, batch, quiet ? "off" : "on");
                ck_assert_int_eq(r->counts.steps_full, batch * 20);
                ck_assert_int_eq(r->counts.blocks_computed, r->counts.blocks_total);
                ck_assert_int_eq(r->counts.rows_computed, r->counts.rows_total);
                result_free(r);
            }
        result_free(plain);
    }
    engine_close(&e);
    for (int p = 0; p < rf_policy_count(); p++) {
        const char *name = rf_policy_at(p)->name;
        bool found = strcmp(name, "replay") == 0; /* of a trace that never reuses: the replay test has measure */
        for (int i = 0; i < NUM_NEVER; i++) found |= strcmp(never_settings[i].policy, name) == 0;
        ck_assert_msg(found, "no setting of %s that never reuses", name);
    }
}
END_TEST

/* --- batches and repeated runs ------------------------------------------------------------------------------------ */

/* Settings at which something happens; of statistic: images of a batch are free to differ. */
typedef struct {
    const char *policy, *options;
    bool decides; /* and on this model they do */
} busy_setting;

static const busy_setting busy_settings[] = {
    {"interval", "interval=3,order=2", false},
    {"interval", "interval=3,order=1,level=residual", false},
    {"interval", "interval=3,order=3,predictor=newton,level=hidden", false},
    {"teacache", "threshold=0.31", true},
    {"teacache", "threshold=0.6,branch=cond", true},
    {"easycache", "threshold=0.46", true},
    {"magcache", "table=flat:1.02", false},
    {"spectrum", "", false},
    {"spectrum", "level=output,history=4", false},
    {"adacache", "codebook=0.5:4/0.6:3/0.7:2/5:1", true},
    {"worldcache", "threshold=0.22", true},
    {"worldcache", "threshold=0.6,max_skips=4,pooled=true,time=timestep,rule=paper", true},
    {"fbcache", "threshold=0.7", true},
    {"dbcache", "threshold=0.7,fn=1,bn=1,calibrator=taylor", true},
    {"dbcache", "threshold=1,fn=2", false},
    {"deltacache", "", false},
    {"fora", "", false},
    {"taylorseer", "order=2", false},
    {"taylorseer", "order=3,mode=last", false},
    {"hicache", "", false},
    {"hicache", "mode=last", false},
    {"speca", "order=1", true},
    {"speca", "order=2,output=verified,base=0.05", true},
    {"pab", "self=2,mlp=3", false},
    {"toca", TOCA_BASE, false},
    {"toca", TOCA_BASE ",attention=rows,score=value", false},
    {"toca", TOCA_BASE ",score=random", false},
    {"duca", TOCA_BASE, false},
    {"diffsparse", "table=uniform,first=3", false},
    {"diffsparse", "table=uniform,first=3,attention=cached", false},
    {"diffsparse", "table=uniform,first=3,attention=full", false},
    {"measure", "", false},
};
enum { NUM_BUSY = (int)(sizeof busy_settings / sizeof *busy_settings) };

static job busy_job(int i) {
    return (job){.policy = busy_settings[i].policy, .options = busy_settings[i].options};
}

START_TEST(a_batch_decides_image_by_image_as_single_runs) {
    const busy_setting *b = &busy_settings[_i];
    engine e = engine_open();
    job j = busy_job(_i);
    j.batch = MAX_BATCH;
    result *all = run(&e, &j);
    bool differ = false;
    /* SpeCa's error is a mean of |x - xhat| / |xhat| by element: rounding counts most where xhat is next to 0 */
    double bound = strcmp(b->policy, "speca") == 0 ? 1e-2 : 1e-3;
    for (int i = 0; i < MAX_BATCH; i++) {
        j.batch = 1;
        j.first = i;
        result *one = run(&e, &j);
        double size = 0, off = rf_compare_f32(all->latents + i * LATENT, one->latents, LATENT).max_abs;
        for (int k = 0; k < LATENT; k++) size = fmax(size, fabs((double)one->latents[k]));
        for (int s = 0; s < one->steps; s++) {
            const entry *want = &one->at[0][s], *got = &all->at[i][s];
            const char *what = entries_differ(got, want, bound);
            ck_assert_msg(what == NULL,
                          "%s %s: image %d, step %d: another %s in a batch (%s, %.9g of %g) than alone "
                          "(%s, %.9g of %g)",
                          b->policy, b->options, i, s, what, got->kind, got->statistic, got->threshold, want->kind,
                          want->statistic, want->threshold);
            ck_assert_msg(isnan(want->statistic) || numbers_differ(want->statistic, want->threshold, 1e-3),
                          "%s %s: image %d, step %d is too close to call (%.9g of %g), choose another setting",
                          b->policy, b->options, i, s, want->statistic, want->threshold);
            ck_assert_int_eq(all->kinds[i * all->steps + s], one->kinds[s]);
            differ |= strcmp(want->kind, all->at[0][s].kind) != 0;
        }
        ck_assert_msg(off <= 1e-5 * size, "%s %s: image %d: %g off in a batch, size %g", b->policy, b->options, i, off,
                      size);
        result_free(one);
    }
    ck_assert_msg(differ == b->decides, "%s %s: images %s", b->policy, b->options,
                  differ ? "differ" : "all decide the same");
    result_free(all);
    engine_close(&e);
}
END_TEST

START_TEST(a_second_run_of_a_session_is_the_first) {
    engine e = engine_open();
    job j = busy_job(_i);
    j.batch = MAX_BATCH;
    rf_policy *policy = NULL;
    rf_image_session *s = NULL;
    rf_assert_ok(make_policy(&policy, &j, &e.d.err), e.d.err);
    rf_image_options o = options_of(&j, policy);
    rf_assert_ok(rf_image_session_create(&s, e.model, &o, &e.d.err), e.d.err);
    size_t bytes = rf_image_session_get_info(s).cache.bytes;
    result *first = denoise(s, &j, &e.d.err);
    ck_assert_uint_gt(bytes, 0);
    ck_assert_uint_eq(first->counts.bytes, bytes); /* sized before the run */
    int wrong[MAX_BATCH] = {1, 1, 3};              /* something else in between */
    uint64_t others[MAX_BATCH] = {70, 80, 90};
    rf_assert_ok(rf_image_session_denoise(s, wrong, others, NULL, NULL, NULL, &e.d.err), e.d.err);
    result *second = denoise(s, &j, &e.d.err);
    ck_assert_msg(same_bits(first, second), "%s %s: other bits the second time", j.policy, j.options);
    ck_assert_msg(strcmp(first->text, second->text) == 0, "%s %s: another trace the second time", j.policy, j.options);
    ck_assert_uint_eq(second->counts.bytes, bytes);
    result_free(first);
    result_free(second);
    rf_image_session_destroy(s);
    rf_policy_destroy(policy);
    engine_close(&e);
}
END_TEST

/* --- replay ------------------------------------------------------------------------------------------------------- */

static void write_trace(const result *r, const char *path) {
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(r->text, 1, r->text_bytes, f), r->text_bytes);
    ck_assert_int_eq(fclose(f), 0);
}

/* Bits, kinds and no read-back, but for what replay.c tells: steps that were probed run without, and a verification
 * that was only looked at is not done, so that its step is a skip. In a batch other images are then packed together
 * for the same work, and sums come in another order. */
START_TEST(a_replay_gives_the_recorded_bits) {
    char dir[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/trace.jsonl", dir);
    engine e = engine_open();
    for (int batch = 1; batch <= MAX_BATCH; batch += MAX_BATCH - 1) {
        job j = busy_job(_i);
        j.batch = batch;
        result *recorded = run(&e, &j);
        write_trace(recorded, path);
        result *again =
            run(&e, &(job){.policy = "replay", .option = "file", .value = path, .batch = batch, .quiet = true});
        bool packs_anew = batch > 1 && (strcmp(j.policy, "fbcache") == 0 || strcmp(j.policy, "dbcache") == 0 ||
                                        strcmp(j.policy, "speca") == 0);
        double off = rf_compare_f32(again->latents, recorded->latents, (size_t)batch * LATENT).rel_l2;
        ck_assert_msg(same_bits(again, recorded) || (packs_anew && off < 1e-5),
                      "%s %s, batch %d: not the recorded bits, relative L2 %g", j.policy, j.options, batch, off);
        ck_assert_int_eq(again->counts.read_backs, 0);
        for (int i = 0; i < batch * 20; i++) {
            bool looked = strcmp(recorded->at[i / 20][i % 20].verify, "measure") == 0;
            int want = looked ? RF_STEP_SKIP : recorded->kinds[i];
            ck_assert_msg(again->kinds[i] == want, "%s %s: image %d, step %d: kind %d, expected %d", j.policy,
                          j.options, i / 20, i % 20, again->kinds[i], want);
        }
        ck_assert_uint_le(again->counts.bytes, recorded->counts.bytes);
        result_free(recorded);
        result_free(again);
    }
    engine_close(&e);
    rf_temp_dir_remove(dir);
}
END_TEST

/* --- the drift guard ---------------------------------------------------------------------------------------------- */

START_TEST(the_drift_guard_forces_full_steps) {
    engine e = engine_open();
    job j = busy_job(_i);
    result *free_run = run(&e, &j);
    j.max_drift = 1e6;
    result *loose = run(&e, &j);
    j.max_drift = 1e-12;
    result *tight = run(&e, &j);
    j.max_drift = 0;
    j.quiet = true;
    result *quiet = run(&e, &j);
    ck_assert_msg(same_bits(free_run, quiet), "%s %s: recording changes the picture", j.policy, j.options);
    ck_assert_msg(same_bits(free_run, loose), "%s %s: a guard that never acts changes the picture", j.policy,
                  j.options);
    ck_assert_msg(strcmp(step_lines(free_run), step_lines(loose)) == 0,
                  "%s %s: a guard that never acts changes the trace", j.policy, j.options);
    int num_drifts = 0, num_forced = 0, skipped = 0;
    for (int s = 0; s < 20; s++) {
        const entry *f = &free_run->at[0][s], *t = &tight->at[0][s];
        for (int b = 0; b < 2 && f->has_drift; b++)
            ck_assert_msg(isfinite(f->drift[b]) && f->drift[b] > 0, "%s %s: drift %g at step %d", j.policy, j.options,
                          f->drift[b], s);
        num_drifts += f->has_drift;
        bool must = s > 0 && tight->at[0][s - 1].has_drift;
        ck_assert_msg(t->forced == must, "%s %s: step %d is %sforced", j.policy, j.options, s, t->forced ? "" : "not ");
        ck_assert_msg(!must || is_full(t), "%s %s: forced step %d is %s", j.policy, j.options, s, t->kind);
        ck_assert(!f->forced);
        num_forced += t->forced;
        skipped += !is_full(f);
    }
    ck_assert_msg(num_drifts > 0, "%s %s: no refresh was checked", j.policy, j.options);
    ck_assert_msg(num_forced > 0, "%s %s: nothing was forced", j.policy, j.options);
    if (skipped > 0)
        ck_assert_msg(tight->counts.steps_full > free_run->counts.steps_full,
                      "%s %s: %d full steps with the guard, %d without", j.policy, j.options,
                      (int)tight->counts.steps_full, (int)free_run->counts.steps_full);
    result_free(free_run);
    result_free(loose);
    result_free(tight);
    result_free(quiet);
    engine_close(&e);
}
END_TEST

/* Between nothing and everything: forced exactly after the refreshes that were off by more. */
START_TEST(the_drift_guard_compares_with_its_bound) {
    engine e = engine_open();
    job j = {.policy = "interval", .options = "interval=3,order=1", .steps = 50};
    result *r = run(&e, &j);
    double least = INFINITY, most = 0;
    for (int s = 0; s < 50; s++) {
        double drift = fmax(r->at[0][s].drift[0], r->at[0][s].drift[1]);
        if (r->at[0][s].has_drift) least = fmin(least, drift);
        if (r->at[0][s].has_drift) most = fmax(most, drift);
    }
    ck_assert(least < most);
    j.max_drift = sqrt(least * most);
    result *guarded = run(&e, &j);
    int forced = 0, spared = 0;
    for (int s = 1; s < 50; s++) {
        const entry *before = &guarded->at[0][s - 1];
        bool must = before->has_drift && fmax(before->drift[0], before->drift[1]) > j.max_drift;
        ck_assert_int_eq(guarded->at[0][s].forced, must);
        forced += must;
        spared += before->has_drift && !must;
    }
    ck_assert_int_gt(forced, 0);
    ck_assert_int_gt(spared, 0);
    result_free(r);
    result_free(guarded);
    engine_close(&e);
}
END_TEST

/* The guard looks at each image by itself. */
START_TEST(the_drift_guard_works_image_by_image) {
    static const struct {
        const char *policy, *options;
        double max_drift;
    } cases[] = {{"interval", "interval=3,order=1", 0.35},
                 {"worldcache", "", 0.25},
                 {"taylorseer", "", 0.5},
                 {"speca", "order=1", 0.5},
                 {"fbcache", "threshold=0.9", 0.3},
                 {"toca", TOCA_BASE, 0.2}};
    engine e = engine_open();
    int num_differ = 0;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        job j = {.policy = cases[c].policy,
                 .options = cases[c].options,
                 .max_drift = cases[c].max_drift,
                 .batch = MAX_BATCH};
        result *all = run(&e, &j);
        bool differ = false;
        for (int i = 0; i < MAX_BATCH; i++) {
            j.batch = 1;
            j.first = i;
            result *one = run(&e, &j);
            for (int s = 0; s < one->steps; s++) {
                const char *what = entries_differ(&all->at[i][s], &one->at[0][s], 1e-2);
                ck_assert_msg(what == NULL, "%s %s: image %d, step %d: another %s in a batch", j.policy, j.options, i,
                              s, what);
                differ |= one->at[0][s].forced != all->at[0][s].forced;
            }
            result_free(one);
        }
        num_differ += differ;
        result_free(all);
    }
    ck_assert_int_ge(num_differ, 3);
    engine_close(&e);
}
END_TEST

typedef struct {
    rf_image_session *session;
    float x[MAX_STEPS + 1][LATENT]; /* after so many steps */
    rf_error err;
} latent_log;

static bool log_latents(void *user, int step, int num_steps) {
    latent_log *log = user;
    return step < num_steps && rf_image_session_read_latents(log->session, log->x[step + 1], &log->err) == RF_OK;
}

/* The model's outputs follow from the latents, because DDIM is x' = a x + b out; without guidance a skipped step's
 * latent tells what was predicted and the next one's what was computed. Step 2 k + 1 reuses the output of step 2 k,
 * and the refresh at 2 k + 2 would have too. */
START_TEST(drift_is_the_distance_of_outputs) {
    engine e = engine_open();
    job j = {.policy = "interval", .options = "interval=2,level=output,last=false", .unguided = true};
    rf_policy *policy = NULL;
    latent_log *log = calloc(1, sizeof *log);
    ck_assert_ptr_nonnull(log);
    rf_assert_ok(make_policy(&policy, &j, &e.d.err), e.d.err);
    rf_image_options o = options_of(&j, policy);
    rf_assert_ok(rf_image_session_create(&log->session, e.model, &o, &e.d.err), e.d.err);
    float noise[LATENT];
    rf_rng_normal_at(5, 0, 0, noise, LATENT);
    rf_sampler_plan plan;
    rf_scheduler_config config = rf_image_model_get_info(e.model).scheduler;
    rf_sampler_options sampling = {.kind = RF_SAMPLER_DDIM, .num_steps = o.num_steps, .num_tokens = TOKENS};
    rf_assert_ok(rf_sampler_plan_make(&plan, &config, &sampling, true, &e.d.err), e.d.err);
    for (int i = 0; i < LATENT; i++) log->x[0][i] = plan.init_scale * noise[i];
    result *r = calloc(1, sizeof *r);
    ck_assert_ptr_nonnull(r);
    r->batch = 1;
    r->steps = o.num_steps;
    rf_assert_ok(rf_image_session_denoise(log->session, classes, seeds, noise, log_latents, log, &e.d.err), e.d.err);
    rf_assert_ok(rf_image_session_write_trace(log->session, 0, take_line, r, &e.d.err), e.d.err);
    static double out[MAX_STEPS][LATENT];
    for (int s = 0; s < r->steps; s++) {
        const rf_sampler_coefs *c = &plan.coefs[s];
        ck_assert(c->clip == 0 && c->x0_prev == 0 && c->noise == 0);
        double a = (double)c->x + (double)c->x0 * c->x0_x, b = (double)c->out + (double)c->x0 * c->x0_out;
        for (int i = 0; i < LATENT; i++) out[s][i] = ((double)log->x[s + 1][i] - a * log->x[s][i]) / b;
    }
    for (int s = 2; s < r->steps; s += 2) {
        double off = 0, size = 0;
        for (int i = 0; i < LATENT; i++) {
            off += (out[s - 1][i] - out[s][i]) * (out[s - 1][i] - out[s][i]);
            size += out[s][i] * out[s][i];
        }
        double want = sqrt(off / size), got = r->at[0][s].drift[0];
        ck_assert_msg(r->at[0][s].has_drift && fabs(got - want) <= 1e-3 * want, "step %d: drift %.9g, expected %.9g", s,
                      got, want);
    }
    result_free(r);
    rf_sampler_plan_free(&plan);
    rf_image_session_destroy(log->session);
    rf_policy_destroy(policy);
    free(log);
    engine_close(&e);
}
END_TEST

/* --- memory ------------------------------------------------------------------------------------------------------- */

static const setting small_settings[] = {
    {"worldcache", ""},
    {"worldcache", "max_skips=16"},
    {"taylorseer", "mode=last,order=1"},
    {"taylorseer", "mode=last,order=2"},
    {"taylorseer", "mode=last,order=3"},
};

START_TEST(small_policies_keep_at_most_four_hidden_states) {
    dit_device d = dit_device_open();
    rf_image_model *model = NULL;
    rf_assert_ok(rf_image_model_load(&model, d.backend, RF_SOURCE_DIR "/samples/models/objects", RF_DTYPE_F32, &d.err),
                 d.err);
    rf_image_model_info info = rf_image_model_get_info(model);
    const rf_dit_desc *desc = &info.transformer->desc;
    size_t tokens = (size_t)(desc->sample_size / desc->ph) * (size_t)(desc->sample_size / desc->pw);
    size_t hidden = tokens * (size_t)desc->width * rf_dtype_bytes(RF_DTYPE_F32);
    for (size_t i = 0; i < sizeof small_settings / sizeof *small_settings; i++)
        for (int batch = 1; batch <= 2; batch++) {
            job j = {
                .policy = small_settings[i].policy, .options = small_settings[i].options, .batch = batch, .steps = 50};
            j.quiet = true;
            rf_policy *policy = NULL;
            rf_image_session *s = NULL;
            rf_assert_ok(make_policy(&policy, &j, &d.err), d.err);
            rf_image_options o = options_of(&j, policy);
            rf_assert_ok(rf_image_session_create(&s, model, &o, &d.err), d.err);
            /* lists, weights and counters come on top of rings: a little under 1 KiB a branch here */
            size_t bytes = rf_image_session_get_info(s).cache.bytes, branches = 2 * (size_t)batch;
            size_t most = (4 * hidden + 1024) * branches;
            ck_assert_msg(bytes > 0 && bytes <= most,
                          "%s %s, batch %d: %zu bytes, expected at most 4 hidden states of 2 branches, %zu", j.policy,
                          j.options, batch, bytes, most);
            rf_image_session_destroy(s);
            rf_policy_destroy(policy);
        }
    rf_image_model_close(model);
    dit_device_close(&d);
}
END_TEST

/* --- refusals ----------------------------------------------------------------------------------------------------- */

static rf_status try_session(engine *e, const job *j) {
    rf_policy *policy = NULL;
    rf_image_session *s = NULL;
    rf_status st = make_policy(&policy, j, &e->d.err);
    rf_image_options o = options_of(j, policy);
    if (st == RF_OK) st = rf_image_session_create(&s, e->model, &o, &e->d.err);
    rf_image_session_destroy(s);
    rf_policy_destroy(policy);
    return st;
}

START_TEST(what_does_not_fit_is_refused_unless_forced) {
    static const char *const few[] = {"interval", "teacache",   "easycache",  "magcache", "spectrum",
                                      "adacache", "worldcache", "deltacache", "fora",     "taylorseer",
                                      "hicache",  "speca",      "pab",        "toca",     "duca"};
    static const char *const noisy[] = {"interval", "teacache",   "easycache",  "magcache", "spectrum",
                                        "adacache", "worldcache", "taylorseer", "hicache",  "speca"};
    engine e = engine_open();
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        job j = {.policy = few[i], .steps = 4, .options = strcmp(few[i], "magcache") == 0 ? "table=flat:1.01" : ""};
        rf_assert_fails(try_session(&e, &j), e.d.err, RF_ERR_UNSUPPORTED, "this run has 4");
        ck_assert_ptr_nonnull(strstr(e.d.err.message, few[i]));
        j.force = true;
        result *r = run(&e, &j);
        for (int k = 0; k < LATENT; k++) ck_assert(isfinite(r->latents[k]));
        result_free(r);
    }
    for (size_t i = 0; i < sizeof noisy / sizeof *noisy; i++) {
        job j = {
            .policy = noisy[i], .ddpm = true, .options = strcmp(noisy[i], "magcache") == 0 ? "table=flat:1.01" : ""};
        rf_assert_fails(try_session(&e, &j), e.d.err, RF_ERR_UNSUPPORTED, "ddpm adds noise");
        ck_assert_ptr_nonnull(strstr(e.d.err.message, noisy[i]));
        j.force = true;
        result *r = run(&e, &j);
        for (int k = 0; k < LATENT; k++) ck_assert(isfinite(r->latents[k]));
        result_free(r);
    }
    engine_close(&e);
}
END_TEST

START_TEST(wrong_options_are_refused_by_name) {
    static const struct {
        const char *policy, *options, *says;
        rf_status status;
        int batch;
        double max_drift;
    } cases[] = {
        {"worldcach", "", "worldcache", RF_ERR_ARGUMENT, 1, 0},
        {"worldcache", "max_skip=3", "max_skips", RF_ERR_ARGUMENT, 1, 0},
        {"fora", "nothing=1", "options: interval, count", RF_ERR_ARGUMENT, 1, 0},
        {"measure", "nothing=1", "options: none", RF_ERR_ARGUMENT, 1, 0},
        {"fora", "interval=0", "1..10000", RF_ERR_ARGUMENT, 1, 0},
        {"fora", "count=sideways", "down, up", RF_ERR_ARGUMENT, 1, 0},
        {"worldcache", "p_stable=0.7", "above p_chaotic", RF_ERR_ARGUMENT, 1, 0},
        {"dbcache", "fn=2,bn=1", "3 blocks", RF_ERR_UNSUPPORTED, 1, 0},
        {"dbcache", "fn=7", "3 blocks", RF_ERR_UNSUPPORTED, 1, 0},
        {"dbcache", "mask=102", "neither 0 nor 1", RF_ERR_ARGUMENT, 1, 0},
        {"taylorseer", "mode=last,order=4", "at most 4 hidden states", RF_ERR_ARGUMENT, 1, 0},
        {"magcache", "", "calibrate magcache", RF_ERR_MISSING, 1, 0},
        {"diffsparse", "", "calibrate diffsparse", RF_ERR_MISSING, 1, 0},
        {"diffsparse", "table=" RF_FIXTURE_DIR "/nothing.json", "nothing.json", RF_ERR_MISSING, 1, 0},
        {"replay", "", "file is not set", RF_ERR_ARGUMENT, 1, 0},
        {"replay", "file=" RF_FIXTURE_DIR "/nothing.jsonl", "nothing.jsonl", RF_ERR_MISSING, 1, 0},
        {"diffsparse", "table=uniform,first=3", "one picture at a time", RF_ERR_UNSUPPORTED, 2, 0.5},
        {"diffsparse", "table=uniform", "nothing for a drift guard", RF_ERR_UNSUPPORTED, 1, 0.5},
    };
    engine e = engine_open();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        job j = {.policy = cases[i].policy,
                 .options = cases[i].options,
                 .batch = cases[i].batch,
                 .max_drift = cases[i].max_drift};
        rf_assert_fails(try_session(&e, &j), e.d.err, cases[i].status, cases[i].says);
    }
    engine_close(&e);
}
END_TEST

START_TEST(a_trace_of_another_run_is_refused) {
    char dir[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/trace.jsonl", dir);
    engine e = engine_open();
    result *r = run(&e, &(job){.policy = "interval", .steps = 20});
    write_trace(r, path);
    job j = {.policy = "replay", .option = "file", .value = path, .steps = 21};
    rf_assert_fails(try_session(&e, &j), e.d.err, RF_ERR_SHAPE, "20 steps, this run has 21");
    j.steps = 20;
    j.unguided = true;
    rf_assert_fails(try_session(&e, &j), e.d.err, RF_ERR_SHAPE, "2 branches, this run has 1");
    result_free(r);
    engine_close(&e);
    rf_temp_dir_remove(dir);
}
END_TEST

START_TEST(a_trace_needs_a_session_that_records) {
    engine e = engine_open();
    job j = {.policy = "interval", .quiet = true};
    rf_policy *policy = NULL;
    rf_image_session *s = NULL;
    rf_assert_ok(make_policy(&policy, &j, &e.d.err), e.d.err);
    rf_image_options o = options_of(&j, policy);
    rf_assert_ok(rf_image_session_create(&s, e.model, &o, &e.d.err), e.d.err);
    result_free(denoise(s, &j, &e.d.err));
    result r = {0};
    rf_assert_fails(rf_image_session_write_trace(s, 0, take_line, &r, &e.d.err), e.d.err, RF_ERR_STATE,
                    "does not record");
    rf_image_session_destroy(s);
    rf_policy_destroy(policy);
    engine_close(&e);
}
END_TEST

/* --- allocations that fail ---------------------------------------------------------------------------------------- */

static rf_status drop_line(void *user, const char *json, rf_error *err) {
    (void)user;
    return json[0] == '{' ? RF_OK : rf_fail(err, RF_ERR_FORMAT, "no line of a trace: %.40s", json);
}

/* A whole life of a session. */
static rf_status live(engine *e, const job *j) {
    rf_policy *policy = NULL;
    rf_image_session *s = NULL;
    rf_status st = make_policy(&policy, j, &e->d.err);
    rf_image_options o = options_of(j, policy);
    if (st == RF_OK) st = rf_image_session_create(&s, e->model, &o, &e->d.err);
    if (st == RF_OK) st = rf_image_session_denoise(s, classes, seeds, NULL, NULL, NULL, &e->d.err);
    if (st == RF_OK) st = rf_image_session_write_trace(s, 0, drop_line, NULL, &e->d.err);
    rf_image_session_destroy(s);
    rf_policy_destroy(policy);
    return st;
}

static const setting fragile_settings[] = {
    {"worldcache", ""},
    {"teacache", "threshold=0.6"},
    {"fbcache", "threshold=0.7"},
    {"magcache", "table=flat:1"},
    {"diffsparse", "table=uniform"},
    {"speca", ""},
    {"replay", NULL},
};

START_TEST(failing_any_allocation_of_a_cached_session_leaks_nothing) {
    const setting *f = &fragile_settings[_i];
    char dir[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/trace.jsonl", dir);
    engine e = engine_open();
    job j = {.policy = f->policy, .options = f->options, .batch = 2, .steps = 12};
    if (strcmp(f->policy, "replay") == 0) {
        result *r = run(&e, &(job){.policy = "toca", .options = TOCA_BASE, .batch = 2, .steps = 12});
        write_trace(r, path);
        result_free(r);
        j.option = "file";
        j.value = path;
    }
    rf_assert_ok(live(&e, &j), e.d.err); /* what a backend keeps for good is there now */
    uint64_t live_before = rf_memory_get_counts().num_live, num = rf_memory_get_counts().num_allocs;
    rf_assert_ok(live(&e, &j), e.d.err);
    num = rf_memory_get_counts().num_allocs - num;
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live_before);
    for (uint64_t nth = 1; nth <= num; nth += 1 + nth / 24) { /* every one at first, then a sample of the many alike */
        e.d.err.message[0] = 0;
        rf_memory_fail_nth(nth);
        rf_status st = live(&e, &j);
        rf_memory_fail_nth(0);
        ck_assert_msg(st != RF_OK && e.d.err.message[0] != 0,
                      "%s: allocation %llu of %llu failed without a message (%s)", f->policy, (unsigned long long)nth,
                      (unsigned long long)num, rf_status_name(st));
        ck_assert_msg(st == RF_ERR_MEMORY || st == RF_ERR_DEVICE_MEMORY, "%s: allocation %llu: %s: %s", f->policy,
                      (unsigned long long)nth, rf_status_name(st), e.d.err.message);
        ck_assert_msg(rf_memory_get_counts().num_live == live_before, "%s: allocation %llu of %llu: %lld blocks leaked",
                      f->policy, (unsigned long long)nth, (unsigned long long)num,
                      (long long)(rf_memory_get_counts().num_live - live_before));
    }
    rf_assert_ok(live(&e, &j), e.d.err);
    engine_close(&e);
    rf_temp_dir_remove(dir);
}
END_TEST

/* --- the suite ---------------------------------------------------------------------------------------------------- */

/* dit-tiny's heads are 24 wide, which a device may have no kernels for. */
static bool device_runs_the_fixture(void) {
    const char *name = getenv("RF_TEST_DEVICE");
    rf_backend *backend = NULL;
    rf_image_model *model = NULL;
    rf_image_session *s = NULL;
    rf_error err = {0};
    if (name == NULL || name[0] == 0 || strcmp(name, "cpu") == 0) return true;
    rf_image_options o = rf_image_options_default();
    rf_status st = rf_backend_open(&backend, name, 0, &err);
    if (st == RF_OK) st = rf_image_model_load(&model, backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &err);
    if (st == RF_OK) st = rf_image_session_create(&s, model, &o, &err);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
    rf_backend_close(backend);
    if (st != RF_ERR_UNSUPPORTED && st != RF_ERR_DEVICE) return true; /* whatever else is wrong, the tests say it */
    printf("skipped: dit-tiny does not run on %s: %s\n", name, err.message);
    return false;
}

#define LOOP(tc, test, table) tcase_add_loop_test(tc, test, 0, (int)(sizeof(table) / sizeof *(table)))

int main(void) {
    if (!device_runs_the_fixture()) return 77;
    Suite *suite = suite_create("dit/caching");
    TCase *tc = tcase_create("caching");
    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, every_option_has_a_row);
    LOOP(tc, every_option_changes_what_is_decided, option_cases);
    LOOP(tc, limits_are_enforced, limit_cases);
    LOOP(tc, steps_compute_what_their_options_say, shape_cases);
    tcase_add_test(tc, never_reusing_is_no_policy);
    LOOP(tc, a_batch_decides_image_by_image_as_single_runs, busy_settings);
    LOOP(tc, a_second_run_of_a_session_is_the_first, busy_settings);
    LOOP(tc, a_replay_gives_the_recorded_bits, busy_settings);
    LOOP(tc, the_drift_guard_forces_full_steps, busy_settings);
    tcase_add_test(tc, the_drift_guard_compares_with_its_bound);
    tcase_add_test(tc, the_drift_guard_works_image_by_image);
    tcase_add_test(tc, drift_is_the_distance_of_outputs);
    tcase_add_test(tc, small_policies_keep_at_most_four_hidden_states);
    tcase_add_test(tc, what_does_not_fit_is_refused_unless_forced);
    tcase_add_test(tc, wrong_options_are_refused_by_name);
    tcase_add_test(tc, a_trace_of_another_run_is_refused);
    tcase_add_test(tc, a_trace_needs_a_session_that_records);
    LOOP(tc, failing_any_allocation_of_a_cached_session_leaks_nothing, fragile_settings);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
