/* dlm/kv_select.c - a step's attention reads a few of all slots: keys as the host sees them, what a rule keeps of them (pairs,
 * sentences, pages), and lists of rows for each layer.
 *
 * The choice is the host's (caching/kv/select.h). On the host an f32 pool is read where it lies; else keys are mirrored in host
 * memory as f32, and a step waits for the device once a layer. Nothing leaves the device's pool: offloading is not there. */
#include <math.h>
#include <string.h>

#include "caching/kv/select.h"
#include "core/memory.h"
#include "dlm/kv_internal.h"

/* Of one sequence. */
typedef struct {
    rf_kv_units *units; /* [L * Hkv] SENTENCES, PAGES */
    int32_t *pairs;     /* [L][Hq][num_pairs] PAIRS */
    float *q_sum;       /* [L][Hq][D] SENTENCES: queries of the sentence so far */
} selection;

struct rf_kv_select {
    selection *of; /* [batch] */
    int init, local, num_pairs;
    float *mirror;        /* [batch * pool_rows][D], or NULL: the pool is */
    int32_t *rows, *lens; /* device: [U][stride], [U], of the layer at hand */
    int32_t *host_rows, *host_lens;
    rf_kv_keys *keys;               /* [Hkv] of the layer at hand */
    float *q, *k, *window_q;        /* [Hq][D], [Hkv][D], [window][Hq][D] */
    float *score, *work;            /* [stride] (at least [D]), [2 stride] */
    int32_t *order, *cost, *chosen; /* [group][stride], [stride], [stride] */
    double *agreement;              /* [D / 2] */
    float *plane;                   /* mirrored: [max_prompt][Hkv * D] */
    uint8_t *counts;                /* SENTENCES: [Hkv][max_prompt] */
};

static bool of_units(const rf_kv_session *s) {
    return s->rule.selector == RF_KV_BY_SENTENCES || s->rule.selector == RF_KV_BY_PAGES;
}

static bool pool_is_host_f32(const rf_kv_session *s) {
    return s->host && s->model->dtype == RF_DTYPE_F32;
}

static float scale_of(const rf_kv_session *s) {
    return (float)(1.0 / sqrt((double)s->head_dim));
}

/* Is a layer of a sequence read by choice? */
static bool applies(const rf_kv_session *s, int layer, int sequence) {
    return s->sequences[sequence].budget > 0 && layer >= s->rule.skip_layers;
}

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session that reads a selection");
}

static rf_status create_sequences(rf_kv_session *s, rf_error *err) {
    struct rf_kv_select *x = s->select;
    size_t layers = (size_t)s->num_layers, q = (size_t)s->num_q_heads;
    x->of = rf_alloc_zero((size_t)s->batch, sizeof *x->of);
    if (x->of == NULL) return no_memory(err);
    for (int b = 0; b < s->batch; b++) {
        selection *one = &x->of[b];
        if (of_units(s)) {
            one->units = rf_alloc_zero(layers * (size_t)s->num_kv_heads, sizeof *one->units);
            one->q_sum = rf_alloc_zero(layers * q * (size_t)s->head_dim, sizeof(float));
            if (!one->units || !one->q_sum) return no_memory(err);
        }
        if (s->rule.selector == RF_KV_BY_PAIRS) {
            one->pairs = rf_alloc_zero(layers * q * (size_t)x->num_pairs, sizeof(int32_t));
            if (!one->pairs) return no_memory(err);
        }
    }
    return RF_OK;
}

rf_status rf_kv_select_create(rf_kv_session *s, bool mirrors, rf_error *err) {
    struct rf_kv_select *x = s->select = rf_alloc_zero(1, sizeof *x);
    if (x == NULL) return no_memory(err);
    size_t stride = (size_t)s->stride, units = (size_t)s->units, d = (size_t)s->head_dim, kv = (size_t)s->num_kv_heads;
    size_t q_cols = (size_t)s->num_q_heads * d, prompt = (size_t)s->options.max_prompt;
    int half = s->head_dim / 2, pairs = s->rule.select_dims / 2;
    size_t window = (size_t)s->rule.window < prompt ? (size_t)s->rule.window : prompt;
    bool by_pairs = s->rule.selector == RF_KV_BY_PAIRS, sentences = s->rule.selector == RF_KV_BY_SENTENCES;
    x->num_pairs = pairs < half ? pairs : half;
    RF_TRY(create_sequences(s, err));
    RF_TRY(rf_backend_alloc(s->backend, (void **)&x->rows, units * stride * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc(s->backend, (void **)&x->lens, units * sizeof(int32_t), err));
    RF_TRY(rf_stream_zero(s->stream, x->rows, units * stride * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&x->host_rows, units * stride * sizeof(int32_t), err));
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&x->host_lens, units * sizeof(int32_t), err));
    bool mirrored = mirrors || !pool_is_host_f32(s);
    struct {
        void *slot;
        size_t count, bytes;
    } list[] = {
        {&x->mirror, mirrored ? (size_t)s->batch * (size_t)s->pool_rows * d : 0, sizeof(float)},
        {&x->plane, mirrored ? prompt * kv * d : 0, sizeof(float)},
        {&x->keys, kv, sizeof(rf_kv_keys)},
        {&x->q, q_cols, sizeof(float)},
        {&x->k, kv * d, sizeof(float)},
        {&x->window_q, by_pairs ? window * q_cols : 0, sizeof(float)},
        {&x->score, stride > d ? stride : d, sizeof(float)},
        {&x->work, 2 * stride, sizeof(float)},
        {&x->order, (size_t)s->group * stride, sizeof(int32_t)},
        {&x->cost, stride, sizeof(int32_t)},
        {&x->chosen, stride, sizeof(int32_t)},
        {&x->agreement, (size_t)half, sizeof(double)},
        {&x->counts, sentences ? kv * prompt : 0, 1},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (list[i].count == 0) continue;
        void *p = rf_alloc_zero(list[i].count, list[i].bytes);
        if (p == NULL) return no_memory(err);
        memcpy(list[i].slot, &p, sizeof p);
    }
    return rf_kv_wait(s, err);
}

void rf_kv_select_destroy(rf_kv_session *s) {
    struct rf_kv_select *x = s->select;
    if (x == NULL) return;
    for (int b = 0; x->of && b < s->batch; b++) {
        for (int i = 0; x->of[b].units && i < s->num_layers * s->num_kv_heads; i++)
            rf_kv_units_free(&x->of[b].units[i]);
        rf_free(x->of[b].units);
        rf_free(x->of[b].pairs);
        rf_free(x->of[b].q_sum);
    }
    rf_free(x->of);
    void *host[] = {x->mirror, x->plane, x->keys, x->q,      x->k,         x->window_q, x->score,
                    x->work,   x->order, x->cost, x->chosen, x->agreement, x->counts};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) rf_free(host[i]);
    rf_backend_free(s->backend, x->rows);
    rf_backend_free(s->backend, x->lens);
    rf_backend_free_pinned(s->backend, x->host_rows);
    rf_backend_free_pinned(s->backend, x->host_lens);
    rf_free(x);
    s->select = NULL;
}

size_t rf_kv_select_bytes(const rf_kv_session *s) {
    const struct rf_kv_select *x = s->select;
    size_t bytes = 0;
    for (int b = 0; x && b < s->batch; b++) {
        if (!s->sequences[b].ready || s->sequences[b].budget == 0) continue;
        for (int i = 0; of_units(s) && i < s->num_layers * s->num_kv_heads; i++) {
            const rf_kv_units *u = &x->of[b].units[i];
            bytes += (size_t)u->num_slots * sizeof(int32_t) +
                     (size_t)u->num_units * (sizeof(int32_t) + (size_t)u->dim * sizeof(float));
        }
        if (x->of[b].pairs)
            bytes += (size_t)s->num_layers * (size_t)s->num_q_heads * (size_t)x->num_pairs * sizeof(int32_t);
    }
    return bytes;
}

const int32_t *rf_kv_select_last(const rf_kv_session *s, int64_t unit, int32_t *num) {
    *num = s->select->host_lens[unit];
    return s->select->host_rows + unit * s->stride;
}

static void find_keys(const rf_kv_session *s, int layer, int sequence) {
    struct rf_kv_select *x = s->select;
    for (int h = 0; h < s->num_kv_heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(s->sequences[sequence].book, layer, h);
        x->keys[h] = (rf_kv_keys){.k = x->mirror ? x->mirror : (const float *)(const void *)s->k_pool,
                                  .rows = head->row,
                                  .num = head->num,
                                  .dim = s->head_dim};
    }
}

static void mirror_key(const rf_kv_session *s, int32_t row, const float *k) {
    memcpy(s->select->mirror + (int64_t)row * s->head_dim, k, (size_t)s->head_dim * sizeof *k);
}

/* --- a prompt --------------------------------------------------------------------------------------------------------- */

rf_status rf_kv_select_rows(rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, rf_error *err) {
    struct rf_kv_select *x = s->select;
    int32_t first = num > s->rule.window ? num - s->rule.window : 0, from = first > begin ? first : begin;
    if (s->rule.selector != RF_KV_BY_PAIRS || from >= begin + rows) return RF_OK;
    int64_t cols = s->stage->q_cols;
    const char *q = (const char *)s->stage->b.q + (size_t)((from - begin) * cols) * rf_kv_elem(s);
    return rf_kv_read_rows(s, q, (begin + rows - from) * cols, x->window_q + (from - first) * cols, err);
}

/* Each query head's pairs by their contextual agreement on the prompt's last `window` queries: of the keys that one sees, the best
 * min(budget, a quarter). */
static void calibrate(rf_kv_session *s, int layer, int sequence, int32_t num) {
    struct rf_kv_select *x = s->select;
    int half = s->head_dim / 2;
    int32_t first = num > s->rule.window ? num - s->rule.window : 0, budget = s->sequences[sequence].budget;
    for (int h = 0; h < s->num_q_heads; h++) {
        memset(x->agreement, 0, (size_t)half * sizeof *x->agreement);
        for (int32_t i = first; i < num; i++) {
            const float *q = x->window_q + ((int64_t)(i - first) * s->num_q_heads + h) * s->head_dim;
            int32_t count = (i + 1) / 4 > 1 ? (i + 1) / 4 : 1;
            if (count > budget) count = budget;
            rf_kv_select_agreement(x->agreement, q, &x->keys[h / s->group], i + 1, count, x->work);
        }
        rf_kv_select_best_pairs(x->of[sequence].pairs + ((int64_t)layer * s->num_q_heads + h) * x->num_pairs,
                                x->agreement, half, x->num_pairs);
    }
}

static bool ends_sentence(const rf_kv_session *s, int32_t token) {
    for (int i = 0; i < RF_KV_DELIMITERS; i++)
        if (s->rule.delimiters[i] == token && token >= 0) return true;
    return false;
}

static rf_status split_sentences(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t num,
                                 const rf_kv_stats *stats, rf_error *err) {
    struct rf_kv_select *x = s->select;
    selection *of = &x->of[sequence];
    RF_TRY(rf_kv_select_counts(&s->rule, &s->shape, layer, num, s->sequences[sequence].budget, stats, x->counts, err));
    for (int h = 0; h < s->num_kv_heads; h++) {
        rf_kv_units *u = &of->units[layer * s->num_kv_heads + h];
        const rf_kv_keys *keys = &x->keys[h];
        rf_kv_units_reset(u, s->head_dim);
        for (int32_t j = 0; j < num; j++) {
            const float *k = keys->k + (int64_t)keys->rows[j] * s->head_dim;
            RF_TRY(rf_kv_units_add(u, k, x->counts[(int64_t)h * num + j] != 0, err));
            if (ends_sentence(s, tokens[j])) u->open = -1;
        }
        u->open = -1; /* the last one ends with the prompt */
    }
    size_t cols = (size_t)s->num_q_heads * (size_t)s->head_dim;
    memset(of->q_sum + (size_t)layer * cols, 0, cols * sizeof(float));
    return RF_OK;
}

rf_status rf_kv_select_prompt(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t num,
                              const rf_kv_stats *stats, rf_error *err) {
    struct rf_kv_select *x = s->select;
    if (!applies(s, layer, sequence)) return RF_OK;
    find_keys(s, layer, sequence);
    if (x->mirror) {
        RF_TRY(rf_kv_read_rows(s, rf_text_keys(s->stage, layer), num * s->stage->kv_cols, x->plane, err));
        for (int h = 0; h < s->num_kv_heads; h++)
            for (int32_t j = 0; j < num; j++)
                mirror_key(s, x->keys[h].rows[j], x->plane + j * s->stage->kv_cols + (int64_t)h * s->head_dim);
    }
    switch (s->rule.selector) {
    case RF_KV_BY_VOTE: return RF_OK;
    case RF_KV_BY_PAIRS: calibrate(s, layer, sequence, num); return RF_OK;
    case RF_KV_BY_SENTENCES: return split_sentences(s, layer, sequence, tokens, num, stats, err);
    default: break;
    }
    for (int h = 0; h < s->num_kv_heads; h++)
        RF_TRY(rf_kv_units_page(&x->of[sequence].units[layer * s->num_kv_heads + h], &x->keys[h], s->rule.page, err));
    return RF_OK;
}

/* --- a step ------------------------------------------------------------------------------------------------------------- */

/* The new slot's key joins its page or sentence. */
static rf_status add_slot(rf_kv_session *s, int layer, int sequence, bool ends, rf_error *err) {
    struct rf_kv_select *x = s->select;
    for (int h = 0; of_units(s) && h < s->num_kv_heads; h++) {
        rf_kv_units *u = &x->of[sequence].units[layer * s->num_kv_heads + h];
        RF_TRY(rf_kv_units_add(u, x->k + (int64_t)h * s->head_dim, true, err));
        bool full = s->rule.selector == RF_KV_BY_PAGES && u->count[u->open] >= s->rule.page;
        if (ends || full) u->open = -1;
    }
    return RF_OK;
}

/* Slots of a head that are read; a vote's are those of the head before. */
static int32_t choose(rf_kv_session *s, int layer, int sequence, int head, int32_t budget) {
    struct rf_kv_select *x = s->select;
    const selection *of = &x->of[sequence];
    const rf_kv_keys *keys = &x->keys[head];
    int32_t n = keys->num, init, local;
    int64_t d = s->head_dim;
    const float *q = x->q + head * s->group * d;
    rf_kv_select_ends(&s->rule, budget, &init, &local);
    switch (s->rule.selector) {
    case RF_KV_BY_VOTE:
        if (head == 0)
            rf_kv_select_vote(x->score, x->q, x->keys, s->num_kv_heads, s->group, scale_of(s), init, n - local,
                              x->work);
        return rf_kv_select_best(x->chosen, x->score, n, budget, init, local);
    case RF_KV_BY_PAIRS:
        rf_kv_select_pairs(x->score, q, keys,
                           of->pairs + ((int64_t)layer * s->num_q_heads + head * s->group) * x->num_pairs, s->group,
                           x->num_pairs, scale_of(s), init, n - local, x->work);
        return rf_kv_select_best(x->chosen, x->score, n, budget, init, local);
    default: break;
    }
    const rf_kv_units *u = &of->units[layer * s->num_kv_heads + head];
    int lists = s->rule.selector == RF_KV_BY_PAGES ? s->group : 1;
    if (s->rule.selector == RF_KV_BY_PAGES) {
        for (int g = 0; g < lists; g++) rf_kv_units_rank(x->order + (int64_t)g * u->num_units, u, q + g * d, x->work);
    } else { /* the mean over the group of the sentence's mean queries: as their sum */
        const float *sum = of->q_sum + ((int64_t)layer * s->num_q_heads + head * s->group) * d;
        memset(x->score, 0, (size_t)d * sizeof *x->score);
        for (int64_t c = 0; c < s->group * d; c++) x->score[c % d] += sum[c];
        rf_kv_units_rank(x->order, u, x->score, x->work);
    }
    return rf_kv_select_units(x->chosen, u, x->order, lists, budget, init, local, s->rule.selector == RF_KV_BY_PAGES,
                              x->cost);
}

static rf_status select_sequence(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    struct rf_kv_select *x = s->select;
    const rf_kv_sequence *q = &s->sequences[sequence];
    int64_t q_cols = s->stage->q_cols, kv_cols = s->stage->kv_cols, unit = (int64_t)sequence * s->num_kv_heads;
    int32_t num = rf_kv_book_head(q->book, layer, 0)->num;
    bool chooses = false;
    if (applies(s, layer, sequence)) {
        const char *new_k = (const char *)s->step.k_new + (size_t)(sequence * kv_cols) * rf_kv_elem(s);
        const char *new_q = (const char *)s->step.q + (size_t)(sequence * q_cols) * rf_kv_elem(s);
        bool ends = s->rule.selector == RF_KV_BY_SENTENCES &&
                    ends_sentence(s, s->host_control[s->at.tokens + (size_t)sequence]);
        RF_TRY(rf_kv_read_rows(s, new_k, kv_cols, x->k, err));
        RF_TRY(rf_kv_read_rows(s, new_q, q_cols, x->q, err));
        find_keys(s, layer, sequence);
        for (int h = 0; x->mirror && h < s->num_kv_heads; h++)
            mirror_key(s, x->keys[h].rows[num - 1], x->k + (int64_t)h * s->head_dim);
        RF_TRY(add_slot(s, layer, sequence, ends, err));
        selection *of = &x->of[sequence];
        float *sum = s->rule.selector == RF_KV_BY_SENTENCES ? of->q_sum + layer * q_cols : NULL;
        for (int64_t c = 0; sum && c < q_cols; c++) sum[c] += x->q[c];
        chooses = num > q->budget;
        for (int h = 0; chooses && h < s->num_kv_heads; h++) {
            int32_t count = choose(s, layer, sequence, h, q->budget), *rows = x->host_rows + (unit + h) * s->stride;
            for (int32_t i = 0; i < count; i++) rows[i] = x->keys[h].rows[x->chosen[i]];
            x->host_lens[unit + h] = count;
            s->key_layers += count - num;
        }
        if (sum && ends) memset(sum, 0, (size_t)q_cols * sizeof *sum);
    }
    for (int h = 0; !chooses && h < s->num_kv_heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(q->book, layer, h);
        memcpy(x->host_rows + (unit + h) * s->stride, head->row, (size_t)head->num * sizeof *head->row);
        x->host_lens[unit + h] = head->num;
    }
    for (int h = 0; h < s->num_kv_heads; h++) {
        int64_t at = (unit + h) * s->stride;
        RF_TRY(rf_stream_upload(s->stream, x->rows + at, x->host_rows + at,
                                (size_t)x->host_lens[unit + h] * sizeof(int32_t), err));
    }
    return rf_stream_upload(s->stream, x->lens + unit, x->host_lens + unit, (size_t)s->num_kv_heads * sizeof(int32_t),
                            err);
}

rf_status rf_kv_select_step(rf_kv_session *s, int layer, int first, int num, rf_error *err) {
    RF_TRY(rf_kv_wait(s, err)); /* the lists of the layer before may be on their way */
    double began = rf_kv_now_ms();
    for (int b = first; b < first + num; b++) RF_TRY(select_sequence(s, layer, b, err));
    s->info.step_score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

void rf_kv_select_attention(const rf_kv_session *s, int first, rf_attention_args *args) {
    int64_t unit = (int64_t)first * s->num_kv_heads;
    args->kv_rows = s->select->rows + unit * s->stride;
    args->kv_lens = s->select->lens + unit;
}
