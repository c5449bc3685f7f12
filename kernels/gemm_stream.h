/* kernels/gemm_stream.h - Linear layers of up to 64 rows with large weights on Hopper, internal to kernels/ and its
 * tests.
 *
 * y = act(alpha x w^T + bias) + beta y0 in one kernel: bf16 x and w, w as [n, k], one batch, no erf GELU; k, n and the
 * row strides multiples of 8, x, w, y and y0 on 16-byte addresses (y0 == y too). It starts while the kernel before it
 * drains and, where args->w_is_constant allows it, has then sent for its weights already; x and y0 are read and y is
 * written only after that kernel's end. The bits depend on m's class (8, 16, 32, 48, 64 tokens) and on the config,
 * never on the flag or on timing. */
#ifndef RF_KERNELS_GEMM_STREAM_H
#define RF_KERNELS_GEMM_STREAM_H

#include "kernels/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Plan ids of rf_gemm_cuda: RF_GEMM_STREAM_ID + config. */
#define RF_GEMM_STREAM_ID       3000
#define RF_GEMM_STREAM_MAX_ROWS 64

int rf_gemm_stream_num_configs(void);
/* "s1": whole k a block; "s2", "s4", "s8": clusters of that many blocks along k. "n": stages of 64 columns of k instead
 * of 128. "h": at most half of a multiprocessor's shared memory, so that the next kernel's blocks fit beside it. "d":
 * two blocks a multiprocessor. NULL outside [0, num_configs). */
const char *rf_gemm_stream_config_name(int config);
/* The same answer the launch gives: RF_OK, or why this config cannot run these args on this stream's GPU. */
rf_status rf_gemm_stream_check(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* Queues one GEMM with the given config, whatever the tuning table says. Allowed in phase RUN and during capture. */
rf_status rf_gemm_stream_force(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
/* The config to take without measuring, or -1 where another kernel may well be faster: w_is_constant, more than 2^23
 * weights, 5 to 64 rows. */
int rf_gemm_stream_default(rf_stream *stream, const rf_gemm_args *args);

/* How a config lays out these args. */
typedef struct {
    int tokens;            /* of the token tile: 8, 16, 32, 48, 64 */
    int rows, num_tiles;   /* rows of w in a tile; tiles */
    int split, num_blocks; /* blocks of a cluster; of the launch */
    int stage_columns, num_stages;
    size_t shared_bytes;
    int resident; /* clusters of this launch that the GPU holds at once */
} rf_gemm_stream_shape;
rf_status rf_gemm_stream_get_shape(rf_stream *stream, const rf_gemm_args *args, int config, rf_gemm_stream_shape *out,
                                   rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
