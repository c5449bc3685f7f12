/* samples/refrain/text_args.h - the options of text decoding: one table for `refrain text`, for `refrain eval` and for the specs of
 * `--policy`. A setting has the same name and the same values everywhere. */
#ifndef REFRAIN_TEXT_ARGS_H
#define REFRAIN_TEXT_ARGS_H

#include "dlm/decode.h"
#include "samples/refrain/args.h"
#include "samples/refrain/cache_args.h"

#define TEXT_MAX_SETTINGS 32

/* Values as they were given; NULL = not. In the order of text_setting_at. */
typedef struct {
    const char *values[TEXT_MAX_SETTINGS];
    bool refresh_rows; /* --reuse-refresh-rows */
} text_settings;

/* Of the table; NULL past the end. BOOL settings are flags on a command line. */
const rf_policy_option *text_setting_at(int index);
int text_setting_find(const char *name); /* -1: none of that name */

/* Rows of an option table that fill s. Returns their number, at most TEXT_MAX_SETTINGS. */
size_t text_setting_rows(text_settings *s, arg_option *rows);

/* One value alone: RF_ERR_ARGUMENT if it can never be right. */
rf_status text_setting_check(int index, const char *value, rf_error *err);

/* Onto the defaults of a model. prefix: what stands before a name in messages, "--" or "". A setting that would do nothing, or that
 * belongs to the other kind of model, is refused: RF_ERR_ARGUMENT. */
rf_status text_settings_apply(const text_settings *s, const char *prefix, const rf_text_model *model,
                              rf_decode_options *options, rf_error *err);

/* "commit=threshold+threshold=0.9" into s, whose values then point into text, which is cut up. */
rf_status text_settings_read(text_settings *s, char *text, rf_error *err);

/* Values of `more` take the place of those of s. */
void text_settings_merge(text_settings *s, const text_settings *more);

const char *text_commit_name(rf_commit_rule rule);
const char *text_end_name(rf_end_rule rule);
const char *text_reuse_name(rf_attention_reuse reuse);

/* --cache-mode, --cache-option and --force of a text model: *out NULL for none. A feature policy is refused by name. */
rf_status text_row_policy(rf_policy **out, const cache_args *args, rf_error *err);

/* Rows that all commands with text models share. */
#define TEXT_DEVICE_ROWS(a)                                                                                            \
    arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &(a)->device),                          \
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &(a)->dtype, "auto f32 bf16"),     \
        arg_int("threads", 't', "N", "CPU threads (default: all)", &(a)->threads, 1, 1024)

#endif
