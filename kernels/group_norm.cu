/* kernels/group_norm.cu - GroupNorm over channels-last images, with optional SiLU.
 * Maths    y[b,p,c] = silu?((x[b,p,c] - mean[b,g]) / sqrt(var[b,g] + eps) * weight[c] + bias[c]), g = c / (C / groups);
 *          mean and (biased) variance over all pixels and channels of the group, in f32.
 * Shapes   x, y [batch, pixels, channels] f32 or bf16, y may be x; weight, bias [channels] f32.
 * Accuracy Each thread sums its values as differences from the first one it saw, turns that into (count, mean, squared
 *          deviations) and partial results are merged in that form (Chan, Golub, LeVeque 1979), in a fixed order. So a mean
 *          far above the deviation costs no digits and every run gives the same bits.
 * Launch   partial: grid (splits <= 256, column chunks, batch) x 256 threads; finish: a warp per (sample, group);
 *          apply: grid (pixel tiles, column chunks, batch) x 256 threads. A column chunk is whole groups, at most
 *          256 vectors of 16 bytes wide, and a thread keeps its columns for the whole kernel. Shapes that no chunk fits
 *          (channels without 16-byte vectors, very wide groups) take the any-shape pair of kernels below.
 * Cost     bandwidth: x read twice, y written once.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

#define THREADS 256

typedef struct {
    float n, mean, m2; /* values, their mean, the sum of squared deviations from it */
} moments;

static __device__ __forceinline__ moments merge(moments a, moments b) {
    const float n = a.n + b.n;
    if (n == 0.0f) return a;
    const float delta = b.mean - a.mean, share = b.n / n;
    moments out;
    out.n = n;
    out.mean = a.mean + delta * share;
    out.m2 = a.m2 + b.m2 + delta * delta * a.n * share;
    return out;
}

/* The same tree on every run; the result is in lane 0. */
static __device__ __forceinline__ moments merge_warp(moments a) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        moments b;
        b.n = __shfl_down_sync(0xffffffffu, a.n, offset);
        b.mean = __shfl_down_sync(0xffffffffu, a.mean, offset);
        b.m2 = __shfl_down_sync(0xffffffffu, a.m2, offset);
        a = merge(a, b);
    }
    return a;
}

/* bf16 output does not see the difference between the two exponentials, f32 output does. */
static __device__ __forceinline__ float silu(float u, float) {
    return u / (1.0f + expf(-u));
}
static __device__ __forceinline__ float silu(float u, rf_bf16) {
    return __fdividef(u, 1.0f + __expf(-u));
}

template <typename T> struct alignas(16) vec16 { T v[16 / sizeof(T)]; };

/* Columns of a block: chunk channels from blockIdx.y * chunk on, `vecs` vectors wide; `lanes_y` pixels at a time. */
struct columns {
    int first, vecs, lanes_y, col, y; /* col: this thread's first channel; y < 0: the thread has nothing to do */
};
template <typename T> static __device__ __forceinline__ columns my_columns(int channels, int chunk) {
    const int V = 16 / sizeof(T);
    columns c;
    c.first = blockIdx.y * chunk;
    c.vecs = min(chunk, channels - c.first) / V;
    c.lanes_y = THREADS / c.vecs;
    c.col = c.first + (int)(threadIdx.x % c.vecs) * V;
    c.y = (int)(threadIdx.x / c.vecs);
    if (c.y >= c.lanes_y) c.y = -1;
    return c;
}

/* partial [batch][groups][splits]: pixels [split * per_split, ...) of one column chunk. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    partial_kernel(const T *x, moments *partial, int64_t pixels, int channels, int group_channels, int chunk,
                   int64_t per_split) {
    const int V = 16 / sizeof(T);
    __shared__ float s_mean[THREADS * V], s_m2[THREADS * V]; /* [pixel lane][channel of the chunk] */
    __shared__ float s_n[THREADS];                           /* [pixel lane] */
    const columns c = my_columns<T>(channels, chunk);
    const int split = blockIdx.x, num_splits = gridDim.x, batch = blockIdx.z;
    const int width = c.vecs * V;
    const int64_t begin = split * per_split, end = min(begin + per_split, pixels);

    if (c.y >= 0) {
        float shift[V], sum[V], sum2[V], n = 0.0f;
        const T *row = x + ((int64_t)batch * pixels + begin + c.y) * channels + c.col;
#pragma unroll
        for (int i = 0; i < V; i++) shift[i] = sum[i] = sum2[i] = 0.0f;
        if (begin + c.y < end) {
            const vec16<T> u = *(const vec16<T> *)row;
#pragma unroll
            for (int i = 0; i < V; i++) shift[i] = rf_to_f32(u.v[i]);
        }
#pragma unroll 4
        for (int64_t p = begin + c.y; p < end; p += c.lanes_y) {
            const vec16<T> u = *(const vec16<T> *)row;
            row += (int64_t)c.lanes_y * channels;
            n += 1.0f;
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float d = rf_to_f32(u.v[i]) - shift[i];
                sum[i] += d;
                sum2[i] += d * d;
            }
        }
        const float inv = n > 0.0f ? 1.0f / n : 0.0f;
#pragma unroll
        for (int i = 0; i < V; i++) {
            const float mean = sum[i] * inv;
            s_mean[c.y * width + c.col - c.first + i] = shift[i] + mean;
            s_m2[c.y * width + c.col - c.first + i] = fmaxf(sum2[i] - sum[i] * mean, 0.0f);
        }
        if (c.col == c.first) s_n[c.y] = n;
    }
    __syncthreads(); /* the table of moments is complete */

    /* A warp per group; lanes walk the group's (pixel lane, channel) entries. */
    const int lane = threadIdx.x & 31, num_entries = c.lanes_y * group_channels;
    for (int g = threadIdx.x / 32; g < width / group_channels; g += THREADS / 32) {
        moments a = {0.0f, 0.0f, 0.0f};
        for (int e = lane; e < num_entries; e += 32) {
            const int y = e / group_channels, at = y * width + g * group_channels + e % group_channels;
            moments b = {s_n[y], s_mean[at], s_m2[at]};
            a = merge(a, b);
        }
        a = merge_warp(a);
        const int group = c.first / group_channels + g, num_groups = channels / group_channels;
        if (lane == 0) partial[((int64_t)batch * num_groups + group) * num_splits + split] = a;
    }
}

/* Any shape: a block per (split, group, sample), threads walk the split's elements of the group. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    partial_any_kernel(const T *x, moments *partial, int64_t pixels, int channels, int group_channels,
                       int64_t per_split) {
    __shared__ moments s_warp[THREADS / 32];
    const int split = blockIdx.x, group = blockIdx.y, num_groups = gridDim.y, batch = blockIdx.z;
    const int64_t begin = split * per_split, end = min(begin + per_split, pixels);
    const T *base = x + ((int64_t)batch * pixels + begin) * channels + (int64_t)group * group_channels;
    const int64_t num = end > begin ? (end - begin) * group_channels : 0;
    float shift = 0.0f, sum = 0.0f, sum2 = 0.0f, n = 0.0f;
    for (int64_t i = threadIdx.x; i < num; i += THREADS) {
        const float u = rf_to_f32(base[i / group_channels * channels + i % group_channels]);
        if (n == 0.0f) shift = u;
        n += 1.0f;
        sum += u - shift;
        sum2 += (u - shift) * (u - shift);
    }
    const float mean = n > 0.0f ? sum / n : 0.0f;
    moments a = {n, shift + mean, fmaxf(sum2 - sum * mean, 0.0f)};
    a = merge_warp(a);
    if (threadIdx.x % 32 == 0) s_warp[threadIdx.x / 32] = a;
    __syncthreads(); /* all warps' moments are there */
    if (threadIdx.x == 0) {
        for (int w = 1; w < THREADS / 32; w++) a = merge(a, s_warp[w]);
        partial[((int64_t)batch * num_groups + group) * gridDim.x + split] = a;
    }
}

/* stats [batch * groups][2] = mean, 1 / sqrt(var + eps); a warp each. */
static __global__ void finish_kernel(const moments *partial, float *stats, int64_t num, int num_splits, float eps) {
    const int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x & 31;
    if (i >= num) return; /* whole warps */
    moments a = {0.0f, 0.0f, 0.0f};
    for (int s = lane; s < num_splits; s += 32) a = merge(a, partial[i * num_splits + s]);
    a = merge_warp(a);
    if (lane == 0) {
        stats[2 * i] = a.mean;
        stats[2 * i + 1] = 1.0f / sqrtf(a.m2 / a.n + eps);
    }
}

template <typename T, bool SILU>
static __global__ void __launch_bounds__(THREADS)
    apply_kernel(const T *x, T *y, const float *stats, const float *weight, const float *bias, int64_t pixels,
                 int channels, int group_channels, int chunk, int64_t per_block) {
    const int V = 16 / sizeof(T);
    const columns c = my_columns<T>(channels, chunk);
    if (c.y < 0) return;
    const int batch = blockIdx.z, num_groups = channels / group_channels;
    float mean[V], gain[V], offset[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        const float *st = stats + 2 * ((int64_t)batch * num_groups + (c.col + i) / group_channels);
        mean[i] = st[0];
        gain[i] = st[1] * weight[c.col + i];
        offset[i] = bias[c.col + i];
    }
    const int64_t begin = blockIdx.x * per_block, end = min(begin + per_block, pixels),
                  step = (int64_t)c.lanes_y * channels;
    int64_t at = ((int64_t)batch * pixels + begin + c.y) * channels + c.col;
    for (int64_t p = begin + c.y; p < end; p += 4 * c.lanes_y, at += 4 * step) {
        vec16<T> u[4]; /* y may be x, so the compiler cannot move loads over stores by itself */
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (p + j * c.lanes_y < end) u[j] = *(const vec16<T> *)(x + at + j * step);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (p + j * c.lanes_y >= end) break;
#pragma unroll
            for (int i = 0; i < V; i++) {
                float f = (rf_to_f32(u[j].v[i]) - mean[i]) * gain[i] + offset[i];
                if (SILU) f = silu(f, T());
                u[j].v[i] = rf_from_f32<T>(f);
            }
            *(vec16<T> *)(y + at + j * step) = u[j];
        }
    }
}

template <typename T>
static __global__ void apply_any_kernel(const T *x, T *y, const float *stats, const float *weight, const float *bias,
                                        int64_t pixels, int channels, int group_channels, bool with_silu, int64_t num) {
    const int num_groups = channels / group_channels;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < num; i += (int64_t)gridDim.x * THREADS) {
        const int64_t pixel = i / channels;
        const int c = (int)(i - pixel * channels);
        const float *st = stats + 2 * (pixel / pixels * num_groups + c / group_channels);
        float f = (rf_to_f32(x[i]) - st[0]) * (st[1] * weight[c]) + bias[c];
        if (with_silu) f = silu(f, T());
        y[i] = rf_from_f32<T>(f);
    }
}

/* --- launch --------------------------------------------------------------------------------------------------------- */

/* Channels per column chunk: whole groups, whole vectors, at most THREADS vectors. 0 if there is no such chunk. */
static int choose_chunk(int64_t channels, int64_t group_channels, int v) {
    if (channels % v != 0) return 0;
    if (channels <= THREADS * v) return (int)channels;
    int64_t unit = group_channels;
    while (unit % v != 0) unit += group_channels; /* at most v steps */
    if (unit > THREADS * v) return 0;
    return (int)(THREADS * v / unit * unit);
}

template <typename T> static rf_status launch_all(rf_stream *stream, const rf_group_norm_args *a, rf_error *err) {
    const int v = 16 / (int)sizeof(T), channels = (int)a->channels, group_channels = channels / a->num_groups;
    const bool aligned = rf_is_aligned(a->x, 16) && rf_is_aligned(a->y, 16);
    const int chunk = aligned ? choose_chunk(a->channels, group_channels, v) : 0;
    const unsigned num_chunks = chunk ? (unsigned)rf_ceil_div(channels, chunk) : 0, batch = (unsigned)a->batch;
    const int64_t num_stats = a->batch * a->num_groups;
    float *stats = a->workspace;
    moments *partial = (moments *)(a->workspace + 2 * num_stats);
    const T *x = (const T *)a->x;
    T *y = (T *)a->y;

    /* Splits: about four blocks a multiprocessor, at least eight pixels a thread where there are that many. */
    const int64_t blocks_each = chunk ? num_chunks * a->batch : num_stats;
    const int64_t pixels_at_once = chunk ? THREADS / (chunk / v) : 32;
    int64_t splits = rf_ceil_div(4 * (int64_t)rf_backend_num_sms(rf_stream_backend(stream)), blocks_each);
    if (splits > rf_ceil_div(a->pixels, 8 * pixels_at_once)) splits = rf_ceil_div(a->pixels, 8 * pixels_at_once);
    if (splits > RF_GROUP_NORM_MAX_SPLITS) splits = RF_GROUP_NORM_MAX_SPLITS;
    const int64_t per_split = rf_ceil_div(a->pixels, splits);
    splits = rf_ceil_div(a->pixels, per_split); /* no empty ones */

    rf_status st = chunk ? rf_launch(stream, "group_norm_partial", err, partial_kernel<T>,
                                     dim3((unsigned)splits, num_chunks, batch), THREADS, 0, x, partial, a->pixels,
                                     channels, group_channels, chunk, per_split)
                         : rf_launch(stream, "group_norm_partial", err, partial_any_kernel<T>,
                                     dim3((unsigned)splits, (unsigned)a->num_groups, batch), THREADS, 0, x, partial,
                                     a->pixels, channels, group_channels, per_split);
    if (st != RF_OK) return st;
    st = rf_launch(stream, "group_norm_finish", err, finish_kernel, (unsigned)rf_ceil_div(num_stats, 4), 128, 0,
                   partial, stats, num_stats, (int)splits, a->eps);
    if (st != RF_OK) return st;
    if (!chunk) {
        const int64_t num = a->batch * a->pixels * a->channels;
        return rf_launch(stream, "group_norm_apply", err, apply_any_kernel<T>, rf_blocks_for(num, 4 * THREADS), THREADS,
                         0, x, y, stats, a->weight, a->bias, a->pixels, channels, group_channels, a->silu, num);
    }
    const int64_t per_block = 8 * pixels_at_once;
    const dim3 grid((unsigned)rf_ceil_div(a->pixels, per_block), num_chunks, batch);
    return rf_launch(stream, "group_norm_apply", err, a->silu ? apply_kernel<T, true> : apply_kernel<T, false>, grid,
                     THREADS, 0, x, y, stats, a->weight, a->bias, a->pixels, channels, group_channels, chunk,
                     per_block);
}

extern "C" rf_status rf_group_norm_cuda(rf_stream *stream, const rf_group_norm_args *args, rf_error *err) {
    rf_status st = rf_group_norm_check(args, err);
    if (st != RF_OK) return st;
    if (args->channels > INT32_MAX || args->batch > 65535 || args->num_groups > 65535)
        return rf_fail(err, RF_ERR_SHAPE, "group_norm: batch and num_groups are limited to 65535");
    if (!stream) return RF_OK;
    st = rf_group_norm_check_run(args, err);
    if (st != RF_OK || args->batch == 0 || args->pixels == 0) return st;
    st = rf_check_workspace("group_norm", args->workspace, args->workspace_bytes, rf_group_norm_workspace_bytes(args),
                            err);
    if (st != RF_OK) return st;
    return args->dtype == RF_DTYPE_F32 ? launch_all<float>(stream, args, err) : launch_all<rf_bf16>(stream, args, err);
}
