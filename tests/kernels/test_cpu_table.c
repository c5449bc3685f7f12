/* tests/kernels/test_cpu_table.c - promises of the CPU table as a whole: same bits for every number of threads, no
 * allocation in phase RUN, a launch counted per call. */
#include "harness.h"

#define MAX_OUT (1 << 20)

typedef rf_status (*scenario)(rf_stream *stream, float *out, size_t *num_out, rf_error *err);

static float *normals(size_t num, uint64_t key) {
    float *x = (float *)host_doubles(num);
    rf_rng_normal_at(1, key, 0, x, num);
    return x;
}

static rf_status run_gemm(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_gemm_args g = rf_gemm_args_default(RF_DTYPE_F32, 700, 650, 216);
    g.x = normals(700 * 216, 1);
    g.w = normals(650 * 216, 2);
    g.bias = normals(650, 3);
    g.act = RF_ACT_GELU_TANH;
    g.y = out;
    *num_out = 700 * 650;
    return rf_ops_cpu()->gemm(stream, &g, err);
}

static void *workspace(rf_stream *stream, const rf_attention_args *a, const rf_conv2d_args *c, size_t *bytes) {
    rf_backend *b = rf_stream_backend(stream);
    *bytes = a ? rf_ops_cpu()->attention_workspace(b, a) : rf_ops_cpu()->conv2d_workspace(b, c);
    return host_doubles(*bytes / sizeof(double) + 1);
}

static rf_status run_attention(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_attention_args a = rf_attention_args_packed(RF_DTYPE_F32, 3, 300, 5, 72, normals(3 * 300 * 3 * 360, 4), out);
    a.mask = RF_MASK_CAUSAL;
    a.workspace = workspace(stream, &a, NULL, &a.workspace_bytes);
    *num_out = 3 * 300 * 360;
    return rf_ops_cpu()->attention(stream, &a, err);
}

static rf_status run_conv(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_conv2d_args c = {.x = normals(2 * 21 * 33 * 64, 5),
                        .w = normals(48 * 9 * 64, 6),
                        .y = out,
                        .dtype = RF_DTYPE_F32,
                        .batch = 2,
                        .height = 21,
                        .width = 33,
                        .in_channels = 64,
                        .out_channels = 48,
                        .kernel = 3,
                        .stride = 1,
                        .pad_before = 1,
                        .pad_after = 1};
    c.workspace = workspace(stream, NULL, &c, &c.workspace_bytes);
    *num_out = 2 * 21 * 33 * 48;
    return rf_ops_cpu()->conv2d(stream, &c, err);
}

static rf_status run_group_norm(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_group_norm_args g = {.x = normals(2 * 500 * 256, 7),
                            .y = out,
                            .dtype = RF_DTYPE_F32,
                            .batch = 2,
                            .pixels = 500,
                            .channels = 256,
                            .num_groups = 32,
                            .eps = 1e-6f,
                            .weight = normals(256, 8),
                            .bias = normals(256, 9),
                            .silu = true};
    *num_out = 2 * 500 * 256;
    return rf_ops_cpu()->group_norm(stream, &g, err);
}

static rf_status run_residual(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_residual_args r = {.x = out,
                          .base = normals(500 * 216, 10),
                          .base_period = 500,
                          .num_terms = 1,
                          .terms = {normals(500 * 216, 11)},
                          .num_rows = 500,
                          .cols = 216,
                          .gate = -1,
                          .norm_y = out + 500 * 216,
                          .norm_eps = 1e-6f,
                          .norm_shift = -1,
                          .norm_scale = -1};
    *num_out = 2 * 500 * 216;
    return rf_ops_cpu()->residual(stream, &r, err);
}

static rf_status run_reduce(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_reduce_pair_args r = {.a = normals(3 * 333 * 216, 12),
                             .b = normals(3 * 333 * 216, 13),
                             .a_dtype = RF_DTYPE_F32,
                             .b_dtype = RF_DTYPE_F32,
                             .groups = 3,
                             .rows = 333,
                             .cols = 216,
                             .out = out};
    *num_out = 12;
    return rf_ops_cpu()->reduce_pair(stream, &r, err);
}

static rf_status run_fill(rf_stream *stream, float *out, size_t *num_out, rf_error *err) {
    rf_fill_normal_args f = {.out = out, .dtype = RF_DTYPE_F32, .num = 50001, .seed = 5, .key = 6, .mean = 1, .std = 2};
    *num_out = 50001;
    return rf_ops_cpu()->fill_normal(stream, &f, err);
}

static const struct {
    const char *name;
    scenario run;
} scenarios[] = {
    {"gemm", run_gemm},         {"attention", run_attention}, {"conv2d", run_conv},      {"group_norm", run_group_norm},
    {"residual", run_residual}, {"reduce_pair", run_reduce},  {"fill_normal", run_fill},
};
#define NUM_SCENARIOS ((int)(sizeof scenarios / sizeof scenarios[0]))

START_TEST(every_number_of_threads_gives_the_same_bits) {
    const int threads[] = {1, 2, 3, 5, 8};
    float *first = (float *)host_doubles(MAX_OUT / 2), *out = (float *)host_doubles(MAX_OUT / 2);
    for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
        rf_error err = {0};
        rf_backend *backend = NULL;
        rf_stream *stream = NULL;
        size_t num = 0;
        ck_assert_int_eq(rf_backend_open(&backend, "cpu", threads[i], &err), RF_OK);
        ck_assert_int_eq(rf_stream_create(&stream, backend, &err), RF_OK);
        memset(out, 0xff, MAX_OUT * sizeof(float));
        rf_status st = scenarios[_i].run(stream, i == 0 ? first : out, &num, &err);
        ck_assert_msg(st == RF_OK, "%s: %s", scenarios[_i].name, err.message);
        ck_assert_uint_le(num, MAX_OUT);
        if (i > 0)
            ck_assert_msg(memcmp(first, out, num * sizeof(float)) == 0, "%s: other bits with %d threads",
                          scenarios[_i].name, threads[i]);
        rf_stream_destroy(stream);
        rf_backend_close(backend);
    }
}
END_TEST

START_TEST(nothing_is_allocated_in_phase_run) {
    rf_error err = {0};
    float *out = (float *)host_doubles(MAX_OUT / 2);
    size_t num = 0;
    rf_stream_set_phase(test_stream(), RF_PHASE_RUN);
    rf_memory_counts before = rf_memory_get_counts();
    rf_backend_counts counts = rf_backend_get_counts(test_backend());
    rf_status st = scenarios[_i].run(test_stream(), out, &num, &err); /* test buffers come from calloc */
    rf_memory_counts after = rf_memory_get_counts();
    rf_backend_counts counts_after = rf_backend_get_counts(test_backend());
    rf_stream_set_phase(test_stream(), RF_PHASE_PLAN);
    ck_assert_msg(st == RF_OK, "%s: %s", scenarios[_i].name, err.message);
    ck_assert_uint_eq(after.num_allocs, before.num_allocs);
    ck_assert_uint_eq(counts_after.num_device_allocs, counts.num_device_allocs);
    ck_assert_uint_eq(counts_after.num_syncs, counts.num_syncs);
    ck_assert_uint_eq(counts_after.num_launches, counts.num_launches + 1);
}
END_TEST

START_TEST(the_table_is_complete_and_named) {
    const rf_ops *ops = rf_ops_cpu();
    ck_assert_str_eq(ops->name, "cpu");
    ck_assert_ptr_eq(test_ops(), ops);
    const char *bytes = (const char *)ops;
    for (size_t at = 0; at < sizeof *ops; at += sizeof(void *)) {
        void *entry;
        memcpy(&entry, bytes + at, sizeof entry);
        ck_assert_msg(entry != NULL, "entry %zu of the table is empty", at / sizeof(void *));
    }
}
END_TEST

int main(void) {
    unsetenv("RF_TEST_DEVICE"); /* this program is about the CPU */
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("cpu table");
    TCase *tc = kernel_tcase(suite, "promises");
    tcase_add_loop_test(tc, every_number_of_threads_gives_the_same_bits, 0, NUM_SCENARIOS);
    tcase_add_loop_test(tc, nothing_is_allocated_in_phase_run, 0, NUM_SCENARIOS);
    tcase_add_test(tc, the_table_is_complete_and_named);
    return run_kernel_suite(suite);
}
