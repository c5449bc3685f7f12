/* kernels/text_cpu.c
 * Maths    the operators of text.h but the head's, in f32.
 * Tasks    a row each (embed, qkv_rope, swiglu, cosine_rows), a head and a block of keys (attention_mass), a row and head
 *          (attention_probs); the two selections are serial. */
#include "kernels/cpu.h"
#include "kernels/text_checks.h"

/* ---- rows in ---- */

rf_status rf_embed_cpu(rf_stream *stream, const rf_embed_args *a, rf_error *err) {
    RF_TRY(rf_embed_check(a, err));
    RF_TRY(rf_check_f32("embed: dtype", a->dtype, err));
    RF_TRY(rf_check_f32("embed: out_dtype", a->out_dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    RF_TRY(rf_text_pointers("embed", (const void *const[]){a->table, a->ids, a->out}, 3, err));
    rf_stream_note_launch(stream, "embed");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (a->rows * a->cols > RF_SERIAL_WORK)
    for (int64_t r = 0; r < a->rows; r++) {
        float *out = (float *)a->out + r * a->cols;
        const int32_t id = a->ids[r];
        if (id < 0 || id >= a->vocab) {
            memset(out, 0, (size_t)a->cols * sizeof *out);
            continue;
        }
        const float *row = (const float *)a->table + id * a->cols;
        for (int64_t c = 0; c < a->cols; c++) out[c] = row[c] * a->scale;
    }
    return RF_OK;
}

/* ---- queries, keys, values ---- */

/* y = x normed by its root mean square, if there is a weight, then turned: element j with j + pairs. */
RF_HOT static void norm_and_turn(float *y, const float *x, int64_t dim, int64_t pairs, const float *weight, float eps,
                                 const float *table) {
    float factor = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (int64_t j = 0; j < dim; j++) sum += x[j] * x[j];
        factor = 1.0f / sqrtf(sum / (float)dim + eps);
        for (int64_t j = 0; j < dim; j++) y[j] = x[j] * factor * weight[j];
    } else if (y != x)
        memcpy(y, x, (size_t)dim * sizeof *y);
    for (int64_t j = 0; j < pairs; j++) {
        const float c = table[2 * j], s = table[2 * j + 1], p = y[j], q = y[j + pairs];
        y[j] = p * c - q * s;
        y[j + pairs] = q * c + p * s;
    }
}

rf_status rf_qkv_rope_cpu(rf_stream *stream, const rf_qkv_rope_args *a, rf_error *err) {
    RF_TRY(rf_qkv_rope_check(a, err));
    RF_TRY(rf_check_f32("qkv_rope: dtype", a->dtype, err));
    if (!stream || a->batch == 0 || a->rows == 0) return RF_OK;
    const void *table_or_any = a->pairs > 0 ? (const void *)a->table : a->qkv;
    RF_TRY(rf_text_pointers("qkv_rope", (const void *const[]){a->qkv, a->q_out, a->k, a->v, a->positions, table_or_any},
                            6, err));
    rf_stream_note_launch(stream, "qkv_rope");
    const int64_t d = a->head_dim, hq = a->num_q_heads, hkv = a->num_kv_heads, width = (hq + 2 * hkv) * d;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->batch * a->rows * width > RF_SERIAL_WORK)
    for (int64_t r = 0; r < a->batch * a->rows; r++) {
        const int64_t pos = rf_max64(a->positions[r], 0), row = rf_min64(pos, a->cache_rows - 1);
        const float *in = (const float *)a->qkv + r * width;
        const float *table = a->pairs ? a->table + rf_min64(pos, a->table_rows - 1) * a->pairs * 2 : NULL;
        const int64_t at = r / a->rows * a->k_batch_stride + row * a->k_row_stride;
        float *q = (float *)a->q_out + r * hq * d;
        for (int64_t h = 0; h < hq; h++)
            norm_and_turn(q + h * d, in + h * d, d, a->pairs, a->q_norm, a->norm_eps, table);
        for (int64_t h = 0; h < hkv; h++) {
            const int64_t pool_row = a->pool_rows ? a->pool_rows[r * hkv + h] : 0,
                          to = a->pool_rows ? pool_row * d : at + h * d;
            if (pool_row < 0) continue;
            norm_and_turn((float *)a->k + to, in + (hq + h) * d, d, a->pairs, a->k_norm, a->norm_eps, table);
            memcpy((float *)a->v + to, in + (hq + hkv + h) * d, (size_t)d * sizeof(float));
        }
    }
    return RF_OK;
}

/* ---- SwiGLU ---- */

RF_HOT static void swiglu_row(float *y, const float *x, int64_t cols, bool interleaved) {
    if (interleaved)
        for (int64_t c = 0; c < cols; c++) y[c] = rf_silu(x[2 * c]) * x[2 * c + 1];
    else
        for (int64_t c = 0; c < cols; c++) y[c] = rf_silu(x[c]) * x[cols + c];
}

rf_status rf_swiglu_cpu(rf_stream *stream, const rf_swiglu_args *a, rf_error *err) {
    RF_TRY(rf_swiglu_check(a, err));
    RF_TRY(rf_check_f32("swiglu: dtype", a->dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    RF_TRY(rf_text_pointers("swiglu", (const void *const[]){a->x, a->y}, 2, err));
    rf_stream_note_launch(stream, "swiglu");
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->rows * a->cols > RF_SERIAL_WORK / 4)
    for (int64_t r = 0; r < a->rows; r++)
        swiglu_row((float *)a->y + r * a->cols, (const float *)a->x + r * 2 * a->cols, a->cols, a->interleaved);
    return RF_OK;
}

/* ---- what layers show ---- */

RF_HOT static float dot(const float *a, const float *b, int64_t num) {
    float sum[8] = {0}; /* fixed partial sums, whatever the width of the machine's vectors */
    int64_t i = 0;
    for (; i + 8 <= num; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += a[i + j] * b[i + j];
    for (; i < num; i++) sum[0] += a[i] * b[i];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

static int64_t seen_keys(const int32_t *len, int64_t batch_row, int64_t num_keys) {
    return len ? rf_min64(rf_max64(len[batch_row], 0), num_keys) : num_keys;
}

rf_status rf_attention_mass_cpu(rf_stream *stream, const rf_attention_mass_args *a, rf_error *err) {
    RF_TRY(rf_attention_mass_check(a, err));
    RF_TRY(rf_check_f32("attention_mass: dtype", a->dtype, err));
    if (!stream || a->batch == 0 || a->num_keys == 0) return RF_OK;
    RF_TRY(rf_text_pointers("attention_mass", (const void *const[]){a->q, a->k, a->lse}, 3, err));
    rf_stream_note_launch(stream, "attention_mass");
    enum { KEYS = 64 };
    const int64_t d = a->head_dim, hq = a->num_q_heads, group = hq / a->num_kv_heads,
                  blocks = rf_div_up(a->num_keys, KEYS);
    const int64_t num_queries = a->query_rows ? a->num_queries : a->rows;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_keys * num_queries * hq * d > 16 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->batch * blocks; task++) {
        const int64_t b = task / blocks, begin = task % blocks * KEYS, end = rf_min64(begin + KEYS, a->num_keys);
        const int64_t seen = seen_keys(a->kv_lens, b, a->num_keys);
        for (int64_t j = begin; j < end; j++) {
            const int64_t key = a->keys ? a->keys[j] : j;
            float total = 0.0f;
            for (int64_t h = 0; h < hq; h++) {
                float sum = 0.0f;
                const float *k = (const float *)a->k + b * a->k_batch_stride + key * a->k_row_stride + h / group * d;
                for (int64_t i = 0; j < seen && i < num_queries; i++) {
                    const int64_t row = a->query_rows ? a->query_rows[i] : i;
                    const float lse = a->lse[(b * hq + h) * a->rows + row];
                    if (lse == -INFINITY) continue;
                    const float *q = (const float *)a->q + ((b * a->rows + row) * hq + h) * d;
                    sum += rf_exp(a->scale * dot(q, k, d) - lse);
                }
                if (a->head_mass) a->head_mass[(b * hq + h) * a->num_keys + j] = sum;
                total += sum;
            }
            if (a->mass) a->mass[b * a->num_keys + j] = total;
        }
    }
    return RF_OK;
}

rf_status rf_attention_probs_cpu(rf_stream *stream, const rf_attention_probs_args *a, rf_error *err) {
    RF_TRY(rf_attention_probs_check(a, err));
    RF_TRY(rf_check_f32("attention_probs: dtype", a->dtype, err));
    if (!stream || a->num_rows == 0 || a->num_keys == 0) return RF_OK;
    RF_TRY(rf_text_pointers("attention_probs", (const void *const[]){a->q, a->k, a->probs}, 3, err));
    rf_stream_note_launch(stream, "attention_probs");
    const int64_t d = a->head_dim, hq = a->num_q_heads, group = hq / a->num_kv_heads;
    const int64_t seen = seen_keys(a->kv_len, 0, a->num_keys);
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_rows * hq * seen * d > 16 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->num_rows * hq; task++) {
        const int64_t t = task / hq, h = task % hq;
        const float *q = (const float *)a->q + (a->q_index ? a->q_index[t] : t) * a->q_row_stride + h * d;
        float *out = a->probs + task * a->num_keys, max = -INFINITY, sum = 0.0f;
        for (int64_t j = 0; j < seen; j++) {
            const int64_t key = a->keys ? a->keys[j] : j;
            out[j] = a->scale * dot(q, (const float *)a->k + key * a->k_row_stride + h / group * d, d);
            max = out[j] > max ? out[j] : max;
        }
        for (int64_t j = 0; j < seen; j++) sum += out[j] = rf_exp(out[j] - max);
        for (int64_t j = 0; j < seen; j++) out[j] /= sum;
        for (int64_t j = seen; j < a->num_keys; j++) out[j] = 0.0f;
    }
    return RF_OK;
}

rf_status rf_cosine_rows_cpu(rf_stream *stream, const rf_cosine_rows_args *a, rf_error *err) {
    RF_TRY(rf_cosine_rows_check(a, err));
    RF_TRY(rf_check_f32("cosine_rows: a_dtype", a->a_dtype, err));
    RF_TRY(rf_check_f32("cosine_rows: b_dtype", a->b_dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    RF_TRY(rf_text_pointers("cosine_rows", (const void *const[]){a->a, a->b, a->cosine}, 3, err));
    rf_stream_note_launch(stream, "cosine_rows");
    const int64_t step = a->col_stride ? a->col_stride : 1;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (a->rows * a->cols > RF_SERIAL_WORK)
    for (int64_t r = 0; r < a->rows; r++) {
        const float *x = (const float *)a->a + r * a->a_ld;
        const float *y = (const float *)a->b + (a->b_rows ? a->b_rows[r] : r) * a->b_ld;
        float xy = 0.0f, xx = 0.0f, yy = 0.0f;
        for (int64_t c = 0; c < a->cols; c++) {
            const float p = x[c * step], q = y[c * step];
            xy += p * q;
            xx += p * p;
            yy += q * q;
        }
        a->cosine[r] = xy / fmaxf(sqrtf(xx) * sqrtf(yy), 1e-8f);
    }
    return RF_OK;
}

/* ---- selections ---- */

/* Bits of a float as an unsigned number of the same order; NaN is 0, below all. */
static uint32_t ordered(float x) {
    uint32_t bits;
    if (isnan(x)) return 0;
    x += 0.0f; /* -0 is 0 */
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

rf_status rf_select_smallest_cpu(rf_stream *stream, const rf_select_smallest_args *a, rf_error *err) {
    RF_TRY(rf_select_smallest_check(a, err));
    if (!stream) return RF_OK;
    RF_TRY(rf_text_pointers("select_smallest", (const void *const[]){a->values, a->out}, 2, err));
    rf_stream_note_launch(stream, "select_smallest");
    /* the count-th smallest key, 11, 11 and 10 bits at a time; then all below it and the first of its equals */
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    uint32_t prefix = 0, mask = 0;
    int64_t rank = a->count;
    for (int pass = 0; pass < 3; pass++) {
        int32_t bins[2048] = {0};
        const uint32_t low = (1u << widths[pass]) - 1;
        for (int64_t i = 0; i < a->num; i++) {
            const uint32_t key = ordered(a->values[i]);
            if ((key & mask) == prefix) bins[key >> shifts[pass] & low]++;
        }
        uint32_t bin = 0;
        while (rank > bins[bin]) rank -= bins[bin++];
        prefix |= bin << shifts[pass];
        mask |= low << shifts[pass];
    }
    int64_t n = 0;
    for (int64_t i = 0; i < a->num; i++) {
        const uint32_t key = ordered(a->values[i]);
        if (key < prefix || (key == prefix && rank-- > 0)) a->out[n++] = (int32_t)i;
    }
    return RF_OK;
}

rf_status rf_argmax_cpu(rf_stream *stream, const rf_argmax_args *a, rf_error *err) {
    RF_TRY(rf_argmax_check(a, err));
    if (!stream) return RF_OK;
    const void *values_or_any = a->num > 0 ? (const void *)a->values : a->out;
    RF_TRY(rf_text_pointers("argmax", (const void *const[]){a->out, values_or_any}, 2, err));
    rf_stream_note_launch(stream, "argmax");
    const int64_t num = seen_keys(a->num_dev, 0, a->num);
    int32_t best = -1;
    for (int64_t i = 0; i < num; i++) {
        if (a->allowed && !a->allowed[i]) continue;
        if (best < 0 || ordered(a->values[i]) > ordered(a->values[best])) best = (int32_t)i;
    }
    a->out[0] = best;
    return RF_OK;
}
