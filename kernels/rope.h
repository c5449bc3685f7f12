/* kernels/rope.h - rotary positions, and the causal attention of one pixel over its frames.
 *
 * Source   Su et al. 2021 (RoFormer). Pairs are interleaved: (x[2i], x[2i+1]) turns by the angle of pair i. Tables are
 *          made on the host (rf_rope_table_*) in double and kept in f32: [positions][num_pairs][2] = (cos, sin). Head
 *          dims past 2 * num_pairs are not turned.
 * Context  in a space-time transformer with causal attention over frames, the keys and values of a frame that will not
 *          change again are computed once; a denoising step then computes the newest frames alone. */
#ifndef RF_KERNELS_ROPE_H
#define RF_KERNELS_ROPE_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/*   x        [num_rows][row_stride] dtype: num_heads heads of head_dim from x on are turned in place (q and k of a
 *            packed row [3][H][d]: num_heads = 2 H)
 *   table    device f32 [period][num_pairs][2]
 *   rows     device int32 [num_rows] or NULL: row r stands at position rows[r] % period, or r % period
 * dtype f32 on the CPU; CUDA bf16 and f32, any sizes. */
typedef struct {
    void *x;
    rf_dtype dtype;
    int64_t num_rows, row_stride;
    int num_heads, head_dim, num_pairs;
    const float *table;
    int64_t period;
    const int32_t *rows;
} rf_rope_args;

/* Which frames a pixel sees, in device memory, so that a captured graph serves every frame of a rollout. */
#define RF_MAX_WINDOW 62
typedef struct {
    int32_t num_kept;             /* kept frames in front of the new ones: 0..RF_MAX_WINDOW - frames */
    int32_t num_frames;           /* slots listed in all: num_kept + new frames (checked on the host) */
    int32_t slots[RF_MAX_WINDOW]; /* slot of the j-th oldest visible frame; new frames follow the kept ones. Position of
                                     frame j is j. */
} rf_frame_window;

/* out(f, n) = softmax over j <= num_kept + f of (R_i q . R_j k / sqrt(d)) v, i = num_kept + f: pixel n of
 * new frame f, 0..frames-1.
 *   qkv      [samples * frames * tokens][3][H][d] dtype, rows (sample, frame, pixel); keys not turned
 *   out      [samples * frames * tokens][H][d] dtype, written
 *   kv       [state samples][tokens][H][2][slots][d] dtype: kept keys (not turned) and values. New frames' keys come
 *            from qkv, and their slots are not read (nor is any slot that the window does not list). NULL: nothing is
 *            kept, the window's num_kept counts as 0.
 *   store    also writes the new frames' k and v into their slots
 *   window   device
 *   table    device f32 [RF_MAX_WINDOW or more][num_pairs][2]: positions 0.. in the window; num_pairs <= d/2; 0 turns
 *            nothing
 *   rows     device int32 [num_rows] or NULL. Given (frames == 1): row r of qkv and out is pixel rows[r] % tokens of
 *            state sample rows[r] / tokens, and num_rows rows are computed
 *   sample_index device int32 [samples] or NULL: state sample of packed sample s (rows NULL)
 * dtype f32 on the CPU; CUDA bf16 and f32. d: CUDA any multiple of 8 up to 128 (fast: 64 and 128); CPU any even. */
typedef struct {
    const void *qkv;
    void *out, *kv;
    rf_dtype dtype;
    int64_t samples, frames, tokens;
    int64_t num_rows; /* with rows */
    const int32_t *rows, *sample_index;
    int num_heads, head_dim, num_pairs;
    int64_t slots;
    const rf_frame_window *window;
    const float *table;
    bool store;
} rf_temporal_attention_args;

/* Host tables, f32 out [positions][pairs][2].
 * axial   a grid_h x grid_w frame, "pixel" frequencies linspace(1, max_freq / 2, n) * pi with n = axis_pairs, positions
 *         linspace(-1, 1) an axis; pairs 0..n-1 by row, n..2n-1 by column: 2 * axis_pairs pairs. Frequencies, positions
 *         and angles are rounded to f32 as the reference does: angles reach 400, where f32 is 3e-5 apart.
 * time    theta^(-2 i / (2 num_pairs)) at position p; frequencies and angles rounded to f32. */
void rf_rope_table_axial(float *out, int64_t grid_h, int64_t grid_w, int axis_pairs, double max_freq);
void rf_rope_table_time(float *out, int64_t positions, int num_pairs, double theta);

#ifdef __cplusplus
}
#endif
#endif
