/* kernels/gemv.h - Linear layers of one to eight rows at memory speed, internal to kernels/ and its tests.
 *
 * y = act(alpha x w^T + bias) + beta y0 in one kernel on CUDA cores: bf16 x and w, w as [n, k], one batch, no erf GELU,
 * k and the row strides of x and w multiples of 8, x and w on 16-byte addresses; any n, any ldy, y0 == y too. Compute
 * capability 8.0 and later; on 9.0 it starts while the kernel before it drains and, where args->w_is_constant allows
 * it, has then asked for its first weights. The bits depend on m's class (1, 2, 3-4, 5-8) and on the config, never on
 * timing. */
#ifndef RF_KERNELS_GEMV_H
#define RF_KERNELS_GEMV_H

#include "kernels/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Plan ids of rf_gemm_cuda: RF_GEMV_ID + config. */
#define RF_GEMV_ID       4000
#define RF_GEMV_MAX_ROWS 8

int rf_gemv_num_configs(void);
/* "v1", "v2", ...: warps of a thread block that share k for one group of outputs. NULL outside [0, num_configs). */
const char *rf_gemv_config_name(int config);
/* The same answer the launch gives: RF_OK, or why this config cannot run these args on this stream's GPU. */
rf_status rf_gemv_check(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* Queues one GEMM with the given config, whatever the tuning table says. Allowed in phase RUN and during capture. */
rf_status rf_gemv_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* The config to take without measuring, or -1 where another kernel may well be faster: w_is_constant, 2^20 weights or
 * more, and up to 4 rows; on other cards than Hopper, or below 2^23 weights, up to 8. */
int rf_gemv_default(rf_stream *stream, const rf_gemm_args *args);

#ifdef __cplusplus
}
#endif
#endif
