/* dlm/forward.h - the executor of text models: one session is one batch of sequences with their key/value caches.
 *
 * A pass computes listed rows of each sequence: embeds their tokens, writes their keys and values into the cache at
 * their positions, attends to the listed (or first so many) cache rows, and takes statistics of the head at listed
 * rows. What is computed, seen and asked for comes from the caller pass by pass (rf_text_pass); the session holds no
 * policy.
 *
 * Lifetimes: model (shared) -> session (arena, caches, graphs) -> pass (plain data, read during the call).
 * Device: one upload a pass carries every list (a page-locked block); kernels read counts and lists from device memory,
 * so a pass is one CUDA graph, captured once for each bucket of (rows, visible rows, head rows, what else is asked).
 * Buckets pad: a padding row goes to the dump row of the cache and is seen by nobody. On the host nothing is padded,
 * and nothing is captured.
 *
 * Waiting: session creation chooses GEMM algorithms for passes of one row, of a block and of max_rows. Another bucket's
 * first pass runs directly, chooses its own (with tune_gemm: times them) and is captured: it may allocate and wait.
 * Every later pass allocates nothing and waits for nothing, but for a drift pass, which waits once for what it
 * measured; read_* wait once a pass. The 64 buckets used last stay captured. Seed and temperature are part of a bucket
 * if there is a temperature.
 * Same rows, same bucket, same bits. */
#ifndef RF_DLM_FORWARD_H
#define RF_DLM_FORWARD_H

#include "dlm/model.h"
#include "kernels/ops.h"
#include "kernels/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_text_session rf_text_session;

typedef struct {
    int batch;             /* sequences; default 1 */
    int32_t capacity;      /* rows of a sequence's cache (prompt and output); <= model's max_positions */
    int32_t max_rows;      /* most rows of a pass and sequence; 0 = capacity */
    int32_t max_head_rows; /* most rows of a pass and sequence that go through the head; 0 = max_rows. Longer lists than
                              a backend's chunk are worked off in chunks */
    bool keep_inputs;      /* planes for RF_PASS_DRIFT: each layer's input of every row, and its q */
    bool keep_increments;  /* planes for RF_PASS_VERIFY: attention and FFN increments of every row */
    int32_t external_slots; /* rows whose block-external attention is kept (f32 out and lse in every layer); 0 = none */
    /* 0 = planes for the keys and values of every layer. Else only so many, layer l in plane l mod layer_planes: layers are run one
     * after the other over all rows (dlm/kv_session.h), and rf_text_session_forward refuses. */
    int layer_planes;
    rf_dtype residual_dtype; /* RF_DTYPE_COUNT = f32 on the host, bf16 models: f32 too unless said otherwise */
    bool use_graphs;         /* CUDA; default true */
    bool tune_gemm;
    /* as in rf_image_options (dit/pipeline.h); borrowed until destroy, which saves what later buckets chose */
    const char *gemm_tuning;
} rf_text_session_options;
rf_text_session_options rf_text_session_options_default(void);

/* The session has a stream of its own; model is borrowed. RF_ERR_DEVICE_MEMORY says what was wanted. Planes (keep_*,
 * external_slots) are for a batch of one. */
rf_status rf_text_session_create(rf_text_session **out, const rf_text_model *model,
                                 const rf_text_session_options *options, rf_error *err);
void rf_text_session_destroy(rf_text_session *session); /* NULL is a no-op */

typedef enum { RF_EXTERNAL_NONE = 0, RF_EXTERNAL_USE } rf_external;
typedef enum { RF_PASS_SAME = 0, RF_PASS_DRIFT, RF_PASS_VERIFY } rf_pass_layers;

/* Lists are host memory, [batch][n] with n common to the batch; a shorter sequence repeats -1 at its end (a padding
 * row). */
typedef struct {
    int32_t num_rows;           /* n */
    const int32_t *rows;        /* [batch][num_rows] positions, ascending */
    const int32_t *tokens;      /* [batch][num_rows] ids */
    const int32_t *visible_end; /* [batch]: cache rows 0..visible_end-1 are seen */
    const int32_t *visible;     /* batch 1 only: [num_visible] positions instead, ascending; NULL */
    int32_t num_visible;
    /* NONE: every row sees all that is visible. CAUSAL, BLOCK_CAUSAL (mask_block): by position; rows must be contiguous
     * then, unless all rows of a sequence see the same keys (one row; rows of one block): that is a shorter list of
     * keys, and runs as one */
    rf_mask mask;
    int32_t mask_block;
    int32_t num_head_rows;    /* h */
    const int32_t *head_rows; /* [batch][num_head_rows]: index into rows (0..num_rows-1), -1 = padding */
    const int32_t *head_keys; /* [batch][num_head_rows] RNG keys, or NULL = the rows' positions */
    const int32_t *head_refs; /* [batch][num_head_rows] ids whose probability is wanted, or NULL */
    bool rank_of_ref, round_logits;
    float temperature;
    float logit_scale; /* statistics are of z times it; 0 counts as 1 */
    uint64_t seed;
    int32_t step; /* of the RNG */
    int32_t bans[8];
    int num_bans;
    bool keep_logits; /* z of the head rows are kept as f32 [batch * h, vocab] too, as they come out of the model: no
                         bans, scale or rounding (sampling that needs all of it; tests): at most 64 rows a pass on CUDA, else
                         RF_ERR_ARGUMENT. Room for them is taken with the first such pass */
    /* Classifier-free guidance: head rows come in pairs of sequences (2i unconditional, 2i + 1 conditional); hidden
     * states are combined before the head, h = h_u + cfg * (h_c - h_u), which is the same as combining logits; stats,
     * logits and hidden states are of the pair, keys and refs those of sequence 2i, and read_* give both sequences the
     * same. 0 = off */
    float cfg;

    /* Attention reuse (FlashBlock), batch 1: keys visible outside [inside_begin, inside_end) are external. Rows of the
     * pass have a slot each (external_slot[i], 0..external_slots-1); those in fresh (indices into rows) compute
     * external attention now and keep it, the others take what their slot holds (RF_ERR_ARGUMENT if nothing). out =
     * merge(external, inside) by log-sum-exp. Not with a mask between the rows, nor with layer rules. */
    rf_external external;
    int32_t inside_begin, inside_end;
    const int32_t *external_slot; /* [num_rows], one each */
    const int32_t *fresh;         /* [num_fresh] ascending */
    int32_t num_fresh;

    rf_pass_layers layers;
    /* RF_PASS_DRIFT, batch 1 (keep_inputs), mask NONE. rows == every visible row: a full pass, which fills the planes
     * and chooses what is tracked. Otherwise every visible row must have been in a full pass. A layer drifts if the
     * similarity of its tracked row's attention before and after this pass' rows falls below the threshold; all layers
     * behind the first that does compute all rows. Passes of other kinds leave the planes as they are. */
    struct {
        double threshold;
        bool over_heads;        /* mean over keys of cosines over heads, instead of over heads of cosines over keys */
        const int32_t *tracked; /* [num_layers] position tracked by the pass before, -1 = none; each in rows */
        const int32_t *window;  /* indices into rows; their attention chooses what is tracked next (none: nothing) */
        int32_t num_window;
        const uint8_t *decoded; /* [capacity] by position: may be tracked */
        int32_t force_from;     /* all rows from this layer on, if none before it drifted; -1 = by drift */
        const int32_t *all_rows, *all_tokens; /* every visible row, for an expansion */
        int32_t num_all;
    } drift;
    /* RF_PASS_VERIFY, batch 1 (keep_increments), no mask between rows. Rows of the segment must have been in a pass
     * that stores before. Rows of the pass outside the segment are computed fully. */
    struct {
        double ratio;        /* floor(ratio * n) of the segment's n rows are computed; 0 compares and renews nothing */
        bool store;          /* compute everything, write planes */
        int32_t full_layers; /* so many first layers compute the whole segment */
        int32_t begin, end;  /* the segment: positions */
    } verify;
} rf_text_pass;
rf_text_pass rf_text_pass_default(void);

/* Queues a pass. After a failure read_* refuse; what the caches hold is then undefined, unless the pass was refused
 * (RF_ERR_ARGUMENT, RF_ERR_UNSUPPORTED, RF_ERR_STATE from its checks), which touches nothing. */
rf_status rf_text_session_forward(rf_text_session *session, const rf_text_pass *pass, rf_error *err);

/* Waits for the device. stats host [batch][num_head_rows] of the last pass. */
rf_status rf_text_session_read_stats(rf_text_session *session, rf_token_stats *stats, rf_error *err);
/* Of the last pass, which kept them: host f32 [batch * num_head_rows, vocab]; row < 0: all rows, else one. */
rf_status rf_text_session_read_logits(rf_text_session *session, int32_t row, float *logits, rf_error *err);
/* Of the last DRIFT pass: tracked [num_layers] positions (-1: none), drift [num_layers] similarities (NaN: not
 * measured), and the layer after which all rows were computed (-1: none, a full pass, or force_from 0). Any pointer may
 * be NULL. */
rf_status rf_text_session_read_drift(rf_text_session *session, int32_t *tracked, float *drift, int32_t *expanded_at,
                                     rf_error *err);
/* Hidden states after the final norm of the last pass' head rows, host f32 [batch * h, hidden] (tests). */
rf_status rf_text_session_read_hidden(rf_text_session *session, float *hidden, rf_error *err);
/* A cached row for tests and policies that look at the cache: host f32 k, v [num_kv_heads * head_dim] of (layer,
 * sequence, position). */
rf_status rf_text_session_read_kv(rf_text_session *session, int layer, int sequence, int32_t position, float *k,
                                  float *v, rf_error *err);

typedef struct {
    int64_t num_passes;
    int64_t row_passes; /* rows computed, summed over passes and layers, / num_layers (rounded): a row of some layers
                           counts in part */
    int64_t key_reads;  /* keys seen by computed rows, summed likewise; reused attention sees only the keys inside */
    int64_t head_rows;
    size_t cache_bytes; /* keys and values */
    size_t plane_bytes; /* inputs, increments, external attention */
    size_t arena_bytes; /* all device memory of the session */
    int graph_nodes;    /* of the last pass, 0 without */
    int num_graphs;
} rf_text_session_info;
rf_text_session_info rf_text_session_get_info(const rf_text_session *session);
void rf_text_session_reset_counts(rf_text_session *session);

#ifdef __cplusplus
}
#endif
#endif
