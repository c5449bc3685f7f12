/* kernels/select.h - order statistics of floats by their bits, on the CPU; kernels/select.cuh is the same on CUDA.
 * Maths    rf_float_key keeps the order of numbers; -0 is 0, NaN counts as +inf. A key is found byte by byte from the top:
 *          count the bytes of the keys that share the bytes found so far, walk the counts up to the rank. */
#ifndef RF_KERNELS_SELECT_H
#define RF_KERNELS_SELECT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t rf_float_key(float v) {
    float plain = isnan(v) ? INFINITY : v + 0.0f; /* -0 + 0 = 0 */
    uint32_t bits;
    memcpy(&bits, &plain, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static inline float rf_key_float(uint32_t key) {
    uint32_t bits = key >> 31 ? key ^ 0x80000000u : ~key;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

typedef struct {
    uint32_t key;
    int64_t rank;  /* among the values of this key */
    int64_t equal; /* how many there are */
} rf_selected;

/* The value of rank `rank` (0 = smallest) of num values, 0 <= rank < num. */
static inline rf_selected rf_select_rank(const float *values, int64_t num, int64_t rank) {
    rf_selected found = {0, rank, num};
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t hist[256] = {0};
        uint32_t mask = shift == 24 ? 0 : ~UINT32_C(0) << (shift + 8);
        for (int64_t i = 0; i < num; i++) {
            uint32_t key = rf_float_key(values[i]);
            if ((key & mask) == found.key) hist[key >> shift & 255]++;
        }
        uint32_t digit = 0;
        while (digit < 255 && found.rank >= hist[digit]) found.rank -= hist[digit++];
        found.key |= digit << shift;
        found.equal = hist[digit];
    }
    return found;
}

#endif
