/* samples/refrain/text_run.h - what the files of `refrain text` share.
 *
 *   cmd_text.c     the command: options, opening, the decode and what it is compared with
 *   text_prompt.c  where the prompt comes from: words, a file, ids, a task, a chat template
 *   text_report.c  what is said and printed about a run
 *   kv_args.c      the cache's policy and budget; kv_map.c a picture of what it keeps
 *   text_args.c    settings of decoding; text_model.c the model; text_show.c a decode as it happens */
#ifndef REFRAIN_TEXT_RUN_H
#define REFRAIN_TEXT_RUN_H

#include "samples/refrain/kv_args.h"
#include "samples/refrain/text_args.h"
#include "samples/refrain/text_model.h"

typedef struct {
    const char *model, *synthetic, *prompt, *file, *tokens, *task, *system, *guide, *device, *dtype, *trace;
    arg_list stops;
    cache_args cache;
    kv_args kv;
    const char *kv_map;
    text_settings settings;
    int64_t num_new, prompt_length, seed, threads, task_seed, task_size, task_length; /* 0 = not given, but seeds */
    bool chat, raw, ignore_eos, tune, compare, json, visual, quiet;
    int verbosity;
} text_args;

/* One decode. */
typedef struct {
    rf_decode_result result;
    int32_t *tokens; /* [result.num_all], own */
    rf_text text;    /* the completion */
    bool stopped;    /* by a stop string */
    double ms;       /* wall clock, with the prefill */
} text_outcome;

typedef struct {
    text_args args;
    opened_text text;
    rf_log log;
    rf_text_model *guide;
    rf_policy *policy;
    char *cache_options, *tuning_path;
    kv_settings kv; /* one, or none */

    rf_token_ids prompt;
    int task; /* -1 = none */
    char *task_prompt, *task_answer;
    uint64_t seed;

    rf_decode_options options;
    text_outcome own, reference; /* reference: --compare */
    double load_ms;
} text_run;

/* ---- text_prompt.c ---- */

/* What can be said about the choice of prompt before a model is loaded. */
rf_status text_prompt_check(const text_args *args, rf_error *err);
/* run->prompt, and of a task its answer. */
rf_status text_prompt_make(text_run *run, rf_error *err);

/* ---- text_report.c ---- */

/* Of a set of tokens against another: equal places over the longer one's length, 1 if both are empty. *first: where they part, -1 = nowhere. */
double text_agreement(const int32_t *a, int32_t num_a, const int32_t *b, int32_t num_b, int32_t *first);
double text_rate(const text_outcome *outcome); /* tokens a second behind the prefill */
void text_say_result(const text_run *run);
rf_status text_print_json(const text_run *run, rf_error *err);

#endif
