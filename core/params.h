/* core/params.h - a model's weights on a device: one owner, freed together.
 *
 * Loading goes file -> host f32 -> (a layout change by the caller) -> device dtype, one tensor at a time, so that every
 * family and every file layout can use the same two calls. Memory is taken from the backend in slabs. */
#ifndef RF_CORE_PARAMS_H
#define RF_CORE_PARAMS_H

#include "core/backend.h"
#include "core/weights.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_params rf_params;

rf_status rf_params_create(rf_params **out, rf_backend *backend, rf_error *err);
void rf_params_destroy(rf_params *params); /* NULL is a no-op; frees every tensor */

/* Device memory for num elements of dtype, contents undefined. Owned by params. */
rf_status rf_params_take(rf_params *params, void **out, rf_dtype dtype, size_t num, rf_error *err);
/* The same, filled with num host floats rounded to dtype. Blocking. */
rf_status rf_params_put(rf_params *params, void **out, rf_dtype dtype, const float *host, size_t num, rf_error *err);
/* Overwrites a buffer of params from host floats. Blocking. */
rf_status rf_params_write(rf_params *params, void *device, rf_dtype dtype, const float *host, size_t num,
                          rf_error *err);

size_t rf_params_bytes(const rf_params *params);        /* device bytes held */
size_t rf_params_tensor_bytes(const rf_params *params); /* bytes of the tensors themselves, without slab ends */
int64_t rf_params_num_elems(const rf_params *params);   /* elements handed out */

/* Reads a tensor of the file as host floats (rf_free). Shape is checked; -1 matches anything. */
rf_status rf_weights_read_f32(const rf_weights *w, const char *name, int rank, const int64_t *shape, float **out,
                              rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
