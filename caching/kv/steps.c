/* caching/kv/steps.c - what is known of slots while tokens follow, and which slots go then.
 *
 * A token is appended, attends to all slots, and is measured; then statistics follow and, if the schedule says now, slots over the
 * budget go: the newest token's own attention has seen the set before. How statistics go on:
 *   attention of all queries   score = decay * score + p, from the prompt's own sums on (H2O, A2SF; MAX: the larger; VISIBLE: sum /
 *                              queries since insertion). CAOTE over these: from the accumulated score and the values of now, if
 *                              values are measured; else the newest query's own errors are added up
 *   attention of the last one  p of the newest query (TOVA)
 *   attention of a window      every step: p of the newest query alone, pooled (CAKE). By a period: the sum of p over the last
 *                              `window` tokens before slots go (or the period, if shorter), their mean where redundancy or sentences
 *                              are in the score; variances do not follow
 *   keys and values            measured anew when slots go (knorm, keydiff, expected)
 *   random, gate               fixed at insertion; the gate's score is (tokens + 1 - position) * log beta
 *   recurrence                 LazyEviction: stamp, the last position whose query gave p >= activation, and gap, the longest way
 *                              between two such; s = 2 sigma(-(t - stamp) / gap) + 2 sigma(-1 / gap), 0 without any. (The published
 *                              text leaves open whether it is a sum.) The prompt: what is not activated in the window has stamp =
 *                              position and gap 0; what is (mean over the group of the most p) has stamp = last position of the prompt and
 *                              gap = that - position, for when in the window it was is not measured
 *   tree                       sum of p and queries since insertion; the prompt: the window's that see the key */
#include "caching/kv/book.h"
#include "caching/kv/demote.h"

#include <math.h>
#include <string.h>

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}
static int32_t max32(int32_t a, int32_t b) {
    return a > b ? a : b;
}

rf_kv_track rf_kv_track_of(const rf_kv_rule *rule) {
    if (rule->schedule == RF_KV_AT_PREFILL) return RF_KV_TRACK_NOTHING;
    switch (rule->score) {
    case RF_KV_SCORE_KNORM:
    case RF_KV_SCORE_KEYDIFF:
    case RF_KV_SCORE_EXPECTED: return RF_KV_TRACK_MEASURED;
    case RF_KV_SCORE_RECURRENCE: return RF_KV_TRACK_GAPS;
    case RF_KV_SCORE_TREE: return RF_KV_TRACK_SUM;
    case RF_KV_SCORE_ATTENTION:
        if (rule->queries == RF_KV_QUERIES_ALL) return RF_KV_TRACK_SUM;
        if (rule->queries == RF_KV_QUERIES_LAST || rule->schedule == RF_KV_AT_STEP) return RF_KV_TRACK_NOW;
        return RF_KV_TRACK_WINDOW;
    default: return RF_KV_TRACK_NOTHING;
    }
}

bool rf_kv_scores_slots(const rf_kv_book *book) {
    rf_kv_score score = book->rule.score;
    return score == RF_KV_SCORE_GATE || score == RF_KV_SCORE_RECURRENCE || score == RF_KV_SCORE_RANDOM ||
           (score == RF_KV_SCORE_ATTENTION && book->track == RF_KV_TRACK_SUM);
}

/* ---- the prompt ---- */

static rf_status want(const void *array, const char *name, int layer, rf_error *err) {
    if (array != NULL) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "kv book: layer %d: this rule wants %s measured, found nothing", layer, name);
}

/* Mean over the query heads of key head h (or of the layer: heads=mean) of in [Hq][stride]. */
static float group_mean(const rf_kv_book *book, const float *in, int64_t stride, int head, int32_t j) {
    int group = book->shape.num_q_heads / book->shape.num_kv_heads, first = head * group, num = group;
    if (book->rule.heads == RF_KV_HEADS_MEAN) {
        first = 0;
        num = book->shape.num_q_heads;
    }
    double sum = 0;
    for (int q = first; q < first + num; q++) sum += (double)in[q * stride + j];
    return (float)(sum / num);
}

/* The sums that go on: the rule without protection, pooling and what is divided or multiplied afterwards. */
static rf_status prompt_sums(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err) {
    rf_kv_rule plain = book->rule;
    plain.sinks = plain.recents = 0;
    plain.open_window = true;
    plain.last = false;
    plain.pool = RF_KV_POOL_NONE;
    plain.redundancy = plain.sentence_penalty = 0;
    if (plain.reduce == RF_KV_REDUCE_MEAN || plain.reduce == RF_KV_REDUCE_VISIBLE) plain.reduce = RF_KV_REDUCE_SUM;
    if (plain.value <= RF_KV_VALUE_FASTCAOTE) plain.value = RF_KV_VALUE_NONE;
    RF_TRY(rf_kv_prefill_scores(&plain, &book->shape, layer, num_tokens, book->budget, stats, book->values, book->work,
                                err));
    for (int h = 0; h < book->shape.num_kv_heads && book->has_count; h++) {
        for (int32_t j = 0; j < num_tokens; j++) book->count[(int64_t)h * num_tokens + j] = num_tokens - j;
    }
    return RF_OK;
}

rf_status rf_kv_track_prompt(rf_kv_book *book, int layer, int32_t num_tokens, const rf_kv_stats *stats, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int heads = book->shape.num_kv_heads;
    bool measured = rule->score == RF_KV_SCORE_GATE || rule->score == RF_KV_SCORE_RECURRENCE ||
                    rule->score == RF_KV_SCORE_TREE || book->track == RF_KV_TRACK_SUM;
    if (measured) RF_TRY(want(stats, "a prompt", layer, err));
    if (rule->score == RF_KV_SCORE_ATTENTION && book->track == RF_KV_TRACK_SUM)
        return prompt_sums(book, layer, num_tokens, stats, err);
    if (rule->score == RF_KV_SCORE_GATE) RF_TRY(want(stats->gate, "gates", layer, err));
    if (rule->score == RF_KV_SCORE_TREE) RF_TRY(want(stats->s1, "sums", layer, err));
    bool peaks = rule->score == RF_KV_SCORE_RECURRENCE && stats->peak != NULL;
    if (rule->score == RF_KV_SCORE_RECURRENCE && !peaks) RF_TRY(want(stats->s1, "peaks or sums", layer, err));
    for (int h = 0; h < heads; h++) {
        for (int32_t j = 0; j < num_tokens; j++) {
            int64_t at = (int64_t)h * num_tokens + j;
            float value = 0;
            switch (rule->score) {
            case RF_KV_SCORE_RANDOM: value = rf_kv_uniform(rule->seed, layer, h, j); break;
            case RF_KV_SCORE_GATE: value = stats->gate[h * stats->stride + j]; break;
            case RF_KV_SCORE_TREE:
                value = group_mean(book, stats->s1, stats->stride, h, j);
                book->count[at] = min32(max32(stats->num_queries, 1), num_tokens - j);
                break;
            case RF_KV_SCORE_RECURRENCE: {
                float p = group_mean(book, peaks ? stats->peak : stats->s1, stats->stride, h, j);
                if (!peaks) p /= (float)max32(stats->num_queries, 1);
                bool active = (double)p >= rule->activation;
                book->stamp[at] = active ? num_tokens - 1 : j;
                book->gap[at] = active ? num_tokens - 1 - j : 0;
                break;
            }
            default: break;
            }
            book->values[at] = value;
        }
    }
    return RF_OK;
}

/* ---- scores of slots ---- */

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

static void stored_scores(const rf_kv_book *book, const rf_kv_head *h, float *out) {
    const rf_kv_rule *rule = &book->rule;
    bool mean =
        rule->score == RF_KV_SCORE_TREE || (book->track == RF_KV_TRACK_SUM && rule->reduce == RF_KV_REDUCE_VISIBLE);
    if (rule->score == RF_KV_SCORE_ATTENTION && !mean) {
        memcpy(out, h->score, (size_t)h->num * sizeof *out);
        return;
    }
    for (int32_t j = 0; j < h->num; j++) {
        double score = (double)h->score[j];
        if (rule->score == RF_KV_SCORE_GATE) score *= (double)(book->last_position + 2 - h->position[j]);
        if (mean) score = h->count[j] > 0 ? score / h->count[j] : 0;
        if (rule->score == RF_KV_SCORE_RECURRENCE) {
            double gap = h->gap[j], idle = book->last_position - h->stamp[j];
            score = gap > 0 ? 2 * sigmoid(-idle / gap) + 2 * sigmoid(-1 / gap) : 0;
        }
        out[j] = (float)score;
    }
}

/* Over the slots in front of the protected newest ones. */
static void pool_slots(const rf_kv_book *book, int32_t n, float *out, float *work) {
    const rf_kv_rule *rule = &book->rule;
    int32_t front, back;
    if (rule->pool == RF_KV_POOL_NONE || rule->score != RF_KV_SCORE_ATTENTION) return;
    rf_kv_protected(rule, book->budget, &front, &back);
    if (n <= back) return;
    memcpy(work, out, (size_t)n * sizeof *work);
    rf_kv_pool_scores(out, work, n - back, rule->pool, rule->pool_size);
}

void rf_kv_slot_scores(const rf_kv_book *book, const rf_kv_head *h, float *out, float *work) {
    stored_scores(book, h, out);
    /* a prompt's scores are pooled before they are stored, sums are not */
    if (rf_kv_scores_slots(book) || book->seen > book->num_prompt) pool_slots(book, h->num, out, work);
}

/* ---- a step ---- */

/* Statistics of key head h alone, as of a layer with one key head of `group` query heads. */
static rf_kv_stats of_head(const rf_kv_stats *s, const rf_kv_shape *shape, int head, int32_t num) {
    int64_t group = shape->num_q_heads / shape->num_kv_heads, q = head * group * s->stride, k = head * s->stride;
    rf_kv_stats out = *s;
    const float **query[] = {&out.s1, &out.s2, &out.peak, &out.removal, &out.wo_norm, &out.expected};
    const float **key[] = {&out.key_norm, &out.value_norm, &out.key_cosine, &out.gate};
    for (size_t i = 0; i < sizeof query / sizeof *query; i++) {
        if (*query[i] != NULL) *query[i] += q;
    }
    for (size_t i = 0; i < sizeof key / sizeof *key; i++) {
        if (*key[i] != NULL) *key[i] += k;
    }
    if (out.k != NULL) out.k += k * s->head_dim;
    if (out.v != NULL) out.v += k * s->head_dim;
    if (out.entropy != NULL) out.entropy += head * group;
    out.num_keys = num;
    return out;
}

/* Tokens whose probabilities a window's sum is of. */
static int32_t step_window(const rf_kv_book *book) {
    int64_t period = rf_kv_growth(&book->rule, &book->shape), window = max32(book->rule.window, 1);
    return (int32_t)(window < period ? window : period);
}

/* Scores of slots as if they were a prompt: what keys, values and sums say now. Protected ones are INFINITY. */
static rf_status measured_scores(rf_kv_book *book, int layer, const rf_kv_stats *stats, float *out, int64_t stride,
                                 rf_error *err) {
    const rf_kv_shape *shape = &book->shape;
    int heads = shape->num_kv_heads;
    RF_TRY(want(stats, "keys", layer, err));
    bool sums = book->track != RF_KV_TRACK_MEASURED;
    int32_t num_queries = 1;
    if (!sums && book->rule.heads != RF_KV_HEADS_NONE) { /* heads are alike, and so are their slots */
        return rf_kv_prefill_scores(&book->rule, shape, layer, (int32_t)stride, book->budget, stats, out, book->work,
                                    err);
    }
    rf_kv_shape one = *shape;
    one.num_q_heads = sums ? 1 : shape->num_q_heads / heads;
    one.num_kv_heads = 1;
    rf_kv_rule rule = book->rule;
    if (sums) { /* grouped already; values have been, or are in them */
        rule.value = RF_KV_VALUE_NONE;
        rule.heads = RF_KV_HEADS_NONE;
        rule.reduce = RF_KV_REDUCE_SUM;
    }
    if (book->track == RF_KV_TRACK_WINDOW && book->rule.reduce == RF_KV_REDUCE_MEAN) {
        rule.reduce = RF_KV_REDUCE_MEAN;
        num_queries = step_window(book);
    }
    for (int h = 0; h < heads; h++) {
        const rf_kv_head *head = rf_kv_head_of(book, layer, h);
        rf_kv_stats view = of_head(stats, shape, h, head->num);
        if (sums) view.s1 = head->score;
        if (sums) view.num_queries = num_queries;
        RF_TRY(rf_kv_prefill_scores(&rule, &one, layer, head->num, book->budget, &view, out + h * stride, book->work,
                                    err));
        if (rule.sentence_penalty <= 0) continue;
        RF_TRY(want(stats->penalty, "sentences", layer, err));
        for (int32_t j = 0; j < head->num; j++)
            if (head->position[j] < stats->num_positions)
                out[h * stride + j] -= (float)(rule.sentence_penalty * (double)stats->penalty[head->position[j]]);
    }
    return RF_OK;
}

/* CAOTE over any base: h / (1 - h) |o - v|, h = s / sum s, o = sum h v or the mean of v. */
static void caote(const rf_kv_book *book, int32_t n, const float *v, int32_t dim, float *score, float *work) {
    double sum = 0;
    for (int32_t j = 0; j < n; j++) sum += (double)score[j];
    if (sum <= 0) return;
    for (int32_t j = 0; j < n; j++) {
        double share = (double)score[j] / sum;
        work[j] = (float)(share < 1 - 1e-4 ? share : 1 - 1e-4);
    }
    for (int32_t j = 0; j < n; j++) score[j] = 0;
    for (int32_t d = 0; d < dim; d++) {
        double o = 0;
        for (int32_t j = 0; j < n; j++)
            o += (double)v[(int64_t)j * dim + d] * (book->rule.value == RF_KV_VALUE_CAOTE ? (double)work[j] : 1.0 / n);
        for (int32_t j = 0; j < n; j++) {
            double off = o - (double)v[(int64_t)j * dim + d];
            score[j] += (float)(off * off);
        }
    }
    for (int32_t j = 0; j < n; j++)
        score[j] = (float)((double)work[j] / (1 - (double)work[j]) * sqrt((double)score[j]));
}

static bool is_caote(const rf_kv_book *book) {
    return book->rule.value == RF_KV_VALUE_CAOTE || book->rule.value == RF_KV_VALUE_FASTCAOTE;
}

/* out [Hkv][stride]: what decides now. */
static rf_status step_scores(rf_kv_book *book, int layer, const rf_kv_stats *stats, float *out, int64_t stride,
                             rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    bool likeness = rule->redundancy > 0 || rule->sentence_penalty > 0;
    if (book->track == RF_KV_TRACK_MEASURED || (likeness && rule->score == RF_KV_SCORE_ATTENTION))
        return measured_scores(book, layer, stats, out, stride, err);
    for (int h = 0; h < book->shape.num_kv_heads; h++) {
        const rf_kv_head *head = rf_kv_head_of(book, layer, h);
        float *score = out + h * stride;
        stored_scores(book, head, score);
        if (rule->score != RF_KV_SCORE_ATTENTION) continue;
        if (is_caote(book) && book->track == RF_KV_TRACK_SUM && stats->v != NULL) {
            caote(book, head->num, stats->v + h * stats->stride * stats->head_dim, stats->head_dim, score, book->work);
        }
        pool_slots(book, head->num, score, book->work);
        for (int32_t j = 0; j < head->num && rule->value == RF_KV_VALUE_NORM && stats->value_norm != NULL; j++)
            score[j] *= stats->value_norm[h * stats->stride + j];
    }
    return RF_OK;
}

/* Tokens until slots of this head go: 0 = behind this one. */
static int64_t tokens_left(const rf_kv_book *book, int layer, const rf_kv_head *h, int32_t budget) {
    if (book->rule.schedule == RF_KV_AT_EVERY) return max32(book->rule.every, 1) - book->since[layer];
    int64_t growth = rf_kv_growth(&book->rule, &book->shape);
    if (book->rule.alloc == RF_KV_ALLOC_FLAT_ALL && layer >= book->rule.skip_layers) {
        return ((book->budget + growth) * book->num_heads - book->info.kept) / book->num_heads;
    }
    return budget + growth - h->num;
}

/* Is the newest query of use? Not in front of the window of a period. */
static bool watches(const rf_kv_book *book, int layer) {
    bool by_period = book->track == RF_KV_TRACK_WINDOW && book->rule.schedule == RF_KV_AT_EVERY;
    return !by_period || max32(book->rule.every, 1) - book->since[layer] < step_window(book);
}

unsigned rf_kv_book_step_needs(const rf_kv_book *book, int layer) {
    if (rf_kv_packs(&book->rule)) return rf_kv_needs_step(&book->rule); /* the runtime follows */
    unsigned needs = book->keeps_all || book->budget == 0 ? 0 : rf_kv_needs_step(&book->rule);
    bool likeness = book->rule.redundancy > 0 || book->rule.sentence_penalty > 0;
    if (!watches(book, layer)) needs &= ~(unsigned)(RF_KV_NEED_SUM | RF_KV_NEED_REMOVAL);
    if (likeness && book->rule.schedule == RF_KV_AT_EVERY && book->since[layer] < max32(book->rule.every, 1))
        needs &= ~(unsigned)(RF_KV_NEED_KV | RF_KV_NEED_HIDDEN);
    return needs;
}

static rf_status track(rf_kv_book *book, int layer, const rf_kv_stats *stats, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int heads = book->shape.num_kv_heads;
    if (rule->score == RF_KV_SCORE_GATE) {
        RF_TRY(want(stats, "gates", layer, err));
        RF_TRY(want(stats->gate, "gates", layer, err));
        for (int h = 0; h < heads; h++) {
            rf_kv_head *head = rf_kv_head_of(book, layer, h);
            if (head->num > 0) head->score[head->num - 1] = stats->gate[h * stats->stride + head->num - 1];
        }
    }
    if (book->track == RF_KV_TRACK_NOTHING || book->track == RF_KV_TRACK_MEASURED) return RF_OK;
    RF_TRY(want(stats, "the newest query", layer, err));
    if (!watches(book, layer)) return RF_OK;
    rf_kv_rule of_step = *rule;
    if (is_caote(book) && book->track == RF_KV_TRACK_SUM && stats->v != NULL) of_step.value = RF_KV_VALUE_NONE;
    float decay = rule->reduce == RF_KV_REDUCE_DECAY ? (float)rule->alpha : 1;
    float *p = book->work;
    for (int h = 0; h < heads; h++) {
        rf_kv_head *head = rf_kv_head_of(book, layer, h);
        rf_kv_step_probability(&of_step, &book->shape, h, head->num, stats, p);
        if (book->track == RF_KV_TRACK_WINDOW) {
            int64_t left = tokens_left(book, layer, head, book->head_budget[(int64_t)layer * heads + h]);
            if (left == step_window(book) - 1) memset(head->score, 0, (size_t)head->num * sizeof *head->score);
        }
        for (int32_t j = 0; j < head->num; j++) {
            if (head->count != NULL) head->count[j]++;
            switch (book->track) {
            case RF_KV_TRACK_NOW: head->score[j] = p[j]; break;
            case RF_KV_TRACK_GAPS:
                if ((double)p[j] < rule->activation) break;
                head->gap[j] = max32(head->gap[j], book->last_position - head->stamp[j]);
                head->stamp[j] = book->last_position;
                break;
            default:
                if (rule->score == RF_KV_SCORE_ATTENTION && rule->reduce == RF_KV_REDUCE_MAX) {
                    if (p[j] > head->score[j]) head->score[j] = p[j];
                } else if (rule->score == RF_KV_SCORE_TREE || book->track == RF_KV_TRACK_WINDOW) {
                    head->score[j] += p[j];
                } else {
                    head->score[j] = decay * head->score[j] + p[j];
                }
            }
        }
    }
    return RF_OK;
}

/* Is it time for a head (or, flat-all, for the layers together)? */
static bool is_due(const rf_kv_book *book, int layer, int64_t num, int64_t budget, int64_t heads) {
    switch (book->rule.schedule) {
    case RF_KV_AT_STEP: return num > budget;
    case RF_KV_AT_EVERY: return num > budget && book->since[layer] >= max32(book->rule.every, 1);
    case RF_KV_AT_HIGH: return num >= budget + heads * max32(book->rule.buffer, 1);
    default: return false;
    }
}

static rf_status cut(rf_kv_book *book, int layer, int head, int32_t *keep, int32_t count, const rf_kv_stats *stats,
                     rf_error *err) {
    const rf_kv_head *h = rf_kv_head_of(book, layer, head);
    int64_t index = (int64_t)layer * book->shape.num_kv_heads + head;
    if (rf_kv_merges(&book->rule)) {
        int64_t base = stats != NULL ? head * stats->stride * stats->head_dim : 0;
        const float *k = stats != NULL && stats->k != NULL ? stats->k + base : NULL;
        const float *v = stats != NULL && stats->v != NULL ? stats->v + base : NULL;
        RF_TRY(rf_kv_join_dropped(&book->joins[index], book->rule.action, h->num, h->row, keep, count, k, v,
                                  stats != NULL ? stats->head_dim : 0, book->work, err));
    }
    rf_kv_cut(book, layer, head, keep, count);
    return RF_OK;
}

/* Contests until the budget is met: slots' means and their indices shrink together. */
static int32_t tree_keep(rf_kv_book *book, int32_t n, int32_t *cursor, float *mean, int32_t *keep) {
    for (int32_t j = 0; j < n; j++) keep[j] = j;
    while (n > book->budget) {
        int32_t gone = rf_kv_tree_contest(&book->rule, book->budget, cursor, mean);
        memmove(keep + gone, keep + gone + 1, (size_t)(n - gone - 1) * sizeof *keep);
        memmove(mean + gone, mean + gone + 1, (size_t)(n - gone - 1) * sizeof *mean);
        n--;
    }
    return n;
}

static rf_status step_flat_all(rf_kv_book *book, int layer, const rf_kv_stats *stats, bool *changed, rf_error *err) {
    int heads = book->shape.num_kv_heads, first = min32(book->rule.skip_layers, book->shape.num_layers);
    int64_t num = 0, units = book->num_heads - (int64_t)first * heads;
    for (int i = first * heads; i < book->num_heads; i++) num += book->heads[i].num;
    if (!is_due(book, layer, num, units * book->budget, units)) return RF_OK;
    if (book->track == RF_KV_TRACK_MEASURED) {
        int64_t stride = rf_kv_book_most(book, layer);
        RF_TRY(measured_scores(book, layer, stats, book->scores, stride, err));
        for (int h = 0; h < heads; h++) {
            rf_kv_head *head = rf_kv_head_of(book, layer, h);
            memcpy(head->score, book->scores + h * stride, (size_t)head->num * sizeof *head->score);
        }
    }
    if (layer + 1 < book->shape.num_layers) return RF_OK;
    for (int l = first; l < book->shape.num_layers; l++) RF_TRY(rf_kv_scratch(book, rf_kv_book_most(book, l), err));
    RF_TRY(rf_kv_cut_flat_all(book, first, err));
    for (int l = first; l < book->shape.num_layers; l++) book->since[l] = 0;
    *changed = true;
    return RF_OK;
}

rf_status rf_kv_step_layer(rf_kv_book *book, int layer, const rf_kv_stats *stats, bool *changed, rf_error *err) {
    const rf_kv_rule *rule = &book->rule;
    int heads = book->shape.num_kv_heads;
    int32_t most = rf_kv_book_most(book, layer);
    if (stats != NULL && stats->stride < most)
        return rf_fail(err, RF_ERR_SHAPE, "kv book: layer %d: statistics of stride %lld for %d slots", layer,
                       (long long)stats->stride, most);
    RF_TRY(track(book, layer, stats, err));
    if (rule->alloc == RF_KV_ALLOC_FLAT_ALL && layer >= rule->skip_layers)
        return step_flat_all(book, layer, stats, changed, err);
    bool due = false;
    for (int h = 0; h < heads && !due; h++) {
        int32_t budget = book->head_budget[(int64_t)layer * heads + h];
        if (rule->score == RF_KV_SCORE_LADDER) budget = book->ladder.cap;
        due = budget != RF_KV_NO_LIMIT && is_due(book, layer, rf_kv_head_of(book, layer, h)->num, budget, 1);
    }
    bool turn = rule->schedule == RF_KV_AT_EVERY && book->since[layer] >= max32(rule->every, 1);
    if (turn && !due) book->since[layer] = 0;
    if (!due) return RF_OK;
    bool by_index = rule->score == RF_KV_SCORE_POSITION || rule->score == RF_KV_SCORE_LADDER;
    if (!by_index) RF_TRY(step_scores(book, layer, stats, book->scores, most, err));
    int32_t cursor = book->cursor[layer], front, back;
    int32_t crushed = 0;
    if (rule->crush_share > 0) {
        rf_kv_protected(rule, book->budget, &front, &back);
        crushed =
            rf_kv_crush(rule, book->scores, heads, most, book->budget, front, back, book->keep, book->ids, book->work);
    }
    for (int h = 0; h < heads; h++) {
        rf_kv_head *head = rf_kv_head_of(book, layer, h);
        int32_t budget = book->head_budget[(int64_t)layer * heads + h], *keep = book->keep, count;
        float *score = book->scores + (int64_t)h * most;
        if (rule->score == RF_KV_SCORE_LADDER) budget = book->ladder.cap;
        if (budget == RF_KV_NO_LIMIT || !is_due(book, layer, head->num, budget, 1)) continue;
        if (rule->score == RF_KV_SCORE_LADDER) {
            book->cursor[layer] = cursor;
            count = rf_kv_ladder_compact(&book->ladder, layer, &book->cursor[layer], head->num, keep, book->mark);
        } else if (rule->score == RF_KV_SCORE_TREE) {
            book->cursor[layer] = cursor;
            count = tree_keep(book, head->num, &book->cursor[layer], score, keep);
        } else if (rule->crush_share > 0) {
            count = crushed;
        } else {
            rf_kv_protected(rule, min32(budget, book->budget), &front, &back);
            if (by_index) back = budget - min32(front, budget);
            count = rf_kv_choose(keep, score, head->num, budget, front, back);
        }
        RF_TRY(cut(book, layer, h, keep, count, stats, err));
        *changed = true;
    }
    book->since[layer] = 0;
    return RF_OK;
}
