/* dlm/kv_prefill.c - a prompt, layer by layer: all rows through a layer in chunks, then the layer is measured, the book
 * chooses, and what stays is copied from the staging plane to the pool.
 *
 * Where a choice reads sums and norms alone, the host makes it while the device computes the next layer, in the other staging plane:
 * rows of layer l, its measurements on their way to the host, a mark; rows of layer l + 1 and its mark; the host waits for the first
 * mark, chooses, and queues the copy. What is queued is the same in both ways, so are the bits.
 *
 * A chunk of a layer queues what a pass of the plain session queues (dlm/pass_layers.c), with the same numbers of rows
 * and keys: the same bits. Residual rows wait in a plane between layers; their norm is made again. */
#include <string.h>

#include "dlm/kv_internal.h"

/* Marks of the stream, in turn: a layer's measurements are with the host; its choice is with the device; all layers are queued. */
enum { MARKS = 4, MARK_MEASURED = 0, MARK_CHOSEN = MARKS, MARK_LAST = 2 * MARKS };

static char *chunk_x(const rf_kv_session *s, const rf_kv_chunk *c) {
    /* Padding rows behind the prompt may not touch pseudo rows. */
    int64_t row = c->pseudo ? s->options.max_prompt + s->stage->options.max_rows : c->begin;
    return s->x_plane + (size_t)(row * s->model->desc.hidden) * rf_dtype_bytes(s->stage->options.residual_dtype);
}

/* As a pass over the rows, with tokens: its lists on their way to the device, where they stay for all layers. */
static rf_status make_run(rf_kv_session *s, const rf_kv_chunk *c, const int32_t *tokens, rf_text_run *run,
                          rf_error *err) {
    int32_t end = c->begin + c->rows, size = s->options.prefill_chunk;
    int64_t index = c->pseudo ? (s->options.max_prompt + size - 1) / size : c->begin / size;
    s->stage->b.control = s->prompt_control + index * (int64_t)s->stage->control_words;
    rf_text_pass pass = rf_text_pass_default();
    pass.num_rows = c->rows;
    pass.rows = s->prompt_positions + c->begin;
    pass.tokens = tokens;
    pass.visible_end = &end;
    pass.mask = c->rows > 1 ? RF_MASK_CAUSAL : RF_MASK_NONE;
    rf_text_rows rows = {.num_rows = pass.num_rows, .rows = pass.rows, .tokens = pass.tokens};
    *run = rf_text_make_run(s->stage, &pass, &rows);
    return tokens ? rf_text_upload(run, &pass, &rows, err) : RF_OK;
}

/* Unturned keys of the layer, and unturned queries. */
static rf_status keep_unturned(rf_kv_session *s, const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *stage = s->stage;
    const rf_text_model *model = s->model;
    const rf_text_desc *d = &model->desc;
    rf_qkv_rope_args args = {.qkv = stage->b.wide,
                             .q_out = s->q_raw,
                             .k = rf_kv_unturned(s, layer),
                             .v = rf_text_values(stage, layer),
                             .dtype = model->dtype,
                             .batch = 1,
                             .rows = run->shape.rows,
                             .num_q_heads = d->num_q_heads,
                             .num_kv_heads = d->num_kv_heads,
                             .head_dim = d->head_dim,
                             .cache_rows = stage->cache_rows,
                             .k_batch_stride = stage->cache_rows * stage->kv_cols,
                             .k_row_stride = stage->kv_cols,
                             .positions = rf_text_at(run, run->at.positions),
                             .q_norm = model->layers[layer].q_norm,
                             .k_norm = model->layers[layer].k_norm,
                             .norm_eps = (float)d->norm_eps,
                             .table = model->rope,
                             .table_rows = model->rope_positions};
    return s->ops->qkv_rope(s->stream, &args, err);
}

/* Rows stand close together, keys and values too, whatever their positions: causal by row is causal by position. */
static rf_status split_thinned(rf_kv_session *s, int layer, const rf_kv_chunk *c, rf_error *err) {
    const rf_text_session *stage = s->stage;
    const rf_text_model *model = s->model;
    const rf_text_desc *d = &model->desc;
    size_t first = (size_t)(c->begin * stage->kv_cols) * rf_kv_elem(s);
    rf_qkv_rope_args args = {.qkv = stage->b.wide,
                             .q_out = stage->b.q,
                             .k = rf_text_keys(stage, layer) + first,
                             .v = rf_text_values(stage, layer) + first,
                             .dtype = model->dtype,
                             .batch = c->rows,
                             .rows = 1,
                             .num_q_heads = d->num_q_heads,
                             .num_kv_heads = d->num_kv_heads,
                             .head_dim = d->head_dim,
                             .pairs = d->head_dim / 2,
                             .cache_rows = 1, /* each the row of its own "sequence" */
                             .k_batch_stride = stage->kv_cols,
                             .k_row_stride = stage->kv_cols,
                             .positions = s->received + c->position,
                             .q_norm = model->layers[layer].q_norm,
                             .k_norm = model->layers[layer].k_norm,
                             .norm_eps = (float)d->norm_eps,
                             .table = model->rope,
                             .table_rows = model->rope_positions};
    return s->ops->qkv_rope(s->stream, &args, err);
}

rf_status rf_kv_chunk_layer(rf_kv_session *s, int layer, const rf_kv_chunk *c, const int32_t *tokens, int32_t num,
                            bool goes_on, rf_error *err) {
    rf_text_session *stage = s->stage;
    const rf_text_desc *d = &s->model->desc;
    const rf_text_layer *w = &s->model->layers[layer];
    rf_text_run run;
    RF_TRY(make_run(s, c, tokens, &run, err));
    if (layer == 0) {
        rf_embed_args embed = {.table = s->model->embedding,
                               .ids = rf_text_at(&run, run.at.tokens),
                               .out = stage->b.x,
                               .dtype = s->model->dtype,
                               .out_dtype = stage->options.residual_dtype,
                               .rows = run.rows,
                               .cols = d->hidden,
                               .vocab = d->vocab,
                               .scale = 1.0f};
        RF_TRY(s->ops->embed(s->stream, &embed, err));
    }
    rf_norm_args norm = rf_text_norm_args(stage, stage->b.x, stage->b.h, run.rows, w->attention_norm);
    RF_TRY(s->ops->norm(s->stream, &norm, err));
    RF_TRY(rf_text_linear(&run, stage->b.h, w->qkv, w->qkv_bias, stage->b.wide, run.rows,
                          stage->q_cols + 2 * stage->kv_cols, d->hidden, err));
    if (rf_kv_keeps_unturned(s)) RF_TRY(keep_unturned(s, &run, layer, err));
    if (s->thinned)
        RF_TRY(split_thinned(s, layer, c, err));
    else
        RF_TRY(rf_text_qkv_rope(&run, layer, run.shape.rows, rf_text_at(&run, run.at.positions), err));
    if ((s->needs & RF_KV_NEED_GATE) && !c->pseudo)
        RF_TRY(rf_kv_gate_prompt(s, layer, stage->b.h, c->begin, c->rows, err));
    if (s->select && !c->pseudo) RF_TRY(rf_kv_select_rows(s, num, c->begin, c->rows, err));
    if (s->packed) RF_TRY(rf_kv_packed_rows(s, num, c->begin, c->rows, err));
    bool measures = rf_kv_measures_rows(s, num, c->begin, c->rows, c->pseudo);
    if (measures || goes_on || s->probe) {
        RF_TRY(rf_text_attend(&run, layer, run.shape.rows, s->lse, err));
        s->key_layers += ((int64_t)c->begin * c->rows + (int64_t)c->rows * (c->rows + 1) / 2) * s->num_kv_heads;
    }
    if (s->probe && !c->pseudo) RF_TRY(rf_kv_probe_rows(s, layer, c->begin, c->rows, run.shape.rows, err));
    s->row_layers += c->rows;
    if (s->ahead && measures) {
        RF_TRY(rf_kv_measure_rows(s, layer, num, c->begin, c->rows, run.shape.rows, false, err));
    } else if (measures || ((s->needs & RF_KV_NEED_EXPECTED) && !c->pseudo)) {
        RF_TRY(rf_kv_wait(s, err));
        double began = rf_kv_now_ms();
        if ((s->needs & RF_KV_NEED_EXPECTED) && !c->pseudo) RF_TRY(rf_kv_measure_queries(s, c->begin, c->rows, err));
        if (measures) RF_TRY(rf_kv_measure_rows(s, layer, num, c->begin, c->rows, run.shape.rows, c->pseudo, err));
        RF_TRY(rf_kv_wait(s, err));
        s->info.score_ms += rf_kv_now_ms() - began;
    }
    if (!goes_on) return RF_OK;
    RF_TRY(rf_text_linear(&run, stage->b.attn, w->out, NULL, stage->b.y, run.rows, d->hidden, stage->q_cols, err));
    RF_TRY(rf_text_residual(&run, stage->b.x, stage->b.y, stage->b.h, w->ffn_norm, run.rows, NULL, NULL, err));
    RF_TRY(rf_text_ffn(&run, layer, stage->b.h, run.rows, err));
    return rf_text_residual(&run, stage->b.x, stage->b.y, stage->b.h, NULL, run.rows, NULL, NULL, err);
}

/* Kept positions of the layer's planes to their rows of the pool. */
rf_status rf_kv_copy_kept(rf_kv_session *s, int layer, int sequence, const int32_t *plane, int64_t plane_stride,
                          int32_t num, rf_error *err) {
    const rf_kv_sequence *q = &s->sequences[sequence];
    const rf_text_session *stage = s->stage;
    int64_t stride = s->list_stride, heads = s->num_kv_heads, words = 3 * heads * stride + heads;
    int32_t *from = s->host_copy + (s->ahead ? layer % 2 * words : 0), *to = from + heads * stride,
            *turn = to + heads * stride, *counts = turn + heads * stride;
    bool delta = s->rule.position == RF_KV_POSITION_DELTA;
    int32_t most = rf_kv_book_most(q->book, layer);
    /* The lists of the layer before may be on their way; those of the one before it are not, as this one's mark has passed. */
    if (!s->ahead) RF_TRY(rf_kv_wait(s, err));
    for (int h = 0; h < s->num_kv_heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(q->book, layer, h);
        counts[h] = head->num;
        if (head->num == 0) continue;
        memcpy(from + h * stride, head->position, (size_t)head->num * sizeof *from);
        for (int32_t i = 0, row = 0; plane && i < head->num; i++) { /* both ascend */
            while (plane[h * plane_stride + row] != head->position[i]) row++;
            from[h * stride + i] = row;
        }
        memcpy(to + h * stride, head->row, (size_t)head->num * sizeof *to);
        /* Heads end together: the newest slot of each stands before the next token. */
        for (int32_t i = 0; delta && i < head->num; i++)
            turn[h * stride + i] = most - head->num + i - head->position[i];
    }
    if (delta) q->shift[layer] = most - q->compressed;
    if (s->ahead) RF_TRY(rf_stream_mark(s->stream, MARK_CHOSEN + layer % MARKS, err));
    if (most == 0) return RF_OK;
    RF_TRY(rf_stream_upload(s->stream, s->copy_lists, from, (size_t)words * sizeof(int32_t), err));
    const char *k = rf_kv_in_cache_order(s) ? rf_kv_unturned(s, layer) : rf_text_keys(stage, layer);
    rf_kv_copy_args args = {.source = {.k = k,
                                       .v = rf_text_values(stage, layer),
                                       .row_stride = stage->kv_cols,
                                       .head_stride = s->head_dim,
                                       .num_keys = num},
                            .k_out = s->k_pool,
                            .v_out = s->v_pool,
                            .out_row_stride = s->head_dim,
                            .from = s->copy_lists,
                            .to = s->copy_lists + heads * stride,
                            .turn = delta ? s->copy_lists + 2 * heads * stride : NULL,
                            .counts = s->copy_lists + 3 * heads * stride,
                            .list_stride = stride,
                            .num = most,
                            .table = s->model->rope,
                            .pairs = s->head_dim / 2,
                            .num_kv_heads = s->num_kv_heads,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype};
    return s->ops->kv_copy(s->stream, &args, err);
}

static rf_status choose(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t num, rf_error *err) {
    RF_TRY(rf_kv_wait(s, err));
    double began = rf_kv_now_ms();
    rf_kv_stats stats;
    int32_t num_received;
    const int32_t *received = rf_kv_book_received(s->sequences[sequence].book, layer, &num_received);
    RF_TRY(rf_kv_measure_layer(s, layer, num, &stats, err));
    RF_TRY(rf_kv_book_prefill(s->sequences[sequence].book, layer, num, &stats, err));
    if (s->packed) RF_TRY(rf_kv_packed_prompt(s, layer, sequence, num, &stats, err));
    RF_TRY(rf_kv_mean_prompt(s, layer, sequence, num, err));
    RF_TRY(rf_kv_join_prompt(s, layer, sequence, num, err));
    RF_TRY(rf_kv_copy_kept(s, layer, sequence, received, 0, num, err));
    RF_TRY(rf_kv_wait(s, err));
    if (s->select) RF_TRY(rf_kv_select_prompt(s, layer, sequence, tokens, num, &stats, err));
    s->info.score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

/* Behind the rows of a layer. */
static rf_status queue_measures(rf_kv_session *s, int layer, int32_t num, rf_error *err) {
    RF_TRY(rf_kv_measure_ahead(s, layer, num, &s->layer_stats[layer % 2], err));
    s->stage->busy = true;
    return rf_stream_mark(s->stream, MARK_MEASURED + layer % MARKS, err);
}

static rf_status choose_ahead(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    RF_TRY(rf_stream_wait_mark(s->stream, MARK_MEASURED + layer % MARKS, err));
    double began = rf_kv_now_ms();
    RF_TRY(rf_kv_book_prefill(s->sequences[sequence].book, layer, num, &s->layer_stats[layer % 2], err));
    RF_TRY(rf_kv_copy_kept(s, layer, sequence, NULL, 0, num, err));
    if (!rf_kv_decides_late(s)) RF_TRY(rf_kv_upload_lists(s, sequence, layer, layer + 1, err));
    s->info.score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

/* How long the device had nothing to do before the choice of a layer came. */
static rf_status add_idle(rf_kv_session *s, int layer, rf_error *err) {
    int behind = layer + 1 < s->num_layers ? MARK_MEASURED + (layer + 1) % MARKS : MARK_LAST;
    double ms;
    RF_TRY(rf_stream_elapsed_ms(s->stream, behind, MARK_CHOSEN + layer % MARKS, &ms, err));
    s->info.score_wait_ms += ms;
    return RF_OK;
}

/* Measurements of layer l, behind its rows; the choice of the layer before. */
static rf_status turn_over(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    RF_TRY(queue_measures(s, layer, num, err));
    if (layer > 0) RF_TRY(choose_ahead(s, layer - 1, sequence, num, err));
    /* Layer - 1 is measured: what was queued before is done. */
    return layer > 2 ? add_idle(s, layer - 3, err) : RF_OK;
}

static rf_status finish_ahead(rf_kv_session *s, int sequence, int32_t num, rf_error *err) {
    int last = s->num_layers - 1;
    RF_TRY(rf_stream_mark(s->stream, MARK_LAST, err));
    RF_TRY(choose_ahead(s, last, sequence, num, err));
    if (rf_kv_decides_late(s)) RF_TRY(rf_kv_upload_lists(s, sequence, 0, s->num_layers, err));
    RF_TRY(rf_kv_wait(s, err));
    for (int l = last < 2 ? 0 : last - 2; l <= last; l++) RF_TRY(add_idle(s, l, err));
    return RF_OK;
}

static int32_t num_pseudo(const rf_kv_session *s) {
    return s->needs ? s->extra_rows : 0;
}

/* Lists of all chunks. */
static rf_status upload_chunks(rf_kv_session *s, const int32_t *tokens, int32_t num, rf_error *err) {
    int32_t size = s->options.prefill_chunk, *pseudo = s->host_copy;
    rf_text_run run;
    for (int32_t begin = 0; begin < num; begin += size) {
        rf_kv_chunk c = {.begin = begin, .rows = num - begin < size ? num - begin : size};
        RF_TRY(make_run(s, &c, tokens + begin, &run, err));
    }
    if (num_pseudo(s) == 0) return RF_OK;
    /* Any content does: the last tokens again. */
    for (int32_t i = 0; i < s->extra_rows; i++) {
        int32_t from = num - s->extra_rows + i;
        pseudo[i] = tokens[from < 0 ? 0 : from];
    }
    rf_kv_chunk c = {.begin = num, .rows = s->extra_rows, .pseudo = true};
    return make_run(s, &c, pseudo, &run, err);
}

/* The rows that the book passes on to a layer, close together in the plane. *num: how many there are. */
static rf_status pass_on(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t *num,
                         rf_error *err) {
    const rf_kv_sequence *q = &s->sequences[sequence];
    int32_t count;
    const int32_t *received = rf_kv_book_received(q->book, layer, &count);
    if (received == NULL || count == *num) return RF_OK;
    memcpy(s->host_copy, received, (size_t)count * sizeof *received);
    RF_TRY(rf_stream_upload(s->stream, s->received, s->host_copy, (size_t)count * sizeof *received, err));
    int64_t hidden = s->model->desc.hidden, size = s->stage->options.max_rows;
    size_t row = (size_t)hidden * rf_dtype_bytes(s->stage->options.residual_dtype);
    char *between = s->x_plane + (size_t)s->options.max_prompt * row; /* rows of padding alone */
    for (int32_t begin = 0; begin < count; begin += (int32_t)size) {  /* no later chunk reads what one overwrites */
        int64_t rows = count - begin < size ? count - begin : size;
        rf_rows_args args = {.src = s->x_plane,
                             .dst = between,
                             .rows = s->received + begin,
                             .dtype = s->stage->options.residual_dtype,
                             .num_rows = rows,
                             .cols = hidden};
        RF_TRY(s->ops->gather_rows(s->stream, &args, err));
        RF_TRY(rf_stream_copy(s->stream, s->x_plane + (size_t)begin * row, between, (size_t)rows * row, err));
    }
    if (count <= q->budget) s->needs = 0; /* all of them stay */
    s->thinned = true;
    *num = count;
    RF_TRY(rf_kv_wait(s, err));
    return upload_chunks(s, tokens, count, err);
}

/* *rows: of the last layer. */
static rf_status run_layers(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t *rows, bool want_head,
                            rf_error *err) {
    int32_t num = *rows, of_prompt = num;
    void *x = s->stage->b.x;
    int32_t size = s->options.prefill_chunk;
    bool whole = rf_kv_wants_sentences(s, sequence); /* all rows pass the last layer */
    rf_status st = rf_kv_measure_begin(s, &s->sequences[sequence], err);
    if (st == RF_OK) st = upload_chunks(s, tokens, num, err);
    for (int l = 0; st == RF_OK && l < s->num_layers; l++) {
        st = rf_kv_measure_layer_begin(s, err);
        bool last_layer = l + 1 == s->num_layers;
        for (int32_t begin = 0; st == RF_OK && begin < num; begin += size) {
            rf_kv_chunk c = {.begin = begin, .rows = num - begin < size ? num - begin : size, .position = begin};
            s->stage->b.x = chunk_x(s, &c);
            bool goes_on = !last_layer || whole || (want_head && begin + c.rows == num);
            st = rf_kv_chunk_layer(s, l, &c, NULL, num, goes_on, err);
        }
        if (st == RF_OK && num_pseudo(s) > 0) {
            rf_kv_chunk c = {.begin = num, .rows = s->extra_rows, .pseudo = true};
            s->stage->b.x = chunk_x(s, &c);
            st = rf_kv_chunk_layer(s, l, &c, NULL, num, !last_layer, err);
        }
        if (st == RF_OK) st = s->ahead ? turn_over(s, l, sequence, num, err) : choose(s, l, sequence, tokens, num, err);
        if (st == RF_OK && !last_layer) st = pass_on(s, l + 1, sequence, tokens, &num, err);
    }
    s->stage->b.x = x;
    s->thinned = false;
    *rows = num;
    if (st == RF_OK) st = rf_kv_sentences_prompt(s, sequence, tokens, of_prompt, err);
    return st;
}

rf_status rf_kv_prefill(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, bool want_head,
                        rf_error *err) {
    rf_phase phase = rf_stream_get_phase(s->stream);
    int32_t *control = s->stage->b.control;
    double scored = s->info.score_ms;
    rf_stream_set_phase(s->stream, RF_PHASE_PLAN); /* chunks of any length */
    s->ahead = s->overlaps && !s->probe;
    int32_t rows = num;
    rf_status st = rf_kv_comes_in_blocks(s, sequence) ? rf_kv_prefill_blocks(s, sequence, tokens, num, want_head, err)
                                                      : run_layers(s, sequence, tokens, &rows, want_head, err);
    if (st == RF_OK && want_head) {
        s->host_control[s->at.keys + (size_t)sequence] = num;
        s->host_control[s->at.steps + (size_t)sequence] = 0;
        st = rf_stream_upload(s->stream, s->control, s->host_control, s->at.words * sizeof(int32_t), err);
        rf_kv_chunk last = {.begin = rows - 1};
        if (st == RF_OK) st = rf_kv_queue_head(s, chunk_x(s, &last), sequence, 1, err);
    }
    if (st == RF_OK && s->ahead) {
        st = finish_ahead(s, sequence, num, err);
    } else {
        if (st == RF_OK) st = rf_kv_upload_lists(s, sequence, 0, s->num_layers, err);
        if (st == RF_OK) st = rf_kv_wait(s, err);
        s->info.score_wait_ms += s->info.score_ms - scored;
    }
    s->ahead = false;
    s->stage->b.control = control;
    rf_stream_set_phase(s->stream, phase);
    return st;
}
