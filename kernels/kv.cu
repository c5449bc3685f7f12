/* kernels/kv.cu - an autoregressive cache under a budget: what keys received, what outputs would lose, norms, rows that move
 * (kernels/kv.h); kv_evict.cu has the decode step.
 * Maths    p = 2^(c q.k - lse log2 e), c = scale log2 e. Keys are the rows of a product, queries its columns, so that a sum over
 *          queries stays in a lane until four lanes meet at the end. m16n8k16 in bf16, sums in f32, for head_dim 64 and 128 and
 *          rows on 16 bytes; else (f32, other sizes) a warp for a score, lanes over head_dim.
 *          |v - o|^2 = |v|^2 - 2 v.o + |o|^2 with v.o from a second product; |o|^2 from a small kernel before.
 * Launch   sweep: a block per (key head, some query heads of its group, 128 keys; 64 for losses), a warp per 32 (16) keys, which
 *          it holds in registers: keys are read once. Queries pass in stages of 32 through a ring in shared memory (cp.async,
 *          one barrier a stage). Rows of the ring are 64 bytes apart from a multiple of 128: no bank is met twice.
 *          norms: lanes over a row; the anchor's sums of 256 keys go through the place of the cosines, which come last.
 * Cost     columns of 32 queries, 4 heads a group, head_dim 128: bound by the keys' way from memory.
 * Order    fixed, no atomics. Arch  sm_80 and later.  Checked  tests/kernels/test_kv.c. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/kv_checks.h"
#include "kernels/kv_cuda.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int COLUMNS = 4;                         /* what a sweep makes: this, or one of rf_kv_loss */
static constexpr int QUERIES = 32, N_TILES = QUERIES / 8; /* of a stage */
static constexpr int PART_KEYS = 32;                      /* keys of a partial entropy */
static constexpr int SWEEP_WARPS = 4, SWEEP_THREADS = SWEEP_WARPS * 32;
static constexpr int ROW_THREADS = 256, NORM_KEYS = 256, ANCHOR_GROUPS = 4;
static constexpr int MAX_GRID = 65535;
static constexpr float NEVER = -200.0f; /* 2^x is 0 from here on, and 0 x is 0 */
static_assert(RF_KV_LOSS_JOINT < COLUMNS && RF_KV_MAX_HEAD_DIM <= NORM_KEYS, "distinct; room for the sums of a run");

/* --- sweeps over the queries -------------------------------------------------------------------------------------------- */

template <int HD, int WHAT> struct sweep_shape {
    static constexpr bool LOSS = WHAT != COLUMNS, OUTPUTS = LOSS && WHAT != RF_KV_LOSS_VALUE; /* reads o */
    static constexpr int TILES = LOSS ? 1 : 2, WARP_KEYS = TILES * 16, KEYS = SWEEP_WARPS * WARP_KEYS;
    static constexpr int PITCH = HD * 2 + 64, PLANE = QUERIES * PITCH, PLANES = OUTPUTS ? 2 : 1;
    static constexpr int STAGES = 4 / PLANES;
};

static __device__ __forceinline__ void copy4(uint32_t dst, const float *src, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
static __device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
static __device__ __forceinline__ void store_sum(float *at, float v, bool seen, bool accumulate) {
    *at = !seen ? 0.0f : accumulate ? *at + v : v;
}
static __device__ __forceinline__ float removal_weight(float p) {
    const float r = fminf(p, 1.0f - 1e-4f);
    return __fdividef(r, 1.0f - r);
}

/* Grid (key heads, parts of the group, key tiles). norms [Hq][num_queries]: |o|^2; parts [Hq][num_parts]: entropy of PART_KEYS
 * keys. Either is NULL where nobody asks for it. */
template <int HD, int WHAT, class Args>
static __global__ void __launch_bounds__(SWEEP_THREADS, 3)
    sweep_kernel(const __grid_constant__ Args p, const float *norms, float *parts, int num_parts, int heads_each) {
    using Shape = sweep_shape<HD, WHAT>;
    constexpr int TILES = Shape::TILES, STAGES = Shape::STAGES, PITCH = Shape::PITCH, PLANE = Shape::PLANE,
                  PLANES = Shape::PLANES, CHUNKS = HD / 8, STEPS = HD / 32;
    constexpr bool LOSS = Shape::LOSS, OUTPUTS = Shape::OUTPUTS;
    __shared__ __align__(128) uint8_t ring[STAGES * PLANES * PLANE];
    __shared__ __align__(16) float consts[STAGES][3][QUERIES]; /* lse, weight, |o|^2 */

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int kv = blockIdx.x, group = p.num_q_heads / p.num_kv_heads;
    const int first_head = kv * group + (int)blockIdx.y * heads_each;
    const int num_heads = min(heads_each, (kv + 1) * group - first_head);
    const int block_first = (int)blockIdx.z * Shape::KEYS, first = block_first + warp * Shape::WARP_KEYS;
    const int num_keys = (int)p.source.num_keys, num_queries = (int)p.num_queries;
    rf_wait_for_previous();
    const int len = rf_kv_len(p.source, kv);

    /* Rows g and g + 8 of each 16 keys, columns 32 c + 8 t ...; keys that are not there are rows of zeros. */
    uint4 k_low[TILES][STEPS], k_high[TILES][STEPS], v_low[STEPS], v_high[STEPS];
    float vv[2] = {0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        const int j0 = first + 16 * m + g, j1 = j0 + 8;
        const int64_t low = (j0 < len ? rf_kv_offset(p.source, kv, j0) : 0) + 8 * t;
        const int64_t high = (j1 < len ? rf_kv_offset(p.source, kv, j1) : 0) + 8 * t;
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
            k_low[m][c] = rf_kv_load16((const rf_bf16 *)p.source.k + low + 32 * c, j0 < len);
            k_high[m][c] = rf_kv_load16((const rf_bf16 *)p.source.k + high + 32 * c, j1 < len);
            if constexpr (LOSS) {
                v_low[c] = rf_kv_load16((const rf_bf16 *)p.source.v + low + 32 * c, j0 < len);
                v_high[c] = rf_kv_load16((const rf_bf16 *)p.source.v + high + 32 * c, j1 < len);
            }
        }
    }

    /* Stages of this block: of each head those with a query that sees one of the block's keys. */
    int chunk_begin = 0;
    const int chunk_end = (num_queries + QUERIES - 1) / QUERIES;
    if (p.causal && block_first > p.first_position)
        chunk_begin = (int)min((int64_t)chunk_end, (block_first - p.first_position) / QUERIES);
    if (block_first >= len) chunk_begin = chunk_end;
    const int count = chunk_end - chunk_begin, total = count * num_heads;

    const uint32_t ring_base = (uint32_t)__cvta_generic_to_shared(ring),
                   consts_base = (uint32_t)__cvta_generic_to_shared(&consts[0][0][0]);
    auto load_stage = [&](int s) {
        const int which = s / count, i0 = (chunk_begin + s - which * count) * QUERIES, h = first_head + which;
        const uint32_t dst = ring_base + (s % STAGES) * (PLANES * PLANE);
#pragma unroll
        for (int k = 0; k < QUERIES * CHUNKS / SWEEP_THREADS; k++) {
            const int at = k * SWEEP_THREADS + (int)threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
            const bool valid = i0 + row < num_queries;
            const int64_t i = valid ? i0 + row : i0, in_row = (int64_t)h * HD + chunk * 8;
            copy16(dst + row * PITCH + chunk * 16, (const rf_bf16 *)p.q + i * p.q_row_stride + in_row, valid ? 16 : 0);
            if constexpr (OUTPUTS)
                copy16(dst + PLANE + row * PITCH + chunk * 16, (const rf_bf16 *)p.o + i * p.o_row_stride + in_row,
                       valid ? 16 : 0);
        }
        if (threadIdx.x < QUERIES) {
            const bool valid = i0 + (int)threadIdx.x < num_queries;
            const int64_t i = valid ? i0 + (int)threadIdx.x : i0;
            const uint32_t to = consts_base + ((s % STAGES) * 3 * QUERIES + threadIdx.x) * 4;
            copy4(to, p.lse + h * p.lse_stride + i, valid);
            if (p.weights) copy4(to + QUERIES * 4, p.weights + i, valid);
            if constexpr (OUTPUTS) copy4(to + 2 * QUERIES * 4, norms + (int64_t)h * num_queries + i, valid);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < total) load_stage(s);
        copy_commit();
    }
    if constexpr (LOSS) {
#pragma unroll
        for (int c = 0; c < STEPS; c++) {
            float low[8], high[8];
            rf_unpack16(v_low[c], low);
            rf_unpack16(v_high[c], high);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                vv[0] = fmaf(low[i], low[i], vv[0]);
                vv[1] = fmaf(high[i], high[i], vv[1]);
            }
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            vv[0] += __shfl_xor_sync(RF_ALL_LANES, vv[0], step);
            vv[1] += __shfl_xor_sync(RF_ALL_LANES, vv[1], step);
        }
    }

    const float c2 = p.scale * RF_LOG2_E;
    int s = 0;
#pragma unroll 1
    for (int which = 0; which < num_heads; which++) {
        float sum[TILES * 2], square[TILES * 2], peak[TILES * 2], entropy[TILES * 2]; /* row 2 m + half: key + 8 row */
#pragma unroll
        for (int r = 0; r < TILES * 2; r++) sum[r] = square[r] = peak[r] = entropy[r] = 0.0f;
#pragma unroll 1
        for (int chunk = chunk_begin; chunk < chunk_end; chunk++, s++) {
            copy_wait<STAGES - 2>();
            __syncthreads(); /* stage s is there, and stage s - 1 has been read */
            if (s + STAGES - 1 < total) load_stage(s + STAGES - 1);
            copy_commit();

            const uint8_t *const q = ring + (s % STAGES) * (PLANES * PLANE) + g * PITCH + t * 16;
            float z[TILES][N_TILES][4], u[N_TILES][4]; /* q.k; o.v */
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u[n][e] = 0.0f;
#pragma unroll
                    for (int m = 0; m < TILES; m++) z[m][n][e] = 0.0f;
                }
#pragma unroll
            for (int c = 0; c < STEPS; c++)
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    const uint4 b = *reinterpret_cast<const uint4 *>(q + n * 8 * PITCH + c * 64);
#pragma unroll
                    for (int m = 0; m < TILES; m++) rf_kv_mma32(z[m][n], k_low[m][c], k_high[m][c], b);
                }
            if constexpr (OUTPUTS) {
#pragma unroll
                for (int c = 0; c < STEPS; c++)
#pragma unroll
                    for (int n = 0; n < N_TILES; n++)
                        rf_kv_mma32(u[n], v_low[c], v_high[c],
                                    *reinterpret_cast<const uint4 *>(q + PLANE + n * 8 * PITCH + c * 64));
            }

            const float(&stage)[3][QUERIES] = consts[s % STAGES];
            auto add = [&](auto masked) {
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int in_stage = 8 * n + 2 * t + e, i = chunk * QUERIES + in_stage;
                        float l = stage[0][in_stage]; /* +inf adds nothing */
                        l = i < num_queries && l != -INFINITY ? l * RF_LOG2_E : INFINITY;
                        const float w = p.weights ? stage[1][in_stage] : 1.0f;
                        [[maybe_unused]] float oo = 0.0f;
                        if constexpr (OUTPUTS) oo = stage[2][in_stage];
#pragma unroll
                        for (int r = 0; r < TILES * 2; r++) {
                            const float dot = z[r / 2][n][2 * (r & 1) + e];
                            const float x = fmaxf(fmaf(dot, c2, -l), NEVER);
                            float pr = exp2_approx(x);
                            if constexpr (decltype(masked)::value) {
                                if (first + 8 * r + g > p.first_position + i) pr = 0.0f;
                            }
                            if constexpr (!LOSS) {
                                const float wp = w * pr;
                                sum[r] += wp;
                                square[r] = fmaf(wp, pr, square[r]);
                                peak[r] = fmaxf(peak[r], pr);
                                entropy[r] = fmaf(pr, x, entropy[r]);
                            } else if constexpr (WHAT == RF_KV_LOSS_VALUE) {
                                sum[r] = fmaf(w * pr, pr, sum[r]); /* |v|^2 at the end */
                            } else {
                                const float ov = u[n][2 * (r & 1) + e];
                                if constexpr (WHAT == RF_KV_LOSS_JOINT) {
                                    const float a = dot * p.scale, b = 1.0f + a; /* |b v - a o|^2 */
                                    const float d = fmaf(b * b, vv[r & 1], fmaf(a * a, oo, -2.0f * a * b * ov));
                                    sum[r] = fmaf(w * pr * pr, fmaxf(d, 0.0f), sum[r]);
                                } else {
                                    const float f = WHAT == RF_KV_LOSS_KEY ? pr * dot * p.scale : removal_weight(pr);
                                    const float d = fmaf(-2.0f, ov, vv[r & 1] + oo);
                                    sum[r] = fmaf(w * f * f, fmaxf(d, 0.0f), sum[r]);
                                }
                            }
                        }
                    }
                }
            };
            if (p.causal && block_first + Shape::KEYS - 1 > p.first_position + chunk * QUERIES)
                add(std::true_type{});
            else
                add(std::false_type{});
        }

        /* Four lanes have the parts of a row; lane t writes row t. */
        const int h = first_head + which, j = first + 8 * t + g;
        const bool writes = t < 2 * TILES && j < num_keys;
        float part = 0.0f, out_sum = 0.0f, out_square = 0.0f, out_peak = 0.0f;
#pragma unroll
        for (int r = 0; r < TILES * 2; r++) {
            const int key = first + 8 * r + g;
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                sum[r] += __shfl_xor_sync(RF_ALL_LANES, sum[r], step);
                if constexpr (!LOSS) {
                    square[r] += __shfl_xor_sync(RF_ALL_LANES, square[r], step);
                    peak[r] = fmaxf(peak[r], __shfl_xor_sync(RF_ALL_LANES, peak[r], step));
                }
            }
            if constexpr (!LOSS) {
                if (key < len && key < p.entropy_keys) part += entropy[r];
            }
            if (t == r) out_sum = sum[r], out_square = square[r], out_peak = peak[r];
        }
        if constexpr (LOSS) {
            if (WHAT == RF_KV_LOSS_VALUE) out_sum *= t & 1 ? vv[1] : vv[0];
            if (writes) store_sum(p.out + h * p.out_stride + j, out_sum, j < len, p.accumulate);
        } else {
            const int64_t at = h * p.out_stride + j;
            if (writes && p.s1) store_sum(p.s1 + at, out_sum, j < len, p.accumulate);
            if (writes && p.s2) store_sum(p.s2 + at, out_square, j < len, p.accumulate);
            if (writes && p.peak) p.peak[at] = j >= len ? 0.0f : p.accumulate ? fmaxf(p.peak[at], out_peak) : out_peak;
            if (p.entropy) {
                part = rf_warp_sum(part);
                if (lane == 0 && first < num_keys) parts[(int64_t)h * num_parts + first / PART_KEYS] = -RF_LN_2 * part;
            }
        }
    }
}

/* Grid (query heads, 1, tiles of SWEEP_WARPS x PART_KEYS keys). */
template <class T, int WHAT, class Args>
static __global__ void __launch_bounds__(SWEEP_THREADS)
    plain_sweep_kernel(const __grid_constant__ Args p, float *parts, int num_parts) {
    const int lane = threadIdx.x & 31, dim = p.head_dim, h = blockIdx.x, kv = h / (p.num_q_heads / p.num_kv_heads);
    const int num_keys = (int)p.source.num_keys, num_queries = (int)p.num_queries;
    const int first = ((int)blockIdx.z * SWEEP_WARPS + (int)(threadIdx.x >> 5)) * PART_KEYS;
    rf_wait_for_previous();
    const int len = rf_kv_len(p.source, kv);
    const float *const lse = p.lse + h * p.lse_stride;
    float part = 0.0f;
    for (int j = first; j < min(first + PART_KEYS, num_keys); j++) {
        float sum = 0.0f, square = 0.0f, peak = 0.0f, entropy = 0.0f;
        if (j < len) {
            const int64_t at = rf_kv_offset(p.source, kv, j);
            const T *const k = (const T *)p.source.k + at, *const v = (const T *)p.source.v + at;
            int i = 0;
            if (p.causal && j > p.first_position) i = (int)min((int64_t)num_queries, j - p.first_position);
            for (; i < num_queries; i++) {
                const float l = lse[i];
                if (l == -INFINITY) continue;
                const float w = p.weights ? p.weights[i] : 1.0f;
                const float z = p.scale * rf_kv_dot((const T *)p.q + i * p.q_row_stride + (int64_t)h * dim, k, dim);
                const float pr = expf(z - l);
                if constexpr (WHAT == COLUMNS) {
                    sum = fmaf(w, pr, sum);
                    square = fmaf(w * pr, pr, square);
                    peak = fmaxf(peak, pr);
                    if (pr > 0.0f) entropy = fmaf(-pr, z - l, entropy);
                } else {
                    const T *o = NULL;
                    if (WHAT != RF_KV_LOSS_VALUE) o = (const T *)p.o + i * p.o_row_stride + (int64_t)h * dim;
                    const float f = WHAT == RF_KV_LOSS_REMOVAL ? removal_weight(pr)
                                    : WHAT == RF_KV_LOSS_KEY   ? pr * z
                                                               : pr;
                    float d = 0.0f;
                    for (int c = lane; c < dim; c += 32) {
                        const float value = rf_to_f32(v[c]), away = o ? value - rf_to_f32(o[c]) : value;
                        const float e = WHAT == RF_KV_LOSS_JOINT ? fmaf(z, away, value) : away;
                        d = fmaf(e, e, d);
                    }
                    sum = fmaf(w * f * f, rf_warp_sum(d), sum);
                }
            }
        }
        const int64_t at = h * p.out_stride + j;
        if constexpr (WHAT == COLUMNS) {
            if (j < p.entropy_keys) part += entropy;
            if (lane == 0) {
                if (p.s1) store_sum(p.s1 + at, sum, j < len, p.accumulate);
                if (p.s2) store_sum(p.s2 + at, square, j < len, p.accumulate);
                if (p.peak) p.peak[at] = j >= len ? 0.0f : p.accumulate ? fmaxf(p.peak[at], peak) : peak;
            }
        } else {
            if (lane == 0) store_sum(p.out + at, sum, j < len, p.accumulate);
        }
    }
    if constexpr (WHAT == COLUMNS) {
        if (p.entropy && lane == 0 && first < num_keys) parts[(int64_t)h * num_parts + first / PART_KEYS] = part;
    }
}

/* A block per query head. */
static __global__ void __launch_bounds__(ROW_THREADS)
    entropy_kernel(float *entropy, const float *parts, int num_parts, bool accumulate) {
    __shared__ float shared[ROW_THREADS / 32];
    const float *const own = parts + (int64_t)blockIdx.x * num_parts;
    rf_wait_for_previous();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < num_parts; i += ROW_THREADS) sum += own[i];
    sum = rf_block_sum<ROW_THREADS / 32>(sum, shared);
    if (threadIdx.x == 0) store_sum(entropy + blockIdx.x, sum, true, accumulate);
}

/* norms[h][i] = |o_i|^2 of bf16 rows: a warp per (query, head); grid (warps of queries, heads). head_dim <= 256, a multiple of 8. */
static __global__ void __launch_bounds__(ROW_THREADS)
    output_norms_kernel(const __grid_constant__ rf_kv_loss_args p, float *norms) {
    const int lane = threadIdx.x & 31, h = blockIdx.y;
    const int64_t i = (int64_t)blockIdx.x * (ROW_THREADS / 32) + (threadIdx.x >> 5);
    rf_wait_for_previous();
    if (i >= p.num_queries) return;
    float sum = 0.0f;
    if (lane * 8 < p.head_dim) {
        float v[8];
        rf_kv_load8<true>((const rf_bf16 *)p.o + i * p.o_row_stride + (int64_t)h * p.head_dim + lane * 8, 8, v);
#pragma unroll
        for (int c = 0; c < 8; c++) sum = fmaf(v[c], v[c], sum);
    }
    sum = rf_warp_sum(sum);
    if (lane == 0) norms[h * p.num_queries + i] = sum;
}

template <class Args> static int count_parts(const Args *a) {
    return (int)rf_ceil_div(a->source.num_keys, PART_KEYS);
}

template <int HD, int WHAT, class Args>
static rf_status launch_sweep(rf_stream *stream, const char *label, const Args *a, const float *norms, float *parts,
                              rf_error *err) {
    using Shape = sweep_shape<HD, WHAT>;
    static std::atomic<uint64_t> allowed{0};
    auto kernel = sweep_kernel<HD, WHAT, Args>;
    const cudaError_t code = rf_allow_shared((const void *)kernel, 0, &allowed);
    if (code != cudaSuccess) return rf_cuda_fail(err, label, code);
    const int group = a->num_q_heads / a->num_kv_heads;
    const int64_t tiles = rf_ceil_div(a->source.num_keys, Shape::KEYS), blocks = tiles * a->num_kv_heads;
    const int64_t wanted = rf_ceil_div(2 * (int64_t)rf_backend_num_sms(rf_stream_backend(stream)), blocks);
    const int heads_each = (int)rf_ceil_div(group, wanted < 1 ? 1 : wanted < group ? wanted : group);
    return rf_launch_early(stream, label, err, kernel,
                           dim3((unsigned)a->num_kv_heads, (unsigned)rf_ceil_div(group, heads_each), (unsigned)tiles),
                           dim3(SWEEP_THREADS), 0, *a, norms, parts, count_parts(a), heads_each);
}

template <class T, int WHAT, class Args>
static rf_status launch_plain_sweep(rf_stream *stream, const char *label, const Args *a, float *parts, rf_error *err) {
    return rf_launch_early(
        stream, label, err, plain_sweep_kernel<T, WHAT, Args>,
        dim3((unsigned)a->num_q_heads, 1, (unsigned)rf_ceil_div(a->source.num_keys, SWEEP_WARPS * PART_KEYS)),
        dim3(SWEEP_THREADS), 0, *a, parts, count_parts(a));
}

template <class Args> static bool is_wide(const Args *a) {
    return a->dtype == RF_DTYPE_BF16 && (a->head_dim == 64 || a->head_dim == 128) && a->source.row_stride % 8 == 0 &&
           (a->source.rows || a->source.head_stride % 8 == 0) && a->q_row_stride % 8 == 0 &&
           rf_is_aligned(a->source.k, 16) && rf_is_aligned(a->q, 16);
}

/* A grid has at most MAX_GRID key tiles of the smallest kind. */
template <class Args> static rf_status check_limits(const char *op, const Args *a, rf_error *err) {
    RF_TRY(rf_text_size(op, "num_keys", a->source.num_keys, 0, (int64_t)MAX_GRID * SWEEP_WARPS * 16, err));
    return rf_text_size(op, "num_queries", a->num_queries, 0, INT32_MAX / 2 / a->num_q_heads, err);
}

/* --- columns ------------------------------------------------------------------------------------------------------------ */

extern "C" size_t rf_kv_columns_workspace_cuda(rf_backend *backend, const rf_kv_columns_args *a) {
    (void)backend;
    if (rf_kv_columns_check(a, NULL) != RF_OK) return 0;
    return (size_t)a->num_q_heads * (size_t)count_parts(a) * sizeof(float);
}

extern "C" rf_status rf_kv_columns_cuda(rf_stream *stream, const rf_kv_columns_args *a, rf_error *err) {
    RF_TRY(rf_kv_columns_check(a, err));
    RF_TRY(check_limits("kv_columns", a, err));
    if (!stream || (!a->s1 && !a->s2 && !a->peak && !a->entropy)) return RF_OK;
    const int num_parts = count_parts(a);
    float *const parts = (float *)a->workspace;
    if (a->entropy)
        RF_TRY(rf_check_workspace("kv_columns", a->workspace, a->workspace_bytes,
                                  (size_t)a->num_q_heads * (size_t)num_parts * sizeof(float), err));
    if (a->source.num_keys > 0) {
        const void *const needed[] = {a->source.k, a->num_queries > 0 ? a->q : a->source.k,
                                      a->num_queries > 0 ? (const void *)a->lse : a->source.k};
        RF_TRY(rf_text_pointers("kv_columns", needed, 3, err));
        rf_status status;
        if (is_wide(a))
            status = a->head_dim == 128 ? launch_sweep<128, COLUMNS>(stream, "kv_columns", a, NULL, parts, err)
                                        : launch_sweep<64, COLUMNS>(stream, "kv_columns", a, NULL, parts, err);
        else
            status = a->dtype == RF_DTYPE_F32
                         ? launch_plain_sweep<float, COLUMNS>(stream, "kv_columns", a, parts, err)
                         : launch_plain_sweep<rf_bf16, COLUMNS>(stream, "kv_columns", a, parts, err);
        RF_TRY(status);
    }
    if (!a->entropy) return RF_OK;
    return rf_launch_early(stream, "kv_columns_entropy", err, entropy_kernel, dim3((unsigned)a->num_q_heads),
                           dim3(ROW_THREADS), 0, a->entropy, parts, num_parts, a->accumulate);
}

/* --- losses ------------------------------------------------------------------------------------------------------------- */

static size_t norm_bytes(const rf_kv_loss_args *a) {
    if (a->loss == RF_KV_LOSS_VALUE || a->dtype != RF_DTYPE_BF16) return 0;
    return (size_t)a->num_q_heads * (size_t)a->num_queries * sizeof(float);
}

extern "C" size_t rf_kv_loss_workspace_cuda(rf_backend *backend, const rf_kv_loss_args *a) {
    (void)backend;
    return rf_kv_loss_check(a, NULL) == RF_OK ? norm_bytes(a) : 0;
}

template <int WHAT> static rf_status launch_loss(rf_stream *stream, const rf_kv_loss_args *a, rf_error *err) {
    constexpr bool OUTPUTS = WHAT != RF_KV_LOSS_VALUE;
    const bool wide = is_wide(a) && rf_is_aligned(a->source.v, 16) &&
                      (!OUTPUTS || (a->o_row_stride % 8 == 0 && rf_is_aligned(a->o, 16)));
    if (!wide)
        return a->dtype == RF_DTYPE_F32 ? launch_plain_sweep<float, WHAT>(stream, "kv_loss", a, NULL, err)
                                        : launch_plain_sweep<rf_bf16, WHAT>(stream, "kv_loss", a, NULL, err);
    float *const norms = (float *)a->workspace;
    if (OUTPUTS && a->num_queries > 0) {
        RF_TRY(rf_check_workspace("kv_loss", a->workspace, a->workspace_bytes, norm_bytes(a), err));
        RF_TRY(rf_launch_early(stream, "kv_loss_norms", err, output_norms_kernel,
                               dim3((unsigned)rf_ceil_div(a->num_queries, ROW_THREADS / 32), (unsigned)a->num_q_heads),
                               dim3(ROW_THREADS), 0, *a, norms));
    }
    return a->head_dim == 128 ? launch_sweep<128, WHAT>(stream, "kv_loss", a, norms, NULL, err)
                              : launch_sweep<64, WHAT>(stream, "kv_loss", a, norms, NULL, err);
}

extern "C" rf_status rf_kv_loss_cuda(rf_stream *stream, const rf_kv_loss_args *a, rf_error *err) {
    RF_TRY(rf_kv_loss_check(a, err));
    RF_TRY(check_limits("kv_loss", a, err));
    if (!stream || a->source.num_keys == 0) return RF_OK;
    const void *const k = a->source.k;
    const void *const needed[] = {k,
                                  a->source.v,
                                  a->out,
                                  a->num_queries > 0 ? a->q : k,
                                  a->num_queries > 0 ? (const void *)a->lse : k,
                                  a->num_queries > 0 && a->loss != RF_KV_LOSS_VALUE ? a->o : k};
    RF_TRY(rf_text_pointers("kv_loss", needed, 6, err));
    switch (a->loss) {
    case RF_KV_LOSS_REMOVAL: return launch_loss<RF_KV_LOSS_REMOVAL>(stream, a, err);
    case RF_KV_LOSS_KEY: return launch_loss<RF_KV_LOSS_KEY>(stream, a, err);
    case RF_KV_LOSS_VALUE: return launch_loss<RF_KV_LOSS_VALUE>(stream, a, err);
    case RF_KV_LOSS_JOINT: return launch_loss<RF_KV_LOSS_JOINT>(stream, a, err);
    }
    return rf_fail(err, RF_ERR_ARGUMENT, "kv_loss: loss is %d", (int)a->loss);
}

/* --- rows ---------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float sum_over(float v, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(RF_ALL_LANES, v, step);
    return v;
}

/* --- norms -------------------------------------------------------------------------------------------------------------- */

/* Grid (runs of NORM_KEYS keys, key heads); the last run takes the rest, too. The sum of k / |k| of a run goes to the anchor if
 * there is one run, else into the run's own first columns of key_cosine, of which there are NORM_KEYS or more. */
template <class T, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    norms_kernel(const __grid_constant__ rf_kv_norms_args p, int lanes) {
    __shared__ __align__(16) float sums[ROW_THREADS / 32][RF_KV_MAX_HEAD_DIM];
    const int lane = threadIdx.x & (lanes - 1), warp = threadIdx.x >> 5, per_pass = ROW_THREADS / lanes;
    const int h = blockIdx.y, c = lane * 8, num = min(8, p.head_dim - c); /* of this lane; none if <= 0 */
    const int num_keys = (int)p.source.num_keys, begin = (int)blockIdx.x * NORM_KEYS;
    const int end = blockIdx.x + 1 == gridDim.x ? num_keys : begin + NORM_KEYS;
    rf_wait_for_previous();
    const int len = rf_kv_len(p.source, h);
    float sum[8] = {};
#pragma unroll 4
    for (int j0 = begin; j0 < end; j0 += per_pass) {
        const int j = j0 + (int)threadIdx.x / lanes;
        const bool seen = j < end && j < len;
        const int64_t at = seen ? rf_kv_offset(p.source, h, j) + c : 0;
        float k[8] = {}, v[8] = {};
        if (seen && num > 0) {
            if (p.key_norm || p.key_cosine) rf_kv_load8<WIDE>((const T *)p.source.k + at, num, k);
            if (p.value_norm) rf_kv_load8<WIDE>((const T *)p.source.v + at, num, v);
        }
        float kk = 0.0f, vv = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            kk = fmaf(k[i], k[i], kk);
            vv = fmaf(v[i], v[i], vv);
        }
        kk = sqrtf(sum_over(kk, lanes));
        if (p.value_norm) vv = sqrtf(sum_over(vv, lanes));
        if (lane == 0 && j < end) {
            if (p.key_norm) p.key_norm[h * p.out_stride + j] = kk;
            if (p.value_norm) p.value_norm[h * p.out_stride + j] = vv;
        }
        const float inv = kk > 0.0f ? 1.0f / kk : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = fmaf(k[i], inv, sum[i]);
    }
    if (!p.key_cosine) return;
    for (int step = lanes; step < 32; step *= 2) { /* the rows of a warp */
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(RF_ALL_LANES, sum[i], step);
    }
    if ((threadIdx.x & 31) < lanes) {
        rf_store4(&sums[warp][c], sum);
        rf_store4(&sums[warp][c + 4], sum + 4);
    }
    __syncthreads(); /* the warps' sums are there */
    float *const to = gridDim.x == 1 ? p.anchor + (int64_t)h * p.head_dim : p.key_cosine + h * p.out_stride + begin;
    for (int i = threadIdx.x; i < p.head_dim; i += ROW_THREADS) {
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < ROW_THREADS / 32; w++) all += sums[w][i];
        to[i] = all;
    }
}

/* A block per key head. */
static __global__ void __launch_bounds__(ANCHOR_GROUPS *RF_KV_MAX_HEAD_DIM)
    anchor_kernel(const __grid_constant__ rf_kv_norms_args p, int num_runs) {
    __shared__ float sums[ANCHOR_GROUPS][RF_KV_MAX_HEAD_DIM];
    const int c = threadIdx.x % RF_KV_MAX_HEAD_DIM, part = threadIdx.x / RF_KV_MAX_HEAD_DIM, h = blockIdx.x;
    rf_wait_for_previous();
    float sum = 0.0f;
    if (c < p.head_dim) {
        const float *const from = p.key_cosine + h * p.out_stride + c;
#pragma unroll 8
        for (int b = part; b < num_runs; b += ANCHOR_GROUPS) sum += from[(int64_t)b * NORM_KEYS];
    }
    sums[part][c] = sum;
    __syncthreads();
    if (part != 0 || c >= p.head_dim) return;
#pragma unroll
    for (int i = 1; i < ANCHOR_GROUPS; i++) sum += sums[i][c];
    p.anchor[(int64_t)h * p.head_dim + c] = sum;
}

template <class T, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    cosines_kernel(const __grid_constant__ rf_kv_norms_args p, int lanes) {
    const int lane = threadIdx.x & (lanes - 1), per_pass = ROW_THREADS / lanes, h = blockIdx.y;
    const int c = lane * 8, num = min(8, p.head_dim - c), begin = (int)blockIdx.x * NORM_KEYS;
    const int end = (int)min(p.source.num_keys, (int64_t)begin + NORM_KEYS);
    rf_wait_for_previous();
    const int len = rf_kv_len(p.source, h);
    float a[8], aa = 0.0f;
    rf_kv_load8<false>(p.anchor + (int64_t)h * p.head_dim + c, num, a);
#pragma unroll
    for (int i = 0; i < 8; i++) aa = fmaf(a[i], a[i], aa);
    aa = sqrtf(sum_over(aa, lanes));
#pragma unroll 4
    for (int j0 = begin; j0 < end; j0 += per_pass) {
        const int j = j0 + (int)threadIdx.x / lanes;
        const bool seen = j < end && j < len;
        float k[8] = {};
        if (seen && num > 0) rf_kv_load8<WIDE>((const T *)p.source.k + rf_kv_offset(p.source, h, j) + c, num, k);
        float kk = 0.0f, ka = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            kk = fmaf(k[i], k[i], kk);
            ka = fmaf(k[i], a[i], ka);
        }
        kk = sqrtf(sum_over(kk, lanes)) * aa;
        ka = sum_over(ka, lanes);
        if (lane == 0 && j < end) p.key_cosine[h * p.out_stride + j] = kk > 0.0f ? ka / kk : 0.0f;
    }
}

template <class T, bool WIDE>
static rf_status launch_norms(rf_stream *stream, const rf_kv_norms_args *a, rf_error *err) {
    const int lanes = rf_kv_row_lanes(a->head_dim);
    const int64_t runs = a->source.num_keys < NORM_KEYS ? 1 : a->source.num_keys / NORM_KEYS;
    const unsigned heads = (unsigned)a->num_kv_heads;
    RF_TRY(rf_launch_early(stream, "kv_norms", err, norms_kernel<T, WIDE>, dim3((unsigned)runs, heads),
                           dim3(ROW_THREADS), 0, *a, lanes));
    if (!a->key_cosine) return RF_OK;
    if (runs > 1)
        RF_TRY(rf_launch_early(stream, "kv_norms_anchor", err, anchor_kernel, dim3(heads),
                               dim3(ANCHOR_GROUPS * RF_KV_MAX_HEAD_DIM), 0, *a, (int)runs));
    return rf_launch_early(stream, "kv_norms_cosine", err, cosines_kernel<T, WIDE>,
                           dim3((unsigned)rf_ceil_div(a->source.num_keys, NORM_KEYS), heads), dim3(ROW_THREADS), 0, *a,
                           lanes);
}

extern "C" rf_status rf_kv_norms_cuda(rf_stream *stream, const rf_kv_norms_args *a, rf_error *err) {
    RF_TRY(rf_kv_norms_check(a, err));
    RF_TRY(rf_kv_check_row("kv_norms", a->head_dim, err));
    if (!stream || a->source.num_keys == 0 || (!a->key_norm && !a->value_norm && !a->key_cosine)) return RF_OK;
    const void *const given = a->key_norm ? a->key_norm : a->value_norm ? a->value_norm : a->key_cosine;
    const void *const needed[] = {a->key_norm || a->key_cosine ? a->source.k : given,
                                  a->value_norm ? a->source.v : given, a->key_cosine ? a->anchor : given};
    RF_TRY(rf_text_pointers("kv_norms", needed, 3, err));
    const bool wide = rf_kv_source_is_wide(a->source, a->head_dim);
    if (a->dtype == RF_DTYPE_F32)
        return wide ? launch_norms<float, true>(stream, a, err) : launch_norms<float, false>(stream, a, err);
    return wide ? launch_norms<rf_bf16, true>(stream, a, err) : launch_norms<rf_bf16, false>(stream, a, err);
}
