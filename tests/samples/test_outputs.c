/* tests/samples/test_outputs.c - names of picture files and the contact sheet. */
#include "samples/refrain/outputs.h"

#include "core/memory.h"
#include "tests/test_util.h"

START_TEST(names_follow_the_pattern) {
    static const struct {
        const char *pattern;
        int index, num_images;
        const char *want;
    } cases[] = {
        {"out.png", 0, 1, "out.png"},        {"out.png", 2, 3, "out_002.png"},        {"a.b/out", 2, 3, "a.b/out_002"},
        {".png", 1, 2, ".png_001"},          {"img_%03d.png", 7, 9, "img_007.png"},   {"%d.png", 12, 13, "12.png"},
        {"%3d.png", 5, 6, "  5.png"},        {"100%%_%02d.png", 3, 4, "100%_03.png"}, {"%03d.png", 0, 1, "000.png"},
        {"%09d.png", 1, 2, "000000001.png"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rf_error err = {0};
        char *name = NULL;
        rf_assert_ok(output_name(&name, cases[i].pattern, cases[i].index, cases[i].num_images, &err), err);
        ck_assert_str_eq(name, cases[i].want);
        rf_free(name);
    }
}
END_TEST

START_TEST(patterns_that_are_no_pattern_are_refused) {
    static const char *const patterns[] = {"%s.png",   "%n.png",  "%d_%d.png", "50%.png",  "a%",
                                           "%10d.png", "%*d.png", "%ld.png",   "%-3d.png", "%999999999d.png"};
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
        rf_error err = {0};
        char *name = NULL;
        rf_assert_fails(output_name(&name, patterns[i], 0, 2, &err), err, RF_ERR_ARGUMENT, patterns[i]);
        ck_assert_ptr_null(name);
    }
}
END_TEST

START_TEST(other_formats_are_refused) {
    rf_error err = {0};
    char *name = NULL;
    rf_assert_fails(output_name(&name, "a.JPG", 0, 1, &err), err, RF_ERR_ARGUMENT, "only PNG");
}
END_TEST

START_TEST(sheet_holds_every_picture) {
    rf_error err = {0};
    contact_sheet sheet;
    rf_image picture;
    const uint8_t red[3] = {255, 0, 0};
    rf_assert_ok(rf_image_create(&picture, 32, 16, red, &err), err);
    rf_assert_ok(contact_sheet_create(&sheet, 5, 32, 16, &err), err);
    ck_assert_int_eq(sheet.columns, 3);
    ck_assert_int_eq(sheet.rows, 2);
    ck_assert_int_eq(sheet.zoom, 3);
    for (int i = 0; i < 5; i++) {
        rf_assert_ok(contact_sheet_place(&sheet, i, &picture, "a label that is much longer than the picture", &err),
                     err);
    }
    size_t num_red = 0;
    for (int i = 0; i < sheet.image.width * sheet.image.height; i++)
        num_red += memcmp(sheet.image.rgb + 3 * i, red, 3) == 0;
    ck_assert_uint_eq(num_red, (size_t)5 * 32 * 16 * 9);
    contact_sheet_free(&sheet);
    rf_image_free(&picture);
}
END_TEST

START_TEST(sheet_too_large_is_refused) {
    rf_error err = {0};
    contact_sheet sheet;
    rf_assert_fails(contact_sheet_create(&sheet, 1024, 8192, 8192, &err), err, RF_ERR_ARGUMENT, "--grid");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("outputs");
    TCase *names = tcase_create("names");
    tcase_add_test(names, names_follow_the_pattern);
    tcase_add_test(names, patterns_that_are_no_pattern_are_refused);
    tcase_add_test(names, other_formats_are_refused);
    suite_add_tcase(suite, names);
    TCase *sheets = tcase_create("sheets");
    tcase_add_test(sheets, sheet_holds_every_picture);
    tcase_add_test(sheets, sheet_too_large_is_refused);
    suite_add_tcase(suite, sheets);
    return rf_run_suite(suite);
}
