/* kernels/text_select.cu - the smallest values' indices, the index of the largest value (kernels/text.h).
 * Launch   one block of 1024 threads.
 *          select_smallest: keys in registers, 32 a thread at most; a warp holds a run of neighbours. The count-th smallest key is
 *          found in three passes of 11, 11 and 10 bits by counts in shared memory (integers: the order of additions is free), then
 *          every warp writes its part of the list behind those of the warps before it.
 * Keys     bits of a float as an unsigned number of the same order; -0 is 0, NaN lies below all.
 * Cost     latency: a handful of barriers. Arch  sm_80 and later.  Checked  tests/kernels/test_text.c. */
#include <cuda_runtime.h>

#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/select.cuh"
#include "kernels/text_checks.h"

static constexpr int THREADS = 1024, WARPS = THREADS / 32;
static constexpr unsigned ALL = 0xffffffffu;
static constexpr uint32_t NO_KEY = 0xffffffffu; /* above the key of every number */

static __device__ __forceinline__ uint32_t key_of(float v) {
    return isnan(v) ? 0u : rf_float_key(v);
}

/* --- select_smallest ---------------------------------------------------------------------------------------------------- */

/* NUM keys a thread; NUM * THREADS >= p.num. */
template <int NUM>
static __global__ void __launch_bounds__(THREADS)
    select_smallest_kernel(const __grid_constant__ rf_select_smallest_args p) {
    __shared__ uint32_t bins[2048], totals[WARPS], below_counts[WARPS], equal_counts[WARPS];
    __shared__ uint32_t found_prefix, found_rank;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num = (int)p.num;
    const int run = (num + THREADS - 1) / THREADS * 32, first = warp * run + lane; /* of this lane: first + 32 k */
    uint32_t key[NUM];
    rf_wait_for_previous();
#pragma unroll
    for (int k = 0; k < NUM; k++)
        key[k] = 32 * k < run && first + 32 * k < num ? key_of(p.values[first + 32 * k]) : NO_KEY;

    uint32_t prefix = 0, rank = (uint32_t)p.count; /* of the wanted key among those that begin with prefix, from 1 */
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        const uint32_t low = pass == 2 ? 1023u : 2047u, mask = pass == 0 ? 0u : pass == 1 ? ~0u << 21 : ~0u << 10;
        bins[threadIdx.x] = 0;
        bins[threadIdx.x + THREADS] = 0;
        __syncthreads(); /* counts are 0 */
#pragma unroll
        for (int k = 0; k < NUM; k++)
            if ((key[k] & mask) == prefix && key[k] != NO_KEY) atomicAdd(&bins[key[k] >> shift & low], 1u);
        __syncthreads(); /* counted */
        const uint32_t a = bins[2 * threadIdx.x], b = bins[2 * threadIdx.x + 1];
        uint32_t end = a + b;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t other = __shfl_up_sync(ALL, end, step);
            if (lane >= step) end += other;
        }
        if (lane == 31) totals[warp] = end;
        __syncthreads(); /* the warps' totals are there */
        end += __reduce_add_sync(ALL, lane < warp ? totals[lane] : 0u);
        const uint32_t begin = end - a - b;
        if (rank > begin && rank <= end) {
            const bool second = rank > begin + a;
            found_prefix = prefix | (2 * threadIdx.x + second) << shift;
            found_rank = rank - begin - (second ? a : 0u);
        }
        __syncthreads(); /* found; and the counts have been read */
        prefix = found_prefix;
        rank = found_rank;
    }

    /* All keys below prefix, and the first `rank` of those equal to it. */
    uint32_t below = 0, equal = 0;
#pragma unroll
    for (int k = 0; k < NUM; k++) {
        below += __popc(__ballot_sync(ALL, key[k] < prefix));
        equal += __popc(__ballot_sync(ALL, key[k] == prefix));
    }
    if (lane == 0) below_counts[warp] = below, equal_counts[warp] = equal;
    __syncthreads();
    below = __reduce_add_sync(ALL, lane < warp ? below_counts[lane] : 0u); /* in the warps before this one */
    equal = __reduce_add_sync(ALL, lane < warp ? equal_counts[lane] : 0u);
    uint32_t at = below + min(equal, rank);
    const uint32_t before = (1u << lane) - 1;
#pragma unroll
    for (int k = 0; k < NUM; k++) {
        const uint32_t equals = __ballot_sync(ALL, key[k] == prefix);
        const bool take = key[k] < prefix || (key[k] == prefix && equal + __popc(equals & before) < rank);
        const uint32_t taken = __ballot_sync(ALL, take);
        if (take) p.out[at + __popc(taken & before)] = first + 32 * k;
        at += __popc(taken);
        equal += __popc(equals);
    }
}

extern "C" rf_status rf_select_smallest_cuda(rf_stream *stream, const rf_select_smallest_args *a, rf_error *err) {
    RF_TRY(rf_select_smallest_check(a, err));
    if (!stream) return RF_OK;
    const void *const needed[] = {a->values, a->out};
    RF_TRY(rf_text_pointers("select_smallest", needed, 2, err));
    auto kernel = a->num <= 4 * THREADS ? select_smallest_kernel<4> : select_smallest_kernel<32>;
    return rf_launch_early(stream, "select_smallest", err, kernel, dim3(1), dim3(THREADS), 0, *a);
}

/* --- argmax ------------------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS) argmax_kernel(const __grid_constant__ rf_argmax_args p) {
    __shared__ unsigned long long tops[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    rf_wait_for_previous();
    const int64_t num = p.num_dev ? max((int64_t)0, min((int64_t)*p.num_dev, p.num)) : p.num;
    unsigned long long top = 0; /* key above, complement of the index below: never 0 for an index */
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < num; i += THREADS)
        if (!p.allowed || p.allowed[i]) top = max(top, (unsigned long long)key_of(p.values[i]) << 32 | (uint32_t)~i);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = max(top, __shfl_xor_sync(ALL, top, step));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    if (warp != 0) return;
    top = tops[lane];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = max(top, __shfl_xor_sync(ALL, top, step));
    if (lane == 0) p.out[0] = top == 0 ? -1 : (int32_t) ~(uint32_t)top;
}

extern "C" rf_status rf_argmax_cuda(rf_stream *stream, const rf_argmax_args *a, rf_error *err) {
    RF_TRY(rf_argmax_check(a, err));
    if (!stream) return RF_OK;
    const void *const needed[] = {a->out, a->num > 0 ? (const void *)a->values : a->out};
    RF_TRY(rf_text_pointers("argmax", needed, 2, err));
    return rf_launch_early(stream, "argmax", err, argmax_kernel, dim3(1), dim3(THREADS), 0, *a);
}
