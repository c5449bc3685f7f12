/* dlm/kv_step.c - tokens behind a prompt: each is appended in every layer and head, attention reads listed rows of the
 * pool, and rules that work while decoding measure and drop.
 *
 * A (sequence, key head) is a batch entry of attention: G query heads, one key head, a list of rows of the pool. What a
 * step's attention reads is the set before slots go.
 * Lists are the books', uploaded where they changed, or they live on the device (kv_evict), and a step waits for
 * nothing. */
#include <math.h>
#include <string.h>

#include "dlm/kv_internal.h"

static char *rows_at(const rf_kv_session *s, void *base, int64_t row, int64_t cols) {
    return (char *)base + (size_t)(row * cols) * rf_kv_elem(s);
}

rf_attention_args rf_kv_step_attention(const rf_kv_session *s, int layer, int first, int num, int64_t kv_len) {
    int64_t d = s->head_dim, group = s->group, q_cols = (int64_t)s->num_q_heads * d;
    int64_t unit = rf_kv_unit_at(s, layer, first), slot = (int64_t)first * s->num_kv_heads * s->stride;
    bool ordered = rf_kv_in_cache_order(s), planned = s->memory != NULL;
    rf_attention_args a = {.dtype = s->model->dtype,
                           .batch = (int64_t)num * s->num_kv_heads,
                           .num_q_heads = s->group,
                           .num_kv_heads = 1,
                           .head_dim = s->head_dim,
                           .q_len = 1,
                           .kv_len = kv_len,
                           .q_batch_stride = group * d,
                           .q_row_stride = group * d,
                           .q_head_stride = d,
                           .kv_row_stride = d,
                           .kv_head_stride = d,
                           .out_batch_stride = group * d,
                           .out_row_stride = group * d,
                           .out_head_stride = d,
                           .softmax_scale = (float)(1.0 / sqrt((double)s->head_dim)),
                           .kv_batch_stride_rows = ordered ? 0 : s->stride,
                           .kv_batch_stride = ordered ? s->stride * d : 0,
                           .workspace = s->step.attn_workspace,
                           .workspace_bytes = s->step.attn_workspace_bytes};
    if (!planned) return a;
    a.q = rows_at(s, s->step.q, first, q_cols);
    a.out = rows_at(s, s->step.attn, first, q_cols);
    a.lse = s->step.lse + (int64_t)first * s->num_q_heads;
    a.k = ordered ? rows_at(s, s->k_read, slot, d) : s->k_pool;
    a.v = ordered ? rows_at(s, s->v_read, slot, d) : s->v_pool;
    a.kv_rows = ordered ? NULL : s->rows + unit * s->stride;
    a.kv_lens = s->lens + unit;
    return a;
}

/* New rows that nobody reads but attention go straight to the pool. */
static bool is_direct(const rf_kv_session *s) {
    return !rf_kv_in_cache_order(s) && s->select == NULL;
}

static const int32_t *new_rows_at(const rf_kv_session *s, int layer, int first) {
    int64_t unit = rf_kv_unit_at(s, layer, first);
    return s->on_device ? s->spare + unit : s->control + s->at.new_rows + unit;
}

/* New rows of the packed q|k|v: q turned into step.q, k and v into the pool, or into rows of their own (k). pairs 0: nothing is turned. */
static rf_status split(rf_kv_session *s, int layer, int first, int num, void *q, void *k, int pairs, rf_error *err) {
    const rf_text_model *model = s->model;
    const rf_text_desc *d = &model->desc;
    int64_t kv_cols = s->stage->kv_cols, q_cols = s->stage->q_cols;
    rf_qkv_rope_args args = {.qkv = rows_at(s, s->step.wide, first, q_cols + 2 * kv_cols),
                             .q_out = rows_at(s, q, first, q_cols),
                             .k = k ? rows_at(s, k, first, kv_cols) : s->k_pool,
                             .v = k ? rows_at(s, s->step.v_new, first, kv_cols) : s->v_pool,
                             .pool_rows = k ? NULL : new_rows_at(s, layer, first),
                             .dtype = model->dtype,
                             .batch = num,
                             .rows = 1,
                             .num_q_heads = d->num_q_heads,
                             .num_kv_heads = d->num_kv_heads,
                             .head_dim = d->head_dim,
                             .pairs = pairs,
                             .cache_rows = 1, /* one row a sequence, whatever its position */
                             .k_batch_stride = kv_cols,
                             .k_row_stride = kv_cols,
                             .positions = s->control + s->at.positions + (size_t)layer * (size_t)s->batch + first,
                             .q_norm = model->layers[layer].q_norm,
                             .k_norm = model->layers[layer].k_norm,
                             .norm_eps = (float)d->norm_eps,
                             .table = model->rope,
                             .table_rows = model->rope_positions};
    return s->ops->qkv_rope(s->stream, &args, err);
}

/* k: rows [B][Hkv * D] and those of step.v_new, which go to the pool; NULL: the lists alone. Of the sequences' heads in num_layers layers:
 * more than one only for whole batches. */
static rf_status append(rf_kv_session *s, int layer, int num_layers, int first, int num, const char *k, rf_error *err) {
    int64_t unit = rf_kv_unit_at(s, layer, first), kv_cols = s->stage->kv_cols;
    rf_kv_append_args args = {.new_rows = new_rows_at(s, layer, first),
                              .rows = s->rows + unit * s->stride,
                              .lens = s->lens + unit,
                              .rows_stride = s->stride,
                              .heads = (int64_t)num_layers * num * s->num_kv_heads,
                              .head_dim = s->head_dim,
                              .dtype = s->model->dtype};
    if (k != NULL) {
        args.k = k + (size_t)(first * kv_cols) * rf_kv_elem(s);
        args.v = rows_at(s, s->step.v_new, first, kv_cols);
        args.k_pool = s->k_pool;
        args.v_pool = s->v_pool;
    }
    return s->ops->kv_append(s->stream, &args, err);
}

/* The new slots of all layers, where their rows come straight from qkv_rope. */
static rf_status append_all(rf_kv_session *s, int first, int num, rf_error *err) {
    if (num == s->batch) return append(s, 0, s->num_layers, first, num, NULL, err);
    for (int l = 0; l < s->num_layers; l++) RF_TRY(append(s, l, 1, first, num, NULL, err));
    return RF_OK;
}

/* Do all heads of a layer always have as many slots? */
static bool heads_are_alike(const rf_kv_session *s) {
    return s->rule.score == RF_KV_SCORE_NONE ||
           (s->rule.alloc != RF_KV_ALLOC_FLAT_HEADS && s->rule.alloc != RF_KV_ALLOC_FLAT_ALL &&
            s->rule.alloc != RF_KV_ALLOC_CLASS);
}

/* CACHE: slot i of a head of n stands at position most - n + i of its layer: heads end together. */
static rf_status read_in_order(rf_kv_session *s, int layer, int sequence, int64_t kv_len, rf_error *err) {
    const rf_kv_book *book = s->sequences[sequence].book;
    int64_t d = s->head_dim, unit = rf_kv_unit_at(s, layer, sequence);
    int64_t slot = (int64_t)sequence * s->num_kv_heads * s->stride, stride = s->list_stride;
    bool alike = heads_are_alike(s);
    int32_t most = rf_kv_book_most(book, layer), *turn = s->host_copy;
    if (!alike) {
        RF_TRY(rf_kv_wait(s, err));
        for (int h = 0; h < s->num_kv_heads; h++) {
            int32_t num = rf_kv_book_head(book, layer, h)->num;
            for (int32_t i = 0; i < num; i++) turn[h * stride + i] = most - num + i;
        }
        RF_TRY(
            rf_stream_upload(s->stream, s->copy_lists, turn, (size_t)(s->num_kv_heads * stride) * sizeof *turn, err));
    }
    rf_kv_copy_args args = {.source = {.k = s->k_pool,
                                       .v = s->v_pool,
                                       .row_stride = d,
                                       .rows = s->rows + unit * s->stride,
                                       .lens = s->lens + unit,
                                       .rows_stride = s->stride,
                                       .num_keys = kv_len},
                            .k_out = rows_at(s, s->k_read, slot, d),
                            .v_out = rows_at(s, s->v_read, slot, d),
                            .out_row_stride = d,
                            .out_head_stride = s->stride * d,
                            .turn = alike ? s->iota_slots : s->copy_lists,
                            .counts = s->lens + unit,
                            .list_stride = alike ? s->stride : stride,
                            .num = kv_len,
                            .table = s->model->rope,
                            .pairs = s->head_dim / 2,
                            .num_kv_heads = s->num_kv_heads,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype};
    return s->ops->kv_copy(s->stream, &args, err);
}

/* True positions of the new slots, in all layers. */
static rf_status note_positions(rf_kv_session *s, int first, int num, rf_error *err) {
    bool all = num == s->batch;
    for (int l = 0; l < (all ? 1 : s->num_layers); l++) {
        int64_t unit = rf_kv_unit_at(s, l, first);
        rf_rows_args args = {.src = s->control + s->at.slot_positions + unit,
                             .dst = s->positions,
                             .rows = s->control + s->at.slots + unit,
                             .dtype = RF_DTYPE_F32, /* words */
                             .num_rows = (all ? (int64_t)s->num_layers : 1) * num * s->num_kv_heads,
                             .cols = 1};
        RF_TRY(s->ops->scatter_rows(s->stream, &args, err));
    }
    return RF_OK;
}

static rf_status evict(rf_kv_session *s, int layer, int first, int num, int64_t kv_len, rf_error *err) {
    int64_t unit = rf_kv_unit_at(s, layer, first);
    const rf_kv_rule *r = &s->rule;
    int32_t budget = s->sequences[first].budget, sinks = r->sinks < budget ? r->sinks : budget;
    int32_t recents = r->recents < 0 ? (budget - sinks) / 2 : r->recents;
    if (r->last && recents == 0) recents = 1;
    if (recents > budget - sinks) recents = budget - sinks;
    rf_kv_evict_args args = {.k = s->k_pool,
                             .q = rows_at(s, s->step.q, first, s->stage->q_cols),
                             .lse = s->step.lse + (int64_t)first * s->num_q_heads,
                             .rows = s->rows + unit * s->stride,
                             .positions = s->positions + unit * s->stride,
                             .lens = s->lens + unit,
                             .spare = s->spare + unit,
                             .budget = s->budgets + unit,
                             .score = s->scores + unit * s->stride,
                             .rows_stride = s->stride,
                             .sequences = num,
                             .num_q_heads = s->num_q_heads,
                             .num_kv_heads = s->num_kv_heads,
                             .head_dim = s->head_dim,
                             .dtype = s->model->dtype,
                             .scale = (float)(1.0 / sqrt((double)s->head_dim)),
                             .decay = r->reduce == RF_KV_REDUCE_DECAY ? (float)r->alpha : 1.0f,
                             .mode = s->evict_mode,
                             .over_heads = r->heads == RF_KV_HEADS_MEAN,
                             .sinks = sinks,
                             .recents = recents,
                             .max_len = kv_len,
                             .workspace = s->workspace,
                             .workspace_bytes = s->workspace_bytes};
    return s->ops->kv_evict(s->stream, &args, err);
}

/* What is protected follows from the budget: one call for sequences that share it. */
static rf_status evict_all(rf_kv_session *s, int layer, int first, int num, int64_t kv_len, rf_error *err) {
    for (int begin = first, end; begin < first + num; begin = end) {
        for (end = begin + 1; end < first + num && s->sequences[end].budget == s->sequences[begin].budget;) end++;
        RF_TRY(evict(s, layer, begin, end - begin, kv_len, err));
    }
    return RF_OK;
}

static bool decides_late(const rf_kv_session *s) {
    return !s->on_device && s->select == NULL && s->step_needs == 0 && s->rule.score != RF_KV_SCORE_NONE &&
           s->rule.schedule != RF_KV_AT_PREFILL;
}

/* The books follow, on the host: behind a layer's attention, or behind the step where nothing is measured. */
static rf_status decide(rf_kv_session *s, int layer, int first, int num, rf_error *err) {
    double began = rf_kv_now_ms();
    for (int b = first; b < first + num; b++) {
        if (s->sequences[b].budget == 0 && !s->packed) continue;
        if (s->packed) {
            bool released;
            RF_TRY(rf_kv_packed_step(s, layer, b, &released, err));
            if (released) RF_TRY(rf_kv_upload_lists(s, b, layer, layer + 1, err));
            continue;
        }
        rf_kv_stats stats = {.stride = s->stats_stride, .head_dim = s->head_dim};
        bool changed = false;
        if (s->step_needs & rf_kv_book_step_needs(s->sequences[b].book, layer))
            RF_TRY(rf_kv_measure_step(s, layer, b, &stats, err));
        rf_kv_sentences_show(s, b, &stats);
        RF_TRY(rf_kv_book_step(s->sequences[b].book, layer, &stats, &changed, err));
        if (!changed) continue;
        if (s->rule.action != RF_KV_DROP) RF_TRY(rf_kv_join_pool(s, layer, b, err));
        /* one choice over all layers comes with the last one */
        int begin = s->rule.alloc == RF_KV_ALLOC_FLAT_ALL ? 0 : layer;
        RF_TRY(rf_kv_upload_lists(s, b, begin, layer + 1, err));
    }
    s->info.step_score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

/* Not while a step is planned. */
static bool selects(const rf_kv_session *s) {
    return s->select != NULL && s->rule.score != RF_KV_SCORE_NONE;
}

static rf_status queue_layer(rf_kv_session *s, int layer, int first, int num, int64_t kv_len, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    const rf_text_layer *w = &s->model->layers[layer];
    const rf_kv_step_buffers *b = &s->step;
    rf_text_run run = rf_kv_run(s);
    int64_t hidden = d->hidden, ffn = d->ffn, q_cols = s->stage->q_cols, kv_cols = s->stage->kv_cols;
    char *x = (char *)b->x + (size_t)(first * hidden) * rf_dtype_bytes(s->stage->options.residual_dtype);
    void *h = rows_at(s, b->h, first, hidden), *y = rows_at(s, b->y, first, hidden);
    bool last = layer + 1 == s->num_layers;
    if (s->step_needs & RF_KV_NEED_GATE) RF_TRY(rf_kv_gate_step(s, layer, h, first, num, err));
    RF_TRY(rf_text_linear(&run, h, w->qkv, w->qkv_bias, rows_at(s, b->wide, first, q_cols + 2 * kv_cols), num,
                          q_cols + 2 * kv_cols, hidden, err));
    if (rf_kv_in_cache_order(s)) RF_TRY(split(s, layer, first, num, b->attn, b->k_raw, 0, err));
    RF_TRY(split(s, layer, first, num, b->q, is_direct(s) ? NULL : b->k_new, s->head_dim / 2, err));
    if (!is_direct(s)) RF_TRY(append(s, layer, 1, first, num, rf_kv_in_cache_order(s) ? b->k_raw : b->k_new, err));
    for (int i = first; rf_kv_in_cache_order(s) && i < first + num; i++)
        RF_TRY(read_in_order(s, layer, i, kv_len, err));
    if (s->draft_at >= 0)
        RF_TRY(rf_stream_copy(s->stream, rows_at(s, s->draft_q, (int64_t)layer * s->rule.drafts + s->draft_at, q_cols),
                              rows_at(s, b->q, first, q_cols), (size_t)q_cols * rf_kv_elem(s), err));
    rf_attention_args attention = rf_kv_step_attention(s, layer, first, num, kv_len);
    if (selects(s)) {
        RF_TRY(rf_kv_select_step(s, layer, first, num, err));
        rf_kv_select_attention(s, first, &attention);
    }
    RF_TRY(s->ops->attention(s->stream, &attention, err));
    RF_TRY(rf_kv_join_mean(s, layer, first, num, err));
    if (s->packed && s->rule.score != RF_KV_SCORE_NONE) RF_TRY(rf_kv_packed_attention(s, layer, first, num, err));
    if (s->on_device)
        RF_TRY(evict_all(s, layer, first, num, kv_len, err));
    else if (s->step_needs)
        RF_TRY(decide(s, layer, first, num, err));
    RF_TRY(rf_text_linear(&run, rows_at(s, b->attn, first, q_cols), w->out, NULL, y, num, hidden, q_cols, err));
    RF_TRY(rf_text_residual(&run, x, y, h, w->ffn_norm, num, NULL, NULL, err));
    void *wide = rows_at(s, b->wide, first, 2 * ffn), *act = rows_at(s, b->act, first, ffn);
    RF_TRY(rf_text_linear(&run, h, w->gate_up, NULL, wide, num, 2 * ffn, hidden, err));
    rf_swiglu_args swiglu = {
        .x = wide, .y = act, .dtype = s->model->dtype, .rows = num, .cols = ffn, .interleaved = true};
    RF_TRY(s->ops->swiglu(s->stream, &swiglu, err));
    RF_TRY(rf_text_linear(&run, act, w->down, NULL, y, num, hidden, ffn, err));
    return rf_text_residual(&run, x, y, h, last ? NULL : s->model->layers[layer + 1].attention_norm, num, NULL, NULL,
                            err);
}

static rf_status queue_step(rf_kv_session *s, int first, int num, int64_t kv_len, bool head, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    char *x = (char *)s->step.x + (size_t)(first * d->hidden) * rf_dtype_bytes(s->stage->options.residual_dtype);
    rf_embed_args embed = {.table = s->model->embedding,
                           .ids = s->control + s->at.tokens + first,
                           .out = x,
                           .dtype = s->model->dtype,
                           .out_dtype = s->stage->options.residual_dtype,
                           .rows = num,
                           .cols = d->hidden,
                           .vocab = d->vocab,
                           .scale = 1.0f};
    RF_TRY(s->ops->embed(s->stream, &embed, err));
    rf_norm_args norm = rf_text_norm_args(s->stage, x, rows_at(s, s->step.h, first, d->hidden), num,
                                          s->model->layers[0].attention_norm);
    RF_TRY(s->ops->norm(s->stream, &norm, err));
    if (s->on_device) RF_TRY(note_positions(s, first, num, err));
    if (s->slides) RF_TRY(rf_kv_slide_sinks(s, err));
    if (is_direct(s)) RF_TRY(append_all(s, first, num, err));
    for (int l = 0; l < s->num_layers; l++) RF_TRY(queue_layer(s, l, first, num, kv_len, err));
    if (head) RF_TRY(rf_kv_queue_head(s, x, first, num, err));
    return rf_kv_sentences_step(s, first, num, err);
}

/* --- launch ------------------------------------------------------------------------------------------------------------- */

/* How attention is planned: powers of two, so that few graphs serve all lengths. */
static int64_t bucket_keys(const rf_kv_session *s, int64_t most, int *graph) {
    int64_t keys = 256;
    for (*graph = 0; keys < most && *graph + 1 < RF_KV_GRAPHS; ++*graph) keys *= 2;
    return s->host || keys > s->stride ? s->stride : keys;
}

/* Steps in which the host measures are not captured. */
static bool can_capture(const rf_kv_session *s) {
    return rf_backend_has_graphs(s->backend) && s->options.use_graphs && s->step_needs == 0 && s->draft_at < 0 &&
           s->select == NULL && (!rf_kv_in_cache_order(s) || heads_are_alike(s));
}

static rf_status launch(rf_kv_session *s, int first, int num, int64_t most, bool head, rf_error *err) {
    int graph;
    int64_t keys = bucket_keys(s, most, &graph);
    s->info.graph_nodes = 0;
    bool captured = num == s->batch && head && can_capture(s), planned = captured && s->graph_planned[graph];
    if (!planned) { /* operators may choose their algorithms */
        s->graph_planned[graph] = captured;
        rf_phase phase = rf_stream_get_phase(s->stream);
        if (!s->host) rf_stream_set_phase(s->stream, RF_PHASE_PLAN);
        rf_status st = queue_step(s, first, num, keys, head, err);
        rf_stream_set_phase(s->stream, phase);
        return st;
    }
    if (s->graphs[graph] == NULL) {
        RF_TRY(rf_graph_begin(s->stream, err));
        rf_status st = queue_step(s, first, num, keys, head, err);
        rf_status ended = rf_graph_end(&s->graphs[graph], s->stream, st == RF_OK ? err : NULL);
        if (st != RF_OK) return st;
        RF_TRY(ended);
    }
    s->info.graph_nodes = rf_graph_num_nodes(s->graphs[graph]);
    return rf_graph_launch(s->graphs[graph], s->stream, err);
}

/* A step of sequences that have nothing: it leaves rows as they are. */
static rf_status plan_step(rf_kv_session *s, int num, rf_error *err) {
    for (int64_t i = 0; i < (int64_t)s->num_layers * s->units; i++) s->host_control[s->at.new_rows + (size_t)i] = -1;
    RF_TRY(rf_stream_upload(s->stream, s->control, s->host_control, s->at.words * sizeof(int32_t), err));
    if (s->on_device)
        RF_TRY(rf_stream_upload(s->stream, s->spare, s->host_control + s->at.new_rows,
                                (size_t)s->num_layers * (size_t)s->units * sizeof(int32_t), err));
    bool on_device = s->on_device;
    unsigned needs = s->step_needs;
    rf_kv_score score = s->rule.score;
    s->on_device = false; /* books and lists are left alone */
    s->step_needs = 0;
    s->rule.score = RF_KV_SCORE_NONE;
    int graph;
    rf_status st = queue_step(s, 0, num, bucket_keys(s, 1, &graph), true, err);
    s->on_device = on_device;
    s->step_needs = needs;
    s->rule.score = score;
    return st == RF_OK ? rf_kv_wait(s, err) : st;
}

rf_status rf_kv_plan_steps(rf_kv_session *s, rf_error *err) {
    rf_phase phase = rf_stream_get_phase(s->stream);
    rf_stream_set_phase(s->stream, RF_PHASE_PLAN);
    s->draw.keep_logits = false;
    rf_status st = plan_step(s, s->batch, err);
    if (st == RF_OK && s->batch > 1) st = plan_step(s, 1, err);
    rf_stream_set_phase(s->stream, phase);
    return st;
}

/* --- lists on the device -------------------------------------------------------------------------------------------------- */

rf_status rf_kv_start_device(rf_kv_session *s, int sequence, rf_error *err) {
    rf_kv_sequence *q = &s->sequences[sequence];
    int64_t first_row = (int64_t)sequence * s->pool_rows;
    int32_t *budgets = s->host_state, heads = s->num_kv_heads;
    /* kv_evict counts means over a group; a sum's order is the same. */
    bool sums = s->rule.heads == RF_KV_HEADS_NONE && s->rule.group == RF_KV_OVER_SUM;
    float scale = sums ? 1.0f / (float)s->group : 1.0f;
    for (int64_t i = 0; i < s->pool_rows; i++) q->free_rows[i] = 0;
    RF_TRY(rf_kv_wait(s, err));
    for (int l = 0; l < s->num_layers; l++) {
        for (int h = 0; h < heads; h++) {
            const rf_kv_head *head = rf_kv_book_head(q->book, l, h);
            int64_t unit = rf_kv_unit_at(s, l, sequence) + h;
            q->lens[l * heads + h] = head->num;
            for (int32_t i = 0; i < head->num; i++) q->free_rows[head->row[i] - first_row] = 1;
            memcpy(s->host_rows + unit * s->stride, head->position, (size_t)head->num * sizeof(int32_t));
            float *scores = s->host_scores + unit * s->stride;
            for (int32_t i = 0; i < head->num; i++) scores[i] = scale * head->score[i];
            budgets[unit] = q->budget > 0 ? q->budget : INT32_MAX;
        }
        int64_t unit = rf_kv_unit_at(s, l, sequence), at = unit * s->stride;
        size_t num = (size_t)((heads - 1) * s->stride + q->lens[l * heads + heads - 1]); /* one copy, gaps and all */
        RF_TRY(rf_stream_upload(s->stream, s->positions + at, s->host_rows + at, num * sizeof(int32_t), err));
        RF_TRY(rf_stream_upload(s->stream, s->scores + at, s->host_scores + at, num * sizeof(float), err));
        RF_TRY(rf_stream_upload(s->stream, s->budgets + unit, budgets + unit, (size_t)heads * sizeof(int32_t), err));
    }
    int32_t num_free = 0;
    for (int32_t i = 0; i < (int32_t)s->pool_rows; i++)
        if (q->free_rows[i] == 0) q->free_rows[num_free++] = (int32_t)(first_row + i);
    q->num_free = num_free;
    q->has_spare = false;
    return rf_kv_wait(s, err);
}

/* Rows for heads that lost no slot in the last step. All heads of a uniform budget are alike. */
static rf_status give_rows(rf_kv_session *s, int first, int num, rf_error *err) {
    int32_t *rows = s->host_state + (size_t)s->num_layers * (size_t)s->units;
    bool all = num == s->batch;
    for (int b = first; b < first + num; b++) all = all && !s->sequences[b].has_spare;
    for (int b = first; b < first + num; b++) {
        rf_kv_sequence *q = &s->sequences[b];
        if (q->has_spare) continue;
        for (int l = 0; l < s->num_layers; l++) {
            int64_t unit = rf_kv_unit_at(s, l, b);
            for (int h = 0; h < s->num_kv_heads; h++) {
                if (q->num_free == 0 || q->lens[l * s->num_kv_heads + h] >= s->stride)
                    return rf_fail(err, RF_ERR_STATE, "sequence %d: the pool of %lld rows is used up", b,
                                   (long long)s->pool_rows);
                rows[unit + h] = q->free_rows[--q->num_free];
            }
            if (!all)
                RF_TRY(rf_stream_upload(s->stream, s->spare + unit, rows + unit,
                                        (size_t)s->num_kv_heads * sizeof(int32_t), err));
        }
    }
    if (!all) return RF_OK;
    return rf_stream_upload(s->stream, s->spare, rows, (size_t)s->num_layers * (size_t)s->units * sizeof(int32_t), err);
}

static void follow_device(rf_kv_session *s, int first, int num) {
    int heads = s->num_layers * s->num_kv_heads;
    for (int b = first; b < first + num; b++) {
        rf_kv_sequence *q = &s->sequences[b];
        q->has_spare = q->budget > 0 && q->lens[0] >= q->budget;
        for (int i = 0; i < heads; i++) {
            if (q->has_spare)
                q->evicted++;
            else
                q->lens[i]++;
        }
    }
}

/* --- a step --------------------------------------------------------------------------------------------------------------- */

/* Slots of a layer's longest head, the new one included. */
static int32_t most_slots(const rf_kv_session *s, int layer, int sequence) {
    const rf_kv_sequence *q = &s->sequences[sequence];
    return s->on_device ? q->lens[layer * s->num_kv_heads] + 1 : rf_kv_book_most(q->book, layer);
}

static rf_status fill_control(rf_kv_session *s, int first, int num, const int32_t *tokens, int64_t *most,
                              rf_error *err) {
    int32_t *c = s->host_control;
    *most = 1;
    for (int b = first; b < first + num; b++) {
        rf_kv_sequence *q = &s->sequences[b];
        int32_t slid = 0;
        if (!s->on_device) RF_TRY(rf_kv_book_append(q->book, q->seen, err));
        if (s->slides) RF_TRY(rf_kv_slide_place(s, b, most_slots(s, 0, b), &slid, err));
        c[s->at.tokens + (size_t)b] = tokens[b - first];
        c[s->at.keys + (size_t)b] = q->seen + 1; /* the position that is predicted */
        c[s->at.steps + (size_t)b] = q->made + 1;
        for (int l = 0; l < s->num_layers; l++) {
            int32_t slots = most_slots(s, l, b);
            int64_t position = q->seen + q->shift[l];
            if (s->slides)
                position = slid;
            else if (rf_kv_in_cache_order(s))
                position = slots - 1;
            if (position >= s->model->rope_positions)
                return rf_fail(err, RF_ERR_STATE, "sequence %d: position %lld, the model has %lld", b,
                               (long long)position, (long long)s->model->rope_positions);
            if (slots > s->stride)
                return rf_fail(err, RF_ERR_STATE, "layer %d keeps %d slots, lists have room for %lld", l, slots,
                               (long long)s->stride);
            c[s->at.positions + (size_t)l * (size_t)s->batch + (size_t)b] = (int32_t)position;
            if (slots > *most) *most = slots;
            int64_t unit = rf_kv_unit_at(s, l, b);
            for (int h = 0; h < s->num_kv_heads && !s->on_device; h++) {
                const rf_kv_head *head = rf_kv_book_head(q->book, l, h);
                c[s->at.new_rows + (size_t)(unit + h)] = head->row[head->num - 1];
                s->key_layers += head->num;
            }
            for (int h = 0; h < s->num_kv_heads && s->on_device; h++) {
                c[s->at.slots + (size_t)(unit + h)] = (int32_t)((unit + h) * s->stride + slots - 1);
                c[s->at.slot_positions + (size_t)(unit + h)] = q->seen;
                s->key_layers += slots;
            }
        }
        s->row_layers += s->num_layers;
    }
    return RF_OK;
}

rf_status rf_kv_step_range(rf_kv_session *s, int first, int num, const int32_t *tokens, bool head, rf_error *err) {
    int64_t most;
    RF_TRY(rf_kv_wait(s, err)); /* the control block may be on its way */
    for (int b = first; b < first + num; b++)
        if (s->draft_at < 0 && s->sequences[b].appended >= s->options.max_new)
            return rf_fail(err, RF_ERR_STATE, "sequence %d has used up its %d tokens behind the prompt", b,
                           (int)s->options.max_new);
    rf_status st = fill_control(s, first, num, tokens, &most, err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->control, s->host_control, s->at.words * sizeof(int32_t), err);
    if (st == RF_OK && s->on_device) st = give_rows(s, first, num, err);
    if (st == RF_OK) st = launch(s, first, num, most, head, err);
    for (int b = first; b < first + num; b++) {
        rf_kv_sequence *q = &s->sequences[b];
        if (st != RF_OK) q->ready = false; /* its lists are in no known state */
        q->seen++;
        q->appended++;
        q->made++;
    }
    if (s->on_device && st == RF_OK) follow_device(s, first, num);
    for (int l = 0; st == RF_OK && decides_late(s) && l < s->num_layers; l++) {
        st = decide(s, l, first, num, err);
        for (int b = first; b < first + num && st != RF_OK; b++) s->sequences[b].ready = false;
    }
    s->stage->busy = true;
    return st;
}
