/* dlm/decode_diffusion.c - the decoding loop of masked and block diffusion models.
 *
 *   while masks remain:  plan = row policy (or every row)      which rows, what they see, which masks may commit
 *                        pass = plan (+ attention reuse)       one forward, statistics of the candidates
 *                        picks = commit rule                   masks become tokens
 *                        end rule                              what an end of text does to the canvas
 * Bidirectional models decode the canvas in blocks left to right (one block: pure diffusion). Block-causal models compute the
 * prompt's whole blocks once; each further block is denoised against the cache, and one pass with its final tokens makes its
 * keys and values final. That pass is fused with the first one of the next block (2 B rows, block mask), which is exact; with attention
 * reuse it stays apart, as published. */
#include <math.h>
#include <string.h>

#include "dlm/decode_internal.h"

enum { STREAM_PRIORITY = 3 }; /* of the counter generator: dlm/commit.c has the others */

typedef struct {
    rf_decoder *d;
    const rf_decode_options *o;
    rf_decode_result *r;
    rf_decode_progress progress;
    void *user;
    rf_error *err;

    rf_row_shape shape;
    rf_row_state state;
    rf_row_plan plan;
    int32_t prompt, length, canvas; /* canvas: tokens asked for (block models round the rows up to whole blocks) */
    int32_t block, steps_per_block, num_steps;
    int32_t step;       /* passes so far */
    int32_t num_masked; /* in the canvas */
    int32_t first_end;  /* lowest position of a committed end of text, INT32_MAX */
    int32_t num_dirty;  /* attention reuse: rows committed since everything was refreshed */
    int32_t filled_to;  /* block models: rows below are final in the cache */
    bool scaled;        /* confidence is of softmax(z / T), as Dream's and SDAR's samplers have it */
    bool cancelled;
} loop;

static void begin_plan(loop *l) {
    rf_decoder *d = l->d;
    memset(&l->plan, 0, sizeof l->plan);
    l->plan.rows = d->plan_rows;
    l->plan.visible = d->plan_visible;
    l->plan.candidates = d->plan_candidates;
    l->plan.drift.window = d->plan_window;
    l->plan.drift.force_from = -1;
    l->plan.verify.full_layers = 1;
    l->plan.visible_end = l->length;
}

static void candidates_in(loop *l, int32_t begin, int32_t end) {
    l->plan.num_candidates = 0;
    for (int32_t i = begin; i < end; i++)
        if (l->d->masked[i]) l->plan.candidates[l->plan.num_candidates++] = i;
}

/* No policy: every row, every pass. */
static void plan_all(loop *l) {
    memcpy(l->plan.rows, l->d->positions, (size_t)l->length * sizeof(int32_t));
    l->plan.num_rows = l->length;
    l->plan.refresh = true;
    candidates_in(l, l->state.block_begin, l->state.block_end);
}

static void plan_bidirectional(loop *l) {
    rf_decoder *d = l->d;
    rf_row_state *s = &l->state;
    s->length = l->length;
    s->step = l->step;
    begin_plan(l);
    if (d->row_policy)
        rf_policy_get_def(d->row_policy)->rows->plan(d->row_policy, d->policy_state, s, &l->plan);
    else
        plan_all(l);
    /* Dream: the row in front of a candidate predicts it */
    if (l->shape.shift == 1)
        for (int32_t i = 0; i < l->plan.num_candidates; i++) {
            const int32_t row = l->plan.candidates[i] - 1;
            if (row < 0) continue;
            rf_rows_add(&l->plan, row);
            if (l->plan.num_visible > 0) { /* computed rows are seen */
                int32_t at = l->plan.num_visible;
                while (at > 0 && l->plan.visible[at - 1] > row) at--;
                if (at > 0 && l->plan.visible[at - 1] == row) continue;
                memmove(l->plan.visible + at + 1, l->plan.visible + at,
                        (size_t)(l->plan.num_visible - at) * sizeof(int32_t));
                l->plan.visible[at] = row;
                l->plan.num_visible++;
            }
        }
}

/* Index of `row` in plan.rows at or after `from`; plans list every row that is asked for. */
static int32_t index_of(const rf_row_plan *plan, int32_t row, int32_t from) {
    while (from < plan->num_rows && plan->rows[from] < row) from++;
    return from;
}

/* FlashBlock: which rows compute external attention, which take what their slot holds. */
static void reuse_attention(loop *l, rf_text_pass *p, bool may_reuse) {
    rf_decoder *d = l->d;
    const rf_row_plan *plan = &l->plan;
    const int32_t begin = plan->inside_begin, end = plan->inside_end;
    if (l->o->reuse != RF_REUSE_FLASHBLOCK || begin >= end || end - begin > d->num_slots) return;
    for (int32_t i = 0; i < plan->num_rows; i++)
        if (plan->rows[i] < begin || plan->rows[i] >= end)
            return; /* a pass over more than the inside: nothing to reuse */
    if (begin == 0 && end >= l->length) return;
    const bool all = !may_reuse || plan->outside_changed || plan->refresh || l->num_dirty >= l->o->reuse_refresh;
    if (all) {
        l->num_dirty = 0;
        for (int32_t i = 0; i < d->num_slots; i++) d->slot_position[i] = -1;
    }
    int32_t num_fresh = 0;
    for (int32_t i = 0; i < plan->num_rows; i++) {
        const int32_t row = plan->rows[i], slot = row - begin;
        const bool just_committed = l->o->reuse_refresh_rows && l->step > 0 && d->commit_step[row] == l->step - 1;
        d->slots[i] = slot;
        if (all || just_committed || d->slot_position[slot] != row) {
            d->slot_position[slot] = row;
            d->fresh[num_fresh++] = i;
        }
    }
    p->external = RF_EXTERNAL_USE;
    p->inside_begin = begin;
    p->inside_end = end;
    p->external_slot = d->slots;
    p->fresh = d->fresh;
    p->num_fresh = num_fresh;
    l->r->external_rows_fresh += num_fresh;
    l->r->external_rows_reused += plan->num_rows - num_fresh;
}

static void layer_rules(loop *l, rf_text_pass *p) {
    rf_decoder *d = l->d;
    const rf_row_plan *plan = &l->plan;
    if (plan->layers == RF_LAYERS_DRIFT) {
        p->layers = RF_PASS_DRIFT;
        p->drift.threshold = plan->drift.threshold;
        p->drift.over_heads = plan->drift.over_heads;
        for (int i = 0; i < l->shape.num_layers; i++) /* what an end of text cut off is not tracked any more */
            if (d->tracked[i] >= l->length) d->tracked[i] = -1;
        p->drift.tracked = d->tracked;
        p->drift.force_from = plan->drift.force_from;
        p->drift.decoded = d->decoded;
        for (int32_t i = 0; i < d->capacity; i++) d->decoded[i] = i < l->length && !d->masked[i];
        for (int32_t i = 0, at = 0; i < plan->drift.num_window; i++) {
            at = index_of(plan, plan->drift.window[i], at);
            plan->drift.window[i] = at;
        }
        p->drift.window = plan->drift.window;
        p->drift.num_window = plan->drift.num_window;
        p->drift.all_rows = d->positions;
        p->drift.all_tokens = d->tokens;
        p->drift.num_all = l->length;
    } else if (plan->layers == RF_LAYERS_VERIFY) {
        p->layers = RF_PASS_VERIFY;
        p->verify.ratio = plan->verify.ratio;
        p->verify.begin = plan->verify.begin;
        p->verify.end = plan->verify.end;
        p->verify.store = plan->verify.store;
        p->verify.full_layers = plan->verify.full_layers;
    }
}

/* One forward of the plan; statistics of the candidates in d->stats. */
static rf_status run_plan(loop *l, bool may_reuse) {
    rf_decoder *d = l->d;
    const rf_decode_options *o = l->o;
    const rf_row_plan *plan = &l->plan;
    const int32_t n = plan->num_rows, h = plan->num_candidates, batch = d->has_cfg ? 2 : 1;
    rf_text_pass p = rf_text_pass_default();
    int32_t visible_end[2] = {plan->visible_end, plan->visible_end};
    for (int32_t b = 0; b < batch; b++) {
        for (int32_t i = 0; i < n; i++) {
            const int32_t row = plan->rows[i];
            d->pass_rows[b * n + i] = row;
            /* guidance: the unconditional sequence comes first, its prompt is masks */
            d->pass_tokens[b * n + i] =
                d->has_cfg && b == 0 && row < l->prompt ? d->model->desc.mask_id : d->tokens[row];
        }
        for (int32_t i = 0, at = 0; i < h; i++) {
            const int32_t position = plan->candidates[i], row = position - l->shape.shift;
            at = index_of(plan, row < 0 ? 0 : row, at);
            d->head_rows[b * h + i] = at;
            d->head_keys[b * h + i] = position;
        }
    }
    p.num_rows = n;
    p.rows = d->pass_rows;
    p.tokens = d->pass_tokens;
    p.visible_end = visible_end;
    if (plan->num_visible > 0) {
        p.visible = plan->visible;
        p.num_visible = plan->num_visible;
    }
    if (l->shape.block_causal && plan->rows[0] / l->block != plan->rows[n - 1] / l->block) {
        p.mask = RF_MASK_BLOCK_CAUSAL;
        p.mask_block = l->block;
    }
    p.num_head_rows = h;
    p.head_rows = d->head_rows;
    p.head_keys = d->head_keys;
    p.keep_logits = h > 0 && rf_decode_needs_logits(o);
    p.seed = o->seed;
    p.step = l->step;
    if (o->temperature > 0.0 && !p.keep_logits) {
        /* argmax(z - T g) is a draw from softmax(z / T) either way; the confidence is of z (LLaDA) or of z / T */
        p.temperature = (float)(l->scaled ? 1.0 : o->temperature);
        p.logit_scale = (float)(l->scaled ? 1.0 / o->temperature : 1.0);
    }
    if (!o->allow_mask) {
        p.bans[0] = d->model->desc.mask_id;
        p.num_bans = 1;
    }
    if (d->has_cfg) p.cfg = (float)(o->cfg_scale + 1.0);
    layer_rules(l, &p);
    reuse_attention(l, &p, may_reuse);
    const double begun = rf_decode_now_ms();
    RF_TRY(rf_text_session_forward(d->session, &p, l->err));
    l->r->refreshes += plan->refresh;
    if (p.layers == RF_PASS_DRIFT) {
        RF_TRY(rf_text_session_read_drift(d->session, d->next_tracked, NULL, &l->state.expanded_at, l->err));
        memcpy(d->tracked, d->next_tracked, (size_t)l->shape.num_layers * sizeof *d->tracked);
    }
    if (p.keep_logits)
        for (int32_t i = 0; i < h; i++)
            RF_TRY(rf_decode_sample(d, o, i, l->step, plan->candidates[i], 0, &d->stats[i], l->err));
    else if (h > 0)
        RF_TRY(rf_text_session_read_stats(d->session, d->stats, l->err));
    l->r->decode_ms += rf_decode_now_ms() - begun;
    return RF_OK;
}

static float confidence_of(const loop *l, const rf_token_stats *s, int32_t position) {
    switch (l->o->confidence) {
    case RF_CONFIDENCE_PROB: return s->prob;
    case RF_CONFIDENCE_MARGIN: return s->margin;
    case RF_CONFIDENCE_NEG_ENTROPY: return -s->entropy;
    case RF_CONFIDENCE_RANDOM: return l->d->priority[position];
    }
    return 0.0f;
}

static void commit_token(loop *l, int32_t position, int32_t token) {
    rf_decoder *d = l->d;
    d->tokens[position] = token;
    if (token == d->model->desc.mask_id) return; /* allow_mask: it stays one */
    d->masked[position] = 0;
    d->commit_step[position] = l->step;
    l->num_masked--;
    l->num_dirty++;
    if (position < l->first_end && rf_decode_is_end(d, l->o, token)) l->first_end = position;
}

/* What an end of text does to the canvas behind it. */
static void apply_end(loop *l) {
    rf_decoder *d = l->d;
    if (l->first_end == INT32_MAX) return;
    if (l->o->end == RF_END_TRUNCATE && l->first_end + 1 < l->length) {
        for (int32_t i = l->first_end + 1; i < l->length; i++) l->num_masked -= d->masked[i];
        l->length = l->first_end + 1;
    } else if (l->o->end == RF_END_FILL)
        for (int32_t i = l->first_end + 1; i < l->length; i++)
            if (d->masked[i]) commit_token(l, i, d->tokens[l->first_end]);
}

static bool masks_before(const loop *l, int32_t end) {
    for (int32_t i = l->prompt; i < end; i++)
        if (l->d->masked[i]) return true;
    return false;
}

static bool is_done(const loop *l) {
    if (l->cancelled || l->num_masked == 0) return true;
    return l->o->end == RF_END_STOP && l->first_end != INT32_MAX && !masks_before(l, l->first_end);
}

/* GUIDED: the draft of all candidates is judged left to right. Returns how many of the candidates, in order of position, commit. */
static rf_status guided(loop *l, rf_candidate *c, int32_t num, int32_t *out) {
    rf_decoder *d = l->d;
    uint8_t *pending = d->decoded; /* scratch of the same size; drift plans fill it anew */
    memset(pending, 0, (size_t)d->capacity);
    for (int32_t i = 0; i < num; i++) {
        d->tokens[c[i].position] = c[i].token;
        pending[c[i].position] = 1;
    }
    /* masks that are no candidates end the draft */
    int32_t end = c[num - 1].position + 1;
    for (int32_t i = c[0].position; i < end; i++)
        if (d->masked[i] && !pending[i]) end = i;
    int32_t accepted = 0;
    const double begun = rf_decode_now_ms();
    RF_TRY(rf_guide_accept(d->guide, l->o, d->tokens, pending, c[0].position, end, &accepted, l->err));
    l->r->guide_ms += rf_decode_now_ms() - begun;
    int32_t n = 0;
    for (int32_t i = 0; i < num; i++) {
        if (c[i].position < accepted)
            n++;
        else
            d->tokens[c[i].position] = d->model->desc.mask_id;
    }
    *out = n;
    return RF_OK;
}

static rf_status commit(loop *l, int32_t count, double transfer) {
    rf_decoder *d = l->d;
    const rf_row_plan *plan = &l->plan;
    const int32_t num = plan->num_candidates;
    for (int32_t i = 0; i < num; i++) {
        const int32_t position = plan->candidates[i];
        const float confidence = confidence_of(l, &d->stats[i], position);
        d->confidence[position] = confidence;
        d->candidates[i] = (rf_candidate){position, d->stats[i].id, confidence, d->stats[i].entropy};
    }
    int32_t n = rf_commit_select(l->o, count, transfer, l->step, d->candidates, num);
    if (l->o->commit == RF_COMMIT_GUIDED && num > 0) RF_TRY(guided(l, d->candidates, num, &n));
    for (int32_t i = 0; i < n; i++) commit_token(l, d->candidates[i].position, d->candidates[i].token);
    apply_end(l);

    l->state.num_committed = 0;
    for (int32_t i = l->prompt; i < l->length; i++)
        if (d->commit_step[i] == l->step) d->committed[l->state.num_committed++] = i;
    l->state.committed = d->committed;
    if (l->state.order) {
        int32_t left = 0;
        for (int32_t i = 0; i < l->state.num_order; i++)
            if (d->order[i] < l->length && d->masked[d->order[i]]) d->order[left++] = d->order[i];
        l->state.num_order = left;
    }
    RF_TRY(rf_decode_trace(
        d, l->o, l->err,
        "pass=%d block=%d rows=%d visible=%d candidates=%d committed=%d refresh=%d expanded=%d left=%d", (int)l->step,
        (int)l->state.block_index, (int)plan->num_rows,
        plan->num_visible > 0 ? (int)plan->num_visible : (int)plan->visible_end, (int)num, (int)l->state.num_committed,
        plan->refresh ? 1 : 0, (int)l->state.expanded_at, (int)l->num_masked));
    if (l->progress) {
        int32_t *changed = d->pass_rows; /* free until the next pass */
        int32_t num_changed = 0;
        for (int32_t i = 0; i < l->state.num_committed; i++)
            if (d->committed[i] - l->prompt < l->canvas) changed[num_changed++] = d->committed[i] - l->prompt;
        const int32_t shown = l->length - l->prompt < l->canvas ? l->length - l->prompt : l->canvas;
        if (!l->progress(l->user, d->tokens + l->prompt, shown, changed, num_changed)) l->cancelled = true;
    }
    l->step++;
    return RF_OK;
}

static int32_t masks_in(const loop *l, int32_t begin, int32_t end) {
    int32_t n = 0;
    for (int32_t i = begin; i < end; i++) n += l->d->masked[i];
    return n;
}

/* Dream's times: float32, as torch.linspace(1, eps, steps + 1) rounds them. */
static float dream_time(int32_t i, int32_t steps) {
    const float eps = 1e-3f, gap = (eps - 1.0f) / (float)steps;
    return i < (steps + 1) / 2 ? 1.0f + gap * (float)i : eps - gap * (float)(steps - i);
}

static rf_status decode_block(loop *l, int32_t begin, int32_t end) {
    rf_row_state *s = &l->state;
    s->block_begin = begin;
    s->block_step = 0;
    const int32_t masks = masks_in(l, begin, end);
    for (int32_t t = 0;; t++) {
        s->block_end = end < l->length ? end : l->length;
        const int32_t left = masks_in(l, begin, s->block_end);
        if (left == 0 || is_done(l)) return RF_OK;
        int32_t count = 1;
        double transfer = 1.0;
        if (l->o->commit == RF_COMMIT_SCHEDULE || l->o->commit == RF_COMMIT_ORIGIN) {
            const bool last = t >= l->num_steps - 1;
            const float ratio = last ? 1.0f : 1.0f - dream_time(t + 1, l->num_steps) / dream_time(t, l->num_steps);
            count = last ? left : (int32_t)((float)left * ratio);
            transfer = ratio;
            if (l->o->commit == RF_COMMIT_SCHEDULE && count == 0) continue; /* nothing would change */
        } else if (l->o->commit == RF_COMMIT_TOPN || l->o->commit == RF_COMMIT_SEQUENTIAL) {
            if (t >= l->steps_per_block && !l->o->allow_mask)
                count = left;
            else if (t >= l->steps_per_block)
                return RF_OK; /* masks that were predicted stay */
            else
                count = rf_commit_share(masks, l->steps_per_block, t);
            if (count == 0) continue;
        }
        const double begun = rf_decode_now_ms();
        plan_bidirectional(l);
        l->r->plan_ms += rf_decode_now_ms() - begun;
        if (l->plan.num_candidates == 0 || l->plan.num_rows == 0)
            return rf_fail(l->err, RF_ERR_STATE, "pass %d: row policy %s plans nothing while %d masks are left",
                           (int)l->step, l->d->row_policy ? rf_policy_get_def(l->d->row_policy)->name : "none",
                           (int)left);
        RF_TRY(run_plan(l, s->block_step > 0));
        RF_TRY(commit(l, count, transfer));
        s->block_step++;
    }
}

static rf_status run_bidirectional(loop *l) {
    for (int32_t begin = l->prompt; begin < l->length && !is_done(l); begin += l->block, l->state.block_index++)
        RF_TRY(decode_block(l, begin, begin + l->block));
    return RF_OK;
}

/* --- block-causal -------------------------------------------------------------------------------------------------------- */

/* Rows [begin, end) against everything below end. */
static void plan_rows_to(loop *l, int32_t begin, int32_t end) {
    begin_plan(l);
    memcpy(l->plan.rows, l->d->positions + begin, (size_t)(end - begin) * sizeof(int32_t));
    l->plan.num_rows = end - begin;
    l->plan.visible_end = end;
}

static rf_status fill(loop *l, int32_t end) {
    const int32_t most = l->o->prefill_chunk > l->block ? l->o->prefill_chunk / l->block * l->block : l->block;
    while (l->filled_to < end) {
        const int32_t to = end - l->filled_to < most ? end : l->filled_to + most;
        plan_rows_to(l, l->filled_to, to);
        RF_TRY(run_plan(l, false));
        l->filled_to = to;
    }
    return RF_OK;
}

static rf_status run_blocks(loop *l) {
    rf_row_state *s = &l->state;
    const int32_t first = l->prompt / l->block * l->block;
    const bool fuses = l->o->reuse == RF_REUSE_NONE;
    RF_TRY(fill(l, first));
    l->r->prefill_ms = rf_decode_now_ms() - l->d->run_started_ms;
    l->r->decode_ms = 0.0; /* prefill passes counted themselves */
    for (int32_t begin = first; begin < l->length && !is_done(l); begin += l->block, s->block_index++) {
        const int32_t end = begin + l->block, masks = masks_in(l, begin, end);
        s->block_begin = begin;
        s->block_end = end;
        s->block_step = 0;
        if (!fuses) RF_TRY(fill(l, begin));
        for (int32_t t = 0; !is_done(l); t++) {
            const int32_t left = masks_in(l, begin, end < l->length ? end : l->length);
            if (left == 0) break;
            int32_t count = rf_commit_share(l->block, l->steps_per_block, t);
            if (t >= l->steps_per_block) count = masks;
            plan_rows_to(l, l->filled_to, end); /* with the block before, where that is not final yet */
            candidates_in(l, begin, end < l->length ? end : l->length);
            if (l->filled_to == begin) {
                l->plan.inside_begin = begin;
                l->plan.inside_end = end;
            }
            RF_TRY(run_plan(l, s->block_step > 0));
            l->filled_to = begin;
            RF_TRY(commit(l, count < 1 ? 1 : count, 1.0));
            s->block_step++;
        }
    }
    return RF_OK;
}

/* --- a run --------------------------------------------------------------------------------------------------------------- */

static void random_order(loop *l) {
    rf_decoder *d = l->d;
    int32_t n = 0;
    for (int32_t i = l->prompt; i < l->length; i++) {
        d->priority[i] = (float)rf_commit_uniform(l->o->seed, STREAM_PRIORITY, 0, i);
        int32_t at = n++;
        /* in the order in which they will commit: block by block, most urgent first */
        const int32_t block = (i - l->prompt) / l->block;
        for (; at > 0 && (d->order[at - 1] - l->prompt) / l->block == block &&
               d->priority[d->order[at - 1]] < d->priority[i];
             at--)
            d->order[at] = d->order[at - 1];
        d->order[at] = i;
    }
    l->state.order = d->order;
    l->state.num_order = n;
}

static void finish(loop *l) {
    rf_decoder *d = l->d;
    rf_decode_result *r = l->r;
    r->num_all = l->length - l->prompt < l->canvas ? l->length - l->prompt : l->canvas;
    int32_t n = 0;
    while (n < r->num_all && !d->masked[l->prompt + n] && !rf_decode_is_end(d, l->o, d->tokens[l->prompt + n])) n++;
    r->num_tokens = n;
    r->ended = n < r->num_all;
}

rf_status rf_decode_diffusion(rf_decoder *d, const rf_decode_options *o, int32_t prompt, rf_decode_progress progress,
                              void *user, rf_decode_result *r, rf_error *err) {
    const rf_text_desc *desc = &d->model->desc;
    const bool blocks = desc->attention == RF_TEXT_BLOCK_CAUSAL;
    loop l = {.d = d, .o = o, .r = r, .progress = progress, .user = user, .err = err, .prompt = prompt};
    l.canvas = o->max_new;
    l.block = o->block > 0 ? o->block : blocks ? desc->block : o->max_new;
    l.length = prompt + o->max_new;
    l.num_steps = o->steps > 0 ? o->steps : o->max_new;
    l.steps_per_block = blocks ? (o->steps > 0 ? o->steps : l.block) : l.num_steps / (o->max_new / l.block);
    l.scaled = blocks || o->commit == RF_COMMIT_SCHEDULE || o->commit == RF_COMMIT_ORIGIN;
    if (blocks) l.length = (l.length + l.block - 1) / l.block * l.block;
    l.first_end = INT32_MAX;
    l.num_masked = l.length - prompt;
    for (int32_t i = 0; i < l.length; i++) {
        d->masked[i] = i >= prompt;
        d->commit_step[i] = i >= prompt ? RF_COMMIT_NEVER : RF_COMMIT_PROMPT;
        d->confidence[i] = -1.0f;
        if (i >= prompt) d->tokens[i] = desc->mask_id;
    }
    for (int i = 0; i < desc->num_layers; i++) d->tracked[i] = -1;
    for (int32_t i = 0; i < d->capacity; i++) d->slot_position[i] = -1;
    l.shape = (rf_row_shape){.model = desc->family,
                             .prompt = prompt,
                             .length = l.length,
                             .block = l.block,
                             .block_causal = blocks,
                             .shift = desc->shift,
                             .num_layers = desc->num_layers,
                             .order_is_random = o->confidence == RF_CONFIDENCE_RANDOM && o->commit == RF_COMMIT_TOPN,
                             .force = o->force_policy};
    l.state = (rf_row_state){.shape = &l.shape,
                             .tokens = d->tokens,
                             .masked = d->masked,
                             .commit_step = d->commit_step,
                             .confidence = d->confidence,
                             .tracked = d->tracked,
                             .committed = d->committed,
                             .expanded_at = -1};
    if (l.shape.order_is_random) random_order(&l);
    if (d->row_policy) {
        const rf_row_rules *rules = rf_policy_get_def(d->row_policy)->rows;
        memset(d->policy_state, 0, d->policy_state_bytes);
        if (rules->check) RF_TRY(rules->check(d->row_policy, &l.shape, err));
    }
    RF_TRY(blocks ? run_blocks(&l) : run_bidirectional(&l));
    finish(&l);
    return RF_OK;
}
