/* samples/refrain/sweep_plan.h - what `refrain sweep` is asked to try: text to a list of settings.
 *
 *   POLICY                          its defaults
 *   POLICY:OPT=VALUES;OPT2=VALUES   every combination, the last option changing fastest
 *   all                             the built-in list: every policy from mild to aggressive
 *   VALUES  a comma list of items; an item is a value, A..B/N (N values evenly from A to B), A..B/Ng (geometric) or,
 *           for whole numbers, A..B (every one of them). Text options take their value as it is, alternatives
 *           separated by '|'.
 *
 * Two settings that resolve to the same option values are one setting.
 *
 * Specs of worlds have two more options beside a policy's own:
 *   carry=off,first,last             a frame starts with stored features of the frame before (caching/cache.h)
 *   context=rebuild,keep,sinks,off   how kept frames are treated (dit/world.h), off: computed again in every step
 * and the name `none`, no policy, which takes `context` alone.
 *
 * Specs of text have row policies, or `none`, and may go on with settings of decoding (text_args.h), one behind each '+':
 *   dual+commit=threshold+threshold=0.8,0.9     none+steps=8,16     window:refresh=16,32+end=fill */
#ifndef REFRAIN_SWEEP_PLAN_H
#define REFRAIN_SWEEP_PLAN_H

#include "caching/cache.h"

#define SWEEP_MAX_SETTINGS 10000

#define SWEEP_UNCACHED "none"

/* In the order of rf_context_mode, and computing everything again. */
typedef enum {
    SWEEP_CONTEXT_REBUILD = 0,
    SWEEP_CONTEXT_KEEP,
    SWEEP_CONTEXT_SINKS,
    SWEEP_CONTEXT_OFF,
    SWEEP_CONTEXT_GIVEN /* the sweep's own */
} sweep_context;

typedef struct {
    char *policy;      /* name; "steps" for the control, "none" for other uncached runs */
    char *options;     /* those that were asked for, "k=v;k2=v2"; "" = all defaults; text: "+" and decode behind them */
    char *key;         /* "NAME:" and all options resolved: names the setting in a store; control: "steps:N" */
    rf_policy *object; /* NULL: no policy */
    int num_steps;     /* of the control; 0 = the sweep's own */
    rf_cache_carry carry;
    sweep_context context;
    char *decode;                /* text: settings of decoding, "k=v+k2=v2"; NULL or "" = none */
    const struct kv_setting *kv; /* of an autoregressive model's cache (kv_args.h), borrowed; NULL = none */
} sweep_setting;

typedef struct {
    sweep_setting *items;
    int num, room;
} sweep_plan; /* zero = empty */

/* Messages name the place in the text. On failure the plan may hold a part of the settings; free it. */
rf_status sweep_plan_add(sweep_plan *plan, const char *spec, rf_error *err);
/* The same for worlds, where `all` is another list. slides: rollouts are longer than the window, so that `all` also tries ways to
 * treat frames when one leaves. A spec's `none:context=off` comes first in the plan: others are measured against it too. */
rf_status sweep_plan_add_world(sweep_plan *plan, const char *spec, bool slides, rf_error *err);
/* The same for text; `all` is the built-in list for a model of one kind. */
rf_status sweep_plan_add_text(sweep_plan *plan, const char *spec, bool block_causal, rf_error *err);
/* Several specs with commas between them: "none,dual:block=8,window" (a comma whose next word is no policy belongs to values). */
rf_status sweep_plan_add_text_list(sweep_plan *plan, const char *specs, bool block_causal, rf_error *err);
/* One setting of a KV policy: `name` with what `options` say of its size. */
rf_status sweep_plan_add_kv(sweep_plan *plan, const char *name, const char *options, const struct kv_setting *kv,
                            rf_error *err);
/* The control, the same sampler with fewer steps and no cache: "25,30" or "auto" (from 5 to 80 % of num_steps). Of text num_steps are
 * passes a block. */
rf_status sweep_plan_add_steps(sweep_plan *plan, const char *text, int num_steps, rf_error *err);
/* One setting of a policy that is a copy of `fixed`, with one more option; for searches. */
rf_status sweep_plan_add_value(sweep_plan *plan, const sweep_setting *fixed, const char *option, const char *value,
                               rf_error *err);
void sweep_plan_free(sweep_plan *plan);
int sweep_plan_find(const sweep_plan *plan, const char *key); /* -1 = not in it */

/* The built-in lists, one spec after the other; NULL past the end. */
const char *sweep_builtin_spec(int index);
const char *sweep_builtin_world_spec(int index, bool slides);
const char *sweep_builtin_text_spec(int index, bool block_causal);

/* A search over one option: values from the mild end (near the uncached run) to the aggressive one. */
typedef struct {
    const char *option; /* of the policy's table */
    bool whole;         /* whole numbers */
    double mild, aggressive;
} sweep_range;
/* spec: a policy with at most one option that has a range A..B; without one the policy's main option and its built-in
 * range. fixed: the other options, to be freed with sweep_plan_free (one setting). */
rf_status sweep_plan_search(const char *spec, bool world, sweep_plan *fixed, sweep_range *range, rf_error *err);
/* The built-in range of a policy, false if it has none. */
bool sweep_main_option(const char *policy, sweep_range *out);

#endif
