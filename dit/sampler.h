/* dit/sampler.h - noise schedules and solvers as tables of weights.
 *
 * Every solver here is a weighted sum of the state, the model's output, at most one earlier x0 prediction and noise; the weights
 * depend on the schedule alone and are computed on the host, in double, before the loop (see kernels/sampler.h for the sum).
 * Sources  DDPM Ho et al. 2020, learned range Nichol & Dhariwal 2021; DDIM Song et al. 2021; DPM-Solver++ Lu et al. 2022
 *          (2M midpoint and its SDE form); Euler Karras et al. 2022; flow matching Lipman et al. 2023, Esser et al. 2024.
 * Values follow diffusers' schedulers of the same names (f32 tables where diffusers keeps f32). */
#ifndef RF_DIT_SAMPLER_H
#define RF_DIT_SAMPLER_H

#include "core/json.h"
#include "kernels/sampler.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    RF_SAMPLER_DDPM = 0,
    RF_SAMPLER_DDIM,
    RF_SAMPLER_DPMPP_2M,
    RF_SAMPLER_DPMPP_2M_SDE,
    RF_SAMPLER_EULER,
    RF_SAMPLER_FLOW_EULER,
    RF_SAMPLER_COUNT
} rf_sampler_kind;

typedef enum { RF_BETA_LINEAR = 0, RF_BETA_SCALED_LINEAR, RF_BETA_SQUAREDCOS_CAP_V2 } rf_beta_schedule;
typedef enum { RF_PREDICTION_EPSILON = 0, RF_PREDICTION_V, RF_PREDICTION_SAMPLE, RF_PREDICTION_FLOW } rf_prediction;
typedef enum { RF_SPACING_LEADING = 0, RF_SPACING_TRAILING, RF_SPACING_LINSPACE } rf_spacing;
typedef enum { RF_VARIANCE_FIXED_SMALL = 0, RF_VARIANCE_FIXED_LARGE, RF_VARIANCE_LEARNED_RANGE } rf_variance;
/* What the command line calls --scheduler: the sigma schedule. DEFAULT is the file's. */
typedef enum { RF_SIGMAS_DEFAULT = 0, RF_SIGMAS_KARRAS } rf_sigmas;

typedef struct {
    rf_sampler_kind kind; /* of the file's _class_name */
    int num_train_timesteps;
    double beta_start, beta_end;
    rf_beta_schedule beta_schedule;
    rf_prediction prediction;
    rf_spacing spacing;
    int steps_offset;
    bool set_alpha_to_one;
    bool clip_sample;
    double clip_sample_range;
    rf_variance variance;
    rf_sigmas sigmas;
    bool lower_order_final;    /* DPM-Solver++: first order at the end of runs of fewer than 15 steps */
    bool euler_at_final;       /* DPM-Solver++: first order at the end of every run */
    double lambda_min_clipped; /* DPM-Solver++: timesteps of lower log-SNR/2 are left out; -INFINITY = none */
    bool final_sigma_zero;     /* DPM-Solver++, Euler: final_sigmas_type zero (else sigma_min) */
    double shift;              /* flow: sigma' = shift * sigma / (1 + (shift - 1) * sigma) */
    bool dynamic_shifting;     /* flow: mu linear in the number of image tokens */
    double base_shift, max_shift;
    int base_seq_len, max_seq_len;
} rf_scheduler_config;

/* DDIM, linear 1e-4..0.02 over 1000, epsilon, leading. */
rf_scheduler_config rf_scheduler_config_default(void);
/* From scheduler_config.json. Absent keys take the class's defaults in diffusers; what is not implemented (thresholding, sigma
 * kinds beta/exponential, zero-SNR rescale, solver order 3, ...) is refused by key and value. */
rf_status rf_scheduler_config_read(rf_scheduler_config *out, const rf_json *config, rf_error *err);

typedef struct {
    rf_sampler_kind kind; /* RF_SAMPLER_COUNT = the config's */
    int num_steps;        /* 1..10000, at most num_train_timesteps where the schedule picks whole timesteps */
    double eta;           /* DDIM: 0 deterministic .. 1; other solvers take 0 only */
    rf_sigmas sigmas;
    int64_t num_tokens;         /* image tokens, for dynamic shifting */
    double mu;                  /* dynamic shifting: 0 = from num_tokens */
    bool flow_sigmas_per_steps; /* flow: before shifting, sigmas run from 1 to 1/num_steps (FLUX) instead of to the
                                   config's own smallest (SD3) */
} rf_sampler_options;

typedef struct {
    int num_steps;           /* as asked; fewer if lambda_min_clipped cuts a trailing schedule, as the reference does */
    rf_sampler_coefs *coefs; /* host [num_steps]; rf_sampler_plan_free */
    float init_scale;        /* the first x is init_scale * normal noise */
    bool learned_variance;
    bool uses_noise;  /* some step adds noise */
    bool *step_noise; /* [num_steps]: does the reference draw noise at this step (for seed parity) */
} rf_sampler_plan;

/* Another kind than the config's takes betas, prediction, spacing and clipping from the config and its own defaults for the
 * rest. A flow solver on another prediction, or the reverse, is RF_ERR_ARGUMENT.
 * model_has_variance: the model gives a variance half. With variance learned_range and no such half: RF_ERR_CONFIG.
 * DDPM on a model with a variance half whose scheduler says fixed_small drops the half. */
rf_status rf_sampler_plan_make(rf_sampler_plan *out, const rf_scheduler_config *config,
                               const rf_sampler_options *options, bool model_has_variance, rf_error *err);
void rf_sampler_plan_free(rf_sampler_plan *plan);

/* "ddpm", "ddim", "dpm++2m", "dpm++2m-sde", "euler", "flow-euler". */
bool rf_sampler_kind_from_name(const char *name, rf_sampler_kind *out);
const char *rf_sampler_kind_name(rf_sampler_kind kind);

#ifdef __cplusplus
}
#endif
#endif
