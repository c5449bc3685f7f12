/* samples/tasks/tasks_steps.c - tasks answered step by step: 100 to 500 characters in which each part needs those before. */
#include "tasks_parts.h"

#include <string.h>

static void make_total(task_sample *s) {
    int64_t sum = 0;
    task_put(&s->prompt, "total ");
    for (int i = 0; i < s->size; i++) {
        static const int limits[3] = {10, 100, 1000};
        int64_t value = 1 + task_draw(&s->rng, limits[task_draw(&s->rng, 3)] - 1);
        if (i > 0) {
            task_put_char(&s->prompt, ',');
            if (i > 1) task_put_char(&s->answer, '\n');
            task_put_int(&s->answer, sum);
            task_put_char(&s->answer, '+');
            task_put_int(&s->answer, value);
            task_put_char(&s->answer, '=');
            task_put_int(&s->answer, sum + value);
        }
        task_put_int(&s->prompt, value);
        sum += value;
    }
    task_put_char(&s->prompt, ':');
}

/* size: digits of the multiplier. */
static void make_multiply(task_sample *s) {
    static const int lows[3] = {10, 100, 1000};
    int low = lows[task_draw(&s->rng, 3)];
    int64_t a = task_range(&s->rng, low, 10 * low - 1), sum = 0, place = 1;
    int digits[16];
    task_put(&s->prompt, "multiply ");
    task_put_int(&s->prompt, a);
    task_put_char(&s->prompt, '*');
    for (int i = s->size - 1; i >= 0; i--) {
        digits[i] = i == s->size - 1 ? task_range(&s->rng, 1, 9) : task_draw(&s->rng, 10);
        task_put_digits(&s->prompt, digits[i], 1);
    }
    task_put_char(&s->prompt, '=');
    for (int i = 0; i < s->size; i++, place *= 10) {
        int64_t part = a * digits[i] * place;
        if (i > 0) task_put_char(&s->answer, '\n');
        task_put_int(&s->answer, a);
        task_put_char(&s->answer, '*');
        task_put_int(&s->answer, digits[i] * place);
        task_put_char(&s->answer, '=');
        task_put_int(&s->answer, part);
        if (i > 0) {
            task_put_char(&s->answer, ';');
            task_put_int(&s->answer, sum);
            task_put_char(&s->answer, '+');
            task_put_int(&s->answer, part);
            task_put_char(&s->answer, '=');
            task_put_int(&s->answer, sum + part);
        }
        sum += part;
    }
}

/* ---- eval: the first innermost pair of parentheses is replaced by its value, again and again ----------------------- */

#define EVAL_MAX   16  /* operations */
#define EVAL_CHARS 160 /* of an expression: 17 numbers of 2 digits, 16 operators, 15 pairs of parentheses, and room */

typedef struct {
    char text[EVAL_CHARS];
    int value;
} eval_part;

static int eval_apply(int a, char op, int b) {
    int c = op == '+' ? a + b : op == '-' ? a - b : a * b;
    return c < 0 || c > 99 ? -1 : c;
}

/* part := (left op right), without parentheses if it is the whole. */
static void eval_join(eval_part *left, char op, const eval_part *right, bool whole) {
    char buffer[2 * EVAL_CHARS + 4];
    task_text t = {.text = buffer, .size = sizeof buffer};
    if (!whole) task_put_char(&t, '(');
    task_put(&t, left->text);
    task_put_char(&t, op);
    task_put(&t, right->text);
    if (!whole) task_put_char(&t, ')');
    size_t n = t.len < EVAL_CHARS ? t.len : EVAL_CHARS - 1;
    memcpy(left->text, buffer, n);
    left->text[n] = 0;
    left->value = eval_apply(left->value, op, right->value);
}

/* Replaces the first innermost parentheses, or the whole, by the value. False: it is a number already. */
static bool eval_reduce(char *text) {
    char *close = strchr(text, ')'), *begin = text, *after = text + strlen(text), rest[EVAL_CHARS];
    if (close) {
        after = close + 1;
        for (begin = close; *begin != '(';) begin--;
    }
    const char *p = begin + (close != NULL), *end = close ? close : after;
    int a = (int)task_number(&p, end);
    if (p == end) return false;
    char op = *p++;
    int b = (int)task_number(&p, end);
    memcpy(rest, after, strlen(after) + 1);
    task_text t = {.text = begin, .size = (size_t)(EVAL_CHARS - (begin - text))};
    task_put_int(&t, eval_apply(a, op, b));
    task_put(&t, rest);
    return true;
}

static void make_eval(task_sample *s) {
    eval_part parts[EVAL_MAX + 1];
    int n = s->size + 1;
    for (int i = 0; i < n; i++) {
        task_text t = {.text = parts[i].text, .size = EVAL_CHARS};
        parts[i].value = task_draw(&s->rng, 4) ? task_range(&s->rng, 1, 9) : task_range(&s->rng, 10, 30);
        task_put_int(&t, parts[i].value);
    }
    for (; n > 1; n--) {
        /* a pair of neighbours and an operator that stay in 0..99; subtraction always does one way round, and the last
         * try swaps the two to make it so */
        int at = 0, left = 0, right = 0;
        char op = '-';
        bool found = false;
        for (int tries = 0; tries < 16 && !found; tries++) {
            at = task_draw(&s->rng, n - 1);
            op = "++--*"[task_draw(&s->rng, 5)];
            left = parts[at].value;
            right = parts[at + 1].value;
            found = eval_apply(left, op, right) >= 0;
        }
        if (!found) {
            op = '-';
            if (left < right) {
                eval_part t = parts[at];
                parts[at] = parts[at + 1];
                parts[at + 1] = t;
            }
        }
        eval_join(&parts[at], op, &parts[at + 1], n == 2);
        for (int i = at + 1; i + 1 < n; i++) parts[i] = parts[i + 1];
    }
    task_put(&s->prompt, "eval ");
    task_put(&s->prompt, parts[0].text);
    task_put_char(&s->prompt, '=');
    for (bool first = true; eval_reduce(parts[0].text); first = false) {
        if (!first) task_put_char(&s->answer, '\n');
        task_put(&s->answer, parts[0].text);
    }
}

/* ---- trace -------------------------------------------------------------------------------------------------------- */

#define REGISTERS 4

static void make_trace(task_sample *s) {
    int value[REGISTERS];
    task_put(&s->prompt, "trace ");
    for (int i = 0; i < REGISTERS; i++) {
        value[i] = task_draw(&s->rng, 100);
        if (i > 0) task_put_char(&s->prompt, ',');
        task_put_int(&s->prompt, value[i]);
    }
    for (int step = 0; step < s->size; step++) {
        char text[8];
        task_text t = {.text = text, .size = sizeof text};
        int to = task_draw(&s->rng, REGISTERS), kind = task_draw(&s->rng, 5), operand;
        task_put_char(&t, (char)('a' + to));
        task_put(&t, kind == 4 ? "=" : kind % 2 ? "-=" : "+=");
        if (kind >= 2) {
            int from = (to + task_range(&s->rng, 1, REGISTERS - 1)) % REGISTERS;
            operand = value[from];
            task_put_char(&t, (char)('a' + from));
        } else {
            operand = task_range(&s->rng, 1, 9);
            task_put_int(&t, operand);
        }
        value[to] = kind == 4 ? operand : (value[to] + (kind % 2 ? 100 - operand : operand)) % 100;
        task_put_char(&s->prompt, ';');
        task_put(&s->prompt, text);
        if (step > 0) task_put_char(&s->answer, '\n');
        task_put(&s->answer, text);
        for (int i = 0; i < REGISTERS; i++) {
            task_put_char(&s->answer, i > 0 ? ',' : ' ');
            task_put_int(&s->answer, value[i]);
        }
    }
    task_put_char(&s->prompt, ':');
}

/* Each line times a factor plus the number before it, its last two digits taken on: reversible, so the period is long. */
static void make_chain(task_sample *s) {
    static const int factors[7] = {2, 3, 4, 6, 7, 8, 9};
    int before = task_draw(&s->rng, 100), x = task_draw(&s->rng, 100), factor = factors[task_draw(&s->rng, 7)];
    task_put(&s->prompt, "chain ");
    task_put_int(&s->prompt, before);
    task_put_char(&s->prompt, ',');
    task_put_int(&s->prompt, x);
    task_put_char(&s->prompt, '*');
    task_put_int(&s->prompt, factor);
    task_put_char(&s->prompt, ',');
    task_put_int(&s->prompt, s->size);
    task_put_char(&s->prompt, ':');
    for (int i = 0; i < s->size; i++) {
        int next = x * factor + before;
        if (i > 0) task_put_char(&s->answer, '\n');
        task_put_int(&s->answer, x);
        task_put_char(&s->answer, '*');
        task_put_int(&s->answer, factor);
        task_put_char(&s->answer, '+');
        task_put_int(&s->answer, before);
        task_put_char(&s->answer, '=');
        task_put_int(&s->answer, next);
        before = x;
        x = next % 100;
    }
}

static void make_walk(task_sample *s) {
    int x = task_draw(&s->rng, 100), y = task_draw(&s->rng, 100);
    task_put(&s->prompt, "walk ");
    task_put_int(&s->prompt, x);
    task_put_char(&s->prompt, ',');
    task_put_int(&s->prompt, y);
    for (int i = 0; i < s->size; i++) {
        int direction = task_draw(&s->rng, 4), by = task_range(&s->rng, 1, 9);
        task_put_char(&s->prompt, ' ');
        task_put_char(&s->prompt, "nesw"[direction]);
        task_put_int(&s->prompt, by);
        int signed_by = direction < 2 ? by : 100 - by;
        if (direction % 2)
            x = (x + signed_by) % 100;
        else
            y = (y + signed_by) % 100;
        if (i > 0) task_put_char(&s->answer, ';');
        task_put_int(&s->answer, x);
        task_put_char(&s->answer, ',');
        task_put_int(&s->answer, y);
    }
    task_put_char(&s->prompt, ':');
}

const task_entry task_steps_entries[] = {
    {{"total", "running totals of a list", TASK_LONG, true, "numbers", 2, 40, 10, 28, 0, 0}, make_total, NULL},
    {{"multiply", "long multiplication with its sums", TASK_LONG, true, "digits", 1, 8, 4, 7, 0, 0},
     make_multiply,
     NULL},
    {{"eval", "an expression evaluated one operation a line", TASK_LONG, true, "operations", 1, EVAL_MAX, 7, 12, 0, 0},
     make_eval,
     NULL},
    {{"trace", "four registers after each step of a program", TASK_LONG, true, "steps", 1, 32, 8, 20, 0, 0},
     make_trace,
     NULL},
    {{"chain", "a recurrence modulo 100", TASK_LONG, true, "steps", 1, 40, 10, 30, 0, 0}, make_chain, NULL},
    {{"walk", "positions after each move", TASK_LONG, true, "moves", 1, 64, 20, 50, 0, 0}, make_walk, NULL},
};
const int task_steps_num = (int)(sizeof task_steps_entries / sizeof task_steps_entries[0]);
