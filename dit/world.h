/* dit/world.h - world models: frames from actions, one after the other (open-oasis layout).
 *
 * Source   Decart & Etched 2024 (open-oasis: space-time DiT, ViT VAE); Chen et al. 2024 (diffusion forcing: a noise level per frame);
 *          StreamingLLM, Xiao et al. 2024 (sinks).
 * A folder config.json ("_class_name": "OasisWorld", "dit", "vae", "scaling_factor", "actions", "fps", "steps",
 *          "stabilization_level"), dit.safetensors and vae.safetensors (each may be sharded with an index); or the public release's
 *          oasis500m.safetensors and vit-l-20.safetensors, whose config is built in.
 *
 * A frame's latent is denoised in num_steps DDIM steps (v-prediction, sigmoid schedule) while the frames in front of it stay
 * as they are, marked with timestep stabilization_level - 1. Their keys and values in every temporal layer are computed once,
 * when the frame is committed, and kept: a step computes the newest frame alone. That is exact until the window is full. Then the oldest
 * frame leaves, which would change all others:
 *   REBUILD  the window's context is computed again, once for every new frame: exact
 *   KEEP     kept keys and values stay as they were computed
 *   SINKS    as KEEP, and the first num_sinks frames of the rollout never leave
 * With context_cache false every step that computes anything computes the whole context again, as the public code does. */
#ifndef RF_DIT_WORLD_H
#define RF_DIT_WORLD_H

#include "caching/cache.h"
#include "core/rng.h"
#include "dit/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_world_model rf_world_model;
typedef struct rf_world_session rf_world_session;

/* dtype: f32, or bf16 on CUDA. */
rf_status rf_world_model_load(rf_world_model **out, rf_backend *backend, const char *dir, rf_dtype dtype,
                              rf_error *err);
/* config: "oasis-500m" (the public model's shapes) or the path of a config.json; weights drawn on the device. */
rf_status rf_world_model_synthetic(rf_world_model **out, rf_backend *backend, const char *config, rf_dtype dtype,
                                   uint64_t seed, rf_error *err);
void rf_world_model_close(rf_world_model *model); /* NULL is a no-op */
/* Is dir a world's folder (rather than an image model's)? */
bool rf_world_is_world(const char *dir);

typedef struct {
    const char *path; /* folder or config name, borrowed */
    const rf_dit_model *transformer;
    int frame_height, frame_width; /* pixels */
    int latent_channels, latent_height, latent_width;
    int action_dim;  /* length of an action row */
    int num_actions; /* named ones; <= action_dim */
    int max_frames;  /* the window it was trained with, the new frame included */
    double fps;
    int num_steps, stabilization_level; /* defaults of the folder */
    const char *simulator;              /* of config.json: "maze" for the shipped world, NULL if none; borrowed */
    size_t weights_bytes;
    int64_t num_params;
    const rf_json_value *calibration; /* the folder's cache.json or NULL */
} rf_world_model_info;
rf_world_model_info rf_world_model_get_info(const rf_world_model *model);
/* Name of position i of an action row, NULL if it has none. */
const char *rf_world_model_action_name(const rf_world_model *model, int action);

/* The timesteps that a frame's steps are told, noisiest first. */
void rf_world_timesteps(float *out, int num_steps);

typedef enum { RF_CONTEXT_REBUILD = 0, RF_CONTEXT_KEEP, RF_CONTEXT_SINKS } rf_context_mode;
bool rf_context_mode_from_name(const char *name, rf_context_mode *out); /* "rebuild", "keep", "sinks" */
const char *rf_context_mode_name(rf_context_mode mode);

typedef struct {
    int batch;               /* rollouts side by side; default 1 */
    int num_steps;           /* denoising steps a frame; 0 = the folder's */
    int stabilization_level; /* context frames are told timestep level - 1; 0 = the folder's */
    int window;              /* frames, the new one included: 2..max_frames (KEEP and SINKS too); 0 = max_frames */
    rf_context_mode context;
    int num_sinks;      /* SINKS: 1..window - 2; default 2 */
    bool context_cache; /* default true */
    rf_rng_kind rng;
    rf_dtype residual_dtype; /* RF_DTYPE_COUNT = the model's */
    bool use_graphs;         /* CUDA; default true */
    bool tune_gemm;
    const char *gemm_tuning; /* as in rf_image_options; borrowed */
    const rf_policy *policy; /* feature caching inside a frame's steps; NULL = none; borrowed */
    rf_cache_carry carry; /* a frame starts with stored features of the frame before (policies that keep a history) */
    double max_drift;
    bool record_trace, force_policy;
} rf_world_options;
rf_world_options rf_world_options_default(void);
rf_status rf_world_options_check(const rf_world_options *options, const rf_world_model *model, rf_error *err);

rf_status rf_world_session_create(rf_world_session **out, const rf_world_model *model, const rf_world_options *options,
                                  rf_error *err);
void rf_world_session_destroy(rf_world_session *session); /* NULL is a no-op */

/* Starts rollouts from given frames: host planar [batch][num_frames][3][H][W] in [-1, 1], encoded with the VAE's mean; more frames than
 * window - 1: only the last window - 1 count. actions host [batch][num_frames][action_dim]: row i is the action that led to frame
 * i; NULL = zero rows. seeds [batch]: frame i's noise of rollout b follows from (seeds[b], i) alone. May be called again. */
rf_status rf_world_session_start(rf_world_session *session, const float *frames, int num_frames, const float *actions,
                                 const uint64_t *seeds, rf_error *err);
/* The same from latents [batch][num_frames][C][h][w] (scaled, as the transformer sees them). */
rf_status rf_world_session_start_latents(rf_world_session *session, const float *latents, int num_frames,
                                         const float *actions, const uint64_t *seeds, rf_error *err);
/* One new frame of every rollout. actions host [batch][action_dim]; noise host [batch][C][h][w] or NULL = drawn. */
rf_status rf_world_session_step(rf_world_session *session, const float *actions, const float *noise, rf_error *err);
/* The newest frame, decoded: host planar [batch][3][H][W] in about [-1, 1]. Waits for the device. */
rf_status rf_world_session_read_frame(rf_world_session *session, float *host, rf_error *err);
/* The newest frame's latent [batch][C][h][w]. */
rf_status rf_world_session_read_latent(rf_world_session *session, float *host, rf_error *err);

typedef struct {
    int num_frames;     /* made by step since start */
    int context_frames; /* kept (or recomputed) in front of the newest */
    int frames_slid;    /* frames that have left the window */
    int num_steps;
    size_t arena_bytes; /* all device memory of the session; does not grow */
    /* of the last step call; on CUDA the times are measured with device events and valid after read_* */
    double context_ms, denoise_ms, decode_ms;
    int64_t frame_forwards; /* frames sent through the transformer since start: denoising, committing and rebuilding */
    int graph_nodes;
    bool has_cache;
    rf_cache_counts last, total; /* of the last frame; since start (bytes: of the session) */
    const uint8_t *step_kinds;   /* [batch * num_steps] rf_step_kind of the last frame; NULL without a policy */
} rf_world_session_info;
rf_world_session_info rf_world_session_get_info(const rf_world_session *session);
/* The decisions of the last frame: a header line and one line a step. first_image: as in rf_cache_write_trace. */
rf_status rf_world_session_write_trace(const rf_world_session *session, int first_image, rf_cache_line line, void *user,
                                       rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
