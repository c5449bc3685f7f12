/* tests/samples/test_args.c - the option table: forms that are read, values that are refused. Messages go to standard error. */
#include "samples/refrain/args.h"

#include "tests/test_util.h"

typedef struct {
    bool flag;
    int count;
    const char *text, *choice;
    int64_t whole;
    double real;
    arg_list list;
    const char *plain[2];
    int num_plain;
} values;

static args_result parse(values *v, int argc, const char **argv) {
    memset(v, 0, sizeof *v);
    const arg_option options[] = {
        arg_flag("flag", 'f', "", &v->flag),
        arg_count("count", 'c', "", &v->count),
        arg_string("text", 't', "TEXT", "", &v->text),
        arg_choice("choice", 0, "", &v->choice, "red green blue"),
        arg_int("whole", 'w', "N", "", &v->whole, -5, 100),
        arg_double("real", 0, "X", "", &v->real, 0, 1),
        arg_strings("list", 'l', "NAME", "", &v->list),
    };
    const arg_spec spec = {.command = "test",
                           .usage = "[options]",
                           .about = "",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0],
                           .max_positional = 2,
                           .positional_name = "a file"};
    char *copies[16] = {0};
    for (int i = 0; i < argc; i++) copies[i] = (char *)(uintptr_t)argv[i];
    return args_parse(&spec, argc, copies, v->plain, &v->num_plain);
}

#define PARSE(v, ...)                                                                                                  \
    parse((v), (int)(sizeof((const char *[]){"test", __VA_ARGS__}) / sizeof(char *)),                                  \
          (const char *[]){"test", __VA_ARGS__})

START_TEST(every_form_of_a_value_is_read) {
    values v;
    ck_assert_int_eq(PARSE(&v, "--whole", "7"), ARGS_OK);
    ck_assert_int_eq(v.whole, 7);
    ck_assert_int_eq(PARSE(&v, "--whole=8"), ARGS_OK);
    ck_assert_int_eq(v.whole, 8);
    ck_assert_int_eq(PARSE(&v, "-w", "-5"), ARGS_OK);
    ck_assert_int_eq(v.whole, -5);
    ck_assert_int_eq(PARSE(&v, "-w9"), ARGS_OK);
    ck_assert_int_eq(v.whole, 9);
    ck_assert_int_eq(PARSE(&v, "--text=a=b"), ARGS_OK);
    ck_assert_str_eq(v.text, "a=b");
    ck_assert_int_eq(PARSE(&v, "-fcc", "--real", "1e-1"), ARGS_OK);
    ck_assert(v.flag);
    ck_assert_int_eq(v.count, 2);
    ck_assert(v.real == 0.1);
}
END_TEST

START_TEST(lists_and_plain_arguments_keep_their_order) {
    values v;
    ck_assert_int_eq(PARSE(&v, "a", "--list", "x", "-l", "y", "--", "--b"), ARGS_OK);
    ck_assert_int_eq(v.list.count, 2);
    ck_assert_str_eq(v.list.items[1], "y");
    ck_assert_int_eq(v.num_plain, 2);
    ck_assert_str_eq(v.plain[0], "a");
    ck_assert_str_eq(v.plain[1], "--b");
}
END_TEST

START_TEST(wrong_values_are_refused) {
    values v;
    ck_assert_int_eq(PARSE(&v, "--whole", "101"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--whole", ""), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--whole", "99999999999999999999"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--whole"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "-w"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--real", "inf"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--choice", "gren"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--choice", "red green"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--flag=1"), ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "--"
                               "a word far longer than anything in the table, which must not be measured against it"),
                     ARGS_USAGE_ERROR);
    ck_assert_int_eq(PARSE(&v, "a", "b", "c"), ARGS_USAGE_ERROR);
}
END_TEST

START_TEST(nearest_word_is_found) {
    size_t len = 0;
    const char *near = args_nearest("gren", "red green blue", &len);
    ck_assert_ptr_nonnull(near);
    ck_assert_uint_eq(len, 5);
    ck_assert(strncmp(near, "green", len) == 0);
    ck_assert_ptr_null(args_nearest("xyzzy", "red green blue", &len));
    ck_assert_ptr_null(args_nearest("", "red green blue", &len));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("args");
    TCase *cases = tcase_create("args");
    tcase_add_test(cases, every_form_of_a_value_is_read);
    tcase_add_test(cases, lists_and_plain_arguments_keep_their_order);
    tcase_add_test(cases, wrong_values_are_refused);
    tcase_add_test(cases, nearest_word_is_found);
    suite_add_tcase(suite, cases);
    return rf_run_suite(suite);
}
