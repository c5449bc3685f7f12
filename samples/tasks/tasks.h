/* samples/tasks/tasks.h - text tasks with known answers: training data and tests of the shipped text models.
 *
 * A sample is a prompt and its answer, plain ASCII, both given raw: a model completes the prompt and ends with
 * end-of-text. The same (task, seed, settings) gives the same bytes on every machine. Needs the C library only; nothing
 * is allocated.
 *
 * short   add       37+85=                                      122
 *         sort      sort 83124=                                 12348           also reverse, copy
 *         kv        kv q41=920 a07=113 get a07=                 113             several keys: get a07 q41= 113,920
 *         vt        vt v41=520 v07=v41 get v07=                 520             several variables as in kv
 *         sudoku    sudoku 1030/0200/0010/4003=                 the filled grid, rows between slashes
 *         countdown countdown 3,7,25 to 46:                     7*3=21,25+21=46 every number used once
 * long    total     total 37,85,12:                             37+85=122 / 122+12=134          one step a line
 *         multiply  multiply 37*85=                             37*5=185 / 37*80=2960;185+2960=3145
 *         eval      eval ((3+5)*2)-4=                           (8*2)-4 / 16-4 / 12
 *         trace     trace 3,7,5,9;a+=b;c-=a:                    a+=b 10,7,5,9 / c-=a 10,7,95,9    modulo 100
 *         chain     chain 17,82*9,2:                            82*9+17=755 / 55*9+82=577        steps; last two digits go on
 *         walk      walk 3,4 n3 e2:                             3,7;5,7                          modulo 100
 * recall  needle, needle-mk, needle-mv, vt-long, cwe, kv-long   after RULER (Hsieh et al. 2024), in words of their own
 * text    text      a piece of the caller's corpus; no score
 * (" / " stands for a line feed.) */
#ifndef RF_SAMPLES_TASKS_H
#define RF_SAMPLES_TASKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TASK_MAX_PROMPT 32768 /* bytes with the final 0 that hold any prompt ... */
#define TASK_MAX_ANSWER 8192  /* ... and any answer */

typedef enum { TASK_SHORT, TASK_LONG, TASK_RECALL, TASK_TEXT } task_kind;

typedef struct {
    const char *name, *about; /* about: one line */
    task_kind kind;
    bool exact;                    /* there is a score */
    const char *size_name;         /* what `size` counts; NULL: the task is sized by length */
    int min_size, max_size;        /* what task_generate takes; 0, 0 without size_name */
    int usual_min, usual_max;      /* drawn from these where no size is set: what the models are judged on */
    size_t min_length, max_length; /* of `length`, in bytes; 0, 0 where the task is sized by `size` */
} task_info;

typedef struct {
    int size;           /* 0: drawn from usual_min..usual_max */
    size_t length;      /* bytes of prompt aimed at (text: prompt and answer); 0: drawn from min_length..max_length. The
                         * prompt is at most this long (cwe: at times a byte more), or the shortest possible one */
    bool aware;         /* kv, vt and recall: the question is asked before the context as well */
    int question;       /* kv, vt and recall: 0, 1, ... other questions about the same context; needle-mk and needle-mv
                         * may have other noise if the word asked for is shorter or longer. Two can be the same */
    const char *corpus; /* text only */
    size_t corpus_len;
} task_settings;

int task_count(void);
const task_info *task_at(int task); /* NULL out of range */
int task_find(const char *name);    /* -1: none of that name */

/* Writes the prompt and the answer, each with a final 0. Returns 0, or -1: no such task, a setting out of the task's
 * range, no corpus, or a buffer too small (what fits is written, with a final 0). settings NULL: all 0. A task sized by
 * `size` takes no notice of `length`, nor the others of `size`. */
int task_generate(int task, uint64_t seed, const task_settings *settings, char *prompt, size_t prompt_size,
                  char *answer, size_t answer_size);

/* Byte of a prompt at which its last question begins, with the space before it: what comes before is the context (with the
 * question at its front too, if settings.aware). -1: the task asks no question about a context. */
int task_question(int task, const char *prompt);

/* 1 if the completion is right, else 0, white space at its end aside; -1 where the task has no score. Any valid grid and
 * any valid way to the target count as right, and lists of needle-mv, vt-long and cwe in any order. Any bytes will do. */
double task_score(int task, const char *prompt, const char *answer, const char *completion);

#ifdef __cplusplus
}
#endif
#endif
