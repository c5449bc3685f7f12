/* caching/rows/dllm_cache.c - dLLM-Cache: the prompt seldom, of the response the rows whose values changed most.
 *
 * dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching (Liu et al. 2025, arXiv 2506.06295).
 * Kept for each layer and row are keys, values, and what attention and FFN added. With k passes before this one
 *   prompt    computed and kept if k mod `prompt` = 0, else its keys and values are read and its rows skip the layers
 *   response  computed and kept if k mod `response` = 0; else in every layer values of all response rows are computed
 *             and compared with those kept (cosine), the `ratio` of rows that differ most is computed fully, and the
 *             others add what was kept (V-verify, RF_LAYERS_VERIFY; the executor's)
 * The first `full_layers` layers compute the whole response: 1, as in the released code. The paper names other
 * intervals for each model and task (prompt 5..100, response 1..8; ratio 0.25): 50 and 7 are those of LLaDA-Instruct
 * on GSM8K.
 *
 * Differs  the released code counts from 1 and tests (k - 1); the same. It keeps increments of prompt rows, too,
 *          which nothing reads but the prompt's own rows between refreshes, whose output nobody asks for: not kept
 *          here.
 * prompt=1, response=1 computes everything in every pass. */
#include "caching/rows/rows.h"

enum { PROMPT, RESPONSE, RATIO, FULL_LAYERS, NUM_OPTIONS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [PROMPT] = {"prompt", RF_OPTION_INT, "50", 1, 100000, NULL, "prompt rows are computed every so many passes"},
    [RESPONSE] = {"response", RF_OPTION_INT, "7", 1, 100000, NULL,
                  "all response rows are computed every so many passes"},
    [RATIO] = {"ratio", RF_OPTION_DOUBLE, "0.25", 0, 1, NULL,
               "part of the response rows that other passes compute, those with the most changed values"},
    [FULL_LAYERS] = {"full_layers", RF_OPTION_INT, "1", 0, 1000, NULL,
                     "first layers that compute the whole response in every pass"},
};

typedef struct {
    rf_row_memory memory;
} state;

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    bool prompt_due = s->memory.passes == 0 || seq->step % rf_policy_int(policy, PROMPT) == 0;
    bool response_due = s->memory.passes == 0 || seq->step % rf_policy_int(policy, RESPONSE) == 0;
    rf_rows_begin(seq, plan);
    rf_rows_range(plan, prompt_due ? 0 : seq->shape->prompt, seq->length);
    rf_rows_candidates(seq, plan, seq->block_begin, seq->block_end);
    plan->layers = RF_LAYERS_VERIFY;
    plan->verify.ratio = rf_policy_double(policy, RATIO);
    plan->verify.begin = seq->shape->prompt;
    plan->verify.end = seq->length;
    plan->verify.store = response_due;
    plan->verify.full_layers = (int32_t)rf_policy_int(policy, FULL_LAYERS);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
    plan->refresh &= plan->verify.store; /* V-verify renews values only */
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
    .needs_increments = true,
};

const rf_policy_def rf_policy_dllm_cache = {
    .name = "dllm-cache",
    .family = "row",
    .level = "row",
    .paper = "dLLM-Cache (Liu et al. 2025), arXiv 2506.06295",
    .summary = "prompt rows at long intervals; of the response the rows whose values changed most",
    .fits = "bidirectional diffusion language models",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
