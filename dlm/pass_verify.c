/* dlm/pass_verify.c - passes over rows of which most keep their increments (dLLM-Cache, arXiv 2506.06295).
 *
 * Kept of every row and layer: what attention and the feed-forward added to the residual stream. A pass that stores
 * computes all its rows and renews that. In any other, per layer from full_layers on: values of all segment rows are
 * computed and compared with the cached ones (cosine over all key heads), the values are renewed, and the floor(ratio *
 * n) rows that changed most are computed fully, with the rows outside the segment; then x += attention increment +
 * feed-forward increment for every row of the pass, from what is kept. Ratio 0 compares nothing and leaves the cached
 * values.
 *
 * Packed rows: the segment's first, then the others, so that the numbers that select_smallest writes are row numbers.
 */
#include <math.h>
#include <string.h>

#include "dlm/forward_internal.h"

rf_status rf_text_verify_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    if (!s->options.keep_increments)
        return rf_fail(err, RF_ERR_STATE, "a verifying pass in a session that keeps no increments");
    if (!(pass->verify.ratio >= 0 && pass->verify.ratio <= 1) || pass->verify.full_layers < 0 ||
        pass->verify.begin < 0 || pass->verify.end < pass->verify.begin)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "ratio %g, %d full layers, segment %d..%d: expected 0..1, 0 or more, and a range",
                       pass->verify.ratio, pass->verify.full_layers, pass->verify.begin, pass->verify.end);
    return RF_OK;
}

rf_status rf_text_verify_forward(rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    int num_layers = s->model->desc.num_layers;
    int32_t num = pass->num_rows, segment = 0, next;
    for (int32_t i = 0; i < num && !pass->verify.store; i++)
        segment += pass->rows[i] >= pass->verify.begin && pass->rows[i] < pass->verify.end;
    int32_t in_segment = 0;
    next = segment;
    for (int32_t i = 0; i < num; i++) {
        bool inside = segment > 0 && pass->rows[i] >= pass->verify.begin && pass->rows[i] < pass->verify.end;
        s->place[i] = inside ? in_segment++ : next++;
        s->order[s->place[i]] = i;
    }
    rf_text_rows rows = {
        .num_rows = num, .rows = pass->rows, .tokens = pass->tokens, .order = s->order, .place = s->place};
    rf_text_run run = rf_text_make_run(s, pass, &rows);
    run.shape.segment = segment;
    run.shape.chosen = (int32_t)floor(pass->verify.ratio * segment);
    run.shape.compares = segment > 0 && pass->verify.ratio > 0;
    run.shape.full_layers = segment > 0 ? pass->verify.full_layers : num_layers;
    if (run.shape.full_layers > num_layers) run.shape.full_layers = num_layers;
    RF_TRY(rf_text_upload(&run, pass, &rows, err));
    RF_TRY(rf_text_launch(&run, err));

    int64_t some = run.shape.chosen + num - segment, some_layers = num_layers - run.shape.full_layers;
    rf_text_count(s, pass, &rows, run.shape.full_layers);
    s->row_layers += some * some_layers;
    s->key_layers += some * some_layers * rf_text_keys_seen(pass, 0, pass->rows[0]); /* every row sees the same */
    return rf_text_queue_results(s, pass, err);
}

void rf_text_verify_fill(const rf_text_run *run, int32_t *host) {
    const rf_text_shape *shape = &run->shape;
    int32_t *pick = host + run->at.pick, *iota = host + run->at.iota;
    for (int32_t i = 0; i < shape->rows; i++) iota[i] = i;
    memset(pick, 0, (size_t)shape->rows * sizeof *pick);
    for (int32_t i = shape->segment; i < shape->rows; i++) pick[shape->chosen + i - shape->segment] = i;
    memset(host + run->at.pick_positions, 0, (size_t)shape->rows * sizeof *pick);
}

/* Values of the segment's rows, how much they changed, which rows are to be computed; the values replace the cached
 * ones. */
static rf_status verify_values(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_layer *w = &s->model->layers[layer];
    const int32_t *positions = rf_text_at(run, run->at.positions);
    int64_t hidden = s->model->desc.hidden, segment = run->shape.segment;
    size_t elem = rf_dtype_bytes(s->model->dtype), first = (size_t)(s->q_cols + s->kv_cols);
    const char *weight = (const char *)w->qkv + first * (size_t)hidden * elem;
    const char *bias = w->qkv_bias ? (const char *)w->qkv_bias + first * elem : NULL;
    RF_TRY(rf_text_linear(run, s->b.h, weight, bias, s->b.values, segment, s->kv_cols, hidden, err));
    if (run->shape.chosen > 0) {
        rf_cosine_rows_args cosine = {.a = s->b.values,
                                      .b = rf_text_values(s, layer),
                                      .cosine = s->b.cosine,
                                      .a_dtype = s->model->dtype,
                                      .b_dtype = s->model->dtype,
                                      .rows = segment,
                                      .cols = s->kv_cols,
                                      .a_ld = s->kv_cols,
                                      .b_ld = s->kv_cols,
                                      .col_stride = 1,
                                      .b_rows = positions};
        RF_TRY(s->ops->cosine_rows(run->stream, &cosine, err));
        rf_select_smallest_args select = {
            .values = s->b.cosine, .out = rf_text_at(run, run->at.pick), .num = segment, .count = run->shape.chosen};
        RF_TRY(s->ops->select_smallest(run->stream, &select, err));
    }
    return rf_text_copy_rows(run, false, s->b.values, rf_text_values(s, layer), positions, s->model->dtype, segment,
                             s->kv_cols, err);
}

/* The listed rows fully; what they add is kept, x stays as it is. */
static rf_status compute_picked(const rf_text_run *run, int layer, int64_t num, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_layer *w = &s->model->layers[layer];
    const int32_t *pick = rf_text_at(run, run->at.pick);
    int32_t *positions = rf_text_at(run, run->at.pick_positions);
    int64_t hidden = s->model->desc.hidden;
    rf_dtype dtype = s->model->dtype;
    char *attn = rf_text_plane(s, s->b.attn_increments, layer, hidden, dtype);
    char *ffn = rf_text_plane(s, s->b.ffn_increments, layer, hidden, dtype);
    RF_TRY(rf_text_copy_rows(run, true, s->b.h, s->b.h_pick, pick, dtype, num, hidden, err));
    RF_TRY(rf_text_copy_rows(run, true, s->b.x, s->b.x_pick, pick, s->options.residual_dtype, num, hidden, err));
    /* 4-byte numbers, copied */
    RF_TRY(
        rf_text_copy_rows(run, true, rf_text_at(run, run->at.positions), positions, pick, RF_DTYPE_F32, num, 1, err));
    RF_TRY(
        rf_text_linear(run, s->b.h_pick, w->qkv, w->qkv_bias, s->b.wide, num, s->q_cols + 2 * s->kv_cols, hidden, err));
    RF_TRY(rf_text_qkv_rope(run, layer, num, positions, err));
    RF_TRY(rf_text_attend(run, layer, num, NULL, err));
    RF_TRY(rf_text_linear(run, s->b.attn, w->out, NULL, s->b.y, num, hidden, s->q_cols, err));
    RF_TRY(rf_text_residual(run, s->b.x_pick, s->b.y, s->b.h_pick, w->ffn_norm, num, attn, positions, err));
    RF_TRY(rf_text_ffn(run, layer, s->b.h_pick, num, err));
    return rf_text_copy_rows(run, false, s->b.y, ffn, positions, dtype, num, hidden, err);
}

rf_status rf_text_verify_layer(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    int64_t hidden = s->model->desc.hidden, num = run->shape.chosen + run->rows - run->shape.segment;
    rf_dtype dtype = s->model->dtype;
    if (run->shape.compares) RF_TRY(verify_values(run, layer, err));
    if (num > 0) RF_TRY(compute_picked(run, layer, num, err));
    bool last = layer + 1 == s->model->desc.num_layers;
    rf_residual_args args = {.x = s->b.x,
                             .num_terms = 2,
                             .terms = {rf_text_plane(s, s->b.attn_increments, layer, hidden, dtype),
                                       rf_text_plane(s, s->b.ffn_increments, layer, hidden, dtype)},
                             .rows = rf_text_at(run, run->at.iota),
                             .term_rows = rf_text_at(run, run->at.positions),
                             .x_dtype = s->options.residual_dtype,
                             .base_dtype = RF_DTYPE_F32,
                             .y_dtype = dtype,
                             .num_rows = run->rows,
                             .cols = hidden,
                             .gate = -1,
                             .extra_gate = -1,
                             .norm_y = last ? NULL : s->b.h,
                             .norm_y_dtype = dtype,
                             .norm_kind = RF_NORM_RMS,
                             .norm_eps = (float)s->model->desc.norm_eps,
                             .norm_weight = last ? NULL : s->model->layers[layer + 1].attention_norm,
                             .norm_shift = -1,
                             .norm_scale = -1};
    return s->ops->residual(run->stream, &args, err);
}
