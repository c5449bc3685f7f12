/* caching/kv/demote.h - which tokens of a head stay in the model's numbers and which go to few bits (action=demote, action=share):
 * rules on the host, no model in sight. The runtime packs, and asks again while decoding.
 *
 * Tokens of a head are RAW (the model's dtype), in store HIGH, in store LOW, or GONE. Two kinds of rule:
 *   blocks   bits < 16. Packed once, in whole blocks of RF_KV_DEMOTE_BLOCK tokens (keys by channel), and nothing is dropped.
 *            score=position (KIVI): the oldest whole blocks of `residual` tokens go to HIGH. score=attention (ZipCache): of all tokens seen,
 *            high_share of them belong in HIGH and the others in LOW; of the raw ones the best and the worst go, in whole blocks,
 *            and what is between them waits.
 *   ranked   bits = 16, score=attention (MiKV, ARKV): the best stay raw, the others go to LOW token by token, and over a budget the
 *            worst of all go. Of cap = the budget (or all tokens seen) raw stay window + round(high_share * share * (cap - window)), at
 *            least 1; `share` is 1, or with alloc=cake the layer's preference over the largest of all layers.
 * Ties go to the lowest position, as everywhere. */
#ifndef RF_CACHING_KV_DEMOTE_H
#define RF_CACHING_KV_DEMOTE_H

#include "caching/kv/kv.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_KV_DEMOTE_BLOCK 32

typedef enum { RF_KV_RAW = 0, RF_KV_HIGH, RF_KV_LOW, RF_KV_GONE, RF_KV_NUM_CLASSES } rf_kv_class;

/* Does the rule pack (DEMOTE or SHARE)? Then rf_kv_book_prefill keeps nothing, and rf_kv_book_place says what is raw. */
bool rf_kv_packs(const rf_kv_rule *rule);
bool rf_kv_demotes_blocks(const rf_kv_rule *rule);
bool rf_kv_packs_under_budget(const rf_kv_rule *rule); /* ranked rules alone */
/* Of rf_kv_rule_check. RF_ERR_UNSUPPORTED, RF_ERR_ARGUMENT. */
rf_status rf_kv_demote_check(const rf_kv_rule *rule, rf_error *err);

/* The most tokens of each class that a head can have at once. */
typedef struct {
    int64_t raw, high, low;
} rf_kv_demote_room;
rf_kv_demote_room rf_kv_demote_rooms(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget);

/* Is it time, `since` tokens after the last choice (or the prompt), with `raw` raw tokens? */
bool rf_kv_demote_due(const rf_kv_rule *rule, int32_t since, int32_t raw);
/* blocks: classes next[n] of n raw tokens in order of position, of `seen` tokens in all of which `high` and `low` are packed; score [n]
 * (NULL for score=position). work [n] int32. */
void rf_kv_demote_blocks(const rf_kv_rule *rule, int32_t seen, int32_t high, int32_t low, const float *score, int32_t n,
                         uint8_t *next, int32_t *work);
/* ranked: classes now[n] and next[n] of all n tokens that a head has, in order of position; budget 0 = none. score [n] is overwritten;
 * work [2 n] of 4 bytes. */
void rf_kv_demote_ranked(const rf_kv_rule *rule, int32_t seen, int32_t budget, double share, const uint8_t *now,
                         float *score, int32_t n, uint8_t *next, void *work);
int32_t rf_kv_demote_raw(const rf_kv_rule *rule, int32_t seen, int32_t budget, double share);

/* Scores of a prompt: out [Hkv][num_tokens], scratch f32 [2 Hq num_tokens]. Sums over queries as they go on while decoding; probes
 * (reduce=visible): not yet divided by how many queries can see a key. */
rf_status rf_kv_demote_scores(const rf_kv_rule *rule, const rf_kv_shape *shape, int layer, int32_t num_tokens,
                              const rf_kv_stats *stats, float *out, float *scratch, rf_error *err);
/* CAKE's preference of a layer, alloc=cake; else 1. */
double rf_kv_demote_preference(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t num_tokens,
                               const rf_kv_stats *stats);
/* The newest query's probability for each raw slot of a key head: out [n]. */
void rf_kv_demote_probability(const rf_kv_rule *rule, const rf_kv_shape *shape, int head, int32_t n,
                              const rf_kv_stats *stats, float *out);
/* Statistics of a token after a query that gave it p. */
float rf_kv_demote_follow(const rf_kv_rule *rule, float score, float p);
/* What is compared: score over how many queries could see it (reduce=visible), or score itself. */
float rf_kv_demote_compared(const rf_kv_rule *rule, float score, int32_t seen, int32_t position);

/* share (MiniCache): layers from L / 2 on in pairs; is this one the earlier or the later of one? */
bool rf_kv_share_earlier(int num_layers, int layer);
bool rf_kv_share_later(int num_layers, int layer);
/* Flags kept[n] of tokens that stay raw: the ceil(high_share n) largest angles of keys, and those of values. work [n]. Returns how
 * many. */
int32_t rf_kv_share_kept(const rf_kv_rule *rule, const float *key_angle, const float *value_angle, int32_t n,
                         uint8_t *kept, int32_t *work);

#ifdef __cplusplus
}
#endif
#endif
