/* dit/model.h - a diffusion transformer's blueprint and weights: read-only after loading, shared by sessions.
 *
 * Weight layouts are normalised while loading, so the executor sees one form: fused qkv (rows q|k|v), the patch convolution as
 * a Linear over (channel, pt, ph, pw), output rows in order (channel, pt, ph, pw), all blocks' modulation projections stacked
 * into one matrix (final (shift, scale) last), biases present.
 * Dialects are detected from the tensor names: diffusers (transformer_blocks.0.norm1...), original (blocks.0.adaLN...) and open-oasis
 * (blocks.0.s_attn...). */
#ifndef RF_DIT_MODEL_H
#define RF_DIT_MODEL_H

#include "core/backend.h"
#include "core/params.h"
#include "dit/blocks.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    void *w; /* [out, in] model dtype */
    void *b; /* [out] model dtype, or NULL */
} rf_linear;

/* Of a row norm with weights: [D] f32 each, or NULL. */
typedef struct {
    float *weight, *bias;
} rf_norm_weights;

typedef struct {
    rf_norm_weights norm;
    int temporal;  /* number of this part among those with scope PIXEL, -1 = none of them */
    rf_linear qkv; /* SELF: [3D, D] */
    rf_linear out; /* SELF: [D, D] */
    rf_linear fc1; /* MLP: [ffn, D] */
    rf_linear fc2; /* MLP: [D, ffn] */
} rf_part_weights;

typedef struct {
    rf_dit_desc desc;
    rf_dtype dtype; /* of weights and activations: f32 or bf16 */
    rf_backend *backend;
    rf_params *params;
    rf_linear patch;  /* [D, c*pt*ph*pw] */
    rf_linear temb1;  /* [D, num_freqs] */
    rf_linear temb2;  /* [D, D] */
    void *labels;     /* [num_classes + 1, cond_dim] */
    rf_linear action; /* [cond_dim, action_dim padded]: see rf_dit_padded_actions */
    rf_linear mod;    /* [num_chunks * D, cond_dim] */
    rf_norm_weights final_norm;
    rf_linear final;        /* [out_channels*pt*ph*pw, D], bias f32: the GEMM writes f32 */
    rf_part_weights *parts; /* [num_blocks][RF_MAX_PARTS] */
    int num_blocks;
} rf_dit_model;

/* Length of an action row as GEMMs take it: action_dim rounded up to 8, the rest zeros. */
int64_t rf_dit_padded_actions(const rf_dit_desc *desc);

/* dir holds config.json and safetensors (a diffusers `transformer/` folder). dtype: f32, or bf16 on CUDA. */
rf_status rf_dit_model_load(rf_dit_model **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err);
/* The same from one file (or index, or folder) and a description. */
rf_status rf_dit_model_load_file(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, const char *path,
                                 rf_dtype dtype, rf_error *err);
/* One half of a ViT VAE (dit/vit_vae.h) from the file that holds both. */
rf_status rf_dit_model_load_vit_vae(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, bool decoder,
                                    const char *path, rf_dtype dtype, rf_error *err);
/* Weights drawn on the device from a normal distribution of std `1/sqrt(fan_in)` (gates and head included). */
rf_status rf_dit_model_synthetic(rf_dit_model **out, rf_backend *backend, const rf_dit_desc *desc, rf_dtype dtype,
                                 uint64_t seed, rf_error *err);
void rf_dit_model_close(rf_dit_model *model); /* NULL is a no-op */

#ifdef __cplusplus
}
#endif
#endif
