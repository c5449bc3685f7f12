/* dit/forward.c - the executor.
 *
 * Between two GEMMs there is one fused kernel: the residual of the part that just finished and the norm of the part that comes
 * next. So a part leaves its output "pending", and whoever needs the residual stream next - a part's norm, or the head -
 * settles it. Per layer of a DiT: qkv GEMM, attention, out GEMM, residual+norm, fc1 GEMM, fc2 GEMM, residual+norm.
 *
 * Arena (device), R = branches*batch*tokens rows:
 *   patches [R, patch_dim]  x [R, width]  h [R, width]  y [R, width]  wide [R, max(3 width, ffn)]  attn [R, width]
 *   out [R, out_dim] f32    modulation table and what makes it, pos [tokens, width], slots, indices, step
 *
 * With a policy a step is run group by group (caching/cache.h): the images of a group are packed to the front of every buffer. What a
 * policy wants to see of x is shown to it after the fused kernel has settled it, so that a full step launches the same
 * kernels, and gives the same bits, with a policy and without. */
#include "dit/forward.h"

#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/memory.h"

typedef struct {
    /* activations */
    void *patches, *x, *h, *y, *wide, *attn;
    float *out, *out_packed;
    void *attn_workspace;
    size_t attn_workspace_bytes;
    void *pos; /* [tokens, width] f32 */
    /* modulation: U = rows_per_step distinct (timestep, label) rows a step, C = steps_per_chunk */
    void *table;                               /* [C*U, num_chunks*width] */
    float *timesteps;                          /* [steps rounded up to C, U] */
    int32_t *label_rows;                       /* [C*U] */
    void *fourier, *temb_hidden, *temb, *cond; /* [C*U, num_freqs | cond_dim ...] */
    int32_t *slots, *mod_index, *packed_mod_index, *step;
} buffers;

struct rf_dit_session {
    const rf_dit_model *model;
    const rf_ops *ops;
    rf_stream *stream;
    rf_dit_session_options options;

    int64_t samples, tokens, rows; /* samples = branches * batch */
    int64_t patch_dim, out_dim, chunk_cols;
    int rows_per_step, steps_per_chunk, padded_steps;

    void *memory;
    size_t memory_bytes;
    buffers b;

    /* host staging of begin(): sized when planned, page-locked */
    float *host_timesteps;
    int32_t *host_ints; /* slots [samples], then label rows [C*U] */

    int num_steps, step; /* of the run; host mirror of the device counter */

    rf_dit_observer observer;
    void *observer_user;

    /* feature caching */
    rf_cache *cache;
    struct captured {
        uint64_t key;
        rf_graph *graphs[2]; /* the second may be NULL */
    } * graphs;
    int num_graphs, max_graphs;
    int head_step; /* the step whose signals have been queued already */
};

#define FIRST_BLOCKS 2 /* of a launch in two pieces */

/* One pass over (some of) the batch: what is queued now. */
typedef struct {
    rf_dit_session *s;
    rf_stream *stream;           /* NULL: only check */
    const rf_cache_group *group; /* NULL: no policy, the whole batch */
    int64_t samples, rows;       /* packed */
    const int32_t *mod_index;
    int boundary; /* in front of this block a policy wants to see x once it is settled; -1 = nothing to show */
} pass;

/* The residual that has not been added yet: base + gate * y, or gate * a prediction; and a second plain one. */
typedef struct {
    bool active;
    const void *base; /* NULL: x itself */
    int64_t base_period;
    const void *y;
    int64_t gate; /* column in the modulation row, -1 = 1 */
    bool predicted;
    int block, part; /* of the prediction */
    const void *extra;
    int64_t extra_gate;
} pending_residual;

rf_dit_session_options rf_dit_session_options_default(void) {
    return (rf_dit_session_options){.batch = 1,
                                    .branches = 1,
                                    .frames = 1,
                                    .max_steps = 1,
                                    .residual_dtype = RF_DTYPE_COUNT,
                                    .modulation_budget_bytes = (size_t)1 << 30};
}

/* --- one part after the other --------------------------------------------------------------------------------------- */

static rf_modulation modulation(const pass *p) {
    return (rf_modulation){.table = p->s->b.table,
                           .dtype = p->s->model->dtype,
                           .stride = p->s->chunk_cols,
                           .index = p->mod_index,
                           .rows_per_group = p->s->tokens};
}

static int64_t column(const rf_dit_session *s, int64_t first_chunk, int chunk) {
    return chunk < 0 ? -1 : (first_chunk + chunk) * s->model->desc.width;
}

/* Shows x in front of a block to the policy. */
static rf_status show_boundary(pass *p, rf_error *err) {
    rf_dit_session *s = p->s;
    int block = p->boundary;
    p->boundary = -1;
    if (p->group == NULL || block < 0) return RF_OK;
    const rf_cache_layout *layout = rf_cache_get_layout(s->cache);
    const rf_cache_group *g = p->group;
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++)
        if (layout->spans[i].depth > 0 && layout->spans[i].end == block)
            RF_TRY(rf_cache_span_leave(s->cache, p->stream, g, i, s->b.x, err));
    bool probes =
        layout->probe_blocks > 0 && !g->resumed && (g->plan->kind == RF_STEP_FULL || g->plan->kind == RF_STEP_PROBE);
    if (probes && block == 0) RF_TRY(rf_cache_probe_begin(s->cache, p->stream, g, s->b.x, err));
    if (probes && block == layout->probe_blocks) RF_TRY(rf_cache_probe_end(s->cache, p->stream, g, s->b.x, err));
    for (int i = 0; i < RF_CACHE_MAX_SPANS; i++)
        if (layout->spans[i].depth > 0 && layout->spans[i].begin == block)
            RF_TRY(rf_cache_span_enter(s->cache, p->stream, g, i, s->b.x, err));
    return RF_OK;
}

/* x += what is pending, and h = norm(x) if a norm is asked for. */
static rf_status settle(pass *p, pending_residual *pending, rf_part_norm norm, double eps, int64_t shift, int64_t scale,
                        rf_error *err) {
    rf_dit_session *s = p->s;
    rf_norm_kind kind = norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER;
    if (norm == RF_PART_NORM_LAYER_AFFINE)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "affine part norms have no weight map");
    if (pending->active) {
        rf_residual_args args = {.x = s->b.x,
                                 .base = pending->base,
                                 .base_period = pending->base_period,
                                 .num_terms = 1,
                                 .terms = {pending->y},
                                 .x_dtype = s->options.residual_dtype,
                                 .base_dtype = RF_DTYPE_F32,
                                 .y_dtype = s->model->dtype,
                                 .num_rows = p->rows,
                                 .cols = s->model->desc.width,
                                 .gate_mod = modulation(p),
                                 .gate = pending->gate,
                                 .extra = pending->extra,
                                 .extra_gate = pending->extra_gate,
                                 .norm_y = norm == RF_PART_NORM_NONE ? NULL : s->b.h,
                                 .norm_y_dtype = s->model->dtype,
                                 .norm_kind = kind,
                                 .norm_eps = (float)eps,
                                 .norm_mod = modulation(p),
                                 .norm_shift = shift,
                                 .norm_scale = scale};
        if (pending->predicted) rf_cache_part_terms(s->cache, p->group, pending->block, pending->part, &args);
        *pending = (pending_residual){0};
        RF_TRY(s->ops->residual(p->stream, &args, err));
    } else if (norm != RF_PART_NORM_NONE) {
        rf_norm_args args = {.x = s->b.x,
                             .y = s->b.h,
                             .x_dtype = s->options.residual_dtype,
                             .y_dtype = s->model->dtype,
                             .num_rows = p->rows,
                             .cols = s->model->desc.width,
                             .kind = kind,
                             .eps = (float)eps,
                             .mod = modulation(p),
                             .shift = shift,
                             .scale = scale};
        RF_TRY(s->ops->norm(p->stream, &args, err));
    }
    return show_boundary(p, err);
}

static rf_status settle_only(pass *p, pending_residual *pending, rf_error *err) {
    return settle(p, pending, RF_PART_NORM_NONE, 0.0, -1, -1, err);
}

static rf_status linear(const pass *p, const rf_linear *l, const void *x, void *y, int64_t m, int64_t n, int64_t k,
                        rf_act act, rf_dtype y_dtype, rf_error *err) {
    rf_gemm_args args = rf_gemm_args_default(p->s->model->dtype, m, n, k);
    args.x = x;
    args.w = l->w;
    args.bias = l->b;
    args.y = y;
    args.y_dtype = y_dtype;
    args.act = act;
    return p->s->ops->gemm(p->stream, &args, err);
}

static const void *columns(const void *base, int64_t elems, rf_dtype dtype) {
    return base ? (const char *)base + (size_t)elems * rf_dtype_bytes(dtype) : NULL;
}

/* Self-attention of all packed rows: h -> y. */
static rf_status run_self(const pass *p, int block, const rf_part_desc *part, const rf_part_weights *w, void *y,
                          rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    void *kept = p->group && p->group->identity ? rf_cache_qkv(s->cache, block) : NULL;
    void *qkv = kept ? kept : s->b.wide;
    RF_TRY(linear(p, &w->qkv, s->b.h, qkv, p->rows, 3 * d->width, d->width, RF_ACT_NONE, dtype, err));
    int64_t sequences = part->scope == RF_SCOPE_FRAME ? p->samples * (s->options.frames / d->pt) : p->samples;
    rf_attention_args args =
        rf_attention_args_packed(dtype, sequences, p->rows / sequences, d->num_heads, d->head_dim, qkv, s->b.attn);
    args.workspace = s->b.attn_workspace;
    args.workspace_bytes = s->b.attn_workspace_bytes;
    bool scores = p->group && rf_cache_wants_scores(s->cache, p->group);
    if (scores) args.lse = rf_cache_lse(s->cache);
    RF_TRY(s->ops->attention(p->stream, &args, err));
    if (scores) RF_TRY(rf_cache_score(s->cache, p->stream, p->group, block, qkv, err));
    if (p->group) RF_TRY(rf_cache_keep_qkv(s->cache, p->stream, p->group, block, qkv, err));
    return linear(p, &w->out, s->b.attn, y, p->rows, d->width, d->width, RF_ACT_NONE, dtype, err);
}

/* The same for listed rows of every sample, packed in h: their keys and values replace the kept ones, their queries see all of them. */
static rf_status run_self_rows(const pass *p, int block, const rf_part_weights *w, rf_cache_rows rows, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    int64_t num = p->samples * rows.count, width = d->width;
    char *kept = rf_cache_qkv(s->cache, block);
    RF_TRY(linear(p, &w->qkv, s->b.h, s->b.wide, num, 3 * width, width, RF_ACT_NONE, dtype, err));
    rf_rows_args scatter = {.src = columns(s->b.wide, width, dtype),
                            .dst = (void *)columns(kept, width, dtype),
                            .rows = rows.state,
                            .dtype = dtype,
                            .num_rows = num,
                            .cols = 2 * width,
                            .src_ld = 3 * width,
                            .dst_ld = 3 * width};
    RF_TRY(s->ops->scatter_rows(p->stream, &scatter, err));
    rf_attention_args args =
        rf_attention_args_packed(dtype, p->samples, s->tokens, d->num_heads, d->head_dim, kept, s->b.attn);
    args.q = s->b.wide;
    args.q_len = rows.count;
    args.q_batch_stride = rows.count * 3 * width;
    args.out_batch_stride = rows.count * width;
    args.workspace = s->b.attn_workspace;
    args.workspace_bytes = s->b.attn_workspace_bytes;
    RF_TRY(s->ops->attention(p->stream, &args, err));
    return linear(p, &w->out, s->b.attn, s->b.y, num, width, width, RF_ACT_NONE, dtype, err);
}

static rf_status run_mlp(const pass *p, const rf_part_desc *part, const rf_part_weights *w, int64_t rows, void *y,
                         rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t width = s->model->desc.width;
    rf_dtype dtype = s->model->dtype;
    RF_TRY(linear(p, &w->fc1, s->b.h, s->b.wide, rows, part->ffn_dim, width, part->act, dtype, err));
    return linear(p, &w->fc2, s->b.wide, y, rows, width, part->ffn_dim, RF_ACT_NONE, dtype, err);
}

/* Where a part stands. */
typedef struct {
    int block, index;
    const rf_part_desc *desc;
    const rf_part_weights *weights;
    int64_t first_chunk;
} part_at;

static rf_status compute_part(pass *p, const part_at *at, pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_part_segment *seg = &at->desc->segments[0];
    RF_TRY(settle(p, pending, at->desc->norm, at->desc->norm_eps, column(s, at->first_chunk, seg->shift),
                  column(s, at->first_chunk, seg->scale), err));
    void *y = s->b.y;
    if (p->group) RF_TRY(rf_cache_part_before(s->cache, p->stream, p->group, at->block, at->index, &y, err));
    switch (at->desc->kind) {
    case RF_PART_SELF: RF_TRY(run_self(p, at->block, at->desc, at->weights, y, err)); break;
    case RF_PART_MLP: RF_TRY(run_mlp(p, at->desc, at->weights, p->rows, y, err)); break;
    default: return rf_fail(err, RF_ERR_UNSUPPORTED, "this kind of part has no kernel yet");
    }
    if (p->group) RF_TRY(rf_cache_part_after(s->cache, p->stream, p->group, at->block, at->index, y, err));
    *pending = (pending_residual){.active = true, .y = y, .gate = column(s, at->first_chunk, seg->gate)};
    return RF_OK;
}

/* A part from its ring: one plain snapshot joins what is pending, anything else is a residual of its own. */
static rf_status produce_part(pass *p, const part_at *at, pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t gate = column(s, at->first_chunk, at->desc->segments[0].gate);
    rf_residual_args probe = {0};
    rf_cache_part_terms(s->cache, p->group, at->block, at->index, &probe);
    bool plain = probe.term_group == NULL && probe.weights == NULL;
    if (plain && pending->active && !pending->predicted && pending->extra == NULL) {
        pending->extra = probe.terms[0];
        pending->extra_gate = gate;
        return RF_OK;
    }
    RF_TRY(settle_only(p, pending, err));
    *pending = (pending_residual){.active = true,
                                  .y = plain ? probe.terms[0] : NULL,
                                  .gate = gate,
                                  .predicted = !plain,
                                  .block = at->block,
                                  .part = at->index};
    return RF_OK;
}

/* A part on listed rows; the other rows of its output come from the ring. */
static rf_status compute_part_rows(pass *p, const part_at *at, pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_part_segment *seg = &at->desc->segments[0];
    rf_cache_rows rows = rf_cache_rows_of(s->cache, p->group, at->block, at->index);
    RF_TRY(settle_only(p, pending, err));
    rf_norm_args norm = {.x = s->b.x,
                         .y = s->b.h,
                         .x_dtype = s->options.residual_dtype,
                         .y_dtype = s->model->dtype,
                         .num_rows = p->samples * rows.count,
                         .cols = s->model->desc.width,
                         .rows = rows.packed,
                         .kind = at->desc->norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER,
                         .eps = (float)at->desc->norm_eps,
                         .mod = modulation(p),
                         .shift = column(s, at->first_chunk, seg->shift),
                         .scale = column(s, at->first_chunk, seg->scale)};
    RF_TRY(s->ops->norm(p->stream, &norm, err));
    if (at->desc->kind == RF_PART_SELF)
        RF_TRY(run_self_rows(p, at->block, at->weights, rows, err));
    else
        RF_TRY(run_mlp(p, at->desc, at->weights, p->samples * rows.count, s->b.y, err));
    RF_TRY(rf_cache_scatter(s->cache, p->stream, p->group, at->block, at->index, s->b.y, err));
    return produce_part(p, at, pending, err);
}

/* Attention and MLP of one block on the same listed rows, in as few passes over all rows as there can be: the chosen rows go through
 * both parts packed; one merge then brings every row up to date, the others from the rings. */
static rf_status run_row_block(pass *p, const part_at *self, const part_at *mlp, bool renew, pending_residual *pending,
                               rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_part_segment *a = &self->desc->segments[0], *b = &mlp->desc->segments[0];
    int64_t width = s->model->desc.width, gate_a = column(s, self->first_chunk, a->gate);
    rf_cache_rows rows = rf_cache_rows_of(s->cache, p->group, mlp->block, mlp->index);
    void *ring_a = rf_cache_part_ring(s->cache, self->block, self->index);
    RF_TRY(settle_only(p, pending, err));
    rf_norm_args norm = {.x = s->b.x,
                         .y = s->b.h,
                         .x_dtype = s->options.residual_dtype,
                         .y_dtype = s->model->dtype,
                         .num_rows = p->samples * rows.count,
                         .cols = width,
                         .rows = rows.packed,
                         .kind = self->desc->norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER,
                         .eps = (float)self->desc->norm_eps,
                         .mod = modulation(p),
                         .shift = column(s, self->first_chunk, a->shift),
                         .scale = column(s, self->first_chunk, a->scale)};
    if (renew) {
        RF_TRY(s->ops->norm(p->stream, &norm, err));
        RF_TRY(run_self_rows(p, self->block, self->weights, rows, err));
    }
    rf_residual_args middle = {.x = s->b.x,
                               .num_terms = 1,
                               .terms = {renew ? s->b.y : ring_a},
                               .rows = rows.packed,
                               .term_rows = renew ? NULL : rows.state,
                               .store = renew ? ring_a : NULL,
                               .store_rows = renew ? rows.state : NULL,
                               .x_dtype = s->options.residual_dtype,
                               .y_dtype = s->model->dtype,
                               .num_rows = norm.num_rows,
                               .cols = width,
                               .gate_mod = modulation(p),
                               .gate = gate_a,
                               .norm_y = s->b.h,
                               .norm_y_dtype = s->model->dtype,
                               .norm_kind = mlp->desc->norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER,
                               .norm_eps = (float)mlp->desc->norm_eps,
                               .norm_mod = modulation(p),
                               .norm_shift = column(s, mlp->first_chunk, b->shift),
                               .norm_scale = column(s, mlp->first_chunk, b->scale)};
    RF_TRY(s->ops->residual(p->stream, &middle, err));
    RF_TRY(run_mlp(p, mlp->desc, mlp->weights, norm.num_rows, s->b.y, err));
    rf_row_merge_args merge = {.x = s->b.x,
                               .y = s->b.y,
                               .ring_a = ring_a,
                               .ring_b = rf_cache_part_ring(s->cache, mlp->block, mlp->index),
                               .x_dtype = s->options.residual_dtype,
                               .dtype = s->model->dtype,
                               .place = rows.place,
                               .index = p->group->index,
                               .groups = p->samples,
                               .rows = s->tokens,
                               .cols = width,
                               .mod = modulation(p),
                               .gate_a = gate_a,
                               .gate_b = column(s, mlp->first_chunk, b->gate)};
    return s->ops->row_merge(p->stream, &merge, err);
}

static rf_status run_block(pass *p, int block, const rf_block_group *group, int64_t first_chunk,
                           pending_residual *pending, bool compute_all, rf_error *err) {
    rf_dit_session *s = p->s;
    int most = p->group ? rf_cache_get_shape(s->cache)->num_parts : 0;
    p->boundary = block;
    const uint8_t *plan =
        p->group && !compute_all && p->group->plan->kind != RF_STEP_FULL ? p->group->plan->parts + block * most : NULL;
    if (plan && group->num_parts == 2 && group->parts[0].kind == RF_PART_SELF && group->parts[1].kind == RF_PART_MLP &&
        plan[0] != RF_DO_COMPUTE && plan[1] == RF_DO_ROWS) {
        part_at self = {block, 0, &group->parts[0], &s->model->parts[block * RF_MAX_PARTS], first_chunk};
        part_at mlp = {block, 1, &group->parts[1], &s->model->parts[block * RF_MAX_PARTS + 1], first_chunk};
        return run_row_block(p, &self, &mlp, plan[0] == RF_DO_ROWS, pending, err);
    }
    for (int i = 0; i < group->num_parts; i++) {
        part_at at = {block, i, &group->parts[i], &s->model->parts[block * RF_MAX_PARTS + i], first_chunk};
        rf_part_do what = plan ? (rf_part_do)plan[i] : RF_DO_COMPUTE;
        if (what == RF_DO_COMPUTE) RF_TRY(compute_part(p, &at, pending, err));
        if (what == RF_DO_PRODUCE) RF_TRY(produce_part(p, &at, pending, err));
        if (what == RF_DO_ROWS) RF_TRY(compute_part_rows(p, &at, pending, err));
        if (p->group == NULL && s->observer != NULL && p->stream != NULL) {
            RF_TRY(settle_only(p, pending, err));
            s->observer(s->observer_user, block, i, s->b.x, p->rows, s->model->desc.width);
        }
    }
    return RF_OK;
}

/* The last block both ways: computed from its predicted input, and predicted (SpeCa). */
static rf_status run_verified(pass *p, int block, const rf_block_group *group, int64_t first_chunk,
                              pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_cache_group *g = p->group;
    RF_TRY(settle_only(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(run_block(p, block, group, first_chunk, pending, true, err));
    RF_TRY(settle_only(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 0, s->b.x, err));
    RF_TRY(rf_cache_verify_load(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(run_block(p, block, group, first_chunk, pending, false, err));
    RF_TRY(settle_only(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(rf_cache_verify_measure(s->cache, p->stream, g, err));
    return g->plan->use_verified ? rf_cache_verify_load(s->cache, p->stream, g, 0, s->b.x, err) : RF_OK;
}

/* What the grammar can say and this executor cannot do. */
static rf_status check_supported(const rf_dit_desc *d, rf_error *err) {
    if (d->num_segments != 1) return rf_fail(err, RF_ERR_UNSUPPORTED, "text segments are not supported");
    if (d->mod_rows != RF_MOD_ROWS_SAMPLE)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "only one modulation row per sample is supported");
    for (int g = 0; g < d->num_groups; g++) {
        for (int p = 0; p < d->groups[g].num_parts; p++) {
            const rf_part_desc *part = &d->groups[g].parts[p];
            const char *what = NULL;
            if (part->kind != RF_PART_SELF && part->kind != RF_PART_MLP)
                what = "cross-attention and parallel parts";
            else if (part->norm == RF_PART_NORM_NONE)
                what = "parts without a norm";
            else if (part->from_block_input)
                what = "parts that read the block's input";
            else if (part->qk_norm != RF_QK_NORM_NONE)
                what = "q/k norms";
            else if (part->rope >= 0)
                what = "rotary positions";
            else if (part->scope == RF_SCOPE_PIXEL || part->causal_frames)
                what = "attention over frames";
            else if (part->masked || part->dead)
                what = "masked or dead rows";
            if (what != NULL) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s are not supported", what);
        }
    }
    return RF_OK;
}

static rf_patchify_args patchify_args(const rf_dit_session *s, const float *latent, const float *in_scale,
                                      int64_t in_scale_stride) {
    const rf_dit_desc *d = &s->model->desc;
    return (rf_patchify_args){.latent = latent,
                              .out = s->b.patches,
                              .dtype = s->model->dtype,
                              .batch = s->options.batch,
                              .branches = s->options.branches,
                              .channels = d->in_channels,
                              .frames = s->options.frames,
                              .height = s->options.height,
                              .width = s->options.width,
                              .pt = d->pt,
                              .ph = d->ph,
                              .pw = d->pw,
                              .scale = in_scale,
                              .step = s->b.step,
                              .scale_stride = in_scale_stride};
}

/* Latents of the pass's images to patch rows to the residual stream (pending). */
static rf_status embed(pass *p, const float *latent, const float *in_scale, int64_t in_scale_stride,
                       pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t width = s->model->desc.width;
    rf_patchify_args args = patchify_args(s, latent, in_scale, in_scale_stride);
    args.batch = p->samples / s->options.branches;
    args.sample_index = p->group ? p->group->samples : NULL;
    RF_TRY(s->ops->patchify(p->stream, &args, err));
    RF_TRY(linear(p, &s->model->patch, s->b.patches, s->b.y, p->rows, width, s->patch_dim, RF_ACT_NONE, s->model->dtype,
                  err));
    *pending = (pending_residual){.active = true, .base = s->b.pos, .base_period = s->tokens, .y = s->b.y, .gate = -1};
    return RF_OK;
}

static pass whole_batch(rf_dit_session *s, rf_stream *stream) {
    return (pass){
        .s = s, .stream = stream, .samples = s->samples, .rows = s->rows, .mod_index = s->b.mod_index, .boundary = -1};
}

/* Which block a span prediction of this plan takes the place of; NULL if none. */
static const rf_cache_span *produced_span(const pass *p) {
    if (p->group == NULL || p->group->plan->kind == RF_STEP_FULL || p->group->plan->kind == RF_STEP_PROBE) return NULL;
    if (p->group->plan->produce != RF_PRODUCE_SPAN) return NULL;
    return &rf_cache_get_layout(p->s->cache)->spans[p->group->plan->span];
}

static rf_status run_blocks(pass *p, int from, int to, pending_residual *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    const rf_cache_span *produced = produced_span(p);
    int64_t chunk = 0;
    int block = 0, last = rf_dit_desc_num_blocks(d) - 1;
    for (int g = 0; g < d->num_groups; g++) {
        const rf_block_group *group = &d->groups[g];
        for (int i = 0; i < group->count; i++, block++, chunk += group->num_chunks) {
            if (block < from || block >= to) continue;
            if (produced && block == produced->begin) {
                p->boundary = -1;
                RF_TRY(settle_only(p, pending, err));
                RF_TRY(rf_cache_span_produce(s->cache, p->stream, p->group, p->group->plan->span, s->b.x, err));
            }
            if (produced && block >= produced->begin && block < produced->end) continue;
            if (p->group && p->group->plan->verify && block == last)
                RF_TRY(run_verified(p, block, group, chunk, pending, err));
            else
                RF_TRY(run_block(p, block, group, chunk, pending, false, err));
        }
    }
    return RF_OK;
}

static rf_status finish(pass *p, pending_residual *pending, float *out, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    int64_t shift = rf_dit_desc_num_chunks(d) - 2; /* the last two chunks are the final norm's */
    p->boundary = rf_dit_desc_num_blocks(d);
    RF_TRY(settle(p, pending, RF_PART_NORM_LAYER, d->final_eps, shift * d->width, (shift + 1) * d->width, err));
    return linear(p, &s->model->final, s->b.h, out, p->rows, s->out_dim, d->width, RF_ACT_NONE, RF_DTYPE_F32, err);
}

/* The whole forward: queued on stream, or only checked if stream is NULL. */
static rf_status walk(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                      int64_t in_scale_stride, rf_error *err) {
    pass p = whole_batch(s, stream);
    pending_residual pending = {0};
    RF_TRY(embed(&p, latent, in_scale, in_scale_stride, &pending, err));
    RF_TRY(run_blocks(&p, 0, rf_dit_desc_num_blocks(&s->model->desc), &pending, err));
    return finish(&p, &pending, s->b.out, err);
}

/* Does a plan predict the whole hidden state, so that not even the embedding is needed? */
static bool replaces_hidden(const pass *p) {
    const rf_cache_span *span = produced_span(p);
    return span != NULL && span->begin == 0 && !span->delta;
}

/* What a group of images does in a step, in two pieces that may be launched apart: up to and with block `cut` - 1, and the rest.
 * Between the two the pass and what is pending are kept by the caller. */
typedef struct {
    pass p;
    pending_residual pending;
    int next, cut; /* blocks */
} group_walk;

static rf_status begin_group(rf_dit_session *s, group_walk *w, rf_stream *stream, const rf_cache_group *group,
                             const float *latent, const float *in_scale, int64_t in_scale_stride, rf_error *err) {
    const rf_cache_layout *layout = rf_cache_get_layout(s->cache);
    *w = (group_walk){.p = whole_batch(s, stream)};
    pass *p = &w->p;
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
        if (!replaces_hidden(p)) RF_TRY(embed(p, latent, in_scale, in_scale_stride, &w->pending, err));
    }
    w->cut = w->next + FIRST_BLOCKS;
    if (group->plan->kind == RF_STEP_PROBE && w->cut > layout->probe_blocks) w->cut = layout->probe_blocks;
    return run_blocks(p, w->next, w->cut, &w->pending, err);
}

static rf_status end_group(rf_dit_session *s, group_walk *w, rf_error *err) {
    const rf_cache_group *group = w->p.group;
    int num_blocks = rf_dit_desc_num_blocks(&s->model->desc);
    if (group->plan->kind == RF_STEP_PROBE) {
        int probe = rf_cache_get_layout(s->cache)->probe_blocks;
        RF_TRY(run_blocks(&w->p, w->cut, probe, &w->pending, err));
        w->p.boundary = probe;
        return settle_only(&w->p, &w->pending, err);
    }
    RF_TRY(run_blocks(&w->p, w->cut, num_blocks, &w->pending, err));
    float *out = group->identity ? s->b.out : s->b.out_packed;
    RF_TRY(finish(&w->p, &w->pending, out, err));
    return rf_cache_output_computed(s->cache, w->p.stream, group, out, s->b.out, err);
}

static bool predicts_output(const rf_cache_group *group) {
    const rf_step_plan *plan = group->plan;
    return plan->kind != RF_STEP_FULL && plan->kind != RF_STEP_PROBE && plan->produce == RF_PRODUCE_OUTPUT;
}

/* Signals at the start of a step, for all images: the model's input, and the first part's input. */
static rf_status walk_head(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                           int64_t in_scale_stride, rf_error *err) {
    const rf_part_desc *first = &s->model->desc.groups[0].parts[0];
    bool modulated = false;
    rf_cache_wants_head(s->cache, &modulated);
    if (rf_cache_input(s->cache) != NULL) {
        rf_patchify_args args = patchify_args(s, latent, in_scale, in_scale_stride);
        args.out = rf_cache_input(s->cache);
        args.dtype = RF_DTYPE_F32;
        args.branches = 1;
        RF_TRY(s->ops->patchify(stream, &args, err));
    }
    if (modulated) {
        pass p = whole_batch(s, stream);
        pending_residual pending = {0};
        RF_TRY(embed(&p, latent, in_scale, in_scale_stride, &pending, err));
        RF_TRY(settle(&p, &pending, first->norm, first->norm_eps, column(s, 0, first->segments[0].shift),
                      column(s, 0, first->segments[0].scale), err));
    }
    return rf_cache_head(s->cache, stream, modulated ? s->b.h : NULL, err);
}

/* --- modulation ------------------------------------------------------------------------------------------------------ */

/* The table of steps chunk*C .. chunk*C + C-1: c = MLP_t(fourier(t)) + label, row = W SiLU(c) + b. */
static rf_status queue_modulation(rf_dit_session *s, rf_stream *stream, int chunk, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    const pass whole = whole_batch(s, stream), *p = &whole;
    rf_dtype dtype = s->model->dtype;
    int64_t rows = (int64_t)s->steps_per_chunk * s->rows_per_step;
    const float *t = s->b.timesteps ? s->b.timesteps + (int64_t)chunk * rows : NULL;
    rf_timestep_embed_args embed = {.t = t,
                                    .out = s->b.fourier,
                                    .dtype = dtype,
                                    .num = rows,
                                    .dim = d->num_freqs,
                                    .freq_shift = (float)d->freq_shift,
                                    .max_period = (float)d->max_period};
    rf_status st = s->ops->timestep_embed(stream, &embed, err);
    if (st == RF_OK)
        st = linear(p, &s->model->temb1, s->b.fourier, s->b.temb_hidden, rows, d->cond_dim, d->num_freqs, RF_ACT_SILU,
                    dtype, err);
    if (st == RF_OK)
        st = linear(p, &s->model->temb2, s->b.temb_hidden, s->b.temb, rows, d->cond_dim, d->cond_dim, RF_ACT_NONE,
                    dtype, err);
    rf_elementwise_args add = rf_elementwise_args_default(dtype, dtype, rows, d->cond_dim);
    add.x = s->b.temb;
    add.y = s->b.cond;
    add.act = RF_ACT_SILU;
    if (d->num_classes > 0) {
        add.add = s->model->labels;
        add.add_dtype = dtype;
        add.add_index = s->b.label_rows;
        add.add_period = d->num_classes + 1;
    }
    if (st == RF_OK) st = s->ops->elementwise(stream, &add, err);
    if (st == RF_OK)
        st =
            linear(p, &s->model->mod, s->b.cond, s->b.table, rows, s->chunk_cols, d->cond_dim, RF_ACT_NONE, dtype, err);
    return st;
}

static rf_status queue_advance(rf_dit_session *s, rf_stream *stream, int increment, rf_error *err) {
    rf_step_advance_args args = {.step = s->b.step,
                                 .increment = increment,
                                 .slots = s->b.slots,
                                 .mod_index = s->b.mod_index,
                                 .num_groups = s->samples,
                                 .rows_per_step = s->rows_per_step,
                                 .steps_per_chunk = s->steps_per_chunk};
    return s->ops->step_advance(stream, &args, err);
}

/* --- planning -------------------------------------------------------------------------------------------------------- */

static int64_t max_ffn(const rf_dit_desc *d) {
    int64_t wide = 3 * d->width;
    for (int g = 0; g < d->num_groups; g++)
        for (int p = 0; p < d->groups[g].num_parts; p++)
            if (d->groups[g].parts[p].ffn_dim > wide) wide = d->groups[g].parts[p].ffn_dim;
    return wide;
}

/* Hands out every buffer; run twice, counting and real. */
static rf_status take_buffers(rf_dit_session *s, rf_arena *arena, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    size_t act = rf_dtype_bytes(s->model->dtype), rows = (size_t)s->rows, width = (size_t)d->width;
    size_t mod_rows = (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    struct {
        void **slot;
        const char *name;
        size_t count, elem_bytes;
    } list[] = {
        {&s->b.patches, "patches", rows * (size_t)s->patch_dim, act},
        {&s->b.x, "residual stream", rows * width, rf_dtype_bytes(s->options.residual_dtype)},
        {&s->b.h, "normed rows", rows * width, act},
        {&s->b.y, "part output", rows * width, act},
        {&s->b.wide, "qkv and MLP rows", rows * (size_t)max_ffn(d), act},
        {&s->b.attn, "attention output", rows * width, act},
        {(void **)&s->b.out, "model output", rows * (size_t)s->out_dim, sizeof(float)},
        {(void **)&s->b.out_packed, "packed model output", s->options.policy ? rows * (size_t)s->out_dim : 0,
         sizeof(float)},
        {&s->b.attn_workspace, "attention workspace", s->b.attn_workspace_bytes, 1},
        {&s->b.pos, "positions", (size_t)s->tokens * width, sizeof(float)},
        {&s->b.table, "modulation table", mod_rows * (size_t)s->chunk_cols, act},
        {(void **)&s->b.timesteps, "timesteps", (size_t)s->padded_steps * (size_t)s->rows_per_step, sizeof(float)},
        {(void **)&s->b.label_rows, "label rows", mod_rows, sizeof(int32_t)},
        {&s->b.fourier, "timestep frequencies", mod_rows * (size_t)d->num_freqs, act},
        {&s->b.temb_hidden, "timestep MLP", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.temb, "timestep embedding", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.cond, "condition", mod_rows * (size_t)d->cond_dim, act},
        {(void **)&s->b.slots, "modulation slots", (size_t)s->samples, sizeof(int32_t)},
        {(void **)&s->b.mod_index, "modulation index", (size_t)s->samples, sizeof(int32_t)},
        {(void **)&s->b.packed_mod_index, "packed modulation index", s->options.policy ? (size_t)s->samples : 0,
         sizeof(int32_t)},
        {(void **)&s->b.step, "step counter", 1, sizeof(int32_t)},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        rf_status st = rf_arena_take(arena, list[i].slot, list[i].name, list[i].count, list[i].elem_bytes, err);
        if (st != RF_OK) return st;
    }
    return RF_OK;
}

/* 2-D sin/cos table (He et al. 2022): the first half of the channels encodes the column, the second the row; in each half
 * sines come first. Positions are index * (base / grid) / interpolation. */
static void fill_positions(const rf_dit_desc *d, int64_t grid_h, int64_t grid_w, float *out) {
    int64_t half = d->width / 2, quarter = d->width / 4;
    double base_h = d->pos_base_size > 0 ? d->pos_base_size : (double)grid_h;
    double base_w = d->pos_base_size > 0 ? d->pos_base_size : (double)grid_w;
    for (int64_t row = 0; row < grid_h; row++) {
        for (int64_t col = 0; col < grid_w; col++) {
            /* positions in f32, as the reference keeps them */
            double axis[2] = {(float)((float)col / (float)(grid_w / base_w) / (float)d->pos_interpolation),
                              (float)((float)row / (float)(grid_h / base_h) / (float)d->pos_interpolation)};
            float *v = out + (row * grid_w + col) * d->width;
            for (int a = 0; a < 2; a++) {
                for (int64_t i = 0; i < quarter; i++) {
                    double angle = axis[a] * pow(10000.0, -(double)i / (double)quarter);
                    v[a * half + i] = (float)sin(angle);
                    v[a * half + quarter + i] = (float)cos(angle);
                }
            }
        }
    }
}

/* The most that any pass of this session asks for: with a policy also fewer samples, and fewer queries. */
static size_t attention_workspace(const rf_dit_session *s) {
    const rf_dit_desc *d = &s->model->desc;
    rf_backend *backend = rf_stream_backend(s->stream);
    rf_attention_args args =
        rf_attention_args_packed(s->model->dtype, s->samples, s->tokens, d->num_heads, d->head_dim, NULL, NULL);
    size_t most = s->ops->attention_workspace(backend, &args);
    if (s->options.policy == NULL) return most;
    for (int64_t i = 0; i < s->samples + s->tokens; i++) {
        args.batch = i < s->samples ? i + 1 : s->samples;
        args.q_len = i < s->samples ? s->tokens : i - s->samples + 1;
        size_t bytes = s->ops->attention_workspace(backend, &args);
        if (bytes > most) most = bytes;
    }
    return most;
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
            st = queue_modulation(s, s->stream, step / s->steps_per_chunk, err);
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

/* The kinds of the executor's parts are the kinds that policies know, in the same order. */
_Static_assert((int)RF_PART_SELF == RF_CACHE_SELF && (int)RF_PART_CROSS == RF_CACHE_CROSS &&
                   (int)RF_PART_MLP == RF_CACHE_MLP && (int)RF_PART_PARALLEL == RF_CACHE_PARALLEL,
               "part kinds");

static rf_status create_cache(rf_dit_session *s, rf_error *err) {
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
                    kinds[block * num_parts + p] = (uint8_t)d->groups[g].parts[p].kind;
        st = embedding_changes(s, o->timesteps, o->max_steps, changes, err);
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

static rf_status check_options(const rf_dit_model *model, const rf_dit_session_options *o, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    if (o->batch < 1 || o->batch > 65536 || o->branches < 1 || o->branches > 2)
        return rf_fail(err, RF_ERR_ARGUMENT, "batch %lld with %d branches, expected 1..65536 and 1 or 2",
                       (long long)o->batch, o->branches);
    if (o->max_steps < 1 || o->max_steps > 10000)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps, expected 1..10000", o->max_steps);
    if (o->frames < 1 || o->height < 1 || o->width < 1 || o->frames % d->pt || o->height % d->ph || o->width % d->pw ||
        o->frames > 4096 || o->height > 4096 || o->width > 4096)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "latent of %lld x %lld x %lld, expected multiples of the patch %d x %d x %d up to 4096",
                       (long long)o->frames, (long long)o->height, (long long)o->width, d->pt, d->ph, d->pw);
    if (o->residual_dtype != RF_DTYPE_F32 && o->residual_dtype != RF_DTYPE_COUNT && o->residual_dtype != model->dtype)
        return rf_fail(err, RF_ERR_DTYPE, "residual dtype %s, expected f32 or the model's %s",
                       rf_dtype_name(o->residual_dtype), rf_dtype_name(model->dtype));
    return check_supported(d, err);
}

/* Dry run of every operator with the shapes of this session. */
static rf_status check_operators(rf_dit_session *s, rf_error *err) {
    rf_status st = queue_modulation(s, NULL, 0, err);
    if (st == RF_OK) st = queue_advance(s, NULL, 0, err);
    if (st == RF_OK) st = walk(s, NULL, NULL, NULL, 0, err);
    return st;
}

static rf_status allocate(rf_dit_session *s, rf_error *err) {
    rf_backend *backend = rf_stream_backend(s->stream);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    rf_status st = take_buffers(s, &arena, err);
    if (st == RF_OK && arena.overflow) st = rf_fail(err, RF_ERR_ARGUMENT, "this batch does not fit any address space");
    if (st == RF_OK) st = rf_backend_alloc(backend, &s->memory, arena.peak, err);
    if (st != RF_OK) return st;
    s->memory_bytes = arena.peak;
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    st = take_buffers(s, &arena, err);
    size_t num_ints = (size_t)s->samples + (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    size_t num_floats = (size_t)s->padded_steps * (size_t)s->rows_per_step;
    if (st == RF_OK)
        st = rf_backend_alloc_pinned(backend, (void **)&s->host_timesteps, num_floats * sizeof(float), err);
    if (st == RF_OK) st = rf_backend_alloc_pinned(backend, (void **)&s->host_ints, num_ints * sizeof(int32_t), err);
    return st;
}

/* Tables that never change, then one pass over everything with random numbers in the buffers: operators tune themselves and
 * load their code now, not in the loop. */
static rf_status warm_up(rf_dit_session *s, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    size_t num_pos = (size_t)(s->tokens * d->width);
    float *host = rf_alloc(num_pos * sizeof(float));
    if (host == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a position table");
    fill_positions(d, s->options.height / d->ph, s->options.width / d->pw, host);

    size_t elem = rf_dtype_bytes(s->model->dtype);
    rf_fill_normal_args fill = {
        .out = s->memory, .dtype = s->model->dtype, .num = (int64_t)(s->memory_bytes / elem), .std = 1.0f};
    rf_status st = s->ops->fill_normal(s->stream, &fill, err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.pos, host, num_pos * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    rf_free(host);

    float zero = 0.0f;
    int32_t *labels = rf_alloc_zero((size_t)s->samples, sizeof *labels);
    if (labels == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for labels");
    if (st == RF_OK) st = rf_dit_session_begin(s, &zero, 1, labels, err);
    /* any finite floats will do as latents; the output buffer is at least as large */
    if (st == RF_OK) st = walk(s, s->stream, s->b.out, NULL, 0, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    rf_free(labels);
    return st;
}

rf_status rf_dit_session_create(rf_dit_session **out, const rf_dit_model *model, rf_stream *stream,
                                const rf_dit_session_options *options, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    *out = NULL;
    rf_status st = check_options(model, options, err);
    if (st != RF_OK) return st;
    rf_dit_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    s->model = model;
    s->ops = rf_ops_for(rf_stream_backend(stream));
    s->stream = stream;
    s->options = *options;
    if (s->options.residual_dtype == RF_DTYPE_COUNT) s->options.residual_dtype = model->dtype;
    s->samples = options->branches * options->batch;
    s->tokens = (options->frames / d->pt) * (options->height / d->ph) * (options->width / d->pw);
    s->rows = s->samples * s->tokens;
    s->patch_dim = (int64_t)d->in_channels * d->pt * d->ph * d->pw;
    s->out_dim = (int64_t)d->out_channels * d->pt * d->ph * d->pw;
    s->chunk_cols = rf_dit_desc_num_chunks(d) * d->width;
    /* distinct labels of a run: one per sample of the first branch and the null label of the second */
    s->rows_per_step = (int)(options->batch + (options->branches > 1));
    size_t step_bytes = (size_t)s->rows_per_step * (size_t)s->chunk_cols * rf_dtype_bytes(model->dtype);
    int64_t fit = (int64_t)(options->modulation_budget_bytes / step_bytes);
    s->steps_per_chunk = (int)(fit < 1 ? 1 : fit > options->max_steps ? options->max_steps : fit);
    s->padded_steps = (options->max_steps + s->steps_per_chunk - 1) / s->steps_per_chunk * s->steps_per_chunk;

    s->b.attn_workspace_bytes = attention_workspace(s);

    rf_phase phase = rf_stream_get_phase(stream);
    rf_stream_set_phase(stream, RF_PHASE_PLAN);
    st = check_operators(s, err);
    if (st == RF_OK) st = allocate(s, err);
    if (st == RF_OK) st = warm_up(s, err);
    if (st == RF_OK && options->policy != NULL) st = create_cache(s, err);
    rf_stream_set_phase(stream, phase);
    if (st == RF_OK)
        *out = s;
    else
        rf_dit_session_destroy(s);
    return st;
}

void rf_dit_session_destroy(rf_dit_session *session) {
    if (session == NULL) return;
    rf_backend *backend = rf_stream_backend(session->stream);
    rf_stream_synchronize(session->stream, NULL);
    for (int i = 0; i < session->num_graphs; i++) {
        rf_graph_destroy(session->graphs[i].graphs[0]);
        rf_graph_destroy(session->graphs[i].graphs[1]);
    }
    rf_free(session->graphs);
    rf_cache_destroy(session->cache);
    rf_backend_free_pinned(backend, session->host_timesteps);
    rf_backend_free_pinned(backend, session->host_ints);
    rf_backend_free(backend, session->memory);
    rf_free(session);
}

/* --- a run ----------------------------------------------------------------------------------------------------------- */

rf_status rf_dit_session_begin(rf_dit_session *s, const float *timesteps, int num_steps, const int32_t *labels,
                               rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    if (num_steps < 1 || num_steps > s->options.max_steps)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps in a session planned for %d", num_steps, s->options.max_steps);
    for (int64_t i = 0; i < s->samples; i++)
        if (d->num_classes > 0 && (labels[i] < 0 || labels[i] > d->num_classes))
            return rf_fail(err, RF_ERR_ARGUMENT, "label %d, expected 0..%d", labels[i], d->num_classes);

    /* host buffers may still be read by an earlier run's uploads */
    rf_status st = rf_stream_synchronize(s->stream, err);
    if (st != RF_OK) return st;

    /* slot of a sample: the first slot with its label */
    int32_t *slots = s->host_ints, *label_rows = s->host_ints + s->samples;
    int used = 0;
    for (int64_t i = 0; i < s->samples; i++) {
        int slot = 0;
        while (slot < used && label_rows[slot] != labels[i]) slot++;
        if (slot == s->rows_per_step)
            return rf_fail(err, RF_ERR_ARGUMENT, "more than %d distinct labels in a run", s->rows_per_step);
        if (slot == used) label_rows[used++] = labels[i];
        slots[i] = slot;
    }
    for (; used < s->rows_per_step; used++) label_rows[used] = label_rows[0];
    for (int i = s->rows_per_step; i < s->steps_per_chunk * s->rows_per_step; i++)
        label_rows[i] = label_rows[i - s->rows_per_step];
    for (int i = 0; i < s->padded_steps; i++) {
        float t = timesteps[i < num_steps ? i : num_steps - 1] * (float)d->timestep_scale;
        for (int u = 0; u < s->rows_per_step; u++) s->host_timesteps[i * s->rows_per_step + u] = t;
    }

    size_t num_rows = (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    st = rf_stream_upload(s->stream, s->b.slots, slots, (size_t)s->samples * sizeof(int32_t), err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.label_rows, label_rows, num_rows * sizeof(int32_t), err);
    if (st == RF_OK)
        st = rf_stream_upload(s->stream, s->b.timesteps, s->host_timesteps,
                              (size_t)s->padded_steps * (size_t)s->rows_per_step * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_zero(s->stream, s->b.step, sizeof(int32_t), err);
    if (st == RF_OK) st = queue_modulation(s, s->stream, 0, err);
    if (st == RF_OK) st = queue_advance(s, s->stream, 0, err);
    s->num_steps = num_steps;
    s->step = 0;
    if (st == RF_OK && s->cache != NULL) {
        if (num_steps != s->options.max_steps)
            return rf_fail(err, RF_ERR_ARGUMENT, "%d steps in a session whose policy was planned for %d", num_steps,
                           s->options.max_steps);
        st = rf_cache_begin(s->cache, err);
        s->head_step = -1;
    }
    return st;
}

rf_status rf_dit_session_forward(rf_dit_session *s, const float *latent, const float *in_scale, int64_t in_scale_stride,
                                 rf_error *err) {
    return walk(s, s->stream, latent, in_scale, in_scale_stride, err);
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

static rf_status remember(rf_dit_session *s, const struct captured *captured, rf_error *err) {
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

static rf_status capture(rf_dit_session *s, const launch_kind *kind, struct captured *out, const step_input *in,
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
    struct captured captured = {.key = key};
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

rf_cache *rf_dit_session_cache(rf_dit_session *session) {
    return session->cache;
}
int rf_dit_session_num_graphs(const rf_dit_session *session) {
    return session->num_graphs;
}

rf_status rf_dit_session_queue_advance(rf_dit_session *s, rf_error *err) {
    return queue_advance(s, s->stream, 1, err);
}

rf_status rf_dit_session_next_step(rf_dit_session *s, rf_error *err) {
    s->step++;
    if (s->step < s->num_steps && s->step % s->steps_per_chunk == 0)
        return queue_modulation(s, s->stream, s->step / s->steps_per_chunk, err);
    return RF_OK;
}

const float *rf_dit_session_output(const rf_dit_session *session) {
    return session->b.out;
}
const int32_t *rf_dit_session_step(const rf_dit_session *session) {
    return session->b.step;
}
size_t rf_dit_session_arena_bytes(const rf_dit_session *session) {
    return session->memory_bytes;
}
int rf_dit_session_steps_per_chunk(const rf_dit_session *session) {
    return session->steps_per_chunk;
}

void rf_dit_session_set_observer(rf_dit_session *session, rf_dit_observer observer, void *user) {
    session->observer = observer;
    session->observer_user = user;
}
