/* tests/core/test_text.c - distances of words, by hand. */
#include "core/text.h"

#include "tests/test_util.h"

static int distance(const char *a, const char *b) {
    int there = rf_text_distance(a, strlen(a), b, strlen(b));
    ck_assert_int_eq(rf_text_distance(b, strlen(b), a, strlen(a)), there);
    return there;
}

START_TEST(changed_added_and_dropped_letters_count_one_each) {
    ck_assert_int_eq(distance("", ""), 0);
    ck_assert_int_eq(distance("cube-red", "cube-red"), 0);
    ck_assert_int_eq(distance("cube-red", "cube-rod"), 1);
    ck_assert_int_eq(distance("steps", "step"), 1);
    ck_assert_int_eq(distance("steps", "tseps"), 2);
    ck_assert_int_eq(distance("kitten", "sitting"), 3);
    ck_assert_int_eq(distance("", "torus"), 5);
    ck_assert_int_eq(distance("abc", "xyz"), 3);
}
END_TEST

START_TEST(letter_case_does_not_count) {
    ck_assert_int_eq(distance("Golden Retriever", "golden retriever"), 0);
    ck_assert_int_eq(distance("[", "{"), 1); /* the neighbours of the letters are no letters */
    ck_assert_int_eq(distance("@", "`"), 1);
}
END_TEST

START_TEST(only_the_given_length_is_read) {
    ck_assert_int_eq(rf_text_distance("cube red", 4, "cubes", 4), 0);
    ck_assert_int_eq(rf_text_distance(NULL, 0, "abc", 3), 3);
}
END_TEST

START_TEST(the_first_63_bytes_count) {
    char a[200], b[200];
    memset(a, 'a', sizeof a);
    memset(b, 'a', sizeof b);
    b[62] = 'b';
    b[63] = 'c';
    ck_assert_int_eq(rf_text_distance(a, sizeof a, b, sizeof b), 1);
    ck_assert_int_eq(rf_text_distance(a, sizeof a, "", 0), 63);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("text");
    TCase *tc = tcase_create("all");
    tcase_add_test(tc, changed_added_and_dropped_letters_count_one_each);
    tcase_add_test(tc, letter_case_does_not_count);
    tcase_add_test(tc, only_the_given_length_is_read);
    tcase_add_test(tc, the_first_63_bytes_count);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
