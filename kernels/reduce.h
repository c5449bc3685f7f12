/* kernels/reduce.h - statistics that policies decide by. Fixed summation order: the same bits on every run.
 *   a, b [groups, rows, cols] dtype; out [groups, 4] f32 = sum |a-b|, sum |b|, sum (a-b)^2, sum b^2
 *   b NULL counts as zeros in a-b (out[1] and out[3] are then 0).
 *   row_weight device f32 [rows] or NULL: factor of every term of a row. workspace: groups * 256 * 4 f32 on CUDA. */
#ifndef RF_KERNELS_REDUCE_H
#define RF_KERNELS_REDUCE_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void *a, *b;
    rf_dtype dtype;
    int64_t groups, rows, cols;
    const float *row_weight;
    float *out;
    float *workspace;
    size_t workspace_bytes;
} rf_reduce_pair_args;

#ifdef __cplusplus
}
#endif
#endif
