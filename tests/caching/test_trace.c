/* tests/caching/test_trace.c - traces: written, read back to the same bits, refused when damaged, replayed. */
#include "caching/trace.h"

#include <float.h>

#include "core/memory.h"
#include "tests/caching/sim.h"
#include "tests/test_util.h"

#define BLOCKS 3
#define PARTS  2
#define SITES  (BLOCKS * PARTS)
#define STEPS  5
#define IMAGES 4

static const uint8_t kinds[SITES] = {RF_CACHE_SELF, RF_CACHE_MLP,     RF_CACHE_SELF,
                                     RF_CACHE_MLP,  RF_CACHE_NO_PART, RF_CACHE_PARALLEL};

typedef struct {
    char dir[256], path[300];
} temp;

static void temp_make(temp *t) {
    ck_assert_ptr_nonnull(rf_temp_dir_make(t->dir, sizeof t->dir));
    snprintf(t->path, sizeof t->path, "%s/tra,ce.jsonl", t->dir); /* a path may hold commas */
}

static void save(const temp *t, const char *text, size_t bytes) {
    FILE *f = fopen(t->path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, bytes, f), bytes);
    ck_assert_int_eq(fclose(f), 0);
}

/* ---- lines as text ---- */

typedef struct {
    char *text;
    size_t used;
} lines;

static void add_line(lines *l, char *line) {
    size_t len = strlen(line);
    ck_assert_ptr_null(strchr(line, '\n'));
    l->text = realloc(l->text, l->used + len + 2);
    memcpy(l->text + l->used, line, len);
    l->used += len;
    l->text[l->used++] = '\n';
    l->text[l->used] = 0;
    rf_free(line);
}

static void add_header(lines *l, const rf_policy *policy, const rf_cache_shape *shape, int first_image) {
    rf_error err = {0};
    char *line = NULL;
    rf_assert_ok(rf_trace_header(&line, policy, shape, first_image, &err), err);
    add_line(l, line);
}

static void add_step(lines *l, const rf_cache_shape *shape, const rf_cache_layout *layout, int step,
                     const rf_trace_image *images, int num_images) {
    rf_error err = {0};
    char *line = NULL;
    rf_assert_ok(rf_trace_step(&line, shape, layout, step, images, num_images, &err), err);
    add_line(l, line);
}

/* ---- random plans ---- */

typedef struct {
    rf_step_plan plan;
    uint8_t parts[SITES];
    int32_t rows[SITES];
} full_plan;

static unsigned random_at(int a, int b, int c) {
    return (unsigned)(sim_noise(7, a, b, c) * 4294967296.0);
}

static float random_float(int a, int b, int c) {
    static const float odd[] = {-0.0f, FLT_MAX, -FLT_MIN, 1e-45f, 1.0f, 0.1f, 16777217.0f, -1e-40f};
    unsigned r = random_at(a, b, c);
    if (r % 3 == 0) return odd[r / 3 % 8];
    return (float)((sim_noise(8, a, b, c) - 0.5) * pow(10, (int)(r % 60) - 30));
}

static double random_double(int a, int b) {
    unsigned r = random_at(a, b, 900);
    return r % 5 == 0 ? (double)NAN : r % 5 == 1 ? HUGE_VAL : r % 5 == 2 ? -0.0 : (sim_noise(9, a, b, 0) - 0.5) * 1e-7;
}

/* What cannot be told from a trace is left 0, so that plans compare as bytes. */
static void make_plan(full_plan *out, const rf_cache_layout *layout, int step, int image) {
    unsigned r = random_at(step, image, 800);
    *out = (full_plan){0};
    rf_step_plan *p = &out->plan;
    p->kind = (rf_step_kind)(r % 3);
    p->produce = (rf_produce)(r / 3 % 3);
    p->span = (int)(r / 9 % 2);
    p->verify = r / 18 % 2;
    p->use_verified = p->verify && r / 36 % 2;
    p->num_terms = (int)(r / 72 % 5) * (r / 360 % 4 ? 1 : 16);
    p->horizon = (int)(r / 1440 % 5);
    p->statistic = random_double(step, image);
    p->threshold = random_double(step, image + 100);
    for (int c = 0; c < 3; c++) {
        for (int j = 0; j < p->num_terms; j++) p->weights[c][j] = random_float(step, image * 3 + c, j);
    }
    for (int i = 0; i < SITES; i++) {
        bool inside = p->produce == RF_PRODUCE_OUTPUT ||
                      (p->produce == RF_PRODUCE_SPAN && i / PARTS >= layout->spans[p->span].begin &&
                       i / PARTS < layout->spans[p->span].end);
        if (p->kind == RF_STEP_FULL || inside || kinds[i] == RF_CACHE_NO_PART) continue;
        out->parts[i] = (uint8_t)(random_at(step, image, i) % 3);
        if (out->parts[i] == RF_DO_ROWS) out->rows[i] = (int32_t)(random_at(step, image + 50, i) % 17);
    }
}

static void assert_same_plan(const full_plan *want, const rf_step_plan *got, int image, int step) {
    const rf_step_plan *p = &want->plan;
    ck_assert_msg(p->kind == got->kind && p->produce == got->produce && p->span == got->span &&
                      p->verify == got->verify && p->use_verified == got->use_verified &&
                      p->num_terms == got->num_terms && p->horizon == got->horizon,
                  "image %d, step %d", image, step);
    ck_assert_msg(memcmp(p->weights, got->weights, sizeof p->weights) == 0, "weights of image %d, step %d", image,
                  step);
    ck_assert((isnan(p->statistic) && isnan(got->statistic)) || memcmp(&p->statistic, &got->statistic, 8) == 0);
    ck_assert((isnan(p->threshold) && isnan(got->threshold)) || memcmp(&p->threshold, &got->threshold, 8) == 0);
    ck_assert_msg(memcmp(want->parts, got->parts, sizeof want->parts) == 0, "parts of image %d, step %d", image, step);
    ck_assert_msg(memcmp(want->rows, got->rows, sizeof want->rows) == 0, "rows of image %d, step %d", image, step);
}

static const float timesteps[STEPS] = {999.5f, 800, 600, 400, 0.1f};

static rf_cache_shape random_shape(void) {
    return (rf_cache_shape){.model = "a \"quoted\"\\\n\x01 m\xc3\xb6"
                                     "del \xff",
                            .num_steps = STEPS,
                            .timesteps = timesteps,
                            .sampler = "ddim",
                            .batch = IMAGES,
                            .branches = 2,
                            .tokens = 16,
                            .width = 8,
                            .num_blocks = BLOCKS,
                            .num_parts = PARTS,
                            .part_kinds = kinds};
}

static const rf_cache_layout random_layout = {
    .spans = {{.begin = 0, .end = 3, .depth = 1}, {.begin = 1, .end = 2, .depth = 1}}, .num_classes = 3};

static rf_policy *make_policy(const char *name) {
    rf_error err = {0};
    rf_policy *policy = NULL;
    rf_assert_ok(rf_policy_create(&policy, name, &err), err);
    return policy;
}

/* A batch of random plans; images 0 and 2 of every odd step do the same. */
static void add_batch(lines *l, const rf_policy *policy, full_plan plans[IMAGES][STEPS], int seed) {
    rf_cache_shape shape = random_shape();
    add_header(l, policy, &shape, seed);
    for (int step = 0; step < STEPS; step++) {
        rf_trace_image images[IMAGES] = {{0}};
        for (int i = 0; i < IMAGES; i++) {
            make_plan(&plans[i][step], &random_layout, step, i == 2 && step % 2 ? seed : seed + i);
            plans[i][step].plan.parts = plans[i][step].parts;
            plans[i][step].plan.rows = plans[i][step].rows;
            images[i] = (rf_trace_image){.image = seed + i, .plan = &plans[i][step].plan, .forced = i == 3};
        }
        add_step(l, &shape, &random_layout, step, images, IMAGES);
    }
}

START_TEST(plans_come_back_to_the_bit) {
    static full_plan plans[40][IMAGES][STEPS];
    temp t;
    temp_make(&t);
    rf_policy *policy = make_policy("worldcache");
    lines l = {0};
    for (int b = 0; b < 40; b++) add_batch(&l, policy, plans[b], b * IMAGES);
    save(&t, l.text, l.used);
    ck_assert_ptr_nonnull(strstr(l.text, "\"image\":[0,2]"));
    rf_error err = {0};
    rf_trace *trace = NULL;
    rf_assert_ok(rf_trace_open(&trace, t.path, &err), err);
    rf_trace_info info = rf_trace_get_info(trace);
    ck_assert_str_eq(info.policy, "worldcache");
    char text[512];
    rf_policy_describe(policy, text, sizeof text);
    ck_assert_str_eq(info.options, text);
    ck_assert(info.num_steps == STEPS && info.num_images == 40 * IMAGES && info.branches == 2 &&
              info.num_blocks == BLOCKS && info.num_parts == PARTS && info.tokens == 16);
    for (int image = 0; image < info.num_images; image++) {
        for (int step = 0; step < STEPS; step++) {
            uint8_t parts[SITES];
            int32_t rows[SITES];
            rf_step_plan got = {.parts = parts, .rows = rows};
            rf_assert_ok(rf_trace_get_plan(trace, image, step, &got, &err), err);
            assert_same_plan(&plans[image / IMAGES][image % IMAGES][step], &got, image, step);
        }
    }
    rf_step_plan got = {0};
    rf_assert_fails(rf_trace_get_plan(trace, info.num_images, 0, &got, &err), err, RF_ERR_ARGUMENT, "image 160");
    rf_assert_fails(rf_trace_get_plan(trace, 0, -1, &got, &err), err, RF_ERR_ARGUMENT, "step -1");
    rf_trace_close(trace);
    rf_trace_close(NULL);
    rf_policy_destroy(policy);
    rf_temp_dir_remove(t.dir);
    free(l.text);
}
END_TEST

/* ---- what a line says ---- */

static const rf_json_value *entry_of(const rf_json *doc, size_t index) {
    return rf_json_at(rf_json_get(rf_json_root(doc), "images"), index, NULL);
}

static void assert_text(const rf_json *doc, const rf_json_value *object, const char *key, const char *want) {
    rf_error err = {0};
    const char *got = NULL;
    rf_assert_ok(rf_json_get_string(doc, object, key, &got, &err), err);
    ck_assert_str_eq(got, want);
}

START_TEST(lines_say_what_was_done) {
    rf_cache_shape shape = random_shape();
    rf_error err = {0};
    char *line = NULL;
    rf_json *doc = NULL;
    rf_policy *policy = make_policy("fora");
    rf_assert_ok(rf_trace_header(&line, policy, &shape, 7, &err), err);
    rf_assert_ok(rf_json_parse(&doc, line, strlen(line), "line", &err), err);
    assert_text(doc, rf_json_root(doc), "model",
                "a \"quoted\"\\\n\x01 m\xc3\xb6"
                "del \xef\xbf\xbd");
    assert_text(doc, rf_json_root(doc), "policy", "fora");
    int64_t first = 0;
    rf_assert_ok(rf_json_get_int(doc, rf_json_root(doc), "first_image", 0, 99, &first, &err), err);
    ck_assert_int_eq(first, 7);
    rf_json_close(doc);
    rf_free(line);

    float signals[RF_SIGNAL_COUNT][2][4] = {{{0}}};
    int steps[RF_SIGNAL_COUNT];
    for (int k = 0; k < RF_SIGNAL_COUNT; k++) {
        steps[k] = k == RF_SIGNAL_PROBE ? 1 : 2;
        for (int b = 0; b < 2; b++) {
            signals[k][b][0] = (float)(8 * (k + 1) * (b + 1));
            signals[k][b][1] = 16;
        }
    }
    uint8_t parts[3][SITES] = {{0}, {RF_DO_PRODUCE, RF_DO_ROWS, RF_DO_COMPUTE, RF_DO_PRODUCE, 0, RF_DO_PRODUCE}, {0}};
    int32_t rows[SITES] = {0, 5, 0, 0, 0, 0};
    rf_step_plan plans[3] = {
        {.kind = RF_STEP_FULL, .num_terms = 1, .statistic = 0.1, .threshold = NAN},
        {.kind = RF_STEP_PARTIAL, .num_terms = 1, .statistic = NAN, .threshold = HUGE_VAL},
        {.kind = RF_STEP_PARTIAL,
         .produce = RF_PRODUCE_SPAN,
         .span = 1,
         .num_terms = 2,
         .statistic = NAN,
         .threshold = NAN},
    };
    rf_trace_image images[3];
    for (int i = 0; i < 3; i++) {
        plans[i].parts = parts[i];
        plans[i].rows = rows;
        for (int c = 0; c < 3; c++) plans[i].weights[c][0] = 1;
        images[i] = (rf_trace_image){.image = i, .plan = &plans[i]};
    }
    images[0].signals = (const float(*)[2][4])signals;
    images[0].signal_steps = steps;
    images[0].has_drift = images[0].forced = true;
    images[0].drift[0] = 0.25;
    images[0].drift[1] = 0.5;
    rf_assert_ok(rf_trace_step(&line, &shape, &random_layout, 2, images, 3, &err), err);
    rf_assert_ok(rf_json_parse(&doc, line, strlen(line), "line", &err), err);
    ck_assert_uint_eq(rf_json_count(rf_json_get(rf_json_root(doc), "images")), 3);
    assert_text(doc, entry_of(doc, 0), "blocks", "cc cc -c");
    assert_text(doc, entry_of(doc, 1), "blocks", "rt cr -r");
    assert_text(doc, entry_of(doc, 2), "blocks", "cc -- -c");
    assert_text(doc, entry_of(doc, 2), "produce", "span");
    ck_assert(!rf_json_has(entry_of(doc, 0), "rows") && !rf_json_has(entry_of(doc, 0), "verify"));
    const rf_json_value *list = rf_json_get(entry_of(doc, 1), "rows");
    static const int want_rows[SITES] = {0, 5, 16, 0, 0, 0};
    for (size_t i = 0; i < SITES; i++) ck_assert(rf_json_number(rf_json_at(list, i, NULL)) == want_rows[i]);
    const rf_json_value *told = rf_json_get(entry_of(doc, 0), "signals");
    static const struct {
        const char *key;
        double want;
    } values[] = {{"input_step", 0.5}, {"output_size", 40}, {"span_norms", 56.0 / 16}, {"verify", 72.0 / (16 * 8)}};
    for (size_t i = 0; i < 4; i++) {
        const rf_json_value *pair = rf_json_get(told, values[i].key);
        ck_assert_uint_eq(rf_json_count(pair), 2);
        for (int b = 0; b < 2; b++) {
            double got = rf_json_number(rf_json_at(pair, (size_t)b, NULL));
            ck_assert_msg(got == values[i].want * (b + 1), "%s: %g", values[i].key, got);
        }
    }
    ck_assert(!rf_json_has(told, "probe") && !rf_json_has(entry_of(doc, 1), "signals"));
    ck_assert(rf_json_number(rf_json_at(rf_json_get(entry_of(doc, 0), "drift"), 1, NULL)) == 0.5);
    rf_json_close(doc);
    rf_free(line);

    plans[0].kind = RF_STEP_PROBE;
    rf_assert_fails(rf_trace_step(&line, &shape, &random_layout, 2, images, 3, &err), err, RF_ERR_STATE, "step 2");
    rf_policy_destroy(policy);
}
END_TEST

START_TEST(failed_allocations_are_reported) {
    full_plan plans[IMAGES][STEPS];
    temp t;
    temp_make(&t);
    rf_policy *policy = make_policy("fora");
    lines l = {0};
    add_batch(&l, policy, plans, 0);
    save(&t, l.text, l.used);
    rf_cache_shape shape = random_shape();
    rf_trace_image images[IMAGES];
    for (int i = 0; i < IMAGES; i++) images[i] = (rf_trace_image){.image = i, .plan = &plans[i][1].plan};
    uint64_t live = rf_memory_get_counts().num_live;
    for (int what = 0; what < 3; what++) {
        for (uint64_t n = 1;; n++) {
            rf_error err = {0};
            char *line = NULL;
            rf_trace *trace = NULL;
            rf_memory_fail_nth(n);
            rf_status st = what == 0   ? rf_trace_header(&line, policy, &shape, 0, &err)
                           : what == 1 ? rf_trace_step(&line, &shape, &random_layout, 1, images, IMAGES, &err)
                                       : rf_trace_open(&trace, t.path, &err);
            rf_memory_fail_nth(0);
            rf_free(line);
            rf_trace_close(trace);
            ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
            ck_assert_uint_lt(n, 20000);
            if (st == RF_OK) break;
            ck_assert_int_eq(st, RF_ERR_MEMORY);
        }
    }
    rf_policy_destroy(policy);
    rf_temp_dir_remove(t.dir);
    free(l.text);
}
END_TEST

/* ---- hostile files ---- */

static void assert_refused(const temp *t, const char *text, size_t bytes, const char *part) {
    save(t, text, bytes);
    rf_error err = {0};
    rf_trace *trace = NULL;
    uint64_t live = rf_memory_get_counts().num_live;
    rf_status st = rf_trace_open(&trace, t->path, &err);
    ck_assert_msg(st != RF_OK, "not refused: %s", text);
    ck_assert_ptr_null(trace);
    ck_assert_msg(strstr(err.message, part) != NULL, "'%s' is not in: %s\n%s", part, err.message, text);
    ck_assert_msg(strstr(err.message, "tra,ce.jsonl") && !strchr(err.message, '\n'), "%s", err.message);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
}

#define HEADER                                                                                                         \
    "{\"trace\":1,\"policy\":\"fora\",\"options\":\"\",\"model\":\"m\",\"sampler\":\"s\",\"steps\":2,\"images\":2,"    \
    "\"first_image\":3,\"branches\":2,\"blocks\":2,\"parts\":2,\"tokens\":16}\n"
#define ENTRY_0                                                                                                        \
    "{\"image\":[3,4],\"kind\":\"full\",\"produce\":\"none\",\"span\":0,\"horizon\":0,\"statistic\":null,"             \
    "\"weights\":[],\"blocks\":\"cc cc\"}"
#define ENTRY_1                                                                                                        \
    "{\"image\":3,\"kind\":\"partial\",\"produce\":\"none\",\"span\":0,\"horizon\":1,\"weights\":[[1]],"               \
    "\"blocks\":\"rt pc\",\"rows\":[0,5,0,16]}"
#define ENTRY_2                                                                                                        \
    "{\"image\":4,\"kind\":\"skip\",\"produce\":\"output\",\"span\":1,\"horizon\":1,\"weights\":[[0.5,0.5]],"          \
    "\"blocks\":\"-- --\"}"
#define STEP_0 "{\"step\":0,\"images\":[" ENTRY_0 "]}\n"
#define STEP_1 "{\"step\":1,\"images\":[" ENTRY_1 "," ENTRY_2 "]}\n"
static const char good[] = HEADER STEP_0 STEP_1;

/* The good trace with the first `from` made `to`. */
static char *with(const char *from, const char *to) {
    const char *at = strstr(good, from);
    ck_assert_msg(at != NULL, "%s is not in it", from);
    char *out = malloc(sizeof good + strlen(to));
    size_t before = (size_t)(at - good);
    memcpy(out, good, before);
    strcpy(out + before, to);
    strcat(out, at + strlen(from));
    return out;
}

START_TEST(damaged_traces_are_refused) {
    temp t;
    temp_make(&t);
    rf_error err = {0};
    rf_trace *trace = NULL;
    save(&t, good, sizeof good - 1);
    rf_assert_ok(rf_trace_open(&trace, t.path, &err), err);
    rf_trace_close(trace);
    static const struct {
        const char *from, *to, *part;
    } cases[] = {
        {"\"trace\":1", "\"trace\":2", ":1: 'trace'"},
        {"\"trace\":1", "\"trace\":[1]", ":1: 'trace'"},
        {"\"fora\"", "7", ":1: 'policy'"},
        {"\"options\":\"\",", "", ":1: key 'options'"},
        {"\"steps\":2", "\"steps\":0", "'steps'"},
        {"\"steps\":2", "\"steps\":1e300", "'steps'"},
        {"\"steps\":2", "\"steps\":2.5", "'steps'"},
        {"\"steps\":2", "\"steps\":3", ":4: ends where step 2 of 3 belongs"},
        {"\"steps\":2", "\"steps\":1", ":3: step 1 after the last"},
        {"\"steps\":2,\"images\":2", "\"steps\":10000,\"images\":1000000", "at most"},
        {"\"images\":2", "\"images\":3", ":2: step 0 tells of 2 images, expected 3"},
        {"\"images\":2", "\"images\":1", ":2: 'image'"},
        {"\"images\":2", "\"images\":-1", "'images'"},
        {"\"first_image\":3", "\"first_image\":4", "'image'"},
        {"\"branches\":2", "\"branches\":3", "'branches'"},
        {"\"blocks\":2", "\"blocks\":3", "'blocks' has 5 characters, expected 8"},
        {"\"blocks\":2", "\"blocks\":1000000", "'blocks'"},
        {"\"parts\":2", "\"parts\":17", "'parts'"},
        {"\"tokens\":16", "\"tokens\":4", "'rows'"},
        {HEADER, "", ":1: no header"},
        {STEP_0, "", ":2: step 1 where step 0"},
        {STEP_0, STEP_0 STEP_0, ":3: step 0 where step 1"},
        {STEP_1, "", ":3: ends where step 1 of 2"},
        {STEP_1, STEP_1 STEP_1, ":4: step 1 after"},
        {STEP_0, STEP_0 HEADER, ":3: a header where step 1"},
        {STEP_1, STEP_1 HEADER, ":5: ends where step 0"},
        {STEP_0, "7\n" STEP_0, ":2: a line of a trace"},
        {STEP_0, "{\n" STEP_0, ":2: byte"},
        {"\"step\":0", "\"step\":\"0\"", "'step'"},
        {"\"images\":[" ENTRY_0 "]", "\"images\":7", "'images'"},
        {ENTRY_0, "7", "'images' must hold objects"},
        {"\"image\":[3,4]", "\"image\":[3,3]", "told twice"},
        {"\"image\":[3,4]", "\"image\":[3]", "tells of 1"},
        {"\"image\":[3,4]", "\"image\":[]", "tells of 0"},
        {"\"image\":[3,4]", "\"image\":[3,2]", "'image'"},
        {"\"image\":[3,4]", "\"image\":[3,5]", "'image'"},
        {"\"image\":[3,4]", "\"image\":[3,1e30]", "'image'"},
        {"\"image\":[3,4]", "\"image\":[3,3.5]", "'image'"},
        {"\"image\":[3,4]", "\"image\":[3,null]", "'image'"},
        {"\"image\":[3,4]", "\"image\":\"3\"", "'image'"},
        {"\"image\":[3,4],", "", "without 'image'"},
        {"\"kind\":\"full\"", "\"kind\":\"probe\"", "'kind' is 'probe'"},
        {"\"kind\":\"full\",", "", "'kind'"},
        {"\"produce\":\"none\"", "\"produce\":0", "'produce'"},
        {"\"span\":0", "\"span\":2", "'span'"},
        {"\"span\":0", "\"span\":-1", "'span'"},
        {"\"horizon\":0", "\"horizon\":3", "'horizon'"},
        {"\"statistic\":null", "\"statistic\":\"1\"", "'statistic'"},
        {"\"statistic\":null", "\"verify\":\"no\"", "'verify'"},
        {"\"weights\":[]", "\"weights\":{}", "'weights'"},
        {"\"weights\":[],", "", "'weights'"},
        {"\"weights\":[]", "\"weights\":[1]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[]]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[1],[1],[1],[1]]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[1],[1,2]]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[1e999]]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[1e39]]", "'weights'"},
        {"\"weights\":[]", "\"weights\":[[null]]", "'weights'"},
        {"cc cc", "cc c", "'blocks'"},
        {"cc cc", "cccc ", "'blocks'"},
        {"cc cc", "cc cx", "'x'"},
        {"cc cc", "cc cr", "'r' for part 3 of a full step"},
        {"cc cc", "cc c\\n", "'?'"},
        {",\"rows\":[0,5,0,16]", "", "'rows'"},
        {"[0,5,0,16]", "[0,5,0]", "'rows'"},
        {"[0,5,0,16]", "[0,-5,0,16]", "'rows'"},
        {"[0,5,0,16]", "[0,17,0,16]", "'rows'"},
        {"[0,5,0,16]", "[0,5.5,0,16]", "'rows'"},
        {"[0,5,0,16]", "[0,{},0,16]", "'rows'"},
        {"[0,5,0,16]", "{}", "'rows'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *text = with(cases[i].from, cases[i].to);
        assert_refused(&t, text, strlen(text), cases[i].part);
        free(text);
    }
    /* batches that do not belong together */
    static const char *const second[][2] = {{"fora", "a batch of policy"},
                                            {"\"options\":\"\"", "a batch of policy"},
                                            {"\"tokens\":16", "a batch of 2 steps"},
                                            {"\"parts\":2", "a batch of 2 steps"}};
    static const char *const other[] = {"pab", "\"options\":\"k=v\"", "\"tokens\":17", "\"parts\":1"};
    for (int i = 0; i < 4; i++) {
        char *batch = with(second[i][0], other[i]), text[4000];
        snprintf(text, sizeof text, "%s%s", good, batch);
        assert_refused(&t, text, strlen(text), second[i][1]);
        free(batch);
    }
    assert_refused(&t, "", 0, "no line");
    assert_refused(&t, "\n\n", 2, "no line");
    for (size_t cut = 1; cut < sizeof good - 2; cut++) assert_refused(&t, good, cut, "tra,ce.jsonl");
    rf_temp_dir_remove(t.dir);
    rf_assert_fails(rf_trace_open(&trace, t.path, &err), err, RF_ERR_MISSING, "tra,ce.jsonl");
}
END_TEST

/* Any byte made another: refused or read, and nothing else. */
START_TEST(changed_bytes_do_no_harm) {
    temp t;
    temp_make(&t);
    char text[sizeof good];
    uint64_t live = rf_memory_get_counts().num_live;
    for (int round = 0; round < 6000; round++) {
        memcpy(text, good, sizeof good);
        for (int i = 0; i <= round % 3; i++) {
            size_t at = random_at(round, i, 1) % (sizeof good - 1);
            text[at] =
                (round & 4) ? "0123456789[]{},\":.-e"[random_at(round, i, 2) % 20] : (char)random_at(round, i, 3);
        }
        save(&t, text, sizeof good - 1);
        rf_error err = {0};
        rf_trace *trace = NULL;
        if (rf_trace_open(&trace, t.path, &err) == RF_OK) {
            rf_trace_info info = rf_trace_get_info(trace);
            uint8_t parts[64 * 16];
            int32_t rows[64 * 16];
            ck_assert_int_le(info.num_blocks * info.num_parts, 64);
            rf_step_plan plan = {.parts = parts, .rows = rows};
            for (int i = 0; i < info.num_images * info.num_steps; i++) {
                rf_assert_ok(rf_trace_get_plan(trace, i / info.num_steps, i % info.num_steps, &plan, &err), err);
            }
            rf_trace_close(trace);
        }
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    rf_temp_dir_remove(t.dir);
}
END_TEST

/* ---- replay ---- */

static const char calibration[] = "{\"teacache\":{\"coefficients\":[0,0,0,1,0]},\"magcache\":{\"num_steps\":3,"
                                  "\"ratios\":[[1,0.98,0.95],[1,0.97,0.96]]}}";

static void noisy(void *user, int step, rf_signal signal, float out[2][4]) {
    (void)user;
    for (int b = 0; b < 2; b++) {
        float v[2][4];
        sim_set_rel1(v, 0.15 * sim_noise(5, step, (int)signal, b));
        memcpy(out[b], v[b], sizeof v[b]);
        if (signal == RF_SIGNAL_VERIFY) out[b][0] *= 16 * 64;
        if (signal == RF_SIGNAL_SPAN_NORMS) out[b][0] = 16;
    }
}

static void noisy_drift(void *user, int step, int branch, float *e, int horizon) {
    (void)user;
    for (int k = 0; k < horizon; k++) e[k] = (float)(0.1 * sim_noise(6, step, k, branch));
}

static void record_run(const temp *t, const sim_result *r, int copies) {
    lines l = {0};
    rf_cache_shape shape = r->shape;
    shape.batch = copies;
    add_header(&l, r->policy, &shape, 0);
    for (int step = 0; step < r->num_steps; step++) {
        rf_trace_image images[4] = {{0}};
        for (int i = 0; i < copies; i++) images[i] = (rf_trace_image){.image = i, .plan = &r->steps[step].plan};
        add_step(&l, &shape, &r->layout, step, images, copies);
    }
    save(t, l.text, l.used);
    free(l.text);
}

static rf_status replay(sim_result *out, const temp *t, sim_options o, rf_error *err) {
    char text[400];
    snprintf(text, sizeof text, "file=%s", t->path);
    o.policy = "replay";
    o.options = text;
    return sim_try(out, &o, err);
}

/* The signature of a step that replay should have: without verification, see replay.c. */
static bool replays(const sim_result *inner, const sim_result *again, int step) {
    const sim_step *a = &inner->steps[step], *b = &again->steps[step];
    if (!a->plan.verify) return strcmp(a->signature, b->signature) == 0;
    int sites = inner->shape.num_blocks * inner->shape.num_parts, last = sites - inner->shape.num_parts;
    bool same = b->plan.kind == (a->plan.use_verified ? RF_STEP_PARTIAL : RF_STEP_SKIP) && !b->plan.verify &&
                a->plan.produce == b->plan.produce && a->plan.num_terms == b->plan.num_terms &&
                memcmp(a->plan.weights, b->plan.weights, sizeof a->plan.weights) == 0;
    for (int i = 0; i < sites && same; i++) {
        same = b->plan.parts[i] == (i >= last && a->plan.use_verified ? RF_DO_COMPUTE : a->plan.parts[i]);
    }
    return same;
}

static const struct {
    const char *policy, *options;
} runs[] = {
    {"interval", ""},
    {"interval", "order=2,level=hidden"},
    {"teacache", ""},
    {"easycache", "threshold=0.5"},
    {"magcache", ""},
    {"spectrum", ""},
    {"adacache", ""},
    {"worldcache", ""},
    {"worldcache", "predictor=hermite,pooled=true"},
    {"fbcache", ""},
    {"dbcache", ""},
    {"dbcache", "fn=2,bn=1,calibrator=taylor,order=2"},
    {"deltacache", ""},
    {"fora", ""},
    {"taylorseer", ""},
    {"taylorseer", "mode=last"},
    {"hicache", ""},
    {"speca", ""},
    {"speca", "output=verified"},
    {"pab", ""},
    {"toca", "attention=rows,ratio=0.4"},
    {"duca", "ratio=0.3"},
    {"diffsparse", "table=uniform"},
};
#define NUM_RUNS ((int)(sizeof runs / sizeof runs[0]))

START_TEST(replay_does_what_was_done) {
    temp t;
    temp_make(&t);
    sim_options o = {.policy = runs[_i].policy,
                     .options = runs[_i].options,
                     .num_blocks = 8,
                     .force = true,
                     .calibration = calibration,
                     .measure = noisy,
                     .drift = noisy_drift,
                     .free_weights = true}; /* Spectrum's */
    sim_result inner, again;
    rf_error err = {0};
    rf_status st = sim_try(&inner, &o, &err);
    ck_assert_msg(st == RF_OK, "%s %s: %s", o.policy, o.options, err.message);
    ck_assert_msg(inner.num_full < inner.num_steps, "%s never skips", o.policy);
    record_run(&t, &inner, 1);
    st = replay(&again, &t, o, &err);
    ck_assert_msg(st == RF_OK, "%s: %s", o.policy, err.message);
    ck_assert(again.layout.is_static && again.layout.signals == 0 && again.layout.probe_blocks == 0);
    ck_assert_int_eq(again.layout.curvature.used, inner.layout.curvature.used);
    ck_assert_int_eq(again.num_read_backs, 0);
    for (int step = 0; step < inner.num_steps; step++) {
        ck_assert_msg(replays(&inner, &again, step), "%s, step %d: %s, replayed as %s", o.policy, step,
                      inner.steps[step].signature, again.steps[step].signature);
        ck_assert(isnan(again.steps[step].plan.statistic) && isnan(again.steps[step].plan.threshold));
    }
    sim_free(&again);

    /* forced full somewhere: plans stay sound (the simulator looks), and agree again in the end */
    bool force[50] = {false};
    force[7] = force[8] = force[21] = true;
    o.force_full = force;
    rf_assert_ok(replay(&again, &t, o, &err), err);
    ck_assert_int_ge(again.num_full, inner.num_full);
    sim_free(&again);
    sim_free(&inner);
    rf_temp_dir_remove(t.dir);
}
END_TEST

START_TEST(forced_steps_fall_back_to_the_newest_snapshot) {
    temp t;
    temp_make(&t);
    sim_options o = {.policy = "taylorseer", .options = "interval=5,first=1,order=1"};
    sim_result inner, again;
    rf_error err = {0};
    sim_run(&inner, &o);
    record_run(&t, &inner, 1);
    bool force[50] = {false};
    force[12] = true;
    o.force_full = force;
    rf_assert_ok(replay(&again, &t, o, &err), err);
    /* recorded: FULL at 10, 15, 20, ..; now also at 12: 13, 14 and 16 - 19 would extrapolate over other gaps */
    ck_assert_int_eq(again.steps[12].kind, RF_STEP_FULL);
    for (int step = 11; step < 25; step++) {
        if (step % 5 == 0 || step == 12) continue;
        bool changed = step > 12 && step < 20;
        ck_assert_int_eq(again.steps[step].plan.num_terms, changed ? 1 : 2);
        ck_assert(again.steps[step].plan.weights[0][0] == (changed ? 1.0f : inner.steps[step].plan.weights[0][0]));
    }
    sim_free(&again);
    sim_free(&inner);
    rf_temp_dir_remove(t.dir);
}
END_TEST

START_TEST(images_go_round) {
    temp t;
    temp_make(&t);
    sim_result a, b;
    sim_run(&a, &(sim_options){.policy = "fora", .options = "interval=3"});
    sim_run(&b, &(sim_options){.policy = "fora", .options = "interval=7"});
    lines l = {0};
    rf_cache_shape shape = a.shape;
    shape.batch = 2;
    add_header(&l, a.policy, &shape, 0);
    for (int step = 0; step < 50; step++) {
        rf_trace_image images[2] = {{.image = 0, .plan = &a.steps[step].plan},
                                    {.image = 1, .plan = &b.steps[step].plan}};
        add_step(&l, &shape, &a.layout, step, images, 2);
    }
    save(&t, l.text, l.used);
    free(l.text);

    rf_error err = {0};
    rf_policy *policy = make_policy("replay");
    rf_cache_layout layout = {0};
    rf_assert_ok(rf_policy_set_one(policy, "file", t.path, &err), err);
    rf_assert_ok(rf_policy_get_def(policy)->setup(policy, &a.shape, &layout, &err), err);
    for (int image = 0; image < 5; image++) {
        const sim_result *want = image % 2 ? &b : &a;
        int stored[RF_CACHE_MAX_TERMS] = {0}, num_stored = 0;
        for (int step = 0; step < 50; step++) {
            uint8_t parts[8] = {0};
            int32_t rows[8] = {0};
            rf_step_plan plan = {.parts = parts, .rows = rows};
            rf_step_ctx ctx = {.shape = &a.shape,
                               .layout = &layout,
                               .image = image,
                               .step = step,
                               .num_stored = num_stored,
                               .stored = stored};
            rf_policy_get_def(policy)->plan(policy, NULL, &ctx, &plan);
            ck_assert_int_eq(plan.kind, want->steps[step].kind);
            if (plan.kind != RF_STEP_FULL) continue;
            memmove(stored + 1, stored, sizeof stored - sizeof stored[0]);
            stored[0] = step;
            num_stored++;
        }
    }
    rf_free(layout.tables);
    rf_policy_destroy(policy);
    sim_free(&a);
    sim_free(&b);
    rf_temp_dir_remove(t.dir);
}
END_TEST

START_TEST(replays_that_do_not_fit_are_refused) {
    temp t;
    temp_make(&t);
    sim_result r, again;
    rf_error err = {0};
    sim_run(&r, &(sim_options){.policy = "fora"});
    record_run(&t, &r, 2);
    static const struct {
        sim_options o;
        const char *part;
    } misfits[] = {{{.num_steps = 40}, "a trace of 50 steps, this run has 40"},
                   {{.num_blocks = 5}, "a trace of 4 blocks, this run has 5"},
                   {{.num_parts = 3}, "a trace of 2 parts a block, this run has 3"},
                   {{.grid_h = 5}, "a trace of 16 tokens, this run has 20"},
                   {{.branches = 1}, "a trace of 2 branches, this run has 1"}};
    for (size_t i = 0; i < sizeof misfits / sizeof misfits[0]; i++) {
        rf_assert_fails(replay(&again, &t, misfits[i].o, &err), err, RF_ERR_SHAPE, misfits[i].part);
        sim_free(&again);
    }
    /* the inner policy's own refusals */
    char *text = NULL;
    lines l = {0};
    rf_cache_shape shape = r.shape;
    shape.num_steps = 3;
    rf_policy *replay_policy = make_policy("replay");
    add_header(&l, r.policy, &shape, 0);
    for (int step = 0; step < 3; step++) {
        rf_trace_image image = {.image = 0, .plan = &r.steps[0].plan};
        add_step(&l, &shape, &r.layout, step, &image, 1);
    }
    save(&t, l.text, l.used);
    rf_assert_fails(replay(&again, &t, (sim_options){.num_steps = 3}, &err), err, RF_ERR_UNSUPPORTED, "fora needs");
    sim_free(&again);
    /* a replay of a replay, no policy of that name, options that it does not have */
    static const char *const names[][3] = {{"\"fora\"", "\"replay\"", "first recording"},
                                           {"\"fora\"", "\"foro\"", "did you mean"},
                                           {"interval=", "intervol=", "intervol"}};
    for (int i = 0; i < 3; i++) {
        char *at = strstr(l.text, names[i][0]);
        ck_assert_ptr_nonnull(at);
        text = malloc(l.used + 64);
        snprintf(text, l.used + 64, "%.*s%s%s", (int)(at - l.text), l.text, names[i][1], at + strlen(names[i][0]));
        save(&t, text, strlen(text));
        rf_status st = replay(&again, &t, (sim_options){.num_steps = 3, .force = true}, &err);
        ck_assert_msg(st != RF_OK && strstr(err.message, names[i][2]) && strstr(err.message, "tra,ce.jsonl"), "%s",
                      err.message);
        sim_free(&again);
        free(text);
    }
    free(l.text);
    sim_free(&r);
    rf_policy_destroy(replay_policy);
    rf_assert_fails(sim_try(&r, &(sim_options){.policy = "replay"}, &err), err, RF_ERR_ARGUMENT, "file is not set");
    sim_free(&r);
    rf_temp_dir_remove(t.dir);
    rf_assert_fails(replay(&again, &t, (sim_options){0}, &err), err, RF_ERR_MISSING, "tra,ce.jsonl");
    sim_free(&again);
}
END_TEST

/* Well-formed traces of plans that the layout does not hold. */
START_TEST(plans_that_cannot_run_are_refused) {
    temp t;
    temp_make(&t);
    static const struct {
        const char *policy, *entry, *part;
        bool first; /* at step 0 */
    } cases[] = {
        {"fora", "\"kind\":\"skip\",\"produce\":\"none\",\"weights\":[],\"blocks\":\"rr rr\"", "before the first",
         true},
        {"fora", "\"kind\":\"full\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"cc cc\"", "more terms", true},
        {"fora", "\"kind\":\"skip\",\"produce\":\"output\",\"weights\":[[1]],\"blocks\":\"-- --\"", "not kept", false},
        {"fora", "\"kind\":\"skip\",\"produce\":\"span\",\"weights\":[[1]],\"blocks\":\"-- --\"", "not kept", false},
        {"fora", "\"kind\":\"full\",\"produce\":\"span\",\"weights\":[[1]],\"blocks\":\"cc cc\"", "not kept", false},
        {"fora", "\"kind\":\"skip\",\"produce\":\"none\",\"weights\":[],\"blocks\":\"rr rr\"", "from nothing", false},
        {"fora", "\"kind\":\"skip\",\"produce\":\"none\",\"weights\":[[1,2]],\"blocks\":\"rr rr\"", "more terms",
         false},
        {"fora", "\"kind\":\"skip\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"rr rc\"", "computes a part",
         false},
        {"fora", "\"kind\":\"partial\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"rr rt\",\"rows\":[1,1,1,1]",
         "token rows", false},
        {"fora", "\"kind\":\"partial\",\"produce\":\"output\",\"weights\":[[1]],\"blocks\":\"rr rr\"", "not kept",
         false},
        {"fora", "\"kind\":\"full\",\"verify\":\"use\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"cc cc\"",
         "verification", false},
        {"worldcache", "\"kind\":\"partial\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"cc rc\"", "more terms",
         false},
        {"worldcache", "\"kind\":\"partial\",\"produce\":\"output\",\"weights\":[[1]],\"blocks\":\"-- --\"",
         "partial step", false},
        {"worldcache", "\"kind\":\"skip\",\"produce\":\"output\",\"weights\":[[1]],\"blocks\":\"rr --\"", "under",
         false},
        {"worldcache", "\"kind\":\"skip\",\"produce\":\"output\",\"weights\":[],\"blocks\":\"-- --\"", "from nothing",
         false},
        {"toca", "\"kind\":\"partial\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"rr rt\",\"rows\":[0,0,0,16]",
         "number of token rows", false},
        {"toca", "\"kind\":\"skip\",\"produce\":\"none\",\"weights\":[[1]],\"blocks\":\"rr rt\",\"rows\":[0,0,0,5]",
         "skipped step", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[2000];
        int used =
            snprintf(text, sizeof text,
                     "{\"trace\":1,\"policy\":\"%s\",\"options\":\"\",\"steps\":2,\"images\":1,\"first_image\":0,"
                     "\"branches\":2,\"blocks\":2,\"parts\":2,\"tokens\":16}\n",
                     cases[i].policy);
        for (int step = 0; step < 2; step++) {
            bool wrong = (step == 0) == cases[i].first;
            used += snprintf(text + used, sizeof text - (size_t)used,
                             "{\"step\":%d,\"images\":[{\"image\":0,\"span\":0,\"horizon\":%d,%s}]}\n", step, step,
                             wrong ? cases[i].entry
                                   : "\"kind\":\"full\",\"produce\":\"none\",\"weights\":[],\"blocks\":\"cc cc\"");
        }
        save(&t, text, (size_t)used);
        rf_error err = {0};
        sim_result r;
        uint64_t live = rf_memory_get_counts().num_live;
        rf_status st = replay(&r, &t, (sim_options){.num_steps = 2, .num_blocks = 2, .force = true}, &err);
        ck_assert_msg(st == RF_ERR_CONFIG && strstr(err.message, cases[i].part) &&
                          strstr(err.message, "image 0, step "),
                      "case %zu: %s", i, st == RF_OK ? "accepted" : err.message);
        sim_free(&r);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    rf_temp_dir_remove(t.dir);
}
END_TEST

START_TEST(replay_survives_failed_allocations) {
    temp t;
    temp_make(&t);
    sim_result r;
    sim_run(&r, &(sim_options){.policy = "toca", .options = "ratio=0.4", .num_steps = 12, .num_blocks = 2});
    record_run(&t, &r, 2);
    rf_policy *policy = make_policy("replay");
    rf_error err = {0};
    rf_assert_ok(rf_policy_set_one(policy, "file", t.path, &err), err);
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1;; n++) {
        rf_cache_layout layout = {0};
        rf_memory_fail_nth(n);
        rf_status st = rf_policy_get_def(policy)->setup(policy, &r.shape, &layout, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) rf_free(layout.tables);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        ck_assert_uint_lt(n, 20000);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
    }
    rf_policy_destroy(policy);
    sim_free(&r);
    rf_temp_dir_remove(t.dir);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching_trace");
    TCase *tc = tcase_create("trace");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, plans_come_back_to_the_bit);
    tcase_add_test(tc, lines_say_what_was_done);
    tcase_add_test(tc, failed_allocations_are_reported);
    tcase_add_test(tc, damaged_traces_are_refused);
    tcase_add_test(tc, changed_bytes_do_no_harm);
    tcase_add_loop_test(tc, replay_does_what_was_done, 0, NUM_RUNS);
    tcase_add_test(tc, forced_steps_fall_back_to_the_newest_snapshot);
    tcase_add_test(tc, images_go_round);
    tcase_add_test(tc, replays_that_do_not_fit_are_refused);
    tcase_add_test(tc, plans_that_cannot_run_are_refused);
    tcase_add_test(tc, replay_survives_failed_allocations);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
