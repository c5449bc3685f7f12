/* caching/allocate.c - the allocator of DiffSparse (arXiv 2604.03674, section on its dynamic program).
 *
 *   F(0, r) = 0;  F(j, r) = min over levels v with weight(v) <= r of F(j-1, r - weight(v)) + cost(j, v)
 * F(j, r) is the least cost of the first j items within r; the paper's form spends r exactly, which cannot be better
 * and which a table whose costs rise with the level would make worse. One row of F is kept; which level won is kept
 * for every (j, r) and followed back from F(items, budget). Ties go to the higher level: `<=` while levels rise. */
#include "caching/allocate.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"

#define NOTHING 255 /* no level is allowed */

static rf_status check(const double *costs, int64_t num_items, const int *weights, int num_levels, int64_t budget,
                       rf_error *err) {
    if (num_levels < 1 || num_levels > RF_ALLOCATE_MAX_LEVELS || num_items < 0 || budget < 0) {
        return rf_fail(err, RF_ERR_ARGUMENT, "allocate: %lld items, %d levels (1..%d), budget %lld",
                       (long long)num_items, num_levels, RF_ALLOCATE_MAX_LEVELS, (long long)budget);
    }
    for (int v = 0; v < num_levels; v++) {
        if (weights[v] < 0) return rf_fail(err, RF_ERR_ARGUMENT, "allocate: level %d weighs %d", v, weights[v]);
    }
    for (int64_t i = 0; i < num_items; i++) {
        for (int v = 0; v < num_levels; v++) {
            double cost = costs[i * num_levels + v];
            if (!isnan(cost) && cost != -INFINITY) continue;
            return rf_fail(err, RF_ERR_CONFIG, "allocate: item %lld has cost %g at level %d", (long long)i, cost, v);
        }
    }
    return RF_OK;
}

/* One item more, in place: best is F(j-1, .) before and F(j, .) after. r falls, so that best[r - weight] is still
 * F(j-1), and at weight 0 best[r] is read before it is written. */
static void extend(double *best, uint8_t *won, const double *cost, const int *weights, int num_levels, int64_t budget) {
    for (int64_t r = budget; r >= 0; r--) {
        double least = INFINITY;
        won[r] = NOTHING;
        for (int v = 0; v < num_levels; v++) {
            if (weights[v] > r) continue;
            double sum = best[r - weights[v]] + cost[v];
            if (sum == INFINITY || sum > least) continue;
            least = sum;
            won[r] = (uint8_t)v;
        }
        best[r] = least;
    }
}

rf_status rf_allocate(uint8_t *choice, const double *costs, int64_t num_items, const int *weights, int num_levels,
                      int64_t budget, double *total, rf_error *err) {
    rf_status st = check(costs, num_items, weights, num_levels, budget, err);
    if (st != RF_OK) return st;
    int heaviest = 0;
    for (int v = 0; v < num_levels; v++) heaviest = weights[v] > heaviest ? weights[v] : heaviest;
    int64_t most = 0; /* that can be spent at all */
    if (__builtin_mul_overflow(num_items, (int64_t)heaviest, &most) || most > budget) most = budget;
    int64_t states = 0;
    if (most == INT64_MAX || __builtin_mul_overflow(num_items, most + 1, &states) || states > RF_ALLOCATE_MAX_BYTES ||
        most > RF_ALLOCATE_MAX_BYTES / 8) {
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "allocate: %lld items with a budget of %lld are too many states (at most %lld)",
                       (long long)num_items, (long long)budget, (long long)RF_ALLOCATE_MAX_BYTES);
    }
    double *best = rf_alloc_zero((size_t)most + 1, sizeof *best);
    uint8_t *won = rf_alloc((size_t)states);
    if (!best || !won) {
        rf_free(best);
        rf_free(won);
        return rf_fail(err, RF_ERR_MEMORY, "allocate: no memory for %lld states", (long long)states);
    }
    for (int64_t i = 0; i < num_items; i++) {
        extend(best, won + i * (most + 1), costs + i * num_levels, weights, num_levels, most);
    }
    if (best[most] == INFINITY) {
        st = rf_fail(err, RF_ERR_CONFIG, "allocate: no choice of allowed levels stays within the budget of %lld",
                     (long long)budget);
    } else {
        if (total) *total = best[most];
        for (int64_t i = num_items - 1, r = most; i >= 0; i--) {
            choice[i] = won[i * (most + 1) + r];
            r -= weights[choice[i]];
        }
    }
    rf_free(best);
    rf_free(won);
    return st;
}
