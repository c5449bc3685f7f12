/* kernels/gemm_skinny.h - the library's own Hopper GEMM for few rows, internal to kernels/ and its tests.
 *
 * y = act(alpha x w^T + bias) in one kernel, for up to 512 rows. It takes bf16 inputs, w as [n, k], one batch, no addend, no erf
 * GELU, k, n and the row strides multiples of 8, x, w and y on 16-byte addresses, and needs a GPU of compute capability 9.0.
 * It starts while the kernel before it drains and, where args->w_is_constant allows it, has then loaded its weights and bias
 * already; x is read and y written only after that kernel's end. The bits do not depend on the flag or on timing. */
#ifndef RF_KERNELS_GEMM_SKINNY_H
#define RF_KERNELS_GEMM_SKINNY_H

#include "kernels/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Plan ids of rf_gemm_cuda: RF_GEMM_SKINNY_ID + config. */
#define RF_GEMM_SKINNY_ID 2000

int rf_gemm_skinny_num_configs(void);
/* "r128k4": a cluster of 4 thread blocks, each with 128 rows of w (outputs) and a quarter of k, for all rows of x. "t2": x's
 * rows in two tiles. "h": at most half of an SM's shared memory, so that blocks of the next kernel fit beside it. NULL outside
 * [0, num_configs). */
const char *rf_gemm_skinny_config_name(int config);
/* The same answer the launch gives: RF_OK, or why this config cannot run these args on this stream's GPU. */
rf_status rf_gemm_skinny_check(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* Queues one GEMM with the given config, whatever the tuning table says. Allowed in phase RUN and during capture. */
rf_status rf_gemm_skinny_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* The config to take without measuring, or -1 where another kernel may well be faster. Needs w_is_constant. */
int rf_gemm_skinny_default(rf_stream *stream, const rf_gemm_args *args);
/* How many clusters of this config's launch the GPU holds at once, and how many the launch has. */
rf_status rf_gemm_skinny_residency(rf_stream *stream, const rf_gemm_args *args, int config, int *resident,
                                   int *clusters, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
