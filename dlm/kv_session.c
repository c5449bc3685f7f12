/* dlm/kv_session.c - an autoregressive model under a cache budget: planning, prompts, results. */
#include "dlm/kv_session.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "caching/kv/sentences.h"
#include "core/arena.h"
#include "core/memory.h"
#include "dlm/kv_internal.h"

rf_kv_session_options rf_kv_session_options_default(void) {
    return (rf_kv_session_options){
        .ratio = 1.0, .batch = 1, .max_new = 128, .residual_dtype = RF_DTYPE_COUNT, .use_graphs = true};
}

double rf_kv_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

rf_status rf_kv_wait(rf_kv_session *s, rf_error *err) {
    s->stage->busy = true;
    return rf_text_wait(s->stage, err);
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

/* --- what can be run --------------------------------------------------------------------------------------------------- */

static rf_status check_rule(const rf_kv_rule *r, rf_error *err) {
    RF_TRY(rf_kv_rule_check(r, err));
    if (rf_kv_needs_step(r) & (RF_KV_NEED_EXPECTED | RF_KV_NEED_WO))
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "kv rule %s: expected attention and output weights are measured behind a prompt only",
                       r->method);
    return RF_OK;
}

/* What is packed stays, unless a rule ranks its tokens. */
static rf_status check_packed_budget(const rf_kv_rule *r, int32_t budget, double ratio, rf_error *err) {
    if (!rf_kv_packs(r) || rf_kv_packs_under_budget(r)) return RF_OK;
    if (budget > 0 || (ratio > 0.0 && ratio < 1.0))
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "kv rule %s keeps every token, in few bits: a budget of %d tokens, ratio %g is not for it",
                       r->method, (int)budget, ratio);
    return RF_OK;
}

static rf_status check_options(const rf_text_model *model, rf_kv_session_options *o, rf_error *err) {
    if (model->desc.attention != RF_TEXT_CAUSAL)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "a cache budget is for autoregressive models, %s is not one",
                       model->desc.family);
    if (o->batch < 1 || o->batch > 4096)
        return rf_fail(err, RF_ERR_ARGUMENT, "a batch of %d sequences, expected 1..4096", (int)o->batch);
    if (o->max_prompt < 1 || o->max_new < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "prompts of %d tokens and %d new ones, expected at least 1 each",
                       (int)o->max_prompt, (int)o->max_new);
    if (o->budget < 0 || !(o->ratio >= 0.0 && o->ratio <= 1.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "a budget of %d tokens, ratio %g: expected 0 or more, 0..1",
                       (int)o->budget, o->ratio);
    if (o->prefill_chunk < 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "prefill chunks of %d rows, expected 0 (as 1024) or more",
                       (int)o->prefill_chunk);
    bool external = o->rule.score == RF_KV_SCORE_ATTENTION && o->rule.queries == RF_KV_QUERIES_EXTERNAL;
    if (external && (o->num_external < 1 || o->external == NULL))
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "kv rule %s: its queries are those of a prompt of its own, expected at least 1 token of it",
                       o->rule.method);
    for (int32_t i = 0; external && i < o->num_external; i++)
        if (o->external[i] < 0 || o->external[i] >= model->desc.vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "external token %d is id %d, expected 0..%lld", (int)i,
                           (int)o->external[i], (long long)model->desc.vocab - 1);
    if (o->prefill_chunk == 0) o->prefill_chunk = 1024;
    if (o->prefill_chunk > o->max_prompt) o->prefill_chunk = o->max_prompt;
    RF_TRY(check_rule(&o->rule, err));
    return check_packed_budget(&o->rule, o->budget, o->ratio, err);
}

/* What a rule protects: no budget is smaller. */
static int32_t least_budget(const rf_kv_rule *r) {
    if (r->action == RF_KV_SELECT) return 1;
    int64_t least = (int64_t)r->sinks + (r->recents > 0 ? r->recents : 0) + (r->last ? 1 : 0);
    if (r->score == RF_KV_SCORE_ATTENTION && r->queries == RF_KV_QUERIES_WINDOW && !r->open_window) least += r->window;
    return least < 1 ? 1 : least > INT32_MAX ? INT32_MAX : (int32_t)least;
}

/* Tokens of a budget for a prompt of num: 0 = no limit. */
static int32_t resolve_budget(const rf_kv_rule *r, int32_t budget, double ratio, int32_t num) {
    if (r->score == RF_KV_SCORE_NONE || (rf_kv_packs(r) && !rf_kv_packs_under_budget(r))) return 0;
    if (budget > 0) return budget;
    if (r->action == RF_KV_SELECT && ratio <= 0.0) { /* the rule's own size */
        int64_t own = (int64_t)r->init + r->select + r->local;
        return own < INT32_MAX ? (int32_t)own : INT32_MAX;
    }
    if (ratio <= 0.0 || ratio >= 1.0) return 0;
    int32_t of_prompt = (int32_t)(ratio * (double)num), least = least_budget(r);
    return of_prompt > least ? of_prompt : least;
}

/* Does kv_evict make this rule's decisions while decoding? */
static bool maps_to_evict(const rf_kv_rule *r, rf_kv_evict_mode *mode) {
    bool uniform = r->alloc == RF_KV_ALLOC_UNIFORM && r->skip_layers == 0;
    bool ends = r->score == RF_KV_SCORE_POSITION && r->position == RF_KV_POSITION_CACHE; /* kv_slide.c */
    if (r->schedule != RF_KV_AT_STEP || r->action != RF_KV_DROP || !uniform ||
        (r->position != RF_KV_POSITION_ORIGINAL && !ends) || r->crush_share != 0.0 || r->redundancy != 0.0 ||
        r->sentence_penalty != 0.0)
        return false;
    if (r->score == RF_KV_SCORE_POSITION) {
        *mode = RF_KV_EVICT_AGE;
        return true;
    }
    if (r->score != RF_KV_SCORE_ATTENTION || r->value != RF_KV_VALUE_NONE || r->pool != RF_KV_POOL_NONE ||
        r->heads == RF_KV_HEADS_LIST)
        return false;
    if (r->heads == RF_KV_HEADS_NONE && r->group == RF_KV_OVER_MAX) return false;
    if (r->queries == RF_KV_QUERIES_LAST) {
        *mode = RF_KV_EVICT_LAST;
        return true;
    }
    *mode = RF_KV_EVICT_SUM;
    return r->queries == RF_KV_QUERIES_ALL && (r->reduce == RF_KV_REDUCE_SUM || r->reduce == RF_KV_REDUCE_DECAY);
}

/* --- planning ---------------------------------------------------------------------------------------------------------- */

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static bool drafts(const rf_kv_rule *r) {
    return r->score == RF_KV_SCORE_ATTENTION && r->queries == RF_KV_QUERIES_DRAFTED && r->drafts > 0;
}

/* Slots that a list has room for. */
static int64_t list_stride(const rf_kv_session *s) {
    const rf_kv_rule *r = &s->rule;
    int64_t more = drafts(r) && r->drafts > s->options.max_new ? r->drafts : s->options.max_new;
    int64_t most = min64((int64_t)s->options.max_prompt + more, s->pool_rows);
    if (r->score == RF_KV_SCORE_NONE || r->alloc != RF_KV_ALLOC_UNIFORM || r->skip_layers > 0 ||
        r->action == RF_KV_SHARE)
        return most;
    int64_t mean = s->pool_rows / ((int64_t)s->num_layers * s->num_kv_heads) + 1;
    return min64(most, mean);
}

/* What drafted queries are decoded behind: SnapKV with the rule's window and pool, once. */
static rf_kv_rule draft_rule(const rf_kv_rule *r) {
    rf_kv_rule snap = *r;
    snap.queries = RF_KV_QUERIES_WINDOW;
    snap.reduce = RF_KV_REDUCE_SUM;
    snap.value = RF_KV_VALUE_NONE;
    snap.alloc = RF_KV_ALLOC_UNIFORM;
    snap.action = RF_KV_DROP;
    snap.schedule = RF_KV_AT_PREFILL;
    snap.position = RF_KV_POSITION_ORIGINAL;
    snap.crush_share = snap.redundancy = snap.sentence_penalty = 0;
    snap.open_window = false;
    return snap;
}

static rf_head_stats_args head_args(const rf_kv_session *s, int64_t rows) {
    return (rf_head_stats_args){.dtype = s->model->dtype,
                                .rows = rows,
                                .cols = s->model->desc.hidden,
                                .vocab = s->model->desc.vocab,
                                .scale = 1.0f};
}

static size_t take_words(size_t *words, int64_t count) {
    size_t at = *words;
    *words += ((size_t)count + 3) / 4 * 4;
    return at;
}

static void plan_sizes(rf_kv_session *s) {
    int64_t layers = s->num_layers, batch = s->batch;
    s->at.words = 0;
    s->at.tokens = take_words(&s->at.words, batch);
    s->at.keys = take_words(&s->at.words, batch);
    s->at.steps = take_words(&s->at.words, batch);
    s->at.positions = take_words(&s->at.words, layers * batch);
    s->at.new_rows = take_words(&s->at.words, layers * s->units);
    s->at.slots = take_words(&s->at.words, s->on_device ? layers * s->units : 0);
    s->at.slot_positions = take_words(&s->at.words, s->on_device ? layers * s->units : 0);
    s->at.turns = take_words(&s->at.words, s->slides ? layers * s->units * s->rule.sinks : 0);
    s->at.turn_counts = take_words(&s->at.words, s->slides ? layers * s->units : 0);

    s->list_stride = s->options.max_prompt;
    if (s->stride > s->list_stride) s->list_stride = s->stride;
    s->stats_stride = s->list_stride;
    for (int64_t rows = 1; rows <= s->batch; rows++) {
        rf_head_stats_args args = head_args(s, rows);
        s->head_workspace_bytes = max_size(s->head_workspace_bytes, s->ops->head_stats_workspace(s->backend, &args));
        rf_attention_args attention = rf_kv_step_attention(s, 0, 0, (int)rows, s->stride);
        for (int64_t keys = 256;; keys *= 2) {
            attention.kv_len = min64(keys, s->stride);
            s->step.attn_workspace_bytes =
                max_size(s->step.attn_workspace_bytes, s->ops->attention_workspace(s->backend, &attention));
            if (keys >= s->stride) break;
        }
    }
    if (s->rule.action == RF_KV_COMPENSATE) {
        for (int rows = 1; rows <= s->batch; rows++) {
            rf_attention_args mean = rf_kv_mean_attention(s, 0, 0, rows);
            s->step.attn_workspace_bytes =
                max_size(s->step.attn_workspace_bytes, s->ops->attention_workspace(s->backend, &mean));
        }
    }
    s->workspace_bytes = rf_kv_measure_workspace(s);
}

static bool reads_in_order(const rf_kv_session *s) {
    return rf_kv_in_cache_order(s) || (s->step_needs & RF_KV_NEED_KV) != 0;
}

static rf_status take_measures(rf_kv_session *s, rf_arena *arena, rf_error *err) {
    unsigned needs = s->prefill_needs | s->step_needs | s->draft_needs;
    size_t q = (size_t)s->num_q_heads * (size_t)s->stats_stride, k = (size_t)s->num_kv_heads * (size_t)s->stats_stride;
    struct {
        float **slot;
        bool wanted;
        size_t count;
    } list[] = {
        {&s->measured.s1, needs & RF_KV_NEED_SUM, q},
        {&s->measured.s2, needs & RF_KV_NEED_SQUARES, q},
        {&s->measured.peak, needs & RF_KV_NEED_PEAK, q},
        {&s->measured.removal, needs & RF_KV_NEED_REMOVAL, q},
        {&s->measured.wo_norm, needs & RF_KV_NEED_WO, q},
        {&s->measured.expected, needs & RF_KV_NEED_EXPECTED, q},
        {&s->measured.key_norm, needs & RF_KV_NEED_KEY_NORM, k},
        {&s->measured.value_norm, needs & RF_KV_NEED_VALUE_NORM, k},
        {&s->measured.key_cosine, needs & RF_KV_NEED_KEY_COSINE, k},
        {&s->measured.entropy, needs & RF_KV_NEED_ENTROPY, (size_t)s->num_q_heads},
    };
    s->measure_floats = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        if (list[i].wanted) s->measure_floats += (list[i].count + 63) / 64 * 64;
    void *p = NULL;
    RF_TRY(rf_arena_take(arena, &p, "measurements", s->measure_floats, sizeof(float), err));
    s->measure_block = p;
    size_t at = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        *list[i].slot = list[i].wanted && p ? (float *)p + at : NULL;
        if (list[i].wanted) at += (list[i].count + 63) / 64 * 64;
    }
    return RF_OK;
}

static rf_status take_buffers(rf_kv_session *s, rf_arena *arena, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    const rf_kv_session_options *o = &s->options;
    size_t elem = rf_kv_elem(s), residual = rf_dtype_bytes(s->stage->options.residual_dtype);
    size_t dim = (size_t)s->head_dim, units = (size_t)s->units, layers = (size_t)s->num_layers,
           batch = (size_t)s->batch;
    size_t q_cols = (size_t)s->stage->q_cols, kv_cols = (size_t)s->stage->kv_cols, hidden = (size_t)d->hidden;
    size_t chunk = (size_t)s->stage->options.max_rows, stride = (size_t)s->stride, slots = units * stride;
    size_t extra = (size_t)s->extra_rows, ordered = reads_in_order(s), device = s->on_device;
    size_t slides = s->slides, sinks = slides * (size_t)s->rule.sinks;
    size_t raw = rf_kv_keeps_unturned(s), means = s->rule.action == RF_KV_COMPENSATE;
    size_t planes = (size_t)s->stage->options.layer_planes;
    size_t chunks = ((size_t)o->max_prompt + (size_t)o->prefill_chunk - 1) / (size_t)o->prefill_chunk + 1;
    size_t x_rows = (size_t)o->max_prompt + chunk +
                    (s->rule.block > 0 ? (size_t)rf_kv_blocks_rows(s)
                     : extra           ? extra + chunk
                                       : 0);
    size_t pool = batch * (size_t)s->pool_rows * dim;
    size_t positions = s->rule.block > 0            ? (size_t)o->max_prompt + extra
                       : rf_kv_rule_thins(&s->rule) ? (size_t)o->max_prompt
                                                    : 0;
    size_t in_order = (ordered * units + slides * (size_t)s->num_kv_heads) * stride * dim;
    struct {
        void *slot;
        const char *name;
        size_t count, elem_bytes;
    } list[] = {
        {&s->k_pool, "pool of keys", pool, elem},
        {&s->v_pool, "pool of values", pool, elem},
        {&s->rows, "lists of slots", layers * slots, sizeof(int32_t)},
        {&s->lens, "lengths of lists", layers * units, sizeof(int32_t)},
        {&s->positions, "positions of slots", device * layers * slots, sizeof(int32_t)},
        {&s->scores, "scores of slots", device * layers * slots, sizeof(float)},
        {&s->spare, "spare rows", device * layers * units, sizeof(int32_t)},
        {&s->budgets, "budgets of heads", device * layers * units, sizeof(int32_t)},
        {&s->k_read, "keys in order", in_order, elem},
        {&s->v_read, "values in order", in_order, elem},
        {&s->sink_k, "keys of sinks", layers * units * sinks * dim, elem},
        {&s->sink_v, "values of sinks", layers * units * sinks * dim, elem},
        {&s->sink_rows, "rows of sinks", layers * units * sinks, sizeof(int32_t)},
        {&s->iota_rows, "rows in order", ordered * slots, sizeof(int32_t)},
        {&s->iota_slots, "slots in order", ordered * (size_t)s->num_kv_heads * stride, sizeof(int32_t)},
        {&s->control, "control block", s->at.words, sizeof(int32_t)},
        {&s->prompt_control, "control blocks of a prompt", chunks * s->stage->control_words, sizeof(int32_t)},
        {&s->x_plane, "residual rows of a prompt", x_rows * hidden, residual},
        {&s->k_raw_plane, "unturned keys", raw * planes * (size_t)s->stage->cache_rows * kv_cols, elem},
        {&s->q_raw, "unturned queries", raw * chunk * q_cols, elem},
        {&s->draft_q, "drafted queries", drafts(&s->rule) ? layers * (size_t)s->rule.drafts * q_cols : 0, elem},
        {&s->copy_lists, "lists of rows to copy",
         3 * (size_t)s->num_kv_heads * (size_t)s->list_stride + (size_t)s->num_kv_heads, sizeof(int32_t)},
        {&s->lse, "log-sums", (size_t)s->num_q_heads * chunk, sizeof(float)},
        {&s->weights, "weights of queries", (size_t)o->max_prompt + extra, sizeof(float)},
        {&s->received, "positions of rows that go on", positions, sizeof(int32_t)},
        {&s->anchor, "anchors", (size_t)s->num_kv_heads * dim, sizeof(float)},
        {&s->workspace, "workspace of measurements", s->workspace_bytes, 1},
        {&s->mean_k, "mean keys", means * layers * units * dim, elem},
        {&s->mean_v, "mean values", means * layers * units * dim, elem},
        {&s->mean_out, "outputs of mean slots", means * batch * q_cols, elem},
        {&s->mean_logs, "counts of mean slots", means * layers * batch * (size_t)s->num_q_heads, sizeof(float)},
        {&s->mean_lse, "log-sums of mean slots", means * batch * (size_t)s->num_q_heads, sizeof(float)},
        {&s->step.x, "residual rows", batch * hidden, residual},
        {&s->step.h, "normed rows", batch * hidden, elem},
        {&s->step.wide, "qkv and MLP rows", batch * max_size(q_cols + 2 * kv_cols, 2 * (size_t)d->ffn), elem},
        {&s->step.act, "MLP activations", batch * (size_t)d->ffn, elem},
        {&s->step.q, "queries", batch * q_cols, elem},
        {&s->step.attn, "attention output", batch * q_cols, elem},
        {&s->step.y, "part output", batch * hidden, elem},
        {&s->step.k_new, "new keys", batch * kv_cols, elem},
        {&s->step.v_new, "new values", batch * kv_cols, elem},
        {&s->step.k_raw, "new unturned keys", raw * batch * kv_cols, elem},
        {&s->step.lse, "log-sums of a step", batch * (size_t)s->num_q_heads, sizeof(float)},
        {&s->step.attn_workspace, "attention workspace", s->step.attn_workspace_bytes, 1},
        {&s->head_h, "head rows", batch * hidden, elem},
        {&s->stats, "token statistics", batch, sizeof(rf_token_stats)},
        {&s->head_workspace, "head workspace", s->head_workspace_bytes, 1},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *p = NULL;
        RF_TRY(rf_arena_take(arena, &p, list[i].name, list[i].count, list[i].elem_bytes, err));
        memcpy(list[i].slot, &p, sizeof p);
    }
    s->pool_bytes = 2 * pool * elem;
    return take_measures(s, arena, err);
}

/* The host's mirrors of what is measured. */
static void mirror_measures(rf_kv_session *s) {
    float *const *from = (float *const *)&s->measured;
    float **to = (float **)&s->host_measured, **odd = (float **)&s->host_odd;
    for (size_t i = 0; i < sizeof s->measured / sizeof *from; i++) {
        to[i] = from[i] ? s->host_measure_block + (from[i] - s->measure_block) : NULL;
        odd[i] = from[i] && s->overlaps ? to[i] + s->measure_floats : NULL;
    }
}

static rf_status allocate_host(rf_kv_session *s, rf_error *err) {
    rf_backend *b = s->backend;
    size_t slots = (size_t)s->num_layers * (size_t)s->units * (size_t)s->stride;
    size_t lists = 3 * (size_t)s->num_kv_heads * (size_t)s->list_stride + (size_t)s->num_kv_heads;
    size_t units = (size_t)s->num_layers * (size_t)s->units;
    size_t queries = (size_t)s->options.max_prompt + (size_t)s->extra_rows;
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_control, s->at.words * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_rows, slots * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_lens, units * sizeof(int32_t), err));
    size_t halves = s->overlaps ? 2 : 1;
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_copy, halves * lists * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_weights, queries * sizeof(float), err));
    RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_stats, (size_t)s->batch * sizeof *s->host_stats, err));
    if (s->on_device) {
        RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_state, 2 * units * sizeof(int32_t), err));
        RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_scores, slots * sizeof(float), err));
    }
    if (s->host && !s->overlaps)
        s->host_measure_block = s->measure_block;
    else
        RF_TRY(rf_backend_alloc_pinned(b, (void **)&s->host_measure_block, halves * s->measure_floats * sizeof(float),
                                       err));
    mirror_measures(s);

    unsigned needs = s->prefill_needs | s->step_needs;
    size_t keys = (size_t)s->num_kv_heads * (size_t)s->stats_stride * (size_t)s->head_dim;
    bool wants_keys = (needs & RF_KV_NEED_KV) != 0 || (needs & RF_KV_NEED_EXPECTED) != 0;
    if (wants_keys) {
        s->host_k = rf_alloc_zero(keys, sizeof(float));
        s->host_v = rf_alloc_zero(keys, sizeof(float));
    }
    bool gated = (needs & RF_KV_NEED_GATE) != 0;
    if (gated) {
        size_t rows = max_size((size_t)s->stage->options.max_rows, (size_t)s->batch), work = 0;
        for (int l = 0; l < s->num_layers; l++) work = max_size(work, (size_t)rf_kv_gate_work(&s->tables.gates[l]));
        s->gate_values = rf_alloc_zero((size_t)s->num_kv_heads * (size_t)s->stats_stride, sizeof(float));
        s->gate_rows = rf_alloc_zero(rows * (size_t)(s->model->desc.hidden + s->num_kv_heads) + work, sizeof(float));
        s->step_gates = rf_alloc_zero((size_t)s->units, sizeof(float));
    }
    if (needs & RF_KV_NEED_EXPECTED) {
        size_t d = (size_t)s->head_dim;
        s->rope_mean = rf_alloc_zero(d, sizeof(float));
        s->moments = rf_alloc_zero((size_t)s->num_q_heads * (d + d * d), sizeof(double));
    }
    s->sequences = rf_alloc_zero((size_t)s->batch, sizeof *s->sequences);
    s->prompt_positions = rf_alloc(queries * sizeof(int32_t));
    if (!s->sequences || !s->prompt_positions || (wants_keys && (!s->host_k || !s->host_v)) ||
        (gated && (!s->gate_values || !s->gate_rows || !s->step_gates)) ||
        ((needs & RF_KV_NEED_EXPECTED) && (!s->rope_mean || !s->moments)))
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session with a cache budget");
    for (size_t i = 0; i < queries; i++) s->prompt_positions[i] = (int32_t)i;
    for (int b2 = 0; b2 < s->batch; b2++) {
        rf_kv_sequence *q = &s->sequences[b2];
        q->shift = rf_alloc_zero((size_t)s->num_layers, sizeof(int32_t));
        q->lens = rf_alloc_zero((size_t)s->num_layers * (size_t)s->num_kv_heads, sizeof(int32_t));
        q->free_rows = rf_alloc_zero((size_t)(s->on_device ? s->pool_rows : 1), sizeof(int32_t));
        if (!q->shift || !q->lens || !q->free_rows)
            return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session with a cache budget");
        RF_TRY(rf_kv_book_create(&q->book, &s->rule, &s->shape, s->options.budget, (int64_t)b2 * s->pool_rows, err));
        if (!drafts(&s->rule) || s->options.budget == 0) continue;
        rf_kv_shape shape = s->shape;
        shape.max_new = s->rule.drafts;
        RF_TRY(rf_kv_book_create(&q->draft_book, &s->draft_rule, &shape, s->options.budget, (int64_t)b2 * s->pool_rows,
                                 err));
    }
    return RF_OK;
}

static rf_status allocate(rf_kv_session *s, rf_error *err) {
    rf_arena arena;
    rf_arena_init_counting(&arena);
    RF_TRY(take_buffers(s, &arena, err));
    if (arena.overflow) return rf_fail(err, RF_ERR_ARGUMENT, "these prompts do not fit any address space");
    RF_TRY(rf_backend_alloc(s->backend, (void **)&s->memory, arena.peak, err));
    s->memory_bytes = arena.peak;
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    RF_TRY(take_buffers(s, &arena, err));
    RF_TRY(allocate_host(s, err));
    /* Rows that were never written may be read under a weight of 0. */
    RF_TRY(rf_stream_zero(s->stream, s->memory, s->memory_bytes, err));
    if (reads_in_order(s)) {
        size_t slots = (size_t)s->units * (size_t)s->stride, heads = (size_t)s->num_kv_heads * (size_t)s->stride;
        for (size_t i = 0; i < slots; i++) s->host_rows[i] = (int32_t)i;
        RF_TRY(rf_stream_upload(s->stream, s->iota_rows, s->host_rows, slots * sizeof(int32_t), err));
        RF_TRY(rf_kv_wait(s, err));
        for (size_t i = 0; i < heads; i++) s->host_rows[i] = (int32_t)(i % (size_t)s->stride);
        RF_TRY(rf_stream_upload(s->stream, s->iota_slots, s->host_rows, heads * sizeof(int32_t), err));
    }
    return rf_kv_wait(s, err);
}

static rf_status create(rf_kv_session *s, bool may_use_device, bool may_overlap, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    rf_kv_session_options *o = &s->options;
    s->rule = o->rule;
    RF_TRY(rf_kv_tables_open(&s->tables, &s->rule, s->model, o->calibration, err));
    s->num_layers = d->num_layers;
    s->num_q_heads = d->num_q_heads;
    s->num_kv_heads = d->num_kv_heads;
    s->head_dim = d->head_dim;
    s->group = d->num_q_heads / d->num_kv_heads;
    s->batch = o->batch;
    s->units = s->batch * s->num_kv_heads;
    s->prefill_needs = s->rule.score == RF_KV_SCORE_NONE ? 0 : rf_kv_needs_prefill(&s->rule);
    s->step_needs = s->rule.score == RF_KV_SCORE_NONE ? 0 : rf_kv_needs_step(&s->rule);
    s->host = rf_backend_get_kind(s->backend) == RF_BACKEND_CPU;
    s->on_device = may_use_device && maps_to_evict(&s->rule, &s->evict_mode);
    if (s->on_device) s->step_needs = 0;
    s->slides = s->on_device && s->rule.position == RF_KV_POSITION_CACHE;
    s->overlaps = may_overlap && rf_kv_can_overlap(&s->rule);
    if (s->rule.score == RF_KV_SCORE_ATTENTION && s->rule.queries == RF_KV_QUERIES_PSEUDO)
        s->extra_rows = s->rule.pseudo;
    if (s->rule.score == RF_KV_SCORE_ATTENTION && s->rule.queries == RF_KV_QUERIES_EXTERNAL)
        s->extra_rows = o->num_external;
    s->default_budget = o->budget;
    o->budget = resolve_budget(&s->rule, o->budget, o->ratio, o->max_prompt);
    s->shape = (rf_kv_shape){.num_layers = s->num_layers,
                             .num_q_heads = s->num_q_heads,
                             .num_kv_heads = s->num_kv_heads,
                             .head_dim = s->head_dim,
                             .max_prompt = o->max_prompt,
                             .max_new = o->max_new,
                             .layer_shares = s->tables.layer_shares,
                             .head_classes = s->tables.head_classes,
                             .head_list = s->tables.head_list};
    s->pool_rows = rf_kv_pool_rows(&s->rule, &s->shape, o->budget);
    s->draft_at = -1;
    if (drafts(&s->rule)) {
        rf_kv_shape shape = s->shape;
        shape.max_new = s->rule.drafts;
        s->draft_rule = draft_rule(&s->rule);
        s->draft_needs = rf_kv_needs_prefill(&s->draft_rule);
        int64_t rows = rf_kv_pool_rows(&s->draft_rule, &shape, o->budget);
        if (rows > s->pool_rows) s->pool_rows = rows;
    }
    if (s->pool_rows < 1 || s->pool_rows * s->batch > INT32_MAX)
        return rf_fail(err, RF_ERR_ARGUMENT, "a pool of %lld rows for %d sequences, expected 1..%d in all",
                       (long long)s->pool_rows, s->batch, INT32_MAX);
    s->stride = list_stride(s);
    if (s->on_device && s->stride * s->num_layers * s->units > INT32_MAX)
        return rf_fail(err, RF_ERR_ARGUMENT, "lists of %lld slots for %d sequences are too many", (long long)s->stride,
                       s->batch);

    rf_text_session_options so = rf_text_session_options_default();
    so.capacity = o->max_prompt + s->extra_rows;
    so.max_rows = o->prefill_chunk;
    if (s->extra_rows > so.max_rows) so.max_rows = s->extra_rows;
    if (drafts(&s->rule) && s->rule.drafts > so.max_rows) so.max_rows = s->rule.drafts;
    if (so.max_rows > so.capacity) so.max_rows = so.capacity;
    if (drafts(&s->rule) && s->rule.drafts > so.max_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d drafted queries for prompts of %d tokens, expected fewer",
                       (int)s->rule.drafts, (int)o->max_prompt);
    so.max_head_rows = 1;
    so.layer_planes = s->overlaps ? 2 : 1;
    so.residual_dtype = o->residual_dtype;
    so.use_graphs = o->use_graphs;
    so.tune_gemm = o->tune_gemm;
    so.gemm_tuning = o->gemm_tuning;
    RF_TRY(rf_text_session_create(&s->stage, s->model, &so, err));
    s->stream = s->stage->stream;
    plan_sizes(s);
    RF_TRY(allocate(s, err));
    if (s->rule.action == RF_KV_SELECT && s->rule.score != RF_KV_SCORE_NONE)
        RF_TRY(rf_kv_select_create(s, may_use_device, err));
    for (int b = 0; b < s->batch && s->slides; b++) rf_kv_slide_start(s, b);
    RF_TRY(rf_kv_sentences_open(s, err));
    RF_TRY(rf_kv_blocks_open(s, err));
    if (rf_kv_packs(&s->rule)) RF_TRY(rf_kv_packed_create(s, err));
    return s->host ? RF_OK : rf_kv_plan_steps(s, err);
}

rf_status rf_kv_session_create_with(rf_kv_session **out, const rf_text_model *model,
                                    const rf_kv_session_options *options, bool may_use_device, bool may_overlap,
                                    rf_error *err) {
    rf_kv_session_options o = *options;
    *out = NULL;
    RF_TRY(check_options(model, &o, err));
    rf_kv_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session with a cache budget");
    s->model = model;
    s->backend = model->backend;
    s->ops = rf_ops_for(model->backend);
    s->options = o;
    s->last_sequence = -1;
    rf_status st = create(s, may_use_device, may_overlap, err);
    if (st != RF_OK) {
        rf_kv_session_destroy(s);
        return st;
    }
    *out = s;
    return RF_OK;
}

rf_status rf_kv_session_create_as(rf_kv_session **out, const rf_text_model *model, const rf_kv_session_options *options,
                                  bool may_use_device, rf_error *err) {
    bool device = rf_backend_get_kind(model->backend) != RF_BACKEND_CPU;
    return rf_kv_session_create_with(out, model, options, may_use_device, device, err);
}

rf_status rf_kv_session_create(rf_kv_session **out, const rf_text_model *model, const rf_kv_session_options *options,
                               rf_error *err) {
    return rf_kv_session_create_as(out, model, options, rf_backend_get_kind(model->backend) != RF_BACKEND_CPU, err);
}

void rf_kv_session_destroy(rf_kv_session *s) {
    if (s == NULL) return;
    if (s->stage) rf_kv_wait(s, NULL);
    for (int i = 0; i < RF_KV_GRAPHS; i++) rf_graph_destroy(s->graphs[i]);
    rf_kv_select_destroy(s);
    rf_kv_packed_destroy(s);
    for (int b = 0; s->sequences && b < s->batch; b++) {
        rf_kv_book_destroy(s->sequences[b].book);
        rf_kv_book_destroy(s->sequences[b].draft_book);
        rf_kv_sentences_destroy(s->sequences[b].sentences);
        rf_free(s->sequences[b].shift);
        rf_free(s->sequences[b].lens);
        rf_free(s->sequences[b].free_rows);
    }
    rf_free(s->sequences);
    rf_free(s->prompt_positions);
    rf_free(s->external);
    rf_free(s->plane_positions);
    rf_free(s->host_k);
    rf_free(s->host_v);
    rf_free(s->gate_values);
    rf_free(s->gate_rows);
    rf_free(s->step_gates);
    rf_free(s->rope_mean);
    rf_free(s->moments);
    rf_free(s->bounce);
    rf_kv_tables_close(&s->tables);
    rf_backend_free_pinned(s->backend, s->host_control);
    rf_backend_free_pinned(s->backend, s->host_rows);
    rf_backend_free_pinned(s->backend, s->host_lens);
    rf_backend_free_pinned(s->backend, s->host_copy);
    rf_backend_free_pinned(s->backend, s->host_state);
    rf_backend_free_pinned(s->backend, s->host_weights);
    rf_backend_free_pinned(s->backend, s->host_scores);
    rf_backend_free_pinned(s->backend, s->host_stats);
    rf_backend_free_pinned(s->backend, s->host_logits);
    if (s->host_measure_block != s->measure_block) rf_backend_free_pinned(s->backend, s->host_measure_block);
    rf_backend_free(s->backend, s->logits);
    rf_backend_free(s->backend, s->memory);
    rf_text_session_destroy(s->stage);
    rf_free(s);
}

/* --- the head ---------------------------------------------------------------------------------------------------------- */

static void drop_graphs(rf_kv_session *s) {
    for (int i = 0; i < RF_KV_GRAPHS; i++) {
        rf_graph_destroy(s->graphs[i]);
        s->graphs[i] = NULL;
        s->graph_planned[i] = false;
    }
}

rf_status rf_kv_session_set_draw(rf_kv_session *s, const rf_kv_draw *draw, rf_error *err) {
    if (!(draw->temperature >= 0) || draw->temperature > 1e6f)
        return rf_fail(err, RF_ERR_ARGUMENT, "temperature %g, expected 0 or more", (double)draw->temperature);
    if (draw->temperature == s->draw.temperature && draw->seed == s->draw.seed &&
        draw->keep_logits == s->draw.keep_logits)
        return RF_OK;
    RF_TRY(rf_kv_wait(s, err));
    if (draw->keep_logits && s->logits == NULL) {
        size_t bytes = (size_t)s->batch * (size_t)s->model->desc.vocab * sizeof(float);
        RF_TRY(rf_backend_alloc(s->backend, (void **)&s->logits, bytes, err));
        RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&s->host_logits, bytes, err));
    }
    drop_graphs(s);
    s->draw = *draw;
    return RF_OK;
}

rf_status rf_kv_queue_head(rf_kv_session *s, const void *x, int first, int num, rf_error *err) {
    const rf_text_desc *d = &s->model->desc;
    char *h = s->head_h + (size_t)first * (size_t)d->hidden * rf_kv_elem(s);
    rf_norm_args norm = rf_text_norm_args(s->stage, x, h, num, s->model->final_norm);
    RF_TRY(s->ops->norm(s->stream, &norm, err));
    /* Draws are numbered by sequence, but a call has one number. */
    int each = s->draw.temperature > 0 ? 1 : num;
    for (int i = 0; i < num; i += each) {
        rf_head_stats_args args = head_args(s, each);
        args.x = h + (size_t)i * (size_t)d->hidden * rf_kv_elem(s);
        args.w = s->model->head;
        args.out = s->stats + first + i;
        args.temperature = s->draw.temperature;
        args.seed = s->draw.seed;
        args.keys = s->control + s->at.keys + first + i;
        args.step = s->control + s->at.steps + first + i;
        args.workspace = s->head_workspace;
        args.workspace_bytes = s->head_workspace_bytes;
        RF_TRY(s->ops->head_stats(s->stream, &args, err));
    }
    if (!s->draw.keep_logits) return RF_OK;
    rf_gemm_args logits = rf_gemm_args_default(s->model->dtype, num, d->vocab, d->hidden);
    logits.x = h;
    logits.w = s->model->head;
    logits.y = s->logits + (int64_t)first * d->vocab;
    logits.y_dtype = RF_DTYPE_F32;
    logits.w_is_constant = true;
    return s->ops->gemm(s->stream, &logits, err);
}

rf_status rf_kv_download_head(rf_kv_session *s, int first, int num, rf_error *err) {
    RF_TRY(rf_stream_download(s->stream, s->host_stats + first, s->stats + first, (size_t)num * sizeof *s->stats, err));
    if (!s->draw.keep_logits) return RF_OK;
    int64_t vocab = s->model->desc.vocab;
    return rf_stream_download(s->stream, s->host_logits + first * vocab, s->logits + first * vocab,
                              (size_t)num * (size_t)vocab * sizeof(float), err);
}

/* --- prompts ----------------------------------------------------------------------------------------------------------- */

rf_status rf_kv_upload_lists(rf_kv_session *s, int sequence, int first, int end, rf_error *err) {
    const rf_kv_book *book = s->sequences[sequence].book;
    int64_t heads = s->num_kv_heads;
    for (int l = first; l < end; l++) {
        int64_t unit = rf_kv_unit_at(s, l, sequence);
        for (int h = 0; h < s->num_kv_heads; h++) {
            const rf_kv_head *head = rf_kv_book_head(book, l, h);
            if (head->num > s->stride)
                return rf_fail(err, RF_ERR_STATE, "layer %d, key head %d keeps %d slots, lists have room for %lld", l,
                               h, head->num, (long long)s->stride);
            if (head->num > 0)
                memcpy(s->host_rows + (unit + h) * s->stride, head->row, (size_t)head->num * sizeof(int32_t));
            s->host_lens[unit + h] = head->num;
        }
        for (int h = 0; h < s->num_kv_heads; h++) {
            int64_t at = (unit + h) * s->stride, num = s->host_lens[unit + h];
            /* On a device a call costs more than the bytes between two lists do. */
            if (!s->host) num = (heads - 1) * s->stride + s->host_lens[unit + heads - 1];
            RF_TRY(rf_stream_upload(s->stream, s->rows + at, s->host_rows + at, (size_t)num * sizeof(int32_t), err));
            if (!s->host) break;
        }
        if (s->batch > 1)
            RF_TRY(
                rf_stream_upload(s->stream, s->lens + unit, s->host_lens + unit, (size_t)heads * sizeof(int32_t), err));
    }
    s->stage->busy = true;
    if (s->batch > 1 || first == end) return RF_OK;
    int64_t unit = rf_kv_unit_at(s, first, 0);
    return rf_stream_upload(s->stream, s->lens + unit, s->host_lens + unit,
                            (size_t)((end - first) * heads) * sizeof(int32_t), err);
}

static rf_status check_tokens(const rf_kv_session *s, const int32_t *tokens, int32_t num, rf_error *err) {
    for (int32_t i = 0; i < num; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->desc.vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "token %d is id %d, expected 0..%lld", (int)i, (int)tokens[i],
                           (long long)s->model->desc.vocab - 1);
    return RF_OK;
}

static bool is_end(const rf_text_desc *d, int32_t token) {
    for (int i = 0; i < d->num_eos; i++)
        if (d->eos_ids[i] == token) return true;
    return false;
}

/* Greedy tokens behind a compressed copy of the prompt; their queries are kept. */
static rf_status draft_tokens(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, rf_error *err) {
    rf_kv_sequence *q = &s->sequences[sequence];
    rf_status st = rf_kv_prefill(s, sequence, tokens, num, true, err);
    for (int32_t i = 0; st == RF_OK && i < s->rule.drafts && q->seen < s->model->rope_positions; i++) {
        st = rf_kv_download_head(s, sequence, 1, err);
        if (st == RF_OK) st = rf_kv_wait(s, err);
        int32_t token = s->host_stats[sequence].id;
        if (st != RF_OK || (i > 0 && is_end(&s->model->desc, token))) break;
        s->draft_at = i;
        st = rf_kv_step_range(s, sequence, 1, &token, i + 1 < s->rule.drafts, err);
        s->num_drafted = i + 1;
    }
    s->draft_at = -1;
    return st;
}

static rf_status draft(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, rf_error *err) {
    rf_kv_sequence *q = &s->sequences[sequence];
    double began = rf_kv_now_ms(), scored = s->info.score_ms, waited = s->info.score_wait_ms;
    s->num_drafted = 0;
    if (q->draft_book == NULL || q->budget == 0 || num <= q->budget) return RF_OK;
    rf_kv_rule rule = s->rule;
    rf_kv_draw draw = s->draw;
    rf_kv_book *book = q->book;
    unsigned prefill_needs = s->prefill_needs, step_needs = s->step_needs;
    RF_TRY(rf_kv_book_reset(q->draft_book, q->budget, err));
    s->rule = s->draft_rule;
    s->draw = (rf_kv_draw){0};
    q->book = q->draft_book;
    s->prefill_needs = s->draft_needs;
    s->step_needs = 0;
    rf_status st = draft_tokens(s, sequence, tokens, num, err);
    s->rule = rule;
    s->draw = draw;
    q->book = book;
    s->prefill_needs = prefill_needs;
    s->step_needs = step_needs;
    q->seen = num;
    q->appended = q->made = 0;
    double took = rf_kv_now_ms() - began;
    s->info.score_ms = scored + took;
    s->info.score_wait_ms = waited + took;
    return st;
}

rf_status rf_kv_session_prefill(rf_kv_session *s, int32_t sequence, const int32_t *tokens, int32_t num, int32_t context,
                                int32_t budget, double ratio, rf_error *err) {
    s->has_result = false;
    if (sequence < 0 || sequence >= s->batch)
        return rf_fail(err, RF_ERR_ARGUMENT, "sequence %d of a batch of %d", (int)sequence, s->batch);
    if (num < 1 || context < 0 || context > num)
        return rf_fail(err, RF_ERR_ARGUMENT, "a prompt of %d tokens with a context of %d", (int)num, (int)context);
    int32_t compressed = context > 0 ? context : num;
    if (compressed > s->options.max_prompt)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d tokens to compress, the session was made for %d", (int)compressed,
                       (int)s->options.max_prompt);
    if (num - compressed > s->options.max_new)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d tokens behind the context, the session was made for %d",
                       (int)(num - compressed), (int)s->options.max_new);
    RF_TRY(check_tokens(s, tokens, num, err));
    if (budget < 0 || !(ratio >= 0.0 && ratio <= 1.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "a budget of %d tokens, ratio %g: expected 0 or more, 0..1", (int)budget,
                       ratio);
    RF_TRY(check_packed_budget(&s->rule, budget, ratio, err));
    bool given = budget > 0 || ratio > 0.0;
    int32_t wanted =
        resolve_budget(&s->rule, given ? budget : s->default_budget, given ? ratio : s->options.ratio, compressed);
    if (s->options.budget > 0 && (wanted == 0 || wanted > s->options.budget))
        return rf_fail(err, RF_ERR_ARGUMENT, "a budget of %d tokens (0 = all), the session was made for %d",
                       (int)wanted, (int)s->options.budget);

    rf_kv_sequence *q = &s->sequences[sequence];
    q->ready = false;
    double began = rf_kv_now_ms(), waited = s->info.score_wait_ms;
    RF_TRY(rf_kv_wait(s, err));
    RF_TRY(rf_kv_book_reset(q->book, wanted, err));
    if (s->on_device && wanted != q->budget) drop_graphs(s); /* they know what is protected */
    q->budget = wanted;
    q->compressed = q->seen = compressed;
    q->appended = q->made = 0;
    q->evicted = 0;
    memset(q->shift, 0, (size_t)s->num_layers * sizeof *q->shift);
    RF_TRY(draft(s, sequence, tokens, compressed, err));
    RF_TRY(rf_kv_prefill(s, sequence, tokens, compressed, num == compressed, err));
    if (s->on_device) RF_TRY(rf_kv_start_device(s, sequence, err));
    if (s->slides) rf_kv_slide_start(s, sequence);
    q->ready = true;
    for (int32_t i = compressed; i < num; i++) RF_TRY(rf_kv_step_range(s, sequence, 1, tokens + i, i + 1 == num, err));
    if (num > compressed) q->made = 0;
    RF_TRY(rf_kv_download_head(s, sequence, 1, err));
    RF_TRY(rf_kv_wait(s, err));
    s->info.budget = wanted;
    s->info.prefill_ms += rf_kv_now_ms() - began - (s->info.score_wait_ms - waited);
    s->last_sequence = sequence;
    s->has_result = true;
    return RF_OK;
}

rf_status rf_kv_session_step(rf_kv_session *s, const int32_t *tokens, rf_error *err) {
    s->has_result = false;
    int active = 0;
    for (int b = 0; b < s->batch; b++) {
        if (tokens[b] == -1) continue;
        const rf_kv_sequence *q = &s->sequences[b];
        RF_TRY(check_tokens(s, tokens + b, 1, err));
        if (!q->ready) return rf_fail(err, RF_ERR_STATE, "sequence %d has no prompt", b);
        if (q->appended >= s->options.max_new)
            return rf_fail(err, RF_ERR_STATE, "sequence %d has used up its %d tokens behind the prompt", b,
                           (int)s->options.max_new);
        active++;
    }
    if (active == 0) return rf_fail(err, RF_ERR_ARGUMENT, "a step of no sequence");
    /* The host computes sequences one by one: a GEMM of one row has the bits of the plain path, whatever the batch. */
    bool together = !s->host && active == s->batch;
    for (int b = 0; b < s->batch; b += together ? s->batch : 1) {
        if (tokens[b] == -1) continue;
        int num = together ? s->batch : 1;
        RF_TRY(rf_kv_step_range(s, b, num, tokens + b, true, err));
        RF_TRY(rf_kv_download_head(s, b, num, err));
    }
    s->info.num_passes++;
    s->last_sequence = -1;
    s->has_result = true;
    return RF_OK;
}

/* --- what is known afterwards ------------------------------------------------------------------------------------------- */

rf_status rf_kv_session_read_stats(rf_kv_session *s, rf_token_stats *stats, rf_error *err) {
    if (!s->has_result)
        return rf_fail(err, RF_ERR_STATE, "statistics of a session whose last call failed or never came");
    RF_TRY(rf_kv_wait(s, err));
    if (s->last_sequence >= 0)
        stats[0] = s->host_stats[s->last_sequence];
    else
        memcpy(stats, s->host_stats, (size_t)s->batch * sizeof *stats);
    return RF_OK;
}

rf_status rf_kv_session_read_logits(rf_kv_session *s, int32_t sequence, float *logits, rf_error *err) {
    if (!s->has_result || !s->draw.keep_logits)
        return rf_fail(err, RF_ERR_STATE, "logits of a session that keeps none, or whose last call failed");
    if (sequence < 0 || sequence >= s->batch || (s->last_sequence >= 0 && sequence != s->last_sequence))
        return rf_fail(err, RF_ERR_ARGUMENT, "logits of sequence %d, which were not computed last", (int)sequence);
    RF_TRY(rf_kv_wait(s, err));
    int64_t vocab = s->model->desc.vocab;
    memcpy(logits, s->host_logits + sequence * vocab, (size_t)vocab * sizeof *logits);
    return RF_OK;
}

rf_kv_session_info rf_kv_session_get_info(const rf_kv_session *s) {
    rf_kv_session_info info = s->info;
    int64_t layers = s->num_layers, heads = layers * s->num_kv_heads;
    info.row_passes = (s->row_layers + layers / 2) / layers;
    info.key_reads = (s->key_layers + heads / 2) / heads;
    for (int b = 0; b < s->batch; b++) {
        const rf_kv_sequence *q = &s->sequences[b];
        if (!q->ready) continue;
        info.full_slots += (int64_t)q->seen * heads;
        info.evictions += rf_kv_book_get_info(q->book).evictions + q->evicted;
        for (int l = 0; l < s->num_layers; l++)
            for (int h = 0; h < s->num_kv_heads; h++)
                info.kept_slots +=
                    s->on_device ? q->lens[l * s->num_kv_heads + h] : rf_kv_book_head(q->book, l, h)->num;
    }
    int64_t raw_slots = info.kept_slots, packed = 0;
    size_t packed_bytes = 0, packed_stores;
    if (s->packed) rf_kv_packed_info(s, &packed, &packed_bytes);
    info.kept_slots += packed;
    size_t slot = 2 * (size_t)s->head_dim * rf_kv_elem(s);
    /* row and position of a slot, and what rules keep with it */
    size_t list = s->rule.score == RF_KV_SCORE_NONE ? sizeof(int32_t) : 2 * sizeof(int32_t);
    if (s->rule.score != RF_KV_SCORE_NONE && s->rule.schedule != RF_KV_AT_PREFILL && !s->select &&
        !(s->packed && s->step_needs == 0))
        list += sizeof(float);
    info.kept_bytes = (size_t)raw_slots * (slot + list) + packed_bytes + rf_kv_select_bytes(s);
    if (s->rule.action == RF_KV_COMPENSATE)
        for (int b = 0; b < s->batch; b++)
            info.kept_bytes += s->sequences[b].ready ? (size_t)heads * (slot + sizeof(float)) : 0;
    for (int b = 0; b < s->batch; b++)
        if (s->sequences[b].ready && rf_kv_wants_sentences(s, b))
            info.kept_bytes += rf_kv_sentences_bytes(s->sequences[b].sentences);
    info.full_bytes = (size_t)info.full_slots * slot;
    info.staging_bytes = s->stage->cache_bytes;
    info.arena_bytes = s->memory_bytes + rf_kv_packed_memory(s, &packed_stores) + s->stage->memory_bytes +
                       (s->logits ? (size_t)s->batch * (size_t)s->model->desc.vocab * sizeof(float) : 0);
    info.pool_bytes = s->pool_bytes + packed_stores;
    return info;
}

void rf_kv_session_reset_counts(rf_kv_session *s) {
    s->info.num_passes = 0;
    s->info.prefill_ms = s->info.score_ms = s->info.score_wait_ms = s->info.step_score_ms = 0;
    s->row_layers = s->key_layers = 0;
}

rf_status rf_kv_session_read_positions(rf_kv_session *s, int32_t sequence, int layer, int head, int32_t *out,
                                       int32_t *num, rf_error *err) {
    if (sequence < 0 || sequence >= s->batch || layer < 0 || layer >= s->num_layers || head < 0 ||
        head >= s->num_kv_heads)
        return rf_fail(err, RF_ERR_ARGUMENT, "no cache at sequence %d, layer %d, key head %d", (int)sequence, layer,
                       head);
    const rf_kv_sequence *q = &s->sequences[sequence];
    if (!q->ready) return rf_fail(err, RF_ERR_STATE, "sequence %d has no prompt", (int)sequence);
    if (s->packed) {
        rf_kv_packed_positions(s, sequence, layer, head, out, num);
        return RF_OK;
    }
    if (!s->on_device) {
        const rf_kv_head *h = rf_kv_book_head(q->book, layer, head);
        memcpy(out, h->position, (size_t)h->num * sizeof *out);
        *num = h->num;
        return RF_OK;
    }
    RF_TRY(rf_kv_wait(s, err));
    *num = q->lens[layer * s->num_kv_heads + head];
    RF_TRY(rf_stream_download(s->stream, out, s->positions + (rf_kv_unit_at(s, layer, sequence) + head) * s->stride,
                              (size_t)*num * sizeof *out, err));
    return rf_kv_wait(s, err);
}

/* --- rows to and from the host ------------------------------------------------------------------------------------------ */

static rf_status take_bounce(rf_kv_session *s, size_t bytes, rf_error *err) {
    if (bytes <= s->bounce_bytes) return RF_OK;
    char *grown = rf_realloc(s->bounce, bytes);
    if (grown == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for rows of a session");
    s->bounce = grown;
    s->bounce_bytes = bytes;
    return RF_OK;
}

rf_status rf_kv_read_rows(rf_kv_session *s, const void *device, int64_t num, float *out, rf_error *err) {
    size_t bytes = (size_t)num * rf_kv_elem(s);
    RF_TRY(take_bounce(s, bytes, err));
    RF_TRY(rf_stream_download(s->stream, s->bounce, device, bytes, err));
    RF_TRY(rf_kv_wait(s, err));
    rf_convert(out, RF_DTYPE_F32, s->bounce, s->model->dtype, (size_t)num);
    return RF_OK;
}

rf_status rf_kv_write_rows(rf_kv_session *s, void *device, int64_t num, const float *in, rf_error *err) {
    size_t bytes = (size_t)num * rf_kv_elem(s);
    RF_TRY(take_bounce(s, bytes, err));
    rf_convert(s->bounce, s->model->dtype, in, RF_DTYPE_F32, (size_t)num);
    RF_TRY(rf_stream_upload(s->stream, device, s->bounce, bytes, err));
    return rf_kv_wait(s, err);
}
