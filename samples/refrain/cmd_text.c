/* samples/refrain/cmd_text.c - `refrain text`: a prompt in, its completion out. text_run.h says which file does what.
 *
 * Everything that can be refused is refused before the first pass. Standard output gets the completion alone, or one JSON object; on a
 * terminal text appears as it becomes final. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "core/file.h"
#include "core/memory.h"
#include "samples/refrain/kv_map.h"
#include "samples/refrain/outputs.h"
#include "samples/refrain/program.h"
#include "samples/refrain/text_run.h"
#include "samples/refrain/text_show.h"

#define DEFAULT_SEED 42
#define MAX_NEW      1048576
#define OWN_ROWS     48

/* ---- options ---- */

static args_result read_args(text_args *a, int argc, char **argv) {
    *a = (text_args){.device = "auto", .dtype = "auto", .seed = DEFAULT_SEED};
    const arg_option own[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: text)", &a->model),
        arg_string("prompt", 'p', "TEXT", "completed as it is, unless --chat", &a->prompt),
        arg_string("file", 'f', "FILE", "the prompt from a file", &a->file),
        arg_string("tokens", 0, "IDS|FILE", "the prompt as ids, \"1,2,3\"", &a->tokens),
        arg_string("task", 0, "NAME", "a built-in task (refrain eval lists them)", &a->task),
        arg_int("task-seed", 0, "N", "which one (default: 0)", &a->task_seed, 0, 9e18),
        arg_int("task-size", 0, "N", "its size (default: drawn)", &a->task_size, 1, 1e6),
        arg_int("task-length", 0, "N", "bytes of its prompt (default: drawn)", &a->task_length, 1, 1e6),
        arg_flag("chat", 0, "through the model's chat template", &a->chat),
        arg_string("system", 0, "TEXT", "--chat: what the system says", &a->system),
        arg_flag("raw", 0, "not through it (default)", &a->raw),
        arg_int("num", 'n', "N", "new tokens; the canvas (default: model's, or 128)", &a->num_new, 1, MAX_NEW),
        arg_int("seed", 's', "N", "of draws; negative: random (default: 42)", &a->seed, -9e18, 9e18),
        arg_strings("stop", 0, "TEXT", "end before this text; may be repeated", &a->stops),
        arg_flag("ignore-eos", 0, "go on behind an end of text", &a->ignore_eos),
        arg_string("cache-mode", 0, "NAME", "a row policy of refrain policies (default: none)", &a->cache.mode),
        arg_strings("cache-option", 0, "K=V,...", "its options: refrain policies NAME", &a->cache.options),
        arg_flag("force", 0, "use a policy that does not fit", &a->cache.force),
        KV_ARG_ROWS(&a->kv),
        KV_EPISODE_ROW(&a->kv),
        arg_string("kv-map", 0, "FILE.png", "a picture of what the policy keeps", &a->kv_map),
    };
    const arg_option late[] = {
        arg_string("guide", 0, "MODEL", "autoregressive, of --commit guided (text-ar)", &a->guide),
        arg_flag("diffusion-visual", 0, "show the canvas filling in", &a->visual),
        arg_flag("compare", 0, "also uncached, one token a pass: agreement", &a->compare),
        arg_string("trace", 0, "FILE", "a line a pass: rows, keys, tokens", &a->trace),
        TEXT_DEVICE_ROWS(a),
        arg_string("synthetic-weights", 0, "NAME", "random weights: llada-8b, llama-3-8b, ...", &a->synthetic),
        arg_int("prompt-length", 0, "N", "of their random prompt (default: 32)", &a->prompt_length, 1, MAX_NEW),
        arg_flag("tune", 0, "CUDA: time GEMM algorithms first", &a->tune),
        arg_flag("json", 0, "a JSON object instead of the text", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
        arg_count("verbose", 'v', "say more; twice for debugging", &a->verbosity),
    };
    arg_option options[OWN_ROWS + TEXT_MAX_SETTINGS];
    size_t num = 0;
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) options[num++] = own[i];
    num += text_setting_rows(&a->settings, options + num);
    for (size_t i = 0; i < sizeof late / sizeof late[0]; i++) options[num++] = late[i];
    const arg_spec spec = {.command = "refrain text",
                           .usage = "[options]",
                           .about = "Completes a prompt with a diffusion or an autoregressive language model.",
                           .options = options,
                           .num_options = num};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result == ARGS_OK && a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    return result;
}

/* ---- opening ---- */

/* What can be said about the cache's policy before a model is loaded. */
static rf_status plan_kv(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    RF_TRY(kv_settings_make(&run->kv, &a->kv, KV_AWARE, NULL, err));
    if (!a->kv_map) return RF_OK;
    if (run->kv.num == 0) return rf_fail(err, RF_ERR_ARGUMENT, "--kv-map: no policy is chosen (--kv-policy)");
    return output_check(a->kv_map, err);
}

static rf_status open_model(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    double start = now_ms();
    const char *model = !a->model && !a->synthetic && run->kv.num > 0 ? KV_DEFAULT_MODEL : a->model;
    RF_TRY(open_text_model(&run->text, model, a->synthetic, 0, a->device, (int)a->threads, a->dtype, &run->log, err));
    if (run->kv.num > 0) RF_TRY(kv_check_model(&run->text, "--kv-policy", err));
    RF_TRY(kv_settings_encode(&run->kv, &a->kv, &run->text, err));
    if (a->tune && rf_backend_get_kind(run->text.backend) != RF_BACKEND_CUDA)
        return rf_fail(err, RF_ERR_ARGUMENT, "--tune chooses CUDA GEMM algorithms; the device is %s",
                       rf_backend_name(run->text.backend));
    if (a->guide) RF_TRY(open_text_guide(&run->guide, &run->text, a->guide, err));
    run->load_ms = now_ms() - start;
    return RF_OK;
}

/* What only one kind of model has. */
static rf_status check_kind(const text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    const char *flag = run->policy  ? "--cache-mode"
                       : a->guide   ? "--guide"
                       : a->visual  ? "--diffusion-visual"
                       : a->compare ? "--compare"
                                    : NULL;
    if (!text_is_causal(&run->text) || !flag) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: of diffusion language models; %s is autoregressive", flag,
                   run->text.name);
}

static rf_status plan_options(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    rf_decode_options o = text_base_options(&run->text, (int32_t)a->num_new);
    RF_TRY(check_kind(run, err));
    RF_TRY(text_settings_apply(&a->settings, "--", run->text.model, &o, err));
    o.seed = run->seed;
    o.ignore_eos = a->ignore_eos;
    o.row_policy = run->policy;
    o.force_policy = a->cache.force;
    if (o.commit == RF_COMMIT_GUIDED && !run->guide && !text_is_causal(&run->text))
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--commit guided: needs --guide MODEL, an autoregressive model with the same "
                       "tokenizer (text-ar beside the shipped models)");
    if (run->guide && o.commit != RF_COMMIT_GUIDED) return rf_fail(err, RF_ERR_ARGUMENT, "--guide: of --commit guided");
    o.guide = run->guide;
    o.record_trace = a->trace != NULL;
    if (run->kv.num > 0) kv_apply(&run->kv.items[0], &o);
    o.tune_gemm = a->tune;
    run->tuning_path = tuning_cache_path(a->tune);
    o.gemm_tuning = run->tuning_path;
    run->options = o;
    return rf_decode_options_check(&o, run->text.model, (int32_t)run->prompt.num, err);
}

static rf_status plan_run(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    uint32_t random = 0;
    run->seed = (uint64_t)a->seed;
    if (a->seed < 0) {
        if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) random = (uint32_t)(now_ms() * 1e3);
        run->seed = random;
    }
    RF_TRY(text_prompt_make(run, err));
    int64_t room = run->text.model->desc.max_positions;
    if ((int64_t)run->prompt.num >= room)
        return rf_fail(err, RF_ERR_ARGUMENT, "the prompt has %zu tokens, the model %jd positions", run->prompt.num,
                       (intmax_t)room);
    return plan_options(run, err);
}

/* ---- decoding ---- */

static rf_status keep(text_outcome *out, text_show *show, const rf_decode_result *r, rf_error *err) {
    out->result = *r;
    out->result.tokens = NULL;
    out->stopped = show->stopped;
    out->tokens = rf_alloc_zero((size_t)r->num_all + 1, sizeof *out->tokens);
    if (!out->tokens) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d tokens", (int)r->num_all);
    memcpy(out->tokens, r->tokens, (size_t)r->num_all * sizeof *out->tokens);
    /* What stands behind a stop string was never wanted; masks that an interrupted canvas is left with are no tokens. */
    if (show->stopped) out->result.num_tokens = show->num_final;
    out->text = show->out;
    show->out = (rf_text){0};
    return RF_OK;
}

static rf_status interrupted(rf_error *err) {
    return rf_fail(err, RF_ERR_CANCELLED, "interrupted");
}

static rf_status decode(text_run *run, rf_decoder *decoder, const rf_decode_options *o, bool shown, text_outcome *out,
                        rf_error *err) {
    const text_args *a = &run->args;
    rf_decode_result r;
    text_show show;
    text_show_begin(&show, &run->text, o, &a->stops);
    show.stream = shown && !a->json && !a->visual && isatty(STDOUT_FILENO);
    show.visual = shown && a->visual;
    double start = now_ms();
    rf_status st =
        rf_decoder_run(decoder, o, run->prompt.ids, (int32_t)run->prompt.num, text_show_progress, &show, &r, err);
    double ms = now_ms() - start;
    if (st == RF_OK && cancel_requested()) st = interrupted(err);
    if (st == RF_OK) st = text_show_end(&show, r.tokens, r.num_tokens, err);
    if (show.stream && (st != RF_OK || show.num_printed > 0)) putchar('\n');
    if (st == RF_OK) st = keep(out, &show, &r, err);
    out->ms = ms;
    text_show_free(&show);
    return st;
}

static void free_outcome(text_outcome *out) {
    rf_free(out->tokens);
    rf_text_clear(&out->text);
    *out = (text_outcome){0};
}

static void trace_line(void *user, const char *line) {
    rf_file_writer_write(user, line, strlen(line));
    rf_file_writer_write(user, "\n", 1);
}

static rf_status save_map(const text_run *run, rf_decoder *decoder, const text_outcome *out, rf_error *err) {
    const kv_setting *setting = &run->kv.items[0];
    kv_map map;
    rf_status st = kv_map_read(&map, decoder, &run->text, (int32_t)run->prompt.num, out->result.num_all, err);
    map.policy = setting->name;
    map.budget = kv_numbers_of(&out->result).budget;
    if (st == RF_OK) st = kv_map_save(&map, run->args.kv_map, err);
    kv_map_free(&map);
    return st;
}

/* On CUDA the first run captures graphs: where times are compared it does not count. */
static rf_status decode_warm(text_run *run, const rf_decode_options *o, bool shown, text_outcome *out,
                             rf_file_writer *trace, rf_error *err) {
    rf_decoder *decoder = NULL;
    int32_t capacity = (int32_t)run->prompt.num + o->max_new;
    bool warms_up = run->args.compare && rf_backend_get_kind(run->text.backend) == RF_BACKEND_CUDA;
    rf_status st = rf_decoder_create(&decoder, run->text.model, o, capacity, err);
    if (st == RF_OK && warms_up) st = decode(run, decoder, o, false, out, err);
    if (warms_up) free_outcome(out);
    if (st == RF_OK) st = decode(run, decoder, o, shown, out, err);
    if (st == RF_OK && trace) st = rf_decoder_write_trace(decoder, trace_line, trace, err);
    if (st == RF_OK && run->args.kv_map) st = save_map(run, decoder, out, err);
    rf_decoder_destroy(decoder);
    return st;
}

static rf_status run_text(text_run *run, rf_error *err) {
    rf_file_writer *trace = NULL;
    if (run->args.trace) RF_TRY(rf_file_writer_open(&trace, run->args.trace, err));
    rf_status st = decode_warm(run, &run->options, true, &run->own, trace, err);
    if (st == RF_OK && run->args.compare) {
        rf_decode_options reference = text_reference_options(&run->options, &run->text);
        st = decode_warm(run, &reference, false, &run->reference, NULL, err);
    }
    if (st != RF_OK) {
        rf_file_writer_discard(trace);
        return st;
    }
    return trace ? rf_file_writer_commit(trace, err) : RF_OK;
}

static rf_status print_result(const text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    if (a->json) return text_print_json(run, err);
    if (isatty(STDOUT_FILENO) && !a->visual) {
        if (run->own.text.num == 0) putchar('\n');
        return RF_OK; /* it has been streamed */
    }
    text_print(run->own.text.bytes, run->own.text.num);
    putchar('\n');
    fflush(stdout);
    return RF_OK;
}

static void close_run(text_run *run) {
    free_outcome(&run->own);
    free_outcome(&run->reference);
    rf_token_ids_clear(&run->prompt);
    rf_policy_destroy(run->policy);
    kv_settings_free(&run->kv);
    rf_free(run->cache_options);
    rf_free(run->tuning_path);
    rf_free(run->task_prompt);
    rf_free(run->task_answer);
    rf_text_model_close(run->guide);
    close_text_model(&run->text);
}

int cmd_text(int argc, char **argv) {
    static text_run run;
    rf_error err = {0};
    run.task = -1;
    args_result parsed = read_args(&run.args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    run.log = program_log(run.args.quiet ? -1 : run.args.verbosity);
    cancel_install();

    rf_status st = text_prompt_check(&run.args, &err);
    if (st == RF_OK) st = text_row_policy(&run.policy, &run.args.cache, &err);
    if (st == RF_OK) st = plan_kv(&run, &err);
    if (st == RF_OK && run.args.trace) st = output_check(run.args.trace, &err);
    if (st == RF_OK) st = open_model(&run, &err);
    if (st == RF_OK && run.policy) {
        run.cache_options = cache_options_text(run.policy, false);
        if (!run.cache_options) st = rf_fail(&err, RF_ERR_MEMORY, "no memory for the options of a policy");
    }
    if (st == RF_OK) st = plan_run(&run, &err);
    if (st == RF_OK) st = run_text(&run, &err);
    if (st == RF_OK) st = print_result(&run, &err);
    if (st == RF_OK && !run.args.quiet) text_say_result(&run);
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
