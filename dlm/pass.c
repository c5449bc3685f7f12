/* dlm/pass.c - a pass: its checks, the bucket it falls into, the control block that carries its lists, and its launch.
 */
#include <string.h>

#include "core/memory.h"
#include "dlm/forward_internal.h"

rf_text_pass rf_text_pass_default(void) {
    rf_text_pass pass = {.mask = RF_MASK_NONE, .drift = {.force_from = -1}};
    return pass;
}

/* --- buckets ---------------------------------------------------------------------------------------------------------
 */

static bool pads(const rf_text_session *s) {
    return rf_backend_get_kind(s->backend) != RF_BACKEND_CPU;
}

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

int32_t rf_text_bucket_rows(const rf_text_session *s, int32_t rows) {
    static const int32_t sizes[] = {1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024};
    if (!pads(s)) return rows;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (rows <= sizes[i]) return min32(sizes[i], s->options.max_rows);
    return min32((rows + 511) / 512 * 512, s->options.max_rows);
}

int32_t rf_text_bucket_keys(const rf_text_session *s, int32_t keys) {
    if (!pads(s)) return keys < 1 ? 1 : keys;
    int32_t size = 256;
    while (size < keys && size < s->options.capacity) size *= 2;
    return min32(size, s->options.capacity);
}

int32_t rf_text_bucket_head(const rf_text_session *s, int32_t rows) {
    if (!pads(s) || rows <= 1) return rows;
    for (int32_t size = 8; size <= 32; size *= 2)
        if (rows <= size) return size;
    return (rows + 63) / 64 * 64;
}

/* --- what rows see ---------------------------------------------------------------------------------------------------
 */

/* The first key position that a row at `position` does not see. */
static int64_t mask_limit(const rf_text_pass *pass, int32_t position) {
    switch (pass->mask) {
    case RF_MASK_CAUSAL: return (int64_t)position + 1;
    case RF_MASK_BLOCK_CAUSAL: return ((int64_t)position / pass->mask_block + 1) * pass->mask_block;
    case RF_MASK_NONE: break;
    }
    return INT64_MAX;
}

/* Visible keys of sequence b below a position. */
static int32_t keys_below(const rf_text_pass *pass, int b, int64_t limit) {
    if (pass->visible == NULL) return limit < pass->visible_end[b] ? (int32_t)limit : pass->visible_end[b];
    int32_t low = 0, high = pass->num_visible;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (pass->visible[middle] < limit)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

int64_t rf_text_keys_seen(const rf_text_pass *pass, int b, int32_t position) {
    return keys_below(pass, b, mask_limit(pass, position));
}

/* Rows of a sequence before its padding. */
static int32_t num_real(const int32_t *rows, int32_t num) {
    while (num > 0 && rows[num - 1] < 0) num--;
    return num;
}

/* A mask that hides the same keys from every row of a sequence is a shorter list of keys. */
static bool needs_mask(const rf_text_session *s, const rf_text_pass *pass) {
    if (pass->mask == RF_MASK_NONE) return false;
    for (int b = 0; b < s->options.batch; b++) {
        const int32_t *rows = pass->rows + (int64_t)b * pass->num_rows;
        int32_t num = num_real(rows, pass->num_rows);
        if (num > 0 && rf_text_keys_seen(pass, b, rows[0]) != rf_text_keys_seen(pass, b, rows[num - 1])) return true;
    }
    return false;
}

static int32_t keys_of(const rf_text_pass *pass, int b, bool masked) {
    const int32_t *rows = pass->rows + (int64_t)b * pass->num_rows;
    int32_t num = num_real(rows, pass->num_rows);
    if (masked || num == 0) return keys_below(pass, b, INT64_MAX);
    return (int32_t)rf_text_keys_seen(pass, b, rows[0]);
}

/* --- checks ----------------------------------------------------------------------------------------------------------
 */

static rf_status check_rows(const rf_text_session *s, const rf_text_pass *pass, int b, rf_error *err) {
    const int32_t *rows = pass->rows + (int64_t)b * pass->num_rows,
                  *tokens = pass->tokens + (int64_t)b * pass->num_rows;
    int32_t num = num_real(rows, pass->num_rows);
    for (int32_t i = 0; i < num; i++) {
        if (rows[i] < 0 || rows[i] >= s->options.capacity || (i > 0 && rows[i] <= rows[i - 1]))
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "row %d of sequence %d is position %d, expected ascending positions below the capacity, %d",
                           i, b, rows[i], s->options.capacity);
        if (tokens[i] < 0 || tokens[i] >= s->model->desc.vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "token %d at position %d of sequence %d, expected 0..%lld", tokens[i],
                           rows[i], b, (long long)s->model->desc.vocab - 1);
    }
    for (int32_t i = 0; i < pass->num_head_rows; i++) {
        int32_t row = pass->head_rows[(int64_t)b * pass->num_head_rows + i];
        if (row < -1 || row >= num)
            return rf_fail(err, RF_ERR_ARGUMENT, "head row %d of sequence %d is row %d of a pass of %d", i, b, row,
                           num);
        if (pass->head_refs != NULL && row >= 0) {
            int32_t ref = pass->head_refs[(int64_t)b * pass->num_head_rows + i];
            if (ref < 0 || ref >= s->model->desc.vocab)
                return rf_fail(err, RF_ERR_ARGUMENT, "reference token %d of head row %d, expected 0..%lld", ref, i,
                               (long long)s->model->desc.vocab - 1);
        }
    }
    if (pass->visible == NULL && (pass->visible_end[b] < 0 || pass->visible_end[b] > s->options.capacity))
        return rf_fail(err, RF_ERR_ARGUMENT, "visible_end %d of sequence %d, expected 0..%d", pass->visible_end[b], b,
                       s->options.capacity);
    if (num > 0 && pass->mask != RF_MASK_NONE && rows[num - 1] - rows[0] != num - 1 && needs_mask(s, pass))
        return rf_fail(err, RF_ERR_ARGUMENT, "rows of sequence %d have gaps under a mask", b);
    return RF_OK;
}

static rf_status check_head(const rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    if (pass->num_head_rows < 0 || pass->num_head_rows > s->options.max_head_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d head rows in a session planned for %d", pass->num_head_rows,
                       s->options.max_head_rows);
    if (pass->num_head_rows > 0 && pass->head_rows == NULL)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d head rows without a list", pass->num_head_rows);
    if (pass->num_bans < 0 || pass->num_bans > 8)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d banned tokens, expected 0..8", pass->num_bans);
    if (!(pass->temperature >= 0) || pass->temperature > 1e6f)
        return rf_fail(err, RF_ERR_ARGUMENT, "temperature %g, expected 0 or more", (double)pass->temperature);
    if (!(pass->logit_scale >= 0) || pass->logit_scale > 1e6f)
        return rf_fail(err, RF_ERR_ARGUMENT, "logit scale %g, expected 0 (as 1) or more", (double)pass->logit_scale);
    if (pass->rank_of_ref && pass->head_refs == NULL)
        return rf_fail(err, RF_ERR_ARGUMENT, "the rank of a reference token without reference tokens");
    if (pass->cfg != pass->cfg || (pass->cfg != 0 && s->options.batch % 2 != 0))
        return rf_fail(err, RF_ERR_ARGUMENT, "guidance of %g with a batch of %d, expected pairs", (double)pass->cfg,
                       s->options.batch);
    int64_t kept = (int64_t)pass->num_head_rows * s->options.batch / (pass->cfg != 0 ? 2 : 1);
    if (pass->keep_logits && pads(s) && kept > RF_TEXT_CUDA_LOGITS)
        return rf_fail(err, RF_ERR_ARGUMENT, "logits of %lld rows, at most %d can be kept on %s", (long long)kept,
                       RF_TEXT_CUDA_LOGITS, rf_backend_name(s->backend));
    return RF_OK;
}

static rf_status check_pass(const rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    if (pass->num_rows < 1 || pass->num_rows > s->options.max_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d rows in a session planned for %d", pass->num_rows,
                       s->options.max_rows);
    if (pass->rows == NULL || pass->tokens == NULL || (pass->visible == NULL && pass->visible_end == NULL))
        return rf_fail(err, RF_ERR_ARGUMENT, "a pass needs rows, tokens and what is visible");
    if (pass->visible != NULL) {
        if (s->options.batch != 1)
            return rf_fail(err, RF_ERR_UNSUPPORTED, "a list of visible rows with a batch of %d, expected 1",
                           s->options.batch);
        if (pass->num_visible < 1 || pass->num_visible > s->options.capacity)
            return rf_fail(err, RF_ERR_ARGUMENT, "%d visible rows, expected 1..%d", pass->num_visible,
                           s->options.capacity);
        for (int32_t i = 0; i < pass->num_visible; i++)
            if (pass->visible[i] < 0 || pass->visible[i] >= s->options.capacity ||
                (i > 0 && pass->visible[i] <= pass->visible[i - 1]))
                return rf_fail(err, RF_ERR_ARGUMENT,
                               "visible row %d is position %d, expected ascending positions below the capacity, %d", i,
                               pass->visible[i], s->options.capacity);
    }
    if (pass->mask == RF_MASK_BLOCK_CAUSAL && pass->mask_block < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "mask blocks of %d rows, expected at least 1", pass->mask_block);
    RF_TRY(check_head(s, pass, err));
    for (int b = 0; b < s->options.batch; b++) RF_TRY(check_rows(s, pass, b, err));
    bool special = pass->external != RF_EXTERNAL_NONE || pass->layers != RF_PASS_SAME;
    if (!special) return RF_OK;
    if (s->options.batch != 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "layer rules and attention reuse work on one sequence, not %d",
                       s->options.batch);
    if (num_real(pass->rows, pass->num_rows) != pass->num_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "padding rows in a pass with a layer rule or attention reuse");
    if (needs_mask(s, pass) || (pass->layers == RF_PASS_DRIFT && pass->mask != RF_MASK_NONE))
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "a mask between the rows of a pass with a layer rule or attention reuse");
    if (pass->external != RF_EXTERNAL_NONE && pass->layers != RF_PASS_SAME)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention reuse together with a layer rule");
    if (pass->external != RF_EXTERNAL_NONE) return rf_text_external_check(s, pass, err);
    return pass->layers == RF_PASS_DRIFT ? rf_text_drift_check(s, pass, err) : rf_text_verify_check(s, pass, err);
}

/* --- shape and control block -----------------------------------------------------------------------------------------
 */

rf_text_run rf_text_make_run(rf_text_session *s, const rf_text_pass *pass, const rf_text_rows *rows) {
    rf_text_run run = {.s = s, .stream = s->stream};
    rf_text_shape *shape = &run.shape;
    memset(shape, 0, sizeof *shape);
    bool masked = needs_mask(s, pass), exact = pass->layers == RF_PASS_VERIFY;
    shape->rows = exact ? rows->num_rows : rf_text_bucket_rows(s, rows->num_rows);
    int32_t keys = 0;
    for (int b = 0; b < s->options.batch; b++) {
        int32_t of_sequence = keys_of(pass, b, masked);
        if (of_sequence > keys) keys = of_sequence;
    }
    shape->keys = rf_text_bucket_keys(s, keys);
    shape->listed = pass->visible != NULL;
    shape->mask = (int32_t)(masked ? pass->mask : RF_MASK_NONE);
    shape->mask_block = masked && pass->mask == RF_MASK_BLOCK_CAUSAL ? pass->mask_block : 0;
    shape->end_layer = s->model->desc.num_layers;
    shape->layers = (int32_t)pass->layers;

    int32_t heads = pass->num_head_rows * s->options.batch;
    shape->head_rows = pass->cfg != 0 ? 2 * rf_text_bucket_head(s, heads / 2) : rf_text_bucket_head(s, heads);
    if (heads > 0) {
        shape->cfg = pass->cfg;
        shape->temperature = pass->temperature;
        shape->logit_scale = pass->logit_scale == 0 ? 1.0f : pass->logit_scale;
        shape->seed = pass->temperature > 0 ? pass->seed : 0;
        shape->has_refs = pass->head_refs != NULL;
        shape->rank_of_ref = pass->rank_of_ref;
        shape->round_logits = pass->round_logits;
        shape->num_bans = pass->num_bans;
        shape->keep_logits = pass->keep_logits;
    }
    if (pass->external != RF_EXTERNAL_NONE) rf_text_external_shape(s, pass, shape);
    run.rows = (int64_t)s->options.batch * shape->rows;
    run.at = rf_text_control_layout(s, shape);
    return run;
}

static size_t take(size_t *words, int64_t count) {
    size_t at = *words;
    *words += ((size_t)count + 3) / 4 * 4;
    return at;
}

rf_text_control rf_text_control_layout(const rf_text_session *s, const rf_text_shape *shape) {
    rf_text_control at;
    int64_t rows = (int64_t)s->options.batch * shape->rows, batch = s->options.batch;
    size_t *words = &at.words;
    bool drift = shape->layers == RF_PASS_DRIFT, verify = shape->layers == RF_PASS_VERIFY;
    *words = 0;
    at.tokens = take(words, rows);
    at.positions = take(words, rows);
    at.kv_lens = take(words, batch);
    at.q_offsets = take(words, batch);
    at.step = take(words, 1);
    at.visible = take(words, shape->listed ? shape->keys : 0);
    at.head_rows = take(words, shape->head_rows);
    at.head_keys = take(words, shape->head_rows);
    at.head_refs = take(words, shape->has_refs ? shape->head_rows : 0);
    at.bans = take(words, shape->num_bans);
    at.fresh_rows = take(words, shape->fresh);
    at.fresh_slots = take(words, shape->fresh);
    at.slots = take(words, shape->external ? shape->rows : 0);
    at.outside = take(words, shape->outside_listed ? shape->outside_keys : 0);
    at.outside_len = take(words, 1);
    at.inside = take(words, shape->inside_keys);
    at.inside_len = take(words, 1);
    at.tracked = take(words, drift ? s->model->desc.num_layers : 0);
    at.window = take(words, shape->window);
    at.allowed = take(words, drift ? (shape->keys + 3) / 4 : 0);
    at.pick = take(words, verify ? rows : 0);
    at.pick_positions = take(words, verify ? rows : 0);
    at.iota = take(words, verify ? rows : 0);
    return at;
}

static void fill_rows(const rf_text_run *run, const rf_text_rows *rows, int32_t *host) {
    const rf_text_session *s = run->s;
    int32_t *tokens = host + run->at.tokens, *positions = host + run->at.positions;
    for (int b = 0; b < s->options.batch; b++) {
        const int64_t from = (int64_t)b * rows->num_rows;
        for (int32_t i = 0; i < run->shape.rows; i++) {
            int64_t to = (int64_t)b * run->shape.rows + i;
            int64_t row = i < rows->num_rows ? from + (rows->order ? rows->order[i] : i) : -1;
            bool real = row >= 0 && rows->rows[row] >= 0;
            tokens[to] = real && rows->tokens ? rows->tokens[row] : -1;
            positions[to] = real ? rows->rows[row] : s->options.capacity;
        }
    }
}

int64_t rf_text_head_at(bool guided, int64_t num, int32_t per_sequence, int64_t e) {
    int64_t b = e / per_sequence, i = e % per_sequence;
    return guided ? (b % 2) * (num / 2) + b / 2 * per_sequence + i : e;
}

static void fill_head(const rf_text_run *run, const rf_text_pass *pass, const rf_text_rows *rows, int32_t *host) {
    const rf_text_session *s = run->s;
    int32_t *list = host + run->at.head_rows, *keys = host + run->at.head_keys, *refs = host + run->at.head_refs;
    memset(list, 0, (size_t)run->shape.head_rows * sizeof *list);
    memset(keys, 0, (size_t)run->shape.head_rows * sizeof *keys);
    if (run->shape.has_refs) memset(refs, 0, (size_t)run->shape.head_rows * sizeof *refs);
    int64_t num = (int64_t)s->options.batch * pass->num_head_rows;
    for (int64_t e = 0; e < num; e++) {
        int64_t b = e / pass->num_head_rows,
                to = rf_text_head_at(pass->cfg != 0, run->shape.head_rows, pass->num_head_rows, e);
        int32_t row = pass->head_rows[e];
        if (row < 0) continue;
        list[to] = rows->place ? rows->place[row] : (int32_t)(b * run->shape.rows + row);
        keys[to] = pass->head_keys ? pass->head_keys[e] : pass->rows[b * pass->num_rows + row];
        if (run->shape.has_refs) refs[to] = pass->head_refs[e];
    }
    memcpy(host + run->at.bans, pass->bans, (size_t)run->shape.num_bans * sizeof(int32_t));
}

static void fill_keys(const rf_text_run *run, const rf_text_pass *pass, int32_t *host) {
    const rf_text_session *s = run->s;
    bool masked = run->shape.mask != RF_MASK_NONE;
    for (int b = 0; b < s->options.batch; b++) {
        int32_t first = pass->rows[(int64_t)b * pass->num_rows];
        host[run->at.kv_lens + (size_t)b] = keys_of(pass, b, masked);
        host[run->at.q_offsets + (size_t)b] = first < 0 ? 0 : first;
    }
    if (!run->shape.listed) return;
    int32_t *visible = host + run->at.visible, num = host[run->at.kv_lens];
    memcpy(visible, pass->visible, (size_t)num * sizeof *visible);
    for (int32_t j = num; j < run->shape.keys; j++) visible[j] = s->options.capacity; /* past kv_lens: the dump row */
}

rf_status rf_text_upload(const rf_text_run *run, const rf_text_pass *pass, const rf_text_rows *rows, rf_error *err) {
    rf_text_session *s = run->s;
    if (run->at.words > s->control_words)
        return rf_fail(err, RF_ERR_WORKSPACE, "a pass needs %zu control words, %zu were planned", run->at.words,
                       s->control_words);
    if (s->num_staged == RF_TEXT_STAGED) RF_TRY(rf_text_wait(s, err));
    int32_t *host = s->staged + (size_t)s->num_staged++ * s->control_words;
    fill_rows(run, rows, host);
    fill_keys(run, pass, host);
    fill_head(run, pass, rows, host);
    host[run->at.step] = pass->step;
    if (run->shape.external) rf_text_external_fill(run, pass, host);
    if (run->shape.layers == RF_PASS_DRIFT) rf_text_drift_fill(run, pass, rows, host);
    if (run->shape.layers == RF_PASS_VERIFY) rf_text_verify_fill(run, host);
    s->busy = true;
    return rf_stream_upload(s->stream, s->b.control, host, run->at.words * sizeof(int32_t), err);
}

/* --- launch ----------------------------------------------------------------------------------------------------------
 */

rf_status rf_text_queue_planned(rf_text_run *run, rf_error *err) {
    rf_phase phase = rf_stream_get_phase(run->stream);
    rf_stream_set_phase(run->stream, RF_PHASE_PLAN);
    rf_status st = rf_text_queue(run, err);
    rf_stream_set_phase(run->stream, phase);
    return st;
}

static rf_text_bucket *find_bucket(rf_text_session *s, const rf_text_shape *shape) {
    for (int i = 0; i < s->num_buckets; i++)
        if (memcmp(&s->buckets[i].shape, shape, sizeof *shape) == 0) return &s->buckets[i];
    return NULL;
}

/* A free place, or that of the bucket that was not used for longest. */
static rf_status new_bucket(rf_text_session *s, rf_text_bucket **out, rf_error *err) {
    if (s->num_buckets < RF_TEXT_MAX_GRAPHS) {
        *out = &s->buckets[s->num_buckets++];
        return RF_OK;
    }
    rf_text_bucket *oldest = &s->buckets[0];
    for (int i = 1; i < s->num_buckets; i++)
        if (s->buckets[i].last_used < oldest->last_used) oldest = &s->buckets[i];
    if (oldest->graph != NULL) RF_TRY(rf_text_wait(s, err)); /* it may be running */
    rf_graph_destroy(oldest->graph);
    *out = oldest;
    return RF_OK;
}

static rf_status capture(rf_text_run *run, rf_graph **out, rf_error *err) {
    RF_TRY(rf_graph_begin(run->stream, err));
    rf_status st = rf_text_queue(run, err);
    rf_status ended = rf_graph_end(out, run->stream, st == RF_OK ? err : NULL);
    return st == RF_OK ? ended : st;
}

rf_status rf_text_launch(rf_text_run *run, rf_error *err) {
    rf_text_session *s = run->s;
    s->graph_nodes = 0;
    if (!rf_backend_has_graphs(s->backend)) return rf_text_queue(run, err);
    rf_text_bucket *bucket = find_bucket(s, &run->shape);
    if (bucket != NULL) {
        bucket->last_used = ++s->use_count;
        if (bucket->graph == NULL) return rf_text_queue(run, err);
        s->graph_nodes = rf_graph_num_nodes(bucket->graph);
        return rf_graph_launch(bucket->graph, run->stream, err);
    }
    RF_TRY(rf_text_queue_planned(run, err));
    RF_TRY(new_bucket(s, &bucket, err));
    *bucket = (rf_text_bucket){.shape = run->shape, .last_used = ++s->use_count};
    if (!s->options.use_graphs) return RF_OK;
    rf_status st = capture(run, &bucket->graph, err);
    if (st == RF_OK) s->graph_nodes = rf_graph_num_nodes(bucket->graph);
    return st;
}

/* --- the pass --------------------------------------------------------------------------------------------------------
 */

void rf_text_count(rf_text_session *s, const rf_text_pass *pass, const rf_text_rows *rows, int64_t num_layers) {
    for (int b = 0; b < s->options.batch; b++) {
        const int32_t *list = rows->rows + (int64_t)b * rows->num_rows;
        int32_t num = num_real(list, rows->num_rows);
        s->row_layers += num * num_layers;
        for (int32_t i = 0; i < num; i++) s->key_layers += rf_text_keys_seen(pass, b, list[i]) * num_layers;
    }
}

static rf_status forward_same(rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    rf_text_rows rows = {.num_rows = pass->num_rows, .rows = pass->rows, .tokens = pass->tokens};
    rf_text_run run = rf_text_make_run(s, pass, &rows);
    RF_TRY(rf_text_upload(&run, pass, &rows, err));
    RF_TRY(rf_text_launch(&run, err));
    if (pass->external == RF_EXTERNAL_NONE)
        rf_text_count(s, pass, &rows, s->model->desc.num_layers);
    else
        rf_text_external_done(s, pass);
    return rf_text_queue_results(s, pass, err);
}

/* Room for the logits of a pass: all that can be kept on CUDA (captured passes know the address), what is asked for on
 * the host. */
static rf_status take_logits(rf_text_session *s, int32_t rows, rf_error *err) {
    if (rows <= s->logit_rows) return RF_OK;
    if (pads(s)) rows = RF_TEXT_CUDA_LOGITS;
    RF_TRY(rf_text_wait(s, err));
    rf_backend_free(s->backend, s->logits);
    rf_backend_free_pinned(s->backend, s->host_logits);
    s->logits = s->host_logits = NULL;
    s->logit_rows = 0;
    size_t bytes = (size_t)rows * (size_t)s->model->desc.vocab * sizeof(float);
    RF_TRY(rf_backend_alloc(s->backend, (void **)&s->logits, bytes, err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->host_logits, bytes, err));
    s->logit_rows = rows;
    return RF_OK;
}

rf_status rf_text_queue_results(rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    size_t num = (size_t)pass->num_head_rows * (size_t)s->options.batch / (pass->cfg != 0 ? 2 : 1);
    if (num == 0) return RF_OK;
    RF_TRY(rf_stream_download(s->stream, s->host_stats, s->b.stats, num * sizeof *s->host_stats, err));
    if (!pass->keep_logits) return RF_OK;
    return rf_stream_download(s->stream, s->host_logits, s->logits, num * (size_t)s->model->desc.vocab * sizeof(float),
                              err);
}

rf_status rf_text_session_forward(rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    s->has_pass = false;
    if (s->options.layer_planes > 0)
        return rf_fail(err, RF_ERR_STATE, "a pass over all layers in a session that keeps the keys and values of %d",
                       s->options.layer_planes);
    RF_TRY(check_pass(s, pass, err));
    int32_t kept = pass->num_head_rows * s->options.batch / (pass->cfg != 0 ? 2 : 1);
    if (pass->keep_logits) RF_TRY(take_logits(s, rf_text_bucket_head(s, kept), err));
    s->was_drift = pass->layers == RF_PASS_DRIFT;
    s->expanded_at = -1;
    switch (pass->layers) {
    case RF_PASS_SAME: RF_TRY(forward_same(s, pass, err)); break;
    case RF_PASS_DRIFT: RF_TRY(rf_text_drift_forward(s, pass, err)); break;
    case RF_PASS_VERIFY: RF_TRY(rf_text_verify_forward(s, pass, err)); break;
    }
    s->num_passes++;
    for (int64_t e = 0; e < (int64_t)pass->num_head_rows * s->options.batch; e++)
        s->head_rows += pass->head_rows[e] >= 0;
    s->num_head_rows = pass->num_head_rows;
    s->has_cfg = pass->cfg != 0;
    s->num_logit_rows = pass->keep_logits ? kept : 0;
    s->has_pass = true;
    return RF_OK;
}
