/* samples/refrain/info_world.h - `refrain info` of a world model, from its config and the headers of its weights. */
#ifndef REFRAIN_INFO_WORLD_H
#define REFRAIN_INFO_WORLD_H

#include <cjson/cJSON.h>

#include "core/weights.h"

/* A weights file or folder in numbers. */
typedef struct {
    size_t num_tensors, bytes;
    int64_t num_params;         /* floating-point elements */
    int64_t num_decoder_params; /* those of a VAE's decoder half */
    const char *dtype;          /* of most tensors */
} weights_summary;
/* Tensors of a dtype that cannot be read are counted in bytes only. */
weights_summary weights_summarize(const rf_weights *weights);
cJSON *weights_summary_json(const weights_summary *summary);

rf_status info_world(const char *dir, bool json, rf_error *err);

#endif
