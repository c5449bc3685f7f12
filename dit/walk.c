/* dit/walk.c - one pass over the blocks of a model: a part after the other, each as the plan asks.
 *
 * Between two GEMMs there is one fused kernel: the residual of the part that just finished and the norm of the part that comes
 * next. So a part leaves its output "pending", and whoever needs the residual stream next - a part's norm, or the head -
 * settles it. Per layer of a DiT: qkv GEMM, attention, out GEMM, residual+norm, fc1 GEMM, fc2 GEMM, residual+norm.
 *
 * What a policy wants to see of x is shown to it after the fused kernel has settled it, so that a full step launches the same
 * kernels, and gives the same bits, with a policy and without. */
#include "dit/forward_internal.h"

/* --- one part after the other --------------------------------------------------------------------------------------- */

static rf_modulation modulation(const rf_dit_pass *p) {
    return (rf_modulation){.table = p->s->b.table,
                           .dtype = p->s->model->dtype,
                           .stride = p->s->chunk_cols,
                           .index = p->mod_index,
                           .rows_per_group = p->s->rows_per_group};
}

static int64_t column(const rf_dit_session *s, int64_t first_chunk, int chunk) {
    return chunk < 0 ? -1 : (first_chunk + chunk) * s->model->desc.width;
}

/* Shows x in front of a block to the policy. */
static rf_status show_boundary(rf_dit_pass *p, rf_error *err) {
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

/* A row norm: shift and scale are columns of the modulation row, -1 = none. */
typedef struct {
    rf_part_norm kind; /* NONE: no norm */
    double eps;
    int64_t shift, scale;
    const float *weight, *bias;
} norm_spec;

static rf_norm_kind kernel_norm(rf_part_norm norm) {
    return norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER;
}

/* Where a part stands. */
typedef struct {
    int block, index;
    const rf_part_desc *desc;
    const rf_part_weights *weights;
    int64_t first_chunk;
} part_at;

static norm_spec norm_of(const rf_dit_session *s, const part_at *at) {
    const rf_part_segment *seg = &at->desc->segments[0];
    return (norm_spec){.kind = at->desc->norm,
                       .eps = at->desc->norm_eps,
                       .shift = column(s, at->first_chunk, seg->shift),
                       .scale = column(s, at->first_chunk, seg->scale),
                       .weight = at->weights->norm.weight,
                       .bias = at->weights->norm.bias};
}

static int64_t gate_of(const rf_dit_session *s, const part_at *at) {
    return column(s, at->first_chunk, at->desc->segments[0].gate);
}

/* x += what is pending, and h = norm(x) if a norm is asked for. */
static rf_status settle(rf_dit_pass *p, rf_dit_pending *pending, const norm_spec *norm, rf_error *err) {
    rf_dit_session *s = p->s;
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
                                 .norm_y = norm->kind == RF_PART_NORM_NONE ? NULL : s->b.h,
                                 .norm_y_dtype = s->model->dtype,
                                 .norm_kind = kernel_norm(norm->kind),
                                 .norm_eps = (float)norm->eps,
                                 .norm_weight = norm->weight,
                                 .norm_bias = norm->bias,
                                 .norm_mod = modulation(p),
                                 .norm_shift = norm->shift,
                                 .norm_scale = norm->scale};
        if (pending->predicted) rf_cache_part_terms(s->cache, p->group, pending->block, pending->part, &args);
        *pending = (rf_dit_pending){0};
        RF_TRY(s->ops->residual(p->stream, &args, err));
    } else if (norm->kind != RF_PART_NORM_NONE) {
        rf_norm_args args = {.x = s->b.x,
                             .y = s->b.h,
                             .x_dtype = s->options.residual_dtype,
                             .y_dtype = s->model->dtype,
                             .num_rows = p->rows,
                             .cols = s->model->desc.width,
                             .kind = kernel_norm(norm->kind),
                             .eps = (float)norm->eps,
                             .weight = norm->weight,
                             .bias = norm->bias,
                             .mod = modulation(p),
                             .shift = norm->shift,
                             .scale = norm->scale};
        RF_TRY(s->ops->norm(p->stream, &args, err));
    }
    return show_boundary(p, err);
}

rf_status rf_dit_settle(rf_dit_pass *p, rf_dit_pending *pending, rf_error *err) {
    return settle(p, pending, &(norm_spec){.kind = RF_PART_NORM_NONE, .shift = -1, .scale = -1}, err);
}

rf_status rf_dit_first_input(rf_dit_pass *p, rf_dit_pending *pending, rf_error *err) {
    part_at first = {0, 0, &p->s->model->desc.groups[0].parts[0], &p->s->model->parts[0], 0};
    norm_spec norm = norm_of(p->s, &first);
    return settle(p, pending, &norm, err);
}

/* The norm of listed rows of x, packed into h. */
static rf_status norm_rows(const rf_dit_pass *p, const part_at *at, rf_cache_rows rows, rf_error *err) {
    const rf_dit_session *s = p->s;
    norm_spec norm = norm_of(s, at);
    rf_norm_args args = {.x = s->b.x,
                         .y = s->b.h,
                         .x_dtype = s->options.residual_dtype,
                         .y_dtype = s->model->dtype,
                         .num_rows = p->samples * rows.count,
                         .cols = s->model->desc.width,
                         .rows = rows.packed,
                         .kind = kernel_norm(norm.kind),
                         .eps = (float)norm.eps,
                         .weight = norm.weight,
                         .bias = norm.bias,
                         .mod = modulation(p),
                         .shift = norm.shift,
                         .scale = norm.scale};
    return s->ops->norm(p->stream, &args, err);
}

rf_status rf_dit_linear(const rf_dit_pass *p, const rf_linear *l, const void *x, void *y, int64_t m, int64_t n,
                        int64_t k, rf_act act, rf_dtype y_dtype, rf_error *err) {
    rf_gemm_args args = rf_gemm_args_default(p->s->model->dtype, m, n, k);
    args.x = x;
    args.w = l->w;
    args.bias = l->b;
    args.y = y;
    args.y_dtype = y_dtype;
    args.act = act;
    args.w_is_constant = true;
    return p->s->ops->gemm(p->stream, &args, err);
}

static const void *columns(const void *base, int64_t elems, rf_dtype dtype) {
    return base ? (const char *)base + (size_t)elems * rf_dtype_bytes(dtype) : NULL;
}

/* Turns the queries and keys of packed q,k,v rows. rows: their numbers in state, NULL = all of them in order. */
static rf_status turn(const rf_dit_pass *p, const rf_part_desc *part, void *qkv, int64_t num_rows, const int32_t *rows,
                      rf_error *err) {
    const rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    rf_rope_args args = {.x = qkv,
                         .dtype = s->model->dtype,
                         .num_rows = num_rows,
                         .row_stride = 3 * d->width,
                         .num_heads = 2 * d->num_heads,
                         .head_dim = d->head_dim,
                         .num_pairs = 2 * d->ropes[part->rope].num_pairs,
                         .table = s->b.ropes[part->rope],
                         .period = s->frame_tokens,
                         .rows = rows};
    return s->ops->rope(p->stream, &args, err);
}

/* Attention of every pixel to the frames in front of it and its own: h -> y. num_rows rows, listed or all. */
static rf_status run_temporal(rf_dit_pass *p, const part_at *at, int64_t num_rows, const int32_t *rows, void *y,
                              rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    int64_t width = d->width;
    const rf_rope_desc *rope = &d->ropes[at->desc->rope];
    RF_TRY(rf_dit_linear(p, &at->weights->qkv, s->b.h, s->b.wide, num_rows, 3 * width, width, RF_ACT_NONE,
                         s->model->dtype, err));
    rf_temporal_attention_args args = {.qkv = s->b.wide,
                                       .out = s->b.attn,
                                       .dtype = s->model->dtype,
                                       .samples = p->samples,
                                       .frames = s->frames,
                                       .tokens = s->frame_tokens,
                                       .num_rows = rows ? num_rows : 0,
                                       .rows = rows,
                                       .sample_index = rows || p->group == NULL ? NULL : p->group->index,
                                       .num_heads = d->num_heads,
                                       .head_dim = d->head_dim,
                                       .num_pairs = rope->num_pairs,
                                       .table = s->b.ropes[at->desc->rope],
                                       .store = s->options.store_context};
    rf_dit_context_fill(s->options.context, at->weights->temporal, &args);
    RF_TRY(s->ops->temporal_attention(p->stream, &args, err));
    if (s->options.context_only && at->weights->temporal == rf_dit_desc_num_temporal(d) - 1) {
        p->done = true;
        return RF_OK;
    }
    return rf_dit_linear(p, &at->weights->out, s->b.attn, y, num_rows, width, width, RF_ACT_NONE, s->model->dtype, err);
}

/* Self-attention of all packed rows: h -> y. */
static rf_status run_self(rf_dit_pass *p, const part_at *at, void *y, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    bool scores = p->group && rf_cache_wants_scores(s->cache, p->group);
    bool keeps = p->group && rf_cache_qkv(s->cache, at->block) != NULL;
    void *qkv = keeps && p->group->identity ? rf_cache_qkv(s->cache, at->block) : s->b.wide;
    RF_TRY(rf_dit_linear(p, &at->weights->qkv, s->b.h, qkv, p->rows, 3 * d->width, d->width, RF_ACT_NONE, dtype, err));
    int64_t sequences = at->desc->scope == RF_SCOPE_FRAME ? p->samples * s->frames : p->samples;
    rf_attention_args args =
        rf_attention_args_packed(dtype, sequences, p->rows / sequences, d->num_heads, d->head_dim, qkv, s->b.attn);
    args.workspace = s->b.attn_workspace;
    args.workspace_bytes = s->b.attn_workspace_bytes;
    if (scores) args.lse = rf_cache_lse(s->cache);
    if (at->desc->rope >= 0) {
        /* what a policy keeps or scores is kept turned, so that listed rows can join it */
        if (s->fused_rope && !keeps && !scores) {
            args.rope = s->b.ropes[at->desc->rope];
            args.rope_pairs = 2 * d->ropes[at->desc->rope].num_pairs;
        } else {
            RF_TRY(turn(p, at->desc, qkv, p->rows, NULL, err));
        }
    }
    RF_TRY(s->ops->attention(p->stream, &args, err));
    if (scores) RF_TRY(rf_cache_score(s->cache, p->stream, p->group, at->block, qkv, err));
    if (p->group) RF_TRY(rf_cache_keep_qkv(s->cache, p->stream, p->group, at->block, qkv, err));
    return rf_dit_linear(p, &at->weights->out, s->b.attn, y, p->rows, d->width, d->width, RF_ACT_NONE, dtype, err);
}

/* The same for listed rows of every sample, packed in h: their keys and values replace the kept ones, their queries see all of them. */
static rf_status run_self_rows(const rf_dit_pass *p, const part_at *at, rf_cache_rows rows, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    int64_t num = p->samples * rows.count, width = d->width;
    char *kept = rf_cache_qkv(s->cache, at->block);
    RF_TRY(rf_dit_linear(p, &at->weights->qkv, s->b.h, s->b.wide, num, 3 * width, width, RF_ACT_NONE, dtype, err));
    if (at->desc->rope >= 0) RF_TRY(turn(p, at->desc, s->b.wide, num, rows.state, err));
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
    return rf_dit_linear(p, &at->weights->out, s->b.attn, s->b.y, num, width, width, RF_ACT_NONE, dtype, err);
}

static rf_status run_mlp(const rf_dit_pass *p, const rf_part_desc *part, const rf_part_weights *w, int64_t rows,
                         void *y, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t width = s->model->desc.width;
    rf_dtype dtype = s->model->dtype;
    RF_TRY(rf_dit_linear(p, &w->fc1, s->b.h, s->b.wide, rows, part->ffn_dim, width, part->act, dtype, err));
    return rf_dit_linear(p, &w->fc2, s->b.wide, y, rows, width, part->ffn_dim, RF_ACT_NONE, dtype, err);
}

static bool is_temporal(const rf_part_desc *part) {
    return part->kind == RF_PART_SELF && part->scope == RF_SCOPE_PIXEL;
}

static rf_status compute_part(rf_dit_pass *p, const part_at *at, rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    norm_spec norm = norm_of(s, at);
    RF_TRY(settle(p, pending, &norm, err));
    void *y = s->b.y;
    if (p->group) RF_TRY(rf_cache_part_before(s->cache, p->stream, p->group, at->block, at->index, &y, err));
    if (is_temporal(at->desc))
        RF_TRY(run_temporal(p, at, p->rows, NULL, y, err));
    else if (at->desc->kind == RF_PART_SELF)
        RF_TRY(run_self(p, at, y, err));
    else
        RF_TRY(run_mlp(p, at->desc, at->weights, p->rows, y, err));
    if (p->done) return RF_OK;
    if (p->group) RF_TRY(rf_cache_part_after(s->cache, p->stream, p->group, at->block, at->index, y, err));
    *pending = (rf_dit_pending){.active = true, .y = y, .gate = gate_of(s, at)};
    return RF_OK;
}

/* A part from its ring: one plain snapshot joins what is pending, anything else is a residual of its own. */
static rf_status produce_part(rf_dit_pass *p, const part_at *at, rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t gate = gate_of(s, at);
    rf_residual_args probe = {0};
    rf_cache_part_terms(s->cache, p->group, at->block, at->index, &probe);
    bool plain = probe.term_group == NULL && probe.weights == NULL;
    if (plain && pending->active && !pending->predicted && pending->extra == NULL) {
        pending->extra = probe.terms[0];
        pending->extra_gate = gate;
        return RF_OK;
    }
    RF_TRY(rf_dit_settle(p, pending, err));
    *pending = (rf_dit_pending){.active = true,
                                .y = plain ? probe.terms[0] : NULL,
                                .gate = gate,
                                .predicted = !plain,
                                .block = at->block,
                                .part = at->index};
    return RF_OK;
}

/* A part on listed rows; the other rows of its output come from the ring. */
static rf_status compute_part_rows(rf_dit_pass *p, const part_at *at, rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    rf_cache_rows rows = rf_cache_rows_of(s->cache, p->group, at->block, at->index);
    int64_t num = p->samples * rows.count;
    RF_TRY(rf_dit_settle(p, pending, err));
    RF_TRY(norm_rows(p, at, rows, err));
    if (is_temporal(at->desc))
        RF_TRY(run_temporal(p, at, num, rows.state, s->b.y, err));
    else if (at->desc->kind == RF_PART_SELF)
        RF_TRY(run_self_rows(p, at, rows, err));
    else
        RF_TRY(run_mlp(p, at->desc, at->weights, num, s->b.y, err));
    RF_TRY(rf_cache_scatter(s->cache, p->stream, p->group, at->block, at->index, s->b.y, err));
    return produce_part(p, at, pending, err);
}

/* Attention and MLP of one block on the same listed rows, in as few passes over all rows as there can be: the chosen rows go through
 * both parts packed; one merge then brings every row up to date, the others from the rings. */
static rf_status run_row_block(rf_dit_pass *p, const part_at *self, const part_at *mlp, bool renew,
                               rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t width = s->model->desc.width, gate_a = gate_of(s, self);
    norm_spec norm_b = norm_of(s, mlp);
    rf_cache_rows rows = rf_cache_rows_of(s->cache, p->group, mlp->block, mlp->index);
    int64_t num = p->samples * rows.count;
    void *ring_a = rf_cache_part_ring(s->cache, self->block, self->index);
    RF_TRY(rf_dit_settle(p, pending, err));
    if (renew) {
        RF_TRY(norm_rows(p, self, rows, err));
        RF_TRY(run_self_rows(p, self, rows, err));
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
                               .num_rows = num,
                               .cols = width,
                               .gate_mod = modulation(p),
                               .gate = gate_a,
                               .norm_y = s->b.h,
                               .norm_y_dtype = s->model->dtype,
                               .norm_kind = kernel_norm(norm_b.kind),
                               .norm_eps = (float)norm_b.eps,
                               .norm_weight = norm_b.weight,
                               .norm_bias = norm_b.bias,
                               .norm_mod = modulation(p),
                               .norm_shift = norm_b.shift,
                               .norm_scale = norm_b.scale};
    RF_TRY(s->ops->residual(p->stream, &middle, err));
    RF_TRY(run_mlp(p, mlp->desc, mlp->weights, num, s->b.y, err));
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
                               .gate_b = gate_of(s, mlp)};
    return s->ops->row_merge(p->stream, &merge, err);
}

static rf_status run_block(rf_dit_pass *p, int block, const rf_block_group *group, int64_t first_chunk,
                           rf_dit_pending *pending, bool compute_all, rf_error *err) {
    rf_dit_session *s = p->s;
    int most = p->group ? rf_cache_get_shape(s->cache)->num_parts : 0;
    p->boundary = block;
    const uint8_t *plan =
        p->group && !compute_all && p->group->plan->kind != RF_STEP_FULL ? p->group->plan->parts + block * most : NULL;
    if (plan && group->num_parts == 2 && group->parts[0].kind == RF_PART_SELF && group->parts[1].kind == RF_PART_MLP &&
        !is_temporal(&group->parts[0]) && plan[0] != RF_DO_COMPUTE && plan[1] == RF_DO_ROWS) {
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
        if (p->done) return RF_OK;
        if (p->group == NULL && s->observer != NULL && p->stream != NULL) {
            RF_TRY(rf_dit_settle(p, pending, err));
            s->observer(s->observer_user, block, i, s->b.x, p->rows, s->model->desc.width);
        }
    }
    return RF_OK;
}

/* The last block both ways: computed from its predicted input, and predicted (SpeCa). */
static rf_status run_verified(rf_dit_pass *p, int block, const rf_block_group *group, int64_t first_chunk,
                              rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_cache_group *g = p->group;
    RF_TRY(rf_dit_settle(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(run_block(p, block, group, first_chunk, pending, true, err));
    RF_TRY(rf_dit_settle(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 0, s->b.x, err));
    RF_TRY(rf_cache_verify_load(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(run_block(p, block, group, first_chunk, pending, false, err));
    RF_TRY(rf_dit_settle(p, pending, err));
    RF_TRY(rf_cache_verify_keep(s->cache, p->stream, g, 1, s->b.x, err));
    RF_TRY(rf_cache_verify_measure(s->cache, p->stream, g, err));
    return g->plan->use_verified ? rf_cache_verify_load(s->cache, p->stream, g, 0, s->b.x, err) : RF_OK;
}

rf_patchify_args rf_dit_patchify_args(const rf_dit_session *s, const float *latent, const float *in_scale,
                                      int64_t in_scale_stride) {
    const rf_dit_desc *d = &s->model->desc;
    return (rf_patchify_args){.latent = latent,
                              .out = s->b.patches,
                              .dtype = s->model->dtype,
                              /* frame by frame, [samples, frames, channels, height, width]: a frame is a sample here */
                              .batch =
                                  s->options.batch * (s->model->desc.mod_rows == RF_MOD_ROWS_FRAME ? s->frames : 1),
                              .branches = s->options.branches,
                              .channels = d->in_channels,
                              .frames = s->model->desc.mod_rows == RF_MOD_ROWS_FRAME ? 1 : s->options.frames,
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
rf_status rf_dit_embed(rf_dit_pass *p, const float *latent, const float *in_scale, int64_t in_scale_stride,
                       rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    int64_t width = s->model->desc.width;
    rf_patchify_args args = rf_dit_patchify_args(s, latent, in_scale, in_scale_stride);
    args.batch = args.batch * p->samples / s->samples;
    args.sample_index = p->group ? p->group->samples : NULL;
    RF_TRY(s->ops->patchify(p->stream, &args, err));
    RF_TRY(rf_dit_linear(p, &s->model->patch, s->b.patches, s->b.y, p->rows, width, s->patch_dim, RF_ACT_NONE,
                         s->model->dtype, err));
    *pending = (rf_dit_pending){.active = true, .base = s->b.pos, .base_period = s->tokens, .y = s->b.y, .gate = -1};
    return RF_OK;
}

rf_dit_pass rf_dit_whole_batch(rf_dit_session *s, rf_stream *stream) {
    return (rf_dit_pass){
        .s = s, .stream = stream, .samples = s->samples, .rows = s->rows, .mod_index = s->b.mod_index, .boundary = -1};
}

/* Which block a span prediction of this plan takes the place of; NULL if none. */
const rf_cache_span *rf_dit_produced_span(const rf_dit_pass *p) {
    if (p->group == NULL || p->group->plan->kind == RF_STEP_FULL || p->group->plan->kind == RF_STEP_PROBE) return NULL;
    if (p->group->plan->produce != RF_PRODUCE_SPAN) return NULL;
    return &rf_cache_get_layout(p->s->cache)->spans[p->group->plan->span];
}

rf_status rf_dit_run_blocks(rf_dit_pass *p, int from, int to, rf_dit_pending *pending, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    const rf_cache_span *produced = rf_dit_produced_span(p);
    int64_t chunk = 0;
    int block = 0, last = rf_dit_desc_num_blocks(d) - 1;
    for (int g = 0; g < d->num_groups; g++) {
        const rf_block_group *group = &d->groups[g];
        for (int i = 0; i < group->count; i++, block++, chunk += group->num_chunks) {
            if (block < from || block >= to || p->done) continue;
            if (produced && block == produced->begin) {
                p->boundary = -1;
                RF_TRY(rf_dit_settle(p, pending, err));
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

rf_status rf_dit_finish(rf_dit_pass *p, rf_dit_pending *pending, float *out, rf_error *err) {
    rf_dit_session *s = p->s;
    const rf_dit_desc *d = &s->model->desc;
    int64_t shift = rf_dit_desc_num_chunks(d) - 2; /* the last two chunks are the final norm's */
    norm_spec norm = {.kind = d->final_norm,
                      .eps = d->final_eps,
                      .shift = d->cond_dim ? shift * d->width : -1,
                      .scale = d->cond_dim ? (shift + 1) * d->width : -1,
                      .weight = s->model->final_norm.weight,
                      .bias = s->model->final_norm.bias};
    p->boundary = rf_dit_desc_num_blocks(d);
    RF_TRY(settle(p, pending, &norm, err));
    return rf_dit_linear(p, &s->model->final, s->b.h, out, p->rows, s->out_dim, d->width, RF_ACT_NONE, RF_DTYPE_F32,
                         err);
}

/* The whole forward: queued on stream, or only checked if stream is NULL. */
rf_status rf_dit_walk(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                      int64_t in_scale_stride, rf_error *err) {
    rf_dit_pass p = rf_dit_whole_batch(s, stream);
    rf_dit_pending pending = {0};
    RF_TRY(rf_dit_embed(&p, latent, in_scale, in_scale_stride, &pending, err));
    RF_TRY(rf_dit_run_blocks(&p, 0, rf_dit_desc_num_blocks(&s->model->desc), &pending, err));
    return p.done ? RF_OK : rf_dit_finish(&p, &pending, s->b.out, err);
}
