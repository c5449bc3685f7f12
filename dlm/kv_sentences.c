/* dlm/kv_sentences.c - sentences of sequences for rules that penalise those said again: the last layer's hidden states, behind the
 * final norm, of a prompt and of each token that follows. */
#include "caching/kv/sentences.h"
#include "core/memory.h"
#include "dlm/kv_internal.h"

static bool wanted(const rf_kv_session *s) {
    return (s->step_needs & RF_KV_NEED_HIDDEN) != 0;
}

rf_status rf_kv_sentences_open(rf_kv_session *s, rf_error *err) {
    for (int b = 0; wanted(s) && b < s->batch; b++)
        RF_TRY(rf_kv_sentences_create(&s->sequences[b].sentences, &s->rule, (int32_t)s->model->desc.hidden, err));
    return RF_OK;
}

bool rf_kv_wants_sentences(const rf_kv_session *s, int sequence) {
    return wanted(s) && s->sequences[sequence].budget > 0;
}

/* Residual rows x [num][hidden], normed into h. Waits. */
static rf_status add_rows(rf_kv_session *s, int sequence, const void *x, void *h, const int32_t *tokens, int64_t num,
                          rf_error *err) {
    int64_t hidden = s->model->desc.hidden;
    rf_norm_args norm = rf_text_norm_args(s->stage, x, h, num, s->model->final_norm);
    RF_TRY(s->ops->norm(s->stream, &norm, err));
    float *rows = rf_alloc((size_t)(num * hidden) * sizeof *rows);
    if (rows == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a sequence's hidden states");
    rf_status st = rf_kv_read_rows(s, h, num * hidden, rows, err);
    for (int64_t i = 0; st == RF_OK && i < num; i++)
        st = rf_kv_sentences_add(s->sequences[sequence].sentences, tokens[i], rows + i * hidden, err);
    rf_free(rows);
    return st;
}

rf_status rf_kv_sentences_prompt(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, rf_error *err) {
    if (!rf_kv_wants_sentences(s, sequence)) return RF_OK;
    rf_kv_sentences_reset(s->sequences[sequence].sentences);
    size_t row = (size_t)s->model->desc.hidden * rf_dtype_bytes(s->stage->options.residual_dtype);
    for (int32_t begin = 0, size = s->options.prefill_chunk; begin < num; begin += size) {
        int32_t rows = num - begin < size ? num - begin : size;
        RF_TRY(add_rows(s, sequence, s->x_plane + (size_t)begin * row, s->stage->b.h, tokens + begin, rows, err));
    }
    return RF_OK;
}

rf_status rf_kv_sentences_step(rf_kv_session *s, int first, int num, rf_error *err) {
    int64_t hidden = s->model->desc.hidden;
    size_t row = (size_t)hidden * rf_dtype_bytes(s->stage->options.residual_dtype);
    for (int b = first; b < first + num; b++) {
        if (!rf_kv_wants_sentences(s, b)) continue;
        char *h = (char *)s->step.h + (size_t)(b * hidden) * rf_kv_elem(s);
        const int32_t *token = s->host_control + s->at.tokens + b;
        RF_TRY(add_rows(s, b, (const char *)s->step.x + (size_t)b * row, h, token, 1, err));
    }
    return RF_OK;
}

void rf_kv_sentences_show(const rf_kv_session *s, int sequence, rf_kv_stats *stats) {
    if (rf_kv_wants_sentences(s, sequence))
        stats->penalty = rf_kv_sentences_penalty(s->sequences[sequence].sentences, &stats->num_positions);
}
