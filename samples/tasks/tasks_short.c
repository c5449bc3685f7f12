/* samples/tasks/tasks_short.c - tasks with answers of a few characters, and the two where any valid answer counts. */
#include "tasks_parts.h"

#include <string.h>

static int64_t number_of_digits(task_rng *r, int digits) {
    int64_t value = digits > 1 ? task_range(r, 1, 9) : task_draw(r, 10);
    for (int i = 1; i < digits; i++) value = value * 10 + task_draw(r, 10);
    return value;
}

static void make_add(task_sample *s) {
    int da = s->size, db = task_range(&s->rng, 1, s->size);
    if (task_draw(&s->rng, 2)) {
        int t = da;
        da = db;
        db = t;
    }
    int64_t a = number_of_digits(&s->rng, da), b = number_of_digits(&s->rng, db);
    task_put_int(&s->prompt, a);
    task_put_char(&s->prompt, '+');
    task_put_int(&s->prompt, b);
    task_put_char(&s->prompt, '=');
    task_put_int(&s->answer, a + b);
}

enum { SORT, REVERSE, COPY };

static void make_digits(task_sample *s, int what) {
    int counts[10] = {0};
    size_t first;
    task_put(&s->prompt, what == SORT ? "sort " : what == REVERSE ? "reverse " : "copy ");
    first = s->prompt.len;
    for (int i = 0; i < s->size; i++) {
        int d = task_draw(&s->rng, 10);
        counts[d]++;
        task_put_digits(&s->prompt, d, 1);
    }
    if (s->prompt.over) return;
    if (what == SORT)
        for (int d = 0; d < 10; d++)
            for (int i = 0; i < counts[d]; i++) task_put_digits(&s->answer, d, 1);
    else
        for (int i = 0; i < s->size; i++)
            task_put_char(&s->answer, s->prompt.text[first + (size_t)(what == COPY ? i : s->size - 1 - i)]);
    task_put_char(&s->prompt, '=');
}

static void make_sort(task_sample *s) {
    make_digits(s, SORT);
}
static void make_reverse(task_sample *s) {
    make_digits(s, REVERSE);
}
static void make_copy(task_sample *s) {
    make_digits(s, COPY);
}

/* ---- variables ---------------------------------------------------------------------------------------------------- */

static void put_names(task_text *t, const uint16_t *asked, int n, const uint16_t *names) {
    for (int i = 0; i < n; i++) {
        task_put(t, " v");
        task_put_digits(t, names[asked[i]], 2);
    }
}

static void make_vt(task_sample *s) {
    uint16_t names[100], asked[100], values[100];
    task_distinct(&s->rng, names, 100, s->size);
    int n = task_draw_queries(&s->question_rng, s->size);
    task_distinct(&s->question_rng, asked, s->size, n);
    task_put(&s->prompt, "vt");
    if (s->aware) {
        task_put(&s->prompt, " get");
        put_names(&s->prompt, asked, n, names);
        task_put(&s->prompt, " from");
    }
    for (int i = 0; i < s->size; i++) {
        task_put(&s->prompt, " v");
        task_put_digits(&s->prompt, names[i], 2);
        task_put_char(&s->prompt, '=');
        if (i == 0 || task_draw(&s->rng, 10) < 4) {
            values[i] = (uint16_t)task_draw(&s->rng, 1000);
            task_put_digits(&s->prompt, values[i], 3);
        } else {
            int from = task_draw(&s->rng, i);
            values[i] = values[from];
            task_put_char(&s->prompt, 'v');
            task_put_digits(&s->prompt, names[from], 2);
        }
    }
    task_put(&s->prompt, " get");
    put_names(&s->prompt, asked, n, names);
    task_put_char(&s->prompt, '=');
    for (int i = 0; i < n; i++) {
        if (i > 0) task_put_char(&s->answer, ',');
        task_put_digits(&s->answer, values[asked[i]], 3);
    }
}

/* ---- sudoku: rows, columns and 2x2 boxes of a 4x4 grid hold 1..4 --------------------------------------------------- */

static bool cell_allows(const uint8_t *grid, int cell, int value) {
    int row = cell / 4, column = cell % 4, box = row / 2 * 8 + column / 2 * 2;
    for (int i = 0; i < 4; i++)
        if (grid[row * 4 + i] == value || grid[i * 4 + column] == value || grid[box + i / 2 * 4 + i % 2] == value)
            return false;
    return true;
}

/* Number of ways to fill the zeros, counted up to `limit`. */
static int count_fillings(uint8_t *grid, int cell, int limit) {
    while (cell < 16 && grid[cell]) cell++;
    if (cell == 16) return 1;
    int n = 0;
    for (int v = 1; v <= 4 && n < limit; v++)
        if (cell_allows(grid, cell, v)) {
            grid[cell] = (uint8_t)v;
            n += count_fillings(grid, cell + 1, limit - n);
            grid[cell] = 0;
        }
    return n;
}

static bool fill_at_random(task_rng *r, uint8_t *grid, int cell) {
    uint16_t values[4];
    if (cell == 16) return true;
    task_distinct(r, values, 4, 4);
    for (int i = 0; i < 4; i++)
        if (cell_allows(grid, cell, values[i] + 1)) {
            grid[cell] = (uint8_t)(values[i] + 1);
            if (fill_at_random(r, grid, cell + 1)) return true;
            grid[cell] = 0;
        }
    return false;
}

static void put_grid(task_text *t, const uint8_t *grid) {
    for (int i = 0; i < 16; i++) {
        if (i > 0 && i % 4 == 0) task_put_char(t, '/');
        task_put_digits(t, grid[i], 1);
    }
}

/* size: zeros wanted; fewer where no further cell can be emptied and leave one solution. */
static void make_sudoku(task_sample *s) {
    uint8_t grid[16] = {0};
    uint16_t cells[16];
    fill_at_random(&s->rng, grid, 0);
    put_grid(&s->answer, grid);
    task_distinct(&s->rng, cells, 16, 16);
    for (int i = 0, holes = 0; i < 16 && holes < s->size; i++) {
        uint8_t value = grid[cells[i]];
        grid[cells[i]] = 0;
        if (count_fillings(grid, 0, 2) == 1)
            holes++;
        else
            grid[cells[i]] = value;
    }
    task_put(&s->prompt, "sudoku ");
    put_grid(&s->prompt, grid);
    task_put_char(&s->prompt, '=');
}

/* 19 characters, digits from `low` to 4; false if it is no such grid. */
static bool read_grid(const char *s, size_t len, int low, uint8_t *grid) {
    if (len < 19) return false;
    for (int i = 0, cell = 0; i < 19; i++) {
        if (i % 5 == 4) {
            if (s[i] != '/') return false;
        } else {
            if (s[i] < '0' + low || s[i] > '4') return false;
            grid[cell++] = (uint8_t)(s[i] - '0');
        }
    }
    return true;
}

static bool check_sudoku(const char *prompt, const char *answer, const char *completion, size_t len) {
    uint8_t given[16], grid[16];
    const char *text = strchr(prompt, ' ');
    (void)answer;
    if (!text || !read_grid(text + 1, strlen(text + 1), 0, given) || len != 19 || !read_grid(completion, len, 1, grid))
        return false;
    for (int i = 0; i < 16; i++) {
        uint8_t value = grid[i];
        grid[i] = 0;
        bool ok = cell_allows(grid, i, value) && (!given[i] || given[i] == value);
        grid[i] = value;
        if (!ok) return false;
    }
    return true;
}

/* ---- countdown ---------------------------------------------------------------------------------------------------- */

#define COUNTDOWN_MAX 4

/* a op b; -1: not allowed (below 1 or above 999). */
static int apply(int a, char op, int b) {
    int c = op == '+' ? a + b : op == '-' ? a - b : a * b;
    return c < 1 || c > 999 ? -1 : c;
}

static void make_countdown(task_sample *s) {
    int numbers[COUNTDOWN_MAX], n = s->size;
    task_put(&s->prompt, "countdown ");
    for (int i = 0; i < n; i++) {
        numbers[i] = task_range(&s->rng, 1, 20);
        if (i > 0) task_put_char(&s->prompt, ',');
        task_put_int(&s->prompt, numbers[i]);
    }
    for (; n > 1; n--) {
        int i = task_draw(&s->rng, n), j = task_draw(&s->rng, n - 1);
        j += j >= i;
        int a = numbers[i] > numbers[j] ? numbers[i] : numbers[j], b = numbers[i] + numbers[j] - a;
        char op = "+-*"[task_draw(&s->rng, 3)];
        if (apply(a, op, b) < 0 || (op == '*' && (b == 1 || apply(a, op, b) > 200))) op = '+';
        int c = apply(a, op, b);
        if (n < s->size) task_put_char(&s->answer, ',');
        task_put_int(&s->answer, a);
        task_put_char(&s->answer, op);
        task_put_int(&s->answer, b);
        task_put_char(&s->answer, '=');
        task_put_int(&s->answer, c);
        numbers[i < j ? i : j] = c;
        numbers[i < j ? j : i] = numbers[n - 1];
    }
    task_put(&s->prompt, " to ");
    task_put_int(&s->prompt, numbers[0]);
    task_put_char(&s->prompt, ':');
}

static bool take(int64_t *numbers, int *n, int64_t value) {
    for (int i = 0; i < *n; i++)
        if (numbers[i] == value) {
            numbers[i] = numbers[--*n];
            return true;
        }
    return false;
}

static bool check_countdown(const char *prompt, const char *answer, const char *completion, size_t len) {
    int64_t numbers[COUNTDOWN_MAX + 1];
    int n = 0;
    const char *p = strchr(prompt, ' '), *end = prompt + strlen(prompt);
    (void)answer;
    if (!p) return false;
    do {
        p++;
        if (n == COUNTDOWN_MAX || (numbers[n] = task_number(&p, end)) < 0) return false;
        n++;
    } while (*p == ',');
    if (strncmp(p, " to ", 4) != 0) return false;
    p += 4;
    int64_t target = task_number(&p, end);
    const char *c = completion, *stop = completion + len;
    while (c < stop) {
        int64_t a = task_number(&c, stop);
        if (a < 0 || c == stop || !take(numbers, &n, a)) return false;
        char op = *c++;
        int64_t b = task_number(&c, stop);
        if (b < 0 || c == stop || *c++ != '=' || !take(numbers, &n, b)) return false;
        int64_t result = task_number(&c, stop);
        if (!strchr("+-*", op) || op == 0 || a > 999 || b > 999 || result < 0 || apply((int)a, op, (int)b) != result)
            return false;
        numbers[n++] = result;
        if (c < stop && (*c++ != ',' || c == stop)) return false;
    }
    return n == 1 && numbers[0] == target;
}

const task_entry task_short_entries[] = {
    {{"add", "the sum of two numbers", TASK_SHORT, true, "digits", 1, 8, 1, 6, 0, 0}, make_add, NULL},
    {{"sort", "the digits in ascending order", TASK_SHORT, true, "digits", 1, 32, 4, 24, 0, 0}, make_sort, NULL},
    {{"reverse", "the digits from the last to the first", TASK_SHORT, true, "digits", 1, 32, 4, 24, 0, 0},
     make_reverse,
     NULL},
    {{"copy", "the digits once more", TASK_SHORT, true, "digits", 1, 32, 4, 24, 0, 0}, make_copy, NULL},
    {{"vt", "values of variables assigned from one another", TASK_SHORT, true, "assignments", 1, 40, 4, 20, 0, 0},
     make_vt,
     NULL},
    {{"sudoku", "a 4x4 grid filled in", TASK_SHORT, true, "empty cells", 1, 12, 4, 12, 0, 0},
     make_sudoku,
     check_sudoku},
    {{"countdown", "a number made from others, step by step", TASK_SHORT, true, "numbers", 2, COUNTDOWN_MAX, 3, 3, 0,
      0},
     make_countdown,
     check_countdown},
};
const int task_short_num = (int)(sizeof task_short_entries / sizeof task_short_entries[0]);
