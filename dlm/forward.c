/* dlm/forward.c - the text executor: planning of a session, and what is read of its last pass. */
#include "dlm/forward_internal.h"

#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/memory.h"

rf_text_session_options rf_text_session_options_default(void) {
    return (rf_text_session_options){.batch = 1, .residual_dtype = RF_DTYPE_COUNT, .use_graphs = true};
}

rf_status rf_text_wait(rf_text_session *s, rf_error *err) {
    if (!s->busy) return RF_OK;
    RF_TRY(rf_stream_synchronize(s->stream, err));
    s->busy = false;
    s->num_staged = 0;
    return RF_OK;
}

/* --- planning --------------------------------------------------------------------------------------------------------
 */

static rf_status check_options(const rf_text_model *model, rf_text_session_options *o, rf_error *err) {
    int64_t most =
        model->desc.max_positions < model->rope_positions ? model->desc.max_positions : model->rope_positions;
    if (o->batch < 1 || o->batch > 65535)
        return rf_fail(err, RF_ERR_ARGUMENT, "a batch of %d sequences, expected 1..65535", o->batch);
    if (o->capacity < 1 || o->capacity > most)
        return rf_fail(err, RF_ERR_ARGUMENT, "a capacity of %d rows, expected 1..%lld (the model's positions)",
                       o->capacity, (long long)most);
    if (o->max_rows == 0) o->max_rows = o->capacity;
    if (o->max_rows < 1 || o->max_rows > o->capacity)
        return rf_fail(err, RF_ERR_ARGUMENT, "passes of %d rows, expected 1..%d (the capacity)", o->max_rows,
                       o->capacity);
    if (o->max_head_rows == 0) o->max_head_rows = o->max_rows;
    if (o->max_head_rows < 1 || o->max_head_rows > o->max_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d head rows, expected 1..%d (rows of a pass)", o->max_head_rows,
                       o->max_rows);
    if ((int64_t)o->batch * o->capacity > INT32_MAX / 2)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d sequences of %d rows are too many", o->batch, o->capacity);
    if ((o->keep_inputs || o->keep_increments || o->external_slots != 0) && o->batch != 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kept planes with a batch of %d, expected 1", o->batch);
    if (o->layer_planes < 0 ||
        (o->layer_planes > 0 && (o->keep_inputs || o->keep_increments || o->external_slots != 0)))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kept planes in a session of %d layers' keys and values",
                       o->layer_planes);
    if (o->external_slots < 0 || o->external_slots > o->capacity)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d external slots, expected 0..%d (the capacity)", o->external_slots,
                       o->capacity);
    if (o->residual_dtype == RF_DTYPE_COUNT) o->residual_dtype = RF_DTYPE_F32;
    if (o->residual_dtype != RF_DTYPE_F32 && o->residual_dtype != model->dtype)
        return rf_fail(err, RF_ERR_DTYPE, "residual dtype %s, expected f32 or the model's %s",
                       rf_dtype_name(o->residual_dtype), rf_dtype_name(model->dtype));
    return RF_OK;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

/* A run that only asks: largest sizes, no stream. */
static rf_text_run widest_run(rf_text_session *s) {
    rf_text_run run = {.s = s};
    memset(&run.shape, 0, sizeof run.shape);
    run.shape.rows = s->options.max_rows;
    run.shape.keys = s->options.capacity;
    run.shape.listed = 1;
    run.shape.end_layer = s->model->desc.num_layers;
    run.shape.head_rows = s->head_capacity;
    run.shape.has_refs = 1;
    run.shape.num_bans = 8;
    if (s->options.external_slots > 0) {
        run.shape.external = run.shape.outside_listed = 1;
        run.shape.fresh = 2 * s->options.external_slots;
        run.shape.outside_keys = run.shape.inside_keys = s->options.capacity;
    }
    run.shape.window = s->options.keep_inputs ? s->options.max_rows : 0;
    run.rows = (int64_t)s->options.batch * s->options.max_rows;
    return run;
}

static size_t most_control_words(rf_text_session *s) {
    rf_text_run run = widest_run(s);
    size_t words = 0;
    static const rf_pass_layers kinds[] = {RF_PASS_SAME, RF_PASS_DRIFT, RF_PASS_VERIFY};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        run.shape.layers = (int32_t)kinds[i];
        words = max_size(words, rf_text_control_layout(s, &run.shape).words);
    }
    return words;
}

/* The most that any pass of this session asks for. Scratch of the host grows with the queries but not quite with the
 * keys; a device splits keys the more the fewer queries there are, and plans for few numbers of keys. */
static size_t attention_workspace(rf_text_session *s) {
    rf_text_run run = widest_run(s);
    bool host = rf_backend_get_kind(s->backend) == RF_BACKEND_CPU;
    int32_t capacity = s->options.capacity, max_rows = s->options.max_rows;
    int32_t dense = s->options.keep_increments ? max_rows : 2048; /* numbers of rows that are not those of a bucket */
    size_t most = 0;
    for (int32_t rows = 1; host && rows <= max_rows && rows <= 256;
         rows++) { /* few rows have a way of their own there */
        rf_attention_args args = rf_text_attention_args(&run, 0, rows);
        args.kv_len = capacity;
        most = max_size(most, s->ops->attention_workspace(s->backend, &args));
    }
    for (int32_t size = host ? 1 : 32;; size = host ? size + 1 : size * 2) {
        int32_t keys = size < capacity ? size : capacity;
        for (int32_t rows = host ? max_rows : 1; rows <= max_rows; rows++) {
            if (rows > dense && rows % 512 != 0 && rows != max_rows) continue;
            rf_attention_args args = rf_text_attention_args(&run, 0, rows);
            args.kv_len = keys;
            most = max_size(most, s->ops->attention_workspace(s->backend, &args));
        }
        if (keys == capacity) return most;
    }
}

static rf_head_stats_args head_args(const rf_text_session *s, int64_t rows) {
    return (rf_head_stats_args){.dtype = s->model->dtype,
                                .rows = rows,
                                .cols = s->model->desc.hidden,
                                .vocab = s->model->desc.vocab,
                                .scale = 1.0f};
}

/* The rows that one call of head_stats takes, and its workspace. */
static rf_status plan_head(rf_text_session *s, rf_error *err) {
    int32_t heads = s->options.max_head_rows * s->options.batch;
    int32_t half = rf_text_bucket_head(s, (heads + 1) / 2);
    s->head_capacity = rf_text_bucket_head(s, heads);
    if (2 * half > s->head_capacity) s->head_capacity = 2 * half;
    rf_status st = RF_OK;
    for (s->head_chunk = s->head_capacity < 512 ? s->head_capacity : 512; s->head_chunk > 0; s->head_chunk /= 2) {
        rf_head_stats_args args = head_args(s, s->head_chunk);
        st = s->ops->head_stats(NULL, &args, err);
        if (st == RF_OK) break;
    }
    for (int64_t rows = 1; rows <= s->head_chunk; rows++) {
        rf_head_stats_args args = head_args(s, rows);
        s->b.head_workspace_bytes =
            max_size(s->b.head_workspace_bytes, s->ops->head_stats_workspace(s->backend, &args));
    }
    return st;
}

/* Hands out every buffer; run twice, counting and real. State comes first. */
static rf_status take_buffers(rf_text_session *s, rf_arena *arena, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    const rf_text_session_options *o = &s->options;
    size_t elem = rf_dtype_bytes(s->model->dtype), residual = rf_dtype_bytes(o->residual_dtype);
    size_t rows = (size_t)o->batch * (size_t)o->max_rows, hidden = (size_t)d->hidden, ffn = (size_t)d->ffn;
    size_t q_cols = (size_t)s->q_cols, kv_cols = (size_t)s->kv_cols, heads = (size_t)d->num_q_heads;
    size_t state_rows = (size_t)d->num_layers * (size_t)o->batch * (size_t)s->cache_rows;
    size_t key_rows =
        (size_t)(o->layer_planes > 0 ? o->layer_planes : d->num_layers) * (size_t)o->batch * (size_t)s->cache_rows;
    size_t slots = (size_t)d->num_layers * (size_t)rf_text_external_slots(s), layers = (size_t)d->num_layers;
    size_t drift = o->keep_inputs, verify = o->keep_increments, keys = (size_t)o->capacity;
    size_t head = (size_t)s->head_capacity;
    struct {
        void *slot;
        const char *name;
        size_t count, elem_bytes;
        int kind; /* 0 scratch, 1 keys and values, 2 planes */
    } list[] = {
        {&s->b.k, "keys", key_rows * kv_cols, elem, 1},
        {&s->b.v, "values", key_rows * kv_cols, elem, 1},
        {&s->b.inputs, "kept layer inputs", drift * state_rows * hidden, residual, 2},
        {&s->b.queries, "kept queries", drift * state_rows * q_cols, elem, 2},
        {&s->b.attn_increments, "kept attention increments", verify * state_rows * hidden, elem, 2},
        {&s->b.ffn_increments, "kept feed-forward increments", verify * state_rows * hidden, elem, 2},
        {&s->b.external_out, "kept outside attention", slots * q_cols, sizeof(float), 2},
        {&s->b.external_lse, "kept outside attention's log-sums", slots * heads, sizeof(float), 2},
        {&s->b.x, "residual stream", rows * hidden, residual, 0},
        {&s->b.x_pick, "picked residual rows", verify * rows * hidden, residual, 0},
        {&s->b.h, "normed rows", rows * hidden, elem, 0},
        {&s->b.h_pick, "picked normed rows", verify * rows * hidden, elem, 0},
        {&s->b.wide, "qkv and MLP rows", rows * max_size(q_cols + 2 * kv_cols, 2 * ffn), elem, 0},
        {&s->b.act, "MLP activations", rows * ffn, elem, 0},
        {&s->b.q, "queries", rows * q_cols, elem, 0},
        {&s->b.attn, "attention output", rows * q_cols, elem, 0},
        {&s->b.y, "part output", rows * hidden, elem, 0},
        {&s->b.lse, "log-sums", drift * rows * heads, sizeof(float), 0},
        {&s->b.attn_workspace, "attention workspace", s->b.attn_workspace_bytes, 1, 0},
        {&s->b.probs_old, "kept probabilities", drift * heads * keys, sizeof(float), 0},
        {&s->b.probs_new, "new probabilities", drift * heads * keys, sizeof(float), 0},
        {&s->b.cosine, "similarities", max_size(drift * max_size(heads, keys), verify * rows), sizeof(float), 0},
        {&s->b.mass, "attention mass", drift * keys, sizeof(float), 0},
        {&s->b.sums, "similarity sums", drift * layers * 4, sizeof(float), 0},
        {&s->b.tracked, "tracked rows", drift * layers, sizeof(int32_t), 0},
        {&s->b.reduce_workspace, "reduction workspace", s->b.reduce_workspace_bytes, 1, 0},
        {&s->b.values, "new values", verify * rows * kv_cols, elem, 0},
        {&s->b.head_h, "head rows", head * hidden, elem, 0},
        {&s->b.head_f32, "guided head rows", o->batch % 2 == 0 ? head * hidden : 0, sizeof(float), 0},
        {&s->b.stats, "token statistics", head, sizeof(rf_token_stats), 0},
        {&s->b.head_workspace, "head workspace", s->b.head_workspace_bytes, 1, 0},
        {&s->b.control, "control block", s->control_words, sizeof(int32_t), 0},
    };
    s->cache_bytes = s->plane_bytes = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *p = NULL;
        RF_TRY(rf_arena_take(arena, &p, list[i].name, list[i].count, list[i].elem_bytes, err));
        memcpy(list[i].slot, &p, sizeof p);
        if (list[i].kind == 1) s->cache_bytes += list[i].count * list[i].elem_bytes;
        if (list[i].kind == 2) s->plane_bytes += list[i].count * list[i].elem_bytes;
        if (list[i].kind != 0) s->state_bytes = arena->used;
    }
    return RF_OK;
}

static rf_status allocate(rf_text_session *s, rf_error *err) {
    const rf_text_session_options *o = &s->options;
    size_t layers = (size_t)s->model->desc.num_layers, pass_rows = (size_t)o->batch * (size_t)o->max_rows;
    rf_arena arena;
    rf_arena_init_counting(&arena);
    RF_TRY(take_buffers(s, &arena, err));
    if (arena.overflow) return rf_fail(err, RF_ERR_ARGUMENT, "this batch does not fit any address space");
    RF_TRY(rf_backend_alloc(s->backend, (void **)&s->memory, arena.peak, err));
    s->memory_bytes = arena.peak;
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    RF_TRY(take_buffers(s, &arena, err));

    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->staged, RF_TEXT_STAGED * s->control_words * sizeof(int32_t),
                                   err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->host_stats,
                                   (size_t)s->head_capacity * sizeof *s->host_stats, err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->host_sums, layers * 4 * sizeof(float), err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->host_tracked, layers * sizeof(int32_t), err));
    s->place = rf_alloc(pass_rows * sizeof *s->place);
    s->order = rf_alloc(pass_rows * sizeof *s->order);
    s->visible = rf_alloc((size_t)o->capacity * sizeof *s->visible);
    s->drift = rf_alloc(layers * sizeof *s->drift);
    s->slot_filled = rf_alloc_zero((size_t)o->external_slots, 1);
    s->slot_taken = rf_alloc_zero((size_t)o->external_slots, 1);
    if (!s->place || !s->order || !s->visible || !s->drift || !s->slot_filled || !s->slot_taken)
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for a text session");
    return RF_OK;
}

/* A pass of padding rows: nobody sees what it leaves in the dump rows. */
static rf_status warm_up(rf_text_session *s, int32_t num_rows, int32_t num_head_rows, rf_error *err) {
    int32_t *lists = rf_alloc(3 * (size_t)s->options.batch * (size_t)num_rows * sizeof *lists);
    if (lists == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a pass");
    size_t num = (size_t)s->options.batch * (size_t)num_rows;
    for (size_t i = 0; i < 3 * num; i++) lists[i] = -1;
    memset(s->order, 0, num * sizeof *s->order); /* visible_end of every sequence */
    rf_text_pass pass = rf_text_pass_default();
    pass.num_rows = num_rows;
    pass.rows = lists;
    pass.tokens = lists + num;
    pass.head_rows = lists + 2 * num;
    pass.num_head_rows = num_head_rows;
    pass.visible_end = s->order;
    rf_text_rows rows = {.num_rows = num_rows, .rows = pass.rows, .tokens = pass.tokens};
    rf_text_run run = rf_text_make_run(s, &pass, &rows);
    rf_status st = rf_text_upload(&run, &pass, &rows, err);
    if (st == RF_OK) st = rf_text_queue_planned(&run, err);
    if (st == RF_OK) st = rf_text_wait(s, err);
    rf_free(lists);
    return st;
}

/* Shapes are checked before anything is queued. State is cleared: a row that was never written may be read under a
 * weight of 0. A device then chooses algorithms for the passes that will surely come: one row, a block, and the
 * longest. */
static rf_status plan(rf_text_session *s, rf_error *err) {
    static const rf_pass_layers kinds[] = {RF_PASS_SAME, RF_PASS_DRIFT, RF_PASS_VERIFY};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (kinds[i] == RF_PASS_DRIFT && !s->options.keep_inputs) continue;
        if (kinds[i] == RF_PASS_VERIFY && !s->options.keep_increments) continue;
        rf_text_run run = widest_run(s);
        run.shape.layers = (int32_t)kinds[i];
        run.shape.external &= kinds[i] == RF_PASS_SAME;
        run.shape.fresh = run.shape.external;
        if (kinds[i] == RF_PASS_VERIFY) {
            run.shape.segment = run.shape.chosen = run.shape.rows;
            run.shape.compares = 1;
        }
        run.at = rf_text_control_layout(s, &run.shape);
        RF_TRY(rf_text_queue(&run, err));
    }
    s->busy = true;
    RF_TRY(rf_stream_zero(s->stream, s->memory, s->state_bytes, err));
    if (rf_backend_get_kind(s->backend) == RF_BACKEND_CPU) return rf_text_wait(s, err);
    int32_t sizes[3] = {1, s->model->desc.block, s->options.max_rows};
    for (int i = 0; i < 3; i++) {
        if (sizes[i] < 1 || sizes[i] > s->options.max_rows) continue;
        int32_t heads = i == 1 ? sizes[i] : 1;
        RF_TRY(warm_up(s, sizes[i], heads < s->options.max_head_rows ? heads : s->options.max_head_rows, err));
    }
    return rf_text_wait(s, err);
}

static rf_status save_tuning(rf_text_session *s, rf_error *err) {
    if (s->options.gemm_tuning == NULL || !rf_gemm_tuning_changed(s->stream)) return RF_OK;
    return rf_gemm_tuning_save(s->stream, s->options.gemm_tuning, err);
}

rf_status rf_text_session_create(rf_text_session **out, const rf_text_model *model,
                                 const rf_text_session_options *options, rf_error *err) {
    const rf_text_desc *d = &model->desc;
    rf_text_session_options o = *options;
    *out = NULL;
    RF_TRY(check_options(model, &o, err));
    rf_text_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a text session");
    s->model = model;
    s->backend = model->backend;
    s->ops = rf_ops_for(model->backend);
    s->options = o;
    s->cache_rows = (int64_t)o.capacity + 1;
    s->q_cols = (int64_t)d->num_q_heads * d->head_dim;
    s->kv_cols = (int64_t)d->num_kv_heads * d->head_dim;
    s->expanded_at = -1;
    rf_status st = rf_stream_create(&s->stream, model->backend, err);
    if (st == RF_OK) st = rf_gemm_set_tuning(s->stream, o.tune_gemm, err);
    if (st == RF_OK && o.gemm_tuning) st = rf_gemm_tuning_load(s->stream, o.gemm_tuning, err);
    if (st == RF_OK) st = plan_head(s, err);
    if (st == RF_OK) {
        s->control_words = most_control_words(s);
        s->b.attn_workspace_bytes = attention_workspace(s);
        s->b.reduce_workspace_bytes = o.keep_inputs ? 256 * 4 * sizeof(float) : 0; /* one group */
        st = allocate(s, err);
    }
    if (st == RF_OK) st = plan(s, err);
    if (st == RF_OK) st = save_tuning(s, err);
    if (st == RF_OK) {
        rf_stream_set_phase(s->stream, RF_PHASE_RUN);
        *out = s;
    } else {
        rf_text_session_destroy(s);
    }
    return st;
}

void rf_text_session_destroy(rf_text_session *s) {
    if (s == NULL) return;
    if (s->stream) {
        rf_stream_synchronize(s->stream, NULL);
        if (s->memory) save_tuning(s, NULL); /* shapes that were met later */
    }
    for (int i = 0; i < s->num_buckets; i++) rf_graph_destroy(s->buckets[i].graph);
    rf_free(s->place);
    rf_free(s->order);
    rf_free(s->visible);
    rf_free(s->drift);
    rf_free(s->slot_filled);
    rf_free(s->slot_taken);
    rf_backend_free_pinned(s->backend, s->staged);
    rf_backend_free_pinned(s->backend, s->host_stats);
    rf_backend_free_pinned(s->backend, s->host_sums);
    rf_backend_free_pinned(s->backend, s->host_tracked);
    rf_backend_free_pinned(s->backend, s->host_logits);
    rf_backend_free(s->backend, s->logits);
    rf_backend_free(s->backend, s->memory);
    rf_stream_destroy(s->stream);
    rf_free(s);
}

/* --- what the last pass left -----------------------------------------------------------------------------------------
 */

static rf_status check_read(const rf_text_session *s, const char *what, rf_error *err) {
    return s->has_pass ? RF_OK
                       : rf_fail(err, RF_ERR_STATE, "%s of a session whose last pass failed or never ran", what);
}

/* Where entry e of the caller's [batch][num_head_rows] stands: both of a guided pair at the unconditional row's place.
 */
static int64_t result_at(const rf_text_session *s, int64_t e) {
    int64_t per_pair = s->has_cfg ? 2 * (int64_t)s->num_head_rows : 0;
    if (per_pair == 0) return e;
    return e / per_pair * s->num_head_rows + e % s->num_head_rows;
}

rf_status rf_text_session_read_stats(rf_text_session *s, rf_token_stats *stats, rf_error *err) {
    RF_TRY(check_read(s, "statistics", err));
    RF_TRY(rf_text_wait(s, err));
    for (int64_t e = 0; e < (int64_t)s->num_head_rows * s->options.batch; e++)
        stats[e] = s->host_stats[result_at(s, e)];
    return RF_OK;
}

rf_status rf_text_session_read_logits(rf_text_session *s, int32_t row, float *logits, rf_error *err) {
    RF_TRY(check_read(s, "logits", err));
    int64_t num = (int64_t)s->num_head_rows * s->options.batch, vocab = s->model->desc.vocab;
    if (s->num_logit_rows == 0) return rf_fail(err, RF_ERR_STATE, "logits of a pass that did not keep them");
    if (row >= num) return rf_fail(err, RF_ERR_ARGUMENT, "logits of head row %d of %lld", row, (long long)num);
    RF_TRY(rf_text_wait(s, err));
    size_t bytes = (size_t)vocab * sizeof(float);
    if (row >= 0) {
        memcpy(logits, s->host_logits + result_at(s, row) * vocab, bytes);
        return RF_OK;
    }
    for (int64_t e = 0; e < num; e++) memcpy(logits + e * vocab, s->host_logits + result_at(s, e) * vocab, bytes);
    return RF_OK;
}

rf_status rf_text_session_read_drift(rf_text_session *s, int32_t *tracked, float *drift, int32_t *expanded_at,
                                     rf_error *err) {
    RF_TRY(check_read(s, "drift", err));
    if (!s->was_drift) return rf_fail(err, RF_ERR_STATE, "drift of a pass that did not look for it");
    RF_TRY(rf_text_wait(s, err));
    for (int l = 0; l < s->model->desc.num_layers; l++) {
        if (drift) drift[l] = s->drift[l];
        if (!tracked) continue;
        int32_t key = s->has_window ? s->host_tracked[l] : -1;
        tracked[l] = key >= 0 && s->was_listed ? s->visible[key] : key;
    }
    if (expanded_at) *expanded_at = s->expanded_at;
    return RF_OK;
}

/* Rows of the device as host floats. */
static rf_status read_rows(rf_text_session *s, const void *device, int64_t num, float *out, rf_error *err) {
    void *host = rf_alloc((size_t)num * rf_dtype_bytes(s->model->dtype));
    if (host == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for rows of a session");
    rf_status st = rf_stream_download(s->stream, host, device, (size_t)num * rf_dtype_bytes(s->model->dtype), err);
    s->busy = true;
    if (st == RF_OK) st = rf_text_wait(s, err);
    if (st == RF_OK) rf_convert(out, RF_DTYPE_F32, host, s->model->dtype, (size_t)num);
    rf_free(host);
    return st;
}

rf_status rf_text_session_read_hidden(rf_text_session *s, float *hidden, rf_error *err) {
    RF_TRY(check_read(s, "hidden states", err));
    int64_t cols = s->model->desc.hidden, num = (int64_t)s->num_head_rows * s->options.batch;
    RF_TRY(read_rows(s, s->b.head_h, num / (s->has_cfg ? 2 : 1) * cols, hidden, err));
    for (int64_t e = num - 1; s->has_cfg && e >= 0; e--) /* backwards: a row only moves up */
        memmove(hidden + e * cols, hidden + result_at(s, e) * cols, (size_t)cols * sizeof *hidden);
    return RF_OK;
}

rf_status rf_text_session_read_kv(rf_text_session *s, int layer, int sequence, int32_t position, float *k, float *v,
                                  rf_error *err) {
    if (layer < 0 || layer >= s->model->desc.num_layers || sequence < 0 || sequence >= s->options.batch ||
        position < 0 || position >= s->options.capacity)
        return rf_fail(err, RF_ERR_ARGUMENT, "no cached row at layer %d, sequence %d, position %d", layer, sequence,
                       position);
    size_t at = (size_t)((sequence * s->cache_rows + position) * s->kv_cols) * rf_dtype_bytes(s->model->dtype);
    if (k) RF_TRY(read_rows(s, rf_text_keys(s, layer) + at, s->kv_cols, k, err));
    return v ? read_rows(s, rf_text_values(s, layer) + at, s->kv_cols, v, err) : RF_OK;
}

rf_text_session_info rf_text_session_get_info(const rf_text_session *s) {
    int layers = s->model->desc.num_layers, graphs = 0;
    for (int i = 0; i < s->num_buckets; i++) graphs += s->buckets[i].graph != NULL;
    size_t logits = (size_t)s->logit_rows * (size_t)s->model->desc.vocab * sizeof(float);
    return (rf_text_session_info){.num_passes = s->num_passes,
                                  .row_passes = (s->row_layers + layers / 2) / layers,
                                  .key_reads = (s->key_layers + layers / 2) / layers,
                                  .head_rows = s->head_rows,
                                  .cache_bytes = s->cache_bytes,
                                  .plane_bytes = s->plane_bytes,
                                  .arena_bytes = s->memory_bytes + logits,
                                  .graph_nodes = s->graph_nodes,
                                  .num_graphs = graphs};
}

void rf_text_session_reset_counts(rf_text_session *s) {
    s->num_passes = s->row_layers = s->key_layers = s->head_rows = 0;
}
