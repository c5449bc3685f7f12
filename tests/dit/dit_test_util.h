/* tests/dit/dit_test_util.h - a device to test on, and fixtures as host floats. Header only.
 *
 * The fixtures' small models have heads that no CUDA kernel takes (24 and 16 wide), so they are checked on the CPU; test_cuda.c
 * then holds CUDA against the CPU on models with heads of 72. */
#ifndef RF_TESTS_DIT_UTIL_H
#define RF_TESTS_DIT_UTIL_H

#include "core/memory.h"
#include "core/params.h"
#include "dit/config.h"
#include "dit/pipeline.h"
#include "tests/test_util.h"

typedef struct {
    rf_backend *backend;
    rf_stream *stream;
    rf_error err;
} dit_device;

static inline dit_device dit_device_open_named(const char *name) {
    dit_device d = {0};
    rf_assert_ok(rf_backend_open(&d.backend, name, 0, &d.err), d.err);
    rf_assert_ok(rf_stream_create(&d.stream, d.backend, &d.err), d.err);
    return d;
}

/* RF_TEST_DEVICE, or the CPU: for tests whose shapes every device can run. */
static inline dit_device dit_device_open(void) {
    const char *name = getenv("RF_TEST_DEVICE");
    return dit_device_open_named(name && name[0] ? name : "cpu");
}

static inline bool dit_device_is_cuda(const dit_device *d) {
    return rf_backend_get_kind(d->backend) == RF_BACKEND_CUDA;
}

/* The dtypes a device computes: f32, and bf16 on CUDA. */
static inline int dit_device_num_dtypes(const dit_device *d) {
    return dit_device_is_cuda(d) ? 2 : 1;
}
static inline rf_dtype dit_device_dtype(int index) {
    return index == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16;
}

static inline void dit_device_close(dit_device *d) {
    rf_stream_destroy(d->stream);
    rf_backend_close(d->backend);
}

static inline void dit_download(dit_device *d, rf_stream *stream, float *host, const float *device, size_t num) {
    rf_assert_ok(rf_stream_download(stream, host, device, num * sizeof(float), &d->err), d->err);
    rf_assert_ok(rf_stream_synchronize(stream, &d->err), d->err);
}

static inline float *dit_upload(dit_device *d, const float *host, size_t num) {
    void *device = NULL;
    rf_assert_ok(rf_backend_alloc(d->backend, &device, num * sizeof(float), &d->err), d->err);
    rf_assert_ok(rf_stream_upload(d->stream, device, host, num * sizeof(float), &d->err), d->err);
    rf_assert_ok(rf_stream_synchronize(d->stream, &d->err), d->err);
    return device;
}

static inline rf_weights *dit_fixture_open(const char *file) {
    char path[512];
    rf_error err = {0};
    rf_weights *w = NULL;
    snprintf(path, sizeof path, "%s/%s", RF_FIXTURE_DIR, file);
    rf_assert_ok(rf_weights_open(&w, path, &err), err);
    return w;
}

/* A fixture tensor as floats, rf_free'd by the caller. */
static inline float *dit_fixture_f32(const rf_weights *w, const char *name, size_t *num) {
    rf_tensor t;
    rf_error err = {0};
    rf_assert_ok(rf_weights_get(w, name, &t, &err), err);
    float *out = NULL;
    rf_assert_ok(rf_weights_read_f32(w, name, t.rank, t.shape, &out, &err), err);
    if (num != NULL) *num = (size_t)rf_tensor_num_elems(&t);
    return out;
}

#endif
