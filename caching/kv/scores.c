/* caching/kv/scores.c - what a layer measured to one score for each key head and key.
 *
 * Order: query heads (reduce over queries, value term) -> pool -> group, or group -> pool -> heads of the layer -> value norm ->
 * protection. Pooling leaves out the columns of the window, whose own rows have not all seen them. A group's sum and mean give the same
 * choice; max does not. */
#include "caching/kv/book.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define MAX_HEAD_DIM 512 /* of value=caote */
#define BLOCK        256
#define SERIAL_WORK                                                                                                    \
    (1 << 20) /* numbers, about a millisecond: waking others may cost more, where other programs want the cores too */
#define MOST_THREADS 8

int rf_kv_threads(const rf_kv_stats *stats, int units, int64_t work) {
    if (stats == NULL || stats->num_threads < 2 || units < 2 || work < SERIAL_WORK) return 1;
    int num = stats->num_threads < MOST_THREADS ? stats->num_threads : MOST_THREADS;
    return num < units ? num : units;
}

static rf_status want(const void *array, const char *name, int layer, rf_error *err) {
    if (array != NULL) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "kv scores: layer %d: this rule wants %s measured, found nothing", layer,
                   name);
}

static bool replaces(rf_kv_value value) {
    return value >= RF_KV_VALUE_OBC_VALUE;
}
static bool is_caote(rf_kv_value value) {
    return value == RF_KV_VALUE_CAOTE || value == RF_KV_VALUE_FASTCAOTE;
}

static double variance(double s1, double s2, int32_t num) {
    if (num < 2) return 0;
    double v = (s2 - s1 * s1 / num) / (num - 1);
    return v > 0 ? v : 0;
}

/* Over the queries, of query head q: out [n]. */
static void reduce_queries(const rf_kv_rule *rule, const rf_kv_stats *stats, int q, int32_t n, float *out) {
    int64_t at = q * stats->stride;
    int32_t num = stats->num_queries > 0 ? stats->num_queries : 1;
    if (replaces(rule->value)) {
        memcpy(out, stats->removal + at, (size_t)n * sizeof *out);
        return;
    }
    const float *s1 = rule->reduce == RF_KV_REDUCE_MAX ? stats->peak + at : stats->s1 + at;
    switch (rule->reduce) {
    case RF_KV_REDUCE_MEAN:
        for (int32_t j = 0; j < n; j++) out[j] = s1[j] / (float)num;
        break;
    case RF_KV_REDUCE_VISIBLE:
        for (int32_t j = 0; j < n; j++) out[j] = s1[j] / (float)(n - j);
        break;
    case RF_KV_REDUCE_MEANVAR: {
        const float *s2 = stats->s2 + at;
        for (int32_t j = 0; j < n; j++)
            out[j] = (float)((double)s1[j] / num + rule->gamma * variance((double)s1[j], (double)s2[j], num));
        break;
    }
    default: memcpy(out, s1, (size_t)n * sizeof *out); break;
    }
}

/* score -> h / (1 - h) |o - v|, h = score / sum, o = sum h v or the mean of v. */
static void caote(const rf_kv_rule *rule, const rf_kv_stats *stats, int kv_head, int32_t n, float *score) {
    int32_t dim = stats->head_dim;
    const float *v = stats->v + (int64_t)kv_head * stats->stride * dim;
    double sum = 0;
    for (int32_t j = 0; j < n; j++) sum += (double)score[j];
    double o[MAX_HEAD_DIM];
    int32_t cols = dim < MAX_HEAD_DIM ? dim : MAX_HEAD_DIM;
    for (int32_t d = 0; d < cols; d++) o[d] = 0;
    for (int32_t j = 0; j < n; j++) {
        double weight = rule->value == RF_KV_VALUE_FASTCAOTE ? 1.0 / n : sum > 0 ? (double)score[j] / sum : 0;
        for (int32_t d = 0; d < cols; d++) o[d] += weight * (double)v[(int64_t)j * dim + d];
    }
    for (int32_t j = 0; j < n; j++) {
        double off = 0, h = sum > 0 ? (double)score[j] / sum : 0;
        for (int32_t d = 0; d < cols; d++) {
            double x = o[d] - (double)v[(int64_t)j * dim + d];
            off += x * x;
        }
        if (h > 1 - 1e-4) h = 1 - 1e-4;
        score[j] = (float)(h / (1 - h) * sqrt(off));
    }
}

static void join(rf_kv_over over, float *restrict a, const float *restrict b, int32_t n) {
    if (over == RF_KV_OVER_MAX) {
        for (int32_t j = 0; j < n; j++) a[j] = a[j] > b[j] ? a[j] : b[j];
    } else {
        for (int32_t j = 0; j < n; j++) a[j] += b[j];
    }
}

/* Of one key head: out [n], before protection; open: columns that are pooled; work [2 n]. */
static void attention_scores(const rf_kv_rule *rule, const rf_kv_shape *shape, const rf_kv_stats *stats, int layer,
                             int head, int32_t n, int32_t open, float *out, float *work) {
    int group = shape->num_q_heads / shape->num_kv_heads, first = head * group, end = first + group, num = 0;
    bool over_layer = rule->heads != RF_KV_HEADS_NONE;
    const uint8_t *listed =
        rule->heads == RF_KV_HEADS_LIST ? shape->head_list + (int64_t)layer * shape->num_q_heads : NULL;
    if (over_layer) first = 0, end = shape->num_q_heads;
    for (int q = first; q < end; q++) {
        if (listed != NULL && !listed[q]) continue;
        float *own = num == 0 ? out : work;
        reduce_queries(rule, stats, q, n, own);
        if (is_caote(rule->value)) caote(rule, stats, q / group, n, own);
        if (!rule->pool_after_group && rule->pool != RF_KV_POOL_NONE) {
            rf_kv_pool_scores(work + n, own, open, rule->pool, rule->pool_size);
            memcpy(own, work + n, (size_t)open * sizeof *own);
        }
        if (num++ > 0) join(over_layer ? RF_KV_OVER_SUM : rule->group, out, own, n);
    }
    if (over_layer || rule->group == RF_KV_OVER_MEAN || rule->group == RF_KV_OVER_NONE) {
        for (int32_t j = 0; j < n; j++) out[j] /= (float)num;
    }
    if (rule->pool_after_group && rule->pool != RF_KV_POOL_NONE) {
        rf_kv_pool_scores(work, out, open, rule->pool, rule->pool_size);
        memcpy(out, work, (size_t)open * sizeof *out);
    }
}

/* Softmax over keys behind the sinks of each query head's logits, mean over the group. */
static void expected_scores(const rf_kv_rule *rule, const rf_kv_shape *shape, const rf_kv_stats *stats, int head,
                            int32_t n, float *out) {
    int group = shape->num_q_heads / shape->num_kv_heads;
    int32_t begin = rule->sinks < n ? rule->sinks : n;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int g = 0; g < group; g++) {
        const float *z = stats->expected + (int64_t)(head * group + g) * stats->stride;
        double most = -INFINITY, sum = 0;
        for (int32_t j = begin; j < n; j++) most = (double)z[j] > most ? (double)z[j] : most;
        for (int32_t j = begin; j < n; j++) sum += exp((double)z[j] - most);
        for (int32_t j = begin; j < n; j++) out[j] += (float)(exp((double)z[j] - most) / sum / group);
    }
}

/* The second half of a budget by (s + 1e-4) |W_O v|; the first half, by s alone, comes before all of it. */
static void weigh_by_out(const rf_kv_shape *shape, const rf_kv_stats *stats, int head, int32_t n, int32_t front,
                         int32_t back, int32_t budget, float *out, float *work) {
    int group = shape->num_q_heads / shape->num_kv_heads;
    int32_t open = n - front - back, first_half = budget / 2 - front - back; /* protected ones are of it */
    if (first_half > open) first_half = open;
    for (int32_t j = 0; j < n; j++) {
        double wo = 0;
        for (int g = 0; g < group; g++) wo += (double)stats->wo_norm[(int64_t)(head * group + g) * stats->stride + j];
        work[j] = (float)(((double)out[j] + 1e-4) * wo / group);
    }
    if (first_half > 0) {
        int32_t *keep = (int32_t *)(work + n); /* 4 bytes each, as the floats there */
        rf_kv_top(keep, out + front, open, first_half);
        for (int32_t i = 0; i < first_half; i++) work[front + keep[i]] = FLT_MAX;
    }
    memcpy(out, work, (size_t)n * sizeof *out);
}

static rf_status less_redundancy(const rf_kv_rule *rule, const rf_kv_stats *stats, int h, int32_t n, float *score,
                                 float *scratch, rf_error *err) {
    RF_TRY(rf_kv_redundancy(scratch, stats->k + h * stats->stride * stats->head_dim, n, stats->head_dim, err));
    for (int32_t j = 0; j < n; j++)
        score[j] = (float)(rule->redundancy * (double)score[j] - (1 - rule->redundancy) * (double)scratch[j]);
    return RF_OK;
}

rf_status rf_kv_prefill_scores(const rf_kv_rule *rule, const rf_kv_shape *shape, int layer, int32_t num_tokens,
                               int32_t budget, const rf_kv_stats *stats, float *out, float *scratch, rf_error *err) {
    int32_t n = num_tokens, front, back;
    rf_kv_protected(rule, budget > 0 ? budget : n, &front, &back);
    if (front > n) front = n;
    if (back > n - front) back = n - front;
    if (rule->score != RF_KV_SCORE_RANDOM) RF_TRY(want(stats, "a layer", layer, err));
    switch (rule->score) {
    case RF_KV_SCORE_ATTENTION:
        if (replaces(rule->value))
            RF_TRY(want(stats->removal, "losses", layer, err));
        else if (rule->reduce == RF_KV_REDUCE_MAX)
            RF_TRY(want(stats->peak, "peaks", layer, err));
        else
            RF_TRY(want(stats->s1, "sums", layer, err));
        if (rule->reduce == RF_KV_REDUCE_MEANVAR && !replaces(rule->value))
            RF_TRY(want(stats->s2, "sums of squares", layer, err));
        if (is_caote(rule->value)) RF_TRY(want(stats->v, "values", layer, err));
        if (rule->redundancy > 0) RF_TRY(want(stats->k, "keys", layer, err));
        if (is_caote(rule->value) && stats->head_dim > MAX_HEAD_DIM)
            return rf_fail(err, RF_ERR_UNSUPPORTED,
                           "kv scores: layer %d: value=caote is for heads of at most %d columns, found %d", layer,
                           MAX_HEAD_DIM, stats->head_dim);
        if (rule->value == RF_KV_VALUE_WO) RF_TRY(want(stats->wo_norm, "norms of W_O v", layer, err));
        if (rule->heads == RF_KV_HEADS_LIST) RF_TRY(want(shape->head_list, "a calibrated list of heads", layer, err));
        break;
    case RF_KV_SCORE_KNORM: RF_TRY(want(stats->key_norm, "key norms", layer, err)); break;
    case RF_KV_SCORE_KEYDIFF: RF_TRY(want(stats->key_cosine, "key cosines", layer, err)); break;
    case RF_KV_SCORE_EXPECTED: RF_TRY(want(stats->expected, "expected logits", layer, err)); break;
    case RF_KV_SCORE_GATE: RF_TRY(want(stats->gate, "gates", layer, err)); break;
    case RF_KV_SCORE_RANDOM: break;
    default: return rf_fail(err, RF_ERR_UNSUPPORTED, "kv scores: layer %d: this rule's choice is not a score", layer);
    }
    if (rule->value == RF_KV_VALUE_NORM) RF_TRY(want(stats->value_norm, "value norms", layer, err));

    bool window = rule->queries == RF_KV_QUERIES_WINDOW || rule->queries == RF_KV_QUERIES_DRAFTED;
    int32_t open = rule->score == RF_KV_SCORE_ATTENTION && window && !rule->open_window ? n - back : n;
    bool alike = rule->score == RF_KV_SCORE_ATTENTION && rule->heads != RF_KV_HEADS_NONE;
    int64_t cost = stats != NULL && is_caote(rule->value) ? stats->head_dim
                   : rule->score == RF_KV_SCORE_EXPECTED  ? 16
                                                          : 1;
    int threads = rf_kv_threads(stats, shape->num_kv_heads, cost * shape->num_q_heads * n);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && !alike)
    for (int h = 0; h < (alike ? 1 : shape->num_kv_heads); h++) {
        float *score = out + (int64_t)h * n;
        int64_t at = stats ? h * stats->stride : 0;
        switch (rule->score) {
        case RF_KV_SCORE_ATTENTION:
            attention_scores(rule, shape, stats, layer, h, n, open, score, scratch + (int64_t)h * 2 * n);
            break;
        case RF_KV_SCORE_EXPECTED: expected_scores(rule, shape, stats, h, n, score); break;
        default:
            for (int32_t j = 0; j < n; j++) {
                score[j] = rule->score == RF_KV_SCORE_KNORM     ? -stats->key_norm[at + j]
                           : rule->score == RF_KV_SCORE_KEYDIFF ? -stats->key_cosine[at + j]
                           : rule->score == RF_KV_SCORE_GATE    ? (float)(n + 1 - j) * stats->gate[at + j]
                                                                : rf_kv_uniform(rule->seed, layer, h, j);
            }
        }
    }
    for (int h = 1; h < shape->num_kv_heads && alike; h++) memcpy(out + (int64_t)h * n, out, (size_t)n * sizeof *out);
    for (int h = 0; h < shape->num_kv_heads && rule->redundancy > 0; h++)
        RF_TRY(less_redundancy(rule, stats, h, n, out + (int64_t)h * n, scratch, err));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int h = 0; h < shape->num_kv_heads; h++) {
        float *score = out + (int64_t)h * n;
        if (rule->value == RF_KV_VALUE_NORM) {
            for (int32_t j = 0; j < n; j++) score[j] *= stats->value_norm[h * stats->stride + j];
        }
        if (rule->value == RF_KV_VALUE_WO)
            weigh_by_out(shape, stats, h, n, front, back, budget > 0 ? budget : n, score, scratch + (int64_t)h * 2 * n);
        for (int32_t j = 0; j < front; j++) score[j] = INFINITY;
        for (int32_t j = n - back; j < n; j++) score[j] = INFINITY;
    }
    return RF_OK;
}

double rf_kv_preference(const rf_kv_rule *rule, const rf_kv_shape *shape, int32_t num_tokens,
                        const rf_kv_stats *stats) {
    double disorder = 0, spread = 0;
    int32_t before = num_tokens - stats->num_queries;
    for (int q = 0; q < shape->num_q_heads; q++) {
        disorder += (double)stats->entropy[q];
        const float *s1 = stats->s1 + q * stats->stride, *s2 = stats->s2 + q * stats->stride;
        for (int32_t begin = 0; begin < before; begin += BLOCK) {
            double block[BLOCK];
            int32_t num = before - begin < BLOCK ? before - begin : BLOCK;
            for (int32_t j = 0; j < num; j++)
                block[j] = variance((double)s1[begin + j], (double)s2[begin + j], stats->num_queries);
            for (int32_t j = 0; j < num; j++) spread += block[j]; /* in this order */
        }
    }
    return pow(disorder > 0 ? disorder : 0, 1 / rule->tau1) * pow(spread, 1 / rule->tau2);
}

void rf_kv_step_probability(const rf_kv_rule *rule, const rf_kv_shape *shape, int head, int32_t n,
                            const rf_kv_stats *stats, float *out) {
    int group = shape->num_q_heads / shape->num_kv_heads, first = head * group, num = group;
    if (rule->heads == RF_KV_HEADS_MEAN) first = 0, num = shape->num_q_heads;
    bool losses = stats->removal != NULL && (replaces(rule->value) || is_caote(rule->value));
    const float *in = losses ? stats->removal : stats->s1;
    for (int32_t j = 0; j < n; j++) {
        double sum = 0, most = 0;
        for (int q = first; q < first + num; q++) {
            double p = (double)in[q * stats->stride + j];
            sum += p;
            if (p > most) most = p;
        }
        double p = sum / num;
        bool of_group = rule->heads != RF_KV_HEADS_MEAN;
        if (of_group && rule->group == RF_KV_OVER_MAX) p = most;
        /* as a prompt's queries count, or what follows a prompt would weigh less (A2SF) */
        if (of_group && rule->group == RF_KV_OVER_SUM && rule->score == RF_KV_SCORE_ATTENTION) p = sum;
        out[j] = (float)(losses && is_caote(rule->value) ? sqrt(p) : p);
    }
}

float rf_kv_uniform(uint64_t seed, int layer, int head, int32_t position) {
    /* SplitMix64 (Steele et al. 2014) of a number for each place */
    uint64_t x = seed + 0x9e3779b97f4a7c15u * (1 + (uint64_t)(uint32_t)position + ((uint64_t)(uint32_t)head << 32) +
                                               ((uint64_t)(uint32_t)layer << 48));
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (float)((x ^ x >> 31) >> 40) * 0x1p-24f;
}

int32_t rf_kv_num_recents(const rf_kv_rule *rule, int32_t budget) {
    if (rule->recents >= 0) return rule->recents;
    int32_t left = budget - rule->sinks;
    return left > 0 ? left / 2 : 0;
}
