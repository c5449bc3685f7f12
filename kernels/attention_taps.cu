/* kernels/attention_taps.cu - what attention looked at: mass received by keys, probabilities of a few rows, cosines of rows
 * (kernels/text.h).
 * Maths    scores q . k of 16 keys (rows of a tile) and 32 queries (columns) at a time by m16n8k16 in bf16, sums in f32. A dot
 *          product does not care about the order of its terms, so a lane's registers hold eight neighbouring columns of head_dim,
 *          one 16-byte load, in place of the four pairs that the fragment's layout names; keys and queries are permuted alike.
 *          PLAIN (f32, rows that are not aligned): a warp for a score, lanes over head_dim.
 * Launch   mass: a block per 16 keys and sequence, a warp per head; the sums of heads meet in shared memory and are added in the
 *          order of heads. Key rows of a head are read once from memory (per 32 queries from L1).
 *          probs: scores by a warp per 16 keys and KV head, all rows and heads of the group at once, into `probs`; then a block per
 *          (row, head) makes a softmax of them in place.
 *          cosine: a warp per row; a thread per row where columns are apart and rows are neighbours.
 * Order    fixed, no atomics.  Arch  sm_80 and later.  Checked  tests/kernels/test_text.c. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/rope.cuh"
#include "kernels/text_checks.h"

static constexpr unsigned ALL = 0xffffffffu;
static constexpr float LOG2_E = 1.4426950408889634f;
static constexpr int KEYS = 16, QUERIES = 32, TILES = QUERIES / 8;
static constexpr int MASS_WARPS = 16, MAX_HEADS = 512;
static constexpr int PROB_WARPS = 4, SOFTMAX_THREADS = 256, COSINE_THREADS = 128;

static __device__ __forceinline__ int clamp_len(const int32_t *len, int at, int64_t num) {
    return len ? max(0, min(len[at], (int)num)) : (int)num;
}

/* --- scores ------------------------------------------------------------------------------------------------------------- */

/* d += a b, a 16x16, b 16x8. g = lane / 4, t = lane % 4. d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). */
static __device__ __forceinline__ void mma16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint4 load16_or_zero(const rf_bf16 *p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *reinterpret_cast<const uint4 *>(p);
    return v;
}

/* s[n] = fragment of 16 keys x queries 8 n .. 8 n + 7. k_low, k_high: rows g and g + 8 of the keys; q[n]: row 8 n + g of the
 * queries; NULL = a row of zeros. Rows on 16 bytes, dim % 8 == 0. The whole warp calls. */
static __device__ __forceinline__ void tile_scores(float (&s)[TILES][4], const rf_bf16 *k_low, const rf_bf16 *k_high,
                                                   const rf_bf16 *const (&q)[TILES], int dim) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < TILES; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll 2
    for (int c = 0; c < dim; c += 32) {
        const int at = c + 8 * t;
        const bool in = at < dim;
        const uint4 low = load16_or_zero(k_low + at, in && k_low), high = load16_or_zero(k_high + at, in && k_high);
        uint4 b[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++) b[n] = load16_or_zero(q[n] + at, in && q[n]);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            mma16(s[n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
            mma16(s[n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
        }
    }
}

/* One score by a warp, the same bits in every lane. */
template <class T> static __device__ __forceinline__ float warp_dot(const T *a, const T *b, int dim) {
    float sum = 0.0f;
    for (int c = threadIdx.x & 31; c < dim; c += 32) sum = fmaf(rf_to_f32(a[c]), rf_to_f32(b[c]), sum);
    return rf_warp_sum(sum);
}

/* --- mass --------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ int64_t key_offset(const rf_attention_mass_args &p, int b, int j) {
    return b * p.k_batch_stride + (int64_t)(p.keys ? p.keys[j] : j) * p.k_row_stride;
}

/* Writes what a block found: sums [num_q_heads][KEYS]. Keys past `seen` get zeros. */
static __device__ __forceinline__ void write_mass(const rf_attention_mass_args &p, const float *sums, int b, int first,
                                                  int seen) {
    const int heads = p.num_q_heads, num_keys = (int)p.num_keys;
    __syncthreads(); /* every head's sums are there */
    if (p.head_mass) {
        for (int i = threadIdx.x; i < heads * KEYS; i += blockDim.x) {
            const int h = i / KEYS, j = first + i % KEYS;
            if (j < num_keys) p.head_mass[((int64_t)b * heads + h) * num_keys + j] = j < seen ? sums[i] : 0.0f;
        }
    }
    const int j = first + (int)threadIdx.x;
    if (!p.mass || threadIdx.x >= KEYS || j >= num_keys) return;
    float total = 0.0f;
#pragma unroll 8
    for (int h = 0; h < heads; h++) total += sums[h * KEYS + threadIdx.x];
    p.mass[(int64_t)b * num_keys + j] = j < seen ? total : 0.0f;
}

static __global__ void __launch_bounds__(MASS_WARPS * 32)
    mass_kernel(const __grid_constant__ rf_attention_mass_args p) {
    extern __shared__ float sums[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, dim = p.head_dim, heads = p.num_q_heads;
    const int group = heads / p.num_kv_heads, b = blockIdx.y, first = blockIdx.x * KEYS;
    const int num_queries = (int)(p.query_rows ? p.num_queries : p.rows);
    rf_wait_for_previous();
    const int seen = clamp_len(p.kv_lens, b, p.num_keys);
    const rf_bf16 *const keys = (const rf_bf16 *)p.k, *const queries =
                                                          (const rf_bf16 *)p.q + (int64_t)b * p.rows * heads * dim;
    const bool has_low = first + g < seen, has_high = first + g + 8 < seen;
    const rf_bf16 *const low = keys + (has_low ? key_offset(p, b, first + g) : 0);
    const rf_bf16 *const high = keys + (has_high ? key_offset(p, b, first + g + 8) : 0);
    const float c = p.scale * LOG2_E;

    if (first < seen) {
        for (int h = threadIdx.x >> 5; h < heads; h += blockDim.x >> 5) {
            const int64_t in_row = (int64_t)(h / group) * dim;
            const float *const lse = p.lse + ((int64_t)b * heads + h) * p.rows;
            float sum_low = 0.0f, sum_high = 0.0f;
#pragma unroll 1
            for (int i0 = 0; i0 < num_queries; i0 += QUERIES) {
                const rf_bf16 *q[TILES];
                float l[TILES][2]; /* of this lane's columns, in base 2; +inf adds nothing */
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const int i = i0 + 8 * n + g;
                    q[n] = NULL;
                    if (i < num_queries)
                        q[n] = queries + ((int64_t)(p.query_rows ? p.query_rows[i] : i) * heads + h) * dim;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int col = i0 + 8 * n + 2 * t + e;
                        float v = -INFINITY;
                        if (col < num_queries) v = lse[p.query_rows ? p.query_rows[col] : col];
                        l[n][e] = v == -INFINITY ? INFINITY : v * LOG2_E;
                    }
                }
                float s[TILES][4];
                tile_scores(s, has_low ? low + in_row : NULL, has_high ? high + in_row : NULL, q, dim);
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        sum_low += exp2f(fmaf(s[n][e], c, -l[n][e]));
                        sum_high += exp2f(fmaf(s[n][2 + e], c, -l[n][e]));
                    }
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2) { /* the four lanes of a key */
                sum_low += __shfl_xor_sync(ALL, sum_low, step);
                sum_high += __shfl_xor_sync(ALL, sum_high, step);
            }
            if (t == 0) {
                sums[h * KEYS + g] = sum_low;
                sums[h * KEYS + g + 8] = sum_high;
            }
        }
    }
    write_mass(p, sums, b, first, seen);
}

template <class T>
static __global__ void __launch_bounds__(MASS_WARPS * 32)
    mass_plain_kernel(const __grid_constant__ rf_attention_mass_args p) {
    extern __shared__ float sums[];
    const int lane = threadIdx.x & 31, dim = p.head_dim, heads = p.num_q_heads;
    const int group = heads / p.num_kv_heads, b = blockIdx.y, first = blockIdx.x * KEYS;
    const int num_queries = (int)(p.query_rows ? p.num_queries : p.rows);
    rf_wait_for_previous();
    const int seen = clamp_len(p.kv_lens, b, p.num_keys);
    const T *const queries = (const T *)p.q + (int64_t)b * p.rows * heads * dim;
    for (int h = threadIdx.x >> 5; h < heads; h += blockDim.x >> 5) {
        const float *const lse = p.lse + ((int64_t)b * heads + h) * p.rows;
        for (int j = first; j < min(first + KEYS, seen); j++) {
            const T *const k = (const T *)p.k + key_offset(p, b, j) + (int64_t)(h / group) * dim;
            float sum = 0.0f;
            for (int i = 0; i < num_queries; i++) {
                const int row = p.query_rows ? p.query_rows[i] : i;
                if (lse[row] == -INFINITY) continue;
                sum += expf(p.scale * warp_dot(queries + ((int64_t)row * heads + h) * dim, k, dim) - lse[row]);
            }
            if (lane == 0) sums[h * KEYS + j - first] = sum;
        }
    }
    write_mass(p, sums, b, first, seen);
}

extern "C" rf_status rf_attention_mass_cuda(rf_stream *stream, const rf_attention_mass_args *a, rf_error *err) {
    RF_TRY(rf_attention_mass_check(a, err));
    RF_TRY(rf_text_size("attention_mass", "num_q_heads", a->num_q_heads, 1, MAX_HEADS, err));
    RF_TRY(rf_text_size("attention_mass", "batch", a->batch, 0, 65535, err));
    if (!stream || a->batch == 0 || a->num_keys == 0 || (!a->mass && !a->head_mass)) return RF_OK;
    const bool has_queries = (a->query_rows ? a->num_queries : a->rows) > 0;
    const void *const needed[] = {has_queries ? a->q : a->k, a->k, has_queries ? (const void *)a->lse : a->k};
    RF_TRY(rf_text_pointers("attention_mass", needed, 3, err));
    const bool wide = a->dtype == RF_DTYPE_BF16 && a->head_dim % 8 == 0 && a->k_row_stride % 8 == 0 &&
                      a->k_batch_stride % 8 == 0 && rf_is_aligned(a->q, 16) && rf_is_aligned(a->k, 16);
    auto kernel = wide ? mass_kernel : a->dtype == RF_DTYPE_F32 ? mass_plain_kernel<float> : mass_plain_kernel<rf_bf16>;
    const int warps = a->num_q_heads < MASS_WARPS ? a->num_q_heads : MASS_WARPS;
    return rf_launch_early(stream, "attention_mass", err, kernel,
                           dim3((unsigned)rf_ceil_div(a->num_keys, KEYS), (unsigned)a->batch),
                           dim3((unsigned)warps * 32), (size_t)a->num_q_heads * KEYS * sizeof(float), *a);
}

/* --- probabilities ------------------------------------------------------------------------------------------------------ */

/* Column i of a KV head's queries: row i / group, head kv * group + i % group. */
template <class T>
static __device__ __forceinline__ const T *probs_query(const rf_attention_probs_args &p, int kv, int group, int64_t i) {
    const int64_t row = i / group, from = p.q_index ? p.q_index[row] : row;
    return (const T *)p.q + from * p.q_row_stride + (kv * group + i - row * group) * p.head_dim;
}
static __device__ __forceinline__ float *probs_out(const rf_attention_probs_args &p, int kv, int group, int64_t i,
                                                   int j) {
    const int64_t row = i / group;
    return p.probs + (row * p.num_q_heads + kv * group + (i - row * group)) * p.num_keys + j;
}

/* Grid (key tiles of PROB_WARPS x KEYS, KV heads). */
static __global__ void __launch_bounds__(PROB_WARPS * 32)
    scores_kernel(const __grid_constant__ rf_attention_probs_args p) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, dim = p.head_dim, kv = blockIdx.y;
    const int group = p.num_q_heads / p.num_kv_heads, first = (blockIdx.x * PROB_WARPS + (threadIdx.x >> 5)) * KEYS;
    const int64_t num = p.num_rows * group;
    rf_wait_for_previous();
    const int seen = clamp_len(p.kv_len, 0, p.num_keys), j0 = first + g, j1 = j0 + 8;
    if (first >= seen) return;
    const rf_bf16 *const keys = (const rf_bf16 *)p.k + (int64_t)kv * dim;
    const rf_bf16 *const low = j0 < seen ? keys + (int64_t)(p.keys ? p.keys[j0] : j0) * p.k_row_stride : NULL;
    const rf_bf16 *const high = j1 < seen ? keys + (int64_t)(p.keys ? p.keys[j1] : j1) * p.k_row_stride : NULL;
#pragma unroll 1
    for (int64_t i0 = 0; i0 < num; i0 += QUERIES) {
        const rf_bf16 *q[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int64_t i = i0 + 8 * n + g;
            q[n] = i < num ? probs_query<rf_bf16>(p, kv, group, i) : NULL;
        }
        float s[TILES][4];
        tile_scores(s, low, high, q, dim);
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int64_t i = i0 + 8 * n + 2 * t + e;
                if (i >= num) continue;
                if (low) *probs_out(p, kv, group, i, j0) = s[n][e] * p.scale;
                if (high) *probs_out(p, kv, group, i, j1) = s[n][2 + e] * p.scale;
            }
    }
}

/* Grid (key tiles of PROB_WARPS, KV heads): a warp per key. */
template <class T>
static __global__ void __launch_bounds__(PROB_WARPS * 32)
    scores_plain_kernel(const __grid_constant__ rf_attention_probs_args p) {
    const int group = p.num_q_heads / p.num_kv_heads, kv = blockIdx.y, j = blockIdx.x * PROB_WARPS + (threadIdx.x >> 5);
    rf_wait_for_previous();
    if (j >= clamp_len(p.kv_len, 0, p.num_keys)) return;
    const T *const k = (const T *)p.k + (int64_t)(p.keys ? p.keys[j] : j) * p.k_row_stride + (int64_t)kv * p.head_dim;
    for (int64_t i = 0; i < p.num_rows * group; i++) {
        const float s = warp_dot(probs_query<T>(p, kv, group, i), k, p.head_dim) * p.scale;
        if ((threadIdx.x & 31) == 0) *probs_out(p, kv, group, i, j) = s;
    }
}

/* A block per (row, head); a thread's own elements in every pass. */
static __global__ void __launch_bounds__(SOFTMAX_THREADS)
    probs_softmax_kernel(const __grid_constant__ rf_attention_probs_args p) {
    __shared__ float shared[2][SOFTMAX_THREADS / 32];
    rf_wait_for_previous();
    const int seen = clamp_len(p.kv_len, 0, p.num_keys), num = (int)p.num_keys;
    float *const row = p.probs + (int64_t)blockIdx.x * p.num_keys;
    float top = -INFINITY, sum = 0.0f;
#pragma unroll 4
    for (int j = threadIdx.x; j < seen; j += SOFTMAX_THREADS) top = fmaxf(top, row[j]);
    top = rf_block_max<SOFTMAX_THREADS / 32>(top, shared[0]);
#pragma unroll 4
    for (int j = threadIdx.x; j < seen; j += SOFTMAX_THREADS) {
        const float e = expf(row[j] - top);
        row[j] = e;
        sum += e;
    }
    sum = rf_block_sum<SOFTMAX_THREADS / 32>(sum, shared[1]);
#pragma unroll 4
    for (int j = threadIdx.x; j < num; j += SOFTMAX_THREADS) row[j] = j < seen ? row[j] / sum : 0.0f;
}

extern "C" rf_status rf_attention_probs_cuda(rf_stream *stream, const rf_attention_probs_args *a, rf_error *err) {
    RF_TRY(rf_attention_probs_check(a, err));
    RF_TRY(rf_text_size("attention_probs", "num_rows", a->num_rows, 0, INT32_MAX / a->num_q_heads, err));
    if (!stream || a->num_rows == 0 || a->num_keys == 0) return RF_OK;
    const void *const needed[] = {a->q, a->k, a->probs};
    RF_TRY(rf_text_pointers("attention_probs", needed, 3, err));
    const bool wide = a->dtype == RF_DTYPE_BF16 && a->head_dim % 8 == 0 && a->k_row_stride % 8 == 0 &&
                      a->q_row_stride % 8 == 0 && rf_is_aligned(a->q, 16) && rf_is_aligned(a->k, 16);
    auto kernel = wide                       ? scores_kernel
                  : a->dtype == RF_DTYPE_F32 ? scores_plain_kernel<float>
                                             : scores_plain_kernel<rf_bf16>;
    RF_TRY(rf_launch_early(
        stream, "attention_probs", err, kernel,
        dim3((unsigned)rf_ceil_div(a->num_keys, wide ? PROB_WARPS * KEYS : PROB_WARPS), (unsigned)a->num_kv_heads),
        dim3(PROB_WARPS * 32), 0, *a));
    return rf_launch_early(stream, "attention_probs_softmax", err, probs_softmax_kernel,
                           dim3((unsigned)(a->num_rows * a->num_q_heads)), dim3(SOFTMAX_THREADS), 0, *a);
}

/* --- cosines ------------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ float cosine_of(float ab, float aa, float bb) {
    return ab / fmaxf(sqrtf(aa) * sqrtf(bb), 1e-8f);
}

static __device__ __forceinline__ void load8(const rf_bf16 *p, float (&v)[8]) {
    rf_unpack16(*reinterpret_cast<const uint4 *>(p), v);
}
static __device__ __forceinline__ void load8(const float *p, float (&v)[8]) {
    rf_load4(p, v);
    rf_load4(p + 4, v + 4);
}

/* WIDE: eight neighbouring columns at a time. */
template <class A, class B, bool WIDE>
static __global__ void __launch_bounds__(COSINE_THREADS)
    cosine_warp_kernel(const __grid_constant__ rf_cosine_rows_args p) {
    const int lane = threadIdx.x & 31;
    const int64_t r = (int64_t)blockIdx.x * (COSINE_THREADS / 32) + (threadIdx.x >> 5),
                  step = p.col_stride ? p.col_stride : 1;
    rf_wait_for_previous();
    if (r >= p.rows) return;
    const A *const a = (const A *)p.a + r * p.a_ld;
    const B *const b = (const B *)p.b + (p.b_rows ? p.b_rows[r] : r) * p.b_ld;
    float ab = 0.0f, aa = 0.0f, bb = 0.0f;
    if constexpr (WIDE) {
#pragma unroll 4
        for (int64_t c = lane * 8; c < p.cols; c += 256) {
            float x[8], y[8];
            load8(a + c, x);
            load8(b + c, y);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                ab = fmaf(x[i], y[i], ab);
                aa = fmaf(x[i], x[i], aa);
                bb = fmaf(y[i], y[i], bb);
            }
        }
    } else {
        for (int64_t c = lane; c < p.cols; c += 32) {
            const float x = rf_to_f32(a[c * step]), y = rf_to_f32(b[c * step]);
            ab = fmaf(x, y, ab);
            aa = fmaf(x, x, aa);
            bb = fmaf(y, y, bb);
        }
    }
    ab = rf_warp_sum(ab), aa = rf_warp_sum(aa), bb = rf_warp_sum(bb);
    if (lane == 0) p.cosine[r] = cosine_of(ab, aa, bb);
}

template <class A, class B>
static __global__ void __launch_bounds__(COSINE_THREADS)
    cosine_thread_kernel(const __grid_constant__ rf_cosine_rows_args p) {
    const int64_t r = (int64_t)blockIdx.x * COSINE_THREADS + threadIdx.x;
    rf_wait_for_previous();
    if (r >= p.rows) return;
    const A *const a = (const A *)p.a + r * p.a_ld;
    const B *const b = (const B *)p.b + (p.b_rows ? p.b_rows[r] : r) * p.b_ld;
    float ab = 0.0f, aa = 0.0f, bb = 0.0f;
#pragma unroll 4
    for (int64_t c = 0; c < p.cols; c++) {
        const float x = rf_to_f32(a[c * p.col_stride]), y = rf_to_f32(b[c * p.col_stride]);
        ab = fmaf(x, y, ab);
        aa = fmaf(x, x, aa);
        bb = fmaf(y, y, bb);
    }
    p.cosine[r] = cosine_of(ab, aa, bb);
}

template <class A, class B>
static rf_status launch_cosine(rf_stream *stream, const rf_cosine_rows_args *a, rf_error *err) {
    if (a->col_stride > 1 && a->a_ld < a->col_stride)
        return rf_launch_early(stream, "cosine_rows", err, cosine_thread_kernel<A, B>,
                               dim3((unsigned)rf_ceil_div(a->rows, COSINE_THREADS)), dim3(COSINE_THREADS), 0, *a);
    const bool wide = a->col_stride <= 1 && a->cols % 8 == 0 && a->a_ld % 8 == 0 && a->b_ld % 8 == 0 &&
                      rf_is_aligned(a->a, 16) && rf_is_aligned(a->b, 16);
    return rf_launch_early(stream, "cosine_rows", err,
                           wide ? cosine_warp_kernel<A, B, true> : cosine_warp_kernel<A, B, false>,
                           dim3((unsigned)rf_ceil_div(a->rows, COSINE_THREADS / 32)), dim3(COSINE_THREADS), 0, *a);
}

extern "C" rf_status rf_cosine_rows_cuda(rf_stream *stream, const rf_cosine_rows_args *a, rf_error *err) {
    RF_TRY(rf_cosine_rows_check(a, err));
    if (!stream || a->rows == 0) return RF_OK;
    const void *const needed[] = {a->a, a->b, a->cosine};
    RF_TRY(rf_text_pointers("cosine_rows", needed, 3, err));
    const bool b_f32 = a->b_dtype == RF_DTYPE_F32;
    if (a->a_dtype == RF_DTYPE_F32)
        return (b_f32 ? launch_cosine<float, float> : launch_cosine<float, rf_bf16>)(stream, a, err);
    return (b_f32 ? launch_cosine<rf_bf16, float> : launch_cosine<rf_bf16, rf_bf16>)(stream, a, err);
}
