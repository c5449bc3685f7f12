/* tests/caching/sim.c - see sim.h. */
#include "tests/caching/sim.h"

#include <check.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"

#define START_SIGNALS ((1u << RF_SIGNAL_INPUT_STEP) | (1u << RF_SIGNAL_MODULATED_STEP))
#define REFRESH_SIGNALS                                                                                                \
    ((1u << RF_SIGNAL_INPUT_REFRESH) | (1u << RF_SIGNAL_OUTPUT_REFRESH) | (1u << RF_SIGNAL_SPAN_REFRESH) |             \
     (1u << RF_SIGNAL_SPAN_NORMS))

typedef struct {
    float values[RF_SIGNAL_COUNT][2][4];
    int steps[RF_SIGNAL_COUNT];
    float drift[2 * RF_CACHE_MAX_STREAMS][RF_CACHE_MAX_HORIZON];
} signal_set;

/* ---- text that grows ---- */

typedef struct {
    char *text;
    size_t used, room;
} grow;

__attribute__((format(printf, 2, 3))) static void add(grow *g, const char *format, ...) {
    for (;;) {
        va_list args;
        va_start(args, format);
        int n = vsnprintf(g->text ? g->text + g->used : NULL, g->room - g->used, format, args);
        va_end(args);
        ck_assert_int_ge(n, 0);
        if (g->text && g->used + (size_t)n < g->room) {
            g->used += (size_t)n;
            return;
        }
        g->room = 2 * g->room + (size_t)n + 64;
        g->text = realloc(g->text, g->room);
        ck_assert_ptr_nonnull(g->text);
    }
}

static void *need(void *p) {
    ck_assert_ptr_nonnull(p);
    return p;
}

/* ---- signatures ---- */

static char *sign_layout(const rf_cache_layout *l) {
    grow g = {0};
    add(&g, "output %d%s", l->output_depth, l->output_delta ? "d" : "");
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++) {
        const rf_cache_span *s = &l->spans[i];
        if (s->depth > 0) add(&g, "; span%d %d-%d x%d%s", i, s->begin, s->end, s->depth, s->delta ? "d" : "");
    }
    add(&g, "; parts %d %d %d %d; probe %d; signals %x; classes %d", l->part_depth[0], l->part_depth[1],
        l->part_depth[2], l->part_depth[3], l->probe_blocks, l->signals, l->num_classes);
    if (l->part_depth[RF_CACHE_TEMPORAL]) add(&g, "; temporal %d", l->part_depth[RF_CACHE_TEMPORAL]);
    if (l->curvature.used) {
        add(&g, "; curvature %d %d %d %.9g %.9g %.9g %.9g %d:", l->curvature.timestep_gaps, l->curvature.pooled,
            l->curvature.mean_over_all, l->curvature.p_stable, l->curvature.p_chaotic, l->curvature.eps,
            l->curvature.floor, l->curvature.horizon);
        for (int k = 0; k < l->curvature.horizon; k++) {
            add(&g, " %.9g/%.9g", l->curvature.step_a[k], l->curvature.step_b[k]);
        }
    }
    if (l->tokens.used) {
        add(&g, "; tokens %d %d %d %llu %.9g %.9g %d", l->tokens.value_score, l->tokens.attention_rows,
            l->tokens.random, (unsigned long long)l->tokens.seed, l->tokens.age_weight, l->tokens.bonus,
            l->tokens.cell);
    }
    if (l->is_static) add(&g, "; static");
    return g.text;
}

static char *sign_plan(const sim_result *r, const rf_step_plan *p) {
    grow g = {0};
    if (p->kind == RF_STEP_FULL) {
        add(&g, "F");
        return g.text;
    }
    add(&g, "%c %s", p->kind == RF_STEP_SKIP ? 'S' : 'P',
        p->produce == RF_PRODUCE_OUTPUT ? "output"
        : p->produce == RF_PRODUCE_SPAN ? "span"
                                        : "none");
    if (p->produce == RF_PRODUCE_SPAN) add(&g, "%d", p->span);
    if (p->verify) add(&g, " verify%s", p->use_verified ? "+" : "");
    int classes = r->layout.num_classes > 1 ? r->layout.num_classes : 1;
    for (int c = 0; c < classes; c++) {
        for (int j = 0; j < p->num_terms; j++) add(&g, "%s%.9g", j ? "," : " w=", p->weights[c][j]);
    }
    if (p->kind == RF_STEP_PARTIAL) {
        add(&g, " ");
        for (int b = 0; b < r->shape.num_blocks; b++) {
            add(&g, b ? " " : "");
            bool inside = p->produce == RF_PRODUCE_SPAN && b >= r->layout.spans[p->span].begin &&
                          b < r->layout.spans[p->span].end;
            for (int i = 0; i < r->shape.num_parts; i++) {
                int at = b * r->shape.num_parts + i;
                if (r->shape.part_kinds[at] == RF_CACHE_NO_PART) continue;
                if (inside) {
                    add(&g, "-");
                } else if (p->parts[at] == RF_DO_ROWS) {
                    add(&g, "t%d.", p->rows[at]);
                } else {
                    add(&g, "%c", p->parts[at] == RF_DO_COMPUTE ? 'c' : 'p');
                }
            }
        }
    }
    return g.text;
}

/* ---- checks ---- */

#define CHECK_PLAN(cond, ...)                                                                                          \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            char why_[256];                                                                                            \
            snprintf(why_, sizeof why_, __VA_ARGS__);                                                                  \
            ck_abort_msg("%s, step %d: %s", rf_policy_get_def(r->policy)->name, step, why_);                           \
        }                                                                                                              \
    } while (0)

static void check_layout(const sim_result *r) {
    const rf_cache_layout *l = &r->layout;
    int step = -1;
    CHECK_PLAN(l->output_depth >= 0 && l->output_depth <= RF_CACHE_MAX_TERMS, "output depth %d", l->output_depth);
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++) {
        const rf_cache_span *s = &l->spans[i];
        CHECK_PLAN(s->depth >= 0 && s->depth <= RF_CACHE_MAX_TERMS, "span %d has depth %d", i, s->depth);
        if (s->depth == 0) continue;
        CHECK_PLAN(s->begin >= 0 && s->begin < s->end && s->end <= r->shape.num_blocks, "span %d is %d..%d", i,
                   s->begin, s->end);
    }
    for (int k = 0; k < RF_CACHE_NUM_KINDS; k++) {
        CHECK_PLAN(l->part_depth[k] >= 0 && l->part_depth[k] <= RF_CACHE_MAX_TERMS, "parts %d have depth %d", k,
                   l->part_depth[k]);
    }
    CHECK_PLAN(l->probe_blocks >= 0 && l->probe_blocks <= r->shape.num_blocks, "%d probe blocks", l->probe_blocks);
    CHECK_PLAN(l->probe_blocks == 0 || rf_policy_get_def(r->policy)->plan_probe, "a probe and no plan_probe");
    CHECK_PLAN(!l->curvature.used || l->output_depth == 3, "curvature with output depth %d", l->output_depth);
    CHECK_PLAN(l->num_classes >= 0 && l->num_classes <= RF_CACHE_MAX_CLASSES, "%d classes", l->num_classes);
    CHECK_PLAN((l->signals >> RF_SIGNAL_COUNT) == 0, "signals %x", l->signals);
}

static void check_weights(const sim_result *r, const sim_options *o, int step, const rf_step_plan *p, int depth,
                          int num_stored) {
    int limit = depth < num_stored ? depth : num_stored;
    CHECK_PLAN(p->num_terms >= 0 && p->num_terms <= limit, "%d terms, %d stored, depth %d", p->num_terms, num_stored,
               depth);
    int classes = r->layout.num_classes > 1 ? r->layout.num_classes : 1;
    bool any_sum = o->free_weights || strcmp(rf_policy_get_def(r->policy)->name, "spectrum") == 0;
    for (int c = 0; c < classes && p->num_terms > 0; c++) {
        double sum = 0, size = 0;
        for (int j = 0; j < p->num_terms; j++) {
            CHECK_PLAN(isfinite(p->weights[c][j]), "weight %d of class %d is %g", j, c, p->weights[c][j]);
            sum += p->weights[c][j];
            size += fabs(p->weights[c][j]);
        }
        CHECK_PLAN(any_sum || fabs(sum - 1) <= 1e-6 * (1 + size), "weights of class %d have the sum %.9g", c, sum);
    }
}

static int depth_of(const sim_result *r, const rf_step_plan *p) {
    if (p->produce == RF_PRODUCE_OUTPUT) return r->layout.output_depth;
    if (p->produce == RF_PRODUCE_SPAN) return r->layout.spans[p->span].depth;
    int depth = 0;
    for (int k = 0; k < RF_CACHE_NUM_KINDS; k++) {
        if (r->layout.part_depth[k] > depth) depth = r->layout.part_depth[k];
    }
    return depth;
}

/* filled: a part's ring holds something. Brings it up to date. */
static void check_plan(const sim_result *r, const sim_options *o, int step, const rf_step_plan *p, bool probed,
                       int num_stored, int last_stored, bool *filled) {
    const rf_cache_layout *l = &r->layout;
    int parts = r->shape.num_blocks * r->shape.num_parts;
    CHECK_PLAN(p->kind == RF_STEP_FULL || p->kind == RF_STEP_PARTIAL || p->kind == RF_STEP_SKIP, "kind %d", p->kind);
    CHECK_PLAN((int)p->produce >= RF_PRODUCE_NONE && p->produce <= RF_PRODUCE_SPAN, "produce %d", p->produce);
    CHECK_PLAN(p->produce != RF_PRODUCE_OUTPUT || l->output_depth > 0, "produces an output that is not kept");
    if (p->produce == RF_PRODUCE_SPAN) {
        CHECK_PLAN(p->span >= 0 && p->span < RF_CACHE_MAX_SPANS && l->spans[p->span].depth > 0,
                   "produces span %d, which is not kept", p->span);
    }
    check_weights(r, o, step, p, depth_of(r, p), num_stored);
    CHECK_PLAN(p->horizon >= 0, "horizon %d", p->horizon);
    if (p->kind == RF_STEP_FULL) {
        CHECK_PLAN(!p->verify, "FULL, with verification");
        for (int i = 0; i < parts; i++) filled[i] = true;
        return;
    }
    CHECK_PLAN(p->produce == RF_PRODUCE_NONE || p->num_terms > 0, "produces from no terms");
    CHECK_PLAN(!probed || p->produce != RF_PRODUCE_OUTPUT, "produces the output after a probe");
    if (p->produce != RF_PRODUCE_NONE) {
        CHECK_PLAN(p->horizon == step - last_stored, "horizon %d, stored last at %d", p->horizon, last_stored);
    }
    if (p->kind == RF_STEP_SKIP) {
        for (int i = 0; i < parts && p->produce == RF_PRODUCE_NONE; i++) {
            if (r->shape.part_kinds[i] == RF_CACHE_NO_PART) continue;
            CHECK_PLAN(p->parts[i] == RF_DO_PRODUCE, "SKIP with a part that is not produced");
            CHECK_PLAN(l->part_depth[r->shape.part_kinds[i]] > 0 && filled[i] && p->num_terms > 0,
                       "SKIP with a part that is not kept");
        }
        if (p->produce == RF_PRODUCE_SPAN) {
            CHECK_PLAN(l->spans[p->span].begin == 0 && l->spans[p->span].end == r->shape.num_blocks,
                       "SKIP over blocks %d..%d only", l->spans[p->span].begin, l->spans[p->span].end);
        }
        return;
    }
    CHECK_PLAN(p->produce != RF_PRODUCE_OUTPUT, "PARTIAL that produces the output");
    int saved = 0;
    for (int i = 0; i < parts; i++) {
        int block = i / r->shape.num_parts;
        if (r->shape.part_kinds[i] == RF_CACHE_NO_PART) continue;
        if (p->produce == RF_PRODUCE_SPAN && block >= l->spans[p->span].begin && block < l->spans[p->span].end) {
            saved++;
            continue;
        }
        int depth = l->part_depth[r->shape.part_kinds[i]];
        CHECK_PLAN(p->parts[i] <= RF_DO_ROWS, "part %d does %d", i, p->parts[i]);
        if (p->parts[i] == RF_DO_COMPUTE) {
            if (depth == 1) filled[i] = true;
            continue;
        }
        saved++;
        CHECK_PLAN(depth > 0, "part %d is not kept, and is not computed", i);
        CHECK_PLAN(filled[i], "part %d has never been stored, and is not computed", i);
        if (p->parts[i] == RF_DO_ROWS) {
            CHECK_PLAN(l->tokens.used && depth == 1, "part %d computes rows without their state", i);
            CHECK_PLAN(p->rows[i] > 0 && p->rows[i] < r->shape.tokens, "part %d computes %d rows", i, p->rows[i]);
        } else {
            CHECK_PLAN(p->num_terms > 0, "part %d is produced from no terms", i);
        }
    }
    CHECK_PLAN(saved > 0, "PARTIAL that computes everything");
}

/* ---- the run ---- */

static void set_up_shape(sim_result *r, const sim_options *o) {
    rf_cache_shape *s = &r->shape;
    s->model = "sim";
    s->sampler = o->stochastic ? "ddpm" : "ddim";
    s->stochastic = o->stochastic;
    s->force = o->force;
    s->num_steps = o->num_steps ? o->num_steps : 50;
    s->num_streams = o->num_streams;
    s->branches = o->branches ? o->branches : 2;
    s->num_blocks = o->num_blocks ? o->num_blocks : 4;
    s->num_parts = o->num_parts ? o->num_parts : 2;
    s->frames = o->frames ? o->frames : 1;
    s->grid_h = o->grid_h ? o->grid_h : 4;
    s->grid_w = o->grid_w ? o->grid_w : 4;
    s->tokens = s->frames * s->grid_h * s->grid_w;
    s->batch = 1;
    s->width = 64;
    s->in_cols = 8;
    s->out_cols = 16;
    s->pred_cols = 8;
    r->num_steps = s->num_steps;
    size_t parts = (size_t)s->num_blocks * (size_t)s->num_parts, steps = (size_t)s->num_steps;
    float *f = need(calloc(1, 2 * steps * sizeof(float) + parts));
    uint8_t *kinds = (uint8_t *)(f + 2 * steps);
    r->arrays = f;
    for (int i = 0; i < s->num_steps; i++) {
        f[i] = o->timesteps ? o->timesteps[i] : 1000.0f - 1000.0f * (float)i / (float)s->num_steps;
        f[steps + (size_t)i] = o->temb_change ? o->temb_change[i] : i ? 0.1f : 0.0f;
    }
    for (size_t i = 0; i < parts; i++) {
        kinds[i] = o->kinds ? o->kinds[i] : i % (size_t)s->num_parts ? RF_CACHE_MLP : RF_CACHE_SELF;
    }
    s->timesteps = f;
    s->temb_change = f + steps;
    s->part_kinds = kinds;
}

static void measure(const sim_result *r, const sim_options *o, signal_set *now, int step, rf_signal signal) {
    if (!(r->layout.signals >> signal & 1)) return;
    memset(now->values[signal], 0, sizeof now->values[signal]);
    if (o->measure) {
        o->measure(o->user, step, signal, now->values[signal]);
    } else {
        sim_set_rel1(now->values[signal], 0.1);
        if (signal == RF_SIGNAL_VERIFY) {
            for (int b = 0; b < 2; b++) now->values[signal][b][0] = 0.1f * (float)(r->shape.tokens * r->shape.width);
        }
        if (signal == RF_SIGNAL_SPAN_NORMS) {
            for (int b = 0; b < 2; b++) now->values[signal][b][0] = 1.1f * (float)r->shape.tokens;
        }
    }
    now->steps[signal] = step;
}

static void measure_set(const sim_result *r, const sim_options *o, signal_set *now, int step, uint32_t set) {
    for (int i = 0; i < RF_SIGNAL_COUNT; i++) {
        if (set >> i & 1) measure(r, o, now, step, (rf_signal)i);
    }
}

static void measure_curvature(const sim_result *r, const sim_options *o, signal_set *now, int step) {
    if (!(r->layout.signals >> RF_SIGNAL_CURVATURE & 1)) return;
    memset(now->drift, 0, sizeof now->drift);
    int streams = r->shape.num_streams > 1 ? r->shape.num_streams : 1;
    for (int i = 0; i < 2 * streams; i++) {
        if (o->drift && i % 2 < r->shape.branches)
            o->drift(o->user, step, i, now->drift[i], r->layout.curvature.horizon);
    }
    now->steps[RF_SIGNAL_CURVATURE] = step;
}

static void zero_plan(rf_step_plan *p, size_t parts) {
    uint8_t *kinds = p->parts;
    int32_t *rows = p->rows;
    memset(kinds, 0, parts);
    memset(rows, 0, parts * sizeof *rows);
    *p = (rf_step_plan){.parts = kinds, .rows = rows, .statistic = NAN, .threshold = NAN};
}

static void run_steps(sim_result *r, const sim_options *o) {
    const rf_policy_def *def = rf_policy_get_def(r->policy);
    size_t parts = (size_t)r->shape.num_blocks * (size_t)r->shape.num_parts;
    void *state = need(calloc(1, def->state_bytes + 1));
    bool *filled = need(calloc(parts, sizeof *filled));
    int stored[RF_CACHE_MAX_TERMS] = {0}, num_stored = 0;
    if (o->carried < 0) { /* one snapshot of everything */
        stored[0] = o->carried;
        num_stored = 1;
        memset(filled, true, parts * sizeof *filled);
    }
    signal_set *now = need(malloc(2 * sizeof *now)), *host = now + 1;
    for (int i = 0; i < RF_SIGNAL_COUNT; i++) {
        now->steps[i] = -1;
        for (int j = 0; j < 8; j++) now->values[i][j / 4][j % 4] = NAN;
    }
    for (int i = 0; i < 2 * RF_CACHE_MAX_STREAMS * RF_CACHE_MAX_HORIZON; i++)
        now->drift[i / RF_CACHE_MAX_HORIZON][i % RF_CACHE_MAX_HORIZON] = NAN;
    *host = *now;

    r->steps = need(calloc((size_t)r->num_steps, sizeof *r->steps));
    for (int step = 0; step < r->num_steps; step++) {
        sim_step *at = &r->steps[step];
        at->plan.parts = need(calloc(parts, 1));
        at->plan.rows = need(calloc(parts, sizeof(int32_t)));
        zero_plan(&at->plan, parts);
        rf_step_ctx ctx = {
            .shape = &r->shape,
            .layout = &r->layout,
            .step = step,
            .force_full = o->force_full && o->force_full[step],
            .num_stored = num_stored,
            .stored = stored,
            .carried = o->carried < 0,
            .signals = (const float(*)[2][4])host->values,
            .signal_steps = host->steps,
            .drift = (const float(*)[RF_CACHE_MAX_HORIZON])host->drift,
        };
        if (step > 0) measure_set(r, o, now, step, START_SIGNALS);
        memcpy(host->steps, now->steps,
               sizeof host->steps); /* the host knows what has been measured, not what came out */
        if (!r->layout.is_static) {
            at->read_back = !def->wants_signals || def->wants_signals(r->policy, state, &ctx);
            r->num_read_backs += at->read_back;
            if (at->read_back || o->read_always) *host = *now;
        }
        def->plan(r->policy, state, &ctx, &at->plan);
        CHECK_PLAN(!ctx.force_full || at->plan.kind == RF_STEP_FULL, "kind %d where FULL is forced", at->plan.kind);
        if (at->plan.kind == RF_STEP_PROBE) {
            CHECK_PLAN(r->layout.probe_blocks > 0, "PROBE, but the layout has no probe");
            CHECK_PLAN(num_stored > 0, "PROBE with nothing to compare to");
            at->probed = true;
            measure(r, o, now, step, RF_SIGNAL_PROBE);
            *host = *now;
            zero_plan(&at->plan, parts);
            def->plan_probe(r->policy, state, &ctx, &at->plan);
            CHECK_PLAN(at->plan.kind != RF_STEP_PROBE, "PROBE after a probe");
        }
        check_plan(r, o, step, &at->plan, at->probed, num_stored, num_stored ? stored[0] : -1, filled);
        at->kind = at->plan.kind;
        at->signature = sign_plan(r, &at->plan);
        if (at->kind == RF_STEP_FULL) {
            r->num_full++;
            if (num_stored > 0 && stored[0] < 0) num_stored = 0; /* what was carried goes */
            if (num_stored > 0) measure_set(r, o, now, step, REFRESH_SIGNALS);
            measure(r, o, now, step, RF_SIGNAL_OUTPUT_SIZE);
            memmove(stored + 1, stored, sizeof stored - sizeof stored[0]);
            stored[0] = step;
            num_stored++;
            if (num_stored >= 3) measure_curvature(r, o, now, step);
        } else if (at->kind == RF_STEP_PARTIAL) {
            r->num_partial++;
        } else {
            r->num_skip++;
        }
        if (at->plan.verify) measure(r, o, now, step, RF_SIGNAL_VERIFY);
    }
    free(now);
    free(filled);
    free(state);
}

rf_status sim_try(sim_result *out, const sim_options *options, rf_error *err) {
    sim_result *r = out;
    *r = (sim_result){0};
    set_up_shape(r, options);
    rf_status st = RF_OK;
    if (options->calibration) {
        st = rf_json_parse(&r->calibration, options->calibration, strlen(options->calibration), "cache.json", err);
        if (st == RF_OK) r->shape.calibration = rf_json_root(r->calibration);
    }
    if (st == RF_OK) st = rf_policy_create(&r->policy, options->policy, err);
    if (st == RF_OK && options->options) st = rf_policy_set(r->policy, options->options, err);
    if (st == RF_OK) st = rf_policy_get_def(r->policy)->setup(r->policy, &r->shape, &r->layout, err);
    if (st != RF_OK) return st;
    /* what setup was given must not be looked at again */
    r->shape.calibration = NULL;
    check_layout(r);
    r->layout_signature = sign_layout(&r->layout);
    run_steps(r, options);
    return RF_OK;
}

void sim_run(sim_result *out, const sim_options *options) {
    rf_error err = {0};
    rf_status st = sim_try(out, options, &err);
    ck_assert_msg(st == RF_OK, "%s (%s): %s", options->policy, options->options ? options->options : "", err.message);
}

void sim_free(sim_result *r) {
    for (int i = 0; r->steps && i < r->num_steps; i++) {
        free(r->steps[i].plan.parts);
        free(r->steps[i].plan.rows);
        free(r->steps[i].signature);
    }
    free(r->steps);
    free(r->layout_signature);
    free(r->arrays);
    rf_free(r->layout.tables);
    rf_policy_destroy(r->policy);
    rf_json_close(r->calibration);
    *r = (sim_result){0};
}

/* ---- results ---- */

int sim_full_steps(const sim_result *r, int *list) {
    int num = 0;
    for (int i = 0; i < r->num_steps; i++) {
        if (r->steps[i].kind == RF_STEP_FULL) list[num++] = i;
    }
    return num;
}

void sim_assert_full_list(const sim_result *r, const int *want, int num_want) {
    grow got = {0}, wanted = {0};
    add(&got, "FULL at");
    add(&wanted, "FULL at");
    for (int i = 0; i < r->num_steps; i++) {
        if (r->steps[i].kind == RF_STEP_FULL) add(&got, " %d", i);
    }
    for (int i = 0; i < num_want; i++) add(&wanted, " %d", want[i]);
    ck_assert_str_eq(got.text, wanted.text);
    free(got.text);
    free(wanted.text);
}

int sim_first_difference(const sim_result *a, const sim_result *b) {
    for (int i = 0; i < a->num_steps && i < b->num_steps; i++) {
        if (strcmp(a->steps[i].signature, b->steps[i].signature) != 0) return i;
    }
    if (a->num_steps != b->num_steps) return a->num_steps < b->num_steps ? a->num_steps : b->num_steps;
    return strcmp(a->layout_signature, b->layout_signature) ? a->num_steps : -1;
}

bool sim_same(const sim_result *a, const sim_result *b) {
    return sim_first_difference(a, b) < 0;
}

/* ---- signals ---- */

void sim_set_rel1(float out[2][4], double rel1) {
    for (int b = 0; b < 2; b++) {
        out[b][0] = (float)rel1;
        out[b][1] = 1;
        out[b][2] = (float)(rel1 * rel1);
        out[b][3] = 1;
    }
}

double sim_noise(unsigned seed, int step, int signal, int branch) {
    uint64_t z = ((uint64_t)seed << 40) + ((uint64_t)(unsigned)step << 16) + ((uint64_t)(unsigned)signal << 8) +
                 (uint64_t)(unsigned)branch;
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}
