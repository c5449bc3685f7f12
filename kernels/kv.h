/* kernels/kv.h - operators of an autoregressive cache under a budget: what keys received, what values would be missed, and rows
 * that move between a layer's staging plane and the pool.
 *
 * Nothing here needs the probabilities in memory: p_ij = exp(scale q_i.k_j - lse_i) is made again from q, k and the lse that
 * attention returned.
 *
 * Keys and values lie in one of two ways:
 *   dense   rows == NULL: key j of key head h at k + j * row_stride + h * head_stride (a staging plane [T][Hkv * D], or one
 *           head after the other)
 *   listed  rows [Hkv][rows_stride] int32, lens [Hkv] int32: slot j < lens[h] of key head h at k + rows[h * rows_stride + j] *
 *           row_stride (a pool [rows][D]; head_stride is not used). lens NULL: all num_keys.
 * One sequence a call. Query head h uses key head h / (Hq / Hkv). Strides in elements; q, k, v of dtype; sums f32. */
#ifndef RF_KERNELS_KV_H
#define RF_KERNELS_KV_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void *k, *v; /* v NULL where an operator does not use it */
    int64_t row_stride, head_stride;
    const int32_t *rows, *lens;
    int64_t rows_stride;
    int64_t num_keys; /* dense: T; listed: the most of any head (grid size) */
} rf_kv_source;

/* Columns of a window (K2). Query i of num_queries: q + i * q_row_stride + h * D, already turned.
 *   lse       [Hq][lse_stride], query i at lse[h * lse_stride + i]
 *   weights   device f32 [num_queries] or NULL = 1: w_i
 *   causal    dense only: key j counts for query i if j <= first_position + i
 *   s1, s2, peak  [Hq][out_stride] or NULL: sum w p, sum w p^2, max p. accumulate: onto what is there (peak: larger of both)
 *   entropy   [Hq] or NULL: -sum over queries and columns j < entropy_keys of p ln p (+= with accumulate)
 * Columns lens[h]..num_keys-1 of a listed source are written 0. Deterministic: the same sums in the same order every time.
 * workspace: kv_columns_workspace() bytes. */
typedef struct {
    rf_kv_source source;
    const void *q;
    int64_t q_row_stride;
    const float *lse;
    int64_t lse_stride;
    const float *weights;
    int64_t num_queries;
    int num_q_heads, num_kv_heads, head_dim;
    rf_dtype dtype;
    float scale;
    bool causal;
    int64_t first_position;
    float *s1, *s2, *peak;
    int64_t out_stride;
    float *entropy;
    int64_t entropy_keys;
    bool accumulate;
    void *workspace;
    size_t workspace_bytes;
} rf_kv_columns_args;

/* What an output would lose (K3): e_j = sum_i c_ij |v_j - o_i|^2 and its kin. o [num_queries][Hq][D] at o + i * o_row_stride + h * D:
 * attention's outputs before the out projection, dtype. out [Hq][out_stride], never below 0.
 *   RF_KV_LOSS_REMOVAL  c = (p / (1 - p))^2, p clamped to 1 - 1e-4 (CAOTE's exact change, squared)
 *   RF_KV_LOSS_KEY      c = (p z)^2, z = scale q.k (OBCache, key)
 *   RF_KV_LOSS_VALUE    sum p^2 |v|^2 (OBCache, value); o is not used
 *   RF_KV_LOSS_JOINT    sum |p v + p z (v - o)|^2 (OBCache, joint)
 * weights, causal, accumulate, workspace as in columns. */
typedef enum { RF_KV_LOSS_REMOVAL = 0, RF_KV_LOSS_KEY, RF_KV_LOSS_VALUE, RF_KV_LOSS_JOINT } rf_kv_loss;
typedef struct {
    rf_kv_source source;
    const void *q, *o;
    int64_t q_row_stride, o_row_stride;
    const float *lse;
    int64_t lse_stride;
    const float *weights;
    int64_t num_queries;
    int num_q_heads, num_kv_heads, head_dim;
    rf_dtype dtype;
    float scale;
    bool causal;
    int64_t first_position;
    rf_kv_loss loss;
    float *out;
    int64_t out_stride;
    bool accumulate;
    void *workspace;
    size_t workspace_bytes;
} rf_kv_loss_args;

/* Norms and directions (K5), [Hkv][out_stride], any NULL: |k_j|, |v_j|, cos(k_j, a) with a = sum over the keys of k / |k| (0 for a
 * key of norm 0). anchor: f32 [Hkv][D] scratch, needed with key_cosine. */
typedef struct {
    rf_kv_source source;
    int num_kv_heads, head_dim;
    rf_dtype dtype;
    float *key_norm, *value_norm, *key_cosine, *anchor;
    int64_t out_stride;
} rf_kv_norms_args;

/* Copies rows (K6): for key head h and i < counts[h] (or num): from source row -> destination row, k and v both.
 *   from [Hkv][list_stride] int32 or NULL = i: key index j (dense) or slot (listed) of the source
 *   to   [Hkv][list_stride] int32: row of the destination pool k_out, v_out [.][D] (row stride out_row_stride); or NULL: k_out, v_out
 *        are dense [Hkv][out_head_stride / D][D], row i
 *   turn [Hkv][list_stride] int32 or NULL: the key is turned by the angles of table position turn (rotary table as rf_rope_args's,
 *        f32 [positions][pairs][2], halves: x_c with x_{c + pairs}, pairs <= D/2); a negative entry turns back. Values stay.
 * A negative `to` is skipped. Source and destination do not overlap. k_out_dtype = dtype. */
typedef struct {
    rf_kv_source source;
    void *k_out, *v_out;
    int64_t out_row_stride, out_head_stride;
    const int32_t *from, *to, *turn, *counts;
    int64_t list_stride, num;
    const float *table;
    int pairs;
    int num_kv_heads, head_dim;
    rf_dtype dtype;
} rf_kv_copy_args;

/* Puts a new token of each of `heads` heads (all sequences and key heads of a layer) behind its slots: k and v [heads][D] (dense,
 * dtype) go to row new_rows[h] of the pool; rows[h * rows_stride + lens[h]] = new_rows[h]; then lens[h] += 1. Everything is device
 * memory. new_rows[h] < 0: that head is left alone. With lens == NULL only the data moves; with k, v and the pools NULL only the lists
 * grow (rf_qkv_rope has put the data there). */
typedef struct {
    const void *k, *v;
    void *k_pool, *v_pool;
    const int32_t *new_rows;
    int32_t *rows, *lens;
    int64_t rows_stride, heads;
    int head_dim;
    rf_dtype dtype;
} rf_kv_append_args;

/* A decode step of a rule that lives on the device (K4), after attention with the new token appended, all heads of a layer of one
 * or more sequences: units u = sequence * Hkv + h. q [sequences][Hq][D] turned, lse [sequences][Hq].
 *   score[u][j] = decay * score[u][j] + mean over the group of p (mode SUM); mode LAST: score = p alone; mode AGE: nothing is
 *                 measured, the oldest goes (StreamingLLM). over_heads: p is the mean over all query heads of the sequence (TOVA),
 *                 so that all heads lose the same slot.
 *   while lens[u] > budget[u]: the slot of the lowest score among those that are neither one of the first `sinks` slots nor one of
 *   the last `recents` goes (ties: the highest slot, so that of equals the lowest stay; AGE: the lowest; NaN counts as +inf): slots behind it move up in rows, positions and score, and lens[u] -= 1. Its row
 *   becomes spare[u] (the next token's row, read by append as new_rows). At most one slot a call.
 * score f32, rows, positions int32 [units][rows_stride]; lens, budget, spare int32 [units]. The score of the new slot starts at its p.
 * positions may be NULL. */
typedef enum { RF_KV_EVICT_SUM = 0, RF_KV_EVICT_LAST, RF_KV_EVICT_AGE } rf_kv_evict_mode;
typedef struct {
    const void *k; /* pool [.][D] */
    const void *q;
    const float *lse;
    int32_t *rows, *positions, *lens, *spare;
    const int32_t *budget;
    float *score;
    int64_t rows_stride, sequences;
    int num_q_heads, num_kv_heads, head_dim;
    rf_dtype dtype;
    float scale, decay;
    rf_kv_evict_mode mode;
    bool over_heads;
    int32_t sinks, recents;
    int64_t max_len; /* lens never exceed it (grid size) */
    void *workspace;
    size_t workspace_bytes;
} rf_kv_evict_args;

#ifdef __cplusplus
}
#endif
#endif
