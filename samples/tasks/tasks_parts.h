/* samples/tasks/tasks_parts.h - what the families of tasks share: random numbers, text output, the table's entries. */
#ifndef RF_SAMPLES_TASKS_PARTS_H
#define RF_SAMPLES_TASKS_PARTS_H

#include "tasks.h"

typedef struct {
    uint64_t key, count;
} task_rng;

task_rng task_rng_make(uint64_t seed, uint64_t purpose);
int task_draw(task_rng *r, int num);            /* uniform in 0..num-1 */
int task_range(task_rng *r, int low, int high); /* uniform in low..high */

/* Text being written; `over` once it did not fit. Always 0-terminated. */
typedef struct {
    char *text;
    size_t size, len;
    bool over;
} task_text;

void task_put(task_text *t, const char *s);
void task_put_char(task_text *t, char c);
void task_put_int(task_text *t, int64_t value);
void task_put_digits(task_text *t, int64_t value, int digits); /* with leading zeros */

typedef struct {
    task_rng rng, question_rng; /* of the context; of the question */
    int size;
    size_t length;
    bool aware;
    const char *corpus;
    size_t corpus_len;
    task_text prompt, answer;
} task_sample;

typedef bool task_check(const char *prompt, const char *answer, const char *completion, size_t len);

typedef struct {
    task_info info;
    void (*make)(task_sample *s);
    task_check *check; /* NULL: equal bytes */
} task_entry;

extern const task_entry task_short_entries[], task_steps_entries[], task_recall_entries[];
extern const int task_short_num, task_steps_num, task_recall_num;

/* Distinct keys 0..num-1 in random order, the first `count` of them; scratch has num elements. */
void task_distinct(task_rng *r, uint16_t *scratch, int num, int count);
/* How many names are asked for at once: one, or in half of the cases 2 to 8, and `num` at most. */
int task_draw_queries(task_rng *r, int num);
/* An unsigned number of at most 9 digits at *s; -1: none, or a longer one. Moves *s behind what was read. */
int64_t task_number(const char **s, const char *end);

#endif
