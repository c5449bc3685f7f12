/* tests/caching/test_kv_reference.c - what KV rules keep, against the plain Python statement of each (tests/reference/kv.py): kept
 * positions of every layer and key head behind a prompt and while decoding, joins, what a step reads where all stays, and the parts
 * that rules share.
 *
 * Statistics of a prompt are the recorded ones, and a rule is given those alone that its needs name. Of a decoded token they are
 * computed here, in double, over the slots that the book has. Positions are equal: every choice of the fixture has 1e-6 or more
 * between the last kept and the first dropped score, of a selection 5e-6 (its products are f32). Rules that rf_kv_rule_check refuses
 * are listed and nothing else. */
#include <stdarg.h>

#include "caching/kv/kv.h"
#include "caching/kv/select.h"
#include "caching/kv/sentences.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/params.h"
#include "core/weights.h"
#include "tests/test_util.h"

enum { MAX_LAYERS = 8, MAX_Q = 8, MAX_KV = 4, MAX_N = 256, MAX_D = 32, GROWN = 12 };

#define WEIGHT_BOUND 2e-6

static rf_json *open_json(void) {
    rf_error err = {0};
    rf_json *doc = NULL;
    rf_assert_ok(rf_json_open(&doc, RF_FIXTURE_DIR "/kv-rules.json", &err), err);
    return doc;
}

static const rf_json_value *member(const rf_json_value *object, const char *key) {
    const rf_json_value *v = rf_json_get(object, key);
    ck_assert_msg(v != NULL, "kv-rules.json: no %s", key);
    return v;
}

static int32_t integer(const rf_json_value *object, const char *key) {
    const rf_json_value *v = member(object, key);
    ck_assert_msg(rf_json_is_number(v), "kv-rules.json: %s is no number", key);
    return (int32_t)rf_json_number(v);
}

static bool truth(const rf_json *doc, const rf_json_value *object, const char *key) {
    rf_error err = {0};
    bool out = false;
    rf_assert_ok(rf_json_get_bool(doc, object, key, &out, &err), err);
    return out;
}

/* Numbers of an array into out [at most most]. */
static int32_t numbers(const rf_json_value *array, float *out, int32_t most) {
    int32_t n = 0;
    for (const rf_json_value *v = rf_json_first(array); v != NULL; v = rf_json_next(v)) {
        ck_assert_int_lt(n, most);
        out[n++] = (float)rf_json_number(v);
    }
    return n;
}

/* "0-3,7" -> 0 1 2 3 7 */
static int32_t positions(const char *text, int32_t *out) {
    int32_t n = 0;
    for (const char *at = text; *at != 0;) {
        char *end = NULL;
        long first = strtol(at, &end, 10), last = first;
        if (*end == '-') last = strtol(end + 1, &end, 10);
        ck_assert_msg(end != at && (*end == ',' || *end == 0), "kv-rules.json: positions %s", text);
        for (long i = first; i <= last; i++) {
            ck_assert_int_lt(n, MAX_N);
            out[n++] = (int32_t)i;
        }
        at = *end == ',' ? end + 1 : end;
    }
    return n;
}

/* --- the recorded sequence --- */

typedef struct {
    rf_json *doc;
    rf_weights *tensors;
    const rf_json_value *root;
    int32_t layers, q_heads, kv_heads, head_dim, prompt, num_new, every;
    float *q, *k, *v; /* [layers, prompt + num_new, heads, head_dim] */
    float shares[MAX_LAYERS];
    uint8_t listed[MAX_LAYERS * MAX_Q], retrieval[MAX_LAYERS * MAX_Q];
    float *hidden, tokens[MAX_N]; /* [prompt + num_new, columns], ids */
    float *gate;                  /* [layers, kv_heads, prompt + num_new] log retention */
    int32_t columns;
    rf_kv_sentences *sentences; /* of a rule that penalises those said again */
} recording;

/* Any tensor of the fixture as f32. *num_elems: its size. */
static float *read_tensor(const recording *r, const char *name, int64_t *num_elems) {
    rf_error err = {0};
    rf_tensor t;
    float *out = NULL;
    rf_assert_ok(rf_weights_get(r->tensors, name, &t, &err), err);
    rf_assert_ok(rf_weights_read_f32(r->tensors, name, t.rank, t.shape, &out, &err), err);
    *num_elems = rf_tensor_num_elems(&t);
    return out;
}

/* [layers][q_heads] of 0 and 1 */
static void flags(const recording *r, const char *key, uint8_t *out) {
    int32_t at = 0;
    for (const rf_json_value *l = rf_json_first(member(r->root, key)); l != NULL; l = rf_json_next(l)) {
        float row[MAX_Q];
        ck_assert_int_eq(numbers(l, row, MAX_Q), r->q_heads);
        for (int32_t h = 0; h < r->q_heads; h++) out[at++] = row[h] != 0;
    }
    ck_assert_int_eq(at, r->layers * r->q_heads);
}

static recording recording_open(void) {
    recording r = {.doc = open_json()};
    rf_error err = {0};
    r.root = rf_json_root(r.doc);
    r.layers = integer(r.root, "layers");
    r.q_heads = integer(r.root, "q_heads");
    r.kv_heads = integer(r.root, "kv_heads");
    r.head_dim = integer(r.root, "head_dim");
    r.prompt = integer(r.root, "prompt");
    r.num_new = integer(r.root, "new");
    r.every = integer(r.root, "every");
    ck_assert(r.layers <= MAX_LAYERS && r.q_heads <= MAX_Q && r.kv_heads <= MAX_KV && r.head_dim <= MAX_D);
    ck_assert_int_le(r.prompt + r.num_new, MAX_N);
    rf_assert_ok(rf_weights_open(&r.tensors, RF_FIXTURE_DIR "/kv-rules.safetensors", &err), err);
    int64_t num[3], rows = (int64_t)r.layers * (r.prompt + r.num_new) * r.head_dim;
    r.q = read_tensor(&r, "q", &num[0]);
    r.k = read_tensor(&r, "k", &num[1]);
    r.v = read_tensor(&r, "v", &num[2]);
    ck_assert(num[0] == rows * r.q_heads && num[1] == rows * r.kv_heads && num[2] == num[1]);
    ck_assert_int_eq(numbers(member(r.root, "layer_shares"), r.shares, MAX_LAYERS), r.layers);
    const int32_t num_tokens = r.prompt + r.num_new;
    r.hidden = read_tensor(&r, "hidden", num);
    r.columns = (int32_t)(num[0] / num_tokens);
    ck_assert_int_eq(numbers(member(r.root, "tokens"), r.tokens, MAX_N), num_tokens);
    r.gate = read_tensor(&r, "gate", num);
    ck_assert_int_eq(num[0], (int64_t)r.layers * r.kv_heads * num_tokens);
    flags(&r, "head_classes", r.listed);
    flags(&r, "retrieval_heads", r.retrieval);
    return r;
}

static void recording_close(recording *r) {
    rf_kv_sentences_destroy(r->sentences);
    rf_free(r->hidden);
    rf_free(r->gate);
    rf_free(r->q);
    rf_free(r->k);
    rf_free(r->v);
    rf_weights_close(r->tensors);
    rf_json_close(r->doc);
}

static const float *row_of(const recording *r, const float *x, int32_t heads, int32_t layer, int32_t token,
                           int32_t head) {
    return x + (((int64_t)layer * (r->prompt + r->num_new) + token) * heads + head) * r->head_dim;
}

static double dot(const float *a, const float *b, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* --- statistics of a prompt: recorded, and no more than the rule asks for --- */

static const struct {
    unsigned need;
    const char *field;
} FIELDS[] = {
    {RF_KV_NEED_SUM, "s1"},
    {RF_KV_NEED_SQUARES, "s2"},
    {RF_KV_NEED_PEAK, "peak"},
    {RF_KV_NEED_ENTROPY, "entropy"},
    {RF_KV_NEED_KEY_NORM, "key_norm"},
    {RF_KV_NEED_VALUE_NORM, "value_norm"},
    {RF_KV_NEED_KEY_COSINE, "key_cosine"},
    {RF_KV_NEED_REMOVAL, "removal"},
    {RF_KV_NEED_EXPECTED, "expected"},
    {RF_KV_NEED_WO, "wo_norm"},
    {RF_KV_NEED_GATE, "gate"}, /* of new tokens too: its rows are longer than a prompt */
};
enum { NUM_FIELDS = sizeof FIELDS / sizeof FIELDS[0] };

static const float **field_of(rf_kv_stats *s, unsigned need) {
    switch (need) {
    case RF_KV_NEED_SUM: return &s->s1;
    case RF_KV_NEED_SQUARES: return &s->s2;
    case RF_KV_NEED_PEAK: return &s->peak;
    case RF_KV_NEED_ENTROPY: return &s->entropy;
    case RF_KV_NEED_KEY_NORM: return &s->key_norm;
    case RF_KV_NEED_VALUE_NORM: return &s->value_norm;
    case RF_KV_NEED_KEY_COSINE: return &s->key_cosine;
    case RF_KV_NEED_REMOVAL: return &s->removal;
    case RF_KV_NEED_EXPECTED: return &s->expected;
    case RF_KV_NEED_WO: return &s->wo_norm;
    case RF_KV_NEED_GATE: return &s->gate;
    default: return NULL;
    }
}

/* [kv_heads, tokens, head_dim] of one layer */
static float *head_rows(const recording *r, const float *x, int32_t layer, int32_t tokens) {
    float *out = rf_alloc((size_t)(r->kv_heads * tokens * r->head_dim) * sizeof *out);
    ck_assert_ptr_nonnull(out);
    for (int32_t g = 0; g < r->kv_heads; g++)
        for (int32_t t = 0; t < tokens; t++)
            memcpy(out + ((int64_t)g * tokens + t) * r->head_dim, row_of(r, x, r->kv_heads, layer, t, g),
                   (size_t)r->head_dim * sizeof *out);
    return out;
}

/* Queries that a case's statistics are of, from the tensor's name. */
static int32_t queries_of(const char *tensor, int32_t tokens) {
    int w = 0;
    if (sscanf(tensor, "window%d.", &w) == 1) return w < tokens ? (int32_t)w : tokens;
    if (sscanf(tensor, "fast%d.", &w) == 1) return (int32_t)w;
    if (strncmp(tensor, "last.", 5) == 0) return 1;
    if (strncmp(tensor, "pseudo.", 7) == 0) return 16;
    if (strncmp(tensor, "drafted8.", 9) == 0) return 16;
    if (strncmp(tensor, "drafted.", 8) == 0) return 8;
    return tokens;
}

static void prefill(const recording *r, const rf_json_value *c, const char *name, const rf_kv_rule *rule,
                    rf_kv_book *book) {
    const rf_json_value *of = member(c, "stats");
    const int32_t tokens = integer(c, "prompt");
    const unsigned needs = rf_kv_needs_prefill(rule);
    unsigned known = RF_KV_NEED_KV | RF_KV_NEED_HIDDEN;
    for (int f = 0; f < NUM_FIELDS; f++) known |= FIELDS[f].need;
    ck_assert_msg((needs & ~known) == 0, "%s: needs %u, of which the fixture has %u alone", name, needs, known);
    for (int32_t l = 0; l < r->layers; l++) {
        rf_kv_stats s = {.num_keys = tokens, .stride = tokens, .num_queries = tokens, .head_dim = r->head_dim};
        float *owned[NUM_FIELDS + 2] = {0};
        for (int f = 0; f < NUM_FIELDS; f++) {
            if ((needs & FIELDS[f].need) == 0) continue;
            const char *tensor = rf_json_string(rf_json_get(of, FIELDS[f].field));
            ck_assert_msg(tensor != NULL, "%s: asks for %s, which its definition does not use", name, FIELDS[f].field);
            int64_t n = 0;
            owned[f] = read_tensor(r, tensor, &n);
            *field_of(&s, FIELDS[f].need) = owned[f] + l * (n / r->layers);
            if (strchr(tensor, '.') != NULL) s.num_queries = queries_of(tensor, tokens);
        }
        if ((needs & RF_KV_NEED_GATE) != 0) {
            ck_assert_uint_eq(needs, RF_KV_NEED_GATE);
            s.stride = tokens + r->num_new;
        }
        if ((needs & RF_KV_NEED_KV) != 0) {
            s.k = owned[NUM_FIELDS] = head_rows(r, r->k, l, tokens);
            s.v = owned[NUM_FIELDS + 1] = head_rows(r, r->v, l, tokens);
        }
        rf_error err = {0};
        if (l > 0) (void)rf_kv_book_received(book, l, &s.num_keys); /* a tensor's rows are as long as the prompt */
        rf_status st = rf_kv_book_prefill(book, l, s.num_keys, needs != 0 ? &s : NULL, &err);
        ck_assert_msg(st == RF_OK, "%s: prefill of layer %d: %s", name, l, err.message);
        for (int f = 0; f < NUM_FIELDS + 2; f++) rf_free(owned[f]);
    }
}

/* A token's hidden state comes behind its last layer. */
static void add_hidden(const recording *r, int32_t position) {
    rf_error err = {0};
    if (r->sentences == NULL) return;
    rf_assert_ok(rf_kv_sentences_add(r->sentences, (int32_t)r->tokens[position],
                                     r->hidden + (int64_t)position * r->columns, &err),
                 err);
}

/* --- one decoded token --- */

typedef struct {
    float s1[MAX_Q][MAX_N], s2[MAX_Q][MAX_N], key_norm[MAX_KV][MAX_N], value_norm[MAX_KV][MAX_N],
        key_cosine[MAX_KV][MAX_N], gate[MAX_KV][MAX_N];
    float k[MAX_KV * MAX_N * MAX_D], v[MAX_KV * MAX_N * MAX_D]; /* [kv_heads][MAX_N][head_dim] */
} measured;

/* Attention of the token at `position` over the slots of each head, and what the slots' keys and values are. */
static void measure(const recording *r, const rf_kv_book *book, int32_t layer, int32_t position, measured *m) {
    const int32_t group = r->q_heads / r->kv_heads, d = r->head_dim;
    memset(m, 0, sizeof *m);
    for (int32_t h = 0; h < r->q_heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(book, layer, h / group);
        const float *q = row_of(r, r->q, r->q_heads, layer, position, h);
        double z[MAX_N], most = -INFINITY, sum = 0;
        for (int32_t i = 0; i < head->num; i++) {
            z[i] = dot(q, row_of(r, r->k, r->kv_heads, layer, head->position[i], h / group), d) / sqrt((double)d);
            most = fmax(most, z[i]);
        }
        for (int32_t i = 0; i < head->num; i++) sum += exp(z[i] - most);
        for (int32_t i = 0; i < head->num; i++) {
            double p = exp(z[i] - most) / sum;
            m->s1[h][i] = (float)p;
            m->s2[h][i] = (float)(p * p);
        }
    }
    for (int32_t g = 0; g < r->kv_heads; g++) {
        const rf_kv_head *head = rf_kv_book_head(book, layer, g);
        double anchor[MAX_D] = {0}, size = 0;
        for (int pass = 0; pass < 2; pass++) {
            for (int32_t i = 0; i < head->num; i++) {
                const float *k = row_of(r, r->k, r->kv_heads, layer, head->position[i], g);
                const float *v = row_of(r, r->v, r->kv_heads, layer, head->position[i], g);
                double norm = sqrt(dot(k, k, d)), along = 0;
                for (int32_t e = 0; e < d; e++) {
                    if (pass == 0) anchor[e] += (double)k[e] / norm;
                    along += (double)k[e] * anchor[e];
                    m->k[((int64_t)g * MAX_N + i) * d + e] = k[e];
                    m->v[((int64_t)g * MAX_N + i) * d + e] = v[e];
                }
                m->key_norm[g][i] = (float)norm;
                m->gate[g][i] =
                    r->gate[(int64_t)(layer * r->kv_heads + g) * (r->prompt + r->num_new) + head->position[i]];
                m->value_norm[g][i] = (float)sqrt(dot(v, v, d));
                if (pass == 1) m->key_cosine[g][i] = (float)(along / norm / sqrt(size));
            }
            for (int32_t e = 0; e < d && pass == 0; e++) size += anchor[e] * anchor[e];
        }
    }
}

static void step(const recording *r, const char *name, const rf_kv_rule *rule, rf_kv_book *book, int32_t position) {
    const unsigned any = rf_kv_needs_step(rule);
    const unsigned known = RF_KV_NEED_SUM | RF_KV_NEED_SQUARES | RF_KV_NEED_PEAK | RF_KV_NEED_KEY_NORM |
                           RF_KV_NEED_VALUE_NORM | RF_KV_NEED_KEY_COSINE | RF_KV_NEED_KV | RF_KV_NEED_HIDDEN |
                           RF_KV_NEED_GATE;
    ck_assert_msg((any & ~known) == 0, "%s: a step needs %u, of which this test has %u alone", name, any, known);
    rf_error err = {0};
    rf_status st = rf_kv_book_append(book, position, &err);
    ck_assert_msg(st == RF_OK, "%s: append of %d: %s", name, position, err.message);
    static measured m; /* a test is a process */
    for (int32_t l = 0; l < r->layers; l++) {
        const unsigned needs = rf_kv_book_step_needs(book, l);
        ck_assert_msg((needs & ~any) == 0, "%s: layer %d needs %u, a step %u alone", name, l, needs, any);
        if (needs != 0) measure(r, book, l, position, &m);
        rf_kv_stats s = {
            .num_keys = rf_kv_book_most(book, l), .stride = MAX_N, .num_queries = 1, .head_dim = r->head_dim};
        if ((needs & RF_KV_NEED_SUM) != 0) s.s1 = m.s1[0];
        if ((needs & RF_KV_NEED_SQUARES) != 0) s.s2 = m.s2[0];
        if ((needs & RF_KV_NEED_PEAK) != 0) s.peak = m.s1[0];
        if ((needs & RF_KV_NEED_KEY_NORM) != 0) s.key_norm = m.key_norm[0];
        if ((needs & RF_KV_NEED_VALUE_NORM) != 0) s.value_norm = m.value_norm[0];
        if ((needs & RF_KV_NEED_KEY_COSINE) != 0) s.key_cosine = m.key_cosine[0];
        if ((needs & RF_KV_NEED_GATE) != 0) s.gate = m.gate[0];
        if ((needs & RF_KV_NEED_KV) != 0) s.k = m.k;
        if ((needs & RF_KV_NEED_KV) != 0) s.v = m.v;
        if ((needs & RF_KV_NEED_HIDDEN) != 0) s.penalty = rf_kv_sentences_penalty(r->sentences, &s.num_positions);
        bool changed = false;
        int32_t before = 0, after = 0;
        for (int32_t g = 0; g < r->kv_heads; g++) before += rf_kv_book_head(book, l, g)->num;
        st = rf_kv_book_step(book, l, any != 0 ? &s : NULL, &changed, &err);
        ck_assert_msg(st == RF_OK, "%s: step at %d, layer %d: %s", name, position, l, err.message);
        for (int32_t g = 0; g < r->kv_heads; g++) after += rf_kv_book_head(book, l, g)->num;
        if (!changed)
            ck_assert_msg(before == after, "%s: slots went at %d, layer %d, and it says not", name, position, l);
    }
    add_hidden(r, position);
}

/* --- comparing --- */

typedef struct {
    char text[2048];
    size_t length;
    int num;
} report;

static void complain(report *out, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void complain(report *out, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(out->text + out->length, sizeof out->text - out->length, format, args);
    va_end(args);
    if (n > 0) out->length += (size_t)n;
    if (out->length >= sizeof out->text) out->length = sizeof out->text - 1;
}

/* Those of a that b has not, both ascending. */
static void list_missing(report *out, const int32_t *a, int32_t num_a, const int32_t *b, int32_t num_b) {
    for (int32_t i = 0; i < num_a; i++) {
        bool found = false;
        for (int32_t j = 0; j < num_b && !found; j++) found = a[i] == b[j];
        if (!found) complain(out, " %d", a[i]);
    }
}

static void compare_list(report *out, int32_t token, int32_t layer, int32_t head, const int32_t *got, int32_t num,
                         const int32_t *want, int32_t num_want) {
    bool same = num == num_want;
    for (int32_t i = 0; i < num_want && same; i++) same = got[i] == want[i];
    if (same) return;
    out->num++;
    complain(out, "\n  behind token %d, layer %d, head %d: %d there, %d wanted; lacks", token, layer, head, num,
             num_want);
    list_missing(out, want, num_want, got, num);
    complain(out, "; has");
    list_missing(out, got, num, want, num_want);
}

static void compare_head(report *out, int32_t token, int32_t layer, int32_t head, const rf_kv_head *got,
                         const int32_t *want, int32_t num_want) {
    compare_list(out, token, layer, head, got->position, got->num, want, num_want);
}

/* Rows of the pool: each in the range of the sequence, none twice. */
static void check_rows(const recording *r, const char *name, const rf_kv_book *book, int64_t first, int64_t num) {
    uint8_t *used = rf_alloc_zero((size_t)num, 1);
    ck_assert_ptr_nonnull(used);
    for (int32_t l = 0; l < r->layers; l++)
        for (int32_t g = 0; g < r->kv_heads; g++) {
            const rf_kv_head *head = rf_kv_book_head(book, l, g);
            ck_assert_int_le(head->num, rf_kv_book_most(book, l));
            for (int32_t i = 0; i < head->num; i++) {
                int64_t row = head->row[i] - first;
                ck_assert_msg(row >= 0 && row < num && !used[row], "%s: row %d of layer %d, head %d", name,
                              head->row[i], l, g);
                used[row] = 1;
            }
        }
    rf_free(used);
}

static void compare_record(report *out, const recording *r, const rf_kv_book *book, const rf_json_value *want,
                           int32_t token) {
    int32_t l = 0, at[MAX_N];
    for (const rf_json_value *layer = rf_json_first(want); layer != NULL; layer = rf_json_next(layer), l++) {
        int32_t g = 0;
        for (const rf_json_value *head = rf_json_first(layer); head != NULL; head = rf_json_next(head), g++) {
            int32_t n = positions(rf_json_string(head), at);
            compare_head(out, token, l, g, rf_kv_book_head(book, l, g), at, n);
        }
        ck_assert_int_eq(g, r->kv_heads);
    }
    ck_assert_int_eq(l, r->layers);
}

/* Joins of weight 0 do nothing and may be there or not. Order does not matter. join_some: those that are there are among the wanted. */
static void compare_joins(report *out, const recording *r, const rf_json_value *c, const rf_kv_book *book) {
    const rf_json_value *heads = rf_json_get(c, "joins");
    const bool keys = heads != NULL && truth(r->doc, c, "join_keys");
    const bool some = heads != NULL && truth(r->doc, c, "join_some");
    for (int32_t l = 0; l < r->layers; l++)
        for (int32_t g = 0; g < r->kv_heads; g++) {
            int32_t num = 0, given = 0, wanted = 0, met = 0;
            const rf_kv_join *joins = rf_kv_book_joins(book, l, g, &num);
            for (int32_t i = 0; i < num; i++) given += joins[i].weight > 0;
            const rf_json_value *list = heads != NULL ? rf_json_at(heads, (size_t)(l * r->kv_heads + g), NULL) : NULL;
            for (const rf_json_value *j = list != NULL ? rf_json_first(list) : NULL; j != NULL;
                 j = rf_json_next(j), wanted++) {
                const int32_t from = (int32_t)rf_json_number(rf_json_at(j, 0, NULL));
                const int32_t to = (int32_t)rf_json_number(rf_json_at(j, 1, NULL));
                const double weight = rf_json_number(rf_json_at(j, 2, NULL));
                const rf_kv_join *found = NULL;
                for (int32_t i = 0; i < num && found == NULL; i++)
                    if (joins[i].from == from) found = &joins[i];
                if (found != NULL && found->to == to && found->keys == keys &&
                    fabs((double)found->weight - weight) <= WEIGHT_BOUND) {
                    met++;
                    continue;
                }
                if (some && found == NULL) continue;
                out->num++;
                complain(out, "\n  layer %d, head %d: join %d -> %d by %.7g;", l, g, from, to, weight);
                if (found == NULL) complain(out, " none");
                if (found != NULL)
                    complain(out, " to %d by %.7g%s", found->to, (double)found->weight,
                             found->keys ? ", keys too" : "");
            }
            if (given != (some ? met : wanted)) {
                out->num++;
                complain(out, "\n  layer %d, head %d: %d joins, %d wanted", l, g, given, wanted);
            }
        }
}

/* --- the tests --- */

START_TEST(a_rule_keeps_what_its_statement_keeps) {
    recording r = recording_open();
    const rf_json_value *c = rf_json_at(member(r.root, "cases"), (size_t)_i, NULL);
    const char *name = rf_json_string(member(c, "name")), *spec = rf_json_string(member(c, "rule"));
    const int32_t budget = integer(c, "budget"), prompt = integer(c, "prompt");
    const bool decodes = truth(r.doc, c, "decodes");
    rf_error err = {0};
    rf_kv_rule rule;
    rf_status st = rf_kv_rule_parse(&rule, spec, &err);
    ck_assert_msg(st == RF_OK, "%s: %s", name, err.message);
    st = rf_kv_rule_check(&rule, &err);
    if (st == RF_ERR_UNSUPPORTED) {
        printf("not implemented, not compared: %s (%s)\n", name, err.message);
        recording_close(&r);
        return;
    }
    ck_assert_msg(st == RF_OK, "%s: %s", name, err.message);

    const int32_t recorded_layers = r.layers;
    r.layers = integer(c, "layers"); /* others only where nothing is measured */
    ck_assert_int_le(r.layers, MAX_LAYERS);
    if (r.layers != recorded_layers) ck_assert_uint_eq(rf_kv_needs_prefill(&rule) | rf_kv_needs_step(&rule), 0);

    const int64_t first_row = 1000;
    const rf_kv_shape shape = {.num_layers = r.layers,
                               .num_q_heads = r.q_heads,
                               .num_kv_heads = r.kv_heads,
                               .head_dim = r.head_dim,
                               .max_prompt = prompt,
                               .max_new = r.num_new,
                               .layer_shares = r.shares,
                               .head_classes = r.retrieval,
                               .head_list = r.listed};
    rf_kv_book *book = NULL;
    st = rf_kv_book_create(&book, &rule, &shape, budget, first_row, &err);
    ck_assert_msg(st == RF_OK, "%s: %s", name, err.message);
    const int64_t num_rows = rf_kv_pool_rows(&rule, &shape, budget);

    report differences = {0};
    const rf_json_value *want = rf_json_first(member(c, "kept")), *behind_prompt = want;
    prefill(&r, c, name, &rule, book);
    if ((rf_kv_needs_step(&rule) & RF_KV_NEED_HIDDEN) != 0)
        rf_assert_ok(rf_kv_sentences_create(&r.sentences, &rule, r.columns, &err), err);
    for (int32_t t = 0; t < prompt; t++) add_hidden(&r, t);
    compare_record(&differences, &r, book, want, prompt - 1);
    compare_joins(&differences, &r, c, book);
    check_rows(&r, name, book, first_row, num_rows);

    int records = 1;
    for (int32_t t = 0; t < (decodes ? r.num_new : GROWN); t++) {
        step(&r, name, &rule, book, prompt + t);
        check_rows(&r, name, book, first_row, num_rows);
        if (!decodes || (t + 1) % r.every != 0) continue;
        want = rf_json_next(want);
        ck_assert_msg(want != NULL, "%s: a record is missing", name);
        compare_record(&differences, &r, book, want, prompt + t);
        records++;
    }
    ck_assert_int_eq(records, decodes ? 1 + r.num_new / r.every : 1);
    ck_assert_msg(rf_json_next(want) == NULL, "%s: more records than steps", name);
    for (int32_t l = 0; !decodes && differences.num == 0 && l < r.layers; l++) /* what comes behind the prompt stays */
        for (int32_t g = 0; g < r.kv_heads; g++) {
            int32_t at[MAX_N];
            int32_t n =
                positions(rf_json_string(rf_json_at(rf_json_at(behind_prompt, (size_t)l, NULL), (size_t)g, NULL)), at);
            for (int32_t t = 0; t < GROWN; t++) at[n++] = prompt + t;
            compare_head(&differences, prompt + GROWN - 1, l, g, rf_kv_book_head(book, l, g), at, n);
        }
    rf_kv_book_destroy(book);
    ck_assert_msg(differences.num == 0, "%s: %d differences%s", name, differences.num, differences.text);
    recording_close(&r);
}
END_TEST

/* --- selections --- */

/* Of one layer. */
typedef struct {
    float k[MAX_KV * MAX_N * MAX_D]; /* [kv_heads][MAX_N][head_dim] */
    rf_kv_keys keys[MAX_KV];         /* num: slots so far */
    int32_t rows[MAX_N];
    int32_t init, local;
    int32_t num_pairs, pairs[MAX_Q * MAX_D / 2]; /* [q_heads][num_pairs] */
    rf_kv_units units[MAX_KV];
    float sum[MAX_Q * MAX_D]; /* queries of the sentence so far, [q_heads][head_dim] */
} reader;

/* Pairs of each query head: agreement over the prompt's last queries, each with the best min(budget, a quarter) of what it sees. */
static void find_pairs(reader *x, const recording *r, const rf_kv_rule *rule, int32_t layer, int32_t budget) {
    const int32_t half = r->head_dim / 2, asked = rule->select_dims / 2, group = r->q_heads / r->kv_heads;
    x->num_pairs = asked < half ? asked : half;
    for (int32_t h = 0; h < r->q_heads; h++) {
        double agreement[MAX_D / 2] = {0};
        for (int32_t i = r->prompt - rule->window; i < r->prompt; i++) {
            float work[2 * MAX_N];
            const int32_t quarter = (i + 1) / 4;
            rf_kv_select_agreement(agreement, row_of(r, r->q, r->q_heads, layer, i, h), &x->keys[h / group], i + 1,
                                   quarter < budget ? quarter : budget, work);
        }
        rf_kv_select_best_pairs(x->pairs + h * x->num_pairs, agreement, half, x->num_pairs);
    }
}

static bool ends_sentence(const recording *r, const rf_kv_rule *rule, int32_t position) {
    const int32_t token = (int32_t)r->tokens[position];
    bool ends = false;
    for (int i = 0; i < RF_KV_DELIMITERS; i++) ends |= rule->delimiters[i] == token;
    return ends;
}

/* Sentences of the prompt, of the tokens that count by the window's attention. */
static void split_prompt(reader *x, const recording *r, const rf_json_value *c, const rf_kv_rule *rule, int32_t layer,
                         int32_t budget) {
    const char *tensor = rf_json_string(member(member(c, "stats"), "s1"));
    const rf_kv_shape shape = {.num_layers = r->layers,
                               .num_q_heads = r->q_heads,
                               .num_kv_heads = r->kv_heads,
                               .head_dim = r->head_dim,
                               .max_prompt = r->prompt,
                               .max_new = r->num_new};
    uint8_t counts[MAX_KV * MAX_N];
    int64_t n = 0;
    float *s1 = read_tensor(r, tensor, &n);
    const rf_kv_stats stats = {.num_keys = r->prompt,
                               .stride = r->prompt,
                               .num_queries = queries_of(tensor, r->prompt),
                               .s1 = s1 + layer * (n / r->layers),
                               .head_dim = r->head_dim};
    rf_error err = {0};
    rf_assert_ok(rf_kv_select_counts(rule, &shape, layer, r->prompt, budget, &stats, counts, &err), err);
    rf_free(s1);
    for (int32_t g = 0; g < r->kv_heads; g++) {
        rf_kv_units_reset(&x->units[g], r->head_dim);
        for (int32_t t = 0; t < r->prompt; t++) {
            rf_assert_ok(rf_kv_units_add(&x->units[g], x->keys[g].k + (int64_t)t * r->head_dim,
                                         counts[g * r->prompt + t] != 0, &err),
                         err);
            if (ends_sentence(r, rule, t)) x->units[g].open = -1;
        }
        x->units[g].open = -1;
    }
}

static void reader_open(reader *x, const recording *r, const rf_json_value *c, const rf_kv_rule *rule, int32_t layer,
                        int32_t budget) {
    memset(x, 0, sizeof *x);
    rf_kv_select_ends(rule, budget, &x->init, &x->local);
    for (int32_t t = 0; t < r->prompt + r->num_new; t++) {
        x->rows[t] = t;
        for (int32_t g = 0; g < r->kv_heads; g++)
            memcpy(x->k + ((int64_t)g * MAX_N + t) * r->head_dim, row_of(r, r->k, r->kv_heads, layer, t, g),
                   (size_t)r->head_dim * sizeof *x->k);
    }
    for (int32_t g = 0; g < r->kv_heads; g++)
        x->keys[g] = (rf_kv_keys){
            .k = x->k + (int64_t)g * MAX_N * r->head_dim, .rows = x->rows, .num = r->prompt, .dim = r->head_dim};
    if (rule->selector == RF_KV_BY_PAIRS) find_pairs(x, r, rule, layer, budget);
    if (rule->selector == RF_KV_BY_SENTENCES) split_prompt(x, r, c, rule, layer, budget);
    rf_error err = {0};
    for (int32_t g = 0; g < r->kv_heads && rule->selector == RF_KV_BY_PAGES; g++)
        rf_assert_ok(rf_kv_units_page(&x->units[g], &x->keys[g], rule->page, &err), err);
}

/* The token at `position` gets its slot in every head; ends: it is the last of its sentence. */
static void reader_add(reader *x, const recording *r, const rf_kv_rule *rule, int32_t layer, int32_t position,
                       bool ends) {
    const float *q = row_of(r, r->q, r->q_heads, layer, position, 0);
    rf_error err = {0};
    for (int32_t i = 0; i < r->q_heads * r->head_dim; i++) x->sum[i] += q[i];
    for (int32_t g = 0; g < r->kv_heads; g++) {
        x->keys[g].num = position + 1;
        if (rule->selector != RF_KV_BY_PAGES && rule->selector != RF_KV_BY_SENTENCES) continue;
        rf_kv_units *u = &x->units[g];
        rf_assert_ok(rf_kv_units_add(u, x->keys[g].k + (int64_t)position * r->head_dim, true, &err), err);
        if (rule->selector == RF_KV_BY_PAGES ? u->count[u->open] == rule->page : ends) u->open = -1;
    }
}

static void reader_close(reader *x, const recording *r) {
    for (int32_t g = 0; g < r->kv_heads; g++) rf_kv_units_free(&x->units[g]);
}

/* What the token at `position` reads of a head, whose own slot is there. Returns how many. */
static int32_t choose(reader *x, const recording *r, const rf_kv_rule *rule, int32_t layer, int32_t position,
                      int32_t head, int32_t budget, int32_t *out) {
    const int32_t n = position + 1, group = r->q_heads / r->kv_heads;
    const float *q = row_of(r, r->q, r->q_heads, layer, position, 0);
    const float scale = 1 / sqrtf((float)r->head_dim);
    float score[MAX_N], work[2 * MAX_N];
    const float *own = q + head * group * r->head_dim;
    const rf_kv_units *u = &x->units[head];
    int32_t order[MAX_Q * MAX_N], cost[MAX_N];
    if (rule->selector == RF_KV_BY_SENTENCES) { /* a multiple of the mean query ranks as the mean does */
        float sum[MAX_D] = {0};
        for (int32_t i = 0; i < group * r->head_dim; i++)
            sum[i % r->head_dim] += x->sum[head * group * r->head_dim + i];
        rf_kv_units_rank(order, u, sum, work);
        return rf_kv_select_units(out, u, order, 1, budget, x->init, x->local, false, cost);
    }
    if (rule->selector == RF_KV_BY_PAGES) {
        for (int32_t h = 0; h < group; h++) rf_kv_units_rank(order + h * u->num_units, u, own + h * r->head_dim, work);
        return rf_kv_select_units(out, u, order, group, budget, x->init, x->local, true, cost);
    }
    if (rule->selector == RF_KV_BY_VOTE)
        rf_kv_select_vote(score, q, x->keys, r->kv_heads, group, scale, x->init, n - x->local, work);
    else
        rf_kv_select_pairs(score, own, &x->keys[head], x->pairs + head * group * x->num_pairs, group, x->num_pairs,
                           scale, x->init, n - x->local, work);
    return rf_kv_select_best(out, score, n, budget, x->init, x->local);
}

START_TEST(a_step_reads_what_its_statement_reads) {
    recording r = recording_open();
    const rf_json_value *c = rf_json_at(member(r.root, "selections"), (size_t)_i, NULL);
    const char *name = rf_json_string(member(c, "name"));
    const int32_t budget = integer(c, "budget");
    rf_error err = {0};
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, rf_json_string(member(c, "rule")), &err), err);
    rf_assert_ok(rf_kv_rule_check(&rule, &err), err);
    ck_assert_int_eq(rule.action, RF_KV_SELECT);
    const rf_json_value *records = member(c, "read");
    ck_assert_int_eq((int)rf_json_count(records), r.num_new / r.every);
    report differences = {0};
    static reader x;
    for (int32_t l = 0; l < r.layers; l++) {
        const rf_json_value *record = rf_json_first(records);
        reader_open(&x, &r, c, &rule, l, budget);
        for (int32_t t = r.prompt; t < r.prompt + r.num_new; t++) {
            const bool recorded = (t - r.prompt + 1) % r.every == 0;
            const bool ends = ends_sentence(&r, &rule, t);
            reader_add(&x, &r, &rule, l, t, ends);
            for (int32_t g = 0; g < r.kv_heads && recorded; g++) {
                int32_t got[MAX_N], want[MAX_N], num = t + 1;
                const rf_json_value *layer = rf_json_at(record, (size_t)l, NULL);
                int32_t num_want = positions(rf_json_string(rf_json_at(layer, (size_t)g, NULL)), want);
                if (num > budget && l >= rule.skip_layers)
                    num = choose(&x, &r, &rule, l, t, g, budget, got);
                else
                    memcpy(got, x.rows, (size_t)num * sizeof *got);
                compare_list(&differences, t, l, g, got, num, want, num_want);
            }
            if (recorded) record = rf_json_next(record);
            if (ends) memset(x.sum, 0, sizeof x.sum);
        }
        reader_close(&x, &r);
    }
    ck_assert_msg(differences.num == 0, "%s: %d differences%s", name, differences.num, differences.text);
    recording_close(&r);
}
END_TEST

/* A method without a case is named in the fixture with a reason, or refused as not implemented. */
START_TEST(every_method_has_a_case) {
    rf_json *doc = open_json();
    const rf_json_value *root = rf_json_root(doc), *without = member(root, "without");
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        const char *method = rf_kv_method_at(i)->name;
        int num = 0;
        for (int k = 0; k < 2; k++)
            for (const rf_json_value *c = rf_json_first(member(root, k == 0 ? "cases" : "selections")); c != NULL;
                 c = rf_json_next(c))
                num += strcmp(rf_json_string(member(c, "method")), method) == 0;
        if (num > 0 || rf_json_has(without, method)) continue;
        rf_kv_rule rule;
        rf_error err = {0};
        rf_assert_ok(rf_kv_rule_parse(&rule, method, &err), err);
        ck_assert_msg(rf_kv_rule_check(&rule, &err) == RF_ERR_UNSUPPORTED, "%s is implemented and has no case", method);
        printf("not implemented, no case: %s\n", err.message);
    }
    rf_json_close(doc);
}
END_TEST

START_TEST(parts_give_what_their_statements_give) {
    rf_json *doc = open_json();
    const rf_json_value *parts = member(rf_json_root(doc), "parts");
    float in[4 * MAX_N], want[4 * MAX_N], got[4 * MAX_N];
    int32_t out[MAX_N];
    int at = 0;
    for (const rf_json_value *p = rf_json_first(member(parts, "pool")); p != NULL; p = rf_json_next(p), at++) {
        const char *kind = rf_json_string(member(p, "kind"));
        int32_t n = numbers(member(p, "in"), in, MAX_N);
        ck_assert_int_eq(numbers(member(p, "out"), want, MAX_N), n);
        rf_kv_pool_scores(got, in, n,
                          kind[0] == 'a'   ? RF_KV_POOL_AVG
                          : kind[0] == 'm' ? RF_KV_POOL_MAX
                                           : RF_KV_POOL_NONE,
                          integer(p, "size"));
        rf_assert_close(got, want, (size_t)n, 1e-6, 1e-6);
    }
    ck_assert_int_gt(at, 0);
    at = 0;
    for (const rf_json_value *p = rf_json_first(member(parts, "top")); p != NULL; p = rf_json_next(p), at++) {
        int32_t n = numbers(member(p, "in"), in, MAX_N), count = integer(p, "count");
        ck_assert_int_eq(numbers(member(p, "out"), want, MAX_N), count);
        rf_kv_top(out, in, n, count);
        for (int32_t i = 0; i < count; i++)
            ck_assert_msg(out[i] == (int32_t)want[i], "top %d: %d is %d", at, i, out[i]);
    }
    ck_assert_int_gt(at, 0);
    at = 0;
    for (const rf_json_value *p = rf_json_first(member(parts, "pyramid")); p != NULL; p = rf_json_next(p), at++) {
        int32_t layers = integer(p, "layers");
        ck_assert_int_eq(numbers(member(p, "out"), want, MAX_N), layers);
        rf_kv_pyramid(out, layers, integer(p, "capacity"), integer(p, "window"), integer(p, "keys"),
                      integer(p, "beta"));
        for (int32_t i = 0; i < layers; i++)
            ck_assert_msg(out[i] == (int32_t)want[i], "pyramid %d: layer %d has %d, not %d", at, i, out[i],
                          (int32_t)want[i]);
    }
    ck_assert_int_gt(at, 0);
    at = 0;
    for (const rf_json_value *p = rf_json_first(member(parts, "flat_heads")); p != NULL; p = rf_json_next(p), at++) {
        int32_t heads = 0, n = 0;
        for (const rf_json_value *s = rf_json_first(member(p, "scores")); s != NULL; s = rf_json_next(s), heads++)
            n = numbers(s, in + heads * MAX_N, MAX_N);
        ck_assert_int_eq(numbers(member(p, "out"), want, MAX_N), heads);
        rf_kv_flat_heads(out, in, heads, n, MAX_N, integer(p, "base"), rf_json_number(member(p, "floor")),
                         truth(doc, p, "normalise"));
        for (int32_t i = 0; i < heads; i++)
            ck_assert_msg(out[i] == (int32_t)want[i], "flat heads %d: head %d has %d, not %d", at, i, out[i],
                          (int32_t)want[i]);
    }
    ck_assert_int_gt(at, 0);
    at = 0;
    for (const rf_json_value *p = rf_json_first(member(parts, "cake")); p != NULL; p = rf_json_next(p), at++) {
        double preference[MAX_LAYERS * 4];
        int32_t n = 0;
        for (const rf_json_value *v = rf_json_first(member(p, "preference")); v != NULL; v = rf_json_next(v))
            preference[n++] = rf_json_number(v);
        ck_assert_int_eq(numbers(member(p, "out"), want, MAX_N), n);
        rf_kv_cake(out, preference, n, integer(p, "total"), integer(p, "most"));
        for (int32_t i = 0; i < n; i++)
            ck_assert_msg(out[i] == (int32_t)want[i], "cake %d: layer %d has %d, not %d", at, i, out[i],
                          (int32_t)want[i]);
    }
    ck_assert_int_gt(at, 0);
    rf_json_close(doc);
}
END_TEST

int main(void) {
    rf_json *doc = NULL;
    rf_error err = {0};
    const rf_json_value *cases = NULL, *selections = NULL;
    if (rf_json_open(&doc, RF_FIXTURE_DIR "/kv-rules.json", &err) == RF_OK) {
        cases = rf_json_get(rf_json_root(doc), "cases");
        selections = rf_json_get(rf_json_root(doc), "selections");
    }
    if (cases == NULL || selections == NULL) {
        fprintf(stderr, "kv-rules.json: %s\n", doc == NULL ? err.message : "no cases");
        return 1;
    }
    const int num_cases = (int)rf_json_count(cases), num_selections = (int)rf_json_count(selections);
    rf_json_close(doc);
    Suite *suite = suite_create("kv rules against their statements");
    TCase *tc = tcase_create("reference");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, every_method_has_a_case);
    tcase_add_test(tc, parts_give_what_their_statements_give);
    tcase_add_loop_test(tc, a_rule_keeps_what_its_statement_keeps, 0, num_cases);
    tcase_add_loop_test(tc, a_step_reads_what_its_statement_reads, 0, num_selections);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
