/* caching/rows/dual.c - DualCache: the block being decoded is computed, what lies before and behind it once a block.
 *
 * Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding (Wu et al. 2025,
 * arXiv 2505.22618), `generate_with_dual_cache`. On entry of a block one pass computes all rows, and commits too.
 * The other passes compute the block's rows and see all others as that pass left them: the prefix, and the masks
 * behind the block.
 *
 * Differs  shift models: as in prefix.c; the loop computes the row before the block's first mask.
 * Beyond   refresh and horizon, as in prefix.c (dLLM-RL itself computes the rows of its horizon: that is prefix with
 *          horizon=128).
 * Keys outside the block are frozen within it, so external attention can be reused (FlashBlock's merge). */
#include "caching/rows/rows.h"

enum { REFRESH, HORIZON, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [REFRESH] = {"refresh", RF_OPTION_INT, "0", 0, 100000, NULL,
                 "everything is computed so many passes after the last time; 0: on entry of a block only"},
    [HORIZON] = {"horizon", RF_OPTION_INT, "0", 0, 1000000, NULL,
                 "rows further behind the block are pruned; 0: none is"},
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
    rf_rows_range(plan, due ? 0 : seq->block_begin, due ? plan->visible_end : seq->block_end);
    rf_rows_candidates(seq, plan, seq->block_begin, seq->block_end);
    rf_rows_inside(seq, plan, seq->block_begin, seq->block_end);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_dual = {
    .name = "dual",
    .family = "row",
    .level = "row",
    .paper = "Fast-dLLM (Wu et al. 2025), DualCache, arXiv 2505.22618",
    .summary = "only the block being decoded is computed, all other rows on its entry",
    .fits = "bidirectional diffusion language models; wants blocks",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
