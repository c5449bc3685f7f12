/* kernels/cache_checks.h - argument checks of curvature, token_select and row_score (kernels/cache.h), defined beside their
 * CPU versions. The rules of kernels/checks.h: _check reads no pointer, _check_run also asks for every pointer. */
#ifndef RF_KERNELS_CACHE_CHECKS_H
#define RF_KERNELS_CACHE_CHECKS_H

#include <math.h>

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

rf_status rf_curvature_check(const rf_curvature_args *args, rf_error *err);
rf_status rf_curvature_check_run(const rf_curvature_args *args, rf_error *err);
rf_status rf_token_select_check(const rf_token_select_args *args, rf_error *err);
rf_status rf_token_select_check_run(const rf_token_select_args *args, rf_error *err);
rf_status rf_row_score_check(const rf_row_score_args *args, rf_error *err);
rf_status rf_row_score_check_run(const rf_row_score_args *args, rf_error *err);

/* RF_ERR_SHAPE, RF_ERR_ARGUMENT: each names the field. */
static inline rf_status rf_check_size(const char *op, const char *field, int64_t value, int64_t min, int64_t max,
                                      rf_error *err) {
    if (value >= min && value <= max) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s is %lld, must be %lld..%lld", op, field, (long long)value, (long long)min,
                   (long long)max);
}

static inline rf_status rf_check_value(const char *op, const char *field, float value, float min, float max,
                                       rf_error *err) {
    if (isfinite(value) && value >= min && value <= max) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is %g, must be a number in %g..%g", op, field, (double)value,
                   (double)min, (double)max);
}

static inline rf_status rf_check_pointer(const char *op, const char *field, const void *p, rf_error *err) {
    return p ? RF_OK : rf_fail(err, RF_ERR_ARGUMENT, "%s: %s is NULL", op, field);
}

/* The product of sizes that are not negative stays in 0..INT32_MAX: it is counted in 32 bits. */
static inline rf_status rf_check_count(const char *op, const char *what, int64_t a, int64_t b, int64_t c,
                                       rf_error *err) {
    int64_t product;
    if (!__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
        product <= INT32_MAX)
        return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "%s: %s has more than %d elements", op, what, INT32_MAX);
}

#ifdef __cplusplus
}
#endif
#endif
