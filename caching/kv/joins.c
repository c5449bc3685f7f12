/* caching/kv/joins.c - which kept token takes what a dropped one leaves behind.
 *
 *   MERGE       kvpress MergingPress: the kept token of the largest key cosine (ties: the first); weight max(cos, 0) |v_e| / (|v_e| +
 *               |v_t|); values alone. A weight of 0 is no join.
 *   MERGE_NEAR  Elastic Cache, the intended rule: the kept token of the nearest index (ties: the lower one); the mean of it and of all that
 *               it takes, keys and values, so weights of 1.
 *   MERGE_EMS   EMS: the kept token (class centre) of the largest cos(k) cos(v); keys and values averaged; a zero class drops. Not
 *               verified against the paper: its threshold and class counts (ours: one class a kept token, the zero class is a
 *               similarity below 0.5). Two opposite pairs would count as similar (published reviews note it): a negative cosine is 0
 *               here. */
#include "caching/kv/book.h"

#include <math.h>

#include "core/memory.h"

#define EMS_ZERO_CLASS 0.5

static double dot(const float *a, const float *b, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static double cosine(const float *a, const float *b, int32_t n, double norm_a, double norm_b) {
    double norms = norm_a * norm_b;
    return norms > 0 ? dot(a, b, n) / norms : 0;
}

static rf_status add(rf_kv_joins *out, rf_kv_join join, rf_error *err) {
    if (out->num == out->room) {
        int32_t room = out->room > 0 ? 2 * out->room : 16;
        rf_kv_join *grown = rf_realloc(out->join, (size_t)room * sizeof *grown);
        if (grown == NULL) return rf_fail(err, RF_ERR_MEMORY, "kv book: no memory for %d joins", room);
        out->join = grown;
        out->room = room;
    }
    out->join[out->num++] = join;
    return RF_OK;
}

/* Kept tokens' norms of keys are in work, by index. */
static int32_t most_similar(bool with_values, int32_t from, const int32_t *keep, int32_t count, const float *k,
                            const float *v, int32_t dim, const float *work, double *similarity) {
    int32_t best = 0;
    double norm = sqrt(dot(k + (int64_t)from * dim, k + (int64_t)from * dim, dim));
    double norm_v = with_values ? sqrt(dot(v + (int64_t)from * dim, v + (int64_t)from * dim, dim)) : 0;
    *similarity = -INFINITY;
    for (int32_t i = 0; i < count; i++) {
        int64_t to = keep[i];
        double s = cosine(k + (int64_t)from * dim, k + to * dim, dim, norm, (double)work[to]);
        if (with_values) {
            const float *x = v + to * dim;
            double c = cosine(v + (int64_t)from * dim, x, dim, norm_v, sqrt(dot(x, x, dim)));
            s = (s > 0 ? s : 0) * (c > 0 ? c : 0);
        }
        if (s > *similarity) {
            *similarity = s;
            best = i;
        }
    }
    return best;
}

rf_status rf_kv_join_dropped(rf_kv_joins *out, rf_kv_action action, int32_t n, const int32_t *ids, const int32_t *keep,
                             int32_t count, const float *k, const float *v, int32_t head_dim, float *work,
                             rf_error *err) {
    out->num = 0;
    if (count == 0 || count == n) return RF_OK;
    if (action != RF_KV_MERGE_NEAR) {
        if (k == NULL || v == NULL)
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "kv book: a rule that merges by likeness wants keys and values, found none");
        for (int32_t i = 0; i < count; i++) {
            const float *x = k + (int64_t)keep[i] * head_dim;
            work[keep[i]] = (float)sqrt(dot(x, x, head_dim));
        }
    }
    for (int32_t from = 0, next = 0; from < n; from++) { /* keep[next]: the first kept one at or behind */
        while (next < count && keep[next] < from) next++;
        if (next < count && keep[next] == from) continue;
        rf_kv_join join = {ids[from], -1, 1, true};
        double similarity = 0;
        if (action == RF_KV_MERGE_NEAR) {
            bool lower = next > 0 && (next == count || from - keep[next - 1] <= keep[next] - from);
            join.to = ids[keep[lower ? next - 1 : next]];
        } else {
            int32_t to =
                keep[most_similar(action == RF_KV_MERGE_EMS, from, keep, count, k, v, head_dim, work, &similarity)];
            join.to = ids[to];
            if (action == RF_KV_MERGE_EMS) {
                if (similarity < EMS_ZERO_CLASS) continue;
            } else {
                const float *a = v + (int64_t)from * head_dim, *b = v + (int64_t)to * head_dim;
                double norm_a = sqrt(dot(a, a, head_dim)), norm_b = sqrt(dot(b, b, head_dim));
                if (similarity <= 0 || norm_a == 0) continue;
                join.weight = (float)(similarity * norm_a / (norm_a + norm_b));
                join.keys = false;
            }
        }
        RF_TRY(add(out, join, err));
    }
    return RF_OK;
}
