/* kernels/gemm.cu - Linear layers, through cuBLASLt or an own kernel.
 * Maths    y = act(alpha * x w^T + bias) + beta * y0, accumulated in f32.
 * Shapes   x [m, k], w [n, k] (or [k, n]), y [m, n], row-major with row strides; batches at fixed strides.
 * Mapping  cuBLASLt is column-major, where our row-major y [m, n] is D = y^T [n, m]. So A = w (transposed, or not if
 *          w_is_kn), B = x, D = y, with rows and columns swapped: "m" of cuBLASLt is our n. Its bias runs along the rows of
 *          D, which are our output features. Tile names in its enum are features x tokens.
 * Rounding f32 inputs are multiplied as f32 (never TF32). Split-K partial sums are f32 and added in a fixed order: the
 *          reduction schemes that accumulate in the output type or in place are excluded, they depend on timing.
 *          Where the library has no fused form (SiLU, erf GELU, act together with an addend, an odd bias dtype) the
 *          GEMM's result is rounded to y's dtype and finish_kernel does the rest in a second pass over y.
 *          Own kernels (gemm_wgmma.cu, gemm_skinny.cu, gemm_stream.cu, gemv.cu) stand in its place where tuning found them
 *          faster, and the last three without tuning where their default rules say so.
 * Plans    An algorithm is chosen in phase PLAN and kept in a table by rf_gemm_key. In phase RUN a missing entry is
 *          RF_ERR_STATE, so that no forward depends on a heuristic's mood. A failed call is an error, not a second try.
 * Cost     compute bound from about 300 rows, else one pass over w. Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/gemm_plan.h"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

/* --- the second pass ------------------------------------------------------------------------------------------------ */

/* y = act(y + bias) + beta * y0 in place; bias and y0 may be NULL. V elements a thread, V * sizeof(T) <= 16 bytes.
 * Grid (column vectors / 128, rows, batches); rows and batches stride over what does not fit. */
template <typename T, int V> struct alignas(sizeof(T) * V) vec { T v[V]; };

template <typename T, int V>
static __global__ void __launch_bounds__(128)
    finish_kernel(T *y, const T *y0, const T *bias, rf_act act, float beta, int64_t m, int n, int64_t ldy,
                  int64_t num_batches, int64_t batch_stride) {
    const int col = (blockIdx.x * 128 + threadIdx.x) * V;
    if (col >= n) return;
    vec<T, V> b;
    if (bias) b = *(const vec<T, V> *)(bias + col);
    for (int64_t batch = blockIdx.z; batch < num_batches; batch += gridDim.z) {
        for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
            const int64_t at = batch * batch_stride + row * ldy + col;
            vec<T, V> u = *(const vec<T, V> *)(y + at), c;
            if (y0) c = *(const vec<T, V> *)(y0 + at);
#pragma unroll
            for (int i = 0; i < V; i++) {
                float f = rf_to_f32(u.v[i]);
                if (bias) f += rf_to_f32(b.v[i]);
                f = rf_activate(f, act);
                if (y0) f += beta * rf_to_f32(c.v[i]);
                u.v[i] = rf_from_f32<T>(f);
            }
            *(vec<T, V> *)(y + at) = u;
        }
    }
}

template <typename T, int V>
static rf_status launch_finish(rf_stream *stream, const rf_gemm_args *a, const void *y0, const void *bias, rf_act act,
                               rf_error *err) {
    const dim3 grid((unsigned)rf_ceil_div(a->n, 128 * V), (unsigned)(a->m < 65535 ? a->m : 65535),
                    (unsigned)(a->num_batches < 65535 ? a->num_batches : 65535));
    return rf_launch(stream, "gemm_finish", err, finish_kernel<T, V>, grid, 128, 0, (T *)a->y, (const T *)y0,
                     (const T *)bias, act, a->beta, a->m, (int)a->n, a->ldy, a->num_batches, a->y_batch_stride);
}

static rf_status run_finish(rf_stream *stream, const rf_gemm_plan *plan, const rf_gemm_args *a, rf_error *err) {
    const void *bias = plan->fuse_bias ? NULL : a->bias;
    const void *y0 = plan->key.v[RF_GEMM_KEY_ADDEND] == 0 || plan->fuse_addend ? NULL : a->y0;
    const rf_act act = plan->fuse_act ? RF_ACT_NONE : a->act;
    if (!bias && !y0 && act == RF_ACT_NONE) return RF_OK;

    const bool f32 = a->y_dtype == RF_DTYPE_F32;
    const int v = f32 ? 4 : 8;
    const bool wide = a->n % v == 0 && a->ldy % v == 0 && a->y_batch_stride % v == 0 && rf_is_aligned(a->y, 16) &&
                      rf_is_aligned(y0, 16) && rf_is_aligned(bias, 16);
    if (f32) return (wide ? launch_finish<float, 4> : launch_finish<float, 1>)(stream, a, y0, bias, act, err);
    return (wide ? launch_finish<rf_bf16, 8> : launch_finish<rf_bf16, 1>)(stream, a, y0, bias, act, err);
}

/* --- keys and the table --------------------------------------------------------------------------------------------- */

static int64_t align_class(const void *p) {
    const uintptr_t a = (uintptr_t)p;
    return a % 16 == 0 ? 16 : a % 8 == 0 ? 8 : a % 4 == 0 ? 4 : 2;
}

static bool has_addend(const rf_gemm_args *a) {
    return a->y0 != NULL && a->beta != 0.0f;
}

static rf_gemm_key make_key(const rf_gemm_args *a) {
    rf_gemm_key key;
    memset(&key, 0, sizeof key);
    const bool batched = a->num_batches > 1;
    key.v[RF_GEMM_KEY_M] = a->m;
    key.v[RF_GEMM_KEY_N] = a->n;
    key.v[RF_GEMM_KEY_K] = a->k;
    key.v[RF_GEMM_KEY_LDX] = a->ldx;
    key.v[RF_GEMM_KEY_LDW] = a->ldw;
    key.v[RF_GEMM_KEY_LDY] = a->ldy;
    key.v[RF_GEMM_KEY_BATCHES] = a->num_batches;
    key.v[RF_GEMM_KEY_X_STRIDE] = batched ? a->x_batch_stride : 0;
    key.v[RF_GEMM_KEY_W_STRIDE] = batched ? a->w_batch_stride : 0;
    key.v[RF_GEMM_KEY_Y_STRIDE] = batched ? a->y_batch_stride : 0;
    key.v[RF_GEMM_KEY_DTYPE] = a->dtype;
    key.v[RF_GEMM_KEY_Y_DTYPE] = a->y_dtype;
    key.v[RF_GEMM_KEY_W_IS_KN] = a->w_is_kn;
    key.v[RF_GEMM_KEY_ACT] = a->act;
    key.v[RF_GEMM_KEY_BIAS] = a->bias != NULL;
    key.v[RF_GEMM_KEY_ADDEND] = !has_addend(a) ? 0 : a->y0 == a->y ? 2 : 1;
    key.v[RF_GEMM_KEY_ALIGN_X] = align_class(a->x);
    key.v[RF_GEMM_KEY_ALIGN_W] = align_class(a->w);
    key.v[RF_GEMM_KEY_ALIGN_Y] = align_class(a->y);
    if (has_addend(a) && align_class(a->y0) < key.v[RF_GEMM_KEY_ALIGN_Y])
        key.v[RF_GEMM_KEY_ALIGN_Y] = align_class(a->y0);
    key.v[RF_GEMM_KEY_ALIGN_BIAS] = a->bias ? align_class(a->bias) : 0;
    return key;
}

static uint64_t hash_key(const rf_gemm_key *key) {
    uint64_t h = 0xcbf29ce484222325u;
    for (int i = 0; i < RF_GEMM_KEY_FIELDS; i++) {
        h = (h ^ (uint64_t)key->v[i]) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}

/* The slot that holds the key, or the empty slot where it belongs. The table is never full. */
static size_t find_slot(rf_gemm_plan *const *slots, size_t num_slots, const rf_gemm_key *key) {
    size_t i = (size_t)hash_key(key) & (num_slots - 1);
    while (slots[i] && memcmp(&slots[i]->key, key, sizeof *key) != 0) i = (i + 1) & (num_slots - 1);
    return i;
}

static bool grow_table(rf_gemm_state *state) {
    const size_t num_slots = state->num_slots ? state->num_slots * 2 : 64;
    rf_gemm_plan **slots = (rf_gemm_plan **)rf_alloc_zero(num_slots, sizeof *slots);
    if (!slots) return false;
    for (size_t i = 0; i < state->num_slots; i++)
        if (state->slots[i]) slots[find_slot(slots, num_slots, &state->slots[i]->key)] = state->slots[i];
    rf_free(state->slots);
    state->slots = slots;
    state->num_slots = num_slots;
    return true;
}

rf_gemm_plan *rf_gemm_plan_insert(rf_gemm_state *state, const rf_gemm_key *key) {
    if (2 * (state->num_plans + 1) > state->num_slots && !grow_table(state)) return NULL;
    const size_t i = find_slot(state->slots, state->num_slots, key);
    if (!state->slots[i]) {
        rf_gemm_plan *plan = (rf_gemm_plan *)rf_alloc_zero(1, sizeof *plan);
        if (!plan) return NULL;
        plan->key = *key;
        state->slots[i] = plan;
        state->num_plans++;
    }
    return state->slots[i];
}

static void free_descriptors(rf_gemm_plan *plan) {
    if (plan->desc) cublasLtMatmulDescDestroy(plan->desc);
    if (plan->layout_w) cublasLtMatrixLayoutDestroy(plan->layout_w);
    if (plan->layout_x) cublasLtMatrixLayoutDestroy(plan->layout_x);
    if (plan->layout_y) cublasLtMatrixLayoutDestroy(plan->layout_y);
    plan->desc = NULL;
    plan->layout_w = plan->layout_x = plan->layout_y = NULL;
    plan->ready = false;
}

/* --- per-stream state ----------------------------------------------------------------------------------------------- */

static void destroy_state(void *p) {
    rf_gemm_state *state = (rf_gemm_state *)p;
    if (!state) return;
    for (size_t i = 0; i < state->num_slots; i++) {
        if (!state->slots[i]) continue;
        free_descriptors(state->slots[i]);
        rf_free(state->slots[i]);
    }
    rf_free(state->slots);
    if (state->preference) cublasLtMatmulPreferenceDestroy(state->preference);
    if (state->handle) cublasLtDestroy(state->handle);
    rf_backend_free(state->backend, state->workspace);
    rf_free(state);
}

static rf_status lt_fail(rf_error *err, const char *call, cublasStatus_t st) {
    return rf_fail(err, st == CUBLAS_STATUS_ALLOC_FAILED ? RF_ERR_DEVICE_MEMORY : RF_ERR_DEVICE, "%s: %s", call,
                   cublasLtGetStatusName(st));
}

static rf_status create_state(rf_gemm_state **out, rf_stream *stream, rf_error *err) {
    rf_status st = RF_OK;
    cublasStatus_t lt;
    int device = 0;
    cudaDeviceProp prop;
    rf_gemm_state *state = (rf_gemm_state *)rf_alloc_zero(1, sizeof *state);
    if (!state) return rf_fail(err, RF_ERR_MEMORY, "gemm: no host memory for the stream's state");
    state->backend = rf_stream_backend(stream);
    if (!grow_table(state)) {
        st = rf_fail(err, RF_ERR_MEMORY, "gemm: no host memory for the table of plans");
        goto done;
    }
    st = rf_backend_alloc(state->backend, &state->workspace, RF_GEMM_WORKSPACE_BYTES, err);
    if (st != RF_OK) goto done;
    lt = cublasLtCreate(&state->handle);
    if (lt != CUBLAS_STATUS_SUCCESS) {
        st = lt_fail(err, "cublasLtCreate", lt);
        goto done;
    }
    lt = cublasLtMatmulPreferenceCreate(&state->preference);
    if (lt == CUBLAS_STATUS_SUCCESS) {
        const size_t bytes = RF_GEMM_WORKSPACE_BYTES;
        const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        lt = cublasLtMatmulPreferenceSetAttribute(state->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                  sizeof bytes);
        if (lt == CUBLAS_STATUS_SUCCESS)
            lt = cublasLtMatmulPreferenceSetAttribute(state->preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                      &schemes, sizeof schemes);
    }
    if (lt != CUBLAS_STATUS_SUCCESS) {
        st = lt_fail(err, "cublasLtMatmulPreference", lt);
        goto done;
    }
    state->version = cublasLtGetVersion();
    if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&prop, device) != cudaSuccess) {
        st = rf_fail(err, RF_ERR_DEVICE, "gemm: %s", cudaGetErrorString(cudaGetLastError()));
        goto done;
    }
    snprintf(state->card, sizeof state->card, "%s", prop.name);
    *out = state;
    state = NULL;
done:
    destroy_state(state);
    return st;
}

static bool is_capturing(rf_stream *stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing((cudaStream_t)rf_stream_native(stream), &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

rf_status rf_gemm_state_get(rf_gemm_state **out, rf_stream *stream, rf_error *err) {
    *out = (rf_gemm_state *)rf_stream_get_kernel_state(stream);
    if (*out) return RF_OK;
    if (rf_stream_get_phase(stream) != RF_PHASE_PLAN || is_capturing(stream))
        return rf_fail(err, RF_ERR_STATE, "gemm: first call on this stream outside phase PLAN (or while capturing)");
    const rf_status st = create_state(out, stream, err);
    if (st == RF_OK) rf_stream_set_kernel_state(stream, *out, destroy_state);
    return st;
}

/* --- making a plan -------------------------------------------------------------------------------------------------- */

static cudaDataType_t data_type(int64_t dtype) {
    return dtype == RF_DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static cublasStatus_t make_layout(cublasLtMatrixLayout_t *out, int64_t dtype, int64_t rows, int64_t cols, int64_t ld,
                                  int64_t num_batches, int64_t stride) {
    cublasStatus_t lt = cublasLtMatrixLayoutCreate(out, data_type(dtype), (uint64_t)rows, (uint64_t)cols, ld);
    if (lt != CUBLAS_STATUS_SUCCESS || num_batches == 1) return lt;
    const int32_t count = (int32_t)num_batches;
    lt = cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    return cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride);
}

static cublasStatus_t set_bias(cublasLtMatmulDesc_t desc, const void *bias) {
    return cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
}

/* Descriptors for one split of the work between the GEMM's epilogue and finish_kernel. */
static cublasStatus_t make_descriptors(rf_gemm_plan *plan, const void *bias, bool fuse_bias, bool fuse_act) {
    const int64_t *v = plan->key.v;
    const bool kn = v[RF_GEMM_KEY_W_IS_KN] != 0;
    free_descriptors(plan);
    plan->fuse_bias = fuse_bias;
    plan->fuse_act = fuse_act;
    /* The addend comes after act and so after everything that is left to the second pass. */
    plan->fuse_addend = v[RF_GEMM_KEY_ADDEND] != 0 && v[RF_GEMM_KEY_ACT] == RF_ACT_NONE;

    cublasStatus_t lt = cublasLtMatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    const cublasOperation_t op_w = kn ? CUBLAS_OP_N : CUBLAS_OP_T, op_x = CUBLAS_OP_N;
    lt = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_w, sizeof op_w);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    lt = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_x, sizeof op_x);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;

    const bool gelu = fuse_act && v[RF_GEMM_KEY_ACT] == RF_ACT_GELU_TANH;
    const cublasLtEpilogue_t epilogue = fuse_bias ? (gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS)
                                                  : (gelu ? CUBLASLT_EPILOGUE_GELU : CUBLASLT_EPILOGUE_DEFAULT);
    lt = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    if (fuse_bias) {
        const cudaDataType_t type = data_type(v[RF_GEMM_KEY_Y_DTYPE]);
        lt = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type);
        if (lt != CUBLAS_STATUS_SUCCESS) return lt;
        lt = set_bias(plan->desc, bias); /* the heuristic deduces the alignment from the address */
        if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    }

    const int64_t m = v[RF_GEMM_KEY_M], n = v[RF_GEMM_KEY_N], k = v[RF_GEMM_KEY_K], nb = v[RF_GEMM_KEY_BATCHES];
    lt = make_layout(&plan->layout_w, v[RF_GEMM_KEY_DTYPE], kn ? n : k, kn ? k : n, v[RF_GEMM_KEY_LDW], nb,
                     v[RF_GEMM_KEY_W_STRIDE]);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    lt = make_layout(&plan->layout_x, v[RF_GEMM_KEY_DTYPE], k, m, v[RF_GEMM_KEY_LDX], nb, v[RF_GEMM_KEY_X_STRIDE]);
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    return make_layout(&plan->layout_y, v[RF_GEMM_KEY_Y_DTYPE], n, m, v[RF_GEMM_KEY_LDY], nb, v[RF_GEMM_KEY_Y_STRIDE]);
}

static cublasStatus_t ask_heuristic(rf_gemm_state *state, const rf_gemm_plan *plan, int want,
                                    cublasLtMatmulHeuristicResult_t *results, int *found) {
    const int64_t *v = plan->key.v;
    const uint32_t align_w = (uint32_t)v[RF_GEMM_KEY_ALIGN_W], align_x = (uint32_t)v[RF_GEMM_KEY_ALIGN_X];
    const uint32_t align_y = (uint32_t)v[RF_GEMM_KEY_ALIGN_Y];
    cublasStatus_t lt = cublasLtMatmulPreferenceSetAttribute(
        state->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_w, sizeof align_w);
    if (lt == CUBLAS_STATUS_SUCCESS)
        lt = cublasLtMatmulPreferenceSetAttribute(state->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                  &align_x, sizeof align_x);
    if (lt == CUBLAS_STATUS_SUCCESS)
        lt = cublasLtMatmulPreferenceSetAttribute(state->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                                  &align_y, sizeof align_y);
    if (lt == CUBLAS_STATUS_SUCCESS)
        lt = cublasLtMatmulPreferenceSetAttribute(state->preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                                  &align_y, sizeof align_y);
    *found = 0;
    if (lt != CUBLAS_STATUS_SUCCESS) return lt;
    lt = cublasLtMatmulAlgoGetHeuristic(state->handle, plan->desc, plan->layout_w, plan->layout_x, plan->layout_y,
                                        plan->layout_y, state->preference, want, results, found);
    if (lt == CUBLAS_STATUS_SUCCESS && *found == 0) lt = CUBLAS_STATUS_NOT_SUPPORTED;
    return lt;
}

/* Finds the most fused form the library has for this key and its candidates. */
static rf_status list_candidates(rf_gemm_state *state, rf_gemm_plan *plan, const rf_gemm_args *a, int want,
                                 rf_gemm_candidate *candidates, int *num, rf_error *err) {
    const bool bias = a->bias != NULL;
    /* the library's GELU takes an approximate tanh: good for bf16, 1e-5 off in f32 */
    const bool act_fusable = a->act == RF_ACT_NONE || (a->act == RF_ACT_GELU_TANH && a->dtype == RF_DTYPE_BF16);
    const struct {
        bool bias, act;
    } forms[3] = {{bias, act_fusable}, {bias, a->act == RF_ACT_NONE}, {false, a->act == RF_ACT_NONE}};
    cublasLtMatmulHeuristicResult_t results[32];
    cublasStatus_t lt = CUBLAS_STATUS_NOT_SUPPORTED;
    int found = 0;
    for (int f = 0; f < 3 && lt == CUBLAS_STATUS_NOT_SUPPORTED; f++) {
        lt = make_descriptors(plan, a->bias, forms[f].bias, forms[f].act);
        if (lt == CUBLAS_STATUS_SUCCESS) lt = ask_heuristic(state, plan, want, results, &found);
    }
    if (lt != CUBLAS_STATUS_SUCCESS) {
        free_descriptors(plan);
        return rf_fail(err, lt == CUBLAS_STATUS_NOT_SUPPORTED ? RF_ERR_UNSUPPORTED : RF_ERR_DEVICE,
                       "gemm m %lld n %lld k %lld %s -> %s: cuBLASLt has no algorithm (%s)", (long long)a->m,
                       (long long)a->n, (long long)a->k, rf_dtype_name(a->dtype), rf_dtype_name(a->y_dtype),
                       cublasLtGetStatusName(lt));
    }
    *num = 0;
    for (int i = 0; i < found; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS || results[i].workspaceSize > RF_GEMM_WORKSPACE_BYTES) continue;
        candidates[*num].id = i;
        candidates[*num].algo = results[i].algo;
        (*num)++;
    }
    if (*num == 0) {
        free_descriptors(plan);
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm m %lld n %lld k %lld: no algorithm within the workspace",
                       (long long)a->m, (long long)a->n, (long long)a->k);
    }
    return RF_OK;
}

static const rf_gemm_own_kernel own_kernels[RF_GEMM_NUM_OWN_KERNELS] = {
    {RF_GEMM_WGMMA_ID, rf_gemm_wgmma_num_configs, rf_gemm_wgmma_config_name, rf_gemm_wgmma_check, rf_gemm_wgmma_force},
    {RF_GEMM_SKINNY_ID, rf_gemm_skinny_num_configs, rf_gemm_skinny_config_name, rf_gemm_skinny_check,
     rf_gemm_skinny_force},
    {RF_GEMM_STREAM_ID, rf_gemm_stream_num_configs, rf_gemm_stream_config_name, rf_gemm_stream_check,
     rf_gemm_stream_force},
    {RF_GEMV_ID, rf_gemv_num_configs, rf_gemv_config_name, rf_gemv_check, rf_gemv_force},
};

const rf_gemm_own_kernel *rf_gemm_own_kernel_at(int i) {
    return &own_kernels[i];
}

const rf_gemm_own_kernel *rf_gemm_own_kernel_of(int id) {
    for (int i = 0; i < RF_GEMM_NUM_OWN_KERNELS; i++)
        if (id >= own_kernels[i].first_id && id - own_kernels[i].first_id < own_kernels[i].num_configs())
            return &own_kernels[i];
    return NULL;
}

/* A choice that came from a file: is it valid here? */
static bool loaded_choice_is_valid(rf_gemm_state *state, rf_stream *stream, const rf_gemm_plan *plan,
                                   const rf_gemm_args *a) {
    const rf_gemm_own_kernel *own = rf_gemm_own_kernel_of(plan->choice.id);
    if (own) return own->check(stream, a, plan->choice.id - own->first_id, NULL) == RF_OK;
    cublasLtMatmulHeuristicResult_t result;
    memset(&result, 0, sizeof result);
    return cublasLtMatmulAlgoCheck(state->handle, plan->desc, plan->layout_w, plan->layout_x, plan->layout_y,
                                   plan->layout_y, &plan->choice.algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= RF_GEMM_WORKSPACE_BYTES;
}

static rf_status make_plan(rf_gemm_state *state, rf_stream *stream, rf_gemm_plan *plan, const rf_gemm_args *a,
                           rf_error *err) {
    const rf_log *log = rf_backend_log(state->backend);
    rf_gemm_candidate candidates[RF_GEMM_MAX_CANDIDATES];
    int num = 0;
    rf_status st = list_candidates(state, plan, a, state->tune ? 32 : 1, candidates, &num, err);
    if (st != RF_OK) return st;
    if (plan->tuned) {
        if (loaded_choice_is_valid(state, stream, plan, a)) {
            plan->ready = true;
            return RF_OK;
        }
        rf_log_write(log, RF_LOG_WARN,
                     "gemm m %lld n %lld k %lld: the stored choice %d is not valid here, choosing anew",
                     (long long)a->m, (long long)a->n, (long long)a->k, plan->choice.id);
        plan->tuned = false;
    }
    plan->choice = candidates[0];
    plan->us = 0.0;
    const int gemv = rf_gemv_default(stream, a);
    const int streamed = gemv < 0 ? rf_gemm_stream_default(stream, a) : -1;
    const int skinny = gemv < 0 && streamed < 0 ? rf_gemm_skinny_default(stream, a) : -1;
    if (gemv >= 0) plan->choice.id = RF_GEMV_ID + gemv;
    if (streamed >= 0) plan->choice.id = RF_GEMM_STREAM_ID + streamed;
    if (skinny >= 0) plan->choice.id = RF_GEMM_SKINNY_ID + skinny;
    if (state->tune) st = rf_gemm_tune(state, stream, plan, a, candidates, num, err);
    if (st == RF_OK)
        plan->ready = true;
    else
        free_descriptors(plan);
    return st;
}

/* --- running -------------------------------------------------------------------------------------------------------- */

rf_status rf_gemm_plan_launch(rf_gemm_state *state, rf_stream *stream, const rf_gemm_plan *plan,
                              const rf_gemm_candidate *candidate, const rf_gemm_args *a, rf_error *err) {
    const rf_gemm_own_kernel *own = rf_gemm_own_kernel_of(candidate->id);
    if (own) return own->force(stream, a, candidate->id - own->first_id, err);
    if (plan->fuse_bias) {
        const cublasStatus_t lt = set_bias(plan->desc, a->bias);
        if (lt != CUBLAS_STATUS_SUCCESS) return lt_fail(err, "gemm: set bias", lt);
    }
    const float alpha = a->alpha, beta = plan->fuse_addend ? a->beta : 0.0f;
    const void *c = plan->fuse_addend ? a->y0 : a->y;
    const cublasStatus_t lt =
        cublasLtMatmul(state->handle, plan->desc, &alpha, a->w, plan->layout_w, a->x, plan->layout_x, &beta, c,
                       plan->layout_y, a->y, plan->layout_y, &candidate->algo, state->workspace,
                       RF_GEMM_WORKSPACE_BYTES, (cudaStream_t)rf_stream_native(stream));
    if (lt != CUBLAS_STATUS_SUCCESS)
        return rf_fail(err, RF_ERR_DEVICE, "gemm m %lld n %lld k %lld: cublasLtMatmul: %s", (long long)a->m,
                       (long long)a->n, (long long)a->k, cublasLtGetStatusName(lt));
    rf_stream_note_launch(stream, "gemm");
    return run_finish(stream, plan, a, err);
}

/* What this backend asks beyond rf_gemm_check. */
static rf_status check_cuda(const rf_gemm_args *a, rf_error *err) {
    if (a->dtype != RF_DTYPE_F32 && a->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "gemm: dtype %s, the CUDA backend takes f32 and bf16",
                       rf_dtype_name(a->dtype));
    if (a->y_dtype != RF_DTYPE_F32 && !(a->y_dtype == RF_DTYPE_BF16 && a->dtype == RF_DTYPE_BF16))
        return rf_fail(err, RF_ERR_DTYPE, "gemm: y dtype %s with %s inputs", rf_dtype_name(a->y_dtype),
                       rf_dtype_name(a->dtype));
    const int64_t v = a->dtype == RF_DTYPE_F32 ? 4 : 8;
    if (a->k % v != 0 || a->ldx % v != 0 || a->ldw % v != 0)
        return rf_fail(err, RF_ERR_SHAPE, "gemm: k %lld, ldx %lld, ldw %lld must be multiples of %lld for %s",
                       (long long)a->k, (long long)a->ldx, (long long)a->ldw, (long long)v, rf_dtype_name(a->dtype));
    const int64_t limit = INT32_MAX;
    if (a->m > limit || a->n > limit || a->k > limit || a->num_batches > limit)
        return rf_fail(err, RF_ERR_SHAPE, "gemm: m, n, k and batches must be below 2^31");
    if (a->act != RF_ACT_NONE && has_addend(a) && a->y0 == a->y)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "gemm: an activation together with an in-place addend");
    return RF_OK;
}

extern "C" rf_status rf_gemm_cuda(rf_stream *stream, const rf_gemm_args *args, rf_error *err) {
    rf_status st = rf_gemm_check(args, err);
    if (st != RF_OK) return st;
    st = check_cuda(args, err);
    if (st != RF_OK || !stream) return st;
    st = rf_gemm_check_run(args, err);
    if (st != RF_OK || args->m == 0 || args->num_batches == 0) return st;

    rf_gemm_state *state = NULL;
    st = rf_gemm_state_get(&state, stream, err);
    if (st != RF_OK) return st;
    const rf_gemm_key key = make_key(args);
    rf_gemm_plan *plan = state->slots[find_slot(state->slots, state->num_slots, &key)];
    const bool may_plan = rf_stream_get_phase(stream) == RF_PHASE_PLAN;
    if (!plan || !plan->ready || (state->tune && !plan->tuned && may_plan && !is_capturing(stream))) {
        if (!may_plan || is_capturing(stream))
            return rf_fail(err, RF_ERR_STATE,
                           "gemm m %lld n %lld k %lld %s -> %s: no algorithm was chosen in phase PLAN",
                           (long long)args->m, (long long)args->n, (long long)args->k, rf_dtype_name(args->dtype),
                           rf_dtype_name(args->y_dtype));
        plan = rf_gemm_plan_insert(state, &key);
        if (!plan) return rf_fail(err, RF_ERR_MEMORY, "gemm: no host memory for a plan");
        st = make_plan(state, stream, plan, args, err);
        if (st != RF_OK) return st;
    }
    return rf_gemm_plan_launch(state, stream, plan, &plan->choice, args, err);
}
