/* dit/model.c - weight maps of the two DiT dialects into the executor's one form. */
#include "dit/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "dit/config.h"
#include "kernels/ops.h"

/* Where a dialect keeps a part's tensors. A name may hold one %d for the block; qkv is either one tensor (fused) or three. */
typedef struct {
    const char *qkv[3]; /* fused: [0] alone */
    const char *out, *fc1, *fc2, *norm;
} part_map;

/* Where a dialect keeps a role; NULL: it has none. */
typedef struct {
    const char *detect; /* a tensor name that only this dialect has */
    const char *patch, *temb1, *temb2, *labels, *action;
    bool patch_is_linear;     /* [D, c] instead of a convolution */
    const char *block_mod[2]; /* chunks in this order */
    const char *final_mod, *final_norm, *final;
    bool final_channels_first; /* rows in order (channel, ph, pw) already */
    part_map parts[RF_MAX_PARTS];
} weight_map;

static const weight_map weight_maps[] = {
    {
        .detect = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        .patch = "pos_embed.proj",
        .temb1 = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        .temb2 = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        .labels = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        .block_mod = {"transformer_blocks.%d.norm1.linear"},
        .final_mod = "proj_out_1",
        .final = "proj_out_2",
        .parts = {{.qkv = {"transformer_blocks.%d.attn1.to_q", "transformer_blocks.%d.attn1.to_k",
                           "transformer_blocks.%d.attn1.to_v"},
                   .out = "transformer_blocks.%d.attn1.to_out.0"},
                  {.fc1 = "transformer_blocks.%d.ff.net.0.proj", .fc2 = "transformer_blocks.%d.ff.net.2"}},
    },
    {
        .detect = "blocks.0.adaLN_modulation.1.weight",
        .patch = "x_embedder.proj",
        .temb1 = "t_embedder.mlp.0",
        .temb2 = "t_embedder.mlp.2",
        .labels = "y_embedder.embedding_table.weight",
        .block_mod = {"blocks.%d.adaLN_modulation.1"},
        .final_mod = "final_layer.adaLN_modulation.1",
        .final = "final_layer.linear",
        .parts = {{.qkv = {"blocks.%d.attn.qkv"}, .out = "blocks.%d.attn.proj"},
                  {.fc1 = "blocks.%d.mlp.fc1", .fc2 = "blocks.%d.mlp.fc2"}},
    },
    {
        .detect = "blocks.0.s_attn.to_qkv.weight", /* open-oasis */
        .patch = "x_embedder.proj",
        .temb1 = "t_embedder.mlp.0",
        .temb2 = "t_embedder.mlp.2",
        .action = "external_cond",
        .block_mod = {"blocks.%d.s_adaLN_modulation.1", "blocks.%d.t_adaLN_modulation.1"},
        .final_mod = "final_layer.adaLN_modulation.1",
        .final = "final_layer.linear",
        .parts = {{.qkv = {"blocks.%d.s_attn.to_qkv"}, .out = "blocks.%d.s_attn.to_out"},
                  {.fc1 = "blocks.%d.s_mlp.fc1", .fc2 = "blocks.%d.s_mlp.fc2"},
                  {.qkv = {"blocks.%d.t_attn.to_qkv"}, .out = "blocks.%d.t_attn.to_out"},
                  {.fc1 = "blocks.%d.t_mlp.fc1", .fc2 = "blocks.%d.t_mlp.fc2"}},
    },
};

/* The two halves of open-oasis' VAE, which share a file. */
static const weight_map vit_encoder_map = {
    .patch = "patch_embed.proj",
    .final_norm = "enc_norm",
    .final = "quant_conv",
    .final_channels_first = true,
    .parts = {{.qkv = {"encoder.%d.attn.qkv"}, .out = "encoder.%d.attn.proj", .norm = "encoder.%d.norm1"},
              {.fc1 = "encoder.%d.mlp.fc1", .fc2 = "encoder.%d.mlp.fc2", .norm = "encoder.%d.norm2"}},
};
static const weight_map vit_decoder_map = {
    .patch = "post_quant_conv",
    .patch_is_linear = true,
    .final_norm = "dec_norm",
    .final = "predictor",
    .final_channels_first = true,
    .parts = {{.qkv = {"decoder.%d.attn.qkv"}, .out = "decoder.%d.attn.proj", .norm = "decoder.%d.norm1"},
              {.fc1 = "decoder.%d.mlp.fc1", .fc2 = "decoder.%d.mlp.fc2", .norm = "decoder.%d.norm2"}},
};

static void expand(char *out, size_t out_bytes, const char *pattern, int block, const char *suffix) {
    const char *mark = strstr(pattern, "%d");
    if (mark == NULL)
        snprintf(out, out_bytes, "%s%s", pattern, suffix);
    else
        snprintf(out, out_bytes, "%.*s%d%s%s", (int)(mark - pattern), pattern, block, mark + 2, suffix);
}

/* One Linear of the file as host floats: w [out_dim, in_dim] (a patch convolution [out, c, ph, pw] is the same memory). b NULL: it has
 * no bias. */
static rf_status read_linear(const rf_weights *file, const char *pattern, int block, int64_t out_dim, int64_t in_dim,
                             int rank, const int64_t *w_shape, float **w, float **b, rf_error *err) {
    char name[160];
    int64_t linear_shape[2] = {out_dim, in_dim};
    rf_status st;
    *w = NULL;
    if (b != NULL) *b = NULL;
    expand(name, sizeof name, pattern, block, ".weight");
    st = rf_weights_read_f32(file, name, rank ? rank : 2, rank ? w_shape : linear_shape, w, err);
    if (st != RF_OK || b == NULL) return st;
    expand(name, sizeof name, pattern, block, ".bias");
    st = rf_weights_read_f32(file, name, 1, &out_dim, b, err);
    if (st != RF_OK) {
        rf_free(*w);
        *w = NULL;
    }
    return st;
}

static rf_status load_linear(rf_dit_model *m, const rf_weights *file, const char *pattern, int block, int64_t out_dim,
                             int64_t in_dim, int rank, const int64_t *w_shape, rf_linear *out, rf_error *err) {
    float *w = NULL, *b = NULL;
    rf_status st = read_linear(file, pattern, block, out_dim, in_dim, rank, w_shape, &w, &b, err);
    if (st == RF_OK) st = rf_params_put(m->params, &out->w, m->dtype, w, (size_t)(out_dim * in_dim), err);
    if (st == RF_OK) st = rf_params_put(m->params, &out->b, m->dtype, b, (size_t)out_dim, err);
    rf_free(w);
    rf_free(b);
    return st;
}

/* Rows first..first+out_dim of a taller matrix that is already on the device; dst->b NULL: without bias. */
static rf_status load_rows(rf_dit_model *m, const rf_weights *file, const char *pattern, int block, int64_t out_dim,
                           int64_t in_dim, const rf_linear *dst, int64_t first, rf_error *err) {
    size_t elem = rf_dtype_bytes(m->dtype);
    float *w = NULL, *b = NULL;
    rf_status st = read_linear(file, pattern, block, out_dim, in_dim, 0, NULL, &w, dst->b ? &b : NULL, err);
    if (st == RF_OK)
        st = rf_params_write(m->params, (char *)dst->w + (size_t)(first * in_dim) * elem, m->dtype, w,
                             (size_t)(out_dim * in_dim), err);
    if (st == RF_OK && dst->b)
        st = rf_params_write(m->params, (char *)dst->b + (size_t)first * elem, m->dtype, b, (size_t)out_dim, err);
    rf_free(w);
    rf_free(b);
    return st;
}

/* bias_dtype RF_DTYPE_COUNT: no bias. */
static rf_status take_linear(rf_dit_model *m, rf_linear *out, int64_t out_dim, int64_t in_dim, rf_dtype bias_dtype,
                             rf_error *err) {
    rf_status st = rf_params_take(m->params, &out->w, m->dtype, (size_t)(out_dim * in_dim), err);
    return st == RF_OK && bias_dtype != RF_DTYPE_COUNT
               ? rf_params_take(m->params, &out->b, bias_dtype, (size_t)out_dim, err)
               : st;
}

static rf_status load_norm(rf_dit_model *m, const rf_weights *file, const char *pattern, int block,
                           rf_norm_weights *out, rf_error *err) {
    char name[160];
    float *host = NULL;
    int64_t width = m->desc.width;
    for (int i = 0; i < 2; i++) {
        expand(name, sizeof name, pattern, block, i == 0 ? ".weight" : ".bias");
        RF_TRY(rf_weights_read_f32(file, name, 1, &width, &host, err));
        void *device = NULL;
        rf_status st = rf_params_put(m->params, &device, RF_DTYPE_F32, host, (size_t)width, err);
        rf_free(host);
        RF_TRY(st);
        *(i == 0 ? &out->weight : &out->bias) = device;
    }
    return RF_OK;
}

/* external_cond [cond_dim, action_dim], its rows padded with zeros. */
static rf_status load_action(rf_dit_model *m, const rf_weights *file, const char *name, rf_error *err) {
    int64_t rows = m->desc.cond_dim, cols = m->desc.action_dim, padded = rf_dit_padded_actions(&m->desc);
    float *w = NULL, *b = NULL;
    RF_TRY(read_linear(file, name, 0, rows, cols, 0, NULL, &w, &b, err));
    float *wide = rf_alloc_zero((size_t)(rows * padded), sizeof *wide);
    rf_status st = wide ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for action weights");
    for (int64_t r = 0; st == RF_OK && r < rows; r++)
        memcpy(wide + r * padded, w + r * cols, (size_t)cols * sizeof(float));
    if (st == RF_OK) st = rf_params_put(m->params, &m->action.w, m->dtype, wide, (size_t)(rows * padded), err);
    if (st == RF_OK) st = rf_params_put(m->params, &m->action.b, m->dtype, b, (size_t)rows, err);
    rf_free(wide);
    rf_free(w);
    rf_free(b);
    return st;
}

/* Files keep a denoiser's output rows in order (ph, pw, channel); the executor's order is (channel, ph, pw). */
static rf_status load_final(rf_dit_model *m, const rf_weights *file, const weight_map *map, rf_error *err) {
    const rf_dit_desc *d = &m->desc;
    int64_t rows = rf_dit_desc_out_dim(d), patch = rows / d->out_channels, width = d->width;
    float *w = NULL, *b = NULL, *pw = NULL, *pb = NULL;
    rf_status st = read_linear(file, map->final, 0, rows, width, 0, NULL, &w, &b, err);
    if (st != RF_OK) return st;
    pw = rf_alloc((size_t)(rows * width) * sizeof(float));
    pb = rf_alloc((size_t)rows * sizeof(float));
    if (pw == NULL || pb == NULL) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for the output matrix");
    for (int64_t c = 0; st == RF_OK && c < d->out_channels; c++) {
        for (int64_t p = 0; p < patch; p++) {
            int64_t dst = c * patch + p, src = map->final_channels_first ? dst : p * d->out_channels + c;
            memcpy(pw + dst * width, w + src * width, (size_t)width * sizeof(float));
            pb[dst] = b[src];
        }
    }
    if (st == RF_OK) st = rf_params_put(m->params, &m->final.w, m->dtype, pw, (size_t)(rows * width), err);
    if (st == RF_OK) st = rf_params_put(m->params, &m->final.b, RF_DTYPE_F32, pb, (size_t)rows, err);
    rf_free(w);
    rf_free(b);
    rf_free(pw);
    rf_free(pb);
    return st;
}

static rf_status load_part(rf_dit_model *m, const rf_weights *file, const part_map *map, int block,
                           const rf_part_desc *part, rf_part_weights *w, rf_error *err) {
    int64_t width = m->desc.width;
    if (part->norm == RF_PART_NORM_LAYER_AFFINE) RF_TRY(load_norm(m, file, map->norm, block, &w->norm, err));
    if (part->kind == RF_PART_SELF) {
        RF_TRY(take_linear(m, &w->qkv, 3 * width, width, part->qkv_bias ? m->dtype : RF_DTYPE_COUNT, err));
        int num = map->qkv[1] == NULL ? 1 : 3;
        for (int i = 0; i < num; i++)
            RF_TRY(load_rows(m, file, map->qkv[i], block, 3 * width / num, width, &w->qkv, i * width, err));
        return load_linear(m, file, map->out, block, width, width, 0, NULL, &w->out, err);
    }
    if (part->kind == RF_PART_MLP) {
        RF_TRY(load_linear(m, file, map->fc1, block, part->ffn_dim, width, 0, NULL, &w->fc1, err));
        return load_linear(m, file, map->fc2, block, width, part->ffn_dim, 0, NULL, &w->fc2, err);
    }
    return rf_fail(err, RF_ERR_UNSUPPORTED, "block %d: a part of this kind has no weight map", block);
}

static rf_status load_block(rf_dit_model *m, const rf_weights *file, const weight_map *map, int block,
                            const rf_block_group *group, int64_t first_chunk, rf_error *err) {
    int64_t width = m->desc.width;
    int num = map->block_mod[1] ? 2 : 1, chunks = group->num_chunks / num;
    for (int i = 0; i < num && group->num_chunks > 0; i++)
        RF_TRY(load_rows(m, file, map->block_mod[i], block, chunks * width, m->desc.cond_dim, &m->mod,
                         (first_chunk + i * chunks) * width, err));
    for (int p = 0; p < group->num_parts; p++)
        RF_TRY(load_part(m, file, &map->parts[p], block, &group->parts[p], &m->parts[block * RF_MAX_PARTS + p], err));
    return RF_OK;
}

/* What a model is told beside its latent. */
static rf_status load_conditioning(rf_dit_model *m, const rf_weights *file, const weight_map *map, rf_error *err) {
    const rf_dit_desc *d = &m->desc;
    if (d->cond_dim == 0) return RF_OK;
    RF_TRY(load_linear(m, file, map->temb1, 0, d->cond_dim, d->num_freqs, 0, NULL, &m->temb1, err));
    RF_TRY(load_linear(m, file, map->temb2, 0, d->cond_dim, d->cond_dim, 0, NULL, &m->temb2, err));
    if (d->action_dim > 0) RF_TRY(load_action(m, file, map->action, err));
    if (d->num_classes > 0) {
        int64_t shape[2] = {d->num_classes + 1, d->cond_dim};
        float *labels = NULL;
        RF_TRY(rf_weights_read_f32(file, map->labels, 2, shape, &labels, err));
        rf_status st = rf_params_put(m->params, &m->labels, m->dtype, labels, (size_t)(shape[0] * shape[1]), err);
        rf_free(labels);
        RF_TRY(st);
    }
    return take_linear(m, &m->mod, rf_dit_desc_num_chunks(d) * d->width, d->cond_dim, m->dtype, err);
}

static rf_status load_all(rf_dit_model *m, const rf_weights *file, const weight_map *map, rf_error *err) {
    const rf_dit_desc *d = &m->desc;
    int64_t patch_dim = (int64_t)d->in_channels * d->ph * d->pw;
    int64_t conv_shape[4] = {d->width, d->in_channels, d->ph, d->pw}, linear_shape[2] = {d->width, patch_dim};
    RF_TRY(load_linear(m, file, map->patch, 0, d->width, patch_dim, map->patch_is_linear ? 2 : 4,
                       map->patch_is_linear ? linear_shape : conv_shape, &m->patch, err));
    RF_TRY(load_conditioning(m, file, map, err));
    int64_t chunk = 0;
    int block = 0;
    for (int g = 0; g < d->num_groups; g++)
        for (int i = 0; i < d->groups[g].count; i++, block++, chunk += d->groups[g].num_chunks)
            RF_TRY(load_block(m, file, map, block, &d->groups[g], chunk, err));
    if (d->cond_dim > 0)
        RF_TRY(load_rows(m, file, map->final_mod, 0, 2 * d->width, d->cond_dim, &m->mod, chunk * d->width, err));
    if (d->final_norm == RF_PART_NORM_LAYER_AFFINE) RF_TRY(load_norm(m, file, map->final_norm, 0, &m->final_norm, err));
    return load_final(m, file, map, err);
}

static rf_status find_map(const weight_map **out, const rf_weights *file, rf_error *err) {
    *out = NULL;
    for (size_t i = 0; i < sizeof weight_maps / sizeof *weight_maps; i++)
        if (rf_weights_has(file, weight_maps[i].detect)) *out = &weight_maps[i];
    if (*out == NULL)
        return rf_fail(err, RF_ERR_MISSING, "no DiT weights here: none of %s, %s and %s is among the %zu tensors",
                       weight_maps[0].detect, weight_maps[1].detect, weight_maps[2].detect, rf_weights_count(file));
    return RF_OK;
}

static rf_status check_dtype(const rf_backend *backend, rf_dtype dtype, rf_error *err) {
    bool cuda = rf_backend_get_kind(backend) == RF_BACKEND_CUDA;
    if (dtype == RF_DTYPE_F32 || (dtype == RF_DTYPE_BF16 && cuda)) return RF_OK;
    return rf_fail(err, RF_ERR_DTYPE, "dtype %s is not computed on %s; it runs %s", rf_dtype_name(dtype),
                   rf_backend_name(backend), cuda ? "f32 and bf16" : "f32");
}

static rf_status create(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, rf_dtype dtype,
                        rf_error *err) {
    rf_status st = check_dtype(backend, dtype, err);
    if (st != RF_OK) return st;
    rf_dit_model *m = rf_alloc_zero(1, sizeof *m);
    if (m == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    m->desc = *desc;
    m->dtype = dtype;
    m->backend = backend;
    m->num_blocks = rf_dit_desc_num_blocks(desc);
    m->parts = rf_alloc_zero((size_t)m->num_blocks * RF_MAX_PARTS, sizeof *m->parts);
    st = m->parts ? rf_params_create(&m->params, backend, err)
                  : rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    if (st != RF_OK) {
        rf_dit_model_close(m);
        return st;
    }
    int block = 0, temporal = 0;
    for (int g = 0; g < desc->num_groups; g++)
        for (int i = 0; i < desc->groups[g].count; i++, block++)
            for (int p = 0; p < desc->groups[g].num_parts; p++) {
                const rf_part_desc *part = &desc->groups[g].parts[p];
                bool is_temporal = part->kind == RF_PART_SELF && part->scope == RF_SCOPE_PIXEL;
                m->parts[block * RF_MAX_PARTS + p].temporal = is_temporal ? temporal++ : -1;
            }
    *out = m;
    return RF_OK;
}

int64_t rf_dit_padded_actions(const rf_dit_desc *desc) {
    return (desc->action_dim + 7) / 8 * 8;
}

/* Description in, model out; map NULL: found by the names in the file. */
static rf_status load_file(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, const weight_map *map,
                           const char *path, rf_dtype dtype, rf_error *err) {
    rf_weights *file = NULL;
    rf_dit_model *m = NULL;
    *out = NULL;
    rf_status st = rf_dit_desc_check(desc, err);
    if (st == RF_OK) st = rf_weights_open(&file, path, err);
    if (st == RF_OK) st = create(&m, backend, desc, dtype, err);
    if (st == RF_OK) {
        if (map == NULL) st = find_map(&map, file, err);
        if (st == RF_OK) st = load_all(m, file, map, err);
        if (st != RF_OK) rf_fail_prefix(err, st, "%s", path);
    }
    rf_weights_close(file);
    if (st == RF_OK)
        *out = m;
    else
        rf_dit_model_close(m);
    return st;
}

rf_status rf_dit_model_load_file(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, const char *path,
                                 rf_dtype dtype, rf_error *err) {
    return load_file(out, backend, desc, NULL, path, dtype, err);
}

rf_status rf_dit_model_load_vit_vae(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, bool decoder,
                                    const char *path, rf_dtype dtype, rf_error *err) {
    return load_file(out, backend, desc, decoder ? &vit_decoder_map : &vit_encoder_map, path, dtype, err);
}

rf_status rf_dit_model_load(rf_dit_model **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err) {
    rf_json *config = NULL;
    rf_dit_desc desc;
    char *path = rf_path_join(dir, "config.json");
    *out = NULL;
    if (path == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a path");
    rf_status st = rf_json_open(&config, path, err);
    if (st == RF_OK) st = rf_dit_config_read(&desc, config, err);
    if (st == RF_OK) st = rf_dit_model_load_file(out, backend, &desc, dir, dtype, err);
    rf_json_close(config);
    rf_free(path);
    return st;
}

/* --- synthetic weights ------------------------------------------------------------------------------------------- */

typedef struct {
    rf_dit_model *m;
    rf_stream *stream;
    uint64_t seed, key;
} drawer;

static rf_status draw(drawer *d, void *dst, rf_dtype dtype, int64_t num, double std, rf_error *err) {
    rf_fill_normal_args args = {
        .out = dst, .dtype = dtype, .num = num, .seed = d->seed, .key = d->key++, .std = (float)std};
    return rf_ops_for(d->m->backend)->fill_normal(d->stream, &args, err);
}

static rf_status draw_linear(drawer *d, rf_linear *out, int64_t out_dim, int64_t in_dim, double gain,
                             rf_dtype bias_dtype, rf_error *err) {
    rf_status st = take_linear(d->m, out, out_dim, in_dim, bias_dtype, err);
    if (st == RF_OK) st = draw(d, out->w, d->m->dtype, out_dim * in_dim, gain / sqrt((double)in_dim), err);
    if (st == RF_OK && bias_dtype != RF_DTYPE_COUNT) st = draw(d, out->b, bias_dtype, out_dim, 0.02, err);
    return st;
}

/* A norm's weights: about one, about zero. */
static rf_status draw_norm(drawer *d, rf_norm_weights *out, rf_error *err) {
    int64_t width = d->m->desc.width;
    for (int i = 0; i < 2; i++) {
        void *device = NULL;
        RF_TRY(rf_params_take(d->m->params, &device, RF_DTYPE_F32, (size_t)width, err));
        rf_fill_normal_args args = {.out = device,
                                    .dtype = RF_DTYPE_F32,
                                    .num = width,
                                    .seed = d->seed,
                                    .key = d->key++,
                                    .mean = i == 0 ? 1.0f : 0.0f,
                                    .std = 0.1f};
        RF_TRY(rf_ops_for(d->m->backend)->fill_normal(d->stream, &args, err));
        *(i == 0 ? &out->weight : &out->bias) = device;
    }
    return RF_OK;
}

static rf_status draw_conditioning(drawer *d, rf_error *err) {
    rf_dit_model *m = d->m;
    const rf_dit_desc *desc = &m->desc;
    int64_t cond = desc->cond_dim;
    if (cond == 0) return RF_OK;
    RF_TRY(draw_linear(d, &m->temb1, cond, desc->num_freqs, 1.0, m->dtype, err));
    RF_TRY(draw_linear(d, &m->temb2, cond, cond, 1.0, m->dtype, err));
    if (desc->action_dim > 0) RF_TRY(draw_linear(d, &m->action, cond, rf_dit_padded_actions(desc), 1.0, m->dtype, err));
    if (desc->num_classes > 0) {
        RF_TRY(rf_params_take(m->params, &m->labels, m->dtype, (size_t)((desc->num_classes + 1) * cond), err));
        RF_TRY(draw(d, m->labels, m->dtype, (desc->num_classes + 1) * cond, 1.0, err));
    }
    /* gates of std 0.2: residual streams of 28 blocks stay in range */
    return draw_linear(d, &m->mod, rf_dit_desc_num_chunks(desc) * desc->width, cond, 0.4, m->dtype, err);
}

rf_status rf_dit_model_synthetic(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, rf_dtype dtype,
                                 uint64_t seed, rf_error *err) {
    rf_dit_model *m = NULL;
    rf_stream *stream = NULL;
    *out = NULL;
    rf_status st = rf_dit_desc_check(desc, err);
    if (st == RF_OK) st = create(&m, backend, desc, dtype, err);
    if (st == RF_OK) st = rf_stream_create(&stream, backend, err);
    drawer d = {.m = m, .stream = stream, .seed = seed};
    int64_t width = desc->width;
    if (st == RF_OK)
        st = draw_linear(&d, &m->patch, width, (int64_t)desc->in_channels * desc->ph * desc->pw, 1.0, dtype, err);
    if (st == RF_OK) st = draw_conditioning(&d, err);
    int block = 0;
    for (int g = 0; g < desc->num_groups && st == RF_OK; g++) {
        for (int i = 0; i < desc->groups[g].count; i++, block++) {
            for (int p = 0; p < desc->groups[g].num_parts && st == RF_OK; p++) {
                const rf_part_desc *part = &desc->groups[g].parts[p];
                rf_part_weights *w = &m->parts[block * RF_MAX_PARTS + p];
                if (part->norm == RF_PART_NORM_LAYER_AFFINE) st = draw_norm(&d, &w->norm, err);
                if (st != RF_OK) break;
                if (part->kind == RF_PART_SELF) {
                    st = draw_linear(&d, &w->qkv, 3 * width, width, 1.0, part->qkv_bias ? dtype : RF_DTYPE_COUNT, err);
                    if (st == RF_OK) st = draw_linear(&d, &w->out, width, width, 1.0, dtype, err);
                } else if (part->kind == RF_PART_MLP) {
                    st = draw_linear(&d, &w->fc1, part->ffn_dim, width, 1.0, dtype, err);
                    if (st == RF_OK) st = draw_linear(&d, &w->fc2, width, part->ffn_dim, 1.0, dtype, err);
                } else {
                    st = rf_fail(err, RF_ERR_UNSUPPORTED, "block %d part %d: this kind of part cannot be drawn", block,
                                 p);
                }
            }
        }
    }
    if (st == RF_OK && desc->final_norm == RF_PART_NORM_LAYER_AFFINE) st = draw_norm(&d, &m->final_norm, err);
    if (st == RF_OK) st = draw_linear(&d, &m->final, rf_dit_desc_out_dim(desc), width, 1.0, RF_DTYPE_F32, err);
    if (st == RF_OK) st = rf_stream_synchronize(stream, err);
    rf_stream_destroy(stream);
    if (st == RF_OK)
        *out = m;
    else
        rf_dit_model_close(m);
    return st;
}

void rf_dit_model_close(rf_dit_model *model) {
    if (model == NULL) return;
    rf_params_destroy(model->params);
    rf_free(model->parts);
    rf_free(model);
}
