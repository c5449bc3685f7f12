/* caching/rows/freecache.c - FreeCache: keys and values of clean text are frozen and never computed again.
 *
 * FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion (Hu et al.
 * 2025, arXiv 2505.21467). The first pass computes everything. Every other one computes the rows from the frozen
 * edge on (block and all masks behind it) and sees all. There is no refresh. What freezes is what the last pass
 * before left: a token committed by that pass freezes with the keys of the mask it was (stale tail).
 *
 * variant=block (default)  the edge is the first row of the block being decoded (generate_block_cached of the
 *                          released code). block=N instead: the last multiple of N (absolute, as in the released
 *                          guided code) up to the first mask, at least the prompt: for a canvas decoded in one block.
 * variant=aggressive       the edge is the last row before the first mask: the newest token is computed once more.
 * variant=sliding          rows [last - left, last + right) around the last row before the first mask; rows behind
 *                          it are pruned, rows before it frozen. Size of the released code: 128 on both sides (its
 *                          configuration class: 512). The edge may step back only here.
 * Which of them made the paper's tables is not said. For shift models the edge is one row earlier, as in the
 * released code.
 *
 * The released guided code counts "last" over tokens committed left to right, which is the row before the first
 * mask. With other commit rules rows decoded behind the first mask are not frozen.
 * Beyond   settle=true: a row is computed once more after its commit before it freezes: no stale tail. */
#include "caching/rows/rows.h"

enum { VARIANT, BLOCK, LEFT, RIGHT, SETTLE, NUM_OPTIONS };
enum { AT_BLOCK, AGGRESSIVE, SLIDING };

static const rf_policy_option options[NUM_OPTIONS] = {
    [VARIANT] = {"variant", RF_OPTION_CHOICE, "block", 0, 0, "block aggressive sliding",
                 "what freezes: finished blocks, all before the first mask, or what a sliding window has left"},
    [BLOCK] = {"block", RF_OPTION_INT, "0", 0, 1000000, NULL,
               "variant=block: text freezes in pieces of so many tokens; 0: in blocks of the decoding"},
    [LEFT] = {"left", RF_OPTION_INT, "128", 0, 1000000, NULL,
              "variant=sliding: rows computed before the last decoded one"},
    [RIGHT] = {"right", RF_OPTION_INT, "128", 2, 1000000, NULL,
               "variant=sliding: rows computed from the last decoded one on; later ones are pruned"},
    [SETTLE] = {"settle", RF_OPTION_BOOL, "false", 0, 1, NULL, "a token is computed once more before it freezes"},
};

typedef struct {
    rf_row_memory memory;
} state;

static int32_t clamp(int64_t value, int32_t low, int32_t high) {
    return value < low ? low : value > high ? high : (int32_t)value;
}

/* First row that is computed. */
static int32_t edge_of(const rf_policy *policy, const rf_row_state *seq, int32_t first_mask) {
    int64_t block = rf_policy_int(policy, BLOCK), edge = seq->block_begin;
    switch (rf_policy_int(policy, VARIANT)) {
    case AGGRESSIVE: edge = first_mask - 1; break;
    case SLIDING: edge = first_mask - 1 - rf_policy_int(policy, LEFT); break;
    default:
        if (block > 0) edge = first_mask - first_mask % block;
        if (edge < seq->shape->prompt) edge = seq->shape->prompt;
        if (edge > first_mask) edge = first_mask;
        edge -= seq->shape->shift;
        break;
    }
    if (rf_policy_bool(policy, SETTLE)) {
        for (int32_t row = 0; row < edge; row++) {
            if (rf_rows_just_committed(seq, row)) edge = row;
        }
    }
    return clamp(edge, 0, seq->length);
}

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    bool sliding = rf_policy_int(policy, VARIANT) == SLIDING;
    int32_t first_mask = seq->length;
    rf_rows_first_masks(seq, 0, 1, &first_mask);
    int32_t edge = edge_of(policy, seq, first_mask);
    rf_rows_begin(seq, plan);
    if (sliding && s->memory.passes > 0) {
        plan->visible_end = clamp(first_mask - 1 + rf_policy_int(policy, RIGHT), 0, seq->length);
    }
    rf_rows_range(plan, s->memory.passes == 0 ? 0 : edge, plan->visible_end);
    int32_t last = plan->visible_end < seq->block_end ? plan->visible_end : seq->block_end;
    rf_rows_candidates(seq, plan, seq->block_begin, last);
    rf_rows_inside(seq, plan, edge + seq->shape->shift, plan->visible_end);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_freecache = {
    .name = "freecache",
    .family = "row",
    .level = "row",
    .paper = "FlashDLM (Hu et al. 2025), FreeCache, arXiv 2505.21467",
    .summary = "finished text is frozen for good; the block being decoded and all behind it are computed",
    .fits = "bidirectional diffusion language models; wants blocks, or block=N",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
