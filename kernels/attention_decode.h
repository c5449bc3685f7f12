/* kernels/attention_decode.h - a door of its own to the CUDA attention kernel of few query rows (attention_decode.cu), for
 * benchmarks that try other shares of the keys than the operator would take. */
#ifndef RF_KERNELS_ATTENTION_DECODE_H
#define RF_KERNELS_ATTENTION_DECODE_H

#include "kernels/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The operator's attention with `cluster` blocks (1, 2, 4, 8; 1 before sm_90) to a cluster and `splits` (1..32) clusters to the
 * keys of a row tile. *need: bytes of workspace that this takes; less than that in args is RF_ERR_WORKSPACE. */
rf_status rf_attention_decode_force(rf_stream *stream, const rf_attention_args *args, int cluster, int splits,
                                    size_t *need, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
