/* tests/core/test_json.c - getters say what is wrong; limits hold before anything is built. */
#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "tests/test_util.h"

static const char text[] = "{\"n\": 28, \"neg\": -3, \"f\": 0.5, \"t\": true, \"s\": \"DiT \\u00e9\", \"nil\": null, "
                           "\"list\": [1, \"two\", {\"k\": 3}], \"big\": 9007199254740994, \"inf\": 1e999}";

static rf_error err;
static rf_json *doc;

static void setup(void) {
    rf_assert_ok(rf_json_parse(&doc, text, strlen(text), "config.json", &err), err);
}
static void teardown(void) {
    rf_json_close(doc);
}

START_TEST(values_come_out_as_they_stand) {
    const rf_json_value *root = rf_json_root(doc);
    int64_t n;
    double f;
    bool t;
    const char *s;
    rf_assert_ok(rf_json_get_int(doc, root, "n", 1, 100, &n, &err), err);
    rf_assert_ok(rf_json_get_double(doc, root, "f", 0, 1, &f, &err), err);
    rf_assert_ok(rf_json_get_bool(doc, root, "t", &t, &err), err);
    rf_assert_ok(rf_json_get_string(doc, root, "s", &s, &err), err);
    ck_assert_int_eq(n, 28);
    ck_assert_double_eq(f, 0.5);
    ck_assert(t);
    ck_assert_str_eq(s, "DiT \xc3\xa9");
    ck_assert_str_eq(rf_json_name(doc), "config.json");
}
END_TEST

START_TEST(absent_and_null_take_the_default) {
    const rf_json_value *root = rf_json_root(doc);
    int64_t n;
    double f;
    bool t;
    const char *s;
    const char *const keys[] = {"none", "nil"};
    for (int i = 0; i < 2; i++) {
        rf_assert_ok(rf_json_opt_int(doc, root, keys[i], 0, 9, -7, &n, &err), err);
        rf_assert_ok(rf_json_opt_double(doc, root, keys[i], 0, 9, -7, &f, &err), err);
        rf_assert_ok(rf_json_opt_bool(doc, root, keys[i], true, &t, &err), err);
        rf_assert_ok(rf_json_opt_string(doc, root, keys[i], "d", &s, &err), err);
        ck_assert(n == -7 && f == -7 && t && strcmp(s, "d") == 0);
        ck_assert(!rf_json_has(root, keys[i]));
        rf_assert_fails(rf_json_get_int(doc, root, keys[i], 0, 9, &n, &err), err, RF_ERR_MISSING, keys[i]);
    }
    rf_assert_fails(rf_json_opt_int(doc, root, "n", 0, 9, 0, &n, &err), err, RF_ERR_CONFIG, "0 to 9, found 28");
}
END_TEST

START_TEST(wrong_types_and_ranges_are_named) {
    const rf_json_value *root = rf_json_root(doc);
    int64_t n;
    double f;
    bool t;
    const char *s;
    rf_assert_fails(rf_json_get_int(doc, root, "s", 0, 9, &n, &err), err, RF_ERR_CONFIG,
                    "config.json: 's' must be a whole number, found a string");
    rf_assert_fails(rf_json_get_int(doc, root, "f", 0, 9, &n, &err), err, RF_ERR_CONFIG, "found 0.5");
    rf_assert_fails(rf_json_get_int(doc, root, "neg", 0, 9, &n, &err), err, RF_ERR_CONFIG, "found -3");
    rf_assert_fails(rf_json_get_int(doc, root, "big", 0, INT64_MAX, &n, &err), err, RF_ERR_CONFIG, "whole number");
    rf_assert_fails(rf_json_get_double(doc, root, "inf", 0, HUGE_VAL, &f, &err), err, RF_ERR_CONFIG, "found inf");
    rf_assert_fails(rf_json_get_double(doc, root, "t", 0, 1, &f, &err), err, RF_ERR_CONFIG, "found true or false");
    rf_assert_fails(rf_json_get_bool(doc, root, "list", &t, &err), err, RF_ERR_CONFIG, "found an array");
    rf_assert_fails(rf_json_get_string(doc, root, "n", &s, &err), err, RF_ERR_CONFIG, "found a number");
}
END_TEST

START_TEST(arrays_and_objects_are_walked_in_order) {
    const rf_json_value *list = rf_json_get(rf_json_root(doc), "list");
    const char *key;
    ck_assert_uint_eq(rf_json_count(list), 3);
    ck_assert(rf_json_is_array(list) && !rf_json_is_object(list));
    ck_assert_double_eq(rf_json_number(rf_json_at(list, 0, &key)), 1);
    ck_assert_ptr_null(key);
    ck_assert_str_eq(rf_json_string(rf_json_at(list, 1, NULL)), "two");
    ck_assert_ptr_null(rf_json_at(list, 3, NULL));
    ck_assert_ptr_null(rf_json_string(rf_json_at(list, 0, NULL)));
    ck_assert(isnan(rf_json_number(rf_json_at(list, 1, NULL))));
    const rf_json_value *object = rf_json_at(list, 2, NULL);
    ck_assert(rf_json_at(object, 0, &key) && strcmp(key, "k") == 0);
    size_t n = 0;
    for (const rf_json_value *v = rf_json_first(rf_json_root(doc)); v; v = rf_json_next(v)) n += rf_json_key(v) != NULL;
    ck_assert_uint_eq(n, rf_json_count(rf_json_root(doc)));
    ck_assert_ptr_null(rf_json_first(rf_json_at(list, 0, NULL)));
    ck_assert_uint_eq(rf_json_count(NULL), 0);
    ck_assert_ptr_null(rf_json_get(list, "k"));
}
END_TEST

START_TEST(bad_text_is_refused) {
    static const struct {
        const char *text, *part;
    } cases[] = {
        {"", "not valid JSON"},
        {"{", "not valid JSON"},
        {"{} x", "not valid JSON"},
        {"{\"a\":}", "byte"},
        {"\"a\\u0000b\"", "zero character"},
        {"\"\xff\"", "0xff"},
        {"\"a\nb\"", "0x0a"},
        {"nul", "not valid JSON"},
        {"\"\\", "not valid JSON"},
        {"\"\xc3", "UTF-8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_json *none = NULL;
        rf_assert_fails(rf_json_parse(&none, cases[i].text, strlen(cases[i].text), "bad", &err), err, RF_ERR_FORMAT,
                        cases[i].part);
        ck_assert_ptr_null(none);
    }
}
END_TEST

START_TEST(nesting_stops_at_64) {
    char nested[130];
    rf_json *ok = NULL, *none = NULL;
    memset(nested, '[', 65);
    memset(nested + 65, ']', 65);
    rf_assert_ok(rf_json_parse(&ok, nested + 1, 128, "deep", &err), err);
    rf_json_close(ok);
    rf_assert_fails(rf_json_parse(&none, nested, 130, "deep", &err), err, RF_ERR_FORMAT, "64 levels");
}
END_TEST

START_TEST(size_and_number_of_values_are_limited) {
    size_t num = ((size_t)64 << 20) + 1;
    char *many = malloc(num);
    rf_json *none = NULL;
    memset(many, ',', num);
    many[0] = '[';
    rf_assert_fails(rf_json_parse(&none, many, num, "many", &err), err, RF_ERR_FORMAT, "the limit is 67108864");
    rf_assert_fails(rf_json_parse(&none, many, num - 1, "many", &err), err, RF_ERR_FORMAT, "4000000 values");
    free(many);
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    char dir[256], path[400];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    rf_assert_fails(rf_json_open(&doc, path, &err), err, RF_ERR_MISSING, path);
    rf_assert_ok(rf_file_write(path, text, strlen(text), &err), err);
    uint64_t live = rf_memory_get_counts().num_live, n = 1;
    for (;; n++) {
        rf_memory_fail_nth(n);
        rf_status st = rf_json_open(&doc, path, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) break;
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    ck_assert_uint_gt(n, 20);
    rf_json_close(doc);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    doc = NULL;
    rf_temp_dir_remove(dir);
}
END_TEST

START_TEST(infinities_as_python_writes_them_are_read) {
    static const char python[] = "{\"a\": -Infinity, \"b\": [Infinity,-Infinity], \"c\": \"Infinity\"}";
    rf_json *own;
    rf_assert_ok(rf_json_parse(&own, python, sizeof python - 1, "memory", &err), err);
    const rf_json_value *root = rf_json_root(own);
    ck_assert(rf_json_number(rf_json_get(root, "a")) == -HUGE_VAL);
    ck_assert(rf_json_number(rf_json_at(rf_json_get(root, "b"), 0, NULL)) == HUGE_VAL);
    ck_assert_str_eq(rf_json_string(rf_json_get(root, "c")), "Infinity");
    rf_json_close(own);
    static const char *const bad[] = {"{\"a\": 1Infinity}", "{\"a\": Infinity1}", "{\"a\": Infinit}", "{\"a\": NaN}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        rf_assert_fails(rf_json_parse(&own, bad[i], strlen(bad[i]), "memory", &err), err, RF_ERR_FORMAT, "memory");
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("json");
    TCase *getters = tcase_create("getters"), *reading = tcase_create("reading");
    tcase_add_checked_fixture(getters, setup, teardown);
    tcase_add_test(getters, values_come_out_as_they_stand);
    tcase_add_test(getters, absent_and_null_take_the_default);
    tcase_add_test(getters, wrong_types_and_ranges_are_named);
    tcase_add_test(getters, arrays_and_objects_are_walked_in_order);
    tcase_set_timeout(reading, 60);
    tcase_add_test(reading, bad_text_is_refused);
    tcase_add_test(reading, infinities_as_python_writes_them_are_read);
    tcase_add_test(reading, nesting_stops_at_64);
    tcase_add_test(reading, size_and_number_of_values_are_limited);
    tcase_add_test(reading, every_failed_allocation_is_survived);
    suite_add_tcase(suite, getters);
    suite_add_tcase(suite, reading);
    return rf_run_suite(suite);
}
