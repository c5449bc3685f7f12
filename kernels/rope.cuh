/* kernels/rope.cuh - the turn of a pair on the device; one sequence of roundings for every kernel that turns. */
#ifndef RF_KERNELS_ROPE_CUH
#define RF_KERNELS_ROPE_CUH

#include "kernels/device.cuh"

/* (a, b) -> (c a - s b, s a + c b), one product rounded, the other fused. */
static __device__ __forceinline__ void rf_turn_pair(float &a, float &b, float c, float s) {
    const float x = a;
    a = fmaf(c, x, -__fmul_rn(s, b));
    b = fmaf(s, x, __fmul_rn(c, b));
}

/* A 16-byte vector: 8 elements of bf16 or 4 of f32. */
template <class T> static constexpr int RF_VEC16 = 16 / (int)sizeof(T);

static __device__ __forceinline__ void rf_unpack16(const uint4 &q, float (&v)[8]) {
    v[0] = __uint_as_float(q.x << 16), v[1] = __uint_as_float(q.x & 0xffff0000u);
    v[2] = __uint_as_float(q.y << 16), v[3] = __uint_as_float(q.y & 0xffff0000u);
    v[4] = __uint_as_float(q.z << 16), v[5] = __uint_as_float(q.z & 0xffff0000u);
    v[6] = __uint_as_float(q.w << 16), v[7] = __uint_as_float(q.w & 0xffff0000u);
}
static __device__ __forceinline__ void rf_unpack16(const uint4 &q, float (&v)[4]) {
    v[0] = __uint_as_float(q.x), v[1] = __uint_as_float(q.y), v[2] = __uint_as_float(q.z), v[3] = __uint_as_float(q.w);
}
static __device__ __forceinline__ uint4 rf_pack16(const float (&v)[8]) {
    return make_uint4(rf_pack_bf16(v[0], v[1]), rf_pack_bf16(v[2], v[3]), rf_pack_bf16(v[4], v[5]),
                      rf_pack_bf16(v[6], v[7]));
}
static __device__ __forceinline__ uint4 rf_pack16(const float (&v)[4]) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

/* N / 2 pairs turned by N neighbouring numbers (cos, sin, cos, sin, ...) of a table; p aligned to 16 bytes. */
template <int N> static __device__ __forceinline__ void rf_load_angles(const float *p, float (&t)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) rf_load4(p + i, t + i);
}
template <int N> static __device__ __forceinline__ void rf_turn(float (&v)[N], const float (&t)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) rf_turn_pair(v[i], v[i + 1], t[i], t[i + 1]);
}

#endif
