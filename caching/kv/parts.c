/* caching/kv/parts.c - pooling, the best of many, and budgets of layers and heads: the parts that methods share.
 *
 * Sources  pooling: SnapKV (arXiv 2404.14469); pyramid: PyramidKV (2406.02069); flat heads: Ada-KV (2407.11550); layers by
 *          preference: CAKE (2503.12491). */
#include "caching/kv/kv.h"

#include <math.h>
#include <string.h>

#define POOL_BLOCK   256
#define MOST_WEIGHTS 256

/* Windows of columns j in begin..end, cut off at both ends. */
static void pool_clipped(float *out, const float *in, int32_t n, rf_kv_pool pool, int32_t size, int32_t begin,
                         int32_t end) {
    int32_t half = size / 2;
    for (int32_t j = begin; j < end; j++) {
        int32_t first = j > half ? j - half : 0, last = j + half < n ? j + half + 1 : n;
        double sum = 0;
        float most = -INFINITY;
        for (int32_t i = first; i < last; i++) {
            sum += (double)in[i];
            if (in[i] > most) most = in[i];
        }
        out[j] = pool == RF_KV_POOL_AVG ? (float)(sum / size) : most;
    }
}

/* out[j] from in[j..j + columns), num at once. */
static void average_block(float *restrict out, const float *restrict in, int32_t num, int32_t columns, int32_t size) {
    double sum[POOL_BLOCK] = {0};
    for (int32_t i = 0; i < columns; i++) {
        for (int32_t j = 0; j < num; j++) sum[j] += (double)in[i + j];
    }
    for (int32_t j = 0; j < num; j++) out[j] = (float)(sum[j] / size);
}

static void most_block(float *restrict out, const float *restrict in, int32_t num, int32_t columns) {
    for (int32_t j = 0; j < num; j++) out[j] = -INFINITY;
    for (int32_t i = 0; i < columns; i++) {
        for (int32_t j = 0; j < num; j++) out[j] = in[i + j] > out[j] ? in[i + j] : out[j];
    }
}

void rf_kv_pool_scores(float *out, const float *in, int32_t n, rf_kv_pool pool, int32_t size) {
    if (pool == RF_KV_POOL_NONE || size <= 1) {
        memmove(out, in, (size_t)n * sizeof *out);
        return;
    }
    /* inside, every window has all of its columns: many windows at once, each in the order of its columns */
    int32_t half = size / 2, begin = half < n ? half : n, end = n - half > begin ? n - half : begin;
    pool_clipped(out, in, n, pool, size, 0, begin);
    for (int32_t j = begin; j < end; j += POOL_BLOCK) {
        int32_t num = end - j < POOL_BLOCK ? end - j : POOL_BLOCK;
        if (pool == RF_KV_POOL_AVG)
            average_block(out + j, in + j - half, num, 2 * half + 1, size);
        else
            most_block(out + j, in + j - half, num, 2 * half + 1);
    }
    pool_clipped(out, in, n, pool, size, end, n);
}

/* Integers in the order of floats; NaN below everything, -0 and 0 tie. */
static inline uint32_t key_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t size = bits & 0x7fffffffu, negative = 0u - ((bits >> 31) & (size != 0));
    uint32_t key = (size | 0x80000000u) ^ negative;
    return key & (0u - (size <= 0x7f800000u));
}

/* How many of x[n], times a weight, have a key with these leading bits, by the bits that follow: from `shift` on, below `bins`. */
static void count_keys(int32_t *histogram, const float *x, int32_t n, double weight, uint32_t prefix, uint32_t mask,
                       int shift, uint32_t bins) {
    for (int32_t i = 0; i < n; i++) {
        uint32_t key = key_of(weight == 1 ? x[i] : (float)((double)x[i] * weight));
        if ((key & mask) == prefix) histogram[key >> shift & (bins - 1)]++;
    }
}

/* Key of the rank-th largest of [rows][stride], n of each row, times the row's weight (NULL: 1); 1 <= rank <= rows * n. *ties: how many
 * of those that have it are among the rank largest. */
static uint32_t key_of_rank(const float *x, int rows, int32_t n, int64_t stride, const double *weight, int32_t rank,
                            int32_t *ties) {
    static const struct { int shift, bits; } digits[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t prefix = 0, mask = 0;
    for (int d = 0; d < 3; d++) {
        int32_t histogram[2048] = {0};
        uint32_t bins = 1u << digits[d].bits, bin = bins - 1;
        for (int r = 0; r < rows; r++)
            count_keys(histogram, x + r * stride, n, weight ? weight[r & (MOST_WEIGHTS - 1)] : 1, prefix, mask,
                       digits[d].shift, bins);
        while (histogram[bin] < rank) rank -= histogram[bin--];
        prefix |= bin << digits[d].shift;
        mask |= (bins - 1) << digits[d].shift;
    }
    *ties = rank;
    return prefix;
}

void rf_kv_top(int32_t *keep, const float *score, int32_t n, int32_t count) {
    if (count > n) count = n;
    if (count <= 0) return;
    int32_t ties, kept = 0;
    uint32_t least = key_of_rank(score, 1, n, n, NULL, count, &ties);
    for (int32_t i = 0; i < n && kept < count; i++) {
        uint32_t key = key_of(score[i]);
        int same = key == least;
        keep[kept] = i;
        kept += (key > least) | (same & (ties > 0));
        ties -= same;
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
    double weight[MOST_WEIGHTS] = {0};
    int32_t ties;
    for (int h = 0; h < num_heads; h++) {
        weight[h & (MOST_WEIGHTS - 1)] = 1;
        if (!normalise) continue;
        const float *s = scores + h * stride;
        double all = 0, best = 0;
        for (int32_t j = 0; j < n; j++) all += (double)s[j];
        /* the sum of the best: all above the threshold */
        uint32_t low = key_of_rank(s, 1, n, n, NULL, least, &ties);
        int32_t taken = 0;
        float edge = 0;
        for (int32_t j = 0; j < n; j++) {
            if (key_of(s[j]) > low) best += (double)s[j], taken++;
            if (key_of(s[j]) == low) edge = s[j];
        }
        best += (double)edge * (least - taken);
        weight[h & (MOST_WEIGHTS - 1)] = all > 0 ? best / all : 1;
    }
    /* the key of the wanted-th largest over all heads, then counts; ties: lowest head, lowest index */
    uint32_t low = key_of_rank(scores, num_heads, n, stride, weight, wanted, &ties);
    for (int h = 0; h < num_heads; h++) {
        double w = weight[h & (MOST_WEIGHTS - 1)];
        int32_t above = 0, same = 0;
        for (int32_t j = 0; j < n; j++) {
            uint32_t key = key_of(w == 1 ? scores[h * stride + j] : (float)((double)scores[h * stride + j] * w));
            above += key > low;
            same += key == low;
        }
        if (same > ties) same = ties;
        out[h] = above + same;
        ties -= same;
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
