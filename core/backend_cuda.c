/* core/backend_cuda.c - the table of device operations over the CUDA runtime (plain C, no device code).
 *
 * Sources  CUDA runtime API. Streams are created non-blocking, so nothing here waits for the legacy default stream.
 *          Recording is thread-local: another thread's allocation does not break it. */
#include "core/backend_internal.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <string.h>

#define MIN_SM 80

static rf_status fail_cuda(const rf_backend *b, const rf_stream *s, cudaError_t e, const char *what, rf_error *err) {
    (void)cudaGetLastError(); /* a non-sticky error must not show up again at the next check */
    return rf_fail(err, RF_ERR_DEVICE, "%s: %s failed: %s (%s)%s%s", b->name, what, cudaGetErrorString(e),
                   cudaGetErrorName(e), s ? ", last launch: " : "", s ? s->last_label : "");
}

static cudaStream_t native(const rf_stream *s) {
    return (cudaStream_t)s->native;
}

/* ---- memory ---- */

static void cuda_bind(rf_backend *b) {
    int current = -1;
    if (cudaGetDevice(&current) == cudaSuccess && current == b->device_index) return;
    (void)cudaSetDevice(b->device_index); /* a failure shows in the call that follows */
}

static rf_status cuda_alloc(rf_backend *b, void **out, size_t bytes, rf_error *err) {
    cudaError_t e = cudaMalloc(out, bytes);
    if (e == cudaSuccess) return RF_OK;
    *out = NULL;
    if (e != cudaErrorMemoryAllocation) return fail_cuda(b, NULL, e, "allocation", err);
    (void)cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    return rf_fail(err, RF_ERR_DEVICE_MEMORY, "%s: out of memory: wanted %zu bytes, %zu of %zu are free", b->name,
                   bytes, free_bytes, total_bytes);
}

static void cuda_free(rf_backend *b, void *p) {
    cudaError_t e = cudaFree(p);
    if (e != cudaSuccess) rf_log_write(b->log, RF_LOG_ERROR, "%s: free failed: %s", b->name, cudaGetErrorString(e));
}

static rf_status cuda_alloc_pinned(rf_backend *b, void **out, size_t bytes, rf_error *err) {
    cudaError_t e = cudaHostAlloc(out, bytes, cudaHostAllocPortable);
    if (e == cudaSuccess) return RF_OK;
    *out = NULL;
    if (e != cudaErrorMemoryAllocation) return fail_cuda(b, NULL, e, "page-locked allocation", err);
    (void)cudaGetLastError();
    return rf_fail(err, RF_ERR_MEMORY, "%s: no page-locked host memory for %zu bytes", b->name, bytes);
}

static void cuda_free_pinned(rf_backend *b, void *p) {
    cudaError_t e = cudaFreeHost(p);
    if (e != cudaSuccess)
        rf_log_write(b->log, RF_LOG_ERROR, "%s: host free failed: %s", b->name, cudaGetErrorString(e));
}

/* ---- streams ---- */

static rf_status cuda_stream_create(rf_stream *s, rf_error *err) {
    cudaStream_t stream = NULL;
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) return fail_cuda(s->backend, NULL, e, "stream creation", err);
    s->native = stream;
    for (int i = 0; i < RF_NUM_MARKS; i++) {
        cudaEvent_t event = NULL;
        e = cudaEventCreate(&event);
        if (e != cudaSuccess) return fail_cuda(s->backend, NULL, e, "event creation", err);
        s->events[i] = event;
    }
    return RF_OK;
}

static void cuda_stream_destroy(rf_stream *s) {
    for (int i = 0; i < RF_NUM_MARKS; i++) {
        if (s->events[i]) (void)cudaEventDestroy((cudaEvent_t)s->events[i]);
    }
    if (s->native) (void)cudaStreamDestroy(native(s));
}

/* A copy with pageable host memory makes the host wait; counting it keeps "no synchronisation" honest. */
static void note_pageable(rf_stream *s, const void *host) {
    if (s->capturing) return;
    struct cudaPointerAttributes attributes;
    cudaError_t e = cudaPointerGetAttributes(&attributes, host);
    if (e != cudaSuccess) (void)cudaGetLastError();
    if (e != cudaSuccess || attributes.type == cudaMemoryTypeUnregistered) {
        atomic_fetch_add(&s->backend->num_syncs, 1);
    }
}

static rf_status cuda_upload(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err) {
    note_pageable(s, src);
    cudaError_t e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "upload", err);
}

static rf_status cuda_download(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err) {
    note_pageable(s, dst);
    cudaError_t e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "download", err);
}

static rf_status cuda_copy(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err) {
    cudaError_t e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "copy", err);
}

static rf_status cuda_zero(rf_stream *s, void *dst, size_t bytes, rf_error *err) {
    cudaError_t e = cudaMemsetAsync(dst, 0, bytes, native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "zero", err);
}

static rf_status cuda_synchronize(rf_stream *s, rf_error *err) {
    cudaError_t e = cudaStreamSynchronize(native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "queued work", err);
}

static rf_status cuda_mark(rf_stream *s, int index, rf_error *err) {
    cudaError_t e = cudaEventRecord((cudaEvent_t)s->events[index], native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "mark", err);
}

static rf_status cuda_elapsed_ms(rf_stream *s, int from, int to, double *ms, rf_error *err) {
    float elapsed = 0;
    cudaError_t e = cudaEventElapsedTime(&elapsed, (cudaEvent_t)s->events[from], (cudaEvent_t)s->events[to]);
    if (e == cudaErrorNotReady) {
        (void)cudaGetLastError();
        return rf_fail(err, RF_ERR_STATE, "%s: marks %d and %d are read before a synchronise", s->backend->name, from,
                       to);
    }
    if (e != cudaSuccess) return fail_cuda(s->backend, s, e, "timing", err);
    *ms = elapsed;
    return RF_OK;
}

static rf_status cuda_wait_mark(rf_stream *s, int index, rf_error *err) {
    cudaError_t e = cudaEventSynchronize((cudaEvent_t)s->events[index]);
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "queued work", err);
}

/* ---- graphs ---- */

static rf_status cuda_graph_begin(rf_stream *s, rf_error *err) {
    cudaError_t e = cudaStreamBeginCapture(native(s), cudaStreamCaptureModeThreadLocal);
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "start of graph recording", err);
}

static rf_status cuda_graph_end(rf_graph *g, rf_stream *s, rf_error *err) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    size_t num_nodes = 0;
    const char *what = "graph recording";
    cudaError_t e = cudaStreamEndCapture(native(s), &graph);
    if (e != cudaSuccess) goto done;
    what = "graph node count";
    e = cudaGraphGetNodes(graph, NULL, &num_nodes);
    if (e != cudaSuccess) goto done;
    what = "graph instantiation";
    e = cudaGraphInstantiateWithFlags(&exec, graph, 0);
    if (e != cudaSuccess) goto done;
    what = "graph upload";
    e = cudaGraphUpload(exec, native(s));
    if (e != cudaSuccess) goto done;
    g->exec = exec;
    g->num_nodes = (int)num_nodes;
    exec = NULL;
done:
    if (exec) (void)cudaGraphExecDestroy(exec);
    if (graph) (void)cudaGraphDestroy(graph);
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, what, err);
}

static rf_status cuda_graph_launch(rf_graph *g, rf_stream *s, rf_error *err) {
    cudaError_t e = cudaGraphLaunch((cudaGraphExec_t)g->exec, native(s));
    return e == cudaSuccess ? RF_OK : fail_cuda(s->backend, s, e, "graph launch", err);
}

static void cuda_graph_destroy(rf_graph *g) {
    if (g->exec) (void)cudaGraphExecDestroy((cudaGraphExec_t)g->exec);
}

static const rf_backend_ops cuda_ops = {
    .alloc = cuda_alloc,
    .free = cuda_free,
    .alloc_pinned = cuda_alloc_pinned,
    .free_pinned = cuda_free_pinned,
    .stream_create = cuda_stream_create,
    .stream_destroy = cuda_stream_destroy,
    .upload = cuda_upload,
    .download = cuda_download,
    .copy = cuda_copy,
    .zero = cuda_zero,
    .synchronize = cuda_synchronize,
    .mark = cuda_mark,
    .elapsed_ms = cuda_elapsed_ms,
    .wait_mark = cuda_wait_mark,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_destroy = cuda_graph_destroy,
    .bind = cuda_bind,
};

/* ---- devices ---- */

int rf_cuda_num_devices(const char **why) {
    int num = 0;
    cudaError_t e = cudaGetDeviceCount(&num);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        num = 0;
    }
    int driver_cuda = 0; /* stays 0 without a driver, which the runtime words as one that is too old */
    if (cudaDriverGetVersion(&driver_cuda) != cudaSuccess) (void)cudaGetLastError();
    if (why) *why = driver_cuda == 0 ? "no NVIDIA driver" : e == cudaSuccess ? "no CUDA device" : cudaGetErrorString(e);
    return num;
}

/* "580.82.07" from the kernel module's own version line. */
static void driver_version(char *text, size_t text_bytes) {
    char line[256];
    FILE *f = fopen("/proc/driver/nvidia/version", "re");
    snprintf(text, text_bytes, "unknown");
    if (f && fgets(line, sizeof line, f)) {
        for (char *word = strtok(line, " \t\n"); word; word = strtok(NULL, " \t\n")) {
            size_t digits = strspn(word, "0123456789.");
            if (digits >= 5 && word[digits] == 0 && strchr(word, '.')) {
                snprintf(text, text_bytes, "%s", word);
                break;
            }
        }
    }
    if (f) fclose(f);
}

static cudaError_t describe(int device_index, struct cudaDeviceProp *p, char *line, size_t line_bytes) {
    int driver_cuda = 0, runtime_cuda = 0;
    char driver[32];
    cudaError_t e = cudaGetDeviceProperties(p, device_index);
    if (e != cudaSuccess) return e;
    (void)cudaDriverGetVersion(&driver_cuda);
    (void)cudaRuntimeGetVersion(&runtime_cuda);
    driver_version(driver, sizeof driver);
    snprintf(line, line_bytes, "%s, sm_%d%d, %d SMs, %.1f GiB memory, driver %s (CUDA %d.%d), built with CUDA %d.%d",
             p->name, p->major, p->minor, p->multiProcessorCount,
             (double)p->totalGlobalMem / (1024.0 * 1024.0 * 1024.0), driver, driver_cuda / 1000,
             driver_cuda % 1000 / 10, runtime_cuda / 1000, runtime_cuda % 1000 / 10);
    return cudaSuccess;
}

bool rf_cuda_list(int device_index, char *line, size_t line_bytes) {
    struct cudaDeviceProp p;
    char text[384];
    if (device_index >= rf_cuda_num_devices(NULL)) return false;
    cudaError_t e = describe(device_index, &p, text, sizeof text);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(line, line_bytes, "cuda:%d  cannot be used: %s", device_index, cudaGetErrorString(e));
    } else {
        bool too_old = p.major * 10 + p.minor < MIN_SM;
        snprintf(line, line_bytes, "cuda:%d  %s%s", device_index, text, too_old ? " (too old: sm_80 is needed)" : "");
    }
    return true;
}

rf_status rf_cuda_open(rf_backend *b, int device_index, rf_error *err) {
    const char *why = NULL;
    int num = rf_cuda_num_devices(&why);
    snprintf(b->name, sizeof b->name, "cuda:%d", device_index);
    if (num == 0) return rf_fail(err, RF_ERR_DEVICE, "%s: %s; the device here is cpu", b->name, why);
    if (device_index >= num) {
        return rf_fail(err, RF_ERR_DEVICE, "%s: no such device, there are %d (cuda:0 to cuda:%d)", b->name, num,
                       num - 1);
    }
    struct cudaDeviceProp p;
    b->ops = &cuda_ops;
    b->kind = RF_BACKEND_CUDA;
    b->device_index = device_index;
    cudaError_t e = describe(device_index, &p, b->description, sizeof b->description);
    if (e != cudaSuccess) return fail_cuda(b, NULL, e, "reading its properties", err);
    b->sm = p.major * 10 + p.minor;
    b->num_sms = p.multiProcessorCount;
    if (b->sm < MIN_SM) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %s is sm_%d, sm_%d or later is needed", b->name, p.name, b->sm,
                       MIN_SM);
    }
    e = cudaSetDevice(device_index);
    if (e != cudaSuccess) return fail_cuda(b, NULL, e, "selecting it", err);
    e = cudaFree(NULL); /* makes the context now, so that a broken device says so here */
    return e == cudaSuccess ? RF_OK : fail_cuda(b, NULL, e, "starting it", err);
}
