/* kernels/kv_evict.cu - rows of an autoregressive cache that move: copies, the new token of a step, and what a rule that lives on the
 * device drops (kernels/kv.h); kv.cu has what they are chosen by.
 * Launch   copy, append: 8, 16 or 32 lanes a row, 8 elements each, in vectors of 16 bytes where sizes, strides and bases allow.
 *          evict: a cluster of 8 blocks per unit (sequence, key head), a block per eighth of the slots:
 *          1. p of its slots: a warp per 16 slots against the heads of the group by m16n8k16 (bf16, head_dim 64 and 128; else a
 *             warp for a score); score updated; the lowest of the unprotected slots as (key of the score, LAST_SLOT - slot) in 64 bits
 *          2. the blocks' lowest meet through distributed shared memory; the least is the victim
 *          3. each block moves its slots behind the victim up by one. The slot behind its last one belongs to the next block:
 *             its row and position are read before the cluster's barrier, its score lies in that block's shared memory.
 *          No block writes rows or positions before all have read theirs.
 *          over_heads, many slots, and cards without clusters: p comes from a kernel of its own through the workspace,
 *          [units][max_len] sums over the group; step 1 then adds those of all key heads of the sequence in their order.
 *          Without clusters one block does the rest of a unit.
 * Order    fixed, no atomics. Arch  sm_80 and later; clusters from sm_90 on.  Checked  tests/kernels/test_kv.c. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/kv_checks.h"
#include "kernels/kv_cuda.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/select.cuh"

static constexpr int ROW_THREADS = 128;
static constexpr int CLUSTER = 8, SLOTS = 16; /* slots of a warp */
/* 2048 slots and a new one are 257 a block: 17 warps' worth. */
static constexpr int EVICT_WARPS = 20, EVICT_THREADS = EVICT_WARPS * 32, MEASURE_WARPS = 4;
static constexpr int64_t MAX_FUSED = 16384; /* slots; above, 64 blocks do not keep the memory busy */
static constexpr int64_t MAX_UNITS = 65535;
typedef unsigned long long ranked; /* order of the score above, LAST_SLOT - slot below */
static constexpr ranked NOBODY = ~0ull;
static constexpr uint32_t LAST_SLOT = 0x7fffffffu; /* less the slot: of equals the highest is the least */

/* --- copies ------------------------------------------------------------------------------------------------------------- */

/* Grid (rows, key heads). TURN: the element that turns with a lane's own lies in another lane and comes through shared memory,
 * inside one warp. */
template <class T, bool WIDE, bool TURN>
static __global__ void __launch_bounds__(ROW_THREADS)
    copy_kernel(const __grid_constant__ rf_kv_copy_args p, int lanes) {
    __shared__ __align__(16) float exchange[TURN ? ROW_THREADS * 8 : 4];
    const int lane = threadIdx.x & (lanes - 1), dim = p.head_dim, h = blockIdx.y, c = lane * 8, num = min(8, dim - c);
    const int64_t i = (int64_t)blockIdx.x * (ROW_THREADS / lanes) + threadIdx.x / lanes, at = h * p.list_stride + i;
    rf_wait_for_previous();
    const bool listed = i < (p.counts ? min((int64_t)p.counts[h], p.num) : p.num);
    int64_t to = -1;
    float k[8] = {}, v[8] = {};
    if (listed) to = p.to ? p.to[at] : i;
    if (to >= 0 && num > 0) {
        const int64_t from = rf_kv_offset(p.source, h, p.from ? p.from[at] : (int)i) + c;
        rf_kv_load8<WIDE>((const T *)p.source.k + from, num, k);
        rf_kv_load8<WIDE>((const T *)p.source.v + from, num, v);
    }
    if constexpr (TURN) {
        float *const own = exchange + (threadIdx.x - lane) * 8; /* this row's elements */
        rf_store4(own + c, k);
        rf_store4(own + c + 4, k + 4);
        __syncwarp(); /* the other elements of the row are there */
        const int half = p.pairs;
        if (to >= 0 && c < 2 * half) {
            const int turn = p.turn[at];
            const float *const table = p.table + (int64_t)abs(turn) * half * 2;
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int own_at = c + e, pair = own_at < half ? own_at : own_at - half;
                if (own_at >= 2 * half) continue;
                const float sine = turn < 0 ? -table[2 * pair + 1] : table[2 * pair + 1];
                const float turned = own[own_at < half ? own_at + half : pair] * sine;
                k[e] = fmaf(k[e], table[2 * pair], own_at < half ? -turned : turned);
            }
        }
    }
    if (to < 0 || num <= 0) return;
    const int64_t out = (p.to ? to * p.out_row_stride : h * p.out_head_stride + to * dim) + c;
    rf_kv_store8<WIDE>((T *)p.k_out + out, num, k);
    rf_kv_store8<WIDE>((T *)p.v_out + out, num, v);
}

template <class T> static rf_status launch_copy(rf_stream *stream, const rf_kv_copy_args *a, rf_error *err) {
    const int lanes = rf_kv_row_lanes(a->head_dim);
    const bool wide = rf_kv_source_is_wide(a->source, a->head_dim) && rf_is_aligned(a->k_out, 16) &&
                      rf_is_aligned(a->v_out, 16) && (a->to ? a->out_row_stride : a->out_head_stride) % 8 == 0;
    auto kernel = a->turn ? (wide ? copy_kernel<T, true, true> : copy_kernel<T, false, true>)
                          : (wide ? copy_kernel<T, true, false> : copy_kernel<T, false, false>);
    return rf_launch_early(stream, "kv_copy", err, kernel,
                           dim3((unsigned)rf_ceil_div(a->num, ROW_THREADS / lanes), (unsigned)a->num_kv_heads),
                           dim3(ROW_THREADS), 0, *a, lanes);
}

extern "C" rf_status rf_kv_copy_cuda(rf_stream *stream, const rf_kv_copy_args *a, rf_error *err) {
    RF_TRY(rf_kv_copy_check(a, err));
    RF_TRY(rf_kv_check_row("kv_copy", a->head_dim, err));
    if (!stream || a->num == 0) return RF_OK;
    const void *const needed[] = {a->source.k, a->source.v, a->k_out, a->v_out, a->turn ? a->table : a->k_out};
    RF_TRY(rf_text_pointers("kv_copy", needed, 5, err));
    return a->dtype == RF_DTYPE_F32 ? launch_copy<float>(stream, a, err) : launch_copy<rf_bf16>(stream, a, err);
}

/* --- a new token -------------------------------------------------------------------------------------------------------- */

template <class T, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    append_kernel(const __grid_constant__ rf_kv_append_args p, int lanes) {
    const int lane = threadIdx.x & (lanes - 1), c = lane * 8, num = min(8, p.head_dim - c);
    const int64_t h = (int64_t)blockIdx.x * (ROW_THREADS / lanes) + threadIdx.x / lanes;
    rf_wait_for_previous();
    if (h >= p.heads) return;
    const int32_t row = p.new_rows[h];
    if (row < 0) return;
    if (num > 0 && p.k) {
        float k[8], v[8];
        const int64_t from = h * p.head_dim + c, to = (int64_t)row * p.head_dim + c;
        rf_kv_load8<WIDE>((const T *)p.k + from, num, k);
        rf_kv_load8<WIDE>((const T *)p.v + from, num, v);
        rf_kv_store8<WIDE>((T *)p.k_pool + to, num, k);
        rf_kv_store8<WIDE>((T *)p.v_pool + to, num, v);
    }
    if (lane != 0 || !p.lens) return;
    const int32_t len = p.lens[h];
    p.rows[h * p.rows_stride + len] = row;
    p.lens[h] = len + 1;
}

template <class T> static rf_status launch_append(rf_stream *stream, const rf_kv_append_args *a, rf_error *err) {
    const int lanes = rf_kv_row_lanes(a->head_dim);
    const bool wide = a->head_dim % 8 == 0 && rf_is_aligned(a->k, 16) && rf_is_aligned(a->v, 16) &&
                      rf_is_aligned(a->k_pool, 16) && rf_is_aligned(a->v_pool, 16);
    return rf_launch_early(stream, "kv_append", err, wide ? append_kernel<T, true> : append_kernel<T, false>,
                           dim3((unsigned)rf_ceil_div(a->heads, ROW_THREADS / lanes)), dim3(ROW_THREADS), 0, *a, lanes);
}

extern "C" rf_status rf_kv_append_cuda(rf_stream *stream, const rf_kv_append_args *a, rf_error *err) {
    RF_TRY(rf_kv_append_check(a, err));
    RF_TRY(rf_kv_check_row("kv_append", a->head_dim, err));
    if (!stream || a->heads == 0) return RF_OK;
    RF_TRY(rf_kv_append_pointers(a, err));
    return a->dtype == RF_DTYPE_F32 ? launch_append<float>(stream, a, err) : launch_append<rf_bf16>(stream, a, err);
}

/* --- evict: probabilities of slots --------------------------------------------------------------------------------------- */

/* Sum over the group of p of slot first + l, in lane l < SLOTS of the warp. row: of the lane's slot, l < SLOTS; negative if there
 * is none. The whole warp calls. */
template <class T, int HD>
static __device__ __forceinline__ float group_mass(const rf_kv_evict_args &p, int unit, int row) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, group = p.num_q_heads / p.num_kv_heads;
    const int sequence = unit / p.num_kv_heads, first_head = (unit - sequence * p.num_kv_heads) * group;
    const int64_t head = (int64_t)sequence * p.num_q_heads + first_head; /* of q and lse */
    const float *const lse = p.lse + head;
    if constexpr (HD > 0) {
        const int row_low = __shfl_sync(RF_ALL_LANES, row, g), row_high = __shfl_sync(RF_ALL_LANES, row, g + 8);
        const rf_bf16 *const low = (const rf_bf16 *)p.k + (int64_t)max(row_low, 0) * HD + 8 * t;
        const rf_bf16 *const high = (const rf_bf16 *)p.k + (int64_t)max(row_high, 0) * HD + 8 * t;
        uint4 k_low[HD / 32], k_high[HD / 32];
#pragma unroll
        for (int c = 0; c < HD / 32; c++) {
            k_low[c] = rf_kv_load16(low + 32 * c, row_low >= 0);
            k_high[c] = rf_kv_load16(high + 32 * c, row_high >= 0);
        }
        const float c2 = p.scale * RF_LOG2_E;
        float sum_low = 0.0f, sum_high = 0.0f;
#pragma unroll 1
        for (int n = 0; n < group; n += 8) {
            const rf_bf16 *const q = (const rf_bf16 *)p.q + (head + n + g) * HD + 8 * t;
            uint4 b[HD / 32];
            float l[2], s[4] = {};
#pragma unroll
            for (int c = 0; c < HD / 32; c++) b[c] = rf_kv_load16(q + 32 * c, n + g < group);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at = n + 2 * t + e;
                const float v = at < group ? lse[at] : -INFINITY;
                l[e] = v == -INFINITY ? INFINITY : v * RF_LOG2_E; /* +inf adds nothing */
            }
#pragma unroll
            for (int c = 0; c < HD / 32; c++) rf_kv_mma32(s, k_low[c], k_high[c], b[c]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                sum_low += exp2f(fmaf(s[e], c2, -l[e]));
                sum_high += exp2f(fmaf(s[2 + e], c2, -l[e]));
            }
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) { /* the four lanes of a slot */
            sum_low += __shfl_xor_sync(RF_ALL_LANES, sum_low, step);
            sum_high += __shfl_xor_sync(RF_ALL_LANES, sum_high, step);
        }
        sum_low = __shfl_sync(RF_ALL_LANES, sum_low, (lane & 7) * 4);
        sum_high = __shfl_sync(RF_ALL_LANES, sum_high, (lane & 7) * 4);
        return lane & 8 ? sum_high : sum_low;
    } else {
        float own = 0.0f;
        for (int i = 0; i < SLOTS; i++) {
            const int from = __shfl_sync(RF_ALL_LANES, row, i);
            if (from < 0) continue;
            const T *const k = (const T *)p.k + (int64_t)from * p.head_dim;
            float sum = 0.0f;
            for (int n = 0; n < group; n++) {
                if (lse[n] == -INFINITY) continue;
                sum += expf(p.scale * rf_kv_dot((const T *)p.q + (head + n) * p.head_dim, k, p.head_dim) - lse[n]);
            }
            if (lane == i) own = sum;
        }
        return own;
    }
}

static __device__ __forceinline__ int unit_len(const rf_kv_evict_args &p, int unit) {
    return max(0, min(p.lens[unit], (int)p.max_len));
}

/* Grid (units, tiles of MEASURE_WARPS x SLOTS slots). mass [units][max_len]; slots that are not there get 0. */
template <class T, int HD>
static __global__ void __launch_bounds__(MEASURE_WARPS * 32, 6)
    measure_kernel(const __grid_constant__ rf_kv_evict_args p, float *mass) {
    const int lane = threadIdx.x & 31, unit = blockIdx.x, max_len = (int)p.max_len;
    const int first = ((int)blockIdx.y * MEASURE_WARPS + (int)(threadIdx.x >> 5)) * SLOTS, slot = first + lane;
    rf_wait_for_previous();
    if (first >= max_len) return;
    int row = -1;
    if (lane < SLOTS && slot < unit_len(p, unit)) row = p.rows[unit * p.rows_stride + slot];
    const float sum = group_mass<T, HD>(p, unit, row);
    if (lane < SLOTS && slot < max_len) mass[(int64_t)unit * max_len + slot] = row < 0 ? 0.0f : sum;
}

/* --- evict: the victim --------------------------------------------------------------------------------------------------- */

/* Barrier over the blocks of the cluster that shows each what the others wrote to their own shared memory, without a fence of the
 * whole GPU. CLUSTERED false: over the block. */
template <bool CLUSTERED> static __device__ __forceinline__ void sync_shared(void) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTERED) {
        asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                     "barrier.cluster.arrive.relaxed;\n"
                     "barrier.cluster.wait.acquire;" ::
                         : "memory");
        return;
    }
#endif
    __syncthreads();
}
/* No block leaves while another still reads from it. */
template <bool CLUSTERED> static __device__ __forceinline__ void leave(void) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTERED)
        asm volatile("barrier.cluster.arrive.relaxed;\n"
                     "barrier.cluster.wait.acquire;" ::
                         : "memory");
#endif
}
/* What lies at the same place in block `rank` of the cluster. */
template <bool CLUSTERED> static __device__ __forceinline__ ranked load_at(const ranked *p, int rank) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTERED) {
        ranked v;
        asm volatile("{\n"
                     ".reg .b32 remote;\n"
                     "mapa.shared::cluster.u32 remote, %1, %2;\n"
                     "ld.shared::cluster.u64 %0, [remote];\n"
                     "}"
                     : "=l"(v)
                     : "r"((uint32_t)__cvta_generic_to_shared(p)), "r"(rank)
                     : "memory");
        return v;
    }
#endif
    return *p;
}
template <bool CLUSTERED> static __device__ __forceinline__ float load_at(const float *p, int rank) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTERED) {
        float v;
        asm volatile("{\n"
                     ".reg .b32 remote;\n"
                     "mapa.shared::cluster.u32 remote, %1, %2;\n"
                     "ld.shared::cluster.f32 %0, [remote];\n"
                     "}"
                     : "=f"(v)
                     : "r"((uint32_t)__cvta_generic_to_shared(p)), "r"(rank)
                     : "memory");
        return v;
    }
#endif
    return *p;
}

static __device__ __forceinline__ ranked min_of_lanes(ranked v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = min(v, __shfl_xor_sync(RF_ALL_LANES, v, step));
    return v;
}

/* Slots of a block: whole warps' worth of them, all of max_len by the blocks of a unit. */
static __host__ __device__ __forceinline__ int64_t block_slots(int64_t max_len, int blocks) {
    return ((max_len + blocks - 1) / blocks + SLOTS - 1) / SLOTS * SLOTS;
}

/* Grid (CLUSTER or 1, units). mass NULL: probabilities are made here. T, HD: of group_mass. */
template <class T, int HD, bool CLUSTERED>
static __global__ void __launch_bounds__(EVICT_THREADS, 1)
    evict_kernel(const __grid_constant__ rf_kv_evict_args p, const float *mass) {
    __shared__ ranked warp_lowest[EVICT_WARPS], lowest;
    __shared__ float first_score,
        behind_score; /* of the block's first slot, of the slot behind its last one, as they are now */
    __shared__ int32_t next_row, next_position; /* of the slot behind the block's last one */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rank = blockIdx.x, unit = blockIdx.y;
    const int slots = (int)block_slots(p.max_len, CLUSTERED ? CLUSTER : 1), begin = rank * slots, end = begin + slots;
    const int group = p.num_q_heads / p.num_kv_heads, sequence = unit / p.num_kv_heads, max_len = (int)p.max_len;
    int32_t *const rows = p.rows + unit * p.rows_stride;
    int32_t *const positions = p.positions ? p.positions + unit * p.rows_stride : NULL;
    float *const score = p.score ? p.score + unit * p.rows_stride : NULL;
    const bool measured = p.mode != RF_KV_EVICT_AGE;
    rf_wait_for_previous();
    /* Rows of the first pass come along with the length: slots past it hold anything. */
    const int ahead = begin + warp * SLOTS + lane;
    int row = 0;
    if (measured && !mass && lane < SLOTS && ahead < max_len) row = rows[ahead];
    const int len = unit_len(p, unit), budget = p.budget[unit];
    const bool evicts = len > budget;                                     /* the same in every block of the unit */
    const int last_free = (int)max((int64_t)0, (int64_t)len - p.recents); /* candidates: sinks .. last_free - 1 */

    if (threadIdx.x == 0 && end < len) {
        next_row = rows[end];
        next_position = positions ? positions[end] : 0;
    }
    ranked own = NOBODY;
    if (measured) {
        for (int first = begin + warp * SLOTS; first < min(end, len); first += EVICT_WARPS * SLOTS) {
            const int slot = first + lane;
            const bool has_slot = lane < SLOTS && slot < len;
            float before = 0.0f, pr = 0.0f;
            if (has_slot && p.mode == RF_KV_EVICT_SUM && slot < len - 1) before = score[slot];
            if (mass) {
                if (has_slot && p.over_heads)
                    for (int i = 0; i < p.num_kv_heads; i++)
                        pr += mass[((int64_t)sequence * p.num_kv_heads + i) * max_len + slot];
                else if (has_slot)
                    pr = mass[(int64_t)unit * max_len + slot];
            } else {
                if (has_slot && slot != ahead) row = rows[slot];
                pr = group_mass<T, HD>(p, unit, has_slot ? row : -1);
            }
            if (!has_slot) continue;
            pr /= (float)(p.over_heads ? p.num_q_heads : group);
            const float now = p.mode == RF_KV_EVICT_SUM && slot < len - 1 ? fmaf(p.decay, before, pr) : pr;
            score[slot] = now;
            if (slot == begin) first_score = now;
            if (slot >= p.sinks && slot < last_free)
                own = min(own, (ranked)rf_float_key(now) << 32 | (LAST_SLOT - (uint32_t)slot));
        }
    } else if (threadIdx.x == 0) {
        if (begin < len && score) first_score = score[begin];
        if (p.sinks >= begin && p.sinks < end && p.sinks < last_free) own = LAST_SLOT - (uint32_t)p.sinks;
    }
    if (!evicts) return;
    own = min_of_lanes(own);
    if (lane == 0) warp_lowest[warp] = own;
    __syncthreads(); /* the warps' lowest are there; so are the scores that the block has written */
    if (warp == 0) {
        own = min_of_lanes(lane < EVICT_WARPS ? warp_lowest[lane] : NOBODY);
        if (lane == 0) lowest = own;
    }
    sync_shared<CLUSTERED>(); /* every block's lowest and first score are there, and all have read their rows */
    own = NOBODY;
    if (lane < (CLUSTERED ? CLUSTER : 1)) own = load_at<CLUSTERED>(&lowest, lane);
    own = min_of_lanes(own);
    const bool has_victim = own != NOBODY; /* the same everywhere */
    const int victim = has_victim ? (int)(LAST_SLOT - (uint32_t)own) : len;
    const int move_begin = max(begin, victim), move_end = min(end, len - 1); /* slots that get the one behind them */
    float next_score = 0.0f;
    if (CLUSTERED && score && threadIdx.x == 0 && move_begin < move_end && move_end == end)
        next_score = load_at<CLUSTERED>(&first_score, rank + 1);
    int32_t victim_row = 0;
    const bool owns_victim = has_victim && victim >= begin && victim < end;
    if (threadIdx.x == 0 && owns_victim) victim_row = rows[victim];
    if (threadIdx.x == 0) behind_score = next_score;
    __syncthreads(); /* the victim's row has been read; the score behind the block's last slot is there */
#pragma unroll 1
    for (int at = move_begin; at < move_end; at += EVICT_THREADS) {
        const int slot = at + (int)threadIdx.x;
        const bool moves = slot < move_end, inside = slot + 1 < end;
        int32_t next = 0, position = 0;
        float value = 0.0f;
        if (moves) {
            next = inside ? rows[slot + 1] : next_row;
            if (positions) position = inside ? positions[slot + 1] : next_position;
            if (score) value = inside ? score[slot + 1] : behind_score;
        }
        __syncthreads(); /* all of this pass have read; the next pass reads what none of them writes */
        if (moves) {
            rows[slot] = next;
            if (positions) positions[slot] = position;
            if (score) score[slot] = value;
        }
    }
    if (threadIdx.x == 0 && owns_victim) {
        p.spare[unit] = victim_row;
        p.lens[unit] = len - 1;
    }
    leave<CLUSTERED>();
}

/* --- evict: host ---------------------------------------------------------------------------------------------------------- */

/* If probabilities pass through the workspace. */
static bool is_split(const rf_kv_evict_args *a, int sm) {
    return a->mode != RF_KV_EVICT_AGE && (a->over_heads || sm < 90 || a->max_len > MAX_FUSED);
}
static size_t mass_bytes(const rf_kv_evict_args *a) {
    return (size_t)a->sequences * (size_t)a->num_kv_heads * (size_t)a->max_len * sizeof(float);
}

extern "C" size_t rf_kv_evict_workspace_cuda(rf_backend *backend, const rf_kv_evict_args *a) {
    if (rf_kv_evict_check(a, NULL) != RF_OK || !is_split(a, rf_backend_sm(backend))) return 0;
    return mass_bytes(a);
}

template <class T, int HD> static rf_status launch_evict(rf_stream *stream, const rf_kv_evict_args *a, rf_error *err) {
    const int sm = rf_backend_sm(rf_stream_backend(stream));
    const unsigned units = (unsigned)(a->sequences * a->num_kv_heads);
    float *mass = NULL;
    if (is_split(a, sm)) {
        RF_TRY(rf_check_workspace("kv_evict", a->workspace, a->workspace_bytes, mass_bytes(a), err));
        mass = (float *)a->workspace;
        RF_TRY(rf_launch_early(stream, "kv_evict_measure", err, measure_kernel<T, HD>,
                               dim3(units, (unsigned)rf_ceil_div(a->max_len, MEASURE_WARPS * SLOTS)),
                               dim3(MEASURE_WARPS * 32), 0, *a, mass));
    }
    if (sm < 90)
        return rf_launch_early(stream, "kv_evict", err, evict_kernel<T, HD, false>, dim3(1, units), dim3(EVICT_THREADS),
                               0, *a, (const float *)mass);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = CLUSTER;
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER, units);
    config.blockDim = dim3(EVICT_THREADS);
    config.stream = (cudaStream_t)rf_stream_native(stream);
    config.attrs = attributes;
    config.numAttrs = 2;
    cudaError_t code = cudaLaunchKernelEx(&config, evict_kernel<T, HD, true>, *a, (const float *)mass);
    const cudaError_t last = cudaGetLastError(); /* also clears what the launch left behind */
    if (code == cudaSuccess) code = last;
    if (code != cudaSuccess) return rf_cuda_fail(err, "kv_evict", code);
    rf_stream_note_launch(stream, "kv_evict");
    return RF_OK;
}

extern "C" rf_status rf_kv_evict_cuda(rf_stream *stream, const rf_kv_evict_args *a, rf_error *err) {
    RF_TRY(rf_kv_evict_check(a, err));
    RF_TRY(rf_text_size("kv_evict", "sequences", a->sequences, 0, MAX_UNITS / a->num_kv_heads, err));
    RF_TRY(rf_text_size("kv_evict", "max_len", a->max_len, 0, MAX_UNITS * MEASURE_WARPS * SLOTS, err));
    if (!stream || a->sequences == 0 || a->max_len == 0) return RF_OK;
    const bool measured = a->mode != RF_KV_EVICT_AGE;
    const void *const needed[] = {a->rows,
                                  a->lens,
                                  a->spare,
                                  a->budget,
                                  measured ? a->k : a->rows,
                                  measured ? a->q : a->rows,
                                  measured ? (const void *)a->lse : a->rows,
                                  measured ? (const void *)a->score : a->rows};
    RF_TRY(rf_text_pointers("kv_evict", needed, 8, err));
    if (a->dtype == RF_DTYPE_F32) return launch_evict<float, 0>(stream, a, err);
    if (rf_is_aligned(a->k, 16) && rf_is_aligned(a->q, 16)) {
        if (a->head_dim == 128) return launch_evict<rf_bf16, 128>(stream, a, err);
        if (a->head_dim == 64) return launch_evict<rf_bf16, 64>(stream, a, err);
    }
    return launch_evict<rf_bf16, 0>(stream, a, err);
}
