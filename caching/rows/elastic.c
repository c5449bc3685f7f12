/* caching/rows/elastic.c - Elastic-Cache: a window of masks is computed, everything only where attention has drifted.
 *
 * Attention Is All You Need for KV Cache in Diffusion LLMs (Nguyen-Tri et al. 2025, arXiv 2510.14973). The first
 * pass computes everything. Every other one computes the first `window` masks, tokens just committed, and the row
 * tracked in each layer: the decoded row that the window's rows attended to most in the pass before. In every layer
 * the tracked row's attention is compared with that of the pass before; where the similarity falls below
 * `threshold`, the layers after it compute all rows, from the layer inputs kept (RF_LAYERS_DRIFT; the executor's).
 * Tokens commit inside the window only.
 *
 * Paper and released code disagree: the paper's similarity is the cosine of attention rows over keys (axis=keys, the
 * default); the code takes it over heads for each key and averages over keys (axis=heads). Published settings (0.9,
 * window 16) were run with the code; a threshold does not carry over from one axis to the other.
 * expand=N   layers from N on compute all rows in any case (0: everything is computed in every pass); -1, the
 *            paper's: by drift.
 * far=false  masks behind the window are computed in every pass (block_caching of the code switched off). */
#include "caching/rows/rows.h"

#include <string.h>

enum { THRESHOLD, WINDOW, AXIS, EXPAND, FAR, NUM_OPTIONS };
enum { KEYS, HEADS };

static const rf_policy_option options[NUM_OPTIONS] = {
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "0.9", -2, 2, NULL,
                   "gamma: all rows are computed in the layers after one whose similarity is smaller"},
    [WINDOW] = {"window", RF_OPTION_INT, "16", 1, 1000000, NULL, "beta: masks that are computed and may commit"},
    [AXIS] = {"axis", RF_OPTION_CHOICE, "keys", 0, 0, "keys heads",
              "cosine over keys (the paper) or over heads, then the mean over keys (the released code)"},
    [EXPAND] = {"expand", RF_OPTION_INT, "-1", -1, 1000, NULL,
                "layers from this one on compute all rows in any case; -1: by drift"},
    [FAR] = {"far", RF_OPTION_BOOL, "true", 0, 1, NULL, "masks behind the window are served from the cache"},
};

typedef struct {
    rf_row_memory memory;
} state;

static void mark_tracked(const rf_row_state *seq, uint8_t *marks) {
    for (int l = 0; seq->tracked && l < seq->shape->num_layers; l++) {
        int32_t row = seq->tracked[l];
        if (row >= 0 && row < seq->length) marks[row] = 1;
    }
}

static void plan_pass(const rf_policy *policy, void *data, const rf_row_state *seq, rf_row_plan *plan) {
    state *s = data;
    uint8_t *written = (uint8_t *)(s + 1), *marks = written + seq->shape->length;
    int64_t window = rf_policy_int(policy, WINDOW), expand = rf_policy_int(policy, EXPAND);
    bool far = rf_policy_bool(policy, FAR);
    int32_t limit = window < seq->length ? (int32_t)window : seq->length;
    rf_rows_begin(seq, plan);
    plan->layers = RF_LAYERS_DRIFT;
    plan->drift.threshold = rf_policy_double(policy, THRESHOLD);
    plan->drift.over_heads = rf_policy_int(policy, AXIS) == HEADS;
    plan->drift.force_from = (int)expand;
    plan->drift.num_window = rf_rows_first_masks(seq, 0, limit, plan->drift.window);
    for (int32_t i = 0; i < plan->drift.num_window && plan->drift.window[i] < seq->block_end; i++)
        plan->candidates[plan->num_candidates++] = plan->drift.window[i];

    if (s->memory.passes == 0 || expand == 0) {
        rf_rows_all(seq, plan);
    } else {
        memset(marks, 0, (size_t)seq->length);
        mark_tracked(seq, marks);
        for (int32_t i = 0; i < plan->drift.num_window; i++) marks[plan->drift.window[i]] = 1;
        for (int32_t row = 0; row < seq->length; row++) {
            bool computed = marks[row] || rf_rows_just_committed(seq, row) || (!far && seq->masked[row]);
            if (computed) rf_rows_range(plan, row, row + 1);
        }
    }
    rf_rows_finish(&s->memory, written, seq, plan);
}

static const rf_row_rules rules = {
    .check = rf_rows_refuse_block_causal,
    .length_bytes = 2, /* written, rows of this pass */
    .plan = plan_pass,
    .needs_inputs = true,
};

const rf_policy_def rf_policy_elastic = {
    .name = "elastic",
    .family = "row",
    .level = "row",
    .paper = "Elastic-Cache (Nguyen-Tri et al. 2025), arXiv 2510.14973",
    .summary = "a window of masks is computed; where attention drifts, deeper layers compute all rows",
    .fits = "bidirectional diffusion language models",
    .options = options,
    .num_options = NUM_OPTIONS,
    .state_bytes = sizeof(state),
    .setup = rf_rows_setup,
    .rows = &rules,
};
