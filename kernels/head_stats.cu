/* kernels/head_stats.cu - what the head says about rows (kernels/text.h).
 * Maths    Per row of z: top two by (value, lowest id), m = top, Z = sum e^(z - m), S = sum e^(z - m) (z - m);
 *          p of an id is e^(z - m) / Z, entropy ln Z - S / Z, lse m + ln Z. Two parts merge by m = max, Z and S rescaled:
 *          Z' = sum Z_i f_i, S' = sum f_i (S_i + (m_i - m) Z_i), f_i = e^(m_i - m).
 * Launch   the vocabulary in chunks: kernels/gemm.cu writes a chunk's logits, f32, to the workspace, and stats_kernel reads them
 *          back out of the L2: a block per (row, segment of 2048 ids), eight ids a thread, a part of 40 bytes each. After the
 *          last chunk merge_kernel: a warp per row. rank_of_ref needs z[ref] before anything is counted: all ids at once, as
 *          many rows as then fit, so that the workspace is the same with and without.
 * Order    segments begin at multiples of 2048 of the vocabulary whatever the chunks are, and parts are added in a fixed order:
 *          given the same logits, the same bits. Ids: integer maxima, free of any order.
 * Cost     one pass over w; 4 M ids (32 rows): 16 MB written and read in L2. Arch  sm_80 and later.
 * Checked  tests/kernels/test_text.c. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/select.cuh"
#include "kernels/text_checks.h"

static constexpr unsigned ALL = 0xffffffffu;
static constexpr int THREADS = 256, WARPS = THREADS / 32, SEGMENT = THREADS * 8, MERGE_WARPS = 4;
static constexpr int64_t MAX_ROWS = 2048;                             /* of a pass over w */
static constexpr int64_t FEW_BYTES = 16 << 20, MANY_BYTES = 32 << 20; /* of a chunk's logits */

/* Order of z above, complement of the id below: largest z, then lowest id; 0 = none. */
typedef unsigned long long ranked;

struct part {
    ranked top, noisy;
    float second, sum, weighted, noisy_z, ref; /* -inf, 0, 0, -inf, -inf without ids; sums relative to top */
    int32_t above;                             /* ids with z > z[ref] */
};

static __device__ __forceinline__ ranked rank_of(float z, int id) {
    return (ranked)rf_float_key(z) << 32 | (uint32_t)~id;
}
static __device__ __forceinline__ float value_of(ranked r) {
    return r == 0 ? -INFINITY : rf_key_float((uint32_t)(r >> 32));
}
static __device__ __forceinline__ int id_of(ranked r) {
    return r == 0 ? 0 : (int)~(uint32_t)r;
}
/* Joins the top two of disjoint sets of ids. */
static __device__ __forceinline__ void join(ranked &top, float &second, ranked other, float other_second) {
    second = fmaxf(fmaxf(second, other_second), value_of(min(top, other)));
    top = max(top, other);
}
static __device__ __forceinline__ void join_lanes(ranked &top, float &second) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        join(top, second, __shfl_xor_sync(ALL, top, step), __shfl_xor_sync(ALL, second, step));
}
static __device__ __forceinline__ ranked max_of_lanes(ranked v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = max(v, __shfl_xor_sync(ALL, v, step));
    return v;
}

/* --- noise -------------------------------------------------------------------------------------------------------------- */

/* The block function of rf_philox4x32 (core/rng.h). */
static __device__ __forceinline__ void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed,
                                              uint32_t (&out)[4]) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* -ln(-ln u), u = (word + 0.5) / 2^32. The upper half counts down from 1, where u itself would lose its digits in f32. */
static __device__ __forceinline__ float gumbel(uint32_t word) {
    const float t = ((float)min(word, ~word) + 0.5f) * 0x1p-32f; /* u or 1 - u, at most 1/2 */
    return -logf(word >> 31 ? -log1pf(-t) : -logf(t));
}

/* --- statistics of a segment -------------------------------------------------------------------------------------------- */

/* Not a number counts as -inf. */
static __device__ __forceinline__ float logit(const rf_head_stats_args &p, float z) {
    z *= p.scale;
    if (p.round_logits) z = __bfloat162float(__float2bfloat16_rn(z));
    return isnan(z) ? -INFINITY : z;
}

static __device__ __forceinline__ float ref_logit(const rf_head_stats_args &p, const float *logits, int64_t first,
                                                  int ref) {
    float z = logit(p, logits[ref - first]);
    for (int i = 0; i < p.num_bans; i++)
        if (p.bans[i] == ref) z = -INFINITY;
    return z;
}

/* Grid (segments of the chunk, rows). logits: f32 rows of ld, ids first .. first + num - 1; parts [row][num_segments]. */
template <bool NOISE>
static __global__ void __launch_bounds__(THREADS)
    stats_kernel(const __grid_constant__ rf_head_stats_args p, const float *logits, int64_t ld, int first, int num,
                 int64_t first_row, part *parts, int num_segments) {
    __shared__ ranked tops[WARPS], noisies[WARPS];
    __shared__ float seconds[WARPS], sums[WARPS], weighteds[WARPS], noisy_z;
    __shared__ int aboves[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.y;
    const int begin = blockIdx.x * SEGMENT; /* in the chunk */
    rf_wait_for_previous();
    const float *const from = logits + row * ld;

    /* z[4 i + j] is id at(i) + j */
    auto at = [&](int i) { return first + begin + i * (SEGMENT / 2) + 4 * (int)threadIdx.x; };
    const int end = first + num;
    float z[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (at(i) < end) {
            rf_load4(from + (at(i) - first), z + 4 * i);
        } else {
            z[4 * i] = z[4 * i + 1] = z[4 * i + 2] = z[4 * i + 3] = -INFINITY;
        }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) z[k] = at(k / 4) + k % 4 < end ? logit(p, z[k]) : -INFINITY;
    for (int b = 0; b < p.num_bans; b++) {
        const int ban = p.bans[b];
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (at(k / 4) + k % 4 == ban) z[k] = -INFINITY;
    }

    ranked top = 0, noisy = 0;
    float second = -INFINITY, own_noisy_z = -INFINITY;
    const uint32_t key = NOISE ? (uint32_t)(p.keys ? p.keys[first_row + row] : (int32_t)(first_row + row)) : 0;
    const uint32_t time = NOISE && p.step ? (uint32_t)*p.step : 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t words[4];
        if (NOISE) philox((uint32_t)at(i) / 4, key, time, 0, p.seed, words);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int id = at(i) + j;
            if (id >= end) continue;
            const float v = z[4 * i + j];
            join(top, second, rank_of(v, id), -INFINITY);
            if (NOISE) {
                const ranked r = rank_of(fmaf(p.temperature, gumbel(words[j]), v), id);
                if (r > noisy) noisy = r, own_noisy_z = v;
            }
        }
    }
    const ranked own_noisy = noisy;
    join_lanes(top, second);
    if (NOISE) noisy = max_of_lanes(noisy);
    if (lane == 0) {
        tops[warp] = top;
        seconds[warp] = second;
        if (NOISE) noisies[warp] = noisy;
    }
    const int ref = p.refs ? p.refs[first_row + row] : -1;
    const bool ref_is_known = ref >= first && ref < end;
    const float ref_z = ref_is_known ? ref_logit(p, from, first, ref) : -INFINITY;
    __syncthreads(); /* the warps' tops are there */
    top = tops[0], second = seconds[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) join(top, second, tops[w], seconds[w]);
    if (NOISE) {
        noisy = noisies[0];
#pragma unroll
        for (int w = 1; w < WARPS; w++) noisy = max(noisy, noisies[w]);
        if (noisy != 0 && own_noisy == noisy) noisy_z = own_noisy_z; /* one thread: ids differ */
        if (noisy == 0 && threadIdx.x == 0) noisy_z = -INFINITY;
    }

    const float m = value_of(top);
    float sum = 0.0f, weighted = 0.0f;
    int above = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float t = z[k] - m, e = z[k] == -INFINITY ? 0.0f : expf(t);
        sum += e;
        if (e > 0.0f) weighted = fmaf(e, t, weighted);
        if (p.rank_of_ref) above += z[k] > ref_z; /* ids past the end are -inf */
    }
    sum = rf_warp_sum(sum);
    weighted = rf_warp_sum(weighted);
    above = (int)__reduce_add_sync(ALL, above);
    if (lane == 0) {
        sums[warp] = sum;
        weighteds[warp] = weighted;
        aboves[warp] = above;
    }
    __syncthreads(); /* the warps' sums are there, and noisy_z */
    if (threadIdx.x != 0) return;
    sum = weighted = 0.0f;
    above = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        sum += sums[w];
        weighted += weighteds[w];
        above += aboves[w];
    }
    part out;
    out.top = top;
    out.noisy = noisy;
    out.second = second;
    out.sum = sum;
    out.weighted = weighted;
    out.noisy_z = NOISE ? noisy_z : -INFINITY;
    out.ref = ref >= first + begin && ref < min(end, first + begin + SEGMENT) ? ref_z : -INFINITY;
    out.above = above;
    parts[(int64_t)row * num_segments + (first + begin) / SEGMENT] = out;
}

/* --- merge -------------------------------------------------------------------------------------------------------------- */

/* A warp per row; lane i takes parts i, i + 32, ... */
static __global__ void __launch_bounds__(MERGE_WARPS * 32)
    merge_kernel(const __grid_constant__ rf_head_stats_args p, const part *parts, int num_segments, int64_t first_row,
                 int num_rows) {
    const int lane = threadIdx.x & 31, row = blockIdx.x * MERGE_WARPS + (threadIdx.x >> 5);
    rf_wait_for_previous();
    if (row >= num_rows) return;
    const part *const own = parts + (int64_t)row * num_segments;
    ranked top = 0, noisy = 0;
    float second = -INFINITY, ref_z = -INFINITY, noisy_z = -INFINITY;
    int above = 0;
    for (int i = lane; i < num_segments; i += 32) {
        join(top, second, own[i].top, own[i].second);
        if (own[i].noisy > noisy) noisy = own[i].noisy, noisy_z = own[i].noisy_z;
        ref_z = fmaxf(ref_z, own[i].ref);
        above += own[i].above;
    }
    const ranked own_noisy = noisy;
    join_lanes(top, second);
    noisy = max_of_lanes(noisy);
    noisy_z = rf_warp_max(own_noisy == noisy ? noisy_z : -INFINITY);
    ref_z = rf_warp_max(ref_z);
    above = (int)__reduce_add_sync(ALL, above);

    const float m = value_of(top);
    float sum = 0.0f, weighted = 0.0f;
    for (int i = lane; i < num_segments; i += 32) {
        const float t = value_of(own[i].top) - m, f = expf(t);
        if (!(f > 0.0f)) continue; /* nothing but bans, or far below */
        sum = fmaf(f, own[i].sum, sum);
        weighted = fmaf(f, fmaf(t, own[i].sum, own[i].weighted), weighted);
    }
    sum = rf_warp_sum(sum);
    weighted = rf_warp_sum(weighted);
    if (lane != 0) return;

    rf_token_stats out;
    const bool sampled = p.temperature > 0.0f, some = m > -INFINITY; /* some: not all banned */
    const float share = some ? 1.0f / sum : 0.0f, lse = some ? m + logf(sum) : -INFINITY;
    out.best = id_of(top);
    out.id = sampled ? id_of(noisy) : out.best;
    out.best_prob = share;
    out.prob = !sampled ? share : some ? expf(noisy_z - m) * share : 0.0f;
    out.margin = some ? (1.0f - expf(second - m)) * share : 0.0f;
    out.entropy = some ? fmaxf(logf(sum) - weighted * share, 0.0f) : 0.0f;
    out.lse = lse;
    out.ref_prob = some ? expf(ref_z - m) * share : 0.0f;
    if (p.refs && p.rank_of_ref) out.margin = (float)above;
    p.out[first_row + row] = out;
}

/* --- host --------------------------------------------------------------------------------------------------------------- */

/* How the work is cut: rows and ids of a GEMM, the stride of its logits, bytes of logits and in all. More rows never need fewer
 * bytes, so that a workspace made for the most rows serves all calls. */
struct cut {
    int64_t rows, ids, ld, segments;
    size_t logit_bytes, bytes;
};

static cut make_cut(const rf_head_stats_args *a) {
    cut c;
    const int64_t all = rf_ceil_div(a->vocab, 4) * 4, row_bytes = all * (int64_t)sizeof(float);
    c.segments = rf_ceil_div(a->vocab, SEGMENT);
    c.rows = a->rows < MAX_ROWS ? a->rows : MAX_ROWS;
    c.ids = a->vocab;
    int64_t limit = c.rows <= 64 ? FEW_BYTES : MANY_BYTES;
    if (limit < row_bytes && a->rank_of_ref) limit = row_bytes; /* more than four million ids */
    c.logit_bytes = (size_t)(c.rows * row_bytes < limit ? rf_ceil_div(c.rows * row_bytes, 256) * 256 : limit);
    c.bytes = c.logit_bytes + (size_t)(c.rows * c.segments) * sizeof(part);
    if (c.rows * row_bytes > limit) {
        if (a->rank_of_ref) { /* passes of nearly one size */
            c.rows = rf_ceil_div(c.rows, rf_ceil_div(c.rows, limit / row_bytes));
        } else { /* chunks of nearly one size, whole segments */
            const int64_t most = limit / (c.rows * SEGMENT * (int64_t)sizeof(float));
            c.ids = rf_ceil_div(c.segments, rf_ceil_div(c.segments, most)) * SEGMENT;
        }
    }
    c.ld = rf_ceil_div(c.ids, 4) * 4;
    return c;
}
static_assert(MAX_ROWS * SEGMENT * sizeof(float) <= MANY_BYTES && 64 * SEGMENT * sizeof(float) <= FEW_BYTES,
              "a segment of all rows fits");

extern "C" size_t rf_head_stats_workspace_cuda(rf_backend *backend, const rf_head_stats_args *args) {
    (void)backend;
    if (rf_head_stats_check(args, NULL) != RF_OK || args->rows == 0) return 0;
    return make_cut(args).bytes;
}

static rf_gemm_args gemm_of(const rf_head_stats_args *a, const cut &c, int64_t rows, int64_t ids) {
    rf_gemm_args g = rf_gemm_args_default(a->dtype, rows, ids, a->cols);
    g.y_dtype = RF_DTYPE_F32;
    g.ldy = c.ld;
    g.w_is_constant = true;
    return g;
}

extern "C" rf_status rf_head_stats_cuda(rf_stream *stream, const rf_head_stats_args *a, rf_error *err) {
    RF_TRY(rf_head_stats_check(a, err));
    const cut c = make_cut(a);
    const rf_gemm_args shape = gemm_of(a, c, c.rows, c.ids);
    RF_TRY(rf_gemm_cuda(NULL, &shape, err));
    if (!stream || a->rows == 0) return RF_OK;
    const void *const needed[] = {a->x, a->w, a->out, a->num_bans > 0 ? (const void *)a->bans : a->x};
    RF_TRY(rf_text_pointers("head_stats", needed, 4, err));
    RF_TRY(rf_check_workspace("head_stats", a->workspace, a->workspace_bytes, c.bytes, err));
    if (!rf_is_aligned(a->workspace, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "head_stats: the workspace must be aligned to 16 bytes");

    float *const logits = (float *)a->workspace;
    part *const parts = (part *)((char *)a->workspace + c.logit_bytes);
    const size_t size = rf_dtype_bytes(a->dtype);
    for (int64_t row = 0; row < a->rows; row += c.rows) {
        const int64_t rows = a->rows - row < c.rows ? a->rows - row : c.rows;
        for (int64_t id = 0; id < a->vocab; id += c.ids) {
            const int64_t ids = a->vocab - id < c.ids ? a->vocab - id : c.ids;
            rf_gemm_args g = gemm_of(a, c, rows, ids);
            g.x = (const char *)a->x + (size_t)(row * a->cols) * size;
            g.w = (const char *)a->w + (size_t)(id * a->cols) * size;
            g.y = logits;
            RF_TRY(rf_gemm_cuda(stream, &g, err));
            RF_TRY(rf_launch_early(stream, "head_stats", err,
                                   a->temperature > 0.0f ? stats_kernel<true> : stats_kernel<false>,
                                   dim3((unsigned)rf_ceil_div(ids, SEGMENT), (unsigned)rows), dim3(THREADS), 0, *a,
                                   logits, c.ld, (int)id, (int)ids, row, parts, (int)c.segments));
        }
        RF_TRY(rf_launch_early(stream, "head_stats_merge", err, merge_kernel,
                               dim3((unsigned)rf_ceil_div(rows, MERGE_WARPS)), dim3(MERGE_WARPS * 32), 0, *a, parts,
                               (int)c.segments, row, (int)rows));
    }
    return RF_OK;
}
