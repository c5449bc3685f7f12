/* tests/caching/test_kv_book.c - what a book keeps, against direct statements of the rules, on made-up measurements.
 *
 * prob(layer, query head, query, key) is a fixed number for every pair, in 1/4096 (sums are exact in f32, ties happen); nothing is
 * normalised, for a book does not care. A run gives a book what a runtime would measure over the slots that are kept, token by token. Beside
 * it stand lists of positions that `direct` shortens by looking at all pairs anew, from the first query on. */
#include "tests/test_util.h"

#include "caching/kv/demote.h"
#include "caching/kv/kv_internal.h"
#include "core/memory.h"

/* As ck_assert_msg, for inner loops: Check writes down where it is at each of its own. */
#define quick_assert(what, ...)                                                                                        \
    do {                                                                                                               \
        if (!(what)) ck_abort_msg(__VA_ARGS__);                                                                        \
    } while (0)

enum { LAYERS = 3, QUERY_HEADS = 4, KEY_HEADS = 2, GROUP = 2, DIM = 4, MOST = 1400 };

/* ---- measurements ---- */

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint64_t x =
        a * 0x9E3779B97F4A7C15ull ^ b * 0xC2B2AE3D27D4EB4Full ^ c * 0x165667B19E3779F9ull ^ d * 0x27D4EB2F165667C5ull;
    x ^= x >> 29;
    x *= 0xBF58476D1CE4E5B9ull;
    x ^= x >> 32;
    x *= 0x94D049BB133111EBull;
    return (uint32_t)(x >> 40);
}

static float prob(int layer, int q, int query, int key) {
    if (key > query) return 0;
    uint32_t u = mix((uint32_t)layer, (uint32_t)q, (uint32_t)query, (uint32_t)key);
    return (float)((u & 4095) * (u >> 12 & 7) / 8 / (1 + layer)) / 4096.0f;
}
static float key_number(int what, int layer, int head, int key) { /* a norm, a cosine, a gate, a coordinate */
    return (float)((int)(mix((uint32_t)(100 + what), (uint32_t)layer, (uint32_t)head, (uint32_t)key) % 8191) - 4095) /
           4096.0f;
}
enum { NORM = 0, COSINE = 1, GATE = 2, VALUE_NORM = 3, KEY = 10, VALUE = 20 };

typedef struct {
    rf_kv_stats stats;
    float *block;
} measured;

static measured measured_make(int64_t stride) {
    measured m = {0};
    size_t q = (size_t)(QUERY_HEADS * stride), k = (size_t)(KEY_HEADS * stride);
    m.block = calloc(6 * q + 4 * k + 2 * k * DIM + QUERY_HEADS + (size_t)stride, sizeof(float));
    ck_assert_ptr_nonnull(m.block);
    float *at = m.block;
    m.stats.stride = stride;
    m.stats.head_dim = DIM;
    m.stats.s1 = at;
    m.stats.s2 = at += q;
    m.stats.peak = at += q;
    m.stats.removal = at += q;
    m.stats.key_norm = at += q;
    m.stats.key_cosine = at += k;
    m.stats.gate = at += k;
    m.stats.value_norm = at += k;
    m.stats.k = at += k;
    m.stats.v = at += k * DIM;
    m.stats.entropy = at += k * DIM;
    m.stats.expected = at += QUERY_HEADS;
    m.stats.wo_norm = at += q;
    m.stats.penalty = at + q; /* nothing is said again */
    m.stats.num_positions = (int32_t)stride;
    return m;
}

static void put(const float *array, int64_t at, float value) {
    ((float *)(uintptr_t)array)[at] = value;
}

static void put_key(measured *m, int layer, int head, int64_t slot, int key) {
    int64_t at = head * m->stats.stride + slot;
    put(m->stats.key_norm, at, 2 + key_number(NORM, layer, head, key));
    put(m->stats.key_cosine, at, key_number(COSINE, layer, head, key));
    put(m->stats.gate, at, -1.01f - key_number(GATE, layer, head, key));
    put(m->stats.value_norm, at, 2 + key_number(VALUE_NORM, layer, head, key));
    for (int d = 0; d < DIM; d++) {
        put(m->stats.k, at * DIM + d, key_number(KEY + d, layer, head, key));
        put(m->stats.v, at * DIM + d, key_number(VALUE + d, layer, head, key));
    }
}

/* Sums over queries [first, last]; decay: weight alpha^(last - query). */
static void measure(measured *m, const rf_kv_rule *rule, int layer, int q, int64_t slot, int first, int last, int key) {
    double s1 = 0, s2 = 0, removal = 0, peak = 0;
    for (int i = first; i <= last; i++) {
        double p = (double)prob(layer, q, i, key),
               w = rule->reduce == RF_KV_REDUCE_DECAY ? pow(rule->alpha, last - i) : 1;
        s1 += w * p;
        s2 += w * p * p;
        if (rule->value == RF_KV_VALUE_REMOVAL) removal += w * (double)prob(layer, q + 50, i, key);
        if (p > peak) peak = p;
    }
    int64_t at = q * m->stats.stride + slot;
    put(m->stats.s1, at, (float)s1);
    put(m->stats.s2, at, (float)s2);
    put(m->stats.removal, at, (float)removal);
    put(m->stats.peak, at, (float)peak);
    put(m->stats.expected, at, 4 * key_number(5, layer, q, key));
    put(m->stats.wo_norm, at, 2 + key_number(6, layer, q, key));
}

static bool of_window(const rf_kv_rule *rule) {
    return rule->score == RF_KV_SCORE_TREE || rule->score == RF_KV_SCORE_RECURRENCE ||
           rule->queries == RF_KV_QUERIES_WINDOW;
}
static int first_query(const rf_kv_rule *rule, int tokens) {
    if (rule->score == RF_KV_SCORE_ATTENTION && rule->queries == RF_KV_QUERIES_LAST) return tokens - 1;
    return of_window(rule) && tokens > rule->window ? tokens - rule->window : 0;
}

/* Of the tokens that a layer receives: positions received[0..num), NULL: all. */
static void measure_received(measured *m, const rf_kv_rule *rule, int layer, int tokens, const int32_t *received,
                             int num) {
    int first = first_query(rule, tokens);
    m->stats.num_keys = num;
    m->stats.num_queries = tokens - first;
    for (int j = 0; j < num; j++) {
        int key = received != NULL ? received[j] : j;
        for (int q = 0; q < QUERY_HEADS; q++) measure(m, rule, layer, q, j, first, tokens - 1, key);
        for (int h = 0; h < KEY_HEADS; h++) put_key(m, layer, h, j, key);
    }
    for (int q = 0; q < QUERY_HEADS; q++) put(m->stats.entropy, q, 1 + (float)(layer * 7 % 5));
}

static void measure_prompt(measured *m, const rf_kv_rule *rule, int layer, int tokens) {
    measure_received(m, rule, layer, tokens, NULL, tokens);
}

static void measure_step(measured *m, const rf_kv_rule *rule, const rf_kv_book *book, int layer, int position) {
    m->stats.num_keys = rf_kv_book_most(book, layer);
    m->stats.num_queries = 1;
    for (int h = 0; h < KEY_HEADS; h++) {
        const rf_kv_head *head = rf_kv_book_head(book, layer, h);
        for (int s = 0; s < head->num; s++) {
            put_key(m, layer, h, s, head->position[s]);
            for (int q = h * GROUP; q < (h + 1) * GROUP; q++)
                measure(m, rule, layer, q, s, position, position, head->position[s]);
        }
    }
}

/* ---- rules ---- */

static rf_kv_rule plain_rule(rf_kv_score score) {
    rf_kv_rule r;
    memset(&r, 0, sizeof r);
    r.score = score;
    r.queries = RF_KV_QUERIES_ALL;
    r.pool_size = 1;
    r.group = RF_KV_OVER_MEAN;
    r.schedule = RF_KV_AT_STEP;
    r.alpha = 1;
    r.gamma = 200;
    r.tau1 = 1.6;
    r.tau2 = 0.6;
    r.beta = 20;
    r.window = 8;
    r.open_window = true;
    r.every = 7;
    r.buffer = 6;
    r.activation = 0.3;
    r.ladder_span = 1;
    r.page = 4;
    r.seed = 11;
    return r;
}

static const rf_kv_shape shape = {LAYERS, QUERY_HEADS, KEY_HEADS, DIM, 160, 1200, NULL, NULL, NULL};

enum {
    H2O = 0,
    A2SF,
    TOVA,
    OBSERVED,
    PEAKS,
    REMOVAL,
    STREAMING,
    KNORM,
    KNORM_EVERY,
    KEYDIFF,
    RANDOM,
    GATES,
    LAZY,
    LATE_WINDOW,
    H2O_HIGH,
    TREE,
    NUM_RULES
};

static rf_kv_rule rule_of(int which) {
    rf_kv_rule r = plain_rule(RF_KV_SCORE_ATTENTION);
    switch (which) {
    case H2O:
        r.recents = -1;
        r.sinks = 2;
        break;
    case A2SF:
        r.reduce = RF_KV_REDUCE_DECAY;
        r.alpha = 0.75;
        r.recents = 5;
        break;
    case TOVA:
        r.queries = RF_KV_QUERIES_LAST;
        r.heads = RF_KV_HEADS_MEAN;
        break;
    case OBSERVED:
        r.reduce = RF_KV_REDUCE_VISIBLE;
        r.schedule = RF_KV_AT_EVERY;
        break;
    case PEAKS:
        r.reduce = RF_KV_REDUCE_MAX;
        r.last = true;
        r.schedule = RF_KV_AT_HIGH;
        break;
    case REMOVAL:
        r.value = RF_KV_VALUE_REMOVAL;
        r.recents = 4;
        break;
    case STREAMING:
        r.score = RF_KV_SCORE_POSITION;
        r.sinks = 4;
        break;
    case KNORM: r.score = RF_KV_SCORE_KNORM; break;
    case KNORM_EVERY:
        r.score = RF_KV_SCORE_KNORM;
        r.schedule = RF_KV_AT_EVERY;
        r.recents = 3;
        break;
    case KEYDIFF:
        r.score = RF_KV_SCORE_KEYDIFF;
        r.schedule = RF_KV_AT_HIGH;
        r.recents = 3;
        break;
    case RANDOM: r.score = RF_KV_SCORE_RANDOM; break;
    case GATES:
        r.score = RF_KV_SCORE_GATE;
        r.schedule = RF_KV_AT_HIGH;
        break;
    case LAZY:
        r.score = RF_KV_SCORE_RECURRENCE;
        r.schedule = RF_KV_AT_EVERY;
        r.recents = 7;
        break;
    case LATE_WINDOW:
        r.queries = RF_KV_QUERIES_WINDOW;
        r.window = 4;
        r.open_window = false;
        r.schedule = RF_KV_AT_EVERY;
        break;
    case H2O_HIGH:
        r.recents = -1;
        r.schedule = RF_KV_AT_HIGH;
        break;
    case TREE:
        r.score = RF_KV_SCORE_TREE;
        r.sinks = 2;
        r.recents = 4;
        break;
    default: ck_abort();
    }
    return r;
}

/* ---- direct statements ---- */

typedef struct {
    int num, position[MOST], cursor;
} list;

static double mean_prob(const rf_kv_rule *r, int layer, int head, int query, int key) {
    double sum = 0;
    int first = head * GROUP, num = GROUP, off = r->value == RF_KV_VALUE_REMOVAL ? 50 : 0;
    if (r->heads == RF_KV_HEADS_MEAN) {
        first = 0;
        num = QUERY_HEADS;
    }
    for (int q = first; q < first + num; q++) sum += (double)prob(layer, q + off, query, key);
    return sum / num;
}

/* Of key j when tokens 0..t have been seen, the first `prompt` of them at once. */
static double direct_score(const rf_kv_rule *r, int layer, int head, int prompt, int t, int j) {
    double sum = 0, most = 0;
    int stamp = j, gap = 0;
    switch (r->score) {
    case RF_KV_SCORE_KNORM: return -(double)(2 + key_number(NORM, layer, head, j));
    case RF_KV_SCORE_KEYDIFF: return -(double)key_number(COSINE, layer, head, j);
    case RF_KV_SCORE_RANDOM: return (double)rf_kv_uniform(r->seed, layer, head, j);
    case RF_KV_SCORE_GATE: return (double)(float)((double)(-1.01f - key_number(GATE, layer, head, j)) * (t + 2 - j));
    case RF_KV_SCORE_RECURRENCE: {
        for (int q = head * GROUP; j < prompt && q < (head + 1) * GROUP; q++) {
            double peak = 0;
            for (int i = first_query(r, prompt); i < prompt; i++) peak = fmax(peak, (double)prob(layer, q, i, j));
            most += peak / GROUP;
        }
        if (j < prompt && most >= r->activation) {
            stamp = prompt - 1;
            gap = prompt - 1 - j;
        }
        for (int i = j < prompt ? prompt : j; i <= t; i++) {
            if (mean_prob(r, layer, head, i, j) < r->activation) continue;
            if (i - stamp > gap) gap = i - stamp;
            stamp = i;
        }
        if (gap == 0) return 0;
        return (double)(float)(2 / (1 + exp((double)(t - stamp) / gap)) + 2 / (1 + exp(1.0 / gap)));
    }
    default: break;
    }
    if (r->queries == RF_KV_QUERIES_LAST) return mean_prob(r, layer, head, t, j);
    int first = r->queries == RF_KV_QUERIES_WINDOW ? (t >= r->window ? t - r->window + 1 : 0) : 0, count = 0;
    if (r->score == RF_KV_SCORE_TREE) first = j < prompt ? first_query(r, prompt) : 0;
    if (first < j) first = j;
    for (int i = first; i <= t; i++) {
        double p = mean_prob(r, layer, head, i, j);
        sum += p * (r->reduce == RF_KV_REDUCE_DECAY ? pow(r->alpha, t - i) : 1);
        count++;
    }
    if (r->reduce == RF_KV_REDUCE_MAX) { /* of means of a step; of the prompt's peaks their mean */
        double step = 0;
        for (int i = prompt > j ? prompt : j; i <= t; i++) step = fmax(step, mean_prob(r, layer, head, i, j));
        for (int q = head * GROUP; q < (head + 1) * GROUP; q++) {
            double peak = 0;
            for (int i = j; i < prompt; i++) peak = fmax(peak, (double)prob(layer, q, i, j));
            most += peak / GROUP;
        }
        return fmax(most, step);
    }
    if (r->reduce == RF_KV_REDUCE_VISIBLE || r->score == RF_KV_SCORE_TREE) return (double)(float)(sum / count);
    return sum;
}

/* Keeps what is protected and then the largest, ties to the first. */
static void direct_cut(list *l, const double *score, int budget, int front, int back) {
    int num = l->num, kept = 0;
    bool stays[MOST];
    if (num <= budget) return;
    for (int i = 0; i < num; i++) {
        bool safe = i < front || i >= num - back;
        int before = 0;
        for (int o = 0; o < num; o++) {
            bool other_safe = o < front || o >= num - back;
            before += other_safe > safe ||
                      (other_safe == safe && !safe && (score[o] > score[i] || (score[o] == score[i] && o < i)));
        }
        stays[i] = safe || before < budget;
    }
    for (int i = 0; i < num; i++) {
        if (stays[i]) l->position[kept++] = l->position[i];
    }
    l->num = kept;
    ck_assert_int_eq(kept, budget);
}

static void direct_step(const rf_kv_rule *r, list *l, int layer, int head, int prompt, int t, int budget) {
    double score[MOST];
    int back = r->recents < 0 ? (budget - r->sinks) / 2 : r->recents;
    if (r->last && back < 1) back = 1;
    if (!r->open_window) back = r->window;
    if (r->score == RF_KV_SCORE_POSITION) back = budget - r->sinks;
    int tokens = t + 1;
    bool due = l->num > budget;
    if (r->schedule == RF_KV_AT_EVERY && tokens > prompt) due = due && (tokens - prompt) % r->every == 0;
    if (r->schedule == RF_KV_AT_HIGH) due = l->num >= budget + r->buffer;
    if (!due) return;
    for (int i = 0; i < l->num && r->score != RF_KV_SCORE_POSITION; i++)
        score[i] = direct_score(r, layer, head, prompt, t, l->position[i]);
    if (r->score == RF_KV_SCORE_TREE && tokens > prompt) {
        int region = budget - r->sinks - r->recents, left = r->sinks + l->cursor - 1;
        int gone = score[left] <= score[left + 1] ? left : left + 1;
        memmove(l->position + gone, l->position + gone + 1, (size_t)(l->num - gone - 1) * sizeof *l->position);
        l->num--;
        l->cursor = l->cursor % region + 1;
        return;
    }
    direct_cut(l, score, budget, r->sinks, back);
}

/* ---- a run ---- */

/* Rows used once, of this sequence; positions ascending; what the book says of itself. */
static int64_t check_book(const rf_kv_book *book, int64_t first, int64_t rows) {
    int64_t kept = 0;
    uint8_t *used = calloc((size_t)rows + 1, 1);
    ck_assert_ptr_nonnull(used);
    for (int layer = 0; layer < LAYERS; layer++) {
        int most = 0;
        for (int h = 0; h < KEY_HEADS; h++) {
            const rf_kv_head *head = rf_kv_book_head(book, layer, h);
            for (int i = 0; i < head->num; i++) {
                int64_t row = head->row[i] - first;
                quick_assert(row >= 0 && row < rows && !used[row], "layer %d head %d slot %d: row %d", layer, h, i,
                             head->row[i]);
                used[row] = 1;
                if (i > 0)
                    quick_assert(head->position[i] > head->position[i - 1], "layer %d head %d slot %d", layer, h, i);
            }
            kept += head->num;
            if (head->num > most) most = head->num;
        }
        ck_assert_int_eq(most, rf_kv_book_most(book, layer));
    }
    free(used);
    ck_assert_int_eq(kept, rf_kv_book_get_info(book).kept);
    return kept;
}

typedef struct {
    rf_kv_rule rule;
    rf_kv_book *book;
    measured m;
    int budget, prompt, next;
    int64_t rows, first, peak;
} run;

static run run_begin(const rf_kv_rule *rule, const rf_kv_shape *s, int budget, int64_t first) {
    rf_error err = {0};
    run r = {.rule = *rule, .budget = budget, .first = first, .m = measured_make(MOST)};
    r.rows = rf_kv_pool_rows(rule, s, budget);
    rf_assert_ok(rf_kv_book_create(&r.book, rule, s, budget, first, &err), err);
    return r;
}
static void run_end(run *r) {
    rf_kv_book_destroy(r->book);
    free(r->m.block);
}
static void run_prompt(run *r, int tokens) {
    rf_error err = {0};
    for (int layer = 0; layer < LAYERS; layer++) {
        int32_t num = tokens;
        const int32_t *received = layer > 0 ? rf_kv_book_received(r->book, layer, &num) : NULL;
        measure_received(&r->m, &r->rule, layer, tokens, received, num);
        rf_assert_ok(rf_kv_book_prefill(r->book, layer, num, &r->m.stats, &err), err);
        int64_t kept = check_book(r->book, r->first, r->rows);
        if (kept > r->peak) r->peak = kept;
    }
    r->prompt = r->next = tokens;
}
static void run_step(run *r) {
    rf_error err = {0};
    rf_assert_ok(rf_kv_book_append(r->book, r->next, &err), err);
    int64_t kept = check_book(r->book, r->first, r->rows);
    if (kept > r->peak) r->peak = kept;
    for (int layer = 0; layer < LAYERS; layer++) {
        int64_t before = rf_kv_book_get_info(r->book).kept;
        bool changed = true;
        measure_step(&r->m, &r->rule, r->book, layer, r->next);
        rf_assert_ok(rf_kv_book_step(r->book, layer, &r->m.stats, &changed, &err), err);
        ck_assert_int_eq(changed, before != rf_kv_book_get_info(r->book).kept);
    }
    check_book(r->book, r->first, r->rows);
    r->next++;
}

static void assert_keeps(const rf_kv_book *book, int layer, int head, const int *want, int num, const char *what,
                         int at) {
    const rf_kv_head *h = rf_kv_book_head(book, layer, head);
    bool same = h->num == num;
    for (int i = 0; i < num && same; i++) same = h->position[i] == want[i];
    if (same) return;
    char text[4000] = "";
    size_t used = 0;
    for (int i = 0; i < h->num && used < 1800; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, " %d", h->position[i]);
    used += (size_t)snprintf(text + used, sizeof text - used, ", wanted");
    for (int i = 0; i < num && used < 3900; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, " %d", want[i]);
    ck_abort_msg("%s, layer %d head %d at %d: keeps%s", what, layer, head, at, text);
}

/* ---- tests ---- */

START_TEST(rules_keep_what_a_direct_statement_keeps) {
    static list lists[LAYERS][KEY_HEADS];
    int prompts[] = {3, 24, 61}, budget = 24;
    for (size_t p = 0; p < sizeof prompts / sizeof *prompts; p++) {
        rf_kv_rule rule = rule_of(_i);
        char name[64];
        snprintf(name, sizeof name, "rule %d, prompt %d", _i, prompts[p]);
        run r = run_begin(&rule, &shape, budget, 1000);
        run_prompt(&r, prompts[p]);
        for (int t = prompts[p] - 1; t < prompts[p] + 100; t++) {
            if (t >= prompts[p]) run_step(&r);
            for (int layer = 0; layer < LAYERS; layer++) {
                for (int h = 0; h < KEY_HEADS; h++) {
                    list *l = &lists[layer][h];
                    if (t == prompts[p] - 1) {
                        l->cursor = 1;
                        l->num = prompts[p];
                        for (int i = 0; i < l->num; i++) l->position[i] = i;
                        /* the contest of blocks has a test of its own */
                        if (rule.score == RF_KV_SCORE_TREE && l->num > budget) {
                            const rf_kv_head *head = rf_kv_book_head(r.book, layer, h);
                            l->num = head->num;
                            memcpy(l->position, head->position, (size_t)l->num * sizeof *l->position);
                        }
                    } else {
                        l->position[l->num++] = t;
                    }
                    direct_step(&rule, l, layer, h, prompts[p], t, budget);
                    assert_keeps(r.book, layer, h, l->position, l->num, name, t);
                }
            }
        }
        run_end(&r);
    }
}
END_TEST

START_TEST(ladder_is_the_golden_one) {
    static const int golden[][2][20] = {
        {{0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
         {0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}},
        {{0, 1, 2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20},
         {0, 1, 3, 5, 7, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}},
        {{0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23, 24, 25},
         {0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 22, 23, 24, 25}},
        {{0, 1, 2, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23, 24, 25, 26},
         {0, 1, 5, 7, 9, 11, 13, 15, 17, 19, 21, 22, 23, 24, 25, 26}},
        {{0, 1, 2, 10, 18, 24, 28, 30, 32, 33, 34, 35, 36, 37, 38, 39},
         {0, 1, 9, 17, 23, 27, 29, 31, 32, 33, 34, 35, 36, 37, 38, 39}},
    };
    static const int at[] = {16, 20, 25, 26, 39};
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_LADDER);
    rule.sinks = 2;
    rule.ladder_span = 2;
    rf_kv_shape s = {4, 1, 1, DIM, 16, 100, NULL, NULL, NULL};
    rf_error err = {0};
    for (int prompt = 1; prompt <= 16; prompt += 15) {
        rf_kv_book *book;
        rf_assert_ok(rf_kv_book_create(&book, &rule, &s, 16, 0, &err), err);
        for (int layer = 0; layer < 4; layer++) rf_assert_ok(rf_kv_book_prefill(book, layer, prompt, NULL, &err), err);
        size_t next = 0;
        for (int t = prompt; t < 40; t++) {
            rf_assert_ok(rf_kv_book_append(book, t, &err), err);
            for (int layer = 0; layer < 4; layer++) {
                bool changed;
                rf_assert_ok(rf_kv_book_step(book, layer, NULL, &changed, &err), err);
            }
            if (t != at[next]) continue;
            for (int layer = 0; layer < 4; layer++)
                assert_keeps(book, layer, 0, golden[next][layer % 2], 16, "ladder", t);
            next++;
        }
        ck_assert_uint_eq(next, 5);
        rf_kv_book_destroy(book);
    }
}
END_TEST

/* Sinks and the newest stay, budgets are met and not undershot by much, and prompts end where chunks end. */
START_TEST(ladder_holds_its_cap) {
    static const int params[][4] = {
        {16, 0, 64, 1}, {9, 3, 64, 3}, {16, 8, 128, 1}, {5, 4, 256, 23}} /* span, overlap, budget, r */;
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_LADDER);
    rule.sinks = 4;
    rf_error err = {0};
    for (size_t p = 0; p < sizeof params / sizeof *params; p++) {
        rule.ladder_span = params[p][0];
        rule.ladder_overlap = params[p][1];
        int budget = params[p][2];
        rf_kv_shape s = {32, 1, 1, DIM, 1000, 1000, NULL, NULL, NULL};
        int64_t rows = rf_kv_pool_rows(&rule, &s, budget);
        rf_kv_book *book;
        rf_assert_ok(rf_kv_book_create(&book, &rule, &s, budget, 0, &err), err);
        int cap = (int)(rows / 32) - 1, most = 0;
        ck_assert_int_ge(cap, budget);
        for (int layer = 0; layer < 32; layer++) rf_assert_ok(rf_kv_book_prefill(book, layer, 1000, NULL, &err), err);
        for (int t = 999; t < 1400; t++) {
            bool changed;
            if (t >= 1000) rf_assert_ok(rf_kv_book_append(book, t, &err), err);
            for (int layer = 0; layer < 32; layer++) {
                if (t >= 1000) rf_assert_ok(rf_kv_book_step(book, layer, NULL, &changed, &err), err);
                const rf_kv_head *h = rf_kv_book_head(book, layer, 0);
                quick_assert(h->num <= cap && h->num >= 36, "%d of %d", h->num, cap);
                if (h->num > most) most = h->num;
                for (int i = 0; i < 4; i++) quick_assert(h->position[i] == i, "sink %d", i);
                for (int i = 0; i < 32 - (params[p][3] - 1); i++)
                    quick_assert(h->position[h->num - 1 - i] == t - i, "%zu: t %d layer %d slot -%d is %d", p, t, layer,
                                 i, h->position[h->num - 1 - i]);
            }
        }
        ck_assert_int_eq(most, cap);
        rf_kv_book_destroy(book);
    }
    rule.ladder_span = 16;
    rule.ladder_overlap = 0;
    rf_kv_shape s = {32, 1, 1, DIM, 1000, 1000, NULL, NULL, NULL};
    rf_kv_book *book;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &s, 36, 0, &err), err, RF_ERR_ARGUMENT, "layers 32");
    rule.ladder_span = 32;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &s, 64, 0, &err), err, RF_ERR_ARGUMENT, "span 32");
}
END_TEST

START_TEST(tree_is_the_golden_one) {
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_TREE);
    rf_error err = {0};
    measured m = measured_make(64);
    rf_kv_shape s = {1, QUERY_HEADS, KEY_HEADS, DIM, 8, 100, NULL, NULL, NULL};
    rf_kv_book *book;
    rf_assert_ok(rf_kv_book_create(&book, &rule, &s, 8, 0, &err), err);
    m.stats.num_keys = 1;
    m.stats.num_queries = 1;
    rf_assert_ok(rf_kv_book_prefill(book, 0, 1, &m.stats, &err), err);
    for (int t = 1; t < 40; t++) {
        bool changed;
        rf_assert_ok(rf_kv_book_append(book, t, &err), err);
        rf_assert_ok(rf_kv_book_step(book, 0, &m.stats, &changed, &err), err);
        if (t == 23) assert_keeps(book, 0, 0, (int[]){3, 7, 11, 15, 17, 19, 21, 23}, 8, "tree", t);
    }
    assert_keeps(book, 0, 1, (int[]){15, 23, 27, 31, 33, 35, 37, 39}, 8, "tree", 39);
    rf_kv_book_destroy(book);
    free(m.block);
}
END_TEST

/* Blocks of 3 between 2 sinks and 4 recents, 2 blocks fit: the same contest by hand. */
START_TEST(tree_contests_blocks_of_a_prompt) {
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_TREE);
    rule.sinks = 2;
    rule.recents = 4;
    rule.page = 3;
    run r = run_begin(&rule, &shape, 13, 0);
    run_prompt(&r, 50);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int h = 0; h < KEY_HEADS; h++) {
            int block[3], num = 0, cursor = 0, want[64], n = 0;
            for (int begin = 2; begin < 46; begin += 3) {
                block[num++] = begin;
                if (num < 3) continue;
                double mean[2] = {0, 0};
                for (int side = 0; side < 2; side++) {
                    int b = block[cursor + side], end = b + 3 < 46 ? b + 3 : 46;
                    for (int j = b; j < end; j++) mean[side] += direct_score(&rule, layer, h, 50, 49, j) / (end - b);
                }
                int gone = cursor + (mean[0] > mean[1]);
                for (int i = gone; i < 2; i++) block[i] = block[i + 1];
                num = 2;
                cursor = 1 - cursor;
            }
            want[n++] = 0;
            want[n++] = 1;
            for (int i = 0; i < 2; i++) {
                for (int j = block[i]; j < block[i] + 3 && j < 46; j++) want[n++] = j;
            }
            for (int j = 46; j < 50; j++) want[n++] = j;
            assert_keeps(r.book, layer, h, want, n, "tree", 50);
        }
    }
    run_end(&r);
}
END_TEST

static rf_kv_rule cake_rule(void) {
    rf_kv_rule r = plain_rule(RF_KV_SCORE_ATTENTION);
    r.queries = RF_KV_QUERIES_WINDOW;
    r.reduce = RF_KV_REDUCE_MEANVAR;
    r.open_window = false;
    r.pool = RF_KV_POOL_AVG;
    r.pool_size = 5;
    r.alloc = RF_KV_ALLOC_CAKE;
    return r;
}

static void pool5(double *score, int n) {
    double out[MOST];
    for (int i = 0; i < n; i++) {
        out[i] = 0;
        for (int j = i - 2; j <= i + 2; j++) out[i] += j >= 0 && j < n ? score[j] / 5 : 0;
    }
    memcpy(score, out, (size_t)n * sizeof *score);
}

START_TEST(cake_shrinks_layers_as_they_come_and_follows_the_last_query) {
    rf_kv_rule rule = cake_rule();
    rf_error err = {0};
    int tokens = 120, budget = 30, window = rule.window, counts[LAYERS];
    run r = run_begin(&rule, &shape, budget, 5);
    for (int layer = 0; layer < LAYERS; layer++) {
        measure_prompt(&r.m, &rule, layer, tokens);
        rf_assert_ok(rf_kv_book_prefill(r.book, layer, tokens, &r.m.stats, &err), err);
        int64_t kept = check_book(r.book, 5, r.rows), all = (budget - window) * LAYERS,
                most = (layer + 1) * (tokens - window);
        ck_assert_int_eq(kept, KEY_HEADS * ((all < most ? all : most) + (layer + 1) * window));
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        counts[layer] = rf_kv_book_most(r.book, layer);
        for (int h = 0; h < KEY_HEADS; h++) {
            static list l;
            double score[MOST];
            l.num = tokens;
            for (int j = 0; j < tokens; j++) {
                score[j] = 0;
                l.position[j] = j;
                for (int q = h * GROUP; q < (h + 1) * GROUP; q++) {
                    double s1 = 0, s2 = 0;
                    for (int i = tokens - window; i < tokens; i++) {
                        s1 += (double)prob(layer, q, i, j) / window;
                        s2 += pow((double)prob(layer, q, i, j), 2);
                    }
                    score[j] += (s1 + rule.gamma * (s2 - s1 * s1 * window) / (window - 1)) / GROUP;
                }
            }
            pool5(score, tokens - window);
            direct_cut(&l, score, counts[layer], 0, window);
            assert_keeps(r.book, layer, h, l.position, l.num, "cake", layer);
        }
    }
    ck_assert_int_ne(counts[0], counts[1]);
    r.prompt = r.next = tokens;
    for (int step = 0; step < 100; step++) {
        static list l[LAYERS][KEY_HEADS];
        for (int i = 0; i < LAYERS * KEY_HEADS; i++) {
            const rf_kv_head *h = rf_kv_book_head(r.book, i / KEY_HEADS, i % KEY_HEADS);
            double score[MOST];
            list *at = &l[i / KEY_HEADS][i % KEY_HEADS];
            at->num = h->num;
            memcpy(at->position, h->position, (size_t)h->num * sizeof *h->position);
            at->position[at->num++] = r.next;
            for (int j = 0; j < at->num; j++)
                score[j] = mean_prob(&rule, i / KEY_HEADS, i % KEY_HEADS, r.next, at->position[j]);
            pool5(score, at->num - window);
            direct_cut(at, score, counts[i / KEY_HEADS], 0, window);
        }
        run_step(&r);
        for (int i = 0; i < LAYERS * KEY_HEADS; i++)
            assert_keeps(r.book, i / KEY_HEADS, i % KEY_HEADS, l[i / KEY_HEADS][i % KEY_HEADS].position,
                         l[i / KEY_HEADS][i % KEY_HEADS].num, "cake", r.next);
    }
    run_end(&r);
}
END_TEST

/* ---- budgets of layers and heads ---- */

START_TEST(pyramid_gives_layers_their_series) {
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_KNORM);
    rule.alloc = RF_KV_ALLOC_PYRAMID;
    rule.schedule = RF_KV_AT_PREFILL;
    rule.recents = 8;
    /* cap 64, 8 of them recents, 4 layers: the published vector; a prompt that is no longer than the largest; one that clips it */
    int want[3][4] = {{110, 74, 38, 2}};
    static const int prompts[] = {200, 60, 115};
    for (int l = 0; l < 4; l++) want[1][l] = 52;
    rf_kv_pyramid(want[2], 4, 64, 8, 115, rule.beta);
    ck_assert_int_ne(want[2][0], want[2][3]);
    rf_kv_shape s = {4, QUERY_HEADS, KEY_HEADS, DIM, 200, 10, NULL, NULL, NULL};
    rf_error err = {0};
    measured m = measured_make(256);
    for (int i = 0; i < 3; i++) {
        int tokens = prompts[i];
        rf_kv_book *book;
        rf_assert_ok(rf_kv_book_create(&book, &rule, &s, 64, 0, &err), err);
        for (int layer = 0; layer < 4; layer++) {
            measure_prompt(&m, &rule, layer, tokens);
            rf_assert_ok(rf_kv_book_prefill(book, layer, tokens, &m.stats, &err), err);
            for (int h = 0; h < KEY_HEADS; h++)
                ck_assert_int_eq(rf_kv_book_head(book, layer, h)->num, want[i][layer] + 8);
        }
        rf_kv_book_destroy(book);
    }
    free(m.block);
}
END_TEST

START_TEST(flat_heads_are_ragged_and_keep_their_best) {
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_ATTENTION);
    rule.alloc = RF_KV_ALLOC_FLAT_HEADS;
    rule.floor = 0.2;
    rule.sinks = 1;
    rule.recents = 6;
    int tokens = 90, budget = 30, base = budget - 7;
    run r = run_begin(&rule, &shape, budget, 0);
    run_prompt(&r, tokens);
    bool ragged = false;
    for (int layer = 0; layer < LAYERS; layer++) {
        double score[KEY_HEADS][MOST];
        for (int h = 0; h < KEY_HEADS; h++) {
            for (int j = 0; j < tokens; j++) score[h][j] = direct_score(&rule, layer, h, tokens, tokens - 1, j);
        }
        for (int h = 0; h < KEY_HEADS; h++) {
            static list l;
            int in_top = 0;
            for (int j = 1; j < tokens - 6; j++) {
                int before = 0;
                for (int o = 0; o < KEY_HEADS; o++) {
                    for (int i = 1; i < tokens - 6; i++)
                        before +=
                            score[o][i] > score[h][j] || (score[o][i] == score[h][j] && (o < h || (o == h && i < j)));
                }
                in_top += before < KEY_HEADS * base;
            }
            int count = (int)nearbyint(in_top * 0.8 + floor(0.2 * base));
            l.num = tokens;
            for (int j = 0; j < tokens; j++) l.position[j] = j;
            direct_cut(&l, score[h], count + 7, 1, 6);
            assert_keeps(r.book, layer, h, l.position, l.num, "flat heads", layer);
            ragged |= count != base;
        }
    }
    ck_assert(ragged);
    int before = rf_kv_book_head(r.book, 1, 1)->num;
    for (int i = 0; i < 20; i++) run_step(&r);
    ck_assert_int_eq(rf_kv_book_head(r.book, 1, 1)->num, before);
    run_end(&r);
}
END_TEST

/* At the prompt's end and when heads are full on average: the best of all layers and heads, in all exactly the budget. */
START_TEST(flat_all_is_exact_in_total) {
    static list l[LAYERS * KEY_HEADS];
    for (int floor_share = 0; floor_share < 2; floor_share++) {
        rf_kv_rule rule = plain_rule(RF_KV_SCORE_GATE);
        rule.alloc = RF_KV_ALLOC_FLAT_ALL;
        rule.floor = floor_share * 0.5;
        rule.schedule = RF_KV_AT_HIGH;
        rule.buffer = 5;
        rule.recents = 2;
        int tokens = 70, budget = 20, cuts = 0;
        run r = run_begin(&rule, &shape, budget, 0);
        run_prompt(&r, tokens);
        for (int t = tokens - 1; t < tokens + 60; t++) {
            if (t >= tokens) run_step(&r);
            int total = 0;
            for (int u = 0; u < LAYERS * KEY_HEADS; u++) {
                if (t == tokens - 1) l[u].num = 0;
                for (int j = t == tokens - 1 ? 0 : t; j <= t; j++) l[u].position[l[u].num++] = j;
                total += l[u].num;
            }
            if (total >= LAYERS * KEY_HEADS * (budget + 5)) {
                cuts++;
                bool stays[LAYERS * KEY_HEADS][160] = {{0}};
                int left = LAYERS * KEY_HEADS * budget;
                for (int pass = 0; pass < 2; pass++) { /* each head's own part, then all together */
                    for (int u = 0; u < LAYERS * KEY_HEADS || pass == 1; u++) {
                        int own = budget / 2 * floor_share > 2 ? budget / 2 * floor_share : 2;
                        if (pass == 0) left -= own;
                        if (pass == 1) own = left;
                        for (; own > 0; own--) {
                            int best_u = -1, best_i = -1;
                            double best = -INFINITY;
                            for (int o = pass == 0 ? u : 0; o <= (pass == 0 ? u : LAYERS * KEY_HEADS - 1); o++) {
                                for (int i = 0; i < l[o].num; i++) {
                                    double s = i >= l[o].num - 2 ? 1
                                                                 : direct_score(&rule, o / KEY_HEADS, o % KEY_HEADS,
                                                                                tokens, t, l[o].position[i]);
                                    if (stays[o][i] || s <= best) continue;
                                    best = s;
                                    best_u = o;
                                    best_i = i;
                                }
                            }
                            stays[best_u][best_i] = true;
                        }
                        if (pass == 1) break;
                    }
                }
                for (int u = 0; u < LAYERS * KEY_HEADS; u++) {
                    int num = 0;
                    for (int i = 0; i < l[u].num; i++) {
                        if (stays[u][i]) l[u].position[num++] = l[u].position[i];
                    }
                    l[u].num = num;
                    ck_assert_int_ge(num, floor_share ? 10 : 2);
                }
                ck_assert_int_eq(rf_kv_book_get_info(r.book).kept, LAYERS * KEY_HEADS * budget);
            }
            for (int u = 0; u < LAYERS * KEY_HEADS; u++)
                assert_keeps(r.book, u / KEY_HEADS, u % KEY_HEADS, l[u].position, l[u].num, "flat all", t);
        }
        ck_assert_int_eq(cuts, 13);
        ck_assert(r.peak <= r.rows);
        run_end(&r);
    }
}
END_TEST

START_TEST(tables_are_spent_exactly_and_classes_are_whole) {
    float shares[LAYERS] = {0.7f, 0.05f, 0.25f};
    uint8_t classes[LAYERS * QUERY_HEADS] = {0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0};
    rf_kv_shape s = shape;
    s.layer_shares = shares;
    s.head_classes = classes;
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_KNORM);
    rule.alloc = RF_KV_ALLOC_TABLE;
    for (int budget = 33; budget < 50; budget += 5) {
        run r = run_begin(&rule, &s, budget, 0);
        run_prompt(&r, 150);
        int num[LAYERS];
        for (int l = 0; l < LAYERS; l++) num[l] = rf_kv_book_most(r.book, l);
        ck_assert_int_eq(num[0] + num[1] + num[2], LAYERS * budget);
        ck_assert(num[0] > num[2] && num[2] >= num[1] && num[1] >= 32 && num[0] <= 3 * budget);
        run_end(&r);
    }
    rule = rule_of(STREAMING);
    rule.alloc = RF_KV_ALLOC_CLASS;
    run r = run_begin(&rule, &s, 20, 0);
    run_prompt(&r, 100);
    for (int i = 0; i < 30; i++) run_step(&r);
    for (int i = 0; i < LAYERS * KEY_HEADS; i++)
        ck_assert_int_eq(rf_kv_book_head(r.book, i / KEY_HEADS, i % KEY_HEADS)->num, i == 2 ? 130 : 20);
    run_end(&r);
    rf_error err = {0};
    rf_kv_book *book;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &shape, 20, 0, &err), err, RF_ERR_MISSING, "classes");
    rule.alloc = RF_KV_ALLOC_TABLE;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &shape, 20, 0, &err), err, RF_ERR_MISSING, "shares");
    /* skipped layers keep everything */
    rule = rule_of(KNORM);
    rule.skip_layers = 2;
    r = run_begin(&rule, &shape, 20, 0);
    run_prompt(&r, 100);
    run_step(&r);
    for (int l = 0; l < LAYERS; l++) ck_assert_int_eq(rf_kv_book_most(r.book, l), l < 2 ? 101 : 20);
    run_end(&r);
}
END_TEST

/* ---- rows ---- */

/* Every rule, allocator and schedule, prompts of many lengths on one book: never out of rows, none lost, all of them needed where the
 * count is exact. */
START_TEST(a_pool_is_as_large_as_it_must_be) {
    static const rf_kv_alloc allocs[] = {RF_KV_ALLOC_UNIFORM, RF_KV_ALLOC_PYRAMID, RF_KV_ALLOC_FLAT_HEADS,
                                         RF_KV_ALLOC_FLAT_ALL, RF_KV_ALLOC_CAKE};
    static const int prompts[] = {1, 20, 21, 25, 29, 34, 60};
    rf_kv_shape s = {LAYERS, QUERY_HEADS, KEY_HEADS, DIM, 60, 15, NULL, NULL, NULL};
    rf_error err = {0};
    {
        int which = _i;
        for (int a = 0; a < 5; a++) {
            for (int schedule = 0; schedule < 4; schedule++) {
                rf_kv_rule rule = rule_of(which);
                bool indexed = rule.score == RF_KV_SCORE_POSITION, tree = rule.score == RF_KV_SCORE_TREE;
                rule.alloc = allocs[a];
                rule.schedule = (rf_kv_schedule)schedule;
                if ((indexed && a >= 2) || (tree && a > 0)) continue;
                run r = run_begin(&rule, &s, 20, 77);
                bool exact = a == 0 || a == 3 || a == 4;
                if (tree || a == 3) exact = false;
                for (size_t p = 0; p < sizeof prompts / sizeof *prompts; p++) {
                    rf_assert_ok(rf_kv_book_reset(r.book, 20, &err), err);
                    run_prompt(&r, prompts[p]);
                    for (int i = 0; i < 15; i++) run_step(&r);
                }
                ck_assert_msg(r.peak <= r.rows && (!exact || r.peak == r.rows),
                              "rule %d, allocator %d, schedule %d: %lld of %lld rows", which, a, schedule,
                              (long long)r.peak, (long long)r.rows);
                /* not in proportion to the prompt, but for the choice over all layers */
                rf_kv_shape longer = s;
                longer.max_prompt = 100000;
                int64_t rows = rf_kv_pool_rows(&rule, &longer, 20);
                if (a != 3) ck_assert_int_lt(rows, 3 * r.rows);
                rf_assert_ok(rf_kv_book_reset(r.book, 7, &err), err);
                r.budget = 7;
                run_prompt(&r, 50);
                for (int i = 0; i < 15; i++) run_step(&r);
                rf_assert_fails(rf_kv_book_reset(r.book, 0, &err), err, RF_ERR_ARGUMENT, "budget of 20");
                run_end(&r);
            }
        }
    }
}
END_TEST

START_TEST(pools_of_large_models_are_counted) {
    rf_kv_rule rule = rule_of(KNORM);
    rf_kv_shape large = {32, 32, 8, 128, 131072, 1000, NULL, NULL, NULL};
    ck_assert_int_eq(rf_kv_pool_rows(&rule, &large, 2048), 2049 * 32 * 8);
    ck_assert_int_eq(rf_kv_pool_rows(&rule, &large, 0), 132072LL * 32 * 8);
    rule.schedule = RF_KV_AT_PREFILL;
    ck_assert_int_eq(rf_kv_pool_rows(&rule, &large, 2048), 3048 * 32 * 8);
    rule.alloc = RF_KV_ALLOC_PYRAMID; /* 4016 for 3840 (section 8), and 8 recents in each layer */
    rule.recents = 8;
    rule.schedule = RF_KV_AT_STEP;
    int64_t rows = rf_kv_pool_rows(&rule, &large, 128);
    ck_assert(rows >= 8 * (4016 + 32 * (8 + 1)) && rows <= 8 * (128 * 32 + 31 * 15 + 32 + 32));
}
END_TEST

START_TEST(a_long_generation_stays_in_its_rows) {
    for (int which = 0; which < NUM_RULES; which++) {
        rf_kv_rule rule = rule_of(which);
        run r = run_begin(&rule, &shape, 12, 0);
        run_prompt(&r, 40);
        for (int i = 0; i < 400; i++) run_step(&r);
        rf_kv_book_info info = rf_kv_book_get_info(r.book);
        ck_assert_int_eq(info.seen, 440 * LAYERS * KEY_HEADS);
        ck_assert_int_le(info.kept, r.rows);
        ck_assert_int_gt(info.evictions, 50);
        ck_assert(info.plan_ms > 0);
        run_end(&r);
    }
}
END_TEST

START_TEST(a_budget_over_everything_drops_nothing) {
    for (int which = 0; which <= NUM_RULES; which++) {
        for (int budget = 0; budget <= 100; budget += 100) {
            rf_kv_rule rule = rule_of(which % NUM_RULES);
            if (which == NUM_RULES) rule.score = RF_KV_SCORE_NONE;
            rf_kv_shape s = {LAYERS, QUERY_HEADS, KEY_HEADS, DIM, 60, 40, NULL, NULL, NULL};
            rf_kv_rule none = plain_rule(RF_KV_SCORE_NONE);
            run r = run_begin(&rule, &s, budget, 3), full = run_begin(&none, &s, 0, 3);
            run_prompt(&r, 60);
            run_prompt(&full, 60);
            for (int i = 0; i < 40; i++) {
                run_step(&r);
                run_step(&full);
            }
            for (int i = 0; i < LAYERS * KEY_HEADS; i++) {
                const rf_kv_head *a = rf_kv_book_head(r.book, i / KEY_HEADS, i % KEY_HEADS);
                const rf_kv_head *b = rf_kv_book_head(full.book, i / KEY_HEADS, i % KEY_HEADS);
                ck_assert_int_eq(a->num, 100);
                ck_assert_int_eq(b->num, 100);
                ck_assert_int_eq(memcmp(a->row, b->row, 100 * sizeof *a->row), 0);
                ck_assert_int_eq(memcmp(a->position, b->position, 100 * sizeof *a->position), 0);
            }
            ck_assert_int_eq(rf_kv_book_get_info(r.book).evictions, 0);
            rf_error err = {0};
            rf_assert_fails(rf_kv_book_append(r.book, 100, &err), err, RF_ERR_STATE, "rows are left");
            run_end(&r);
            run_end(&full);
        }
    }
}
END_TEST

/* All named rules, as they are listed: within their rows, and down to the budget where they drop. */
START_TEST(named_methods_run) {
    float shares[LAYERS] = {0.5f, 0.2f, 0.3f};
    uint8_t classes[LAYERS * QUERY_HEADS] = {0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0};
    uint8_t scoring[LAYERS * QUERY_HEADS];
    memset(scoring, 1, sizeof scoring);
    rf_kv_shape s = {LAYERS, QUERY_HEADS, KEY_HEADS, DIM, 700, 300, shares, classes, scoring};
    rf_error err = {0};
    int dropped = 0, refused = 0;
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        const char *name = rf_kv_method_at(i)->name;
        rf_kv_rule rule;
        rf_assert_ok(rf_kv_rule_parse(&rule, name, &err), err);
        rf_kv_book *book = NULL;
        int budget = 300;
        if (rf_kv_packs(&rule)) continue; /* the runtime places what is raw: test_kv_demote.c */
        rf_status status = rf_kv_book_create(&book, &rule, &s, budget, 0, &err);
        if (status != RF_OK) {
            ck_assert_msg(status == RF_ERR_UNSUPPORTED, "%s: %s", name, err.message);
            refused++;
            continue;
        }
        rf_kv_book_destroy(book);
        run r = run_begin(&rule, &s, budget, 0);
        run_prompt(&r, 600);
        for (int step = 0; step < 40; step++) run_step(&r);
        rf_kv_book_info info = rf_kv_book_get_info(r.book);
        bool all = rule.score == RF_KV_SCORE_NONE || rule.action == RF_KV_SELECT;
        ck_assert_msg(info.kept + info.evictions == info.seen, "%s keeps %lld and drops %lld of %lld", name,
                      (long long)info.kept, (long long)info.evictions, (long long)info.seen);
        ck_assert_msg((info.kept == info.seen) == all, "%s keeps %lld of %lld", name, (long long)info.kept,
                      (long long)info.seen);
        dropped += !all;
        if (rule.schedule == RF_KV_AT_STEP && rule.alloc == RF_KV_ALLOC_UNIFORM && !all &&
            rule.score != RF_KV_SCORE_LADDER)
            ck_assert_msg(info.kept <= (int64_t)budget * LAYERS * KEY_HEADS, "%s keeps %lld", name,
                          (long long)info.kept);
        run_end(&r);
    }
    ck_assert_int_gt(dropped, 15);
    ck_assert_int_eq(refused, 0);
}
END_TEST

/* FastKV: what goes on is the best of all heads' sums and the window, and stays what later layers know; a book that is used again
 * begins anew; other numbers of tokens are refused. */
START_TEST(later_layers_receive_what_was_passed_on) {
    enum { TOKENS = 50, MORE = 20 + 4 };
    rf_error err = {0};
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, "fastkv:window=4,pool=none,tsp_share=0.4,tsp_layer=0", &err), err);
    run r = run_begin(&rule, &shape, 16, 0);
    for (int again = 0; again < 2; again++) {
        int32_t num = 0;
        measure_prompt(&r.m, &rule, 0, TOKENS);
        rf_assert_ok(rf_kv_book_prefill(r.book, 0, TOKENS, &r.m.stats, &err), err);
        ck_assert_ptr_null(rf_kv_book_received(r.book, 0, &num));
        ck_assert_int_eq(num, TOKENS);
        const int32_t *received = rf_kv_book_received(r.book, 1, &num);
        ck_assert_ptr_nonnull(received);
        ck_assert_int_eq(num, MORE);
        bool on[TOKENS] = {false};
        for (int i = 0; i < num; i++) on[received[i]] = true;
        for (int i = 1; i < num; i++) ck_assert_int_gt(received[i], received[i - 1]);
        int wrong = 0;
        for (int j = 0; j < TOKENS - 4; j++) {
            int before = 0;
            for (int o = 0; o < TOKENS - 4; o++) {
                double of[2] = {0, 0};
                for (int q = 0; q < QUERY_HEADS; q++) {
                    of[0] += (double)r.m.stats.s1[q * MOST + j];
                    of[1] += (double)r.m.stats.s1[q * MOST + o];
                }
                before += of[1] > of[0] || ((float)of[1] == (float)of[0] && o < j);
            }
            wrong += on[j] != (before < MORE - 4);
        }
        ck_assert_int_eq(wrong, 0);
        for (int j = TOKENS - 4; j < TOKENS; j++) ck_assert(on[j]);
        measure_prompt(&r.m, &rule, 1, TOKENS);
        rf_assert_fails(rf_kv_book_prefill(r.book, 1, TOKENS, &r.m.stats, &err), err, RF_ERR_ARGUMENT, "receives");
        for (int l = 1; l < LAYERS; l++) {
            measure_received(&r.m, &rule, l, TOKENS, received, num);
            rf_assert_ok(rf_kv_book_prefill(r.book, l, num, &r.m.stats, &err), err);
            for (int h = 0; h < KEY_HEADS; h++) {
                const rf_kv_head *head = rf_kv_book_head(r.book, l, h);
                ck_assert_int_eq(head->num, 16);
                for (int i = 0; i < 16; i++) ck_assert(on[head->position[i]]);
            }
        }
        rf_kv_book_info info = rf_kv_book_get_info(r.book);
        ck_assert_int_eq(info.seen, (int64_t)TOKENS * LAYERS * KEY_HEADS);
        ck_assert_int_eq(info.kept + info.evictions, info.seen);
        rf_assert_ok(rf_kv_book_append(r.book, TOKENS, &err), err);
        rf_assert_ok(rf_kv_book_reset(r.book, 16, &err), err);
    }
    run_end(&r);
}
END_TEST

/* EpiCache, KeyDiff: behind each block the best of what stayed and of the block. Sinks stay; rows are there at once. */
START_TEST(blocks_leave_the_best_of_what_they_find) {
    enum { TOKENS = 50, SIZE = 12, BUDGET = 16, SINKS = 2 };
    rf_error err = {0};
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, "score=keydiff,block=12,sinks=2", &err), err);
    run r = run_begin(&rule, &shape, BUDGET, 100);
    measured m = measured_make(MOST);
    rf_assert_fails(rf_kv_book_prefill_block(r.book, 0, SIZE, SIZE, TOKENS, NULL, &err), err, RF_ERR_STATE, "order");
    for (int again = 0; again < 2; again++) {
        for (int layer = 0; layer < LAYERS; layer++) {
            int kept[KEY_HEADS][BUDGET + SIZE], num = 0;
            for (int begin = 0; begin < TOKENS; begin += SIZE) {
                int rows = TOKENS - begin < SIZE ? TOKENS - begin : SIZE;
                for (int h = 0; h < KEY_HEADS; h++) {
                    for (int i = 0; i < rows; i++) kept[h][num + i] = begin + i;
                    for (int i = 0; i < num + rows; i++) put_key(&m, layer, h, i, kept[h][i]);
                }
                num += rows;
                m.stats.num_keys = num;
                rf_assert_ok(
                    rf_kv_book_prefill_block(r.book, layer, begin, rows, TOKENS, num > BUDGET ? &m.stats : NULL, &err),
                    err);
                check_book(r.book, r.first, r.rows);
                int left = num < BUDGET ? num : BUDGET;
                for (int h = 0; h < KEY_HEADS; h++) {
                    int next = 0;
                    for (int i = 0; i < num; i++) {
                        float own = m.stats.key_cosine[h * MOST + i];
                        int before = SINKS;
                        for (int o = SINKS; o < num; o++) {
                            float other = m.stats.key_cosine[h * MOST + o];
                            before += other < own || (other == own && o < i);
                        }
                        if (i < SINKS || before < left) kept[h][next++] = kept[h][i];
                    }
                    ck_assert_int_eq(next, left);
                    const rf_kv_head *head = rf_kv_book_head(r.book, layer, h);
                    ck_assert_int_eq(head->num, left);
                    int wrong = 0;
                    for (int i = 0; i < left; i++) wrong += head->position[i] != kept[h][i];
                    ck_assert_msg(wrong == 0, "layer %d, head %d, behind token %d", layer, h, begin + rows);
                }
                num = left;
            }
        }
        rf_kv_book_info info = rf_kv_book_get_info(r.book);
        ck_assert_int_eq(info.seen, (int64_t)TOKENS * LAYERS * KEY_HEADS);
        ck_assert_int_eq(info.kept, (int64_t)BUDGET * LAYERS * KEY_HEADS);
        ck_assert_int_eq(info.kept + info.evictions, info.seen);
        rf_assert_ok(rf_kv_book_append(r.book, TOKENS, &err), err);
        rf_assert_ok(rf_kv_book_reset(r.book, BUDGET, &err), err);
    }
    rf_assert_ok(rf_kv_book_prefill_block(r.book, 0, 0, SIZE, TOKENS, NULL, &err), err);
    rf_assert_fails(rf_kv_book_prefill_block(r.book, 0, SIZE, SIZE, TOKENS, NULL, &err), err, RF_ERR_SHAPE, "24 slots");
    free(m.block);
    run_end(&r);
}
END_TEST

/* Two sequences of one pool, a step of one, a step of the other: as each alone. */
START_TEST(sequences_do_not_know_each_other) {
    for (int which = 0; which < NUM_RULES; which++) {
        rf_kv_rule rule = rule_of(which);
        int64_t rows = rf_kv_pool_rows(&rule, &shape, 16);
        run a = run_begin(&rule, &shape, 16, 0), b = run_begin(&rule, &shape, 16, rows),
            alone = run_begin(&rule, &shape, 16, rows);
        run_prompt(&a, 33);
        run_prompt(&b, 71);
        for (int i = 0; i < 40; i++) {
            run_step(&a);
            run_step(&b);
        }
        run_prompt(&alone, 71);
        for (int i = 0; i < 40; i++) run_step(&alone);
        for (int i = 0; i < LAYERS * KEY_HEADS; i++) {
            const rf_kv_head *x = rf_kv_book_head(b.book, i / KEY_HEADS, i % KEY_HEADS);
            const rf_kv_head *y = rf_kv_book_head(alone.book, i / KEY_HEADS, i % KEY_HEADS);
            ck_assert_int_eq(x->num, y->num);
            ck_assert_int_eq(memcmp(x->row, y->row, (size_t)x->num * sizeof *x->row), 0);
            ck_assert_int_eq(memcmp(x->position, y->position, (size_t)x->num * sizeof *x->position), 0);
        }
        run_end(&a);
        run_end(&b);
        run_end(&alone);
    }
}
END_TEST

/* ---- more than a list ---- */

START_TEST(crush_keeps_heavy_pages_and_representatives) {
    rf_kv_rule rule = plain_rule(RF_KV_SCORE_ATTENTION);
    rule.crush_share = 0.25;
    rule.sinks = 3;
    rule.recents = 5;
    rule.schedule = RF_KV_AT_PREFILL;
    int tokens = 90, budget = 3 + 5 + 2 + 8 * 4 + 1; /* 82 in the middle: 20 pages of 4 and 2 more; 8 pages fit */
    run r = run_begin(&rule, &shape, budget, 0);
    run_prompt(&r, tokens);
    for (int layer = 0; layer < LAYERS; layer++) {
        double page[20] = {0}, score[KEY_HEADS][80];
        int distance[20] = {0}, order[20], others = 0, want[64], num = 0;
        bool chosen[20] = {0};
        for (int h = 0; h < KEY_HEADS; h++) {
            for (int i = 0; i < 80; i++)
                page[i / 4] += score[h][i] = direct_score(&rule, layer, h, tokens, tokens - 1, 3 + i);
        }
        for (int h = 0; h < KEY_HEADS; h++) {
            for (int i = 0; i < 80; i++) {
                int before = 0;
                for (int o = 0; o < 80; o++)
                    before += score[h][o] > score[h][i] || (score[h][o] == score[h][i] && o < i);
                distance[i / 4] += (before < 40) != ((i % 4) % 2 == 1); /* 4 bits a head: each begins with a 0 */
            }
        }
        for (int n = 0; n < 6; n++) {
            int best = -1;
            for (int p = 0; p < 20; p++) {
                if (!chosen[p] && (best < 0 || page[p] > page[best])) best = p;
            }
            chosen[best] = true;
        }
        for (int d = 0; d <= 8; d++) {
            for (int p = 0; p < 20; p++) {
                if (!chosen[p] && distance[p] == d) order[others++] = p;
            }
        }
        ck_assert_int_eq(others, 14);
        chosen[order[0]] = chosen[order[13]] = true; /* two of an even spread: both ends */
        for (int j = 0; j < tokens; j++) {
            if (j < 3 || j >= 83 || chosen[(j - 3) / 4]) want[num++] = j;
        }
        for (int h = 0; h < KEY_HEADS; h++) assert_keeps(r.book, layer, h, want, num, "crush", layer);
    }
    run_end(&r);
    rule.schedule = RF_KV_AT_STEP;
    r = run_begin(&rule, &shape, budget, 0);
    run_prompt(&r, 40);
    for (int i = 0; i < 100; i++) {
        run_step(&r);
        const rf_kv_head *a = rf_kv_book_head(r.book, 1, 0), *b = rf_kv_book_head(r.book, 1, 1);
        ck_assert_int_le(a->num, budget);
        ck_assert_int_eq(memcmp(a->position, b->position, (size_t)a->num * sizeof *a->position), 0);
        ck_assert_int_eq(a->position[2], 2);
        ck_assert_int_eq(a->position[a->num - 5], r.next - 5);
    }
    run_end(&r);
}
END_TEST

static double cosine_of(int what, int layer, int head, int a, int b, double *norm_a, double *norm_b) {
    double ab = 0, aa = 0, bb = 0;
    for (int d = 0; d < DIM; d++) {
        double x = (double)key_number(what + d, layer, head, a), y = (double)key_number(what + d, layer, head, b);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    *norm_a = sqrt(aa);
    *norm_b = sqrt(bb);
    return ab / sqrt(aa * bb);
}

/* gone: positions that go, kept: those that stay; with what joins call them and their places in the list. */
static void check_joins(const run *r, int layer, int head, const int *gone, const int *from, const int *gone_at,
                        int num_gone, const int *kept, const int *to, const int *kept_at, int num_kept) {
    int32_t num = 0, at = 0;
    const rf_kv_join *joins = rf_kv_book_joins(r->book, layer, head, &num);
    for (int g = 0; g < num_gone; g++) {
        int best = -1;
        double best_score = -INFINITY, na, nb, weight = 1;
        for (int k = 0; k < num_kept; k++) {
            double s = cosine_of(KEY, layer, head, gone[g], kept[k], &na, &nb);
            if (r->rule.action == RF_KV_MERGE_NEAR) s = -abs(gone_at[g] - kept_at[k]);
            if (r->rule.action == RF_KV_MERGE_EMS)
                s = fmax(s, 0) * fmax(cosine_of(VALUE, layer, head, gone[g], kept[k], &na, &nb), 0);
            if (s <= best_score) continue;
            best_score = s;
            best = k;
        }
        if (r->rule.action == RF_KV_MERGE_EMS && best_score < 0.5) continue;
        if (r->rule.action == RF_KV_MERGE) {
            if (best_score <= 0) continue;
            cosine_of(VALUE, layer, head, gone[g], kept[best], &na, &nb);
            weight = best_score * na / (na + nb);
        }
        ck_assert_int_lt(at, num);
        ck_assert_int_eq(joins[at].from, from[g]);
        ck_assert_int_eq(joins[at].to, to[best]);
        ck_assert_double_eq_tol((double)joins[at].weight, weight, 1e-6);
        ck_assert_int_eq(joins[at].keys, r->rule.action != RF_KV_MERGE);
        at++;
    }
    ck_assert_int_eq(at, num);
}

START_TEST(dropped_tokens_join_kept_ones) {
    static const rf_kv_action actions[] = {RF_KV_MERGE, RF_KV_MERGE_NEAR, RF_KV_MERGE_EMS};
    rf_kv_rule rule = rule_of(KNORM_EVERY);
    rule.action = actions[_i];
    run r = run_begin(&rule, &shape, 20, 500);
    run_prompt(&r, 45);
    int any = 0;
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int h = 0; h < KEY_HEADS; h++) {
            const rf_kv_head *head = rf_kv_book_head(r.book, layer, h);
            int gone[45], num = 0, next = 0;
            for (int j = 0; j < 45; j++) {
                if (next < head->num && head->position[next] == j)
                    next++;
                else
                    gone[num++] = j;
            }
            ck_assert_int_eq(num, 25);
            check_joins(&r, layer, h, gone, gone, gone, num, head->position, head->position, head->position, head->num);
        }
    }
    for (int step = 0; step < 40; step++) {
        static int before[LAYERS][KEY_HEADS][64], rows[LAYERS][KEY_HEADS][64];
        rf_error err = {0};
        bool changed;
        rf_assert_ok(rf_kv_book_append(r.book, r.next, &err), err);
        for (int layer = 0; layer < LAYERS; layer++) {
            int num[KEY_HEADS];
            for (int h = 0; h < KEY_HEADS; h++) {
                const rf_kv_head *head = rf_kv_book_head(r.book, layer, h);
                num[h] = head->num;
                memcpy(before[layer][h], head->position, (size_t)head->num * sizeof(int));
                memcpy(rows[layer][h], head->row, (size_t)head->num * sizeof(int));
            }
            measure_step(&r.m, &rule, r.book, layer, r.next);
            rf_assert_ok(rf_kv_book_step(r.book, layer, &r.m.stats, &changed, &err), err);
            for (int h = 0; h < KEY_HEADS; h++) {
                const rf_kv_head *head = rf_kv_book_head(r.book, layer, h);
                int gone[64], from[64], gone_at[64], kept_at[64], n = 0, next = 0;
                for (int i = 0; i < num[h]; i++) {
                    if (next < head->num && head->position[next] == before[layer][h][i]) {
                        kept_at[next] = i;
                        ck_assert_int_eq(head->row[next++], rows[layer][h][i]);
                        continue;
                    }
                    gone_at[n] = i;
                    gone[n] = before[layer][h][i];
                    from[n++] = rows[layer][h][i];
                }
                ck_assert_int_eq(changed, n > 0);
                check_joins(&r, layer, h, gone, from, gone_at, n, head->position, head->row, kept_at, head->num);
                any += n;
            }
        }
        r.next++;
    }
    ck_assert_int_gt(any, 100);
    run_end(&r);
}
END_TEST

/* CAOTE over sums: the two forms, each by its definition. */
START_TEST(caote_weighs_sums_by_what_values_add) {
    for (int fast = 0; fast < 2; fast++) {
        rf_kv_rule rule = plain_rule(RF_KV_SCORE_ATTENTION);
        rule.recents = 3;
        run r = run_begin(&rule, &shape, 16, 0), plain = run_begin(&rule, &shape, 16, 0);
        rf_kv_book_destroy(r.book);
        r.rule.value = fast ? RF_KV_VALUE_FASTCAOTE : RF_KV_VALUE_CAOTE;
        rf_error err = {0};
        rf_assert_ok(rf_kv_book_create(&r.book, &r.rule, &shape, 16, 0, &err), err);
        run_prompt(&r, 10);
        run_prompt(&plain, 10);
        static list l[LAYERS][KEY_HEADS];
        bool differ = false;
        for (int t = 9; t < 90; t++) {
            if (t > 9) run_step(&r);
            if (t > 9) run_step(&plain);
            for (int u = 0; u < LAYERS * KEY_HEADS; u++) {
                int layer = u / KEY_HEADS, h = u % KEY_HEADS, n;
                list *at = &l[layer][h];
                double s[64], sum = 0, o[DIM] = {0};
                if (t == 9) at->num = 0;
                for (int j = t == 9 ? 0 : t; j <= t; j++) at->position[at->num++] = j;
                n = at->num;
                for (int i = 0; i < n; i++) sum += s[i] = direct_score(&rule, layer, h, 10, t, at->position[i]);
                for (int i = 0; i < n * DIM; i++)
                    o[i % DIM] += (double)key_number(VALUE + i % DIM, layer, h, at->position[i / DIM]) *
                                  (fast ? 1.0 / n : s[i / DIM] / sum);
                for (int i = 0; i < n; i++) {
                    double off = 0, share = s[i] / sum;
                    for (int d = 0; d < DIM; d++)
                        off += pow(o[d] - (double)key_number(VALUE + d, layer, h, at->position[i]), 2);
                    s[i] = share / (1 - share) * sqrt(off);
                }
                direct_cut(at, s, 16, 0, 3);
                assert_keeps(r.book, layer, h, at->position, at->num, "caote", t);
                const rf_kv_head *other = rf_kv_book_head(plain.book, layer, h);
                differ |= memcmp(other->position, at->position, (size_t)at->num * sizeof(int)) != 0;
            }
        }
        ck_assert(differ);
        run_end(&r);
        run_end(&plain);
    }
}
END_TEST

/* ---- what goes wrong ---- */

static const char *const threaded[] = {"snapkv", "adakv", "cake", "caote:window=8", "criticalkv", "h2o", "keydiff"};

START_TEST(threads_do_not_change_a_choice) {
    enum { PROMPT = 33000, Q = 32, K = 8, BUDGET = 9000 };
    rf_error err = {0};
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, threaded[_i], &err), err);
    rf_kv_shape large = {.num_layers = 3, .num_q_heads = Q, .num_kv_heads = K, .head_dim = DIM, .max_prompt = PROMPT};
    size_t q = (size_t)Q * PROMPT, k = (size_t)K * PROMPT;
    float *block = malloc((q + k * DIM) * sizeof *block), entropy[Q];
    ck_assert_ptr_nonnull(block);
    for (size_t i = 0; i < q + k * DIM; i++) block[i] = (float)(mix(7, (uint32_t)i, 0, 0) % 4096) / 4096.0f;
    for (int i = 0; i < Q; i++) entropy[i] = 3;
    rf_kv_book *book[2];
    for (int b = 0; b < 2; b++) {
        rf_kv_stats s = {.num_keys = PROMPT,
                         .stride = PROMPT,
                         .num_queries = 32,
                         .head_dim = DIM,
                         .s1 = block,
                         .s2 = block,
                         .removal = block,
                         .wo_norm = block,
                         .key_cosine = block,
                         .entropy = entropy,
                         .v = block + q,
                         .num_threads = b ? 3 : 0};
        rf_assert_ok(rf_kv_book_create(&book[b], &rule, &large, BUDGET, 0, &err), err);
        for (int l = 0; l < 3; l++) rf_assert_ok(rf_kv_book_prefill(book[b], l, PROMPT, &s, &err), err);
    }
    int wrong = 0, dropped = 0;
    for (int i = 0; i < 3 * K; i++) {
        const rf_kv_head *one = rf_kv_book_head(book[0], i / K, i % K), *many = rf_kv_book_head(book[1], i / K, i % K);
        size_t bytes = (size_t)one->num * 4;
        dropped += one->num < PROMPT;
        wrong += one->num != many->num || memcmp(one->position, many->position, bytes) != 0 ||
                 memcmp(one->row, many->row, bytes) != 0 || memcmp(one->score, many->score, bytes) != 0;
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_eq(dropped, 3 * K);
    for (int b = 0; b < 2; b++) rf_kv_book_destroy(book[b]);
    free(block);
}
END_TEST

START_TEST(calls_out_of_order_are_refused) {
    rf_kv_rule rule = rule_of(H2O);
    rf_error err = {0};
    run r = run_begin(&rule, &shape, 16, 0);
    bool changed;
    measure_prompt(&r.m, &rule, 0, 30);
    rf_assert_fails(rf_kv_book_prefill(r.book, 1, 30, &r.m.stats, &err), err, RF_ERR_STATE, "layer 0");
    rf_assert_fails(rf_kv_book_prefill(r.book, 0, 161, NULL, &err), err, RF_ERR_ARGUMENT, "160");
    rf_assert_fails(rf_kv_book_prefill(r.book, 0, 30, NULL, &err), err, RF_ERR_ARGUMENT, "measured");
    rf_assert_ok(rf_kv_book_prefill(r.book, 0, 30, &r.m.stats, &err), err);
    rf_assert_fails(rf_kv_book_prefill(r.book, 1, 29, &r.m.stats, &err), err, RF_ERR_ARGUMENT, "29");
    rf_assert_fails(rf_kv_book_append(r.book, 30, &err), err, RF_ERR_STATE, "1 of 3");
    rf_assert_fails(rf_kv_book_step(r.book, 0, &r.m.stats, &changed, &err), err, RF_ERR_STATE, "step");
    rf_assert_ok(rf_kv_book_reset(r.book, 16, &err), err);
    run_prompt(&r, 30);
    rf_assert_fails(rf_kv_book_append(r.book, 29, &err), err, RF_ERR_ARGUMENT, "29");
    rf_assert_ok(rf_kv_book_append(r.book, 40, &err), err);
    rf_assert_fails(rf_kv_book_append(r.book, 41, &err), err, RF_ERR_STATE, "rows are left");
    rf_assert_fails(rf_kv_book_step(r.book, 0, NULL, &changed, &err), err, RF_ERR_ARGUMENT, "measured");
    run_end(&r);
    rf_kv_book *book;
    rule = rule_of(TREE);
    rule.alloc = RF_KV_ALLOC_CAKE;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &shape, 16, 0, &err), err, RF_ERR_UNSUPPORTED, "uniform");
    rule = cake_rule();
    rule.action = RF_KV_MERGE;
    rf_assert_fails(rf_kv_book_create(&book, &rule, &shape, 16, 0, &err), err, RF_ERR_UNSUPPORTED, "merging");
    rf_assert_fails(rf_kv_book_create(&book, &rule, &shape, -1, 0, &err), err, RF_ERR_UNSUPPORTED, "merging");
    ck_assert_ptr_null(book);
}
END_TEST

/* Protected slots are more than the budget: sinks first, then the newest. */
START_TEST(a_budget_below_what_is_protected_is_met) {
    rf_kv_rule rule = cake_rule();
    rule.sinks = 2;
    for (int a = 0; a < 5; a++) {
        rule.alloc = (rf_kv_alloc[]){RF_KV_ALLOC_UNIFORM, RF_KV_ALLOC_PYRAMID, RF_KV_ALLOC_FLAT_HEADS,
                                     RF_KV_ALLOC_FLAT_ALL, RF_KV_ALLOC_CAKE}[a];
        run r = run_begin(&rule, &shape, 5, 0);
        run_prompt(&r, 40);
        for (int i = 0; i < 10; i++) run_step(&r);
        for (int i = 0; i < LAYERS * KEY_HEADS; i++)
            assert_keeps(r.book, i / KEY_HEADS, i % KEY_HEADS, (int[]){0, 1, 47, 48, 49}, 5, "small", a);
        run_end(&r);
    }
}
END_TEST

START_TEST(every_allocation_may_fail) {
    int rules[] = {H2O, LAZY, OBSERVED, -1, -2};
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        rf_kv_rule rule = rules[i] == -1 ? cake_rule() : rule_of(rules[i] == -2 ? GATES : rules[i]);
        if (rules[i] == -2) rule.alloc = RF_KV_ALLOC_FLAT_ALL;
        uint64_t live = rf_memory_get_counts().num_live, nth = 1;
        measured m = measured_make(256);
        for (bool failed = true; failed; nth++) {
            rf_error err = {0};
            rf_kv_book *book = NULL;
            rf_memory_fail_nth(nth);
            rf_status status = rf_kv_book_create(&book, &rule, &shape, 12, 0, &err);
            for (int layer = 0; layer < LAYERS && status == RF_OK; layer++) {
                measure_prompt(&m, &rule, layer, 50);
                status = rf_kv_book_prefill(book, layer, 50, &m.stats, &err);
            }
            for (int t = 50; t < 80 && status == RF_OK; t++) {
                status = rf_kv_book_append(book, t, &err);
                for (int layer = 0; layer < LAYERS && status == RF_OK; layer++) {
                    bool changed;
                    measure_step(&m, &rule, book, layer, t);
                    status = rf_kv_book_step(book, layer, &m.stats, &changed, &err);
                }
            }
            failed = status != RF_OK;
            rf_memory_fail_nth(0);
            if (failed) ck_assert_int_eq(status, RF_ERR_MEMORY);
            rf_kv_book_destroy(book);
            ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        }
        ck_assert_uint_gt(nth, 30);
        free(m.block);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("kv book");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, rules_keep_what_a_direct_statement_keeps, 0, NUM_RULES);
    tcase_add_test(tc, ladder_is_the_golden_one);
    tcase_add_test(tc, ladder_holds_its_cap);
    tcase_add_test(tc, tree_is_the_golden_one);
    tcase_add_test(tc, tree_contests_blocks_of_a_prompt);
    tcase_add_test(tc, cake_shrinks_layers_as_they_come_and_follows_the_last_query);
    tcase_add_test(tc, pyramid_gives_layers_their_series);
    tcase_add_test(tc, flat_heads_are_ragged_and_keep_their_best);
    tcase_add_test(tc, flat_all_is_exact_in_total);
    tcase_add_test(tc, tables_are_spent_exactly_and_classes_are_whole);
    tcase_add_loop_test(tc, a_pool_is_as_large_as_it_must_be, 0, NUM_RULES);
    tcase_add_test(tc, pools_of_large_models_are_counted);
    tcase_add_test(tc, a_long_generation_stays_in_its_rows);
    tcase_add_test(tc, a_budget_over_everything_drops_nothing);
    tcase_add_test(tc, named_methods_run);
    tcase_add_test(tc, later_layers_receive_what_was_passed_on);
    tcase_add_test(tc, blocks_leave_the_best_of_what_they_find);
    tcase_add_test(tc, sequences_do_not_know_each_other);
    tcase_add_test(tc, crush_keeps_heavy_pages_and_representatives);
    tcase_add_loop_test(tc, dropped_tokens_join_kept_ones, 0, 3);
    tcase_add_test(tc, caote_weighs_sums_by_what_values_add);
    tcase_add_loop_test(tc, threads_do_not_change_a_choice, 0, sizeof threaded / sizeof *threaded);
    tcase_add_test(tc, calls_out_of_order_are_refused);
    tcase_add_test(tc, a_budget_below_what_is_protected_is_met);
    tcase_add_test(tc, every_allocation_may_fail);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
