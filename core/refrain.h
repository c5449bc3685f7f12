/* refrain.h - the whole library in one include.
 *
 * The shape of every program: open a backend, open what is needed, and on any status but RF_OK print err.message.
 *
 *     rf_error    err = {0};
 *     rf_backend *backend = NULL;
 *     rf_weights *weights = NULL;
 *     rf_tensor   bias;
 *     rf_status   st = rf_backend_open(&backend, "auto", 0, &err);
 *     if (st == RF_OK) st = rf_weights_open(&weights, "model/transformer", &err);
 *     if (st == RF_OK) st = rf_weights_get(weights, "proj_out_1.bias", &bias, &err);
 *     if (st != RF_OK) fprintf(stderr, "%s\n", err.message);
 *     rf_weights_close(weights);
 *     rf_backend_close(backend);
 *
 * Nothing in the library prints, exits or aborts. Every open, create and load has a close, destroy or free beside it that
 * takes NULL; what a getter returns is borrowed from its object. */
#ifndef RF_CORE_REFRAIN_H
#define RF_CORE_REFRAIN_H

#include "core/arena.h"
#include "core/backend.h"
#include "core/file.h"
#include "core/image.h"
#include "core/json.h"
#include "core/log.h"
#include "core/memory.h"
#include "core/params.h"
#include "core/rng.h"
#include "core/status.h"
#include "core/text.h"
#include "core/types.h"
#include "core/weights.h"

#endif
