/* samples/refrain/text_score.c */
#include "samples/refrain/text_score.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/kv_args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/text_run.h"

#define ROUND_UP    32 /* canvases of models without a block of their own */
#define SOME_LENGTH 1024

/* ---- tasks ---- */

static rf_status add_task(const char *name, size_t len, bool *of, const char *what, rf_error *err) {
    static const char *const groups[] = {"short", "long", "recall"};
    char word[64], known[640] = "all short long recall";
    snprintf(word, sizeof word, "%.*s", (int)(len < 63 ? len : 63), name);
    bool found = false;
    for (int i = 0; task_at(i); i++) {
        const task_info *info = task_at(i);
        bool in_group = info->kind != TASK_TEXT && strcmp(word, groups[info->kind]) == 0;
        in_group |= info->kind != TASK_TEXT && strcmp(word, "all") == 0;
        if (!in_group && strcmp(word, info->name) != 0) continue;
        of[i] = found = true;
    }
    if (found) return RF_OK;
    for (int i = 0; task_at(i); i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, " %s", task_at(i)->name);
    }
    size_t near_len = 0;
    const char *near = args_nearest(word, known, &near_len);
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: no task '%s'%s%.*s (one of: %s)", what, word,
                   near ? "; did you mean " : "", near ? (int)near_len : 0, near ? near : "", known);
}

rf_status text_tasks_read(const char *names, bool *of, const char *what, rf_error *err) {
    for (const char *at = names;; at++) {
        size_t len = strcspn(at, ",");
        RF_TRY(add_task(at, len, of, what, err));
        at += len;
        if (!*at) return RF_OK;
    }
}

/* ---- samples ---- */

void text_samples_free(text_samples *s) {
    for (int i = 0; i < s->num; i++) {
        if (s->prompts) rf_free(s->prompts[i]);
        if (s->answers) rf_free(s->answers[i]);
        if (s->ids) rf_token_ids_clear(&s->ids[i]);
    }
    rf_free(s->prompts);
    rf_free(s->answers);
    rf_free(s->ids);
    rf_free(s->contexts);
    *s = (text_samples){0};
}

static rf_status out_of_range(const task_info *info, int size, size_t length, rf_error *err) {
    if (info->size_name)
        return rf_fail(err, RF_ERR_ARGUMENT, "--size %d: %s has %d..%d %s", size, info->name, info->min_size,
                       info->max_size, info->size_name);
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected --length %zu..%zu bytes, found %zu", info->name,
                   info->min_length, info->max_length, length);
}

/* Tokens that end at or before byte `at` of the text they stand for; special ones stand for none of it. */
static int32_t tokens_before(const opened_text *t, const rf_token_ids *ids, int at) {
    size_t bytes = 0;
    int32_t num = 0;
    for (; num < (int32_t)ids->num && at > 0; num++) {
        size_t len = 0;
        bool special = rf_tokenizer_is_special(t->tokenizer, ids->ids[num]);
        if (!special && !rf_tokenizer_token_bytes(t->tokenizer, ids->ids[num], &len)) len = 0;
        if (bytes + (special ? 0 : len) > (size_t)at) break;
        bytes += special ? 0 : len;
    }
    return num;
}

static rf_status make_one(text_samples *s, int i, const opened_text *t, const task_settings *settings, uint64_t seed,
                          char *prompt, char *answer, int32_t *answer_len, rf_error *err) {
    const task_info *info = task_at(s->task);
    rf_token_ids ids = {0};
    if (task_generate(s->task, seed + (uint64_t)i, settings, prompt, TASK_MAX_PROMPT, answer, TASK_MAX_ANSWER) != 0)
        return out_of_range(info, settings->size, settings->length, err);
    s->prompts[i] = rf_strdup(prompt);
    s->answers[i] = rf_strdup(answer);
    if (!s->prompts[i] || !s->answers[i]) return rf_fail(err, RF_ERR_MEMORY, "no memory for samples of %s", info->name);
    RF_TRY(text_encode(t, prompt, strlen(prompt), true, info->name, &s->ids[i], err));
    s->contexts[i] = tokens_before(t, &s->ids[i], task_question(s->task, prompt));
    rf_status st = text_encode(t, answer, strlen(answer), false, info->name, &ids, err);
    *answer_len = (int32_t)ids.num;
    rf_token_ids_clear(&ids);
    return st;
}

rf_status text_samples_make(text_samples *s, const opened_text *t, int task, int size, size_t length, uint64_t seed,
                            int num, int32_t max_new, rf_error *err) {
    const task_info *info = task_at(task);
    task_settings settings = {.size = info->size_name ? size : 0, .length = info->size_name ? 0 : length};
    char *prompt = rf_alloc(TASK_MAX_PROMPT), *answer = rf_alloc(TASK_MAX_ANSWER);
    int32_t longest_answer = 0;
    *s = (text_samples){.task = task, .num = num};
    if (!info->size_name && length == 0) {
        settings.length = SOME_LENGTH;
        if (settings.length < info->min_length) settings.length = info->min_length;
    }
    s->prompts = rf_alloc_zero((size_t)num, sizeof *s->prompts);
    s->answers = rf_alloc_zero((size_t)num, sizeof *s->answers);
    s->ids = rf_alloc_zero((size_t)num, sizeof *s->ids);
    s->contexts = rf_alloc_zero((size_t)num, sizeof *s->contexts);
    rf_status st = RF_OK;
    if (!prompt || !answer || !s->prompts || !s->answers || !s->ids || !s->contexts)
        st = rf_fail(err, RF_ERR_MEMORY, "no memory for %d samples of %s", num, info->name);
    for (int i = 0; i < num && st == RF_OK; i++) {
        int32_t len = 0;
        st = make_one(s, i, t, &settings, seed, prompt, answer, &len, err);
        s->answer_tokens += (double)len / num;
        if (len > longest_answer) longest_answer = len;
        if ((int32_t)s->ids[i].num > s->longest) s->longest = (int32_t)s->ids[i].num;
    }
    int32_t unit =
        t->usual_block > ROUND_UP || (t->usual_block > 0 && ROUND_UP % t->usual_block) ? t->usual_block : ROUND_UP;
    s->max_new = max_new > 0 ? max_new : (longest_answer + unit) / unit * unit;
    if (st == RF_OK && (int64_t)s->longest + s->max_new > t->model->desc.max_positions)
        st = rf_fail(err, RF_ERR_ARGUMENT, "%s: %d prompt tokens and %d new ones do not fit the model's %jd positions",
                     info->name, (int)s->longest, (int)s->max_new, (intmax_t)t->model->desc.max_positions);
    rf_free(prompt);
    rf_free(answer);
    return st;
}

/* ---- scores ---- */

rf_status text_score_options(rf_decode_options *out, const opened_text *t, const text_samples *samples,
                             const text_settings *base, const sweep_setting *setting, const rf_text_model *guide,
                             uint64_t seed, rf_error *err) {
    text_settings merged = *base, own = {0};
    rf_decode_options o = text_base_options(t, samples->max_new);
    char *decode = rf_strdup(setting && setting->decode ? setting->decode : "");
    if (!decode) return rf_fail(err, RF_ERR_MEMORY, "no memory for a setting");
    rf_status st = text_settings_read(&own, decode, err);
    text_settings_merge(&merged, &own);
    if (st == RF_OK) st = text_settings_apply(&merged, "", t->model, &o, err);
    rf_free(decode);
    RF_TRY(st);
    o.seed = seed;
    o.row_policy = setting ? setting->object : NULL;
    if (o.commit == RF_COMMIT_GUIDED) o.guide = guide;
    *out = o;
    return rf_decode_options_check(&o, t->model, samples->longest, err);
}

rf_status text_score_alloc(text_score *s, const text_samples *samples, rf_error *err) {
    *s = (text_score){.num = samples->num, .stride = samples->max_new, .external_reused = NAN};
    s->tokens = rf_alloc_zero((size_t)s->num * (size_t)s->stride, sizeof *s->tokens);
    s->exact = rf_alloc_zero((size_t)s->num, sizeof *s->exact);
    if (s->tokens && s->exact) return RF_OK;
    return rf_fail(err, RF_ERR_MEMORY, "no memory for the scores of %d samples", s->num);
}

void text_score_free(text_score *s) {
    rf_free(s->tokens);
    rf_free(s->exact);
    *s = (text_score){0};
}

static bool keep_going(void *user, const int32_t *canvas, int32_t length, const int32_t *changed, int32_t num_changed) {
    (void)user;
    (void)canvas;
    (void)length;
    (void)changed;
    (void)num_changed;
    return !cancel_requested();
}

static rf_status take(text_score *s, int i, const opened_text *t, const text_samples *samples,
                      const rf_decode_result *r, rf_error *err) {
    rf_text text = {0};
    int32_t *row = s->tokens + (size_t)i * (size_t)s->stride;
    for (int32_t k = 0; k < s->stride; k++) row[k] = k < r->num_tokens ? r->tokens[k] : -1;
    RF_TRY(text_decode(t, r->tokens, r->num_tokens, &text, err));
    double right = task_score(samples->task, samples->prompts[i], samples->answers[i], text.bytes ? text.bytes : "");
    s->exact[i] = right;
    rf_text_clear(&text);
    return RF_OK;
}

/* The sample's own context where the options ask for one. */
static rf_status run_sample(rf_decoder *decoder, const text_samples *samples, int i, const rf_decode_options *options,
                            rf_decode_result *r, rf_error *err) {
    rf_decode_options o = *options;
    if (o.kv_context != 0) o.kv_context = samples->contexts[i];
    if (options->kv_context != 0 && o.kv_context == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: asks no question behind a context", task_at(samples->task)->name);
    return rf_decoder_run(decoder, &o, samples->ids[i].ids, (int32_t)samples->ids[i].num, keep_going, NULL, r, err);
}

rf_status text_score_with(text_score *s, rf_decoder *decoder, const opened_text *t, const text_samples *samples,
                          const rf_decode_options *o, void (*on_sample)(void *user), void *user, rf_error *err) {
    double num = samples->num, reused = 0, fresh = 0;
    s->exact_match = s->ms = s->nfe = s->row_passes = s->key_reads = s->guide_ms = s->num_tokens = s->total_ms = 0;
    s->kept_bytes = s->full_bytes = s->evictions = s->score_ms = s->step_score_ms = s->kv_budget = 0;
    for (int i = 0; i < samples->num; i++) {
        rf_decode_result r;
        double start = now_ms();
        RF_TRY(run_sample(decoder, samples, i, o, &r, err));
        double ms = now_ms() - start;
        if (cancel_requested()) return rf_fail(err, RF_ERR_CANCELLED, "interrupted");
        RF_TRY(take(s, i, t, samples, &r, err));
        s->exact_match += s->exact[i] / num;
        s->ms += ms / num;
        s->total_ms += ms;
        s->nfe += (double)r.num_forwards / num;
        s->row_passes += (double)r.row_passes / num;
        s->key_reads += (double)r.key_reads / num;
        s->guide_ms += r.guide_ms / num;
        s->num_tokens += r.num_tokens / num;
        s->cache_bytes = r.cache_bytes + r.plane_bytes;
        s->arena_bytes = r.arena_bytes;
        kv_numbers kv = o->kv ? kv_numbers_of(&r) : (kv_numbers){0};
        s->kept_bytes += kv.kept_bytes / num;
        s->full_bytes += kv.full_bytes / num;
        s->evictions += kv.evictions / num;
        s->score_ms += kv.score_ms / num;
        s->step_score_ms += kv.step_score_ms / num;
        s->kv_budget += kv.budget / num;
        reused += (double)r.external_rows_reused;
        fresh += (double)r.external_rows_fresh;
        if (on_sample) on_sample(user);
    }
    s->external_reused = reused + fresh > 0 ? reused / (reused + fresh) : (double)NAN;
    return RF_OK;
}

rf_status text_score_run(text_score *s, const opened_text *t, const text_samples *samples, const rf_decode_options *o,
                         bool warm, void (*on_sample)(void *user), void *user, rf_error *err) {
    rf_decoder *decoder = NULL;
    rf_decode_result r;
    RF_TRY(text_score_alloc(s, samples, err));
    rf_status st = rf_decoder_create(&decoder, t->model, o, samples->longest + samples->max_new, err);
    for (int i = 0; i < samples->num && warm && st == RF_OK; i++) st = run_sample(decoder, samples, i, o, &r, err);
    if (st == RF_OK) st = text_score_with(s, decoder, t, samples, o, on_sample, user, err);
    rf_decoder_destroy(decoder);
    return st;
}

double text_score_agreement(const text_score *a, const text_score *b) {
    double sum = 0;
    for (int i = 0; i < a->num; i++) {
        const int32_t *x = a->tokens + (size_t)i * (size_t)a->stride, *y = b->tokens + (size_t)i * (size_t)b->stride;
        int32_t num_x = 0, num_y = 0, first;
        while (num_x < a->stride && x[num_x] >= 0) num_x++;
        while (num_y < b->stride && y[num_y] >= 0) num_y++;
        sum += text_agreement(x, num_x, y, num_y, &first);
    }
    return a->num > 0 ? sum / a->num : 1;
}

double text_score_rate(const text_score *s) {
    return s->ms > 0 ? s->num_tokens * 1e3 / s->ms : 0;
}
