/* tests/dit/test_world_cuda.c - world models on CUDA against the CPU, which the fixtures hold against the PyTorch definition.
 *
 * Bounds: f32 relative L2 1e-4 (no TF32: other orders of sums only); bf16 3e-2 on the latents of a rollout's third frame, which saw two frames
 * that bf16 made. Captured steps give the bits of direct ones. */
#include "core/file.h"
#include "core/rng.h"
#include "dit/world.h"
#include "tests/dit/dit_test_util.h"

/* 64 x 64 frames, latents of 16 x 8 x 8, heads of 64; PATCH is 1 (64 tokens a frame) or 2 (16). */
static const char config_format[] =
    "{\"_class_name\": \"OasisWorld\", \"dit\": {\"input_h\": 8, \"input_w\": 8, \"patch_size\": %d, \"in_channels\": "
    "16, "
    "\"hidden_size\": 128, \"depth\": 3, \"num_heads\": 2, \"external_cond_dim\": 7, \"max_frames\": 5}, "
    "\"vae\": {\"input_height\": 64, \"input_width\": 64, \"patch_size\": 8, \"latent_dim\": 16, \"enc_dim\": 128, "
    "\"enc_depth\": 2, \"enc_heads\": 2, \"dec_dim\": 128, \"dec_depth\": 2, \"dec_heads\": 2}, "
    "\"scaling_factor\": 1.0, \"steps\": 3}";

enum { FRAMES = 7, BATCH = 2, LATENT = 16 * 8 * 8, PICTURE = 3 * 64 * 64 };

typedef struct {
    const char *device;
    int patch;
    rf_dtype dtype;
    bool graphs, context_cache;
    rf_context_mode context;
    const char *policy, *policy_options;
} setting;

/* FRAMES frames of two rollouts from a picture; latents of all frames, and the last pictures. */
static void roll(const setting *how, float *latents, float *pictures) {
    dit_device d = dit_device_open_named(how->device);
    char dir[256], path[300], text[sizeof config_format + 16];
    snprintf(text, sizeof text, config_format, how->patch);
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    rf_assert_ok(rf_file_write(path, text, strlen(text), &d.err), d.err);
    rf_world_model *model = NULL;
    rf_world_session *s = NULL;
    rf_policy *policy = NULL;
    rf_world_options o = rf_world_options_default();
    o.batch = BATCH;
    o.use_graphs = how->graphs;
    o.context_cache = how->context_cache;
    o.context = how->context;
    o.residual_dtype = RF_DTYPE_F32;
    o.force_policy = true;
    if (how->policy != NULL) {
        rf_assert_ok(rf_policy_create(&policy, how->policy, &d.err), d.err);
        rf_assert_ok(rf_policy_set(policy, how->policy_options, &d.err), d.err);
        o.policy = policy;
    }
    rf_assert_ok(rf_world_model_synthetic(&model, d.backend, path, how->dtype, 5, &d.err), d.err);
    rf_assert_ok(rf_world_session_create(&s, model, &o, &d.err), d.err);
    float *first = rf_alloc(BATCH * 2 * PICTURE * sizeof(float)), actions[BATCH * 2 * 7] = {0};
    uint64_t seeds[BATCH] = {4, 5};
    rf_rng_normal_at(3, 1, 0, first, BATCH * 2 * PICTURE);
    actions[7 + 1] = actions[21 + 2] = 1;
    rf_assert_ok(rf_world_session_start(s, first, 2, actions, seeds, &d.err), d.err);
    for (int i = 0; i < FRAMES; i++) {
        memset(actions, 0, sizeof actions);
        actions[i % 7] = actions[7 + (i + 3) % 7] = 1;
        rf_assert_ok(rf_world_session_step(s, actions, NULL, &d.err), d.err);
        rf_assert_ok(rf_world_session_read_latent(s, latents + i * BATCH * LATENT, &d.err), d.err);
    }
    if (pictures != NULL) rf_assert_ok(rf_world_session_read_frame(s, pictures, &d.err), d.err);
    rf_world_session_info info = rf_world_session_get_info(s);
    ck_assert(info.denoise_ms > 0);
    rf_free(first);
    rf_world_session_destroy(s);
    rf_world_model_close(model);
    rf_policy_destroy(policy);
    rf_temp_dir_remove(dir);
    dit_device_close(&d);
}

START_TEST(rollouts_agree_with_the_cpu) {
    int patch = 1 + _i;
    static float want[FRAMES * BATCH * LATENT], got[FRAMES * BATCH * LATENT], pictures[2][BATCH * PICTURE];
    setting how = {.device = "cpu", .patch = patch, .context_cache = true};
    roll(&how, want, pictures[0]);
    how.device = "cuda";
    how.graphs = true;
    roll(&how, got, pictures[1]);
    rf_difference f32 = rf_compare_f32(got, want, FRAMES * BATCH * LATENT);
    rf_difference picture = rf_compare_f32(pictures[1], pictures[0], BATCH * PICTURE);
    how.dtype = RF_DTYPE_BF16;
    roll(&how, got, NULL);
    rf_difference bf16 = rf_compare_f32(got, want, 3 * BATCH * LATENT);
    printf("patch %d: f32 %.2e, pictures %.2e, bf16 (three frames) %.2e\n", patch, f32.rel_l2, picture.rel_l2,
           bf16.rel_l2);
    ck_assert(f32.rel_l2 <= 1e-4 && picture.rel_l2 <= 1e-4);
    ck_assert(bf16.rel_l2 <= 3e-2);
}
END_TEST

START_TEST(captured_steps_give_the_same_bits) {
    static float want[FRAMES * BATCH * LATENT], got[FRAMES * BATCH * LATENT];
    for (int dtype = 0; dtype < 2; dtype++) {
        setting how = {.device = "cuda", .patch = 1, .dtype = dit_device_dtype(dtype), .context_cache = true};
        roll(&how, want, NULL);
        how.graphs = true;
        roll(&how, got, NULL);
        ck_assert_mem_eq(got, want, sizeof got);
        /* a policy that never reuses */
        how.policy = "interval";
        how.policy_options = "interval=1";
        roll(&how, got, NULL);
        ck_assert_mem_eq(got, want, sizeof got);
    }
}
END_TEST

START_TEST(kept_context_is_exact) {
    static float want[FRAMES * BATCH * LATENT], got[FRAMES * BATCH * LATENT];
    setting how = {.device = "cuda", .patch = 1, .graphs = true};
    roll(&how, want, NULL);
    how.context_cache = true;
    roll(&how, got, NULL);
    rf_assert_close(got, want, FRAMES * BATCH * LATENT, INFINITY, 1e-4);
    for (int mode = RF_CONTEXT_KEEP; mode <= RF_CONTEXT_SINKS; mode++) {
        how.context = (rf_context_mode)mode;
        roll(&how, got, NULL);
        rf_assert_close(got, want, 3 * BATCH * LATENT, INFINITY, 1e-4);
    }
}
END_TEST

/* Policies of every level give what they give on the CPU. */
START_TEST(policies_agree_with_the_cpu) {
    static const char *const settings[][2] = {{"interval", "interval=3"},
                                              {"fora", "interval=2"},
                                              {"pab", ""},
                                              {"dbcache", "threshold=100"},
                                              {"toca", "score=value"}};
    static float want[FRAMES * BATCH * LATENT], got[FRAMES * BATCH * LATENT];
    setting how = {.patch = 1,
                   .context_cache = true,
                   .graphs = true,
                   .policy = settings[_i][0],
                   .policy_options = settings[_i][1]};
    how.device = "cpu";
    roll(&how, want, NULL);
    how.device = "cuda";
    roll(&how, got, NULL);
    rf_difference f32 = rf_compare_f32(got, want, FRAMES * BATCH * LATENT);
    printf("%s:%s f32 %.2e\n", how.policy, how.policy_options, f32.rel_l2);
    ck_assert(f32.rel_l2 <= 1e-3);
}
END_TEST

int main(void) {
    rf_error err = {0};
    rf_backend *backend = NULL;
    if (rf_backend_open(&backend, "cuda", 0, &err) != RF_OK) {
        printf("SKIPPED: %s\n", err.message);
        return 77;
    }
    rf_backend_close(backend);
    Suite *suite = suite_create("world on CUDA");
    TCase *tests = tcase_create("cuda");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, rollouts_agree_with_the_cpu, 0, 2);
    tcase_add_test(tests, captured_steps_give_the_same_bits);
    tcase_add_test(tests, kept_context_is_exact);
    tcase_add_loop_test(tests, policies_agree_with_the_cpu, 0, 5);
    suite_add_tcase(suite, tests);
    return rf_run_suite(suite);
}
