/* kernels/gemm_tune.cu - measures GEMM algorithms on the device, and keeps the choices in a text file.
 *
 * How a candidate is timed: a CUDA graph of several identical calls whose weights walk through a scratch region larger
 * than twice the L2 cache (in a forward every weight matrix comes from memory once), with one x and one y, which in a
 * forward are warm. All operands are random: zeros make a GPU run faster than it does in use. Two rounds over all
 * candidates, median of the replays; times within 2 % are ties and the earlier candidate wins, since a choice inside the
 * noise would differ from process to process.
 * What drops a candidate: an error, output bits that differ between two runs, or a result that differs from the first
 * candidate's by more than rounding can explain.
 * The file: see save below. A line is only used by the same card and the same cuBLASLt version. */
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "kernels/gemm_plan.h"
#include "kernels/launch.cuh"

#define MAX_REPLAYS 5            /* per round */
#define COLD_BYTES  (100u << 20) /* twice the L2 of an H100 */

/* --- scratch operands ----------------------------------------------------------------------------------------------- */

/* Uniform in [-1, 1) from a hash of the index: reproducible, no zeros to speak of. */
template <typename T> static __global__ void fill_kernel(T *out, int64_t num, uint32_t seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < num; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 0x9e3779b9u ^ (uint32_t)(i >> 32) ^ seed;
        h = (h ^ (h >> 16)) * 0x85ebca6bu;
        h = (h ^ (h >> 13)) * 0xc2b2ae35u;
        h ^= h >> 16;
        out[i] = (T)((float)(int32_t)h * 4.6566129e-10f);
    }
}

typedef struct {
    double diff2, ref2;          /* sum (a-b)^2, sum b^2 */
    unsigned long long num_diff; /* elements whose bits differ */
} comparison;

/* The order of the atomic sums varies; only thresholds far above rounding are taken from them. */
template <typename T> static __global__ void compare_kernel(const T *a, const T *b, int64_t num, comparison *out) {
    double diff2 = 0.0, ref2 = 0.0;
    unsigned long long num_diff = 0;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < num; i += (int64_t)gridDim.x * blockDim.x) {
        const float u = (float)a[i], v = (float)b[i];
        diff2 += (double)(u - v) * (u - v);
        ref2 += (double)v * v;
        num_diff += u != v;
    }
    atomicAdd(&out->diff2, diff2);
    atomicAdd(&out->ref2, ref2);
    atomicAdd(&out->num_diff, num_diff);
}

typedef struct {
    char *base; /* one device allocation; everything below points into it */
    char *x, *y, *y_again, *y_first, *y0, *bias, *w;
    comparison *result; /* device */
    size_t y_bytes;
    size_t w_step;  /* bytes between two copies of w */
    int num_copies; /* of w */
} scratch;

static size_t round_up(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

/* Bytes from the first to the last element of a strided batch of matrices. */
static size_t span_bytes(int64_t rows, int64_t cols, int64_t ld, int64_t num_batches, int64_t stride, rf_dtype dtype) {
    return (size_t)((num_batches - 1) * stride + (rows - 1) * ld + cols) * rf_dtype_bytes(dtype);
}

static rf_status fill(rf_stream *stream, void *out, rf_dtype dtype, size_t bytes, uint32_t seed, rf_error *err) {
    if (dtype == RF_DTYPE_F32)
        return rf_launch(stream, "gemm_tune_fill", err, fill_kernel<float>, 1024, 256, 0, (float *)out,
                         (int64_t)(bytes / 4), seed);
    return rf_launch(stream, "gemm_tune_fill", err, fill_kernel<__nv_bfloat16>, 1024, 256, 0, (__nv_bfloat16 *)out,
                     (int64_t)(bytes / 2), seed);
}

static rf_status make_scratch(scratch *s, rf_gemm_state *state, rf_stream *stream, const rf_gemm_args *a,
                              rf_error *err) {
    const cudaStream_t cs = (cudaStream_t)rf_stream_native(stream);
    const size_t x_bytes = span_bytes(a->m, a->k, a->ldx, a->num_batches, a->x_batch_stride, a->dtype);
    const size_t w_bytes = span_bytes(a->w_is_kn ? a->k : a->n, a->w_is_kn ? a->n : a->k, a->ldw, a->num_batches,
                                      a->w_batch_stride, a->dtype);
    const size_t bias_bytes = (size_t)a->n * rf_dtype_bytes(a->y_dtype);
    memset(s, 0, sizeof *s);
    s->y_bytes = span_bytes(a->m, a->n, a->ldy, a->num_batches, a->y_batch_stride, a->y_dtype);
    s->w_step = round_up(w_bytes);
    s->num_copies = s->w_step >= COLD_BYTES ? 1 : (int)((COLD_BYTES + s->w_step - 1) / s->w_step);
    if (s->num_copies > 40) s->num_copies = 40;
    const size_t total =
        round_up(x_bytes) + 4 * round_up(s->y_bytes) + round_up(bias_bytes) + 256 + s->w_step * (size_t)s->num_copies;
    rf_status st = rf_backend_alloc(state->backend, (void **)&s->base, total, err);
    if (st != RF_OK) return st;
    char *p = s->base;
    s->result = (comparison *)p, p += 256;
    s->x = p, p += round_up(x_bytes);
    s->y = p, p += round_up(s->y_bytes);
    s->y_again = p, p += round_up(s->y_bytes);
    s->y_first = p, p += round_up(s->y_bytes);
    s->y0 = p, p += round_up(s->y_bytes);
    s->bias = p, p += round_up(bias_bytes);
    s->w = p;
    /* One fill for all copies of w keeps every copy different. What lies between y's rows stays equal: zeros. */
    if (cudaMemsetAsync(s->y, 0, 3 * round_up(s->y_bytes), cs) != cudaSuccess)
        return rf_cuda_fail(err, "gemm tuning", cudaGetLastError());
    st = fill(stream, s->x, a->dtype, x_bytes, 1, err);
    if (st == RF_OK) st = fill(stream, s->w, a->dtype, s->w_step * (size_t)s->num_copies, 2, err);
    if (st == RF_OK) st = fill(stream, s->y0, a->y_dtype, s->y_bytes, 3, err);
    if (st == RF_OK) st = fill(stream, s->bias, a->y_dtype, bias_bytes, 4, err);
    if (st != RF_OK) return st;
    const cudaError_t e = cudaStreamSynchronize(cs); /* the args may say that w is constant: from here on it is */
    return e == cudaSuccess ? RF_OK : rf_cuda_fail(err, "gemm tuning", e);
}

/* The caller's args on scratch operands, with the copy-th weights. */
static rf_gemm_args scratch_args(const scratch *s, const rf_gemm_args *a, void *y, int copy) {
    rf_gemm_args out = *a;
    out.x = s->x;
    out.w = s->w + s->w_step * (size_t)(copy % s->num_copies);
    out.bias = a->bias ? s->bias : NULL;
    out.y0 = a->y0 ? s->y0 : NULL;
    out.y = y;
    return out;
}

static rf_status compare(comparison *out, const scratch *s, rf_stream *stream, rf_dtype dtype, const void *a,
                         const void *b, rf_error *err) {
    const cudaStream_t cs = (cudaStream_t)rf_stream_native(stream);
    cudaError_t e = cudaMemsetAsync(s->result, 0, sizeof *out, cs);
    if (e != cudaSuccess) return rf_cuda_fail(err, "gemm tuning", e);
    const rf_status st =
        dtype == RF_DTYPE_F32
            ? rf_launch(stream, "gemm_tune_compare", err, compare_kernel<float>, 512, 256, 0, (const float *)a,
                        (const float *)b, (int64_t)(s->y_bytes / 4), s->result)
            : rf_launch(stream, "gemm_tune_compare", err, compare_kernel<__nv_bfloat16>, 512, 256, 0,
                        (const __nv_bfloat16 *)a, (const __nv_bfloat16 *)b, (int64_t)(s->y_bytes / 2), s->result);
    if (st != RF_OK) return st;
    e = cudaMemcpyAsync(out, s->result, sizeof *out, cudaMemcpyDeviceToHost, cs);
    if (e == cudaSuccess) e = cudaStreamSynchronize(cs);
    return e == cudaSuccess ? RF_OK : rf_cuda_fail(err, "gemm tuning", e);
}

/* --- candidates ----------------------------------------------------------------------------------------------------- */

/* Tiles (features x tokens) that fill the card for widths that are multiples of 72 and that the heuristic rarely lists. */
static const uint32_t extra_tiles[] = {
    CUBLASLT_MATMUL_TILE_72x128,  CUBLASLT_MATMUL_TILE_112x128, CUBLASLT_MATMUL_TILE_144x128,
    CUBLASLT_MATMUL_TILE_144x256, CUBLASLT_MATMUL_TILE_64x72,   CUBLASLT_MATMUL_TILE_64x144,
    CUBLASLT_MATMUL_TILE_128x72,  CUBLASLT_MATMUL_TILE_128x112, CUBLASLT_MATMUL_TILE_128x144,
};
#define NUM_EXTRA_TILES (int)(sizeof extra_tiles / sizeof extra_tiles[0])

/* The best three heuristic results with another tile, where cuBLASLt says the combination is valid. */
static int add_tile_variants(rf_gemm_state *state, const rf_gemm_plan *plan, rf_gemm_candidate *list, int num,
                             int max) {
    const int num_bases = num < 3 ? num : 3;
    for (int base = 0; base < num_bases; base++) {
        for (int t = 0; t < NUM_EXTRA_TILES && num < max; t++) {
            rf_gemm_candidate c = list[base];
            cublasLtMatmulHeuristicResult_t result;
            uint32_t tile = 0;
            size_t written = 0;
            if (cublasLtMatmulAlgoConfigGetAttribute(&c.algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile,
                                                     &written) != CUBLAS_STATUS_SUCCESS ||
                tile == extra_tiles[t])
                continue;
            if (cublasLtMatmulAlgoConfigSetAttribute(&c.algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &extra_tiles[t],
                                                     sizeof extra_tiles[t]) != CUBLAS_STATUS_SUCCESS)
                continue;
            memset(&result, 0, sizeof result);
            if (cublasLtMatmulAlgoCheck(state->handle, plan->desc, plan->layout_w, plan->layout_x, plan->layout_y,
                                        plan->layout_y, &c.algo, &result) != CUBLAS_STATUS_SUCCESS ||
                result.workspaceSize > RF_GEMM_WORKSPACE_BYTES)
                continue;
            c.id = 100 + base * NUM_EXTRA_TILES + t;
            list[num++] = c;
        }
    }
    return num;
}

static int add_own_kernels(rf_stream *stream, const rf_gemm_args *a, rf_gemm_candidate *list, int num, int max) {
    for (int i = 0; i < RF_GEMM_NUM_OWN_KERNELS; i++) {
        const rf_gemm_own_kernel *own = rf_gemm_own_kernel_at(i);
        for (int config = 0; config < own->num_configs() && num < max; config++) {
            if (own->check(stream, a, config, NULL) != RF_OK) continue;
            memset(&list[num], 0, sizeof list[num]);
            list[num++].id = own->first_id + config;
        }
    }
    return num;
}

/* Of a candidate's kernel: "" if it is cuBLASLt's. */
static const char *own_name(int id) {
    const rf_gemm_own_kernel *own = rf_gemm_own_kernel_of(id);
    return own ? own->config_name(id - own->first_id) : "";
}

static bool id_exists(long id) {
    return id >= 0 && id <= INT_MAX && (id < RF_GEMM_WGMMA_ID || rf_gemm_own_kernel_of((int)id));
}

/* --- timing --------------------------------------------------------------------------------------------------------- */

typedef struct {
    cudaGraphExec_t graph;
    float ms[2 * MAX_REPLAYS]; /* per replay of the whole graph */
    int num_times;
    bool dropped;
} trial;

static int compare_floats(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static float median(const trial *t) {
    float sorted[2 * MAX_REPLAYS];
    memcpy(sorted, t->ms, sizeof sorted);
    qsort(sorted, (size_t)t->num_times, sizeof sorted[0], compare_floats);
    return sorted[t->num_times / 2];
}

/* Runs the candidate twice, compares, and keeps its output as the reference if it is the first good one. */
static rf_status try_candidate(bool *good, rf_gemm_state *state, rf_stream *stream, const rf_gemm_plan *plan,
                               const rf_gemm_args *a, const rf_gemm_candidate *c, const scratch *s, bool *have_first,
                               rf_error *err) {
    const cudaStream_t cs = (cudaStream_t)rf_stream_native(stream);
    const rf_log *log = rf_backend_log(state->backend);
    const rf_gemm_args once = scratch_args(s, a, s->y, 0), again = scratch_args(s, a, s->y_again, 0);
    rf_error why;
    comparison bits, first;
    *good = false;
    memset(&why, 0, sizeof why);
    if (rf_gemm_plan_launch(state, stream, plan, c, &once, &why) != RF_OK ||
        rf_gemm_plan_launch(state, stream, plan, c, &again, &why) != RF_OK) {
        rf_log_write(log, RF_LOG_DEBUG, "gemm tuning: candidate %d dropped: %s", c->id, why.message);
        (void)cudaGetLastError();
        return RF_OK;
    }
    rf_status st = compare(&bits, s, stream, a->y_dtype, s->y, s->y_again, err);
    if (st != RF_OK) return st;
    if (!*have_first) {
        if (cudaMemcpyAsync(s->y_first, s->y, s->y_bytes, cudaMemcpyDeviceToDevice, cs) != cudaSuccess)
            return rf_cuda_fail(err, "gemm tuning", cudaGetLastError());
        *have_first = true;
    }
    st = compare(&first, s, stream, a->y_dtype, s->y, s->y_first, err);
    if (st != RF_OK) return st;
    /* Two correct results differ by about one rounding of y: 2^-9 relative in bf16. */
    const double bound = a->y_dtype == RF_DTYPE_F32 ? 1e-4 : 1e-2;
    if (bits.num_diff != 0 || !(first.diff2 <= bound * bound * first.ref2)) {
        rf_log_write(log, RF_LOG_WARN, "gemm m %lld n %lld k %lld: candidate %d dropped: %s", (long long)a->m,
                     (long long)a->n, (long long)a->k, c->id,
                     bits.num_diff ? "two runs differ" : "result differs from the first candidate's");
        return RF_OK;
    }
    *good = true;
    return RF_OK;
}

static rf_status capture(cudaGraphExec_t *out, rf_gemm_state *state, rf_stream *stream, const rf_gemm_plan *plan,
                         const rf_gemm_args *a, const rf_gemm_candidate *c, const scratch *s, int num_calls,
                         rf_error *err) {
    const cudaStream_t cs = (cudaStream_t)rf_stream_native(stream);
    cudaGraph_t graph = NULL;
    rf_status st = RF_OK;
    *out = NULL;
    cudaError_t e = cudaStreamBeginCapture(cs, cudaStreamCaptureModeThreadLocal);
    if (e != cudaSuccess) return rf_cuda_fail(err, "gemm tuning: capture", e);
    for (int i = 0; i < num_calls && st == RF_OK; i++) {
        const rf_gemm_args call = scratch_args(s, a, s->y, i);
        st = rf_gemm_plan_launch(state, stream, plan, c, &call, err);
    }
    e = cudaStreamEndCapture(cs, &graph);
    if (st == RF_OK && e == cudaSuccess) e = cudaGraphInstantiate(out, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (st == RF_OK && e != cudaSuccess) st = rf_cuda_fail(err, "gemm tuning: graph", e);
    if (e != cudaSuccess) (void)cudaGetLastError();
    return st;
}

rf_status rf_gemm_tune(rf_gemm_state *state, rf_stream *stream, rf_gemm_plan *plan, const rf_gemm_args *a,
                       rf_gemm_candidate *list, int num, rf_error *err) {
    const cudaStream_t cs = (cudaStream_t)rf_stream_native(stream);
    trial trials[RF_GEMM_MAX_CANDIDATES];
    cudaEvent_t begin = NULL, end = NULL;
    bool have_first = false;
    scratch s;
    memset(trials, 0, sizeof trials);

    rf_status st = make_scratch(&s, state, stream, a, err);
    if (st == RF_ERR_DEVICE_MEMORY) {
        rf_log_write(rf_backend_log(state->backend), RF_LOG_WARN,
                     "gemm m %lld n %lld k %lld: no device memory to tune with, keeping the heuristic's choice",
                     (long long)a->m, (long long)a->n, (long long)a->k);
        return RF_OK;
    }
    if (st != RF_OK) goto done;
    if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess) {
        st = rf_cuda_fail(err, "gemm tuning", cudaGetLastError());
        goto done;
    }
    {
        int room = RF_GEMM_MAX_CANDIDATES;
        for (int i = 0; i < RF_GEMM_NUM_OWN_KERNELS; i++) room -= rf_gemm_own_kernel_at(i)->num_configs();
        num = add_tile_variants(state, plan, list, num, room);
    }
    num = add_own_kernels(stream, a, list, num, RF_GEMM_MAX_CANDIDATES);

    {
        /* As many calls as there are weights, fewer where one call is long enough by itself. */
        const double flop = 2.0 * (double)a->m * (double)a->n * (double)a->k * (double)a->num_batches;
        int num_calls = s.num_copies < 10 ? 10 : s.num_copies;
        if (flop > 3e10) num_calls = 4;
        const int num_replays = flop > 3e11 ? 2 : MAX_REPLAYS;
        float best = INFINITY;

        for (int i = 0; i < num && st == RF_OK; i++) {
            bool good = false;
            st = try_candidate(&good, state, stream, plan, a, &list[i], &s, &have_first, err);
            if (st == RF_OK && good) {
                rf_error why;
                if (capture(&trials[i].graph, state, stream, plan, a, &list[i], &s, num_calls, &why) != RF_OK) {
                    rf_log_write(rf_backend_log(state->backend), RF_LOG_WARN, "gemm candidate %d dropped: %s",
                                 list[i].id, why.message);
                    good = false;
                }
            }
            trials[i].dropped = !good;
        }
        for (int round = 0; round < 2 && st == RF_OK; round++) {
            for (int i = 0; i < num && st == RF_OK; i++) {
                trial *t = &trials[i];
                if (t->dropped) continue;
                if (round == 1 && median(t) > 1.3f * best) continue; /* no second look at what is far behind */
                cudaError_t e = cudaSuccess;
                for (int r = -1; r < num_replays && e == cudaSuccess; r++) { /* the first one warms up */
                    float ms = 0.0f;
                    e = cudaEventRecord(begin, cs);
                    if (e == cudaSuccess) e = cudaGraphLaunch(t->graph, cs);
                    if (e == cudaSuccess) e = cudaEventRecord(end, cs);
                    if (e == cudaSuccess) e = cudaEventSynchronize(end);
                    if (e == cudaSuccess) e = cudaEventElapsedTime(&ms, begin, end);
                    if (e == cudaSuccess && r >= 0) t->ms[t->num_times++] = ms;
                }
                if (e != cudaSuccess)
                    st = rf_fail(err, RF_ERR_DEVICE, "gemm m %lld n %lld k %lld: candidate %d: %s", (long long)a->m,
                                 (long long)a->n, (long long)a->k, list[i].id, cudaGetErrorString(e));
                else if (median(t) < best)
                    best = median(t);
            }
        }
        if (st != RF_OK) goto done;

        int chosen = -1, fastest = -1, fastest_lt = -1, num_good = 0;
        for (int i = 0; i < num; i++) {
            if (trials[i].dropped) continue;
            num_good++;
            if (fastest < 0 || median(&trials[i]) < median(&trials[fastest])) fastest = i;
            if (list[i].id < RF_GEMM_WGMMA_ID && (fastest_lt < 0 || median(&trials[i]) < median(&trials[fastest_lt])))
                fastest_lt = i;
        }
        for (int i = 0; i < num && fastest >= 0 && chosen < 0; i++)
            if (!trials[i].dropped && median(&trials[i]) <= 1.02f * median(&trials[fastest])) chosen = i;
        if (chosen < 0) {
            st = rf_fail(err, RF_ERR_UNSUPPORTED, "gemm m %lld n %lld k %lld: no candidate gives the same bits twice",
                         (long long)a->m, (long long)a->n, (long long)a->k);
            goto done;
        }
        plan->choice = list[chosen];
        plan->us = 1000.0 * median(&trials[chosen]) / num_calls;
        plan->tuned = true;
        state->changed = true;
        const bool own = list[chosen].id >= RF_GEMM_WGMMA_ID;
        rf_log_write(
            rf_backend_log(state->backend), RF_LOG_INFO,
            "gemm m %lld n %lld k %lld act %d: %s %d%s%s, %.2f us (cuBLASLt's first choice %.2f us, its best %.2f us, "
            "%d of %d usable)",
            (long long)a->m, (long long)a->n, (long long)a->k, (int)a->act, own ? "own kernel" : "cuBLASLt",
            list[chosen].id, own ? " " : "", own_name(list[chosen].id), plan->us,
            trials[0].dropped ? 0.0 : 1000.0 * median(&trials[0]) / num_calls,
            fastest_lt < 0 ? 0.0 : 1000.0 * median(&trials[fastest_lt]) / num_calls, num_good, num);
    }
done:
    (void)cudaStreamSynchronize(cs); /* the scratch is freed next */
    for (int i = 0; i < RF_GEMM_MAX_CANDIDATES; i++)
        if (trials[i].graph) cudaGraphExecDestroy(trials[i].graph);
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    rf_backend_free(state->backend, s.base);
    return st;
}

/* --- the file --------------------------------------------------------------------------------------------------------
 * refrain-gemm-tuning 1
 * cublaslt <version>
 * card <name to the end of the line>
 * gemm <20 key fields> <id> <us> <algo as 128 hex digits>          one line per choice */

static const char file_magic[] = "refrain-gemm-tuning 1";

static bool is_cuda(const rf_stream *stream) {
    return rf_backend_get_kind(rf_stream_backend(stream)) == RF_BACKEND_CUDA;
}

extern "C" rf_status rf_gemm_set_tuning(rf_stream *stream, bool tune, rf_error *err) {
    rf_gemm_state *state = NULL;
    if (!is_cuda(stream)) return RF_OK;
    const rf_status st = rf_gemm_state_get(&state, stream, err);
    if (st == RF_OK) state->tune = tune;
    return st;
}

extern "C" bool rf_gemm_tuning_changed(const rf_stream *stream) {
    const rf_gemm_state *state = is_cuda(stream) ? (const rf_gemm_state *)rf_stream_get_kernel_state(stream) : NULL;
    return state && state->changed;
}

static int hex_value(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* One "gemm" line after its first word. False if it is not one. */
static bool parse_line(const char *p, rf_gemm_key *key, rf_gemm_candidate *choice, double *us) {
    char *end;
    memset(key, 0, sizeof *key);
    memset(choice, 0, sizeof *choice);
    for (int i = 0; i < RF_GEMM_KEY_FIELDS; i++) {
        key->v[i] = strtoll(p, &end, 10);
        if (end == p) return false;
        p = end;
    }
    const long id = strtol(p, &end, 10);
    if (end == p || !id_exists(id)) return false;
    choice->id = (int)id;
    p = end;
    *us = strtod(p, &end);
    if (end == p || *end != ' ') return false;
    p = end + 1;
    unsigned char *bytes = (unsigned char *)&choice->algo;
    for (size_t i = 0; i < sizeof choice->algo; i++) {
        const int hi = hex_value(p[0]), lo = hi < 0 ? -1 : hex_value(p[1]);
        if (lo < 0) return false;
        bytes[i] = (unsigned char)(hi * 16 + lo);
        p += 2;
    }
    return *p == '\0';
}

extern "C" rf_status rf_gemm_tuning_load(rf_stream *stream, const char *path, rf_error *err) {
    rf_gemm_state *state = NULL;
    char *text = NULL;
    size_t text_bytes = 0;
    char card[32 + sizeof state->card], version[64];
    int line_number = 0, num_loaded = 0;
    if (!is_cuda(stream) || !rf_path_exists(path)) return RF_OK;
    rf_status st = rf_gemm_state_get(&state, stream, err);
    if (st != RF_OK) return st;
    st = rf_file_read(path, 16u << 20, &text, &text_bytes, err);
    if (st != RF_OK) return st;
    const rf_log *log = rf_backend_log(state->backend);
    snprintf(version, sizeof version, "cublaslt %zu", state->version);
    snprintf(card, sizeof card, "card %s", state->card);

    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        line_number++;
        const char *want = line_number == 1 ? file_magic : line_number == 2 ? version : line_number == 3 ? card : NULL;
        if (want) {
            if (strcmp(line, want) == 0) continue;
            rf_log_write(log, RF_LOG_WARN, "%s: ignored: line %d is '%.80s', here it is '%s'", path, line_number, line,
                         want);
            goto done;
        }
        rf_gemm_key key;
        rf_gemm_candidate choice;
        double us = 0.0;
        if (strncmp(line, "gemm ", 5) != 0 || !parse_line(line + 5, &key, &choice, &us)) {
            st = rf_fail(err, RF_ERR_FORMAT, "%s: line %d is not a GEMM choice", path, line_number);
            goto done;
        }
        rf_gemm_plan *plan = rf_gemm_plan_insert(state, &key);
        if (!plan) {
            st = rf_fail(err, RF_ERR_MEMORY, "gemm: no host memory for a plan");
            goto done;
        }
        if (plan->ready) continue; /* in use already; the descriptors belong to the present choice */
        plan->choice = choice;
        plan->us = us;
        plan->tuned = true;
        num_loaded++;
    }
    state->changed = false;
    rf_log_write(log, RF_LOG_INFO, "%s: %d GEMM choices", path, num_loaded);
done:
    rf_free(text);
    return st;
}

extern "C" rf_status rf_gemm_tuning_save(rf_stream *stream, const char *path, rf_error *err) {
    rf_gemm_state *state = is_cuda(stream) ? (rf_gemm_state *)rf_stream_get_kernel_state(stream) : NULL;
    rf_file_writer *w = NULL;
    char buffer[1024];
    if (!state) return RF_OK;
    rf_status st = rf_file_writer_open(&w, path, err);
    if (st != RF_OK) return st;
    int len = snprintf(buffer, sizeof buffer, "%s\ncublaslt %zu\ncard %s\n", file_magic, state->version, state->card);
    rf_file_writer_write(w, buffer, (size_t)len);
    for (size_t i = 0; i < state->num_slots; i++) {
        const rf_gemm_plan *plan = state->slots[i];
        if (!plan || !plan->tuned) continue;
        len = snprintf(buffer, sizeof buffer, "gemm");
        for (int f = 0; f < RF_GEMM_KEY_FIELDS; f++)
            len += snprintf(buffer + len, sizeof buffer - (size_t)len, " %lld", (long long)plan->key.v[f]);
        len += snprintf(buffer + len, sizeof buffer - (size_t)len, " %d %.3f ", plan->choice.id, plan->us);
        const unsigned char *bytes = (const unsigned char *)&plan->choice.algo;
        for (size_t b = 0; b < sizeof plan->choice.algo; b++)
            len += snprintf(buffer + len, sizeof buffer - (size_t)len, "%02x", bytes[b]);
        buffer[len++] = '\n';
        rf_file_writer_write(w, buffer, (size_t)len);
    }
    st = rf_file_writer_commit(w, err);
    if (st == RF_OK) state->changed = false;
    return st;
}
