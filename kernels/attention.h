/* kernels/attention.h - out = softmax(softmax_scale * q k^T + mask) v over whole rows, lists and ranges of keys.
 *
 * Source   Dao et al. 2022/2023 (FlashAttention 1 and 2: online softmax over key tiles), merge by log-sum-exp as in
 *          "cascade" inference. LSE is the natural log, f32, everywhere outside a kernel.
 * Symbols  B batch, Hq/Hkv query and key heads (Hq a multiple of Hkv: GQA), D head_dim.
 * D        CUDA: 64, 72, 80, 96, 128. CPU: any.
 *
 *   q    row i of batch b, head h at q + b*q_batch_stride + i*q_row_stride + h*q_head_stride; D contiguous   read
 *   k, v likewise with kv_* strides (k and v share strides)                                                   read
 *   out  likewise with out_* strides; row i is query i                                                        written
 *   lse  [B, Hq, q_len] f32, NULL if not wanted; -inf (and out 0) for a query that sees no key                written
 * Strides are in elements. bf16 on CUDA: row and head strides multiples of 8 and 16-byte aligned bases
 * (D = 72 packed in [token][3][H][72] satisfies this).
 * out_is_f32: out is f32 whatever dtype is (out_* strides count f32 then).
 *
 * Queries   q_rows (device int32 [q_len], may be NULL): query i is row q_rows[i] of q; its out row is i (packed).
 *           q_batch_stride_rows: stride between the lists of two samples, 0 = one list for all.
 *           out_rows (device int32 [q_len], may be NULL; the same stride between samples): query i's out row is out_rows[i],
 *           and so is its place in lse, which is [B, Hq, lse_slots] then. No row twice in a sample.
 * Keys      by default rows 0..kv_len-1. num_ranges > 0: the union of up to 4 ascending, disjoint ranges [begin, end).
 *           kv_rows (device int32 [kv_len]): key j is row kv_rows[j]; kv_batch_stride_rows as above.
 *           kv_lens (device int32 [B], may be NULL): only the first kv_lens[b] keys of the list or of 0..kv_len-1 count.
 *           How the keys are shared out follows from kv_len, the time from kv_lens as far as it can.
 * Mask      NONE; CAUSAL: key position <= query position; BLOCK_CAUSAL: key pos < (query pos / causal_block + 1) *
 *           causal_block. A query's position is its row in q (q_rows[i] or i) + q_pos_offset + q_pos_offsets[b] (device int32
 *           [B], may be NULL; not below 0); a key's is its row in k.
 *           Key rows that no query of a call sees are not read into its result: they may hold anything.
 * kv_rows and kv_lens exclude ranges; ranges end at kv_len or before. kv_lens outside 0..kv_len count as the nearer end.
 * Rotary    rope (device f32 [positions][rope_pairs][2] = (cos, sin), kernels/rope.h; NULL: none): queries and keys are
 *           turned by their positions, as the masks count them, while they are read. q, k and v stay as they are.
 *           CUDA: bf16, head_dim 64 and 128, at most 256 keys that are rows 0..kv_len-1, no q_rows, no mask, no
 *           q_pos_offsets, rope_pairs a multiple of 4; the rest is RF_ERR_UNSUPPORTED, and rope (the operator) before a plain
 *           attention does it.
 * Join      join_out, join_lse (f32; both or none): attention of the same queries over other keys, kept from before in slots,
 *           join_out [slots][Hq][D] and join_lse [Hq][join_slots], -inf = empty. Query i takes slot join_rows[i] (device int32
 *           [q_len], may be NULL: slot i; the same stride between samples as q_rows, needed if B > 1); out and lse are those
 *           over both key sets, as attention_merge would make them, with one rounding.
 *   FlashBlock (arXiv 2602.05305): keys outside a block are attended rarely, those inside on every step. A fresh row: attention
 *   over the outside keys with q_rows, out_is_f32, out_rows = its slots, lse_slots = join_slots, out and lse = the planes. Every
 *   step: attention over the inside keys with the planes as join_out and join_lse.
 * out_is_f32, out_rows and the join on CUDA: head_dim 64 and 128 with bf16, any that f32 takes; not with rope.
 * workspace: attention_workspace() bytes (split keys; the host's per-thread scratch); NULL if that is 0. */
#ifndef RF_KERNELS_ATTENTION_H
#define RF_KERNELS_ATTENTION_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_MASK_NONE = 0, RF_MASK_CAUSAL, RF_MASK_BLOCK_CAUSAL } rf_mask;

#define RF_MAX_KEY_RANGES 4
typedef struct {
    int32_t begin, end;
} rf_key_range;

/* auto picks the fastest kernel that can run; the others force one (tests, benchmarks) and fail if it cannot. DECODE: few queries
 * against many keys. */
typedef enum {
    RF_ATTENTION_AUTO = 0,
    RF_ATTENTION_MMA,
    RF_ATTENTION_WGMMA,
    RF_ATTENTION_DECODE,
    RF_ATTENTION_SMALL
} rf_attention_kernel;

typedef struct {
    const void *q, *k, *v;
    void *out;
    float *lse;
    rf_dtype dtype;
    int64_t batch;
    int num_q_heads, num_kv_heads, head_dim;
    int64_t q_len, kv_len;
    int64_t q_batch_stride, q_row_stride, q_head_stride;
    int64_t kv_batch_stride, kv_row_stride, kv_head_stride;
    int64_t out_batch_stride, out_row_stride, out_head_stride;
    float softmax_scale;

    const int32_t *q_rows;
    int64_t q_batch_stride_rows;
    const int32_t *kv_rows;
    int64_t kv_batch_stride_rows;
    const int32_t *kv_lens;
    int num_ranges;
    rf_key_range ranges[RF_MAX_KEY_RANGES];

    rf_mask mask;
    int32_t causal_block;
    int32_t q_pos_offset;
    const int32_t *q_pos_offsets;

    bool out_is_f32;
    const int32_t *out_rows;
    int64_t lse_slots; /* with out_rows and lse; more than every entry of out_rows */

    const float *join_out, *join_lse;
    const int32_t *join_rows;
    int64_t join_slots; /* more than every entry of join_rows; with no join_rows at least q_len */

    const float *rope;
    int rope_pairs;

    void *workspace;
    size_t workspace_bytes;

    rf_attention_kernel kernel;
} rf_attention_args;

/* Self-attention over packed rows [batch*len][3][H][D] -> out [batch*len][H][D]; scale 1/sqrt(D); no lists, no mask. */
rf_attention_args rf_attention_args_packed(rf_dtype dtype, int64_t batch, int64_t len, int num_heads, int head_dim,
                                           const void *qkv, void *out);

/* Joins two attentions of the same queries over disjoint key sets: w = exp(lse_i - max), out = sum w_i out_i / sum w_i,
 * lse = max + ln sum w_i. Either side may be empty (-inf). out_a/out_b/out [rows, num_heads, head_dim] dense;
 * lse_* [num_heads, rows] f32. out may alias out_a, lse may alias lse_a. out_a is f32 or dtype, as out_a_dtype says; out_b is f32
 * if out_b_is_f32, else dtype; out is dtype.
 * slots (device int32 [rows], NULL: none): side a is a plane, out_a [slots][num_heads][head_dim], lse_a [num_heads][num_slots], and
 * row r takes slot slots[r]; then nothing may alias it. (rf_attention_args does the same in one pass: Join.) */
typedef struct {
    const void *out_a, *out_b;
    const float *lse_a, *lse_b;
    void *out;
    float *lse;
    rf_dtype out_a_dtype, dtype;
    bool out_b_is_f32;
    int64_t rows;
    int num_heads, head_dim;
    const int32_t *slots;
    int64_t num_slots; /* more than every entry of slots */
} rf_attention_merge_args;

/* y[r, c] = softmax over c of scale * x[r, c]; f32 in, f32 or bf16 out; for attention whose head_dim has no kernel
 * (the one head of 512 in AutoencoderKL) between two GEMMs. y may alias x if the dtypes are equal. */
typedef struct {
    const void *x;
    void *y;
    rf_dtype x_dtype, y_dtype;
    int64_t rows, cols;
    float scale;
} rf_softmax_args;

#ifdef __cplusplus
}
#endif
#endif
