/* core/weights.h - safetensors files, single or sharded, memory-mapped and checked before anything is believed.
 *
 * Format   8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, data.
 * Checked  header length against the file and a limit of 100 MB; JSON depth; every shape product and byte count against
 *          overflow; offsets inside the data, in order, without overlap and without holes; each dtype's size against its
 *          offsets; duplicate names; in an index: every shard a plain file name, present, and holding what the index says.
 * Dtypes   F32, F16, BF16, I32, I64, U8 are read; F8_E4M3, F8_E5M2, F64 and the rest are refused by name when such a
 *          tensor is asked for, and do not stop a file from opening. */
#ifndef RF_CORE_WEIGHTS_H
#define RF_CORE_WEIGHTS_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_weights rf_weights;

/* path: a .safetensors file, an *.index.json, or a folder that holds exactly one of: an index, a single safetensors. */
rf_status rf_weights_open(rf_weights **out, const char *path, rf_error *err);
/* From memory (fuzzing, tests): the bytes are borrowed until close. */
rf_status rf_weights_open_memory(rf_weights **out, const void *bytes, size_t num_bytes, const char *name,
                                 rf_error *err);
void rf_weights_close(rf_weights *w); /* NULL is a no-op */

size_t rf_weights_count(const rf_weights *w);
const char *rf_weights_name(const rf_weights *w, size_t index); /* borrowed; in name order */
bool rf_weights_has(const rf_weights *w, const char *name);
/* Bytes of all tensors, and the dtype most of them have (RF_DTYPE_COUNT if none). */
size_t rf_weights_total_bytes(const rf_weights *w);
rf_dtype rf_weights_main_dtype(const rf_weights *w);

/* Borrowed view into the map. rank 0 stands for a scalar. RF_ERR_MISSING, RF_ERR_DTYPE, RF_ERR_SHAPE (rank > 5). */
rf_status rf_weights_get(const rf_weights *w, const char *name, rf_tensor *out, rf_error *err);
/* The same and a check of rank and shape; -1 in shape matches anything. The message prints both shapes. */
rf_status rf_weights_get_shaped(const rf_weights *w, const char *name, int rank, const int64_t *shape, rf_tensor *out,
                                rf_error *err);
/* A value of __metadata__ of the (first) file, or NULL. */
const char *rf_weights_metadata(const rf_weights *w, const char *key);

#ifdef __cplusplus
}
#endif
#endif
