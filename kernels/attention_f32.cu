/* kernels/attention_f32.cu - attention in plain f32, every feature of kernels/attention.h; right before fast.
 * Maths    Online softmax over tiles of 32 keys in base e: m the running row maximum, l = sum p, p = exp(s - m),
 *          o = sum p v; out = o / l, lse = m + ln l.
 * Shapes   head_dim any multiple of 4 up to 128; strides multiples of 4, 16-byte aligned bases.
 * Launch   grid (tiles of 16 packed rows, key heads, batch), 128 threads: eight to a row. Scores: thread j of a row
 *          takes keys j, j + 8, ...; p v: columns 4 j, 4 j + 32, ...
 * Shared   q, k, v rows padded by 16 bytes (eight rows at one column meet no bank twice), scores, key rows: 45 KB.
 * Arch     sm_80 and later.  Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include "kernels/attention_cuda.cuh"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"

static constexpr int ROWS = 16, KEYS = 32, THREADS = 128, MAX_HD = 128, LD = MAX_HD + 4;
static constexpr int LANES = THREADS / ROWS; /* threads of a row */

static __device__ int64_t key_limit(const rf_attention_params &p, int64_t pos) {
    if (p.mask == RF_MASK_CAUSAL) return pos + 1;
    if (p.mask == RF_MASK_BLOCK_CAUSAL) return (pos / p.causal_block + 1) * p.causal_block;
    return INT_MAX;
}

static __device__ int key_row(const rf_attention_params &p, const int32_t *list, int j) {
    if (list) return list[j];
    int row = j + p.range_shift[0];
    for (int i = 1; i < RF_MAX_KEY_RANGES; i++)
        if (j >= p.range_end[i - 1]) row = j + p.range_shift[i];
    return row;
}

static __global__ void __launch_bounds__(THREADS)
    attention_f32_kernel(const __grid_constant__ rf_attention_params p, const float softmax_scale) {
    __shared__ __align__(16) float q_tile[ROWS][LD], k_tile[KEYS][LD], v_tile[KEYS][LD];
    __shared__ float scores[ROWS][KEYS + 1];
    __shared__ int32_t key_rows[KEYS];
    const int r = threadIdx.x / LANES, part = threadIdx.x % LANES;
    const int batch = p.batch_first + blockIdx.z, head = blockIdx.y, hd = p.head_dim;
    const int row = blockIdx.x * ROWS + r;
    const bool row_valid = row < p.num_rows;
    const int query = row_valid ? row / p.group : 0;
    const int q_head = head * p.group + (row_valid ? row % p.group : 0);
    const int64_t listed = batch * p.q_batch_stride_rows + query;
    const int64_t q_row = p.q_rows && row_valid ? p.q_rows[listed] : query;
    const int64_t pos_offset = (int64_t)p.q_pos_offset + (p.q_pos_offsets ? p.q_pos_offsets[batch] : 0);
    const int64_t limit = row_valid ? key_limit(p, q_row + pos_offset) : 0;

    const float *const q =
        (const float *)p.q + batch * p.q_batch_stride + q_row * p.q_row_stride + q_head * p.q_head_stride;
    for (int c = part * 4; c < hd; c += LANES * 4) {
        float f[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (row_valid) rf_load4(q + c, f);
        rf_store4(&q_tile[r][c], f);
    }

    const int32_t *const list = p.kv_rows ? p.kv_rows + batch * p.kv_batch_stride_rows : NULL;
    const float *const k = (const float *)p.k + batch * p.kv_batch_stride + head * p.kv_head_stride;
    const float *const v = (const float *)p.v + batch * p.kv_batch_stride + head * p.kv_head_stride;
    int len = p.num_keys;
    if (p.kv_lens) len = max(0, min(p.kv_lens[batch], len));
    int block_limit = INT_MAX; /* of all rows of the block: tiles past it are skipped, rows past it are not read */
    if (p.mask != RF_MASK_NONE) {
        if (part == 0) key_rows[r] = (int)min(limit, (int64_t)INT_MAX);
        __syncthreads(); /* every row's limit is there */
        block_limit = 0;
        for (int i = 0; i < ROWS; i++) block_limit = max(block_limit, key_rows[i]);
        if (!list) { /* rows ascend with the key's index */
            int seen = 0;
            for (int i = 0, begin = 0; i < RF_MAX_KEY_RANGES && begin < len; i++) {
                const int end = min(len, p.range_end[i]);
                const int64_t reach = (int64_t)block_limit - p.range_shift[i];
                if (reach > begin) seen = (int)min((int64_t)end, reach);
                begin = end;
            }
            len = seen;
        }
    }

    float acc[MAX_HD / 32][4] = {};
    float top = -INFINITY, sum = 0.0f;
    for (int key0 = 0; key0 < len; key0 += KEYS) {
        __syncthreads(); /* the previous tile has been used; before the first, nothing */
        if (threadIdx.x < KEYS)
            key_rows[threadIdx.x] = key0 + (int)threadIdx.x < len ? key_row(p, list, key0 + threadIdx.x) : INT_MAX;
        for (int i = threadIdx.x; i < KEYS * (hd / 4); i += THREADS) {
            const int key = i / (hd / 4), c = i % (hd / 4) * 4;
            float f[4] = {0.0f, 0.0f, 0.0f, 0.0f}, g[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            const int from_row = key0 + key < len ? key_row(p, list, key0 + key) : INT_MAX;
            if (from_row < block_limit) {
                const int64_t from = from_row * p.kv_row_stride + c;
                rf_load4(k + from, f);
                rf_load4(v + from, g);
            }
            rf_store4(&k_tile[key][c], f);
            rf_store4(&v_tile[key][c], g);
        }
        __syncthreads(); /* the tile is there (and q, the first time) */

        float s[KEYS / LANES] = {}, high = -INFINITY;
        for (int c = 0; c < hd; c += 4) {
            float f[4];
            rf_load4(&q_tile[r][c], f);
#pragma unroll
            for (int i = 0; i < KEYS / LANES; i++) {
                float g[4];
                rf_load4(&k_tile[i * LANES + part][c], g);
#pragma unroll
                for (int d = 0; d < 4; d++) s[i] = fmaf(f[d], g[d], s[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < KEYS / LANES; i++) {
            const int key = key_rows[i * LANES + part];
            s[i] = key != INT_MAX && key < limit ? s[i] * softmax_scale : -INFINITY;
            high = fmaxf(high, s[i]);
        }
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, mask));
        const float next = fmaxf(top, high), base = next == -INFINITY ? 0.0f : next;
        const float alpha = expf(top - base); /* 0 while top is -inf */
        top = next;
        sum *= alpha;
#pragma unroll
        for (int i = 0; i < KEYS / LANES; i++) {
            const float e = expf(s[i] - base);
            sum += e;
            scores[r][i * LANES + part] = e;
        }
        __syncwarp(); /* a row's eight threads are in one warp */
#pragma unroll
        for (int i = 0; i < MAX_HD / 32; i++)
#pragma unroll
            for (int d = 0; d < 4; d++) acc[i][d] *= alpha;
        for (int key = 0; key < KEYS; key++) {
            const float e = scores[r][key];
#pragma unroll
            for (int i = 0; i < MAX_HD / 32; i++) {
                const int c = i * 32 + part * 4;
                if (c < hd) {
                    float f[4];
                    rf_load4(&v_tile[key][c], f);
#pragma unroll
                    for (int d = 0; d < 4; d++) acc[i][d] = fmaf(e, f[d], acc[i][d]);
                }
            }
        }
        __syncwarp(); /* scores have been read */
    }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (!row_valid) return;
    float inv = sum == 0.0f ? 0.0f : 1.0f / sum; /* NaN stays NaN */
    float lse = sum == 0.0f ? -INFINITY : top + logf(sum), other = 0.0f;
    const float *kept = NULL; /* what the result is joined with, if it is not empty */
    if (p.join_out) {
        const int64_t slot = p.join_rows ? p.join_rows[listed] : query;
        const float kept_lse = p.join_lse[q_head * p.join_slots + slot], high = fmaxf(lse, kept_lse);
        const float mine = lse == -INFINITY ? 0.0f : expf(lse - high);
        other = kept_lse == -INFINITY ? 0.0f : expf(kept_lse - high);
        const float both = mine + other, share = both == 0.0f ? 0.0f : 1.0f / both;
        inv *= mine * share;
        other *= share;
        if (other != 0.0f) kept = p.join_out + (slot * p.num_q_heads + q_head) * hd;
        lse = both == 0.0f ? -INFINITY : high + logf(both);
    }
    const int64_t out_row = p.out_rows ? p.out_rows[listed] : query;
    float *const out =
        (float *)p.out + batch * p.out_batch_stride + out_row * p.out_row_stride + q_head * p.out_head_stride;
#pragma unroll
    for (int i = 0; i < MAX_HD / 32; i++) {
        const int c = i * 32 + part * 4;
        if (c < hd) {
            float f[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (kept) rf_load4(kept + c, f);
#pragma unroll
            for (int d = 0; d < 4; d++) acc[i][d] = acc[i][d] * inv + other * f[d];
            rf_store4(out + c, acc[i]);
        }
    }
    if (p.lse && part == 0) p.lse[((int64_t)batch * p.num_q_heads + q_head) * p.lse_slots + out_row] = lse;
}

rf_status rf_attention_f32_check(const rf_attention_args *args, rf_error *err) {
    if (args->head_dim % 4 != 0 || args->head_dim > MAX_HD)
        return rf_fail(err, RF_ERR_SHAPE, "attention: head_dim is %d, must be a multiple of 4 up to %d for f32 on CUDA",
                       args->head_dim, MAX_HD);
    const int64_t strides[9] = {args->q_row_stride,   args->q_head_stride,   args->kv_row_stride,
                                args->kv_head_stride, args->out_row_stride,  args->out_head_stride,
                                args->q_batch_stride, args->kv_batch_stride, args->out_batch_stride};
    for (int i = 0; i < 9; i++) {
        if (strides[i] % 4 != 0)
            return rf_fail(err, RF_ERR_SHAPE, "attention: f32 strides must be multiples of 4 elements, one is %lld",
                           (long long)strides[i]);
    }
    if (args->q_len * (args->num_q_heads / args->num_kv_heads) > INT32_MAX - 256 || args->kv_len > INT32_MAX - 256)
        return rf_fail(err, RF_ERR_SHAPE, "attention: %lld queries against %lld keys are too many",
                       (long long)args->q_len, (long long)args->kv_len);
    return RF_OK;
}

rf_status rf_attention_f32_run(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    rf_attention_params p = rf_attention_make_params(args);
    if (args->num_ranges == 0) p.range_shift[0] = 0;
    for (int first = 0; first < p.batch; first += 65535) {
        p.batch_first = first;
        const int count = p.batch - first < 65535 ? p.batch - first : 65535;
        const dim3 grid((unsigned)rf_ceil_div(p.num_rows, ROWS), (unsigned)p.num_kv_heads, (unsigned)count);
        rf_status status = rf_launch(stream, "attention_f32", err, attention_f32_kernel, grid, dim3(THREADS), 0, p,
                                     args->softmax_scale);
        if (status != RF_OK) return status;
    }
    return RF_OK;
}
