/* tests/dit/test_config.c - transformer configs: what is read, and what is refused with which words. */
#include "dit/config.h"
#include "tests/test_util.h"

static rf_status read_text(const char *text, rf_dit_desc *desc, rf_error *err) {
    rf_json *doc = NULL;
    rf_status st = rf_json_parse(&doc, text, strlen(text), "config.json", err);
    if (st == RF_OK) st = rf_dit_config_read(desc, doc, err);
    rf_json_close(doc);
    return st;
}

START_TEST(diffusers_defaults_are_dit_xl_2) {
    rf_dit_desc d;
    rf_error err = {0};
    rf_assert_ok(read_text("{\"_class_name\":\"DiTTransformer2DModel\",\"out_channels\":8}", &d, &err), err);
    ck_assert_int_eq(d.width, 1152);
    ck_assert_int_eq(d.num_heads, 16);
    ck_assert_int_eq(rf_dit_desc_num_blocks(&d), 28);
    ck_assert_int_eq(rf_dit_desc_num_chunks(&d), 28 * 6 + 2);
    ck_assert_int_eq(d.num_classes, 1000);
    ck_assert_int_eq(d.guided_channels, 4);
    ck_assert_double_eq(d.freq_shift, 1.0);
    ck_assert_double_eq(d.groups[0].parts[0].norm_eps, 1e-6);
    ck_assert_double_eq(d.groups[0].parts[1].norm_eps, 1e-5);
    ck_assert_double_eq(d.pos_base_size, 16.0);
}
END_TEST

START_TEST(the_original_layout_has_its_own_numerics) {
    rf_dit_desc d;
    rf_error err = {0};
    rf_assert_ok(read_text("{\"_class_name\":\"DiT\",\"hidden_size\":384,\"depth\":12,\"num_heads\":6}", &d, &err),
                 err);
    ck_assert_int_eq(d.head_dim, 64);
    ck_assert_int_eq(d.out_channels, 8);
    ck_assert_int_eq(d.guided_channels, 3);
    ck_assert_double_eq(d.freq_shift, 0.0);
    ck_assert_double_eq(d.groups[0].parts[1].norm_eps, 1e-6);
}
END_TEST

START_TEST(wrong_configs_are_refused_by_key) {
    static const struct {
        const char *text;
        rf_status status;
        const char *message;
    } cases[] = {
        {"[]", RF_ERR_CONFIG, "expected a JSON object"},
        {"{\"_class_name\":\"FluxTransformer2DModel\"}", RF_ERR_UNSUPPORTED, "FluxTransformer2DModel"},
        {"{\"_class_name\":7}", RF_ERR_CONFIG, "_class_name"},
        {"{\"_class_name\":\"DiT\",\"hidden_size\":384,\"depth\":12}", RF_ERR_MISSING, "num_heads"},
        {"{\"_class_name\":\"DiT\",\"hidden_size\":385,\"depth\":12,\"num_heads\":6}", RF_ERR_CONFIG, "385"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"num_layers\":0}", RF_ERR_CONFIG, "num_layers"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"num_layers\":1e30}", RF_ERR_CONFIG, "num_layers"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"num_layers\":2.5}", RF_ERR_CONFIG, "num_layers"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"patch_size\":-2}", RF_ERR_CONFIG, "patch_size"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"sample_size\":33}", RF_ERR_CONFIG, "33"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"out_channels\":7}", RF_ERR_CONFIG, "7 output channels"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"norm_type\":\"layer_norm\"}", RF_ERR_UNSUPPORTED, "layer_norm"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"activation_fn\":\"geglu\"}", RF_ERR_UNSUPPORTED, "geglu"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"attention_bias\":false}", RF_ERR_UNSUPPORTED, "attention_bias"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"cross_attention_dim\":768}", RF_ERR_UNSUPPORTED,
         "cross_attention_dim"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"norm_eps\":0}", RF_ERR_CONFIG, "norm_eps"},
        {"{\"_class_name\":\"DiTTransformer2DModel\",\"num_attention_heads\":\"16\"}", RF_ERR_CONFIG,
         "num_attention_heads"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_dit_desc d;
        rf_error err = {0};
        rf_assert_fails(read_text(cases[i].text, &d, &err), err, cases[i].status, cases[i].message);
        ck_assert_ptr_nonnull(strstr(err.message, "config.json"));
    }
}
END_TEST

START_TEST(every_built_in_shape_is_consistent) {
    int num = 0;
    for (; rf_dit_config_builtin_name(num) != NULL; num++) {
        rf_dit_desc d;
        rf_error err = {0};
        rf_assert_ok(rf_dit_config_builtin(&d, rf_dit_config_builtin_name(num), &err), err);
    }
    ck_assert_int_ge(num, 12);
    ck_assert_ptr_null(rf_dit_config_builtin_name(-1));
}
END_TEST

START_TEST(inconsistent_descriptions_are_refused) {
    rf_dit_desc good, d;
    rf_error err = {0};
    rf_assert_ok(rf_dit_config_builtin(&good, "dit-s-2-256", &err), err);
    d = good;
    d.num_heads = 5;
    rf_assert_fails(rf_dit_desc_check(&d, &err), err, RF_ERR_CONFIG, "heads 5");
    d = good;
    d.groups[0].parts[0].segments[0].gate = 6;
    rf_assert_fails(rf_dit_desc_check(&d, &err), err, RF_ERR_CONFIG, "chunk 6");
    d = good;
    d.groups[0].parts[0].segments[0].shift = -1;
    rf_assert_fails(rf_dit_desc_check(&d, &err), err, RF_ERR_CONFIG, "shift without a scale");
    d = good;
    d.groups[0].parts[0].segments[0].present = false;
    rf_assert_fails(rf_dit_desc_check(&d, &err), err, RF_ERR_CONFIG, "no segment");
    d = good;
    d.num_groups = 9;
    rf_assert_fails(rf_dit_desc_check(&d, &err), err, RF_ERR_CONFIG, "block groups");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dit/config");
    TCase *tc = tcase_create("config");
    tcase_add_test(tc, diffusers_defaults_are_dit_xl_2);
    tcase_add_test(tc, the_original_layout_has_its_own_numerics);
    tcase_add_test(tc, wrong_configs_are_refused_by_key);
    tcase_add_test(tc, every_built_in_shape_is_consistent);
    tcase_add_test(tc, inconsistent_descriptions_are_refused);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
