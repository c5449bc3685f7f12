/* tests/caching/test_runtime.c - the runtime itself, on the host, without a model: a made-up denoiser of blocks SELF MLP TEMPORAL MLP runs
 * plans through caching/cache.h as an executor does, and beside it plain arrays do what the same plans say. Frame after frame,
 * so that what is carried from run to run is seen too. Values agree to rounding; decisions that must not differ are compared
 * as they are. */
#include "caching/cache_internal.h"
#include "caching/trace.h"
#include "core/memory.h"
#include "tests/test_util.h"

enum { BATCH = 2, TOKENS = 12, WIDTH = 8, COLS = 4, BLOCKS = 3, PARTS = 4, SITES = BLOCKS * PARTS, MAX_STEPS = 20 };
enum { ROWS = BATCH * TOKENS, HIDDEN = TOKENS * WIDTH, OUTPUT = TOKENS * COLS, MAX_HISTORY = 8 };

static const uint8_t kinds[SITES] = {RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP};

/* --- the denoiser ------------------------------------------------------------------------------------------------- */

/* The noisy input of a frame: noise of the frame's own that fades, a picture that changes little from frame to frame. */
static float input_at(int frame, int step, int num_steps, int image, int i, float liveliness) {
    float left = 1 - (float)step / (float)num_steps, pace = image == 0 ? 1 : liveliness;
    return left * sinf((float)(frame * 31 + image * 7 + i)) +
           (1 - left) * cosf(0.9f * (float)i + 0.03f * pace * (float)frame + pace * (float)step * 0.02f);
}

/* One row of a part that needs no other rows. */
static void row_part(int site, int step, const float *x, float *y) {
    for (int d = 0; d < WIDTH; d++)
        y[d] = kinds[site] == RF_CACHE_MLP ? 0.3f * sinf(1.3f * x[d] + 0.2f * (float)site + 0.05f * (float)step)
                                           : 0.2f * cosf(0.7f * x[d] - 0.1f * (float)site);
}

/* Attention: all keys alike. keys [TOKENS] rows, ld apart. */
static void attend(const float *keys, int ld, const float *x, float *y) {
    for (int d = 0; d < WIDTH; d++) {
        float mean = 0;
        for (int r = 0; r < TOKENS; r++) mean += keys[r * ld + d] / TOKENS;
        y[d] = 0.4f * mean + 0.1f * x[d];
    }
}

static void embed(const float *in, float *x) {
    for (int r = 0; r < TOKENS; r++)
        for (int d = 0; d < WIDTH; d++) x[r * WIDTH + d] = in[r * COLS + d % COLS] * (1 + 0.1f * (float)d);
}

static void head(const float *x, float *out) {
    for (int r = 0; r < TOKENS; r++)
        for (int c = 0; c < COLS; c++) out[r * COLS + c] = 0.5f * x[r * WIDTH + c] - 0.25f * x[r * WIDTH + c + COLS];
}

/* --- what the plans mean -------------------------------------------------------------------------------------------- */

typedef struct {
    float output[OUTPUT], spans[RF_CACHE_MAX_SPANS][HIDDEN], parts[SITES][HIDDEN];
    int step;
} snapshot;

/* One image; snapshots newest first. */
typedef struct {
    snapshot history[MAX_HISTORY], first;
    int num, num_full; /* of this run */
    bool has_first;
    float keys[BLOCKS][HIDDEN], out[OUTPUT];
} shadow;

/* --- a session ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *policy, *options;
    int num_steps; /* 0 = 10 */
    rf_cache_carry carry;
    double max_drift;
    float scale;      /* of outputs; 0 = 1 */
    float liveliness; /* how much more the second image moves; 0 = 1 */
    int num_streams;
    const rf_cache_stream *streams;
    bool force;
} setting;

typedef struct {
    setting set;
    rf_backend *backend;
    rf_stream *stream;
    rf_policy *policy;
    rf_cache *cache;
    shadow *shadows; /* [BATCH] */
    float in[BATCH][OUTPUT], out[BATCH * OUTPUT], scratch[BATCH * OUTPUT];
    float x[BATCH * HIDDEN], y[BATCH * HIDDEN], qkv[BATCH * HIDDEN * 3];
    int frame, step;
    char kinds[BATCH][MAX_STEPS + 1];
    double statistics[BATCH][MAX_STEPS];
    bool forced[BATCH][MAX_STEPS];
    int num_rows_checked;
} session;

static rf_status session_try(session *s, const setting *set, rf_error *err) {
    *s = (session){.set = *set};
    if (s->set.num_steps == 0) s->set.num_steps = 10;
    if (s->set.scale == 0) s->set.scale = 1;
    if (s->set.liveliness == 0) s->set.liveliness = 1;
    float timesteps[MAX_STEPS], changes[MAX_STEPS];
    for (int i = 0; i < s->set.num_steps; i++) {
        timesteps[i] = 1000 - 1000 * (float)i / (float)s->set.num_steps;
        changes[i] = i ? 0.1f : 0;
    }
    rf_assert_ok(rf_backend_open(&s->backend, "cpu", 1, err), *err);
    rf_assert_ok(rf_stream_create(&s->stream, s->backend, err), *err);
    rf_assert_ok(rf_policy_create(&s->policy, set->policy, err), *err);
    rf_assert_ok(rf_policy_set(s->policy, set->options, err), *err);
    s->shadows = calloc(BATCH, sizeof *s->shadows);
    ck_assert_ptr_nonnull(s->shadows);
    rf_cache_shape shape = {.model = "made-up",
                            .num_steps = s->set.num_steps,
                            .timesteps = timesteps,
                            .temb_change = changes,
                            .sampler = "ddim",
                            .force = set->force,
                            .batch = BATCH,
                            .branches = 1,
                            .tokens = TOKENS,
                            .frames = 1,
                            .grid_h = 3,
                            .grid_w = 4,
                            .width = WIDTH,
                            .in_cols = COLS,
                            .out_cols = COLS,
                            .pred_cols = COLS,
                            .num_blocks = BLOCKS,
                            .num_parts = PARTS,
                            .part_kinds = kinds,
                            .num_streams = set->num_streams,
                            .streams = set->streams};
    rf_cache_dtypes dtypes = {.num_heads = 2, .head_dim = WIDTH / 2, .softmax_scale = 0.5f};
    rf_cache_options options = {.carry = set->carry, .max_drift = set->max_drift, .record = true};
    return rf_cache_create(&s->cache, s->policy, &shape, &dtypes, &options, s->stream, err);
}

static session *session_open(setting set) {
    session *s = malloc(sizeof *s);
    rf_error err = {0};
    ck_assert_ptr_nonnull(s);
    rf_assert_ok(session_try(s, &set, &err), err);
    return s;
}

static void session_release(session *s) {
    rf_cache_destroy(s->cache);
    rf_policy_destroy(s->policy);
    rf_stream_destroy(s->stream);
    rf_backend_close(s->backend);
    free(s->shadows);
}

static void session_close(session *s) {
    session_release(s);
    free(s);
}

/* --- running a plan, twice ----------------------------------------------------------------------------------------------- */

#define OK(call) rf_assert_ok(call, err)

static int image_of(const rf_cache_group *g, int packed) {
    return g->identity ? packed : g->index[packed]; /* one branch: groups are images; the host's pointers can be read */
}

/* sum_j w_j Y_j of a row's class, Y_j at an offset of every snapshot. */
static float predict(const session *s, int image, const rf_step_plan *plan, size_t offset, int cell) {
    const shadow *sh = &s->shadows[image];
    int class = 0;
    if (s->cache->num_classes > 1) class = s->cache->d.row_class[image * TOKENS * s->cache->class_cells + cell];
    float sum = 0;
    for (int j = 0; j < plan->num_terms; j++)
        sum += plan->weights[class][j] * *(const float *)(const void *)((const char *)&sh->history[j] + offset);
    return sum;
}

/* A part, by the plan, of one image: y of all rows as it is to be added. chosen: of DO_ROWS. */
static void shadow_part(session *s, int image, const rf_step_plan *plan, int site, const float *x, const bool *chosen,
                        snapshot *now, float *y) {
    shadow *sh = &s->shadows[image];
    rf_part_do act = plan->kind == RF_STEP_FULL ? RF_DO_COMPUTE : (rf_part_do)plan->parts[site];
    float *keys = sh->keys[site / PARTS];
    for (int r = 0; r < TOKENS; r++)
        if (kinds[site] == RF_CACHE_SELF && (act == RF_DO_COMPUTE || (act == RF_DO_ROWS && chosen[r])))
            memcpy(keys + r * WIDTH, x + r * WIDTH, WIDTH * sizeof(float));
    for (int r = 0; r < TOKENS; r++) {
        float *to = y + r * WIDTH;
        if (act == RF_DO_COMPUTE || (act == RF_DO_ROWS && chosen[r])) {
            if (kinds[site] == RF_CACHE_SELF)
                attend(keys, WIDTH, x + r * WIDTH, to);
            else
                row_part(site, s->step, x + r * WIDTH, to);
        } else if (act == RF_DO_ROWS) {
            memcpy(to, &sh->history[0].parts[site][r * WIDTH], WIDTH * sizeof(float));
        } else {
            for (int d = 0; d < WIDTH; d++) {
                int at = r * WIDTH + d;
                to[d] = predict(s, image, plan,
                                offsetof(snapshot, parts) + sizeof(float) * (size_t)(site * HIDDEN + at), 0);
            }
        }
    }
    memcpy(now->parts[site], y, sizeof now->parts[site]);
    /* what a partial step computes renews a ring of depth 1 */
    if (plan->kind != RF_STEP_FULL && act != RF_DO_PRODUCE && s->cache->part_depth == 1 && sh->num > 0)
        memcpy(sh->history[0].parts[site], y, sizeof now->parts[site]);
}

static void shadow_run(session *s, int image, const rf_step_plan *plan, const bool (*chosen)[TOKENS]) {
    const rf_cache_layout *l = rf_cache_get_layout(s->cache);
    shadow *sh = &s->shadows[image];
    snapshot *now = calloc(1, sizeof *now);
    float x[HIDDEN], enter[RF_CACHE_MAX_SPANS][HIDDEN], y[HIDDEN];
    bool full = plan->kind == RF_STEP_FULL;
    ck_assert_ptr_nonnull(now);
    now->step = s->step;
    embed(s->in[image], x);
    bool runs = full || plan->produce != RF_PRODUCE_OUTPUT;
    for (int b = 0; b <= BLOCKS && runs; b++) {
        for (int i = 0; i < RF_CACHE_MAX_SPANS; i++) {
            const rf_cache_span *span = &l->spans[i];
            if (span->depth > 0 && span->begin == b) memcpy(enter[i], x, sizeof x);
            for (int e = 0; span->depth > 0 && span->end == b && e < HIDDEN; e++)
                now->spans[i][e] = span->delta ? x[e] - enter[i][e] : x[e];
        }
        if (b == BLOCKS) break;
        bool spanned = !full && plan->produce == RF_PRODUCE_SPAN;
        const rf_cache_span *span = &l->spans[plan->span];
        if (spanned && b == span->begin)
            for (int e = 0; e < HIDDEN; e++) {
                size_t at = offsetof(snapshot, spans) + sizeof(float) * (size_t)(plan->span * HIDDEN + e);
                x[e] = (span->delta ? x[e] : 0) + predict(s, image, plan, at, 0);
            }
        if (spanned && b >= span->begin && b < span->end) continue;
        for (int p = 0; p < PARTS; p++) {
            shadow_part(s, image, plan, b * PARTS + p, x, chosen[b], now, y);
            for (int e = 0; e < HIDDEN; e++) x[e] += y[e];
        }
    }
    head(x, sh->out);
    for (int e = 0; e < OUTPUT; e++) sh->out[e] *= s->set.scale;
    for (int e = 0; e < OUTPUT; e++) now->output[e] = sh->out[e] - (l->output_delta ? s->in[image][e] : 0);
    if (!runs)
        for (int e = 0; e < OUTPUT; e++) {
            int64_t cells = s->cache->class_cells;
            sh->out[e] = (l->output_delta ? s->in[image][e] : 0) +
                         predict(s, image, plan, offsetof(snapshot, output) + sizeof(float) * (size_t)e,
                                 (int)(e / COLS * cells + e % COLS * cells / COLS));
        }
    if (full) {
        if (sh->num_full == 0) sh->num = 0; /* what was carried goes */
        memmove(sh->history + 1, sh->history, (MAX_HISTORY - 1) * sizeof *sh->history);
        sh->history[0] = *now;
        if (sh->num_full++ == 0) sh->first = *now;
        sh->has_first = true;
        sh->num++;
    }
    free(now);
}

/* What AdaCache compares: the change of the residual between the last two FULL steps, a step. */
static double change_of_span(const shadow *sh) {
    double change = 0, size = 0;
    for (int e = 0; e < HIDDEN; e++) {
        change += fabs((double)sh->history[0].spans[0][e] - (double)sh->history[1].spans[0][e]);
        size += fabs((double)sh->history[1].spans[0][e]);
    }
    return change / size / (sh->history[0].step - sh->history[1].step);
}

/* A part of a packed group through the runtime: x += y. */
static void run_part(session *s, const rf_cache_group *g, int block, int part) {
    rf_error err = {0};
    rf_cache *c = s->cache;
    int site = block * PARTS + part;
    bool self = kinds[site] == RF_CACHE_SELF;
    rf_part_do act = g->plan->kind == RF_STEP_FULL ? RF_DO_COMPUTE : (rf_part_do)g->plan->parts[site];
    rf_residual_args add = {.x = s->x, .num_rows = g->groups * TOKENS, .cols = WIDTH, .gate = -1, .num_terms = 1};
    if (act == RF_DO_COMPUTE) {
        void *y = s->y, *kept = self && g->identity ? rf_cache_qkv(c, block) : NULL;
        OK(rf_cache_part_before(c, s->stream, g, block, part, &y, &err));
        float *qkv = kept ? kept : s->qkv;
        for (int i = 0; i < g->groups * TOKENS && self; i++)
            for (int k = 0; k < 3; k++) memcpy(qkv + (i * 3 + k) * WIDTH, s->x + i * WIDTH, WIDTH * sizeof(float));
        for (int i = 0; i < g->groups * TOKENS; i++) {
            float *to = (float *)y + i * WIDTH;
            if (self)
                attend(qkv + i / TOKENS * TOKENS * 3 * WIDTH, 3 * WIDTH, s->x + i * WIDTH, to);
            else
                row_part(site, s->step, s->x + i * WIDTH, to);
        }
        if (self && rf_cache_wants_scores(c, g)) {
            ck_assert_ptr_null(rf_cache_lse(c));
            OK(rf_cache_score(c, s->stream, g, block, qkv, &err));
        }
        if (self) OK(rf_cache_keep_qkv(c, s->stream, g, block, qkv, &err));
        OK(rf_cache_part_after(c, s->stream, g, block, part, y, &err));
        add.terms[0] = y;
    } else {
        if (act == RF_DO_ROWS) {
            rf_cache_rows rows = rf_cache_rows_of(c, g, block, part);
            float *kept = self ? rf_cache_qkv(c, block) : NULL;
            for (int i = 0; i < g->groups * rows.count && self; i++)
                for (int k = 0; k < 3; k++)
                    memcpy(kept + (rows.state[i] * 3 + k) * WIDTH, s->x + rows.packed[i] * WIDTH,
                           WIDTH * sizeof(float));
            for (int i = 0; i < g->groups * rows.count; i++) {
                const float *x = s->x + rows.packed[i] * WIDTH;
                if (self)
                    attend(kept + rows.state[i] / TOKENS * TOKENS * 3 * WIDTH, 3 * WIDTH, x, s->y + i * WIDTH);
                else
                    row_part(site, s->step, x, s->y + i * WIDTH);
            }
            OK(rf_cache_scatter(c, s->stream, g, block, part, s->y, &err));
        }
        rf_cache_part_terms(c, g, block, part, &add);
    }
    OK(c->ops->residual(s->stream, &add, &err));
}

static void show_boundary(session *s, const rf_cache_group *g, int block) {
    rf_error err = {0};
    const rf_cache_layout *l = rf_cache_get_layout(s->cache);
    bool probes =
        l->probe_blocks > 0 && !g->resumed && (g->plan->kind == RF_STEP_FULL || g->plan->kind == RF_STEP_PROBE);
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++)
        if (l->spans[i].depth > 0 && l->spans[i].end == block)
            OK(rf_cache_span_leave(s->cache, s->stream, g, i, s->x, &err));
    if (probes && block == 0) OK(rf_cache_probe_begin(s->cache, s->stream, g, s->x, &err));
    if (probes && block == l->probe_blocks) OK(rf_cache_probe_end(s->cache, s->stream, g, s->x, &err));
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++)
        if (l->spans[i].depth > 0 && l->spans[i].begin == block)
            OK(rf_cache_span_enter(s->cache, s->stream, g, i, s->x, &err));
}

/* The last block both ways, and on with the predicted one. The computed one here is a copy of it: what is measured is not the point. */
static void verify_block(session *s, const rf_cache_group *g, int block) {
    rf_error err = {0};
    for (int p = 0; p < PARTS; p++) run_part(s, g, block, p);
    OK(rf_cache_verify_keep(s->cache, s->stream, g, 0, s->x, &err));
    OK(rf_cache_verify_keep(s->cache, s->stream, g, 1, s->x, &err));
    OK(rf_cache_verify_measure(s->cache, s->stream, g, &err));
}

static void run_group(session *s, int index) {
    rf_error err = {0};
    rf_cache *c = s->cache;
    const rf_cache_group *g = rf_cache_group_at(c, index);
    const rf_step_plan *plan = g->plan;
    bool full = plan->kind == RF_STEP_FULL, probe = plan->kind == RF_STEP_PROBE, chosen[BATCH][BLOCKS][TOKENS] = {0};
    int num_images = g->groups, first = 0, last = probe ? c->layout.probe_blocks : BLOCKS;
    OK(rf_cache_upload(c, index, &err));
    const rf_cache_span *span = full || probe || plan->produce != RF_PRODUCE_SPAN ? NULL : &c->layout.spans[plan->span];
    if (!full && !probe && plan->produce == RF_PRODUCE_OUTPUT) {
        OK(rf_cache_output_produce(c, s->stream, g, s->out, &err));
    } else {
        if (g->resumed) {
            OK(rf_cache_probe_resume(c, s->stream, g, s->x, &err));
            first = c->layout.probe_blocks;
        } else {
            OK(rf_cache_select(c, s->stream, g, &err));
            for (int i = 0; i < num_images; i++) embed(s->in[image_of(g, i)], s->x + i * HIDDEN);
        }
        for (int b = first; b < last; b++) {
            if (span && b == span->begin) OK(rf_cache_span_produce(c, s->stream, g, plan->span, s->x, &err));
            if (span && b >= span->begin && b < span->end) continue;
            show_boundary(s, g, b);
            if (plan->verify && b == BLOCKS - 1) {
                verify_block(s, g, b);
                continue;
            }
            for (int p = 0; p < PARTS; p++) {
                rf_cache_rows rows = {0};
                if (!full && !probe && plan->parts[b * PARTS + p] == RF_DO_ROWS) rows = rf_cache_rows_of(c, g, b, p);
                for (int i = 0; i < num_images * rows.count; i++) {
                    int packed = rows.packed[i], image = image_of(g, packed / TOKENS);
                    ck_assert_int_eq(rows.state[i], image * TOKENS + packed % TOKENS);
                    ck_assert(i % rows.count == 0 || packed > rows.packed[i - 1]);
                    ck_assert_int_eq(rows.place[packed], i);
                    chosen[image][b][packed % TOKENS] = true;
                    s->num_rows_checked++;
                }
                run_part(s, g, b, p);
            }
        }
        if (probe) {
            show_boundary(s, g, last);
        } else {
            show_boundary(s, g, BLOCKS);
            float *out = g->identity ? s->out : s->scratch;
            for (int i = 0; i < num_images; i++) head(s->x + i * HIDDEN, out + i * OUTPUT);
            for (int i = 0; i < num_images * OUTPUT; i++) out[i] *= s->set.scale;
            OK(rf_cache_output_computed(c, s->stream, g, out, s->out, &err));
        }
    }
    for (int i = 0; i < num_images && !probe; i++) {
        int image = image_of(g, i);
        size_t at = (size_t)s->step * BATCH + (size_t)image;
        const rf_step_plan *own = &c->plans[at]; /* structure as the group's, weights its own */
        if (strcmp(s->set.policy, "adacache") == 0 && !isnan(own->statistic)) {
            double want = change_of_span(&s->shadows[image]);
            ck_assert_double_eq_tol(own->statistic, want, 1e-4 * want);
        }
        shadow_run(s, image, own, (const bool(*)[TOKENS])chosen[image]);
        s->kinds[image][s->step] = "FPSX"[own->kind];
        s->statistics[image][s->step] = own->statistic;
        s->forced[image][s->step] = c->plan_forced[at];
        for (int e = 0; e < OUTPUT; e++) {
            float got = s->out[image * OUTPUT + e], want = s->shadows[image].out[e];
            ck_assert_msg(fabsf(got - want) <= 2e-5f * s->set.scale,
                          "%s %s: frame %d, step %d, image %d (%c): output %d is %g, want %g", s->set.policy,
                          s->set.options, s->frame, s->step, image, s->kinds[image][s->step], e, (double)got,
                          (double)want);
        }
    }
    OK(rf_cache_group_done(c, index, &err));
}

static void run_step(session *s) {
    rf_error err = {0};
    rf_cache *c = s->cache;
    bool modulated = false;
    for (int b = 0; b < BATCH; b++)
        for (int i = 0; i < OUTPUT; i++)
            s->in[b][i] = input_at(s->frame, s->step, s->set.num_steps, b, i, s->set.liveliness);
    if (rf_cache_wants_head(c, &modulated)) {
        if (rf_cache_input(c)) memcpy(rf_cache_input(c), s->in, sizeof s->in);
        for (int b = 0; b < BATCH; b++) embed(s->in[b], s->x + b * HIDDEN);
        OK(rf_cache_head(c, s->stream, modulated ? s->x : NULL, &err));
    }
    int num = 0;
    OK(rf_cache_plan(c, s->step, &num, &err));
    for (int i = 0; i < num; i++) {
        bool probes = rf_cache_group_at(c, i)->plan->kind == RF_STEP_PROBE;
        int first = 0, more = 0;
        run_group(s, i);
        if (probes && rf_cache_wants_post(c, rf_cache_group_at(c, i), false)) { /* a probe is read at once */
            OK(rf_cache_post(c, s->stream, &s->step, false, &err));
            rf_cache_posted(c);
        }
        if (probes) OK(rf_cache_plan_probe(c, i, &first, &more, &err));
        for (int j = first; j < first + more; j++) run_group(s, j);
    }
    OK(rf_cache_end_step(c, false, &err));
}

/* One run. */
static void run_frame(session *s) {
    rf_error err = {0};
    OK(rf_cache_begin(s->cache, &err));
    for (int b = 0; b < BATCH; b++) {
        shadow *sh = &s->shadows[b];
        if (s->set.carry == RF_CARRY_OFF || !sh->has_first) sh->num = 0;
        if (s->set.carry == RF_CARRY_FIRST && sh->has_first) sh->history[0] = sh->first;
        if (sh->num > 1) sh->num = 1;
        sh->num_full = 0;
        memset(s->kinds[b], 0, sizeof s->kinds[b]);
    }
    for (s->step = 0; s->step < s->set.num_steps; s->step++) run_step(s);
    OK(rf_cache_end(s->cache, &err));
    s->frame++;
}

static void forget(session *s) {
    rf_cache_forget(s->cache);
    for (int b = 0; b < BATCH; b++) s->shadows[b].has_first = false;
}

/* --- carry --------------------------------------------------------------------------------------------------------------- */

/* Settings that reuse at the start of a run that has something to begin with, and steps then FULL with FIRST at -1 ("" = as
 * signals say). */
static const struct {
    const char *policy, *options, *kinds;
} carrying[] = {
    {"interval", "interval=3", "SSFSSFSSFF"},
    {"interval", "interval=4,first=3,level=residual", "SSSFSSSFSF"},
    {"interval", "interval=2,order=2,level=hidden,last=false", "SFSFSFSFSF"},
    {"teacache", "threshold=0.4", ""},
    {"teacache", "threshold=0.4,signal=timestep,first=3", "SSSSFSSSFF"},
    {"easycache", "threshold=0.6", ""},
    {"magcache", "table=flat:1.05,max_skips=2,threshold=1,retain=0.3", "SSFSSFSSFS"},
    {"adacache", "codebook=9:3/10:1", "SFFSSFSSFF"},
    {"worldcache", "max_skips=2,threshold=9", "SSFFFSSFSF"},
    {"worldcache", "max_skips=3,threshold=9,skip=interval,predictor=linear", "SSSFFFSSSF"},
    {"fbcache", "threshold=0.9,warmup=3", ""},
    {"dbcache", "threshold=0.9,bn=1", ""},
    {"dbcache", "threshold=1,calibrator=taylor,max_continuous=2", "PPFPPFPPFP"},
    {"deltacache", "interval=3", "PPFPPFPPFP"},
    {"fora", "interval=4", "SFSSSFSSSF"},
    {"taylorseer", "interval=3,order=2", "SSFSSFSSFS"},
    {"taylorseer", "interval=3,mode=last,first=4", "SSFSSFSSFS"},
    {"hicache", "interval=4,order=1", "SSSFSSSFSS"},
    {"speca", "order=1,max=3,base=9,decay=1", "SPPFSPPFSP"},
};
enum { NUM_CARRYING = (int)(sizeof carrying / sizeof *carrying) };

START_TEST(a_run_begins_with_what_the_one_before_stored) {
    rf_cache_carry carry = _i % 2 ? RF_CARRY_LAST : RF_CARRY_FIRST;
    const char *options = carrying[_i / 2].options;
    session *s =
        session_open((setting){.policy = carrying[_i / 2].policy, .options = options, .carry = carry, .liveliness = 9});
    session *off = session_open((setting){.policy = carrying[_i / 2].policy, .options = options, .liveliness = 9});
    run_frame(s);
    run_frame(off);
    ck_assert_str_eq(s->kinds[0], off->kinds[0]); /* the first frame of a rollout has nothing */
    ck_assert_int_eq(s->kinds[0][0], 'F');
    char second[BATCH][MAX_STEPS + 1];
    run_frame(s);
    memcpy(second, s->kinds, sizeof second);
    if (carry == RF_CARRY_FIRST) {
        ck_assert_msg(second[0][0] != 'F', "%s: %s", options, second[0]);
        if (carrying[_i / 2].kinds[0]) ck_assert_str_eq(second[0], carrying[_i / 2].kinds);
    }
    for (int i = 0; i < 5; i++) run_frame(s); /* values are compared at every step */
    forget(s);
    off->frame = s->frame;
    run_frame(s);
    run_frame(off);
    for (int b = 0; b < BATCH; b++) ck_assert_str_eq(s->kinds[b], off->kinds[b]);
    ck_assert_int_eq(off->kinds[0][0], 'F');
    session_close(s);
    session_close(off);
}
END_TEST

/* The last full step's snapshot stands where it would stand if runs were one: three steps from the end, three steps ago. */
START_TEST(steps_go_on_behind_the_last_snapshot) {
    session *s =
        session_open((setting){.policy = "interval", .options = "interval=4,last=false", .carry = RF_CARRY_LAST});
    run_frame(s);
    ck_assert_str_eq(s->kinds[0], "FSSSFSSSFS");
    run_frame(s);
    ck_assert_str_eq(s->kinds[0], "SSFSSSFSSS");
    run_frame(s);
    ck_assert_str_eq(s->kinds[0], "FSSSFSSSFS");
    session_close(s);
    /* runs that compute nothing do not go on for ever, whatever is carried */
    for (int carry = RF_CARRY_FIRST; carry <= RF_CARRY_LAST; carry++) {
        s = session_open(
            (setting){.policy = "interval", .options = "interval=25,last=false", .carry = (rf_cache_carry)carry});
        int full = 0;
        for (int i = 0; i < 8; i++) {
            run_frame(s);
            for (int t = 0; t < 10; t++) full += s->kinds[0][t] == 'F';
        }
        ck_assert_msg(full >= 3 && full <= 4, "%s: %d", rf_cache_carry_name((rf_cache_carry)carry), full);
        session_close(s);
    }
}
END_TEST

START_TEST(never_reusing_never_carries) {
    static const char *const list[][2] = {
        {"interval", "interval=1"},
        {"teacache", "threshold=0"},
        {"easycache", "threshold=0"},
        {"magcache", "table=flat:1,max_skips=0"},
        {"magcache", "table=flat:1,retain=1"},
        {"magcache", "table=flat:1,threshold=0"},
        {"adacache", "codebook=1:1"},
        {"worldcache", "threshold=0"},
        {"worldcache", "max_skips=0"},
        {"worldcache", "warmup=10"},
        {"worldcache", "skip=interval,max_skips=0"},
        {"fbcache", "threshold=0"},
        {"fbcache", "max_skips=0,threshold=9"},
        {"dbcache", "threshold=0"},
        {"dbcache", "max_cached=0"},
        {"dbcache", "max_continuous=0,threshold=2"},
        {"dbcache", "mask=1111111111,threshold=1"},
        {"deltacache", "interval=1"},
        {"deltacache", "fraction=0"},
        {"fora", "interval=1"},
        {"taylorseer", "interval=1"},
        {"hicache", "interval=1,mode=last"},
        {"speca", "max=0"},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        for (int carry = RF_CARRY_FIRST; carry <= RF_CARRY_LAST; carry++) {
            session *s = session_open(
                (setting){.policy = list[i][0], .options = list[i][1], .carry = (rf_cache_carry)carry, .force = true});
            for (int frame = 0; frame < 3; frame++) {
                run_frame(s);
                for (int b = 0; b < BATCH; b++)
                    ck_assert_msg(strcmp(s->kinds[b], "FFFFFFFFFF") == 0, "%s %s: %s", list[i][0], list[i][1],
                                  s->kinds[b]);
            }
            session_close(s);
        }
}
END_TEST

START_TEST(policies_without_history_refuse_to_carry) {
    static const char *const list[][2] = {{"spectrum", ""}, {"pab", ""},     {"toca", ""},
                                          {"duca", ""},     {"measure", ""}, {"diffsparse", "table=uniform"}};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        session s;
        rf_error err = {0};
        setting set = {.policy = list[i][0], .options = list[i][1], .carry = RF_CARRY_FIRST, .force = true};
        char wanted[80];
        snprintf(wanted, sizeof wanted, "policy %s keeps no history between frames", list[i][0]);
        rf_assert_fails(session_try(&s, &set, &err), err, RF_ERR_UNSUPPORTED, wanted);
        ck_assert_ptr_nonnull(strstr(err.message, "worldcache"));
        session_release(&s);
    }
    rf_cache_carry carry;
    for (int i = RF_CARRY_OFF; i <= RF_CARRY_LAST; i++)
        ck_assert(rf_cache_carry_from_name(rf_cache_carry_name((rf_cache_carry)i), &carry) && (int)carry == i);
    ck_assert(!rf_cache_carry_from_name("firs", &carry) && !rf_cache_carry_from_name("", &carry));
}
END_TEST

/* What a carried snapshot would have given is compared with the first full step; too far off makes the next one full too. */
START_TEST(the_drift_guard_checks_what_is_carried) {
    setting set = {.policy = "fora", .options = "interval=4", .carry = RF_CARRY_FIRST, .max_drift = 1e-6};
    session *s = session_open(set);
    run_frame(s);
    run_frame(s);
    ck_assert_str_eq(s->kinds[0], "SFFFFFFFFF");
    ck_assert(!s->forced[0][1] && s->forced[0][2]);
    session_close(s);
}
END_TEST

typedef struct {
    char text[1 << 16];
} lines;

static rf_status take_line(void *user, const char *json, rf_error *err) {
    lines *l = user;
    ck_assert_uint_lt(strlen(l->text) + strlen(json) + 2, sizeof l->text);
    strcat(l->text, json);
    strcat(l->text, "\n");
    (void)err;
    return RF_OK;
}

/* The trace of a run, as text and as a file. */
static void write_trace(const session *s, lines *l, const char *path) {
    rf_error err = {0};
    l->text[0] = 0;
    OK(rf_cache_write_trace(s->cache, 0, take_line, l, &err));
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_ge(fputs(l->text, f), 0);
    ck_assert_int_eq(fclose(f), 0);
}

START_TEST(traces_tell_what_was_carried) {
    char dir[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/trace.jsonl", dir);
    lines *l = calloc(1, sizeof *l);
    ck_assert_ptr_nonnull(l);
    session *s = session_open((setting){.policy = "interval", .options = "interval=4", .carry = RF_CARRY_LAST});
    for (int frame = 0; frame < 2; frame++) {
        run_frame(s);
        write_trace(s, l, path);
        int told = 0;
        for (const char *at = l->text; (at = strstr(at, "\"carried\":true")) != NULL; at++) told++;
        /* the second run skips steps 0, 1, 2 from a snapshot of step 9, and computes step 3 with it in sight: an entry of
         * both images a skip, one of each (with its drift) the other */
        ck_assert_int_eq(told, frame == 0 ? 0 : 3 + 2);
        const char *skipped = "\"kind\":\"skip\",\"produce\":\"output\",\"span\":0,\"horizon\":1,";
        ck_assert_ptr_nonnull(strstr(l->text, skipped));
    }
    ck_assert_str_eq(s->kinds[0], "SSSFSSSFSF");
    session other;
    rf_error err = {0};
    char options[320];
    snprintf(options, sizeof options, "file=%s", path);
    setting replay = {.policy = "replay", .options = options};
    rf_assert_fails(session_try(&other, &replay, &err), err, RF_ERR_CONFIG, "features of another");
    session_release(&other);
    session_close(s);

    /* steps since the last stored one may be more than a run has */
    s = session_open((setting){.policy = "interval", .options = "interval=25,last=false", .carry = RF_CARRY_LAST});
    for (int frame = 0; frame < 3; frame++) run_frame(s);
    write_trace(s, l, path);
    rf_trace *trace = NULL;
    OK(rf_trace_open(&trace, path, &err));
    uint8_t parts[SITES];
    int32_t rows[SITES];
    rf_step_plan plan = {.parts = parts, .rows = rows};
    OK(rf_trace_get_plan(trace, 1, 4, &plan, &err));
    ck_assert_int_eq(plan.horizon, 24);
    rf_trace_close(trace);
    session_close(s);
    free(l);
    rf_temp_dir_remove(dir);
}
END_TEST

/* --- token rows on four parts ---------------------------------------------------------------------------------------- */

START_TEST(blocks_choose_rows_once) {
    static const char *const list[][2] = {
        {"toca", "ratio=0.25,step_weight=0,score=value"},
        {"toca", "ratio=0.4,step_weight=0,score=value,attention=rows,interval=5,age_weight=1"},
        {"toca", "ratio=0.4,step_weight=0,score=random,attention=rows"},
        {"duca", "ratio=0.25,step_weight=0,attention=rows"},
        {"diffsparse", "table=uniform,score=value,budget=0.6"},
        {"diffsparse", "table=uniform,score=value,attention=cached"},
        {"diffsparse", "table=uniform,score=value,attention=full,age_weight=5"},
    };
    session *s = session_open((setting){.policy = list[_i][0], .options = list[_i][1], .num_steps = 20});
    run_frame(s);
    run_frame(s);
    ck_assert_int_gt(s->num_rows_checked, 100);
    ck_assert_ptr_nonnull(strchr(s->kinds[0], 'P'));
    rf_cache_counts counts = rf_cache_get_counts(s->cache);
    ck_assert(counts.rows_computed < counts.rows_total);
    session_close(s);
}
END_TEST

START_TEST(other_policies_run_on_four_parts) {
    static const char *const list[][2] = {{"pab", "self=2,temporal=3,mlp=2,lo=-1,hi=1001"},
                                          {"pab", ""},
                                          {"fora", ""},
                                          {"taylorseer", "order=2"},
                                          {"hicache", ""},
                                          {"speca", "base=9,decay=1,order=2"},
                                          {"deltacache", ""},
                                          {"fbcache", "threshold=0.5"},
                                          {"dbcache", "threshold=0.5"},
                                          {"spectrum", "first=2"},
                                          {"measure", ""}};
    session *s =
        session_open((setting){.policy = list[_i][0], .options = list[_i][1], .num_steps = 20, .liveliness = 9});
    run_frame(s);
    run_frame(s);
    ck_assert(strcmp(list[_i][0], "measure") == 0 || strchr(s->kinds[0], 'S') || strchr(s->kinds[0], 'P'));
    session_close(s);
}
END_TEST

/* --- streams ---------------------------------------------------------------------------------------------------------- */

static const rf_cache_stream by_rows[] = {{0, 8, 0, 0}, {8, 12, 0, COLS}};
static const rf_cache_stream by_cols[] = {{0, TOKENS, 0, 1}, {0, TOKENS, 1, COLS}};
static const rf_cache_stream by_both[] = {{0, 5, 0, 2}, {5, TOKENS, 0, 2}, {0, TOKENS, 2, 4}};
static const rf_cache_stream whole[] = {{0, TOKENS, 0, COLS}};

static const char *const world = "max_skips=4,threshold=0.3,warmup=3";

/* Shares of classes are those of every stream, by its own quantiles; whole: as without streams. */
START_TEST(classes_are_by_stream) {
    static const struct {
        const rf_cache_stream *streams;
        int num;
    } list[] = {{NULL, 0}, {whole, 1}, {by_rows, 2}, {by_cols, 2}, {by_both, 3}};
    double first[BATCH][MAX_STEPS];
    for (int i = 0; i < 5; i++) {
        session *s = session_open((setting){.policy = "worldcache",
                                            .options = "max_skips=4,threshold=1e5,warmup=3",
                                            .num_steps = 20,
                                            .num_streams = list[i].num,
                                            .streams = list[i].streams});
        run_frame(s);
        const rf_cache *c = s->cache;
        ck_assert_int_eq((int)c->class_cells, i < 3 ? 1 : i == 3 ? 4 : 2);
        for (int image = 0; image < BATCH; image++)
            for (int k = 0; k < c->num_streams; k++) {
                const rf_cache_stream *of = &c->streams[k];
                int num[3] = {0}, rows = (int)(of->row_end - of->row_begin);
                for (int64_t r = of->row_begin; r < of->row_end; r++) {
                    int64_t cell = COLS / c->class_cells, at = (image * TOKENS + r) * c->class_cells;
                    num[c->d.row_class[at + of->col_begin / cell]]++;
                    for (int64_t e = of->col_begin / cell; e < of->col_end / cell;
                         e++) /* a row's cells are one class */
                        ck_assert_int_eq(c->d.row_class[at + e], c->d.row_class[at + of->col_begin / cell]);
                }
                /* below the .3 quantile, from the .6 quantile on: of n different values */
                ck_assert_int_eq(num[0], (int)floor(0.3 * (rows - 1)) + 1);
                ck_assert_int_eq(num[2], rows - (int)ceil(0.6 * (rows - 1)));
            }
        if (i == 0) memcpy(first, s->statistics, sizeof first);
        for (int t = 0; t < 20 && i == 1; t++)
            ck_assert(memcmp(&first[0][t], &s->statistics[0][t], sizeof(double)) == 0 ||
                      (isnan(first[0][t]) && isnan(s->statistics[0][t])));
        session_close(s);
    }
}
END_TEST

/* E of a stream is what the same rows alone give; the larger one decides. */
START_TEST(the_stream_that_drifts_most_decides) {
    double most[MAX_STEPS] = {0};
    session *s = session_open((setting){.policy = "worldcache",
                                        .options = "max_skips=4,threshold=1e5,warmup=3",
                                        .num_steps = 20,
                                        .num_streams = 2,
                                        .streams = by_rows});
    run_frame(s);
    for (int step = 3; step < 20; step++) {
        if (s->kinds[0][step] != 'S') continue;
        int k = s->cache->plans[step * BATCH].horizon, full = step - k;
        if (k < 2) continue;
        const float *all = s->cache->history + (size_t)full * s->cache->signal_floats + RF_SIGNAL_COUNT * BATCH * 4;
        double sums[2] = {0};
        for (int j = 1; j < k; j++)
            for (int stream = 0; stream < 2; stream++)
                sums[stream] += (double)all[(stream * BATCH + 0) * s->cache->horizon + j - 1];
        ck_assert_double_eq_tol(s->statistics[0][step], fmax(sums[0], sums[1]), 1e-12 * fmax(sums[0], sums[1]));
        ck_assert(sums[0] != sums[1] && sums[0] > 0 && sums[1] > 0);
        most[step] = fmax(sums[0], sums[1]);
    }
    ck_assert(most[5] > 0);
    session_close(s);
}
END_TEST

/* Outputs 1024 times as large: the same decisions, the same drift. Per stream and as one. (A power of two: nothing rounds differently. Both so
 * large that the 1e-8 beside |v0|^2, which has a unit, is nothing even where one column turns round.) */
START_TEST(drift_has_no_unit) {
    for (int streams = 0; streams < 3; streams++) {
        session *s[2];
        for (int i = 0; i < 2; i++) {
            s[i] = session_open((setting){.policy = "worldcache",
                                          .options = world,
                                          .num_steps = 20,
                                          .scale = i ? 1048576 : 1024,
                                          .liveliness = 9,
                                          .num_streams = streams ? 2 : 0,
                                          .streams = streams == 1   ? by_rows
                                                     : streams == 2 ? by_cols
                                                                    : NULL});
            run_frame(s[i]);
        }
        int compared = 0;
        for (int b = 0; b < BATCH; b++) {
            ck_assert_str_eq(s[0]->kinds[b], s[1]->kinds[b]);
            ck_assert_ptr_nonnull(strchr(s[0]->kinds[b], 'S'));
            for (int t = 0; t < 20; t++) {
                double a = s[0]->statistics[b][t], v = s[1]->statistics[b][t];
                if (!(a > 0)) continue;
                ck_assert_double_eq_tol(a, v, 1e-4 * a);
                compared++;
            }
        }
        ck_assert_int_gt(compared, 3);
        session_close(s[0]);
        session_close(s[1]);
    }
}
END_TEST

START_TEST(streams_that_do_not_fit_are_refused) {
    static const rf_cache_stream gap[] = {{0, 8, 0, 0}, {9, TOKENS, 0, 0}};
    static const rf_cache_stream meet[] = {{0, 8, 0, 0}, {7, TOKENS, 0, 0}};
    static const rf_cache_stream far[] = {{0, TOKENS + 1, 0, 0}};
    static const rf_cache_stream wide[] = {{0, TOKENS, 0, COLS + 1}};
    static const rf_cache_stream none[] = {{3, 3, 0, 0}};
    const rf_cache_stream many[9] = {{0, 1, 0, 0}};
    const struct {
        const rf_cache_stream *streams;
        int num;
        rf_status status;
        const char *part;
    } list[] = {{gap, 2, RF_ERR_ARGUMENT, "leave some"}, {meet, 2, RF_ERR_ARGUMENT, "stream 1"},
                {far, 1, RF_ERR_ARGUMENT, "stream 0"},   {wide, 1, RF_ERR_ARGUMENT, "stream 0"},
                {none, 1, RF_ERR_ARGUMENT, "stream 0"},  {many, 9, RF_ERR_UNSUPPORTED, "at most 8"}};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        session s;
        rf_error err = {0};
        setting set = {.policy = "worldcache", .options = "", .num_streams = list[i].num, .streams = list[i].streams};
        rf_assert_fails(session_try(&s, &set, &err), err, list[i].status, list[i].part);
        session_release(&s);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching: runtime");
    TCase *tc = tcase_create("carry");
    tcase_add_loop_test(tc, a_run_begins_with_what_the_one_before_stored, 0, 2 * NUM_CARRYING);
    tcase_add_test(tc, steps_go_on_behind_the_last_snapshot);
    tcase_add_test(tc, never_reusing_never_carries);
    tcase_add_test(tc, policies_without_history_refuse_to_carry);
    tcase_add_test(tc, the_drift_guard_checks_what_is_carried);
    tcase_add_test(tc, traces_tell_what_was_carried);
    suite_add_tcase(suite, tc);
    tc = tcase_create("parts");
    tcase_add_loop_test(tc, blocks_choose_rows_once, 0, 7);
    tcase_add_loop_test(tc, other_policies_run_on_four_parts, 0, 11);
    suite_add_tcase(suite, tc);
    tc = tcase_create("streams");
    tcase_add_test(tc, classes_are_by_stream);
    tcase_add_test(tc, the_stream_that_drifts_most_decides);
    tcase_add_test(tc, drift_has_no_unit);
    tcase_add_test(tc, streams_that_do_not_fit_are_refused);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
