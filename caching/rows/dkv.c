/* caching/rows/dkv.c - dKV-Cache: masks are computed, decoded rows once more and then served from the cache.
 *
 * dKV-Cache: The Cache for Diffusion Language Models (Ma et al. 2025, arXiv 2505.15781), sections 3.3 and 3.4.
 *   variant=decode (default)  computed are the rows that were masks in the pass before: masks, and tokens just
 *                             committed (one-step delay: a token's keys are cached after it was computed as itself;
 *                             without it quality collapses). All rows every `refresh` passes of a block, and in its
 *                             first `first` passes (released code: the cache begins anew with every block, and is
 *                             full for two steps).
 *   variant=prefill           prompt rows once, all others in every pass. No refresh.
 *   variant=pd                prompt rows once, all others by the rules of decode.
 *   variant=greedy            computed are the next token to commit, those just committed, and rows [c - ceil(w/2),
 *                             c + floor(w/2)] around those just committed, or around the next one (centre=next; the
 *                             paper found centre=last better). All rows every `refresh` passes. Only the next token
 *                             may commit, so the order must be known: random remasking.
 * refresh=0 stands for the paper's: 8 (decode, pd; its Dream runs have 4), 2 (greedy). w = 4, at most 6 in the paper.
 *
 * Differs  shift models: the loop adds the row before a mask, so the paper's variants of what to cache (un, right)
 *          do not arise.
 * Beyond   count: tokens of the order that a greedy pass computes and may commit; more than the paper's one for
 *          schedules that commit several a pass.
 * Block-causal models: masks and new tokens of the block; decode and greedy only, for a finished prompt is frozen
 * there anyway. */
#include "caching/rows/rows.h"

enum { VARIANT, REFRESH, FIRST, WINDOW, CENTRE, COUNT, NUM_OPTIONS };
enum { DECODE, PREFILL, PD, GREEDY };
enum { LAST, NEXT };
#define PAPER_REFRESH        8
#define PAPER_REFRESH_GREEDY 2

static const rf_policy_option options[NUM_OPTIONS] = {
    [VARIANT] = {"variant", RF_OPTION_CHOICE, "decode", 0, 0, "decode prefill pd greedy",
                 "which rows are cached: decoded ones, the prompt, both, or all but a few"},
    [REFRESH] = {"refresh", RF_OPTION_INT, "0", 0, 100000, NULL,
                 "decode, pd, greedy: all rows are computed every so many passes of a block; 0: 8, greedy 2"},
    [FIRST] = {"first", RF_OPTION_INT, "2", 0, 100000, NULL, "decode, pd: and in so many first passes of a block"},
    [WINDOW] = {"window", RF_OPTION_INT, "4", 0, 100000, NULL, "greedy: width of the window of computed rows"},
    [CENTRE] = {"centre", RF_OPTION_CHOICE, "last", 0, 0, "last next",
                "greedy: the window is around the tokens just committed or around the next"},
    [COUNT] = {"count", RF_OPTION_INT, "1", 1, 100000, NULL, "greedy: next tokens that are computed and may commit"},
};

typedef struct {
    rf_row_memory memory;
} state;

static rf_status check(const rf_policy *policy, const rf_row_shape *shape, rf_error *err) {
    int64_t variant = rf_policy_int(policy, VARIANT);
    if (variant == PREFILL || variant == PD) return rf_rows_refuse_block_causal(policy, shape, err);
    if (variant != GREEDY || shape->order_is_random || shape->force) return RF_OK;
    return rf_fail(
        err, RF_ERR_UNSUPPORTED,
        "dkv variant=greedy needs an order of commits that is known in advance (random remasking) (force runs it "
        "all the same, left to right)");
}

/* The next rows to commit, as candidates and rows. */
static void take_next(const rf_policy *policy, const rf_row_state *seq, rf_row_plan *plan) {
    int64_t count = rf_policy_int(policy, COUNT);
    int32_t num = seq->order ? seq->num_order : seq->block_end;
    for (int32_t i = seq->order ? 0 : seq->block_begin; i < num && plan->num_rows < count; i++) {
        int32_t row = seq->order ? seq->order[i] : i;
        bool there = row >= seq->block_begin && row < seq->block_end && seq->masked[row];
        if (there) rf_rows_add(plan, row);
    }
    for (int32_t i = 0; i < plan->num_rows; i++) plan->candidates[i] = plan->rows[i];
    plan->num_candidates = plan->num_rows;
}

static void add_window(const rf_policy *policy, const rf_row_state *seq, rf_row_plan *plan, int32_t centre) {
    int64_t w = rf_policy_int(policy, WINDOW), begin = centre - (w + 1) / 2, end = centre + w / 2 + 1;
    if (begin < rf_rows_first(seq)) begin = rf_rows_first(seq);
    if (end > rf_rows_end(seq)) end = rf_rows_end(seq);
    for (int64_t row = begin; row < end; row++) rf_rows_add(plan, (int32_t)row);
}

static void plan_greedy(const rf_policy *policy, const rf_row_state *seq, rf_row_plan *plan, bool full) {
    take_next(policy, seq, plan);
    if (full) {
        rf_rows_all(seq, plan);
        return;
    }
    bool around_next = rf_policy_int(policy, CENTRE) == NEXT;
    for (int32_t row = rf_rows_first(seq); row < rf_rows_end(seq); row++) {
        if (!rf_rows_just_committed(seq, row)) continue;
        rf_rows_add(plan, row);
        if (!around_next) add_window(policy, seq, plan, row);
    }
    for (int32_t i = 0; around_next && i < plan->num_candidates; i++)
        add_window(policy, seq, plan, plan->candidates[i]);
}

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    int64_t variant = rf_policy_int(policy, VARIANT), interval = rf_policy_int(policy, REFRESH);
    if (interval == 0) interval = variant == GREEDY ? PAPER_REFRESH_GREEDY : PAPER_REFRESH;
    bool full = seq->block_step % interval == 0;
    full |= variant != GREEDY && seq->block_step < rf_policy_int(policy, FIRST);
    int32_t first = rf_rows_first(seq), end = rf_rows_end(seq), frozen = first;
    if ((variant == PREFILL || variant == PD) && s->memory.passes > 0) frozen = seq->shape->prompt;

    rf_rows_begin(seq, plan);
    if (variant == GREEDY) {
        plan_greedy(policy, seq, plan, full || s->memory.passes == 0);
    } else {
        full |= variant == PREFILL || s->memory.passes == 0;
        for (int32_t row = frozen; row < end; row++) {
            if (full || seq->masked[row] || rf_rows_just_committed(seq, row)) rf_rows_range(plan, row, row + 1);
        }
        rf_rows_candidates(seq, plan, seq->block_begin, seq->block_end);
    }
    rf_rows_inside(seq, plan, seq->shape->block_causal ? first : seq->shape->prompt, end);
    rf_rows_finish(&s->memory, (uint8_t *)(s + 1), seq, plan);
}

static const rf_row_rules rules = {
    .check = check,
    .length_bytes = 1, /* written */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_dkv = {
    .name = "dkv",
    .family = "row",
    .level = "row",
    .paper = "dKV-Cache (Ma et al. 2025), arXiv 2505.15781",
    .summary = "masks are computed, decoded rows once more and then served from the cache",
    .fits = "diffusion language models; greedy: random remasking",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
