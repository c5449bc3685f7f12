/* kernels/attention_wgmma.cu - attention on Hopper's warpgroup tensor cores, for dense keys.
 * Maths    As attention_mma.cu: online softmax over tiles of keys, p = 2^(c s - c m), c = scale log2 e; out = o / l,
 *          lse = (c m + log2 l) ln 2.
 * Shapes   q, k, v, out bf16, head_dim 64, 72 or 128; no lists, at most one range; query heads may share key heads.
 *          head_dim 72 is exact in P V (n = 72) and padded to 80 by one zero chunk in Q K^T.
 * Limits   kv_lens and masks are an instance of their own (LIMITS): query i sees the first limit(i) keys, and limits do not
 *          fall from one query to the next. An item walks the keys that its last row sees; keys from there on are zeros in
 *          shared memory, so that a stale or unseen V row cannot spoil 0 * v. Tiles below the limit of a warp's first row
 *          take no mask. A row's bits do not depend on the other rows of its item: a tile of which it sees nothing scales
 *          by 1 and adds 0; and they are those of the instance without limits where nothing is hidden.
 * Launch   An item is a tile of 64 * WGS query rows of one head of one sample. Two forms:
 *          resident  one warpgroup, all keys in shared memory (two tiles), a block per item: every warp copies, then
 *                    computes. For short sequences in grids that do not fill the card.
 *          ring      two warpgroups of 64 rows and four producer warps; as many blocks as SMs, each walks over items. The
 *                    producers run ahead into the next item (two stages of Q, two or three of K and V), so that loads,
 *                    products and stores of neighbouring items overlap.
 *          With limits the items are dealt out there and back (0..G-1, G-1..0, ...), in sections of as many heads as keep
 *          their keys in L2. Inside a section row tiles of like length follow each other, in one section from the last row
 *          tile to the first, in the next back again: weights change slowly, so that what a block gets evens out, and the
 *          shortest items come last.
 * Shared   Columns go in blocks of 64 with the 128-byte swizzle: [row][128 bytes], chunk c of row r at chunk c ^ (r & 7); one
 *          block serves Q and K as K-major operands and V as an MN-major one, and a row's copy fills a whole 128-byte line.
 *          The ninth chunk of head_dim 72: Q and K keep it in a plane [row][16 bytes] without swizzle (eight rows are a core
 *          matrix) with a plane of zeros behind it; V in a second block, of which only that chunk exists, so that P V is one
 *          product of n = 72.
 *          (Planes for all chunks are correct too, but cp.async writes 16 bytes a cycle into them: twice as slow.)
 * Order    K and V have barriers of their own, because P V of a tile runs one step behind its Q K^T:
 *          S_j = Q K_j is issued before O += P_{j-1} V_{j-1}, and softmax of S_j runs under the latter.
 *          cp.async writes are made visible to wgmma by the consumers' proxy fence after the barrier.
 * Arch     sm_90a; elsewhere the file holds the refusal only. Checked  tests/kernels against the CPU definition. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/wgmma.cuh"

static constexpr int KEYS = 128; /* keys of a tile */

template <int HD, int WGS, int PRODUCERS> struct wg_shape {
    static constexpr int BLOCKS = HD / 64;     /* of 64 columns */
    static constexpr bool TAIL = HD % 64 != 0; /* and 8 more */
    static constexpr int ROWS = 64 * WGS;
    static constexpr int STAGES = PRODUCERS == 0 || HD == 128 ? 2 : 3; /* of K and V */
    static constexpr int Q_STAGES = PRODUCERS == 0 ? 1 : 2;
    static constexpr int Q_BLOCK = ROWS * 128, KV_BLOCK = KEYS * 128;
    static constexpr int Q_PLANE = ROWS * 16, KV_PLANE = KEYS * 16;
    static constexpr int Q_BYTES = BLOCKS * Q_BLOCK + (TAIL ? 2 * Q_PLANE : 0);
    static constexpr int K_BYTES = BLOCKS * KV_BLOCK + (TAIL ? 2 * KV_PLANE : 0);
    static constexpr int V_BYTES = (BLOCKS + TAIL) * KV_BLOCK;
    static_assert(HD % 64 == 0 || HD % 64 == 8, "at most one chunk is left");
    static_assert(Q_BYTES % 1024 == 0 && K_BYTES % 1024 == 0 && V_BYTES % 1024 == 0, "swizzle atoms");
    static constexpr int BARRIERS_BYTES = 1024;
    static constexpr int SHARED_BYTES = BARRIERS_BYTES + Q_STAGES * Q_BYTES + STAGES * (K_BYTES + V_BYTES);
    static constexpr bool RESIDENT = PRODUCERS == 0;
    static constexpr int COPIERS = RESIDENT ? WGS * 4 : PRODUCERS; /* warps that copy */
    static constexpr int THREADS = WGS * 128 + PRODUCERS * 32;
    static constexpr int BLOCKS_PER_SM = RESIDENT && HD <= 72 ? 2 : 1;
    /* head_dim 128 in two warpgroups needs more registers than an even split of the SM gives: the producers hand over most
     * of theirs. */
    static constexpr bool MOVES_REGISTERS = HD == 128 && WGS == 2;
};

/* The items of a launch. LIMITS: sections of section_pairs (head, sample) pairs, the last one may be smaller. */
typedef struct {
    int num_items, section_pairs, num_sections;
} wg_grid;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* --- instructions ------------------------------------------------------------------------------------------------- */

/* 128-byte swizzle, MN-major: `leading` bytes to the next 64 columns, 1024 to the next eight keys. */
static __device__ __forceinline__ uint64_t values_desc(uint32_t addr, uint32_t leading) {
    return (uint64_t)((addr & 0x3ffffu) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
/* No swizzle; offsets in bytes. */
static __device__ __forceinline__ uint64_t plain_desc(uint32_t addr, uint32_t leading, uint32_t stride) {
    return (uint64_t)((addr & 0x3ffffu) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32;
}
/* Arrives on bar once every earlier cp.async of this thread has landed; counts as one of its expected arrivals. */
static __device__ __forceinline__ void copies_arrive(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void fence_async_proxy(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
static __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/* d = (first ? 0 : d) + A B^T: A 64 x 16 and B 128 x 16, both K-major in shared memory. */
static __device__ __forceinline__ void scores_add(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, 0;\n"
                 "}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
                   "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                   "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
                   "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
                   "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]),
                   "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]),
                   "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "l"(a), "l"(b), "r"(accumulate));
}

/* d += A B, A 64 x 16 in registers (four pairs a thread), B 16 x N in shared memory, N contiguous ("MN-major"). */
template <int N> struct product;
template <> struct product<64> {
    static __device__ __forceinline__ void add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                     "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                       "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                       "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};
template <> struct product<72> {
    static __device__ __forceinline__ void add(float (&d)[36], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35}, "
                     "{%36, %37, %38, %39}, %40, 1, 1, 1, 1;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                       "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                       "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};
template <> struct product<128> {
    static __device__ __forceinline__ void add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                     "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                       "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                       "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                       "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                       "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
                       "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),
                       "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
                       "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
                       "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

/* --- copies ----------------------------------------------------------------------------------------------------- */

/* COPIERS warps copy rows [first, first + ROWS) of a matrix into a tile; this is one of them. Rows from `limit` on are
 * zeros. Eight lanes copy a row of a block. */
template <int HD, int ROWS, int COPIERS, int TAIL_LD>
static __device__ __forceinline__ void copy_rows(uint32_t dst, const rf_bf16 *base, int64_t row_stride, int first,
                                                 int limit, int copier, int lane) {
    static_assert(ROWS % (4 * COPIERS) == 0 && ROWS % 32 == 0, "whole passes");
    const int r = copier * 4 + (lane >> 3), c = lane & 7;
    const rf_bf16 *src = base + (int64_t)(first + r) * row_stride + c * 8;
    const int64_t step = 4 * COPIERS * row_stride;
#pragma unroll 4
    for (int g = 0; g < ROWS / 4 / COPIERS; g++) {
        const int row = g * 4 * COPIERS + r;
        const bool inside = first + row < limit;
#pragma unroll
        for (int block = 0; block < HD / 64; block++)
            copy16(dst + block * ROWS * 128 + row * 128 + ((c ^ (row & 7)) << 4), inside ? src + block * 64 : base,
                   inside ? 16 : 0);
        src += step;
    }
    if constexpr (HD % 64 != 0) {
        const uint32_t plane = dst + HD / 64 * ROWS * 128;
        for (int i = copier; i < ROWS / 32; i += COPIERS) {
            const int row = i * 32 + lane;
            const bool inside = first + row < limit;
            copy16(plane + row * TAIL_LD + (TAIL_LD == 128 ? (row & 7) << 4 : 0),
                   inside ? base + (int64_t)(first + row) * row_stride + HD / 64 * 64 : base, inside ? 16 : 0);
        }
    }
}

/* --- items and limits --------------------------------------------------------------------------------------------- */

struct item_place {
    int row_tile, head, sample;
};

template <bool LIMITS>
static __device__ __forceinline__ item_place locate(const rf_attention_params &p, const wg_grid &grid, int item,
                                                    int q_tiles) {
    if constexpr (!LIMITS) {
        return {item % q_tiles, item / q_tiles % p.num_q_heads, item / q_tiles / p.num_q_heads};
    } else {
        const int section = item / (grid.section_pairs * q_tiles), first = section * grid.section_pairs;
        const int pairs = min(grid.section_pairs, p.num_q_heads * p.batch - first); /* of this section */
        const int at = item - first * q_tiles, step = at / pairs, pair = first + at - step * pairs;
        const bool falling = ((grid.num_sections - 1 - section) & 1) == 0; /* the last one does */
        return {falling ? q_tiles - 1 - step : step, pair % p.num_q_heads, pair / p.num_q_heads};
    }
}

/* The items of this block. LIMITS: the even rounds of the grid run upwards, the odd ones downwards. */
template <bool LIMITS> struct item_walk {
    int item = blockIdx.x, round_end = gridDim.x;
    __device__ __forceinline__ void next(void) {
        if constexpr (LIMITS) {
            item = round_end + (round_end - 1 - item);
            round_end += gridDim.x;
        } else {
            item += gridDim.x;
        }
    }
};

/* First key row that the query at position pos does not see. */
static __device__ __forceinline__ int key_limit(const rf_attention_params &p, int64_t pos) {
    if (p.mask == RF_MASK_NONE) return INT_MAX;
    if (pos < 0) return 0;
    const uint32_t at = pos < INT_MAX ? (uint32_t)pos : INT_MAX, block = (uint32_t)p.causal_block;
    const uint32_t limit = p.mask == RF_MASK_CAUSAL ? at + 1 : (at / block + 1) * block; /* at most 2^32 - 2 */
    return limit < INT_MAX ? (int)limit : INT_MAX;
}

/* What limits the queries of one sample; kept while items are of the same sample. */
struct sample_limits {
    int sample = -1, len = 0;
    int64_t pos_offset = 0;
    __device__ __forceinline__ void load(const rf_attention_params &p, int next) {
        if (next == sample) return;
        sample = next;
        len = p.kv_lens ? max(0, min(p.kv_lens[next], p.num_keys)) : p.num_keys;
        pos_offset = (int64_t)p.q_pos_offset + (p.q_pos_offsets ? p.q_pos_offsets[next] : 0);
    }
    /* Keys that query `row` sees: those with index 0 .. this - 1. */
    __device__ __forceinline__ int keys_of(const rf_attention_params &p, int row) const {
        return max(0, min(key_limit(p, pos_offset + row) - p.first_key, len));
    }
};

/* --- kernel ------------------------------------------------------------------------------------------------------- */

/* A place in a ring of NUM stages; parity is the one a consumer waits for, a producer waits for the other. */
template <int NUM> struct ring_place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(void) {
        if (++stage == NUM) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int HD, int WGS, int PRODUCERS, bool LIMITS>
static __global__ void __launch_bounds__(wg_shape<HD, WGS, PRODUCERS>::THREADS,
                                         wg_shape<HD, WGS, PRODUCERS>::BLOCKS_PER_SM)
    attention_wgmma_kernel(const __grid_constant__ rf_attention_params p, const __grid_constant__ wg_grid grid) {
    using S = wg_shape<HD, WGS, PRODUCERS>;
    /* The next keys are waited for before P V is: without that branch between them the compiler moves the wait for P V above the
     * exponentials that should run under it. */
    constexpr bool AHEAD = LIMITS;
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t bars = rf_shared_addr(shared);
    const uint32_t q_smem = bars + S::BARRIERS_BYTES, k_smem = q_smem + S::Q_STAGES * S::Q_BYTES,
                   v_smem = k_smem + S::STAGES * S::K_BYTES;
    const uint32_t full_q = bars, free_q = full_q + 8 * S::Q_STAGES, full_k = free_q + 8 * S::Q_STAGES,
                   full_v = full_k + 8 * S::STAGES, free_k = full_v + 8 * S::STAGES, free_v = free_k + 8 * S::STAGES;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0),
              lane = threadIdx.x & 31; /* warp: a uniform register */
    const int all_tiles = (p.num_keys + KEYS - 1) / KEYS, q_tiles = (p.q_len + S::ROWS - 1) / S::ROWS;

    if (threadIdx.x == 0) {
        for (int s = 0; s < S::Q_STAGES; s++) {
            rf_mbar_init(full_q + 8 * s, S::COPIERS * 32);
            rf_mbar_init(free_q + 8 * s, 4 * WGS);
        }
        for (int s = 0; s < S::STAGES; s++) {
            rf_mbar_init(full_k + 8 * s, S::COPIERS * 32);
            rf_mbar_init(full_v + 8 * s, S::COPIERS * 32);
            rf_mbar_init(free_k + 8 * s, 4 * WGS);
            rf_mbar_init(free_v + 8 * s, 4 * WGS);
        }
        rf_mbar_init_fence();
    }
    if constexpr (S::TAIL) { /* the plane of zeros behind every stage of Q and K: copies never touch it */
        const uint4 zero = make_uint4(0, 0, 0, 0);
        unsigned char *const q_start = shared + S::BARRIERS_BYTES, *const k_start = q_start + S::Q_STAGES * S::Q_BYTES;
        for (int s = 0; s < S::Q_STAGES; s++)
            for (int i = threadIdx.x; i < S::ROWS; i += S::THREADS)
                ((uint4 *)(q_start + (s + 1) * S::Q_BYTES - S::Q_PLANE))[i] = zero;
        for (int s = 0; s < S::STAGES; s++)
            for (int i = threadIdx.x; i < KEYS; i += S::THREADS)
                ((uint4 *)(k_start + (s + 1) * S::K_BYTES - S::KV_PLANE))[i] = zero;
        fence_async_proxy();
    }
    __syncthreads(); /* barriers are set up, padding is written */
    rf_wait_for_previous();

    sample_limits limits;
    /* Keys that any row of an item sees. */
    auto item_keys = [&](const item_place &at) -> int {
        if constexpr (!LIMITS) return p.num_keys;
        limits.load(p, at.sample);
        return limits.keys_of(p, min((at.row_tile + 1) * S::ROWS, p.q_len) - 1);
    };
    auto copy_q = [&](int copier, const item_place &at, int stage) {
        const rf_bf16 *const q = (const rf_bf16 *)p.q + at.sample * p.q_batch_stride + at.head * p.q_head_stride;
        copy_rows<HD, S::ROWS, S::COPIERS, 16>(q_smem + stage * S::Q_BYTES, q, p.q_row_stride, at.row_tile * S::ROWS,
                                               p.q_len, copier, lane);
        copies_arrive(full_q + 8 * stage);
    };
    auto kv_offset = [&](const item_place &at) {
        return at.sample * p.kv_batch_stride + (int64_t)(at.head / p.group) * p.kv_head_stride +
               (int64_t)p.first_key * p.kv_row_stride;
    };
    auto copy_k = [&](int copier, int64_t offset, int j, int keys, int stage) {
        copy_rows<HD, KEYS, S::COPIERS, 16>(k_smem + stage * S::K_BYTES, (const rf_bf16 *)p.k + offset, p.kv_row_stride,
                                            j * KEYS, keys, copier, lane);
        copies_arrive(full_k + 8 * stage);
    };
    auto copy_v = [&](int copier, int64_t offset, int j, int keys, int stage) {
        copy_rows<HD, KEYS, S::COPIERS, 128>(v_smem + stage * S::V_BYTES, (const rf_bf16 *)p.v + offset,
                                             p.kv_row_stride, j * KEYS, keys, copier, lane);
        copies_arrive(full_v + 8 * stage);
    };
    if constexpr (S::RESIDENT) { /* one item of at most STAGES tiles */
        const item_place place = locate<LIMITS>(p, grid, blockIdx.x, q_tiles);
        const int keys = item_keys(place), num_tiles = (keys + KEYS - 1) / KEYS;
        const int64_t offset = kv_offset(place);
        if (!LIMITS || num_tiles > 0) copy_q(warp, place, 0);
        for (int j = 0; j < num_tiles; j++) {
            copy_k(warp, offset, j, keys, j);
            copy_v(warp, offset, j, keys, j);
        }
    } else {
        if (warp >= WGS * 4) {
            if constexpr (S::MOVES_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            const int copier = warp - WGS * 4;
            ring_place<S::Q_STAGES> at_q;
            ring_place<S::STAGES> at;
            for (item_walk<LIMITS> walk; walk.item < grid.num_items; walk.next()) {
                const item_place place = locate<LIMITS>(p, grid, walk.item, q_tiles);
                const int keys = item_keys(place), num_tiles = (keys + KEYS - 1) / KEYS;
                if (LIMITS && num_tiles == 0) continue; /* the consumers wait for nothing either */
                rf_mbar_wait(free_q + 8 * at_q.stage, at_q.parity ^ 1, "free_q");
                copy_q(copier, place, at_q.stage);
                at_q.next();
                const int64_t offset = kv_offset(place);
                for (int j = 0; j < num_tiles; j++) {
                    rf_mbar_wait(free_k + 8 * at.stage, at.parity ^ 1, "free_k");
                    copy_k(copier, offset, j, keys, at.stage);
                    rf_mbar_wait(free_v + 8 * at.stage, at.parity ^ 1, "free_v");
                    copy_v(copier, offset, j, keys, at.stage);
                    at.next();
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory"); /* a block may not leave with copies under way */
            return;
        }
        if constexpr (S::MOVES_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    }

    /* consumers: thread t of a warpgroup holds rows 16 (t / 32) + t % 32 / 4, + 8 of its 64 */
    const int wg = warp >> 2;
    float o[HD / 2], sc[64];
    uint32_t pr[KEYS / 16][4];
    float m[2], l[2], alpha[2];
    ring_place<S::Q_STAGES> at_q;
    ring_place<S::STAGES> at_k, at_v; /* P V is a tile behind Q K^T */

    auto wait_full = [&](uint32_t bar, uint32_t parity, const char *name) {
        rf_mbar_wait(bar, parity, name);
        fence_async_proxy();
    };
    auto release = [&](uint32_t bar) {
        if (lane == 0) rf_mbar_arrive(bar);
    };
    auto wait_keys = [&]() { wait_full(full_k + 8 * at_k.stage, at_k.parity, "full_k"); };
    /* Queues S = Q K^T of the tile at at_k, as one group. */
    auto issue_scores = [&]() {
        if constexpr (!AHEAD) wait_keys();
        const uint32_t q_base = q_smem + at_q.stage * S::Q_BYTES, a = q_base + wg * 8192,
                       b = k_smem + at_k.stage * S::K_BYTES;
        rf_wgmma_pin(sc);
        rf_wgmma_pin(o);
        rf_wgmma_fence();
#pragma unroll
        for (int step = 0; step < S::BLOCKS * 4; step++)
            scores_add(sc, rf_wgmma_desc(a + step / 4 * S::Q_BLOCK + step % 4 * 32),
                       rf_wgmma_desc(b + step / 4 * S::KV_BLOCK + step % 4 * 32), step > 0);
        if constexpr (S::TAIL)
            scores_add(sc, plain_desc(q_base + S::BLOCKS * S::Q_BLOCK + wg * 1024, S::Q_PLANE, 128),
                       plain_desc(b + S::BLOCKS * S::KV_BLOCK, S::KV_PLANE, 128), 1);
        rf_wgmma_commit();
    };
    /* Queues O += P V of the tile at at_v, as one group. */
    auto issue_values = [&]() {
        wait_full(full_v + 8 * at_v.stage, at_v.parity, "full_v");
        rf_wgmma_fence();
        const uint32_t b = v_smem + at_v.stage * S::V_BYTES;
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            product<HD>::add(o, pr[step], values_desc(b + step * 2048, S::KV_BLOCK));
        }
        rf_wgmma_commit();
    };
    auto scores_done = [&](bool last) {
        rf_wgmma_pin(sc);
        release(free_k + 8 * at_k.stage);
        at_k.next();
        if (last) { /* of this item: Q is not read again */
            release(free_q + 8 * at_q.stage);
            at_q.next();
        }
    };
    auto values_done = [&]() {
        rf_wgmma_pin(o);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) /* the products have read P: only now may it change */
            asm volatile("" : "+r"(pr[step][0]), "+r"(pr[step][1]), "+r"(pr[step][2]), "+r"(pr[step][3])::"memory");
        release(free_v + 8 * at_v.stage);
        at_v.next();
    };
    struct item_state {
        item_place place;
        int num_tiles;
        int row_keys[2], free_keys; /* keys that this thread's two rows see; that every row of the warp sees */
    };
    auto row_of = [&](const item_place &at) { return at.row_tile * S::ROWS + wg * 64 + (warp & 3) * 16 + (lane >> 2); };
    auto look_up = [&](int item) {
        item_state state = {};
        state.place = locate<LIMITS>(p, grid, item, q_tiles);
        state.num_tiles = (item_keys(state.place) + KEYS - 1) / KEYS;
        const int row = row_of(state.place);
        state.row_keys[0] = limits.keys_of(p, row);
        state.row_keys[1] = limits.keys_of(p, row + 8);
        state.free_keys = __shfl_sync(0xffffffffu, state.row_keys[0], 0); /* of the warp's first row */
        return state;
    };
    item_walk<LIMITS> walk;
    item_state now = {};
    if constexpr (LIMITS) now = look_up(walk.item);
    /* sc := p of tile j, m and l move on; alpha is what o must be scaled by. */
    auto softmax = [&](int j) {
        if constexpr (LIMITS) {
            if ((j + 1) * KEYS > now.free_keys) {
                const int first = j * KEYS + (lane & 3) * 2;
                const int limit[2] = {now.row_keys[0] - first, now.row_keys[1] - first};
#pragma unroll
                for (int i = 0; i < 64; i++)
                    if (i / 4 * 8 + (i & 1) >= limit[i >> 1 & 1]) sc[i] = -INFINITY;
            }
        } else {
            const int limit = p.num_keys - j * KEYS;
            if (limit < KEYS) {
#pragma unroll
                for (int i = 0; i < 64; i++) {
                    const int key = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
                    if (key >= limit) sc[i] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = m[h];
#pragma unroll
            for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(sc[i + 2 * h], sc[i + 2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            const float base = LIMITS && top == -INFINITY ? 0.0f : top; /* a row that has seen no key: p is 0 */
            alpha[h] = exp2_approx((m[h] - base) * p.scale_log2);       /* 0 on the first tile */
            m[h] = top;
            const float shift = base * p.scale_log2;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 64; i += 4) {
                sc[i + 2 * h] = exp2_approx(fmaf(sc[i + 2 * h], p.scale_log2, -shift));
                sc[i + 2 * h + 1] = exp2_approx(fmaf(sc[i + 2 * h + 1], p.scale_log2, -shift));
                sum += sc[i + 2 * h] + sc[i + 2 * h + 1];
            }
            l[h] = l[h] * alpha[h] + sum;
        }
    };
    auto pack = [&]() {
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            const int i = step * 8;
            pr[step][0] = pack2(sc[i], sc[i + 1]);
            pr[step][1] = pack2(sc[i + 2], sc[i + 3]);
            pr[step][2] = pack2(sc[i + 4], sc[i + 5]);
            pr[step][3] = pack2(sc[i + 6], sc[i + 7]);
        }
    };

    while (walk.item < grid.num_items) {
        const int num_tiles = LIMITS ? now.num_tiles : all_tiles;
#pragma unroll
        for (int i = 0; i < HD / 2; i++) o[i] = 0.0f;
        m[0] = m[1] = -INFINITY;
        l[0] = l[1] = 0.0f;

        if (!LIMITS || num_tiles > 0) {
            wait_full(full_q + 8 * at_q.stage, at_q.parity, "full_q");
            if constexpr (AHEAD) wait_keys();
            issue_scores();
            rf_wgmma_wait<0>();
            scores_done(num_tiles == 1);
            softmax(0);
            pack();
            if (AHEAD && num_tiles > 1) wait_keys();
            for (int j = 1; j < num_tiles; j++) {
                issue_scores();
                issue_values();
                rf_wgmma_wait<1>();
                scores_done(j == num_tiles - 1);
                softmax(j);
                if constexpr (AHEAD) {
                    rf_wgmma_pin(sc); /* p, not what it is made of, passes the wait */
                    if (j + 1 < num_tiles) wait_keys();
                }
                rf_wgmma_wait<0>();
                values_done();
#pragma unroll
                for (int i = 0; i < HD / 2; i++) o[i] *= alpha[i >> 1 & 1];
                pack();
            }
            rf_wgmma_pin(o);
            issue_values();
        }
        item_state next = {};
        if constexpr (LIMITS) { /* under the last product */
            walk.next();
            if (walk.item < grid.num_items) next = look_up(walk.item);
        }
        rf_wgmma_wait<0>();
        if (!LIMITS || num_tiles > 0) values_done();

        const item_place place = LIMITS ? now.place : locate<LIMITS>(p, grid, walk.item, q_tiles);
        const int row = row_of(place);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = l[h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int r = row + 8 * h;
            const bool inside = r < p.q_len, empty = LIMITS && sum == 0.0f; /* NaN stays NaN */
            const float inv = empty ? 0.0f : 1.0f / sum;
            rf_bf16 *const out = (rf_bf16 *)p.out + place.sample * p.out_batch_stride + r * p.out_row_stride +
                                 place.head * p.out_head_stride;
#pragma unroll
            for (int c = 0; c < HD / 8; c++)
                if (inside)
                    *(uint32_t *)(out + c * 8 + (lane & 3) * 2) =
                        pack2(o[4 * c + 2 * h] * inv, o[4 * c + 2 * h + 1] * inv);
            if (p.lse && inside && (lane & 3) == 0)
                p.lse[((int64_t)place.sample * p.num_q_heads + place.head) * p.q_len + r] =
                    empty ? -INFINITY : (m[h] * p.scale_log2 + log2f(sum)) * 0.6931471805599453f;
        }
        if constexpr (LIMITS)
            now = next;
        else
            walk.next();
    }
}

#else /* another architecture: the name exists, rf_attention_wgmma_check keeps it from being launched */

template <int HD, int WGS, int PRODUCERS, bool LIMITS>
static __global__ void __launch_bounds__(wg_shape<HD, WGS, PRODUCERS>::THREADS)
    attention_wgmma_kernel(const __grid_constant__ rf_attention_params p, const __grid_constant__ wg_grid grid) {}

#endif

/* --- host --------------------------------------------------------------------------------------------------------- */

rf_status rf_attention_wgmma_check(const rf_attention_args *args, int sm, rf_error *err) {
    if (args->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "attention: the wgmma kernel takes bf16, not %s", rf_dtype_name(args->dtype));
    if (sm != 0 && sm != 90)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel needs sm_90, this is sm_%d", sm);
    if (args->head_dim != 64 && args->head_dim != 72 && args->head_dim != 128)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel takes head_dim 64, 72 or 128, not %d",
                       args->head_dim);
    if (args->q_rows || args->kv_rows || args->num_ranges > 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel takes no lists and at most one range");
    if (!(args->softmax_scale > 0))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: softmax_scale is %g, must be above 0 on CUDA",
                       (double)args->softmax_scale);
    if (args->kv_len < 1 || (args->num_ranges == 1 && args->ranges[0].end <= args->ranges[0].begin))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel needs at least one key");
    if (args->q_len > INT32_MAX - 256 || args->kv_len > INT32_MAX - 256 ||
        rf_ceil_div(args->q_len, 64) * args->num_q_heads > INT32_MAX / (args->batch > 0 ? args->batch : 1))
        return rf_fail(err, RF_ERR_SHAPE, "attention: too many rows, keys or heads for the wgmma kernel");
    return rf_attention_check_strides(args, err);
}

/* True if the instance without limits cannot do it. */
static bool has_limits(const rf_attention_args *args) {
    return args->kv_lens || args->mask != RF_MASK_NONE;
}

/* With limits the other choice is mma.sync, which takes 1.6 times as long on a full card, but shares the keys out where its
 * grid of 64 rows leaves a fifth of it empty. */
bool rf_attention_wgmma_wins(const rf_attention_args *args, int num_sms) {
    if (!has_limits(args)) return args->q_len >= 64 && args->kv_len >= 128;
    const int64_t items = rf_ceil_div(args->q_len, 128) * args->num_q_heads * args->batch;
    return args->q_len >= 128 && args->kv_len >= 128 && args->num_ranges == 0 &&
           (args->kv_len <= 2 * KEYS || items * 10 >= (int64_t)num_sms * 4);
}

/* Keys and values of a section should stay in L2 while its items run: half of an H100's. */
static constexpr int64_t SECTION_BYTES = 24 << 20;

/* Without a mask the row tiles of a head are equally long: head after head. */
static wg_grid make_grid(const rf_attention_params &p, int rows) {
    const int64_t kv_pairs = (int64_t)p.num_kv_heads * p.batch;
    const int64_t pair_bytes = (int64_t)p.num_keys * p.head_dim * 2 * (int64_t)sizeof(uint16_t);
    const int64_t fit = SECTION_BYTES / pair_bytes, most = fit < 1 ? 1 : fit < kv_pairs ? fit : kv_pairs;
    const int64_t sections = rf_ceil_div(kv_pairs, most);
    wg_grid grid = {};
    grid.num_items = (int)(rf_ceil_div(p.q_len, rows) * p.num_q_heads * p.batch);
    grid.section_pairs = p.mask == RF_MASK_NONE ? 1 : (int)(rf_ceil_div(kv_pairs, sections) * p.group);
    grid.num_sections = (int)rf_ceil_div((int64_t)p.num_q_heads * p.batch, grid.section_pairs);
    return grid;
}

template <int HD, int WGS, int PRODUCERS, bool LIMITS>
static rf_status launch(rf_stream *stream, const rf_attention_params &p, rf_error *err) {
    using Shape = wg_shape<HD, WGS, PRODUCERS>;
    static std::atomic<uint64_t> allowed{0};
    auto *const kernel = attention_wgmma_kernel<HD, WGS, PRODUCERS, LIMITS>;
    cudaError_t code = rf_allow_shared((const void *)kernel, Shape::SHARED_BYTES, &allowed);
    if (!stream) { /* plan time, maybe without a device: nothing was asked of it yet */
        cudaGetLastError();
        return RF_OK;
    }
    if (code != cudaSuccess) return rf_cuda_fail(err, "attention", code);
    const wg_grid grid = make_grid(p, Shape::ROWS);
    const int num_sms = rf_backend_num_sms(rf_stream_backend(stream));
    const int blocks = Shape::RESIDENT || grid.num_items < num_sms ? grid.num_items : num_sms;
    return rf_launch_early(stream, "attention", err, kernel, dim3((unsigned)blocks), dim3(Shape::THREADS),
                           Shape::SHARED_BYTES, p, grid);
}

/* The resident form needs all keys in two tiles; it is worth it while the ring's larger items would leave SMs idle. */
template <int HD, bool LIMITS>
static rf_status launch_rows(rf_stream *stream, const rf_attention_params &p, rf_error *err) {
    const int num_sms = stream ? rf_backend_num_sms(rf_stream_backend(stream)) : 0;
    const int64_t items = rf_ceil_div(p.q_len, 128) * p.num_q_heads * p.batch;
    return p.num_keys <= 2 * KEYS && items < 2 * num_sms ? launch<HD, 1, 0, LIMITS>(stream, p, err)
                                                         : launch<HD, 2, 4, LIMITS>(stream, p, err);
}

rf_status rf_attention_wgmma_run(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    const rf_attention_params p = rf_attention_make_params(args);
    const bool limits = has_limits(args);
    switch (args->head_dim) {
    case 64: return limits ? launch_rows<64, true>(stream, p, err) : launch_rows<64, false>(stream, p, err);
    case 72: return limits ? launch_rows<72, true>(stream, p, err) : launch_rows<72, false>(stream, p, err);
    case 128: return limits ? launch_rows<128, true>(stream, p, err) : launch_rows<128, false>(stream, p, err);
    }
    return rf_fail(err, RF_ERR_SHAPE, "attention: head_dim is %d, must be 64, 72 or 128", args->head_dim);
}
