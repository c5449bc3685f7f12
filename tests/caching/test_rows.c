/* tests/caching/test_rows.c - row policies of diffusion language models, on decodes with no model.
 *
 * A run here is what dlm/decode.c does: it builds a policy's view of the sequence, takes a plan, commits some of the
 * candidates and goes on with the next block when a block has no mask left. Confidences are made up from a seed.
 * Every plan is checked against caching/rows/rows.h and against what the cache holds: for each row, whether and for
 * which token keys were last written, and when. */
#include "tests/test_util.h"

#include <stdarg.h>

#include "caching/cache.h"
#include "caching/rows/rows.h"
#include "core/memory.h"
#include "tests/caching/sim.h"

#define MASK   1
#define FILLED 2 /* end of text */
#define GUARD  7

typedef struct {
    const char *policy, *options;  /* "none": every row, every pass */
    int32_t prompt, canvas, block; /* block 0: one */
    int32_t per_pass;              /* tokens a pass; 0: one; -1: 1..3 by chance */
    bool left_to_right;            /* else by made-up confidence */
    int32_t shift, num_layers;     /* layers 0: 3 */
    bool block_causal, random, force;
    int32_t cut_step, cut_to; /* the pass after which the canvas is cut to so many rows (0: never) */
    int32_t fill_step; /* the pass after which masks behind the first committed token become end-of-text (0: never) */
    uint32_t seed;
    bool may_be_stale; /* rows may hold keys of the mask that they were */
} run_options;

typedef struct {
    int32_t num_passes, num_refreshes, num_stale; /* stale: most rows seen with keys of a former token */
    int64_t row_passes;
    char *text; /* a line a pass */
    size_t used, room;
} run_result;

/* ---- text ---- */

__attribute__((format(printf, 2, 3))) static void put(run_result *r, const char *format, ...) {
    for (;;) {
        va_list args;
        va_start(args, format);
        int n = vsnprintf(r->text ? r->text + r->used : NULL, r->room - r->used, format, args);
        va_end(args);
        ck_assert_int_ge(n, 0);
        if (r->text && r->used + (size_t)n < r->room) {
            r->used += (size_t)n;
            return;
        }
        r->room = 2 * r->room + (size_t)n + 256;
        r->text = realloc(r->text, r->room);
        ck_assert_ptr_nonnull(r->text);
    }
}

/* "0-3,7" */
static void put_rows(run_result *r, const int32_t *rows, int32_t num) {
    for (int32_t i = 0; i < num;) {
        int32_t j = i;
        while (j + 1 < num && rows[j + 1] == rows[j] + 1) j++;
        put(r, "%s%d", i ? "," : "", rows[i]);
        if (j > i) put(r, "-%d", rows[j]);
        i = j + 1;
    }
}

static void put_plan(run_result *r, const rf_row_plan *p) {
    put_rows(r, p->rows, p->num_rows);
    if (p->num_visible > 0) {
        put(r, " sees ");
        put_rows(r, p->visible, p->num_visible);
    } else {
        put(r, " sees <%d", p->visible_end);
    }
    put(r, " may ");
    put_rows(r, p->candidates, p->num_candidates);
    if (p->inside_begin < p->inside_end) put(r, " in %d-%d", p->inside_begin, p->inside_end - 1);
    if (p->refresh) put(r, " all");
    if (p->outside_changed && p->inside_begin < p->inside_end) put(r, " new");
    if (p->layers == RF_LAYERS_DRIFT) {
        put(r, " drift %g%s window ", p->drift.threshold, p->drift.over_heads ? " heads" : "");
        put_rows(r, p->drift.window, p->drift.num_window);
        if (p->drift.force_from >= 0) put(r, " from %d", p->drift.force_from);
    }
    if (p->layers == RF_LAYERS_VERIFY) {
        put(r, " verify %g %d-%d full %d%s", p->verify.ratio, p->verify.begin, p->verify.end - 1, p->verify.full_layers,
            p->verify.store ? " store" : "");
    }
    put(r, "\n");
}

/* ---- a run ---- */

typedef struct {
    run_options o;
    rf_row_shape shape;
    rf_row_state seq;
    rf_row_plan plan;
    rf_policy *policy;
    unsigned char *state;
    size_t state_bytes;
    int32_t *tokens, *commit_step, *committed, *order, *tracked;
    float *confidence;
    uint8_t *masked;
    int32_t *key_token, *key_step; /* what a row's keys were written for and when; step -1 = never */
    uint8_t *seen, *outside, *kept_outside;
    int32_t kept_step, kept_begin, kept_end; /* of the last pass whose rows were all inside */
} sim;

static void *take(size_t num, size_t bytes) {
    void *p = calloc(num + 1, bytes);
    ck_assert_ptr_nonnull(p);
    return p;
}

static uint32_t noise(uint32_t seed, int32_t a, int32_t b) {
    return (uint32_t)(sim_noise(seed, a, b, 0) * 4294967295.0);
}

#define CHECK_PLAN(cond, ...)                                                                                          \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            char why_[256];                                                                                            \
            snprintf(why_, sizeof why_, __VA_ARGS__);                                                                  \
            ck_abort_msg("%s %s, pass %d (prompt %d, canvas %d, block %d): %s", s->o.policy,                           \
                         s->o.options ? s->o.options : "", s->seq.step, s->o.prompt, s->o.canvas, s->o.block, why_);   \
        }                                                                                                              \
    } while (0)

static void check_list(const sim *s, const char *what, const int32_t *list, int32_t num) {
    CHECK_PLAN(num >= 0 && num <= s->seq.length, "%d %s", num, what);
    for (int32_t i = 0; i < num; i++) {
        CHECK_PLAN(list[i] >= 0 && list[i] < s->seq.length, "%s: row %d of %d", what, list[i], s->seq.length);
        CHECK_PLAN(i == 0 || list[i] > list[i - 1], "%s: %d after %d", what, list[i], list[i - 1]);
    }
    CHECK_PLAN(list[s->shape.length] == GUARD, "%s: more than there is room for", what);
}

static bool holds(const int32_t *list, int32_t num, int32_t row) {
    for (int32_t i = 0; i < num; i++) {
        if (list[i] == row) return true;
    }
    return false;
}

/* Is what was kept of external attention still what this pass would compute? By what was really written since the
 * last pass whose rows were all inside, which is when the loop keeps it. */
static bool outside_is_as_kept(sim *s) {
    const rf_row_plan *p = &s->plan;
    bool same = p->inside_begin < p->inside_end && p->inside_begin == s->kept_begin && p->inside_end == s->kept_end;
    bool all_inside = p->inside_begin < p->inside_end;
    for (int32_t row = 0; row < s->shape.length; row++) {
        bool inside = row >= p->inside_begin && row < p->inside_end;
        s->outside[row] = row < s->seq.length && s->seen[row] && !inside;
        same &= s->outside[row] == s->kept_outside[row];
        same &= !s->outside[row] || s->key_step[row] <= s->kept_step;
        all_inside &= !s->outside[row] || s->key_step[row] < s->seq.step;
    }
    if (!all_inside) return same;
    memcpy(s->kept_outside, s->outside, (size_t)s->shape.length);
    s->kept_begin = p->inside_begin;
    s->kept_end = p->inside_end;
    s->kept_step = s->seq.step;
    return same;
}

static void check_layers(const sim *s) {
    const rf_row_plan *p = &s->plan;
    if (p->layers == RF_LAYERS_DRIFT) {
        check_list(s, "window", p->drift.window, p->drift.num_window);
        for (int32_t i = 0; i < p->drift.num_window; i++) {
            CHECK_PLAN(holds(p->rows, p->num_rows, p->drift.window[i]), "window row %d is not computed",
                       p->drift.window[i]);
        }
        for (int l = 0; s->seq.step > 0 && l < s->shape.num_layers; l++) {
            int32_t row = s->seq.tracked[l];
            CHECK_PLAN(row < 0 || row >= s->seq.length || holds(p->rows, p->num_rows, row),
                       "tracked row %d is not computed", row);
        }
    }
    if (p->layers != RF_LAYERS_VERIFY) return;
    CHECK_PLAN(p->verify.begin <= p->verify.end && p->verify.end <= s->seq.length, "segment %d-%d", p->verify.begin,
               p->verify.end);
    for (int32_t row = p->verify.begin; row < p->verify.end; row++) {
        CHECK_PLAN(holds(p->rows, p->num_rows, row), "row %d of the segment is not listed", row);
    }
}

/* Checks the plan, and writes keys as the pass would. */
static void run_pass(sim *s, run_result *r) {
    const rf_row_plan *p = &s->plan;
    int32_t first = s->shape.block_causal ? s->seq.block_begin : 0;
    check_list(s, "rows", p->rows, p->num_rows);
    check_list(s, "visible", p->visible, p->num_visible);
    check_list(s, "candidates", p->candidates, p->num_candidates);
    CHECK_PLAN(p->num_visible > 0 || (p->visible_end > 0 && p->visible_end <= s->seq.length), "sees <%d",
               p->visible_end);
    CHECK_PLAN(p->num_candidates > 0, "no candidates");
    memset(s->seen, 0, (size_t)s->shape.length);
    for (int32_t i = 0; i < p->num_visible; i++) s->seen[p->visible[i]] = 1;
    if (p->num_visible == 0) memset(s->seen, 1, (size_t)p->visible_end);
    for (int32_t i = 0; i < p->num_candidates; i++) {
        int32_t row = p->candidates[i];
        CHECK_PLAN(s->masked[row], "candidate %d is no mask", row);
        CHECK_PLAN(row >= s->seq.block_begin && row < s->seq.block_end, "candidate %d, block %d-%d", row,
                   s->seq.block_begin, s->seq.block_end - 1);
        CHECK_PLAN(holds(p->rows, p->num_rows, row), "candidate %d is not computed", row);
        int32_t before = row - s->shape.shift; /* the loop adds it */
        if (before < 0) continue;
        CHECK_PLAN(s->seen[before], "row %d, which predicts %d, is not seen", before, row);
        s->key_token[before] = s->tokens[before];
        s->key_step[before] = s->seq.step;
    }
    int32_t renewed = 0, renewable = 0, stale = 0;
    for (int32_t i = 0; i < p->num_rows; i++) {
        int32_t row = p->rows[i];
        CHECK_PLAN(s->seen[row], "row %d is computed and not seen", row);
        CHECK_PLAN(!s->shape.block_causal || (row >= first && row < s->seq.block_end), "row %d is not of the block",
                   row);
        s->key_token[row] = s->tokens[row];
        s->key_step[row] = s->seq.step;
    }
    for (int32_t row = 0; row < s->seq.length; row++) {
        if (!s->seen[row] || row < first) continue;
        CHECK_PLAN(s->key_step[row] >= 0, "row %d is seen and was never computed", row);
        stale += s->key_token[row] != s->tokens[row];
        CHECK_PLAN(s->o.may_be_stale || s->key_token[row] == s->tokens[row], "row %d holds keys of a former token",
                   row);
        renewed += holds(p->rows, p->num_rows, row);
        renewable++;
    }
    CHECK_PLAN(p->refresh == (renewed == renewable && (p->layers != RF_LAYERS_VERIFY || p->verify.store)),
               "refresh is %d, %d of %d rows", p->refresh, renewed, renewable);
    CHECK_PLAN(p->outside_changed == !outside_is_as_kept(s), "outside_changed is %d", p->outside_changed);
    check_layers(s);
    r->num_passes++;
    r->row_passes += p->num_rows;
    r->num_refreshes += p->refresh;
    if (stale > r->num_stale) r->num_stale = stale;
    put_plan(r, p);
}

static void set_block(sim *s, int32_t index) {
    s->seq.block_index = index;
    s->seq.block_begin = s->o.prompt + index * s->shape.block;
    s->seq.block_end = s->seq.block_begin + s->shape.block;
    if (s->seq.block_end > s->seq.length) s->seq.block_end = s->seq.length;
    s->seq.block_step = 0;
}

static int32_t count_masks(const sim *s, int32_t begin, int32_t end) {
    int32_t num = 0;
    for (int32_t row = begin; row < end; row++) num += s->masked[row] != 0;
    return num;
}

/* Ahead of the others if it commits sooner. */
static double rank_of(const sim *s, int32_t row) {
    if (s->o.left_to_right) return -row;
    return sim_noise(s->o.seed, s->o.random ? 0 : s->seq.step, row, 0); /* a random order is fixed */
}

static void order_masks(sim *s) {
    s->seq.num_order = 0;
    for (int32_t row = 0; row < s->seq.length; row++) {
        if (!s->masked[row]) continue;
        int32_t at = s->seq.num_order++;
        while (at > 0 && rank_of(s, s->order[at - 1]) < rank_of(s, row)) {
            s->order[at] = s->order[at - 1];
            at--;
        }
        s->order[at] = row;
    }
}

static void commit_row(sim *s, int32_t row, int32_t token) {
    s->masked[row] = 0;
    s->tokens[row] = token;
    s->commit_step[row] = s->seq.step;
}

static void commit(sim *s) {
    int32_t count = s->o.per_pass > 0 ? s->o.per_pass : 1, left = s->plan.num_candidates;
    if (s->o.per_pass < 0) count = 1 + (int32_t)(noise(s->o.seed, s->seq.step, -1) % 3);
    for (; count > 0 && left > 0; count--, left--) {
        int32_t best = -1;
        for (int32_t i = 0; i < s->plan.num_candidates; i++) {
            int32_t row = s->plan.candidates[i];
            if (s->masked[row] && (best < 0 || rank_of(s, row) > rank_of(s, best))) best = row;
        }
        commit_row(s, best, 100 + best);
    }
    if (s->o.cut_step > 0 && s->seq.step + 1 == s->o.cut_step && s->o.cut_to < s->seq.length) {
        s->seq.length = s->o.cut_to;
        if (s->seq.block_end > s->seq.length) s->seq.block_end = s->seq.length;
    }
    if (s->o.fill_step > 0 && s->seq.step + 1 == s->o.fill_step) {
        int32_t row = s->o.prompt;
        while (s->masked[row]) row++;
        for (; row < s->seq.length; row++) {
            if (s->masked[row]) commit_row(s, row, FILLED);
        }
    }
    s->seq.num_committed = 0;
    for (int32_t row = 0; row < s->seq.length; row++) {
        if (s->commit_step[row] == s->seq.step) s->committed[s->seq.num_committed++] = row;
    }
}

static void begin_run(sim *s) {
    int32_t length = s->o.prompt + s->o.canvas;
    s->shape = (rf_row_shape){.model = "a text model",
                              .prompt = s->o.prompt,
                              .length = length,
                              .block = s->o.block > 0 ? s->o.block : s->o.canvas,
                              .block_causal = s->o.block_causal,
                              .shift = s->o.shift,
                              .num_layers = s->o.num_layers > 0 ? s->o.num_layers : 3,
                              .order_is_random = s->o.random,
                              .force = s->o.force};
    size_t n = (size_t)length;
    s->tokens = take(n, sizeof(int32_t));
    s->commit_step = take(n, sizeof(int32_t));
    s->committed = take(n, sizeof(int32_t));
    s->order = take(n, sizeof(int32_t));
    s->tracked = take((size_t)s->shape.num_layers, sizeof(int32_t));
    s->confidence = take(n, sizeof(float));
    s->masked = take(n, 1);
    s->key_token = take(n, sizeof(int32_t));
    s->key_step = take(n, sizeof(int32_t));
    s->seen = take(n, 1);
    s->outside = take(n, 1);
    s->kept_outside = take(n, 1);
    s->plan.rows = take(n, sizeof(int32_t));
    s->plan.visible = take(n, sizeof(int32_t));
    s->plan.candidates = take(n, sizeof(int32_t));
    s->plan.drift.window = take(n, sizeof(int32_t));
    s->plan.rows[n] = s->plan.visible[n] = s->plan.candidates[n] = s->plan.drift.window[n] = GUARD;
    for (int32_t row = 0; row < length; row++) {
        bool masked = row >= s->o.prompt;
        s->masked[row] = masked;
        s->tokens[row] = masked ? MASK : 10 + row;
        s->commit_step[row] = masked ? RF_COMMIT_NEVER : RF_COMMIT_PROMPT;
        s->confidence[row] = -1;
        s->key_step[row] = -1;
    }
    for (int l = 0; l < s->shape.num_layers; l++) s->tracked[l] = -1;
    s->seq = (rf_row_state){.shape = &s->shape,
                            .length = length,
                            .tokens = s->tokens,
                            .masked = s->masked,
                            .commit_step = s->commit_step,
                            .committed = s->committed,
                            .confidence = s->confidence,
                            .order = s->o.random ? s->order : NULL,
                            .tracked = s->tracked,
                            .expanded_at = -1};
    set_block(s, 0);
}

/* What layers would report: the tracked rows are decoded ones. */
static void track(sim *s) {
    for (int l = 0; l < s->shape.num_layers; l++) {
        int32_t row = (int32_t)(noise(s->o.seed + 9, s->seq.step, l) % (uint32_t)s->shape.length);
        s->tracked[l] = row < s->seq.length && !s->masked[row] ? row : s->o.prompt > 0 ? 0 : -1;
    }
}

static void end_run(sim *s) {
    void *all[] = {s->tokens,    s->commit_step,  s->committed,       s->order,
                   s->tracked,   s->confidence,   s->masked,          s->key_token,
                   s->key_step,  s->seen,         s->outside,         s->kept_outside,
                   s->plan.rows, s->plan.visible, s->plan.candidates, s->plan.drift.window,
                   s->state};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    rf_policy_destroy(s->policy);
}

static void plan_none(sim *s) {
    rf_row_memory memory = {0};
    rf_rows_begin(&s->seq, &s->plan);
    rf_rows_all(&s->seq, &s->plan);
    rf_rows_candidates(&s->seq, &s->plan, s->seq.block_begin, s->seq.block_end);
    rf_rows_finish(&memory, s->state, &s->seq, &s->plan);
}

static void plan_next(sim *s) {
    if (s->policy) {
        const rf_policy_def *def = rf_policy_get_def(s->policy);
        def->rows->plan(s->policy, s->state, &s->seq, &s->plan);
        for (size_t i = 0; i < 8; i++) CHECK_PLAN(s->state[s->state_bytes + i] == GUARD, "writes behind its state");
    } else {
        plan_none(s);
    }
}

/* Decodes to the end and checks every plan. Errors of setting up come back. */
static rf_status try_run(run_result *r, const run_options *o, rf_error *err) {
    sim whole = {.o = *o}, *s = &whole;
    memset(r, 0, sizeof *r);
    bool none = strcmp(o->policy, "none") == 0;
    begin_run(s);
    rf_status st = none ? RF_OK : rf_policy_create(&s->policy, o->policy, err);
    if (st == RF_OK && !none) st = rf_policy_set(s->policy, o->options, err);
    if (st == RF_OK && !none) st = rf_row_policy_check(s->policy, &s->shape, err);
    if (st != RF_OK) {
        end_run(s);
        return st;
    }
    s->state_bytes = none ? (size_t)s->shape.length : rf_row_policy_state_bytes(s->policy, &s->shape);
    s->state = take(s->state_bytes + 8, 1);
    memset(s->state + s->state_bytes, GUARD, 8);
    while (count_masks(s, 0, s->seq.length) > 0) {
        CHECK_PLAN(s->seq.step <= s->o.canvas, "does not end");
        while (count_masks(s, s->seq.block_begin, s->seq.block_end) == 0) {
            if (s->shape.block_causal) { /* the loop's last pass over the block */
                for (int32_t row = s->seq.block_begin; row < s->seq.block_end; row++)
                    s->key_token[row] = s->tokens[row];
            }
            set_block(s, s->seq.block_index + 1);
        }
        if (s->o.random) order_masks(s);
        plan_next(s);
        run_pass(s, r);
        track(s);
        commit(s);
        s->seq.step++;
        s->seq.block_step++;
    }
    end_run(s);
    return RF_OK;
}

static run_result run(const run_options *o) {
    run_result r;
    rf_error err = {0};
    rf_assert_ok(try_run(&r, o, &err), err);
    return r;
}

static void assert_plans(const run_options *o, const char *want) {
    run_result r = run(o);
    ck_assert_msg(strcmp(r.text, want) == 0, "%s %s plans\n%sand not\n%s", o->policy, o->options ? o->options : "",
                  r.text, want);
    free(r.text);
}

/* ---- the list, refusals ---- */

START_TEST(row_policies_are_listed_and_found) {
    static const char *const want[] = {"prefix", "dual",       "window",  "freecache",
                                       "dkv",    "dllm-cache", "elastic", "vicinity"};
    ck_assert_int_eq(rf_row_policy_count(), sizeof want / sizeof want[0]);
    for (int i = 0; i < rf_row_policy_count(); i++) {
        const rf_policy_def *def = rf_row_policy_at(i);
        ck_assert_str_eq(def->name, want[i]);
        ck_assert_ptr_eq(rf_policy_find(want[i]), def);
        ck_assert_str_eq(def->family, "row");
        ck_assert_str_eq(def->level, "row");
        ck_assert(def->paper[0] && def->summary[0] && def->fits[0]);
        ck_assert_msg(strstr(def->paper, ", arXiv ") != NULL, "%s: paper", def->name);
        ck_assert_ptr_nonnull(def->rows->plan);
        ck_assert_ptr_null(def->plan);
        ck_assert_int_gt(def->num_options, 0);
        ck_assert_int_le(def->num_options, RF_POLICY_MAX_OPTIONS);
        for (int k = 0; k < def->num_options; k++) {
            const rf_policy_option *o = &def->options[k];
            ck_assert_msg(strspn(o->name, "abcdefghijklmnopqrstuvwxyz_") == strlen(o->name), "%s: %s", def->name,
                          o->name);
            ck_assert_msg(o->help && o->help[0], "%s: %s has no help", def->name, o->name);
            for (int j = 0; j < k; j++) ck_assert_str_ne(def->options[j].name, o->name);
        }
        for (int k = 0; k < rf_policy_count(); k++) ck_assert_str_ne(rf_policy_at(k)->name, def->name);
    }
    ck_assert_ptr_null(rf_row_policy_at(-1));
    ck_assert_ptr_null(rf_row_policy_at(rf_row_policy_count()));
    ck_assert_ptr_null(rf_policy_find("none"));
}
END_TEST

START_TEST(a_wrong_name_is_answered_with_both_lists) {
    rf_error err = {0};
    rf_policy *p = NULL;
    rf_assert_fails(rf_policy_create(&p, "windw", &err), err, RF_ERR_ARGUMENT, "did you mean 'window'?");
    ck_assert_ptr_nonnull(strstr(err.message,
                                 "(row policies of text: prefix, dual, window, freecache, dkv, dllm-cache, "
                                 "elastic, vicinity)"));
    rf_assert_fails(rf_policy_create(&p, "dllm", &err), err, RF_ERR_ARGUMENT, "did you mean 'dllm-cache'?");
}
END_TEST

/* Neither family runs as the other. */
START_TEST(families_refuse_each_other) {
    rf_error err = {0};
    rf_policy *p = NULL;
    rf_cache_shape image = {.model = "an image model", .num_steps = 50, .force = true};
    for (int i = 0; i < rf_row_policy_count(); i++) {
        rf_assert_ok(rf_policy_create(&p, rf_row_policy_at(i)->name, &err), err);
        rf_assert_fails(rf_cache_check(p, &image, &err), err, RF_ERR_UNSUPPORTED, rf_row_policy_at(i)->name);
        ck_assert_ptr_nonnull(strstr(err.message, "chooses rows of a text that a diffusion language model decodes; an "
                                                  "image model is no text model"));
        rf_policy_destroy(p);
    }
    rf_row_shape text = {.model = "a text model", .prompt = 4, .length = 8, .block = 4, .force = true};
    for (int i = 0; i < rf_policy_count(); i++) {
        rf_assert_ok(rf_policy_create(&p, rf_policy_at(i)->name, &err), err);
        rf_assert_fails(rf_row_policy_check(p, &text, &err), err, RF_ERR_ARGUMENT, rf_policy_at(i)->name);
        ck_assert_ptr_nonnull(strstr(err.message, "a text model is a text model (row policies: prefix, dual, window, "
                                                  "freecache, dkv, dllm-cache, elastic, vicinity)"));
        rf_policy_destroy(p);
    }
}
END_TEST

START_TEST(misfits_are_refused_by_name) {
    static const char *const bidirectional[][2] = {
        {"prefix", ""},  {"dual", ""},     {"freecache", ""},          {"dllm-cache", ""},
        {"elastic", ""}, {"vicinity", ""}, {"dkv", "variant=prefill"}, {"dkv", "variant=pd"}};
    rf_error err = {0};
    run_result r;
    for (int force = 0; force < 2; force++) {
        for (size_t i = 0; i < sizeof bidirectional / sizeof bidirectional[0]; i++) {
            run_options o = {.policy = bidirectional[i][0],
                             .options = bidirectional[i][1],
                             .prompt = 4,
                             .canvas = 8,
                             .block = 4,
                             .block_causal = true,
                             .force = force};
            rf_assert_fails(try_run(&r, &o, &err), err, RF_ERR_UNSUPPORTED, "needs a bidirectional model");
            ck_assert_ptr_nonnull(strstr(err.message, o.policy));
        }
    }
    run_options greedy = {.policy = "dkv", .options = "variant=greedy", .prompt = 4, .canvas = 8};
    rf_assert_fails(try_run(&r, &greedy, &err), err, RF_ERR_UNSUPPORTED,
                    "dkv variant=greedy needs an order of commits");
    greedy.force = true;
    r = run(&greedy);
    free(r.text);
    run_options window = {.policy = "window", .options = "active=9,external=8", .prompt = 4, .canvas = 30};
    rf_assert_fails(try_run(&r, &window, &err), err, RF_ERR_UNSUPPORTED, "active=9, external=8");
    window.force = true;
    r = run(&window);
    free(r.text);
    window.force = false;
    window.options = "active=9,external=9";
    r = run(&window);
    free(r.text);
}
END_TEST

/* ---- plans worked by hand ---- */

START_TEST(prefix_computes_from_the_block_on) {
    run_options o = {.policy = "prefix", .prompt = 2, .canvas = 6, .block = 2, .left_to_right = true};
    assert_plans(&o, "0-7 sees <8 may 2-3 in 2-7 all new\n"
                     "2-7 sees <8 may 3 in 2-7 new\n"
                     "0-7 sees <8 may 4-5 in 4-7 all new\n"
                     "4-7 sees <8 may 5 in 4-7 new\n"
                     "0-7 sees <8 may 6-7 in 6-7 all new\n"
                     "6-7 sees <8 may 7 in 6-7 new\n");
    o.options = "horizon=1"; /* dLLM-RL */
    assert_plans(&o, "0-4 sees <5 may 2-3 in 2-4 all new\n"
                     "2-4 sees <5 may 3 in 2-4 new\n"
                     "0-6 sees <7 may 4-5 in 4-6 all new\n"
                     "4-6 sees <7 may 5 in 4-6 new\n"
                     "0-7 sees <8 may 6-7 in 6-7 all new\n"
                     "6-7 sees <8 may 7 in 6-7 new\n");
    o.options = "refresh=2";
    o.block = 0;
    assert_plans(&o, "0-7 sees <8 may 2-7 in 2-7 all new\n"
                     "2-7 sees <8 may 3-7 in 2-7 new\n"
                     "0-7 sees <8 may 4-7 in 2-7 all new\n"
                     "2-7 sees <8 may 5-7 in 2-7 new\n"
                     "0-7 sees <8 may 6-7 in 2-7 all new\n"
                     "2-7 sees <8 may 7 in 2-7 new\n");
}
END_TEST

START_TEST(dual_computes_the_block) {
    run_options o = {.policy = "dual", .prompt = 2, .canvas = 6, .block = 3, .left_to_right = true, .shift = 1};
    assert_plans(&o, "0-7 sees <8 may 2-4 in 1-4 all new\n"
                     "2-4 sees <8 may 3-4 in 1-4 new\n"
                     "2-4 sees <8 may 4 in 1-4\n"
                     "0-7 sees <8 may 5-7 in 4-7 all new\n"
                     "5-7 sees <8 may 6-7 in 4-7 new\n"
                     "5-7 sees <8 may 7 in 4-7\n");
    o.shift = 0;
    o.options = "horizon=2,refresh=2";
    assert_plans(&o, "0-6 sees <7 may 2-4 in 2-4 all new\n"
                     "2-4 sees <7 may 3-4 in 2-4 new\n"
                     "0-6 sees <7 may 4 in 2-4 all new\n"
                     "0-7 sees <8 may 5-7 in 5-7 all new\n"
                     "5-7 sees <8 may 6-7 in 5-7 new\n"
                     "0-7 sees <8 may 7 in 5-7 all new\n");
    /* cut to 6 rows after the second pass: what lies outside is less, the last block shorter */
    o.options = NULL;
    o.cut_step = 2;
    o.cut_to = 6;
    assert_plans(&o, "0-7 sees <8 may 2-4 in 2-4 all new\n"
                     "2-4 sees <8 may 3-4 in 2-4 new\n"
                     "2-4 sees <6 may 4 in 2-4 new\n"
                     "0-5 sees <6 may 5 in 5-5 all new\n");
}
END_TEST

START_TEST(vicinity_computes_around_the_block) {
    run_options o = {.policy = "vicinity",
                     .options = "back=1,ahead=2,warmup=2",
                     .prompt = 2,
                     .canvas = 8,
                     .block = 4,
                     .left_to_right = true};
    assert_plans(&o, "0-9 sees <10 may 2-5 in 1-7 all new\n"
                     "0-9 sees <10 may 3-5 in 1-7 all new\n"
                     "1-7 sees <10 may 4-5 in 1-7 new\n"
                     "1-7 sees <10 may 5 in 1-7\n"
                     "0-9 sees <10 may 6-9 in 5-9 all new\n"
                     "5-9 sees <10 may 7-9 in 5-9 new\n"
                     "5-9 sees <10 may 8-9 in 5-9\n"
                     "5-9 sees <10 may 9 in 5-9\n");
}
END_TEST

/* Commits left to right: two active, four seen, phases of three. A phase that runs out of masks in W ends early. */
START_TEST(window_has_phases) {
    run_options o = {.policy = "window",
                     .options = "active=2,external=4,refresh=3",
                     .prompt = 2,
                     .canvas = 8,
                     .left_to_right = true};
    assert_plans(&o, "0-5 sees <6 may 2-3 in 2-5 all new\n" /* W = prompt, masks 2-5 */
                     "2-4 sees <6 may 3-4 in 2-5 new\n"     /* 2 was decoded in this phase */
                     "2-5 sees <6 may 4-5 in 2-5\n"
                     "0-8 sees <9 may 5-6 in 5-8 all new\n" /* W = 0-4 decoded, masks 5-8 */
                     "5-7 sees <9 may 6-7 in 5-8 new\n"
                     "5-8 sees <9 may 7-8 in 5-8\n"
                     "0-9 sees <10 may 8-9 in 8-9 all new\n" /* the last phase */
                     "8-9 sees <10 may 9 in 8-9 new\n");
    o.options = "active=2,external=4,refresh=3,transient=false"; /* a decoded row once */
    assert_plans(&o, "0-5 sees <6 may 2-3 in 2-5 all new\n"
                     "2-4 sees <6 may 3-4 in 2-5 new\n"
                     "3-5 sees <6 may 4-5 in 2-5\n"
                     "0-8 sees <9 may 5-6 in 5-8 all new\n"
                     "5-7 sees <9 may 6-7 in 5-8 new\n"
                     "6-8 sees <9 may 7-8 in 5-8\n"
                     "0-9 sees <10 may 8-9 in 8-9 all new\n"
                     "8-9 sees <10 may 9 in 8-9 new\n");
    o.options = "active=2,external=3,refresh=100"; /* used up before */
    assert_plans(&o, "0-4 sees <5 may 2-3 in 2-4 all new\n"
                     "2-4 sees <5 may 3-4 in 2-4 new\n"
                     "0-6 sees <7 may 4-5 in 4-6 all new\n" /* one mask (4) was left in W */
                     "4-6 sees <7 may 5-6 in 4-6 new\n"
                     "0-8 sees <9 may 6-7 in 6-8 all new\n"
                     "6-8 sees <9 may 7-8 in 6-8 new\n"
                     "0-9 sees <10 may 8-9 in 8-9 all new\n"
                     "8-9 sees <10 may 9 in 8-9 new\n");
}
END_TEST

/* Made-up confidences: a refresh may commit far away. */
START_TEST(window_of_the_released_code_commits_anywhere_on_refresh) {
    run_options o = {.policy = "window",
                     .options = "active=2,external=3,refresh=4,semantics=released",
                     .prompt = 2,
                     .canvas = 8,
                     .seed = 3};
    /* W follows the commit of a refresh: the row that it committed (7, then 5) is seen and computed in the next pass,
     * and then not again; those of normal passes (2, 6) until the phase ends */
    assert_plans(&o, "0-9 sees <10 may 2-9 all\n"
                     "2-3,7 sees 0-4,7 may 2-3 in 2-7 new\n"
                     "2-4 sees 0-4,7 may 3-4 in 2-7\n"
                     "0-9 sees <10 may 3,5-6,8-9 all\n"
                     "3,5-6 sees <9 may 3,6 in 3-8 new\n"
                     "3,6,8 sees <9 may 3,8 in 3-8\n"
                     "0-9 sees <10 may 3,9 all\n"
                     "3,9 sees <10 may 9 in 3-9 new\n");
    o.left_to_right = true;
    assert_plans(&o, "0-9 sees <10 may 2-9 all\n"
                     "2-4 sees <6 may 3-4 in 2-5 new\n" /* 2 was committed by the refresh */
                     "3-5 sees <6 may 4-5 in 2-5\n"     /* and is left alone now */
                     "0-9 sees <10 may 5-9 all\n"       /* one mask left in W: a new phase */
                     "5-7 sees <9 may 6-7 in 5-8 new\n"
                     "6-8 sees <9 may 7-8 in 5-8\n"
                     "0-9 sees <10 may 8-9 all\n"
                     "8-9 sees <10 may 9 in 8-9 new\n");
    o.options = "active=2,external=8,refresh=4,semantics=released";
    assert_plans(&o, "0-9 sees <10 may 2-9 all\n"
                     "2-4 sees <10 may 3-4 in 2-9 new\n"
                     "3-5 sees <10 may 4-5 in 2-9\n"
                     "3-6 sees <10 may 5-6 in 2-9\n"
                     "0-9 sees <10 may 6-9 all\n"
                     "6-8 sees <10 may 7-8 in 6-9 new\n"
                     "7-9 sees <10 may 8-9 in 6-9\n"
                     "7-9 sees <10 may 9 in 6-9\n");
    o.options = "active=2,external=8,refresh=4"; /* the paper's: pruned, active masks only, 2 is kept up to date */
    assert_plans(&o, "0-9 sees <10 may 2-3 in 2-9 all new\n"
                     "2-4 sees <10 may 3-4 in 2-9 new\n"
                     "2-5 sees <10 may 4-5 in 2-9\n"
                     "2-6 sees <10 may 5-6 in 2-9\n"
                     "0-9 sees <10 may 6-7 in 6-9 all new\n"
                     "6-8 sees <10 may 7-8 in 6-9 new\n"
                     "6-9 sees <10 may 8-9 in 6-9\n"
                     "6-9 sees <10 may 9 in 6-9\n");
}
END_TEST

START_TEST(window_in_blocks_commits_in_the_block) {
    run_options o = {.policy = "window",
                     .options = "active=3,external=5,refresh=3",
                     .prompt = 1,
                     .canvas = 6,
                     .block = 2,
                     .left_to_right = true,
                     .shift = 1};
    assert_plans(&o, "0-5 sees <6 may 1-2 in 0-5 all new\n"
                     "1-4 sees <6 may 2 in 0-5\n"
                     "1-5 sees <6 may 3-4 in 0-5\n"
                     "0-6 sees <7 may 4 in 3-6 all new\n"
                     "4-6 sees <7 may 5-6 in 3-6 new\n"
                     "4-6 sees <7 may 6 in 3-6\n");
    /* block-causal: finished blocks are seen, rows of the block alone are computed */
    o.shift = 0;
    o.block_causal = true;
    o.block = 3;
    o.options = "active=1,external=2,refresh=8";
    assert_plans(&o, "1-2 sees <3 may 1 in 1-2 all new\n"
                     "1-2 sees <3 may 2 in 1-2 all\n"
                     "1-3 sees <4 may 3 in 3-3 all new\n" /* 3 was outside W */
                     "4-5 sees <6 may 4 in 4-5 all new\n"
                     "4-5 sees <6 may 5 in 4-5 all\n"
                     "4-6 sees <7 may 6 in 6-6 all new\n");
}
END_TEST

/* The last token of a block freezes with the keys of a mask. */
START_TEST(freecache_freezes_with_a_stale_tail) {
    run_options o = {
        .policy = "freecache", .prompt = 2, .canvas = 6, .block = 2, .left_to_right = true, .may_be_stale = true};
    assert_plans(&o, "0-7 sees <8 may 2-3 in 2-7 all new\n"
                     "2-7 sees <8 may 3 in 2-7 new\n"
                     "4-7 sees <8 may 4-5 in 4-7 new\n" /* 3 was a mask when its keys were written */
                     "4-7 sees <8 may 5 in 4-7\n"
                     "6-7 sees <8 may 6-7 in 6-7 new\n"
                     "6-7 sees <8 may 7 in 6-7\n");
    run_result r = run(&o);
    ck_assert_int_eq(r.num_stale, 2); /* 3 and 5 */
    ck_assert_int_eq(r.num_refreshes, 1);
    free(r.text);
    o.options = "settle=true";
    assert_plans(&o, "0-7 sees <8 may 2-3 in 2-7 all new\n"
                     "2-7 sees <8 may 3 in 2-7 new\n"
                     "3-7 sees <8 may 4-5 in 3-7 new\n"
                     "4-7 sees <8 may 5 in 4-7 new\n"
                     "5-7 sees <8 may 6-7 in 5-7 new\n"
                     "6-7 sees <8 may 7 in 6-7 new\n");
    o.may_be_stale = false;
    r = run(&o);
    ck_assert_int_eq(r.num_stale, 0);
    free(r.text);
    /* with Dream's shift the row before the block is computed, too: it predicts the block's first */
    o.options = NULL;
    o.shift = 1;
    o.may_be_stale = true;
    assert_plans(&o, "0-7 sees <8 may 2-3 in 1-7 all new\n"
                     "1-7 sees <8 may 3 in 1-7 new\n"
                     "3-7 sees <8 may 4-5 in 3-7 new\n"
                     "3-7 sees <8 may 5 in 3-7\n"
                     "5-7 sees <8 may 6-7 in 5-7 new\n"
                     "5-7 sees <8 may 7 in 5-7\n");
}
END_TEST

START_TEST(freecache_has_other_edges) {
    run_options o = {.policy = "freecache",
                     .options = "block=4",
                     .prompt = 2,
                     .canvas = 6,
                     .left_to_right = true,
                     .may_be_stale = true};
    assert_plans(&o, "0-7 sees <8 may 2-7 in 2-7 all new\n"
                     "2-7 sees <8 may 3-7 in 2-7 new\n"
                     "4-7 sees <8 may 4-7 in 4-7 new\n" /* absolute multiples of 4 */
                     "4-7 sees <8 may 5-7 in 4-7\n"
                     "4-7 sees <8 may 6-7 in 4-7\n"
                     "4-7 sees <8 may 7 in 4-7\n");
    o.options = "variant=aggressive";
    o.per_pass = 2;
    assert_plans(&o, "0-7 sees <8 may 2-7 in 1-7 all new\n"
                     "3-7 sees <8 may 4-7 in 3-7 new\n" /* 2 has the keys of a mask, 3 is computed once more */
                     "5-7 sees <8 may 6-7 in 5-7 new\n");
    o.options = "variant=sliding,left=1,right=3";
    assert_plans(&o, "0-7 sees <8 may 2-7 in 0-7 all new\n"
                     "2-5 sees <6 may 4-5 in 2-5 new\n"
                     "4-7 sees <8 may 6-7 in 4-7 new\n");
}
END_TEST

/* A token is computed once more in the pass after its commit, then cached. */
START_TEST(dkv_delays_by_one_pass) {
    run_options o = {.policy = "dkv", .options = "refresh=4", .prompt = 2, .canvas = 6, .left_to_right = true};
    assert_plans(&o, "0-7 sees <8 may 2-7 in 2-7 all new\n"
                     "0-7 sees <8 may 3-7 in 2-7 all new\n" /* the first two are full */
                     "3-7 sees <8 may 4-7 in 2-7 new\n"     /* 3 was committed by the pass before, 2 is cached */
                     "4-7 sees <8 may 5-7 in 2-7\n"
                     "0-7 sees <8 may 6-7 in 2-7 all new\n"
                     "6-7 sees <8 may 7 in 2-7 new\n");
    o.options = "first=0,refresh=100";
    o.block = 3; /* a block begins anew */
    assert_plans(&o, "0-7 sees <8 may 2-4 in 2-7 all new\n"
                     "2-7 sees <8 may 3-4 in 2-7 new\n"
                     "3-7 sees <8 may 4 in 2-7\n"
                     "0-7 sees <8 may 5-7 in 2-7 all new\n"
                     "5-7 sees <8 may 6-7 in 2-7 new\n"
                     "6-7 sees <8 may 7 in 2-7\n");
    o.options = "first=3,refresh=100";
    assert_plans(&o, "0-7 sees <8 may 2-4 in 2-7 all new\n"
                     "0-7 sees <8 may 3-4 in 2-7 all new\n"
                     "0-7 sees <8 may 4 in 2-7 all new\n"
                     "0-7 sees <8 may 5-7 in 2-7 all new\n" /* in every block */
                     "0-7 sees <8 may 6-7 in 2-7 all new\n"
                     "0-7 sees <8 may 7 in 2-7 all new\n");
    o.options = "variant=prefill";
    o.block = 0;
    o.per_pass = 2;
    assert_plans(&o, "0-7 sees <8 may 2-7 in 2-7 all new\n"
                     "2-7 sees <8 may 4-7 in 2-7 new\n"
                     "2-7 sees <8 may 6-7 in 2-7\n");
    o.options = "variant=pd,first=1,refresh=3";
    o.per_pass = 1;
    assert_plans(&o, "0-7 sees <8 may 2-7 in 2-7 all new\n"
                     "2-7 sees <8 may 3-7 in 2-7 new\n"
                     "3-7 sees <8 may 4-7 in 2-7\n"
                     "2-7 sees <8 may 5-7 in 2-7\n"
                     "5-7 sees <8 may 6-7 in 2-7\n"
                     "6-7 sees <8 may 7 in 2-7\n");
    o.options = NULL;
    o.block = 3;
    o.block_causal = true;
    o.prompt = 3;
    assert_plans(&o, "3-5 sees <6 may 3-5 in 3-5 all new\n"
                     "3-5 sees <6 may 4-5 in 3-5 all\n"
                     "4-5 sees <6 may 5 in 3-5\n"
                     "6-8 sees <9 may 6-8 in 6-8 all new\n"
                     "6-8 sees <9 may 7-8 in 6-8 all\n"
                     "7-8 sees <9 may 8 in 6-8\n");
}
END_TEST

START_TEST(dkv_greedy_follows_an_order) {
    run_options o = {.policy = "dkv",
                     .options = "variant=greedy,refresh=3,window=2",
                     .prompt = 2,
                     .canvas = 8,
                     .left_to_right = true,
                     .random = true};
    assert_plans(&o,
                 "0-9 sees <10 may 2 in 2-9 all new\n"
                 "1-3 sees <10 may 3 in 2-9 new\n" /* next 3; committed 2, and 1-3 around it: a prompt row is written */
                 "2-4 sees <10 may 4 in 2-9 new\n"
                 "0-9 sees <10 may 5 in 2-9 all new\n"
                 "4-6 sees <10 may 6 in 2-9 new\n"
                 "5-7 sees <10 may 7 in 2-9\n"
                 "0-9 sees <10 may 8 in 2-9 all new\n"
                 "7-9 sees <10 may 9 in 2-9 new\n");
    o.options = "variant=greedy,refresh=100,window=1"; /* odd widths reach further back */
    o.canvas = 3;
    assert_plans(&o, "0-4 sees <5 may 2 in 2-4 all new\n"
                     "1-3 sees <5 may 3 in 2-4 new\n"
                     "2-4 sees <5 may 4 in 2-4 new\n");
    o.canvas = 8;
    o.options = "variant=greedy,refresh=100,window=3,centre=next,count=2";
    o.per_pass = 2;
    assert_plans(&o, "0-9 sees <10 may 2-3 in 2-9 all new\n"
                     "2-6 sees <10 may 4-5 in 2-9 new\n" /* 4: 2-5, 5: 3-6, and 2, 3 themselves */
                     "4-8 sees <10 may 6-7 in 2-9\n"
                     "6-9 sees <10 may 8-9 in 2-9\n");
}
END_TEST

/* (k - 1) mod K of the released code, which counts passes from 1. */
START_TEST(dllm_cache_refreshes_prompt_and_response) {
    run_options o = {.policy = "dllm-cache",
                     .options = "prompt=4,response=3,ratio=0.5,full_layers=2",
                     .prompt = 2,
                     .canvas = 6,
                     .left_to_right = true};
    assert_plans(&o, "0-7 sees <8 may 2-7 all verify 0.5 2-7 full 2 store\n"
                     "2-7 sees <8 may 3-7 verify 0.5 2-7 full 2\n"
                     "2-7 sees <8 may 4-7 verify 0.5 2-7 full 2\n"
                     "2-7 sees <8 may 5-7 verify 0.5 2-7 full 2 store\n"
                     "0-7 sees <8 may 6-7 verify 0.5 2-7 full 2\n" /* prompt rows fully, response rows by V-verify */
                     "2-7 sees <8 may 7 verify 0.5 2-7 full 2\n");
    o.options = NULL;
    o.block = 3;
    o.cut_step = 1;
    o.cut_to = 6;
    assert_plans(&o, "0-7 sees <8 may 2-4 all verify 0.25 2-7 full 1 store\n"
                     "2-5 sees <6 may 3-4 verify 0.25 2-5 full 1\n"
                     "2-5 sees <6 may 4 verify 0.25 2-5 full 1\n"
                     "2-5 sees <6 may 5 verify 0.25 2-5 full 1\n");
}
END_TEST

START_TEST(elastic_computes_window_tracked_and_new) {
    /* the plan after a pass whose layers reported rows: those, what the pass committed, the first masks */
    rf_error err = {0};
    rf_policy *p = NULL;
    rf_assert_ok(rf_policy_create(&p, "elastic", &err), err);
    rf_assert_ok(rf_policy_set(p, "window=3,axis=heads", &err), err);
    int32_t tokens[12] = {0}, commit_step[12], tracked[4] = {-1, -1, -1, -1};
    int32_t rows[13], visible[13], candidates[13], window[13], committed[1] = {9};
    uint8_t masked[12];
    for (int i = 0; i < 12; i++) {
        masked[i] = i >= 4;
        commit_step[i] = i >= 4 ? RF_COMMIT_NEVER : RF_COMMIT_PROMPT;
    }
    rf_row_shape shape = {.prompt = 4, .length = 12, .block = 8, .num_layers = 4};
    rf_row_state seq = {.shape = &shape,
                        .length = 12,
                        .tokens = tokens,
                        .masked = masked,
                        .commit_step = commit_step,
                        .block_begin = 4,
                        .block_end = 12,
                        .tracked = tracked,
                        .expanded_at = -1};
    rf_row_plan plan = {.rows = rows, .visible = visible, .candidates = candidates, .drift = {.window = window}};
    void *state = take(rf_row_policy_state_bytes(p, &shape), 1);
    run_result r = {0};
    rf_policy_get_def(p)->rows->plan(p, state, &seq, &plan);
    put_plan(&r, &plan);
    masked[9] = 0; /* committed outside the window: by nobody here, but a loop may fill */
    commit_step[9] = 0;
    seq.step = seq.block_step = 1;
    seq.committed = committed;
    seq.num_committed = 1;
    tracked[0] = 2;
    tracked[1] = 0;
    tracked[3] = 2;
    rf_policy_get_def(p)->rows->plan(p, state, &seq, &plan);
    put_plan(&r, &plan);
    masked[5] = 0;
    commit_step[5] = 1;
    seq.step = 2;
    seq.length = seq.block_end = 10; /* cut; a tracked row is gone */
    tracked[0] = 11;
    tracked[1] = -1;
    rf_policy_get_def(p)->rows->plan(p, state, &seq, &plan);
    put_plan(&r, &plan);
    ck_assert_str_eq(r.text, "0-11 sees <12 may 4-6 all drift 0.9 heads window 4-6\n"
                             "0,2,4-6,9 sees <12 may 4-6 drift 0.9 heads window 4-6\n"
                             "2,4-7 sees <10 may 4,6-7 drift 0.9 heads window 4,6-7\n");
    ck_assert(rf_policy_get_def(p)->rows->needs_inputs);
    free(r.text);
    free(state);
    rf_policy_destroy(p);
    run_options o = {.policy = "elastic",
                     .options = "window=3,expand=2,far=false",
                     .prompt = 1,
                     .canvas = 5,
                     .block = 2,
                     .left_to_right = true,
                     .num_layers = 1,
                     .seed = 5};
    run_result all = run(&o);
    const char *want = "0-5 sees <6 may 1-2 all drift 0.9 window 1-3 from 2\n" /* 3 is of the next block */
                       "0-5 sees <6 may 2 all drift 0.9 window 2-4 from 2\n";
    ck_assert_msg(strncmp(all.text, want, strlen(want)) == 0, "%s", all.text);
    free(all.text);
}
END_TEST

/* ---- row-passes in closed form, one token a pass, left to right ---- */

static int64_t rows_of(const char *policy, const char *options, int32_t prompt, int32_t canvas, int32_t block) {
    run_options o = {.policy = policy,
                     .options = options,
                     .prompt = prompt,
                     .canvas = canvas,
                     .block = block,
                     .left_to_right = true,
                     .may_be_stale = strcmp(policy, "freecache") == 0,
                     .random = true,
                     .num_layers = 1};
    run_result r = run(&o);
    ck_assert_int_eq(r.num_passes, canvas);
    free(r.text);
    return r.row_passes;
}

START_TEST(row_passes_are_as_counted) {
    static const int32_t sizes[][3] = {{16, 64, 8}, {5, 48, 16}, {0, 30, 30}, {100, 32, 1}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int32_t p = sizes[i][0], g = sizes[i][1], b = sizes[i][2];
        int64_t l = p + g, blocks = g / b, want = 0;
        ck_assert_int_eq(rows_of("none", NULL, p, g, b), g * l);
        ck_assert_int_eq(rows_of("dual", NULL, p, g, b), blocks * l + (g - blocks) * b);
        for (int64_t k = 0; k < blocks; k++) want += l + (b - 1) * (g - k * b);
        ck_assert_int_eq(rows_of("prefix", NULL, p, g, b), want);
        want = p;
        for (int64_t k = 0; k < blocks; k++) want += b * (g - k * b);
        ck_assert_int_eq(rows_of("freecache", NULL, p, g, b), want);
        ck_assert_int_eq(rows_of("vicinity", "back=0,ahead=0,warmup=1", p, g, b), blocks * l + (g - blocks) * b);
        /* dkv in one block, full every 8 passes and in the first two; else masks and the last token */
        want = 0;
        for (int64_t t = 0; t < g; t++) want += t < 2 || t % 8 == 0 ? l : g - t + 1;
        ck_assert_int_eq(rows_of("dkv", NULL, p, g, 0), want);
        ck_assert_int_eq(rows_of("dkv", "variant=prefill", p, g, 0), l + (int64_t)(g - 1) * g);
        /* greedy, no window: next and last; full every second pass */
        ck_assert_int_eq(rows_of("dkv", "variant=greedy,window=0", p, g, 0), (g + 1) / 2 * l + g / 2 * 2);
        ck_assert_int_eq(rows_of("dllm-cache", "prompt=10,response=3", p, g, b),
                         (g + 9) / 10 * (int64_t)p + (int64_t)g * g);
        /* window in one block, everything seen: 4 active masks and what the phase of 16 has decoded */
        want = 0;
        for (int64_t t = 0; t < g; t++) want += t % 16 == 0 ? l : (g - t < 4 ? g - t : 4) + t % 16;
        ck_assert_int_eq(rows_of("window", "active=4,external=1000,refresh=16", p, g, 0), want);
        /* and nothing kept up to date: the masks and the last token */
        want = 0;
        for (int64_t t = 0; t < g; t++) want += t % 16 == 0 ? l : (g - t < 4 ? g - t : 4) + 1;
        ck_assert_int_eq(rows_of("window", "active=4,external=1000,refresh=16,transient=false", p, g, 0), want);
        /* pruned: a refresh sees what is decoded and 20 masks */
        want = 0;
        for (int64_t t = 0; t < g; t++) {
            int64_t masks = g - t;
            want += t % 16 == 0 ? p + t + (masks < 20 ? masks : 20) : (masks < 4 ? masks : 4) + t % 16;
        }
        ck_assert_int_eq(rows_of("window", "active=4,external=20,refresh=16", p, g, 0), want);
    }
    /* elastic: 4 masks, the last token, and the row tracked in the one layer if it is another */
    run_options o = {
        .policy = "elastic", .options = "window=4", .prompt = 8, .canvas = 40, .left_to_right = true, .num_layers = 1};
    run_result r = run(&o);
    int64_t least = 48, most = 48;
    for (int t = 1; t < 40; t++) {
        least += (40 - t < 4 ? 40 - t : 4) + 1;
        most += (40 - t < 4 ? 40 - t : 4) + 2;
    }
    ck_assert_int_gt(r.row_passes, least);
    ck_assert_int_le(r.row_passes, most);
    free(r.text);
}
END_TEST

/* ---- what needs no model: refreshed each pass, a policy is none (9.6 of the survey) ---- */

START_TEST(refreshed_every_pass_a_policy_is_none) {
    static const char *const full[][2] = {{"prefix", "refresh=1"},
                                          {"dual", "refresh=1"},
                                          {"vicinity", "refresh=1"},
                                          {"vicinity", "warmup=1000"},
                                          {"vicinity", "back=1000,ahead=1000"},
                                          {"window", "active=1000,external=1000,refresh=1"},
                                          {"window", "active=1000,external=1000,refresh=1,semantics=released"},
                                          {"window", "active=1000,external=1000,refresh=1,transient=false"},
                                          {"dkv", "refresh=1"},
                                          {"dkv", "first=1000"},
                                          {"dllm-cache", "prompt=1,response=1"},
                                          {"elastic", "expand=0,window=1000"}};
    for (size_t i = 0; i < sizeof full / sizeof full[0]; i++) {
        for (uint32_t seed = 0; seed < 12; seed++) {
            run_options o = {.policy = full[i][0],
                             .options = full[i][1],
                             .prompt = (int32_t)(seed % 5) * 3,
                             .canvas = 24,
                             .block = seed % 3 == 0 ? 0 : 8,
                             .per_pass = seed % 2 ? -1 : 1,
                             .shift = seed % 4 == 1,
                             .seed = seed,
                             .cut_step = seed % 5 == 2 ? 4 : 0,
                             .cut_to = 24};
            run_result got = run(&o);
            o.policy = "none";
            o.options = NULL;
            run_result want = run(&o);
            ck_assert_int_eq(got.num_passes, want.num_passes);
            ck_assert_int_eq(got.row_passes, want.row_passes);
            ck_assert_int_eq(got.num_refreshes, got.num_passes);
            /* the same rows, seen and candidates, line by line; what follows is the policy's own */
            for (const char *a = got.text, *b = want.text; *b; a = strchr(a, '\n') + 1, b = strchr(b, '\n') + 1) {
                size_t len = (size_t)(strstr(b, " all") - b);
                ck_assert_msg(strncmp(a, b, len) == 0 && (a[len] == ' '), "%s %s plans\n%sand not\n%s", full[i][0],
                              full[i][1], a, b);
            }
            free(got.text);
            free(want.text);
        }
    }
}
END_TEST

/* L_in = L_ex = G: within a phase only rows decoded before it are stale, so all others are computed every pass. */
START_TEST(a_window_over_everything_leaves_only_old_rows) {
    run_options o = {
        .policy = "window", .options = "active=64,external=64,refresh=8", .prompt = 6, .canvas = 32, .seed = 4};
    run_result r = run(&o);
    int64_t want = 0;
    for (int t = 0; t < 32; t++) want += t % 8 == 0 ? 38 : 32 - (t - t % 8);
    ck_assert_int_eq(r.row_passes, want);
    free(r.text);
}
END_TEST

/* ---- options ---- */

/* Every option of every policy is in this list, with a run that it changes. */
START_TEST(every_option_changes_the_plans) {
    static const struct {
        const char *policy, *option, *base, *changed;
    } cases[] = {
        {"prefix", "refresh", "", "refresh=3"},
        {"prefix", "horizon", "", "horizon=4"},
        {"dual", "refresh", "", "refresh=3"},
        {"dual", "horizon", "", "horizon=4"},
        {"vicinity", "back", "", "back=1"},
        {"vicinity", "ahead", "", "ahead=1"},
        {"vicinity", "refresh", "", "refresh=3"},
        {"vicinity", "warmup", "", "warmup=2"},
        {"window", "active", "", "active=2"},
        {"window", "external", "", "external=20"},
        {"window", "refresh", "", "refresh=5"},
        {"window", "transient", "", "transient=false"},
        {"window", "semantics", "", "semantics=released"},
        {"freecache", "variant", "", "variant=aggressive"},
        {"freecache", "variant", "", "variant=sliding"},
        {"freecache", "block", "", "block=3"},
        {"freecache", "left", "variant=sliding,left=3,right=9", "variant=sliding,left=4,right=9"},
        {"freecache", "right", "variant=sliding,left=3,right=9", "variant=sliding,left=3,right=8"},
        {"freecache", "settle", "", "settle=true"},
        {"dkv", "variant", "", "variant=prefill"},
        {"dkv", "variant", "", "variant=pd"},
        {"dkv", "variant", "", "variant=greedy"},
        {"dkv", "refresh", "", "refresh=3"},
        {"dkv", "first", "", "first=1"},
        {"dkv", "window", "variant=greedy", "variant=greedy,window=2"},
        {"dkv", "centre", "variant=greedy", "variant=greedy,centre=next"},
        {"dkv", "count", "variant=greedy", "variant=greedy,count=2"},
        {"dllm-cache", "prompt", "", "prompt=5"},
        {"dllm-cache", "response", "", "response=3"},
        {"dllm-cache", "ratio", "", "ratio=0.5"},
        {"dllm-cache", "full_layers", "", "full_layers=0"},
        {"elastic", "threshold", "", "threshold=0.8"},
        {"elastic", "window", "", "window=3"},
        {"elastic", "axis", "", "axis=heads"},
        {"elastic", "expand", "", "expand=2"},
        {"elastic", "far", "", "far=false"},
    };
    enum { NUM_CASES = sizeof cases / sizeof cases[0] };
    for (int i = 0; i < NUM_CASES; i++) {
        run_options o = {.policy = cases[i].policy,
                         .options = cases[i].base,
                         .prompt = 40,
                         .canvas = 80,
                         .block = 8,
                         .per_pass = -1,
                         .random = true,
                         .seed = 11,
                         .may_be_stale = strcmp(cases[i].policy, "freecache") == 0};
        run_result base = run(&o), again = run(&o);
        o.options = cases[i].changed;
        run_result changed = run(&o);
        ck_assert_str_eq(base.text, again.text);
        ck_assert_msg(strcmp(base.text, changed.text) != 0, "%s: %s changes nothing", cases[i].policy,
                      cases[i].changed);
        free(base.text);
        free(again.text);
        free(changed.text);
    }
    for (int i = 0; i < rf_row_policy_count(); i++) {
        const rf_policy_def *def = rf_row_policy_at(i);
        for (int k = 0; k < def->num_options; k++) {
            bool there = false;
            for (int j = 0; j < NUM_CASES; j++) {
                there |= strcmp(cases[j].policy, def->name) == 0 && strcmp(cases[j].option, def->options[k].name) == 0;
            }
            ck_assert_msg(there, "%s: %s is not tried", def->name, def->options[k].name);
        }
    }
}
END_TEST

/* ---- what every plan keeps to ---- */

/* A plan that breaks the rules is mended: all rows. */
START_TEST(plans_without_candidates_or_with_unknown_rows_become_full) {
    int32_t tokens[8] = {0}, commit_step[8] = {0}, rows[9], visible[9], candidates[9], window[9];
    uint8_t masked[8] = {0, 0, 0, 1, 0, 0, 1, 1}, written[8] = {0};
    rf_row_shape shape = {.prompt = 2, .length = 8, .block = 3};
    rf_row_state seq = {.shape = &shape,
                        .length = 8,
                        .tokens = tokens,
                        .masked = masked,
                        .commit_step = commit_step,
                        .block_index = 0,
                        .block_begin = 2,
                        .block_end = 5};
    rf_row_plan plan = {.rows = rows, .visible = visible, .candidates = candidates, .drift = {.window = window}};
    rf_row_memory memory = {0};
    run_result r = {0};
    for (int i = 0; i < 6; i++) { /* 0: fine; 1: sees a row never written; 2-5: no candidates */
        rf_rows_begin(&seq, &plan);
        rf_rows_range(&plan, 2, 4);
        if (i == 2) masked[3] = 0; /* none in the block: any */
        if (i < 2) rf_rows_candidates(&seq, &plan, 2, 5);
        plan.visible_end = i == 0 ? 4 : 6;
        if (i == 0) memset(written, 1, 2);
        if (i == 3) masked[2] = 1;
        if (i == 4) plan.layers = RF_LAYERS_VERIFY;
        if (i == 5) shape.block_causal = true;
        rf_rows_finish(&memory, written, &seq, &plan);
        put_plan(&r, &plan);
        ck_assert_int_eq(memory.passes, i + 1);
    }
    ck_assert_str_eq(r.text, "2-3 sees <4 may 3\n"
                             "0-7 sees <8 may 3 all\n"
                             "0-7 sees <8 may 6-7 all\n"
                             "0-7 sees <8 may 2 all\n"
                             "0-7 sees <8 may 2 all verify 0 0--1 full 0 store\n"
                             "2-4 sees <5 may 2 all\n");
    free(r.text);
}
END_TEST

/* As many external rows as before, but others. */
START_TEST(other_external_rows_are_noticed) {
    int32_t tokens[8] = {0}, commit_step[8] = {0}, rows[9], visible[9], candidates[9], window[9];
    uint8_t masked[8] = {0, 0, 0, 0, 1, 1, 0, 0}, written[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    static const uint8_t seen[3][8] = {{1, 0, 1, 0, 1, 1}, {1, 0, 1, 0, 1, 1}, {0, 1, 1, 0, 1, 1}};
    rf_row_shape shape = {.prompt = 4, .length = 8, .block = 4};
    rf_row_state seq = {.shape = &shape,
                        .length = 8,
                        .tokens = tokens,
                        .masked = masked,
                        .commit_step = commit_step,
                        .block_begin = 4,
                        .block_end = 8};
    rf_row_plan plan = {.rows = rows, .visible = visible, .candidates = candidates, .drift = {.window = window}};
    rf_row_memory memory = {0};
    static const bool changed[3] = {true, false, true};
    for (int i = 0; i < 3; i++) {
        rf_rows_begin(&seq, &plan);
        rf_rows_range(&plan, 4, 6);
        rf_rows_candidates(&seq, &plan, 4, 8);
        rf_rows_see(&plan, seen[i], 8);
        rf_rows_inside(&seq, &plan, 4, 8);
        rf_rows_finish(&memory, written, &seq, &plan);
        ck_assert_int_eq(plan.outside_changed, changed[i]);
        ck_assert_int_eq(plan.num_visible, 4);
    }
}
END_TEST

START_TEST(lists_are_kept_in_order) {
    int32_t rows[9], visible[9];
    rf_row_plan plan = {.rows = rows, .visible = visible};
    static const int32_t add[] = {4, 1, 7, 4, 0, 1, 7, 5};
    for (size_t i = 0; i < sizeof add / sizeof add[0]; i++) rf_rows_add(&plan, add[i]);
    run_result r = {0};
    put_rows(&r, plan.rows, plan.num_rows);
    ck_assert_str_eq(r.text, "0-1,4-5,7");
    free(r.text);
    static const uint8_t none[8] = {0}, prefix[8] = {1, 1, 1}, holes[8] = {1, 0, 1, 0, 0, 1};
    rf_rows_see(&plan, none, 8);
    ck_assert(plan.num_visible == 0 && plan.visible_end == 0);
    rf_rows_see(&plan, prefix, 8);
    ck_assert(plan.num_visible == 0 && plan.visible_end == 3);
    rf_rows_see(&plan, holes, 8);
    ck_assert(plan.num_visible == 3 && plan.visible[0] == 0 && plan.visible[1] == 2 && plan.visible[2] == 5);
    rf_rows_see(&plan, holes, 5);
    ck_assert(plan.num_visible == 2);
}
END_TEST

/* An option's value: often small, so that runs of this size notice. */
static void random_value(const rf_policy_option *o, uint32_t dice, char *text, size_t bytes) {
    double low = o->min, high = o->max;
    switch (o->type) {
    case RF_OPTION_INT:
        if (dice % 8) high = low + 20 < high ? low + 20 : high;
        snprintf(text, bytes, "%.0f", low + floor((dice >> 8) / 16777216.0 * (high - low)));
        return;
    case RF_OPTION_DOUBLE: snprintf(text, bytes, "%.17g", low + (dice >> 8) / 16777216.0 * (high - low)); return;
    case RF_OPTION_BOOL: snprintf(text, bytes, "%s", dice & 256 ? "true" : "false"); return;
    default: break;
    }
    int count = 1, pick;
    for (const char *c = o->choices; *c; c++) count += *c == ' ';
    pick = (int)((dice >> 8) % (uint32_t)count);
    const char *w = o->choices;
    for (; pick > 0; pick--) w = strchr(w, ' ') + 1;
    snprintf(text, bytes, "%.*s", (int)strcspn(w, " "), w);
}

/* Any options, any shape, any commit rule: runs end, and no plan breaks a rule. */
START_TEST(any_run_keeps_to_the_rules) {
    const rf_policy_def *def = rf_row_policy_at(_i);
    for (int32_t round = 0; round < 400; round++) {
        char options[512] = "";
        uint32_t seed = (uint32_t)round + 1000u * (uint32_t)_i;
        for (int k = 0; k < def->num_options; k++) {
            uint32_t dice = noise(seed, k, 1);
            char value[64];
            if (dice % 3 == 0) continue;
            random_value(&def->options[k], dice, value, sizeof value);
            size_t used = strlen(options);
            snprintf(options + used, sizeof options - used, "%s%s=%s", used ? "," : "", def->options[k].name, value);
        }
        uint32_t d[12];
        for (int k = 0; k < 12; k++) d[k] = noise(seed, k, 2) >> 8;
        run_options o = {.policy = def->name,
                         .options = options,
                         .prompt = (int32_t)(d[0] % 40),
                         .canvas = 1 + (int32_t)(d[1] % 60),
                         .per_pass = (int32_t)(d[2] % 5) - 1,
                         .left_to_right = d[3] % 3 == 0,
                         .shift = d[4] % 2,
                         .block_causal = d[5] % 4 == 0,
                         .random = d[6] % 2,
                         .force = d[7] % 2,
                         .seed = seed,
                         .may_be_stale = strcmp(def->name, "freecache") == 0};
        o.block = d[8] % 3 == 0 ? 0 : 1 + (int32_t)(d[8] % (uint32_t)o.canvas);
        if (d[9] % 3 == 0) {
            o.cut_step = 1 + (int32_t)(d[9] % 7);
            o.cut_to = o.prompt + 1 + (int32_t)(d[10] % (uint32_t)o.canvas);
        }
        if (d[11] % 4 == 0) {
            o.fill_step = 1 + (int32_t)(d[11] % 7);
            o.may_be_stale = true;
        }
        if (o.block_causal) { /* blocks are aligned with position 0, and predict themselves */
            o.shift = 0;
            o.cut_step = 0;
        }
        rf_error err = {0};
        run_result r;
        rf_status st = try_run(&r, &o, &err);
        if (st == RF_OK) free(r.text);
        ck_assert_msg(st == RF_OK || st == RF_ERR_UNSUPPORTED, "%s %s: %s", def->name, options, err.message);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("row policies");
    TCase *tc = tcase_create("all");
    tcase_add_test(tc, row_policies_are_listed_and_found);
    tcase_add_test(tc, a_wrong_name_is_answered_with_both_lists);
    tcase_add_test(tc, families_refuse_each_other);
    tcase_add_test(tc, misfits_are_refused_by_name);
    tcase_add_test(tc, prefix_computes_from_the_block_on);
    tcase_add_test(tc, dual_computes_the_block);
    tcase_add_test(tc, vicinity_computes_around_the_block);
    tcase_add_test(tc, window_has_phases);
    tcase_add_test(tc, window_of_the_released_code_commits_anywhere_on_refresh);
    tcase_add_test(tc, window_in_blocks_commits_in_the_block);
    tcase_add_test(tc, freecache_freezes_with_a_stale_tail);
    tcase_add_test(tc, freecache_has_other_edges);
    tcase_add_test(tc, dkv_delays_by_one_pass);
    tcase_add_test(tc, dkv_greedy_follows_an_order);
    tcase_add_test(tc, dllm_cache_refreshes_prompt_and_response);
    tcase_add_test(tc, elastic_computes_window_tracked_and_new);
    tcase_add_test(tc, row_passes_are_as_counted);
    tcase_add_test(tc, refreshed_every_pass_a_policy_is_none);
    tcase_add_test(tc, a_window_over_everything_leaves_only_old_rows);
    tcase_add_test(tc, every_option_changes_the_plans);
    tcase_add_test(tc, plans_without_candidates_or_with_unknown_rows_become_full);
    tcase_add_test(tc, other_external_rows_are_noticed);
    tcase_add_test(tc, lists_are_kept_in_order);
    tcase_add_loop_test(tc, any_run_keeps_to_the_rules, 0, rf_row_policy_count());
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
