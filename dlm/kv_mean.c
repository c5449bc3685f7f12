/* dlm/kv_mean.c - compensation: what a head dropped stands in attention as one slot with their mean key and value, counted as often
 * as there were tokens (RazorAttention, arXiv 2407.15891): logit scale q.k + ln N.
 *
 * Attention over that one slot has lse = scale q.k and out = v; ln N is added to the lse, and the two attentions are joined. */
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/kv_internal.h"

static char *mean_at(const rf_kv_session *s, char *plane, int layer, int sequence) {
    return plane + (size_t)(rf_kv_unit_at(s, layer, sequence) * s->head_dim) * rf_kv_elem(s);
}

/* Means of rows of the plane that the book does not keep: out [Hkv][D], counts [Hkv]. */
static rf_status means_of(rf_kv_session *s, int layer, int sequence, const void *plane, int32_t num, uint8_t *kept,
                          float *rows, float *out, int32_t *counts, rf_error *err) {
    int64_t cols = s->stage->kv_cols, d = s->head_dim;
    RF_TRY(rf_kv_read_rows(s, plane, num * cols, rows, err));
    for (int h = 0; h < s->num_kv_heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(s->sequences[sequence].book, layer, h);
        memset(kept, 0, (size_t)num);
        for (int32_t i = 0; i < head->num; i++) kept[head->position[i]] = 1;
        counts[h] = num - head->num;
        for (int64_t c = 0; c < d; c++) {
            double sum = 0;
            for (int32_t j = 0; j < num; j++)
                if (!kept[j]) sum += (double)rows[j * cols + h * d + c];
            out[h * d + c] = counts[h] > 0 ? (float)(sum / counts[h]) : 0.0f;
        }
    }
    return RF_OK;
}

rf_status rf_kv_mean_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    if (s->rule.action != RF_KV_COMPENSATE) return RF_OK;
    int64_t d = s->head_dim, heads = s->num_kv_heads;
    float *rows = rf_alloc((size_t)(num * s->stage->kv_cols) * sizeof *rows);
    float *means = rf_alloc((size_t)(heads * d + s->num_q_heads) * sizeof *means), *logs = means + heads * d;
    int32_t *counts = rf_alloc((size_t)heads * sizeof *counts);
    uint8_t *kept = rf_alloc((size_t)num);
    rf_status st =
        rows && means && counts && kept ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for means of rows");
    for (int p = 0; st == RF_OK && p < 2; p++) {
        const char *plane = p ? rf_text_values(s->stage, layer) : rf_text_keys(s->stage, layer);
        st = means_of(s, layer, sequence, plane, num, kept, rows, means, counts, err);
        if (st == RF_OK)
            st = rf_kv_write_rows(s, mean_at(s, p ? s->mean_v : s->mean_k, layer, sequence), heads * d, means, err);
    }
    if (st == RF_OK) {
        for (int q = 0; q < s->num_q_heads; q++) {
            int32_t count = counts[q / s->group];
            logs[q] = count > 0 ? (float)log((double)count) : -INFINITY;
        }
        int64_t at = ((int64_t)layer * s->batch + sequence) * s->num_q_heads;
        st = rf_stream_upload(s->stream, s->mean_logs + at, logs, (size_t)s->num_q_heads * sizeof(float), err);
        if (st == RF_OK) st = rf_kv_wait(s, err);
    }
    rf_free(rows);
    rf_free(means);
    rf_free(counts);
    rf_free(kept);
    return st;
}

rf_attention_args rf_kv_mean_attention(const rf_kv_session *s, int layer, int first, int num) {
    rf_attention_args a = rf_kv_step_attention(s, layer, first, num, 1);
    a.kv_rows = NULL;
    a.kv_lens = NULL;
    a.kv_batch_stride_rows = 0;
    a.kv_batch_stride = s->head_dim;
    if (s->memory == NULL) return a;
    a.k = mean_at(s, s->mean_k, layer, first);
    a.v = mean_at(s, s->mean_v, layer, first);
    a.out = s->mean_out + (size_t)(first * s->stage->q_cols) * rf_kv_elem(s);
    a.lse = s->mean_lse + (int64_t)first * s->num_q_heads;
    return a;
}

rf_status rf_kv_join_mean(rf_kv_session *s, int layer, int first, int num, rf_error *err) {
    if (s->rule.action != RF_KV_COMPENSATE) return RF_OK;
    int64_t heads = (int64_t)num * s->num_q_heads;
    rf_attention_args a = rf_kv_mean_attention(s, layer, first, num);
    RF_TRY(s->ops->attention(s->stream, &a, err));
    rf_elementwise_args add = rf_elementwise_args_default(RF_DTYPE_F32, RF_DTYPE_F32, 1, heads);
    add.x = add.y = a.lse;
    add.add = s->mean_logs + ((int64_t)layer * s->batch + first) * s->num_q_heads;
    add.add_dtype = RF_DTYPE_F32;
    add.add_period = 1;
    RF_TRY(s->ops->elementwise(s->stream, &add, err));
    char *out = (char *)s->step.attn + (size_t)(first * s->stage->q_cols) * rf_kv_elem(s);
    float *lse = s->step.lse + (int64_t)first * s->num_q_heads;
    rf_attention_merge_args join = {.out_a = out,
                                    .out_b = a.out,
                                    .lse_a = lse,
                                    .lse_b = a.lse,
                                    .out = out,
                                    .lse = lse,
                                    .out_a_dtype = s->model->dtype,
                                    .dtype = s->model->dtype,
                                    .rows = heads,
                                    .num_heads = 1,
                                    .head_dim = s->head_dim};
    return s->ops->attention_merge(s->stream, &join, err);
}
