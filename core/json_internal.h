/* core/json_internal.h - the part of the JSON reader that other readers of core use. */
#ifndef RF_CORE_JSON_INTERNAL_H
#define RF_CORE_JSON_INTERNAL_H

#include "core/json.h"

/* Length of the UTF-8 sequence at p (of at most `left` bytes), 0 if it is not valid UTF-8. */
size_t rf_utf8_sequence(const char *p, size_t left);

#endif
