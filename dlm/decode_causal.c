/* dlm/decode_causal.c - autoregressive decoding: a prefill in chunks, then a row a pass. */
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

rf_status rf_decode_causal(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                           void *user, rf_decode_result *r, rf_error *err) {
    const int32_t chunk = o->prefill_chunk > 0 ? o->prefill_chunk : d->capacity;
    for (int32_t begin = 0; begin < prompt; begin += chunk) {
        const int32_t end = prompt - begin < chunk ? prompt : begin + chunk;
        RF_TRY(forward(d, o, begin, end, end == prompt, 0, err));
    }
    int32_t made = 0;
    for (;;) {
        rf_token_stats stats;
        if (rf_decode_needs_logits(o))
            RF_TRY(rf_decode_sample(d, o, 0, made, prompt + made, prompt + made, &stats, err));
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
        RF_TRY(forward(d, o, prompt + made - 1, prompt + made, true, made, err));
    }
    r->decode_ms = rf_decode_now_ms() - d->run_started_ms - r->prefill_ms;
    return RF_OK;
}
