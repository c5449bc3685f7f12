/* dlm/config.c - config.json of the text families to one description.
 *
 * Sources  keys and defaults: transformers' configuration classes of Llama, Qwen2 and Qwen3; LLaDA's configuration_llada (OLMo's keys);
 *          Dream's configuration_Dream; SDAR's configuration_sdar. transformers 5 keeps rope_theta inside rope_parameters. */
#include "dlm/config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "core/file.h"
#include "core/memory.h"

/* Bounds of one dimension: products of two stay far below 2^63 and a row fits a staging buffer. */
#define MAX_VOCAB     ((int64_t)1 << 22)
#define MAX_HIDDEN    ((int64_t)1 << 16)
#define MAX_FFN       ((int64_t)1 << 18)
#define MAX_LAYERS    1024
#define MAX_HEADS     1024
#define MAX_HEAD_DIM  256
#define MAX_POSITIONS ((int64_t)1 << 21)
#define MAX_BLOCK     4096

#define LLADA_EOS          126081 /* <|endoftext|> */
#define LLADA_EOT          126348 /* <|eot_id|>: ends a turn; the config lists only the former */
#define SDAR_DEFAULT_MASK  151669 /* the released scripts pass it by hand */
#define SDAR_DEFAULT_BLOCK 4      /* what the released models were trained with */

typedef struct {
    const rf_json *doc;
    const rf_json_value *root;
    rf_error *err;
} reader;

static rf_status need_int(const reader *r, const char *key, int64_t max, int64_t *out) {
    return rf_json_get_int(r->doc, r->root, key, 1, max, out, r->err);
}

static rf_status opt_int(const reader *r, const char *key, int64_t max, int64_t absent, int64_t *out) {
    return rf_json_opt_int(r->doc, r->root, key, 1, max, absent, out, r->err);
}

/* A switch that may only have one position, which is also what an absent key means. */
static rf_status expect_bool(const reader *r, const char *key, bool want) {
    bool value = want;
    RF_TRY(rf_json_opt_bool(r->doc, r->root, key, want, &value, r->err));
    if (value != want)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is %s, only %s is supported", rf_json_name(r->doc), key,
                       value ? "true" : "false", want ? "true" : "false");
    return RF_OK;
}

static rf_status expect_string(const reader *r, const char *key, const char *want) {
    const char *value = NULL;
    RF_TRY(rf_json_opt_string(r->doc, r->root, key, want, &value, r->err));
    if (strcmp(value, want) != 0)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is \"%s\", only \"%s\" is supported", rf_json_name(r->doc),
                       key, value, want);
    return RF_OK;
}

static rf_status expect_absent(const reader *r, const char *key, const char *what) {
    if (rf_json_has(r->root, key))
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is set: %s not supported", rf_json_name(r->doc), key, what);
    return RF_OK;
}

static rf_status expect_silu(const reader *r, const char *key) {
    const char *value = NULL;
    RF_TRY(rf_json_opt_string(r->doc, r->root, key, "silu", &value, r->err));
    if (strcmp(value, "silu") != 0 && strcmp(value, "swish") != 0)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is \"%s\", only \"silu\" is supported", rf_json_name(r->doc),
                       key, value);
    return RF_OK;
}

/* What no family here has, whatever the keys are called. */
static rf_status refuse_foreign(const reader *r) {
    static const char *const experts[] = {"num_experts", "num_local_experts", "n_routed_experts"};
    for (size_t i = 0; i < sizeof experts / sizeof *experts; i++) {
        int64_t num = 0;
        RF_TRY(rf_json_opt_int(r->doc, r->root, experts[i], 0, 1 << 20, 0, &num, r->err));
        if (num > 1)
            return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is %lld: mixtures of experts are not supported",
                           rf_json_name(r->doc), experts[i], (long long)num);
    }
    return expect_absent(r, "quantization_config", "quantised checkpoints are");
}

/* --- special tokens ------------------------------------------------------------------------------------------------- */

static rf_status add_eos(const reader *r, rf_text_desc *d, double id) {
    int max = (int)(sizeof d->eos_ids / sizeof *d->eos_ids);
    if (!(id >= 0 && id <= INT32_MAX) || id != floor(id))
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: eos_token_id holds %g, expected token ids", rf_json_name(r->doc),
                       id);
    for (int i = 0; i < d->num_eos; i++)
        if (d->eos_ids[i] == (int32_t)id) return RF_OK;
    if (d->num_eos == max)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: eos_token_id gives more than %d different ids",
                       rf_json_name(r->doc), max);
    d->eos_ids[d->num_eos++] = (int32_t)id;
    return RF_OK;
}

/* A number or a list of them; absent or null: none. */
static rf_status read_eos(const reader *r, rf_text_desc *d) {
    const rf_json_value *v = rf_json_get(r->root, "eos_token_id");
    if (!rf_json_has(r->root, "eos_token_id")) return RF_OK;
    if (rf_json_is_number(v)) return add_eos(r, d, rf_json_number(v));
    if (!rf_json_is_array(v))
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: eos_token_id is neither a number nor a list", rf_json_name(r->doc));
    for (const rf_json_value *i = rf_json_first(v); i; i = rf_json_next(i)) RF_TRY(add_eos(r, d, rf_json_number(i)));
    return RF_OK;
}

/* -1 in a file means none as well. An id that is known already stays. */
static rf_status read_id(const reader *r, const char *key, int32_t *out) {
    int64_t id = -1;
    RF_TRY(rf_json_opt_int(r->doc, r->root, key, -1, INT32_MAX, -1, &id, r->err));
    if (*out < 0) *out = (int32_t)id;
    return RF_OK;
}

static rf_status read_special(const reader *r, rf_text_desc *d) {
    RF_TRY(read_eos(r, d));
    RF_TRY(read_id(r, "bos_token_id", &d->bos_id));
    return read_id(r, "pad_token_id", &d->pad_id);
}

/* --- rotary embedding ----------------------------------------------------------------------------------------------- */

static rf_status read_rope_object(const reader *r, const char *key, rf_text_desc *d, bool *has_theta) {
    const rf_json_value *o = rf_json_get(r->root, key);
    const char *name = rf_json_name(r->doc), *type = NULL;
    if (!rf_json_has(r->root, key)) return RF_OK;
    if (!rf_json_is_object(o)) return rf_fail(r->err, RF_ERR_CONFIG, "%s: %s is not an object", name, key);
    for (const rf_json_value *m = rf_json_first(o); m; m = rf_json_next(m))
        if (rf_json_is_object(m))
            return rf_fail(r->err, RF_ERR_UNSUPPORTED,
                           "%s: %s differs between kinds of layers (\"%s\"), which is not "
                           "supported",
                           name, key, rf_json_key(m));
    if (rf_json_has(o, "rope_theta")) {
        double theta;
        RF_TRY(rf_json_get_double(r->doc, o, "rope_theta", 1.0, 1e12, &theta, r->err));
        if (*has_theta && theta != d->rope_theta)
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: rope_theta is %g, but %g inside %s", name, d->rope_theta, theta,
                           key);
        d->rope_theta = theta;
        *has_theta = true;
    }
    double partial;
    RF_TRY(rf_json_opt_double(r->doc, o, "partial_rotary_factor", 0.0, 1.0, 1.0, &partial, r->err));
    if (partial != 1.0)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: partial_rotary_factor is %g, only 1 is supported", name,
                       partial);
    RF_TRY(rf_json_opt_string(r->doc, o, rf_json_has(o, "rope_type") ? "rope_type" : "type", "default", &type, r->err));
    if (strcmp(type, "default") == 0) return RF_OK;
    if (strcmp(type, "llama3") != 0)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: rope type \"%s\" of %s; supported are default and llama3", name,
                       type, key);
    d->rope_scaling.used = true;
    RF_TRY(rf_json_get_double(r->doc, o, "factor", 1.0, 1e6, &d->rope_scaling.factor, r->err));
    RF_TRY(rf_json_get_double(r->doc, o, "low_freq_factor", 1e-6, 1e6, &d->rope_scaling.low_factor, r->err));
    RF_TRY(rf_json_get_double(r->doc, o, "high_freq_factor", 1e-6, 1e6, &d->rope_scaling.high_factor, r->err));
    return rf_json_opt_int(r->doc, o, "original_max_position_embeddings", 1, MAX_POSITIONS, d->max_positions,
                           &d->rope_scaling.original, r->err);
}

static rf_status read_rope(const reader *r, rf_text_desc *d) {
    bool has_theta = rf_json_has(r->root, "rope_theta");
    double partial;
    RF_TRY(rf_json_opt_double(r->doc, r->root, "rope_theta", 1.0, 1e12, 10000.0, &d->rope_theta, r->err));
    RF_TRY(rf_json_opt_double(r->doc, r->root, "partial_rotary_factor", 0.0, 1.0, 1.0, &partial, r->err));
    if (partial != 1.0)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: partial_rotary_factor is %g, only 1 is supported",
                       rf_json_name(r->doc), partial);
    if (rf_json_has(r->root, "rope_parameters")) return read_rope_object(r, "rope_parameters", d, &has_theta);
    return read_rope_object(r, "rope_scaling", d, &has_theta);
}

/* Windows count only where they are switched on; Qwen's files carry a width that nobody uses. */
static rf_status refuse_windows(const reader *r, bool has_switch, int64_t num_layers) {
    bool on = !has_switch;
    int64_t first = 0;
    const char *name = rf_json_name(r->doc);
    if (has_switch) {
        RF_TRY(rf_json_opt_bool(r->doc, r->root, "use_sliding_window", false, &on, r->err));
        RF_TRY(rf_json_opt_int(r->doc, r->root, "max_window_layers", 0, INT32_MAX, 28, &first, r->err));
    }
    const rf_json_value *types = rf_json_get(r->root, "layer_types");
    if (rf_json_has(r->root, "layer_types")) {
        if (!rf_json_is_array(types)) return rf_fail(r->err, RF_ERR_CONFIG, "%s: layer_types is not a list", name);
        for (const rf_json_value *t = rf_json_first(types); t; t = rf_json_next(t)) {
            const char *type = rf_json_string(t);
            if (type == NULL || strcmp(type, "full_attention") != 0)
                return rf_fail(r->err, RF_ERR_UNSUPPORTED,
                               "%s: layer_types has \"%s\", only \"full_attention\" is supported", name,
                               type ? type : "something that is no text");
        }
        return RF_OK;
    }
    if (on && first < num_layers && rf_json_has(r->root, "sliding_window"))
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: sliding_window is on, windows are not supported", name);
    return RF_OK;
}

/* --- families ------------------------------------------------------------------------------------------------------- */

/* What a family in transformers' key names fixes by its name. */
typedef struct {
    rf_text_attention attention;
    int shift;
    bool qkv_bias, qk_norm;
    bool bias_switch;   /* attention_bias exists and would put one on the output projection too */
    bool window_switch; /* use_sliding_window exists */
    int head_dim;       /* where the key is absent; 0: hidden / heads */
    int64_t positions;  /* where the key is absent */
} hf_traits;

static const hf_traits llama_traits = {.shift = 1, .bias_switch = true, .positions = 2048};
static const hf_traits qwen2_traits = {.shift = 1, .qkv_bias = true, .window_switch = true, .positions = 32768};
static const hf_traits qwen3_traits = {
    .shift = 1, .qk_norm = true, .bias_switch = true, .window_switch = true, .head_dim = 128, .positions = 32768};
static const hf_traits dream_traits = {
    .attention = RF_TEXT_BIDIRECTIONAL, .shift = 1, .qkv_bias = true, .window_switch = true, .positions = 32768};
static const hf_traits sdar_traits = {.attention = RF_TEXT_BLOCK_CAUSAL,
                                      .qk_norm = true,
                                      .bias_switch = true,
                                      .window_switch = true,
                                      .head_dim = 128,
                                      .positions = 32768};

static rf_status read_hf(const reader *r, const hf_traits *traits, rf_text_desc *d) {
    int64_t layers, heads, kv_heads, head_dim;
    RF_TRY(need_int(r, "vocab_size", MAX_VOCAB, &d->vocab));
    RF_TRY(need_int(r, "hidden_size", MAX_HIDDEN, &d->hidden));
    RF_TRY(need_int(r, "intermediate_size", MAX_FFN, &d->ffn));
    RF_TRY(need_int(r, "num_hidden_layers", MAX_LAYERS, &layers));
    RF_TRY(need_int(r, "num_attention_heads", MAX_HEADS, &heads));
    RF_TRY(opt_int(r, "num_key_value_heads", MAX_HEADS, heads, &kv_heads));
    RF_TRY(opt_int(r, "head_dim", MAX_HEAD_DIM, traits->head_dim, &head_dim));
    RF_TRY(opt_int(r, "max_position_embeddings", MAX_POSITIONS, traits->positions, &d->max_positions));
    if (head_dim == 0) {
        if (d->hidden % heads != 0)
            return rf_fail(r->err, RF_ERR_CONFIG,
                           "%s: hidden_size %lld is not a multiple of num_attention_heads %lld and head_dim is absent",
                           rf_json_name(r->doc), (long long)d->hidden, (long long)heads);
        head_dim = d->hidden / heads;
    }
    if (head_dim > MAX_HEAD_DIM)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: heads of %lld, at most %d are supported", rf_json_name(r->doc),
                       (long long)head_dim, MAX_HEAD_DIM);
    d->num_layers = (int)layers;
    d->num_q_heads = (int)heads;
    d->num_kv_heads = (int)kv_heads;
    d->head_dim = (int)head_dim;
    d->attention = traits->attention;
    d->shift = traits->shift;
    d->qkv_bias = traits->qkv_bias;
    d->qk_norm = traits->qk_norm;
    RF_TRY(rf_json_opt_double(r->doc, r->root, "rms_norm_eps", 1e-12, 0.1, 1e-6, &d->norm_eps, r->err));
    RF_TRY(rf_json_opt_bool(r->doc, r->root, "tie_word_embeddings", false, &d->tied_head, r->err));
    RF_TRY(expect_silu(r, "hidden_act"));
    RF_TRY(expect_bool(r, "mlp_bias", false));
    if (traits->bias_switch) RF_TRY(expect_bool(r, "attention_bias", false));
    RF_TRY(expect_bool(r, "use_mrope", false));
    RF_TRY(refuse_windows(r, traits->window_switch, layers));
    return read_rope(r, d);
}

static rf_status read_llama(const reader *r, rf_text_desc *d) {
    return read_hf(r, &llama_traits, d);
}
static rf_status read_qwen2(const reader *r, rf_text_desc *d) {
    return read_hf(r, &qwen2_traits, d);
}
static rf_status read_qwen3(const reader *r, rf_text_desc *d) {
    return read_hf(r, &qwen3_traits, d);
}

static rf_status read_mask(const reader *r, rf_text_desc *d) {
    int64_t id;
    RF_TRY(rf_json_get_int(r->doc, r->root, "mask_token_id", 0, INT32_MAX, &id, r->err));
    d->mask_id = (int32_t)id;
    return RF_OK;
}

static rf_status read_dream(const reader *r, rf_text_desc *d) {
    RF_TRY(read_hf(r, &dream_traits, d));
    return read_mask(r, d);
}

static rf_status read_sdar(const reader *r, rf_text_desc *d) {
    int64_t block;
    RF_TRY(read_hf(r, &sdar_traits, d));
    RF_TRY(opt_int(r, rf_json_has(r->root, "block_size") ? "block_size" : "block_length", MAX_BLOCK, SDAR_DEFAULT_BLOCK,
                   &block));
    d->block = (int32_t)block;
    if (rf_json_has(r->root, "mask_token_id") || d->vocab <= SDAR_DEFAULT_MASK) return read_mask(r, d);
    d->mask_id = SDAR_DEFAULT_MASK;
    return RF_OK;
}

/* OLMo's keys, of which LLaDA uses one setting each. */
static rf_status read_llada(const reader *r, rf_text_desc *d) {
    int64_t layers, heads, kv_heads, ffn;
    double ratio;
    bool multi_query;
    const char *name = rf_json_name(r->doc);
    RF_TRY(need_int(r, "vocab_size", MAX_VOCAB, &d->vocab));
    RF_TRY(need_int(r, "d_model", MAX_HIDDEN, &d->hidden));
    RF_TRY(need_int(r, "n_layers", MAX_LAYERS, &layers));
    RF_TRY(need_int(r, "n_heads", MAX_HEADS, &heads));
    RF_TRY(rf_json_opt_bool(r->doc, r->root, "multi_query_attention", false, &multi_query, r->err));
    RF_TRY(opt_int(r, "n_kv_heads", MAX_HEADS, multi_query ? 1 : heads, &kv_heads));
    RF_TRY(rf_json_opt_double(r->doc, r->root, "mlp_ratio", 0.01, 64.0, 4.0, &ratio, r->err));
    ffn = (int64_t)(ratio * (double)d->hidden);
    RF_TRY(opt_int(r, "mlp_hidden_size", MAX_FFN, ffn, &d->ffn));
    RF_TRY(opt_int(r, "embedding_size", MAX_VOCAB, d->vocab, &d->embedding_rows));
    RF_TRY(opt_int(r, "max_sequence_length", MAX_POSITIONS, 1024, &d->max_positions));
    RF_TRY(rf_json_opt_double(r->doc, r->root, "rms_norm_eps", 1e-12, 0.1, 1e-5, &d->norm_eps, r->err));
    RF_TRY(rf_json_opt_bool(r->doc, r->root, "weight_tying", true, &d->tied_head, r->err));
    RF_TRY(rf_json_opt_bool(r->doc, r->root, "include_qkv_bias", false, &d->qkv_bias, r->err));
    if (d->hidden % heads != 0 || d->hidden / heads > MAX_HEAD_DIM)
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: d_model %lld in %lld heads, expected heads of 1..%d", name,
                       (long long)d->hidden, (long long)heads, MAX_HEAD_DIM);
    if (d->embedding_rows < d->vocab)
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: embedding_size %lld is less than vocab_size %lld", name,
                       (long long)d->embedding_rows, (long long)d->vocab);
    d->num_layers = (int)layers;
    d->num_q_heads = (int)heads;
    d->num_kv_heads = (int)kv_heads;
    d->head_dim = (int)(d->hidden / heads);
    d->attention = RF_TEXT_BIDIRECTIONAL;
    RF_TRY(expect_string(r, "block_type", "llama"));
    RF_TRY(expect_string(r, "layer_norm_type", "rms"));
    RF_TRY(expect_silu(r, "activation_type"));
    RF_TRY(expect_bool(r, "include_bias", false));
    RF_TRY(expect_bool(r, "bias_for_layer_norm", false));
    RF_TRY(expect_bool(r, "layer_norm_with_affine", true));
    RF_TRY(expect_bool(r, "attention_layer_norm", false));
    RF_TRY(expect_bool(r, "alibi", false));
    RF_TRY(expect_bool(r, "rope", true));
    RF_TRY(expect_bool(r, "input_emb_norm", false));
    RF_TRY(expect_bool(r, "scale_logits", false));
    RF_TRY(expect_absent(r, "clip_qkv", "clipping of q, k and v is"));
    int64_t group;
    RF_TRY(opt_int(r, "block_group_size", MAX_LAYERS, 1, &group));
    if (group != 1)
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: block_group_size is %lld, only 1 is supported", name,
                       (long long)group);
    RF_TRY(read_rope(r, d));
    return read_mask(r, d);
}

static const struct {
    const char *model_type, *architecture, *family;
    rf_status (*read)(const reader *, rf_text_desc *);
} families[] = {
    {"llama", "LlamaForCausalLM", "llama", read_llama}, {"qwen2", "Qwen2ForCausalLM", "qwen2", read_qwen2},
    {"qwen3", "Qwen3ForCausalLM", "qwen3", read_qwen3}, {"llada", "LLaDAModelLM", "llada", read_llada},
    {"Dream", "DreamModel", "dream", read_dream},       {"sdar", "SDARForCausalLM", "sdar", read_sdar},
};
#define NUM_FAMILIES (sizeof families / sizeof *families)

/* By model_type; by the first architecture where that is absent. */
static rf_status find_family(const reader *r, size_t *out) {
    const char *type = NULL, *name = rf_json_name(r->doc);
    RF_TRY(rf_json_opt_string(r->doc, r->root, "model_type", "", &type, r->err));
    const char *key = "model_type";
    if (type[0] == 0) {
        const rf_json_value *list = rf_json_get(r->root, "architectures");
        const char *first = rf_json_is_array(list) ? rf_json_string(rf_json_first(list)) : NULL;
        key = "architectures";
        type = first ? first : "";
    }
    if (type[0] == 0)
        return rf_fail(r->err, RF_ERR_MISSING, "%s: neither model_type nor architectures says what model this is",
                       name);
    for (size_t i = 0; i < NUM_FAMILIES; i++) {
        const char *want = key[0] == 'm' ? families[i].model_type : families[i].architecture;
        if (strcasecmp(type, want) == 0) {
            *out = i;
            return RF_OK;
        }
    }
    return rf_fail(r->err, RF_ERR_UNSUPPORTED,
                   "%s: %s is \"%s\", supported are llama, qwen2, qwen3, llada, Dream, sdar", name, key, type);
}

rf_status rf_text_config_parse(rf_text_desc *out, const rf_json *config, const rf_json *generation, rf_error *err) {
    reader r = {.doc = config, .root = rf_json_root(config), .err = err};
    size_t family = 0;
    *out = (rf_text_desc){.mask_id = -1, .bos_id = -1, .pad_id = -1};
    if (!rf_json_is_object(r.root))
        return rf_fail(err, RF_ERR_CONFIG, "%s: expected a JSON object", rf_json_name(config));
    RF_TRY(find_family(&r, &family));
    rf_text_desc d = *out;
    snprintf(d.family, sizeof d.family, "%s", families[family].family);
    RF_TRY(refuse_foreign(&r));
    RF_TRY(families[family].read(&r, &d));
    RF_TRY(read_special(&r, &d));
    if (generation != NULL) {
        reader g = {.doc = generation, .root = rf_json_root(generation), .err = err};
        if (!rf_json_is_object(g.root))
            return rf_fail(err, RF_ERR_CONFIG, "%s: expected a JSON object", rf_json_name(generation));
        RF_TRY(read_special(&g, &d));
    }
    if (families[family].read == read_llada && d.num_eos > 0 && d.eos_ids[0] == LLADA_EOS && d.vocab > LLADA_EOT)
        RF_TRY(add_eos(&r, &d, LLADA_EOT));
    rf_status st = rf_text_desc_check(&d, err);
    if (st != RF_OK) return rf_fail_prefix(err, st, "%s", rf_json_name(config));
    *out = d;
    return RF_OK;
}

rf_status rf_text_config_read(rf_text_desc *out, const char *dir, rf_error *err) {
    rf_json *config = NULL, *generation = NULL;
    *out = (rf_text_desc){.mask_id = -1, .bos_id = -1, .pad_id = -1};
    char *path = rf_path_join(dir, "config.json"), *generation_path = rf_path_join(dir, "generation_config.json");
    rf_status st = path && generation_path ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "%s: out of memory for a path", dir);
    if (st == RF_OK) st = rf_json_open(&config, path, err);
    if (st == RF_OK && rf_path_exists(generation_path)) st = rf_json_open(&generation, generation_path, err);
    if (st == RF_OK) st = rf_text_config_parse(out, config, generation, err);
    rf_json_close(config);
    rf_json_close(generation);
    rf_free(path);
    rf_free(generation_path);
    return st;
}

/* --- consistency ---------------------------------------------------------------------------------------------------- */

static rf_status check_range(const char *what, int64_t value, int64_t min, int64_t max, rf_error *err) {
    if (value >= min && value <= max) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "%s is %lld, expected %lld..%lld", what, (long long)value, (long long)min,
                   (long long)max);
}

static rf_status check_id(const char *what, int32_t id, bool required, int64_t vocab, rf_error *err) {
    if (id == -1 && !required) return RF_OK;
    if (id >= 0 && id < vocab) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "%s token %d is outside the vocabulary of %lld", what, (int)id,
                   (long long)vocab);
}

rf_status rf_text_desc_check(const rf_text_desc *d, rf_error *err) {
    RF_TRY(check_range("vocabulary", d->vocab, 2, MAX_VOCAB, err));
    RF_TRY(check_range("hidden width", d->hidden, 1, MAX_HIDDEN, err));
    RF_TRY(check_range("feed-forward width", d->ffn, 1, MAX_FFN, err));
    RF_TRY(check_range("number of layers", d->num_layers, 1, MAX_LAYERS, err));
    RF_TRY(check_range("number of query heads", d->num_q_heads, 1, MAX_HEADS, err));
    RF_TRY(check_range("number of key heads", d->num_kv_heads, 1, d->num_q_heads, err));
    RF_TRY(check_range("head dimension", d->head_dim, 2, MAX_HEAD_DIM, err));
    RF_TRY(check_range("positions", d->max_positions, 1, MAX_POSITIONS, err));
    if (d->embedding_rows != 0)
        RF_TRY(check_range("rows of the embedding", d->embedding_rows, d->vocab, MAX_VOCAB, err));
    if (d->num_q_heads % d->num_kv_heads != 0)
        return rf_fail(err, RF_ERR_CONFIG, "%d query heads do not divide into %d key heads", d->num_q_heads,
                       d->num_kv_heads);
    if (d->head_dim % 2 != 0)
        return rf_fail(err, RF_ERR_CONFIG, "head dimension %d is odd: pairs cannot be turned", d->head_dim);
    if (!(d->norm_eps > 0 && d->norm_eps <= 0.1))
        return rf_fail(err, RF_ERR_CONFIG, "norm epsilon is %g, expected 0..0.1", d->norm_eps);
    if (!(d->rope_theta >= 1 && d->rope_theta <= 1e12))
        return rf_fail(err, RF_ERR_CONFIG, "rope theta is %g, expected 1..1e12", d->rope_theta);
    if (d->rope_scaling.used) {
        double factor = d->rope_scaling.factor, low = d->rope_scaling.low_factor, high = d->rope_scaling.high_factor;
        if (!(factor >= 1 && factor <= 1e6 && low > 0 && high > low && high <= 1e6))
            return rf_fail(err, RF_ERR_CONFIG,
                           "rope scaling by %g between %g and %g, expected a factor of 1 or more and low < high",
                           factor, low, high);
        RF_TRY(check_range("original positions of rope scaling", d->rope_scaling.original, 1, MAX_POSITIONS, err));
    }
    if (d->attention != RF_TEXT_CAUSAL && d->attention != RF_TEXT_BIDIRECTIONAL && d->attention != RF_TEXT_BLOCK_CAUSAL)
        return rf_fail(err, RF_ERR_CONFIG, "attention kind %d is not known", (int)d->attention);
    bool blocks = d->attention == RF_TEXT_BLOCK_CAUSAL;
    RF_TRY(check_range("tokens of a block", d->block, blocks ? 1 : 0, blocks ? MAX_BLOCK : 0, err));
    RF_TRY(check_range("logit shift", d->shift, d->attention == RF_TEXT_CAUSAL ? 1 : 0, 1, err));
    RF_TRY(check_id("mask", d->mask_id, d->attention != RF_TEXT_CAUSAL, d->vocab, err));
    RF_TRY(check_id("first", d->bos_id, false, d->vocab, err));
    RF_TRY(check_id("padding", d->pad_id, false, d->vocab, err));
    RF_TRY(check_range("number of end-of-text ids", d->num_eos, 0, (int64_t)(sizeof d->eos_ids / sizeof *d->eos_ids),
                       err));
    for (int i = 0; i < d->num_eos; i++) {
        RF_TRY(check_id("end-of-text", d->eos_ids[i], true, d->vocab, err));
        if (d->eos_ids[i] == d->mask_id)
            return rf_fail(err, RF_ERR_CONFIG, "token %d is both mask and end of text", (int)d->mask_id);
    }
    return RF_OK;
}
