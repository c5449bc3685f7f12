/* caching/rows/prefix.c - PrefixCache: what lies before the block being decoded is computed once a block.
 *
 * Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding (Wu et al. 2025,
 * arXiv 2505.22618), `generate_with_prefix_cache`. On entry of a block one pass computes all rows, and commits too.
 * The other passes compute the rows from the block's first one on (the block and
 * all masks behind it) and see the prefix as that pass left it.
 *
 * Differs  shift models: the released Dream code commits only the leftmost token in the first pass of a block and
 *          predicts the block's first row from itself afterwards. Here the loop computes the row before it, so both
 *          are exact.
 * Beyond   refresh: a further refresh so many passes after the last (0, the paper's: none; 1 computes everything
 *          each pass).
 *          horizon: rows further than that behind the block are neither computed nor seen: the decoding of dLLM-RL's
 *          evaluation (Wang et al. 2025, arXiv 2509.06949; block 32, further_horizon 128). 0, Fast-dLLM's: no limit. */
#include "caching/rows/rows.h"

enum { REFRESH, HORIZON, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [REFRESH] = {"refresh", RF_OPTION_INT, "0", 0, 100000, NULL,
                 "everything is computed so many passes after the last time; 0: on entry of a block only"},
    [HORIZON] = {"horizon", RF_OPTION_INT, "0", 0, 1000000, NULL,
                 "rows further behind the block are pruned (dLLM-RL: 128); 0: none is"},
};

typedef struct {
    rf_row_memory memory;
} state;

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    int64_t horizon = rf_policy_int(policy, HORIZON);
    bool due = rf_rows_is_due(&s->memory, seq, rf_policy_int(policy, REFRESH));
    rf_rows_begin(seq, plan);
    if (horizon > 0 && seq->block_end + horizon < seq->length) plan->visible_end = seq->block_end + (int32_t)horizon;
    rf_rows_range(plan, due ? 0 : seq->block_begin, plan->visible_end);
    rf_rows_candidates(seq, plan, seq->block_begin, seq->block_end);
    rf_rows_inside(seq, plan, seq->block_begin, plan->visible_end);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_prefix = {
    .name = "prefix",
    .family = "row",
    .level = "row",
    .paper = "Fast-dLLM (Wu et al. 2025), PrefixCache, arXiv 2505.22618",
    .summary = "rows before the block being decoded are computed on its entry only",
    .fits = "bidirectional diffusion language models; wants blocks",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
