/* dlm/guide.h - a small autoregressive model that says how much of a diffusion model's draft may be committed.
 *
 * Source   Hu et al. 2025 (guided diffusion): the draft is scored left to right in causal passes; the longest prefix whose masked
 *          positions all satisfy the rule is accepted; the first position always is, so that every pass commits something. The
 *          guide's own tokens are never inserted. */
#ifndef RF_DLM_GUIDE_H
#define RF_DLM_GUIDE_H

#include "dlm/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_guide rf_guide;

/* capacity: rows of its cache. RF_ERR_CONFIG if the models' vocabularies differ or the guide is not causal. */
rf_status rf_guide_create(rf_guide **out, const rf_text_model *model, const rf_decode_options *options,
                          int32_t capacity, rf_error *err);
void rf_guide_destroy(rf_guide *guide); /* NULL is a no-op */
void rf_guide_reset(rf_guide *guide);   /* a new sequence */

/* tokens [end]: prompt, committed tokens, and the draft where pending[i] != 0. Positions below `first` are final, first is the first
 * pending one (>= 1). *accepted: position behind the accepted prefix, first + 1 .. end. Waits for the device. */
rf_status rf_guide_accept(rf_guide *guide, const rf_decode_options *options, const int32_t *tokens,
                          const uint8_t *pending, int32_t first, int32_t end, int32_t *accepted, rf_error *err);

int64_t rf_guide_forwards(const rf_guide *guide); /* since reset */
size_t rf_guide_bytes(const rf_guide *guide);

#ifdef __cplusplus
}
#endif
#endif
