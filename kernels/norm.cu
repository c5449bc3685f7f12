/* kernels/norm.cu - row norms with modulation, and the gated residual fused with the norm that follows it.
 * Maths    s = base + gate * sum_t w_t term_t + extra_gate * extra (f32);  x = s rounded;
 *          n = (s - mean) / sqrt(var + eps) or s / rms;
 *          y = ((n * weight + bias) * (1 + scale) + shift) rounded. Two passes over registers: mean, then sums of d
 *          and d^2 with d = s - mean; the sum of d takes back the rounding of the mean.
 * Shapes   x [., cols], terms, y [num_rows, cols]; cols % 4 == 0, <= 16384; modulation offsets and stride % 4 == 0.
 * Launch   Few rows: a block of 128 or 256 threads per row, so that a latency of memory and two reductions are all there is.
 *          Else cols <= 1152: a warp per row, 4 rows a block; above: a block of 128 to 512 threads per row. The row lives
 *          in registers, NV vectors of four a thread, and all its loads, tables included, are issued before the first
 *          reduction. The shape, and with it the order of the sums, follows from rows, cols and the number of SMs alone.
 * Cost     bandwidth bound: (terms + 3) * rows * cols elements; 512 x 1152 is one wave and pays a load latency.
 * Arch     sm_80 and later.  Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

/* --- kernel ------------------------------------------------------------------------------------------------------- */

/* Four neighbours as they lie in memory. */
template <class T> struct raw4;
template <> struct raw4<float> {
    float4 v;
    __device__ __forceinline__ void load(const float *p) { v = *reinterpret_cast<const float4 *>(p); }
    __device__ __forceinline__ void store(float *p) const { *reinterpret_cast<float4 *>(p) = v; }
    __device__ __forceinline__ void unpack(float f[4]) const { f[0] = v.x, f[1] = v.y, f[2] = v.z, f[3] = v.w; }
};
template <> struct raw4<rf_bf16> {
    uint2 v;
    __device__ __forceinline__ void load(const rf_bf16 *p) { v = *reinterpret_cast<const uint2 *>(p); }
    __device__ __forceinline__ void store(rf_bf16 *p) const { *reinterpret_cast<uint2 *>(p) = v; }
    __device__ __forceinline__ void unpack(float f[4]) const {
        f[0] = __uint_as_float(v.x << 16), f[1] = __uint_as_float(v.x & 0xffff0000u);
        f[2] = __uint_as_float(v.y << 16), f[3] = __uint_as_float(v.y & 0xffff0000u);
    }
};

/* A thread's part of a row: vector v starts at column (v * ROW_THREADS + lane) * 4. */
template <class T, int ROW_THREADS, int NV> struct row_part {
    raw4<T> raw[NV];
    __device__ __forceinline__ void load(const T *row, int lane, int cols) {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) raw[v].load(row + c);
        }
    }
    __device__ __forceinline__ void store(T *row, int lane, int cols) const {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) raw[v].store(row + c);
        }
    }
};

/* Sums of a and of b over the row's threads, the same bits in each. A warp's part goes to shared, which is used once: one
 * barrier is enough. */
template <int NUM_WARPS>
static __device__ __forceinline__ void row_sums(float &a, float &b, float *shared_a, float *shared_b) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        a += __shfl_xor_sync(0xffffffffu, a, mask);
        b += __shfl_xor_sync(0xffffffffu, b, mask);
    }
    if (NUM_WARPS == 1) return;
    if ((threadIdx.x & 31) == 0) {
        shared_a[threadIdx.x >> 5] = a;
        shared_b[threadIdx.x >> 5] = b;
    }
    __syncthreads(); /* every warp's part is there */
    a = b = 0.0f;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; i++) {
        a += shared_a[i];
        b += shared_b[i];
    }
}
template <int NUM_WARPS> static __device__ __forceinline__ float row_sum(float v, float *shared) {
    v = rf_warp_sum(v);
    if (NUM_WARPS == 1) return v;
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
    __syncthreads(); /* every warp's part is there */
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; i++) sum += shared[i];
    return sum;
}

/* Brings a kernel argument's line into the constant cache. */
static __device__ __forceinline__ void touch(int64_t argument) {
    asm volatile("" ::"l"(argument));
}

static __device__ __forceinline__ uint32_t group_of(const rf_modulation &mod, int64_t row) {
    return mod.rows_per_group > 0 ? (uint32_t)row / (uint32_t)mod.rows_per_group : 0;
}

/* Where terms lie. PLAIN: row i of every term is row i. STATE: term_group or extra is given (and rows is not). LISTED: term_rows
 * or store is given (and rows is). */
enum term_form { PLAIN, STATE, LISTED };

/* X: x. Y: terms. T: modulation tables. norm() is the case of no terms and write_x false. */
template <class X, class Y, class T, int ROW_THREADS, int NV, term_form FORM>
static __global__ void __launch_bounds__(ROW_THREADS == 32 ? 128 : ROW_THREADS)
    residual_norm_kernel(const __grid_constant__ rf_residual_args p, const bool write_x) {
    constexpr int ROWS = ROW_THREADS == 32 ? 4 : 1;
    constexpr bool EARLY = ROW_THREADS < 512; /* registers hold the tables' part beside the row */
    constexpr bool ALL_EARLY = NV <= 2;       /* and everything else's */
    __shared__ alignas(16) float shared[3][ROW_THREADS / 32];
    const int lane = threadIdx.x % ROW_THREADS;
    const int64_t i = (int64_t)blockIdx.x * ROWS + threadIdx.x / ROW_THREADS;
    const int cols = (int)p.cols;
    const bool has_norm = p.norm_y != NULL, modulated = has_norm && (p.norm_shift >= 0 || p.norm_scale >= 0);
    const bool gated = (p.gate >= 0 && p.num_terms > 0) || (FORM == STATE && p.extra && p.extra_gate >= 0);
    uint32_t gate_group = group_of(p.gate_mod, i), norm_group = group_of(p.norm_mod, i);
    touch((int64_t)p.x), touch((int64_t)p.weights), touch((int64_t)p.rows), touch(p.norm_shift);
    touch(gate_group), touch(norm_group);
    rf_wait_for_previous();
    if (i >= p.num_rows) return; /* a whole warp or block */
    int64_t row = i;
    if (p.rows) {
        row = p.rows[i];
        gate_group = group_of(p.gate_mod, row), norm_group = group_of(p.norm_mod, row);
    }
    /* on their way together with the rows; first used when those have been sent for */
    int32_t gate_at = (int32_t)gate_group, norm_at = (int32_t)norm_group;
    if (gated && p.gate_mod.index) gate_at = p.gate_mod.index[gate_group];
    if (modulated && p.norm_mod.index) norm_at = p.norm_mod.index[norm_group];

    X *const x_row = (X *)p.x + row * cols;
    float s[NV][4];
#pragma unroll
    for (int v = 0; v < NV; v++) s[v][0] = s[v][1] = s[v][2] = s[v][3] = 0.0f;
    row_part<X, ROW_THREADS, NV> x_part;
    if (!p.base) x_part.load(x_row, lane, cols);
    row_part<T, ROW_THREADS, NV> shift, scale;
    const T *shift_row = NULL, *scale_row = NULL;
    const auto find_tables = [&]() {
        if (!modulated) return;
        const T *const table = (const T *)p.norm_mod.table + norm_at * p.norm_mod.stride;
        if (p.norm_shift >= 0) shift_row = table + p.norm_shift;
        if (p.norm_scale >= 0) scale_row = table + p.norm_scale;
    };
    const auto gate_table = [&](int64_t column) {
        return (const T *)p.gate_mod.table + gate_at * p.gate_mod.stride + column;
    };
    row_part<float, ROW_THREADS, NV> norm_weight, norm_bias;
    if (ALL_EARLY && has_norm && p.norm_weight) norm_weight.load(p.norm_weight, lane, cols);
    if (ALL_EARLY && has_norm && p.norm_bias) norm_bias.load(p.norm_bias, lane, cols);
    row_part<Y, ROW_THREADS, NV> extra; /* of form STATE */
    row_part<T, ROW_THREADS, NV> extra_gate;

    uint32_t term_row = (uint32_t)i;
    if constexpr (FORM == LISTED)
        if (p.term_rows) term_row = (uint32_t)p.term_rows[i];
    if constexpr (FORM == STATE) {
        const float *weights = p.weights;
        if (p.term_group) {
            const uint32_t group = (uint32_t)i / (uint32_t)p.rows_per_term_group;
            const int32_t state = p.term_group[group];
            term_row += ((uint32_t)state - group) * (uint32_t)p.rows_per_term_group;
            weights += (int64_t)state * p.num_terms;
        } else if (weights && p.weight_row) {
            weights += (int64_t)p.weight_row[i] * p.num_terms;
        }
        row_part<T, ROW_THREADS, NV> gate;
        if (ALL_EARLY && p.extra) {
            extra.load((const Y *)p.extra + (int64_t)term_row * cols, lane, cols);
            if (p.extra_gate >= 0) extra_gate.load(gate_table(p.extra_gate), lane, cols);
        }
        const T *gate_row = NULL;
        if (p.gate >= 0 && p.num_terms > 0) gate_row = gate_table(p.gate);
        find_tables();
        if (ALL_EARLY && gate_row) gate.load(gate_row, lane, cols);
        if (EARLY && scale_row) scale.load(scale_row, lane, cols);
        if (EARLY && shift_row) shift.load(shift_row, lane, cols);
#pragma unroll 1
        for (int t = 0; t < p.num_terms; t++) {
            const float w = weights ? weights[t] : 1.0f;
            if (p.term_group && w == 0.0f) continue; /* the whole row agrees; the term may hold anything */
            row_part<Y, ROW_THREADS, NV> term;
            term.load((const Y *)p.terms[t] + (int64_t)term_row * cols, lane, cols);
#pragma unroll
            for (int v = 0; v < NV; v++) {
                if ((v * ROW_THREADS + lane) * 4 < cols) {
                    float f[4];
                    term.raw[v].unpack(f);
#pragma unroll
                    for (int k = 0; k < 4; k++) s[v][k] = fmaf(w, f[k], s[v][k]);
                }
            }
        }
        if (gate_row) {
            if (!ALL_EARLY) gate.load(gate_row, lane, cols);
#pragma unroll
            for (int v = 0; v < NV; v++) {
                if ((v * ROW_THREADS + lane) * 4 < cols) {
                    float f[4];
                    gate.raw[v].unpack(f);
#pragma unroll
                    for (int k = 0; k < 4; k++) s[v][k] *= f[k];
                }
            }
        }
    } else if (p.num_terms > 0) {
        row_part<T, ROW_THREADS, NV> gate;
        const float *weights = p.weights;
        if (weights && p.weight_row) weights += (int64_t)p.weight_row[i] * p.num_terms;
        row_part<Y, ROW_THREADS, NV> term;
        term.load((const Y *)p.terms[0] + (FORM == LISTED ? (int64_t)term_row : i) * cols, lane, cols);
        const T *gate_row = NULL;
        if (p.gate >= 0) gate_row = gate_table(p.gate);
        find_tables();
        if (EARLY && gate_row) gate.load(gate_row, lane, cols);
        if (EARLY && scale_row) scale.load(scale_row, lane, cols);
        if (EARLY && shift_row) shift.load(shift_row, lane, cols);
        if constexpr (FORM == LISTED)
            if (p.store) term.store((Y *)p.store + (int64_t)p.store_rows[i] * cols, lane, cols);
#pragma unroll 1
        for (int t = 0;;) {
            const float w = weights ? weights[t] : 1.0f;
#pragma unroll
            for (int v = 0; v < NV; v++) {
                if ((v * ROW_THREADS + lane) * 4 < cols) {
                    float f[4];
                    term.raw[v].unpack(f);
#pragma unroll
                    for (int k = 0; k < 4; k++) s[v][k] = fmaf(w, f[k], s[v][k]);
                }
            }
            if (++t >= p.num_terms) break;
            term.load((const Y *)p.terms[t] + (FORM == LISTED ? (int64_t)term_row : i) * cols, lane, cols);
        }
        if (gate_row) {
            if (!EARLY) gate.load(gate_row, lane, cols);
#pragma unroll
            for (int v = 0; v < NV; v++) {
                if ((v * ROW_THREADS + lane) * 4 < cols) {
                    float f[4];
                    gate.raw[v].unpack(f);
#pragma unroll
                    for (int k = 0; k < 4; k++) s[v][k] *= f[k];
                }
            }
        }
    } else {
        find_tables();
        if (EARLY && scale_row) scale.load(scale_row, lane, cols);
        if (EARLY && shift_row) shift.load(shift_row, lane, cols);
    }

    /* s = base + sum; columns past the end stay 0 */
    if (!p.base) {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            if ((v * ROW_THREADS + lane) * 4 < cols) {
                float f[4];
                x_part.raw[v].unpack(f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] += f[k];
            }
        }
    } else {
        const int64_t base_row = row % p.base_period * cols;
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) {
                float f[4];
                if (p.base_dtype == RF_DTYPE_F32)
                    rf_load4((const float *)p.base + base_row + c, f);
                else
                    rf_load4((const rf_bf16 *)p.base + base_row + c, f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] += f[k];
            }
        }
    }
    if constexpr (FORM == STATE) {
        if (p.extra) {
            const Y *const extra_row = (const Y *)p.extra + (int64_t)term_row * cols;
            const bool extra_gated = p.extra_gate >= 0;
            const T *gate_row = NULL;
            if (!ALL_EARLY && extra_gated) gate_row = gate_table(p.extra_gate);
#pragma unroll
            for (int v = 0; v < NV; v++) {
                const int c = (v * ROW_THREADS + lane) * 4;
                if (c < cols) {
                    float f[4], g[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                    if (!ALL_EARLY) {
                        extra.raw[v].load(extra_row + c);
                        if (extra_gated) extra_gate.raw[v].load(gate_row + c);
                    }
                    extra.raw[v].unpack(f);
                    if (extra_gated) extra_gate.raw[v].unpack(g);
#pragma unroll
                    for (int k = 0; k < 4; k++) s[v][k] = __fadd_rn(s[v][k], __fmul_rn(g[k], f[k]));
                }
            }
        }
    }
    if (write_x) {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) rf_store4(x_row + c, s[v]);
        }
    }
    if (!has_norm) return;

    const float inv_cols = 1.0f / (float)cols;
    float mean = 0.0f;
    if (p.norm_kind == RF_NORM_LAYER) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < NV; v++) sum += (s[v][0] + s[v][1]) + (s[v][2] + s[v][3]);
        mean = row_sum<ROW_THREADS / 32>(sum, shared[0]) * inv_cols;
    }
    float sum_d = 0.0f, sum_d2 = 0.0f;
#pragma unroll
    for (int v = 0; v < NV; v++) {
        if ((v * ROW_THREADS + lane) * 4 < cols) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                s[v][k] -= mean;
                sum_d += s[v][k];
                sum_d2 = fmaf(s[v][k], s[v][k], sum_d2);
            }
        }
    }
    row_sums<ROW_THREADS / 32>(sum_d2, sum_d, shared[1], shared[2]);
    const float rest = p.norm_kind == RF_NORM_LAYER ? sum_d * inv_cols : 0.0f; /* what rounding left of the mean */
    const float var = fmaxf(sum_d2 * inv_cols - rest * rest, 0.0f);
    const float inv_std = 1.0f / sqrtf(var + p.norm_eps);

#pragma unroll
    for (int v = 0; v < NV; v++)
#pragma unroll
        for (int k = 0; k < 4; k++) s[v][k] = (s[v][k] - rest) * inv_std;
    if (p.norm_weight) {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) {
                float f[4];
                if (!ALL_EARLY) norm_weight.raw[v].load(p.norm_weight + c);
                norm_weight.raw[v].unpack(f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] *= f[k];
            }
        }
    }
    if (p.norm_bias) {
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int c = (v * ROW_THREADS + lane) * 4;
            if (c < cols) {
                float f[4];
                if (!ALL_EARLY) norm_bias.raw[v].load(p.norm_bias + c);
                norm_bias.raw[v].unpack(f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] += f[k];
            }
        }
    }
#pragma unroll
    for (int v = 0; v < NV; v++) {
        const int c = (v * ROW_THREADS + lane) * 4;
        if (c < cols) {
            float f[4];
            if (scale_row) {
                if (!EARLY) scale.raw[v].load(scale_row + c);
                scale.raw[v].unpack(f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] *= 1.0f + f[k];
            }
            if (shift_row) {
                if (!EARLY) shift.raw[v].load(shift_row + c);
                shift.raw[v].unpack(f);
#pragma unroll
                for (int k = 0; k < 4; k++) s[v][k] += f[k];
            }
            if (p.norm_y_dtype == RF_DTYPE_F32)
                rf_store4((float *)p.norm_y + i * cols + c, s[v]);
            else
                rf_store4((rf_bf16 *)p.norm_y + i * cols + c, s[v]);
        }
    }
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

template <class X, class Y, class T, term_form FORM>
static rf_status launch(rf_stream *stream, const char *label, const rf_residual_args &p, bool write_x, rf_error *err) {
    const int64_t cols = p.cols;
    const dim3 rows((unsigned)p.num_rows);
    const int64_t num_sms = rf_backend_num_sms(rf_stream_backend(stream));
    /* few rows would leave most of the card idle: a block per row, short chains of loads */
    if (cols > 512 && cols <= 2048 && p.num_rows <= 2 * num_sms)
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 256, 2, FORM>, rows, dim3(256), 0, p,
                               write_x);
    if (cols > 256 && cols <= 1536 && p.num_rows <= 8 * num_sms)
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 128, 3, FORM>, rows, dim3(128), 0, p,
                               write_x);
    if (cols <= 512) /* a warp per row, four rows a block */
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 32, 4, FORM>,
                               dim3((unsigned)rf_ceil_div(p.num_rows, 4)), dim3(128), 0, p, write_x);
    if (cols <= 1152)
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 32, 9, FORM>,
                               dim3((unsigned)rf_ceil_div(p.num_rows, 4)), dim3(128), 0, p, write_x);
    if (cols <= 2048) /* a block per row */
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 128, 4, FORM>, rows, dim3(128), 0, p,
                               write_x);
    if (cols <= 4096)
        return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 256, 4, FORM>, rows, dim3(256), 0, p,
                               write_x);
    return rf_launch_early(stream, label, err, residual_norm_kernel<X, Y, T, 512, 8, FORM>, rows, dim3(512), 0, p,
                           write_x);
}

template <class X, class Y, term_form FORM>
static rf_status launch_form(rf_stream *stream, const char *label, const rf_residual_args &p, bool write_x,
                             rf_dtype table_dtype, rf_error *err) {
    if (table_dtype == RF_DTYPE_F32) return launch<X, Y, float, FORM>(stream, label, p, write_x, err);
    return launch<X, Y, rf_bf16, FORM>(stream, label, p, write_x, err);
}

template <class X, class Y>
static rf_status launch_table(rf_stream *stream, const char *label, const rf_residual_args &p, bool write_x,
                              rf_dtype table_dtype, rf_error *err) {
    if (p.term_group || p.extra) return launch_form<X, Y, STATE>(stream, label, p, write_x, table_dtype, err);
    if (p.term_rows || p.store) return launch_form<X, Y, LISTED>(stream, label, p, write_x, table_dtype, err);
    return launch_form<X, Y, PLAIN>(stream, label, p, write_x, table_dtype, err);
}

static rf_status launch_any(rf_stream *stream, const char *label, const rf_residual_args &p, bool write_x,
                            rf_dtype table_dtype, rf_error *err) {
    if (p.x_dtype == RF_DTYPE_F32) {
        if (p.y_dtype == RF_DTYPE_F32) return launch_table<float, float>(stream, label, p, write_x, table_dtype, err);
        return launch_table<float, rf_bf16>(stream, label, p, write_x, table_dtype, err);
    }
    if (p.y_dtype == RF_DTYPE_F32) return launch_table<rf_bf16, float>(stream, label, p, write_x, table_dtype, err);
    return launch_table<rf_bf16, rf_bf16>(stream, label, p, write_x, table_dtype, err);
}

static rf_status check_cols(const char *op, int64_t cols, rf_error *err) {
    if (cols % 4 == 0) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: cols is %lld, must be a multiple of 4 on CUDA", op, (long long)cols);
}

static rf_status check_offsets(const char *op, const rf_modulation *mod, int64_t a, int64_t b, rf_error *err) {
    if (a < 0 && b < 0) return RF_OK;
    if ((a < 0 || a % 4 == 0) && (b < 0 || b % 4 == 0) && mod->stride % 4 == 0) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: modulation offsets and stride must be multiples of 4 on CUDA", op);
}

/* Vectors of four: 16 bytes of f32, 8 of bf16. */
static rf_status check_aligned(const char *op, const char *name, const void *p, rf_dtype dtype, rf_error *err) {
    const size_t bytes = dtype == RF_DTYPE_F32 ? 16 : 8;
    if (rf_is_aligned(p, bytes)) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s must be aligned to %zu bytes on CUDA", op, name, bytes);
}

extern "C" rf_status rf_norm_cuda(rf_stream *stream, const rf_norm_args *args, rf_error *err) {
    rf_status status = stream ? rf_norm_check_run(args, err) : rf_norm_check(args, err);
    if (status == RF_OK) status = check_cols("norm", args->cols, err);
    if (status == RF_OK) status = check_offsets("norm", &args->mod, args->shift, args->scale, err);
    if (status != RF_OK || !stream || args->num_rows == 0) return status;
    if (status == RF_OK) status = check_aligned("norm", "x", args->x, args->x_dtype, err);
    if (status == RF_OK) status = check_aligned("norm", "y", args->y, args->y_dtype, err);
    if (status == RF_OK) status = check_aligned("norm", "mod.table", args->mod.table, args->mod.dtype, err);
    if (status == RF_OK) status = check_aligned("norm", "weight", args->weight, RF_DTYPE_F32, err);
    if (status == RF_OK) status = check_aligned("norm", "bias", args->bias, RF_DTYPE_F32, err);
    if (status != RF_OK) return status;

    rf_residual_args p = {};
    p.x = (void *)args->x;
    p.x_dtype = p.y_dtype = args->x_dtype; /* no terms: y_dtype only picks an instance */
    p.rows = args->rows;
    p.num_rows = args->num_rows;
    p.cols = args->cols;
    p.gate = -1;
    p.norm_y = args->y;
    p.norm_y_dtype = args->y_dtype;
    p.norm_kind = args->kind;
    p.norm_eps = args->eps;
    p.norm_weight = args->weight;
    p.norm_bias = args->bias;
    p.norm_mod = args->mod;
    p.norm_shift = args->shift;
    p.norm_scale = args->scale;
    return launch_any(stream, "norm", p, false, args->mod.dtype, err);
}

extern "C" rf_status rf_residual_cuda(rf_stream *stream, const rf_residual_args *args, rf_error *err) {
    rf_status status = stream ? rf_residual_check_run(args, err) : rf_residual_check(args, err);
    if (status == RF_OK) status = check_cols("residual", args->cols, err);
    if (status == RF_OK)
        status = check_offsets("residual", &args->gate_mod, args->gate, args->extra ? args->extra_gate : -1, err);
    const bool gated = args && ((args->gate >= 0 && args->num_terms > 0) || (args->extra && args->extra_gate >= 0));
    const bool modulated = args && args->norm_y && (args->norm_shift >= 0 || args->norm_scale >= 0);
    if (status == RF_OK && modulated)
        status = check_offsets("residual", &args->norm_mod, args->norm_shift, args->norm_scale, err);
    if (status == RF_OK && gated && modulated && args->gate_mod.dtype != args->norm_mod.dtype)
        status = rf_fail(err, RF_ERR_DTYPE, "residual: gate_mod is %s and norm_mod %s, CUDA wants one dtype",
                         rf_dtype_name(args->gate_mod.dtype), rf_dtype_name(args->norm_mod.dtype));
    if (status != RF_OK || !stream || args->num_rows == 0) return status;
    status = check_aligned("residual", "x", args->x, args->x_dtype, err);
    if (status == RF_OK) status = check_aligned("residual", "base", args->base, args->base_dtype, err);
    for (int t = 0; t < args->num_terms && status == RF_OK; t++)
        status = check_aligned("residual", "a term", args->terms[t], args->y_dtype, err);
    if (status == RF_OK) status = check_aligned("residual", "extra", args->extra, args->y_dtype, err);
    if (status == RF_OK) status = check_aligned("residual", "store", args->store, args->y_dtype, err);
    if (status == RF_OK && gated)
        status = check_aligned("residual", "gate_mod.table", args->gate_mod.table, args->gate_mod.dtype, err);
    if (status == RF_OK && args->norm_y) {
        status = check_aligned("residual", "norm_y", args->norm_y, args->norm_y_dtype, err);
        if (status == RF_OK && modulated)
            status = check_aligned("residual", "norm_mod.table", args->norm_mod.table, args->norm_mod.dtype, err);
        if (status == RF_OK) status = check_aligned("residual", "norm_weight", args->norm_weight, RF_DTYPE_F32, err);
        if (status == RF_OK) status = check_aligned("residual", "norm_bias", args->norm_bias, RF_DTYPE_F32, err);
    }
    if (status != RF_OK) return status;

    const bool write_x = args->base != NULL || args->num_terms > 0 || args->extra != NULL;
    if (!write_x && !args->norm_y) return RF_OK; /* nothing changes */
    const rf_dtype table = gated ? args->gate_mod.dtype : modulated ? args->norm_mod.dtype : RF_DTYPE_F32;
    return launch_any(stream, args->norm_y ? "residual_norm" : "residual", *args, write_x, table, err);
}
