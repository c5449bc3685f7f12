/* kernels/attention.cu - the attention entry point: which kernel runs; and the two small companions, merge and softmax.
 * Choice   f32: the plain kernel. bf16: the decode kernel for few query rows against many keys and for every output but a
 *          plain one (f32, listed rows, joined); wgmma where it is faster (sm_90, dense keys; at least 64 query rows, or
 *          128 that fill the card under a mask or kv_lens); else mma.sync with the tile that its own chooser picks.
 *          args->kernel forces one; what it cannot run is an error. With rotary positions: the kernel of few keys, which
 *          AUTO does not use without them.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>

#include "kernels/attention_checks.h"
#include "kernels/attention_cuda.cuh"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

rf_attention_params rf_attention_make_params(const rf_attention_args *args) {
    rf_attention_params p = {};
    p.q = args->q;
    p.k = args->k;
    p.v = args->v;
    p.out = args->out;
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
    p.q_rows = args->q_rows;
    p.kv_rows = args->kv_rows;
    p.kv_lens = args->kv_lens;
    p.q_batch_stride_rows = args->q_batch_stride_rows;
    p.kv_batch_stride_rows = args->kv_batch_stride_rows;
    p.num_keys = (int32_t)args->kv_len;
    for (int i = 0; i < RF_MAX_KEY_RANGES; i++) p.range_end[i] = INT_MAX;
    if (args->num_ranges > 0) {
        int32_t keys = 0;
        for (int i = 0; i < args->num_ranges; i++) {
            p.range_shift[i] = args->ranges[i].begin - keys;
            keys += args->ranges[i].end - args->ranges[i].begin;
            p.range_end[i] = keys;
        }
        p.num_keys = keys;
        if (args->num_ranges == 1) p.first_key = args->ranges[0].begin;
    }
    p.group = args->num_q_heads / args->num_kv_heads;
    p.q_len = (int32_t)args->q_len;
    p.num_rows = (int32_t)(args->q_len * p.group);
    p.num_q_heads = args->num_q_heads;
    p.num_kv_heads = args->num_kv_heads;
    p.head_dim = args->head_dim;
    p.batch = (int32_t)args->batch;
    p.mask = args->mask;
    p.causal_block = args->causal_block;
    p.q_pos_offset = args->q_pos_offset;
    p.q_pos_offsets = args->q_pos_offsets;
    p.out_rows = args->out_rows;
    p.join_rows = args->join_rows;
    p.join_out = args->join_out;
    p.join_lse = args->join_lse;
    p.lse_slots = args->out_rows ? args->lse_slots : args->q_len;
    p.join_slots = args->join_slots;
    p.out_is_f32 = args->out_is_f32 || args->dtype == RF_DTYPE_F32;
    p.scale_log2 = args->softmax_scale * 1.4426950408889634f;
    p.num_splits = 1;
    return p;
}

rf_status rf_attention_check_strides(const rf_attention_args *args, rf_error *err) {
    const int64_t strides[9] = {args->q_row_stride,   args->q_head_stride,   args->kv_row_stride,
                                args->kv_head_stride, args->out_row_stride,  args->out_head_stride,
                                args->q_batch_stride, args->kv_batch_stride, args->out_batch_stride};
    for (int i = 0; i < 9; i++) {
        if (strides[i] % 8 != 0)
            return rf_fail(err, RF_ERR_SHAPE, "attention: strides must be multiples of 8 elements, one is %lld",
                           (long long)strides[i]);
    }
    return RF_OK;
}

/* The one place that says which kernel runs, and whether one can. sm, num_sms: 0 where no device is known (plan time).
 * */
static rf_status choose(const rf_attention_args *args, int sm, int num_sms, rf_attention_kernel *kernel,
                        rf_attention_mma_plan *plan, rf_attention_decode_plan *decode, rf_error *err) {
    const bool other_out = rf_attention_has_other_out(args);
    if (args->rope && args->kernel != RF_ATTENTION_AUTO && args->kernel != RF_ATTENTION_SMALL)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the forced kernel knows no rotary positions");
    if (other_out && (args->rope || (args->kernel != RF_ATTENTION_AUTO && args->kernel != RF_ATTENTION_DECODE)))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: %s knows no f32 output, out_rows or join",
                       args->rope ? "the kernel of rotary positions" : "the forced kernel");
    if (args->rope || args->kernel == RF_ATTENTION_SMALL) {
        *kernel = RF_ATTENTION_SMALL;
        return rf_attention_small_check(args, err);
    }
    if (args->kernel == RF_ATTENTION_WGMMA) {
        *kernel = RF_ATTENTION_WGMMA;
        return rf_attention_wgmma_check(args, sm, err);
    }
    if (args->dtype == RF_DTYPE_F32 && args->kernel == RF_ATTENTION_AUTO) {
        *kernel = RF_ATTENTION_AUTO; /* the plain kernel */
        return rf_attention_f32_check(args, err);
    }
    if (args->kernel == RF_ATTENTION_DECODE || (args->kernel == RF_ATTENTION_AUTO && other_out)) {
        *kernel = RF_ATTENTION_DECODE;
        return rf_attention_decode_choose(args, sm, num_sms, decode, err);
    }
    if (args->kernel == RF_ATTENTION_AUTO && rf_attention_decode_wins(args) &&
        rf_attention_decode_choose(args, sm, num_sms, decode, NULL) == RF_OK) {
        *kernel = RF_ATTENTION_DECODE;
        return RF_OK;
    }
    if (args->kernel == RF_ATTENTION_AUTO && sm == 90 && rf_attention_wgmma_wins(args, num_sms) &&
        rf_attention_wgmma_check(args, sm, NULL) == RF_OK) {
        *kernel = RF_ATTENTION_WGMMA;
        return RF_OK;
    }
    *kernel = RF_ATTENTION_MMA;
    return rf_attention_mma_choose(args, num_sms, RF_ATTENTION_TILE_AUTO, plan, err);
}

static rf_status check_pointers(const rf_attention_args *args, rf_error *err) {
    const void *pointers[6] = {args->q, args->k, args->v, args->out, args->rope, args->join_out};
    static const char *const names[6] = {"q", "k", "v", "out", "rope", "join_out"};
    for (int i = 0; i < 6; i++) {
        if (!rf_is_aligned(pointers[i], 16))
            return rf_fail(err, RF_ERR_ARGUMENT, "attention: %s must be aligned to 16 bytes on CUDA", names[i]);
    }
    return RF_OK;
}

extern "C" rf_status rf_attention_cuda(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    rf_status status = stream ? rf_attention_check_run(args, err) : rf_attention_check(args, err);
    if (status == RF_OK) status = stream ? rf_attention_out_check_run(args, err) : rf_attention_out_check(args, err);
    if (status != RF_OK) return status;
    rf_backend *const backend = stream ? rf_stream_backend(stream) : NULL;
    rf_attention_kernel kernel = RF_ATTENTION_AUTO;
    rf_attention_mma_plan plan = {};
    rf_attention_decode_plan decode = {};
    status = choose(args, backend ? rf_backend_sm(backend) : 0, backend ? rf_backend_num_sms(backend) : 0, &kernel,
                    &plan, &decode, err);
    if (status != RF_OK || args->batch == 0 || args->q_len == 0) return status;
    if (stream) {
        status = check_pointers(args, err);
        const size_t need = kernel == RF_ATTENTION_MMA      ? plan.workspace_bytes
                            : kernel == RF_ATTENTION_DECODE ? decode.workspace_bytes
                                                            : 0;
        if (status == RF_OK)
            status = rf_check_workspace("attention", args->workspace, args->workspace_bytes, need, err);
        if (status == RF_OK && need > 0 && !rf_is_aligned(args->workspace, 16))
            status = rf_fail(err, RF_ERR_ARGUMENT, "attention: workspace must be aligned to 16 bytes on CUDA");
        if (status != RF_OK) return status;
    }
    switch (kernel) {
    case RF_ATTENTION_MMA: return rf_attention_mma_run(stream, args, &plan, err);
    case RF_ATTENTION_WGMMA: return rf_attention_wgmma_run(stream, args, err);
    case RF_ATTENTION_DECODE: return rf_attention_decode_run(stream, args, &decode, err);
    case RF_ATTENTION_SMALL: return stream ? rf_attention_small_run(stream, args, err) : RF_OK;
    case RF_ATTENTION_AUTO: break;
    }
    return stream ? rf_attention_f32_run(stream, args, err) : RF_OK;
}

extern "C" size_t rf_attention_workspace_cuda(rf_backend *backend, const rf_attention_args *args) {
    if (rf_attention_check(args, NULL) != RF_OK || args->dtype != RF_DTYPE_BF16) return 0;
    const int sm = rf_backend_sm(backend), num_sms = rf_backend_num_sms(backend);
    /* Lists may be missing when the size is asked for, and which kernel runs can depend on them: room for both. */
    const size_t mma = rf_attention_mma_workspace(args, num_sms);
    rf_attention_decode_plan plan = {};
    if (rf_attention_decode_choose(args, sm, num_sms, &plan, NULL) != RF_OK) return mma;
    return mma > plan.workspace_bytes ? mma : plan.workspace_bytes;
}

/* --- merge -------------------------------------------------------------------------------------------------------- */

/* A warp per (row, head). VEC neighbours a lane. A, B: types of the two sides, T: of out. */
template <class A, class B, class T, int VEC>
static __global__ void __launch_bounds__(128) merge_kernel(const __grid_constant__ rf_attention_merge_args p) {
    const int lane = threadIdx.x & 31;
    const int64_t total = p.rows * p.num_heads, stride = (int64_t)gridDim.x * 4;
    for (int64_t at = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5); at < total; at += stride) {
        const int64_t row = at / p.num_heads, head = at - row * p.num_heads, lse_at = head * p.rows + row;
        const int64_t slot = p.slots ? p.slots[row] : row;
        const float lse_a = p.lse_a[p.slots ? head * p.num_slots + slot : lse_at], lse_b = p.lse_b[lse_at];
        const float top = fmaxf(lse_a, lse_b);
        const float exp_a = lse_a == -INFINITY ? 0.0f : expf(lse_a - top);
        const float exp_b = lse_b == -INFINITY ? 0.0f : expf(lse_b - top);
        const float sum = exp_a + exp_b;
        const float weight_a = sum == 0.0f ? 0.0f : exp_a / sum, weight_b = sum == 0.0f ? 0.0f : exp_b / sum;
        __syncwarp(); /* lse may be lse_a: all lanes have read it */
        if (lane == 0 && p.lse) p.lse[lse_at] = sum == 0.0f ? -INFINITY : top + logf(sum);
        for (int c = lane * VEC; c < p.head_dim; c += 32 * VEC) {
            float a[VEC], b[VEC], y[VEC];
#pragma unroll
            for (int k = 0; k < VEC; k++) a[k] = b[k] = 0.0f;
            const int64_t from = at * p.head_dim + c, from_a = (slot * p.num_heads + head) * p.head_dim + c;
            if constexpr (VEC == 4) { /* an empty side may hold anything: it is not read */
                if (exp_a != 0.0f) rf_load4((const A *)p.out_a + from_a, a);
                if (exp_b != 0.0f) rf_load4((const B *)p.out_b + from, b);
            } else {
                if (exp_a != 0.0f) a[0] = rf_to_f32(((const A *)p.out_a)[from_a]);
                if (exp_b != 0.0f) b[0] = rf_to_f32(((const B *)p.out_b)[from]);
            }
#pragma unroll
            for (int k = 0; k < VEC; k++) y[k] = weight_a * a[k] + weight_b * b[k];
            if constexpr (VEC == 4)
                rf_store4((T *)p.out + from, y);
            else
                ((T *)p.out)[from] = rf_from_f32<T>(y[0]);
        }
    }
}

template <class A, class B, class T>
static rf_status launch_merge(rf_stream *stream, const rf_attention_merge_args *args, rf_error *err) {
    const bool vectors = args->head_dim % 4 == 0 && rf_is_aligned(args->out_a, 4 * sizeof(A)) &&
                         rf_is_aligned(args->out_b, 4 * sizeof(B)) && rf_is_aligned(args->out, 4 * sizeof(T));
    const dim3 grid(rf_blocks_for(args->rows * args->num_heads, 4));
    return rf_launch(stream, "attention_merge", err, vectors ? merge_kernel<A, B, T, 4> : merge_kernel<A, B, T, 1>,
                     grid, dim3(128), 0, *args);
}

extern "C" rf_status rf_attention_merge_cuda(rf_stream *stream, const rf_attention_merge_args *args, rf_error *err) {
    rf_status status = stream ? rf_attention_merge_check_run(args, err) : rf_attention_merge_check(args, err);
    if (status == RF_OK)
        status = stream ? rf_attention_merge_slots_check_run(args, err) : rf_attention_merge_slots_check(args, err);
    if (status != RF_OK || !stream || args->rows == 0) return status;
    if (args->dtype == RF_DTYPE_F32) return launch_merge<float, float, float>(stream, args, err);
    if (args->out_a_dtype == RF_DTYPE_F32)
        return args->out_b_is_f32 ? launch_merge<float, float, rf_bf16>(stream, args, err)
                                  : launch_merge<float, rf_bf16, rf_bf16>(stream, args, err);
    return args->out_b_is_f32 ? launch_merge<rf_bf16, float, rf_bf16>(stream, args, err)
                              : launch_merge<rf_bf16, rf_bf16, rf_bf16>(stream, args, err);
}

/* --- softmax ------------------------------------------------------------------------------------------------------ */

static constexpr int SOFTMAX_THREADS = 256;

/* A block per row; three passes, the later two from L1 or L2. A thread reads and writes its own columns only, so y may
 * be x. VEC 4 needs cols % 4 == 0. */
template <class Y, int VEC>
static __global__ void __launch_bounds__(SOFTMAX_THREADS) softmax_kernel(const __grid_constant__ rf_softmax_args p) {
    __shared__ float shared[2][SOFTMAX_THREADS / 32];
    const float *const x = (const float *)p.x + (int64_t)blockIdx.x * p.cols;
    Y *const y = (Y *)p.y + (int64_t)blockIdx.x * p.cols;
    auto load = [&](int64_t c, float f[VEC]) {
        if constexpr (VEC == 4)
            rf_load4(x + c, f);
        else
            f[0] = x[c];
#pragma unroll
        for (int k = 0; k < VEC; k++) f[k] *= p.scale;
    };
    float top = -INFINITY;
#pragma unroll 2
    for (int64_t c = threadIdx.x * VEC; c < p.cols; c += SOFTMAX_THREADS * VEC) {
        float f[VEC];
        load(c, f);
#pragma unroll
        for (int k = 0; k < VEC; k++) top = fmaxf(top, f[k]);
    }
    top = rf_block_max<SOFTMAX_THREADS / 32>(top, shared[0]);
    float sum = 0.0f;
#pragma unroll 2
    for (int64_t c = threadIdx.x * VEC; c < p.cols; c += SOFTMAX_THREADS * VEC) {
        float f[VEC];
        load(c, f);
#pragma unroll
        for (int k = 0; k < VEC; k++) sum += expf(f[k] - top);
    }
    const float inv = 1.0f / rf_block_sum<SOFTMAX_THREADS / 32>(sum, shared[1]);
#pragma unroll 2
    for (int64_t c = threadIdx.x * VEC; c < p.cols; c += SOFTMAX_THREADS * VEC) {
        float f[VEC];
        load(c, f);
#pragma unroll
        for (int k = 0; k < VEC; k++) f[k] = expf(f[k] - top) * inv;
        if constexpr (VEC == 4)
            rf_store4(y + c, f);
        else
            y[c] = rf_from_f32<Y>(f[0]);
    }
}

extern "C" rf_status rf_softmax_cuda(rf_stream *stream, const rf_softmax_args *args, rf_error *err) {
    rf_status status = stream ? rf_softmax_check_run(args, err) : rf_softmax_check(args, err);
    if (status != RF_OK || !stream || args->rows == 0) return status;
    const bool f32 = args->y_dtype == RF_DTYPE_F32;
    const bool vectors = args->cols % 4 == 0 && rf_is_aligned(args->x, 16) && rf_is_aligned(args->y, f32 ? 16 : 8);
    auto kernel = f32 ? (vectors ? softmax_kernel<float, 4> : softmax_kernel<float, 1>)
                      : (vectors ? softmax_kernel<rf_bf16, 4> : softmax_kernel<rf_bf16, 1>);
    return rf_launch(stream, "softmax", err, kernel, dim3((unsigned)args->rows), dim3(SOFTMAX_THREADS), 0, *args);
}
