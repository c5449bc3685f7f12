/* samples/refrain/cmd_eval.c - `refrain eval`: a text model on the built-in tasks, setting by setting.
 *
 * Sample i of a task is made from seed + i, so every setting and every model meets the same ones. Agreement is with the same model
 * decoding one token a pass and computing every row. The order is task by task, so that the reference is decoded once.
 * A setting that the model refuses is a row that says why; if all are refused the command fails.
 *
 * --kv-policy puts the cache of an autoregressive model under budgets. Its rows come in two ways: aware, where the whole prompt is
 * compressed and a rule can look at the question at its end, and agnostic, where what stands before the question is compressed as if
 * nothing followed, and the question is fed behind it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "samples/refrain/kv_args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"
#include "samples/refrain/text_score.h"

#define DEFAULT_SAMPLES 10
#define MAX_SAMPLES     100000
#define MAX_TASKS       64
#define OWN_ROWS        32
#define KV_RATIOS       "1,0.5,0.25"
#define KV_COLUMN       28
#define VALID_SHARE     0.95 /* right with the full cache, below which a task says little about policies */
#define TEXT_WINDOW     512  /* tokens of a piece of plain text */
#define MAX_CORPUS      ((size_t)1 << 30)
#define NAME_COLUMN     44

typedef struct {
    const char *model, *synthetic, *guide, *corpus, *device, *dtype;
    arg_list policies;
    text_settings settings;
    kv_args kv;
    bool aware, agnostic;
    int64_t num_samples, seed, size, length, num_new, threads;
    bool no_agreement, json, quiet;
    int verbosity;
} eval_args;

typedef struct {
    const char *task;
    const sweep_setting *setting; /* NULL: plain text */
    const kv_setting *kv;         /* NULL: no policies were given */
    text_score score;             /* numbers only */
    double agreement, nll;        /* NaN = not measured */
    double prompt_tokens, answer_tokens;
    int32_t max_new;
    char *refused; /* why; NULL = measured */
} eval_row;

typedef struct {
    eval_args args;
    bool of[MAX_TASKS];
    rf_log log;
    opened_text text;
    rf_text_model *guide;
    sweep_plan plan;
    kv_settings kv;
    eval_row *rows;
    int num_rows;
    progress_bar bar;
    int num_done, num_measured, num_printed;
    rf_error first_refusal;
} eval_run;

/* ---- options ---- */

static args_result read_args(eval_args *a, const char **tasks, int argc, char **argv) {
    *a = (eval_args){.device = "auto", .dtype = "auto", .num_samples = DEFAULT_SAMPLES};
    const arg_option own[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: text)", &a->model),
        arg_strings("policy", 0, "SPEC,...", "none, dual, window:refresh=16+commit=threshold (none)", &a->policies),
        arg_int("num", 'n', "N", "samples of each task (default: 10)", &a->num_samples, 1, MAX_SAMPLES),
        arg_int("seed", 's', "N", "sample i is made from N+i (default: 0)", &a->seed, 0, 9e18),
        arg_int("size", 0, "N", "of tasks that have one (default: drawn)", &a->size, 1, 1e6),
        arg_int("length", 0, "BYTES", "of prompts of the others (default: 1024)", &a->length, 1, 1e6),
        arg_int("new", 0, "N", "new tokens (default: what the longest answer needs)", &a->num_new, 1, 1e6),
        arg_string("corpus", 0, "FILE", "plain text, for the task text", &a->corpus),
        arg_string("guide", 0, "MODEL", "autoregressive, of commit guided", &a->guide),
        arg_flag("no-agreement", 0, "do not decode uncached to compare with", &a->no_agreement),
        KV_LIST_ROWS(&a->kv, KV_RATIOS),
        KV_EPISODE_ROW(&a->kv),
        arg_flag("aware", 0, "compress with the question alone (default: both ways)", &a->aware),
        arg_flag("agnostic", 0, "compress before the question alone", &a->agnostic),
    };
    const arg_option late[] = {
        TEXT_DEVICE_ROWS(a),
        arg_flag("json", 0, "a JSON list on standard output", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors and results", &a->quiet),
        arg_count("verbose", 'v', "say more; twice for debugging", &a->verbosity),
    };
    arg_option options[OWN_ROWS + TEXT_MAX_SETTINGS];
    size_t num = 0;
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) options[num++] = own[i];
    num += text_setting_rows(&a->settings, options + num);
    for (size_t i = 0; i < sizeof late / sizeof late[0]; i++) options[num++] = late[i];
    const arg_spec spec = {
        .command = "refrain eval",
        .usage = "TASK[,TASK...]|short|long|recall|all [options]",
        .about = "Scores a text model on built-in tasks whose answers are known: exact match, agreement "
                 "with uncached decoding, speed. refrain eval list names the tasks. With --kv-policy (model "
                 "text-ar) kv and vt stand for kv-long and vt-long.",
        .options = options,
        .num_options = num,
        .min_positional = 1,
        .max_positional = 1,
        .positional_name = "tasks (all, short, long, recall or names with commas between)"};
    return args_parse(&spec, argc, argv, tasks, NULL);
}

static void list_tasks(void) {
    static const char *const kinds[] = {"short", "long", "recall", "text"};
    for (int i = 0; task_at(i); i++) {
        const task_info *info = task_at(i);
        char size[64];
        if (info->size_name) {
            snprintf(size, sizeof size, "%d..%d %s", info->usual_min, info->usual_max, info->size_name);
        } else {
            snprintf(size, sizeof size, "%zu..%zu bytes", info->min_length, info->max_length);
        }
        printf("%-10s %-7s %-22s %s\n", info->name, kinds[info->kind], size, info->about);
    }
}

/* ---- KV policies ---- */

static rf_status plan_kv(eval_run *run, rf_error *err) {
    const eval_args *a = &run->args;
    unsigned ways = (a->aware ? KV_AWARE : 0u) | (a->agnostic ? KV_AGNOSTIC : 0u);
    if (ways && !kv_args_given(&a->kv))
        return rf_fail(err, RF_ERR_ARGUMENT, "--%s: of --kv-policy", a->aware ? "aware" : "agnostic");
    return kv_settings_make(&run->kv, &a->kv, ways ? ways : KV_AWARE | KV_AGNOSTIC, KV_RATIOS, err);
}

/* ---- opening ---- */

static rf_status plan_settings(eval_run *run, rf_error *err) {
    const eval_args *a = &run->args;
    bool causal = text_is_causal(&run->text);
    bool blocks = run->text.model->desc.attention == RF_TEXT_BLOCK_CAUSAL;
    for (int i = 0; i < a->policies.count; i++)
        RF_TRY(sweep_plan_add_text_list(&run->plan, a->policies.items[i], blocks, err));
    if (run->plan.num == 0) RF_TRY(sweep_plan_add_text(&run->plan, SWEEP_UNCACHED, blocks, err));
    for (int i = 0; i < run->plan.num && causal; i++) {
        if (run->plan.items[i].object)
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "--policy %s: a row policy, of diffusion language models; %s is autoregressive",
                           run->plan.items[i].policy, run->text.name);
    }
    return RF_OK;
}

static rf_status check_sizes(const eval_run *run, rf_error *err) {
    const eval_args *a = &run->args;
    bool sized = false, measured = false;
    for (int i = 0; task_at(i); i++) {
        if (!run->of[i]) continue;
        sized |= task_at(i)->size_name != NULL;
        measured |= !task_at(i)->size_name;
        if (task_at(i)->kind == TASK_TEXT && !a->corpus)
            return rf_fail(err, RF_ERR_ARGUMENT, "text: needs plain text, --corpus FILE");
    }
    if (a->size && !sized) return rf_fail(err, RF_ERR_ARGUMENT, "--size: none of these tasks has one (--length)");
    if (a->length && !measured) return rf_fail(err, RF_ERR_ARGUMENT, "--length: none of these tasks has one (--size)");
    return RF_OK;
}

static rf_status open_run(eval_run *run, rf_error *err) {
    const eval_args *a = &run->args;
    RF_TRY(check_sizes(run, err));
    const char *model = !a->model && run->kv.num > 0 ? KV_DEFAULT_MODEL : a->model;
    RF_TRY(open_text_model(&run->text, model, NULL, 0, a->device, (int)a->threads, a->dtype, &run->log, err));
    if (run->kv.num > 0) RF_TRY(kv_check_model(&run->text, "--kv-policy", err));
    RF_TRY(kv_settings_encode(&run->kv, &a->kv, &run->text, err));
    if (!run->text.tokenizer)
        return rf_fail(err, RF_ERR_MISSING, "%s: no tokenizer.json; tasks are texts", run->text.path);
    if (a->guide && text_is_causal(&run->text))
        return rf_fail(err, RF_ERR_ARGUMENT, "--guide: of diffusion language models; %s is autoregressive",
                       run->text.name);
    if (a->guide) RF_TRY(open_text_guide(&run->guide, &run->text, a->guide, err));
    RF_TRY(plan_settings(run, err));
    int num_tasks = 0, num_settings = run->plan.num * (run->kv.num > 0 ? run->kv.num : 1);
    for (int i = 0; task_at(i); i++) num_tasks += run->of[i];
    run->rows = rf_alloc_zero((size_t)num_tasks * (size_t)num_settings, sizeof *run->rows);
    if (!run->rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    progress_begin(&run->bar, num_tasks * (num_settings + 1) * (int)a->num_samples, a->quiet);
    return RF_OK;
}

/* ---- the table ---- */

static void setting_name(const eval_row *row, char *name, size_t room) {
    const sweep_setting *s = row->setting;
    snprintf(name, room, "%s%s%s", s->policy, s->options[0] && s->options[0] != '+' ? ":" : "", s->options);
}

static void print_number(int width, int digits, double value) {
    if (isfinite(value)) {
        printf(" %*.*f", width, digits, value);
    } else {
        printf(" %*s", width, "-");
    }
}

static const char *way_of(const kv_setting *kv) {
    return kv_is_none(kv) ? "-" : kv->agnostic ? "agnostic" : "aware";
}

static bool has_settings(const eval_run *run) {
    return run->plan.num > 1 || run->plan.items[0].options[0];
}

/* "snapkv", with settings of decoding behind it where there are some. */
static void kv_row_name(const eval_run *run, const eval_row *row, char *name, size_t room) {
    snprintf(name, room, "%s%s%s", row->kv->name, has_settings(run) ? " " : "",
             has_settings(run) ? row->setting->options : "");
}

static void print_kv_head(void) {
    printf("%-10s %-*s %11s %-8s %5s %7s %7s %7s %9s %9s %9s\n", "task", KV_COLUMN, "policy", "size", "question", "n",
           "exact %", "agree %", "kept %", "evictions", "score ms", "tokens/s");
}

static void print_kv_row(const eval_run *run, const eval_row *row) {
    char name[512], size[32];
    const text_score *s = &row->score;
    kv_row_name(run, row, name, sizeof name);
    kv_size_text(row->kv, size, sizeof size);
    printf("%-10s %-*s %11s %-8s", row->task, KV_COLUMN, name, size, way_of(row->kv));
    if (row->refused) {
        printf(" refused: ");
        print_clean(row->refused);
    } else {
        printf(" %5d", s->num);
        print_number(7, 1, 100 * s->exact_match);
        print_number(7, 1, 100 * row->agreement);
        print_number(7, 1, s->full_bytes > 0 ? 100 * s->kept_bytes / s->full_bytes : 100);
        print_number(9, 0, s->evictions);
        print_number(9, 2, s->score_ms + s->step_score_ms);
        print_number(9, 1, text_score_rate(s));
    }
    putchar('\n');
}

/* Of one task, policy and way: the row with the size of `like`; NULL = not measured. */
static const eval_row *find_row(const eval_run *run, const eval_row *first, const kv_setting *like) {
    for (int i = 0; i < run->num_rows; i++) {
        const eval_row *r = &run->rows[i];
        if (r->refused || r->task != first->task || r->setting != first->setting || !r->kv) continue;
        bool same = strcmp(r->kv->name, first->kv->name) == 0 && r->kv->agnostic == first->kv->agnostic;
        if (same && r->kv->budget == like->budget && fabs(r->kv->ratio - like->ratio) < 1e-12) return r;
    }
    return NULL;
}

/* Is `index` the first setting with its size? */
static bool is_new_size(const eval_run *run, int index) {
    const kv_setting *s = &run->kv.items[index];
    for (int i = 0; i < index; i++) {
        if (run->kv.items[i].budget == s->budget && fabs(run->kv.items[i].ratio - s->ratio) < 1e-12) return false;
    }
    return s->budget > 0 || s->ratio > 0;
}

/* Exact match by task and policy, a column a size; what needs no size stands in the first column of its own. */
static void print_kv_summary(const eval_run *run) {
    int num_sizes = 0;
    char text[512];
    for (int i = 0; i < run->kv.num; i++) num_sizes += is_new_size(run, i);
    if (run->args.json || run->num_measured < 2 || num_sizes == 0) return;
    printf("\nexact match, %%\n%-10s %-*s %-8s %7s", "task", KV_COLUMN, "policy", "question", "all");
    for (int i = 0; i < run->kv.num; i++) {
        if (!is_new_size(run, i)) continue;
        kv_size_text(&run->kv.items[i], text, sizeof text);
        printf(" %11s", text);
    }
    putchar('\n');
    for (int i = 0; i < run->num_rows; i++) {
        const eval_row *row = &run->rows[i];
        const kv_setting all = {0};
        if (!row->kv || row->refused) continue;
        bool first = true;
        for (int k = 0; k < i && first; k++) {
            const eval_row *r = &run->rows[k];
            first = r->refused || !r->kv || r->task != row->task || r->setting != row->setting ||
                    strcmp(r->kv->name, row->kv->name) != 0 || r->kv->agnostic != row->kv->agnostic;
        }
        if (!first) continue;
        kv_row_name(run, row, text, sizeof text);
        printf("%-10s %-*s %-8s", row->task, KV_COLUMN, text, way_of(row->kv));
        const eval_row *cell = find_row(run, row, &all);
        print_number(7, 1, cell ? 100 * cell->score.exact_match : NAN);
        for (int k = 0; k < run->kv.num; k++) {
            if (!is_new_size(run, k)) continue;
            cell = find_row(run, row, &run->kv.items[k]);
            print_number(11, 1, cell ? 100 * cell->score.exact_match : NAN);
        }
        putchar('\n');
    }
}

/* A policy cannot be seen to lose what the model does not have. */
static void say_weak_tasks(const eval_run *run) {
    for (int i = 0; i < run->num_rows; i++) {
        const eval_row *row = &run->rows[i];
        if (!row->kv || row->refused || !kv_is_none(row->kv) || row->score.exact_match >= VALID_SHARE) continue;
        say("%s: %.1f %% right with the full cache, under %.0f %%: its rows say little about policies", row->task,
            100 * row->score.exact_match, 100 * VALID_SHARE);
    }
}

static void print_head(void) {
    printf("%-10s %-*s %5s %7s %7s %9s %8s %10s %9s\n", "task", NAME_COLUMN, "setting", "n", "exact %", "agree %",
           "tokens/s", "passes", "row-passes", "ms");
}

static void print_row(const eval_row *row) {
    char name[512];
    setting_name(row, name, sizeof name);
    printf("%-10s %-*s", row->task, NAME_COLUMN, name);
    if (row->refused) {
        printf(" refused: ");
        print_clean(row->refused);
    } else if (isfinite(row->nll)) {
        printf(" %5d %.4f nats a token", row->score.num, row->nll);
    } else {
        printf(" %5d", row->score.num);
        print_number(7, 1, 100 * row->score.exact_match);
        print_number(7, 1, 100 * row->agreement);
        print_number(9, 1, text_score_rate(&row->score));
        print_number(8, 1, row->score.nfe);
        print_number(10, 1, row->score.row_passes);
        print_number(9, 1, row->score.ms);
    }
    putchar('\n');
}

/* All rows that are ready; nothing before one is measured: a command that only refuses prints no table. */
static void print_rows(eval_run *run) {
    if (run->args.json || run->num_measured == 0) return;
    progress_end(&run->bar); /* the lines below take its place */
    bool kv = run->kv.num > 0;
    if (run->num_printed == 0) (kv ? print_kv_head : print_head)();
    for (; run->num_printed < run->num_rows; run->num_printed++) {
        const eval_row *row = &run->rows[run->num_printed];
        if (row->kv) {
            print_kv_row(run, row);
        } else {
            print_row(row);
        }
    }
    fflush(stdout);
}

static cJSON *number_or_null(double value) {
    return isfinite(value) ? cJSON_CreateNumber(value) : cJSON_CreateNull();
}

static void add_kv_json(cJSON *o, const eval_row *row) {
    const kv_setting *kv = row->kv;
    const text_score *s = &row->score;
    bool none = kv_is_none(kv);
    cJSON_AddStringToObject(o, "kv_policy", kv->name);
    cJSON_AddItemToObject(o, "kv_ratio", kv->ratio > 0 ? cJSON_CreateNumber(kv->ratio) : cJSON_CreateNull());
    cJSON_AddItemToObject(o, "aware", none ? cJSON_CreateNull() : cJSON_CreateBool(!kv->agnostic));
    if (row->refused) return;
    cJSON_AddNumberToObject(o, "kv_budget", s->kv_budget);
    cJSON_AddNumberToObject(o, "kept_bytes", s->kept_bytes);
    cJSON_AddNumberToObject(o, "full_bytes", s->full_bytes);
    cJSON_AddNumberToObject(o, "evictions", s->evictions);
    cJSON_AddNumberToObject(o, "score_ms", s->score_ms);
    cJSON_AddNumberToObject(o, "step_score_ms", s->step_score_ms);
}

static rf_status print_json(const eval_run *run, rf_error *err) {
    cJSON *root = cJSON_CreateArray();
    for (int i = 0; i < run->num_rows; i++) {
        const eval_row *row = &run->rows[i];
        const text_score *s = &row->score;
        cJSON *o = cJSON_CreateObject();
        cJSON_AddItemToArray(root, o);
        cJSON_AddStringToObject(o, "task", row->task);
        cJSON_AddStringToObject(o, "policy", row->setting->policy);
        cJSON_AddStringToObject(o, "options", row->setting->options);
        cJSON_AddStringToObject(o, "model", run->text.name);
        if (row->kv) add_kv_json(o, row);
        if (row->refused) {
            cJSON_AddStringToObject(o, "refused", row->refused);
            continue;
        }
        cJSON_AddNumberToObject(o, "n", s->num);
        if (isfinite(row->nll)) {
            cJSON_AddNumberToObject(o, "nll", row->nll);
            continue;
        }
        cJSON_AddNumberToObject(o, "exact_match", s->exact_match);
        cJSON_AddItemToObject(o, "agreement", number_or_null(row->agreement));
        cJSON_AddNumberToObject(o, "tok_s", text_score_rate(s));
        cJSON_AddNumberToObject(o, "nfe", s->nfe);
        cJSON_AddNumberToObject(o, "row_passes", s->row_passes);
        cJSON_AddNumberToObject(o, "key_reads", s->key_reads);
        cJSON_AddNumberToObject(o, "ms", s->ms);
        cJSON_AddNumberToObject(o, "tokens", s->num_tokens);
        cJSON_AddNumberToObject(o, "answer_tokens", row->answer_tokens);
        cJSON_AddNumberToObject(o, "new", row->max_new);
        report_add_uint(o, "cache_bytes", s->cache_bytes);
        if (run->guide) cJSON_AddNumberToObject(o, "guide_ms", s->guide_ms);
        if (isfinite(s->external_reused)) cJSON_AddNumberToObject(o, "external_reused", s->external_reused);
    }
    return report_print_json(root, err);
}

/* ---- tasks ---- */

static bool is_refusal(rf_status st) {
    return st == RF_ERR_UNSUPPORTED || st == RF_ERR_CONFIG || st == RF_ERR_ARGUMENT || st == RF_ERR_DEVICE_MEMORY;
}

static eval_row *new_row(eval_run *run, int task, const sweep_setting *setting, const kv_setting *kv,
                         const text_samples *samples) {
    eval_row *row = &run->rows[run->num_rows++];
    *row = (eval_row){.task = task_at(task)->name, .setting = setting, .kv = kv, .agreement = NAN, .nll = NAN};
    if (samples) {
        row->answer_tokens = samples->answer_tokens;
        row->max_new = samples->max_new;
    }
    return row;
}

/* A refusal goes into the row, anything else is the command's. */
static rf_status refuse(eval_run *run, eval_row *row, rf_status st, rf_error *err) {
    if (!is_refusal(st)) return st;
    if (run->first_refusal.status == RF_OK) run->first_refusal = *err;
    row->refused = rf_strdup(err->message);
    if (!row->refused) return rf_fail(err, RF_ERR_MEMORY, "no memory for a message");
    print_rows(run);
    return RF_OK;
}

static void on_sample(void *user) {
    eval_run *run = user;
    run->num_done++;
    if (!run->bar.shown && run->num_done > 1)
        progress_begin(&run->bar, run->bar.total, run->args.quiet); /* after a line of the table */
    progress_update(&run->bar, run->num_done);
}

static rf_status options_of(const eval_run *run, const text_samples *samples, const sweep_setting *setting,
                            const kv_setting *kv, rf_decode_options *o, rf_error *err) {
    RF_TRY(text_score_options(o, &run->text, samples, &run->args.settings, setting, run->guide, 0, err));
    if (o->commit == RF_COMMIT_GUIDED && !o->guide)
        return rf_fail(err, RF_ERR_ARGUMENT, "commit guided: needs --guide MODEL");
    if (!kv) return RF_OK;
    kv_apply(kv, o);
    RF_TRY(rf_decode_options_check(o, run->text.model, samples->longest, err));
    o->kv_context = kv->agnostic; /* each sample's own */
    return RF_OK;
}

/* Does the setting decode as the reference does? */
static bool is_reference(const eval_run *run, const rf_decode_options *o) {
    rf_decode_options r = text_reference_options(o, &run->text);
    return !o->row_policy && o->reuse == RF_REUSE_NONE && o->commit == r.commit && o->confidence == r.confidence &&
           o->steps == 0 && o->alg_temp == r.alg_temp && o->end == r.end;
}

static rf_status eval_setting(eval_run *run, const text_samples *samples, const sweep_setting *setting,
                              const kv_setting *kv, const text_score *reference, rf_error *err) {
    eval_row *row = new_row(run, samples->task, setting, kv, samples);
    rf_decode_options o;
    text_score score = {0};
    bool warm = rf_backend_get_kind(run->text.backend) == RF_BACKEND_CUDA;
    rf_status st = options_of(run, samples, setting, kv, &o, err);
    if (st == RF_OK && reference->tokens && !kv && is_reference(run, &o)) {
        row->score = *reference;
        row->agreement = 1;
    } else if (st == RF_OK) {
        st = text_score_run(&score, &run->text, samples, &o, warm, on_sample, run, err);
        if (st == RF_OK && reference->tokens) row->agreement = text_score_agreement(&score, reference);
        row->score = score;
        text_score_free(&score);
    }
    row->score.tokens = NULL; /* numbers only */
    row->score.exact = NULL;
    if (st != RF_OK) return refuse(run, row, st, err);
    run->num_measured++;
    print_rows(run);
    return RF_OK;
}

/* One token a pass, every row, the whole cache; nothing if no setting can run. */
static rf_status make_reference(eval_run *run, const text_samples *samples, text_score *reference, rf_error *err) {
    rf_decode_options o;
    rf_error ignored = {0};
    rf_status st = RF_ERR_ARGUMENT;
    bool warm = rf_backend_get_kind(run->text.backend) == RF_BACKEND_CUDA;
    if ((text_is_causal(&run->text) && run->kv.num == 0) || run->args.no_agreement) return RF_OK;
    for (int i = 0; i < run->plan.num && st != RF_OK; i++)
        st = options_of(run, samples, &run->plan.items[i], NULL, &o, &ignored);
    if (st != RF_OK) return RF_OK; /* the rows say why */
    o = text_reference_options(&o, &run->text);
    return text_score_run(reference, &run->text, samples, &o, warm, on_sample, run, err);
}

/* Of setting i of the plan all there are; samples NULL: refused, as `why` says. */
static rf_status eval_policies(eval_run *run, int task, const sweep_setting *setting, const text_samples *samples,
                               const text_score *reference, const rf_error *why, rf_error *err) {
    bool both = !run->args.aware && !run->args.agnostic;
    rf_status st = RF_OK;
    for (int k = 0; k < (run->kv.num > 0 ? run->kv.num : 1) && st == RF_OK; k++) {
        const kv_setting *kv = run->kv.num > 0 ? &run->kv.items[k] : NULL;
        if (!samples) {
            *err = *why;
            st = refuse(run, new_row(run, task, setting, kv, NULL), why->status, err);
        } else if (!kv || !kv->agnostic || samples->contexts[0] > 0 ||
                   !both) { /* without a question there is one way */
            st = eval_setting(run, samples, setting, kv, reference, err);
        }
    }
    return st;
}

static rf_status eval_task(eval_run *run, int task, rf_error *err) {
    const eval_args *a = &run->args;
    text_samples samples;
    text_score reference = {0};
    rf_status st = text_samples_make(&samples, &run->text, task, (int)a->size, (size_t)a->length, (uint64_t)a->seed,
                                     (int)a->num_samples, (int32_t)a->num_new, err);
    if (st == RF_OK) {
        st = make_reference(run, &samples, &reference, err);
        for (int i = 0; i < run->plan.num && st == RF_OK; i++)
            st = eval_policies(run, task, &run->plan.items[i], &samples, &reference, NULL, err);
    } else if (is_refusal(st)) {
        rf_error why = *err;
        st = RF_OK;
        for (int i = 0; i < run->plan.num && st == RF_OK; i++)
            st = eval_policies(run, task, &run->plan.items[i], NULL, &reference, &why, err);
    }
    text_score_free(&reference);
    text_samples_free(&samples);
    return st;
}

/* ---- plain text ---- */

/* Evenly spread pieces of the corpus, so that a few say something about all of it. */
static rf_status nll_of(eval_run *run, const rf_token_ids *ids, eval_row *row, rf_error *err) {
    int64_t room = run->text.model->desc.max_positions;
    int32_t window = room < TEXT_WINDOW ? (int32_t)room : TEXT_WINDOW;
    int64_t pieces = (int64_t)(ids->num / (size_t)window), num = run->args.num_samples;
    if (num > pieces) num = pieces;
    if (num < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: %zu tokens of text, at least %d are needed", run->args.corpus,
                       ids->num, (int)window);
    rf_decode_options o = text_base_options(&run->text, 1);
    rf_decoder *decoder = NULL;
    RF_TRY(rf_decoder_create(&decoder, run->text.model, &o, window, err));
    rf_status st = RF_OK;
    double sum = 0;
    for (int64_t i = 0; i < num && st == RF_OK; i++) {
        double nll = 0;
        st = rf_decoder_nll(decoder, ids->ids + (size_t)(i * pieces / num) * (size_t)window, window, 1, &nll, err);
        if (st == RF_OK && cancel_requested()) st = rf_fail(err, RF_ERR_CANCELLED, "interrupted");
        sum += nll;
        on_sample(run);
    }
    rf_decoder_destroy(decoder);
    row->score.num = (int)num;
    if (st == RF_OK) row->nll = sum / (double)num;
    return st;
}

static rf_status eval_text(eval_run *run, int task, rf_error *err) {
    eval_row *row = new_row(run, task, &run->plan.items[0], NULL, NULL);
    rf_token_ids ids = {0};
    char *bytes = NULL;
    size_t num = 0;
    if (run->text.model->desc.attention == RF_TEXT_BIDIRECTIONAL) {
        rf_status st =
            rf_fail(err, RF_ERR_UNSUPPORTED, "the likelihood of a text is not known to a bidirectional model");
        return refuse(run, row, st, err);
    }
    rf_status st = rf_file_read(run->args.corpus, MAX_CORPUS, &bytes, &num, err);
    if (st == RF_OK) st = text_encode(&run->text, bytes, num, false, run->args.corpus, &ids, err);
    if (st == RF_OK) {
        st = nll_of(run, &ids, row, err);
        if (st == RF_OK) {
            run->num_measured++;
            print_rows(run);
        } else {
            st = refuse(run, row, st, err);
        }
    }
    rf_token_ids_clear(&ids);
    rf_free(bytes);
    return st;
}

/* ---- the command ---- */

static rf_status eval_all(eval_run *run, rf_error *err) {
    for (int i = 0; task_at(i); i++) {
        if (!run->of[i]) continue;
        RF_TRY(task_at(i)->kind == TASK_TEXT ? eval_text(run, i, err) : eval_task(run, i, err));
    }
    progress_end(&run->bar);
    if (run->num_measured > 0) {
        print_kv_summary(run);
        if (!run->args.quiet) say_weak_tasks(run);
        return run->args.json ? print_json(run, err) : RF_OK;
    }
    *err = run->first_refusal;
    return err->status;
}

static void close_run(eval_run *run) {
    progress_end(&run->bar);
    for (int i = 0; i < run->num_rows; i++) rf_free(run->rows[i].refused);
    rf_free(run->rows);
    sweep_plan_free(&run->plan);
    kv_settings_free(&run->kv);
    rf_text_model_close(run->guide);
    close_text_model(&run->text);
}

int cmd_eval(int argc, char **argv) {
    static eval_run run;
    rf_error err = {0};
    const char *tasks = NULL;
    args_result parsed = read_args(&run.args, &tasks, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    if (strcmp(tasks, "list") == 0) {
        list_tasks();
        return EXIT_OK;
    }
    run.log = program_log(run.args.quiet ? -1 : run.args.verbosity);
    cancel_install();
    char *names = NULL;
    rf_status st = plan_kv(&run, &err);
    if (st == RF_OK) st = kv_task_names(&names, tasks, run.kv.num > 0, run.args.quiet, &err);
    if (st == RF_OK)
        st = task_count() <= MAX_TASKS ? text_tasks_read(names, run.of, "tasks", &err)
                                       : rf_fail(&err, RF_ERR_STATE, "more than %d tasks", MAX_TASKS);
    rf_free(names);
    if (st == RF_OK) st = open_run(&run, &err);
    if (st == RF_OK) st = eval_all(&run, &err);
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
