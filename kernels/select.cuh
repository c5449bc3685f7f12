/* kernels/select.cuh - order statistics of floats by their bits, by one block; kernels/select.h is the same on the CPU.
 * Maths    rf_float_key keeps the order of numbers; -0 is 0, NaN counts as +inf. A key is found byte by byte from the top:
 *          count the bytes of the keys that share the bytes found so far, walk the counts up to the rank.
 * Counts   integers in shared memory; lanes with the same byte add once, so that keys of one exponent do not queue. */
#ifndef RF_KERNELS_SELECT_CUH
#define RF_KERNELS_SELECT_CUH

#include <cuda_runtime.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t rf_float_key(float v) {
    const uint32_t bits = __float_as_uint(isnan(v) ? __int_as_float(0x7f800000) : v + 0.0f); /* -0 + 0 = 0 */
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float rf_key_float(uint32_t key) {
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

/* In shared memory. The caller sets rank[] before rf_select; key, rank among the values of that key and their number are
 * there after it. */
template <int NUM> struct rf_selection {
    alignas(16) uint32_t hist[4][NUM][256];
    uint32_t key[NUM], rank[NUM], equal[NUM];
};

/* NUM ranks of `num` values at once; 0 <= rank < num. value(i) is called by thread i % blockDim.x alone. The block has at
 * least 32 NUM threads, a multiple of 32, and all call. */
template <int NUM, class Value>
static __device__ __forceinline__ void rf_select(rf_selection<NUM> &s, int num, Value value) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = threadIdx.x; i < 4 * NUM * 256; i += blockDim.x) (&s.hist[0][0][0])[i] = 0;
    if (threadIdx.x < NUM) s.key[threadIdx.x] = 0;
    __syncthreads(); /* counts are 0, ranks are there */
#pragma unroll 1
    for (int pass = 0; pass < 4; pass++) {
        const int shift = 24 - 8 * pass;
        const uint32_t mask = pass == 0 ? 0u : 0xffffffffu << (shift + 8);
        uint32_t found[NUM];
#pragma unroll
        for (int r = 0; r < NUM; r++) found[r] = s.key[r];
        for (int first = 0; first < num; first += blockDim.x) {
            const int i = first + (int)threadIdx.x;
            const uint32_t key = i < num ? rf_float_key(value(i)) : 0u;
            const uint32_t digit = key >> shift & 255u;
#pragma unroll
            for (int r = 0; r < NUM; r++) {
                if (r > 0 && found[r] == found[0]) continue; /* the counts of rank 0 serve */
                const bool hit = i < num && (key & mask) == found[r];
                const uint32_t hits = __ballot_sync(0xffffffffu, hit);
                if (!hit) continue;
                const uint32_t peers = __match_any_sync(hits, digit);
                if (lane == __ffs(peers) - 1) atomicAdd(&s.hist[pass][r][digit], (uint32_t)__popc(peers));
            }
        }
        __syncthreads(); /* counted */
        if (warp < NUM) {
            const int r = warp;
            uint32_t prefix = found[0];
#pragma unroll
            for (int k = 1; k < NUM; k++) prefix = r == k ? found[k] : prefix;
            const uint32_t rank = s.rank[r];
            const uint4 *const from = reinterpret_cast<const uint4 *>(s.hist[pass][prefix == found[0] ? 0 : r]);
            const uint4 a = from[lane * 2], b = from[lane * 2 + 1];
            const uint32_t counts[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            uint32_t own = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) own += counts[k];
            uint32_t end = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t other = __shfl_up_sync(0xffffffffu, end, step);
                if (lane >= step) end += other;
            }
            __syncwarp(); /* every lane has read the rank */
            uint32_t begin = end - own, digit = 0, equal = 0;
            const bool mine = rank >= begin && rank < end;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (mine && rank >= begin && rank < begin + counts[k]) {
                    digit = lane * 8 + k;
                    equal = counts[k];
                    s.rank[r] = rank - begin;
                }
                begin += counts[k];
            }
            if (mine) {
                s.key[r] = prefix | digit << shift;
                s.equal[r] = equal;
            }
        }
        __syncthreads(); /* found */
    }
}

#endif
