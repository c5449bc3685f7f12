/* kernels/temporal_attention_cpu.c
 * Maths    out(f) = softmax over j <= num_kept + f of (R_i q_f . R_j k_j / sqrt(d)) v_j, i = num_kept + f; see rope.h.
 * Tasks    (sample, pixel), or a listed row: all its heads. A head's queries and scores lie on the stack; each key is
 *          turned once, in pieces of CHUNK dims, and multiplied with every query that sees it. */
#include "kernels/cpu.h"

#define CHUNK 64 /* dims at a time */

/* One head of one pixel. New frame f's q, k and v are at step * f from their pointers. */
typedef struct {
    const float *q, *k, *v;
    float *out, *keys, *values; /* keys, values: [slots][d]; NULL if there are none */
    int64_t step, out_step;
    int64_t d, num_pairs;
    int num_kept, frames;
    const int32_t *slots;
    const float *table;
    bool store;
} head_task;

RF_INLINE const float *piece_row(const float *kept, const float *fresh, const head_task *t, int j) {
    return j < t->num_kept ? kept + t->slots[j] * t->d : fresh + (j - t->num_kept) * t->step;
}

/* Sixteen neighbours; arithmetic alone, which compilers split where the machine has shorter registers. */
typedef float lanes16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float lanes8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float lanes4 __attribute__((vector_size(16), aligned(4), may_alias));

/* The sum of a[i] b[i]; num == CHUNK where the compiler knows it is the fast way. */
RF_INLINE float dot_piece(const float *a, const float *b, int64_t num) {
    if (num == CHUNK) {
        const lanes16 *x = (const lanes16 *)a, *y = (const lanes16 *)b;
        lanes16 sum = (x[0] * y[0] + x[1] * y[1]) + (x[2] * y[2] + x[3] * y[3]);
        lanes8 half[2];
        memcpy(half, &sum, sizeof half);
        half[0] += half[1];
        lanes4 quarter[2];
        memcpy(quarter, half, sizeof quarter);
        quarter[0] += quarter[1];
        return (quarter[0][0] + quarter[0][1]) + (quarter[0][2] + quarter[0][3]);
    }
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < num; i++) dot += a[i] * b[i];
    return dot;
}

/* out = sum over j of s[j] v_j for dims c.. c + num - 1 of new frame f. */
RF_INLINE void sum_piece(const head_task *t, float *out, const float *s, int f, int64_t c, int64_t num) {
    if (num == CHUNK) {
        lanes16 sum[CHUNK / 16] = {0};
        for (int j = 0; j <= t->num_kept + f; j++) {
            const lanes16 *v = (const lanes16 *)(piece_row(t->values, t->v, t, j) + c);
            for (int i = 0; i < CHUNK / 16; i++) sum[i] += s[j] * v[i];
        }
        memcpy(out, sum, sizeof sum);
        return;
    }
    memset(out, 0, (size_t)num * sizeof(float));
    for (int j = 0; j <= t->num_kept + f; j++) {
        const float *v = piece_row(t->values, t->v, t, j) + c;
        for (int64_t i = 0; i < num; i++) out[i] += s[j] * v[i];
    }
}

RF_HOT static void attend(const head_task *t) {
    float score[RF_MAX_WINDOW][RF_MAX_WINDOW], q[RF_MAX_WINDOW][CHUNK], k[CHUNK];
    const int kept = t->num_kept, frames = t->frames, all = kept + frames;
    const float scale = 1.0f / sqrtf((float)t->d);
    for (int64_t c = 0; c < t->d; c += CHUNK) {
        int64_t num = t->d - c < CHUNK ? t->d - c : CHUNK, pairs = t->num_pairs - c / 2;
        pairs = pairs < 0 ? 0 : pairs > num / 2 ? num / 2 : pairs;
        for (int f = 0; f < frames; f++) {
            const float *table = pairs > 0 ? t->table + (kept + f) * t->num_pairs * 2 + c : t->table;
            rf_cpu_turn(q[f], t->q + f * t->step + c, table, pairs, num);
            for (int64_t i = 0; i < num; i++) q[f][i] *= scale;
        }
        for (int j = 0; j < all; j++) {
            const float *table = pairs > 0 ? t->table + j * t->num_pairs * 2 + c : t->table;
            const float *key = piece_row(t->keys, t->k, t, j) + c;
            if (2 * pairs == CHUNK)
                rf_cpu_turn(k, key, table, CHUNK / 2, CHUNK);
            else
                rf_cpu_turn(k, key, table, pairs, num);
            for (int f = j > kept ? j - kept : 0; f < frames; f++) {
                float dot = num == CHUNK ? dot_piece(q[f], k, CHUNK) : dot_piece(q[f], k, num);
                score[f][j] = c == 0 ? dot : score[f][j] + dot;
            }
        }
    }
    for (int f = 0; f < frames; f++) {
        float *s = score[f], top = -INFINITY, total = 0;
        const int num = kept + f + 1;
#pragma omp simd reduction(max : top)
        for (int j = 0; j < num; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : total)
        for (int j = 0; j < num; j++) {
            s[j] = rf_exp(s[j] - top);
            total += s[j];
        }
        float inv = 1.0f / total;
#pragma omp simd
        for (int j = 0; j < num; j++) s[j] *= inv;
    }
    for (int64_t c = 0; c < t->d; c += CHUNK) {
        int64_t num = t->d - c < CHUNK ? t->d - c : CHUNK;
        for (int f = 0; f < frames; f++) {
            float *out = t->out + f * t->out_step + c;
            if (num == CHUNK)
                sum_piece(t, out, score[f], f, c, CHUNK);
            else
                sum_piece(t, out, score[f], f, c, num);
        }
    }
    if (!t->store) return;
    for (int f = 0; f < frames; f++) {
        memcpy(t->keys + t->slots[kept + f] * t->d, t->k + f * t->step, (size_t)t->d * sizeof(float));
        memcpy(t->values + t->slots[kept + f] * t->d, t->v + f * t->step, (size_t)t->d * sizeof(float));
    }
}

rf_status rf_temporal_attention_cpu(rf_stream *stream, const rf_temporal_attention_args *a, rf_error *err) {
    RF_TRY(stream ? rf_temporal_attention_check_run(a, err) : rf_temporal_attention_check(a, err));
    RF_TRY(rf_check_f32("temporal_attention: dtype", a->dtype, err));
    int64_t num_tasks = a->rows ? a->num_rows : a->samples * a->tokens;
    if (!stream || num_tasks == 0) return RF_OK;
    rf_stream_note_launch(stream, "temporal_attention");
    const int64_t d = a->head_dim, width = a->num_heads * d;
    const int max_kept = RF_MAX_WINDOW - (int)a->frames;
    int num_kept = a->kv ? a->window->num_kept : 0;
    num_kept = num_kept < 0 ? 0 : num_kept > max_kept ? max_kept : num_kept;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t sample = task / a->tokens, pixel = task % a->tokens;
        int64_t row = a->rows ? task : sample * a->frames * a->tokens + pixel; /* of frame 0 */
        int64_t state = a->sample_index && !a->rows ? a->sample_index[sample] : sample;
        if (a->rows) state = a->rows[task] / a->tokens, pixel = a->rows[task] % a->tokens;
        for (int h = 0; h < a->num_heads; h++) {
            const float *q = (const float *)a->qkv + row * 3 * width + h * d;
            float *keys =
                a->kv ? (float *)a->kv + ((state * a->tokens + pixel) * a->num_heads + h) * 2 * a->slots * d : NULL;
            attend(&(head_task){.q = q,
                                .k = q + width,
                                .v = q + 2 * width,
                                .out = (float *)a->out + row * width + h * d,
                                .keys = keys,
                                .values = keys ? keys + a->slots * d : NULL,
                                .step = a->tokens * 3 * width,
                                .out_step = a->tokens * width,
                                .d = d,
                                .num_pairs = a->num_pairs,
                                .num_kept = num_kept,
                                .frames = (int)a->frames,
                                .slots = a->window->slots,
                                .table = a->table,
                                .store = a->store});
        }
    }
    return RF_OK;
}
