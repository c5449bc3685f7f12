/* tests/caching/test_reference.c - every policy against the plain Python statement of its rule (tests/reference/caching), on the
 * small model of tests/fixtures/dit-tiny: step by step what it decided and what it compared, and the latents it gave.
 *
 * Each case of caching.json runs as a batch of three images, which mostly decide differently, and image by image.
 * Bounds  Decisions are equal: the fixtures keep every one 1e-3 or more from its threshold. Statistics: statistic_bound of
 *         the case, relative to the larger of statistic and threshold; 5e-4, or 30 times what rounding to f32 alone moves
 *         them in the reference (SpeCa divides by predictions that may be nearly zero). Latents: the largest difference is
 *         within LATENTS_BOUND of the largest latent. The reference in f32 stays within 1.2e-6 of its f64 run
 *         (f32_against_f64), and the mildest wrong rule that was tried, a ridge of .11 for .1, moves the latents by
 *         1.2e-4 (wrong_rules). */
#include "core/backend.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/weights.h"
#include "dit/pipeline.h"
#include "tests/test_util.h"

#define LATENTS_BOUND 2e-5

enum { IMAGES = 3, LATENT = 4 * 8 * 8, MIDDLE = 2, MAX_STEPS = 50 };

static rf_json *open_cases(void) {
    rf_error err = {0};
    rf_json *doc = NULL;
    rf_assert_ok(rf_json_open(&doc, RF_FIXTURE_DIR "/caching.json", &err), err);
    return doc;
}

static const rf_json_value *member(const rf_json_value *object, const char *key) {
    const rf_json_value *v = rf_json_get(object, key);
    ck_assert_msg(v != NULL, "caching.json: no %s", key);
    return v;
}

static float *read_tensor(const rf_weights *w, const char *name, const char *part, size_t want) {
    char key[80];
    snprintf(key, sizeof key, "%s%s", name, part);
    rf_error err = {0};
    rf_tensor t;
    float *out = NULL;
    rf_assert_ok(rf_weights_get(w, key, &t, &err), err);
    ck_assert_uint_eq((size_t)rf_tensor_num_elems(&t), want);
    rf_assert_ok(rf_weights_read_f32(w, key, t.rank, t.shape, &out, &err), err);
    return out;
}

/* --- one case, as the fixture has it --- */

typedef struct {
    rf_json *doc;
    rf_weights *tensors;
    const rf_json_value *json;
    const char *name, *policy, *options;
    int num_steps, middle_steps[MIDDLE], labels[IMAGES];
    double guidance;
    float *initial, *final, *middle; /* [IMAGES, LATENT], the same, [IMAGES, MIDDLE, LATENT] */
} reference;

static reference reference_open(int index) {
    reference r = {.doc = open_cases()};
    rf_error err = {0};
    const rf_json_value *root = rf_json_root(r.doc);
    r.json = rf_json_at(member(root, "cases"), (size_t)index, NULL);
    r.name = rf_json_string(member(r.json, "name"));
    r.policy = rf_json_string(member(r.json, "policy"));
    r.options = rf_json_string(member(r.json, "options"));
    r.num_steps = (int)rf_json_number(member(r.json, "num_steps"));
    r.guidance = rf_json_number(member(root, "guidance"));
    ck_assert_int_le(r.num_steps, MAX_STEPS);
    for (size_t i = 0; i < MIDDLE; i++)
        r.middle_steps[i] = (int)rf_json_number(rf_json_at(member(r.json, "middle_steps"), i, NULL));
    for (size_t i = 0; i < IMAGES; i++) r.labels[i] = (int)rf_json_number(rf_json_at(member(root, "labels"), i, NULL));
    rf_assert_ok(rf_weights_open(&r.tensors, RF_FIXTURE_DIR "/caching.safetensors", &err), err);
    r.initial = read_tensor(r.tensors, "initial", "", (size_t)IMAGES * LATENT);
    r.final = read_tensor(r.tensors, r.name, ".final", (size_t)IMAGES * LATENT);
    r.middle = read_tensor(r.tensors, r.name, ".middle", (size_t)IMAGES * MIDDLE * LATENT);
    return r;
}

static void reference_close(reference *r) {
    rf_free(r->initial);
    rf_free(r->final);
    rf_free(r->middle);
    rf_weights_close(r->tensors);
    rf_json_close(r->doc);
}

/* --- what the engine did --- */

typedef struct {
    int first, num, num_steps; /* images first .. first + num of the reference */
    float final[IMAGES * LATENT], middle[MIDDLE][IMAGES * LATENT];
    char kinds[IMAGES][MAX_STEPS + 1];
    double statistics[IMAGES][MAX_STEPS], thresholds[IMAGES][MAX_STEPS];
    /* while running */
    const reference *ref;
    rf_image_session *session;
} outcome;

static bool keep_middle(void *user, int step, int num_steps) {
    outcome *o = user;
    rf_error err = {0};
    for (int i = 0; i < MIDDLE; i++)
        if (o->ref->middle_steps[i] == step)
            rf_assert_ok(rf_image_session_read_latents(o->session, o->middle[i], &err), err);
    return true;
}

/* "image" of an entry is a number or a list of numbers. */
static bool is_of_image(const rf_json_value *entry, int image) {
    const rf_json_value *which = member(entry, "image");
    if (rf_json_is_number(which)) return (int)rf_json_number(which) == image;
    for (const rf_json_value *v = rf_json_first(which); v != NULL; v = rf_json_next(v))
        if ((int)rf_json_number(v) == image) return true;
    return false;
}

static double number_or_nan(const rf_json_value *object, const char *key) {
    const rf_json_value *v = rf_json_get(object, key);
    return v != NULL ? rf_json_number(v) : (double)NAN;
}

static rf_status keep_line(void *user, const char *text, rf_error *err) {
    outcome *o = user;
    rf_json *doc = NULL;
    rf_assert_ok(rf_json_parse(&doc, text, strlen(text), "trace", err), *err);
    const rf_json_value *root = rf_json_root(doc), *step = rf_json_get(root, "step");
    if (step != NULL) { /* not the header */
        int s = (int)rf_json_number(step);
        ck_assert(s >= 0 && s < o->num_steps);
        for (int i = 0; i < o->num; i++) {
            int found = 0;
            const rf_json_value *entries = member(root, "images");
            for (const rf_json_value *e = rf_json_first(entries); e != NULL; e = rf_json_next(e)) {
                if (!is_of_image(e, o->first + i)) continue;
                o->statistics[i][s] = number_or_nan(e, "statistic");
                o->thresholds[i][s] = number_or_nan(e, "threshold");
                found++;
            }
            ck_assert_msg(found == 1, "%s: image %d has %d entries at step %d of the trace", o->ref->name, o->first + i,
                          found, s);
        }
    }
    rf_json_close(doc);
    return RF_OK;
}

static void run(outcome *o, const reference *r, int first, int num) {
    rf_error err = {0};
    rf_backend *backend = NULL;
    rf_image_model *model = NULL;
    rf_policy *policy = NULL;
    *o = (outcome){.first = first, .num = num, .num_steps = r->num_steps, .ref = r};
    rf_assert_ok(rf_backend_open(&backend, "cpu", 0, &err), err);
    rf_assert_ok(rf_image_model_load(&model, backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &err), err);
    rf_assert_ok(rf_policy_create(&policy, r->policy, &err), err);
    rf_assert_ok(rf_policy_set(policy, r->options, &err), err);
    rf_image_options options = rf_image_options_default();
    options.batch = num;
    options.num_steps = r->num_steps;
    options.cfg_scale = r->guidance;
    options.policy = policy;
    options.record_trace = true;
    rf_assert_ok(rf_image_session_create(&o->session, model, &options, &err), err);
    const uint64_t seeds[IMAGES] = {0};
    rf_assert_ok(rf_image_session_denoise(o->session, r->labels + first, seeds, r->initial + (size_t)first * LATENT,
                                          keep_middle, o, &err),
                 err);
    rf_assert_ok(rf_image_session_read_latents(o->session, o->final, &err), err);
    rf_image_session_info info = rf_image_session_get_info(o->session);
    ck_assert(info.has_cache);
    for (int i = 0; i < num; i++)
        for (int s = 0; s < r->num_steps; s++) {
            int kind = info.step_kinds[i * r->num_steps + s];
            o->kinds[i][s] = kind == RF_STEP_FULL      ? 'F'
                             : kind == RF_STEP_PARTIAL ? 'P'
                             : kind == RF_STEP_SKIP    ? 'S'
                                                       : '?';
        }
    rf_assert_ok(rf_image_session_write_trace(o->session, first, keep_line, o, &err), err);
    rf_image_session_destroy(o->session);
    rf_policy_destroy(policy);
    rf_image_model_close(model);
    rf_backend_close(backend);
}

/* --- held against each other --- */

static void check_kinds(const outcome *o, int i, const rf_json_value *image) {
    const char *want = rf_json_string(member(image, "kinds"));
    if (strcmp(o->kinds[i], want) == 0) return;
    int s = 0;
    while (o->kinds[i][s] != 0 && o->kinds[i][s] == want[s]) s++;
    double expected = rf_json_number(rf_json_at(member(image, "statistics"), (size_t)s, NULL));
    ck_abort_msg("%s {%s}, image %d of %d: steps\n  %s, expected\n  %s; at step %d statistic %g, expected %g",
                 o->ref->policy, o->ref->options, o->first + i, o->num, o->kinds[i], want, s, o->statistics[i][s],
                 expected);
}

static void check_statistics(const outcome *o, int i, const rf_json_value *image) {
    const double relative = rf_json_number(member(o->ref->json, "statistic_bound"));
    const rf_json_value *want = rf_json_first(member(image, "statistics"));
    const rf_json_value *bound = rf_json_first(member(image, "thresholds"));
    for (int s = 0; s < o->num_steps; s++, want = rf_json_next(want), bound = rf_json_next(bound)) {
        if (!rf_json_is_number(want)) continue; /* the rule compared nothing at this step */
        double w = rf_json_number(want), got = o->statistics[i][s];
        double t = rf_json_is_number(bound) ? rf_json_number(bound) : 0.0, scale = fmax(fabs(w), fabs(t));
        ck_assert_msg(fabs(got - w) <= relative * scale,
                      "%s, image %d of %d, step %d: statistic %.9g, expected %.9g (threshold %g)", o->ref->name,
                      o->first + i, o->num, s, got, w, t);
        if (rf_json_is_number(bound))
            ck_assert_msg(fabs(o->thresholds[i][s] - t) <= 1e-6 * fabs(t),
                          "%s, image %d, step %d: threshold %.9g, expected %.9g", o->ref->name, o->first + i, s,
                          o->thresholds[i][s], t);
    }
}

static void check_latents(const outcome *o, int i, const char *when, const float *got, const float *want) {
    double largest = 0;
    for (size_t k = 0; k < LATENT; k++) largest = fmax(largest, fabs((double)want[k]));
    rf_difference d = rf_compare_f32(got, want, LATENT);
    ck_assert_msg(d.max_abs <= LATENTS_BOUND * largest,
                  "%s, image %d of %d, %s: latents off by %g of their largest, %g (bound %g); relative L2 %g",
                  o->ref->name, o->first + i, o->num, when, d.max_abs / largest, largest, LATENTS_BOUND, d.rel_l2);
}

static void check(const outcome *o) {
    const reference *r = o->ref;
    for (int i = 0; i < o->num; i++) {
        int image = o->first + i;
        const rf_json_value *json = rf_json_at(member(r->json, "images"), (size_t)image, NULL);
        check_kinds(o, i, json);
        check_statistics(o, i, json);
        for (int m = 0; m < MIDDLE; m++) {
            char when[32];
            snprintf(when, sizeof when, "after step %d", r->middle_steps[m]);
            check_latents(o, i, when, o->middle[m] + (size_t)i * LATENT,
                          r->middle + ((size_t)image * MIDDLE + (size_t)m) * LATENT);
        }
        check_latents(o, i, "at the end", o->final + (size_t)i * LATENT, r->final + (size_t)image * LATENT);
    }
}

START_TEST(a_batch_decides_and_gives_what_the_rule_says) {
    static outcome o;
    reference r = reference_open(_i);
    run(&o, &r, 0, IMAGES);
    check(&o);
    reference_close(&r);
}
END_TEST

START_TEST(an_image_alone_decides_and_gives_what_the_rule_says) {
    static outcome o;
    reference r = reference_open(_i);
    for (int image = 0; image < IMAGES; image++) {
        run(&o, &r, image, 1);
        check(&o);
    }
    reference_close(&r);
}
END_TEST

/* Otherwise the two tests above would say little. */
START_TEST(the_cases_decide_differently) {
    rf_json *doc = open_cases();
    const rf_json_value *cases = member(rf_json_root(doc), "cases");
    int adaptive = 0;
    for (const rf_json_value *c = rf_json_first(cases); c != NULL; c = rf_json_next(c)) {
        const rf_json_value *images = member(c, "images");
        const char *first = rf_json_string(member(rf_json_at(images, 0, NULL), "kinds"));
        ck_assert_msg(strpbrk(first, "SP") != NULL && strchr(first, 'F') != NULL, "%s: every step is the same",
                      rf_json_string(member(c, "name")));
        for (size_t i = 1; i < IMAGES; i++)
            if (strcmp(first, rf_json_string(member(rf_json_at(images, i, NULL), "kinds"))) != 0) {
                adaptive++;
                break;
            }
    }
    ck_assert_msg(adaptive >= 15, "only %d cases whose images decide differently", adaptive);
    rf_json_close(doc);
}
END_TEST

int main(void) {
    rf_error err = {0};
    rf_json *doc = NULL;
    if (rf_json_open(&doc, RF_FIXTURE_DIR "/caching.json", &err) != RF_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    int num_cases = (int)rf_json_count(rf_json_get(rf_json_root(doc), "cases"));
    rf_json_close(doc);
    Suite *suite = suite_create("caching/reference");
    TCase *tc = tcase_create("reference");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, the_cases_decide_differently);
    tcase_add_loop_test(tc, a_batch_decides_and_gives_what_the_rule_says, 0, num_cases);
    tcase_add_loop_test(tc, an_image_alone_decides_and_gives_what_the_rule_says, 0, num_cases);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
