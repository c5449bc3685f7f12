/* kernels/kvq_cuda.cuh - what kvq.cu and kvq_mma.cu share: planes of a store, parameters of attention, instructions. */
#ifndef RF_KERNELS_KVQ_CUDA_CUH
#define RF_KERNELS_KVQ_CUDA_CUH

#include "kernels/attention_cuda.cuh"
#include "kernels/kv_cuda.cuh"
#include "kernels/kvq.h"

/* One plane of a unit. */
struct rf_kvq_plane {
    uint8_t *codes;
    uint32_t *scales; /* f32, or two halves */
    const float *factor;
};
static __device__ __forceinline__ rf_kvq_plane rf_kvq_plane_of(const rf_kvq_store &s, int64_t unit, bool is_value) {
    const float *const factor = is_value ? s.v_factor : s.k_factor;
    return {(uint8_t *)(is_value ? s.v_codes : s.k_codes) + unit * s.codes_stride,
            (uint32_t *)((uint8_t *)(is_value ? s.v_scales : s.k_scales) + unit * s.scales_stride),
            factor ? factor + unit * s.head_dim : NULL};
}

struct rf_kvq_attention_params {
    rf_kvq_attention_args a;
    int num_splits;
    float *part_lse, *part_out; /* [units x group][splits], [.][D], normalised, if num_splits > 1 */
};

static __device__ __forceinline__ float rf_kvq_exp(float x) {
    return exp2_approx(x * RF_LOG2_E);
}

/* --- kvq_mma.cu ------------------------------------------------------------------------------------------------------------ */

/* If the tensor cores' kernel takes these arguments: bf16 rows, INT, keys by channel, head_dim 64 or 128, groups of whole 32 channels. */
bool rf_kvq_mma_takes(const rf_kvq_attention_args *a);
/* Query heads of a block. */
int rf_kvq_mma_heads(const rf_kvq_attention_args *a);
/* Writes out and lse, or with num_splits > 1 part_out (of splits that are not empty) and part_lse. */
rf_status rf_kvq_mma_run(rf_stream *stream, const rf_kvq_attention_params *p, rf_error *err);

/* --- instructions ---------------------------------------------------------------------------------------------------------- */

/* 16 or 4 bytes global -> shared, aligned to that; zeros if not valid (src must still be an address). */
template <int BYTES> static __device__ __forceinline__ void rf_kvq_copy(void *dst, const void *src, bool valid) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(dst);
    if constexpr (BYTES == 16)
        copy16(at, src, valid ? 16 : 0);
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
static __device__ __forceinline__ void rf_kvq_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void rf_kvq_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
/* a b + c of bf16 pairs. */
static __device__ __forceinline__ uint32_t rf_kvq_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
/* (a & b) | c and (a & b) ^ c in one instruction, which compilers make two of where b and c are constants. */
static __device__ __forceinline__ uint32_t rf_kvq_and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
static __device__ __forceinline__ uint32_t rf_kvq_and_xor(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#endif
