/* kernels/conv.cu - 2-D convolution and nearest upsampling for VAEs, channels last.
 * Maths    y[b,oy,ox,o] = bias[o] + addend[b,oy,ox,o] + sum_{ky,kx,c} w[o,ky,kx,c] * X[b, oy*s+ky-p, ox*s+kx-p, c],
 *          X = x, or x with every pixel doubled both ways (upsample); zero outside. Sums in f32.
 * Shapes   x [batch, height, width, in], w [out, k, k, in], y [batch, out_h, out_w, out], f32 or bf16; bias f32.
 * Variants chosen by shape and dtype alone (choose), so workspace and plans can be known before any pointer:
 *   FEW_OUT   out <= 4 (the last convolution of a decoder): a team of lanes per four pixels splits the channels.
 *   IMPLICIT  bf16, in a multiple of 64, out of 8: implicit GEMM on the tensor cores, conv_mma.cu. No workspace.
 *   GEMM      kernel 1, stride 1, no padding: y = x w^T.
 *   COLUMNS   in and out multiples of a 16-byte vector: rows of X's patches are copied to a column buffer of at most 16 MB
 *             (it stays in L2), then GEMM; row chunk by row chunk. The GEMMs use kernels/gemm.cu and its plans.
 *   ANY       everything else (first convolutions with 3 or 4 channels): tiled multiply-add on the plain cores.
 * Rounding bf16 through GEMM and COLUMNS: bias is f32 and added in a second pass over the rounded result; the other
 *          variants round once.
 * Arch     sm_80 and later.  Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/conv_mma.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

#define COLUMN_BYTES ((int64_t)16 << 20)

template <typename T> struct alignas(16) vec16 { T v[16 / sizeof(T)]; };

/* What every kernel here needs to find its pixels. */
struct geometry {
    int height, width, in; /* of x as stored */
    int out_h, out_w, out;
    int kernel, stride, pad, up; /* up: 1 if x is read doubled */
    int64_t pixels;              /* batch * out_h * out_w */
};

static geometry make_geometry(const rf_conv2d_args *a) {
    geometry g;
    g.height = (int)a->height;
    g.width = (int)a->width;
    g.in = (int)a->in_channels;
    g.out_h = (int)rf_conv2d_out_size(a, a->height);
    g.out_w = (int)rf_conv2d_out_size(a, a->width);
    g.out = (int)a->out_channels;
    g.kernel = a->kernel;
    g.stride = a->stride;
    g.pad = a->pad_before;
    g.up = a->upsample;
    g.pixels = a->batch * g.out_h * g.out_w;
    return g;
}

/* Offset in x of channel 0 of the pixel under tap (ky, kx) of output pixel (b, oy, ox); -1 outside. */
static __device__ __forceinline__ int64_t tap_offset(const geometry &g, int64_t b, int oy, int ox, int ky, int kx) {
    const int iy = oy * g.stride + ky - g.pad, ix = ox * g.stride + kx - g.pad;
    if (iy < 0 || ix < 0 || iy >= g.height << g.up || ix >= g.width << g.up) return -1;
    return ((b * g.height + (iy >> g.up)) * g.width + (ix >> g.up)) * g.in;
}

/* --- COLUMNS: columns[r][tap][c] for output pixels first + r; a thread per 16 bytes --------------------------------- */

template <typename T>
static __global__ void __launch_bounds__(256)
    columns_kernel(const T *x, T *columns, geometry g, int64_t first, int64_t num_rows) {
    const int V = 16 / sizeof(T), vecs = g.in / V, per_row = g.kernel * g.kernel * vecs;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < num_rows * per_row; i += (int64_t)gridDim.x * 256) {
        const int64_t r = i / per_row;
        const int j = (int)(i - r * per_row), tap = j / vecs, c = (j - tap * vecs) * V;
        const int64_t pixel = first + r, row = pixel / g.out_w, b = row / g.out_h;
        const int ox = (int)(pixel - row * g.out_w), oy = (int)(row - b * g.out_h);
        const int64_t at = tap_offset(g, b, oy, ox, tap / g.kernel, tap % g.kernel);
        vec16<T> u = {};
        if (at >= 0) u = *(const vec16<T> *)(x + at + c);
        *(vec16<T> *)(columns + i * V) = u;
    }
}

/* y += bias in place, channels last; a thread per 16 bytes. */
static __global__ void __launch_bounds__(256)
    bias_kernel(rf_bf16 *y, const float *bias, int64_t num_vecs, int vecs_per_row) {
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < num_vecs; i += (int64_t)gridDim.x * 256) {
        const int c = (int)(i % vecs_per_row) * 8;
        vec16<rf_bf16> u = *(vec16<rf_bf16> *)(y + i * 8);
#pragma unroll
        for (int j = 0; j < 8; j++) u.v[j] = rf_from_f32<rf_bf16>(rf_to_f32(u.v[j]) + bias[c + j]);
        *(vec16<rf_bf16> *)(y + i * 8) = u;
    }
}

/* --- FEW_OUT: in a multiple of the vector, out <= 4 ------------------------------------------------------------------
 * A team of 16 lanes (32 for f32) computes four neighbouring pixels of a row; each lane takes one channel vector of a slice
 * of 128 input channels, keeps one sum per (pixel, output), and the team adds them up at the end in a fixed order. Weights
 * come from shared memory as f32 [tap][channel within the vector][vector][4], so that a team reads them in one row. */

#define FEW_PIXELS 4
#define FEW_SLICE  128 /* input channels whose weights are in shared memory at once */

template <typename T>
static __global__ void __launch_bounds__(256, 2)
    few_out_kernel(const T *x, const T *w, const float *bias, const T *addend, T *y, geometry g, int64_t num_strips,
                   int strips_per_row) {
    const int V = 16 / sizeof(T), team = FEW_SLICE / V;
    __shared__ float4 s_w[9 * FEW_SLICE];
    const int taps = g.kernel * g.kernel, lane = threadIdx.x % team;
    const int64_t strip = (int64_t)blockIdx.x * (256 / team) + threadIdx.x / team;
    const bool active = strip < num_strips;
    const int64_t row = strip / strips_per_row, b = row / g.out_h;
    const int oy = (int)(row - b * g.out_h), ox0 = (int)(strip - row * strips_per_row) * FEW_PIXELS;
    float sum[FEW_PIXELS][4] = {};

    for (int c0 = 0; c0 < g.in; c0 += FEW_SLICE) {
        const int slice = min(FEW_SLICE, g.in - c0);
        __syncthreads(); /* nobody still reads the previous slice's weights */
        for (int i = threadIdx.x; i < taps * slice; i += 256) {
            const int tap = i / slice, c = c0 + i % slice;
            float f[4];
            for (int o = 0; o < 4; o++) f[o] = o < g.out ? rf_to_f32(w[((int64_t)o * taps + tap) * g.in + c]) : 0.0f;
            s_w[tap * FEW_SLICE + i % slice % V * team + i % slice / V] = make_float4(f[0], f[1], f[2], f[3]);
        }
        __syncthreads(); /* this slice's weights are there */
        if (!active || lane * V >= slice) continue;
        for (int tap = 0; tap < taps; tap++) {
            vec16<T> u[FEW_PIXELS];
#pragma unroll
            for (int p = 0; p < FEW_PIXELS; p++) {
                const int64_t at =
                    ox0 + p < g.out_w ? tap_offset(g, b, oy, ox0 + p, tap / g.kernel, tap % g.kernel) : -1;
                u[p] = vec16<T>{};
                if (at >= 0) u[p] = *(const vec16<T> *)(x + at + c0 + lane * V);
            }
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float4 wt = s_w[tap * FEW_SLICE + i * team + lane];
#pragma unroll
                for (int p = 0; p < FEW_PIXELS; p++) {
                    const float f = rf_to_f32(u[p].v[i]);
                    sum[p][0] += f * wt.x;
                    sum[p][1] += f * wt.y;
                    sum[p][2] += f * wt.z;
                    sum[p][3] += f * wt.w;
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < FEW_PIXELS; p++)
#pragma unroll
        for (int o = 0; o < 4; o++)
            for (int offset = team / 2; offset > 0; offset >>= 1)
                sum[p][o] += __shfl_xor_sync(0xffffffffu, sum[p][o], offset);
    if (!active || lane != 0) return;
#pragma unroll
    for (int p = 0; p < FEW_PIXELS; p++) {
        if (ox0 + p >= g.out_w) break;
        const int64_t at = (row * g.out_w + ox0 + p) * g.out;
#pragma unroll
        for (int o = 0; o < 4; o++) {
            if (o >= g.out) break;
            float f = sum[p][o];
            if (bias) f += bias[o];
            if (addend) f += rf_to_f32(addend[at + o]);
            y[at + o] = rf_from_f32<T>(f);
        }
    }
}

/* --- ANY: 32 pixels x 64 outputs a block, the taps' channels in slices of 32; 256 threads with 2 x 4 results each ------ */

#define ANY_PIXELS 32
#define ANY_OUTS   64
#define ANY_DEPTH  32

template <typename T>
static __global__ void __launch_bounds__(256)
    any_kernel(const T *x, const T *w, const float *bias, const T *addend, T *y, geometry g) {
    __shared__ float s_x[ANY_DEPTH][ANY_PIXELS + 1], s_w[ANY_DEPTH][ANY_OUTS + 1];
    __shared__ int64_t s_batch[ANY_PIXELS]; /* -1: past the last pixel */
    __shared__ int s_oy[ANY_PIXELS], s_ox[ANY_PIXELS];
    const int tid = threadIdx.x, depth = g.kernel * g.kernel * g.in;
    const int64_t pixel0 = (int64_t)blockIdx.x * ANY_PIXELS;
    const int out0 = blockIdx.y * ANY_OUTS;
    if (tid < ANY_PIXELS) {
        const int64_t pixel = pixel0 + tid, row = pixel / g.out_w, b = row / g.out_h;
        s_batch[tid] = pixel < g.pixels ? b : -1;
        s_oy[tid] = (int)(row - b * g.out_h);
        s_ox[tid] = (int)(pixel - row * g.out_w);
    }
    const int px = tid % 16 * 2, oc = tid / 16; /* pixels px, px + 1; outputs oc + 16 j */
    float sum[2][4] = {};
    for (int k0 = 0; k0 < depth; k0 += ANY_DEPTH) {
        __syncthreads(); /* pixel table there; the previous slice is used up */
        for (int i = tid; i < ANY_DEPTH * ANY_PIXELS; i += 256) {
            const int k = i % ANY_DEPTH, p = i / ANY_DEPTH, tap = (k0 + k) / g.in, c = k0 + k - tap * g.in;
            float f = 0.0f;
            if (k0 + k < depth && s_batch[p] >= 0) {
                const int64_t at = tap_offset(g, s_batch[p], s_oy[p], s_ox[p], tap / g.kernel, tap % g.kernel);
                if (at >= 0) f = rf_to_f32(x[at + c]);
            }
            s_x[k][p] = f;
        }
        for (int i = tid; i < ANY_DEPTH * ANY_OUTS; i += 256) {
            const int k = i % ANY_DEPTH, o = i / ANY_DEPTH;
            s_w[k][o] = k0 + k < depth && out0 + o < g.out ? rf_to_f32(w[(int64_t)(out0 + o) * depth + k0 + k]) : 0.0f;
        }
        __syncthreads(); /* slice loaded */
#pragma unroll 8
        for (int k = 0; k < ANY_DEPTH; k++) {
            const float x0 = s_x[k][px], x1 = s_x[k][px + 1];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float f = s_w[k][oc + 16 * j];
                sum[0][j] += x0 * f;
                sum[1][j] += x1 * f;
            }
        }
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const int64_t pixel = pixel0 + px + p;
        if (pixel >= g.pixels) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int o = out0 + oc + 16 * j;
            if (o >= g.out) continue;
            float f = sum[p][j];
            if (bias) f += bias[o];
            if (addend) f += rf_to_f32(addend[pixel * g.out + o]);
            y[pixel * g.out + o] = rf_from_f32<T>(f);
        }
    }
}

/* --- nearest x2: a thread per stored element group -------------------------------------------------------------------- */

template <typename T, int V> struct alignas(sizeof(T) * V) vec { T v[V]; };

template <typename T, int V>
static __global__ void __launch_bounds__(256)
    upsample_kernel(const T *x, T *y, int height, int width, int vecs, int64_t num) {
    typedef vec<T, V> unit;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < num; i += (int64_t)gridDim.x * 256) {
        const int64_t pixel = i / vecs, row = pixel / width; /* of x; row counts over the batch */
        const int c = (int)(i - pixel * vecs), col = (int)(pixel - row * width);
        const unit u = ((const unit *)x)[i];
        unit *out = (unit *)y + ((2 * row * 2 * width) + 2 * col) * vecs + c;
        out[0] = u;
        out[vecs] = u;
        out[2 * (int64_t)width * vecs] = u;
        out[(2 * (int64_t)width + 1) * vecs] = u;
    }
}

/* --- choice and launch ----------------------------------------------------------------------------------------------- */

typedef enum { CONV_FEW_OUT, CONV_IMPLICIT, CONV_GEMM, CONV_COLUMNS, CONV_ANY } variant;

static variant choose(const rf_conv2d_args *a) {
    const int64_t v = a->dtype == RF_DTYPE_F32 ? 4 : 8;
    if (a->in_channels % v != 0) return CONV_ANY;
    if (a->out_channels <= 4) return CONV_FEW_OUT;
    if (a->out_channels % v != 0) return CONV_ANY;
    if (rf_conv_mma_fits(a)) return CONV_IMPLICIT;
    if (a->kernel == 1 && a->stride == 1 && a->pad_before == 0 && a->pad_after == 0 && !a->upsample) return CONV_GEMM;
    return CONV_COLUMNS;
}

/* Output pixels per chunk of the column buffer: whole 128-row tiles, at least one. */
static int64_t chunk_rows(const rf_conv2d_args *a) {
    const int64_t row_bytes = a->kernel * a->kernel * a->in_channels * (int64_t)rf_dtype_bytes(a->dtype);
    const int64_t pixels = a->batch * rf_conv2d_out_size(a, a->height) * rf_conv2d_out_size(a, a->width);
    int64_t rows = COLUMN_BYTES / row_bytes / 128 * 128;
    if (rows < 128) rows = 128;
    return rows < pixels ? rows : pixels;
}

extern "C" size_t rf_conv2d_workspace_cuda(rf_backend *backend, const rf_conv2d_args *args) {
    if (choose(args) != CONV_COLUMNS) return 0;
    return (size_t)(chunk_rows(args) * args->kernel * args->kernel * args->in_channels) * rf_dtype_bytes(args->dtype);
}

/* y rows [first, first + num) = rows w^T (+ addend, + bias if the dtype is f32). */
static rf_status gemm_rows(rf_stream *stream, const rf_conv2d_args *a, const void *rows, int64_t first, int64_t num,
                           rf_error *err) {
    const size_t size = rf_dtype_bytes(a->dtype);
    rf_gemm_args g = rf_gemm_args_default(a->dtype, num, a->out_channels, a->kernel * a->kernel * a->in_channels);
    g.x = rows;
    g.w = a->w;
    g.y = (char *)a->y + (size_t)(first * a->out_channels) * size;
    if (a->dtype == RF_DTYPE_F32) g.bias = a->bias;
    if (a->addend) {
        g.y0 = (const char *)a->addend + (size_t)(first * a->out_channels) * size;
        g.beta = 1.0f;
    }
    return rf_gemm_cuda(stream, &g, err);
}

static rf_status add_bias(rf_stream *stream, const rf_conv2d_args *a, int64_t pixels, rf_error *err) {
    if (!a->bias || a->dtype == RF_DTYPE_F32) return RF_OK;
    const int vecs = (int)(a->out_channels / 8);
    const int64_t num = pixels * vecs;
    return rf_launch(stream, "conv2d_bias", err, bias_kernel, rf_blocks_for(num, 256), 256, 0, (rf_bf16 *)a->y, a->bias,
                     num, vecs);
}

template <typename T> static rf_status launch_columns(rf_stream *stream, const rf_conv2d_args *a, rf_error *err) {
    const geometry g = make_geometry(a);
    const int64_t rows = chunk_rows(a), per_row = g.kernel * g.kernel * g.in / (16 / (int)sizeof(T));
    for (int64_t first = 0; first < g.pixels; first += rows) {
        const int64_t num = g.pixels - first < rows ? g.pixels - first : rows;
        rf_status st = rf_launch(stream, "conv2d_columns", err, columns_kernel<T>, rf_blocks_for(num * per_row, 256),
                                 256, 0, (const T *)a->x, (T *)a->workspace, g, first, num);
        if (st == RF_OK) st = gemm_rows(stream, a, a->workspace, first, num, err);
        if (st != RF_OK) return st;
    }
    return add_bias(stream, a, g.pixels, err);
}

template <typename T> static rf_status launch_few_out(rf_stream *stream, const rf_conv2d_args *a, rf_error *err) {
    const geometry g = make_geometry(a);
    const int team = FEW_SLICE / (16 / (int)sizeof(T));
    const int per_row = (int)rf_ceil_div(g.out_w, FEW_PIXELS);
    const int64_t strips = a->batch * g.out_h * per_row;
    return rf_launch(stream, "conv2d_few_out", err, few_out_kernel<T>, (unsigned)rf_ceil_div(strips, 256 / team), 256,
                     0, (const T *)a->x, (const T *)a->w, a->bias, (const T *)a->addend, (T *)a->y, g, strips, per_row);
}

template <typename T> static rf_status launch_any(rf_stream *stream, const rf_conv2d_args *a, rf_error *err) {
    const geometry g = make_geometry(a);
    const dim3 grid((unsigned)rf_ceil_div(g.pixels, ANY_PIXELS), (unsigned)rf_ceil_div(g.out, ANY_OUTS));
    return rf_launch(stream, "conv2d_any", err, any_kernel<T>, grid, 256, 0, (const T *)a->x, (const T *)a->w, a->bias,
                     (const T *)a->addend, (T *)a->y, g);
}

static rf_status check_aligned(const char *what, const void *p, rf_error *err) {
    if (rf_is_aligned(p, 16)) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "conv2d: %s must be on a 16-byte address", what);
}

extern "C" rf_status rf_conv2d_cuda(rf_stream *stream, const rf_conv2d_args *args, rf_error *err) {
    rf_status st = rf_conv2d_check(args, err);
    if (st != RF_OK) return st;
    const int64_t pixels = args->batch * rf_conv2d_out_size(args, args->height) * rf_conv2d_out_size(args, args->width);
    if (pixels > INT32_MAX || args->out_channels > (1 << 20))
        return rf_fail(err, RF_ERR_SHAPE, "conv2d: %lld output pixels or %lld channels are too many", (long long)pixels,
                       (long long)args->out_channels);
    if (!stream) return RF_OK;
    st = rf_conv2d_check_run(args, err);
    if (st != RF_OK || pixels == 0) return st;
    const variant v = choose(args);
    if (v != CONV_ANY) {
        st = check_aligned("x", args->x, err);
        if (st == RF_OK) st = check_aligned("w", args->w, err);
        if (st == RF_OK) st = check_aligned("y", args->y, err);
        if (st == RF_OK) st = check_aligned("addend", args->addend, err);
        if (st == RF_OK) st = check_aligned("bias", args->bias, err);
        if (st == RF_OK)
            st = rf_check_workspace("conv2d", args->workspace, args->workspace_bytes,
                                    rf_conv2d_workspace_cuda(rf_stream_backend(stream), args), err);
        if (st != RF_OK) return st;
    }
    const bool f32 = args->dtype == RF_DTYPE_F32;
    switch (v) {
    case CONV_FEW_OUT:
        return f32 ? launch_few_out<float>(stream, args, err) : launch_few_out<rf_bf16>(stream, args, err);
    case CONV_IMPLICIT: return rf_conv_mma_launch(stream, args, err);
    case CONV_GEMM:
        st = gemm_rows(stream, args, args->x, 0, pixels, err);
        return st == RF_OK ? add_bias(stream, args, pixels, err) : st;
    case CONV_COLUMNS:
        return f32 ? launch_columns<float>(stream, args, err) : launch_columns<rf_bf16>(stream, args, err);
    default: return f32 ? launch_any<float>(stream, args, err) : launch_any<rf_bf16>(stream, args, err);
    }
}

template <typename T, int V>
static rf_status launch_upsample(rf_stream *stream, const rf_upsample2x_args *a, rf_error *err) {
    const int vecs = (int)(a->channels / V);
    const int64_t num = a->batch * a->height * a->width * vecs;
    return rf_launch(stream, "upsample2x", err, upsample_kernel<T, V>, rf_blocks_for(num, 256), 256, 0, (const T *)a->x,
                     (T *)a->y, (int)a->height, (int)a->width, vecs, num);
}

extern "C" rf_status rf_upsample2x_cuda(rf_stream *stream, const rf_upsample2x_args *args, rf_error *err) {
    rf_status st = rf_upsample2x_check(args, err);
    if (st != RF_OK || !stream) return st;
    st = rf_upsample2x_check_run(args, err);
    if (st != RF_OK || args->batch == 0) return st;
    const bool f32 = args->dtype == RF_DTYPE_F32;
    const bool wide = args->channels % (f32 ? 4 : 8) == 0 && rf_is_aligned(args->x, 16) && rf_is_aligned(args->y, 16);
    if (f32) return (wide ? launch_upsample<float, 4> : launch_upsample<float, 1>)(stream, args, err);
    return (wide ? launch_upsample<rf_bf16, 8> : launch_upsample<rf_bf16, 1>)(stream, args, err);
}
