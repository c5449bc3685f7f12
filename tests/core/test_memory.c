/* tests/core/test_memory.c - counts, alignment, and the switch that fails one allocation. */
#include "core/memory.h"
#include "tests/test_util.h"

START_TEST(counts_follow_allocations) {
    rf_memory_counts before = rf_memory_get_counts();
    void *a = rf_alloc(10), *b = rf_alloc_zero(3, 7);
    char *c = rf_strdup("text");
    ck_assert_uint_eq(rf_memory_get_counts().num_allocs, before.num_allocs + 3);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, before.num_live + 3);
    ck_assert_str_eq(c, "text");
    rf_free(a);
    rf_free(b);
    rf_free(c);
    rf_free(NULL);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, before.num_live);
}
END_TEST

START_TEST(blocks_are_aligned_even_when_empty) {
    for (size_t bytes = 0; bytes < 200; bytes += 13) {
        void *p = rf_alloc(bytes), *q = rf_alloc_aligned(bytes, 256);
        ck_assert_ptr_nonnull(p);
        ck_assert_uint_eq((uintptr_t)p % 64, 0);
        ck_assert_uint_eq((uintptr_t)q % 256, 0);
        rf_free(p);
        rf_free(q);
    }
}
END_TEST

START_TEST(impossible_sizes_give_null) {
    volatile size_t huge = SIZE_MAX;
    ck_assert_ptr_null(rf_alloc(huge));
    ck_assert_ptr_null(rf_alloc(huge / 2));
    ck_assert_ptr_null(rf_alloc_zero(huge / 2, 3));
}
END_TEST

START_TEST(realloc_keeps_bytes_and_failure_keeps_the_block) {
    char *p = rf_realloc(NULL, 8);
    memcpy(p, "1234567", 8);
    p = rf_realloc(p, 1000);
    ck_assert_str_eq(p, "1234567");
    p = rf_realloc(p, 4);
    ck_assert_mem_eq(p, "1234", 4);
    rf_memory_fail_nth(1);
    ck_assert_ptr_null(rf_realloc(p, 2000));
    ck_assert_mem_eq(p, "1234", 4);
    rf_free(p);
}
END_TEST

START_TEST(only_the_nth_allocation_fails) {
    void *p[4];
    rf_memory_fail_nth(3);
    for (int i = 0; i < 4; i++) p[i] = rf_alloc(1);
    ck_assert(p[0] && p[1] && !p[2] && p[3]);
    rf_memory_fail_nth(1);
    rf_memory_fail_nth(0);
    void *q = rf_alloc(1);
    ck_assert_ptr_nonnull(q);
    for (int i = 0; i < 4; i++) rf_free(p[i]);
    rf_free(q);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("memory");
    TCase *tc = tcase_create("all");
    tcase_add_test(tc, counts_follow_allocations);
    tcase_add_test(tc, blocks_are_aligned_even_when_empty);
    tcase_add_test(tc, impossible_sizes_give_null);
    tcase_add_test(tc, realloc_keeps_bytes_and_failure_keeps_the_block);
    tcase_add_test(tc, only_the_nth_allocation_fails);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
