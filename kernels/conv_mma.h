/* kernels/conv_mma.h - the tensor-core convolution of kernels/conv_mma.cu, internal to kernels/. */
#ifndef RF_KERNELS_CONV_MMA_H
#define RF_KERNELS_CONV_MMA_H

#include "kernels/conv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* bf16, in_channels a multiple of 64, out_channels of 8. Reads no pointer. */
bool rf_conv_mma_fits(const rf_conv2d_args *args);
/* Arguments already checked by rf_conv2d_cuda; x, w, y, addend on 16-byte addresses. */
rf_status rf_conv_mma_launch(rf_stream *stream, const rf_conv2d_args *args, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
