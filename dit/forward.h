/* dit/forward.h - the executor: one session runs one batch shape of one model.
 *
 * plan once (rf_dit_session_create: shapes checked against the operator table, one arena, GEMM algorithms chosen) ->
 * rf_dit_session_begin per run (modulation rows of all steps in one GEMM, or in chunks of steps if the table would pass its
 * budget) -> rf_dit_session_forward once per step. Rows of one batch: [branch 0: all samples | branch 1: all samples].
 * With a policy rf_dit_session_step_cached takes forward's place: it groups the images that plan the same, packs them and computes
 * no more than the plan asks for.
 * forward queues work only: no allocation, no synchronisation; on CUDA it can be captured in a graph, because the step counter
 * and the modulation row indices live in device memory. */
#ifndef RF_DIT_FORWARD_H
#define RF_DIT_FORWARD_H

#include "caching/cache.h"
#include "dit/context.h"
#include "dit/model.h"
#include "dit/sampler.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t batch;                  /* samples; 1.. */
    int branches;                   /* 1, or 2 with guidance */
    int64_t frames, height, width;  /* of the latent, in latent pixels; multiples of the patch */
    int max_steps;                  /* most steps of a run */
    rf_dtype residual_dtype;        /* of the residual stream x: f32, or the model's dtype */
    size_t modulation_budget_bytes; /* default 1 GiB */

    /* Attention over frames (dit/context.h): what passes see in front of their own frames; borrowed. */
    rf_dit_context *context;
    bool store_context; /* passes also keep the keys and values of their frames in the window's slots */
    bool context_only;  /* and give no output: nothing behind the last keys and values is computed */

    /* Feature caching (caching/policy.h); policy NULL = none and the rest is not read. */
    const rf_policy *policy; /* borrowed */
    rf_cache_options cache;
    const float *timesteps; /* host [max_steps]: the timesteps of every run, which then has max_steps steps */
    const char *model_name, *sampler_name; /* for messages and traces, borrowed */
    bool stochastic;                       /* the solver adds noise */
    bool force_policy;                     /* misfits are not refused */
    const rf_json_value *calibration;      /* measured tables of the model, read while planning; NULL = none */
    bool use_graphs; /* kinds of steps are captured when they first occur and replayed from then on */
} rf_dit_session_options;
rf_dit_session_options rf_dit_session_options_default(void);

typedef struct rf_dit_session rf_dit_session;

/* Called after a part of a block has been added to the residual, for tests and previews; eager runs only. x [rows, width]
 * residual_dtype on the device. part == num_parts: after the last part of the block. */
typedef void (*rf_dit_observer)(void *user, int block, int part, const void *x, int64_t rows, int64_t width);

rf_status rf_dit_session_create(rf_dit_session **out, const rf_dit_model *model, rf_stream *stream,
                                const rf_dit_session_options *options, rf_error *err);
void rf_dit_session_destroy(rf_dit_session *session); /* NULL is a no-op */

/* Starts a run: timesteps [num_steps] and labels [branches * batch] (0..num_classes, the last is null) are host arrays,
 * copied. Queues the modulation table; sets the step counter to 0. */
rf_status rf_dit_session_begin(rf_dit_session *session, const float *timesteps, int num_steps, const int32_t *labels,
                               rf_error *err);

/* The same for a model that is told a timestep and an action for every frame: passes of this run compute `frames` frames (up to the
 * planned number). timesteps host [num_steps][samples * frames] with timestep_stride = samples * frames, or [num_steps] for all of
 * them with stride 1; actions host [samples * frames][action_dim], NULL = zeros. */
rf_status rf_dit_session_begin_frames(rf_dit_session *session, int frames, const float *timesteps,
                                      int64_t timestep_stride, int num_steps, const float *actions, rf_error *err);

/* model_out (borrowed from the session, [branches*batch*tokens, out_channels*pt*ph*pw] f32, columns (channel, pt, ph, pw)) from
 * latent [batch, in_channels, frames, height, width] f32 on the device, or [batch, frames, in_channels, height, width] where
 * frames have timesteps of their own. in_scale: table of scales indexed by the step
 * counter with in_scale_stride (NULL = 1). */
rf_status rf_dit_session_forward(rf_dit_session *session, const float *latent, const float *in_scale,
                                 int64_t in_scale_stride, rf_error *err);
/* A step with the session's policy: plans it (which may wait for one small read-back), runs what was planned, then calls tail, which
 * queues what follows the model (the solver) and rf_dit_session_queue_advance: where all images plan the same, one captured
 * graph holds everything. */
typedef rf_status (*rf_dit_tail)(void *user, rf_error *err);
rf_status rf_dit_session_step_cached(rf_dit_session *session, const float *latent, const float *in_scale,
                                     int64_t in_scale_stride, rf_dit_tail tail, void *user, rf_error *err);
/* Called in front of every step of step_cached in which blocks run, before they are queued; never inside a capture. */
void rf_dit_session_set_prepare(rf_dit_session *session, rf_dit_tail prepare, void *user);
rf_cache *rf_dit_session_cache(rf_dit_session *session); /* NULL without a policy */
int rf_dit_session_num_graphs(const rf_dit_session *session);
const float *rf_dit_session_output(const rf_dit_session *session);
const int32_t *rf_dit_session_step(const rf_dit_session *session); /* device step counter */
/* Between two steps, in this order:
 * queue_advance  the device's step counter and modulation row indices move on (one small kernel; may be captured in a graph).
 * next_step      the host's mirror moves on; at the border of a chunk it queues the next chunk's modulation rows. Not to be
 *                captured. */
rf_status rf_dit_session_queue_advance(rf_dit_session *session, rf_error *err);
rf_status rf_dit_session_next_step(rf_dit_session *session, rf_error *err);

void rf_dit_session_set_observer(rf_dit_session *session, rf_dit_observer observer, void *user);
size_t rf_dit_session_arena_bytes(const rf_dit_session *session);
/* Steps whose modulation rows fit the table at once. */
int rf_dit_session_steps_per_chunk(const rf_dit_session *session);

#ifdef __cplusplus
}
#endif
#endif
