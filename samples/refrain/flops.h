/* samples/refrain/flops.h - what a forward of a transformer costs: for tables and floors. */
#ifndef REFRAIN_FLOPS_H
#define REFRAIN_FLOPS_H

#include "dit/blocks.h"

/* Operations of one sample (or frame) of `tokens` tokens: matrix products and attention, two a multiply-add; modulation is computed once
 * a run and not counted. seen: frames that attention over frames sees, the new one counted; 1 for images. */
double forward_flops(const rf_dit_desc *desc, double tokens, double seen);
/* Elements of keys and values that a frame leaves in a context. */
double context_elems(const rf_dit_desc *desc, double tokens);
/* Elements of the weights that a forward does not read: the modulation projections. */
double modulation_elems(const rf_dit_desc *desc);

#endif
