/* caching/kv/book.h - inside of a book: what book.c, steps.c, ladder.c, tree.c, crush.c and joins.c share. */
#ifndef RF_CACHING_KV_BOOK_H
#define RF_CACHING_KV_BOOK_H

#include "caching/kv/kv_internal.h"

#define RF_KV_NO_LIMIT INT32_MAX

typedef struct {
    rf_kv_join *join;
    int32_t num, room;
} rf_kv_joins;

/* LaCache's constants: `kept` slots of a rung of `rung` stay. */
typedef struct {
    int32_t layers, sinks, cap; /* cap: budget + drop / 2, so that the mean is the budget */
    int32_t rung, kept, drop;   /* b, a, r = b - a */
} rf_kv_ladder;

/* How a rule's statistics go on while decoding. */
typedef enum {
    RF_KV_TRACK_NOTHING = 0, /* position alone, or a value fixed when the slot is made */
    RF_KV_TRACK_SUM,         /* score = decay * score + p (or the larger), since the slot's insertion */
    RF_KV_TRACK_WINDOW,      /* sum of p over the last `window` tokens before slots go */
    RF_KV_TRACK_NOW,         /* score = p of the newest query */
    RF_KV_TRACK_MEASURED,    /* of keys and values: taken from what was measured when slots go */
    RF_KV_TRACK_GAPS         /* stamp, gap */
} rf_kv_track;

struct rf_kv_book {
    rf_kv_rule rule;
    rf_kv_shape shape; /* tables are copies */
    float *layer_shares;
    uint8_t *head_classes, *head_list;
    int32_t created, budget; /* 0: no limit */
    rf_kv_track track;
    bool keeps_all; /* the rule drops nothing */
    bool has_count, has_gaps;
    int64_t num_rows, num_free, first_row;
    int32_t *free_rows; /* a stack: the last one goes out first */
    int num_heads;      /* L * Hkv */
    rf_kv_head *heads;
    int32_t *room;        /* [num_heads] */
    int32_t *head_budget; /* [num_heads] RF_KV_NO_LIMIT: all stay */
    int32_t *cursor;      /* [L] LADDER, TREE */
    int32_t *since;       /* [L] tokens since slots went */
    double *preference;   /* [L] CAKE */
    rf_kv_joins *joins;   /* [num_heads] */
    rf_kv_ladder ladder;
    int layers_done;
    int32_t num_prompt, seen, last_position;
    int tsp_layer;        /* the last layer that receives all tokens */
    int32_t *received;    /* [max_prompt] what later ones receive, with tsp_share */
    int32_t blocks_end;   /* tokens of the prompt that the layer at hand has seen, with block */
    int32_t num_received; /* 0: all */
    /* scratch, for n keys */
    int64_t scratch_keys;
    float *scores, *values, *work;             /* [Hkv][n], [Hkv][n], [2 Hq n] */
    int32_t *keep, *count, *stamp, *gap, *ids; /* [Hkv][n] each; ids [n] */
    uint8_t *mark;                             /* [n] */
    float *all_scores;                         /* flat-all, CAKE */
    int32_t *all_keep;
    int64_t all_room;
    rf_kv_book_info info;
};

static inline rf_kv_head *rf_kv_head_of(const rf_kv_book *book, int layer, int head) {
    return &book->heads[(int64_t)layer * book->shape.num_kv_heads + head];
}

/* book.c. Slots keep[0..count) of n, ascending, stay: the others' rows are free again. */
void rf_kv_cut(rf_kv_book *book, int layer, int head, const int32_t *keep, int32_t count);
/* The first `front` and last `back` slots stay, within the budget. */
void rf_kv_protected(const rf_kv_rule *rule, int32_t budget, int32_t *front, int32_t *back);
/* keep[budget] (all n if fewer): protected slots, then the largest scores. score is overwritten where protected. */
int32_t rf_kv_choose(int32_t *keep, float *score, int32_t n, int32_t budget, int32_t front, int32_t back);
/* Flat choice over all heads of layers from `first` on by their decision scores: budget slots a head on average, each at least
 * (int)(budget * floor). */
rf_status rf_kv_cut_flat_all(rf_kv_book *book, int first, rf_error *err);
rf_status rf_kv_scratch(rf_kv_book *book, int64_t keys, rf_error *err);
/* Slots that a head may grow by behind its budget before slots go. */
int64_t rf_kv_growth(const rf_kv_rule *rule, const rf_kv_shape *shape);

/* steps.c. Does the book score slots itself, from what it stores with them? */
bool rf_kv_scores_slots(const rf_kv_book *book);
rf_kv_track rf_kv_track_of(const rf_kv_rule *rule);
/* Statistics of the prompt's keys of each key head: values, count, stamp, gap in the scratch, [Hkv][num_tokens]. */
rf_status rf_kv_track_prompt(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err);
/* out [h->num] from what is stored with the slots, pooled; nothing is protected in it. work [h->num]. */
void rf_kv_slot_scores(const rf_kv_book *book, const rf_kv_head *h, float *out, float *work);
/* Statistics follow, slots go if it is time. The scratch has room for the layer's longest head. */
rf_status rf_kv_step_layer(rf_kv_book *book, int layer, const rf_kv_stats *stats, bool *changed, rf_error *err);

/* ladder.c */
rf_status rf_kv_ladder_setup(rf_kv_ladder *out, const rf_kv_rule *rule, int num_layers, int32_t budget, rf_error *err);
/* n slots of a layer, more than the cap: those that stay, ascending. mark [n] scratch. */
int32_t rf_kv_ladder_compact(const rf_kv_ladder *l, int layer, int32_t *cursor, int32_t n, int32_t *keep,
                             uint8_t *mark);
/* Positions 0..num_tokens - 1, fed in chunks; keep, list [num_tokens]. */
int32_t rf_kv_ladder_prompt(const rf_kv_ladder *l, int layer, int32_t *cursor, int32_t num_tokens, int32_t *keep,
                            int32_t *list, uint8_t *mark);

/* tree.c. Front, region, back of a budget. */
void rf_kv_tree_parts(const rf_kv_rule *rule, int32_t budget, int32_t *sinks, int32_t *region, int32_t *recents);
/* The slot that goes, of n > budget. mean [n]. */
int32_t rf_kv_tree_contest(const rf_kv_rule *rule, int32_t budget, int32_t *cursor, const float *mean);
int32_t rf_kv_tree_prompt(const rf_kv_rule *rule, int32_t budget, int32_t num_tokens, const float *mean, int32_t *keep,
                          float *work, int32_t *ids);

/* crush.c. score [num_heads][n]; one set for all of them. ids [n], work [2 n] scratch. */
int32_t rf_kv_crush(const rf_kv_rule *rule, const float *score, int num_heads, int32_t n, int32_t budget, int32_t front,
                    int32_t back, int32_t *keep, int32_t *ids, float *work);

/* joins.c. Of one head: n keys with ids (positions or rows), keep[0..count) stay. k, v [n][head_dim] may be NULL for MERGE_NEAR.
 * work [n]. */
rf_status rf_kv_join_dropped(rf_kv_joins *out, rf_kv_action action, int32_t n, const int32_t *ids, const int32_t *keep,
                             int32_t count, const float *k, const float *v, int32_t head_dim, float *work,
                             rf_error *err);
static inline bool rf_kv_merges(const rf_kv_rule *rule) {
    return rule->action == RF_KV_MERGE || rule->action == RF_KV_MERGE_NEAR || rule->action == RF_KV_MERGE_EMS;
}

#endif
