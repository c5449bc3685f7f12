/* caching/kv/tree.c - TreeKV: neighbours contest in a cycle, so that the past thins out towards its beginning.
 *
 * TreeKV: Smooth Key-Value Cache Compression with Tree Structures (2025). A budget is sinks, a region of c slots, recents. A cursor i
 * goes round the region: when a slot is too many, the lower running mean of attention of slots i and i + 1 goes (the left one if equal),
 * then i <- i mod c + 1. (The published pseudo-code prints (i + 1) mod c + 1; its text says "advance by one", which alone gives the
 * sparse-left, dense-right figure.)
 * Prompts: tokens between sinks and recents are cut into blocks of b (`page`, or the window), the same contest runs over blocks as they
 * come, with c / b blocks; a block's score is the mean of its tokens'. So c mod b slots are left empty, and decoding fills them. The
 * decoding cursor begins at the region's first slot. */
#include "caching/kv/book.h"

static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

void rf_kv_tree_parts(const rf_kv_rule *rule, int32_t budget, int32_t *sinks, int32_t *region, int32_t *recents) {
    *sinks = min32(rule->sinks, budget - 1);
    *recents = min32(rf_kv_num_recents(rule, budget), budget - *sinks - 1);
    *region = budget - *sinks - *recents;
}

/* The left of the pair or the right, and the cursor goes on. */
static int32_t contest(int32_t *cursor, int32_t region, const float *mean) {
    int32_t left = *cursor - 1;
    *cursor = *cursor % region + 1;
    return mean[left] <= mean[left + 1] ? left : left + 1;
}

int32_t rf_kv_tree_contest(const rf_kv_rule *rule, int32_t budget, int32_t *cursor, const float *mean) {
    int32_t sinks, region, recents;
    rf_kv_tree_parts(rule, budget, &sinks, &region, &recents);
    if (*cursor < 1 || *cursor > region) *cursor = 1;
    return sinks + contest(cursor, region, mean + sinks);
}

int32_t rf_kv_tree_prompt(const rf_kv_rule *rule, int32_t budget, int32_t num_tokens, const float *mean, int32_t *keep,
                          float *work, int32_t *ids) {
    int32_t sinks, region, recents, num = 0, cursor = 1, blocks = 0;
    rf_kv_tree_parts(rule, budget, &sinks, &region, &recents);
    int32_t size = rule->page > 0 ? rule->page : rule->window;
    if (size < 1) size = 1;
    size = min32(size, region);
    int32_t end = num_tokens - recents, most = region / size;
    for (int32_t begin = sinks; begin < end; begin += size) {
        int32_t n = min32(size, end - begin);
        double sum = 0;
        for (int32_t i = 0; i < n; i++) sum += (double)mean[begin + i];
        ids[blocks] = begin;
        work[blocks++] = (float)(sum / n);
        if (blocks <= most) continue;
        int32_t gone = contest(&cursor, most, work);
        for (int32_t i = gone; i + 1 < blocks; i++) {
            ids[i] = ids[i + 1];
            work[i] = work[i + 1];
        }
        blocks--;
    }
    for (int32_t i = 0; i < sinks; i++) keep[num++] = i;
    for (int32_t i = 0; i < blocks; i++) {
        for (int32_t j = ids[i]; j < ids[i] + size && j < end; j++) keep[num++] = j;
    }
    for (int32_t j = end; j < num_tokens; j++) keep[num++] = j;
    return num;
}
