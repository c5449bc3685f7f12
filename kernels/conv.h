/* kernels/conv.h - 2-D convolution and nearest upsampling for VAEs, channels last.
 *
 *   x    [batch, height, width, in_channels]            dtype   read
 *   w    [out_channels, kernel, kernel, in_channels]    dtype   read (repacked from [out, in, kh, kw] when a model loads)
 *   bias [out_channels]                                 f32     or NULL
 *   addend [batch, out_h, out_w, out_channels]          dtype   added after the bias, NULL = none; may alias y
 *   y    [batch, out_h, out_w, out_channels]            dtype   written
 * out = (in * (upsample ? 2 : 1) + pad_before + pad_after - kernel) / stride + 1. Padding is zero.
 * upsample: x is read as if every pixel were doubled in both directions first (nearest x2), without storing that image.
 * kernel 1 or 3; stride 1 or 2. Any channel counts (3 and 4 included). workspace: conv2d_workspace() bytes. */
#ifndef RF_KERNELS_CONV_H
#define RF_KERNELS_CONV_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void *x, *w, *addend;
    const float *bias;
    void *y;
    rf_dtype dtype;
    int64_t batch, height, width, in_channels, out_channels;
    int kernel, stride, pad_before, pad_after;
    bool upsample;
    void *workspace;
    size_t workspace_bytes;
} rf_conv2d_args;

int64_t rf_conv2d_out_size(const rf_conv2d_args *args, int64_t in_size);

/* y [batch, 2*height, 2*width, channels] = nearest x2 of x [batch, height, width, channels]. */
typedef struct {
    const void *x;
    void *y;
    rf_dtype dtype;
    int64_t batch, height, width, channels;
} rf_upsample2x_args;

#ifdef __cplusplus
}
#endif
#endif
