/* samples/tasks/tasks.c - the table of tasks and what they share. See tasks.h. */
#include "tasks.h"
#include "tasks_parts.h"

#include <string.h>

/* ---- random numbers: the splitmix64 finaliser of key + counter ---------------------------------------------------- */

static uint64_t scramble(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

task_rng task_rng_make(uint64_t seed, uint64_t purpose) {
    return (task_rng){.key = scramble(scramble(seed + 0x9e3779b97f4a7c15u) + purpose)};
}

int task_draw(task_rng *r, int num) {
    uint64_t bits = scramble(r->key + 0x9e3779b97f4a7c15u * ++r->count);
    return (int)(((bits >> 32) * (uint64_t)num) >> 32);
}

int task_range(task_rng *r, int low, int high) {
    return low + task_draw(r, high - low + 1);
}

void task_distinct(task_rng *r, uint16_t *scratch, int num, int count) {
    for (int i = 0; i < num; i++) scratch[i] = (uint16_t)i;
    for (int i = 0; i < count; i++) {
        int j = task_range(r, i, num - 1);
        uint16_t t = scratch[i];
        scratch[i] = scratch[j];
        scratch[j] = t;
    }
}

int task_draw_queries(task_rng *r, int num) {
    int n = task_draw(r, 2) ? 1 : task_range(r, 2, 8);
    return n < num ? n : num;
}

/* ---- text --------------------------------------------------------------------------------------------------------- */

void task_put_char(task_text *t, char c) {
    if (t->len + 1 >= t->size) {
        t->over = true;
        return;
    }
    t->text[t->len++] = c;
    t->text[t->len] = 0;
}

void task_put(task_text *t, const char *s) {
    while (*s) task_put_char(t, *s++);
}

void task_put_digits(task_text *t, int64_t value, int digits) {
    char buffer[24];
    int n = 0;
    do {
        buffer[n++] = (char)('0' + value % 10);
        value /= 10;
    } while ((value > 0 || n < digits) && n < (int)sizeof buffer);
    while (n > 0) task_put_char(t, buffer[--n]);
}

void task_put_int(task_text *t, int64_t value) {
    if (value < 0) {
        task_put_char(t, '-');
        value = -value;
    }
    task_put_digits(t, value, 1);
}

int64_t task_number(const char **s, const char *end) {
    int64_t value = 0;
    int digits = 0;
    for (; *s < end && **s >= '0' && **s <= '9'; (*s)++) {
        if (++digits > 9) return -1;
        value = value * 10 + (**s - '0');
    }
    return digits ? value : -1;
}

/* ---- text of a corpus --------------------------------------------------------------------------------------------- */

static void make_text(task_sample *s) {
    size_t length = s->length < s->corpus_len ? s->length : s->corpus_len;
    size_t places = s->corpus_len - length + 1;
    size_t at = (size_t)task_draw(&s->rng, places > 0x7fffffff ? 0x7fffffff : (int)places);
    for (size_t i = 0; i < length; i++) task_put_char(i < length / 2 ? &s->prompt : &s->answer, s->corpus[at + i]);
}

static const task_entry text_entries[] = {
    {{"text", "continue a piece of plain text", TASK_TEXT, false, NULL, 0, 0, 0, 0, 64, 8192}, make_text, NULL}};

/* ---- the table ---------------------------------------------------------------------------------------------------- */

int task_count(void) {
    return task_short_num + task_steps_num + task_recall_num + 1;
}

static const task_entry *entry_at(int task) {
    if (task < 0) return NULL;
    if (task < task_short_num) return &task_short_entries[task];
    task -= task_short_num;
    if (task < task_steps_num) return &task_steps_entries[task];
    task -= task_steps_num;
    if (task < task_recall_num) return &task_recall_entries[task];
    return task == task_recall_num ? &text_entries[0] : NULL;
}

const task_info *task_at(int task) {
    const task_entry *e = entry_at(task);
    return e ? &e->info : NULL;
}

int task_find(const char *name) {
    for (int i = 0; i < task_count(); i++)
        if (strcmp(task_at(i)->name, name) == 0) return i;
    return -1;
}

int task_generate(int task, uint64_t seed, const task_settings *settings, char *prompt, size_t prompt_size,
                  char *answer, size_t answer_size) {
    const task_settings none = {0};
    const task_entry *e = entry_at(task);
    if (!settings) settings = &none;
    if (!e || !prompt || !answer || prompt_size == 0 || answer_size == 0 || settings->question < 0) return -1;
    prompt[0] = answer[0] = 0;
    const task_info *info = &e->info;
    task_rng sizes = task_rng_make(seed, 1);
    int size = settings->size;
    if (size == 0 && info->size_name) size = task_range(&sizes, info->usual_min, info->usual_max);
    if (info->size_name && (size < info->min_size || size > info->max_size)) return -1;
    size_t length = settings->length;
    if (length == 0 && !info->size_name)
        length = (size_t)task_range(&sizes, (int)info->min_length, (int)info->max_length);
    if (!info->size_name && (length < info->min_length || length > info->max_length)) return -1;
    if (info->kind == TASK_TEXT && (!settings->corpus || settings->corpus_len < 2)) return -1;
    task_sample s = {.rng = task_rng_make(seed, 2),
                     .question_rng = task_rng_make(seed, 16 + (uint64_t)settings->question),
                     .size = size,
                     .length = length,
                     .aware = settings->aware,
                     .corpus = settings->corpus,
                     .corpus_len = settings->corpus_len,
                     .prompt = {.text = prompt, .size = prompt_size},
                     .answer = {.text = answer, .size = answer_size}};
    e->make(&s);
    return s.prompt.over || s.answer.over ? -1 : 0;
}

/* Words that begin a question; no context holds them. */
int task_question(int task, const char *prompt) {
    static const char *const asking[] = {" get ", " What ", " Which "};
    const task_info *info = task_at(task);
    int at = -1;
    if (!info || info->kind == TASK_TEXT) return -1;
    for (size_t i = 0; i < sizeof asking / sizeof asking[0]; i++)
        for (const char *p = prompt; (p = strstr(p, asking[i])) != NULL; p++)
            if (p - prompt > at) at = (int)(p - prompt);
    return at;
}

double task_score(int task, const char *prompt, const char *answer, const char *completion) {
    const task_entry *e = entry_at(task);
    if (!e || !e->info.exact) return -1.0;
    size_t len = strlen(completion);
    while (len > 0 && strchr(" \t\r\n", completion[len - 1])) len--;
    if (e->check) return e->check(prompt, answer, completion, len) ? 1.0 : 0.0;
    return len == strlen(answer) && memcmp(answer, completion, len) == 0 ? 1.0 : 0.0;
}
