/* dit/context.c - memory and window of a context. */
#include "dit/context.h"

#include <string.h>

#include "core/memory.h"

/* Windows on their way to the device: an upload reads its entry until the stream has passed it. */
#define STAGED_WINDOWS 16

struct rf_dit_context {
    rf_backend *backend;
    rf_stream *stream;
    rf_dtype dtype;
    int64_t samples, tokens, part_elems; /* part_elems: of one temporal part */
    int num_parts, slots;
    char *kv;
    rf_frame_window *window; /* device */
    rf_frame_window *staged; /* host, page-locked [STAGED_WINDOWS] */
    int next;
    size_t bytes;
};

rf_status rf_dit_context_create(rf_dit_context **out, const rf_dit_model *model, rf_stream *stream, int64_t samples,
                                int64_t tokens, int slots, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    int num_parts = rf_dit_desc_num_temporal(d);
    *out = NULL;
    if (num_parts == 0) return rf_fail(err, RF_ERR_ARGUMENT, "a model without attention over frames keeps no context");
    if (slots < 1 || slots > RF_MAX_WINDOW)
        return rf_fail(err, RF_ERR_ARGUMENT, "a context of %d frames, expected 1..%d", slots, RF_MAX_WINDOW);
    rf_dit_context *c = rf_alloc_zero(1, sizeof *c);
    if (c == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a context");
    *c = (rf_dit_context){.backend = rf_stream_backend(stream),
                          .stream = stream,
                          .dtype = model->dtype,
                          .samples = samples,
                          .tokens = tokens,
                          .part_elems = samples * tokens * 2 * slots * d->width,
                          .num_parts = num_parts,
                          .slots = slots};
    c->bytes = (size_t)c->part_elems * rf_dtype_bytes(model->dtype) * (size_t)num_parts;
    rf_status st = rf_backend_alloc(c->backend, (void **)&c->kv, c->bytes, err);
    if (st == RF_OK) st = rf_backend_alloc(c->backend, (void **)&c->window, sizeof *c->window, err);
    if (st == RF_OK)
        st = rf_backend_alloc_pinned(c->backend, (void **)&c->staged, STAGED_WINDOWS * sizeof *c->staged, err);
    /* a slot that was never written may be read under a weight of zero */
    if (st == RF_OK) st = rf_stream_zero(stream, c->kv, c->bytes, err);
    if (st == RF_OK) st = rf_stream_zero(stream, c->window, sizeof *c->window, err);
    if (st == RF_OK)
        *out = c;
    else
        rf_dit_context_destroy(c);
    return st;
}

void rf_dit_context_destroy(rf_dit_context *c) {
    if (c == NULL) return;
    rf_stream_synchronize(c->stream, NULL);
    rf_backend_free(c->backend, c->kv);
    rf_backend_free(c->backend, c->window);
    rf_backend_free_pinned(c->backend, c->staged);
    rf_free(c);
}

rf_status rf_dit_context_set_window(rf_dit_context *c, const int *slots, int num_kept, int num_new, rf_error *err) {
    int num = num_kept + num_new;
    if (num_kept < 0 || num_new < 0 || num < 1 || num > c->slots)
        return rf_fail(err, RF_ERR_ARGUMENT, "a window of %d kept and %d new frames in a context of %d", num_kept,
                       num_new, c->slots);
    if (c->next == STAGED_WINDOWS) {
        RF_TRY(rf_stream_synchronize(c->stream, err));
        c->next = 0;
    }
    rf_frame_window *w = &c->staged[c->next++];
    *w = (rf_frame_window){.num_kept = num_kept, .num_frames = num};
    for (int i = 0; i < num; i++) {
        if (slots[i] < 0 || slots[i] >= c->slots)
            return rf_fail(err, RF_ERR_ARGUMENT, "slot %d of a context of %d", slots[i], c->slots);
        w->slots[i] = slots[i];
    }
    return rf_stream_upload(c->stream, c->window, w, sizeof *w, err);
}

size_t rf_dit_context_bytes(const rf_dit_context *c) {
    return c->bytes;
}
int64_t rf_dit_context_samples(const rf_dit_context *c) {
    return c->samples;
}
int64_t rf_dit_context_tokens(const rf_dit_context *c) {
    return c->tokens;
}

void rf_dit_context_fill(const rf_dit_context *c, int temporal, rf_temporal_attention_args *args) {
    args->kv = c->kv + (size_t)temporal * (size_t)c->part_elems * rf_dtype_bytes(c->dtype);
    args->slots = c->slots;
    args->window = c->window;
}
