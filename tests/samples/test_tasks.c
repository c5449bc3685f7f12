/* tests/samples/test_tasks.c - the text tasks: answers worked out again from the prompts, scores of right and wrong
 * completions, sizes and lengths, the same bytes for ever. */
#include "samples/tasks/tasks.h"

#include "tests/test_util.h"

#include <stdarg.h>

enum { SEEDS = 150 };

typedef struct {
    char prompt[TASK_MAX_PROMPT], answer[TASK_MAX_ANSWER];
} sample;

static char corpus[20000];

static void fill_corpus(void) {
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof corpus; i++) {
        state = state * 1664525u + 1013904223u;
        corpus[i] = "etaoin shrdlu,.\n"[state >> 28];
    }
}

static uint64_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static bool is(const task_info *info, const char *name) {
    return strcmp(info->name, name) == 0;
}

/* Fills in the corpus and makes the sample, which must work. */
static void make(int task, uint64_t seed, task_settings settings, sample *s) {
    settings.corpus = corpus;
    settings.corpus_len = sizeof corpus;
    int result = task_generate(task, seed, &settings, s->prompt, sizeof s->prompt, s->answer, sizeof s->answer);
    ck_assert_msg(result == 0, "%s, seed %llu: refused", task_at(task)->name, (unsigned long long)seed);
}

/* A setting of the size or the length, as the task has it. */
static task_settings settings_of(const task_info *info, size_t value) {
    return info->size_name ? (task_settings){.size = (int)value} : (task_settings){.length = value};
}
static size_t lowest(const task_info *info) {
    return info->size_name ? (size_t)info->min_size : info->min_length;
}
static size_t highest(const task_info *info) {
    return info->size_name ? (size_t)info->max_size : info->max_length;
}

static double score(const char *name, const char *prompt, const char *completion) {
    return task_score(task_find(name), prompt, "", completion);
}

static size_t count(const char *text, const char *part) {
    size_t n = 0;
    for (; (text = strstr(text, part)) != NULL; text++) n++;
    return n;
}

/* ---- names ---- */

START_TEST(names_are_found) {
    static const char *const all[] = {"add",     "sort",     "reverse",   "copy",      "vt",      "sudoku", "countdown",
                                      "total",   "multiply", "eval",      "trace",     "chain",   "walk",   "kv",
                                      "kv-long", "needle",   "needle-mk", "needle-mv", "vt-long", "cwe",    "text"};
    static const char *const unknown[] = {"", "ad", "addd", "ADD", " add", "add ", "needle-", "none"};
    ck_assert_int_eq(task_count(), (int)(sizeof all / sizeof all[0]));
    for (int i = 0; i < task_count(); i++) {
        const task_info *info = task_at(task_find(all[i]));
        ck_assert_ptr_nonnull(info);
        ck_assert_str_eq(info->name, all[i]);
        ck_assert_int_eq(task_find(task_at(i)->name), i);
        ck_assert(info->about && info->about[0] && !strchr(info->about, '\n'));
        ck_assert(info->exact == !is(info, "text"));
        if (info->size_name) {
            ck_assert(1 <= info->min_size && info->min_size <= info->usual_min && info->usual_min <= info->usual_max &&
                      info->usual_max <= info->max_size);
            ck_assert(info->min_length == 0 && info->max_length == 0);
        } else {
            ck_assert(info->min_size == 0 && info->max_size == 0);
            ck_assert(0 < info->min_length && info->min_length < info->max_length &&
                      info->max_length < TASK_MAX_PROMPT);
        }
    }
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) ck_assert_int_eq(task_find(unknown[i]), -1);
    ck_assert_ptr_null(task_at(-1));
    ck_assert_ptr_null(task_at(task_count()));
}
END_TEST

/* ---- answers, worked out again ---- */

typedef struct {
    char text[TASK_MAX_ANSWER];
    size_t len;
} lines;

static void add_text(lines *l, const char *format, ...) {
    va_list list;
    va_start(list, format);
    l->len += (size_t)vsnprintf(l->text + l->len, sizeof l->text - l->len, format, list);
    va_end(list);
    ck_assert_uint_lt(l->len, sizeof l->text);
}

static void want_sum(const char *prompt, lines *want) {
    long long a, b;
    int end = 0;
    ck_assert(sscanf(prompt, "%lld+%lld=%n", &a, &b, &end) == 2 && prompt[end] == 0 && end > 0);
    add_text(want, "%lld", a + b);
}

static void want_digits(const char *prompt, lines *want) {
    char digits[64] = "";
    ck_assert_int_eq(sscanf(prompt, "%*[a-z] %63[0-9]=", digits), 1);
    int n = (int)strlen(digits);
    if (prompt[0] == 's') {
        for (int d = '0'; d <= '9'; d++)
            for (int i = 0; i < n; i++)
                if (digits[i] == d) add_text(want, "%c", d);
    } else {
        for (int i = 0; i < n; i++) add_text(want, "%c", digits[prompt[0] == 'c' ? i : n - 1 - i]);
    }
}

/* kv and vt: the last "NAME=" of each name asked for, until it is a number. */
static void want_values(const char *prompt, lines *want) {
    const char *question = NULL;
    for (const char *p = prompt; (p = strstr(p, " get ")) != NULL; p++) question = p;
    ck_assert_ptr_nonnull(question);
    ck_assert_uint_eq(strlen(question) % 4, 1);
    for (const char *p = question + 4; *p != '='; p += 4) {
        char key[6] = {' ', p[1], p[2], p[3], '=', 0};
        const char *value = NULL;
        for (int hops = 0; hops < 64; hops++) {
            value = strstr(prompt, key);
            ck_assert(value && value < question);
            value += 5;
            if (value[0] >= '0' && value[0] <= '9') break;
            memcpy(key + 1, value, 3);
        }
        add_text(want, "%s%.3s", want->len ? "," : "", value);
    }
}

static bool fits(const char *grid, int cell, char value) {
    for (int i = 0; i < 16; i++) {
        bool seen = i / 4 == cell / 4 || i % 4 == cell % 4 || (i / 8 == cell / 8 && i % 4 / 2 == cell % 4 / 2);
        if (i != cell && seen && grid[i] == value) return false;
    }
    return true;
}

/* Number of solutions; the last one found in `solved`. */
static int solve_grid(char *grid, int cell, char *solved) {
    while (cell < 16 && grid[cell] != '0') cell++;
    if (cell == 16) {
        memcpy(solved, grid, 16);
        return 1;
    }
    int n = 0;
    for (char v = '1'; v != '5'; v++) {
        if (!fits(grid, cell, v)) continue;
        grid[cell] = v;
        n += solve_grid(grid, cell + 1, solved);
        grid[cell] = '0';
    }
    return n;
}

static void want_grid(const char *prompt, lines *want) {
    char g[17] = "", s[16];
    ck_assert_int_eq(sscanf(prompt, "sudoku %4[0-4]/%4[0-4]/%4[0-4]/%4[0-4]=", g, g + 4, g + 8, g + 12), 4);
    ck_assert_uint_eq(strlen(g), 16);
    ck_assert_int_eq(solve_grid(g, 0, s), 1);
    add_text(want, "%.4s/%.4s/%.4s/%.4s", s, s + 4, s + 8, s + 12);
}

static void want_total(const char *prompt, lines *want) {
    const char *p = strchr(prompt, ' ');
    long sum = strtol(p, (char **)&p, 10);
    while (*p == ',') {
        long value = strtol(p + 1, (char **)&p, 10);
        add_text(want, "%s%ld+%ld=%ld", want->len ? "\n" : "", sum, value, sum + value);
        sum += value;
    }
    ck_assert_str_eq(p, ":");
}

static void want_product(const char *prompt, lines *want) {
    long long a, b, place = 1, sum = 0;
    ck_assert_int_eq(sscanf(prompt, "multiply %lld*%lld=", &a, &b), 2);
    for (long long left = b; left > 0; left /= 10, place *= 10) {
        long long by = left % 10 * place;
        add_text(want, "%s%lld*%lld=%lld", place > 1 ? "\n" : "", a, by, a * by);
        if (place > 1) add_text(want, ";%lld+%lld=%lld", sum, a * by, sum + a * by);
        sum += a * by;
    }
    ck_assert_int_eq(sum, a * b);
}

/* Value of an expression at *p, every pair of parentheses within 0..99; the number of operations is added. */
static int value_of(const char **p, int *operations) {
    int side[2];
    char op = 0;
    for (int i = 0; i < 2; i++) {
        if (**p == '(') {
            ++*p;
            side[i] = value_of(p, operations);
            ck_assert_int_eq(*(*p)++, ')');
        } else {
            ck_assert(**p >= '0' && **p <= '9');
            side[i] = (int)strtol(*p, (char **)p, 10);
        }
        if (i == 0 && (**p == 0 || **p == ')')) return side[0];
        if (i == 0) op = *(*p)++;
    }
    ck_assert(op == '+' || op == '-' || op == '*');
    int value = op == '+' ? side[0] + side[1] : op == '-' ? side[0] - side[1] : side[0] * side[1];
    ck_assert(value >= 0 && value <= 99);
    ++*operations;
    return value;
}

/* Every line has the value of the first and one operation less; the first innermost parentheses go first, so the bytes
 * before the change are those before the first ')' and its '('. */
static void check_lines_of_eval(const char *prompt, const char *answer) {
    char line[512], before[512];
    int left = 0;
    ck_assert_int_eq(sscanf(prompt, "eval %511[^=]=", before), 1);
    const char *p = before, *a = answer;
    int value = value_of(&p, &left);
    ck_assert_int_eq(*p, 0);
    while (left > 0) {
        int now = 0;
        size_t n = strcspn(a, "\n");
        snprintf(line, sizeof line, "%.*s", (int)n, a);
        p = line;
        ck_assert_int_eq(value_of(&p, &now), value);
        ck_assert_int_eq(*p, 0);
        ck_assert_int_eq(now, --left);
        const char *close = strchr(before, ')');
        if (close) {
            const char *open = close;
            while (*open != '(') open--;
            ck_assert(strncmp(line, before, (size_t)(open - before)) == 0);
            ck_assert_str_eq(line + strlen(line) - strlen(close + 1), close + 1);
        }
        memcpy(before, line, sizeof line);
        a += n + (a[n] == '\n');
    }
    ck_assert_int_eq(*a, 0);
}

static void want_trace(const char *prompt, lines *want) {
    int v[4], at = 0;
    ck_assert_int_eq(sscanf(prompt, "trace %d,%d,%d,%d%n", &v[0], &v[1], &v[2], &v[3], &at), 4);
    for (const char *p = prompt + at; *p == ';';) {
        const char *begin = ++p, *equals = strchr(p, '=');
        int to = *p - 'a', by = equals[1] >= 'a' ? v[equals[1] - 'a'] : equals[1] - '0';
        v[to] = (100 + (p[1] == '+' ? v[to] + by : p[1] == '-' ? v[to] - by : by)) % 100;
        p = equals + 2;
        add_text(want, "%s%.*s %d,%d,%d,%d", want->len ? "\n" : "", (int)(p - begin), begin, v[0], v[1], v[2], v[3]);
    }
}

static void want_chain(const char *prompt, lines *want) {
    int before, x, factor, steps;
    ck_assert_int_eq(sscanf(prompt, "chain %d,%d*%d,%d:", &before, &x, &factor, &steps), 4);
    for (int i = 0; i < steps; i++) {
        int next = x * factor + before;
        add_text(want, "%s%d*%d+%d=%d", i ? "\n" : "", x, factor, before, next);
        before = x;
        x = next % 100;
    }
}

static void want_walk(const char *prompt, lines *want) {
    int x, y, by, used = 0;
    char to;
    ck_assert_int_eq(sscanf(prompt, "walk %d,%d%n", &x, &y, &used), 2);
    for (const char *p = prompt + used; sscanf(p, " %c%d%n", &to, &by, &used) == 2; p += used) {
        x += to == 'e' ? by : to == 'w' ? -by : 0;
        y += to == 'n' ? by : to == 's' ? -by : 0;
        x = (x + 100) % 100;
        y = (y + 100) % 100;
        add_text(want, "%s%d,%d", want->len ? ";" : "", x, y);
    }
}

/* The last word of the question and the numbers that the context has for it. */
static void want_needles(const char *prompt, lines *want) {
    char word[32], sentence[96];
    const char *question = NULL;
    for (const char *p = prompt; (p = strstr(p, " What ")) != NULL; p++) question = p;
    ck_assert_ptr_nonnull(question);
    const char *end = strchr(question, '?'), *begin = end;
    while (begin[-1] != ' ') begin--;
    snprintf(word, sizeof word, "%.*s", (int)(end - begin), begin);
    int n = snprintf(sentence, sizeof sentence, " The magic number for %s is ", word);
    for (const char *p = prompt; (p = strstr(p, sentence)) != NULL; p += n) {
        ck_assert_uint_eq(strspn(p + n, "0123456789"), 5);
        ck_assert_int_eq(p[n + 5], '.');
        add_text(want, "%s%.5s", want->len ? "," : "", p + n);
    }
}

static void want_variables(const char *prompt, lines *want) {
    bool holds[100] = {false};
    char question[64], value[16];
    const char *q = strrchr(prompt, '?');
    snprintf(question, sizeof question, "%.*s", 5, q - 5);
    for (const char *p = prompt; (p = strstr(p, " Set v")) != NULL; p++) {
        int name = atoi(p + 6);
        snprintf(value, sizeof value, "%.*s", (int)strcspn(p + 9, "."), p + 9);
        holds[name] = value[0] == 'v' ? holds[atoi(value + 1)] : strcmp(value, question) == 0;
        if (holds[name]) add_text(want, "%sv%02d", want->len ? "," : "", name);
    }
}

static void want_common(const char *prompt, lines *want) {
    struct {
        char word[16];
        int times;
    } seen[128] = {0};
    int num = 0, most[5] = {0}, used;
    const char *p = prompt;
    while ((p = strstr(p, "common?")) != NULL && strncmp(p + 7, " Answer:", 8) != 0) prompt = p += 7; /* aware */
    if (strncmp(prompt, "cwe:", 4) == 0) prompt += 4;
    char word[16], next = 0;
    for (p = prompt; next != '.'; p += used) {
        int i = 0;
        ck_assert_int_eq(sscanf(p, " %15[a-z]%n", word, &used), 1);
        next = p[used];
        while (i < num && strcmp(seen[i].word, word) != 0) i++;
        if (i == num) memcpy(seen[num++].word, word, sizeof word);
        seen[i].times++;
        ck_assert_int_lt(num, 128);
    }
    for (int i = 0; i < num; i++)
        for (int k = 0; k < 5; k++)
            if (seen[i].times > most[k]) {
                memmove(&most[k + 1], &most[k], (size_t)(4 - k) * sizeof most[0]);
                most[k] = seen[i].times;
                break;
            }
    ck_assert_int_eq(most[0], most[3]);
    ck_assert_int_gt(most[3], 4 * most[4]);
    for (int i = 0; i < num; i++)
        if (seen[i].times == most[0]) add_text(want, " %s", seen[i].word);
}

static const struct {
    const char *name;
    void (*want)(const char *prompt, lines *want);
} solvers[] = {{"add", want_sum},           {"sort", want_digits},       {"reverse", want_digits},
               {"copy", want_digits},       {"vt", want_values},         {"kv", want_values},
               {"kv-long", want_values},    {"sudoku", want_grid},       {"total", want_total},
               {"multiply", want_product},  {"trace", want_trace},       {"chain", want_chain},
               {"walk", want_walk},         {"needle", want_needles},    {"needle-mk", want_needles},
               {"needle-mv", want_needles}, {"vt-long", want_variables}, {"cwe", want_common}};

START_TEST(answers_are_right) {
    static sample s;
    static lines want;
    uint64_t random = 3;
    for (size_t k = 0; k < sizeof solvers / sizeof solvers[0]; k++) {
        int task = task_find(solvers[k].name);
        const task_info *info = task_at(task);
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            task_settings settings = {0};
            size_t low = lowest(info);
            if (seed % 2) settings = settings_of(info, low + next_random(&random) % (highest(info) - low + 1));
            settings.aware = seed % 3 == 0;
            settings.question = (int)(seed % 5);
            make(task, seed, settings, &s);
            want = (lines){0};
            solvers[k].want(s.prompt, &want);
            ck_assert_msg(strcmp(s.answer, want.text) == 0, "%s\nsays %s\nnot  %s", s.prompt, s.answer, want.text);
        }
    }
    for (uint64_t seed = 0; seed < SEEDS; seed++)
        for (int size = 1; size <= 16; size += 5) {
            make(task_find("eval"), seed, (task_settings){.size = size}, &s);
            check_lines_of_eval(s.prompt, s.answer);
        }
}
END_TEST

START_TEST(text_is_a_piece_of_the_corpus) {
    static sample s;
    static char whole[8193], zeroed[sizeof corpus + 1];
    int task = task_find("text");
    memcpy(zeroed, corpus, sizeof corpus);
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        size_t length = seed == 0 ? 64 : seed == 1 ? 8192 : 64 + seed * 20;
        make(task, seed, (task_settings){.length = length}, &s);
        ck_assert_uint_eq(strlen(s.prompt), length / 2);
        ck_assert_uint_eq(strlen(s.answer), length - length / 2);
        memcpy(whole, s.prompt, length / 2);
        memcpy(whole + length / 2, s.answer, length - length / 2 + 1);
        ck_assert_ptr_nonnull(strstr(zeroed, whole));
        ck_assert(task_score(task, s.prompt, s.answer, s.answer) == -1.0);
    }
    /* a corpus shorter than the length is used whole */
    task_settings few = {.length = 1000, .corpus = "abcdefg", .corpus_len = 7};
    ck_assert_int_eq(task_generate(task, 1, &few, s.prompt, sizeof s.prompt, s.answer, sizeof s.answer), 0);
    ck_assert_str_eq(s.prompt, "abc");
    ck_assert_str_eq(s.answer, "defg");
}
END_TEST

/* ---- the same bytes for ever: the models were trained on them ---- */

static uint64_t hash_more(uint64_t hash, const char *text) { /* FNV-1a, the final 0 too */
    do {
        hash ^= (unsigned char)*text;
        hash *= 0x100000001b3u;
    } while (*text++);
    return hash;
}

START_TEST(bytes_stay_the_same) {
    static const struct {
        const char *name;
        uint64_t hash; /* of 32 samples */
    } golden[] = {
        {"add", 0xfe27e8fb0941b659},       {"sort", 0xbb061b6d4fd1ebd5},      {"reverse", 0xdc918e916e6639b7},
        {"copy", 0xd87963ba7c97a267},      {"vt", 0x15f02983553f4a1b},        {"sudoku", 0xb15cb79a513ca8d9},
        {"countdown", 0x76b895e71404ef13}, {"total", 0x7d8bc54f0ed05f75},     {"multiply", 0xf99070c8855c9941},
        {"eval", 0xfe42b75372312246},      {"trace", 0xf2703bc62f8a51e9},     {"chain", 0x4daf073b3eb57d8a},
        {"walk", 0x9adcf2234a9f6be1},      {"kv", 0x611b5a4db77d0388},        {"kv-long", 0x62f515d9081b9cbf},
        {"needle", 0xe96ea7489bcbb71e},    {"needle-mk", 0x38423b99394e82b4}, {"needle-mv", 0x1d45ba7320f8509b},
        {"vt-long", 0x7bc59e852da3c649},   {"cwe", 0x712614b7c34da4c5},       {"text", 0x762124b65f283fb2},
    };
    static sample s, again;
    ck_assert_int_eq((int)(sizeof golden / sizeof golden[0]), task_count());
    for (size_t k = 0; k < sizeof golden / sizeof golden[0]; k++) {
        int task = task_find(golden[k].name);
        const task_info *info = task_at(task);
        uint64_t hash = 0xcbf29ce484222325u;
        for (uint64_t i = 0; i < 32; i++) {
            uint64_t seed = i < 16 ? i : i * 0x9e3779b97f4a7c15u;
            task_settings settings = {0};
            if (i % 4 == 1) settings = settings_of(info, i % 8 == 1 ? lowest(info) : highest(info));
            settings.aware = i % 4 == 2;
            settings.question = i % 4 == 3 ? (int)i : 0;
            make(task, seed, settings, &s);
            memset(&again, 0x5a, sizeof again);
            make(task, seed, settings, &again);
            ck_assert_str_eq(s.prompt, again.prompt);
            ck_assert_str_eq(s.answer, again.answer);
            hash = hash_more(hash_more(hash, s.prompt), s.answer);
        }
        ck_assert_msg(hash == golden[k].hash, "%s: 0x%016llx", golden[k].name, (unsigned long long)hash);
    }
}
END_TEST

START_TEST(the_format_is_as_described) {
    static const struct {
        const char *name;
        int size;
        size_t length;
        const char *prompt, *answer;
    } examples[] = {
        {"add", 3, 0, "496+340=", "836"},
        {"sort", 6, 0, "sort 883962=", "236889"},
        {"reverse", 6, 0, "reverse 883962=", "269388"},
        {"copy", 6, 0, "copy 883962=", "883962"},
        {"vt", 4, 0, "vt v82=623 v89=466 v35=952 v92=v35 get v92 v89 v82 v35=", "952,466,623,952"},
        {"sudoku", 6, 0, "sudoku 4312/0030/1243/3000=", "4312/2134/1243/3421"},
        {"countdown", 3, 0, "countdown 17,18,7 to 42:", "18+7=25,25+17=42"},
        {"total", 4, 0, "total 898,91,26,2:", "898+91=989\n989+26=1015\n1015+2=1017"},
        {"multiply", 3, 0, "multiply 9082*496=",
         "9082*6=54492\n9082*90=817380;54492+817380=871872\n9082*400=3632800;871872+3632800=4504672"},
        {"eval", 4, 0, "eval ((9*9)+3)+(1+9)=", "(81+3)+(1+9)\n84+(1+9)\n84+10\n94"},
        {"trace", 3, 0, "trace 82,89,34,91;c-=5;a=d;d+=3:", "c-=5 82,89,29,91\na=d 91,89,29,91\nd+=3 91,89,29,94"},
        {"chain", 3, 0, "chain 82,89*4,3:", "89*4+82=438\n38*4+89=241\n41*4+38=202"},
        {"walk", 3, 0, "walk 82,89 e9 s3 e1:", "91,89;91,86;92,86"},
        {"kv", 4, 0, "kv v42=623 x35=258 i92=466 x89=014 get x89 x35 v42 i92=", "014,258,623,466"},
        {"needle", 0, 256,
         "needle: The sun is not up yet. The light will not last. The magic number for oath is 90829. The king is not "
         "at home. There and back once more. The sea is still. The night is long. The light will not last. What is the "
         "magic number for oath? Answer:",
         "90829"},
        {"needle-mv", 0, 512,
         "needle: The road is dark. The horse is at the gate. The magic number for oath is 95567. There and back once "
         "more. The magic number for sight is 17239. They sit by the fire. The magic number for sight is 33384. The "
         "magic number for oath is 84881. The magic number for oath is 46373. The horse is at the gate. The magic "
         "number for sight is 11507. The magic number for sight is 69002. The magic number for oath is 23255. There "
         "and back once more. What are the four magic numbers for oath? Answer:",
         "95567,84881,46373,23255"},
        {"vt-long", 0, 512,
         "vt-long: Set v82=11507. Set v07=23255. Set v89=v82. Set v18=v07. Set v34=v18. Set v35=v89. No one makes a "
         "sound. Set v85=v34. Set v48=v85. Set v92=v35. The sea is still. Set v63=v92. Set v29=69002. Set v49=v29. The "
         "sun is not up yet. The sea is still. The horse is at the gate. The horse is at the gate. Here we go again. A "
         "wind comes from the east. A wind comes from the east. No one makes a sound. Set v08=v49. The light will not "
         "last. Set v95=v08. Set v96=v95. Which five hold 69002? Answer:",
         "v29,v49,v08,v95,v96"},
    };
    static sample s;
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++) {
        make(task_find(examples[i].name), 1, (task_settings){.size = examples[i].size, .length = examples[i].length},
             &s);
        ck_assert_str_eq(s.prompt, examples[i].prompt);
        ck_assert_str_eq(s.answer, examples[i].answer);
    }
}
END_TEST

START_TEST(seeds_differ) {
    static sample a, b;
    for (int task = 0; task < task_count(); task++) {
        int same = 0;
        for (uint64_t seed = 0; seed < 64; seed++) {
            make(task, seed, (task_settings){0}, &a);
            make(task, seed + 1, (task_settings){0}, &b);
            same += strcmp(a.prompt, b.prompt) == 0;
        }
        ck_assert_msg(same <= 2, "%s: %d of 64", task_at(task)->name, same);
    }
}
END_TEST

/* ---- sizes and lengths ---- */

static int digits_at(const char *s) {
    return (int)strspn(s, "0123456789");
}

/* The size, read off a prompt; grids may have fewer empty cells than asked for. */
static int size_in(const char *name, const char *prompt) {
    static const char *const marks[][2] = {{"vt", "="},    {"kv", "="},    {"countdown", ","},
                                           {"total", ","}, {"trace", ";"}, {"sudoku", "0"}};
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
        if (strcmp(name, marks[i][0]) == 0) {
            int n = (int)count(prompt, marks[i][1]);
            return marks[i][1][0] == '=' ? n - 1 : marks[i][1][0] == ',' ? n + 1 : n;
        }
    if (strcmp(name, "add") == 0) {
        int a = digits_at(prompt), b = digits_at(strchr(prompt, '+') + 1);
        return a > b ? a : b;
    }
    if (strcmp(name, "multiply") == 0) return digits_at(strchr(prompt, '*') + 1);
    if (strcmp(name, "eval") == 0) return (int)(count(prompt, "+") + count(prompt, "-") + count(prompt, "*"));
    if (strcmp(name, "chain") == 0) return atoi(strrchr(prompt, ',') + 1);
    if (strcmp(name, "walk") == 0) return (int)count(prompt, " ") - 1;
    return digits_at(strchr(prompt, ' ') + 1); /* sort, reverse, copy */
}

START_TEST(sizes_are_kept) {
    static sample s;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        if (!info->size_name) continue;
        int smallest = 1000, largest = 0;
        for (uint64_t seed = 0; seed < 600; seed++) {
            make(task, seed, (task_settings){0}, &s);
            int size = size_in(info->name, s.prompt);
            smallest = size < smallest ? size : smallest;
            largest = size > largest ? size : largest;
        }
        ck_assert_int_eq(smallest, info->usual_min);
        ck_assert(is(info, "sudoku") ? largest <= info->usual_max : largest == info->usual_max);
        for (int size = info->min_size; size <= info->max_size; size++)
            for (uint64_t seed = 0; seed < 8; seed++) {
                make(task, seed, (task_settings){.size = size, .aware = false}, &s);
                int found = size_in(info->name, s.prompt);
                ck_assert_msg(is(info, "sudoku") ? found <= size && found >= (size < 8 ? size : 8) : found == size,
                              "%s of %d: %s", info->name, size, s.prompt);
            }
    }
}
END_TEST

START_TEST(lengths_are_kept) {
    static sample s;
    uint64_t random = 5;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        if (info->kind != TASK_RECALL) continue;
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            size_t length = seed == 0 ? info->min_length
                            : seed == 1
                                ? info->max_length
                                : info->min_length + next_random(&random) % (info->max_length - info->min_length + 1);
            make(task, seed, (task_settings){.length = length, .aware = seed % 2}, &s);
            size_t found = strlen(s.prompt);
            /* a sentence or a word less; cwe cannot use up every length with whole counts of its 96 words */
            size_t slack = is(info, "cwe") ? length / 2 : 64;
            ck_assert_msg(found <= length + is(info, "cwe") && found + slack >= length, "%s: %zu for %zu", info->name,
                          found, length);
            ck_assert_uint_lt(found, TASK_MAX_PROMPT);
        }
        for (uint64_t seed = 0; seed < 32; seed++) {
            make(task, seed, (task_settings){0}, &s);
            ck_assert_uint_le(strlen(s.prompt), info->max_length + 1);
        }
    }
}
END_TEST

START_TEST(settings_out_of_range_are_refused) {
    static sample s;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        task_settings bad[4] = {
            settings_of(info, lowest(info) - 1), settings_of(info, highest(info) + 1), {.question = -1}, {.size = -1}};
        for (int i = 0; i < (info->size_name ? 4 : 3); i++) {
            bad[i].corpus = corpus;
            bad[i].corpus_len = sizeof corpus;
            bool drawn = i == 0 && info->size_name && lowest(info) == 1; /* 0: none set */
            ck_assert_int_eq(task_generate(task, 1, &bad[i], s.prompt, sizeof s.prompt, s.answer, sizeof s.answer),
                             drawn ? 0 : -1);
        }
        ck_assert_int_eq(task_generate(task, 1, NULL, s.prompt, sizeof s.prompt, s.answer, sizeof s.answer),
                         info->kind == TASK_TEXT ? -1 : 0);
    }
    ck_assert_int_eq(task_generate(-1, 1, NULL, s.prompt, sizeof s.prompt, s.answer, sizeof s.answer), -1);
    ck_assert_int_eq(task_generate(task_count(), 1, NULL, s.prompt, sizeof s.prompt, s.answer, sizeof s.answer), -1);
    ck_assert(task_score(-1, "1+1=", "2", "2") == -1.0);
    ck_assert(task_score(task_count(), "1+1=", "2", "2") == -1.0);
}
END_TEST

/* Into buffers of `prompt_size` and `answer_size` bytes; one behind each is watched. */
static int make_in(int task, size_t prompt_size, size_t answer_size) {
    char *prompt = malloc(prompt_size + 1), *answer = malloc(answer_size + 1);
    task_settings settings = {.corpus = corpus, .corpus_len = sizeof corpus};
    ck_assert(prompt && answer);
    memset(prompt, 0x5a, prompt_size + 1);
    memset(answer, 0x5a, answer_size + 1);
    int result = task_generate(task, 9, &settings, prompt, prompt_size, answer, answer_size);
    ck_assert_int_eq(prompt[prompt_size], 0x5a);
    ck_assert_int_eq(answer[answer_size], 0x5a);
    if (prompt_size && answer_size) ck_assert(memchr(prompt, 0, prompt_size) && memchr(answer, 0, answer_size));
    free(prompt);
    free(answer);
    return result;
}

START_TEST(small_buffers_are_refused) {
    static sample s;
    for (int task = 0; task < task_count(); task++) {
        make(task, 9, (task_settings){0}, &s);
        size_t p = strlen(s.prompt) + 1, a = strlen(s.answer) + 1;
        ck_assert_int_eq(make_in(task, p, a), 0);
        for (size_t less = 1; less <= p; less += less < 40 ? 1 : 1 + p / 7)
            ck_assert_int_eq(make_in(task, p - less, a), -1);
        for (size_t less = 1; less <= a; less += less < 40 ? 1 : 1 + a / 7)
            ck_assert_int_eq(make_in(task, p, a - less), -1);
        ck_assert_int_eq(make_in(task, 0, 0), -1);
        ck_assert_int_eq(make_in(task, 1, 1), -1);
    }
}
END_TEST

/* ---- scores ---- */

static void assert_score(int task, const sample *s, const char *completion, double want) {
    ck_assert_msg(task_score(task, s->prompt, s->answer, completion) == want, "%s%s\nanswer %s\nshould score %g: %s",
                  task_at(task)->name, s->prompt, s->answer, want, completion);
}

START_TEST(own_answers_are_right_and_spoilt_ones_wrong) {
    static sample s;
    static char text[TASK_MAX_ANSWER + 64];
    static const char *const ends[] = {"0", "x", ",0", " 0", "\n0", ";", "=1", "\x80"}, *const spaces[] = {
                                                                                            " ", "\n", "\r\n", "\t \n"};
    uint64_t random = 7;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        if (!info->exact) continue;
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            task_settings settings = {0};
            if (seed % 3 == 0) settings = settings_of(info, seed % 2 ? lowest(info) : highest(info));
            make(task, seed, settings, &s);
            size_t len = strlen(s.answer);
            ck_assert_uint_gt(len, 0);
            assert_score(task, &s, s.answer, 1.0);
            for (size_t i = 0; i < sizeof spaces / sizeof spaces[0]; i++) {
                snprintf(text, sizeof text, "%s%s", s.answer, spaces[i]);
                assert_score(task, &s, text, 1.0);
            }
            for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
                snprintf(text, sizeof text, "%s%s", s.answer, ends[i]);
                assert_score(task, &s, text, 0.0);
            }
            for (size_t keep = 0; keep < len; keep += 1 + len / 64) { /* the empty one first */
                snprintf(text, sizeof text, "%.*s", (int)keep, s.answer);
                assert_score(task, &s, text, 0.0);
            }
            snprintf(text, sizeof text, "%.*s", (int)len - 1, s.answer);
            assert_score(task, &s, text, 0.0);
            for (size_t at = 0; at < len; at += 1 + len / 64) {
                memcpy(text, s.answer, len + 1);
                /* another digit for a digit; a letter for a sign, since 2+2 and 2*2 are both right */
                bool digit = text[at] >= '0' && text[at] <= '9';
                text[at] = digit ? (char)('0' + (text[at] - '0' + 1 + (int)(next_random(&random) % 9)) % 10) : 'q';
                if (text[at] != s.answer[at]) assert_score(task, &s, text, 0.0);
                memcpy(text, s.answer, at);
                memcpy(text + at, s.answer + at + 1, len - at); /* one left out */
                size_t end = len - 1;
                while (end > 0 && strchr(" \n", text[end - 1])) end--;
                bool separator = strchr(", ", s.answer[at]) && at == 0; /* before a list's first word: no matter */
                if (end > 0 && !separator) assert_score(task, &s, text, 0.0);
            }
        }
    }
}
END_TEST

START_TEST(garbage_scores_nothing) {
    static sample s;
    static char text[100001];
    uint64_t random = 11;
    for (int task = 0; task < task_count(); task++) {
        if (!task_at(task)->exact) continue;
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            static const char likely[] = "0123456789/,;+-*= \nv";
            make(task, seed, (task_settings){0}, &s);
            size_t n = seed == 0 ? sizeof text - 1 : next_random(&random) % 400;
            for (size_t i = 0; i < n; i++) {
                uint64_t r = next_random(&random);
                text[i] = seed % 2 ? (char)(1 + r % 255) : likely[r % (sizeof likely - 1)];
            }
            text[n] = 0;
            if (strcmp(text, s.answer) != 0) assert_score(task, &s, text, 0.0);
        }
        memset(text, '9', sizeof text - 1);
        text[sizeof text - 1] = 0;
        assert_score(task, &s, text, 0.0);
        memset(text, ' ', sizeof text - 1);
        assert_score(task, &s, text, 0.0);
        memset(text, ',', sizeof text - 1);
        assert_score(task, &s, text, 0.0);
    }
}
END_TEST

START_TEST(any_valid_grid_is_right) {
    static const char *const empty = "sudoku 0000/0000/0000/0000=", *const some = "sudoku 1000/0000/0000/0004=";
    ck_assert(score("sudoku", empty, "1234/3412/2143/4321") == 1.0);
    ck_assert(score("sudoku", empty, "4321/2143/3412/1234") == 1.0);
    ck_assert(score("sudoku", some, "1234/3412/2143/4321") == 0.0); /* the 4 given is a 1 */
    ck_assert(score("sudoku", some, "1234/3421/2143/4312") == 0.0);
    ck_assert(score("sudoku", some, "1234/4321/2143/3412") == 0.0);
    ck_assert(score("sudoku", some, "1243/4312/2134/3421") == 0.0);
    ck_assert(score("sudoku", some, "1342/4213/2431/3124") == 1.0);
    ck_assert(score("sudoku", some, "1243/3421/4312/2134") == 1.0);
    ck_assert(score("sudoku", empty, "1234/2143/3412/4321") == 0.0); /* rows and columns, not boxes */
    ck_assert(score("sudoku", empty, "1234/3412/1234/3412") == 0.0); /* rows and boxes, not columns */
    ck_assert(score("sudoku", empty, "1212/3434/2121/4343") == 0.0);
    ck_assert(score("sudoku", empty, "1234341221434321") == 0.0);
    ck_assert(score("sudoku", empty, "1234/3412/2143/4320") == 0.0);
    ck_assert(score("sudoku", empty, "1234/3412/2143/4325") == 0.0);
    ck_assert(score("sudoku", empty, "1234/3412/2143/4321/") == 0.0);
    ck_assert(score("sudoku", empty, " 1234/3412/2143/4321") == 0.0);
    ck_assert(score("sudoku", "sudoku", "1234/3412/2143/4321") == 0.0);
}
END_TEST

static int apply(int a, char op, int b) {
    int c = op == '+' ? a + b : op == '-' ? a - b : a * b;
    return c >= 1 && c <= 999 ? c : 0;
}

START_TEST(any_way_to_the_target_is_right) {
    static const char *const three = "countdown 3,7,25 to 46:";
    ck_assert(score("countdown", three, "7*3=21,25+21=46") == 1.0);
    ck_assert(score("countdown", three, "3*7=21,21+25=46") == 1.0);
    ck_assert(score("countdown", three, "3*7=21,25+21=46") == 1.0);
    ck_assert(score("countdown", three, "7*3=21,25+21=46\n") == 1.0);
    static const char *const wrong[] = {"46",
                                        "25+21=46",
                                        "7*3=21",
                                        "7*3=21,25+21=46,46+3=49",
                                        "7*3=20,25+21=46",
                                        "7*3=21,25+21=47",
                                        "7*3=21;25+21=46",
                                        "7*3=21, 25+21=46",
                                        "7*3=21,25+21=46,",
                                        ",7*3=21,25+21=46",
                                        "7*3,25+21=46",
                                        "7x3=21,25+21=46",
                                        "7*3=21,25+3=28",
                                        "25+7=32,32+3=35",
                                        "7*3==21,25+21=46",
                                        "-7*3=21,25+21=46",
                                        "7*3=0000000000021,25+21=46",
                                        "21+25=46",
                                        "7*3=21,7*3=21,25+21=46"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        ck_assert_msg(score("countdown", three, wrong[i]) == 0.0, "%s", wrong[i]);
    ck_assert(score("countdown", "countdown 3,7,10 to 10:", "3+7=10") == 0.0);    /* one is left over */
    ck_assert(score("countdown", "countdown 5,5 to 25:", "5*5=25") == 1.0);       /* each of two equal ones */
    ck_assert(score("countdown", "countdown 5,6 to 25:", "5*5=25") == 0.0);       /* one used twice */
    ck_assert(score("countdown", "countdown 3,7,4 to 0:", "7-4=3,3-3=0") == 0.0); /* below 1 on the way */
    ck_assert(score("countdown", "countdown 3,7,2 to 6:", "3-7=-4,-4+2=-2") == 0.0);
    ck_assert(score("countdown", "countdown 8,4 to 2:", "8/4=2") == 0.0);
    ck_assert(score("countdown", "countdown 500,500 to 1000:", "500+500=1000") == 0.0); /* above 999 */
    ck_assert(score("countdown", "countdown 1,2,3,4,5 to 15:", "1+2=3") == 0.0);        /* no prompt of the task */
    ck_assert(score("countdown", "countdown 1,2", "1+2=3") == 0.0);
}
END_TEST

START_TEST(every_way_with_three_numbers) {
    static sample s;
    int task = task_find("countdown"), rights = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        int v[3], target, here = 0;
        make(task, seed, (task_settings){.size = 3}, &s);
        ck_assert_int_eq(sscanf(s.prompt, "countdown %d,%d,%d to %d:", &v[0], &v[1], &v[2], &target), 4);
        for (int way = 0; way < 6 * 3 * 2 * 3; way++) {
            static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
            const int *o = orders[way % 6];
            char op1 = "+-*"[way / 6 % 3], op2 = "+-*"[way / 36], text[64];
            int first = apply(v[o[0]], op1, v[o[1]]), left = way / 18 % 2 ? first : v[o[2]],
                right = way / 18 % 2 ? v[o[2]] : first;
            int last = first ? apply(left, op2, right) : 0;
            snprintf(text, sizeof text, "%d%c%d=%d,%d%c%d=%d", v[o[0]], op1, v[o[1]], first, left, op2, right, last);
            bool good = first && last && last == target;
            assert_score(task, &s, text, good ? 1.0 : 0.0);
            here += good;
        }
        ck_assert_int_gt(here, 0);
        rights += here;
    }
    ck_assert_int_gt(rights, 3 * SEEDS); /* the task's own way is one of several */
}
END_TEST

START_TEST(lists_are_right_in_any_order) {
    static const char *const names[] = {"needle-mv", "vt-long", "cwe"};
    static sample s;
    for (size_t k = 0; k < 3; k++)
        for (uint64_t seed = 0; seed < 64; seed++) {
            int task = task_find(names[k]), num = 0;
            char items[5][16] = {""};
            make(task, seed, (task_settings){.length = 1000}, &s);
            const char *p = s.answer;
            while (*p) {
                p += strspn(p, ", ");
                size_t n = strcspn(p, ", ");
                snprintf(items[num++], sizeof items[0], "%.*s", (int)n, p);
                p += n;
            }
            ck_assert_int_eq(num, k == 1 ? 5 : 4);
            lines l = {0}, less = {0}, more = {0};
            for (int i = num - 1; i >= 0; i--) add_text(&l, "%s%s", l.len ? ", " : "", items[i]);
            assert_score(task, &s, l.text, 1.0);
            for (int i = 1; i < num; i++) add_text(&less, "%s,", items[i]);
            assert_score(task, &s, less.text, 0.0);
            add_text(&less, "%s", items[1]); /* the first left out, the second twice */
            assert_score(task, &s, less.text, 0.0);
            add_text(&more, "%s,%s", s.answer, items[0]);
            assert_score(task, &s, more.text, 0.0);
        }
}
END_TEST

/* ---- questions ---- */

/* The question at the end of a prompt, without what closes it; false if the task has none. */
static bool question_of(const task_info *info, const sample *s, char *question, size_t size) {
    bool pairs = is(info, "kv") || is(info, "vt") || is(info, "kv-long");
    const char *part = pairs ? " get " : is(info, "vt-long") || is(info, "cwe") ? " Which " : " What ", *begin = NULL;
    if (!pairs && info->kind != TASK_RECALL) return false;
    for (const char *p = s->prompt; (p = strstr(p, part)) != NULL; p++) begin = p;
    ck_assert_ptr_nonnull(begin);
    snprintf(question, size, "%.*s", (int)strcspn(begin, pairs ? "=" : "?"), begin);
    return true;
}

START_TEST(aware_prompts_ask_first) {
    static sample plain, aware;
    char question[128];
    int asking = 0;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        for (uint64_t seed = 0; seed < 48; seed++) {
            task_settings settings = {.question = (int)seed % 3};
            make(task, seed, settings, &plain);
            settings.aware = true;
            make(task, seed, settings, &aware);
            if (!question_of(info, &plain, question, sizeof question)) {
                ck_assert_str_eq(plain.prompt, aware.prompt);
                continue;
            }
            asking++;
            ck_assert_uint_eq(count(plain.prompt, question), 1);
            ck_assert_uint_eq(count(aware.prompt, question), 2);
            size_t title = strcspn(aware.prompt, " ");
            ck_assert(strncmp(aware.prompt + title, question, strlen(question)) == 0);
            ck_assert(strncmp(plain.prompt, aware.prompt, title) == 0);
            char of_aware[128];
            ck_assert(question_of(info, &aware, of_aware, sizeof of_aware));
            ck_assert_str_eq(question, of_aware);
            if (!is(info, "cwe")) ck_assert_str_eq(plain.answer, aware.answer); /* cwe has other words in less room */
            assert_score(task, &aware, aware.answer, 1.0);
        }
    }
    ck_assert_int_eq(asking, 9 * 48 - 48);
}
END_TEST

START_TEST(questions_share_a_context) {
    static const char *const names[] = {"kv", "vt", "kv-long", "vt-long"};
    static sample first, other;
    char question[128], another[128];
    for (size_t k = 0; k < 4; k++) {
        int task = task_find(names[k]), differ = 0;
        for (uint64_t seed = 0; seed < 32; seed++) {
            make(task, seed, (task_settings){0}, &first);
            ck_assert(question_of(task_at(task), &first, question, sizeof question));
            size_t context = (size_t)(strstr(first.prompt, question) - first.prompt);
            for (int q = 1; q < 8; q++) {
                make(task, seed, (task_settings){.question = q}, &other);
                ck_assert(question_of(task_at(task), &other, another, sizeof another));
                ck_assert(strncmp(first.prompt, other.prompt, context) == 0);
                ck_assert(strncmp(other.prompt + context, another, strlen(another)) == 0);
                differ += strcmp(question, another) != 0;
            }
        }
        ck_assert_int_gt(differ, 64);
    }
}
END_TEST

/* The question's place, against the test's own look at the prompt; what is before it knows nothing of the question. */
START_TEST(questions_are_found) {
    static sample s, other;
    char question[128];
    int asking = 0;
    for (int task = 0; task < task_count(); task++) {
        const task_info *info = task_at(task);
        for (uint64_t seed = 0; seed < 48; seed++) {
            task_settings settings = {.question = (int)seed % 3, .aware = seed % 2};
            make(task, seed, settings, &s);
            int at = task_question(task, s.prompt);
            if (!question_of(info, &s, question, sizeof question)) {
                ck_assert_msg(at == -1, "%s: question at %d of '%s'", info->name, at, s.prompt);
                continue;
            }
            asking++;
            ck_assert_int_gt(at, 0);
            ck_assert_uint_lt((size_t)at, strlen(s.prompt));
            ck_assert(strncmp(s.prompt + at, question, strlen(question)) == 0);
            ck_assert_ptr_null(strstr(s.prompt + at + 1, question));
            const char *end = is(info, "kv") || is(info, "vt") || is(info, "kv-long") ? "=" : "? Answer:";
            ck_assert_str_eq(s.prompt + at + strlen(question), end);
            if (!is(info, "kv-long") || settings.aware) continue;
            settings.question = 7; /* another question, the same context */
            make(task, seed, settings, &other);
            ck_assert_int_eq(task_question(task, other.prompt), at);
            ck_assert(strncmp(s.prompt, other.prompt, (size_t)at) == 0);
        }
    }
    ck_assert_int_eq(asking, 9 * 48 - 48);
    ck_assert_int_eq(task_question(-1, " What "), -1);
    ck_assert_int_eq(task_question(task_find("text"), " What "), -1);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("tasks");
    TCase *tc = tcase_create("tasks");
    fill_corpus();
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, names_are_found);
    tcase_add_test(tc, answers_are_right);
    tcase_add_test(tc, text_is_a_piece_of_the_corpus);
    tcase_add_test(tc, bytes_stay_the_same);
    tcase_add_test(tc, the_format_is_as_described);
    tcase_add_test(tc, seeds_differ);
    tcase_add_test(tc, sizes_are_kept);
    tcase_add_test(tc, lengths_are_kept);
    tcase_add_test(tc, settings_out_of_range_are_refused);
    tcase_add_test(tc, small_buffers_are_refused);
    tcase_add_test(tc, own_answers_are_right_and_spoilt_ones_wrong);
    tcase_add_test(tc, garbage_scores_nothing);
    tcase_add_test(tc, any_valid_grid_is_right);
    tcase_add_test(tc, any_way_to_the_target_is_right);
    tcase_add_test(tc, every_way_with_three_numbers);
    tcase_add_test(tc, lists_are_right_in_any_order);
    tcase_add_test(tc, aware_prompts_ask_first);
    tcase_add_test(tc, questions_share_a_context);
    tcase_add_test(tc, questions_are_found);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
