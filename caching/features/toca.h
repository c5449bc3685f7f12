/* caching/features/toca.h - the rules of ToCa that DuCa shares, see toca.c. */
#ifndef RF_CACHING_FEATURES_TOCA_H
#define RF_CACHING_FEATURES_TOCA_H

#include "caching/features/features.h"

enum {
    RF_TOCA_INTERVAL,
    RF_TOCA_RATIO,
    RF_TOCA_SCHEDULE_WEIGHT,
    RF_TOCA_WINDOW,
    RF_TOCA_STEP_WEIGHT,
    RF_TOCA_LAYER_WEIGHT,
    RF_TOCA_MODULE_WEIGHT,
    RF_TOCA_ATTENTION,
    RF_TOCA_SCORE,
    RF_TOCA_AGE_WEIGHT,
    RF_TOCA_BONUS,
    RF_TOCA_CELL,
    RF_TOCA_SEED,
    RF_TOCA_NUM_OPTIONS
};
enum { RF_TOKENS_CACHED, RF_TOKENS_ROWS };                             /* attention */
enum { RF_TOKENS_BY_ATTENTION, RF_TOKENS_BY_VALUE, RF_TOKENS_RANDOM }; /* score */

/* How rows are scored: the same options in every token policy. */
/* clang-format off */
#define RF_TOKENS_SCORE_OPTION(def) \
    {"score", RF_OPTION_CHOICE, def, 0, 0, "attention value random", \
     "rows come first that receive much attention, or have small values, or at random (a control)"}
#define RF_TOKENS_AGE_OPTION(def, help) {"age_weight", RF_OPTION_DOUBLE, def, 0, 1000, NULL, help}
#define RF_TOKENS_BONUS_OPTION \
    {"bonus", RF_OPTION_DOUBLE, "0.6", 0, 1000, NULL, \
     "the best row of every cell gains this times its score, so that rows spread over the picture; 0 = none"}
#define RF_TOKENS_CELL_OPTION \
    {"cell", RF_OPTION_INT, "2", 0, 256, NULL, "cells of the token grid are this many rows square; 0 = no bonus"}
#define RF_TOKENS_SEED_OPTION \
    {"seed", RF_OPTION_INT, "0", 0, 4294967295.0, NULL, "of score=random, which alone reads it"}

#define RF_TOCA_OPTIONS(ratio_def, score_def) \
    [RF_TOCA_INTERVAL] = {"interval", RF_OPTION_INT, "3", 1, 1000, NULL, \
        "steps from one full step to the next, before schedule_weight; 1 = never skip"}, \
    [RF_TOCA_RATIO] = {"ratio", RF_OPTION_DOUBLE, ratio_def, 0, 1, NULL, \
        "share of token rows computed in between, before the three weights; 0 = all reused"}, \
    [RF_TOCA_SCHEDULE_WEIGHT] = {"schedule_weight", RF_OPTION_DOUBLE, "0.4", -0.95, 0.95, NULL, \
        "the interval falls from interval/(1-w) at the first step to interval/(1+w) at the last"}, \
    [RF_TOCA_WINDOW] = {"window", RF_OPTION_BOOL, "true", 0, 0, NULL, \
        "interval 2 from 60 % to 80 % of the run"}, \
    [RF_TOCA_STEP_WEIGHT] = {"step_weight", RF_OPTION_DOUBLE, "2", -10, 10, NULL, \
        "rows rise from 1-w at the first step to 1+w times ratio at the last"}, \
    [RF_TOCA_LAYER_WEIGHT] = {"layer_weight", RF_OPTION_DOUBLE, "-0.2", -10, 10, NULL, \
        "rows fall from 1+w in the first block to 1-w times ratio in the last"}, \
    [RF_TOCA_MODULE_WEIGHT] = {"module_weight", RF_OPTION_DOUBLE, "2.5", -10, 10, NULL, \
        "MLPs compute 1+0.6w, attention to text 1-0.4w times ratio"}, \
    [RF_TOCA_ATTENTION] = {"attention", RF_OPTION_CHOICE, "cached", 0, 0, "cached rows", \
        "self-attention in between: reused, or as many rows renewed as in the MLP"}, \
    [RF_TOCA_SCORE] = RF_TOKENS_SCORE_OPTION(score_def), \
    [RF_TOCA_AGE_WEIGHT] = RF_TOKENS_AGE_OPTION( \
        "0.25", "over interval: added to a row's score for every step since it was computed"), \
    [RF_TOCA_BONUS] = RF_TOKENS_BONUS_OPTION, \
    [RF_TOCA_CELL] = RF_TOKENS_CELL_OPTION, \
    [RF_TOCA_SEED] = RF_TOKENS_SEED_OPTION
/* clang-format on */

typedef struct {
    int interval; /* in force since the last full step of the schedule */
} rf_toca_state;

/* max(1, round(interval / (1 + w - 2 w s' / T))), s' counting down from T - 1; ties to even. Without the window. */
int rf_toca_threshold(int interval, double schedule_weight, int countdown, int num_steps);

/* Rows of a part at a step, 0..tokens. */
int32_t rf_toca_rows(const rf_policy *policy, const rf_cache_shape *shape, int step, int block, int kind);

/* Scoring options from index `first` on, in the order score, age_weight, bonus, cell, seed. Ages count in units of `period` steps. */
void rf_tokens_fill_score(const rf_policy *policy, int first, int period, const rf_cache_shape *shape,
                          rf_cache_layout *layout);

rf_status rf_toca_setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err);

/* FULL by the schedule (and by force)? Brings the interval up to date. */
bool rf_toca_is_full(const rf_policy *policy, rf_toca_state *state, const rf_step_ctx *ctx);

/* Rows and reuse of every part of a step that is not FULL: kind PARTIAL, SKIP if nothing is computed, FULL if
 * everything. */
void rf_toca_fill_parts(const rf_policy *policy, const rf_step_ctx *ctx, rf_step_plan *plan);
/* The kind that follows from parts. */
void rf_tokens_set_kind(const rf_cache_shape *shape, rf_step_plan *plan);

#endif
