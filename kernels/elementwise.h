/* kernels/elementwise.h - small maps: activations, sums, casts, layout changes, embeddings. */
#ifndef RF_KERNELS_ELEMENTWISE_H
#define RF_KERNELS_ELEMENTWISE_H

#include "core/backend.h"
#include "kernels/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[r, c] = act(x_scale * x[r, c] + add[add_row(r), c]).
 *   x    [rows, cols] x_dtype;  y [rows, cols] y_dtype (may alias x if the dtypes are equal)
 *   add  [., cols] add_dtype or NULL; its row is add_index[r] (device int32) if given, else r % add_period
 * add_index outside [0, add_period) reads nothing and adds nothing. Serves casts, SiLU(c), c = temb + table[label],
 * position tables, and latents * 1/scaling_factor + shift (with x_shift). */
typedef struct {
    const void *x, *add;
    void *y;
    const int32_t *add_index;
    int64_t add_period;
    rf_dtype x_dtype, add_dtype, y_dtype;
    int64_t rows, cols;
    float x_scale, x_shift; /* x_scale * x + x_shift */
    rf_act act;
    bool planar_to_last; /* x is [rows = batch, channels, pixels] f32, y [batch, pixels, channels]; cols =  */
    bool last_to_planar; /* channels * pixels; the opposite direction; no add in these two */
    int64_t channels;
} rf_elementwise_args;
rf_elementwise_args rf_elementwise_args_default(rf_dtype x_dtype, rf_dtype y_dtype, int64_t rows, int64_t cols);

/* out[i] = [cos(t_i f_j) | sin(t_i f_j)], f_j = max_period^(-j / (dim/2 - freq_shift)), j < dim/2; in f32, then dtype.
 *   t [num] f32, the timestep as the model is told (0..999 for DiT); out [num, dim] dtype; dim even. */
typedef struct {
    const float *t;
    void *out;
    rf_dtype dtype;
    int64_t num, dim;
    float freq_shift, max_period;
} rf_timestep_embed_args;

/* Latents to patch rows: out row (branch, b, f, y, x) = scale * latent[b] patch in order (channel, pt, ph, pw), rounded to
 * dtype. Branches repeat the batch: rows of branch 1 follow all rows of branch 0.
 *   latent [batch, channels, frames, height, width] f32; out [branches*batch*tokens, channels*pt*ph*pw] dtype
 *   sample_index device int32 [batch] or NULL: packed sample b is latent sample_index[b]
 *   scale  device f32 table, entry *step * scale_stride is used; NULL = 1 */
typedef struct {
    const float *latent;
    void *out;
    rf_dtype dtype;
    int64_t batch, branches, channels, frames, height, width;
    int pt, ph, pw;
    const int32_t *sample_index;
    const float *scale;
    const int32_t *step; /* device; NULL = entry 0 */
    int64_t scale_stride;
} rf_patchify_args;

#ifdef __cplusplus
}
#endif
#endif
