/* caching/kv/crush.c - KVCrush: pages of the highest scores, and representatives of the others.
 *
 * KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour (2025); pages as in the released implementations (the
 * abstract speaks of tokens). Slots between the protected ones are cut into pages of `page` from the left; slots that fill no page stand
 * next to the newest and stay while there is room. Of the pages that fit, a part of 1 - crush_share is chosen by the sum of the scores of
 * its slots over all heads. The others have a signature: a bit for each head and slot, set if the score is in the top half of that head
 * (of the slots in pages; ties to the lowest slot). They are ordered by the Hamming distance to the anchor 0101..., and evenly spaced ones
 * of that order stay. One set for all heads of a layer. */
#include "caching/kv/book.h"

#include <string.h>

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

int32_t rf_kv_crush(const rf_kv_rule *rule, const float *score, int num_heads, int32_t n, int32_t budget, int32_t front,
                    int32_t back, int32_t *keep, int32_t *ids, float *work) {
    int32_t page = rule->page > 0 ? rule->page : 1;
    front = min32(front, budget);
    back = min32(back, budget - front);
    int32_t pages = (n - front - back) / page, odd = (n - front - back) % page;
    odd = min32(odd, budget - front - back);
    int32_t fit = min32((budget - front - back - odd) / page, pages);
    int32_t heavy = fit - (int32_t)(rule->crush_share * fit), rest = fit - heavy, in_pages = pages * page;
    /* page sums, in work[0..pages) */
    for (int32_t p = 0; p < pages; p++) {
        double sum = 0;
        for (int h = 0; h < num_heads; h++) {
            for (int32_t i = 0; i < page; i++) sum += (double)score[(int64_t)h * n + front + p * page + i];
        }
        work[p] = (float)sum;
    }
    int32_t *chosen = keep; /* of pages, until slots are written */
    rf_kv_top(chosen, work, pages, heavy);
    /* distances of the others, as scores: the nearest first. work[in_pages..) is 1 for heavy pages */
    float *taken = work + in_pages, *near = work;
    memset(taken, 0, (size_t)pages * sizeof *taken);
    for (int32_t i = 0; i < heavy; i++) taken[chosen[i]] = 1;
    memset(near, 0, (size_t)pages * sizeof *near);
    for (int h = 0; h < num_heads && rest > 0; h++) {
        const float *s = score + (int64_t)h * n + front;
        int32_t half = in_pages / 2, at = 0;
        rf_kv_top(ids, s, in_pages, half);
        for (int32_t i = 0; i < in_pages; i++) {
            bool bit = at < half && ids[at] == i, anchor = (h * page + i % page) % 2 == 1;
            at += bit;
            near[i / page] += bit != anchor;
        }
    }
    int32_t others = 0;
    for (int32_t p = 0; p < pages; p++) {
        if (taken[p] == 0) ids[others++] = p;
    }
    /* by distance, ties by page: insertion keeps the order of equals */
    for (int32_t i = 1; i < others && rest > 0; i++) {
        int32_t p = ids[i], j = i;
        for (; j > 0 && near[ids[j - 1]] > near[p]; j--) ids[j] = ids[j - 1];
        ids[j] = p;
    }
    for (int32_t i = 0; i < rest; i++) {
        int32_t at = rest == 1 ? 0 : (int32_t)((int64_t)i * (others - 1) / (rest - 1));
        taken[ids[at]] = 1;
    }
    int32_t num = 0;
    for (int32_t i = 0; i < front; i++) keep[num++] = i;
    for (int32_t p = 0; p < pages; p++) {
        for (int32_t i = 0; i < page && taken[p] != 0; i++) keep[num++] = front + p * page + i;
    }
    for (int32_t i = n - back - odd; i < n; i++) keep[num++] = i;
    return num;
}
