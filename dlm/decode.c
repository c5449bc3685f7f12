/* dlm/decode.c - options, the decoder's memory, results; the loops are in decode_causal.c and decode_diffusion.c. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/memory.h"
#include "dlm/decode_internal.h"

double rf_decode_now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

rf_decode_options rf_decode_options_default(const rf_text_model *model) {
    const bool blocks = model && model->desc.attention == RF_TEXT_BLOCK_CAUSAL;
    return (rf_decode_options){.max_new = 128,
                               .top_p = 1.0,
                               .repetition_penalty = 1.0,
                               .commit = model && model->desc.shift == 1 ? RF_COMMIT_SCHEDULE : RF_COMMIT_TOPN,
                               .confidence =
                                   model && model->desc.shift == 1 ? RF_CONFIDENCE_NEG_ENTROPY : RF_CONFIDENCE_PROB,
                               .threshold = 0.9,
                               .threshold_strict = blocks,
                               .dynamic = blocks,
                               .factor = 1.0,
                               .entropy_bound = 0.001,
                               .end = RF_END_STOP,
                               .reuse_refresh = 2,
                               .accept_k = 5,
                               .accept_threshold = 0.1,
                               .guide_chunk = 32,
                               .kv_ratio = 1.0,
                               .prefill_chunk = 2048,
                               .use_graphs = true};
}

bool rf_decode_needs_logits(const rf_decode_options *o) {
    return o->top_k > 0 || o->top_p < 1.0 || o->min_p > 0.0 || o->repetition_penalty != 1.0;
}

bool rf_decode_is_end(const rf_decoder *d, const rf_decode_options *o, int32_t token) {
    for (int i = 0; i < o->num_stop_ids; i++)
        if (o->stop_ids[i] == token) return true;
    if (o->ignore_eos) return false;
    for (int i = 0; i < d->model->desc.num_eos; i++)
        if (d->model->desc.eos_ids[i] == token) return true;
    return false;
}

static rf_status check_diffusion(const rf_decode_options *o, const rf_text_desc *desc, rf_error *err) {
    const bool blocks = desc->attention == RF_TEXT_BLOCK_CAUSAL;
    const int32_t block = o->block > 0 ? o->block : blocks ? desc->block : o->max_new;
    if (desc->mask_id < 0) return rf_fail(err, RF_ERR_CONFIG, "the model's config names no mask token");
    if (o->repetition_penalty != 1.0)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "a repetition penalty belongs to autoregressive models");
    if (!blocks && o->max_new % block != 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d new tokens are not whole blocks of %d", (int)o->max_new, (int)block);
    if (o->commit == RF_COMMIT_SCHEDULE || o->commit == RF_COMMIT_ORIGIN) {
        if (blocks || block != o->max_new)
            return rf_fail(err, RF_ERR_ARGUMENT, "commit rule %s is for one block: block %d of %d tokens",
                           o->commit == RF_COMMIT_ORIGIN ? "origin" : "schedule", (int)block, (int)o->max_new);
    } else if (!blocks && o->steps > 0 && (o->commit == RF_COMMIT_TOPN || o->commit == RF_COMMIT_SEQUENTIAL)) {
        const int32_t num_blocks = o->max_new / block;
        if (o->steps % num_blocks != 0)
            return rf_fail(err, RF_ERR_ARGUMENT, "%d steps do not divide into %d blocks", (int)o->steps,
                           (int)num_blocks);
    }
    if (blocks && o->row_policy)
        return rf_fail(
            err, RF_ERR_UNSUPPORTED,
            "%s is for bidirectional models: rows of finished blocks of %s are exact and never computed again",
            rf_policy_get_def(o->row_policy)->name, desc->family);
    if (o->cfg_scale != 0.0 && (blocks || o->reuse != RF_REUSE_NONE))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "guidance (cfg) is for bidirectional models without attention reuse");
    if (o->reuse != RF_REUSE_NONE && !blocks && !o->row_policy)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "attention reuse needs frozen keys: a block model, or a row policy that leaves rows out");
    if (o->commit == RF_COMMIT_GUIDED && !o->guide)
        return rf_fail(err, RF_ERR_ARGUMENT, "commit rule guided needs a guide model");
    return RF_OK;
}

rf_status rf_decode_options_check(const rf_decode_options *o, const rf_text_model *model, int32_t prompt_len,
                                  rf_error *err) {
    const rf_text_desc *desc = &model->desc;
    if (o->max_new < 1) return rf_fail(err, RF_ERR_ARGUMENT, "new tokens: %d, must be at least 1", (int)o->max_new);
    if (prompt_len < 1) return rf_fail(err, RF_ERR_ARGUMENT, "the prompt is empty");
    /* positions by place in the cache have no end */
    const bool endless = o->kv && o->kv->position == RF_KV_POSITION_CACHE;
    if ((int64_t)prompt_len + (endless ? 0 : o->max_new) > desc->max_positions)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d prompt tokens and %d new ones do not fit the model's %lld positions",
                       (int)prompt_len, (int)o->max_new, (long long)desc->max_positions);
    if (o->steps < 0 || o->block < 0 || o->top_k < 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "steps, block and top-k may not be negative");
    if (!(o->temperature >= 0.0) || !(o->top_p > 0.0 && o->top_p <= 1.0) || !(o->min_p >= 0.0 && o->min_p < 1.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "temperature >= 0, 0 < top-p <= 1 and 0 <= min-p < 1 are wanted");
    if (!(o->repetition_penalty > 0.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "repetition penalty %g must be above 0", o->repetition_penalty);
    if (!(o->threshold >= 0.0) || !(o->factor > 0.0) || !(o->entropy_bound >= 0.0) || !(o->alg_temp >= 0.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "threshold, entropy bound and alg-temp >= 0, factor > 0 are wanted");
    if (o->reuse_refresh < 0 || o->accept_k < 1 || o->guide_chunk < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "refresh >= 0, accept-k and guide chunk >= 1 are wanted");
    if (o->kv_budget < 0 || !(o->kv_ratio >= 0.0 && o->kv_ratio <= 1.0) || o->kv_context < 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "cache budget and context >= 0, ratio 0..1 are wanted");
    if (desc->attention != RF_TEXT_CAUSAL && o->kv)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "a cache budget is for autoregressive models, %s is not one",
                       desc->family);
    if (desc->attention != RF_TEXT_CAUSAL) return check_diffusion(o, desc, err);
    if (o->row_policy || o->reuse != RF_REUSE_NONE || o->cfg_scale != 0.0 || o->guide)
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "%s is autoregressive: row policies, attention reuse, guidance and guides are for "
                       "diffusion language models",
                       desc->family);
    return RF_OK;
}

static const rf_row_rules *rules_of(const rf_policy *policy) {
    return policy ? rf_policy_get_def(policy)->rows : NULL;
}

/* One block of int32 lists. */
static rf_status take_lists(rf_decoder *d, rf_error *err) {
    const size_t c = (size_t)d->capacity, layers = (size_t)d->model->desc.num_layers;
    int32_t **one[] = {&d->tokens,    &d->commit_step,  &d->order,           &d->positions,
                       &d->plan_rows, &d->plan_visible, &d->plan_candidates, &d->plan_window,
                       &d->committed, &d->slots,        &d->fresh,           &d->slot_position};
    int32_t **two[] = {&d->pass_rows, &d->pass_tokens, &d->head_rows, &d->head_keys};
    const size_t num_one = sizeof one / sizeof one[0], num_two = sizeof two / sizeof two[0];
    d->lists = rf_alloc_zero((num_one + 2 * num_two) * c + 2 * layers, sizeof(int32_t));
    d->masked = rf_alloc_zero(2 * c, 1);
    d->confidence = rf_alloc_zero(2 * c, sizeof(float));
    d->stats = rf_alloc_zero(2 * c, sizeof *d->stats);
    d->candidates = rf_alloc_zero(c, sizeof *d->candidates);
    if (!d->lists || !d->masked || !d->confidence || !d->stats || !d->candidates)
        return rf_fail(err, RF_ERR_MEMORY, "decoder: out of memory for %d rows", (int)d->capacity);
    int32_t *at = d->lists;
    for (size_t i = 0; i < num_one; i++, at += c) *one[i] = at;
    for (size_t i = 0; i < num_two; i++, at += 2 * c) *two[i] = at;
    d->tracked = at;
    d->next_tracked = at + layers;
    d->decoded = d->masked + c;
    d->priority = d->confidence + c;
    for (int32_t i = 0; i < d->capacity; i++) d->positions[i] = i;
    return RF_OK;
}

static rf_status create_budget(rf_decoder *d, const rf_decode_options *o, rf_error *err) {
    rf_kv_session_options so = rf_kv_session_options_default();
    const int64_t positions = d->model->desc.max_positions;
    so.rule = d->kv_rule = *o->kv;
    so.budget = o->kv_budget;
    so.ratio = o->kv_ratio;
    so.external = o->kv_external;
    so.num_external = o->num_kv_external;
    so.max_prompt = d->capacity < positions ? d->capacity : (int32_t)positions;
    so.max_new = o->kv_context > 0 ? d->capacity : o->max_new;
    so.prefill_chunk = o->prefill_chunk > 0 ? o->prefill_chunk : so.max_prompt;
    so.use_graphs = o->use_graphs;
    so.tune_gemm = o->tune_gemm;
    so.gemm_tuning = o->gemm_tuning;
    RF_TRY(rf_kv_session_create(&d->kv, d->model, &so, err));
    if (!rf_decode_needs_logits(o)) return RF_OK;
    const rf_kv_draw draw = {.keep_logits = true};
    return rf_kv_session_set_draw(d->kv, &draw, err);
}

rf_kv_session *rf_decoder_kv(const rf_decoder *d) {
    return d->kv;
}

static rf_status create(rf_decoder *d, const rf_decode_options *o, int32_t capacity, rf_error *err) {
    const rf_text_desc *desc = &d->model->desc;
    const rf_row_rules *rules = rules_of(o->row_policy);
    const bool blocks = desc->attention == RF_TEXT_BLOCK_CAUSAL, causal = desc->attention == RF_TEXT_CAUSAL;
    const int32_t block = o->block > 0 ? o->block : desc->block;
    if (o->row_policy && !rules)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "%s caches features of diffusion transformers, it is not a row policy of text models",
                       rf_policy_get_def(o->row_policy)->name);
    const bool endless = o->kv && o->kv->position == RF_KV_POSITION_CACHE;
    if (capacity < 2 || (capacity > desc->max_positions && !endless))
        return rf_fail(err, RF_ERR_ARGUMENT, "%d rows: the model has %lld positions", (int)capacity,
                       (long long)desc->max_positions);
    d->capacity = capacity;
    if (blocks) { /* whole blocks */
        if (block < 1) return rf_fail(err, RF_ERR_CONFIG, "the model's config names no block length: give one");
        d->capacity = (capacity + block - 1) / block * block;
        if (d->capacity > desc->max_positions)
            return rf_fail(err, RF_ERR_ARGUMENT, "%d rows in blocks of %d: the model has %lld positions", (int)capacity,
                           (int)block, (long long)desc->max_positions);
    }
    d->has_cfg = o->cfg_scale != 0.0;
    if (o->row_policy) {
        rf_policy *clone = rf_policy_clone(o->row_policy);
        if (!clone) return rf_fail(err, RF_ERR_MEMORY, "decoder: out of memory");
        d->row_policy = clone;
        d->policy_state_bytes = rf_policy_get_def(clone)->state_bytes + rules->length_bytes * (size_t)d->capacity;
        d->policy_state = rf_alloc_zero(d->policy_state_bytes ? d->policy_state_bytes : 1, 1);
        if (!d->policy_state) return rf_fail(err, RF_ERR_MEMORY, "decoder: out of memory");
    }
    RF_TRY(take_lists(d, err));
    if (rf_decode_needs_logits(o) || causal) {
        d->logits = rf_alloc_zero((size_t)desc->vocab, sizeof *d->logits);
        d->entries = rf_alloc_zero((size_t)desc->vocab, sizeof *d->entries);
        if (!d->logits || !d->entries) return rf_fail(err, RF_ERR_MEMORY, "decoder: out of memory for logits");
    }
    if (o->kv && !causal)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "a cache budget is for autoregressive models, %s is not one",
                       desc->family);
    if (o->kv) return create_budget(d, o, err);
    if (o->reuse == RF_REUSE_FLASHBLOCK) d->num_slots = blocks ? block : d->capacity;

    rf_text_session_options so = rf_text_session_options_default();
    so.batch = d->has_cfg ? 2 : 1;
    so.capacity = d->capacity;
    so.max_rows = causal && o->prefill_chunk > 0 && o->prefill_chunk < d->capacity ? o->prefill_chunk : d->capacity;
    so.max_head_rows = causal ? (so.max_rows < 64 ? so.max_rows : 64) : d->capacity;
    so.keep_inputs = rules && rules->needs_inputs;
    so.keep_increments = rules && rules->needs_increments;
    so.external_slots = d->num_slots;
    so.use_graphs = o->use_graphs;
    so.tune_gemm = o->tune_gemm;
    so.gemm_tuning = o->gemm_tuning;
    RF_TRY(rf_text_session_create(&d->session, d->model, &so, err));
    if (o->guide) {
        if (o->guide->desc.vocab != desc->vocab)
            return rf_fail(err, RF_ERR_CONFIG, "the guide has %lld ids and the model %lld: they must share a tokenizer",
                           (long long)o->guide->desc.vocab, (long long)desc->vocab);
        RF_TRY(rf_guide_create(&d->guide, o->guide, o, d->capacity, err));
    }
    return RF_OK;
}

rf_status rf_decoder_create(rf_decoder **out, const rf_text_model *model, const rf_decode_options *options,
                            int32_t capacity, rf_error *err) {
    *out = NULL;
    rf_decoder *d = rf_alloc_zero(1, sizeof *d);
    if (!d) return rf_fail(err, RF_ERR_MEMORY, "decoder: out of memory");
    d->model = model;
    const rf_status st = create(d, options, capacity, err);
    if (st != RF_OK) {
        rf_decoder_destroy(d);
        return st;
    }
    *out = d;
    return RF_OK;
}

void rf_decoder_destroy(rf_decoder *d) {
    if (!d) return;
    rf_guide_destroy(d->guide);
    rf_text_session_destroy(d->session);
    rf_kv_session_destroy(d->kv);
    rf_policy_destroy((rf_policy *)d->row_policy);
    rf_free(d->policy_state);
    rf_free(d->lists);
    rf_free(d->masked);
    rf_free(d->confidence);
    rf_free(d->stats);
    rf_free(d->candidates);
    rf_free(d->logits);
    rf_free(d->entries);
    rf_free(d->trace);
    rf_free(d);
}

/* By what describes them: copies of a rule may differ in padding. */
static bool same_rule(const rf_kv_rule *a, const rf_kv_rule *b) {
    char text[2][1024];
    rf_kv_rule_describe(a, text[0], sizeof text[0]);
    rf_kv_rule_describe(b, text[1], sizeof text[1]);
    return strcmp(text[0], text[1]) == 0;
}

/* What the session's planes were made for must still be what is asked. */
static rf_status check_same_shape(const rf_decoder *d, const rf_decode_options *o, rf_error *err) {
    const rf_row_rules *have = rules_of(d->row_policy), *want = rules_of(o->row_policy);
    const char *what = NULL;
    if (want != have) what = "row policy";
    if (o->reuse == RF_REUSE_FLASHBLOCK && d->num_slots == 0) what = "attention reuse";
    if ((o->cfg_scale != 0.0) != d->has_cfg) what = "guidance (cfg)";
    if ((o->guide != NULL) != (d->guide != NULL)) what = "guide";
    if (rf_decode_needs_logits(o) && !d->logits) what = "sampling filter";
    if ((o->kv != NULL) != (d->kv != NULL) || (o->kv && !same_rule(o->kv, &d->kv_rule))) what = "kv rule";
    if (what) return rf_fail(err, RF_ERR_STATE, "%s differs from what the decoder was created with", what);
    return RF_OK;
}

rf_status rf_decoder_run(rf_decoder *d, const rf_decode_options *o, const int32_t *prompt, int32_t prompt_len,
                         rf_decode_progress progress, void *user, rf_decode_result *r, rf_error *err) {
    const rf_text_desc *desc = &d->model->desc;
    RF_TRY(rf_decode_options_check(o, d->model, prompt_len, err));
    RF_TRY(check_same_shape(d, o, err));
    if ((int64_t)prompt_len + o->max_new > d->capacity)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d prompt tokens and %d new ones: the decoder was made for %d",
                       (int)prompt_len, (int)o->max_new, (int)d->capacity);
    for (int32_t i = 0; i < prompt_len; i++)
        if (prompt[i] < 0 || prompt[i] >= desc->vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "prompt token %d is id %d: the model has ids 0..%lld", (int)i,
                           (int)prompt[i], (long long)desc->vocab - 1);
    memset(r, 0, sizeof *r);
    memcpy(d->tokens, prompt, (size_t)prompt_len * sizeof *prompt);
    d->trace_len = 0;
    if (d->trace) d->trace[0] = '\0';
    if (d->session) rf_text_session_reset_counts(d->session);
    if (d->kv) rf_kv_session_reset_counts(d->kv);
    if (d->guide) rf_guide_reset(d->guide);
    d->run_started_ms = rf_decode_now_ms();
    if (d->kv) {
        RF_TRY(rf_decode_budget(d, o, prompt_len, progress, user, r, err));
        r->tokens = d->tokens + prompt_len;
        return RF_OK;
    }
    if (desc->attention == RF_TEXT_CAUSAL)
        RF_TRY(rf_decode_causal(d, o, prompt_len, progress, user, r, err));
    else
        RF_TRY(rf_decode_diffusion(d, o, prompt_len, progress, user, r, err));

    const rf_text_session_info info = rf_text_session_get_info(d->session);
    r->tokens = d->tokens + prompt_len;
    r->num_forwards = info.num_passes;
    r->row_passes = info.row_passes;
    r->key_reads = info.key_reads;
    r->head_rows = info.head_rows;
    r->cache_bytes = info.cache_bytes;
    r->plane_bytes = info.plane_bytes;
    r->arena_bytes = info.arena_bytes + (d->guide ? rf_guide_bytes(d->guide) : 0);
    r->num_graphs = info.num_graphs;
    r->guide_forwards = d->guide ? rf_guide_forwards(d->guide) : 0;
    return RF_OK;
}

rf_status rf_decode_sample(rf_decoder *d, const rf_decode_options *o, int32_t row, int32_t step, int32_t position,
                           int32_t history, rf_token_stats *stats, rf_error *err) {
    enum { STREAM_SAMPLE = 4 }; /* of the counter generator: dlm/commit.c has the others */
    if (d->kv)
        RF_TRY(rf_kv_session_read_logits(d->kv, row, d->logits, err));
    else
        RF_TRY(rf_text_session_read_logits(d->session, row, d->logits, err));
    if (d->model->desc.mask_id >= 0 && !o->allow_mask) d->logits[d->model->desc.mask_id] = -INFINITY;
    const rf_sampling s = {.temperature = o->temperature,
                           .top_k = o->top_k,
                           .top_p = o->top_p,
                           .min_p = o->min_p,
                           .repetition_penalty = o->repetition_penalty,
                           .history = d->tokens,
                           .num_history = history,
                           .uniform = rf_commit_uniform(o->seed, STREAM_SAMPLE, step, position)};
    rf_sample_row(&s, d->logits, (int32_t)d->model->desc.vocab, d->entries, stats);
    return RF_OK;
}

rf_status rf_decode_trace(rf_decoder *d, const rf_decode_options *o, rf_error *err, const char *format, ...) {
    if (!o->record_trace) return RF_OK;
    char line[256];
    va_list args;
    va_start(args, format);
    const int len = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    const size_t bytes = len < 0 ? 0 : (size_t)len < sizeof line ? (size_t)len : sizeof line - 1;
    if (d->trace_len + bytes + 2 > d->trace_room) {
        const size_t room = 2 * d->trace_room + 4096;
        char *grown = rf_realloc(d->trace, room);
        if (!grown) return rf_fail(err, RF_ERR_MEMORY, "trace: out of memory");
        d->trace = grown;
        d->trace_room = room;
    }
    memcpy(d->trace + d->trace_len, line, bytes);
    d->trace_len += bytes;
    d->trace[d->trace_len++] = '\n';
    d->trace[d->trace_len] = '\0';
    return RF_OK;
}

rf_status rf_decoder_write_trace(const rf_decoder *d, rf_decode_line line, void *user, rf_error *err) {
    if (d->trace_len == 0) return rf_fail(err, RF_ERR_STATE, "no trace was recorded");
    char *copy = rf_strdup(d->trace);
    if (!copy) return rf_fail(err, RF_ERR_MEMORY, "trace: out of memory");
    for (char *at = copy, *end; (end = strchr(at, '\n')) != NULL; at = end + 1) {
        *end = '\0';
        line(user, at);
    }
    rf_free(copy);
    return RF_OK;
}

rf_status rf_decoder_nll(rf_decoder *d, const int32_t *tokens, int32_t len, int32_t from, double *nll, rf_error *err) {
    if (d->model->desc.attention != RF_TEXT_CAUSAL)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "the likelihood of a text is for autoregressive models");
    if (from < 1 || from >= len || len > d->capacity)
        return rf_fail(err, RF_ERR_ARGUMENT, "tokens %d to %d: 1 <= from < length <= %d is wanted", (int)from, (int)len,
                       (int)d->capacity);
    if (d->kv) return rf_decode_budget_nll(d, tokens, len, from, nll, err);
    enum { CHUNK = 64 };
    double sum = 0.0;
    for (int32_t begin = 0; begin < len - 1;) {
        /* rows that predict nothing wanted go in large passes */
        int32_t end = begin < from - 1 ? from - 1 : begin + CHUNK;
        if (end > len - 1) end = len - 1;
        const int32_t heads = begin < from - 1 ? 0 : end - begin;
        rf_text_pass p = rf_text_pass_default();
        p.num_rows = end - begin;
        p.rows = d->positions + begin;
        p.tokens = tokens + begin;
        p.visible_end = &end;
        p.mask = RF_MASK_CAUSAL;
        p.num_head_rows = heads;
        p.head_rows = d->positions;
        p.head_refs = heads > 0 ? tokens + begin + 1 : NULL;
        RF_TRY(rf_text_session_forward(d->session, &p, err));
        if (heads > 0) RF_TRY(rf_text_session_read_stats(d->session, d->stats, err));
        for (int32_t i = 0; i < heads; i++)
            sum -= log(d->stats[i].ref_prob > 1e-30f ? (double)d->stats[i].ref_prob : 1e-30);
        begin = end;
    }
    *nll = sum / (len - from);
    return RF_OK;
}
