/* dit/cached_step.c - a denoising step as a policy planned it (caching/cache.h): group by group, the images of a group packed to the front of
 * every buffer, each kind of launch captured when it first occurs. */
#include "dit/forward_internal.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"

#define FIRST_BLOCKS 2 /* of a launch in two pieces */

/* Does a plan predict the whole hidden state, so that not even the embedding is needed? */
static bool replaces_hidden(const rf_dit_pass *p) {
    const rf_cache_span *span = rf_dit_produced_span(p);
    return span != NULL && span->begin == 0 && !span->delta;
}

/* What a group of images does in a step, in two pieces that may be launched apart: up to and with block `cut` - 1, and the rest.
 * Between the two the pass and what is pending are kept by the caller. */
typedef struct {
    rf_dit_pass p;
    rf_dit_pending pending;
    int next, cut; /* blocks */
} group_walk;

static rf_status begin_group(rf_dit_session *s, group_walk *w, rf_stream *stream, const rf_cache_group *group,
                             const float *latent, const float *in_scale, int64_t in_scale_stride, rf_error *err) {
    const rf_cache_layout *layout = rf_cache_get_layout(s->cache);
    *w = (group_walk){.p = rf_dit_whole_batch(s, stream)};
    rf_dit_pass *p = &w->p;
    p->group = group;
    p->samples = group->groups;
    p->rows = group->groups * s->tokens;
    if (!group->identity) {
        rf_rows_args gather = {.src = s->b.mod_index, /* 4-byte numbers, copied */
                               .dst = s->b.packed_mod_index,
                               .rows = group->index,
                               .dtype = RF_DTYPE_F32,
                               .num_rows = group->groups,
                               .cols = 1};
        RF_TRY(s->ops->gather_rows(stream, &gather, err));
        p->mod_index = s->b.packed_mod_index;
    }
    if (group->resumed) {
        RF_TRY(rf_cache_probe_resume(s->cache, stream, group, s->b.x, err));
        w->next = layout->probe_blocks;
    } else {
        RF_TRY(rf_cache_select(s->cache, stream, group, err));
        if (!replaces_hidden(p)) RF_TRY(rf_dit_embed(p, latent, in_scale, in_scale_stride, &w->pending, err));
    }
    w->cut = w->next + FIRST_BLOCKS;
    if (group->plan->kind == RF_STEP_PROBE && w->cut > layout->probe_blocks) w->cut = layout->probe_blocks;
    return rf_dit_run_blocks(p, w->next, w->cut, &w->pending, err);
}

static rf_status end_group(rf_dit_session *s, group_walk *w, rf_error *err) {
    const rf_cache_group *group = w->p.group;
    int num_blocks = rf_dit_desc_num_blocks(&s->model->desc);
    if (group->plan->kind == RF_STEP_PROBE) {
        int probe = rf_cache_get_layout(s->cache)->probe_blocks;
        RF_TRY(rf_dit_run_blocks(&w->p, w->cut, probe, &w->pending, err));
        w->p.boundary = probe;
        return rf_dit_settle(&w->p, &w->pending, err);
    }
    RF_TRY(rf_dit_run_blocks(&w->p, w->cut, num_blocks, &w->pending, err));
    float *out = group->identity ? s->b.out : s->b.out_packed;
    RF_TRY(rf_dit_finish(&w->p, &w->pending, out, err));
    return rf_cache_output_computed(s->cache, w->p.stream, group, out, s->b.out, err);
}

static bool predicts_output(const rf_cache_group *group) {
    const rf_step_plan *plan = group->plan;
    return plan->kind != RF_STEP_FULL && plan->kind != RF_STEP_PROBE && plan->produce == RF_PRODUCE_OUTPUT;
}

/* Signals at the start of a step, for all images: the model's input, and the first part's input. */
static rf_status walk_head(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                           int64_t in_scale_stride, rf_error *err) {
    bool modulated = false;
    rf_cache_wants_head(s->cache, &modulated);
    if (rf_cache_input(s->cache) != NULL) {
        rf_patchify_args args = rf_dit_patchify_args(s, latent, in_scale, in_scale_stride);
        args.out = rf_cache_input(s->cache);
        args.dtype = RF_DTYPE_F32;
        args.branches = 1;
        RF_TRY(s->ops->patchify(stream, &args, err));
    }
    if (modulated) {
        rf_dit_pass p = rf_dit_whole_batch(s, stream);
        rf_dit_pending pending = {0};
        RF_TRY(rf_dit_embed(&p, latent, in_scale, in_scale_stride, &pending, err));
        RF_TRY(rf_dit_first_input(&p, &pending, err));
    }
    return rf_cache_head(s->cache, stream, modulated ? s->b.h : NULL, err);
}

/* --- feature caching --------------------------------------------------------------------------------------------------- */

/* rel1 of the timestep embedding of each step against the step before. */
static rf_status embedding_changes(rf_dit_session *s, const float *timesteps, int num_steps, float *changes,
                                   rf_error *err) {
    int64_t dim = s->model->desc.cond_dim, elem = (int64_t)rf_dtype_bytes(s->model->dtype);
    int64_t rows = (int64_t)s->steps_per_chunk * s->rows_per_step;
    char *host = rf_alloc((size_t)(rows * dim * elem));
    float *now = rf_alloc((size_t)dim * sizeof *now), *last = rf_alloc((size_t)dim * sizeof *last);
    int32_t *labels = rf_alloc_zero((size_t)s->samples, sizeof *labels);
    rf_status st = RF_OK;
    if (!host || !now || !last || !labels) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for timestep embeddings");
    if (st == RF_OK) st = rf_dit_session_begin(s, timesteps, num_steps, labels, err);
    for (int step = 0; step < num_steps && st == RF_OK; step++) {
        if (step % s->steps_per_chunk == 0) {
            st = rf_dit_queue_modulation(s, s->stream, step / s->steps_per_chunk, err);
            if (st == RF_OK) st = rf_stream_download(s->stream, host, s->b.temb, (size_t)(rows * dim * elem), err);
            if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
            if (st != RF_OK) break;
        }
        const char *row = host + (int64_t)(step % s->steps_per_chunk) * s->rows_per_step * dim * elem;
        for (int64_t i = 0; i < dim; i++)
            now[i] = s->model->dtype == RF_DTYPE_BF16 ? rf_bf16_to_f32(((const uint16_t *)(const void *)row)[i])
                                                      : ((const float *)(const void *)row)[i];
        double change = 0, size = 0;
        for (int64_t i = 0; i < dim && step > 0; i++) {
            change += fabs((double)now[i] - (double)last[i]);
            size += fabs((double)last[i]);
        }
        changes[step] = size > 0 ? (float)(change / size) : 0.0f;
        memcpy(last, now, (size_t)dim * sizeof *last);
    }
    rf_free(host);
    rf_free(now);
    rf_free(last);
    rf_free(labels);
    return st;
}

static uint8_t kind_of(const rf_part_desc *part) {
    switch (part->kind) {
    case RF_PART_SELF: return part->scope == RF_SCOPE_PIXEL ? RF_CACHE_TEMPORAL : RF_CACHE_SELF;
    case RF_PART_CROSS: return RF_CACHE_CROSS;
    case RF_PART_MLP: return RF_CACHE_MLP;
    case RF_PART_PARALLEL: break;
    }
    return RF_CACHE_PARALLEL;
}

rf_status rf_dit_create_cache(rf_dit_session *s, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    const rf_dit_session_options *o = &s->options;
    if (o->timesteps == NULL) return rf_fail(err, RF_ERR_ARGUMENT, "a policy needs the run's timesteps");
    int num_blocks = rf_dit_desc_num_blocks(d), num_parts = 0, block = 0;
    for (int g = 0; g < d->num_groups; g++)
        if (d->groups[g].num_parts > num_parts) num_parts = d->groups[g].num_parts;
    uint8_t *kinds = rf_alloc((size_t)num_blocks * (size_t)num_parts);
    float *changes = rf_alloc((size_t)o->max_steps * sizeof *changes);
    rf_status st = kinds && changes ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for a cache");
    if (st == RF_OK) {
        memset(kinds, RF_CACHE_NO_PART, (size_t)num_blocks * (size_t)num_parts);
        for (int g = 0; g < d->num_groups; g++)
            for (int i = 0; i < d->groups[g].count; i++, block++)
                for (int p = 0; p < d->groups[g].num_parts; p++)
                    kinds[block * num_parts + p] = kind_of(&d->groups[g].parts[p]);
        st = embedding_changes(s, o->timesteps, o->max_steps, changes, err);
    }
    /* columns of an output are (channel, pt, ph, pw) */
    rf_cache_stream streams[RF_MAX_STREAMS];
    int64_t patch = s->patch_dim / d->in_channels, col = 0;
    for (int i = 0; i < d->num_streams; i++) {
        int64_t end = col + d->stream_channels[i] * patch;
        streams[i] = (rf_cache_stream){.row_end = s->tokens, .col_begin = col, .col_end = end};
        col = end;
    }
    rf_cache_shape shape = {.model = o->model_name ? o->model_name : d->family,
                            .num_steps = o->max_steps,
                            .timesteps = o->timesteps,
                            .temb_change = changes,
                            .sampler = o->sampler_name ? o->sampler_name : "",
                            .stochastic = o->stochastic,
                            .force = o->force_policy,
                            .batch = o->batch,
                            .branches = o->branches,
                            .tokens = s->tokens,
                            .frames = o->frames / d->pt,
                            .grid_h = o->height / d->ph,
                            .grid_w = o->width / d->pw,
                            .width = d->width,
                            .in_cols = s->patch_dim,
                            .out_cols = s->out_dim,
                            .pred_cols = s->patch_dim,
                            .num_blocks = num_blocks,
                            .num_parts = num_parts,
                            .part_kinds = kinds,
                            .num_streams = d->num_streams,
                            .streams = streams,
                            .calibration = o->calibration};
    rf_cache_dtypes dtypes = {.feature_dtype = s->model->dtype,
                              .residual_dtype = o->residual_dtype,
                              .num_heads = d->num_heads,
                              .head_dim = d->head_dim,
                              .softmax_scale = (float)(1.0 / sqrt((double)d->head_dim))};
    if (st == RF_OK) st = rf_cache_create(&s->cache, o->policy, &shape, &dtypes, &o->cache, s->stream, err);
    rf_free(kinds);
    rf_free(changes);
    return st;
}

typedef struct {
    const float *latent, *in_scale;
    int64_t in_scale_stride;
    rf_dit_tail tail;
    void *user;
} step_input;

/* What one launch holds: a group's part of the model (or none), and behind the only group of a step the solver and the signals that
 * the next step's plan looks at. A launch is two graphs where the device has just waited for a decision: the first blocks
 * are small enough to start at once, and the host launches the rest while they run. */
typedef struct {
    const rf_cache_group *group;
    bool tail, head, split, post;
} launch_kind;

static rf_status queue_piece(rf_dit_session *s, const launch_kind *kind, int piece, group_walk *walk,
                             const step_input *in, rf_error *err) {
    bool walks = kind->group && !predicts_output(kind->group);
    if (piece == 0 && walks)
        RF_TRY(begin_group(s, walk, s->stream, kind->group, in->latent, in->in_scale, in->in_scale_stride, err));
    if (piece == 0 && kind->split) return RF_OK;
    if (walks) RF_TRY(end_group(s, walk, err));
    if (kind->group && !walks) RF_TRY(rf_cache_output_produce(s->cache, s->stream, kind->group, s->b.out, err));
    if (kind->tail) RF_TRY(in->tail(in->user, err));
    if (kind->head) RF_TRY(walk_head(s, s->stream, in->latent, in->in_scale, in->in_scale_stride, err));
    return kind->post ? rf_cache_post(s->cache, s->stream, s->b.step, kind->tail, err) : RF_OK;
}

static rf_status remember(rf_dit_session *s, const rf_captured_step *captured, rf_error *err) {
    if (s->num_graphs == s->max_graphs) {
        int more = s->max_graphs ? 2 * s->max_graphs : 16;
        void *grown = rf_realloc(s->graphs, (size_t)more * sizeof *s->graphs);
        if (grown == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a captured step");
        s->graphs = grown;
        s->max_graphs = more;
    }
    s->graphs[s->num_graphs++] = *captured;
    return RF_OK;
}

static rf_status capture(rf_dit_session *s, const launch_kind *kind, rf_captured_step *out, const step_input *in,
                         rf_error *err) {
    group_walk walk;
    for (int piece = 0; piece < 1 + kind->split; piece++) {
        RF_TRY(rf_graph_begin(s->stream, err));
        rf_status st = queue_piece(s, kind, piece, &walk, in, err);
        rf_status ended = rf_graph_end(&out->graphs[piece], s->stream, st == RF_OK ? err : NULL);
        RF_TRY(st);
        RF_TRY(ended);
    }
    return RF_OK;
}

/* A kind of launch runs directly the first time it occurs (operators choose their algorithms then) and is captured; from then on
 * it is one or two graphs. */
static rf_status launch(rf_dit_session *s, const launch_kind *kind, const step_input *in, rf_error *err) {
    uint64_t key = kind->group ? kind->group->key : 0;
    key =
        (key ^ (uint64_t)(1 + kind->tail + 2 * kind->head + 4 * kind->split + 8 * kind->post)) * 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < s->num_graphs; i++) {
        if (s->graphs[i].key != key) continue;
        RF_TRY(rf_graph_launch(s->graphs[i].graphs[0], s->stream, err));
        return s->graphs[i].graphs[1] ? rf_graph_launch(s->graphs[i].graphs[1], s->stream, err) : RF_OK;
    }
    group_walk walk;
    rf_phase phase = rf_stream_get_phase(s->stream);
    rf_stream_set_phase(s->stream, RF_PHASE_PLAN);
    rf_status st = queue_piece(s, kind, 0, &walk, in, err);
    if (st == RF_OK && kind->split) st = queue_piece(s, kind, 1, &walk, in, err);
    rf_stream_set_phase(s->stream, phase);
    if (st != RF_OK || !s->options.use_graphs || !rf_backend_has_graphs(rf_stream_backend(s->stream))) return st;
    rf_captured_step captured = {.key = key};
    st = capture(s, kind, &captured, in, err);
    if (st == RF_OK) st = remember(s, &captured, err);
    if (st != RF_OK) {
        rf_graph_destroy(captured.graphs[0]);
        rf_graph_destroy(captured.graphs[1]);
    }
    return st;
}

static rf_status run_group(rf_dit_session *s, int index, bool only, const step_input *in, rf_error *err) {
    bool modulated;
    launch_kind kind = {.group = rf_cache_group_at(s->cache, index), .tail = only};
    kind.split = rf_cache_just_waited(s->cache) && !predicts_output(kind.group);
    /* signals of the next step: not behind the last step, and not where the modulation table is about to change */
    kind.head = only && s->step + 1 < s->num_steps && s->steps_per_chunk >= s->num_steps &&
                rf_cache_wants_head(s->cache, &modulated);
    /* a probe is read at once; other groups post if nothing else runs in their step */
    kind.post =
        (only || kind.group->plan->kind == RF_STEP_PROBE) && rf_cache_wants_post(s->cache, kind.group, kind.head);
    RF_TRY(rf_cache_upload(s->cache, index, err));
    RF_TRY(launch(s, &kind, in, err));
    if (kind.post) rf_cache_posted(s->cache);
    if (kind.head) s->head_step = s->step + 1;
    return rf_cache_group_done(s->cache, index, err);
}

rf_status rf_dit_session_step_cached(rf_dit_session *s, const float *latent, const float *in_scale,
                                     int64_t in_scale_stride, rf_dit_tail tail, void *user, rf_error *err) {
    step_input in = {latent, in_scale, in_scale_stride, tail, user};
    bool modulated, only = false;
    int num = 0;
    if (rf_cache_wants_head(s->cache, &modulated) && s->head_step != s->step)
        RF_TRY(launch(s, &(launch_kind){.head = true}, &in, err));
    RF_TRY(rf_cache_plan(s->cache, s->step, &num, err));
    bool computes = false;
    for (int i = 0; i < num; i++) computes |= rf_cache_group_at(s->cache, i)->plan->kind != RF_STEP_SKIP;
    if (computes && s->prepare != NULL) RF_TRY(s->prepare(s->prepare_user, err));
    for (int i = 0; i < num; i++) {
        bool probes = rf_cache_group_at(s->cache, i)->plan->kind == RF_STEP_PROBE;
        only = num == 1 && !probes;
        RF_TRY(run_group(s, i, only, &in, err));
        if (!probes) continue;
        int first = 0, more = 0;
        RF_TRY(rf_cache_plan_probe(s->cache, i, &first, &more, err));
        only = num == 1 && more == 1;
        for (int j = first; j < first + more; j++) RF_TRY(run_group(s, j, only, &in, err));
    }
    RF_TRY(rf_cache_end_step(s->cache, s->head_step == s->step + 1, err));
    return only ? RF_OK : launch(s, &(launch_kind){.tail = true}, &in, err);
}

void rf_dit_destroy_cache(rf_dit_session *s) {
    for (int i = 0; i < s->num_graphs; i++) {
        rf_graph_destroy(s->graphs[i].graphs[0]);
        rf_graph_destroy(s->graphs[i].graphs[1]);
    }
    rf_free(s->graphs);
    rf_cache_destroy(s->cache);
}

void rf_dit_session_set_prepare(rf_dit_session *session, rf_dit_tail prepare, void *user) {
    session->prepare = prepare;
    session->prepare_user = user;
}

rf_cache *rf_dit_session_cache(rf_dit_session *session) {
    return session->cache;
}
int rf_dit_session_num_graphs(const rf_dit_session *session) {
    return session->num_graphs;
}
