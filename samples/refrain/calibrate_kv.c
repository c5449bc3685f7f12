/* samples/refrain/calibrate_kv.c - `refrain calibrate --kv`: kv.json of an autoregressive model (dlm/kv_tables.h, dlm/kv_calibrate.h).
 *
 * Random tokens for razor; for compresskv prompts of the task needle that the model answers (at least half of the answer's
 * tokens), of several lengths. Seeds are not those of `eval`. */
#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/kv_calibrate.h"
#include "dlm/kv_session.h"
#include "samples/refrain/calibrate.h"
#include "samples/refrain/text_model.h"
#include "samples/tasks/tasks.h"

#define FIRST_SEED 900000
#define MAX_ANSWER 32 /* tokens that are made */
#define WINDOW     8
#define RATIO      0.25
#define INDUCTION  0.14
#define ECHO       0.01

typedef struct {
    rf_kv_needle needle;
    int32_t *tokens;
} sample;

/* Tokens whose bytes touch [begin, end) of the prompt; false: the tokens are not those bytes. */
static bool span_of(const opened_text *t, const rf_token_ids *ids, size_t begin, size_t end, size_t len,
                    rf_kv_needle *out) {
    size_t at = 0;
    out->needle_begin = -1;
    for (int32_t i = 0; i < (int32_t)ids->num; i++) {
        size_t bytes = 0;
        const char *text = rf_tokenizer_token_bytes(t->tokenizer, ids->ids[i], &bytes);
        if (text == NULL) bytes = 0;
        if (i == 0 && ids->ids[0] == rf_tokenizer_special_ids(t->tokenizer).bos) bytes = 0;
        if (bytes > 0 && at < end && at + bytes > begin) {
            if (out->needle_begin < 0) out->needle_begin = i;
            out->needle_end = i + 1;
        }
        at += bytes;
    }
    return at == len && out->needle_begin >= 0;
}

/* The sentence of the context with the answer in it. */
static bool sentence_of(const char *prompt, int question, const char *answer, size_t *begin, size_t *end) {
    const char *at = strstr(prompt, answer);
    if (at == NULL || *answer == 0 || at - prompt >= question) return false;
    const char *from = at, *to = at + strlen(answer);
    while (from > prompt && from[-1] != '.' && from[-1] != '\n') from--;
    while (to < prompt + question && *to != '.' && *to != '\n') to++;
    *begin = (size_t)(from - prompt);
    *end = (size_t)(to - prompt);
    return true;
}

static rf_status answer_prompt(rf_kv_session *s, const opened_text *t, const rf_token_ids *ids, int32_t *out,
                               int32_t *num, rf_error *err) {
    *num = 0;
    RF_TRY(rf_kv_session_prefill(s, 0, ids->ids, (int32_t)ids->num, 0, 0, 0.0, err));
    for (;;) {
        rf_token_stats stats;
        RF_TRY(rf_kv_session_read_stats(s, &stats, err));
        bool ends = false;
        for (int i = 0; i < t->model->desc.num_eos; i++) ends |= stats.id == t->model->desc.eos_ids[i];
        if (ends) return RF_OK;
        out[(*num)++] = stats.id;
        if (*num == MAX_ANSWER) return RF_OK;
        RF_TRY(rf_kv_session_step(s, &stats.id, err));
    }
}

/* ROUGE-1 recall over tokens. */
static double recall(const rf_token_ids *want, const int32_t *got, int32_t num) {
    int found = 0;
    uint8_t used[MAX_ANSWER] = {0};
    for (int32_t i = 0; i < (int32_t)want->num; i++)
        for (int32_t j = 0; j < num; j++)
            if (!used[j] && got[j] == want->ids[i]) {
                used[j] = 1;
                found++;
                break;
            }
    return want->num > 0 ? found / (double)want->num : 0;
}

/* One prompt; out->tokens NULL: the model does not answer it. */
static rf_status make_sample(sample *out, const opened_text *t, rf_kv_session *s, int index, size_t length,
                             char *prompt, char *answer, rf_error *err) {
    task_settings settings = {.length = length};
    int task = task_find("needle"), question;
    rf_token_ids ids = {0}, want = {0};
    size_t begin = 0, end = 0;
    *out = (sample){0};
    if (task_generate(task, (uint64_t)(FIRST_SEED + index), &settings, prompt, TASK_MAX_PROMPT, answer,
                      TASK_MAX_ANSWER) != 0 ||
        (question = task_question(task, prompt)) < 0 || !sentence_of(prompt, question, answer, &begin, &end))
        return RF_OK;
    size_t len = strlen(prompt);
    rf_status st = text_encode(t, prompt, len, true, "a prompt", &ids, err);
    if (st == RF_OK) st = text_encode(t, answer, strlen(answer), false, "an answer", &want, err);
    int32_t num = (int32_t)ids.num, made = 0;
    if (st == RF_OK && num + MAX_ANSWER <= t->model->rope_positions &&
        span_of(t, &ids, begin, end, len, &out->needle)) {
        out->tokens = rf_alloc((size_t)(num + MAX_ANSWER) * sizeof *out->tokens);
        if (out->tokens == NULL) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a prompt");
        if (st == RF_OK) st = answer_prompt(s, t, &ids, out->tokens + num, &made, err);
        if (st == RF_OK) memcpy(out->tokens, ids.ids, (size_t)num * sizeof *out->tokens);
        if (st != RF_OK || made == 0 || recall(&want, out->tokens + num, made) < 0.5) {
            rf_free(out->tokens);
            out->tokens = NULL;
        }
        out->needle.tokens = out->tokens;
        out->needle.num_prompt = num;
        out->needle.num = num + made;
    }
    rf_token_ids_clear(&ids);
    rf_token_ids_clear(&want);
    return st;
}

static rf_status make_needles(rf_kv_needle *needles, int32_t **tokens, int num, int *right, const opened_text *t,
                              bool quiet, rf_error *err) {
    static const size_t lengths[] = {512, 1024, 2048};
    char *prompt = rf_alloc(TASK_MAX_PROMPT), *answer = rf_alloc(TASK_MAX_ANSWER);
    rf_kv_session *s = NULL;
    rf_kv_session_options o = rf_kv_session_options_default();
    o.max_prompt = (int32_t)t->model->rope_positions - MAX_ANSWER;
    o.max_new = MAX_ANSWER;
    *right = 0;
    rf_status st = prompt && answer ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for prompts");
    if (st == RF_OK && o.max_prompt < 1)
        st = rf_fail(err, RF_ERR_UNSUPPORTED, "%s: %lld positions are too few for a needle", t->name,
                     (long long)t->model->rope_positions);
    if (st == RF_OK) st = rf_kv_rule_parse(&o.rule, "none", err);
    if (st == RF_OK) st = rf_kv_session_create(&s, t->model, &o, err);
    for (int i = 0; st == RF_OK && i < num; i++) {
        sample one;
        st = make_sample(&one, t, s, i, lengths[(size_t)i % (sizeof lengths / sizeof lengths[0])], prompt, answer, err);
        if (st == RF_OK && one.tokens != NULL) {
            needles[*right] = one.needle;
            tokens[(*right)++] = one.tokens;
        }
        if (st == RF_OK && cancel_requested())
            st = rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d prompts; nothing is written", i + 1);
    }
    if (st == RF_OK && *right == 0)
        st = rf_fail(err, RF_ERR_UNSUPPORTED, "%s answers none of %d prompts with a needle: no heads can be chosen",
                     t->name, num);
    if (st == RF_OK && !quiet) say("%d of %d prompts with a needle answered", *right, num);
    rf_kv_session_destroy(s);
    rf_free(prompt);
    rf_free(answer);
    return st;
}

/* --- tables ------------------------------------------------------------------------------------------------------------ */

static cJSON *start_table(const opened_text *t, const char *command) {
    cJSON *table = cJSON_CreateObject();
    cJSON_AddNumberToObject(table, "num_layers", t->model->desc.num_layers);
    cJSON_AddNumberToObject(table, "num_q_heads", t->model->desc.num_q_heads);
    cJSON_AddStringToObject(table, "command", command);
    return table;
}

static void add_heads(cJSON *table, const opened_text *t, const uint8_t *flags) {
    cJSON *rows = cJSON_AddArrayToObject(table, "heads");
    int heads = t->model->desc.num_q_heads;
    for (int l = 0; l < t->model->desc.num_layers && rows; l++) {
        cJSON *row = cJSON_CreateArray();
        for (int h = 0; h < heads; h++)
            if (flags[l * heads + h]) cJSON_AddItemToArray(row, cJSON_CreateNumber(h));
        cJSON_AddItemToArray(rows, row);
    }
}

static void add_numbers(cJSON *table, const char *name, const float *values, int num) {
    cJSON *list = cJSON_AddArrayToObject(table, name);
    for (int i = 0; i < num && list; i++) {
        char text[32];
        snprintf(text, sizeof text, "%.4g", (double)values[i]);
        cJSON_AddItemToArray(list, cJSON_CreateRaw(text));
    }
}

static rf_status write_razor(const opened_text *t, const char *path, const char *command, rf_error *err) {
    int num = t->model->desc.num_layers * t->model->desc.num_q_heads;
    float *scores = rf_alloc_zero(2 * (size_t)num, sizeof *scores), *induction = scores + num;
    uint8_t *flags = rf_alloc_zero(2 * (size_t)num, 1);
    rf_status st = scores && flags ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    if (st == RF_OK) st = rf_kv_calibrate_razor(t->model, 0, FIRST_SEED, scores, induction, err);
    if (st == RF_OK) st = rf_kv_flag_top(flags, induction, num, INDUCTION, err);
    if (st == RF_OK) st = rf_kv_flag_top(flags + num, scores, num, ECHO, err);
    if (st == RF_OK) {
        for (int i = 0; i < num; i++) flags[i] |= flags[num + i];
        cJSON *table = start_table(t, command);
        add_heads(table, t, flags);
        add_numbers(table, "echo", scores, num);
        add_numbers(table, "induction", induction, num);
        st = calibrate_write(path, "razor", table, err);
        cJSON_Delete(table);
    }
    rf_free(scores);
    rf_free(flags);
    return st;
}

/* Published: 4 of 32 heads a layer. */
static int heads_a_layer(int heads) {
    int num = heads / 8 > 2 ? heads / 8 : 2;
    return num < heads ? num : heads;
}

static rf_status write_compress(const opened_text *t, const rf_kv_needle *needles, int num, const char *path,
                                const char *command, rf_error *err) {
    int layers = t->model->desc.num_layers, heads = t->model->desc.num_q_heads;
    float *scores = rf_alloc_zero((size_t)layers * (size_t)(heads + 1), sizeof *scores);
    uint8_t *list = rf_alloc_zero((size_t)layers, (size_t)heads);
    rf_status st = scores && list ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    if (st == RF_OK) st = rf_kv_calibrate_heads(t->model, needles, num, scores, err);
    for (int l = 0; st == RF_OK && l < layers; l++)
        st = rf_kv_flag_top(list + l * heads, scores + l * heads, heads, heads_a_layer(heads) / (double)heads, err);
    float *shares = scores + layers * heads;
    if (st == RF_OK) st = rf_kv_calibrate_layers(t->model, needles, num, list, WINDOW, RATIO, shares, err);
    if (st == RF_OK) {
        cJSON *table = start_table(t, command);
        add_heads(table, t, list);
        add_numbers(table, "layer_shares", shares, layers);
        cJSON_AddNumberToObject(table, "prompts", num);
        add_numbers(table, "mass", scores, layers * heads);
        st = calibrate_write(path, "compresskv", table, err);
        cJSON_Delete(table);
    }
    rf_free(scores);
    rf_free(list);
    return st;
}

rf_status calibrate_kv(const calibrate_kv_args *a, rf_error *err) {
    opened_text t = {0};
    rf_log log = program_log(a->quiet ? -1 : 0);
    rf_kv_needle *needles = rf_alloc_zero((size_t)a->num_prompts, sizeof *needles);
    int32_t **tokens = rf_alloc_zero((size_t)a->num_prompts, sizeof *tokens);
    char *path = NULL, command[160];
    int right = 0;
    double begin = now_ms();
    rf_status st = needles && tokens ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for prompts");
    if (st == RF_OK) st = open_text_model(&t, a->model, NULL, 0, a->device, a->threads, "auto", &log, err);
    if (st == RF_OK && t.tokenizer == NULL)
        st = rf_fail(err, RF_ERR_MISSING, "%s: no tokenizer.json; prompts are texts", t.path);
    if (st == RF_OK) {
        path = a->output ? rf_strdup(a->output) : rf_path_join(t.path, "kv.json");
        if (path == NULL) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a name");
    }
    snprintf(command, sizeof command, "refrain calibrate --kv -m %s -n %d --device %s", t.name ? t.name : "?",
             a->num_prompts, a->device);
    if (st == RF_OK) st = make_needles(needles, tokens, a->num_prompts, &right, &t, a->quiet, err);
    if (st == RF_OK) st = write_razor(&t, path, command, err);
    if (st == RF_OK) st = write_compress(&t, needles, right, path, command, err);
    if (st == RF_OK && !a->quiet)
        say("retrieval heads and shares of layers in %.1f s: %s", (now_ms() - begin) * 1e-3, path);
    for (int i = 0; i < right && tokens; i++) rf_free(tokens[i]);
    rf_free(tokens);
    rf_free(needles);
    rf_free(path);
    close_text_model(&t);
    return st;
}
