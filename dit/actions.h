/* dit/actions.h - what a user says the walker does, as rows of numbers.
 *
 * Three forms:
 *   text   "forward*20,right*8,none,left+forward*4,cameraX=-0.5": names of the model, =value where an action is a number and not
 *          1, joined by + where several act at once, * a count
 *   JSON   a file (.json): an array whose elements are a name, {"name": value, ...}, an array of action_dim numbers, or
 *          {"action": name | {...} | [...], "repeat": n}; or {"actions": [that array]}
 *   CSV    a file (.csv): the first line names the columns (action names), every further line is one frame; missing columns are 0
 * "none" and "noop" stand for each other; for a model that names neither they are a row of zeros.
 * Limits: 16 MiB a file, RF_MAX_ACTIONS rows, JSON depth of core/json.h. Numbers must be finite. */
#ifndef RF_DIT_ACTIONS_H
#define RF_DIT_ACTIONS_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_MAX_ACTIONS 1000000

typedef struct {
    int dim;                  /* length of a row */
    const char *const *names; /* [dim]; an entry may be NULL */
} rf_action_names;

/* *out [*num][dim] f32, rf_free. text that ends in .json or .csv is a path. An unknown name suggests the nearest one and says where it
 * stands. What is wrong with a list is RF_ERR_ARGUMENT where it is text and RF_ERR_FORMAT where it is a file. */
rf_status rf_actions_parse(float **out, int *num, const char *text, const rf_action_names *names, rf_error *err);
/* The three forms from memory, for fuzzing: path's ending picks the form; name stands in messages. */
rf_status rf_actions_parse_memory(float **out, int *num, const char *bytes, size_t num_bytes, const char *name,
                                  const rf_action_names *names, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
