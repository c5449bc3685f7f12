/* kernels/text.h - the operators of text models: token rows in, keys and values into a cache, statistics out of the head.
 *
 * Symbols  B sequences of a pass, n query rows of each (padded to a common count), Hq/Hkv query and key heads, D head_dim,
 *          d hidden width, V vocabulary, C rows of a sequence's cache.
 * Row i of sequence b is packed row b*n + i. Positions are absolute and 0-based; position p of sequence b lives in cache
 * row p. A padding row has position C - 1 or more, the dump row at the end of each cache: nobody sees it. */
#ifndef RF_KERNELS_TEXT_H
#define RF_KERNELS_TEXT_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[r] = table[ids[r]] * scale. An id outside [0, vocab) gives a row of zeros.
 *   table [vocab, cols] dtype; ids device int32 [rows]; out [rows, cols] out_dtype (the residual stream's). */
typedef struct {
    const void *table;
    const int32_t *ids;
    void *out;
    rf_dtype dtype, out_dtype;
    int64_t rows, cols, vocab;
    float scale;
} rf_embed_args;

/* Splits packed q|k|v rows, norms heads, turns them, and keeps k and v at their positions.
 *   qkv      [B*n][(Hq + 2 Hkv) * D] dtype, read: heads of q, then of k, then of v
 *   q_out    [B*n][Hq][D] dtype, written
 *   k, v     caches [B][C][Hkv][D] dtype: row min(pos, C - 1) of each sequence is written (scatter); strides in elements.
 *            k_batch_stride between sequences, k_row_stride between positions (both caches share them)
 *   pool_rows  device int32 [B*n][Hkv] or NULL: k and v are pools [.][D], and head h of row r goes to row pool_rows[r * Hkv + h]
 *            of them, negative: nowhere; C and the strides are then not used
 *   positions device int32 [B*n]
 *   q_norm, k_norm  [D] f32 or NULL: RMSNorm over a head before the turn (Qwen3), eps norm_eps
 *   table    device f32 [table_rows][pairs][2] = (cos, sin); pairs <= D/2; element j turns with j + pairs (half-split,
 *            "rotate_half"); elements past 2*pairs are not turned. Positions past table_rows - 1 take the last row.
 * Arithmetic in f32, one rounding. No two rows of a sequence may share a position below C - 1. */
typedef struct {
    const void *qkv;
    void *q_out, *k, *v;
    rf_dtype dtype;
    int64_t batch, rows; /* B, n */
    int num_q_heads, num_kv_heads, head_dim, pairs;
    int64_t cache_rows, k_batch_stride, k_row_stride; /* C */
    const int32_t *positions, *pool_rows;
    const float *q_norm, *k_norm;
    float norm_eps;
    const float *table;
    int64_t table_rows;
} rf_qkv_rope_args;

/* y = silu(gate) * up. x [rows][2*cols]: gate columns, then up columns (interleaved: gate and up of column c side by side at
 * 2c and 2c+1); y [rows][cols]; same dtype. */
typedef struct {
    const void *x;
    void *y;
    rf_dtype dtype;
    int64_t rows, cols;
    bool interleaved;
} rf_swiglu_args;

/* --- the head ----------------------------------------------------------------------------------------------------------- */

/* What is known of one row's distribution p = softmax(z). Ties go to the lowest id. Natural logs. */
typedef struct {
    int32_t id;      /* argmax of z; with temperature > 0 the sampled token */
    int32_t best;    /* argmax of z */
    float prob;      /* p[id], of the noise-free z */
    float best_prob; /* p[best] */
    float margin;    /* p of the best minus p of the second */
    float entropy;   /* nats, >= 0 */
    float lse;       /* ln sum exp z */
    float ref_prob;  /* p[ref[row]] if refs are given, else 0 */
} rf_token_stats;

/* z = x w^T over the vocabulary in tiles, statistics per row, z never in memory as a whole.
 *   x     [rows, d] dtype, final-normed;  w [V, d] dtype, constant (rf_gemm_args.w_is_constant)
 *   out   device rf_token_stats [rows]
 *   bans  device int32 [num_bans]: ids whose z counts as -inf (at most 8)
 *   temperature > 0: id = argmax_v z_v - T ln(-ln u_v), u of a counter RNG keyed by (seed, *step, keys[row], v): Philox
 *         4x32-10, key = seed (low, high), counter = (v / 4, keys[row], *step, 0), word v % 4; u = (word + 0.5) / 2^32
 *   keys  device int32 [rows] (positions) or NULL = row number; step device int32 or NULL = 0
 *   refs  device int32 [rows] or NULL: ids whose probability is wanted
 *   round_logits: z is rounded to bf16 before anything is taken from it (what references of bf16 logits see)
 *   scale: z is multiplied by it first (1)
 *   rank_of_ref: if refs are given, `margin` is replaced by the number of ids with z > z[ref] (for top-k acceptance; 0 if it is
 *         the best). A ref outside [0, V) or banned has probability 0 and every id that is not banned above it.
 * A row whose ids are all banned: id and best 0, lse -inf, the rest 0. A logit that is not a number counts as -inf.
 * CUDA: d a multiple of 8 (bf16) or 4 (f32), as gemm.
 * workspace: head_stats_workspace() bytes of either backend, aligned to 16 bytes. It never shrinks as rows grow, and does not
 *         depend on refs, bans or temperature. */
typedef struct {
    const void *x, *w;
    rf_token_stats *out;
    rf_dtype dtype;
    int64_t rows, cols, vocab; /* cols = d */
    const int32_t *bans;
    int num_bans;
    float temperature, scale;
    uint64_t seed;
    const int32_t *keys, *step, *refs;
    bool round_logits, rank_of_ref;
    void *workspace;
    size_t workspace_bytes;
} rf_head_stats_args;

/* --- what layers show to policies ------------------------------------------------------------------------------------ */

/* Attention mass received: mass[b][j] = sum over listed query rows i and heads h of exp(scale * q_i . k_j - lse[b,h,i]).
 *   q [B*n][Hq][D] dtype (positions already turned); lse [B, Hq, n] f32 of the attention over the same keys
 *   query_rows device int32 [num_queries] (packed rows of one sequence, batch 1 only) or NULL = all n
 *   k cache as in rf_qkv_rope_args; keys device int32 [num_keys] or NULL = 0..num_keys-1; kv_lens device int32 [B] or NULL
 *   mass f32 [B][num_keys]: written, 0 past kv_lens
 *   head_mass f32 [B][Hq][num_keys] or NULL: the same, per head (not summed over heads). Either may be NULL. */
typedef struct {
    const void *q, *k;
    const float *lse;
    float *mass, *head_mass;
    rf_dtype dtype;
    int64_t batch, rows, num_queries, num_keys; /* rows = n */
    int num_q_heads, num_kv_heads, head_dim;
    int64_t k_batch_stride, k_row_stride;
    const int32_t *query_rows, *keys, *kv_lens;
    float scale;
} rf_attention_mass_args;

/* Probabilities of a few rows: probs[t][h][j] = softmax_j(scale * q . k_j), over num_keys keys (list or 0..), f32; a batch of one.
 *   q [num_rows][Hq][D] (row stride q_row_stride elements); q_index device int32 [num_rows] or NULL: which row of q. */
typedef struct {
    const void *q, *k;
    float *probs;
    rf_dtype dtype;
    int64_t num_rows, num_keys, q_row_stride, k_row_stride;
    const int32_t *q_index, *keys, *kv_len; /* kv_len device int32 [1] or NULL */
    int num_q_heads, num_kv_heads, head_dim;
    float scale;
} rf_attention_probs_args;

/* cosine[r] = sum a b / max(|a| |b|, 1e-8) over the columns of row r, f32 accumulation in a fixed order.
 *   a [rows, cols] a_ld, b [rows, cols] b_ld; element strides 1, or col_stride elements between columns (drift over heads)
 *   b_rows device int32 [rows] or NULL: which row of b. */
typedef struct {
    const void *a, *b;
    float *cosine;
    rf_dtype a_dtype, b_dtype;
    int64_t rows, cols, a_ld, b_ld, col_stride;
    const int32_t *b_rows;
} rf_cosine_rows_args;

/* The `count` smallest of values[0..num): their indices, ascending, into out [count]; ties to the lower index; NaN counts as the
 * smallest. num <= 32768, 1 <= count <= num. */
typedef struct {
    const float *values;
    int32_t *out;
    int64_t num, count;
} rf_select_smallest_args;

/* The largest of values[j] over j with allowed[j] != 0 (u8, NULL = all): out[0] = its index (lowest on ties), -1 if none; NaN
 * counts as the smallest. num from device num_dev (int32) if given, at most num. */
typedef struct {
    const float *values;
    const uint8_t *allowed;
    int32_t *out;
    int64_t num;
    const int32_t *num_dev;
} rf_argmax_args;

#ifdef __cplusplus
}
#endif
#endif
