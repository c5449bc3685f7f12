/* caching/kv/demote.c - classes of tokens in few bits: KIVI's blocks, ZipCache's two classes, MiKV's and ARKV's ranks, MiniCache's
 * exceptions. */
#include "caching/kv/demote.h"

#include <math.h>
#include <string.h>

#include "caching/kv/book.h"
#include "caching/kv/kv_internal.h"

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}
static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

bool rf_kv_packs(const rf_kv_rule *r) {
    return r->score != RF_KV_SCORE_NONE && (r->action == RF_KV_DEMOTE || r->action == RF_KV_SHARE);
}
bool rf_kv_demotes_blocks(const rf_kv_rule *r) {
    return r->bits < 16;
}
bool rf_kv_packs_under_budget(const rf_kv_rule *r) {
    return r->action == RF_KV_DEMOTE && !rf_kv_demotes_blocks(r);
}

/* ---- what goes together ---- */

static rf_status refuse(const rf_kv_rule *r, const char *what, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED, "KV policy %s: %s", r->method[0] ? r->method : "of parts", what);
}

static bool packs_at(int32_t bits) {
    return bits == 2 || bits == 4 || bits == 8;
}

rf_status rf_kv_demote_check(const rf_kv_rule *r, rf_error *err) {
    const char *name = r->method[0] ? r->method : "of parts";
    if (r->position != RF_KV_POSITION_ORIGINAL)
        return refuse(r, "keys are packed as they are turned: position=original", err);
    if (r->value != RF_KV_VALUE_NONE || r->crush_share > 0 || r->sentence_penalty > 0 || r->redundancy > 0 ||
        r->skip_layers > 0 || r->heads == RF_KV_HEADS_LIST || r->block > 0 || rf_kv_rule_thins(r))
        return refuse(r,
                      "action=demote and action=share go without value terms, crushing, penalties, block, tsp_share, "
                      "skip_layers and heads=list",
                      err);
    if (r->action == RF_KV_SHARE) {
        if (r->score != RF_KV_SCORE_POSITION || r->schedule != RF_KV_AT_PREFILL || r->alloc != RF_KV_ALLOC_UNIFORM)
            return refuse(r, "action=share wants score=position,schedule=prefill,alloc=uniform", err);
        return RF_OK;
    }
    bool attention = r->score == RF_KV_SCORE_ATTENTION, blocks = rf_kv_demotes_blocks(r);
    if (!attention && r->score != RF_KV_SCORE_POSITION)
        return refuse(r, "action=demote wants score=position or score=attention", err);
    if (r->schedule == RF_KV_AT_HIGH) return refuse(r, "action=demote goes with schedule=prefill, step or every", err);
    if (attention && (r->queries == RF_KV_QUERIES_DRAFTED || r->queries == RF_KV_QUERIES_PSEUDO ||
                      r->queries == RF_KV_QUERIES_EXTERNAL || r->group == RF_KV_OVER_NONE ||
                      r->reduce == RF_KV_REDUCE_DECAY || r->reduce == RF_KV_REDUCE_MAX))
        return refuse(r,
                      "action=demote wants attention of all, window, last or probes, reduced by sum, mean, visible "
                      "or meanvar over a group",
                      err);
    if (r->pool != RF_KV_POOL_NONE && r->pool_size % 2 == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: pool_size=%d is not odd", name, r->pool_size);
    if (!packs_at(r->low_bits) && !(blocks && !attention))
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: low_bits=%d, expected 2, 4 or 8", name, r->low_bits);
    if (r->fp8 && (blocks || r->low_bits != 8))
        return refuse(r, "fp8 is of the packed class of ranked rules: bits=16,low_bits=8", err);
    if (blocks) {
        if (!packs_at(r->bits))
            return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: bits=%d, expected 2, 4, 8 or 16 (not packed)", name,
                           r->bits);
        if (!attention && (r->residual < RF_KV_DEMOTE_BLOCK || r->residual % RF_KV_DEMOTE_BLOCK != 0))
            return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: residual=%d, expected a multiple of %d", name,
                           r->residual, RF_KV_DEMOTE_BLOCK);
        if (r->alloc != RF_KV_ALLOC_UNIFORM || r->sinks != 0 || r->recents != 0 || r->last)
            return refuse(r,
                          "blocks of few bits (bits below 16) protect nothing and share out nothing: alloc=uniform, "
                          "without sinks, recents and last",
                          err);
        return RF_OK;
    }
    if (r->bits != 16)
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: bits=%d, expected 2, 4, 8 or 16 (not packed)", name,
                       r->bits);
    if (!attention) return refuse(r, "bits=16 keeps the best raw: score=attention", err);
    bool window = r->queries == RF_KV_QUERIES_WINDOW;
    if (r->alloc != RF_KV_ALLOC_UNIFORM && !(r->alloc == RF_KV_ALLOC_CAKE && window))
        return refuse(r, "action=demote goes with alloc=uniform, or alloc=cake and queries=window", err);
    return RF_OK;
}

/* ---- how many ---- */

static int32_t window_of(const rf_kv_rule *r) {
    return r->queries == RF_KV_QUERIES_WINDOW && !r->open_window ? r->window : 0;
}

static int32_t high_of(const rf_kv_rule *r, int32_t seen) {
    return r->score == RF_KV_SCORE_POSITION ? seen : (int32_t)floor(r->high_share * (double)seen + 0.5);
}

int32_t rf_kv_demote_raw(const rf_kv_rule *r, int32_t seen, int32_t budget, double share) {
    int32_t cap = budget > 0 ? min32(budget, seen) : seen, window = min32(window_of(r), cap);
    int32_t raw = window + (int32_t)floor(r->high_share * share * (double)(cap - window) + 0.5);
    return max32(1, raw);
}

rf_kv_demote_room rf_kv_demote_rooms(const rf_kv_rule *r, const rf_kv_shape *shape, int32_t budget) {
    int64_t growth = rf_kv_growth(r, shape), whole = (int64_t)shape->max_prompt + shape->max_new;
    if (growth > shape->max_new) growth = shape->max_new;
    int32_t seen = (int32_t)(whole < INT32_MAX ? whole : INT32_MAX);
    int32_t packed = r->schedule == RF_KV_AT_PREFILL ? shape->max_prompt : seen;
    rf_kv_demote_room room = {0, 0, 0};
    if (rf_kv_demotes_blocks(r)) {
        int32_t unit = r->score == RF_KV_SCORE_POSITION ? r->residual : RF_KV_DEMOTE_BLOCK, high = high_of(r, packed);
        room.raw = (r->score == RF_KV_SCORE_POSITION ? unit - 1 : 2 * (unit - 1)) + growth;
        room.high = high / unit * unit;
        room.low = (packed - high) / unit * unit;
    } else {
        int32_t cap = budget > 0 ? min32(budget, seen) : seen;
        room.raw = rf_kv_demote_raw(r, seen, budget, 1.0) + growth;
        room.low = r->alloc == RF_KV_ALLOC_CAKE ? cap - min32(window_of(r), cap) : cap - room.raw + growth;
        room.low += 1; /* what is rounded up for fewer tokens */
        if (room.low > packed) room.low = packed;
        if (room.low < 1) room.low = 1;
    }
    if (room.raw > whole) room.raw = whole;
    return room;
}

bool rf_kv_demote_due(const rf_kv_rule *r, int32_t since, int32_t raw) {
    if (r->schedule == RF_KV_AT_PREFILL) return false;
    if (r->schedule == RF_KV_AT_EVERY) return since >= max32(r->every, 1);
    return !rf_kv_demotes_blocks(r) || raw >= (r->score == RF_KV_SCORE_POSITION ? r->residual : RF_KV_DEMOTE_BLOCK);
}

/* ---- which ---- */

void rf_kv_demote_blocks(const rf_kv_rule *r, int32_t seen, int32_t high, int32_t low, const float *score, int32_t n,
                         uint8_t *next, int32_t *work) {
    memset(next, RF_KV_RAW, (size_t)n);
    if (r->score == RF_KV_SCORE_POSITION) {
        memset(next, RF_KV_HIGH, (size_t)(n / r->residual * r->residual));
        return;
    }
    int32_t unit = RF_KV_DEMOTE_BLOCK, best = max32(0, high_of(r, seen) - high) / unit * unit;
    int32_t worst = max32(0, seen - high_of(r, seen) - low) / unit * unit;
    best = min32(best, n / unit * unit);
    worst = min32(worst, (n - best) / unit * unit);
    if (worst > 0) {
        rf_kv_top(work, score, n, n - worst);
        memset(next, RF_KV_LOW, (size_t)n);
        for (int32_t i = 0; i < n - worst; i++) next[work[i]] = RF_KV_RAW;
    }
    if (best == 0) return;
    rf_kv_top(work, score, n, best);
    for (int32_t i = 0; i < best; i++) next[work[i]] = RF_KV_HIGH;
}

void rf_kv_demote_ranked(const rf_kv_rule *r, int32_t seen, int32_t budget, double share, const uint8_t *now,
                         float *score, int32_t n, uint8_t *next, void *work) {
    int32_t raw = rf_kv_demote_raw(r, seen, budget, share), *keep = work;
    float *of_raw = (float *)(keep + n);
    int32_t front = min32(r->sinks, raw), back = max32(r->recents < 0 ? (raw - front) / 2 : r->recents, window_of(r));
    back = min32(r->last ? max32(back, 1) : back, raw - front);
    memcpy(next, now, (size_t)n);
    if (budget > 0 && n > budget) {
        int32_t num = rf_kv_choose(keep, score, n, budget, front, back);
        memset(next, RF_KV_GONE, (size_t)n);
        for (int32_t i = 0; i < num; i++) next[keep[i]] = now[keep[i]];
    }
    int32_t num = 0;
    for (int32_t i = 0; i < n; i++)
        if (next[i] == RF_KV_RAW) of_raw[num++] = score[i];
    if (num <= raw) return;
    num = rf_kv_choose(keep, of_raw, num, raw, front, back);
    for (int32_t i = 0, at = 0, kept = 0; i < n; i++) {
        if (next[i] != RF_KV_RAW) continue;
        bool stays = kept < num && keep[kept] == at++;
        kept += stays;
        if (!stays) next[i] = RF_KV_LOW;
    }
}

/* ---- scores ---- */

rf_status rf_kv_demote_scores(const rf_kv_rule *r, const rf_kv_shape *shape, int layer, int32_t num_tokens,
                              const rf_kv_stats *stats, float *out, float *scratch, rf_error *err) {
    rf_kv_rule plain = *r;
    plain.sinks = plain.recents = 0; /* protected where classes are chosen */
    plain.last = false;
    if (plain.reduce == RF_KV_REDUCE_VISIBLE) plain.reduce = RF_KV_REDUCE_SUM;
    return rf_kv_prefill_scores(&plain, shape, layer, num_tokens, 0, stats, out, scratch, err);
}

double rf_kv_demote_preference(const rf_kv_rule *r, const rf_kv_shape *shape, int32_t num_tokens,
                               const rf_kv_stats *stats) {
    return r->alloc == RF_KV_ALLOC_CAKE ? rf_kv_preference(r, shape, num_tokens, stats) : 1.0;
}

void rf_kv_demote_probability(const rf_kv_rule *r, const rf_kv_shape *shape, int head, int32_t n,
                              const rf_kv_stats *stats, float *out) {
    rf_kv_step_probability(r, shape, head, n, stats, out);
}

float rf_kv_demote_follow(const rf_kv_rule *r, float score, float p) {
    return r->queries == RF_KV_QUERIES_ALL || r->queries == RF_KV_QUERIES_PROBES ? score + p : p;
}

float rf_kv_demote_compared(const rf_kv_rule *r, float score, int32_t seen, int32_t position) {
    return r->reduce == RF_KV_REDUCE_VISIBLE ? score / (float)(seen - position) : score;
}

/* ---- neighbouring layers ---- */

bool rf_kv_share_earlier(int num_layers, int layer) {
    int first = num_layers / 2;
    return layer >= first && (layer - first) % 2 == 0 && layer + 1 < num_layers;
}
bool rf_kv_share_later(int num_layers, int layer) {
    return layer > 0 && rf_kv_share_earlier(num_layers, layer - 1);
}

int32_t rf_kv_share_kept(const rf_kv_rule *r, const float *key_angle, const float *value_angle, int32_t n,
                         uint8_t *kept, int32_t *work) {
    int32_t num = min32((int32_t)ceil(r->high_share * (double)n), n), count = 0;
    memset(kept, 0, (size_t)n);
    for (int plane = 0; plane < 2 && num > 0; plane++) {
        rf_kv_top(work, plane ? value_angle : key_angle, n, num);
        for (int32_t i = 0; i < num; i++) kept[work[i]] = 1;
    }
    for (int32_t i = 0; i < n; i++) count += kept[i];
    return count;
}
