/* kernels/wgmma.cuh - thin wrappers around the Hopper instructions the GEMM uses: mbarrier, TMA loads, wgmma. sm_90a only.
 *
 * Shared-memory tiles are K-major with the 128-byte swizzle: a row is 64 bf16 (128 bytes), eight rows make an atom of 1024
 * bytes, tiles start on 1024-byte addresses. That is what TMA writes with CU_TENSOR_MAP_SWIZZLE_128B and what the matrix
 * descriptor below says. A step of 16 in K moves the start address by 32 bytes inside the atom.
 * Accumulators of m64nN: thread t of the warpgroup (warp w = t / 32, lane l) holds, for column block j < N / 8,
 *   d[4j], d[4j+1]     row 16 w + l / 4,     columns 8 j + 2 (l % 4), + 1
 *   d[4j+2], d[4j+3]   row 16 w + l / 4 + 8, the same columns. */
#ifndef RF_KERNELS_WGMMA_CUH
#define RF_KERNELS_WGMMA_CUH

#include <cuda.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

static __device__ __forceinline__ uint32_t rf_shared_addr(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* --- mbarrier ------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void rf_mbar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
/* After all inits, by the thread that made them and before the block's barrier: TMA sees them too. */
static __device__ __forceinline__ void rf_mbar_init_fence(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ __forceinline__ void rf_mbar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
static __device__ __forceinline__ void rf_mbar_arrive_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ bool rf_mbar_try_wait(uint32_t bar, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return done != 0;
}
/* Waits until the phase of this parity is over; on a fresh barrier parity 1 counts as over. name: for debug builds, which
 * trap instead of hanging. */
static __device__ __forceinline__ void rf_mbar_wait(uint32_t bar, uint32_t parity, const char *name) {
#if RF_DEBUG >= 1
    for (uint32_t spins = 0; !rf_mbar_try_wait(bar, parity); spins++) {
        if (spins > 10u * 1000 * 1000) {
            printf("barrier '%s' stuck: block %d, thread %d, parity %u\n", name, blockIdx.x, threadIdx.x, parity);
            __trap();
        }
    }
#else
    while (!rf_mbar_try_wait(bar, parity)) {
    }
#endif
}

/* --- TMA ------------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ void rf_tma_prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"((uint64_t)map) : "memory");
}
/* One box at (column, row) to shared memory; completes its full byte count on bar, zeros outside the tensor included. */
static __device__ __forceinline__ void rf_tma_load_2d(uint32_t dst, const CUtensorMap *map, int column, int row,
                                                      uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            dst),
        "l"((uint64_t)map), "r"(column), "r"(row), "r"(bar)
        : "memory");
}

/* --- clusters --------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t rf_cluster_rank(void) {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/* Barrier over all threads of the cluster, for the inits that rf_mbar_init_fence published and for leaving together: it does
 * not order other writes, which would mean waiting for every store. */
static __device__ __forceinline__ void rf_cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
}
/* Arrives on the barrier at the same place in block `rank` of the cluster. */
static __device__ __forceinline__ void rf_mbar_arrive_at(uint32_t bar, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(bar),
                 "r"(rank)
                 : "memory");
}
/* rf_tma_load_2d into every block of the mask, to the same address in each and completing on the same barrier in each. */
static __device__ __forceinline__ void rf_tma_load_2d_to(uint32_t dst, const CUtensorMap *map, int column, int row,
                                                         uint32_t bar, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                 "l"((uint64_t)map), "r"(column), "r"(row), "r"(bar), "h"(mask)
                 : "memory");
}

/* --- registers -------------------------------------------------------------------------------------------------------- */

/* By every warp of a warpgroup; NUM a multiple of 8. */
template <int NUM> static __device__ __forceinline__ void rf_registers_raise(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(NUM));
}
template <int NUM> static __device__ __forceinline__ void rf_registers_lower(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(NUM));
}

/* --- special functions ------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ float rf_fast_exp2(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
static __device__ __forceinline__ float rf_fast_reciprocal(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

/* --- wgmma ---------------------------------------------------------------------------------------------------------- */

/* K-major, 128-byte swizzle: start address / 16 in bits 0-13, leading offset (unused with this swizzle) 1 in 16-29, stride
 * offset 1024 / 16 between eight-row atoms in 32-45, layout 1 in 62-63. */
static __device__ __forceinline__ uint64_t rf_wgmma_desc(uint32_t shared_addr) {
    return (uint64_t)((shared_addr & 0x3ffffu) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
/* Before the first wgmma of a batch: orders ordinary writes of the accumulators. */
static __device__ __forceinline__ void rf_wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void rf_wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until at most PENDING committed groups are unfinished. */
template <int PENDING> static __device__ __forceinline__ void rf_wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Keeps the compiler from touching accumulators on the wrong side of a fence or wait. */
template <int NUM> static __device__ __forceinline__ void rf_wgmma_pin(float (&d)[NUM]) {
#pragma unroll
    for (int i = 0; i < NUM; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* d += A B^T, A 64 x 16 and B N x 16 in shared memory, bf16. Four registers per column block. */
#define RF_D(j) "+f"(d[4 * (j)]), "+f"(d[4 * (j) + 1]), "+f"(d[4 * (j) + 2]), "+f"(d[4 * (j) + 3])

template <int N> struct rf_wgmma;
template <> struct rf_wgmma<72> {
    static __device__ __forceinline__ void mma(float (&d)[36], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35}, "
                     "%36, %37, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<112> {
    static __device__ __forceinline__ void mma(float (&d)[56], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55}, "
                     "%56, %57, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<128> {
    static __device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                     "%64, %65, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13), RF_D(14), RF_D(15)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<144> {
    static __device__ __forceinline__ void mma(float (&d)[72], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                     "%64, %65, %66, %67, %68, %69, %70, %71}, "
                     "%72, %73, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13), RF_D(14), RF_D(15), RF_D(16), RF_D(17)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<192> {
    static __device__ __forceinline__ void mma(float (&d)[96], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                     "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                     "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
                     "%96, %97, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13), RF_D(14), RF_D(15), RF_D(16), RF_D(17), RF_D(18),
                       RF_D(19), RF_D(20), RF_D(21), RF_D(22), RF_D(23)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<256> {
    static __device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                     "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                     "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                     "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                     "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                     "%128, %129, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7), RF_D(8), RF_D(9),
                       RF_D(10), RF_D(11), RF_D(12), RF_D(13), RF_D(14), RF_D(15), RF_D(16), RF_D(17), RF_D(18),
                       RF_D(19), RF_D(20), RF_D(21), RF_D(22), RF_D(23), RF_D(24), RF_D(25), RF_D(26), RF_D(27),
                       RF_D(28), RF_D(29), RF_D(30), RF_D(31)
                     : "l"(a), "l"(b));
    }
};
#undef RF_D

#endif
#endif
