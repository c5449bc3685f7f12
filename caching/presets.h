/* caching/presets.h - named settings of a model: a policy with options, and what it was measured at when it was chosen.
 *
 * In a model's cache.json:
 *   "presets": {"fast": {"mode": "worldcache", "options": "k=v,...",
 *     "measured": [{"device": "...", "steps": 50, "cfg": 4, "speedup": 2.9, "psnr_db": 33.1, "ssim": 0.95, "command": "..."}]}}
 * options and measured may be absent; in a measurement device, steps and speedup must be there, psnr_db null means pictures
 * equal to the uncached ones. The file comes with a model, so it is no more trusted than the model: everything is checked, and a
 * preset cannot be `replay`, which would open a file of the model's choice. */
#ifndef RF_CACHING_PRESETS_H
#define RF_CACHING_PRESETS_H

#include "caching/policy.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_PRESET_NAMES        "slow medium fast ultra" /* from the nearest to the uncached pictures to the fastest */
#define RF_PRESET_COUNT        4
#define RF_PRESET_MAX_MEASURED 32

typedef struct {
    const char *device, *command; /* command: "" if the file has none */
    int num_steps;
    double cfg_scale; /* NaN = not said */
    double speedup;   /* of the denoising loop */
    double psnr_db;   /* infinity = equal pictures; NaN = not said */
    double ssim;      /* NaN = not said */
} rf_preset_measured;

/* Strings are borrowed from the document. */
typedef struct {
    const char *name, *mode, *options;
    int num_measured;
    rf_preset_measured measured[RF_PRESET_MAX_MEASURED];
} rf_preset;

/* "slow", ...; NULL outside 0 .. RF_PRESET_COUNT - 1. */
const char *rf_preset_name(int index);

/* calibration: the root of cache.json, or NULL where the model has none. model stands in messages. RF_ERR_ARGUMENT: no such
 * preset, with those that there are; RF_ERR_CONFIG, RF_ERR_MISSING: the file is wrong, with the place. */
rf_status rf_preset_find(rf_preset *out, const rf_json_value *calibration, const char *model, const char *name,
                         rf_error *err);
bool rf_preset_exists(const rf_json_value *calibration, const char *name);

/* The policy that a preset stands for. What is wrong with it is the file's fault: RF_ERR_CONFIG. */
rf_status rf_preset_policy(rf_policy **out, const rf_preset *preset, const char *model, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
