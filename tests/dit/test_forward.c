/* tests/dit/test_forward.c - the executor against diffusers' DiT and the original DiT, block by block.
 *
 * Bounds: f32 sums in another order move these outputs by about 3e-7 relative L2 (metadata f32_against_f64 of the fixtures);
 * 1e-5 leaves room for other libraries' sums and fails if shift and scale are swapped (0.77), the frequency shift is wrong (0.23)
 * or the MLP norm reads another eps (7e-3 at eps 0.01). */
#include "core/backend.h"
#include "core/rng.h"
#include "tests/dit/dit_test_util.h"

#define BOUND 1e-5

/* Runs one sample and gives the output in the latent's layout [out_channels, h, w]. */
typedef struct {
    dit_device *device;
    float *taps[8]; /* wanted hidden states after each block, [tokens, width] of this sample; NULL = not checked */
    double bound;
    int num_seen;
} tap_check;

static void check_tap(void *user, int block, int part, const void *x, int64_t rows, int64_t width) {
    tap_check *t = user;
    if (part != 1 || block >= 8 || t->taps[block] == NULL) return;
    size_t num = (size_t)(rows * width);
    float *host = rf_alloc(num * sizeof(float));
    dit_download(t->device, t->device->stream, host, x, num);
    rf_assert_close(host, t->taps[block], num, INFINITY, t->bound);
    rf_free(host);
    t->num_seen++;
}

static void run_one(dit_device *d, const rf_dit_model *model, int side, const float *latent, float timestep,
                    int32_t label, float *out, tap_check *taps) {
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    const rf_dit_desc *desc = &model->desc;
    o.height = o.width = side;
    rf_assert_ok(rf_dit_session_create(&s, model, d->stream, &o, &d->err), d->err);
    size_t num_in = (size_t)(desc->in_channels * side * side), num_out = (size_t)(desc->out_channels * side * side);
    float *device_latent = dit_upload(d, latent, num_in);
    rf_assert_ok(rf_dit_session_begin(s, &timestep, 1, &label, &d->err), d->err);
    if (taps != NULL) rf_dit_session_set_observer(s, check_tap, taps);
    rf_assert_ok(rf_dit_session_forward(s, device_latent, NULL, 0, &d->err), d->err);
    float *rows = rf_alloc(num_out * sizeof(float));
    dit_download(d, d->stream, rows, rf_dit_session_output(s), num_out);
    int p = desc->ph, grid = side / p, cols = desc->out_channels * p * p;
    for (int c = 0; c < desc->out_channels; c++)
        for (int y = 0; y < side; y++)
            for (int x = 0; x < side; x++)
                out[(c * side + y) * side + x] = rows[((y / p) * grid + x / p) * cols + (c * p + y % p) * p + x % p];
    rf_free(rows);
    rf_backend_free(d->backend, device_latent);
    rf_dit_session_destroy(s);
}

/* Every sample of a forward fixture, one by one: they have timesteps of their own. */
static void check_forward(const char *model_dir, const char *fixture, const char *labels_name, int side, int num_blocks,
                          double bound) {
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open(fixture);
    size_t num_labels;
    float *latents = dit_fixture_f32(f, "latents", NULL), *timesteps = dit_fixture_f32(f, "timesteps", NULL);
    float *want = dit_fixture_f32(f, "output", NULL);
    rf_tensor labels;
    rf_assert_ok(rf_weights_get(f, labels_name, &labels, &d.err), d.err);
    num_labels = (size_t)rf_tensor_num_elems(&labels);
    float *blocks[8] = {0};
    for (int b = 0; b < num_blocks; b++) {
        char name[32];
        snprintf(name, sizeof name, "block_%d", b);
        blocks[b] = dit_fixture_f32(f, name, NULL);
    }
    char path[512];
    snprintf(path, sizeof path, "%s/%s/transformer", RF_FIXTURE_DIR, model_dir);
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, path, RF_DTYPE_F32, &d.err), d.err);
    int tokens = (side / model->desc.ph) * (side / model->desc.pw);
    size_t in = (size_t)(model->desc.in_channels * side * side), out = (size_t)(model->desc.out_channels * side * side);
    float *got = rf_alloc(out * sizeof(float));
    for (size_t n = 0; n < num_labels; n++) {
        tap_check taps = {.device = &d, .bound = bound};
        for (int b = 0; b < num_blocks; b++) taps.taps[b] = blocks[b] + n * (size_t)tokens * (size_t)model->desc.width;
        run_one(&d, model, side, latents + n * in, timesteps[n], (int32_t)((int64_t *)labels.data)[n], got, &taps);
        rf_assert_close(got, want + n * out, out, INFINITY, bound);
        ck_assert_int_eq(taps.num_seen, num_blocks);
    }
    rf_free(got);
    rf_dit_model_close(model);
    for (int b = 0; b < num_blocks; b++) rf_free(blocks[b]);
    rf_free(latents);
    rf_free(timesteps);
    rf_free(want);
    rf_weights_close(f);
    dit_device_close(&d);
}

START_TEST(forward_matches_diffusers_block_by_block) {
    check_forward("dit-tiny", "dit_forward.safetensors", "class_labels", 8, 3, BOUND);
}
END_TEST

START_TEST(forward_matches_diffusers_at_another_size) {
    check_forward("dit-tiny", "dit_forward_12x12.safetensors", "class_labels", 12, 0, BOUND);
}
END_TEST

START_TEST(forward_matches_the_original_layout) {
    check_forward("dit-tiny-original", "dit_original_forward.safetensors", "labels", 8, 2, BOUND);
}
END_TEST

/* The same weights stored in 16 bits: rounding of the weights alone, 2^-11 (f16) and 2^-8 (bf16) relative each. */
START_TEST(weights_in_f16_and_bf16_load) {
    check_forward("dit-tiny-f16", "dit_forward.safetensors", "class_labels", 8, 0, 1e-2);
    check_forward("dit-tiny-bf16", "dit_forward.safetensors", "class_labels", 8, 0, 1e-2);
}
END_TEST

/* The norm before the MLP, and only that one, follows the config's norm_eps. */
START_TEST(norm_eps_of_the_config_reaches_the_mlp_norm) {
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open("dit_forward.safetensors");
    float *latents = dit_fixture_f32(f, "latents", NULL), *timesteps = dit_fixture_f32(f, "timesteps", NULL);
    float *want = dit_fixture_f32(f, "output_norm_eps_0.01", NULL), got[8 * 8 * 8];
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny/transformer", RF_DTYPE_F32, &d.err),
                 d.err);
    model->desc.groups[0].parts[1].norm_eps = 0.01;
    run_one(&d, model, 8, latents, timesteps[0], 1, got, NULL);
    rf_assert_close(got, want, 8 * 8 * 8, INFINITY, BOUND);
    rf_dit_model_close(model);
    rf_free(latents);
    rf_free(timesteps);
    rf_free(want);
    rf_weights_close(f);
    dit_device_close(&d);
}
END_TEST

/* A step's modulation rows come from a table of all steps, or of a chunk of them: the same numbers either way. */
START_TEST(chunks_of_the_modulation_table_change_nothing) {
    dit_device d = dit_device_open_named("cpu");
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny/transformer", RF_DTYPE_F32, &d.err),
                 d.err);
    enum { STEPS = 7, BATCH = 2 };
    float timesteps[STEPS] = {900, 700, 500, 300, 200, 100, 3};
    int32_t labels[2 * BATCH] = {0, 3, 5, 5};
    float latent[BATCH * 4 * 64];
    rf_rng_normal_at(1, 0, 0, latent, BATCH * 4 * 64);
    float *device_latent = dit_upload(&d, latent, BATCH * 4 * 64);
    size_t num = 2 * BATCH * 16 * 32;
    float *whole = rf_alloc(STEPS * num * sizeof(float)), *chunked = rf_alloc(STEPS * num * sizeof(float));
    for (int pass = 0; pass < 2; pass++) {
        rf_dit_session *s = NULL;
        rf_dit_session_options o = rf_dit_session_options_default();
        o.batch = BATCH;
        o.branches = 2;
        o.height = o.width = 8;
        o.max_steps = STEPS;
        if (pass == 1) o.modulation_budget_bytes = 3 * 3 * (3 * 6 + 2) * 48 * sizeof(float); /* three steps */
        rf_assert_ok(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err);
        ck_assert_int_eq(rf_dit_session_steps_per_chunk(s), pass == 0 ? STEPS : 3);
        rf_assert_ok(rf_dit_session_begin(s, timesteps, STEPS, labels, &d.err), d.err);
        for (int i = 0; i < STEPS; i++) {
            rf_assert_ok(rf_dit_session_forward(s, device_latent, NULL, 0, &d.err), d.err);
            dit_download(&d, d.stream, (pass ? chunked : whole) + (size_t)i * num, rf_dit_session_output(s), num);
            rf_assert_ok(rf_dit_session_queue_advance(s, &d.err), d.err);
            rf_assert_ok(rf_dit_session_next_step(s, &d.err), d.err);
        }
        rf_dit_session_destroy(s);
    }
    rf_assert_close(chunked, whole, STEPS * num, INFINITY, 1e-6); /* GEMMs of another height may sum in another order */
    ck_assert(memcmp(whole, whole + num, num * sizeof(float)) != 0);
    rf_free(whole);
    rf_free(chunked);
    rf_backend_free(d.backend, device_latent);
    rf_dit_model_close(model);
    dit_device_close(&d);
}
END_TEST

/* Promise of the step loop: forward and advance take no memory and never wait. */
START_TEST(steps_allocate_nothing_and_do_not_wait) {
    dit_device d = dit_device_open_named("cpu");
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny/transformer", RF_DTYPE_F32, &d.err),
                 d.err);
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    o.height = o.width = 8;
    o.max_steps = 5;
    o.modulation_budget_bytes = 1; /* a chunk per step: the border is inside the loop */
    rf_assert_ok(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err);
    float timesteps[5] = {800, 600, 400, 200, 0}, latent[4 * 64] = {1.0f};
    int32_t label = 2;
    float *device_latent = dit_upload(&d, latent, 4 * 64);
    rf_assert_ok(rf_dit_session_begin(s, timesteps, 5, &label, &d.err), d.err);
    rf_stream_set_phase(d.stream, RF_PHASE_RUN);
    rf_memory_counts host = rf_memory_get_counts();
    rf_backend_counts device = rf_backend_get_counts(d.backend);
    for (int i = 0; i < 5; i++) {
        rf_assert_ok(rf_dit_session_forward(s, device_latent, NULL, 0, &d.err), d.err);
        rf_assert_ok(rf_dit_session_queue_advance(s, &d.err), d.err);
        rf_assert_ok(rf_dit_session_next_step(s, &d.err), d.err);
    }
    ck_assert_uint_eq(rf_memory_get_counts().num_allocs, host.num_allocs);
    ck_assert_uint_eq(rf_backend_get_counts(d.backend).num_device_allocs, device.num_device_allocs);
    ck_assert_uint_eq(rf_backend_get_counts(d.backend).num_syncs, device.num_syncs);
    ck_assert_uint_gt(rf_backend_get_counts(d.backend).num_launches, device.num_launches);
    rf_dit_session_destroy(s);
    rf_backend_free(d.backend, device_latent);
    rf_dit_model_close(model);
    dit_device_close(&d);
}
END_TEST

START_TEST(bad_sessions_and_runs_are_refused) {
    dit_device d = dit_device_open_named("cpu");
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny/transformer", RF_DTYPE_F32, &d.err),
                 d.err);
    rf_dit_session *s = NULL;
    rf_dit_session_options good = rf_dit_session_options_default(), o;
    good.height = good.width = 8;
    o = good;
    o.height = 7;
    rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_ARGUMENT,
                    "multiples of the patch");
    o = good;
    o.batch = 0;
    rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_ARGUMENT, "batch");
    o = good;
    o.max_steps = 100001;
    rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_ARGUMENT, "100001");
    o = good;
    o.residual_dtype = RF_DTYPE_F16;
    rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_DTYPE, "f16");
    rf_assert_ok(rf_dit_session_create(&s, model, d.stream, &good, &d.err), d.err);
    float t[2] = {1, 2};
    int32_t label = 6;
    rf_assert_fails(rf_dit_session_begin(s, t, 1, &label, &d.err), d.err, RF_ERR_ARGUMENT, "label 6");
    label = 0;
    rf_assert_fails(rf_dit_session_begin(s, t, 2, &label, &d.err), d.err, RF_ERR_ARGUMENT, "planned for 1");
    rf_dit_session_destroy(s);
    rf_dit_model_close(model);
    dit_device_close(&d);
}
END_TEST

/* A description that no kernel serves is refused when a session is planned, never run as something near. */
START_TEST(unsupported_descriptions_are_refused_when_planned) {
    dit_device d = dit_device_open_named("cpu");
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_load(&model, d.backend, RF_FIXTURE_DIR "/dit-tiny/transformer", RF_DTYPE_F32, &d.err),
                 d.err);
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    o.height = o.width = 8;
    rf_dit_desc good = model->desc;
    struct {
        int what;
        const char *message;
    } cases[] = {{0, "q/k norms"}, {1, "rotary"},        {2, "cross-attention"},
                 {3, "frames"},    {4, "text segments"}, {5, "block's input"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        model->desc = good;
        rf_part_desc *part = &model->desc.groups[0].parts[0];
        if (cases[i].what == 0) part->qk_norm = RF_QK_NORM_RMS_HEAD;
        if (cases[i].what == 1) {
            part->rope = 0;
            model->desc.num_ropes = 1;
            model->desc.ropes[0] = (rf_rope_desc){.kind = RF_ROPE_TIME, .num_pairs = 4, .theta = 10000};
        }
        if (cases[i].what == 2) part->kind = RF_PART_CROSS;
        if (cases[i].what == 3) part->scope = RF_SCOPE_PIXEL;
        if (cases[i].what == 4) model->desc.num_segments = 2;
        if (cases[i].what == 5) part->from_block_input = true;
        rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_UNSUPPORTED,
                        cases[i].message);
    }
    model->desc = good;
    rf_dit_model_close(model);
    dit_device_close(&d);
}
END_TEST

START_TEST(synthetic_models_have_the_published_size_and_run) {
    dit_device d = dit_device_open_named("cpu");
    rf_dit_desc desc;
    rf_assert_ok(rf_dit_config_builtin(&desc, "dit-xl-2-256", &d.err), d.err);
    ck_assert_int_eq(desc.width, 1152);
    ck_assert_int_eq(rf_dit_desc_num_blocks(&desc), 28);
    ck_assert_int_eq(desc.sample_size, 32);
    rf_assert_ok(rf_dit_config_builtin(&desc, "dit-s-8-256", &d.err), d.err);
    desc.groups[0].count = 2;
    rf_dit_model *model = NULL;
    rf_assert_ok(rf_dit_model_synthetic(&model, d.backend, &desc, RF_DTYPE_F32, 3, &d.err), d.err);
    float latent[4 * 32 * 32], out[8 * 32 * 32];
    rf_rng_normal_at(9, 0, 0, latent, 4 * 32 * 32);
    run_one(&d, model, 32, latent, 500, 7, out, NULL);
    double sum = 0;
    for (int i = 0; i < 8 * 32 * 32; i++) sum += (double)out[i] * out[i];
    ck_assert_double_gt(sum / (8 * 32 * 32), 0.05);
    ck_assert_double_lt(sum / (8 * 32 * 32), 20.0);
    rf_dit_model_close(model);
    rf_assert_fails(rf_dit_config_builtin(&desc, "dit-xxl", &d.err), d.err, RF_ERR_ARGUMENT, "dit-xl-2-256");
    dit_device_close(&d);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dit/forward");
    TCase *tc = tcase_create("forward");
    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, forward_matches_diffusers_block_by_block);
    tcase_add_test(tc, forward_matches_diffusers_at_another_size);
    tcase_add_test(tc, forward_matches_the_original_layout);
    tcase_add_test(tc, weights_in_f16_and_bf16_load);
    tcase_add_test(tc, norm_eps_of_the_config_reaches_the_mlp_norm);
    tcase_add_test(tc, chunks_of_the_modulation_table_change_nothing);
    tcase_add_test(tc, steps_allocate_nothing_and_do_not_wait);
    tcase_add_test(tc, bad_sessions_and_runs_are_refused);
    tcase_add_test(tc, unsupported_descriptions_are_refused_when_planned);
    tcase_add_test(tc, synthetic_models_have_the_published_size_and_run);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
