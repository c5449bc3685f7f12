/* caching/kv/kv.h - which keys and values of the past an autoregressive model keeps under a budget: rules on the host, no model
 * in sight.
 *
 * A rule is a record of independent parts: scorer x aggregators x budget allocator x action x schedule x protection x position.
 * A method is a named rule (rf_kv_methods); `score=obcache,alloc=cake` changes parts of one. The book applies a rule to one
 * sequence: it holds, for each layer and key head, the slots that are kept (a page table with pages of one row: slot -> row of a
 * pool that all layers share) and the statistics that follow them, takes what layers measured, and says what stays. Keys and
 * values are the runtime's (dlm/kv_session.h), which moves data as the book says.
 *
 * Symbols   L layers, Hq query heads, Hkv key heads, G = Hq / Hkv; query head h uses key head h / G. T keys of a prompt, W rows
 *           of the observation window (the last ones), B budget in tokens for a layer and key head, sinks, recents and window
 *           included. p_ij = exp(z_ij - lse_i), z = scale q.k with causal mask.
 * Ties      the lowest index first, everywhere.
 * Order     slots of a head stand in order of position.
 * Sources   docs/policies.md, and each method's line in methods.c. */
#ifndef RF_CACHING_KV_H
#define RF_CACHING_KV_H

#include "caching/policy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- the rule ------------------------------------------------------------------------------------------------------------ */

typedef enum {
    RF_KV_SCORE_NONE = 0,   /* everything is kept: no policy */
    RF_KV_SCORE_POSITION,   /* sinks and recents (StreamingLLM) */
    RF_KV_SCORE_LADDER,     /* LaCache */
    RF_KV_SCORE_RANDOM,     /* U(0,1) of (seed, layer, head, position) */
    RF_KV_SCORE_ATTENTION,  /* probabilities that keys received, of `queries`, by `reduce` */
    RF_KV_SCORE_KNORM,      /* -|k| */
    RF_KV_SCORE_KEYDIFF,    /* -cos(k, mean of k / |k|) */
    RF_KV_SCORE_EXPECTED,   /* Gaussian future queries (Expected Attention) */
    RF_KV_SCORE_GATE,       /* age x log retention, learned (TRIM-KV) */
    RF_KV_SCORE_RECURRENCE, /* last activation and longest gap (LazyEviction) */
    RF_KV_SCORE_TREE,       /* cyclic contest of neighbours (TreeKV), running mean of attention */
    RF_KV_SCORE_COUNT
} rf_kv_score;

typedef enum {                        /* whose attention, of RF_KV_SCORE_ATTENTION */
               RF_KV_QUERIES_ALL = 0, /* every query so far */
               RF_KV_QUERIES_WINDOW,  /* the last `window` of the prompt */
               RF_KV_QUERIES_LAST,    /* one */
               RF_KV_QUERIES_DRAFTED, /* `drafts` tokens decoded on a compressed copy, and with_window the last `drafts` of the prompt (LAQ, LAQ++) */
               RF_KV_QUERIES_PSEUDO, /* `pseudo` tokens after the prompt, thrown away (DapQ) */
               RF_KV_QUERIES_PROBES, /* the last probe_recent and a random probe_random part of the prompt (ZipCache) */
               RF_KV_QUERIES_EXTERNAL, /* a prompt of its own behind each block, thrown away (EpiCache) */
               RF_KV_QUERIES_COUNT
} rf_kv_queries;

typedef enum { /* over those queries */
               RF_KV_REDUCE_SUM = 0,
               RF_KV_REDUCE_MEAN,
               RF_KV_REDUCE_DECAY, /* sum alpha^age */
               RF_KV_REDUCE_MAX,
               RF_KV_REDUCE_MEANVAR, /* mean + gamma * variance (divisor W - 1) */
               RF_KV_REDUCE_VISIBLE, /* sum / (T - j): number of queries that can see the key */
               RF_KV_REDUCE_COUNT
} rf_kv_reduce;

typedef enum {
    RF_KV_POOL_NONE = 0,
    RF_KV_POOL_AVG,
    RF_KV_POOL_MAX
} rf_kv_pool; /* stride 1, padding k / 2; avg divides by k */
typedef enum { RF_KV_OVER_NONE = 0, RF_KV_OVER_MEAN, RF_KV_OVER_SUM, RF_KV_OVER_MAX } rf_kv_over;
typedef enum { /* over the heads of a layer, after the group: NONE each key head for itself */
               RF_KV_HEADS_NONE = 0,
               RF_KV_HEADS_MEAN, /* one set for the layer: mean over all query heads (TOVA) */
               RF_KV_HEADS_LIST  /* mean over listed query heads (CompressKV; the list is calibrated) */
} rf_kv_heads;
typedef enum { /* what values add; on the score of each query head before the group is reduced, unless said otherwise */
               RF_KV_VALUE_NONE = 0,
               RF_KV_VALUE_NORM,      /* x |v| (after the group) */
               RF_KV_VALUE_WO,        /* (s + 1e-4) x |W_O v|_1 for the second half of the budget (CriticalKV) */
               RF_KV_VALUE_CAOTE,     /* h / (1 - h) |o' - v|, h = s / sum s, o' = sum h v */
               RF_KV_VALUE_FASTCAOTE, /* o' = mean v */
               RF_KV_VALUE_OBC_VALUE, /* OBCache: replaces the score: sum p^2 |v|^2 */
               RF_KV_VALUE_OBC_KEY,   /* sum (p z)^2 |v - o|^2 */
               RF_KV_VALUE_OBC_JOINT, /* sum |p v + p z (v - o)|^2 */
               RF_KV_VALUE_REMOVAL,   /* sum (p / (1 - p))^2 |v - o|^2: the exact squared change of the output */
               RF_KV_VALUE_COUNT
} rf_kv_value;

typedef enum {
    RF_KV_ALLOC_UNIFORM = 0,
    RF_KV_ALLOC_PYRAMID,    /* arithmetic series over layers, beta */
    RF_KV_ALLOC_CAKE,       /* by entropy and variance of the window's attention, tau1, tau2; cascaded */
    RF_KV_ALLOC_TABLE,      /* calibrated shares of layers */
    RF_KV_ALLOC_FLAT_HEADS, /* top of all heads of a layer, floor alpha (Ada-KV) */
    RF_KV_ALLOC_FLAT_ALL,   /* top of all layers and heads, floor */
    RF_KV_ALLOC_CLASS,      /* calibrated retrieval heads keep all, the others sinks and recents (RazorAttention) */
    RF_KV_ALLOC_COUNT
} rf_kv_alloc;

typedef enum {
    RF_KV_DROP = 0,
    RF_KV_MERGE, /* a dropped token joins the kept one of the nearest key: values averaged with weights (kvpress) */
    RF_KV_MERGE_NEAR, /* the kept one of the nearest index: keys and values averaged (Elastic Cache) */
    RF_KV_MERGE_EMS,  /* the most similar class centre by cos(k) cos(v), a zero class drops (EMS) */
    RF_KV_COMPENSATE, /* mean key and value of all dropped ones, counted so many times (RazorAttention) */
    RF_KV_DEMOTE,     /* fewer bits (KIVI, ZipCache, MiKV, ARKV) */
    RF_KV_SELECT,     /* all stay; few are read (TokenSelect, FASA, SentenceKV, IceCache) */
    RF_KV_SHARE,      /* between neighbouring layers (MiniCache) */
    RF_KV_ACTION_COUNT
} rf_kv_action;

typedef enum {
    RF_KV_AT_PREFILL = 0, /* once, behind the prompt; what is generated afterwards stays */
    RF_KV_AT_STEP,        /* behind the prompt and whenever a head is over its budget */
    RF_KV_AT_EVERY,       /* behind the prompt and after every `every` generated tokens, down to the budget */
    RF_KV_AT_HIGH         /* when a head reaches budget + buffer, down to the budget */
} rf_kv_schedule;
typedef enum {                     /* of RF_KV_SELECT: how what is read is found (caching/kv/select.h) */
               RF_KV_BY_VOTE = 0,  /* one list a layer: heads' probabilities over candidates, summed (TokenSelect) */
               RF_KV_BY_PAIRS,     /* logits of a head's best rotary pairs (FASA) */
               RF_KV_BY_SENTENCES, /* whole sentences by their mean key (SentenceKV) */
               RF_KV_BY_PAGES      /* whole pages of near keys by their mean key (after IceCache) */
} rf_kv_selector;
#define RF_KV_DELIMITERS 4
typedef enum { RF_KV_POSITION_ORIGINAL = 0, RF_KV_POSITION_CACHE, RF_KV_POSITION_DELTA } rf_kv_position;

typedef struct {
    char method[32]; /* the name it came from */
    rf_kv_score score;
    rf_kv_queries queries;
    rf_kv_reduce reduce;
    rf_kv_pool pool;
    int32_t pool_size;
    bool pool_after_group; /* Ada-KV: group, then pool; else pool on query heads, then group */
    rf_kv_over group;
    rf_kv_heads heads;
    rf_kv_value value;
    rf_kv_alloc alloc;
    rf_kv_action action;
    rf_kv_schedule schedule;
    rf_kv_position position;
    /* protection: all count against the budget */
    int32_t sinks, recents; /* recents -1: half of what is left of the budget (H2O) */
    int32_t window;         /* rows; queries=window: protected too unless open_window */
    bool open_window;
    bool last;           /* the newest token */
    int32_t block;       /* EpiCache, KeyDiff: tokens of a prompt between two choices; 0: one choice behind all */
    int32_t tsp_layer;   /* FastKV: behind this layer fewer tokens go on; -1: half of the layers less one */
    double tsp_share;    /* so many of the prompt, and the window; 0 and 1: all */
    int32_t skip_layers; /* so many first layers keep everything (Knorm in one release) or a uniform budget (alloc) */

    double alpha, gamma, tau1, tau2, floor; /* decay; CAKE's; Ada-KV's share of a uniform budget */
    int32_t beta;                           /* pyramid */
    int32_t every, buffer;
    int32_t drafts, pseudo;
    bool with_window;
    double probe_recent, probe_random;
    double activation; /* LazyEviction: p that counts as an activation */
    int32_t ladder_span, ladder_overlap;
    int32_t future;            /* Expected Attention: positions ahead */
    int32_t page;              /* KVCrush, IceCache */
    double crush_share;        /* KVCrush's part of the evictable budget; 0 = off */
    double sentence_penalty;   /* SkipKV: of tokens whose sentence is said again, x the cosine; 0 = off */
    double sentence_threshold; /* SkipKV: the cosine from which on it is */
    double redundancy;         /* SkipKV: sigma: sigma x attention - (1 - sigma) x redundancy of keys; 0 = off */
    int32_t bits, low_bits, group_size, residual; /* DEMOTE */
    double high_share; /* DEMOTE: part at `bits`, the rest at low_bits; SHARE: part unmerged */
    bool fp8;          /* DEMOTE: what is packed at low_bits=8 is e4m3 */
    rf_kv_selector selector;
    int32_t select, init,
        local;           /* SELECT: read so many, and always the first and last; under a budget: in proportion */
    int32_t select_dims; /* FASA */
    int32_t delimiters[RF_KV_DELIMITERS]; /* SentenceKV, SkipKV: ids of tokens that end a sentence, -1 none */
    uint64_t seed;
} rf_kv_rule;

/* One line for users: "snapkv" and a description. */
typedef struct {
    const char *name, *about, *source;
} rf_kv_method;
int rf_kv_num_methods(void);
const rf_kv_method *rf_kv_method_at(int index);

/* "snapkv", "snapkv:window=16,pool=avg", or parts alone "score=attention,queries=window,alloc=cake" (then from the plain rule:
 * attention of the window, mean, uniform, drop, prefill). "none" is a rule that keeps everything. Unknown names: RF_ERR_ARGUMENT
 * with near ones; parts that do not go together: RF_ERR_UNSUPPORTED, one line. */
rf_status rf_kv_rule_parse(rf_kv_rule *out, const char *spec, rf_error *err);
rf_status rf_kv_rule_set(rf_kv_rule *rule, const char *key, const char *value, rf_error *err);
rf_status rf_kv_rule_check(const rf_kv_rule *rule, rf_error *err);
/* Every field that differs from the plain rule, as rf_kv_rule_parse takes them. Returns the length needed, as snprintf. */
size_t rf_kv_rule_describe(const rf_kv_rule *rule, char *text, size_t text_bytes);
/* Do some layers receive a part of a prompt alone (tsp_share)? */
bool rf_kv_rule_thins(const rf_kv_rule *rule);
/* The keys that rf_kv_rule_set takes, with types, defaults and help: for `refrain policies`. */
int rf_kv_num_keys(void);
const rf_policy_option *rf_kv_key_at(int index);

/* --- what layers measure ------------------------------------------------------------------------------------------------- */

enum {
    RF_KV_NEED_SUM = 1,     /* s1 */
    RF_KV_NEED_SQUARES = 2, /* s2 */
    RF_KV_NEED_PEAK = 4,
    RF_KV_NEED_ENTROPY = 8,
    RF_KV_NEED_KEY_NORM = 16,
    RF_KV_NEED_VALUE_NORM = 32,
    RF_KV_NEED_KEY_COSINE = 64,
    RF_KV_NEED_REMOVAL = 128, /* by rule->value */
    RF_KV_NEED_KV = 256, /* k and v themselves on the host (CAOTE over any base, redundancy, merging, recurrences) */
    RF_KV_NEED_EXPECTED = 512,
    RF_KV_NEED_WO = 1024,
    RF_KV_NEED_GATE = 2048,
    RF_KV_NEED_HIDDEN = 4096 /* penalty: sentences by the last layer's hidden states (caching/kv/sentences.h) */
};
unsigned rf_kv_needs_prefill(const rf_kv_rule *rule);
unsigned rf_kv_needs_step(const rf_kv_rule *rule); /* 0: nothing is measured while decoding */

/* Host f32, NULL where not needed. Query heads' arrays [Hq][stride], key heads' [Hkv][stride]. At prefill key j is position j of
 * the prompt, for every head; at a step key j of head h is slot j of that head. Weighted sums are over the rule's queries:
 * DECAY with alpha^(age of the query). */
typedef struct {
    int32_t num_keys; /* prefill: T; a step: the most slots of a head */
    int64_t stride;
    int32_t num_queries;         /* that were measured: W (shorter prompts: T) */
    const float *s1, *s2, *peak; /* sum, sum of squares, most of p */
    const float *entropy;        /* [Hq] -sum over queries and columns before the window of p ln p */
    const float *removal;
    const float *wo_norm;  /* |W_O^h v|_1 */
    const float *expected; /* logits */
    const float *key_norm, *value_norm, *key_cosine, *gate;
    const float *k, *v; /* [Hkv][stride][D] */
    int32_t head_dim;
    const float *penalty; /* [num_positions] by true position, 0 behind it: sentences that are said again */
    int32_t num_positions;
    int num_threads; /* that a book may use on a prompt's layer, 0 = 1: the same choice with any number */
} rf_kv_stats;

/* --- the book ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    int32_t num_layers, num_q_heads, num_kv_heads, head_dim;
    int32_t max_prompt, max_new;
    /* calibrated tables, or NULL: [L] shares of layers; [L][Hq] flags of retrieval heads (alloc=class) and of the heads that score a
     * layer (heads=list; at least one a layer) */
    const float *layer_shares;
    const uint8_t *head_classes, *head_list;
} rf_kv_shape;

typedef struct {
    int32_t num;       /* slots in use */
    int32_t *row;      /* [.] of the pool */
    int32_t *position; /* [.] ascending */
    float *score;      /* accumulator (sum, decayed sum, mean's sum, stored CAKE score) */
    int32_t *count, *stamp,
        *gap; /* queries since insertion, last activation, longest gap; NULL where the rule has no use */
} rf_kv_head;

/* Joins that the runtime must make before it reads: value (and key) of `to` += weight x that of `from`, then / (1 + sum of weights).
 * prefill: positions of the prompt; a step: rows of the pool. */
typedef struct {
    int32_t from, to;
    float weight;
    bool keys; /* too */
} rf_kv_join;

typedef struct rf_kv_book rf_kv_book;

/* Rows that the pool must have for the worst case of a budget; all sequences are alike. budget 0 = no limit. */
int64_t rf_kv_pool_rows(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget);
/* rule is copied. first_row: rows first_row..first_row + rf_kv_pool_rows - 1 of the pool are this sequence's. */
rf_status rf_kv_book_create(rf_kv_book **out, const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget,
                            int64_t first_row, rf_error *err);
void rf_kv_book_destroy(rf_kv_book *book);
/* An empty cache. budget <= the one of create. */
rf_status rf_kv_book_reset(rf_kv_book *book, int32_t budget, rf_error *err);

/* Layers in order, after each one's attention over a prompt of num_tokens (positions 0..): what stays gets rows. A cascading rule
 * shrinks earlier layers too; one that decides over all layers keeps everything until the last one (pool: rf_kv_pool_rows counts
 * it). Afterwards head(layer, h)->position says what to copy where (->row), joins what to join before. stats may be NULL if
 * nothing is needed. num_tokens: of a layer that receives fewer tokens (rf_kv_book_received) so many; its statistics are then of those, in
 * order, and positions of slots remain those of the prompt. */
rf_status rf_kv_book_prefill(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err);
/* rule.block: positions begin..begin + num - 1 of a prompt of num_tokens join a layer's slots, which all heads have as many of, and what is
 * over the budget goes, by statistics of the slots in order (NULL where nothing can go): stats->num_keys = slots of a head, num among
 * them. Layers in order, a layer's blocks in order. Slots have rows at once. For a prompt within the budget: rf_kv_book_prefill. */
rf_status rf_kv_book_prefill_block(rf_kv_book *book, int layer, int32_t begin, int32_t num, int32_t num_tokens,
                                   const rf_kv_stats *stats, rf_error *err);
/* Positions, ascending, of the tokens of the prompt that a layer receives: known behind the layer before. NULL: all. */
const int32_t *rf_kv_book_received(const rf_kv_book *book, int layer, int32_t *num);
/* The next token's slot in every layer and head: appended at its end. RF_ERR_STATE: pool exhausted. */
rf_status rf_kv_book_append(rf_kv_book *book, int32_t position, rf_error *err);
/* Of rf_kv_needs_step, what this layer's next step reads: a rule that waits for its turn may want nothing yet. */
unsigned rf_kv_book_step_needs(const rf_kv_book *book, int layer);
/* After a layer's attention of a generated token: statistics follow, and what is over the budget goes if the schedule says now.
 * *changed: slots were dropped. */
rf_status rf_kv_book_step(rf_kv_book *book, int layer, const rf_kv_stats *stats, bool *changed, rf_error *err);

const rf_kv_head *rf_kv_book_head(const rf_kv_book *book, int layer, int head);
int32_t rf_kv_book_most(const rf_kv_book *book, int layer); /* slots of the longest head */
const rf_kv_join *rf_kv_book_joins(const rf_kv_book *book, int layer, int head, int32_t *num);
/* Rules that pack (caching/kv/demote.h): a prompt keeps nothing by itself. Positions [Hkv][stride], counts [Hkv], ascending, of a layer
 * whose prompt is in: they become its slots, with rows. */
rf_status rf_kv_book_place(rf_kv_book *book, int layer, const int32_t *positions, const int32_t *counts, int64_t stride,
                           rf_error *err);
/* Slots keep[0..count) of a head stay; the rows of the others are free. Not counted as evictions. */
void rf_kv_book_release(rf_kv_book *book, int layer, int head, const int32_t *keep, int32_t count);
typedef struct {
    int64_t kept, seen; /* slots now, and slots that a full cache would have; all layers and heads */
    int64_t evictions;
    double plan_ms;
} rf_kv_book_info;
rf_kv_book_info rf_kv_book_get_info(const rf_kv_book *book);

/* --- parts, for tests and other rules ------------------------------------------------------------------------------------- */

/* out [n]; size odd. AVG pads with zeros and divides by size everywhere; MAX ignores padding. */
void rf_kv_pool_scores(float *out, const float *in, int32_t n, rf_kv_pool pool, int32_t size);
/* Indices of the `count` largest of score[n], ascending, into keep; ties to the lowest index. */
void rf_kv_top(int32_t *keep, const float *score, int32_t n, int32_t count);
/* out [L] budgets without the window (PyramidKV's integer form). keys: T. */
void rf_kv_pyramid(int32_t *out, int num_layers, int32_t capacity, int32_t window, int32_t keys, int32_t beta);
/* out [num_heads] from scores [num_heads][stride]; base: mean budget of a head (Ada-KV, released rule). */
void rf_kv_flat_heads(int32_t *out, const float *scores, int num_heads, int32_t n, int64_t stride, int32_t base,
                      double floor, bool normalise);
/* out [num_done] of total rows by preferences, clipped to most (CAKE). */
void rf_kv_cake(int32_t *out, const double *preference, int num_done, int64_t total, int32_t most);

#ifdef __cplusplus
}
#endif
#endif
