/* tests/dlm/test_kv_tables.c - calibrated tables, mean slots and retention gates of a cache under a budget, against plain statements
 * in double; files of another model and wrong ones are refused. */
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include "core/file.h"
#include "core/memory.h"
#include "core/rng.h"
#include "dlm/kv_calibrate.h"
#include "dlm/kv_internal.h"
#include "tests/test_util.h"

enum { LAYERS = 3, HIDDEN = 64, Q_HEADS = 4, KV_HEADS = 2, GROUP = 2, MID = 5, MOST = 160 };

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_error err;
    char path[128];
} fixture;

static fixture open_model(void) {
    fixture f = {0};
    char dir[512];
    snprintf(dir, sizeof dir, "%s/text-llama", RF_FIXTURE_DIR);
    rf_assert_ok(rf_backend_open(&f.backend, "cpu", 1, &f.err), f.err);
    rf_assert_ok(rf_text_model_load(&f.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    return f;
}

static void close_model(fixture *f) {
    if (f->path[0]) unlink(f->path);
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

static void write_file(fixture *f, const char *name, const void *bytes, size_t num) {
    snprintf(f->path, sizeof f->path, "/tmp/rf-%ld-%s", (long)getpid(), name);
    rf_assert_ok(rf_file_write(f->path, bytes, num, &f->err), f->err);
}

static double uniform(uint32_t i, uint32_t key) {
    uint32_t counter[4] = {i, key, 0, 0}, seed[2] = {7, 0}, words[4];
    rf_philox4x32(counter, seed, words);
    return ((double)words[0] + 0.5) * 0x1p-32;
}

static void draw_tokens(int32_t *out, int32_t num) {
    for (int32_t i = 0; i < num; i++) out[i] = (int32_t)(uniform((uint32_t)i, 1) * 288);
}

static rf_status try_session(rf_kv_session **out, fixture *f, const char *rule, const char *calibration, int32_t budget,
                             int32_t prompt, int batch) {
    rf_kv_session_options o = rf_kv_session_options_default();
    rf_assert_ok(rf_kv_rule_parse(&o.rule, rule, &f->err), f->err);
    o.budget = budget;
    o.batch = batch;
    o.max_prompt = prompt;
    o.max_new = 40;
    o.prefill_chunk = 16;
    o.calibration = calibration;
    return rf_kv_session_create_as(out, f->model, &o, false, &f->err);
}

static int32_t positions(fixture *f, rf_kv_session *s, int layer, int head, int32_t *out) {
    int32_t num;
    rf_assert_ok(rf_kv_session_read_positions(s, 0, layer, head, out, &num, &f->err), f->err);
    return num;
}

static const char tables[] = "{\"compresskv\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[1], [0, 3], [2]],"
                             " \"layer_shares\": [1, 2, 3]},"
                             " \"razor\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[3], [], [0, 1]]}}";

/* --- mean slots ------------------------------------------------------------------------------------------------------------ */

/* Attention of the last layer's newest query over what is kept and `dropped` copies of the mean key and value. */
START_TEST(a_mean_slot_counts_as_often_as_tokens_were_dropped) {
    enum { LEN = 70, BUDGET = 12 };
    static const char *const rules[] = {"score=position,sinks=3,action=compensate",
                                        "snapkv:window=4,action=compensate"};
    fixture f = open_model();
    int32_t prompt[LEN];
    draw_tokens(prompt, LEN);
    rf_kv_session *s = NULL;
    rf_assert_ok(try_session(&s, &f, rules[_i], NULL, BUDGET, LEN, 2), f.err);
    int d = s->head_dim, last = LAYERS - 1;
    for (int b = 0; b < 2; b++) rf_assert_ok(rf_kv_session_prefill(s, b, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    int32_t next[2] = {5, -1};
    for (int step = 0; step < 3; step++) rf_assert_ok(rf_kv_session_step(s, next, &f.err), f.err);
    const float *plane_k = (const float *)rf_text_keys(s->stage, last), *q = s->step.q, *got = s->step.attn;
    const float *plane_v = (const float *)rf_text_values(s->stage, last);
    for (int h = 0; h < Q_HEADS; h++) {
        const rf_kv_head *head = rf_kv_book_head(s->sequences[0].book, last, h / GROUP);
        ck_assert_int_eq(head->num, BUDGET + 3);
        double mean_k[64] = {0}, mean_v[64] = {0}, z[MOST], most = -INFINITY, sum = 0, out[64] = {0};
        int dropped = 0;
        for (int32_t j = 0; j < LEN; j++) {
            bool kept = false;
            for (int32_t i = 0; i < head->num; i++) kept |= head->position[i] == j;
            if (kept) continue;
            dropped++;
            for (int c = 0; c < d; c++) {
                mean_k[c] += (double)plane_k[j * s->stage->kv_cols + h / GROUP * d + c];
                mean_v[c] += (double)plane_v[j * s->stage->kv_cols + h / GROUP * d + c];
            }
        }
        ck_assert_int_eq(dropped, LEN - BUDGET);
        for (int i = 0; i <= head->num; i++) {
            z[i] = 0;
            for (int c = 0; c < d; c++)
                z[i] += (double)q[h * d + c] * (i < head->num ? (double)((const float *)s->k_pool)[head->row[i] * d + c]
                                                              : mean_k[c] / dropped);
            z[i] /= sqrt((double)d);
            most = z[i] > most ? z[i] : most;
        }
        for (int i = 0; i < head->num + dropped; i++) {
            bool mean = i >= head->num;
            double p = exp(z[mean ? head->num : i] - most);
            sum += p;
            for (int c = 0; c < d; c++)
                out[c] += p * (mean ? mean_v[c] / dropped : (double)((const float *)s->v_pool)[head->row[i] * d + c]);
        }
        for (int c = 0; c < d; c++) ck_assert_double_eq_tol(got[h * d + c], out[c] / sum, 1e-5);
        ck_assert_double_eq_tol(s->step.lse[h], most + log(sum), 1e-5);
    }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

START_TEST(nothing_dropped_is_the_plain_cache) {
    enum { LEN = 30 };
    fixture f = open_model();
    int32_t prompt[LEN], next = 9;
    draw_tokens(prompt, LEN);
    static float logits[2][300];
    for (int i = 0; i < 2; i++) {
        rf_kv_session *s = NULL;
        rf_assert_ok(
            try_session(&s, &f, i ? "score=position,sinks=3,action=compensate" : "none", NULL, i ? LEN : 0, LEN, 1),
            f.err);
        rf_kv_draw draw = {.keep_logits = true};
        rf_assert_ok(rf_kv_session_set_draw(s, &draw, &f.err), f.err);
        rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
        rf_assert_ok(rf_kv_session_step(s, &next, &f.err), f.err);
        rf_assert_ok(rf_kv_session_read_logits(s, 0, logits[i], &f.err), f.err);
        rf_kv_session_destroy(s);
    }
    ck_assert(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
    close_model(&f);
}
END_TEST

/* --- tables ---------------------------------------------------------------------------------------------------------------- */

START_TEST(retrieval_heads_keep_everything) {
    enum { LEN = 60, BUDGET = 10 };
    fixture f = open_model();
    int32_t prompt[LEN], got[MOST];
    draw_tokens(prompt, LEN);
    write_file(&f, "kv.json", tables, sizeof tables - 1);
    rf_kv_session *s = NULL;
    rf_assert_ok(try_session(&s, &f, "razor", f.path, BUDGET, LEN, 1), f.err);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < KV_HEADS; h++) {
            bool retrieves = (l == 0 && h == 1) || (l == 2 && h == 0);
            int32_t num = positions(&f, s, l, h, got);
            ck_assert_int_eq(num, retrieves ? LEN : BUDGET);
            for (int32_t i = 0; i < num; i++) ck_assert_int_eq(got[i], retrieves || i < 4 ? i : LEN - BUDGET + i);
        }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* Sums of the last 8 rows over the listed heads, pooled by 5; budgets of layers 10 of 3 by shares 1 : 2 : 3 above no floor. */
START_TEST(listed_heads_score_a_layer) {
    enum { LEN = 60, BUDGET = 40, W = 8 };
    fixture f = open_model();
    int32_t got[MOST];
    const uint8_t list[LAYERS * Q_HEADS] = {0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0};
    const float shares[LAYERS] = {1, 2, 3};
    rf_kv_rule rule;
    rf_assert_ok(rf_kv_rule_parse(&rule, "compresskv", &f.err), f.err);
    rf_kv_shape shape = {.num_layers = LAYERS,
                         .num_q_heads = Q_HEADS,
                         .num_kv_heads = KV_HEADS,
                         .head_dim = 16,
                         .max_prompt = LEN,
                         .max_new = 4,
                         .layer_shares = shares,
                         .head_list = list};
    rf_kv_book *book = NULL;
    rf_assert_ok(rf_kv_book_create(&book, &rule, &shape, BUDGET, 0, &f.err), f.err);
    float s1[Q_HEADS * LEN];
    /* left above 32 each: 24, by shares 4, 8, 12 */
    const int32_t budgets[LAYERS] = {36, 40, 44};
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < Q_HEADS * LEN; i++) s1[i] = (float)uniform((uint32_t)i, (uint32_t)(20 + l));
        rf_kv_stats stats = {.num_keys = LEN, .stride = LEN, .num_queries = W, .s1 = s1, .head_dim = 16};
        rf_assert_ok(rf_kv_book_prefill(book, l, LEN, &stats, &f.err), f.err);
        double score[LEN];
        for (int j = 0; j < LEN; j++) {
            score[j] = j >= LEN - W ? INFINITY : 0;
            for (int c = j - 2; c <= j + 2 && j < LEN - W; c++)
                for (int q = 0; q < Q_HEADS && c >= 0 && c < LEN - W; q++)
                    score[j] += list[l * Q_HEADS + q] ? (double)s1[q * LEN + c] : 0;
        }
        int32_t want[LEN], num = 0;
        for (int j = 0; j < LEN; j++) {
            int before = 0;
            for (int i = 0; i < LEN; i++) before += score[i] > score[j] || (score[i] == score[j] && i < j);
            if (before < budgets[l]) want[num++] = j;
        }
        for (int h = 0; h < KV_HEADS; h++) {
            const rf_kv_head *head = rf_kv_book_head(book, l, h);
            ck_assert_int_eq(head->num, budgets[l]);
            ck_assert(memcmp(head->position, want, (size_t)num * sizeof *want) == 0);
        }
    }
    rf_kv_book_destroy(book);
    /* the same through a session: both heads share a layer's set */
    int32_t prompt[LEN], other[MOST];
    draw_tokens(prompt, LEN);
    write_file(&f, "kv.json", tables, sizeof tables - 1);
    rf_kv_session *s = NULL;
    rf_assert_ok(try_session(&s, &f, "compresskv", f.path, BUDGET, LEN, 1), f.err);
    rf_assert_ok(rf_kv_session_prefill(s, 0, prompt, LEN, 0, 0, 0.0, &f.err), f.err);
    for (int l = 0; l < LAYERS; l++) {
        ck_assert_int_eq(positions(&f, s, l, 0, got), budgets[l]);
        ck_assert_int_eq(positions(&f, s, l, 1, other), budgets[l]);
        ck_assert(memcmp(got, other, (size_t)budgets[l] * sizeof *got) == 0);
    }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* --- calibration ------------------------------------------------------------------------------------------------------------ */

START_TEST(flags_are_the_largest) {
    fixture f = open_model();
    const float scores[6] = {0.5f, 0.9f, 0.5f, 0.1f, 0.9f, 0.2f};
    uint8_t flags[6];
    rf_assert_ok(rf_kv_flag_top(flags, scores, 6, 0.5, &f.err), f.err);
    const uint8_t want[6] = {1, 1, 0, 0, 1, 0};
    ck_assert(memcmp(flags, want, 6) == 0);
    /* repeats: the first layer's keys do not know their place, so attention is bounded by 1 and the same twice */
    float echo[2][LAYERS * Q_HEADS], induction[2][LAYERS * Q_HEADS];
    for (int i = 0; i < 2; i++)
        rf_assert_ok(rf_kv_calibrate_razor(f.model, 12, 3, echo[i], induction[i], &f.err), f.err);
    ck_assert(memcmp(echo[0], echo[1], sizeof echo[0]) == 0);
    ck_assert(memcmp(induction[0], induction[1], sizeof induction[0]) == 0);
    double sum = 0;
    for (int i = 0; i < LAYERS * Q_HEADS; i++) {
        ck_assert(echo[0][i] > 0 && induction[0][i] > 0 && echo[0][i] + induction[0][i] <= 1);
        sum += fabs((double)(echo[0][i] - induction[0][i]));
    }
    ck_assert(sum > 0);
    ck_assert_int_eq(rf_kv_calibrate_razor(f.model, 1, 3, echo[0], induction[0], &f.err), RF_ERR_ARGUMENT);

    int32_t tokens[50];
    draw_tokens(tokens, 50);
    tokens[47] = tokens[11]; /* an answer of the needle */
    rf_kv_needle needle = {.tokens = tokens, .num = 50, .num_prompt = 45, .needle_begin = 10, .needle_end = 14};
    float mass[LAYERS * Q_HEADS], shares[LAYERS];
    uint8_t list[LAYERS * Q_HEADS];
    memset(list, 1, sizeof list);
    rf_assert_ok(rf_kv_calibrate_heads(f.model, &needle, 1, mass, &f.err), f.err);
    for (int i = 0; i < LAYERS * Q_HEADS; i++) ck_assert(mass[i] > 0 && mass[i] < 1); /* one row's */
    rf_assert_ok(rf_kv_calibrate_layers(f.model, &needle, 1, list, 8, 0.25, shares, &f.err), f.err);
    double all = 0;
    for (int l = 0; l < LAYERS; l++) {
        ck_assert(shares[l] > 0);
        all += (double)shares[l];
    }
    ck_assert_double_eq_tol(all, 1, 1e-6);
    rf_assert_ok(rf_kv_calibrate_layers(f.model, &needle, 1, list, 8, 1.0, shares, &f.err), f.err);
    for (int l = 0; l < LAYERS; l++) ck_assert(isfinite(shares[l])); /* nothing is lost: even, or noise */
    close_model(&f);
}
END_TEST

/* --- gates ------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    float w1[MID * HIDDEN], b1[MID], w2[KV_HEADS * MID], b2[KV_HEADS];
} gate_file;

/* Names in the order of their data. */
static void write_gates(fixture *f, gate_file *gates, int layers) {
    static char bytes[1 << 16];
    char header[4096];
    size_t at = 0, offset = 0;
    static const char *const names[] = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"};
    const int rows[] = {MID, MID, KV_HEADS, KV_HEADS}, cols[] = {HIDDEN, 0, MID, 0};
    at += (size_t)snprintf(header + at, sizeof header - at, "{");
    for (int l = 0; l < layers; l++) {
        for (int p = 0; p < 4; p++) {
            size_t num = (size_t)rows[p] * (size_t)(cols[p] ? cols[p] : 1) * 4;
            char shape[32];
            snprintf(shape, sizeof shape, cols[p] ? "[%d,%d]" : "[%d]", rows[p], cols[p]);
            at += (size_t)snprintf(header + at, sizeof header - at,
                                   "%s\"layers.%d.%s\":{\"dtype\":\"F32\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                                   l + p ? "," : "", l, names[p], shape, offset, offset + num);
            offset += num;
        }
        float *x = (float *)&gates[l];
        for (size_t i = 0; i < sizeof *gates / 4; i++)
            x[i] = (float)((uniform((uint32_t)i, (uint32_t)(40 + l)) - 0.5) * (i < MID * HIDDEN ? 1 : 3));
    }
    at += (size_t)snprintf(header + at, sizeof header - at, "}");
    while (at % 8) header[at++] = ' ';
    uint64_t len = at;
    memcpy(bytes, &len, 8);
    memcpy(bytes + 8, header, at);
    memcpy(bytes + 8 + at, gates, (size_t)layers * sizeof *gates);
    write_file(f, "gates.safetensors", bytes, 8 + at + (size_t)layers * sizeof *gates);
}

static double log_retention(const gate_file *g, const double *x, int head) {
    double y = (double)g->b2[head];
    for (int m = 0; m < MID; m++) {
        double v = (double)g->b1[m];
        for (int c = 0; c < HIDDEN; c++) v += (double)g->w1[m * HIDDEN + c] * x[c];
        y += (double)g->w2[head * MID + m] * v / (1 + exp(-v));
    }
    return -log(1 + exp(-y));
}

/* Layer 0's input is the normed embedding: what its heads keep is known without the model. */
START_TEST(gates_keep_what_they_say) {
    enum { LEN = 60, BUDGET = 20, BUFFER = 4, STEPS = 11 };
    fixture f = open_model();
    gate_file gates[LAYERS];
    write_gates(&f, gates, LAYERS);
    int32_t tokens[LEN + STEPS], got[MOST];
    draw_tokens(tokens, LEN + STEPS);
    rf_kv_session *s = NULL;
    rf_assert_ok(try_session(&s, &f, "trimkv:buffer=4", f.path, BUDGET, LEN, 1), f.err);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, LEN, 0, 0, 0.0, &f.err), f.err);
    for (int i = LEN; i < LEN + STEPS; i++) rf_assert_ok(rf_kv_session_step(s, tokens + i, &f.err), f.err);
    const float *embedding = f.model->embedding, *weight = f.model->layers[0].attention_norm;
    for (int h = 0; h < KV_HEADS; h++) {
        double beta[LEN + STEPS];
        for (int i = 0; i < LEN + STEPS; i++) {
            double x[HIDDEN], square = 0;
            for (int c = 0; c < HIDDEN; c++) x[c] = (double)embedding[tokens[i] * HIDDEN + c];
            for (int c = 0; c < HIDDEN; c++) square += x[c] * x[c];
            for (int c = 0; c < HIDDEN; c++) x[c] *= (double)weight[c] / sqrt(square / HIDDEN + f.model->desc.norm_eps);
            beta[i] = log_retention(&gates[0], x, h);
        }
        int32_t keep[LEN + STEPS], num = LEN;
        for (int i = 0; i < LEN; i++) keep[i] = i;
        for (int seen = LEN; seen <= LEN + STEPS; seen++) {
            if (seen > LEN) keep[num++] = seen - 1;
            bool due = num >= BUDGET + BUFFER;
            while (num > BUDGET && due) {
                int worst = 0;
                for (int i = 1; i < num; i++) { /* ties: the highest index goes */
                    double a = (seen + 1 - keep[i]) * beta[keep[i]];
                    if (a <= (seen + 1 - keep[worst]) * beta[keep[worst]]) worst = i;
                }
                memmove(keep + worst, keep + worst + 1, (size_t)(num - worst - 1) * sizeof *keep);
                num--;
            }
        }
        ck_assert_int_eq(positions(&f, s, 0, h, got), num);
        for (int i = 0; i < num; i++) ck_assert_int_eq(got[i], keep[i]);
    }
    ck_assert_int_lt(positions(&f, s, 2, 1, got), BUDGET + BUFFER);
    rf_kv_session_destroy(s);

    rf_assert_ok(try_session(&s, &f, "global-retention:buffer=4", f.path, BUDGET, LEN, 1), f.err);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, LEN, 0, 0, 0.0, &f.err), f.err);
    int64_t most = (int64_t)LAYERS * KV_HEADS * (BUDGET + BUFFER);
    for (int i = LEN; i < LEN + STEPS; i++) {
        rf_assert_ok(rf_kv_session_step(s, tokens + i, &f.err), f.err);
        ck_assert_int_lt(rf_kv_session_get_info(s).kept_slots, most);
        for (int l = 0; l < LAYERS; l++) /* what attention reads is what the book says, in every layer */
            for (int h = 0; h < KV_HEADS; h++)
                ck_assert_int_eq(s->lens[rf_kv_unit_at(s, l, 0) + h], rf_kv_book_head(s->sequences[0].book, l, h)->num);
    }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* --- refused ----------------------------------------------------------------------------------------------------------------- */

START_TEST(wrong_files_are_refused) {
    fixture f = open_model();
    rf_kv_session *s = NULL;
    static const char *const wants[] = {"compresskv", "razor", "trimkv", "global-retention"};
    for (size_t i = 0; i < 4; i++) /* nothing beside the fixture */
        ck_assert_int_eq(try_session(&s, &f, wants[i], NULL, 20, 40, 1), RF_ERR_MISSING);
    ck_assert_int_eq(try_session(&s, &f, "snapkv", "kv.json", 20, 40, 1), RF_ERR_ARGUMENT);
    static const struct {
        const char *text;
        rf_status status;
    } bad[] = {
        {"{}", RF_ERR_MISSING},
        {"{\"razor\": {\"num_layers\": 2, \"num_q_heads\": 4, \"heads\": [[], []]}}", RF_ERR_CONFIG},
        {"{\"razor\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[], []]}}", RF_ERR_CONFIG},
        {"{\"razor\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[4], [], []]}}", RF_ERR_CONFIG},
        {"{\"razor\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[0.5], [], []]}}", RF_ERR_CONFIG},
        {"{\"razor\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [0, [], []]}}", RF_ERR_CONFIG},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_file(&f, "kv.json", bad[i].text, strlen(bad[i].text));
        ck_assert_int_eq(try_session(&s, &f, "razor", f.path, 20, 40, 1), bad[i].status);
    }
    /* a layer without a listed head; a negative share */
    static const char empty[] = "{\"compresskv\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[], [0], [0]],"
                                " \"layer_shares\": [1, 1, 1]}}";
    static const char negative[] =
        "{\"compresskv\": {\"num_layers\": 3, \"num_q_heads\": 4, \"heads\": [[0], [0], [0]],"
        " \"layer_shares\": [1, -1, 1]}}";
    write_file(&f, "kv.json", empty, sizeof empty - 1);
    ck_assert_int_eq(try_session(&s, &f, "compresskv", f.path, 20, 40, 1), RF_ERR_CONFIG);
    write_file(&f, "kv.json", negative, sizeof negative - 1);
    ck_assert_int_eq(try_session(&s, &f, "compresskv", f.path, 20, 40, 1), RF_ERR_CONFIG);
    unlink(f.path);
    gate_file gates[LAYERS + 1];
    write_gates(&f, gates, LAYERS - 1);
    ck_assert_int_eq(try_session(&s, &f, "trimkv", f.path, 20, 40, 1), RF_ERR_MISSING);
    write_gates(&f, gates, LAYERS + 1);
    ck_assert_int_eq(try_session(&s, &f, "trimkv", f.path, 20, 40, 1), RF_ERR_CONFIG);
    ck_assert_int_eq(try_session(&s, &f, "attention-gate", f.path, 20, 40, 1), RF_ERR_UNSUPPORTED);
    ck_assert_int_eq(try_session(&s, &f, "h2o:action=compensate", NULL, 20, 40, 1), RF_ERR_UNSUPPORTED);
    ck_assert_ptr_null(s);
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dlm/kv_tables");
    TCase *cases = tcase_create("tables");
    tcase_set_timeout(cases, 120);
    tcase_add_loop_test(cases, a_mean_slot_counts_as_often_as_tokens_were_dropped, 0, 2);
    tcase_add_test(cases, nothing_dropped_is_the_plain_cache);
    tcase_add_test(cases, retrieval_heads_keep_everything);
    tcase_add_test(cases, listed_heads_score_a_layer);
    tcase_add_test(cases, flags_are_the_largest);
    tcase_add_test(cases, gates_keep_what_they_say);
    tcase_add_test(cases, wrong_files_are_refused);
    suite_add_tcase(suite, cases);
    return rf_run_suite(suite);
}
