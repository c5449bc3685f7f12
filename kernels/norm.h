/* kernels/norm.h - row norms with modulation, the gated residual that feeds them, and GroupNorm.
 *
 * norm      n = (x - mean) / sqrt(var + eps)   LAYER (biased variance)      or   x / sqrt(mean(x^2) + eps)   RMS
 *           y = (n * weight + bias) * (1 + scale) + shift, each factor only if given; sums in f32, two passes.
 * residual  x_new = base + gate * sum_t w[t] * terms[t], then optionally y = norm(x_new): one kernel between two GEMMs.
 *
 * Modulation (adaLN) comes from a table computed once for all steps. Row r belongs to group g = r / rows_per_group
 * (a sample, a frame, a segment, or a token); its table row is index[g] (device int32), or g if index is NULL;
 * shift, scale and gate are column offsets into that table row, -1 = none. */
#ifndef RF_KERNELS_NORM_H
#define RF_KERNELS_NORM_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_NORM_LAYER = 0, RF_NORM_RMS } rf_norm_kind;

typedef struct {
    const void *table;    /* [table_rows, stride] */
    rf_dtype dtype;       /* f32 or bf16 */
    int64_t stride;       /* elements between two table rows */
    const int32_t *index; /* device [groups] or NULL */
    int64_t rows_per_group;
} rf_modulation;

/*   x       [., cols] x_dtype   read
 *   y       [rows, cols] y_dtype written; may not alias x unless x_dtype == y_dtype and rows == NULL
 *   rows    device int32 [num_rows] or NULL: output row i is computed from x row rows[i] (and that row's group)
 *   weight, bias [cols] f32 or NULL
 * cols <= 16384; CUDA: cols a multiple of 4. */
typedef struct {
    const void *x;
    void *y;
    rf_dtype x_dtype, y_dtype;
    int64_t num_rows, cols;
    const int32_t *rows;
    rf_norm_kind kind;
    float eps;
    const float *weight, *bias;
    rf_modulation mod;
    int64_t shift, scale; /* column offsets in mod, -1 = none */
} rf_norm_args;

#define RF_MAX_TERMS 8

/*   x       [., cols] x_dtype                 written; also read when base is NULL
 *   base    [base_period, cols] base_dtype    NULL: x itself; else row r adds to base row r % base_period
 *                                             (position table of the patch embedding)
 *   terms   num_terms (0..8) x [num_rows, cols] y_dtype
 *   weights device f32 [num_weight_rows, num_terms] or NULL (all 1)
 *   weight_row device u8 [num_rows] or NULL (row 0): which row of weights a row takes
 *   term_group device int32 [num_rows / rows_per_term_group] or NULL. Given, the terms are state of all groups: x row r of
 *             group g = r / rows_per_term_group takes term row term_group[g] * rows_per_term_group + r % rows_per_term_group
 *             and weight row term_group[g] (weights wanted, weight_row and rows not). A term of weight 0 is not read.
 *   extra   [num_rows, cols] y_dtype or NULL: x_new += extra_gate * extra[row] after the sum, a second part's output with its own gate column
 *             (term_group applies to it too; not with rows)
 *   term_rows device int32 [num_rows] or NULL, with rows: term row i is row term_rows[i] of the terms (state) instead of row i
 *   store   [., cols] y_dtype or NULL, with rows: store row store_rows[i] = terms[0]'s row of i (a copy, no second read)
 *   rows    device int32 [num_rows] or NULL: term row i is added to x row rows[i]; y row i is that row's norm
 *   gate    column offset in gate_mod, -1 = 1
 *   norm    if norm_y is not NULL: kind, eps, weight, bias, shift, scale as in rf_norm_args, over the new x in f32
 *           before it is rounded to x_dtype */
typedef struct {
    void *x;
    const void *base;
    int64_t base_period;
    int num_terms;
    const void *terms[RF_MAX_TERMS];
    const float *weights;
    const uint8_t *weight_row;
    const int32_t *term_group;
    int64_t rows_per_term_group;
    const void *extra;
    int64_t extra_gate;
    const int32_t *rows, *term_rows, *store_rows;
    void *store;
    rf_dtype x_dtype, base_dtype, y_dtype;
    int64_t num_rows, cols;
    rf_modulation gate_mod;
    int64_t gate;

    void *norm_y; /* [num_rows, cols] norm_y_dtype, or NULL */
    rf_dtype norm_y_dtype;
    rf_norm_kind norm_kind;
    float norm_eps;
    const float *norm_weight, *norm_bias;
    rf_modulation norm_mod;
    int64_t norm_shift, norm_scale;
} rf_residual_args;

/* GroupNorm over NHWC with optional SiLU: statistics per (sample, group of channels) over all pixels.
 *   x, y [batch, pixels, channels] dtype (y may alias x); weight, bias [channels] f32
 *   workspace: rf_group_norm_workspace_bytes(args) on CUDA (statistics and partial sums), NULL allowed on the host */
typedef struct {
    const void *x;
    void *y;
    rf_dtype dtype;
    int64_t batch, pixels, channels;
    int num_groups;
    float eps;
    const float *weight, *bias;
    bool silu;
    float *workspace;
    size_t workspace_bytes;
} rf_group_norm_args;

#define RF_GROUP_NORM_MAX_SPLITS 256 /* parts of an image whose statistics are merged */
/* batch * num_groups * (2 + 3 * RF_GROUP_NORM_MAX_SPLITS) floats: a bound for both backends; reads no pointer. */
size_t rf_group_norm_workspace_bytes(const rf_group_norm_args *args);

#ifdef __cplusplus
}
#endif
#endif
