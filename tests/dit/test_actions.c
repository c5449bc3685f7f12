/* tests/dit/test_actions.c - the three forms of an action list: what they give, what is refused and in which words, and that a
 * million lines take no longer than a million lines. */
#include "dit/actions.h"

#include <time.h>

#include "core/memory.h"
#include "tests/test_util.h"

#define DIM 6
static const char *const names_of_places[DIM] = {"noop", "forward", "left", "strafe-left", "cameraX", "s\303\274d"};
static const rf_action_names names = {DIM, names_of_places};

typedef struct {
    float *rows;
    int num;
    rf_error err;
} parsed;

static rf_status parse_as(parsed *p, const char *name, const char *bytes, size_t num_bytes) {
    *p = (parsed){0};
    return rf_actions_parse_memory(&p->rows, &p->num, bytes, num_bytes, name, &names, &p->err);
}

/* The rows as text, one a line: numbers with a space between. */
static void check_rows(const char *name, const char *text, const char *want) {
    parsed p;
    char got[4096] = "";
    size_t used = 0;
    rf_assert_ok(parse_as(&p, name, text, strlen(text)), p.err);
    for (int i = 0; i < p.num; i++) {
        for (int j = 0; j < DIM; j++)
            used += (size_t)snprintf(got + used, sizeof got - used, "%g%c", (double)p.rows[i * DIM + j],
                                     j + 1 < DIM ? ' ' : '\n');
    }
    ck_assert_msg(strcmp(got, want) == 0, "%s '%s': got\n%swanted\n%s", name, text, got, want);
    rf_free(p.rows);
}

static void check_refused(const char *name, const char *text, const char *part) {
    parsed p;
    uint64_t live = rf_memory_get_counts().num_live;
    rf_status want = strchr(name, '.') ? RF_ERR_FORMAT : RF_ERR_ARGUMENT;
    rf_assert_fails(parse_as(&p, name, text, strlen(text)), p.err, want, part);
    ck_assert_msg(!strchr(p.err.message, '\n'), "two lines: %s", p.err.message);
    ck_assert_msg(strstr(p.err.message, name) == p.err.message, "does not say where: %s", p.err.message);
    ck_assert_ptr_null(p.rows);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
}

#define NOOP    "1 0 0 0 0 0\n"
#define FORWARD "0 1 0 0 0 0\n"
#define LEFT    "0 0 1 0 0 0\n"
#define BOTH    "0 1 1 0 0 0\n"

START_TEST(text_form) {
    check_rows("actions", "forward", FORWARD);
    check_rows("actions", "forward*2,left", FORWARD FORWARD LEFT);
    check_rows("actions", " forward * 2 ,\n left + forward*2 ", FORWARD FORWARD BOTH BOTH);
    check_rows("actions", "strafe-left", "0 0 0 1 0 0\n");
    check_rows("actions", "none,noop", NOOP NOOP);
    check_rows("actions", "cameraX=-0.25+forward*2", "0 1 0 0 -0.25 0\n0 1 0 0 -0.25 0\n");
    check_rows("actions",
               "s\xc3\xbc"
               "d",
               "0 0 0 0 0 1\n");
    check_rows("actions", "forward*0002", FORWARD FORWARD);
}
END_TEST

START_TEST(text_refused) {
    check_refused("actions", "forward,foward*3", "element 2: no action 'foward'; did you mean forward?");
    check_refused("actions", "jump", "no action 'jump'; the model's: noop, forward, left, strafe-left, cameraX");
    check_refused("actions", "", "element 1: expected an action");
    check_refused("actions", "forward,,left", "element 2: expected an action");
    check_refused("actions", "forward,", "element 2: expected an action");
    check_refused("actions", "forward+", "element 1: expected an action");
    check_refused("actions", "*4", "element 1: expected an action");
    check_refused("actions", "forward*", "expected a count from 1 after '*', found ''");
    check_refused("actions", "forward*0", "expected a count from 1 after '*', found '0'");
    check_refused("actions", "forward*-1", "found '-1'");
    check_refused("actions", "forward*2*3", "no action 'forward*2'");
    check_refused("actions", "forward*1e3", "found '1e3'");
    check_refused("actions", "forward*999999999999", "element 1: more than 1000000 actions");
    check_refused("actions", "forward*99999999999999999999999999999999999", "more than 1000000 actions");
    check_refused("actions", "forward*1000000,left", "element 2: more than 1000000 actions");
    check_refused("actions", "cameraX=nan", "expected a finite number, found 'nan'");
    check_refused("actions", "cameraX=inf", "expected a finite number, found 'inf'");
    check_refused("actions", "cameraX=1e39", "expected a finite number, found '1e39'");
    check_refused("actions", "cameraX=", "expected a finite number, found ''");
    check_refused("actions", "camerax=1", "did you mean cameraX?");
    check_refused("actions", "for\nward\x1b[2J", "no action 'for?ward?[2J'");
    /* a long word is cut, and not inside a character */
    check_refused("actions", "aaaaaaaaaabbbbbbbbbbccccccccccddddddddd\xc3\xbcxxxxxxxx", "ddddddddd...'");
}
END_TEST

START_TEST(text_with_zero_byte) {
    parsed p;
    rf_assert_fails(parse_as(&p, "actions", "forward\0x", 9), p.err, RF_ERR_ARGUMENT, "no action 'forward?x'");
}
END_TEST

START_TEST(none_without_a_name) {
    static const char *const two[] = {"forward", NULL};
    const rf_action_names few = {2, two};
    rf_error err = {0};
    float *rows = NULL;
    int num = 0;
    rf_assert_ok(rf_actions_parse_memory(&rows, &num, "none,forward,noop", 17, "actions", &few, &err), err);
    ck_assert_int_eq(num, 3);
    ck_assert(rows[0] == 0 && rows[1] == 0 && rows[2] == 1 && rows[4] == 0);
    rf_free(rows);
    rf_assert_fails(rf_actions_parse_memory(&rows, &num, "x", 1, "actions", &few, &err), err, RF_ERR_ARGUMENT,
                    "the model's: forward");
}
END_TEST

START_TEST(json_form) {
    check_rows("a.json", "[\"forward\", \"left\"]", FORWARD LEFT);
    check_rows("a.JSON", "{\"fps\": 20, \"actions\": [\"forward\"]}", FORWARD);
    check_rows("a.json", "[{\"forward\": 1, \"left\": 1}, {}, {\"cameraX\": -0.5, \"none\": 0}]",
               BOTH "0 0 0 0 0 0\n0 0 0 0 -0.5 0\n");
    check_rows("a.json", "[[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 2.5e-1, 0]]", FORWARD "0 0 0 0 0.25 0\n");
    check_rows("a.json", "[{\"action\": \"forward\", \"repeat\": 2}, {\"action\": {\"left\": 1}}]",
               FORWARD FORWARD LEFT);
    check_rows("a.json", "[{\"repeat\": 2, \"action\": [0, 0, 1, 0, 0, 0]}]", LEFT LEFT);
    check_rows("a.json", "[{\"action\": \"left+forward*2\", \"repeat\": 2}]", BOTH BOTH BOTH BOTH);
}
END_TEST

START_TEST(json_refused) {
    check_refused("a.json", "", "a.json");
    check_refused("a.json", "[", "a.json");
    check_refused("a.json", "3", "expected an array of actions");
    check_refused("a.json", "{\"actions\": 3}", "expected an array of actions");
    check_refused("a.json", "{}", "expected an array of actions");
    check_refused("a.json", "[]", "holds no action");
    check_refused("a.json", "[\"forward\", 3]",
                  "element 2: expected a name, an object of names or an array of 6 numbers");
    check_refused("a.json", "[null]", "element 1: expected a name");
    check_refused("a.json", "[[1, 2]]", "expected 6 numbers, one for each place of an action, found 2");
    check_refused("a.json", "[[0, 0, 0, 0, 0, \"x\"]]", "expected a finite number");
    check_refused("a.json", "[{\"cameraX\": 1e39}]", "expected a finite number");
    check_refused("a.json", "[{\"cameraX\": 1e999}]", "expected a finite number");
    check_refused("a.json", "[{\"lfet\": 1}]", "no action 'lfet'; did you mean left?");
    check_refused("a.json", "[{\"action\": \"left\", \"repeat\": 0}]",
                  "\"repeat\": expected a whole number 1..1000000");
    check_refused("a.json", "[{\"action\": \"left\", \"repeat\": 1.5}]", "\"repeat\"");
    check_refused("a.json", "[{\"action\": \"left\", \"repeat\": \"2\"}]", "\"repeat\"");
    check_refused("a.json", "[{\"action\": \"left*999999\", \"repeat\": 1000000}]", "more than 1000000 actions");
    check_refused("a.json", "[{\"action\": \"left\", \"times\": 2}]",
                  "expected \"action\" and \"repeat\", found \"times\"");
    check_refused("a.json", "[{\"action\": {\"action\": \"left\"}}]", "no action 'action'");
}
END_TEST

START_TEST(csv_form) {
    check_rows("a.csv", "forward,left\n1,0\n0,1\n", FORWARD LEFT);
    check_rows("a.csv", "\xef\xbb\xbfleft,forward\r\n1,1\r\n\r\n,1\r\n1", BOTH FORWARD LEFT);
    check_rows("a.csv", "\n\n forward , \"left\" \n \"1\" , 0 \n", FORWARD);
    check_rows("a.csv", "forward,left,,\n1,0,,\n0,1\n,,,,,\n", FORWARD LEFT "0 0 0 0 0 0\n");
    check_rows("a.csv",
               "\"s\xc3\xbc"
               "d\",cameraX\n1,-0.5\n",
               "0 0 0 0 -0.5 1\n");
    check_rows("a.csv", "noop\n1\n", NOOP);
}
END_TEST

START_TEST(csv_refused) {
    check_refused("a.csv", "", "holds no action");
    check_refused("a.csv", "forward\n", "holds no action");
    check_refused("a.csv", ",,\n1,2\n", "line 1: expected the names of actions");
    check_refused("a.csv", "foward\n1\n", "line 1, column 1: no action 'foward'; did you mean forward?");
    check_refused("a.csv", "left,forward,left\n1,0,0\n", "line 1, column 3: 'left' is named twice");
    check_refused("a.csv", "left\n1\nx\n", "line 3, column 1: expected a finite number, found 'x'");
    check_refused("a.csv", "left\nnan\n", "found 'nan'");
    check_refused("a.csv", "left\n1,2\n", "line 2, column 2: a value in a column without a name");
    check_refused("a.csv", "left,\n1,2\n", "line 2, column 2: a value in a column without a name");
    check_refused("a.csv", "\"left\n1\n", "line 1, column 1: a quote that does not end with the field");
    check_refused("a.csv", "\"left\"x\n1\n", "a quote that does not end with the field");
}
END_TEST

START_TEST(limits) {
    parsed p;
    size_t bytes = ((size_t)16 << 20) + 1;
    char *much = rf_alloc(bytes);
    ck_assert_ptr_nonnull(much);
    memset(much, ',', bytes);
    rf_assert_fails(parse_as(&p, "a.csv", much, bytes), p.err, RF_ERR_FORMAT, "the limit of an action list");
    rf_assert_fails(parse_as(&p, "actions", much, bytes - 1), p.err, RF_ERR_ARGUMENT, "element 1");
    rf_assert_fails(parse_as(&p, "a.csv", much, bytes - 1), p.err, RF_ERR_FORMAT, "more than 4096 columns");
    memset(much, '"', bytes);
    rf_assert_fails(parse_as(&p, "a.csv", much, bytes - 2), p.err, RF_ERR_FORMAT, "quote");
    rf_free(much);
    rf_assert_fails(rf_actions_parse(&p.rows, &p.num, "/nowhere/a.csv", &names, &p.err), p.err, RF_ERR_MISSING,
                    "/nowhere/a.csv");
}
END_TEST

/* A million lines of each file form. */
START_TEST(million) {
    parsed p;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    size_t bytes = (size_t)RF_MAX_ACTIONS * 10 + 64, used = 0;
    char *text = rf_alloc(bytes);
    ck_assert_ptr_nonnull(text);
    used = (size_t)sprintf(text, "forward,left\n");
    for (int i = 0; i < RF_MAX_ACTIONS; i++) used += (size_t)sprintf(text + used, "%d,1\n", i % 2);
    rf_assert_ok(parse_as(&p, "a.csv", text, used), p.err);
    ck_assert_int_eq(p.num, RF_MAX_ACTIONS);
    ck_assert(p.rows[(size_t)(RF_MAX_ACTIONS - 1) * DIM + 1] == 1);
    rf_free(p.rows);
    used += (size_t)sprintf(text + used, "0,1\n");
    rf_assert_fails(parse_as(&p, "a.csv", text, used), p.err, RF_ERR_FORMAT, "line 1000002: more than 1000000 actions");
    used = (size_t)sprintf(text, "[\"left\"");
    for (int i = 1; i < RF_MAX_ACTIONS; i++) used += (size_t)sprintf(text + used, ",\"left\"");
    used += (size_t)sprintf(text + used, "]");
    rf_assert_ok(parse_as(&p, "a.json", text, used), p.err);
    ck_assert_int_eq(p.num, RF_MAX_ACTIONS);
    rf_free(p.rows);
    rf_free(text);
    clock_gettime(CLOCK_MONOTONIC, &end);
    ck_assert_msg(end.tv_sec - begin.tv_sec < 60, "took %ld s", (long)(end.tv_sec - begin.tv_sec));
}
END_TEST

START_TEST(failing_allocations) {
    static const char *const forms[][2] = {{"actions", "forward*100,left"},
                                           {"a.csv", "forward,left\n1,0\n"},
                                           {"a.json", "[\"forward\", {\"action\": \"left\", \"repeat\": 90}]"}};
    for (int form = 0; form < 3; form++) {
        for (uint64_t nth = 1;; nth++) {
            parsed p;
            uint64_t live = rf_memory_get_counts().num_live;
            ck_assert_uint_lt(nth, 1000);
            rf_memory_fail_nth(nth);
            rf_status st = parse_as(&p, forms[form][0], forms[form][1], strlen(forms[form][1]));
            rf_memory_fail_nth(0);
            rf_free(p.rows);
            ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
            if (st == RF_OK) break;
            ck_assert_ptr_null(p.rows);
            ck_assert_int_eq(st, RF_ERR_MEMORY);
        }
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("actions");
    TCase *forms = tcase_create("forms"), *limit = tcase_create("limits");
    tcase_add_test(forms, text_form);
    tcase_add_test(forms, text_refused);
    tcase_add_test(forms, text_with_zero_byte);
    tcase_add_test(forms, none_without_a_name);
    tcase_add_test(forms, json_form);
    tcase_add_test(forms, json_refused);
    tcase_add_test(forms, csv_form);
    tcase_add_test(forms, csv_refused);
    tcase_add_test(limit, limits);
    tcase_add_test(limit, million);
    tcase_add_test(limit, failing_allocations);
    tcase_set_timeout(limit, 120);
    suite_add_tcase(suite, forms);
    suite_add_tcase(suite, limit);
    return rf_run_suite(suite);
}
