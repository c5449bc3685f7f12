/* tests/core/test_arena.c - what is counted is what is needed. */
#include "core/arena.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_status take_three(rf_arena *arena, void *out[3], rf_error *err) {
    rf_status st = rf_arena_take(arena, &out[0], "first", 3, 4, err);
    if (st == RF_OK) st = rf_arena_take(arena, &out[1], "second", 1, 300, err);
    if (st == RF_OK) st = rf_arena_take(arena, &out[2], "third", 5, 8, err);
    return st;
}

START_TEST(a_counting_arena_tells_the_size_of_a_real_one) {
    rf_arena counting, real;
    rf_error err = {0};
    void *p[3];
    rf_arena_init_counting(&counting);
    rf_assert_ok(take_three(&counting, p, &err), err);
    ck_assert(!p[0] && !p[1] && !p[2]);
    ck_assert_uint_eq(counting.peak, 256 + 512 + 40);
    char *base = rf_alloc_aligned(counting.peak, RF_ARENA_ALIGN);
    rf_arena_init(&real, base, counting.peak);
    rf_assert_ok(take_three(&real, p, &err), err);
    ck_assert_ptr_eq(p[0], base);
    ck_assert_ptr_eq(p[1], base + 256);
    ck_assert_ptr_eq(p[2], base + 768);
    rf_free(base);
}
END_TEST

START_TEST(one_byte_too_few_names_the_buffer) {
    rf_arena arena;
    rf_error err = {0};
    void *p[3];
    char block[807];
    rf_arena_init(&arena, block, sizeof block);
    rf_assert_fails(take_three(&arena, p, &err), err, RF_ERR_WORKSPACE,
                    "'third' needs 40 bytes, the arena has 39 of 807");
    ck_assert_ptr_null(p[2]);
}
END_TEST

START_TEST(reset_gives_back_and_peak_stays) {
    rf_arena arena;
    void *p;
    rf_arena_init_counting(&arena);
    rf_arena_take(&arena, &p, "kept", 1, 100, NULL);
    size_t mark = rf_arena_mark(&arena);
    rf_arena_take(&arena, &p, "scratch", 1, 1000, NULL);
    rf_arena_reset(&arena, mark);
    ck_assert_uint_eq(arena.used, 100);
    ck_assert_uint_eq(arena.peak, 1256);
}
END_TEST

START_TEST(overflow_is_refused_and_remembered) {
    rf_arena arena;
    rf_error err = {0};
    void *p;
    rf_arena_init_counting(&arena);
    rf_assert_fails(rf_arena_take(&arena, &p, "big", SIZE_MAX / 2, 3, &err), err, RF_ERR_WORKSPACE, "'big'");
    ck_assert(arena.overflow);
    rf_arena_init_counting(&arena);
    rf_assert_ok(rf_arena_take(&arena, &p, "most", SIZE_MAX - 600, 1, &err), err);
    rf_assert_fails(rf_arena_take(&arena, &p, "rest", 600, 1, &err), err, RF_ERR_WORKSPACE, "'rest'");
    ck_assert(arena.overflow);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("arena");
    TCase *tc = tcase_create("all");
    tcase_add_test(tc, a_counting_arena_tells_the_size_of_a_real_one);
    tcase_add_test(tc, one_byte_too_few_names_the_buffer);
    tcase_add_test(tc, reset_gives_back_and_peak_stays);
    tcase_add_test(tc, overflow_is_refused_and_remembered);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
