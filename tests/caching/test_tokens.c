/* tests/caching/test_tokens.c - toca, duca, diffsparse and the allocator: schedules, rows, tables, refusals.
 *
 * Step lists and counts of thresholds are those worked out in the methods document; every other expected number is made
 * here from the formula, independently of the policy. */
#include "caching/allocate.h"
#include "caching/features/toca.h"
#include "core/memory.h"
#include "tests/caching/sim.h"
#include "tests/test_util.h"

#define ALL_STEPS 50

static const uint8_t three_kinds[] = {RF_CACHE_SELF, RF_CACHE_CROSS, RF_CACHE_MLP,     RF_CACHE_SELF,    RF_CACHE_CROSS,
                                      RF_CACHE_MLP,  RF_CACHE_SELF,  RF_CACHE_NO_PART, RF_CACHE_PARALLEL};

static sim_result run_with(sim_options options) {
    sim_result r;
    sim_run(&r, &options);
    return r;
}

static sim_result run(const char *policy, const char *options) {
    return run_with((sim_options){.policy = policy, .options = options});
}

static const uint8_t four_kinds[] = {RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP,
                                     RF_CACHE_SELF, RF_CACHE_MLP, RF_CACHE_TEMPORAL, RF_CACHE_MLP};

/* A part's rows as a plan has them: all, none or some. */
static int rows_of(const sim_result *r, int step, int block, int part) {
    const rf_step_plan *p = &r->steps[step].plan;
    int at = block * r->shape.num_parts + part;
    if (p->kind == RF_STEP_FULL || p->parts[at] == RF_DO_COMPUTE) return (int)r->shape.tokens;
    return p->parts[at] == RF_DO_ROWS ? p->rows[at] : 0;
}

/* ---- ToCa: schedule ---- */

START_TEST(thresholds_of_dit) {
    int count[7] = {0};
    for (int s = 49; s >= 0; s--) {
        int threshold = rf_toca_threshold(3, 0.4, s, 50);
        ck_assert_int_ge(threshold, 2);
        ck_assert_int_le(threshold, 5);
        count[threshold]++;
    }
    ck_assert_int_eq(count[5], 4);
    ck_assert_int_eq(count[4], 12);
    ck_assert_int_eq(count[3], 21);
    ck_assert_int_eq(count[2], 13);
    ck_assert_int_eq(rf_toca_threshold(1, 0.9, 0, 50), 1); /* 1 / 1.9 rounds to 1, .5 to even and up to 1 */
    ck_assert_int_eq(rf_toca_threshold(5, 0, 7, 50), 5);
    ck_assert_int_eq(rf_toca_threshold(5, 1.0 / 3 * 3, 0, 50), 2); /* 2.5 to even */
}
END_TEST

#define assert_schedule(policy, options, ...)                                                                          \
    do {                                                                                                               \
        sim_result r_ = run((policy), (options));                                                                      \
        sim_assert_full(&r_, __VA_ARGS__);                                                                             \
        sim_free(&r_);                                                                                                 \
    } while (0)

START_TEST(schedules_of_toca) {
    static const char *const both[] = {"toca", "duca"};
    for (int i = 0; i < 2; i++) {
        assert_schedule(both[i], "", 0, 4, 5, 9, 13, 17, 19, 22, 25, 28, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49);
        assert_schedule(both[i], "window=off", 0, 4, 5, 9, 13, 17, 19, 22, 25, 28, 31, 34, 37, 39, 41, 43, 45, 47, 49);
        assert_schedule(both[i], "interval=5", 0, 1, 9, 14, 19, 24, 29, 34, 35, 37, 39, 41, 45, 49);
        assert_schedule(both[i], "interval=7,schedule_weight=0,window=off", 0, 7, 14, 21, 28, 35, 42, 49);
    }
}
END_TEST

/* The rule once more, for a length at which s' decides rounding and the window in many places. */
START_TEST(schedule_of_250_steps) {
    sim_result r = run_with((sim_options){.policy = "toca", .options = "interval=4", .num_steps = 250});
    int threshold = 0, num = 0;
    for (int step = 0; step < 250; step++) {
        int s = 249 - step;
        bool full = step == 0 || s % threshold == 0;
        if (full) {
            threshold = (int)rint(4 / (1 + 0.4 - 2 * 0.4 * s / 250));
            if (s >= 50 && s < 100) threshold = 2;
        }
        num += full;
        ck_assert_msg((r.steps[step].kind == RF_STEP_FULL) == full, "step %d", step);
    }
    ck_assert_int_eq(num, 74);
    sim_free(&r);
}
END_TEST

/* ---- ToCa: rows ---- */

START_TEST(rows_of_dit) {
    sim_result r = run_with((sim_options){.policy = "toca", .num_blocks = 28, .grid_h = 16, .grid_w = 16});
    /* step 46 is s' = 3: 256 * .07 * (1 + 2 - 4 * 3/50 = 2.76) * 2.5 * (.8 in the first block, 1.2 in the last) */
    ck_assert_int_eq(rows_of(&r, 46, 0, 1), 98);
    ck_assert_int_eq(rows_of(&r, 46, 27, 1), 148);
    ck_assert_int_eq(rows_of(&r, 46, 0, 0), 0);
    ck_assert_int_eq(r.steps[46].kind, RF_STEP_PARTIAL);
    ck_assert_int_eq(r.steps[46].plan.num_terms, 1);
    ck_assert(r.steps[46].plan.weights[0][0] == 1.0f);
    ck_assert(isnan(r.steps[46].plan.statistic) && isnan(r.steps[46].plan.threshold));
    /* early on the factor is negative: nothing is computed */
    ck_assert_int_eq(r.steps[1].kind, RF_STEP_SKIP);
    ck_assert_int_eq(r.steps[1].plan.produce, RF_PRODUCE_NONE);
    for (int step = 0; step < ALL_STEPS; step++) {
        if (r.steps[step].kind == RF_STEP_FULL) continue;
        for (int b = 0; b < 28; b++) {
            double at = 1 + 2.0 - 2 * 2.0 * (49 - step) / 50, layer = 1 - 0.2 + 2 * 0.2 * b / 27;
            double share = 0.07 * layer * at * 2.5;
            int want = share <= 0 ? 0 : (int)floor(share * 256);
            ck_assert_int_le(abs(rows_of(&r, step, b, 1) - want), 0);
        }
    }
    ck_assert(r.layout.is_static && r.layout.tokens.used && !r.layout.tokens.attention_rows);
    ck_assert_int_eq(r.num_read_backs, 0);
    sim_free(&r);
}
END_TEST

START_TEST(rows_of_other_settings) {
    static const char flat[] = "step_weight=0,layer_weight=0,module_weight=0,";
    char text[160];
    for (int percent = 0; percent <= 100; percent += 25) {
        for (int attends = 0; attends < 2; attends++) {
            snprintf(text, sizeof text, "%sratio=%g,attention=%s", flat, percent / 100.0, attends ? "rows" : "cached");
            sim_result r = run("toca", text);
            int want = 16 * percent / 100;
            ck_assert_int_eq(rows_of(&r, 2, 1, 1), want);
            ck_assert_int_eq(rows_of(&r, 2, 3, 0), attends ? want : 0);
            rf_step_kind kind = percent == 0 ? RF_STEP_SKIP : RF_STEP_PARTIAL;
            if (percent == 100 && attends) kind = RF_STEP_FULL;
            ck_assert_int_eq(r.steps[2].kind, kind);
            bool some = percent > 0 && percent < 100;
            ck_assert_int_eq(r.layout.tokens.used, some);
            ck_assert_int_eq(r.layout.tokens.attention_rows, some && attends);
            sim_free(&r);
        }
    }
    /* attention to text has a factor of its own: 1 - .4 w against 1 + .6 w */
    sim_result r = run_with((sim_options){.policy = "toca",
                                          .options = "step_weight=0,layer_weight=0,module_weight=0.5,ratio=0.5",
                                          .num_blocks = 3,
                                          .num_parts = 3,
                                          .kinds = three_kinds});
    ck_assert_int_eq(rows_of(&r, 2, 0, 0), 0);
    ck_assert_int_eq(rows_of(&r, 2, 0, 1), 6);  /* .5 * .8 * 16 */
    ck_assert_int_eq(rows_of(&r, 2, 0, 2), 10); /* .5 * 1.3 * 16 */
    ck_assert_int_eq(r.steps[2].plan.parts[8], RF_DO_PRODUCE);
    sim_free(&r);
    r = run_with((sim_options){.policy = "toca", .options = "ratio=1,module_weight=10,step_weight=0", .num_blocks = 1});
    ck_assert_int_eq(rows_of(&r, 2, 0, 1), 16); /* clamped */
    sim_free(&r);
}
END_TEST

/* ---- DuCa ---- */

START_TEST(duca_alternates) {
    sim_result r = run("duca", "interval=7,schedule_weight=0,window=off,step_weight=0,layer_weight=0,ratio=0.2");
    ck_assert_int_eq(r.layout.output_depth, 1);
    ck_assert(r.layout.tokens.value_score);
    for (int step = 0; step < ALL_STEPS; step++) {
        int k = step % 7;
        const rf_step_plan *p = &r.steps[step].plan;
        ck_assert_int_eq(p->kind, k == 0 ? RF_STEP_FULL : k % 2 ? RF_STEP_PARTIAL : RF_STEP_SKIP);
        ck_assert_int_eq(p->produce, k % 2 ? RF_PRODUCE_NONE : RF_PRODUCE_OUTPUT);
        ck_assert_int_eq(p->num_terms, step > 0);
        if (k % 2) ck_assert_int_eq(rows_of(&r, step, 0, 1), 8); /* .2 * 2.5 * 16 */
    }
    sim_free(&r);
}
END_TEST

/* ---- DiffSparse: the table ---- */

/* Rows of the table that a run follows, in quarters, from its plans. */
static int level_of(const sim_result *r, int step, int block) {
    return rows_of(r, step, block, 1) * 4 / (int)r->shape.tokens;
}

static int64_t spent(const sim_result *r) {
    int64_t sum = 0;
    for (int step = 0; step < r->num_steps; step++) {
        for (int b = 0; b < r->shape.num_blocks; b++) sum += level_of(r, step, b);
    }
    return sum;
}

START_TEST(uniform_tables_spend_the_budget_evenly) {
    for (int percent = 2; percent <= 100; percent += 7) {
        char text[80];
        snprintf(text, sizeof text, "table=uniform,budget=%g", percent / 100.0);
        sim_result r = run("diffsparse", text);
        ck_assert_int_eq(spent(&r), 200 * 4 * percent / 100);
        int least = 4, most = 0;
        for (int step = 1; step < ALL_STEPS; step++) {
            for (int b = 0; b < 4; b++) {
                int level = level_of(&r, step, b);
                least = level < least ? level : least;
                most = level > most ? level : most;
            }
        }
        ck_assert_int_le(most - least, 1);
        sim_free(&r);
    }
    sim_result r = run("diffsparse", "table=uniform,budget=0"); /* the first step all the same */
    ck_assert_int_eq(spent(&r), 16);
    ck_assert_int_eq(r.num_full, 1);
    ck_assert_int_eq(r.num_skip, 49);
    ck_assert(!r.layout.tokens.used);
    sim_free(&r);
    r = run_with((sim_options){.policy = "diffsparse", .options = "table=uniform", .num_steps = 1});
    ck_assert_int_eq(r.num_full, 1);
    sim_free(&r);
}
END_TEST

/* [steps * blocks] rows of costs that ask for a level: 0 from there on, and more the further below. */
static char *costs_asking(int steps, int blocks, int (*ask)(int step, int block)) {
    size_t room = 128 + (size_t)(steps * blocks) * 64, used = 0;
    char *text = malloc(room);
    used +=
        (size_t)snprintf(text, room, "{\"diffsparse\":{\"num_steps\":%d,\"num_blocks\":%d,\"costs\":[", steps, blocks);
    for (int i = 0; i < steps * blocks; i++) {
        int want = ask(i / blocks, i % blocks);
        for (int v = 0; v < 5; v++) {
            used += (size_t)snprintf(text + used, room - used, "%s%d%s",
                                     v   ? ","
                                     : i ? ",["
                                         : "[",
                                     v < want ? 9 * (want - v) : 0, v == 4 ? "]" : "");
        }
    }
    snprintf(text + used, room - used, "]}}");
    return text;
}

static int ask_mixed(int step, int block) {
    return (step + 2 * block) % 5;
}

/* A budget that covers what the costs ask for gives at least that; what is left over goes to ties from the end on. */
START_TEST(fitted_tables_are_followed) {
    char *costs = costs_asking(10, 4, ask_mixed);
    int asked = 0;
    for (int step = 0; step < 10; step++) {
        for (int b = 0; b < 4; b++) asked += step == 0 ? 4 : ask_mixed(step, b);
    }
    char text[80];
    snprintf(text, sizeof text, "budget=%.17g", asked / 160.0);
    sim_result r =
        run_with((sim_options){.policy = "diffsparse", .options = text, .num_steps = 10, .calibration = costs});
    ck_assert_int_eq(spent(&r), asked);
    for (int step = 1; step < 10; step++) {
        for (int b = 0; b < 4; b++) ck_assert_int_eq(level_of(&r, step, b), ask_mixed(step, b));
    }
    sim_free(&r);

    /* 19 steps from 10: every other step is on one of the table's, ends on ends */
    r = run_with((sim_options){.policy = "diffsparse", .options = "budget=0.9", .num_steps = 19, .calibration = costs});
    for (int step = 1; step < 19; step += 1) {
        for (int b = 0; b < 4; b++) ck_assert_int_ge(level_of(&r, step, b), ask_mixed((step + 1) / 2, b));
    }
    sim_free(&r);
    free(costs);
}
END_TEST

static const char *write_text(const char *dir, char *path, size_t path_bytes, const char *text) {
    snprintf(path, path_bytes, "%s/ta,ble.json", dir); /* a path may hold commas */
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    ck_assert_int_eq(fclose(f), 0);
    return path;
}

START_TEST(tables_come_from_files) {
    char dir[256], path[300], text[400];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    write_text(dir, path, sizeof path, "{\"levels\":[0,0, 0,1, 2,3, 4,4, 0,0]}");
    snprintf(text, sizeof text, "table=%s", path);
    sim_options o = {.policy = "diffsparse", .options = text, .num_steps = 5, .num_blocks = 2};
    sim_result r = run_with(o);
    static const int want[] = {4, 4, 0, 1, 2, 3, 4, 4, 0, 0};
    for (int i = 0; i < 10; i++) ck_assert_int_eq(level_of(&r, i / 2, i % 2), want[i]);
    ck_assert_int_eq(r.steps[3].kind, RF_STEP_FULL);
    ck_assert_int_eq(r.steps[4].kind, RF_STEP_SKIP);
    sim_free(&r);

    static const struct {
        const char *text, *part;
    } wrong[] = {
        {"{\"levels\":[0,0,0,1,2,3,4,4,0]}", "has 9 entries, expected 5 steps x 2 blocks = 10"},
        {"{\"levels\":[0,0,0,1,2,3,4,4,0,5]}", "levels[9]"},
        {"{\"levels\":[0,0,0,1,2.5,3,4,4,0,5]}", "levels[4]"},
        {"{\"levels\":[0,\"0\",0,1,2,3,4,4,0,5]}", "levels[1]"},
        {"{\"costs\":[[1,2,3,4,5],7]}", "expected 5 steps"},
        {"{\"num_steps\":1,\"costs\":[[1,2,3,4,5],7]}", "costs[1]"},
        {"{\"num_steps\":1,\"costs\":[[1,2,3,4,5],[1,2,3,4]]}", "costs[1]"},
        {"{\"num_steps\":1,\"costs\":[[1,2,3,4,1e999],[1,2,3,4,5]]}", "costs[0]"},
        {"{\"num_steps\":0,\"levels\":[]}", "num_steps"},
        {"{\"num_steps\":1e9,\"levels\":[]}", "num_steps"},
        {"{\"num_blocks\":3,\"levels\":[]}", "a table for 3 blocks, the model has 2"},
        {"{\"num_blocks\":\"3\",\"levels\":[]}", "num_blocks"},
        {"{\"levels\":7}", "no array"},
        {"[]", "no array"},
        {"{", "JSON"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        write_text(dir, path, sizeof path, wrong[i].text);
        rf_error err = {0};
        rf_status st = sim_try(&r, &o, &err);
        ck_assert_msg(st != RF_OK && strstr(err.message, wrong[i].part), "%s: %s", wrong[i].text, err.message);
        ck_assert_msg(strstr(err.message, "ta,ble.json") != NULL, "%s", err.message);
        sim_free(&r);
    }
    rf_temp_dir_remove(dir);
    rf_error err = {0};
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_MISSING, "ta,ble.json");
    sim_free(&r);
}
END_TEST

START_TEST(a_missing_calibration_says_what_to_do) {
    rf_error err = {0};
    sim_result r;
    sim_options o = {.policy = "diffsparse"};
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_MISSING, "refrain calibrate diffsparse");
    sim_free(&r);
    o.calibration = "{\"teacache\":{}}";
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_MISSING, "refrain calibrate diffsparse");
    sim_free(&r);
    o.calibration = "{\"diffsparse\":{\"num_steps\":1,\"num_blocks\":5,\"costs\":[]}}";
    rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_CONFIG, "5 blocks, the model has 4");
    sim_free(&r);
}
END_TEST

START_TEST(parts_of_a_level) {
    static const struct {
        const char *attention;
        rf_part_do self;
    } modes[] = {{"rows", RF_DO_ROWS}, {"cached", RF_DO_PRODUCE}, {"full", RF_DO_COMPUTE}};
    for (int i = 0; i < 3; i++) {
        char text[80];
        snprintf(text, sizeof text, "table=uniform,budget=0.51,first=1,attention=%s", modes[i].attention);
        sim_result r = run_with((sim_options){
            .policy = "diffsparse", .options = text, .num_blocks = 3, .num_parts = 3, .kinds = three_kinds});
        const rf_step_plan *p = &r.steps[20].plan;
        ck_assert_int_eq(p->kind, RF_STEP_PARTIAL);
        ck_assert_int_eq(p->parts[0], modes[i].self);
        ck_assert_int_eq(p->parts[1], RF_DO_ROWS);
        ck_assert_int_eq(p->parts[2], RF_DO_ROWS);
        ck_assert_int_eq(p->parts[7], RF_DO_COMPUTE); /* there is none */
        ck_assert_int_eq(p->parts[8], modes[i].self);
        ck_assert(p->rows[2] == 8 || p->rows[2] == 12);
        ck_assert_int_eq(p->rows[0], i == 0 ? p->rows[2] : 0);
        ck_assert_int_eq(r.layout.tokens.attention_rows, i == 0);
        sim_free(&r);
    }
}
END_TEST

/* ---- allocator ---- */

/* All choices, counting up with the last item fastest: the last of equal sums is the one with high levels at the end
 * only if compared so; hence the comparison from the end. */
static double brute_force(const double *costs, int items, const int *weights, int levels, int budget, uint8_t *best) {
    uint8_t choice[8] = {0};
    double least = INFINITY;
    for (;;) {
        double sum = 0;
        int weight = 0;
        for (int i = 0; i < items; i++) {
            sum += costs[i * levels + choice[i]];
            weight += weights[choice[i]];
        }
        if (weight <= budget && sum < INFINITY) {
            bool better = sum < least;
            for (int i = items - 1; i >= 0 && sum == least; i--) {
                if (choice[i] == best[i]) continue;
                better = choice[i] > best[i];
                break;
            }
            if (better) {
                least = sum;
                memcpy(best, choice, (size_t)items);
            }
        }
        int i = items - 1;
        while (i >= 0 && ++choice[i] == levels) choice[i--] = 0;
        if (i < 0) return least;
    }
}

START_TEST(allocation_is_exact) {
    static const int quarters[] = {0, 1, 2, 3, 4}, odd[] = {3, 0, 5, 1, 2};
    for (int round = 0; round < 400; round++) {
        int items = 1 + round % 5, levels = 1 + round % 5;
        const int *weights = round % 3 ? quarters : odd;
        int budget = (int)(sim_noise(1, round, 0, 0) * items * 5);
        double costs[5 * 5];
        for (int i = 0; i < items * levels; i++) { /* small whole numbers: many ties, sums without rounding */
            costs[i] = floor(sim_noise(2, round, i, 0) * 6) - 1;
            if (sim_noise(3, round, i, 0) < 0.15) costs[i] = INFINITY;
        }
        uint8_t want[8] = {0}, got[8] = {0};
        double least = brute_force(costs, items, weights, levels, budget, want), total = 0;
        rf_error err = {0};
        if (least == INFINITY) {
            rf_assert_fails(rf_allocate(got, costs, items, weights, levels, budget, &total, &err), err, RF_ERR_CONFIG,
                            "budget");
            continue;
        }
        rf_assert_ok(rf_allocate(got, costs, items, weights, levels, budget, &total, &err), err);
        ck_assert_msg(total == least, "round %d: %g, expected %g", round, total, least);
        ck_assert_msg(memcmp(got, want, (size_t)items) == 0, "round %d: other choice of the same cost", round);
    }
}
END_TEST

START_TEST(allocation_refuses) {
    static const int weights[] = {0, 1};
    static const int negative[] = {0, -1};
    double costs[] = {1, 0, NAN, 0};
    uint8_t choice[2];
    rf_error err = {0};
    rf_assert_fails(rf_allocate(choice, costs, 2, weights, 2, 1, NULL, &err), err, RF_ERR_CONFIG, "item 1");
    costs[2] = -INFINITY;
    rf_assert_fails(rf_allocate(choice, costs, 2, weights, 2, 1, NULL, &err), err, RF_ERR_CONFIG, "item 1");
    costs[2] = 1;
    rf_assert_fails(rf_allocate(choice, costs, 2, negative, 2, 1, NULL, &err), err, RF_ERR_ARGUMENT, "weighs");
    rf_assert_fails(rf_allocate(choice, costs, 2, weights, 2, -1, NULL, &err), err, RF_ERR_ARGUMENT, "budget -1");
    rf_assert_fails(rf_allocate(choice, costs, 2, weights, 65, 1, NULL, &err), err, RF_ERR_ARGUMENT, "65 levels");
    static const int heavy[] = {0, 2000000000};
    rf_assert_fails(rf_allocate(choice, costs, 2, heavy, 2, 4000000000, NULL, &err), err, RF_ERR_UNSUPPORTED, "states");
    rf_assert_ok(rf_allocate(choice, costs, 0, weights, 2, 5, NULL, &err), err);
    rf_assert_ok(rf_allocate(choice, costs, 2, weights, 2, INT64_MAX - 1, NULL, &err), err);
    ck_assert(choice[0] == 1 && choice[1] == 1);
}
END_TEST

/* ---- all three ---- */

static const char *const mine[] = {"toca", "duca", "diffsparse"};
#define UNIFORM "table=uniform"

START_TEST(never_skip_settings_never_skip) {
    static const struct {
        const char *policy, *options;
    } settings[] = {{"toca", "interval=1"},
                    {"toca", "interval=1,schedule_weight=0.9"},
                    {"toca", "attention=rows,ratio=1,step_weight=0,layer_weight=0,module_weight=0"},
                    {"duca", "interval=1"},
                    {"diffsparse", "table=uniform,budget=1"},
                    {"diffsparse", "table=uniform,first=50,budget=0"}};
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
        sim_result r = run(settings[i].policy, settings[i].options);
        ck_assert_msg(r.num_full == ALL_STEPS, "%s %s: %d full steps", settings[i].policy, settings[i].options,
                      r.num_full);
        sim_free(&r);
    }
}
END_TEST

START_TEST(forced_steps_are_full) {
    bool force[ALL_STEPS] = {false};
    force[6] = force[7] = force[20] = true;
    for (int i = 0; i < 3; i++) {
        sim_options o = {.policy = mine[i], .options = i == 2 ? UNIFORM : "", .force_full = force};
        sim_result r = run_with(o);
        ck_assert_int_eq(r.steps[6].kind, RF_STEP_FULL);
        ck_assert_int_eq(r.steps[6].plan.num_terms, 1);
        ck_assert_int_eq(r.steps[8].plan.horizon, 1);
        sim_free(&r);
    }
}
END_TEST

START_TEST(few_steps_are_refused_or_not) {
    rf_error err = {0};
    sim_result r;
    for (int i = 0; i < 2; i++) {
        sim_options o = {.policy = mine[i], .num_steps = 8};
        rf_assert_fails(sim_try(&r, &o, &err), err, RF_ERR_UNSUPPORTED, "9 steps");
        sim_free(&r);
        o.force = true;
        rf_assert_ok(sim_try(&r, &o, &err), err);
        sim_free(&r);
        o.num_steps = 9;
        o.stochastic = true; /* published with DDPM */
        rf_assert_ok(sim_try(&r, &o, &err), err);
        sim_free(&r);
    }
    sim_options o = {.policy = "diffsparse", .options = UNIFORM, .num_steps = 2};
    rf_assert_ok(sim_try(&r, &o, &err), err);
    sim_free(&r);
}
END_TEST

/* Every option, from a setting at which it has something to say. */
START_TEST(every_option_changes_the_run) {
    static const struct {
        const char *policies, *base, *change;
    } walks[] = {
        {"toca duca", "", "interval=4"},
        {"toca duca", "", "ratio=0.5"},
        {"toca duca", "", "schedule_weight=0"},
        {"toca duca", "", "window=off"},
        {"toca duca", "ratio=0.3", "step_weight=0.4"},
        {"toca duca", "ratio=0.3", "layer_weight=0.8"},
        {"toca duca", "ratio=0.3", "module_weight=1"},
        {"toca duca", "ratio=0.3", "attention=rows"},
        {"toca duca", "", "score=random"},
        {"toca", "", "score=value"},
        {"duca", "", "score=attention"},
        {"toca duca", "", "age_weight=0.5"},
        {"toca duca", "", "bonus=0"},
        {"toca duca", "", "cell=4"},
        {"toca duca", "score=random", "seed=1"},
        {"diffsparse", UNIFORM, "budget=0.6"},
        {"diffsparse", UNIFORM, "table=auto"},
        {"diffsparse", UNIFORM, "first=3"},
        {"diffsparse", UNIFORM, "attention=cached"},
        {"diffsparse", UNIFORM, "attention=full"},
        {"diffsparse", UNIFORM, "score=value"},
        {"diffsparse", UNIFORM, "score=random"},
        {"diffsparse", UNIFORM, "age_weight=0.5"},
        {"diffsparse", UNIFORM, "bonus=0"},
        {"diffsparse", UNIFORM, "cell=4"},
        {"diffsparse", UNIFORM ",score=random", "seed=1"},
    };
    char *costs = costs_asking(50, 4, ask_mixed);
    for (int i = 0; i < 3; i++) {
        const rf_policy_def *def = rf_policy_find(mine[i]);
        bool walked[RF_POLICY_MAX_OPTIONS] = {false};
        for (size_t w = 0; w < sizeof walks / sizeof walks[0]; w++) {
            if (!strstr(walks[w].policies, mine[i])) continue;
            char changed[160];
            snprintf(changed, sizeof changed, "%s%s%s", walks[w].base, walks[w].base[0] ? "," : "", walks[w].change);
            sim_result a = run_with((sim_options){.policy = mine[i], .options = walks[w].base, .calibration = costs});
            sim_result b = run_with((sim_options){.policy = mine[i], .options = changed, .calibration = costs});
            ck_assert_msg(!sim_same(&a, &b), "%s: %s changes nothing", mine[i], walks[w].change);
            sim_free(&a);
            sim_free(&b);
            for (int o = 0; o < def->num_options; o++) {
                size_t len = strlen(def->options[o].name);
                walked[o] |= strncmp(walks[w].change, def->options[o].name, len) == 0 && walks[w].change[len] == '=';
            }
        }
        for (int o = 0; o < def->num_options; o++) {
            ck_assert_msg(walked[o], "%s: %s is not walked", mine[i], def->options[o].name);
        }
        sim_result a = run_with((sim_options){.policy = mine[i], .options = i == 2 ? UNIFORM : ""});
        sim_result b = run_with((sim_options){.policy = mine[i], .options = i == 2 ? UNIFORM ",seed=9" : "seed=9"});
        ck_assert(sim_same(&a, &b)); /* seed without random */
        sim_free(&a);
        sim_free(&b);
    }
    free(costs);
}
END_TEST

START_TEST(failed_allocations_are_reported) {
    char *costs = costs_asking(10, 4, ask_mixed);
    rf_error err = {0};
    rf_json *doc = NULL;
    rf_policy *policy = NULL;
    uint8_t kinds[8] = {0, 2, 0, 2, 0, 2, 0, 2};
    rf_cache_shape shape = {.num_steps = 12, .num_blocks = 4, .num_parts = 2, .part_kinds = kinds, .tokens = 16};
    rf_assert_ok(rf_json_parse(&doc, costs, strlen(costs), "cache.json", &err), err);
    rf_assert_ok(rf_policy_create(&policy, "diffsparse", &err), err);
    shape.calibration = rf_json_root(doc);
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1; n < 100; n++) {
        rf_cache_layout layout = {0};
        rf_memory_fail_nth(n);
        rf_status st = rf_policy_get_def(policy)->setup(policy, &shape, &layout, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) {
            ck_assert_uint_ge(n, 5);
            rf_free(layout.tables);
            break;
        }
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    rf_policy_destroy(policy);
    rf_json_close(doc);
    free(costs);
}
END_TEST

/* ---- space-time blocks ---- */

/* Attention over frames computes rows as MLPs do, the attention within a frame as in any block, and a block's rows are as many in each
 * of its parts. */
START_TEST(rows_of_temporal_parts) {
    static const struct {
        const char *policy, *options;
        bool attends; /* self-attention computes rows too */
    } list[] = {
        {"toca", "ratio=0.2,step_weight=0", false},
        {"toca", "ratio=0.2,step_weight=0,attention=rows", true},
        {"duca", "ratio=0.2,step_weight=0,attention=rows", true},
        {"diffsparse", "table=uniform", true},
        {"diffsparse", "table=uniform,attention=cached", false},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        sim_result r = run_with((sim_options){.policy = list[i].policy,
                                              .options = list[i].options,
                                              .num_blocks = 2,
                                              .num_parts = 4,
                                              .kinds = four_kinds});
        ck_assert(r.layout.tokens.used);
        ck_assert_int_eq(r.layout.tokens.attention_rows, list[i].attends);
        ck_assert_int_eq(r.layout.part_depth[RF_CACHE_TEMPORAL], 1);
        int seen = 0;
        for (int step = 0; step < ALL_STEPS; step++)
            for (int b = 0; b < 2 && r.steps[step].kind == RF_STEP_PARTIAL; b++) {
                int rows = rows_of(&r, step, b, 1);
                ck_assert_int_eq(rows_of(&r, step, b, 2), rows);
                ck_assert_int_eq(rows_of(&r, step, b, 3), rows);
                if (rows == 16) continue;
                ck_assert_int_eq(rows_of(&r, step, b, 0), list[i].attends ? rows : 0);
                seen += rows > 0;
            }
        ck_assert_int_gt(seen, 10);
        sim_free(&r);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching_tokens");
    TCase *tc = tcase_create("tokens");
    tcase_add_test(tc, thresholds_of_dit);
    tcase_add_test(tc, schedules_of_toca);
    tcase_add_test(tc, schedule_of_250_steps);
    tcase_add_test(tc, rows_of_dit);
    tcase_add_test(tc, rows_of_other_settings);
    tcase_add_test(tc, duca_alternates);
    tcase_add_test(tc, uniform_tables_spend_the_budget_evenly);
    tcase_add_test(tc, fitted_tables_are_followed);
    tcase_add_test(tc, tables_come_from_files);
    tcase_add_test(tc, a_missing_calibration_says_what_to_do);
    tcase_add_test(tc, parts_of_a_level);
    tcase_add_test(tc, rows_of_temporal_parts);
    tcase_add_test(tc, allocation_is_exact);
    tcase_add_test(tc, allocation_refuses);
    tcase_add_test(tc, never_skip_settings_never_skip);
    tcase_add_test(tc, forced_steps_are_full);
    tcase_add_test(tc, few_steps_are_refused_or_not);
    tcase_add_test(tc, every_option_changes_the_run);
    tcase_add_test(tc, failed_allocations_are_reported);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
