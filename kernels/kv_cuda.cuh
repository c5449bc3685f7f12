/* kernels/kv_cuda.cuh - what kv.cu and kv_evict.cu share: where a key lies, products of tiles, eight elements of a row. */
#ifndef RF_KERNELS_KV_CUDA_CUH
#define RF_KERNELS_KV_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/device.cuh"
#include "kernels/kv.h"
#include "kernels/launch.cuh"
#include "kernels/rope.cuh"
#include "kernels/text_checks.h"

static constexpr unsigned RF_ALL_LANES = 0xffffffffu;
static constexpr float RF_LOG2_E = 1.4426950408889634f, RF_LN_2 = 0.6931471805599453f;

/* Keys of head h; offset of key j of head h in k and v. */
static __device__ __forceinline__ int rf_kv_len(const rf_kv_source &s, int h) {
    return s.rows && s.lens ? max(0, min(s.lens[h], (int)s.num_keys)) : (int)s.num_keys;
}
static __device__ __forceinline__ int64_t rf_kv_offset(const rf_kv_source &s, int h, int j) {
    return s.rows ? (int64_t)s.rows[h * s.rows_stride + j] * s.row_stride : j * s.row_stride + h * s.head_stride;
}

/* d += a b, a 16x16, b 16x8. g = lane / 4, t = lane % 4. d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). */
static __device__ __forceinline__ void rf_kv_mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/* The same for 32 columns of head_dim of which a lane holds 8 t .. 8 t + 7: a dot product does not care about the order of its
 * terms, so that a 16-byte load takes the place of the pairs that the fragment's layout names; a and b are permuted alike. */
static __device__ __forceinline__ void rf_kv_mma32(float (&d)[4], const uint4 &low, const uint4 &high, const uint4 &b) {
    rf_kv_mma(d, low.x, high.x, low.y, high.y, b.x, b.y);
    rf_kv_mma(d, low.z, high.z, low.w, high.w, b.z, b.w);
}

static __device__ __forceinline__ uint4 rf_kv_load16(const rf_bf16 *p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *reinterpret_cast<const uint4 *>(p);
    return v;
}

/* One product of rows by a warp, the same bits in every lane. */
template <class T> static __device__ __forceinline__ float rf_kv_dot(const T *a, const T *b, int dim) {
    float sum = 0.0f;
    for (int c = threadIdx.x & 31; c < dim; c += 32) sum = fmaf(rf_to_f32(a[c]), rf_to_f32(b[c]), sum);
    return rf_warp_sum(sum);
}

/* Eight neighbours as f32, of which num exist; the rest are zeros. WIDE: all eight, aligned to 16 bytes. */
template <bool WIDE> static __device__ __forceinline__ void rf_kv_load8(const rf_bf16 *p, int num, float (&v)[8]) {
    if constexpr (WIDE) {
        rf_unpack16(*reinterpret_cast<const uint4 *>(p), v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < num ? rf_to_f32(p[i]) : 0.0f;
    }
}
template <bool WIDE> static __device__ __forceinline__ void rf_kv_load8(const float *p, int num, float (&v)[8]) {
    if constexpr (WIDE) {
        rf_load4(p, v);
        rf_load4(p + 4, v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < num ? p[i] : 0.0f;
    }
}
template <bool WIDE> static __device__ __forceinline__ void rf_kv_store8(rf_bf16 *p, int num, const float (&v)[8]) {
    if constexpr (WIDE) {
        *reinterpret_cast<uint4 *>(p) = rf_pack16(v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < num) p[i] = rf_from_f32<rf_bf16>(v[i]);
    }
}
template <bool WIDE> static __device__ __forceinline__ void rf_kv_store8(float *p, int num, const float (&v)[8]) {
    if constexpr (WIDE) {
        rf_store4(p, v);
        rf_store4(p + 4, v + 4);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < num) p[i] = v[i];
    }
}

/* Rows one by one: 8, 16 or 32 lanes, 8 elements each. */
static constexpr int RF_KV_MAX_HEAD_DIM = 256;
static inline int rf_kv_row_lanes(int head_dim) {
    return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32;
}
static inline rf_status rf_kv_check_row(const char *op, int head_dim, rf_error *err) {
    return rf_text_size(op, "head_dim", head_dim, 1, RF_KV_MAX_HEAD_DIM, err);
}
/* If rows of a source, k and v, can be read in vectors of 16 bytes. */
static inline bool rf_kv_source_is_wide(const rf_kv_source &s, int head_dim) {
    return head_dim % 8 == 0 && s.row_stride % 8 == 0 && (s.rows || s.head_stride % 8 == 0) && rf_is_aligned(s.k, 16) &&
           rf_is_aligned(s.v, 16);
}

#endif
