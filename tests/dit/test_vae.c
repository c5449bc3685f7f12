/* tests/dit/test_vae.c - the VAE decoder against the reference's pictures, in three dialects of tensor names.
 *
 * Bounds  f32: the reference's own f32 against f64 is 4e-7 relative L2; another order of sums doubles it at most.
 *         bf16 (CUDA): weights and every activation are rounded to 8 bits. */
#include "dit/vae.h"

#include <cjson/cJSON.h>

#include "core/file.h"
#include "kernels/ops.h"
#include "tests/dit/dit_test_util.h"

#define F32_BOUND  (dit_device_is_cuda(&device) ? 1e-5 : 2e-6)
#define BF16_BOUND 3e-2

static rf_weights *pictures;
static dit_device device;

static void open_all(void) {
    rf_error err = {0};
    device = dit_device_open();
    rf_assert_ok(rf_weights_open(&pictures, RF_FIXTURE_DIR "/vae.safetensors", &err), err);
}

static void close_all(void) {
    rf_weights_close(pictures);
    dit_device_close(&device);
}

/* Decodes `copies` equal latents of the fixture; the caller frees [copies, 3, H, W]. */
static float *decode_latents(const rf_vae *vae, const char *name, int copies, rf_vae_attention attention,
                             const char *ran, size_t *num_out) {
    rf_error err = {0};
    rf_tensor t;
    rf_assert_ok(rf_weights_get(pictures, name, &t, &err), err);
    int64_t height = t.shape[2], width = t.shape[3];
    const rf_vae_config *c = rf_vae_get_config(vae);
    size_t num = (size_t)rf_tensor_num_elems(&t);
    float *latents = malloc(num * (size_t)copies * sizeof *latents);
    for (size_t i = 0; i < num * (size_t)copies; i++) { /* the fixture's are already divided */
        latents[i] = (float)(((double)((const float *)t.data)[i % num] - c->shift_factor) * c->scaling_factor);
    }
    float *on_device = dit_upload(&device, latents, num * (size_t)copies);
    free(latents);

    rf_vae_session *session;
    rf_assert_ok(rf_vae_session_create_with(&session, vae, device.stream, copies, height, width, attention, &err), err);
    if (ran) ck_assert_str_eq(rf_vae_session_attention(session), ran);
    ck_assert_uint_gt(rf_vae_session_arena_bytes(session), 0);
    rf_stream_set_phase(device.stream, RF_PHASE_RUN);
    rf_backend_counts before = rf_backend_get_counts(device.backend);
    uint64_t host_allocs = rf_memory_get_counts().num_allocs;
    rf_assert_ok(rf_vae_session_decode(session, on_device, &err), err);
    ck_assert_uint_eq(rf_backend_get_counts(device.backend).num_device_allocs, before.num_device_allocs);
    ck_assert_uint_eq(rf_backend_get_counts(device.backend).num_syncs, before.num_syncs);
    ck_assert_uint_eq(rf_memory_get_counts().num_allocs, host_allocs);
    rf_stream_set_phase(device.stream, RF_PHASE_PLAN);

    int64_t factor = (int64_t)1 << (c->num_levels - 1);
    *num_out = (size_t)copies * 3 * (size_t)(height * width * factor * factor);
    float *got = malloc(*num_out * sizeof *got);
    dit_download(&device, device.stream, got, rf_vae_session_output(session), *num_out);
    rf_vae_session_destroy(session);
    rf_backend_free(device.backend, on_device);
    return got;
}

static void check_picture(const char *dir, const char *latents, const char *want_name, int copies,
                          rf_vae_attention attention, const char *ran) {
    rf_error err = {0};
    for (int d = 0; d < dit_device_num_dtypes(&device); d++) {
        rf_vae *vae;
        char path[512];
        snprintf(path, sizeof path, RF_FIXTURE_DIR "/%s", dir);
        rf_assert_ok(rf_vae_load(&vae, device.backend, path, dit_device_dtype(d), &err), err);
        size_t num;
        float *got = decode_latents(vae, latents, copies, attention, d == 0 ? ran : NULL, &num);
        rf_tensor want;
        rf_assert_ok(rf_weights_get(pictures, want_name, &want, &err), err);
        size_t one = (size_t)rf_tensor_num_elems(&want);
        ck_assert_uint_eq(num, one * (size_t)copies);
        for (int i = 0; i < copies; i++) {
            rf_difference diff = rf_compare_f32(got + (size_t)i * one, want.data, one);
            if (i == 0) {
                printf("%-14s %-18s %-5s %-9s max abs %.2g, relative L2 %.2g\n", dir, want_name,
                       rf_dtype_name(dit_device_dtype(d)), ran ? ran : "auto", diff.max_abs, diff.rel_l2);
            }
            rf_assert_close(got + (size_t)i * one, (const float *)want.data, one, INFINITY,
                            d == 0 ? F32_BOUND : BF16_BOUND);
        }
        free(got);
        rf_vae_close(vae);
    }
}

START_TEST(diffusers_names_give_the_reference_picture) {
    check_picture("dit-tiny/vae", "tiny.latents", "tiny.decoded", 1, RF_VAE_ATTENTION_AUTO, NULL);
}
END_TEST

START_TEST(a_picture_that_is_not_square) {
    check_picture("dit-tiny/vae", "tiny.latents_rect", "tiny.decoded_rect", 1, RF_VAE_ATTENTION_AUTO, NULL);
}
END_TEST

START_TEST(every_picture_of_a_batch) {
    check_picture("dit-tiny/vae", "tiny.latents", "tiny.decoded", 3, RF_VAE_ATTENTION_AUTO, NULL);
    check_picture("dit-tiny/vae", "tiny.latents", "tiny.decoded", 3, RF_VAE_ATTENTION_GEMM, "gemm");
}
END_TEST

START_TEST(attention_as_gemms_gives_the_same_picture) {
    check_picture("dit-tiny/vae", "tiny.latents", "tiny.decoded", 1, RF_VAE_ATTENTION_GEMM, "gemm");
    check_picture("dit-tiny/vae", "tiny.latents_rect", "tiny.decoded_rect", 1, RF_VAE_ATTENTION_GEMM, "gemm");
}
END_TEST

START_TEST(old_attention_names_and_ldm_names) {
    check_picture("vae-old-names", "l2.latents", "l2.decoded", 1, RF_VAE_ATTENTION_AUTO, NULL);
    check_picture("vae-ldm-names", "l2.latents", "l2.decoded", 1, RF_VAE_ATTENTION_AUTO, NULL);
}
END_TEST

/* ---- synthetic ---- */

START_TEST(the_sd_shape_has_its_known_number_of_parameters) {
    rf_error err = {0};
    rf_vae_config c = rf_vae_config_sd();
    rf_vae *vae;
    rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 1, &err), err);
    ck_assert_int_eq(rf_vae_num_params(vae), 49490179 + 20); /* decoder and post_quant_conv */
    ck_assert_uint_eq(rf_vae_weights_bytes(vae), (size_t)rf_vae_num_params(vae) * 4);
    rf_vae_close(vae);
}
END_TEST

static rf_vae_config small_config(void) {
    rf_vae_config c = rf_vae_config_sd();
    c.num_levels = 2;
    c.channels[0] = 8;
    c.channels[1] = 16;
    c.layers_per_block = 1;
    c.num_groups = 4;
    c.has_post_quant_conv = false;
    return c;
}

START_TEST(drawn_weights_depend_on_the_seed_alone) {
    rf_error err = {0};
    rf_vae_config c = small_config();
    float *got[3];
    size_t num = 0;
    for (int i = 0; i < 3; i++) {
        rf_vae *vae;
        rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, i == 2 ? 6 : 5, &err), err);
        got[i] = decode_latents(vae, "tiny.latents", 1, RF_VAE_ATTENTION_AUTO, NULL, &num);
        rf_vae_close(vae);
    }
    ck_assert_mem_eq(got[0], got[1], num * sizeof(float));
    ck_assert(memcmp(got[0], got[2], num * sizeof(float)) != 0);
    for (size_t i = 0; i < num; i++) ck_assert(isfinite(got[0][i]));
    for (int i = 0; i < 3; i++) free(got[i]);
}
END_TEST

START_TEST(scaling_and_shift_are_undone) {
    /* decode(x) with (scale s, shift b) = decode(x / s + b) with (1, 0) */
    rf_error err = {0};
    rf_vae_config c = small_config();
    float *got[2];
    size_t num = 0;
    for (int i = 0; i < 2; i++) { /* decode_latents applies the inverse, so both decode the fixture's numbers */
        c.scaling_factor = i == 0 ? 1 : 0.3611;
        c.shift_factor = i == 0 ? 0 : 0.1159;
        rf_vae *vae;
        rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 5, &err), err);
        got[i] = decode_latents(vae, "tiny.latents", 1, RF_VAE_ATTENTION_AUTO, NULL, &num);
        rf_vae_close(vae);
    }
    rf_assert_close(got[0], got[1], num, INFINITY, F32_BOUND);
    free(got[0]);
    free(got[1]);
}
END_TEST

START_TEST(attention_in_chunks_of_queries_and_of_samples) {
    static const struct {
        int copies;
        int64_t side; /* latent pixels: scores of 72 x 72 are cut by queries, of 48 x 48 into 3 samples and the rest */
    } cases[] = {{1, 72}, {4, 48}};
    rf_error err = {0};
    rf_vae_config c = small_config();
    rf_vae *vae;
    rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 5, &err), err);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t num_in = (size_t)(cases[i].copies * 4 * cases[i].side * cases[i].side);
        size_t num_out = num_in / 4 * 3 * 4;
        float *latents = malloc(num_in * sizeof *latents), *got[2];
        rf_rng_normal_at(9, 0, 0, latents, num_in);
        float *on_device = dit_upload(&device, latents, num_in);
        free(latents);
        for (int form = 0; form < 2; form++) {
            rf_vae_session *s;
            rf_vae_attention asked = form == 0 ? RF_VAE_ATTENTION_AUTO : RF_VAE_ATTENTION_GEMM;
            rf_assert_ok(rf_vae_session_create_with(&s, vae, device.stream, cases[i].copies, cases[i].side,
                                                    cases[i].side, asked, &err),
                         err);
            rf_assert_ok(rf_vae_session_decode(s, on_device, &err), err);
            got[form] = malloc(num_out * sizeof(float));
            dit_download(&device, device.stream, got[form], rf_vae_session_output(s), num_out);
            rf_vae_session_destroy(s);
        }
        rf_backend_free(device.backend, on_device);
        rf_assert_close(got[1], got[0], num_out, INFINITY, 1e-5);
        free(got[0]);
        free(got[1]);
    }
    rf_vae_close(vae);
}
END_TEST

START_TEST(one_level_and_no_attention) {
    rf_error err = {0};
    rf_vae_config c = small_config();
    c.num_levels = 1;
    c.mid_attention = false;
    rf_vae *vae;
    rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 5, &err), err);
    size_t num;
    float *got = decode_latents(vae, "tiny.latents", 2, RF_VAE_ATTENTION_AUTO, "none", &num);
    ck_assert_uint_eq(num, 2 * 3 * 64);
    free(got);
    rf_vae_close(vae);
}
END_TEST

/* ---- refusals ---- */

START_TEST(sizes_that_cannot_be_planned_are_refused) {
    rf_error err = {0};
    rf_vae_config c = small_config();
    rf_vae *vae;
    rf_assert_ok(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 5, &err), err);
    rf_vae_session *s;
    rf_assert_fails(rf_vae_session_create(&s, vae, device.stream, 0, 8, 8, &err), err, RF_ERR_ARGUMENT, "batch 0");
    rf_assert_fails(rf_vae_session_create(&s, vae, device.stream, 1, 0, 8, &err), err, RF_ERR_SHAPE, "0 x 8");
    rf_assert_fails(rf_vae_session_create(&s, vae, device.stream, 1, 8, 8193, &err), err, RF_ERR_SHAPE, "1..8192");
    ck_assert_ptr_null(s);
    rf_vae_session_destroy(NULL);
    rf_vae_close(vae);
    rf_vae_close(NULL);
    rf_assert_fails(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F16, 5, &err), err, RF_ERR_DTYPE, "f16");
}
END_TEST

START_TEST(configs_that_make_no_decoder_are_refused) {
    rf_error err = {0};
    rf_vae *vae;
    rf_vae_config c = small_config();
    c.num_levels = 7;
    rf_assert_fails(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 1, &err), err, RF_ERR_CONFIG, "7 levels");
    c = small_config();
    c.num_groups = 3;
    rf_assert_fails(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 1, &err), err, RF_ERR_CONFIG, "groups 3");
    c = small_config();
    c.layers_per_block = 100;
    rf_assert_fails(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 1, &err), err, RF_ERR_CONFIG, "layers");
    c = small_config();
    c.scaling_factor = 0;
    rf_assert_fails(rf_vae_synthetic(&vae, device.backend, &c, RF_DTYPE_F32, 1, &err), err, RF_ERR_CONFIG, "scaling");
    ck_assert_ptr_null(vae);
}
END_TEST

/* A folder with the tiny VAE's weights and an edited config. */
static rf_status load_edited(const char *key, const char *json_value, rf_error *err) {
    char *text, dir[256], path[512];
    size_t num;
    rf_assert_ok(rf_file_read(RF_FIXTURE_DIR "/dit-tiny/vae/config.json", 1 << 20, &text, &num, err), *err);
    cJSON *config = cJSON_Parse(text);
    rf_free(text);
    cJSON_DeleteItemFromObjectCaseSensitive(config, key);
    if (json_value) cJSON_AddItemToObject(config, key, cJSON_Parse(json_value));
    char *edited = cJSON_PrintUnformatted(config);
    cJSON_Delete(config);

    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/config.json", dir);
    rf_assert_ok(rf_file_write(path, edited, strlen(edited), err), *err);
    cJSON_free(edited);
    rf_assert_ok(
        rf_file_read(RF_FIXTURE_DIR "/dit-tiny/vae/diffusion_pytorch_model.safetensors", 1 << 24, &text, &num, err),
        *err);
    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", dir);
    rf_assert_ok(rf_file_write(path, text, num, err), *err);
    rf_free(text);

    rf_vae *vae;
    rf_status st = rf_vae_load(&vae, device.backend, dir, RF_DTYPE_F32, err);
    rf_vae_close(vae);
    rf_temp_dir_remove(dir);
    return st;
}

START_TEST(config_files_are_checked_field_by_field) {
    static const struct {
        const char *key, *value;
        rf_status status;
        const char *part;
    } cases[] = {
        {"_class_name", "\"AutoencoderTiny\"", RF_ERR_UNSUPPORTED, "AutoencoderTiny"},
        {"act_fn", "\"relu\"", RF_ERR_UNSUPPORTED, "relu"},
        {"up_block_types", "[\"UpDecoderBlock2D\",\"AttnUpDecoderBlock2D\",\"UpDecoderBlock2D\"]", RF_ERR_UNSUPPORTED,
         "AttnUpDecoderBlock2D"},
        {"up_block_types", "[\"UpDecoderBlock2D\"]", RF_ERR_CONFIG, "3 names"},
        {"up_block_types", "[1,2,3]", RF_ERR_UNSUPPORTED, "not a string"},
        {"block_out_channels", NULL, RF_ERR_MISSING, "block_out_channels"},
        {"block_out_channels", "[]", RF_ERR_CONFIG, "1..6"},
        {"block_out_channels", "[4,6,6.5]", RF_ERR_CONFIG, "whole number"},
        {"block_out_channels", "[4,6,-6]", RF_ERR_CONFIG, "whole number"},
        {"block_out_channels", "[4,6,7]", RF_ERR_CONFIG, "multiple of norm_num_groups"},
        {"block_out_channels", "[4,6,8]", RF_ERR_SHAPE, "conv_in"}, /* not what the file holds */
        {"norm_num_groups", "0", RF_ERR_CONFIG, "norm_num_groups"},
        {"norm_num_groups", "\"x\"", RF_ERR_CONFIG, "norm_num_groups"},
        {"layers_per_block", "2", RF_ERR_MISSING, "resnets.2"},
        {"layers_per_block", "9", RF_ERR_CONFIG, "layers_per_block"},
        {"latent_channels", "0", RF_ERR_CONFIG, "latent_channels"},
        {"latent_channels", "8", RF_ERR_SHAPE, "post_quant_conv"},
        {"out_channels", "4", RF_ERR_UNSUPPORTED, "out_channels 4"},
        {"scaling_factor", "0", RF_ERR_CONFIG, "scaling_factor"},
        {"latents_mean", "[0,0,0,0]", RF_ERR_UNSUPPORTED, "latents_mean"},
        {"use_post_quant_conv", "false", RF_ERR_CONFIG, "post_quant_conv"},
        {"mid_block_add_attention", "false", RF_ERR_CONFIG, "attentions.0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_error err = {0};
        rf_assert_fails(load_edited(cases[i].key, cases[i].value, &err), err, cases[i].status, cases[i].part);
    }
    rf_error err = {0};
    rf_assert_ok(load_edited("scaling_factor", NULL, &err), err); /* absent: the class's default */
}
END_TEST

START_TEST(a_folder_without_a_vae_is_refused) {
    rf_error err = {0};
    rf_vae *vae;
    rf_assert_fails(rf_vae_load(&vae, device.backend, RF_FIXTURE_DIR "/no-such-folder", RF_DTYPE_F32, &err), err,
                    RF_ERR_MISSING, "config.json");
    ck_assert_ptr_null(vae);
}
END_TEST

START_TEST(every_failed_allocation_is_reported) {
    if (dit_device_is_cuda(&device)) return;
    for (uint64_t n = 1; n < 100000; n++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_error err = {0};
        rf_backend *own; /* a backend keeps lists, which would count as live */
        rf_stream *stream;
        rf_assert_ok(rf_backend_open(&own, "cpu", 1, &err), err);
        rf_assert_ok(rf_stream_create(&stream, own, &err), err);
        rf_vae *vae = NULL;
        rf_vae_session *session = NULL;
        rf_memory_fail_nth(n);
        rf_status st = rf_vae_load(&vae, own, RF_FIXTURE_DIR "/dit-tiny/vae", RF_DTYPE_F32, &err);
        if (st == RF_OK) st = rf_vae_session_create(&session, vae, stream, 1, 8, 8, &err);
        rf_memory_fail_nth(0);
        rf_vae_session_destroy(session);
        rf_vae_close(vae);
        rf_stream_destroy(stream);
        ck_assert_uint_eq(rf_backend_get_counts(own).device_bytes, 0);
        rf_backend_close(own);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) {
            ck_assert_uint_gt(n, 50);
            return;
        }
        ck_assert_msg(st == RF_ERR_MEMORY || st == RF_ERR_DEVICE_MEMORY, "allocation %llu: %s: %s",
                      (unsigned long long)n, rf_status_name(st), err.message);
    }
    ck_abort_msg("never succeeded");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("vae");
    TCase *parity = tcase_create("parity");
    tcase_add_test(parity, diffusers_names_give_the_reference_picture);
    tcase_add_test(parity, a_picture_that_is_not_square);
    tcase_add_test(parity, every_picture_of_a_batch);
    tcase_add_test(parity, attention_as_gemms_gives_the_same_picture);
    tcase_add_test(parity, old_attention_names_and_ldm_names);
    TCase *synthetic = tcase_create("synthetic");
    tcase_add_test(synthetic, the_sd_shape_has_its_known_number_of_parameters);
    tcase_add_test(synthetic, drawn_weights_depend_on_the_seed_alone);
    tcase_add_test(synthetic, scaling_and_shift_are_undone);
    tcase_add_test(synthetic, attention_in_chunks_of_queries_and_of_samples);
    tcase_add_test(synthetic, one_level_and_no_attention);
    TCase *refusals = tcase_create("refusals");
    tcase_add_test(refusals, sizes_that_cannot_be_planned_are_refused);
    tcase_add_test(refusals, configs_that_make_no_decoder_are_refused);
    tcase_add_test(refusals, config_files_are_checked_field_by_field);
    tcase_add_test(refusals, a_folder_without_a_vae_is_refused);
    tcase_add_test(refusals, every_failed_allocation_is_reported);
    TCase *cases[] = {parity, synthetic, refusals};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tcase_add_checked_fixture(cases[i], open_all, close_all);
        tcase_set_timeout(cases[i], 120);
        suite_add_tcase(suite, cases[i]);
    }
    return rf_run_suite(suite);
}
