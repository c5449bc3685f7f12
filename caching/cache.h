/* caching/cache.h - the runtime of feature caching: state, signals, groups. Between a policy (caching/policy.h), which only plans, and an
 * executor, which only runs plans.
 *
 * Life: create (layout from the policy, all memory) -> begin (a run) -> per step: head, plan, run each group -> end_step.
 * A group is the images of a batch that plan the same at this step; the executor computes them packed. Device pointers in a group
 * stay the same for the whole session, so that the work of a kind of step can be captured once; what changes from
 * step to step (lists, slots, weights) is uploaded by rf_cache_upload in front of the captured work.
 *
 * Symbols  B images, G = branches * B state groups (branch-major), N tokens, D width, O = out_cols. */
#ifndef RF_CACHING_CACHE_H
#define RF_CACHING_CACHE_H

#include "caching/policy.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_cache rf_cache;

/* What a run begins with, where the policy `carries` (caching/policy.h): nothing; what the first FULL step of the run before stored, which
 * was made at about the noise that the next run begins at; or what its last one stored, which is the cleanest. FIRST costs one more
 * slot of every ring. */
typedef enum { RF_CARRY_OFF = 0, RF_CARRY_FIRST, RF_CARRY_LAST } rf_cache_carry;
bool rf_cache_carry_from_name(const char *name, rf_cache_carry *out); /* "off", "first", "last" */
const char *rf_cache_carry_name(rf_cache_carry carry);

typedef struct {
    /* > 0: a refresh whose prediction is off by more than this (relative L2) forces the next step FULL */
    double max_drift;
    /* for a trace: predictions are checked at every refresh, and all that is measured is kept on the host */
    bool record;
    rf_cache_carry carry;
} rf_cache_options;

typedef struct {
    rf_dtype feature_dtype;  /* of part outputs and spans */
    rf_dtype residual_dtype; /* of the residual stream */
    int num_heads, head_dim; /* of self-attention */
    float softmax_scale;
} rf_cache_dtypes;

/* shape is copied (its arrays too); policy is borrowed for the session's life. */
rf_status rf_cache_create(rf_cache **out, const rf_policy *policy, const rf_cache_shape *shape,
                          const rf_cache_dtypes *dtypes, const rf_cache_options *options, rf_stream *stream,
                          rf_error *err);
void rf_cache_destroy(rf_cache *cache); /* NULL is a no-op */
/* Checks that a policy fits a shape (and what it would need) without making anything. layout may be NULL. */
rf_status rf_cache_check(const rf_policy *policy, const rf_cache_shape *shape, rf_error *err);

const rf_cache_layout *rf_cache_get_layout(const rf_cache *cache);
const rf_cache_shape *rf_cache_get_shape(const rf_cache *cache);
const rf_policy *rf_cache_get_policy(const rf_cache *cache);

/* A new run: forgets everything, but what options.carry keeps of the run before. */
rf_status rf_cache_begin(rf_cache *cache, rf_error *err);
/* Between runs: the next one begins with nothing (another rollout; or a run that failed after its steps were planned). */
void rf_cache_forget(rf_cache *cache);

typedef struct {
    int num;             /* images */
    int groups;          /* branches * num */
    bool identity;       /* all images, in order */
    bool resumed;        /* split off from a probed group: starts with rf_cache_probe_resume after the probe's blocks */
    bool has_history;    /* something has been stored: refresh signals can be measured */
    bool measures_drift; /* FULL: the plan says what it would have predicted */
    bool reuses;         /* the prediction is one snapshot of weight 1 */
    const int32_t *index;   /* device [groups]: state group of packed group g; NULL if identity */
    const int32_t *samples; /* device [num]: image of packed image i; NULL if identity */
    const rf_step_plan *plan;
    int slot;     /* part ring slot that a store writes, -1 if it differs from image to image */
    int newest;   /* part ring slot of the newest snapshot, likewise */
    uint64_t key; /* equal keys: the same kernels with the same arguments may be replayed */
} rf_cache_group;

/* --- per step, host side ------------------------------------------------------------------------------------------------- */

/* Does the step need rf_cache_head work (signals at the start of a step)? modulated: also the first normed input. */
bool rf_cache_wants_head(const rf_cache *cache, bool *modulated);
/* Plans the step; reads signals back if a policy state wants them. num_groups 1..B. A PROBE group must be run up to its probe
 * and then given to rf_cache_plan_probe, which splits it. */
rf_status rf_cache_plan(rf_cache *cache, int step, int *num_groups, rf_error *err);
/* Has the latest plan (or probe) waited for the device? Then nothing is queued behind the host. */
bool rf_cache_just_waited(const rf_cache *cache);
const rf_cache_group *rf_cache_group_at(const rf_cache *cache, int group);
/* Signals of a launch to the host, by its last kernel: does this launch (of a group or none, with the next step's start or without)
 * measure anything that somebody reads? step: the device's counter; advanced: it has moved on to the next step already. After
 * a launch that posts: rf_cache_posted. */
bool rf_cache_wants_post(const rf_cache *cache, const rf_cache_group *group, bool next_head);
rf_status rf_cache_post(rf_cache *cache, rf_stream *stream, const int32_t *step, bool advanced, rf_error *err);
void rf_cache_posted(rf_cache *cache);
rf_status rf_cache_plan_probe(rf_cache *cache, int group, int *first, int *num, rf_error *err);
/* Queues the upload of what group's work reads. Before the (captured or direct) work of the group, never inside a capture. */
rf_status rf_cache_upload(rf_cache *cache, int group, rf_error *err);
/* After the group's work has been queued (not captured). */
rf_status rf_cache_group_done(rf_cache *cache, int group, rf_error *err);
/* next_head: the signals at the start of the next step have been queued already. */
rf_status rf_cache_end_step(rf_cache *cache, bool next_head, rf_error *err);
/* After the stream was synchronised: collects signals for the trace. */
rf_status rf_cache_end(rf_cache *cache, rf_error *err);

/* --- work, may be captured; stream NULL checks shapes only --------------------------------------------------------------- */

/* Where the executor puts the model input of all images: f32 [B, N, in_cols]; NULL if no policy asks. */
float *rf_cache_input(rf_cache *cache);
/* Signals at the start of a step. modulated: [G, N, D] feature_dtype or NULL. */
rf_status rf_cache_head(rf_cache *cache, rf_stream *stream, const void *modulated, rf_error *err);

/* Spans. x is the packed residual stream [groups, N, D]. enter: before block spans[i].begin of computed work. leave: after block
 * spans[i].end - 1: measures and stores if the plan stores. produce: x = prediction. */
rf_status rf_cache_span_enter(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int span, const void *x,
                              rf_error *err);
rf_status rf_cache_span_leave(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int span, const void *x,
                              rf_error *err);
rf_status rf_cache_span_produce(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int span, void *x,
                                rf_error *err);

/* Probe. begin: x before block 0. end: x after the probe's blocks; measures, and keeps x by image. resume: x of a group split off.
 * A FULL plan after a probe also stores the probe's residual. */
rf_status rf_cache_probe_begin(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, const void *x,
                               rf_error *err);
rf_status rf_cache_probe_end(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, const void *x, rf_error *err);
rf_status rf_cache_probe_resume(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, void *x, rf_error *err);

/* Parts. before: called before a part is computed in full; *y_dst is where its output should go if it can go straight into
 * the ring, else left alone. after: y computed (y == *y_dst: nothing to copy). terms: makes a residual's terms the prediction. */
rf_status rf_cache_part_before(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int block, int part,
                               void **y_dst, rf_error *err);
rf_status rf_cache_part_after(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int block, int part,
                              const void *y, rf_error *err);
void rf_cache_part_terms(const rf_cache *cache, const rf_cache_group *g, int block, int part, rf_residual_args *args);

/* Token rows. A block chooses once, for all its parts. select: once per PARTIAL step with rows, before block 0. rows: the chosen rows,
 * whichever DO_ROWS part of the block is asked for. scatter: packed chosen rows [groups * count, D] into the part's ring. qkv: [G, N, 3, H, d]
 * of a block's SELF part, kept when tokens.attention_rows; NULL else. score: after the SELF part of a FULL step computed q,k,v
 * (rows as in qkv) and lse [groups, H, N]. A TEMPORAL part has neither qkv nor score. */
rf_status rf_cache_select(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, rf_error *err);
typedef struct {
    const int32_t *packed, *state; /* device [groups * count] row numbers in packed x, in state */
    const int32_t *place; /* device [groups * N]: a packed row's number in these lists, -1 if it is not chosen */
    int64_t count;        /* of one group */
} rf_cache_rows;
rf_cache_rows rf_cache_rows_of(const rf_cache *cache, const rf_cache_group *g, int block, int part);
rf_status rf_cache_scatter(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int block, int part,
                           const void *y, rf_error *err);
/* The ring of a part, depth 1: [G, N, D]. */
void *rf_cache_part_ring(rf_cache *cache, int block, int part);
void *rf_cache_qkv(rf_cache *cache, int block);
/* A computed attention's q,k,v: packed [groups, N, 3, H, d] into the kept ones (nothing to do if qkv is already there). */
rf_status rf_cache_keep_qkv(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int block, const void *qkv,
                            rf_error *err);
bool rf_cache_wants_scores(const rf_cache *cache, const rf_cache_group *g);
float *rf_cache_lse(rf_cache *cache); /* [G, H, N]; NULL if scores do not need it */
rf_status rf_cache_score(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int block, const void *qkv,
                         rf_error *err);

/* Verification (SpeCa): x computed by the last block, and x predicted. keep: copies x; measure: against the kept one. */
rf_status rf_cache_verify_keep(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int which, const void *x,
                               rf_error *err);
rf_status rf_cache_verify_load(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, int which, void *x,
                               rf_error *err);
rf_status rf_cache_verify_measure(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, rf_error *err);

/* The model's output. computed: packed [groups, N, O] f32, copied to out (unless out is packed itself) and stored if the plan
 * stores. produce: out of the group's images is predicted. out [G, N, O] f32. */
rf_status rf_cache_output_computed(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, const float *packed,
                                   float *out, rf_error *err);
rf_status rf_cache_output_produce(rf_cache *cache, rf_stream *stream, const rf_cache_group *g, float *out,
                                  rf_error *err);

/* --- what happened --------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t images, steps;                            /* image-steps are images * steps */
    int64_t steps_full, steps_partial, steps_skipped; /* image-steps */
    int64_t blocks_computed, blocks_total;            /* block-steps of images; computed: all its parts on all rows */
    int64_t rows_computed, rows_total;                /* token rows through parts */
    size_t bytes;                                     /* device memory of the cache */
    double decide_ms; /* host time of planning; neither waiting for the device nor its measuring is in it */
    int64_t read_backs;
} rf_cache_counts;
rf_cache_counts rf_cache_get_counts(const rf_cache *cache); /* of the last run */

/* Trace: one JSON object a line (caching/trace.h says which). After rf_cache_end. */
typedef rf_status (*rf_cache_line)(void *user, const char *json, rf_error *err);
rf_status rf_cache_write_trace(const rf_cache *cache, int first_image, rf_cache_line line, void *user, rf_error *err);

/* What one step did, for reports: kind of every image's step. kinds [B * num_steps]. */
const uint8_t *rf_cache_step_kinds(const rf_cache *cache);

#ifdef __cplusplus
}
#endif
#endif
