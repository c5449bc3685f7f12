/* caching/kv/sentences.c - a sequence in sentences, compared as they end. */
#include "caching/kv/sentences.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"

typedef struct {
    int32_t first, end; /* positions */
} span;

struct rf_kv_sentences {
    int32_t delimiters[RF_KV_DELIMITERS];
    double threshold;
    int32_t dim, begun; /* the sentence that has not ended begins there */
    int32_t num_tokens, token_room, num, room;
    float *penalty; /* [num_tokens] */
    span *spans;    /* [num] */
    float *vectors; /* [num][dim] */
    double *sum;    /* [dim] of the sentence that has not ended */
};

rf_status rf_kv_sentences_create(rf_kv_sentences **out, const rf_kv_rule *rule, int32_t dim, rf_error *err) {
    *out = NULL;
    rf_kv_sentences *s = rf_alloc_zero(1, sizeof *s);
    double *sum = rf_alloc_zero((size_t)dim, sizeof *sum);
    if (s == NULL || sum == NULL) {
        rf_free(s);
        rf_free(sum);
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for sentences");
    }
    memcpy(s->delimiters, rule->delimiters, sizeof s->delimiters);
    s->threshold = rule->sentence_threshold;
    s->dim = dim;
    s->sum = sum;
    *out = s;
    return RF_OK;
}

void rf_kv_sentences_destroy(rf_kv_sentences *s) {
    if (s == NULL) return;
    rf_free(s->penalty);
    rf_free(s->spans);
    rf_free(s->vectors);
    rf_free(s->sum);
    rf_free(s);
}

void rf_kv_sentences_reset(rf_kv_sentences *s) {
    s->num = s->num_tokens = s->begun = 0;
    memset(s->sum, 0, (size_t)s->dim * sizeof *s->sum);
}

static bool grow(void *pointer, int32_t *room, int32_t num, size_t bytes) {
    void **at = pointer;
    int32_t more = *room < 64 ? 64 : 2 * *room;
    if (num <= *room) return true;
    void *grown = rf_realloc(*at, (size_t)more * bytes);
    if (grown == NULL) return false;
    *at = grown;
    *room = more;
    return true;
}

/* Vector of the newest sentence against those of the earlier ones. */
static void compare(rf_kv_sentences *s) {
    const float *newest = s->vectors + (int64_t)(s->num - 1) * s->dim;
    for (int32_t i = 0; i + 1 < s->num; i++) {
        const float *vector = s->vectors + (int64_t)i * s->dim;
        double cosine = 0;
        for (int32_t c = 0; c < s->dim; c++) cosine += (double)vector[c] * (double)newest[c];
        if (cosine < s->threshold) continue;
        for (int32_t p = s->spans[i].first; p < s->spans[i].end; p++)
            if ((float)cosine > s->penalty[p]) s->penalty[p] = (float)cosine;
    }
}

static rf_status end_sentence(rf_kv_sentences *s, rf_error *err) {
    int32_t room = s->room;
    bool ok = grow(&s->spans, &room, s->num + 1, sizeof *s->spans);
    ok = ok && grow(&s->vectors, &s->room, s->num + 1, (size_t)s->dim * sizeof *s->vectors);
    if (!ok) return rf_fail(err, RF_ERR_MEMORY, "out of memory for %d sentences", s->num + 1);
    double norm = 0;
    for (int32_t c = 0; c < s->dim; c++) norm += s->sum[c] * s->sum[c];
    float *vector = s->vectors + (int64_t)s->num * s->dim;
    for (int32_t c = 0; c < s->dim; c++) vector[c] = norm > 0 ? (float)(s->sum[c] / sqrt(norm)) : 0;
    s->spans[s->num++] = (span){s->begun, s->num_tokens};
    compare(s);
    return RF_OK;
}

rf_status rf_kv_sentences_add(rf_kv_sentences *s, int32_t token, const float *hidden, rf_error *err) {
    if (!grow(&s->penalty, &s->token_room, s->num_tokens + 1, sizeof *s->penalty))
        return rf_fail(err, RF_ERR_MEMORY, "out of memory for the sentences of %d tokens", s->num_tokens + 1);
    s->penalty[s->num_tokens++] = 0;
    for (int32_t c = 0; c < s->dim; c++) s->sum[c] += (double)hidden[c];
    bool ends = false;
    for (int i = 0; i < RF_KV_DELIMITERS; i++) ends |= s->delimiters[i] >= 0 && s->delimiters[i] == token;
    if (!ends) return RF_OK;
    if (s->num_tokens - s->begun > 1) RF_TRY(end_sentence(s, err));
    s->begun = s->num_tokens;
    memset(s->sum, 0, (size_t)s->dim * sizeof *s->sum);
    return RF_OK;
}

const float *rf_kv_sentences_penalty(const rf_kv_sentences *s, int32_t *num) {
    *num = s->num_tokens;
    return s->penalty;
}

int32_t rf_kv_sentences_num(const rf_kv_sentences *s) {
    return s->num;
}

size_t rf_kv_sentences_bytes(const rf_kv_sentences *s) {
    return (size_t)s->num * (sizeof(span) + (size_t)s->dim * sizeof(float)) + (size_t)s->num_tokens * sizeof(float);
}
