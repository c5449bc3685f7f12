/* caching/kv/parts.c - pooling, the best of many, and budgets of layers and heads: the parts that methods share.
 *
 * Sources  pooling: SnapKV (arXiv 2404.14469); pyramid: PyramidKV (2406.02069); flat heads: Ada-KV (2407.11550); layers by
 *          preference: CAKE (2503.12491). */
#include "caching/kv/kv.h"

#include <math.h>
#include <string.h>

void rf_kv_pool_scores(float *out, const float *in, int32_t n, rf_kv_pool pool, int32_t size) {
    if (pool == RF_KV_POOL_NONE || size <= 1) {
        memmove(out, in, (size_t)n * sizeof *out);
        return;
    }
    int32_t half = size / 2;
    for (int32_t j = 0; j < n; j++) {
        int32_t begin = j > half ? j - half : 0, end = j + half < n ? j + half + 1 : n;
        double sum = 0;
        float most = -INFINITY;
        for (int32_t i = begin; i < end; i++) {
            sum += (double)in[i];
            if (in[i] > most) most = in[i];
        }
        out[j] = pool == RF_KV_POOL_AVG ? (float)(sum / size) : most;
    }
}

/* Integers in the order of floats; NaN below everything. */
static uint32_t key_of(float x) {
    uint32_t bits;
    if (isnan(x)) return 0;
    if (x == 0) x = 0; /* -0 and 0 tie */
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

void rf_kv_top(int32_t *keep, const float *score, int32_t n, int32_t count) {
    if (count > n) count = n;
    if (count <= 0) return;
    /* the key of the count-th largest, byte by byte; `rank` of those that share the bytes so far are at least it */
    uint32_t prefix = 0, mask = 0;
    int32_t rank = count;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int32_t histogram[256] = {0};
        for (int32_t i = 0; i < n; i++) {
            uint32_t key = key_of(score[i]);
            if ((key & mask) == prefix) histogram[key >> shift & 255]++;
        }
        int byte = 255;
        while (histogram[byte] < rank) rank -= histogram[byte--];
        prefix |= (uint32_t)byte << shift;
        mask |= 255u << shift;
    }
    int32_t kept = 0;
    for (int32_t i = 0; i < n && kept < count; i++) {
        uint32_t key = key_of(score[i]);
        if (key < prefix || (key == prefix && rank-- <= 0)) continue;
        keep[kept++] = i;
    }
}

/* The released code gives every layer `base` where keys < 2 base; the series holds there too, and its sum is the same. */
void rf_kv_pyramid(int32_t *out, int num_layers, int32_t capacity, int32_t window, int32_t keys, int32_t beta) {
    int32_t base = capacity - window, open = keys - window;
    int32_t least = base / (beta > 0 ? beta : 1), most = 2 * base - least;
    bool whole = keys <= capacity;
    if (most >= open) {
        most = open;
        least = 2 * base - most;
    }
    int32_t step = num_layers > 1 ? (most - least) / (num_layers - 1) : 0;
    for (int l = 0; l < num_layers; l++) out[l] = whole ? open : num_layers == 1 ? base : most - l * step;
}

void rf_kv_flat_heads(int32_t *out, const float *scores, int num_heads, int32_t n, int64_t stride, int32_t base,
                      double floor_share, bool normalise) {
    int32_t least = base < n ? base : n, wanted = num_heads * least;
    for (int h = 0; h < num_heads; h++) out[h] = 0;
    if (wanted <= 0) return;
    /* Ada-KV's weight of a head: the part of its scores that its best `base` have */
    double weight[256];
    for (int h = 0; h < num_heads; h++) {
        weight[h & 255] = 1;
        if (!normalise) continue;
        const float *s = scores + h * stride;
        double all = 0, best = 0;
        for (int32_t j = 0; j < n; j++) all += (double)s[j];
        /* the sum of the best: all above the threshold, which a bisection over keys finds */
        uint32_t low = 0, high = UINT32_MAX;
        while (low < high) {
            uint32_t middle = low + (high - low) / 2 + ((high - low) & 1);
            int32_t above = 0;
            for (int32_t j = 0; j < n; j++) above += key_of(s[j]) >= middle;
            if (above >= least)
                low = middle;
            else
                high = middle - 1;
        }
        int32_t taken = 0;
        float edge = 0;
        for (int32_t j = 0; j < n; j++) {
            if (key_of(s[j]) > low) best += (double)s[j], taken++;
            if (key_of(s[j]) == low) edge = s[j];
        }
        best += (double)edge * (least - taken);
        weight[h & 255] = all > 0 ? best / all : 1;
    }
    /* the key of the wanted-th largest over all heads, then counts; ties: lowest head, lowest index */
    uint32_t low = 0, high = UINT32_MAX;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2 + ((high - low) & 1);
        int64_t above = 0;
        for (int h = 0; h < num_heads; h++) {
            for (int32_t j = 0; j < n; j++)
                above += key_of((float)((double)scores[h * stride + j] * weight[h & 255])) >= middle;
        }
        if (above >= wanted)
            low = middle;
        else
            high = middle - 1;
    }
    int32_t taken = 0;
    for (int h = 0; h < num_heads; h++) {
        for (int32_t j = 0; j < n; j++) {
            if (key_of((float)((double)scores[h * stride + j] * weight[h & 255])) > low) out[h]++, taken++;
        }
    }
    for (int h = 0; h < num_heads; h++) {
        for (int32_t j = 0; j < n && taken < wanted; j++) {
            if (key_of((float)((double)scores[h * stride + j] * weight[h & 255])) == low) out[h]++, taken++;
        }
    }
    int32_t floored = (int32_t)floor(floor_share * base);
    for (int h = 0; h < num_heads; h++) out[h] = (int32_t)nearbyint(out[h] * (1 - floor_share) + floored);
}

void rf_kv_cake(int32_t *out, const double *preference, int num_done, int64_t total, int32_t most) {
    double sum = 0;
    for (int l = 0; l < num_done; l++) sum += preference[l];
    int64_t goal = total < (int64_t)most * num_done ? total : (int64_t)most * num_done, given = 0, excess = 0;
    int open = 0;
    for (int l = 0; l < num_done; l++) {
        double share = sum > 0 && isfinite(sum) ? preference[l] / sum : 1.0 / num_done;
        double rows = share * (double)total;
        int64_t whole = rows < (double)INT32_MAX ? (int64_t)rows : INT32_MAX;
        if (whole > most) excess += whole - most;
        out[l] = (int32_t)(whole < most ? whole : most);
        open += out[l] < most;
    }
    /* what was clipped, then what rounding lost: evenly over layers with room, the remainder to the first of them */
    for (int round = 0; round < num_done + 2 && open > 0; round++) {
        given = 0;
        for (int l = 0; l < num_done; l++) given += out[l];
        int64_t left = round == 0 && excess > 0 && excess < goal - given ? excess : goal - given;
        if (left <= 0) break;
        int64_t each = left / open, more = left % open;
        int next_open = 0;
        for (int l = 0; l < num_done; l++) {
            if (out[l] >= most) continue;
            int64_t rows = out[l] + each + (more > 0);
            more -= more > 0;
            out[l] = (int32_t)(rows < most ? rows : most);
            next_open += out[l] < most;
        }
        open = next_open;
    }
}
