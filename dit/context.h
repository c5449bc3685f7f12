/* dit/context.h - the kept keys and values of a rollout's frames: what lets a denoising step compute the newest frame alone.
 *
 * In a space-time transformer whose temporal attention is causal, the keys and values of a frame that will not change again are
 * constants of all later frames. A context holds them for every temporal part of a model, in slots, one frame a slot; which
 * slots are visible, and in what order, is the window (kernels/rope.h). Keys are kept without their rotary turn: positions
 * are those inside the window, so frames may leave it or stay without anything being turned again. */
#ifndef RF_DIT_CONTEXT_H
#define RF_DIT_CONTEXT_H

#include "dit/model.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_dit_context rf_dit_context;

/* For `samples` rollouts of frames of `tokens` tokens; slots 1..RF_MAX_WINDOW. The stream is borrowed. */
rf_status rf_dit_context_create(rf_dit_context **out, const rf_dit_model *model, rf_stream *stream, int64_t samples,
                                int64_t tokens, int slots, rf_error *err);
void rf_dit_context_destroy(rf_dit_context *context); /* NULL is a no-op */

/* The window of the passes queued from here on: num_kept kept frames, oldest first, then num_new frames that a pass computes (and, if
 * it stores, keeps) in these slots. */
rf_status rf_dit_context_set_window(rf_dit_context *context, const int *slots, int num_kept, int num_new,
                                    rf_error *err);

size_t rf_dit_context_bytes(const rf_dit_context *context);
int64_t rf_dit_context_samples(const rf_dit_context *context);
int64_t rf_dit_context_tokens(const rf_dit_context *context);
/* For the executor: the arguments that belong to the context for its temporal-th temporal part. */
void rf_dit_context_fill(const rf_dit_context *context, int temporal, rf_temporal_attention_args *args);

#ifdef __cplusplus
}
#endif
#endif
