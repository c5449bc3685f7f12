/* core/text.c - see text.h. */
#include "core/text.h"

#define MAX_LEN 63

static char lower(char c) {
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

int rf_text_distance(const char *a, size_t a_len, const char *b, size_t b_len) {
    int row[MAX_LEN + 1]; /* row[j]: distance of the part of a seen so far and the first j bytes of b */
    if (a_len > MAX_LEN) a_len = MAX_LEN;
    if (b_len > MAX_LEN) b_len = MAX_LEN;
    for (size_t j = 0; j <= b_len; j++) row[j] = (int)j;
    for (size_t i = 1; i <= a_len; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= b_len; j++) {
            int best = diagonal + (lower(a[i - 1]) != lower(b[j - 1]));
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[b_len];
}
