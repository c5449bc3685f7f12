/* dlm/pass_layers.c - what a pass queues: inputs, layers, head.
 *
 * Of a layer: qkv GEMM, split + rotary + scatter into the cache, attention, out GEMM, residual + norm, gate and up
 * GEMM, SwiGLU, down GEMM, residual + the next layer's norm: ten launches at most. The same code checks (stream NULL),
 * runs and is captured. */
#include <math.h>

#include "dlm/forward_internal.h"

rf_status rf_text_linear(const rf_text_run *run, const void *x, const void *w, const void *bias, void *y, int64_t m,
                         int64_t n, int64_t k, rf_error *err) {
    rf_gemm_args args = rf_gemm_args_default(run->s->model->dtype, m, n, k);
    args.x = x;
    args.w = w;
    args.bias = bias;
    args.y = y;
    args.w_is_constant = true;
    return run->s->ops->gemm(run->stream, &args, err);
}

rf_status rf_text_copy_rows(const rf_text_run *run, bool gather, const void *src, void *dst, const int32_t *rows,
                            rf_dtype dtype, int64_t num, int64_t cols, rf_error *err) {
    rf_rows_args args = {.src = src, .dst = dst, .rows = rows, .dtype = dtype, .num_rows = num, .cols = cols};
    return (gather ? run->s->ops->gather_rows : run->s->ops->scatter_rows)(run->stream, &args, err);
}

rf_norm_args rf_text_norm_args(const rf_text_session *s, const void *x, void *y, int64_t m, const float *weight) {
    return (rf_norm_args){.x = x,
                          .y = y,
                          .x_dtype = s->options.residual_dtype,
                          .y_dtype = s->model->dtype,
                          .num_rows = m,
                          .cols = s->model->desc.hidden,
                          .kind = RF_NORM_RMS,
                          .eps = (float)s->model->desc.norm_eps,
                          .weight = weight,
                          .shift = -1,
                          .scale = -1};
}

rf_status rf_text_residual(const rf_text_run *run, void *x, const void *y, void *h, const float *weight, int64_t m,
                           void *store, const int32_t *store_rows, rf_error *err) {
    const rf_text_session *s = run->s;
    rf_residual_args args = {.x = x,
                             .num_terms = 1,
                             .terms = {y},
                             .x_dtype = s->options.residual_dtype,
                             .base_dtype = RF_DTYPE_F32,
                             .y_dtype = s->model->dtype,
                             .num_rows = m,
                             .cols = s->model->desc.hidden,
                             .gate = -1,
                             .extra_gate = -1,
                             .norm_y = weight ? h : NULL,
                             .norm_y_dtype = s->model->dtype,
                             .norm_kind = RF_NORM_RMS,
                             .norm_eps = (float)s->model->desc.norm_eps,
                             .norm_weight = weight,
                             .norm_shift = -1,
                             .norm_scale = -1};
    if (store) {
        args.rows = rf_text_at(run, run->at.iota);
        args.store = store;
        args.store_rows = store_rows;
    }
    return s->ops->residual(run->stream, &args, err);
}

rf_status rf_text_qkv_rope(const rf_text_run *run, int layer, int64_t m, const int32_t *positions, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_model *model = s->model;
    const rf_text_desc *d = &model->desc;
    rf_qkv_rope_args args = {.qkv = s->b.wide,
                             .q_out = s->b.q,
                             .k = rf_text_keys(s, layer),
                             .v = rf_text_values(s, layer),
                             .dtype = model->dtype,
                             .batch = s->options.batch,
                             .rows = m,
                             .num_q_heads = d->num_q_heads,
                             .num_kv_heads = d->num_kv_heads,
                             .head_dim = d->head_dim,
                             .pairs = d->head_dim / 2,
                             .cache_rows = s->cache_rows,
                             .k_batch_stride = s->cache_rows * s->kv_cols,
                             .k_row_stride = s->kv_cols,
                             .positions = positions,
                             .q_norm = model->layers[layer].q_norm,
                             .k_norm = model->layers[layer].k_norm,
                             .norm_eps = (float)d->norm_eps,
                             .table = model->rope,
                             .table_rows = model->rope_positions};
    return s->ops->qkv_rope(run->stream, &args, err);
}

rf_attention_args rf_text_attention_args(const rf_text_run *run, int layer, int64_t q_len) {
    const rf_text_session *s = run->s;
    const rf_text_desc *d = &s->model->desc;
    return (rf_attention_args){.q = s->b.q,
                               .k = rf_text_keys(s, layer),
                               .v = rf_text_values(s, layer),
                               .out = s->b.attn,
                               .dtype = s->model->dtype,
                               .batch = s->options.batch,
                               .num_q_heads = d->num_q_heads,
                               .num_kv_heads = d->num_kv_heads,
                               .head_dim = d->head_dim,
                               .q_len = q_len,
                               .kv_len = run->shape.keys,
                               .q_batch_stride = q_len * s->q_cols,
                               .q_row_stride = s->q_cols,
                               .q_head_stride = d->head_dim,
                               .kv_batch_stride = s->cache_rows * s->kv_cols,
                               .kv_row_stride = s->kv_cols,
                               .kv_head_stride = d->head_dim,
                               .out_batch_stride = q_len * s->q_cols,
                               .out_row_stride = s->q_cols,
                               .out_head_stride = d->head_dim,
                               .softmax_scale = (float)(1.0 / sqrt((double)d->head_dim)),
                               .kv_lens = rf_text_at(run, run->at.kv_lens),
                               .workspace = s->b.attn_workspace,
                               .workspace_bytes = s->b.attn_workspace_bytes};
}

rf_status rf_text_attend(const rf_text_run *run, int layer, int64_t m, float *lse, rf_error *err) {
    rf_attention_args args = rf_text_attention_args(run, layer, m);
    args.lse = lse;
    args.mask = (rf_mask)run->shape.mask;
    args.causal_block = run->shape.mask_block;
    if (args.mask != RF_MASK_NONE) args.q_pos_offsets = rf_text_at(run, run->at.q_offsets);
    if (run->shape.listed) args.kv_rows = rf_text_at(run, run->at.visible);
    return run->s->ops->attention(run->stream, &args, err);
}

rf_status rf_text_ffn(const rf_text_run *run, int layer, const void *h, int64_t m, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_layer *w = &s->model->layers[layer];
    int64_t hidden = s->model->desc.hidden, ffn = s->model->desc.ffn;
    RF_TRY(rf_text_linear(run, h, w->gate_up, NULL, s->b.wide, m, 2 * ffn, hidden, err));
    rf_swiglu_args swiglu = {
        .x = s->b.wide, .y = s->b.act, .dtype = s->model->dtype, .rows = m, .cols = ffn, .interleaved = true};
    RF_TRY(s->ops->swiglu(run->stream, &swiglu, err));
    return rf_text_linear(run, s->b.act, w->down, NULL, s->b.y, m, hidden, ffn, err);
}

rf_status rf_text_queue_inputs(const rf_text_run *run, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_model *model = s->model;
    int first = run->shape.first_layer;
    int64_t hidden = model->desc.hidden;
    if (first == 0) {
        rf_embed_args embed = {.table = model->embedding,
                               .ids = rf_text_at(run, run->at.tokens),
                               .out = s->b.x,
                               .dtype = model->dtype,
                               .out_dtype = s->options.residual_dtype,
                               .rows = run->rows,
                               .cols = hidden,
                               .vocab = model->desc.vocab,
                               .scale = 1.0f};
        RF_TRY(s->ops->embed(run->stream, &embed, err));
    } else {
        const void *inputs = rf_text_plane(s, s->b.inputs, first, hidden, s->options.residual_dtype);
        RF_TRY(rf_text_copy_rows(run, true, inputs, s->b.x, rf_text_at(run, run->at.positions),
                                 s->options.residual_dtype, run->rows, hidden, err));
    }
    rf_norm_args norm = rf_text_norm_args(s, s->b.x, s->b.h, run->rows, model->layers[first].attention_norm);
    return s->ops->norm(run->stream, &norm, err);
}

rf_status rf_text_queue_layer(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_desc *d = &s->model->desc;
    const rf_text_layer *w = &s->model->layers[layer];
    bool drift = run->shape.layers == RF_PASS_DRIFT, verify = run->shape.layers == RF_PASS_VERIFY;
    if (verify && run->shape.segment > 0 && layer >= run->shape.full_layers)
        return rf_text_verify_layer(run, layer, err);

    int64_t rows = run->shape.rows;
    const int32_t *positions = rf_text_at(run, run->at.positions);
    RF_TRY(rf_text_linear(run, s->b.h, w->qkv, w->qkv_bias, s->b.wide, run->rows, s->q_cols + 2 * s->kv_cols, d->hidden,
                          err));
    if (drift) RF_TRY(rf_text_drift_before(run, layer, err));
    RF_TRY(rf_text_qkv_rope(run, layer, rows, positions, err));
    bool last = layer + 1 == d->num_layers;
    if (last && run->shape.head_rows == 0 && run->shape.layers == RF_PASS_SAME && !run->shape.external)
        return RF_OK; /* nobody asks for more than keys and values */
    if (run->shape.external)
        RF_TRY(rf_text_external_attend(run, layer, err));
    else
        RF_TRY(rf_text_attend(run, layer, rows, drift ? s->b.lse : NULL, err));
    if (drift) RF_TRY(rf_text_drift_after(run, layer, err));
    RF_TRY(rf_text_linear(run, s->b.attn, w->out, NULL, s->b.y, run->rows, d->hidden, s->q_cols, err));

    char *store[2] = {NULL, NULL};
    if (verify) {
        store[0] = rf_text_plane(s, s->b.attn_increments, layer, d->hidden, s->model->dtype);
        store[1] = rf_text_plane(s, s->b.ffn_increments, layer, d->hidden, s->model->dtype);
    }
    RF_TRY(rf_text_residual(run, s->b.x, s->b.y, s->b.h, w->ffn_norm, run->rows, store[0], positions, err));
    RF_TRY(rf_text_ffn(run, layer, s->b.h, run->rows, err));
    return rf_text_residual(run, s->b.x, s->b.y, s->b.h, last ? NULL : s->model->layers[layer + 1].attention_norm,
                            run->rows, store[1], positions, err);
}

/* Hidden states of the head rows, final-normed: with guidance both halves in f32, then their combination. */
static rf_status head_inputs(const rf_text_run *run, rf_error *err) {
    const rf_text_session *s = run->s;
    int64_t num = run->shape.head_rows, hidden = s->model->desc.hidden;
    rf_norm_args norm = rf_text_norm_args(s, s->b.x, s->b.head_h, num, s->model->final_norm);
    norm.rows = rf_text_at(run, run->at.head_rows);
    if (run->shape.cfg == 0) return s->ops->norm(run->stream, &norm, err);
    norm.y = s->b.head_f32;
    norm.y_dtype = RF_DTYPE_F32;
    RF_TRY(s->ops->norm(run->stream, &norm, err));
    int64_t half = num / 2;
    float *conditional = s->b.head_f32 + half * hidden;
    rf_elementwise_args scale = rf_elementwise_args_default(RF_DTYPE_F32, RF_DTYPE_F32, half, hidden);
    scale.x = scale.y = conditional;
    scale.x_scale = run->shape.cfg;
    RF_TRY(s->ops->elementwise(run->stream, &scale, err));
    rf_elementwise_args add = rf_elementwise_args_default(RF_DTYPE_F32, s->model->dtype, half, hidden);
    add.x = s->b.head_f32;
    add.y = s->b.head_h;
    add.x_scale = 1.0f - run->shape.cfg;
    add.add = conditional;
    add.add_dtype = RF_DTYPE_F32;
    add.add_period = half;
    return s->ops->elementwise(run->stream, &add, err);
}

rf_status rf_text_queue_head(const rf_text_run *run, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_desc *d = &s->model->desc;
    const rf_text_shape *shape = &run->shape;
    if (shape->head_rows == 0) return RF_OK;
    RF_TRY(head_inputs(run, err));
    int64_t num = shape->cfg == 0 ? shape->head_rows : shape->head_rows / 2;
    size_t row_bytes = (size_t)d->hidden * rf_dtype_bytes(s->model->dtype);
    for (int64_t at = 0; at < num; at += s->head_chunk) {
        int64_t chunk = num - at < s->head_chunk ? num - at : s->head_chunk;
        rf_head_stats_args args = {.x = (const char *)s->b.head_h + (size_t)at * row_bytes,
                                   .w = s->model->head,
                                   .out = s->b.stats + at,
                                   .dtype = s->model->dtype,
                                   .rows = chunk,
                                   .cols = d->hidden,
                                   .vocab = d->vocab,
                                   .bans = shape->num_bans ? rf_text_at(run, run->at.bans) : NULL,
                                   .num_bans = shape->num_bans,
                                   .temperature = shape->temperature,
                                   .scale = shape->logit_scale,
                                   .seed = shape->seed,
                                   .keys = rf_text_at(run, run->at.head_keys) + at,
                                   .step = rf_text_at(run, run->at.step),
                                   .refs = shape->has_refs ? rf_text_at(run, run->at.head_refs) + at : NULL,
                                   .round_logits = shape->round_logits,
                                   .rank_of_ref = shape->rank_of_ref,
                                   .workspace = s->b.head_workspace,
                                   .workspace_bytes = s->b.head_workspace_bytes};
        RF_TRY(s->ops->head_stats(run->stream, &args, err));
    }
    if (!shape->keep_logits) return RF_OK;
    rf_gemm_args logits = rf_gemm_args_default(s->model->dtype, num, d->vocab, d->hidden);
    logits.x = s->b.head_h;
    logits.w = s->model->head;
    logits.y = s->logits;
    logits.y_dtype = RF_DTYPE_F32;
    logits.w_is_constant = true;
    return s->ops->gemm(run->stream, &logits, err);
}

rf_status rf_text_queue(const rf_text_run *run, rf_error *err) {
    RF_TRY(rf_text_queue_inputs(run, err));
    for (int l = run->shape.first_layer; l < run->shape.end_layer; l++) RF_TRY(rf_text_queue_layer(run, l, err));
    if (run->shape.end_layer == run->s->model->desc.num_layers) return rf_text_queue_head(run, err);
    return rf_text_drift_end(run, err); /* no other pass ends early */
}
