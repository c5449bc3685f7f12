/* dit/forward_internal.h - what the files of the executor share: forward.c plans a session and starts runs, walk.c queues one
 * pass over the blocks, cached_step.c runs a step as a policy planned it. Internal to dit/. */
#ifndef RF_DIT_FORWARD_INTERNAL_H
#define RF_DIT_FORWARD_INTERNAL_H

#include "dit/forward.h"

typedef struct {
    /* activations */
    void *patches, *x, *h, *y, *wide, *attn;
    float *out, *out_packed;
    void *attn_workspace;
    size_t attn_workspace_bytes;
    void *pos;                  /* [tokens, width] f32 */
    float *ropes[RF_MAX_ROPES]; /* [positions][pairs][2] */
    /* modulation: U = rows_per_step distinct (timestep, label or action) rows a step, C = steps_per_chunk */
    void *table;                               /* [C*U, num_chunks*width] */
    float *timesteps;                          /* [steps rounded up to C, U] */
    int32_t *label_rows;                       /* [C*U] */
    void *actions, *action_emb;                /* [U, action_dim padded], [U, cond_dim] */
    void *fourier, *temb_hidden, *temb, *cond; /* [C*U, num_freqs | cond_dim ...] */
    int32_t *slots, *mod_index, *packed_mod_index, *step;
} rf_dit_buffers;

typedef struct {
    uint64_t key;
    rf_graph *graphs[2]; /* the second may be NULL */
} rf_captured_step;

struct rf_dit_session {
    const rf_dit_model *model;
    const rf_ops *ops;
    rf_stream *stream;
    rf_dit_session_options options;

    int64_t samples;      /* branches * batch */
    int64_t frame_tokens; /* of one (patch) frame */
    /* of the passes from here on; what is planned for is options.frames */
    int64_t frames, tokens, rows;       /* frames in patches; tokens of a sample */
    int64_t mod_groups, rows_per_group; /* rows that share a modulation row: those of a sample, or of a frame */
    int64_t patch_dim, out_dim, chunk_cols;
    int rows_per_step, steps_per_chunk, padded_steps;
    bool fused_rope;      /* attention takes rotary positions itself */
    uint64_t seen_frames; /* bit f % 64: operators have chosen their algorithms for passes of f frames */

    void *memory;
    size_t memory_bytes;
    rf_dit_buffers b;

    /* host staging of begin(): sized when planned, page-locked */
    float *host_timesteps;
    int32_t *host_ints; /* slots [mod groups], then label rows [C*U] */
    char *host_actions; /* [U, action_dim padded] in the model's dtype */

    int num_steps, step; /* of the run; host mirror of the device counter */

    rf_dit_observer observer;
    void *observer_user;

    /* feature caching */
    rf_dit_tail prepare; /* NULL: nothing to do in front of a step */
    void *prepare_user;
    rf_cache *cache;
    rf_captured_step *graphs;
    int num_graphs, max_graphs;
    int head_step; /* the step whose signals have been queued already */
};

/* One pass over (some of) the batch: what is queued now. */
typedef struct {
    rf_dit_session *s;
    rf_stream *stream;           /* NULL: only check */
    const rf_cache_group *group; /* NULL: no policy, the whole batch */
    int64_t samples, rows;       /* packed */
    const int32_t *mod_index;
    int boundary; /* in front of this block a policy wants to see x once it is settled; -1 = nothing to show */
    bool done;    /* nothing that follows is needed */
} rf_dit_pass;

/* The residual that has not been added yet: base + gate * y, or gate * a prediction; and a second plain one. */
typedef struct {
    bool active;
    const void *base; /* NULL: x itself */
    int64_t base_period;
    const void *y;
    int64_t gate; /* column in the modulation row, -1 = 1 */
    bool predicted;
    int block, part; /* of the prediction */
    const void *extra;
    int64_t extra_gate;
} rf_dit_pending;

/* --- walk.c ------------------------------------------------------------------------------------------------------------ */

rf_dit_pass rf_dit_whole_batch(rf_dit_session *s, rf_stream *stream);
rf_patchify_args rf_dit_patchify_args(const rf_dit_session *s, const float *latent, const float *in_scale,
                                      int64_t in_scale_stride);
rf_status rf_dit_linear(const rf_dit_pass *p, const rf_linear *l, const void *x, void *y, int64_t m, int64_t n,
                        int64_t k, rf_act act, rf_dtype y_dtype, rf_error *err);
/* Latents of the pass's images to patch rows to the residual stream (pending). */
rf_status rf_dit_embed(rf_dit_pass *p, const float *latent, const float *in_scale, int64_t in_scale_stride,
                       rf_dit_pending *pending, rf_error *err);
/* x += what is pending. */
rf_status rf_dit_settle(rf_dit_pass *p, rf_dit_pending *pending, rf_error *err);
/* The same, and the first part's normed and modulated input into h. */
rf_status rf_dit_first_input(rf_dit_pass *p, rf_dit_pending *pending, rf_error *err);
rf_status rf_dit_run_blocks(rf_dit_pass *p, int from, int to, rf_dit_pending *pending, rf_error *err);
rf_status rf_dit_finish(rf_dit_pass *p, rf_dit_pending *pending, float *out, rf_error *err);
/* The whole forward: queued on stream, or only checked if stream is NULL. */
rf_status rf_dit_walk(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                      int64_t in_scale_stride, rf_error *err);
/* Which blocks a span prediction of this plan takes the place of; NULL if none. */
const rf_cache_span *rf_dit_produced_span(const rf_dit_pass *p);

/* --- cached_step.c ----------------------------------------------------------------------------------------------------- */

rf_status rf_dit_create_cache(rf_dit_session *s, rf_error *err);
void rf_dit_destroy_cache(rf_dit_session *s);

/* --- forward.c --------------------------------------------------------------------------------------------------------- */

/* The modulation rows of steps chunk*C .. chunk*C + C-1. */
rf_status rf_dit_queue_modulation(rf_dit_session *s, rf_stream *stream, int chunk, rf_error *err);

#endif
