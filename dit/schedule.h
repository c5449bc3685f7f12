/* dit/schedule.h - the noise levels of a run: the training table, the timesteps that are visited and their sigmas.
 *
 * Internal to dit/. Follows diffusers' schedulers of the same names down to where they keep f32 and how they round, because
 * a timestep that is off by one is another picture.
 * alpha_bar  product of (1 - beta), f32, [num_train]        VP level of a timestep: x = sqrt(ab) x0 + sqrt(1-ab) noise
 * sigma      sqrt((1-ab)/ab) for DPM-Solver++ and Euler;     flow: x = (1-sigma) x0 + sigma noise */
#ifndef RF_DIT_SCHEDULE_H
#define RF_DIT_SCHEDULE_H

#include "dit/sampler.h"

typedef struct {
    int num_train;
    int num_steps;     /* may be fewer than asked: see rf_sampler_plan */
    float *alpha_bar;  /* [num_train]; NULL for flow */
    double *timesteps; /* [num_steps], as the model is told */
    double *sigmas;    /* [num_steps + 1], f32 values, the last is the end of the run; NULL for DDPM and DDIM */
} rf_schedule;

/* config and options are checked and agree (rf_sampler_plan_make); options->kind and sigmas are resolved. */
rf_status rf_schedule_make(rf_schedule *out, const rf_scheduler_config *config, const rf_sampler_options *options,
                           rf_error *err);
void rf_schedule_free(rf_schedule *schedule);

#endif
