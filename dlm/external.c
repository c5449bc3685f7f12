/* dlm/external.c - attention reuse (FlashBlock, arXiv 2602.05305): attention over the keys outside a block is kept for
 * every row of the block, f32 and with its log-sum-exp, and joined with attention over the keys inside, which is always
 * computed.
 *
 * A slot is a row's place in the planes; slots from external_slots on take what padding rows compute. Outside keys that
 * are a prefix of the cache (nothing visible behind the block, as in block-causal models) need no list. */
#include <string.h>

#include "dlm/forward_internal.h"

static int32_t num_visible(const rf_text_pass *pass) {
    return (int32_t)rf_text_keys_seen(pass, 0, pass->rows[0]); /* the same for every row */
}

/* Visible keys [begin, end) of the list (or of 0..) are inside. */
typedef struct {
    int32_t num, begin, end;
} key_sides;
static key_sides split_keys(const rf_text_pass *pass) {
    key_sides k = {.num = num_visible(pass)};
    if (pass->visible == NULL) {
        k.begin = pass->inside_begin < k.num ? pass->inside_begin : k.num;
        k.end = pass->inside_end < k.num ? pass->inside_end : k.num;
        return k;
    }
    while (k.begin < k.num && pass->visible[k.begin] < pass->inside_begin) k.begin++;
    for (k.end = k.begin; k.end < k.num && pass->visible[k.end] < pass->inside_end;) k.end++;
    return k;
}

rf_status rf_text_external_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    int32_t slots = s->options.external_slots;
    if (slots == 0) return rf_fail(err, RF_ERR_STATE, "attention reuse in a session without external slots");
    if (pass->inside_begin < 0 || pass->inside_end < pass->inside_begin)
        return rf_fail(err, RF_ERR_ARGUMENT, "keys inside are %d..%d, expected a range", pass->inside_begin,
                       pass->inside_end);
    if (pass->external_slot == NULL || pass->num_fresh < 0 || pass->num_fresh > pass->num_rows ||
        (pass->num_fresh > 0 && pass->fresh == NULL))
        return rf_fail(err, RF_ERR_ARGUMENT, "%d fresh rows of %d, or without their lists", pass->num_fresh,
                       pass->num_rows);
    memset(s->slot_taken, 0, (size_t)slots);
    int32_t next = 0;
    for (int32_t i = 0; i < pass->num_rows; i++) {
        int32_t slot = pass->external_slot[i];
        if (slot < 0 || slot >= slots || s->slot_taken[slot])
            return rf_fail(err, RF_ERR_ARGUMENT, "row %d has external slot %d, expected one of its own in 0..%d", i,
                           slot, slots - 1);
        s->slot_taken[slot] = 1;
        bool fresh = next < pass->num_fresh && pass->fresh[next] == i;
        if (fresh)
            next++;
        else if (!s->slot_filled[slot])
            return rf_fail(err, RF_ERR_ARGUMENT, "row %d reuses external slot %d, which was never filled", i, slot);
    }
    if (next != pass->num_fresh)
        return rf_fail(err, RF_ERR_ARGUMENT, "fresh row %d is row %d of a pass of %d, expected ascending rows", next,
                       pass->fresh[next], pass->num_rows);
    return RF_OK;
}

static int32_t power_of_two(int32_t least, int32_t num) {
    while (least < num) least *= 2;
    return least;
}

void rf_text_external_shape(const rf_text_session *s, const rf_text_pass *pass, rf_text_shape *shape) {
    bool pads = rf_backend_get_kind(s->backend) != RF_BACKEND_CPU;
    key_sides k = split_keys(pass);
    int32_t inside = k.end - k.begin;
    shape->external = 1;
    shape->inside_keys = pads ? power_of_two(32, inside) : inside < 1 ? 1 : inside;
    if (shape->inside_keys > s->options.capacity) shape->inside_keys = s->options.capacity;
    if (pass->num_fresh == 0) return;
    shape->fresh = pads ? power_of_two(1, pass->num_fresh) : pass->num_fresh;
    shape->outside_listed = pass->visible != NULL || k.end < k.num;
    shape->outside_keys = rf_text_bucket_keys(s, k.num - inside);
}

/* Visible keys [from, to). */
static int32_t *put_keys(int32_t *out, const rf_text_pass *pass, int32_t from, int32_t to) {
    for (int32_t j = from; j < to; j++) *out++ = pass->visible ? pass->visible[j] : j;
    return out;
}

void rf_text_external_fill(const rf_text_run *run, const rf_text_pass *pass, int32_t *host) {
    const rf_text_session *s = run->s;
    const rf_text_shape *shape = &run->shape;
    int32_t slots = s->options.external_slots, dump_row = s->options.capacity;
    for (int32_t i = 0; i < shape->rows; i++)
        host[run->at.slots + (size_t)i] = i < pass->num_rows ? pass->external_slot[i] : slots;
    for (int32_t i = 0; i < shape->fresh; i++) {
        bool real = i < pass->num_fresh;
        host[run->at.fresh_rows + (size_t)i] = real ? pass->fresh[i] : 0;
        host[run->at.fresh_slots + (size_t)i] =
            real ? pass->external_slot[pass->fresh[i]] : slots + i - pass->num_fresh;
    }
    key_sides k = split_keys(pass);
    host[run->at.inside_len] = k.end - k.begin;
    host[run->at.outside_len] = k.num - (k.end - k.begin);
    int32_t *inside = host + run->at.inside, *inside_end = inside + shape->inside_keys;
    for (inside = put_keys(inside, pass, k.begin, k.end); inside < inside_end; inside++) *inside = dump_row;
    if (!shape->outside_listed) return;
    int32_t *outside = host + run->at.outside, *outside_end = outside + shape->outside_keys;
    outside = put_keys(put_keys(outside, pass, 0, k.begin), pass, k.end, k.num);
    for (; outside < outside_end; outside++) *outside = dump_row;
}

rf_status rf_text_external_attend(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_shape *shape = &run->shape;
    int64_t slots = rf_text_external_slots(s), heads = s->model->desc.num_q_heads;
    float *out = s->b.external_out + (int64_t)layer * slots * s->q_cols;
    float *lse = s->b.external_lse + (int64_t)layer * slots * heads;
    if (shape->fresh > 0) {
        rf_attention_args fresh = rf_text_attention_args(run, layer, shape->fresh);
        fresh.q_rows = rf_text_at(run, run->at.fresh_rows);
        fresh.kv_len = shape->outside_keys;
        fresh.kv_rows = shape->outside_listed ? rf_text_at(run, run->at.outside) : NULL;
        fresh.kv_lens = rf_text_at(run, run->at.outside_len);
        fresh.out = out;
        fresh.out_is_f32 = true;
        fresh.out_rows = rf_text_at(run, run->at.fresh_slots);
        fresh.lse = lse;
        fresh.lse_slots = slots;
        RF_TRY(s->ops->attention(run->stream, &fresh, err));
    }
    rf_attention_args inside = rf_text_attention_args(run, layer, shape->rows);
    inside.kv_len = shape->inside_keys;
    inside.kv_rows = rf_text_at(run, run->at.inside);
    inside.kv_lens = rf_text_at(run, run->at.inside_len);
    inside.join_out = out;
    inside.join_lse = lse;
    inside.join_rows = rf_text_at(run, run->at.slots);
    inside.join_slots = slots;
    return s->ops->attention(run->stream, &inside, err);
}

void rf_text_external_done(rf_text_session *s, const rf_text_pass *pass) {
    key_sides k = split_keys(pass);
    int64_t layers = s->model->desc.num_layers, inside = k.end - k.begin;
    s->row_layers += pass->num_rows * layers;
    s->key_layers += (pass->num_rows * inside + pass->num_fresh * (k.num - inside)) * layers;
    for (int32_t i = 0; i < pass->num_fresh; i++) s->slot_filled[pass->external_slot[pass->fresh[i]]] = 1;
}
