/* dlm/kv_slide.c - positions inside the cache for ends-only rules (StreamingLLM: sinks and recents), without turning every key at
 * every step.
 *
 * What counts is the distance of a key to the query. The recents and the query are neighbours in the text, so their distances
 * stay true: their keys are turned once, at true positions less a base. Only the sinks, whose distance to the query stops growing
 * once tokens go, are turned again before each step: slot i stands n - 1 - i before the query, n slots with the new one. When the
 * frame runs out of rotations, everything in it is turned back by what has gone meanwhile; a recent token lives to see that
 * at most once.
 *
 * Lists live on the device (kv_evict, by age). */
#include <string.h>

#include "dlm/kv_internal.h"

static int32_t num_sinks(const rf_kv_session *s, const rf_kv_sequence *q) {
    return s->rule.sinks < q->budget ? s->rule.sinks : q->budget;
}

static char *sink_row(const rf_kv_session *s, char *plane, int64_t unit) {
    return plane + (size_t)(unit * s->rule.sinks * s->head_dim) * rf_kv_elem(s);
}

static rf_kv_copy_args copy_args(const rf_kv_session *s, int heads) {
    return (rf_kv_copy_args){.out_row_stride = s->head_dim,
                             .table = s->model->rope,
                             .pairs = s->head_dim / 2,
                             .num_kv_heads = heads,
                             .head_dim = s->head_dim,
                             .dtype = s->model->dtype};
}

static rf_kv_source pool_of(const rf_kv_session *s, int64_t unit, int64_t num) {
    return (rf_kv_source){.k = s->k_pool,
                          .v = s->v_pool,
                          .row_stride = s->head_dim,
                          .rows = s->rows + unit * s->stride,
                          .lens = s->lens + unit,
                          .rows_stride = s->stride,
                          .num_keys = num};
}

/* The sinks, unturned, and where they lie. They stand at their true positions 0.. so far. */
static rf_status keep_sinks(rf_kv_session *s, int sequence, int32_t sinks, rf_error *err) {
    int64_t per_unit = s->rule.sinks, heads = s->num_kv_heads, stride = s->list_stride;
    RF_TRY(rf_kv_wait(s, err));
    for (int64_t h = 0; h < heads; h++)
        for (int32_t i = 0; i < sinks; i++) s->host_copy[h * stride + i] = -i;
    RF_TRY(rf_stream_upload(s->stream, s->copy_lists, s->host_copy, (size_t)(heads * stride) * sizeof(int32_t), err));
    for (int l = 0; l < s->num_layers; l++) {
        int64_t unit = rf_kv_unit_at(s, l, sequence);
        rf_kv_copy_args args = copy_args(s, s->num_kv_heads);
        args.source = pool_of(s, unit, sinks);
        args.k_out = sink_row(s, s->sink_k, unit);
        args.v_out = sink_row(s, s->sink_v, unit);
        args.out_head_stride = per_unit * s->head_dim;
        args.turn = s->copy_lists;
        args.list_stride = stride;
        args.num = sinks;
        RF_TRY(s->ops->kv_copy(s->stream, &args, err));
        for (int64_t h = 0; h < heads; h++)
            RF_TRY(rf_stream_copy(s->stream, s->sink_rows + (unit + h) * per_unit, s->rows + (unit + h) * s->stride,
                                  (size_t)sinks * sizeof(int32_t), err));
    }
    return rf_kv_wait(s, err);
}

/* All keys of the sequence turned back by `by` positions. */
static rf_status turn_back(rf_kv_session *s, int sequence, int32_t by, int32_t slots, rf_error *err) {
    int64_t heads = s->num_kv_heads, stride = s->list_stride;
    RF_TRY(rf_kv_wait(s, err));
    for (int64_t h = 0; h < heads; h++)
        for (int32_t i = 0; i < slots; i++) s->host_copy[h * stride + i] = -by;
    RF_TRY(rf_stream_upload(s->stream, s->copy_lists, s->host_copy, (size_t)(heads * stride) * sizeof(int32_t), err));
    for (int l = 0; l < s->num_layers && slots > 0; l++) {
        int64_t unit = rf_kv_unit_at(s, l, sequence);
        rf_kv_copy_args out = copy_args(s, s->num_kv_heads), back = out;
        out.source = pool_of(s, unit, slots);
        out.k_out = s->k_read;
        out.v_out = s->v_read;
        out.out_head_stride = s->stride * s->head_dim;
        out.turn = s->copy_lists;
        out.list_stride = stride;
        out.num = slots;
        RF_TRY(s->ops->kv_copy(s->stream, &out, err));
        back.source = (rf_kv_source){.k = s->k_read,
                                     .v = s->v_read,
                                     .row_stride = s->head_dim,
                                     .head_stride = s->stride * s->head_dim,
                                     .num_keys = slots};
        back.k_out = s->k_pool;
        back.v_out = s->v_pool;
        back.to = s->rows + unit * s->stride;
        back.list_stride = s->stride;
        back.num = slots;
        RF_TRY(s->ops->kv_copy(s->stream, &back, err));
    }
    return rf_kv_wait(s, err);
}

void rf_kv_slide_start(rf_kv_session *s, int sequence) {
    rf_kv_sequence *q = &s->sequences[sequence];
    q->frame = 0;
    q->slid = false;
    for (int l = 0; l < s->num_layers; l++)
        memset(s->host_control + s->at.turn_counts + (size_t)rf_kv_unit_at(s, l, sequence), 0,
               (size_t)s->num_kv_heads * sizeof(int32_t));
}

rf_status rf_kv_slide_place(rf_kv_session *s, int sequence, int32_t slots, int32_t *position, rf_error *err) {
    rf_kv_sequence *q = &s->sequences[sequence];
    int32_t *c = s->host_control, sinks = num_sinks(s, q), gone = q->seen + 1 - slots;
    if (gone > 0 && !q->slid && sinks > 0) RF_TRY(keep_sinks(s, sequence, sinks, err));
    q->slid = gone > 0;
    if (q->seen - q->frame >= s->model->rope_positions && gone > q->frame) {
        RF_TRY(turn_back(s, sequence, gone - q->frame, slots - 1, err));
        q->frame = gone;
    }
    *position = q->seen - q->frame;
    for (int l = 0; l < s->num_layers && q->slid; l++) {
        for (int h = 0; h < s->num_kv_heads; h++) {
            size_t unit = (size_t)(rf_kv_unit_at(s, l, sequence) + h);
            c[s->at.turn_counts + unit] = sinks;
            for (int32_t i = 0; i < sinks; i++)
                c[s->at.turns + unit * (size_t)s->rule.sinks + (size_t)i] = *position - (slots - 1 - i);
        }
    }
    return RF_OK;
}

rf_status rf_kv_slide_sinks(rf_kv_session *s, rf_error *err) {
    int64_t sinks = s->rule.sinks;
    if (sinks == 0) return RF_OK;
    rf_kv_copy_args args = copy_args(s, s->num_layers * s->units);
    args.source = (rf_kv_source){.k = s->sink_k,
                                 .v = s->sink_v,
                                 .row_stride = s->head_dim,
                                 .head_stride = sinks * s->head_dim,
                                 .num_keys = sinks};
    args.k_out = s->k_pool;
    args.v_out = s->v_pool;
    args.to = s->sink_rows;
    args.turn = s->control + s->at.turns;
    args.counts = s->control + s->at.turn_counts;
    args.list_stride = sinks;
    args.num = sinks;
    return s->ops->kv_copy(s->stream, &args, err);
}
