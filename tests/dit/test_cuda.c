/* tests/dit/test_cuda.c - the executor and the pipeline on CUDA against the CPU, which the fixtures hold against diffusers.
 *
 * Bounds: f32 relative L2 1e-4 (no TF32: other orders of sums only); bf16 1e-2 (weights and activations rounded to 8 bits, over 6
 * layers); pictures of one seed from CPU and CUDA f32 agree to 50 dB. */
#include "core/image.h"
#include "core/rng.h"
#include "tests/dit/dit_test_util.h"

#define MODEL RF_SOURCE_DIR "/samples/models/objects"

/* Forward of a synthetic model (the same draws on every backend) on fixed latents, two branches of two samples; rows to out. */
static size_t forward(const char *device, const rf_dit_desc *desc, rf_dtype dtype, rf_dtype residual_dtype,
                      float *out) {
    dit_device d = dit_device_open_named(device);
    rf_dit_model *model = NULL;
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    int side = (int)desc->sample_size;
    size_t num_in = (size_t)(2 * desc->in_channels * side * side);
    size_t num_out = (size_t)(4 * desc->out_channels * side * side);
    if (out != NULL) {
        o.batch = 2;
        o.branches = 2;
        o.height = o.width = side;
        o.max_steps = 2;
        o.residual_dtype = residual_dtype;
        rf_assert_ok(rf_dit_model_synthetic(&model, d.backend, desc, dtype, 11, &d.err), d.err);
        rf_assert_ok(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err);
        float *latent = rf_alloc(num_in * sizeof(float)), timesteps[2] = {900, 321};
        rf_rng_normal_at(5, 0, 0, latent, num_in);
        float *device_latent = dit_upload(&d, latent, num_in);
        int32_t labels[4] = {1, 700, 1000, 1000};
        rf_assert_ok(rf_dit_session_begin(s, timesteps, 2, labels, &d.err), d.err);
        rf_assert_ok(rf_dit_session_queue_advance(s, &d.err), d.err); /* the second step's modulation rows */
        rf_assert_ok(rf_dit_session_forward(s, device_latent, NULL, 0, &d.err), d.err);
        dit_download(&d, d.stream, out, rf_dit_session_output(s), num_out);
        rf_backend_free(d.backend, device_latent);
        rf_free(latent);
        rf_dit_session_destroy(s);
        rf_dit_model_close(model);
    }
    dit_device_close(&d);
    return num_out;
}

START_TEST(forward_agrees_with_the_cpu) {
    static const struct {
        const char *name;
        int depth, num_heads, head_dim;
    } shapes[] = {{"dit-xl-2-256", 6, 4, 72},
                  {"dit-b-4-256", 6, 3, 64},
                  {"dit-b-2-256", 3, 2, 128},
                  {"dit-b-8-256", 3, 2, 80},
                  {"dit-b-8-256", 3, 2, 96}};
    rf_error err = {0};
    rf_dit_desc desc;
    rf_assert_ok(rf_dit_config_builtin(&desc, shapes[_i].name, &err), err);
    desc.groups[0].count = shapes[_i].depth;
    desc.num_heads = shapes[_i].num_heads;
    desc.head_dim = shapes[_i].head_dim;
    desc.width = desc.cond_dim = desc.num_heads * desc.head_dim;
    desc.groups[0].parts[1].ffn_dim = 4 * desc.width;
    size_t num = forward("cpu", &desc, RF_DTYPE_F32, RF_DTYPE_F32, NULL);
    float *want = rf_alloc(num * sizeof(float)), *got = rf_alloc(num * sizeof(float));
    forward("cpu", &desc, RF_DTYPE_F32, RF_DTYPE_F32, want);
    struct {
        rf_dtype dtype, residual_dtype;
        double bound;
    } forms[] = {
        {RF_DTYPE_F32, RF_DTYPE_F32, 1e-4}, {RF_DTYPE_BF16, RF_DTYPE_F32, 1e-2}, {RF_DTYPE_BF16, RF_DTYPE_BF16, 1e-2}};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        forward("cuda", &desc, forms[i].dtype, forms[i].residual_dtype, got);
        rf_difference diff = rf_compare_f32(got, want, num);
        printf("%s, %d layers, heads of %d, %s, residual %s: relative L2 %.2e\n", shapes[_i].name, shapes[_i].depth,
               shapes[_i].head_dim, rf_dtype_name(forms[i].dtype), rf_dtype_name(forms[i].residual_dtype), diff.rel_l2);
        rf_assert_close(got, want, num, INFINITY, forms[i].bound);
    }
    rf_free(want);
    rf_free(got);
}
END_TEST

enum { SIDE = 128, PICTURE = 3 * SIDE * SIDE };

/* Two pictures of the shipped model. */
static void sample(const char *device, rf_dtype dtype, const rf_image_options *options, float *out) {
    dit_device d = dit_device_open_named(device);
    rf_image_model *model = NULL;
    rf_image_session *s = NULL;
    int classes[2] = {0, 17};
    uint64_t seeds[2] = {7, 8};
    rf_assert_ok(rf_image_model_load(&model, d.backend, MODEL, dtype, &d.err), d.err);
    rf_assert_ok(rf_image_session_create(&s, model, options, &d.err), d.err);
    rf_assert_ok(rf_image_session_denoise(s, classes, seeds, NULL, NULL, NULL, &d.err), d.err);
    rf_assert_ok(rf_image_session_decode(s, out, &d.err), d.err);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
    dit_device_close(&d);
}

START_TEST(pictures_agree_with_the_cpu) {
    static float cpu[2 * PICTURE], cuda[2 * PICTURE];
    rf_image_options o = rf_image_options_default();
    o.batch = 2;
    o.num_steps = 20;
    sample("cpu", RF_DTYPE_F32, &o, cpu);
    for (int form = 0; form < 2; form++) {
        sample("cuda", form == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16, &o, cuda);
        for (int i = 0; i < 2; i++) {
            rf_image a = {0}, b = {0};
            rf_error err = {0};
            double psnr = 0, ssim = 0;
            rf_assert_ok(rf_image_from_planar(&a, cpu + i * PICTURE, SIDE, SIDE, &err), err);
            rf_assert_ok(rf_image_from_planar(&b, cuda + i * PICTURE, SIDE, SIDE, &err), err);
            rf_assert_ok(rf_image_compare(&a, &b, &psnr, &ssim, NULL, &err), err);
            printf("picture %d, %s: PSNR %.1f dB, SSIM %.4f against the CPU\n", i, form == 0 ? "f32" : "bf16", psnr,
                   ssim);
            /* bf16 rounds every step; a wrong kernel leaves another picture (under 20 dB) */
            ck_assert_msg(psnr >= (form == 0 ? 50.0 : 25.0), "picture %d: %.1f dB", i, psnr);
            rf_image_free(&a);
            rf_image_free(&b);
        }
    }
}
END_TEST

START_TEST(graphs_and_repeats_change_no_bit) {
    static float first[2 * PICTURE], again[2 * PICTURE], eager[2 * PICTURE];
    rf_image_options o = rf_image_options_default();
    o.batch = 2;
    o.num_steps = 8;
    o.sampler = RF_SAMPLER_DDPM;
    for (int form = 0; form < 2; form++) {
        rf_dtype dtype = form == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16;
        o.use_graphs = true;
        sample("cuda", dtype, &o, first);
        sample("cuda", dtype, &o, again);
        o.use_graphs = false;
        sample("cuda", dtype, &o, eager);
        ck_assert_msg(memcmp(first, again, sizeof first) == 0, "%s: two runs differ", rf_dtype_name(dtype));
        ck_assert_msg(memcmp(first, eager, sizeof first) == 0, "%s: the graph and the direct calls differ",
                      rf_dtype_name(dtype));
    }
}
END_TEST

typedef struct {
    const rf_backend *backend;
    rf_memory_counts host;
    rf_backend_counts device;
    int num_seen;
} counting;

/* From the end of the first step on nothing may be allocated and nothing waited for. */
static bool count(void *user, int step, int num_steps) {
    counting *c = user;
    rf_memory_counts host = rf_memory_get_counts();
    rf_backend_counts device = rf_backend_get_counts(c->backend);
    if (step > 0) {
        ck_assert_uint_eq(host.num_allocs, c->host.num_allocs);
        ck_assert_uint_eq(device.num_device_allocs, c->device.num_device_allocs);
        ck_assert_uint_eq(device.num_syncs, c->device.num_syncs);
        ck_assert_uint_eq(device.num_graph_launches, c->device.num_graph_launches + 1);
        ck_assert_uint_eq(device.num_launches, c->device.num_launches);
    }
    c->host = host;
    c->device = device;
    c->num_seen++;
    return true;
}

START_TEST(a_step_is_one_graph_without_allocation_or_wait) {
    dit_device d = dit_device_open_named("cuda");
    rf_image_model *model = NULL;
    rf_image_session *s = NULL;
    rf_image_options o = rf_image_options_default();
    o.num_steps = 12;
    int class_id = 3;
    uint64_t seed = 1;
    counting c = {.backend = d.backend};
    rf_assert_ok(rf_image_model_load(&model, d.backend, MODEL, RF_DTYPE_BF16, &d.err), d.err);
    rf_assert_ok(rf_image_session_create(&s, model, &o, &d.err), d.err);
    rf_assert_ok(rf_image_session_denoise(s, &class_id, &seed, NULL, count, &c, &d.err), d.err);
    ck_assert_int_eq(c.num_seen, 12);
    ck_assert_int_gt(rf_image_session_get_info(s).graph_nodes, 10 * 7);
    rf_image_session_destroy(s);
    rf_image_model_close(model);
    dit_device_close(&d);
}
END_TEST

START_TEST(a_batch_too_large_for_the_card_is_refused_in_one_line) {
    dit_device d = dit_device_open_named("cuda");
    rf_dit_model *model = NULL;
    rf_dit_session *s = NULL;
    rf_dit_session_options o = rf_dit_session_options_default();
    rf_assert_ok(rf_dit_model_load(&model, d.backend, MODEL "/transformer", RF_DTYPE_BF16, &d.err), d.err);
    o.height = o.width = 4096;
    o.batch = 64;
    rf_assert_fails(rf_dit_session_create(&s, model, d.stream, &o, &d.err), d.err, RF_ERR_DEVICE_MEMORY, "bytes");
    ck_assert_ptr_null(strchr(d.err.message, '\n'));
    rf_dit_model_close(model);
    dit_device_close(&d);
}
END_TEST

int main(void) {
    rf_backend *backend = NULL;
    rf_error err = {0};
    if (rf_backend_open(&backend, "cuda", 0, &err) != RF_OK) {
        printf("skipped: %s\n", err.message);
        return 77;
    }
    rf_backend_close(backend);
    Suite *suite = suite_create("dit/cuda");
    TCase *tc = tcase_create("cuda");
    tcase_set_timeout(tc, 300);
    tcase_add_loop_test(tc, forward_agrees_with_the_cpu, 0, 5);
    tcase_add_test(tc, pictures_agree_with_the_cpu);
    tcase_add_test(tc, graphs_and_repeats_change_no_bit);
    tcase_add_test(tc, a_step_is_one_graph_without_allocation_or_wait);
    tcase_add_test(tc, a_batch_too_large_for_the_card_is_refused_in_one_line);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK); /* a CUDA context does not survive a fork */
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
