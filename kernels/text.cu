/* kernels/text.cu - token rows in, queries, keys and values to their places, SwiGLU (kernels/text.h).
 * Maths    f32, rounded once to the dtype of the result.
 * Launch   a thread takes eight neighbouring elements, in vectors of 16 bytes where sizes, strides and bases allow it (WIDE), else
 *          one by one. qkv_rope: 8, 16 or 32 lanes a head; the element that turns with a lane's own lies in another lane and comes
 *          through shared memory, inside one warp.
 * Cost     bandwidth bound: every operand once. Arch  sm_80 and later.  Checked  tests/kernels/test_text.c. */
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/rope.cuh"
#include "kernels/text_checks.h"

static constexpr int THREADS = 256, MAX_GRID_ROWS = 65535;
static constexpr int ROPE_THREADS = 128, MAX_HEAD_DIM = 256;

/* Eight neighbours as f32, of which num exist; the rest are zeros. */
template <bool WIDE> static __device__ __forceinline__ void load8(const rf_bf16 *p, int num, float (&v)[8]) {
    if constexpr (WIDE) {
        rf_unpack16(*reinterpret_cast<const uint4 *>(p), v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < num ? rf_to_f32(p[i]) : 0.0f;
    }
}
template <bool WIDE> static __device__ __forceinline__ void load8(const float *p, int num, float (&v)[8]) {
    if constexpr (WIDE) {
        rf_load4(p, v);
        rf_load4(p + 4, v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < num ? p[i] : 0.0f;
    }
}
template <bool WIDE> static __device__ __forceinline__ void store8(rf_bf16 *p, int num, const float (&v)[8]) {
    if constexpr (WIDE) {
        *reinterpret_cast<uint4 *>(p) = rf_pack16(v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < num) p[i] = rf_from_f32<rf_bf16>(v[i]);
    }
}
template <bool WIDE> static __device__ __forceinline__ void store8(float *p, int num, const float (&v)[8]) {
    if constexpr (WIDE) {
        rf_store4(p, v);
        rf_store4(p + 4, v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < num) p[i] = v[i];
    }
}

/* Grid (eights of a row / THREADS, rows). */
static dim3 row_grid(int64_t rows, int64_t cols) {
    return dim3((unsigned)rf_ceil_div(rf_ceil_div(cols, 8), THREADS),
                (unsigned)(rows < MAX_GRID_ROWS ? rows : MAX_GRID_ROWS));
}

/* --- embed -------------------------------------------------------------------------------------------------------------- */

template <class From, class To, bool WIDE>
static __global__ void __launch_bounds__(THREADS) embed_kernel(const __grid_constant__ rf_embed_args p) {
    const int64_t c = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
    rf_wait_for_previous();
    if (c >= p.cols) return;
    const int num = (int)min((int64_t)8, p.cols - c);
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        const int64_t id = p.ids[r];
        float v[8] = {};
        if (id >= 0 && id < p.vocab) {
            load8<WIDE>((const From *)p.table + id * p.cols + c, num, v);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] *= p.scale;
        }
        store8<WIDE>((To *)p.out + r * p.cols + c, num, v);
    }
}

template <class From, class To>
static rf_status launch_embed(rf_stream *stream, const rf_embed_args *a, rf_error *err) {
    const bool wide = a->cols % 8 == 0 && rf_is_aligned(a->table, 16) && rf_is_aligned(a->out, 16);
    return rf_launch_early(stream, "embed", err, wide ? embed_kernel<From, To, true> : embed_kernel<From, To, false>,
                           row_grid(a->rows, a->cols), dim3(THREADS), 0, *a);
}

extern "C" rf_status rf_embed_cuda(rf_stream *stream, const rf_embed_args *a, rf_error *err) {
    RF_TRY(rf_embed_check(a, err));
    if (!stream || a->rows == 0) return RF_OK;
    const void *const needed[] = {a->table, a->ids, a->out};
    RF_TRY(rf_text_pointers("embed", needed, 3, err));
    const bool to_f32 = a->out_dtype == RF_DTYPE_F32;
    if (a->dtype == RF_DTYPE_F32)
        return (to_f32 ? launch_embed<float, float> : launch_embed<float, rf_bf16>)(stream, a, err);
    return (to_f32 ? launch_embed<rf_bf16, float> : launch_embed<rf_bf16, rf_bf16>)(stream, a, err);
}

/* --- queries, keys and values ----------------------------------------------------------------------------------------- */

/* LANES x 8 >= head_dim. A head is LANES neighbouring lanes of a warp; lanes past head_dim only take part in the shuffles. */
template <class T, int LANES, bool WIDE>
static __global__ void __launch_bounds__(ROPE_THREADS)
    qkv_rope_kernel(const __grid_constant__ rf_qkv_rope_args p, uint32_t num_units) {
    __shared__ __align__(16) float exchange[ROPE_THREADS * 8];
    const int lane = threadIdx.x % LANES, dim = p.head_dim, pairs = p.pairs, first = lane * 8;
    const uint32_t unit = (blockIdx.x * ROPE_THREADS + threadIdx.x) / LANES;
    const uint32_t hq = (uint32_t)p.num_q_heads, hkv = (uint32_t)p.num_kv_heads, heads = hq + 2 * hkv;
    const uint32_t row = unit / heads, head = unit - row * heads;
    const bool active = unit < num_units && first < dim, turns = active && head < hq + hkv;
    const int num = min(8, dim - first);
    float *const own = exchange + (threadIdx.x - lane) * 8; /* this head's elements */
    rf_wait_for_previous();

    float v[8] = {};
    int64_t pos = 0;
    if (active) {
        load8<WIDE>((const T *)p.qkv + (int64_t)unit * dim + first, num, v);
        pos = max(p.positions[row], 0);
    }
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) square = fmaf(v[i], v[i], square);
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    const float *const weight = head < hq ? p.q_norm : p.k_norm;
    if (turns && weight) {
        const float factor = 1.0f / sqrtf(square / (float)dim + p.norm_eps);
        float w[8];
        load8<WIDE>(weight + first, num, w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * factor * w[i];
    }
    rf_store4(own + first, v);
    rf_store4(own + first + 4, v + 4);
    __syncwarp(); /* the other elements of the head are there */

    if (turns && first < 2 * pairs) {
        const float *const table = p.table + min(pos, p.table_rows - 1) * pairs * 2;
        if constexpr (WIDE) { /* pairs % 8 == 0: all eight are in the same half */
            const bool low = first < pairs;
            const int pair = low ? first : first - pairs;
            float other[8], angle[16];
            load8<true>((const float *)own + (low ? first + pairs : pair), 8, other);
            rf_load_angles(table + 2 * pair, angle);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float turned = other[i] * angle[2 * i + 1];
                v[i] = fmaf(v[i], angle[2 * i], low ? -turned : turned);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at = first + i, pair = at < pairs ? at : at - pairs;
                if (at >= 2 * pairs) continue;
                const float turned = own[at < pairs ? at + pairs : pair] * table[2 * pair + 1];
                v[i] = fmaf(v[i], table[2 * pair], at < pairs ? -turned : turned);
            }
        }
    }
    if (!active) return;
    T *to;
    if (head < hq) {
        to = (T *)p.q_out + ((int64_t)row * hq + head) * dim;
    } else {
        const bool is_key = head < hq + hkv;
        const uint32_t kv_head = head - hq - (is_key ? 0 : hkv), sequence = row / (uint32_t)p.rows;
        int64_t at = sequence * p.k_batch_stride + min(pos, p.cache_rows - 1) * p.k_row_stride + (int64_t)kv_head * dim;
        if (p.pool_rows) {
            const int32_t pool_row = p.pool_rows[row * hkv + kv_head];
            if (pool_row < 0) return;
            at = (int64_t)pool_row * dim;
        }
        to = (is_key ? (T *)p.k : (T *)p.v) + at;
    }
    store8<WIDE>(to + first, num, v);
}

template <class T, int LANES>
static rf_status launch_qkv_rope(rf_stream *stream, const rf_qkv_rope_args *a, rf_error *err) {
    const int64_t units = a->batch * a->rows * (a->num_q_heads + 2 * a->num_kv_heads);
    const bool wide = a->head_dim % 8 == 0 && a->pairs % 8 == 0 && a->k_row_stride % 8 == 0 &&
                      a->k_batch_stride % 8 == 0 && rf_is_aligned(a->qkv, 16) && rf_is_aligned(a->q_out, 16) &&
                      rf_is_aligned(a->k, 16) && rf_is_aligned(a->v, 16) && rf_is_aligned(a->q_norm, 16) &&
                      rf_is_aligned(a->k_norm, 16) && rf_is_aligned(a->table, 16);
    return rf_launch_early(
        stream, "qkv_rope", err, wide ? qkv_rope_kernel<T, LANES, true> : qkv_rope_kernel<T, LANES, false>,
        dim3((unsigned)rf_ceil_div(units, ROPE_THREADS / LANES)), dim3(ROPE_THREADS), 0, *a, (uint32_t)units);
}

template <class T> static rf_status launch_qkv_rope_lanes(rf_stream *stream, const rf_qkv_rope_args *a, rf_error *err) {
    if (a->head_dim <= 64) return launch_qkv_rope<T, 8>(stream, a, err);
    if (a->head_dim <= 128) return launch_qkv_rope<T, 16>(stream, a, err);
    return launch_qkv_rope<T, 32>(stream, a, err);
}

extern "C" rf_status rf_qkv_rope_cuda(rf_stream *stream, const rf_qkv_rope_args *a, rf_error *err) {
    RF_TRY(rf_qkv_rope_check(a, err));
    RF_TRY(rf_text_size("qkv_rope", "head_dim", a->head_dim, 2, MAX_HEAD_DIM, err));
    const int64_t heads = a->num_q_heads + 2 * (int64_t)a->num_kv_heads;
    /* a thread's index has 32 bits */
    RF_TRY(rf_text_size("qkv_rope", "rows of all sequences", a->batch == 0 ? 0 : a->rows, 0,
                        (int64_t)UINT32_MAX / 32 / heads / (a->batch == 0 ? 1 : a->batch), err));
    if (!stream || a->batch == 0 || a->rows == 0) return RF_OK;
    const void *const needed[] = {a->qkv, a->q_out, a->k, a->v, a->positions, a->pairs > 0 ? a->table : a->qkv};
    RF_TRY(rf_text_pointers("qkv_rope", needed, 6, err));
    if (a->dtype == RF_DTYPE_F32) return launch_qkv_rope_lanes<float>(stream, a, err);
    return launch_qkv_rope_lanes<rf_bf16>(stream, a, err);
}

/* --- SwiGLU ------------------------------------------------------------------------------------------------------------- */

template <class T, bool INTERLEAVED, bool WIDE>
static __global__ void __launch_bounds__(THREADS) swiglu_kernel(const __grid_constant__ rf_swiglu_args p) {
    const int64_t c = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
    rf_wait_for_previous();
    if (c >= p.cols) return;
    const int num = (int)min((int64_t)8, p.cols - c);
    for (int64_t r = blockIdx.y; r < p.rows; r += gridDim.y) {
        const T *const x = (const T *)p.x + r * 2 * p.cols;
        float a[8], b[8], y[8];
        load8<WIDE>(INTERLEAVED ? x + 2 * c : x + c, INTERLEAVED ? 2 * num : num, a);
        load8<WIDE>(INTERLEAVED ? x + 2 * c + 8 : x + p.cols + c, INTERLEAVED ? 2 * num - 8 : num, b);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float gate = !INTERLEAVED ? a[i] : i < 4 ? a[2 * i % 8] : b[2 * i % 8];
            const float up = !INTERLEAVED ? b[i] : i < 4 ? a[2 * i % 8 + 1] : b[2 * i % 8 + 1];
            y[i] = rf_activate(gate, RF_ACT_SILU) * up;
        }
        store8<WIDE>((T *)p.y + r * p.cols + c, num, y);
    }
}

template <class T> static rf_status launch_swiglu(rf_stream *stream, const rf_swiglu_args *a, rf_error *err) {
    const bool wide = a->cols % 8 == 0 && rf_is_aligned(a->x, 16) && rf_is_aligned(a->y, 16);
    auto kernel = a->interleaved ? (wide ? swiglu_kernel<T, true, true> : swiglu_kernel<T, true, false>)
                                 : (wide ? swiglu_kernel<T, false, true> : swiglu_kernel<T, false, false>);
    return rf_launch_early(stream, "swiglu", err, kernel, row_grid(a->rows, a->cols), dim3(THREADS), 0, *a);
}

extern "C" rf_status rf_swiglu_cuda(rf_stream *stream, const rf_swiglu_args *a, rf_error *err) {
    RF_TRY(rf_swiglu_check(a, err));
    if (!stream || a->rows == 0) return RF_OK;
    const void *const needed[] = {a->x, a->y};
    RF_TRY(rf_text_pointers("swiglu", needed, 2, err));
    if (a->dtype == RF_DTYPE_F32) return launch_swiglu<float>(stream, a, err);
    return launch_swiglu<rf_bf16>(stream, a, err);
}
