/* samples/refrain/text_prompt.c - where a prompt comes from. */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/chat_template.h"
#include "samples/refrain/text_run.h"
#include "samples/tasks/tasks.h"

#define MAX_PROMPT_BYTES ((size_t)64 << 20)
#define DEFAULT_LENGTH   32 /* rows of a random prompt */

static rf_status find_task(int *out, const char *name, rf_error *err) {
    char names[512];
    size_t used = 0, len = 0;
    *out = task_find(name);
    if (*out >= 0 && task_at(*out)->kind != TASK_TEXT) return RF_OK;
    for (int i = 0; task_at(i); i++) {
        if (task_at(i)->kind != TASK_TEXT)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? " " : "", task_at(i)->name);
    }
    const char *near = args_nearest(name, names, &len);
    return rf_fail(err, RF_ERR_ARGUMENT, "--task: no '%s'%s%.*s (one of: %s)", name, near ? "; did you mean " : "",
                   near ? (int)len : 0, near ? near : "", names);
}

rf_status text_prompt_check(const text_args *a, rf_error *err) {
    const char *names[] = {"--prompt", "--file", "--tokens", "--task"}, *first = NULL;
    const char *given[] = {a->prompt, a->file, a->tokens, a->task};
    for (int i = 0; i < 4; i++) {
        if (!given[i]) continue;
        if (first) return rf_fail(err, RF_ERR_ARGUMENT, "%s and %s exclude each other", first, names[i]);
        first = names[i];
    }
    if (a->synthetic && first && !a->tokens)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: --synthetic-weights has no tokenizer; give ids with --tokens", first);
    if (a->prompt_length && (first || !a->synthetic))
        return rf_fail(err, RF_ERR_ARGUMENT, "--prompt-length: of the random prompt of --synthetic-weights");
    if (!first && !a->synthetic)
        return rf_fail(err, RF_ERR_ARGUMENT, "expected a prompt (--prompt, --file, --tokens or --task), found none");
    if (a->chat && a->raw) return rf_fail(err, RF_ERR_ARGUMENT, "--chat and --raw exclude each other");
    if (a->chat && (a->tokens || a->synthetic || a->task))
        return rf_fail(err, RF_ERR_ARGUMENT, "--chat: of a prompt in words; %s is given as it stands",
                       a->task ? "--task" : "--tokens");
    if (a->system && !a->chat) return rf_fail(err, RF_ERR_ARGUMENT, "--system: of --chat");
    if ((a->task_size || a->task_length || a->task_seed) && !a->task)
        return rf_fail(err, RF_ERR_ARGUMENT, "--task-%s: of --task",
                       a->task_size     ? "size"
                       : a->task_length ? "length"
                                        : "seed");
    for (int i = 0; i < a->stops.count; i++) {
        if (!a->stops.items[i][0]) return rf_fail(err, RF_ERR_ARGUMENT, "--stop: expected a text, found an empty one");
    }
    int task;
    return a->task ? find_task(&task, a->task, err) : RF_OK;
}

/* ---- ids ---- */

/* Numbers with commas or white space between; brackets around them do no harm. */
static rf_status read_ids(text_run *run, const char *text, const char *what, rf_error *err) {
    for (const char *c = text; *c;) {
        if (isspace((unsigned char)*c) || *c == ',' || *c == '[' || *c == ']') {
            c++;
            continue;
        }
        char *end = NULL;
        errno = 0;
        long long v = strtoll(c, &end, 10);
        bool ends = !*end || isspace((unsigned char)*end) || *end == ',' || *end == ']';
        if (end == c || !ends) {
            char word[24];
            snprintf(word, sizeof word, "%.*s", (int)strcspn(c, ", \t\r\n]"), c);
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected ids with commas between, found '%s'", what, word);
        }
        int64_t vocab = run->text.model->desc.vocab;
        if (errno == ERANGE || v < 0 || v >= vocab)
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: id %.*s is out of range: %s has ids 0..%jd", what, (int)(end - c),
                           c, run->text.name, (intmax_t)vocab - 1);
        int32_t id = (int32_t)v;
        RF_TRY(rf_token_ids_append(&run->prompt, &id, 1, err));
        c = end;
    }
    return RF_OK;
}

static rf_status read_file(const char *path, char **bytes, size_t *num, rf_error *err) {
    return rf_file_read(path, MAX_PROMPT_BYTES, bytes, num, err);
}

static rf_status ids_of(text_run *run, rf_error *err) {
    const char *tokens = run->args.tokens;
    if (!rf_path_exists(tokens)) return read_ids(run, tokens, "--tokens", err);
    char *bytes = NULL;
    size_t num = 0;
    rf_status st = read_file(tokens, &bytes, &num, err);
    if (st == RF_OK) st = read_ids(run, bytes, tokens, err);
    rf_free(bytes);
    return st;
}

/* Spread over the vocabulary, but for the mask and ends of text. */
static rf_status random_ids(text_run *run, rf_error *err) {
    const rf_text_desc *d = &run->text.model->desc;
    int64_t num = run->args.prompt_length ? run->args.prompt_length : DEFAULT_LENGTH;
    uint64_t state = run->seed;
    for (int64_t i = 0; i < num;) {
        state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        int32_t id = (int32_t)((state >> 33) % (uint64_t)d->vocab);
        bool special = id == d->mask_id;
        for (int e = 0; e < d->num_eos; e++) special |= id == d->eos_ids[e];
        if (special) continue;
        RF_TRY(rf_token_ids_append(&run->prompt, &id, 1, err));
        i++;
    }
    return RF_OK;
}

/* ---- words ---- */

static rf_status through_template(text_run *run, const char *bytes, size_t num, const char *what, rf_error *err) {
    const text_args *a = &run->args;
    rf_chat_template *template = NULL;
    rf_text text = {0};
    rf_chat_message messages[2];
    const rf_chat_options options = {.add_generation_prompt = true};
    size_t num_messages = 0;
    if (a->system) messages[num_messages++] = (rf_chat_message){"system", a->system, strlen(a->system)};
    messages[num_messages++] = (rf_chat_message){"user", bytes, num};
    if (text_utf8_valid(bytes, num) < num)
        return text_encode(&run->text, bytes, num, false, what, &run->prompt, err); /* which says where */
    if (a->system && text_utf8_valid(a->system, strlen(a->system)) < strlen(a->system))
        return rf_fail(err, RF_ERR_ARGUMENT, "--system: not valid UTF-8");
    rf_status st = rf_chat_template_open(&template, run->text.path, err);
    if (st == RF_ERR_MISSING || st == RF_ERR_UNSUPPORTED)
        st = rf_fail_prefix(err, st, "--chat (--raw completes a prompt as it is)");
    if (st == RF_OK) st = rf_chat_template_render(template, messages, num_messages, &options, &text, err);
    if (st == RF_OK) st = text_encode(&run->text, text.bytes, text.num, false, what, &run->prompt, err);
    rf_chat_template_close(template);
    rf_text_clear(&text);
    return st;
}

static rf_status words_of(text_run *run, const char *bytes, size_t num, const char *what, rf_error *err) {
    if (num == 0) return rf_fail(err, RF_ERR_ARGUMENT, "%s: the prompt is empty", what);
    if (run->args.chat) return through_template(run, bytes, num, what, err);
    return text_encode(&run->text, bytes, num, true, what, &run->prompt, err);
}

static rf_status file_of(text_run *run, rf_error *err) {
    char *bytes = NULL;
    size_t num = 0;
    rf_status st = read_file(run->args.file, &bytes, &num, err);
    if (st == RF_OK) st = words_of(run, bytes, num, run->args.file, err);
    rf_free(bytes);
    return st;
}

static rf_status task_of(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    const task_settings settings = {.size = (int)a->task_size, .length = (size_t)a->task_length};
    RF_TRY(find_task(&run->task, a->task, err));
    const task_info *info = task_at(run->task);
    run->task_prompt = rf_alloc(TASK_MAX_PROMPT);
    run->task_answer = rf_alloc(TASK_MAX_ANSWER);
    if (!run->task_prompt || !run->task_answer) return rf_fail(err, RF_ERR_MEMORY, "no memory for a task");
    if (task_generate(run->task, (uint64_t)a->task_seed, &settings, run->task_prompt, TASK_MAX_PROMPT, run->task_answer,
                      TASK_MAX_ANSWER) != 0) {
        if (info->size_name)
            return rf_fail(err, RF_ERR_ARGUMENT, "--task %s: --task-size is its number of %s, %d..%d", info->name,
                           info->size_name, info->min_size, info->max_size);
        return rf_fail(err, RF_ERR_ARGUMENT, "--task %s: --task-length is of its prompt in bytes, %zu..%zu", info->name,
                       info->min_length, info->max_length);
    }
    return words_of(run, run->task_prompt, strlen(run->task_prompt), "--task", err);
}

rf_status text_prompt_make(text_run *run, rf_error *err) {
    const text_args *a = &run->args;
    run->task = -1;
    if (a->prompt) return words_of(run, a->prompt, strlen(a->prompt), "--prompt", err);
    if (a->file) return file_of(run, err);
    if (a->task) return task_of(run, err);
    if (a->tokens) return ids_of(run, err);
    return random_ids(run, err);
}
