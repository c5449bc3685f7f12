/* dit/vit_vae.c - two unconditioned transformers and what lies between their rows and pictures. */
#include "dit/vit_vae.h"

#include <stdio.h>

#include "core/memory.h"
#include "dit/forward.h"

struct rf_vit_vae {
    rf_vit_vae_config config;
    rf_backend *backend;
    rf_dit_model *encoder, *decoder;
};

struct rf_vit_vae_session {
    const rf_vit_vae *vae;
    const rf_ops *ops;
    rf_stream *stream;
    int64_t batch, grid, frame_elems; /* grid: latent pixels of a frame */
    rf_dit_session *encoder, *decoder;
    char *memory;
    size_t memory_bytes;
    float *planes; /* [batch, 2 latent_dim, grid]: mean and log variance */
    float *frames; /* [batch, 3, H, W] */
    float *unused; /* as large: what a solver step writes beside its result */
    float *unscale;
    rf_sampler_coefs *take_output;
    int32_t *zero;
};

/* --- description ----------------------------------------------------------------------------------------------------- */

rf_vit_vae_config rf_vit_vae_config_oasis(void) {
    return (rf_vit_vae_config){.input_height = 360,
                               .input_width = 640,
                               .patch_size = 20,
                               .latent_dim = 16,
                               .enc_dim = 1024,
                               .enc_depth = 6,
                               .enc_heads = 16,
                               .dec_dim = 1024,
                               .dec_depth = 12,
                               .dec_heads = 16,
                               .mlp_ratio = 4.0,
                               .scaling_factor = 0.07843137255};
}

rf_status rf_vit_vae_config_read(rf_vit_vae_config *c, const rf_json *doc, const rf_json_value *object, rf_error *err) {
    struct {
        const char *key;
        int max, *value;
    } list[] = {
        {"input_height", 8192, &c->input_height}, {"input_width", 8192, &c->input_width},
        {"patch_size", 64, &c->patch_size},       {"latent_dim", 256, &c->latent_dim},
        {"enc_dim", 1 << 15, &c->enc_dim},        {"enc_depth", 1024, &c->enc_depth},
        {"enc_heads", 1024, &c->enc_heads},       {"dec_dim", 1 << 15, &c->dec_dim},
        {"dec_depth", 1024, &c->dec_depth},       {"dec_heads", 1024, &c->dec_heads},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        int64_t value = 0;
        RF_TRY(rf_json_opt_int(doc, object, list[i].key, 1, list[i].max, *list[i].value, &value, err));
        *list[i].value = (int)value;
    }
    RF_TRY(rf_json_opt_double(doc, object, "mlp_ratio", 0.01, 64.0, c->mlp_ratio, &c->mlp_ratio, err));
    if (c->input_height % c->patch_size || c->input_width % c->patch_size)
        return rf_fail(err, RF_ERR_CONFIG, "%s: frames of %d x %d are not whole patches of %d", rf_json_name(doc),
                       c->input_width, c->input_height, c->patch_size);
    if (c->enc_dim % c->enc_heads || c->enc_dim / c->enc_heads % 8 || c->dec_dim % c->dec_heads ||
        c->dec_dim / c->dec_heads % 8)
        return rf_fail(err, RF_ERR_CONFIG, "%s: widths %d and %d in %d and %d heads, expected heads of a multiple of 8",
                       rf_json_name(doc), c->enc_dim, c->dec_dim, c->enc_heads, c->dec_heads);
    return RF_OK;
}

/* L x { SELF(affine norm, rope)  MLP(affine norm) }; a quarter of a head's dims turns by row, a quarter by column. */
static rf_dit_desc describe(const rf_vit_vae_config *c, bool decoder) {
    int dim = decoder ? c->dec_dim : c->enc_dim, heads = decoder ? c->dec_heads : c->enc_heads;
    int grid_h = c->input_height / c->patch_size, grid_w = c->input_width / c->patch_size;
    rf_dit_desc d = {.width = dim, .num_heads = heads, .head_dim = dim / heads};
    snprintf(d.family, sizeof d.family, decoder ? "ViT decoder" : "ViT encoder");
    d.num_segments = 1;
    d.pt = 1;
    d.ph = d.pw = decoder ? 1 : c->patch_size;
    d.out_patch = decoder ? c->patch_size : 1;
    d.in_channels = decoder ? c->latent_dim : 3;
    d.out_channels = decoder ? 3 : 2 * c->latent_dim;
    d.pos = RF_POS_NONE;
    d.num_ropes = 1;
    d.ropes[0] =
        (rf_rope_desc){.kind = RF_ROPE_AXIAL, .num_pairs = d.head_dim / 8, .max_freq = (double)grid_h * (double)grid_w};
    d.mod_rows = RF_MOD_ROWS_SAMPLE;
    d.final_norm = RF_PART_NORM_LAYER_AFFINE;
    d.final_eps = 1e-6;
    d.sample_size = decoder ? grid_h : c->input_height;
    d.sample_width = decoder ? grid_w : c->input_width;
    d.sample_frames = 1;
    d.num_groups = 1;
    rf_part_segment plain = {.present = true, .shift = -1, .scale = -1, .gate = -1};
    d.groups[0] = (rf_block_group){.count = decoder ? c->dec_depth : c->enc_depth, .num_parts = 2};
    d.groups[0].parts[0] = (rf_part_desc){.kind = RF_PART_SELF,
                                          .segments = {plain},
                                          .norm = RF_PART_NORM_LAYER_AFFINE,
                                          .norm_eps = 1e-6,
                                          .scope = RF_SCOPE_FRAME,
                                          .qkv_bias = true,
                                          .out_bias = true};
    d.groups[0].parts[1] = (rf_part_desc){.kind = RF_PART_MLP,
                                          .segments = {plain},
                                          .norm = RF_PART_NORM_LAYER_AFFINE,
                                          .norm_eps = 1e-6,
                                          .rope = -1,
                                          .out_bias = true,
                                          .ffn_dim = (int64_t)((double)dim * c->mlp_ratio),
                                          .act = RF_ACT_GELU_ERF};
    return d;
}

/* --- weights --------------------------------------------------------------------------------------------------------- */

/* path NULL: drawn. */
static rf_status open_vae(rf_vit_vae **out, rf_backend *backend, const rf_vit_vae_config *config, const char *path,
                          rf_dtype dtype, uint64_t seed, rf_error *err) {
    *out = NULL;
    rf_vit_vae *v = rf_alloc_zero(1, sizeof *v);
    if (v == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a VAE");
    v->config = *config;
    v->backend = backend;
    rf_status st = RF_OK;
    for (int decoder = 0; decoder < 2 && st == RF_OK; decoder++) {
        rf_dit_desc desc = describe(config, decoder);
        rf_dit_model **model = decoder ? &v->decoder : &v->encoder;
        if (path != NULL)
            st = rf_dit_model_load_vit_vae(model, backend, &desc, decoder, path, dtype, err);
        else
            st = rf_dit_model_synthetic(model, backend, &desc, dtype, seed + (uint64_t)decoder, err);
    }
    if (st == RF_OK)
        *out = v;
    else
        rf_vit_vae_close(v);
    return st;
}

rf_status rf_vit_vae_load(rf_vit_vae **out, rf_backend *backend, const rf_vit_vae_config *config, const char *path,
                          rf_dtype dtype, rf_error *err) {
    return open_vae(out, backend, config, path, dtype, 0, err);
}

rf_status rf_vit_vae_synthetic(rf_vit_vae **out, rf_backend *backend, const rf_vit_vae_config *config, rf_dtype dtype,
                               uint64_t seed, rf_error *err) {
    return open_vae(out, backend, config, NULL, dtype, seed, err);
}

void rf_vit_vae_close(rf_vit_vae *v) {
    if (v == NULL) return;
    rf_dit_model_close(v->encoder);
    rf_dit_model_close(v->decoder);
    rf_free(v);
}

const rf_vit_vae_config *rf_vit_vae_get_config(const rf_vit_vae *v) {
    return &v->config;
}
size_t rf_vit_vae_weights_bytes(const rf_vit_vae *v) {
    return rf_params_tensor_bytes(v->encoder->params) + rf_params_tensor_bytes(v->decoder->params);
}
int64_t rf_vit_vae_num_params(const rf_vit_vae *v) {
    return rf_params_num_elems(v->encoder->params) + rf_params_num_elems(v->decoder->params);
}

/* --- sessions -------------------------------------------------------------------------------------------------------- */

static rf_status create_forward(rf_vit_vae_session *s, rf_dit_session **out, const rf_dit_model *model, rf_error *err) {
    rf_dit_session_options o = rf_dit_session_options_default();
    o.batch = s->batch;
    o.height = model->desc.sample_size;
    o.width = model->desc.sample_width;
    o.residual_dtype = RF_DTYPE_F32;
    return rf_dit_session_create(out, model, s->stream, &o, err);
}

static rf_status take_memory(rf_vit_vae_session *s, rf_error *err) {
    const rf_vit_vae_config *c = &s->vae->config;
    size_t planes = (size_t)(s->batch * 2 * c->latent_dim * s->grid), frames = (size_t)(s->batch * s->frame_elems);
    size_t planes_bytes = (planes * sizeof(float) + 255) / 256 * 256,
           frames_bytes = (frames * sizeof(float) + 255) / 256 * 256;
    s->memory_bytes = planes_bytes + 2 * frames_bytes + 256 * 3;
    RF_TRY(rf_backend_alloc(s->vae->backend, (void **)&s->memory, s->memory_bytes, err));
    s->planes = (float *)(void *)s->memory;
    s->frames = (float *)(void *)(s->memory + planes_bytes);
    s->unused = (float *)(void *)(s->memory + planes_bytes + frames_bytes);
    char *rest = s->memory + planes_bytes + 2 * frames_bytes;
    s->unscale = (float *)(void *)rest;
    s->take_output = (rf_sampler_coefs *)(void *)(rest + 256);
    s->zero = (int32_t *)(void *)(rest + 512);
    /* x' = out: the end of a denoising step puts rows back into pictures */
    struct {
        float unscale;
        rf_sampler_coefs take;
    } host = {(float)(1.0 / c->scaling_factor), {.in_scale = 1.0f, .out = 1.0f}};
    RF_TRY(rf_stream_upload(s->stream, s->unscale, &host.unscale, sizeof host.unscale, err));
    RF_TRY(rf_stream_upload(s->stream, s->take_output, &host.take, sizeof host.take, err));
    RF_TRY(rf_stream_zero(s->stream, s->zero, sizeof *s->zero, err));
    return rf_stream_synchronize(s->stream, err);
}

rf_status rf_vit_vae_session_create(rf_vit_vae_session **out, const rf_vit_vae *vae, rf_stream *stream, int64_t batch,
                                    rf_error *err) {
    const rf_vit_vae_config *c = &vae->config;
    *out = NULL;
    if (batch < 1 || batch > 4096)
        return rf_fail(err, RF_ERR_ARGUMENT, "%lld frames at a time, expected 1..4096", (long long)batch);
    rf_vit_vae_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a VAE session");
    s->vae = vae;
    s->ops = rf_ops_for(vae->backend);
    s->stream = stream;
    s->batch = batch;
    s->grid = (int64_t)(c->input_height / c->patch_size) * (c->input_width / c->patch_size);
    s->frame_elems = (int64_t)3 * c->input_height * c->input_width;
    rf_status st = take_memory(s, err);
    if (st == RF_OK) st = create_forward(s, &s->encoder, vae->encoder, err);
    if (st == RF_OK) st = create_forward(s, &s->decoder, vae->decoder, err);
    if (st == RF_OK)
        *out = s;
    else
        rf_vit_vae_session_destroy(s);
    return st;
}

void rf_vit_vae_session_destroy(rf_vit_vae_session *s) {
    if (s == NULL) return;
    rf_dit_session_destroy(s->encoder);
    rf_dit_session_destroy(s->decoder);
    rf_backend_free(s->vae->backend, s->memory);
    rf_free(s);
}

rf_status rf_vit_vae_session_encode(rf_vit_vae_session *s, const float *frames, float *latents, rf_error *err) {
    int64_t channels = s->vae->config.latent_dim;
    RF_TRY(rf_dit_session_forward(s->encoder, frames, NULL, 0, err));
    rf_elementwise_args planar =
        rf_elementwise_args_default(RF_DTYPE_F32, RF_DTYPE_F32, s->batch, 2 * channels * s->grid);
    planar.x = rf_dit_session_output(s->encoder);
    planar.y = s->planes;
    planar.last_to_planar = true;
    planar.channels = 2 * channels;
    planar.x_scale = (float)s->vae->config.scaling_factor;
    RF_TRY(s->ops->elementwise(s->stream, &planar, err));
    for (int64_t i = 0; i < s->batch; i++)
        RF_TRY(rf_stream_copy(s->stream, latents + i * channels * s->grid, s->planes + i * 2 * channels * s->grid,
                              (size_t)(channels * s->grid) * sizeof(float), err));
    return RF_OK;
}

rf_status rf_vit_vae_session_decode(rf_vit_vae_session *s, const float *latents, rf_error *err) {
    const rf_vit_vae_config *c = &s->vae->config;
    RF_TRY(rf_dit_session_forward(s->decoder, latents, s->unscale, 0, err));
    rf_sampler_step_args args = {.model_out = rf_dit_session_output(s->decoder),
                                 .model_dtype = RF_DTYPE_F32,
                                 .x = s->frames,
                                 .x0_prev = s->unused,
                                 .coefs = s->take_output,
                                 .step = s->zero,
                                 .batch = s->batch,
                                 .branches = 1,
                                 .channels = 3,
                                 .out_channels = 3,
                                 .frames = 1,
                                 .height = c->input_height,
                                 .width = c->input_width,
                                 .pt = 1,
                                 .ph = c->patch_size,
                                 .pw = c->patch_size,
                                 .guidance_scale = 1.0f,
                                 .guided_channels = 3};
    return s->ops->sampler_step(s->stream, &args, err);
}

const float *rf_vit_vae_session_output(const rf_vit_vae_session *s) {
    return s->frames;
}
size_t rf_vit_vae_session_bytes(const rf_vit_vae_session *s) {
    return s->memory_bytes + rf_dit_session_arena_bytes(s->encoder) + rf_dit_session_arena_bytes(s->decoder);
}
