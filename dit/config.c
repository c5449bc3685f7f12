/* dit/config.c - config.json of the two DiT layouts, and built-in shapes. */
#include "dit/config.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "kernels/rope.h"

/* What both layouts share: L x { SELF(0,1->2)  MLP(3,4->5) }, label conditioning, 2-D sin/cos positions. */
static rf_dit_desc describe_dit(int depth, int num_heads, int head_dim, int patch, int sample_size, int in_channels,
                                int out_channels, int num_classes) {
    rf_dit_desc d = {.width = (int64_t)num_heads * head_dim, .num_heads = num_heads, .head_dim = head_dim};
    snprintf(d.family, sizeof d.family, "DiT");
    d.num_segments = 1;
    d.pt = 1;
    d.ph = d.pw = patch;
    d.in_channels = in_channels;
    d.out_channels = out_channels;
    d.pos = RF_POS_SINCOS_2D;
    d.pos_interpolation = 1.0;
    d.num_freqs = 256;
    d.max_period = 10000.0;
    d.timestep_scale = 1.0;
    d.cond_dim = d.width;
    d.num_classes = num_classes;
    d.mod_rows = RF_MOD_ROWS_SAMPLE;
    d.final_norm = RF_PART_NORM_LAYER;
    d.final_eps = 1e-6;
    d.sample_size = sample_size;
    d.sample_frames = 1;
    d.num_groups = 1;
    rf_block_group *group = &d.groups[0];
    group->count = depth;
    group->num_chunks = 6;
    group->num_parts = 2;
    group->parts[0] = (rf_part_desc){.kind = RF_PART_SELF,
                                     .segments = {{.present = true, .shift = 0, .scale = 1, .gate = 2}},
                                     .norm = RF_PART_NORM_LAYER,
                                     .norm_eps = 1e-6,
                                     .rope = -1,
                                     .qkv_bias = true,
                                     .out_bias = true};
    group->parts[1] = (rf_part_desc){.kind = RF_PART_MLP,
                                     .segments = {{.present = true, .shift = 3, .scale = 4, .gate = 5}},
                                     .norm = RF_PART_NORM_LAYER,
                                     .norm_eps = 1e-6,
                                     .rope = -1,
                                     .out_bias = true,
                                     .ffn_dim = 4 * d.width,
                                     .act = RF_ACT_GELU_TANH};
    return d;
}

/* The two numerics (see dit/config.h). */
static void use_diffusers_numerics(rf_dit_desc *d, double norm_eps) {
    d->freq_shift = 1.0;
    d->pos_base_size = (double)d->sample_size / d->ph;
    d->guided_channels = d->in_channels;
    d->groups[0].parts[1].norm_eps = norm_eps;
}
static void use_original_numerics(rf_dit_desc *d) {
    d->freq_shift = 0.0;
    d->pos_base_size = 0.0;
    d->guided_channels = d->in_channels < 3 ? d->in_channels : 3;
}

/* A string key that may only have one of two values. */
static rf_status expect_string(const rf_json *doc, const rf_json_value *root, const char *key, const char *want,
                               rf_error *err) {
    const char *value = NULL;
    rf_status st = rf_json_opt_string(doc, root, key, want, &value, err);
    if (st != RF_OK) return st;
    if (strcmp(value, want) != 0)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %s is \"%s\", only \"%s\" is supported", rf_json_name(doc), key,
                       value, want);
    return RF_OK;
}

static rf_status expect_bool(const rf_json *doc, const rf_json_value *root, const char *key, bool want, rf_error *err) {
    bool value = want;
    rf_status st = rf_json_opt_bool(doc, root, key, want, &value, err);
    if (st != RF_OK) return st;
    if (value != want)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %s is %s, only %s is supported", rf_json_name(doc), key,
                       value ? "true" : "false", want ? "true" : "false");
    return RF_OK;
}

static rf_status read_diffusers(rf_dit_desc *out, const rf_json *doc, const rf_json_value *root, rf_error *err) {
    int64_t heads, head_dim, in_channels, out_channels, layers, sample_size, patch, num_classes;
    double norm_eps;
    rf_status st = rf_json_opt_int(doc, root, "num_attention_heads", 1, 1024, 16, &heads, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "attention_head_dim", 1, 1024, 72, &head_dim, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "in_channels", 1, 1024, 4, &in_channels, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "out_channels", 1, 2048, in_channels, &out_channels, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "num_layers", 1, 1024, 28, &layers, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "sample_size", 1, 8192, 32, &sample_size, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "patch_size", 1, 64, 2, &patch, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "num_embeds_ada_norm", 1, 1 << 20, 1000, &num_classes, err);
    if (st == RF_OK) st = rf_json_opt_double(doc, root, "norm_eps", 1e-12, 0.1, 1e-5, &norm_eps, err);
    if (st == RF_OK) st = expect_string(doc, root, "norm_type", "ada_norm_zero", err);
    if (st == RF_OK) st = expect_string(doc, root, "activation_fn", "gelu-approximate", err);
    if (st == RF_OK) st = expect_bool(doc, root, "attention_bias", true, err);
    if (st == RF_OK) st = expect_bool(doc, root, "norm_elementwise_affine", false, err);
    if (st == RF_OK) st = expect_bool(doc, root, "double_self_attention", false, err);
    if (st == RF_OK) st = expect_bool(doc, root, "only_cross_attention", false, err);
    if (st != RF_OK) return st;
    if (rf_json_has(root, "cross_attention_dim"))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: cross_attention_dim is set; cross-attention is not supported",
                       rf_json_name(doc));
    *out = describe_dit((int)layers, (int)heads, (int)head_dim, (int)patch, (int)sample_size, (int)in_channels,
                        (int)out_channels, (int)num_classes);
    use_diffusers_numerics(out, norm_eps);
    return RF_OK;
}

static rf_status read_original(rf_dit_desc *out, const rf_json *doc, const rf_json_value *root, rf_error *err) {
    int64_t width, depth, heads, patch, input_size, in_channels, num_classes;
    bool learn_sigma;
    rf_status st = rf_json_get_int(doc, root, "hidden_size", 4, 1 << 15, &width, err);
    if (st == RF_OK) st = rf_json_get_int(doc, root, "depth", 1, 1024, &depth, err);
    if (st == RF_OK) st = rf_json_get_int(doc, root, "num_heads", 1, 1024, &heads, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "patch_size", 1, 64, 2, &patch, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "input_size", 1, 8192, 32, &input_size, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "in_channels", 1, 1024, 4, &in_channels, err);
    if (st == RF_OK) st = rf_json_opt_int(doc, root, "num_classes", 1, 1 << 20, 1000, &num_classes, err);
    if (st == RF_OK) st = rf_json_opt_bool(doc, root, "learn_sigma", true, &learn_sigma, err);
    if (st != RF_OK) return st;
    if (width % heads != 0)
        return rf_fail(err, RF_ERR_CONFIG, "%s: hidden_size %lld is not a multiple of num_heads %lld",
                       rf_json_name(doc), (long long)width, (long long)heads);
    *out = describe_dit((int)depth, (int)heads, (int)(width / heads), (int)patch, (int)input_size, (int)in_channels,
                        (int)in_channels * (learn_sigma ? 2 : 1), (int)num_classes);
    use_original_numerics(out);
    return RF_OK;
}

rf_status rf_dit_config_read(rf_dit_desc *out, const rf_json *config, rf_error *err) {
    const rf_json_value *root = rf_json_root(config);
    if (!rf_json_is_object(root))
        return rf_fail(err, RF_ERR_CONFIG, "%s: expected a JSON object", rf_json_name(config));
    const char *class_name = NULL;
    rf_status st = rf_json_opt_string(config, root, "_class_name", "", &class_name, err);
    if (st != RF_OK) return st;
    if (strcmp(class_name, "DiTTransformer2DModel") == 0 || strcmp(class_name, "Transformer2DModel") == 0)
        st = read_diffusers(out, config, root, err);
    else if (strcmp(class_name, "DiT") == 0 || (class_name[0] == 0 && rf_json_has(root, "hidden_size")))
        st = read_original(out, config, root, err);
    else
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "%s: _class_name is \"%s\", supported are DiTTransformer2DModel, Transformer2DModel and DiT",
                       rf_json_name(config), class_name);
    if (st != RF_OK) return st;
    st = rf_dit_desc_check(out, err);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "%s", rf_json_name(config));
}

/* L x { SELF(FRAME)  MLP  SELF(PIXEL)  MLP }: see dit/blocks.h. */
static rf_dit_desc describe_oasis(int height, int width, int patch, int channels, int hidden, int depth, int num_heads,
                                  int64_t ffn, int action_dim, int max_frames) {
    int head_dim = hidden / num_heads;
    rf_dit_desc d = {.width = hidden, .num_heads = num_heads, .head_dim = head_dim};
    snprintf(d.family, sizeof d.family, "open-oasis DiT");
    d.num_segments = 1;
    d.pt = 1;
    d.ph = d.pw = patch;
    d.in_channels = d.out_channels = d.guided_channels = channels;
    d.pos = RF_POS_NONE;
    d.num_ropes = 2;
    d.ropes[0] = (rf_rope_desc){.kind = RF_ROPE_AXIAL, .num_pairs = head_dim / 4, .max_freq = 256.0};
    d.ropes[1] = (rf_rope_desc){.kind = RF_ROPE_TIME, .num_pairs = head_dim / 2, .theta = 10000.0};
    d.num_freqs = 256;
    d.max_period = 10000.0;
    d.timestep_scale = 1.0;
    d.cond_dim = hidden;
    d.action_dim = action_dim;
    d.mod_rows = RF_MOD_ROWS_FRAME;
    d.final_norm = RF_PART_NORM_LAYER;
    d.final_eps = 1e-6;
    d.sample_size = height;
    d.sample_width = width;
    d.sample_frames = max_frames;
    d.num_groups = 1;
    rf_block_group *group = &d.groups[0];
    group->count = depth;
    group->num_chunks = 12;
    group->num_parts = 4;
    for (int half = 0; half < 2; half++) {
        int c = 6 * half;
        group->parts[2 * half] =
            (rf_part_desc){.kind = RF_PART_SELF,
                           .segments = {{.present = true, .shift = c, .scale = c + 1, .gate = c + 2}},
                           .norm = RF_PART_NORM_LAYER,
                           .norm_eps = 1e-6,
                           .rope = half,
                           .scope = half ? RF_SCOPE_PIXEL : RF_SCOPE_FRAME,
                           .causal_frames = half,
                           .out_bias = true};
        group->parts[2 * half + 1] =
            (rf_part_desc){.kind = RF_PART_MLP,
                           .segments = {{.present = true, .shift = c + 3, .scale = c + 4, .gate = c + 5}},
                           .norm = RF_PART_NORM_LAYER,
                           .norm_eps = 1e-6,
                           .rope = -1,
                           .out_bias = true,
                           .ffn_dim = ffn,
                           .act = RF_ACT_GELU_TANH};
    }
    return d;
}

rf_dit_desc rf_dit_config_oasis(void) {
    return describe_oasis(18, 32, 2, 16, 1024, 16, 16, 4096, 25, 32);
}

rf_status rf_dit_config_read_oasis(rf_dit_desc *out, const rf_json *doc, const rf_json_value *object, rf_error *err) {
    int64_t height, width, patch, channels, hidden, depth, heads, actions, frames;
    double ratio;
    RF_TRY(rf_json_opt_int(doc, object, "input_h", 1, 1024, 18, &height, err));
    RF_TRY(rf_json_opt_int(doc, object, "input_w", 1, 1024, 32, &width, err));
    RF_TRY(rf_json_opt_int(doc, object, "patch_size", 1, 64, 2, &patch, err));
    RF_TRY(rf_json_opt_int(doc, object, "in_channels", 1, 1024, 16, &channels, err));
    RF_TRY(rf_json_opt_int(doc, object, "hidden_size", 8, 1 << 15, 1024, &hidden, err));
    RF_TRY(rf_json_opt_int(doc, object, "depth", 1, 1024, 16, &depth, err));
    RF_TRY(rf_json_opt_int(doc, object, "num_heads", 1, 1024, 16, &heads, err));
    RF_TRY(rf_json_opt_double(doc, object, "mlp_ratio", 0.01, 64.0, 4.0, &ratio, err));
    RF_TRY(rf_json_opt_int(doc, object, "external_cond_dim", 0, 4096, 25, &actions, err));
    RF_TRY(rf_json_opt_int(doc, object, "max_frames", 2, RF_MAX_WINDOW, 32, &frames, err));
    if (hidden % heads != 0 || hidden / heads % 4 != 0)
        return rf_fail(err, RF_ERR_CONFIG, "%s: hidden_size %lld in %lld heads, expected heads of a multiple of 4",
                       rf_json_name(doc), (long long)hidden, (long long)heads);
    *out = describe_oasis((int)height, (int)width, (int)patch, (int)channels, (int)hidden, (int)depth, (int)heads,
                          (int64_t)((double)hidden * ratio), (int)actions, (int)frames);
    rf_status st = rf_dit_desc_check(out, err);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "%s", rf_json_name(doc));
}

/* Sizes of Peebles and Xie 2023, table 1. */
static const struct {
    const char *letter;
    int depth, num_heads, head_dim;
} sizes[] = {{"xl", 28, 16, 72}, {"l", 24, 16, 64}, {"b", 12, 12, 64}, {"s", 12, 6, 64}};

static const char *const builtin_names[] = {
    "dit-xl-2-256", "dit-xl-4-256", "dit-xl-8-256", "dit-xl-2-512", "dit-l-2-256", "dit-l-4-256", "dit-l-8-256",
    "dit-b-2-256",  "dit-b-4-256",  "dit-b-8-256",  "dit-s-2-256",  "dit-s-4-256", "dit-s-8-256"};

const char *rf_dit_config_builtin_name(int index) {
    int num = (int)(sizeof builtin_names / sizeof *builtin_names);
    return index >= 0 && index < num ? builtin_names[index] : NULL;
}

rf_status rf_dit_config_builtin(rf_dit_desc *out, const char *name, rf_error *err) {
    for (int i = 0; rf_dit_config_builtin_name(i) != NULL; i++) {
        if (strcasecmp(name, builtin_names[i]) != 0) continue;
        char letter[8] = "";
        int patch = 0, pixels = 0;
        if (sscanf(builtin_names[i], "dit-%7[a-z]-%d-%d", letter, &patch, &pixels) != 3) break;
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            if (strcmp(letter, sizes[s].letter) != 0) continue;
            *out = describe_dit(sizes[s].depth, sizes[s].num_heads, sizes[s].head_dim, patch, pixels / 8, 4, 8, 1000);
            use_diffusers_numerics(out, 1e-5);
            return rf_dit_desc_check(out, err);
        }
    }
    char list[256] = "";
    size_t used = 0;
    for (int i = 0; rf_dit_config_builtin_name(i) != NULL; i++) {
        int n = snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", builtin_names[i]);
        if (n < 0 || (size_t)n >= sizeof list - used) break;
        used += (size_t)n;
    }
    return rf_fail(err, RF_ERR_ARGUMENT, "no built-in config \"%s\"; there are %s", name, list);
}
