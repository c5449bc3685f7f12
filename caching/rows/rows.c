/* caching/rows/rows.c - what row policies share: lists of rows, and what every plan must keep to. See rows.h. */
#include "caching/rows/rows.h"

#include <string.h>

/* ---- for the loop ---- */

static bool is_row_policy(const rf_policy_def *def) {
    return def->rows != NULL;
}

rf_status rf_row_policy_check(const rf_policy *policy, const rf_row_shape *shape, rf_error *err) {
    const rf_policy_def *def = rf_policy_get_def(policy);
    if (!is_row_policy(def)) {
        char list[128] = "";
        for (int i = 0; i < rf_row_policy_count(); i++) {
            if (i > 0) strncat(list, ", ", sizeof list - strlen(list) - 1);
            strncat(list, rf_row_policy_at(i)->name, sizeof list - strlen(list) - 1);
        }
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "policy %s is for denoisers of images and video; %s is a text model (row policies: %s)",
                       def->name, shape->model ? shape->model : "this", list);
    }
    return def->rows->check ? def->rows->check(policy, shape, err) : RF_OK;
}

size_t rf_row_policy_state_bytes(const rf_policy *policy, const rf_row_shape *shape) {
    const rf_policy_def *def = rf_policy_get_def(policy);
    return def->state_bytes + (is_row_policy(def) ? def->rows->length_bytes * (size_t)shape->length : 0);
}

/* ---- lists ---- */

int32_t rf_rows_first(const rf_row_state *seq) {
    return seq->shape->block_causal ? seq->block_begin : 0;
}

int32_t rf_rows_end(const rf_row_state *seq) {
    return seq->shape->block_causal ? seq->block_end : seq->length;
}

void rf_rows_begin(const rf_row_state *seq, rf_row_plan *plan) {
    rf_row_plan empty = {.rows = plan->rows,
                         .visible_end = rf_rows_end(seq),
                         .visible = plan->visible,
                         .candidates = plan->candidates,
                         .layers = RF_LAYERS_SAME,
                         .drift = {.window = plan->drift.window, .force_from = -1}};
    *plan = empty;
}

void rf_rows_all(const rf_row_state *seq, rf_row_plan *plan) {
    plan->num_rows = 0;
    rf_rows_range(plan, rf_rows_first(seq), rf_rows_end(seq));
    plan->visible_end = rf_rows_end(seq);
    plan->num_visible = 0;
}

void rf_rows_range(rf_row_plan *plan, int32_t begin, int32_t end) {
    for (int32_t row = begin; row < end; row++) plan->rows[plan->num_rows++] = row;
}

void rf_rows_add(rf_row_plan *plan, int32_t row) {
    int32_t at = plan->num_rows;
    while (at > 0 && plan->rows[at - 1] > row) at--;
    if (at > 0 && plan->rows[at - 1] == row) return;
    memmove(plan->rows + at + 1, plan->rows + at, (size_t)(plan->num_rows - at) * sizeof *plan->rows);
    plan->rows[at] = row;
    plan->num_rows++;
}

int32_t rf_rows_first_masks(const rf_row_state *seq, int32_t from, int32_t count, int32_t *out) {
    int32_t num = 0, end = rf_rows_end(seq);
    for (int32_t row = from; row < end && num < count; row++) {
        if (seq->masked[row]) out[num++] = row;
    }
    return num;
}

void rf_rows_candidates(const rf_row_state *seq, rf_row_plan *plan, int32_t begin, int32_t end) {
    for (int32_t row = begin; row < end; row++) {
        if (seq->masked[row]) plan->candidates[plan->num_candidates++] = row;
    }
}

void rf_rows_see(rf_row_plan *plan, const uint8_t *seen, int32_t end) {
    plan->num_visible = 0;
    for (int32_t row = 0; row < end; row++) {
        if (seen[row]) plan->visible[plan->num_visible++] = row;
    }
    plan->visible_end = plan->num_visible > 0 ? plan->visible[plan->num_visible - 1] + 1 : 0;
    if (plan->visible_end == plan->num_visible) plan->num_visible = 0;
}

bool rf_rows_just_committed(const rf_row_state *seq, int32_t row) {
    return !seq->masked[row] && seq->commit_step[row] >= 0 && seq->commit_step[row] == seq->step - 1;
}

bool rf_rows_is_due(const rf_row_memory *memory, const rf_row_state *seq, int64_t interval) {
    if (memory->passes == 0 || seq->block_step == 0) return true;
    return interval > 0 && seq->step - memory->refresh_step >= interval;
}

void rf_rows_inside(const rf_row_state *seq, rf_row_plan *plan, int32_t begin, int32_t end) {
    begin -= seq->shape->shift;
    plan->inside_begin = begin > 0 ? begin : 0;
    plan->inside_end = end < seq->length ? end : seq->length;
}

/* ---- what every plan keeps to ---- */

/* The i-th row that is seen. */
static int32_t visible_at(const rf_row_plan *plan, int32_t i) {
    return plan->num_visible > 0 ? plan->visible[i] : i;
}

static int32_t count_visible(const rf_row_plan *plan) {
    return plan->num_visible > 0 ? plan->num_visible : plan->visible_end;
}

static bool sees_unwritten(const rf_row_plan *plan, const uint8_t *written, int32_t first) {
    int32_t at = 0, num = count_visible(plan);
    for (int32_t i = 0; i < num; i++) {
        int32_t row = visible_at(plan, i);
        while (at < plan->num_rows && plan->rows[at] < row) at++;
        bool computed = at < plan->num_rows && plan->rows[at] == row;
        if (row >= first && !computed && !written[row]) return true;
    }
    return false;
}

static bool writes_outside(const rf_row_plan *plan, int32_t begin, int32_t end) {
    for (int32_t i = 0; i < plan->num_rows; i++) {
        if (plan->rows[i] < begin || plan->rows[i] >= end) return true;
    }
    return false;
}

/* See rf_row_plan.outside_changed. A pass that offers nothing is judged by the range before it: later ones may offer
 * that again. */
static bool outside_changes(rf_row_memory *memory, const rf_row_plan *plan) {
    int32_t begin = plan->inside_begin, end = plan->inside_end, seen = 0, num = count_visible(plan);
    if (begin == end) {
        memory->wrote_outside |= writes_outside(plan, memory->inside_begin, memory->inside_end);
        return true;
    }
    uint32_t hash = 2166136261u; /* FNV-1a of the external rows */
    for (int32_t i = 0; i < num; i++) {
        int32_t row = visible_at(plan, i);
        if (row >= begin && row < end) continue;
        hash = (hash ^ (uint32_t)row) * 16777619u;
        seen++;
    }
    bool writes = writes_outside(plan, begin, end);
    bool changed = memory->wrote_outside || writes || begin != memory->inside_begin || end != memory->inside_end ||
                   seen != memory->seen || hash != memory->seen_hash;
    memory->inside_begin = begin;
    memory->inside_end = end;
    memory->seen = seen;
    memory->seen_hash = hash;
    memory->wrote_outside = writes;
    return changed;
}

void rf_rows_finish(rf_row_memory *memory, uint8_t *written, const rf_row_state *seq, rf_row_plan *plan) {
    int32_t first = rf_rows_first(seq), end = rf_rows_end(seq);
    bool all = false;
    if (plan->num_candidates == 0) {
        rf_rows_candidates(seq, plan, first, seq->block_end);
        if (plan->num_candidates == 0) rf_rows_candidates(seq, plan, first, end);
        all = plan->num_candidates > 0;
    }
    if (all || sees_unwritten(plan, written, first)) {
        rf_rows_all(seq, plan);
        if (plan->layers == RF_LAYERS_VERIFY) plan->verify.store = true;
    }
    for (int32_t i = 0; i < plan->num_rows; i++) written[plan->rows[i]] = 1;
    int32_t renewable = 0, num = count_visible(plan);
    for (int32_t i = 0; i < num; i++) renewable += visible_at(plan, i) >= first;
    plan->refresh = plan->num_rows == renewable;
    if (plan->refresh) memory->refresh_step = seq->step;
    plan->outside_changed = outside_changes(memory, plan);
    memory->passes++;
}

/* ---- refusals ---- */

rf_status rf_rows_setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "policy %s chooses rows of a text that a diffusion language model decodes; %s is no text model",
                   rf_policy_get_def(policy)->name, shape->model ? shape->model : "this");
}

rf_status rf_rows_refuse_block_causal(const rf_policy *policy, const rf_row_shape *shape, rf_error *err) {
    if (!shape->block_causal) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "%s needs a bidirectional model; %s is block-causal: finished blocks are exact there and later ones "
                   "unseen without a policy",
                   rf_policy_get_def(policy)->name, shape->model ? shape->model : "this one");
}
