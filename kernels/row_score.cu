/* kernels/row_score.cu - how much attention every key row received, or how small its value is.
 * Maths    s = k q^T with keys as rows, part(key) = sum over queries of 2^(c s - lse log2 e), c = scale log2 e; or
 *          part = 1 - |v|. Then the sum over heads, divided by its L2 norm over the rows of a group.
 * Shapes   attention bf16: head_dim 64, 72, 80, 96, 128, strides multiples of 8, 16-byte aligned bases; f32: any head_dim
 *          up to 256. Value: any.
 * Launch   attention bf16: grid (tiles of 64 or 128 keys, heads, groups), four warps; a warp keeps 16 MT keys in registers
 *          as the left operand, queries come by cp.async in tiles of 64 into a ring of two. Two barriers a tile, "stage is
 *          full" and "stage is free again". Attention f32: 16 keys a block, 16 threads a key. Value: a thread per head and
 *          row. Every head writes its part to the workspace; a block per group adds them in the order of heads.
 * Shared   rows of 144, 176 and 208 bytes (head_dim 72, 80, 96): stride / 16 is odd, ldmatrix meets no bank twice.
 *          Rows of 128 and 256 bytes: 16-byte chunk c of row r lies at chunk c ^ (r & 7).
 * Order    fixed, no atomics: the same bits on every run; both tiles add in the same order.
 * Cost     attention: half the products of an attention forward; two launches.  Arch  sm_80 and later.
 * Checked  tests/kernels against the map itself. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attention_cuda.cuh"
#include "kernels/cache_checks.h"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr float LOG2_E = 1.4426950408889634f;

/* --- instructions; fragments as in attention_mma.cu --------------------------------------------------------------- */

template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
static __device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
static __device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}
static __device__ __forceinline__ void ldmatrix2(uint32_t &r0, uint32_t &r1, uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(addr));
}
/* d += a b, a 16x16, b 16x8. g = lane / 4, t = lane % 4. d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). */
static __device__ __forceinline__ void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* The same with a 16x8, b 8x8. */
static __device__ __forceinline__ void mma8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

/* --- attention, bf16 ---------------------------------------------------------------------------------------------- */

template <int HD, int MT> struct score_shape {
    static constexpr int WARPS = 4, THREADS = WARPS * 32;
    static constexpr int KEYS = 16 * MT * WARPS, QUERIES = 64, STAGES = 2;
    static constexpr int CHUNKS = HD / 8; /* of 16 bytes */
    static constexpr bool SWIZZLED = HD % 64 == 0;
    static constexpr int LD = SWIZZLED || HD == 72 ? HD * 2 : HD * 2 + 16; /* bytes of a shared row */
    static constexpr int K_BYTES = KEYS * LD, Q_BYTES = QUERIES * LD;
    static constexpr int SHARED_BYTES = K_BYTES + STAGES * (Q_BYTES + QUERIES * 4);
    static_assert(HD % 8 == 0 && (LD / 16 % 2 == 1 || SWIZZLED), "bank conflicts");
    static __device__ __forceinline__ int offset(int row, int chunk) {
        return row * LD + (SWIZZLED ? chunk ^ (row & 7) : chunk) * 16;
    }
};

template <int HD, int MT>
static __global__ void __launch_bounds__(128, MT == 1 ? (HD <= 96 ? 4 : 3) : (HD <= 80 ? 3 : 2))
    attention_kernel(const __grid_constant__ rf_row_score_args p) {
    using Shape = score_shape<HD, MT>;
    constexpr int LD = Shape::LD, CHUNKS = Shape::CHUNKS, QUERIES = Shape::QUERIES, STAGES = Shape::STAGES;
    constexpr int K_STEPS = HD / 16;
    constexpr bool ODD = HD % 16 == 8; /* one k8 step more */
    constexpr int HALF = 32;           /* queries whose scores are in registers at a time */
    extern __shared__ __align__(1024) uint8_t shared[];

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int rows = (int)p.rows, first_key = blockIdx.x * Shape::KEYS;
    const int64_t part = ((int64_t)blockIdx.z * p.num_heads + blockIdx.y) * rows; /* of lse and of the workspace */
    const int64_t base = blockIdx.z * p.batch_stride + blockIdx.y * p.head_stride;
    const rf_bf16 *const q_rows = (const rf_bf16 *)p.q + base, *const k_rows = (const rf_bf16 *)p.k + base;
    const uint32_t k_shared = (uint32_t)__cvta_generic_to_shared(shared), ring = k_shared + Shape::K_BYTES;
    float *const lse_ring = reinterpret_cast<float *>(shared + Shape::K_BYTES + STAGES * Shape::Q_BYTES);
    const int num_tiles = (rows + QUERIES - 1) / QUERIES;

    /* Rows past the end become zeros. */
    auto load_rows = [&](uint32_t dst, const rf_bf16 *from, int first, auto num_rows) {
        constexpr int TOTAL = decltype(num_rows)::value * CHUNKS;
#pragma unroll
        for (int i = 0; i < (TOTAL + Shape::THREADS - 1) / Shape::THREADS; i++) {
            const int at = i * Shape::THREADS + (int)threadIdx.x;
            const int row = at / CHUNKS, chunk = at - row * CHUNKS;
            if (TOTAL % Shape::THREADS != 0 && at >= TOTAL) break;
            const bool valid = first + row < rows;
            copy16(dst + Shape::offset(row, chunk), valid ? from + (first + row) * p.row_stride + chunk * 8 : from,
                   valid ? 16 : 0);
        }
    };
    /* Thread t brings the log-sum of query t of a tile, in base 2; a query past the end or without keys adds 2^-inf. */
    auto fetch_lse = [&](int tile) -> float {
        const int query = tile * QUERIES + (int)threadIdx.x;
        if ((int)threadIdx.x >= QUERIES || query >= rows) return INFINITY;
        const float lse = p.lse[part + query];
        return lse == -INFINITY ? INFINITY : lse * LOG2_E;
    };
    rf_wait_for_previous();

    /* Copy group 0: keys and tile 0; group j: tile j. */
    load_rows(k_shared, k_rows, first_key, std::integral_constant<int, Shape::KEYS>());
#pragma unroll
    for (int j = 0; j < STAGES; j++) {
        if (j < num_tiles)
            load_rows(ring + j * Shape::Q_BYTES, q_rows, j * QUERIES, std::integral_constant<int, QUERIES>());
        copy_commit();
        const float lse = fetch_lse(j);
        if (threadIdx.x < QUERIES) lse_ring[j * QUERIES + threadIdx.x] = lse;
    }
    float next_lse = fetch_lse(STAGES);

    /* Lane parts of ldmatrix addresses: matrix i = lane / 8, row r = lane % 8; with swizzled rows a step of k16 is an
     * exclusive or, else a sum. */
    const int mat = lane >> 3, mat_row = lane & 7;
    const uint32_t q_lane = Shape::offset((mat >> 1) * 8 + mat_row, mat & 1);
    const uint32_t k_lane = Shape::offset((mat & 1) * 8 + mat_row, mat >> 1);
    const uint32_t odd_lane = (mat * 8 + mat_row) * LD + (CHUNKS - 1) * 16; /* last chunk of 32 rows; head_dim 72 */
    auto step_chunks = [](uint32_t addr, int pair) { return Shape::SWIZZLED ? addr ^ (pair * 32) : addr + pair * 32; };

    copy_wait<STAGES - 1>();
    __syncthreads(); /* keys are there */
    uint32_t k[MT][K_STEPS][4], k_odd[MT][2];
#pragma unroll
    for (int t = 0; t < MT; t++) {
        const uint32_t tile = k_shared + (warp * MT + t) * 16 * LD;
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) ldmatrix4(k[t][step], step_chunks(tile + k_lane, step));
        if (ODD) ldmatrix2(k_odd[t][0], k_odd[t][1], tile + (lane & 15) * LD + (CHUNKS - 1) * 16);
    }

    float sum[MT][2]; /* of keys lane / 4 and lane / 4 + 8; this lane's queries */
#pragma unroll
    for (int t = 0; t < MT; t++) sum[t][0] = sum[t][1] = 0.0f;
    const float c = p.softmax_scale * LOG2_E;
#pragma unroll 1
    for (int j = 0; j < num_tiles; j++) {
        const int stage = j % STAGES;
        copy_wait<STAGES - 1>();
        __syncthreads(); /* tile j is there, whoever loaded it */
        const uint32_t q_tile = ring + stage * Shape::Q_BYTES;
        const float *const lse_tile = lse_ring + stage * QUERIES;
#pragma unroll
        for (int half = 0; half < QUERIES / HALF; half++) {
            const uint32_t from = q_tile + half * HALF * LD;
            float s[MT][HALF / 8][4];
#pragma unroll
            for (int t = 0; t < MT; t++)
#pragma unroll
                for (int n = 0; n < HALF / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[t][n][i] = 0.0f;
#pragma unroll
            for (int step = 0; step < K_STEPS; step++) {
                const uint32_t addr = step_chunks(from + q_lane, step);
#pragma unroll
                for (int n = 0; n < HALF / 16; n++) {
                    uint32_t b[4]; /* queries 16 n .. + 7: b0, b1; queries + 8 .. + 15: b0, b1 */
                    ldmatrix4(b, addr + n * 16 * LD);
#pragma unroll
                    for (int t = 0; t < MT; t++) {
                        mma16(s[t][2 * n], k[t][step], b[0], b[1]);
                        mma16(s[t][2 * n + 1], k[t][step], b[2], b[3]);
                    }
                }
            }
            if (ODD) {
                uint32_t b[4]; /* four n8 tiles */
                ldmatrix4(b, from + odd_lane);
#pragma unroll
                for (int t = 0; t < MT; t++)
#pragma unroll
                    for (int n = 0; n < HALF / 8; n++) mma8(s[t][n], k_odd[t][0], k_odd[t][1], b[n]);
            }
#pragma unroll
            for (int n = 0; n < HALF / 8; n++) {
                const float2 lse = *reinterpret_cast<const float2 *>(lse_tile + half * HALF + n * 8 + (lane & 3) * 2);
#pragma unroll
                for (int t = 0; t < MT; t++)
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        sum[t][h] += exp2_approx(fmaf(s[t][n][2 * h], c, -lse.x)) +
                                     exp2_approx(fmaf(s[t][n][2 * h + 1], c, -lse.y));
            }
        }
        if (j + STAGES < num_tiles) {
            __syncthreads(); /* every warp has read the stage */
            load_rows(q_tile, q_rows, (j + STAGES) * QUERIES, std::integral_constant<int, QUERIES>());
            if (threadIdx.x < QUERIES) lse_ring[stage * QUERIES + threadIdx.x] = next_lse;
            next_lse = fetch_lse(j + STAGES + 1);
        }
        copy_commit();
    }
    copy_wait<0>();

#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) { /* the four lanes of a key */
            sum[t][h] += __shfl_xor_sync(0xffffffffu, sum[t][h], 1);
            sum[t][h] += __shfl_xor_sync(0xffffffffu, sum[t][h], 2);
            const int key = first_key + (warp * MT + t) * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && key < rows) p.workspace[part + key] = sum[t][h];
        }
}

/* --- attention, f32 ----------------------------------------------------------------------------------------------- */

static constexpr int PLAIN_KEYS = 16, PLAIN_MAX_HD = 256;

/* Thread (key, query) of 16 x 16 takes queries query, query + 16, ... */
static __global__ void __launch_bounds__(256) attention_plain_kernel(const __grid_constant__ rf_row_score_args p) {
    __shared__ float k_tile[PLAIN_KEYS][PLAIN_MAX_HD + 1], q_tile[16][PLAIN_MAX_HD + 1];
    const int key = threadIdx.x / 16, query = threadIdx.x % 16, hd = p.head_dim;
    const int rows = (int)p.rows, first_key = blockIdx.x * PLAIN_KEYS;
    const int64_t part = ((int64_t)blockIdx.z * p.num_heads + blockIdx.y) * rows;
    const int64_t base = blockIdx.z * p.batch_stride + blockIdx.y * p.head_stride;
    const float *const q = (const float *)p.q + base, *const k = (const float *)p.k + base;
    rf_wait_for_previous();
    for (int c = query; c < hd; c += 16)
        k_tile[key][c] = first_key + key < rows ? k[(first_key + key) * p.row_stride + c] : 0.0f;
    float sum = 0.0f;
    for (int first = 0; first < rows; first += 16) {
        __syncthreads(); /* the previous tile has been used */
        for (int c = query; c < hd; c += 16)
            q_tile[key][c] = first + key < rows ? q[(first + key) * p.row_stride + c] : 0.0f;
        __syncthreads();                     /* the tile is there (and the keys, the first time) */
        if (first + query >= rows) continue; /* the last tile: no barrier follows */
        const float lse = p.lse[part + first + query];
        float s = 0.0f;
        for (int c = 0; c < hd; c++) s = fmaf(k_tile[key][c], q_tile[query][c], s);
        if (lse != -INFINITY) sum += expf(s * p.softmax_scale - lse);
    }
    __syncwarp();
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (query == 0 && first_key + key < rows) p.workspace[part + first_key + key] = sum;
}

/* --- value -------------------------------------------------------------------------------------------------------- */

/* A thread per (group, row, head), heads first: neighbours read neighbours. */
template <class T, int VEC>
static __global__ void __launch_bounds__(256) value_kernel(const __grid_constant__ rf_row_score_args p) {
    const int64_t total = p.groups * p.rows * p.num_heads;
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    rf_wait_for_previous();
    if (i >= total) return;
    const uint32_t row_of_all = (uint32_t)i / (uint32_t)p.num_heads, head = (uint32_t)i % (uint32_t)p.num_heads;
    const uint32_t group = row_of_all / (uint32_t)p.rows, row = row_of_all % (uint32_t)p.rows;
    const T *const v = (const T *)p.v + group * p.batch_stride + row * p.row_stride + head * p.head_stride;
    float square = 0.0f;
#pragma unroll 4
    for (int c = 0; c < p.head_dim; c += VEC) {
        float f[VEC];
        if constexpr (VEC == 4)
            rf_load4(v + c, f);
        else
            f[0] = rf_to_f32(v[c]);
#pragma unroll
        for (int k = 0; k < VEC; k++) square = fmaf(f[k], f[k], square);
    }
    p.workspace[((int64_t)group * p.num_heads + head) * p.rows + row] = 1.0f - sqrtf(square);
}

/* --- sum over heads and norm -------------------------------------------------------------------------------------- */

static constexpr int FINISH_THREADS = 1024;

static __global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const __grid_constant__ rf_row_score_args p) {
    __shared__ float shared[FINISH_THREADS / 32];
    const int rows = (int)p.rows, heads = p.num_heads;
    rf_wait_for_previous();
    const float *const part = p.workspace + (int64_t)blockIdx.x * heads * rows;
    float *const out = p.out + (int64_t)(p.index ? p.index[blockIdx.x] : (int)blockIdx.x) * rows;
    float square = 0.0f;
    for (int r = threadIdx.x; r < rows; r += FINISH_THREADS) {
        float sum = 0.0f;
#pragma unroll 8
        for (int head = 0; head < heads; head++) sum += part[(int64_t)head * rows + r];
        out[r] = sum;
        square = fmaf(sum, sum, square);
    }
    square = rf_block_sum<FINISH_THREADS / 32>(square, shared);
    const float norm = square > 0.0f ? sqrtf(square) : 1.0f;
    for (int r = threadIdx.x; r < rows; r += FINISH_THREADS) out[r] /= norm; /* a thread's own rows */
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

template <int HD, int MT>
static rf_status launch_attention(rf_stream *stream, const rf_row_score_args &p, rf_error *err) {
    using Shape = score_shape<HD, MT>;
    static std::atomic<uint64_t> done;
    const cudaError_t code = rf_allow_shared((const void *)attention_kernel<HD, MT>, Shape::SHARED_BYTES, &done);
    if (code != cudaSuccess) return rf_cuda_fail(err, "row_score", code);
    const dim3 grid((unsigned)rf_ceil_div(p.rows, Shape::KEYS), (unsigned)p.num_heads, (unsigned)p.groups);
    return rf_launch_early(stream, "row_score", err, attention_kernel<HD, MT>, grid, dim3(Shape::THREADS),
                           Shape::SHARED_BYTES, p);
}

/* The large tile reads queries half as often; it needs a grid that still fills a card. */
template <int HD> static rf_status launch_tile(rf_stream *stream, const rf_row_score_args &p, rf_error *err) {
    if (rf_ceil_div(p.rows, 128) * p.num_heads * p.groups >= 768) return launch_attention<HD, 2>(stream, p, err);
    return launch_attention<HD, 1>(stream, p, err);
}

static rf_status launch_parts(rf_stream *stream, const rf_row_score_args &p, rf_error *err) {
    if (p.kind == RF_ROW_SCORE_VALUE) {
        const int64_t total = p.groups * p.rows * p.num_heads;
        const bool f32 = p.dtype == RF_DTYPE_F32;
        const bool vectors = p.head_dim % 4 == 0 && p.batch_stride % 4 == 0 && p.row_stride % 4 == 0 &&
                             p.head_stride % 4 == 0 && rf_is_aligned(p.v, f32 ? 16 : 8);
        auto kernel = f32 ? (vectors ? value_kernel<float, 4> : value_kernel<float, 1>)
                          : (vectors ? value_kernel<rf_bf16, 4> : value_kernel<rf_bf16, 1>);
        return rf_launch_early(stream, "row_score_value", err, kernel, dim3((unsigned)rf_ceil_div(total, 256)),
                               dim3(256), 0, p);
    }
    if (p.dtype == RF_DTYPE_F32)
        return rf_launch_early(
            stream, "row_score_f32", err, attention_plain_kernel,
            dim3((unsigned)rf_ceil_div(p.rows, PLAIN_KEYS), (unsigned)p.num_heads, (unsigned)p.groups), dim3(256), 0,
            p);
    switch (p.head_dim) {
    case 64: return launch_tile<64>(stream, p, err);
    case 72: return launch_tile<72>(stream, p, err);
    case 80: return launch_tile<80>(stream, p, err);
    case 96: return launch_tile<96>(stream, p, err);
    default: return launch_tile<128>(stream, p, err);
    }
}

static rf_status check_attention(const rf_row_score_args *args, rf_error *err) {
    if (args->kind != RF_ROW_SCORE_ATTENTION) return RF_OK;
    const int hd = args->head_dim;
    if (args->groups > 65535)
        return rf_fail(err, RF_ERR_SHAPE, "row_score: groups is %lld, must be at most 65535 on CUDA",
                       (long long)args->groups);
    if (args->dtype == RF_DTYPE_F32) {
        if (hd <= PLAIN_MAX_HD) return RF_OK;
        return rf_fail(err, RF_ERR_SHAPE, "row_score: head_dim is %d, must be at most %d in f32 on CUDA", hd,
                       PLAIN_MAX_HD);
    }
    if (hd != 64 && hd != 72 && hd != 80 && hd != 96 && hd != 128)
        return rf_fail(err, RF_ERR_SHAPE, "row_score: head_dim is %d, must be 64, 72, 80, 96 or 128 in bf16 on CUDA",
                       hd);
    if (args->batch_stride % 8 != 0 || args->row_stride % 8 != 0 || args->head_stride % 8 != 0)
        return rf_fail(err, RF_ERR_SHAPE, "row_score: strides must be multiples of 8 in bf16 on CUDA");
    if (!rf_is_aligned(args->q, 16) || !rf_is_aligned(args->k, 16))
        return rf_fail(err, RF_ERR_ARGUMENT, "row_score: q and k must be aligned to 16 bytes in bf16 on CUDA");
    return RF_OK;
}

extern "C" rf_status rf_row_score_cuda(rf_stream *stream, const rf_row_score_args *args, rf_error *err) {
    rf_status status = stream ? rf_row_score_check_run(args, err) : rf_row_score_check(args, err);
    if (status == RF_OK) status = check_attention(args, err);
    if (status != RF_OK || !stream || args->groups == 0 || args->rows == 0) return status;
    status = launch_parts(stream, *args, err);
    if (status != RF_OK) return status;
    return rf_launch_early(stream, "row_score_finish", err, finish_kernel, dim3((unsigned)args->groups),
                           dim3(FINISH_THREADS), 0, *args);
}
