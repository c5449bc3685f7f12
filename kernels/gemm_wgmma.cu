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

    epilogue_args e;
    e.bias = a->bias;
    e.y0 = a->beta != 0.0f ? a->y0 : NULL;
    e.y = a->y;
    e.m = (int)a->m;
    e.n = (int)a->n;
    e.num_k_blocks = (int)rf_ceil_div(a->k, BK);
    e.tiles_m = (int)rf_ceil_div(a->m, BM);
    e.tiles_n = (int)rf_ceil_div(a->n, BN);
    e.ldy = a->ldy;
    e.alpha = a->alpha;
    e.beta = a->beta;
    e.act = a->act;
    return rf_launch(stream, "gemm_wgmma", err, kernel, (unsigned)((int64_t)e.tiles_m * e.tiles_n), shape::threads,
                     shape::shared_bytes, map_x, map_w, e);
}

/* Order is part of the tuning file's meaning: append, do not reorder. */
static const struct {
    const char *name;
    int bm, bn;
    rf_status (*run_bf16)(rf_stream *, const rf_gemm_args *, rf_error *);
    rf_status (*run_f32)(rf_stream *, const rf_gemm_args *, rf_error *);
} configs[] = {
    {"64x72", 64, 72, launch<64, 72, 6, 2, rf_bf16>, launch<64, 72, 6, 2, float>},
    {"64x144", 64, 144, launch<64, 144, 4, 2, rf_bf16>, launch<64, 144, 4, 2, float>},
    {"128x112", 128, 112, launch<128, 112, 7, 1, rf_bf16>, launch<128, 112, 7, 1, float>},
    {"128x144", 128, 144, launch<128, 144, 6, 1, rf_bf16>, launch<128, 144, 6, 1, float>},
    {"128x128", 128, 128, launch<128, 128, 6, 1, rf_bf16>, launch<128, 128, 6, 1, float>},
    {"128x192", 128, 192, launch<128, 192, 5, 1, rf_bf16>, launch<128, 192, 5, 1, float>},
    {"128x256", 128, 256, launch<128, 256, 4, 1, rf_bf16>, launch<128, 256, 4, 1, float>},
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
    if (rf_ceil_div(a->m, configs[config].bm) * rf_ceil_div(a->n, configs[config].bn) > INT32_MAX)
        return rf_fail(err, RF_ERR_SHAPE, "gemm_wgmma: too many tiles");
    return RF_OK;
}

extern "C" rf_status rf_gemm_wgmma_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err) {
    const rf_status st = rf_gemm_wgmma_check(stream, args, config, err);
    if (st != RF_OK) return st;
    return (args->y_dtype == RF_DTYPE_F32 ? configs[config].run_f32 : configs[config].run_bf16)(stream, args, err);
}
