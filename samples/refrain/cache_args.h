/* samples/refrain/cache_args.h - the flags that choose a feature-caching policy, the same in every command that has them. */
#ifndef REFRAIN_CACHE_ARGS_H
#define REFRAIN_CACHE_ARGS_H

#include "caching/presets.h"
#include "samples/refrain/args.h"

typedef struct {
    const char *mode, *replay, *preset; /* at most one of them; NULL = not given */
    arg_list options;
    double max_drift; /* 0 = no guard */
    bool force;
} cache_args;

/* Rows of an option table; c is a cache_args *. */
#define CACHE_ARG_ROWS(c)                                                                                              \
    arg_string("cache-mode", 0, "NAME", "a policy of refrain policies (default: none)", &(c)->mode),                   \
        arg_strings("cache-option", 0, "K=V,...", "its options: refrain policies NAME", &(c)->options),                \
        arg_choice("cache-preset", 0, "slow, medium, fast, ultra, as measured", &(c)->preset, RF_PRESET_NAMES),        \
        arg_string("replay", 0, "FILE", "as a --trace recorded it, with no decisions", &(c)->replay),                  \
        arg_double("max-drift", 0, "X", "a prediction off by more: next step in full", &(c)->max_drift, 0, 1e6),       \
        arg_flag("force", 0, "use a policy that does not fit sampler or steps", &(c)->force)

/* What can be said about the flags before a model is loaded. RF_ERR_ARGUMENT, or what reading a trace gives. */
rf_status cache_args_check(const cache_args *args, rf_error *err);
/* Is some policy asked for? */
bool cache_args_wanted(const cache_args *args);
/* The policy, or *out = NULL for none. calibration and model: of the loaded model. With --cache-preset, *preset is filled. */
rf_status cache_args_policy(rf_policy **out, const cache_args *args, const rf_json_value *calibration,
                            const char *model, rf_preset *preset, rf_error *err);

/* All options as "k=v,k2=v2". portable: of files that options name only the last part of the path, for texts that should not depend
 * on the place. rf_free; NULL when memory is out. */
char *cache_options_text(const rf_policy *policy, bool portable);

/* "2.91x at PSNR 33.1 dB, SSIM 0.951 on NVIDIA H100, 50 steps, cfg 4" */
void preset_measured_text(const rf_preset_measured *m, char *text, size_t text_bytes);

#endif
