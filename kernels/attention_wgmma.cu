/* kernels/attention_wgmma.cu - attention on Hopper's warpgroup tensor cores, for dense keys.
 * Maths    As attention_mma.cu: online softmax over tiles of keys, p = 2^(c s - c m), c = scale log2 e; out = o / l,
 *          lse = (c m + log2 l) ln 2.
 * Shapes   q, k, v, out bf16, head_dim 64, 72 or 128; no lists, no kv_lens, at most one range, no mask; query heads may share
 *          key heads. head_dim 72 is exact in P V (n = 64 + 8) and padded to 80 by one zero chunk in Q K^T.
 * Launch   grid (tiles of 64 * WGS query rows, query heads, batch), in one of two forms:
 *          resident  one warpgroup of 64 rows, all keys in shared memory (two tiles): every warp copies, then computes; two
 *                    blocks share an SM and hide each other's loads and stores. For short sequences.
 *          ring      two warpgroups of 64 rows and four producer warps (one warp alone cannot keep enough cp.async in
 *                    flight: it needed 2.8 us a tile); half the K and V traffic of 64-row blocks. For long ones.
 * Shared   Columns go in blocks of 64 with the 128-byte swizzle: [row][128 bytes], chunk c of row r at chunk c ^ (r & 7); one
 *          block serves Q and K as K-major operands and V as an MN-major one, and a row's copy fills a whole 128-byte line.
 *          The ninth chunk of head_dim 72 goes to a plane [row][16 bytes] without swizzle (eight rows are a core matrix);
 *          Q and K have a second plane of zeros behind it, V's is a product of its own (n = 8).
 *          (Planes for all chunks are correct too, but cp.async writes 16 bytes a cycle into them: twice as slow.)
 * Order    K and V have barriers of their own, because P V of a tile runs one step behind its Q K^T:
 *          S_j = Q K_j is issued before O += P_{j-1} V_{j-1}, and softmax of S_j runs under the latter.
 *          cp.async writes are made visible to wgmma by the consumers' proxy fence after the barrier.
 * Arch     sm_90a; elsewhere the file holds the refusal only. Checked  tests/kernels against the CPU definition. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
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
    static constexpr int STAGES = 2;
    static constexpr int Q_BLOCK = ROWS * 128, KV_BLOCK = KEYS * 128;
    static constexpr int Q_PLANE = ROWS * 16, KV_PLANE = KEYS * 16;
    static constexpr int Q_BYTES = BLOCKS * Q_BLOCK + (TAIL ? 2 * Q_PLANE : 0);
    static constexpr int K_BYTES = BLOCKS * KV_BLOCK + (TAIL ? 2 * KV_PLANE : 0);
    static constexpr int V_BYTES = BLOCKS * KV_BLOCK + (TAIL ? KV_PLANE : 0);
    static_assert(HD % 64 == 0 || HD % 64 == 8, "at most one chunk is left");
    static_assert(Q_BYTES % 1024 == 0 && K_BYTES % 1024 == 0 && V_BYTES % 1024 == 0, "swizzle atoms");
    static constexpr int BARRIERS_BYTES = 1024;
    static constexpr int SHARED_BYTES = BARRIERS_BYTES + Q_BYTES + STAGES * (K_BYTES + V_BYTES);
    static constexpr bool RESIDENT = PRODUCERS == 0;
    static constexpr int COPIERS = RESIDENT ? WGS * 4 : PRODUCERS; /* warps that copy */
    static constexpr int THREADS = WGS * 128 + PRODUCERS * 32;
    static constexpr int BLOCKS_PER_SM = RESIDENT && HD <= 72 ? 2 : 1;
    /* head_dim 128 in two warpgroups needs more registers than an even split of the SM gives: the producers hand over most
     * of theirs. */
    static constexpr bool MOVES_REGISTERS = HD == 128 && WGS == 2;
};

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
static __device__ __forceinline__ void copy16(uint32_t dst, const void *src, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(num_bytes) : "memory");
}
/* Arrives on bar once every earlier cp.async of this thread has landed; counts as one of its expected arrivals. */
static __device__ __forceinline__ void copies_arrive(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void fence_async_proxy(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
template <> struct product<8> {
    static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, "
            "1, 1;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
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
template <int HD, int ROWS, int COPIERS>
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
            copy16(plane + row * 16, inside ? base + (int64_t)(first + row) * row_stride + HD / 64 * 64 : base,
                   inside ? 16 : 0);
        }
    }
}

/* --- kernel ------------------------------------------------------------------------------------------------------- */

template <int HD, int WGS, int PRODUCERS>
static __global__ void __launch_bounds__(wg_shape<HD, WGS, PRODUCERS>::THREADS,
                                         wg_shape<HD, WGS, PRODUCERS>::BLOCKS_PER_SM)
    attention_wgmma_kernel(const __grid_constant__ rf_attention_params p) {
    using S = wg_shape<HD, WGS, PRODUCERS>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t bars = rf_shared_addr(shared);
    const uint32_t q_smem = bars + S::BARRIERS_BYTES, k_smem = q_smem + S::Q_BYTES,
                   v_smem = k_smem + S::STAGES * S::K_BYTES;
    const uint32_t full_q = bars, full_k = bars + 8, full_v = full_k + 8 * S::STAGES, free_k = full_v + 8 * S::STAGES,
                   free_v = free_k + 8 * S::STAGES;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int first_row = blockIdx.x * S::ROWS, head = blockIdx.y, sample = blockIdx.z + p.batch_first;
    const int num_tiles = (p.num_keys + KEYS - 1) / KEYS;

    if (threadIdx.x == 0) {
        rf_mbar_init(full_q, S::COPIERS * 32);
        for (int s = 0; s < S::STAGES; s++) {
            rf_mbar_init(full_k + 8 * s, S::COPIERS * 32);
            rf_mbar_init(full_v + 8 * s, S::COPIERS * 32);
            rf_mbar_init(free_k + 8 * s, 4 * WGS);
            rf_mbar_init(free_v + 8 * s, 4 * WGS);
        }
        rf_mbar_init_fence();
    }
    if constexpr (S::TAIL) { /* the plane of zeros behind Q and every stage of K: copies never touch it */
        const uint4 zero = make_uint4(0, 0, 0, 0);
        unsigned char *const q_end = shared + S::BARRIERS_BYTES + S::Q_BYTES;
        for (int i = threadIdx.x; i < S::ROWS; i += S::THREADS) ((uint4 *)(q_end - S::Q_PLANE))[i] = zero;
        for (int s = 0; s < S::STAGES; s++)
            for (int i = threadIdx.x; i < KEYS; i += S::THREADS)
                ((uint4 *)(q_end + (s + 1) * S::K_BYTES - S::KV_PLANE))[i] = zero;
        fence_async_proxy();
    }
    __syncthreads(); /* barriers are set up, padding is written */

    const rf_bf16 *const q = (const rf_bf16 *)p.q + sample * p.q_batch_stride + head * p.q_head_stride;
    const int64_t kv_at = sample * p.kv_batch_stride + (int64_t)(head / p.group) * p.kv_head_stride +
                          (int64_t)p.first_key * p.kv_row_stride;
    const rf_bf16 *const k = (const rf_bf16 *)p.k + kv_at, *const v = (const rf_bf16 *)p.v + kv_at;
    auto copy_q = [&](int copier) {
        copy_rows<HD, S::ROWS, S::COPIERS>(q_smem, q, p.q_row_stride, first_row, p.q_len, copier, lane);
        copies_arrive(full_q);
    };
    auto copy_k = [&](int copier, int j) {
        copy_rows<HD, KEYS, S::COPIERS>(k_smem + j % S::STAGES * S::K_BYTES, k, p.kv_row_stride, j * KEYS, p.num_keys,
                                        copier, lane);
        copies_arrive(full_k + 8 * (j % S::STAGES));
    };
    auto copy_v = [&](int copier, int j) {
        copy_rows<HD, KEYS, S::COPIERS>(v_smem + j % S::STAGES * S::V_BYTES, v, p.kv_row_stride, j * KEYS, p.num_keys,
                                        copier, lane);
        copies_arrive(full_v + 8 * (j % S::STAGES));
    };
    if constexpr (S::RESIDENT) { /* num_tiles <= STAGES */
        copy_q(warp);
        copy_k(warp, 0);
        copy_v(warp, 0);
        if (num_tiles > 1) {
            copy_k(warp, 1);
            copy_v(warp, 1);
        }
    } else {
        if (warp >= WGS * 4) {
            if constexpr (S::MOVES_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            const int copier = warp - WGS * 4;
            copy_q(copier);
            for (int j = 0; j < num_tiles; j++) {
                const uint32_t parity = (j / S::STAGES & 1) ^ 1;
                rf_mbar_wait(free_k + 8 * (j % S::STAGES), parity, "free_k");
                copy_k(copier, j);
                rf_mbar_wait(free_v + 8 * (j % S::STAGES), parity, "free_v");
                copy_v(copier, j);
            }
            asm volatile("cp.async.wait_all;" ::: "memory"); /* a block may not leave with copies under way */
            return;
        }
        if constexpr (S::MOVES_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    }

    /* consumers: thread t of a warpgroup holds rows 16 (t / 32) + t % 32 / 4, + 8 of its 64 */
    const int wg = warp >> 2;
    const int row = first_row + wg * 64 + (warp & 3) * 16 + (lane >> 2);
    float o[S::BLOCKS * 32], tail[4] = {0.0f, 0.0f, 0.0f, 0.0f}, sc[64];
    uint32_t pr[KEYS / 16][4];
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f}, alpha[2];
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 32; i++) o[i] = 0.0f;

    auto issue_scores = [&](int j) {
        const uint32_t a = q_smem + wg * 8192, b = k_smem + j % S::STAGES * S::K_BYTES;
#pragma unroll
        for (int step = 0; step < S::BLOCKS * 4; step++)
            scores_add(sc, rf_wgmma_desc(a + step / 4 * S::Q_BLOCK + step % 4 * 32),
                       rf_wgmma_desc(b + step / 4 * S::KV_BLOCK + step % 4 * 32), step > 0);
        if constexpr (S::TAIL)
            scores_add(sc, plain_desc(q_smem + S::BLOCKS * S::Q_BLOCK + wg * 1024, S::Q_PLANE, 128),
                       plain_desc(b + S::BLOCKS * S::KV_BLOCK, S::KV_PLANE, 128), 1);
    };
    auto issue_values = [&](int j) {
        const uint32_t b = v_smem + j % S::STAGES * S::V_BYTES;
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            product<S::BLOCKS * 64>::add(o, pr[step], values_desc(b + step * 2048, S::KV_BLOCK));
            if constexpr (S::TAIL)
                product<8>::add(tail, pr[step], plain_desc(b + S::BLOCKS * S::KV_BLOCK + step * 256, 128, S::KV_PLANE));
        }
    };
    auto wait_full = [&](uint32_t bar, int j, const char *name) {
        rf_mbar_wait(bar + 8 * (j % S::STAGES), j / S::STAGES & 1, name);
        fence_async_proxy();
    };
    auto release = [&](uint32_t bar, int j) {
        if (lane == 0) rf_mbar_arrive(bar + 8 * (j % S::STAGES));
    };
    /* sc := p of tile j, m and l move on; alpha is what o must be scaled by. */
    auto softmax = [&](int j) {
        const int limit = p.num_keys - j * KEYS;
        if (limit < KEYS) {
#pragma unroll
            for (int i = 0; i < 64; i++) {
                const int key = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
                if (key >= limit) sc[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = m[h];
#pragma unroll
            for (int i = 0; i < 64; i += 4) top = fmaxf(top, fmaxf(sc[i + 2 * h], sc[i + 2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            alpha[h] = exp2_approx((m[h] - top) * p.scale_log2); /* 0 on the first tile */
            m[h] = top;
            const float shift = top * p.scale_log2;
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

    rf_mbar_wait(full_q, 0, "full_q");
    wait_full(full_k, 0, "full_k");
    rf_wgmma_pin(sc);
    rf_wgmma_fence();
    issue_scores(0);
    rf_wgmma_commit();
    rf_wgmma_wait<0>();
    rf_wgmma_pin(sc);
    release(free_k, 0);
    softmax(0);
    pack();
    for (int j = 1; j < num_tiles; j++) {
        wait_full(full_k, j, "full_k");
        rf_wgmma_pin(sc);
        rf_wgmma_pin(o);
        rf_wgmma_pin(tail);
        rf_wgmma_fence();
        issue_scores(j);
        rf_wgmma_commit();
        wait_full(full_v, j - 1, "full_v");
        issue_values(j - 1);
        rf_wgmma_commit();
        rf_wgmma_wait<1>();
        rf_wgmma_pin(sc);
        release(free_k, j);
        softmax(j);
        rf_wgmma_wait<0>();
        rf_wgmma_pin(o);
        rf_wgmma_pin(tail);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) /* the products have read P: only now may it change */
            asm volatile("" : "+r"(pr[step][0]), "+r"(pr[step][1]), "+r"(pr[step][2]), "+r"(pr[step][3])::"memory");
        release(free_v, j - 1);
#pragma unroll
        for (int i = 0; i < S::BLOCKS * 32; i++) o[i] *= alpha[i >> 1 & 1];
#pragma unroll
        for (int i = 0; i < 4; i++) tail[i] *= alpha[i >> 1];
        pack();
    }
    wait_full(full_v, num_tiles - 1, "full_v");
    rf_wgmma_pin(o);
    rf_wgmma_pin(tail);
    rf_wgmma_fence();
    issue_values(num_tiles - 1);
    rf_wgmma_commit();
    rf_wgmma_wait<0>();
    rf_wgmma_pin(o);
    rf_wgmma_pin(tail);

#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = l[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int r = row + 8 * h;
        if (r >= p.q_len) continue;
        const float inv = 1.0f / sum;
        rf_bf16 *const out =
            (rf_bf16 *)p.out + sample * p.out_batch_stride + r * p.out_row_stride + head * p.out_head_stride;
#pragma unroll
        for (int c = 0; c < S::BLOCKS * 8; c++)
            *(uint32_t *)(out + c * 8 + (lane & 3) * 2) = pack2(o[4 * c + 2 * h] * inv, o[4 * c + 2 * h + 1] * inv);
        if constexpr (S::TAIL)
            *(uint32_t *)(out + S::BLOCKS * 64 + (lane & 3) * 2) = pack2(tail[2 * h] * inv, tail[2 * h + 1] * inv);
        if (p.lse && (lane & 3) == 0)
            p.lse[((int64_t)sample * p.num_q_heads + head) * p.q_len + r] =
                (m[h] * p.scale_log2 + log2f(sum)) * 0.6931471805599453f;
    }
}

#else /* another architecture: the name exists, rf_attention_wgmma_check keeps it from being launched */

template <int HD, int WGS, int PRODUCERS>
static __global__ void __launch_bounds__(wg_shape<HD, WGS, PRODUCERS>::THREADS)
    attention_wgmma_kernel(const __grid_constant__ rf_attention_params p) {}

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
    if (args->q_rows || args->kv_rows || args->kv_lens || args->num_ranges > 1 || args->mask != RF_MASK_NONE)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel takes no lists, lengths or masks");
    if (!(args->softmax_scale > 0))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: softmax_scale is %g, must be above 0 on CUDA",
                       (double)args->softmax_scale);
    if (args->kv_len < 1 || (args->num_ranges == 1 && args->ranges[0].end <= args->ranges[0].begin))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the wgmma kernel needs at least one key");
    if (args->q_len > INT32_MAX - 256 || args->kv_len > INT32_MAX - 256 || args->num_q_heads > 65535)
        return rf_fail(err, RF_ERR_SHAPE, "attention: too many rows, keys or heads for the wgmma kernel");
    const int64_t strides[9] = {args->q_row_stride,   args->q_head_stride,   args->kv_row_stride,
                                args->kv_head_stride, args->out_row_stride,  args->out_head_stride,
                                args->q_batch_stride, args->kv_batch_stride, args->out_batch_stride};
    for (int i = 0; i < 9; i++) {
        if (strides[i] % 8 != 0)
            return rf_fail(err, RF_ERR_SHAPE, "attention: strides must be multiples of 8 elements, one is %lld",
                           (long long)strides[i]);
    }
    return RF_OK;
}

bool rf_attention_wgmma_wins(const rf_attention_args *args) {
    return args->q_len >= 64 && args->kv_len >= 128;
}

template <int HD, int WGS, int PRODUCERS>
static rf_status launch(rf_stream *stream, const rf_attention_params &params, rf_error *err) {
    using Shape = wg_shape<HD, WGS, PRODUCERS>;
    static std::atomic<uint64_t> allowed{0};
    auto *const kernel = attention_wgmma_kernel<HD, WGS, PRODUCERS>;
    cudaError_t code = rf_allow_shared((const void *)kernel, Shape::SHARED_BYTES, &allowed);
    if (!stream) { /* plan time, maybe without a device: nothing was asked of it yet */
        cudaGetLastError();
        return RF_OK;
    }
    if (code != cudaSuccess) return rf_cuda_fail(err, "attention", code);
    rf_attention_params p = params;
    for (int first = 0; first < p.batch; first += 65535) {
        p.batch_first = first;
        const int count = p.batch - first < 65535 ? p.batch - first : 65535;
        const dim3 grid((unsigned)rf_ceil_div(p.q_len, Shape::ROWS), (unsigned)p.num_q_heads, (unsigned)count);
        rf_status status =
            rf_launch(stream, "attention", err, kernel, grid, dim3(Shape::THREADS), Shape::SHARED_BYTES, p);
        if (status != RF_OK) return status;
    }
    return RF_OK;
}

template <int HD> static rf_status launch_rows(rf_stream *stream, const rf_attention_params &p, rf_error *err) {
    return p.num_keys <= 2 * KEYS ? launch<HD, 1, 0>(stream, p, err) : launch<HD, 2, 4>(stream, p, err);
}

rf_status rf_attention_wgmma_run(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    const rf_attention_params p = rf_attention_make_params(args);
    switch (args->head_dim) {
    case 64: return launch_rows<64>(stream, p, err);
    case 72: return launch_rows<72>(stream, p, err);
    case 128: return launch_rows<128>(stream, p, err);
    }
    return rf_fail(err, RF_ERR_SHAPE, "attention: head_dim is %d, must be 64, 72 or 128", args->head_dim);
}
