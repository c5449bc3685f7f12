/* tests/dlm/test_kv_packed.c - caches in few bits: what fits into the raw part is the plain cache bit for bit, more bits are nearer to
 * it, a step is attention over what the stores hold, a batch is its sequences, bytes are those counted by hand, and long outputs
 * hold. */
#include <math.h>

#include "core/memory.h"
#include "core/rng.h"
#include "dlm/kv_internal.h"
#include "tests/test_util.h"

enum { LAYERS = 3, VOCAB = 300, Q_HEADS = 4, KV_HEADS = 2, MOST = 1024 };

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
    ck_assert(f.model->desc.num_layers == LAYERS && f.model->desc.vocab == VOCAB);
    return f;
}

static void close_model(fixture *f) {
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

static void draw_tokens(int32_t *out, int32_t num, uint32_t key) {
    for (int32_t i = 0; i < num; i++) {
        uint32_t counter[4] = {(uint32_t)i, key, 0, 0}, seed[2] = {13, 0}, words[4];
        rf_philox4x32(counter, seed, words);
        out[i] = (int32_t)(words[0] % 288);
    }
}

static rf_kv_session *open_session(fixture *f, const char *spec, int32_t budget, int batch, int32_t prompt,
                                   int32_t more) {
    rf_kv_session_options o = rf_kv_session_options_default();
    rf_assert_ok(rf_kv_rule_parse(&o.rule, spec, &f->err), f->err);
    o.budget = budget;
    o.batch = batch;
    o.max_prompt = prompt;
    o.max_new = more;
    o.prefill_chunk = 16;
    rf_kv_session *s = NULL;
    rf_assert_ok(rf_kv_session_create(&s, f->model, &o, &f->err), f->err);
    rf_kv_draw draw = {.keep_logits = true};
    rf_assert_ok(rf_kv_session_set_draw(s, &draw, &f->err), f->err);
    return s;
}

/* Logits [more + 1][VOCAB] behind a prompt and behind each of tokens[len..len + more). */
static rf_kv_session_info run(fixture *f, const char *spec, int32_t budget, const int32_t *tokens, int32_t len,
                              int32_t more, float *logits) {
    rf_kv_session *s = open_session(f, spec, budget, 1, len, more);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, len, 0, 0, 0.0, &f->err), f->err);
    for (int32_t i = 0; i <= more; i++) {
        rf_assert_ok(rf_kv_session_read_logits(s, 0, logits + (int64_t)i * VOCAB, &f->err), f->err);
        if (i < more) rf_assert_ok(rf_kv_session_step(s, tokens + len + i, &f->err), f->err);
    }
    rf_kv_session_info info = rf_kv_session_get_info(s);
    rf_kv_session_destroy(s);
    return info;
}

/* Root of the mean square of what differs, over that of a. */
static double distance(const float *a, const float *b, int64_t n) {
    double off = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = (double)a[i] - (double)b[i];
        off += x * x;
        all += (double)a[i] * (double)a[i];
    }
    return sqrt(off / all);
}

static const struct {
    const char *spec;
    int32_t budget;
} whole_cases[] = {
    {"kivi:residual=128", 0},           {"kivi:residual=128,schedule=prefill", 0},
    {"mikv:high_share=1", 0},           {"minicache:high_share=1", 0},
    {"arkv:window=128,pool=none", 0},   {"zipcache:every=500,high_share=1", 0},
    {"arkv:window=100,low_bits=8", 90},
};

START_TEST(a_raw_part_that_holds_all_is_the_plain_cache) {
    enum { PROMPT = 50, MORE = 40 };
    bool zip = strncmp(whole_cases[_i].spec, "zipcache", 8) == 0;
    int32_t prompt = zip ? 30 : PROMPT; /* less than a block */
    fixture f = open_model("text-llama");
    int32_t tokens[PROMPT + MORE];
    static float want[(MORE + 1) * VOCAB], got[(MORE + 1) * VOCAB];
    draw_tokens(tokens, PROMPT + MORE, 1);
    run(&f, "none", 0, tokens, prompt, MORE, want);
    rf_kv_session_info info = run(&f, whole_cases[_i].spec, whole_cases[_i].budget, tokens, prompt, MORE, got);
    for (int32_t i = 0; i <= MORE; i++)
        ck_assert_msg(memcmp(got + i * VOCAB, want + i * VOCAB, VOCAB * sizeof *got) == 0, "%s: token %d",
                      whole_cases[_i].spec, i);
    ck_assert_int_eq(info.kept_slots, info.full_slots);
    close_model(&f);
}
END_TEST

START_TEST(more_bits_are_nearer) {
    enum { PROMPT = 70, MORE = 60 };
    static const char *const specs[] = {"kivi:bits=8", "kivi:bits=4", "kivi:bits=2"};
    static const char *const models[] = {"text-llama", "text-qwen3"};
    fixture f = open_model(models[_i]);
    int32_t tokens[PROMPT + MORE];
    static float want[(MORE + 1) * VOCAB], got[(MORE + 1) * VOCAB];
    draw_tokens(tokens, PROMPT + MORE, 2);
    run(&f, "none", 0, tokens, PROMPT, MORE, want);
    double off[3];
    size_t bytes[3];
    for (int i = 0; i < 3; i++) {
        bytes[i] = run(&f, specs[i], 0, tokens, PROMPT, MORE, got).kept_bytes;
        off[i] = distance(want + VOCAB, got + VOCAB, (int64_t)MORE * VOCAB);
        ck_assert_mem_eq(got, want, VOCAB * sizeof *got); /* the prompt itself is computed in full */
    }
    ck_assert_double_gt(off[0], 0);
    ck_assert_double_lt(off[0], 2e-2);
    ck_assert_double_lt(3 * off[0], off[1]);
    ck_assert_double_lt(1.5 * off[1], off[2]);
    ck_assert(bytes[0] > bytes[1] && bytes[1] > bytes[2]);
    close_model(&f);
}
END_TEST

/* Nearness of the other methods; 8-bit and merged forms near, and never the plain cache by accident. */
START_TEST(methods_are_near) {
    enum { PROMPT = 150, MORE = 130 };
    static const struct {
        const char *spec;
        int32_t budget;
        double most;
    } cases[] = {{"zipcache:bits=8,low_bits=8", 0, 1e-2},
                 {"zipcache", 0, 0.5},
                 {"mikv:low_bits=8", 0, 1e-2},
                 {"mikv", 0, 0.7},
                 {"arkv:high_share=0.3", 0, 6e-2},
                 {"arkv:high_share=0.3,window=8", 280, 6e-2},
                 {"minicache", 0, 0.9}};
    fixture f = open_model("text-qwen3");
    int32_t tokens[PROMPT + MORE];
    static float want[(MORE + 1) * VOCAB], got[(MORE + 1) * VOCAB];
    draw_tokens(tokens, PROMPT + MORE, 3);
    run(&f, "none", 0, tokens, PROMPT, MORE, want);
    rf_kv_session_info info = run(&f, cases[_i].spec, cases[_i].budget, tokens, PROMPT, MORE, got);
    double off = distance(want + VOCAB, got + VOCAB, (int64_t)MORE * VOCAB);
    ck_assert_double_gt(off, 1e-7);
    ck_assert_msg(off < cases[_i].most, "%s: %g", cases[_i].spec, off);
    ck_assert_int_eq(info.kept_slots, info.full_slots);
    ck_assert_uint_lt(info.kept_bytes, info.full_bytes);
    close_model(&f);
}
END_TEST

/* One layer's step against softmax in double over raw rows of the pool and unpacked tokens, from what the session holds. */
START_TEST(a_step_attends_to_raw_and_packed_tokens) {
    enum { PROMPT = 100, MORE = 40, D = 32, GROUP = Q_HEADS / KV_HEADS };
    static const struct {
        const char *spec;
        int32_t budget;
    } cases[] = {
        {"kivi", 0}, {"zipcache:every=20", 0}, {"mikv", 0}, {"arkv:window=8,high_share=0.4", 70}, {"minicache", 0}};
    fixture f = open_model("text-qwen3");
    int32_t tokens[PROMPT + MORE];
    draw_tokens(tokens, PROMPT + MORE, 4);
    rf_kv_session *s = open_session(&f, cases[_i].spec, cases[_i].budget, 1, PROMPT, MORE);
    ck_assert_int_eq(s->head_dim, D);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, PROMPT, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < MORE; i++) rf_assert_ok(rf_kv_session_step(s, tokens + PROMPT + i, &f.err), f.err);
    int layer = s->rule.action == RF_KV_SHARE ? 2 : 1;
    /* queries of the last step's last layer serve as well as any */
    rf_attention_args a = rf_kv_step_attention(s, layer, 0, 1, s->stride);
    rf_assert_ok(s->ops->attention(s->stream, &a, &f.err), f.err);
    rf_assert_ok(rf_kv_packed_attention(s, layer, 0, 1, &f.err), f.err);
    const float *q = s->step.q, *out = s->step.attn;
    static float k[MOST * D], v[MOST * D];
    int packed = 0;
    double worst = 0;
    for (int h = 0; h < KV_HEADS; h++) {
        const rf_kv_head *head = rf_kv_book_head(s->sequences[0].book, layer, h);
        int32_t num = 0;
        for (int32_t i = 0; i < head->num; i++, num++) {
            memcpy(k + num * D, (float *)(void *)s->k_pool + (int64_t)head->row[i] * D, D * sizeof *k);
            memcpy(v + num * D, (float *)(void *)s->v_pool + (int64_t)head->row[i] * D, D * sizeof *v);
        }
        for (int which = RF_KV_HIGH; which <= RF_KV_LOW; which++) {
            int32_t len = rf_kv_packed_count(s, layer, 0, h, (rf_kv_class)which), lens[KV_HEADS] = {0};
            static float all_k[KV_HEADS * MOST * D], all_v[KV_HEADS * MOST * D];
            lens[h] = len;
            if (len == 0) continue;
            rf_kvq_unpack_args u = {.store = rf_kv_packed_store(s, layer, 0, (rf_kv_class)which),
                                    .lens = lens,
                                    .units = KV_HEADS,
                                    .most = len,
                                    .k_out = all_k,
                                    .v_out = all_v,
                                    .out_dtype = RF_DTYPE_F32,
                                    .out_stride = MOST};
            rf_assert_ok(s->ops->kvq_unpack(s->stream, &u, &f.err), f.err);
            memcpy(k + num * D, all_k + h * MOST * D, (size_t)len * D * sizeof *k);
            memcpy(v + num * D, all_v + h * MOST * D, (size_t)len * D * sizeof *v);
            num += len;
            packed += len;
        }
        for (int g = h * GROUP; g < (h + 1) * GROUP; g++) {
            double z[MOST], most = -INFINITY, sum = 0, o[D] = {0};
            for (int32_t i = 0; i < num; i++) {
                z[i] = 0;
                for (int c = 0; c < D; c++) z[i] += (double)q[g * D + c] * (double)k[i * D + c];
                z[i] /= sqrt((double)D);
                most = z[i] > most ? z[i] : most;
            }
            for (int32_t i = 0; i < num; i++) sum += z[i] = exp(z[i] - most);
            for (int32_t i = 0; i < num; i++)
                for (int c = 0; c < D; c++) o[c] += z[i] / sum * (double)v[i * D + c];
            for (int c = 0; c < D; c++) worst = fmax(worst, fabs(o[c] - (double)out[g * D + c]));
            worst = fmax(worst, fabs(most + log(sum) - (double)s->step.lse[g]));
        }
    }
    ck_assert_int_gt(packed, 0);
    ck_assert_double_lt(worst, 2e-5);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* The first layer's keys are those of the plain cache: packed tokens are near those of the positions that are kept and not raw. */
START_TEST(packed_tokens_are_those_of_their_positions) {
    enum { PROMPT = 90, MORE = 100, D = 32 };
    static const struct {
        const char *spec;
        int32_t budget;
    } cases[] = {{"arkv:window=8,high_share=0.4", 50},
                 {"arkv:window=8,high_share=0.2,schedule=every,every=9", 40},
                 {"mikv:low_bits=8", 60},
                 {"zipcache:every=30,bits=8,low_bits=8", 0},
                 {"kivi:bits=8", 0}};
    fixture f = open_model("text-qwen3");
    int32_t tokens[PROMPT + MORE], positions[PROMPT + MORE], num;
    draw_tokens(tokens, PROMPT + MORE, 9);
    rf_kv_session *plain = open_session(&f, "none", 0, 1, PROMPT, MORE);
    rf_kv_session *s = open_session(&f, cases[_i].spec, cases[_i].budget, 1, PROMPT, MORE);
    rf_assert_ok(rf_kv_session_prefill(plain, 0, tokens, PROMPT, 0, 0, 0.0, &f.err), f.err);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, PROMPT, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < MORE; i++) {
        rf_assert_ok(rf_kv_session_step(plain, tokens + PROMPT + i, &f.err), f.err);
        rf_assert_ok(rf_kv_session_step(s, tokens + PROMPT + i, &f.err), f.err);
    }
    int wrong = 0, packed = 0;
    for (int h = 0; h < KV_HEADS; h++) {
        uint8_t left[PROMPT + MORE] = {0};
        const rf_kv_head *all = rf_kv_book_head(plain->sequences[0].book, 0, h);
        const rf_kv_head *raw = rf_kv_book_head(s->sequences[0].book, 0, h);
        rf_assert_ok(rf_kv_session_read_positions(s, 0, 0, h, positions, &num, &f.err), f.err);
        for (int32_t i = 0; i < num; i++) left[positions[i]] = 1;
        for (int32_t i = 0; i < raw->num; i++) left[raw->position[i]] = 0;
        for (int which = RF_KV_HIGH; which <= RF_KV_LOW; which++) {
            static float k[KV_HEADS * MOST * D], v[KV_HEADS * MOST * D];
            int32_t lens[KV_HEADS] = {0}, len = rf_kv_packed_count(s, 0, 0, h, (rf_kv_class)which);
            lens[h] = len;
            rf_kvq_unpack_args u = {.store = rf_kv_packed_store(s, 0, 0, (rf_kv_class)which),
                                    .lens = lens,
                                    .units = KV_HEADS,
                                    .most = len,
                                    .k_out = k,
                                    .v_out = v,
                                    .out_dtype = RF_DTYPE_F32,
                                    .out_stride = MOST};
            if (len > 0) rf_assert_ok(s->ops->kvq_unpack(s->stream, &u, &f.err), f.err);
            for (int32_t i = 0; i < len; i++) {
                double least = INFINITY;
                int32_t nearest = 0;
                for (int32_t j = 0; j < all->num; j++) {
                    int64_t row = (int64_t)all->row[j] * D;
                    double off = distance((float *)(void *)plain->k_pool + row, k + (h * MOST + i) * D, D) +
                                 distance((float *)(void *)plain->v_pool + row, v + (h * MOST + i) * D, D);
                    if (off < least) nearest = all->position[j];
                    if (off < least) least = off;
                }
                wrong += least > 0.1 || !left[nearest];
                left[nearest] = 0;
            }
            packed += len;
        }
        for (int32_t i = 0; i < PROMPT + MORE; i++) wrong += left[i];
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_gt(packed, 20);
    rf_kv_session_destroy(plain);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* Probabilities of raw and packed tokens are of one softmax. */
START_TEST(what_tokens_receive_adds_up_to_one) {
    enum { PROMPT = 90, MORE = 30 };
    fixture f = open_model("text-qwen3");
    int32_t tokens[PROMPT + MORE];
    draw_tokens(tokens, PROMPT + MORE, 12);
    rf_kv_session *s = open_session(&f, "arkv:window=8,high_share=0.3", 400, 1, PROMPT, MORE);
    rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, PROMPT, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < MORE; i++) rf_assert_ok(rf_kv_session_step(s, tokens + PROMPT + i, &f.err), f.err);
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < KV_HEADS; h++) {
            ck_assert_int_gt(rf_kv_packed_count(s, l, 0, h, RF_KV_LOW), 30);
            ck_assert_double_eq_tol(rf_kv_packed_received(s, l, 0, h), 1.0, 1e-4);
        }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

START_TEST(a_batch_is_its_sequences) {
    enum { BATCH = 3, MORE = 45 };
    static const struct {
        const char *spec;
        int32_t budget;
    } cases[] = {
        {"kivi", 0}, {"zipcache:every=20", 0}, {"mikv", 0}, {"arkv:window=8,high_share=0.4", 60}, {"minicache", 0}};
    static const int32_t lens[BATCH] = {70, 33, 91};
    fixture f = open_model("text-llama");
    int32_t tokens[BATCH][91 + MORE], next[BATCH];
    static float want[BATCH][(MORE + 1) * VOCAB], got[VOCAB];
    for (int b = 0; b < BATCH; b++) draw_tokens(tokens[b], lens[b] + MORE, 10 + (uint32_t)b);
    rf_kv_session *one = open_session(&f, cases[_i].spec, cases[_i].budget, 1, 91, MORE);
    for (int b = 0; b < BATCH; b++) { /* one session again and again: nothing is left behind */
        rf_assert_ok(rf_kv_session_prefill(one, 0, tokens[b], lens[b], 0, 0, 0.0, &f.err), f.err);
        for (int32_t i = 0; i <= MORE; i++) {
            rf_assert_ok(rf_kv_session_read_logits(one, 0, want[b] + i * VOCAB, &f.err), f.err);
            if (i < MORE) rf_assert_ok(rf_kv_session_step(one, tokens[b] + lens[b] + i, &f.err), f.err);
        }
    }
    rf_kv_session_destroy(one);
    rf_kv_session *s = open_session(&f, cases[_i].spec, cases[_i].budget, BATCH, 91, MORE);
    int wrong = 0;
    for (int b = 0; b < BATCH; b++)
        rf_assert_ok(rf_kv_session_prefill(s, b, tokens[b], lens[b], 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < MORE; i++) {
        for (int b = 0; b < BATCH; b++) next[b] = tokens[b][lens[b] + i];
        rf_assert_ok(rf_kv_session_step(s, next, &f.err), f.err);
        for (int b = 0; b < BATCH; b++) {
            rf_assert_ok(rf_kv_session_read_logits(s, b, got, &f.err), f.err);
            wrong += memcmp(got, want[b] + (i + 1) * VOCAB, sizeof got) != 0;
        }
    }
    ck_assert_int_eq(wrong, 0);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

/* text-llama: D 16, f32: a raw slot is 2 * 16 * 4 bytes, its row and position 8 more, a score 4 more. */
START_TEST(bytes_are_counted_by_hand) {
    enum { PROMPT = 100, MORE = 30, D = 16, UNITS = LAYERS * KV_HEADS };
    fixture f = open_model("text-llama");
    int32_t tokens[PROMPT + MORE];
    static float logits[(MORE + 1) * VOCAB];
    draw_tokens(tokens, PROMPT + MORE, 5);
    rf_kv_session_info info = run(&f, "kivi", 0, tokens, PROMPT, MORE, logits);
    /* 130 tokens: 4 blocks of 32, 2 raw. A block of 4 bits: keys 16 channels of 16 bytes, and 4 of scale and zero; values 32 tokens
     * of 8 bytes, and 4 */
    ck_assert_uint_eq(info.kept_bytes, UNITS * (4 * (16 * (16 + 4) + 32 * (8 + 4)) + 2 * (2 * D * 4 + 8)));
    ck_assert_int_eq(info.kept_slots, UNITS * 130);
    ck_assert_uint_eq(info.full_bytes, UNITS * 130 * 2 * D * 4);
    /* the pool: 32 rows a head, and 4 blocks */
    ck_assert_uint_lt(info.pool_bytes, UNITS * (32 * 2 * D * 4 + 2 * 4 * (32 * 8 + 32 * 4) + 4 * 256));

    info = run(&f, "mikv", 0, tokens, PROMPT, MORE, logits);
    /* 26 raw, 104 of 2 bits by token: 4 bytes of codes and one scale and zero for each plane; 16 factors */
    ck_assert_uint_eq(info.kept_bytes, UNITS * (104 * 2 * (4 + 4) + 26 * (2 * D * 4 + 12) + 16 * 4));

    info = run(&f, "zipcache:every=10", 0, tokens, PROMPT, MORE, logits);
    /* 130 tokens: HIGH 78 -> 64 in 4 bits, LOW 52 -> 32 in 2 bits, 34 raw; factors */
    ck_assert_uint_eq(info.kept_bytes, UNITS * (2 * (16 * (16 + 4) + 32 * (8 + 4)) + (16 * (8 + 4) + 32 * (4 + 4)) +
                                                34 * (2 * D * 4 + 12) + 16 * 4));

    info = run(&f, "arkv:window=8,high_share=0.5,alloc=uniform", 60, tokens, PROMPT, MORE, logits);
    /* 8 + 26 raw, 26 of 8 bits: 16 bytes and a scale for each plane, position and score */
    ck_assert_int_eq(info.kept_slots, UNITS * 60);
    ck_assert_uint_eq(info.kept_bytes, UNITS * (26 * (2 * (16 + 4) + 8) + 34 * (2 * D * 4 + 12)));
    ck_assert_int_eq(info.evictions, UNITS * 70);

    info = run(&f, "minicache:high_share=0", 0, tokens, PROMPT, MORE, logits);
    /* layers 1 and 2 share 100 directions of each plane, and have 100 lengths each */
    ck_assert_uint_eq(info.kept_bytes,
                      KV_HEADS * (2 * 100 * D * 4 + 2 * 2 * 100 * 4 + (130 + 2 * 30) * (2 * D * 4 + 8)));
    close_model(&f);
}
END_TEST

/* A budget that comes with a prompt is that of a session made for it, and so is one that is not asked for any more. */
START_TEST(budgets_of_prompts_are_those_of_sessions) {
    enum { PROMPT = 80, MORE = 30 };
    fixture f = open_model("text-llama");
    int32_t tokens[PROMPT + MORE];
    static float want[2][(MORE + 1) * VOCAB], got[VOCAB];
    draw_tokens(tokens, PROMPT + MORE, 8);
    rf_kv_session_info info[2];
    for (int i = 0; i < 2; i++) info[i] = run(&f, "mikv", i ? 40 : 0, tokens, PROMPT, MORE, want[i]);
    rf_kv_session *s = open_session(&f, "mikv", 0, 1, PROMPT, MORE);
    int wrong = 0;
    for (int turn = 0; turn < 4; turn++) {
        rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, PROMPT, 0, turn % 2 ? 40 : 0, 0.0, &f.err), f.err);
        for (int32_t i = 0; i <= MORE; i++) {
            rf_assert_ok(rf_kv_session_read_logits(s, 0, got, &f.err), f.err);
            wrong += memcmp(got, want[turn % 2] + i * VOCAB, sizeof got) != 0;
            if (i < MORE) rf_assert_ok(rf_kv_session_step(s, tokens + PROMPT + i, &f.err), f.err);
        }
        ck_assert_uint_eq(rf_kv_session_get_info(s).kept_bytes, info[turn % 2].kept_bytes);
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_eq(info[1].kept_slots, 40 * LAYERS * KV_HEADS);
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

START_TEST(long_outputs_hold) {
    enum { PROMPT = 12, MORE = 500 }; /* the model has 512 positions */
    static const struct {
        const char *spec;
        int32_t budget;
    } cases[] = {{"kivi:bits=2", 0},
                 {"zipcache", 0},
                 {"mikv", 0},
                 {"mikv", 64},
                 {"mikv:schedule=every", 64},
                 {"arkv:window=8", 64},
                 {"arkv:window=8,high_share=0.3,schedule=every,every=7", 64},
                 {"minicache", 0},
                 {"zipcache:schedule=step", 0}};
    fixture f = open_model("text-llama");
    int32_t positions[PROMPT + MORE], num;
    draw_tokens(positions, PROMPT, 6);
    rf_kv_session *s = open_session(&f, cases[_i].spec, cases[_i].budget, 1, PROMPT, MORE);
    rf_assert_ok(rf_kv_session_prefill(s, 0, positions, PROMPT, 0, 0, 0.0, &f.err), f.err);
    for (int32_t i = 0; i < MORE; i++) {
        int32_t token = (i * 37 + i / 7) % 288;
        rf_assert_ok(rf_kv_session_step(s, &token, &f.err), f.err);
    }
    static float logits[VOCAB];
    rf_assert_ok(rf_kv_session_read_logits(s, 0, logits, &f.err), f.err);
    int finite = 0;
    for (int i = 0; i < VOCAB; i++) finite += isfinite(logits[i]) != 0;
    ck_assert_int_eq(finite, VOCAB);
    rf_kv_session_info info = rf_kv_session_get_info(s);
    for (int l = 0; l < LAYERS; l++) {
        rf_assert_ok(rf_kv_session_read_positions(s, 0, l, 1, positions, &num, &f.err), f.err);
        int order = 0;
        for (int32_t i = 1; i < num; i++) order += positions[i] > positions[i - 1];
        ck_assert_int_eq(order, num - 1);
        ck_assert_int_eq(positions[num - 1], PROMPT + MORE - 1);
        if (cases[_i].budget == 0) ck_assert_int_eq(num, PROMPT + MORE);
        if (cases[_i].budget > 0) ck_assert_int_le(num, cases[_i].budget + 32);
    }
    ck_assert_int_eq(info.kept_slots + info.evictions, info.full_slots);
    int32_t token = 1;
    rf_assert_fails(rf_kv_session_step(s, &token, &f.err), f.err, RF_ERR_STATE, "used up");
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

START_TEST(sessions_survive_a_lack_of_memory) {
    static const char *const specs[] = {"kivi", "arkv:window=4", "mikv", "minicache"};
    fixture f = open_model("text-llama");
    rf_kv_session_options o = rf_kv_session_options_default();
    rf_assert_ok(rf_kv_rule_parse(&o.rule, specs[_i], &f.err), f.err);
    o.max_prompt = 40;
    o.max_new = 8;
    o.budget = _i == 1 ? 24 : 0;
    int32_t tokens[48];
    draw_tokens(tokens, 48, 7);
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
    ck_assert_int_gt(failures, 20);
    /* a call that fails leaves a session that takes the next prompt */
    for (uint64_t nth = 1; nth < 200; nth++) {
        rf_memory_fail_nth(nth);
        rf_status st = rf_kv_session_prefill(s, 0, tokens, 40, 0, 0, 0.0, &f.err);
        rf_memory_fail_nth(0);
        if (st != RF_OK) {
            ck_assert_int_eq(st, RF_ERR_MEMORY);
            rf_assert_fails(rf_kv_session_step(s, tokens, &f.err), f.err, RF_ERR_STATE, "no prompt");
            continue;
        }
        for (int i = 0; i < 8; i++) rf_assert_ok(rf_kv_session_step(s, tokens + 40 + i, &f.err), f.err);
    }
    rf_kv_session_destroy(s);
    close_model(&f);
}
END_TEST

START_TEST(budgets_of_what_keeps_all_are_refused) {
    static const char *const specs[] = {"kivi", "zipcache", "minicache"};
    fixture f = open_model("text-llama");
    for (int i = 0; i < 3; i++) {
        rf_kv_session_options o = rf_kv_session_options_default();
        rf_assert_ok(rf_kv_rule_parse(&o.rule, specs[i], &f.err), f.err);
        o.max_prompt = o.max_new = 20;
        rf_kv_session *s = NULL;
        o.budget = 10;
        rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_UNSUPPORTED, specs[i]);
        o.budget = 0;
        o.ratio = 0.5;
        rf_assert_fails(rf_kv_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_UNSUPPORTED, specs[i]);
        o.ratio = 1;
        rf_assert_ok(rf_kv_session_create(&s, f.model, &o, &f.err), f.err);
        int32_t tokens[4] = {1, 2, 3, 4};
        rf_assert_fails(rf_kv_session_prefill(s, 0, tokens, 4, 0, 8, 0.0, &f.err), f.err, RF_ERR_UNSUPPORTED, specs[i]);
        rf_assert_ok(rf_kv_session_prefill(s, 0, tokens, 4, 0, 0, 0.0, &f.err), f.err);
        rf_kv_session_destroy(s);
    }
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *s = suite_create("dlm/kv_packed");
    TCase *tc = tcase_create("packed");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, a_raw_part_that_holds_all_is_the_plain_cache, 0, 7);
    tcase_add_loop_test(tc, more_bits_are_nearer, 0, 2);
    tcase_add_loop_test(tc, methods_are_near, 0, 7);
    tcase_add_loop_test(tc, a_step_attends_to_raw_and_packed_tokens, 0, 5);
    tcase_add_loop_test(tc, packed_tokens_are_those_of_their_positions, 0, 5);
    tcase_add_test(tc, what_tokens_receive_adds_up_to_one);
    tcase_add_loop_test(tc, a_batch_is_its_sequences, 0, 5);
    tcase_add_test(tc, bytes_are_counted_by_hand);
    tcase_add_test(tc, budgets_of_prompts_are_those_of_sessions);
    tcase_add_loop_test(tc, long_outputs_hold, 0, 9);
    tcase_add_loop_test(tc, sessions_survive_a_lack_of_memory, 0, 4);
    tcase_add_test(tc, budgets_of_what_keeps_all_are_refused);
    suite_add_tcase(s, tc);
    return rf_run_suite(s);
}
