/* core/text.h - words that a person typed. */
#ifndef RF_CORE_TEXT_H
#define RF_CORE_TEXT_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How many letters must be changed, added or dropped to make a of b (Levenshtein 1966), ASCII letter case aside. Of each
 * word the first 63 bytes count. Made to find what was meant by a name that does not exist. */
int rf_text_distance(const char *a, size_t a_len, const char *b, size_t b_len);

#ifdef __cplusplus
}
#endif
#endif
