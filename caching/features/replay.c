/* caching/features/replay.c - a recorded schedule: every step does what a trace (caching/trace.h) says was done.
 *
 * The trace names the policy that made it and its options; that policy's setup says what the runtime has to keep,
 * here without its signals and its probe. All plans are copied at setup, so a step costs no decision and reads
 * nothing back. Image i of a batch does what image i mod (recorded images) did. A trace of another model with the
 * same numbers of steps, blocks, parts, tokens and branches is taken.
 * What differs from the recorded run, and not in what is computed for the picture:
 *   - steps that were probed run without: a PARTIAL plan computes the probe's blocks and predicts the rest;
 *   - verification is not measured: where the run went on with the computed last block, a PARTIAL plan computes it;
 *     where it was only looked at, the step is the skip that it would have been;
 *   - statistic and threshold are NaN: nothing is compared.
 * force (the drift guard) makes a step FULL that was not. From then on the history is not the recorded one, and
 * recorded weights of more than one snapshot are for other gaps: such a prediction takes the newest snapshot alone
 * until the snapshots it uses were stored at the recorded steps again.
 * A trace is a stranger's file: what it plans is checked against the layout image by image before the run. */
#include <math.h>
#include <string.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"
#include "caching/trace.h"
#include "core/memory.h"

#define MAX_TABLE_BYTES ((size_t)1 << 30)

enum { TRACE_FILE, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [TRACE_FILE] = {"file", RF_OPTION_TEXT, "", 0, 0, NULL, "the trace to replay, as written by --trace"},
};

/* The plan of an image's step; offsets into the same block, NOWHERE = none. */
#define NOWHERE UINT32_MAX
typedef struct {
    uint8_t kind, produce, span, num_terms;
    uint32_t weights; /* floats [classes * num_terms] */
    uint32_t parts;   /* [num_parts], NOWHERE = all computed */
    uint32_t rows;    /* int32 [num_parts], NOWHERE = 0 */
} record;

/* layout.tables: this, records [images][steps], then what they point at, by 4 bytes. */
typedef struct {
    int num_images, num_steps, num_parts, num_classes;
    size_t used; /* 4-byte words after the records */
} table;

static record *records_of(const table *t) {
    return (record *)(t + 1);
}
static uint32_t *words_of(const table *t) {
    return (uint32_t *)(records_of(t) + (size_t)t->num_images * (size_t)t->num_steps);
}

/* ---- does a plan fit? ---- */

static int classes_of(const rf_cache_layout *layout) {
    return layout->num_classes > 1 ? layout->num_classes : 1;
}

static const char *check_parts(const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p) {
    int32_t block_rows = 0;
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (i % shape->num_parts == 0) block_rows = 0;
        if (p->parts[i] == RF_DO_COMPUTE) {
            int block = i / shape->num_parts;
            bool inside = p->produce == RF_PRODUCE_OUTPUT ||
                          (p->produce == RF_PRODUCE_SPAN && block >= layout->spans[p->span].begin &&
                           block < layout->spans[p->span].end);
            bool absent = shape->part_kinds[i] == RF_CACHE_NO_PART;
            if (p->kind == RF_STEP_SKIP && !inside && !absent) return "a skipped step that computes a part";
            continue;
        }
        if (p->produce == RF_PRODUCE_OUTPUT) return "parts under a predicted output";
        if (shape->part_kinds[i] >= RF_CACHE_NUM_KINDS) return "a part that the model does not have";
        if (layout->part_depth[shape->part_kinds[i]] < 1) return "a part that is not kept";
        if (p->num_terms < 1) return "a part from nothing";
        if (p->parts[i] != RF_DO_ROWS) continue;
        if (p->kind == RF_STEP_SKIP) return "token rows in a skipped step";
        if (!layout->tokens.used || p->rows[i] < 1 || p->rows[i] >= shape->tokens)
            return "a wrong number of token rows";
        if (shape->part_kinds[i] == RF_CACHE_SELF && !layout->tokens.attention_rows)
            return "token rows of an attention that keeps no keys";
        if (block_rows != 0 && p->rows[i] != block_rows) return "different token rows in one block";
        block_rows = p->rows[i];
    }
    return NULL;
}

/* Terms of the ring that the plan speaks of. */
static int depth_of(const rf_cache_layout *layout, const rf_step_plan *p) {
    if (p->produce == RF_PRODUCE_OUTPUT) return layout->output_depth;
    if (p->produce == RF_PRODUCE_SPAN) return layout->spans[p->span].depth;
    int depth = 0;
    for (int k = 0; k < RF_CACHE_NUM_KINDS; k++) depth = layout->part_depth[k] > depth ? layout->part_depth[k] : depth;
    return depth;
}

/* What is wrong with it, NULL if nothing is. */
static const char *check_plan(const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p,
                              int num_stored) {
    if (p->kind != RF_STEP_FULL && num_stored == 0)
        return "a step that is not full before the first that is (runs that begin with features of another do not "
               "replay)";
    if (p->produce != RF_PRODUCE_NONE && depth_of(layout, p) < 1) return "a prediction of what is not kept";
    if (p->num_terms > num_stored || p->num_terms > depth_of(layout, p)) return "more terms than snapshots";
    if (p->verify && (p->kind == RF_STEP_FULL || p->produce != RF_PRODUCE_NONE)) {
        return "verification of what is not predicted part by part";
    }
    if (p->kind == RF_STEP_FULL) return NULL;
    if (p->kind == RF_STEP_PARTIAL && p->produce == RF_PRODUCE_OUTPUT) return "a partial step with a predicted output";
    if (p->produce != RF_PRODUCE_NONE && p->num_terms < 1) return "a prediction from nothing";
    return check_parts(shape, layout, p);
}

/* A verified step without its measurement. */
static void drop_verification(const rf_cache_shape *shape, rf_step_plan *p) {
    if (!p->verify) return;
    int last = (shape->num_blocks - 1) * shape->num_parts;
    bool all_produced = true;
    for (int i = 0; i < last + shape->num_parts; i++) {
        if (shape->part_kinds[i] == RF_CACHE_NO_PART) continue;
        if (p->use_verified && i >= last) {
            p->parts[i] = RF_DO_COMPUTE;
            p->rows[i] = 0;
        }
        all_produced &= p->parts[i] == RF_DO_PRODUCE;
    }
    p->kind = all_produced ? RF_STEP_SKIP : RF_STEP_PARTIAL;
    p->verify = p->use_verified = false;
}

/* ---- copying ---- */

static uint32_t add_words(table *t, const void *from, size_t bytes, bool fill) {
    uint32_t at = (uint32_t)t->used;
    if (fill) memcpy(words_of(t) + at, from, bytes);
    t->used += (bytes + 3) / 4;
    return at;
}

static bool same_as(const rf_step_plan *p, const rf_step_plan *q, const table *t) {
    if (p->kind != q->kind || p->produce != q->produce || p->span != q->span || p->num_terms != q->num_terms)
        return false;
    for (int c = 0; c < t->num_classes; c++) {
        if (memcmp(p->weights[c], q->weights[c], (size_t)p->num_terms * sizeof(float)) != 0) return false;
    }
    size_t parts = (size_t)t->num_parts;
    return memcmp(p->parts, q->parts, parts) == 0 && memcmp(p->rows, q->rows, parts * sizeof *p->rows) == 0;
}

static record add_plan(table *t, const rf_step_plan *p, bool fill) {
    record out = {.kind = (uint8_t)p->kind,
                  .produce = (uint8_t)p->produce,
                  .span = (uint8_t)p->span,
                  .num_terms = (uint8_t)p->num_terms,
                  .weights = (uint32_t)t->used,
                  .parts = NOWHERE,
                  .rows = NOWHERE};
    for (int c = 0; c < t->num_classes; c++) {
        add_words(t, p->weights[c], (size_t)p->num_terms * sizeof(float), fill);
    }
    bool any = false, any_rows = false;
    for (int i = 0; i < t->num_parts; i++) {
        any |= p->parts[i] != RF_DO_COMPUTE;
        any_rows |= p->rows[i] != 0;
    }
    if (any) out.parts = add_words(t, p->parts, (size_t)t->num_parts, fill);
    if (any_rows) out.rows = add_words(t, p->rows, (size_t)t->num_parts * sizeof *p->rows, fill);
    return out;
}

/* What copying works on. */
typedef struct {
    const rf_trace *trace;
    const rf_cache_shape *shape;
    const rf_cache_layout *layout;
    const char *path;
    rf_step_plan plan[2]; /* of this image and of the one before, at one step */
    int *num_stored;      /* [images] full steps so far */
} copier;

/* All plans of all images, once counting and once for real. Images that do the same at a step share what it takes. */
static rf_status copy_plans(copier *c, table *t, bool fill, rf_error *err) {
    t->used = 0;
    memset(c->num_stored, 0, (size_t)t->num_images * sizeof *c->num_stored);
    for (int step = 0; step < t->num_steps; step++) {
        record last = {0};
        for (int image = 0; image < t->num_images; image++) {
            rf_step_plan *p = &c->plan[image % 2];
            rf_status st = rf_trace_get_plan(c->trace, image, step, p, err);
            if (st != RF_OK) return st;
            const char *wrong = check_plan(c->shape, c->layout, p, c->num_stored[image]);
            if (wrong) {
                return rf_fail(err, RF_ERR_CONFIG, "replay: %.300s: image %d, step %d: %s", c->path, image, step,
                               wrong);
            }
            drop_verification(c->shape, p);
            c->num_stored[image] += p->kind == RF_STEP_FULL;
            if (image == 0 || !same_as(p, &c->plan[(image + 1) % 2], t)) last = add_plan(t, p, fill);
            if (t->used * 4 > MAX_TABLE_BYTES) {
                return rf_fail(err, RF_ERR_UNSUPPORTED, "replay: %.300s: its plans take more than %zu bytes", c->path,
                               MAX_TABLE_BYTES);
            }
            if (fill) records_of(t)[(size_t)image * (size_t)t->num_steps + (size_t)step] = last;
        }
    }
    return RF_OK;
}

static rf_status make_table(copier *c, table **out, rf_error *err) {
    rf_trace_info info = rf_trace_get_info(c->trace);
    table head = {.num_images = info.num_images,
                  .num_steps = info.num_steps,
                  .num_parts = info.num_blocks * info.num_parts,
                  .num_classes = classes_of(c->layout)};
    rf_status st = copy_plans(c, &head, false, err);
    if (st != RF_OK) return st;
    size_t records = (size_t)head.num_images * (size_t)head.num_steps * sizeof(record);
    table *t = rf_alloc(sizeof head + records + head.used * 4);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "replay: no memory for the plans of %.300s", c->path);
    *t = head;
    st = copy_plans(c, t, true, err);
    if (st != RF_OK) {
        rf_free(t);
        return st;
    }
    *out = t;
    return RF_OK;
}

/* ---- setup ---- */

static rf_status check_shape(const rf_trace_info *info, const rf_cache_shape *shape, const char *path, rf_error *err) {
    const struct {
        const char *what;
        int64_t found, expected;
    } counts[] = {{"steps", info->num_steps, shape->num_steps},
                  {"blocks", info->num_blocks, shape->num_blocks},
                  {"parts a block", info->num_parts, shape->num_parts},
                  {"tokens", info->tokens, shape->tokens},
                  {"branches", info->branches, shape->branches}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        if (counts[i].found == counts[i].expected) continue;
        return rf_fail(err, RF_ERR_SHAPE, "replay: %.300s: a trace of %lld %s, this run has %lld", path,
                       (long long)counts[i].found, counts[i].what, (long long)counts[i].expected);
    }
    return RF_OK;
}

/* What the recorded policy keeps, without what only its decisions need. */
static rf_status inner_layout(const rf_trace_info *info, const rf_cache_shape *shape, const char *path,
                              rf_cache_layout *layout, rf_error *err) {
    if (strcmp(info->policy, rf_policy_replay.name) == 0) {
        return rf_fail(err, RF_ERR_CONFIG, "replay: %.300s: recorded from a replay; replay the first recording", path);
    }
    rf_policy *inner = NULL;
    rf_status st = rf_policy_create(&inner, info->policy, err);
    if (st == RF_OK) st = rf_policy_set(inner, info->options, err);
    if (st == RF_OK) st = rf_policy_get_def(inner)->setup(inner, shape, layout, err);
    rf_policy_destroy(inner);
    rf_free(layout->tables);
    layout->tables = NULL;
    layout->signals = 0;
    layout->probe_blocks = 0;
    layout->is_static = true;
    if (st == RF_OK) return RF_OK;
    return err ? rf_fail_prefix(err, st, "replay: %.200s", path) : st;
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    const char *path = rf_policy_text(policy, TRACE_FILE);
    if (!path[0]) return rf_fail(err, RF_ERR_ARGUMENT, "replay: option file is not set (a trace written by --trace)");
    rf_trace *trace = NULL;
    rf_status st = rf_trace_open(&trace, path, err);
    if (st != RF_OK) return err ? rf_fail_prefix(err, st, "replay") : st;
    rf_trace_info info = rf_trace_get_info(trace);
    st = check_shape(&info, shape, path, err);
    if (st == RF_OK) st = inner_layout(&info, shape, path, layout, err);
    if (st == RF_OK) {
        size_t parts = (size_t)info.num_blocks * (size_t)info.num_parts;
        copier c = {.trace = trace, .shape = shape, .layout = layout, .path = path};
        c.num_stored = rf_alloc_zero((size_t)info.num_images, sizeof *c.num_stored);
        int32_t *rows = rf_alloc_zero(2 * parts, sizeof *rows);
        uint8_t *acts = rf_alloc_zero(2 * parts, 1);
        for (size_t i = 0; i < 2 && rows && acts; i++) {
            c.plan[i].rows = rows + i * parts;
            c.plan[i].parts = acts + i * parts;
        }
        table *t = NULL;
        st = c.num_stored && rows && acts ? make_table(&c, &t, err)
                                          : rf_fail(err, RF_ERR_MEMORY, "replay: %.300s: no memory", path);
        layout->tables = t;
        rf_free(c.num_stored);
        rf_free(rows);
        rf_free(acts);
    }
    rf_trace_close(trace);
    return st;
}

/* ---- plan ---- */

/* Are the newest num snapshots those of the recorded run? */
static bool same_history(const record *of_image, const rf_step_ctx *ctx, int num) {
    int found = 0, known = ctx->num_stored < RF_CACHE_MAX_TERMS ? ctx->num_stored : RF_CACHE_MAX_TERMS;
    for (int s = ctx->step - 1; s >= 0 && found < num; s--) {
        if (of_image[s].kind != RF_STEP_FULL) continue;
        if (found >= known || ctx->stored[found] != s) return false;
        found++;
    }
    return found == num;
}

static void plan(const rf_policy *policy, void *memory, const rf_step_ctx *ctx, rf_step_plan *out) {
    (void)policy;
    (void)memory;
    const table *t = ctx->layout->tables;
    const record *of_image = records_of(t) + (size_t)(ctx->image % t->num_images) * (size_t)t->num_steps;
    const record *r = &of_image[ctx->step];
    const uint32_t *words = words_of(t);
    rf_schedule_begin_plan(ctx, out);
    out->kind = ctx->force_full ? RF_STEP_FULL : (rf_step_kind)r->kind;
    out->produce = (rf_produce)r->produce;
    out->span = r->span;
    bool recorded = r->num_terms <= 1 || same_history(of_image, ctx, r->num_terms);
    out->num_terms = recorded ? r->num_terms : 1;
    for (int c = 0; c < t->num_classes; c++) {
        if (recorded) {
            memcpy(out->weights[c], words + r->weights + (size_t)c * r->num_terms, r->num_terms * sizeof(float));
        } else {
            rf_predict_reuse(out->weights[c]);
        }
    }
    if (out->kind == RF_STEP_FULL) return;
    if (r->parts != NOWHERE) memcpy(out->parts, words + r->parts, (size_t)t->num_parts);
    if (r->rows != NOWHERE) memcpy(out->rows, words + r->rows, (size_t)t->num_parts * sizeof *out->rows);
}

const rf_policy_def rf_policy_replay = {
    .name = "replay",
    .family = "feature",
    .level = "replay",
    .paper = "none: a recorded schedule of any other policy",
    .summary = "does what a trace says was done, with no decision of its own",
    .fits = "the model of the trace, or one with the same steps, blocks, parts, tokens and branches",
    .options = options,
    .num_options = NUM_OPTIONS,
    .setup = setup,
    .plan = plan,
};
