/* samples/refrain/sweep_plan.h - what `refrain sweep` is asked to try: text to a list of settings.
 *
 *   POLICY                          its defaults
 *   POLICY:OPT=VALUES;OPT2=VALUES   every combination, the last option changing fastest
 *   all                             the built-in list: every policy from mild to aggressive
 *   VALUES  a comma list of items; an item is a value, A..B/N (N values evenly from A to B), A..B/Ng (geometric) or,
 *           for whole numbers, A..B (every one of them). Text options take their value as it is, alternatives
 *           separated by '|'.
 *
 * Two settings that resolve to the same option values are one setting. */
#ifndef REFRAIN_SWEEP_PLAN_H
#define REFRAIN_SWEEP_PLAN_H

#include "caching/policy.h"

#define SWEEP_MAX_SETTINGS 10000

typedef struct {
    char *policy;      /* name; "steps" for the control */
    char *options;     /* those that were asked for, "k=v;k2=v2"; "" = all defaults */
    char *key;         /* "NAME:" and all options resolved: names the setting in a store; control: "steps:N" */
    rf_policy *object; /* NULL: the control */
    int num_steps;     /* of the control; 0 = the sweep's own */
} sweep_setting;

typedef struct {
    sweep_setting *items;
    int num, room;
} sweep_plan; /* zero = empty */

/* Messages name the place in the text. On failure the plan may hold a part of the settings; free it. */
rf_status sweep_plan_add(sweep_plan *plan, const char *spec, rf_error *err);
/* The control, the same sampler with fewer steps and no cache: "25,30" or "auto" (from 5 to 80 % of num_steps). */
rf_status sweep_plan_add_steps(sweep_plan *plan, const char *text, int num_steps, rf_error *err);
/* One setting of a policy that is a copy of `fixed`, with one more option; for searches. */
rf_status sweep_plan_add_value(sweep_plan *plan, const sweep_setting *fixed, const char *option, const char *value,
                               rf_error *err);
void sweep_plan_free(sweep_plan *plan);
int sweep_plan_find(const sweep_plan *plan, const char *key); /* -1 = not in it */

/* The built-in list, one spec after the other; NULL past the end. */
const char *sweep_builtin_spec(int index);

/* A search over one option: values from the mild end (near the uncached run) to the aggressive one. */
typedef struct {
    const char *option; /* of the policy's table */
    bool whole;         /* whole numbers */
    double mild, aggressive;
} sweep_range;
/* spec: a policy with at most one option that has a range A..B; without one the policy's main option and its built-in
 * range. fixed: the other options, to be freed with sweep_plan_free (one setting). */
rf_status sweep_plan_search(const char *spec, sweep_plan *fixed, sweep_range *range, rf_error *err);
/* The built-in range of a policy, false if it has none. */
bool sweep_main_option(const char *policy, sweep_range *out);

#endif
