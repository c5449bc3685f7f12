/* dit/pipeline.h - images from classes: a diffusers folder loaded whole, and one run of its denoising loop.
 *
 * A folder:  model_index.json (id2label: class names), transformer/, vae/, scheduler/. */
#ifndef RF_DIT_PIPELINE_H
#define RF_DIT_PIPELINE_H

#include "caching/cache.h"
#include "core/rng.h"
#include "dit/forward.h"
#include "dit/vae.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_image_model rf_image_model;
typedef struct rf_image_session rf_image_session;

rf_status rf_image_model_load(rf_image_model **out, rf_backend *backend, const char *dir, rf_dtype dtype,
                              rf_error *err);
/* config: a built-in name (dit/config.h) or the path of a transformer config.json; SD VAE shape; weights drawn on device. */
rf_status rf_image_model_synthetic(rf_image_model **out, rf_backend *backend, const char *config, rf_dtype dtype,
                                   uint64_t seed, rf_error *err);
void rf_image_model_close(rf_image_model *model); /* NULL is a no-op */

typedef struct {
    const char *path; /* the folder or config name, borrowed */
    const rf_dit_model *transformer;
    const rf_vae *vae;
    rf_scheduler_config scheduler;
    int num_classes;
    size_t weights_bytes;
    int64_t num_params;
    int image_height, image_width; /* at the native sample size */
    /* the folder's cache.json: measured tables and presets for policies; NULL if absent */
    const rf_json_value *calibration;
} rf_image_model_info;
rf_image_model_info rf_image_model_get_info(const rf_image_model *model);
/* Name of class id, "class <id>" style names are not made up: NULL if the folder gives none. */
const char *rf_image_model_class_name(const rf_image_model *model, int class_id);
/* A name (exact, case-insensitive, or one of a comma-separated synonym list) or a number. RF_ERR_ARGUMENT suggests near names. */
rf_status rf_image_model_find_class(const rf_image_model *model, const char *name_or_id, int *class_id, rf_error *err);

typedef struct {
    int batch;               /* images of this run; 1.. */
    int num_steps;           /* 1..10000; default 50 (20 for few-step solvers is the caller's choice) */
    double cfg_scale;        /* 1 = one branch; default 4 */
    rf_sampler_kind sampler; /* RF_SAMPLER_COUNT = the folder's scheduler */
    double eta;
    rf_sigmas sigmas;
    rf_rng_kind rng;
    int height, width;       /* pixels; 0 = the model's */
    rf_dtype residual_dtype; /* f32 or the model's; RF_DTYPE_COUNT = the model's */
    int vae_batch;           /* pictures decoded at once; 0 = chosen */
    bool use_graphs;         /* CUDA: replay captured steps; default true */
    bool tune_gemm;          /* CUDA: time GEMM algorithms while planning (kernels/gemm.h); default false */
    const rf_policy *policy; /* feature caching; NULL = none; borrowed by the session */
    double max_drift;        /* drift guard (caching/cache.h), 0 = off */
    bool record_trace; /* measure drifts, keep signals for rf_image_session_write_trace; a few small kernels a step */
    bool force_policy; /* a policy that does not fit the sampler or step count is used all the same */
    const char *gemm_tuning; /* file of choices, read before planning and written if it tuned; NULL = none; borrowed */
} rf_image_options;
rf_image_options rf_image_options_default(void);
rf_status rf_image_options_check(const rf_image_options *options, rf_error *err);

/* Plans everything (arena, algorithms, graphs) for runs with these options. */
rf_status rf_image_session_create(rf_image_session **out, const rf_image_model *model, const rf_image_options *options,
                                  rf_error *err);
void rf_image_session_destroy(rf_image_session *session); /* NULL is a no-op */

/* Progress after step `step` (0-based) has been queued. Return false to cancel (RF_ERR_CANCELLED). latents: a callback that
 * wants a preview may call rf_image_session_preview from inside; that synchronises. */
typedef bool (*rf_image_progress)(void *user, int step, int num_steps);

/* One run: class_ids [batch], seeds [batch] (image i is drawn from seeds[i] alone with --rng counter; with the torch
 * generators seeds[0] seeds one generator for the batch, as diffusers does with one generator). initial latents may be given
 * instead (host [batch, C, H, W] f32 standard normal, NULL = drawn). */
rf_status rf_image_session_denoise(rf_image_session *session, const int *class_ids, const uint64_t *seeds,
                                   const float *initial_noise, rf_image_progress progress, void *user, rf_error *err);
/* Latents of the last run to host [batch, C, h, w]. */
rf_status rf_image_session_read_latents(rf_image_session *session, float *host, rf_error *err);
/* Decodes the latents: host planar floats [batch, 3, height, width] in about [-1, 1]. */
rf_status rf_image_session_decode(rf_image_session *session, float *host, rf_error *err);
/* The current x0-like latents of sample i decoded in the middle of a run. */
rf_status rf_image_session_preview(rf_image_session *session, int sample, float *host_planar, rf_error *err);

typedef struct {
    int latent_channels, latent_height, latent_width, image_height, image_width, num_steps;
    size_t arena_bytes;
    double denoise_ms, decode_ms; /* of the last run */
    const double *step_ms;        /* [num_steps] of the last run; CUDA: mean of the replayed steps if not timed apart */
    int graph_nodes;              /* kernels in a step's graph, 0 = eager */
    bool has_cache;               /* a policy is at work; then: */
    rf_cache_counts cache;        /* of the last run */
    const uint8_t *step_kinds;    /* [batch * num_steps] rf_step_kind of the last run */
    const double *output_gain;    /* [num_steps] |d final latent / d model output| through the solver's weights alone */
    int num_graphs;               /* kinds of steps captured so far */
} rf_image_session_info;
rf_image_session_info rf_image_session_get_info(const rf_image_session *session);
/* Shows x after every part (dit/forward.h); sessions without a policy and without graphs. NULL ends it. */
void rf_image_session_set_observer(rf_image_session *session, rf_dit_observer observer, void *user);
/* The trace of the last run, a header line and one line a step; first_image: number of this batch's first image. */
rf_status rf_image_session_write_trace(const rf_image_session *session, int first_image, rf_cache_line line, void *user,
                                       rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
