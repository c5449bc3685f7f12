/* tests/dit/test_pipeline.c - whole runs against diffusers' DiTPipeline and a hand-written loop of the original DiT.
 *
 * Bound: PSNR at least 60 dB over pictures in 0..1; the fixtures' own floors are near 120 dB. */
#include "core/image.h"
#include "core/rng.h"
#include "tests/dit/dit_test_util.h"

/* Both clamped to 0..1 from the decoder's -1..1. */
static double psnr(const float *got_pm1, const float *want_01, size_t num) {
    double sum = 0;
    for (size_t i = 0; i < num; i++) {
        double g = got_pm1[i] / 2.0 + 0.5, w = want_01[i];
        g = g < 0 ? 0 : g > 1 ? 1 : g;
        w = w < 0 ? 0 : w > 1 ? 1 : w;
        sum += (g - w) * (g - w);
    }
    return sum == 0 ? INFINITY : 10.0 * log10((double)num / sum);
}

typedef struct {
    const char *run, *model;
    rf_sampler_kind sampler;
    int batch, classes[2], num_steps;
    double cfg_scale;
    bool from_seed; /* torch-cpu noise from seed 33 alone, instead of the stored first latents */
} run_case;

static const run_case run_cases[] = {
    {"ddim", "dit-tiny", RF_SAMPLER_COUNT, 2, {1, 3}, 20, 4.0, false},
    {"ddim", "dit-tiny", RF_SAMPLER_DDIM, 2, {1, 3}, 20, 4.0, true},
    {"ddim_unguided", "dit-tiny", RF_SAMPLER_COUNT, 1, {0, 0}, 5, 1.0, false},
    {"dpmpp", "dit-tiny", RF_SAMPLER_DPMPP_2M, 2, {1, 3}, 20, 4.0, false},
    {"euler", "dit-tiny", RF_SAMPLER_EULER, 2, {1, 3}, 20, 4.0, false},
    {"euler", "dit-tiny", RF_SAMPLER_EULER, 2, {1, 3}, 20, 4.0, true},
    {"ddpm_original", "dit-tiny-original", RF_SAMPLER_COUNT, 2, {1, 3}, 20, 4.0, true},
};

START_TEST(a_run_matches_the_reference_pipeline) {
    const run_case *c = &run_cases[_i];
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open("pipelines.safetensors");
    char name[64], path[512];
    snprintf(path, sizeof path, "%s/%s", RF_FIXTURE_DIR, c->model);
    rf_image_model *model = NULL;
    rf_assert_ok(rf_image_model_load(&model, d.backend, path, RF_DTYPE_F32, &d.err), d.err);
    rf_image_options o = rf_image_options_default();
    o.batch = c->batch;
    o.num_steps = c->num_steps;
    o.cfg_scale = c->cfg_scale;
    o.sampler = c->sampler;
    o.rng = c->from_seed ? RF_RNG_TORCH_CPU : RF_RNG_COUNTER;
    rf_image_session *s = NULL;
    rf_assert_ok(rf_image_session_create(&s, model, &o, &d.err), d.err);
    snprintf(name, sizeof name, "%s.initial", c->run);
    float *initial = dit_fixture_f32(f, name, NULL);
    uint64_t seeds[2] = {33, 34};
    rf_assert_ok(rf_image_session_denoise(s, c->classes, seeds, c->from_seed ? NULL : initial, NULL, NULL, &d.err),
                 d.err);
    size_t num_latents, num_pixels;
    snprintf(name, sizeof name, "%s.final", c->run);
    float *want = dit_fixture_f32(f, name, &num_latents), *latents = rf_alloc(num_latents * sizeof(float));
    rf_assert_ok(rf_image_session_read_latents(s, latents, &d.err), d.err);
    rf_assert_close(latents, want, num_latents, INFINITY, 1e-4);
    snprintf(name, sizeof name, "%s.image", c->run);
    float *want_image = dit_fixture_f32(f, name, &num_pixels), *image = rf_alloc(num_pixels * sizeof(float));
    rf_assert_ok(rf_image_session_decode(s, image, &d.err), d.err);
    double db = psnr(image, want_image, num_pixels);
    ck_assert_msg(db >= 60.0, "%s: PSNR %.1f dB against the reference, expected 60 or more", c->run, db);
    rf_free(latents);
    rf_free(want);
    rf_free(want_image);
    rf_free(image);
    rf_free(initial);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
    rf_weights_close(f);
    dit_device_close(&d);
}
END_TEST

/* One run of dit-tiny; pictures of the batch in out [batch, 3, 32, 32]. */
static void sample(dit_device *d, rf_dtype dtype, const rf_image_options *o, const int *classes, const uint64_t *seeds,
                   float *out) {
    rf_image_model *model = NULL;
    rf_image_session *s = NULL;
    rf_assert_ok(rf_image_model_load(&model, d->backend, RF_FIXTURE_DIR "/dit-tiny", dtype, &d->err), d->err);
    rf_assert_ok(rf_image_session_create(&s, model, o, &d->err), d->err);
    rf_assert_ok(rf_image_session_denoise(s, classes, seeds, NULL, NULL, NULL, &d->err), d->err);
    rf_assert_ok(rf_image_session_decode(s, out, &d->err), d->err);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
}

enum { PICTURE = 3 * 32 * 32 };

START_TEST(the_same_seed_gives_the_same_bits) {
    dit_device d = dit_device_open_named("cpu");
    rf_image_options o = rf_image_options_default();
    o.num_steps = 6;
    o.batch = 3;
    o.vae_batch = 2; /* the last group overlaps */
    int classes[3] = {0, 4, 2};
    uint64_t seeds[3] = {7, 8, 9};
    static float a[3 * PICTURE], b[3 * PICTURE];
    sample(&d, RF_DTYPE_F32, &o, classes, seeds, a);
    sample(&d, RF_DTYPE_F32, &o, classes, seeds, b);
    ck_assert(memcmp(a, b, sizeof a) == 0);
    ck_assert(memcmp(a, a + PICTURE, sizeof(float) * PICTURE) != 0);
    dit_device_close(&d);
}
END_TEST

/* With the counter generator a picture depends on its own seed and class, not on its neighbours. */
START_TEST(an_image_of_a_batch_is_the_image_alone) {
    dit_device d = dit_device_open_named("cpu");
    rf_image_options o = rf_image_options_default();
    o.num_steps = 6;
    o.batch = 2;
    int classes[2] = {0, 4};
    uint64_t seeds[2] = {7, 8};
    static float both[2 * PICTURE], alone[PICTURE];
    sample(&d, RF_DTYPE_F32, &o, classes, seeds, both);
    o.batch = 1;
    sample(&d, RF_DTYPE_F32, &o, classes + 1, seeds + 1, alone);
    rf_assert_close(both + PICTURE, alone, PICTURE, 1e-3, 1e-4);
    dit_device_close(&d);
}
END_TEST

START_TEST(guidance_and_eta_change_the_picture) {
    dit_device d = dit_device_open_named("cpu");
    rf_image_options o = rf_image_options_default();
    o.num_steps = 6;
    int class_id = 1;
    uint64_t seed = 5;
    static float a[PICTURE], b[PICTURE];
    sample(&d, RF_DTYPE_F32, &o, &class_id, &seed, a);
    o.cfg_scale = 2.0;
    sample(&d, RF_DTYPE_F32, &o, &class_id, &seed, b);
    ck_assert(memcmp(a, b, sizeof a) != 0);
    o.cfg_scale = 4.0;
    o.eta = 1.0;
    sample(&d, RF_DTYPE_F32, &o, &class_id, &seed, b);
    ck_assert(memcmp(a, b, sizeof a) != 0);
    dit_device_close(&d);
}
END_TEST

static bool stop_after_two(void *user, int step, int num_steps) {
    *(int *)user = step;
    return step < 1;
}

START_TEST(a_callback_can_stop_a_run) {
    dit_device d = dit_device_open_named("cpu");
    rf_image_model *model = NULL;
    rf_image_session *s = NULL;
    rf_image_options o = rf_image_options_default();
    o.num_steps = 6;
    rf_assert_ok(rf_image_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &d.err), d.err);
    rf_assert_ok(rf_image_session_create(&s, model, &o, &d.err), d.err);
    int class_id = 1, last = -1;
    uint64_t seed = 5;
    rf_assert_fails(rf_image_session_denoise(s, &class_id, &seed, NULL, stop_after_two, &last, &d.err), d.err,
                    RF_ERR_CANCELLED, "step 2 of 6");
    ck_assert_int_eq(last, 1);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
    dit_device_close(&d);
}
END_TEST

START_TEST(classes_are_found_by_name_number_and_synonym) {
    dit_device d = dit_device_open_named("cpu");
    rf_image_model *model = NULL;
    rf_assert_ok(rf_image_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &d.err), d.err);
    int id = -1;
    rf_assert_ok(rf_image_model_find_class(model, "2", &id, &d.err), d.err);
    ck_assert_int_eq(id, 2);
    rf_assert_ok(rf_image_model_find_class(model, "BALL", &id, &d.err), d.err);
    ck_assert_ptr_nonnull(strstr(rf_image_model_class_name(model, id), "ball"));
    rf_assert_fails(rf_image_model_find_class(model, "5", &id, &d.err), d.err, RF_ERR_ARGUMENT, "0..4");
    rf_assert_fails(rf_image_model_find_class(model, "spere", &id, &d.err), d.err, RF_ERR_ARGUMENT, "sphere");
    rf_assert_fails(rf_image_model_find_class(model, "", &id, &d.err), d.err, RF_ERR_ARGUMENT, "no class");
    rf_image_model_close(model);
    dit_device_close(&d);
}
END_TEST

START_TEST(options_out_of_range_are_refused_by_name) {
    rf_error err = {0};
    rf_image_options o = rf_image_options_default();
    rf_assert_ok(rf_image_options_check(&o, &err), err);
    o.num_steps = 0;
    rf_assert_fails(rf_image_options_check(&o, &err), err, RF_ERR_ARGUMENT, "0 steps");
    o.num_steps = 100001;
    rf_assert_fails(rf_image_options_check(&o, &err), err, RF_ERR_ARGUMENT, "100001 steps");
    o = rf_image_options_default();
    o.batch = 0;
    rf_assert_fails(rf_image_options_check(&o, &err), err, RF_ERR_ARGUMENT, "batch");
    o = rf_image_options_default();
    o.cfg_scale = NAN;
    rf_assert_fails(rf_image_options_check(&o, &err), err, RF_ERR_ARGUMENT, "guidance");
    o = rf_image_options_default();
    o.eta = 1.5;
    rf_assert_fails(rf_image_options_check(&o, &err), err, RF_ERR_ARGUMENT, "eta");
}
END_TEST

/* Every host allocation of loading and planning fails once: a message, no crash, nothing left. */
START_TEST(failing_any_allocation_is_reported_and_leaks_nothing) {
    rf_image_options o = rf_image_options_default();
    o.num_steps = 2;
    uint64_t live = rf_memory_get_counts().num_live;
    bool done = false;
    for (uint64_t nth = 1; !done; nth += 1 + nth / 16) { /* every one at first, then a sample of the many alike */
        dit_device d = dit_device_open_named("cpu");
        rf_image_model *model = NULL;
        rf_image_session *s = NULL;
        rf_memory_fail_nth(nth);
        rf_status st = rf_image_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, &d.err);
        if (st == RF_OK) st = rf_image_session_create(&s, model, &o, &d.err);
        rf_memory_fail_nth(0);
        done = st == RF_OK;
        ck_assert_msg(done || d.err.message[0] != 0, "allocation %llu failed without a message",
                      (unsigned long long)nth);
        rf_image_session_destroy(s);
        rf_image_model_close(model);
        dit_device_close(&d);
        ck_assert_msg(rf_memory_get_counts().num_live == live, "allocation %llu: %llu blocks leaked",
                      (unsigned long long)nth, (unsigned long long)(rf_memory_get_counts().num_live - live));
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dit/pipeline");
    TCase *tc = tcase_create("pipeline");
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, a_run_matches_the_reference_pipeline, 0, (int)(sizeof run_cases / sizeof *run_cases));
    tcase_add_test(tc, the_same_seed_gives_the_same_bits);
    tcase_add_test(tc, an_image_of_a_batch_is_the_image_alone);
    tcase_add_test(tc, guidance_and_eta_change_the_picture);
    tcase_add_test(tc, a_callback_can_stop_a_run);
    tcase_add_test(tc, classes_are_found_by_name_number_and_synonym);
    tcase_add_test(tc, options_out_of_range_are_refused_by_name);
    tcase_add_test(tc, failing_any_allocation_is_reported_and_leaks_nothing);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
