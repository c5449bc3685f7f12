/* caching/trace.c - traces as JSON lines: written entry by entry, read back as from a stranger.
 *
 * Writing builds text by hand: every number's digits matter, and a step is one line. NaN is null, an infinity 1e999
 * (which reads back as one). A plan that is verified has "verify":"measure" (looked at) or "verify":"use" (and gone
 * on with).
 * Reading. A batch is a header and then all its steps in order, each with every image of the batch once; batches of
 * one file agree in all but their images. Whatever is not so is refused with the number of the line. What is kept
 * grows with the text, but for the table of images by steps, which is bounded (MAX_IMAGE_STEPS). What a plan may not
 * say on a given model is not known here: see features/replay.c.
 * Of a plan only what counts is written, so parts that did not run, absent parts and the rows of other parts than t
 * read back as 0. */
#include "caching/trace.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/json_internal.h"
#include "core/memory.h"

#define MAX_FILE_BYTES  ((size_t)1 << 30)
#define MAX_STEPS       10000
#define MAX_IMAGES      1000000
#define MAX_IMAGE_STEPS 4000000
#define MAX_BLOCKS      4096
#define MAX_PARTS       16
#define MAX_TOKENS      (1 << 24)
#define MAX_HORIZON     (1 << 30)

static const char *const kind_names[] = {"full", "partial", "skip"};
static const char *const produce_names[] = {"none", "output", "span"};
static const char *const verify_names[] = {"none", "measure", "use"};

static const char *const signal_names[RF_SIGNAL_COUNT] = {
    [RF_SIGNAL_INPUT_STEP] = "input_step",
    [RF_SIGNAL_MODULATED_STEP] = "modulated_step",
    [RF_SIGNAL_INPUT_REFRESH] = "input_refresh",
    [RF_SIGNAL_OUTPUT_REFRESH] = "output_refresh",
    [RF_SIGNAL_OUTPUT_SIZE] = "output_size",
    [RF_SIGNAL_SPAN_REFRESH] = "span_refresh",
    [RF_SIGNAL_SPAN_NORMS] = "span_norms",
    [RF_SIGNAL_PROBE] = "probe",
    [RF_SIGNAL_VERIFY] = "verify",
    [RF_SIGNAL_CURVATURE] = NULL, /* its result is the statistic */
    [RF_SIGNAL_DRIFT] = NULL,     /* "drift" */
};

/* ---- text that grows ---- */

typedef struct {
    char *text;
    size_t used, room;
    bool failed;
} buffer;

static char *reserve(buffer *b, size_t bytes) {
    if (b->failed) return NULL;
    if (b->used + bytes + 1 > b->room) {
        size_t room = 2 * b->room + bytes + 256;
        char *grown = rf_realloc(b->text, room);
        if (!grown) {
            b->failed = true;
            return NULL;
        }
        b->text = grown;
        b->room = room;
    }
    return b->text + b->used;
}

static void put(buffer *b, const char *text) {
    size_t len = strlen(text);
    char *at = reserve(b, len);
    if (!at) return;
    memcpy(at, text, len + 1);
    b->used += len;
}

/* The decimal point is a point whatever the locale says. */
static void put_number(buffer *b, int num_digits, double v) {
    if (isnan(v)) {
        put(b, "null");
    } else if (isinf(v)) {
        put(b, v > 0 ? "1e999" : "-1e999");
    } else {
        char digits[48];
        snprintf(digits, sizeof digits, "%.*g", num_digits, v);
        for (char *c = digits; *c; c++) {
            if (!strchr("0123456789+-e.", *c)) *c = '.';
        }
        put(b, digits);
    }
}

static void put_float(buffer *b, double v) {
    put_number(b, 9, v);
}
static void put_double(buffer *b, double v) {
    put_number(b, 17, v);
}

static void put_int(buffer *b, int64_t v) {
    char digits[24];
    snprintf(digits, sizeof digits, "%lld", (long long)v);
    put(b, digits);
}

static void put_string(buffer *b, const char *text) {
    put(b, "\"");
    size_t left = text ? strlen(text) : 0;
    while (left > 0) {
        char piece[8] = "";
        size_t len = rf_utf8_sequence(text, left);
        unsigned char c = (unsigned char)*text;
        if (len == 0) {
            put(b, "\xef\xbf\xbd"); /* not UTF-8: U+FFFD */
            len = 1;
        } else if (c < 0x20) {
            snprintf(piece, sizeof piece, "\\u%04x", c);
            put(b, piece);
        } else {
            if (c == '"' || c == '\\') put(b, "\\");
            memcpy(piece, text, len);
            put(b, piece);
        }
        text += len;
        left -= len;
    }
    put(b, "\"");
}

/* ,"key": */
static void put_key(buffer *b, const char *key) {
    put(b, ",\"");
    put(b, key);
    put(b, "\":");
}

static rf_status finish(buffer *b, char **out, rf_error *err) {
    *out = b->failed ? NULL : b->text;
    if (!b->failed) return RF_OK;
    rf_free(b->text);
    return rf_fail(err, RF_ERR_MEMORY, "trace: no memory for a line");
}

/* ---- writing ---- */

rf_status rf_trace_header(char **out, const rf_policy *policy, const rf_cache_shape *shape, int first_image,
                          rf_error *err) {
    *out = NULL;
    size_t bytes = rf_policy_describe(policy, NULL, 0) + 1;
    char *options = rf_alloc(bytes);
    if (!options) return rf_fail(err, RF_ERR_MEMORY, "trace: no memory for a line");
    rf_policy_describe(policy, options, bytes);
    buffer b = {0};
    put(&b, "{\"trace\":1,\"policy\":");
    put_string(&b, rf_policy_get_def(policy)->name);
    put_key(&b, "options");
    put_string(&b, options);
    put_key(&b, "model");
    put_string(&b, shape->model);
    put_key(&b, "sampler");
    put_string(&b, shape->sampler);
    const struct {
        const char *key;
        int64_t value;
    } counts[] = {{"steps", shape->num_steps},   {"images", shape->batch},      {"first_image", first_image},
                  {"branches", shape->branches}, {"blocks", shape->num_blocks}, {"parts", shape->num_parts},
                  {"tokens", shape->tokens}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        put_key(&b, counts[i].key);
        put_int(&b, counts[i].value);
    }
    put(&b, "}");
    rf_free(options);
    return finish(&b, out, err);
}

static int num_classes_of(const rf_cache_layout *layout) {
    return layout->num_classes > 1 ? layout->num_classes : 1;
}

/* Did the part have a say in this step? */
static bool part_ran(const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p, int at) {
    if (shape->part_kinds[at] == RF_CACHE_NO_PART) return false;
    if (p->kind == RF_STEP_FULL || p->produce == RF_PRODUCE_NONE) return true;
    if (p->produce == RF_PRODUCE_OUTPUT) return false;
    int block = at / shape->num_parts;
    return block < layout->spans[p->span].begin || block >= layout->spans[p->span].end;
}

static bool is_reuse(const rf_step_plan *p, int num_classes) {
    bool one = p->num_terms == 1;
    for (int c = 0; c < num_classes && one; c++) one = p->weights[c][0] == 1.0f;
    return one;
}

static void put_blocks(buffer *b, const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p) {
    char produced = is_reuse(p, num_classes_of(layout)) ? 'r' : 'p';
    bool any_rows = false;
    put(b, "\"");
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        char letter[3] = {i > 0 && i % shape->num_parts == 0 ? ' ' : 0}, *at = letter[0] ? letter + 1 : letter;
        *at = 'c';
        if (!part_ran(shape, layout, p, i)) {
            *at = '-';
        } else if (p->kind != RF_STEP_FULL && p->parts[i] != RF_DO_COMPUTE) {
            *at = p->parts[i] == RF_DO_ROWS ? 't' : produced;
            any_rows |= p->parts[i] == RF_DO_ROWS;
        }
        put(b, letter);
    }
    put(b, "\"");
    if (!any_rows) return;
    put_key(b, "rows");
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        bool ran = part_ran(shape, layout, p, i);
        put(b, i ? "," : "[");
        put_int(b, ran && p->parts[i] == RF_DO_ROWS      ? p->rows[i]
                   : ran && p->parts[i] == RF_DO_COMPUTE ? shape->tokens
                                                         : 0);
    }
    put(b, "]");
}

static double signal_value(const rf_cache_shape *shape, const rf_trace_image *image, int signal, int branch) {
    rf_step_ctx ctx = {.shape = shape, .signals = image->signals};
    double first = image->signals[signal][branch][0];
    switch (signal) {
    case RF_SIGNAL_OUTPUT_SIZE: return first;
    case RF_SIGNAL_SPAN_NORMS: return first / (double)shape->tokens;
    case RF_SIGNAL_VERIFY: return first / (double)(shape->tokens * shape->width);
    default: return rf_ctx_rel1(&ctx, (rf_signal)signal, branch);
    }
}

static bool has_signal(const rf_trace_image *image, int step, int signal) {
    return image->signals && image->signal_steps && signal_names[signal] && image->signal_steps[signal] == step;
}

static bool measured(const rf_trace_image *image, int step) {
    bool any = image->has_drift;
    for (int k = 0; k < RF_SIGNAL_COUNT; k++) any |= has_signal(image, step, k);
    return any;
}

static void put_signals(buffer *b, const rf_cache_shape *shape, const rf_trace_image *image, int step) {
    bool any = false;
    for (int k = 0; k < RF_SIGNAL_COUNT; k++) {
        if (!has_signal(image, step, k)) continue;
        put(b, any ? "," : ",\"signals\":{");
        put_string(b, signal_names[k]);
        for (int branch = 0; branch < shape->branches; branch++) {
            put(b, branch ? "," : ":[");
            put_float(b, signal_value(shape, image, k, branch));
        }
        put(b, "]");
        any = true;
    }
    if (any) put(b, "}");
}

static bool same_double(double a, double b) {
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

static bool same_plan(const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p,
                      const rf_step_plan *q) {
    if (p == q) return true;
    if (p->kind != q->kind || p->produce != q->produce || p->span != q->span || p->verify != q->verify ||
        p->use_verified != q->use_verified || p->num_terms != q->num_terms || p->horizon != q->horizon ||
        !same_double(p->statistic, q->statistic) || !same_double(p->threshold, q->threshold))
        return false;
    for (int c = 0; c < num_classes_of(layout); c++) {
        if (memcmp(p->weights[c], q->weights[c], (size_t)p->num_terms * sizeof(float)) != 0) return false;
    }
    for (int i = 0; i < shape->num_blocks * shape->num_parts && p->kind != RF_STEP_FULL; i++) {
        if (!part_ran(shape, layout, p, i)) continue;
        if (p->parts[i] != q->parts[i] || (p->parts[i] == RF_DO_ROWS && p->rows[i] != q->rows[i])) return false;
    }
    return true;
}

/* image and all later ones that are told by the same entry; done marks them. */
static void put_entry(buffer *b, const rf_cache_shape *shape, const rf_cache_layout *layout, int step,
                      const rf_trace_image *images, int num_images, int first, bool *done) {
    const rf_trace_image *image = &images[first];
    const rf_step_plan *p = image->plan;
    bool shared = false, alone = measured(image, step);
    buffer list = {0};
    put_int(&list, image->image);
    for (int i = first + 1; i < num_images && !alone; i++) {
        if (done[i] || measured(&images[i], step) || images[i].forced != image->forced ||
            images[i].carried != image->carried || !same_plan(shape, layout, p, images[i].plan))
            continue;
        shared = done[i] = true;
        put(&list, ",");
        put_int(&list, images[i].image);
    }
    b->failed |= list.failed;
    put(b, shared ? "{\"image\":[" : "{\"image\":");
    if (!list.failed) put(b, list.text);
    rf_free(list.text);
    if (shared) put(b, "]");
    put_key(b, "kind");
    put_string(b, kind_names[p->kind]);
    put_key(b, "produce");
    put_string(b, produce_names[p->produce]);
    put_key(b, "span");
    put_int(b, p->span);
    put_key(b, "horizon");
    put_int(b, p->horizon);
    put_key(b, "statistic");
    put_double(b, p->statistic);
    put_key(b, "threshold");
    put_double(b, p->threshold);
    put_key(b, "forced");
    put(b, image->forced ? "true" : "false");
    if (image->carried) {
        put_key(b, "carried");
        put(b, "true");
    }
    if (p->verify) {
        put_key(b, "verify");
        put_string(b, verify_names[p->use_verified ? 2 : 1]);
    }
    if (image->has_drift) {
        put_key(b, "drift");
        for (int branch = 0; branch < shape->branches; branch++) {
            put(b, branch ? "," : "[");
            put_float(b, image->drift[branch]);
        }
        put(b, "]");
    }
    put_key(b, "weights");
    put(b, "[");
    for (int c = 0; c < num_classes_of(layout) && p->num_terms > 0; c++) {
        for (int j = 0; j < p->num_terms; j++) {
            put(b, j ? "," : c ? ",[" : "[");
            put_float(b, (double)p->weights[c][j]);
        }
        put(b, "]");
    }
    put(b, "]");
    put_key(b, "blocks");
    put_blocks(b, shape, layout, p);
    put_signals(b, shape, image, step);
    put(b, "}");
}

static rf_status check_written(const rf_step_plan *p, int image, int step, rf_error *err) {
    if (p->kind >= RF_STEP_FULL && p->kind <= RF_STEP_SKIP && p->produce >= RF_PRODUCE_NONE &&
        p->produce <= RF_PRODUCE_SPAN && p->span >= 0 && p->span < RF_CACHE_MAX_SPANS && p->num_terms >= 0 &&
        p->num_terms <= RF_CACHE_MAX_TERMS)
        return RF_OK;
    return rf_fail(err, RF_ERR_STATE, "trace: image %d has no plan for step %d that can be written (kind %d)", image,
                   step, (int)p->kind);
}

rf_status rf_trace_step(char **out, const rf_cache_shape *shape, const rf_cache_layout *layout, int step,
                        const rf_trace_image *images, int num_images, rf_error *err) {
    *out = NULL;
    for (int i = 0; i < num_images; i++) {
        rf_status st = check_written(images[i].plan, images[i].image, step, err);
        if (st != RF_OK) return st;
    }
    bool *done = rf_alloc_zero((size_t)num_images, sizeof *done);
    if (!done) return rf_fail(err, RF_ERR_MEMORY, "trace: no memory for a line");
    buffer b = {0};
    put(&b, "{\"step\":");
    put_int(&b, step);
    put_key(&b, "timestep");
    put_float(&b, shape->timesteps ? (double)shape->timesteps[step] : (double)NAN);
    put_key(&b, "images");
    put(&b, "[");
    for (int i = 0; i < num_images; i++) {
        if (done[i]) continue;
        if (i > 0) put(&b, ",");
        put_entry(&b, shape, layout, step, images, num_images, i, done);
    }
    put(&b, "]}");
    rf_free(done);
    return finish(&b, out, err);
}

/* ---- what is kept of a read trace ---- */

/* One plan; weights, rows and parts follow in the same block. */
typedef struct {
    uint8_t kind, produce, span, verify; /* verify: index in verify_names */
    int num_classes, num_terms, horizon;
    double statistic, threshold;
    float *weights; /* [num_classes * num_terms] */
    int32_t *rows;  /* [parts], NULL = 0 */
    uint8_t *parts; /* [parts], NULL = all computed */
} entry;

struct rf_trace {
    char *policy, *options;
    rf_trace_info info; /* names point at the two above */
    entry **entries;
    int num_entries, entries_room;
    int32_t *index; /* [image][step] in entries */
};

typedef struct {
    rf_trace *trace;
    const rf_json *doc; /* of the line */
    rf_error *err;
    int first_image, batch; /* of the batch being read: number within its run, images */
    int batch_begin;        /* its first image in the trace */
    int step;               /* the next one; info.num_steps when the batch is whole */
} reader;

static rf_status bad(const reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static rf_status bad(const reader *r, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return rf_fail(r->err, RF_ERR_FORMAT, "%s: %s", rf_json_name(r->doc), text);
}

static rf_status no_memory(const reader *r) {
    return rf_fail(r->err, RF_ERR_MEMORY, "%s: no memory for a trace", rf_json_name(r->doc));
}

static rf_status get_int(const reader *r, const rf_json_value *object, const char *key, int64_t min, int64_t max,
                         int *out) {
    int64_t v = 0;
    rf_status st = rf_json_get_int(r->doc, object, key, min, max, &v, r->err);
    *out = (int)v;
    return st;
}

/* An element of an array; what names it in messages. */
static rf_status element_int(const reader *r, const rf_json_value *v, const char *what, int64_t min, int64_t max,
                             int *out) {
    double d = rf_json_number(v);
    if (!(d >= (double)min && d <= (double)max) || d != floor(d)) {
        return bad(r, "%s must hold whole numbers in %lld..%lld", what, (long long)min, (long long)max);
    }
    *out = (int)d;
    return RF_OK;
}

/* One of some words. */
static rf_status get_word(const reader *r, const rf_json_value *object, const char *key, const char *const *words,
                          int num, uint8_t *out) {
    const char *text = NULL;
    RF_TRY(rf_json_get_string(r->doc, object, key, &text, r->err));
    for (int i = 0; i < num; i++) {
        if (strcmp(text, words[i]) != 0) continue;
        *out = (uint8_t)i;
        return RF_OK;
    }
    return bad(r, "'%s' is '%.40s', expected %s, %s or %s", key, text, words[0], words[1], words[2]);
}

/* A number, null for NaN, or an infinity. */
static rf_status get_statistic(const reader *r, const rf_json_value *object, const char *key, double *out) {
    *out = NAN;
    if (!rf_json_has(object, key)) return RF_OK;
    const rf_json_value *v = rf_json_get(object, key);
    if (!rf_json_is_number(v)) return bad(r, "'%s' must be a number or null", key);
    *out = rf_json_number(v);
    return RF_OK;
}

/* ---- header ---- */

static rf_status take_names(reader *r, const char *policy, const char *options) {
    rf_trace *t = r->trace;
    t->policy = rf_strdup(policy);
    t->options = rf_strdup(options);
    if (!t->policy || !t->options) return no_memory(r);
    t->info.policy = t->policy;
    t->info.options = t->options;
    return RF_OK;
}

static rf_status compare_batch(const reader *r, const rf_trace_info *now, const char *policy, const char *options) {
    const rf_trace_info *was = &r->trace->info;
    if (strcmp(policy, was->policy) != 0 || strcmp(options, was->options) != 0) {
        return bad(r, "a batch of policy %.30s (%.60s) in a trace of %.30s (%.60s)", policy, options, was->policy,
                   was->options);
    }
    if (now->num_steps != was->num_steps || now->branches != was->branches || now->num_blocks != was->num_blocks ||
        now->num_parts != was->num_parts || now->tokens != was->tokens) {
        return bad(r,
                   "a batch of %d steps, %d branches, %d x %d parts, %lld tokens in a trace of %d, %d, %d x %d, %lld",
                   now->num_steps, now->branches, now->num_blocks, now->num_parts, (long long)now->tokens,
                   was->num_steps, was->branches, was->num_blocks, was->num_parts, (long long)was->tokens);
    }
    return RF_OK;
}

static rf_status read_header(reader *r, const rf_json_value *root) {
    rf_trace *t = r->trace;
    bool first = t->policy == NULL;
    if (!first && r->step < t->info.num_steps) return bad(r, "a header where step %d belongs", r->step);
    const char *policy = NULL, *options = NULL;
    rf_trace_info now = {0};
    int version = 0, tokens = 0;
    RF_TRY(get_int(r, root, "trace", 1, 1, &version));
    RF_TRY(rf_json_get_string(r->doc, root, "policy", &policy, r->err));
    RF_TRY(rf_json_get_string(r->doc, root, "options", &options, r->err));
    RF_TRY(get_int(r, root, "steps", 1, MAX_STEPS, &now.num_steps));
    RF_TRY(get_int(r, root, "images", 1, MAX_IMAGES, &r->batch));
    RF_TRY(get_int(r, root, "first_image", 0, MAX_IMAGES, &r->first_image));
    RF_TRY(get_int(r, root, "branches", 1, 2, &now.branches));
    RF_TRY(get_int(r, root, "blocks", 1, MAX_BLOCKS, &now.num_blocks));
    RF_TRY(get_int(r, root, "parts", 1, MAX_PARTS, &now.num_parts));
    RF_TRY(get_int(r, root, "tokens", 1, MAX_TOKENS, &tokens));
    now.tokens = tokens;
    if (!first) RF_TRY(compare_batch(r, &now, policy, options));
    r->batch_begin = t->info.num_images;
    now.num_images = r->batch_begin + r->batch;
    int64_t total = (int64_t)now.num_images * now.num_steps, begin = (int64_t)r->batch_begin * now.num_steps;
    if (total > MAX_IMAGE_STEPS) {
        return bad(r, "%d images of %d steps, a trace holds at most %d image-steps", now.num_images, now.num_steps,
                   MAX_IMAGE_STEPS);
    }
    int32_t *index = rf_realloc(t->index, (size_t)total * sizeof *index);
    if (!index) return no_memory(r);
    t->index = index;
    memset(index + begin, 0xff, (size_t)(total - begin) * sizeof *index); /* -1 */
    if (first) {
        RF_TRY(take_names(r, policy, options));
        now.policy = t->policy;
        now.options = t->options;
        t->info = now;
    }
    t->info.num_images = now.num_images;
    r->step = 0;
    return RF_OK;
}

/* ---- one entry ---- */

static rf_status measure_weights(const reader *r, const rf_json_value *list, int *num_classes, int *num_terms) {
    if (!rf_json_is_array(list)) return bad(r, "'weights' must be an array of arrays");
    size_t classes = rf_json_count(list), terms = 0;
    if (classes > RF_CACHE_MAX_CLASSES)
        return bad(r, "'weights' has %zu rows, at most %d", classes, RF_CACHE_MAX_CLASSES);
    for (const rf_json_value *row = rf_json_first(list); row; row = rf_json_next(row)) {
        size_t n = rf_json_is_array(row) ? rf_json_count(row) : 0;
        if (n < 1 || n > RF_CACHE_MAX_TERMS || (terms && n != terms)) {
            return bad(r, "'weights' must hold arrays of 1..%d numbers, all of one length", RF_CACHE_MAX_TERMS);
        }
        terms = n;
    }
    *num_classes = (int)classes;
    *num_terms = (int)terms;
    return RF_OK;
}

static rf_status read_weights(const reader *r, const rf_json_value *list, float *out) {
    for (const rf_json_value *row = rf_json_first(list); row; row = rf_json_next(row)) {
        for (const rf_json_value *v = rf_json_first(row); v; v = rf_json_next(v)) {
            *out = (float)rf_json_number(v);
            if (!isfinite(*out)) return bad(r, "'weights' holds what is no finite number");
            out++;
        }
    }
    return RF_OK;
}

/* parts may be NULL: only checks, and says whether any part is not 'c' or '-', or is 't'. */
static rf_status read_blocks(const reader *r, const char *text, uint8_t kind, uint8_t *parts, bool *any,
                             bool *any_rows) {
    const rf_trace_info *info = &r->trace->info;
    int num = info->num_blocks * info->num_parts;
    size_t expected = (size_t)num + (size_t)info->num_blocks - 1, found = strlen(text);
    if (found != expected) return bad(r, "'blocks' has %zu characters, expected %zu", found, expected);
    *any = *any_rows = false;
    for (int i = 0; i < num; i++) {
        if (i > 0 && i % info->num_parts == 0 && *text++ != ' ') return bad(r, "'blocks' has no space after a block");
        char letter = *text++;
        if (!strchr(kind == RF_STEP_FULL ? "c-" : "cprt-", letter)) {
            return bad(r, "'blocks' has '%c' for part %d of a %s step", letter >= 0x20 && letter < 0x7f ? letter : '?',
                       i, kind_names[kind]);
        }
        rf_part_do act = letter == 't' ? RF_DO_ROWS : letter == 'p' || letter == 'r' ? RF_DO_PRODUCE : RF_DO_COMPUTE;
        *any |= act != RF_DO_COMPUTE;
        *any_rows |= act == RF_DO_ROWS;
        if (parts) parts[i] = (uint8_t)act;
    }
    return RF_OK;
}

static rf_status read_rows(const reader *r, const rf_json_value *list, const uint8_t *parts, int32_t *rows) {
    const rf_trace_info *info = &r->trace->info;
    size_t expected = (size_t)info->num_blocks * (size_t)info->num_parts, at = 0;
    if (!rf_json_is_array(list) || rf_json_count(list) != expected) {
        return bad(r, "'rows' must be an array of %zu numbers, as some part is 't'", expected);
    }
    for (const rf_json_value *v = rf_json_first(list); v; v = rf_json_next(v), at++) {
        int num = 0;
        RF_TRY(element_int(r, v, "'rows'", 0, info->tokens, &num));
        rows[at] = parts[at] == RF_DO_ROWS ? num : 0;
    }
    return RF_OK;
}

static rf_status add_entry(reader *r, size_t bytes, entry **out) {
    rf_trace *t = r->trace;
    if (t->num_entries == t->entries_room) {
        int room = 2 * t->entries_room + 64;
        entry **grown = rf_realloc(t->entries, (size_t)room * sizeof *grown);
        if (!grown) return no_memory(r);
        t->entries = grown;
        t->entries_room = room;
    }
    *out = rf_alloc(bytes);
    if (!*out) return no_memory(r);
    t->entries[t->num_entries++] = *out;
    return RF_OK;
}

static rf_status read_entry(reader *r, const rf_json_value *object) {
    const rf_trace_info *info = &r->trace->info;
    entry head = {0};
    int span = 0;
    RF_TRY(get_word(r, object, "kind", kind_names, 3, &head.kind));
    RF_TRY(get_word(r, object, "produce", produce_names, 3, &head.produce));
    RF_TRY(get_int(r, object, "span", 0, RF_CACHE_MAX_SPANS - 1, &span));
    const rf_json_value *carried = rf_json_get(object, "carried"); /* history older than the run */
    RF_TRY(get_int(r, object, "horizon", 0, carried ? MAX_HORIZON : info->num_steps, &head.horizon));
    RF_TRY(get_statistic(r, object, "statistic", &head.statistic));
    RF_TRY(get_statistic(r, object, "threshold", &head.threshold));
    if (rf_json_has(object, "verify")) RF_TRY(get_word(r, object, "verify", verify_names, 3, &head.verify));
    head.span = (uint8_t)span;
    const rf_json_value *weights = rf_json_get(object, "weights");
    RF_TRY(measure_weights(r, weights, &head.num_classes, &head.num_terms));
    const char *blocks = NULL;
    bool any = false, any_rows = false;
    RF_TRY(rf_json_get_string(r->doc, object, "blocks", &blocks, r->err));
    RF_TRY(read_blocks(r, blocks, head.kind, NULL, &any, &any_rows));

    size_t parts = (size_t)info->num_blocks * (size_t)info->num_parts;
    size_t num_weights = (size_t)head.num_classes * (size_t)head.num_terms;
    size_t bytes =
        sizeof head + num_weights * sizeof(float) + (any_rows ? parts * sizeof(int32_t) : 0) + (any ? parts : 0);
    entry *e = NULL;
    RF_TRY(add_entry(r, bytes, &e));
    *e = head;
    e->weights = (float *)(e + 1);
    int32_t *rows = (int32_t *)(e->weights + num_weights);
    if (any_rows) e->rows = rows;
    if (any) e->parts = (uint8_t *)(any_rows ? rows + parts : rows);
    RF_TRY(read_weights(r, weights, e->weights));
    if (any) RF_TRY(read_blocks(r, blocks, head.kind, e->parts, &any, &any_rows));
    if (any_rows) RF_TRY(read_rows(r, rf_json_get(object, "rows"), e->parts, e->rows));
    return RF_OK;
}

/* ---- one step ---- */

/* The entry read last tells image `number` of the run. */
static rf_status assign(reader *r, const rf_json_value *number, int *num_told) {
    rf_trace *t = r->trace;
    int image = 0;
    RF_TRY(element_int(r, number, "'image'", r->first_image, (int64_t)r->first_image + r->batch - 1, &image));
    int32_t *at = &t->index[(int64_t)(r->batch_begin + image - r->first_image) * t->info.num_steps + r->step];
    if (*at >= 0) return bad(r, "image %d is told twice", image);
    *at = t->num_entries - 1;
    (*num_told)++;
    return RF_OK;
}

static rf_status read_step(reader *r, const rf_json_value *root) {
    int step = 0, num_told = 0;
    if (!r->trace->policy) return bad(r, "no header line (\"trace\":1) in front of a step");
    RF_TRY(get_int(r, root, "step", 0, MAX_STEPS, &step));
    if (r->step == r->trace->info.num_steps) return bad(r, "step %d after the last one of its batch", step);
    if (step != r->step) return bad(r, "step %d where step %d belongs", step, r->step);
    const rf_json_value *images = rf_json_get(root, "images");
    if (!rf_json_is_array(images)) return bad(r, "'images' must be an array");
    for (const rf_json_value *object = rf_json_first(images); object; object = rf_json_next(object)) {
        if (!rf_json_is_object(object)) return bad(r, "'images' must hold objects");
        const rf_json_value *number = rf_json_get(object, "image");
        if (!number) return bad(r, "an entry of 'images' without 'image'");
        RF_TRY(read_entry(r, object));
        if (!rf_json_is_array(number)) {
            RF_TRY(assign(r, number, &num_told));
            continue;
        }
        for (const rf_json_value *v = rf_json_first(number); v; v = rf_json_next(v)) RF_TRY(assign(r, v, &num_told));
    }
    if (num_told != r->batch) return bad(r, "step %d tells of %d images, expected %d", step, num_told, r->batch);
    r->step++;
    return RF_OK;
}

/* ---- a file ---- */

static rf_status read_line(reader *r, const char *text, size_t bytes, const char *name) {
    rf_json *doc = NULL;
    RF_TRY(rf_json_parse(&doc, text, bytes, name, r->err));
    r->doc = doc;
    const rf_json_value *root = rf_json_root(doc);
    rf_status st = RF_OK;
    if (!rf_json_is_object(root)) {
        st = bad(r, "a line of a trace must be an object");
    } else {
        st = rf_json_has(root, "trace") ? read_header(r, root) : read_step(r, root);
    }
    rf_json_close(doc);
    r->doc = NULL;
    return st;
}

static rf_status read_lines(reader *r, const char *text, size_t bytes, const char *path) {
    long long line = 1;
    for (size_t at = 0; at < bytes; line++) {
        const char *begin = text + at, *end = memchr(begin, '\n', bytes - at);
        size_t len = end ? (size_t)(end - begin) : bytes - at;
        at += len + 1;
        if (len > 0 && begin[len - 1] == '\r') len--;
        if (len == 0) continue;
        char name[400];
        snprintf(name, sizeof name, "%.360s:%lld", path, line);
        RF_TRY(read_line(r, begin, len, name));
    }
    const rf_trace_info *info = &r->trace->info;
    if (!r->trace->policy) return rf_fail(r->err, RF_ERR_FORMAT, "%.360s: not a trace: no line in it", path);
    if (r->step < info->num_steps) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%.360s:%lld: ends where step %d of %d belongs", path, line, r->step,
                       info->num_steps);
    }
    return RF_OK;
}

rf_status rf_trace_open(rf_trace **out, const char *path, rf_error *err) {
    *out = NULL;
    char *text = NULL;
    size_t bytes = 0;
    RF_TRY(rf_file_read(path, MAX_FILE_BYTES, &text, &bytes, err));
    reader r = {.trace = rf_alloc_zero(1, sizeof *r.trace), .err = err};
    rf_status st = r.trace ? read_lines(&r, text, bytes, path)
                           : rf_fail(err, RF_ERR_MEMORY, "%.360s: no memory for a trace", path);
    rf_free(text);
    if (st == RF_OK) {
        *out = r.trace;
    } else {
        rf_trace_close(r.trace);
    }
    return st;
}

void rf_trace_close(rf_trace *trace) {
    if (!trace) return;
    for (int i = 0; i < trace->num_entries; i++) rf_free(trace->entries[i]);
    rf_free(trace->entries);
    rf_free(trace->index);
    rf_free(trace->policy);
    rf_free(trace->options);
    rf_free(trace);
}

rf_trace_info rf_trace_get_info(const rf_trace *trace) {
    return trace->info;
}

rf_status rf_trace_get_plan(const rf_trace *trace, int image, int step, rf_step_plan *plan, rf_error *err) {
    const rf_trace_info *info = &trace->info;
    if (image < 0 || image >= info->num_images || step < 0 || step >= info->num_steps) {
        return rf_fail(err, RF_ERR_ARGUMENT, "trace: image %d, step %d of %d images, %d steps", image, step,
                       info->num_images, info->num_steps);
    }
    const entry *e = trace->entries[trace->index[(int64_t)image * info->num_steps + step]];
    size_t parts = (size_t)info->num_blocks * (size_t)info->num_parts;
    rf_step_plan p = {.kind = (rf_step_kind)e->kind,
                      .produce = (rf_produce)e->produce,
                      .span = e->span,
                      .verify = e->verify > 0,
                      .use_verified = e->verify > 1,
                      .parts = plan->parts,
                      .rows = plan->rows,
                      .num_terms = e->num_terms,
                      .horizon = e->horizon,
                      .statistic = e->statistic,
                      .threshold = e->threshold};
    for (int i = 0; i < e->num_classes * e->num_terms; i++) {
        p.weights[i / e->num_terms][i % e->num_terms] = e->weights[i];
    }
    memset(p.parts, 0, parts);
    memset(p.rows, 0, parts * sizeof *p.rows);
    if (e->parts) memcpy(p.parts, e->parts, parts);
    if (e->rows) memcpy(p.rows, e->rows, parts * sizeof *p.rows);
    *plan = p;
    return RF_OK;
}
