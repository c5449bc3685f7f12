/* dlm/kv_session.h - an autoregressive model with its cache under a budget.
 *
 * A session serves `batch` sequences. A prompt is computed layer by layer: all of its rows go through one layer, in chunks, with that
 * layer's keys and values in a staging plane; then the layer is measured, the book (caching/kv/kv.h) says what stays, and only that is
 * copied to the pool. So the peak is one layer's full cache plus the budget, and what stays is what a rule behind a whole prefill would
 * keep, exactly: a layer's cache is used by no other layer. Then tokens follow one a pass: each is appended in every layer and head,
 * attention reads the listed rows of the pool, and rules that work while decoding measure and drop.
 *
 * Positions are the tokens' true ones, unless the rule says otherwise: CACHE keeps keys unturned and turns them while they are read, by
 * their place in the cache; DELTA turns kept keys once to their new places behind the prefill.
 * Device: lists and lengths are device memory, a decode pass is one CUDA graph; rules of RF_KV_EVICT_* kind run in it. Rules that drop
 * by sums and norms have two staging planes in turn: the host chooses for a layer while the device computes the next one. Rules whose
 * decisions are made on the host wait for the device when they decide (RF_KV_AT_EVERY, RF_KV_AT_HIGH: rarely). */
#ifndef RF_DLM_KV_SESSION_H
#define RF_DLM_KV_SESSION_H

#include "caching/kv/kv.h"
#include "dlm/forward.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_kv_session rf_kv_session;

typedef struct {
    rf_kv_rule rule;
    int32_t budget; /* tokens a layer and key head; 0 = from ratio */
    double
        ratio; /* of the prompt: budget = (int)(ratio * tokens of the prompt), at least what the rule protects; 1 = all. A rule of
                  action SELECT keeps all: budget and ratio are what a step reads, 0 and 0 the rule's own size */
    int32_t batch;         /* default 1 */
    int32_t max_prompt;    /* tokens of a prompt */
    int32_t max_new;       /* tokens behind what is compressed: the rest of a prompt behind its context counts */
    int32_t prefill_chunk; /* rows computed at once; 0 = 1024 */
    rf_dtype residual_dtype;
    bool use_graphs, tune_gemm;
    const char *gemm_tuning;
    /* Rules with queries=external: tokens of the prompt whose queries score each block of a context (EpiCache: an episode's), copied. */
    const int32_t *external;
    int32_t num_external;
    const char *calibration; /* file of a rule's tables or gates, or NULL: the model folder's */
} rf_kv_session_options;
rf_kv_session_options rf_kv_session_options_default(void);

/* model is borrowed; autoregressive ones only (RF_ERR_UNSUPPORTED). RF_ERR_DEVICE_MEMORY says what was wanted. */
rf_status rf_kv_session_create(rf_kv_session **out, const rf_text_model *model, const rf_kv_session_options *options,
                               rf_error *err);
void rf_kv_session_destroy(rf_kv_session *session); /* NULL is a no-op */

/* What the next tokens are drawn with; default greedy. */
typedef struct {
    float temperature;
    uint64_t seed;
    bool keep_logits;
} rf_kv_draw;
rf_status rf_kv_session_set_draw(rf_kv_session *session, const rf_kv_draw *draw, rf_error *err);

/* A new sequence: its cache is emptied and the prompt tokens[0..num) computed; `context` of them (0 = all) are compressed as if
 * nothing followed (question-agnostic), the rest are appended token by token behind that. budget, ratio: of this sequence
 * (0 = the options'). The statistics of its last row can be read afterwards. */
rf_status rf_kv_session_prefill(rf_kv_session *session, int32_t sequence, const int32_t *tokens, int32_t num,
                                int32_t context, int32_t budget, double ratio, rf_error *err);
/* One token of every sequence (tokens[batch]; -1: that sequence rests). RF_ERR_STATE: max_new is used up. */
rf_status rf_kv_session_step(rf_kv_session *session, const int32_t *tokens, rf_error *err);
/* Waits. stats host [batch] of the last prefill (its sequence alone) or step. */
rf_status rf_kv_session_read_stats(rf_kv_session *session, rf_token_stats *stats, rf_error *err);
rf_status rf_kv_session_read_logits(rf_kv_session *session, int32_t sequence, float *logits, rf_error *err);

typedef struct {
    int64_t num_passes, row_passes, key_reads, evictions;
    int64_t kept_slots,
        full_slots;                /* now: slots of all layers, heads and sequences; and what a full cache would have */
    size_t kept_bytes, full_bytes; /* their keys and values, with scales, lists and statistics of the rule */
    size_t pool_bytes, staging_bytes, arena_bytes; /* taken; arena: of the device in all, the other two among it */
    /* Wall. score_ms: what the host did to score and compact prompts, with the waits that this took; score_wait_ms: the part of it
     * that the device stood still for (all of it, unless layers are chosen while later ones are computed); prefill_ms: prompts
     * without that part, so that prefill_ms + score_wait_ms is what they took. While decoding: what the host waited for. */
    double prefill_ms, score_ms, score_wait_ms, step_score_ms;
    int32_t budget; /* of the last sequence */
    int graph_nodes;
} rf_kv_session_info;
rf_kv_session_info rf_kv_session_get_info(const rf_kv_session *session);
void rf_kv_session_reset_counts(rf_kv_session *session);

/* Positions that a head keeps, ascending: waits for the device where the lists live there. out has room for max_prompt + max_new. */
rf_status rf_kv_session_read_positions(rf_kv_session *session, int32_t sequence, int layer, int head, int32_t *out,
                                       int32_t *num, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
