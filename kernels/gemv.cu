/* kernels/gemv.cu - matrix times one to eight vectors, at the speed at which memory delivers the matrix.
 * Maths    y = act(alpha * x w^T + bias) + beta * y0, bf16 in, f32 sums, one rounding at the store.
 * Shapes   x [m, k], w [n, k], y [m, n]; k and the strides of x and w multiples of 8; m <= 8, n free.
 * Why      A token of an 8-billion-parameter model is 15 GB of weights, each used once: nothing counts but bytes under
 *          way.
 * Mapping  A warp takes groups of R rows of w (outputs) over all of k, or over its part of k where a team of 2 to 8
 *          warps shares a group (n too small to keep every multiprocessor at it). A lane loads 16 bytes of a row at a
 *          time, the warp 512 contiguous ones; R * U = 8 such loads a lane are always under way: as soon as one has
 *          been used, its registers take the load of the next step, which after the last step of a group is the next
 *          group's first. So 96 KB a multiprocessor at 24 warps (m = 1), 80 at 20 (m = 2), 64 at 16 (m <= 4), 48 at 12
 *          (m <= 8); 3 TB/s need about 25.
 * Launch   As many blocks as fit at once; block b takes groups b, b + grid, ...: neighbouring rows at the same time,
 *          and no multiprocessor has more than a group more than another.
 * x        All of it in shared memory, bf16, columns padded with zeros to whole steps.
 * Sum      A lane adds its columns in order; lanes by a butterfly that ends with one sum a lane; warps of a team in
 *          rank order. No atomics, no workspace, the same bits every time.
 * Early    The kernel starts while the one before it drains. With w_is_constant it asks for its first 8 loads a lane
 *          and then waits for that kernel; x comes after that.
 * Cost     bytes of w / memory, plus about 2 us.  Arch  sm_80 and later; the early start from sm_90 on.
 * Checked  tests/kernels/test_gemv.c against sums in double; the tuner compares every candidate as well. */
#include <cuda_runtime.h>
#include <limits.h>

#include "kernels/device.cuh"
#include "kernels/gemv.h"
#include "kernels/launch.cuh"

#define MAX_TEAM 8

typedef struct {
    const void *x, *w, *bias, *y0; /* bias and y0 of y's dtype; NULL: none */
    void *y;
    int m, n;
    int num_chunks; /* of 8 columns, in k */
    int num_steps;  /* of 32 * U chunks, rounded up */
    int num_groups; /* of R rows, rounded up */
    int team;       /* warps that share a group: 1, 2, 4, 8 */
    int ldw_bytes;
    int64_t ldx, ldy;
    float alpha, beta;
    rf_act act;
    bool y_is_f32, w_is_constant;
} gemv_args;

/* Sum over the warp of each of V values, V a power of two: lane l gets the sum of value l / (32 / V). V + 4 - log2 V
 * shuffles where V butterflies would take 5 V. Both lanes of an exchange add the same two numbers. */
template <int V, int BIT> static __device__ __forceinline__ float sum_each(const float (&v)[V], int lane) {
    if constexpr (BIT == 0) {
        return v[0];
    } else if constexpr (V == 1) {
        const float both[1] = {v[0] + __shfl_xor_sync(0xffffffffu, v[0], BIT)};
        return sum_each<1, BIT / 2>(both, lane);
    } else {
        const bool upper = (lane & BIT) != 0;
        float half[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) {
            const float give = upper ? v[i] : v[i + V / 2], keep = upper ? v[i + V / 2] : v[i];
            half[i] = keep + __shfl_xor_sync(0xffffffffu, give, BIT);
        }
        return sum_each<V / 2, BIT / 2>(half, lane);
    }
}

static __device__ __forceinline__ uint64_t policy_evict_first(void) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* 16 bytes that nobody reads again. volatile: it stays where it is written, ahead of or behind the wait. */
static __device__ __forceinline__ uint4 load_once(const char *p, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy));
    return v;
}

/* 16 bytes to shared memory, past L1, or zeros there; under way until cp.async.wait_all. */
static __device__ __forceinline__ void copy_or_zero(uint32_t to, const char *from, bool copy) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0) : "memory");
}

static __device__ __forceinline__ uint32_t word(const uint4 &q, int i) {
    return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w;
}
static __device__ __forceinline__ void unpack(uint32_t pair, float *lo, float *hi) {
    *lo = __uint_as_float(pair << 16);
    *hi = __uint_as_float(pair & 0xffff0000u);
}

static __device__ __forceinline__ float load_y(const void *p, int64_t at, bool f32) {
    return f32 ? ((const float *)p)[at] : rf_to_f32(((const rf_bf16 *)p)[at]);
}

/* GELU's 0.5 u (1 + tanh z) = u / (1 + exp(-2 z)), and SiLU, which is the same with another exponent. Relative error
 * about 1e-6 also where the tanh form cancels. */
static __device__ __forceinline__ float activate(float u, rf_act act) {
    if (act == RF_ACT_NONE) return u;
    const float z = act == RF_ACT_GELU_TANH ? 1.5957691216057308f * (u + 0.044715f * u * u * u) : u;
    return __fdividef(u, 1.0f + __expf(-z));
}

/* M tokens at most, R rows of w a group, U loads of 16 bytes a row in a step. */
template <int M, int R, int U, int THREADS, int BLOCKS>
static __global__ void __launch_bounds__(THREADS, BLOCKS) gemv_kernel(const gemv_args a) {
    constexpr int WARPS = THREADS / 32, V = M * R, LANES = 32 / V; /* LANES hold the same sum */
    static_assert(V <= 32 && (V & (V - 1)) == 0, "one sum a lane");
    extern __shared__ uint4 x_tile[]; /* [M][num_steps * 32 * U] chunks */
    __shared__ float parts[2][WARPS][V];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int num_teams = WARPS / a.team, my_team = warp / a.team,
              part = warp % a.team; /* the last warps may be in none */
    const int num_slots =
        (a.num_groups - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x; /* this block's groups */
    const int step_begin = part * a.num_steps / a.team, step_end = (part + 1) * a.num_steps / a.team;
    const int x_pitch = a.num_steps * 32 * U;
    const uint64_t policy = policy_evict_first();

    /* The loads' cursor runs one step ahead of the sums': the group, this lane's first chunk of the step, its address
     * in the group's first row, and how many more rows the group has (rows past the end: the last one again, not
     * stored). */
    const int ldw_bytes = a.ldw_bytes;
    int load_slot = my_team, load_chunk = 0, load_step = 0, more_rows = 0;
    const char *from = NULL;
    auto point =
        [&]() { /* at the first step of group load_slot */
                const int row = ((int)blockIdx.x + load_slot * (int)gridDim.x) * R;
                load_step = step_begin;
                load_chunk = my_team < num_teams && load_slot < num_slots ? step_begin * 32 * U + lane : INT_MAX / 2;
                more_rows = min(R, a.n - row) - 1;
                from = (const char *)a.w + (int64_t)row * ldw_bytes + (int64_t)(step_begin * 32 * U + lane) * 16;
        };
    uint4 buffer[U][R];
    auto load = [&](int u) {
        const bool inside = load_chunk + 32 * u < a.num_chunks;
#pragma unroll
        for (int r = 0; r < R; r++) {
            buffer[u][r] = make_uint4(0, 0, 0, 0);
            if (inside) buffer[u][r] = load_once(from + (int64_t)min(r, more_rows) * ldw_bytes + 512 * u, policy);
        }
    };
    auto advance = [&]() {
        load_chunk += 32 * U;
        from += 512 * U;
        if (++load_step < step_end) return;
        load_slot += num_teams;
        point();
    };

    point();
    if (!a.w_is_constant) rf_wait_for_previous();
#pragma unroll
    for (int u = 0; u < U; u++) load(u);
    advance();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); /* it waits for this kernel's end all the same */
#endif
    rf_wait_for_previous();

#pragma unroll 1
    for (int t = 0; t < M; t++) {
        const char *const row = (const char *)a.x + (t < a.m ? t * a.ldx * 2 : 0);
        const uint32_t to = (uint32_t)__cvta_generic_to_shared(x_tile + t * x_pitch);
        for (int c = threadIdx.x; c < x_pitch; c += THREADS)
            copy_or_zero(to + (uint32_t)c * 16, row + (c < a.num_chunks ? c * 16 : 0), t < a.m && c < a.num_chunks);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads(); /* x is there; nothing writes it again */

    /* The sum that this lane stores: token `token` of row `group * R + r`. */
    const int token = lane / LANES / R, r_of_lane = lane / LANES % R;
    const bool stores = lane % LANES == 0 && token < a.m && part == 0;
    /* Every warp of a block that has teams makes the same number of rounds, for the barriers. */
    const int num_rounds = (num_slots + num_teams - 1) / num_teams;
#pragma unroll 1
    for (int round = 0; round < num_rounds; round++) {
        const int slot = my_team < num_teams ? round * num_teams + my_team : num_slots;
        if (a.team == 1 && slot >= num_slots) break;
        const int row = ((int)blockIdx.x + slot * (int)gridDim.x) * R + r_of_lane;
        const int64_t at = token * a.ldy + row;
        const bool mine = stores && slot < num_slots && row < a.n;
        float bias = 0.0f, addend = 0.0f; /* on their way while the sum is made */
        if (mine && a.bias) bias = load_y(a.bias, row, a.y_is_f32);
        if (mine && a.y0) addend = load_y(a.y0, at, a.y_is_f32);

        float sum[V];
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] = 0.0f;
        if (slot < num_slots) {
#pragma unroll 1
            for (int step = step_begin; step < step_end; step++) {
                const uint4 *x = x_tile + step * 32 * U + lane;
#pragma unroll
                for (int u = 0; u < U; u++) {
                    uint4 xq[M];
#pragma unroll
                    for (int t = 0; t < M; t++) xq[t] = x[t * x_pitch + u * 32];
#pragma unroll
                    for (int i = 0; i < 4; i++) { /* a word, two columns, at a time: few registers */
                        float w_lo[R], w_hi[R];
#pragma unroll
                        for (int r = 0; r < R; r++) unpack(word(buffer[u][r], i), &w_lo[r], &w_hi[r]);
#pragma unroll
                        for (int t = 0; t < M; t++) {
                            float x_lo, x_hi;
                            unpack(word(xq[t], i), &x_lo, &x_hi);
#pragma unroll
                            for (int r = 0; r < R; r++)
                                sum[t * R + r] = fmaf(w_hi[r], x_hi, fmaf(w_lo[r], x_lo, sum[t * R + r]));
                        }
                    }
                    load(u);
                }
                advance();
            }
        }
        float total = sum_each<V, 16>(sum, lane);
        if (a.team > 1) {
            if (lane % LANES == 0) parts[round & 1][warp][lane / LANES] = total;
            __syncthreads(); /* all parts of this round; those of the one before last have been read */
            if (part == 0) {
                total = parts[round & 1][warp][lane / LANES];
                for (int i = 1; i < a.team && my_team < num_teams; i++)
                    total += parts[round & 1][warp + i][lane / LANES];
            }
        }
        if (mine) {
            const float y = fmaf(a.beta, addend, activate(fmaf(a.alpha, total, bias), a.act));
            if (a.y_is_f32)
                ((float *)a.y)[at] = y;
            else
                ((rf_bf16 *)a.y)[at] = rf_from_f32<rf_bf16>(y);
        }
    }
}

/* --- configs and launch ---------------------------------------------------------------------------------------------
 * */

typedef void (*kernel_fn)(gemv_args);

/* By the number of tokens. */
typedef struct {
    int m, rows, unroll, threads, blocks;
    kernel_fn kernel;
} instance;

static const instance instances[] = {
    {1, 2, 4, 384, 2, gemv_kernel<1, 2, 4, 384, 2>},
    {2, 2, 4, 320, 2, gemv_kernel<2, 2, 4, 320, 2>},
    {4, 2, 4, 256, 2, gemv_kernel<4, 2, 4, 256, 2>},
    {8, 4, 2, 384, 1, gemv_kernel<8, 4, 2, 384, 1>},
};
#define NUM_INSTANCES (int)(sizeof instances / sizeof(instance))

/* Warps of a team. Order is part of the tuning file's meaning: append, do not reorder. */
static const struct {
    const char *name;
    int team;
} configs[] = {{"v1", 1}, {"v2", 2}, {"v4", 4}, {"v8", MAX_TEAM}};
#define NUM_CONFIGS (int)(sizeof configs / sizeof configs[0])

typedef struct {
    int instance, num_steps, num_groups, grid, blocks_per_sm;
    size_t shared_bytes;
} placement;

static rf_status place(placement *out, rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    const int sm = rf_backend_sm(rf_stream_backend(stream)), team = configs[config].team;
    /* Of a multiprocessor; what a block may have is 1 KB less, and each block costs 1 KB. 8.6, 8.9, 12.0: 100 KB. */
    const size_t sm_bytes = (sm == 90 || sm == 100 || sm == 103 ? 228u : sm == 80 || sm == 87 ? 164u : 100u) * 1024;
    int i = 0;
    while (i < NUM_INSTANCES - 1 && instances[i].m < a->m) i++;
    const int step_columns = 32 * instances[i].unroll * 8, num_warps = instances[i].threads / 32;
    const int64_t num_steps = rf_ceil_div(a->k, step_columns);
    const size_t x_bytes = (size_t)num_steps * (size_t)step_columns * 2 * (size_t)instances[i].m;
    const size_t parts_bytes = (size_t)(2 * num_warps * instances[i].m * instances[i].rows * 4);
    if (num_steps < team)
        return rf_fail(err, RF_ERR_SHAPE, "gemv %s: k is %lld, too short to share", configs[config].name,
                       (long long)a->k);
    if (x_bytes + parts_bytes + 1024 > sm_bytes)
        return rf_fail(err, RF_ERR_SHAPE, "gemv %s: m %lld, k %lld: x takes %zu bytes of shared memory, there are %zu",
                       configs[config].name, (long long)a->m, (long long)a->k, x_bytes, sm_bytes - 1024 - parts_bytes);
    const size_t fit = sm_bytes / (x_bytes + parts_bytes + 1024);
    const int64_t num_groups = rf_ceil_div(a->n, instances[i].rows);
    out->instance = i;
    out->num_steps = (int)num_steps;
    out->num_groups = (int)num_groups;
    out->blocks_per_sm = fit < (size_t)instances[i].blocks ? (int)fit : instances[i].blocks;
    const int64_t resident = (int64_t)out->blocks_per_sm * rf_backend_num_sms(rf_stream_backend(stream));
    out->grid = (int)(resident < num_groups ? resident : num_groups);
    out->shared_bytes = x_bytes;
    return RF_OK;
}

extern "C" int rf_gemv_num_configs(void) {
    return NUM_CONFIGS;
}

extern "C" const char *rf_gemv_config_name(int config) {
    return config >= 0 && config < NUM_CONFIGS ? configs[config].name : NULL;
}

extern "C" rf_status rf_gemv_check(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    if (config < 0 || config >= NUM_CONFIGS)
        return rf_fail(err, RF_ERR_ARGUMENT, "gemv: config %d, there are %d", config, NUM_CONFIGS);
    if (rf_backend_sm(rf_stream_backend(stream)) < 80)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemv: compute capability %d, needs 8.0",
                       rf_backend_sm(rf_stream_backend(stream)));
    if (a->dtype != RF_DTYPE_BF16 || (a->y_dtype != RF_DTYPE_BF16 && a->y_dtype != RF_DTYPE_F32))
        return rf_fail(err, RF_ERR_DTYPE, "gemv: %s -> %s", rf_dtype_name(a->dtype), rf_dtype_name(a->y_dtype));
    if (a->w_is_kn || a->num_batches != 1 || a->act == RF_ACT_GELU_ERF)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemv: one batch, w as [n, k] and no erf GELU only");
    if (a->m < 1 || a->m > RF_GEMV_MAX_ROWS || a->n < 1 || a->k < 1 || a->n > INT32_MAX / 2 || a->ldw > INT32_MAX / 4 ||
        a->k % 8 != 0 || a->ldx % 8 != 0 || a->ldw % 8 != 0)
        return rf_fail(err, RF_ERR_SHAPE,
                       "gemv: m %lld n %lld k %lld: m at most %d; k, ldx and ldw must be multiples of 8",
                       (long long)a->m, (long long)a->n, (long long)a->k, RF_GEMV_MAX_ROWS);
    if (!rf_is_aligned(a->x, 16) || !rf_is_aligned(a->w, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "gemv: x and w must be on 16-byte addresses");
    placement p;
    return place(&p, stream, a, config, err);
}

extern "C" rf_status rf_gemv_force(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    static std::atomic<uint64_t> allowed[NUM_INSTANCES];
    rf_status st = rf_gemv_check(stream, a, config, err);
    placement p;
    if (st == RF_OK) st = place(&p, stream, a, config, err);
    if (st != RF_OK) return st;
    const kernel_fn kernel = instances[p.instance].kernel;
    /* All that a block of this card may have, once: which k comes next is not known here. */
    const int sm = rf_backend_sm(rf_stream_backend(stream));
    const size_t most =
        (sm == 90 || sm == 100 || sm == 103 ? 227u
         : sm == 80 || sm == 87             ? 163u
                                            : 99u) *
            1024 -
        (size_t)(2 * instances[p.instance].threads / 32 * instances[p.instance].m * instances[p.instance].rows * 4);
    const cudaError_t code = rf_allow_shared((const void *)kernel, most, &allowed[p.instance]);
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemv", code);

    gemv_args args;
    args.x = a->x;
    args.w = a->w;
    args.bias = a->bias;
    args.y0 = a->beta != 0.0f ? a->y0 : NULL;
    args.y = a->y;
    args.m = (int)a->m;
    args.n = (int)a->n;
    args.num_chunks = (int)(a->k / 8);
    args.num_steps = p.num_steps;
    args.num_groups = p.num_groups;
    args.team = configs[config].team;
    args.ldx = a->ldx;
    args.ldw_bytes = (int)(a->ldw * 2);
    args.ldy = a->ldy;
    args.alpha = a->alpha;
    args.beta = a->beta;
    args.act = a->act;
    args.y_is_f32 = a->y_dtype == RF_DTYPE_F32;
    args.w_is_constant = a->w_is_constant;
    return rf_launch_early(stream, "gemv", err, kernel, dim3((unsigned)p.grid),
                           dim3((unsigned)instances[p.instance].threads), p.shared_bytes, args);
}

/* The smallest team that keeps 12 warps a multiprocessor at it, 48 KB under way. */
extern "C" int rf_gemv_default(rf_stream *stream, const rf_gemm_args *a) {
    const int64_t size = a->n <= INT32_MAX && a->k <= INT32_MAX ? a->n * a->k : 0;
    const bool hopper = rf_backend_sm(rf_stream_backend(stream)) == 90;
    if (!a->w_is_constant || a->m < 1 || a->m > RF_GEMV_MAX_ROWS || a->n < 256 || size < INT64_C(1) << 20) return -1;
    if (a->m > 4 && hopper && size > INT64_C(1) << 23) return -1;
    const int64_t wanted = INT64_C(12) * rf_backend_num_sms(rf_stream_backend(stream));
    int best = -1;
    for (int i = 0; i < NUM_CONFIGS; i++) {
        placement p;
        if (rf_gemv_check(stream, a, i, NULL) != RF_OK || place(&p, stream, a, i, NULL) != RF_OK) break;
        best = i;
        if ((int64_t)p.num_groups * configs[i].team >= wanted) break;
    }
    return best;
}
