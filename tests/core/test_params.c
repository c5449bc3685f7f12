/* tests/core/test_params.c - a model's weights on a device: slabs, rounding, reading tensors of a file as floats. */
#include "core/params.h"

#include "core/memory.h"
#include "tests/test_util.h"

static rf_backend *backend;

static void open_backend(void) {
    rf_error err = {0};
    rf_assert_ok(rf_backend_open(&backend, "cpu", 1, &err), err);
}

static void close_backend(void) {
    ck_assert_uint_eq(rf_backend_get_counts(backend).device_bytes, 0);
    rf_backend_close(backend);
}

START_TEST(small_tensors_share_a_slab_and_large_ones_have_their_own) {
    rf_error err = {0};
    rf_params *params;
    rf_assert_ok(rf_params_create(&params, backend, &err), err);
    ck_assert_uint_eq(rf_params_bytes(params), 0);
    uint64_t before = rf_backend_get_counts(backend).num_device_allocs;

    void *p[4];
    rf_assert_ok(rf_params_take(params, &p[0], RF_DTYPE_F32, 1000, &err), err);
    rf_assert_ok(rf_params_take(params, &p[1], RF_DTYPE_BF16, 7, &err), err);
    ck_assert_uint_eq(rf_backend_get_counts(backend).num_device_allocs - before, 1);
    ck_assert_uint_eq(rf_params_bytes(params), (size_t)32 << 20);

    rf_assert_ok(rf_params_take(params, &p[2], RF_DTYPE_F32, (size_t)10 << 20, &err), err); /* 40 MiB */
    rf_assert_ok(rf_params_take(params, &p[3], RF_DTYPE_U8, 1, &err), err); /* still in the first slab */
    ck_assert_uint_eq(rf_backend_get_counts(backend).num_device_allocs - before, 2);
    ck_assert_uint_eq(rf_params_bytes(params), (size_t)72 << 20);
    ck_assert_int_eq(rf_params_num_elems(params), 1000 + 7 + (10 << 20) + 1);
    ck_assert_uint_gt(rf_params_tensor_bytes(params), 10 << 20);
    ck_assert_uint_lt(rf_params_tensor_bytes(params), rf_params_bytes(params));
    for (int i = 0; i < 4; i++) ck_assert_uint_eq((uintptr_t)p[i] % 256, 0);
    ck_assert((char *)p[1] >= (char *)p[0] + 4000);
    ck_assert((char *)p[3] >= (char *)p[1] + 14);

    rf_assert_ok(rf_params_take(params, &p[0], RF_DTYPE_F32, (size_t)7 << 20, &err),
                 err); /* 28 MiB: fits no more after */
    rf_assert_ok(rf_params_take(params, &p[1], RF_DTYPE_F32, (size_t)7 << 20, &err), err);
    ck_assert_uint_eq(rf_backend_get_counts(backend).num_device_allocs - before, 3);
    memset(p[0], 1, (size_t)28 << 20); /* the whole of it is ours */
    memset(p[1], 1, (size_t)28 << 20);
    rf_params_destroy(params);
}
END_TEST

START_TEST(put_rounds_to_the_dtype) {
    static const float host[] = {1.0f, -2.5f, 1.00390625f + 1e-4f, 65504.0f, 0.1f};
    rf_error err = {0};
    rf_params *params;
    rf_assert_ok(rf_params_create(&params, backend, &err), err);
    float *f32;
    uint16_t *bf16, *f16;
    rf_assert_ok(rf_params_put(params, (void **)&f32, RF_DTYPE_F32, host, 5, &err), err);
    rf_assert_ok(rf_params_put(params, (void **)&bf16, RF_DTYPE_BF16, host, 5, &err), err);
    rf_assert_ok(rf_params_put(params, (void **)&f16, RF_DTYPE_F16, host, 5, &err), err);
    for (int i = 0; i < 5; i++) {
        ck_assert_float_eq(f32[i], host[i]);
        ck_assert_uint_eq(bf16[i], rf_f32_to_bf16(host[i]));
        ck_assert_uint_eq(f16[i], rf_f32_to_f16(host[i]));
    }
    static const float other[] = {9, 8, 7, 6, 5};
    rf_assert_ok(rf_params_write(params, f32, RF_DTYPE_F32, other, 5, &err), err);
    ck_assert_float_eq(f32[0], 9);
    ck_assert_float_eq(f32[4], 5);
    rf_params_destroy(params);
}
END_TEST

START_TEST(what_cannot_be_held_is_refused) {
    rf_error err = {0};
    rf_params *params;
    rf_assert_ok(rf_params_create(&params, backend, &err), err);
    void *p = &p;
    rf_assert_fails(rf_params_take(params, &p, RF_DTYPE_F32, 0, &err), err, RF_ERR_ARGUMENT, "0 elements");
    ck_assert_ptr_null(p);
    rf_assert_fails(rf_params_take(params, &p, RF_DTYPE_F32, SIZE_MAX / 2, &err), err, RF_ERR_MEMORY, "address space");
    rf_assert_fails(rf_params_take(params, &p, RF_DTYPE_COUNT, 1, &err), err, RF_ERR_DTYPE, "dtype");
    float one = 1;
    rf_assert_fails(rf_params_put(params, &p, RF_DTYPE_I32, &one, 1, &err), err, RF_ERR_DTYPE, "i32");
    rf_params_destroy(params);
    rf_params_destroy(NULL);
}
END_TEST

START_TEST(every_failed_allocation_is_reported) {
    for (uint64_t n = 1; n < 50; n++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_error err = {0};
        rf_backend *own; /* a backend keeps a list of allocations, which would count as live */
        rf_assert_ok(rf_backend_open(&own, "cpu", 1, &err), err);
        rf_params *params = NULL;
        void *p = NULL;
        rf_memory_fail_nth(n);
        rf_status st = rf_params_create(&params, own, &err);
        for (int i = 0; st == RF_OK && i < 10; i++) { /* the list of slabs has to grow once */
            st = rf_params_take(params, &p, RF_DTYPE_U8, ((size_t)20 << 20) + (size_t)i, &err);
        }
        rf_memory_fail_nth(0);
        rf_params_destroy(params);
        ck_assert_uint_eq(rf_backend_get_counts(own).device_bytes, 0);
        rf_backend_close(own);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) {
            ck_assert_uint_gt(n, 3);
            return;
        }
        ck_assert(st == RF_ERR_MEMORY || st == RF_ERR_DEVICE_MEMORY);
    }
    ck_abort_msg("never succeeded");
}
END_TEST

/* ---- a file in memory ---- */

static size_t make_file(unsigned char *out) {
    static const char header[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
                                 "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]},"
                                 "\"c\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[22,26]}}";
    uint64_t header_bytes = sizeof header - 1;
    for (int i = 0; i < 8; i++) out[i] = (unsigned char)(header_bytes >> (8 * i));
    memcpy(out + 8, header, header_bytes);
    unsigned char *data = out + 8 + header_bytes;
    static const float a[] = {1, 2, 3, -4};
    uint16_t b[] = {rf_f32_to_bf16(0.5f), rf_f32_to_bf16(-8), rf_f32_to_bf16(3)};
    int32_t c = 7;
    memcpy(data, a, sizeof a);
    memcpy(data + 16, b, sizeof b);
    memcpy(data + 22, &c, sizeof c);
    return 8 + header_bytes + 26;
}

START_TEST(tensors_are_read_as_floats_with_their_shape_checked) {
    unsigned char bytes[512];
    size_t num_bytes = make_file(bytes);
    rf_error err = {0};
    rf_weights *w;
    rf_assert_ok(rf_weights_open_memory(&w, bytes, num_bytes, "memory", &err), err);
    float *v;
    rf_assert_ok(rf_weights_read_f32(w, "a", 2, (const int64_t[]){2, -1}, &v, &err), err);
    ck_assert_float_eq(v[3], -4);
    rf_free(v);
    rf_assert_ok(rf_weights_read_f32(w, "b", 1, (const int64_t[]){3}, &v, &err), err);
    ck_assert_float_eq(v[0], 0.5f);
    ck_assert_float_eq(v[1], -8);
    rf_free(v);
    rf_assert_fails(rf_weights_read_f32(w, "a", 2, (const int64_t[]){2, 3}, &v, &err), err, RF_ERR_SHAPE, "a");
    ck_assert_ptr_null(v);
    rf_assert_fails(rf_weights_read_f32(w, "c", 1, (const int64_t[]){1}, &v, &err), err, RF_ERR_DTYPE, "i32");
    rf_assert_fails(rf_weights_read_f32(w, "d", 1, (const int64_t[]){1}, &v, &err), err, RF_ERR_MISSING, "d");
    rf_memory_fail_nth(1);
    rf_assert_fails(rf_weights_read_f32(w, "a", 2, (const int64_t[]){2, 2}, &v, &err), err, RF_ERR_MEMORY, "a");
    rf_weights_close(w);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("params");
    TCase *params = tcase_create("params");
    tcase_add_checked_fixture(params, open_backend, close_backend);
    tcase_add_test(params, small_tensors_share_a_slab_and_large_ones_have_their_own);
    tcase_add_test(params, put_rounds_to_the_dtype);
    tcase_add_test(params, what_cannot_be_held_is_refused);
    tcase_add_test(params, every_failed_allocation_is_reported);
    tcase_add_test(params, tensors_are_read_as_floats_with_their_shape_checked);
    suite_add_tcase(suite, params);
    return rf_run_suite(suite);
}
