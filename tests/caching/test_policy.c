/* tests/caching/test_policy.c - the list of policies, options as text, errors that help, and the shared refusals. */
#include "tests/test_util.h"

#include "caching/policy.h"
#include "core/memory.h"

static rf_policy *make(const char *name) {
    rf_error err = {0};
    rf_policy *p = NULL;
    rf_assert_ok(rf_policy_create(&p, name, &err), err);
    return p;
}

static int option_of(const rf_policy *p, const char *name) {
    const rf_policy_def *def = rf_policy_get_def(p);
    for (int i = 0; i < def->num_options; i++) {
        if (strcmp(def->options[i].name, name) == 0) return i;
    }
    ck_abort_msg("%s has no option %s", def->name, name);
    return -1;
}

static void assert_describes(const rf_policy *p, const char *want) {
    char text[1024];
    ck_assert_uint_eq(rf_policy_describe(p, text, sizeof text), strlen(want));
    ck_assert_str_eq(text, want);
}

/* ---- the list ---- */

START_TEST(policies_are_listed_in_order_and_found_by_name) {
    static const char *const want[] = {"interval", "teacache",   "easycache",  "magcache", "spectrum",
                                       "adacache", "worldcache", "fbcache",    "dbcache",  "deltacache",
                                       "fora",     "taylorseer", "hicache",    "speca",    "pab",
                                       "toca",     "duca",       "diffsparse", "replay",   "measure"};
    ck_assert_int_eq(rf_policy_count(), sizeof want / sizeof want[0]);
    for (int i = 0; i < rf_policy_count(); i++) {
        ck_assert_str_eq(rf_policy_at(i)->name, want[i]);
        ck_assert_ptr_eq(rf_policy_find(want[i]), rf_policy_at(i));
    }
    ck_assert_ptr_null(rf_policy_at(-1));
    ck_assert_ptr_null(rf_policy_at(rf_policy_count()));
    ck_assert_ptr_null(rf_policy_find("Interval"));
    ck_assert_ptr_null(rf_policy_find(""));
}
END_TEST

START_TEST(every_policy_says_what_it_is) {
    const rf_policy_def *def = rf_policy_at(_i);
    static const char *const levels[] = {"step", "block", "part", "token", "replay"};
    ck_assert_str_eq(def->family, "feature");
    bool known = false;
    for (size_t i = 0; i < 5; i++) known |= strcmp(def->level, levels[i]) == 0;
    ck_assert_msg(known, "%s: level %s", def->name, def->level);
    ck_assert_msg(def->paper && def->paper[0] && def->summary && def->summary[0] && def->fits && def->fits[0],
                  "%s: paper, summary or fits is empty", def->name);
    ck_assert_int_le(def->num_options, RF_POLICY_MAX_OPTIONS);
    ck_assert_ptr_nonnull(def->setup);
    ck_assert_ptr_nonnull(def->plan);
    for (int i = 0; i < def->num_options; i++) {
        const rf_policy_option *o = &def->options[i];
        ck_assert_msg(o->name && o->name[0] &&
                          strspn(o->name, "abcdefghijklmnopqrstuvwxyz0123456789_") == strlen(o->name),
                      "%s: option %d is called '%s'", def->name, i, o->name);
        ck_assert_msg(o->def && o->help && o->help[0], "%s: %s has no default or no help", def->name, o->name);
        for (int j = 0; j < i; j++) ck_assert_str_ne(def->options[j].name, o->name);
        if (o->type == RF_OPTION_INT || o->type == RF_OPTION_DOUBLE) {
            ck_assert_msg(o->min < o->max, "%s: %s is in %g..%g", def->name, o->name, o->min, o->max);
        }
        if (o->type == RF_OPTION_CHOICE) ck_assert_msg(o->choices && o->choices[0], "%s: %s", def->name, o->name);
    }
}
END_TEST

/* ---- options ---- */

START_TEST(descriptions_can_be_set_again) {
    rf_error err = {0};
    char text[4096], again[4096];
    rf_policy *p = make(rf_policy_at(_i)->name), *q = make(rf_policy_at(_i)->name);
    const rf_policy_def *def = rf_policy_get_def(p);
    for (int i = 0; i < def->num_options; i++) { /* away from the defaults */
        const rf_policy_option *o = &def->options[i];
        char value[64] = "true";
        if (o->type == RF_OPTION_INT) snprintf(value, sizeof value, "%.0f", o->max);
        if (o->type == RF_OPTION_DOUBLE) snprintf(value, sizeof value, "%.17g", o->min + (o->max - o->min) / 3);
        if (o->type == RF_OPTION_CHOICE) snprintf(value, sizeof value, "%s", strrchr(o->choices, ' ') + 1);
        if (o->type == RF_OPTION_TEXT) snprintf(value, sizeof value, "a,b c,d");
        rf_assert_ok(rf_policy_set_one(p, o->name, value, &err), err);
    }
    ck_assert_uint_lt(rf_policy_describe(p, text, sizeof text), sizeof text);
    rf_assert_ok(rf_policy_set(q, text, &err), err);
    rf_policy_describe(q, again, sizeof again);
    ck_assert_str_eq(again, text);
    for (int i = 0; i < def->num_options; i++) {
        ck_assert_int_eq(rf_policy_int(p, i), rf_policy_int(q, i));
        ck_assert(rf_policy_double(p, i) == rf_policy_double(q, i));
    }
    rf_policy_destroy(p);
    rf_policy_destroy(q);
}
END_TEST

START_TEST(bounds_are_inside_and_what_is_beyond_is_refused) {
    rf_error err = {0};
    rf_policy *p = make(rf_policy_at(_i)->name);
    const rf_policy_def *def = rf_policy_get_def(p);
    for (int i = 0; i < def->num_options; i++) {
        const rf_policy_option *o = &def->options[i];
        char value[64];
        if (o->type == RF_OPTION_TEXT) continue;
        if (o->type == RF_OPTION_INT || o->type == RF_OPTION_DOUBLE) {
            const double good[] = {o->min, o->max}, bad[] = {o->min - 1, o->max * 2 + 1};
            for (int j = 0; j < 2; j++) {
                snprintf(value, sizeof value, "%.17g", good[j]);
                rf_assert_ok(rf_policy_set_one(p, o->name, value, &err), err);
                snprintf(value, sizeof value, "%.17g", bad[j]);
                rf_assert_fails(rf_policy_set_one(p, o->name, value, &err), err, RF_ERR_ARGUMENT, o->name);
            }
        }
        static const char *const junk[] = {"", "x1", "1x", "nan", "--1"};
        for (int j = 0; j < 5; j++) {
            rf_assert_fails(rf_policy_set_one(p, o->name, junk[j], &err), err, RF_ERR_ARGUMENT, o->name);
        }
    }
    rf_policy_destroy(p);
}
END_TEST

START_TEST(values_of_every_type_are_read) {
    rf_error err = {0};
    rf_policy *p = make("interval");
    assert_describes(p, "interval=3,first=1,last=true,level=output,order=0,predictor=taylor");
    rf_assert_ok(rf_policy_set(p, " order = 2 ,last=off, level=hidden,predictor=newton", &err), err);
    assert_describes(p, "interval=3,first=1,last=false,level=hidden,order=2,predictor=newton");
    ck_assert_int_eq(rf_policy_int(p, option_of(p, "order")), 2);
    ck_assert(!rf_policy_bool(p, option_of(p, "last")));
    ck_assert_int_eq(rf_policy_int(p, option_of(p, "level")), 2);
    ck_assert_str_eq(rf_policy_text(p, option_of(p, "level")), "hidden");
    for (int i = 0; i < 4; i++) {
        static const char *const yes[] = {"true", "1", "yes", "on"}, *const no[] = {"false", "0", "no", "off"};
        rf_assert_ok(rf_policy_set_one(p, "last", yes[i], &err), err);
        ck_assert(rf_policy_bool(p, option_of(p, "last")));
        rf_assert_ok(rf_policy_set_one(p, "last", no[i], &err), err);
        ck_assert(!rf_policy_bool(p, option_of(p, "last")));
    }
    rf_assert_ok(rf_policy_set(p, "", &err), err);
    rf_assert_ok(rf_policy_set(p, NULL, &err), err);
    rf_assert_ok(rf_policy_set(p, ",order=1, ,", &err), err);
    ck_assert_int_eq(rf_policy_int(p, option_of(p, "order")), 1);
    rf_policy_destroy(p);

    p = make("teacache");
    rf_assert_ok(rf_policy_set(p, "threshold=1e-3", &err), err);
    ck_assert(rf_policy_double(p, option_of(p, "threshold")) == 1e-3);
    rf_assert_ok(rf_policy_set(p, "threshold=0.30000000000000004", &err), err);
    char text[64];
    ck_assert_uint_eq(rf_policy_value_text(p, option_of(p, "threshold"), text, sizeof text), 19);
    ck_assert_str_eq(text, "0.30000000000000004");
    rf_assert_ok(rf_policy_set(p, "threshold=-0", &err), err);
    rf_policy_value_text(p, option_of(p, "threshold"), text, sizeof text);
    ck_assert_str_eq(text, "0");
    rf_policy_destroy(p);
}
END_TEST

START_TEST(text_values_may_hold_commas) {
    rf_error err = {0};
    rf_policy *p = make("adacache");
    rf_assert_ok(rf_policy_set(p, "codebook=one, two,first=3", &err), err);
    ck_assert_str_eq(rf_policy_text(p, option_of(p, "codebook")), "one, two");
    ck_assert_int_eq(rf_policy_int(p, option_of(p, "first")), 3);
    rf_assert_ok(rf_policy_set_one(p, "codebook", "a=b,first=9", &err), err);
    ck_assert_str_eq(rf_policy_text(p, option_of(p, "codebook")), "a=b,first=9");
    ck_assert_int_eq(rf_policy_int(p, option_of(p, "first")), 3);
    rf_assert_ok(rf_policy_set(p, "codebook=", &err), err);
    ck_assert_str_eq(rf_policy_text(p, option_of(p, "codebook")), "");
    char long_text[5000];
    memset(long_text, 'x', sizeof long_text);
    long_text[sizeof long_text - 1] = 0;
    rf_assert_fails(rf_policy_set_one(p, "codebook", long_text, &err), err, RF_ERR_ARGUMENT, "codebook is longer");
    rf_policy_destroy(p);
}
END_TEST

START_TEST(errors_say_what_is_possible) {
    rf_error err = {0};
    rf_policy *p = make("interval");
    rf_assert_fails(
        rf_policy_set(p, "ordr=1", &err), err, RF_ERR_ARGUMENT,
        "policy interval has no option 'ordr'; did you mean 'order'? (options: interval, first, last, level, "
        "order, predictor)");
    rf_assert_fails(rf_policy_set(p, "pred=1", &err), err, RF_ERR_ARGUMENT, "did you mean 'predictor'?");
    rf_assert_fails(rf_policy_set(p, "zzzzzz=1", &err), err, RF_ERR_ARGUMENT, "'zzzzzz' (options: interval, first");
    rf_assert_fails(rf_policy_set(p, "=1", &err), err, RF_ERR_ARGUMENT, "no option ''");
    rf_assert_fails(rf_policy_set(p, "order", &err), err, RF_ERR_ARGUMENT, "order has no value (write order=VALUE)");
    rf_assert_fails(rf_policy_set(p, "order=1,2", &err), err, RF_ERR_ARGUMENT, "no option '2'");
    rf_assert_fails(rf_policy_set(p, "order=4", &err), err, RF_ERR_ARGUMENT,
                    "policy interval: order='4' is not an integer in 0..3");
    rf_assert_fails(rf_policy_set(p, "order=1.5", &err), err, RF_ERR_ARGUMENT, "not an integer in 0..3");
    rf_assert_fails(rf_policy_set(p, "order=99999999999999999999", &err), err, RF_ERR_ARGUMENT, "not an integer");
    rf_assert_fails(rf_policy_set(p, "last=maybe", &err), err, RF_ERR_ARGUMENT, "last='maybe' is not true or false");
    rf_assert_fails(rf_policy_set(p, "level=hiden", &err), err, RF_ERR_ARGUMENT,
                    "level='hiden' is not one of output, residual, hidden; did you mean 'hidden'?");
    rf_assert_fails(rf_policy_set(p, "level=output residual", &err), err, RF_ERR_ARGUMENT, "is not one of");
    assert_describes(p, "interval=3,first=1,last=true,level=output,order=0,predictor=taylor");
    rf_policy_destroy(p);

    p = make("teacache");
    rf_assert_fails(rf_policy_set(p, "threshold=-1", &err), err, RF_ERR_ARGUMENT,
                    "policy teacache: threshold='-1' is not a number in 0..1000");
    rf_assert_fails(rf_policy_set(p, "threshold=inf", &err), err, RF_ERR_ARGUMENT, "not a number in 0..1000");
    rf_policy_destroy(p);

    rf_assert_fails(rf_policy_create(&p, "worldcahe", &err), err, RF_ERR_ARGUMENT,
                    "no policy 'worldcahe'; did you mean 'worldcache'? (policies: interval, teacache,");
    ck_assert_ptr_nonnull(strstr(err.message, "diffsparse, replay, measure)"));
    ck_assert_ptr_null(p);
    rf_assert_fails(rf_policy_create(&p, "taylor", &err), err, RF_ERR_ARGUMENT, "did you mean 'taylorseer'?");
    rf_assert_fails(rf_policy_create(&p, "", &err), err, RF_ERR_ARGUMENT, "no policy ''");
}
END_TEST

START_TEST(a_set_with_an_error_changes_nothing) {
    rf_error err = {0};
    rf_policy *p = make("interval");
    rf_assert_fails(rf_policy_set(p, "order=2,level=hidden,first=0", &err), err, RF_ERR_ARGUMENT, "first='0'");
    assert_describes(p, "interval=3,first=1,last=true,level=output,order=0,predictor=taylor");
    rf_policy_destroy(p);
}
END_TEST

START_TEST(clones_go_their_own_way) {
    rf_error err = {0};
    rf_policy *p = make("adacache");
    rf_assert_ok(rf_policy_set(p, "codebook=fast", &err), err);
    rf_policy *q = rf_policy_clone(p);
    ck_assert_ptr_nonnull(q);
    rf_assert_ok(rf_policy_set(q, "codebook=long,first=7", &err), err);
    assert_describes(p, "codebook=fast,first=2,last=true");
    rf_policy_destroy(p);
    assert_describes(q, "codebook=long,first=7,last=true");
    rf_policy_destroy(q);
    rf_policy_destroy(NULL);
}
END_TEST

START_TEST(descriptions_are_cut_like_snprintf) {
    rf_policy *p = make("interval");
    const char *want = "interval=3,first=1,last=true,level=output,order=0,predictor=taylor";
    char text[100];
    for (size_t room = 0; room <= strlen(want) + 1; room++) {
        memset(text, '#', sizeof text);
        ck_assert_uint_eq(rf_policy_describe(p, room ? text : NULL, room), strlen(want));
        if (room == 0) continue;
        ck_assert_uint_eq(strlen(text), room - 1);
        ck_assert(strncmp(text, want, room - 1) == 0);
        ck_assert(text[room] == '#');
    }
    rf_policy_destroy(p);
}
END_TEST

START_TEST(every_failed_allocation_is_reported) {
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t nth = 1;; nth++) {
        rf_error err = {0};
        rf_policy *p = NULL, *q = NULL;
        rf_memory_fail_nth(nth);
        rf_status st = rf_policy_create(&p, "adacache", &err);
        if (st == RF_OK) st = rf_policy_set(p, "codebook=fast,first=3", &err);
        if (st == RF_OK) q = rf_policy_clone(p);
        if (st == RF_OK && !q) st = RF_ERR_MEMORY;
        rf_memory_fail_nth(0);
        rf_policy_destroy(p);
        rf_policy_destroy(q);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) {
            ck_assert_uint_ge(nth, 8);
            break;
        }
        ck_assert_int_eq(st, RF_ERR_MEMORY);
    }
}
END_TEST

/* ---- what policies share ---- */

START_TEST(misfits_are_refused_unless_forced) {
    rf_error err = {0};
    rf_policy *p = make("interval");
    rf_cache_shape shape = {.model = "m", .num_steps = 12, .sampler = "ddpm", .stochastic = true};
    rf_assert_fails(rf_policy_refuse_stochastic(p, &shape, &err), err, RF_ERR_UNSUPPORTED,
                    "interval needs a solver that adds no noise");
    ck_assert_ptr_nonnull(strstr(err.message, "ddpm adds noise"));
    rf_assert_ok(rf_policy_refuse_few_steps(p, &shape, 12, &err), err);
    rf_assert_fails(rf_policy_refuse_few_steps(p, &shape, 13, &err), err, RF_ERR_UNSUPPORTED,
                    "interval needs at least 13 steps with these options, this run has 12");
    shape.force = true;
    rf_assert_ok(rf_policy_refuse_stochastic(p, &shape, &err), err);
    rf_assert_ok(rf_policy_refuse_few_steps(p, &shape, 13, &err), err);
    shape.force = false;
    shape.stochastic = false;
    rf_assert_ok(rf_policy_refuse_stochastic(p, &shape, &err), err);
    rf_policy_destroy(p);
}
END_TEST

START_TEST(relative_changes_have_defined_corners) {
    float signals[RF_SIGNAL_COUNT][2][4] = {{{0}}};
    rf_cache_shape shape = {.branches = 2};
    rf_step_ctx ctx = {.shape = &shape, .signals = (const float(*)[2][4])signals};
    float(*s)[4] = signals[RF_SIGNAL_PROBE];
    ck_assert(rf_ctx_rel1(&ctx, RF_SIGNAL_PROBE, 0) == 0);
    s[0][0] = 1;
    s[0][1] = 4;
    s[1][0] = 3;
    s[1][1] = 4;
    ck_assert(rf_ctx_rel1(&ctx, RF_SIGNAL_PROBE, 0) == 0.25);
    ck_assert(rf_ctx_max_rel1(&ctx, RF_SIGNAL_PROBE) == 0.75);
    shape.branches = 1;
    ck_assert(rf_ctx_max_rel1(&ctx, RF_SIGNAL_PROBE) == 0.25);
    s[0][1] = 0;
    ck_assert(rf_ctx_rel1(&ctx, RF_SIGNAL_PROBE, 0) >= 1e20 && isfinite(rf_ctx_rel1(&ctx, RF_SIGNAL_PROBE, 0)));
    s[0][0] = NAN;
    s[0][1] = 1;
    ck_assert(rf_ctx_rel1(&ctx, RF_SIGNAL_PROBE, 0) >= 1e20);
    ck_assert(rf_ctx_max_rel1(&ctx, RF_SIGNAL_PROBE) >= 1e20);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching policy");
    TCase *tc = tcase_create("all");
    tcase_add_test(tc, policies_are_listed_in_order_and_found_by_name);
    tcase_add_loop_test(tc, every_policy_says_what_it_is, 0, rf_policy_count());
    tcase_add_loop_test(tc, descriptions_can_be_set_again, 0, rf_policy_count());
    tcase_add_loop_test(tc, bounds_are_inside_and_what_is_beyond_is_refused, 0, rf_policy_count());
    tcase_add_test(tc, values_of_every_type_are_read);
    tcase_add_test(tc, text_values_may_hold_commas);
    tcase_add_test(tc, errors_say_what_is_possible);
    tcase_add_test(tc, a_set_with_an_error_changes_nothing);
    tcase_add_test(tc, clones_go_their_own_way);
    tcase_add_test(tc, descriptions_are_cut_like_snprintf);
    tcase_add_test(tc, every_failed_allocation_is_reported);
    tcase_add_test(tc, misfits_are_refused_unless_forced);
    tcase_add_test(tc, relative_changes_have_defined_corners);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
