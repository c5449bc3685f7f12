/* kernels/gemm_wgmma.cu - the library's own GEMM for Hopper.
 * Maths    y = act(alpha * x w^T + bias) + beta * y0, bf16 in, f32 accumulation, one rounding at the store.
 * Shapes   x [m, k], w [n, k], y and y0 [m, n], all row-major with strides that are multiples of 8; k, n multiples of 8.
 * Why      Widths of diffusion transformers are multiples of 72, and at 512 rows a 128 x 128 tiling leaves most of the card
 *          idle (36 blocks for 1152 outputs). Tiles 72, 112 and 144 wide fill 124 to 128 of 132 multiprocessors.
 * Launch   a block per BM x BN tile of y, rows fastest so that neighbours share w; BM / 64 consumer warpgroups of 64 rows
 *          each and one producer warp, which feeds a ring of STAGES tiles of x and w (64 deep in k) through TMA.
 *          full[s]: the producer's expect plus TMA's bytes. empty[s]: one arrival per consumer warp. A consumer keeps one
 *          batch of wgmma in flight and frees a stage when the next stage's batch has been issued and its own is done.
 *          Results go through shared memory so that a warp stores whole rows, 16 bytes a lane.
 * Turns    Configs pp..: persistent blocks of two consumer warpgroups that own alternate tiles of 128 x BN, so that one
 *          warpgroup's epilogue runs under the other's products; see pingpong_kernel.
 * Edges    TMA fills with zeros outside m, n and k and counts those bytes too; stores are guarded.
 * Cost     2 m n k flop at 4096 a clock and multiprocessor, plus about 2 us to fill and drain.  Arch  sm_90a only.
 * Checked  tests/kernels against the CPU table and against cuBLASLt; the tuner compares every candidate as well. */
#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/gemm_wgmma.h"
#include "kernels/launch.cuh"
#include "kernels/wgmma.cuh"

#define BK 64 /* bf16 per row of a stage: 128 bytes, the swizzle's width */

typedef struct {
    const void *bias, *y0; /* y's dtype; NULL: none */
    void *y;
    int m, n, num_k_blocks, tiles_m, tiles_n;
    int64_t ldy;
    float alpha, beta;
    rf_act act;
} epilogue_args;

template <int BM, int BN, int STAGES> struct tile {
    static constexpr int consumers = BM / 64;
    static constexpr int threads = consumers * 128 + 32;
    static constexpr int stage_bytes = (BM + BN) * BK * 2;
    static constexpr int shared_bytes = STAGES * stage_bytes + 1024; /* room to align to 1024 */
    static constexpr int pitch = BN + (40 - BN % 32) % 32;           /* floats, 8 modulo 32 */
    static_assert(BM * pitch * 4 <= STAGES * stage_bytes, "the results of a tile fit into the ring");
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* GELU's 0.5 u (1 + tanh z) = u / (1 + exp(-2 z)): two special-function instructions, relative error about 1e-6 also where
 * the tanh form cancels. */
template <int ACT> static __device__ __forceinline__ float activate(float u) {
    if (ACT == RF_ACT_GELU_TANH)
        return __fdividef(u, 1.0f + __expf(-1.5957691216057308f * (u + 0.044715f * u * u * u)));
    if (ACT == RF_ACT_SILU) return __fdividef(u, 1.0f + __expf(-u));
    return rf_activate(u, (rf_act)ACT);
}

/* Eight neighbours as f32: 16 bytes of bf16 or 32 of f32, on a 16-byte address. */
template <typename T> static __device__ __forceinline__ void load8(const T *p, float v[8]) {
    if (sizeof(T) == 4) {
        rf_load4(p, v);
        rf_load4(p + 4, v + 4);
    } else {
        const uint4 q = *(const uint4 *)p;
        const uint32_t word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = __uint_as_float(word[i] << 16);
            v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        }
    }
}
static __device__ __forceinline__ void store8(float *p, const float v[8]) {
    rf_store4(p, v);
    rf_store4(p + 4, v + 4);
}
static __device__ __forceinline__ void store8(rf_bf16 *p, const float v[8]) {
    *(uint4 *)p = make_uint4(rf_pack_bf16(v[0], v[1]), rf_pack_bf16(v[2], v[3]), rf_pack_bf16(v[4], v[5]),
                             rf_pack_bf16(v[6], v[7]));
}

/* A warp's 16 x BN results, f32 in shared memory with the given pitch, to rows row.. and columns col.. of y. */
template <int BN, int PITCH, typename T, int ACT>
static __device__ __forceinline__ void store_rows(const float *staged, const epilogue_args &e, int row, int col) {
    const T *bias = (const T *)e.bias, *y0 = (const T *)e.y0;
    T *y = (T *)e.y;
    constexpr int chunks = BN / 8;
#pragma unroll 3
    for (int i = threadIdx.x & 31; i < 16 * chunks; i += 32) {
        const int r = i / chunks, c = i % chunks * 8;
        if (row + r >= e.m || col + c >= e.n) continue; /* n is a multiple of 8 */
        const int64_t at = (int64_t)(row + r) * e.ldy + col + c;
        float v[8], b[8];
        load8(staged + r * PITCH + c, v);
#pragma unroll
        for (int q = 0; q < 8; q++) b[q] = 0.0f;
        if (bias) load8(bias + col + c, b);
#pragma unroll
        for (int q = 0; q < 8; q++) v[q] = activate<ACT>(fmaf(e.alpha, v[q], b[q]));
        if (y0) {
            load8(y0 + at, b);
#pragma unroll
            for (int q = 0; q < 8; q++) v[q] = fmaf(e.beta, b[q], v[q]);
        }
        store8(y + at, v);
    }
}

#endif

/* Group of 8 row tiles by all column tiles at a time: the x rows of a group and the w columns in flight stay in L2. */
#define GROUP_ROWS 8

template <int BM, int BN, int STAGES, int BLOCKS_PER_SM, typename T>
static __global__ void __launch_bounds__(BM / 64 * 128 + 32, BLOCKS_PER_SM)
    gemm_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                const epilogue_args e) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef tile<BM, BN, STAGES> shape;
    extern __shared__ uint8_t shared_raw[];
    __shared__ uint64_t full_bars[STAGES], empty_bars[STAGES];
    const uint32_t ring = (rf_shared_addr(shared_raw) + 1023u) & ~1023u; /* stage s: x tile, then w tile */
    const uint32_t full = rf_shared_addr(full_bars), empty = rf_shared_addr(empty_bars);
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;

    const int group_tiles = GROUP_ROWS * e.tiles_n, group = blockIdx.x / group_tiles,
              in_group = blockIdx.x % group_tiles;
    const int group_rows = min(GROUP_ROWS, e.tiles_m - group * GROUP_ROWS);
    const int row0 = (group * GROUP_ROWS + in_group % group_rows) * BM, col0 = in_group / group_rows * BN;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            rf_mbar_init(full + 8 * s, 1);
            rf_mbar_init(empty + 8 * s, 4 * shape::consumers);
        }
        rf_mbar_init_fence();
    }
    __syncthreads(); /* barriers are ready for every thread and for TMA */

    if (warp == 4 * shape::consumers) { /* producer */
        if (lane == 0) {
            rf_tma_prefetch_map(&map_x);
            rf_tma_prefetch_map(&map_w);
            int s = 0;
            uint32_t parity = 1; /* the ring starts empty */
            for (int kb = 0; kb < e.num_k_blocks; kb++) {
                rf_mbar_wait(empty + 8 * s, parity, "gemm empty");
                const uint32_t stage = ring + s * shape::stage_bytes;
                rf_mbar_arrive_expect(full + 8 * s, shape::stage_bytes);
                rf_tma_load_2d(stage + BM * BK * 2, &map_w, kb * BK, col0, full + 8 * s);
                rf_tma_load_2d(stage, &map_x, kb * BK, row0, full + 8 * s);
                if (++s == STAGES) {
                    s = 0;
                    parity ^= 1;
                }
            }
        }
        /* Every byte asked for here is waited for by the consumers, so the block cannot end before it has landed. */
    } else {
        const int warpgroup = warp / 4;
        float acc[BN / 2];
#pragma unroll
        for (int i = 0; i < BN / 2; i++) acc[i] = 0.0f;
        int s = 0, previous = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int kb = 0; kb < e.num_k_blocks; kb++) {
            rf_mbar_wait(full + 8 * s, parity, "gemm full");
            const uint32_t stage = ring + s * shape::stage_bytes;
            const uint64_t a = rf_wgmma_desc(stage + warpgroup * 64 * BK * 2), b = rf_wgmma_desc(stage + BM * BK * 2);
            rf_wgmma_pin(acc);
            rf_wgmma_fence();
#pragma unroll
            for (int k = 0; k < BK / 16; k++) rf_wgmma<BN>::mma(acc, a + 2 * k, b + 2 * k);
            rf_wgmma_commit();
            rf_wgmma_wait<1>(); /* the previous stage's batch has finished reading */
            rf_wgmma_pin(acc);
            if (kb > 0 && lane == 0) rf_mbar_arrive(empty + 8 * previous);
            previous = s;
            if (++s == STAGES) {
                s = 0;
                parity ^= 1;
            }
        }
        rf_wgmma_wait<0>();
        rf_wgmma_pin(acc);

        /* Through shared memory, so that a warp writes whole rows: each warp has 16 rows of its own in the ring's place.
         * The pitch, 8 modulo 32 words, spreads the accumulators' four rows by eight columns over all banks. */
        asm volatile("bar.sync 1, %0;" ::"n"(shape::consumers * 128) : "memory"); /* no warp reads the ring any more */
        float *staged = (float *)(shared_raw + (ring - rf_shared_addr(shared_raw))) + warp * 16 * shape::pitch;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            float *p = staged + lane / 4 * shape::pitch + 8 * j + 2 * (lane & 3);
            *(float2 *)p = make_float2(acc[4 * j], acc[4 * j + 1]);
            *(float2 *)(p + 8 * shape::pitch) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
        }
        __syncwarp(); /* the warp's 16 rows are complete */
        const int row = row0 + warp * 16;
        switch (e.act) {
        case RF_ACT_NONE: store_rows<BN, shape::pitch, T, RF_ACT_NONE>(staged, e, row, col0); break;
        case RF_ACT_GELU_TANH: store_rows<BN, shape::pitch, T, RF_ACT_GELU_TANH>(staged, e, row, col0); break;
        case RF_ACT_GELU_ERF: store_rows<BN, shape::pitch, T, RF_ACT_GELU_ERF>(staged, e, row, col0); break;
        case RF_ACT_SILU: store_rows<BN, shape::pitch, T, RF_ACT_SILU>(staged, e, row, col0); break;
        }
    }
#else
    __trap(); /* rf_gemm_wgmma_check keeps other architectures away */
#endif
}

/* --- ping-pong --------------------------------------------------------------------------------------------------------
 * Launch   one block per multiprocessor, in clusters of CLUSTER along the rows; cluster c takes the tiles c, c + clusters,
 *          ... of (128 CLUSTER) x BN. 384 threads: consumer warpgroups 0 and 1, then the producer's (one lane works).
 *          Consumer i & 1 owns the block's i-th tile: products with 8 wgmma of 64 x BN per stage into BN registers, then
 *          the epilogue from registers while the other consumer's products run.
 * Ring     as above, but it never drains between tiles: the producer runs ahead into the next one. In a cluster each block
 *          loads its x and 1 / CLUSTER of w, which goes to all blocks; empty[s] collects the consumers of every block.
 * Turns    turn[c]: four arrivals, by the other consumer's warps when they have passed the last full barrier of their tile.
 *          Without it consumer c could wait on a stage two phases ahead, which a parity cannot tell from done.
 * Stores   four lanes hold 8 columns of a row, 2 each. For bf16 they exchange words so that each lane stores 16 bytes and
 *          two lanes together a sector of 32. */

#define PP_ROWS    128
#define PP_THREADS 384

template <int BN, int STAGES, int CLUSTER> struct pp_tile {
    static constexpr int x_bytes = PP_ROWS * BK * 2;
    static constexpr int stage_bytes = (PP_ROWS + BN) * BK * 2;
    static constexpr int shared_bytes = STAGES * stage_bytes + 1024; /* room to align to 1024 */
    static_assert(BN % 16 == 0 && BN / CLUSTER % 8 == 0, "pairs of column blocks; whole swizzle atoms");
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* u / (1 + e^-..) for two values with one reciprocal: 1/p = q / (p q). The exponent is capped so that p q stays finite; a
 * capped result is below 2^-59 |u|. */
template <int ACT> static __device__ __forceinline__ void activate2(float &u, float &v) {
    if (ACT == RF_ACT_NONE) return;
    float p, q;
    if (ACT == RF_ACT_GELU_TANH) { /* -2 sqrt(2/pi) log2(e) (u + 0.044715 u^3) */
        p = u * fmaf(-0.10294324f, u * u, -2.3022082f);
        q = v * fmaf(-0.10294324f, v * v, -2.3022082f);
    } else { /* SiLU */
        p = -1.4426950f * u;
        q = -1.4426950f * v;
    }
    p = 1.0f + rf_fast_exp2(fminf(p, 60.0f));
    q = 1.0f + rf_fast_exp2(fminf(q, 60.0f));
    const float r = rf_fast_reciprocal(p * q);
    u *= q * r;
    v *= p * r;
}

/* Lane i of four gives words w[0..3] and gets word i of all four. */
static __device__ __forceinline__ void transpose4(uint32_t w[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
        w[i] = odd ? got : w[i];
        w[i + 1] = odd ? w[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + 2], 2);
        w[i] = high ? got : w[i];
        w[i + 2] = high ? w[i + 2] : got;
    }
}

static __device__ __forceinline__ float2 load2(const float *p) {
    return *(const float2 *)p;
}
static __device__ __forceinline__ float2 load2(const rf_bf16 *p) {
    const uint32_t word = *(const uint32_t *)p;
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

/* v = the accumulators of columns 16 u.. + 15, 4 a row: v[4 r + 2 b + c] is column 8 b + c of row 64 (r / 2) + 8 (r % 2), as
 * seen from the lane's first. A jump to moves, because registers cannot be indexed: the epilogue stays a small loop. */
template <int BN>
static __device__ __forceinline__ void take_unit(float (&v)[16], const float (&acc)[2][BN / 2], int u) {
#define RF_UNIT(U)                                                                                                     \
    case U:                                                                                                            \
        if (U < BN / 16) {                                                                                             \
            _Pragma("unroll") for (int i = 0; i < 16; i++) v[i] =                                                      \
                acc[i / 8][(4 * (2 * U + i / 2 % 2) + 2 * (i / 4 % 2) + i % 2) % (BN / 2)];                            \
        }                                                                                                              \
        break
    switch (u) {
        RF_UNIT(0);
        RF_UNIT(1);
        RF_UNIT(2);
        RF_UNIT(3);
        RF_UNIT(4);
        RF_UNIT(5);
        RF_UNIT(6);
        RF_UNIT(7);
        RF_UNIT(8);
        RF_UNIT(9);
        RF_UNIT(10);
        RF_UNIT(11);
    }
#undef RF_UNIT
}

/* A warp's rows row.. + 15 and row + 64.. + 15 from the accumulators of two wgmma of 64 x BN. */
template <int BN, typename T, int ACT>
static __device__ __forceinline__ void store_tile(const epilogue_args &e, const float (&acc)[2][BN / 2], int row,
                                                  int col0, int lane) {
    static_assert(BN % 16 == 0 && BN <= 192, "take_unit's cases");
    const T *bias = (const T *)e.bias, *y0 = (const T *)e.y0;
    T *y = (T *)e.y;
    const int pair = 2 * (lane & 3); /* the lane's columns of a block of 8 */
    row += lane / 4;
    constexpr bool ahead = sizeof(T) == 2; /* f32 addresses leave no registers for it */
    float2 next[2] = {make_float2(0.0f, 0.0f), make_float2(0.0f, 0.0f)};
    if (ahead && bias)
        for (int b = 0; b < 2; b++)
            if (col0 + 8 * b < e.n) next[b] = load2(bias + col0 + 8 * b + pair);
#pragma unroll 1
    for (int u = 0; u < BN / 16; u++) {
        int base = row, col = col0 + 16 * u;
        asm volatile("" : "+r"(base), "+r"(col)); /* addresses are made anew: kept, they would not fit beside acc */
        float2 add[2] = {next[0], next[1]};
        if (!ahead && bias)
            for (int b = 0; b < 2; b++)
                if (col + 8 * b < e.n) add[b] = load2(bias + col + 8 * b + pair);
        float v[16];
        take_unit<BN>(v, acc, u);
#pragma unroll
        for (int b = 0; b < 2; b++) /* the next unit's, early */
            if (ahead && bias && u + 1 < BN / 16 && col + 16 + 8 * b < e.n)
                next[b] = load2(bias + col + 16 + 8 * b + pair);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[2 * i] = fmaf(e.alpha, v[2 * i], add[i % 2].x);
            v[2 * i + 1] = fmaf(e.alpha, v[2 * i + 1], add[i % 2].y);
            activate2<ACT>(v[2 * i], v[2 * i + 1]);
        }
        if (y0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at_row = base + 64 * (i / 4) + 8 * (i / 2 % 2), at_col = col + 8 * (i % 2);
                if (at_row < e.m && at_col < e.n) {
                    const float2 old = load2(y0 + (int64_t)at_row * e.ldy + at_col + pair);
                    v[2 * i] = fmaf(e.beta, old.x, v[2 * i]);
                    v[2 * i + 1] = fmaf(e.beta, old.y, v[2 * i + 1]);
                }
            }
        }
        if (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at_row = base + 64 * (i / 4) + 8 * (i / 2 % 2), at_col = col + 8 * (i % 2);
                if (at_row < e.m && at_col < e.n)
                    *(float2 *)(y + (int64_t)at_row * e.ldy + at_col + pair) = make_float2(v[2 * i], v[2 * i + 1]);
            }
        } else {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t w[4]; /* two blocks of a row, the same of the row 8 below */
#pragma unroll
                for (int i = 0; i < 4; i++) w[i] = rf_pack_bf16(v[8 * h + 2 * i], v[8 * h + 2 * i + 1]);
                transpose4(w, lane);
                const int at_row = base + 64 * h + 4 * (lane & 2), at_col = col + 8 * (lane & 1);
                if (at_row < e.m && at_col < e.n)
                    *(uint4 *)(y + (int64_t)at_row * e.ldy + at_col) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}

/* First row and column of a cluster's tile, in the same order as gemm_kernel's. tiles_m counts rows of a cluster. */
static __device__ __forceinline__ void pp_place(const epilogue_args &e, int tile, int *tile_m, int *tile_n) {
    const int group_tiles = GROUP_ROWS * e.tiles_n, group = tile / group_tiles, in_group = tile % group_tiles;
    const int group_rows = min(GROUP_ROWS, e.tiles_m - group * GROUP_ROWS);
    *tile_m = group * GROUP_ROWS + in_group % group_rows;
    *tile_n = in_group / group_rows;
}

#endif

/* nvcc refuses the attribute for other architectures, where the body is a trap. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RF_CLUSTER_DIMS(n) __cluster_dims__(n, 1, 1)
#else
#define RF_CLUSTER_DIMS(n)
#endif

template <int BN, int STAGES, int CLUSTER, typename T>
static __global__ void RF_CLUSTER_DIMS(CLUSTER) __launch_bounds__(PP_THREADS, 1)
    pingpong_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
                    const epilogue_args e) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef pp_tile<BN, STAGES, CLUSTER> shape;
    extern __shared__ uint8_t shared_raw[];
    __shared__ uint64_t full_bars[STAGES], empty_bars[STAGES], turn_bars[2];
    const uint32_t ring = (rf_shared_addr(shared_raw) + 1023u) & ~1023u; /* stage s: x tile, then w tile */
    const uint32_t full = rf_shared_addr(full_bars), empty = rf_shared_addr(empty_bars);
    const uint32_t turn = rf_shared_addr(turn_bars);
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const uint32_t rank = CLUSTER > 1 ? rf_cluster_rank() : 0;
    const int first_tile = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER, num_tiles = e.tiles_m * e.tiles_n;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            rf_mbar_init(full + 8 * s, 1);
            rf_mbar_init(empty + 8 * s, 4 * CLUSTER);
        }
        rf_mbar_init(turn, 4);
        rf_mbar_init(turn + 8, 4);
        rf_mbar_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) rf_cluster_sync(); /* every block's barriers are ready for every other block and for TMA */

    if (warp >= 8) { /* producer */
        rf_registers_lower<24>();
        if (warp == 8 && lane == 0) {
            rf_tma_prefetch_map(&map_x);
            rf_tma_prefetch_map(&map_w);
            int s = 0;
            uint32_t parity = 1; /* the ring starts empty */
            for (int tile = first_tile; tile < num_tiles; tile += num_clusters) {
                int tile_m, tile_n;
                pp_place(e, tile, &tile_m, &tile_n);
                const int row0 = (tile_m * CLUSTER + (int)rank) * PP_ROWS;
                const int col0 = tile_n * BN + (int)rank * (BN / CLUSTER);
                for (int kb = 0; kb < e.num_k_blocks; kb++) {
                    rf_mbar_wait(empty + 8 * s, parity, "gemm empty");
                    const uint32_t stage = ring + s * shape::stage_bytes;
                    const uint32_t w = stage + shape::x_bytes + rank * (BN / CLUSTER * BK * 2);
                    rf_mbar_arrive_expect(full + 8 * s, shape::stage_bytes);
                    if (CLUSTER > 1)
                        rf_tma_load_2d_to(w, &map_w, kb * BK, col0, full + 8 * s, (1 << CLUSTER) - 1);
                    else
                        rf_tma_load_2d(w, &map_w, kb * BK, col0, full + 8 * s);
                    rf_tma_load_2d(stage, &map_x, kb * BK, row0, full + 8 * s);
                    if (++s == STAGES) {
                        s = 0;
                        parity ^= 1;
                    }
                }
            }
        }
        __syncwarp();
    } else {
        rf_registers_raise<240>();
        const int consumer = warp / 4;
        for (uint32_t index = consumer;; index += 2) { /* of the block's tiles */
            const int tile = first_tile + (int)index * num_clusters;
            if (tile >= num_tiles) break;
            /* Where the ring stands: every earlier tile took num_k_blocks stages. Consumer 0's first turn needs no arrival. */
            const uint32_t blocks_before = index * (uint32_t)e.num_k_blocks;
            int s = (int)(blocks_before % STAGES);
            uint32_t parity = blocks_before / STAGES & 1;
            float acc[2][BN / 2];
#pragma unroll
            for (int i = 0; i < BN / 2; i++) acc[0][i] = acc[1][i] = 0.0f;
            rf_mbar_wait(turn + 8 * consumer, (index / 2 + (consumer == 0)) & 1, "gemm turn");
            int previous = 0;
#pragma unroll 1
            for (int kb = 0; kb < e.num_k_blocks; kb++) {
                rf_mbar_wait(full + 8 * s, parity, "gemm full");
                const uint32_t stage = ring + s * shape::stage_bytes;
                const uint64_t a = rf_wgmma_desc(stage), b = rf_wgmma_desc(stage + shape::x_bytes);
                rf_wgmma_pin(acc[0]);
                rf_wgmma_pin(acc[1]);
                rf_wgmma_fence();
#pragma unroll
                for (int k = 0; k < BK / 16; k++) {
                    rf_wgmma<BN>::mma(acc[0], a + 2 * k, b + 2 * k);
                    rf_wgmma<BN>::mma(acc[1], a + 64 * BK * 2 / 16 + 2 * k, b + 2 * k);
                }
                rf_wgmma_commit();
                rf_wgmma_wait<1>(); /* the previous stage's batch has finished reading */
                rf_wgmma_pin(acc[0]);
                rf_wgmma_pin(acc[1]);
                if (kb > 0 && lane < CLUSTER) {
                    if (CLUSTER > 1)
                        rf_mbar_arrive_at(empty + 8 * previous, (uint32_t)lane);
                    else
                        rf_mbar_arrive(empty + 8 * previous);
                }
                previous = s;
                if (++s == STAGES) {
                    s = 0;
                    parity ^= 1;
                }
            }
            if (lane == 0) rf_mbar_arrive(turn + 8 * (consumer ^ 1));
            rf_wgmma_wait<0>();
            rf_wgmma_pin(acc[0]);
            rf_wgmma_pin(acc[1]);
            if (lane < CLUSTER) {
                if (CLUSTER > 1)
                    rf_mbar_arrive_at(empty + 8 * previous, (uint32_t)lane);
                else
                    rf_mbar_arrive(empty + 8 * previous);
            }

            int tile_m, tile_n;
            pp_place(e, tile, &tile_m, &tile_n);
            const int row = (tile_m * CLUSTER + (int)rank) * PP_ROWS + warp % 4 * 16, col0 = tile_n * BN;
            switch (e.act) {
            case RF_ACT_GELU_TANH: store_tile<BN, T, RF_ACT_GELU_TANH>(e, acc, row, col0, lane); break;
            case RF_ACT_SILU: store_tile<BN, T, RF_ACT_SILU>(e, acc, row, col0, lane); break;
            default: store_tile<BN, T, RF_ACT_NONE>(e, acc, row, col0, lane); break;
            }
        }
        __syncwarp();
    }
    if (CLUSTER > 1) rf_cluster_sync(); /* no block leaves while another still writes to it */
#else
    __trap(); /* rf_gemm_wgmma_check keeps other architectures away */
#endif
}

/* --- host ------------------------------------------------------------------------------------------------------------ */

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver, so that nothing links against it; looked up once. */
static encode_fn get_encode(void) {
    static std::atomic<void *> found{NULL};
    void *fn = found.load(std::memory_order_acquire);
    if (!fn) {
        cudaDriverEntryPointQueryResult result;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &result) !=
                cudaSuccess ||
            result != cudaDriverEntryPointSuccess)
            return NULL;
        found.store(fn, std::memory_order_release);
    }
    return (encode_fn)fn;
}

/* Row-major bf16 [rows, cols] in boxes of box_rows x BK. */
static rf_status make_map(CUtensorMap *map, const void *p, int64_t rows, int64_t cols, int64_t ld, int box_rows,
                          rf_error *err) {
    const encode_fn encode = get_encode();
    if (!encode) return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm: this driver has no cuTensorMapEncodeTiled");
    const cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)ld * 2};
    const cuuint32_t box[2] = {BK, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUresult r = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return rf_fail(err, RF_ERR_DEVICE, "gemm: cuTensorMapEncodeTiled failed with code %d", (int)r);
    return RF_OK;
}

static epilogue_args make_epilogue(const rf_gemm_args *a, int tile_rows, int tile_cols) {
    epilogue_args e;
    e.bias = a->bias;
    e.y0 = a->beta != 0.0f ? a->y0 : NULL;
    e.y = a->y;
    e.m = (int)a->m;
    e.n = (int)a->n;
    e.num_k_blocks = (int)rf_ceil_div(a->k, BK);
    e.tiles_m = (int)rf_ceil_div(a->m, tile_rows);
    e.tiles_n = (int)rf_ceil_div(a->n, tile_cols);
    e.ldy = a->ldy;
    e.alpha = a->alpha;
    e.beta = a->beta;
    e.act = a->act;
    return e;
}

template <int BM, int BN, int STAGES, int BLOCKS_PER_SM, typename T>
static rf_status launch(rf_stream *stream, const rf_gemm_args *a, rf_error *err) {
    typedef tile<BM, BN, STAGES> shape;
    static_assert(BM % 64 == 0 && BM <= 256 && BN % 8 == 0 && BN <= 256, "limits of wgmma and of a TMA box");
    static_assert(BLOCKS_PER_SM * (shape::shared_bytes + 16 * STAGES + 1024) <= 228 * 1024, "shared memory of an SM");
    static std::atomic<uint64_t> allowed{0};
    void (*kernel)(CUtensorMap, CUtensorMap, epilogue_args) = gemm_kernel<BM, BN, STAGES, BLOCKS_PER_SM, T>;
    CUtensorMap map_x, map_w;
    rf_status st = make_map(&map_x, a->x, a->m, a->k, a->ldx, BM, err);
    if (st == RF_OK) st = make_map(&map_w, a->w, a->n, a->k, a->ldw, BN, err);
    if (st != RF_OK) return st;
    const cudaError_t code = rf_allow_shared((const void *)kernel, shape::shared_bytes, &allowed);
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_wgmma", code);

    const epilogue_args e = make_epilogue(a, BM, BN);
    return rf_launch(stream, "gemm_wgmma", err, kernel, (unsigned)((int64_t)e.tiles_m * e.tiles_n), shape::threads,
                     shape::shared_bytes, map_x, map_w, e);
}

template <int BN, int STAGES, int CLUSTER, typename T>
static rf_status launch_pingpong(rf_stream *stream, const rf_gemm_args *a, rf_error *err) {
    typedef pp_tile<BN, STAGES, CLUSTER> shape;
    static_assert(shape::shared_bytes + 16 * STAGES + 16 <= 227 * 1024, "shared memory of a block");
    static std::atomic<uint64_t> allowed{0};
    void (*kernel)(CUtensorMap, CUtensorMap, epilogue_args) = pingpong_kernel<BN, STAGES, CLUSTER, T>;
    CUtensorMap map_x, map_w;
    rf_status st = make_map(&map_x, a->x, a->m, a->k, a->ldx, PP_ROWS, err);
    if (st == RF_OK) st = make_map(&map_w, a->w, a->n, a->k, a->ldw, BN / CLUSTER, err);
    if (st != RF_OK) return st;
    const cudaError_t code = rf_allow_shared((const void *)kernel, shape::shared_bytes, &allowed);
    if (code != cudaSuccess) return rf_cuda_fail(err, "gemm_wgmma", code);

    const epilogue_args e = make_epilogue(a, PP_ROWS * CLUSTER, BN);
    const int64_t num_tiles = (int64_t)e.tiles_m * e.tiles_n;
    const int64_t room = rf_backend_num_sms(rf_stream_backend(stream)) / CLUSTER;
    const int64_t clusters = num_tiles < room ? num_tiles : room < 1 ? 1 : room;
    return rf_launch(stream, "gemm_wgmma", err, kernel, (unsigned)(clusters * CLUSTER), PP_THREADS, shape::shared_bytes,
                     map_x, map_w, e);
}

/* Order is part of the tuning file's meaning: append, do not reorder. */
static const struct {
    const char *name;
    int bm, bn; /* rows and columns of a block's tile */
    bool pingpong;
    rf_status (*run_bf16)(rf_stream *, const rf_gemm_args *, rf_error *);
    rf_status (*run_f32)(rf_stream *, const rf_gemm_args *, rf_error *);
} configs[] = {
    {"64x72", 64, 72, false, launch<64, 72, 6, 2, rf_bf16>, launch<64, 72, 6, 2, float>},
    {"64x144", 64, 144, false, launch<64, 144, 4, 2, rf_bf16>, launch<64, 144, 4, 2, float>},
    {"128x112", 128, 112, false, launch<128, 112, 7, 1, rf_bf16>, launch<128, 112, 7, 1, float>},
    {"128x144", 128, 144, false, launch<128, 144, 6, 1, rf_bf16>, launch<128, 144, 6, 1, float>},
    {"128x128", 128, 128, false, launch<128, 128, 6, 1, rf_bf16>, launch<128, 128, 6, 1, float>},
    {"128x192", 128, 192, false, launch<128, 192, 5, 1, rf_bf16>, launch<128, 192, 5, 1, float>},
    {"128x256", 128, 256, false, launch<128, 256, 4, 1, rf_bf16>, launch<128, 256, 4, 1, float>},
    {"pp192c2", 128, 192, true, launch_pingpong<192, 5, 2, rf_bf16>, launch_pingpong<192, 5, 2, float>},
    {"pp144c2", 128, 144, true, launch_pingpong<144, 6, 2, rf_bf16>, launch_pingpong<144, 6, 2, float>},
    {"pp128c2", 128, 128, true, launch_pingpong<128, 6, 2, rf_bf16>, launch_pingpong<128, 6, 2, float>},
    {"pp192", 128, 192, true, launch_pingpong<192, 5, 1, rf_bf16>, launch_pingpong<192, 5, 1, float>},
    {"pp128", 128, 128, true, launch_pingpong<128, 6, 1, rf_bf16>, launch_pingpong<128, 6, 1, float>},
};
#define NUM_CONFIGS (int)(sizeof configs / sizeof configs[0])

extern "C" int rf_gemm_wgmma_num_configs(void) {
    return NUM_CONFIGS;
}

extern "C" const char *rf_gemm_wgmma_config_name(int config) {
    return config >= 0 && config < NUM_CONFIGS ? configs[config].name : NULL;
}

extern "C" rf_status rf_gemm_wgmma_check(rf_stream *stream, const rf_gemm_args *a, int config, rf_error *err) {
    if (config < 0 || config >= NUM_CONFIGS)
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_wgmma: config %d, there are %d", config, NUM_CONFIGS);
    if (rf_backend_sm(rf_stream_backend(stream)) != 90)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_wgmma: compute capability %d, needs 9.0",
                       rf_backend_sm(rf_stream_backend(stream)));
    if (a->dtype != RF_DTYPE_BF16 || (a->y_dtype != RF_DTYPE_BF16 && a->y_dtype != RF_DTYPE_F32))
        return rf_fail(err, RF_ERR_DTYPE, "gemm_wgmma: %s -> %s", rf_dtype_name(a->dtype), rf_dtype_name(a->y_dtype));
    if (a->w_is_kn || a->num_batches != 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_wgmma: one batch and w as [n, k] only");
    if (a->m < 1 || a->n < 1 || a->k < 1 || a->m > INT32_MAX / 2 || a->n > INT32_MAX / 2 || a->k > INT32_MAX / 2 ||
        a->k % 8 != 0 || a->n % 8 != 0 || a->ldx % 8 != 0 || a->ldw % 8 != 0 || a->ldy % 8 != 0)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_wgmma: n, k and the row strides must be multiples of 8");
    if (!rf_is_aligned(a->x, 16) || !rf_is_aligned(a->w, 16) || !rf_is_aligned(a->y, 16) || !rf_is_aligned(a->y0, 16) ||
        !rf_is_aligned(a->bias, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "gemm_wgmma: operands must be on 16-byte addresses");
    if (configs[config].pingpong && a->act == RF_ACT_GELU_ERF)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm_wgmma: no erf GELU in the ping-pong kernels");
    if (rf_ceil_div(a->m, configs[config].bm) * rf_ceil_div(a->n, configs[config].bn) > INT32_MAX / 2)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_wgmma: too many tiles");
    return RF_OK;
}

extern "C" rf_status rf_gemm_wgmma_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err) {
    const rf_status st = rf_gemm_wgmma_check(stream, args, config, err);
    if (st != RF_OK) return st;
    return (args->y_dtype == RF_DTYPE_F32 ? configs[config].run_f32 : configs[config].run_bf16)(stream, args, err);
}
