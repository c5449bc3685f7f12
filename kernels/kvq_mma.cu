/* kernels/kvq_mma.cu - attention over packed caches on tensor cores: bf16 rows, INT codes of 2, 4 or 8 bits, keys by channel, values in
 * groups of whole 32 channels, head_dim 64 or 128 (kernels/kvq.h).
 * Maths    Codes go to the tensor cores as they are, less 2^(b - 1): integers of -128..127 are bf16. Keys:
 *            logit = sum_c (q_c s_c) (code_c - 2^(b - 1)) + sum_c q_c (zero_c + 2^(b - 1) s_c)
 *          with q_c s_c of a block of 32 tokens as the sum of two bf16 (relative error 2^-17) and the second sum in f32. Values:
 *            out_c = sum_i (p_i s_ig) (code_ic - 2^(b - 1)) + sum_i p_i (zero_ig + 2^(b - 1) s_ig)
 *          with p_i s_ig as the sum of two bf16 and the second sum in f32, one for each 32 channels.
 * Launch   A block of 4 warps per (unit, split, 4 or 8 heads of the group); a warp takes every fourth block of 32 tokens with a ring of two
 *          blocks (cp.async) and a running softmax of its own. mma m16n8k16: 16 tokens (channels, for values) x 8 columns, which are
 *          high and low parts of 4 heads. lane = 4 g + t has
 *            keys      tokens 4 g .. 4 g + 3, of every 16 channels 4 t .. 4 t + 3; logits of its tokens of heads t (and 4 + t)
 *            values    of every 32 channels 4 g .. 4 g + 3, tokens 8 t .. 8 t + 7; probabilities go by shared memory
 *          so that four codes are one load of b / 2 bytes, and two such words make pairs of neighbours in k. Orders of tokens and
 *          channels in a product are free; places of 16-byte pieces in the ring are such that a load meets no bank twice.
 *          Registers: up to 4 heads at most 128 and 4 blocks on an SM, 219 and 2 at 8 bits; up to 8 heads 224 and 2; none spill.
 * Floors   bytes as in kvq.cu: D = 128, groups of 32: 96, 160 and 288 bytes a token and unit at 2, 4 and 8 bits, of which an H100's SM
 *          gets 14 a cycle: 220, 366 and 658 cycles for 32 tokens. Instructions of a warp for them, by the machine code of the loop
 *          (sm_90a): 1294, 1386 and 1586 for up to 4 heads, 1844, 1930 and 2214 for up to 8; an SM issues 4 a cycle: 324, 347 and
 *          397, 461, 483 and 554 cycles. A pair of codes is 3 instructions (4 at 8 bits) and a fourth or less of a product,
 *          for all heads; four numbers of q s or p s with their zeros are about 34, for 4 heads. Counts, not measurements: bound by
 *          memory at 8 bits, near it at 4, by instructions at 2.
 * Order    fixed, no atomics. Arch  sm_80 and later.  Checked  tests/kernels/test_kvq.c. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/device.cuh"
#include "kernels/kvq_cuda.cuh"
#include "kernels/launch.cuh"

static constexpr int BLOCK = RF_KVQ_BLOCK, WARPS = 4, THREADS = WARPS * 32, STAGES = 2;
static constexpr int PITCH = BLOCK + 4; /* of a head's probabilities; element BLOCK: what sums so far shrink by */
static_assert(BLOCK == 32, "lanes of a warp");

/* Bytes of shared memory. HEADS: 4 or 8. */
template <int BITS, int DIM, int HEADS> struct mma_shape {
    static constexpr int SLABS = DIM / 32; /* 32 channels, which share scale and zero of a token */
    static constexpr int CODES = DIM * 4 * BITS, SCALES = DIM * 4 /* BLOCK SLABS 4, too */;
    static constexpr int PLANE = CODES + SCALES, STAGE = 2 * PLANE, RING = STAGES * STAGE; /* of a warp */
    static constexpr int PROBS = HEADS * DIM * 4, FIRST = PROBS + WARPS * HEADS * PITCH * 4,
                         BYTES = FIRST + WARPS * RING;
    static constexpr int MIN_BLOCKS = HEADS == 8 || BITS == 8 ? 2 : 4;
    static_assert(HEADS * DIM * 4 <= RING, "a warp's rows take its ring's place");
    static_assert(FIRST % 16 == 0 && PLANE % 16 == 0, "alignment");
};

/* Where piece i of 16 bytes of a block of keys goes, and the four codes of a lane: of channel 16 step + 4 t + j. */
template <int BITS> static __device__ __forceinline__ int key_piece(int i) {
    if (BITS == 2) return i; /* two channels each */
    const int half = BITS == 8 ? i & 1 : 0, c = BITS == 8 ? i >> 1 : i;
    const int to = (c & ~15) + (c & 3) * 4 + (c >> 2 & 3);
    return BITS == 8 ? to * 2 + half : to;
}
/* Of values: piece i of token 8 t + x. */
template <int BITS> static __device__ __forceinline__ int value_piece(int token, int i) {
    const int x = token & 7, t = token >> 3;
    return BITS == 8 ? (((i >> 1) * 8 + x) * 4 + t) * 2 + (i & 1) : (i * 8 + x) * 4 + t;
}
template <int BITS> static __device__ __forceinline__ uint32_t load_four(const uint8_t *p) {
    if constexpr (BITS == 2)
        return *p;
    else if constexpr (BITS == 4)
        return *reinterpret_cast<const uint16_t *>(p);
    else
        return *reinterpret_cast<const uint32_t *>(p);
}
template <int BITS>
static __device__ __forceinline__ uint32_t key_codes(const uint8_t *codes, int step, int j, int g, int t) {
    if (BITS == 2) return load_four<BITS>(codes + (step * 16 + 4 * t + j) * 8 + g);
    return load_four<BITS>(codes + (step * 16 + 4 * j + t) * (4 * BITS) + g * (BITS / 2));
}
template <int BITS>
static __device__ __forceinline__ uint32_t value_codes(const uint8_t *codes, int slab, int x, int g, int t) {
    if (BITS == 2) return load_four<BITS>(codes + ((slab / 2 * 8 + x) * 4 + t) * 16 + (slab & 1) * 8 + g);
    return load_four<BITS>(codes + ((slab * 8 + x) * 4 + t) * (4 * BITS) + g * (BITS / 2));
}

/* Pairs of code i of two words, less 2^(b - 1), as bf16: 0x4300 | n is 128 + n for n of 7 bits. */
template <int BITS> struct code_pairs {
    uint32_t a, b;
    __device__ __forceinline__ code_pairs(uint32_t first, uint32_t second) : a(first), b(second) {
        if (BITS != 8) a = first | second << 16;
    }
    __device__ __forceinline__ uint32_t get(int i) const {
        constexpr uint32_t ONE = 0x3f803f80u, MAGIC = 0x43004300u;
        if constexpr (BITS == 8) { /* n: the lower bits; the upper one makes -128 of -256 */
            const uint32_t v = __byte_perm(a, b, i | i << 4 | (i + 4) << 8 | (i + 4) << 12);
            return rf_kvq_fma2(rf_kvq_and_or(v, 0x007f007fu, MAGIC), ONE, rf_kvq_and_xor(v, 0x00800080u, 0xc380c380u));
        } else if constexpr (BITS == 4) {
            return rf_kvq_fma2(rf_kvq_and_or(a >> (4 * i), 0x000f000fu, MAGIC), ONE, 0xc308c308u /* -136 */);
        } else { /* n = 4^i code of the first three: 4^-i (128 + n) - 4^-i 128 - 2 */
            const uint32_t n = rf_kvq_and_or(i < 3 ? a : a >> 6, 0x00030003u << (i < 3 ? 2 * i : 0), MAGIC);
            if (i == 1) return rf_kvq_fma2(n, 0x3e803e80u, 0xc208c208u); /* 1 / 4, -34 */
            if (i == 2) return rf_kvq_fma2(n, 0x3d803d80u, 0xc120c120u); /* 1 / 16, -10 */
            return rf_kvq_fma2(n, ONE, 0xc302c302u);                     /* -130 */
        }
    }
};

static __device__ __forceinline__ float2 scale_and_zero(uint32_t bits) {
    return make_float2(__half2float(__ushort_as_half((unsigned short)(bits & 0xffff))),
                       __half2float(__ushort_as_half((unsigned short)(bits >> 16))));
}

/* A pair as bf16, or what that leaves of it. */
static __device__ __forceinline__ uint32_t pack_part(float a, float b, bool rest) {
    const uint32_t minus = rest ? rf_pack_bf16(a, b) : 0;
    return rf_pack_bf16(a - __uint_as_float(minus << 16), b - __uint_as_float(minus & 0xffff0000u));
}

/* What a warp copies of a block: its keys, its values (zeros past the last token). */
template <int BITS, int DIM>
static __device__ __forceinline__ void copy_keys(uint8_t *to, const rf_kvq_plane &keys, int64_t block, int lane) {
    constexpr int CODES = DIM * 4 * BITS, PIECES = CODES / 16, SCALE_PIECES = DIM / 4;
    const uint8_t *const codes = keys.codes + block * CODES;
    const uint32_t *const scales = keys.scales + block * DIM;
#pragma unroll
    for (int i = 0; i < PIECES / 32; i++) {
        const int piece = i * 32 + lane;
        rf_kvq_copy<16>(to + key_piece<BITS>(piece) * 16, codes + piece * 16, true);
    }
    if (lane < SCALE_PIECES) rf_kvq_copy<16>(to + CODES + lane * 16, scales + lane * 4, true);
    static_assert(PIECES % 32 == 0 && SCALE_PIECES <= 32, "whole passes");
}
template <int BITS, int DIM>
static __device__ __forceinline__ void copy_values(uint8_t *to, const rf_kvq_plane &values, int64_t first, int num,
                                                   int groups, int group_slabs, int lane) {
    constexpr int CODES = DIM * 4 * BITS, SLABS = DIM / 32, EACH = DIM * BITS / 128 /* pieces of a token */;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int token = (i * 32 + lane) / EACH, piece = (i * 32 + lane) % EACH;
        const bool there = token < num;
        rf_kvq_copy<16>(to + value_piece<BITS>(token, piece) * 16,
                        values.codes + ((first + (there ? token : 0)) * EACH + piece) * 16, there);
    }
#pragma unroll
    for (int i = 0; i < SLABS; i++) {
        const int token = (i * 32 + lane) / SLABS, slab = (i * 32 + lane) % SLABS;
        const bool there = token < num;
        rf_kvq_copy<4>(to + CODES + (((token & 7) * 4 + (token >> 3)) * SLABS + slab) * 4,
                       values.scales + (first + (there ? token : 0)) * groups + slab / group_slabs, there);
    }
}

/* Grid (units x splits, head batches). */
template <int BITS, int DIM, int HEADS>
static __global__ void __launch_bounds__(THREADS, mma_shape<BITS, DIM, HEADS>::MIN_BLOCKS)
    mma_kernel(const __grid_constant__ rf_kvq_attention_params p) {
    using Shape = mma_shape<BITS, DIM, HEADS>;
    constexpr int SLABS = Shape::SLABS, STEPS = DIM / 16, SETS = HEADS / 4; /* of 4 heads */
    constexpr float MIDDLE = 1 << (BITS - 1);
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float tops[WARPS][HEADS], sums[WARPS][HEADS], zeros[WARPS][HEADS][SLABS];

    const rf_kvq_store &s = p.a.store;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int groups = DIM / s.group, group_slabs = s.group / 32;
    const int64_t unit = blockIdx.x / p.num_splits;
    const int split = blockIdx.x % p.num_splits, first_head = (int)blockIdx.y * HEADS;
    const int num_heads = min(HEADS, p.a.group_heads - first_head);
    const int64_t first_row = unit * p.a.group_heads + first_head;
    float *const queries = reinterpret_cast<float *>(shared);                                     /* [HEADS][DIM] */
    float *const probs = reinterpret_cast<float *>(shared + Shape::PROBS) + warp * HEADS * PITCH; /* [HEADS][PITCH] */
    uint8_t *const ring = shared + Shape::FIRST + warp * Shape::RING;
    rf_wait_for_previous();
    const int len = max(min(p.a.lens[unit], (int)p.a.most), 0), blocks = (len + BLOCK - 1) / BLOCK;
    const int each = (blocks + p.num_splits - 1) / p.num_splits;
    const int begin = split * each, end = min(begin + each, blocks);
    if (p.num_splits > 1 && begin >= end) { /* nobody reads the rows */
        if ((int)threadIdx.x < num_heads) p.part_lse[(first_row + threadIdx.x) * p.num_splits + split] = -INFINITY;
        return;
    }
    const rf_kvq_plane keys = rf_kvq_plane_of(s, unit, false), values = rf_kvq_plane_of(s, unit, true);

    /* Groups of copies: keys, values of a block, of the next one, ...; empty past the last. */
    auto fetch = [&](int block, int stage) {
        uint8_t *const to = ring + stage * Shape::STAGE;
        const int64_t first = (int64_t)block * BLOCK;
        if (block < end) copy_keys<BITS, DIM>(to, keys, block, lane);
        rf_kvq_commit();
        if (block < end)
            copy_values<BITS, DIM>(to + Shape::PLANE, values, first, min(len - (int)first, BLOCK), groups, group_slabs,
                                   lane);
        rf_kvq_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) fetch(begin + warp + i * WARPS, i);

    for (int at = threadIdx.x; at < HEADS * DIM; at += THREADS) {
        const int c = at % DIM, h = at / DIM;
        float q = 0.0f;
        if (h < num_heads) {
            q = rf_to_f32(((const rf_bf16 *)p.a.q)[(first_row + h) * DIM + c]) * p.a.scale;
            if (keys.factor) q *= keys.factor[c];
        }
        queries[at] = q;
    }
    __syncthreads(); /* the queries are there */

    float out[SETS][SLABS][2][4] = {}, zero_sum[SETS][SLABS] = {}, top[SETS], sum[SETS];
#pragma unroll
    for (int n = 0; n < SETS; n++) top[n] = -INFINITY, sum[n] = 0.0f;

    int stage = 0;
#pragma unroll 1
    for (int block = begin + warp; block < end; block += WARPS) {
        const int64_t first = (int64_t)block * BLOCK;
        const int num = min(len - (int)first, BLOCK);
        const uint8_t *const k_codes = ring + stage * Shape::STAGE, *const v_codes = k_codes + Shape::PLANE;
        const uint32_t *const k_scales = reinterpret_cast<const uint32_t *>(k_codes + Shape::CODES),
                              *const v_scales = reinterpret_cast<const uint32_t *>(v_codes + Shape::CODES);

        rf_kvq_wait<2 * STAGES - 1>();
        __syncwarp(); /* the keys are there */
        float acc[2][SETS][4] = {},
              bias[SETS] = {}; /* [tokens 4 g + 2 u, + 1]: (first, high), (first, low), (second, ...) */
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const uint4 bits = *reinterpret_cast<const uint4 *>(k_scales + step * 16 + 4 * t);
            const float2 map[4] = {scale_and_zero(bits.x), scale_and_zero(bits.y), scale_and_zero(bits.z),
                                   scale_and_zero(bits.w)};
            const code_pairs<BITS> low(key_codes<BITS>(k_codes, step, 0, g, t),
                                       key_codes<BITS>(k_codes, step, 1, g, t)),
                high(key_codes<BITS>(k_codes, step, 2, g, t), key_codes<BITS>(k_codes, step, 3, g, t));
            uint32_t b[SETS][2];
#pragma unroll
            for (int n = 0; n < SETS; n++) { /* column g: head g / 2 of the set, its high or low part */
                float q[4], v[4];
                rf_load4(queries + (4 * n + (g >> 1)) * DIM + step * 16 + 4 * t, q);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    v[j] = q[j] * map[j].x;
                    bias[n] = fmaf(MIDDLE, v[j], fmaf(q[j], map[j].y, bias[n]));
                }
#pragma unroll
                for (int i = 0; i < 2; i++) b[n][i] = pack_part(v[2 * i], v[2 * i + 1], g & 1);
            }
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const uint32_t a[4] = {low.get(2 * u), low.get(2 * u + 1), high.get(2 * u), high.get(2 * u + 1)};
#pragma unroll
                for (int n = 0; n < SETS; n++) rf_kv_mma(acc[u][n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
            }
        }

        float shrink[SETS];
#pragma unroll
        for (int n = 0; n < SETS; n++) { /* head 4 n + t */
            bias[n] += __shfl_xor_sync(RF_ALL_LANES, bias[n], 1);
            bias[n] += __shfl_xor_sync(RF_ALL_LANES, bias[n], 2);
            const float add = __shfl_sync(RF_ALL_LANES, bias[n], 8 * t);
            float logit[4], most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                logit[i] = acc[i / 2][n][i % 2 * 2] + acc[i / 2][n][i % 2 * 2 + 1] + add;
                if (4 * g + i >= num) logit[i] = -INFINITY;
                most = fmaxf(most, logit[i]);
            }
            if (p.a.logits && 4 * n + t < num_heads) {
                float *const to = p.a.logits + (first_row + 4 * n + t) * p.a.logits_stride + first + 4 * g;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (4 * g + i < num) to[i] = logit[i];
            }
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) most = fmaxf(most, __shfl_xor_sync(RF_ALL_LANES, most, mask));
            most = fmaxf(most, top[n]);
            shrink[n] = rf_kvq_exp(top[n] - most);
            top[n] = most;
            sum[n] *= shrink[n];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                logit[i] = rf_kvq_exp(logit[i] - most);
                sum[n] += logit[i];
            }
            rf_store4(probs + (4 * n + t) * PITCH + 4 * g, logit);
            if (g == 0) probs[(4 * n + t) * PITCH + BLOCK] = shrink[n];
        }
        rf_kvq_wait<2 * STAGES - 2>();
        __syncwarp(); /* the values and the probabilities are there */

        float w[SETS][8], mine[SETS]; /* of column g */
#pragma unroll
        for (int n = 0; n < SETS; n++) {
            const float *const head = probs + (4 * n + (g >> 1)) * PITCH;
            rf_load4(head + 8 * t, w[n]);
            rf_load4(head + 8 * t + 4, w[n] + 4);
            mine[n] = head[BLOCK];
        }
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
#pragma unroll
            for (int n = 0; n < SETS; n++) {
                zero_sum[n][slab] *= mine[n];
#pragma unroll
                for (int i = 0; i < 8; i++) out[n][slab][i / 4][i % 4] *= shrink[n];
            }
#pragma unroll
            for (int x = 0; x < 8; x += 4) { /* tokens 8 t + x .. + 3 */
                float2 map[4];
#pragma unroll
                for (int j = 0; j < 4; j++) map[j] = scale_and_zero(v_scales[((x + j) * 4 + t) * SLABS + slab]);
                uint32_t b[SETS][2];
#pragma unroll
                for (int n = 0; n < SETS; n++) {
                    float v[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        v[j] = w[n][x + j] * map[j].x;
                        zero_sum[n][slab] = fmaf(MIDDLE, v[j], fmaf(w[n][x + j], map[j].y, zero_sum[n][slab]));
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) b[n][i] = pack_part(v[2 * i], v[2 * i + 1], g & 1);
                }
                const code_pairs<BITS> low(value_codes<BITS>(v_codes, slab, x, g, t),
                                           value_codes<BITS>(v_codes, slab, x + 1, g, t)),
                    high(value_codes<BITS>(v_codes, slab, x + 2, g, t), value_codes<BITS>(v_codes, slab, x + 3, g, t));
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    const uint32_t a[4] = {low.get(2 * u), low.get(2 * u + 1), high.get(2 * u), high.get(2 * u + 1)};
#pragma unroll
                    for (int n = 0; n < SETS; n++) rf_kv_mma(out[n][slab][u], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
                }
            }
        }
        __syncwarp(); /* the stage and the probabilities have been read */
        fetch(block + STAGES * WARPS, stage);
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    rf_kvq_wait<0>();
    __syncwarp(); /* nothing is under way into the ring */

    /* Join the warps, their rows in their rings. */
    float *const rows = reinterpret_cast<float *>(ring); /* [HEADS][DIM] */
#pragma unroll
    for (int n = 0; n < SETS; n++) {
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum[n] += __shfl_xor_sync(RF_ALL_LANES, sum[n], mask);
        if (g == 0) tops[warp][4 * n + t] = top[n], sums[warp][4 * n + t] = sum[n];
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
            float zero = zero_sum[n][slab];
            zero += __shfl_xor_sync(RF_ALL_LANES, zero, 1);
            zero += __shfl_xor_sync(RF_ALL_LANES, zero, 2);
            if (t == 0 && g % 2 == 0) zeros[warp][4 * n + (g >> 1)][slab] = zero;
            const float(&d)[2][4] = out[n][slab];
            const float v[4] = {d[0][0] + d[0][1], d[0][2] + d[0][3], d[1][0] + d[1][1], d[1][2] + d[1][3]};
            rf_store4(rows + (4 * n + t) * DIM + slab * 32 + 4 * g, v);
        }
    }
    __syncthreads(); /* the warps' parts are there */
    if ((int)threadIdx.x < num_heads) {
        const int h = threadIdx.x;
        float most = -INFINITY, total = 0.0f, weight[WARPS];
#pragma unroll
        for (int i = 0; i < WARPS; i++) most = fmaxf(most, tops[i][h]);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            weight[i] = tops[i][h] == -INFINITY ? 0.0f : rf_kvq_exp(tops[i][h] - most);
            total = fmaf(weight[i], sums[i][h], total);
        }
        const float inv = total > 0.0f ? 1.0f / total : 0.0f, lse = total > 0.0f ? most + logf(total) : -INFINITY;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sums[i][h] = weight[i] * inv;
        *(p.num_splits > 1 ? p.part_lse + (first_row + h) * p.num_splits + split : p.a.lse + first_row + h) = lse;
    }
    __syncthreads(); /* the weights are there */
    for (int at = threadIdx.x; at < num_heads * (DIM / 4); at += THREADS) {
        const int h = at / (DIM / 4), c = at % (DIM / 4) * 4;
        const int64_t row = first_row + h;
        float v[4] = {};
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const float weight = sums[i][h], zero = zeros[i][h][c / 32];
            float x[4];
            rf_load4(reinterpret_cast<const float *>(shared + Shape::FIRST + i * Shape::RING) + h * DIM + c, x);
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = fmaf(weight, x[j] + zero, v[j]);
        }
        if (values.factor) {
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] *= values.factor[c + j];
        }
        if (p.num_splits > 1) {
            rf_store4(p.part_out + (row * p.num_splits + split) * DIM + c, v);
            continue;
        }
        rf_bf16 *const to = (rf_bf16 *)p.a.out + row * DIM + c;
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = rf_from_f32<rf_bf16>(v[j]);
    }
}

bool rf_kvq_mma_takes(const rf_kvq_attention_args *a) {
    const rf_kvq_store *const s = &a->store;
    return s->format == RF_KVQ_INT && s->keys_by_channel && s->dtype == RF_DTYPE_BF16 && s->group % 32 == 0 &&
           (s->head_dim == 64 || s->head_dim == 128);
}

int rf_kvq_mma_heads(const rf_kvq_attention_args *a) {
    return a->group_heads <= 4 ? 4 : 8;
}

template <int BITS, int DIM, int HEADS>
static rf_status launch(rf_stream *stream, const rf_kvq_attention_params *p, rf_error *err) {
    static std::atomic<uint64_t> allowed{0};
    constexpr int BYTES = mma_shape<BITS, DIM, HEADS>::BYTES;
    const cudaError_t code = rf_allow_shared((const void *)mma_kernel<BITS, DIM, HEADS>, BYTES, &allowed);
    if (code != cudaSuccess) return rf_cuda_fail(err, "kvq_attention", code);
    const dim3 grid((unsigned)(p->a.units * p->num_splits), (unsigned)rf_ceil_div(p->a.group_heads, HEADS));
    return rf_launch_early(stream, "kvq_attention", err, mma_kernel<BITS, DIM, HEADS>, grid, dim3(THREADS), BYTES, *p);
}

template <int BITS> static rf_status choose(rf_stream *stream, const rf_kvq_attention_params *p, rf_error *err) {
    const bool few = rf_kvq_mma_heads(&p->a) == 4;
    if (p->a.store.head_dim == 64)
        return few ? launch<BITS, 64, 4>(stream, p, err) : launch<BITS, 64, 8>(stream, p, err);
    return few ? launch<BITS, 128, 4>(stream, p, err) : launch<BITS, 128, 8>(stream, p, err);
}

rf_status rf_kvq_mma_run(rf_stream *stream, const rf_kvq_attention_params *p, rf_error *err) {
    return p->a.store.bits == 2   ? choose<2>(stream, p, err)
           : p->a.store.bits == 4 ? choose<4>(stream, p, err)
                                  : choose<8>(stream, p, err);
}
