/* kernels/cache.cu - groups of rows into rings of snapshots, weighted sums of snapshots, computed rows among remembered ones.
 * Maths    group_copy: dst = a - b. combine: dst = base + sum_j w_j ring_j in order of slots; a slot of weight 0 is not read.
 *          f32, one rounding. row_merge: x += gate_b * y, or x = (x + gate_a * a) + gate_b * b with every product rounded:
 *          the bits of residual with term_group and extra.
 * Shapes   groups of rows x cols <= 2^31 - 1 elements, at most 65535 groups. Vectors of 8 elements (all bf16; combine: a
 *          bf16 ring) or 4 where cols, strides and bases allow, else one element at a time. A call without row classes whose
 *          rows are dense is one long row per group.
 * Launch   grid (parts of a group, groups). group_copy: two vectors a thread. row_merge: one vector a thread. combine: a warp for a piece of one row, 16
 *          sums a lane (4 without vectors); its weights lie in the lanes, a vote tells which slots count.
 * Cost     bandwidth bound: (1 or 2) + 1, nonzero slots + (0 or 1) + 1, and 4, times groups * rows * cols elements.
 * Arch     sm_80 and later.  Checked  tests/kernels against plain loops. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int THREADS = 256, COPY_VECTORS = 2;

/* --- kernels ------------------------------------------------------------------------------------------------------ */

template <int VEC> static __device__ __forceinline__ void load_vector(const float *p, float v[VEC]) {
    if constexpr (VEC == 1) {
        v[0] = *p;
    } else {
#pragma unroll
        for (int k = 0; k < VEC; k += 4) rf_load4(p + k, v + k);
    }
}
template <int VEC> static __device__ __forceinline__ void load_vector(const rf_bf16 *p, float v[VEC]) {
    if constexpr (VEC == 1) {
        v[0] = rf_to_f32(*p);
    } else if constexpr (VEC == 4) {
        rf_load4(p, v);
    } else {
        const uint4 q = *reinterpret_cast<const uint4 *>(p);
        v[0] = __uint_as_float(q.x << 16), v[1] = __uint_as_float(q.x & 0xffff0000u);
        v[2] = __uint_as_float(q.y << 16), v[3] = __uint_as_float(q.y & 0xffff0000u);
        v[4] = __uint_as_float(q.z << 16), v[5] = __uint_as_float(q.z & 0xffff0000u);
        v[6] = __uint_as_float(q.w << 16), v[7] = __uint_as_float(q.w & 0xffff0000u);
    }
}
template <int VEC> static __device__ __forceinline__ void store_vector(float *p, const float v[VEC]) {
    if constexpr (VEC == 1) {
        *p = v[0];
    } else {
#pragma unroll
        for (int k = 0; k < VEC; k += 4) rf_store4(p + k, v + k);
    }
}
template <int VEC> static __device__ __forceinline__ void store_vector(rf_bf16 *p, const float v[VEC]) {
    if constexpr (VEC == 1)
        *p = rf_from_f32<rf_bf16>(v[0]);
    else if constexpr (VEC == 4)
        rf_store4(p, v);
    else
        *reinterpret_cast<uint4 *>(p) = make_uint4(rf_pack_bf16(v[0], v[1]), rf_pack_bf16(v[2], v[3]),
                                                   rf_pack_bf16(v[4], v[5]), rf_pack_bf16(v[6], v[7]));
}

/* The group of the other side that packed group g is. */
static __device__ __forceinline__ int64_t group_of(const int32_t *index, int64_t g) {
    return index ? index[g] : g;
}

/* dst may be a or b: a thread reads its elements before it writes them. */
template <class A, class B, class D, int VEC>
static __global__ void __launch_bounds__(THREADS) group_copy_kernel(const __grid_constant__ rf_group_copy_args p) {
    const uint32_t per_row = (uint32_t)p.cols / VEC, total = (uint32_t)p.rows * per_row;
    const uint32_t first = blockIdx.x * (THREADS * COPY_VECTORS) + threadIdx.x;
    rf_wait_for_previous();
    const int64_t dst_group = group_of(p.dst_index, blockIdx.y);
    const A *const a = (const A *)p.a + group_of(p.a_index, blockIdx.y) * p.rows * p.a_ld;
    const B *const b = p.b ? (const B *)p.b + group_of(p.b_index, blockIdx.y) * p.rows * p.b_ld : NULL;
    D *dst = (D *)p.dst + dst_group * p.rows * p.dst_ld;
    if (p.dst_slot) dst += p.dst_slot[dst_group] * p.dst_slot_stride;

    float f[COPY_VECTORS][VEC], g[COPY_VECTORS][VEC];
    int64_t row[COPY_VECTORS];
    uint32_t col[COPY_VECTORS];
#pragma unroll
    for (int v = 0; v < COPY_VECTORS; v++) {
        const uint32_t at = first + v * THREADS, r = at / per_row;
        row[v] = r;
        col[v] = (at - r * per_row) * VEC;
        if (at < total) load_vector<VEC>(a + row[v] * p.a_ld + col[v], f[v]);
#pragma unroll
        for (int k = 0; k < VEC; k++) g[v][k] = 0.0f;
        if (at < total && b && col[v] < (uint32_t)p.b_cols) load_vector<VEC>(b + row[v] * p.b_ld + col[v], g[v]);
    }
#pragma unroll
    for (int v = 0; v < COPY_VECTORS; v++) {
        if (first + v * THREADS < total) {
#pragma unroll
            for (int k = 0; k < VEC; k++) f[v][k] -= g[v][k];
            store_vector<VEC>(dst + row[v] * p.dst_ld + col[v], f[v]);
        }
    }
}

/* Sums of a lane; a piece of a row is 32 times as many columns. */
template <int VEC> static constexpr int LANE_SUMS = VEC == 1 ? 4 : 16;

/* dst may be base. */
template <class R, class B, class D, int VEC>
static __global__ void __launch_bounds__(THREADS)
    combine_kernel(const __grid_constant__ rf_combine_args p, const uint32_t pieces) {
    constexpr int NV = LANE_SUMS<VEC> / VEC;
    const int lane = threadIdx.x & 31;
    const uint32_t task = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), row = task / pieces;
    if (row >= p.rows) return; /* a whole warp */
    const uint32_t first = (task - row * pieces) * (32 * LANE_SUMS<VEC>)+lane * VEC, cols = (uint32_t)p.cols;
    rf_wait_for_previous();
    const int64_t src = group_of(p.src_index, blockIdx.y);
    const int row_class = p.row_class ? min((int)p.row_class[src * p.rows + row], p.num_classes - 1) : 0;
    const float *const weights = p.weights + (src * p.num_classes + row_class) * p.num_slots;
    const float w_low = lane < p.num_slots ? weights[lane] : 0.0f;
    const float w_high = lane + 32 < p.num_slots ? weights[lane + 32] : 0.0f;

    float s[NV][VEC];
#pragma unroll
    for (int v = 0; v < NV; v++)
#pragma unroll
        for (int k = 0; k < VEC; k++) s[v][k] = 0.0f;
    if (p.base) {
        const B *const base = (const B *)p.base + (group_of(p.base_index, blockIdx.y) * p.rows + row) * p.base_ld;
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const uint32_t c = first + v * 32 * VEC;
            if (c < (uint32_t)p.base_cols) load_vector<VEC>(base + c, s[v]);
        }
    }
    const R *const ring = (const R *)p.ring + (src * p.rows + row) * p.cols;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float w_lane = half == 0 ? w_low : w_high;
#pragma unroll 1
        for (uint32_t slots = __ballot_sync(0xffffffffu, w_lane != 0.0f); slots != 0; slots &= slots - 1) {
            const int j = __ffs((int)slots) - 1;
            const float w = __shfl_sync(0xffffffffu, w_lane, j);
            const R *const snapshot = ring + (half * 32 + j) * p.slot_stride;
            float f[NV][VEC];
#pragma unroll
            for (int v = 0; v < NV; v++) {
                const uint32_t c = first + v * 32 * VEC;
                if (c < cols) load_vector<VEC>(snapshot + c, f[v]);
            }
#pragma unroll
            for (int v = 0; v < NV; v++) {
                if (first + v * 32 * VEC < cols) {
#pragma unroll
                    for (int k = 0; k < VEC; k++) s[v][k] = fmaf(w, f[v][k], s[v][k]);
                }
            }
        }
    }
    D *const dst = (D *)p.dst + (group_of(p.dst_index, blockIdx.y) * p.rows + row) * p.dst_ld;
#pragma unroll
    for (int v = 0; v < NV; v++) {
        const uint32_t c = first + v * 32 * VEC;
        if (c < cols) store_vector<VEC>(dst + c, s[v]);
    }
}

/* What does not hang on the row's place is loaded while that arrives. */
template <class X, class D, class T, int VEC>
static __global__ void __launch_bounds__(THREADS) row_merge_kernel(const __grid_constant__ rf_row_merge_args p) {
    const uint32_t per_row = (uint32_t)p.cols / VEC, at = blockIdx.x * THREADS + threadIdx.x, r = at / per_row;
    if (r >= (uint32_t)p.rows) return;
    const uint32_t col = (at - r * per_row) * VEC;
    rf_wait_for_previous();
    const int64_t row = blockIdx.y * p.rows + r;
    X *const x = (X *)p.x + row * p.cols + col;
    const int64_t state = (group_of(p.index, blockIdx.y) * p.rows + r) * p.cols + col;
    D *const ring_b = (D *)p.ring_b + state;

    float s[VEC], a[VEC], b[VEC], gate_a[VEC], gate_b[VEC];
    load_vector<VEC>(x, s);
#pragma unroll
    for (int k = 0; k < VEC; k++) gate_a[k] = gate_b[k] = 1.0f;
    const T *table = (const T *)p.mod.table;
    if (p.gate_b >= 0 || (p.ring_a && p.gate_a >= 0)) table += rf_modulation_offset(p.mod, row) + col;
    if (p.gate_b >= 0) load_vector<VEC>(table + p.gate_b, gate_b);
    const int32_t chosen = p.place[row];
    const bool has_a = p.ring_a && chosen < 0;
    load_vector<VEC>(chosen >= 0 ? (const D *)p.y + chosen * p.cols + col : ring_b, b);
    if (has_a) load_vector<VEC>((const D *)p.ring_a + state, a);
    if (has_a && p.gate_a >= 0) load_vector<VEC>(table + p.gate_a, gate_a);

    if (chosen >= 0) store_vector<VEC>(ring_b, b);
    if (has_a) {
#pragma unroll
        for (int k = 0; k < VEC; k++) s[k] = __fadd_rn(s[k], __fmul_rn(gate_a[k], a[k]));
    }
#pragma unroll
    for (int k = 0; k < VEC; k++) s[k] = __fadd_rn(s[k], __fmul_rn(gate_b[k], b[k]));
    store_vector<VEC>(x, s);
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

static rf_status check_sizes(const char *op, int64_t groups, int64_t rows, int64_t cols, rf_error *err) {
    if (groups > 65535)
        return rf_fail(err, RF_ERR_SHAPE, "%s: groups is %lld, must be at most 65535 on CUDA", op, (long long)groups);
    if (rows > 0 && cols > INT32_MAX / rows)
        return rf_fail(err, RF_ERR_SHAPE, "%s: a group of %lld x %lld, must be at most 2^31 - 1 elements on CUDA", op,
                       (long long)rows, (long long)cols);
    return RF_OK;
}

/* An operand can be moved in vectors of `vec` elements, of at most 16 bytes a load. */
static bool fits(const void *p, rf_dtype dtype, int64_t vec, int64_t ld, int64_t cols) {
    const size_t bytes = (size_t)vec * rf_dtype_bytes(dtype);
    return cols % vec == 0 && ld % vec == 0 && rf_is_aligned(p, bytes < 16 ? bytes : 16);
}

template <class A, class B, class D, int VEC>
static rf_status launch_copy(rf_stream *stream, const rf_group_copy_args &p, rf_error *err) {
    const dim3 grid((unsigned)rf_ceil_div(p.rows * p.cols / VEC, THREADS * COPY_VECTORS), (unsigned)p.groups);
    return rf_launch_early(stream, "group_copy", err, group_copy_kernel<A, B, D, VEC>, grid, dim3(THREADS), 0, p);
}

template <class A, class B, class D>
static rf_status launch_copy_width(rf_stream *stream, const rf_group_copy_args &p, rf_error *err) {
    auto all_fit = [&](int64_t vec) {
        return fits(p.a, p.a_dtype, vec, p.a_ld, p.cols) && fits(p.dst, p.dst_dtype, vec, p.dst_ld, p.cols) &&
               (!p.b || fits(p.b, p.b_dtype, vec, p.b_ld, p.b_cols)) && (!p.dst_slot || p.dst_slot_stride % vec == 0);
    };
    if constexpr (sizeof(A) == 2 && sizeof(B) == 2 && sizeof(D) == 2)
        if (all_fit(8)) return launch_copy<A, B, D, 8>(stream, p, err);
    if (all_fit(4)) return launch_copy<A, B, D, 4>(stream, p, err);
    return launch_copy<A, B, D, 1>(stream, p, err);
}

template <class A, class B>
static rf_status launch_copy_dst(rf_stream *stream, const rf_group_copy_args &p, rf_error *err) {
    if (p.dst_dtype == RF_DTYPE_F32) return launch_copy_width<A, B, float>(stream, p, err);
    return launch_copy_width<A, B, rf_bf16>(stream, p, err);
}

extern "C" rf_status rf_group_copy_cuda(rf_stream *stream, const rf_group_copy_args *args, rf_error *err) {
    rf_status status = stream ? rf_group_copy_check_run(args, err) : rf_group_copy_check(args, err);
    if (status == RF_OK) status = check_sizes("group_copy", args->groups, args->rows, args->cols, err);
    if (status != RF_OK || !stream || args->groups == 0 || args->rows == 0) return status;
    rf_group_copy_args p = *args;
    if (!p.b) p.b_dtype = p.a_dtype; /* only picks an instance */
    if (p.a_ld == p.cols && p.dst_ld == p.cols && (!p.b || (p.b_ld == p.cols && p.b_cols == p.cols))) {
        p.a_ld = p.dst_ld = p.b_ld = p.b_cols = p.cols *= p.rows;
        p.rows = 1;
    }
    if (p.a_dtype == RF_DTYPE_F32)
        return p.b_dtype == RF_DTYPE_F32 ? launch_copy_dst<float, float>(stream, p, err)
                                         : launch_copy_dst<float, rf_bf16>(stream, p, err);
    return p.b_dtype == RF_DTYPE_F32 ? launch_copy_dst<rf_bf16, float>(stream, p, err)
                                     : launch_copy_dst<rf_bf16, rf_bf16>(stream, p, err);
}

template <class R, class B, class D, int VEC>
static rf_status launch_combine(rf_stream *stream, const rf_combine_args &p, rf_error *err) {
    const int64_t pieces = rf_ceil_div(p.cols, 32 * LANE_SUMS<VEC>);
    const dim3 grid((unsigned)rf_ceil_div(p.rows * pieces, THREADS / 32), (unsigned)p.groups);
    return rf_launch_early(stream, "combine", err, combine_kernel<R, B, D, VEC>, grid, dim3(THREADS), 0, p,
                           (uint32_t)pieces);
}

template <class R, class B, class D>
static rf_status launch_combine_width(rf_stream *stream, const rf_combine_args &p, rf_error *err) {
    auto all_fit = [&](int64_t vec) {
        return fits(p.ring, p.ring_dtype, vec, p.num_slots > 1 ? p.slot_stride : 0, p.cols) &&
               fits(p.dst, p.dst_dtype, vec, p.dst_ld, p.cols) &&
               (!p.base || fits(p.base, p.base_dtype, vec, p.base_ld, p.base_cols));
    };
    if constexpr (sizeof(R) == 2)
        if (all_fit(8)) return launch_combine<R, B, D, 8>(stream, p, err);
    if (all_fit(4)) return launch_combine<R, B, D, 4>(stream, p, err);
    return launch_combine<R, B, D, 1>(stream, p, err);
}

template <class R, class B>
static rf_status launch_combine_dst(rf_stream *stream, const rf_combine_args &p, rf_error *err) {
    if (p.dst_dtype == RF_DTYPE_F32) return launch_combine_width<R, B, float>(stream, p, err);
    return launch_combine_width<R, B, rf_bf16>(stream, p, err);
}

extern "C" rf_status rf_combine_cuda(rf_stream *stream, const rf_combine_args *args, rf_error *err) {
    rf_status status = stream ? rf_combine_check_run(args, err) : rf_combine_check(args, err);
    if (status == RF_OK) status = check_sizes("combine", args->groups, args->rows, args->cols, err);
    if (status != RF_OK || !stream || args->groups == 0 || args->rows == 0) return status;
    rf_combine_args p = *args;
    if (!p.base) p.base_dtype = p.dst_dtype; /* only picks an instance */
    if (!p.row_class && p.dst_ld == p.cols && (!p.base || (p.base_ld == p.cols && p.base_cols == p.cols))) {
        p.dst_ld = p.base_ld = p.base_cols = p.cols *= p.rows;
        p.rows = 1;
    }
    if (p.ring_dtype == RF_DTYPE_F32)
        return p.base_dtype == RF_DTYPE_F32 ? launch_combine_dst<float, float>(stream, p, err)
                                            : launch_combine_dst<float, rf_bf16>(stream, p, err);
    return p.base_dtype == RF_DTYPE_F32 ? launch_combine_dst<rf_bf16, float>(stream, p, err)
                                        : launch_combine_dst<rf_bf16, rf_bf16>(stream, p, err);
}

template <class X, class D, class T, int VEC>
static rf_status launch_merge(rf_stream *stream, const rf_row_merge_args &p, rf_error *err) {
    const dim3 grid((unsigned)rf_ceil_div(p.rows * p.cols / VEC, THREADS), (unsigned)p.groups);
    return rf_launch_early(stream, "row_merge", err, row_merge_kernel<X, D, T, VEC>, grid, dim3(THREADS), 0, p);
}

template <class X, class D, class T>
static rf_status launch_merge_width(rf_stream *stream, const rf_row_merge_args &p, rf_error *err) {
    auto all_fit = [&](int64_t vec) {
        const bool used_a = p.ring_a && p.gate_a >= 0;
        return fits(p.x, p.x_dtype, vec, 0, p.cols) && fits(p.y, p.dtype, vec, 0, p.cols) &&
               fits(p.ring_a, p.dtype, vec, 0, p.cols) && fits(p.ring_b, p.dtype, vec, 0, p.cols) &&
               (!used_a || fits(p.mod.table, p.mod.dtype, vec, p.mod.stride, p.gate_a)) &&
               (p.gate_b < 0 || fits(p.mod.table, p.mod.dtype, vec, p.mod.stride, p.gate_b));
    };
    if constexpr (sizeof(D) == 2)
        if (all_fit(8)) return launch_merge<X, D, T, 8>(stream, p, err);
    if (all_fit(4)) return launch_merge<X, D, T, 4>(stream, p, err);
    return launch_merge<X, D, T, 1>(stream, p, err);
}

template <class X, class D>
static rf_status launch_merge_table(rf_stream *stream, const rf_row_merge_args &p, rf_error *err) {
    const bool gated = p.gate_b >= 0 || (p.ring_a && p.gate_a >= 0); /* if not, the dtype only picks an instance */
    if (gated && p.mod.dtype == RF_DTYPE_BF16) return launch_merge_width<X, D, rf_bf16>(stream, p, err);
    return launch_merge_width<X, D, float>(stream, p, err);
}

extern "C" rf_status rf_row_merge_cuda(rf_stream *stream, const rf_row_merge_args *args, rf_error *err) {
    rf_status status = stream ? rf_row_merge_check_run(args, err) : rf_row_merge_check(args, err);
    if (status == RF_OK) status = check_sizes("row_merge", args->groups, args->rows, args->cols, err);
    if (status != RF_OK || !stream || args->groups == 0 || args->rows == 0) return status;
    if (args->x_dtype == RF_DTYPE_F32)
        return args->dtype == RF_DTYPE_F32 ? launch_merge_table<float, float>(stream, *args, err)
                                           : launch_merge_table<float, rf_bf16>(stream, *args, err);
    return args->dtype == RF_DTYPE_F32 ? launch_merge_table<rf_bf16, float>(stream, *args, err)
                                       : launch_merge_table<rf_bf16, rf_bf16>(stream, *args, err);
}

/* --- post --------------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(256) post_kernel(const __grid_constant__ rf_post_args p) {
    rf_wait_for_previous();
    float *to = p.host + (int64_t)(*p.step + p.step_offset) * p.stride;
    for (int64_t i = threadIdx.x; i < p.num; i += 256) to[i] = p.src[i];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        const int32_t count = ++*p.count;
        *(volatile int32_t *)p.host_count = count;
        __threadfence_system();
    }
}

extern "C" rf_status rf_post_cuda(rf_stream *stream, const rf_post_args *args, rf_error *err) {
    rf_status status = stream ? rf_post_check_run(args, err) : rf_post_check(args, err);
    if (status != RF_OK || !stream) return status;
    return rf_launch_early(stream, "post", err, post_kernel, dim3(1), dim3(256), 0, *args);
}
