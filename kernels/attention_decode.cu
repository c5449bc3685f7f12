/* kernels/attention_decode.cu - attention of few query rows against many keys: decoding and passes over one block of rows.
 * Maths    As attention_mma.cu: online softmax, p = 2^(c s - c m), c = scale log2 e, m may lag behind by 8 / c; here each
 *          warp has an m, l and o of its own over its share of the keys, and parts join by
 *          lse2 = c m + log2 l: w_i = 2^(lse2_i - max), out = sum w_i out_i / sum w_i, in a fixed order.
 * Shapes   q, k, v bf16, head_dim 64 or 128; strides multiples of 8; 16-byte aligned bases. out bf16 or f32.
 * Launch   A unit is a tile of 16, 32 or 64 packed rows (attention_cuda.cuh) of one key head of one sample; K and V are
 *          read once for all of them. grid (cluster * splits, key heads * row tiles, samples), clusters of (cluster, 1, 1):
 *          block i of a unit takes tiles [i T / n, (i + 1) T / n) of the T tiles of 64 keys that are there at run time, so
 *          that the grid follows from the capacity and the time from the true length.
 *          (Registers: 175 for 16 rows of head_dim 128, else at most 128; the 64-row tile of head_dim 128 spills nine.)
 *          Warps: RG groups of 16 rows by KG groups of 64 / KG keys of every tile. 128 threads for 16 rows, else 256.
 * Ring     64 keys of K and V a stage, all warps copy (cp.async, one barrier a tile): 32 KB a stage, 3 stages for
 *          head_dim 128, 16 KB and 6 for 64; two blocks on an SM have 128 to 192 KB under way.
 *          16-byte chunk c of shared row r lies at chunk c ^ (r & 7): ldmatrix meets no bank twice.
 * Joins    1. the KG warps of a row group, through shared memory, a part of the columns each; 2. the blocks of the cluster,
 *          through distributed shared memory: block r finishes rows r, r + cluster, ..., a warp a row; 3. with more than one
 *          cluster a unit, (out, lse2) in f32 to the workspace and combine_kernel. The last of these joins the kept
 *          attention (join_out) and stores.
 * Early    Both kernels may start while the one before drains, and wait for it before they touch memory.
 * Masks    Only tiles that cross a bound take the masked form; tiles past every row's limit are not visited.
 * Arch     sm_80 and later; clusters from sm_90 on, before that splits alone.
 * Checked  tests/kernels/test_attention.c against the definition. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include <type_traits>

#include "kernels/attention_checks.h"
#include "kernels/attention_cuda.cuh"
#include "kernels/attention_decode.h"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"

static constexpr int KEYS = 64; /* keys of a tile */
static constexpr int MAX_CLUSTER = 8, MAX_SPLITS = 32;
static constexpr float LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;

template <int HD, int ROWS> struct decode_shape {
    static constexpr int RG = ROWS / 16, KG = ROWS == 64 ? 2 : 4; /* groups of rows, of keys */
    static constexpr int WARPS = RG * KG, THREADS = WARPS * 32;
    static constexpr int WARP_KEYS = KEYS / KG; /* of a tile, that a warp computes with */
    static constexpr int LD = HD * 2;           /* bytes of a shared row */
    static constexpr int CHUNKS = HD / 8;       /* of 16 bytes */
    static constexpr int STAGE_BYTES = 2 * KEYS * LD, STAGES = 96 * 1024 / STAGE_BYTES;
    static constexpr int Q_BYTES = ROWS * LD, POS_BYTES = STAGES * KEYS * 4;
    static constexpr int RING = Q_BYTES + POS_BYTES; /* where the ring starts */
    /* After the last tile the same bytes hold: parts [KG][RG][HD / 8][32 lanes] float4, m and l of each part's rows, the
     * block's rows in f32 and their lse2. A pitch of 8 mod 32 floats: stores of 8 bytes by four rows meet no bank twice. */
    static constexpr int PITCH = HD + 8;
    static constexpr int STATS = KG * RG * HD / 8 * 32 * 16, MERGED = STATS + KG * RG * 16 * 8,
                         LSE = MERGED + ROWS * PITCH * 4, JOIN_BYTES = LSE + ROWS * 4;
    static constexpr int shared_bytes(int stages) {
        return RING + stages * STAGE_BYTES > JOIN_BYTES ? RING + stages * STAGE_BYTES : JOIN_BYTES;
    }
    static_assert(HD == 64 || HD == 128, "the swizzle needs whole 128-byte lines");
    static_assert(2 * (shared_bytes(STAGES) + 1024) <= 228 * 1024, "two blocks on an SM");
    static_assert(RING % 256 == 0 && MERGED % 16 == 0, "alignment");
};

/* --- instructions ------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
/* Four 8x8 matrices of bf16: attention_mma.cu says which lane gives and receives what. */
static __device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
/* d += a b, a 16x16, b 16x8; g = lane / 4, t = lane % 4: d (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). */
static __device__ __forceinline__ void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Barrier over the cluster that shows each block what the others wrote to their own shared memory: its own release would
 * be about global memory too. */
static __device__ __forceinline__ void cluster_sync_shared(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                 "barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
#endif
}
/* No block leaves while another still reads from it. */
static __device__ __forceinline__ void cluster_leave(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
#endif
}
/* The f32 (or NUM of them) at the same place in block `rank` of the cluster. */
template <int CLUSTER> static __device__ __forceinline__ float load_at(uint32_t addr, int rank) {
    float v;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        asm volatile("{\n"
                     ".reg .b32 remote;\n"
                     "mapa.shared::cluster.u32 remote, %1, %2;\n"
                     "ld.shared::cluster.f32 %0, [remote];\n"
                     "}"
                     : "=f"(v)
                     : "r"(addr), "r"(rank)
                     : "memory");
        return v;
    }
#endif
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(addr) : "memory");
    return v;
}
template <int CLUSTER, int NUM>
static __device__ __forceinline__ void load_at(float (&v)[NUM], uint32_t addr, int rank) {
    static_assert(NUM == 2 || NUM == 4, "columns of a lane");
#if __CUDA_ARCH__ >= 900
    if constexpr (CLUSTER > 1) {
        uint32_t remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(addr), "r"(rank));
        if constexpr (NUM == 4)
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                         : "r"(remote)
                         : "memory");
        else
            asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(remote) : "memory");
        return;
    }
#endif
    if constexpr (NUM == 4)
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(addr)
                     : "memory");
    else
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(addr) : "memory");
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

/* Shared-memory offset of chunk `chunk` of row `row`. */
template <int LD> static __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * LD + (chunk ^ (row & 7)) * 16;
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

/* NUM neighbours, aligned. */
template <int NUM> static __device__ __forceinline__ void load_columns(const float *p, float (&v)[NUM]) {
    if constexpr (NUM == 4) {
        rf_load4(p, v);
    } else {
        const float2 two = *reinterpret_cast<const float2 *>(p);
        v[0] = two.x, v[1] = two.y;
    }
}
template <int NUM> static __device__ __forceinline__ void store_columns(float *p, const float (&v)[NUM]) {
    if constexpr (NUM == 4)
        rf_store4(p, v);
    else
        *reinterpret_cast<float2 *>(p) = make_float2(v[0], v[1]);
}
template <int NUM> static __device__ __forceinline__ void store_columns(rf_bf16 *p, const float (&v)[NUM]) {
    if constexpr (NUM == 4)
        rf_store4(p, v);
    else
        *reinterpret_cast<uint32_t *>(p) = rf_pack_bf16(v[0], v[1]);
}

/* By a whole warp: joins what is kept of packed row `row` with (o, lse2) and stores it. Lane l has columns NUM l ...; NUM =
 * head_dim / 32. An empty side is not read. */
template <int NUM>
static __device__ __forceinline__ void finish_row(const rf_attention_params &p, int batch, int head, int row,
                                                  float (&o)[NUM], float lse2, int lane) {
    const int query = p.group == 1 ? row : row / p.group, q_head = head * p.group + (row - query * p.group);
    const int64_t listed = batch * p.q_batch_stride_rows + query;
    if (p.join_out) {
        const int64_t slot = p.join_rows ? p.join_rows[listed] : query;
        const float kept = p.join_lse[q_head * p.join_slots + slot] * LOG2E, top = fmaxf(lse2, kept);
        const float mine = lse2 == -INFINITY ? 0.0f : exp2f(lse2 - top),
                    other = kept == -INFINITY ? 0.0f : exp2f(kept - top);
        const float sum = mine + other, inv = sum == 0.0f ? 0.0f : 1.0f / sum;
        float v[NUM];
#pragma unroll
        for (int i = 0; i < NUM; i++) v[i] = 0.0f;
        if (other != 0.0f) load_columns(p.join_out + (slot * p.num_q_heads + q_head) * (NUM * 32) + lane * NUM, v);
#pragma unroll
        for (int i = 0; i < NUM; i++) o[i] = (mine * o[i] + other * v[i]) * inv;
        lse2 = sum == 0.0f ? -INFINITY : top + log2f(sum);
    }
    const int64_t out_row = p.out_rows ? p.out_rows[listed] : query;
    const int64_t at =
        batch * p.out_batch_stride + out_row * p.out_row_stride + q_head * p.out_head_stride + lane * NUM;
    if (p.out_is_f32)
        store_columns((float *)p.out + at, o);
    else
        store_columns((rf_bf16 *)p.out + at, o);
    if (p.lse && lane == 0) p.lse[((int64_t)batch * p.num_q_heads + q_head) * p.lse_slots + out_row] = lse2 * LN2;
}

/* --- the kernel --------------------------------------------------------------------------------------------------- */

/* Rows rank, rank + CLUSTER, ... of the cluster's tile: joins the blocks' parts in rank order. */
template <int HD, int ROWS, int CLUSTER>
static __device__ __forceinline__ void finish_tile(const rf_attention_params &p, uint32_t shared, int rank, int split,
                                                   int batch, int head, int first_row, int num_rows) {
    using Shape = decode_shape<HD, ROWS>;
    constexpr int NUM = HD / 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int r = warp * CLUSTER + rank; r < num_rows; r += Shape::WARPS * CLUSTER) {
        const float lse = lane < CLUSTER ? load_at<CLUSTER>(shared + Shape::LSE + r * 4, lane) : -INFINITY;
        float part[CLUSTER][NUM];
#pragma unroll
        for (int i = 0; i < CLUSTER; i++)
            load_at<CLUSTER>(part[i], shared + Shape::MERGED + (r * Shape::PITCH + lane * NUM) * 4, i);
        const float top = rf_warp_max(lse);
        const float weight = lse == -INFINITY ? 0.0f : exp2f(lse - top);
        float sum = 0.0f, o[NUM];
#pragma unroll
        for (int c = 0; c < NUM; c++) o[c] = 0.0f;
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) {
            const float w = __shfl_sync(0xffffffffu, weight, i);
            sum += w;
#pragma unroll
            for (int c = 0; c < NUM; c++) o[c] += w * part[i][c]; /* an empty part holds zeros */
        }
        const float inv = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
        for (int c = 0; c < NUM; c++) o[c] *= inv;
        const float lse2 = sum == 0.0f ? -INFINITY : top + log2f(sum);
        const int row = first_row + r;
        if (p.num_splits == 1) {
            finish_row<NUM>(p, batch, head, row, o, lse2, lane);
        } else {
            const int64_t at = (((int64_t)split * p.batch + batch) * p.num_kv_heads + head) * p.num_rows + row;
            store_columns(p.part_out + at * HD + lane * NUM, o);
            if (lane == 0) p.part_lse[at] = lse2;
        }
    }
}

template <int HD, int ROWS, bool INDEXED>
static __global__ void __launch_bounds__(decode_shape<HD, ROWS>::THREADS, 2)
    attention_decode_kernel(const __grid_constant__ rf_attention_params p, const int cluster) {
    using Shape = decode_shape<HD, ROWS>;
    constexpr int LD = Shape::LD, CHUNKS = Shape::CHUNKS, STAGES = Shape::STAGES, RG = Shape::RG, KG = Shape::KG;
    constexpr int K_STEPS = HD / 16, N_TILES = HD / 8; /* k16 steps of q k^T; n8 tiles of p v */
    constexpr int S_TILES = Shape::WARP_KEYS / 8;      /* n8 tiles of q k^T */
    constexpr int COPY_KEYS = KEYS / Shape::WARPS;     /* keys of a tile that a warp brings */
    constexpr int PASS_ROWS = 32 / CHUNKS;             /* rows that a warp copies at once */
    constexpr bool Q_STAYS = RG == 1;                  /* in registers; else there are too few of them */
    static_assert(COPY_KEYS % PASS_ROWS == 0 && COPY_KEYS <= 32, "a lane per key");
    static_assert(ROWS % (Shape::WARPS * PASS_ROWS) == 0, "whole passes over q");
    extern __shared__ __align__(1024) uint8_t shared[];

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row_group = warp % RG, key_group = warp / RG;
    const int row_tiles = (int)gridDim.y / p.num_kv_heads;
    const int head = (int)blockIdx.y / row_tiles, row_tile = (int)blockIdx.y - head * row_tiles;
    const int batch = p.batch_first + (int)blockIdx.z;
    const int rank = (int)blockIdx.x % cluster, split = (int)blockIdx.x / cluster;
    const int first_row = row_tile * ROWS, num_rows = min(ROWS, p.num_rows - first_row);
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    const uint32_t ring = base + Shape::RING;
    int32_t *const pos_ring = reinterpret_cast<int32_t *>(shared + Shape::Q_BYTES);

    rf_wait_for_previous();

    /* Which keys a row sees: rows before its limit. */
    const int32_t *const q_list = p.q_rows ? p.q_rows + batch * p.q_batch_stride_rows : NULL;
    const int64_t pos_offset = (int64_t)p.q_pos_offset + (p.q_pos_offsets ? p.q_pos_offsets[batch] : 0);
    auto limit_of = [&](int r) -> int { /* r < num_rows, of this tile */
                                        const int query = (first_row + r) / p.group;
                                        return key_limit(p, (q_list ? q_list[query] : query) + pos_offset);
    };
    int len = p.num_keys;
    if (p.kv_lens) len = max(0, min(p.kv_lens[batch], len));
    int block_limit = INT_MAX; /* of all rows of the tile */
    if (p.mask != RF_MASK_NONE) {
        int most = lane < num_rows ? limit_of(lane) : 0;
        if (ROWS > 32 && lane + 32 < num_rows) most = max(most, limit_of(lane + 32));
        block_limit = __reduce_max_sync(0xffffffffu, most);
    }
    const int block_keys = INDEXED ? len : max(0, min(len, block_limit - p.first_key));

    /* Tiles of this block, of this cluster. */
    const int num_blocks = (int)gridDim.x, all_tiles = (block_keys + KEYS - 1) / KEYS;
    auto first_tile = [&](int block) { return (int)((int64_t)block * all_tiles / num_blocks); };
    const int tile_begin = first_tile(blockIdx.x), num_tiles = first_tile(blockIdx.x + 1) - tile_begin;
    if (p.num_splits > 1 && first_tile(split * cluster) == first_tile((split + 1) * cluster)) {
        /* The whole cluster is past the end: it says so and leaves. */
        const int64_t at = (((int64_t)split * p.batch + batch) * p.num_kv_heads + head) * p.num_rows + first_row;
        if (rank == 0 && (int)threadIdx.x < num_rows) p.part_lse[at + threadIdx.x] = -INFINITY;
        return;
    }

    /* Copies: q, then tiles. Lane l of a warp has chunk l % CHUNKS of row l / CHUNKS of each pass. */
    const int copy_row = lane / CHUNKS, copy_chunk = lane % CHUNKS;
    if (num_tiles > 0) {
        const char *const q = (const char *)p.q + batch * p.q_batch_stride * 2;
#pragma unroll
        for (int pass = 0; pass < ROWS / (Shape::WARPS * PASS_ROWS); pass++) {
            const int r = (pass * Shape::WARPS + warp) * PASS_ROWS + copy_row;
            const bool valid = r < num_rows;
            const int row = valid ? first_row + r : first_row;
            const int query = p.group == 1 ? row : row / p.group, q_head = head * p.group + (row - query * p.group);
            const int64_t q_row = q_list ? q_list[query] : query;
            copy16(base + chunk_offset<LD>(r, copy_chunk),
                   q + (q_row * p.q_row_stride + (int64_t)q_head * p.q_head_stride) * 2 + copy_chunk * 16,
                   valid ? 16 : 0);
        }
    }
    const int32_t *const kv_list = p.kv_rows ? p.kv_rows + batch * p.kv_batch_stride_rows : NULL;
    const int64_t kv_offset = (batch * p.kv_batch_stride + head * p.kv_head_stride) * 2,
                  row_bytes = p.kv_row_stride * 2;
    const char *const k_base = (const char *)p.k + kv_offset, *const v_base = (const char *)p.v + kv_offset;
    auto fetch_row = [&](int j)
        -> int { /* row of the lane's key of tile j, -1 past the end; a tile ahead: nothing looks at it before load_tile */
                 if (!INDEXED || j >= num_tiles || lane >= COPY_KEYS) return -1;
                 return key_row(p, kv_list, (tile_begin + j) * KEYS + warp * COPY_KEYS + lane, len);
    };
    auto load_tile = [&](int j, int stage, int row_of_lane) {
        const uint32_t dst = ring + stage * Shape::STAGE_BYTES;
        if (INDEXED) {
            if (row_of_lane >= block_limit) row_of_lane = -1; /* seen by no row */
            if (lane < COPY_KEYS)
                pos_ring[stage * KEYS + warp * COPY_KEYS + lane] = row_of_lane < 0 ? INT_MAX : row_of_lane;
#pragma unroll
            for (int pass = 0; pass < COPY_KEYS / PASS_ROWS; pass++) {
                const int r = pass * PASS_ROWS + copy_row;
                const int from = __shfl_sync(0xffffffffu, row_of_lane, r);
                const int64_t offset = from < 0 ? 0 : from * row_bytes + copy_chunk * 16;
                const uint32_t at = dst + chunk_offset<LD>(warp * COPY_KEYS + r, copy_chunk);
                copy16(at, k_base + offset, from < 0 ? 0 : 16);
                copy16(at + KEYS * LD, v_base + offset, from < 0 ? 0 : 16);
            }
            return;
        }
        /* Rows past the last become zeros: their scores are masked, and 0 times a stale value could be NaN. */
        const int key = (tile_begin + j) * KEYS + warp * COPY_KEYS + copy_row;
        const int64_t first = (p.first_key + key) * row_bytes + copy_chunk * 16, step = PASS_ROWS * row_bytes;
        const char *k = k_base + first, *v = v_base + first;
        const bool whole = (tile_begin + j) * KEYS + KEYS <= block_keys;
#pragma unroll
        for (int pass = 0; pass < COPY_KEYS / PASS_ROWS; pass++) {
            const bool valid = whole || key + pass * PASS_ROWS < block_keys;
            const uint32_t at = dst + chunk_offset<LD>(warp * COPY_KEYS + pass * PASS_ROWS + copy_row, copy_chunk);
            copy16(at, valid ? k : k_base, valid ? 16 : 0);
            copy16(at + KEYS * LD, valid ? v : v_base, valid ? 16 : 0);
            k += step;
            v += step;
        }
    };

    /* Copy group j is tile j; q is in group 0. */
    {
        int rows[STAGES];
#pragma unroll
        for (int j = 0; j < STAGES; j++) rows[j] = fetch_row(j);
#pragma unroll
        for (int j = 0; j < STAGES; j++) {
            if (j < num_tiles) load_tile(j, j, rows[j]);
            copy_commit();
        }
    }
    int next_row = fetch_row(STAGES);

    /* This warp's rows: lane / 4 and + 8 of its 16. Consecutive keys are compared by index, others by row. */
    const bool has_rows = row_group * 16 < num_rows;
    int row_limit[2], free_keys;
    {
        const int r = row_group * 16 + (lane & 15);
        int limit = 0;
        if (r < num_rows) limit = limit_of(r);
        if (!INDEXED && r < num_rows) limit = max(0, min(limit - p.first_key, len));
        if (INDEXED)
            free_keys = p.mask == RF_MASK_NONE ? len : 0;
        else
            free_keys = __reduce_min_sync(0xffffffffu, r < num_rows ? limit : INT_MAX);
        row_limit[0] = __shfl_sync(0xffffffffu, limit, lane / 4);
        row_limit[1] = __shfl_sync(0xffffffffu, limit, lane / 4 + 8);
    }

    float o[N_TILES][4], top[2] = {-INFINITY, -INFINITY},
                         sum[2] = {0.0f, 0.0f}; /* m in units of s; l, the lane's share */
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = 0.0f;

    /* Lane parts of ldmatrix addresses, as in attention_mma.cu: matrix i = lane / 8, row r = lane % 8; a step of 16 columns
     * is an exclusive or. */
    const int mat = lane >> 3, mat_row = lane & 7;
    const uint32_t k_lane = chunk_offset<LD>((mat >> 1) * 8 + mat_row, mat & 1) + key_group * Shape::WARP_KEYS * LD;
    const uint32_t q_lane = chunk_offset<LD>((mat & 1) * 8 + mat_row, mat >> 1);
    const uint32_t v_lane = q_lane + key_group * Shape::WARP_KEYS * LD + KEYS * LD;
    const uint32_t q_tile = base + row_group * 16 * LD + q_lane;
    uint32_t q[Q_STAYS ? K_STEPS : 1][4];

    /* This warp's keys of one tile. MASKED: some row does not see some of the tile. */
    auto tile_step = [&](auto masked, uint32_t tile, const int32_t *pos, int key0) {
        constexpr bool MASKED = decltype(masked)::value;
        float s[S_TILES][4];
#pragma unroll
        for (int n = 0; n < S_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            if (!Q_STAYS) ldmatrix4(q[0], q_tile ^ (k * 32));
            const uint32_t(&a)[4] = q[Q_STAYS ? k : 0];
#pragma unroll
            for (int n = 0; n < S_TILES / 2; n++) {
                uint32_t b[4]; /* keys 16 n .. + 7: b0, b1; keys + 8 .. + 15: b2, b3 */
                ldmatrix4(b, ((tile + k_lane) ^ (k * 32)) + n * 16 * LD);
                mma16(s[2 * n], a, b[0], b[1]);
                mma16(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        if (MASKED) {
#pragma unroll
            for (int n = 0; n < S_TILES; n++) {
                const int col = key_group * Shape::WARP_KEYS + n * 8 + (lane & 3) * 2;
                const int key_a = INDEXED ? pos[col] : key0 + col, key_b = INDEXED ? pos[col + 1] : key0 + col + 1;
                if (key_a >= row_limit[0]) s[n][0] = -INFINITY;
                if (key_b >= row_limit[0]) s[n][1] = -INFINITY;
                if (key_a >= row_limit[1]) s[n][2] = -INFINITY;
                if (key_b >= row_limit[1]) s[n][3] = -INFINITY;
            }
        }
        const float c = p.scale_log2;
        float high[2] = {s[0][0], s[0][2]};
#pragma unroll
        for (int n = 0; n < S_TILES; n++) {
            high[0] = fmaxf(high[0], fmaxf(s[n][0], s[n][1]));
            high[1] = fmaxf(high[1], fmaxf(s[n][2], s[n][3]));
        }
        bool grow = false;
#pragma unroll
        for (int h = 0; h < 2; h++) { /* the four lanes of a row agree */
            high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
            high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
            grow |= (high[h] - top[h]) * c > 8.0f; /* -inf - -inf is NaN: no */
        }
        if (__any_sync(0xffffffffu, grow)) {
            float alpha[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float next = (high[h] - top[h]) * c > 8.0f ? high[h] : top[h];
                alpha[h] = next == top[h] ? 1.0f : exp2_approx((top[h] - next) * c);
                top[h] = next;
                sum[h] *= alpha[h];
            }
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
                o[n][0] *= alpha[0], o[n][1] *= alpha[0];
                o[n][2] *= alpha[1], o[n][3] *= alpha[1];
            }
        }
        float shift[2];
#pragma unroll
        for (int h = 0; h < 2; h++) shift[h] = MASKED && top[h] == -INFINITY ? 0.0f : top[h] * c;
#pragma unroll
        for (int n = 0; n < S_TILES; n++) {
            s[n][0] = exp2_approx(fmaf(s[n][0], c, -shift[0]));
            s[n][1] = exp2_approx(fmaf(s[n][1], c, -shift[0]));
            s[n][2] = exp2_approx(fmaf(s[n][2], c, -shift[1]));
            s[n][3] = exp2_approx(fmaf(s[n][3], c, -shift[1]));
            sum[0] += s[n][0] + s[n][1];
            sum[1] += s[n][2] + s[n][3];
        }
#pragma unroll
        for (int k = 0; k < S_TILES / 2; k++) {
            const uint32_t prob[4] = {/* accumulators of two n8 tiles are one k16 operand */
                                      rf_pack_bf16(s[2 * k][0], s[2 * k][1]), rf_pack_bf16(s[2 * k][2], s[2 * k][3]),
                                      rf_pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]),
                                      rf_pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < N_TILES / 2; n++) {
                uint32_t b[4]; /* columns 16 n .. + 7: b0, b1; columns + 8 .. + 15: b2, b3 */
                ldmatrix4_trans(b, ((tile + v_lane) ^ (n * 32)) + k * 16 * LD);
                mma16(o[2 * n], prob, b[0], b[1]);
                mma16(o[2 * n + 1], prob, b[2], b[3]);
            }
        }
    };

    int stage = 0;
#pragma unroll 1
    for (int j = 0; j < num_tiles; j++) {
        if (j == 0)
            copy_wait<STAGES - 1>();
        else
            copy_wait<STAGES - 2>();
        __syncthreads(); /* tile j is there, whoever brought it; all are done with tile j - 1 */
        if (j == 0) {
            if (Q_STAYS) {
#pragma unroll
                for (int k = 0; k < (Q_STAYS ? K_STEPS : 1); k++) ldmatrix4(q[k], q_tile ^ (k * 32));
            }
        } else {
            const int refill = j - 1 + STAGES;
            if (refill < num_tiles) load_tile(refill, stage == 0 ? STAGES - 1 : stage - 1, next_row);
            copy_commit();
            next_row = fetch_row(refill + 1);
        }
        const uint32_t tile = ring + stage * Shape::STAGE_BYTES;
        const int key0 = (tile_begin + j) * KEYS;
        if (has_rows) {
            if (key0 + KEYS <= free_keys)
                tile_step(std::false_type(), tile, pos_ring + stage * KEYS, key0);
            else
                tile_step(std::true_type(), tile, pos_ring + stage * KEYS, key0);
        }
        if (++stage == STAGES) stage = 0;
    }
    copy_wait<0>();
    __syncthreads(); /* the ring is free */

    /* Join the key groups: every warp leaves its part, then takes a share of the columns of its row group. */
    float *const stats = reinterpret_cast<float *>(shared + Shape::STATS);
    float4 *const parts = reinterpret_cast<float4 *>(shared);
    const int part = key_group * RG + row_group;
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
        parts[(part * N_TILES + n) * 32 + lane] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        if ((lane & 3) == 0) {
            float *const two = stats + (part * 16 + lane / 4 + 8 * h) * 2;
            two[0] = top[h];
            two[1] = sum[h];
        }
    }
    __syncthreads(); /* all parts are there */
    float weight[KG][2], inv[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float tops[KG], sums[KG], most = -INFINITY, total = 0.0f;
        const int r = lane / 4 + 8 * h;
#pragma unroll
        for (int g = 0; g < KG; g++) {
            const float2 two = *reinterpret_cast<const float2 *>(stats + ((g * RG + row_group) * 16 + r) * 2);
            tops[g] = two.x;
            sums[g] = two.y;
            most = fmaxf(most, tops[g]);
        }
#pragma unroll
        for (int g = 0; g < KG; g++) {
            weight[g][h] = tops[g] == -INFINITY ? 0.0f : exp2_approx((tops[g] - most) * p.scale_log2);
            total += weight[g][h] * sums[g];
        }
        inv[h] = total == 0.0f ? 0.0f : 1.0f / total; /* NaN stays NaN */
        if (key_group == 0 && (lane & 3) == 0)
            *reinterpret_cast<float *>(shared + Shape::LSE + (row_group * 16 + r) * 4) =
                total == 0.0f ? -INFINITY : most * p.scale_log2 + log2f(total);
    }
    float *const merged = reinterpret_cast<float *>(shared + Shape::MERGED) + row_group * 16 * Shape::PITCH;
#pragma unroll
    for (int i = 0; i < N_TILES / KG; i++) {
        const int n = key_group * (N_TILES / KG) + i;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < KG; g++) {
            const float4 f = parts[((g * RG + row_group) * N_TILES + n) * 32 + lane];
            v[0] += weight[g][0] * f.x;
            v[1] += weight[g][0] * f.y;
            v[2] += weight[g][1] * f.z;
            v[3] += weight[g][1] * f.w;
        }
        float *const dst = merged + lane / 4 * Shape::PITCH + n * 8 + (lane & 3) * 2;
        *reinterpret_cast<float2 *>(dst) = make_float2(v[0] * inv[0], v[1] * inv[0]);
        *reinterpret_cast<float2 *>(dst + 8 * Shape::PITCH) = make_float2(v[2] * inv[1], v[3] * inv[1]);
    }

    /* Join the blocks of the cluster. */
    if (cluster > 1)
        cluster_sync_shared();
    else
        __syncthreads();
    switch (cluster) {
    case 1: finish_tile<HD, ROWS, 1>(p, base, rank, split, batch, head, first_row, num_rows); break;
#if __CUDA_ARCH__ >= 900
    case 2: finish_tile<HD, ROWS, 2>(p, base, rank, split, batch, head, first_row, num_rows); break;
    case 4: finish_tile<HD, ROWS, 4>(p, base, rank, split, batch, head, first_row, num_rows); break;
    case 8: finish_tile<HD, ROWS, 8>(p, base, rank, split, batch, head, first_row, num_rows); break;
#endif
    }
    if (cluster > 1) cluster_leave();
}

/* Joins splits, in split order: a warp per (batch, key head, packed row). */
template <int NUM>
static __global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ rf_attention_params p) {
    rf_wait_for_previous();
    const int lane = threadIdx.x & 31;
    const int64_t per_split = (int64_t)p.batch * p.num_kv_heads * p.num_rows;
    const int64_t index = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
    if (index >= per_split) return;
    const float lse = lane < p.num_splits ? p.part_lse[lane * per_split + index] : -INFINITY;
    const float top = rf_warp_max(lse);
    const float weight = lse == -INFINITY ? 0.0f : exp2f(lse - top);
    float sum = 0.0f, o[NUM];
#pragma unroll
    for (int c = 0; c < NUM; c++) o[c] = 0.0f;
    constexpr int BATCH = 8; /* loads under way */
    for (int s0 = 0; s0 < p.num_splits; s0 += BATCH) {
        float w[BATCH], v[BATCH][NUM];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            w[i] = __shfl_sync(0xffffffffu, weight, (s0 + i) & 31);
#pragma unroll
            for (int c = 0; c < NUM; c++) v[i][c] = 0.0f;
            if (w[i] != 0.0f) /* an empty split has written no row */
                load_columns(p.part_out + ((s0 + i) * per_split + index) * (NUM * 32) + lane * NUM, v[i]);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            sum += w[i];
#pragma unroll
            for (int c = 0; c < NUM; c++) o[c] += w[i] * v[i][c];
        }
    }
    const float inv = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int c = 0; c < NUM; c++) o[c] *= inv;
    const int row = (int)(index % p.num_rows);
    const int64_t sample = index / p.num_rows;
    finish_row<NUM>(p, (int)(sample / p.num_kv_heads), (int)(sample % p.num_kv_heads), row, o,
                    sum == 0.0f ? -INFINITY : top + log2f(sum), lane);
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

/* stream NULL: raises the kernel's shared-memory limit on the current device, if there is one, and returns. */
template <int HD, int ROWS, bool INDEXED>
static rf_status launch(rf_stream *stream, const rf_attention_params &params, const rf_attention_decode_plan &plan,
                        rf_error *err) {
    using Shape = decode_shape<HD, ROWS>;
    static std::atomic<uint64_t> allowed{0};
    auto kernel = attention_decode_kernel<HD, ROWS, INDEXED>;
    cudaError_t code = rf_allow_shared((const void *)kernel, Shape::shared_bytes(Shape::STAGES), &allowed);
    if (!stream) {
        (void)cudaGetLastError();
        return RF_OK;
    }
    if (code != cudaSuccess) return rf_cuda_fail(err, "attention_decode", code);
    rf_attention_params p = params;
    const int blocks = plan.cluster * plan.num_splits;
    const int64_t tiles = rf_ceil_div(rf_ceil_div(p.num_keys, KEYS), blocks); /* of a block, at full length */
    const int stages = tiles < 1 ? 1 : tiles < Shape::STAGES ? (int)tiles : Shape::STAGES;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(Shape::THREADS);
    config.dynamicSmemBytes = (size_t)Shape::shared_bytes(stages);
    config.stream = (cudaStream_t)rf_stream_native(stream);
    config.attrs = attributes;
    if (rf_backend_sm(rf_stream_backend(stream)) >= 90) {
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        config.numAttrs = 1;
        if (plan.cluster > 1) {
            attributes[1].id = cudaLaunchAttributeClusterDimension;
            attributes[1].val.clusterDim.x = (unsigned)plan.cluster;
            attributes[1].val.clusterDim.y = 1;
            attributes[1].val.clusterDim.z = 1;
            config.numAttrs = 2;
        }
    }
    for (int first = 0; first < p.batch; first += 65535) {
        const int count = p.batch - first < 65535 ? p.batch - first : 65535;
        p.batch_first = first;
        config.gridDim =
            dim3((unsigned)blocks, (unsigned)(p.num_kv_heads * rf_ceil_div(p.num_rows, ROWS)), (unsigned)count);
        code = cudaLaunchKernelEx(&config, kernel, p, plan.cluster);
        const cudaError_t last = cudaGetLastError(); /* also clears what the launch left behind */
        if (code == cudaSuccess) code = last;
        if (code != cudaSuccess) return rf_cuda_fail(err, "attention_decode", code);
        rf_stream_note_launch(stream, "attention_decode");
    }
    return RF_OK;
}

template <int HD>
static rf_status launch_rows(rf_stream *stream, const rf_attention_params &p, bool indexed,
                             const rf_attention_decode_plan &plan, rf_error *err) {
    switch (plan.row_tile) {
    case 16: return indexed ? launch<HD, 16, true>(stream, p, plan, err) : launch<HD, 16, false>(stream, p, plan, err);
    case 32: return indexed ? launch<HD, 32, true>(stream, p, plan, err) : launch<HD, 32, false>(stream, p, plan, err);
    default: return indexed ? launch<HD, 64, true>(stream, p, plan, err) : launch<HD, 64, false>(stream, p, plan, err);
    }
}

rf_status rf_attention_decode_run(rf_stream *stream, const rf_attention_args *args,
                                  const rf_attention_decode_plan *plan, rf_error *err) {
    rf_attention_params p = rf_attention_make_params(args);
    p.num_splits = plan->num_splits;
    if (plan->num_splits > 1) {
        p.part_out = (float *)args->workspace;
        p.part_lse = p.part_out + (int64_t)p.num_splits * p.batch * p.num_kv_heads * p.num_rows * p.head_dim;
    }
    const bool indexed = rf_attention_is_indexed(args);
    rf_status status = args->head_dim == 128 ? launch_rows<128>(stream, p, indexed, *plan, err)
                                             : launch_rows<64>(stream, p, indexed, *plan, err);
    if (status != RF_OK || !stream || p.num_splits == 1) return status;
    const int64_t rows = (int64_t)p.batch * p.num_kv_heads * p.num_rows;
    return rf_launch_early(stream, "attention_combine", err,
                           args->head_dim == 128 ? combine_kernel<4> : combine_kernel<2>,
                           dim3((unsigned)rf_ceil_div(rows, 4)), dim3(128), 0, p);
}

/* --- chooser ------------------------------------------------------------------------------------------------------ */

static int64_t count_keys(const rf_attention_args *args) {
    if (args->num_ranges == 0) return args->kv_len;
    int64_t keys = 0;
    for (int i = 0; i < args->num_ranges; i++) keys += args->ranges[i].end - args->ranges[i].begin;
    return keys;
}

static size_t split_bytes(const rf_attention_args *args, int splits) {
    if (splits <= 1) return 0;
    return (size_t)splits * (size_t)args->batch * (size_t)args->num_q_heads * (size_t)args->q_len *
           (size_t)(args->head_dim + 1) * sizeof(float);
}

/* Estimates in us and bytes / us, for an H100: what memory gives, what one SM can take, a tile's way through a block where
 * copies do not hide it (the first few), a join within a cluster, one through memory by a second kernel. Only their ratios
 * matter. */
static constexpr double MEMORY = 2.9e6, SM_RATE = 40e3, TILE_US = 0.12, CLUSTER_US = 0.6, SPLIT_US = 1.8,
                        EACH_SPLIT_US = 0.1;

static double estimate(int64_t units, int64_t tiles, double tile_bytes, int num_sms, int cluster, int splits) {
    const int64_t blocks = units * cluster * splits;
    /* Clusters lie within a GPC, of which some have fewer SMs: a few slots stay empty. */
    int64_t slots = 2 * (int64_t)num_sms - (cluster == 8 ? 16 : cluster == 4 ? 12 : 0);
    if (slots < cluster) slots = cluster;
    const int64_t wave = blocks < slots ? blocks : slots / cluster * cluster, waves = rf_ceil_div(blocks, wave);
    const double each = (double)rf_ceil_div(tiles, cluster * splits); /* tiles of a block */
    const double sms = (double)(wave < num_sms ? wave : num_sms),
                 rate = sms * SM_RATE < MEMORY ? sms * SM_RATE : MEMORY;
    double us = (double)waves * (each * tile_bytes * (double)wave / rate + (each < 4 ? each : 4.0) * TILE_US);
    if (cluster > 1) us += CLUSTER_US;
    if (splits > 1) us += SPLIT_US + EACH_SPLIT_US * splits;
    return us;
}

rf_status rf_attention_decode_choose(const rf_attention_args *args, int sm, int num_sms, rf_attention_decode_plan *plan,
                                     rf_error *err) {
    const int hd = args->head_dim, group = args->num_q_heads / args->num_kv_heads;
    if (args->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "attention: the decode kernel takes bf16, not %s",
                       rf_dtype_name(args->dtype));
    if (hd != 64 && hd != 128)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the decode kernel takes head_dim 64 or 128, not %d", hd);
    if (!(args->softmax_scale > 0))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: softmax_scale is %g, must be above 0 on CUDA",
                       (double)args->softmax_scale);
    const rf_status status = rf_attention_check_strides(args, err);
    if (status != RF_OK) return status;
    const int64_t rows = args->q_len * group;
    plan->row_tile = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
    const int64_t row_tiles = rows > 0 ? rf_ceil_div(rows, plan->row_tile) : 1;
    if (rows > INT32_MAX - 256 || args->kv_len > INT32_MAX - 256 || row_tiles * args->num_kv_heads > 65535)
        return rf_fail(err, RF_ERR_SHAPE,
                       "attention: %lld query rows against %lld keys are too many for the decode kernel",
                       (long long)rows, (long long)args->kv_len);

    const int64_t units = args->batch * args->num_kv_heads * row_tiles, tiles = rf_ceil_div(count_keys(args), KEYS);
    plan->cluster = plan->num_splits = 1;
    double best = INFINITY;
    for (int splits = 1; units > 0 && num_sms > 0 && splits <= MAX_SPLITS; splits++) {
        for (int cluster = 1; cluster <= (sm >= 90 ? MAX_CLUSTER : 1); cluster *= 2) {
            if (cluster * splits > 1 && cluster * splits > tiles) break;
            const double us = estimate(units, tiles, KEYS * hd * 4.0, num_sms, cluster, splits);
            if (us >= best) continue;
            best = us;
            plan->cluster = cluster;
            plan->num_splits = splits;
        }
    }
    plan->workspace_bytes = split_bytes(args, plan->num_splits);
    return RF_OK;
}

extern "C" rf_status rf_attention_decode_force(rf_stream *stream, const rf_attention_args *args, int cluster,
                                               int splits, size_t *need, rf_error *err) {
    rf_status status = rf_attention_check_run(args, err);
    if (status == RF_OK) status = rf_attention_out_check_run(args, err);
    if (status != RF_OK || args->batch == 0 || args->q_len == 0) return status;
    rf_backend *const backend = rf_stream_backend(stream);
    const int sm = rf_backend_sm(backend);
    rf_attention_decode_plan plan = {};
    status = rf_attention_decode_choose(args, sm, rf_backend_num_sms(backend), &plan, err);
    if (status != RF_OK) return status;
    if (cluster < 1 || cluster > (sm >= 90 ? MAX_CLUSTER : 1) || (cluster & (cluster - 1)) != 0 || splits < 1 ||
        splits > MAX_SPLITS)
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: %d splits of clusters of %d are not to be had", splits,
                       cluster);
    plan.cluster = cluster;
    plan.num_splits = splits;
    *need = split_bytes(args, splits);
    status = rf_check_workspace("attention", args->workspace, args->workspace_bytes, *need, err);
    return status == RF_OK ? rf_attention_decode_run(stream, args, &plan, err) : status;
}

bool rf_attention_decode_wins(const rf_attention_args *args) {
    const int64_t rows = args->q_len * (args->num_q_heads / args->num_kv_heads);
    /* Above 32 rows products begin to count, and wgmma is faster at them once it fills the card. */
    return rows <= (args->batch * args->num_kv_heads <= 128 ? 64 : 32) && count_keys(args) >= 256;
}
