/* tests/dlm/test_config.c - configs of text models: what is read from each family's keys, and what is refused with which words. */
#include "dlm/config.h"

#include "core/file.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_status parse_texts(const char *config, const char *generation, rf_text_desc *desc, rf_error *err) {
    rf_json *doc = NULL, *more = NULL;
    rf_status st = rf_json_parse(&doc, config, strlen(config), "config.json", err);
    if (st == RF_OK && generation) st = rf_json_parse(&more, generation, strlen(generation), "generation.json", err);
    if (st == RF_OK) st = rf_text_config_parse(desc, doc, more, err);
    rf_json_close(doc);
    rf_json_close(more);
    return st;
}

/* A config as pairs, so that a test changes, adds or leaves out one. */
typedef struct {
    const char *key, *value;
} pair;

static const pair qwen3_pairs[] = {{"model_type", "\"qwen3\""},
                                   {"vocab_size", "1000"},
                                   {"hidden_size", "64"},
                                   {"intermediate_size", "96"},
                                   {"num_hidden_layers", "3"},
                                   {"num_attention_heads", "4"},
                                   {"num_key_value_heads", "2"},
                                   {"head_dim", "32"},
                                   {"rope_theta", "1000000.0"},
                                   {"eos_token_id", "7"},
                                   {NULL, NULL}};
static const pair sdar_pairs[] = {{"model_type", "\"sdar\""},  {"vocab_size", "1000"},     {"hidden_size", "64"},
                                  {"intermediate_size", "96"}, {"num_hidden_layers", "3"}, {"num_attention_heads", "4"},
                                  {"head_dim", "32"},          {"mask_token_id", "999"},   {NULL, NULL}};
static const pair llada_pairs[] = {{"model_type", "\"llada\""}, {"vocab_size", "1000"},   {"d_model", "64"},
                                   {"n_layers", "3"},           {"n_heads", "4"},         {"mlp_hidden_size", "96"},
                                   {"weight_tying", "false"},   {"mask_token_id", "999"}, {NULL, NULL}};

/* key with value; value NULL: left out; key NULL: as it is. */
static const char *write_config(char *out, size_t out_bytes, const pair *pairs, const char *key, const char *value) {
    size_t used = 0;
    bool replaced = key == NULL;
    out[used++] = '{';
    for (const pair *p = pairs; p->key || !replaced; p->key ? p++ : p) {
        bool last = p->key == NULL, hit = !last && key && strcmp(p->key, key) == 0;
        const char *k = last ? key : p->key, *v = last || hit ? value : p->value;
        if (v) used += (size_t)snprintf(out + used, out_bytes - used, "%s\"%s\":%s", used > 1 ? "," : "", k, v);
        ck_assert_uint_lt(used, out_bytes - 2);
        replaced = replaced || hit || last;
        if (last) break;
    }
    out[used++] = '}';
    out[used] = 0;
    return out;
}

static rf_status parse_changed(const pair *pairs, const char *key, const char *value, rf_text_desc *desc,
                               rf_error *err) {
    char text[2048];
    return parse_texts(write_config(text, sizeof text, pairs, key, value), NULL, desc, err);
}

/* --- built-in shapes ------------------------------------------------------------------------------------------------ */

static int64_t count_params(const rf_text_desc *d) {
    int64_t q = (int64_t)d->num_q_heads * d->head_dim, kv = (int64_t)d->num_kv_heads * d->head_dim;
    int64_t layer = (q + 2 * kv) * d->hidden + q * d->hidden + 3 * d->hidden * d->ffn + 2 * d->hidden;
    if (d->qkv_bias) layer += q + 2 * kv;
    if (d->qk_norm) layer += 2 * d->head_dim;
    return d->num_layers * layer + d->hidden + d->vocab * d->hidden * (d->tied_head ? 1 : 2);
}

START_TEST(built_in_shapes_have_the_published_numbers_of_parameters) {
    static const struct {
        const char *name;
        int64_t num_params; /* of the released checkpoint */
        rf_text_attention attention;
        int shift;
        int32_t mask;
    } cases[] = {
        {"llada-8b", 8015581184, RF_TEXT_BIDIRECTIONAL, 0, 126336},
        {"dream-7b", 7615616512, RF_TEXT_BIDIRECTIONAL, 1, 151666},
        {"sdar-8b", 8190735360, RF_TEXT_BLOCK_CAUSAL, 0, 151669},
        {"sdar-4b", 4022468096, RF_TEXT_BLOCK_CAUSAL, 0, 151669},
        {"llama-3-8b", 8030261248, RF_TEXT_CAUSAL, 1, -1},
        {"llama-3.1-8b", 8030261248, RF_TEXT_CAUSAL, 1, -1},
        {"qwen2.5-7b", 7615616512, RF_TEXT_CAUSAL, 1, -1},
        {"qwen3-8b", 8190735360, RF_TEXT_CAUSAL, 1, -1},
    };
    size_t num = sizeof cases / sizeof *cases;
    for (size_t i = 0; i < num; i++) {
        rf_text_desc d;
        rf_error err = {0};
        ck_assert_str_eq(rf_text_config_builtin_name((int)i), cases[i].name);
        rf_assert_ok(rf_text_config_builtin(&d, cases[i].name, &err), err);
        ck_assert_msg(count_params(&d) == cases[i].num_params, "%s: %lld parameters, the release has %lld",
                      cases[i].name, (long long)count_params(&d), (long long)cases[i].num_params);
        ck_assert_int_eq(d.attention, cases[i].attention);
        ck_assert_int_eq(d.shift, cases[i].shift);
        ck_assert_int_eq(d.mask_id, cases[i].mask);
        ck_assert_int_ge(d.num_eos, 1);
        ck_assert_int_eq(d.block, d.attention == RF_TEXT_BLOCK_CAUSAL ? 4 : 0);
        ck_assert_int_eq(d.rope_scaling.used, strcmp(cases[i].name, "llama-3.1-8b") == 0);
    }
    ck_assert_ptr_null(rf_text_config_builtin_name((int)num));
    ck_assert_ptr_null(rf_text_config_builtin_name(-1));
}
END_TEST

START_TEST(an_unknown_built_in_is_answered_with_the_list) {
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_fails(rf_text_config_builtin(&d, "gpt-2", &err), err, RF_ERR_ARGUMENT, "gpt-2");
    for (int i = 0; rf_text_config_builtin_name(i); i++)
        ck_assert_ptr_nonnull(strstr(err.message, rf_text_config_builtin_name(i)));
    rf_assert_ok(rf_text_config_builtin(&d, "LLaDA-8B", &err), err);
}
END_TEST

/* --- folders -------------------------------------------------------------------------------------------------------- */

START_TEST(every_fixture_folder_is_read) {
    static const struct {
        const char *name, *family;
        int q_heads, kv_heads, head_dim;
        bool qkv_bias, qk_norm, tied;
        rf_text_attention attention;
        int shift, num_eos;
        double eps, theta;
    } cases[] = {
        {"text-llama", "llama", 4, 2, 16, false, false, false, RF_TEXT_CAUSAL, 1, 2, 1e-5, 1e4},
        {"text-llama-tied", "llama", 2, 2, 32, false, false, true, RF_TEXT_CAUSAL, 1, 1, 1e-6, 1e4},
        {"text-qwen2", "qwen2", 4, 2, 16, true, false, false, RF_TEXT_CAUSAL, 1, 2, 1e-6, 1e6},
        {"text-qwen3", "qwen3", 4, 2, 32, false, true, false, RF_TEXT_CAUSAL, 1, 1, 1e-6, 1e6},
        {"text-llada", "llada", 4, 4, 16, false, false, false, RF_TEXT_BIDIRECTIONAL, 0, 1, 1e-5, 5e5},
        {"text-dream", "dream", 2, 1, 32, true, false, false, RF_TEXT_BIDIRECTIONAL, 1, 1, 1e-6, 1e6},
        {"text-sdar", "sdar", 4, 1, 32, false, true, true, RF_TEXT_BLOCK_CAUSAL, 0, 1, 1e-6, 1e6},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[512];
        rf_text_desc d;
        rf_error err = {0};
        snprintf(dir, sizeof dir, "%s/%s", RF_FIXTURE_DIR, cases[i].name);
        rf_assert_ok(rf_text_config_read(&d, dir, &err), err);
        ck_assert_str_eq(d.family, cases[i].family);
        ck_assert_int_eq(d.vocab, 300);
        ck_assert_int_eq(d.hidden, 64);
        ck_assert_int_eq(d.ffn, 96);
        ck_assert_int_eq(d.num_layers, 3);
        ck_assert_int_eq(d.max_positions, 512);
        ck_assert_int_eq(d.num_q_heads, cases[i].q_heads);
        ck_assert_int_eq(d.num_kv_heads, cases[i].kv_heads);
        ck_assert_int_eq(d.head_dim, cases[i].head_dim);
        ck_assert_int_eq(d.qkv_bias, cases[i].qkv_bias);
        ck_assert_int_eq(d.qk_norm, cases[i].qk_norm);
        ck_assert_int_eq(d.tied_head, cases[i].tied);
        ck_assert_int_eq(d.attention, cases[i].attention);
        ck_assert_int_eq(d.shift, cases[i].shift);
        ck_assert_int_eq(d.num_eos, cases[i].num_eos);
        ck_assert_int_eq(d.eos_ids[0], 291);
        ck_assert_double_eq(d.norm_eps, cases[i].eps);
        ck_assert_double_eq(d.rope_theta, cases[i].theta);
        ck_assert_int_eq(d.mask_id, d.attention == RF_TEXT_CAUSAL ? -1 : 290);
        ck_assert_int_eq(d.block, d.attention == RF_TEXT_BLOCK_CAUSAL ? 4 : 0);
        ck_assert_int_eq(d.embedding_rows, strcmp(cases[i].name, "text-llada") == 0 ? 304 : 0);
        ck_assert_int_eq(d.rope_scaling.used, i == 0);
    }
}
END_TEST

START_TEST(scaling_and_generation_settings_are_read) {
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_ok(rf_text_config_read(&d, RF_FIXTURE_DIR "/text-llama", &err), err);
    ck_assert_double_eq(d.rope_scaling.factor, 4.0);
    ck_assert_double_eq(d.rope_scaling.low_factor, 1.0);
    ck_assert_double_eq(d.rope_scaling.high_factor, 4.0);
    ck_assert_int_eq(d.rope_scaling.original, 64);
    ck_assert_int_eq(d.eos_ids[1], 292);
    rf_assert_ok(rf_text_config_read(&d, RF_FIXTURE_DIR "/text-qwen2", &err), err);
    ck_assert_int_eq(d.eos_ids[1], 293); /* config first, then what generation_config.json adds */
    ck_assert_int_eq(d.pad_id, 289);
    ck_assert_int_eq(d.bos_id, 288);
}
END_TEST

START_TEST(a_folder_without_a_config_is_refused) {
    char dir[256], path[300];
    rf_text_desc d;
    rf_error err = {0};
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    rf_assert_fails(rf_text_config_read(&d, dir, &err), err, RF_ERR_MISSING, "config.json");
    snprintf(path, sizeof path, "%s/config.json", dir);
    rf_assert_ok(rf_file_write(path, "{\"model_type\":", 14, &err), err);
    rf_assert_fails(rf_text_config_read(&d, dir, &err), err, RF_ERR_FORMAT, "config.json");
    rf_temp_dir_remove(dir);
}
END_TEST

/* --- keys ----------------------------------------------------------------------------------------------------------- */

START_TEST(rope_is_read_from_every_place_where_it_is_kept) {
    static const char scaled[] = "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4,"
                                 "\"original_max_position_embeddings\":8192}";
    static const char old_name[] = "{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4}";
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_ok(parse_changed(qwen3_pairs, "rope_theta", NULL, &d, &err), err);
    ck_assert_double_eq(d.rope_theta, 10000.0);
    rf_assert_ok(
        parse_changed(qwen3_pairs, "rope_parameters", "{\"rope_theta\":1000000,\"rope_type\":\"default\"}", &d, &err),
        err);
    ck_assert_double_eq(d.rope_theta, 1e6);
    ck_assert(!d.rope_scaling.used);
    rf_assert_ok(parse_changed(qwen3_pairs, "rope_scaling", scaled, &d, &err), err);
    ck_assert(d.rope_scaling.used);
    ck_assert_int_eq(d.rope_scaling.original, 8192);
    ck_assert_double_eq(d.rope_theta, 1e6);
    rf_assert_ok(parse_changed(qwen3_pairs, "rope_scaling", old_name, &d, &err), err);
    ck_assert_int_eq(d.rope_scaling.original, d.max_positions); /* as transformers falls back */
    rf_assert_ok(parse_changed(qwen3_pairs, "rope_scaling", "null", &d, &err), err);
    rf_assert_ok(parse_changed(qwen3_pairs, "rope_scaling", "{\"type\":\"default\"}", &d, &err), err);
    ck_assert(!d.rope_scaling.used);
}
END_TEST

START_TEST(the_end_of_text_may_be_a_number_or_a_list) {
    char text[2048];
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_ok(parse_changed(qwen3_pairs, "eos_token_id", "null", &d, &err), err);
    ck_assert_int_eq(d.num_eos, 0);
    rf_assert_ok(parse_changed(qwen3_pairs, "eos_token_id", "[5, 9, 5]", &d, &err), err);
    ck_assert_int_eq(d.num_eos, 2);
    write_config(text, sizeof text, qwen3_pairs, NULL, NULL);
    rf_assert_ok(parse_texts(text, "{\"eos_token_id\":[8,7,6],\"pad_token_id\":3,\"bos_token_id\":2}", &d, &err), err);
    ck_assert_int_eq(d.num_eos, 3);
    ck_assert_int_eq(d.eos_ids[0], 7);
    ck_assert_int_eq(d.eos_ids[1], 8);
    ck_assert_int_eq(d.eos_ids[2], 6);
    ck_assert_int_eq(d.pad_id, 3);
    ck_assert_int_eq(d.bos_id, 2);
    rf_assert_ok(parse_changed(qwen3_pairs, "pad_token_id", "-1", &d, &err), err);
    ck_assert_int_eq(d.pad_id, -1);
}
END_TEST

START_TEST(defaults_are_those_of_the_families) {
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_ok(parse_changed(qwen3_pairs, "head_dim", NULL, &d, &err), err);
    ck_assert_int_eq(d.head_dim, 128);
    ck_assert_double_eq(d.norm_eps, 1e-6);
    ck_assert_int_eq(d.max_positions, 32768);
    rf_assert_ok(parse_changed(qwen3_pairs, "num_key_value_heads", "null", &d, &err), err);
    ck_assert_int_eq(d.num_kv_heads, 4);

    rf_assert_ok(parse_changed(sdar_pairs, NULL, NULL, &d, &err), err);
    ck_assert_int_eq(d.block, 4);
    rf_assert_ok(parse_changed(sdar_pairs, "block_size", "16", &d, &err), err);
    ck_assert_int_eq(d.block, 16);
    rf_assert_ok(parse_changed(sdar_pairs, "block_length", "8", &d, &err), err);
    ck_assert_int_eq(d.block, 8);

    rf_assert_ok(parse_changed(llada_pairs, "n_kv_heads", "null", &d, &err), err);
    ck_assert_int_eq(d.num_kv_heads, 4);
    ck_assert_int_eq(d.embedding_rows, 1000);
    rf_assert_ok(parse_changed(llada_pairs, "multi_query_attention", "true", &d, &err), err);
    ck_assert_int_eq(d.num_kv_heads, 1);
    rf_assert_ok(parse_changed(llada_pairs, "mlp_hidden_size", NULL, &d, &err), err);
    ck_assert_int_eq(d.ffn, 256);
    rf_assert_ok(parse_changed(llada_pairs, "weight_tying", NULL, &d, &err), err);
    ck_assert(d.tied_head);
    rf_assert_ok(parse_changed(llada_pairs, "include_qkv_bias", "true", &d, &err), err);
    ck_assert(d.qkv_bias);
}
END_TEST

START_TEST(released_ids_that_files_leave_out_are_known) {
    char text[2048];
    pair big[sizeof sdar_pairs / sizeof *sdar_pairs];
    rf_text_desc d;
    rf_error err = {0};
    memcpy(big, sdar_pairs, sizeof big);
    big[1].value = "151936";
    rf_assert_ok(parse_changed(big, "mask_token_id", NULL, &d, &err), err);
    ck_assert_int_eq(d.mask_id, 151669);
    snprintf(text, sizeof text, "%s",
             "{\"model_type\":\"llada\",\"vocab_size\":126464,\"d_model\":64,\"n_layers\":1,\"n_heads\":2,"
             "\"mask_token_id\":126336,\"eos_token_id\":126081}");
    rf_assert_ok(parse_texts(text, NULL, &d, &err), err);
    ck_assert_int_eq(d.num_eos, 2);
    ck_assert_int_eq(d.eos_ids[1], 126348);
}
END_TEST

START_TEST(a_family_is_found_by_its_architecture_too) {
    rf_text_desc d;
    rf_error err = {0};
    pair pairs[sizeof qwen3_pairs / sizeof *qwen3_pairs];
    memcpy(pairs, qwen3_pairs, sizeof pairs);
    pairs[0] = (pair){"architectures", "[\"Qwen3ForCausalLM\"]"};
    rf_assert_ok(parse_changed(pairs, NULL, NULL, &d, &err), err);
    ck_assert_str_eq(d.family, "qwen3");
}
END_TEST

/* Windows that Qwen's files describe and nobody uses. */
START_TEST(windows_that_are_off_do_no_harm) {
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_ok(parse_changed(qwen3_pairs, "sliding_window", "4096", &d, &err), err);
    rf_assert_ok(parse_changed(qwen3_pairs, "layer_types", "[\"full_attention\",\"full_attention\"]", &d, &err), err);
    rf_assert_ok(parse_texts("{\"model_type\":\"qwen2\",\"vocab_size\":10,\"hidden_size\":8,\"intermediate_size\":8,"
                             "\"num_hidden_layers\":3,\"num_attention_heads\":2,\"use_sliding_window\":true,"
                             "\"sliding_window\":64,\"max_window_layers\":3}",
                             NULL, &d, &err),
                 err);
    rf_assert_fails(parse_texts("{\"model_type\":\"qwen2\",\"vocab_size\":10,\"hidden_size\":8,\"intermediate_size\":8,"
                                "\"num_hidden_layers\":3,\"num_attention_heads\":2,\"use_sliding_window\":true,"
                                "\"sliding_window\":64,\"max_window_layers\":2}",
                                NULL, &d, &err),
                    err, RF_ERR_UNSUPPORTED, "sliding_window");
}
END_TEST

/* --- refusals ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *key, *value; /* value NULL: the key is left out */
    rf_status status;
    const char *message;
} refusal;

static void check_refusals(const pair *pairs, const refusal *cases, size_t num) {
    for (size_t i = 0; i < num; i++) {
        rf_text_desc d = {.vocab = 1};
        rf_error err = {0};
        rf_status st = parse_changed(pairs, cases[i].key, cases[i].value, &d, &err);
        ck_assert_msg(st == cases[i].status && strstr(err.message, cases[i].message),
                      "%s = %s: wanted %s with '%s', got %s: %s", cases[i].key,
                      cases[i].value ? cases[i].value : "(absent)", rf_status_name(cases[i].status), cases[i].message,
                      rf_status_name(st), err.message);
        ck_assert_msg(strstr(err.message, "config.json") && !strchr(err.message, '\n'), "%s", err.message);
        ck_assert_int_eq(d.vocab, 0); /* nothing half-read is left */
    }
}

START_TEST(wrong_transformers_configs_are_refused_by_key) {
    static const refusal cases[] = {
        {"model_type", "\"mixtral\"", RF_ERR_UNSUPPORTED, "mixtral"},
        {"model_type", "\"qwen3_moe\"", RF_ERR_UNSUPPORTED, "supported are llama"},
        {"model_type", "7", RF_ERR_CONFIG, "model_type"},
        {"model_type", NULL, RF_ERR_MISSING, "neither model_type nor architectures"},
        {"num_experts", "64", RF_ERR_UNSUPPORTED, "mixtures of experts"},
        {"num_local_experts", "8", RF_ERR_UNSUPPORTED, "mixtures of experts"},
        {"quantization_config", "{}", RF_ERR_UNSUPPORTED, "quantised"},
        {"vocab_size", NULL, RF_ERR_MISSING, "vocab_size"},
        {"vocab_size", "0", RF_ERR_CONFIG, "vocab_size"},
        {"vocab_size", "1e30", RF_ERR_CONFIG, "vocab_size"},
        {"vocab_size", "9000000000", RF_ERR_CONFIG, "vocab_size"},
        {"hidden_size", "-64", RF_ERR_CONFIG, "hidden_size"},
        {"hidden_size", "\"64\"", RF_ERR_CONFIG, "hidden_size"},
        {"hidden_size", "64.5", RF_ERR_CONFIG, "hidden_size"},
        {"intermediate_size", NULL, RF_ERR_MISSING, "intermediate_size"},
        {"num_hidden_layers", "0", RF_ERR_CONFIG, "num_hidden_layers"},
        {"num_hidden_layers", "100000", RF_ERR_CONFIG, "num_hidden_layers"},
        {"num_attention_heads", NULL, RF_ERR_MISSING, "num_attention_heads"},
        {"num_key_value_heads", "3", RF_ERR_CONFIG, "4 query heads do not divide into 3"},
        {"num_key_value_heads", "8", RF_ERR_CONFIG, "number of key heads is 8"},
        {"head_dim", "33", RF_ERR_CONFIG, "odd"},
        {"head_dim", "100000", RF_ERR_CONFIG, "head_dim"},
        {"max_position_embeddings", "0", RF_ERR_CONFIG, "max_position_embeddings"},
        {"max_position_embeddings", "1e15", RF_ERR_CONFIG, "max_position_embeddings"},
        {"rms_norm_eps", "0", RF_ERR_CONFIG, "rms_norm_eps"},
        {"rms_norm_eps", "1", RF_ERR_CONFIG, "rms_norm_eps"},
        {"rope_theta", "0.5", RF_ERR_CONFIG, "rope_theta"},
        {"rope_theta", "[]", RF_ERR_CONFIG, "rope_theta"},
        {"rope_parameters", "{\"rope_theta\":5}", RF_ERR_CONFIG, "rope_theta is 1e+06, but 5"},
        {"rope_parameters", "[]", RF_ERR_CONFIG, "rope_parameters is not an object"},
        {"rope_parameters", "{\"full_attention\":{\"rope_theta\":5}}", RF_ERR_UNSUPPORTED, "full_attention"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":4}", RF_ERR_UNSUPPORTED, "\"yarn\""},
        {"rope_scaling", "{\"rope_type\":\"linear\",\"factor\":4}", RF_ERR_UNSUPPORTED, "\"linear\""},
        {"rope_scaling", "{\"rope_type\":\"llama3\"}", RF_ERR_MISSING, "factor"},
        {"rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":0,\"low_freq_factor\":1,\"high_freq_factor\":4}",
         RF_ERR_CONFIG, "factor"},
        {"rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4}",
         RF_ERR_CONFIG, "low < high"},
        {"partial_rotary_factor", "0.5", RF_ERR_UNSUPPORTED, "partial_rotary_factor"},
        {"rope_scaling", "{\"rope_type\":\"default\",\"partial_rotary_factor\":0.5}", RF_ERR_UNSUPPORTED,
         "partial_rotary_factor"},
        {"hidden_act", "\"gelu\"", RF_ERR_UNSUPPORTED, "gelu"},
        {"attention_bias", "true", RF_ERR_UNSUPPORTED, "attention_bias"},
        {"mlp_bias", "true", RF_ERR_UNSUPPORTED, "mlp_bias"},
        {"use_mrope", "true", RF_ERR_UNSUPPORTED, "use_mrope"},
        {"layer_types", "[\"full_attention\",\"sliding_attention\"]", RF_ERR_UNSUPPORTED, "sliding_attention"},
        {"layer_types", "\"all\"", RF_ERR_CONFIG, "layer_types"},
        {"tie_word_embeddings", "1", RF_ERR_CONFIG, "tie_word_embeddings"},
        {"eos_token_id", "1000", RF_ERR_CONFIG, "1000"},
        {"eos_token_id", "-1", RF_ERR_CONFIG, "eos_token_id"},
        {"eos_token_id", "1.5", RF_ERR_CONFIG, "1.5"},
        {"eos_token_id", "\"</s>\"", RF_ERR_CONFIG, "eos_token_id"},
        {"eos_token_id", "[1,\"a\"]", RF_ERR_CONFIG, "eos_token_id"},
        {"eos_token_id", "[1,2,3,4,5,6,7,8,9]", RF_ERR_UNSUPPORTED, "more than 8"},
        {"bos_token_id", "1000", RF_ERR_CONFIG, "first token 1000"},
        {"pad_token_id", "1000", RF_ERR_CONFIG, "padding token 1000"},
        {"pad_token_id", "-5", RF_ERR_CONFIG, "pad_token_id"},
    };
    check_refusals(qwen3_pairs, cases, sizeof cases / sizeof *cases);
}
END_TEST

START_TEST(wrong_diffusion_configs_are_refused_by_key) {
    static const refusal sdar[] = {
        {"mask_token_id", NULL, RF_ERR_MISSING, "mask_token_id"},
        {"mask_token_id", "1000", RF_ERR_CONFIG, "mask token 1000"},
        {"eos_token_id", "999", RF_ERR_CONFIG, "both mask and end of text"},
        {"block_size", "0", RF_ERR_CONFIG, "block_size"},
        {"block_length", "100000", RF_ERR_CONFIG, "block_length"},
    };
    static const refusal llada[] = {
        {"d_model", "65", RF_ERR_CONFIG, "65 in 4 heads"},
        {"d_model", NULL, RF_ERR_MISSING, "d_model"},
        {"n_heads", "0", RF_ERR_CONFIG, "n_heads"},
        {"mask_token_id", NULL, RF_ERR_MISSING, "mask_token_id"},
        {"embedding_size", "999", RF_ERR_CONFIG, "less than vocab_size"},
        {"block_type", "\"sequential\"", RF_ERR_UNSUPPORTED, "sequential"},
        {"layer_norm_type", "\"default\"", RF_ERR_UNSUPPORTED, "layer_norm_type"},
        {"activation_type", "\"swiglu\"", RF_ERR_UNSUPPORTED, "swiglu"},
        {"include_bias", "true", RF_ERR_UNSUPPORTED, "include_bias"},
        {"bias_for_layer_norm", "true", RF_ERR_UNSUPPORTED, "bias_for_layer_norm"},
        {"layer_norm_with_affine", "false", RF_ERR_UNSUPPORTED, "layer_norm_with_affine"},
        {"attention_layer_norm", "true", RF_ERR_UNSUPPORTED, "attention_layer_norm"},
        {"alibi", "true", RF_ERR_UNSUPPORTED, "alibi"},
        {"rope", "false", RF_ERR_UNSUPPORTED, "rope"},
        {"input_emb_norm", "true", RF_ERR_UNSUPPORTED, "input_emb_norm"},
        {"scale_logits", "true", RF_ERR_UNSUPPORTED, "scale_logits"},
        {"clip_qkv", "8.0", RF_ERR_UNSUPPORTED, "clip_qkv"},
        {"block_group_size", "2", RF_ERR_UNSUPPORTED, "block_group_size"},
        {"mlp_ratio", "-1", RF_ERR_CONFIG, "mlp_ratio"},
        {"n_kv_heads", "3", RF_ERR_CONFIG, "do not divide"},
    };
    check_refusals(sdar_pairs, sdar, sizeof sdar / sizeof *sdar);
    check_refusals(llada_pairs, llada, sizeof llada / sizeof *llada);
}
END_TEST

START_TEST(other_texts_are_refused) {
    rf_text_desc d;
    rf_error err = {0};
    rf_assert_fails(parse_texts("[]", NULL, &d, &err), err, RF_ERR_CONFIG, "expected a JSON object");
    rf_assert_fails(parse_texts("{}", NULL, &d, &err), err, RF_ERR_MISSING, "architectures");
    rf_assert_fails(parse_texts("{\"architectures\":[]}", NULL, &d, &err), err, RF_ERR_MISSING, "architectures");
    rf_assert_fails(parse_texts("{\"architectures\":[\"GPT2LMHeadModel\"]}", NULL, &d, &err), err, RF_ERR_UNSUPPORTED,
                    "GPT2LMHeadModel");
    rf_assert_fails(
        parse_texts("{\"model_type\":\"llama\",\"vocab_size\":10,\"hidden_size\":10,\"intermediate_size\":8,"
                    "\"num_hidden_layers\":1,\"num_attention_heads\":4}",
                    NULL, &d, &err),
        err, RF_ERR_CONFIG, "hidden_size 10 is not a multiple");
    rf_assert_fails(parse_texts("{\"model_type\":\"llama\",\"vocab_size\":10,\"hidden_size\":8,\"intermediate_size\":8,"
                                "\"num_hidden_layers\":1,\"num_attention_heads\":4,\"sliding_window\":64}",
                                NULL, &d, &err),
                    err, RF_ERR_UNSUPPORTED, "sliding_window");
    char text[2048];
    write_config(text, sizeof text, qwen3_pairs, NULL, NULL);
    rf_assert_fails(parse_texts(text, "[1]", &d, &err), err, RF_ERR_CONFIG, "generation.json");
    rf_assert_fails(parse_texts(text, "{\"eos_token_id\":\"x\"}", &d, &err), err, RF_ERR_CONFIG, "generation.json");
}
END_TEST

START_TEST(inconsistent_descriptions_are_refused) {
    rf_text_desc good, d;
    rf_error err = {0};
    rf_assert_ok(rf_text_config_builtin(&good, "sdar-8b", &err), err);
    d = good, d.block = 0;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "tokens of a block");
    d = good, d.attention = RF_TEXT_BIDIRECTIONAL;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "tokens of a block");
    d = good, d.attention = (rf_text_attention)7;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "attention kind 7");
    d = good, d.shift = 2;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "logit shift");
    d = good, d.mask_id = -1;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "mask token -1");
    d = good, d.num_eos = 9;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "end-of-text");
    d = good, d.eos_ids[0] = -3;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "token -3");
    d = good, d.embedding_rows = d.vocab - 1;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "rows of the embedding");
    d = good, d.norm_eps = NAN;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "norm epsilon");
    d = good, d.rope_theta = INFINITY;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "rope theta");
    d = good, d.rope_scaling.used = true;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "rope scaling");
    d = good, d.max_positions = 0;
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "positions");
    rf_assert_ok(rf_text_config_builtin(&good, "qwen3-8b", &err), err);
    d = good, d.shift = 0; /* a causal model predicts the next token */
    rf_assert_fails(rf_text_desc_check(&d, &err), err, RF_ERR_CONFIG, "logit shift");
}
END_TEST

START_TEST(every_failing_allocation_is_survived) {
    rf_text_desc d;
    rf_error err = {0};
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t nth = 1;; nth++) {
        ck_assert_uint_lt(nth, 10000);
        rf_memory_fail_nth(nth);
        rf_status st = rf_text_config_read(&d, RF_FIXTURE_DIR "/text-qwen2", &err);
        rf_memory_fail_nth(0);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_msg(st == RF_ERR_MEMORY, "%llu: %s: %s", (unsigned long long)nth, rf_status_name(st), err.message);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dlm/config");
    TCase *tc = tcase_create("config");
    tcase_add_test(tc, built_in_shapes_have_the_published_numbers_of_parameters);
    tcase_add_test(tc, an_unknown_built_in_is_answered_with_the_list);
    tcase_add_test(tc, every_fixture_folder_is_read);
    tcase_add_test(tc, scaling_and_generation_settings_are_read);
    tcase_add_test(tc, a_folder_without_a_config_is_refused);
    tcase_add_test(tc, rope_is_read_from_every_place_where_it_is_kept);
    tcase_add_test(tc, the_end_of_text_may_be_a_number_or_a_list);
    tcase_add_test(tc, defaults_are_those_of_the_families);
    tcase_add_test(tc, released_ids_that_files_leave_out_are_known);
    tcase_add_test(tc, a_family_is_found_by_its_architecture_too);
    tcase_add_test(tc, windows_that_are_off_do_no_harm);
    tcase_add_test(tc, wrong_transformers_configs_are_refused_by_key);
    tcase_add_test(tc, wrong_diffusion_configs_are_refused_by_key);
    tcase_add_test(tc, other_texts_are_refused);
    tcase_add_test(tc, inconsistent_descriptions_are_refused);
    tcase_add_test(tc, every_failing_allocation_is_survived);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
