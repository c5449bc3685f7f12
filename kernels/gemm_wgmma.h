/* kernels/gemm_wgmma.h - the library's own Hopper GEMM, internal to kernels/ and its tests.
 *
 * It computes what rf_gemm_args describes in one kernel: y = act(alpha x w^T + bias) + beta y0. It takes bf16 inputs,
 * w as [n, k], one batch, k and n multiples of 8, operands on 16-byte addresses, and needs a GPU of compute capability
 * 9.0. rf_gemm_cuda uses it only where tuning measured it faster than cuBLASLt; the force entry is for tests. */
#ifndef RF_KERNELS_GEMM_WGMMA_H
#define RF_KERNELS_GEMM_WGMMA_H

#include "kernels/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Plan ids of rf_gemm_cuda: below this a cuBLASLt candidate, from here on RF_GEMM_WGMMA_ID + config. */
#define RF_GEMM_WGMMA_ID 1000

int rf_gemm_wgmma_num_configs(void);
/* "128x144": rows of y times columns of y per thread block. "pp192c2": persistent, two consumers in turns with tiles of
 * 128 x 192 each, clusters of 2 blocks; no erf GELU. NULL outside [0, num_configs). */
const char *rf_gemm_wgmma_config_name(int config);
/* The same answer the launch gives: RF_OK, or why this config cannot run these args on this stream's GPU. */
rf_status rf_gemm_wgmma_check(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* Queues one GEMM with the given config, whatever the tuning table says. Allowed in phase RUN and during capture. */
rf_status rf_gemm_wgmma_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
