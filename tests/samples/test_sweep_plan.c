/* tests/samples/test_sweep_plan.c - specs of `refrain sweep`, its built-in list, the control, searches, and the
 * store's files. */
#include "samples/refrain/sweep_plan.h"

#include "core/file.h"
#include "core/memory.h"
#include "samples/refrain/sweep_store.h"
#include "tests/test_util.h"

static void expect(const char *spec, const char *const *options) {
    rf_error err = {0};
    sweep_plan plan = {0};
    rf_assert_ok(sweep_plan_add(&plan, spec, &err), err);
    int num = 0;
    for (; options[num]; num++) {
        ck_assert_msg(num < plan.num, "%s: %d settings, expected '%s' too", spec, plan.num, options[num]);
        ck_assert_str_eq(plan.items[num].options, options[num]);
    }
    ck_assert_int_eq(plan.num, num);
    sweep_plan_free(&plan);
}
#define EXPECT(spec, ...) expect(spec, (const char *const[]){__VA_ARGS__, NULL})

START_TEST(values_and_ranges) {
    EXPECT("fora", "");
    EXPECT("fora:interval=3", "interval=3");
    EXPECT("interval:interval=2,3,4", "interval=2", "interval=3", "interval=4");
    EXPECT("interval:interval=2..4", "interval=2", "interval=3", "interval=4");
    EXPECT("interval:interval=4..2", "interval=4", "interval=3", "interval=2");
    EXPECT("interval:interval=2..8/3", "interval=2", "interval=5", "interval=8");
    EXPECT("interval:interval=2..3/5", "interval=2", "interval=3");
    EXPECT("worldcache:threshold=0.05..0.5/6", "threshold=0.05", "threshold=0.14", "threshold=0.23", "threshold=0.32",
           "threshold=0.41", "threshold=0.5");
    EXPECT("worldcache:threshold=0.1..10/3g", "threshold=0.1", "threshold=1", "threshold=10");
    EXPECT("worldcache:threshold=1e-2,.5..1/2,3", "threshold=1e-2", "threshold=0.5", "threshold=1", "threshold=3");
    EXPECT("fbcache:threshold=.1;warmup=2,5", "threshold=.1;warmup=2", "threshold=.1;warmup=5");
    EXPECT("dbcache:calibrator=none,taylor;fn=1,2", "calibrator=none;fn=1", "calibrator=none;fn=2",
           "calibrator=taylor;fn=1", "calibrator=taylor;fn=2");
    EXPECT("adacache:codebook=slow|0.08:2/1:1", "codebook=slow", "codebook=0.08:2/1:1");
    EXPECT("dbcache:max_cached=-1..1", "max_cached=-1", "max_cached=0", "max_cached=1");
}
END_TEST

START_TEST(equal_settings_are_one) {
    EXPECT("interval:interval=2,2,3..2", "interval=2", "interval=3");
    rf_error err = {0};
    sweep_plan plan = {0};
    rf_assert_ok(sweep_plan_add(&plan, "fora:interval=3", &err), err);
    rf_assert_ok(sweep_plan_add(&plan, "fora", &err), err); /* the default */
    rf_assert_ok(sweep_plan_add(&plan, "fora:count=down;interval=3", &err), err);
    ck_assert_int_eq(plan.num, 1);
    ck_assert_int_eq(sweep_plan_find(&plan, plan.items[0].key), 0);
    ck_assert_int_eq(sweep_plan_find(&plan, "fora"), -1);
    sweep_plan_free(&plan);
}
END_TEST

START_TEST(wrong_specs_name_the_place) {
    static const struct {
        const char *spec, *message;
    } cases[] = {
        {"", "character 1: expected the name of a policy"},
        {":interval=2", "character 1: expected the name of a policy"},
        {"wordlcache", "worldcache"},
        {"fora:", "character 6: expected OPTION=VALUES"},
        {"fora:interval", "character 6: expected OPTION=VALUES, found 'interval'"},
        {"fora:=2", "character 6: expected OPTION=VALUES"},
        {"fora:interval=", "character 15: expected a value"},
        {"fora:interval=2,", "character 17: expected a value"},
        {"fora:interval=2,,3", "character 17: expected a value"},
        {"fora:interval=2;", "character 17: expected OPTION=VALUES"},
        {"fora:intervall=2", "character 6"},
        {"fora:intervall=2", "interval"},
        {"fora:interval=2;interval=3", "character 17: the option stands twice"},
        {"fora:interval=x", "character 15"},
        {"fora:interval=0", "character 15"},
        {"fora:interval=2,0", "character 15"},
        {"fora:count=up,side", "character 12"},
        {"fora:interval=2../3", "character 15: expected a range A..B/N"},
        {"fora:interval=..3", "character 15: expected a range A..B/N"},
        {"fora:interval=2..3/0", "character 15: expected /N"},
        {"fora:interval=2..3/x", "character 15: expected /N"},
        {"fora:interval=2..3/2.5", "character 15: expected /N"},
        {"fora:interval=1..5000", "at most 1000 values"},
        {"worldcache:threshold=0.1..0.5", "character 22: a range of numbers that are not whole needs /N"},
        {"worldcache:threshold=0..0.5/3g", "character 22: a geometric range needs ends above 0"},
        {"worldcache:threshold=nan..1/3", "character 22: expected a range A..B/N"},
        {"worldcache:threshold=-1..1/3", "character 22"},
        {"toca:interval=1..200;age_weight=0..1/100", "more than 10000 settings"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rf_error err = {0};
        sweep_plan plan = {0};
        rf_assert_fails(sweep_plan_add(&plan, cases[i].spec, &err), err, RF_ERR_ARGUMENT, cases[i].message);
        sweep_plan_free(&plan);
    }
}
END_TEST

/* Every policy has settings in the list, all of them valid and all different. `replay` needs a file of the user's,
 * `measure` never skips. */
START_TEST(builtin_list_fits_the_registry) {
    rf_error err = {0};
    sweep_plan plan = {0};
    rf_assert_ok(sweep_plan_add(&plan, "all", &err), err);
    for (int i = 0; i < rf_policy_count(); i++) {
        const char *name = rf_policy_at(i)->name;
        int num = 0;
        for (int j = 0; j < plan.num; j++) num += strcmp(plan.items[j].policy, name) == 0;
        if (strcmp(name, "replay") == 0 || strcmp(name, "measure") == 0) {
            ck_assert_int_eq(num, 0);
        } else {
            ck_assert_msg(num >= 3, "%s has %d settings in the built-in list", name, num);
        }
    }
    ck_assert_int_ge(plan.num, 60);
    ck_assert_int_le(plan.num, 110);
    int listed = plan.num, summed = 0;
    for (int i = 0; sweep_builtin_spec(i); i++) {
        sweep_plan one = {0};
        rf_assert_ok(sweep_plan_add(&one, sweep_builtin_spec(i), &err), err);
        summed += one.num;
        sweep_plan_free(&one);
    }
    ck_assert_int_eq(listed, summed); /* none is there twice */
    sweep_plan_free(&plan);
}
END_TEST

/* Worlds have a list of their own, as long with frames that leave the window; what computes everything comes first. */
START_TEST(worlds) {
    rf_error err = {0};
    sweep_plan plan = {0}, slides = {0}, one = {0};
    rf_assert_ok(sweep_plan_add_world(&plan, "all", false, &err), err);
    rf_assert_ok(sweep_plan_add_world(&slides, "all", true, &err), err);
    ck_assert_int_gt(slides.num, plan.num);
    ck_assert_int_le(slides.num, 110);
    ck_assert_str_eq(plan.items[0].key, "none:context=off");
    ck_assert_str_eq(plan.items[1].key, "none:");
    for (int i = 0; i < rf_policy_count(); i++) {
        const char *name = rf_policy_at(i)->name;
        int num = 0;
        for (int j = 0; j < plan.num; j++) num += strcmp(plan.items[j].policy, name) == 0;
        bool listed = strcmp(name, "replay") != 0 && strcmp(name, "measure") != 0;
        ck_assert_msg(listed ? num >= 3 : num == 0, "%s has %d settings in the list of worlds", name, num);
    }
    sweep_plan_free(&plan);
    sweep_plan_free(&slides);
    rf_assert_ok(sweep_plan_add_world(&one, "fora:interval=2;carry=off,first,last", false, &err), err);
    rf_assert_ok(sweep_plan_add_world(&one, "fora:interval=2", false, &err), err); /* the first of them */
    rf_assert_ok(sweep_plan_add_world(&one, "none:context=keep,off", false, &err), err);
    rf_assert_ok(sweep_plan_add_steps(&one, "4", 10, &err), err);
    ck_assert_int_eq(one.num, 6);
    ck_assert_int_eq(one.items[0].context, SWEEP_CONTEXT_OFF);
    ck_assert_int_eq(one.items[1].carry, RF_CARRY_OFF);
    ck_assert_int_eq(one.items[1].context, SWEEP_CONTEXT_GIVEN);
    ck_assert_int_eq(one.items[3].carry, RF_CARRY_LAST);
    ck_assert_ptr_nonnull(strstr(one.items[3].key, ";carry=last"));
    ck_assert_str_eq(one.items[4].key, "none:context=keep");
    ck_assert_str_eq(one.items[5].key, "steps:4");
    sweep_plan_free(&one);
    static const struct {
        const char *spec, *message;
        bool world;
    } wrong[] = {
        {"none:carry=last", "character 6: `none` takes the option context", true},
        {"none:context=kep", "character 14: context: expected one of rebuild keep sinks off, found 'kep'", true},
        {"fora:carry=always", "character 12: carry: expected one of off first last", true},
        {"fora:carry=last;carry=first", "character 17: the option stands twice", true},
        {"fora:carry=last", "carry", false},
        {"none", "none", false},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        rf_status st = wrong[i].world ? sweep_plan_add_world(&one, wrong[i].spec, false, &err)
                                      : sweep_plan_add(&one, wrong[i].spec, &err);
        rf_assert_fails(st, err, RF_ERR_ARGUMENT, wrong[i].message);
        sweep_plan_free(&one);
    }
    sweep_range range;
    rf_assert_fails(sweep_plan_search("none", true, &one, &range, &err), err, RF_ERR_ARGUMENT, "option of a policy");
    rf_assert_ok(sweep_plan_search("fora:carry=last", true, &one, &range, &err), err);
    ck_assert_int_eq(one.items[0].carry, RF_CARRY_LAST);
    sweep_plan_free(&one);
}
END_TEST

static void expect_text(const char *specs, const char *const *keys) {
    rf_error err = {0};
    sweep_plan plan = {0};
    rf_assert_ok(sweep_plan_add_text_list(&plan, specs, false, &err), err);
    int num = 0;
    for (; keys[num]; num++) {
        ck_assert_msg(num < plan.num, "%s: %d settings, expected '%s' too", specs, plan.num, keys[num]);
        char shown[256];
        snprintf(shown, sizeof shown, "%s|%s|%s", plan.items[num].policy, plan.items[num].options,
                 plan.items[num].decode ? plan.items[num].decode : "");
        ck_assert_str_eq(shown, keys[num]);
    }
    ck_assert_int_eq(plan.num, num);
    sweep_plan_free(&plan);
}
#define EXPECT_TEXT(specs, ...) expect_text(specs, (const char *const[]){__VA_ARGS__, NULL})

/* Row policies with settings of decoding behind them, and lists of specs whose values have commas too. */
START_TEST(specs_of_text) {
    EXPECT_TEXT("none", "none||");
    EXPECT_TEXT("none,dual,window:refresh=16,elastic", "none||", "dual||", "window|refresh=16|", "elastic||");
    EXPECT_TEXT("window:refresh=16,32,dual", "window|refresh=16|", "window|refresh=32|", "dual||");
    EXPECT_TEXT("dual+commit=threshold+threshold=0.8,0.9",
                "dual|+commit=threshold+threshold=0.8|commit=threshold+threshold=0.8",
                "dual|+commit=threshold+threshold=0.9|commit=threshold+threshold=0.9");
    EXPECT_TEXT("none+steps=8..16/2,none", "none|+steps=8|steps=8", "none|+steps=16|steps=16", "none||");
    EXPECT_TEXT("window:refresh=8;active=4+end=fill", "window|refresh=8;active=4+end=fill|end=fill");
    static const struct {
        const char *spec, *message;
    } wrong[] = {
        {"teacache", "keeps features of diffusion transformers"},
        {"duall", "did you mean 'dual'"},
        {"none:steps=3", "`none` has no options"},
        {"dual+commit", "expected OPTION=VALUES"},
        {"dual+comit=topn", "character 6: no such setting"},
        {"dual+commit=tpn", "character 13: commit: no 'tpn'"},
        {"dual+threshold=2", "expected 0..1, found 2"},
        {"dual+steps=4+steps=8", "the option stands twice"},
        {"window:refrsh=3+end=fill", "did you mean 'refresh'"},
        {"dual+steps=2.5", "found '2.5'"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        rf_error err = {0};
        sweep_plan plan = {0};
        ck_assert_msg(sweep_plan_add_text(&plan, wrong[i].spec, false, &err) == RF_ERR_ARGUMENT, "%s", wrong[i].spec);
        ck_assert_msg(strstr(err.message, wrong[i].message) != NULL, "%s: %s", wrong[i].spec, err.message);
        sweep_plan_free(&plan);
    }
    rf_error err = {0};
    sweep_plan plan = {0};
    ck_assert_int_eq(sweep_plan_add(&plan, "dual", &err), RF_ERR_ARGUMENT); /* of images */
    sweep_plan_free(&plan);
}
END_TEST

START_TEST(text_lists_fit_the_registry) {
    rf_error err = {0};
    for (int blocks = 0; blocks < 2; blocks++) {
        sweep_plan plan = {0};
        int summed = 0;
        rf_assert_ok(sweep_plan_add_text(&plan, "all", blocks, &err), err);
        for (int i = 0; i < rf_row_policy_count(); i++) {
            int num = 0;
            for (int j = 0; j < plan.num; j++) num += strcmp(plan.items[j].policy, rf_row_policy_at(i)->name) == 0;
            ck_assert_msg(blocks ? num == 0 : num >= 2, "%s has %d settings", rf_row_policy_at(i)->name, num);
        }
        for (int i = 0; sweep_builtin_text_spec(i, blocks); i++) {
            sweep_plan one = {0};
            rf_assert_ok(sweep_plan_add_text(&one, sweep_builtin_text_spec(i, blocks), blocks, &err), err);
            summed += one.num;
            sweep_plan_free(&one);
        }
        ck_assert_str_eq(plan.items[0].key, "none:");
        ck_assert_int_eq(plan.num, summed); /* none is there twice */
        sweep_plan_free(&plan);
    }
}
END_TEST

START_TEST(fewer_steps) {
    rf_error err = {0};
    sweep_plan plan = {0};
    rf_assert_ok(sweep_plan_add_steps(&plan, "auto", 50, &err), err);
    ck_assert_int_ge(plan.num, 6);
    ck_assert_int_eq(plan.items[0].num_steps, 40);
    ck_assert_int_eq(plan.items[plan.num - 1].num_steps, 5);
    for (int i = 0; i < plan.num; i++) ck_assert_ptr_null(plan.items[i].object);
    sweep_plan_free(&plan);
    for (int steps = 2; steps < 60; steps++) {
        rf_assert_ok(sweep_plan_add_steps(&plan, "auto", steps, &err), err);
        ck_assert_int_ge(plan.num, 1);
        for (int i = 0; i < plan.num; i++) {
            ck_assert_int_ge(plan.items[i].num_steps, 1);
            ck_assert_int_lt(plan.items[i].num_steps, steps);
        }
        sweep_plan_free(&plan);
    }
    rf_assert_ok(sweep_plan_add_steps(&plan, "25,30,25", 50, &err), err);
    ck_assert_int_eq(plan.num, 2);
    ck_assert_str_eq(plan.items[1].key, "steps:30");
    sweep_plan_free(&plan);
    static const char *const wrong[] = {"", "50", "0", "5,", "5;6", "-3", "x", "5,51", "99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        rf_assert_fails(sweep_plan_add_steps(&plan, wrong[i], 50, &err), err, RF_ERR_ARGUMENT, "--fewer-steps");
        sweep_plan_free(&plan);
    }
}
END_TEST

START_TEST(searches_turn_one_option) {
    rf_error err = {0};
    sweep_plan fixed = {0};
    sweep_range r;
    for (int i = 0; i < rf_policy_count(); i++) {
        const rf_policy_def *def = rf_policy_at(i);
        if (!sweep_main_option(def->name, &r)) continue;
        rf_assert_ok(sweep_plan_search(def->name, false, &fixed, &r, &err), err);
        ck_assert_int_eq(fixed.num, 1);
        sweep_plan ends = {0}; /* both ends are values that the policy takes */
        char mild[32], aggressive[32];
        snprintf(mild, sizeof mild, "%g", r.mild);
        snprintf(aggressive, sizeof aggressive, "%g", r.aggressive);
        rf_assert_ok(sweep_plan_add_value(&ends, &fixed.items[0], r.option, mild, &err), err);
        rf_assert_ok(sweep_plan_add_value(&ends, &fixed.items[0], r.option, aggressive, &err), err);
        ck_assert_int_eq(ends.num, 2);
        for (int o = 0; o < def->num_options; o++) {
            if (strcmp(def->options[o].name, r.option) == 0)
                ck_assert_int_eq(r.whole, def->options[o].type == RF_OPTION_INT);
        }
        sweep_plan_free(&ends);
        sweep_plan_free(&fixed);
    }
    rf_assert_ok(sweep_plan_search("worldcache:max_skips=6;threshold=0.1..2", false, &fixed, &r, &err), err);
    ck_assert_str_eq(fixed.items[0].options, "max_skips=6");
    ck_assert_str_eq(r.option, "threshold");
    ck_assert(r.mild == .1 && r.aggressive == 2 && !r.whole);
    sweep_plan_free(&fixed);
    rf_assert_ok(sweep_plan_search("diffsparse:budget=0.2..0.9/5", false, &fixed, &r, &err), err);
    ck_assert(r.mild == .9 && r.aggressive == .2);
    sweep_plan_free(&fixed);
    rf_assert_ok(sweep_plan_search("worldcache:max_skips=1..8", false, &fixed, &r, &err), err);
    ck_assert(r.whole && r.mild == 1 && r.aggressive == 8);
    sweep_plan_free(&fixed);
    rf_assert_fails(sweep_plan_search("all", false, &fixed, &r, &err), err, RF_ERR_ARGUMENT,
                    "one option of one policy");
    rf_assert_fails(sweep_plan_search("worldcache:threshold=1", false, &fixed, &r, &err), err, RF_ERR_ARGUMENT,
                    "expected a range");
    rf_assert_fails(sweep_plan_search("worldcache:threshold=1,2", false, &fixed, &r, &err), err, RF_ERR_ARGUMENT,
                    "one range");
    rf_assert_fails(sweep_plan_search("worldcache:threshold=0..1/3;max_skips=2..4", false, &fixed, &r, &err), err,
                    RF_ERR_ARGUMENT, "turns one option");
    sweep_plan_free(&fixed);
}
END_TEST

/* --- the store ---------------------------------------------------------------------------------------------------- */

static void fill_row(sweep_row *row, int i) {
    char key[64];
    memset(row, 0, sizeof *row);
    sweep_row_clear(row);
    snprintf(key, sizeof key, "fora:interval=%d,count=\"down\"", i);
    row->key = rf_strdup(key);
    row->policy = rf_strdup("fora");
    row->options = rf_strdup(i % 2 ? "a;b, c" : "");
    row->status = rf_strdup(i % 3 ? "ok" : "refused");
    row->reason = rf_strdup("one\nline, \"quoted\"");
    row->psnr_each = rf_strdup("30.5 31.25");
    row->speedup = 1.5 + i;
    row->psnr_mean = 30.875;
}

static const sweep_pin pins[] = {
    {"model", (char *)(uintptr_t) "tiny"}, {"steps", (char *)(uintptr_t) "4"}, {"_date", (char *)(uintptr_t) "today"}};

static sweep_store *open_store(const char *folder) {
    rf_error err = {0};
    sweep_store *store = NULL;
    rf_assert_ok(sweep_store_open(&store, folder, pins, 3, &err), err);
    return store;
}

static char *file_text(const char *folder, const char *name, size_t *len) {
    rf_error err = {0};
    char *path = rf_path_join(folder, name), *text = NULL;
    rf_assert_ok(rf_file_read(path, 1 << 20, &text, len, &err), err);
    rf_free(path);
    return text;
}

/* Cut at every byte: what is whole stays, what is torn goes, and what is added next stands on a line of its own. */
START_TEST(torn_results_lose_one_row_at_most) {
    rf_error err = {0};
    char folder[256], path[300];
    ck_assert_ptr_nonnull(rf_temp_dir_make(folder, sizeof folder));
    snprintf(path, sizeof path, "%s/results.csv", folder);
    sweep_store *store = open_store(folder);
    for (int i = 0; i < 3; i++) {
        sweep_row row;
        fill_row(&row, i);
        rf_assert_ok(sweep_store_add(store, &row, &err), err);
    }
    sweep_store_close(store);
    size_t len = 0;
    char *whole = file_text(folder, "results.csv", &len);
    for (size_t cut = 0; cut <= len; cut++) {
        int lines = 0;
        for (size_t i = 0; i < cut; i++) lines += whole[i] == '\n';
        FILE *file = fopen(path, "w");
        ck_assert_uint_eq(fwrite(whole, 1, cut, file), cut);
        fclose(file);
        store = open_store(folder);
        ck_assert_int_eq(sweep_store_num(store), lines > 0 ? lines - 1 : 0);
        for (int i = 0; i < sweep_store_num(store); i++) {
            sweep_row want;
            fill_row(&want, i);
            const sweep_row *got = sweep_store_at(store, i);
            ck_assert_str_eq(got->key, want.key);
            ck_assert_str_eq(got->options, want.options);
            ck_assert_str_eq(got->reason, "one line, \"quoted\"");
            ck_assert(got->speedup == want.speedup && got->psnr_mean == want.psnr_mean && isnan(got->loop_ms));
            sweep_row_clear(&want);
        }
        for (int i = sweep_store_num(store); i < 3; i++) {
            sweep_row row;
            fill_row(&row, i);
            rf_assert_ok(sweep_store_add(store, &row, &err), err);
        }
        sweep_store_close(store);
        size_t again_len = 0;
        char *again = file_text(folder, "results.csv", &again_len);
        ck_assert_uint_eq(again_len, len);
        ck_assert_mem_eq(again, whole, len);
        rf_free(again);
    }
    rf_free(whole);
    rf_temp_dir_remove(folder);
}
END_TEST

START_TEST(other_pins_are_refused_with_what_differs) {
    rf_error err = {0};
    char folder[256];
    ck_assert_ptr_nonnull(rf_temp_dir_make(folder, sizeof folder));
    sweep_store *store = open_store(folder), *other = NULL;
    rf_assert_fails(sweep_store_open(&other, folder, pins, 3, &err), err, RF_ERR_STATE, "another sweep");
    sweep_store_close(store);
    sweep_pin changed[3] = {pins[0], {"steps", (char *)(uintptr_t) "5"}, {"_date", (char *)(uintptr_t) "tomorrow"}};
    rf_assert_fails(sweep_store_open(&other, folder, changed, 3, &err), err, RF_ERR_ARGUMENT, "steps 4 (now 5)");
    ck_assert_ptr_null(strstr(err.message, "model"));
    changed[1] = pins[1];
    rf_assert_ok(sweep_store_open(&other, folder, changed, 3, &err), err);
    ck_assert_str_eq(sweep_store_pin(other, "_date"), "today");
    float latents[2] = {1, 2}, pictures[6] = {0, .1f, .2f, .3f, .4f, .5f};
    sweep_reference reference = {2, {1, 1, 1}, {3, 1, 1}, latents, pictures}, back;
    rf_assert_fails(sweep_store_load_reference(other, &back, &err), err, RF_ERR_MISSING, "reference.f32");
    rf_assert_ok(sweep_store_save_reference(other, &reference, &err), err);
    rf_assert_ok(sweep_store_load_reference(other, &back, &err), err);
    ck_assert_mem_eq(back.latents, latents, sizeof latents);
    ck_assert_mem_eq(back.pictures, pictures, sizeof pictures);
    sweep_reference_free(&back);
    sweep_store_close(other);
    rf_temp_dir_remove(folder);
}
END_TEST

START_TEST(refusals_can_be_tried_again) {
    rf_error err = {0};
    char folder[256];
    ck_assert_ptr_nonnull(rf_temp_dir_make(folder, sizeof folder));
    sweep_store *store = open_store(folder);
    for (int i = 0; i < 3; i++) {
        sweep_row row;
        fill_row(&row, i);
        rf_assert_ok(sweep_store_add(store, &row, &err), err);
    }
    char key[64];
    for (int i = 0; i < 3; i++) {
        snprintf(key, sizeof key, "fora:interval=%d,count=\"down\"", i);
        rf_assert_ok(sweep_store_forget_refusal(store, key, &err), err);
    }
    ck_assert_int_eq(sweep_store_num(store), 2); /* row 0 was refused */
    sweep_store_close(store);
    store = open_store(folder);
    ck_assert_int_eq(sweep_store_num(store), 2);
    sweep_store_close(store);
    rf_temp_dir_remove(folder);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("sweep_plan");
    TCase *specs = tcase_create("specs");
    tcase_add_test(specs, values_and_ranges);
    tcase_add_test(specs, equal_settings_are_one);
    tcase_add_test(specs, wrong_specs_name_the_place);
    tcase_add_test(specs, builtin_list_fits_the_registry);
    tcase_add_test(specs, worlds);
    tcase_add_test(specs, specs_of_text);
    tcase_add_test(specs, text_lists_fit_the_registry);
    tcase_add_test(specs, fewer_steps);
    tcase_add_test(specs, searches_turn_one_option);
    suite_add_tcase(suite, specs);
    TCase *store = tcase_create("store");
    tcase_set_timeout(store, 120);
    tcase_add_test(store, torn_results_lose_one_row_at_most);
    tcase_add_test(store, other_pins_are_refused_with_what_differs);
    tcase_add_test(store, refusals_can_be_tried_again);
    suite_add_tcase(suite, store);
    return rf_run_suite(suite);
}
