/* kernels/reduce.cu - the four sums that policies decide by.
 * Maths    sum w_r |a-b|, sum w_r |b|, sum w_r (a-b)^2, sum w_r b^2 over a group of rows x cols.
 * Order    block k of a group sums vectors k, k + blocks, ... (256 threads, then a fixed tree) into workspace; a second
 *          kernel adds the blocks' sums in double by a fixed tree. No atomics: the same bits on every run.
 * Launch   grid (blocks <= 256, groups), then one block per group.
 * Cost     bandwidth bound, 2 * rows * cols elements; two launches.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int THREADS = 256, MAX_BLOCKS = 256;

template <class T, int VEC>
static __global__ void __launch_bounds__(THREADS) partial_kernel(const __grid_constant__ rf_reduce_pair_args p) {
    __shared__ float shared[4][THREADS / 32];
    const int64_t per_row = p.cols / VEC, total = p.rows * per_row;
    const T *const a = (const T *)p.a + (int64_t)blockIdx.y * p.rows * p.cols;
    const T *const b = p.b ? (const T *)p.b + (int64_t)blockIdx.y * p.rows * p.cols : NULL;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x; at < total; at += (int64_t)gridDim.x * THREADS) {
        float f[VEC], g[VEC];
        if constexpr (VEC == 4)
            rf_load4(a + at * 4, f);
        else
            f[0] = rf_to_f32(a[at]);
#pragma unroll
        for (int k = 0; k < VEC; k++) g[k] = 0.0f;
        if (b) {
            if constexpr (VEC == 4)
                rf_load4(b + at * 4, g);
            else
                g[0] = rf_to_f32(b[at]);
        }
        float w = 1.0f;
        if (p.row_weight)
            w = p.row_weight[total <= UINT32_MAX ? (int64_t)((uint32_t)at / (uint32_t)per_row) : at / per_row];
        float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < VEC; k++) {
            const float d = f[k] - g[k];
            part[0] += fabsf(d);
            part[1] += fabsf(g[k]);
            part[2] = fmaf(d, d, part[2]);
            part[3] = fmaf(g[k], g[k], part[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = fmaf(w, part[i], sums[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = rf_block_sum<THREADS / 32>(sums[i], shared[i]);
    if (threadIdx.x == 0)
        *reinterpret_cast<float4 *>(p.workspace + ((int64_t)blockIdx.y * MAX_BLOCKS + blockIdx.x) * 4) =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
}

/* Thread t has sum t % 4 of blocks t / 4, t / 4 + 64, ... */
static __global__ void __launch_bounds__(THREADS) finish_kernel(const float *workspace, float *out, int num_blocks) {
    __shared__ double shared[THREADS];
    const float *const from = workspace + (int64_t)blockIdx.x * MAX_BLOCKS * 4;
    double sum = 0.0;
    for (int i = threadIdx.x / 4; i < num_blocks; i += THREADS / 4) sum += (double)from[i * 4 + threadIdx.x % 4];
    shared[threadIdx.x] = sum;
    for (int half = THREADS / 2; half >= 4; half /= 2) {
        __syncthreads(); /* the previous level is written */
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x < 4) out[(int64_t)blockIdx.x * 4 + threadIdx.x] = (float)shared[threadIdx.x];
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

    const size_t vector = args->dtype == RF_DTYPE_F32 ? 16 : 8;
    const bool vectors = args->cols % 4 == 0 && rf_is_aligned(args->a, vector) && rf_is_aligned(args->b, vector);
    int64_t blocks = rf_ceil_div(args->rows * args->cols, THREADS * (vectors ? 4 : 1)); /* from shapes alone */
    blocks = blocks < 1 ? 1 : blocks > MAX_BLOCKS ? MAX_BLOCKS : blocks;
    auto kernel = args->dtype == RF_DTYPE_F32 ? (vectors ? partial_kernel<float, 4> : partial_kernel<float, 1>)
                                              : (vectors ? partial_kernel<rf_bf16, 4> : partial_kernel<rf_bf16, 1>);
    status = rf_launch(stream, "reduce_pair", err, kernel, dim3((unsigned)blocks, (unsigned)args->groups),
                       dim3(THREADS), 0, *args);
    if (status != RF_OK) return status;
    return rf_launch(stream, "reduce_pair_finish", err, finish_kernel, dim3((unsigned)args->groups), dim3(THREADS), 0,
                     (const float *)args->workspace, args->out, (int)blocks);
}
