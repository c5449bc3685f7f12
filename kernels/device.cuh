/* kernels/device.cuh - device-side helpers shared by the plain kernels: typed loads and stores in f32, warp sums,
 * activations, the modulation row of kernels/norm.h. */
#ifndef RF_KERNELS_DEVICE_CUH
#define RF_KERNELS_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/gemm.h"
#include "kernels/norm.h"

typedef __nv_bfloat16 rf_bf16;

static __device__ __forceinline__ float rf_to_f32(float v) {
    return v;
}
static __device__ __forceinline__ float rf_to_f32(rf_bf16 v) {
    return __bfloat162float(v);
}
template <typename T> static __device__ __forceinline__ T rf_from_f32(float v);
template <> __device__ __forceinline__ float rf_from_f32<float>(float v) {
    return v;
}
template <> __device__ __forceinline__ rf_bf16 rf_from_f32<rf_bf16>(float v) {
    return __float2bfloat16_rn(v);
}

/* Four neighbours as f32: 16 bytes of f32 or 8 bytes of bf16; p aligned to that. */
static __device__ __forceinline__ void rf_load4(const float *p, float v[4]) {
    float4 q = *reinterpret_cast<const float4 *>(p);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}
static __device__ __forceinline__ void rf_load4(const rf_bf16 *p, float v[4]) {
    uint2 q = *reinterpret_cast<const uint2 *>(p);
    v[0] = __uint_as_float(q.x << 16), v[1] = __uint_as_float(q.x & 0xffff0000u);
    v[2] = __uint_as_float(q.y << 16), v[3] = __uint_as_float(q.y & 0xffff0000u);
}
static __device__ __forceinline__ void rf_store4(float *p, const float v[4]) {
    *reinterpret_cast<float4 *>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
/* bf16 pair in one word, `lo` at the lower address. */
static __device__ __forceinline__ uint32_t rf_pack_bf16(float lo, float hi) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&pair);
}
static __device__ __forceinline__ void rf_store4(rf_bf16 *p, const float v[4]) {
    *reinterpret_cast<uint2 *>(p) = make_uint2(rf_pack_bf16(v[0], v[1]), rf_pack_bf16(v[2], v[3]));
}

/* Butterfly sums and maxima: every lane gets the same bits. */
static __device__ __forceinline__ float rf_warp_sum(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}
static __device__ __forceinline__ float rf_warp_max(float v) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
    return v;
}

/* Sum over a block of NUM_WARPS warps, the same bits in every thread; shared: NUM_WARPS floats, reusable after the next
 * call's first barrier. */
template <int NUM_WARPS> static __device__ __forceinline__ float rf_block_sum(float v, float *shared) {
    v = rf_warp_sum(v);
    if (NUM_WARPS == 1) return v;
    __syncthreads(); /* the previous use of `shared` has been read */
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
    __syncthreads(); /* every warp's part is there */
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; i++) sum += shared[i];
    return sum;
}
template <int NUM_WARPS> static __device__ __forceinline__ float rf_block_max(float v, float *shared) {
    v = rf_warp_max(v);
    if (NUM_WARPS == 1) return v;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
    __syncthreads();
    float top = shared[0];
#pragma unroll
    for (int i = 1; i < NUM_WARPS; i++) top = fmaxf(top, shared[i]);
    return top;
}

static __device__ __forceinline__ float rf_activate(float u, rf_act act) {
    switch (act) {
    case RF_ACT_NONE: return u;
    /* (1 + tanh t) / 2 = 1 / (1 + e^-2t) and (1 + erf t) / 2 = erfc(-t) / 2: no cancellation in the negative tail. */
    case RF_ACT_GELU_TANH: return u / (1.0f + expf(-1.5957691216057308f * (u + 0.044715f * u * u * u)));
    case RF_ACT_GELU_ERF: return 0.5f * u * erfcf(u * -0.7071067811865476f);
    case RF_ACT_SILU: return u / (1.0f + expf(-u));
    }
    return u;
}

/* The table row of row `row`'s group, as an element offset into mod.table. */
static __device__ __forceinline__ int64_t rf_modulation_offset(const rf_modulation &mod, int64_t row) {
    uint32_t group = mod.rows_per_group > 0 ? (uint32_t)row / (uint32_t)mod.rows_per_group : 0;
    int64_t table_row = mod.index ? mod.index[group] : (int64_t)group;
    return table_row * mod.stride;
}

#endif
