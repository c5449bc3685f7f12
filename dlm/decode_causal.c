/* dlm/decode_causal.c - autoregressive decoding: a prefill in chunks, then a row a pass; with the plain cache, or
 * with one under a budget. */
#include <math.h>

#include "dlm/decode_internal.h"

static rf_status forward(rf_decoder *d, const rf_decode_options *o, int32_t begin, int32_t end, bool head, int32_t step,
                         rf_error *err) {
    const int32_t last = end - begin - 1;
    rf_text_pass p = rf_text_pass_default();
    p.num_rows = end - begin;
    p.rows = d->positions + begin;
    p.tokens = d->tokens + begin;
    p.visible_end = &end;
    p.mask = end - begin > 1 ? RF_MASK_CAUSAL : RF_MASK_NONE;
    p.num_head_rows = head ? 1 : 0;
    p.head_rows = &last;
    p.head_keys = &end; /* the position that is predicted */
    p.keep_logits = head && rf_decode_needs_logits(o);
    p.temperature = (float)(p.keep_logits ? 0.0 : o->temperature);
    p.seed = o->seed;
    p.step = step;
    return rf_text_session_forward(d->session, &p, err);
}

/* The next token's pass; position: where it stands. */
typedef rf_status (*next_pass)(rf_decoder *d, const rf_decode_options *o, int32_t position, int32_t step,
                               rf_error *err);

static rf_status next_plain(rf_decoder *d, const rf_decode_options *o, int32_t position, int32_t step, rf_error *err) {
    return forward(d, o, position, position + 1, true, step, err);
}

static rf_status next_budget(rf_decoder *d, const rf_decode_options *o, int32_t position, int32_t step, rf_error *err) {
    return rf_kv_session_step(d->kv, d->tokens + position, err);
}

static rf_status generate(rf_decoder *d, const rf_decode_options *o, int32_t prompt, next_pass next,
                          rf_decode_progress progress, void *user, rf_decode_result *r, rf_error *err) {
    int32_t made = 0;
    for (;;) {
        rf_token_stats stats;
        if (rf_decode_needs_logits(o))
            RF_TRY(rf_decode_sample(d, o, 0, made, prompt + made, prompt + made, &stats, err));
        else if (d->kv)
            RF_TRY(rf_kv_session_read_stats(d->kv, &stats, err));
        else
            RF_TRY(rf_text_session_read_stats(d->session, &stats, err));
        if (made == 0) r->prefill_ms = rf_decode_now_ms() - d->run_started_ms;
        d->tokens[prompt + made] = stats.id;
        d->confidence[prompt + made] = stats.prob;
        RF_TRY(rf_decode_trace(d, o, err, "token=%d id=%d prob=%.6f rows=%d visible=%d", (int)made, (int)stats.id,
                               stats.prob, made == 0 ? (int)prompt : 1, (int)(prompt + made)));
        made++;
        const bool ended = rf_decode_is_end(d, o, stats.id);
        const int32_t newest = made - 1;
        const bool stopped = progress && !progress(user, d->tokens + prompt, made, &newest, 1);
        r->ended = ended || stopped;
        r->num_tokens = ended ? made - 1 : made;
        r->num_all = made;
        if (r->ended || made == o->max_new) break;
        RF_TRY(next(d, o, prompt + made - 1, made, err));
    }
    r->decode_ms = rf_decode_now_ms() - d->run_started_ms - r->prefill_ms;
    return RF_OK;
}

rf_status rf_decode_causal(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                           void *user, rf_decode_result *r, rf_error *err) {
    const int32_t chunk = o->prefill_chunk > 0 ? o->prefill_chunk : d->capacity;
    for (int32_t begin = 0; begin < prompt; begin += chunk) {
        const int32_t end = prompt - begin < chunk ? prompt : begin + chunk;
        RF_TRY(forward(d, o, begin, end, end == prompt, 0, err));
    }
    return generate(d, o, prompt, next_plain, progress, user, r, err);
}

rf_status rf_decode_budget(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                           void *user, rf_decode_result *r, rf_error *err) {
    const bool filters = rf_decode_needs_logits(o);
    const rf_kv_draw draw = {
        .temperature = (float)(filters ? 0.0 : o->temperature), .seed = o->seed, .keep_logits = filters};
    const int32_t context = o->kv_context < prompt ? o->kv_context : 0;
    RF_TRY(rf_kv_session_set_draw(d->kv, &draw, err));
    RF_TRY(rf_kv_session_prefill(d->kv, 0, d->tokens, prompt, context, o->kv_budget, o->kv_ratio, err));
    RF_TRY(generate(d, o, prompt, next_budget, progress, user, r, err));
    const rf_kv_session_info info = rf_kv_session_get_info(d->kv);
    r->num_forwards = info.num_passes + 1;
    r->row_passes = info.row_passes;
    r->key_reads = info.key_reads;
    r->head_rows = r->num_all;
    r->cache_bytes = info.pool_bytes;
    r->plane_bytes = info.staging_bytes;
    r->arena_bytes = info.arena_bytes;
    r->num_graphs = info.graph_nodes > 0;
    r->plan_ms = info.step_score_ms;
    r->kv_kept_bytes = info.kept_bytes;
    r->kv_full_bytes = info.full_bytes;
    r->kv_pool_bytes = info.pool_bytes;
    r->kv_evictions = info.evictions;
    r->kv_score_ms = info.score_ms;
    r->kv_step_score_ms = info.step_score_ms;
    r->kv_budget = info.budget;
    return RF_OK;
}

static double log_prob(const float *logits, int64_t vocab, int32_t id) {
    double most = -INFINITY, sum = 0.0;
    for (int64_t v = 0; v < vocab; v++) most = (double)logits[v] > most ? (double)logits[v] : most;
    for (int64_t v = 0; v < vocab; v++) sum += exp((double)logits[v] - most);
    return (double)logits[id] - most - log(sum);
}

rf_status rf_decode_budget_nll(rf_decoder *d, const int32_t *tokens, int32_t len, int32_t from, double *nll,
                               rf_error *err) {
    const rf_kv_draw draw = {.keep_logits = true};
    const int64_t vocab = d->model->desc.vocab;
    double sum = 0.0;
    RF_TRY(rf_kv_session_set_draw(d->kv, &draw, err));
    RF_TRY(rf_kv_session_prefill(d->kv, 0, tokens, from, 0, 0, 0.0, err));
    for (int32_t i = from; i < len; i++) {
        RF_TRY(rf_kv_session_read_logits(d->kv, 0, d->logits, err));
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "token %d is id %d, expected 0..%lld", (int)i, (int)tokens[i],
                           (long long)vocab - 1);
        sum -= log_prob(d->logits, vocab, tokens[i]);
        if (i + 1 < len) RF_TRY(rf_kv_session_step(d->kv, tokens + i, err));
    }
    *nll = sum / (len - from);
    return RF_OK;
}
