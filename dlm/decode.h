/* dlm/decode.h - decoding: tokens of a prompt to tokens of an answer, autoregressively or by diffusion.
 *
 * Four independent axes of diffusion decoding: row policy (which rows a pass computes: caching/rows) x commit rule (which masks become
 * tokens) x end-of-text rule x attention reuse. Autoregressive decoding is the same session with one row a pass.
 * Sources: Nie et al. 2025 (LLaDA), Ye et al. 2025 (Dream), Cheng et al. 2025 (SDAR), Wu et al. 2025 (Fast-dLLM: threshold and factor),
 *          Ben-Hamu et al. 2025 (entropy bound), Hu et al. 2025 (guided diffusion, FreeCache), FlashBlock 2026. See docs/text.md. */
#ifndef RF_DLM_DECODE_H
#define RF_DLM_DECODE_H

#include "caching/rows/rows.h"
#include "dlm/kv_session.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    RF_COMMIT_TOPN = 0,      /* the schedule's count (steps), most confident first */
    RF_COMMIT_THRESHOLD,     /* all with confidence >= threshold, and always the best */
    RF_COMMIT_FACTOR,        /* the largest n with (n + 1)(1 - c_n) < factor, at least one */
    RF_COMMIT_ENTROPY_BOUND, /* sorted by entropy: longest prefix with sum - max <= bound, at least one */
    RF_COMMIT_GUIDED,    /* the longest prefix of the draft that a small autoregressive model accepts, at least one */
    RF_COMMIT_SCHEDULE,  /* Dream: floor(masks * (1 - s/t)) a step, alg_temp */
    RF_COMMIT_ORIGIN,    /* Dream's "origin": every mask with probability 1 - s/t */
    RF_COMMIT_SEQUENTIAL /* the first n masks, left to right */
} rf_commit_rule;
typedef enum {
    RF_CONFIDENCE_PROB = 0,
    RF_CONFIDENCE_MARGIN,
    RF_CONFIDENCE_NEG_ENTROPY,
    RF_CONFIDENCE_RANDOM
} rf_confidence;
typedef enum {
    RF_END_NONE = 0, /* decode the whole canvas */
    RF_END_TRUNCATE, /* an end-of-text token that is committed cuts the canvas behind it; masks before it go on */
    RF_END_FILL,     /* masks behind it become end-of-text */
    RF_END_STOP /* stop when an end-of-text token is committed and no mask is left before it (block-wise: after its block) */
} rf_end_rule;
typedef enum { RF_REUSE_NONE = 0, RF_REUSE_FLASHBLOCK } rf_attention_reuse;
typedef enum {
    RF_ACCEPT_TOP1 = 0,
    RF_ACCEPT_TOPK,
    RF_ACCEPT_PROB
} rf_accept; /* guided: argmax, among the k best, p > threshold */

typedef struct {
    int32_t max_new; /* tokens to make; diffusion: length of the canvas. Default 128 */
    uint64_t seed;
    /* distribution; all 0 / 1 = greedy */
    double temperature;
    int32_t top_k; /* 0 = off */
    double top_p;  /* 1 = off */
    double min_p;  /* 0 = off */
    double
        repetition_penalty; /* autoregressive; 1 = off: z / penalty if z > 0 else z * penalty, over prompt and output */
    int32_t stop_ids[16];   /* further ids that end the text */
    int num_stop_ids;
    bool ignore_eos;

    /* diffusion */
    int32_t
        steps; /* topn, schedule: passes in all; 0 = max_new (one token a pass); block diffusion: per block, 0 = block */
    int32_t block; /* tokens a block; 0 = the model's default (block-causal), else max_new: one block */
    rf_commit_rule commit;
    rf_confidence confidence;
    double threshold, factor, entropy_bound; /* 0.9, 1.0, 0.001 */
    bool threshold_strict;                   /* c > threshold instead of >= */
    bool dynamic;     /* SDAR low_confidence_dynamic: all above threshold if at least n of them, else the n best */
    double alg_temp;  /* Dream: 0 = take the n best, else draw without replacement */
    double cfg_scale; /* LLaDA: 0 = off */
    rf_end_rule end;
    const rf_policy *row_policy; /* family "row"; NULL = none; borrowed */
    bool force_policy;
    bool
        allow_mask; /* the mask id may be predicted, as the references let it (the position stays a mask); default false */
    rf_attention_reuse reuse;
    int32_t reuse_refresh;      /* everything is refreshed when so many tokens changed since (tau); default 2 */
    bool reuse_refresh_rows;    /* rows just committed are refreshed alone */
    const rf_text_model *guide; /* RF_COMMIT_GUIDED; borrowed */
    rf_accept accept;
    int32_t accept_k;        /* 5 */
    double accept_threshold; /* 0.1 */
    int32_t guide_chunk;     /* tokens verified a pass; 32 */

    /* autoregressive: a cache budget (dlm/kv_session.h). NULL = the plain cache; borrowed while the decoder is made. */
    const rf_kv_rule *kv;
    int32_t kv_budget; /* tokens a layer and key head; 0 = from kv_ratio */
    double kv_ratio;   /* of the compressed tokens; 1 = all */
    /* So many tokens of the prompt are compressed as if nothing followed, the rest is fed behind; 0 = all. A decoder that
     * was made with 0 has no room for such a rest. */
    int32_t kv_context;

    const int32_t
        *kv_external; /* rules with queries=external: the prompt that asks; borrowed while the decoder is made */
    int32_t num_kv_external;

    int32_t prefill_chunk; /* rows of a prefill pass; 0 = all */
    bool use_graphs, tune_gemm;
    const char *gemm_tuning;
    bool record_trace;
} rf_decode_options;
rf_decode_options rf_decode_options_default(const rf_text_model *model);
rf_status rf_decode_options_check(const rf_decode_options *options, const rf_text_model *model, int32_t prompt_len,
                                  rf_error *err);

typedef struct {
    int32_t num_tokens;    /* before the first end of text (or stop id) */
    const int32_t *tokens; /* [num_tokens], then all made: [num_all]; borrowed until the next run */
    int32_t num_all;
    bool ended;           /* by end of text, a stop id or the callback */
    int64_t num_forwards; /* NFE of the model; guide passes apart */
    int64_t guide_forwards;
    int64_t row_passes, key_reads, head_rows;
    double prefill_ms, decode_ms, guide_ms, plan_ms; /* wall; plan: host work of policies and commits */
    size_t cache_bytes, plane_bytes, arena_bytes;
    int64_t refreshes;                                 /* passes that renewed everything */
    int64_t external_rows_reused, external_rows_fresh; /* attention reuse, rows x passes */
    int num_graphs;
    /* with a cache budget, at the end of the run: what is kept and what a full cache would be */
    size_t kv_kept_bytes, kv_full_bytes, kv_pool_bytes;
    int64_t kv_evictions;
    double kv_score_ms, kv_step_score_ms; /* behind the prompt, and while decoding */
    int32_t kv_budget;                    /* tokens; 0 = no limit */
} rf_decode_result;

/* Called after each pass (diffusion: the canvas as it stands, masks included) or token (autoregressive: all new tokens so far).
 * changed: indices into canvas that were committed by this pass. Return false to stop. */
typedef bool (*rf_decode_progress)(void *user, const int32_t *canvas, int32_t length, const int32_t *changed,
                                   int32_t num_changed);

typedef struct rf_decoder rf_decoder; /* a session (two with a guide) that serves runs of up to `capacity` tokens */
rf_status rf_decoder_create(rf_decoder **out, const rf_text_model *model, const rf_decode_options *options,
                            int32_t capacity, rf_error *err);
void rf_decoder_destroy(rf_decoder *decoder); /* NULL is a no-op */
/* options as at create in what shapes the session (row_policy's planes, reuse, cfg, guide); the rest may differ from run to run. */
rf_status rf_decoder_run(rf_decoder *decoder, const rf_decode_options *options, const int32_t *prompt,
                         int32_t prompt_len, rf_decode_progress progress, void *user, rf_decode_result *result,
                         rf_error *err);
/* The session with a cache budget, NULL without: what it keeps can be read between runs. */
rf_kv_session *rf_decoder_kv(const rf_decoder *decoder);
/* One line a pass: step, block, rows, visible, candidates, committed, refresh, reuse. After a run with record_trace. */
typedef void (*rf_decode_line)(void *user, const char *line);
rf_status rf_decoder_write_trace(const rf_decoder *decoder, rf_decode_line line, void *user, rf_error *err);

/* Mean negative log-likelihood (nats a token) of tokens[from..len) of an autoregressive or block-causal model, teacher forced. */
rf_status rf_decoder_nll(rf_decoder *decoder, const int32_t *tokens, int32_t len, int32_t from, double *nll,
                         rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
