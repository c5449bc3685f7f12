/* caching/features/diffsparse.c - DiffSparse: a table of token ratios by layer and step, arXiv 2604.03674 (ICLR 2026).
 *
 * K[s][l] in quarters of the tokens, known before the run. At layer l of step s, of N tokens
 *   4        every part in full, which renews its cache
 *   0        every part from its cache
 *   1, 2, 3  floor(K N / 4) rows of the MLP; self-attention: as many rows (attention=rows), none (cached) or all
 *            (full). The paper does not say which parts run on the chosen rows; ToCa's choice is cached. Attention to
 *            text, over frames: as many rows.
 * Rows are chosen as in toca.c. A step that is all 4 is FULL, one that is
 * all 0 a SKIP of parts. Nothing is stored before step 0, so the first steps (`first`, 1 at least) are full in any
 * case; they count against the budget, and are full even where they alone are above it.
 *
 * The table:
 *   auto     calibration {"diffsparse": {"num_steps": T, "num_blocks": L, "costs": [[c0, c1, c2, c3, c4], ... T*L
 *            rows, by step, then by layer]}}: what each level costs in quality, given to caching/allocate.h with a
 *            budget of floor(4 budget T L) quarters. A run of another length takes the row of the nearest step, ends
 *            on ends.
 *   uniform  no calibration: the budget spread evenly, floor((i+1) R / n) - floor(i R / n) quarters for the i-th of n
 *            layer-steps. What a fitted table must beat. (A cost table that falls by the same amount at every level
 *            cannot say this: all its allocations cost the same.)
 *   FILE     JSON: the same object, bare or under "diffsparse", or "levels": [T*L integers 0..4] in place of costs,
 *            which is taken as it is: budget is not read. num_steps and num_blocks may be left out if they are the
 *            run's.
 * Order of tests: force, no history, step < first: FULL; then the table. Never skips with budget=1, or first at least
 * the number of steps. Any solver and any number of steps: no step but the first has to be full, the paper's claim
 * for few-step models. */
#include <math.h>
#include <string.h>

#include "caching/allocate.h"
#include "caching/features/schedule.h"
#include "caching/features/toca.h"
#include "core/memory.h"

#define LEVELS    5 /* 0, 1/4, .. 1 */
#define MAX_STEPS 10000

enum { BUDGET, TABLE, FIRST, ATTENTION, SCORE, AGE_WEIGHT, BONUS, CELL, SEED, NUM_OPTIONS };
enum { ATTENTION_ROWS, ATTENTION_CACHED, ATTENTION_FULL };

static const rf_policy_option options[NUM_OPTIONS] = {
    [BUDGET] = {"budget", RF_OPTION_DOUBLE, "0.5", 0, 1, NULL,
                "share of all layer-steps' rows computed; 1 = never skip"},
    [TABLE] = {"table", RF_OPTION_TEXT, "auto", 0, 0, NULL,
               "auto (fitted by refrain calibrate diffsparse), uniform, or a JSON file with costs or levels"},
    [FIRST] = {"first", RF_OPTION_INT, "1", 1, MAX_STEPS, NULL, "first steps that are always full"},
    [ATTENTION] = {"attention", RF_OPTION_CHOICE, "rows", 0, 0, "rows cached full",
                   "self-attention where the MLP computes some rows: as many rows renewed, reused, or all"},
    [SCORE] = RF_TOKENS_SCORE_OPTION("attention"),
    [AGE_WEIGHT] = RF_TOKENS_AGE_OPTION("0.08", "added to a row's score for every step since it was computed"),
    [BONUS] = RF_TOKENS_BONUS_OPTION,
    [CELL] = RF_TOKENS_CELL_OPTION,
    [SEED] = RF_TOKENS_SEED_OPTION,
};

/* ---- reading a table ---- */

/* A table as written: num_steps * num_blocks entries, either a row of costs or one level each. */
typedef struct {
    const char *name; /* for messages */
    const rf_json_value *entries;
    bool levels;
    int64_t num_steps;
} source;

/* An optional count; absent: `absent`. */
static rf_status read_count(const source *src, const rf_json_value *object, const char *key, int64_t absent,
                            int64_t *out, rf_error *err) {
    *out = absent;
    if (!rf_json_has(object, key)) return RF_OK;
    double v = rf_json_number(rf_json_get(object, key));
    if (!(v >= 1 && v <= MAX_STEPS) || v != floor(v)) {
        return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: '%s' must be a whole number in 1..%d", src->name, key,
                       MAX_STEPS);
    }
    *out = (int64_t)v;
    return RF_OK;
}

static rf_status open_source(source *src, const rf_json_value *root, const rf_cache_shape *shape, rf_error *err) {
    const rf_json_value *object = rf_json_has(root, "diffsparse") ? rf_json_get(root, "diffsparse") : root;
    int64_t num_blocks = 0;
    rf_status st = read_count(src, object, "num_steps", shape->num_steps, &src->num_steps, err);
    if (st == RF_OK) st = read_count(src, object, "num_blocks", shape->num_blocks, &num_blocks, err);
    if (st != RF_OK) return st;
    if (num_blocks != shape->num_blocks) {
        return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: a table for %lld blocks, the model has %d", src->name,
                       (long long)num_blocks, shape->num_blocks);
    }
    src->levels = rf_json_has(object, "levels");
    src->entries = rf_json_get(object, src->levels ? "levels" : "costs");
    if (!rf_json_is_array(src->entries)) {
        return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: no array 'costs' or 'levels'", src->name);
    }
    size_t found = rf_json_count(src->entries), expected = (size_t)(src->num_steps * num_blocks);
    if (found == expected) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: '%s' has %zu entries, expected %lld steps x %lld blocks = %zu",
                   src->name, src->levels ? "levels" : "costs", found, (long long)src->num_steps, (long long)num_blocks,
                   expected);
}

static rf_status read_level(const source *src, const rf_json_value *v, size_t at, double *out, rf_error *err) {
    *out = rf_json_number(v);
    if (*out >= 0 && *out < LEVELS && *out == floor(*out)) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: levels[%zu] is not a whole number in 0..%d", src->name, at,
                   LEVELS - 1);
}

static rf_status read_costs(const source *src, const rf_json_value *row, size_t at, double *out, rf_error *err) {
    bool good = rf_json_is_array(row) && rf_json_count(row) == LEVELS;
    const rf_json_value *v = good ? rf_json_first(row) : NULL;
    for (int i = 0; i < LEVELS && good; i++, v = rf_json_next(v)) {
        out[i] = rf_json_number(v);
        good = isfinite(out[i]);
    }
    if (good) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "diffsparse: %s: costs[%zu] is not an array of %d finite numbers", src->name, at,
                   LEVELS);
}

/* ---- making the table ---- */

static int64_t budget_quarters(const rf_policy *policy, int64_t items) {
    return (int64_t)floor(rf_policy_double(policy, BUDGET) * 4 * (double)items + 1e-9);
}

/* The steps after the first ones: their levels, and what is left of the budget. */
typedef struct {
    uint8_t *levels;
    int64_t num_items, budget;
} rest;

static rest rest_of(const rf_policy *policy, const rf_cache_shape *shape, uint8_t *table) {
    int64_t items = (int64_t)shape->num_steps * shape->num_blocks,
            full = rf_policy_int(policy, FIRST) * shape->num_blocks;
    if (full > items) full = items;
    memset(table, LEVELS - 1, (size_t)full);
    int64_t budget = budget_quarters(policy, items) - 4 * full;
    return (rest){.levels = table + full, .num_items = items - full, .budget = budget > 0 ? budget : 0};
}

static void spread(const rest *r) {
    for (int64_t i = 0; i < r->num_items; i++) {
        r->levels[i] = (uint8_t)((i + 1) * r->budget / r->num_items - i * r->budget / r->num_items);
    }
}

/* entries [src->num_steps * num_blocks][width] to the run's steps: step 0 on 0, the last on the last, others on the
 * nearest. */
static void resample(double *out, const double *entries, int width, const source *src, const rf_cache_shape *shape) {
    int64_t last = shape->num_steps - 1, row = (int64_t)shape->num_blocks * width;
    for (int64_t s = 0; s < shape->num_steps; s++) {
        int64_t from = last > 0 ? (2 * s * (src->num_steps - 1) + last) / (2 * last) : 0;
        memcpy(out + s * row, entries + from * row, (size_t)row * sizeof *out);
    }
}

static rf_status fill_from(const rf_policy *policy, const source *src, const rf_cache_shape *shape, uint8_t *table,
                           rf_error *err) {
    int width = src->levels ? 1 : LEVELS;
    size_t row = (size_t)shape->num_blocks * (size_t)width;
    double *entries = rf_alloc_zero((size_t)src->num_steps * row, sizeof *entries);
    double *run = rf_alloc_zero((size_t)shape->num_steps * row, sizeof *run);
    rf_status st = entries && run ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "diffsparse: no memory for a table");
    size_t at = 0;
    for (const rf_json_value *v = rf_json_first(src->entries); v && st == RF_OK; v = rf_json_next(v), at++) {
        double *out = entries + at * (size_t)width;
        st = src->levels ? read_level(src, v, at, out, err) : read_costs(src, v, at, out, err);
    }
    if (st == RF_OK) {
        resample(run, entries, width, src, shape);
        rest r = rest_of(policy, shape, table);
        const double *from = run + (r.levels - table) * width;
        static const int quarters[LEVELS] = {0, 1, 2, 3, 4};
        if (src->levels) {
            for (int64_t i = 0; i < r.num_items; i++) r.levels[i] = (uint8_t)from[i];
        } else {
            st = rf_allocate(r.levels, from, r.num_items, quarters, LEVELS, r.budget, NULL, err);
        }
    }
    rf_free(entries);
    rf_free(run);
    return st;
}

static rf_status fill_auto(const rf_policy *policy, const rf_cache_shape *shape, uint8_t *table, rf_error *err) {
    const char *model = shape->model ? shape->model : "the model";
    if (!shape->calibration || !rf_json_has(shape->calibration, "diffsparse")) {
        return rf_fail(err, RF_ERR_MISSING,
                       "diffsparse: %s has no fitted table; run 'refrain calibrate diffsparse' on it, or set "
                       "table=uniform or table=FILE",
                       model);
    }
    source src = {.name = model};
    rf_status st = open_source(&src, rf_json_get(shape->calibration, "diffsparse"), shape, err);
    return st == RF_OK ? fill_from(policy, &src, shape, table, err) : st;
}

static rf_status fill_file(const rf_policy *policy, const char *path, const rf_cache_shape *shape, uint8_t *table,
                           rf_error *err) {
    rf_json *doc = NULL;
    rf_status st = rf_json_open(&doc, path, err);
    if (st != RF_OK) return rf_fail_prefix(err, st, "diffsparse: table");
    source src = {.name = path};
    st = open_source(&src, rf_json_root(doc), shape, err);
    if (st == RF_OK) st = fill_from(policy, &src, shape, table, err);
    rf_json_close(doc);
    return st;
}

static rf_status fill_table(const rf_policy *policy, const rf_cache_shape *shape, uint8_t *table, rf_error *err) {
    const char *name = rf_policy_text(policy, TABLE);
    rest r = rest_of(policy, shape, table);
    if (strcmp(name, "uniform") == 0) {
        spread(&r);
        return RF_OK;
    }
    return strcmp(name, "auto") == 0 ? fill_auto(policy, shape, table, err)
                                     : fill_file(policy, name, shape, table, err);
}

/* Is any step after the first computed in full? */
static bool has_refresh(const uint8_t *table, const rf_cache_shape *shape) {
    for (int step = 1; step < shape->num_steps; step++) {
        int block = 0;
        while (block < shape->num_blocks && table[step * shape->num_blocks + block] == LEVELS - 1) block++;
        if (block == shape->num_blocks) return true;
    }
    return false;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    size_t items = (size_t)shape->num_steps * (size_t)shape->num_blocks;
    uint8_t *table = rf_alloc(items);
    if (!table) return rf_fail(err, RF_ERR_MEMORY, "diffsparse: no memory for a table of %zu layer-steps", items);
    rf_status st = fill_table(policy, shape, table, err);
    if (st != RF_OK) {
        rf_free(table);
        return st;
    }
    layout->tables = table;
    layout->is_static = true;
    rf_schedule_keep_parts(shape, layout, 1);
    layout->never_refreshes = !has_refresh(table, shape);
    bool any = false;
    for (size_t i = 0; i < items; i++) any |= (int64_t)table[i] * shape->tokens / 4 > 0 && table[i] < LEVELS - 1;
    if (!any) return RF_OK;
    rf_tokens_fill_score(policy, SCORE, 1, shape, layout);
    layout->tokens.attention_rows = rf_policy_int(policy, ATTENTION) == ATTENTION_ROWS;
    return RF_OK;
}

/* ---- plan ---- */

static void fill_part(rf_step_plan *plan, int at, int kind, int level, int64_t tokens, int attention) {
    int64_t rows = level * tokens / 4;
    rf_part_do act = rows <= 0 ? RF_DO_PRODUCE : rows >= tokens ? RF_DO_COMPUTE : RF_DO_ROWS;
    if (act == RF_DO_ROWS && (kind == RF_CACHE_SELF || kind == RF_CACHE_PARALLEL)) {
        if (attention == ATTENTION_CACHED) act = RF_DO_PRODUCE;
        if (attention == ATTENTION_FULL) act = RF_DO_COMPUTE;
    }
    plan->parts[at] = (uint8_t)act;
    plan->rows[at] = act == RF_DO_ROWS ? (int32_t)rows : 0;
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    (void)memory;
    const rf_cache_shape *shape = ctx->shape;
    rf_schedule_begin_plan(ctx, out);
    if (ctx->num_stored > 0) out->num_terms = rf_predict_reuse(out->weights[0]);
    if (ctx->force_full || ctx->num_stored == 0 || ctx->step < rf_policy_int(policy, FIRST)) return;
    const uint8_t *levels = (const uint8_t *)ctx->layout->tables + (size_t)ctx->step * (size_t)shape->num_blocks;
    int attention = (int)rf_policy_int(policy, ATTENTION);
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (shape->part_kinds[i] == RF_CACHE_NO_PART) continue;
        fill_part(out, i, shape->part_kinds[i], levels[i / shape->num_parts], shape->tokens, attention);
    }
    rf_tokens_set_kind(shape, out);
}

const rf_policy_def rf_policy_diffsparse = {
    .name = "diffsparse",
    .family = "feature",
    .level = "token",
    .paper = "DiffSparse, arXiv 2604.03674 (ICLR 2026)",
    .summary = "a table says what share of the token rows each layer computes at each step, fitted to a budget",
    .fits = "blocks of one self-attention and MLPs; any solver and number of steps; fitted for one model",
    .options = options,
    .num_options = NUM_OPTIONS,
    .setup = setup,
    .plan = plan,
};
