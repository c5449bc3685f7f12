/* samples/refrain/kv_args.h - the flags that put the cache of an autoregressive model under a budget: one setting for `refrain text`,
 * lists for `refrain eval`, `refrain sweep` and `refrain bench`.
 *
 * A spec is what rf_kv_rule_parse takes, with '+' or ',' between options: "snapkv", "snapkv:window=16+pool=avg",
 * "score=attention,alloc=cake". In a list a comma ends a spec unless an option follows that can belong to it. */
#ifndef REFRAIN_KV_ARGS_H
#define REFRAIN_KV_ARGS_H

#include "dlm/decode.h"
#include "samples/refrain/args.h"
#include "samples/refrain/text_model.h"

#define KV_DEFAULT_MODEL "text-ar" /* where a policy is given and no model */

typedef struct {
    arg_list policies, options;
    const char *budgets, *ratios; /* numbers with commas between; NULL = not given */
    const char *episode;          /* text whose queries score a rule of queries=external, or NULL */
    const char *flag;             /* that policies come from, for messages; NULL = --kv-policy */
} kv_args;

/* Rows of an option table; k is a kv_args *. */
#define KV_ARG_ROWS(k)                                                                                                 \
    arg_strings("kv-policy", 0, "SPEC", "what an autoregressive cache keeps (all)", &(k)->policies),                   \
        arg_string("kv-budget", 0, "N", "of that: tokens a layer and key head", &(k)->budgets),                        \
        arg_string("kv-ratio", 0, "R", "or so much of the prompt, up to 1", &(k)->ratios),                             \
        arg_strings("kv-option", 0, "K=V,...", "of that; keys: refrain policies", &(k)->options)
#define KV_EPISODE_ROW(k)                                                                                              \
    arg_string("kv-episode", 0, "TEXT", "what queries=external asks of a prompt (epicache)", &(k)->episode)
#define KV_LIST_ROWS(k, usual)                                                                                         \
    arg_strings("kv-policy", 0, "SPEC,...", "what an autoregressive cache keeps", &(k)->policies),                     \
        arg_string("kv-budget", 0, "N,...", "of that: tokens a layer and key head", &(k)->budgets),                    \
        arg_string("kv-ratio", 0, "R,...", "shares of the prompt (default: " usual ")", &(k)->ratios),                 \
        arg_strings("kv-option", 0, "K=V,...", "of each policy but none", &(k)->options)

/* A policy with a size and a way to compress. */
typedef struct kv_setting {
    char *name; /* as it was given, '+' between options; "none" */
    rf_kv_rule rule;
    int32_t budget;              /* 0 = by ratio */
    double ratio;                /* 0 = by budget */
    bool agnostic;               /* the part of the prompt before its question is compressed without it */
    const rf_token_ids *episode; /* the settings' */
} kv_setting;

typedef struct {
    kv_setting *items;
    int num, room;
    rf_token_ids episode;
} kv_settings; /* zero = empty */

enum { KV_AWARE = 1, KV_AGNOSTIC = 2 };

bool kv_args_given(const kv_args *args);
/* Every policy with every size and every way of `ways`. `none` keeps everything and is one setting, as is what needs no size where
 * none is given. default_ratios: NULL = a size must be given, and there is one setting at most (`refrain text`). RF_ERR_ARGUMENT. */
rf_status kv_settings_make(kv_settings *out, const kv_args *args, unsigned ways, const char *default_ratios,
                           rf_error *err);
void kv_settings_free(kv_settings *settings);
/* The episode's text to tokens, for all settings: given and wanted by a rule, or neither. RF_ERR_ARGUMENT. */
rf_status kv_settings_encode(kv_settings *settings, const kv_args *args, const opened_text *text, rf_error *err);

bool kv_is_none(const kv_setting *setting);
/* "0.5", "128 tokens", "all". */
void kv_size_text(const kv_setting *setting, char *out, size_t room);
/* RF_ERR_ARGUMENT unless the model is autoregressive. flag: for the message. */
rf_status kv_check_model(const opened_text *text, const char *flag, rf_error *err);
/* The rule is borrowed. */
void kv_apply(const kv_setting *setting, rf_decode_options *options);

/* Names of tasks with commas between; with policies `kv` and `vt` become kv-long and vt-long, which is said unless quiet. rf_free. */
rf_status kv_task_names(char **out, const char *tasks, bool with_policies, bool quiet, rf_error *err);

/* Of a result of decoding with a rule. */
typedef struct {
    double kept_bytes, full_bytes, evictions;
    double score_ms, step_score_ms; /* behind the prompt; while decoding */
    int32_t budget;                 /* tokens a layer and key head; 0 = no limit */
} kv_numbers;
kv_numbers kv_numbers_of(const rf_decode_result *result);

/* Numbers with commas between: over `above`, up to `most`. At most `room`. option: for messages. */
rf_status kv_read_numbers(const char *text, const char *option, double above, double most, bool whole, double *out,
                          int room, int *num, rf_error *err);

#endif
