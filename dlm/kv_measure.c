/* dlm/kv_measure.c - what a rule wants to know of a layer: columns of probabilities, losses, norms, keys and values on
 * the host; and the joins that a book asks for.
 *
 * Queries of a prompt are measured chunk by chunk right behind their attention, whose log-sums are then those over all
 * keys that they see. */
#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/rng.h"
#include "dlm/kv_internal.h"

enum { BY_QUERIES = RF_KV_NEED_SUM | RF_KV_NEED_SQUARES | RF_KV_NEED_PEAK | RF_KV_NEED_ENTROPY | RF_KV_NEED_REMOVAL };

static rf_kv_loss loss_of(rf_kv_value value) {
    switch (value) {
    case RF_KV_VALUE_OBC_VALUE: return RF_KV_LOSS_VALUE;
    case RF_KV_VALUE_OBC_KEY: return RF_KV_LOSS_KEY;
    case RF_KV_VALUE_OBC_JOINT: return RF_KV_LOSS_JOINT;
    default: return RF_KV_LOSS_REMOVAL;
    }
}

/* --- queries of a prompt ------------------------------------------------------------------------------------------------ */

/* Rules that are no attention scores may still want a window's columns (trees, recurrences, CAKE's preference). */
static rf_kv_queries queries_of(const rf_kv_session *s) {
    if (s->rule.score == RF_KV_SCORE_ATTENTION) return s->rule.queries;
    return s->rule.window > 0 ? RF_KV_QUERIES_WINDOW : RF_KV_QUERIES_ALL;
}

static int32_t first_query(const rf_kv_session *s, int32_t num) {
    int32_t window = 0;
    switch (queries_of(s)) {
    case RF_KV_QUERIES_WINDOW: window = s->rule.window; break;
    case RF_KV_QUERIES_LAST: window = 1; break;
    case RF_KV_QUERIES_DRAFTED: window = s->rule.with_window ? s->rule.drafts : 0; break;
    default: return 0; /* all */
    }
    return window < num ? num - window : 0;
}

static int32_t num_recent_probes(const rf_kv_session *s, int32_t num) {
    return (int32_t)ceil(s->rule.probe_recent * (double)num);
}

static bool is_probe(const rf_kv_session *s, int32_t num, int32_t position) {
    if (position >= num - num_recent_probes(s, num)) return true;
    uint32_t counter[4] = {(uint32_t)position, 0, 0, 0},
             key[2] = {(uint32_t)s->rule.seed, (uint32_t)(s->rule.seed >> 32)};
    uint32_t words[4];
    rf_philox4x32(counter, key, words);
    return ((double)words[0] + 0.5) * 0x1p-32 < s->rule.probe_random;
}

static bool is_weighted(const rf_kv_session *s) {
    return s->rule.score == RF_KV_SCORE_ATTENTION &&
           ((s->rule.reduce == RF_KV_REDUCE_DECAY && s->rule.queries != RF_KV_QUERIES_DRAFTED) ||
            s->rule.queries == RF_KV_QUERIES_PROBES);
}

static int32_t count_queries(const rf_kv_session *s, int32_t num) {
    if (s->extra_rows > 0) return s->extra_rows;
    int32_t drafted = queries_of(s) == RF_KV_QUERIES_DRAFTED ? s->num_drafted : 0;
    if (queries_of(s) != RF_KV_QUERIES_PROBES) return drafted + num - first_query(s, num);
    int32_t count = 0;
    for (int32_t i = 0; i < num; i++) count += is_probe(s, num, i);
    return count;
}

rf_status rf_kv_measure_begin(rf_kv_session *s, const rf_kv_sequence *q, rf_error *err) {
    int32_t num = q->compressed;
    bool decides = q->budget > 0 && (s->rule.schedule != RF_KV_AT_PREFILL || num > q->budget);
    s->needs = decides || s->packed ? s->prefill_needs : 0;
    if (s->needs == 0 || !is_weighted(s)) return RF_OK;
    bool probes = s->rule.queries == RF_KV_QUERIES_PROBES, decays = s->rule.reduce == RF_KV_REDUCE_DECAY;
    int32_t end = num + s->extra_rows;
    for (int32_t i = 0; i < end; i++)
        s->host_weights[i] = probes && !is_probe(s, num, i) ? 0.0f
                             : decays                       ? (float)pow(s->rule.alpha, (double)(end - 1 - i))
                                                            : 1.0f;
    return rf_stream_upload(s->stream, s->weights, s->host_weights, (size_t)end * sizeof(float), err);
}

rf_status rf_kv_measure_layer_begin(rf_kv_session *s, rf_error *err) {
    if (s->needs & RF_KV_NEED_EXPECTED) {
        size_t d = (size_t)s->head_dim;
        memset(s->moments, 0, (size_t)s->num_q_heads * (d + d * d) * sizeof *s->moments);
        s->moment_rows = 0;
    }
    if (s->needs == 0 || s->measure_floats == 0) return RF_OK;
    return rf_stream_zero(s->stream, s->measure_block, s->measure_floats * sizeof(float), err);
}

bool rf_kv_measures_rows(const rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, bool pseudo) {
    if (!(s->needs & BY_QUERIES) || pseudo != (s->extra_rows > 0)) return false;
    return pseudo || begin + rows > first_query(s, num);
}

static rf_kv_columns_args columns_args(const rf_kv_session *s, unsigned needs) {
    rf_kv_columns_args a = {.num_queries = 1,
                            .num_q_heads = s->num_q_heads,
                            .num_kv_heads = s->num_kv_heads,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype,
                            .q_row_stride = s->stage ? s->stage->q_cols : 0,
                            .scale = (float)(1.0 / sqrt((double)s->head_dim)),
                            .out_stride = s->stats_stride,
                            .workspace = s->workspace,
                            .workspace_bytes = s->workspace_bytes};
    a.s1 = needs & RF_KV_NEED_SUM ? s->measured.s1 : NULL;
    a.s2 = needs & RF_KV_NEED_SQUARES ? s->measured.s2 : NULL;
    a.peak = needs & RF_KV_NEED_PEAK ? s->measured.peak : NULL;
    a.entropy = needs & RF_KV_NEED_ENTROPY ? s->measured.entropy : NULL;
    return a;
}

static rf_kv_loss_args loss_args(const rf_kv_session *s, const rf_kv_columns_args *c) {
    return (rf_kv_loss_args){.source = c->source,
                             .q = c->q,
                             .q_row_stride = c->q_row_stride,
                             .o_row_stride = c->q_row_stride,
                             .lse = c->lse,
                             .lse_stride = c->lse_stride,
                             .weights = c->weights,
                             .num_queries = c->num_queries,
                             .num_q_heads = c->num_q_heads,
                             .num_kv_heads = c->num_kv_heads,
                             .head_dim = c->head_dim,
                             .dtype = c->dtype,
                             .scale = c->scale,
                             .causal = c->causal,
                             .first_position = c->first_position,
                             .loss = loss_of(s->rule.value),
                             .out = s->measured.removal,
                             .out_stride = c->out_stride,
                             .accumulate = c->accumulate,
                             .workspace = c->workspace,
                             .workspace_bytes = c->workspace_bytes};
}

size_t rf_kv_measure_workspace(const rf_kv_session *s) {
    unsigned needs = s->prefill_needs | s->step_needs | s->draft_needs;
    size_t most = 0;
    for (int step = 0; step < 2; step++) {
        rf_kv_columns_args c = columns_args(s, 0);
        c.num_queries = step ? 1 : s->stage->options.max_rows;
        c.source.num_keys = step ? s->stride : s->options.max_prompt;
        c.source.row_stride = step ? s->head_dim : s->stage->kv_cols;
        c.source.head_stride = s->head_dim;
        c.source.rows_stride = s->stride;
        c.causal = !step;
        c.accumulate = !step;
        for (int64_t keys = 1;; keys *= 2) { /* the most of any number of keys */
            rf_kv_columns_args some = c;
            if (keys < some.source.num_keys) some.source.num_keys = keys;
            if (needs & BY_QUERIES) {
                size_t bytes = s->ops->kv_columns_workspace(s->backend, &some);
                most = bytes > most ? bytes : most;
            }
            if (needs & RF_KV_NEED_REMOVAL) {
                rf_kv_loss_args l = loss_args(s, &some);
                size_t bytes = s->ops->kv_loss_workspace(s->backend, &l);
                most = bytes > most ? bytes : most;
            }
            if (keys >= c.source.num_keys) break;
        }
    }
    if (s->on_device) {
        rf_kv_evict_args e = {.rows_stride = s->stride,
                              .sequences = s->batch,
                              .num_q_heads = s->num_q_heads,
                              .num_kv_heads = s->num_kv_heads,
                              .head_dim = s->head_dim,
                              .dtype = s->model->dtype,
                              .scale = 1.0f,
                              .decay = 1.0f,
                              .mode = s->evict_mode,
                              .over_heads = s->rule.heads == RF_KV_HEADS_MEAN,
                              .max_len = s->stride};
        size_t bytes = s->ops->kv_evict_workspace(s->backend, &e);
        most = bytes > most ? bytes : most;
    }
    return most;
}

rf_status rf_kv_measure_rows(rf_kv_session *s, int layer, int32_t num, int32_t begin, int32_t rows, int64_t run_rows,
                             bool pseudo, rf_error *err) {
    const rf_text_session *stage = s->stage;
    int32_t first = pseudo ? num : first_query(s, num), skipped = first > begin ? first - begin : 0;
    size_t offset = (size_t)skipped * (size_t)stage->q_cols * rf_kv_elem(s);
    rf_kv_columns_args c = columns_args(s, s->needs);
    c.source = (rf_kv_source){.k = rf_text_keys(stage, layer),
                              .v = rf_text_values(stage, layer),
                              .row_stride = stage->kv_cols,
                              .head_stride = s->head_dim,
                              .num_keys = begin + rows < num ? begin + rows : num};
    c.q = (const char *)stage->b.q + offset;
    c.lse = s->lse + skipped;
    c.lse_stride = run_rows;
    c.weights = is_weighted(s) ? s->weights + begin + skipped : NULL;
    c.num_queries = rows - skipped;
    c.causal = true;
    c.first_position = begin + skipped;
    c.entropy_keys = first < num ? first : num;
    c.accumulate = true;
    if (c.s1 || c.s2 || c.peak || c.entropy) RF_TRY(s->ops->kv_columns(s->stream, &c, err));
    if (!(s->needs & RF_KV_NEED_REMOVAL)) return RF_OK;
    rf_kv_loss_args l = loss_args(s, &c);
    l.o = (const char *)stage->b.attn + offset;
    return s->ops->kv_loss(s->stream, &l, err);
}

rf_status rf_kv_measure_drafts(rf_kv_session *s, int layer, int32_t num, rf_error *err) {
    const rf_text_session *stage = s->stage;
    if (!(s->needs & BY_QUERIES) || queries_of(s) != RF_KV_QUERIES_DRAFTED || s->num_drafted == 0) return RF_OK;
    const char *q = s->draft_q + (size_t)(layer * s->rule.drafts * stage->q_cols) * rf_kv_elem(s);
    rf_attention_args a = {.q = q,
                           .k = rf_text_keys(stage, layer),
                           .v = rf_text_values(stage, layer),
                           .out = stage->b.attn,
                           .lse = s->lse,
                           .dtype = s->model->dtype,
                           .batch = 1,
                           .num_q_heads = s->num_q_heads,
                           .num_kv_heads = s->num_kv_heads,
                           .head_dim = s->head_dim,
                           .q_len = s->num_drafted,
                           .kv_len = num,
                           .q_row_stride = stage->q_cols,
                           .q_head_stride = s->head_dim,
                           .kv_row_stride = stage->kv_cols,
                           .kv_head_stride = s->head_dim,
                           .out_row_stride = stage->q_cols,
                           .out_head_stride = s->head_dim,
                           .softmax_scale = (float)(1.0 / sqrt((double)s->head_dim)),
                           .workspace = stage->b.attn_workspace,
                           .workspace_bytes = stage->b.attn_workspace_bytes};
    RF_TRY(s->ops->attention(s->stream, &a, err));
    rf_kv_columns_args c = columns_args(s, s->needs);
    c.source =
        (rf_kv_source){.k = a.k, .v = a.v, .row_stride = stage->kv_cols, .head_stride = s->head_dim, .num_keys = num};
    c.q = q;
    c.lse = s->lse;
    c.lse_stride = s->num_drafted;
    c.num_queries = s->num_drafted;
    c.entropy_keys = num;
    c.accumulate = true;
    if (c.s1 || c.s2 || c.peak || c.entropy) RF_TRY(s->ops->kv_columns(s->stream, &c, err));
    if (!(s->needs & RF_KV_NEED_REMOVAL)) return RF_OK;
    rf_kv_loss_args l = loss_args(s, &c);
    l.o = stage->b.attn;
    return s->ops->kv_loss(s->stream, &l, err);
}

/* --- Expected Attention -------------------------------------------------------------------------------------------------- */

rf_status rf_kv_measure_queries(rf_kv_session *s, int32_t begin, int32_t rows, rf_error *err) {
    int64_t cols = s->stage->q_cols, d = s->head_dim;
    int32_t skipped = begin < s->rule.sinks ? s->rule.sinks - begin : 0;
    if (skipped >= rows) return RF_OK;
    float *q = rf_alloc((size_t)(rows * cols) * sizeof *q);
    if (q == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a prompt's queries");
    rf_status st = rf_kv_read_rows(s, s->q_raw, rows * cols, q, err);
    for (int h = 0; st == RF_OK && h < s->num_q_heads; h++) {
        double *mean = s->moments + h * (d + d * d), *square = mean + d;
        for (int32_t i = skipped; i < rows; i++) {
            const float *x = q + i * cols + h * d;
            for (int64_t a = 0; a < d; a++) {
                mean[a] += (double)x[a];
                for (int64_t b = 0; b <= a; b++) square[a * d + b] += (double)x[a] * (double)x[b];
            }
        }
    }
    if (st == RF_OK) s->moment_rows += rows - skipped;
    rf_free(q);
    return st;
}

/* Rows of x turned by the mean rotation: y_c = cos x_c - sin x_{c + D/2}, y_{c + D/2} = cos x_{c + D/2} + sin x_c. */
static void turn_mean(const float *rope, double *x, int64_t step, int64_t d) {
    for (int64_t c = 0; c < d / 2; c++) {
        double cosine = (double)rope[2 * c], sine = (double)rope[2 * c + 1];
        double a = x[c * step], b = x[(c + d / 2) * step];
        x[c * step] = cosine * a - sine * b;
        x[(c + d / 2) * step] = cosine * b + sine * a;
    }
}

/* logits mu.k / sqrt(D) + k S k / (2 D) of all keys, for queries as those of the prompt at the next `future` positions. */
static rf_status measure_expected(rf_kv_session *s, int32_t num, rf_error *err) {
    int64_t d = s->head_dim, future = s->rule.future > 0 ? s->rule.future : 1;
    float *table = rf_alloc((size_t)((num + future) * d) * sizeof *table);
    if (table == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for rotations");
    rf_text_rope_table(table, &s->model->desc, num + future);
    for (int64_t c = 0; c < d; c++) {
        double sum = 0;
        for (int64_t p = num; p < num + future; p++) sum += (double)table[p * d + c];
        s->rope_mean[c] = (float)(sum / (double)future);
    }
    rf_free(table);
    double rows = s->moment_rows > 0 ? s->moment_rows : 1;
    for (int h = 0; h < s->num_q_heads; h++) {
        double *mean = s->moments + h * (d + d * d), *cov = mean + d;
        for (int64_t a = 0; a < d; a++) mean[a] /= rows;
        for (int64_t a = 0; a < d; a++)
            for (int64_t b = 0; b <= a; b++)
                cov[b * d + a] = cov[a * d + b] = cov[a * d + b] / rows - mean[a] * mean[b];
        turn_mean(s->rope_mean, mean, 1, d);
        for (int64_t b = 0; b < d; b++) turn_mean(s->rope_mean, cov + b, d, d);
        for (int64_t a = 0; a < d; a++) turn_mean(s->rope_mean, cov + a * d, 1, d);
        const float *keys = s->host_k + h / s->group * s->stats_stride * d;
        float *out = s->host_measured.expected + h * s->stats_stride;
        for (int32_t j = 0; j < num; j++) {
            const float *k = keys + j * d;
            double linear = 0, quadratic = 0;
            for (int64_t a = 0; a < d; a++) {
                double sum = 0;
                for (int64_t b = 0; b < d; b++) sum += cov[a * d + b] * (double)k[b];
                linear += mean[a] * (double)k[a];
                quadratic += sum * (double)k[a];
            }
            out[j] = (float)(linear / sqrt((double)d) + quadratic / (2.0 * (double)d));
        }
    }
    return RF_OK;
}

/* --- the rest of a layer -------------------------------------------------------------------------------------------------- */

/* [num][kv_cols] of the planes to [Hkv][stats_stride][D] on the host. */
static rf_status fetch_keys(rf_kv_session *s, const void *plane, int32_t num, float *out, rf_error *err) {
    int64_t cols = s->stage->kv_cols, d = s->head_dim;
    float *rows = rf_alloc((size_t)(num * cols) * sizeof *rows);
    if (rows == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a layer's keys");
    rf_status st = rf_kv_read_rows(s, plane, num * cols, rows, err);
    for (int h = 0; st == RF_OK && h < s->num_kv_heads; h++)
        for (int32_t j = 0; j < num; j++)
            memcpy(out + (h * s->stats_stride + j) * d, rows + j * cols + h * d, (size_t)d * sizeof *out);
    rf_free(rows);
    return st;
}

/* |W_O^h v_j|_1 of every query head: a GEMM over slices of the out projection, rows at a time. */
static rf_status measure_out_norms(rf_kv_session *s, int layer, int32_t num, rf_error *err) {
    rf_text_session *stage = s->stage;
    int64_t hidden = s->model->desc.hidden, d = s->head_dim, size = stage->options.max_rows;
    float *rows = rf_alloc((size_t)(size * hidden) * sizeof *rows);
    if (rows == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a layer's values");
    rf_text_run run = rf_kv_run(s);
    rf_status st = RF_OK;
    for (int h = 0; st == RF_OK && h < s->num_q_heads; h++) {
        for (int32_t begin = 0; st == RF_OK && begin < num; begin += (int32_t)size) {
            int64_t count = num - begin < size ? num - begin : size;
            rf_gemm_args g = rf_gemm_args_default(s->model->dtype, count, hidden, d);
            g.x = rf_text_values(stage, layer) + (size_t)(begin * stage->kv_cols + h / s->group * d) * rf_kv_elem(s);
            g.ldx = stage->kv_cols;
            g.w = (const char *)s->model->layers[layer].out + (size_t)(h * d) * rf_kv_elem(s);
            g.ldw = stage->q_cols;
            g.y = stage->b.y;
            st = s->ops->gemm(run.stream, &g, err);
            if (st == RF_OK) st = rf_kv_read_rows(s, stage->b.y, count * hidden, rows, err);
            for (int64_t j = 0; st == RF_OK && j < count; j++) {
                double sum = 0;
                for (int64_t c = 0; c < hidden; c++) sum += fabs((double)rows[j * hidden + c]);
                s->host_measured.wo_norm[h * s->stats_stride + begin + j] = (float)sum;
            }
        }
    }
    rf_free(rows);
    return st;
}

static rf_status measure_norms(rf_kv_session *s, unsigned needs, const rf_kv_source *source, rf_error *err) {
    if (!(needs & (RF_KV_NEED_KEY_NORM | RF_KV_NEED_VALUE_NORM | RF_KV_NEED_KEY_COSINE))) return RF_OK;
    rf_kv_norms_args n = {.source = *source,
                          .num_kv_heads = s->num_kv_heads,
                          .head_dim = s->head_dim,
                          .dtype = s->model->dtype,
                          .key_norm = needs & RF_KV_NEED_KEY_NORM ? s->measured.key_norm : NULL,
                          .value_norm = needs & RF_KV_NEED_VALUE_NORM ? s->measured.value_norm : NULL,
                          .key_cosine = needs & RF_KV_NEED_KEY_COSINE ? s->measured.key_cosine : NULL,
                          .anchor = s->anchor,
                          .out_stride = s->stats_stride};
    return s->ops->kv_norms(s->stream, &n, err);
}

/* num entries of each row, where the host does not see them anyway. */
static rf_status fetch_rows(rf_kv_session *s, const float *device, float *host, int rows, int64_t num, rf_error *err) {
    if (device == NULL || device == host) return RF_OK;
    if (2 * num > s->stats_stride) /* one copy, gaps and all */
        return rf_stream_download(s->stream, host, device, (size_t)((rows - 1) * s->stats_stride + num) * sizeof *host,
                                  err);
    for (int h = 0; h < rows; h++)
        RF_TRY(rf_stream_download(s->stream, host + h * s->stats_stride, device + h * s->stats_stride,
                                  (size_t)num * sizeof *host, err));
    return RF_OK;
}

/* What operators made, on its way to the host, and the record of it. */
static rf_status fetch_measures(rf_kv_session *s, unsigned needs, int64_t num, int32_t num_queries,
                                const rf_kv_measures *h, rf_kv_stats *stats, rf_error *err) {
    const rf_kv_measures *d = &s->measured;
    int hq = s->num_q_heads, hkv = s->num_kv_heads;
    *stats = (rf_kv_stats){.num_keys = (int32_t)num,
                           .stride = s->stats_stride,
                           .num_queries = num_queries,
                           .head_dim = s->head_dim,
                           .num_threads = rf_backend_num_threads(s->backend)};
    struct {
        unsigned need;
        const float *device;
        float *host;
        int rows;
        const float **out;
    } list[] = {
        {RF_KV_NEED_SUM, d->s1, h->s1, hq, &stats->s1},
        {RF_KV_NEED_SQUARES, d->s2, h->s2, hq, &stats->s2},
        {RF_KV_NEED_PEAK, d->peak, h->peak, hq, &stats->peak},
        {RF_KV_NEED_REMOVAL, d->removal, h->removal, hq, &stats->removal},
        {RF_KV_NEED_KEY_NORM, d->key_norm, h->key_norm, hkv, &stats->key_norm},
        {RF_KV_NEED_VALUE_NORM, d->value_norm, h->value_norm, hkv, &stats->value_norm},
        {RF_KV_NEED_KEY_COSINE, d->key_cosine, h->key_cosine, hkv, &stats->key_cosine},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (!(needs & list[i].need)) continue;
        RF_TRY(fetch_rows(s, list[i].device, list[i].host, list[i].rows, num, err));
        *list[i].out = list[i].host;
    }
    if (needs & RF_KV_NEED_ENTROPY) {
        if (d->entropy != h->entropy)
            RF_TRY(rf_stream_download(s->stream, h->entropy, d->entropy, (size_t)hq * sizeof(float), err));
        stats->entropy = h->entropy;
    }
    return RF_OK;
}

bool rf_kv_can_overlap(const rf_kv_rule *r) {
    /* only what operators measure, of queries that the layers themselves compute; slots go or stay as they are */
    unsigned reads = BY_QUERIES | RF_KV_NEED_KEY_NORM | RF_KV_NEED_VALUE_NORM | RF_KV_NEED_KEY_COSINE;
    bool extra = r->score == RF_KV_SCORE_ATTENTION &&
                 (r->queries == RF_KV_QUERIES_PSEUDO || r->queries == RF_KV_QUERIES_DRAFTED);
    bool whole =
        rf_kv_rule_thins(r) || r->block > 0 || r->sentence_penalty > 0; /* choose rows too, or want all layers */
    return r->action == RF_KV_DROP && !extra && !whole && !(rf_kv_needs_prefill(r) & ~reads);
}

rf_status rf_kv_measure_ahead(rf_kv_session *s, int layer, int32_t num, rf_kv_stats *stats, rf_error *err) {
    const rf_text_session *stage = s->stage;
    rf_kv_source source = {.k = rf_text_keys(stage, layer),
                           .v = rf_text_values(stage, layer),
                           .row_stride = stage->kv_cols,
                           .head_stride = s->head_dim,
                           .num_keys = num};
    RF_TRY(measure_norms(s, s->needs, &source, err));
    return fetch_measures(s, s->needs, num, count_queries(s, num), layer % 2 ? &s->host_odd : &s->host_measured, stats,
                          err);
}

rf_status rf_kv_measure_layer(rf_kv_session *s, int layer, int32_t num, rf_kv_stats *stats, rf_error *err) {
    const rf_text_session *stage = s->stage;
    unsigned needs = s->needs;
    rf_kv_source source = {.k = rf_text_keys(stage, layer),
                           .v = rf_text_values(stage, layer),
                           .row_stride = stage->kv_cols,
                           .head_stride = s->head_dim,
                           .num_keys = num};
    RF_TRY(rf_kv_measure_drafts(s, layer, num, err));
    RF_TRY(measure_norms(s, needs, &source, err));
    RF_TRY(fetch_measures(s, needs, num, count_queries(s, num), &s->host_measured, stats, err));
    RF_TRY(rf_kv_wait(s, err));
    if (needs & (RF_KV_NEED_KV | RF_KV_NEED_EXPECTED)) {
        RF_TRY(fetch_keys(s, source.k, num, s->host_k, err));
        if (needs & RF_KV_NEED_KV) RF_TRY(fetch_keys(s, source.v, num, s->host_v, err));
    }
    if (needs & RF_KV_NEED_KV) {
        stats->k = s->host_k;
        stats->v = s->host_v;
    }
    if (needs & RF_KV_NEED_EXPECTED) {
        RF_TRY(measure_expected(s, num, err));
        stats->expected = s->host_measured.expected;
    }
    if (needs & RF_KV_NEED_GATE) stats->gate = s->gate_values;
    if (needs & RF_KV_NEED_WO) {
        RF_TRY(measure_out_norms(s, layer, num, err));
        stats->wo_norm = s->host_measured.wo_norm;
    }
    return RF_OK;
}

/* --- a step --------------------------------------------------------------------------------------------------------------- */

/* Slots in order, keys turned as attention saw them. */
static rf_status fetch_slots(rf_kv_session *s, int layer, int sequence, int32_t most, rf_error *err) {
    int64_t d = s->head_dim, unit = rf_kv_unit_at(s, layer, sequence), first = (int64_t)sequence * s->num_kv_heads;
    char *k = s->k_read + (size_t)(first * s->stride * d) * rf_kv_elem(s),
         *v = s->v_read + (size_t)(first * s->stride * d) * rf_kv_elem(s);
    if (!rf_kv_in_cache_order(s)) {
        rf_kv_copy_args c = {.source = {.k = s->k_pool,
                                        .v = s->v_pool,
                                        .row_stride = d,
                                        .rows = s->rows + unit * s->stride,
                                        .lens = s->lens + unit,
                                        .rows_stride = s->stride,
                                        .num_keys = most},
                             .k_out = k,
                             .v_out = v,
                             .out_row_stride = d,
                             .out_head_stride = s->stride * d,
                             .counts = s->lens + unit,
                             .list_stride = s->stride,
                             .num = most,
                             .num_kv_heads = s->num_kv_heads,
                             .head_dim = s->head_dim,
                             .dtype = s->model->dtype};
        RF_TRY(s->ops->kv_copy(s->stream, &c, err));
    }
    for (int h = 0; h < s->num_kv_heads; h++) {
        size_t at = (size_t)(h * s->stride * d) * rf_kv_elem(s);
        RF_TRY(rf_kv_read_rows(s, k + at, most * d, s->host_k + h * s->stats_stride * d, err));
        RF_TRY(rf_kv_read_rows(s, v + at, most * d, s->host_v + h * s->stats_stride * d, err));
    }
    return RF_OK;
}

rf_status rf_kv_measure_step(rf_kv_session *s, int layer, int sequence, rf_kv_stats *stats, rf_error *err) {
    const rf_kv_sequence *q = &s->sequences[sequence];
    unsigned needs = s->step_needs & rf_kv_book_step_needs(q->book, layer);
    int32_t most = rf_kv_book_most(q->book, layer);
    int64_t unit = rf_kv_unit_at(s, layer, sequence), first = (int64_t)sequence * s->num_kv_heads;
    bool ordered = rf_kv_in_cache_order(s);
    rf_kv_columns_args c = columns_args(s, needs);
    c.source = (rf_kv_source){.k = ordered ? s->k_read : s->k_pool,
                              .v = ordered ? s->v_read : s->v_pool,
                              .row_stride = s->head_dim,
                              .rows = ordered ? s->iota_rows + first * s->stride : s->rows + unit * s->stride,
                              .lens = s->lens + unit,
                              .rows_stride = s->stride,
                              .num_keys = most};
    size_t row = (size_t)sequence * (size_t)s->stage->q_cols * rf_kv_elem(s);
    c.q = (const char *)s->step.q + row;
    c.lse = s->step.lse + (int64_t)sequence * s->num_q_heads;
    c.lse_stride = 1;
    c.entropy_keys = most;
    if (c.s1 || c.s2 || c.peak || c.entropy) RF_TRY(s->ops->kv_columns(s->stream, &c, err));
    if (needs & RF_KV_NEED_REMOVAL) {
        rf_kv_loss_args l = loss_args(s, &c);
        l.o = (const char *)s->step.attn + row;
        RF_TRY(s->ops->kv_loss(s->stream, &l, err));
    }
    RF_TRY(measure_norms(s, needs, &c.source, err));
    RF_TRY(fetch_measures(s, needs, most, 1, &s->host_measured, stats, err));
    RF_TRY(rf_kv_wait(s, err));
    for (int h = 0; h < s->num_kv_heads && (needs & RF_KV_NEED_GATE); h++) {
        int32_t newest = rf_kv_book_head(q->book, layer, h)->num - 1;
        s->gate_values[h * s->stats_stride + newest] = s->step_gates[first + h];
        stats->gate = s->gate_values;
    }
    if (!(needs & RF_KV_NEED_KV)) return RF_OK;
    RF_TRY(fetch_slots(s, layer, sequence, most, err));
    stats->k = s->host_k;
    stats->v = s->host_v;
    return RF_OK;
}

/* --- gates ---------------------------------------------------------------------------------------------------------------- */

/* gate_rows: rows, their gates, the gate's work. */
static rf_status apply_gate(rf_kv_session *s, int layer, const void *h, int64_t num, float **out, rf_error *err) {
    int64_t hidden = s->model->desc.hidden, most = s->stage->options.max_rows;
    if (s->batch > most) most = s->batch;
    *out = s->gate_rows + most * hidden;
    RF_TRY(rf_kv_read_rows(s, h, num * hidden, s->gate_rows, err));
    rf_kv_gate_apply(&s->tables.gates[layer], s->gate_rows, num, *out, *out + most * s->num_kv_heads);
    return RF_OK;
}

rf_status rf_kv_gate_prompt(rf_kv_session *s, int layer, const void *h, int32_t begin, int32_t rows, rf_error *err) {
    float *gates;
    RF_TRY(rf_kv_wait(s, err));
    double began = rf_kv_now_ms();
    RF_TRY(apply_gate(s, layer, h, rows, &gates, err));
    for (int k = 0; k < s->num_kv_heads; k++)
        for (int32_t i = 0; i < rows; i++)
            s->gate_values[k * s->stats_stride + begin + i] = gates[(int64_t)i * s->num_kv_heads + k];
    s->info.score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

rf_status rf_kv_gate_step(rf_kv_session *s, int layer, const void *h, int first, int num, rf_error *err) {
    float *gates;
    double began = rf_kv_now_ms();
    RF_TRY(apply_gate(s, layer, h, num, &gates, err));
    memcpy(s->step_gates + (int64_t)first * s->num_kv_heads, gates,
           (size_t)num * (size_t)s->num_kv_heads * sizeof *gates);
    s->info.step_score_ms += rf_kv_now_ms() - began;
    return RF_OK;
}

/* --- joins ---------------------------------------------------------------------------------------------------------------- */

/* to += weight * from for every join, then / (1 + sum of weights); x [rows][stride] + offset, sums [rows] zero, and zero again. */
static void join_rows(float *x, int64_t stride, int64_t d, const rf_kv_join *join, int32_t num, bool keys,
                      double *sums) {
    for (int32_t i = 0; i < num; i++) {
        if (keys && !join[i].keys) continue;
        float *to = x + join[i].to * stride;
        const float *from = x + join[i].from * stride;
        for (int64_t c = 0; c < d; c++) to[c] += join[i].weight * from[c];
        sums[join[i].to] += (double)join[i].weight;
    }
    for (int32_t i = 0; i < num; i++) {
        if ((keys && !join[i].keys) || sums[join[i].to] == 0) continue;
        float *to = x + join[i].to * stride, scale = (float)(1.0 / (1.0 + sums[join[i].to]));
        for (int64_t c = 0; c < d; c++) to[c] *= scale;
        sums[join[i].to] = 0;
    }
}

static bool any_keys(const rf_kv_join *join, int32_t num) {
    for (int32_t i = 0; i < num; i++)
        if (join[i].keys) return true;
    return false;
}

rf_status rf_kv_join_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    const rf_kv_book *book = s->sequences[sequence].book;
    int32_t count, total = 0;
    bool keys = false;
    for (int h = 0; h < s->num_kv_heads; h++) {
        const rf_kv_join *join = rf_kv_book_joins(book, layer, h, &count);
        total += count;
        keys = keys || any_keys(join, count);
    }
    if (total == 0) return RF_OK;
    int64_t cols = s->stage->kv_cols, d = s->head_dim;
    char *planes[2] = {rf_text_values(s->stage, layer),
                       rf_kv_in_cache_order(s) ? rf_kv_unturned(s, layer) : rf_text_keys(s->stage, layer)};
    float *x = rf_alloc((size_t)(num * cols) * sizeof *x);
    double *sums = rf_alloc_zero((size_t)num, sizeof *sums);
    rf_status st = x && sums ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory to join rows");
    for (int p = 0; st == RF_OK && p < (keys ? 2 : 1); p++) {
        st = rf_kv_read_rows(s, planes[p], num * cols, x, err);
        for (int h = 0; st == RF_OK && h < s->num_kv_heads; h++) {
            const rf_kv_join *join = rf_kv_book_joins(book, layer, h, &count);
            join_rows(x + h * d, cols, d, join, count, p == 1, sums);
        }
        if (st == RF_OK) st = rf_kv_write_rows(s, planes[p], num * cols, x, err);
    }
    rf_free(x);
    rf_free(sums);
    return st;
}

/* Few: one row at a time. Rows of dropped slots are still there. */
rf_status rf_kv_join_pool(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    int64_t d = s->head_dim;
    float *rows = NULL;
    rf_status st = RF_OK;
    for (int h = 0; st == RF_OK && h < s->num_kv_heads; h++) {
        int32_t count;
        const rf_kv_join *join = rf_kv_book_joins(s->sequences[sequence].book, layer, h, &count);
        if (count == 0) continue;
        if (rows == NULL) rows = rf_alloc(2 * (size_t)d * sizeof *rows);
        if (rows == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory to join rows");
        for (int p = 0; p < 2; p++) {
            char *pool = p ? s->k_pool : s->v_pool;
            for (int32_t i = 0; st == RF_OK && i < count; i++) {
                /* every `to` once, at its first join */
                bool seen = p == 1 && !join[i].keys;
                for (int32_t j = 0; j < i && !seen; j++) seen = join[j].to == join[i].to && (p == 0 || join[j].keys);
                if (seen) continue;
                char *to = pool + (size_t)(join[i].to * d) * rf_kv_elem(s);
                double sum = 0;
                st = rf_kv_read_rows(s, to, d, rows, err);
                for (int32_t j = i; st == RF_OK && j < count; j++) {
                    if (join[j].to != join[i].to || (p == 1 && !join[j].keys)) continue;
                    st = rf_kv_read_rows(s, pool + (size_t)(join[j].from * d) * rf_kv_elem(s), d, rows + d, err);
                    for (int64_t c = 0; c < d; c++) rows[c] += join[j].weight * rows[d + c];
                    sum += (double)join[j].weight;
                }
                for (int64_t c = 0; c < d; c++) rows[c] *= (float)(1.0 / (1.0 + sum));
                if (st == RF_OK) st = rf_kv_write_rows(s, to, d, rows, err);
            }
        }
    }
    rf_free(rows);
    return st;
}
