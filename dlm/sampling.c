/* dlm/sampling.c - host sampling of one row of logits. */
#include "dlm/sampling.h"

#include <math.h>
#include <stdlib.h>

static int by_logit(const void *pa, const void *pb) {
    const rf_sampling_entry *a = pa, *b = pb;
    if (a->z != b->z) return a->z > b->z ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* Moves the k largest (ties with the k-th too) to the front in any order; returns their number. Quickselect on the value. */
static int32_t keep_largest(rf_sampling_entry *e, int32_t num, int32_t k) {
    int32_t lo = 0, hi = num - 1;
    while (lo < hi) {
        const float pivot = e[lo + (hi - lo) / 2].z;
        int32_t i = lo, j = hi;
        while (i <= j) {
            while (e[i].z > pivot) i++;
            while (e[j].z < pivot) j--;
            if (i <= j) {
                const rf_sampling_entry t = e[i];
                e[i++] = e[j];
                e[j--] = t;
            }
        }
        if (k - 1 <= j)
            hi = j;
        else if (k - 1 >= i)
            lo = i;
        else
            break;
    }
    const float least = e[k - 1].z;
    int32_t n = k;
    for (int32_t i = k; i < num; i++)
        if (e[i].z == least) {
            const rf_sampling_entry t = e[i];
            e[i] = e[n];
            e[n++] = t;
        }
    return n;
}

static void penalize(const rf_sampling *s, float *logits, int32_t vocab, rf_sampling_entry *marks) {
    if (s->repetition_penalty == 1.0) return;
    for (int32_t i = 0; i < s->num_history; i++)
        if (s->history[i] >= 0 && s->history[i] < vocab) marks[s->history[i]].id = -1;
    for (int32_t i = 0; i < s->num_history; i++) {
        const int32_t id = s->history[i];
        if (id < 0 || id >= vocab || marks[id].id == 0) continue;
        marks[id].id = 0;
        logits[id] = (float)(logits[id] > 0 ? logits[id] / s->repetition_penalty : logits[id] * s->repetition_penalty);
    }
}

void rf_sample_row(const rf_sampling *s, float *logits, int32_t vocab, rf_sampling_entry *e, rf_token_stats *stats) {
    const double scale = s->temperature > 0.0 ? 1.0 / s->temperature : 1.0;
    for (int32_t v = 0; v < vocab; v++) e[v].id = 0;
    penalize(s, logits, vocab, e);
    for (int32_t v = 0; v < vocab; v++)
        e[v] = (rf_sampling_entry){isnan(logits[v]) ? -INFINITY : (float)(logits[v] * scale), v};

    int32_t num = s->top_k > 0 && s->top_k < vocab ? keep_largest(e, vocab, s->top_k) : vocab;
    /* with top-p, first guess that few ids hold the mass: sort those only */
    int32_t sorted = num;
    if (num > 1024) {
        sorted = keep_largest(e, num, 1024);
        if (sorted > 2048) sorted = num;
    }
    double max = -INFINITY, total = 0.0;
    for (int32_t i = 0; i < num; i++) max = e[i].z > max ? e[i].z : max;
    if (max == -INFINITY) max = 0.0;
    for (int32_t i = 0; i < num; i++) total += exp(e[i].z - max);
    qsort(e, (size_t)sorted, sizeof *e, by_logit);
    if (s->top_p < 1.0) {
        double before = 0.0;
        int32_t kept = 0;
        for (;;) {
            while (kept < sorted && (kept == 0 || before < s->top_p * total)) before += exp(e[kept++].z - max);
            if (kept < sorted || sorted == num) break;
            if (before >= s->top_p * total) break;
            qsort(e + sorted, (size_t)(num - sorted), sizeof *e, by_logit);
            sorted = num;
        }
        num = kept;
    }
    if (s->min_p > 0.0) {
        int32_t kept = 0;
        for (int32_t i = 0; i < num; i++)
            if (exp(e[i].z - max) >= s->min_p || i == 0) e[kept++] = e[i];
        num = kept;
    }
    double left = 0.0, weighted = 0.0;
    for (int32_t i = 0; i < num; i++) {
        const double w = exp(e[i].z - max);
        left += w;
        if (w > 0.0) weighted += w * (e[i].z - max);
    }
    int32_t pick = 0;
    if (s->temperature > 0.0) {
        double goal = s->uniform * left;
        for (pick = 0; pick < num - 1; pick++) {
            goal -= exp(e[pick].z - max);
            if (goal < 0.0) break;
        }
    }
    const double best = exp(e[0].z - max) / left, second = num > 1 ? exp(e[1].z - max) / left : 0.0;
    *stats = (rf_token_stats){.id = e[pick].id,
                              .best = e[0].id,
                              .prob = (float)(exp(e[pick].z - max) / left),
                              .best_prob = (float)best,
                              .margin = (float)(best - second),
                              .entropy = (float)fmax(0.0, log(left) - weighted / left),
                              .lse = (float)(max + log(left))};
}
