/* caching/kv/kv_internal.h - what the files of caching/kv share.
 *
 *   methods.c   the table of named rules           rule.c     rules to text and back, checks, what a rule needs
 *   parts.c     pooling, top, budgets              scores.c   measurements to one score for each key head and key
 *   book.c      slots, prefill, schedule           steps.c    rules that work while decoding
 *   ladder.c, tree.c, crush.c ...                  rules that are more than a score
 *   likeness.c  redundancy of keys                 sentences.c sentences that are said again */
#ifndef RF_CACHING_KV_INTERNAL_H
#define RF_CACHING_KV_INTERNAL_H

#include "caching/kv/kv.h"

/* methods.c: fills *out by name; false: none of that name. */
bool rf_kv_method_find(rf_kv_rule *out, const char *name);
/* The plain rule: attention of the window (32), mean over its queries, group mean, uniform budget, drop at prefill, 0 sinks. */
rf_kv_rule rf_kv_rule_plain(void);

/* scores.c. out [Hkv][num_tokens]: larger stays. Protected keys (sinks, recents, window, last) are INFINITY. Everything in the
 * order query heads -> value term -> pool and group (rule->pool_after_group) -> heads. Rules whose choice is not a score (POSITION,
 * LADDER, TREE) are the book's. scratch: f32 [2 * Hq * num_tokens]. */
rf_status rf_kv_prefill_scores(const rf_kv_rule *rule, const rf_kv_shape *shape, int layer, int32_t num_tokens,
                               int32_t budget, const rf_kv_stats *stats, float *out, float *scratch, rf_error *err);
/* Threads for a loop over `units` of so many numbers in all. */
int rf_kv_threads(const rf_kv_stats *stats, int units, int64_t work);
/* CAKE's preference of a layer: entropy^(1/tau1) * variance^(1/tau2). */
double rf_kv_preference(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t num_tokens, const rf_kv_stats *stats);
/* Probability of the newest query for each slot of key head h: by rule->group over the group, as a query of a prompt counts
 * (NONE: mean), or the mean of all query heads of the layer (heads=mean; then slots of all heads are the same). out [n]. With
 * a value term of RF_KV_VALUE_OBC_*, REMOVAL or CAOTE: that. */
void rf_kv_step_probability(const rf_kv_rule *rule, const rf_kv_shape *shape, int head, int32_t n,
                            const rf_kv_stats *stats, float *out);
/* likeness.c. out [n] sums to 1: softmax over keys of the mean over all keys i of cos(k_i, k_j), where that of i = j and that of i with
 * its newest near duplicate (cosine above 0.5) count 0. k [n][dim]. */
rf_status rf_kv_redundancy(float *out, const float *k, int32_t n, int32_t dim, rf_error *err);
/* U(0,1), the same for the same (seed, layer, head, position) on every machine. */
float rf_kv_uniform(uint64_t seed, int layer, int head, int32_t position);

/* How many of a budget are protected at the newest end and in front, for n keys: recents -1 resolved. */
int32_t rf_kv_num_recents(const rf_kv_rule *rule, int32_t budget);

#endif
