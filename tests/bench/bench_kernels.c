/* tests/bench/bench_kernels.c - times operators on a backend. Not a test: nothing gates on it.
 *
 *   bench_kernels [--device cpu|cuda|cuda:N] [--dtype f32|bf16] [-t threads] [-r repeats] [-o md|jsonl]
 *       [--what gemm|attention|attention-decode|norm|conv|layer|all|gemm-tiles|gemm-skinny|gemm-text|
 *        gemm-text-tuned|attention-plans|attention-prefill]
 *
 * CUDA  at least 20 calls are captured in one graph; a GEMM's calls rotate over copies of its weights that together pass
 *       100 MB, so that weights come from memory as they do in a model. A figure is the median of the replays (default
 *       15) divided by the calls. dtype bf16 unless said otherwise.
 * CPU   one call at a time, f32; work above 25 GFLOP a call is left out and named on stderr.
 * Floor the larger of FLOP / 722 TFLOP/s and bytes / 2985 GB/s: a large GEMM's rate and a copy's rate on an H100 80 GB.
 *       Bytes count each operand once. Shown for CUDA only.
 * attention-decode: few query rows against long caches, with keys that rotate as a GEMM's weights do.
 * attention-prefill (not part of all): many query rows against a cache, with lengths and masks, by kernel; FLOP and bytes are
 *       those of the keys that are seen.
 * attention-plans (not part of all): some of these with every share of the keys over blocks that the kernel knows.
 * gemm-tiles (not part of all): the layers of DiT-XL/2 with the operator and with every tile of the own Hopper GEMM, one
 *       row a shape, microseconds; 10 calls or once over all weights a graph, 7 replays.
 * gemm-skinny (not part of all): the layers of a world model's frame at several rows with cuBLASLt's first choice (first),
 *       the tuned operator and every config of the own kernel for few rows, weights constant; then 12 layers of qkv, out, fc1
 *       and fc2, each reading what the one before wrote.
 * gemm-text (not part of all): the layers and heads of language models at 1, 4, 32 and 64 rows, weights rotated over
 *       150 MB: cuBLASLt's first choice, the operator without tuning and every config of the own kernels that takes the
 *       shape (GB/s are the weights'); then whole layers, each GEMM reading what the one before wrote. gemm-text-tuned:
 *       the tuned operator too, minutes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/attention_decode.h"
#include "kernels/gemm_skinny.h"
#include "kernels/gemm_stream.h"
#include "kernels/gemm_wgmma.h"
#include "kernels/gemv.h"
#include "kernels/ops.h"

#define PEAK_FLOPS    722e12
#define PEAK_BYTES    2985e9
#define ROTATE_BYTES  100e6
#define MAX_COPIES    64
#define MIN_CALLS     20
#define MAX_CPU_FLOPS 25e9
#define MAX_BUFFERS   512
#define MAX_REPEATS   1000

typedef struct bench bench;
typedef rf_status (*bench_call)(bench *b, int copy, rf_error *err); /* queues one call */

struct bench {
    rf_backend *backend;
    rf_stream *stream;
    const rf_ops *ops;
    rf_dtype dtype;
    int repeats, min_calls; /* replays; calls in a graph */
    bool jsonl, cuda;
    int num_rows_printed;
    void *buffers[MAX_BUFFERS];
    int num_buffers;
    double times[MAX_REPEATS];

    /* the item being timed */
    int copies;
    rf_gemm_args gemm[MAX_COPIES];
    int gemm_config;      /* of call_gemm_tile, call_gemm_skinny, call_gemm_own */
    int own_kernel;       /* of call_gemm_own */
    int cluster, splits;  /* of call_attention_plan */
    int layer_configs[4]; /* of call_skinny_layers; -1: the operator */
    rf_attention_args attention;
    rf_attention_merge_args merge;
    rf_attention_args attentions[MAX_COPIES]; /* of call_attention_copy: each with keys of its own */
    rf_norm_args norm;
    rf_residual_args residual;
    rf_group_norm_args group_norm;
    rf_conv2d_args conv;
    rf_gemm_args layer_gemms[4]; /* qkv, proj, fc1, fc2 */
};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void fail(const char *what, const rf_error *err) {
    fprintf(stderr, "bench_kernels: %s: %s\n", what, err->message);
    exit(1);
}

static void *take(bench *b, size_t bytes) {
    rf_error err = {0};
    void *p = NULL;
    if (bytes == 0) return NULL;
    if (b->num_buffers == MAX_BUFFERS) {
        rf_fail(&err, RF_ERR_MEMORY, "more than %d buffers", MAX_BUFFERS);
        fail("memory", &err);
    }
    if (rf_backend_alloc(b->backend, &p, bytes, &err) != RF_OK) fail("memory", &err);
    b->buffers[b->num_buffers++] = p;
    if (rf_stream_zero(b->stream, p, bytes, &err) != RF_OK) fail("memory", &err);
    return p;
}

static void *take_normal(bench *b, rf_dtype dtype, int64_t num, float std) {
    rf_error err = {0};
    void *p = take(b, (size_t)num * rf_dtype_bytes(dtype));
    rf_fill_normal_args f = {
        .out = p, .dtype = dtype, .num = num, .seed = 1, .key = (uint64_t)b->num_buffers, .std = std};
    if (b->ops->fill_normal(b->stream, &f, &err) != RF_OK) fail("fill_normal", &err);
    return p;
}

static void release(bench *b) {
    rf_error err = {0};
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    for (int i = 0; i < b->num_buffers; i++) rf_backend_free(b->backend, b->buffers[i]);
    b->num_buffers = 0;
    b->copies = 1;
}

/* Seconds of one call: median over repeats. */
static rf_status time_calls(bench *b, bench_call call, double *seconds, rf_error *err) {
    rf_status st = RF_OK;
    rf_stream_set_phase(b->stream, RF_PHASE_PLAN);
    for (int i = 0; i < b->copies && st == RF_OK; i++) st = call(b, i, err);
    if (st == RF_OK) st = rf_stream_synchronize(b->stream, err);
    if (st != RF_OK) return st;
    rf_stream_set_phase(b->stream, RF_PHASE_RUN);

    rf_graph *graph = NULL;
    int calls = 1;
    if (b->cuda) {
        calls = (b->min_calls + b->copies - 1) / b->copies * b->copies;
        st = rf_graph_begin(b->stream, err);
        for (int i = 0; i < calls && st == RF_OK; i++) st = call(b, i % b->copies, err);
        if (st == RF_OK) st = rf_graph_end(&graph, b->stream, err);
        for (int i = 0; i < 3 && st == RF_OK; i++) st = rf_graph_launch(graph, b->stream, err);
        if (st == RF_OK) st = rf_stream_synchronize(b->stream, err);
    }
    for (int r = 0; r < b->repeats && st == RF_OK; r++) {
        if (b->cuda) {
            double ms = 0;
            st = rf_stream_mark(b->stream, 0, err);
            if (st == RF_OK) st = rf_graph_launch(graph, b->stream, err);
            if (st == RF_OK) st = rf_stream_mark(b->stream, 1, err);
            if (st == RF_OK) st = rf_stream_synchronize(b->stream, err);
            if (st == RF_OK) st = rf_stream_elapsed_ms(b->stream, 0, 1, &ms, err);
            b->times[r] = ms * 1e-3 / calls;
        } else {
            double start = now_s();
            st = call(b, r % b->copies, err);
            b->times[r] = now_s() - start;
        }
    }
    rf_graph_destroy(graph);
    rf_stream_set_phase(b->stream, RF_PHASE_PLAN);
    if (st != RF_OK) return st;
    qsort(b->times, (size_t)b->repeats, sizeof b->times[0], by_value);
    *seconds = b->times[b->repeats / 2];
    return RF_OK;
}

/* name must not need escaping in JSON. */
static void report(bench *b, const char *name, bench_call call, double flops, double bytes) {
    rf_error err = {0};
    double s = 0;
    rf_status st = time_calls(b, call, &s, &err);
    if (st != RF_OK) {
        fprintf(stderr, "%s: %s: %s\n", name, rf_status_name(st), err.message);
        release(b);
        return;
    }
    double floor_s = flops / PEAK_FLOPS > bytes / PEAK_BYTES ? flops / PEAK_FLOPS : bytes / PEAK_BYTES;
    if (b->jsonl) {
        printf("{\"name\":\"%s\",\"device\":\"%s\",\"dtype\":\"%s\",\"us\":%.3f,\"min_us\":%.3f,\"tflops\":%.4f,"
               "\"gbps\":%.2f",
               name, rf_backend_name(b->backend), rf_dtype_name(b->dtype), s * 1e6, b->times[0] * 1e6,
               flops / s * 1e-12, bytes / s * 1e-9);
        if (b->cuda) printf(",\"floor_us\":%.3f", floor_s * 1e6);
        printf("}\n");
    } else {
        if (b->num_rows_printed++ == 0)
            printf("| %-52s | us         | TFLOP/s | GB/s   | floor us | of floor |\n"
                   "|------------------------------------------------------|-----------:|--------:|-------:|---------:|"
                   "---------:|\n",
                   b->cuda ? "operator" : "operator (CPU)");
        printf("| %-52s | %10.2f | %7.3f | %6.0f |", name, s * 1e6, flops / s * 1e-12, bytes / s * 1e-9);
        if (b->cuda)
            printf(" %8.2f | %7.0f%% |\n", floor_s * 1e6, 100 * floor_s / s);
        else
            printf("        - |        - |\n");
    }
    fflush(stdout);
    release(b);
}

/* True if this backend should not be asked for that much. */
static bool too_large(const bench *b, const char *name, double flops) {
    if (b->cuda || flops <= MAX_CPU_FLOPS) return false;
    fprintf(stderr, "%s: left out on the CPU, %.0f GFLOP a call\n", name, flops * 1e-9);
    return true;
}

/* ---- gemm ---- */

static rf_status call_gemm(bench *b, int copy, rf_error *err) {
    return b->ops->gemm(b->stream, &b->gemm[copy], err);
}

static void bench_gemm(bench *b) {
    static const struct {
        int64_t m, n, k;
        rf_act act;
        bool f32_out;
    } shapes[] = {
        /* the shipped DiT, batch 8 */
        {2048, 648, 216, RF_ACT_NONE, false},
        {2048, 216, 216, RF_ACT_NONE, false},
        {2048, 864, 216, RF_ACT_GELU_TANH, false},
        {2048, 216, 864, RF_ACT_NONE, false},
        /* DiT-XL/2 */
        {512, 3456, 1152, RF_ACT_NONE, false},
        {512, 1152, 1152, RF_ACT_NONE, false},
        {512, 4608, 1152, RF_ACT_GELU_TANH, false},
        {512, 1152, 4608, RF_ACT_NONE, false},
        {4096, 4608, 1152, RF_ACT_GELU_TANH, false},
        {4096, 1152, 4608, RF_ACT_NONE, false},
        {100, 193536, 1152, RF_ACT_NONE, false},
        /* open-oasis, one frame */
        {144, 3072, 1024, RF_ACT_NONE, false},
        {144, 1024, 1024, RF_ACT_NONE, false},
        {144, 4096, 1024, RF_ACT_GELU_TANH, false},
        {144, 1024, 4096, RF_ACT_NONE, false},
        /* 8B text models */
        {1024, 12288, 4096, RF_ACT_NONE, false},
        {32, 12288, 4096, RF_ACT_NONE, false},
        {32, 4096, 4096, RF_ACT_NONE, false},
        {32, 24576, 4096, RF_ACT_NONE, false},
        {32, 4096, 12288, RF_ACT_NONE, false},
        {1, 12288, 4096, RF_ACT_NONE, false},
        {32, 126464, 4096, RF_ACT_NONE, true},
        {1, 128256, 4096, RF_ACT_NONE, true},
        {8192, 8192, 8192, RF_ACT_NONE, false},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t m = shapes[i].m, n = shapes[i].n, k = shapes[i].k;
        double flops = 2.0 * (double)m * (double)n * (double)k;
        rf_dtype y_dtype = shapes[i].f32_out ? RF_DTYPE_F32 : b->dtype;
        double elem = (double)rf_dtype_bytes(b->dtype), w_bytes = (double)n * (double)k * elem;
        double bytes = w_bytes + (double)m * (double)k * elem + (double)m * (double)n * (double)rf_dtype_bytes(y_dtype);
        char name[96];
        snprintf(name, sizeof name, "gemm %lldx%lldx%lld%s%s", (long long)m, (long long)n, (long long)k,
                 shapes[i].act == RF_ACT_GELU_TANH ? " gelu" : "", shapes[i].f32_out ? " f32 out" : "");
        if (too_large(b, name, flops)) continue;
        int copies = b->cuda ? (int)(ROTATE_BYTES / w_bytes) + 1 : 1;
        b->copies = copies > MAX_COPIES ? MAX_COPIES : copies;
        void *x = take_normal(b, b->dtype, m * k, 1), *bias = take_normal(b, y_dtype, n, 1);
        void *y = take(b, (size_t)(m * n) * rf_dtype_bytes(y_dtype));
        for (int c = 0; c < b->copies; c++) {
            rf_gemm_args *g = &b->gemm[c];
            *g = rf_gemm_args_default(b->dtype, m, n, k);
            g->y_dtype = y_dtype;
            g->x = x;
            g->w = take_normal(b, b->dtype, n * k, 0.02f);
            g->bias = bias;
            g->y = y;
            g->act = shapes[i].act;
        }
        report(b, name, call_gemm, flops, bytes);
    }
}

/* ---- every tile of the own Hopper GEMM ---- */

#ifdef RF_HAVE_CUDA

static rf_status call_gemm_tile(bench *b, int copy, rf_error *err) {
    return rf_gemm_wgmma_force(b->stream, &b->gemm[copy], b->gemm_config, err);
}

static void bench_gemm_tiles(bench *b) {
    static const int64_t rows[] = {512, 2048, 4096, 16384};
    static const struct {
        int64_t n, k;
        rf_act act;
    } layers[] = {{3456, 1152, RF_ACT_NONE},
                  {1152, 1152, RF_ACT_NONE},
                  {4608, 1152, RF_ACT_GELU_TANH},
                  {1152, 4608, RF_ACT_NONE}};
    const int repeats = b->repeats, min_calls = b->min_calls, num_configs = rf_gemm_wgmma_num_configs();
    if (!b->cuda || b->dtype != RF_DTYPE_BF16) {
        fprintf(stderr, "gemm-tiles: CUDA and bf16 only\n");
        return;
    }
    b->repeats = 7;
    b->min_calls = 10;
    if (!b->jsonl) {
        printf("| %-21s | TFLOP/s | operator |", "gemm, us");
        for (int c = 0; c < num_configs; c++) printf(" %8s |", rf_gemm_wgmma_config_name(c));
        printf("\n|-----------------------|--------:|---------:|");
        for (int c = 0; c < num_configs; c++) printf("---------:|");
        printf("\n");
    }
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        for (size_t l = 0; l < sizeof layers / sizeof layers[0]; l++) {
            int64_t m = rows[r], n = layers[l].n, k = layers[l].k;
            double w_bytes = 2.0 * (double)n * (double)k, seconds = 0;
            char name[64];
            snprintf(name, sizeof name, "%lldx%lldx%lld%s", (long long)m, (long long)n, (long long)k,
                     layers[l].act == RF_ACT_GELU_TANH ? " gelu" : "");
            int copies = (int)(ROTATE_BYTES / w_bytes) + 1;
            b->copies = copies > MAX_COPIES ? MAX_COPIES : copies;
            void *x = take_normal(b, b->dtype, m * k, 1), *bias = take_normal(b, b->dtype, n, 1);
            void *y = take(b, (size_t)(m * n) * 2);
            for (int c = 0; c < b->copies; c++) {
                rf_gemm_args *g = &b->gemm[c];
                *g = rf_gemm_args_default(b->dtype, m, n, k);
                g->x = x;
                g->w = take_normal(b, b->dtype, n * k, 0.02f);
                g->bias = bias;
                g->y = y;
                g->act = layers[l].act;
            }
            for (int c = -1; c < num_configs; c++) { /* -1: the operator, tuned */
                rf_error err = {0};
                b->gemm_config = c;
                rf_status st = time_calls(b, c < 0 ? call_gemm : call_gemm_tile, &seconds, &err);
                if (st != RF_OK) fprintf(stderr, "%s: %s\n", name, err.message);
                double us = st == RF_OK ? seconds * 1e6 : -1.0;
                if (b->jsonl && c < 0)
                    printf("{\"name\":\"gemm %s\",\"device\":\"%s\",\"operator_us\":%.3f,\"tiles_us\":{", name,
                           rf_backend_name(b->backend), us);
                else if (b->jsonl)
                    printf("%s\"%s\":%.3f", c > 0 ? "," : "", rf_gemm_wgmma_config_name(c), us);
                else if (c < 0)
                    printf("| %-21s | %7.1f | %8.2f |", name,
                           st == RF_OK ? 2e-12 * (double)m * (double)n * (double)k / seconds : 0.0, us);
                else
                    printf(" %8.2f |", us);
                fflush(stdout);
            }
            printf(b->jsonl ? "}}\n" : "\n");
            fflush(stdout);
            release(b);
        }
    }
    b->repeats = repeats;
    b->min_calls = min_calls;
    fprintf(stderr, "gemm-tiles: done\n");
}

/* ---- every config of the own GEMM for few rows ---- */

static rf_status call_gemm_skinny(bench *b, int copy, rf_error *err) {
    return rf_gemm_skinny_force(b->stream, &b->gemm[copy], b->gemm_config, err);
}

static rf_status call_skinny_layers(bench *b, int copy, rf_error *err) {
    rf_status st = RF_OK;
    for (int i = 0; i < 4 && st == RF_OK; i++) {
        const rf_gemm_args *g = &b->gemm[4 * copy + i];
        st = b->layer_configs[i] < 0 ? b->ops->gemm(b->stream, g, err)
                                     : rf_gemm_skinny_force(b->stream, g, b->layer_configs[i], err);
    }
    return st;
}

#define SKINNY_LAYERS 12

static const struct {
    int64_t n, k;
    rf_act act;
} frame_layers[4] = {
    {3072, 1024, RF_ACT_NONE}, {1024, 1024, RF_ACT_NONE}, {4096, 1024, RF_ACT_GELU_TANH}, {1024, 4096, RF_ACT_NONE}};

/* Microseconds, or -1 with the reason on stderr. */
static double skinny_us(bench *b, bench_call call, const char *name) {
    rf_error err = {0};
    double seconds = 0;
    if (time_calls(b, call, &seconds, &err) == RF_OK) return seconds * 1e6;
    fprintf(stderr, "%s: %s\n", name, err.message);
    return -1.0;
}

/* With an empty table of plans: what another item tuned is not this one's first choice. */
static void renew_stream(bench *b) {
    rf_error err = {0};
    rf_stream_destroy(b->stream);
    b->stream = NULL;
    if (rf_stream_create(&b->stream, b->backend, &err) != RF_OK) fail("stream", &err);
}

static void set_tuning(bench *b, bool tune) {
    rf_error err = {0};
    if (rf_gemm_set_tuning(b->stream, tune, &err) != RF_OK) fail("tuning", &err);
}

static void bench_skinny_shape(bench *b, int64_t m, int layer) {
    int64_t n = frame_layers[layer].n, k = frame_layers[layer].k;
    int copies = (int)(ROTATE_BYTES / (2.0 * (double)n * (double)k)) + 1;
    char name[64];
    snprintf(name, sizeof name, "%lldx%lldx%lld", (long long)m, (long long)n, (long long)k);
    renew_stream(b);
    b->copies = copies > MAX_COPIES ? MAX_COPIES : copies;
    void *x = take_normal(b, b->dtype, m * k, 1), *bias = take_normal(b, b->dtype, n, 1);
    void *y = take(b, (size_t)(m * n) * 2);
    for (int c = 0; c < b->copies; c++) {
        rf_gemm_args *g = &b->gemm[c];
        *g = rf_gemm_args_default(b->dtype, m, n, k);
        g->x = x;
        g->w = take_normal(b, b->dtype, n * k, 0.02f);
        g->bias = bias;
        g->y = y;
        g->act = frame_layers[layer].act;
    }
    rf_error err = {0};
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    set_tuning(b, false);
    double first = skinny_us(b, call_gemm, name); /* w_is_constant is not set yet: cuBLASLt's */
    set_tuning(b, true);
    for (int c = 0; c < b->copies; c++) b->gemm[c].w_is_constant = true;
    int chosen = rf_gemm_skinny_default(b->stream, &b->gemm[0]);
    double operator_us = skinny_us(b, call_gemm, name);
    if (b->jsonl)
        printf("{\"name\":\"gemm %s\",\"device\":\"%s\",\"first_us\":%.3f,\"operator_us\":%.3f", name,
               rf_backend_name(b->backend), first, operator_us);
    else
        printf("| %-13s | %5.2f | %5.2f | %-8s |", name, first, operator_us,
               chosen < 0 ? "-" : rf_gemm_skinny_config_name(chosen));
    for (int c = 0; c < rf_gemm_skinny_num_configs(); c++) {
        int resident = 0, clusters = 0;
        b->gemm_config = c;
        bool taken = rf_gemm_skinny_residency(b->stream, &b->gemm[0], c, &resident, &clusters, &err) == RF_OK;
        double us = taken ? skinny_us(b, call_gemm_skinny, rf_gemm_skinny_config_name(c)) : -1.0;
        if (b->jsonl && taken)
            printf(",\"%s\":%.3f", rf_gemm_skinny_config_name(c), us);
        else if (!b->jsonl && taken) /* !: more clusters than the card holds at once */
            printf(" %6.2f%c |", us, clusters > resident ? '!' : ' ');
        else if (!b->jsonl)
            printf("       - |");
        fflush(stdout);
    }
    printf(b->jsonl ? "}\n" : "\n");
    fflush(stdout);
    release(b);
}

static void bench_skinny_layers(bench *b, int64_t m) {
    static const char *const names[] = {"cuBLASLt's first", "operator, tuned", "skinny, default",
                                        "skinny, w not early"};
    renew_stream(b);
    void *bias = take_normal(b, b->dtype, 4096, 0.1f), *at[4];
    for (int i = 0; i < 4; i++) at[i] = take(b, (size_t)(m * frame_layers[i].n) * 2);
    b->copies = SKINNY_LAYERS;
    for (int c = 0; c < SKINNY_LAYERS * 4; c++) {
        int i = c % 4;
        rf_gemm_args *g = &b->gemm[c];
        *g = rf_gemm_args_default(b->dtype, m, frame_layers[i].n, frame_layers[i].k);
        g->x = at[(i + 3) % 4];
        if (i == 1) g->ldx = 3072; /* the first third of qkv in place of what attention makes of it */
        g->w = take_normal(b, b->dtype, g->n * g->k, 0.03f);
        g->bias = bias;
        g->y = at[i];
        g->act = frame_layers[i].act;
    }
    rf_error err = {0};
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    for (int v = 0; v < 4; v++) {
        bool taken = true;
        for (int i = 0; i < 4; i++) {
            b->gemm[i].w_is_constant = true;
            b->layer_configs[i] = v < 2 ? -1 : rf_gemm_skinny_default(b->stream, &b->gemm[i]);
            taken = taken && (v < 2 || b->layer_configs[i] >= 0);
        }
        for (int c = 0; c < SKINNY_LAYERS * 4; c++) b->gemm[c].w_is_constant = v == 1 || v == 2;
        if (!taken) continue;
        set_tuning(b, v == 1);
        double us = skinny_us(b, call_skinny_layers, names[v]);
        if (b->jsonl)
            printf("{\"name\":\"gemm chain m %lld, %s\",\"device\":\"%s\",\"layer_us\":%.3f}\n", (long long)m, names[v],
                   rf_backend_name(b->backend), us);
        else
            printf("chain of 4 GEMMs a layer, m %lld, %s: %.2f us a layer, %.2f us a GEMM\n", (long long)m, names[v],
                   us, us / 4);
        fflush(stdout);
    }
    release(b);
}

static void bench_gemm_skinny(bench *b) {
    static const int64_t rows[] = {144, 16, 32, 64, 96, 160, 192, 288};
    const int repeats = b->repeats, min_calls = b->min_calls;
    if (!b->cuda || b->dtype != RF_DTYPE_BF16) {
        fprintf(stderr, "gemm-skinny: CUDA and bf16 only\n");
        return;
    }
    for (int i = 0; i < 2; i++) bench_skinny_layers(b, rows[i]);
    b->repeats = 7;
    b->min_calls = 10;
    if (!b->jsonl) {
        printf("| %-13s | first | tuned | default  |", "gemm, us");
        for (int c = 0; c < rf_gemm_skinny_num_configs(); c++) printf("%8s |", rf_gemm_skinny_config_name(c));
        printf("\n|---------------|------:|------:|----------|");
        for (int c = 0; c < rf_gemm_skinny_num_configs(); c++) printf("--------:|");
        printf("\n");
    }
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++)
        for (int layer = 0; layer < 4; layer++) bench_skinny_shape(b, rows[r], layer);
    set_tuning(b, true);
    b->repeats = repeats;
    b->min_calls = min_calls;
    fprintf(stderr, "gemm-skinny: done\n");
}

/* ---- layers of language models ---- */

#define TEXT_ROTATE_BYTES 150e6

static const struct {
    const char *name;
    int (*num_configs)(void);
    const char *(*config_name)(int config);
    rf_status (*check)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
    rf_status (*force)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
    int (*first_choice)(rf_stream *stream, const rf_gemm_args *args);
} own_kernels[] = {
    {"gemv", rf_gemv_num_configs, rf_gemv_config_name, rf_gemv_check, rf_gemv_force, rf_gemv_default},
    {"stream", rf_gemm_stream_num_configs, rf_gemm_stream_config_name, rf_gemm_stream_check, rf_gemm_stream_force,
     rf_gemm_stream_default},
    {"skinny", rf_gemm_skinny_num_configs, rf_gemm_skinny_config_name, rf_gemm_skinny_check, rf_gemm_skinny_force,
     rf_gemm_skinny_default},
};
#define NUM_OWN_KERNELS ((int)(sizeof own_kernels / sizeof own_kernels[0]))

static rf_status call_gemm_own(bench *b, int copy, rf_error *err) {
    return own_kernels[b->own_kernel].force(b->stream, &b->gemm[copy], b->gemm_config, err);
}

static void bench_text_shape(bench *b, int64_t m, int64_t n, int64_t k, bool tune) {
    double bytes = 2.0 * (double)n * (double)k;
    int copies = (int)(TEXT_ROTATE_BYTES / bytes) + 1;
    char name[64];
    snprintf(name, sizeof name, "%lldx%lldx%lld", (long long)m, (long long)n, (long long)k);
    renew_stream(b);
    b->copies = copies > MAX_COPIES ? MAX_COPIES : copies;
    void *x = take_normal(b, b->dtype, m * k, 1), *y = take(b, (size_t)(m * n) * 2);
    for (int c = 0; c < b->copies; c++) {
        rf_gemm_args *g = &b->gemm[c];
        *g = rf_gemm_args_default(b->dtype, m, n, k);
        g->x = x;
        g->w = take_normal(b, b->dtype, n * k, 0.02f);
        g->y = y;
    }
    rf_error err = {0};
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    set_tuning(b, false);
    double first = skinny_us(b, call_gemm, name); /* w_is_constant is not set yet: cuBLASLt's */
    for (int c = 0; c < b->copies; c++) b->gemm[c].w_is_constant = true;
    renew_stream(b);
    set_tuning(b, false);
    const char *chosen = "cuBLASLt";
    for (int i = NUM_OWN_KERNELS - 1; i >= 0; i--) {
        int config = own_kernels[i].first_choice(b->stream, &b->gemm[0]);
        if (config >= 0) chosen = own_kernels[i].config_name(config);
    }
    double untuned = skinny_us(b, call_gemm, name), tuned = -1.0;
    if (tune) {
        set_tuning(b, true);
        tuned = skinny_us(b, call_gemm, name);
        set_tuning(b, false);
    }
    if (b->jsonl)
        printf("{\"name\":\"gemm %s\",\"device\":\"%s\",\"floor_us\":%.3f,\"first_us\":%.3f,\"operator_us\":%.3f,"
               "\"operator\":\"%s\",\"tuned_us\":%.3f,\"own_us\":{",
               name, rf_backend_name(b->backend), bytes / PEAK_BYTES * 1e6, first, untuned, chosen, tuned);
    else
        printf("| %-17s | %7.2f | %7.2f %5.0f | %7.2f %5.0f | %-8s | %7.2f |", name, bytes / PEAK_BYTES * 1e6, first,
               bytes / first * 1e-3, untuned, bytes / untuned * 1e-3, chosen, tuned);
    double best = 0;
    char best_name[32] = "-";
    for (int i = 0, num = 0; i < NUM_OWN_KERNELS; i++) {
        for (int c = 0; c < own_kernels[i].num_configs(); c++) {
            if (own_kernels[i].check(b->stream, &b->gemm[0], c, NULL) != RF_OK) continue;
            b->own_kernel = i;
            b->gemm_config = c;
            double us = skinny_us(b, call_gemm_own, own_kernels[i].config_name(c));
            if (us > 0 && (best <= 0 || us < best)) {
                best = us;
                snprintf(best_name, sizeof best_name, "%s", own_kernels[i].config_name(c));
            }
            if (b->jsonl)
                printf("%s\"%s\":%.3f", num++ ? "," : "", own_kernels[i].config_name(c), us);
            else
                printf(" %s %.2f", own_kernels[i].config_name(c), us);
            fflush(stdout);
        }
    }
    if (b->jsonl)
        printf("}}\n");
    else
        printf(" | %s %.2f %5.0f |\n", best_name, best, best > 0 ? bytes / best * 1e-3 : 0);
    fflush(stdout);
    release(b);
}

static rf_status call_text_layer(bench *b, int copy, rf_error *err) {
    rf_status st = RF_OK;
    for (int i = 0; i < 4 && st == RF_OK; i++) st = b->ops->gemm(b->stream, &b->gemm[4 * copy + i], err);
    return st;
}

/* qkv, out of qkv's first columns, gate and up, down of the first half of these; what lies between is left out. */
static void bench_text_layers(bench *b, const char *model, int64_t m, int64_t qkv, int64_t hidden, int64_t ffn,
                              bool tune) {
    static const char *const names[] = {"cuBLASLt's first", "operator", "operator, tuned"};
    const int64_t n[4] = {qkv, hidden, 2 * ffn, hidden}, k[4] = {hidden, hidden, hidden, ffn};
    void *at[4];
    double bytes = 0;
    renew_stream(b);
    b->copies = 4;
    for (int i = 0; i < 4; i++) {
        at[i] = take_normal(b, b->dtype, m * n[i], 1);
        bytes += 2.0 * (double)n[i] * (double)k[i];
    }
    for (int c = 0; c < 4 * b->copies; c++) {
        int i = c % 4;
        rf_gemm_args *g = &b->gemm[c];
        *g = rf_gemm_args_default(b->dtype, m, n[i], k[i]);
        g->x = at[(i + 3) % 4];
        if (i == 1 || i == 3) g->ldx = n[i - 1];
        g->w = take_normal(b, b->dtype, n[i] * k[i], k[i] > 8192 ? 0.0085f : 0.0156f); /* keeps the size of x */
        g->y = at[i];
    }
    rf_error err = {0};
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    for (int v = 0; v < (tune ? 3 : 2); v++) {
        for (int c = 0; c < 4 * b->copies; c++) b->gemm[c].w_is_constant = v > 0;
        renew_stream(b);
        set_tuning(b, v == 2);
        double us = skinny_us(b, call_text_layer, names[v]);
        if (b->jsonl)
            printf("{\"name\":\"gemm chain %s m %lld, %s\",\"device\":\"%s\",\"layer_us\":%.3f,\"gbps\":%.1f}\n", model,
                   (long long)m, names[v], rf_backend_name(b->backend), us, bytes / us * 1e-3);
        else
            printf("four GEMMs of a layer of %s, m %lld, %s: %.2f us, %.0f GB/s\n", model, (long long)m, names[v], us,
                   bytes / us * 1e-3);
        fflush(stdout);
    }
    release(b);
}

static void bench_text(bench *b, bool tune) {
    static const int64_t rows[] = {1, 4, 32, 64};
    /* Llama-3-8B, LLaDA-8B, Qwen2.5-7B; their heads */
    static const struct {
        int64_t n, k;
    } shapes[] = {{6144, 4096},  {4096, 4096},  {28672, 4096}, {4096, 14336},  {12288, 4096}, {24576, 4096},
                  {4096, 12288}, {3584, 18944}, {37888, 3584}, {128256, 4096}, {126464, 4096}};
    const int repeats = b->repeats, min_calls = b->min_calls;
    if (!b->cuda || b->dtype != RF_DTYPE_BF16) {
        fprintf(stderr, "gemm-text: CUDA and bf16 only\n");
        return;
    }
    b->repeats = repeats < 7 ? repeats : 7;
    b->min_calls = 10;
    for (int r = 0; r < 4; r++) {
        if (rows[r] < 32)
            bench_text_layers(b, "Llama-3-8B", rows[r], 6144, 4096, 14336, tune);
        else
            bench_text_layers(b, "LLaDA-8B", rows[r], 12288, 4096, 12288, tune);
    }
    if (!b->jsonl)
        printf("\n| gemm, us (GB/s)   | floor   | first         | operator      | chosen   | tuned   | own | best |\n"
               "|-------------------|--------:|--------------:|--------------:|----------|--------:|---|---|\n");
    for (int r = 0; r < 4; r++)
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
            bench_text_shape(b, rows[r], shapes[i].n, shapes[i].k, tune);
    set_tuning(b, true);
    b->repeats = repeats;
    b->min_calls = min_calls;
    fprintf(stderr, "gemm-text: done\n");
}

static void bench_gemm_text(bench *b) {
    bench_text(b, false);
}

static void bench_gemm_text_tuned(bench *b) {
    bench_text(b, true);
}

#else

static void bench_gemm_tiles(bench *b) {
    fprintf(stderr, "gemm-tiles: this build has no CUDA\n");
}

static void bench_gemm_skinny(bench *b) {
    fprintf(stderr, "gemm-skinny: this build has no CUDA\n");
}

static void bench_gemm_text(bench *b) {
    fprintf(stderr, "gemm-text: this build has no CUDA\n");
}

static void bench_gemm_text_tuned(bench *b) {
    bench_gemm_text(b);
}

#endif

/* ---- attention ---- */

static rf_status call_attention(bench *b, int copy, rf_error *err) {
    return b->ops->attention(b->stream, &b->attention, err);
}

static rf_status call_attention_copy(bench *b, int copy, rf_error *err) {
    return b->ops->attention(b->stream, &b->attentions[copy], err);
}

/* b->attentions: one sequence, the same queries, each copy with keys of its own. */
static void make_caches(bench *b, int64_t q_len, int64_t kv_len, int64_t capacity, int hq, int hkv, int d,
                        rf_attention_kernel kernel) {
    rf_error err = {0};
    double kv_bytes = 2.0 * (double)rf_dtype_bytes(b->dtype) * d * hkv * (double)kv_len;
    int copies = b->cuda ? (int)(ROTATE_BYTES / kv_bytes) + 1 : 1;
    b->copies = copies > MAX_COPIES ? MAX_COPIES : copies;
    int32_t len = (int32_t)kv_len;
    int32_t *lens = take(b, sizeof len);
    if (rf_stream_upload(b->stream, lens, &len, sizeof len, &err) != RF_OK) fail("upload", &err);
    if (rf_stream_synchronize(b->stream, &err) != RF_OK) fail("synchronize", &err);
    for (int c = 0; c < b->copies; c++) {
        rf_attention_args *a = &b->attentions[c];
        *a = rf_attention_args_packed(b->dtype, 1, q_len, hq, d, NULL, NULL);
        a->num_kv_heads = hkv;
        a->kv_len = capacity;
        a->kv_lens = lens;
        a->q_row_stride = (int64_t)hq * d;
        a->kv_row_stride = (int64_t)hkv * d;
        a->kernel = kernel;
        a->k = take_normal(b, b->dtype, kv_len * hkv * d, 1); /* rows past the length are never read */
        a->v = take_normal(b, b->dtype, kv_len * hkv * d, 1);
        if (c > 0) {
            a->q = b->attentions[0].q;
            a->out = b->attentions[0].out;
            a->workspace = b->attentions[0].workspace;
            a->workspace_bytes = b->attentions[0].workspace_bytes;
            continue;
        }
        a->q = take_normal(b, b->dtype, q_len * hq * d, 1);
        a->out = take(b, (size_t)(q_len * hq * d) * rf_dtype_bytes(b->dtype));
        a->workspace_bytes = b->ops->attention_workspace(b->backend, a);
        a->workspace = take(b, a->workspace_bytes);
    }
}

static rf_status call_merge(bench *b, int copy, rf_error *err) {
    return b->ops->attention_merge(b->stream, &b->merge, err);
}

/* Few rows against a cache, as a text model's layers do: the calls of a graph rotate over caches that together pass 100 MB, so
 * that keys come from memory. Capacity: what the call is planned for, where longer than the keys that are there. */
static void bench_decode(bench *b) {
    static const struct {
        const char *name;
        int64_t q_len, kv_len, capacity;
        int hq, hkv, d;
        rf_attention_kernel kernel;
    } shapes[] = {
        {"block", 32, 1024, 0, 32, 32, 128, RF_ATTENTION_AUTO},
        {"block", 32, 4096, 0, 32, 32, 128, RF_ATTENTION_AUTO},
        {"block", 32, 32768, 0, 32, 32, 128, RF_ATTENTION_AUTO},
        {"block mma", 32, 1024, 0, 32, 32, 128, RF_ATTENTION_MMA},
        {"block mma", 32, 4096, 0, 32, 32, 128, RF_ATTENTION_MMA},
        {"block", 32, 1024, 4096, 32, 32, 128, RF_ATTENTION_AUTO},
        {"block", 4, 4096, 0, 32, 8, 128, RF_ATTENTION_AUTO},
        {"block", 64, 4096, 0, 32, 32, 128, RF_ATTENTION_AUTO},
        {"block", 8, 4096, 0, 28, 4, 128, RF_ATTENTION_AUTO},
        {"block", 32, 4096, 0, 16, 16, 64, RF_ATTENTION_AUTO},
        {"decode", 1, 1024, 0, 32, 8, 128, RF_ATTENTION_AUTO},
        {"decode", 1, 8192, 0, 32, 8, 128, RF_ATTENTION_AUTO},
        {"decode", 1, 32768, 0, 32, 8, 128, RF_ATTENTION_AUTO},
        {"decode", 1, 131072, 0, 32, 8, 128, RF_ATTENTION_AUTO},
        {"decode", 1, 1024, 32768, 32, 8, 128, RF_ATTENTION_AUTO},
        {"decode mma", 1, 1024, 0, 32, 8, 128, RF_ATTENTION_MMA},
        {"decode mma", 1, 8192, 0, 32, 8, 128, RF_ATTENTION_MMA},
        {"decode", 1, 1024, 0, 28, 4, 128, RF_ATTENTION_AUTO},
        {"decode", 1, 8192, 0, 28, 4, 128, RF_ATTENTION_AUTO},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t q_len = shapes[i].q_len, kv_len = shapes[i].kv_len;
        int64_t capacity = shapes[i].capacity ? shapes[i].capacity : kv_len;
        int hq = shapes[i].hq, hkv = shapes[i].hkv, d = shapes[i].d;
        if (shapes[i].kernel != RF_ATTENTION_AUTO && (!b->cuda || b->dtype != RF_DTYPE_BF16)) continue;
        double elem = (double)rf_dtype_bytes(b->dtype), flops = 4.0 * hq * (double)q_len * (double)kv_len * d;
        double bytes = 2.0 * elem * d * (hkv * (double)kv_len + hq * (double)q_len);
        char name[96];
        snprintf(name, sizeof name, "attention %s (%lld,%d/%d,%lld of %lld,%d)", shapes[i].name, (long long)q_len, hq,
                 hkv, (long long)kv_len, (long long)capacity, d);
        if (too_large(b, name, flops)) continue;
        make_caches(b, q_len, kv_len, capacity, hq, hkv, d, shapes[i].kernel);
        report(b, name, call_attention_copy, flops, bytes);
    }
    /* A reuse step of 32 rows: inside keys only, joined with what is kept; in one call and in two. */
    enum { ROWS = 32, HEADS = 32, DIM = 128 };
    const int64_t width = HEADS * DIM;
    rf_attention_args *a = &b->attention;
    *a = rf_attention_args_packed(b->dtype, 1, ROWS, HEADS, DIM, take_normal(b, b->dtype, ROWS * 3 * width, 1), NULL);
    a->out = take(b, (size_t)(ROWS * width) * rf_dtype_bytes(b->dtype));
    float *kept = take_normal(b, RF_DTYPE_F32, ROWS * width, 1),
          *kept_lse = take_normal(b, RF_DTYPE_F32, ROWS * HEADS, 1);
    a->join_out = kept;
    a->join_lse = kept_lse;
    a->join_slots = ROWS;
    a->workspace_bytes = b->ops->attention_workspace(b->backend, a);
    a->workspace = take(b, a->workspace_bytes);
    double elem = (double)rf_dtype_bytes(b->dtype), bytes = ROWS * (double)width * (4 * elem + 4);
    report(b, "attention inside, joined (32,32/32,32,128)", call_attention, 4.0 * ROWS * ROWS * (double)width, bytes);
    b->merge = (rf_attention_merge_args){
        .out_a_dtype = RF_DTYPE_F32, .dtype = b->dtype, .rows = ROWS, .num_heads = HEADS, .head_dim = DIM};
    b->merge.out_a = take_normal(b, RF_DTYPE_F32, ROWS * width, 1);
    b->merge.out_b = take_normal(b, b->dtype, ROWS * width, 1);
    b->merge.lse_a = take_normal(b, RF_DTYPE_F32, ROWS * HEADS, 1);
    b->merge.lse_b = take_normal(b, RF_DTYPE_F32, ROWS * HEADS, 1);
    b->merge.out = take(b, (size_t)(ROWS * width) * rf_dtype_bytes(b->dtype));
    report(b, "attention_merge (32,32,128)", call_merge, 3.0 * ROWS * (double)width,
           ROWS * (double)width * (4 + 2 * elem));
}

/* Prompts, and chunks of prompts, against a cache whose length is on the device. */
static void bench_prefill(bench *b) {
    enum { PLAIN, LENS, CAUSAL, BLOCKS }; /* no length either; a length; and a mask */
    static const char *const names[] = {"no length", "kv_lens", "causal", "block-causal"};
    static const struct {
        int how;
        int64_t q_len, kv_len;
        int hq, hkv, d;
    } shapes[] = {
        {PLAIN, 1024, 1024, 32, 32, 128},   {LENS, 1024, 1024, 32, 32, 128},   {PLAIN, 4096, 4096, 32, 32, 128},
        {LENS, 4096, 4096, 32, 32, 128},    {BLOCKS, 1024, 1024, 32, 32, 128}, {CAUSAL, 1024, 1024, 32, 8, 128},
        {CAUSAL, 2048, 2048, 32, 8, 128},   {CAUSAL, 2048, 8192, 32, 8, 128},  {CAUSAL, 2048, 32768, 32, 8, 128},
        {CAUSAL, 2048, 131072, 32, 8, 128}, {CAUSAL, 8192, 8192, 32, 8, 128},  {CAUSAL, 2048, 2048, 32, 8, 64},
        {CAUSAL, 128, 256, 32, 8, 128},     {CAUSAL, 128, 4096, 32, 8, 128},   {CAUSAL, 256, 4096, 32, 8, 128},
        {CAUSAL, 384, 4096, 32, 8, 128},    {CAUSAL, 512, 4096, 32, 8, 128},
    };
    static const struct {
        const char *name;
        rf_attention_kernel kernel;
    } kernels[] = {{"auto", RF_ATTENTION_AUTO}, {"wgmma", RF_ATTENTION_WGMMA}, {"mma", RF_ATTENTION_MMA}};
    const int min_calls = b->min_calls;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const int64_t q_len = shapes[i].q_len, kv_len = shapes[i].kv_len, first = kv_len - q_len;
        const int how = shapes[i].how, hq = shapes[i].hq, hkv = shapes[i].hkv, d = shapes[i].d;
        double seen = 0; /* pairs of a query and a key */
        for (int64_t r = 0; r < q_len; r++)
            seen += (double)(how == CAUSAL ? first + r + 1 : how == BLOCKS ? ((first + r) / 32 + 1) * 32 : kv_len);
        double elem = (double)rf_dtype_bytes(b->dtype), flops = 4.0 * hq * seen * d;
        double bytes = 2.0 * elem * d * (hkv * (double)kv_len + hq * (double)q_len);
        for (size_t k = 0; k < sizeof kernels / sizeof kernels[0]; k++) {
            if (kernels[k].kernel != RF_ATTENTION_AUTO && (!b->cuda || b->dtype != RF_DTYPE_BF16)) continue;
            char name[96];
            snprintf(name, sizeof name, "%s %s (%lld,%d/%d,%lld,%d)", names[how], kernels[k].name, (long long)q_len, hq,
                     hkv, (long long)kv_len, d);
            if (too_large(b, name, flops)) continue;
            make_caches(b, q_len, kv_len, kv_len, hq, hkv, d, kernels[k].kernel);
            for (int c = 0; c < b->copies; c++) {
                rf_attention_args *a = &b->attentions[c];
                if (how == PLAIN) a->kv_lens = NULL;
                if (how == CAUSAL || how == BLOCKS) {
                    a->mask = how == CAUSAL ? RF_MASK_CAUSAL : RF_MASK_BLOCK_CAUSAL;
                    a->causal_block = 32;
                    a->q_pos_offset = (int32_t)first;
                }
            }
            b->min_calls = flops < 1e12 ? min_calls : 2; /* milliseconds each */
            report(b, name, call_attention_copy, flops, bytes);
            b->min_calls = min_calls;
        }
    }
}

#ifdef RF_HAVE_CUDA

static rf_status call_attention_plan(bench *b, int copy, rf_error *err) {
    size_t need = 0;
    return rf_attention_decode_force(b->stream, &b->attentions[copy], b->cluster, b->splits, &need, err);
}

static void bench_decode_plans(bench *b) {
    static const struct {
        int64_t q_len, kv_len;
        int hq, hkv;
    } shapes[] = {{32, 1024, 32, 32}, {32, 4096, 32, 32}, {1, 1024, 32, 8}, {1, 8192, 32, 8},
                  {1, 32768, 32, 8},  {1, 1024, 28, 4},   {1, 8192, 28, 4}, {4, 4096, 32, 8}};
    static const int splits[] = {1, 2, 3, 4, 8, 16};
    if (!b->cuda || b->dtype != RF_DTYPE_BF16) {
        fprintf(stderr, "attention-plans: CUDA and bf16 only\n");
        return;
    }
    printf("| attention, head_dim 128, us: clusters of | splits |    1 |    2 |    4 |    8 |\n"
           "|---|---|---:|---:|---:|---:|\n");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int hq = shapes[i].hq, hkv = shapes[i].hkv;
        make_caches(b, shapes[i].q_len, shapes[i].kv_len, shapes[i].kv_len, hq, hkv, 128, RF_ATTENTION_AUTO);
        size_t bytes = 32 * (size_t)(shapes[i].q_len * hq) * 129 * sizeof(float);
        void *workspace = take(b, bytes);
        for (int c = 0; c < b->copies; c++) {
            b->attentions[c].workspace = workspace;
            b->attentions[c].workspace_bytes = bytes;
        }
        double seconds = 0;
        for (size_t n = 0; n < sizeof splits / sizeof splits[0]; n++) {
            printf("| %lld rows, %d/%d heads, %lld keys | %6d |", (long long)shapes[i].q_len, hq, hkv,
                   (long long)shapes[i].kv_len, splits[n]);
            for (b->cluster = 1; b->cluster <= 8; b->cluster *= 2) {
                rf_error err = {0};
                b->splits = splits[n];
                rf_status st = time_calls(b, call_attention_plan, &seconds, &err);
                if (st != RF_OK) fprintf(stderr, "attention-plans: %s\n", err.message);
                printf(" %6.2f |", st == RF_OK ? seconds * 1e6 : -1.0);
            }
            printf("\n");
            fflush(stdout);
        }
        release(b);
    }
}

#else

static void bench_decode_plans(bench *b) {
    fprintf(stderr, "attention-plans: this build has no CUDA\n");
}

#endif

static void bench_attention(bench *b) {
    static const struct {
        const char *name;
        int64_t batch, q_len, kv_len;
        int hq, hkv, d;
    } shapes[] = {
        {"shipped DiT b8", 8, 256, 256, 3, 3, 72},      {"DiT 256 px b2", 2, 256, 256, 16, 16, 72},
        {"DiT 256 px b32", 32, 256, 256, 16, 16, 72},   {"DiT 512 px b2", 2, 1024, 1024, 16, 16, 72},
        {"DiT 512 px b16", 16, 1024, 1024, 16, 16, 72}, {"LLM 1024", 1, 1024, 1024, 32, 32, 128},
        {"LLM 4096", 1, 4096, 4096, 32, 32, 128},       {"video", 1, 32760, 32760, 12, 12, 128},
        {"oasis spatial", 1, 144, 144, 16, 16, 64},     {"oasis temporal", 144, 1, 32, 16, 16, 64},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t batch = shapes[i].batch, q_len = shapes[i].q_len, kv_len = shapes[i].kv_len;
        int hq = shapes[i].hq, hkv = shapes[i].hkv, d = shapes[i].d;
        double flops = 4.0 * (double)batch * hq * (double)q_len * (double)kv_len * d;
        double bytes = 2.0 * (double)rf_dtype_bytes(b->dtype) * (double)batch * d *
                       ((double)hq * (double)q_len + (double)hkv * (double)kv_len);
        char name[96];
        snprintf(name, sizeof name, "attention %s (%lld,%d/%d,%lld,%lld,%d)", shapes[i].name, (long long)batch, hq, hkv,
                 (long long)q_len, (long long)kv_len, d);
        if (too_large(b, name, flops)) continue;
        rf_attention_args *a = &b->attention;
        *a = rf_attention_args_packed(b->dtype, batch, q_len, hq, d, NULL, NULL);
        if (q_len == kv_len && hq == hkv) { /* as the QKV projection leaves them */
            void *qkv = take_normal(b, b->dtype, batch * q_len * 3 * hq * d, 1);
            *a = rf_attention_args_packed(b->dtype, batch, q_len, hq, d, qkv, NULL);
        } else {
            a->num_kv_heads = hkv;
            a->kv_len = kv_len;
            a->q_row_stride = (int64_t)hq * d;
            a->q_batch_stride = q_len * hq * d;
            a->kv_row_stride = (int64_t)hkv * d;
            a->kv_batch_stride = kv_len * hkv * d;
            a->q = take_normal(b, b->dtype, batch * q_len * hq * d, 1);
            a->k = take_normal(b, b->dtype, batch * kv_len * hkv * d, 1);
            a->v = take_normal(b, b->dtype, batch * kv_len * hkv * d, 1);
        }
        a->out = take(b, (size_t)(batch * q_len * hq * d) * rf_dtype_bytes(b->dtype));
        a->workspace_bytes = b->ops->attention_workspace(b->backend, a);
        a->workspace = take(b, a->workspace_bytes);
        report(b, name, call_attention, flops, bytes);
    }
}

/* ---- norms ---- */

static rf_status call_norm(bench *b, int copy, rf_error *err) {
    return b->ops->norm(b->stream, &b->norm, err);
}
static rf_status call_residual(bench *b, int copy, rf_error *err) {
    return b->ops->residual(b->stream, &b->residual, err);
}
static rf_status call_group_norm(bench *b, int copy, rf_error *err) {
    return b->ops->group_norm(b->stream, &b->group_norm, err);
}

/* Norm and gated residual of a DiT block: rows of width, one modulation group per sample of `tokens`. */
static void set_block_norms(bench *b, int64_t rows, int64_t width, int64_t tokens, int num_terms) {
    rf_modulation mod = {.dtype = b->dtype, .stride = 6 * width, .rows_per_group = tokens};
    mod.table = take_normal(b, b->dtype, (rows + tokens - 1) / tokens * 6 * width, 0.1f);
    float *x = take_normal(b, RF_DTYPE_F32, rows * width, 1);
    void *y = take(b, (size_t)(rows * width) * rf_dtype_bytes(b->dtype));
    b->norm = (rf_norm_args){.x = x,
                             .y = y,
                             .x_dtype = RF_DTYPE_F32,
                             .y_dtype = b->dtype,
                             .num_rows = rows,
                             .cols = width,
                             .eps = 1e-6f,
                             .mod = mod,
                             .shift = 0,
                             .scale = width};
    b->residual = (rf_residual_args){.x = x,
                                     .num_terms = num_terms,
                                     .x_dtype = RF_DTYPE_F32,
                                     .y_dtype = b->dtype,
                                     .num_rows = rows,
                                     .cols = width,
                                     .gate_mod = mod,
                                     .gate = 2 * width,
                                     .norm_y = y,
                                     .norm_y_dtype = b->dtype,
                                     .norm_eps = 1e-6f,
                                     .norm_mod = mod,
                                     .norm_shift = 3 * width,
                                     .norm_scale = 4 * width};
    for (int t = 0; t < num_terms; t++) b->residual.terms[t] = take_normal(b, b->dtype, rows * width, 1e-3f);
}

static void bench_norm(bench *b) {
    static const int64_t shapes[][3] = {
        {2048, 216, 256}, {512, 1152, 256}, {4096, 1152, 256}, {32768, 1152, 1024}, {1024, 4096, 1024}};
    double elem = (double)rf_dtype_bytes(b->dtype);
    char name[96];
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t rows = shapes[i][0], width = shapes[i][1];
        double num = (double)rows * (double)width;
        set_block_norms(b, rows, width, shapes[i][2], 1);
        snprintf(name, sizeof name, "norm %lldx%lld adaLN, f32 stream", (long long)rows, (long long)width);
        report(b, name, call_norm, 8 * num, num * (4 + elem));
        for (int terms = 1; terms <= 8; terms += 7) {
            set_block_norms(b, rows, width, shapes[i][2], terms);
            snprintf(name, sizeof name, "residual+norm %lldx%lld, %d terms", (long long)rows, (long long)width, terms);
            report(b, name, call_residual, 12 * num, num * (8 + (1 + terms) * elem));
        }
    }
    static const int64_t groups[][3] = {{4, 32 * 32, 512}, {1, 64 * 64, 512}, {1, 256 * 256, 128}, {1, 512 * 512, 128}};
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        int64_t batch = groups[i][0], pixels = groups[i][1], channels = groups[i][2];
        double num = (double)batch * (double)pixels * (double)channels;
        rf_group_norm_args *g = &b->group_norm;
        *g = (rf_group_norm_args){.dtype = b->dtype,
                                  .batch = batch,
                                  .pixels = pixels,
                                  .channels = channels,
                                  .num_groups = 32,
                                  .eps = 1e-6f,
                                  .silu = true};
        g->x = take_normal(b, b->dtype, (int64_t)num, 1);
        g->y = take(b, (size_t)num * rf_dtype_bytes(b->dtype));
        g->weight = take_normal(b, RF_DTYPE_F32, channels, 1);
        g->bias = take_normal(b, RF_DTYPE_F32, channels, 1);
        g->workspace_bytes = rf_group_norm_workspace_bytes(g);
        g->workspace = take(b, g->workspace_bytes);
        snprintf(name, sizeof name, "group_norm+silu %lldx%lldx%lld", (long long)batch, (long long)pixels,
                 (long long)channels);
        report(b, name, call_group_norm, 8 * num, 2 * num * elem);
    }
}

/* ---- convolution ---- */

static rf_status call_conv(bench *b, int copy, rf_error *err) {
    return b->ops->conv2d(b->stream, &b->conv, err);
}

static void bench_conv(bench *b) {
    static const struct {
        int64_t batch, size, in, out;
        int kernel;
        bool upsample;
    } shapes[] = {
        {1, 32, 4, 512, 3, false},    {1, 32, 512, 512, 3, false},  {1, 32, 512, 512, 3, true},
        {1, 128, 512, 256, 3, false}, {1, 128, 512, 256, 1, false}, {1, 256, 128, 128, 3, false},
        {1, 256, 128, 3, 3, false},   {4, 16, 64, 64, 3, false},    {8, 256, 128, 128, 3, false},
    };
    double elem = (double)rf_dtype_bytes(b->dtype);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t size = shapes[i].size, out_size = shapes[i].upsample ? 2 * size : size, kernel = shapes[i].kernel;
        int64_t in = shapes[i].in, out = shapes[i].out, batch = shapes[i].batch;
        int64_t w_num = kernel * kernel * in * out, x_num = batch * size * size * in;
        int64_t y_num = batch * out_size * out_size * out;
        double flops = 2.0 * (double)y_num * (double)(kernel * kernel * in);
        char name[96];
        snprintf(name, sizeof name, "conv%d %lldx%lldx%lld %lld->%lld%s", (int)kernel, (long long)batch,
                 (long long)size, (long long)size, (long long)in, (long long)out,
                 shapes[i].upsample ? " upsample" : "");
        if (too_large(b, name, flops)) continue;
        rf_conv2d_args *c = &b->conv;
        *c = (rf_conv2d_args){.dtype = b->dtype,
                              .batch = batch,
                              .height = size,
                              .width = size,
                              .in_channels = in,
                              .out_channels = out,
                              .kernel = (int)kernel,
                              .stride = 1,
                              .pad_before = kernel == 3,
                              .pad_after = kernel == 3,
                              .upsample = shapes[i].upsample};
        c->x = take_normal(b, b->dtype, x_num, 1);
        c->w = take_normal(b, b->dtype, w_num, 0.02f);
        c->bias = take_normal(b, RF_DTYPE_F32, out, 1);
        c->y = take(b, (size_t)y_num * rf_dtype_bytes(b->dtype));
        c->workspace_bytes = b->ops->conv2d_workspace(b->backend, c);
        c->workspace = take(b, c->workspace_bytes);
        report(b, name, call_conv, flops, (double)(w_num + x_num + y_num) * elem);
    }
}

/* ---- one DiT layer, all its operators ---- */

static rf_status call_layer(bench *b, int copy, rf_error *err) {
    rf_status st = b->ops->norm(b->stream, &b->norm, err);
    if (st == RF_OK) st = b->ops->gemm(b->stream, &b->layer_gemms[0], err);
    if (st == RF_OK) st = b->ops->attention(b->stream, &b->attention, err);
    if (st == RF_OK) st = b->ops->gemm(b->stream, &b->layer_gemms[1], err);
    if (st == RF_OK) st = b->ops->residual(b->stream, &b->residual, err);
    if (st == RF_OK) st = b->ops->gemm(b->stream, &b->layer_gemms[2], err);
    if (st == RF_OK) st = b->ops->gemm(b->stream, &b->layer_gemms[3], err);
    if (st == RF_OK) st = b->ops->residual(b->stream, &b->residual, err);
    return st;
}

static void bench_layer(bench *b) {
    static const struct {
        const char *name;
        int64_t batch, tokens, width;
        int heads;
    } shapes[] = {
        {"shipped DiT", 8, 256, 216, 3},
        {"DiT-XL/2 256 px", 2, 256, 1152, 16},
        {"DiT-XL/2 256 px", 16, 256, 1152, 16},
        {"DiT-XL/2 512 px", 2, 1024, 1152, 16},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t rows = shapes[i].batch * shapes[i].tokens, width = shapes[i].width;
        double flops = 24.0 * (double)rows * (double)width * (double)width +
                       4.0 * (double)rows * (double)shapes[i].tokens * (double)width;
        double bytes = (double)rf_dtype_bytes(b->dtype) * 12.0 * (double)width * (double)width;
        char name[96];
        snprintf(name, sizeof name, "layer %s, %lld rows x %lld", shapes[i].name, (long long)rows, (long long)width);
        if (too_large(b, name, flops)) continue;
        set_block_norms(b, rows, width, shapes[i].tokens, 1);
        size_t elem = rf_dtype_bytes(b->dtype);
        void *qkv = take(b, (size_t)(rows * 3 * width) * elem), *attended = take(b, (size_t)(rows * width) * elem);
        void *hidden = take(b, (size_t)(rows * 4 * width) * elem);
        void *term = take(b, (size_t)(rows * width) * elem);
        const struct {
            int64_t n, k;
            const void *x;
            void *y;
            rf_act act;
        } gemms[4] = {{3 * width, width, b->norm.y, qkv, RF_ACT_NONE},
                      {width, width, attended, term, RF_ACT_NONE},
                      {4 * width, width, b->residual.norm_y, hidden, RF_ACT_GELU_TANH},
                      {width, 4 * width, hidden, term, RF_ACT_NONE}};
        for (int g = 0; g < 4; g++) {
            b->layer_gemms[g] = rf_gemm_args_default(b->dtype, rows, gemms[g].n, gemms[g].k);
            b->layer_gemms[g].x = gemms[g].x;
            b->layer_gemms[g].w = take_normal(b, b->dtype, gemms[g].n * gemms[g].k, 0.02f);
            b->layer_gemms[g].bias = take_normal(b, b->dtype, gemms[g].n, 0.1f);
            b->layer_gemms[g].y = gemms[g].y;
            b->layer_gemms[g].act = gemms[g].act;
        }
        b->residual.terms[0] = term;
        b->attention = rf_attention_args_packed(b->dtype, shapes[i].batch, shapes[i].tokens, shapes[i].heads,
                                                (int)(width / shapes[i].heads), qkv, attended);
        b->attention.workspace_bytes = b->ops->attention_workspace(b->backend, &b->attention);
        b->attention.workspace = take(b, b->attention.workspace_bytes);
        report(b, name, call_layer, flops, bytes);
    }
}

/* ---- program ---- */

static int usage(const char *why) {
    fprintf(stderr,
            "bench_kernels: %s\n"
            "usage: bench_kernels [--device cpu|cuda|cuda:N] [--dtype f32|bf16] [--what "
            "gemm|attention|attention-decode|norm|conv|layer|all|gemm-tiles|gemm-skinny|gemm-text|gemm-text-tuned|"
            "attention-plans|attention-prefill]\n"
            "                     [-t threads] [-r repeats] [-o md|jsonl]\n",
            why);
    return 2;
}

int main(int argc, char **argv) {
    static bench b = {.repeats = 15, .min_calls = MIN_CALLS, .copies = 1};
    const char *device = "cpu", *what = "all", *dtype = NULL, *format = "md";
    int threads = 0;
    for (int i = 1; i < argc; i++) {
        if (i + 1 == argc) return usage("an option without a value, or an unknown one");
        if (strcmp(argv[i], "--device") == 0)
            device = argv[++i];
        else if (strcmp(argv[i], "--dtype") == 0)
            dtype = argv[++i];
        else if (strcmp(argv[i], "--what") == 0)
            what = argv[++i];
        else if (strcmp(argv[i], "-t") == 0)
            threads = atoi(argv[++i]);
        else if (strcmp(argv[i], "-r") == 0)
            b.repeats = atoi(argv[++i]);
        else if (strcmp(argv[i], "-o") == 0)
            format = argv[++i];
        else
            return usage("unknown option");
    }
    if (b.repeats < 1 || b.repeats > MAX_REPEATS) return usage("-r must be 1..1000");
    if (strcmp(format, "md") != 0 && strcmp(format, "jsonl") != 0) return usage("-o must be md or jsonl");
    static const struct {
        const char *name;
        void (*run)(bench *);
    } groups[] = {{"gemm", bench_gemm},
                  {"attention", bench_attention},
                  {"attention-decode", bench_decode},
                  {"norm", bench_norm},
                  {"conv", bench_conv},
                  {"layer", bench_layer},
                  {"gemm-tiles", bench_gemm_tiles}, /* this and the next five only by their names */
                  {"gemm-skinny", bench_gemm_skinny},
                  {"gemm-text", bench_gemm_text},
                  {"gemm-text-tuned", bench_gemm_text_tuned},
                  {"attention-plans", bench_decode_plans},
                  {"attention-prefill", bench_prefill}};
    const size_t num_groups = sizeof groups / sizeof groups[0];
    bool known = strcmp(what, "all") == 0;
    for (size_t i = 0; i < num_groups; i++) known |= strcmp(what, groups[i].name) == 0;
    if (!known) return usage("unknown --what");

    rf_error err = {0};
    if (rf_backend_open(&b.backend, device, threads, &err) != RF_OK) fail(device, &err);
    if (rf_stream_create(&b.stream, b.backend, &err) != RF_OK) fail(device, &err);
    b.ops = rf_ops_for(b.backend);
    b.cuda = rf_backend_get_kind(b.backend) == RF_BACKEND_CUDA;
    b.dtype = b.cuda ? RF_DTYPE_BF16 : RF_DTYPE_F32;
    b.jsonl = strcmp(format, "jsonl") == 0;
    if (dtype && !rf_dtype_from_name(dtype, &b.dtype)) return usage("unknown --dtype");
    if (b.cuda && rf_gemm_set_tuning(b.stream, true, &err) != RF_OK) fail("tuning", &err);
    fprintf(stderr, "%s: %s, %d threads, %s\n", rf_backend_name(b.backend), rf_backend_description(b.backend),
            rf_backend_num_threads(b.backend), rf_dtype_name(b.dtype));
    for (size_t i = 0; i < num_groups; i++) {
        if ((strcmp(what, "all") == 0 && i + 6 < num_groups) || strcmp(what, groups[i].name) == 0) groups[i].run(&b);
    }
    rf_stream_destroy(b.stream);
    rf_backend_close(b.backend);
    return 0;
}
