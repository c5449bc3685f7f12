/* dit/vae.c - the decoder of AutoencoderKL on the operator table.
 *
 *   z / scaling + shift -> post_quant_conv 1x1 -> conv_in 3x3 -> resnet, attention, resnet
 *     -> per level (coarse to fine): layers_per_block + 1 resnets, then nearest x2 and conv 3x3 (not after the last)
 *     -> GroupNorm, SiLU, conv_out 3x3
 *   resnet     h = conv2(SiLU(GN(conv1(SiLU(GN(x)))))); x + h, x through a 1x1 convolution where the channels change
 *   attention  x + out(softmax(q k^T / sqrt(C)) v), q|k|v = W GN(x), one head of C = channels of the coarsest level
 *
 * One walk over the decoder serves planning and running: without a stream it asks every operator whether it could run and
 * adds up what the buffers must hold; with one it queues the work.
 * Buffers  Three channels-last work buffers: x is the current picture, a and b are free. A resnet ends in x (its second
 *          convolution adds x in place) or, through a shortcut, in a, and then the two change names.
 * Pitfalls - the decoder has one resnet a level more than layers_per_block says;
 *          - LDM files number the levels from the fine end, and store the attention's Linears as 1x1 convolutions;
 *          - head_dim is padded to a multiple of 8 with zero rows of q, k, v (GEMMs need it); the scale is 1/sqrt(C). */
#include "dit/vae.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "core/arena.h"
#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "kernels/ops.h"

#define GROUP_NORM_EPS 1e-6f
#define MAX_LAYERS     8 /* layers_per_block */
#define MAX_CHANNELS   8192
#define MAX_SIDE       16384              /* of a picture */
#define SCORE_BYTES    ((size_t)64 << 20) /* of one chunk of attention scores */

typedef struct {
    void *w;  /* [out, kernel, kernel, in] model dtype */
    float *b; /* [out] */
    int64_t in, out;
    int kernel;
} conv_weights;

typedef struct {
    float *w, *b; /* [channels] */
    int64_t channels;
} norm_weights;

typedef struct {
    norm_weights norm1, norm2;
    conv_weights conv1, conv2, shortcut; /* shortcut.w NULL: none */
} resnet_weights;

struct rf_vae {
    rf_vae_config config;
    rf_dtype dtype;
    rf_backend *backend;
    rf_params *params;
    int64_t num_params; /* of the model: without padding */
    size_t num_bytes;

    conv_weights post_quant, conv_in, conv_out;
    resnet_weights mid[2];
    norm_weights attn_norm;
    conv_weights attn_qkv, attn_out; /* [3 * head_dim, C] and [C, head_dim], head_dim = C padded */
    resnet_weights up[RF_VAE_MAX_LEVELS][MAX_LAYERS + 1];
    conv_weights upsample[RF_VAE_MAX_LEVELS];
    norm_weights norm_out;
};

static int64_t round_up(int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
}

/* ---- config ---- */

rf_vae_config rf_vae_config_sd(void) {
    return (rf_vae_config){
        .num_levels = 4,
        .channels = {128, 256, 512, 512},
        .layers_per_block = 2,
        .num_groups = 32,
        .latent_channels = 4,
        .image_channels = 3,
        .scaling_factor = 0.18215,
        .has_post_quant_conv = true,
        .mid_attention = true,
    };
}

static rf_status check_config(const rf_vae_config *c, rf_error *err) {
    if (c->num_levels < 1 || c->num_levels > RF_VAE_MAX_LEVELS) {
        return rf_fail(err, RF_ERR_CONFIG, "vae: %d levels (block_out_channels), must be 1..%d", c->num_levels,
                       RF_VAE_MAX_LEVELS);
    }
    if (c->num_groups < 1)
        return rf_fail(err, RF_ERR_CONFIG, "vae: norm_num_groups %d, must be 1 or more", c->num_groups);
    for (int i = 0; i < c->num_levels; i++) {
        if (c->channels[i] < 1 || c->channels[i] > MAX_CHANNELS || c->channels[i] % c->num_groups != 0) {
            return rf_fail(err, RF_ERR_CONFIG,
                           "vae: block_out_channels[%d] is %lld, must be 1..%d and a multiple of norm_num_groups %d", i,
                           (long long)c->channels[i], MAX_CHANNELS, c->num_groups);
        }
    }
    if (c->layers_per_block < 1 || c->layers_per_block > MAX_LAYERS) {
        return rf_fail(err, RF_ERR_CONFIG, "vae: layers_per_block %d, must be 1..%d", c->layers_per_block, MAX_LAYERS);
    }
    if (c->latent_channels < 1 || c->latent_channels > 1024) {
        return rf_fail(err, RF_ERR_CONFIG, "vae: latent_channels %d, must be 1..1024", c->latent_channels);
    }
    if (c->image_channels != 3) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "vae: out_channels %d is not supported (supported: 3)",
                       c->image_channels);
    }
    if (!(isfinite(c->scaling_factor) && fabs(c->scaling_factor) > 1e-6) || !isfinite(c->shift_factor)) {
        return rf_fail(err, RF_ERR_CONFIG, "vae: scaling_factor %g and shift_factor %g do not give a scale",
                       c->scaling_factor, c->shift_factor);
    }
    return RF_OK;
}

/* A string key that may have one value only. */
static rf_status expect_string(const rf_json *doc, const char *key, const char *want, rf_error *err) {
    const char *text;
    rf_status st = rf_json_opt_string(doc, rf_json_root(doc), key, want, &text, err);
    if (st != RF_OK || strcmp(text, want) == 0) return st;
    return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %s '%s' is not supported (supported: %s)", rf_json_name(doc), key,
                   text, want);
}

static rf_status read_int(const rf_json *doc, const char *key, int64_t absent, int *out, rf_error *err) {
    int64_t v = absent;
    rf_status st = rf_json_opt_int(doc, rf_json_root(doc), key, 0, INT32_MAX, absent, &v, err);
    *out = (int)v;
    return st;
}

static rf_status read_levels(rf_vae_config *c, const rf_json *doc, rf_error *err) {
    const char *name = rf_json_name(doc);
    const rf_json_value *channels = rf_json_get(rf_json_root(doc), "block_out_channels");
    const rf_json_value *blocks = rf_json_get(rf_json_root(doc), "up_block_types");
    size_t num = channels && rf_json_is_array(channels) ? rf_json_count(channels) : 0;
    if (num < 1 || num > RF_VAE_MAX_LEVELS) {
        return rf_fail(err, channels ? RF_ERR_CONFIG : RF_ERR_MISSING,
                       "%s: block_out_channels must be a list of 1..%d numbers", name, RF_VAE_MAX_LEVELS);
    }
    c->num_levels = (int)num;
    for (size_t i = 0; i < num; i++) {
        double v = rf_json_number(rf_json_at(channels, i, NULL));
        if (!(v >= 1 && v <= MAX_CHANNELS) || v != floor(v)) {
            return rf_fail(err, RF_ERR_CONFIG, "%s: block_out_channels[%zu] must be a whole number in 1..%d", name, i,
                           MAX_CHANNELS);
        }
        c->channels[i] = (int64_t)v;
    }
    if (!blocks) return RF_OK; /* all of the one kind there is */
    if (!rf_json_is_array(blocks) || rf_json_count(blocks) != num) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: up_block_types must be a list of %zu names, as block_out_channels",
                       name, num);
    }
    for (size_t i = 0; i < num; i++) {
        const char *text = rf_json_string(rf_json_at(blocks, i, NULL));
        if (!text || strcmp(text, "UpDecoderBlock2D") != 0) {
            return rf_fail(err, RF_ERR_UNSUPPORTED,
                           "%s: up_block_types[%zu] '%s' is not supported (supported: UpDecoderBlock2D)", name, i,
                           text ? text : "(not a string)");
        }
    }
    return RF_OK;
}

static rf_status read_config(rf_vae_config *c, const rf_json *doc, rf_error *err) {
    *c = (rf_vae_config){0};
    const rf_json_value *root = rf_json_root(doc);
    if (!rf_json_is_object(root)) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: a VAE config is a JSON object", rf_json_name(doc));
    }
    rf_status st = expect_string(doc, "_class_name", "AutoencoderKL", err);
    if (st == RF_OK) st = expect_string(doc, "act_fn", "silu", err);
    if (st == RF_OK) st = read_levels(c, doc, err);
    if (st == RF_OK) st = read_int(doc, "layers_per_block", 1, &c->layers_per_block, err);
    if (st == RF_OK) st = read_int(doc, "norm_num_groups", 32, &c->num_groups, err);
    if (st == RF_OK) st = read_int(doc, "latent_channels", 4, &c->latent_channels, err);
    if (st == RF_OK) st = read_int(doc, "out_channels", 3, &c->image_channels, err);
    if (st == RF_OK) {
        st = rf_json_opt_double(doc, root, "scaling_factor", -1e6, 1e6, 0.18215, &c->scaling_factor, err);
    }
    if (st == RF_OK) st = rf_json_opt_double(doc, root, "shift_factor", -1e6, 1e6, 0, &c->shift_factor, err);
    if (st == RF_OK) st = rf_json_opt_bool(doc, root, "use_post_quant_conv", true, &c->has_post_quant_conv, err);
    if (st == RF_OK) st = rf_json_opt_bool(doc, root, "mid_block_add_attention", true, &c->mid_attention, err);
    for (int i = 0; i < 2 && st == RF_OK; i++) {
        const char *key = i == 0 ? "latents_mean" : "latents_std";
        if (rf_json_has(root, key)) {
            st = rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %s is set, which is not supported", rf_json_name(doc), key);
        }
    }
    return st == RF_OK ? check_config(c, err) : st;
}

/* ---- weights: from a file, or drawn ---- */

/* The first error stops all further work. */
typedef struct {
    rf_vae *vae;
    const rf_weights *file; /* NULL: synthetic */
    const char *prefix;     /* in front of "decoder." */
    bool ldm;
    bool *used; /* [tensors of the file] */
    const rf_ops *ops;
    rf_stream *stream;
    uint64_t seed, key;
    rf_error *err;
    rf_status st;
} builder;

typedef struct {
    char text[192];
} name_text;

/* prefix + a formatted name. */
static name_text name_of(const builder *b, const char *format, ...) {
    name_text out;
    va_list args;
    int used = snprintf(out.text, sizeof out.text, "%s", b->prefix);
    va_start(args, format);
    vsnprintf(out.text + used, sizeof out.text - (size_t)used, format, args);
    va_end(args);
    return out;
}

static void mark_used(builder *b, const char *name) {
    size_t low = 0, high = rf_weights_count(b->file); /* names come in order */
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        int order = strcmp(rf_weights_name(b->file, mid), name);
        if (order == 0) {
            b->used[mid] = true;
            return;
        }
        if (order < 0)
            low = mid + 1;
        else
            high = mid;
    }
}

/* base + ".weight" or ".bias" as host floats, NULL after an error. A matrix may be stored as a 1x1 convolution. */
static float *read_tensor(builder *b, const char *base, const char *kind, int rank, const int64_t *shape) {
    float *host = NULL;
    if (b->st != RF_OK) return NULL;
    char name[256];
    snprintf(name, sizeof name, "%s.%s", base, kind);
    rf_tensor stored;
    if (rank == 2 && rf_weights_get(b->file, name, &stored, NULL) == RF_OK && stored.rank == 4) {
        const int64_t as_conv[4] = {shape[0], shape[1], 1, 1};
        b->st = rf_weights_read_f32(b->file, name, 4, as_conv, &host, b->err);
    } else {
        b->st = rf_weights_read_f32(b->file, name, rank, shape, &host, b->err);
    }
    if (b->st == RF_OK) mark_used(b, name);
    return host;
}

static void put(builder *b, void **out, rf_dtype dtype, const float *host, int64_t num, int64_t num_logical) {
    if (b->st == RF_OK) b->st = rf_params_put(b->vae->params, out, dtype, host, (size_t)num, b->err);
    b->vae->num_params += num_logical;
    b->vae->num_bytes += (size_t)num * rf_dtype_bytes(dtype);
}

static void put_constant(builder *b, float **out, float value, int64_t num, int64_t num_logical) {
    if (b->st != RF_OK) return;
    float *host = rf_alloc((size_t)num * sizeof *host);
    if (!host) {
        b->st = rf_fail(b->err, RF_ERR_MEMORY, "vae: no memory for %lld floats", (long long)num);
        return;
    }
    for (int64_t i = 0; i < num; i++) host[i] = value;
    put(b, (void **)out, RF_DTYPE_F32, host, num, num_logical);
    rf_free(host);
}

/* Weights of variance 1 / fan_in, on the device. */
static void draw(builder *b, void **out, int64_t num, int64_t num_logical, int64_t fan_in) {
    rf_vae *v = b->vae;
    if (b->st == RF_OK) b->st = rf_params_take(v->params, out, v->dtype, (size_t)num, b->err);
    if (b->st != RF_OK) return;
    rf_fill_normal_args args = {.out = *out,
                                .dtype = v->dtype,
                                .num = num,
                                .seed = b->seed,
                                .key = b->key++,
                                .std = (float)(1 / sqrt((double)fan_in))};
    b->st = b->ops->fill_normal(b->stream, &args, b->err);
    v->num_params += num_logical;
    v->num_bytes += (size_t)num * rf_dtype_bytes(v->dtype);
}

static void make_norm(builder *b, norm_weights *n, name_text name, int64_t channels) {
    n->channels = channels;
    if (!b->file) {
        put_constant(b, &n->w, 1, channels, channels);
        put_constant(b, &n->b, 0, channels, channels);
        return;
    }
    float *w = read_tensor(b, name.text, "weight", 1, &channels);
    float *bias = read_tensor(b, name.text, "bias", 1, &channels);
    put(b, (void **)&n->w, RF_DTYPE_F32, w, channels, channels);
    put(b, (void **)&n->b, RF_DTYPE_F32, bias, channels, channels);
    rf_free(w);
    rf_free(bias);
}

static void make_conv(builder *b, conv_weights *c, name_text name, int64_t in, int64_t out, int kernel) {
    int64_t taps = (int64_t)kernel * kernel, num = out * in * taps;
    c->in = in;
    c->out = out;
    c->kernel = kernel;
    if (!b->file) {
        draw(b, &c->w, num, num, in * taps);
        put_constant(b, &c->b, 0, out, out);
        return;
    }
    float *w = read_tensor(b, name.text, "weight", 4, (const int64_t[]){out, in, kernel, kernel});
    float *bias = read_tensor(b, name.text, "bias", 1, &out);
    float *last = NULL; /* [out, taps, in] */
    if (b->st == RF_OK && !(last = rf_alloc((size_t)num * sizeof *last))) {
        b->st = rf_fail(b->err, RF_ERR_MEMORY, "%s: no memory for %lld floats", name.text, (long long)num);
    }
    for (int64_t o = 0; b->st == RF_OK && o < out; o++) {
        for (int64_t i = 0; i < in; i++) {
            for (int64_t t = 0; t < taps; t++) last[(o * taps + t) * in + i] = w[(o * in + i) * taps + t];
        }
    }
    put(b, &c->w, b->vae->dtype, last, num, num);
    put(b, (void **)&c->b, RF_DTYPE_F32, bias, out, out);
    rf_free(w);
    rf_free(bias);
    rf_free(last);
}

/* q, k, v as the rows of one 1x1 convolution, each padded from C to head_dim rows of zeros. */
static void make_qkv(builder *b, name_text names[3], int64_t channels, int64_t head_dim) {
    conv_weights *c = &b->vae->attn_qkv;
    int64_t rows = 3 * head_dim, num = rows * channels, logical = 3 * channels * channels;
    *c = (conv_weights){.in = channels, .out = rows, .kernel = 1};
    if (!b->file) {
        draw(b, &c->w, num, logical, channels);
        put_constant(b, &c->b, 0, rows, 3 * channels);
        return;
    }
    float *w = rf_alloc_zero((size_t)num, sizeof *w), *bias = rf_alloc_zero((size_t)rows, sizeof *bias);
    if (b->st == RF_OK && !(w && bias)) {
        b->st = rf_fail(b->err, RF_ERR_MEMORY, "%s: no memory for %lld floats", names[0].text, (long long)num);
    }
    for (int i = 0; i < 3; i++) {
        float *one = read_tensor(b, names[i].text, "weight", 2, (const int64_t[]){channels, channels});
        float *one_bias = read_tensor(b, names[i].text, "bias", 1, &channels);
        if (b->st == RF_OK) {
            memcpy(w + i * head_dim * channels, one, (size_t)(channels * channels) * sizeof *w);
            memcpy(bias + i * head_dim, one_bias, (size_t)channels * sizeof *bias);
        }
        rf_free(one);
        rf_free(one_bias);
    }
    put(b, &c->w, b->vae->dtype, w, num, logical);
    put(b, (void **)&c->b, RF_DTYPE_F32, bias, rows, 3 * channels);
    rf_free(w);
    rf_free(bias);
}

static void make_attn_out(builder *b, name_text name, int64_t channels, int64_t head_dim) {
    conv_weights *c = &b->vae->attn_out;
    int64_t num = channels * head_dim, logical = channels * channels;
    *c = (conv_weights){.in = head_dim, .out = channels, .kernel = 1};
    if (!b->file) {
        draw(b, &c->w, num, logical, channels);
        put_constant(b, &c->b, 0, channels, channels);
        return;
    }
    float *w = rf_alloc_zero((size_t)num, sizeof *w);
    if (b->st == RF_OK && !w) {
        b->st = rf_fail(b->err, RF_ERR_MEMORY, "%s: no memory for %lld floats", name.text, (long long)num);
    }
    float *dense = read_tensor(b, name.text, "weight", 2, (const int64_t[]){channels, channels});
    float *bias = read_tensor(b, name.text, "bias", 1, &channels);
    for (int64_t o = 0; b->st == RF_OK && o < channels; o++) {
        memcpy(w + o * head_dim, dense + o * channels, (size_t)channels * sizeof *w);
    }
    put(b, &c->w, b->vae->dtype, w, num, logical);
    put(b, (void **)&c->b, RF_DTYPE_F32, bias, channels, channels);
    rf_free(w);
    rf_free(dense);
    rf_free(bias);
}

static void make_resnet(builder *b, resnet_weights *r, name_text name, int64_t in, int64_t out) {
    const char *at = name.text + strlen(b->prefix);
    make_norm(b, &r->norm1, name_of(b, "%s.norm1", at), in);
    make_conv(b, &r->conv1, name_of(b, "%s.conv1", at), in, out, 3);
    make_norm(b, &r->norm2, name_of(b, "%s.norm2", at), out);
    make_conv(b, &r->conv2, name_of(b, "%s.conv2", at), out, out, 3);
    if (in != out) {
        make_conv(b, &r->shortcut, name_of(b, b->ldm ? "%s.nin_shortcut" : "%s.conv_shortcut", at), in, out, 1);
    }
}

static void make_attention(builder *b, int64_t channels) {
    static const char *const dialects[3][5] = {
        {"decoder.mid_block.attentions.0.group_norm", "decoder.mid_block.attentions.0.to_q",
         "decoder.mid_block.attentions.0.to_k", "decoder.mid_block.attentions.0.to_v",
         "decoder.mid_block.attentions.0.to_out.0"},
        {"decoder.mid_block.attentions.0.group_norm", "decoder.mid_block.attentions.0.query",
         "decoder.mid_block.attentions.0.key", "decoder.mid_block.attentions.0.value",
         "decoder.mid_block.attentions.0.proj_attn"},
        {"decoder.mid.attn_1.norm", "decoder.mid.attn_1.q", "decoder.mid.attn_1.k", "decoder.mid.attn_1.v",
         "decoder.mid.attn_1.proj_out"},
    };
    bool old = b->file && rf_weights_has(b->file, name_of(b, "%s.weight", dialects[1][1]).text);
    const char *const *names = dialects[b->ldm ? 2 : old ? 1 : 0];
    int64_t head_dim = round_up(channels, 8);
    make_norm(b, &b->vae->attn_norm, name_of(b, "%s", names[0]), channels);
    name_text qkv[3] = {name_of(b, "%s", names[1]), name_of(b, "%s", names[2]), name_of(b, "%s", names[3])};
    make_qkv(b, qkv, channels, head_dim);
    make_attn_out(b, name_of(b, "%s", names[4]), channels, head_dim);
}

static void make_decoder(builder *b) {
    rf_vae *v = b->vae;
    const rf_vae_config *c = &v->config;
    int last = c->num_levels - 1;
    int64_t width = c->channels[last], z = c->latent_channels;
    if (c->has_post_quant_conv) make_conv(b, &v->post_quant, name_of(b, "post_quant_conv"), z, z, 1);
    make_conv(b, &v->conv_in, name_of(b, "decoder.conv_in"), z, width, 3);
    for (int i = 0; i < 2; i++) {
        make_resnet(b, &v->mid[i],
                    b->ldm ? name_of(b, "decoder.mid.block_%d", i + 1) : name_of(b, "decoder.mid_block.resnets.%d", i),
                    width, width);
    }
    if (c->mid_attention) make_attention(b, width);
    for (int level = 0; level <= last; level++) { /* coarse to fine */
        int64_t out = c->channels[last - level];
        for (int i = 0; i <= c->layers_per_block; i++) {
            make_resnet(b, &v->up[level][i],
                        b->ldm ? name_of(b, "decoder.up.%d.block.%d", last - level, i)
                               : name_of(b, "decoder.up_blocks.%d.resnets.%d", level, i),
                        i == 0 ? width : out, out);
        }
        width = out;
        if (level < last) {
            make_conv(b, &v->upsample[level],
                      b->ldm ? name_of(b, "decoder.up.%d.upsample.conv", last - level)
                             : name_of(b, "decoder.up_blocks.%d.upsamplers.0.conv", level),
                      width, width, 3);
        }
    }
    make_norm(b, &v->norm_out, name_of(b, b->ldm ? "decoder.norm_out" : "decoder.conv_norm_out"), width);
    make_conv(b, &v->conv_out, name_of(b, "decoder.conv_out"), width, c->image_channels, 3);
}

/* Decoder tensors that the config did not ask for mean that file and config disagree. */
static void check_all_used(builder *b) {
    size_t prefix_len = strlen(b->prefix);
    for (size_t i = 0; b->st == RF_OK && i < rf_weights_count(b->file); i++) {
        const char *name = rf_weights_name(b->file, i);
        if (b->used[i] || strncmp(name, b->prefix, prefix_len) != 0) continue;
        const char *rest = name + prefix_len;
        if (strncmp(rest, "decoder.", 8) == 0 || strncmp(rest, "post_quant_conv.", 16) == 0) {
            b->st = rf_fail(b->err, RF_ERR_CONFIG, "the file has %s, which the config does not describe", name);
        }
    }
}

static rf_status find_dialect(builder *b, rf_error *err) {
    static const char *const prefixes[] = {"", "first_stage_model."};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        b->prefix = prefixes[i];
        if (!rf_weights_has(b->file, name_of(b, "decoder.conv_in.weight").text)) continue;
        b->ldm = rf_weights_has(b->file, name_of(b, "decoder.mid.block_1.conv1.weight").text);
        return RF_OK;
    }
    return rf_fail(err, RF_ERR_MISSING, "no tensor decoder.conv_in.weight or first_stage_model.decoder.conv_in.weight");
}

static rf_status create(rf_vae **out, rf_backend *backend, const rf_vae_config *config, rf_dtype dtype, rf_error *err) {
    if (dtype != RF_DTYPE_F32 && !(dtype == RF_DTYPE_BF16 && rf_backend_get_kind(backend) == RF_BACKEND_CUDA)) {
        return rf_fail(err, RF_ERR_DTYPE, "vae: dtype %s is not computed on %s", rf_dtype_name(dtype),
                       rf_backend_name(backend));
    }
    rf_vae *v = rf_alloc_zero(1, sizeof *v);
    if (!v) return rf_fail(err, RF_ERR_MEMORY, "vae: no memory");
    v->config = *config;
    v->dtype = dtype;
    v->backend = backend;
    rf_status st = rf_params_create(&v->params, backend, err);
    if (st != RF_OK) {
        rf_free(v);
        return st;
    }
    *out = v;
    return RF_OK;
}

rf_status rf_vae_load(rf_vae **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err) {
    *out = NULL;
    rf_json *doc = NULL;
    rf_weights *file = NULL;
    rf_vae *vae = NULL;
    bool *used = NULL;
    rf_vae_config config;
    char *path = rf_path_join(dir, "config.json");
    rf_status st = path ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "%s: no memory", dir);
    if (st == RF_OK) st = rf_json_open(&doc, path, err);
    if (st == RF_OK) st = read_config(&config, doc, err);
    if (st == RF_OK) st = rf_weights_open(&file, dir, err);
    if (st == RF_OK) st = create(&vae, backend, &config, dtype, err);
    if (st == RF_OK && !(used = rf_alloc_zero(rf_weights_count(file) + 1, sizeof *used))) {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory", dir);
    }
    if (st == RF_OK) {
        builder b = {.vae = vae, .file = file, .used = used, .err = err};
        b.st = find_dialect(&b, err);
        if (b.st == RF_OK) make_decoder(&b);
        if (b.st == RF_OK) check_all_used(&b);
        st = b.st;
        if (st != RF_OK) rf_fail_prefix(err, st, "%s", dir);
    }
    rf_free(used);
    rf_free(path);
    rf_json_close(doc);
    rf_weights_close(file);
    if (st == RF_OK)
        *out = vae;
    else
        rf_vae_close(vae);
    return st;
}

rf_status rf_vae_synthetic(rf_vae **out, rf_backend *backend, const rf_vae_config *config, rf_dtype dtype,
                           uint64_t seed, rf_error *err) {
    *out = NULL;
    rf_vae *vae = NULL;
    rf_stream *stream = NULL;
    rf_status st = check_config(config, err);
    if (st == RF_OK) st = create(&vae, backend, config, dtype, err);
    if (st == RF_OK) st = rf_stream_create(&stream, backend, err);
    if (st == RF_OK) {
        builder b = {.vae = vae, .prefix = "", .ops = rf_ops_for(backend), .stream = stream, .seed = seed, .err = err};
        make_decoder(&b);
        st = b.st;
    }
    if (st == RF_OK) st = rf_stream_synchronize(stream, err);
    rf_stream_destroy(stream);
    if (st == RF_OK)
        *out = vae;
    else
        rf_vae_close(vae);
    return st;
}

void rf_vae_close(rf_vae *vae) {
    if (!vae) return;
    rf_params_destroy(vae->params);
    rf_free(vae);
}

const rf_vae_config *rf_vae_get_config(const rf_vae *vae) {
    return &vae->config;
}

size_t rf_vae_weights_bytes(const rf_vae *vae) {
    return vae->num_bytes;
}

int64_t rf_vae_num_params(const rf_vae *vae) {
    return vae->num_params;
}

/* ---- session ---- */

enum { WORK_X = 0, WORK_A, WORK_B, NUM_WORK };

typedef struct {
    void *p;
    size_t bytes; /* grown while planning */
} buffer;

struct rf_vae_session {
    const rf_vae *vae;
    const rf_ops *ops;
    rf_stream *stream;
    int64_t batch, height, width; /* of the latent */
    rf_vae_attention attention;
    rf_dtype attn_dtype; /* of the GEMM form: the model's, or f32 */
    buffer work[NUM_WORK];
    buffer scores;  /* f32 [rows of a chunk, pixels] */
    buffer probs;   /* the same in attn_dtype; unused where that is f32 */
    buffer attn_in; /* f32 copies of q|k|v and of the result, where attn_dtype is not the model's */
    buffer attn_out;
    buffer workspace; /* of any operator */
    buffer picture;
    void *memory;
    size_t memory_bytes;
};

/* The state of a walk: which buffer plays x, a, b, and the picture's shape. */
typedef struct {
    rf_vae_session *s;
    rf_stream *stream; /* NULL: planning */
    int x, a, b;
    int64_t height, width;
    rf_error *err;
    rf_status st;
} walk;

static void want(walk *k, buffer *buf, int64_t num, rf_dtype dtype) {
    size_t bytes = (size_t)num * rf_dtype_bytes(dtype);
    if (!k->stream && bytes > buf->bytes) buf->bytes = bytes;
}

static void want_workspace(walk *k, size_t bytes) {
    if (!k->stream && bytes > k->s->workspace.bytes) k->s->workspace.bytes = bytes;
}

/* NULL stays NULL: while planning there is no memory yet. */
static void *offset(void *p, int64_t num, rf_dtype dtype) {
    return p ? (char *)p + (size_t)num * rf_dtype_bytes(dtype) : NULL;
}

static int64_t num_pixels(const walk *k) {
    return k->s->batch * k->height * k->width;
}

static void run_norm(walk *k, const norm_weights *n, int src, int dst, bool silu) {
    rf_vae_session *s = k->s;
    if (k->st != RF_OK) return;
    want(k, &s->work[dst], num_pixels(k) * n->channels, s->vae->dtype);
    rf_group_norm_args args = {.x = s->work[src].p,
                               .y = s->work[dst].p,
                               .dtype = s->vae->dtype,
                               .batch = s->batch,
                               .pixels = k->height * k->width,
                               .channels = n->channels,
                               .num_groups = s->vae->config.num_groups,
                               .eps = GROUP_NORM_EPS,
                               .weight = n->w,
                               .bias = n->b,
                               .silu = silu,
                               .workspace = s->workspace.p,
                               .workspace_bytes = s->workspace.bytes};
    want_workspace(k, rf_group_norm_workspace_bytes(&args));
    k->st = s->ops->group_norm(k->stream, &args, k->err);
}

/* dst = conv(src) + addend; addend may be dst, -1 = none. upsample doubles the picture. */
static void run_conv(walk *k, const conv_weights *c, int src, int dst, int addend, bool upsample) {
    rf_vae_session *s = k->s;
    if (k->st != RF_OK) return;
    rf_conv2d_args args = {.x = s->work[src].p,
                           .w = c->w,
                           .addend = addend < 0 ? NULL : s->work[addend].p,
                           .bias = c->b,
                           .y = s->work[dst].p,
                           .dtype = s->vae->dtype,
                           .batch = s->batch,
                           .height = k->height,
                           .width = k->width,
                           .in_channels = c->in,
                           .out_channels = c->out,
                           .kernel = c->kernel,
                           .stride = 1,
                           .pad_before = c->kernel / 2,
                           .pad_after = c->kernel / 2,
                           .upsample = upsample,
                           .workspace = s->workspace.p,
                           .workspace_bytes = s->workspace.bytes};
    want_workspace(k, s->ops->conv2d_workspace(s->vae->backend, &args));
    if (upsample) {
        k->height *= 2;
        k->width *= 2;
    }
    want(k, &s->work[dst], num_pixels(k) * c->out, s->vae->dtype);
    k->st = s->ops->conv2d(k->stream, &args, k->err);
}

static void swap_x_and_a(walk *k) {
    int x = k->x;
    k->x = k->a;
    k->a = x;
}

static void run_resnet(walk *k, const resnet_weights *r) {
    run_norm(k, &r->norm1, k->x, k->a, true);
    run_conv(k, &r->conv1, k->a, k->b, -1, false);
    run_norm(k, &r->norm2, k->b, k->b, true);
    if (r->shortcut.w) {
        run_conv(k, &r->shortcut, k->x, k->a, -1, false);
        run_conv(k, &r->conv2, k->b, k->a, k->a, false);
        swap_x_and_a(k);
    } else {
        run_conv(k, &r->conv2, k->b, k->x, k->x, false);
    }
}

/* ---- middle attention: GN in a, q|k|v in b, result in a, projected onto x ---- */

static rf_attention_args fused_args(const rf_vae_session *s) {
    int64_t pixels = s->height * s->width, dim = s->vae->attn_out.in;
    rf_attention_args args = rf_attention_args_packed(s->vae->dtype, s->batch, pixels, 1, (int)dim, NULL, NULL);
    args.softmax_scale = (float)(1 / sqrt((double)s->vae->attn_norm.channels));
    return args;
}

static void run_fused(walk *k) {
    rf_vae_session *s = k->s;
    rf_dtype dtype = s->vae->dtype;
    int64_t dim = s->vae->attn_out.in;
    rf_attention_args args = fused_args(s);
    args.q = s->work[k->b].p;
    args.k = offset(s->work[k->b].p, dim, dtype);
    args.v = offset(s->work[k->b].p, 2 * dim, dtype);
    args.out = s->work[k->a].p;
    size_t bytes = s->ops->attention_workspace(s->vae->backend, &args);
    want_workspace(k, bytes);
    args.workspace = bytes ? s->workspace.p : NULL;
    args.workspace_bytes = bytes ? s->workspace.bytes : 0;
    if (k->st == RF_OK) k->st = s->ops->attention(k->stream, &args, k->err);
}

static void run_cast(walk *k, const void *src, rf_dtype src_dtype, void *dst, rf_dtype dst_dtype, int64_t rows,
                     int64_t cols) {
    rf_elementwise_args args = rf_elementwise_args_default(src_dtype, dst_dtype, rows, cols);
    args.x = src;
    args.y = dst;
    if (k->st == RF_OK) k->st = k->s->ops->elementwise(k->stream, &args, k->err);
}

/* `rows` queries of each of `samples` samples against all their keys. */
static void run_gemm_chunk(walk *k, const void *q, const void *key, const void *value, void *out, int64_t samples,
                           int64_t rows) {
    rf_vae_session *s = k->s;
    rf_dtype dtype = s->attn_dtype;
    int64_t pixels = s->height * s->width, dim = s->vae->attn_out.in;
    bool in_place = dtype == RF_DTYPE_F32;
    want(k, &s->scores, samples * rows * pixels, RF_DTYPE_F32);
    if (!in_place) want(k, &s->probs, samples * rows * pixels, dtype);
    void *probs = in_place ? s->scores.p : s->probs.p;

    rf_gemm_args scores = rf_gemm_args_default(dtype, rows, pixels, dim);
    scores.x = q;
    scores.w = key;
    scores.y = s->scores.p;
    scores.y_dtype = RF_DTYPE_F32;
    scores.ldx = scores.ldw = 3 * dim;
    scores.num_batches = samples;
    scores.x_batch_stride = scores.w_batch_stride = 3 * dim * pixels;
    scores.y_batch_stride = rows * pixels;
    if (k->st == RF_OK) k->st = s->ops->gemm(k->stream, &scores, k->err);

    rf_softmax_args softmax = {.x = s->scores.p,
                               .y = probs,
                               .x_dtype = RF_DTYPE_F32,
                               .y_dtype = dtype,
                               .rows = samples * rows,
                               .cols = pixels,
                               .scale = (float)(1 / sqrt((double)s->vae->attn_norm.channels))};
    if (k->st == RF_OK) k->st = s->ops->softmax(k->stream, &softmax, k->err);

    rf_gemm_args sum = rf_gemm_args_default(dtype, rows, dim, pixels);
    sum.x = probs;
    sum.w = value;
    sum.y = out;
    sum.w_is_kn = true;
    sum.ldw = 3 * dim;
    sum.num_batches = samples;
    sum.x_batch_stride = rows * pixels;
    sum.w_batch_stride = 3 * dim * pixels;
    sum.y_batch_stride = pixels * dim;
    if (k->st == RF_OK) k->st = s->ops->gemm(k->stream, &sum, k->err);
}

/* In chunks of whole samples, or of one sample's queries where even one is too large. */
static void run_gemms(walk *k) {
    rf_vae_session *s = k->s;
    rf_dtype dtype = s->attn_dtype;
    int64_t pixels = s->height * s->width, dim = s->vae->attn_out.in;
    int64_t fit = (int64_t)(SCORE_BYTES / sizeof(float)) / pixels; /* queries */
    int64_t rows = fit >= pixels ? pixels : fit < 64 ? 64 : fit / 64 * 64;
    int64_t samples = fit >= pixels ? fit / pixels : 1;
    if (rows > pixels) rows = pixels;
    if (samples > s->batch) samples = s->batch;
    bool casts = dtype != s->vae->dtype;

    for (int64_t first = 0; first < s->batch; first += samples) {
        int64_t num = s->batch - first < samples ? s->batch - first : samples;
        void *qkv = offset(s->work[k->b].p, first * pixels * 3 * dim, s->vae->dtype);
        void *out = offset(s->work[k->a].p, first * pixels * dim, s->vae->dtype);
        void *model_out = out;
        if (casts) {
            want(k, &s->attn_in, num * pixels * 3 * dim, dtype);
            want(k, &s->attn_out, num * pixels * dim, dtype);
            run_cast(k, qkv, s->vae->dtype, s->attn_in.p, dtype, num * pixels, 3 * dim);
            qkv = s->attn_in.p;
            out = s->attn_out.p;
        }
        for (int64_t row = 0; row < pixels; row += rows) {
            run_gemm_chunk(k, offset(qkv, row * 3 * dim, dtype), offset(qkv, dim, dtype), offset(qkv, 2 * dim, dtype),
                           offset(out, row * dim, dtype), num, pixels - row < rows ? pixels - row : rows);
        }
        if (casts) run_cast(k, out, dtype, model_out, s->vae->dtype, num * pixels, dim);
    }
}

static void run_attention(walk *k) {
    rf_vae_session *s = k->s;
    const rf_vae *v = s->vae;
    run_norm(k, &v->attn_norm, k->x, k->a, false);
    run_conv(k, &v->attn_qkv, k->a, k->b, -1, false);
    want(k, &s->work[k->a], num_pixels(k) * v->attn_out.in, v->dtype);
    if (s->attention == RF_VAE_ATTENTION_FUSED)
        run_fused(k);
    else
        run_gemms(k);
    run_conv(k, &v->attn_out, k->a, k->x, k->x, false);
}

/* ---- the whole decoder ---- */

static void run_layout(walk *k, const void *src, void *dst, int64_t channels, bool to_last, double scale,
                       double shift) {
    rf_dtype dtype = k->s->vae->dtype;
    rf_elementwise_args args = rf_elementwise_args_default(
        to_last ? RF_DTYPE_F32 : dtype, to_last ? dtype : RF_DTYPE_F32, k->s->batch, channels * k->height * k->width);
    args.x = src;
    args.y = dst;
    args.channels = channels;
    args.planar_to_last = to_last;
    args.last_to_planar = !to_last;
    args.x_scale = (float)scale;
    args.x_shift = (float)shift;
    if (k->st == RF_OK) k->st = k->s->ops->elementwise(k->stream, &args, k->err);
}

/* stream NULL: planning. latent NULL with a stream: x is already filled. */
static rf_status decode(rf_vae_session *s, rf_stream *stream, const float *latent, rf_error *err) {
    const rf_vae *v = s->vae;
    const rf_vae_config *c = &v->config;
    walk k = {.s = s, .stream = stream, .x = WORK_X, .a = WORK_A, .b = WORK_B, .err = err};
    k.height = s->height;
    k.width = s->width;

    want(&k, &s->work[k.x], num_pixels(&k) * c->latent_channels, v->dtype);
    if (latent || !stream) {
        run_layout(&k, latent, s->work[k.x].p, c->latent_channels, true, 1 / c->scaling_factor, c->shift_factor);
    }
    if (c->has_post_quant_conv) {
        run_conv(&k, &v->post_quant, k.x, k.a, -1, false);
        swap_x_and_a(&k);
    }
    run_conv(&k, &v->conv_in, k.x, k.a, -1, false);
    swap_x_and_a(&k);

    run_resnet(&k, &v->mid[0]);
    if (c->mid_attention) run_attention(&k);
    run_resnet(&k, &v->mid[1]);
    for (int level = 0; level < c->num_levels; level++) {
        for (int i = 0; i <= c->layers_per_block; i++) run_resnet(&k, &v->up[level][i]);
        if (level + 1 < c->num_levels) {
            run_conv(&k, &v->upsample[level], k.x, k.a, -1, true);
            swap_x_and_a(&k);
        }
    }
    run_norm(&k, &v->norm_out, k.x, k.x, true);
    run_conv(&k, &v->conv_out, k.x, k.a, -1, false);
    want(&k, &s->picture, num_pixels(&k) * c->image_channels, RF_DTYPE_F32);
    run_layout(&k, s->work[k.a].p, s->picture.p, c->image_channels, false, 1, 0);
    return k.st;
}

/* The same takes for counting and for the real arena. */
static rf_status take_buffers(rf_vae_session *s, rf_arena *arena, rf_error *err) {
    static const char *const names[NUM_WORK] = {"vae work x", "vae work a", "vae work b"};
    struct {
        buffer *buf;
        const char *name;
    } others[] = {{&s->scores, "vae attention scores"},      {&s->probs, "vae attention weights"},
                  {&s->attn_in, "vae attention input"},      {&s->attn_out, "vae attention output"},
                  {&s->workspace, "vae operator workspace"}, {&s->picture, "vae picture"}};
    rf_status st = RF_OK;
    for (int i = 0; i < NUM_WORK && st == RF_OK; i++) {
        st = rf_arena_take(arena, &s->work[i].p, names[i], s->work[i].bytes, 1, err);
    }
    for (size_t i = 0; i < sizeof others / sizeof *others && st == RF_OK; i++) {
        if (others[i].buf->bytes)
            st = rf_arena_take(arena, &others[i].buf->p, others[i].name, others[i].buf->bytes, 1, err);
    }
    return st;
}

static void reset_plan(rf_vae_session *s) {
    for (int i = 0; i < NUM_WORK; i++) s->work[i] = (buffer){0};
    s->scores = s->probs = s->attn_in = s->attn_out = s->workspace = s->picture = (buffer){0};
}

/* Plans with the forms of attention that the caller allows, the best first. */
static rf_status plan(rf_vae_session *s, rf_vae_attention asked, rf_error *err) {
    const rf_vae *v = s->vae;
    s->attn_dtype = v->dtype;
    if (!v->config.mid_attention) return decode(s, NULL, NULL, err);
    s->attention = asked;
    if (asked == RF_VAE_ATTENTION_AUTO) {
        rf_attention_args args = fused_args(s);
        bool fused = s->ops->attention(NULL, &args, NULL) == RF_OK;
        s->attention = fused ? RF_VAE_ATTENTION_FUSED : RF_VAE_ATTENTION_GEMM;
    }
    rf_status st = decode(s, NULL, NULL, err);
    if (st == RF_OK || s->attention != RF_VAE_ATTENTION_GEMM || v->dtype == RF_DTYPE_F32) return st;
    reset_plan(s);
    s->attn_dtype = RF_DTYPE_F32; /* bf16 GEMMs take multiples of 8 pixels, f32 ones of 4 */
    return decode(s, NULL, NULL, err);
}

rf_status rf_vae_session_create_with(rf_vae_session **out, const rf_vae *vae, rf_stream *stream, int64_t batch,
                                     int64_t height, int64_t width, rf_vae_attention attention, rf_error *err) {
    *out = NULL;
    int64_t factor = (int64_t)1 << (vae->config.num_levels - 1);
    if (batch < 1 || batch > 65536) {
        return rf_fail(err, RF_ERR_ARGUMENT, "vae: batch %lld, must be 1..65536", (long long)batch);
    }
    if (height < 1 || width < 1 || height > MAX_SIDE / factor || width > MAX_SIDE / factor) {
        return rf_fail(err, RF_ERR_SHAPE, "vae: latent %lld x %lld, each side must be 1..%lld", (long long)height,
                       (long long)width, (long long)(MAX_SIDE / factor));
    }
    if (rf_stream_backend(stream) != vae->backend) {
        return rf_fail(err, RF_ERR_ARGUMENT, "vae: the stream is of %s, the weights are on %s",
                       rf_backend_name(rf_stream_backend(stream)), rf_backend_name(vae->backend));
    }
    rf_vae_session *s = rf_alloc_zero(1, sizeof *s);
    if (!s) return rf_fail(err, RF_ERR_MEMORY, "vae: no memory for a session");
    s->vae = vae;
    s->ops = rf_ops_for(vae->backend);
    s->stream = stream;
    s->batch = batch;
    s->height = height;
    s->width = width;

    rf_status st = plan(s, attention, err);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    if (st == RF_OK) st = take_buffers(s, &arena, err);
    s->memory_bytes = arena.peak;
    if (st == RF_OK) st = rf_backend_alloc(vae->backend, &s->memory, s->memory_bytes, err);
    if (st == RF_OK) {
        rf_arena_init(&arena, s->memory, s->memory_bytes);
        st = take_buffers(s, &arena, err);
    }
    if (st == RF_OK && rf_backend_get_kind(vae->backend) != RF_BACKEND_CPU) {
        /* GEMM algorithms are chosen and kernels loaded now, not in the first decode */
        rf_phase phase = rf_stream_get_phase(stream);
        rf_stream_set_phase(stream, RF_PHASE_PLAN);
        st = rf_stream_zero(stream, s->work[WORK_X].p, s->work[WORK_X].bytes, err);
        if (st == RF_OK) st = decode(s, stream, NULL, err);
        if (st == RF_OK) st = rf_stream_synchronize(stream, err);
        rf_stream_set_phase(stream, phase);
    }
    if (st == RF_OK)
        *out = s;
    else
        rf_vae_session_destroy(s);
    return st;
}

rf_status rf_vae_session_create(rf_vae_session **out, const rf_vae *vae, rf_stream *stream, int64_t batch,
                                int64_t height, int64_t width, rf_error *err) {
    return rf_vae_session_create_with(out, vae, stream, batch, height, width, RF_VAE_ATTENTION_AUTO, err);
}

void rf_vae_session_destroy(rf_vae_session *session) {
    if (!session) return;
    rf_stream_synchronize(session->stream, NULL); /* queued work reads the buffer */
    rf_backend_free(session->vae->backend, session->memory);
    rf_free(session);
}

size_t rf_vae_session_arena_bytes(const rf_vae_session *session) {
    return session->memory_bytes;
}

const char *rf_vae_session_attention(const rf_vae_session *session) {
    if (!session->vae->config.mid_attention) return "none";
    if (session->attention == RF_VAE_ATTENTION_FUSED) return "fused";
    return session->attn_dtype == session->vae->dtype ? "gemm" : "gemm f32";
}

rf_status rf_vae_session_decode(rf_vae_session *session, const float *latent, rf_error *err) {
    if (!latent) return rf_fail(err, RF_ERR_ARGUMENT, "vae: no latent");
    return decode(session, session->stream, latent, err);
}

const float *rf_vae_session_output(const rf_vae_session *session) {
    return session->picture.p;
}
