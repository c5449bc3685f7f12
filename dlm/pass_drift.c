/* dlm/pass_drift.c - passes whose attention is watched (Elastic-Cache, arXiv 2510.14973): if the attention of a layer's
 * tracked row has drifted, the layers behind it compute every visible row.
 *
 * Kept of every row and layer: its input, its query (and key and value, which the cache holds anyway). In layer l, for
 * the row T that the pass before tracked there:  old = softmax(q_T K^T) from what is kept, new = the same once this
 * pass' rows are in; similarity = mean over heads of cos(old, new) over keys, or mean over keys of the cosine over
 * heads.
 *
 * On the host a layer is judged before the next one is queued. A device runs all layers with few rows, reads every
 * layer's similarity back at once, and if layer l* drifted runs the layers behind it again with all rows. That is the
 * same pass: what the few rows left in those layers' planes is overwritten, and their inputs are those of layer l* + 1
 * either way. Counted are the rows of the pass so described, not those that were run for nothing. */
#include <math.h>
#include <string.h>

#include "dlm/forward_internal.h"

static int32_t num_visible(const rf_text_pass *pass) {
    return pass->visible ? pass->num_visible : pass->visible_end[0];
}

static bool is_every_visible_row(const rf_text_pass *pass, const int32_t *rows, int32_t num) {
    if (num != num_visible(pass)) return false;
    if (pass->visible) return memcmp(rows, pass->visible, (size_t)num * sizeof *rows) == 0;
    for (int32_t i = 0; i < num; i++)
        if (rows[i] != i) return false;
    return true;
}

/* place[i]: index of rows[i] in all; both ascend. False if one is missing. */
static bool find_places(const int32_t *rows, int32_t num, const int32_t *all, int32_t num_all, int32_t *place) {
    int32_t j = 0;
    for (int32_t i = 0; i < num; i++) {
        while (j < num_all && all[j] < rows[i]) j++;
        if (j == num_all || all[j] != rows[i]) return false;
        place[i] = j;
    }
    return true;
}

rf_status rf_text_drift_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    int num_layers = s->model->desc.num_layers;
    if (!s->options.keep_inputs)
        return rf_fail(err, RF_ERR_STATE, "a drift pass in a session that keeps no layer inputs");
    if (pass->drift.threshold != pass->drift.threshold || pass->drift.force_from < -1 ||
        pass->drift.force_from >= num_layers)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "drift threshold %g with all rows from layer %d, expected a number and -1..%d",
                       pass->drift.threshold, pass->drift.force_from, num_layers - 1);
    if (pass->drift.num_window < 0 || pass->drift.num_window > pass->num_rows ||
        (pass->drift.num_window > 0 && (pass->drift.window == NULL || pass->drift.decoded == NULL)))
        return rf_fail(err, RF_ERR_ARGUMENT, "a drift window of %d of %d rows, or without its lists",
                       pass->drift.num_window, pass->num_rows);
    for (int32_t i = 0; i < pass->drift.num_window; i++)
        if (pass->drift.window[i] < 0 || pass->drift.window[i] >= pass->num_rows)
            return rf_fail(err, RF_ERR_ARGUMENT, "window row %d is row %d of a pass of %d", i, pass->drift.window[i],
                           pass->num_rows);
    if (is_every_visible_row(pass, pass->rows, pass->num_rows)) return RF_OK;

    if (pass->drift.tracked == NULL || pass->drift.all_rows == NULL || pass->drift.all_tokens == NULL)
        return rf_fail(err, RF_ERR_ARGUMENT, "a drift pass of some rows needs tracked rows and the list of all rows");
    if (!is_every_visible_row(pass, pass->drift.all_rows, pass->drift.num_all) ||
        pass->drift.num_all > s->options.max_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "all_rows (%d) are not the %d visible rows, or more than the session's %d",
                       pass->drift.num_all, num_visible(pass), s->options.max_rows);
    for (int32_t i = 0; i < pass->drift.num_all; i++)
        if (pass->drift.all_tokens[i] < 0 || pass->drift.all_tokens[i] >= s->model->desc.vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "token %d at position %d, expected 0..%lld", pass->drift.all_tokens[i],
                           pass->drift.all_rows[i], (long long)s->model->desc.vocab - 1);
    if (!find_places(pass->rows, pass->num_rows, pass->drift.all_rows, pass->drift.num_all, s->place))
        return rf_fail(err, RF_ERR_ARGUMENT, "a row of a drift pass is not visible");
    for (int l = 0; l < num_layers; l++) {
        bool found = pass->drift.tracked[l] == -1;
        for (int32_t i = 0; i < pass->num_rows && !found; i++) found = pass->rows[i] == pass->drift.tracked[l];
        if (!found)
            return rf_fail(err, RF_ERR_ARGUMENT, "the tracked row of layer %d, %d, is not a row of the pass", l,
                           pass->drift.tracked[l]);
    }
    return RF_OK;
}

void rf_text_drift_fill(const rf_text_run *run, const rf_text_pass *pass, const rf_text_rows *rows, int32_t *host) {
    const rf_text_session *s = run->s;
    int32_t *tracked = host + run->at.tracked, *window = host + run->at.window;
    for (int l = 0; l < s->model->desc.num_layers; l++) {
        bool none = run->shape.full || pass->drift.tracked[l] < 0;
        tracked[l] = none ? s->options.capacity : pass->drift.tracked[l]; /* the dump row: measured, not looked at */
    }
    for (int32_t i = 0; i < run->shape.window; i++)
        window[i] = rows->place ? rows->place[pass->drift.window[i]] : pass->drift.window[i];
    uint8_t *allowed = (uint8_t *)(host + run->at.allowed);
    memset(allowed, 0, (size_t)run->shape.keys);
    for (int32_t j = 0; j < num_visible(pass) && pass->drift.decoded; j++)
        allowed[j] = pass->drift.decoded[pass->visible ? pass->visible[j] : j];
}

/* --- of a layer ------------------------------------------------------------------------------------------------------
 */

static rf_status keep_inputs(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    int64_t hidden = s->model->desc.hidden;
    return rf_text_copy_rows(run, false, s->b.x,
                             rf_text_plane(s, s->b.inputs, layer, hidden, s->options.residual_dtype),
                             rf_text_at(run, run->at.positions), s->options.residual_dtype, run->rows, hidden, err);
}

static rf_status tracked_probs(const rf_text_run *run, int layer, float *probs, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_desc *d = &s->model->desc;
    rf_attention_probs_args args = {.q = rf_text_plane(s, s->b.queries, layer, s->q_cols, s->model->dtype),
                                    .k = rf_text_keys(s, layer),
                                    .probs = probs,
                                    .dtype = s->model->dtype,
                                    .num_rows = 1,
                                    .num_keys = run->shape.keys,
                                    .q_row_stride = s->q_cols,
                                    .k_row_stride = s->kv_cols,
                                    .q_index = rf_text_at(run, run->at.tracked) + layer,
                                    .keys = run->shape.listed ? rf_text_at(run, run->at.visible) : NULL,
                                    .kv_len = rf_text_at(run, run->at.kv_lens),
                                    .num_q_heads = d->num_q_heads,
                                    .num_kv_heads = d->num_kv_heads,
                                    .head_dim = d->head_dim,
                                    .scale = (float)(1.0 / sqrt((double)d->head_dim))};
    return s->ops->attention_probs(run->stream, &args, err);
}

rf_status rf_text_drift_before(const rf_text_run *run, int layer, rf_error *err) {
    if (layer == 0 || layer != run->shape.first_layer)
        RF_TRY(keep_inputs(run, layer, err)); /* else it came from there */
    return run->shape.full ? RF_OK : tracked_probs(run, layer, run->s->b.probs_old, err);
}

/* sums[layer][0] = sum of the cosines (probabilities have none below 0); keys past the visible ones add 0. */
static rf_status compare_probs(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    int64_t heads = s->model->desc.num_q_heads, keys = run->shape.keys;
    bool over_heads = run->shape.over_heads;
    rf_cosine_rows_args cosine = {.a = s->b.probs_old,
                                  .b = s->b.probs_new,
                                  .cosine = s->b.cosine,
                                  .a_dtype = RF_DTYPE_F32,
                                  .b_dtype = RF_DTYPE_F32,
                                  .rows = over_heads ? keys : heads,
                                  .cols = over_heads ? heads : keys,
                                  .a_ld = over_heads ? 1 : keys,
                                  .b_ld = over_heads ? 1 : keys,
                                  .col_stride = over_heads ? keys : 1};
    RF_TRY(s->ops->cosine_rows(run->stream, &cosine, err));
    rf_reduce_pair_args sum = {.a = s->b.cosine,
                               .a_dtype = RF_DTYPE_F32,
                               .kind = RF_REDUCE_PLAIN,
                               .groups = 1,
                               .rows = 1,
                               .cols = over_heads ? keys : heads,
                               .out = s->b.sums + 4 * layer,
                               .workspace = s->b.reduce_workspace,
                               .workspace_bytes = s->b.reduce_workspace_bytes};
    return s->ops->reduce_pair(run->stream, &sum, err);
}

/* The decoded row that the window's rows attend to most. */
static rf_status track(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    const rf_text_desc *d = &s->model->desc;
    const int32_t *keys = run->shape.listed ? rf_text_at(run, run->at.visible) : NULL;
    rf_attention_mass_args mass = {.q = s->b.q,
                                   .k = rf_text_keys(s, layer),
                                   .lse = s->b.lse,
                                   .mass = s->b.mass,
                                   .dtype = s->model->dtype,
                                   .batch = 1,
                                   .rows = run->shape.rows,
                                   .num_queries = run->shape.window,
                                   .num_keys = run->shape.keys,
                                   .num_q_heads = d->num_q_heads,
                                   .num_kv_heads = d->num_kv_heads,
                                   .head_dim = d->head_dim,
                                   .k_batch_stride = s->cache_rows * s->kv_cols,
                                   .k_row_stride = s->kv_cols,
                                   .query_rows = rf_text_at(run, run->at.window),
                                   .keys = keys,
                                   .kv_lens = rf_text_at(run, run->at.kv_lens),
                                   .scale = (float)(1.0 / sqrt((double)d->head_dim))};
    RF_TRY(s->ops->attention_mass(run->stream, &mass, err));
    rf_argmax_args best = {.values = s->b.mass,
                           .allowed = (const uint8_t *)rf_text_at(run, run->at.allowed),
                           .out = s->b.tracked + layer,
                           .num = run->shape.keys,
                           .num_dev = rf_text_at(run, run->at.kv_lens)};
    return s->ops->argmax(run->stream, &best, err);
}

rf_status rf_text_drift_after(const rf_text_run *run, int layer, rf_error *err) {
    const rf_text_session *s = run->s;
    RF_TRY(rf_text_copy_rows(run, false, s->b.q, rf_text_plane(s, s->b.queries, layer, s->q_cols, s->model->dtype),
                             rf_text_at(run, run->at.positions), s->model->dtype, run->rows, s->q_cols, err));
    if (!run->shape.full) {
        RF_TRY(tracked_probs(run, layer, s->b.probs_new, err));
        RF_TRY(compare_probs(run, layer, err));
    }
    return run->shape.window > 0 ? track(run, layer, err) : RF_OK;
}

rf_status rf_text_drift_end(const rf_text_run *run, rf_error *err) {
    return keep_inputs(run, run->shape.end_layer, err);
}

/* --- the pass --------------------------------------------------------------------------------------------------------
 */

static rf_text_run make_run(rf_text_session *s, const rf_text_pass *pass, const rf_text_rows *rows, bool full,
                            int first, int end) {
    rf_text_run run = rf_text_make_run(s, pass, rows);
    run.shape.full = full;
    run.shape.window = pass->drift.num_window;
    run.shape.over_heads = !full && pass->drift.over_heads;
    run.shape.first_layer = first;
    run.shape.end_layer = end;
    run.at = rf_text_control_layout(s, &run.shape);
    return run;
}

/* The similarity of a layer, from sums that have arrived. */
static bool drifted(rf_text_session *s, const rf_text_pass *pass, int layer, const float *sums) {
    if (pass->drift.tracked[layer] < 0) return false;
    int32_t count = pass->drift.over_heads ? num_visible(pass) : s->model->desc.num_q_heads;
    s->drift[layer] = sums[4 * layer] / (float)count;
    return (double)s->drift[layer] < pass->drift.threshold;
}

static rf_status queue_tracked(rf_text_session *s, rf_error *err) {
    if (!s->has_window) return RF_OK;
    return rf_stream_download(s->stream, s->host_tracked, s->b.tracked,
                              (size_t)s->model->desc.num_layers * sizeof(int32_t), err);
}

/* *from: the layer from which all rows are to be computed: that behind the first one that drifted, the forced one, or
 * the number of layers. */
static rf_status run_few_at_once(rf_text_session *s, const rf_text_pass *pass, rf_text_run *run, int *from,
                                 rf_error *err) {
    RF_TRY(rf_text_queue_inputs(run, err));
    for (int l = 0; l < *from; l++) {
        RF_TRY(rf_text_queue_layer(run, l, err));
        if (drifted(s, pass, l, s->b.sums)) *from = l + 1;
    }
    run->shape.end_layer = *from;
    return *from < s->model->desc.num_layers ? rf_text_drift_end(run, err) : rf_text_queue_head(run, err);
}

static rf_status run_few_and_look(rf_text_session *s, const rf_text_pass *pass, rf_text_run *run, int *from,
                                  rf_error *err) {
    int num_layers = s->model->desc.num_layers, end = *from;
    RF_TRY(rf_text_launch(run, err));
    RF_TRY(rf_stream_download(s->stream, s->host_sums, s->b.sums, (size_t)num_layers * 4 * sizeof(float), err));
    RF_TRY(queue_tracked(s, err));
    if (end == num_layers) RF_TRY(rf_text_queue_results(s, pass, err));
    RF_TRY(rf_text_wait(s, err));
    for (int l = 0; l < end; l++) {
        if (!drifted(s, pass, l, s->host_sums)) continue;
        *from = l + 1;
        break;
    }
    return RF_OK;
}

rf_status rf_text_drift_forward(rf_text_session *s, const rf_text_pass *pass, rf_error *err) {
    int num_layers = s->model->desc.num_layers;
    bool full = is_every_visible_row(pass, pass->rows, pass->num_rows);
    int from = pass->drift.force_from < 0 ? num_layers : pass->drift.force_from;
    if (full) from = 0;
    for (int l = 0; l < num_layers; l++) s->drift[l] = NAN;
    s->was_listed = pass->visible != NULL;
    s->has_window = pass->drift.num_window > 0;
    if (pass->visible) memcpy(s->visible, pass->visible, (size_t)pass->num_visible * sizeof *s->visible);

    rf_text_rows few = {.num_rows = pass->num_rows, .rows = pass->rows, .tokens = pass->tokens};
    bool waited = false;
    if (from > 0) {
        rf_text_run run = make_run(s, pass, &few, false, 0, from);
        RF_TRY(rf_text_upload(&run, pass, &few, err));
        bool at_once = rf_backend_get_kind(s->backend) == RF_BACKEND_CPU && !s->decides_late;
        RF_TRY(at_once ? run_few_at_once(s, pass, &run, &from, err) : run_few_and_look(s, pass, &run, &from, err));
        rf_text_count(s, pass, &few, from);
        waited = !at_once;
    }
    if (from < num_layers) {
        rf_text_rows all = few;
        if (!full)
            all = (rf_text_rows){.num_rows = pass->drift.num_all,
                                 .rows = pass->drift.all_rows,
                                 .tokens = pass->drift.all_tokens,
                                 .place = s->place};
        rf_text_run run = make_run(s, pass, &all, true, from, num_layers);
        RF_TRY(rf_text_upload(&run, pass, &all, err));
        /* layers 0 on are a pass like any other; from a later layer on they are too many kinds to capture */
        RF_TRY(from == 0 ? rf_text_launch(&run, err) : rf_text_queue_planned(&run, err));
        rf_text_count(s, pass, &all, num_layers - from);
        s->expanded_at = full ? -1 : from - 1;
    }
    if (waited && from == num_layers) return RF_OK; /* everything is here */
    RF_TRY(queue_tracked(s, err));
    return rf_text_queue_results(s, pass, err);
}
