/* caching/kv/likeness.c - how much a key is like the others of its head: R-KV's redundancy (arXiv 2505.24133). */
#include <math.h>
#include <string.h>

#include "caching/kv/kv_internal.h"
#include "core/memory.h"

#define NEAR 0.5f /* of R-KV: a cosine above it is a near duplicate */

/* unit [dim][n]: keys at length 1, columns first, so that a row of cosines is sums of rows. */
static void normalise(float *unit, const float *k, int32_t n, int32_t dim) {
    for (int32_t j = 0; j < n; j++) {
        double norm = 0;
        const float *key = k + (int64_t)j * dim;
        for (int32_t c = 0; c < dim; c++) norm += (double)key[c] * (double)key[c];
        double scale = norm > 0 ? 1 / sqrt(norm) : 0;
        for (int32_t c = 0; c < dim; c++) unit[(int64_t)c * n + j] = (float)((double)key[c] * scale);
    }
}

/* Cosines of key i with all; its own, and that with its newest near duplicate, are 0. */
static void cosines(float *row, const float *unit, int32_t n, int32_t dim, int32_t i) {
    memset(row, 0, (size_t)n * sizeof *row);
    for (int32_t c = 0; c < dim; c++) {
        const float *column = unit + (int64_t)c * n;
        float own = column[i];
        for (int32_t j = 0; j < n; j++) row[j] += own * column[j];
    }
    row[i] = 0;
    for (int32_t j = n - 1; j >= 0; j--) {
        if (row[j] > NEAR) {
            row[j] = 0;
            break;
        }
    }
}

rf_status rf_kv_redundancy(float *out, const float *k, int32_t n, int32_t dim, rf_error *err) {
    float *unit = rf_alloc((size_t)n * (size_t)(dim + 1) * sizeof *unit);
    double *sum = rf_alloc_zero((size_t)n, sizeof *sum);
    if (unit == NULL || sum == NULL) {
        rf_free(unit);
        rf_free(sum);
        return rf_fail(err, RF_ERR_MEMORY, "kv scores: out of memory for the cosines of %d keys", n);
    }
    float *row = unit + (int64_t)n * dim;
    normalise(unit, k, n, dim);
    for (int32_t i = 0; i < n; i++) {
        cosines(row, unit, n, dim, i);
        for (int32_t j = 0; j < n; j++) sum[j] += (double)row[j];
    }
    double most = -HUGE_VAL, total = 0;
    for (int32_t j = 0; j < n; j++) most = fmax(most, sum[j] / n);
    for (int32_t j = 0; j < n; j++) total += sum[j] = exp(sum[j] / n - most);
    for (int32_t j = 0; j < n; j++) out[j] = (float)(sum[j] / total);
    rf_free(unit);
    rf_free(sum);
    return RF_OK;
}
