/* kernels/gemm_hopper.cuh - what the Hopper GEMMs of few rows (gemm_skinny.cu, gemm_stream.cu) share: instructions,
 * narrow wgmma widths, activations, tensor maps. */
#ifndef RF_KERNELS_GEMM_HOPPER_CUH
#define RF_KERNELS_GEMM_HOPPER_CUH

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/gemm.h"
#include "kernels/launch.cuh"
#include "kernels/wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* The kernel after this one, if it was launched to start early, may take its places. Takes effect when every block has
 * said so or is done. */
static __device__ __forceinline__ void rf_let_next_start(void) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* Barrier over all threads of the cluster that also shows each block what the others wrote to their own shared memory.
 * The barrier's own release is about global memory too and costs a fence of the whole GPU; this one does not. */
static __device__ __forceinline__ void rf_cluster_sync_shared(void) {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;\n"
                 "barrier.cluster.arrive.relaxed;\n"
                 "barrier.cluster.wait.acquire;" ::
                     : "memory");
}

/* 16 bytes from the same place in block `rank` of the cluster. */
static __device__ __forceinline__ float4 rf_load4_at(uint32_t shared_addr, uint32_t rank) {
    float4 v;
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n"
                 "}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(shared_addr), "r"(rank)
                 : "memory");
    return v;
}

/* How long the L2 is to keep what a load brings: weights pass once, activations are read by every block. */
static __device__ __forceinline__ uint64_t rf_policy_evict_first(void) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ uint64_t rf_policy_evict_last(void) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
/* rf_tma_load_2d with such a policy. */
static __device__ __forceinline__ void rf_tma_load_2d_hint(uint32_t dst, const CUtensorMap *map, int column, int row,
                                                           uint32_t bar, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                 "l"((uint64_t)map), "r"(column), "r"(row), "r"(bar), "l"(policy)
                 : "memory");
}

/* Token tiles of few rows; kernels/wgmma.cuh has the wider ones. */
#define RF_D(j) "+f"(d[4 * (j)]), "+f"(d[4 * (j) + 1]), "+f"(d[4 * (j) + 2]), "+f"(d[4 * (j) + 3])

template <> struct rf_wgmma<8> {
    static __device__ __forceinline__ void mma(float (&d)[4], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3}, "
                     "%4, %5, 1, 1, 1, 0, 0;"
                     : RF_D(0)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<16> {
    static __device__ __forceinline__ void mma(float (&d)[8], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7}, "
                     "%8, %9, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<32> {
    static __device__ __forceinline__ void mma(float (&d)[16], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                     "%16, %17, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<48> {
    static __device__ __forceinline__ void mma(float (&d)[24], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23}, "
                     "%24, %25, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5)
                     : "l"(a), "l"(b));
    }
};
template <> struct rf_wgmma<64> {
    static __device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                     "%32, %33, 1, 1, 1, 0, 0;"
                     : RF_D(0), RF_D(1), RF_D(2), RF_D(3), RF_D(4), RF_D(5), RF_D(6), RF_D(7)
                     : "l"(a), "l"(b));
    }
};

/* GELU's 0.5 u (1 + tanh z) = u / (1 + exp(-2 z)), and SiLU, which is the same with another exponent. Relative error
 * about 1e-6 also where the tanh form cancels. */
static __device__ __forceinline__ float rf_activate_fast(float u, rf_act act) {
    if (act == RF_ACT_NONE) return u;
    const float z = act == RF_ACT_GELU_TANH ? 1.5957691216057308f * (u + 0.044715f * u * u * u) : u;
    return __fdividef(u, 1.0f + __expf(-z));
}

#endif

/* --- tensor maps ----------------------------------------------------------------------------------------------------
 * */

typedef CUresult (*rf_encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* From the driver, so that nothing links against it; looked up once. */
static rf_encode_fn rf_get_encode(void) {
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
    return (rf_encode_fn)fn;
}

/* Row-major bf16 [rows, cols] in boxes of box_rows x 64, in shared memory as rf_wgmma_desc expects. */
static rf_status rf_make_tile_map(CUtensorMap *map, const char *label, const void *p, int64_t rows, int64_t cols,
                                  int64_t ld, int box_rows, rf_error *err) {
    const rf_encode_fn encode = rf_get_encode();
    if (!encode) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: this driver has no cuTensorMapEncodeTiled", label);
    const cuuint64_t sizes[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)ld * 2};
    const cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUresult r = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)p, sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return rf_fail(err, RF_ERR_DEVICE, "%s: cuTensorMapEncodeTiled failed with code %d", label, (int)r);
    return RF_OK;
}

#endif
