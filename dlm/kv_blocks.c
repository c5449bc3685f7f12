/* dlm/kv_blocks.c - a prompt in blocks: behind each, what is over the budget goes, and the next block attends to what stayed. The layers'
 * planes hold, head by head, the slots that stayed and then the block, so that causal by row is causal by position.
 *
 * Layers come outermost all the same: a block of a layer wants nothing but that layer's slots. With queries of an external prompt its rows
 * follow each block, attend to the slots, the block and each other, are measured and thrown away; their residual rows wait between
 * layers, those of each block apart. */
#include <string.h>

#include "core/memory.h"
#include "dlm/kv_internal.h"

static int32_t num_blocks(const rf_kv_session *s, int32_t num) {
    return (num + s->rule.block - 1) / s->rule.block;
}

int64_t rf_kv_blocks_rows(const rf_kv_session *s) {
    return (int64_t)s->extra_rows * num_blocks(s, s->options.max_prompt);
}

bool rf_kv_comes_in_blocks(const rf_kv_session *s, int sequence) {
    const rf_kv_sequence *q = &s->sequences[sequence];
    return s->rule.block > 0 && q->budget > 0 && q->compressed > q->budget;
}

rf_status rf_kv_blocks_open(rf_kv_session *s, rf_error *err) {
    if (s->rule.block == 0) return RF_OK;
    size_t rows = (size_t)s->options.max_prompt + (size_t)s->extra_rows, external = (size_t)s->extra_rows;
    s->plane_positions = rf_alloc((size_t)s->num_kv_heads * (size_t)s->list_stride * sizeof(int32_t));
    s->external = rf_alloc((external + 1) * sizeof *s->external);
    if (s->plane_positions == NULL || s->external == NULL)
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for prompts in blocks");
    if (external > 0) memcpy(s->external, s->options.external, external * sizeof *s->external);
    s->options.external = s->external;
    RF_TRY(rf_stream_upload(s->stream, s->received, s->prompt_positions, rows * sizeof(int32_t), err));
    return rf_kv_wait(s, err);
}

static char *x_row(const rf_kv_session *s, int64_t row) {
    size_t elem = rf_dtype_bytes(s->stage->options.residual_dtype);
    return s->x_plane + (size_t)(row * s->model->desc.hidden) * elem;
}

/* A chunk on a copy of its residual rows: padding may touch what follows them. */
static rf_status run_chunk(rf_kv_session *s, int layer, const rf_kv_chunk *c, int64_t row, const int32_t *tokens,
                           int32_t num, bool goes_on, rf_error *err) {
    size_t bytes = (size_t)(x_row(s, c->rows) - x_row(s, 0));
    char *copy = x_row(s, s->options.max_prompt);
    if (layer > 0) RF_TRY(rf_stream_copy(s->stream, copy, x_row(s, row), bytes, err));
    s->stage->b.x = copy;
    RF_TRY(rf_kv_chunk_layer(s, layer, c, tokens, num, goes_on, err));
    return goes_on ? rf_stream_copy(s->stream, x_row(s, row), copy, bytes, err) : RF_OK;
}

/* What stayed, from the pool to the planes' first rows. */
static rf_status close_up(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    const rf_text_session *stage = s->stage;
    int64_t unit = rf_kv_unit_at(s, layer, sequence), stride = s->list_stride, heads = s->num_kv_heads;
    int32_t most = rf_kv_book_most(s->sequences[sequence].book, layer), *to = s->host_copy;
    RF_TRY(rf_kv_upload_lists(s, sequence, layer, layer + 1, err));
    for (int32_t h = 0; h < heads; h++)
        for (int32_t i = 0; i < most; i++) to[h * stride + i] = i * (int32_t)heads + h; /* a row has all heads */
    RF_TRY(rf_stream_upload(s->stream, s->copy_lists, to, (size_t)(heads * stride) * sizeof *to, err));
    rf_kv_copy_args args = {.source = {.k = s->k_pool,
                                       .v = s->v_pool,
                                       .row_stride = s->head_dim,
                                       .rows = s->rows + unit * s->stride,
                                       .lens = s->lens + unit,
                                       .rows_stride = s->stride,
                                       .num_keys = most},
                            .k_out = rf_text_keys(stage, layer),
                            .v_out = rf_text_values(stage, layer),
                            .out_row_stride = s->head_dim,
                            .to = s->copy_lists,
                            .counts = s->lens + unit,
                            .list_stride = stride,
                            .num = most,
                            .num_kv_heads = s->num_kv_heads,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype};
    RF_TRY(s->ops->kv_copy(s->stream, &args, err));
    return rf_kv_wait(s, err);
}

/* Slots and the block's rows to what stays; slots: rows of the planes in front of the block. */
static rf_status choose(rf_kv_session *s, int layer, int sequence, int32_t slots, int32_t begin, int32_t rows,
                        int32_t num, rf_error *err) {
    rf_kv_book *book = s->sequences[sequence].book;
    RF_TRY(rf_kv_wait(s, err));
    double began = rf_kv_now_ms();
    for (int h = 0; h < s->num_kv_heads; h++) {
        int32_t *plane = s->plane_positions + h * s->list_stride;
        if (slots > 0) memcpy(plane, rf_kv_book_head(book, layer, h)->position, (size_t)slots * sizeof *plane);
        for (int32_t i = 0; i < rows; i++) plane[slots + i] = begin + i;
    }
    rf_kv_stats stats;
    RF_TRY(rf_kv_measure_layer(s, layer, slots + rows, &stats, err));
    RF_TRY(rf_kv_book_prefill_block(book, layer, begin, rows, num, &stats, err));
    RF_TRY(rf_kv_copy_kept(s, layer, sequence, s->plane_positions, s->list_stride, slots + rows, err));
    RF_TRY(rf_kv_wait(s, err));
    if (begin + rows < num) RF_TRY(close_up(s, layer, sequence, err));
    s->info.score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

static rf_status run_block(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t begin,
                           int32_t rows, int32_t num, bool want_head, rf_error *err) {
    int32_t slots = begin > 0 ? rf_kv_book_most(s->sequences[sequence].book, layer) : 0;
    int32_t size = s->options.prefill_chunk, keys = slots + rows;
    bool last_layer = layer + 1 == s->num_layers;
    RF_TRY(rf_kv_measure_layer_begin(s, err));
    for (int32_t at = 0; at < rows; at += size) {
        rf_kv_chunk c = {.begin = slots + at, .rows = rows - at < size ? rows - at : size, .position = begin + at};
        bool goes_on = !last_layer || (want_head && begin + at + c.rows == num);
        RF_TRY(run_chunk(s, layer, &c, begin + at, tokens + begin + at, keys, goes_on, err));
    }
    if (s->extra_rows > 0) {
        rf_kv_chunk c = {.begin = keys, .rows = s->extra_rows, .position = begin + rows, .pseudo = true};
        int64_t row = (int64_t)s->options.max_prompt + s->stage->options.max_rows +
                      (int64_t)(begin / s->rule.block) * s->extra_rows;
        RF_TRY(run_chunk(s, layer, &c, row, s->external, keys, !last_layer, err));
    }
    return choose(s, layer, sequence, slots, begin, rows, num, err);
}

rf_status rf_kv_prefill_blocks(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, bool want_head,
                               rf_error *err) {
    void *x = s->stage->b.x;
    int32_t size = s->rule.block;
    rf_status st = rf_kv_measure_begin(s, &s->sequences[sequence], err);
    s->thinned = true;
    for (int l = 0; st == RF_OK && l < s->num_layers; l++)
        for (int32_t begin = 0; st == RF_OK && begin < num; begin += size)
            st = run_block(s, l, sequence, tokens, begin, num - begin < size ? num - begin : size, num, want_head, err);
    s->thinned = false;
    s->stage->b.x = x;
    return st;
}
