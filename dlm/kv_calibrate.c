/* dlm/kv_calibrate.c - attention of chosen rows of a prompt, row by row, and the tables that are made of it. */
#include "dlm/kv_calibrate.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/rng.h"
#include "dlm/kv_internal.h"

#define REPEATS    4
#define MOST_TOKEN 2500
#define POOL       5

/* --- looking ---------------------------------------------------------------------------------------------------------------- */

rf_status rf_kv_probe_rows(rf_kv_session *s, int layer, int32_t begin, int32_t rows, int64_t run_rows, rf_error *err) {
    const rf_text_session *stage = s->stage;
    for (int32_t i = begin; i < begin + rows; i++) {
        if (!s->probe->wants(s->probe->user, i)) continue;
        rf_kv_columns_args c = {.source = {.k = rf_text_keys(stage, layer),
                                           .row_stride = stage->kv_cols,
                                           .head_stride = s->head_dim,
                                           .num_keys = i + 1},
                                .q = (const char *)stage->b.q + (size_t)((i - begin) * stage->q_cols) * rf_kv_elem(s),
                                .q_row_stride = stage->q_cols,
                                .lse = s->lse + (i - begin),
                                .lse_stride = run_rows,
                                .num_queries = 1,
                                .num_q_heads = s->num_q_heads,
                                .num_kv_heads = s->num_kv_heads,
                                .head_dim = s->head_dim,
                                .dtype = s->model->dtype,
                                .scale = (float)(1.0 / sqrt((double)s->head_dim)),
                                .s1 = s->measured.s1,
                                .out_stride = s->stats_stride,
                                .workspace = s->workspace,
                                .workspace_bytes = s->workspace_bytes};
        RF_TRY(s->ops->kv_columns(s->stream, &c, err));
        for (int h = 0; h < s->num_q_heads && s->measured.s1 != s->host_measured.s1; h++)
            RF_TRY(rf_stream_download(s->stream, s->host_measured.s1 + h * s->stats_stride,
                                      s->measured.s1 + h * s->stats_stride, (size_t)(i + 1) * sizeof(float), err));
        RF_TRY(rf_kv_wait(s, err));
        RF_TRY(s->probe->take(s->probe->user, s, layer, i, s->host_measured.s1, err));
    }
    return RF_OK;
}

/* A session that measures sums and keeps everything. */
static rf_status open_session(rf_kv_session **out, const rf_text_model *model, int32_t max_prompt, rf_error *err) {
    rf_kv_session_options o = rf_kv_session_options_default();
    RF_TRY(rf_kv_rule_parse(&o.rule, "observed", err));
    o.max_prompt = max_prompt;
    o.max_new = 1;
    return rf_kv_session_create_as(out, model, &o, false, err);
}

static rf_status look(rf_kv_session *s, const rf_kv_probe *probe, const int32_t *tokens, int32_t num, rf_error *err) {
    s->probe = probe;
    rf_status st = rf_kv_session_prefill(s, 0, tokens, num, 0, 0, 0.0, err);
    s->probe = NULL;
    return st;
}

/* --- RazorAttention ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    int32_t period;
    double *echo, *induction; /* [L][Hq] */
} repeats;

static bool wants_repeat(void *user, int32_t position) {
    return position >= ((const repeats *)user)->period;
}

static rf_status take_repeat(void *user, rf_kv_session *s, int layer, int32_t position, const float *p, rf_error *err) {
    repeats *r = user;
    (void)err;
    for (int h = 0; h < s->num_q_heads; h++) {
        const float *at = p + h * s->stats_stride + position - r->period;
        r->echo[layer * s->num_q_heads + h] += (double)at[0];
        r->induction[layer * s->num_q_heads + h] += (double)at[1];
    }
    return RF_OK;
}

static bool is_special(const rf_text_desc *d, int32_t id) {
    for (int i = 0; i < d->num_eos; i++)
        if (d->eos_ids[i] == id) return true;
    return id == d->mask_id;
}

rf_status rf_kv_calibrate_razor(const rf_text_model *model, int32_t num_random, uint64_t seed, float *echo,
                                float *induction, rf_error *err) {
    const rf_text_desc *d = &model->desc;
    int64_t fits = model->rope_positions / REPEATS;
    int32_t k = num_random > 0 ? num_random : fits < MOST_TOKEN ? (int32_t)fits : MOST_TOKEN;
    if (k < 2 || k > fits)
        return rf_fail(err, RF_ERR_ARGUMENT, "calibration: %d random tokens %d times, the model has %lld positions",
                       (int)k, REPEATS, (long long)model->rope_positions);
    size_t heads = (size_t)d->num_layers * (size_t)d->num_q_heads;
    int32_t *tokens = rf_alloc((size_t)k * REPEATS * sizeof *tokens);
    double *sums = rf_alloc_zero(2 * heads, sizeof *sums);
    rf_kv_session *s = NULL;
    rf_status st = tokens && sums ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for a calibration");
    for (int32_t i = 0; st == RF_OK && i < k * REPEATS; i++) {
        if (i >= k) {
            tokens[i] = tokens[i - k];
            continue;
        }
        uint32_t counter[4] = {(uint32_t)i, 0, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)}, words[4];
        do { /* any token but those that end a text */
            rf_philox4x32(counter, key, words);
            counter[1]++;
            tokens[i] = (int32_t)(((uint64_t)words[0] * (uint64_t)d->vocab) >> 32);
        } while (is_special(d, tokens[i]) && counter[1] < 64);
    }
    repeats r = {.period = k, .echo = sums, .induction = sums ? sums + heads : NULL};
    rf_kv_probe probe = {.user = &r, .wants = wants_repeat, .take = take_repeat};
    if (st == RF_OK) st = open_session(&s, model, k * REPEATS, err);
    if (st == RF_OK) st = look(s, &probe, tokens, k * REPEATS, err);
    for (size_t i = 0; st == RF_OK && i < heads; i++) {
        echo[i] = (float)(r.echo[i] / ((double)k * (REPEATS - 1)));
        induction[i] = (float)(r.induction[i] / ((double)k * (REPEATS - 1)));
    }
    rf_kv_session_destroy(s);
    rf_free(tokens);
    rf_free(sums);
    return st;
}

rf_status rf_kv_flag_top(uint8_t *flags, const float *scores, int num, double share, rf_error *err) {
    int count = (int)ceil(share * num - 1e-9);
    count = count < 0 ? 0 : count > num ? num : count;
    int32_t *keep = rf_alloc((size_t)(count > 0 ? count : 1) * sizeof *keep);
    if (keep == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a calibration");
    memset(flags, 0, (size_t)num);
    if (count > 0) rf_kv_top(keep, scores, num, count);
    for (int i = 0; i < count; i++) flags[keep[i]] = 1;
    rf_free(keep);
    return RF_OK;
}

/* --- CompressKV -------------------------------------------------------------------------------------------------------------- */

typedef struct {
    const rf_kv_needle *needle;
    double *mass; /* [L][Hq] */
    /* layers */
    const uint8_t *list;
    int32_t window, budget, num_kept;
    float *sums, *pooled; /* [num_prompt]: of the window's rows */
    int32_t *keep;
    float *values, *out_weights; /* [num][kv_cols], [hidden][q_cols] of the layer */
    double *off, *whole;         /* [q_cols] */
    double *change, *size;       /* [L] squares of the answers' rows */
} needle_run;

static bool is_of_needle(const rf_kv_needle *n, int32_t token) {
    for (int32_t i = n->needle_begin; i < n->needle_end; i++)
        if (n->tokens[i] == token) return true;
    return false;
}

static bool wants_answer(void *user, int32_t position) {
    const rf_kv_needle *n = ((const needle_run *)user)->needle;
    return position >= n->num_prompt - 1 && position + 1 < n->num && is_of_needle(n, n->tokens[position + 1]);
}

static rf_status take_mass(void *user, rf_kv_session *s, int layer, int32_t position, const float *p, rf_error *err) {
    needle_run *r = user;
    (void)position;
    (void)err;
    for (int h = 0; h < s->num_q_heads; h++)
        for (int32_t j = r->needle->needle_begin; j < r->needle->needle_end; j++)
            r->mass[layer * s->num_q_heads + h] += (double)p[h * s->stats_stride + j];
    return RF_OK;
}

static rf_status check_needles(const rf_text_model *model, const rf_kv_needle *needles, int num, int32_t *longest,
                               rf_error *err) {
    *longest = 0;
    for (int i = 0; i < num; i++) {
        const rf_kv_needle *n = &needles[i];
        if (n->num_prompt < 1 || n->num <= n->num_prompt || n->num > model->rope_positions || n->needle_begin < 0 ||
            n->needle_end <= n->needle_begin || n->needle_end > n->num_prompt)
            return rf_fail(err, RF_ERR_ARGUMENT, "calibration: prompt %d of %d + %d tokens with a needle at %d..%d", i,
                           (int)n->num_prompt, (int)(n->num - n->num_prompt), (int)n->needle_begin, (int)n->needle_end);
        if (n->num > *longest) *longest = n->num;
    }
    return num > 0 ? RF_OK : rf_fail(err, RF_ERR_ARGUMENT, "calibration: no prompts with a needle");
}

rf_status rf_kv_calibrate_heads(const rf_text_model *model, const rf_kv_needle *needles, int num, float *scores,
                                rf_error *err) {
    int32_t longest;
    RF_TRY(check_needles(model, needles, num, &longest, err));
    size_t heads = (size_t)model->desc.num_layers * (size_t)model->desc.num_q_heads;
    needle_run run = {.mass = rf_alloc_zero(heads, sizeof(double))};
    rf_kv_probe probe = {.user = &run, .wants = wants_answer, .take = take_mass};
    rf_kv_session *s = NULL;
    rf_status st = run.mass ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for a calibration");
    if (st == RF_OK) st = open_session(&s, model, longest, err);
    for (int i = 0; st == RF_OK && i < num; i++) {
        run.needle = &needles[i];
        st = look(s, &probe, needles[i].tokens, needles[i].num, err);
    }
    for (size_t i = 0; st == RF_OK && i < heads; i++) scores[i] = (float)run.mass[i];
    rf_kv_session_destroy(s);
    rf_free(run.mass);
    return st;
}

static bool wants_window(void *user, int32_t position) {
    const needle_run *r = user;
    return position >= r->needle->num_prompt - r->window && position + 1 < r->needle->num;
}

/* The last row of the window: what stays; values and the out projection of the layer. */
static rf_status keep_window(needle_run *r, rf_kv_session *s, int layer, rf_error *err) {
    int32_t prompt = r->needle->num_prompt, open = prompt - r->window;
    rf_kv_pool_scores(r->pooled, r->sums, open, RF_KV_POOL_AVG, POOL);
    for (int32_t j = open; j < prompt; j++) r->pooled[j] = INFINITY;
    r->num_kept = r->budget < prompt ? r->budget : prompt;
    rf_kv_top(r->keep, r->pooled, prompt, r->num_kept);
    RF_TRY(rf_kv_read_rows(s, rf_text_values(s->stage, layer), r->needle->num * s->stage->kv_cols, r->values, err));
    return rf_kv_read_rows(s, s->model->layers[layer].out, s->model->desc.hidden * s->stage->q_cols, r->out_weights,
                           err);
}

/* |W_O (o' - o)|^2 and |W_O o|^2 of one row. */
static void add_row(needle_run *r, const rf_kv_session *s, int layer, int32_t position, const float *p) {
    int64_t d = s->head_dim, cols = s->stage->q_cols;
    for (int h = 0; h < s->num_q_heads; h++) {
        const float *row = p + h * s->stats_stride, *v = r->values + h / s->group * d;
        double *off = r->off + h * d, *whole = r->whole + h * d, mass = 0;
        memset(off, 0, (size_t)d * sizeof *off);
        memset(whole, 0, (size_t)d * sizeof *whole);
        int32_t next = 0;
        for (int32_t j = 0; j <= position; j++) {
            bool stays = j >= r->needle->num_prompt || (next < r->num_kept && r->keep[next] == j);
            if (j < r->needle->num_prompt && stays) next++;
            if (stays) mass += (double)row[j];
            for (int64_t c = 0; c < d; c++) {
                double x = (double)row[j] * (double)v[j * s->stage->kv_cols + c];
                whole[c] += x;
                if (stays) off[c] += x;
            }
        }
        for (int64_t c = 0; c < d; c++) off[c] = (mass > 0 ? off[c] / mass : 0) - whole[c];
    }
    for (int64_t i = 0; i < s->model->desc.hidden; i++) {
        double change = 0, size = 0;
        for (int64_t c = 0; c < cols; c++) {
            change += (double)r->out_weights[i * cols + c] * r->off[c];
            size += (double)r->out_weights[i * cols + c] * r->whole[c];
        }
        r->change[layer] += change * change;
        r->size[layer] += size * size;
    }
}

static rf_status take_window(void *user, rf_kv_session *s, int layer, int32_t position, const float *p, rf_error *err) {
    needle_run *r = user;
    int32_t prompt = r->needle->num_prompt, open = prompt - r->window;
    if (position < prompt) {
        if (position == open) memset(r->sums, 0, (size_t)prompt * sizeof *r->sums);
        for (int h = 0; h < s->num_q_heads; h++)
            for (int32_t j = 0; j < open && r->list[layer * s->num_q_heads + h]; j++)
                r->sums[j] += p[h * s->stats_stride + j];
        if (position + 1 == prompt) RF_TRY(keep_window(r, s, layer, err));
    }
    if (position + 1 >= prompt) add_row(r, s, layer, position, p);
    return RF_OK;
}

rf_status rf_kv_calibrate_layers(const rf_text_model *model, const rf_kv_needle *needles, int num, const uint8_t *list,
                                 int32_t window, double ratio, float *shares, rf_error *err) {
    const rf_text_desc *d = &model->desc;
    int32_t longest;
    RF_TRY(check_needles(model, needles, num, &longest, err));
    size_t layers = (size_t)d->num_layers, cols = (size_t)d->num_q_heads * (size_t)d->head_dim,
           kv_cols = (size_t)d->num_kv_heads * (size_t)d->head_dim, rows = (size_t)longest;
    needle_run r = {.list = list};
    rf_kv_probe probe = {.user = &r, .wants = wants_window, .take = take_window};
    rf_kv_session *s = NULL;
    double *all = rf_alloc_zero(3 * layers + 2 * cols, sizeof *all), *error = all;
    float *floats = rf_alloc_zero(2 * rows + rows * kv_cols + (size_t)d->hidden * cols, sizeof *floats);
    r.keep = rf_alloc(rows * sizeof *r.keep);
    rf_status st = all && floats && r.keep ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for a calibration");
    if (st == RF_OK) {
        r.change = all + layers;
        r.size = r.change + layers;
        r.off = r.size + layers;
        r.whole = r.off + cols;
        r.sums = floats;
        r.pooled = floats + rows;
        r.values = r.pooled + rows;
        r.out_weights = r.values + rows * kv_cols;
        st = open_session(&s, model, longest, err);
    }
    for (int i = 0; st == RF_OK && i < num; i++) {
        r.needle = &needles[i];
        r.window = window < needles[i].num_prompt ? window : needles[i].num_prompt;
        r.budget = (int32_t)(ratio * (double)needles[i].num_prompt);
        if (r.budget < r.window) r.budget = r.window;
        memset(r.change, 0, 2 * layers * sizeof *r.change);
        st = look(s, &probe, needles[i].tokens, needles[i].num, err);
        for (size_t l = 0; st == RF_OK && l < layers; l++)
            error[l] += r.size[l] > 0 ? sqrt(r.change[l] / r.size[l]) : 0;
    }
    double sum = 0;
    for (size_t l = 0; st == RF_OK && l < layers; l++) sum += error[l];
    for (size_t l = 0; st == RF_OK && l < layers; l++)
        shares[l] = sum > 0 ? (float)(error[l] / sum) : 1.0f / (float)layers;
    rf_kv_session_destroy(s);
    rf_free(all);
    rf_free(floats);
    rf_free(r.keep);
    return st;
}
