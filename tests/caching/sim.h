/* tests/caching/sim.h - one image's run of a policy with no model: signals come from a callback, plans are checked and
 * kept.
 *
 * The run is as the runtime does it, in this order within a step
 *   1  signals of the start of a step (from step 1 on)      RF_SIGNAL_INPUT_STEP, RF_SIGNAL_MODULATED_STEP
 *   2  read-back if the policy wants it (static: never)     values not read back stay as they were, at first NaN
 *   3  plan; a PROBE measures RF_SIGNAL_PROBE, all is read back, a zeroed plan goes to plan_probe
 *   4  FULL: refresh signals (from the second FULL on; OUTPUT_SIZE from the first), push, curvature (from the third on)
 *   5  verify: RF_SIGNAL_VERIFY
 * Every plan is checked against the contract of caching/policy.h: kind against produce, depths, rings that hold what is
 * produced, finite weights whose sum is 1, force_full. A plan that breaks it fails the running test. */
#ifndef RF_TESTS_CACHING_SIM_H
#define RF_TESTS_CACHING_SIM_H

#include "caching/policy.h"

/* out[branch][4], zeroed before; both branches must be filled. */
typedef void (*sim_measure)(void *user, int step, rf_signal signal, float out[2][4]);
/* e[0..horizon) of a branch (stream * 2 + branch), after a FULL step; zeroed before. */
typedef void (*sim_drift)(void *user, int step, int branch, float *e, int horizon);

typedef struct {
    const char *policy;
    const char *options; /* NULL: defaults */
    /* The run; 0 and NULL stand for the value in brackets. */
    int num_steps;              /* [50] */
    int branches;               /* [2] */
    int num_blocks;             /* [4] */
    int num_parts;              /* [2] */
    const uint8_t *kinds;       /* [num_blocks * num_parts] [SELF, MLP, MLP, ...] */
    int frames, grid_h, grid_w; /* [1, 4, 4] */
    const float *timesteps;     /* [num_steps] [1000 falling linearly, the last above 0] */
    const float *temb_change;   /* [num_steps] [0, then .1] */
    const char *calibration;    /* JSON [none] */
    int num_streams;            /* [0] only their number counts here */
    bool stochastic, force;
    int carried;         /* < 0: the run begins with a snapshot of the run before, at this step */
    sim_measure measure; /* [every rel1 is .1 in both branches] */
    sim_drift drift;     /* [0] */
    void *user;
    const bool *force_full; /* [num_steps] [never] */
    bool read_always;       /* read signals back at every step, asked for or not */
    bool free_weights;      /* sums of weights are not checked (Spectrum's never are) */
} sim_options;

typedef struct {
    rf_step_kind kind; /* in the end, never PROBE */
    bool probed;
    bool read_back;    /* at the start of the step */
    rf_step_plan plan; /* parts and rows point at this step's own arrays */
    char *signature; /* what is done, as text: kind, produce, span, verify, weights and parts; of FULL only the kind */
} sim_step;

typedef struct {
    rf_policy *policy;
    rf_cache_shape shape;
    rf_cache_layout layout; /* tables are freed with the result */
    int num_steps;
    sim_step *steps;
    char *layout_signature;
    int num_full, num_partial, num_skip, num_read_backs;
    rf_json *calibration;
    void *arrays; /* what shape points at */
} sim_result;

/* Creates, sets, sets up and runs. Errors of those calls come back; broken plans fail the test. sim_free in either
 * case. */
rf_status sim_try(sim_result *out, const sim_options *options, rf_error *err);
/* The same, and errors fail the test. */
void sim_run(sim_result *out, const sim_options *options);
void sim_free(sim_result *result);

/* FULL steps into list [num_steps]; returns how many. */
int sim_full_steps(const sim_result *result, int *list);
/* Fails the test unless exactly these steps are FULL. */
#define sim_assert_full(result, ...)                                                                                   \
    sim_assert_full_list((result), (const int[]){__VA_ARGS__}, (int)(sizeof((const int[]){__VA_ARGS__}) / sizeof(int)))
void sim_assert_full_list(const sim_result *result, const int *want, int num_want);
/* Same layout and same signature of every step? */
bool sim_same(const sim_result *a, const sim_result *b);
/* First step whose signature differs, num_steps if only the layout does, -1 if nothing does. */
int sim_first_difference(const sim_result *a, const sim_result *b);

/* out[*] for a wanted rel1, the same in both branches. */
void sim_set_rel1(float out[2][4], double rel1);
/* A repeatable value in [0, 1) from numbers, for made-up signals. */
double sim_noise(unsigned seed, int step, int signal, int branch);

#endif
