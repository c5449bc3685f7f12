/* dlm/decode_internal.h - what the decoding loops share. */
#ifndef RF_DLM_DECODE_INTERNAL_H
#define RF_DLM_DECODE_INTERNAL_H

#include "dlm/commit.h"
#include "dlm/decode.h"
#include "dlm/guide.h"
#include "dlm/sampling.h"

struct rf_decoder {
    const rf_text_model *model;
    rf_text_session *session; /* one of the two */
    rf_kv_session *kv;
    rf_kv_rule kv_rule;
    rf_guide *guide;
    int32_t capacity;  /* rows, whole blocks */
    int32_t num_slots; /* of external attention */
    bool has_cfg;
    const rf_policy *row_policy; /* a clone: what the planes were made for */

    /* the sequence; [capacity] each */
    int32_t *tokens, *commit_step, *order, *positions; /* positions: 0, 1, 2, ... */
    uint8_t *masked, *decoded;
    float *confidence, *priority;

    /* a plan and the pass made of it */
    int32_t *lists; /* one block for all lists below */
    int32_t *plan_rows, *plan_visible, *plan_candidates, *plan_window, *committed;
    int32_t *pass_rows, *pass_tokens, *head_rows, *head_keys; /* [2 * capacity]: two sequences with guidance */
    int32_t *slots, *fresh, *slot_position; /* attention reuse: slot_position[slot] = row it was made for, -1 */
    int32_t *tracked, *next_tracked;        /* [num_layers] */
    rf_token_stats *stats;
    rf_candidate *candidates;
    void *policy_state;
    size_t policy_state_bytes;

    /* sampling that needs whole rows of logits */
    float *logits; /* [vocab] */
    rf_sampling_entry *entries;

    char *trace;
    size_t trace_len, trace_room;

    double run_started_ms;
};

double rf_decode_now_ms(void);
/* Does the distribution need whole rows of logits? */
bool rf_decode_needs_logits(const rf_decode_options *options);
bool rf_decode_is_end(const rf_decoder *decoder, const rf_decode_options *options, int32_t token);
/* Logits, sampling settings and statistics of head row `row` of the last pass. */
rf_status rf_decode_sample(rf_decoder *d, const rf_decode_options *o, int32_t row, int32_t step, int32_t position,
                           int32_t history, rf_token_stats *stats, rf_error *err);
/* Appends a line to the trace, if one is recorded. */
rf_status rf_decode_trace(rf_decoder *d, const rf_decode_options *o, rf_error *err, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 4, 5)))
#endif
    ;

rf_status rf_decode_causal(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                           void *user, rf_decode_result *r, rf_error *err);
/* The same with a cache budget. */
rf_status rf_decode_budget(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                           void *user, rf_decode_result *r, rf_error *err);
/* tokens[0..from) are a prompt, the others follow one by one. */
rf_status rf_decode_budget_nll(rf_decoder *d, const int32_t *tokens, int32_t len, int32_t from, double *nll,
                               rf_error *err);
rf_status rf_decode_diffusion(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                              void *user, rf_decode_result *r, rf_error *err);

#endif
