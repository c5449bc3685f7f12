/* samples/refrain/cmd_calibrate.c - `refrain calibrate`: measures on a model the tables that some policies need.
 *
 *   magcache    gamma_s = mean over token rows of |r_s| / |r_(s-1)|, r the residual of the block stack, per branch (MagCache, arXiv
 *               2506.09045)
 *   teacache    the polynomial of degree 4 that maps the relative change of the modulated input of block 0 to that of the model's output,
 *               by least squares over all steps but the last, branches and pictures (TeaCache, arXiv 2411.19108, section 4)
 *   diffsparse  cost[step][layer][level]: how far a layer's contribution to the residual stream would be off if only `level` of its
 *               rows were renewed. e_row = |c_s - c_(s-1)|^2 of the layer's gated contribution c; level keeps the rows with the largest e;
 *               the rest counts, times |d final latent / d output of step s|^2 through the solver's own weights. A
 *               measured stand-in for the trained table of DiffSparse (arXiv 2604.03674), which needs gradients through the sampler.
 *
 *   presets     no measurement of its own: calibrate_presets.c chooses from a sweep
 *   --kv        tables of cache rules of an autoregressive text model, in its kv.json: calibrate_kv.c
 *
 * Of a world magcache and teacache are measured on all new frames of some walks together. diffsparse is not: no session of a world shows its
 * hidden states.
 * The result goes into the model's cache.json (or -o FILE), beside what is there already. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "dit/pipeline.h"
#include "samples/refrain/args.h"
#include "samples/refrain/calibrate.h"
#include "samples/refrain/program.h"
#include "samples/refrain/world_walks.h"

#define DEGREE         4
#define LEVELS         5
#define DEFAULT_STEPS  50
#define DEFAULT_CFG    4.0
#define DEFAULT_FRAMES 12
#define FIRST_WORLD    1011 /* seeds of the simulator: not those that a sweep walks through */

typedef struct {
    const char *what, *model, *output, *device, *sampler, *from;
    int64_t num_images, num_steps, seed, threads, num_frames; /* num_steps, num_frames: 0 = not given */
    double cfg_scale;                                         /* NaN likewise */
    bool quiet, kv;
} calibrate_args;

static args_result read_args(calibrate_args *a, int argc, char **argv) {
    *a = (calibrate_args){.device = "cpu", .num_images = 0, .seed = 1000, .cfg_scale = NAN};
    int num = 0;
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "of images or a world; a shipped one's name (objects)", &a->model),
        arg_int("num", 'n', "N", "pictures, or walks of a world (default: 4); --kv: prompts (48)", &a->num_images, 1,
                4096),
        arg_flag("kv", 0, "tables of cache rules of a text model (text-ar): retrieval heads, shares of layers", &a->kv),
        arg_int("frames", 0, "N", "of a walk, with the first (default: 12)", &a->num_frames, 2, 1000),
        arg_int("steps", 0, "N", "denoising steps (default: 50; a world's own)", &a->num_steps, 2, 10000),
        arg_double("cfg-scale", 0, "X", "guidance; 1 = off (default: 4)", &a->cfg_scale, 0, 1000),
        arg_choice("sampling-method", 0, "ddim, dpm++2m, euler, flow-euler (default: the model's)", &a->sampler,
                   "ddim dpm++2m euler flow-euler"),
        arg_int("seed", 's', "N", "picture or walk i uses N+i (default: 1000)", &a->seed, 0, 9e18),
        arg_string("device", 0, "NAME", "cpu, cuda, cuda:N (default: cpu)", &a->device),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_string("from", 0, "DIR", "presets: the --report folder of a sweep", &a->from),
        arg_string("output", 'o', "FILE", "JSON file (default: cache.json of the model)", &a->output),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
    };
    const arg_spec spec = {.command = "refrain calibrate",
                           .usage = "magcache|teacache|diffsparse|presets|--kv [options]",
                           .about = "Measures on a model the table that a policy needs, or chooses presets from a "
                                    "sweep, and writes them beside the model.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0],
                           .min_positional = 0,
                           .max_positional = 1,
                           .positional_name = "POLICY"};
    args_result result = args_parse(&spec, argc, argv, &a->what, &num);
    if (result != ARGS_OK) return result;
    if (a->kv) {
        if (num > 0 || a->from || a->num_frames || a->num_steps || a->sampler || !isnan(a->cfg_scale)) {
            say_error("calibrate --kv: of text models; takes -m, -n, --device, -t, -o and -q alone");
            return ARGS_USAGE_ERROR;
        }
        if (a->num_images == 0) a->num_images = 48;
        return result;
    }
    if (a->num_images == 0) a->num_images = 4;
    if (num == 0 || a->num_images > 64) {
        say_error(num == 0 ? "calibrate: expected magcache, teacache, diffsparse, presets or --kv"
                           : "--num: at most 64 pictures or walks");
        return ARGS_USAGE_ERROR;
    }
    bool presets = strcmp(a->what, "presets") == 0;
    if (strcmp(a->what, "magcache") != 0 && strcmp(a->what, "teacache") != 0 && strcmp(a->what, "diffsparse") != 0 &&
        !presets) {
        say_error("calibrate: expected magcache, teacache, diffsparse or presets, found '%s'", a->what);
        return ARGS_USAGE_ERROR;
    }
    if (presets == !a->from) {
        say_error(presets ? "calibrate presets: expected --from DIR, the --report folder of a sweep"
                          : "--from: only presets are chosen from a sweep");
        return ARGS_USAGE_ERROR;
    }
    return result;
}

/* --- what a run left behind ------------------------------------------------------------------------------------------ */

typedef struct {
    int num_steps, branches;
    /* by branch and step, summed over pictures, then divided by count */
    double *ratios;
    int *ratio_counts;
    /* pairs of the polynomial */
    double *x, *y;
    int num_pairs, max_pairs;
} traces;

/* Both numbers of a branch signal; false if the step did not measure it. */
static bool branch_signal(const rf_json_value *image, const char *name, double out[2]) {
    const rf_json_value *signals = rf_json_get(image, "signals");
    const rf_json_value *pair = signals ? rf_json_get(signals, name) : NULL;
    if (pair == NULL || rf_json_count(pair) < 1) return false;
    out[0] = rf_json_number(rf_json_at(pair, 0, NULL));
    out[1] = rf_json_count(pair) > 1 ? rf_json_number(rf_json_at(pair, 1, NULL)) : out[0];
    return true;
}

static void take_image(traces *t, int step, const rf_json_value *image) {
    double norms[2], input[2], output[2];
    if (branch_signal(image, "span_norms", norms))
        for (int b = 0; b < t->branches; b++) {
            t->ratios[b * t->num_steps + step] += norms[b]; /* the trace gives means over rows */
            t->ratio_counts[b * t->num_steps + step]++;
        }
    if (step == t->num_steps - 1)
        return; /* TeaCache always computes the last step, and its change is far from all others */
    if (branch_signal(image, "modulated_step", input) && branch_signal(image, "output_refresh", output))
        for (int b = 0; b < t->branches && t->num_pairs < t->max_pairs; b++) {
            t->x[t->num_pairs] = input[b];
            t->y[t->num_pairs++] = output[b];
        }
}

static rf_status take_line(void *user, const char *text, rf_error *err) {
    traces *t = user;
    rf_json *doc = NULL;
    rf_status st = rf_json_parse(&doc, text, strlen(text), "trace", err);
    if (st != RF_OK) return st;
    const rf_json_value *root = rf_json_root(doc);
    if (rf_json_has(root, "step")) {
        int step = (int)rf_json_number(rf_json_get(root, "step"));
        const rf_json_value *image = rf_json_first(rf_json_get(root, "images"));
        for (; image != NULL && step < t->num_steps; image = rf_json_next(image)) take_image(t, step, image);
    }
    rf_json_close(doc);
    return RF_OK;
}

/* Four significant digits are enough for a table of costs, and keep the file small. */
static double short_number(double value) {
    char text[32];
    snprintf(text, sizeof text, "%.3e", value);
    return strtod(text, NULL);
}

static cJSON *numbers(const double *values, int num) {
    cJSON *array = cJSON_CreateArray();
    for (int i = 0; i < num && array; i++) cJSON_AddItemToArray(array, cJSON_CreateNumber(values[i]));
    return array;
}

static cJSON *magcache_table(traces *t) {
    cJSON *table = cJSON_CreateObject(), *ratios = cJSON_AddArrayToObject(table, "ratios");
    cJSON_AddNumberToObject(table, "num_steps", t->num_steps);
    for (int b = 0; b < t->branches; b++) {
        double *row = t->ratios + b * t->num_steps;
        for (int s = 0; s < t->num_steps; s++) {
            int n = t->ratio_counts[b * t->num_steps + s];
            row[s] = n ? round(row[s] / n * 1e6) / 1e6 : 1.0; /* the first step has nothing before it */
        }
        cJSON_AddItemToArray(ratios, numbers(row, t->num_steps));
    }
    return table;
}

/* Least squares by normal equations on x scaled to [-1, 1]: five unknowns. coefficients highest power first. */
static bool fit_polynomial(const traces *t, double coefficients[DEGREE + 1], double *r2) {
    double lo = HUGE_VAL, hi = -HUGE_VAL, m[DEGREE + 1][DEGREE + 2] = {{0}}, mean = 0;
    for (int i = 0; i < t->num_pairs; i++) {
        lo = fmin(lo, t->x[i]);
        hi = fmax(hi, t->x[i]);
        mean += t->y[i] / t->num_pairs;
    }
    if (t->num_pairs < 2 * (DEGREE + 1) || !(hi > lo)) return false;
    double centre = (hi + lo) / 2, half = (hi - lo) / 2;
    for (int i = 0; i < t->num_pairs; i++) {
        double u = (t->x[i] - centre) / half, p[DEGREE + 1] = {1};
        for (int k = 1; k <= DEGREE; k++) p[k] = p[k - 1] * u;
        for (int a = 0; a <= DEGREE; a++) {
            for (int b = 0; b <= DEGREE; b++) m[a][b] += p[a] * p[b];
            m[a][DEGREE + 1] += p[a] * t->y[i];
        }
    }
    for (int c = 0; c <= DEGREE; c++) {
        int pivot = c;
        for (int r = c; r <= DEGREE; r++)
            if (fabs(m[r][c]) > fabs(m[pivot][c])) pivot = r;
        if (fabs(m[pivot][c]) < 1e-12) return false;
        for (int k = 0; k <= DEGREE + 1; k++) {
            double swap = m[c][k];
            m[c][k] = m[pivot][k];
            m[pivot][k] = swap;
        }
        for (int r = 0; r <= DEGREE; r++) {
            if (r == c) continue;
            double f = m[r][c] / m[c][c];
            for (int k = c; k <= DEGREE + 1; k++) m[r][k] -= f * m[c][k];
        }
    }
    /* from powers of u = (x - centre) / half to powers of x */
    double out[DEGREE + 1] = {0}, power[DEGREE + 1] = {1}; /* power: u^k as a polynomial in x, lowest first */
    double rest = 0, total = 0;
    for (int k = 0; k <= DEGREE; k++) {
        double a = m[k][DEGREE + 1] / m[k][k];
        for (int j = 0; j <= k; j++) out[j] += a * power[j];
        for (int j = k + 1; j > 0 && j <= DEGREE; j--)
            power[j] = power[j - 1] / half - (j <= k ? power[j] * centre / half : 0);
        power[0] *= -centre / half;
    }
    for (int i = 0; i < t->num_pairs; i++) {
        double y = 0;
        for (int k = DEGREE; k >= 0; k--) y = y * t->x[i] + out[k];
        rest += (y - t->y[i]) * (y - t->y[i]);
        total += (t->y[i] - mean) * (t->y[i] - mean);
    }
    for (int k = 0; k <= DEGREE; k++) coefficients[k] = out[DEGREE - k];
    *r2 = total > 0 ? 1 - rest / total : 1;
    return true;
}

static rf_status teacache_table(cJSON **out, const traces *t, rf_error *err) {
    double coefficients[DEGREE + 1], r2 = 0;
    if (!fit_polynomial(t, coefficients, &r2))
        return rf_fail(err, RF_ERR_CONFIG, "calibrate teacache: %d pairs do not determine a polynomial", t->num_pairs);
    *out = cJSON_CreateObject();
    cJSON_AddStringToObject(*out, "signal", "modulated");
    cJSON_AddItemToObject(*out, "coefficients", numbers(coefficients, DEGREE + 1));
    cJSON_AddNumberToObject(*out, "r2", round(r2 * 1e4) / 1e4);
    return RF_OK;
}

static rf_status make_traces(traces *t, int num_steps, int branches, size_t num_runs, rf_error *err) {
    size_t steps = (size_t)num_steps, pairs = (size_t)branches * steps * num_runs;
    *t = (traces){.num_steps = num_steps, .branches = branches, .max_pairs = (int)pairs};
    t->ratios = rf_alloc_zero(2 * steps, sizeof *t->ratios);
    t->ratio_counts = rf_alloc_zero(2 * steps, sizeof *t->ratio_counts);
    t->x = rf_alloc_zero(pairs, sizeof *t->x);
    t->y = rf_alloc_zero(pairs, sizeof *t->y);
    return t->ratios && t->ratio_counts && t->x && t->y ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
}

static void free_traces(traces *t) {
    rf_free(t->ratios);
    rf_free(t->ratio_counts);
    rf_free(t->x);
    rf_free(t->y);
}

static rf_status table_of(const char *what, traces *t, cJSON **table, rf_error *err) {
    if (strcmp(what, "teacache") == 0) return teacache_table(table, t, err);
    *table = magcache_table(t);
    return RF_OK;
}

static rf_status fit_from_trace(const calibrate_args *a, rf_image_session *session, int branches, cJSON **table,
                                rf_error *err) {
    traces t;
    rf_image_session_info info = rf_image_session_get_info(session);
    rf_status st = make_traces(&t, info.num_steps, branches, (size_t)a->num_images, err);
    if (st == RF_OK) st = rf_image_session_write_trace(session, 0, take_line, &t, err);
    if (st == RF_OK) st = table_of(a->what, &t, table, err);
    free_traces(&t);
    return st;
}

/* --- worlds ---------------------------------------------------------------------------------------------------------- */

/* Every frame is a run of its own. */
static rf_status walk_through(const world_walks *walks, rf_world_session *session, traces *t, rf_error *err) {
    float *latent = rf_alloc(world_walks_latent_elems(walks) * sizeof *latent);
    if (!latent) return rf_fail(err, RF_ERR_MEMORY, "no memory for a frame");
    rf_status st = RF_OK;
    for (int walk = 0; walk < walks->num && st == RF_OK; walk++) {
        st = world_walks_start(walks, session, walk, err);
        for (int frame = 0; frame < walks->num_new && st == RF_OK; frame++) {
            st = rf_world_session_step(session, world_walks_actions(walks, walk, frame), NULL, err);
            if (st == RF_OK) st = rf_world_session_read_latent(session, latent, err);
            if (st == RF_OK) st = rf_world_session_write_trace(session, walk, take_line, t, err);
            if (st == RF_OK && cancel_requested())
                st = rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d walks; nothing is written", walk);
        }
    }
    rf_free(latent);
    return st;
}

static rf_status fit_world(const calibrate_args *a, const rf_world_model *model, const char *name,
                           const rf_policy *policy, cJSON **table, int *num_steps, rf_error *err) {
    world_walks walks = {0};
    rf_world_session *session = NULL;
    traces t = {0};
    rf_world_model_info info = rf_world_model_get_info(model);
    rf_world_options o = rf_world_options_default();
    o.num_steps = *num_steps = a->num_steps ? (int)a->num_steps : info.num_steps;
    o.policy = policy;
    o.record_trace = true;
    const world_walks_options w = {.model_name = name,
                                   .seed = (uint64_t)a->seed,
                                   .first_world = FIRST_WORLD,
                                   .num = (int)a->num_images,
                                   .num_new = (a->num_frames ? (int)a->num_frames : DEFAULT_FRAMES) - 1,
                                   .window = info.max_frames,
                                   .quiet = a->quiet};
    rf_status st = world_walks_make(&walks, model, &w, err);
    if (st == RF_OK) st = make_traces(&t, o.num_steps, 1, (size_t)(w.num * w.num_new), err);
    if (st == RF_OK) st = rf_world_session_create(&session, model, &o, err);
    if (st == RF_OK) st = walk_through(&walks, session, &t, err);
    if (st == RF_OK) st = table_of(a->what, &t, table, err);
    free_traces(&t);
    rf_world_session_destroy(session);
    world_walks_free(&walks);
    return st;
}

/* --- diffsparse ------------------------------------------------------------------------------------------------------ */

/* Watches an uncached run on the host: x after every part, so a block's contribution is the change of x over its parts. */
typedef struct {
    int step, num_steps, num_blocks, last_part;
    int64_t rows, width, tokens;
    float *x;           /* [rows, width] at the end of the block before */
    float *last;        /* [num_blocks, rows, width] contributions of the step before */
    double *costs;      /* [num_steps, num_blocks, LEVELS] */
    const double *gain; /* [num_steps] */
    float *errors;      /* [tokens] scratch */
    bool missed;        /* no memory, or another shape than expected */
} watcher;

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void watch(void *user, int block, int part, const void *data, int64_t rows, int64_t width) {
    watcher *w = user;
    const float *x = data;
    if (rows != w->rows || width != w->width || block >= w->num_blocks) w->missed = true;
    if (w->missed || part != w->last_part) return;
    if (block > 0) { /* block 0's input is not shown: its contribution is taken as x itself, whose change is as good */
        for (int64_t i = 0; i < rows * width; i++) w->x[i] = x[i] - w->x[i];
    } else {
        memcpy(w->x, x, (size_t)(rows * width) * sizeof *x);
    }
    float *last = w->last + (int64_t)block * rows * width;
    double *cost = w->costs + ((int64_t)w->step * w->num_blocks + block) * LEVELS;
    for (int64_t first = 0; first < rows; first += w->tokens) {
        double sum = 0, kept = 0;
        for (int64_t r = 0; r < w->tokens; r++) {
            const float *now = w->x + (first + r) * width, *then = last + (first + r) * width;
            double e = 0;
            for (int64_t c = 0; c < width; c++) e += ((double)now[c] - then[c]) * ((double)now[c] - then[c]);
            w->errors[r] = (float)e;
            sum += e;
        }
        qsort(w->errors, (size_t)w->tokens, sizeof *w->errors, descending);
        for (int level = 0, r = 0; level < LEVELS; level++) {
            for (; r < (int)(w->tokens * level / (LEVELS - 1)); r++) kept += w->errors[r];
            cost[level] += w->gain[w->step] * fmax(0, sum - kept);
        }
    }
    memcpy(last, w->x, (size_t)(rows * width) * sizeof *last);
    memcpy(w->x, x, (size_t)(rows * width) * sizeof *x);
}

static bool next_step(void *user, int step, int num_steps) {
    watcher *w = user;
    w->step = step + 1 < num_steps ? step + 1 : step;
    return !cancel_requested() && !w->missed;
}

static rf_status sparse_table(rf_image_session *session, const rf_image_model *model, const int *classes,
                              const uint64_t *seeds, int branches, int batch, cJSON **table, rf_error *err) {
    rf_image_session_info info = rf_image_session_get_info(session);
    const rf_dit_desc *d = &rf_image_model_get_info(model).transformer->desc;
    watcher w = {.num_steps = info.num_steps,
                 .num_blocks = rf_dit_desc_num_blocks(d),
                 .last_part = d->groups[0].num_parts - 1,
                 .width = d->width,
                 .tokens = (int64_t)(info.latent_height / d->ph) * (info.latent_width / d->pw)};
    w.rows = w.tokens * batch * branches;
    size_t x_elems = (size_t)(w.rows * w.width), num_costs = (size_t)w.num_steps * (size_t)w.num_blocks * LEVELS;
    double *gain = rf_alloc_zero((size_t)w.num_steps, sizeof *gain);
    w.gain = gain;
    w.x = rf_alloc_zero(x_elems, sizeof *w.x);
    w.last = rf_alloc_zero(x_elems * (size_t)w.num_blocks, sizeof *w.last);
    w.costs = rf_alloc_zero(num_costs, sizeof *w.costs);
    w.errors = rf_alloc_zero((size_t)w.tokens, sizeof *w.errors);
    rf_status st = RF_OK;
    if (!gain || !w.x || !w.last || !w.costs || !w.errors) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    if (st == RF_OK) {
        for (int s = 0; s < w.num_steps; s++) gain[s] = info.output_gain[s] * info.output_gain[s];
        rf_image_session_set_observer(session, watch, &w);
        st = rf_image_session_denoise(session, classes, seeds, NULL, next_step, &w, err);
        rf_image_session_set_observer(session, NULL, NULL);
    }
    if (st == RF_OK && w.missed) st = rf_fail(err, RF_ERR_STATE, "calibrate diffsparse: the model shows other rows");
    if (st == RF_OK) {
        double scale = 0; /* the first step has nothing before it and is computed anyway */
        for (size_t i = (size_t)w.num_blocks * LEVELS; i < num_costs; i++) scale = fmax(scale, w.costs[i]);
        *table = cJSON_CreateObject();
        cJSON_AddNumberToObject(*table, "num_steps", w.num_steps);
        cJSON_AddNumberToObject(*table, "num_blocks", w.num_blocks);
        cJSON *rows = cJSON_AddArrayToObject(*table, "costs");
        for (size_t i = 0; i < num_costs && rows; i += LEVELS) {
            double row[LEVELS];
            for (int l = 0; l < LEVELS; l++)
                row[l] = i < (size_t)w.num_blocks * LEVELS ? (l < LEVELS - 1 ? 1.0 : 0.0)
                                                           : short_number(w.costs[i + (size_t)l] / fmax(scale, 1e-30));
            cJSON_AddItemToArray(rows, numbers(row, LEVELS));
        }
    }
    rf_free(gain);
    rf_free(w.x);
    rf_free(w.last);
    rf_free(w.costs);
    rf_free(w.errors);
    return st;
}

/* --- the command ------------------------------------------------------------------------------------------------------ */

rf_status calibrate_write(const char *path, const char *name, const cJSON *table, rf_error *err) {
    cJSON *root = NULL;
    rf_status st = RF_OK;
    if (rf_path_exists(path)) {
        rf_json *doc = NULL;
        st = rf_json_open(&doc, path, err);
        if (st == RF_OK) root = cJSON_Duplicate(rf_json_root(doc), true);
        rf_json_close(doc);
        if (st == RF_OK && !cJSON_IsObject(root)) st = rf_fail(err, RF_ERR_CONFIG, "%s: not a JSON object", path);
    } else {
        root = cJSON_CreateObject();
    }
    char *text = NULL;
    if (st == RF_OK) {
        cJSON_DeleteItemFromObjectCaseSensitive(root, name);
        cJSON_AddItemToObject(root, name, cJSON_Duplicate(table, true));
        text = cJSON_Print(root);
        st = text ? rf_file_write(path, text, strlen(text), err) : rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    }
    cJSON_free(text);
    cJSON_Delete(root);
    return st;
}

static rf_status calibrate_images(const calibrate_args *a, rf_error *err) {
    char *output = NULL;
    rf_log log = program_log(a->quiet ? -1 : 0);
    rf_policy *policy = NULL;
    rf_image_session *session = NULL;
    cJSON *table = NULL;
    bool sparse = strcmp(a->what, "diffsparse") == 0;
    int batch = (int)a->num_images, classes[64];
    uint64_t seeds[64];
    double begin = now_ms(), cfg_scale = isnan(a->cfg_scale) ? DEFAULT_CFG : a->cfg_scale;
    rf_image_options o = rf_image_options_default();
    opened_model opened;
    rf_status st = open_image_model(&opened, a->model, NULL, a->device, (int)a->threads, "auto", &log, err);
    char *model_path = opened.path;
    rf_backend *backend = opened.backend;
    rf_image_model *model = opened.model;
    if (st == RF_OK && sparse && rf_backend_get_kind(backend) != RF_BACKEND_CPU)
        st = rf_fail(err, RF_ERR_UNSUPPORTED, "calibrate diffsparse looks at hidden states and runs on the CPU only");
    if (st == RF_OK) {
        int num_classes = rf_image_model_get_info(model).num_classes;
        for (int i = 0; i < batch; i++) {
            classes[i] = num_classes > 0 ? (int)((int64_t)i * num_classes / batch) : 0;
            seeds[i] = (uint64_t)a->seed + (uint64_t)i;
        }
        o.batch = batch;
        o.num_steps = a->num_steps ? (int)a->num_steps : DEFAULT_STEPS;
        o.cfg_scale = cfg_scale;
        if (a->sampler && !rf_sampler_kind_from_name(a->sampler, &o.sampler))
            st = rf_fail(err, RF_ERR_ARGUMENT, "sampler %s is unknown", a->sampler);
        output = a->output ? rf_strdup(a->output) : rf_path_join(model_path, "cache.json");
        if (output == NULL) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a name");
    }
    if (st == RF_OK && !sparse) st = rf_policy_create(&policy, "measure", err);
    o.policy = policy;
    o.record_trace = !sparse;
    if (st == RF_OK) st = rf_image_session_create(&session, model, &o, err);
    int branches = cfg_scale == 1.0 ? 1 : 2;
    if (st == RF_OK && sparse) {
        st = sparse_table(session, model, classes, seeds, branches, batch, &table, err);
    } else if (st == RF_OK) {
        st = rf_image_session_denoise(session, classes, seeds, NULL, NULL, NULL, err);
        if (st == RF_OK) st = fit_from_trace(a, session, branches, &table, err);
    }
    if (st == RF_OK) {
        char command[160];
        snprintf(command, sizeof command, "refrain calibrate %s -n %d --steps %d --cfg-scale %g -s %lld --device %s",
                 a->what, batch, o.num_steps, cfg_scale, (long long)a->seed, a->device);
        cJSON_AddStringToObject(table, "command", command);
        st = calibrate_write(output, a->what, table, err);
    }
    if (st == RF_OK && !a->quiet)
        say("%s measured on %d pictures of %d steps in %.1f s: %s", a->what, batch, o.num_steps,
            (now_ms() - begin) * 1e-3, output);
    cJSON_Delete(table);
    rf_image_session_destroy(session);
    rf_policy_destroy(policy);
    rf_image_model_close(model);
    rf_backend_close(backend);
    rf_free(model_path);
    rf_free(output);
    return st;
}

static rf_status calibrate_world(const calibrate_args *a, rf_error *err) {
    opened_world opened = {0};
    rf_log log = program_log(a->quiet ? -1 : 0);
    rf_policy *policy = NULL;
    cJSON *table = NULL;
    char *output = NULL;
    int num_steps = 0;
    double begin = now_ms();
    if (strcmp(a->what, "diffsparse") == 0)
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "calibrate diffsparse: not for worlds; use diffsparse with table=uniform");
    rf_status st = open_world_model(&opened, a->model, NULL, a->device, (int)a->threads, "auto", &log, err);
    if (st == RF_OK) st = rf_policy_create(&policy, "measure", err);
    if (st == RF_OK) {
        output = a->output ? rf_strdup(a->output) : rf_path_join(opened.path, "cache.json");
        if (!output) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a name");
    }
    if (st == RF_OK) st = fit_world(a, opened.model, opened.name, policy, &table, &num_steps, err);
    if (st == RF_OK) {
        char command[160];
        int frames = a->num_frames ? (int)a->num_frames : DEFAULT_FRAMES;
        snprintf(command, sizeof command, "refrain calibrate %s -n %d --frames %d --steps %d -s %lld --device %s",
                 a->what, (int)a->num_images, frames, num_steps, (long long)a->seed, a->device);
        cJSON_AddStringToObject(table, "command", command);
        st = calibrate_write(output, a->what, table, err);
        if (st == RF_OK && !a->quiet)
            say("%s measured on %d walks of %d frames, %d steps each, in %.1f s: %s", a->what, (int)a->num_images,
                frames, num_steps, (now_ms() - begin) * 1e-3, output);
    }
    cJSON_Delete(table);
    rf_policy_destroy(policy);
    rf_world_model_close(opened.model);
    rf_backend_close(opened.backend);
    rf_free(opened.path);
    rf_free(output);
    return st;
}

static rf_status choose_presets(const calibrate_args *a, const char *folder, rf_error *err) {
    cJSON *table = NULL;
    int num = 0;
    char *output = a->output ? rf_strdup(a->output) : rf_path_join(folder, "cache.json");
    rf_status st = output ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for a name");
    if (st == RF_OK) st = calibrate_presets(&table, a->from, a->quiet, &num, err);
    if (st == RF_OK) st = calibrate_write(output, "presets", table, err);
    if (st == RF_OK && !a->quiet) say("%d presets of %s: %s", num, a->from, output);
    cJSON_Delete(table);
    rf_free(output);
    return st;
}

/* An option that would do nothing is refused. */
static rf_status check_kind(const calibrate_args *a, bool world, rf_error *err) {
    const char *wrong = world && !isnan(a->cfg_scale) ? "cfg-scale"
                        : world && a->sampler         ? "sampling-method"
                        : !world && a->num_frames     ? "frames"
                                                      : NULL;
    if (!wrong) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "--%s: of a model of %s; this is %s", wrong, world ? "images" : "worlds",
                   world ? "a world" : "one of images");
}

static rf_status calibrate(const calibrate_args *a, rf_error *err) {
    char *folder = NULL;
    RF_TRY(find_model(&folder, a->model, err));
    bool world = rf_world_is_world(folder);
    rf_status st = check_kind(a, world, err);
    if (st == RF_OK && a->from) {
        st = choose_presets(a, folder, err);
    } else if (st == RF_OK) {
        st = world ? calibrate_world(a, err) : calibrate_images(a, err);
    }
    rf_free(folder);
    return st;
}

int cmd_calibrate(int argc, char **argv) {
    calibrate_args args;
    args_result parsed = read_args(&args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    rf_error err = {0};
    cancel_install();
    if (args.kv) {
        calibrate_kv_args kv = {.model = args.model ? args.model : "text-ar",
                                .device = args.device,
                                .output = args.output,
                                .threads = (int)args.threads,
                                .num_prompts = (int)args.num_images,
                                .quiet = args.quiet};
        return calibrate_kv(&kv, &err) == RF_OK ? EXIT_OK : fail_with(&err);
    }
    return calibrate(&args, &err) == RF_OK ? EXIT_OK : fail_with(&err);
}
