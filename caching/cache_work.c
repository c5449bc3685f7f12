/* caching/cache_work.c - the queued side of the runtime: moving rows into and out of rings, predicting, measuring.
 *
 * Everything here may be recorded in a CUDA graph: arguments are fixed for a kind of step, what varies is in the uploaded block.
 * Order within a refresh: predict with the old ring (drift guard) -> measure -> store. */
#include <string.h>

#include "caching/cache_internal.h"

static const int32_t *index_of(const rf_cache *c, const rf_cache_group *g) {
    return g->identity ? NULL : c->on_device.index;
}

static float *signal_of(const rf_cache *c, rf_signal signal) {
    return c->d.signals ? c->d.signals + (size_t)signal * (size_t)c->all_groups * 4 : NULL;
}

static bool measures(const rf_cache *c, rf_signal signal) {
    return (c->signals >> signal & 1) != 0;
}

/* A plain copy of packed groups, or into / out of state. */
static rf_group_copy_args copy_args(const rf_cache *c, int64_t groups, int64_t cols, const void *a, rf_dtype a_dtype,
                                    void *dst, rf_dtype dst_dtype) {
    return (rf_group_copy_args){.a = a,
                                .dst = dst,
                                .a_dtype = a_dtype,
                                .b_dtype = a_dtype,
                                .dst_dtype = dst_dtype,
                                .groups = groups,
                                .rows = c->shape.tokens,
                                .cols = cols,
                                .b_cols = cols,
                                .a_ld = cols,
                                .b_ld = cols,
                                .dst_ld = cols};
}

static rf_reduce_pair_args pair_args(const rf_cache *c, int64_t groups, int64_t cols, const void *a, rf_dtype a_dtype,
                                     const void *b, rf_dtype b_dtype, rf_signal signal) {
    return (rf_reduce_pair_args){.a = a,
                                 .b = b,
                                 .a_dtype = a_dtype,
                                 .b_dtype = b_dtype,
                                 .groups = groups,
                                 .rows = c->shape.tokens,
                                 .cols = cols,
                                 .a_ld = cols,
                                 .b_ld = cols,
                                 .out = signal_of(c, signal),
                                 .workspace = c->d.reduce_workspace,
                                 .workspace_bytes = (size_t)c->all_groups * 256 * 4 * sizeof(float)};
}

/* dst = prediction of the group's state from a ring. */
static rf_combine_args predict_args(const rf_cache *c, const rf_cache_group *g, const void *ring, rf_dtype dtype,
                                    int depth, int64_t cols, void *dst, rf_dtype dst_dtype) {
    return (rf_combine_args){.ring = ring,
                             .ring_dtype = dtype,
                             .num_slots = rf_cache_slots(c, depth),
                             .num_classes = c->num_classes,
                             .slot_stride = rf_cache_slot_stride(c, cols),
                             .weights = c->on_device.weights,
                             .row_class = c->num_classes > 1 ? c->d.row_class : NULL,
                             .base_dtype = dst_dtype,
                             .base_ld = cols,
                             .dst = dst,
                             .dst_dtype = dst_dtype,
                             .dst_ld = cols,
                             .groups = g->groups,
                             .rows = c->shape.tokens,
                             .cols = cols,
                             .src_index = index_of(c, g)};
}

float *rf_cache_input(rf_cache *c) {
    return c->d.input;
}

rf_status rf_cache_head(rf_cache *c, rf_stream *stream, const void *modulated, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    if (measures(c, RF_SIGNAL_INPUT_STEP)) {
        /* latents are shared by the branches: measured once, kept in the first branch's place */
        rf_reduce_pair_args pair = pair_args(c, s->batch, s->in_cols, c->d.input, RF_DTYPE_F32, c->d.input_prev,
                                             RF_DTYPE_F32, RF_SIGNAL_INPUT_STEP);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
        rf_group_copy_args copy =
            copy_args(c, s->batch, s->in_cols, c->d.input, RF_DTYPE_F32, c->d.input_prev, RF_DTYPE_F32);
        RF_TRY(c->ops->group_copy(stream, &copy, err));
    }
    if (measures(c, RF_SIGNAL_MODULATED_STEP)) {
        rf_dtype dtype = c->dtypes.feature_dtype;
        rf_reduce_pair_args pair = pair_args(c, c->all_groups, s->width, modulated, dtype, c->d.modulated_prev, dtype,
                                             RF_SIGNAL_MODULATED_STEP);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
        rf_group_copy_args copy = copy_args(c, c->all_groups, s->width, modulated, dtype, c->d.modulated_prev, dtype);
        RF_TRY(c->ops->group_copy(stream, &copy, err));
    }
    return RF_OK;
}

rf_status rf_cache_post(rf_cache *c, rf_stream *stream, const int32_t *step, bool advanced, rf_error *err) {
    rf_post_args args = {.src = c->d.signals,
                         .num = (int64_t)c->signal_floats,
                         .stride = (int64_t)c->signal_floats,
                         .host = c->history,
                         .step = step,
                         .step_offset = advanced ? -1 : 0,
                         .count = c->d.post_count,
                         .host_count = c->host_count};
    return c->ops->post(stream, &args, err);
}

/* --- spans ------------------------------------------------------------------------------------------------------------- */

rf_status rf_cache_span_enter(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int span, const void *x,
                              rf_error *err) {
    const rf_cache_span *spec = &c->layout.spans[span];
    if (spec->depth == 0 || !spec->delta || g->plan->kind != RF_STEP_FULL) return RF_OK;
    rf_dtype dtype = c->dtypes.residual_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, c->shape.width, x, dtype, c->d.span_in[span], dtype);
    return c->ops->group_copy(stream, &copy, err);
}

rf_status rf_cache_span_leave(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int span, const void *x,
                              rf_error *err) {
    const rf_cache_span *spec = &c->layout.spans[span];
    if (spec->depth == 0 || g->plan->kind != RF_STEP_FULL) return RF_OK;
    int64_t width = c->shape.width;
    rf_dtype dtype = c->dtypes.feature_dtype, residual = c->dtypes.residual_dtype;
    bool drift = g->measures_drift && (g->plan->produce == RF_PRODUCE_SPAN ? g->plan->span == span : span == 0);
    bool refresh =
        span == 0 && g->has_history && (measures(c, RF_SIGNAL_SPAN_REFRESH) || measures(c, RF_SIGNAL_SPAN_NORMS));
    const void *value = x, *minus = spec->delta ? c->d.span_in[span] : NULL;
    rf_dtype value_dtype = residual;
    if ((drift || refresh) && spec->delta) { /* the new value itself is needed more than once */
        rf_group_copy_args copy = copy_args(c, g->groups, width, x, residual, c->d.scratch[0], RF_DTYPE_F32);
        copy.b = minus;
        copy.b_dtype = residual;
        RF_TRY(c->ops->group_copy(stream, &copy, err));
        value = c->d.scratch[0];
        value_dtype = RF_DTYPE_F32;
        minus = NULL;
    }
    if (drift) {
        rf_combine_args predict =
            predict_args(c, g, c->d.span_ring[span], dtype, spec->depth, width, c->d.scratch[1], RF_DTYPE_F32);
        RF_TRY(c->ops->combine(stream, &predict, err));
        rf_reduce_pair_args pair =
            pair_args(c, g->groups, width, c->d.scratch[1], RF_DTYPE_F32, value, value_dtype, RF_SIGNAL_DRIFT);
        pair.out_index = index_of(c, g);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    }
    for (int norms = 0; norms < 2 && refresh; norms++) {
        rf_signal signal = norms ? RF_SIGNAL_SPAN_NORMS : RF_SIGNAL_SPAN_REFRESH;
        if (!measures(c, signal)) continue;
        rf_reduce_pair_args pair = pair_args(c, g->groups, width, value, value_dtype, c->d.span_ring[0], dtype, signal);
        pair.kind = norms ? RF_REDUCE_ROW_NORMS : RF_REDUCE_PLAIN;
        pair.b_index = c->on_device.newest_span;
        pair.out_index = index_of(c, g);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    }
    rf_group_copy_args store = copy_args(c, g->groups, width, value, value_dtype, c->d.span_ring[span], dtype);
    store.b = minus;
    store.b_dtype = residual;
    store.dst_index = c->on_device.write_span;
    return c->ops->group_copy(stream, &store, err);
}

rf_status rf_cache_span_produce(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int span, void *x,
                                rf_error *err) {
    const rf_cache_span *spec = &c->layout.spans[span];
    rf_dtype residual = c->dtypes.residual_dtype;
    rf_combine_args predict =
        predict_args(c, g, c->d.span_ring[span], c->dtypes.feature_dtype, spec->depth, c->shape.width, x, residual);
    if (spec->delta) {
        predict.base = x;
        predict.base_cols = c->shape.width;
    }
    return c->ops->combine(stream, &predict, err);
}

/* --- probe --------------------------------------------------------------------------------------------------------------- */

rf_status rf_cache_probe_begin(rf_cache *c, rf_stream *stream, const rf_cache_group *g, const void *x, rf_error *err) {
    rf_dtype dtype = c->dtypes.residual_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, c->shape.width, x, dtype, c->d.probe_in, dtype);
    return c->ops->group_copy(stream, &copy, err);
}

rf_status rf_cache_probe_end(rf_cache *c, rf_stream *stream, const rf_cache_group *g, const void *x, rf_error *err) {
    rf_dtype dtype = c->dtypes.feature_dtype, residual = c->dtypes.residual_dtype;
    bool full = g->plan->kind == RF_STEP_FULL;
    rf_group_copy_args copy =
        copy_args(c, g->groups, c->shape.width, x, residual, full ? c->d.probe_ref : c->d.probe_now, dtype);
    copy.b = c->d.probe_in;
    copy.b_dtype = residual;
    copy.dst_index = full ? c->on_device.write_probe : index_of(c, g);
    RF_TRY(c->ops->group_copy(stream, &copy, err));
    if (full) return RF_OK;
    rf_reduce_pair_args pair =
        pair_args(c, g->groups, c->shape.width, c->d.probe_now, dtype, c->d.probe_ref, dtype, RF_SIGNAL_PROBE);
    pair.a_index = pair.out_index = index_of(c, g);
    pair.b_index = c->on_device.newest_probe;
    RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    copy = copy_args(c, g->groups, c->shape.width, x, residual, c->d.probe_x, residual);
    copy.dst_index = index_of(c, g);
    return c->ops->group_copy(stream, &copy, err);
}

rf_status rf_cache_probe_resume(rf_cache *c, rf_stream *stream, const rf_cache_group *g, void *x, rf_error *err) {
    rf_dtype dtype = c->dtypes.feature_dtype, residual = c->dtypes.residual_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, c->shape.width, c->d.probe_x, residual, x, residual);
    copy.a_index = index_of(c, g);
    RF_TRY(c->ops->group_copy(stream, &copy, err));
    if (g->plan->kind != RF_STEP_FULL) return RF_OK;
    copy = copy_args(c, g->groups, c->shape.width, c->d.probe_now, dtype, c->d.probe_ref, dtype);
    copy.a_index = index_of(c, g);
    copy.dst_index = c->on_device.write_probe;
    return c->ops->group_copy(stream, &copy, err);
}

/* --- parts --------------------------------------------------------------------------------------------------------------- */

static int site(const rf_cache *c, int block, int part) {
    return c->site_of[block * c->shape.num_parts + part];
}

static char *site_ring(const rf_cache *c, int at, int slot) {
    if (c->d.part_ring == NULL) return NULL;
    size_t bytes = (size_t)rf_cache_slot_stride(c, c->shape.width) * rf_dtype_bytes(c->dtypes.feature_dtype);
    return (char *)c->d.part_ring + ((size_t)at * (size_t)rf_cache_slots(c, c->part_depth) + (size_t)slot) * bytes;
}

static bool stores_part(const rf_cache *c, const rf_cache_group *g, int block, int part) {
    return site(c, block, part) >= 0 && (g->plan->kind == RF_STEP_FULL || c->part_depth == 1);
}

static bool part_drift(const rf_cache *c, const rf_cache_group *g, int block, int part) {
    return g->plan->kind == RF_STEP_FULL && g->measures_drift && g->plan->produce == RF_PRODUCE_NONE &&
           block * c->shape.num_parts + part == c->last_part;
}

rf_status rf_cache_part_before(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int block, int part,
                               void **y_dst, rf_error *err) {
    if (!stores_part(c, g, block, part)) return RF_OK;
    if (part_drift(c, g, block, part)) {
        rf_combine_args predict = predict_args(c, g, site_ring(c, site(c, block, part), 0), c->dtypes.feature_dtype,
                                               c->part_depth, c->shape.width, c->d.scratch[0], RF_DTYPE_F32);
        RF_TRY(c->ops->combine(stream, &predict, err));
    }
    if (g->identity && g->slot >= 0) *y_dst = site_ring(c, site(c, block, part), g->slot);
    return RF_OK;
}

rf_status rf_cache_part_after(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int block, int part,
                              const void *y, rf_error *err) {
    if (!stores_part(c, g, block, part)) return RF_OK;
    rf_dtype dtype = c->dtypes.feature_dtype;
    if (part_drift(c, g, block, part)) {
        rf_reduce_pair_args pair =
            pair_args(c, g->groups, c->shape.width, c->d.scratch[0], RF_DTYPE_F32, y, dtype, RF_SIGNAL_DRIFT);
        pair.out_index = index_of(c, g);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    }
    if (g->identity && g->slot >= 0) return RF_OK;
    rf_group_copy_args copy =
        copy_args(c, g->groups, c->shape.width, y, dtype, site_ring(c, site(c, block, part), 0), dtype);
    copy.dst_index = c->on_device.write_part;
    return c->ops->group_copy(stream, &copy, err);
}

void rf_cache_part_terms(const rf_cache *c, const rf_cache_group *g, int block, int part, rf_residual_args *args) {
    int at = site(c, block, part);
    bool rows = g->plan->parts[block * c->shape.num_parts + part] == RF_DO_ROWS; /* its ring was just completed */
    if (g->identity && (rows || g->reuses) && c->part_depth == 1 && g->newest >= 0) {
        args->num_terms = 1;
        args->terms[0] = site_ring(c, at, g->newest);
        return;
    }
    args->num_terms = rf_cache_slots(c, c->part_depth);
    for (int j = 0; j < args->num_terms; j++) args->terms[j] = site_ring(c, at, j);
    args->weights = c->on_device.weights;
    args->term_group = g->identity ? c->d.identity : c->on_device.index;
    args->rows_per_term_group = c->shape.tokens;
}

/* --- token rows ------------------------------------------------------------------------------------------------------------ */

rf_status rf_cache_select(rf_cache *c, rf_stream *stream, const rf_cache_group *g, rf_error *err) {
    if (!c->layout.tokens.used) return RF_OK;
    size_t rows = (size_t)c->all_groups * (size_t)c->shape.tokens, bytes = (size_t)c->num_attention * rows * 4;
    if (g->plan->kind == RF_STEP_FULL && g->identity)
        return stream ? rf_stream_zero(stream, c->d.ages, bytes, err) : RF_OK;
    rf_token_select_args args = {.s1 = c->d.row_scores,
                                 .age = c->d.ages,
                                 .counts = c->on_device.counts,
                                 .index = index_of(c, g),
                                 .rows_packed = c->d.rows_packed,
                                 .rows_state = c->d.rows_state,
                                 .place = c->d.place,
                                 .list_stride = (int64_t)rows,
                                 .num_sites = c->num_attention,
                                 .groups = g->groups,
                                 .all_groups = c->all_groups,
                                 .tokens = c->shape.tokens,
                                 .frames = c->shape.frames,
                                 .grid_h = c->shape.grid_h,
                                 .grid_w = c->shape.grid_w,
                                 .cell = c->layout.tokens.cell,
                                 .age_weight = c->layout.tokens.age_weight,
                                 .bonus = c->layout.tokens.bonus,
                                 .random = c->layout.tokens.random,
                                 .groups_per_branch = c->shape.batch,
                                 .seed = c->layout.tokens.seed + RF_CACHE_MLP,
                                 .step = c->on_device.counts ? c->on_device.counts + c->num_attention : NULL,
                                 .workspace = c->d.select_workspace,
                                 .workspace_bytes = bytes};
    return c->ops->token_select(stream, &args, err);
}

rf_cache_rows rf_cache_rows_of(const rf_cache *c, const rf_cache_group *g, int block, int part) {
    size_t offset = (size_t)c->attention_of[block] * (size_t)c->all_groups * (size_t)c->shape.tokens;
    return (rf_cache_rows){.place = c->d.place ? c->d.place + offset : NULL,
                           .packed = c->d.rows_packed ? c->d.rows_packed + offset : NULL,
                           .state = c->d.rows_state ? c->d.rows_state + offset : NULL,
                           .count = g->plan->rows[block * c->shape.num_parts + part]};
}

rf_status rf_cache_scatter(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int block, int part, const void *y,
                           rf_error *err) {
    rf_cache_rows rows = rf_cache_rows_of(c, g, block, part);
    rf_rows_args args = {.src = y,
                         .dst = site_ring(c, site(c, block, part), 0),
                         .rows = rows.state,
                         .dtype = c->dtypes.feature_dtype,
                         .num_rows = g->groups * rows.count,
                         .cols = c->shape.width};
    return c->ops->scatter_rows(stream, &args, err);
}

void *rf_cache_part_ring(rf_cache *c, int block, int part) {
    return site_ring(c, site(c, block, part), 0);
}

void *rf_cache_qkv(rf_cache *c, int block) {
    if (c->d.qkv == NULL || c->attention_of[block] < 0) return NULL;
    size_t bytes = (size_t)rf_cache_slot_stride(c, 3 * c->shape.width) * rf_dtype_bytes(c->dtypes.feature_dtype);
    return (char *)c->d.qkv + (size_t)c->attention_of[block] * bytes;
}

rf_status rf_cache_keep_qkv(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int block, const void *qkv,
                            rf_error *err) {
    void *kept = rf_cache_qkv(c, block);
    if (kept == NULL || kept == qkv) return RF_OK;
    rf_dtype dtype = c->dtypes.feature_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, 3 * c->shape.width, qkv, dtype, kept, dtype);
    copy.dst_index = index_of(c, g);
    return c->ops->group_copy(stream, &copy, err);
}

bool rf_cache_wants_scores(const rf_cache *c, const rf_cache_group *g) {
    return c->layout.tokens.used && !c->layout.tokens.random;
}

float *rf_cache_lse(rf_cache *c) {
    return c->layout.tokens.value_score ? NULL : c->d.lse;
}

rf_status rf_cache_score(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int block, const void *qkv,
                         rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    size_t elem = rf_dtype_bytes(c->dtypes.feature_dtype), width = (size_t)s->width;
    const char *q = qkv;
    rf_row_score_args args = {
        .kind = c->layout.tokens.value_score ? RF_ROW_SCORE_VALUE : RF_ROW_SCORE_ATTENTION,
        .q = q,
        .k = q ? q + width * elem : NULL,
        .v = q ? q + 2 * width * elem : NULL,
        .dtype = c->dtypes.feature_dtype,
        .groups = g->groups,
        .rows = s->tokens,
        .num_heads = c->dtypes.num_heads,
        .head_dim = c->dtypes.head_dim,
        .batch_stride = 3 * s->width * s->tokens,
        .row_stride = 3 * s->width,
        .head_stride = c->dtypes.head_dim,
        .softmax_scale = c->dtypes.softmax_scale,
        .lse = c->d.lse,
        .out = c->d.row_scores
                   ? c->d.row_scores + (size_t)c->attention_of[block] * (size_t)c->all_groups * (size_t)s->tokens
                   : NULL,
        .index = index_of(c, g),
        .workspace = (float *)c->d.score_workspace,
        .workspace_bytes = rf_row_score_workspace_bytes(c->all_groups, s->tokens, c->dtypes.num_heads)};
    return c->ops->row_score(stream, &args, err);
}

/* --- verification ------------------------------------------------------------------------------------------------------------ */

rf_status rf_cache_verify_keep(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int which, const void *x,
                               rf_error *err) {
    rf_dtype dtype = c->dtypes.residual_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, c->shape.width, x, dtype, c->d.verify[which], dtype);
    return c->ops->group_copy(stream, &copy, err);
}

rf_status rf_cache_verify_load(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int which, void *x,
                               rf_error *err) {
    rf_dtype dtype = c->dtypes.residual_dtype;
    rf_group_copy_args copy = copy_args(c, g->groups, c->shape.width, c->d.verify[which], dtype, x, dtype);
    return c->ops->group_copy(stream, &copy, err);
}

rf_status rf_cache_verify_measure(rf_cache *c, rf_stream *stream, const rf_cache_group *g, rf_error *err) {
    rf_dtype dtype = c->dtypes.residual_dtype;
    rf_reduce_pair_args pair =
        pair_args(c, g->groups, c->shape.width, c->d.verify[0], dtype, c->d.verify[1], dtype, RF_SIGNAL_VERIFY);
    pair.kind = RF_REDUCE_RATIO;
    pair.out_index = index_of(c, g);
    return c->ops->reduce_pair(stream, &pair, err);
}

/* --- outputs --------------------------------------------------------------------------------------------------------------- */

static rf_combine_args predict_output(const rf_cache *c, const rf_cache_group *g, float *dst) {
    const rf_cache_shape *s = &c->shape;
    rf_combine_args predict =
        predict_args(c, g, c->d.output_ring, RF_DTYPE_F32, c->layout.output_depth, s->out_cols, dst, RF_DTYPE_F32);
    if (c->class_cells > 1 && predict.row_class != NULL) { /* a class for every range of columns: rows of that many */
        predict.rows *= c->class_cells;
        predict.cols /= c->class_cells;
        predict.dst_ld = predict.cols;
    }
    if (c->layout.output_delta) {
        predict.base = c->d.input;
        predict.base_cols = predict.base_ld = s->in_cols;
        predict.base_index = c->on_device.image_of;
    }
    return predict;
}

/* What a FULL step measures of its output against the last stored one, and the new references. */
static rf_status measure_output(rf_cache *c, rf_stream *stream, const rf_cache_group *g, const float *packed,
                                rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    rf_reduce_pair_args pair;
    if (g->measures_drift && g->plan->produce == RF_PRODUCE_OUTPUT) {
        rf_combine_args predict = predict_output(c, g, c->d.scratch[0]);
        RF_TRY(c->ops->combine(stream, &predict, err));
        pair =
            pair_args(c, g->groups, s->pred_cols, c->d.scratch[0], RF_DTYPE_F32, packed, RF_DTYPE_F32, RF_SIGNAL_DRIFT);
        pair.a_ld = pair.b_ld = s->out_cols;
        pair.out_index = index_of(c, g);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    }
    if (measures(c, RF_SIGNAL_OUTPUT_SIZE)) {
        pair = pair_args(c, g->groups, s->pred_cols, packed, RF_DTYPE_F32, NULL, RF_DTYPE_F32, RF_SIGNAL_OUTPUT_SIZE);
        pair.a_ld = s->out_cols;
        pair.out_index = index_of(c, g);
        RF_TRY(c->ops->reduce_pair(stream, &pair, err));
    }
    if (measures(c, RF_SIGNAL_OUTPUT_REFRESH)) {
        if (g->has_history) {
            pair = pair_args(c, g->groups, s->pred_cols, packed, RF_DTYPE_F32, c->d.output_ref, RF_DTYPE_F32,
                             RF_SIGNAL_OUTPUT_REFRESH);
            pair.a_ld = pair.b_ld = s->out_cols;
            pair.b_index = pair.out_index = index_of(c, g);
            RF_TRY(c->ops->reduce_pair(stream, &pair, err));
        }
        rf_group_copy_args copy =
            copy_args(c, g->groups, s->out_cols, packed, RF_DTYPE_F32, c->d.output_ref, RF_DTYPE_F32);
        copy.dst_index = index_of(c, g);
        RF_TRY(c->ops->group_copy(stream, &copy, err));
    }
    if (measures(c, RF_SIGNAL_INPUT_REFRESH)) {
        const int32_t *samples = g->identity ? NULL : c->on_device.samples;
        if (g->has_history) {
            pair = pair_args(c, g->num, s->in_cols, c->d.input, RF_DTYPE_F32, c->d.input_ref, RF_DTYPE_F32,
                             RF_SIGNAL_INPUT_REFRESH);
            pair.a_index = pair.b_index = pair.out_index = samples;
            RF_TRY(c->ops->reduce_pair(stream, &pair, err));
        }
        rf_group_copy_args copy =
            copy_args(c, g->num, s->in_cols, c->d.input, RF_DTYPE_F32, c->d.input_ref, RF_DTYPE_F32);
        copy.a_index = copy.dst_index = samples;
        RF_TRY(c->ops->group_copy(stream, &copy, err));
    }
    return RF_OK;
}

/* One stream of the outputs: pointers stand at its first row and column. */
static rf_status measure_stream(rf_cache *c, rf_stream *stream, const rf_cache_group *g, int which, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    const rf_cache_stream *of = &c->streams[which];
    bool pooled = c->layout.curvature.pooled && s->branches == 2;
    int64_t cell = s->out_cols / c->class_cells, end = of->col_end == s->pred_cols ? s->out_cols : of->col_end;
    float *drift = signal_of(c, RF_SIGNAL_COUNT);
    rf_curvature_args args = {
        .ring = c->d.output_ring ? c->d.output_ring + of->row_begin * s->out_cols + of->col_begin : NULL,
        .slot_stride = rf_cache_slot_stride(c, s->out_cols),
        .ld = s->out_cols,
        .cols = of->col_end - of->col_begin,
        .rows = of->row_end - of->row_begin,
        .group_rows = s->tokens,
        .class_ld = c->class_cells,
        .num_classes_per_row = (end - of->col_begin) / cell,
        .num_sets = pooled ? g->num : g->groups,
        .groups_per_set = pooled ? 2 : 1,
        .index = index_of(c, g),
        .slots = c->on_device.ages,
        .gaps = c->on_device.gaps,
        .p_stable = c->layout.curvature.p_stable,
        .p_chaotic = c->layout.curvature.p_chaotic,
        .eps = c->layout.curvature.eps,
        .floor = c->layout.curvature.floor,
        .mean_over_all = c->layout.curvature.mean_over_all,
        .horizon = c->horizon,
        .row_class = c->d.row_class ? c->d.row_class + of->row_begin * c->class_cells + of->col_begin / cell : NULL,
        .kappa = c->d.kappa ? c->d.kappa + which * c->all_groups * s->tokens + of->row_begin : NULL,
        .drift = drift ? drift + which * c->all_groups * c->horizon : NULL,
        .workspace = c->d.curvature_workspace,
        .workspace_bytes = rf_curvature_workspace_bytes(c->all_groups, s->tokens)};
    memcpy(args.step_a, c->layout.curvature.step_a, sizeof args.step_a);
    memcpy(args.step_b, c->layout.curvature.step_b, sizeof args.step_b);
    return c->ops->curvature(stream, &args, err);
}

static rf_status measure_curvature(rf_cache *c, rf_stream *stream, const rf_cache_group *g, rf_error *err) {
    for (int i = 0; i < c->num_streams; i++) RF_TRY(measure_stream(c, stream, g, i, err));
    return RF_OK;
}

rf_status rf_cache_output_computed(rf_cache *c, rf_stream *stream, const rf_cache_group *g, const float *packed,
                                   float *out, rf_error *err) {
    const rf_cache_shape *s = &c->shape;
    if (packed != out || !g->identity) {
        rf_group_copy_args copy = copy_args(c, g->groups, s->out_cols, packed, RF_DTYPE_F32, out, RF_DTYPE_F32);
        copy.dst_index = index_of(c, g);
        RF_TRY(c->ops->group_copy(stream, &copy, err));
    }
    if (g->plan->kind != RF_STEP_FULL) return RF_OK;
    RF_TRY(measure_output(c, stream, g, packed, err));
    if (c->layout.output_depth == 0) return RF_OK;
    rf_group_copy_args store =
        copy_args(c, g->groups, s->out_cols, packed, RF_DTYPE_F32, c->d.output_ring, RF_DTYPE_F32);
    store.dst_index = c->on_device.write_output;
    if (c->layout.output_delta) {
        store.b = c->d.input;
        store.b_cols = store.b_ld = s->in_cols;
        store.b_index = c->on_device.image_of;
    }
    RF_TRY(c->ops->group_copy(stream, &store, err));
    return c->layout.curvature.used ? measure_curvature(c, stream, g, err) : RF_OK;
}

rf_status rf_cache_output_produce(rf_cache *c, rf_stream *stream, const rf_cache_group *g, float *out, rf_error *err) {
    rf_combine_args predict = predict_output(c, g, out);
    predict.dst_index = index_of(c, g);
    return c->ops->combine(stream, &predict, err);
}
