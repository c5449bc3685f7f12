/* caching/rows/vicinity.c - vicinity refresh: the block being decoded is computed with some rows on either side of it.
 *
 * dInfer: An Efficient Inference Framework for Diffusion Language Models (Ma et al. 2025, arXiv 2510.08666), rules of
 * `VicinityCacheIteration`: the first passes of a run (warmup_steps) and one on entry of each block compute
 * everything; the others the rows [block_begin - back, block_end + ahead) and see all. Defaults are those of its
 * examples: 16, 16 and 4.
 *
 * Differs  the released code fills its cache in a full pass of its own after the warm-up and decodes the window in
 *          the same call (two passes for one iteration); here the last warm-up pass is what fills it. Its interval
 *          (cache_update_freq) counts from the run's start and not in the first block; here it counts from the last
 *          full pass, in every block. Iteration smoothing (embeddings mixed from predictions) is not part of it. */
#include "caching/rows/rows.h"

enum { BACK, AHEAD, REFRESH, WARMUP, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [BACK] = {"back", RF_OPTION_INT, "16", 0, 1000000, NULL, "rows computed before the block"},
    [AHEAD] = {"ahead", RF_OPTION_INT, "16", 0, 1000000, NULL, "rows computed behind the block"},
    [REFRESH] = {"refresh", RF_OPTION_INT, "0", 0, 100000, NULL,
                 "everything is computed so many passes after the last time; 0: on entry of a block only"},
    [WARMUP] = {"warmup", RF_OPTION_INT, "4", 0, 100000, NULL, "passes at the start that compute everything"},
};

typedef struct {
    rf_row_memory memory;
} state;

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    int64_t begin = seq->block_begin - rf_policy_int(policy, BACK), end = seq->block_end + rf_policy_int(policy, AHEAD);
    bool due = rf_rows_is_due(&s->memory, seq, rf_policy_int(policy, REFRESH));
    due |= s->memory.passes < rf_policy_int(policy, WARMUP);
    if (begin < 0) begin = 0;
    if (end > seq->length) end = seq->length;
    rf_rows_begin(seq, plan);
    rf_rows_range(plan, due ? 0 : (int32_t)begin, due ? seq->length : (int32_t)end);
    rf_rows_candidates(seq, plan, seq->block_begin, seq->block_end);
    rf_rows_inside(seq, plan, (int32_t)begin, (int32_t)end);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_vicinity = {
    .name = "vicinity",
    .family = "row",
    .level = "row",
    .paper = "dInfer (Ma et al. 2025), vicinity refresh, arXiv 2510.08666",
    .summary = "the block being decoded and some rows around it are computed, all others on its entry",
    .fits = "bidirectional diffusion language models; wants blocks",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
