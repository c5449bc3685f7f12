/* kernels/gemm_skinny.cu - GEMM for few rows on Hopper, where a layer's time is its weights' way from memory.
 * Maths    y = act(alpha * x w^T + bias), bf16 in, f32 accumulation, one rounding at the store.
 * Shapes   x [m, k], w [n, k], y [m, n], row-major with strides that are multiples of 8; k, n multiples of 8; m <= 512.
 * Why      At 144 rows a layer of width 1024 is 2 to 8 MB of weights and 0.3 to 1.2 GFLOP: 1 to 3 us. Row-major tiles of
 *          64 or 128 tokens waste a third of the tensor cores' work there and leave most of the card idle.
 * Mapping  Operands swapped: ROWS rows of w are wgmma's A (64 a warpgroup), all tokens its B, N = BN tokens; the accumulator is
 *          a tile of y^T. k is split over a cluster of 1 to 8 blocks so that about every multiprocessor has a block.
 * Launch   grid (split, token tiles, row tiles), clusters of (split, 1, 1). WG warpgroups; thread 0 also feeds stages of 64
 *          columns of k through TMA. A block's part of k fits into shared memory as a rule, and then every stage is sent for
 *          at the start; longer parts go round the ring, where thread 0 refills a stage when all warps have left it.
 *          (A warp of its own for that costs registers: nine warps twice leave 96 a thread, 144 tokens need more.)
 *          full[s]: thread 0's expect plus TMA's bytes of both tiles. empty[s]: one arrival per warp.
 * Early    The kernel starts while the one before it drains. With w_is_constant it fetches the bias and all stages' weights
 *          at once; every thread then waits for the previous kernel; x comes after that. The next kernel may do the same as
 *          soon as every block here has sent for its weights: it still waits for the end of this one, and this one's end
 *          implies the end of all before it, because every block here waits.
 * Sum      Each block leaves its partial tile in its own shared memory, [token][output] in f32; after a cluster barrier block
 *          r of the cluster reads the tokens of its share from all blocks and adds them in rank order: no atomics, no
 *          workspace, the same bits every time. 16 or 32 lanes store one token's outputs, whole 128-byte lines.
 * Edges    TMA fills with zeros outside m, n and k and counts those bytes too; stores are guarded.
 * Cost     max(weights / memory, ROWS + BN tiles through the L2) plus about 2 us.  Arch  sm_90a only.
 * Checked  tests/kernels/test_gemm_skinny.c against the operator; the tuner compares every candidate as well. */
#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/gemm_hopper.cuh"
#include "kernels/gemm_skinny.h"
#include "kernels/launch.cuh"
#include "kernels/wgmma.cuh"

#define BK         64 /* bf16 per row of a stage: 128 bytes, the swizzle's width */
#define MAX_SPLIT  8  /* blocks of a portable cluster */
#define MAX_STAGES 24

/* A block may have 227 KB, a multiprocessor has 228 and keeps 1 KB a block. Static: barriers and bias. */
#define STATIC_BYTES (2 * MAX_STAGES * 8 + 128 * 4)
#define FULL_BYTES   (226 * 1024)
#define HALF_BYTES   (112 * 1024)
static_assert(FULL_BYTES + STATIC_BYTES <= 227 * 1024, "shared memory of a block");
static_assert(2 * (HALF_BYTES + STATIC_BYTES + 1024) <= 228 * 1024, "shared memory of two blocks");

typedef struct {
    const void *bias; /* y's dtype; NULL: none */
    void *y;
    int m, n;
    int k_blocks_each, k_blocks_extra; /* rank r of a cluster has each + (r < extra) blocks of BK */
    int share;                         /* tokens of a tile that one rank finishes */
    int num_stages;
    int64_t ldy;
    float alpha;
    rf_act act;
    bool y_is_f32, w_is_constant;
} skinny_args;

/* Floats between two tokens of a partial tile: 4 modulo 16 spreads the accumulators' 2 x 4 tokens by 8 outputs over all
 * banks. */
template <int ROWS> static constexpr int pitch = ROWS + 4;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* --- instructions --------------------------------------------------------------------------------------------------- */

/* Widths that kernels/wgmma.cuh and gemm_hopper.cuh do not have. */
#define RF_D(j) "+f"(d[4 * (j)]), "+f"(d[4 * (j) + 1]), "+f"(d[4 * (j) + 2]), "+f"(d[4 * (j) + 3])

template <> struct rf_wgmma<96> {
    static __device__ __forceinline__ void mma(float (&d)[48], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
                     "%48, %49, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<160> {
    static __device__ __forceinline__ void mma(float (&d)[80], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                     "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
                     "%80, %81, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13), RF_D(14), RF_D(15), RF_D(16), RF_D(17), RF_D(18),
                       RF_D(19)
                     : "l"(a), "l"(b));
    }
};
#undef RF_D

/* --- the sum over the cluster --------------------------------------------------------------------------------------- */

/* This block's share of the tile's tokens: adds the partial tiles of all ranks, then bias, act and store. A unit is 4 outputs
 * of a token; several at a time, so that up to 24 loads are in flight. */
template <int ROWS, int THREADS>
static __device__ __forceinline__ void finish_share(uint32_t partial, const float *bias, const skinny_args &a,
                                                    int split, int rank, int row0, int token0, int num_tokens) {
    constexpr int PER_TOKEN = ROWS / 4, AT_ONCE = ROWS == 64 ? 3 : 2;
    const int first = rank * a.share;
    const int num_units = min(a.share, num_tokens - first) * PER_TOKEN; /* may be negative */
    for (int begin = threadIdx.x; begin < num_units; begin += AT_ONCE * THREADS) {
        float4 part[AT_ONCE][MAX_SPLIT];
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++) {
            const int unit = begin + q * THREADS;
            const int token = first + unit / PER_TOKEN, row = unit % PER_TOKEN * 4;
#pragma unroll
            for (int r = 0; r < MAX_SPLIT; r++)
                if (r < split && unit < num_units)
                    part[q][r] = rf_load4_at(partial + (uint32_t)(token * pitch<ROWS> + row) * 4, (uint32_t)r);
        }
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++) {
            const int unit = begin + q * THREADS;
            const int token = first + unit / PER_TOKEN, row = unit % PER_TOKEN * 4;
            if (unit >= num_units || row0 + row >= a.n) continue; /* n is a multiple of 4 */
            float4 sum = part[q][0];
#pragma unroll
            for (int r = 1; r < MAX_SPLIT; r++) {
                if (r < split) {
                    sum.x += part[q][r].x, sum.y += part[q][r].y;
                    sum.z += part[q][r].z, sum.w += part[q][r].w;
                }
            }
            const float4 b = *(const float4 *)(bias + row);
            float v[4] = {fmaf(a.alpha, sum.x, b.x), fmaf(a.alpha, sum.y, b.y), fmaf(a.alpha, sum.z, b.z),
                          fmaf(a.alpha, sum.w, b.w)};
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = rf_activate_fast(v[i], a.act);
            const int64_t at = (int64_t)(token0 + token) * a.ldy + row0 + row;
            if (a.y_is_f32)
                rf_store4((float *)a.y + at, v);
            else
                rf_store4((rf_bf16 *)a.y + at, v);
        }
    }
}

#endif

/* Two blocks an SM where the accumulators leave room: the next kernel's blocks wait there with their weights. */
static constexpr int blocks_per_sm(int wg, int bn) {
    return wg == 1 || bn <= 192 ? 2 : 1;
}

template <int WG, int BN>
static __global__ void __launch_bounds__(WG * 128, blocks_per_sm(WG, BN))
    skinny_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x,
                  const skinny_args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int ROWS = WG * 64, THREADS = WG * 128;
    constexpr uint32_t w_bytes = ROWS * BK * 2, stage_bytes = (ROWS + BN) * BK * 2;
    extern __shared__ uint8_t shared_raw[];
    __shared__ uint64_t full_bars[MAX_STAGES], empty_bars[MAX_STAGES];
    __shared__ alignas(16) float bias_tile[ROWS];
    const uint32_t ring = (rf_shared_addr(shared_raw) + 1023u) & ~1023u; /* stage s: w tile, then x tile */
    const uint32_t full = rf_shared_addr(full_bars), empty = rf_shared_addr(empty_bars);
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;

    const int split = (int)gridDim.x, rank = (int)blockIdx.x; /* clusters are (split, 1, 1) */
    const int token0 = (int)blockIdx.y * BN, row0 = (int)blockIdx.z * ROWS;
    const int k_begin = rank * a.k_blocks_each + min(rank, a.k_blocks_extra);
    const int num_k = a.k_blocks_each + (rank < a.k_blocks_extra);
    const int num_first = min(num_k, a.num_stages); /* stages that are filled without waiting for an empty one */

    if (threadIdx.x == 0) {
        rf_tma_prefetch_map(&map_w);
        rf_tma_prefetch_map(&map_x);
        for (int s = 0; s < a.num_stages; s++) {
            rf_mbar_init(full + 8 * s, 1);
            rf_mbar_init(empty + 8 * s, 4 * WG);
        }
        rf_mbar_init_fence();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* TMA is used before the block's barrier */
        if (!a.w_is_constant) rf_wait_for_previous();
        for (int s = 0; s < num_first; s++) {
            rf_mbar_arrive_expect(full + 8 * s, stage_bytes);
            rf_tma_load_2d(ring + s * stage_bytes, &map_w, (k_begin + s) * BK, row0, full + 8 * s);
        }
    }
    __syncthreads(); /* barriers are ready for every thread */
    rf_let_next_start();

    if (!a.w_is_constant) rf_wait_for_previous();
    float bias = 0.0f; /* of output row0 + threadIdx.x; on its way together with the weights */
    if (threadIdx.x < ROWS && a.bias && row0 + (int)threadIdx.x < a.n) {
        const int row = row0 + (int)threadIdx.x;
        bias = a.y_is_f32 ? ((const float *)a.bias)[row] : rf_to_f32(((const rf_bf16 *)a.bias)[row]);
    }
    rf_wait_for_previous();

    if (threadIdx.x == 0) {
        for (int s = 0; s < num_first; s++)
            rf_tma_load_2d(ring + s * stage_bytes + w_bytes, &map_x, (k_begin + s) * BK, token0, full + 8 * s);
    }
    __syncwarp();

    {
        float acc[BN / 2];
#pragma unroll
        for (int i = 0; i < BN / 2; i++) acc[i] = 0.0f;
        int s = 0, previous = 0;
        uint32_t parity = 0, previous_parity = 0;
#pragma unroll 1
        for (int kb = 0; kb < num_k; kb++) {
            rf_mbar_wait(full + 8 * s, parity, "gemm_skinny full");
            const uint32_t stage = ring + s * stage_bytes;
            const uint64_t w = rf_wgmma_desc(stage + warp / 4 * 64 * BK * 2), x = rf_wgmma_desc(stage + w_bytes);
            rf_wgmma_pin(acc);
            rf_wgmma_fence();
#pragma unroll
            for (int k = 0; k < BK / 16; k++) rf_wgmma<BN>::mma(acc, w + 2 * k, x + 2 * k);
            rf_wgmma_commit();
            rf_wgmma_wait<1>(); /* the previous stage's batch has finished reading */
            rf_wgmma_pin(acc);
            const int refill = kb - 1 + a.num_stages; /* the k block that goes where block kb - 1 was */
            if (kb > 0 && refill < num_k) {
                if (lane == 0) rf_mbar_arrive(empty + 8 * previous);
                if (threadIdx.x == 0) {
                    rf_mbar_wait(empty + 8 * previous, previous_parity, "gemm_skinny empty");
                    const uint32_t to = ring + previous * stage_bytes;
                    rf_mbar_arrive_expect(full + 8 * previous, stage_bytes);
                    rf_tma_load_2d(to, &map_w, (k_begin + refill) * BK, row0, full + 8 * previous);
                    rf_tma_load_2d(to + w_bytes, &map_x, (k_begin + refill) * BK, token0, full + 8 * previous);
                }
                __syncwarp();
            }
            previous = s;
            previous_parity = parity;
            if (++s == a.num_stages) {
                s = 0;
                parity ^= 1;
            }
        }
        rf_wgmma_wait<0>();
        rf_wgmma_pin(acc);

        if (threadIdx.x < ROWS) bias_tile[threadIdx.x] = bias;
        __syncthreads(); /* no warp reads the ring any more, all loads are in; the bias is there */
        float *const partial = (float *)(shared_raw + (ring - rf_shared_addr(shared_raw)));
        const int row = warp * 16 + lane / 4, token = 2 * (lane & 3);
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            float *const p = partial + (8 * j + token) * pitch<ROWS> + row;
            p[0] = acc[4 * j];
            p[pitch<ROWS>] = acc[4 * j + 1];
            p[8] = acc[4 * j + 2];
            p[pitch<ROWS> + 8] = acc[4 * j + 3];
        }
    }

    if (split > 1)
        rf_cluster_sync_shared(); /* every block's partial tile is complete */
    else
        __syncthreads();
    finish_share<ROWS, THREADS>(ring, bias_tile, a, split, rank, row0, token0, min(BN, a.m - token0));
    if (split > 1)
        rf_cluster_sync(); /* no block leaves while another still reads from it; what was read has been used */
#else
    __trap(); /* rf_gemm_skinny_check keeps other architectures away */
#endif
}

/* --- configs -------------------------------------------------------------------------------------------------------- */

typedef void (*kernel_fn)(CUtensorMap, CUtensorMap, skinny_args);

/* By tokens of a tile. */
typedef struct {
    int bn;
    kernel_fn kernel[2]; /* of 64 and 128 rows of w */
} instance;

static const instance instances[] = {
    {16, {skinny_kernel<1, 16>, skinny_kernel<2, 16>}},    {32, {skinny_kernel<1, 32>, skinny_kernel<2, 32>}},
    {48, {skinny_kernel<1, 48>, skinny_kernel<2, 48>}},    {64, {skinny_kernel<1, 64>, skinny_kernel<2, 64>}},
    {72, {skinny_kernel<1, 72>, skinny_kernel<2, 72>}},    {96, {skinny_kernel<1, 96>, skinny_kernel<2, 96>}},
    {128, {skinny_kernel<1, 128>, skinny_kernel<2, 128>}}, {144, {skinny_kernel<1, 144>, skinny_kernel<2, 144>}},
    {160, {skinny_kernel<1, 160>, skinny_kernel<2, 160>}}, {192, {skinny_kernel<1, 192>, skinny_kernel<2, 192>}},
    {256, {skinny_kernel<1, 256>, skinny_kernel<2, 256>}},
};
#define NUM_INSTANCES (int)(sizeof instances / sizeof(instance))

/* Order is part of the tuning file's meaning: append, do not reorder. */
static const struct {
    const char *name;
    int wg, split, token_tiles;
    bool half;
} configs[] = {
    {"r64k1", 1, 1, 1, false},    {"r64k2", 1, 2, 1, false},    {"r64k3", 1, 3, 1, false},
    {"r64k4", 1, 4, 1, false},    {"r64k6", 1, 6, 1, false},    {"r64k8", 1, 8, 1, false},
    {"r128k1", 2, 1, 1, false},   {"r128k2", 2, 2, 1, false},   {"r128k3", 2, 3, 1, false},
    {"r128k4", 2, 4, 1, false},   {"r128k6", 2, 6, 1, false},   {"r128k8", 2, 8, 1, false},
    {"r64k2t2", 1, 2, 2, false},  {"r64k4t2", 1, 4, 2, false},  {"r64k8t2", 1, 8, 2, false},
    {"r128k2t2", 2, 2, 2, false}, {"r128k4t2", 2, 4, 2, false}, {"r128k8t2", 2, 8, 2, false},
    {"r64k4h", 1, 4, 1, true},    {"r64k8h", 1, 8, 1, true},    {"r128k4h", 2, 4, 1, true},
    {"r128k8h", 2, 8, 1, true},
};
#define NUM_CONFIGS (int)(sizeof configs / sizeof configs[0])

typedef struct {
    int instance, bn, split, token_tiles, row_tiles, num_k_blocks, num_stages;
    size_t shared_bytes;
    kernel_fn kernel;
} placement;

/* How a config lays out these args. */
static rf_status place(placement *out, const rf_gemm_args *a, int config, rf_error *err) {
    const char *name = configs[config].name;
    const int rows = configs[config].wg * 64, split = configs[config].split;
    const int64_t wanted = rf_ceil_div(a->m, configs[config].token_tiles);
    int i = 0;
    while (i < NUM_INSTANCES && instances[i].bn < wanted) i++;
    if (i == NUM_INSTANCES)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_skinny %s: m is %lld, at most %d", name, (long long)a->m,
                       configs[config].token_tiles * instances[NUM_INSTANCES - 1].bn);
    const int bn = instances[i].bn;
    if (rf_ceil_div(a->m, bn) != configs[config].token_tiles)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_skinny %s: m is %lld, one tile is enough", name, (long long)a->m);
    const int64_t num_k_blocks = rf_ceil_div(a->k, BK);
    if (num_k_blocks < split)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_skinny %s: k is %lld, too short to split", name, (long long)a->k);

    const size_t budget = configs[config].half ? HALF_BYTES : FULL_BYTES, align = 1024;
    const size_t stage_bytes = (size_t)(rows + bn) * BK * 2, partial_bytes = (size_t)bn * (size_t)(rows + 4) * 4;
    const int64_t longest = rf_ceil_div(num_k_blocks, split);
    int64_t stages = (int64_t)((budget - align) / stage_bytes);
    if (stages > MAX_STAGES) stages = MAX_STAGES;
    if (stages > longest) stages = longest;
    if ((stages < 2 && longest > 1) || partial_bytes + align > budget)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_skinny %s: m is %lld, too many rows for its shared memory", name,
                       (long long)a->m);
    if (configs[config].half && stages == longest)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_skinny %s: the same as without h", name);
    const size_t ring_bytes = (size_t)stages * stage_bytes;
    out->instance = i;
    out->bn = bn;
    out->split = split;
    out->token_tiles = configs[config].token_tiles;
    out->row_tiles = (int)rf_ceil_div(a->n, rows);
    out->num_k_blocks = (int)num_k_blocks;
    out->num_stages = (int)stages;
    out->shared_bytes = align + (ring_bytes > partial_bytes ? ring_bytes : partial_bytes);
    out->kernel = instances[i].kernel[configs[config].wg - 1];
    return RF_OK;
}

static cudaError_t allow(const placement *p, int wg) {
    static std::atomic<uint64_t> allowed[NUM_INSTANCES][2];
    return rf_allow_shared((const void *)p->kernel, FULL_BYTES, &allowed[p->instance][wg - 1]);
}

/* --- launch --------------------------------------------------------------------------------------------------------- */

/* attributes: room for two, the cluster's first. */
static cudaLaunchConfig_t launch_config(const placement *p, int wg, cudaLaunchAttribute *attributes) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)p->split, (unsigned)p->token_tiles, (unsigned)p->row_tiles);
    config.blockDim = (unsigned)(wg * 128);
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

static rf_status launch(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    const int wg = configs[config].wg;
    placement p;
    rf_status st = place(&p, a, config, err);
    CUtensorMap map_w, map_x;
    if (st == RF_OK) st = rf_make_tile_map(&map_w, "gemm_skinny", a->w, a->n, a->k, a->ldw, wg * 64, err);
    if (st == RF_OK) st = rf_make_tile_map(&map_x, "gemm_skinny", a->x, a->m, a->k, a->ldx, p.bn, err);
    if (st != RF_OK) return st;
    cudaError_t code = allow(&p, wg);
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_skinny", code);

    skinny_args args;
    args.bias = a->bias;
    args.y = a->y;
    args.m = (int)a->m;
    args.n = (int)a->n;
    args.k_blocks_each = p.num_k_blocks / p.split;
    args.k_blocks_extra = p.num_k_blocks % p.split;
    args.share = (int)rf_ceil_div(a->m < p.bn ? a->m : p.bn, p.split);
    args.num_stages = p.num_stages;
    args.ldy = a->ldy;
    args.alpha = a->alpha;
    args.act = a->act;
    args.y_is_f32 = a->y_dtype == RF_DTYPE_F32;
    args.w_is_constant = a->w_is_constant;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t cuda_config = launch_config(&p, wg, attributes);
    cuda_config.stream = (cudaStream_t)rf_stream_native(stream);
    code = cudaLaunchKernelEx(&cuda_config, p.kernel, map_w, map_x, args);
    const cudaError_t last = cudaGetLastError(); /* also clears what the launch left behind */
    if (code == cudaSuccess) code = last;
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_skinny", code);
    rf_stream_note_launch(stream, "gemm_skinny");
    return RF_OK;
}

extern "C" int rf_gemm_skinny_num_configs(void) {
    return NUM_CONFIGS;
}

extern "C" const char *rf_gemm_skinny_config_name(int config) {
    return config >= 0 && config < NUM_CONFIGS ? configs[config].name : NULL;
}

extern "C" rf_status rf_gemm_skinny_check(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    if (config < 0 || config >= NUM_CONFIGS)
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_skinny: config %d, there are %d", config, NUM_CONFIGS);
    if (rf_backend_sm(rf_stream_backend(stream)) != 90)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_skinny: compute capability %d, needs 9.0",
                       rf_backend_sm(rf_stream_backend(stream)));
    if (a->dtype != RF_DTYPE_BF16 || (a->y_dtype != RF_DTYPE_BF16 && a->y_dtype != RF_DTYPE_F32))
        return rf_fail(err, RF_ERR_DTYPE, "gemm_skinny: %s -> %s", rf_dtype_name(a->dtype), rf_dtype_name(a->y_dtype));
    if (a->w_is_kn || a->num_batches != 1 || (a->y0 && a->beta != 0.0f))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_skinny: one batch, w as [n, k] and no addend only");
    if (a->act == RF_ACT_GELU_ERF) return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_skinny: no erf GELU");
    /* row tiles are a grid's z */
    if (a->m < 1 || a->n < 1 || a->k < 1 || a->n > 64 * 65535 || a->k > INT32_MAX / 2 || a->k % 8 != 0 ||
        a->n % 8 != 0 || a->ldx % 8 != 0 || a->ldw % 8 != 0 || a->ldy % 8 != 0)
        return rf_fail(err, RF_ERR_SHAPE,
                       "gemm_skinny: m %lld n %lld k %lld: n, k and the row strides must be multiples of 8, n at most "
                       "%d",
                       (long long)a->m, (long long)a->n, (long long)a->k, 64 * 65535);
    if (!rf_is_aligned(a->x, 16) || !rf_is_aligned(a->w, 16) || !rf_is_aligned(a->y, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_skinny: operands must be on 16-byte addresses");
    placement p;
    return place(&p, a, config, err);
}

extern "C" rf_status rf_gemm_skinny_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err) {
    const rf_status st = rf_gemm_skinny_check(stream, args, config, err);
    return st == RF_OK ? launch(stream, args, config, err) : st;
}

extern "C" rf_status rf_gemm_skinny_residency(rf_stream *stream, const rf_gemm_args *args, int config, int *resident,
                                              int *clusters, rf_error *err) {
    rf_status st = rf_gemm_skinny_check(stream, args, config, err);
    placement p;
    if (st == RF_OK) st = place(&p, args, config, err);
    if (st != RF_OK) return st;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t cuda_config = launch_config(&p, configs[config].wg, attributes);
    cuda_config.numAttrs = 1;
    cudaError_t code = allow(&p, configs[config].wg);
    if (code == cudaSuccess) code = cudaOccupancyMaxActiveClusters(resident, (const void *)p.kernel, &cuda_config);
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        return rf_cuda_fail(err, "gemm_skinny", code);
    }
    *clusters = p.token_tiles * p.row_tiles;
    return RF_OK;
}

/* Weights of 1 to 16 MB and at most 320 rows: there launch, latency and idle multiprocessors are the larger part of a row-major
 * kernel's time. One block per multiprocessor, 7 in 10 of them or more, all resident at once. 128 rows of w where they give
 * enough blocks: x then comes out of the L2 half as often. */
extern "C" int rf_gemm_skinny_default(rf_stream *stream, const rf_gemm_args *a) {
    if (!a->w_is_constant || a->m < 16 || a->m > 320 || a->n > INT32_MAX || a->k > INT32_MAX ||
        a->n * a->k < INT64_C(1) << 19 || a->n * a->k > INT64_C(1) << 23)
        return -1;
    /* above 64 rows cuBLASLt wins where n alone gives it enough tiles (docs/performance.md) */
    const bool small = a->m > 64 && a->n <= 1536 && a->k <= 1536;
    if (a->m > 64 && !small && (a->n > 2048 || a->k < 2 * a->n || a->m > 192)) return -1;
    if (small && a->m > 192) return -1;
    const int num_sms = rf_backend_num_sms(rf_stream_backend(stream)), token_tiles = a->m > 256 ? 2 : 1;
    for (int wg = small ? 1 : 2; wg >= 1; wg--) {
        int best = -1, best_blocks = 0;
        for (int i = 0; i < NUM_CONFIGS; i++) {
            int resident = 0, clusters = 0;
            if (configs[i].wg != wg || configs[i].half || configs[i].token_tiles != token_tiles) continue;
            if (rf_gemm_skinny_residency(stream, a, i, &resident, &clusters, NULL) != RF_OK || clusters > resident)
                continue;
            const int blocks = clusters * configs[i].split;
            if (small && blocks >= 48 && blocks <= num_sms) return i; /* the smallest split: its sums cost least */
            if (blocks <= num_sms && blocks > best_blocks) {
                best = i;
                best_blocks = blocks;
            }
        }
        if (10 * best_blocks >= 7 * num_sms) return best;
    }
    return -1;
}
