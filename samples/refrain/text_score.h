/* samples/refrain/text_score.h - a text model on samples of the built-in tasks: what `refrain eval` and a sweep of text measure. */
#ifndef REFRAIN_TEXT_SCORE_H
#define REFRAIN_TEXT_SCORE_H

#include "samples/refrain/progress.h"
#include "samples/refrain/sweep_plan.h"
#include "samples/refrain/text_args.h"
#include "samples/refrain/text_model.h"
#include "samples/tasks/tasks.h"

/* The first `num` samples of one task from a seed on. */
typedef struct {
    int task;
    int num;
    char **prompts, **answers;
    rf_token_ids *ids;    /* [num] prompts */
    int32_t *contexts;    /* [num] tokens of a prompt before its question; 0 = the task asks none */
    int32_t max_new;      /* tokens to make: the longest answer and its end of text, to whole blocks */
    int32_t longest;      /* prompt */
    double answer_tokens; /* mean */
} text_samples;

/* size, length: whichever the task is sized by; 0 = as it draws them, of a length 1024 bytes. max_new: 0 = as
 * above. RF_ERR_ARGUMENT: a size out of range, samples that do not fit the model. */
rf_status text_samples_make(text_samples *out, const opened_text *text, int task, int size, size_t length,
                            uint64_t seed, int num, int32_t max_new, rf_error *err);
void text_samples_free(text_samples *samples);

/* "all", "short", "long", "recall" or names with commas between, in the order of the task table; of[task] says which. `text` is never in
 * a group. what: for messages. */
rf_status text_tasks_read(const char *names, bool *of, const char *what, rf_error *err);

/* All samples of a task with one setting. Means are over samples. */
typedef struct {
    int num;
    int32_t stride;     /* = max_new */
    int32_t *tokens;    /* [num][stride] before the end of text, -1 behind */
    double *exact;      /* [num] 1 right, 0 wrong */
    double exact_match; /* mean */
    double ms, nfe, row_passes, key_reads, guide_ms;
    double num_tokens; /* mean, before the end of text */
    double total_ms;
    size_t cache_bytes, arena_bytes;
    double external_reused; /* share of rows; NaN = no attention reuse */
    /* of a KV policy, means; 0 = none */
    double kept_bytes, full_bytes, evictions, score_ms, step_score_ms, kv_budget;
} text_score;

/* Options of a setting for these samples: the model's, base (of the command line), the setting's own. guide may be NULL. */
rf_status text_score_options(rf_decode_options *out, const opened_text *text, const text_samples *samples,
                             const text_settings *base, const sweep_setting *setting, const rf_text_model *guide,
                             uint64_t seed, rf_error *err);
/* Where options->kv_context is not 0 each sample's own context takes its place, which it must have.
 * on_sample, if there is one, is called after each. Interrupted: RF_ERR_CANCELLED. warm: a first run over them that does not
 * count. */
rf_status text_score_run(text_score *out, const opened_text *text, const text_samples *samples,
                         const rf_decode_options *options, bool warm, void (*on_sample)(void *user), void *user,
                         rf_error *err);
/* The same decoder for several runs, as a sweep does; out is made once by text_score_alloc. */
rf_status text_score_alloc(text_score *out, const text_samples *samples, rf_error *err);
rf_status text_score_with(text_score *out, rf_decoder *decoder, const opened_text *text, const text_samples *samples,
                          const rf_decode_options *options, void (*on_sample)(void *user), void *user, rf_error *err);
void text_score_free(text_score *score);

/* Mean over samples of the share of equal tokens. */
double text_score_agreement(const text_score *a, const text_score *b);
double text_score_rate(const text_score *score); /* tokens a second */

#endif
