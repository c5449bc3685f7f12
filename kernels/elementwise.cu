/* kernels/elementwise.cu - maps, layout changes, timestep embedding, patch rows.
 * Maths    see kernels/elementwise.h. All in f32, one rounding at the end.
 * Launch   256 threads; four neighbours a thread where cols % 4 == 0 and the operands are aligned, else one.
 * Cost     bandwidth bound; the layout changes read or write with a stride and rely on L2.
 * Arch     sm_80 and later.  Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int THREADS = 256;

/* --- map ---------------------------------------------------------------------------------------------------------- */

/* VEC neighbours of one row a turn. */
template <class X, class A, class Y, int VEC>
static __global__ void __launch_bounds__(THREADS) map_kernel(const __grid_constant__ rf_elementwise_args p) {
    const int64_t per_row = p.cols / VEC, total = p.rows * per_row;
    for (int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x; at < total; at += (int64_t)gridDim.x * THREADS) {
        float f[VEC];
        if constexpr (VEC == 4)
            rf_load4((const X *)p.x + at * 4, f);
        else
            f[0] = rf_to_f32(((const X *)p.x)[at]);
#pragma unroll
        for (int k = 0; k < VEC; k++) f[k] = p.x_scale * f[k] + p.x_shift;
        if (p.add) {
            const int64_t row = at / per_row, col = (at - row * per_row) * VEC;
            const int64_t add_row = p.add_index ? p.add_index[row] : row % p.add_period;
            if (add_row >= 0 && add_row < p.add_period) {
                float g[VEC];
                if constexpr (VEC == 4)
                    rf_load4((const A *)p.add + add_row * p.cols + col, g);
                else
                    g[0] = rf_to_f32(((const A *)p.add)[add_row * p.cols + col]);
#pragma unroll
                for (int k = 0; k < VEC; k++) f[k] += g[k];
            }
        }
#pragma unroll
        for (int k = 0; k < VEC; k++) f[k] = rf_activate(f[k], p.act);
        if constexpr (VEC == 4)
            rf_store4((Y *)p.y + at * 4, f);
        else
            ((Y *)p.y)[at] = rf_from_f32<Y>(f[0]);
    }
}

/* One element of y a turn; y in memory order. */
template <class X, class Y>
static __global__ void __launch_bounds__(THREADS) layout_kernel(const __grid_constant__ rf_elementwise_args p) {
    const int64_t total = p.rows * p.cols, pixels = p.cols / p.channels;
    for (int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x; at < total; at += (int64_t)gridDim.x * THREADS) {
        const int64_t row = at / p.cols, in_row = at - row * p.cols;
        int64_t from;
        if (p.planar_to_last) {
            const int64_t pixel = in_row / p.channels, channel = in_row - pixel * p.channels;
            from = channel * pixels + pixel;
        } else {
            const int64_t channel = in_row / pixels, pixel = in_row - channel * pixels;
            from = pixel * p.channels + channel;
        }
        const float v = p.x_scale * rf_to_f32(((const X *)p.x)[row * p.cols + from]) + p.x_shift;
        ((Y *)p.y)[at] = rf_from_f32<Y>(rf_activate(v, p.act));
    }
}

template <class X, class Y>
static rf_status launch_layout(rf_stream *stream, const rf_elementwise_args *args, rf_error *err) {
    const dim3 grid(rf_blocks_for(args->rows * args->cols, THREADS));
    return rf_launch(stream, "elementwise_layout", err, layout_kernel<X, Y>, grid, dim3(THREADS), 0, *args);
}

template <class X, class A, class Y>
static rf_status launch_map(rf_stream *stream, const rf_elementwise_args *args, rf_error *err) {
    const bool vectors = args->cols % 4 == 0 && rf_is_aligned(args->x, 4 * sizeof(X)) &&
                         rf_is_aligned(args->y, 4 * sizeof(Y)) && rf_is_aligned(args->add, 4 * sizeof(A));
    const dim3 grid(rf_blocks_for(args->rows * args->cols / (vectors ? 4 : 1), THREADS));
    if (vectors) return rf_launch(stream, "elementwise", err, map_kernel<X, A, Y, 4>, grid, dim3(THREADS), 0, *args);
    return rf_launch(stream, "elementwise", err, map_kernel<X, A, Y, 1>, grid, dim3(THREADS), 0, *args);
}

template <class X, class Y>
static rf_status launch_add(rf_stream *stream, const rf_elementwise_args *args, rf_error *err) {
    if (args->planar_to_last || args->last_to_planar) return launch_layout<X, Y>(stream, args, err);
    if (args->add && args->add_dtype == RF_DTYPE_BF16) return launch_map<X, rf_bf16, Y>(stream, args, err);
    return launch_map<X, float, Y>(stream, args, err);
}

extern "C" rf_status rf_elementwise_cuda(rf_stream *stream, const rf_elementwise_args *args, rf_error *err) {
    rf_status status = stream ? rf_elementwise_check_run(args, err) : rf_elementwise_check(args, err);
    if (status != RF_OK || !stream || args->rows == 0) return status;
    if (args->x_dtype == RF_DTYPE_F32)
        return args->y_dtype == RF_DTYPE_F32 ? launch_add<float, float>(stream, args, err)
                                             : launch_add<float, rf_bf16>(stream, args, err);
    return args->y_dtype == RF_DTYPE_F32 ? launch_add<rf_bf16, float>(stream, args, err)
                                         : launch_add<rf_bf16, rf_bf16>(stream, args, err);
}

/* --- timestep embedding ------------------------------------------------------------------------------------------- */

/* A thread per (timestep, frequency). In f32 like the reference implementations: the angle's rounding is part of what
 * models were trained on. */
template <class T>
static __global__ void __launch_bounds__(THREADS)
    timestep_embed_kernel(const __grid_constant__ rf_timestep_embed_args p, const float log_period) {
    const int64_t half = p.dim / 2, total = p.num * half;
    for (int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x; at < total; at += (int64_t)gridDim.x * THREADS) {
        const int64_t i = at / half, j = at - i * half;
        const float freq = expf(-log_period * (float)j / ((float)half - p.freq_shift));
        const float angle = p.t[i] * freq;
        T *const out = (T *)p.out + i * p.dim;
        out[j] = rf_from_f32<T>(cosf(angle));
        out[half + j] = rf_from_f32<T>(sinf(angle));
    }
}

extern "C" rf_status rf_timestep_embed_cuda(rf_stream *stream, const rf_timestep_embed_args *args, rf_error *err) {
    rf_status status = stream ? rf_timestep_embed_check_run(args, err) : rf_timestep_embed_check(args, err);
    if (status != RF_OK || !stream || args->num == 0) return status;
    const dim3 grid(rf_blocks_for(args->num * (args->dim / 2), THREADS));
    const float log_period = logf(args->max_period);
    if (args->dtype == RF_DTYPE_F32)
        return rf_launch(stream, "timestep_embed", err, timestep_embed_kernel<float>, grid, dim3(THREADS), 0, *args,
                         log_period);
    return rf_launch(stream, "timestep_embed", err, timestep_embed_kernel<rf_bf16>, grid, dim3(THREADS), 0, *args,
                     log_period);
}

/* --- patch rows --------------------------------------------------------------------------------------------------- */

/* A thread per output element. Index is 32 bits wide where all elements fit, since divisions dominate. */
template <class T, class Index>
static __global__ void __launch_bounds__(THREADS) patchify_kernel(const __grid_constant__ rf_patchify_args p) {
    const float scale = p.scale ? p.scale[(p.step ? *p.step : 0) * p.scale_stride] : 1.0f;
    const Index gw = (Index)(p.width / p.pw), gh = (Index)(p.height / p.ph), gf = (Index)(p.frames / p.pt);
    const Index patch = (Index)p.pt * p.ph * p.pw, cols = (Index)p.channels * patch;
    const Index total = (Index)p.branches * (Index)p.batch * gf * gh * gw * cols;
    const Index stride = (Index)gridDim.x * THREADS;
    for (Index at = (Index)blockIdx.x * THREADS + threadIdx.x; at < total; at += stride) {
        const Index row = at / cols, col = at - row * cols;
        const Index channel = col / patch, in_patch = col - channel * patch;
        const Index dx = in_patch % p.pw, dy = in_patch / p.pw % p.ph, df = in_patch / p.pw / p.ph;
        const Index tx = row % gw, ty = row / gw % gh, tf = row / gw / gh % gf;
        int64_t sample = (int64_t)(row / gw / gh / gf % (Index)p.batch);
        if (p.sample_index) sample = p.sample_index[sample];
        const int64_t line = ((sample * p.channels + channel) * p.frames + tf * p.pt + df) * p.height + ty * p.ph + dy;
        ((T *)p.out)[at] = rf_from_f32<T>(scale * p.latent[line * p.width + tx * p.pw + dx]);
    }
}

extern "C" rf_status rf_patchify_cuda(rf_stream *stream, const rf_patchify_args *args, rf_error *err) {
    rf_status status = stream ? rf_patchify_check_run(args, err) : rf_patchify_check(args, err);
    if (status != RF_OK || !stream || args->batch == 0) return status;
    const int64_t total = args->branches * args->batch * args->channels * args->frames * args->height * args->width;
    const dim3 grid(rf_blocks_for(total, THREADS));
    const bool small = total <= INT32_MAX;
    auto kernel = args->dtype == RF_DTYPE_F32
                      ? (small ? patchify_kernel<float, uint32_t> : patchify_kernel<float, uint64_t>)
                      : (small ? patchify_kernel<rf_bf16, uint32_t> : patchify_kernel<rf_bf16, uint64_t>);
    return rf_launch(stream, "patchify", err, kernel, grid, dim3(THREADS), 0, *args);
}
