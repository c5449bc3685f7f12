/* kernels/kvq.h - keys and values of the past in few bits: packing, unpacking, and attention that reads the packed form.
 *
 * A store holds tokens of `units` heads (a unit is a key head of a sequence, of one layer): lens[u] of them, in order of arrival,
 * in blocks of RF_KVQ_BLOCK tokens. Three formats:
 *
 *   INT        b = 2, 4 or 8 bits. Asymmetric: scale = (max - min) / (2^b - 1), zero = min, both rounded to IEEE half (saturating
 *              at 65504) before they are used; code = round-half-even((x - zero) / scale) clamped to 0..2^b - 1;
 *              x' = zero + scale code. A scale of 0: code 0. (KIVI, arXiv 2402.02750.)
 *              Keys by channel (keys_by_channel): one scale and zero for a channel of a block (fewer tokens in the last one); a block
 *              is packed once, with all of its tokens; bits of tokens that are not there are those of code 0.
 *              Keys by token and values: one for `group` consecutive channels of a token; a token is packed on its own.
 *   FP8        e4m3 (no infinity, saturating at 448), one scale a token and plane: scale = max |x| / 448 (f32; NaN if there
 *              is one), code = e4m3(x / scale).
 *   DIRECTION  rows of dtype that other layers may share, one length a token, plane and layer: x' = length row. Not packed here:
 *              written by kvq_direction.
 *
 * Layout, per unit (unit strides in bytes):
 *   k_codes, v_codes
 *     INT by channel  [blocks][D][4 b bytes]: token i of the block at bits i b .. i b + b - 1, low bits first
 *     INT by token    [tokens][D b / 8 bytes]: channel c at bits c b, low bits first
 *     FP8             [tokens][D] bytes
 *     DIRECTION       [tokens][D] of dtype
 *   k_scales, v_scales
 *     INT by channel  [blocks][D] of (scale, zero) half pairs
 *     INT by token    [tokens][D / group] of (scale, zero) half pairs
 *     FP8, DIRECTION  [tokens] f32
 * k_factor, v_factor: f32 [units][D] or NULL: channel c was divided by it before it was packed (ZipCache, MiKV: a balancer), so
 * that x' is multiplied by it when read. All of them > 0. DIRECTION has none.
 * D a multiple of 16 up to 256; group divides D and is a multiple of 8. Unit strides and bases are multiples of 16 bytes. */
#ifndef RF_KERNELS_KVQ_H
#define RF_KERNELS_KVQ_H

#include "core/backend.h"
#include "kernels/kv.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_KVQ_BLOCK 32

typedef enum { RF_KVQ_INT = 0, RF_KVQ_FP8, RF_KVQ_DIRECTION } rf_kvq_format;

typedef struct {
    rf_kvq_format format;
    int bits, group; /* INT */
    bool keys_by_channel;
    int head_dim;
    rf_dtype dtype; /* of rows that are packed, and of DIRECTION's */
    void *k_codes, *v_codes, *k_scales, *v_scales;
    const float *k_factor, *v_factor;
    int64_t codes_stride, scales_stride; /* bytes from unit to unit, of keys and of values alike (the larger of both) */
} rf_kvq_store;

/* Bytes of codes and of scales of one unit with room for `tokens`, of the larger of both planes, rounded up to 16. */
size_t rf_kvq_codes_bytes(const rf_kvq_store *store, int64_t tokens);
size_t rf_kvq_scales_bytes(const rf_kvq_store *store, int64_t tokens);

/* Rows of a source go behind (or over) a store's tokens: for unit u and i < counts[u], key and value at source row
 * from[u * list_stride + i] become token first[u] + i. keys_by_channel: first[u] is a multiple of RF_KVQ_BLOCK; a last block of
 * fewer tokens is packed with those, and packed again as a whole if more come. Everything but `store` is device memory.
 *   k, v         rows of store.dtype, source row r of unit u at r * row_stride + u * head_stride elements (a staging plane of one
 *                sequence: row_stride Hkv D, head_stride D; a pool: row_stride D, head_stride 0)
 *   most         the largest of counts (grid size)
 * INT and FP8. Deterministic, and the same codes on every backend up to one code where rounding of x / factor is at a tie. */
typedef struct {
    rf_kvq_store store;
    const void *k, *v;
    int64_t row_stride, head_stride;
    const int32_t *from, *first, *counts;
    int64_t list_stride;
    int64_t units, most;
} rf_kvq_pack_args;

/* x' of tokens 0..lens[u] - 1 of each unit as rows: k_out, v_out [units][out_stride][D] of out_dtype (f32 or store.dtype). */
typedef struct {
    rf_kvq_store store;
    const int32_t *lens;
    int64_t units, most;
    void *k_out, *v_out;
    rf_dtype out_dtype;
    int64_t out_stride; /* rows */
} rf_kvq_unpack_args;

/* Attention of one query row a unit and query head over the packed tokens: unit u, its `group_heads` query heads g.
 *   q        dtype [units][group_heads][D], turned
 *   out      dtype [units][group_heads][D]; lse f32 [units][group_heads]; a unit of lens 0: out 0, lse -inf
 *   lens     device int32 [units]; most: the largest that it can be (grid size)
 *   logits   f32 [units][group_heads][logits_stride] or NULL: scale q.k' of each token, for whoever wants p = exp(logit - lse)
 * Join with attention over other tokens by attention_merge (kernels/attention.h). workspace: kvq_attention_workspace() bytes, at a
 * multiple of 16.
 * Floors: reads each packed byte once (all heads of a group together); 4 D flops a token and query head. */
typedef struct {
    rf_kvq_store store;
    const int32_t *lens;
    int64_t units, most;
    const void *q;
    void *out;
    float *lse;
    int group_heads;
    float scale;
    float *logits;
    int64_t logits_stride;
    void *workspace;
    size_t workspace_bytes;
} rf_kvq_attention_args;

/* Directions of two layers' rows (MiniCache, arXiv 2405.14366): for unit u and i < counts[u], with a and b the rows
 * from[u * list_stride + i] of the earlier and the later layer, u = a / |a|, w = b / |b|, Omega = arccos(u.w):
 *   e = (sin((1 - t) Omega) u + sin(t Omega) w) / sin Omega        (sin Omega < 1e-4: the half sum, made a unit vector)
 * goes to token first[u] + i of the codes, of length 1, |a| and |b| to the scales of the earlier and the later layer. A row of length 0 has
 * direction e of the other one, length 0 and Omega 0. For keys and values each.
 * angle f32 [2][units][list_stride] or NULL: Omega / pi of keys, values.
 *   k[2], v[2]        planes of the earlier and the later layer, strides as in pack
 *   store.k_scales    of the earlier layer, later_k_scales of the later one; later_v_scales likewise
 *   codes NULL: only angles are written (to choose what stays unmerged). */
typedef struct {
    rf_kvq_store store;
    void *later_k_scales, *later_v_scales;
    const void *k[2], *v[2];
    int64_t row_stride, head_stride;
    const int32_t *from, *first, *counts;
    int64_t list_stride;
    int64_t units, most;
    float t;
    float *angle;
} rf_kvq_direction_args;

#ifdef __cplusplus
}
#endif
#endif
