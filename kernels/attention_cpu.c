/* kernels/attention_cpu.c
 * Maths    out = softmax(softmax_scale * q k^T + mask) v; lse = max + ln sum exp(s - max); see attention.h.
 * Many     queries: tasks are (batch, query head, block of queries): scores of the block against all its keys by one GEMM
 *          per key range, a softmax over whole rows, one GEMM with the values. Listed queries and keys are packed first.
 * Few      at most 64 rows of a key head, 256 where query heads share it: tasks are (batch, key head, block of rows), so that keys and
 *          values are read once for all of them; online softmax (m, l, o) over tiles of keys that stay in the nearest cache.
 *          From 3 rows on scores lie [key][row]: products and exponentials run over rows, nothing is transposed but q.
 *          Below, a score is a dot product and lies [row][key].
 * Memory   the workspace holds, per thread: scores, packed queries, keys, values and key positions. */
#include "kernels/attention_checks.h"
#include "kernels/cpu.h"

#define SCORE_ELEMS 65536 /* scores of a block that still fit a core's cache */
#define MIN_QUERIES 32
#define MAX_QUERIES 256

#define FEW_ROWS   64  /* of a key head */
#define FEW_SHARED 256 /* and where query heads share it */
#define FEW_BLOCK  64  /* of a task */
#define DOT_ROWS   2   /* up to here a score is a dot product */
#define ROW_TILE   64  /* keys of a tile with [key][row] scores */
#define DOT_TILE   256 /* and with [row][key] scores */

/* Floats anywhere, in whatever registers there are. */
typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));

/* Sizes of a thread's scratch, in elements; each part starts on a cache line. */
typedef struct {
    int64_t queries; /* of a block */
    size_t scores, q, kv, key_pos, out, stats;
    bool few;
    int64_t block_rows; /* of a task of few rows */
} scratch_plan;

static size_t line_elems(int64_t elems) {
    return ((size_t)elems + 15) / 16 * 16;
}

static int64_t pad16(int64_t rows) {
    return (rows + 15) / 16 * 16;
}

static scratch_plan plan_scratch(const rf_attention_args *a) {
    scratch_plan p = {0};
    int64_t group = a->num_q_heads / a->num_kv_heads, rows = a->q_len * group;
    p.few = rows <= (group > 1 ? FEW_SHARED : FEW_ROWS);
    if (p.few) {
        /* A few tasks for each thread where key heads alone do not give them. */
        p.block_rows = FEW_BLOCK;
        while (p.block_rows > 16 && a->batch * a->num_kv_heads * rf_div_up(rows, p.block_rows) < 8) p.block_rows /= 2;
        int64_t block = rf_max64(1, rf_min64(p.block_rows, rows));
        p.scores = line_elems(rf_max64(ROW_TILE * pad16(block), DOT_TILE * DOT_ROWS));
        p.q = line_elems(pad16(block) * a->head_dim);
        p.kv = line_elems(DOT_TILE * a->head_dim);
        p.key_pos = line_elems(DOT_TILE);
        p.out = line_elems(pad16(block) * a->head_dim);
        p.stats = line_elems(4 * pad16(block));
        return p;
    }
    p.queries = SCORE_ELEMS / rf_max64(a->kv_len, 1);
    p.queries = rf_max64(MIN_QUERIES, rf_min64(MAX_QUERIES, p.queries));
    p.queries = rf_max64(1, rf_min64(p.queries, a->q_len));
    /* Lists are pointers, which may be missing when the size is asked for: room for them is always there. */
    p.scores = line_elems(p.queries * a->kv_len);
    p.q = line_elems(p.queries * a->head_dim);
    p.kv = line_elems(a->kv_len * a->head_dim);
    p.key_pos = line_elems(a->kv_len);
    p.out = p.q;
    p.stats = line_elems(2 * p.queries);
    return p;
}

static size_t scratch_elems(const scratch_plan *p) {
    return p->scores + p->q + 2 * p->kv + p->key_pos + p->out + p->stats;
}

size_t rf_attention_workspace_cpu(rf_backend *backend, const rf_attention_args *a) {
    if (rf_attention_check(a, NULL) != RF_OK) return 0;
    scratch_plan p = plan_scratch(a);
    return (size_t)rf_backend_num_threads(backend) * scratch_elems(&p) * sizeof(float);
}

/* The first key position that a query at `pos` does not see. */
static int64_t key_limit(const rf_attention_args *a, int64_t pos) {
    switch (a->mask) {
    case RF_MASK_CAUSAL: return pos + 1;
    case RF_MASK_BLOCK_CAUSAL: return (pos / a->causal_block + 1) * a->causal_block;
    default: return INT64_MAX;
    }
}

/* The position of the query that stands in row q_row of batch `batch`, less that row. */
static int64_t position_offset(const rf_attention_args *a, int64_t batch) {
    return (int64_t)a->q_pos_offset + (a->q_pos_offsets ? a->q_pos_offsets[batch] : 0);
}

/* out row and lse of one query and head from o * inv and lse: joined with what is kept of it, stored where it belongs. o may be
 * the out row. */
static void finish_row(const rf_attention_args *a, int64_t batch, int64_t head, int64_t query, const float *o,
                       float inv, float lse) {
    int64_t d = a->head_dim, listed = batch * a->q_batch_stride_rows + query;
    int64_t out_row = a->out_rows ? a->out_rows[listed] : query;
    float *out =
        (float *)a->out + batch * a->out_batch_stride + out_row * a->out_row_stride + head * a->out_head_stride;
    if (a->join_out) {
        int64_t slot = a->join_rows ? a->join_rows[listed] : query;
        double mine = lse, kept = a->join_lse[head * a->join_slots + slot], top = mine > kept ? mine : kept;
        double wa = mine == -INFINITY ? 0 : exp(mine - top), wb = kept == -INFINITY ? 0 : exp(kept - top);
        double sum = wa + wb;
        float fa = sum == 0 ? 0.0f : (float)(inv * wa / sum), fb = sum == 0 ? 0.0f : (float)(wb / sum);
        const float *other = a->join_out + (slot * a->num_q_heads + head) * d;
        if (wb == 0) /* an empty side may hold anything */
            for (int64_t c = 0; c < d; c++) out[c] = fa * o[c];
        else
            for (int64_t c = 0; c < d; c++) out[c] = fa * o[c] + fb * other[c];
        lse = sum == 0 ? -INFINITY : (float)(top + log(sum));
    } else {
        for (int64_t c = 0; c < d; c++) out[c] = o[c] * inv;
    }
    if (!a->lse) return;
    int64_t slots = a->out_rows ? a->lse_slots : a->q_len;
    a->lse[(batch * a->num_q_heads + head) * slots + out_row] = lse;
}

RF_HOT static float row_max(const float *s, int64_t num) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < num; j++) top = s[j] > top ? s[j] : top;
    return top;
}

/* s[j] = exp(s[j] - top); partial sums of 512 are added in double. */
RF_HOT static double row_exp_sum(float *s, int64_t num, float top) {
    double total = 0;
    for (int64_t j0 = 0; j0 < num; j0 += 512) {
        int64_t end = j0 + 512 < num ? j0 + 512 : num;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = j0; j < end; j++) {
            s[j] = rf_exp(s[j] - top);
            sum += s[j];
        }
        total += sum;
    }
    return total;
}

/* Rows turned by their positions, dense in out (which may be x): row i stands at (rows[i], or first + i) + offset. */
RF_HOT static void turn_rows(float *out, const float *x, int64_t stride, const float *rope, int64_t pairs, int64_t d,
                             const int32_t *rows, int64_t first, int64_t offset, int64_t num) {
    for (int64_t i = 0; i < num; i++)
        rf_cpu_turn(out + i * d, x + i * stride, rope + ((rows ? rows[i] : first + i) + offset) * pairs * 2, pairs, d);
}

static void attend_block(const rf_attention_args *a, const scratch_plan *plan, float *scratch, int64_t batch, int head,
                         int64_t first, int64_t num) {
    int64_t d = a->head_dim;
    int kv_head = head / (a->num_q_heads / a->num_kv_heads);
    float *scores = scratch, *q_packed = scores + plan->scores;
    float *k_packed = q_packed + plan->q, *v_packed = k_packed + plan->kv;
    int32_t *key_pos = (int32_t *)(v_packed + plan->kv);
    float *out_packed = v_packed + plan->kv + plan->key_pos, *stats = out_packed + plan->out;
    int64_t pos_offset = position_offset(a, batch);

    /* Queries: in place, or packed from their list. */
    const int32_t *q_rows = a->q_rows ? a->q_rows + batch * a->q_batch_stride_rows + first : NULL;
    const float *q_base = (const float *)a->q + batch * a->q_batch_stride + head * a->q_head_stride;
    const float *q = q_base + first * a->q_row_stride;
    int64_t q_stride = a->q_row_stride;
    if (q_rows) {
        for (int64_t i = 0; i < num; i++)
            memcpy(q_packed + i * d, q_base + q_rows[i] * a->q_row_stride, (size_t)d * sizeof(float));
        q = q_packed;
        q_stride = d;
    }
    if (a->rope) {
        turn_rows(q_packed, q, q_stride, a->rope, a->rope_pairs, d, q_rows, first, pos_offset, num);
        q = q_packed;
        q_stride = d;
    }
    int64_t last_limit = 0; /* keys from here on are seen by no query of the block, and are not read */
    for (int64_t i = 0; i < num; i++) {
        int64_t pos = (q_rows ? q_rows[i] : first + i) + pos_offset;
        last_limit = rf_max64(last_limit, key_limit(a, pos));
    }

    /* Keys: up to four ranges of rows in place, or a packed list. */
    const float *k = (const float *)a->k + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    const float *v = (const float *)a->v + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    int64_t kv_stride = a->kv_row_stride; /* of k; v_stride differs where only k is packed */
    int64_t len = a->kv_lens ? rf_max64(0, rf_min64(a->kv_lens[batch], a->kv_len)) : a->kv_len;
    int64_t begins[RF_MAX_KEY_RANGES] = {0}, ends[RF_MAX_KEY_RANGES] = {rf_min64(len, last_limit)};
    int num_ranges = 1;
    if (a->kv_rows) {
        const int32_t *rows = a->kv_rows + batch * a->kv_batch_stride_rows;
        int64_t packed = 0;
        for (int64_t j = 0; j < len; j++) {
            if (rows[j] >= last_limit) continue;
            memcpy(k_packed + packed * d, k + rows[j] * kv_stride, (size_t)d * sizeof(float));
            memcpy(v_packed + packed * d, v + rows[j] * kv_stride, (size_t)d * sizeof(float));
            key_pos[packed++] = rows[j];
        }
        k = k_packed;
        v = v_packed;
        kv_stride = d;
        ends[0] = packed;
        if (a->rope) turn_rows(k_packed, k_packed, d, a->rope, a->rope_pairs, d, key_pos, 0, 0, packed);
    } else if (a->num_ranges > 0) {
        num_ranges = a->num_ranges;
        for (int r = 0; r < num_ranges; r++) {
            begins[r] = a->ranges[r].begin;
            ends[r] = rf_max64(begins[r], rf_min64(a->ranges[r].end, last_limit));
        }
    }
    int64_t v_stride = kv_stride;
    if (a->rope && !a->kv_rows) {
        for (int r = 0; r < num_ranges; r++)
            turn_rows(k_packed + begins[r] * d, k + begins[r] * kv_stride, kv_stride, a->rope, a->rope_pairs, d, NULL,
                      begins[r], 0, ends[r] - begins[r]);
        k = k_packed;
        kv_stride = d;
    }
    int64_t num_keys = 0;
    for (int r = 0; r < num_ranges; r++) num_keys += ends[r] - begins[r];

    /* Scores, then probabilities without their common divisor. */
    int64_t at = 0;
    for (int r = 0; r < num_ranges; r++) {
        int64_t keys = ends[r] - begins[r];
        if (keys > 0)
            rf_cpu_sgemm(num, keys, d, a->softmax_scale, q, q_stride, k + begins[r] * kv_stride, kv_stride, true, 0.0f,
                         scores + at, num_keys);
        at += keys;
    }
    float *inv_sum = stats, *row_lse = stats + num;
    for (int64_t i = 0; i < num; i++) {
        float *s = scores + i * num_keys;
        int64_t num_visible = num_keys;
        if (a->mask != RF_MASK_NONE) {
            int64_t limit = key_limit(a, (q_rows ? q_rows[i] : first + i) + pos_offset);
            at = 0;
            for (int r = 0; r < num_ranges; r++) {
                for (int64_t j = begins[r]; j < ends[r]; j++, at++) {
                    if ((a->kv_rows ? key_pos[j] : j) < limit) continue;
                    s[at] = -INFINITY;
                    num_visible--;
                }
            }
        }
        if (num_visible == 0) {
            if (num_keys > 0) memset(s, 0, (size_t)num_keys * sizeof(float));
            inv_sum[i] = 0;
            row_lse[i] = -INFINITY;
            continue;
        }
        float top = row_max(s, num_keys);
        double sum = row_exp_sum(s, num_keys, top);
        inv_sum[i] = (float)(1.0 / sum);
        row_lse[i] = (float)((double)top + log(sum));
    }

    float *out = (float *)a->out + batch * a->out_batch_stride + head * a->out_head_stride + first * a->out_row_stride;
    int64_t out_stride = a->out_row_stride;
    if (a->out_rows || a->join_out) {
        out = out_packed;
        out_stride = d;
    }
    if (num_keys == 0)
        for (int64_t i = 0; i < num; i++) memset(out + i * out_stride, 0, (size_t)d * sizeof(float));
    at = 0;
    bool started = false;
    for (int r = 0; r < num_ranges; r++) {
        int64_t keys = ends[r] - begins[r];
        if (keys > 0) {
            /* With one query the row stride may be anything; BLAS wants at least the row's length. */
            rf_cpu_sgemm(num, d, keys, 1.0f, scores + at, num_keys, v + begins[r] * v_stride, v_stride, false,
                         started ? 1.0f : 0.0f, out, rf_max64(out_stride, d));
            started = true;
        }
        at += keys;
    }
    for (int64_t i = 0; i < num; i++)
        finish_row(a, batch, head, first + i, out + i * out_stride, inv_sum[i], row_lse[i]);
}

/* ---- few rows ---- */

/* Keys of a tile, in place or packed: key j at k + j * stride and v + j * stride, position pos ? pos[j] : first + j. */
typedef struct {
    const float *k, *v;
    int64_t stride, first, num;
    const int32_t *pos;
} key_tile;

/* State of a block of rows. Rows from `num` to `padded` exist and mean nothing. */
typedef struct {
    int64_t num, padded, d;
    float *scores, *q, *o, *top, *sum, *scale;
    int64_t *limit;    /* first key position that a row does not see */
    int64_t min_limit; /* of them */
} row_block;

/* s[j][i] = k_j . q_i, q transposed: [d][padded]. Four keys by sixteen rows at a time. */
RF_HOT static void tile_scores(float *s, const float *q, int64_t padded, const float *k, int64_t stride, int64_t num,
                               int64_t d) {
    for (int64_t i = 0; i < padded; i += 16) {
        int64_t j = 0;
        for (; j + 4 <= num; j += 4) {
            const float *k0 = k + j * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
            vec16 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
            for (int64_t c = 0; c < d; c++) {
                vec16 x = *(const vec16 *)(q + c * padded + i);
                a0 += k0[c] * x;
                a1 += k1[c] * x;
                a2 += k2[c] * x;
                a3 += k3[c] * x;
            }
            float *out = s + j * padded + i;
            *(vec16 *)out = a0;
            *(vec16 *)(out + padded) = a1;
            *(vec16 *)(out + 2 * padded) = a2;
            *(vec16 *)(out + 3 * padded) = a3;
        }
        for (; j < num; j++) {
            vec16 a0 = {0};
            for (int64_t c = 0; c < d; c++) a0 += k[j * stride + c] * *(const vec16 *)(q + c * padded + i);
            *(vec16 *)(s + j * padded + i) = a0;
        }
    }
}

/* The online softmax of a tile of [key][row] scores: top moves up, scale = what sum and o of before are worth now, s becomes
 * exp(s - top), sum its sum. */
RF_HOT static void tile_softmax(float *s, int64_t num, int64_t padded, float *top, float *sum, float *scale) {
    for (int64_t i0 = 0; i0 < padded; i0 += 16) {
        float high[16], base[16], total[16];
        for (int i = 0; i < 16; i++) high[i] = top[i0 + i];
        for (int64_t j = 0; j < num; j++) {
            const float *row = s + j * padded + i0;
#pragma omp simd
            for (int i = 0; i < 16; i++) high[i] = row[i] > high[i] ? row[i] : high[i];
        }
#pragma omp simd
        for (int i = 0; i < 16; i++) {
            base[i] = high[i] == -INFINITY ? 0.0f : high[i];
            scale[i0 + i] = rf_exp(top[i0 + i] - base[i]); /* 0 while top is -inf */
            top[i0 + i] = high[i];
            total[i] = 0.0f;
        }
        for (int64_t j = 0; j < num; j++) {
            float *row = s + j * padded + i0;
#pragma omp simd
            for (int i = 0; i < 16; i++) {
                float e = rf_exp(row[i] - base[i]);
                row[i] = e;
                total[i] += e;
            }
        }
#pragma omp simd
        for (int i = 0; i < 16; i++) sum[i0 + i] = sum[i0 + i] * scale[i0 + i] + total[i];
    }
}

/* o_i = scale_i o_i + sum_j p[j][i] v_j. Four rows by sixteen columns at a time. */
RF_HOT static void tile_values(float *o, const float *p, int64_t rows, int64_t padded, const float *scale,
                               const float *v, int64_t stride, int64_t num, int64_t d) {
    for (int64_t i = 0; i < rows; i += 4) { /* `padded` is a multiple of 4 */
        int64_t c = 0;
        for (; c + 16 <= d; c += 16) {
            vec16 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
            for (int64_t j = 0; j < num; j++) {
                const float *w = p + j * padded + i;
                vec16 x = *(const vec16 *)(v + j * stride + c);
                a0 += w[0] * x;
                a1 += w[1] * x;
                a2 += w[2] * x;
                a3 += w[3] * x;
            }
            float *out = o + i * d + c;
            *(vec16 *)out = *(vec16 *)out * scale[i] + a0;
            *(vec16 *)(out + d) = *(vec16 *)(out + d) * scale[i + 1] + a1;
            *(vec16 *)(out + 2 * d) = *(vec16 *)(out + 2 * d) * scale[i + 2] + a2;
            *(vec16 *)(out + 3 * d) = *(vec16 *)(out + 3 * d) * scale[i + 3] + a3;
        }
        for (; c + 8 <= d; c += 8) {
            vec8 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
            for (int64_t j = 0; j < num; j++) {
                const float *w = p + j * padded + i;
                vec8 x = *(const vec8 *)(v + j * stride + c);
                a0 += w[0] * x;
                a1 += w[1] * x;
                a2 += w[2] * x;
                a3 += w[3] * x;
            }
            float *out = o + i * d + c;
            *(vec8 *)out = *(vec8 *)out * scale[i] + a0;
            *(vec8 *)(out + d) = *(vec8 *)(out + d) * scale[i + 1] + a1;
            *(vec8 *)(out + 2 * d) = *(vec8 *)(out + 2 * d) * scale[i + 2] + a2;
            *(vec8 *)(out + 3 * d) = *(vec8 *)(out + 3 * d) * scale[i + 3] + a3;
        }
        for (; c < d; c++) {
            for (int r = 0; r < 4; r++) {
                float sum = 0.0f;
                for (int64_t j = 0; j < num; j++) sum += p[j * padded + i + r] * v[j * stride + c];
                o[(i + r) * d + c] = o[(i + r) * d + c] * scale[i + r] + sum;
            }
        }
    }
}

/* s[i][j] = q_i . k_j, rows of s DOT_TILE apart. */
RF_HOT static void dot_scores(float *s, const float *q, int64_t rows, const float *k, int64_t stride, int64_t num,
                              int64_t d) {
    for (int64_t j = 0; j < num; j++) {
        const float *key = k + j * stride;
        for (int64_t i = 0; i < rows; i++) {
            const float *x = q + i * d;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < d; c++) sum += x[c] * key[c];
            s[i * DOT_TILE + j] = sum;
        }
    }
}

/* o_i = scale_i o_i + sum_j p[i][j] v_j. */
RF_HOT static void dot_values(float *o, const float *p, int64_t rows, const float *scale, const float *v,
                              int64_t stride, int64_t num, int64_t d) {
    for (int64_t i = 0; i < rows; i++) {
        const float *w = p + i * DOT_TILE;
        float *out = o + i * d;
        int64_t c = 0;
        for (; c + 64 <= d; c += 64) {
            vec16 a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
            for (int64_t j = 0; j < num; j++) {
                const float *x = v + j * stride + c;
                a0 += w[j] * *(const vec16 *)x;
                a1 += w[j] * *(const vec16 *)(x + 16);
                a2 += w[j] * *(const vec16 *)(x + 32);
                a3 += w[j] * *(const vec16 *)(x + 48);
            }
            *(vec16 *)(out + c) = *(vec16 *)(out + c) * scale[i] + a0;
            *(vec16 *)(out + c + 16) = *(vec16 *)(out + c + 16) * scale[i] + a1;
            *(vec16 *)(out + c + 32) = *(vec16 *)(out + c + 32) * scale[i] + a2;
            *(vec16 *)(out + c + 48) = *(vec16 *)(out + c + 48) * scale[i] + a3;
        }
        for (; c + 8 <= d; c += 8) {
            vec8 a0 = {0};
            for (int64_t j = 0; j < num; j++) a0 += w[j] * *(const vec8 *)(v + j * stride + c);
            *(vec8 *)(out + c) = *(vec8 *)(out + c) * scale[i] + a0;
        }
        for (; c < d; c++) {
            float sum = 0.0f;
            for (int64_t j = 0; j < num; j++) sum += w[j] * v[j * stride + c];
            out[c] = out[c] * scale[i] + sum;
        }
    }
}

/* One tile of keys against a block of rows. */
static void attend_tile(const row_block *b, const key_tile *t) {
    const bool dots = b->num <= DOT_ROWS;
    const int64_t key_step = dots ? 1 : b->padded, row_step = dots ? DOT_TILE : 1;
    if (dots)
        dot_scores(b->scores, b->q, b->num, t->k, t->stride, t->num, b->d);
    else
        tile_scores(b->scores, b->q, b->padded, t->k, t->stride, t->num, b->d);
    if (b->min_limit < INT64_MAX) {
        for (int64_t j = 0; j < t->num; j++) {
            int64_t pos = t->pos ? t->pos[j] : t->first + j;
            if (pos < b->min_limit) continue;
            for (int64_t i = 0; i < b->num; i++)
                if (pos >= b->limit[i]) b->scores[j * key_step + i * row_step] = -INFINITY;
        }
    }
    if (dots) {
        for (int64_t i = 0; i < b->num; i++) {
            float *s = b->scores + i * DOT_TILE, high = row_max(s, t->num);
            high = high > b->top[i] ? high : b->top[i];
            float base = high == -INFINITY ? 0.0f : high;
            b->scale[i] = rf_exp(b->top[i] - base);
            b->top[i] = high;
            b->sum[i] = b->sum[i] * b->scale[i] + (float)row_exp_sum(s, t->num, base);
        }
        dot_values(b->o, b->scores, b->num, b->scale, t->v, t->stride, t->num, b->d);
    } else {
        tile_softmax(b->scores, t->num, b->padded, b->top, b->sum, b->scale);
        tile_values(b->o, b->scores, b->num, b->padded, b->scale, t->v, t->stride, t->num, b->d);
    }
}

/* Rows first .. first + num - 1 of key head kv_head: row r is query r / group under head kv_head * group + r % group. */
static void attend_few(const rf_attention_args *a, const scratch_plan *plan, float *scratch, int64_t batch, int kv_head,
                       int64_t first, int64_t num) {
    int64_t d = a->head_dim, group = a->num_q_heads / a->num_kv_heads, limits[FEW_BLOCK];
    int64_t padded = pad16(num), tile = num <= DOT_ROWS ? DOT_TILE : ROW_TILE;
    row_block b = {.num = num, .padded = padded, .d = d, .scores = scratch, .limit = limits, .min_limit = INT64_MAX};
    b.q = b.scores + plan->scores;
    float *k_packed = b.q + plan->q, *v_packed = k_packed + plan->kv;
    int32_t *key_pos = (int32_t *)(v_packed + plan->kv);
    b.o = v_packed + plan->kv + plan->key_pos;
    b.top = b.o + plan->out;
    b.sum = b.top + padded;
    b.scale = b.sum + padded;

    int64_t last_limit = 0;
    if (num > DOT_ROWS) memset(b.q, 0, (size_t)(padded * d) * sizeof(float));
    for (int64_t r = 0; r < num; r++) {
        int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
        int64_t row = a->q_rows ? a->q_rows[batch * a->q_batch_stride_rows + query] : query;
        const float *q =
            (const float *)a->q + batch * a->q_batch_stride + row * a->q_row_stride + head * a->q_head_stride;
        if (a->rope) { /* b.o is free until the sums begin */
            turn_rows(b.o, q, d, a->rope, a->rope_pairs, d, NULL, row, position_offset(a, batch), 1);
            q = b.o;
        }
        if (num > DOT_ROWS)
            for (int64_t c = 0; c < d; c++) b.q[c * padded + r] = q[c] * a->softmax_scale;
        else
            for (int64_t c = 0; c < d; c++) b.q[r * d + c] = q[c] * a->softmax_scale;
        limits[r] = key_limit(a, row + position_offset(a, batch));
        last_limit = rf_max64(last_limit, limits[r]);
        b.min_limit = rf_min64(b.min_limit, limits[r]);
    }
    memset(b.o, 0, (size_t)(padded * d) * sizeof(float));
    for (int64_t r = 0; r < padded; r++) {
        b.top[r] = -INFINITY;
        b.sum[r] = 0;
    }

    const float *k = (const float *)a->k + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    const float *v = (const float *)a->v + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    int64_t len = a->kv_lens ? rf_max64(0, rf_min64(a->kv_lens[batch], a->kv_len)) : a->kv_len;
    if (a->kv_rows) {
        const int32_t *rows = a->kv_rows + batch * a->kv_batch_stride_rows;
        key_tile t = {.k = k_packed, .v = v_packed, .stride = d, .pos = key_pos};
        for (int64_t j = 0; j < len; j++) {
            if (rows[j] < last_limit) {
                if (a->rope)
                    turn_rows(k_packed + t.num * d, k + rows[j] * a->kv_row_stride, d, a->rope, a->rope_pairs, d, NULL,
                              rows[j], 0, 1);
                else
                    memcpy(k_packed + t.num * d, k + rows[j] * a->kv_row_stride, (size_t)d * sizeof(float));
                memcpy(v_packed + t.num * d, v + rows[j] * a->kv_row_stride, (size_t)d * sizeof(float));
                key_pos[t.num++] = rows[j];
            }
            if (t.num == tile || (j == len - 1 && t.num > 0)) {
                attend_tile(&b, &t);
                t.num = 0;
            }
        }
    } else {
        /* Rows a multiple of 2 KB apart share few sets of the nearest cache: a tile would not stay in it. */
        bool copies = a->rope || (num > 8 && a->kv_row_stride % 512 == 0);
        for (int r = 0; r < rf_max64(a->num_ranges, 1); r++) {
            int64_t begin = a->num_ranges > 0 ? a->ranges[r].begin : 0;
            int64_t end = rf_min64(a->num_ranges > 0 ? a->ranges[r].end : len, last_limit);
            for (int64_t j = begin; j < end; j += tile) {
                key_tile t = {.k = k + j * a->kv_row_stride,
                              .v = v + j * a->kv_row_stride,
                              .stride = a->kv_row_stride,
                              .first = j,
                              .num = rf_min64(tile, end - j)};
                if (copies) {
                    if (a->rope) turn_rows(k_packed, t.k, t.stride, a->rope, a->rope_pairs, d, NULL, j, 0, t.num);
                    for (int64_t i = 0; i < t.num; i++) {
                        if (!a->rope) memcpy(k_packed + i * d, t.k + i * t.stride, (size_t)d * sizeof(float));
                        memcpy(v_packed + i * d, t.v + i * t.stride, (size_t)d * sizeof(float));
                    }
                    t.k = k_packed;
                    t.v = v_packed;
                    t.stride = d;
                }
                attend_tile(&b, &t);
            }
        }
    }
    for (int64_t r = 0; r < num; r++) {
        bool empty = b.sum[r] == 0; /* NaN is not */
        finish_row(a, batch, kv_head * group + (first + r) % group, (first + r) / group, b.o + r * d,
                   empty ? 0.0f : 1.0f / b.sum[r],
                   empty ? -INFINITY : (float)((double)b.top[r] + log((double)b.sum[r])));
    }
}

/* BLAS takes row strides of 31 bits. */
static rf_status check_strides(const rf_attention_args *a, rf_error *err) {
    if (a->q_row_stride <= INT32_MAX && a->kv_row_stride <= INT32_MAX && a->out_row_stride <= INT32_MAX) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "attention: row strides must be below 2^31 on the CPU");
}

rf_status rf_attention_cpu(rf_stream *stream, const rf_attention_args *a, rf_error *err) {
    RF_TRY(stream ? rf_attention_check_run(a, err) : rf_attention_check(a, err));
    RF_TRY(stream ? rf_attention_out_check_run(a, err) : rf_attention_out_check(a, err));
    RF_TRY(rf_check_f32("attention: dtype", a->dtype, err));
    RF_TRY(check_strides(a, err));
    if (a->kernel != RF_ATTENTION_AUTO)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the CPU has one kernel, auto; another was asked for");
    if (!stream || a->batch == 0 || a->q_len == 0) return RF_OK;

    size_t need = rf_attention_workspace_cpu(rf_stream_backend(stream), a);
    RF_TRY(rf_check_workspace("attention", a->workspace, a->workspace_bytes, need, err));
    scratch_plan plan = plan_scratch(a);
    size_t thread_elems = scratch_elems(&plan);
    if (plan.few) {
        int64_t rows = a->q_len * (a->num_q_heads / a->num_kv_heads), row_blocks = rf_div_up(rows, plan.block_rows);
        int64_t tasks = a->batch * a->num_kv_heads * row_blocks;
        rf_stream_note_launch(stream, "attention");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(                                                 \
    dynamic) if (tasks > 1 && a->batch * a->num_q_heads * a->q_len * a->kv_len * a->head_dim > 16 * RF_SERIAL_WORK)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t first = task % row_blocks * plan.block_rows;
            attend_few(a, &plan, (float *)a->workspace + (size_t)rf_cpu_thread_idx() * thread_elems,
                       task / (row_blocks * a->num_kv_heads), (int)(task / row_blocks % a->num_kv_heads), first,
                       rf_min64(plan.block_rows, rows - first));
        }
        return RF_OK;
    }
    int64_t blocks = rf_div_up(a->q_len, plan.queries);
    int64_t num_tasks = a->batch * a->num_q_heads * blocks;
    rf_stream_note_launch(stream, "attention");
    rf_cpu_blas_single_thread();
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(dynamic) if (num_tasks > 1)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t first = task % blocks * plan.queries;
        attend_block(a, &plan, (float *)a->workspace + (size_t)rf_cpu_thread_idx() * thread_elems,
                     task / (blocks * a->num_q_heads), (int)(task / blocks % a->num_q_heads), first,
                     rf_min64(plan.queries, a->q_len - first));
    }
    return RF_OK;
}

rf_status rf_attention_merge_cpu(rf_stream *stream, const rf_attention_merge_args *a, rf_error *err) {
    RF_TRY(stream ? rf_attention_merge_check_run(a, err) : rf_attention_merge_check(a, err));
    RF_TRY(stream ? rf_attention_merge_slots_check_run(a, err) : rf_attention_merge_slots_check(a, err));
    RF_TRY(rf_check_f32("attention_merge: dtype", a->dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "attention_merge");
    int64_t d = a->head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) {
        for (int head = 0; head < a->num_heads; head++) {
            int64_t at = head * a->rows + row, from = (row * a->num_heads + head) * d;
            int64_t slot = a->slots ? a->slots[row] : row;
            const float *out_a = (const float *)a->out_a + (slot * a->num_heads + head) * d;
            const float *out_b = (const float *)a->out_b + from;
            float *out = (float *)a->out + from;
            double la = a->lse_a[a->slots ? head * a->num_slots + slot : at], lb = a->lse_b[at];
            double top = la > lb ? la : lb;
            double wa = la == -INFINITY ? 0 : exp(la - top), wb = lb == -INFINITY ? 0 : exp(lb - top);
            double sum = wa + wb;
            if (a->lse) a->lse[at] = sum == 0 ? -INFINITY : (float)(top + log(sum));
            float fa = sum == 0 ? 0.0f : (float)(wa / sum), fb = sum == 0 ? 0.0f : (float)(wb / sum);
            /* An empty side may hold anything: its values are not used. */
            if (wa == 0)
                for (int64_t c = 0; c < d; c++) out[c] = wb == 0 ? 0.0f : out_b[c];
            else if (wb == 0)
                for (int64_t c = 0; c < d; c++) out[c] = out_a[c];
            else
                for (int64_t c = 0; c < d; c++) out[c] = fa * out_a[c] + fb * out_b[c];
        }
    }
    return RF_OK;
}

static void softmax_row(float *y, const float *x, int64_t cols, float scale) {
    for (int64_t c = 0; c < cols; c++) y[c] = scale * x[c];
    float inv = (float)(1.0 / row_exp_sum(y, cols, row_max(y, cols)));
    for (int64_t c = 0; c < cols; c++) y[c] *= inv;
}

rf_status rf_softmax_cpu(rf_stream *stream, const rf_softmax_args *a, rf_error *err) {
    RF_TRY(stream ? rf_softmax_check_run(a, err) : rf_softmax_check(a, err));
    RF_TRY(rf_check_f32("softmax: y_dtype", a->y_dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "softmax");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t r = 0; r < a->rows; r++)
        softmax_row((float *)a->y + r * a->cols, (const float *)a->x + r * a->cols, a->cols, a->scale);
    return RF_OK;
}
