/* samples/refrain/calibrate.h - what the files of `refrain calibrate` share. */
#ifndef REFRAIN_CALIBRATE_H
#define REFRAIN_CALIBRATE_H

#include <cjson/cJSON.h>

#include "core/status.h"

/* Puts a table under its name into a JSON file, beside what is there. */
rf_status calibrate_write(const char *path, const char *name, const cJSON *table, rf_error *err);

/* Presets (caching/presets.h) from a sweep's results.json in folder `from`: for each of four qualities the fastest setting that reaches it and
 * beats fewer steps; if none does, the fastest all the same, with a warning. *chosen: how many; with one line for each to a person unless quiet. */
rf_status calibrate_presets(cJSON **table, const char *from, bool quiet, int *chosen, rf_error *err);

/* kv.json of an autoregressive model, or `output`: retrieval heads and shares of layers (dlm/kv_tables.h). */
typedef struct {
    const char *model, *device, *output; /* output: NULL = beside the model */
    int threads, num_prompts;
    bool quiet;
} calibrate_kv_args;
rf_status calibrate_kv(const calibrate_kv_args *args, rf_error *err);

#endif
