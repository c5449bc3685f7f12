/* caching/cache.c - the planning side of the runtime: memory, groups, read-backs, counters, trace.
 *
 * Rings. Every ring is [slots][G][N][columns]; slot_of says where image i's n-th push goes. Weights come from a policy by age and go to
 * the device by slot, so a batch whose images have different histories still reads one ring with one kernel.
 * Carry. Nothing is copied from run to run: what is carried stays in its slot, and is history while the image has stored nothing else.
 * Groups. Two images are in one group if their plans have the same structure (weights may differ). A kind of step is known by the
 * hash of that structure: what a captured graph depends on. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "caching/cache_internal.h"
#include "caching/trace.h"
#include "core/arena.h"
#include "core/memory.h"

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* --- layout -------------------------------------------------------------------------------------------------------------- */

static rf_status refuse_carry(const rf_cache *c, rf_error *err) {
    char list[256] = "";
    for (int i = 0; i < rf_policy_count(); i++) {
        const rf_policy_def *def = rf_policy_at(i);
        size_t used = strlen(list);
        if (def->carries) snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", def->name);
    }
    return rf_fail(err, RF_ERR_UNSUPPORTED, "policy %s keeps no history between frames (those that do: %s)",
                   c->def->name, list);
}

/* What a policy may declare and the runtime cannot do is a mistake in the policy: found here, not in the loop. */
static rf_status check_layout(const rf_cache *c, rf_error *err) {
    const rf_cache_layout *l = &c->layout;
    const char *what = NULL;
    int part_depth = 0, span_depth = 0;
    for (int k = 0; k < RF_CACHE_NUM_KINDS; k++) {
        if (l->part_depth[k] == 0) continue;
        if (part_depth != 0 && l->part_depth[k] != part_depth) what = "part rings of different depths";
        part_depth = l->part_depth[k];
        if (part_depth < 0 || rf_cache_slots(c, part_depth) > RF_MAX_TERMS) what = "a part ring deeper than 8";
    }
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++) {
        const rf_cache_span *s = &l->spans[i];
        if (s->depth == 0) continue;
        if (s->begin < 0 || s->end > c->shape.num_blocks || s->begin >= s->end) what = "an empty span";
        if (span_depth != 0 && s->depth != span_depth) what = "spans of different depths";
        span_depth = s->depth;
    }
    if (span_depth < 0 || rf_cache_slots(c, span_depth) > RF_CACHE_MAX_TERMS || l->output_depth < 0 ||
        rf_cache_slots(c, l->output_depth) > RF_CACHE_MAX_TERMS)
        what = "a ring deeper than 64";
    if (l->curvature.used && (l->output_depth != 3 || l->output_delta || l->num_classes != RF_CACHE_MAX_CLASSES ||
                              l->curvature.horizon < 0 || l->curvature.horizon > RF_CACHE_MAX_HORIZON))
        what = "curvature without three plain outputs and three classes";
    if (l->num_classes < 0 || l->num_classes > RF_CACHE_MAX_CLASSES) what = "too many classes";
    if (l->tokens.used && part_depth != 1) what = "token rows without part rings of depth 1";
    if (l->probe_blocks < 0 || l->probe_blocks > c->shape.num_blocks) what = "a probe longer than the model";
    if (what != NULL) return rf_fail(err, RF_ERR_STATE, "policy %s asks for %s", c->def->name, what);
    if (c->options.carry != RF_CARRY_OFF && !c->def->carries) return refuse_carry(c, err);
    if (l->never_refreshes && c->options.max_drift > 0)
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "policy %s computes no full step after the first: there is nothing for a drift guard to check",
                       c->def->name);
    return RF_OK;
}

/* Token rows: a score from the block's attention, one choice for all its parts. */
static rf_status check_row_blocks(const rf_cache *c, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    for (int b = 0; b < s->num_blocks; b++) {
        int num[RF_CACHE_NUM_KINDS] = {0}, num_parts = 0;
        for (int p = 0; p < s->num_parts; p++) {
            int at = b * s->num_parts + p;
            if (c->site_of[at] < 0) continue;
            num[s->part_kinds[at]]++;
            num_parts++;
        }
        bool fits = num[RF_CACHE_SELF] == 1 && num[RF_CACHE_MLP] >= 1 &&
                    num_parts == 1 + num[RF_CACHE_MLP] + num[RF_CACHE_TEMPORAL];
        if (num_parts > 0 && !fits)
            return rf_fail(err, RF_ERR_UNSUPPORTED,
                           "policy %s: token rows need blocks of one self-attention and MLPs, block %d is not",
                           c->def->name, b);
    }
    if (c->layout.tokens.attention_rows && c->options.max_drift > 0 && s->batch > 1)
        return rf_fail(
            err, RF_ERR_UNSUPPORTED,
            "policy %s: the drift guard with renewed attention rows works on one picture at a time (--batch 1)",
            c->def->name);
    return RF_OK;
}

/* Rings of parts. */
static rf_status map_sites(rf_cache *c, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    int parts = s->num_blocks * s->num_parts;
    c->site_of = rf_alloc((size_t)parts * sizeof(int));
    c->attention_of = rf_alloc((size_t)s->num_blocks * sizeof(int));
    if (c->site_of == NULL || c->attention_of == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache");
    c->last_part = -1;
    for (int i = 0; i < parts; i++) {
        int kind = s->part_kinds[i], depth = kind < RF_CACHE_NUM_KINDS ? c->layout.part_depth[kind] : 0;
        c->site_of[i] = -1;
        if (depth == 0) continue;
        c->part_depth = depth;
        c->site_of[i] = c->num_sites++;
        c->last_part = i;
    }
    for (int b = 0; b < s->num_blocks; b++) {
        c->attention_of[b] = -1;
        for (int p = 0; p < s->num_parts; p++)
            if (s->part_kinds[b * s->num_parts + p] == RF_CACHE_SELF && c->attention_of[b] < 0)
                c->attention_of[b] = c->num_attention++;
    }
    return c->layout.tokens.used ? check_row_blocks(c, err) : RF_OK;
}

/* The streams of the output, as policies with classes of rows see them. */
static rf_status map_streams(rf_cache *c, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    c->num_streams = s->num_streams > 0 ? s->num_streams : 1;
    c->class_cells = 1;
    if (c->num_streams > RF_CACHE_MAX_STREAMS)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%d streams of an output, at most %d", s->num_streams,
                       RF_CACHE_MAX_STREAMS);
    rf_cache_stream *streams = rf_alloc((size_t)c->num_streams * sizeof *streams);
    if (streams == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache");
    c->streams = streams;
    int64_t area = 0, unit = s->out_cols;
    for (int i = 0; i < c->num_streams; i++) {
        rf_cache_stream all = {0, s->tokens, 0, s->pred_cols}, *to = &streams[i];
        *to = s->num_streams > 0 ? s->streams[i] : all;
        if (to->col_begin == 0 && to->col_end == 0) to->col_end = s->pred_cols;
        bool fits = to->row_begin >= 0 && to->row_begin < to->row_end && to->row_end <= s->tokens &&
                    to->col_begin >= 0 && to->col_begin < to->col_end && to->col_end <= s->pred_cols;
        for (int j = 0; j < i; j++)
            fits &= to->row_end <= streams[j].row_begin || streams[j].row_end <= to->row_begin ||
                    to->col_end <= streams[j].col_begin || streams[j].col_end <= to->col_begin;
        if (!fits)
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "stream %d of the output is rows %lld..%lld, columns %lld..%lld of %lld x %lld, or meets "
                           "another",
                           i, (long long)to->row_begin, (long long)to->row_end, (long long)to->col_begin,
                           (long long)to->col_end, (long long)s->tokens, (long long)s->pred_cols);
        area += (to->row_end - to->row_begin) * (to->col_end - to->col_begin);
        const int64_t edges[] = {to->col_begin, to->col_end};
        for (int e = 0; e < 2; e++)
            for (int64_t a = edges[e] < s->pred_cols ? edges[e] : 0; a != 0;) { /* unit = gcd(unit, a) */
                int64_t rest = unit % a;
                unit = a;
                a = rest;
            }
    }
    if (area != s->tokens * s->pred_cols)
        return rf_fail(err, RF_ERR_ARGUMENT, "the streams of the output leave some of its %lld rows x %lld columns out",
                       (long long)s->tokens, (long long)s->pred_cols);
    c->class_cells = s->out_cols / unit;
    return RF_OK;
}

/* --- memory -------------------------------------------------------------------------------------------------------------- */

block_view rf_cache_block_view(const rf_cache *c, char *base) {
    size_t groups = (size_t)c->all_groups, at = 0;
    block_view v;
    struct {
        void **slot;
        size_t count;
    } list[] = {
        {(void **)&v.index, groups},
        {(void **)&v.samples, (size_t)c->shape.batch},
        {(void **)&v.image_of, groups},
        {(void **)&v.write_output, groups},
        {(void **)&v.write_span, groups},
        {(void **)&v.write_part, groups},
        {(void **)&v.newest_span, groups},
        {(void **)&v.write_probe, groups},
        {(void **)&v.newest_probe, groups},
        {(void **)&v.ages, 3 * groups},
        {(void **)&v.gaps, 2 * groups},
        {(void **)&v.counts, (size_t)c->num_attention + 1}, /* and the step, for random selection */
        {(void **)&v.weights, groups * (size_t)c->num_classes * (size_t)c->num_slots},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        *list[i].slot = base ? base + at : NULL;
        at += (list[i].count * 4 + 15) / 16 * 16;
    }
    return v;
}

static size_t block_size(const rf_cache *c) {
    char *origin = (char *)64; /* sizes only */
    block_view v = rf_cache_block_view(c, origin);
    size_t weights = (size_t)c->all_groups * (size_t)c->num_classes * (size_t)c->num_slots * 4;
    return (size_t)((char *)v.weights - origin) + (weights + 15) / 16 * 16;
}

/* Every buffer, once counting and once for real. Zero counts are not handed out. */
static rf_status take_buffers(rf_cache *c, rf_arena *arena, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    const rf_cache_layout *l = &c->layout;
    device_buffers *d = &c->d;
    size_t feature = rf_dtype_bytes(c->dtypes.feature_dtype), residual = rf_dtype_bytes(c->dtypes.residual_dtype);
    size_t groups = (size_t)c->all_groups, rows = groups * (size_t)s->tokens;
    size_t hidden = rows * (size_t)s->width, outputs = rows * (size_t)s->out_cols;
    size_t inputs = (size_t)s->batch * (size_t)s->tokens * (size_t)s->in_cols;
    uint32_t m = c->signals;
    bool in_step = m >> RF_SIGNAL_INPUT_STEP & 1, in_refresh = m >> RF_SIGNAL_INPUT_REFRESH & 1;
    bool probe = l->probe_blocks > 0, verify = m >> RF_SIGNAL_VERIFY & 1;
    bool spans = l->spans[0].depth > 0 || l->spans[1].depth > 0;
    bool measures = m != 0;
    bool lse = l->tokens.used && !l->tokens.value_score && !l->tokens.random;
    size_t scratch = measures ? (spans || c->num_sites ? hidden : 0) : 0;
    if (measures && outputs > scratch && l->output_depth > 0) scratch = outputs;
    size_t sites = (size_t)c->num_sites, choices = l->tokens.used ? (size_t)c->num_attention : 0;
    struct {
        void **slot;
        const char *name;
        size_t count, elem_bytes;
    } list[] = {
        {(void **)&d->block, "step block", c->block_bytes, 1},
        {(void **)&d->identity, "group numbers", groups, 4},
        {(void **)&d->input, "model input", in_step || in_refresh || l->output_delta ? inputs : 0, 4},
        {(void **)&d->input_prev, "earlier model input", in_step ? inputs : 0, 4},
        {(void **)&d->input_ref, "stored model input", in_refresh ? inputs : 0, 4},
        {&d->modulated_prev, "earlier modulated input", m >> RF_SIGNAL_MODULATED_STEP & 1 ? hidden : 0, feature},
        {(void **)&d->output_ring, "outputs", outputs * (size_t)rf_cache_slots(c, l->output_depth), 4},
        {(void **)&d->output_ref, "stored output", m >> RF_SIGNAL_OUTPUT_REFRESH & 1 ? outputs : 0, 4},
        {&d->span_ring[0], "span", hidden * (size_t)rf_cache_slots(c, l->spans[0].depth), feature},
        {&d->span_ring[1], "second span", hidden * (size_t)rf_cache_slots(c, l->spans[1].depth), feature},
        {&d->span_in[0], "span input", l->spans[0].depth && l->spans[0].delta ? hidden : 0, residual},
        {&d->span_in[1], "second span input", l->spans[1].depth && l->spans[1].delta ? hidden : 0, residual},
        {&d->part_ring, "part outputs", hidden * sites * (size_t)rf_cache_slots(c, c->part_depth), feature},
        {&d->probe_in, "probe input", probe ? hidden : 0, residual},
        {&d->probe_x, "probe state", probe ? hidden : 0, residual},
        {&d->probe_now, "probe residual", probe ? hidden : 0, feature},
        {&d->probe_ref, "stored probe residual", probe ? hidden * (size_t)rf_cache_slots(c, 1) : 0, feature},
        {&d->scratch[0], "scratch", scratch, 4},
        {&d->scratch[1], "second scratch", measures && spans ? hidden : 0, 4},
        {&d->verify[0], "computed state", verify ? hidden : 0, residual},
        {&d->verify[1], "predicted state", verify ? hidden : 0, residual},
        {(void **)&d->signals, "signals", c->signal_floats, 4},
        {(void **)&d->post_count, "post counter", 1, 4},
        {(void **)&d->reduce_workspace, "reduction workspace", measures ? groups * 256 * 4 : 0, 4},
        {(void **)&d->curvature_workspace, "curvature workspace",
         l->curvature.used ? rf_curvature_workspace_bytes(c->all_groups, s->tokens) : 0, 1},
        {(void **)&d->kappa, "curvature", l->curvature.used ? rows * (size_t)c->num_streams : 0, 4},
        {(void **)&d->row_class, "row classes", l->curvature.used ? rows * (size_t)c->class_cells : 0, 1},
        {(void **)&d->row_scores, "row scores", l->tokens.used ? rows * (size_t)c->num_attention : 0, 4},
        {(void **)&d->ages, "row ages", rows * choices, 4},
        {(void **)&d->select_workspace, "selection workspace", rows * choices, 4},
        {(void **)&d->score_workspace, "score workspace",
         l->tokens.used && !l->tokens.random
             ? rf_row_score_workspace_bytes(c->all_groups, s->tokens, c->dtypes.num_heads)
             : 0,
         1},
        {(void **)&d->lse, "log-sum-exp", lse ? rows * (size_t)c->dtypes.num_heads : 0, 4},
        {(void **)&d->rows_packed, "row lists", rows * choices, 4},
        {(void **)&d->rows_state, "row lists in state", rows * choices, 4},
        {(void **)&d->place, "row places", rows * choices, 4},
        {&d->qkv, "queries, keys, values", l->tokens.attention_rows ? 3 * hidden * (size_t)c->num_attention : 0,
         feature},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        *list[i].slot = NULL;
        if (list[i].count == 0) continue;
        RF_TRY(rf_arena_take(arena, list[i].slot, list[i].name, list[i].count, list[i].elem_bytes, err));
    }
    return RF_OK;
}

static rf_status allocate_device(rf_cache *c, rf_error *err) {
    rf_backend *backend = rf_stream_backend(c->stream);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    RF_TRY(take_buffers(c, &arena, err));
    if (arena.overflow) return rf_fail(err, RF_ERR_ARGUMENT, "the cache of this batch does not fit any address space");
    RF_TRY(rf_backend_alloc(backend, &c->memory, arena.peak, err));
    c->memory_bytes = arena.peak;
    rf_arena_init(&arena, c->memory, c->memory_bytes);
    RF_TRY(take_buffers(c, &arena, err));
    c->on_device = rf_cache_block_view(c, c->d.block);

    c->staging_blocks = 2 * c->shape.num_steps + 8;
    RF_TRY(rf_backend_alloc_pinned(backend, (void **)&c->staging, (size_t)c->staging_blocks * c->block_bytes, err));
    RF_TRY(rf_backend_alloc_pinned(backend, (void **)&c->history,
                                   (size_t)c->shape.num_steps * c->signal_floats * sizeof(float) + 64, err));
    c->host_count = (int32_t *)(void *)(c->history + (size_t)c->shape.num_steps * c->signal_floats);
    *c->host_count = 0;
    memset(c->staging, 0, (size_t)c->staging_blocks * c->block_bytes);
    RF_TRY(rf_stream_zero(c->stream, c->memory, c->memory_bytes, err));
    int32_t *numbers = (int32_t *)(void *)c->staging;
    for (int g = 0; g < c->all_groups; g++) numbers[g] = g;
    RF_TRY(rf_stream_upload(c->stream, c->d.identity, numbers, (size_t)c->all_groups * 4, err));
    return rf_stream_synchronize(c->stream, err);
}

static rf_status allocate_host(rf_cache *c, rf_error *err) {
    size_t batch = (size_t)c->shape.batch, plans = batch * (size_t)c->shape.num_steps;
    size_t parts = (size_t)c->shape.num_blocks * (size_t)c->shape.num_parts;
    c->states = rf_alloc_zero(batch, c->def->state_bytes ? c->def->state_bytes : 1);
    c->images = rf_alloc_zero(batch, sizeof *c->images);
    c->plans = rf_alloc_zero(plans, sizeof *c->plans);
    c->plan_parts = rf_alloc_zero(plans, parts);
    c->plan_rows = rf_alloc_zero(plans, parts * sizeof *c->plan_rows);
    c->plan_forced = rf_alloc_zero(plans, sizeof *c->plan_forced);
    c->plan_carried = rf_alloc_zero(plans, sizeof *c->plan_carried);
    c->plan_measured = rf_alloc_zero(plans, sizeof *c->plan_measured);
    c->kinds = rf_alloc_zero(plans, 1);
    c->groups = rf_alloc_zero(2 * batch, sizeof *c->groups);
    c->members = rf_alloc_zero(2 * batch * batch, sizeof *c->members);
    c->last_block = rf_alloc_zero(1, c->block_bytes);
    if (!c->states || !c->images || !c->plans || !c->plan_parts || !c->plan_rows || !c->plan_forced ||
        !c->plan_carried || !c->plan_measured || !c->kinds || !c->groups || !c->members || !c->last_block)
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache of %d steps", c->shape.num_steps);
    for (size_t i = 0; i < batch; i++) c->images[i].state = (char *)c->states + i * c->def->state_bytes;
    for (size_t i = 0; i < plans; i++) {
        c->plans[i].parts = c->plan_parts + i * parts;
        c->plans[i].rows = c->plan_rows + i * parts;
    }
    return RF_OK;
}

static void *copy_of(const void *data, size_t bytes) {
    void *copy = data ? rf_alloc(bytes) : NULL;
    if (copy != NULL) memcpy(copy, data, bytes);
    return copy;
}

rf_status rf_cache_check(const rf_policy *policy, const rf_cache_shape *shape, rf_error *err) {
    rf_cache_layout layout = {0};
    rf_status st = rf_policy_get_def(policy)->setup(policy, shape, &layout, err);
    rf_free(layout.tables);
    return st;
}

rf_status rf_cache_create(rf_cache **out, const rf_policy *policy, const rf_cache_shape *shape,
                          const rf_cache_dtypes *dtypes, const rf_cache_options *options, rf_stream *stream,
                          rf_error *err) {
    *out = NULL;
    rf_cache *c = rf_alloc_zero(1, sizeof *c);
    if (c == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache");
    c->policy = policy;
    c->def = rf_policy_get_def(policy);
    c->shape = *shape;
    c->dtypes = *dtypes;
    c->options = *options;
    c->stream = stream;
    c->ops = rf_ops_for(rf_stream_backend(stream));
    c->all_groups = (int)shape->batch * shape->branches;
    size_t steps = (size_t)shape->num_steps;
    c->shape.timesteps = copy_of(shape->timesteps, steps * sizeof(float));
    c->shape.temb_change = copy_of(shape->temb_change, steps * sizeof(float));
    c->shape.part_kinds = copy_of(shape->part_kinds, (size_t)shape->num_blocks * (size_t)shape->num_parts);
    rf_status st = RF_OK;
    if ((shape->timesteps && !c->shape.timesteps) || (shape->temb_change && !c->shape.temb_change) ||
        !c->shape.part_kinds)
        st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache");
    if (st == RF_OK) st = c->def->setup(policy, &c->shape, &c->layout, err);
    if (st == RF_OK) st = check_layout(c, err);
    if (st == RF_OK) st = map_sites(c, err);
    if (st == RF_OK) st = map_streams(c, err);
    c->shape.num_streams = c->num_streams;
    c->shape.streams = c->streams;
    if (st == RF_OK) {
        const rf_cache_layout *l = &c->layout;
        c->num_classes = l->num_classes > 1 ? l->num_classes : 1;
        int depth = c->part_depth > l->output_depth ? c->part_depth : l->output_depth;
        for (int i = 0; i < RF_CACHE_MAX_SPANS; i++)
            if (l->spans[i].depth > depth) depth = l->spans[i].depth;
        c->num_slots = depth > 0 ? rf_cache_slots(c, depth) : 1;
        c->horizon = l->curvature.used ? l->curvature.horizon : 0;
        c->signals = l->signals;
        if (options->record || options->max_drift > 0) c->signals |= 1u << RF_SIGNAL_DRIFT;
        c->reads = options->record || options->max_drift > 0 || !l->is_static;
        c->signal_floats = (size_t)c->all_groups * (RF_SIGNAL_COUNT * 4 + (size_t)(c->num_streams * c->horizon));
        c->block_bytes = block_size(c);
        st = allocate_device(c, err);
    }
    if (st == RF_OK) st = allocate_host(c, err);
    c->shape.calibration = NULL; /* borrowed for setup only */
    if (st == RF_OK) st = rf_cache_begin(c, err);
    if (st == RF_OK)
        *out = c;
    else
        rf_cache_destroy(c);
    return st;
}

void rf_cache_destroy(rf_cache *c) {
    if (c == NULL) return;
    rf_backend *backend = rf_stream_backend(c->stream);
    rf_stream_synchronize(c->stream, NULL);
    rf_backend_free(backend, c->memory);
    rf_backend_free_pinned(backend, c->staging);
    rf_backend_free_pinned(backend, c->history);
    rf_free(c->layout.tables);
    rf_free((void *)c->shape.timesteps);
    rf_free((void *)c->shape.temb_change);
    rf_free((void *)c->shape.part_kinds);
    rf_free((void *)c->streams);
    rf_free(c->site_of);
    rf_free(c->attention_of);
    rf_free(c->states);
    rf_free(c->images);
    rf_free(c->plans);
    rf_free(c->plan_parts);
    rf_free(c->plan_rows);
    rf_free(c->plan_forced);
    rf_free(c->plan_carried);
    rf_free(c->plan_measured);
    rf_free(c->kinds);
    rf_free(c->groups);
    rf_free(c->members);
    rf_free(c->last_block);
    rf_free(c);
}

const rf_cache_layout *rf_cache_get_layout(const rf_cache *c) {
    return &c->layout;
}
const rf_cache_shape *rf_cache_get_shape(const rf_cache *c) {
    return &c->shape;
}
const rf_policy *rf_cache_get_policy(const rf_cache *c) {
    return c->policy;
}

const char *rf_cache_carry_name(rf_cache_carry carry) {
    static const char *const names[] = {"off", "first", "last"};
    return names[carry];
}

bool rf_cache_carry_from_name(const char *name, rf_cache_carry *out) {
    for (int i = RF_CARRY_OFF; i <= RF_CARRY_LAST; i++) {
        if (strcmp(name, rf_cache_carry_name((rf_cache_carry)i)) != 0) continue;
        *out = (rf_cache_carry)i;
        return true;
    }
    return false;
}

/* Is the newest of an image's history of an earlier run? Then it is all there is. */
static bool is_on_carried(const image_state *im) {
    return im->num_stored > 0 && im->stored[0] < 0;
}

/* FULL steps of the run. */
static int num_pushes(const image_state *im) {
    return is_on_carried(im) ? 0 : im->num_stored;
}

/* Slot of the run's n-th push, of -1 the carried snapshot. */
static int slot_of(const rf_cache *c, const image_state *im, int depth, int n) {
    if (depth < 1 || (n < 0 && !im->carried)) return 0;
    if (c->options.carry == RF_CARRY_FIRST) return n <= 0 ? 0 : 1 + (n - 1) % depth;
    return (int)((im->base + n) % depth);
}

/* The run goes on from where the one before stopped, by one snapshot. Its step: as if this run's steps followed that run's; the
 * first FULL step's stands where it is of use, in front of step 0. */
static void carry_over(const rf_cache *c, image_state *next, const image_state *last) {
    int pushes = num_pushes(last);
    if (c->options.carry == RF_CARRY_OFF || last->num_stored == 0) return;
    next->carried = true;
    next->num_stored = 1;
    next->stored[0] = last->stored[0] - c->shape.num_steps;
    if (c->options.carry == RF_CARRY_FIRST && pushes > 0) next->stored[0] = -1;
    next->base = last->base + pushes;
}

rf_status rf_cache_begin(rf_cache *c, rf_error *err) {
    size_t batch = (size_t)c->shape.batch;
    memset(c->states, 0, batch * c->def->state_bytes);
    for (size_t i = 0; i < batch; i++) {
        image_state next = {.state = c->images[i].state};
        carry_over(c, &next, &c->images[i]);
        for (int k = 0; k < RF_SIGNAL_COUNT; k++) next.signal_steps[k] = -1;
        c->images[i] = next;
    }
    memset(c->plan_measured, 0, batch * (size_t)c->shape.num_steps * sizeof *c->plan_measured);
    memset(c->kinds, RF_STEP_FULL, batch * (size_t)c->shape.num_steps);
    c->counts = (rf_cache_counts){.images = c->shape.batch, .steps = 0, .bytes = c->memory_bytes};
    c->staging_next = 0;
    c->last_valid = c->unread = c->unread_copy = c->measured = c->head_in = c->posted = false;
    c->num_groups = 0;
    c->step = -1;
    return RF_OK;
}

void rf_cache_forget(rf_cache *c) {
    for (int i = 0; i < (int)c->shape.batch; i++) c->images[i].num_stored = 0;
}

/* --- signals -------------------------------------------------------------------------------------------------------------- */

static float *history_at(const rf_cache *c, int step) {
    return c->history + (size_t)step * c->signal_floats;
}

/* A record of the history holds what the groups of a step measured and, in front of it, the signals at the start of the NEXT step, because
 * those are queued right behind the step: one copy brings both. */
static bool at_start(int signal) {
    return signal == RF_SIGNAL_INPUT_STEP || signal == RF_SIGNAL_MODULATED_STEP;
}

static const float *history_of(const rf_cache *c, int signal, int step) {
    return history_at(c, at_start(signal) ? step - 1 : step);
}

static rf_status download(rf_cache *c, int record, size_t num_floats, rf_error *err) {
    c->unread = c->unread_copy = true;
    return rf_stream_download(c->stream, history_at(c, record), c->d.signals, num_floats * sizeof(float), err);
}

/* An image's view of what was measured at the steps its marks name. The stream has been waited for. */
static void read_signals(rf_cache *c, int image) {
    image_state *im = &c->images[image];
    int64_t batch = c->shape.batch;
    for (int k = 0; k < RF_SIGNAL_COUNT; k++) {
        if (im->signal_steps[k] < 0) continue;
        const float *all = history_of(c, k, im->signal_steps[k]);
        for (int b = 0; b < c->shape.branches; b++) {
            /* the model's input is the same for both branches */
            bool shared = k == RF_SIGNAL_INPUT_STEP || k == RF_SIGNAL_INPUT_REFRESH;
            int64_t group = image + (shared ? 0 : b * batch);
            if (k != RF_SIGNAL_CURVATURE)
                memcpy(im->signals[k][b], all + ((int64_t)k * c->all_groups + group) * 4, 4 * sizeof(float));
            for (int i = 0; i < c->num_streams && k == RF_SIGNAL_CURVATURE; i++) {
                const float *drift = all + (int64_t)RF_SIGNAL_COUNT * c->all_groups * 4 +
                                     ((int64_t)i * c->all_groups + group) * c->horizon;
                memcpy(im->drift[2 * i + b], drift, (size_t)c->horizon * sizeof(float));
            }
        }
    }
}

/* Posts are seen as soon as they arrive; a copy, or a device that does not answer, is waited for with the stream (which also
 * says what went wrong). */
static rf_status wait_for_signals(rf_cache *c, rf_error *err) {
    double give_up = now_ms() + 2000;
    for (int spins = 1; !c->unread_copy; spins++) {
        if (__atomic_load_n(c->host_count, __ATOMIC_ACQUIRE) == c->num_posts) return RF_OK;
        if (spins % 4096 == 0 && now_ms() > give_up) break;
    }
    return rf_stream_synchronize(c->stream, err);
}

static rf_status read_back(rf_cache *c, rf_error *err) {
    c->waited = c->unread;
    if (c->unread) {
        RF_TRY(wait_for_signals(c, err));
        c->unread = c->unread_copy = false;
        c->counts.read_backs++;
    }
    for (int i = 0; i < (int)c->shape.batch; i++) read_signals(c, i);
    return RF_OK;
}

bool rf_cache_wants_post(const rf_cache *c, const rf_cache_group *group, bool next_head) {
    return c->reads && (next_head || (group != NULL && group->plan->kind != RF_STEP_SKIP));
}

void rf_cache_posted(rf_cache *c) {
    c->num_posts++;
    c->unread = c->posted = true;
}

bool rf_cache_wants_head(const rf_cache *c, bool *modulated) {
    *modulated = (c->signals >> RF_SIGNAL_MODULATED_STEP & 1) != 0;
    return *modulated || (c->signals >> RF_SIGNAL_INPUT_STEP & 1) != 0 || c->d.input != NULL;
}

static void mark(rf_cache *c, int image, rf_signal signal) {
    if ((c->signals >> signal & 1) == 0) return;
    c->images[image].signal_steps[signal] = c->step;
    c->plan_measured[(size_t)c->step * (size_t)c->shape.batch + (size_t)image] |= 1u << signal;
    if (!at_start(signal)) c->measured = true;
}

/* --- planning -------------------------------------------------------------------------------------------------------------- */

static size_t plan_index(const rf_cache *c, int step, int image) {
    return (size_t)step * (size_t)c->shape.batch + (size_t)image;
}

static rf_step_ctx context_of(const rf_cache *c, int image) {
    const image_state *im = &c->images[image];
    return (rf_step_ctx){.shape = &c->shape,
                         .layout = &c->layout,
                         .image = image,
                         .step = c->step,
                         .force_full = im->force,
                         .num_stored = im->num_stored,
                         .stored = im->stored,
                         .carried = im->carried,
                         .signals = im->signals,
                         .signal_steps = im->signal_steps,
                         .drift = im->drift};
}

static bool wants_signals(const rf_cache *c, int image) {
    const image_state *im = &c->images[image];
    if (c->options.max_drift > 0 && im->signal_steps[RF_SIGNAL_DRIFT] == c->step - 1 && c->step > 0) return true;
    if (c->layout.is_static) return false;
    rf_step_ctx ctx = context_of(c, image);
    return c->def->wants_signals == NULL || c->def->wants_signals(c->policy, im->state, &ctx);
}

/* Relative L2 of a prediction against what was computed: (.., .., sum (a-b)^2, sum b^2). What is not a number is too much. */
static double relative_drift(const float v[4]) {
    if (isnan(v[2]) || isnan(v[3])) return HUGE_VAL;
    return v[3] > 0 ? sqrt((double)v[2] / (double)v[3]) : v[2] > 0 ? HUGE_VAL : 0;
}

static double drift_of(const rf_cache *c, const image_state *im) {
    double worst = 0;
    for (int b = 0; b < c->shape.branches; b++) worst = fmax(worst, relative_drift(im->signals[RF_SIGNAL_DRIFT][b]));
    return worst;
}

/* Structure of a plan and of where an image's history stands: equal means the same kernels. */
static bool same_group(const rf_cache *c, const rf_cache_group *a, const rf_cache_group *b) {
    const rf_step_plan *p = a->plan, *q = b->plan;
    size_t parts = (size_t)c->shape.num_blocks * (size_t)c->shape.num_parts;
    if (p->kind != q->kind || p->produce != q->produce || p->span != q->span || p->verify != q->verify ||
        p->use_verified != q->use_verified || a->has_history != b->has_history ||
        a->measures_drift != b->measures_drift || a->reuses != b->reuses || a->resumed != b->resumed)
        return false;
    if (p->kind == RF_STEP_FULL || p->kind == RF_STEP_PROBE || p->produce == RF_PRODUCE_OUTPUT) return true;
    return memcmp(p->parts, q->parts, parts) == 0 && memcmp(p->rows, q->rows, parts * sizeof *p->rows) == 0;
}

static uint64_t hash_bytes(uint64_t h, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3ull;
    return h;
}

static uint64_t key_of(const rf_cache *c, const rf_cache_group *g) {
    const rf_step_plan *p = g->plan;
    int fields[] = {(int)p->kind,      (int)p->produce, p->span,
                    p->verify,         p->use_verified, g->num,
                    g->identity,       g->resumed,      g->has_history,
                    g->measures_drift, g->reuses,       c->part_depth > 0 ? g->slot : 0,
                    g->newest};
    size_t parts = (size_t)c->shape.num_blocks * (size_t)c->shape.num_parts;
    uint64_t h = hash_bytes(0xcbf29ce484222325ull, fields, sizeof fields);
    if (p->kind == RF_STEP_FULL || p->kind == RF_STEP_PROBE || p->produce == RF_PRODUCE_OUTPUT) return h;
    return hash_bytes(hash_bytes(h, p->parts, parts), p->rows, parts * sizeof *p->rows);
}

/* Part ring slot that an image's plan writes: a computed part of a PARTIAL step renews the newest snapshot. */
static int write_slot(const rf_cache *c, const image_state *im, const rf_step_plan *plan) {
    return slot_of(c, im, c->part_depth, num_pushes(im) - (plan->kind != RF_STEP_FULL && im->num_stored > 0));
}

static rf_cache_group group_of(const rf_cache *c, int image, bool resumed) {
    const rf_step_plan *plan = &c->plans[plan_index(c, c->step, image)];
    const image_state *im = &c->images[image];
    bool reuses = plan->num_terms == 1 && c->num_classes == 1 && plan->weights[0][0] == 1.0f;
    return (rf_cache_group){.plan = plan,
                            .resumed = resumed,
                            .has_history = im->num_stored > 0,
                            .measures_drift = plan->kind == RF_STEP_FULL && plan->num_terms > 0 &&
                                              (c->signals >> RF_SIGNAL_DRIFT & 1) != 0,
                            .reuses = reuses,
                            .slot = write_slot(c, im, plan),
                            .newest = slot_of(c, im, c->part_depth, num_pushes(im) - 1)};
}

static int *members_of(const rf_cache *c, int group) {
    return c->members + (size_t)group * (size_t)c->shape.batch;
}

/* Puts an image into one of the groups from `first` on, or opens a new one. */
static void join(rf_cache *c, int first, int image, bool resumed) {
    rf_cache_group mine = group_of(c, image, resumed);
    int at = first;
    while (at < c->num_groups && !same_group(c, &c->groups[at], &mine)) at++;
    if (at == c->num_groups) {
        c->groups[at] = mine;
        c->num_groups++;
    }
    rf_cache_group *g = &c->groups[at];
    if (g->slot != mine.slot) g->slot = -1;
    if (g->newest != mine.newest) g->newest = -1;
    members_of(c, at)[g->num++] = image;
}

static void finish_groups(rf_cache *c, int first) {
    for (int i = first; i < c->num_groups; i++) {
        rf_cache_group *g = &c->groups[i];
        g->groups = g->num * c->shape.branches;
        g->identity = g->num == (int)c->shape.batch; /* members are in ascending order */
        g->index = g->identity ? NULL : c->on_device.index;
        g->samples = g->identity ? NULL : c->on_device.samples;
        g->key = key_of(c, g);
    }
}

static void reset_plan(rf_cache *c, rf_step_plan *plan) {
    size_t parts = (size_t)c->shape.num_blocks * (size_t)c->shape.num_parts;
    uint8_t *dos = plan->parts;
    int32_t *rows = plan->rows;
    memset(dos, RF_DO_COMPUTE, parts);
    memset(rows, 0, parts * sizeof *rows);
    *plan = (rf_step_plan){.parts = dos, .rows = rows, .statistic = NAN, .threshold = NAN};
}

/* Rows that a block's DO_ROWS parts compute, 0 if it has none; -1 if they differ. */
static int32_t rows_of_block(const rf_cache *c, const rf_step_plan *p, int block) {
    int32_t rows = 0;
    for (int i = block * c->shape.num_parts; i < (block + 1) * c->shape.num_parts; i++) {
        if (p->parts[i] != RF_DO_ROWS || c->site_of[i] < 0) continue;
        if (rows != 0 && p->rows[i] != rows) return -1;
        rows = p->rows[i];
    }
    return rows;
}

/* A policy that plans what its layout does not hold is wrong; better said than computed. */
static rf_status check_plan(const rf_cache *c, const rf_step_plan *p, int image, rf_error *err) {
    const rf_cache_layout *l = &c->layout;
    const char *what = NULL;
    if (p->kind == RF_STEP_FULL) return RF_OK;
    if (p->kind == RF_STEP_PROBE) {
        if (l->probe_blocks == 0 || c->images[image].num_stored == 0) what = "a probe with nothing to compare to";
    } else if (p->produce == RF_PRODUCE_OUTPUT) {
        if (l->output_depth == 0) what = "an output from no ring";
    } else if (p->produce == RF_PRODUCE_SPAN) {
        if (p->span < 0 || p->span >= RF_CACHE_MAX_SPANS || l->spans[p->span].depth == 0) what = "a span from no ring";
    }
    if (p->kind != RF_STEP_PROBE && p->produce != RF_PRODUCE_NONE &&
        (p->num_terms < 1 || c->images[image].num_stored < 1))
        what = "a prediction without history";
    if (p->num_terms > c->num_slots || p->num_terms > c->images[image].num_stored) what = "more terms than snapshots";
    for (int i = 0; i < c->shape.num_blocks * c->shape.num_parts && what == NULL && p->produce != RF_PRODUCE_OUTPUT;
         i++) {
        if (p->parts[i] == RF_DO_COMPUTE || c->shape.part_kinds[i] == RF_CACHE_NO_PART) continue;
        if (c->site_of[i] < 0) what = "a part from no ring";
        if (p->parts[i] == RF_DO_ROWS && (!l->tokens.used || p->rows[i] < 1 || p->rows[i] >= c->shape.tokens))
            what = "token rows outside 1..tokens-1";
        if (p->parts[i] == RF_DO_ROWS && rows_of_block(c, p, i / c->shape.num_parts) < 0)
            what = "other rows of a part than of another of its block";
        if (p->parts[i] == RF_DO_ROWS && c->shape.part_kinds[i] == RF_CACHE_SELF && !l->tokens.attention_rows)
            what = "rows of an attention that keeps no keys";
    }
    if (what != NULL) return rf_fail(err, RF_ERR_STATE, "policy %s plans %s at step %d", c->def->name, what, c->step);
    return RF_OK;
}

rf_status rf_cache_plan(rf_cache *c, int step, int *num_groups, rf_error *err) {
    int batch = (int)c->shape.batch;
    double begin = now_ms();
    c->step = step;
    for (int i = 0; i < batch && step > 0; i++) {
        mark(c, i, RF_SIGNAL_INPUT_STEP);
        mark(c, i, RF_SIGNAL_MODULATED_STEP);
    }
    const uint32_t start_signals = 1u << RF_SIGNAL_INPUT_STEP | 1u << RF_SIGNAL_MODULATED_STEP;
    if (step > 0 && c->reads && !c->head_in && (c->signals & start_signals) != 0)
        RF_TRY(download(c, step - 1, 2 * (size_t)c->all_groups * 4, err));
    bool wants = false;
    c->waited = false;
    for (int i = 0; i < batch && !wants; i++) wants = wants_signals(c, i);
    if (wants) {
        double wait = now_ms();
        RF_TRY(read_back(c, err));
        begin += now_ms() - wait; /* the device finishing earlier steps is not the decision's cost */
    }
    c->num_groups = 0;
    for (int i = 0; i < batch; i++) {
        image_state *im = &c->images[i];
        size_t at = plan_index(c, step, i);
        im->force = wants && c->options.max_drift > 0 && step > 0 && im->signal_steps[RF_SIGNAL_DRIFT] == step - 1 &&
                    !(drift_of(c, im) <= c->options.max_drift);
        rf_step_ctx ctx = context_of(c, i);
        rf_step_plan *plan = &c->plans[at];
        reset_plan(c, plan);
        c->def->plan(c->policy, im->state, &ctx, plan);
        c->plan_forced[at] = im->force;
        c->plan_carried[at] = is_on_carried(im);
        RF_TRY(check_plan(c, plan, i, err));
        if (im->force && plan->kind != RF_STEP_FULL)
            return rf_fail(err, RF_ERR_STATE, "policy %s does not obey the drift guard at step %d", c->def->name, step);
        join(c, 0, i, false);
    }
    finish_groups(c, 0);
    *num_groups = c->num_groups;
    c->counts.decide_ms += now_ms() - begin;
    return RF_OK;
}

bool rf_cache_just_waited(const rf_cache *c) {
    return c->waited;
}

const rf_cache_group *rf_cache_group_at(const rf_cache *c, int group) {
    return &c->groups[group];
}

rf_status rf_cache_plan_probe(rf_cache *c, int group, int *first, int *num, rf_error *err) {
    rf_cache_group *probed = &c->groups[group];
    const int *members = members_of(c, group);
    for (int m = 0; m < probed->num; m++) mark(c, members[m], RF_SIGNAL_PROBE);
    c->posted = false; /* the probe's launch has posted; what follows measures more */
    RF_TRY(read_back(c, err));
    double begin = now_ms();
    *first = c->num_groups;
    for (int m = 0; m < probed->num; m++) {
        int i = members[m];
        rf_step_ctx ctx = context_of(c, i);
        rf_step_plan *plan = &c->plans[plan_index(c, c->step, i)];
        reset_plan(c, plan);
        c->def->plan_probe(c->policy, c->images[i].state, &ctx, plan);
        RF_TRY(check_plan(c, plan, i, err));
        if (plan->kind == RF_STEP_PROBE || plan->produce == RF_PRODUCE_OUTPUT)
            return rf_fail(err, RF_ERR_STATE, "policy %s plans a probe after its probe", c->def->name);
        join(c, *first, i, true);
    }
    finish_groups(c, *first);
    *num = c->num_groups - *first;
    c->counts.decide_ms += now_ms() - begin;
    return RF_OK;
}

/* --- the uploaded block ------------------------------------------------------------------------------------------------------ */

/* Token rows that a block computes; of a block that chooses none all or none, which is what ages its rows. */
static int32_t chosen_rows(const rf_cache *c, const rf_step_plan *plan, int block) {
    int32_t rows = plan->kind == RF_STEP_FULL ? 0 : rows_of_block(c, plan, block);
    if (rows > 0) return rows;
    for (int i = block * c->shape.num_parts; i < (block + 1) * c->shape.num_parts; i++)
        if (c->shape.part_kinds[i] == RF_CACHE_MLP)
            return plan->kind == RF_STEP_FULL || plan->parts[i] == RF_DO_COMPUTE ? (int32_t)c->shape.tokens : 0;
    return 0;
}

/* The host's side of what a group's work reads. A plan's weights are by age; the slots they mean are those of the ring it speaks of. */
static void fill_block(const rf_cache *c, const rf_cache_group *group, const int *members, const block_view *v) {
    const rf_cache_layout *l = &c->layout;
    int batch = (int)c->shape.batch, all = c->all_groups;
    int span = l->spans[0].depth ? l->spans[0].depth : l->spans[1].depth;
    for (int m = 0; m < group->num; m++) {
        int image = members[m];
        const image_state *im = &c->images[image];
        const rf_step_plan *plan = &c->plans[plan_index(c, c->step, image)];
        int pushes = num_pushes(im), ring = c->part_depth;
        if (plan->produce == RF_PRODUCE_OUTPUT || (c->part_depth == 0 && l->output_depth > 0)) ring = l->output_depth;
        if (plan->produce == RF_PRODUCE_SPAN || (c->part_depth == 0 && l->output_depth == 0)) ring = span;
        v->samples[m] = image;
        for (int b = 0; b < c->shape.branches; b++) {
            int packed = b * group->num + m, state = b * batch + image;
            v->index[packed] = state;
            v->image_of[packed] = image;
            v->write_output[packed] = slot_of(c, im, l->output_depth, pushes) * all + state;
            v->write_span[packed] = slot_of(c, im, span, pushes) * all + state;
            v->newest_span[packed] = slot_of(c, im, span, pushes - 1) * all + state;
            v->write_part[packed] = write_slot(c, im, plan) * all + state;
            v->write_probe[packed] = slot_of(c, im, 1, pushes) * all + state;
            v->newest_probe[packed] = slot_of(c, im, 1, pushes - 1) * all + state;
            for (int j = 0; j < 3 && l->curvature.used; j++)
                v->ages[3 * state + j] = pushes >= j ? slot_of(c, im, l->output_depth, pushes - j) : 0;
            if (pushes >= 2 && l->curvature.used) {
                const float *t = c->shape.timesteps;
                bool by_time = l->curvature.timestep_gaps && t != NULL;
                int newest = c->step, second = im->stored[0], third = im->stored[1];
                v->gaps[2 * state] = by_time ? t[second] - t[newest] : (float)(newest - second);
                v->gaps[2 * state + 1] = by_time ? t[third] - t[second] : (float)(second - third);
            }
            float *weights = v->weights + (size_t)state * (size_t)c->num_classes * (size_t)c->num_slots;
            for (int k = 0; k < c->num_classes; k++)
                for (int age = 0; age < plan->num_terms; age++)
                    weights[k * c->num_slots + slot_of(c, im, ring, pushes - 1 - age)] = plan->weights[k][age];
        }
    }
    for (int b = 0; b < c->shape.num_blocks && l->tokens.used; b++)
        if (c->attention_of[b] >= 0) v->counts[c->attention_of[b]] = chosen_rows(c, group->plan, b);
    if (l->tokens.random) v->counts[c->num_attention] = c->step;
}

rf_status rf_cache_upload(rf_cache *c, int group, rf_error *err) {
    if (c->staging_next == c->staging_blocks) { /* more groups than blocks: the earliest uploads must be over */
        RF_TRY(rf_stream_synchronize(c->stream, err));
        c->staging_next = 0;
    }
    char *block = c->staging + (size_t)c->staging_next * c->block_bytes;
    memset(block, 0, c->block_bytes);
    block_view view = rf_cache_block_view(c, block);
    fill_block(c, &c->groups[group], members_of(c, group), &view);
    if (c->last_valid && memcmp(block, c->last_block, c->block_bytes) == 0) return RF_OK;
    memcpy(c->last_block, block, c->block_bytes);
    c->last_valid = true;
    c->staging_next++;
    return rf_stream_upload(c->stream, c->d.block, block, c->block_bytes, err);
}

/* --- after a group ------------------------------------------------------------------------------------------------------------ */

static void count_plan(rf_cache *c, const rf_step_plan *plan) {
    const rf_cache_shape *s = &c->shape;
    rf_cache_counts *n = &c->counts;
    bool full = plan->kind == RF_STEP_FULL;
    n->steps_full += full;
    n->steps_partial += plan->kind == RF_STEP_PARTIAL;
    n->steps_skipped += plan->kind == RF_STEP_SKIP;
    n->blocks_total += s->num_blocks;
    for (int b = 0; b < s->num_blocks; b++) {
        const rf_cache_span *span = &c->layout.spans[plan->span];
        bool skipped = !full && (plan->produce == RF_PRODUCE_OUTPUT ||
                                 (plan->produce == RF_PRODUCE_SPAN && b >= span->begin && b < span->end));
        bool verified = plan->verify && b == s->num_blocks - 1, whole = !skipped;
        for (int p = 0; p < s->num_parts; p++) {
            int i = b * s->num_parts + p;
            if (s->part_kinds[i] == RF_CACHE_NO_PART) continue;
            n->rows_total += s->tokens;
            if (skipped) continue;
            int64_t rows = full || verified || plan->parts[i] == RF_DO_COMPUTE ? s->tokens
                           : plan->parts[i] == RF_DO_ROWS                      ? plan->rows[i]
                                                                               : 0;
            n->rows_computed += rows;
            if (rows < s->tokens) whole = false;
        }
        n->blocks_computed += whole;
    }
}

rf_status rf_cache_group_done(rf_cache *c, int group, rf_error *err) {
    const rf_cache_group *g = &c->groups[group];
    const int *members = members_of(c, group);
    if (g->plan->kind == RF_STEP_PROBE) return RF_OK;
    for (int m = 0; m < g->num; m++) {
        int i = members[m];
        image_state *im = &c->images[i];
        const rf_step_plan *plan = &c->plans[plan_index(c, c->step, i)];
        c->kinds[(size_t)i * (size_t)c->shape.num_steps + (size_t)c->step] = (uint8_t)plan->kind;
        count_plan(c, plan);
        if (plan->verify) mark(c, i, RF_SIGNAL_VERIFY);
        if (plan->kind != RF_STEP_FULL) continue;
        if (g->measures_drift) mark(c, i, RF_SIGNAL_DRIFT);
        mark(c, i, RF_SIGNAL_OUTPUT_SIZE);
        if (g->has_history) {
            mark(c, i, RF_SIGNAL_OUTPUT_REFRESH);
            mark(c, i, RF_SIGNAL_INPUT_REFRESH);
            mark(c, i, RF_SIGNAL_SPAN_REFRESH);
            mark(c, i, RF_SIGNAL_SPAN_NORMS);
        }
        int pushes = num_pushes(im); /* a carried snapshot goes when there is one of this run */
        if (pushes >= 2) mark(c, i, RF_SIGNAL_CURVATURE);
        int kept = pushes < RF_CACHE_MAX_TERMS - 1 ? pushes : RF_CACHE_MAX_TERMS - 1;
        memmove(im->stored + 1, im->stored, (size_t)kept * sizeof *im->stored);
        im->stored[0] = c->step;
        im->num_stored = pushes + 1;
    }
    return RF_OK;
}

rf_status rf_cache_end_step(rf_cache *c, bool next_head, rf_error *err) {
    bool on_its_way = c->posted || !(c->measured || next_head);
    c->counts.steps++;
    c->measured = c->posted = false;
    c->head_in = next_head;
    return !on_its_way && c->reads ? download(c, c->step, c->signal_floats, err) : RF_OK;
}

rf_status rf_cache_end(rf_cache *c, rf_error *err) {
    c->unread = false;
    return RF_OK;
}

rf_cache_counts rf_cache_get_counts(const rf_cache *c) {
    return c->counts;
}

const uint8_t *rf_cache_step_kinds(const rf_cache *c) {
    return c->kinds;
}

/* --- trace --------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    float signals[RF_SIGNAL_COUNT][2][4];
    int steps[RF_SIGNAL_COUNT];
} image_signals;

/* What image i measured at a step, from the history. */
static void signals_at(const rf_cache *c, int step, int image, image_signals *out) {
    uint32_t measured = c->plan_measured[plan_index(c, step, image)];
    memset(out, 0, sizeof *out);
    for (int k = 0; k < RF_SIGNAL_COUNT; k++) {
        out->steps[k] = measured >> k & 1 ? step : -1;
        if (out->steps[k] < 0) continue;
        const float *all = history_of(c, k, step);
        for (int b = 0; b < c->shape.branches; b++) {
            bool shared = k == RF_SIGNAL_INPUT_STEP || k == RF_SIGNAL_INPUT_REFRESH;
            int64_t group = image + (shared ? 0 : b * c->shape.batch);
            const float *from = all + ((int64_t)k * c->all_groups + group) * 4;
            int num = 4;
            if (k == RF_SIGNAL_CURVATURE) {
                from = all + (int64_t)RF_SIGNAL_COUNT * c->all_groups * 4 + group * c->horizon;
                num = c->horizon < 4 ? c->horizon : 4;
            }
            memcpy(out->signals[k][b], from, (size_t)num * sizeof(float));
        }
    }
}

rf_status rf_cache_write_trace(const rf_cache *c, int first_image, rf_cache_line line, void *user, rf_error *err) {
    int batch = (int)c->shape.batch;
    rf_trace_image *images = rf_alloc((size_t)batch * sizeof *images);
    image_signals *signals = rf_alloc((size_t)batch * sizeof *signals);
    char *text = NULL;
    rf_status st = RF_OK;
    if (!images || !signals) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a trace");
    if (st == RF_OK) st = rf_trace_header(&text, c->policy, &c->shape, first_image, err);
    if (st == RF_OK) st = line(user, text, err);
    rf_free(text);
    for (int step = 0; step < (int)c->counts.steps && st == RF_OK; step++) {
        for (int i = 0; i < batch; i++) {
            size_t at = plan_index(c, step, i);
            signals_at(c, step, i, &signals[i]);
            images[i] = (rf_trace_image){.image = first_image + i,
                                         .plan = &c->plans[at],
                                         .forced = c->plan_forced[at],
                                         .carried = c->plan_carried[at],
                                         .has_drift = signals[i].steps[RF_SIGNAL_DRIFT] == step,
                                         .signals = (const float(*)[2][4])signals[i].signals,
                                         .signal_steps = signals[i].steps};
            for (int b = 0; b < c->shape.branches && images[i].has_drift; b++)
                images[i].drift[b] = relative_drift(signals[i].signals[RF_SIGNAL_DRIFT][b]);
        }
        text = NULL;
        st = rf_trace_step(&text, &c->shape, &c->layout, step, images, batch, err);
        if (st == RF_OK) st = line(user, text, err);
        rf_free(text);
    }
    rf_free(images);
    rf_free(signals);
    return st;
}
