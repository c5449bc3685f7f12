/* caching/kv/select.h - everything stays, a step reads a few: which slots of a head, from the newest queries and the keys. Host only.
 *
 * A budget counts what a step reads for a layer and key head: the first `init` slots, the newest `local` ones (the new token among
 * them) and what is chosen between. Lists ascend; ties go to the lowest slot, unit or pair.
 *
 * Sources  vote: TokenSelect (arXiv 2411.02886), with 1 / sqrt(D) and query head h on key head h / G, where the released kernel has
 *          neither; pairs: FASA; sentences: SentenceKV (arXiv 2504.00970); pages: after IceCache, without its tree. docs/policies.md
 *          says what differs. */
#ifndef RF_CACHING_KV_SELECT_H
#define RF_CACHING_KV_SELECT_H

#include "caching/kv/kv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* SentenceKV: of a prompt, the best so many budgets of tokens of a head count for sentences and are read with them. */
#define RF_KV_SENTENCE_FACTOR 3

/* Keys of one head, turned, f32: slot j at k + rows[j] * dim. */
typedef struct {
    const float *k;
    const int32_t *rows;
    int32_t num;
    int dim;
} rf_kv_keys;

/* First and newest slots that are always read: the rule's own, or less, in proportion to init + select + local, under a smaller
 * budget; *local is at least 1. */
void rf_kv_select_ends(const rf_kv_rule *rule, int32_t budget, int32_t *init, int32_t *local);

/* out [budget]: the ends, and the best scores between. n > budget >= init + local. score [n]. Returns budget. */
int32_t rf_kv_select_best(int32_t *out, const float *score, int32_t n, int32_t budget, int32_t init, int32_t local);

/* score [n]: sum over all query heads of softmax over slots [begin, end) of scale q.k; q [heads * group][dim]; the slots outside get 0.
 * work [n]. */
void rf_kv_select_vote(float *score, const float *q, const rf_kv_keys *keys, int heads, int group, float scale,
                       int32_t begin, int32_t end, float *work);

/* score [n] of one key head: mean over its group of softmax over slots [begin, end) of scale sum over a query head's own pairs of
 * q_c k_c + q_{c + D/2} k_{c + D/2}. q [group][dim]; pairs [group][num_pairs]. work [n]. */
void rf_kv_select_pairs(float *score, const float *q, const rf_kv_keys *keys, const int32_t *pairs, int group,
                        int num_pairs, float scale, int32_t begin, int32_t end, float *work);
/* agreement [dim / 2] += part of the `count` best slots by q.k (of the first n) that are also best by that pair alone. work [2 n] words. */
void rf_kv_select_agreement(double *agreement, const float *q, const rf_kv_keys *keys, int32_t n, int32_t count,
                            float *work);
/* out [num]: pairs of most agreement, ascending; agreement [num_all]. */
void rf_kv_select_best_pairs(int32_t *out, const double *agreement, int num_all, int num);

/* Slots of one head in units (sentences, pages) with the sums of their keys. Zero-initialised. */
typedef struct {
    int32_t num_slots, slot_room, num_units, unit_room;
    int32_t open; /* the unit that grows, or -1: the next slot begins one */
    int dim;
    int32_t *unit;  /* [num_slots], -1: of none, never chosen */
    int32_t *count; /* [num_units] */
    float *sum;     /* [num_units][dim] */
} rf_kv_units;
void rf_kv_units_free(rf_kv_units *u);
void rf_kv_units_reset(rf_kv_units *u, int dim);
/* The next slot, in the open unit. counts false: it is of no unit (but it opens one). RF_ERR_MEMORY. */
rf_status rf_kv_units_add(rf_kv_units *u, const float *k, bool counts, rf_error *err);
/* All slots of a head in pages: the first slot that has none and the page - 1 nearest ones to it (least |k - k'|^2) that have none, and so
 * on. The next slot begins a page. */
rf_status rf_kv_units_page(rf_kv_units *u, const rf_kv_keys *keys, int32_t page, rf_error *err);
/* Which tokens of a prompt count for sentences: counts [Hkv][num], the best RF_KV_SENTENCE_FACTOR * budget of each key head by the
 * rule's score, or all. stats as rf_kv_book_prefill takes them, s1 NULL: all. */
rf_status rf_kv_select_counts(const rf_kv_rule *rule, const rf_kv_shape *shape, int layer, int32_t num, int32_t budget,
                              const rf_kv_stats *stats, uint8_t *counts, rf_error *err);
/* order [num_units]: by q.sum / count, the best first, units without slots last. score [2 num_units] scratch. */
void rf_kv_units_rank(int32_t *order, const rf_kv_units *u, const float *q, float *score);
/* out [budget]: the ends, and whole units: the first of each of `lists` orders [lists][num_units], then the second of each, ..., without
 * those that no longer fit. Slots of the ends cost nothing. growing: the open unit is one of them (a page), or its slots between the
 * ends wait until it is whole (a sentence). cost [num_units] scratch. Returns how many are read. */
int32_t rf_kv_select_units(int32_t *out, const rf_kv_units *u, const int32_t *order, int lists, int32_t budget,
                           int32_t init, int32_t local, bool growing, int32_t *cost);

#ifdef __cplusplus
}
#endif
#endif
