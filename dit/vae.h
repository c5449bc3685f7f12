/* dit/vae.h - AutoencoderKL (SD layout): latents to pictures.
 *
 * Source   Rombach et al. 2022 (latent diffusion); key names of diffusers' AutoencoderKL, of its older attention naming
 *          (query/key/value/proj_attn) and of LDM files (first_stage_model., levels numbered backwards, 1x1 conv attention).
 * Shapes   latent [batch, latent_channels, h, w] f32 -> picture [batch, 3, h*f, w*f] f32 in about [-1, 1], f =
 *          2^(levels - 1). Work is channels-last in the model's dtype. */
#ifndef RF_DIT_VAE_H
#define RF_DIT_VAE_H

#include "core/backend.h"
#include "core/params.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_VAE_MAX_LEVELS 6

typedef struct {
    int num_levels;
    int64_t channels[RF_VAE_MAX_LEVELS]; /* block_out_channels */
    int layers_per_block;                /* the decoder has one more resnet a level */
    int num_groups;
    int latent_channels;
    int image_channels;                  /* 3 */
    double scaling_factor, shift_factor; /* decode input = latent / scaling_factor + shift_factor */
    bool has_post_quant_conv;
    bool mid_attention;
} rf_vae_config;

/* How the one wide head of the middle attention runs: the attention operator, or GEMM, softmax, GEMM. AUTO takes the operator
 * where it has this head_dim. */
typedef enum { RF_VAE_ATTENTION_AUTO = 0, RF_VAE_ATTENTION_FUSED, RF_VAE_ATTENTION_GEMM } rf_vae_attention;

typedef struct rf_vae rf_vae;
typedef struct rf_vae_session rf_vae_session;

/* dir holds config.json and safetensors (a diffusers `vae/` folder). dtype: f32, or bf16 on CUDA. */
rf_status rf_vae_load(rf_vae **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err);
/* The SD shape (128,256,512,512; 2 layers; 4 latent channels) or any config, weights drawn on the device. */
rf_vae_config rf_vae_config_sd(void);
rf_status rf_vae_synthetic(rf_vae **out, rf_backend *backend, const rf_vae_config *config, rf_dtype dtype,
                           uint64_t seed, rf_error *err);
void rf_vae_close(rf_vae *vae); /* NULL is a no-op */

const rf_vae_config *rf_vae_get_config(const rf_vae *vae);
size_t rf_vae_weights_bytes(const rf_vae *vae);
int64_t rf_vae_num_params(const rf_vae *vae); /* decoder only */

/* Plans decoding of `batch` latents of height x width at a time: checks operators, takes one device buffer, and on a device
 * that tunes runs once. The stream's phase is left as it was. */
rf_status rf_vae_session_create(rf_vae_session **out, const rf_vae *vae, rf_stream *stream, int64_t batch,
                                int64_t height, int64_t width, rf_error *err);
/* The same with the middle attention's form forced (tests, benchmarks); a form that cannot run is refused. */
rf_status rf_vae_session_create_with(rf_vae_session **out, const rf_vae *vae, rf_stream *stream, int64_t batch,
                                     int64_t height, int64_t width, rf_vae_attention attention, rf_error *err);
void rf_vae_session_destroy(rf_vae_session *session); /* NULL is a no-op */
/* "none", "fused", "gemm", or "gemm f32" (bf16 model whose number of pixels bf16 GEMMs do not take). */
const char *rf_vae_session_attention(const rf_vae_session *session);
size_t rf_vae_session_arena_bytes(const rf_vae_session *session);
/* Queues the decode of device latents to the device picture buffer (borrowed from the session, [batch, 3, H, W] f32). The
 * latents are the sampler's: scaling and shift are undone here. */
rf_status rf_vae_session_decode(rf_vae_session *session, const float *latent, rf_error *err);
const float *rf_vae_session_output(const rf_vae_session *session);

#ifdef __cplusplus
}
#endif
#endif
