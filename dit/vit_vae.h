/* dit/vit_vae.h - the ViT VAE of open-oasis: frames to latents and back, run by the block executor.
 *
 * Source   etched-ai/open-oasis (vit-l-20); a masked-autoencoder ViT: patch -> pre-norm transformer with 2-D rotary positions ->
 *          norm -> linear, once for each direction. The posterior's mean is the latent.
 * Shapes   frame [batch, 3, H, W] f32 in [-1, 1]  <->  latent [batch, latent_dim, H/patch, W/patch] f32, multiplied by the scaling factor. */
#ifndef RF_DIT_VIT_VAE_H
#define RF_DIT_VIT_VAE_H

#include "core/json.h"
#include "dit/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int input_height, input_width, patch_size, latent_dim;
    int enc_dim, enc_depth, enc_heads;
    int dec_dim, dec_depth, dec_heads;
    double mlp_ratio;
    double scaling_factor; /* latent = scaling_factor * mean */
} rf_vit_vae_config;

typedef struct rf_vit_vae rf_vit_vae;
typedef struct rf_vit_vae_session rf_vit_vae_session;

/* vit-l-20 of the public 500M model. */
rf_vit_vae_config rf_vit_vae_config_oasis(void);
/* From an object of a larger file; absent keys take the public model's values. scaling_factor is left as it is. */
rf_status rf_vit_vae_config_read(rf_vit_vae_config *inout, const rf_json *doc, const rf_json_value *object,
                                 rf_error *err);

/* path: the safetensors file, an index or a folder. dtype: f32, or bf16 on CUDA. */
rf_status rf_vit_vae_load(rf_vit_vae **out, rf_backend *backend, const rf_vit_vae_config *config, const char *path,
                          rf_dtype dtype, rf_error *err);
rf_status rf_vit_vae_synthetic(rf_vit_vae **out, rf_backend *backend, const rf_vit_vae_config *config, rf_dtype dtype,
                               uint64_t seed, rf_error *err);
void rf_vit_vae_close(rf_vit_vae *vae); /* NULL is a no-op */
const rf_vit_vae_config *rf_vit_vae_get_config(const rf_vit_vae *vae);
size_t rf_vit_vae_weights_bytes(const rf_vit_vae *vae);
int64_t rf_vit_vae_num_params(const rf_vit_vae *vae);

/* Plans both directions for `batch` frames at a time. */
rf_status rf_vit_vae_session_create(rf_vit_vae_session **out, const rf_vit_vae *vae, rf_stream *stream, int64_t batch,
                                    rf_error *err);
void rf_vit_vae_session_destroy(rf_vit_vae_session *session); /* NULL is a no-op */
/* Queued. frames device [batch, 3, H, W] -> latents device [batch, latent_dim, h, w]. */
rf_status rf_vit_vae_session_encode(rf_vit_vae_session *session, const float *frames, float *latents, rf_error *err);
/* Queued. latents as above -> device [batch, 3, H, W] f32, borrowed from the session. */
rf_status rf_vit_vae_session_decode(rf_vit_vae_session *session, const float *latents, rf_error *err);
const float *rf_vit_vae_session_output(const rf_vit_vae_session *session);
size_t rf_vit_vae_session_bytes(const rf_vit_vae_session *session);

#ifdef __cplusplus
}
#endif
#endif
