/* core/backend_internal.h - what backend.c and backend_cuda.c share: the structs and the table of device operations.
 *
 * backend.c checks arguments, keeps counts and order (capture, phase) and calls the table; an implementation only talks to
 * its device. A new device is one more file with one more table. */
#ifndef RF_CORE_BACKEND_INTERNAL_H
#define RF_CORE_BACKEND_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "core/backend.h"

#define RF_NUM_MARKS 16

typedef struct {
    rf_status (*alloc)(rf_backend *b, void **out, size_t bytes, rf_error *err);
    void (*free)(rf_backend *b, void *p);
    rf_status (*alloc_pinned)(rf_backend *b, void **out, size_t bytes, rf_error *err);
    void (*free_pinned)(rf_backend *b, void *p);

    rf_status (*stream_create)(rf_stream *s, rf_error *err);
    void (*stream_destroy)(rf_stream *s); /* also of a half-made stream */
    rf_status (*upload)(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err);
    rf_status (*download)(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err);
    rf_status (*copy)(rf_stream *s, void *dst, const void *src, size_t bytes, rf_error *err);
    rf_status (*zero)(rf_stream *s, void *dst, size_t bytes, rf_error *err);
    rf_status (*synchronize)(rf_stream *s, rf_error *err);
    rf_status (*mark)(rf_stream *s, int index, rf_error *err);
    rf_status (*elapsed_ms)(rf_stream *s, int from, int to, double *ms, rf_error *err);
    rf_status (*wait_mark)(rf_stream *s, int index, rf_error *err);

    /* NULL where the device has no graphs */
    rf_status (*graph_begin)(rf_stream *s, rf_error *err);
    rf_status (*graph_end)(rf_graph *g, rf_stream *s, rf_error *err);
    rf_status (*graph_launch)(rf_graph *g, rf_stream *s, rf_error *err);
    void (*graph_destroy)(rf_graph *g);

    /* Makes the device current for the calling thread; NULL where there is no such thing. */
    void (*bind)(rf_backend *b);
} rf_backend_ops;

typedef struct {
    void *p;
    size_t bytes;
} rf_allocation;

struct rf_backend {
    const rf_backend_ops *ops;
    rf_backend_kind kind;
    int device_index;
    int num_threads;
    int num_sms;
    int sm;
    char name[16];
    char description[256];
    const rf_log *_Atomic log;

    _Atomic uint64_t num_device_allocs;
    _Atomic uint64_t num_syncs;
    _Atomic uint64_t num_launches;
    _Atomic uint64_t num_graph_launches;

    pthread_mutex_t lock; /* guards the rest */
    rf_allocation *allocations;
    size_t num_allocations;
    size_t max_allocations;
    size_t device_bytes;
    size_t peak_device_bytes;
};

struct rf_stream {
    rf_backend *backend;
    rf_phase phase;
    bool capturing;
    const char *last_label; /* static string of the last launch */
    void *kernel_state;
    void (*destroy_kernel_state)(void *state);
    void *native;                 /* cudaStream_t */
    void *events[RF_NUM_MARKS];   /* cudaEvent_t */
    double mark_ms[RF_NUM_MARKS]; /* host */
    bool marked[RF_NUM_MARKS];
};

struct rf_graph {
    rf_backend *backend;
    void *exec; /* cudaGraphExec_t */
    int num_nodes;
};

#ifdef RF_HAVE_CUDA
/* Fills in ops, names and sizes of the index-th card. */
rf_status rf_cuda_open(rf_backend *b, int device_index, rf_error *err);
/* Number of cards, 0 if there is no driver; why (may be NULL) receives a static string. */
int rf_cuda_num_devices(const char **why);
bool rf_cuda_list(int device_index, char *line, size_t line_bytes);
#endif

#endif
