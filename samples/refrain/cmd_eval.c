/* samples/refrain/cmd_eval.c - `refrain eval`: a text model on the built-in tasks, setting by setting.
 *
 * Sample i of a task is made from seed + i, so every setting and every model meets the same ones. Agreement is with the same model
 * decoding one token a pass and computing every row. The order is task by task, so that the reference is decoded once.
 * A setting that the model refuses is a row that says why; if all are refused the command fails. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"
#include "samples/refrain/text_score.h"

#define DEFAULT_SAMPLES 10
#define MAX_SAMPLES     100000
#define MAX_TASKS       64
#define OWN_ROWS        24
#define TEXT_WINDOW     512 /* tokens of a piece of plain text */
#define MAX_CORPUS      ((size_t)1 << 30)
#define NAME_COLUMN     44

typedef struct {
    const char *model, *synthetic, *guide, *corpus, *device, *dtype;
    arg_list policies;
    text_settings settings;
    int64_t num_samples, seed, size, length, num_new, threads;
    bool no_agreement, json, quiet;
    int verbosity;
} eval_args;

typedef struct {
    const char *task;
    const sweep_setting *setting; /* NULL: plain text */
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
        arg_flag("no-agreement", 0, "do not decode one token a pass to compare with", &a->no_agreement),
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
    const arg_spec spec = {.command = "refrain eval",
                           .usage = "TASK[,TASK...]|short|long|recall|all [options]",
                           .about =
                               "Scores a text model on built-in tasks whose answers are known: exact match, agreement "
                               "with uncached decoding, speed. refrain eval list names the tasks.",
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
    RF_TRY(open_text_model(&run->text, a->model, NULL, 0, a->device, (int)a->threads, a->dtype, &run->log, err));
    if (!run->text.tokenizer)
        return rf_fail(err, RF_ERR_MISSING, "%s: no tokenizer.json; tasks are texts", run->text.path);
    if (a->guide && text_is_causal(&run->text))
        return rf_fail(err, RF_ERR_ARGUMENT, "--guide: of diffusion language models; %s is autoregressive",
                       run->text.name);
    if (a->guide) RF_TRY(open_text_guide(&run->guide, &run->text, a->guide, err));
    RF_TRY(plan_settings(run, err));
    int num_tasks = 0;
    for (int i = 0; task_at(i); i++) num_tasks += run->of[i];
    run->rows = rf_alloc_zero((size_t)(num_tasks * run->plan.num), sizeof *run->rows);
    if (!run->rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    progress_begin(&run->bar, num_tasks * (run->plan.num + 1) * (int)a->num_samples, a->quiet);
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
    if (run->num_printed == 0) print_head();
    while (run->num_printed < run->num_rows) print_row(&run->rows[run->num_printed++]);
    fflush(stdout);
}

static cJSON *number_or_null(double value) {
    return isfinite(value) ? cJSON_CreateNumber(value) : cJSON_CreateNull();
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

static eval_row *new_row(eval_run *run, int task, const sweep_setting *setting, const text_samples *samples) {
    eval_row *row = &run->rows[run->num_rows++];
    *row = (eval_row){.task = task_at(task)->name, .setting = setting, .agreement = NAN, .nll = NAN};
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
                            rf_decode_options *o, rf_error *err) {
    RF_TRY(text_score_options(o, &run->text, samples, &run->args.settings, setting, run->guide, 0, err));
    if (o->commit == RF_COMMIT_GUIDED && !o->guide)
        return rf_fail(err, RF_ERR_ARGUMENT, "commit guided: needs --guide MODEL");
    return RF_OK;
}

/* Does the setting decode as the reference does? */
static bool is_reference(const eval_run *run, const rf_decode_options *o) {
    rf_decode_options r = text_reference_options(o, &run->text);
    return !o->row_policy && o->reuse == RF_REUSE_NONE && o->commit == r.commit && o->confidence == r.confidence &&
           o->steps == 0 && o->alg_temp == r.alg_temp && o->end == r.end;
}

static rf_status eval_setting(eval_run *run, const text_samples *samples, const sweep_setting *setting,
                              const text_score *reference, rf_error *err) {
    eval_row *row = new_row(run, samples->task, setting, samples);
    rf_decode_options o;
    text_score score = {0};
    bool warm = rf_backend_get_kind(run->text.backend) == RF_BACKEND_CUDA;
    rf_status st = options_of(run, samples, setting, &o, err);
    if (st == RF_OK && reference->tokens && is_reference(run, &o)) {
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

/* One token a pass, every row; nothing if no setting can run. */
static rf_status make_reference(eval_run *run, const text_samples *samples, text_score *reference, rf_error *err) {
    rf_decode_options o;
    rf_error ignored = {0};
    rf_status st = RF_ERR_ARGUMENT;
    bool warm = rf_backend_get_kind(run->text.backend) == RF_BACKEND_CUDA;
    if (text_is_causal(&run->text) || run->args.no_agreement) return RF_OK;
    for (int i = 0; i < run->plan.num && st != RF_OK; i++)
        st = options_of(run, samples, &run->plan.items[i], &o, &ignored);
    if (st != RF_OK) return RF_OK; /* the rows say why */
    o = text_reference_options(&o, &run->text);
    return text_score_run(reference, &run->text, samples, &o, warm, on_sample, run, err);
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
            st = eval_setting(run, &samples, &run->plan.items[i], &reference, err);
    } else if (is_refusal(st)) {
        rf_error why = *err;
        st = RF_OK;
        for (int i = 0; i < run->plan.num && st == RF_OK; i++) {
            *err = why;
            st = refuse(run, new_row(run, task, &run->plan.items[i], NULL), why.status, err);
        }
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
    eval_row *row = new_row(run, task, &run->plan.items[0], NULL);
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
    if (run->num_measured > 0) return run->args.json ? print_json(run, err) : RF_OK;
    *err = run->first_refusal;
    return err->status;
}

static void close_run(eval_run *run) {
    progress_end(&run->bar);
    for (int i = 0; i < run->num_rows; i++) rf_free(run->rows[i].refused);
    rf_free(run->rows);
    sweep_plan_free(&run->plan);
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
    rf_status st = task_count() <= MAX_TASKS ? text_tasks_read(tasks, run.of, "tasks", &err)
                                             : rf_fail(&err, RF_ERR_STATE, "more than %d tasks", MAX_TASKS);
    if (st == RF_OK) st = open_run(&run, &err);
    if (st == RF_OK) st = eval_all(&run, &err);
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
