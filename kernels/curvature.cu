/* kernels/curvature.cu - curvature of the last three outputs: classes of rows and the drift of a prediction.
 * Maths    v0 = (y0 - y1) / gap0, v1 = (y1 - y2) / gap1, a = (v0 - v1) / gap0; A = |v0|^2, B = <v0, v1>, C = |v1|^2;
 *          kappa = |a| / (A + eps + floor * mean A), 0 where |a| = 0; a NaN counts as +inf. Quantiles of kappa by radix
 *          select; drift(k) = mean of kappa sqrt(a_k^2 A + 2 a_k b_k B + b_k^2 C) over chaotic rows.
 * Launch   rows: 4 to 32 lanes per row, one pass over the three snapshots; sets: a block of 512 threads per set, whose
 *          kappas stay in shared memory up to 32768 rows and in the workspace above.
 * Order    thread t of a set's block has rows t, t + 512, ...; sums by fixed trees: the same bits on every run.
 * Cost     3 * rows * cols floats, then 4 floats a row a few times through L2; two launches.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table and sorting. */
#include <cuda_runtime.h>

#include "kernels/cache_checks.h"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/select.cuh"

static constexpr int ROW_THREADS = 128, SET_THREADS = 512, MAX_STEPS = 16;
static_assert(SET_THREADS / 32 >= MAX_STEPS, "a warp per step");
static constexpr int MAX_STAGED = 32768; /* kappas in shared memory */

static __device__ __forceinline__ int64_t group_of(const rf_curvature_args &p, int packed) {
    return p.index ? p.index[packed] : packed;
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

/* The workspace is four planes [num_sets][groups_per_set][rows]: |a| (later kappa), A, B, C. */
template <int LANES, int VEC>
static __global__ void __launch_bounds__(ROW_THREADS) rows_kernel(const __grid_constant__ rf_curvature_args p) {
    const int rows = (int)p.rows, num_sets = (int)p.num_sets;
    const uint32_t total = (uint32_t)(num_sets * p.groups_per_set * rows);
    const uint32_t i = blockIdx.x * (ROW_THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    rf_wait_for_previous();
    const int packed = (int)(min(i, total - 1) / (uint32_t)rows), r = (int)(min(i, total - 1) % (uint32_t)rows);
    const int64_t g = group_of(p, packed);
    const float gap0 = p.gaps[g * 2], gap1 = p.gaps[g * 2 + 1];
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < total && gap0 > 0.0f) {
        const float *const at = p.ring + (g * p.group_rows + r) * p.ld;
        const float *const y0 = at + p.slots[g * 3] * p.slot_stride;
        const float *const y1 = at + p.slots[g * 3 + 1] * p.slot_stride;
        const float *const y2 = at + p.slots[g * 3 + 2] * p.slot_stride;
        for (int c = lane * VEC; c < (int)p.cols; c += LANES * VEC) {
            float f[3][VEC];
            if constexpr (VEC == 4) {
                rf_load4(y0 + c, f[0]);
                rf_load4(y1 + c, f[1]);
                rf_load4(y2 + c, f[2]);
            } else {
                f[0][0] = y0[c], f[1][0] = y1[c], f[2][0] = y2[c];
            }
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                const float v0 = (f[0][k] - f[1][k]) / gap0, v1 = (f[1][k] - f[2][k]) / gap1;
                const float a = (v0 - v1) / gap0;
                sums[0] = fmaf(a, a, sums[0]);
                sums[1] = fmaf(v0, v0, sums[1]);
                sums[2] = fmaf(v0, v1, sums[2]);
                sums[3] = fmaf(v1, v1, sums[3]);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], step);
    if (lane > 0 || i >= total) return;
    const int member = packed / num_sets, set = packed - member * num_sets;
    float *const out = p.workspace + (int64_t)(set * p.groups_per_set + member) * rows + r;
    out[0] = sqrtf(sums[0]);
#pragma unroll
    for (int s = 1; s < 4; s++) out[(int64_t)s * total] = sums[s];
}

/* --- sets --------------------------------------------------------------------------------------------------------- */

template <bool STAGED>
static __global__ void __launch_bounds__(SET_THREADS) sets_kernel(const __grid_constant__ rf_curvature_args p) {
    extern __shared__ float staged[];
    __shared__ rf_selection<2> selection;
    __shared__ float parts[MAX_STEPS][SET_THREADS / 32];
    __shared__ uint32_t next[2];
    __shared__ int num_chaotic;
    const int rows = (int)p.rows, num_sets = (int)p.num_sets, set = blockIdx.x;
    const int num = p.groups_per_set * rows;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    rf_wait_for_previous();
    const int64_t group_a = group_of(p, set), group_b = p.groups_per_set == 2 ? group_of(p, num_sets + set) : group_a;
    auto row_at = [&](int i) -> int64_t {
        return i < rows ? group_a * p.group_rows + i : group_b * p.group_rows + (i - rows);
    };
    auto set_class = [&](int i, uint8_t value) {
        uint8_t *const out = p.row_class + row_at(i) * p.class_ld;
        for (int j = 0; j < (int)p.num_classes_per_row; j++) out[j] = value;
    };
    if (!(p.gaps[group_a * 2] > 0.0f && p.gaps[group_b * 2] > 0.0f)) { /* the whole block */
        for (int i = threadIdx.x; i < num; i += SET_THREADS) {
            set_class(i, 2);
            p.kappa[row_at(i)] = 0.0f;
        }
        if ((int)threadIdx.x < p.horizon)
            p.drift[group_a * p.horizon + threadIdx.x] = p.drift[group_b * p.horizon + threadIdx.x] = 0.0f;
        return;
    }

    const int64_t plane = (int64_t)num_sets * num;
    float *const norms = p.workspace + (int64_t)set * num;
    const float *const dots = norms + plane;
    float guard = p.eps;
    if (p.floor > 0.0f) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < num; i += SET_THREADS) sum += dots[i];
        guard += p.floor * (rf_block_sum<SET_THREADS / 32>(sum, parts[0]) / (float)num);
    }
    float *const kappas = STAGED ? staged : norms; /* a thread meets its own rows only */
    for (int i = threadIdx.x; i < num; i += SET_THREADS) {
        const float norm = norms[i], ratio = norm == 0.0f ? 0.0f : norm / (dots[i] + guard);
        kappas[i] = isnan(ratio) ? __int_as_float(0x7f800000) : ratio;
        p.kappa[row_at(i)] = kappas[i];
    }

    /* Quantiles: the value of the rank below, then the smallest one above it. */
    const double at[2] = {(double)(p.p_stable * (float)(num - 1)), (double)(p.p_chaotic * (float)(num - 1))};
    if (threadIdx.x == 0) {
        selection.rank[0] = (uint32_t)at[0], selection.rank[1] = (uint32_t)at[1];
        next[0] = next[1] = 0xffffffffu;
        num_chaotic = 0;
    }
    rf_select(selection, num, [&](int i) { return kappas[i]; });
    uint32_t above[2] = {0xffffffffu, 0xffffffffu};
    for (int i = threadIdx.x; i < num; i += SET_THREADS) {
        const uint32_t key = rf_float_key(kappas[i]);
#pragma unroll
        for (int q = 0; q < 2; q++)
            if (key > selection.key[q]) above[q] = min(above[q], key);
    }
#pragma unroll
    for (int q = 0; q < 2; q++) {
        above[q] = __reduce_min_sync(0xffffffffu, above[q]);
        if (lane == 0) atomicMin(&next[q], above[q]);
    }
    __syncthreads(); /* next is there */
    double limit[2];
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int low = (int)at[q];
        const double rest = at[q] - (double)low, v = (double)rf_key_float(selection.key[q]);
        const bool last = low + 1 >= num || selection.rank[q] + 1 < selection.equal[q];
        limit[q] = rest <= 0.0 || last ? v : v + rest * ((double)rf_key_float(next[q]) - v);
    }

    /* Classes and drift. */
    float sums[MAX_STEPS];
#pragma unroll
    for (int k = 0; k < MAX_STEPS; k++) sums[k] = 0.0f;
    int count = 0;
    for (int i = threadIdx.x; i < num; i += SET_THREADS) {
        const float kappa = kappas[i];
        const bool chaotic = (double)kappa >= limit[1];
        set_class(i, chaotic ? 2 : (double)kappa < limit[0] ? 0 : 1);
        if (!chaotic) continue;
        count++;
        const float a = dots[i], b = dots[plane + i], c = dots[2 * plane + i];
#pragma unroll
        for (int k = 0; k < MAX_STEPS; k++) {
            if (k >= p.horizon) break;
            const float x = p.step_a[k], y = p.step_b[k];
            const float term = kappa * sqrtf(fmaxf(x * x * a + 2.0f * x * y * b + y * y * c, 0.0f));
            sums[k] += isnan(term) ? __int_as_float(0x7f800000) : term;
        }
    }
    count = __reduce_add_sync(0xffffffffu, count);
    if (lane == 0) atomicAdd(&num_chaotic, count);
#pragma unroll
    for (int k = 0; k < MAX_STEPS; k++) {
        if (k >= p.horizon) break;
        const float sum = rf_warp_sum(sums[k]);
        if (lane == 0) parts[k][warp] = sum;
    }
    __syncthreads(); /* every warp's sums are there */
    if (warp >= p.horizon) return;
    const float sum = rf_warp_sum(lane < SET_THREADS / 32 ? parts[warp][lane] : 0.0f);
    const int over = p.mean_over_all ? num : num_chaotic;
    if (lane == 0)
        p.drift[group_a * p.horizon + warp] = p.drift[group_b * p.horizon + warp] = over > 0 ? sum / (float)over : 0.0f;
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

template <int VEC>
static rf_status launch_rows(rf_stream *stream, const rf_curvature_args &p, int64_t total, rf_error *err) {
    const int64_t lanes = rf_ceil_div(p.cols, VEC);
    auto kernel = lanes <= 4    ? rows_kernel<4, VEC>
                  : lanes <= 8  ? rows_kernel<8, VEC>
                  : lanes <= 16 ? rows_kernel<16, VEC>
                                : rows_kernel<32, VEC>;
    const int per_block = ROW_THREADS / (lanes <= 4 ? 4 : lanes <= 8 ? 8 : lanes <= 16 ? 16 : 32);
    return rf_launch_early(stream, "curvature", err, kernel, dim3((unsigned)rf_ceil_div(total, per_block)),
                           dim3(ROW_THREADS), 0, p);
}

extern "C" rf_status rf_curvature_cuda(rf_stream *stream, const rf_curvature_args *args, rf_error *err) {
    rf_status status = stream ? rf_curvature_check_run(args, err) : rf_curvature_check(args, err);
    if (status != RF_OK || !stream || args->num_sets == 0 || args->rows == 0) return status;
    rf_curvature_args p = *args;
    if (p.group_rows == 0) p.group_rows = p.rows;
    if (p.class_ld == 0) p.class_ld = 1;
    if (p.num_classes_per_row == 0) p.num_classes_per_row = 1;
    const int64_t num = p.groups_per_set * p.rows, total = p.num_sets * num;
    const bool vectors = p.cols % 4 == 0 && p.ld % 4 == 0 && p.slot_stride % 4 == 0 && rf_is_aligned(p.ring, 16);
    status = vectors ? launch_rows<4>(stream, p, total, err) : launch_rows<1>(stream, p, total, err);
    if (status != RF_OK) return status;

    static std::atomic<uint64_t> done;
    const dim3 grid((unsigned)p.num_sets), block(SET_THREADS);
    if (num > MAX_STAGED) return rf_launch_early(stream, "curvature_sets", err, sets_kernel<false>, grid, block, 0, p);
    const cudaError_t code = rf_allow_shared((const void *)sets_kernel<true>, MAX_STAGED * sizeof(float), &done);
    if (code != cudaSuccess) return rf_cuda_fail(err, "curvature_sets", code);
    return rf_launch_early(stream, "curvature_sets", err, sets_kernel<true>, grid, block, (size_t)num * sizeof(float),
                           p);
}
