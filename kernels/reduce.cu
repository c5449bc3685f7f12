/* kernels/reduce.cu - the four sums that policies decide by.
 * Maths    sum w_r |a-b|, sum w_r |b|, sum w_r (a-b)^2, sum w_r b^2 over a group of rows x cols; the first with |b| below it,
 *          or of norms of rows.
 * Order    block k of a group sums vectors k, k + blocks, ... (256 threads, then a fixed tree) into workspace; a second
 *          kernel adds the blocks' sums in double by a fixed tree. No atomics: the same bits on every run. Norms of rows:
 *          warps take rows instead.
 * Launch   grid (blocks <= 256, groups), then one block per group.
 * Cost     bandwidth bound, 2 * rows * cols elements; two launches.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int THREADS = 256, MAX_BLOCKS = 256;

/* The group of the other side that group g is. */
static __device__ __forceinline__ int64_t group_of(const int32_t *index, int64_t g) {
    return index ? index[g] : g;
}

template <int VEC, class T> static __device__ __forceinline__ void load_vector(const T *p, float v[VEC]) {
    if constexpr (VEC == 4)
        rf_load4(p, v);
    else
        v[0] = rf_to_f32(*p);
}

/* The block's four sums, out of its threads'. */
static __device__ __forceinline__ void store_sums(float *workspace, float sums[4]) {
    __shared__ float shared[4][THREADS / 32];
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = rf_block_sum<THREADS / 32>(sums[i], shared[i]);
    if (threadIdx.x == 0)
        *reinterpret_cast<float4 *>(workspace + ((int64_t)blockIdx.y * MAX_BLOCKS + blockIdx.x) * 4) =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
}

template <class A, class B, int VEC, bool RATIO>
static __global__ void __launch_bounds__(THREADS) partial_kernel(const __grid_constant__ rf_reduce_pair_args p) {
    const int64_t per_row = p.cols / VEC, total = p.rows * per_row;
    const bool dense = p.a_ld == p.cols && p.b_ld == p.cols;
    const A *const a = (const A *)p.a + group_of(p.a_index, blockIdx.y) * p.rows * p.a_ld;
    const B *const b = p.b ? (const B *)p.b + group_of(p.b_index, blockIdx.y) * p.rows * p.b_ld : NULL;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x; at < total; at += (int64_t)gridDim.x * THREADS) {
        int64_t row = 0, at_a = at * VEC, at_b = at_a;
        if (!dense || p.row_weight)
            row = total <= UINT32_MAX ? (int64_t)((uint32_t)at / (uint32_t)per_row) : at / per_row;
        if (!dense) {
            at_a += row * (p.a_ld - p.cols);
            at_b += row * (p.b_ld - p.cols);
        }
        float f[VEC], g[VEC];
        load_vector<VEC>(a + at_a, f);
#pragma unroll
        for (int k = 0; k < VEC; k++) g[k] = 0.0f;
        if (b) load_vector<VEC>(b + at_b, g);
        float w = 1.0f;
        if (p.row_weight) w = p.row_weight[row];
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const float d = f[k] - g[k];
            part[0] += RATIO ? fabsf(d) / (fabsf(g[k]) + 1e-10f) : fabsf(d);
            part[1] += fabsf(g[k]);
            part[2] = fmaf(d, d, part[2]);
            part[3] = fmaf(g[k], g[k], part[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = fmaf(w, part[i], sums[i]);
    }
    store_sums(p.workspace, sums);
}

/* A warp per row: rows k, k + warps of the grid, ... */
template <class A, class B, int VEC>
static __global__ void __launch_bounds__(THREADS) row_norms_kernel(const __grid_constant__ rf_reduce_pair_args p) {
    constexpr int WARPS = THREADS / 32;
    const int lane = threadIdx.x & 31;
    const A *const a = (const A *)p.a + group_of(p.a_index, blockIdx.y) * p.rows * p.a_ld;
    const B *const b = (const B *)p.b + group_of(p.b_index, blockIdx.y) * p.rows * p.b_ld;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t row = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5); row < p.rows; row += gridDim.x * WARPS) {
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sq_a = 0.0f;
#pragma unroll 2
        for (int64_t c = lane * VEC; c < p.cols; c += 32 * VEC) {
            float f[VEC], g[VEC];
            load_vector<VEC>(a + row * p.a_ld + c, f);
            load_vector<VEC>(b + row * p.b_ld + c, g);
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                const float d = f[k] - g[k];
                sq_a = fmaf(f[k], f[k], sq_a);
                part[1] += fabsf(g[k]);
                part[2] = fmaf(d, d, part[2]);
                part[3] = fmaf(g[k], g[k], part[3]);
            }
        }
        const float norm_a = sqrtf(rf_warp_sum(sq_a)), norm_b = sqrtf(rf_warp_sum(part[3]));
        if (lane == 0 && norm_b > 0.0f) part[0] = norm_a / norm_b;
        const float w = p.row_weight ? p.row_weight[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = fmaf(w, part[i], sums[i]);
    }
    store_sums(p.workspace, sums);
}

/* Thread t has sum t % 4 of blocks t / 4, t / 4 + 64, ... */
static __global__ void __launch_bounds__(THREADS)
    finish_kernel(const float *workspace, float *out, const int32_t *out_index, int num_blocks) {
    __shared__ double shared[THREADS];
    const float *const from = workspace + (int64_t)blockIdx.x * MAX_BLOCKS * 4;
    double sum = 0.0;
    for (int i = threadIdx.x / 4; i < num_blocks; i += THREADS / 4) sum += (double)from[i * 4 + threadIdx.x % 4];
    shared[threadIdx.x] = sum;
    for (int half = THREADS / 2; half >= 4; half /= 2) {
        __syncthreads(); /* the previous level is written */
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x < 4) out[group_of(out_index, blockIdx.x) * 4 + threadIdx.x] = (float)shared[threadIdx.x];
}

template <class A, class B, int VEC>
static rf_status launch(rf_stream *stream, const rf_reduce_pair_args &p, rf_error *err) {
    const bool row_norms = p.kind == RF_REDUCE_ROW_NORMS;
    int64_t blocks = row_norms ? rf_ceil_div(p.rows, THREADS / 32) : rf_ceil_div(p.rows * p.cols, THREADS * VEC);
    blocks = blocks < 1 ? 1 : blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks; /* from shapes alone */
    auto kernel = row_norms                   ? row_norms_kernel<A, B, VEC>
                  : p.kind == RF_REDUCE_RATIO ? partial_kernel<A, B, VEC, true>
                                              : partial_kernel<A, B, VEC, false>;
    rf_status status =
        rf_launch(stream, "reduce_pair", err, kernel, dim3((unsigned)blocks, (unsigned)p.groups), dim3(THREADS), 0, p);
    if (status != RF_OK) return status;
    return rf_launch(stream, "reduce_pair_finish", err, finish_kernel, dim3((unsigned)p.groups), dim3(THREADS), 0,
                     (const float *)p.workspace, p.out, p.out_index, (int)blocks);
}

template <class A, class B>
static rf_status launch_width(rf_stream *stream, const rf_reduce_pair_args &p, rf_error *err) {
    const bool vectors = p.cols % 4 == 0 && p.a_ld % 4 == 0 && p.b_ld % 4 == 0 && rf_is_aligned(p.a, 4 * sizeof(A)) &&
                         rf_is_aligned(p.b, 4 * sizeof(B));
    return vectors ? launch<A, B, 4>(stream, p, err) : launch<A, B, 1>(stream, p, err);
}

extern "C" rf_status rf_reduce_pair_cuda(rf_stream *stream, const rf_reduce_pair_args *args, rf_error *err) {
    rf_status status = stream ? rf_reduce_pair_check_run(args, err) : rf_reduce_pair_check(args, err);
    if (status == RF_OK && args->groups > 65535)
        status = rf_fail(err, RF_ERR_SHAPE, "reduce_pair: groups is %lld, must be at most 65535 on CUDA",
                         (long long)args->groups);
    if (status != RF_OK || !stream || args->groups == 0) return status;
    const size_t need = (size_t)args->groups * MAX_BLOCKS * 4 * sizeof(float);
    status = rf_check_workspace("reduce_pair", args->workspace, args->workspace_bytes, need, err);
    if (status != RF_OK) return status;
    if (!rf_is_aligned(args->workspace, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "reduce_pair: workspace must be aligned to 16 bytes on CUDA");

    rf_reduce_pair_args p = *args;
    if (!p.b) p.b_dtype = p.a_dtype; /* only picks an instance */
    if (p.a_ld == 0) p.a_ld = p.cols;
    if (p.b_ld == 0 || !p.b) p.b_ld = p.b ? p.cols : p.a_ld;
    if (p.a_dtype == RF_DTYPE_F32)
        return p.b_dtype == RF_DTYPE_F32 ? launch_width<float, float>(stream, p, err)
                                         : launch_width<float, rf_bf16>(stream, p, err);
    return p.b_dtype == RF_DTYPE_F32 ? launch_width<rf_bf16, float>(stream, p, err)
                                     : launch_width<rf_bf16, rf_bf16>(stream, p, err);
}
