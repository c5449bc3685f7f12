/* kernels/gemm_stream.cu - GEMM of up to 64 rows on Hopper whose weights are far larger than the L2: the time is
 * theirs.
 * Maths    y = act(alpha * x w^T + bias) + beta * y0, bf16 in, f32 accumulation, one rounding at the store.
 * Shapes   x [m, k], w [n, k], y [m, n], row-major with strides that are multiples of 8; k, n multiples of 8; m <= 64.
 * Why      A layer of 32 rows is 30 to 250 MB of weights: 12 to 80 us at memory speed, if every multiprocessor has the
 *          same share, never waits with an empty ring and reads little else.
 * Mapping  Operands swapped as in gemm_skinny.cu: rows of w are wgmma's A (64 a warpgroup), the tokens its B, N = BN
 *          tokens. A tile has any multiple of 8 rows of w up to 256, chosen so that all blocks get the same number of
 *          tiles (12288 rows: 128 tiles of 96); where that is no multiple of 64, the last warpgroup's A runs on into
 *          what lies behind the tile in shared memory: rows of a product do not mix, and those are not stored.
 *          Every block reads all of x for each of its tiles, BN / rows of the weights' bytes, from the L2. Where that
 *          is too much (n = 4096: 32 rows a block), clusters of 2 to 8 blocks take k in parts and rows in larger tiles.
 * Launch   grid (split, blocks), clusters of (split, 1, 1); without a split block b takes tiles b, b + blocks, ... and
 *          its ring runs on across them. One warpgroup per 64 rows of a tile; a last warp feeds the ring through TMA.
 *          Ring: stages of 64 or 128 columns of k, each w then x, in planes of 64 columns, 128-byte swizzle; 100 to 220
 *          KB a multiprocessor under way, of which 25 KB are enough for 3 TB/s.
 *          full[s]: the feeder's expect plus TMA's bytes. empty[s]: one arrival per consumer warp.
 *          Weights are marked evict_first in the L2, x evict_last.
 * Early    The kernel starts while the one before it drains. With w_is_constant the whole ring's weights are sent for
 *          at once; every thread then waits for the previous kernel; x comes after that.
 * Sum      Without a split in the accumulators alone. With one, each block leaves its partial tile in shared memory,
 *          and the blocks of the cluster add a part of the outputs each, in rank order. No atomics, no workspace, the
 *          same bits every time.
 * Edges    TMA fills with zeros outside m, n and k and counts those bytes too; stores are guarded.
 * Cost     max(weights / memory, (1 + BN / rows) weights / L2) plus about 2 us.  Arch  sm_90a only.
 * Checked  tests/kernels/test_gemm_stream.c against sums in double; the tuner compares every candidate as well. */
#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/gemm_hopper.cuh"
#include "kernels/gemm_stream.h"
#include "kernels/launch.cuh"
#include "kernels/wgmma.cuh"

#define PLANE_COLUMNS 64 /* bf16 in a row of a plane: 128 bytes, the swizzle's width */
#define ROW_BYTES     128
#define MAX_ROWS      256
#define MAX_SPLIT     8 /* blocks of a portable cluster */
#define MAX_STAGES    32
#define MAX_THREADS   (MAX_ROWS / 64 * 128 + 32)
#define PATCH_PITCH   20 /* floats; see store_tile */

/* A block may have 227 KB, a multiprocessor has 228 and keeps 1 KB a block. Static: barriers, and a patch a warp. */
#define STATIC_BYTES (2 * MAX_STAGES * 8 + MAX_ROWS / 16 * 8 * PATCH_PITCH * 4)
#define FULL_BYTES   (216 * 1024)
#define HALF_BYTES   (102 * 1024)
static_assert(FULL_BYTES + STATIC_BYTES <= 227 * 1024, "shared memory of a block");
static_assert(2 * (HALF_BYTES + STATIC_BYTES + 1024) <= 228 * 1024, "shared memory of two blocks");

typedef struct {
    const void *bias, *y0; /* of y's dtype; NULL: none */
    void *y;
    int m, n;
    int rows, num_tiles;
    int stages_each, stages_extra; /* of k: rank r of a cluster has each + (r < extra) */
    int num_stages;                /* of the ring */
    int64_t ldy;
    float alpha, beta;
    rf_act act;
    bool y_is_f32, w_is_constant;
} stream_args;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

static __device__ __forceinline__ void load4(const void *p, int64_t at, bool f32, float v[4]) {
    if (f32)
        rf_load4((const float *)p + at, v);
    else
        rf_load4((const rf_bf16 *)p + at, v);
}

/* Four neighbouring outputs of a token, from their sums to y. */
static __device__ __forceinline__ void finish4(const stream_args &a, const float4 &sum, const float bias[4],
                                               const float addend[4], int64_t at) {
    const float u[4] = {sum.x, sum.y, sum.z, sum.w};
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = fmaf(a.beta, addend[i], rf_activate_fast(fmaf(a.alpha, u[i], bias[i]), a.act));
    if (a.y_is_f32)
        rf_store4((float *)a.y + at, v);
    else
        rf_store4((rf_bf16 *)a.y + at, v);
}

/* A warp's 16 rows of the tile, 8 tokens at a time through its patch of shared memory, [token][row]: lane l then has
 * token l / 4 and rows 4 (l % 4) to + 3, so that a token's 16 outputs are stored as one piece of 32 or 64 bytes. A
 * pitch of 20: the accumulators' 4 x 2 tokens by 8 rows meet no bank twice. row: the first of the lane's four outputs;
 * inside: they exist. */
template <int BN>
static __device__ __forceinline__ void store_tile(const stream_args &a, const float (&acc)[BN / 2], float *patch,
                                                  int lane, int row, bool inside, const float bias[4]) {
    float *const to = patch + 2 * (lane & 3) * PATCH_PITCH + lane / 4;
    const float4 *const from = (const float4 *)(patch + lane / 4 * PATCH_PITCH + 4 * (lane & 3));
    float addend[BN / 8][4]; /* all on their way before the first store, which may be to y0 */
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const int token = 8 * j + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) addend[j][i] = 0.0f;
        if (inside && token < a.m && a.y0) load4(a.y0, token * a.ldy + row, a.y_is_f32, addend[j]);
    }
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const int token = 8 * j + lane / 4;
        const int64_t at = token * a.ldy + row;
        const bool mine = inside && token < a.m;
        __syncwarp(); /* the previous eight have been read */
        to[0] = acc[4 * j];
        to[PATCH_PITCH] = acc[4 * j + 1];
        to[8] = acc[4 * j + 2];
        to[PATCH_PITCH + 8] = acc[4 * j + 3];
        __syncwarp(); /* the patch is complete */
        const float4 sum = *from;
        if (mine) finish4(a, sum, bias, addend[j], at);
    }
}

/* A block's part of the cluster's tile: adds the partial tiles of all ranks in rank order. A unit is 4 outputs of a
 * token. */
static __device__ __forceinline__ void finish_part(const stream_args &a, uint32_t partial, int pitch, int split,
                                                   int rank, int row0) {
    const int per_token = min(a.rows, a.n - row0) / 4, num_units = per_token * a.m;
    const int end = (rank + 1) * num_units / split;
    for (int unit = rank * num_units / split + (int)threadIdx.x; unit < end; unit += (int)blockDim.x) {
        const int token = unit / per_token, row = unit % per_token * 4;
        const int64_t at = token * a.ldy + row0 + row;
        float4 part[MAX_SPLIT];
        float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f}, addend[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (a.bias) load4(a.bias, row0 + row, a.y_is_f32, bias);
        if (a.y0) load4(a.y0, at, a.y_is_f32, addend);
#pragma unroll
        for (int r = 0; r < MAX_SPLIT; r++)
            if (r < split) part[r] = rf_load4_at(partial + (uint32_t)(token * pitch + row) * 4, (uint32_t)r);
        float4 sum = part[0];
#pragma unroll
        for (int r = 1; r < MAX_SPLIT; r++) {
            if (r < split) {
                sum.x += part[r].x, sum.y += part[r].y;
                sum.z += part[r].z, sum.w += part[r].w;
            }
        }
        finish4(a, sum, bias, addend, at);
    }
}

#endif

template <int BN, int PLANES>
static __global__ void __launch_bounds__(MAX_THREADS, 1)
    stream_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x,
                  const stream_args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t shared_raw[];
    __shared__ uint64_t full_bars[MAX_STAGES], empty_bars[MAX_STAGES];
    __shared__ alignas(16) float patches[MAX_ROWS / 16][8 * PATCH_PITCH];
    const uint32_t ring = (rf_shared_addr(shared_raw) + 1023u) & ~1023u; /* stage s: planes of w, then planes of x */
    const uint32_t full = rf_shared_addr(full_bars), empty = rf_shared_addr(empty_bars);
    const uint32_t w_plane = (uint32_t)a.rows * ROW_BYTES, x_plane = BN * ROW_BYTES;
    const uint32_t w_bytes = w_plane * PLANES, stage_bytes = w_bytes + x_plane * PLANES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int num_consumers = (int)blockDim.x / 32 - 1; /* warps */

    const int split = (int)gridDim.x, rank = (int)blockIdx.x; /* clusters are (split, 1, 1) */
    const int first_tile = (int)blockIdx.y, tile_step = (int)gridDim.y;
    const int k_begin = rank * a.stages_each + min(rank, a.stages_extra);
    const int num_k = a.stages_each + (rank < a.stages_extra); /* stages of a tile; at least 1 */

    if (threadIdx.x == 0) {
        for (int s = 0; s < a.num_stages; s++) {
            rf_mbar_init(full + 8 * s, 1);
            rf_mbar_init(empty + 8 * s, (uint32_t)num_consumers);
        }
        rf_mbar_init_fence();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();     /* barriers are ready for every thread */
    rf_let_next_start(); /* it waits for this kernel's end all the same */

    if (warp == num_consumers) {
        if (lane == 0) {
            const uint64_t keep = rf_policy_evict_last(), once = rf_policy_evict_first();
            const int num_mine = (a.num_tiles - first_tile + tile_step - 1) / tile_step; /* tiles */
            const int total = num_mine * num_k, num_first = min(total, a.num_stages);
            rf_tma_prefetch_map(&map_w);
            rf_tma_prefetch_map(&map_x);
            const auto send_w = [&](int s, int tile, int k) {
                const uint32_t to = ring + (uint32_t)s * stage_bytes, bar = full + 8 * (uint32_t)s;
                rf_mbar_arrive_expect(bar, stage_bytes);
#pragma unroll
                for (int p = 0; p < PLANES; p++)
                    rf_tma_load_2d_hint(to + (uint32_t)p * w_plane, &map_w,
                                        ((k_begin + k) * PLANES + p) * PLANE_COLUMNS, tile * a.rows, bar, once);
            };
            const auto send_x = [&](int s, int k) {
                const uint32_t to = ring + (uint32_t)s * stage_bytes + w_bytes, bar = full + 8 * (uint32_t)s;
#pragma unroll
                for (int p = 0; p < PLANES; p++)
                    rf_tma_load_2d_hint(to + (uint32_t)p * x_plane, &map_x,
                                        ((k_begin + k) * PLANES + p) * PLANE_COLUMNS, 0, bar, keep);
            };
            if (!a.w_is_constant) rf_wait_for_previous();
            int tile = first_tile, k = 0;
            for (int s = 0; s < num_first; s++) {
                send_w(s, tile, k);
                if (++k == num_k) k = 0, tile += tile_step;
            }
            rf_wait_for_previous();
            for (int s = 0, xk = 0; s < num_first; s++) {
                send_x(s, xk);
                if (++xk == num_k) xk = 0;
            }
            uint32_t parity = 0;
            for (int i = num_first, s = 0; i < total; i++) {
                rf_mbar_wait(empty + 8 * (uint32_t)s, parity, "gemm_stream empty");
                send_w(s, tile, k);
                send_x(s, k);
                if (++k == num_k) k = 0, tile += tile_step;
                if (++s == a.num_stages) s = 0, parity ^= 1;
            }
        }
        __syncwarp();
        rf_wait_for_previous(); /* every thread waits: the end of this kernel implies the end of all before it */
    } else {
        rf_wait_for_previous();
    }

    const int row_of_lane = warp * 16 + 4 * (lane & 3); /* of the tile: the first of the four that this lane stores */
    if (warp < num_consumers) {
        float acc[BN / 2];
        int s = 0;
        uint32_t parity = 0;
        for (int tile = first_tile; tile < a.num_tiles; tile += tile_step) {
            const int row0 = tile * a.rows;
            const bool inside = row_of_lane < a.rows && row0 + row_of_lane < a.n; /* both are multiples of 8 */
            float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (split == 1 && a.bias && inside) load4(a.bias, row0 + row_of_lane, a.y_is_f32, bias);
#pragma unroll
            for (int i = 0; i < BN / 2; i++) acc[i] = 0.0f;
            int previous = 0;
#pragma unroll 1
            for (int k = 0; k < num_k; k++) {
                rf_mbar_wait(full + 8 * (uint32_t)s, parity, "gemm_stream full");
                const uint32_t stage = ring + (uint32_t)s * stage_bytes;
                rf_wgmma_pin(acc);
                rf_wgmma_fence();
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    const uint64_t w =
                        rf_wgmma_desc(stage + (uint32_t)p * w_plane + (uint32_t)(warp / 4 * 64 * ROW_BYTES));
                    const uint64_t x = rf_wgmma_desc(stage + w_bytes + (uint32_t)p * x_plane);
#pragma unroll
                    for (int i = 0; i < PLANE_COLUMNS / 16; i++) rf_wgmma<BN>::mma(acc, w + 2 * i, x + 2 * i);
                }
                rf_wgmma_commit();
                rf_wgmma_wait<1>(); /* the previous stage's batch has finished reading */
                rf_wgmma_pin(acc);
                if (k > 0 && lane == 0) rf_mbar_arrive(empty + 8 * (uint32_t)previous);
                previous = s;
                if (++s == a.num_stages) s = 0, parity ^= 1;
            }
            rf_wgmma_wait<0>();
            rf_wgmma_pin(acc);
            if (lane == 0) rf_mbar_arrive(empty + 8 * (uint32_t)previous);
            if (split == 1) {
                store_tile<BN>(a, acc, patches[warp], lane, row0 + row_of_lane, inside, bias);
            } else { /* one tile a block: the ring is free when all have come so far */
                asm volatile("bar.sync 1, %0;" ::"r"(num_consumers * 32) : "memory");
                const int pitch = num_consumers * 16 + 4; /* 4 modulo 32 floats: no bank twice, as in store_tile */
                float *const partial = (float *)(shared_raw + (ring - rf_shared_addr(shared_raw)));
                float *const to = partial + 2 * (lane & 3) * pitch + warp * 16 + lane / 4;
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    float *const p = to + 8 * j * pitch;
                    p[0] = acc[4 * j];
                    p[pitch] = acc[4 * j + 1];
                    p[8] = acc[4 * j + 2];
                    p[pitch + 8] = acc[4 * j + 3];
                }
            }
        }
    }
    if (split > 1) {
        __syncwarp();
        rf_cluster_sync_shared(); /* every block's partial tile is complete */
        finish_part(a, ring, num_consumers * 16 + 4, split, rank, first_tile * a.rows);
        rf_cluster_sync(); /* no block leaves while another still reads from it; what was read has been used */
    }
#else
    __trap(); /* rf_gemm_stream_check keeps other architectures away */
#endif
}

/* --- configs --------------------------------------------------------------------------------------------------------
 * */

typedef void (*kernel_fn)(CUtensorMap, CUtensorMap, stream_args);

typedef struct {
    int bn;              /* tokens */
    kernel_fn kernel[2]; /* with one and two planes a stage */
} instance;

static const instance instances[] = {
    {8, {stream_kernel<8, 1>, stream_kernel<8, 2>}},    {16, {stream_kernel<16, 1>, stream_kernel<16, 2>}},
    {32, {stream_kernel<32, 1>, stream_kernel<32, 2>}}, {48, {stream_kernel<48, 1>, stream_kernel<48, 2>}},
    {64, {stream_kernel<64, 1>, stream_kernel<64, 2>}},
};
#define NUM_INSTANCES (int)(sizeof instances / sizeof(instance))

/* Order is part of the tuning file's meaning: append, do not reorder. */
static const struct {
    const char *name;
    int split, planes;
    bool half;
    int per_sm; /* blocks */
} configs[] = {
    {"s1", 1, 2, false, 1}, {"s1n", 1, 1, false, 1}, {"s1h", 1, 2, true, 1}, {"s1nh", 1, 1, true, 1},
    {"s1d", 1, 2, true, 2}, {"s1nd", 1, 1, true, 2}, {"s2", 2, 2, false, 1}, {"s2n", 2, 1, false, 1},
    {"s2h", 2, 2, true, 1}, {"s2nh", 2, 1, true, 1}, {"s4", 4, 2, false, 1}, {"s4n", 4, 1, false, 1},
    {"s4h", 4, 2, true, 1}, {"s4nh", 4, 1, true, 1}, {"s8", 8, 2, false, 1}, {"s8nh", 8, 1, true, 1},
};
#define NUM_CONFIGS (int)(sizeof configs / sizeof configs[0])

/* Rows of a tile and tiles. Without a split: the largest tiles, which read x least often, among those that give the
 * busiest block at most 3 % more than the least work. With one: all of n in clusters that are there at once, where a
 * GPC may have no more than 16 multiprocessors. */
static void choose_rows(int64_t n, int split, int num_blocks, int max_rows, int *rows, int64_t *num_tiles) {
    if (split > 1) {
        const int clusters = split == 2 ? num_blocks / 2 : num_blocks / 16 * 16 / split;
        *rows = clusters > 0 ? (int)rf_ceil_div(rf_ceil_div(n, clusters), 8) * 8 : MAX_ROWS + 8;
        *num_tiles = rf_ceil_div(n, *rows);
        return;
    }
    int64_t least = INT64_MAX;
    for (int r = 8; r <= max_rows; r += 8) {
        const int64_t work = rf_ceil_div(rf_ceil_div(n, r), num_blocks) * r;
        if (work < least) least = work;
    }
    *rows = max_rows;
    while (rf_ceil_div(rf_ceil_div(n, *rows), num_blocks) * *rows * 100 > least * 103) *rows -= 8;
    *num_tiles = rf_ceil_div(n, *rows);
}

typedef struct {
    int instance, bn, rows, num_tiles, split, num_clusters, planes, num_k_stages, num_stages, num_threads;
    size_t shared_bytes;
    kernel_fn kernel;
} placement;

static rf_status place(placement *out, rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    const char *name = configs[config].name;
    const int split = configs[config].split, planes = configs[config].planes;
    const int num_sms = rf_backend_num_sms(rf_stream_backend(stream));
    int i = 0, rows = 0;
    int64_t num_tiles = 0;
    while (i < NUM_INSTANCES - 1 && instances[i].bn < a->m) i++;
    const int bn = instances[i].bn;
    const int max_rows = configs[config].half ? MAX_ROWS / 2 : MAX_ROWS; /* registers of two blocks */
    choose_rows(a->n, split, num_sms * configs[config].per_sm, max_rows, &rows, &num_tiles);
    if (rows > max_rows)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_stream %s: n is %lld, too many rows of w for one round of clusters",
                       name, (long long)a->n);
    const int64_t num_k_stages = rf_ceil_div(a->k, planes * PLANE_COLUMNS), longest = rf_ceil_div(num_k_stages, split);
    if (num_k_stages < split)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_stream %s: k is %lld, too short to split", name, (long long)a->k);

    /* slack: what the last warpgroup reads behind a last plane of w that is no multiple of 64 rows. x follows it. */
    const int wg = (rows + 63) / 64, over = (wg * 64 - rows - bn) * ROW_BYTES;
    const size_t budget = configs[config].half ? HALF_BYTES : FULL_BYTES, align = 1024,
                 slack = over > 0 ? (size_t)over : 0;
    const size_t stage_bytes = (size_t)(rows + bn) * (size_t)(planes * ROW_BYTES);
    const size_t partial_bytes = split > 1 ? (size_t)bn * (size_t)(wg * 64 + 4) * 4 : 0;
    int64_t stages = (int64_t)((budget - align - slack) / stage_bytes);
    const int64_t in_all = longest * rf_ceil_div(num_tiles, split > 1 ? num_tiles : num_sms * configs[config].per_sm);
    if (stages > MAX_STAGES) stages = MAX_STAGES;
    if (stages > in_all) stages = in_all;
    if ((stages < 3 && in_all > stages) || align + partial_bytes > budget)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_stream %s: m %lld, %d rows of w: fewer than 3 stages fit", name,
                       (long long)a->m, rows);
    const size_t ring_bytes = (size_t)stages * stage_bytes + slack;
    out->instance = i;
    out->bn = bn;
    out->rows = rows;
    out->num_tiles = (int)num_tiles;
    out->split = split;
    out->num_clusters =
        split > 1 || num_tiles < num_sms * configs[config].per_sm ? (int)num_tiles : num_sms * configs[config].per_sm;
    out->planes = planes;
    out->num_k_stages = (int)num_k_stages;
    out->num_stages = (int)stages;
    out->num_threads = wg * 128 + 32;
    out->kernel = instances[i].kernel[planes - 1];
    out->shared_bytes = align + (ring_bytes > partial_bytes ? ring_bytes : partial_bytes);
    return RF_OK;
}

static cudaError_t allow(const placement *p) {
    static std::atomic<uint64_t> allowed[NUM_INSTANCES][2];
    return rf_allow_shared((const void *)p->kernel, FULL_BYTES, &allowed[p->instance][p->planes - 1]);
}

/* --- launch ---------------------------------------------------------------------------------------------------------
 * */

/* attributes: room for two, the cluster's first. */
static cudaLaunchConfig_t launch_config(const placement *p, cudaLaunchAttribute *attributes) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p->split, (unsigned)p->num_clusters);
    config.blockDim = (unsigned)p->num_threads;
    config.dynamicSmemBytes = p->shared_bytes;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = (unsigned)p->split;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
}

static rf_status launch(rf_stream *stream, const rf_gemm_args *a, const placement *p, rf_error *err) {
    CUtensorMap map_w, map_x;
    rf_status st = rf_make_tile_map(&map_w, "gemm_stream", a->w, a->n, a->k, a->ldw, p->rows, err);
    if (st == RF_OK) st = rf_make_tile_map(&map_x, "gemm_stream", a->x, a->m, a->k, a->ldx, p->bn, err);
    if (st != RF_OK) return st;
    cudaError_t code = allow(p);
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_stream", code);

    stream_args args;
    args.bias = a->bias;
    args.y0 = a->beta != 0.0f ? a->y0 : NULL;
    args.y = a->y;
    args.m = (int)a->m;
    args.n = (int)a->n;
    args.rows = p->rows;
    args.num_tiles = p->num_tiles;
    args.stages_each = p->num_k_stages / p->split;
    args.stages_extra = p->num_k_stages % p->split;
    args.num_stages = p->num_stages;
    args.ldy = a->ldy;
    args.alpha = a->alpha;
    args.beta = a->beta;
    args.act = a->act;
    args.y_is_f32 = a->y_dtype == RF_DTYPE_F32;
    args.w_is_constant = a->w_is_constant;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = launch_config(p, attributes);
    config.stream = (cudaStream_t)rf_stream_native(stream);
    code = cudaLaunchKernelEx(&config, p->kernel, map_w, map_x, args);
    const cudaError_t last = cudaGetLastError(); /* also clears what the launch left behind */
    if (code == cudaSuccess) code = last;
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_stream", code);
    rf_stream_note_launch(stream, "gemm_stream");
    return RF_OK;
}

static rf_status check_and_place(placement *p, rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    if (config < 0 || config >= NUM_CONFIGS)
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_stream: config %d, there are %d", config, NUM_CONFIGS);
    if (rf_backend_sm(rf_stream_backend(stream)) != 90)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_stream: compute capability %d, needs 9.0",
                       rf_backend_sm(rf_stream_backend(stream)));
    if (a->dtype != RF_DTYPE_BF16 || (a->y_dtype != RF_DTYPE_BF16 && a->y_dtype != RF_DTYPE_F32))
        return rf_fail(err, RF_ERR_DTYPE, "gemm_stream: %s -> %s", rf_dtype_name(a->dtype), rf_dtype_name(a->y_dtype));
    if (a->w_is_kn || a->num_batches != 1 || a->act == RF_ACT_GELU_ERF)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_stream: one batch, w as [n, k] and no erf GELU only");
    if (a->m < 1 || a->m > RF_GEMM_STREAM_MAX_ROWS || a->n < 1 || a->k < 1 || a->n > INT32_MAX / 2 ||
        a->k > INT32_MAX / 2 || a->k % 8 != 0 || a->n % 8 != 0 || a->ldx % 8 != 0 || a->ldw % 8 != 0 || a->ldy % 8 != 0)
        return rf_fail(
            err, RF_ERR_SHAPE,
            "gemm_stream: m %lld n %lld k %lld: m at most %d; n, k and the row strides must be multiples of 8",
            (long long)a->m, (long long)a->n, (long long)a->k, RF_GEMM_STREAM_MAX_ROWS);
    if (!rf_is_aligned(a->x, 16) || !rf_is_aligned(a->w, 16) || !rf_is_aligned(a->y, 16) ||
        !rf_is_aligned(a->bias, 16) || (a->beta != 0.0f && !rf_is_aligned(a->y0, 16)))
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_stream: operands must be on 16-byte addresses");
    return place(p, stream, a, config, err);
}

extern "C" int rf_gemm_stream_num_configs(void) {
    return NUM_CONFIGS;
}

extern "C" const char *rf_gemm_stream_config_name(int config) {
    return config >= 0 && config < NUM_CONFIGS ? configs[config].name : NULL;
}

extern "C" rf_status rf_gemm_stream_check(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    placement p;
    return check_and_place(&p, stream, a, config, err);
}

extern "C" rf_status rf_gemm_stream_force(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    placement p;
    const rf_status st = check_and_place(&p, stream, a, config, err);
    return st == RF_OK ? launch(stream, a, &p, err) : st;
}

extern "C" rf_status rf_gemm_stream_get_shape(rf_stream *stream, const rf_gemm_args *a, int config,
                                              rf_gemm_stream_shape *out, rf_error *err) {
    placement p;
    const rf_status st = check_and_place(&p, stream, a, config, err);
    if (st != RF_OK) return st;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t cuda_config = launch_config(&p, attributes);
    cuda_config.numAttrs = 1;
    int resident = 0;
    cudaError_t code = allow(&p);
    if (code == cudaSuccess) code = cudaOccupancyMaxActiveClusters(&resident, (const void *)p.kernel, &cuda_config);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return rf_cuda_fail(err, "gemm_stream", code);
    }
    out->tokens = p.bn;
    out->rows = p.rows;
    out->num_tiles = p.num_tiles;
    out->split = p.split;
    out->num_blocks = p.num_clusters * p.split;
    out->stage_columns = p.planes * PLANE_COLUMNS;
    out->num_stages = p.num_stages;
    out->shared_bytes = p.shared_bytes;
    out->resident = resident;
    return RF_OK;
}

/* The smallest split whose blocks read at most a third as much of x as of w, all clusters at once; in stages of 128
 * columns where the ring still has four of them. */
extern "C" int rf_gemm_stream_default(rf_stream *stream, const rf_gemm_args *a) {
    if (!a->w_is_constant || a->m < 5 || a->m > RF_GEMM_STREAM_MAX_ROWS || a->n > INT32_MAX || a->k > INT32_MAX ||
        a->n * a->k <= INT64_C(1) << 23)
        return -1;
    int best = -1, best_ratio = 0;
    for (int i = 0; i < NUM_CONFIGS; i++) {
        rf_gemm_stream_shape shape;
        if (configs[i].half || configs[i].split > 4) continue;
        if (rf_gemm_stream_get_shape(stream, a, i, &shape, NULL) != RF_OK) continue;
        if (shape.num_blocks > shape.resident * shape.split) continue;
        if (configs[i].planes > 1 && shape.num_stages < 4) continue;
        const int ratio = 100 * shape.rows / shape.tokens;
        if (ratio >= 300) return i;
        if (ratio > best_ratio) {
            best = i;
            best_ratio = ratio;
        }
    }
    return best;
}
