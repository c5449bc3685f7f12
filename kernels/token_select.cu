/* kernels/token_select.cu - which token rows a partial step computes: scores, cell bonus, the count highest, ages.
 * Maths    score = s1 + age_weight * age / tokens, or a word of Philox4x32-10 with counter (row, branch, site, step),
 *          without age and bonus; the largest of a cell gains bonus * itself. A NaN score counts as +inf. The lowest
 *          chosen score by radix select; of rows with that score the lower ones.
 * Launch   a block per site and group, 256 threads up to 1024 tokens, else 512; one launch for all. Scores live in shared
 *          memory up to 8192 tokens and in the workspace above.
 * Lists    warp w looks after one run of tokens: it counts chosen and tied rows, then writes behind the warps before it, so
 *          lists ascend.
 * Cost     3 * 4 bytes a row and a few passes over shared memory.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table and sorting. */
#include <cuda_runtime.h>

#include "kernels/cache_checks.h"
#include "kernels/checks.h"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/select.cuh"

static constexpr int MAX_THREADS = 512, MAX_STAGED = 8192; /* scores in shared memory */

/* --- kernel ------------------------------------------------------------------------------------------------------- */

/* First word of rf_philox4x32 (core/rng.h) as a number in [0, 1). */
static __device__ __forceinline__ float random_score(uint64_t seed, uint32_t row, uint32_t group, uint32_t site,
                                                     uint32_t step) {
    uint32_t c0 = row, c1 = group, c2 = site, c3 = step, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
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
    return (float)(c0 >> 8) * 0x1p-24f;
}

/* A cell's largest score; cells do not overlap, so each is one thread's. */
static __device__ __forceinline__ void add_cell_bonus(const rf_token_select_args &p, float *score) {
    const int cell = p.cell, h = (int)p.grid_h, w = (int)p.grid_w;
    const int cells_y = (h + cell - 1) / cell, cells_x = (w + cell - 1) / cell;
    for (int i = threadIdx.x; i < (int)p.frames * cells_y * cells_x; i += blockDim.x) {
        const int line = i / cells_x, frame = line / cells_y;
        const int y0 = (line - frame * cells_y) * cell, x0 = (i - line * cells_x) * cell;
        float *const from = score + frame * h * w;
        int best = y0 * w + x0;
        float top = from[best];
        for (int y = y0; y < min(h, y0 + cell); y++) {
            for (int x = x0; x < min(w, x0 + cell); x++) {
                const float v = from[y * w + x];
                if (v > top) top = v, best = y * w + x;
            }
        }
        from[best] = __fadd_rn(top, __fmul_rn(p.bonus, top)); /* rounded as on the CPU */
    }
}

template <bool STAGED>
static __global__ void __launch_bounds__(MAX_THREADS) select_kernel(const __grid_constant__ rf_token_select_args p) {
    extern __shared__ float staged[];
    __shared__ rf_selection<1> selection;
    __shared__ int warp_above[MAX_THREADS / 32], warp_equal[MAX_THREADS / 32];
    const int tokens = (int)p.tokens, site = blockIdx.x, packed = blockIdx.y;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
    rf_wait_for_previous();
    const int group = p.index ? p.index[packed] : packed;
    const int count = max(0, min(p.counts[site], tokens));
    const int64_t at = (site * p.all_groups + group) * tokens;
    float *const score = STAGED ? staged : p.workspace + (site * p.groups + packed) * tokens;
    float *const age = p.age + at;
    int32_t *const place = p.place ? p.place + site * p.list_stride + packed * tokens : NULL;
    if (count == 0) { /* the whole block */
        for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
            age[t] += 1.0f;
            if (place) place[t] = -1;
        }
        return;
    }

    const uint32_t step = p.random ? (uint32_t)*p.step : 0u;
    for (int t = threadIdx.x; t < tokens; t += blockDim.x) {
        const float s =
            p.random ? random_score(p.seed, (uint32_t)t, (uint32_t)(group / p.groups_per_branch), (uint32_t)site, step)
                     : p.s1[at + t] + p.age_weight * age[t] / (float)tokens;
        score[t] = isnan(s) ? __int_as_float(0x7f800000) : s;
    }
    if (threadIdx.x == 0) selection.rank[0] = (uint32_t)(tokens - count);
    if (!p.random && p.cell > 0 && p.bonus != 0.0f) {
        __syncthreads(); /* scores are there */
        add_cell_bonus(p, score);
        __syncthreads(); /* and what cells add to them */
    }
    rf_select(selection, tokens, [&](int t) { return score[t]; });
    const uint32_t last = selection.key[0];                                     /* the lowest chosen score */
    const int need = (int)(selection.equal[0] - selection.rank[0]);             /* how many of its rows are chosen */
    const int per_warp = (tokens + num_warps * 32 - 1) / (num_warps * 32) * 32; /* a run of tokens for each warp */
    const int begin = warp * per_warp, end = min(tokens, begin + per_warp);

    int above = 0, equal = 0; /* so far, in the order of rows */
    for (int first = begin; first < end; first += 32) {
        const int t = first + lane;
        const uint32_t key = t < end ? rf_float_key(score[t]) : 0u; /* no score has key 0 */
        above += __popc(__ballot_sync(0xffffffffu, key > last));
        equal += __popc(__ballot_sync(0xffffffffu, key == last));
    }
    if (lane == 0) warp_above[warp] = above, warp_equal[warp] = equal;
    __syncthreads(); /* every warp has counted */
    above = __reduce_add_sync(0xffffffffu, lane < warp ? warp_above[lane] : 0);
    equal = __reduce_add_sync(0xffffffffu, lane < warp ? warp_equal[lane] : 0);

    int32_t *const rows_packed = p.rows_packed + site * p.list_stride + (int64_t)packed * count;
    int32_t *const rows_state = p.rows_state + site * p.list_stride + (int64_t)packed * count;
    const uint32_t before = (1u << lane) - 1u;
    for (int first = begin; first < end; first += 32) {
        const int t = first + lane;
        const uint32_t key = t < end ? rf_float_key(score[t]) : 0u;
        const uint32_t above_mask = __ballot_sync(0xffffffffu, key > last);
        const uint32_t equal_mask = __ballot_sync(0xffffffffu, key == last);
        const int above_before = above + __popc(above_mask & before),
                  equal_before = equal + __popc(equal_mask & before);
        const bool chosen = key > last || (key == last && equal_before < need);
        const int pos = above_before + min(equal_before, need);
        if (chosen) {
            rows_packed[pos] = packed * tokens + t;
            rows_state[pos] = group * tokens + t;
        }
        if (t < end) {
            age[t] = chosen ? 0.0f : age[t] + 1.0f;
            if (place) place[t] = chosen ? packed * count + pos : -1;
        }
        above += __popc(above_mask);
        equal += __popc(equal_mask);
    }
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

extern "C" rf_status rf_token_select_cuda(rf_stream *stream, const rf_token_select_args *args, rf_error *err) {
    rf_status status = stream ? rf_token_select_check_run(args, err) : rf_token_select_check(args, err);
    if (status == RF_OK && args->groups > 65535)
        status = rf_fail(err, RF_ERR_SHAPE, "token_select: groups is %lld, must be at most 65535 on CUDA",
                         (long long)args->groups);
    if (status != RF_OK || !stream || args->num_sites == 0 || args->groups == 0) return status;
    const dim3 grid((unsigned)args->num_sites, (unsigned)args->groups);
    const dim3 block(args->tokens <= 1024 ? 256 : MAX_THREADS);
    if (args->tokens > MAX_STAGED)
        return rf_launch_early(stream, "token_select", err, select_kernel<false>, grid, block, 0, *args);
    return rf_launch_early(stream, "token_select", err, select_kernel<true>, grid, block,
                           (size_t)args->tokens * sizeof(float), *args);
}
