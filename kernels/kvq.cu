/* kernels/kvq.cu - packed caches (kernels/kvq.h).
 * Maths    attention in f32. A code becomes a float as upper bits of the mantissa of 1, e4m3 by the bits of a half and a scale of 256;
 *          scale and zero are applied before the product (one fma), so that codes of every format meet one loop.
 * Launch   attention: a block of 4 warps per (unit, split, HEADS heads of the group); a warp takes every fourth block of 32 tokens with
 *          its own running softmax. An octet is 8 neighbours of a bit string: b bytes, which a lane loads at once, neighbouring lanes
 *          neighbouring octets.
 *            keys by channel   octets of tokens: lanes 4 x 8 (octets x channels); 8 tokens x HEADS sums in a lane, of which a
 *                              butterfly that halves what it carries leaves one token a lane
 *            other keys        octets of channels: LANES lanes a token, 8 tokens x HEADS sums in a lane, the same butterfly
 *            values            octets of channels; 8 channels x HEADS sums in a lane
 *          INT with keys by channel and bf16 rows: mostly kvq_mma.cu's kernel in its place.
 *          Warps meet in shared memory, splits through the workspace by a second kernel, in order, whose blocks (one for each query
 *          head) have all rows of the splits under way at once.
 *          pack: a lane per octet of a row; keys by channel: a thread per channel. unpack: a thread per octet.
 * Floors   bytes of a token and unit, both planes, groups of g: codes D b / 4, scales of values 4 D / g, of keys D / 8 by channel,
 *          else 4 D / g; e4m3 2 D + 8. D = 128, g = 32: 96 at 2 bits, 160 at 4, 288 at 8; bf16 rows are 512. Flops 4 D a query head.
 *          An H100's SM gets 14 bytes a cycle: 7, 11 and 20 cycles a token. A code costs 3 + HEADS instructions (shift, mask, fma;
 *          fma a head), 2 (3 + HEADS) cycles a token: near the memory's time for 2 heads at 4 bits and for 4 to 8 heads at 8
 *          bits; fewer bits or more heads are bound by instructions. These are counts, not measurements.
 *          A packed byte is read once for all heads of a group up to 8 (4 where head_dim is neither 64 nor 128).
 * Order    fixed, no atomics. Arch  sm_80 and later.  Checked  tests/kernels/test_kvq.c. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/kv_cuda.cuh"
#include "kernels/kvq_checks.h"
#include "kernels/kvq_cuda.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int BLOCK = RF_KVQ_BLOCK, MAX_DIM = RF_KVQ_MAX_HEAD_DIM;
static constexpr int WARPS = 4, ATTENTION_THREADS = WARPS * 32, ROW_THREADS = 256, MAX_SPLITS = 64, JOIN_WARPS = 8;
static constexpr int E4M3 = 3, ROWS_BF16 = 16, ROWS_F32 = 32; /* beside 2, 4 and 8 bits */
static_assert(BLOCK == 32 && MAX_DIM == RF_KV_MAX_HEAD_DIM, "lanes of a warp; 8 elements of a lane");

/* --- codes ---------------------------------------------------------------------------------------------------------------- */

template <int CODE> static constexpr bool is_int = CODE == 2 || CODE == 4 || CODE == 8;

/* Eight neighbours as they lie in memory. */
template <int CODE> struct octet {
    static constexpr int BYTES = CODE == E4M3 ? 8 : CODE, WORDS = BYTES <= 4 ? 1 : BYTES / 4;
    uint32_t w[WORDS];

    /* The octet at a multiple of BYTES; zeros if it is not there. */
    __device__ __forceinline__ void load(const uint8_t *p, bool valid) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = 0;
        if (!valid) return;
        if constexpr (BYTES == 2) {
            w[0] = *reinterpret_cast<const uint16_t *>(p);
        } else if constexpr (BYTES == 4) {
            w[0] = *reinterpret_cast<const uint32_t *>(p);
        } else if constexpr (BYTES == 8) {
            const uint2 v = *reinterpret_cast<const uint2 *>(p);
            w[0] = v.x, w[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                const uint4 v = *reinterpret_cast<const uint4 *>(p + 4 * i);
                w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
            }
        }
    }

    /* As attention takes them: 1 + code / 2^b, a code in the upper bits of the mantissa of 1. */
    __device__ __forceinline__ float quick(int j) const {
        if constexpr (is_int<CODE>) {
            const int up = 23 - CODE - j * CODE % 32;
            const uint32_t v = w[j * CODE / 32], at = up >= 0 ? v << (up & 31) : v >> (-up & 31);
            return __uint_as_float(0x3f800000u | (at & ((1u << CODE) - 1) << (23 - CODE)));
        } else {
            return get(j);
        }
    }

    /* Codes as numbers; e4m3 times 2^-8. */
    __device__ __forceinline__ float get(int j) const {
        if constexpr (is_int<CODE>) {
            const uint32_t code = w[j * CODE / 32] >> (j * CODE % 32) & ((1u << CODE) - 1);
            return __uint_as_float(0x4b000000u | code) - 8388608.0f;
        } else if constexpr (CODE == E4M3) {
            const uint32_t v = j & 1 ? w[j / 4] : w[j / 4] << 8; /* the byte on top of its half */
            const uint32_t h = (v & 0x80008000u) | (v & 0x7f007f00u) >> 1;
            return __half2float(__ushort_as_half((unsigned short)(j & 2 ? h >> 16 : h & 0xffff)));
        } else if constexpr (CODE == ROWS_BF16) {
            return __uint_as_float(j & 1 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16);
        } else {
            return __uint_as_float(w[j]);
        }
    }
};

/* x' = zero + scale number, from the four bytes that a store has for it. */
template <int CODE> struct affine {
    float scale, zero;
    __device__ __forceinline__ affine(uint32_t bits) {
        zero = 0.0f;
        if constexpr (is_int<CODE>) {
            scale = __half2float(__ushort_as_half((unsigned short)(bits & 0xffff)));
            zero = __half2float(__ushort_as_half((unsigned short)(bits >> 16)));
        } else {
            scale = __uint_as_float(bits) * (CODE == E4M3 ? 256.0f : 1.0f);
        }
    }
    __device__ __forceinline__ float operator()(float number) const {
        return is_int<CODE> ? fmaf(scale, number, zero) : scale * number;
    }
};

/* For quick(): scale 2^b, zero - scale 2^b. */
template <int CODE> struct quick_affine : affine<CODE> {
    __device__ __forceinline__ quick_affine(uint32_t bits) : affine<CODE>(bits) {
        if constexpr (is_int<CODE>) {
            this->scale *= (float)(1 << CODE);
            this->zero -= this->scale;
        }
    }
};

/* Octet c / 8 of a token that is not by channel, and the place of its scale. */
template <int CODE>
static __device__ __forceinline__ const uint8_t *octet_at(const rf_kvq_plane &p, int64_t token, int c, int dim) {
    return p.codes + (token * dim + c) / 8 * octet<CODE>::BYTES;
}
template <int CODE>
static __device__ __forceinline__ int64_t scale_at(int64_t token, int c, int groups, int group_octets) {
    return is_int<CODE> ? token * groups + (c / 8) / group_octets : token;
}

static __device__ __forceinline__ uint32_t to_e4m3(float x) {
    uint32_t bits = __float_as_uint(x);
    const uint32_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7f;
    if (bits < 0x3c800000)
        return sign | (uint32_t)rintf(__uint_as_float(bits) * 512.0f); /* below 2^-6: steps of 2^-9 */
    const uint32_t code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return sign | (code > 0x7e ? 0x7e : code);
}
static __device__ __forceinline__ uint32_t half_bits(float x) {
    return __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)));
}
static __device__ __forceinline__ uint32_t range_bits(float least, float most, int bits) {
    return half_bits((most - least) / (float)((1 << bits) - 1)) | half_bits(least) << 16;
}
static __device__ __forceinline__ uint32_t code_of(float x, float scale, float zero, int bits) {
    if (scale == 0.0f) return 0;
    return (uint32_t)fminf(fmaxf(rintf((x - zero) / scale), 0.0f), (float)((1 << bits) - 1));
}

/* Calls f with the store's code as a constant. */
template <class F> static rf_status with_code(const rf_kvq_store &s, const F &f) {
    if (s.format == RF_KVQ_FP8) return f(std::integral_constant<int, E4M3>());
    if (s.format == RF_KVQ_DIRECTION)
        return s.dtype == RF_DTYPE_BF16 ? f(std::integral_constant<int, ROWS_BF16>())
                                        : f(std::integral_constant<int, ROWS_F32>());
    return s.bits == 2   ? f(std::integral_constant<int, 2>())
           : s.bits == 4 ? f(std::integral_constant<int, 4>())
                         : f(std::integral_constant<int, 8>());
}
static bool is_by_channel(const rf_kvq_store &s) {
    return s.format == RF_KVQ_INT && s.keys_by_channel;
}

/* --- pack ------------------------------------------------------------------------------------------------------------------ */

/* Grid (units x tiles of tokens, planes from first_plane on): `lanes` lanes a row, an octet each. */
template <class T, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    pack_rows_kernel(const __grid_constant__ rf_kvq_pack_args p, int lanes, unsigned tiles, int first_plane) {
    __shared__ float2 ranges[ROW_THREADS];
    const rf_kvq_store &s = p.store;
    const int lane = threadIdx.x & (lanes - 1), dim = s.head_dim, c = lane * 8;
    const int64_t unit = blockIdx.x / tiles;
    const int i = (int)(blockIdx.x % tiles) * (ROW_THREADS / lanes) + (int)threadIdx.x / lanes;
    const bool is_value = first_plane + (int)blockIdx.y == 1;
    rf_wait_for_previous();
    const bool active = i < min(p.counts[unit], (int)p.most) && c < dim;
    const rf_kvq_plane to = rf_kvq_plane_of(s, unit, is_value);
    const int64_t token = p.first[unit] + (int64_t)i;
    float x[8] = {};
    if (active) {
        const int64_t row = p.from[unit * p.list_stride + i];
        rf_kv_load8<WIDE>((const T *)(is_value ? p.v : p.k) + row * p.row_stride + unit * p.head_stride + c, 8, x);
        if (to.factor) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] /= to.factor[c + j];
        }
    }
    if (s.format == RF_KVQ_FP8) {
        float most = 0.0f; /* NaN stays */
#pragma unroll
        for (int j = 0; j < 8; j++) most = most != most || fabsf(x[j]) <= most ? most : fabsf(x[j]);
        for (int step = lanes / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(RF_ALL_LANES, most, step);
            most = most != most || other <= most ? most : other;
        }
        if (!active) return;
        const float scale = most / 448.0f;
        uint32_t w[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (scale != 0.0f) w[j / 4] |= to_e4m3(x[j] / scale) << (8 * (j % 4));
        *reinterpret_cast<uint2 *>(to.codes + token * dim + c) = make_uint2(w[0], w[1]);
        if (lane == 0) to.scales[token] = __float_as_uint(scale);
        return;
    }
    float least = x[0], most = x[0];
#pragma unroll
    for (int j = 1; j < 8; j++) {
        least = fminf(least, x[j]);
        most = fmaxf(most, x[j]);
    }
    ranges[threadIdx.x] = make_float2(least, most);
    __syncwarp(); /* the octets' ranges are there */
    if (!active) return;
    const int each = s.group / 8, begin = (int)threadIdx.x - lane % each; /* octets of a group */
    for (int j = begin; j < begin + each; j++) {
        least = fminf(least, ranges[j].x);
        most = fmaxf(most, ranges[j].y);
    }
    const uint32_t range = range_bits(least, most, s.bits);
    const affine<2> map(range);
    uint32_t w[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int bit = j * s.bits;
        w[bit / 32] |= code_of(x[j], map.scale, map.zero, s.bits) << (bit % 32);
    }
    uint8_t *const codes = to.codes + (token * dim + c) / 8 * s.bits;
    if (s.bits == 2)
        *reinterpret_cast<uint16_t *>(codes) = (uint16_t)w[0];
    else if (s.bits == 4)
        *reinterpret_cast<uint32_t *>(codes) = w[0];
    else
        *reinterpret_cast<uint2 *>(codes) = make_uint2(w[0], w[1]);
    if (lane % each == 0) to.scales[token * (dim / s.group) + lane / each] = range;
}

/* Keys by channel. Grid (units x blocks of tokens), a thread per channel. */
template <class T, int BITS>
static __global__ void __launch_bounds__(MAX_DIM)
    pack_block_kernel(const __grid_constant__ rf_kvq_pack_args p, unsigned blocks) {
    const int c = threadIdx.x, dim = p.store.head_dim;
    const int64_t unit = blockIdx.x / blocks;
    const int begin = (int)(blockIdx.x % blocks) * BLOCK;
    rf_wait_for_previous();
    const int num = min(min(p.counts[unit], (int)p.most) - begin, BLOCK);
    if (num <= 0 || c >= dim) return;
    const rf_kvq_plane to = rf_kvq_plane_of(p.store, unit, false);
    const int64_t block = (p.first[unit] + begin) / BLOCK;
    const int32_t *const from = p.from + unit * p.list_stride + begin;
    const T *const k = (const T *)p.k + unit * p.head_stride + c;
    const float factor = to.factor ? to.factor[c] : 1.0f;
    float x[BLOCK], least = INFINITY, most = -INFINITY;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) x[i] = i < num ? rf_to_f32(k[from[i] * p.row_stride]) : 0.0f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        x[i] /= factor;
        if (i >= num) continue;
        least = fminf(least, x[i]);
        most = fmaxf(most, x[i]);
    }
    const uint32_t range = range_bits(least, most, BITS);
    const affine<BITS> map(range);
    uint32_t w[BITS] = {};
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        if (i < num) w[i * BITS / 32] |= code_of(x[i], map.scale, map.zero, BITS) << (i * BITS % 32);
    uint32_t *const codes = reinterpret_cast<uint32_t *>(to.codes + (block * dim + c) * (4 * BITS));
    if constexpr (BITS == 2) {
        *reinterpret_cast<uint2 *>(codes) = make_uint2(w[0], w[1]);
    } else {
#pragma unroll
        for (int i = 0; i < BITS; i += 4)
            *reinterpret_cast<uint4 *>(codes + i) = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
    }
    to.scales[block * dim + c] = range;
}

static rf_status check_grid(const char *op, int64_t units, int64_t tiles, rf_error *err) {
    return rf_text_size(op, "units", units, 0, INT32_MAX / (tiles > 0 ? tiles : 1), err);
}

static bool is_wide(const void *a, const void *b, int64_t row_stride, int64_t head_stride) {
    return row_stride % 8 == 0 && head_stride % 8 == 0 && rf_is_aligned(a, 16) && rf_is_aligned(b, 16);
}

template <class T> static rf_status launch_pack(rf_stream *stream, const rf_kvq_pack_args *a, rf_error *err) {
    const bool by_channel = is_by_channel(a->store);
    if (by_channel) {
        const int64_t blocks = rf_ceil_div(a->most, BLOCK);
        const dim3 grid((unsigned)(a->units * blocks)), threads((unsigned)rf_ceil_div(a->store.head_dim, 32) * 32);
        auto launch = [&](void (*kernel)(rf_kvq_pack_args, unsigned)) {
            return rf_launch_early(stream, "kvq_pack_keys", err, kernel, grid, threads, 0, *a, (unsigned)blocks);
        };
        RF_TRY(a->store.bits == 2   ? launch(pack_block_kernel<T, 2>)
               : a->store.bits == 4 ? launch(pack_block_kernel<T, 4>)
                                    : launch(pack_block_kernel<T, 8>));
    }
    const int lanes = rf_kv_row_lanes(a->store.head_dim);
    const int64_t tiles = rf_ceil_div(a->most, ROW_THREADS / lanes);
    auto *const kernel =
        is_wide(a->k, a->v, a->row_stride, a->head_stride) ? pack_rows_kernel<T, true> : pack_rows_kernel<T, false>;
    return rf_launch_early(stream, "kvq_pack", err, kernel, dim3((unsigned)(a->units * tiles), by_channel ? 1 : 2),
                           dim3(ROW_THREADS), 0, *a, lanes, (unsigned)tiles, by_channel ? 1 : 0);
}

extern "C" rf_status rf_kvq_pack_cuda(rf_stream *stream, const rf_kvq_pack_args *a, rf_error *err) {
    RF_TRY(rf_kvq_pack_check(a, err));
    RF_TRY(check_grid("kvq_pack", a->units, rf_ceil_div(a->most, ROW_THREADS / 32), err));
    if (!stream || a->units == 0 || a->most == 0) return RF_OK;
    const void *const needed[] = {a->k, a->v, a->from, a->first, a->counts};
    RF_TRY(rf_text_pointers("kvq_pack", needed, 5, err));
    RF_TRY(rf_kvq_store_pointers("kvq_pack", &a->store, err));
    return a->store.dtype == RF_DTYPE_F32 ? launch_pack<float>(stream, a, err) : launch_pack<rf_bf16>(stream, a, err);
}

/* --- unpack ---------------------------------------------------------------------------------------------------------------- */

/* Grid (units x blocks of tokens, planes): a thread per octet of channels of a token. */
template <int CODE>
static __global__ void __launch_bounds__(ROW_THREADS)
    unpack_kernel(const __grid_constant__ rf_kvq_unpack_args p, unsigned blocks, bool keys_by_channel) {
    const rf_kvq_store &s = p.store;
    const int64_t unit = blockIdx.x / blocks, block = blockIdx.x % blocks;
    const int dim = s.head_dim, octets = dim / 8;
    const bool is_value = blockIdx.y == 1, by_channel = keys_by_channel && !is_value;
    rf_wait_for_previous();
    const int num = (int)min(min((int64_t)p.lens[unit], p.most) - block * BLOCK, (int64_t)BLOCK);
    const rf_kvq_plane from = rf_kvq_plane_of(s, unit, is_value);
    for (int at = threadIdx.x; at < num * octets; at += ROW_THREADS) {
        const int i = at / octets, c = at % octets * 8;
        const int64_t token = block * BLOCK + i, to = (unit * p.out_stride + token) * dim + c;
        float x[8];
        if (by_channel) {
            if constexpr (is_int<CODE>) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const int64_t channel = block * dim + c + j;
                    const uint32_t byte = from.codes[channel * (4 * CODE) + i * CODE / 8];
                    const affine<CODE> map(from.scales[channel]);
                    x[j] = map((float)(byte >> (i * CODE % 8) & ((1u << CODE) - 1)));
                }
            }
        } else {
            octet<CODE> codes;
            codes.load(octet_at<CODE>(from, token, c, dim), true);
            const affine<CODE> map(from.scales[scale_at<CODE>(token, c, dim / max(s.group, 1), max(s.group / 8, 1))]);
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = map(codes.get(j));
        }
        if (from.factor) {
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= from.factor[c + j];
        }
        void *const out = is_value ? p.v_out : p.k_out;
        if (p.out_dtype == RF_DTYPE_F32)
            rf_kv_store8<true>((float *)out + to, 8, x);
        else
            rf_kv_store8<true>((rf_bf16 *)out + to, 8, x);
    }
}

extern "C" rf_status rf_kvq_unpack_cuda(rf_stream *stream, const rf_kvq_unpack_args *a, rf_error *err) {
    RF_TRY(rf_kvq_unpack_check(a, err));
    const int64_t blocks = rf_ceil_div(a->most, BLOCK);
    RF_TRY(check_grid("kvq_unpack", a->units, blocks, err));
    RF_TRY(rf_kvq_aligned("kvq_unpack", "k_out", a->k_out, err));
    RF_TRY(rf_kvq_aligned("kvq_unpack", "v_out", a->v_out, err));
    if (!stream || a->units == 0 || a->most == 0) return RF_OK;
    const void *const needed[] = {a->lens, a->k_out, a->v_out};
    RF_TRY(rf_text_pointers("kvq_unpack", needed, 3, err));
    RF_TRY(rf_kvq_store_pointers("kvq_unpack", &a->store, err));
    return with_code(a->store, [&](auto code) {
        return rf_launch_early(stream, "kvq_unpack", err, unpack_kernel<decltype(code)::value>,
                               dim3((unsigned)(a->units * blocks), 2), dim3(ROW_THREADS), 0, *a, (unsigned)blocks,
                               is_by_channel(a->store));
    });
}

/* --- attention ------------------------------------------------------------------------------------------------------------- */

/* A lane keeps the half of `in` that its bit `mask` says, and adds what the other lane has for it. */
template <int NUM, int HEADS>
static __device__ __forceinline__ void keep_half(const float (&in)[2 * NUM][HEADS], float (&out)[NUM][HEADS], int lane,
                                                 int mask) {
    const bool upper = lane & mask;
#pragma unroll
    for (int j = 0; j < NUM; j++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float keep = in[j][h], give = in[j + NUM][h];
            if (upper) { /* a select of values: of addresses it would put `in` into memory */
                const float t = keep;
                keep = give;
                give = t;
            }
            out[j][h] = keep + __shfl_xor_sync(RF_ALL_LANES, give, mask);
        }
}

/* Sums over the 8 lanes that differ in bits HIGH, HIGH / 2, HIGH / 4: of acc[j] the lane keeps j = its three bits. */
template <int HEADS, int HIGH>
static __device__ __forceinline__ void keep_one(const float (&acc)[8][HEADS], float (&out)[HEADS], int lane) {
    float four[4][HEADS], two[2][HEADS], one[1][HEADS];
    keep_half<4>(acc, four, lane, HIGH);
    keep_half<2>(four, two, lane, HIGH / 2);
    keep_half<1>(two, one, lane, HIGH / 4);
#pragma unroll
    for (int h = 0; h < HEADS; h++) out[h] = one[0][h];
}

template <int HEADS> static __device__ __forceinline__ void load_heads(const float *p, float (&v)[HEADS]) {
    if constexpr (HEADS == 2) {
        const float2 f = *reinterpret_cast<const float2 *>(p);
        v[0] = f.x, v[1] = f.y;
    } else {
#pragma unroll
        for (int h = 0; h < HEADS; h += 4) rf_load4(p + h, v + h);
    }
}

/* DIM 0: any head_dim. LOADS: octets that a lane loads together, as many as leave room for the sums. */
template <int CODE, bool BY_CHANNEL, int DIM, int HEADS> struct attention_shape {
    static constexpr int LANES = DIM == 64 ? 8 : DIM == 128 ? 16 : 32; /* of a row */
    static constexpr int WIDTH = LANES * 8, SUBS = 32 / LANES, CHUNK = 8 * SUBS /* tokens of 8 passes */;
    static constexpr int INT_LOADS = BY_CHANNEL || (DIM != 64 && HEADS < 8) ? 8 : 4;
    static constexpr int ROW_LOADS = CODE == ROWS_F32 || HEADS == 8 ? 2 : 4;
    static constexpr int LOADS = CODE == ROWS_F32 || CODE == ROWS_BF16 ? ROW_LOADS : INT_LOADS;
    static constexpr int MIN_BLOCKS = HEADS == 8 ? 2 : HEADS == 4 ? 3 : 4;
};

/* Grid (units x splits, head batches). */
template <int CODE, bool BY_CHANNEL, int DIM, int HEADS>
static __global__ void __launch_bounds__(ATTENTION_THREADS, attention_shape<CODE, BY_CHANNEL, DIM, HEADS>::MIN_BLOCKS)
    attention_kernel(const __grid_constant__ rf_kvq_attention_params p) {
    using Shape = attention_shape<CODE, BY_CHANNEL, DIM, HEADS>;
    constexpr int LANES = Shape::LANES, WIDTH = Shape::WIDTH, SUBS = Shape::SUBS, CHUNK = Shape::CHUNK,
                  LOADS = Shape::LOADS;
    __shared__ __align__(16) float queries[WIDTH][HEADS];
    __shared__ __align__(16) float probs[WARPS][BLOCK][HEADS];
    __shared__ __align__(16) float rows[WARPS][HEADS][WIDTH];
    __shared__ float tops[WARPS][HEADS], sums[WARPS][HEADS];

    const rf_kvq_store &s = p.a.store;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int dim = DIM ? DIM : s.head_dim, group = p.a.group_heads;
    const int groups = is_int<CODE> ? dim / s.group : 1, group_octets = is_int<CODE> ? s.group / 8 : 1;
    const int64_t unit = blockIdx.x / p.num_splits;
    const int split = blockIdx.x % p.num_splits, first_head = (int)blockIdx.y * HEADS;
    const int num_heads = min(HEADS, group - first_head);
    const int64_t first_row = unit * group + first_head;
    rf_wait_for_previous();
    const int len = max(min(p.a.lens[unit], (int)p.a.most), 0), blocks = (len + BLOCK - 1) / BLOCK;
    const int each = (blocks + p.num_splits - 1) / p.num_splits;
    const int begin = split * each, end = min(begin + each, blocks);
    const rf_kvq_plane keys = rf_kvq_plane_of(s, unit, false), values = rf_kvq_plane_of(s, unit, true);

    for (int at = threadIdx.x; at < WIDTH * HEADS; at += ATTENTION_THREADS) {
        const int c = at % WIDTH, h = at / WIDTH;
        float q = 0.0f;
        if (c < dim && h < num_heads) {
            const int64_t from = (first_row + h) * dim + c;
            q = s.dtype == RF_DTYPE_F32 ? ((const float *)p.a.q)[from] : rf_to_f32(((const rf_bf16 *)p.a.q)[from]);
            q *= p.a.scale;
            if (keys.factor) q *= keys.factor[c];
        }
        queries[c][h] = q;
    }
    __syncthreads(); /* the queries are there */

    const int ol = lane & (LANES - 1), sub = lane / LANES, c0 = ol * 8; /* of a row: this lane's octet */
    const bool has_octet = DIM != 0 || c0 < dim;
    [[maybe_unused]] float q[BY_CHANNEL ? 1 : 8][HEADS];
    if constexpr (!BY_CHANNEL) {
#pragma unroll
        for (int j = 0; j < 8; j++) load_heads<HEADS>(queries[c0 + j], q[j]);
    }
    float top[HEADS], sum[HEADS], out[HEADS][8];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        top[h] = -INFINITY, sum[h] = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) out[h][j] = 0.0f;
    }
    /* The token whose logits this lane ends up with. */
    const int mine = BY_CHANNEL ? (lane & 3) * 8 + (lane >> 2) : (ol >> 3) * CHUNK + (lane & 7) * SUBS + sub;

#pragma unroll 1
    for (int block = begin + warp; block < end; block += WARPS) {
        const int64_t first = (int64_t)block * BLOCK;
        const int num = min(len - (int)first, BLOCK);
        float logit[HEADS];
        if constexpr (BY_CHANNEL) {
            constexpr int BYTES = octet<CODE>::BYTES; /* of 8 tokens; lane & 3 says which, lane >> 2 the channel */
            float acc[8][HEADS] = {};
            const int64_t channel = block * (int64_t)dim + (lane >> 2);
            const uint8_t *const codes = keys.codes + channel * (4 * CODE) + (lane & 3) * BYTES;
#pragma unroll
            for (int r = 0; r < WIDTH / 64; r++) {
                octet<CODE> raw[8];
                uint32_t scales[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int c = (r * 8 + i) * 8;
                    const bool there = DIM != 0 || c < dim;
                    raw[i].load(codes + c * (4 * CODE), there);
                    scales[i] = there ? keys.scales[channel + c] : 0;
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const quick_affine<CODE> map(scales[i]);
                    float w[HEADS];
                    load_heads<HEADS>(queries[(r * 8 + i) * 8 + (lane >> 2)], w);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        const float x = map(raw[i].quick(j));
#pragma unroll
                        for (int h = 0; h < HEADS; h++) acc[j][h] = fmaf(w[h], x, acc[j][h]);
                    }
                }
            }
            keep_one<HEADS, 16>(acc, logit, lane);
        } else {
#pragma unroll 1
            for (int chunk = 0; chunk < BLOCK / CHUNK; chunk++) {
                float acc[8][HEADS], kept[HEADS];
#pragma unroll
                for (int part = 0; part < 8; part += LOADS) {
                    octet<CODE> raw[LOADS];
                    uint32_t scales[LOADS];
#pragma unroll
                    for (int i = 0; i < LOADS; i++) {
                        const int token = chunk * CHUNK + (part + i) * SUBS + sub;
                        const bool there = token < num && has_octet;
                        raw[i].load(octet_at<CODE>(keys, first + token, c0, dim), there);
                        scales[i] = there ? keys.scales[scale_at<CODE>(first + token, c0, groups, group_octets)] : 0;
                    }
#pragma unroll
                    for (int i = 0; i < LOADS; i++) {
                        const quick_affine<CODE> map(scales[i]);
#pragma unroll
                        for (int h = 0; h < HEADS; h++) acc[part + i][h] = 0.0f;
#pragma unroll
                        for (int j = 0; j < 8; j++) {
                            const float x = map(raw[i].quick(j));
#pragma unroll
                            for (int h = 0; h < HEADS; h++) acc[part + i][h] = fmaf(q[j][h], x, acc[part + i][h]);
                        }
                    }
                }
                keep_one<HEADS, 4>(acc, kept, lane);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
#pragma unroll
                    for (int mask = 8; mask < LANES; mask *= 2) kept[h] += __shfl_xor_sync(RF_ALL_LANES, kept[h], mask);
                    if (chunk == ol >> 3) logit[h] = kept[h];
                }
            }
        }

        const bool there = mine < num;
        if (p.a.logits && there) {
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h < num_heads) p.a.logits[(first_row + h) * p.a.logits_stride + first + mine] = logit[h];
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (!there) logit[h] = -INFINITY;
            const float most = rf_warp_max(logit[h]);
            if (most > top[h]) { /* alike in all lanes */
                const float shrink = rf_kvq_exp(top[h] - most);
                top[h] = most;
                sum[h] *= shrink;
#pragma unroll
                for (int j = 0; j < 8; j++) out[h][j] *= shrink;
            }
            logit[h] = there ? rf_kvq_exp(logit[h] - top[h]) : 0.0f;
            sum[h] += logit[h];
            probs[warp][mine][h] = logit[h];
        }
        __syncwarp(); /* the probabilities are there */

#pragma unroll 1
        for (int step = 0; step < BLOCK / SUBS; step += LOADS) {
            octet<CODE> raw[LOADS];
            uint32_t scales[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int token = (step + i) * SUBS + sub;
                const bool seen = token < num && has_octet;
                raw[i].load(octet_at<CODE>(values, first + token, c0, dim), seen);
                scales[i] = seen ? values.scales[scale_at<CODE>(first + token, c0, groups, group_octets)] : 0;
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const quick_affine<CODE> map(scales[i]);
                float w[HEADS];
                load_heads<HEADS>(probs[warp][(step + i) * SUBS + sub], w);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float x = map(raw[i].quick(j));
#pragma unroll
                    for (int h = 0; h < HEADS; h++) out[h][j] = fmaf(w[h], x, out[h][j]);
                }
            }
        }
        __syncwarp(); /* the probabilities have been read */
    }

    /* Join the lanes that hold the same octet, then the warps. */
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int mask = LANES; mask < 32; mask *= 2)
#pragma unroll
            for (int j = 0; j < 8; j++) out[h][j] += __shfl_xor_sync(RF_ALL_LANES, out[h][j], mask);
        sum[h] = rf_warp_sum(sum[h]);
        if (sub == 0) {
            rf_store4(&rows[warp][h][c0], out[h]);
            rf_store4(&rows[warp][h][c0 + 4], out[h] + 4);
        }
        if (lane == 0) tops[warp][h] = top[h], sums[warp][h] = sum[h];
    }
    __syncthreads(); /* the warps' parts are there */
    for (int h = 0; h < num_heads; h++) {
        float most = -INFINITY, total = 0.0f, weight[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, tops[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            weight[w] = tops[w][h] == -INFINITY ? 0.0f : rf_kvq_exp(tops[w][h] - most);
            total = fmaf(weight[w], sums[w][h], total);
        }
        const float inv = total > 0.0f ? 1.0f / total : 0.0f, lse = total > 0.0f ? most + logf(total) : -INFINITY;
        const int64_t row = first_row + h, part = row * p.num_splits + split;
        if (threadIdx.x == 0) {
            if (p.num_splits > 1)
                p.part_lse[part] = lse;
            else
                p.a.lse[row] = lse;
        }
        if (p.num_splits > 1 && begin >= end) continue; /* nobody reads the row */
        for (int c = threadIdx.x; c < dim; c += ATTENTION_THREADS) {
            float v = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) v = fmaf(weight[w], rows[w][h][c], v);
            v *= inv;
            if (values.factor) v *= values.factor[c];
            if (p.num_splits > 1)
                p.part_out[part * dim + c] = v;
            else if (s.dtype == RF_DTYPE_F32)
                ((float *)p.a.out)[row * dim + c] = v;
            else
                ((rf_bf16 *)p.a.out)[row * dim + c] = rf_from_f32<rf_bf16>(v);
        }
    }
}

/* Joins splits: a block per (unit, head), warp w the splits w, w + JOIN_WARPS, ..., all rows of a warp under way at once. CHUNKS: of 32
 * channels. */
template <int CHUNKS>
static __global__ void __launch_bounds__(JOIN_WARPS * 32)
    combine_kernel(const __grid_constant__ rf_kvq_attention_params p) {
    constexpr int ROUNDS = MAX_SPLITS / JOIN_WARPS;
    static_assert(MAX_SPLITS == 64 && 32 % JOIN_WARPS == 0, "two weights a lane");
    __shared__ float parts[JOIN_WARPS][CHUNKS * 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, dim = p.a.store.head_dim, splits = p.num_splits;
    const int64_t row = blockIdx.x;
    rf_wait_for_previous();
    const float *const lses = p.part_lse + row * splits;
    const float low = lane < splits ? lses[lane] : -INFINITY, high = lane + 32 < splits ? lses[lane + 32] : -INFINITY;
    const float top = rf_warp_max(fmaxf(low, high));
    const float w_low = low == -INFINITY ? 0.0f : rf_kvq_exp(low - top),
                w_high = high == -INFINITY ? 0.0f : rf_kvq_exp(high - top);
    const float sum = rf_warp_sum(w_low + w_high);
    float w[ROUNDS], v[ROUNDS][CHUNKS], o[CHUNKS] = {};
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        const int i = warp + r * JOIN_WARPS;
        w[r] = __shfl_sync(RF_ALL_LANES, r < ROUNDS / 2 ? w_low : w_high, i & 31);
        const float *const part = p.part_out + (row * splits + i) * dim;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) { /* an empty split has written no row */
            v[r][k] = 0.0f;
            if (w[r] != 0.0f && k * 32 + lane < dim) v[r][k] = part[k * 32 + lane];
        }
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) o[k] = fmaf(w[r], v[r][k], o[k]);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) parts[warp][k * 32 + lane] = o[k];
    __syncthreads(); /* the warps' parts are there */
    const float inv = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (threadIdx.x == 0) p.a.lse[row] = sum > 0.0f ? top + logf(sum) : -INFINITY;
    const int c = threadIdx.x;
    if (c >= dim) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < JOIN_WARPS; i++) total += parts[i][c];
    if (p.a.store.dtype == RF_DTYPE_F32)
        ((float *)p.a.out)[row * dim + c] = total * inv;
    else
        ((rf_bf16 *)p.a.out)[row * dim + c] = rf_from_f32<rf_bf16>(total * inv);
}

/* Heads that a block takes: what is read once for all of them. */
static int heads_of(const rf_kvq_attention_args *a) {
    if (rf_kvq_mma_takes(a)) return rf_kvq_mma_heads(a);
    if (a->store.head_dim != 64 && a->store.head_dim != 128) return 4;
    return a->group_heads <= 2 ? 2 : a->group_heads <= 4 ? 4 : 8;
}

/* Four blocks for every SM, none with less than a block of tokens for each warp. */
static int splits_of(const rf_backend *backend, const rf_kvq_attention_args *a) {
    const int64_t sms = rf_backend_num_sms(backend) > 0 ? rf_backend_num_sms(backend) : 132;
    const int64_t tasks = a->units * rf_ceil_div(a->group_heads, heads_of(a));
    const int64_t most = rf_ceil_div(rf_ceil_div(a->most, BLOCK), WARPS);
    int64_t splits = tasks > 0 ? rf_ceil_div(4 * sms, tasks) : 1;
    if (splits > most) splits = most;
    if (splits > MAX_SPLITS) splits = MAX_SPLITS;
    return splits < 1 ? 1 : (int)splits;
}

static size_t split_bytes(const rf_kvq_attention_args *a, int splits) {
    if (splits <= 1) return 0;
    return (size_t)a->units * (size_t)a->group_heads * (size_t)splits * ((size_t)a->store.head_dim + 1) * sizeof(float);
}

extern "C" size_t rf_kvq_attention_workspace_cuda(rf_backend *backend, const rf_kvq_attention_args *a) {
    return rf_kvq_attention_check(a, NULL) == RF_OK ? split_bytes(a, splits_of(backend, a)) : 0;
}

template <int CODE, bool BY_CHANNEL, int DIM, int HEADS>
static rf_status launch_attention(rf_stream *stream, const rf_kvq_attention_params &p, rf_error *err) {
    const dim3 grid((unsigned)(p.a.units * p.num_splits), (unsigned)rf_ceil_div(p.a.group_heads, HEADS));
    return rf_launch_early(stream, "kvq_attention", err, attention_kernel<CODE, BY_CHANNEL, DIM, HEADS>, grid,
                           dim3(ATTENTION_THREADS), 0, p);
}

template <int CODE, bool BY_CHANNEL>
static rf_status choose_attention(rf_stream *stream, const rf_kvq_attention_params &p, rf_error *err) {
    const int dim = p.a.store.head_dim, heads = heads_of(&p.a);
    if (dim == 64)
        return heads == 2   ? launch_attention<CODE, BY_CHANNEL, 64, 2>(stream, p, err)
               : heads == 4 ? launch_attention<CODE, BY_CHANNEL, 64, 4>(stream, p, err)
                            : launch_attention<CODE, BY_CHANNEL, 64, 8>(stream, p, err);
    if (dim == 128)
        return heads == 2   ? launch_attention<CODE, BY_CHANNEL, 128, 2>(stream, p, err)
               : heads == 4 ? launch_attention<CODE, BY_CHANNEL, 128, 4>(stream, p, err)
                            : launch_attention<CODE, BY_CHANNEL, 128, 8>(stream, p, err);
    return launch_attention<CODE, BY_CHANNEL, 0, 4>(stream, p, err);
}

extern "C" rf_status rf_kvq_attention_cuda(rf_stream *stream, const rf_kvq_attention_args *a, rf_error *err) {
    RF_TRY(rf_kvq_attention_check(a, err));
    RF_TRY(check_grid("kvq_attention", a->units, MAX_SPLITS, err));
    if (!stream || a->units == 0) return RF_OK;
    const void *const needed[] = {a->q, a->out, a->lse, a->lens};
    RF_TRY(rf_text_pointers("kvq_attention", needed, 4, err));
    if (a->most > 0) RF_TRY(rf_kvq_store_pointers("kvq_attention", &a->store, err));
    rf_kvq_attention_params p = {};
    p.a = *a;
    p.num_splits = splits_of(rf_stream_backend(stream), a);
    RF_TRY(rf_check_workspace("kvq_attention", a->workspace, a->workspace_bytes, split_bytes(a, p.num_splits), err));
    if (p.num_splits > 1) {
        RF_TRY(rf_kvq_aligned("kvq_attention", "workspace", a->workspace, err));
        p.part_out = (float *)a->workspace; /* first: its rows are stored in 16 bytes */
        p.part_lse = p.part_out + a->units * a->group_heads * p.num_splits * a->store.head_dim;
    }
    if (rf_kvq_mma_takes(a)) {
        RF_TRY(rf_kvq_mma_run(stream, &p, err));
    } else {
        RF_TRY(with_code(a->store, [&](auto code) {
            constexpr int CODE = decltype(code)::value;
            if constexpr (is_int<CODE>) {
                if (is_by_channel(a->store)) return choose_attention<CODE, true>(stream, p, err);
            }
            return choose_attention<CODE, false>(stream, p, err);
        }));
    }
    if (p.num_splits == 1) return RF_OK;
    const int dim = a->store.head_dim;
    return rf_launch_early(stream, "kvq_attention_combine", err,
                           dim <= 64    ? combine_kernel<2>
                           : dim <= 128 ? combine_kernel<4>
                                        : combine_kernel<8>,
                           dim3((unsigned)(a->units * a->group_heads)), dim3(JOIN_WARPS * 32), 0, p);
}

/* --- directions ------------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ float sum_over(float v, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(RF_ALL_LANES, v, step);
    return v;
}

/* Grid (units x tiles of tokens, planes): `lanes` lanes a pair of rows. Omega = 2 atan2(|u - w|, |u + w|), exact where u.w is near 1. */
template <class T, bool WIDE>
static __global__ void __launch_bounds__(ROW_THREADS)
    direction_kernel(const __grid_constant__ rf_kvq_direction_args p, int lanes, unsigned tiles) {
    const rf_kvq_store &s = p.store;
    const int lane = threadIdx.x & (lanes - 1), dim = s.head_dim, c = lane * 8;
    const int64_t unit = blockIdx.x / tiles;
    const int i = (int)(blockIdx.x % tiles) * (ROW_THREADS / lanes) + (int)threadIdx.x / lanes;
    const bool is_value = blockIdx.y == 1;
    rf_wait_for_previous();
    const bool active = i < min(p.counts[unit], (int)p.most);
    float a[8] = {}, b[8] = {};
    if (active && c < dim) {
        const int64_t row = p.from[unit * p.list_stride + i], at = row * p.row_stride + unit * p.head_stride + c;
        rf_kv_load8<WIDE>((const T *)(is_value ? p.v[0] : p.k[0]) + at, 8, a);
        rf_kv_load8<WIDE>((const T *)(is_value ? p.v[1] : p.k[1]) + at, 8, b);
    }
    float aa = 0.0f, bb = 0.0f, less = 0.0f, more = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        aa = fmaf(a[j], a[j], aa);
        bb = fmaf(b[j], b[j], bb);
    }
    const float length_a = sqrtf(sum_over(aa, lanes)), length_b = sqrtf(sum_over(bb, lanes));
    const float ia = length_a > 0.0f ? 1.0f / length_a : 0.0f, ib = length_b > 0.0f ? 1.0f / length_b : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        a[j] *= ia;
        b[j] *= ib;
        less = fmaf(a[j] - b[j], a[j] - b[j], less);
        more = fmaf(a[j] + b[j], a[j] + b[j], more);
    }
    less = sum_over(less, lanes);
    more = sum_over(more, lanes);
    if (!active) return;
    const bool both = length_a > 0.0f && length_b > 0.0f;
    const float omega = both ? 2.0f * atan2f(sqrtf(less), sqrtf(more)) : 0.0f, sine = sinf(omega);
    float of_a = 1.0f, of_b = 1.0f; /* one of the rows is zeros */
    if (both && sine >= 1e-4f) {
        of_a = sinf((1.0f - p.t) * omega) / sine;
        of_b = sinf(p.t * omega) / sine;
    } else if (both) {
        of_a = more > 0.0f ? 1.0f / sqrtf(more) : 1.0f;
        of_b = more > 0.0f ? of_a : 0.0f;
    }
    if (p.angle && lane == 0)
        p.angle[((is_value ? p.units : 0) + unit) * p.list_stride + i] = omega * 0.31830988618379067f;
    if (!s.k_codes) return;
    const int64_t token = p.first[unit] + (int64_t)i;
    const rf_kvq_plane to = rf_kvq_plane_of(s, unit, is_value);
    if (c < dim) {
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = fmaf(of_a, a[j], of_b * b[j]);
        rf_kv_store8<true>((T *)to.codes + token * dim + c, 8, a);
    }
    if (lane != 0) return;
    to.scales[token] = __float_as_uint(length_a);
    float *const later =
        (float *)((uint8_t *)(is_value ? p.later_v_scales : p.later_k_scales) + unit * s.scales_stride);
    later[token] = length_b;
}

extern "C" rf_status rf_kvq_direction_cuda(rf_stream *stream, const rf_kvq_direction_args *a, rf_error *err) {
    RF_TRY(rf_kvq_direction_check(a, err));
    const rf_kvq_store *const s = &a->store;
    const int lanes = rf_kv_row_lanes(s->head_dim);
    const int64_t tiles = rf_ceil_div(a->most, ROW_THREADS / lanes);
    RF_TRY(check_grid("kvq_direction", a->units, tiles, err));
    if (!stream || a->units == 0 || a->most == 0 || (!s->k_codes && !a->angle)) return RF_OK;
    const bool writes = s->k_codes != NULL;
    const void *const any = a->from;
    const void *const needed[] = {a->k[0],
                                  a->k[1],
                                  a->v[0],
                                  a->v[1],
                                  a->from,
                                  a->counts,
                                  writes ? (const void *)a->first : any,
                                  writes ? a->later_k_scales : any,
                                  writes ? a->later_v_scales : any};
    RF_TRY(rf_text_pointers("kvq_direction", needed, 9, err));
    if (writes) RF_TRY(rf_kvq_store_pointers("kvq_direction", s, err));
    const bool wide = is_wide(a->k[0], a->k[1], a->row_stride, a->head_stride) &&
                      is_wide(a->v[0], a->v[1], a->row_stride, a->head_stride);
    auto launch = [&](void (*kernel)(rf_kvq_direction_args, int, unsigned)) {
        return rf_launch_early(stream, "kvq_direction", err, kernel, dim3((unsigned)(a->units * tiles), 2),
                               dim3(ROW_THREADS), 0, *a, lanes, (unsigned)tiles);
    };
    if (s->dtype == RF_DTYPE_F32) return launch(wide ? direction_kernel<float, true> : direction_kernel<float, false>);
    return launch(wide ? direction_kernel<rf_bf16, true> : direction_kernel<rf_bf16, false>);
}
