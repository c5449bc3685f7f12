/* tests/core/test_backend.c - the host device, names, counts, order of calls. CUDA is covered where there is a card. */
#include "core/backend.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_error err;
static rf_backend *b;
static rf_stream *s;

static void setup(void) {
    rf_assert_ok(rf_backend_open(&b, "cpu", 2, &err), err);
    rf_assert_ok(rf_stream_create(&s, b, &err), err);
}

static void teardown(void) {
    rf_stream_destroy(s);
    rf_backend_close(b);
}

START_TEST(the_host_describes_itself) {
    char line[512];
    ck_assert_int_eq(rf_backend_get_kind(b), RF_BACKEND_CPU);
    ck_assert_str_eq(rf_backend_name(b), "cpu");
    ck_assert_ptr_nonnull(strstr(rf_backend_description(b), "GiB memory"));
    ck_assert_int_eq(rf_backend_num_threads(b), 2);
    ck_assert(rf_backend_num_sms(b) == 0 && rf_backend_sm(b) == 0);
    ck_assert(rf_backend_list(0, line, sizeof line) && strncmp(line, "cpu", 3) == 0);
    ck_assert(!rf_backend_list(-1, line, sizeof line) && !rf_backend_list(100, line, sizeof line));
}
END_TEST

START_TEST(copies_and_zero_work) {
    float src[64], got[64], *device = NULL, *second = NULL;
    void *pinned = NULL;
    for (int i = 0; i < 64; i++) src[i] = (float)i;
    rf_assert_ok(rf_backend_alloc(b, (void **)&device, sizeof src, &err), err);
    rf_assert_ok(rf_backend_alloc(b, (void **)&second, sizeof src, &err), err);
    rf_assert_ok(rf_backend_alloc_pinned(b, &pinned, 16, &err), err);
    ck_assert_uint_eq((uintptr_t)device % 256, 0);
    rf_assert_ok(rf_stream_upload(s, device, src, sizeof src, &err), err);
    rf_assert_ok(rf_stream_copy(s, second, device, sizeof src, &err), err);
    rf_assert_ok(rf_stream_zero(s, second, 128, &err), err);
    rf_assert_ok(rf_stream_download(s, got, second, sizeof src, &err), err);
    rf_assert_ok(rf_stream_synchronize(s, &err), err);
    for (int i = 0; i < 64; i++) ck_assert_float_eq(got[i], i < 32 ? 0 : src[i]);
    rf_backend_free(b, device);
    rf_backend_free(b, second);
    rf_backend_free(b, NULL);
    rf_backend_free_pinned(b, pinned);
}
END_TEST

START_TEST(counts_say_what_was_done) {
    void *p, *q;
    rf_assert_ok(rf_backend_alloc(b, &p, 1000, &err), err);
    rf_assert_ok(rf_backend_alloc(b, &q, 24, &err), err);
    rf_backend_free(b, p);
    rf_backend_note_alloc(b, 500);
    rf_backend_note_alloc(b, -500);
    rf_stream_note_launch(s, "op");
    rf_stream_synchronize(s, &err);
    rf_backend_counts c = rf_backend_get_counts(b);
    ck_assert_uint_eq(c.num_device_allocs, 3);
    ck_assert_uint_eq(c.device_bytes, 24);
    ck_assert_uint_eq(c.peak_device_bytes, 1024);
    ck_assert_uint_eq(c.num_launches, 1);
    ck_assert_uint_eq(c.num_syncs, 1);
    rf_backend_free(b, q);
    ck_assert_uint_eq(rf_backend_get_counts(b).device_bytes, 0);
}
END_TEST

START_TEST(marks_give_time) {
    double ms = -1;
    rf_assert_fails(rf_stream_elapsed_ms(s, 0, 1, &ms, &err), err, RF_ERR_STATE, "mark 0 was never set");
    rf_assert_ok(rf_stream_mark(s, 0, &err), err);
    usleep(2000);
    rf_assert_ok(rf_stream_mark(s, 15, &err), err);
    rf_assert_ok(rf_stream_elapsed_ms(s, 0, 15, &ms, &err), err);
    ck_assert(ms >= 2 && ms < 10000);
    rf_assert_fails(rf_stream_mark(s, 16, &err), err, RF_ERR_ARGUMENT, "mark 16");
    rf_assert_fails(rf_stream_elapsed_ms(s, -1, 0, &ms, &err), err, RF_ERR_ARGUMENT, "mark -1");
    uint64_t syncs = rf_backend_get_counts(b).num_syncs;
    rf_assert_ok(rf_stream_wait_mark(s, 15, &err), err);
    ck_assert_uint_eq(rf_backend_get_counts(b).num_syncs, syncs + 1);
    rf_assert_fails(rf_stream_wait_mark(s, 3, &err), err, RF_ERR_STATE, "mark 3 was never set");
    rf_assert_fails(rf_stream_wait_mark(s, 16, &err), err, RF_ERR_ARGUMENT, "mark 16");
}
END_TEST

START_TEST(the_host_has_no_graphs) {
    rf_graph *g = NULL;
    ck_assert(!rf_backend_has_graphs(b));
    rf_assert_fails(rf_graph_begin(s, &err), err, RF_ERR_UNSUPPORTED, "no graphs");
    rf_assert_fails(rf_graph_end(&g, s, &err), err, RF_ERR_UNSUPPORTED, "no graphs");
    rf_graph_destroy(NULL);
}
END_TEST

static int num_destroyed;
static void destroy_state(void *state) {
    num_destroyed += *(int *)state;
}

START_TEST(kernel_state_is_destroyed_with_its_stream) {
    static int one = 1, ten = 10;
    num_destroyed = 0;
    rf_stream_set_kernel_state(s, &one, destroy_state);
    ck_assert_ptr_eq(rf_stream_get_kernel_state(s), &one);
    rf_stream_set_kernel_state(s, &ten, destroy_state);
    ck_assert_int_eq(num_destroyed, 1);
    rf_stream_destroy(s);
    ck_assert_int_eq(num_destroyed, 11);
    s = NULL;
}
END_TEST

START_TEST(a_new_stream_is_in_plan) {
    ck_assert_int_eq(rf_stream_get_phase(s), RF_PHASE_PLAN);
    rf_stream_set_phase(s, RF_PHASE_RUN);
    ck_assert_int_eq(rf_stream_get_phase(s), RF_PHASE_RUN);
    ck_assert_ptr_eq(rf_stream_backend(s), b);
    ck_assert_ptr_null(rf_stream_native(s));
    rf_log log = {0};
    rf_backend_set_log(b, &log);
    ck_assert_ptr_eq(rf_backend_log(b), &log);
}
END_TEST

START_TEST(bad_names_are_refused) {
    const char *const names[] = {"", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:100", "CPU"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        rf_backend *none = NULL;
        rf_assert_fails(rf_backend_open(&none, names[i], 0, &err), err, RF_ERR_ARGUMENT, "cuda:N");
        ck_assert_ptr_null(none);
    }
    rf_backend *none = NULL;
    rf_assert_fails(rf_backend_open(&none, "cpu", -1, &err), err, RF_ERR_ARGUMENT, "threads");
}
END_TEST

START_TEST(a_device_that_is_not_there_says_so) {
    rf_backend *none = NULL;
    rf_status st = rf_backend_open(&none, "cuda:99", 0, &err);
    ck_assert(st == RF_ERR_DEVICE || st == RF_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.message, "cuda:99: "));
    rf_backend *any = NULL;
    rf_assert_ok(rf_backend_open(&any, "auto", 0, &err), err);
    ck_assert_int_ge(rf_backend_num_threads(any), 1);
    rf_backend_close(any);
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1;; n++) {
        rf_backend *other = NULL;
        rf_stream *stream = NULL;
        void *p = NULL;
        rf_memory_fail_nth(n);
        rf_status st = rf_backend_open(&other, "cpu", 0, &err);
        if (st == RF_OK) st = rf_stream_create(&stream, other, &err);
        if (st == RF_OK) st = rf_backend_alloc(other, &p, 100, &err);
        rf_memory_fail_nth(0);
        if (other) rf_backend_free(other, p);
        rf_stream_destroy(stream);
        rf_backend_close(other);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("backend");
    TCase *tc = tcase_create("host"), *names = tcase_create("names");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, the_host_describes_itself);
    tcase_add_test(tc, copies_and_zero_work);
    tcase_add_test(tc, counts_say_what_was_done);
    tcase_add_test(tc, marks_give_time);
    tcase_add_test(tc, the_host_has_no_graphs);
    tcase_add_test(tc, kernel_state_is_destroyed_with_its_stream);
    tcase_add_test(tc, a_new_stream_is_in_plan);
    tcase_add_test(names, bad_names_are_refused);
    tcase_set_timeout(names, 60);
    tcase_add_test(names, a_device_that_is_not_there_says_so);
    tcase_add_test(names, every_failed_allocation_is_survived);
    suite_add_tcase(suite, tc);
    suite_add_tcase(suite, names);
    return rf_run_suite(suite);
}
