/* dlm/commit.h - commit rules: which masks of a diffusion canvas become tokens after a pass. Host, no model in sight.
 *
 * Sources  top-n and its schedule: LLaDA's generate.py; threshold and factor: Fast-dLLM (Wu et al. 2025); entropy bound: Ben-Hamu et
 *          al. 2025; dynamic: SDAR; origin, schedule and alg_temp: Dream's generation_utils. */
#ifndef RF_DLM_COMMIT_H
#define RF_DLM_COMMIT_H

#include "dlm/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A masked position after a pass. Confidence: larger is surer. */
typedef struct {
    int32_t position, token;
    float confidence, entropy;
} rf_candidate;

/* The t-th of `steps` counts that share out `masks`: floor(masks / steps), one more for the first masks mod steps. */
int32_t rf_commit_share(int32_t masks, int32_t steps, int32_t t);

/* Uniform in (0, 1) and standard Gumbel noise that depend on (seed, stream, step, position) alone. */
double rf_commit_uniform(uint64_t seed, uint32_t stream, int32_t step, int32_t position);
double rf_commit_gumbel(uint64_t seed, uint32_t stream, int32_t step, int32_t position);

/* The rule, everything but GUIDED. Orders c (stable: confidence down, then position up; entropy up for the entropy bound; position
 * for sequential and origin) and returns how many of its first entries commit.
 *   count       what the schedule gives this pass: TOPN, SCHEDULE, SEQUENTIAL, and the floor of a dynamic THRESHOLD
 *   transfer    ORIGIN: probability with which each mask commits
 * THRESHOLD, FACTOR and ENTROPY_BOUND return at least 1 if num > 0. */
int32_t rf_commit_select(const rf_decode_options *options, int32_t count, double transfer, int32_t step,
                         rf_candidate *c, int32_t num);

#ifdef __cplusplus
}
#endif
#endif
