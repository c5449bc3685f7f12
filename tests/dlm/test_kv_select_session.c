/* tests/dlm/test_kv_select_session.c - a session that keeps everything and reads a selection: reading all of it is no policy bit for
 * bit, lists are those of plain statements of the rules (below, in double), attention reads them and nothing else, a batch is its
 * sequences, and bytes and reads are counted. */
#include <math.h>

#include "caching/kv/select.h"
#include "core/memory.h"
#include "core/rng.h"
#include "dlm/kv_internal.h"
#include "tests/test_util.h"

enum { LAYERS = 3, VOCAB = 300, Q_HEADS = 4, KV_HEADS = 2, GROUP = 2, MOST = 160 };

static const char *const methods[] = {
    "tokenselect", "fasa", "sentencekv:delimiter1=7,delimiter2=40,delimiter3=99,delimiter4=-1", "icecache:page=4"};
enum { METHODS = sizeof methods / sizeof *methods };

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_error err;
} fixture;

static fixture open_model(void) {
    fixture f = {0};
    char dir[512];
    snprintf(dir, sizeof dir, "%s/text-llama", RF_FIXTURE_DIR);
    rf_assert_ok(rf_backend_open(&f.backend, "cpu", 1, &f.err), f.err);
    rf_assert_ok(rf_text_model_load(&f.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    const rf_text_desc *d = &f.model->desc;
    ck_assert(d->num_layers == LAYERS && d->vocab == VOCAB && d->num_q_heads == Q_HEADS && d->num_kv_heads == KV_HEADS);
    return f;
}

static void close_model(fixture *f) {
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

/* Every seventh token or so ends a sentence. */
static int32_t token_at(uint32_t i, uint32_t key) {
    uint32_t counter[4] = {i, key, 0, 0}, seed[2] = {11, 0}, words[4];
    static const int32_t ends[3] = {7, 40, 99};
    rf_philox4x32(counter, seed, words);
    return words[1] % 7 == 0 ? ends[words[2] % 3] : (int32_t)(words[0] % 288);
}

static rf_kv_session *open_mirrored(fixture *f, const char *name, int32_t budget, int batch, int32_t prompt,
                                    int32_t more, bool mirrors) {
    rf_kv_session_options o = rf_kv_session_options_default();
    rf_assert_ok(rf_kv_rule_parse(&o.rule, name, &f->err), f->err);
    o.budget = budget;
    o.batch = batch;
    o.max_prompt = prompt;
    o.max_new = more;
    o.prefill_chunk = 16;
    rf_kv_session *s = NULL;
    rf_assert_ok(rf_kv_session_create_as(&s, f->model, &o, mirrors, &f->err), f->err);
    rf_kv_draw draw = {.keep_logits = true};
    rf_assert_ok(rf_kv_session_set_draw(s, &draw, &f->err), f->err);
    return s;
}

static rf_kv_session *open_session(fixture *f, const char *name, int32_t budget, int batch, int32_t prompt,
                                   int32_t more) {
    return open_mirrored(f, name, budget, batch, prompt, more, false);
}

/* One token behind the last row of all, then fewer than all: a list is as long as the cache, then not. */
START_TEST(reading_all_is_no_policy) {
    enum { LEN = 45, NUM = 20 };
    fixture f = open_model();
    int32_t prompt[LEN];
    for (uint32_t i = 0; i < LEN; i++) prompt[i] = token_at(i, 1);
    rf_kv_session *none = open_session(&f, "none", 0, 1, LEN, NUM),
                  *all = open_session(&f, methods[_i], LEN + NUM - 1, 1, LEN, NUM);
    rf_assert_ok(rf_kv_session_prefill(none, 0, prompt, LEN, 0, 0, 0, &f.err), f.err);
    rf_assert_ok(rf_kv_session_prefill(all, 0, prompt, LEN, 0, 0, 0, &f.err), f.err);
    int differ = 0;
    for (int i = 0; i < NUM; i++) {
        float want[VOCAB], got[VOCAB];
        rf_token_stats stats;
        rf_assert_ok(rf_kv_session_read_logits(none, 0, want, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_logits(all, 0, got, &f.err), f.err);
        ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: token %d", methods[_i], i);
        rf_assert_ok(rf_kv_session_read_stats(none, &stats, &f.err), f.err);
        rf_assert_ok(rf_kv_session_step(none, &stats.id, &f.err), f.err);
        rf_assert_ok(rf_kv_session_step(all, &stats.id, &f.err), f.err);
        if (i + 1 < NUM) continue;
        rf_assert_ok(rf_kv_session_read_logits(none, 0, want, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_logits(all, 0, got, &f.err), f.err);
        differ = memcmp(want, got, sizeof want) != 0; /* one over the budget */
    }
    ck_assert_int_eq(differ, 1);
    rf_kv_session_info a = rf_kv_session_get_info(none), b = rf_kv_session_get_info(all);
    ck_assert_int_eq(a.kept_slots, b.kept_slots);
    ck_assert_int_eq(b.evictions, 0);
    rf_kv_session_destroy(none);
    rf_kv_session_destroy(all);
    close_model(&f);
}
END_TEST

static const float *key_of(const rf_kv_session *s, const float *pool, int head, int slot) {
    const rf_kv_head *h = rf_kv_book_head(s->sequences[0].book, LAYERS - 1, head);
    return pool + (int64_t)h->row[slot] * s->head_dim;
}

static void softmax_of(const rf_kv_session *s, const float *q, int head, const int *slots, int num, double *p) {
    double sum = 0;
    for (int i = 0; i < num; i++) {
        double z = 0;
        const float *k = key_of(s, (const float *)(const void *)s->k_pool, head, slots[i]);
        for (int c = 0; c < s->head_dim; c++) z += (double)q[c] * (double)k[c];
        sum += p[i] = exp(z / sqrt(s->head_dim));
    }
    for (int i = 0; i < num; i++) p[i] /= sum;
}

/* Slots of the last layer's list of a head. */
static int read_list(const rf_kv_session *s, int head, int *slots) {
    int32_t num;
    const int32_t *rows = rf_kv_select_last(s, head, &num);
    const rf_kv_head *h = rf_kv_book_head(s->sequences[0].book, LAYERS - 1, head);
    int made = 0;
    for (int32_t j = 0; j < h->num && made < num; j++)
        if (h->row[j] == rows[made]) slots[made++] = j;
    ck_assert_int_eq(made, num); /* ascending, of this head */
    return made;
}

/* Slots between the ends by their summed probabilities of query heads first.. */
static void check_best(const rf_kv_session *s, int first, int heads, int n, int init, int local, const int *slots,
                       int num) {
    double score[MOST] = {0}, p[MOST];
    int all[MOST], open = n - init - local, at = 0;
    for (int j = 0; j < open; j++) all[j] = init + j;
    for (int h = first; h < first + heads; h++) {
        softmax_of(s, (const float *)s->step.q + h * s->head_dim, h / GROUP, all, open, p);
        for (int j = 0; j < open; j++) score[init + j] += p[j];
    }
    double worst_in = INFINITY, best_out = 0;
    for (int j = 0; j < n; j++) {
        bool in = at < num && slots[at] == j, end = j < init || j >= n - local;
        at += in;
        ck_assert(in || !end);
        if (in && !end && score[j] < worst_in) worst_in = score[j];
        if (!in && score[j] > best_out) best_out = score[j];
    }
    ck_assert_msg(worst_in > best_out - 1e-6, "%g is read, %g is not", worst_in, best_out);
}

START_TEST(lists_are_those_of_the_rule) {
    enum { LEN = 70, NUM = 12, BUDGET = 24 };
    /* all pairs: FASA's proxy is the logit itself */
    static const char *const names[] = {
        "tokenselect:init=3,local=5,select=24", "fasa:select_dims=4096",
        "sentencekv:delimiter1=7,delimiter2=40,delimiter3=99,delimiter4=-1,init=2,local=3,select=19",
        "icecache:page=4,init=2,local=3,select=19"};
    fixture f = open_model();
    const char *name = names[_i];
    int32_t tokens[LEN + NUM];
    for (uint32_t i = 0; i < LEN + NUM; i++) tokens[i] = token_at(i, 2);
    rf_kv_session *s = open_session(&f, name, BUDGET, 1, LEN, NUM);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, LEN, 0, 0, 0, &f.err), f.err);
    rf_kv_session_reset_counts(s);
    int64_t reads = 0;
    for (int i = 0; i < NUM; i++) {
        int slots[KV_HEADS][MOST], num[KV_HEADS], n = LEN + i + 1;
        rf_assert_ok(rf_kv_session_step(s, &tokens[LEN + i], &f.err), f.err);
        int32_t init, local;
        rf_kv_select_ends(&s->rule, BUDGET, &init, &local);
        for (int h = 0; h < KV_HEADS; h++) {
            num[h] = read_list(s, h, slots[h]);
            ck_assert_int_le(num[h], BUDGET);
            ck_assert_int_ge(num[h], init + local);
            if (_i < 2) ck_assert_int_eq(num[h], BUDGET);
            reads += num[h];
            ck_assert_int_eq(slots[h][num[h] - 1], n - 1);
            if (_i == 0) {
                ck_assert(num[h] == num[0] && memcmp(slots[h], slots[0], (size_t)num[0] * sizeof(int)) == 0);
                check_best(s, 0, Q_HEADS, n, init, local, slots[h], num[h]);
            }
            if (_i == 1) check_best(s, h * GROUP, GROUP, n, init, local, slots[h], num[h]);
            /* BUDGET * 3 >= LEN: every token counts, sentences are read whole; the one that has not ended is not */
            for (int j = init, begin = init, read = 0; _i == 2 && j < n - local; j++) {
                bool in = false, ended = j == LEN - 1;
                for (int k = 0; k < num[h]; k++) in |= slots[h][k] == j;
                read += in;
                ended |= tokens[j] == 7 || tokens[j] == 40 || tokens[j] == 99;
                if (!ended && j + 1 < n - local) continue;
                for (int k = j + 1; k < n; k++)
                    ended |= k == LEN - 1 || tokens[k] == 7 || tokens[k] == 40 || tokens[k] == 99;
                ck_assert_msg(read == 0 || (ended && read == j + 1 - begin), "%d of sentence %d..%d are read", read,
                              begin, j);
                begin = j + 1;
                read = 0;
            }
            /* attention of the head reads the list and nothing else */
            for (int g = h * GROUP; g < (h + 1) * GROUP; g++) {
                double p[MOST];
                softmax_of(s, (const float *)s->step.q + g * s->head_dim, h, slots[h], num[h], p);
                for (int c = 0; c < s->head_dim; c++) {
                    double want = 0;
                    for (int k = 0; k < num[h]; k++)
                        want += p[k] * (double)key_of(s, (const float *)(const void *)s->v_pool, h, slots[h][k])[c];
                    ck_assert_double_eq_tol((double)((const float *)s->step.attn)[g * s->head_dim + c], want, 1e-4);
                }
            }
        }
    }
    rf_kv_session_info info = rf_kv_session_get_info(s);
    ck_assert_int_eq(info.kept_slots, (int64_t)(LEN + NUM) * LAYERS * KV_HEADS);
    ck_assert_uint_ge(info.kept_bytes, info.full_bytes);
    ck_assert_int_eq(info.row_passes, NUM);
    if (_i < 2) ck_assert_int_eq(info.key_reads, NUM * BUDGET);
    if (_i == 3) { /* the first two layers read everything */
        int64_t whole = 0;
        for (int i = 0; i < NUM; i++) whole += LEN + i + 1;
        int64_t heads = LAYERS * KV_HEADS, sum = 2 * KV_HEADS * whole + reads;
        ck_assert_int_eq(info.key_reads, (sum + heads / 2) / heads);
    }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* Three lengths, three budgets (one of them everything); keys in a copy on the host, as of a device, and where they lie. */
START_TEST(a_batch_is_its_sequences) {
    enum { BATCH = 3, LEN = 60, NUM = 10 };
    static const int32_t lens[BATCH] = {41, 60, 27}, budgets[BATCH] = {16, 20, 60};
    fixture f = open_model();
    rf_kv_session *all = open_mirrored(&f, methods[_i], 60, BATCH, LEN, NUM, true), *single[BATCH];
    int32_t prompts[BATCH][LEN];
    for (int b = 0; b < BATCH; b++) {
        single[b] = open_session(&f, methods[_i], 60, 1, LEN, NUM);
        for (uint32_t i = 0; i < LEN; i++) prompts[b][i] = token_at(i, (uint32_t)(10 + b));
        rf_assert_ok(rf_kv_session_prefill(single[b], 0, prompts[b], lens[b], 0, budgets[b], 0, &f.err), f.err);
        rf_assert_ok(rf_kv_session_prefill(all, b, prompts[b], lens[b], 0, budgets[b], 0, &f.err), f.err);
    }
    for (int i = 0; i < NUM; i++) {
        int32_t tokens[BATCH];
        for (int b = 0; b < BATCH; b++) tokens[b] = b == 1 && i % 4 == 2 ? -1 : token_at((uint32_t)(100 + i), 3);
        rf_assert_ok(rf_kv_session_step(all, tokens, &f.err), f.err);
        for (int b = 0; b < BATCH; b++) {
            float logits[2][VOCAB];
            if (tokens[b] == -1) continue;
            rf_assert_ok(rf_kv_session_step(single[b], &tokens[b], &f.err), f.err);
            rf_assert_ok(rf_kv_session_read_logits(single[b], 0, logits[0], &f.err), f.err);
            rf_assert_ok(rf_kv_session_read_logits(all, b, logits[1], &f.err), f.err);
            ck_assert_msg(memcmp(logits[0], logits[1], sizeof *logits) == 0, "token %d of sequence %d", i, b);
        }
    }
    for (int b = 0; b < BATCH; b++) rf_kv_session_destroy(single[b]);
    rf_kv_session_destroy(all);
    close_model(&f);
}
END_TEST

/* Making a session, its prompt and a step, with each allocation failing in turn. */
START_TEST(sessions_survive_a_lack_of_memory) {
    fixture f = open_model();
    rf_kv_session_options o = rf_kv_session_options_default();
    int32_t tokens[33];
    int failures = 0;
    for (uint32_t i = 0; i < 33; i++) tokens[i] = token_at(i, 4);
    rf_assert_ok(rf_kv_rule_parse(&o.rule, methods[_i], &f.err), f.err);
    o.budget = 8;
    o.max_prompt = 32;
    o.max_new = 4;
    for (uint64_t nth = 1;; nth++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_kv_session *s = NULL;
        rf_memory_fail_nth(nth);
        rf_status st = rf_kv_session_create_as(&s, f.model, &o, true, &f.err);
        if (st == RF_OK) st = rf_kv_session_prefill(s, 0, tokens, 32, 0, 0, 0, &f.err);
        if (st == RF_OK) st = rf_kv_session_step(s, tokens + 32, &f.err);
        rf_memory_fail_nth(0);
        rf_kv_session_destroy(s);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        failures++;
    }
    ck_assert_int_gt(failures, 20);
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dlm/kv_select");
    TCase *tc = tcase_create("kv_select");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, reading_all_is_no_policy, 0, METHODS);
    tcase_add_loop_test(tc, lists_are_those_of_the_rule, 0, METHODS);
    tcase_add_loop_test(tc, a_batch_is_its_sequences, 0, METHODS);
    tcase_add_loop_test(tc, sessions_survive_a_lack_of_memory, 0, METHODS);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
