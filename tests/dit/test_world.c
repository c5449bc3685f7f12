/* tests/dit/test_world.c - world models against the PyTorch definition (tests/reference/oasis.py), part by part and frame by frame; exact
 * reuse of the context against computing everything again; policies inside a frame's steps.
 *
 * Bounds: f32 sums in another order move the outputs by about 3e-7 relative L2 (f32_against_f64 of the fixtures). 1e-5 fails for every wrong
 * rule that the fixtures list but one: a norm epsilon of 1e-5 moves them by 4.7e-6, so the description is checked for it. */
#include "core/file.h"
#include "core/rng.h"
#include "dit/vit_vae.h"
#include "dit/world.h"
#include "tests/dit/dit_test_util.h"

#define BOUND   1e-5
#define TINY    RF_FIXTURE_DIR "/oasis-tiny"
#define RELEASE RF_FIXTURE_DIR "/oasis-tiny-release"

enum { C = 6, H = 6, W = 8, LATENT = C * H * W, TOKENS = 12, WIDTH = 48, ACTIONS = 5, PICTURE = 3 * 24 * 32 };

/* --- the transformer ------------------------------------------------------------------------------------------------- */

typedef struct {
    dit_device *device;
    float *want[12]; /* [tokens of the pass, width] after each part of each block */
    int num_seen;
} part_check;

static void check_part(void *user, int block, int part, const void *x, int64_t rows, int64_t width) {
    part_check *t = user;
    size_t num = (size_t)(rows * width);
    float *host = rf_alloc(num * sizeof(float));
    dit_download(t->device, t->device->stream, host, x, num);
    rf_assert_close(host, t->want[4 * block + part], num, INFINITY, BOUND);
    rf_free(host);
    t->num_seen++;
}

/* Rows (sample, frame, token) of (channel, ph, pw) to [samples, frames, C, H, W]. */
static void unpatchify(const float *rows, int frames, float *out) {
    for (int f = 0; f < frames; f++)
        for (int c = 0; c < C; c++)
            for (int y = 0; y < H; y++)
                for (int x = 0; x < W; x++)
                    out[((f * C + c) * H + y) * W + x] =
                        rows[(f * TOKENS + y / 2 * (W / 2) + x / 2) * C * 4 + c * 4 + y % 2 * 2 + x % 2];
}

static rf_dit_model *load_transformer(dit_device *d, const char *dir, const char *file) {
    rf_json *config = NULL;
    rf_dit_desc desc;
    rf_dit_model *model = NULL;
    char *path = rf_path_join(dir, "config.json"), *weights = rf_path_join(dir, file);
    rf_assert_ok(rf_json_open(&config, path, &d->err), d->err);
    rf_assert_ok(rf_dit_config_read_oasis(&desc, config, rf_json_get(rf_json_root(config), "dit"), &d->err), d->err);
    rf_assert_ok(rf_dit_model_load_file(&model, d->backend, &desc, weights, RF_DTYPE_F32, &d->err), d->err);
    rf_json_close(config);
    rf_free(path);
    rf_free(weights);
    return model;
}

/* All frames of `samples` rollouts in one pass, nothing kept in front of them. */
static void forward_frames(dit_device *d, const rf_dit_model *model, int samples, int frames, const float *latents,
                           const float *t, const float *actions, part_check *parts, float *out) {
    rf_dit_context *context = NULL;
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    rf_assert_ok(rf_dit_context_create(&context, model, d->stream, samples, TOKENS, 6, &d->err), d->err);
    o.batch = samples;
    o.frames = 6;
    o.height = H;
    o.width = W;
    o.context = context;
    rf_assert_ok(rf_dit_session_create(&s, model, d->stream, &o, &d->err), d->err);
    int slots[] = {3, 0, 5, 1, 2, 4};
    rf_assert_ok(rf_dit_context_set_window(context, slots, 0, frames, &d->err), d->err);
    rf_assert_ok(rf_dit_session_begin_frames(s, frames, t, samples * frames, 1, actions, &d->err), d->err);
    float *x = dit_upload(d, latents, (size_t)(samples * frames * LATENT));
    if (parts != NULL) rf_dit_session_set_observer(s, check_part, parts);
    rf_assert_ok(rf_dit_session_forward(s, x, NULL, 0, &d->err), d->err);
    float *rows = rf_alloc((size_t)(samples * frames * LATENT) * sizeof(float));
    dit_download(d, d->stream, rows, rf_dit_session_output(s), (size_t)(samples * frames * LATENT));
    unpatchify(rows, samples * frames, out);
    rf_free(rows);
    rf_backend_free(d->backend, x);
    rf_dit_session_destroy(s);
    rf_dit_context_destroy(context);
}

static float *fixture_ints(const rf_weights *f, const char *name, size_t num) {
    rf_tensor t;
    rf_error err = {0};
    rf_assert_ok(rf_weights_get(f, name, &t, &err), err);
    ck_assert_int_eq(rf_tensor_num_elems(&t), (int64_t)num);
    float *out = rf_alloc(num * sizeof(float));
    for (size_t i = 0; i < num; i++) out[i] = (float)((const int64_t *)t.data)[i];
    return out;
}

START_TEST(forward_matches_the_reference_part_by_part) {
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open("oasis_forward.safetensors");
    rf_dit_model *model = load_transformer(&d, TINY, "dit.safetensors");
    float *latents = dit_fixture_f32(f, "latents", NULL), *actions = dit_fixture_f32(f, "actions", NULL);
    float *want = dit_fixture_f32(f, "output", NULL), *t = fixture_ints(f, "t", 8), *got = rf_alloc(8 * LATENT * 4);
    part_check parts = {.device = &d};
    static const char *const names[] = {"s_attn", "s_mlp", "t_attn", "t_mlp"};
    for (int i = 0; i < 12; i++) {
        char name[32];
        snprintf(name, sizeof name, "block_%d.%s", i / 4, names[i % 4]);
        parts.want[i] = dit_fixture_f32(f, name, NULL);
    }
    forward_frames(&d, model, 1, 4, latents, t, actions, &parts, got);
    ck_assert_int_eq(parts.num_seen, 12);
    rf_assert_close(got, want, 4 * LATENT, INFINITY, BOUND);
    forward_frames(&d, model, 2, 4, latents, t, actions, NULL, got);
    rf_assert_close(got, want, 8 * LATENT, INFINITY, BOUND);
    for (int g = 0; g < model->desc.groups[0].num_parts; g++)
        ck_assert_double_eq(model->desc.groups[0].parts[g].norm_eps, 1e-6);
    for (int i = 0; i < 12; i++) rf_free(parts.want[i]);
    rf_free(latents);
    rf_free(actions);
    rf_free(want);
    rf_free(t);

    latents = dit_fixture_f32(f, "single.latents", NULL), actions = dit_fixture_f32(f, "single.actions", NULL);
    want = dit_fixture_f32(f, "single.output", NULL), t = fixture_ints(f, "single.t", 2);
    forward_frames(&d, model, 2, 1, latents, t, actions, NULL, got);
    rf_assert_close(got, want, 2 * LATENT, INFINITY, BOUND);
    rf_free(latents);
    rf_free(actions);
    rf_free(want);
    rf_free(t);
    rf_free(got);
    rf_dit_model_close(model);
    rf_weights_close(f);
    dit_device_close(&d);
}
END_TEST

/* Shards, f16 and stored rotary frequencies: the same model. */
START_TEST(both_folders_are_one_model) {
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open("oasis_forward.safetensors");
    float *latents = dit_fixture_f32(f, "latents", NULL), *actions = dit_fixture_f32(f, "actions", NULL);
    float *t = fixture_ints(f, "t", 8), a[4 * LATENT], b[4 * LATENT];
    rf_dit_model *one = load_transformer(&d, TINY, "dit.safetensors");
    rf_dit_model *two = load_transformer(&d, RELEASE, "dit.safetensors.index.json");
    forward_frames(&d, one, 1, 4, latents, t, actions, NULL, a);
    forward_frames(&d, two, 1, 4, latents, t, actions, NULL, b);
    ck_assert_mem_eq(a, b, sizeof a);
    rf_world_model *model = NULL;
    rf_assert_ok(rf_world_model_load(&model, d.backend, RELEASE, RF_DTYPE_F32, &d.err), d.err);
    ck_assert_str_eq(rf_world_model_action_name(model, 3), "left");
    ck_assert(rf_world_is_world(RELEASE) && rf_world_is_world(TINY) && !rf_world_is_world(RF_FIXTURE_DIR "/dit-tiny"));
    rf_world_model_close(model);
    rf_dit_model_close(one);
    rf_dit_model_close(two);
    rf_free(latents);
    rf_free(actions);
    rf_free(t);
    rf_weights_close(f);
    dit_device_close(&d);
}
END_TEST

/* --- the VAE --------------------------------------------------------------------------------------------------------- */

static rf_vit_vae_config tiny_vae(dit_device *d) {
    rf_json *config = NULL;
    rf_vit_vae_config c = rf_vit_vae_config_oasis();
    rf_assert_ok(rf_json_open(&config, TINY "/config.json", &d->err), d->err);
    rf_assert_ok(rf_vit_vae_config_read(&c, config, rf_json_get(rf_json_root(config), "vae"), &d->err), d->err);
    rf_json_close(config);
    c.scaling_factor = 0.5;
    return c;
}

START_TEST(vae_matches_the_reference) {
    dit_device d = dit_device_open_named("cpu");
    rf_weights *f = dit_fixture_open("oasis_vae.safetensors");
    rf_vit_vae *vae = NULL;
    rf_vit_vae_session *s = NULL;
    rf_vit_vae_config config = tiny_vae(&d);
    rf_assert_ok(rf_vit_vae_load(&vae, d.backend, &config, TINY "/vae.safetensors", RF_DTYPE_F32, &d.err), d.err);
    rf_assert_ok(rf_vit_vae_session_create(&s, vae, d.stream, 2, &d.err), d.err);
    float *image = dit_fixture_f32(f, "image", NULL), *mean = dit_fixture_f32(f, "mean", NULL);
    float *latent = dit_fixture_f32(f, "latent", NULL), *decoded = dit_fixture_f32(f, "decoded", NULL);
    float planar[2 * LATENT], got[2 * PICTURE];
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < H * W; i++)
            for (int c = 0; c < C; c++) planar[(b * C + c) * H * W + i] = 0.5f * latent[(b * H * W + i) * C + c];
    float *frames = dit_upload(&d, image, 2 * PICTURE), *latents = dit_upload(&d, planar, 2 * LATENT);
    rf_assert_ok(rf_vit_vae_session_decode(s, latents, &d.err), d.err);
    dit_download(&d, d.stream, got, rf_vit_vae_session_output(s), 2 * PICTURE);
    rf_assert_close(got, decoded, 2 * PICTURE, INFINITY, BOUND);
    rf_assert_ok(rf_vit_vae_session_encode(s, frames, latents, &d.err), d.err);
    dit_download(&d, d.stream, got, latents, 2 * LATENT);
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < H * W; i++)
            for (int c = 0; c < C; c++) planar[(b * H * W + i) * C + c] = 2.0f * got[(b * C + c) * H * W + i];
    rf_assert_close(planar, mean, 2 * LATENT, INFINITY, BOUND);
    rf_backend_free(d.backend, frames);
    rf_backend_free(d.backend, latents);
    rf_free(image);
    rf_free(mean);
    rf_free(latent);
    rf_free(decoded);
    rf_vit_vae_session_destroy(s);
    rf_vit_vae_close(vae);
    rf_weights_close(f);
    dit_device_close(&d);
}
END_TEST

/* --- rollouts -------------------------------------------------------------------------------------------------------- */

typedef struct {
    dit_device d;
    rf_world_model *model;
} world;

static world open_world(const char *device, const char *dir) {
    world w = {.d = dit_device_open_named(device)};
    rf_assert_ok(rf_world_model_load(&w.model, w.d.backend, dir, RF_DTYPE_F32, &w.d.err), w.d.err);
    return w;
}

static void close_world(world *w) {
    rf_world_model_close(w->model);
    dit_device_close(&w->d);
}

static double psnr(const float *got, const float *want, size_t num) {
    double sum = 0, low = want[0], high = want[0];
    for (size_t i = 0; i < num; i++) {
        sum += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        low = want[i] < low ? want[i] : low;
        high = want[i] > high ? want[i] : high;
    }
    return 10 * log10((high - low) * (high - low) / (sum / (double)num));
}

/* The fixture's walks from the prompt's pictures: latents of every frame and the last picture, window full or not, exact reuse or none. */
START_TEST(rollouts_match_the_reference) {
    static const struct {
        const char *walk;
        int steps, prompt, frames;
    } runs[] = {{"long", 4, 1, 8}, {"long", 10, 1, 8}, {"short", 4, 2, 6}, {"short", 10, 2, 6}};
    world w = open_world("cpu", TINY);
    rf_weights *f = dit_fixture_open("oasis_rollout.safetensors");
    int prompt = runs[_i].prompt, frames = runs[_i].frames;
    char name[64];
#define LOAD(var, format, ...)                                                                                         \
    snprintf(name, sizeof name, format, __VA_ARGS__);                                                                  \
    float *var = dit_fixture_f32(f, name, NULL)
    LOAD(pictures, "%s.frames", runs[_i].walk);
    LOAD(actions, "%s.actions", runs[_i].walk);
    LOAD(noise, "%s.noise", runs[_i].walk);
    LOAD(latents, "%s_%d.latents", runs[_i].walk, runs[_i].steps);
    LOAD(last, "%s_%d.last_frame", runs[_i].walk, runs[_i].steps);
    for (int i = 0; i < prompt * PICTURE; i++) pictures[i] = 2 * pictures[i] - 1;
    for (int cached = 0; cached < 2; cached++) {
        rf_world_options o = rf_world_options_default();
        rf_world_session *s = NULL;
        uint64_t seed = 0;
        float got[LATENT], picture[PICTURE];
        o.num_steps = runs[_i].steps;
        o.context_cache = cached;
        rf_assert_ok(rf_world_session_create(&s, w.model, &o, &w.d.err), w.d.err);
        rf_assert_ok(rf_world_session_start(s, pictures, prompt, actions, &seed, &w.d.err), w.d.err);
        rf_assert_ok(rf_world_session_read_latent(s, got, &w.d.err), w.d.err);
        rf_assert_close(got, latents + (prompt - 1) * LATENT, LATENT, INFINITY, BOUND);
        for (int i = prompt; i < frames; i++) {
            rf_assert_ok(rf_world_session_step(s, actions + i * ACTIONS, noise + i * LATENT, &w.d.err), w.d.err);
            rf_assert_ok(rf_world_session_read_latent(s, got, &w.d.err), w.d.err);
            rf_assert_close(got, latents + i * LATENT, LATENT, INFINITY, BOUND);
            ck_assert(psnr(got, latents + i * LATENT, LATENT) > 60);
        }
        rf_assert_ok(rf_world_session_read_frame(s, picture, &w.d.err), w.d.err);
        for (int i = 0; i < PICTURE; i++) picture[i] = fminf(fmaxf(picture[i] / 2 + 0.5f, 0), 1);
        ck_assert(psnr(picture, last, PICTURE) > 60);
        rf_world_session_info info = rf_world_session_get_info(s);
        ck_assert_int_eq(info.num_frames, frames - prompt);
        ck_assert_int_eq(info.frames_slid, frames > 6 ? frames - 6 : 0);
        rf_world_session_destroy(s);
    }
    rf_free(pictures);
    rf_free(actions);
    rf_free(noise);
    rf_free(latents);
    rf_free(last);
    rf_weights_close(f);
    close_world(&w);
}
END_TEST

START_TEST(levels_of_the_schedule_match_the_reference) {
    static const int steps[] = {1, 3, 4, 10, 26, 50, 60, 100};
    world w = open_world("cpu", TINY);
    rf_weights *f = dit_fixture_open("oasis_rollout.safetensors");
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        char name[32];
        snprintf(name, sizeof name, "steps_%d.t", steps[i]);
        float *want = fixture_ints(f, name, (size_t)steps[i]), *got = rf_alloc((size_t)steps[i] * sizeof(float));
        rf_world_timesteps(got, steps[i]);
        for (int k = 0; k < steps[i]; k++)
            ck_assert_msg(got[k] == want[k], "%d of %d: %g, not %g", k, steps[i], (double)got[k], (double)want[k]);
        rf_free(want);
        rf_free(got);
    }
    rf_weights_close(f);
    close_world(&w);
}
END_TEST

/* `frames` frames of two rollouts with actions of their own; the latents of all of them to out. */
static void roll(const world *w, const rf_world_options *options, int frames, float *out, rf_world_session_info *info) {
    rf_world_session *s = NULL;
    rf_error err = {0};
    rf_world_model_info m = rf_world_model_get_info(w->model);
    size_t latent = (size_t)(m.latent_channels * m.latent_height * m.latent_width);
    size_t batch = (size_t)options->batch, dim = (size_t)m.action_dim;
    float *first = rf_alloc(batch * latent * sizeof(float)), *actions = rf_alloc_zero(batch * dim, sizeof(float));
    uint64_t seeds[4] = {7, 8, 9, 10};
    rf_rng_normal_at(3, 1, 0, first, batch * latent);
    rf_assert_ok(rf_world_session_create(&s, w->model, options, &err), err);
    rf_assert_ok(rf_world_session_start_latents(s, first, 1, NULL, seeds, &err), err);
    for (int i = 0; i < frames; i++) {
        memset(actions, 0, batch * dim * sizeof(float));
        for (size_t b = 0; b < batch; b++) actions[b * dim + (b + (size_t)i / 2) % dim] = 1;
        rf_assert_ok(rf_world_session_step(s, actions, NULL, &err), err);
        rf_assert_ok(rf_world_session_read_latent(s, out + (size_t)i * batch * latent, &err), err);
    }
    if (info != NULL) *info = rf_world_session_get_info(s);
    rf_world_session_destroy(s);
    rf_free(first);
    rf_free(actions);
}

/* Exact reuse against computing the context again in every step: always with rebuild, and until the window slides with the others. */
START_TEST(kept_context_is_exact) {
    enum { FRAMES = 9, BATCH = 2 };
    world w = open_world("cpu", TINY);
    float want[FRAMES * BATCH * LATENT], got[FRAMES * BATCH * LATENT];
    rf_world_options o = rf_world_options_default();
    rf_world_session_info all, reused;
    o.batch = BATCH;
    o.num_steps = 4;
    o.context_cache = false;
    roll(&w, &o, FRAMES, want, &all);
    o.context_cache = true;
    for (int mode = 0; mode < 3; mode++) {
        o.context = (rf_context_mode)mode;
        roll(&w, &o, FRAMES, got, &reused);
        int exact =
            mode == RF_CONTEXT_REBUILD ? FRAMES : 5; /* windows of 6: the seventh frame is the first to push one out */
        rf_assert_close(got, want, (size_t)(exact * BATCH * LATENT), INFINITY, 1e-5);
        if (mode != RF_CONTEXT_REBUILD) {
            rf_difference after = rf_compare_f32(got + exact * BATCH * LATENT, want + exact * BATCH * LATENT,
                                                 (FRAMES - 5) * BATCH * LATENT);
            ck_assert_msg(after.rel_l2 > 1e-4 && after.rel_l2 < 0.5, "%s differs by %g",
                          rf_context_mode_name((rf_context_mode)mode), after.rel_l2);
            /* a frame is committed once and denoised four times */
            ck_assert_int_eq(reused.frame_forwards, BATCH * (FRAMES * 4 + FRAMES));
        }
        ck_assert_int_eq(reused.frames_slid, FRAMES + 1 - 6);
    }
    /* contexts of 1..5 frames and from then on 5, in each of the four steps */
    ck_assert_int_eq(all.frame_forwards, BATCH * 4 * (FRAMES + 1 + 2 + 3 + 4 + 5 * 5));
    close_world(&w);
}
END_TEST

/* A batch is its rollouts one by one; a torch generator draws other noise. */
START_TEST(rollouts_of_a_batch_do_not_meet) {
    enum { FRAMES = 7 };
    world w = open_world("cpu", TINY);
    float two[FRAMES * 2 * LATENT], one[FRAMES * LATENT], other[FRAMES * LATENT];
    rf_world_options o = rf_world_options_default();
    o.num_steps = 3;
    o.batch = 2;
    roll(&w, &o, FRAMES, two, NULL);
    o.batch = 1;
    roll(&w, &o, FRAMES, one, NULL);
    for (int i = 0; i < FRAMES; i++) rf_assert_close(two + 2 * i * LATENT, one + i * LATENT, LATENT, INFINITY, 1e-5);
    o.rng = RF_RNG_TORCH_CPU;
    roll(&w, &o, FRAMES, other, NULL);
    ck_assert(rf_compare_f32(other, one, FRAMES * LATENT).rel_l2 > 0.1);
    close_world(&w);
}
END_TEST

/* Nothing grows, however long a rollout is. */
START_TEST(memory_does_not_grow) {
    world w = open_world("cpu", TINY);
    rf_world_options o = rf_world_options_default();
    rf_world_session *s = NULL;
    float first[LATENT], actions[ACTIONS] = {0}, picture[PICTURE];
    uint64_t seed = 1;
    o.num_steps = 1;
    o.context = RF_CONTEXT_KEEP;
    rf_rng_normal_at(3, 1, 0, first, LATENT);
    rf_assert_ok(rf_world_session_create(&s, w.model, &o, &w.d.err), w.d.err);
    rf_assert_ok(rf_world_session_start_latents(s, first, 1, NULL, &seed, &w.d.err), w.d.err);
    rf_backend_counts before = {0}, after;
    for (int i = 0; i < 300; i++) {
        actions[1] = (float)(i % 2);
        rf_assert_ok(rf_world_session_step(s, actions, NULL, &w.d.err), w.d.err);
        rf_assert_ok(rf_world_session_read_frame(s, picture, &w.d.err), w.d.err);
        if (i == 0) before = rf_backend_get_counts(w.d.backend);
    }
    after = rf_backend_get_counts(w.d.backend);
    ck_assert_uint_eq(after.num_device_allocs, before.num_device_allocs);
    ck_assert_uint_eq(after.device_bytes, before.device_bytes);
    for (int i = 0; i < PICTURE; i++) ck_assert(isfinite(picture[i]));
    rf_world_session_destroy(s);
    close_world(&w);
}
END_TEST

/* --- policies -------------------------------------------------------------------------------------------------------- */

/* Never-reuse settings of every level: the bits of no policy. */
START_TEST(policies_that_never_reuse_change_no_bit) {
    enum { FRAMES = 7 };
    static const char *const settings[][2] = {{"interval", "interval=1"},    {"fora", "interval=1"},
                                              {"taylorseer", "interval=1"},  {"easycache", "threshold=0"},
                                              {"worldcache", "threshold=0"}, {"fbcache", "threshold=0"},
                                              {"dbcache", "threshold=0"},    {"toca", "interval=1"}};
    world w = open_world("cpu", TINY);
    float want[FRAMES * 2 * LATENT], got[FRAMES * 2 * LATENT];
    rf_world_options o = rf_world_options_default();
    o.batch = 2;
    o.num_steps = 10;
    roll(&w, &o, FRAMES, want, NULL);
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, settings[i][0], &w.d.err), w.d.err);
        if (rf_policy_set(policy, settings[i][1], &w.d.err) != RF_OK)
            ck_abort_msg("%s: %s", settings[i][0], w.d.err.message);
        o.policy = policy;
        o.force_policy = true;
        roll(&w, &o, FRAMES, got, NULL);
        ck_assert_msg(memcmp(got, want, sizeof got) == 0, "%s:%s changed something", settings[i][0], settings[i][1]);
        rf_policy_destroy(policy);
    }
    close_world(&w);
}
END_TEST

/* Every policy with its defaults runs a rollout, reuses something (or says that it keeps all), and stays finite. */
START_TEST(every_policy_runs_a_world) {
    enum { FRAMES = 7 };
    world w = open_world("cpu", TINY);
    float want[FRAMES * 2 * LATENT], got[FRAMES * 2 * LATENT];
    rf_world_options o = rf_world_options_default();
    o.batch = 2;
    o.num_steps = 20;
    roll(&w, &o, FRAMES, want, NULL);
    for (int i = 0; i < rf_policy_count(); i++) {
        const char *name = rf_policy_at(i)->name;
        rf_policy *policy = NULL;
        rf_world_session_info info;
        if (strcmp(rf_policy_at(i)->level, "replay") == 0) continue;
        rf_assert_ok(rf_policy_create(&policy, name, &w.d.err), w.d.err);
        if (strcmp(name, "magcache") == 0) rf_assert_ok(rf_policy_set(policy, "table=flat:1.02", &w.d.err), w.d.err);
        if (strcmp(name, "diffsparse") == 0) rf_assert_ok(rf_policy_set(policy, "table=uniform", &w.d.err), w.d.err);
        if (strcmp(name, "teacache") == 0)
            rf_assert_ok(rf_policy_set(policy, "coefficients=identity", &w.d.err), w.d.err);
        o.policy = policy;
        o.force_policy = true;
        roll(&w, &o, FRAMES, got, &info);
        for (size_t k = 0; k < sizeof got / sizeof *got; k++) ck_assert_msg(isfinite(got[k]), "%s", name);
        ck_assert_int_eq(info.total.images, 2 * FRAMES);
        ck_assert_int_eq(info.total.steps_full + info.total.steps_partial + info.total.steps_skipped, 2 * FRAMES * 20);
        rf_difference moved = rf_compare_f32(got, want, sizeof got / sizeof *got);
        bool reused = info.total.rows_computed < info.total.rows_total;
        ck_assert_msg(reused == (moved.max_abs > 0), "%s: reuse %d, moved by %g", name, reused, moved.max_abs);
        rf_policy_destroy(policy);
    }
    close_world(&w);
}
END_TEST

/* The option that only blocks with attention over frames can tell. */
START_TEST(pab_has_a_range_for_attention_over_frames) {
    enum { FRAMES = 2 };
    world w = open_world("cpu", TINY);
    float got[2][FRAMES * 2 * LATENT];
    rf_world_session_info info[2];
    for (int i = 0; i < 2; i++) {
        rf_world_options o = rf_world_options_default();
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, "pab", &w.d.err), w.d.err);
        rf_assert_ok(rf_policy_set(policy, i ? "temporal=2" : "temporal=4", &w.d.err), w.d.err);
        o.policy = policy;
        o.force_policy = true;
        o.batch = 2;
        o.num_steps = 20;
        roll(&w, &o, FRAMES, got[i], &info[i]);
        rf_policy_destroy(policy);
    }
    ck_assert_int_lt(info[0].total.rows_computed, info[1].total.rows_computed);
    ck_assert(memcmp(got[0], got[1], sizeof got[0]) != 0);
    close_world(&w);
}
END_TEST

/* A frame that begins with features of the frame before computes fewer steps; the first frame of a rollout has none to begin with. */
START_TEST(history_can_be_carried_from_frame_to_frame) {
    enum { FRAMES = 3 };
    world w = open_world("cpu", TINY);
    float got[FRAMES * LATENT];
    int64_t full[3];
    for (int carry = RF_CARRY_OFF; carry <= RF_CARRY_LAST; carry++) {
        rf_world_options o = rf_world_options_default();
        rf_world_session_info info;
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, "interval", &w.d.err), w.d.err);
        rf_assert_ok(rf_policy_set(policy, "interval=4", &w.d.err), w.d.err); /* 0 4 8 9, carried 3 7 9 */
        o.policy = policy;
        o.carry = (rf_cache_carry)carry;
        o.num_steps = 10;
        roll(&w, &o, FRAMES, got, &info);
        full[carry] = info.total.steps_full;
        rf_policy_destroy(policy);
    }
    ck_assert_int_eq(full[RF_CARRY_OFF], 3 * 4);
    ck_assert_int_eq(full[RF_CARRY_FIRST], 4 + 2 * 3);
    ck_assert_int_eq(full[RF_CARRY_LAST], 4 + 2 * 3);
    close_world(&w);
}
END_TEST

/* A latent of two modalities: worldcache groups their tokens apart. */
START_TEST(streams_have_statistics_of_their_own) {
    enum { FRAMES = 2 };
    static const char *const streams[] = {"", "\"streams\": [2, 4],", "\"streams\": [2, 3],"};
    dit_device d = dit_device_open_named("cpu");
    float got[2][FRAMES * 2 * LATENT];
    char dir[256], path[300], text[1024];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    for (int i = 0; i < 3; i++) {
        snprintf(text, sizeof text,
                 "{\"_class_name\": \"OasisWorld\", %s \"dit\": {\"input_h\": 6, \"input_w\": 8, \"in_channels\": 6, "
                 "\"hidden_size\": 48, \"depth\": 2, \"num_heads\": 3, \"external_cond_dim\": 5, \"max_frames\": 6}, "
                 "\"vae\": {\"input_height\": 24, \"input_width\": 32, \"patch_size\": 4, \"latent_dim\": 6, "
                 "\"enc_dim\": 32, \"enc_depth\": 1, \"enc_heads\": 2, \"dec_dim\": 32, \"dec_depth\": 1, "
                 "\"dec_heads\": 2}}",
                 streams[i]);
        rf_assert_ok(rf_file_write(path, text, strlen(text), &d.err), d.err);
        world w = {.d = d};
        if (i == 2) {
            rf_assert_fails(rf_world_model_synthetic(&w.model, d.backend, path, RF_DTYPE_F32, 1, &d.err), d.err,
                            RF_ERR_CONFIG, "5 channels");
            continue;
        }
        rf_policy *policy = NULL;
        rf_world_options o = rf_world_options_default();
        rf_assert_ok(rf_world_model_synthetic(&w.model, d.backend, path, RF_DTYPE_F32, 1, &d.err), d.err);
        rf_assert_ok(rf_policy_create(&policy, "worldcache", &d.err), d.err);
        o.policy = policy;
        o.batch = 2;
        o.num_steps = 20;
        roll(&w, &o, FRAMES, got[i], NULL);
        rf_policy_destroy(policy);
        rf_world_model_close(w.model);
    }
    ck_assert(memcmp(got[0], got[1], sizeof got[0]) != 0);
    rf_temp_dir_remove(dir);
    dit_device_close(&d);
}
END_TEST

/* Steps of a policy see a context that is computed again in front of every step that computes: the same rollout. */
START_TEST(policies_run_without_a_kept_context) {
    enum { FRAMES = 7 };
    world w = open_world("cpu", TINY);
    float want[FRAMES * 2 * LATENT], got[FRAMES * 2 * LATENT];
    rf_world_options o = rf_world_options_default();
    rf_policy *policy = NULL;
    rf_assert_ok(rf_policy_create(&policy, "interval", &w.d.err), w.d.err);
    o.policy = policy;
    o.batch = 2;
    o.num_steps = 10;
    roll(&w, &o, FRAMES, want, NULL);
    o.context_cache = false;
    roll(&w, &o, FRAMES, got, NULL);
    rf_assert_close(got, want, FRAMES * 2 * LATENT, INFINITY, 1e-4);
    rf_policy_destroy(policy);
    close_world(&w);
}
END_TEST

/* --- bad input ------------------------------------------------------------------------------------------------------- */

START_TEST(bad_options_and_folders_are_refused) {
    world w = open_world("cpu", TINY);
    rf_error *err = &w.d.err;
    rf_world_session *s = NULL;
    rf_world_options o = rf_world_options_default();
    o.window = 7;
    rf_assert_fails(rf_world_session_create(&s, w.model, &o, err), *err, RF_ERR_ARGUMENT, "window of 7");
    o = rf_world_options_default();
    o.context = RF_CONTEXT_SINKS;
    o.num_sinks = 5;
    rf_assert_fails(rf_world_session_create(&s, w.model, &o, err), *err, RF_ERR_ARGUMENT, "5 sinks");
    o = rf_world_options_default();
    o.num_steps = 1001;
    rf_assert_fails(rf_world_session_create(&s, w.model, &o, err), *err, RF_ERR_ARGUMENT, "1001 steps");
    o = rf_world_options_default();
    rf_assert_ok(rf_world_session_create(&s, w.model, &o, err), *err);
    float actions[ACTIONS] = {0}, picture[PICTURE];
    rf_assert_fails(rf_world_session_step(s, actions, NULL, err), *err, RF_ERR_STATE, "started");
    rf_assert_fails(rf_world_session_read_frame(s, picture, err), *err, RF_ERR_STATE, "started");
    float first[LATENT] = {0};
    uint64_t seed = 0;
    rf_assert_ok(rf_world_session_start_latents(s, first, 1, NULL, &seed, err), *err);
    actions[2] = NAN;
    rf_assert_fails(rf_world_session_step(s, actions, NULL, err), *err, RF_ERR_ARGUMENT, "finite");
    rf_world_session_destroy(s);
    rf_world_model *model = NULL;
    rf_assert_fails(rf_world_model_load(&model, w.d.backend, RF_FIXTURE_DIR "/dit-tiny", RF_DTYPE_F32, err), *err,
                    RF_ERR_MISSING, "config.json");
    rf_assert_fails(rf_world_model_load(&model, w.d.backend, "/nowhere", RF_DTYPE_F32, err), *err, RF_ERR_IO,
                    "nowhere");
    rf_assert_fails(rf_world_model_synthetic(&model, w.d.backend, "oasis-5m", RF_DTYPE_F32, 1, err), *err,
                    RF_ERR_ARGUMENT, "oasis-500m");
    close_world(&w);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("world");
    TCase *parity = tcase_create("parity");
    tcase_set_timeout(parity, 120);
    tcase_add_test(parity, forward_matches_the_reference_part_by_part);
    tcase_add_test(parity, both_folders_are_one_model);
    tcase_add_test(parity, vae_matches_the_reference);
    tcase_add_loop_test(parity, rollouts_match_the_reference, 0, 4);
    tcase_add_test(parity, levels_of_the_schedule_match_the_reference);
    suite_add_tcase(suite, parity);
    TCase *rollouts = tcase_create("rollouts");
    tcase_set_timeout(rollouts, 120);
    tcase_add_test(rollouts, kept_context_is_exact);
    tcase_add_test(rollouts, rollouts_of_a_batch_do_not_meet);
    tcase_add_test(rollouts, memory_does_not_grow);
    tcase_add_test(rollouts, policies_that_never_reuse_change_no_bit);
    tcase_add_test(rollouts, every_policy_runs_a_world);
    tcase_add_test(rollouts, pab_has_a_range_for_attention_over_frames);
    tcase_add_test(rollouts, history_can_be_carried_from_frame_to_frame);
    tcase_add_test(rollouts, streams_have_statistics_of_their_own);
    tcase_add_test(rollouts, policies_run_without_a_kept_context);
    tcase_add_test(rollouts, bad_options_and_folders_are_refused);
    suite_add_tcase(suite, rollouts);
    return rf_run_suite(suite);
}
