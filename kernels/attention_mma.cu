/* kernels/attention_mma.cu - attention on bf16 tensor cores (mma.sync), every feature of kernels/attention.h.
 * Maths    Online softmax over tiles of 64 keys: m the running row maximum, l = sum p, p = 2^(c s - c m), c = scale
 *          log2 e; o = sum p v; at the end out = o / l, lse = (c m + log2 l) ln 2. m may lag behind the true maximum
 *          by 8 / c (so p <= 2^8): o and l are rescaled only when a row outgrows that. Each row decides for itself, so
 *          that its bits do not depend on which rows share its block.
 * Shapes   q, k, v, out bf16, rows of head_dim in {64, 72, 80, 96, 128}; strides multiples of 8; 16-byte aligned bases.
 * Launch   grid (tiles of packed rows, key heads, batch * splits); a warp owns 16 * MT packed rows of q; K and V tiles
 *          come by cp.async into a ring of two stages. Two barriers a tile: "stage is full", "stage is free again".
 *          KG = 2: two sets of warps take alternate key tiles, each with its own ring, and merge at the end.
 * Shared   rows of 144, 176 and 208 bytes (head_dim 72, 80, 96): stride / 16 is odd, ldmatrix meets no bank twice.
 *          Rows of 128 and 256 bytes: 16-byte chunk c of row r lies at chunk c ^ (r & 7).
 * Masks    Only tiles that cross a bound take the masked form of the tile step; tiles past every row's limit are
 *          skipped.
 * Bits     A row's result depends on its keys and on which of three ways they are walked: one after the other (tiles
 *          of 32, 64 and 128 rows agree bit for bit), in two alternating halves, or in splits. The way is chosen by
 *          shapes alone, so that a list of all keys gives the bits of no list.
 * Splits   With few blocks the keys are cut into splits; each writes (o / l, log2-sum) in f32, combine_kernel joins
 *          them in split order.
 * Arch     sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include <type_traits>

#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"

static constexpr int KEYS = 64;  /* keys of a tile */
static constexpr int STAGES = 2; /* tiles in flight */

/* --- instructions ------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void copy16(uint32_t dst, const void *src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
static __device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Four 8x8 matrices of bf16; lane 8 i + r gives the address of row r of matrix i and receives elements
 * (row lane / 4, columns 2 (lane % 4), + 1) of each. Trans: (rows 2 (lane % 4), + 1, column lane / 4). */
static __device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}
static __device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}
static __device__ __forceinline__ void ldmatrix2(uint32_t &r0, uint32_t &r1, uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(addr));
}
/* d += a b, a 16x16, b 16x8. g = lane / 4, t = lane % 4. d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
 * a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..).  b: (2t.., g), (2t+8.., g). */
static __device__ __forceinline__ void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* The same with a 16x8, b 8x8. a: (g, 2t..), (g+8, 2t..).  b: (2t.., g). */
static __device__ __forceinline__ void mma8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

/* --- tiles -------------------------------------------------------------------------------------------------------- */

template <int HD, int MT, int WARPS, int KG, bool INDEXED> struct tile_shape {
    static constexpr int CHUNKS = HD / 8; /* of 16 bytes */
    static constexpr bool SWIZZLED = HD % 64 == 0;
    static constexpr int LD = SWIZZLED || HD == 72 ? HD * 2 : HD * 2 + 16; /* bytes of a shared row */
    static constexpr int ROWS = 16 * MT * WARPS;
    static constexpr int GROUP_THREADS = WARPS * 32;
    static constexpr int THREADS = GROUP_THREADS * KG;
    static constexpr int KV_BYTES = KEYS * LD; /* a K or V tile */
    static constexpr int STAGE_BYTES = 2 * KV_BYTES;
    static constexpr int Q_BYTES = ROWS * LD;
    static constexpr int POS_BYTES = INDEXED ? STAGES * KEYS * 4 : 0; /* row of each key, for masks */
    static constexpr int GROUP_BYTES = Q_BYTES + STAGES * STAGE_BYTES + POS_BYTES;
    static constexpr int SHARED_BYTES = GROUP_BYTES * KG;
    /* The second set of warps hands over o, m and l in its stages. */
    static_assert(KG == 1 || (HD / 8 * 4 + 4) * MT * GROUP_THREADS * 4 <= STAGES * STAGE_BYTES, "merge space");
    static_assert(KEYS % WARPS == 0 && KEYS / WARPS <= 32 && 16 * MT <= 32, "a lane per row");
    static_assert(HD % 8 == 0 && (LD / 16 % 2 == 1 || SWIZZLED), "bank conflicts");
};

/* Shared-memory offset of chunk `chunk` of row `row`. */
template <class Shape> static __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * Shape::LD + (Shape::SWIZZLED ? chunk ^ (row & 7) : chunk) * 16;
}

/* Visits every 16-byte chunk of NUM_ROWS rows with one warp: eight lanes a row, so that each request covers whole
 * 128-byte runs, then the chunks past a multiple of eight. f(row, chunk, active) is called by the whole warp; row <=
 * 31 always. */
template <int CHUNKS, int NUM_ROWS, class F> static __device__ __forceinline__ void for_each_chunk(int lane, F f) {
#pragma unroll
    for (int i = 0; i < NUM_ROWS / 4; i++) {
        const int row = i * 4 + lane / 8;
#pragma unroll
        for (int pass = 0; pass < CHUNKS / 8; pass++) f(row, pass * 8 + lane % 8, true);
    }
    constexpr int REST = CHUNKS % 8;
    if constexpr (REST > 0) {
        constexpr int PER_PASS = 32 / REST; /* REST is 1, 2 or 4 */
#pragma unroll
        for (int i = 0; i < (NUM_ROWS + PER_PASS - 1) / PER_PASS; i++) {
            const int row = i * PER_PASS + lane / REST;
            f(row, CHUNKS / 8 * 8 + lane % REST, PER_PASS <= NUM_ROWS || row < NUM_ROWS);
        }
    }
}

/* Row of key index j where keys are listed or in ranges; -1 past the end. */
static __device__ __forceinline__ int key_row(const rf_attention_params &p, const int32_t *list, int j, int len) {
    if (j >= len) return -1;
    if (list) return list[j];
    int row = j + p.range_shift[0];
#pragma unroll
    for (int i = 1; i < RF_MAX_KEY_RANGES; i++) row = j >= p.range_end[i - 1] ? j + p.range_shift[i] : row;
    return row;
}

/* First key row that the query at position `pos` does not see. */
static __device__ __forceinline__ int key_limit(const rf_attention_params &p, int64_t pos) {
    int64_t limit = INT_MAX;
    if (p.mask == RF_MASK_CAUSAL) limit = pos + 1;
    if (p.mask == RF_MASK_BLOCK_CAUSAL) limit = (pos / p.causal_block + 1) * p.causal_block;
    return (int)(limit < INT_MAX ? limit : INT_MAX);
}

/* --- kernel ------------------------------------------------------------------------------------------------------- */

template <int HD, int MT, int WARPS, int KG, bool INDEXED, int MIN_BLOCKS>
static __global__ void __launch_bounds__(WARPS * 32 * KG, MIN_BLOCKS)
    attention_mma_kernel(const __grid_constant__ rf_attention_params p) {
    using Shape = tile_shape<HD, MT, WARPS, KG, INDEXED>;
    constexpr int LD = Shape::LD, CHUNKS = Shape::CHUNKS;
    constexpr int K_STEPS = HD / 16, N_TILES = HD / 8; /* k16 steps of q k^T; n8 tiles of p v */
    constexpr bool ODD = HD % 16 == 8;                 /* one k8 step and one single n8 tile more */
    constexpr int WARP_ROWS = 16 * MT, WARP_KEYS = KEYS / WARPS;
    extern __shared__ __align__(1024) uint8_t shared[];

    const int lane = threadIdx.x & 31;
    const int set = KG == 1 ? 0 : (int)threadIdx.x / Shape::GROUP_THREADS; /* which set of warps */
    const int warp = (int)(threadIdx.x >> 5) - set * WARPS;
    const int batch = p.batch_first + (int)(p.num_splits > 1 ? blockIdx.z / p.num_splits : blockIdx.z);
    const int split = p.num_splits > 1 ? (int)(blockIdx.z % p.num_splits) : 0;
    const int head = blockIdx.y;
    /* Under a mask later rows see more keys: they start first, so that the last blocks to run are short ones. */
    const int first_row =
        (int)(MT == 1 && p.mask != RF_MASK_NONE ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * Shape::ROWS;

    uint8_t *const set_shared = shared + set * Shape::GROUP_BYTES;
    const uint32_t q_shared = (uint32_t)__cvta_generic_to_shared(set_shared);
    const uint32_t ring = q_shared + Shape::Q_BYTES;
    int32_t *const pos_ring = reinterpret_cast<int32_t *>(set_shared + Shape::Q_BYTES + STAGES * Shape::STAGE_BYTES);

    /* Lane r looks after packed row r of its warp: where it lies, and which keys it sees. */
    const int lane_row = first_row + warp * WARP_ROWS + lane;
    const bool lane_row_valid = lane < WARP_ROWS && lane_row < p.num_rows;
    const int32_t *const q_list = p.q_rows ? p.q_rows + batch * p.q_batch_stride_rows : NULL;
    int64_t pos_offset = 0;
    if (MT == 1) pos_offset = (int64_t)p.q_pos_offset + (p.q_pos_offsets ? p.q_pos_offsets[batch] : 0);
    int lane_query = 0, lane_head = 0, lane_limit = 0;
    int64_t q_offset = -1; /* bytes */
    if (lane_row_valid) {
        lane_query = p.group == 1 ? lane_row : lane_row / p.group;
        lane_head = head * p.group + (lane_row - lane_query * p.group);
        const int q_row = q_list ? q_list[lane_query] : lane_query;
        q_offset = ((int64_t)q_row * p.q_row_stride + (int64_t)lane_head * p.q_head_stride) * 2;
        lane_limit = key_limit(p, q_row + pos_offset);
    }
    const char *const q_base = (const char *)p.q + batch * p.q_batch_stride * 2;
    for_each_chunk<CHUNKS, WARP_ROWS>(lane, [&](int row, int chunk, bool active) {
        const int64_t offset = __shfl_sync(0xffffffffu, q_offset, row);
        if (active)
            copy16(q_shared + chunk_offset<Shape>(warp * WARP_ROWS + row, chunk),
                   offset < 0 ? q_base : q_base + offset + chunk * 16, offset < 0 ? 0 : 16);
    });

    /* Keys of this sample, tiles of this block and set. */
    const int32_t *const kv_list = p.kv_rows ? p.kv_rows + batch * p.kv_batch_stride_rows : NULL;
    int len = p.num_keys;
    if (p.kv_lens) len = max(0, min(p.kv_lens[batch], len));
    /* Keys that any row of the block may see; the large tile (MT 2) serves no mask. */
    int block_keys = len;
    if (!INDEXED && MT == 1 && p.mask != RF_MASK_NONE && !q_list) {
        const int last_row = min(first_row + Shape::ROWS, p.num_rows) - 1;
        const int limit = key_limit(p, last_row / p.group + pos_offset);
        block_keys = max(0, min(len, limit - p.first_key));
    }
    int tile_begin = 0, tile_end = (block_keys + KEYS - 1) / KEYS;
    if (p.num_splits > 1) {
        const int per_split = (tile_end + p.num_splits - 1) / p.num_splits;
        tile_begin = min(split * per_split, tile_end);
        tile_end = min(tile_begin + per_split, tile_end);
    }
    const int num_tiles = max(0, (tile_end - tile_begin - set + KG - 1) / KG);

    /* Row limits. Consecutive keys: compared with the key's index; indexed keys: with its row (unused keys have row
     * INT_MAX). free_keys: every row of the warp sees all keys before it; seen_keys: no row sees a key from there on.
     * */
    int free_keys, seen_keys;
    if (INDEXED) {
        free_keys = p.mask == RF_MASK_NONE ? len : 0;
        seen_keys = __any_sync(0xffffffffu, lane_row_valid) ? INT_MAX : 0;
    } else {
        lane_limit = lane_row_valid ? max(0, min(lane_limit - p.first_key, len)) : 0;
        free_keys = __reduce_min_sync(0xffffffffu, lane_row_valid ? lane_limit : INT_MAX);
        seen_keys = __reduce_max_sync(0xffffffffu, lane_limit);
    }
    constexpr bool ROW_LIMITS = MT == 1; /* the large tile serves no mask: its only limit is len */
    int row_limit[MT][2];
#pragma unroll
    for (int t = 0; ROW_LIMITS && t < MT; t++) {
        row_limit[t][0] = __shfl_sync(0xffffffffu, lane_limit, t * 16 + lane / 4);
        row_limit[t][1] = __shfl_sync(0xffffffffu, lane_limit, t * 16 + lane / 4 + 8);
    }

    /* Loads of tile j of this set into stage `stage`; warp w brings keys w * WARP_KEYS .. + WARP_KEYS - 1. Indexed
     * keys: `row` is the row of the lane's key, fetched a tile ahead. */
    const char *const k_base = (const char *)p.k + (batch * p.kv_batch_stride + head * p.kv_head_stride) * 2;
    const char *const v_base = (const char *)p.v + (batch * p.kv_batch_stride + head * p.kv_head_stride) * 2;
    const int64_t row_bytes = p.kv_row_stride * 2;
    auto fetch_row = [&](int j) -> int {
        if (!INDEXED) return 0;
        const int key = (tile_begin + set + KG * j) * KEYS + warp * WARP_KEYS + lane;
        return lane < WARP_KEYS ? key_row(p, kv_list, key, len) : -1;
    };
    auto load_tile = [&](int j, int stage, int row_of_lane) {
        const uint32_t dst = ring + stage * Shape::STAGE_BYTES;
        if (INDEXED) {
            if (lane < WARP_KEYS)
                pos_ring[stage * KEYS + warp * WARP_KEYS + lane] = row_of_lane < 0 ? INT_MAX : row_of_lane;
            for_each_chunk<CHUNKS, WARP_KEYS>(lane, [&](int row, int chunk, bool active) {
                const int from = __shfl_sync(0xffffffffu, row_of_lane, row);
                if (!active) return;
                const int64_t offset = from < 0 ? 0 : from * row_bytes + chunk * 16;
                const uint32_t at = dst + chunk_offset<Shape>(warp * WARP_KEYS + row, chunk);
                copy16(at, k_base + offset, from < 0 ? 0 : 16);
                copy16(at + Shape::KV_BYTES, v_base + offset, from < 0 ? 0 : 16);
            });
            return;
        }
        const int key0 = (tile_begin + set + KG * j) * KEYS;
        const int row0 = p.first_key + key0 + warp * WARP_KEYS;
        if (key0 + KEYS <= block_keys) {
            for_each_chunk<CHUNKS, WARP_KEYS>(lane, [&](int row, int chunk, bool active) {
                if (!active) return;
                const int64_t offset = (row0 + row) * row_bytes + chunk * 16;
                const uint32_t at = dst + chunk_offset<Shape>(warp * WARP_KEYS + row, chunk);
                copy16(at, k_base + offset);
                copy16(at + Shape::KV_BYTES, v_base + offset);
            });
        } else { /* rows past the last become zeros: their scores are masked, and 0 times a stale value could be NaN */
            for_each_chunk<CHUNKS, WARP_KEYS>(lane, [&](int row, int chunk, bool active) {
                if (!active) return;
                const bool valid = key0 + warp * WARP_KEYS + row < block_keys;
                const int64_t offset = valid ? (row0 + row) * row_bytes + chunk * 16 : 0;
                const uint32_t at = dst + chunk_offset<Shape>(warp * WARP_KEYS + row, chunk);
                copy16(at, k_base + offset, valid ? 16 : 0);
                copy16(at + Shape::KV_BYTES, v_base + offset, valid ? 16 : 0);
            });
        }
    };
    auto set_barrier = [&]() {
        if (KG == 1)
            __syncthreads();
        else if (set == 0) /* constant barrier numbers: a variable one would reserve all 16 */
            asm volatile("bar.sync 1, %0;" ::"n"(Shape::GROUP_THREADS) : "memory");
        else
            asm volatile("bar.sync 2, %0;" ::"n"(Shape::GROUP_THREADS) : "memory");
    };

    /* Copy group 0: q and tile 0; group j: tile j. */
    int next_row = fetch_row(0);
#pragma unroll
    for (int j = 0; j < STAGES; j++) {
        const int row = next_row;
        next_row = fetch_row(j + 1);
        if (j < num_tiles) load_tile(j, j, row);
        copy_commit();
    }

    float o[MT][N_TILES][4];
    float top[MT][2], sum[MT][2]; /* m in units of s; l, this lane's share */
#pragma unroll
    for (int t = 0; t < MT; t++) {
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[t][n][i] = 0.0f;
        top[t][0] = top[t][1] = -INFINITY;
        sum[t][0] = sum[t][1] = 0.0f;
    }

    /* Lane parts of ldmatrix addresses: matrix i = lane / 8, row r = lane % 8. K (and q) walk head_dim by k16 steps, V
     * by pairs of n8 tiles; with swizzled rows a step is an exclusive or, else a sum. */
    const int mat = lane >> 3, mat_row = lane & 7;
    const uint32_t k_lane = chunk_offset<Shape>((mat >> 1) * 8 + mat_row, mat & 1);
    const uint32_t v_lane = chunk_offset<Shape>((mat & 1) * 8 + mat_row, mat >> 1);
    const uint32_t odd_lane = (mat * 8 + mat_row) * LD + (CHUNKS - 1) * 16; /* last chunk of 32 rows; head_dim 72 */
    auto step_chunks = [](uint32_t addr, int pair) { return Shape::SWIZZLED ? addr ^ (pair * 32) : addr + pair * 32; };

    uint32_t q[MT][K_STEPS][4], q_odd[MT][2];
    if (num_tiles > 0) {
        copy_wait<STAGES - 1>();
        set_barrier(); /* q is there */
#pragma unroll
        for (int t = 0; t < MT; t++) {
            const uint32_t tile = q_shared + (warp * WARP_ROWS + t * 16) * LD;
#pragma unroll
            for (int k = 0; k < K_STEPS; k++) ldmatrix4(q[t][k], step_chunks(tile + v_lane, k)); /* the same pattern */
            if (ODD) ldmatrix2(q_odd[t][0], q_odd[t][1], tile + (lane & 15) * LD + (CHUNKS - 1) * 16);
        }
    }

    /* One tile of keys, all in shared memory. MASKED: some key of the tile is hidden from some row of the warp. */
    auto tile_step = [&](auto masked, uint32_t k_tile, uint32_t v_tile, const int32_t *pos, int key0) {
        constexpr bool MASKED = decltype(masked)::value;
        float s[MT][KEYS / 8][4];
#pragma unroll
        for (int t = 0; t < MT; t++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[t][n][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            const uint32_t addr = step_chunks(k_tile + k_lane, k);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t b[4]; /* keys 16 n .. + 7: b0, b1; keys + 8 .. + 15: b0, b1 */
                ldmatrix4(b, addr + n * 16 * LD);
#pragma unroll
                for (int t = 0; t < MT; t++) {
                    mma16(s[t][2 * n], q[t][k], b[0], b[1]);
                    mma16(s[t][2 * n + 1], q[t][k], b[2], b[3]);
                }
            }
        }
        if (ODD) {
#pragma unroll
            for (int n = 0; n < KEYS / 32; n++) {
                uint32_t b[4]; /* four n8 tiles */
                ldmatrix4(b, k_tile + odd_lane + n * 32 * LD);
#pragma unroll
                for (int t = 0; t < MT; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++) mma8(s[t][4 * n + i], q_odd[t][0], q_odd[t][1], b[i]);
            }
        }
        if (MASKED) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                const int col = n * 8 + (lane & 3) * 2;
                const int key_a = INDEXED ? pos[col] : key0 + col, key_b = INDEXED ? pos[col + 1] : key0 + col + 1;
#pragma unroll
                for (int t = 0; t < MT; t++) {
                    const int limit_a = ROW_LIMITS ? row_limit[t][0] : len,
                              limit_b = ROW_LIMITS ? row_limit[t][1] : len;
                    if (key_a >= limit_a) s[t][n][0] = -INFINITY;
                    if (key_b >= limit_a) s[t][n][1] = -INFINITY;
                    if (key_a >= limit_b) s[t][n][2] = -INFINITY;
                    if (key_b >= limit_b) s[t][n][3] = -INFINITY;
                }
            }
        }

        const float c = p.scale_log2;
#pragma unroll
        for (int t = 0; t < MT; t++) {
            float high[2] = {s[t][0][0], s[t][0][2]};
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                high[0] = fmaxf(high[0], fmaxf(s[t][n][0], s[t][n][1]));
                high[1] = fmaxf(high[1], fmaxf(s[t][n][2], s[t][n][3]));
            }
            bool grow = false;
#pragma unroll
            for (int h = 0; h < 2; h++) { /* the four lanes of a row agree */
                high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
                high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
                grow |= (high[h] - top[t][h]) * c > 8.0f; /* -inf - -inf is NaN: no */
            }
            if (__any_sync(0xffffffffu, grow)) {
                float alpha[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float next = (high[h] - top[t][h]) * c > 8.0f ? high[h] : top[t][h];
                    alpha[h] = next == top[t][h] ? 1.0f : exp2_approx((top[t][h] - next) * c);
                    top[t][h] = next;
                    sum[t][h] *= alpha[h];
                }
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    o[t][n][0] *= alpha[0], o[t][n][1] *= alpha[0];
                    o[t][n][2] *= alpha[1], o[t][n][3] *= alpha[1];
                }
            }
            float base[2];
#pragma unroll
            for (int h = 0; h < 2; h++) base[h] = MASKED && top[t][h] == -INFINITY ? 0.0f : top[t][h] * c;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                s[t][n][0] = exp2_approx(fmaf(s[t][n][0], c, -base[0]));
                s[t][n][1] = exp2_approx(fmaf(s[t][n][1], c, -base[0]));
                s[t][n][2] = exp2_approx(fmaf(s[t][n][2], c, -base[1]));
                s[t][n][3] = exp2_approx(fmaf(s[t][n][3], c, -base[1]));
                sum[t][0] += s[t][n][0] + s[t][n][1];
                sum[t][1] += s[t][n][2] + s[t][n][3];
            }
        }

        uint32_t odd[4];
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            uint32_t prob[MT][4]; /* accumulators of two n8 tiles are one k16 operand */
#pragma unroll
            for (int t = 0; t < MT; t++) {
                prob[t][0] = rf_pack_bf16(s[t][2 * k][0], s[t][2 * k][1]);
                prob[t][1] = rf_pack_bf16(s[t][2 * k][2], s[t][2 * k][3]);
                prob[t][2] = rf_pack_bf16(s[t][2 * k + 1][0], s[t][2 * k + 1][1]);
                prob[t][3] = rf_pack_bf16(s[t][2 * k + 1][2], s[t][2 * k + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < N_TILES / 2; n++) {
                uint32_t b[4]; /* columns 16 n .. + 7: b0, b1; columns + 8 .. + 15: b0, b1 */
                ldmatrix4_trans(b, step_chunks(v_tile + v_lane, n) + k * 16 * LD);
#pragma unroll
                for (int t = 0; t < MT; t++) {
                    mma16(o[t][2 * n], prob[t], b[0], b[1]);
                    mma16(o[t][2 * n + 1], prob[t], b[2], b[3]);
                }
            }
            if (ODD) {
                if (k % 2 == 0) ldmatrix4_trans(odd, v_tile + odd_lane + k * 16 * LD); /* for this k and the next */
#pragma unroll
                for (int t = 0; t < MT; t++) mma16(o[t][N_TILES - 1], prob[t], odd[k % 2 * 2], odd[k % 2 * 2 + 1]);
            }
        }
    };

#pragma unroll 1
    for (int j = 0; j < num_tiles; j++) {
        const int stage = j % STAGES;
        copy_wait<STAGES - 1>();
        set_barrier(); /* tile j is there, whoever loaded it */
        const uint32_t k_tile = ring + stage * Shape::STAGE_BYTES;
        const int key0 = (tile_begin + set + KG * j) * KEYS;
        if (key0 < seen_keys) {
            if (key0 + KEYS <= free_keys)
                tile_step(std::false_type(), k_tile, k_tile + Shape::KV_BYTES, pos_ring + stage * KEYS, key0);
            else
                tile_step(std::true_type(), k_tile, k_tile + Shape::KV_BYTES, pos_ring + stage * KEYS, key0);
        }
        if (j + STAGES < num_tiles) {
            set_barrier(); /* every warp has read the stage */
            load_tile(j + STAGES, stage, next_row);
            next_row = fetch_row(j + STAGES + 1);
        }
        copy_commit();
    }
    copy_wait<0>();

#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[t][h] += __shfl_xor_sync(0xffffffffu, sum[t][h], 1);
            sum[t][h] += __shfl_xor_sync(0xffffffffu, sum[t][h], 2);
        }

    /* Two sets: the second hands its state over lane by lane (the same lane holds the same elements), the first joins.
     * */
    if (KG == 2) {
        float *const hand = reinterpret_cast<float *>(shared + Shape::GROUP_BYTES + Shape::Q_BYTES) +
                            threadIdx.x % Shape::GROUP_THREADS;
        constexpr int STEP = Shape::GROUP_THREADS, PER_TILE = N_TILES * 4 + 4;
        if (set == 1) {
            set_barrier(); /* its own warps have read the last tiles */
#pragma unroll
            for (int t = 0; t < MT; t++) {
#pragma unroll
                for (int n = 0; n < N_TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) hand[(t * PER_TILE + n * 4 + i) * STEP] = o[t][n][i];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    hand[(t * PER_TILE + N_TILES * 4 + h) * STEP] = top[t][h];
                    hand[(t * PER_TILE + N_TILES * 4 + 2 + h) * STEP] = sum[t][h];
                }
            }
        }
        __syncthreads(); /* handed over */
        if (set == 1) return;
#pragma unroll
        for (int t = 0; t < MT; t++) {
            float mine[2], other[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float top_b = hand[(t * PER_TILE + N_TILES * 4 + h) * STEP];
                const float sum_b = hand[(t * PER_TILE + N_TILES * 4 + 2 + h) * STEP];
                const float next = fmaxf(top[t][h], top_b);
                mine[h] = top[t][h] == -INFINITY ? 0.0f : exp2_approx((top[t][h] - next) * p.scale_log2);
                other[h] = top_b == -INFINITY ? 0.0f : exp2_approx((top_b - next) * p.scale_log2);
                top[t][h] = next;
                sum[t][h] = sum[t][h] * mine[h] + sum_b * other[h];
            }
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    o[t][n][i] = o[t][n][i] * mine[i / 2] + hand[(t * PER_TILE + n * 4 + i) * STEP] * other[i / 2];
        }
    }

    /* Finish: row h of m-tile t of this lane is packed row first_row + warp * WARP_ROWS + t * 16 + lane / 4 + 8 h. */
    const int64_t part_row = (((int64_t)split * p.batch + batch) * p.num_kv_heads + head) * p.num_rows;
#pragma unroll
    for (int t = 0; t < MT; t++) {
        float inv[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            inv[h] = sum[t][h] == 0.0f ? 0.0f : 1.0f / sum[t][h]; /* NaN stays NaN */
            const float lse2 = sum[t][h] == 0.0f ? -INFINITY : top[t][h] * p.scale_log2 + log2f(sum[t][h]);
            const int from = t * 16 + lane / 4 + 8 * h, row = first_row + warp * WARP_ROWS + from;
            const int query = __shfl_sync(0xffffffffu, lane_query, from);
            const int q_head = __shfl_sync(0xffffffffu, lane_head, from);
            if (row < p.num_rows && (lane & 3) == 0) {
                if (p.num_splits > 1)
                    p.part_lse[part_row + row] = lse2;
                else if (p.lse)
                    p.lse[((int64_t)batch * p.num_q_heads + q_head) * p.q_len + query] = lse2 * 0.6931471805599453f;
            }
        }
        if (p.num_splits > 1) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = first_row + warp * WARP_ROWS + t * 16 + lane / 4 + 8 * h;
                if (row >= p.num_rows) continue;
                float *const dst = p.part_out + (part_row + row) * HD + (lane & 3) * 2;
#pragma unroll
                for (int n = 0; n < N_TILES; n++)
                    *reinterpret_cast<float2 *>(dst + n * 8) =
                        make_float2(o[t][n][2 * h] * inv[h], o[t][n][2 * h + 1] * inv[h]);
            }
            continue;
        }
        /* Through this warp's own q rows in shared memory, so that global stores are 16 bytes wide. */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = warp * WARP_ROWS + t * 16 + lane / 4 + 8 * h;
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                *reinterpret_cast<uint32_t *>(set_shared + chunk_offset<Shape>(row, n) + (lane & 3) * 4) =
                    rf_pack_bf16(o[t][n][2 * h] * inv[h], o[t][n][2 * h + 1] * inv[h]);
        }
    }
    if (p.num_splits > 1) return;
    __syncwarp(); /* the warp's rows are complete */
    char *const out_base = (char *)p.out + batch * p.out_batch_stride * 2;
    const int64_t out_offset =
        lane_row_valid ? ((int64_t)lane_query * p.out_row_stride + (int64_t)lane_head * p.out_head_stride) * 2 : -1;
    for_each_chunk<CHUNKS, WARP_ROWS>(lane, [&](int row, int chunk, bool active) {
        const int64_t offset = __shfl_sync(0xffffffffu, out_offset, row);
        if (active && offset >= 0)
            *reinterpret_cast<uint4 *>(out_base + offset + chunk * 16) =
                *reinterpret_cast<const uint4 *>(set_shared + chunk_offset<Shape>(warp * WARP_ROWS + row, chunk));
    });
}

/* Joins splits: one warp per (batch, key head, packed row). lane c < head_dim / 4 holds four columns. */
static __global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ rf_attention_params p) {
    const int lane = threadIdx.x & 31;
    const int64_t per_split = (int64_t)p.batch * p.num_kv_heads * p.num_rows;
    const int64_t index = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
    if (index >= per_split) return;
    float top = -INFINITY;
    for (int s = lane; s < p.num_splits; s += 32) top = fmaxf(top, p.part_lse[s * per_split + index]);
    top = rf_warp_max(top);
    float sum = 0.0f, acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const bool has_cols = lane * 4 < p.head_dim;
    if (top > -INFINITY) {
#pragma unroll 4
        for (int s = 0; s < p.num_splits; s++) {
            const float w = exp2f(p.part_lse[s * per_split + index] - top);
            float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (has_cols) rf_load4(p.part_out + (s * per_split + index) * p.head_dim + lane * 4, v);
            sum += w;
#pragma unroll
            for (int i = 0; i < 4; i++) acc[i] += w * v[i]; /* an empty split holds zeros and has w = 0 */
        }
    }
    const float inv = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = (int)(index % p.num_rows);
    const int64_t sample = index / p.num_rows;
    const int head = (int)(sample % p.num_kv_heads) * p.group + row % p.group, query = row / p.group;
    const int64_t batch = sample / p.num_kv_heads;
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] *= inv;
    if (has_cols)
        rf_store4((rf_bf16 *)p.out + batch * p.out_batch_stride + query * p.out_row_stride + head * p.out_head_stride +
                      lane * 4,
                  acc);
    if (lane == 0 && p.lse)
        p.lse[(batch * p.num_q_heads + head) * p.q_len + query] =
            sum == 0.0f ? -INFINITY : (top + log2f(sum)) * 0.6931471805599453f;
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

/* stream NULL: raises the kernel's shared-memory limit on the current device, if there is one, and returns. */
template <int HD, int MT, int WARPS, int KG, bool INDEXED, int MIN_BLOCKS>
static rf_status launch(rf_stream *stream, const rf_attention_params &params, rf_error *err) {
    using Shape = tile_shape<HD, MT, WARPS, KG, INDEXED>;
    static std::atomic<uint64_t> allowed{0};
    auto kernel = attention_mma_kernel<HD, MT, WARPS, KG, INDEXED, MIN_BLOCKS>;
    cudaError_t code = rf_allow_shared((const void *)kernel, Shape::SHARED_BYTES, &allowed);
    if (!stream) {
        (void)cudaGetLastError();
        return RF_OK;
    }
    if (code != cudaSuccess) return rf_cuda_fail(err, "attention", code);
    rf_attention_params p = params;
    const int most = 65535 / p.num_splits; /* samples in a grid's z */
    for (int first = 0; first < p.batch; first += most) {
        const int count = p.batch - first < most ? p.batch - first : most;
        p.batch_first = first;
        const dim3 grid((unsigned)rf_ceil_div(p.num_rows, Shape::ROWS), (unsigned)p.num_kv_heads,
                        (unsigned)(count * p.num_splits));
        rf_status status =
            rf_launch(stream, "attention", err, kernel, grid, dim3(Shape::THREADS), Shape::SHARED_BYTES, p);
        if (status != RF_OK) return status;
    }
    return RF_OK;
}

/* Blocks per SM that __launch_bounds__ asks for: what shared memory and 64 K registers allow. */
template <int HD>
static rf_status launch_tile(rf_stream *stream, const rf_attention_params &p, bool indexed, rf_attention_tile tile,
                             rf_error *err) {
    constexpr int BLOCKS_64 = HD <= 80 ? 3 : 2;
    constexpr int BLOCKS_32 = HD <= 80 ? 5 : 3;
    switch (tile) {
    case RF_ATTENTION_TILE_32:
        return indexed ? launch<HD, 1, 2, 1, true, BLOCKS_32>(stream, p, err)
                       : launch<HD, 1, 2, 1, false, BLOCKS_32>(stream, p, err);
    case RF_ATTENTION_TILE_64_PAIR:
        return indexed ? launch<HD, 1, 4, 2, true, 1>(stream, p, err) : launch<HD, 1, 4, 2, false, 1>(stream, p, err);
    case RF_ATTENTION_TILE_128:
        if constexpr (HD <= 72) return launch<HD, 2, 4, 1, false, 2>(stream, p, err);
        break;
    default: break;
    }
    return indexed ? launch<HD, 1, 4, 1, true, BLOCKS_64>(stream, p, err)
                   : launch<HD, 1, 4, 1, false, BLOCKS_64>(stream, p, err);
}

rf_status rf_attention_mma_run(rf_stream *stream, const rf_attention_args *args, const rf_attention_mma_plan *plan,
                               rf_error *err) {
    rf_attention_params p = rf_attention_make_params(args);
    p.num_splits = plan->num_splits;
    if (plan->num_splits > 1) {
        p.part_out = (float *)args->workspace;
        p.part_lse = p.part_out + (int64_t)p.num_splits * p.batch * p.num_kv_heads * p.num_rows * p.head_dim;
    }
    const bool indexed = rf_attention_is_indexed(args);
    rf_status status = RF_ERR_UNSUPPORTED;
    switch (args->head_dim) {
    case 64: status = launch_tile<64>(stream, p, indexed, plan->tile, err); break;
    case 72: status = launch_tile<72>(stream, p, indexed, plan->tile, err); break;
    case 80: status = launch_tile<80>(stream, p, indexed, plan->tile, err); break;
    case 96: status = launch_tile<96>(stream, p, indexed, plan->tile, err); break;
    case 128: status = launch_tile<128>(stream, p, indexed, plan->tile, err); break;
    }
    if (status != RF_OK || !stream || p.num_splits == 1) return status;
    const int64_t rows = (int64_t)p.batch * p.num_kv_heads * p.num_rows;
    return rf_launch(stream, "attention_combine", err, combine_kernel, dim3((unsigned)rf_ceil_div(rows, 4)), dim3(128),
                     0, p);
}

/* --- chooser ------------------------------------------------------------------------------------------------------ */

/* Key splits for a grid of `blocks` that may run `per_sm` to an SM; each split has at least min_tiles tiles. */
static int choose_splits(int64_t blocks, int num_sms, int per_sm, int64_t tiles, int min_tiles) {
    if (num_sms <= 0 || blocks <= 0 || blocks * 5 >= (int64_t)num_sms * 4 || tiles < 2 * min_tiles) return 1;
    int64_t splits = (int64_t)num_sms * per_sm / blocks;
    if (splits > tiles / min_tiles) splits = tiles / min_tiles;
    if (splits > 64) splits = 64;
    if (splits < 2) return 1;
    int64_t per_split = rf_ceil_div(tiles, splits);
    return (int)rf_ceil_div(tiles, per_split); /* no empty split at full length */
}

static int64_t count_keys(const rf_attention_args *args) {
    if (args->num_ranges == 0) return args->kv_len;
    int64_t keys = 0;
    for (int i = 0; i < args->num_ranges; i++) keys += args->ranges[i].end - args->ranges[i].begin;
    return keys;
}

static int splits_for(const rf_attention_args *args, int num_sms, rf_attention_tile tile) {
    const int64_t rows = args->q_len * (args->num_q_heads / args->num_kv_heads);
    const int64_t tiles = rf_ceil_div(count_keys(args), KEYS);
    const int64_t samples = args->batch * args->num_kv_heads;
    if (tile == RF_ATTENTION_TILE_32)
        return choose_splits(rf_ceil_div(rows, 32) * samples, num_sms, args->head_dim <= 80 ? 5 : 3, tiles, 1);
    if (tile == RF_ATTENTION_TILE_64)
        return choose_splits(rf_ceil_div(rows, 64) * samples, num_sms, args->head_dim <= 80 ? 3 : 2, tiles, 4);
    return 1;
}

static size_t split_bytes(const rf_attention_args *args, int splits) {
    if (splits <= 1) return 0;
    return (size_t)splits * (size_t)args->batch * (size_t)args->num_q_heads * (size_t)args->q_len *
           (size_t)(args->head_dim + 1) * sizeof(float);
}

rf_status rf_attention_mma_choose(const rf_attention_args *args, int num_sms, rf_attention_tile force,
                                  rf_attention_mma_plan *plan, rf_error *err) {
    const int hd = args->head_dim;
    if (args->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "attention: the mma kernel takes bf16, not %s", rf_dtype_name(args->dtype));
    if (hd != 64 && hd != 72 && hd != 80 && hd != 96 && hd != 128)
        return rf_fail(err, RF_ERR_SHAPE, "attention: head_dim is %d, must be 64, 72, 80, 96 or 128", hd);
    if (!(args->softmax_scale > 0))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: softmax_scale is %g, must be above 0 on CUDA",
                       (double)args->softmax_scale);
    const rf_status status = rf_attention_check_strides(args, err);
    if (status != RF_OK) return status;
    const int group = args->num_q_heads / args->num_kv_heads;
    const int64_t rows = args->q_len * group;
    if (rows > INT32_MAX - 256 || args->kv_len > INT32_MAX - 256)
        return rf_fail(err, RF_ERR_SHAPE, "attention: %lld query rows against %lld keys are too many", (long long)rows,
                       (long long)args->kv_len);

    const bool indexed = rf_attention_is_indexed(args);
    const bool plain = !indexed && args->mask == RF_MASK_NONE;
    const int64_t tiles = rf_ceil_div(count_keys(args), KEYS), samples = args->batch * args->num_kv_heads;
    const int64_t blocks_64 = rf_ceil_div(rows, 64) * samples, blocks_128 = rf_ceil_div(rows, 128) * samples;
    rf_attention_tile tile = RF_ATTENTION_TILE_64;
    if (rows <= 32)
        tile = RF_ATTENTION_TILE_32;
    else if (tiles >= 2 && tiles <= 8 && blocks_64 <= num_sms)
        tile = RF_ATTENTION_TILE_64_PAIR;
    else if (plain && hd <= 72 && blocks_128 * 10 >= 18 * (int64_t)num_sms && blocks_128 * 2 * 100 <= blocks_64 * 115)
        tile = RF_ATTENTION_TILE_128; /* two slots of an SM are filled, and at most 15 % more rows are padding */
    if (force != RF_ATTENTION_TILE_AUTO) {
        if (force == RF_ATTENTION_TILE_128 && (!plain || hd > 72))
            return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the forced tile cannot take these arguments");
        tile = force;
    }
    plan->tile = tile;
    plan->num_splits = splits_for(args, num_sms, tile);
    plan->workspace_bytes = split_bytes(args, plan->num_splits);
    return RF_OK;
}

size_t rf_attention_mma_workspace(const rf_attention_args *args, int num_sms) {
    const int64_t rows = args->q_len * (args->num_q_heads / args->num_kv_heads);
    return split_bytes(args, splits_for(args, num_sms, rows <= 32 ? RF_ATTENTION_TILE_32 : RF_ATTENTION_TILE_64));
}
