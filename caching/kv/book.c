/* caching/kv/book.c - which slots of each layer and key head are kept, in which rows of the pool, and what is known of them.
 *
 * Rows come from a stack: at the start in ascending order, later the last one freed first, so the same calls give the same rows.
 * Decisions are made on scores (scores.c) or on slots' own statistics (steps.c), by a budget for each head:
 *   uniform     B, as are the first skip_layers of any other allocator; with the uniform one these layers keep everything
 *   pyramid     of the prompt's length; prompts within B, or shorter than twice what is not protected of it: B
 *   cake        after each layer over the layers done, (B - protected) * L in all; earlier layers shrink by their stored scores.
 *               Compresses as soon as a prompt is longer than B (the released code: than B + W)
 *   table       shares of B * L exactly, at least min(32, B) and at most 3 B (CompressKV)
 *   flat-heads  Ada-KV's counts over the heads of a layer, not normalised, plus what is protected
 *   flat-all    B * L * Hkv in all, at least (int)(floor * B) a head; decided with the last layer
 *   class       heads with a flagged query head keep everything, the others B
 * With tsp_share (FastKV) layers behind tsp_layer know those tokens alone that it passes on, if the prompt is longer than B: at
 * most B of them stay.
 * Actions SELECT, DEMOTE and SHARE keep everything here: what is read, in how many bits, is the runtime's. COMPENSATE drops as DROP
 * does (prefill only): the runtime knows the prompt's positions that are not kept. */
#include "caching/kv/book.h"
#include "caching/kv/demote.h"

#include <float.h>
#include <math.h>
#include <string.h>
#include <time.h>

#include "core/memory.h"

#define TABLE_FLOOR   32
#define TABLE_CEILING 3

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}
static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}
static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* ---- what a rule asks for ---- */

static bool drops_nothing(const rf_kv_rule *rule) {
    return rule->score == RF_KV_SCORE_NONE || rule->action == RF_KV_SELECT || rule->action == RF_KV_DEMOTE ||
           rule->action == RF_KV_SHARE;
}

/* A rule's choice is one list for the layer, not scores of heads. */
static bool is_structured(const rf_kv_rule *rule) {
    return rule->score == RF_KV_SCORE_LADDER || rule->score == RF_KV_SCORE_TREE || rule->crush_share > 0;
}

int64_t rf_kv_growth(const rf_kv_rule *rule, const rf_kv_shape *shape) {
    int64_t growth = shape->max_new;
    if (rule->schedule == RF_KV_AT_STEP) growth = 1;
    if (rule->schedule == RF_KV_AT_EVERY) growth = max32(rule->every, 1);
    if (rule->schedule == RF_KV_AT_HIGH) growth = max32(rule->buffer, 1);
    return growth;
}

void rf_kv_protected(const rf_kv_rule *rule, int32_t budget, int32_t *front, int32_t *back) {
    bool window =
        !rule->open_window && (rule->score == RF_KV_SCORE_RECURRENCE ||
                               (rule->score == RF_KV_SCORE_ATTENTION &&
                                (rule->queries == RF_KV_QUERIES_WINDOW || rule->queries == RF_KV_QUERIES_DRAFTED)));
    *back = max32(rf_kv_num_recents(rule, budget), window ? rule->window : 0);
    if (rule->last) *back = max32(*back, 1);
    *front = min32(rule->sinks, budget);
    *back = min32(*back, budget - *front);
}

static int tsp_layer_of(const rf_kv_rule *rule, const rf_kv_shape *shape) {
    return rule->tsp_layer >= 0 ? rule->tsp_layer : max32(shape->num_layers / 2 - 1, 0);
}

static bool is_unlimited_class(const rf_kv_shape *shape, int layer, int head) {
    int group = shape->num_q_heads / shape->num_kv_heads;
    const uint8_t *flags = shape->head_classes + (int64_t)layer * shape->num_q_heads + (int64_t)head * group;
    for (int g = 0; g < group; g++) {
        if (flags[g]) return true;
    }
    return false;
}

/* Most slots of all layers (without heads) that PyramidKV's integer steps give, for any prompt and any budget up to this one: a smaller
 * budget may overspend by more, but by no more than (L - 2) L / 2 in all. */
static int64_t most_of_pyramid(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget,
                               int32_t *layer_budget) {
    int layers = shape->num_layers, skip = min32(rule->skip_layers, layers);
    int64_t most = (int64_t)budget * layers;
    for (int32_t b = max32(1, budget - layers / 2); b <= budget; b++) {
        int32_t front, back, longest = min32(shape->max_prompt, 2 * b + 2);
        rf_kv_protected(rule, b, &front, &back);
        if (front + back >= b) continue;
        for (int32_t keys = b + 1; keys <= longest; keys++) {
            rf_kv_pyramid(layer_budget, layers, b, front + back, keys, rule->beta);
            int64_t sum = (int64_t)skip * b;
            for (int l = skip; l < layers; l++) sum += layer_budget[l] + front + back;
            most = max64(most, sum);
        }
    }
    return most;
}

/* SHARE: pairs keep what is not merged, and what follows the prompt. */
static int64_t rows_beside_shared(const rf_kv_rule *rule, const rf_kv_shape *shape) {
    int64_t rows = 0, whole = (int64_t)shape->max_prompt + shape->max_new;
    int64_t kept = min64(2 * (int64_t)ceil(rule->high_share * shape->max_prompt), shape->max_prompt) + shape->max_new;
    for (int l = 0; l < shape->num_layers; l++) {
        bool paired = rf_kv_share_earlier(shape->num_layers, l) || rf_kv_share_later(shape->num_layers, l);
        rows += paired ? kept : whole;
    }
    return rows * shape->num_kv_heads;
}

int64_t rf_kv_pool_rows(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget) {
    int64_t layers = shape->num_layers, heads = shape->num_kv_heads, all = layers * heads;
    int64_t whole = (int64_t)shape->max_prompt + shape->max_new, full = all * whole;
    if (rf_kv_packs(rule)) {
        if (rule->action == RF_KV_SHARE) return rows_beside_shared(rule, shape);
        return all * rf_kv_demote_rooms(rule, shape, budget).raw;
    }
    if (budget <= 0 || drops_nothing(rule) || budget >= whole) return full;
    int64_t growth = rf_kv_growth(rule, shape), rows = all * budget;
    if (rule->schedule != RF_KV_AT_HIGH)
        growth = min64(growth, shape->max_new); /* there a prompt fills the buffer too */
    int64_t skip = min32(rule->skip_layers, shape->num_layers);
    if (rule->alloc == RF_KV_ALLOC_PYRAMID) {
        int32_t *layer_budget = rf_alloc((size_t)layers * sizeof *layer_budget);
        if (layer_budget == NULL) return full;
        rows = heads * most_of_pyramid(rule, shape, budget, layer_budget);
        rf_free(layer_budget);
    } else if (rule->alloc == RF_KV_ALLOC_FLAT_HEADS) {
        rows += (layers - skip) * (heads / 2); /* counts are rounded, half to even */
    } else if (rule->score == RF_KV_SCORE_LADDER) {
        rf_kv_ladder ladder;
        if (rf_kv_ladder_setup(&ladder, rule, shape->num_layers, budget, NULL) == RF_OK) rows = all * ladder.cap;
    }
    rows += all * growth;
    if (rule->alloc == RF_KV_ALLOC_FLAT_ALL) {
        /* earlier layers whole until the last one's choice */
        rows = max64(rows, skip * heads * budget + max64(0, layers - skip - 1) * heads * shape->max_prompt);
    } else if (rule->alloc == RF_KV_ALLOC_CLASS) {
        for (int l = (int)skip; l < layers; l++) {
            for (int h = 0; h < heads; h++) {
                if (shape->head_classes == NULL || is_unlimited_class(shape, l, h)) rows += whole - budget - growth;
            }
        }
    } else if (rule->alloc == RF_KV_ALLOC_UNIFORM && skip > 0) {
        rows += skip * heads * (whole - budget - growth);
    }
    return min64(rows, full);
}

/* ---- a book ---- */

void rf_kv_book_destroy(rf_kv_book *book) {
    if (book == NULL) return;
    for (int i = 0; i < book->num_heads; i++) {
        if (book->heads != NULL) {
            rf_kv_head *h = &book->heads[i];
            rf_free(h->row);
            rf_free(h->position);
            rf_free(h->score);
            rf_free(h->count);
            rf_free(h->stamp);
            rf_free(h->gap);
        }
        if (book->joins != NULL) rf_free(book->joins[i].join);
    }
    rf_free(book->layer_shares);
    rf_free(book->head_classes);
    rf_free(book->head_list);
    rf_free(book->free_rows);
    rf_free(book->received);
    rf_free(book->heads);
    rf_free(book->room);
    rf_free(book->head_budget);
    rf_free(book->cursor);
    rf_free(book->since);
    rf_free(book->preference);
    rf_free(book->joins);
    rf_free(book->scores);
    rf_free(book->values);
    rf_free(book->work);
    rf_free(book->keep);
    rf_free(book->count);
    rf_free(book->stamp);
    rf_free(book->gap);
    rf_free(book->ids);
    rf_free(book->mark);
    rf_free(book->all_scores);
    rf_free(book->all_keep);
    rf_free(book);
}

static rf_status check(const rf_kv_rule *rule, const rf_kv_shape *shape, rf_error *err) {
    const rf_kv_shape *s = shape;
    if (s->num_layers < 1 || s->num_kv_heads < 1 || s->num_q_heads < 1 || s->num_q_heads % s->num_kv_heads != 0 ||
        s->max_prompt < 0 || s->max_new < 0)
        return rf_fail(
            err, RF_ERR_SHAPE,
            "kv book: %d layers, %d query heads, %d key heads, %d + %d tokens: at least one each is wanted, and "
            "query heads a multiple of key heads",
            s->num_layers, s->num_q_heads, s->num_kv_heads, s->max_prompt, s->max_new);
    if (drops_nothing(rule)) return RF_OK;
    bool late = rule->alloc == RF_KV_ALLOC_CAKE || rule->alloc == RF_KV_ALLOC_FLAT_ALL;
    if (is_structured(rule) && (rule->alloc != RF_KV_ALLOC_UNIFORM || rule->skip_layers > 0))
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: ladder, tree and crush want a uniform budget of all layers");
    if (is_structured(rule) && rf_kv_merges(rule) && rule->score == RF_KV_SCORE_LADDER)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: nothing joins in a ladder: what it drops is by index alone");
    if (late && rf_kv_merges(rule))
        return rf_fail(
            err, RF_ERR_UNSUPPORTED,
            "kv book: merging with budgets that are known after later layers (cake, flat-all) is not offered");
    if (late && rule->score == RF_KV_SCORE_POSITION)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: cake and flat-all want scores, found score=position");
    if (rule->alloc == RF_KV_ALLOC_FLAT_HEADS && rule->score == RF_KV_SCORE_POSITION)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: flat-heads wants scores, found score=position");
    if (rule->action == RF_KV_COMPENSATE && rule->schedule != RF_KV_AT_PREFILL)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: compensation is behind the prompt alone");
    if (rule->alloc == RF_KV_ALLOC_TABLE && s->layer_shares == NULL)
        return rf_fail(err, RF_ERR_MISSING, "kv book: alloc=table wants calibrated shares of layers, found none");
    if (rule->alloc == RF_KV_ALLOC_CLASS && s->head_classes == NULL)
        return rf_fail(err, RF_ERR_MISSING, "kv book: alloc=class wants calibrated classes of heads, found none");
    if (rule->heads == RF_KV_HEADS_LIST && s->head_list == NULL)
        return rf_fail(err, RF_ERR_MISSING, "kv book: heads=list wants a calibrated list of heads, found none");
    for (int l = 0; rule->heads == RF_KV_HEADS_LIST && l < s->num_layers; l++) {
        if (memchr(s->head_list + (int64_t)l * s->num_q_heads, 1, (size_t)s->num_q_heads) == NULL)
            return rf_fail(err, RF_ERR_CONFIG, "kv book: layer %d has no listed head (flag 1), heads=list wants one",
                           l);
    }
    if (rf_kv_rule_thins(rule) && (rule->tsp_layer >= s->num_layers || tsp_layer_of(rule, s) < rule->skip_layers))
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "kv book: tsp_layer=%d chooses what later ones of %d layers see: one behind the %d that keep "
                       "everything is wanted",
                       rule->tsp_layer, s->num_layers, rule->skip_layers);
    if (rf_kv_track_of(rule) == RF_KV_TRACK_SUM && rule->reduce == RF_KV_REDUCE_MEANVAR)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: reduce=meanvar of all queries cannot go on while decoding");
    return RF_OK;
}

rf_status rf_kv_book_create(rf_kv_book **out, const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t budget,
                            int64_t first_row, rf_error *err) {
    *out = NULL;
    RF_TRY(check(rule, shape, err));
    if (budget < 0) return rf_fail(err, RF_ERR_ARGUMENT, "kv book: a budget of 0 or more is wanted, found %d", budget);
    int64_t rows = rf_kv_pool_rows(rule, shape, budget);
    if (first_row < 0 || first_row + rows > INT32_MAX)
        return rf_fail(err, RF_ERR_ARGUMENT, "kv book: rows %lld + %lld of a pool pass 2^31 - 1", (long long)first_row,
                       (long long)rows);
    rf_kv_book *book = rf_alloc_zero(1, sizeof *book);
    if (book == NULL) return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory");
    size_t layers = (size_t)shape->num_layers, heads = layers * (size_t)shape->num_kv_heads;
    size_t classes = layers * (size_t)shape->num_q_heads;
    book->rule = *rule;
    book->shape = *shape;
    book->created = budget;
    book->keeps_all = drops_nothing(rule);
    book->track = book->keeps_all ? RF_KV_TRACK_NOTHING : rf_kv_track_of(rule);
    book->has_gaps = rule->score == RF_KV_SCORE_RECURRENCE;
    book->has_count =
        rule->score == RF_KV_SCORE_TREE || (book->track == RF_KV_TRACK_SUM && rule->reduce == RF_KV_REDUCE_VISIBLE);
    book->num_heads = (int)heads;
    book->num_rows = rows;
    book->first_row = first_row;
    book->free_rows = rf_alloc((size_t)rows * sizeof *book->free_rows);
    book->heads = rf_alloc_zero(heads, sizeof *book->heads);
    book->room = rf_alloc_zero(heads, sizeof *book->room);
    book->head_budget = rf_alloc_zero(heads, sizeof *book->head_budget);
    book->cursor = rf_alloc_zero(layers, sizeof *book->cursor);
    book->since = rf_alloc_zero(layers, sizeof *book->since);
    book->preference = rf_alloc_zero(layers, sizeof *book->preference);
    book->joins = rf_alloc_zero(heads, sizeof *book->joins);
    bool ok = book->free_rows && book->heads && book->room && book->head_budget && book->cursor && book->since &&
              book->preference && book->joins;
    if (ok && rf_kv_rule_thins(rule)) {
        book->tsp_layer = tsp_layer_of(rule, shape);
        book->received = rf_alloc((size_t)max32(shape->max_prompt, 1) * sizeof *book->received);
        ok = book->received != NULL;
    }
    if (ok && shape->layer_shares != NULL) {
        book->shape.layer_shares = book->layer_shares = rf_alloc(layers * sizeof(float));
        ok = book->layer_shares != NULL;
        if (ok) memcpy(book->layer_shares, shape->layer_shares, layers * sizeof(float));
    }
    if (ok && shape->head_classes != NULL) {
        book->shape.head_classes = book->head_classes = rf_alloc(classes);
        ok = book->head_classes != NULL;
        if (ok) memcpy(book->head_classes, shape->head_classes, classes);
    }
    if (ok && shape->head_list != NULL) {
        book->shape.head_list = book->head_list = rf_alloc(classes);
        ok = book->head_list != NULL;
        if (ok) memcpy(book->head_list, shape->head_list, classes);
    }
    rf_status status = RF_OK;
    if (!ok) status = rf_fail(err, RF_ERR_MEMORY, "kv book: no memory for %lld rows", (long long)rows);
    if (status == RF_OK) status = rf_kv_book_reset(book, budget, err);
    if (status != RF_OK) {
        rf_kv_book_destroy(book);
        return status;
    }
    *out = book;
    return RF_OK;
}

rf_status rf_kv_book_reset(rf_kv_book *book, int32_t budget, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int64_t needed = budget == book->created ? book->num_rows : rf_kv_pool_rows(rule, &book->shape, budget);
    if (budget < 0 || needed > book->num_rows)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "kv book: made for a budget of %d (%lld rows), found %d (%lld; 0 is no limit)", book->created,
                       (long long)book->num_rows, budget, (long long)needed);
    if (rule->score == RF_KV_SCORE_LADDER && !book->keeps_all)
        RF_TRY(rf_kv_ladder_setup(&book->ladder, rule, book->shape.num_layers, budget, err));
    book->budget = budget;
    book->num_free = book->num_rows;
    for (int64_t i = 0; i < book->num_rows; i++)
        book->free_rows[i] = (int32_t)(book->first_row + book->num_rows - 1 - i);
    for (int i = 0; i < book->num_heads; i++) {
        book->heads[i].num = 0;
        book->head_budget[i] = budget > 0 && !book->keeps_all ? budget : RF_KV_NO_LIMIT;
        book->joins[i].num = 0;
    }
    for (int l = 0; l < book->shape.num_layers; l++) {
        book->cursor[l] = rule->score == RF_KV_SCORE_LADDER ? rule->sinks : 1;
        book->since[l] = 0;
        for (int h = 0; h < book->shape.num_kv_heads; h++) {
            bool whole = (rule->alloc == RF_KV_ALLOC_UNIFORM && l < rule->skip_layers) ||
                         (rule->alloc == RF_KV_ALLOC_CLASS && l >= rule->skip_layers && book->head_classes != NULL &&
                          is_unlimited_class(&book->shape, l, h));
            if (whole) book->head_budget[(int64_t)l * book->shape.num_kv_heads + h] = RF_KV_NO_LIMIT;
        }
    }
    book->layers_done = 0;
    book->num_prompt = book->seen = book->num_received = book->blocks_end = 0;
    book->last_position = -1;
    book->info = (rf_kv_book_info){0};
    return RF_OK;
}

/* ---- slots ---- */

static bool grow(void *pointer, int32_t room) {
    void **at = pointer, *grown = rf_realloc(*at, (size_t)room * 4); /* int32 and float alike */
    if (grown != NULL) *at = grown;
    return grown != NULL;
}

static rf_status reserve(rf_kv_book *book, int index, int32_t num, rf_error *err) {
    rf_kv_head *h = &book->heads[index];
    if (num <= book->room[index]) return RF_OK;
    int32_t room = max32(max32(16, num), (int32_t)min64(2 * (int64_t)book->room[index], INT32_MAX / 2));
    bool ok = grow(&h->row, room) && grow(&h->position, room) && grow(&h->score, room) &&
              (!book->has_count || grow(&h->count, room)) &&
              (!book->has_gaps || (grow(&h->stamp, room) && grow(&h->gap, room)));
    if (!ok) return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory for %d slots of a head", room);
    book->room[index] = room;
    return RF_OK;
}

rf_status rf_kv_scratch(rf_kv_book *book, int64_t keys, rf_error *err) {
    if (keys <= book->scratch_keys) return RF_OK;
    keys = max64(keys, min64(2 * book->scratch_keys, (int64_t)book->shape.max_prompt + book->shape.max_new));
    size_t n = (size_t)keys, heads = (size_t)book->shape.num_kv_heads, q = (size_t)book->shape.num_q_heads;
    book->scratch_keys = 0;
    void **all[] = {(void **)&book->scores, (void **)&book->values, (void **)&book->work,
                    (void **)&book->keep,   (void **)&book->ids,    (void **)&book->mark,
                    (void **)&book->count,  (void **)&book->stamp,  (void **)&book->gap};
    size_t bytes[] = {4 * heads * n,
                      4 * heads * n,
                      8 * q * n,
                      4 * heads * n,
                      4 * n,
                      n,
                      book->has_count ? 4 * heads * n : 0,
                      book->has_gaps ? 4 * heads * n : 0,
                      book->has_gaps ? 4 * heads * n : 0};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        rf_free(*all[i]);
        *all[i] = rf_alloc(bytes[i] > 0 ? bytes[i] : 1);
        if (*all[i] == NULL)
            return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory for scores of %lld keys", (long long)keys);
    }
    book->scratch_keys = keys;
    return RF_OK;
}

/* x[i] = x[keep[i]], keep ascending; NULL: nothing. */
static void pick(void *x, const int32_t *keep, int32_t first, int32_t count) {
    int32_t *words = x; /* int32 and float alike: moved, not looked at */
    for (int32_t i = first; i < count && x != NULL; i++) memcpy(&words[i], &words[keep[i]], sizeof *words);
}

void rf_kv_cut(rf_kv_book *book, int layer, int head, const int32_t *keep, int32_t count) {
    rf_kv_head *h = rf_kv_head_of(book, layer, head);
    int32_t first = 0, next;
    if (count == h->num) return;
    while (first < count && keep[first] == first) first++;
    next = first;
    for (int32_t i = first; i < h->num; i++) {
        if (next < count && keep[next] == i) {
            next++;
        } else if (h->row[i] >= 0) {
            book->free_rows[book->num_free++] = h->row[i];
        }
    }
    pick(h->row, keep, first, count);
    pick(h->position, keep, first, count);
    pick(h->score, keep, first, count);
    pick(h->count, keep, first, count);
    pick(h->stamp, keep, first, count);
    pick(h->gap, keep, first, count);
    book->info.kept -= h->num - count;
    book->info.evictions += h->num - count;
    h->num = count;
}

/* Slot by slot, all heads: those that attention reads at the same time lie near each other. */
static rf_status give_rows(rf_kv_book *book, int layer, rf_error *err) {
    int heads = book->shape.num_kv_heads;
    rf_kv_head *first = rf_kv_head_of(book, layer, 0);
    int32_t most = rf_kv_book_most(book, layer);
    for (int32_t i = 0; i < most; i++) {
        for (rf_kv_head *h = first; h < first + heads; h++) {
            if (i >= h->num || h->row[i] >= 0) continue;
            if (book->num_free == 0)
                return rf_fail(err, RF_ERR_STATE, "kv book: the pool's %lld rows are used up",
                               (long long)book->num_rows);
            h->row[i] = book->free_rows[--book->num_free];
        }
    }
    return RF_OK;
}

/* Positions keep[0..count) of the prompt (NULL: all) become slots without rows, with their statistics; stored [num_tokens]. */
static rf_status fill(rf_kv_book *book, int layer, int head, int32_t num_tokens, const int32_t *keep, int32_t count,
                      const float *stored, rf_error *err) {
    int index = layer * book->shape.num_kv_heads + head;
    int64_t base = (int64_t)head * num_tokens;
    rf_kv_head *h = &book->heads[index];
    int32_t num_received;
    const int32_t *received = rf_kv_book_received(book, layer, &num_received);
    RF_TRY(reserve(book, index, count, err));
    for (int32_t i = 0; i < count; i++) {
        int32_t j = keep != NULL ? keep[i] : i;
        h->row[i] = -1;
        h->position[i] = received != NULL ? received[j] : j;
        h->score[i] = stored != NULL ? stored[base + j] : 0;
        if (book->has_count) h->count[i] = stored != NULL ? book->count[base + j] : 0;
        if (book->has_gaps) h->stamp[i] = stored != NULL ? book->stamp[base + j] : j;
        if (book->has_gaps) h->gap[i] = stored != NULL ? book->gap[base + j] : 0;
    }
    h->num = count;
    book->info.kept += count;
    return RF_OK;
}

int32_t rf_kv_choose(int32_t *keep, float *score, int32_t n, int32_t budget, int32_t front, int32_t back) {
    budget = min32(budget, n);
    front = min32(front, budget);
    back = min32(back, budget - front);
    if (budget == n || front + back == budget) {
        for (int32_t i = 0; i < budget; i++) keep[i] = i < budget - back ? i : n - budget + i;
        return budget;
    }
    for (int32_t i = 0; i < n; i++) {
        if (i < front || i >= n - back) score[i] = INFINITY;
        if (isnan(score[i])) score[i] = -INFINITY;
    }
    rf_kv_top(keep, score, n, budget);
    return budget;
}

/* ---- budgets ---- */

/* Shares of budget * layers, exactly. */
static void table_budgets(const float *share, int layers, int32_t budget, int32_t *out) {
    int64_t left = (int64_t)budget * layers, most = (int64_t)budget * TABLE_CEILING;
    for (int l = 0; l < layers; l++) {
        out[l] = min32(TABLE_FLOOR, budget);
        left -= out[l];
    }
    while (left > 0) {
        double sum = 0;
        int64_t given = 0;
        int open = 0, best = -1;
        for (int l = 0; l < layers; l++) {
            if (out[l] >= most) continue;
            open++;
            sum += share[l] > 0 ? (double)share[l] : 0;
            if (best < 0 || share[l] > share[best]) best = l;
        }
        if (open == 0) return;
        for (int l = 0; l < layers; l++) {
            if (out[l] >= most) continue;
            double part = sum > 0 ? (share[l] > 0 ? (double)share[l] : 0) / sum : 1.0 / open;
            int64_t more = min64((int64_t)(part * (double)left), most - out[l]);
            out[l] += (int32_t)more;
            given += more;
        }
        left -= given;
        if (given > 0) continue;
        /* less than one each: to the largest shares, one by one */
        for (int l = 0; l < layers && left > 0; l++) {
            int to = -1;
            for (int i = 0; i < layers; i++) {
                int rank = 0;
                for (int o = 0; o < layers; o++) rank += share[o] > share[i] || (share[o] == share[i] && o < i);
                if (rank == l) to = i;
            }
            if (to < 0 || out[to] >= most) continue;
            out[to]++;
            left--;
        }
    }
}

/* Budgets of a layer's heads that are known without scores, for a prompt longer than the budget. */
static rf_status plan_layer(rf_kv_book *book, int layer, int32_t num_tokens, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int layers = book->shape.num_layers, skip = min32(rule->skip_layers, layers);
    int32_t budget = book->budget, front, back;
    if (layer < skip || (rule->alloc != RF_KV_ALLOC_PYRAMID && rule->alloc != RF_KV_ALLOC_TABLE)) return RF_OK;
    rf_kv_protected(rule, budget, &front, &back);
    int32_t *of_layer = rf_alloc((size_t)layers * sizeof *of_layer);
    if (of_layer == NULL) return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory");
    if (rule->alloc == RF_KV_ALLOC_TABLE) {
        table_budgets(book->layer_shares + skip, layers - skip, budget, of_layer);
        budget = max32(of_layer[layer - skip], min32(front + back, budget));
    } else if (front + back < budget) {
        rf_kv_pyramid(of_layer, layers, budget, front + back, num_tokens, rule->beta);
        /* the released code: a prompt of less than twice what is open gets a uniform budget */
        if (num_tokens >= 2 * (budget - front - back)) budget = of_layer[layer] + front + back;
    }
    rf_free(of_layer);
    for (int h = 0; h < book->shape.num_kv_heads; h++)
        book->head_budget[(int64_t)layer * book->shape.num_kv_heads + h] = budget;
    return RF_OK;
}

/* Ada-KV's counts of a layer's heads, from scores [Hkv][num_tokens]. */
static void plan_flat_heads(rf_kv_book *book, int layer, int32_t num_tokens, int32_t *counts) {
    int32_t front, back, heads = book->shape.num_kv_heads;
    rf_kv_protected(&book->rule, book->budget, &front, &back);
    int32_t base = book->budget - front - back, open = num_tokens - front - back;
    if (base <= 0) return;
    rf_kv_flat_heads(counts, book->scores + front, heads, open, num_tokens, base, book->rule.floor, false);
    for (int h = 0; h < heads; h++)
        book->head_budget[(int64_t)layer * heads + h] = min32(counts[h], open) + front + back;
}

static rf_status reserve_all(rf_kv_book *book, int64_t slots, rf_error *err) {
    if (slots <= book->all_room) return RF_OK;
    rf_free(book->all_scores);
    rf_free(book->all_keep);
    book->all_room = 0;
    book->all_scores = rf_alloc((size_t)slots * sizeof *book->all_scores);
    book->all_keep = rf_alloc((size_t)slots * sizeof *book->all_keep);
    if (book->all_scores == NULL || book->all_keep == NULL)
        return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory for %lld scores", (long long)slots);
    book->all_room = slots;
    return RF_OK;
}

/* Layers skip..layer - 1 to new budgets, counts [layer - skip] without what is protected. Choices first, on many threads; then, in
 * order, the rows. */
static rf_status shrink_layers(rf_kv_book *book, int skip, int layer, const int32_t *counts, int32_t front,
                               int32_t back, const rf_kv_stats *stats, rf_error *err) {
    int heads = book->shape.num_kv_heads, first = skip * heads, num = layer * heads - first;
    int64_t total = 0, most = 0;
    for (int i = first; i < first + num; i++) {
        total += book->heads[i].num;
        if (book->heads[i].num > most) most = book->heads[i].num;
    }
    RF_TRY(reserve_all(book, 2 * most * num, err));
    int threads = rf_kv_threads(stats, num, 8 * total);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int i = 0; i < num; i++) {
        const rf_kv_head *h = &book->heads[first + i];
        int32_t budget = counts[i / heads] + front + back;
        float *score = book->all_scores + 2 * most * i;
        book->head_budget[first + i] = budget;
        if (h->num <= budget) continue;
        rf_kv_slot_scores(book, h, score, score + most);
        rf_kv_choose(book->all_keep + most * i, score, h->num, budget, front, back);
    }
    for (int i = 0; i < num; i++) {
        int32_t budget = book->head_budget[first + i];
        if (book->heads[first + i].num > budget)
            rf_kv_cut(book, (first + i) / heads, (first + i) % heads, book->all_keep + most * i, budget);
    }
    return RF_OK;
}

/* CAKE: budgets of all layers done with this one; the earlier ones shrink. */
static rf_status plan_cake(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err) {
    int32_t front, back, heads = book->shape.num_kv_heads, skip = book->rule.skip_layers, done = layer + 1 - skip;
    rf_kv_protected(&book->rule, book->budget, &front, &back);
    if (front + back >= book->budget) return RF_OK;
    book->preference[layer] = rf_kv_preference(&book->rule, &book->shape, num_tokens, stats);
    int64_t total = (int64_t)(book->budget - front - back) * (book->shape.num_layers - skip);
    int32_t *counts = rf_alloc((size_t)done * sizeof *counts);
    if (counts == NULL) return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory");
    rf_kv_cake(counts, book->preference + skip, done, total, num_tokens - front - back);
    rf_status status = shrink_layers(book, skip, layer, counts, front, back, stats, err);
    for (int h = 0; h < heads; h++) book->head_budget[(int64_t)layer * heads + h] = counts[done - 1] + front + back;
    rf_free(counts);
    return status;
}

rf_status rf_kv_cut_flat_all(rf_kv_book *book, int first, rf_error *err) {
    int heads = book->shape.num_kv_heads;
    int32_t budget = book->budget, front, back;
    int64_t total = 0;
    rf_kv_protected(&book->rule, budget, &front, &back);
    for (int i = first * heads; i < book->num_heads; i++) total += book->heads[i].num;
    int64_t want = (int64_t)(book->num_heads - first * heads) * budget;
    if (total <= want) return RF_OK;
    if (total > INT32_MAX)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv book: %lld slots are too many for one choice", (long long)total);
    RF_TRY(reserve_all(book, total, err));
    int32_t least = min32((int32_t)(budget * book->rule.floor), budget);
    float *score = book->all_scores;
    for (int i = first * heads; i < book->num_heads; i++) {
        rf_kv_head *h = &book->heads[i];
        rf_kv_slot_scores(book, h, score, book->work);
        int32_t forced = rf_kv_choose(book->all_keep, score, h->num, max32(least, front + back), front, back);
        for (int32_t j = 0; j < h->num; j++) /* wanted by the rule, but beyond a small budget */
            if (score[j] == INFINITY) score[j] = FLT_MAX;
        for (int32_t j = 0; j < forced; j++) score[book->all_keep[j]] = INFINITY;
        score += h->num;
    }
    rf_kv_top(book->all_keep, book->all_scores, (int32_t)total, (int32_t)want);
    int32_t at = 0, begin = 0;
    for (int i = first * heads; i < book->num_heads; i++) {
        int32_t from = at, num = book->heads[i].num;
        for (; at < want && book->all_keep[at] < begin + num; at++) book->all_keep[at] -= begin;
        rf_kv_cut(book, i / heads, i % heads, book->all_keep + from, at - from);
        begin += num;
    }
    return RF_OK;
}

/* ---- a prompt ---- */

/* Lists of a layer whose rule is more than scores, all heads alike in number; keep of head h at book->keep + h * num_tokens. */
static int32_t structured_prompt(rf_kv_book *book, int layer, int head, int32_t num_tokens, int32_t *cursor) {
    const rf_kv_rule *rule = &book->rule;
    int32_t front, back, *keep = book->keep + (int64_t)head * num_tokens;
    if (rule->score == RF_KV_SCORE_LADDER) {
        return rf_kv_ladder_prompt(&book->ladder, layer, cursor, num_tokens, keep, book->ids, book->mark);
    }
    if (rule->score == RF_KV_SCORE_TREE) {
        float *mean = book->scores + (int64_t)head * num_tokens;
        for (int32_t j = 0; j < num_tokens; j++) {
            int64_t at = (int64_t)head * num_tokens + j;
            mean[j] = book->count[at] > 0 ? book->values[at] / (float)book->count[at] : 0;
        }
        return rf_kv_tree_prompt(rule, book->budget, num_tokens, mean, keep, book->work, book->ids);
    }
    rf_kv_protected(rule, book->budget, &front, &back);
    return rf_kv_crush(rule, book->scores, book->shape.num_kv_heads, num_tokens, book->budget, front, back, keep,
                       book->ids, book->work);
}

/* Scores of a layer's prompt that decide, in book->scores; statistics in book->values, count, stamp, gap. */
static rf_status measure(rf_kv_book *book, int layer, int32_t num_tokens, bool decides, const rf_kv_stats *stats,
                         rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    if (rule->score == RF_KV_SCORE_POSITION || rule->score == RF_KV_SCORE_LADDER) return RF_OK;
    if (!decides && rule->schedule == RF_KV_AT_PREFILL) return RF_OK;
    RF_TRY(rf_kv_track_prompt(book, layer, num_tokens, stats, err));
    if (!decides || rule->score == RF_KV_SCORE_TREE) return RF_OK;
    if (rf_kv_scores_slots(book) && rule->score != RF_KV_SCORE_ATTENTION) return RF_OK;
    if (stats == NULL)
        return rf_fail(err, RF_ERR_ARGUMENT, "kv book: layer %d: this rule wants statistics, found none", layer);
    return rf_kv_prefill_scores(rule, &book->shape, layer, num_tokens, book->budget, stats, book->scores, book->work,
                                err);
}

static rf_status keep_all(rf_kv_book *book, int layer, int32_t num_tokens, rf_error *err) {
    bool stored = !book->keeps_all && book->rule.schedule != RF_KV_AT_PREFILL && book->budget > 0 &&
                  book->rule.score != RF_KV_SCORE_POSITION && book->rule.score != RF_KV_SCORE_LADDER;
    for (int h = 0; h < book->shape.num_kv_heads; h++)
        RF_TRY(fill(book, layer, h, num_tokens, NULL, num_tokens, stored ? book->values : NULL, err));
    return give_rows(book, layer, err);
}

static rf_status cut_prompt(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int heads = book->shape.num_kv_heads, skip = min32(rule->skip_layers, book->shape.num_layers);
    bool open = layer >= skip, own = rf_kv_scores_slots(book);
    bool late = open && (rule->alloc == RF_KV_ALLOC_CAKE || rule->alloc == RF_KV_ALLOC_FLAT_ALL);
    bool all = open && rule->alloc == RF_KV_ALLOC_FLAT_ALL, by_index = rule->score == RF_KV_SCORE_POSITION;
    /* rules that score slots themselves: as slots of the whole prompt, which get rows when the choice is made */
    bool as_slots = own && rule->score != RF_KV_SCORE_ATTENTION;
    RF_TRY(plan_layer(book, layer, num_tokens, err));
    if (open && rule->alloc == RF_KV_ALLOC_CAKE) RF_TRY(plan_cake(book, layer, num_tokens, stats, err));
    if (as_slots || all) {
        const float *stored = late && !own ? book->scores : book->values;
        for (int h = 0; h < heads; h++) {
            RF_TRY(fill(book, layer, h, num_tokens, NULL, num_tokens, stored, err));
            if (!all)
                rf_kv_slot_scores(book, rf_kv_head_of(book, layer, h), book->scores + (int64_t)h * num_tokens,
                                  book->work);
        }
        if (all && layer + 1 == book->shape.num_layers) RF_TRY(rf_kv_cut_flat_all(book, skip, err));
        if (all) return give_rows(book, layer, err);
    }
    if (open && rule->alloc == RF_KV_ALLOC_FLAT_HEADS) plan_flat_heads(book, layer, num_tokens, book->keep);
    int32_t cursor = book->cursor[layer];
    int threads = by_index ? 1 : rf_kv_threads(stats, heads, 8 * (int64_t)heads * num_tokens);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int h = 0; h < (is_structured(rule) ? 0 : heads); h++) {
        int32_t front, back, budget = min32(book->head_budget[(int64_t)layer * heads + h], num_tokens);
        int64_t at = (int64_t)h * num_tokens;
        rf_kv_protected(rule, min32(budget, book->budget), &front, &back);
        if (by_index) back = budget - min32(front, budget);
        rf_kv_choose(book->keep + at, book->scores + at, num_tokens, budget, front, back);
    }
    for (int h = 0; h < heads; h++) {
        int32_t *keep = book->keep + (int64_t)h * num_tokens;
        int32_t count = min32(book->head_budget[(int64_t)layer * heads + h], num_tokens);
        book->cursor[layer] = cursor;
        if (is_structured(rule)) count = structured_prompt(book, layer, h, num_tokens, &book->cursor[layer]);
        if (as_slots) {
            rf_kv_cut(book, layer, h, keep, count);
        } else {
            const float *stored = late && !own ? book->scores : book->values;
            if (rule->score == RF_KV_SCORE_POSITION || rule->score == RF_KV_SCORE_LADDER) stored = NULL;
            RF_TRY(fill(book, layer, h, num_tokens, keep, count, stored, err));
            book->info.evictions += num_tokens - count;
        }
        if (!rf_kv_merges(rule)) continue;
        for (int32_t j = 0; j < num_tokens; j++) book->ids[j] = j;
        int64_t base = (int64_t)h * (stats != NULL ? stats->stride : 0) * (stats != NULL ? stats->head_dim : 0);
        const float *k = stats != NULL && stats->k != NULL ? stats->k + base : NULL;
        const float *v = stats != NULL && stats->v != NULL ? stats->v + base : NULL;
        RF_TRY(rf_kv_join_dropped(&book->joins[(int64_t)layer * heads + h], rule->action, num_tokens, book->ids, keep,
                                  count, k, v, stats != NULL ? stats->head_dim : 0, book->work, err));
    }
    return give_rows(book, layer, err);
}

/* FastKV: the best of a layer by the sum of its heads' scores, and the window, go on. */
static void pass_on(rf_kv_book *book, int32_t num_tokens) {
    int32_t front, back, count;
    float *sum = book->work;
    rf_kv_protected(&book->rule, book->budget, &front, &back);
    count = (int32_t)(book->rule.tsp_share * num_tokens) + back;
    if (count >= num_tokens) return;
    for (int32_t j = 0; j < num_tokens; j++) {
        double of_heads = 0;
        for (int h = 0; h < book->shape.num_kv_heads; h++)
            of_heads += (double)book->scores[(int64_t)h * num_tokens + j];
        sum[j] = (float)of_heads;
    }
    book->num_received = rf_kv_choose(book->received, sum, num_tokens, count, front, back);
}

rf_status rf_kv_book_prefill(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err) {
    double begin = now_ms();
    const rf_kv_rule *rule = &book->rule;
    int heads = book->shape.num_kv_heads;
    if (layer != book->layers_done || layer >= book->shape.num_layers || book->seen > book->num_prompt)
        return rf_fail(err, RF_ERR_STATE,
                       "kv book: a prompt's layers come in order, once: wanted layer %d of %d, found %d",
                       book->layers_done, book->shape.num_layers, layer);
    int32_t received = book->num_prompt;
    (void)rf_kv_book_received(book, layer, &received);
    if (num_tokens < 1 || num_tokens > book->shape.max_prompt || (layer > 0 && num_tokens != received))
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "kv book: layer %d: a prompt of %d tokens at most, those that the layer receives, is wanted, "
                       "found %d",
                       layer, book->shape.max_prompt, num_tokens);
    if (stats != NULL && (stats->num_keys != num_tokens || stats->stride < num_tokens))
        return rf_fail(err, RF_ERR_SHAPE, "kv book: layer %d: statistics of %d keys, stride %lld, for a prompt of %d",
                       layer, stats->num_keys, (long long)stats->stride, num_tokens);
    if (layer == 0) book->num_prompt = book->seen = num_tokens;
    book->last_position = book->num_prompt - 1;
    int32_t limit = book->budget;
    if (rule->schedule == RF_KV_AT_HIGH) limit = (int32_t)min64((int64_t)limit + max32(rule->buffer, 1) - 1, INT32_MAX);
    if (rule->score == RF_KV_SCORE_LADDER) limit = book->ladder.cap;
    bool free_of_limit = book->keeps_all || book->budget == 0, decides = !free_of_limit && num_tokens > limit;
    if (!free_of_limit) {
        bool bound = false; /* any head of the layer */
        for (int h = 0; h < heads; h++) bound |= book->head_budget[(int64_t)layer * heads + h] != RF_KV_NO_LIMIT;
        decides &= bound;
        if (decides || rule->schedule != RF_KV_AT_PREFILL) {
            RF_TRY(rf_kv_scratch(book, num_tokens, err));
            RF_TRY(measure(book, layer, num_tokens, decides, stats, err));
            if (decides && book->received != NULL && layer == book->tsp_layer) pass_on(book, num_tokens);
        }
    }
    if (decides) {
        RF_TRY(cut_prompt(book, layer, num_tokens, stats, err));
    } else if (!rf_kv_packs(rule)) {
        RF_TRY(keep_all(book, layer, num_tokens, err));
    }
    book->layers_done++;
    book->info.seen += (int64_t)book->num_prompt * heads;
    book->info.evictions += (int64_t)(book->num_prompt - num_tokens) * heads;
    book->info.plan_ms += now_ms() - begin;
    return RF_OK;
}

/* The block's tokens behind the slots of each head, without rows yet. */
static rf_status join_block(rf_kv_book *book, int layer, int32_t begin, int32_t num, rf_error *err) {
    for (int h = 0; h < book->shape.num_kv_heads; h++) {
        rf_kv_head *head = rf_kv_head_of(book, layer, h);
        RF_TRY(reserve(book, layer * book->shape.num_kv_heads + h, head->num + num, err));
        for (int32_t i = 0; i < num; i++, head->num++) {
            head->row[head->num] = -1;
            head->position[head->num] = begin + i;
            head->score[head->num] = 0;
        }
        book->info.kept += num;
    }
    return RF_OK;
}

static rf_status cut_block(rf_kv_book *book, int layer, int32_t num, const rf_kv_stats *stats, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    RF_TRY(rf_kv_scratch(book, num, err));
    RF_TRY(rf_kv_prefill_scores(rule, &book->shape, layer, num, book->budget, stats, book->scores, book->work, err));
    for (int h = 0; h < book->shape.num_kv_heads; h++) {
        int32_t front, back, budget = book->head_budget[(int64_t)layer * book->shape.num_kv_heads + h];
        rf_kv_protected(rule, min32(budget, book->budget), &front, &back);
        int32_t count = rf_kv_choose(book->keep, book->scores + (int64_t)h * num, num, budget, front, back);
        rf_kv_cut(book, layer, h, book->keep, count);
    }
    return RF_OK;
}

rf_status rf_kv_book_prefill_block(rf_kv_book *book, int layer, int32_t begin, int32_t num, int32_t num_tokens,
                                   const rf_kv_stats *stats, rf_error *err) {
    double since = now_ms();
    int heads = book->shape.num_kv_heads;
    if (book->rule.block <= 0 || book->keeps_all || book->budget == 0)
        return rf_fail(err, RF_ERR_STATE, "kv book: a rule with block and a budget is wanted for blocks of a prompt");
    if (layer != book->layers_done || layer >= book->shape.num_layers || begin != book->blocks_end || num < 1 ||
        begin > num_tokens - num || num_tokens > book->shape.max_prompt ||
        (layer + begin > 0 && num_tokens != book->num_prompt))
        return rf_fail(err, RF_ERR_STATE,
                       "kv book: a prompt's layers and a layer's blocks come in order: wanted layer %d of %d at token "
                       "%d, found layer %d, tokens %d + %d of %d",
                       book->layers_done, book->shape.num_layers, book->blocks_end, layer, begin, num, num_tokens);
    book->num_prompt = book->seen = num_tokens;
    book->last_position = num_tokens - 1;
    if (begin == 0) RF_TRY(plan_layer(book, layer, num_tokens, err));
    RF_TRY(join_block(book, layer, begin, num, err));
    int32_t slots = rf_kv_head_of(book, layer, 0)->num;
    if (slots > book->head_budget[(int64_t)layer * heads]) {
        if (stats == NULL || stats->num_keys != slots || stats->stride < slots)
            return rf_fail(err, RF_ERR_SHAPE, "kv book: layer %d: statistics of %d slots are wanted behind token %d",
                           layer, slots, begin + num);
        RF_TRY(cut_block(book, layer, slots, stats, err));
    }
    RF_TRY(give_rows(book, layer, err));
    book->blocks_end = begin + num;
    if (book->blocks_end == num_tokens) {
        book->blocks_end = 0;
        book->layers_done++;
    }
    book->info.seen += (int64_t)num * heads;
    book->info.plan_ms += now_ms() - since;
    return RF_OK;
}

rf_status rf_kv_book_place(rf_kv_book *book, int layer, const int32_t *positions, const int32_t *counts, int64_t stride,
                           rf_error *err) {
    int heads = book->shape.num_kv_heads;
    if (!rf_kv_packs(&book->rule) || layer < 0 || layer >= book->layers_done)
        return rf_fail(err, RF_ERR_STATE, "kv book: slots of layer %d are not for the runtime to place", layer);
    for (int h = 0; h < heads; h++) {
        if (rf_kv_head_of(book, layer, h)->num > 0)
            return rf_fail(err, RF_ERR_STATE, "kv book: layer %d has its slots already", layer);
        RF_TRY(fill(book, layer, h, book->num_prompt, positions + h * stride, counts[h], NULL, err));
    }
    return give_rows(book, layer, err);
}

void rf_kv_book_release(rf_kv_book *book, int layer, int head, const int32_t *keep, int32_t count) {
    int64_t evictions = book->info.evictions;
    rf_kv_cut(book, layer, head, keep, count);
    book->info.evictions = evictions;
}

/* ---- tokens ---- */

rf_status rf_kv_book_append(rf_kv_book *book, int32_t position, rf_error *err) {
    if (book->layers_done != 0 && book->layers_done != book->shape.num_layers)
        return rf_fail(err, RF_ERR_STATE, "kv book: a token behind %d of %d layers of the prompt", book->layers_done,
                       book->shape.num_layers);
    if (position <= book->last_position)
        return rf_fail(err, RF_ERR_ARGUMENT, "kv book: a position behind %d is wanted, found %d", book->last_position,
                       position);
    if (book->num_free < book->num_heads)
        return rf_fail(err, RF_ERR_STATE, "kv book: %lld of the pool's %lld rows are left, a token wants %d",
                       (long long)book->num_free, (long long)book->num_rows, book->num_heads);
    for (int i = 0; i < book->num_heads; i++) RF_TRY(reserve(book, i, book->heads[i].num + 1, err));
    book->layers_done = book->shape.num_layers;
    book->last_position = position;
    book->seen++;
    for (int i = 0; i < book->num_heads; i++) {
        rf_kv_head *h = &book->heads[i];
        int heads = book->shape.num_kv_heads;
        h->row[h->num] = book->free_rows[--book->num_free];
        h->position[h->num] = position;
        h->score[h->num] = 0;
        if (book->rule.score == RF_KV_SCORE_RANDOM)
            h->score[h->num] = rf_kv_uniform(book->rule.seed, i / heads, i % heads, position);
        if (book->has_count) h->count[h->num] = 0;
        if (book->has_gaps) h->stamp[h->num] = position;
        if (book->has_gaps) h->gap[h->num] = 0;
        h->num++;
    }
    for (int l = 0; l < book->shape.num_layers; l++) {
        if (book->since[l] < INT32_MAX) book->since[l]++;
    }
    book->info.kept += book->num_heads;
    book->info.seen += book->num_heads;
    return RF_OK;
}

rf_status rf_kv_book_step(rf_kv_book *book, int layer, const rf_kv_stats *stats, bool *changed, rf_error *err) {
    double begin = now_ms();
    *changed = false;
    if (layer < 0 || layer >= book->shape.num_layers || book->layers_done != book->shape.num_layers)
        return rf_fail(err, RF_ERR_STATE, "kv book: a step of layer %d of %d behind %d layers of the prompt", layer,
                       book->shape.num_layers, book->layers_done);
    for (int h = 0; h < book->shape.num_kv_heads; h++)
        book->joins[(int64_t)layer * book->shape.num_kv_heads + h].num = 0;
    if (book->keeps_all || book->budget == 0 || book->rule.schedule == RF_KV_AT_PREFILL) return RF_OK;
    RF_TRY(rf_kv_scratch(book, rf_kv_book_most(book, layer), err));
    rf_status status = rf_kv_step_layer(book, layer, stats, changed, err);
    book->info.plan_ms += now_ms() - begin;
    return status;
}

/* ---- what there is ---- */

const rf_kv_head *rf_kv_book_head(const rf_kv_book *book, int layer, int head) {
    return rf_kv_head_of(book, layer, head);
}

const int32_t *rf_kv_book_received(const rf_kv_book *book, int layer, int32_t *num) {
    bool few = book->num_received > 0 && layer > book->tsp_layer;
    *num = few ? book->num_received : book->num_prompt;
    return few ? book->received : NULL;
}

int32_t rf_kv_book_most(const rf_kv_book *book, int layer) {
    int32_t most = 0;
    for (int h = 0; h < book->shape.num_kv_heads; h++) most = max32(most, rf_kv_head_of(book, layer, h)->num);
    return most;
}

const rf_kv_join *rf_kv_book_joins(const rf_kv_book *book, int layer, int head, int32_t *num) {
    const rf_kv_joins *joins = &book->joins[(int64_t)layer * book->shape.num_kv_heads + head];
    *num = joins->num;
    return joins->join;
}

rf_kv_book_info rf_kv_book_get_info(const rf_kv_book *book) {
    return book->info;
}
