/* caching/allocate.h - spends a budget over many items, each at one of a few levels, at the least sum of costs. */
#ifndef RF_CACHING_ALLOCATE_H
#define RF_CACHING_ALLOCATE_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_ALLOCATE_MAX_LEVELS 64

/* Chooses choice[i] (of 0..num_levels-1) for every item so that sum weights[choice[i]] <= budget and sum
 * costs[i][choice[i]] is least.
 *   costs    [num_items][num_levels], infinity = not allowed; NaN is refused
 *   weights  [num_levels], not negative
 *   total    the sum of costs, may be NULL
 * Of equal sums the one is taken whose last item has the highest level, then the last but one, and so on. Exact:
 * dynamic programming over (items, budget spent), num_items * budget * num_levels steps and one byte a state (at most
 * RF_ALLOCATE_MAX_BYTES, else RF_ERR_UNSUPPORTED). Nothing allowed within the budget: RF_ERR_CONFIG. */
#define RF_ALLOCATE_MAX_BYTES ((int64_t)512 << 20)
rf_status rf_allocate(uint8_t *choice, const double *costs, int64_t num_items, const int *weights, int num_levels,
                      int64_t budget, double *total, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
