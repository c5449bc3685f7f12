/* caching/rows/rows.h - which rows of a text a decoding step computes, and what they see: row policies of diffusion language models.
 *
 * A diffusion language model decodes a canvas of MASK tokens behind a prompt; every forward pass may commit some of them. A row policy
 * says, once per pass and on the host, for one sequence: which rows are computed as queries (their keys and values are written
 * to the cache), which cache rows they see, which masks may commit, and how layers treat rows that are not computed.
 * It is one of four independent axes (docs/text.md): row policy x commit rule x end-of-text rule x attention reuse.
 *
 * Exact facts that every policy may use: positions never change; a row of the cache may be stale, never wrong in place;
 * layer 0's keys and values depend on (token, position) alone. A policy whose plan lists every row each pass is "none", which is
 * therefore not in the list of policies.
 *
 * What every plan keeps to (rf_rows_finish sees to it, tests/caching/test_rows.c checks it):
 *   - while a mask is left there are candidates: masks of the block being decoded, where it has any
 *   - what is seen holds what is computed, and nothing whose keys were never written: such a pass computes all rows
 *   - block-causal models: rows of the block alone are planned, rows up to its end are seen. Blocks before it were written by the loop
 * Source: docs of each policy's file; the step plan follows section 9 of the survey in docs/text.md. */
#ifndef RF_CACHING_ROWS_H
#define RF_CACHING_ROWS_H

#include "caching/policy.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_COMMIT_PROMPT (-1)
#define RF_COMMIT_NEVER  (-2) /* still a mask */

/* A run, as a policy sees it before the first pass. */
typedef struct {
    const char *model;      /* for messages */
    int32_t prompt, length; /* rows of the prompt; with the canvas */
    int32_t block;          /* tokens a block (semi-autoregressive); = canvas if there is one block */
    bool block_causal;      /* attention is block-causal: rows of finished blocks are exact */
    int32_t shift;          /* 1: row p - 1 predicts position p (Dream) */
    int num_layers;
    bool order_is_random; /* the commit rule takes masks in an order fixed in advance (random remasking) */
    bool force;           /* misfits are not refused */
} rf_row_shape;

/* A sequence between two passes. Owned by the decoding loop. */
typedef struct {
    const rf_row_shape *shape;
    int32_t length;             /* rows now; an end-of-text rule may cut it */
    const int32_t *tokens;      /* [length] */
    const uint8_t *masked;      /* [length] */
    const int32_t *commit_step; /* [length] pass that committed it, RF_COMMIT_PROMPT or RF_COMMIT_NEVER */
    int32_t step;               /* passes before this one */
    int32_t block_index, block_begin, block_end; /* the block being decoded (the last one's end is length) */
    int32_t block_step;                          /* passes in this block before this one; 0 on entry */
    const int32_t *committed;                    /* rows that the pass before committed, ascending */
    int32_t num_committed;
    const float *confidence; /* [length] last known confidence of masked rows, -1 = never seen */
    const int32_t *order;    /* shape.order_is_random: masked rows in the order in which they will commit, else NULL */
    int32_t num_order;
    /* what layers reported of the pass before (only if a plan asked): */
    const int32_t *tracked; /* [num_layers] most-attended decoded row, -1 = none */
    int32_t expanded_at;    /* layer after which all rows were computed, -1 = none */
} rf_row_state;

typedef enum {
    RF_LAYERS_SAME = 0, /* the same rows in every layer */
    RF_LAYERS_DRIFT, /* Elastic-Cache: the attention of tracked rows is compared with before; drift expands to all rows */
    RF_LAYERS_VERIFY /* dLLM-Cache: values of all segment rows, the rest only for those that changed most */
} rf_layer_rule;

/* Filled by plan. Lists have room for shape.length entries. The loop adds, for shift = 1, the row before each candidate. */
typedef struct {
    int32_t *rows; /* computed, ascending */
    int32_t num_rows;
    /* seen: cache rows 0..visible_end-1, or the list if num_visible > 0 (ascending; must contain every computed row) */
    int32_t visible_end;
    int32_t *visible;
    int32_t num_visible;
    int32_t *candidates; /* masked rows that may commit, ascending, each in rows */
    int32_t num_candidates;
    /* the pass renews everything that is seen (block-causal: of the block): for people and the trace */
    bool refresh;

    rf_layer_rule layers;
    struct {
        double threshold; /* gamma: expand if the similarity falls below */
        bool
            over_heads; /* cosine over heads then mean over keys (the released code) instead of over keys (the paper) */
        int32_t *window; /* rows whose attention chooses what is tracked, ascending; in rows */
        int32_t num_window;
        int force_from; /* all rows from this layer on, whatever the drift; -1 = no */
    } drift;
    struct {
        double ratio;        /* of the segment's rows that are computed fully */
        int32_t begin, end;  /* the segment; rows = at least all of it */
        bool store;          /* this pass computes everything and stores the segment's increments (a refresh) */
        int32_t full_layers; /* so many first layers are computed fully (1) */
    } verify;

    /* Attention reuse: visible keys outside [inside_begin, inside_end) are "external". Set by the policy (begin == end: this pass
     * offers nothing to reuse), used by the loop's attention-reuse axis. The row that the loop adds for shift = 1 is inside. */
    int32_t inside_begin, inside_end;
    /* External attention that was kept does not hold any more: since the last pass whose rows were all inside, this one included, external
     * rows were written, others are seen, or the range moved. Everything must be computed afresh, as soon as rows are all inside. */
    bool outside_changed;
} rf_row_plan;

/* What a rf_policy_def of family "row" has instead of setup and plan. */
typedef struct rf_row_rules {
    /* RF_ERR_UNSUPPORTED where the run does not fit (unless shape->force), in one line. May be NULL. */
    rf_status (*check)(const rf_policy *policy, const rf_row_shape *shape, rf_error *err);
    /* state: def.state_bytes + length_bytes * shape.length bytes, zeroed at the start of a run. */
    size_t length_bytes;
    void (*plan)(const rf_policy *policy, void *state, const rf_row_state *seq, rf_row_plan *plan);
    bool needs_inputs;     /* layer inputs of all rows are kept (Elastic-Cache) */
    bool needs_increments; /* attention and FFN increments of all rows are kept (dLLM-Cache) */
} rf_row_rules;

/* --- for the decoding loop ------------------------------------------------------------------------------------------------ */

/* Before a run. A policy of another family is refused (RF_ERR_ARGUMENT), then the policy's own check is asked. */
rf_status rf_row_policy_check(const rf_policy *policy, const rf_row_shape *shape, rf_error *err);
/* Of one run's state, to be zeroed at its start. */
size_t rf_row_policy_state_bytes(const rf_policy *policy, const rf_row_shape *shape);

/* --- for policies --------------------------------------------------------------------------------------------------------- */

/* Every policy's state begins with it; zeroed is "no pass yet". */
typedef struct {
    int32_t passes;                         /* planned so far */
    int32_t refresh_step;                   /* of the last plan with refresh */
    int32_t seen, inside_begin, inside_end; /* of the last pass that offered reuse: rows seen outside, and the range */
    uint32_t seen_hash;
    bool wrote_outside; /* it did, or a pass since */
} rf_row_memory;

/* Rows that a pass may compute and that may ever have changed: 0..length-1, block-causal: the block's. */
int32_t rf_rows_first(const rf_row_state *seq);
int32_t rf_rows_end(const rf_row_state *seq);

/* Empty lists, everything up to rf_rows_end seen, RF_LAYERS_SAME. Pointers stay. */
void rf_rows_begin(const rf_row_state *seq, rf_row_plan *plan);
void rf_rows_all(const rf_row_state *seq, rf_row_plan *plan);      /* rows = rf_rows_first..rf_rows_end-1, all seen */
void rf_rows_range(rf_row_plan *plan, int32_t begin, int32_t end); /* appends */
void rf_rows_add(rf_row_plan *plan, int32_t row);                  /* inserts in order, once */
/* The first `count` masks at or after `from` and before rf_rows_end into out. Returns how many there were. */
int32_t rf_rows_first_masks(const rf_row_state *seq, int32_t from, int32_t count, int32_t *out);
/* Candidates: masked rows of [begin, end). */
void rf_rows_candidates(const rf_row_state *seq, rf_row_plan *plan, int32_t begin, int32_t end);
/* Rows of [0, end) with seen[row] != 0 are visible: as a range if they are one. */
void rf_rows_see(rf_row_plan *plan, const uint8_t *seen, int32_t end);
/* Was the row's token committed (or filled in) by the pass before? Its keys are then a mask's unless it is computed. */
bool rf_rows_just_committed(const rf_row_state *seq, int32_t row);
/* A block-wise policy refreshes: first pass, entry of a block, or `interval` passes after the last refresh (0: never that). */
bool rf_rows_is_due(const rf_row_memory *memory, const rf_row_state *seq, int64_t interval);
/* Attention reuse: [begin - shift, end) in bounds. */
void rf_rows_inside(const rf_row_state *seq, rf_row_plan *plan, int32_t begin, int32_t end);
/* Last call of a plan. Without candidates, or if a row is seen that was never written, all rows are computed. Sets refresh and
 * outside_changed and brings memory and written ([shape.length], one byte a row) up to date. */
void rf_rows_finish(rf_row_memory *memory, uint8_t *written, const rf_row_state *seq, rf_row_plan *plan);

/* rf_policy_def.setup of every row policy: refuses. */
rf_status rf_rows_setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err);
/* RF_ERR_UNSUPPORTED on a block-causal model, forced or not: a bidirectional pass over finished blocks would be wrong. */
rf_status rf_rows_refuse_block_causal(const rf_policy *policy, const rf_row_shape *shape, rf_error *err);

extern const rf_policy_def rf_policy_prefix;
extern const rf_policy_def rf_policy_dual;
extern const rf_policy_def rf_policy_window;
extern const rf_policy_def rf_policy_freecache;
extern const rf_policy_def rf_policy_dkv;
extern const rf_policy_def rf_policy_dllm_cache;
extern const rf_policy_def rf_policy_elastic;
extern const rf_policy_def rf_policy_vicinity;

#ifdef __cplusplus
}
#endif
#endif
