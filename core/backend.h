/* core/backend.h - a device: memory, copies, a stream, graphs. Two kinds: the host ("cpu") and one NVIDIA GPU ("cuda:0").
 *
 * A backend is opened once and shared; a stream belongs to one session and one thread at a time. Work on a stream runs in
 * order. On the host a call has finished when it returns; on CUDA RF_OK means queued.
 * Counters say what a step loop really did, so that a test can demand zero allocations and zero synchronisations. */
#ifndef RF_CORE_BACKEND_H
#define RF_CORE_BACKEND_H

#include "core/log.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_BACKEND_CPU = 0, RF_BACKEND_CUDA } rf_backend_kind;

typedef struct rf_backend rf_backend;
typedef struct rf_stream rf_stream;
typedef struct rf_graph rf_graph;

/* device: "cpu", "cuda", "cuda:N", or "auto" (first CUDA device if there is one, else cpu).
 * num_threads: host threads of the CPU backend, 0 = all. RF_ERR_DEVICE says what is there instead; RF_ERR_UNSUPPORTED if
 * this build has no CUDA or the GPU is older than sm_80. */
rf_status rf_backend_open(rf_backend **out, const char *device, int num_threads, rf_error *err);
void rf_backend_close(rf_backend *backend); /* NULL is a no-op; after all its streams and buffers */

rf_backend_kind rf_backend_get_kind(const rf_backend *backend);
const char *rf_backend_name(const rf_backend *backend);        /* "cpu", "cuda:0" */
const char *rf_backend_description(const rf_backend *backend); /* processor or card, memory, driver; one line */
int rf_backend_num_threads(const rf_backend *backend);
int rf_backend_num_sms(const rf_backend *backend); /* 0 on the host */
int rf_backend_sm(const rf_backend *backend);      /* 80, 90, ...; 0 on the host */
/* Index-th device of this build as a line of text for --list-devices; false past the end. Index 0 is the host. */
bool rf_backend_list(int index, char *line, size_t line_bytes);

/* Device memory, 256-byte aligned. RF_ERR_DEVICE_MEMORY gives wanted and free bytes. */
rf_status rf_backend_alloc(rf_backend *backend, void **out, size_t bytes, rf_error *err);
void rf_backend_free(rf_backend *backend, void *p); /* NULL is a no-op */
/* Page-locked host memory that a copy can read or write without blocking (plain memory on the host backend). */
rf_status rf_backend_alloc_pinned(rf_backend *backend, void **out, size_t bytes, rf_error *err);
void rf_backend_free_pinned(rf_backend *backend, void *p);

rf_status rf_stream_create(rf_stream **out, rf_backend *backend, rf_error *err);
void rf_stream_destroy(rf_stream *stream); /* NULL is a no-op; waits for queued work */
rf_backend *rf_stream_backend(const rf_stream *stream);
void *rf_stream_native(const rf_stream *stream); /* cudaStream_t, or NULL on the host */

/* Queued on the stream. Host memory must be pinned for the copy to be asynchronous; it must stay until a synchronise. */
rf_status rf_stream_upload(rf_stream *stream, void *device_dst, const void *host_src, size_t bytes, rf_error *err);
rf_status rf_stream_download(rf_stream *stream, void *host_dst, const void *device_src, size_t bytes, rf_error *err);
rf_status rf_stream_copy(rf_stream *stream, void *device_dst, const void *device_src, size_t bytes, rf_error *err);
rf_status rf_stream_zero(rf_stream *stream, void *device_dst, size_t bytes, rf_error *err);
/* Waits; reports errors of queued work and the label of the last launch. */
rf_status rf_stream_synchronize(rf_stream *stream, rf_error *err);
/* Time in milliseconds on the stream: mark i (0..15), then the time between two marks after a synchronise. */
rf_status rf_stream_mark(rf_stream *stream, int index, rf_error *err);
rf_status rf_stream_elapsed_ms(rf_stream *stream, int from, int to, double *ms, rf_error *err);
/* Waits until the stream has passed the last setting of a mark; what was queued behind it goes on. Errors as synchronize. */
rf_status rf_stream_wait_mark(rf_stream *stream, int index, rf_error *err);

/* PLAN: operators may tune and allocate. RUN: they may not; a GEMM whose algorithm was not chosen in PLAN is refused with
 * RF_ERR_STATE. A new stream is in PLAN. */
typedef enum { RF_PHASE_PLAN = 0, RF_PHASE_RUN } rf_phase;
void rf_stream_set_phase(rf_stream *stream, rf_phase phase);
rf_phase rf_stream_get_phase(const rf_stream *stream);

/* Graphs: what is queued between begin and end is recorded, not run. On the host backend capture is RF_ERR_UNSUPPORTED:
 * the caller runs the work directly. */
bool rf_backend_has_graphs(const rf_backend *backend);
rf_status rf_graph_begin(rf_stream *stream, rf_error *err);
rf_status rf_graph_end(rf_graph **out, rf_stream *stream, rf_error *err);
rf_status rf_graph_launch(rf_graph *graph, rf_stream *stream, rf_error *err);
int rf_graph_num_nodes(const rf_graph *graph);
void rf_graph_destroy(rf_graph *graph); /* NULL is a no-op */

typedef struct {
    uint64_t num_device_allocs;
    uint64_t num_syncs;    /* host waits: synchronize, marks, blocking copies */
    uint64_t num_launches; /* operators queued directly */
    uint64_t num_graph_launches;
    size_t device_bytes; /* allocated now */
    size_t peak_device_bytes;
} rf_backend_counts;
rf_backend_counts rf_backend_get_counts(const rf_backend *backend);

/* For operators: counts a launch and remembers its label (static string) for error messages. */
void rf_stream_note_launch(rf_stream *stream, const char *label);
/* For operators: a per-stream slot where a kernel library keeps its handle, workspace and tuned choices; destroy is called
 * with the stream. One slot: kernels/ owns it. */
void *rf_stream_get_kernel_state(const rf_stream *stream);
void rf_stream_set_kernel_state(rf_stream *stream, void *state, void (*destroy)(void *state));
/* For operators that allocate in PLAN: counts device bytes taken outside rf_backend_alloc (negative: given back). */
void rf_backend_note_alloc(rf_backend *backend, int64_t bytes);
const rf_log *rf_backend_log(const rf_backend *backend);
void rf_backend_set_log(rf_backend *backend, const rf_log *log); /* borrowed until close; NULL silences */

#ifdef __cplusplus
}
#endif
#endif
