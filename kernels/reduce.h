/* kernels/reduce.h - statistics that policies decide by. Fixed summation order: the same bits on every run.
 *   a [., rows, a_ld] a_dtype, b [., rows, b_ld] b_dtype; of every row the first cols columns count
 *   out[out_index[g]] = sum |a-b|, sum |b|, sum (a-b)^2, sum b^2 over group g = (a[a_index[g]], b[b_index[g]])
 *   b NULL counts as zeros in a-b (out[1] and out[3] are then 0).
 *   RATIO      out[0] is sum |a-b| / (|b| + 1e-10) instead (SpeCa's error)
 *   ROW_NORMS  out[0] is the sum over rows of |a_row|_2 / |b_row|_2 instead (0 where |b_row| is 0; MagCache's table)
 *   index lists device int32 [groups] or NULL = identity. ld 0 = cols.
 *   row_weight device f32 [rows] or NULL: factor of every term of a row. workspace: groups * 256 * 4 f32 on CUDA. */
#ifndef RF_KERNELS_REDUCE_H
#define RF_KERNELS_REDUCE_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_REDUCE_PLAIN = 0, RF_REDUCE_RATIO, RF_REDUCE_ROW_NORMS } rf_reduce_kind;

typedef struct {
    const void *a, *b;
    rf_dtype a_dtype, b_dtype;
    rf_reduce_kind kind;
    int64_t groups, rows, cols, a_ld, b_ld;
    const int32_t *a_index, *b_index, *out_index;
    const float *row_weight;
    float *out;
    float *workspace;
    size_t workspace_bytes;
} rf_reduce_pair_args;

#ifdef __cplusplus
}
#endif
#endif
