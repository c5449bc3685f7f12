/* samples/refrain/sweep_text.c - a sweep of a text model: what is measured are samples of the built-in tasks.
 *
 * The reference is the uncached run with one token a pass; its tokens stand where pictures have their latents. The control takes fewer
 * passes a block, each of which commits more of the surest tokens. Every run ends with the end of text.
 *
 * With --kv the model is autoregressive and a setting is a policy of its cache with a budget; there is no control. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/memory.h"
#include "samples/refrain/sweep_run.h"
#include "samples/refrain/text_score.h"

#define DEFAULT_SAMPLES 4
#define DEFAULT_TASKS   "total,eval,trace"
#define KV_TASKS        "needle,needle-mk,vt-long,kv-long"
#define MAX_TASKS       64

/* Means over samples; bytes: the most of any task. */
typedef struct {
    double tokens, nfe, row_passes, key_reads, cache_bytes, arena_bytes;
    double kept_bytes, full_bytes, evictions, score_ms, kv_budget;
} text_numbers;

typedef struct {
    opened_text text;
    rf_text_model *guide;
    text_samples tasks[MAX_TASKS];
    text_score scores[MAX_TASKS]; /* of the loop at work */
    int num_tasks;
    int32_t stride;          /* tokens of a sample's row in the reference */
    text_numbers base, last; /* of the uncached loop; of the loop before */
} texts;

typedef struct {
    rf_decoder *decoders[MAX_TASKS];
    rf_decode_options options[MAX_TASKS];
    int num;
} text_setting_session; /* without decoders: the uncached run as a setting */

/* --- opening ------------------------------------------------------------------------------------------------------ */

static rf_status open_model(sweep_run *run, texts *own, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_status st = open_text_model(&own->text, a->model, NULL, 0, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->backend = own->text.backend;
    run->dtype = own->text.dtype;
    run->model_name = own->text.name;
    if (st != RF_OK) return st;
    if (a->is_kv) RF_TRY(kv_check_model(&own->text, "--kv", err));
    if (text_is_causal(&own->text) && !a->is_kv)
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "%s: row policies and commit rules are of diffusion language models; this "
                       "one is autoregressive (refrain eval scores it; --kv for policies of its cache)",
                       own->text.path);
    if (!own->text.tokenizer)
        return rf_fail(err, RF_ERR_MISSING, "%s: no tokenizer.json; tasks are texts", own->text.path);
    if (a->guide) RF_TRY(open_text_guide(&own->guide, &own->text, a->guide, err));
    run->is_block_causal = own->text.model->desc.attention == RF_TEXT_BLOCK_CAUSAL;
    run->tuning_path = tuning_cache_path(false);
    return RF_OK;
}

static rf_status make_samples(sweep_run *run, texts *own, rf_error *err) {
    const sweep_args *a = &run->args;
    bool of[MAX_TASKS] = {0};
    int num = a->num_pictures ? (int)a->num_pictures : DEFAULT_SAMPLES;
    char *names = NULL;
    const char *usual = a->is_kv ? KV_TASKS : DEFAULT_TASKS;
    RF_TRY(kv_task_names(&names, a->tasks ? a->tasks : usual, a->is_kv, a->quiet, err));
    rf_status st = text_tasks_read(names, of, "--task", err);
    rf_free(names);
    RF_TRY(st);
    for (int i = 0; task_at(i) && i < MAX_TASKS; i++) {
        if (!of[i]) continue;
        if (task_at(i)->kind == TASK_TEXT) return rf_fail(err, RF_ERR_ARGUMENT, "--task text: has no score");
        text_samples *s = &own->tasks[own->num_tasks++];
        RF_TRY(text_samples_make(s, &own->text, i, 0, 0, (uint64_t)a->seed, num, 0, err));
        if (a->agnostic && s->contexts[0] == 0)
            return rf_fail(err, RF_ERR_ARGUMENT, "--agnostic: %s asks no question behind a context", task_at(i)->name);
        RF_TRY(text_score_alloc(&own->scores[own->num_tasks - 1], s, err));
        if (s->max_new > own->stride) own->stride = s->max_new;
    }
    run->num_pictures = own->num_tasks * num;
    run->batch = 1;
    rf_decode_options o = text_base_options(&own->text, own->tasks[0].max_new);
    run->num_steps = text_block_of(&o, &own->text);
    return RF_OK;
}

static rf_status open_store(sweep_run *run, texts *own, rf_error *err) {
    char tasks[512] = "", samples[16], block[16], new_tokens[256] = "", seed[24], params[24], threads[16],
         date[40] = "";
    time_t now = time(NULL);
    struct tm local;
    for (int i = 0; i < own->num_tasks; i++) {
        size_t used = strlen(tasks), room = strlen(new_tokens);
        snprintf(tasks + used, sizeof tasks - used, "%s%s", i ? " " : "", task_at(own->tasks[i].task)->name);
        snprintf(new_tokens + room, sizeof new_tokens - room, "%s%d", i ? " " : "", (int)own->tasks[i].max_new);
    }
    snprintf(samples, sizeof samples, "%d", own->tasks[0].num);
    snprintf(block, sizeof block, "%d", run->num_steps);
    snprintf(seed, sizeof seed, "%jd", (intmax_t)run->args.seed);
    snprintf(params, sizeof params, "%jd", (intmax_t)rf_text_model_num_params(own->text.model));
    snprintf(threads, sizeof threads, "%d", rf_backend_num_threads(run->backend));
    if (localtime_r(&now, &local)) strftime(date, sizeof date, "%Y-%m-%d %H:%M %z", &local);
    const sweep_pin pins[] = {
        {"model", (char *)(uintptr_t)run->model_name},
        {"parameters", params},
        {"tasks", tasks},
        {"samples", samples},
        {"block", block},
        {"new", new_tokens},
        {"guide", (char *)(uintptr_t)(run->args.guide ? run->args.guide : "none")},
        {"seed", seed},
        {"device", (char *)(uintptr_t)rf_backend_description(run->backend)},
        {"dtype", (char *)(uintptr_t)rf_dtype_name(run->dtype)},
        {"threads", threads},
        {"_date", date},
        {"_version", (char *)(uintptr_t)RF_VERSION},
        {"kv", run->args.agnostic ? "agnostic" : "aware"}, /* of KV policies alone */
    };
    int num = (int)(sizeof pins / sizeof pins[0]) - !run->args.is_kv;
    return sweep_store_open(&run->store, run->args.report, pins, num, err);
}

static rf_status open_texts(sweep_run *run, rf_error *err) {
    texts *own = rf_alloc_zero(1, sizeof *own);
    if (!own) return rf_fail(err, RF_ERR_MEMORY, "no memory for a sweep");
    run->own = own;
    RF_TRY(open_model(run, own, err));
    RF_TRY(make_samples(run, own, err));
    return open_store(run, own, err);
}

/* --- sessions ----------------------------------------------------------------------------------------------------- */

static void destroy(void *opaque) {
    text_setting_session *s = opaque;
    if (!s) return;
    for (int i = 0; i < s->num; i++) rf_decoder_destroy(s->decoders[i]);
    rf_free(s);
}

static rf_status options_of(const sweep_run *run, const texts *own, int task, const sweep_setting *setting,
                            rf_decode_options *o, rf_error *err) {
    const text_settings none = {0};
    RF_TRY(text_score_options(o, &own->text, &own->tasks[task], &none, setting, own->guide, (uint64_t)run->args.seed,
                              err));
    o->force_policy = run->args.force;
    o->gemm_tuning = run->tuning_path;
    if (o->commit == RF_COMMIT_GUIDED && !o->guide)
        return rf_fail(err, RF_ERR_ARGUMENT, "commit guided: needs --guide MODEL");
    if (setting && setting->kv) {
        kv_apply(setting->kv, o);
        RF_TRY(rf_decode_options_check(o, own->text.model, own->tasks[task].longest, err));
        o->kv_context = setting->kv->agnostic; /* each sample's own */
    }
    if (!setting) {
        *o = text_reference_options(o, &own->text);
        o->gemm_tuning = run->tuning_path;
    } else if (setting->num_steps > 0) { /* the control */
        bool blocks = own->text.model->desc.attention == RF_TEXT_BLOCK_CAUSAL;
        o->steps = blocks ? setting->num_steps : setting->num_steps * (o->max_new / text_block_of(o, &own->text));
    }
    return RF_OK;
}

static rf_status create(sweep_run *run, const sweep_setting *setting, void **out, rf_error *err) {
    texts *own = run->own;
    text_setting_session *s = rf_alloc_zero(1, sizeof *s);
    if (!s) return rf_fail(err, RF_ERR_MEMORY, "no memory for a setting");
    bool is_reference = setting && strcmp(setting->key, SWEEP_UNCACHED ":") == 0;
    rf_status st = RF_OK;
    for (int i = 0; i < own->num_tasks && st == RF_OK; i++) {
        const text_samples *samples = &own->tasks[i];
        st = options_of(run, own, i, setting, &s->options[i], err);
        if (st == RF_OK && !is_reference)
            st = rf_decoder_create(&s->decoders[i], own->text.model, &s->options[i],
                                   samples->longest + samples->max_new, err);
        s->num = i + 1;
    }
    if (st != RF_OK) {
        destroy(s);
        return st;
    }
    if (!setting)
        run->reference = (sweep_reference){.num = run->num_pictures, .latent = {1, 1, own->stride}, .image = {1, 1, 1}};
    *out = s;
    return RF_OK;
}

/* Tokens and scores of a task to their places. */
static void keep_tokens(const texts *own, int task, const sweep_loop *loop) {
    const text_score *score = &own->scores[task];
    if (!loop->latents) return;
    size_t at = 0;
    for (int i = 0; i < task; i++) at += (size_t)own->tasks[i].num;
    for (int i = 0; i < score->num; i++, at++) {
        float *row = loop->latents + at * (size_t)own->stride;
        const int32_t *tokens = score->tokens + (size_t)i * (size_t)score->stride;
        for (int32_t k = 0; k < own->stride; k++) row[k] = k < score->stride ? (float)tokens[k] : -1.0f;
        loop->pictures[at] = (float)score->exact[i];
    }
}

/* The uncached run as a setting is the reference: it need not be decoded again. */
static rf_status take_reference(const sweep_run *run, sweep_loop *loop) {
    const sweep_reference *r = &run->reference;
    texts *own = run->own;
    loop->ms = sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW);
    own->last = own->base;
    if (!loop->latents) return RF_OK;
    memcpy(loop->latents, r->latents, (size_t)r->num * (size_t)own->stride * sizeof *r->latents);
    memcpy(loop->pictures, r->pictures, (size_t)r->num * sizeof *r->pictures);
    return RF_OK;
}

/* Of a full cache, mean: keys and values of the prompt and of all but the last new token. */
static double full_bytes_of(const texts *own, int task) {
    const rf_text_desc *d = &own->text.model->desc;
    const text_samples *samples = &own->tasks[task];
    double token = 2.0 * d->num_layers * d->num_kv_heads * d->head_dim * (double)rf_dtype_bytes(own->text.dtype),
           sum = 0;
    for (int i = 0; i < samples->num; i++) sum += (double)samples->ids[i].num / samples->num;
    return token * (sum + own->scores[task].nfe - 1); /* a forward a token, the prefill the first */
}

static text_numbers numbers_of(const texts *own, int num_samples) {
    text_numbers n = {0};
    for (int i = 0; i < own->num_tasks; i++) {
        const text_score *s = &own->scores[i];
        double weight = (double)s->num / num_samples;
        n.tokens += weight * s->num_tokens;
        n.nfe += weight * s->nfe;
        n.row_passes += weight * s->row_passes;
        n.key_reads += weight * s->key_reads;
        n.cache_bytes = fmax(n.cache_bytes, (double)s->cache_bytes);
        n.arena_bytes = fmax(n.arena_bytes, (double)s->arena_bytes);
        double full = s->full_bytes > 0 ? s->full_bytes : full_bytes_of(own, i);
        n.full_bytes += weight * full;
        n.kept_bytes += weight * (s->full_bytes > 0 ? s->kept_bytes : full);
        n.evictions += weight * s->evictions;
        n.score_ms += weight * (s->score_ms + s->step_score_ms);
        n.kv_budget += weight * s->kv_budget;
    }
    return n;
}

static rf_status loop_texts(sweep_run *run, void *opaque, sweep_loop *loop, rf_error *err) {
    texts *own = run->own;
    const text_setting_session *s = opaque;
    if (!s->decoders[0]) return take_reference(run, loop);
    for (int i = 0; i < own->num_tasks; i++) {
        rf_status st = text_score_with(&own->scores[i], s->decoders[i], &own->text, &own->tasks[i], &s->options[i],
                                       NULL, NULL, err);
        if (st == RF_ERR_CANCELLED) return sweep_interrupted(run, err);
        RF_TRY(st);
        loop->ms += own->scores[i].total_ms;
        keep_tokens(own, i, loop);
    }
    own->last = numbers_of(own, run->num_pictures);
    if (opaque == run->base) own->base = own->last;
    return RF_OK;
}

/* --- quality ------------------------------------------------------------------------------------------------------ */

static rf_status prepare(sweep_run *run, rf_error *err) {
    (void)run;
    (void)err;
    return RF_OK;
}

static double agreement(const sweep_run *run) {
    const texts *own = run->own;
    double sum = 0;
    for (int i = 0; i < run->num_pictures; i++) {
        const float *x = run->latents + (size_t)i * (size_t)own->stride;
        const float *y = run->reference.latents + (size_t)i * (size_t)own->stride;
        int32_t equal = 0, longer = 0;
        for (int32_t k = 0; k < own->stride; k++) {
            bool in_x = x[k] >= 0, in_y = y[k] >= 0;
            longer += in_x || in_y;
            equal += in_x && in_y && (int32_t)x[k] == (int32_t)y[k];
        }
        sum += longer > 0 ? (double)equal / longer : 1;
    }
    return sum / run->num_pictures;
}

static rf_status quality(sweep_run *run, sweep_row *row, rf_error *err) {
    const texts *own = run->own;
    size_t room = (size_t)own->num_tasks * 16 + 1, used = 0, at = 0;
    row->score_each = rf_alloc_zero(room, 1);
    if (!row->score_each) return rf_fail(err, RF_ERR_MEMORY, "no memory for scores");
    row->score = 0;
    for (int i = 0; i < own->num_tasks; i++) {
        double right = 0;
        for (int k = 0; k < own->tasks[i].num; k++) right += (double)run->pictures[at++] / own->tasks[i].num;
        used += (size_t)snprintf(row->score_each + used, room - used, "%s%.4g", i ? " " : "", right);
        row->score += right / own->num_tasks;
    }
    row->agreement = agreement(run);
    return RF_OK;
}

static rf_status measure(sweep_run *run, const sweep_loop *loop, sweep_row *row, rf_error *err) {
    const texts *own = run->own;
    const text_numbers *n = &own->last;
    (void)loop;
    (void)err;
    row->text_tokens = n->tokens;
    row->nfe = n->nfe;
    row->row_passes = n->row_passes;
    row->key_reads = n->key_reads;
    row->cache_bytes = n->cache_bytes;
    row->arena_bytes = n->arena_bytes;
    row->share_rows = own->base.row_passes > 0 ? n->row_passes / own->base.row_passes : NAN;
    if (run->args.is_kv) {
        row->kept_bytes = n->kept_bytes;
        row->full_bytes = n->full_bytes;
        row->evictions = n->evictions;
        row->score_ms = n->score_ms;
        row->kv_budget = n->kv_budget;
    }
    row->tok_s = row->loop_ms > 0 ? n->tokens * run->num_pictures * 1e3 / row->loop_ms : NAN;
    return RF_OK;
}

static void say_plan(const sweep_run *run) {
    const texts *own = run->own;
    double ms = sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW), right = 0;
    for (int i = 0; i < run->num_pictures; i++) right += (double)run->reference.pictures[i] / run->num_pictures;
    if (run->args.is_kv) {
        say("%s on %s in %s: %d tasks, %d samples of each, compressed %s the question; full cache: %.1f %% right, %.2f "
            "s, "
            "%.2f MB a sample; %d settings, %d run%s each",
            run->model_name, rf_backend_name(run->backend), rf_dtype_name(run->dtype), own->num_tasks,
            own->tasks[0].num, run->args.agnostic ? "before" : "with", 100 * right, ms / 1e3,
            own->base.full_bytes / 1e6, run->plan.num, run->repeats, run->repeats == 1 ? "" : "s");
        return;
    }
    say("%s on %s in %s: %d tasks, %d samples of each, blocks of %d; uncached, one token a pass: %.1f %% right, %.2f "
        "s, "
        "%.0f row-passes a sample; %d settings, %d run%s each",
        run->model_name, rf_backend_name(run->backend), rf_dtype_name(run->dtype), own->num_tasks, own->tasks[0].num,
        run->num_steps, 100 * right, ms / 1e3, own->base.row_passes, run->plan.num, run->repeats,
        run->repeats == 1 ? "" : "s");
}

static void close_texts(sweep_run *run) {
    texts *own = run->own;
    if (!own) return;
    for (int i = 0; i < own->num_tasks; i++) {
        text_samples_free(&own->tasks[i]);
        text_score_free(&own->scores[i]);
    }
    rf_text_model_close(own->guide);
    run->backend = NULL; /* the model's, closed with it */
    close_text_model(&own->text);
    rf_free(own);
}

const sweep_kind sweep_texts = {.open = open_texts,
                                .create = create,
                                .destroy = destroy,
                                .loop = loop_texts,
                                .prepare = prepare,
                                .quality = quality,
                                .measure = measure,
                                .say_plan = say_plan,
                                .close = close_texts};
