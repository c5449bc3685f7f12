/* core/json.h - configs and indexes: cJSON behind typed getters that say where a value is wrong.
 *
 * Reading limits, so that a hostile file costs nothing: 64 MiB of text, 64 levels of nesting, 4 million values.
 * Every pointer from a getter is borrowed until rf_json_close of its document. */
#ifndef RF_CORE_JSON_H
#define RF_CORE_JSON_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_json rf_json;     /* a document */
typedef struct cJSON rf_json_value; /* a value inside it, borrowed */

/* name stands in messages (a file name). text need not end in a zero byte. */
rf_status rf_json_parse(rf_json **out, const char *text, size_t text_bytes, const char *name, rf_error *err);
rf_status rf_json_open(rf_json **out, const char *path, rf_error *err);
void rf_json_close(rf_json *doc); /* NULL is a no-op */
const rf_json_value *rf_json_root(const rf_json *doc);
const char *rf_json_name(const rf_json *doc);

/* Members of an object. `has` is false for an absent key and for null. */
const rf_json_value *rf_json_get(const rf_json_value *object, const char *key); /* NULL if absent */
bool rf_json_has(const rf_json_value *object, const char *key);

/* Required values: RF_ERR_MISSING if absent, RF_ERR_CONFIG if of another type or outside [min, max]. */
rf_status rf_json_get_int(const rf_json *doc, const rf_json_value *object, const char *key, int64_t min, int64_t max,
                          int64_t *out, rf_error *err);
rf_status rf_json_get_double(const rf_json *doc, const rf_json_value *object, const char *key, double min, double max,
                             double *out, rf_error *err);
rf_status rf_json_get_bool(const rf_json *doc, const rf_json_value *object, const char *key, bool *out, rf_error *err);
rf_status rf_json_get_string(const rf_json *doc, const rf_json_value *object, const char *key, const char **out,
                             rf_error *err);
/* The same with a value for an absent or null key. */
rf_status rf_json_opt_int(const rf_json *doc, const rf_json_value *object, const char *key, int64_t min, int64_t max,
                          int64_t absent, int64_t *out, rf_error *err);
rf_status rf_json_opt_double(const rf_json *doc, const rf_json_value *object, const char *key, double min, double max,
                             double absent, double *out, rf_error *err);
rf_status rf_json_opt_bool(const rf_json *doc, const rf_json_value *object, const char *key, bool absent, bool *out,
                           rf_error *err);
rf_status rf_json_opt_string(const rf_json *doc, const rf_json_value *object, const char *key, const char *absent,
                             const char **out, rf_error *err);

/* Arrays and objects in file order. index outside: NULL. key (may be NULL) receives an object member's name.
 * Values are linked lists: rf_json_at costs `index` steps, so walk a long one with first and next. */
size_t rf_json_count(const rf_json_value *array_or_object);
const rf_json_value *rf_json_at(const rf_json_value *array_or_object, size_t index, const char **key);
const rf_json_value *rf_json_first(const rf_json_value *array_or_object); /* NULL if empty */
const rf_json_value *rf_json_next(const rf_json_value *member);           /* NULL after the last */
const char *rf_json_key(const rf_json_value *member);                     /* NULL for an array's members */
bool rf_json_is_object(const rf_json_value *v);
bool rf_json_is_array(const rf_json_value *v);
bool rf_json_is_string(const rf_json_value *v);
bool rf_json_is_number(const rf_json_value *v);
const char *rf_json_string(const rf_json_value *v); /* NULL if not a string */
double rf_json_number(const rf_json_value *v);      /* NaN if not a number */

#ifdef __cplusplus
}
#endif
#endif
