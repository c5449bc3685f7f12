/* samples/refrain/bench_kv.c - `refrain bench --what text --kv`: a step of an autoregressive model behind a prompt whose cache is under a
 * budget.
 *
 * A prompt of random ids is computed, measured and compressed; then single tokens follow. The prefill counts as the session times it,
 * with what it waited for scoring; the first one warms up where there is a device, unless it is a long one. A step is timed by the
 * clock over a group of steps of which the last one's statistics are read, as bench_text.c times passes. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/kv_session.h"
#include "samples/refrain/bench_run.h"

#define GROUP_DEVICE   8
#define WARMUP_DEVICE  3
#define WARMUP_HOST    1
#define MOST_PROMPT    1048576
#define USUAL_BUDGET   2048
#define USUAL_POLICIES "none,snapkv,h2o,streaming"
#define MAX_PREFILLS   3
#define LONG_PREFILL   3000 /* ms: one is enough */

typedef struct {
    bench *b;
    int batch, prompt;
    const kv_setting *setting;
    rf_kv_session *session;
    int32_t *tokens; /* [prompt] */
    rf_token_stats *stats;
    int group, warmups;
    bench_row *rows;
    int num_rows;
    rf_error skipped; /* the first refusal */
} kv_bench;

/* ---- the plan ---- */

static int32_t steps_of(const bench *b, int group, int warmups) {
    return (int32_t)(b->args.num_runs + warmups) * group;
}

/* Tokens of a prompt: what was asked for, or the usual ones that fit. most: positions of the model, 0 = any. */
static rf_status list_prompts(const bench *b, int64_t most, int *out, int *num, rf_error *err) {
    static const int usual[] = {8192, 32768};
    *num = 0;
    if (b->args.kept) return bench_read_numbers(b->args.kept, "kept", 2, MOST_PROMPT, out, num, err);
    int room = (int)steps_of(b, GROUP_DEVICE, WARMUP_DEVICE);
    for (size_t i = 0; i < sizeof usual / sizeof usual[0]; i++) {
        if (most == 0 || usual[i] + room <= most) out[(*num)++] = usual[i];
    }
    if (*num == 0) out[(*num)++] = (int)(most / 2);
    return RF_OK;
}

rf_status bench_kv_plan(bench *b, int64_t *most, rf_error *err) {
    const bench_args *a = &b->args;
    kv_args args = a->kv;
    char budget[16];
    snprintf(budget, sizeof budget, "%d", USUAL_BUDGET);
    if (!kv_args_given(&args)) {
        args.policies.count = 1;
        args.policies.items[0] = USUAL_POLICIES;
    }
    if (!args.budgets && !args.ratios) args.budgets = budget;
    RF_TRY(kv_settings_make(&b->kv, &args, KV_AWARE, "1", err));
    *most = 0;
    if (!a->synthetic) return RF_OK;
    rf_text_desc desc;
    int prompts[MAX_BATCHES], num = 0;
    rf_status st = rf_text_config_builtin(&desc, a->synthetic, err);
    if (st != RF_OK) return rf_fail_prefix(err, st, "--synthetic-weights");
    RF_TRY(list_prompts(b, 0, prompts, &num, err));
    for (int i = 0; i < num; i++) {
        int64_t wanted = prompts[i] + steps_of(b, GROUP_DEVICE, WARMUP_DEVICE);
        if (wanted > *most) *most = wanted;
    }
    if (*most < desc.max_positions) *most = 0;
    return RF_OK;
}

/* ---- a setting ---- */

static rf_status open_session(kv_bench *k, rf_error *err) {
    const bench *b = k->b;
    rf_kv_session_options o = rf_kv_session_options_default();
    o.rule = k->setting->rule;
    o.budget = k->setting->budget;
    o.ratio = k->setting->budget > 0 ? 0 : k->setting->ratio > 0 ? k->setting->ratio : 1;
    o.batch = k->batch;
    o.max_prompt = k->prompt;
    o.max_new = steps_of(b, k->group, k->warmups);
    o.use_graphs = true;
    o.tune_gemm = b->args.tune;
    o.gemm_tuning = b->tuning_path;
    rf_dtype_from_name(b->args.residual, &o.residual_dtype); /* "auto" is no dtype and leaves the default */
    return rf_kv_session_create(&k->session, b->text.model, &o, err);
}

typedef struct {
    double all, score, wait; /* ms, as of a row */
} prefill_time;

/* Every sequence once; times are sums over them. */
static rf_status prefill(kv_bench *k, prefill_time *time, rf_error *err) {
    int64_t vocab = k->b->text.model->desc.vocab;
    rf_kv_session_reset_counts(k->session);
    for (int s = 0; s < k->batch; s++) {
        for (int i = 0; i < k->prompt; i++)
            k->tokens[i] = (int32_t)(((int64_t)i * 7919 + (int64_t)s * 104729 + 2) % vocab);
        RF_TRY(rf_kv_session_prefill(k->session, s, k->tokens, k->prompt, 0, 0, 0, err));
        RF_TRY(rf_kv_session_read_stats(k->session, k->stats, err));
        if (cancel_requested()) return rf_fail(err, RF_ERR_CANCELLED, "interrupted in a prefill");
    }
    rf_kv_session_info info = rf_kv_session_get_info(k->session);
    *time =
        (prefill_time){.all = info.prefill_ms + info.score_wait_ms, .score = info.score_ms, .wait = info.score_wait_ms};
    return RF_OK;
}

static rf_status time_prefills(kv_bench *k, bench_row *row, rf_error *err) {
    prefill_time times[MAX_PREFILLS];
    double of[3][MAX_PREFILLS], *out[3] = {&row->prefill_ms, &row->score_ms, &row->score_wait_ms};
    int num = k->b->args.num_runs < MAX_PREFILLS ? (int)k->b->args.num_runs : MAX_PREFILLS;
    bench_row sorted = {0};
    bool cuda = rf_backend_get_kind(k->b->backend) == RF_BACKEND_CUDA;
    if (cuda) RF_TRY(prefill(k, &times[0], err));
    bool is_long = cuda && times[0].all > LONG_PREFILL;
    if (is_long) num = 1; /* that one */
    for (int i = is_long ? 1 : 0; i < num; i++) RF_TRY(prefill(k, &times[i], err));
    for (int i = 0; i < num; i++) {
        of[0][i] = times[i].all;
        of[1][i] = times[i].score;
        of[2][i] = times[i].wait;
    }
    for (int i = 0; i < 3; i++) {
        bench_row_set_times(&sorted, of[i], num);
        *out[i] = sorted.median_ms;
    }
    return RF_OK;
}

static rf_status time_steps(kv_bench *k, bench_row *row, rf_error *err) {
    const bench *b = k->b;
    int64_t vocab = b->text.model->desc.vocab, num = 0;
    int32_t next[4096];
    rf_kv_session_reset_counts(k->session);
    for (int64_t run = -k->warmups; run < b->args.num_runs; run++) {
        if (run == 0) rf_kv_session_reset_counts(k->session);
        double start = now_ms();
        for (int i = 0; i < k->group; i++, num++) {
            for (int s = 0; s < k->batch; s++) next[s] = (int32_t)((num * 613 + s * 31 + 3) % vocab);
            RF_TRY(rf_kv_session_step(k->session, next, err));
        }
        RF_TRY(rf_kv_session_read_stats(k->session, k->stats, err));
        if (run >= 0) b->times[run] = (now_ms() - start) / k->group;
        if (cancel_requested())
            return rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d runs", run < 0 ? 0 : (int)run);
    }
    row->step_score_ms =
        rf_kv_session_get_info(k->session).step_score_ms / ((double)b->args.num_runs * (double)k->group);
    bench_row_set_times(row, b->times, (int)b->args.num_runs);
    return RF_OK;
}

static rf_status bench_setting(kv_bench *k, rf_error *err) {
    const bench *b = k->b;
    bench_row *row = &k->rows[k->num_rows];
    RF_TRY(open_session(k, err));
    *row = (bench_row){.model = b->model_name,
                       .device = rf_backend_description(b->backend),
                       .dtype = rf_dtype_name(b->dtype),
                       .kv = true,
                       .num_params = rf_text_model_num_params(b->text.model),
                       .batch = k->batch,
                       .kept = k->prompt};
    snprintf(row->policy, sizeof row->policy, "%s", k->setting->name);
    snprintf(row->label, sizeof row->label, "a step behind %d tokens, %.180s", k->prompt, k->setting->name);
    RF_TRY(time_prefills(k, row, err));
    rf_kv_session_info info = rf_kv_session_get_info(k->session);
    row->kept_bytes = (double)info.kept_bytes;
    row->full_bytes = (double)info.full_bytes;
    row->evictions = (double)info.evictions;
    row->budget = kv_is_none(k->setting) ? 0 : info.budget;
    RF_TRY(time_steps(k, row, err));
    info = rf_kv_session_get_info(k->session);
    row->arena_bytes = info.arena_bytes;
    row->graph_nodes = info.graph_nodes;
    k->num_rows++;
    return RF_OK;
}

/* A policy that this device or model cannot do is said and left out, while there are others. */
static bool is_skipped(const kv_bench *k, rf_status st) {
    return k->b->kv.num > 1 && (st == RF_ERR_UNSUPPORTED || st == RF_ERR_DEVICE_MEMORY || st == RF_ERR_MEMORY);
}

static rf_status bench_prompt(kv_bench *k, rf_error *err) {
    const bench *b = k->b;
    rf_status st = RF_OK;
    k->tokens = rf_alloc_zero((size_t)k->prompt, sizeof *k->tokens);
    k->stats = rf_alloc_zero((size_t)k->batch, sizeof *k->stats);
    if (!k->tokens || !k->stats) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a prompt of %d tokens", k->prompt);
    for (int i = 0; i < b->kv.num && st == RF_OK; i++) {
        k->setting = &b->kv.items[i];
        st = bench_setting(k, err);
        if (st != RF_OK && st != RF_ERR_CANCELLED) st = rf_fail_prefix(err, st, "--kv-policy %s", k->setting->name);
        rf_kv_session_destroy(k->session);
        k->session = NULL;
        if (!is_skipped(k, st)) continue;
        say_error("%s", err->message);
        if (k->skipped.status == RF_OK) k->skipped = *err;
        st = RF_OK;
    }
    rf_free(k->tokens);
    rf_free(k->stats);
    k->tokens = NULL;
    k->stats = NULL;
    return st;
}

rf_status bench_kv(bench *b, bench_row **rows, int *num_rows, rf_error *err) {
    int prompts[MAX_BATCHES], num = 0;
    int64_t most = b->text.model->desc.max_positions;
    bool cuda = rf_backend_get_kind(b->backend) == RF_BACKEND_CUDA;
    kv_bench k = {.b = b, .group = cuda ? GROUP_DEVICE : 1, .warmups = cuda ? WARMUP_DEVICE : WARMUP_HOST};
    *rows = NULL;
    *num_rows = 0;
    RF_TRY(list_prompts(b, most, prompts, &num, err));
    for (int i = 0; i < num; i++) {
        int64_t wanted = prompts[i] + steps_of(b, k.group, k.warmups);
        if (wanted > most)
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "--kept %d: with %d steps behind it that is more than %s's %jd positions", prompts[i],
                           (int)steps_of(b, k.group, k.warmups), b->model_name, (intmax_t)most);
    }
    k.rows = rf_alloc_zero((size_t)(b->num_batches * num * b->kv.num) + 1, sizeof *k.rows);
    if (!k.rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    *rows = k.rows;
    rf_status st = RF_OK;
    for (int i = 0; i < b->num_batches && st == RF_OK; i++) {
        k.batch = b->batches[i];
        for (int p = 0; p < num && st == RF_OK; p++) {
            k.prompt = prompts[p];
            st = bench_prompt(&k, err);
        }
    }
    for (int i = 0; i < k.num_rows; i++) {
        bench_row *row = &k.rows[i];
        row->what = row->label;
        for (int j = 0; j < k.num_rows; j++) {
            const bench_row *other = &k.rows[j];
            if (strcmp(other->policy, "none") == 0 && other->kept == row->kept && other->batch == row->batch)
                row->none_prefill_ms = other->prefill_ms;
        }
    }
    *num_rows = k.num_rows;
    if (st != RF_OK || k.num_rows > 0) return st;
    *err = k.skipped;
    return err->status;
}
