/* caching/trace.h - what a policy did, as lines of JSON, and back.
 *
 * Line 1   {"trace":1,"policy":"worldcache","options":"k=v,...","model":"objects","sampler":"ddim","steps":50,"images":4,
 *           "first_image":0,"branches":2,"blocks":10,"parts":2,"tokens":256}
 * then one line a step:
 *          {"step":7,"timestep":860,"images":[{"image":0,"kind":"skip","produce":"output","span":0,"horizon":2,
 *           "statistic":0.031,"threshold":0.2,"forced":false,"drift":[0.01,0.02],"weights":[[1.5,-0.5]],
 *           "blocks":"pp pp ...","rows":[...],"signals":{"input_step":[0.1,0.1]}} ...]}
 * kind     full, partial, skip
 * produce  none, output, span
 * blocks   per block one letter a part: c computed, r reused (one snapshot of weight 1), p predicted, t token rows, - nothing ran (inside
 *          a predicted span or under a predicted output). Both branches of an image always do the same.
 * rows     token rows computed, one number a part in the order of blocks; only when some part is t
 * carried  true: history was one snapshot of the run before (options.carry of caching/cache.h); only where it was
 * verify   measure, use: the last block was computed too (SpeCa); only where it was
 * drift    per branch, relative L2 of what would have been predicted; only on refreshes with history
 * signals  per branch rel1 (or the raw first number for sizes, verify: mean) of what was measured at this step
 * Numbers that decide or weigh are written so that they read back to the same bits (%.9g for float, %.17g for double).
 * Images that did exactly the same and measured nothing share an entry: "image":[0,1,2]. */
#ifndef RF_CACHING_TRACE_H
#define RF_CACHING_TRACE_H

#include "caching/policy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One image at one step. */
typedef struct {
    int image; /* number within the run: first_image + index in the batch */
    const rf_step_plan *plan;
    bool forced;  /* by the drift guard */
    bool carried; /* its history was a snapshot of the run before */
    bool has_drift;
    double drift[2];
    const float (*signals)[2][4]; /* [RF_SIGNAL_COUNT] or NULL */
    const int *signal_steps;      /* [RF_SIGNAL_COUNT]; only those measured at this very step are written */
} rf_trace_image;

/* Text without newline, *out to be freed with rf_free. */
rf_status rf_trace_header(char **out, const rf_policy *policy, const rf_cache_shape *shape, int first_image,
                          rf_error *err);
rf_status rf_trace_step(char **out, const rf_cache_shape *shape, const rf_cache_layout *layout, int step,
                        const rf_trace_image *images, int num_images, rf_error *err);

/* A trace read back. A file may hold several batches (several header lines): images are numbered through. */
typedef struct rf_trace rf_trace;
rf_status rf_trace_open(rf_trace **out, const char *path, rf_error *err);
void rf_trace_close(rf_trace *trace); /* NULL is a no-op */
typedef struct {
    const char *policy, *options;
    int num_steps, num_images, branches, num_blocks, num_parts;
    int64_t tokens;
} rf_trace_info;
rf_trace_info rf_trace_get_info(const rf_trace *trace);
/* The recorded plan of an image's step: kind, produce, span, verify, weights, horizon into plan; parts and rows into the arrays
 * that plan already points at ([num_blocks * num_parts]). */
rf_status rf_trace_get_plan(const rf_trace *trace, int image, int step, rf_step_plan *plan, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
