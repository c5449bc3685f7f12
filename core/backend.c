/* core/backend.c - the public calls, the counts, and the host implementation. */
#include "core/backend_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/arena.h"
#include "core/memory.h"

#define MAX_THREADS 1024

/* ---- host ---- */

static rf_status host_alloc(rf_backend *b, void **out, size_t bytes, rf_error *err) {
    *out = rf_alloc_aligned(bytes, RF_ARENA_ALIGN);
    return *out ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "cpu: no memory for %zu bytes", bytes);
}

static void host_free(rf_backend *b, void *p) {
    rf_free(p);
}

static rf_status host_stream_create(rf_stream *s, rf_error *err) {
    return RF_OK;
}
static void host_stream_destroy(rf_stream *s) {}

static rf_status host_copy(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err) {
    memmove(dst, src, bytes);
    return RF_OK;
}

static rf_status host_zero(rf_stream *s, void *dst, size_t bytes, rf_error *err) {
    memset(dst, 0, bytes);
    return RF_OK;
}

static rf_status host_synchronize(rf_stream *s, rf_error *err) {
    return RF_OK;
}

static rf_status host_mark(rf_stream *s, int index, rf_error *err) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    s->mark_ms[index] = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    return RF_OK;
}

static rf_status host_elapsed_ms(rf_stream *s, int from, int to, double *ms, rf_error *err) {
    *ms = s->mark_ms[to] - s->mark_ms[from];
    return RF_OK;
}

static rf_status host_wait_mark(rf_stream *s, int index, rf_error *err) {
    return RF_OK;
}

static const rf_backend_ops host_ops = {
    .alloc = host_alloc,
    .free = host_free,
    .alloc_pinned = host_alloc,
    .free_pinned = host_free,
    .stream_create = host_stream_create,
    .stream_destroy = host_stream_destroy,
    .upload = host_copy,
    .download = host_copy,
    .copy = host_copy,
    .zero = host_zero,
    .synchronize = host_synchronize,
    .mark = host_mark,
    .elapsed_ms = host_elapsed_ms,
    .wait_mark = host_wait_mark,
};

static int host_num_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static void host_describe(char *line, size_t line_bytes) {
    char text[256];
    char model[128] = "unknown processor";
    FILE *f = fopen("/proc/cpuinfo", "re");
    while (f && fgets(text, sizeof text, f)) {
        if (sscanf(text, "model name : %127[^\n]", model) == 1) break;
    }
    if (f) fclose(f);
    double gib = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGE_SIZE) / (1024.0 * 1024.0 * 1024.0);
    snprintf(line, line_bytes, "%s, %ld cores, %.1f GiB memory", model, sysconf(_SC_NPROCESSORS_ONLN), gib);
}

static rf_status host_open(rf_backend *b, int num_threads, rf_error *err) {
    b->ops = &host_ops;
    b->kind = RF_BACKEND_CPU;
    b->num_threads = num_threads > 0 ? num_threads : host_num_threads();
    snprintf(b->name, sizeof b->name, "cpu");
    host_describe(b->description, sizeof b->description);
    return RF_OK;
}

/* ---- opening ---- */

static rf_status open_cuda(rf_backend *b, int device_index, rf_error *err) {
#ifdef RF_HAVE_CUDA
    b->num_threads = host_num_threads();
    return rf_cuda_open(b, device_index, err);
#else
    return rf_fail(err, RF_ERR_UNSUPPORTED, "cuda:%d: this build has no CUDA; the device here is cpu", device_index);
#endif
}

static rf_status open_auto(rf_backend *b, int num_threads, rf_error *err) {
#ifdef RF_HAVE_CUDA
    if (rf_cuda_num_devices(NULL) > 0) {
        rf_status st = open_cuda(b, 0, err);
        if (st != RF_ERR_UNSUPPORTED) return st; /* a card too old is not "one there is"; a broken one is an error */
    }
#endif
    return host_open(b, num_threads, err);
}

/* "cuda" or "cuda:N" with N in 0..99. */
static bool parse_cuda_name(const char *device, int *index) {
    *index = 0;
    if (strcmp(device, "cuda") == 0) return true;
    if (strncmp(device, "cuda:", 5) != 0) return false;
    const char *digits = device + 5;
    size_t len = strspn(digits, "0123456789");
    if (len == 0 || len > 2 || digits[len] != 0) return false;
    *index = atoi(digits);
    return true;
}

rf_status rf_backend_open(rf_backend **out, const char *device, int num_threads, rf_error *err) {
    *out = NULL;
    if (num_threads < 0 || num_threads > MAX_THREADS) {
        return rf_fail(err, RF_ERR_ARGUMENT, "threads must be 0 (all) to %d, found %d", MAX_THREADS, num_threads);
    }
    rf_backend *b = rf_alloc_zero(1, sizeof *b);
    if (!b) return rf_fail(err, RF_ERR_MEMORY, "no memory for a backend");
    pthread_mutex_init(&b->lock, NULL);

    int index;
    rf_status st;
    if (!device || strcmp(device, "auto") == 0) {
        st = open_auto(b, num_threads, err);
    } else if (strcmp(device, "cpu") == 0) {
        st = host_open(b, num_threads, err);
    } else if (parse_cuda_name(device, &index)) {
        st = open_cuda(b, index, err);
    } else {
        st = rf_fail(err, RF_ERR_ARGUMENT, "device '%s' is not one of: auto, cpu, cuda, cuda:N", device);
    }
    if (st != RF_OK) {
        rf_backend_close(b);
        return st;
    }
    *out = b;
    return RF_OK;
}

void rf_backend_close(rf_backend *backend) {
    if (!backend) return;
    pthread_mutex_destroy(&backend->lock);
    rf_free(backend->allocations);
    rf_free(backend);
}

rf_backend_kind rf_backend_get_kind(const rf_backend *backend) {
    return backend->kind;
}
const char *rf_backend_name(const rf_backend *backend) {
    return backend->name;
}
const char *rf_backend_description(const rf_backend *backend) {
    return backend->description;
}
int rf_backend_num_threads(const rf_backend *backend) {
    return backend->num_threads;
}
int rf_backend_num_sms(const rf_backend *backend) {
    return backend->num_sms;
}
int rf_backend_sm(const rf_backend *backend) {
    return backend->sm;
}

bool rf_backend_list(int index, char *line, size_t line_bytes) {
    if (index == 0) {
        char description[256];
        host_describe(description, sizeof description);
        snprintf(line, line_bytes, "cpu     %s", description);
        return true;
    }
#ifdef RF_HAVE_CUDA
    if (index > 0) return rf_cuda_list(index - 1, line, line_bytes);
#endif
    return false;
}

/* ---- memory ---- */

static void bind(rf_backend *b) {
    if (b->ops->bind) b->ops->bind(b);
}

/* With the lock held: remembers a block, so that free knows its size. */
static bool remember(rf_backend *b, void *p, size_t bytes) {
    if (b->num_allocations == b->max_allocations) {
        size_t max = b->max_allocations ? b->max_allocations * 2 : 64;
        rf_allocation *grown = rf_realloc(b->allocations, max * sizeof *grown);
        if (!grown) return false;
        b->allocations = grown;
        b->max_allocations = max;
    }
    b->allocations[b->num_allocations++] = (rf_allocation){p, bytes};
    return true;
}

static void add_device_bytes(rf_backend *b, size_t bytes) {
    b->device_bytes += bytes;
    if (b->device_bytes > b->peak_device_bytes) b->peak_device_bytes = b->device_bytes;
}

rf_status rf_backend_alloc(rf_backend *backend, void **out, size_t bytes, rf_error *err) {
    *out = NULL;
    void *p = NULL;
    bind(backend);
    rf_status st = backend->ops->alloc(backend, &p, bytes ? bytes : 1, err);
    if (st != RF_OK) return st;
    pthread_mutex_lock(&backend->lock);
    bool remembered = remember(backend, p, bytes);
    if (remembered) add_device_bytes(backend, bytes);
    pthread_mutex_unlock(&backend->lock);
    if (!remembered) {
        backend->ops->free(backend, p);
        return rf_fail(err, RF_ERR_MEMORY, "%s: no host memory to note an allocation", backend->name);
    }
    atomic_fetch_add(&backend->num_device_allocs, 1);
    *out = p;
    return RF_OK;
}

void rf_backend_free(rf_backend *backend, void *p) {
    if (!p) return;
    pthread_mutex_lock(&backend->lock);
    for (size_t i = backend->num_allocations; i-- > 0;) { /* the newest is the likeliest */
        if (backend->allocations[i].p != p) continue;
        backend->device_bytes -= backend->allocations[i].bytes;
        backend->allocations[i] = backend->allocations[--backend->num_allocations];
        break;
    }
    pthread_mutex_unlock(&backend->lock);
    bind(backend);
    backend->ops->free(backend, p);
}

rf_status rf_backend_alloc_pinned(rf_backend *backend, void **out, size_t bytes, rf_error *err) {
    *out = NULL;
    bind(backend);
    return backend->ops->alloc_pinned(backend, out, bytes ? bytes : 1, err);
}

void rf_backend_free_pinned(rf_backend *backend, void *p) {
    if (!p) return;
    bind(backend);
    backend->ops->free_pinned(backend, p);
}

void rf_backend_note_alloc(rf_backend *backend, int64_t bytes) {
    pthread_mutex_lock(&backend->lock);
    if (bytes >= 0) {
        add_device_bytes(backend, (size_t)bytes);
    } else {
        backend->device_bytes -= (size_t)-bytes;
    }
    pthread_mutex_unlock(&backend->lock);
    if (bytes > 0) atomic_fetch_add(&backend->num_device_allocs, 1);
}

/* ---- streams ---- */

rf_status rf_stream_create(rf_stream **out, rf_backend *backend, rf_error *err) {
    *out = NULL;
    rf_stream *s = rf_alloc_zero(1, sizeof *s);
    if (!s) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a stream", backend->name);
    s->backend = backend;
    s->last_label = "none";
    bind(backend);
    rf_status st = backend->ops->stream_create(s, err);
    if (st != RF_OK) {
        rf_stream_destroy(s);
        return st;
    }
    *out = s;
    return RF_OK;
}

void rf_stream_destroy(rf_stream *stream) {
    if (!stream) return;
    bind(stream->backend);
    if (stream->native) stream->backend->ops->synchronize(stream, NULL);
    rf_stream_set_kernel_state(stream, NULL, NULL);
    stream->backend->ops->stream_destroy(stream);
    rf_free(stream);
}

rf_backend *rf_stream_backend(const rf_stream *stream) {
    return stream->backend;
}
void *rf_stream_native(const rf_stream *stream) {
    return stream->native;
}

rf_status rf_stream_upload(rf_stream *stream, void *device_dst, const void *host_src, size_t bytes, rf_error *err) {
    if (bytes == 0) return RF_OK;
    bind(stream->backend);
    return stream->backend->ops->upload(stream, device_dst, host_src, bytes, err);
}

rf_status rf_stream_download(rf_stream *stream, void *host_dst, const void *device_src, size_t bytes, rf_error *err) {
    if (bytes == 0) return RF_OK;
    bind(stream->backend);
    return stream->backend->ops->download(stream, host_dst, device_src, bytes, err);
}

rf_status rf_stream_copy(rf_stream *stream, void *device_dst, const void *device_src, size_t bytes, rf_error *err) {
    if (bytes == 0) return RF_OK;
    bind(stream->backend);
    return stream->backend->ops->copy(stream, device_dst, device_src, bytes, err);
}

rf_status rf_stream_zero(rf_stream *stream, void *device_dst, size_t bytes, rf_error *err) {
    if (bytes == 0) return RF_OK;
    bind(stream->backend);
    return stream->backend->ops->zero(stream, device_dst, bytes, err);
}

static rf_status refuse_in_capture(const rf_stream *s, const char *what, rf_error *err) {
    return s->capturing ? rf_fail(err, RF_ERR_STATE, "%s: %s while a graph is being recorded", s->backend->name, what)
                        : RF_OK;
}

rf_status rf_stream_synchronize(rf_stream *stream, rf_error *err) {
    rf_status st = refuse_in_capture(stream, "synchronise", err);
    if (st != RF_OK) return st;
    bind(stream->backend);
    atomic_fetch_add(&stream->backend->num_syncs, 1);
    return stream->backend->ops->synchronize(stream, err);
}

static rf_status check_mark(const rf_stream *s, int index, rf_error *err) {
    if (index >= 0 && index < RF_NUM_MARKS) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: mark %d is outside 0..%d", s->backend->name, index, RF_NUM_MARKS - 1);
}

static rf_status check_marked(const rf_stream *s, int index, rf_error *err) {
    RF_TRY(check_mark(s, index, err));
    return s->marked[index] ? RF_OK : rf_fail(err, RF_ERR_STATE, "%s: mark %d was never set", s->backend->name, index);
}

rf_status rf_stream_mark(rf_stream *stream, int index, rf_error *err) {
    RF_TRY(check_mark(stream, index, err));
    rf_status st = refuse_in_capture(stream, "mark", err);
    if (st != RF_OK) return st;
    bind(stream->backend);
    st = stream->backend->ops->mark(stream, index, err);
    if (st == RF_OK) stream->marked[index] = true;
    return st;
}

rf_status rf_stream_elapsed_ms(rf_stream *stream, int from, int to, double *ms, rf_error *err) {
    *ms = 0;
    RF_TRY(check_marked(stream, from, err));
    RF_TRY(check_marked(stream, to, err));
    bind(stream->backend);
    return stream->backend->ops->elapsed_ms(stream, from, to, ms, err);
}

rf_status rf_stream_wait_mark(rf_stream *stream, int index, rf_error *err) {
    RF_TRY(check_marked(stream, index, err));
    RF_TRY(refuse_in_capture(stream, "wait for a mark", err));
    bind(stream->backend);
    atomic_fetch_add(&stream->backend->num_syncs, 1);
    return stream->backend->ops->wait_mark(stream, index, err);
}

void rf_stream_set_phase(rf_stream *stream, rf_phase phase) {
    stream->phase = phase;
}
rf_phase rf_stream_get_phase(const rf_stream *stream) {
    return stream->phase;
}

/* ---- graphs ---- */

bool rf_backend_has_graphs(const rf_backend *backend) {
    return backend->ops->graph_begin != NULL;
}

rf_status rf_graph_begin(rf_stream *stream, rf_error *err) {
    rf_backend *b = stream->backend;
    if (!rf_backend_has_graphs(b)) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: no graphs on this device", b->name);
    rf_status st = refuse_in_capture(stream, "begin", err);
    if (st != RF_OK) return st;
    bind(b);
    st = b->ops->graph_begin(stream, err);
    stream->capturing = st == RF_OK;
    return st;
}

rf_status rf_graph_end(rf_graph **out, rf_stream *stream, rf_error *err) {
    *out = NULL;
    rf_backend *b = stream->backend;
    if (!rf_backend_has_graphs(b)) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: no graphs on this device", b->name);
    if (!stream->capturing) return rf_fail(err, RF_ERR_STATE, "%s: no graph is being recorded", b->name);
    rf_graph scratch = {.backend = b}; /* the recording must be ended even without memory for the result */
    rf_graph *g = rf_alloc_zero(1, sizeof *g);
    bind(b);
    stream->capturing = false;
    rf_status st = b->ops->graph_end(&scratch, stream, err);
    if (st == RF_OK && !g) {
        b->ops->graph_destroy(&scratch);
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a graph", b->name);
    }
    if (st != RF_OK) {
        rf_free(g);
        return st;
    }
    *g = scratch;
    *out = g;
    return RF_OK;
}

rf_status rf_graph_launch(rf_graph *graph, rf_stream *stream, rf_error *err) {
    rf_backend *b = stream->backend;
    rf_status st = refuse_in_capture(stream, "graph launch", err);
    if (st != RF_OK) return st;
    if (graph->backend != b) return rf_fail(err, RF_ERR_ARGUMENT, "%s: a graph of another device", b->name);
    bind(b);
    atomic_fetch_add(&b->num_graph_launches, 1);
    stream->last_label = "graph";
    return b->ops->graph_launch(graph, stream, err);
}

int rf_graph_num_nodes(const rf_graph *graph) {
    return graph->num_nodes;
}

void rf_graph_destroy(rf_graph *graph) {
    if (!graph) return;
    bind(graph->backend);
    graph->backend->ops->graph_destroy(graph);
    rf_free(graph);
}

/* ---- counts and slots ---- */

rf_backend_counts rf_backend_get_counts(const rf_backend *backend) {
    rf_backend *b = (rf_backend *)backend; /* only the lock changes */
    pthread_mutex_lock(&b->lock);
    rf_backend_counts counts = {
        .num_device_allocs = atomic_load(&b->num_device_allocs),
        .num_syncs = atomic_load(&b->num_syncs),
        .num_launches = atomic_load(&b->num_launches),
        .num_graph_launches = atomic_load(&b->num_graph_launches),
        .device_bytes = b->device_bytes,
        .peak_device_bytes = b->peak_device_bytes,
    };
    pthread_mutex_unlock(&b->lock);
    return counts;
}

void rf_stream_note_launch(rf_stream *stream, const char *label) {
    stream->last_label = label ? label : "unnamed";
    if (!stream->capturing) atomic_fetch_add_explicit(&stream->backend->num_launches, 1, memory_order_relaxed);
}

void *rf_stream_get_kernel_state(const rf_stream *stream) {
    return stream->kernel_state;
}

void rf_stream_set_kernel_state(rf_stream *stream, void *state, void (*destroy)(void *state)) {
    if (stream->kernel_state && stream->kernel_state != state && stream->destroy_kernel_state) {
        stream->destroy_kernel_state(stream->kernel_state);
    }
    stream->kernel_state = state;
    stream->destroy_kernel_state = destroy;
}

const rf_log *rf_backend_log(const rf_backend *backend) {
    return backend->log;
}
void rf_backend_set_log(rf_backend *backend, const rf_log *log) {
    backend->log = log;
}
