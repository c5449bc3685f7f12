/* caching/kv/select.c - which slots a step reads when all of them stay. */
#include "caching/kv/select.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "caching/kv/kv_internal.h"
#include "core/memory.h"

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}
static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

void rf_kv_select_ends(const rf_kv_rule *rule, int32_t budget, int32_t *init, int32_t *local) {
    int64_t all = (int64_t)rule->init + rule->select + rule->local;
    *init = rule->init;
    *local = rule->local;
    if (budget < all) {
        *init = (int32_t)((int64_t)rule->init * budget / all);
        *local = (int32_t)((int64_t)rule->local * budget / all);
    }
    *local = min32(max32(*local, 1), budget);
    *init = min32(*init, budget - *local);
}

int32_t rf_kv_select_best(int32_t *out, const float *score, int32_t n, int32_t budget, int32_t init, int32_t local) {
    int32_t open = budget - init - local;
    for (int32_t j = 0; j < init; j++) out[j] = j;
    rf_kv_top(out + init, score + init, n - init - local, open);
    for (int32_t j = init; j < init + open; j++) out[j] += init;
    for (int32_t j = 0; j < local; j++) out[init + open + j] = n - local + j;
    return budget;
}

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
    for (int c = 0; c < n; c++) sum += a[c] * b[c];
    return sum;
}

static const float *key_at(const rf_kv_keys *keys, int32_t slot) {
    return keys->k + (int64_t)keys->rows[slot] * keys->dim;
}

/* score += weight * softmax of z over [begin, end). */
static void add_softmax(float *score, float *z, int32_t begin, int32_t end, float weight) {
    float top = -INFINITY;
    double sum = 0;
    for (int32_t j = begin; j < end; j++) top = z[j] > top ? z[j] : top;
    for (int32_t j = begin; j < end; j++) sum += (double)(z[j] = expf(z[j] - top));
    if (!(sum > 0)) return;
    float scale = (float)((double)weight / sum);
    for (int32_t j = begin; j < end; j++) score[j] += scale * z[j];
}

void rf_kv_select_vote(float *score, const float *q, const rf_kv_keys *keys, int heads, int group, float scale,
                       int32_t begin, int32_t end, float *work) {
    memset(score, 0, (size_t)keys[0].num * sizeof *score);
    for (int h = 0; h < heads * group; h++) {
        const rf_kv_keys *k = &keys[h / group];
        for (int32_t j = begin; j < end; j++) work[j] = scale * dot(q + (int64_t)h * k->dim, key_at(k, j), k->dim);
        add_softmax(score, work, begin, end, 1);
    }
}

void rf_kv_select_pairs(float *score, const float *q, const rf_kv_keys *keys, const int32_t *pairs, int group,
                        int num_pairs, float scale, int32_t begin, int32_t end, float *work) {
    int half = keys->dim / 2;
    memset(score, 0, (size_t)keys->num * sizeof *score);
    for (int g = 0; g < group; g++) {
        const float *query = q + (int64_t)g * keys->dim;
        for (int32_t j = begin; j < end; j++) {
            const float *k = key_at(keys, j);
            float sum = 0;
            for (int i = 0; i < num_pairs; i++) {
                int32_t c = pairs[g * num_pairs + i];
                sum += query[c] * k[c] + query[c + half] * k[c + half];
            }
            work[j] = scale * sum;
        }
        add_softmax(score, work, begin, end, 1.0f / (float)group);
    }
}

void rf_kv_select_agreement(double *agreement, const float *q, const rf_kv_keys *keys, int32_t n, int32_t count,
                            float *work) {
    int half = keys->dim / 2;
    int32_t *best = (int32_t *)(void *)(work + n), *chosen = best + count;
    for (int32_t j = 0; j < n; j++) work[j] = dot(q, key_at(keys, j), keys->dim);
    rf_kv_top(best, work, n, count);
    for (int c = 0; c < half; c++) {
        int32_t shared = 0;
        for (int32_t j = 0; j < n; j++) {
            const float *k = key_at(keys, j);
            work[j] = q[c] * k[c] + q[c + half] * k[c + half];
        }
        rf_kv_top(chosen, work, n, count);
        for (int32_t a = 0, b = 0; a < count && b < count;) {
            shared += best[a] == chosen[b];
            if (best[a] < chosen[b])
                a++;
            else
                b++;
        }
        agreement[c] += (double)shared / count;
    }
}

void rf_kv_select_best_pairs(int32_t *out, const double *agreement, int num_all, int num) {
    int made = 0;
    for (int c = 0; c < num_all && made < num; c++) {
        int ahead = 0;
        for (int o = 0; o < num_all; o++)
            ahead += agreement[o] > agreement[c] || (agreement[o] == agreement[c] && o < c);
        if (ahead < num) out[made++] = c;
    }
}

/* ---- units ---- */

void rf_kv_units_free(rf_kv_units *u) {
    rf_free(u->unit);
    rf_free(u->count);
    rf_free(u->sum);
    *u = (rf_kv_units){0};
}

void rf_kv_units_reset(rf_kv_units *u, int dim) {
    if (dim != u->dim) rf_kv_units_free(u);
    u->dim = dim;
    u->num_slots = u->num_units = 0;
    u->open = -1;
}

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "no memory for sentences or pages of a cache");
}

static rf_status reserve_slots(rf_kv_units *u, int32_t num, rf_error *err) {
    if (num <= u->slot_room) return RF_OK;
    int32_t room = max32(max32(num, 64), min32(u->slot_room, INT32_MAX / 2) * 2);
    int32_t *unit = rf_realloc(u->unit, (size_t)room * sizeof *unit);
    if (unit == NULL) return no_memory(err);
    u->unit = unit;
    u->slot_room = room;
    return RF_OK;
}

static rf_status begin_unit(rf_kv_units *u, rf_error *err) {
    if (u->num_units == u->unit_room) {
        int32_t room = max32(16, u->unit_room * 2);
        int32_t *count = rf_realloc(u->count, (size_t)room * sizeof *count);
        if (count == NULL) return no_memory(err);
        u->count = count;
        float *sum = rf_realloc(u->sum, (size_t)room * (size_t)u->dim * sizeof *sum);
        if (sum == NULL) return no_memory(err);
        u->sum = sum;
        u->unit_room = room;
    }
    u->open = u->num_units++;
    u->count[u->open] = 0;
    memset(u->sum + (int64_t)u->open * u->dim, 0, (size_t)u->dim * sizeof *u->sum);
    return RF_OK;
}

static void join_unit(rf_kv_units *u, int32_t slot, const float *k) {
    float *sum = u->sum + (int64_t)u->open * u->dim;
    for (int c = 0; c < u->dim; c++) sum[c] += k[c];
    u->count[u->open]++;
    u->unit[slot] = u->open;
}

rf_status rf_kv_units_add(rf_kv_units *u, const float *k, bool counts, rf_error *err) {
    RF_TRY(reserve_slots(u, u->num_slots + 1, err));
    if (u->open < 0) RF_TRY(begin_unit(u, err));
    u->unit[u->num_slots] = -1;
    if (counts) join_unit(u, u->num_slots, k);
    u->num_slots++;
    return RF_OK;
}

rf_status rf_kv_units_page(rf_kv_units *u, const rf_kv_keys *keys, int32_t page, rf_error *err) {
    int32_t n = keys->num;
    rf_kv_units_reset(u, keys->dim);
    RF_TRY(reserve_slots(u, n, err));
    float *near = rf_alloc((size_t)max32(n, 1) * sizeof *near);
    int32_t *left = rf_alloc((size_t)max32(n, 1) * sizeof *left), *best = rf_alloc((size_t)page * sizeof *best);
    rf_status st = near && left && best ? RF_OK : no_memory(err);
    for (int32_t j = 0; st == RF_OK && j < n; j++) left[j] = j;
    for (int32_t num_left = n; st == RF_OK && num_left > 0;) {
        const float *seed = key_at(keys, left[0]);
        for (int32_t i = 0; i < num_left; i++) {
            const float *k = key_at(keys, left[i]);
            float sum = 0;
            for (int c = 0; c < keys->dim; c++) sum += (k[c] - seed[c]) * (k[c] - seed[c]);
            near[i] = -sum;
        }
        near[0] = INFINITY;
        int32_t num = min32(page, num_left), taken = 0, kept = 0;
        rf_kv_top(best, near, num_left, num);
        st = begin_unit(u, err);
        for (int32_t i = 0; st == RF_OK && i < num_left; i++) {
            if (taken < num && best[taken] == i) {
                join_unit(u, left[i], key_at(keys, left[i]));
                taken++;
            } else {
                left[kept++] = left[i];
            }
        }
        num_left = kept;
    }
    u->num_slots = n;
    u->open = -1;
    rf_free(near);
    rf_free(left);
    rf_free(best);
    return st;
}

rf_status rf_kv_select_counts(const rf_kv_rule *rule, const rf_kv_shape *shape, int layer, int32_t num, int32_t budget,
                              const rf_kv_stats *stats, uint8_t *counts, rf_error *err) {
    size_t n = (size_t)num, heads = (size_t)shape->num_kv_heads;
    int64_t kept = (int64_t)budget * RF_KV_SENTENCE_FACTOR;
    memset(counts, 1, heads * n);
    if (stats == NULL || stats->s1 == NULL || kept >= num) return RF_OK;
    float *score = rf_alloc(heads * n * sizeof *score);
    float *scratch = rf_alloc(2 * (size_t)shape->num_q_heads * n * sizeof *scratch);
    int32_t *keep = rf_alloc((size_t)kept * sizeof *keep);
    rf_status st = score && scratch && keep ? RF_OK : no_memory(err);
    if (st == RF_OK) st = rf_kv_prefill_scores(rule, shape, layer, num, (int32_t)kept, stats, score, scratch, err);
    for (size_t h = 0; st == RF_OK && h < heads; h++) {
        rf_kv_top(keep, score + h * n, num, (int32_t)kept);
        memset(counts + h * n, 0, n);
        for (int64_t i = 0; i < kept; i++) counts[h * n + (size_t)keep[i]] = 1;
    }
    rf_free(score);
    rf_free(scratch);
    rf_free(keep);
    return st;
}

/* A unit's score and number in one word pair, so that qsort needs no context. */
typedef struct {
    float score;
    int32_t unit;
} ranked;
_Static_assert(sizeof(ranked) == 2 * sizeof(float), "score [2 num_units] is as many ranked units");

static int by_rank(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->unit < y->unit ? -1 : x->unit > y->unit;
}

void rf_kv_units_rank(int32_t *order, const rf_kv_units *u, const float *q, float *score) {
    ranked *list = (ranked *)(void *)score;
    for (int32_t i = 0; i < u->num_units; i++) {
        float z = u->count[i] > 0 ? dot(q, u->sum + (int64_t)i * u->dim, u->dim) / (float)u->count[i] : -INFINITY;
        list[i] = (ranked){.score = isnan(z) ? -FLT_MAX : z, .unit = i};
    }
    qsort(list, (size_t)u->num_units, sizeof *list, by_rank);
    for (int32_t i = 0; i < u->num_units; i++) order[i] = list[i].unit;
}

int32_t rf_kv_select_units(int32_t *out, const rf_kv_units *u, const int32_t *order, int lists, int32_t budget,
                           int32_t init, int32_t local, bool growing, int32_t *cost) {
    int32_t n = u->num_slots, left = budget - init - local, num = 0;
    memset(cost, 0, (size_t)u->num_units * sizeof *cost);
    for (int32_t j = init; j < n - local; j++) {
        if (u->unit[j] >= 0 && (growing || u->unit[j] != u->open)) cost[u->unit[j]]++;
    }
    for (int32_t i = 0; i < u->num_units && left > 0; i++) {
        for (int l = 0; l < lists; l++) {
            int32_t *c = &cost[order[(int64_t)l * u->num_units + i]];
            if (*c <= 0 || *c > left) continue;
            left -= *c;
            *c = -1; /* taken */
        }
    }
    for (int32_t j = 0; j < n; j++) {
        bool end = j < init || j >= n - local;
        if (end || (u->unit[j] >= 0 && cost[u->unit[j]] < 0)) out[num++] = j;
    }
    return num;
}
