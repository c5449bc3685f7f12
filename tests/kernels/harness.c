/* tests/kernels/harness.c - see harness.h. */
#include "harness.h"

#include <stdarg.h>

#include "core/types.h"

#define MAX_BUFFERS 1024

static rf_backend *backend;
static rf_stream *stream;
static void *device_buffers[MAX_BUFFERS];
static int num_device_buffers;
static void *host_buffers[MAX_BUFFERS];
static int num_host_buffers;
static uint64_t next_key;

const rf_ops *test_ops(void) {
    return rf_ops_for(backend);
}
rf_backend *test_backend(void) {
    return backend;
}
rf_stream *test_stream(void) {
    return stream;
}
bool test_is_cuda(void) {
    return rf_backend_get_kind(backend) == RF_BACKEND_CUDA;
}
int test_num_dtypes(void) {
    return test_is_cuda() ? 2 : 1;
}
rf_dtype test_dtype(int index) {
    return index == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16;
}
double dtype_bound(rf_dtype dtype) {
    return dtype == RF_DTYPE_F32 ? 2e-6 : 4e-3;
}

static void must(rf_status st, const rf_error *err) {
    ck_assert_msg(st == RF_OK, "%s: %s", rf_status_name(st), err->message);
}

static void *host_take(size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    ck_assert_msg(p != NULL && num_host_buffers < MAX_BUFFERS, "test buffers");
    host_buffers[num_host_buffers++] = p;
    return p;
}

double *host_doubles(size_t num) {
    return host_take(num * sizeof(double));
}

static void upload_bytes(void *dev, const void *host, size_t bytes) {
    rf_error err = {0};
    must(rf_stream_upload(stream, dev, host, bytes, &err), &err);
    must(rf_stream_synchronize(stream, &err), &err);
}

void *dev_bytes(size_t bytes) {
    if (bytes == 0) return NULL;
    rf_error err = {0};
    void *dev = NULL;
    must(rf_backend_alloc(backend, &dev, bytes, &err), &err);
    ck_assert_msg(num_device_buffers < MAX_BUFFERS, "test buffers");
    device_buffers[num_device_buffers++] = dev;
    void *ones = malloc(bytes);
    ck_assert_ptr_nonnull(ones);
    memset(ones, 0xff, bytes); /* NaN in f32 and in bf16 */
    upload_bytes(dev, ones, bytes);
    free(ones);
    return dev;
}

const int32_t *dev_i32(const int32_t *values, size_t num) {
    void *dev = dev_bytes(num * sizeof *values);
    if (dev) upload_bytes(dev, values, num * sizeof *values);
    return dev;
}

const uint8_t *dev_u8(const uint8_t *values, size_t num) {
    void *dev = dev_bytes(num);
    if (dev) upload_bytes(dev, values, num);
    return dev;
}

void op_upload(const operand *o) {
    if (o->num == 0) return;
    size_t bytes = o->num * rf_dtype_bytes(o->dtype);
    void *packed = malloc(bytes);
    ck_assert_ptr_nonnull(packed);
    rf_convert(packed, o->dtype, o->host, RF_DTYPE_F32, o->num);
    upload_bytes(o->dev, packed, bytes);
    free(packed);
}

void op_download(operand *o) {
    if (o->num == 0) return;
    rf_error err = {0};
    size_t bytes = o->num * rf_dtype_bytes(o->dtype);
    void *packed = malloc(bytes);
    ck_assert_ptr_nonnull(packed);
    must(rf_stream_download(stream, packed, o->dev, bytes, &err), &err);
    must(rf_stream_synchronize(stream, &err), &err);
    rf_convert(o->host, RF_DTYPE_F32, packed, o->dtype, o->num);
    free(packed);
}

operand op_poison(rf_dtype dtype, size_t num) {
    operand o = {.dtype = dtype, .num = num, .host = host_take(num * sizeof(float))};
    for (size_t i = 0; i < num; i++) o.host[i] = NAN;
    o.dev = dev_bytes(num * rf_dtype_bytes(dtype));
    return o;
}

static float rounded(rf_dtype dtype, double v) {
    float f = (float)v;
    return dtype == RF_DTYPE_BF16 ? rf_bf16_to_f32(rf_f32_to_bf16(f)) : f;
}

operand op_normal(rf_dtype dtype, size_t num, double mean, double std) {
    operand o = op_poison(dtype, num);
    rf_rng_normal_at(20240607, next_key++, 0, o.host, num);
    for (size_t i = 0; i < num; i++) o.host[i] = rounded(dtype, mean + std * (double)o.host[i]);
    op_upload(&o);
    return o;
}

operand op_values(rf_dtype dtype, size_t num, const double *values) {
    operand o = op_poison(dtype, num);
    for (size_t i = 0; i < num; i++) o.host[i] = rounded(dtype, values[i]);
    op_upload(&o);
    return o;
}

operand op_clone(const operand *o) {
    operand copy = op_poison(o->dtype, o->num);
    memcpy(copy.host, o->host, o->num * sizeof(float));
    op_upload(&copy);
    return copy;
}

static uint32_t draw(uint64_t key, uint64_t index) {
    const uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)key, 77};
    const uint32_t seed[2] = {12345, 678};
    uint32_t out[4];
    rf_philox4x32(counter, seed, out);
    return out[0];
}

double uniform(void) {
    return draw(next_key++, 1) * 0x1p-32;
}

void random_permutation(int32_t *out, int n, uint64_t key) {
    for (int i = 0; i < n; i++) out[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)(draw(key, (uint64_t)i) % (uint32_t)(i + 1));
        int32_t t = out[i];
        out[i] = out[j];
        out[j] = t;
    }
}

double ref_act(double u, rf_act act) {
    switch (act) {
    case RF_ACT_GELU_TANH: return 0.5 * u * (1 + tanh(0.7978845608028653559 * (u + 0.044715 * u * u * u)));
    case RF_ACT_GELU_ERF: return 0.5 * u * erfc(-u * 0.7071067811865475244);
    case RF_ACT_SILU: return u / (1 + exp(-u));
    default: return u;
    }
}

static void describe(char *line, size_t bytes, const char *op, rf_dtype dtype, const char *shape, va_list args) {
    char text[256];
    vsnprintf(text, sizeof text, shape, args);
    snprintf(line, bytes, "%s [%s] %s on %s", op, text, rf_dtype_name(dtype), rf_backend_name(backend));
}

void expect_close(operand *got, const double *want, double bound, const char *op, const char *shape, ...) {
    char what[400];
    va_list args;
    va_start(args, shape);
    describe(what, sizeof what, op, got->dtype, shape, args);
    va_end(args);
    op_download(got);
    double sum_diff = 0, sum_want = 0, worst = 0;
    size_t worst_idx = 0;
    for (size_t i = 0; i < got->num; i++) {
        double g = got->host[i];
        if (isnan(want[i])) {
            /* asserting only what fails: a passing assertion costs a write to a file */
            if (!isnan(g)) ck_abort_msg("%s: element %zu is %g and should not have been written", what, i, g);
            continue;
        }
        double diff = fabs(g - want[i]);
        if (!isfinite(diff)) ck_abort_msg("%s: element %zu is %g, want %g", what, i, g, want[i]);
        if (diff > worst) {
            worst = diff;
            worst_idx = i;
        }
        sum_diff += diff * diff;
        sum_want += want[i] * want[i];
    }
    double rel = sum_want > 0 ? sqrt(sum_diff / sum_want) : sqrt(sum_diff);
    if (getenv("RF_TEST_PRINT")) printf("%s: relative L2 %.3g of %.3g\n", what, rel, bound);
    ck_assert_msg(rel <= bound, "%s: relative L2 %.3g (bound %.3g), worst at %zu: got %.9g, want %.9g", what, rel,
                  bound, worst_idx, (double)got->host[worst_idx], want[worst_idx]);
    /* One bad element must not hide in a large array: none may be off by 64 times what an average one may. */
    double size = got->num ? sqrt(sum_want / (double)got->num) : 0;
    ck_assert_msg(worst <= 64 * bound * size + 1e-30, "%s: element %zu is %.9g, want %.9g (relative L2 %.3g)", what,
                  worst_idx, (double)got->host[worst_idx], want[worst_idx], rel);
}

void expect_abs(operand *got, const double *want, double bound, const char *op, const char *shape, ...) {
    char what[400];
    va_list args;
    va_start(args, shape);
    describe(what, sizeof what, op, got->dtype, shape, args);
    va_end(args);
    op_download(got);
    double worst = 0;
    for (size_t i = 0; i < got->num; i++) {
        double g = got->host[i], diff = fabs(g - want[i]);
        if (g == want[i]) diff = 0;
        if (!(diff <= bound))
            ck_abort_msg("%s: element %zu is %.9g, want %.9g (bound %.3g)", what, i, g, want[i], bound);
        if (diff > worst) worst = diff;
    }
    if (getenv("RF_TEST_PRINT")) printf("%s: max abs %.3g of %.3g\n", what, worst, bound);
}

void expect_same_bits(operand *a, operand *b, const char *op, const char *shape, ...) {
    char what[400];
    va_list args;
    va_start(args, shape);
    describe(what, sizeof what, op, a->dtype, shape, args);
    va_end(args);
    op_download(a);
    op_download(b);
    ck_assert_uint_eq(a->num, b->num);
    for (size_t i = 0; i < a->num; i++) {
        if (memcmp(&a->host[i], &b->host[i], sizeof(float)) != 0)
            ck_abort_msg("%s: element %zu is %.9g and %.9g", what, i, (double)a->host[i], (double)b->host[i]);
    }
}

/* ---- running ---- */

static void set_up(void) {
    next_key = 1;
}

static void tear_down(void) {
    for (int i = 0; i < num_device_buffers; i++) rf_backend_free(backend, device_buffers[i]);
    for (int i = 0; i < num_host_buffers; i++) free(host_buffers[i]);
    num_device_buffers = num_host_buffers = 0;
}

TCase *kernel_tcase(Suite *suite, const char *name) {
    TCase *tcase = tcase_create(name);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_set_timeout(tcase, 600);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int open_test_device(void) {
    const char *device = getenv("RF_TEST_DEVICE");
    if (!device || !device[0]) device = "cpu";
    rf_error err = {0};
    rf_status st = rf_backend_open(&backend, device, 0, &err);
    if (st == RF_ERR_DEVICE || st == RF_ERR_UNSUPPORTED) {
        printf("SKIPPED: no device '%s' for these tests: %s\n", device, err.message);
        return 77;
    }
    if (st == RF_OK) st = rf_stream_create(&stream, backend, &err);
    if (st != RF_OK) {
        printf("cannot open '%s': %s\n", device, err.message);
        return 1;
    }
    printf("device: %s (%s)\n", rf_backend_name(backend), rf_backend_description(backend));
    return 0;
}

int run_kernel_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_ENV);
    int num_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    rf_stream_destroy(stream);
    rf_backend_close(backend);
    return num_failed == 0 ? 0 : 1;
}
