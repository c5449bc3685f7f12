/* kernels/attention_small.cu - attention over at most 256 keys, all of them in shared memory, with rotary positions.
 * Maths    s = c q k^T, c = scale log2 e; p = 2^(s - max s) over a warp's keys at once, without rescaling; out = (sum p
 *          v) / sum p; lse = (max + log2 sum p) ln 2. q and k are turned in f32 and rounded to bf16 on their way into
 *          shared memory, as the rope operator would leave them: the bits are those of rope and then this kernel
 *          without it.
 * Shapes   bf16, head_dim 64 or 128, strides multiples of 8, 16-byte aligned bases; keys 0..kv_len-1, no mask or list.
 * Launch   grid (tiles of 16 RG query rows, query heads, batch); warp (rg, kg) multiplies 16 rows with key tiles kg, kg
 *          + KG, ... of 16. KG > 1: the sets of keys are joined through shared memory.
 * Shared   rows of 128 or 256 bytes: 16-byte chunk c of row r lies at chunk c ^ (r & 7). q, k, v, in this order; the
 *          joining takes the place of k and v.
 * Cost     q, k, v and the table from L2: 72 KB a block for 144 keys of 64; few query tiles a head keep that low.
 * Arch     sm_80 and later.  Checked  tests/kernels/test_rope.c. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/attention_cuda.cuh"
#include "kernels/launch.cuh"
#include "kernels/rope.cuh"

static constexpr int MAX_KEYS = 256;
static constexpr int BATCH = 4; /* rows of keys that a thread has in flight */

struct small_params {
    const rf_bf16 *q, *k, *v;
    rf_bf16 *out;
    float *lse;
    int64_t q_batch_stride, q_row_stride, q_head_stride;
    int64_t kv_batch_stride, kv_row_stride, kv_head_stride;
    int64_t out_batch_stride, out_row_stride, out_head_stride;
    const float *rope; /* NULL: none */
    int32_t rope_pairs, q_pos_offset;
    int32_t q_len, kv_len, group; /* group: query heads of a key head */
    float scale_log2;
};

/* --- instructions ------------------------------------------------------------------------------------------------- */

/* Four 8x8 matrices of bf16; lane 8 i + r gives the address of row r of matrix i and receives elements
 * (row lane / 4, columns 2 (lane % 4), + 1) of each. Trans: (rows 2 (lane % 4), + 1, column lane / 4). */
static __device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}
static __device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr));
}
/* d += a b, a 16x16, b 16x8. g = lane / 4, t = lane % 4. d: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
 * a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..).  b: (2t.., g), (2t+8.., g). */
static __device__ __forceinline__ void mma16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void copy_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Eight neighbours, turned. */
static __device__ __forceinline__ uint4 turn_vector(const uint4 &x, const float (&t)[8]) {
    float f[8];
    rf_unpack16(x, f);
    rf_turn(f, t);
    return rf_pack16(f);
}

/* --- kernel ------------------------------------------------------------------------------------------------------- */

/* NT: key tiles of a warp. */
template <int HD, int RG, int KG, int NT> struct small_shape {
    static constexpr int THREADS = 32 * RG * KG, ROWS = 16 * RG;
    static constexpr int KEYS = NT * KG * 16 < MAX_KEYS ? NT * KG * 16 : MAX_KEYS; /* at most */
    static constexpr int LD = HD * 2, CHUNKS = HD / 8;
    static constexpr int PASS_ROWS = THREADS / CHUNKS; /* rows that the threads bring at once */
    static constexpr int Q_BYTES = ROWS * LD;
    static constexpr int OUT_LD =
        HD + 8; /* floats; 32 (mod 128) bytes: rows g and g + 1 of a store meet no bank twice */
    static constexpr int JOIN_BYTES = KG > 1 ? KG *ROWS *(OUT_LD + 2) * 4 : 0;
    static_assert(THREADS % CHUNKS == 0, "a thread keeps its chunk");

    static constexpr int shared_bytes(int kv_len) {
        const int kv_bytes = 2 * ((kv_len + 15) / 16 * 16) * LD;
        return Q_BYTES + (kv_bytes > JOIN_BYTES ? kv_bytes : JOIN_BYTES);
    }
};

template <int HD, int RG, int KG, int NT, int MIN_BLOCKS>
static __global__ void __launch_bounds__(32 * RG * KG, MIN_BLOCKS)
    attention_small_kernel(const __grid_constant__ small_params p) {
    using Shape = small_shape<HD, RG, KG, NT>;
    constexpr int LD = Shape::LD, K_STEPS = HD / 16, N_TILES = HD / 8, ROWS = Shape::ROWS;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, rg = warp % RG, kg = warp / RG;
    const int first_row = blockIdx.x * ROWS, head = blockIdx.y;
    const int tiles = (p.kv_len + 15) / 16, key_rows = tiles * 16;

    /* --- rows of q and k, turned, and of v into shared memory; rows past the end are zeros --- */
    constexpr int PASS_ROWS = Shape::PASS_ROWS, NQ = (ROWS + PASS_ROWS - 1) / PASS_ROWS;
    const int chunk = threadIdx.x % Shape::CHUNKS, pass_row = threadIdx.x / Shape::CHUNKS;
    const rf_bf16 *const q =
        p.q + blockIdx.z * p.q_batch_stride + head * p.q_head_stride + first_row * p.q_row_stride + chunk * 8;
    const int64_t kv_offset = blockIdx.z * p.kv_batch_stride + head / p.group * p.kv_head_stride + chunk * 8;
    const rf_bf16 *const k = p.k + kv_offset, *const v = p.v + kv_offset;
    const uint32_t q_shared = (uint32_t)__cvta_generic_to_shared(shared), k_shared = q_shared + Shape::Q_BYTES,
                   v_shared = k_shared + key_rows * LD;
    auto place = [&](int row) { return row * LD + ((chunk ^ (row & 7)) * 16); };
    const bool turned = p.rope && chunk * 4 < p.rope_pairs;
    const float *const angles = p.rope + chunk * 8;
    const int angles_row = p.rope_pairs * 2, q_left = p.q_len - first_row; /* rows of q from this tile on */
    rf_wait_for_previous();

    auto load_k = [&](int first, uint4(&x)[BATCH]) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int row = first + i * PASS_ROWS;
            x[i] = make_uint4(0, 0, 0, 0);
            if (row < p.kv_len) x[i] = *reinterpret_cast<const uint4 *>(k + row * p.kv_row_stride);
        }
    };
    auto load_k_angles = [&](int first,
                             float(&t)[BATCH][8]) { /* zeros may turn by anything */
#pragma unroll
                                                    for (int i = 0; i < BATCH; i++)
                                                        rf_load_angles(angles + (int64_t)min(first + i * PASS_ROWS,
                                                                                             max(p.kv_len - 1, 0)) *
                                                                                    angles_row,
                                                                       t[i]);
    };
    auto store_k = [&](int first, uint4(&x)[BATCH], float(&t)[BATCH][8]) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int row = first + i * PASS_ROWS;
            if (turned) x[i] = turn_vector(x[i], t[i]);
            if (row < key_rows) *reinterpret_cast<uint4 *>(shared + Shape::Q_BYTES + place(row)) = x[i];
        }
    };

    uint4 x[BATCH], x_q[NQ];
    float t[BATCH][8], t_q[NQ][8];
#pragma unroll
    for (int i = 0; i < NQ; i++) {
        const int row = pass_row + i * PASS_ROWS;
        x_q[i] = make_uint4(0, 0, 0, 0);
        if (row < min(ROWS, q_left)) x_q[i] = *reinterpret_cast<const uint4 *>(q + row * p.q_row_stride);
    }
    load_k(pass_row, x);
#pragma unroll 1
    for (int first = pass_row; first < key_rows; first += BATCH * PASS_ROWS) { /* behind what others wait for */
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int row = first + i * PASS_ROWS;
            const bool valid = row < p.kv_len;
            if (row < key_rows) copy16(v_shared + place(row), valid ? v + row * p.kv_row_stride : p.v, valid ? 16 : 0);
        }
    }
    if (turned) {
#pragma unroll
        for (int i = 0; i < NQ; i++)
            rf_load_angles(angles + (int64_t)(first_row + min(pass_row + i * PASS_ROWS, q_left - 1) + p.q_pos_offset) *
                                        angles_row,
                           t_q[i]);
        load_k_angles(pass_row, t);
    }
#pragma unroll
    for (int i = 0; i < NQ; i++) {
        const int row = pass_row + i * PASS_ROWS;
        if (turned) x_q[i] = turn_vector(x_q[i], t_q[i]);
        if (row < ROWS) *reinterpret_cast<uint4 *>(shared + place(row)) = x_q[i];
    }
    store_k(pass_row, x, t);
#pragma unroll 1
    for (int first = pass_row + BATCH * PASS_ROWS; first < key_rows; first += BATCH * PASS_ROWS) {
        load_k(first, x);
        if (turned) load_k_angles(first, t);
        store_k(first, x, t);
    }
    copy_wait_all();
    __syncthreads();

    /* --- scores --- */
    const int mat = lane >> 3, mat_row = lane & 7;
    auto lane_chunk = [&](int row, int c) { return (uint32_t)(row * LD + ((c ^ (row & 7)) * 16)); };
    const uint32_t k_lane = lane_chunk((mat >> 1) * 8 + mat_row, mat & 1);
    const uint32_t v_lane = lane_chunk((mat & 1) * 8 + mat_row, mat >> 1); /* also of q */
    uint32_t qf[K_STEPS][4];
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) ldmatrix4(qf[step], (q_shared + rg * 16 * LD + v_lane) ^ (step * 32));

    float s[NT][2][4];
#pragma unroll
    for (int i = 0; i < NT; i++) {
        const int tile = kg + i * KG;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][n][e] = tile < tiles ? 0.0f : -INFINITY;
        if (tile < tiles) {
            const uint32_t addr = k_shared + tile * 16 * LD + k_lane;
#pragma unroll
            for (int step = 0; step < K_STEPS; step++) {
                uint32_t b[4]; /* keys 0..7: b0, b1; keys 8..15: b2, b3 */
                ldmatrix4(b, addr ^ (step * 32));
                mma16(s[i][0], qf[step], b[0], b[1]);
                mma16(s[i][1], qf[step], b[2], b[3]);
            }
            if (tile == tiles - 1) { /* rows of the last tile past the end */
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int key = tile * 16 + n * 8 + (lane & 3) * 2;
                    if (key >= p.kv_len) s[i][n][0] = s[i][n][2] = -INFINITY;
                    if (key + 1 >= p.kv_len) s[i][n][1] = s[i][n][3] = -INFINITY;
                }
            }
        }
    }

    /* --- softmax over the warp's keys: rows lane / 4 and lane / 4 + 8, four lanes each --- */
    float top[2] = {-INFINITY, -INFINITY}, base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            top[0] = fmaxf(top[0], fmaxf(s[i][n][0], s[i][n][1]));
            top[1] = fmaxf(top[1], fmaxf(s[i][n][2], s[i][n][3]));
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2));
        top[h] *= p.scale_log2;
        base[h] = top[h] == -INFINITY ? 0.0f : top[h]; /* a warp without keys */
    }

    /* --- p v --- */
    float o[N_TILES][4];
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < NT; i++) {
        const int tile = kg + i * KG;
        if (tile < tiles) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                s[i][n][0] = exp2_approx(fmaf(s[i][n][0], p.scale_log2, -base[0]));
                s[i][n][1] = exp2_approx(fmaf(s[i][n][1], p.scale_log2, -base[0]));
                s[i][n][2] = exp2_approx(fmaf(s[i][n][2], p.scale_log2, -base[1]));
                s[i][n][3] = exp2_approx(fmaf(s[i][n][3], p.scale_log2, -base[1]));
                sum[0] += s[i][n][0] + s[i][n][1];
                sum[1] += s[i][n][2] + s[i][n][3];
            }
            const uint32_t a[4] = {rf_pack_bf16(s[i][0][0], s[i][0][1]), rf_pack_bf16(s[i][0][2], s[i][0][3]),
                                   rf_pack_bf16(s[i][1][0], s[i][1][1]), rf_pack_bf16(s[i][1][2], s[i][1][3])};
            const uint32_t addr = v_shared + tile * 16 * LD + v_lane;
#pragma unroll
            for (int n = 0; n < N_TILES; n += 2) {
                uint32_t b[4]; /* dims 0..7: b0, b1; dims 8..15: b2, b3 */
                ldmatrix4_trans(b, addr ^ (n * 16));
                mma16(o[n], a, b[0], b[1]);
                mma16(o[n + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    }

    /* --- out --- */
    rf_bf16 *const out = p.out + blockIdx.z * p.out_batch_stride + head * p.out_head_stride;
    float *const lse = p.lse ? p.lse + ((int64_t)blockIdx.z * gridDim.y + head) * p.q_len : NULL;
    auto write_lse = [&](int row, float high, float total) {
        lse[row] = total == 0.0f ? -INFINITY : (high + log2f(total)) * 0.6931471805599453f;
    };
    if constexpr (KG == 1) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + rg * 16 + lane / 4 + h * 8;
            if (row >= p.q_len) continue;
            const float inv = sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
            rf_bf16 *const to = out + row * p.out_row_stride + (lane & 3) * 2;
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                *reinterpret_cast<uint32_t *>(to + n * 8) = rf_pack_bf16(o[n][2 * h] * inv, o[n][2 * h + 1] * inv);
            if (lse && (lane & 3) == 0) write_lse(row, top[h], sum[h]);
        }
    } else {
        float *const parts = reinterpret_cast<float *>(shared + Shape::Q_BYTES); /* [KG][ROWS][OUT_LD] */
        float *const stats = parts + KG * ROWS * Shape::OUT_LD;                  /* [KG][ROWS][2]: top, sum */
        __syncthreads();                                                         /* k and v have been read */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = kg * ROWS + rg * 16 + lane / 4 + h * 8;
            float *const to = parts + row * Shape::OUT_LD + (lane & 3) * 2;
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                *reinterpret_cast<float2 *>(to + n * 8) = make_float2(o[n][2 * h], o[n][2 * h + 1]);
            if ((lane & 3) == 0) *reinterpret_cast<float2 *>(stats + row * 2) = make_float2(top[h], sum[h]);
        }
        __syncthreads();
#pragma unroll 1
        for (int row = pass_row; row < ROWS && first_row + row < p.q_len; row += Shape::PASS_ROWS) {
            float2 stat[KG];
            float high = -INFINITY, total = 0.0f, y[8] = {};
#pragma unroll
            for (int g = 0; g < KG; g++) {
                stat[g] = *reinterpret_cast<const float2 *>(stats + (g * ROWS + row) * 2);
                high = fmaxf(high, stat[g].x);
            }
#pragma unroll
            for (int g = 0; g < KG; g++) {
                const float w = stat[g].x == -INFINITY ? 0.0f : exp2_approx(stat[g].x - high);
                float x[8];
                rf_load4(parts + (g * ROWS + row) * Shape::OUT_LD + chunk * 8, x);
                rf_load4(parts + (g * ROWS + row) * Shape::OUT_LD + chunk * 8 + 4, x + 4);
                total = fmaf(w, stat[g].y, total);
#pragma unroll
                for (int e = 0; e < 8; e++) y[e] = fmaf(w, x[e], y[e]);
            }
            const float inv = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
            for (int e = 0; e < 8; e++) y[e] *= inv;
            *reinterpret_cast<uint4 *>(out + (first_row + row) * p.out_row_stride + chunk * 8) = rf_pack16(y);
            if (lse && chunk == 0) write_lse(first_row + row, high, total);
        }
    }
}

/* --- launch ------------------------------------------------------------------------------------------------------- */

rf_status rf_attention_small_check(const rf_attention_args *args, rf_error *err) {
    const char *why = NULL;
    if (args->dtype != RF_DTYPE_BF16)
        why = "a dtype other than bf16";
    else if (args->head_dim != 64 && args->head_dim != 128)
        why = "a head_dim other than 64 and 128";
    else if (args->kv_len > MAX_KEYS)
        why = "more than 256 keys";
    else if (args->mask != RF_MASK_NONE)
        why = "a mask";
    else if (args->q_rows || args->kv_rows || args->kv_lens || args->num_ranges > 0 || args->q_pos_offsets)
        why = "lists or ranges of rows";
    else if (!(args->softmax_scale > 0))
        why = "a softmax_scale that is not above 0";
    else if (args->rope && args->rope_pairs % 4 != 0)
        why = "rope_pairs that is not a multiple of 4";
    else if (args->batch > 65535)
        why = "more than 65535 samples";
    else if (rf_attention_check_strides(args, NULL) != RF_OK)
        why = "strides that are not multiples of 8";
    if (!why) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED, "attention%s: the kernel of few keys does not take %s",
                   args->rope ? " with rotary positions" : "", why);
}

template <int HD, int RG, int KG, int NT, int MIN_BLOCKS>
static rf_status launch(rf_stream *stream, const rf_attention_args *args, const small_params &p, rf_error *err) {
    using Shape = small_shape<HD, RG, KG, NT>;
    static std::atomic<uint64_t> done{0};
    auto kernel = attention_small_kernel<HD, RG, KG, NT, MIN_BLOCKS>;
    const cudaError_t code = rf_allow_shared((const void *)kernel, (size_t)Shape::shared_bytes(Shape::KEYS), &done);
    if (code != cudaSuccess) return rf_cuda_fail(err, "attention_small", code);
    const dim3 grid((unsigned)rf_ceil_div(args->q_len, Shape::ROWS), (unsigned)args->num_q_heads,
                    (unsigned)args->batch);
    return rf_launch_early(stream, "attention_small", err, kernel, grid, dim3(Shape::THREADS),
                           (size_t)Shape::shared_bytes(p.kv_len), p);
}

rf_status rf_attention_small_run(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    small_params p = {};
    p.q = (const rf_bf16 *)args->q;
    p.k = (const rf_bf16 *)args->k;
    p.v = (const rf_bf16 *)args->v;
    p.out = (rf_bf16 *)args->out;
    p.lse = args->lse;
    p.q_batch_stride = args->q_batch_stride;
    p.q_row_stride = args->q_row_stride;
    p.q_head_stride = args->q_head_stride;
    p.kv_batch_stride = args->kv_batch_stride;
    p.kv_row_stride = args->kv_row_stride;
    p.kv_head_stride = args->kv_head_stride;
    p.out_batch_stride = args->out_batch_stride;
    p.out_row_stride = args->out_row_stride;
    p.out_head_stride = args->out_head_stride;
    p.rope = args->rope;
    p.rope_pairs = args->rope_pairs;
    p.q_pos_offset = args->q_pos_offset;
    p.q_len = (int32_t)args->q_len;
    p.kv_len = (int32_t)args->kv_len;
    p.group = args->num_q_heads / args->num_kv_heads;
    p.scale_log2 = args->softmax_scale * 1.4426950408889634f;

    /* Tiles of 16 rows while they leave half the SMs free, then of 48 in nine warps; grids that fill the card twice
     * take one
     * warp for 16 rows, tiles of 48 or 64 rows by what is padded. */
    const int64_t heads = args->batch * args->num_q_heads, num_sms = rf_backend_num_sms(rf_stream_backend(stream));
    const int64_t tiles_16 = rf_ceil_div(args->q_len, 16), tiles_48 = rf_ceil_div(args->q_len, 48);
    const bool few_rows = heads * tiles_16 * 2 <= num_sms;
    if (args->head_dim == 128) {
        if (few_rows) return launch<128, 1, 4, 4, 1>(stream, args, p, err);
        return launch<128, 3, 3, 6, 1>(stream, args, p, err);
    }
    if (few_rows) return launch<64, 1, 4, 4, 1>(stream, args, p, err);
    if (heads * tiles_48 <= 2 * num_sms)
        return p.kv_len <= 144 ? launch<64, 3, 3, 3, 2>(stream, args, p, err)
                               : launch<64, 3, 3, 6, 1>(stream, args, p, err);
    if (p.kv_len > 144) return launch<64, 4, 1, 16, 2>(stream, args, p, err);
    if (tiles_48 * 48 < rf_ceil_div(args->q_len, 64) * 64) return launch<64, 3, 1, 9, 4>(stream, args, p, err);
    return launch<64, 4, 1, 9, 3>(stream, args, p, err);
}
