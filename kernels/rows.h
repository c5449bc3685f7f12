/* kernels/rows.h - packed copies of listed rows.
 *   gather   dst[i] = src[rows[i]]      scatter  dst[rows[i]] = src[i]   (rows without duplicates for scatter)
 *   rows device int32 [num_rows]; cols elements of dtype per row; dst may not alias src.
 *   src_ld, dst_ld elements between two rows, 0 = cols: a range of columns of wider rows. */
#ifndef RF_KERNELS_ROWS_H
#define RF_KERNELS_ROWS_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void *src;
    void *dst;
    const int32_t *rows;
    rf_dtype dtype;
    int64_t num_rows, cols, src_ld, dst_ld;
} rf_rows_args;

#ifdef __cplusplus
}
#endif
#endif
