/* kernels/temporal_attention.cu - the causal attention of one pixel over its frames (kernels/rope.h).
 * Maths    Online softmax over chunks of keys in base 2; q, k turned and all sums in f32; out rounded once.
 * Launch   a warp for a (sample, pixel, head), or a listed row and a head. A row of head_dim lies in LPR lanes of 16
 *          bytes, so that a load takes KPI = 32 / LPR keys; the 8 loads of keys and 8 of values of a chunk (32 keys of
 *          64 bf16) are all in flight before the first is used. Scores are summed over LPR lanes while they are spread:
 *          each lane is left with the score of one key.
 *          One new frame: its own key starts the sums (query and key turn by the same angle, so neither has to), the
 *          chunks are kept keys alone. Several: the warp keeps the turned keys of a chunk and its values in registers
 *          and walks its queries; a window of more than one chunk is read again for every query.
 * Cost     bandwidth bound: the visible keys and values once, 18.9 MB for 144 pixels, 16 heads of 64, 32 frames in
 *          bf16.
 * Plain    head_dim other than 64 and 128, pairs that fill no vector, unaligned bases: a warp for one query, a key
 *          after the other.
 * Arch     sm_80 and later.  Checked  tests/kernels/test_rope.c. */
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/checks.h"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/rope.cuh"

static constexpr int WARPS = 2, THREADS = WARPS * 32;
static constexpr int NV = 8; /* keys of a lane in a chunk */
static constexpr unsigned ALL = 0xffffffffu;

/* --- where things lie --------------------------------------------------------------------------------------------- */

/* A pixel and its state. Offsets are of rows of qkv and out. */
struct place {
    int64_t row;   /* of new frame 0 */
    int64_t state; /* state sample * tokens + pixel */
};

static __device__ __forceinline__ place find_place(const rf_temporal_attention_args &p, uint32_t at) {
    if (p.rows) return {(int64_t)at, (int64_t)p.rows[at]};
    const uint32_t tokens = (uint32_t)p.tokens, sample = at / tokens, pixel = at - sample * tokens;
    const int64_t state = p.sample_index ? p.sample_index[sample] : (int64_t)sample;
    return {(int64_t)sample * p.frames * p.tokens + pixel, state * p.tokens + pixel};
}

static __device__ __forceinline__ int count_kept(const rf_temporal_attention_args &p) {
    return p.kv ? max(0, min(p.window->num_kept, RF_MAX_WINDOW - (int)p.frames)) : 0;
}

/* --- fast kernel -------------------------------------------------------------------------------------------------- */

/* 16 bytes that this SM reads once, or zeros. Volatile: stays behind rf_wait_for_previous and in order. */
static __device__ __forceinline__ uint4 load_once(const void *p, bool active) {
    uint4 v;
    asm volatile("{\n\t.reg .pred a;\n\tsetp.ne.u32 a, %5, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\t"
                 "mov.b32 %3, 0;\n\t@a ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
                 : "l"(p), "r"((unsigned)active));
    return v;
}

static __device__ __forceinline__ void store16(void *p, const uint4 &v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

/* One step of a sum over lanes that also spreads the sums: of N values a lane keeps the half that its bit `mask` names.
 * */
template <int N, int SIZE> static __device__ __forceinline__ void halve(float (&s)[SIZE], int lane, int mask) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float give = upper ? s[i] : s[i + N / 2], keep = upper ? s[i + N / 2] : s[i];
        s[i] = keep + __shfl_xor_sync(ALL, give, mask);
    }
}

/* A lane's dims of a row at a position; positions past the window's end, of keys that do not count, stay in the table.
 * */
template <int N>
static __device__ __forceinline__ void turn_at(float (&x)[N], const float *table, int table_row, int pos) {
    float t[N];
    rf_load_angles(table + min(pos, RF_MAX_WINDOW - 1) * table_row, t);
    rf_turn(x, t);
}
template <int N> static __device__ __forceinline__ float dot(const float (&a)[N], const float (&b)[N]) {
    float s = a[0] * b[0];
#pragma unroll
    for (int e = 1; e < N; e++) s = fmaf(a[e], b[e], s);
    return s;
}

/* N neighbouring dims of out. */
template <int N> static __device__ __forceinline__ void store_dims(float *p, const float *v) {
    if constexpr (N == 2)
        *reinterpret_cast<float2 *>(p) = make_float2(v[0], v[1]);
    else
        rf_store4(p, v);
}
template <int N> static __device__ __forceinline__ void store_dims(rf_bf16 *p, const float *v) {
    if constexpr (N == 2)
        *reinterpret_cast<uint32_t *>(p) = rf_pack_bf16(v[0], v[1]);
    else
        rf_store4(p, v);
}

/* How a warp holds rows of HD elements. Lane: row sub of a load, dims part * VEC .. of it. Key i of a lane in the chunk
 * that
 * begins at `first` is key first + sub * NV + i. */
template <class T, int HD> struct shape {
    static constexpr int VEC = RF_VEC16<T>;    /* elements of a lane */
    static constexpr int LPR = HD / VEC;       /* lanes of a row: 8, 16, 32 */
    static constexpr int KPI = 32 / LPR;       /* rows of a load: 4, 2, 1 */
    static constexpr int CHUNK = NV * KPI;     /* keys of a chunk: 32, 16, 8 */
    static constexpr int COPIES = LPR / NV;    /* lanes that are left with the same score: 1, 2, 4 */
    static constexpr int OUT_DIMS = VEC / KPI; /* dims of out that a lane writes: 2, 4 */
};

/* Slots of this lane's keys of a chunk; entries past the window's end are 0. */
static __device__ __forceinline__ void load_slots(int (&slot)[NV], const int32_t *slots, int key) {
#pragma unroll
    for (int i = 0; i < NV; i += 2) {
        int2 pair = make_int2(0, 0);
        if (key + i + 1 < RF_MAX_WINDOW) pair = *reinterpret_cast<const int2 *>(slots + key + i);
        slot[i] = pair.x, slot[i + 1] = pair.y;
    }
}

/* The state of a query's softmax: top and sum alike in all lanes, acc this lane's dims over its keys. */
template <int VEC> struct softmax_state { float top, sum, acc[VEC]; };

/* Takes in a chunk: s are this lane's parts of the scores of its keys; keys from `visible` on do not count. */
template <class T, int HD>
static __device__ __forceinline__ void fold_chunk(softmax_state<shape<T, HD>::VEC> &state, float (&s)[NV],
                                                  const uint4 (&v)[NV], int first, int visible, int lane,
                                                  float scale_log2) {
    using S = shape<T, HD>;
    const int sub = lane / S::LPR, part = lane % S::LPR;
    halve<8>(s, lane, S::LPR / 2);
    halve<4>(s, lane, S::LPR / 4);
    halve<2>(s, lane, S::LPR / 8);
#pragma unroll
    for (int mask = S::COPIES / 2; mask > 0; mask >>= 1) s[0] += __shfl_xor_sync(ALL, s[0], mask);

    /* This lane is left with its row's key part / COPIES. */
    const bool seen = first + sub * NV + part / S::COPIES < visible;
    const float score = seen ? s[0] * scale_log2 : -INFINITY;
    float next = score;
#pragma unroll
    for (int mask = 16; mask >= S::COPIES; mask >>= 1) next = fmaxf(next, __shfl_xor_sync(ALL, next, mask));
    next = fmaxf(next, state.top); /* finite: a query sees its own key, or the chunk's first */
    const float weight = exp2f(score - next), shrink = exp2f(state.top - next);
    float total = weight;
#pragma unroll
    for (int mask = 16; mask >= S::COPIES; mask >>= 1) total += __shfl_xor_sync(ALL, total, mask);
    state.top = next;
    state.sum = fmaf(state.sum, shrink, total);
#pragma unroll
    for (int e = 0; e < S::VEC; e++) state.acc[e] *= shrink;
#pragma unroll
    for (int i = 0; i < NV; i++) {
        const float w = __shfl_sync(ALL, weight, sub * S::LPR + i * S::COPIES);
        float x[S::VEC];
        rf_unpack16(v[i], x);
#pragma unroll
        for (int e = 0; e < S::VEC; e++) state.acc[e] = fmaf(w, x[e], state.acc[e]);
    }
}

/* out row, which begins at `out`: sums over the rows of a load; sub names the dims that a lane is left with. */
template <class T, int HD>
static __device__ __forceinline__ void write_out(T *out, softmax_state<shape<T, HD>::VEC> &state, int lane) {
    using S = shape<T, HD>;
    if constexpr (S::KPI == 4) {
        halve<S::VEC>(state.acc, lane, 16);
        halve<S::VEC / 2>(state.acc, lane, 8);
    } else if constexpr (S::KPI == 2) {
        halve<S::VEC>(state.acc, lane, 16);
    }
    const float inv = 1.0f / state.sum;
    float y[S::OUT_DIMS];
#pragma unroll
    for (int e = 0; e < S::OUT_DIMS; e++) y[e] = state.acc[e] * inv;
    store_dims<S::OUT_DIMS>(out + lane % S::LPR * S::VEC + lane / S::LPR * S::OUT_DIMS, y);
}

/* One new frame. */
template <class T, int HD>
static __global__ void __launch_bounds__(THREADS, HD == 64 ? 8 : 6)
    temporal_one_kernel(const __grid_constant__ rf_temporal_attention_args p, const float scale_log2) {
    using S = shape<T, HD>;
    constexpr int VEC = S::VEC;
    const int lane = threadIdx.x & 31, sub = lane / S::LPR, part = lane % S::LPR;
    const uint32_t num_heads = (uint32_t)p.num_heads, head = blockIdx.y * WARPS + (threadIdx.x >> 5);
    if (head >= num_heads) return; /* a whole warp */
    rf_wait_for_previous();

    const place here = find_place(p, blockIdx.x);
    const int kept = count_kept(p);
    const int64_t width = (int64_t)num_heads * HD;
    const T *const q_row = (const T *)p.qkv + here.row * 3 * width + head * HD + part * VEC;
    T *const keys = (T *)p.kv + (here.state * num_heads + head) * 2 * p.slots * HD + part * VEC;
    T *const values = keys + p.slots * HD;
    const bool turned = part * VEC < 2 * p.num_pairs;
    const float *const table = p.table + part * VEC;
    const int table_row = 2 * p.num_pairs;

    uint4 k[NV], v[NV];
    auto load_chunk = [&](int first) {
        const int key = first + sub * NV;
        int slot[NV];
        load_slots(slot, p.window->slots, key);
#pragma unroll
        for (int i = 0; i < NV; i++) k[i] = load_once(keys + (int64_t)slot[i] * HD, key + i < kept);
#pragma unroll
        for (int i = 0; i < NV; i++) v[i] = load_once(values + (int64_t)slot[i] * HD, key + i < kept);
    };
    load_chunk(0);
    const uint4 q_packed = load_once(q_row, true), k_new = load_once(q_row + width, true),
                v_new = load_once(q_row + 2 * width, true);
    __syncwarp(); /* keeps the assembler from putting the work on q in front of the loads of the chunk */

    float q[VEC], s_new;
    softmax_state<VEC> state;
    {
        float x[VEC];
        rf_unpack16(q_packed, q);
        rf_unpack16(k_new, x);
        s_new = dot(q, x);
#pragma unroll
        for (int mask = S::LPR / 2; mask > 0; mask >>= 1) s_new += __shfl_xor_sync(ALL, s_new, mask);
        rf_unpack16(v_new, x);
#pragma unroll
        for (int e = 0; e < VEC; e++) state.acc[e] = sub == 0 ? x[e] : 0.0f;
        state.top = s_new * scale_log2;
        state.sum = 1.0f;
        if (turned) turn_at(q, table, table_row, kept);
    }
    if (p.store && sub == 0) { /* a slot that is not read */
        const int64_t slot = p.window->slots[kept];
        store16(keys + slot * HD, k_new);
        store16(values + slot * HD, v_new);
    }
#pragma unroll 1
    for (int first = 0;;) {
        float s[NV];
        if (turned) {
#pragma unroll
            for (int i = 0; i < NV; i++) {
                float x[VEC];
                rf_unpack16(k[i], x);
                turn_at(x, table, table_row, first + sub * NV + i);
                s[i] = dot(q, x);
            }
        } else {
#pragma unroll
            for (int i = 0; i < NV; i++) {
                float x[VEC];
                rf_unpack16(k[i], x);
                s[i] = dot(q, x);
            }
        }
        fold_chunk<T, HD>(state, s, v, first, kept, lane, scale_log2);
        first += S::CHUNK;
        if (first >= kept) break;
        load_chunk(first);
    }
    write_out<T, HD>((T *)p.out + here.row * width + head * HD, state, lane);
}

/* Several new frames. */
template <class T, int HD>
static __global__ void __launch_bounds__(THREADS, 6)
    temporal_many_kernel(const __grid_constant__ rf_temporal_attention_args p, const float scale_log2) {
    using S = shape<T, HD>;
    constexpr int VEC = S::VEC;
    const int lane = threadIdx.x & 31, sub = lane / S::LPR, part = lane % S::LPR;
    const uint32_t num_heads = (uint32_t)p.num_heads, head = blockIdx.y * WARPS + (threadIdx.x >> 5);
    if (head >= num_heads) return; /* a whole warp */
    rf_wait_for_previous();

    const place here = find_place(p, blockIdx.x);
    const int frames = (int)p.frames, kept = count_kept(p), all = kept + frames;
    const int64_t width = (int64_t)num_heads * HD, step = p.tokens * 3 * width; /* from frame to frame of qkv */
    const T *const q_row = (const T *)p.qkv + here.row * 3 * width + head * HD + part * VEC;
    T *const keys = (T *)p.kv + (here.state * num_heads + head) * 2 * p.slots * HD + part * VEC;
    const int64_t kept_value = p.slots * HD; /* from a key to its value; width in qkv */
    const bool turned = part * VEC < 2 * p.num_pairs;
    const float *const table = p.table + part * VEC;
    const int table_row = 2 * p.num_pairs;

    if (p.store) { /* slots that are not read */
#pragma unroll 1
        for (int f = sub; f < frames; f += S::KPI) {
            const T *const from = q_row + width + f * step;
            T *const to = keys + (int64_t)p.window->slots[kept + f] * HD;
            const uint4 key = load_once(from, true), value = load_once(from + width, true);
            store16(to, key);
            store16(to + kept_value, value);
        }
    }

    float k[NV][VEC]; /* turned */
    uint4 v[NV];
    auto load_chunk = [&](int first) {
        const int key = first + sub * NV;
        int slot[NV];
        load_slots(slot, p.window->slots, key);
        auto row = [&](int i) {
            return key + i < kept ? keys + (int64_t)slot[i] * HD : q_row + width + (key + i - kept) * step;
        };
#pragma unroll
        for (int half = 0; half < NV; half += NV / 2) { /* all at once would not fit the registers */
            uint4 packed[NV / 2];
#pragma unroll
            for (int i = 0; i < NV / 2; i++) packed[i] = load_once(row(half + i), key + half + i < all);
#pragma unroll
            for (int i = 0; i < NV / 2; i++) rf_unpack16(packed[i], k[half + i]);
            if (turned) {
#pragma unroll
                for (int i = 0; i < NV / 2; i++) turn_at(k[half + i], table, table_row, key + half + i);
            }
        }
#pragma unroll
        for (int i = 0; i < NV; i++) v[i] = load_once(row(i) + (key + i < kept ? kept_value : width), key + i < all);
    };

    uint4 q_next = load_once(q_row, true);
    int loaded = -1;
#pragma unroll 1
    for (int f = 0; f < frames; f++) {
        const int visible = kept + f + 1;
        float q[VEC];
        rf_unpack16(q_next, q);
        if (turned) turn_at(q, table, table_row, visible - 1);
        if (f + 1 < frames) q_next = load_once(q_row + (f + 1) * step, true);
        softmax_state<VEC> state;
        state.top = -INFINITY;
        state.sum = 0.0f;
#pragma unroll
        for (int e = 0; e < VEC; e++) state.acc[e] = 0.0f;
#pragma unroll 1
        for (int first = 0; first < visible; first += S::CHUNK) {
            if (loaded != first) load_chunk(first);
            loaded = first;
            float s[NV];
#pragma unroll
            for (int i = 0; i < NV; i++) s[i] = dot(q, k[i]);
            fold_chunk<T, HD>(state, s, v, first, visible, lane, scale_log2);
        }
        write_out<T, HD>((T *)p.out + (here.row + f * p.tokens) * width + head * HD, state, lane);
    }
}

/* --- plain kernel ------------------------------------------------------------------------------------------------- */

static constexpr int LANE_PAIRS = 2; /* pairs of a lane: head_dim up to 128 */

/* A warp for a row of qkv and a head; lane l has pairs l and l + 32. */
template <class T>
static __global__ void __launch_bounds__(THREADS)
    temporal_plain_kernel(const __grid_constant__ rf_temporal_attention_args p, const uint32_t num_rows,
                          const float scale_log2) {
    const int lane = threadIdx.x & 31, d = p.head_dim;
    const uint32_t num_heads = (uint32_t)p.num_heads, task = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const uint32_t row = task / num_heads, head = task - row * num_heads;
    if (row >= num_rows) return; /* a whole warp */
    rf_wait_for_previous();

    const uint32_t tokens = (uint32_t)p.tokens, frames = (uint32_t)p.frames;
    const int kept = count_kept(p), frame = p.rows ? 0 : (int)(row / tokens % frames);
    const place here = find_place(p, p.rows ? row : row / (tokens * frames) * tokens + row % tokens);
    const int64_t width = (int64_t)num_heads * d, step = p.tokens * 3 * width;
    const T *const q_row = (const T *)p.qkv + here.row * 3 * width + (int64_t)head * d;
    T *const kv = (T *)p.kv + (here.state * num_heads + head) * 2 * p.slots * d;

    auto load_pair = [&](const T *x, int i, float &a, float &b) {
        a = rf_to_f32(x[2 * i]), b = rf_to_f32(x[2 * i + 1]);
    };
    auto turn = [&](int pos, int i, float &a, float &b) {
        if (i >= p.num_pairs) return;
        const float *const t = p.table + ((int64_t)pos * p.num_pairs + i) * 2;
        rf_turn_pair(a, b, t[0], t[1]);
    };

    float q[LANE_PAIRS][2] = {}, acc[LANE_PAIRS][2] = {}, top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int u = 0; u < LANE_PAIRS; u++) {
        const int i = lane + 32 * u;
        if (2 * i < d) {
            load_pair(q_row + frame * step, i, q[u][0], q[u][1]);
            turn(kept + frame, i, q[u][0], q[u][1]);
        }
    }
    for (int j = 0; j <= kept + frame; j++) {
        const T *const key = j < kept ? kv + (int64_t)p.window->slots[j] * d : q_row + width + (j - kept) * step;
        const T *const value = key + (j < kept ? p.slots * d : width);
        float s = 0.0f, x[LANE_PAIRS][2] = {};
#pragma unroll
        for (int u = 0; u < LANE_PAIRS; u++) {
            const int i = lane + 32 * u;
            if (2 * i < d) {
                float a, b;
                load_pair(key, i, a, b);
                turn(j, i, a, b);
                s = fmaf(q[u][0], a, fmaf(q[u][1], b, s));
                load_pair(value, i, x[u][0], x[u][1]);
            }
        }
        s = rf_warp_sum(s) * scale_log2;
        const float next = fmaxf(top, s), shrink = exp2f(top - next), w = exp2f(s - next);
        sum = sum * shrink + w;
#pragma unroll
        for (int u = 0; u < LANE_PAIRS; u++)
#pragma unroll
            for (int e = 0; e < 2; e++) acc[u][e] = fmaf(w, x[u][e], acc[u][e] * shrink);
        top = next;
    }
    const float inv = 1.0f / sum;
    T *const out = (T *)p.out + (here.row + frame * p.tokens) * width + (int64_t)head * d;
#pragma unroll
    for (int u = 0; u < LANE_PAIRS; u++) {
        const int i = lane + 32 * u;
        if (2 * i < d) {
            out[2 * i] = rf_from_f32<T>(acc[u][0] * inv);
            out[2 * i + 1] = rf_from_f32<T>(acc[u][1] * inv);
        }
    }
    if (p.store) {
        const T *const key = q_row + width + frame * step;
        T *const to = kv + (int64_t)p.window->slots[kept + frame] * d;
        for (int e = lane; e < d; e += 32) {
            to[e] = key[e];
            to[p.slots * d + e] = key[width + e];
        }
    }
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

template <class T> static rf_status launch(rf_stream *stream, const rf_temporal_attention_args *args, rf_error *err) {
    const int64_t places = args->rows ? args->num_rows : args->samples * args->tokens, heads = args->num_heads;
    const int64_t rows = args->rows ? args->num_rows : places * args->frames;
    const float scale_log2 = 1.4426950408889634f / sqrtf((float)args->head_dim);
    const bool vectors = (2 * args->num_pairs) % RF_VEC16<T> == 0 && rf_is_aligned(args->qkv, 16) &&
                         rf_is_aligned(args->out, 16) && rf_is_aligned(args->kv, 16) &&
                         rf_is_aligned(args->table, 16) && rf_is_aligned(args->window, 8);
    if (!vectors || (args->head_dim != 64 && args->head_dim != 128))
        return rf_launch_early(stream, "temporal_attention_plain", err, temporal_plain_kernel<T>,
                               dim3((unsigned)rf_ceil_div(rows * heads, WARPS)), dim3(THREADS), 0, *args,
                               (uint32_t)rows, scale_log2);
    auto kernel = args->head_dim == 64 ? temporal_one_kernel<T, 64> : temporal_one_kernel<T, 128>;
    if (args->frames > 1) kernel = args->head_dim == 64 ? temporal_many_kernel<T, 64> : temporal_many_kernel<T, 128>;
    return rf_launch_early(stream, "temporal_attention", err, kernel,
                           dim3((unsigned)places, (unsigned)rf_ceil_div(heads, WARPS)), dim3(THREADS), 0, *args,
                           scale_log2);
}

extern "C" rf_status rf_temporal_attention_cuda(rf_stream *stream, const rf_temporal_attention_args *args,
                                                rf_error *err) {
    rf_status status = stream ? rf_temporal_attention_check_run(args, err) : rf_temporal_attention_check(args, err);
    if (status != RF_OK) return status;
    if (args->head_dim % 8 != 0 || args->head_dim > 64 * LANE_PAIRS)
        return rf_fail(err, RF_ERR_SHAPE,
                       "temporal_attention: head_dim is %d, must be a multiple of 8 up to %d on CUDA", args->head_dim,
                       64 * LANE_PAIRS);
    const int64_t rows = args->rows ? args->num_rows : args->samples * args->frames * args->tokens;
    if (rows > INT32_MAX / args->num_heads)
        return rf_fail(err, RF_ERR_SHAPE, "temporal_attention: %lld rows of %d heads are too many", (long long)rows,
                       args->num_heads);
    if (!stream || rows == 0) return RF_OK;
    if (args->dtype == RF_DTYPE_F32) return launch<float>(stream, args, err);
    return launch<rf_bf16>(stream, args, err);
}
