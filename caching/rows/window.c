/* caching/rows/window.c - Window-Diffusion: the leftmost masks are computed, some behind them seen, the rest pruned.
 *
 * Window-Diffusion: Efficient Inference for Diffusion Language Models (2026, arXiv 2601.20332).
 * Masks are ranked from the left. A phase is `refresh` passes. Its first pass computes W =
 * decoded rows and the first `external` masks; W is fixed for the phase, rows outside are neither computed nor seen.
 * The other passes see W and compute the first `active` masks and the rows decoded in this phase (post-decode
 * transient: their keys are those of a mask until they are computed once, and settle slowly). Tokens commit among
 * the active masks.
 *
 * Paper and released code disagree.
 *   semantics=paper (default)  as above, also in the first pass of a phase.
 *   semantics=released         the released LLaDA code: the first pass of a phase computes and sees all rows, and
 *                              any mask may commit; W is built after that commit. A row that this pass committed is
 *                              computed once, in the next one; rows committed later until the phase ends.
 *   The released Dream code (window as a slice, the leftmost mask always committed first) is not offered: its slice
 *   keeps external - 1 masks and predicts its first row without the shift.
 * Defaults are the paper's for LLaDA (16, 64, 32); for Dream it has external=128. The released function has
 * active=8, refresh=5.
 *
 * Beyond   transient=false: a row is computed once after its commit, then served from the cache (dKV-Cache's
 *          one-step delay). A phase ends early if fewer than `active` masks are left in W while there are others
 *          (the released code would compute masks that no row sees). In blocks, ranks go over the whole canvas and the
 *          block's masks commit. Block-causal models: W is the finished blocks and the block's first masks, and a
 *          block begins a phase. */
#include "caching/rows/rows.h"

#include <string.h>

enum { ACTIVE, EXTERNAL, REFRESH, TRANSIENT, SEMANTICS, NUM_OPTIONS };
enum { PAPER, RELEASED };

static const rf_policy_option options[NUM_OPTIONS] = {
    [ACTIVE] = {"active", RF_OPTION_INT, "16", 1, 1000000, NULL, "masks that are computed, from the left"},
    [EXTERNAL] = {"external", RF_OPTION_INT, "64", 1, 1000000, NULL,
                  "masks that are seen, the active ones among them (Dream: 128)"},
    [REFRESH] = {"refresh", RF_OPTION_INT, "32", 1, 100000, NULL,
                 "passes of a phase; its first renews all that is seen"},
    [TRANSIENT] = {"transient", RF_OPTION_BOOL, "true", 0, 1, NULL,
                   "rows decoded in a phase are computed until it ends; false: once"},
    [SEMANTICS] = {"semantics", RF_OPTION_CHOICE, "paper", 0, 0, "paper released",
                   "the paper's phases, or those of the released LLaDA code"},
};

typedef struct {
    rf_row_memory memory;
    int32_t phase_step;               /* of the phase's first pass */
    bool window_is_old;               /* released: W is to be built before the next pass */
    int32_t inside_begin, inside_end; /* rows that may be written in the phase */
} state;

static rf_status check(const rf_policy *policy, const rf_row_shape *shape, rf_error *err) {
    int64_t active = rf_policy_int(policy, ACTIVE), external = rf_policy_int(policy, EXTERNAL);
    if (external >= active || shape->force) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "window sees active masks, so external must not be smaller: active=%lld, external=%lld",
                   (long long)active, (long long)external);
}

/* W as it is now; rows of [inside_begin, inside_end) are its masks, and those that the released refresh has just
 * decoded. */
static void build_window(const rf_policy *policy, state *s, uint8_t *window, const rf_row_state *seq) {
    int64_t external = rf_policy_int(policy, EXTERNAL), rank = 0;
    s->inside_begin = s->inside_end = 0;
    for (int32_t row = 0; row < rf_rows_end(seq); row++) {
        bool masked = seq->masked[row] != 0;
        window[row] = !masked || rank < external;
        rank += masked;
        bool may_be_written = masked ? window[row] != 0 : s->window_is_old && rf_rows_just_committed(seq, row);
        if (!may_be_written) continue;
        if (s->inside_end == 0) s->inside_begin = row;
        s->inside_end = row + 1;
    }
    s->window_is_old = false;
}

/* Too few masks left in W, and others outside it? */
static bool is_used_up(const rf_policy *policy, const uint8_t *window, const rf_row_state *seq) {
    int64_t in = 0, out = 0;
    for (int32_t row = rf_rows_first(seq); row < rf_rows_end(seq); row++) {
        if (seq->masked[row]) *(window[row] ? &in : &out) += 1;
    }
    return out > 0 && in < rf_policy_int(policy, ACTIVE);
}

/* Of a pass within a phase: must a decoded row of W be computed? */
static bool is_transient(const rf_policy *policy, const state *s, const rf_row_state *seq, int32_t row) {
    int32_t commit = seq->commit_step[row];
    if (rf_rows_just_committed(seq, row)) return true;
    if (!rf_policy_bool(policy, TRANSIENT) || commit < 0) return false;
    return rf_policy_int(policy, SEMANTICS) == RELEASED ? commit > s->phase_step : commit >= s->phase_step;
}

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    uint8_t *written = (uint8_t *)(s + 1), *window = written + seq->shape->length;
    bool released = rf_policy_int(policy, SEMANTICS) == RELEASED;
    int64_t active = rf_policy_int(policy, ACTIVE);
    int32_t first = rf_rows_first(seq), end = rf_rows_end(seq), rank = 0;
    bool due = s->memory.passes == 0 || seq->step - s->phase_step >= rf_policy_int(policy, REFRESH);
    due |= seq->shape->block_causal && seq->block_step == 0;
    if (!due && s->window_is_old) build_window(policy, s, window, seq);
    due |= !due && is_used_up(policy, window, seq);
    if (due) s->phase_step = seq->step;

    rf_rows_begin(seq, plan);
    if (due && released) {
        s->window_is_old = true;
        rf_rows_all(seq, plan);
        rf_rows_candidates(seq, plan, first, seq->block_end);
    } else {
        if (due) build_window(policy, s, window, seq);
        rf_rows_see(plan, window, end);
        for (int32_t row = first; row < end; row++) {
            if (!window[row]) continue;
            bool masked = seq->masked[row] != 0, is_active = masked && rank++ < active;
            if (due || is_active || (!masked && is_transient(policy, s, seq, row))) rf_rows_range(plan, row, row + 1);
            if (is_active && row < seq->block_end) plan->candidates[plan->num_candidates++] = row;
        }
        rf_rows_inside(seq, plan, s->inside_begin, s->inside_end);
    }
    rf_rows_finish(&s->memory, written, seq, plan);
}

static const rf_row_rules rules = {
    .check = check,
    .length_bytes = 2, /* written, W */
    .plan = plan_pass,
};

const rf_policy_def rf_policy_window = {
    .name = "window",
    .family = "row",
    .level = "row",
    .paper = "Window-Diffusion (2026), arXiv 2601.20332",
    .summary = "the leftmost masks are computed, a buffer behind them is seen, masks further off are pruned",
    .fits = "diffusion language models",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
