/* kernels/sampler.h - the end of a denoising step: unpatchify, guidance and the solver's update, in one kernel.
 *
 * Every solver here is, per element, a weighted sum whose weights depend on the schedule alone (dit/sampler.h makes them):
 *   out = cond, or with two branches uncond + guidance_scale * (cond - uncond) on the first guided_channels channels
 *         (the others keep the cond branch)
 *   x0  = c.x0_x * x + c.x0_out * out;          clamped to [-clip, clip] if c.clip > 0
 *   x'  = c.x * x + c.x0 * x0 + c.x0_prev * x0_prev + c.out * out + s * noise;     x0_prev' = x0
 *   s   = c.noise, or with learned_variance c.noise * exp(0.5 * (f * c.log_max + (1 - f) * c.log_min)), f = (v + 1) / 2,
 *         v the model's extra channel (index channels + ch) of the cond branch.
 * Terms whose weight is 0 are not read (x0_prev and noise may hold anything then). State in f32. */
#ifndef RF_KERNELS_SAMPLER_H
#define RF_KERNELS_SAMPLER_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float in_scale; /* the model sees in_scale * x (rf_patchify_args.scale points at this field's column) */
    float timestep; /* what the model is told */
    float x0_x, x0_out, clip;
    float x, x0, x0_prev, out, noise;
    float log_min, log_max;
} rf_sampler_coefs; /* 12 floats */

/*   model_out [branches*batch*tokens, out_channels*pt*ph*pw] model_dtype, columns in order (channel, pt, ph, pw)
 *   x, x0_prev [batch, channels, frames, height, width] f32, read and written
 *   noise      [., batch, channels, frames, height, width] f32, slice *step is used; NULL if no step has noise
 *   coefs      device [num_steps]; step device int32, not changed here (rf_step_advance does that)
 *   out_channels = channels, or 2*channels if the model has a variance half */
typedef struct {
    const void *model_out;
    rf_dtype model_dtype;
    float *x, *x0_prev;
    const float *noise;
    const rf_sampler_coefs *coefs;
    const int32_t *step;
    int64_t batch, branches, channels, out_channels, frames, height, width;
    int pt, ph, pw;
    float guidance_scale;
    int guided_channels;
    bool learned_variance;
} rf_sampler_step_args;

/* Moves the device-side step counter: *step += increment, then mod_index[g] = (*step % steps_per_chunk) * rows_per_step +
 * slots[g] for every modulation group g. increment 0 sets up the first step. */
typedef struct {
    int32_t *step;
    int32_t increment;
    const int32_t *slots; /* device [num_groups] */
    int32_t *mod_index;   /* device [num_groups] */
    int64_t num_groups;
    int32_t rows_per_step, steps_per_chunk;
} rf_step_advance_args;

/* out[i] = mean + std * normal(seed, key, i) by the counter-based generator of core/rng.h, rounded to dtype; for drawing
 * synthetic weights on the device. */
typedef struct {
    void *out;
    rf_dtype dtype;
    int64_t num;
    uint64_t seed, key;
    float mean, std;
} rf_fill_normal_args;

#ifdef __cplusplus
}
#endif
#endif
