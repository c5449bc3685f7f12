/* tests/dlm/test_kv_session.c - a cache under a budget: a full budget is the plain cache bit for bit, what stays and what
 * is decoded are those of a plain statement of the rules (below, in double, one row after the other), a batch is its
 * sequences, memory stays, and wrong calls are refused. */
#include <math.h>

#include "caching/kv/sentences.h"
#include "core/memory.h"
#include "core/rng.h"
#include "dlm/decode.h"
#include "dlm/kv_internal.h"
#include "tests/test_util.h"

enum {
    LAYERS = 3,
    HIDDEN = 64,
    VOCAB = 300,
    Q_HEADS = 4,
    KV_HEADS = 2,
    GROUP = 2,
    MOST = 160,
    MAX_DIM = 32,
    DOT = 7,
    ASK = 6
};

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_error err;
} fixture;

static fixture open_model(const char *name) {
    fixture f = {0};
    char dir[512];
    snprintf(dir, sizeof dir, "%s/%s", RF_FIXTURE_DIR, name);
    rf_assert_ok(rf_backend_open(&f.backend, "cpu", 1, &f.err), f.err);
    rf_assert_ok(rf_text_model_load(&f.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    const rf_text_desc *d = &f.model->desc;
    ck_assert(d->num_layers == LAYERS && d->hidden == HIDDEN && d->vocab == VOCAB && d->num_q_heads == Q_HEADS &&
              d->num_kv_heads == KV_HEADS && d->head_dim <= MAX_DIM);
    return f;
}

static void close_model(fixture *f) {
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

static void draw_tokens(int32_t *out, int32_t num, uint32_t key) {
    for (int32_t i = 0; i < num; i++) {
        uint32_t counter[4] = {(uint32_t)i, key, 0, 0}, seed[2] = {11, 0}, words[4];
        rf_philox4x32(counter, seed, words);
        out[i] = (int32_t)(words[0] % 288);
    }
}

static rf_kv_rule rule_of(fixture *f, const char *name) {
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, name, &f->err), f->err);
    return rule;
}

static rf_kv_session_options options_of(const rf_kv_rule *rule, int32_t budget, int batch, int32_t prompt,
                                        int32_t more) {
    rf_kv_session_options o = rf_kv_session_options_default();
    o.rule = *rule;
    o.budget = budget;
    o.batch = batch;
    o.max_prompt = prompt;
    o.max_new = more;
    o.prefill_chunk = 16;
    return o;
}

static rf_kv_session *open_session(fixture *f, const rf_kv_session_options *o, bool on_device) {
    rf_kv_session *s = NULL;
    rf_assert_ok(rf_kv_session_create_as(&s, f->model, o, on_device, &f->err), f->err);
    if (on_device) ck_assert(s->on_device);
    rf_kv_draw draw = {.keep_logits = true};
    rf_assert_ok(rf_kv_session_set_draw(s, &draw, &f->err), f->err);
    return s;
}

/* --- a full budget ------------------------------------------------------------------------------------------------------ */

/* Logits [num][VOCAB] of the plain session: a prompt in chunks of 16, then its greedy tokens one by one. */
static void run_plain(fixture *f, const int32_t *prompt, int32_t len, int32_t num, float *logits, int32_t *out) {
    rf_text_session_options o = rf_text_session_options_default();
    o.capacity = len + num;
    o.max_rows = 16;
    rf_text_session *s = NULL;
    rf_assert_ok(rf_text_session_create(&s, f->model, &o, &f->err), f->err);
    int32_t positions[16], tokens[MOST];
    memcpy(tokens, prompt, (size_t)len * sizeof *tokens);
    int32_t made = 0;
    for (int32_t begin = 0; made < num;) {
        int32_t end = begin < len ? (begin + 16 < len ? begin + 16 : len) : begin + 1, last = end - begin - 1;
        for (int32_t i = begin; i < end; i++) positions[i - begin] = i;
        rf_text_pass p = rf_text_pass_default();
        p.num_rows = end - begin;
        p.rows = positions;
        p.tokens = tokens + begin;
        p.visible_end = &end;
        p.mask = end - begin > 1 ? RF_MASK_CAUSAL : RF_MASK_NONE;
        p.num_head_rows = end >= len;
        p.head_rows = &last;
        p.keep_logits = end >= len;
        rf_assert_ok(rf_text_session_forward(s, &p, &f->err), f->err);
        if (end >= len) {
            rf_token_stats stats;
            rf_assert_ok(rf_text_session_read_logits(s, 0, logits + (int64_t)made * VOCAB, &f->err), f->err);
            rf_assert_ok(rf_text_session_read_stats(s, &stats, &f->err), f->err);
            tokens[end] = out[made++] = stats.id;
        }
        begin = end;
    }
    rf_text_session_destroy(s);
}

static const struct {
    const char *model, *rule;
    bool on_device;
} full_cases[] = {
    {"text-llama", "none", false},    {"text-qwen3", "none", false},    {"text-qwen2", "snapkv", false},
    {"text-llama", "snapkv", false},  {"text-llama", "h2o", false},     {"text-llama", "h2o", true},
    {"text-llama", "tova", true},     {"text-llama", "cake", false},    {"text-llama", "adakv", false},
    {"text-llama", "keydiff", false}, {"text-llama", "obcache", false}, {"text-llama", "epicache", false},
};

START_TEST(a_full_budget_is_the_plain_cache) {
    enum { LEN = 45, NUM = 20 };
    fixture f = open_model(full_cases[_i].model);
    int32_t prompt[LEN], want[NUM];
    static float logits[NUM * VOCAB], got[VOCAB];
    draw_tokens(prompt, LEN, 1);
    run_plain(&f, prompt, LEN, NUM, logits, want);
    rf_kv_rule rule = rule_of(&f, full_cases[_i].rule);
    rf_kv_session_options o = options_of(&rule, 0, 1, LEN + 2, NUM);
    o.external = prompt;
    o.num_external = 5;
    rf_kv_session *s = open_session(&f, &o, full_cases[_i].on_device);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < NUM; i++) {
        rf_token_stats stats;
        rf_assert_ok(rf_kv_session_read_logits(s, 0, got, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_stats(s, &stats, &f.err), f.err);
        ck_assert_msg(memcmp(got, logits + (int64_t)i * VOCAB, sizeof got) == 0, "token %d", i);
        ck_assert_int_eq(stats.id, want[i]);
        if (i + 1 < NUM) rf_assert_ok(rf_kv_session_step(s, &stats.id, &f.err), f.err);
    }
    rf_kv_session_info info = rf_kv_session_get_info(s);
    ck_assert_int_eq(info.kept_slots, info.full_slots);
    ck_assert_int_eq(info.full_slots, (int64_t)(LEN + NUM - 1) * LAYERS * KV_HEADS);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* The same through the decoder, with a temperature: draws are those of the plain decoder. */
START_TEST(a_decoder_with_a_full_budget_draws_the_same) {
    enum { LEN = 30, NUM = 24 };
    fixture f = open_model("text-llama");
    int32_t prompt[LEN], want[NUM];
    draw_tokens(prompt, LEN, 2);
    rf_kv_rule rule = rule_of(&f, "h2o");
    for (int kv = 0; kv < 2; kv++) {
        rf_decode_options o = rf_decode_options_default(f.model);
        o.max_new = NUM;
        o.temperature = 0.8;
        o.seed = 5;
        o.ignore_eos = true;
        o.prefill_chunk = 16;
        o.kv = kv ? &rule : NULL;
        rf_decoder *d = NULL;
        rf_decode_result r;
        rf_assert_ok(rf_decoder_create(&d, f.model, &o, LEN + NUM, &f.err), f.err);
        rf_assert_ok(rf_decoder_run(d, &o, prompt, LEN, NULL, NULL, &r, &f.err), f.err);
        ck_assert_int_eq(r.num_tokens, NUM);
        if (kv == 0) memcpy(want, r.tokens, sizeof want);
        ck_assert(memcmp(want, r.tokens, sizeof want) == 0);
        ck_assert_int_eq(r.num_forwards, kv ? NUM : NUM - 1 + 2);
        ck_assert((rf_decoder_kv(d) != NULL) == (kv == 1));
        ck_assert((r.kv_full_bytes > 0) == (kv == 1));
        rf_decoder_destroy(d);
    }
    close_model(&f);
}
END_TEST

/* --- the plain statement -------------------------------------------------------------------------------------------------- */

typedef enum { SNAP, ALL_SUM, LAST, SINKS, SKIP, BLOCKS } plain_kind;

typedef struct {
    int num;
    int id[MOST];       /* true positions, ascending */
    int place[MOST];    /* DELTA: where the key is turned to */
    double score[MOST]; /* ALL_SUM */
} plain_slots;

typedef struct {
    const rf_text_model *m;
    const rf_kv_rule *rule;
    plain_kind kind;
    int budget, len, dim, shift[LAYERS];
    double k[LAYERS][KV_HEADS][MOST][MAX_DIM], v[LAYERS][KV_HEADS][MOST][MAX_DIM]; /* unturned, by true position */
    plain_slots slots[LAYERS][KV_HEADS];
    double x[MOST][HIDDEN], logits[VOCAB];
    /* SKIP: tokens, their last hidden states, the window's probabilities by position, tokens since slots went */
    int32_t token[MOST];
    double hidden[MOST][HIDDEN], window[LAYERS][KV_HEADS][MOST];
    int since;
} plain;

static void plain_norm(double *y, const double *x, const float *w, double eps) {
    double sum = 0;
    for (int c = 0; c < HIDDEN; c++) sum += x[c] * x[c];
    for (int c = 0; c < HIDDEN; c++) y[c] = x[c] / sqrt(sum / HIDDEN + eps) * (double)w[c];
}

static void plain_linear(double *y, const double *x, const void *w, int n, int k) {
    for (int o = 0; o < n; o++) {
        y[o] = 0;
        for (int c = 0; c < k; c++) y[o] += x[c] * (double)((const float *)w)[o * k + c];
    }
}

static void plain_turn(const plain *p, double *out, const double *in, int position) {
    int half = p->dim / 2;
    for (int c = 0; c < half; c++) {
        double cosine = (double)p->m->rope[(position * half + c) * 2],
               sine = (double)p->m->rope[(position * half + c) * 2 + 1];
        out[c] = in[c] * cosine - in[c + half] * sine;
        out[c + half] = in[c + half] * cosine + in[c] * sine;
    }
}

static double plain_dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int c = 0; c < n; c++) sum += a[c] * b[c];
    return sum;
}

/* Queries of a row [Q_HEADS][dim] unturned; its keys and values are kept by position. */
static void plain_qkv(plain *p, int l, int position, const double *x, double q[Q_HEADS][MAX_DIM]) {
    double h[HIDDEN], qkv[(Q_HEADS + 2 * KV_HEADS) * MAX_DIM];
    plain_norm(h, x, p->m->layers[l].attention_norm, p->m->desc.norm_eps);
    plain_linear(qkv, h, p->m->layers[l].qkv, (Q_HEADS + 2 * KV_HEADS) * p->dim, HIDDEN);
    size_t bytes = (size_t)p->dim * sizeof(double);
    for (int i = 0; i < Q_HEADS; i++) memcpy(q[i], qkv + i * p->dim, bytes);
    for (int i = 0; i < KV_HEADS; i++) memcpy(p->k[l][i][position], qkv + (Q_HEADS + i) * p->dim, bytes);
    for (int i = 0; i < KV_HEADS; i++) memcpy(p->v[l][i][position], qkv + (Q_HEADS + KV_HEADS + i) * p->dim, bytes);
}

/* Probabilities of turned queries over turned keys, and the output of the head. */
static void plain_attend(const plain *p, const double *q, double keys[MOST][MAX_DIM], const double (*v)[MAX_DIM],
                         const int *ids, int num, double *prob, double *out) {
    double top = -INFINITY, sum = 0;
    for (int j = 0; j < num; j++) {
        prob[j] = plain_dot(q, keys[j], p->dim) / sqrt(p->dim);
        top = prob[j] > top ? prob[j] : top;
    }
    for (int j = 0; j < num; j++) sum += prob[j] = exp(prob[j] - top);
    memset(out, 0, (size_t)p->dim * sizeof *out);
    for (int j = 0; j < num; j++) {
        prob[j] /= sum;
        for (int c = 0; c < p->dim; c++) out[c] += prob[j] * v[ids[j]][c];
    }
}

static void plain_rest(plain *p, int l, double *x, const double *attn) {
    const rf_text_layer *w = &p->m->layers[l];
    int ffn = (int)p->m->desc.ffn;
    static double y[HIDDEN], h[HIDDEN], wide[8 * HIDDEN], act[4 * HIDDEN];
    plain_linear(y, attn, w->out, HIDDEN, Q_HEADS * p->dim);
    for (int c = 0; c < HIDDEN; c++) x[c] += y[c];
    plain_norm(h, x, w->ffn_norm, p->m->desc.norm_eps);
    plain_linear(wide, h, w->gate_up, 2 * ffn, HIDDEN);
    for (int c = 0; c < ffn; c++) act[c] = wide[2 * c] / (1 + exp(-wide[2 * c])) * wide[2 * c + 1];
    plain_linear(y, act, w->down, HIDDEN, ffn);
    for (int c = 0; c < HIDDEN; c++) x[c] += y[c];
}

static void plain_head(plain *p, const double *x, int position) {
    double *h = p->hidden[position];
    plain_norm(h, x, p->m->final_norm, p->m->desc.norm_eps);
    plain_linear(p->logits, h, p->m->head, VOCAB, HIDDEN);
}

/* SkipKV: sigma * attention - (1 - sigma) * redundancy over n turned keys. */
static void plain_likeness(const plain *p, double *score, double keys[MOST][MAX_DIM], int n) {
    double mean[MOST] = {0}, sum = 0;
    for (int i = 0; i < n; i++) {
        double cosine[MOST];
        int near = i;
        for (int j = 0; j < n; j++) {
            cosine[j] = plain_dot(keys[i], keys[j], p->dim) /
                        sqrt(plain_dot(keys[i], keys[i], p->dim) * plain_dot(keys[j], keys[j], p->dim));
            if (j != i && cosine[j] > 0.5) near = j;
        }
        cosine[i] = cosine[near] = 0;
        for (int j = 0; j < n; j++) mean[j] += cosine[j] / n;
    }
    for (int j = 0; j < n; j++) sum += exp(mean[j]);
    for (int j = 0; j < n; j++)
        score[j] = p->rule->redundancy * score[j] - (1 - p->rule->redundancy) * exp(mean[j]) / sum;
}

/* Sentences among the first `end` tokens: how much the tokens of each lose. Returns how many do. */
static int plain_said_again(const plain *p, int end, double *penalty) {
    int first[MOST], last[MOST], num = 0, hit = 0;
    double mean[MOST][HIDDEN] = {{0}};
    for (int t = 0, begun = 0; t < end; t++) {
        penalty[t] = 0;
        if (p->token[t] != p->rule->delimiters[0]) continue;
        if (t > begun) {
            for (int i = begun; i <= t; i++)
                for (int c = 0; c < HIDDEN; c++) mean[num][c] += p->hidden[i][c] / (t + 1 - begun);
            first[num] = begun;
            last[num++] = t;
        }
        begun = t + 1;
    }
    for (int a = 0; a < num; a++)
        for (int b = a + 1; b < num; b++) {
            double cosine = plain_dot(mean[a], mean[b], HIDDEN) /
                            sqrt(plain_dot(mean[a], mean[a], HIDDEN) * plain_dot(mean[b], mean[b], HIDDEN));
            for (int t = first[a]; t <= last[a] && cosine >= p->rule->sentence_threshold; t++, hit++)
                penalty[t] = fmax(penalty[t], cosine);
        }
    return hit;
}

static void drop_slot(plain_slots *s, int j) {
    for (s->num--; j < s->num; j++) {
        s->id[j] = s->id[j + 1];
        s->place[j] = s->place[j + 1];
        s->score[j] = s->score[j + 1];
    }
}

/* Slots protected in front and at the end. */
static void plain_protected(const plain *p, int *front, int *back) {
    *front = p->kind == SINKS || p->kind == BLOCKS ? p->rule->sinks : 0;
    *back = p->kind == SNAP      ? p->rule->window
            : p->kind == SKIP    ? p->rule->window
            : p->kind == ALL_SUM ? p->budget / 2
            : p->kind == SINKS   ? p->budget - *front
                                 : 0;
}

static void plain_evict(plain *p, plain_slots *s, const double *score) {
    double values[MOST];
    memcpy(values, score, (size_t)s->num * sizeof *values);
    int front, back;
    plain_protected(p, &front, &back);
    while (s->num > p->budget) {
        int worst = -1;
        for (int j = front; j < s->num - back; j++)
            if (worst < 0 || (p->kind != SINKS && values[j] < values[worst])) worst = j;
        memmove(values + worst, values + worst + 1, (size_t)(s->num - worst - 1) * sizeof *values);
        drop_slot(s, worst);
    }
}

/* Window attention of the slots of a head to what decides, before sentences. */
static void plain_skip(const plain *p, int l, int h, double *score) {
    static double keys[MOST][MAX_DIM];
    const plain_slots *s = &p->slots[l][h];
    int open = s->num - p->rule->window;
    double pooled[MOST];
    for (int j = 0; j < open; j++) {
        pooled[j] = 0;
        for (int o = j - 3; o <= j + 3; o++)
            if (o >= 0 && o < open) pooled[j] = fmax(pooled[j], score[o]);
    }
    memcpy(score, pooled, (size_t)open * sizeof *score);
    for (int j = 0; j < s->num; j++) plain_turn(p, keys[j], p->k[l][h][s->id[j]], s->id[j]);
    plain_likeness(p, score, keys, s->num);
}

static void plain_skip_step(plain *p, int l, int h, int position, double prob[Q_HEADS][MOST]) {
    plain_slots *s = &p->slots[l][h];
    double score[MOST], penalty[MOST];
    int window = p->rule->window, left = p->rule->every - p->since;
    for (int j = 0; j < s->num; j++) {
        double most = 0, *sum = &p->window[l][h][s->id[j]];
        for (int g = h * GROUP; g < (h + 1) * GROUP; g++) most = fmax(most, prob[g][j]);
        *sum = (left == window - 1 || s->id[j] == position ? 0 : *sum) + most / window;
        score[j] = *sum;
    }
    if (left > 0 || s->num <= p->budget) return;
    plain_skip(p, l, h, score);
    plain_said_again(p, position, penalty);
    for (int j = 0; j < s->num && s->id[j] < position; j++) score[j] -= p->rule->sentence_penalty * penalty[s->id[j]];
    plain_evict(p, s, score);
}

static void plain_prompt(plain *p, const int32_t *tokens) {
    static double q[MOST][Q_HEADS][MAX_DIM], keys[MOST][MAX_DIM], prob[MOST], sums[Q_HEADS][MOST],
        attn[MOST][Q_HEADS * MAX_DIM];
    int ids[MOST], n = p->len; /* positions of the rows that a layer receives */
    for (int i = 0; i < p->len; i++) {
        ids[i] = i;
        for (int c = 0; c < HIDDEN; c++) p->x[i][c] = (double)((const float *)p->m->embedding)[tokens[i] * HIDDEN + c];
    }
    for (int l = 0; l < LAYERS; l++) {
        memset(sums, 0, sizeof sums);
        for (int i = 0; i < n; i++) plain_qkv(p, l, ids[i], p->x[i], q[i]);
        for (int h = 0; h < Q_HEADS; h++) {
            for (int i = 0; i < n; i++) plain_turn(p, keys[i], p->k[l][h / GROUP][ids[i]], ids[i]);
            for (int i = 0; i < n; i++) {
                double turned[MAX_DIM];
                plain_turn(p, turned, q[i][h], ids[i]);
                plain_attend(p, turned, keys, (const double(*)[MAX_DIM])p->v[l][h / GROUP], ids, i + 1, prob,
                             attn[i] + h * p->dim);
                int first = p->kind == SNAP || p->kind == SKIP ? n - p->rule->window : p->kind == LAST ? n - 1 : 0;
                for (int j = 0; i >= first && j <= i; j++) sums[h][j] += prob[j];
            }
        }
        for (int i = 0; i < n; i++) plain_rest(p, l, p->x[i], attn[i]);
        double total[MOST] = {0}, best[MOST];
        int most = n < p->budget ? n : p->budget;
        p->shift[l] = most - n;
        for (int h = 0; h < KV_HEADS; h++) {
            plain_slots *s = &p->slots[l][h];
            double score[MOST] = {0};
            int from = p->kind == LAST ? 0 : h * GROUP, to = p->kind == LAST ? Q_HEADS : from + GROUP;
            for (int j = 0; j < n && p->kind != SKIP; j++)
                for (int g = from; g < to; g++) {
                    int pool = p->kind == SNAP ? 2 : 0, end = p->kind == SNAP ? n - p->rule->window : n;
                    for (int o = j - pool; o <= j + pool; o++)
                        if (o >= 0 && o < end && j < end) score[j] += sums[g][o] / (2 * pool + 1) / (to - from);
                }
            s->num = n;
            for (int j = 0; j < n; j++) s->id[j] = ids[j];
            memcpy(s->score, score, sizeof score);
            for (int j = 0; j < n && p->kind == SKIP; j++)
                for (int g = from; g < to; g++) score[j] = fmax(score[j], sums[g][j] / p->rule->window);
            if (p->kind == SKIP) plain_skip(p, l, h, score);
            for (int j = 0; j < n; j++) total[j] += score[j];
            plain_evict(p, s, score);
            for (int j = 0; j < s->num; j++) s->place[j] = most - s->num + j;
        }
        if (!rf_kv_rule_thins(p->rule) || l != p->rule->tsp_layer) continue;
        /* FastKV: the best by both heads' sum and the window go on */
        memcpy(best, total, sizeof best);
        int open = n - p->rule->window, count = (int)(p->rule->tsp_share * n), next = 0;
        for (int j = 0; j < open; j++) {
            int before = 0;
            for (int o = 0; o < open; o++) before += best[o] > best[j] || (best[o] == best[j] && o < j);
            total[j] = before < count;
        }
        for (int j = 0; j < n; j++) {
            if (j < open && total[j] == 0) continue;
            ids[next] = ids[j];
            memmove(p->x[next++], p->x[j], sizeof p->x[j]);
        }
        n = next;
    }
    for (int i = 0; i < p->len; i++) p->token[i] = tokens[i];
    for (int i = p->kind == SKIP ? 0 : n - 1; i < n; i++) plain_head(p, p->x[i], ids[i]);
}

/* One row of a layer: its keys join `extra` positions behind each head's slots, of which it sees all; probabilities by query head. */
static void plain_row(plain *p, int l, double *x, int position, int extra, double prob[Q_HEADS][MOST]) {
    static double keys[MOST][MAX_DIM];
    double q[Q_HEADS][MAX_DIM], attn[Q_HEADS * MAX_DIM];
    plain_qkv(p, l, position, x, q);
    for (int h = 0; h < Q_HEADS; h++) {
        const plain_slots *s = &p->slots[l][h / GROUP];
        int ids[MOST], n = s->num;
        double turned[MAX_DIM];
        memcpy(ids, s->id, (size_t)n * sizeof *ids);
        for (int i = 0; i < extra; i++) ids[n++] = position + 1 - extra + i;
        for (int j = 0; j < n; j++) plain_turn(p, keys[j], p->k[l][h / GROUP][ids[j]], ids[j]);
        plain_turn(p, turned, q[h], position);
        plain_attend(p, turned, keys, (const double(*)[MAX_DIM])p->v[l][h / GROUP], ids, n, prob[h], attn + h * p->dim);
    }
    plain_rest(p, l, x, attn);
}

/* EpiCache: behind each block, tokens `ask` say what stays. KeyDiff in blocks: the keys do. */
static void plain_blocks(plain *p, const int32_t *tokens, const int32_t *ask) {
    static double asked[MOST][ASK][HIDDEN], prob[Q_HEADS][MOST];
    const float *table = p->m->embedding;
    int size = p->rule->block;
    for (int i = 0; i < p->len; i++)
        for (int c = 0; c < HIDDEN; c++) p->x[i][c] = (double)table[tokens[i] * HIDDEN + c];
    for (int b = 0; b * size < p->len; b++)
        for (int i = 0; i < ASK; i++)
            for (int c = 0; c < HIDDEN; c++) asked[b][i][c] = (double)table[ask[i] * HIDDEN + c];
    for (int l = 0; l < LAYERS; l++) {
        for (int b = 0; b * size < p->len; b++) {
            int begin = b * size, rows = p->len - begin < size ? p->len - begin : size;
            double score[KV_HEADS][MOST] = {{0}};
            for (int i = 0; i < rows; i++) plain_row(p, l, p->x[begin + i], begin + i, i + 1, prob);
            for (int i = 0; i < ASK && p->rule->score == RF_KV_SCORE_ATTENTION; i++) {
                plain_row(p, l, asked[b][i], begin + rows + i, rows + i + 1, prob);
                for (int h = 0; h < Q_HEADS; h++)
                    for (int j = 0; j < p->slots[l][h / GROUP].num + rows; j++)
                        score[h / GROUP][j] = fmax(score[h / GROUP][j], prob[h][j]);
            }
            for (int h = 0; h < KV_HEADS; h++) {
                plain_slots *s = &p->slots[l][h];
                for (int i = 0; i < rows; i++) s->id[s->num++] = begin + i;
                double mean[MAX_DIM] = {0};
                for (int pass = 0; pass < 2 && p->rule->score == RF_KV_SCORE_KEYDIFF; pass++)
                    for (int j = 0; j < s->num; j++) {
                        double key[MAX_DIM];
                        plain_turn(p, key, p->k[l][h][s->id[j]], s->id[j]);
                        double norm = sqrt(plain_dot(key, key, p->dim));
                        for (int c = 0; c < p->dim && pass == 0; c++) mean[c] += key[c] / norm;
                        if (pass) score[h][j] = -plain_dot(key, mean, p->dim) / norm;
                    }
                plain_evict(p, s, score[h]);
            }
        }
    }
    plain_head(p, p->x[p->len - 1], p->len - 1);
}

static void plain_step(plain *p, int32_t token, int position) {
    static double keys[MOST][MAX_DIM], prob[Q_HEADS][MOST];
    double x[HIDDEN], q[Q_HEADS][MAX_DIM], attn[Q_HEADS * MAX_DIM];
    for (int c = 0; c < HIDDEN; c++) x[c] = (double)((const float *)p->m->embedding)[token * HIDDEN + c];
    p->token[position] = token;
    p->since++;
    for (int l = 0; l < LAYERS; l++) {
        plain_qkv(p, l, position, x, q);
        for (int h = 0; h < KV_HEADS; h++) {
            plain_slots *s = &p->slots[l][h];
            s->id[s->num] = position;
            s->place[s->num] = position + p->shift[l];
            s->score[s->num++] = 0;
            int at = position;
            for (int j = 0; j < s->num; j++) {
                int place = p->rule->position == RF_KV_POSITION_CACHE   ? j
                            : p->rule->position == RF_KV_POSITION_DELTA ? s->place[j]
                                                                        : s->id[j];
                plain_turn(p, keys[j], p->k[l][h][s->id[j]], place);
                at = place;
            }
            for (int g = 0; g < GROUP; g++) {
                int head = h * GROUP + g;
                double turned[MAX_DIM];
                plain_turn(p, turned, q[head], at);
                plain_attend(p, turned, keys, (const double(*)[MAX_DIM])p->v[l][h], s->id, s->num, prob[head],
                             attn + head * p->dim);
            }
        }
        for (int h = 0; h < KV_HEADS && p->kind == SKIP; h++) plain_skip_step(p, l, h, position, prob);
        for (int h = 0; h < KV_HEADS && p->kind != SNAP && p->kind != SKIP && p->kind != BLOCKS; h++) {
            plain_slots *s = &p->slots[l][h];
            double score[MOST] = {0};
            int from = p->kind == LAST ? 0 : h * GROUP, to = p->kind == LAST ? Q_HEADS : from + GROUP;
            for (int j = 0; j < s->num; j++) {
                for (int g = from; g < to; g++) score[j] += prob[g][j] / (to - from);
                if (p->kind == ALL_SUM) score[j] = s->score[j] += score[j];
            }
            plain_evict(p, s, score);
        }
        plain_rest(p, l, x, attn);
    }
    if (p->since >= p->rule->every) p->since = 0;
    plain_head(p, x, position);
}

static const struct {
    plain_kind kind;
    const char *name;
    rf_kv_position position;
    bool on_device;
} plain_cases[] = {
    {SNAP, "snapkv", RF_KV_POSITION_ORIGINAL, false},
    {SNAP, "snapkv", RF_KV_POSITION_CACHE, false},
    {SNAP, "snapkv", RF_KV_POSITION_DELTA, false},
    {ALL_SUM, "h2o", RF_KV_POSITION_ORIGINAL, false},
    {ALL_SUM, "h2o", RF_KV_POSITION_ORIGINAL, true},
    {LAST, "tova", RF_KV_POSITION_ORIGINAL, false},
    {LAST, "tova", RF_KV_POSITION_ORIGINAL, true},
    {SINKS, "streaming", RF_KV_POSITION_CACHE, false},
    {SINKS, "streaming", RF_KV_POSITION_ORIGINAL, false},
    {SINKS, "streaming", RF_KV_POSITION_ORIGINAL, true},
    {SINKS, "streaming", RF_KV_POSITION_CACHE, true},
    {BLOCKS, "epicache:block=20,sinks=2", RF_KV_POSITION_ORIGINAL, false},
    {BLOCKS, "epicache:block=7,sinks=0", RF_KV_POSITION_ORIGINAL, false},
    {BLOCKS, "epicache:block=64", RF_KV_POSITION_ORIGINAL, false}, /* one */
    {BLOCKS, "keydiff:block=9", RF_KV_POSITION_ORIGINAL, false},
    {SKIP, "skipkv", RF_KV_POSITION_ORIGINAL, false},
    {SKIP, "skipkv:redundancy=0.9", RF_KV_POSITION_ORIGINAL, false},
    {SNAP, "fastkv:tsp_layer=0,tsp_share=0.6", RF_KV_POSITION_ORIGINAL, false},
    {SNAP, "fastkv:tsp_layer=1,tsp_share=0.5", RF_KV_POSITION_ORIGINAL, false},
    {SNAP, "fastkv:tsp_layer=0,tsp_share=0.2", RF_KV_POSITION_ORIGINAL, false}, /* all that goes on stays */
};

static rf_kv_rule plain_rule(fixture *f, int i) {
    rf_kv_rule r = rule_of(f, plain_cases[i].name);
    r.position = plain_cases[i].position;
    if (plain_cases[i].kind == SNAP) {
        r.window = 8;
        r.pool = RF_KV_POOL_AVG;
        r.pool_size = 5;
        r.pool_after_group = false;
        r.group = RF_KV_OVER_MEAN;
        r.reduce = RF_KV_REDUCE_SUM;
        r.sinks = r.recents = 0;
    } else if (plain_cases[i].kind == ALL_SUM) {
        r.reduce = RF_KV_REDUCE_SUM;
        r.sinks = 0;
        r.recents = -1;
        r.last = false;
    } else if (plain_cases[i].kind == LAST) {
        r.sinks = r.recents = 0;
        r.last = false;
    } else if (plain_cases[i].kind == BLOCKS) {
        return r;
    } else if (plain_cases[i].kind == SKIP) {
        r.window = 4;
        r.every = 6;
        r.sentence_threshold = 0.6;
        r.delimiters[0] = DOT;
        r.delimiters[1] = -1;
    } else {
        r.sinks = 4;
    }
    return r;
}

START_TEST(what_stays_and_what_follows_are_those_of_the_rule) {
    enum { LEN = 50, NUM = 25, BUDGET = 24 };
    fixture f = open_model("text-llama");
    rf_kv_rule rule = plain_rule(&f, _i);
    int32_t prompt[LEN], got[LEN + NUM], num, ask[ASK];
    draw_tokens(prompt, LEN, 3);
    draw_tokens(ask, ASK, 31);
    for (int32_t i = 0; i < LEN && plain_cases[_i].kind == SKIP; i++)
        if (i % 7 == 2 || i % 7 == 5) prompt[i] = DOT;
    plain *p = rf_alloc_zero(1, sizeof *p);
    ck_assert_ptr_nonnull(p);
    p->m = f.model;
    p->rule = &rule;
    p->kind = plain_cases[_i].kind;
    p->budget = BUDGET;
    p->len = LEN;
    p->dim = (int)f.model->desc.head_dim;
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, LEN, NUM);
    o.external = ask;
    o.num_external = ASK;
    rf_kv_session *s = open_session(&f, &o, plain_cases[_i].on_device);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    if (p->kind == BLOCKS)
        plain_blocks(p, prompt, ask);
    else
        plain_prompt(p, prompt);
    for (int32_t i = 0; i < NUM; i++) {
        for (int l = 0; l < LAYERS; l++)
            for (int h = 0; h < KV_HEADS; h++) {
                const plain_slots *want = &p->slots[l][h];
                rf_assert_ok(rf_kv_session_read_positions(s, 0, l, h, got, &num, &f.err), f.err);
                ck_assert_int_eq(num, want->num);
                for (int j = 0; j < num; j++)
                    ck_assert_msg(got[j] == want->id[j], "token %d, layer %d, head %d, slot %d: %d, expected %d", i, l,
                                  h, j, got[j], want->id[j]);
            }
        float logits[VOCAB], want[VOCAB];
        rf_token_stats stats;
        rf_assert_ok(rf_kv_session_read_logits(s, 0, logits, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_stats(s, &stats, &f.err), f.err);
        for (int v = 0; v < VOCAB; v++) want[v] = (float)p->logits[v];
        rf_assert_close(logits, want, VOCAB, 1e-3, 1e-5);
        if (plain_cases[_i].kind == SKIP && i % 4 == 1) stats.id = DOT;
        rf_assert_ok(rf_kv_session_step(s, &stats.id, &f.err), f.err);
        plain_step(p, stats.id, LEN + i);
    }
    if (plain_cases[_i].kind == SKIP) { /* some sentences, and not all */
        double penalty[MOST];
        int hit = plain_said_again(p, LEN + NUM, penalty), none = 0;
        for (int t = 0; t < LEN + NUM; t++) none += penalty[t] == 0;
        ck_assert_msg(hit > 0 && none > 8, "%d tokens are said again, %d are not", hit, none);
        const float *got_penalty = rf_kv_sentences_penalty(s->sequences[0].sentences, &num);
        ck_assert_int_eq(num, LEN + NUM);
        for (int t = 0; t < num; t++)
            ck_assert_msg(fabs((double)got_penalty[t] - penalty[t]) <= 1e-4, "token %d: %g, expected %g", t,
                          (double)got_penalty[t], penalty[t]);
    }
    rf_kv_session_destroy(s);
    rf_free(p);
    close_model(&f);
}
END_TEST

/* --- batches ---------------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    bool on_device;
} batch_cases[] = {{"snapkv", false},
                   {"h2o", false},
                   {"h2o", true},
                   {"adakv", false},
                   {"streaming", false},
                   {"streaming", true},
                   {"cake", false},
                   {"skipkv:window=4,every=5,delimiter1=7,sentence_threshold=0.3", false},
                   {"fastkv:tsp_share=0.9", false},
                   {"epicache:block=16", false},
                   {"keydiff:block=11", false},
                   {"fastkv", false}};

/* Prompts of three lengths, each with its own budget; the second rests now and then. */
START_TEST(a_batch_is_its_sequences) {
    enum { BATCH = 3, LEN = 60, NUM = 16, BUDGET = 40 };
    static const int32_t lens[BATCH] = {41, 60, 27}, budgets[BATCH] = {36, 40, 38};
    fixture f = open_model("text-llama");
    rf_kv_rule rule = rule_of(&f, batch_cases[_i].name);
    int32_t prompts[BATCH][LEN], next[BATCH], got[LEN + NUM], want[LEN + NUM], num, want_num, ask[ASK];
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, LEN, NUM);
    draw_tokens(ask, ASK, 32);
    o.external = ask;
    o.num_external = ASK;
    rf_kv_session *single[BATCH];
    o.batch = BATCH;
    rf_kv_session *all = open_session(&f, &o, batch_cases[_i].on_device);
    o.batch = 1;
    rf_token_stats stats[BATCH], one;
    for (int b = 0; b < BATCH; b++) {
        draw_tokens(prompts[b], lens[b], (uint32_t)(10 + b));
        for (int i = 4; i < lens[b]; i += 4) prompts[b][i] = DOT;
        single[b] = open_session(&f, &o, batch_cases[_i].on_device);
        rf_assert_ok(rf_kv_session_prefill(single[b], 0, prompts[b], lens[b], 0, budgets[b], 0.0, &f.err), f.err);
        rf_assert_ok(rf_kv_session_prefill(all, b, prompts[b], lens[b], 0, budgets[b], 0.0, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_stats(all, &one, &f.err), f.err);
        next[b] = one.id;
    }
    for (int i = 0; i < NUM; i++) {
        int32_t tokens[BATCH];
        for (int b = 0; b < BATCH; b++) tokens[b] = b == 1 && i % 5 == 2 ? -1 : next[b];
        rf_assert_ok(rf_kv_session_step(all, tokens, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_stats(all, stats, &f.err), f.err);
        for (int b = 0; b < BATCH; b++) {
            float logits[2][VOCAB];
            if (tokens[b] == -1) continue;
            rf_assert_ok(rf_kv_session_step(single[b], &tokens[b], &f.err), f.err);
            rf_assert_ok(rf_kv_session_read_logits(single[b], 0, logits[0], &f.err), f.err);
            rf_assert_ok(rf_kv_session_read_logits(all, b, logits[1], &f.err), f.err);
            ck_assert_msg(memcmp(logits[0], logits[1], sizeof *logits) == 0, "token %d of sequence %d", i, b);
            next[b] = stats[b].id;
        }
    }
    for (int b = 0; b < BATCH; b++)
        for (int l = 0; l < LAYERS; l++)
            for (int h = 0; h < KV_HEADS; h++) {
                rf_assert_ok(rf_kv_session_read_positions(all, b, l, h, got, &num, &f.err), f.err);
                rf_assert_ok(rf_kv_session_read_positions(single[b], 0, l, h, want, &want_num, &f.err), f.err);
                ck_assert_int_eq(num, want_num);
                ck_assert(memcmp(got, want, (size_t)num * sizeof *got) == 0);
            }
    for (int b = 0; b < BATCH; b++) rf_kv_session_destroy(single[b]);
    rf_kv_session_destroy(all);
    close_model(&f);
}
END_TEST

/* --- the next layer meanwhile ------------------------------------------------------------------------------------------- */

static const struct {
    const char *model, *rule;
    bool on_device, overlaps;
} overlap_cases[] = {
    {"text-llama", "none", false, true},
    {"text-qwen3", "snapkv", false, true},
    {"text-llama", "snapkv:window=8", false, true},
    {"text-llama", "snapkv:window=8,position=delta", false, true},
    {"text-llama", "pyramidkv:window=4", false, true},
    {"text-llama", "adakv:window=8", false, true},
    {"text-llama", "obcache:window=8", false, true},
    {"text-llama", "cake:window=8", false, true},
    {"text-llama", "knorm:alloc=flat-all", false, true},
    {"text-llama", "h2o", false, true},
    {"text-llama", "h2o", true, true},
    {"text-llama", "a2sf", true, true},
    {"text-llama", "tova", false, true},
    {"text-llama", "observed", false, true},
    {"text-llama", "streaming", false, true},
    {"text-llama", "streaming", true, true},
    {"text-llama", "lacache:ladder_span=2", false, true},
    {"text-llama", "treekv:window=8", false, true},
    {"text-llama", "lazy:window=8,every=4", false, true},
    {"text-llama", "knorm", false, true},
    {"text-llama", "keydiff", false, true},
    {"text-llama", "random", false, true},
    {"text-llama", "caote:window=8", false, false},
    {"text-llama", "expected:future=8", false, false},
    {"text-llama", "criticalkv:window=8", false, false},
    {"text-llama", "merge:window=8", false, false},
    {"text-llama", "dapq:pseudo=8", false, false},
    {"text-llama", "laq:drafts=3,window=4", false, false},
    {"text-llama", "fastkv:window=8", false, false},
    {"text-llama", "skipkv:window=8,delimiter1=3", false, false},
};

/* Prompts one after the other, tokens behind each: the choices and bits of one layer at a time. */
START_TEST(layers_chosen_behind_the_next_are_the_same) {
    enum { LEN = 75, NUM = 6, BUDGET = 24 };
    fixture f = open_model(overlap_cases[_i].model);
    rf_kv_rule rule = rule_of(&f, overlap_cases[_i].rule);
    rf_kv_session_options o = options_of(&rule, BUDGET, 2, LEN, NUM);
    rf_kv_session *s[2] = {NULL};
    rf_kv_draw draw = {.keep_logits = true};
    for (int i = 0; i < 2; i++) {
        rf_assert_ok(rf_kv_session_create_with(&s[i], f.model, &o, overlap_cases[_i].on_device, i == 1, &f.err), f.err);
        rf_assert_ok(rf_kv_session_set_draw(s[i], &draw, &f.err), f.err);
        ck_assert_int_eq(s[i]->on_device, overlap_cases[_i].on_device);
        ck_assert_int_eq(s[i]->overlaps, i == 1 && overlap_cases[_i].overlaps);
    }
    static float logits[2][VOCAB];
    int32_t prompt[LEN], kept[2][LEN + NUM], num[2];
    int wrong = 0, compared = 0;
    for (int32_t round = 0; round < 3; round++) {
        int32_t len = round == 0 ? LEN : round == 1 ? BUDGET - 3 : LEN - 17, sequence = round % 2;
        draw_tokens(prompt, len, 60 + (uint32_t)round);
        for (int i = 0; i < 2; i++)
            rf_assert_ok(rf_kv_session_prefill(s[i], sequence, prompt, len, round == 2 ? len - 2 : 0, 0, 0.0, &f.err),
                         f.err);
        for (int32_t step = 0; step < 4; step++) {
            int32_t tokens[2] = {-1, -1};
            tokens[sequence] = 5 + step;
            for (int i = 0; i < 2; i++)
                rf_assert_ok(rf_kv_session_read_logits(s[i], sequence, logits[i], &f.err), f.err);
            wrong += memcmp(logits[0], logits[1], sizeof logits[0]) != 0;
            for (int l = 0; l < LAYERS; l++) {
                for (int h = 0; h < KV_HEADS; h++) {
                    for (int i = 0; i < 2; i++)
                        rf_assert_ok(rf_kv_session_read_positions(s[i], sequence, l, h, kept[i], &num[i], &f.err),
                                     f.err);
                    compared += num[0];
                    wrong += num[0] != num[1] || memcmp(kept[0], kept[1], (size_t)num[0] * sizeof kept[0][0]) != 0;
                }
            }
            if (step == 3) break;
            for (int i = 0; i < 2; i++) {
                rf_assert_ok(rf_kv_session_step(s[i], tokens, &f.err), f.err);
                rf_token_stats stats[2];
                rf_assert_ok(rf_kv_session_read_stats(s[i], stats, &f.err), f.err);
            }
        }
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_gt(compared, 3 * 4 * LAYERS * KV_HEADS * 8);
    rf_kv_session_info info = rf_kv_session_get_info(s[1]);
    ck_assert(info.score_wait_ms >= 0 && info.prefill_ms > 0);
    for (int i = 0; i < 2; i++) rf_kv_session_destroy(s[i]);
    close_model(&f);
}
END_TEST

/* --- FastKV ----------------------------------------------------------------------------------------------------------------- */

/* Where all tokens go on it is SnapKV with its parts; else fewer rows and keys pass the layers behind. */
START_TEST(fewer_tokens_pass_later_layers) {
    enum { LEN = 60, NUM = 10, BUDGET = 20 };
    static const char *const specs[] = {"snapkv:window=8,pool=max,pool_size=7,group=sum", "fastkv:tsp_share=1",
                                        "fastkv:tsp_share=0.3"};
    fixture f = open_model("text-llama");
    int32_t prompt[LEN], got[3][LAYERS][KV_HEADS][LEN + NUM], num[3][LAYERS][KV_HEADS];
    static float logits[3][NUM][VOCAB];
    int64_t rows[3], keys[3];
    draw_tokens(prompt, LEN, 21);
    for (int k = 0; k < 3; k++) {
        rf_kv_rule rule = rule_of(&f, specs[k]);
        rf_kv_session_options o = options_of(&rule, BUDGET, 1, LEN, NUM);
        rf_kv_session *s = open_session(&f, &o, false);
        rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
        rows[k] = s->row_layers;
        keys[k] = s->key_layers / KV_HEADS;
        for (int32_t i = 0; i < NUM; i++) {
            rf_assert_ok(rf_kv_session_read_logits(s, 0, logits[k][i], &f.err), f.err);
            if (i + 1 < NUM) rf_assert_ok(rf_kv_session_step(s, prompt + i, &f.err), f.err);
        }
        for (int l = 0; l < LAYERS; l++)
            for (int h = 0; h < KV_HEADS; h++)
                rf_assert_ok(rf_kv_session_read_positions(s, 0, l, h, got[k][l][h], &num[k][l][h], &f.err), f.err);
        /* within the budget nothing is left out */
        rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, BUDGET, 0, 0, 0.0, &f.err), f.err);
        rf_kv_session_info whole = rf_kv_session_get_info(s);
        ck_assert_int_eq(whole.kept_slots, whole.full_slots);
        rf_kv_session_destroy(s);
    }
    ck_assert(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
    ck_assert(memcmp(num[0], num[1], sizeof num[0]) == 0);
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < KV_HEADS; h++)
            ck_assert(memcmp(got[0][l][h], got[1][l][h], (size_t)num[0][l][h] * sizeof(int32_t)) == 0);
    ck_assert(memcmp(logits[0], logits[2], sizeof logits[0]) != 0);
    /* one layer of 60 rows, two of 18 + 8 */
    enum { MORE = 18 + 8 };
    ck_assert_int_eq(rows[0], LAYERS * LEN);
    ck_assert_int_eq(rows[2], LEN + (LAYERS - 1) * MORE);
    /* of the last layer, chunks of 16 without a row of the window are not read */
    int64_t all = LEN * (LEN + 1) / 2, few = MORE * (MORE + 1) / 2;
    ck_assert_int_eq(keys[0], LAYERS * all - 48 * 49 / 2);
    ck_assert_int_eq(keys[2], all + (LAYERS - 1) * few - 16 * 17 / 2);
    rf_kv_rule rule = rule_of(&f, "fastkv:tsp_layer=3");
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, LEN, NUM);
    rf_kv_session *s = NULL;
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "tsp_layer=3");
    close_model(&f);
}
END_TEST

/* --- the rest ---------------------------------------------------------------------------------------------------------------- */

/* Question-agnostic: what stays of the context does not depend on what follows, and the rest follows whole. */
START_TEST(a_context_is_compressed_as_if_nothing_followed) {
    enum { LEN = 60, CONTEXT = 44, BUDGET = 20 };
    fixture f = open_model("text-llama");
    rf_kv_rule rule = rule_of(&f, "snapkv");
    rule.window = 8;
    int32_t prompt[LEN], got[LEN + 8], want[LEN + 8], num, want_num;
    draw_tokens(prompt, LEN, 4);
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, CONTEXT, LEN);
    rf_kv_session *s = open_session(&f, &o, false), *context = open_session(&f, &o, false);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, CONTEXT, 0, 0.0, &f.err), f.err);
    rf_assert_ok(rf_kv_session_prefill(context, 0, prompt, CONTEXT, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = CONTEXT; i < LEN; i++) rf_assert_ok(rf_kv_session_step(context, prompt + i, &f.err), f.err);
    float logits[2][VOCAB];
    rf_assert_ok(rf_kv_session_read_logits(s, 0, logits[0], &f.err), f.err);
    rf_assert_ok(rf_kv_session_read_logits(context, 0, logits[1], &f.err), f.err);
    ck_assert(memcmp(logits[0], logits[1], sizeof *logits) == 0);
    for (int l = 0; l < LAYERS; l++) {
        rf_assert_ok(rf_kv_session_read_positions(s, 0, l, 1, got, &num, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_positions(context, 0, l, 1, want, &want_num, &f.err), f.err);
        ck_assert_int_eq(num, BUDGET + LEN - CONTEXT);
        ck_assert(num == want_num && memcmp(got, want, (size_t)num * sizeof *got) == 0);
        for (int32_t i = 0; i < LEN - CONTEXT; i++) ck_assert_int_eq(got[BUDGET + i], CONTEXT + i);
    }
    rf_kv_session_destroy(s);
    rf_kv_session_destroy(context);
    close_model(&f);
}
END_TEST

/* Far past the model's 512 positions and the pool's rows. */
START_TEST(memory_stays_over_a_long_generation) {
    enum { LEN = 40, NUM = 3000, BUDGET = 32 };
    fixture f = open_model("text-llama");
    rf_kv_rule rule = rule_of(&f, "streaming");
    rule.position = RF_KV_POSITION_CACHE;
    int32_t prompt[LEN], got[LEN + 8], num;
    draw_tokens(prompt, LEN, 5);
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, LEN, NUM);
    rf_kv_session *s = open_session(&f, &o, _i == 1);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    rf_kv_session_info first = rf_kv_session_get_info(s), info;
    uint64_t live = 0;
    for (int i = 0; i < NUM; i++) {
        int32_t token = prompt[i % LEN];
        if (i == 10) live = rf_memory_get_counts().num_live;
        rf_assert_ok(rf_kv_session_step(s, &token, &f.err), f.err);
    }
    info = rf_kv_session_get_info(s);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    ck_assert_uint_eq(info.pool_bytes, first.pool_bytes);
    ck_assert_uint_eq(info.arena_bytes, first.arena_bytes);
    ck_assert_uint_eq(info.kept_bytes, first.kept_bytes);
    ck_assert_int_eq(info.kept_slots, (int64_t)BUDGET * LAYERS * KV_HEADS);
    ck_assert_int_eq(info.full_slots, (int64_t)(LEN + NUM) * LAYERS * KV_HEADS);
    ck_assert_int_eq(info.num_passes, NUM);
    size_t row = 2 * (size_t)f.model->desc.head_dim * sizeof(float);
    ck_assert_uint_le(info.pool_bytes, (size_t)(BUDGET + 2) * LAYERS * KV_HEADS * row);
    rf_assert_ok(rf_kv_session_read_positions(s, 0, 2, 1, got, &num, &f.err), f.err);
    ck_assert_int_eq(num, BUDGET);
    ck_assert_int_eq(got[0], 0);
    ck_assert_int_eq(got[BUDGET - 1], LEN + NUM - 1);
    int32_t token = 3;
    rf_assert_fails(rf_kv_session_step(s, &token, &f.err), f.err, RF_ERR_STATE, "used up");
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* Positions inside the cache: the frame slides by whole budgets past the model's 512 positions, from prompts shorter and longer than the
 * sinks and the budget. */
START_TEST(a_sliding_frame_is_the_cache_turned_anew) {
    enum { NUM = 1300, BUDGET = 32, MOST_LEN = 50, EVERY = 7 };
    static const int32_t lens[] = {2, 20, 32, MOST_LEN};
    fixture f = open_model("text-llama");
    rf_kv_rule rule = rule_of(&f, "streaming");
    rf_kv_session_options o = options_of(&rule, BUDGET, 1, MOST_LEN, NUM);
    rf_kv_session *turned = open_session(&f, &o, false), *slid = open_session(&f, &o, true);
    ck_assert(slid->slides);
    float want[VOCAB], got[VOCAB];
    for (size_t i = 0; i < sizeof lens / sizeof *lens; i++) {
        int32_t prompt[MOST_LEN];
        draw_tokens(prompt, MOST_LEN, (uint32_t)i + 8);
        rf_assert_ok(rf_kv_session_prefill(turned, 0, prompt, lens[i], 0, 0, 0.0, &f.err), f.err);
        rf_assert_ok(rf_kv_session_prefill(slid, 0, prompt, lens[i], 0, 0, 0.0, &f.err), f.err);
        int wraps = 0;
        for (int n = 0; n < NUM; n++) {
            int32_t token = (prompt[n % MOST_LEN] + n) % VOCAB, frame = slid->sequences[0].frame;
            rf_assert_ok(rf_kv_session_step(turned, &token, &f.err), f.err);
            rf_assert_ok(rf_kv_session_step(slid, &token, &f.err), f.err);
            bool wrapped = slid->sequences[0].frame != frame;
            wraps += wrapped;
            if (n % EVERY && !wrapped) continue;
            rf_assert_ok(rf_kv_session_read_logits(turned, 0, want, &f.err), f.err);
            rf_assert_ok(rf_kv_session_read_logits(slid, 0, got, &f.err), f.err);
            rf_assert_close(got, want, VOCAB, 1e-3, 2e-5);
        }
        ck_assert_int_ge(wraps, 2);
    }
    rf_kv_session_destroy(turned);
    rf_kv_session_destroy(slid);
    close_model(&f);
}
END_TEST

START_TEST(wrong_calls_are_refused_in_one_line) {
    fixture f = open_model("text-llama"), diffusion = {0};
    rf_kv_rule rule = rule_of(&f, "snapkv");
    rf_kv_session_options o = options_of(&rule, 16, 2, 32, 4);
    rf_kv_session *s = NULL;
    o.max_prompt = 1000;
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "capacity");
    ck_assert_ptr_null(s);
    o.max_prompt = 0;
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "prompts");
    o.max_prompt = 32;
    o.ratio = 1.5;
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "ratio");
    o.ratio = 1.0;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/text-llada", RF_FIXTURE_DIR);
    rf_assert_ok(rf_text_model_load(&diffusion.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    rf_assert_fails(rf_kv_session_create(&s, diffusion.model, &o, &f.err), f.err, RF_ERR_UNSUPPORTED, "autoregressive");
    rf_text_model_close(diffusion.model);

    s = open_session(&f, &o, false);
    int32_t prompt[40], tokens[2] = {1, 1};
    rf_token_stats stats[2];
    draw_tokens(prompt, 40, 6);
    rf_assert_fails(rf_kv_session_step(s, tokens, &f.err), f.err, RF_ERR_STATE, "no prompt");
    rf_assert_fails(rf_kv_session_read_stats(s, stats, &f.err), f.err, RF_ERR_STATE, "statistics");
    rf_assert_fails(rf_kv_session_prefill(s, 2, prompt, 20, 0, 0, 0, &f.err), f.err, RF_ERR_ARGUMENT, "sequence 2");
    rf_assert_fails(rf_kv_session_prefill(s, 0, prompt, 40, 0, 0, 0, &f.err), f.err, RF_ERR_ARGUMENT, "made for 32");
    rf_assert_fails(rf_kv_session_prefill(s, 0, prompt, 40, 20, 0, 0, &f.err), f.err, RF_ERR_ARGUMENT, "made for 4");
    rf_assert_fails(rf_kv_session_prefill(s, 0, prompt, 20, 0, 17, 0, &f.err), f.err, RF_ERR_ARGUMENT, "made for 16");
    prompt[3] = VOCAB;
    rf_assert_fails(rf_kv_session_prefill(s, 0, prompt, 20, 0, 0, 0, &f.err), f.err, RF_ERR_ARGUMENT, "token 3");
    prompt[3] = 3;
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, 20, 0, 0, 0, &f.err), f.err);
    rf_assert_fails(rf_kv_session_step(s, tokens, &f.err), f.err, RF_ERR_STATE, "sequence 1 has no prompt");
    tokens[0] = tokens[1] = -1;
    rf_assert_fails(rf_kv_session_step(s, tokens, &f.err), f.err, RF_ERR_ARGUMENT, "no sequence");
    rf_kv_session_destroy(s);

    rf_kv_rule episode = rule_of(&f, "epicache");
    o = options_of(&episode, 16, 1, 32, 4);
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "prompt of its own");
    o.external = prompt;
    o.num_external = 4;
    prompt[3] = -1;
    rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "external token 3");

    rule.action = RF_KV_SELECT;
    rule.position = RF_KV_POSITION_CACHE;
    o = options_of(&rule, 16, 1, 32, 4);
    rf_status st = rf_kv_session_create(&s, f.model, &o, &f.err);
    ck_assert_int_eq(st, RF_ERR_UNSUPPORTED);
    ck_assert_ptr_null(strchr(f.err.message, '\n'));
    close_model(&f);
}
END_TEST

START_TEST(sessions_survive_a_lack_of_memory) {
    fixture f = open_model("text-llama");
    rf_kv_rule rule = rule_of(&f, _i == 0 ? "snapkv" : _i == 1 ? "skipkv" : "epicache:block=8");
    rf_kv_session_options o = options_of(&rule, 16, 2, 32, 8);
    const int32_t ask[3] = {5, 6, 7};
    o.external = ask;
    o.num_external = 3;
    rf_kv_session *s = NULL;
    int failures = 0;
    for (uint64_t nth = 1;; nth++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_memory_fail_nth(nth);
        rf_status st = rf_kv_session_create(&s, f.model, &o, &f.err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        ck_assert_ptr_null(s);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        failures++;
    }
    ck_assert_int_gt(failures, 10);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dlm/kv_session");
    TCase *tc = tcase_create("kv_session");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, a_full_budget_is_the_plain_cache, 0, sizeof full_cases / sizeof *full_cases);
    tcase_add_test(tc, a_decoder_with_a_full_budget_draws_the_same);
    tcase_add_loop_test(tc, what_stays_and_what_follows_are_those_of_the_rule, 0,
                        sizeof plain_cases / sizeof *plain_cases);
    tcase_add_loop_test(tc, a_batch_is_its_sequences, 0, sizeof batch_cases / sizeof *batch_cases);
    tcase_add_loop_test(tc, layers_chosen_behind_the_next_are_the_same, 0,
                        sizeof overlap_cases / sizeof *overlap_cases);
    tcase_add_test(tc, fewer_tokens_pass_later_layers);
    tcase_add_test(tc, a_context_is_compressed_as_if_nothing_followed);
    tcase_add_loop_test(tc, memory_stays_over_a_long_generation, 0, 2);
    tcase_add_test(tc, a_sliding_frame_is_the_cache_turned_anew);
    tcase_add_test(tc, wrong_calls_are_refused_in_one_line);
    tcase_add_loop_test(tc, sessions_survive_a_lack_of_memory, 0, 3);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
