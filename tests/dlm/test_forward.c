/* tests/dlm/test_forward.c - the text executor on the host: golden logits of every family, the invariances of cached
 * passes, and the layer rules against their plain definition (below, in double, one row after the other). */
#include "core/memory.h"
#include "core/rng.h"
#include "core/weights.h"
#include "dlm/forward_internal.h"
#include "tests/test_util.h"

#define FIXTURE(name) RF_FIXTURE_DIR "/" name

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_text_session *s;
    rf_error err;
} fixture;

static fixture open_model(const char *name) {
    fixture f = {0};
    char dir[512];
    snprintf(dir, sizeof dir, "%s/%s", RF_FIXTURE_DIR, name);
    rf_assert_ok(rf_backend_open(&f.backend, "cpu", 1, &f.err), f.err);
    rf_assert_ok(rf_text_model_load(&f.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    return f;
}

static rf_text_session *open_session(fixture *f, const rf_text_session_options *o) {
    rf_text_session *s = NULL;
    rf_assert_ok(rf_text_session_create(&s, f->model, o, &f->err), f->err);
    return s;
}

static rf_text_session_options options(int batch, int32_t capacity) {
    rf_text_session_options o = rf_text_session_options_default();
    o.batch = batch;
    o.capacity = capacity;
    return o;
}

static void close_model(fixture *f) {
    rf_text_session_destroy(f->s);
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

enum { MAX = 64, VOCAB = 300, HIDDEN = 64, LAYERS = 3 };
static const double BOUND = 1e-5;

static void iota(int32_t *out, int32_t from, int32_t num) {
    for (int32_t i = 0; i < num; i++) out[i] = from + i;
}

/* Tokens below the special ones. */
static void draw_tokens(int32_t *out, int32_t num, uint32_t key) {
    for (int32_t i = 0; i < num; i++) {
        uint32_t counter[4] = {(uint32_t)i, key, 0, 0}, seed[2] = {7, 0}, words[4];
        rf_philox4x32(counter, seed, words);
        out[i] = (int32_t)(words[0] % 288);
    }
}

/* One sequence: rows [from, to) of tokens, all of them head rows, visible_end keys. */
typedef struct {
    rf_text_pass pass;
    int32_t rows[2 * MAX], head[2 * MAX], end[8];
} range_pass;
static void make_range(range_pass *r, const int32_t *tokens, int32_t from, int32_t to, int32_t end) {
    memset(r, 0, sizeof *r);
    r->pass = rf_text_pass_default();
    iota(r->rows, from, to - from);
    iota(r->head, 0, to - from);
    r->end[0] = end;
    r->pass.num_rows = r->pass.num_head_rows = to - from;
    r->pass.rows = r->rows;
    r->pass.tokens = tokens + from;
    r->pass.head_rows = r->head;
    r->pass.visible_end = r->end;
    r->pass.keep_logits = true;
}

static void run(fixture *f, rf_text_session *s, const rf_text_pass *pass) {
    rf_assert_ok(rf_text_session_forward(s, pass, &f->err), f->err);
}
static void run_logits(fixture *f, rf_text_session *s, const rf_text_pass *pass, float *logits) {
    run(f, s, pass);
    rf_assert_ok(rf_text_session_read_logits(s, -1, logits, &f->err), f->err);
}

/* --- the plain definition --------------------------------------------------------------------------------------------
 */

/* What is kept of every layer and position; f64. */
typedef struct {
    const rf_text_model *m;
    int q_cols, kv_cols;
    double k[LAYERS][MAX][HIDDEN], v[LAYERS][MAX][HIDDEN], q[LAYERS][MAX][2 * HIDDEN], in[LAYERS][MAX][HIDDEN];
    double attn[LAYERS][MAX][HIDDEN], ffn[LAYERS][MAX][HIDDEN];
} plain;

typedef struct {
    int num;
    const int32_t *list; /* NULL: 0..num-1 */
} plain_keys;

static plain *plain_new(const rf_text_model *m) {
    plain *p = rf_alloc_zero(1, sizeof *p);
    ck_assert_ptr_nonnull(p);
    p->m = m;
    p->q_cols = m->desc.num_q_heads * m->desc.head_dim;
    p->kv_cols = m->desc.num_kv_heads * m->desc.head_dim;
    ck_assert(p->q_cols <= 2 * HIDDEN && p->kv_cols <= HIDDEN && m->desc.num_layers == LAYERS);
    ck_assert(m->desc.hidden == HIDDEN && m->desc.vocab == VOCAB && m->desc.ffn <= 4 * HIDDEN);
    return p;
}

static void plain_norm(double *y, const double *x, const float *w, int n, double eps) {
    double sum = 0;
    for (int c = 0; c < n; c++) sum += x[c] * x[c];
    for (int c = 0; c < n; c++) y[c] = x[c] / sqrt(sum / n + eps) * (double)w[c];
}

static void plain_linear(double *y, const double *x, const void *w, const void *bias, int n, int k) {
    for (int o = 0; o < n; o++) {
        double sum = bias ? (double)((const float *)bias)[o] : 0;
        for (int c = 0; c < k; c++) sum += x[c] * (double)((const float *)w)[(size_t)o * (size_t)k + (size_t)c];
        y[o] = sum;
    }
}

static void plain_turn(const rf_text_model *m, double *head, const float *norm, int pos) {
    int d = m->desc.head_dim;
    if (norm) plain_norm(head, head, norm, d, m->desc.norm_eps);
    for (int j = 0; j < d / 2; j++) {
        double c = (double)m->rope[(pos * (d / 2) + j) * 2], s = (double)m->rope[(pos * (d / 2) + j) * 2 + 1];
        double a = head[j], b = head[j + d / 2];
        head[j] = a * c - b * s;
        head[j + d / 2] = b * c + a * s;
    }
}

/* Writes q, k, v of a position. */
static void plain_qkv(plain *p, int l, int pos, const double *x) {
    const rf_text_layer *w = &p->m->layers[l];
    double h[HIDDEN], qkv[4 * HIDDEN];
    int d = p->m->desc.head_dim;
    plain_norm(h, x, w->attention_norm, HIDDEN, p->m->desc.norm_eps);
    plain_linear(qkv, h, w->qkv, w->qkv_bias, p->q_cols + 2 * p->kv_cols, HIDDEN);
    memcpy(p->q[l][pos], qkv, (size_t)p->q_cols * sizeof *qkv);
    memcpy(p->k[l][pos], qkv + p->q_cols, (size_t)p->kv_cols * sizeof *qkv);
    memcpy(p->v[l][pos], qkv + p->q_cols + p->kv_cols, (size_t)p->kv_cols * sizeof *qkv);
    for (int c = 0; c < p->q_cols; c += d) plain_turn(p->m, p->q[l][pos] + c, w->q_norm, pos);
    for (int c = 0; c < p->kv_cols; c += d) plain_turn(p->m, p->k[l][pos] + c, w->k_norm, pos);
}

/* probs [Hq][num keys]; limit: key positions from there on are hidden. */
static void plain_probs(const plain *p, int l, int pos, plain_keys keys, int limit, double *probs) {
    int d = p->m->desc.head_dim, heads = p->m->desc.num_q_heads, group = heads / p->m->desc.num_kv_heads;
    for (int h = 0; h < heads; h++) {
        double *row = probs + h * keys.num, sum = 0;
        for (int j = 0; j < keys.num; j++) {
            int key = keys.list ? keys.list[j] : j;
            double dot = 0;
            for (int c = 0; c < d; c++) dot += p->q[l][pos][h * d + c] * p->k[l][key][h / group * d + c];
            row[j] = key < limit ? exp(dot / sqrt((double)d)) : 0;
            sum += row[j];
        }
        for (int j = 0; j < keys.num; j++) row[j] /= sum;
    }
}

static void plain_attention(const plain *p, int l, int pos, plain_keys keys, int limit, double *out) {
    static double probs[8 * MAX];
    int d = p->m->desc.head_dim, heads = p->m->desc.num_q_heads, group = heads / p->m->desc.num_kv_heads;
    ck_assert_int_le(heads, 8);
    plain_probs(p, l, pos, keys, limit, probs);
    for (int h = 0; h < heads; h++) {
        for (int c = 0; c < d; c++) {
            double sum = 0;
            for (int j = 0; j < keys.num; j++)
                sum += probs[h * keys.num + j] * p->v[l][keys.list ? keys.list[j] : j][h / group * d + c];
            out[h * d + c] = sum;
        }
    }
}

static void plain_ffn(const plain *p, int l, const double *x, double *out) {
    const rf_text_layer *w = &p->m->layers[l];
    double h[HIDDEN], both[8 * HIDDEN], act[4 * HIDDEN];
    int ffn = (int)p->m->desc.ffn;
    plain_norm(h, x, w->ffn_norm, HIDDEN, p->m->desc.norm_eps);
    plain_linear(both, h, w->gate_up, NULL, 2 * ffn, HIDDEN);
    for (int c = 0; c < ffn; c++) act[c] = both[2 * c] / (1 + exp(-both[2 * c])) * both[2 * c + 1];
    plain_linear(out, act, w->down, NULL, HIDDEN, ffn);
}

/* x += attention, x += ffn; both increments kept. q, k and v are there. */
static void plain_rest(plain *p, int l, int pos, plain_keys keys, int limit, double *x) {
    double out[2 * HIDDEN];
    plain_attention(p, l, pos, keys, limit, out);
    plain_linear(p->attn[l][pos], out, p->m->layers[l].out, NULL, HIDDEN, p->q_cols);
    for (int c = 0; c < HIDDEN; c++) x[c] += p->attn[l][pos][c];
    plain_ffn(p, l, x, p->ffn[l][pos]);
    for (int c = 0; c < HIDDEN; c++) x[c] += p->ffn[l][pos][c];
}

static void plain_embed(const plain *p, int32_t token, double *x) {
    for (int c = 0; c < HIDDEN; c++) x[c] = (double)((const float *)p->m->embedding)[token * HIDDEN + c];
}

static void plain_logits(const plain *p, const double *x, float *out) {
    double h[HIDDEN], z[VOCAB];
    plain_norm(h, x, p->m->final_norm, HIDDEN, p->m->desc.norm_eps);
    plain_linear(z, h, p->m->head, NULL, VOCAB, HIDDEN);
    for (int v = 0; v < VOCAB; v++) out[v] = (float)z[v];
}

/* --- golden logits
 * ----------------------------------------------------------------------------------------------------- */

static const char *const families[] = {"text-llama", "text-llama-tied", "text-qwen2", "text-qwen3",
                                       "text-llada", "text-dream",      "text-sdar"};
enum { NUM_FAMILIES = sizeof families / sizeof *families };

static rf_mask mask_of(const rf_text_model *m) {
    switch (m->desc.attention) {
    case RF_TEXT_CAUSAL: return RF_MASK_CAUSAL;
    case RF_TEXT_BLOCK_CAUSAL: return RF_MASK_BLOCK_CAUSAL;
    case RF_TEXT_BIDIRECTIONAL: break;
    }
    return RF_MASK_NONE;
}

typedef struct {
    rf_weights *w;
    int32_t num;
    const int32_t *tokens;
    const float *logits, *final;
} golden;
static golden open_golden(const char *family, rf_error *err) {
    golden g = {0};
    rf_tensor tokens, logits, final;
    char name[64];
    rf_assert_ok(rf_weights_open(&g.w, FIXTURE("text_forward.safetensors"), err), *err);
    snprintf(name, sizeof name, "%s.tokens", family);
    rf_assert_ok(rf_weights_get(g.w, name, &tokens, err), *err);
    snprintf(name, sizeof name, "%s.logits", family);
    rf_assert_ok(rf_weights_get(g.w, name, &logits, err), *err);
    snprintf(name, sizeof name, "%s.final", family);
    rf_assert_ok(rf_weights_get(g.w, name, &final, err), *err);
    g.num = (int32_t)tokens.shape[0];
    ck_assert(logits.shape[0] == g.num && logits.shape[1] == VOCAB && final.shape[1] == HIDDEN && g.num <= MAX);
    g.tokens = tokens.data;
    g.logits = logits.data;
    g.final = final.data;
    return g;
}

START_TEST(logits_are_those_of_the_reference) {
    static float logits[MAX * VOCAB], hidden[MAX * HIDDEN];
    fixture f = open_model(families[_i]);
    golden g = open_golden(families[_i], &f.err);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    range_pass r;
    make_range(&r, g.tokens, 0, g.num, g.num);
    r.pass.mask = mask_of(f.model);
    r.pass.mask_block = f.model->desc.block;
    run_logits(&f, f.s, &r.pass, logits);
    rf_assert_close(logits, g.logits, (size_t)g.num * VOCAB, INFINITY, BOUND);
    rf_assert_ok(rf_text_session_read_hidden(f.s, hidden, &f.err), f.err);
    rf_assert_close(hidden, g.final, (size_t)g.num * HIDDEN, INFINITY, BOUND);
    rf_weights_close(g.w);
    close_model(&f);
}
END_TEST

/* Rows one after the other, in chunks and block by block: what is cached is what would be computed. */
START_TEST(cached_decoding_is_the_uncached_forward) {
    static float logits[MAX * VOCAB];
    fixture f = open_model(families[_i]);
    if (f.model->desc.attention != RF_TEXT_BIDIRECTIONAL) {
        golden g = open_golden(families[_i], &f.err);
        rf_text_session_options o = options(1, 48);
        int32_t block = f.model->desc.attention == RF_TEXT_BLOCK_CAUSAL ? f.model->desc.block : 1;
        for (int form = 0; form < 3;
             form++) { /* single blocks; three blocks and then single ones; the other way round */
            rf_text_session *s = open_session(&f, &o);
            int32_t from = 0;
            for (int n = 0; from < g.num; n++) {
                int32_t to = from + block * (form == 0 || (form == 1) == (n > 0) ? 1 : 3);
                if (to > g.num) to = g.num;
                range_pass r;
                make_range(&r, g.tokens, from, to, to);
                r.pass.mask = mask_of(f.model);
                r.pass.mask_block = f.model->desc.block;
                run_logits(&f, s, &r.pass, logits + from * VOCAB);
                from = to;
            }
            rf_assert_close(logits, g.logits, (size_t)g.num * VOCAB, INFINITY, BOUND);
            rf_text_session_destroy(s);
        }
        rf_weights_close(g.w);
    }
    close_model(&f);
}
END_TEST

/* A prefill that asks for no logits leaves the keys and values that a pass with logits leaves; what lies behind
 * visible_end is not seen. */
START_TEST(prefill_without_head_rows) {
    static float logits[MAX * VOCAB], k[2][HIDDEN], v[2][HIDDEN];
    fixture f = open_model("text-llama");
    golden g = open_golden("text-llama", &f.err);
    rf_text_session_options o = options(1, 48);
    o.max_rows = 16;
    o.max_head_rows = 1;
    f.s = open_session(&f, &o);
    for (int32_t from = 0; from < g.num; from += 16) {
        range_pass r;
        int32_t to = from + 16 < g.num ? from + 16 : g.num;
        make_range(&r, g.tokens, from, to, to);
        r.pass.mask = RF_MASK_CAUSAL;
        r.pass.keep_logits = to == g.num;
        r.pass.num_head_rows = to == g.num;
        r.head[0] = to - from - 1;
        run(&f, f.s, &r.pass);
    }
    rf_assert_ok(rf_text_session_read_logits(f.s, 0, logits, &f.err), f.err);
    rf_assert_close(logits, g.logits + (g.num - 1) * VOCAB, VOCAB, INFINITY, BOUND);
    /* keys of the last layer, from a session whose passes compute everything */
    rf_text_session_options o2 = options(1, 48);
    rf_text_session *s = open_session(&f, &o2);
    range_pass r;
    make_range(&r, g.tokens, 0, g.num, 48); /* keys behind are hidden by the mask */
    r.pass.mask = RF_MASK_CAUSAL;
    run_logits(&f, s, &r.pass, logits);
    rf_assert_close(logits, g.logits, (size_t)g.num * VOCAB, INFINITY, BOUND);
    size_t cols = (size_t)f.s->kv_cols;
    rf_assert_ok(rf_text_session_read_kv(f.s, LAYERS - 1, 0, 21, k[0], v[0], &f.err), f.err);
    rf_assert_ok(rf_text_session_read_kv(s, LAYERS - 1, 0, 21, k[1], v[1], &f.err), f.err);
    rf_assert_close(k[0], k[1], cols, INFINITY, BOUND);
    rf_assert_close(v[0], v[1], cols, INFINITY, BOUND);
    rf_text_session_destroy(s);
    rf_weights_close(g.w);
    close_model(&f);
}
END_TEST

/* --- rows ------------------------------------------------------------------------------------------------------------
 */

/* Any subset of rows, keys fresh: their rows of the full forward, with and without padding rows and whatever order the
 * head rows are asked in. */
START_TEST(a_subset_of_rows_is_those_rows) {
    static float logits[MAX * VOCAB], want[MAX * VOCAB];
    static const char *const names[] = {"text-llada", "text-dream"};
    fixture f = open_model(names[_i]);
    golden g = open_golden(names[_i], &f.err);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    range_pass r;
    make_range(&r, g.tokens, 0, g.num, g.num);
    run(&f, f.s, &r.pass);
    static const int32_t subset[] = {0, 3, 4, 11, 17, 30, 39}, order[] = {5, 0, 6, 6, -1, 2};
    enum { N = sizeof subset / sizeof *subset, H = sizeof order / sizeof *order };
    for (int32_t padding = 0; padding < 4; padding += 3) {
        int32_t rows[N + 3], tokens[N + 3], end = g.num;
        for (int32_t i = 0; i < N + padding; i++) {
            rows[i] = i < N ? subset[i] : -1;
            tokens[i] = i < N ? g.tokens[subset[i]] : -1;
        }
        rf_text_pass pass = rf_text_pass_default();
        pass.num_rows = N + padding;
        pass.rows = rows;
        pass.tokens = tokens;
        pass.visible_end = &end;
        pass.num_head_rows = H;
        pass.head_rows = order;
        pass.keep_logits = true;
        run_logits(&f, f.s, &pass, logits);
        for (int i = 0; i < H; i++) {
            if (order[i] < 0) continue;
            memcpy(want + i * VOCAB, g.logits + subset[order[i]] * VOCAB, VOCAB * sizeof *want);
            rf_assert_close(logits + i * VOCAB, want + i * VOCAB, VOCAB, INFINITY, BOUND);
        }
        float one[VOCAB];
        rf_assert_ok(rf_text_session_read_logits(f.s, 2, one, &f.err), f.err);
        ck_assert(memcmp(one, logits + 2 * VOCAB, sizeof one) == 0);
    }
    rf_weights_close(g.w);
    close_model(&f);
}
END_TEST

/* Rows that are not listed as visible might as well not exist: a window over far positions. */
START_TEST(a_list_of_visible_rows) {
    static float logits[MAX * VOCAB], want[MAX * VOCAB];
    static const int32_t list[] = {2, 3, 5, 8, 13, 21, 34};
    enum { N = sizeof list / sizeof *list };
    fixture f = open_model("text-dream");
    int32_t all[MAX], tokens[N], head[N];
    draw_tokens(all, 40, 1);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    range_pass r;
    make_range(&r, all, 0, 40, 40);
    run(&f, f.s, &r.pass); /* the cache is full of rows that must not be seen */
    rf_text_pass pass = rf_text_pass_default();
    for (int i = 0; i < N; i++) tokens[i] = all[list[i]];
    iota(head, 0, N);
    pass.num_rows = pass.num_head_rows = pass.num_visible = N;
    pass.rows = pass.visible = list;
    pass.tokens = tokens;
    pass.head_rows = head;
    pass.keep_logits = true;
    run_logits(&f, f.s, &pass, logits);

    plain *p = plain_new(f.model);
    static double x[N][HIDDEN];
    plain_keys keys = {N, list};
    for (int i = 0; i < N; i++) plain_embed(p, tokens[i], x[i]);
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < N; i++) plain_qkv(p, l, list[i], x[i]);
        for (int i = 0; i < N; i++) plain_rest(p, l, list[i], keys, MAX, x[i]);
    }
    for (int i = 0; i < N; i++) plain_logits(p, x[i], want + i * VOCAB);
    rf_assert_close(logits, want, N * VOCAB, INFINITY, BOUND);

    /* under a mask the list is cut by position: with CAUSAL row 3 sees the list's first four */
    pass.mask = RF_MASK_CAUSAL;
    pass.num_rows = pass.num_head_rows = 1;
    pass.rows = list + 3;
    pass.tokens = tokens + 3;
    int64_t before = rf_text_session_get_info(f.s).key_reads;
    run_logits(&f, f.s, &pass, logits);
    ck_assert_int_eq(rf_text_session_get_info(f.s).key_reads - before, 4);
    rf_free(p);
    close_model(&f);
}
END_TEST

/* Three sequences of different lengths: what each gives alone. */
START_TEST(a_batch_is_its_sequences) {
    static float logits[3 * MAX * VOCAB], alone[MAX * VOCAB];
    static const int32_t lengths[3] = {17, 40, 5};
    enum { N = 40 };
    const char *name = _i == 0 ? "text-llada" : "text-llama";
    fixture f = open_model(name);
    rf_text_session_options o = options(3, 48), o1 = options(1, 48);
    f.s = open_session(&f, &o);
    rf_text_session *single = open_session(&f, &o1);
    static int32_t all[3][MAX], rows[3][N], tokens[3][N], head[3][N];
    for (int b = 0; b < 3; b++) draw_tokens(all[b], N, (uint32_t)b);
    /* first pass: everything; second: up to two rows each at the end, a padding row for one of them */
    for (int second = 0; second < 2; second++) {
        int32_t n = second ? 2 : N;
        rf_text_pass pass = rf_text_pass_default();
        int32_t *flat_rows = &rows[0][0], *flat_tokens = &tokens[0][0], *flat_head = &head[0][0];
        for (int b = 0; b < 3; b++) {
            int32_t from = second ? lengths[b] - (b == 1 ? 1 : 2) : 0;
            if (second) all[b][lengths[b] - 1] = 100 + b; /* something has changed */
            for (int32_t i = 0; i < n; i++) {
                bool real = from + i < lengths[b];
                flat_rows[b * n + i] = real ? from + i : -1;
                flat_tokens[b * n + i] = real ? all[b][from + i] : -1;
                flat_head[b * n + i] = real ? i : -1;
            }
        }
        pass.num_rows = pass.num_head_rows = n;
        pass.rows = flat_rows;
        pass.tokens = flat_tokens;
        pass.head_rows = flat_head;
        pass.visible_end = lengths;
        pass.mask = mask_of(f.model);
        pass.keep_logits = true;
        run_logits(&f, f.s, &pass, logits);
    }
    for (int b = 0; b < 3; b++) {
        for (int second = 0; second < 2; second++) {
            int32_t from = second ? lengths[b] - (b == 1 ? 1 : 2) : 0, keep = all[b][lengths[b] - 1];
            if (!second) draw_tokens(all[b], N, (uint32_t)b);
            range_pass r;
            make_range(&r, all[b], from, lengths[b], lengths[b]);
            r.pass.mask = mask_of(f.model);
            run_logits(&f, single, &r.pass, alone);
            if (!second) all[b][lengths[b] - 1] = keep;
        }
        int32_t num = b == 1 ? 1 : 2;
        rf_assert_close(logits + b * 2 * VOCAB, alone, (size_t)num * VOCAB, INFINITY, BOUND);
    }
    rf_text_session_destroy(single);
    close_model(&f);
}
END_TEST

/* Guided pairs: z = u + cfg (c - u), statistics of the combination. */
START_TEST(guidance_combines_pairs) {
    enum { N = 20, H = 3 };
    static float logits[4 * H * VOCAB], plain_z[4 * H * VOCAB], want[VOCAB];
    fixture f = open_model("text-llada");
    rf_text_session_options o = options(4, 24);
    f.s = open_session(&f, &o);
    int32_t rows[4 * N], tokens[4 * N], ends[4] = {N, N, N, N}, head[4 * H];
    for (int b = 0; b < 4; b++) {
        iota(rows + b * N, 0, N);
        draw_tokens(tokens + b * N, N, (uint32_t)(b / 2));
        for (int i = 0; b % 2 == 0 && i < 10; i++) tokens[b * N + i] = f.model->desc.mask_id;
        for (int i = 0; i < H; i++) head[b * H + i] = 11 + 3 * i;
    }
    rf_text_pass pass = rf_text_pass_default();
    pass.num_rows = N;
    pass.rows = rows;
    pass.tokens = tokens;
    pass.visible_end = ends;
    pass.num_head_rows = H;
    pass.head_rows = head;
    pass.keep_logits = true;
    run_logits(&f, f.s, &pass, plain_z);
    pass.cfg = 2.5f;
    run_logits(&f, f.s, &pass, logits);
    rf_token_stats stats[4 * H];
    rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
    for (int pair = 0; pair < 2; pair++) {
        for (int i = 0; i < H; i++) {
            const float *u = plain_z + (2 * pair * H + i) * VOCAB, *c = u + H * VOCAB;
            int best = 0;
            for (int v = 0; v < VOCAB; v++) want[v] = u[v] + 2.5f * (c[v] - u[v]);
            for (int v = 0; v < VOCAB; v++) best = want[v] > want[best] ? v : best;
            for (int b = 2 * pair; b < 2 * pair + 2; b++) {
                rf_assert_close(logits + (b * H + i) * VOCAB, want, VOCAB, INFINITY, BOUND);
                ck_assert_int_eq(stats[b * H + i].best, best);
            }
        }
    }
    close_model(&f);
}
END_TEST

/* Statistics are those of the kept logits; keys default to positions, so that a row's draw does not depend on the pass
 * it is in. */
START_TEST(statistics_are_of_the_logits) {
    enum { N = 12 };
    static float logits[N * VOCAB];
    rf_token_stats stats[N], again[1];
    fixture f = open_model("text-llada");
    golden g = open_golden("text-llada", &f.err);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    range_pass r;
    int32_t refs[N];
    make_range(&r, g.tokens, 0, N, N);
    draw_tokens(refs, N, 9);
    r.pass.head_refs = refs;
    r.pass.num_bans = 2;
    run_logits(&f, f.s, &r.pass, logits);
    r.pass.bans[0] = (int32_t)(f.model->desc.mask_id);
    r.pass.bans[1] = 0;
    for (int v = 0; v < VOCAB; v++) r.pass.bans[1] = logits[v] > logits[r.pass.bans[1]] ? v : r.pass.bans[1];
    run_logits(&f, f.s, &r.pass, logits);
    rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
    ck_assert_int_ne(stats[0].best, r.pass.bans[1]);
    for (int i = 0; i < N; i++) {
        const float *z = logits + i * VOCAB;
        double sum = 0, top = -INFINITY;
        int best = -1;
        for (int v = 0; v < VOCAB; v++) {
            if (v == r.pass.bans[0] || v == r.pass.bans[1]) continue;
            sum += exp((double)z[v]);
            if ((double)z[v] > top) best = v, top = (double)z[v];
        }
        ck_assert_int_eq(stats[i].best, best);
        ck_assert_int_eq(stats[i].id, best);
        ck_assert_double_eq_tol((double)stats[i].best_prob, exp(top) / sum, 1e-5);
        ck_assert_double_eq_tol((double)stats[i].lse, log(sum), 1e-4);
        ck_assert_double_eq_tol((double)stats[i].ref_prob, exp((double)z[refs[i]]) / sum, 1e-5);
    }
    float lse = stats[3].lse, scaled = 0;
    r.pass.num_bans = 0;
    r.pass.logit_scale = 0.5f;
    run_logits(&f, f.s, &r.pass, logits);
    rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
    for (int v = 0; v < VOCAB; v++) scaled += expf(0.5f * logits[3 * VOCAB + v]);
    ck_assert_double_eq_tol((double)stats[3].lse, log((double)scaled), 1e-4);
    ck_assert_double_gt(fabs((double)(stats[3].lse - lse)), 1e-2);
    r.pass.temperature = 1.3f;
    r.pass.seed = 5;
    r.pass.step = 3;
    run(&f, f.s, &r.pass);
    rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
    int32_t last = N - 1 - 5; /* the same position in a pass of other rows */
    int changed = 0;
    for (int i = 0; i < N; i++) changed += stats[i].id != stats[i].best;
    ck_assert_int_gt(changed, 0);
    r.pass.num_head_rows = 1;
    r.pass.head_rows = &last;
    r.pass.rows += 5;
    r.pass.tokens += 5;
    r.pass.num_rows -= 5;
    run(&f, f.s, &r.pass);
    rf_assert_ok(rf_text_session_read_stats(f.s, again, &f.err), f.err);
    ck_assert_int_eq(again[0].id, stats[N - 1].id);
    int32_t draws = 0;
    for (r.pass.step = 4; r.pass.step < 40; r.pass.step++) {
        run(&f, f.s, &r.pass);
        rf_assert_ok(rf_text_session_read_stats(f.s, again, &f.err), f.err);
        draws += again[0].id != stats[N - 1].id;
    }
    ck_assert_int_gt(draws, 0);
    rf_weights_close(g.w);
    close_model(&f);
}
END_TEST

/* --- attention reuse
 * --------------------------------------------------------------------------------------------------- */

enum { EXT_N = 8, EXT_END = 40 };
typedef struct {
    int32_t inside_begin, inside_end;
    bool listed;
} ext_case;
static const ext_case ext_cases[] = {{32, 40, false}, {0, 8, false},  {0, 40, false}, {16, 24, false},
                                     {16, 24, true},  {32, 40, true}, {0, 40, true},  {40, 48, false}};

/* All rows fresh: plain attention, also with an empty side. Reused unchanged: the same again. Other keys outside: rows
 * that are reused do not notice, fresh ones do; keys inside are always looked at. */
START_TEST(external_attention) {
    static float want[EXT_N * VOCAB], got[EXT_N * VOCAB], fresh_want[EXT_N * VOCAB];
    const ext_case *c = &ext_cases[_i];
    fixture f = open_model("text-dream");
    rf_text_session_options o = options(1, 48);
    o.external_slots = 12;
    f.s = open_session(&f, &o);
    int32_t tokens[MAX], visible[MAX], num_visible = 0, slots[EXT_N], all[EXT_N];
    draw_tokens(tokens, MAX, 3);
    range_pass whole, r;
    make_range(&whole, tokens, 0, EXT_END, EXT_END);
    run(&f, f.s, &whole.pass);
    int32_t begin = c->inside_begin < EXT_END ? c->inside_begin : 8;
    make_range(&r, tokens, begin, begin + EXT_N, EXT_END);
    for (int32_t j = 0; j < EXT_END; j++)
        if (j % 5 != 2 || (j >= begin && j < begin + EXT_N)) visible[num_visible++] = j;
    if (c->listed) {
        r.pass.visible = visible;
        r.pass.num_visible = num_visible;
    }
    for (int32_t i = 0; i < EXT_N; i++) slots[i] = (i * 5 + 3) % 12;
    iota(all, 0, EXT_N);
    run_logits(&f, f.s, &r.pass, want);

    r.pass.inside_begin = c->inside_begin;
    r.pass.inside_end = c->inside_end;
    r.pass.external = RF_EXTERNAL_USE;
    r.pass.external_slot = slots;
    rf_assert_fails(rf_text_session_forward(f.s, &r.pass, &f.err), f.err, RF_ERR_ARGUMENT, "never filled");
    r.pass.fresh = all;
    r.pass.num_fresh = EXT_N;
    rf_text_session_reset_counts(f.s);
    run_logits(&f, f.s, &r.pass, got);
    rf_assert_close(got, want, EXT_N * VOCAB, INFINITY, BOUND);
    int64_t keys = c->listed ? num_visible : EXT_END, inside = 0;
    for (int32_t j = 0; j < keys; j++) {
        int32_t key = c->listed ? visible[j] : j;
        inside += key >= c->inside_begin && key < c->inside_end;
    }
    ck_assert_int_eq(rf_text_session_get_info(f.s).key_reads, EXT_N * keys);
    r.pass.num_fresh = 0;
    run_logits(&f, f.s, &r.pass, got);
    rf_assert_close(got, want, EXT_N * VOCAB, INFINITY, BOUND);
    ck_assert_int_eq(rf_text_session_get_info(f.s).key_reads, EXT_N * keys + EXT_N * inside);
    ck_assert_int_eq(rf_text_session_get_info(f.s).row_passes, 2 * EXT_N);

    /* other tokens outside the block (the rows themselves stay) */
    for (int32_t j = 0; j < EXT_END; j++)
        if (j < begin || j >= begin + EXT_N) tokens[j] = (tokens[j] + 31) % 288;
    run(&f, f.s, &whole.pass);
    run_logits(&f, f.s, &r.pass, got); /* the block's keys back in place */
    if (inside == keys)                /* all of it is new */
        ck_assert_double_gt(rf_compare_f32(got, want, EXT_N * VOCAB).rel_l2, 1e-3);
    else /* only the block itself is looked at, or nothing */
        rf_assert_close(got, want, EXT_N * VOCAB, INFINITY, BOUND);
    r.pass.external = RF_EXTERNAL_NONE;
    run_logits(&f, f.s, &r.pass, fresh_want);
    ck_assert_double_gt(rf_compare_f32(fresh_want, want, EXT_N * VOCAB).rel_l2, 1e-3);
    r.pass.external = RF_EXTERNAL_USE;
    r.pass.num_fresh = EXT_N;
    run_logits(&f, f.s, &r.pass, got);
    rf_assert_close(got, fresh_want, EXT_N * VOCAB, INFINITY, BOUND);
    close_model(&f);
}
END_TEST

/* In one layer, rows are independent of one another given the keys: some fresh, some reused, each is what it says. */
START_TEST(external_rows_may_mix_ages) {
    static float old[EXT_N * VOCAB], new[EXT_N * VOCAB], got[EXT_N * VOCAB];
    fixture f = open_model("text-dream");
    f.model->desc.num_layers = 1; /* the first layer alone */
    rf_text_session_options o = options(1, 48);
    o.external_slots = EXT_N;
    f.s = open_session(&f, &o);
    int32_t tokens[MAX], slots[EXT_N], all[EXT_N];
    static const int32_t some[] = {1, 6, 7};
    draw_tokens(tokens, MAX, 4);
    iota(slots, 0, EXT_N);
    iota(all, 0, EXT_N);
    range_pass whole, r;
    make_range(&whole, tokens, 0, 32, 40);
    make_range(&r, tokens, 32, 40, 40);
    run(&f, f.s, &whole.pass);
    r.pass.external = RF_EXTERNAL_USE;
    r.pass.external_slot = slots;
    r.pass.inside_begin = 32;
    r.pass.inside_end = 40;
    r.pass.fresh = all;
    r.pass.num_fresh = EXT_N;
    run_logits(&f, f.s, &r.pass, old);
    for (int32_t j = 0; j < 32; j++) tokens[j] = (tokens[j] + 31) % 288;
    run(&f, f.s, &whole.pass);
    r.pass.fresh = some;
    r.pass.num_fresh = 3;
    run_logits(&f, f.s, &r.pass, got);
    r.pass.fresh = all;
    r.pass.num_fresh = EXT_N;
    run_logits(&f, f.s, &r.pass, new);
    for (int i = 0; i < EXT_N; i++) {
        bool fresh = i == 1 || i == 6 || i == 7;
        rf_assert_close(got + i * VOCAB, (fresh ? new : old) + i * VOCAB, VOCAB, INFINITY, BOUND);
        ck_assert_double_gt(rf_compare_f32(new + i *VOCAB, old + i * VOCAB, VOCAB).rel_l2, 1e-3);
    }
    f.model->desc.num_layers = LAYERS;
    close_model(&f);
}
END_TEST

/* --- drift
 * ------------------------------------------------------------------------------------------------------------- */

enum { DRIFT_L = 36, DRIFT_PROMPT = 12, BETA = 6 };

typedef struct {
    int32_t rows[MAX], tokens[MAX], window[MAX], head[MAX], all[MAX], all_tokens[MAX], num, num_window;
    uint8_t decoded[MAX];
    int32_t tracked[LAYERS], next_tracked[LAYERS], expanded_at;
    double drift[LAYERS];
    double threshold;
    bool over_heads;
    int32_t force_from;
} drift_step;

static double cosine(const double *a, const double *b, int num, int stride) {
    double ab = 0, aa = 0, bb = 0;
    for (int i = 0; i < num; i++) {
        ab += a[i * stride] * b[i * stride];
        aa += a[i * stride] * a[i * stride];
        bb += b[i * stride] * b[i * stride];
    }
    return ab / fmax(sqrt(aa) * sqrt(bb), 1e-8);
}

/* Section 5.2 of the method's description, word for word; keys are all `num_all` rows. Logits of the window rows. */
static void plain_drift(plain *p, drift_step *st, plain_keys keys, int32_t num_all, float *logits) {
    static double x[MAX][HIDDEN], old[8 * MAX], new[8 * MAX], probs[8 * MAX];
    int32_t pos[MAX], window[MAX], num = st->num, restart = st->force_from < 0 ? LAYERS : st->force_from;
    bool full = st->num == num_all, everything = full;
    int heads = p->m->desc.num_q_heads;
    memcpy(pos, st->rows, sizeof pos);
    memcpy(window, st->window, sizeof window);
    for (int i = 0; i < num; i++) plain_embed(p, st->tokens[i], x[i]);
    st->expanded_at = -1;
    for (int l = 0; l < LAYERS; l++) {
        st->drift[l] = NAN;
        if (l == restart && !full) {
            static double wide[MAX][HIDDEN];
            for (int j = 0; j < num_all; j++) {
                memcpy(wide[j], p->in[l][st->all[j]], sizeof wide[j]);
                if (l == 0) plain_embed(p, st->all_tokens[j], wide[j]);
                for (int i = 0; i < num; i++)
                    if (pos[i] == st->all[j]) memcpy(wide[j], x[i], sizeof wide[j]);
                for (int i = 0; i < st->num_window; i++)
                    if (st->rows[st->window[i]] == st->all[j]) window[i] = j;
            }
            memcpy(x, wide, sizeof x);
            memcpy(pos, st->all, sizeof pos);
            num = num_all;
            everything = true;
            st->expanded_at = l - 1;
        }
        for (int i = 0; i < num; i++) memcpy(p->in[l][pos[i]], x[i], sizeof x[i]);
        int32_t t = st->tracked[l];
        if (!everything && t >= 0) plain_probs(p, l, t, keys, MAX, old);
        for (int i = 0; i < num; i++) plain_qkv(p, l, pos[i], x[i]);
        if (!everything && t >= 0) {
            plain_probs(p, l, t, keys, MAX, new);
            double sum = 0;
            if (st->over_heads)
                for (int j = 0; j < keys.num; j++) sum += cosine(old + j, new + j, heads, keys.num) / keys.num;
            else
                for (int h = 0; h < heads; h++)
                    sum += cosine(old + h * keys.num, new + h *keys.num, keys.num, 1) / heads;
            st->drift[l] = sum;
            if (sum < st->threshold && l + 1 < restart) restart = l + 1;
        }
        double best = -1;
        st->next_tracked[l] = -1;
        static double mass[MAX];
        memset(mass, 0, sizeof mass);
        for (int i = 0; i < st->num_window; i++) {
            plain_probs(p, l, pos[window[i]], keys, MAX, probs);
            for (int e = 0; e < heads * keys.num; e++) mass[e % keys.num] += probs[e];
        }
        for (int j = 0; j < keys.num; j++) {
            int key = keys.list ? keys.list[j] : j;
            if (st->decoded[key] && mass[j] > best) best = mass[j], st->next_tracked[l] = key;
        }
        for (int i = 0; i < num; i++) plain_rest(p, l, pos[i], keys, MAX, x[i]);
    }
    for (int i = 0; i < st->num_window; i++) plain_logits(p, x[window[i]], logits + i * VOCAB);
}

/* A decoding loop whose window commits two fixed tokens a step; every step must be the definition's, decided early and
 * late. */
static void drift_loop(bool late, bool over_heads, bool listed, double threshold, int32_t force_from,
                       int counts[LAYERS + 1]) {
    static float got[MAX * VOCAB], want[MAX * VOCAB];
    fixture f = open_model("text-llada");
    rf_text_session_options o = options(1, 40);
    o.keep_inputs = true;
    f.s = open_session(&f, &o);
    f.s->decides_late = late;
    plain *p = plain_new(f.model);
    drift_step st = {.threshold = threshold, .over_heads = over_heads, .force_from = -1};
    int32_t canvas[MAX], visible[MAX], num_all = 0, end = DRIFT_L, committed[2] = {-1, -1},
                                       mask = f.model->desc.mask_id;
    draw_tokens(canvas, DRIFT_L, 21);
    for (int j = DRIFT_PROMPT; j < DRIFT_L; j++) canvas[j] = mask;
    for (int j = 0; j < DRIFT_L; j++)
        if (!listed || j % 7 != 1) visible[num_all++] = j;
    plain_keys keys = {num_all, listed ? visible : NULL};
    for (int l = 0; l < LAYERS; l++) st.tracked[l] = -1;
    memset(counts, 0, (LAYERS + 1) * sizeof *counts);
    int64_t row_layers = 0;
    for (int step = 0; step < 7; step++) {
        st.num = st.num_window = 0;
        int masks = 0;
        for (int j = 0; j < num_all; j++) {
            int32_t pos = visible[j];
            bool is_mask = canvas[pos] == mask, in_window = is_mask && masks < BETA, tracked = false;
            masks += is_mask;
            for (int l = 0; l < LAYERS; l++) tracked |= st.tracked[l] == pos;
            st.all[j] = pos;
            st.all_tokens[j] = canvas[pos];
            st.decoded[pos] = !is_mask;
            if (step > 0 && !in_window && !tracked && pos != committed[0] && pos != committed[1]) continue;
            if (in_window) st.window[st.num_window++] = st.num;
            st.rows[st.num] = pos;
            st.tokens[st.num++] = canvas[pos];
        }
        st.force_from = step == 3 ? force_from : -1;
        plain_drift(p, &st, keys, num_all, want);

        rf_text_pass pass = rf_text_pass_default();
        pass.num_rows = st.num;
        pass.rows = st.rows;
        pass.tokens = st.tokens;
        pass.visible_end = &end;
        if (listed) {
            pass.visible = visible;
            pass.num_visible = num_all;
        }
        pass.num_head_rows = st.num_window;
        pass.head_rows = st.window;
        pass.keep_logits = true;
        pass.layers = RF_PASS_DRIFT;
        pass.drift.threshold = threshold;
        pass.drift.over_heads = over_heads;
        pass.drift.tracked = st.tracked;
        pass.drift.window = st.window;
        pass.drift.num_window = st.num_window;
        pass.drift.decoded = st.decoded;
        pass.drift.force_from = st.force_from;
        pass.drift.all_rows = st.all;
        pass.drift.all_tokens = st.all_tokens;
        pass.drift.num_all = num_all;
        uint64_t syncs = rf_backend_get_counts(f.backend).num_syncs;
        run_logits(&f, f.s, &pass, got);
        rf_assert_close(got, want, (size_t)st.num_window * VOCAB, INFINITY, 2 * BOUND);
        int32_t tracked[LAYERS], expanded_at;
        float drift[LAYERS];
        rf_assert_ok(rf_text_session_read_drift(f.s, tracked, drift, &expanded_at, &f.err), f.err);
        ck_assert_int_eq(expanded_at, st.expanded_at);
        bool all = st.force_from == 0 || step == 0;
        if (late && expanded_at < 0) ck_assert_uint_le(rf_backend_get_counts(f.backend).num_syncs - syncs, 1);
        int few = all ? 0 : expanded_at < 0 ? LAYERS : expanded_at + 1;
        row_layers += few * st.num + (LAYERS - few) * num_all;
        counts[expanded_at + 1]++;
        for (int l = 0; l < LAYERS; l++) {
            ck_assert_int_eq(tracked[l], st.next_tracked[l]);
            ck_assert_int_ge(tracked[l], 0);
            ck_assert_int_eq(isnan(drift[l]), isnan(st.drift[l]));
            if (!isnan(drift[l])) ck_assert_double_eq_tol((double)drift[l], st.drift[l], 1e-5);
            st.tracked[l] = tracked[l];
        }
        committed[0] = st.rows[st.window[1]];
        committed[1] = st.rows[st.window[st.num_window - 1]];
        canvas[committed[0]] = 40 + step;
        canvas[committed[1]] = 140 + 3 * step;
    }
    rf_text_session_info info = rf_text_session_get_info(f.s);
    ck_assert_int_eq(info.row_passes, (row_layers + 1) / LAYERS);
    ck_assert_int_eq(info.num_passes, 7);
    rf_free(p);
    close_model(&f);
}

START_TEST(drift_passes_follow_the_definition) {
    int counts[LAYERS + 1];
    bool late = _i & 1, over_heads = _i & 2, listed = _i & 4;
    drift_loop(late, over_heads, listed, -1.0, -1, counts); /* never */
    ck_assert_int_eq(counts[0], 7);
    drift_loop(late, over_heads, listed, 1.5, -1, counts); /* always, behind the first layer */
    ck_assert_int_eq(counts[1], 6);
    int total[LAYERS + 1] = {0};
    for (int i = 0; i < 2; i++) { /* sometimes, behind this layer or that */
        drift_loop(late, over_heads, listed, i == 0 ? 0.86 : 0.94, -1, counts);
        for (int l = 0; l <= LAYERS; l++) total[l] += counts[l];
    }
    printf("expansions: none %d, behind layer 0 %d, 1 %d\n", total[0], total[1], total[2]);
    ck_assert(total[0] > 2 && total[1] > 0 && total[2] > 0 && total[3] == 0);
    for (int32_t force = 0; force < LAYERS; force++) {
        drift_loop(late, over_heads, listed, -1.0, force, counts);
        ck_assert_int_eq(counts[force], force == 0 ? 7 : 1);
    }
}
END_TEST

/* --- verify
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    double ratio;
    bool store;
    int32_t full_layers, begin, end;
} verify_step;

static void plain_verify(plain *p, const verify_step *st, const int32_t *rows, const int32_t *tokens, int num,
                         plain_keys keys, float *logits) {
    static double x[MAX][HIDDEN];
    for (int i = 0; i < num; i++) plain_embed(p, tokens[i], x[i]);
    for (int l = 0; l < LAYERS; l++) {
        bool computed[MAX];
        int segment = 0;
        for (int i = 0; i < num; i++) {
            computed[i] = st->store || l < st->full_layers || rows[i] < st->begin || rows[i] >= st->end;
            segment += !computed[i];
        }
        if (segment > 0 && st->ratio > 0) {
            static double saved[3][2 * HIDDEN];
            double change[MAX];
            for (int i = 0; i < num; i++) {
                change[i] = INFINITY;
                if (computed[i]) continue;
                double *q = p->q[l][rows[i]], *k = p->k[l][rows[i]], *v = p->v[l][rows[i]];
                memcpy(saved[0], q, sizeof p->q[l][0]);
                memcpy(saved[1], k, sizeof p->k[l][0]);
                memcpy(saved[2], v, sizeof p->v[l][0]);
                plain_qkv(p, l, rows[i], x[i]);
                change[i] = cosine(v, saved[2], p->kv_cols, 1);
                memcpy(q, saved[0], sizeof p->q[l][0]);
                memcpy(k, saved[1], sizeof p->k[l][0]);
            }
            for (int n = (int)floor(st->ratio * segment); n > 0; n--) {
                int least = -1;
                for (int i = 0; i < num; i++)
                    if (!computed[i] && (least < 0 || change[i] < change[least])) least = i;
                computed[least] = true;
            }
        }
        for (int i = 0; i < num; i++)
            if (computed[i]) plain_qkv(p, l, rows[i], x[i]);
        for (int i = 0; i < num; i++) {
            if (computed[i])
                plain_rest(p, l, rows[i], keys, MAX, x[i]);
            else
                for (int c = 0; c < HIDDEN; c++) x[i][c] += p->attn[l][rows[i]][c] + p->ffn[l][rows[i]][c];
        }
    }
    for (int i = 0; i < num; i++) plain_logits(p, x[i], logits + i * VOCAB);
}

/* A prompt that is recomputed now and then, a response that is verified. */
START_TEST(verify_passes_follow_the_definition) {
    static float got[MAX * VOCAB], want[MAX * VOCAB], full[MAX * VOCAB];
    static const double ratios[] = {0.25, 0.5, 1.0, 0.0, 0.01};
    enum { P = 10, L = 34, G = L - P };
    double ratio = ratios[_i];
    fixture f = open_model("text-dream"); /* biases in the values */
    rf_text_session_options o = options(1, 40);
    o.keep_increments = true;
    f.s = open_session(&f, &o);
    plain *p = plain_new(f.model);
    int32_t canvas[MAX], rows[MAX], head[MAX], end = L;
    draw_tokens(canvas, L, 5);
    for (int j = P; j < L; j++) canvas[j] = f.model->desc.mask_id;
    iota(rows, 0, L);
    iota(head, 0, L);
    int64_t row_layers = 0;
    for (int step = 0; step < 7; step++) {
        /* the first layer's values change with the tokens alone: the rest would be ties that rounding decides */
        int32_t full_layers_of[] = {1, 1, 2, 1, ratio == 0 || ratio == 1 ? 0 : 1, 1, 1};
        verify_step st = {
            .ratio = ratio, .store = step == 0 || step == 5, .full_layers = full_layers_of[step], .begin = P, .end = L};
        int from = step == 0 || step == 3 ? 0 : P, num = L - from;
        plain_verify(p, &st, rows + from, canvas + from, num, (plain_keys){L, NULL}, want);
        rf_text_pass pass = rf_text_pass_default();
        pass.num_rows = pass.num_head_rows = num;
        pass.rows = rows + from;
        pass.tokens = canvas + from;
        pass.head_rows = head;
        pass.visible_end = &end;
        pass.keep_logits = true;
        pass.layers = RF_PASS_VERIFY;
        pass.verify.ratio = ratio;
        pass.verify.store = st.store;
        pass.verify.full_layers = st.full_layers;
        pass.verify.begin = P;
        pass.verify.end = L;
        run_logits(&f, f.s, &pass, got);
        rf_assert_close(got, want, (size_t)num * VOCAB, INFINITY, 2 * BOUND);
        int some = (int)floor(ratio * G) + num - G, full_layers = st.store ? LAYERS : st.full_layers;
        row_layers += full_layers * num + (LAYERS - full_layers) * some;
        canvas[P + 3 * step] = 30 + step;
        canvas[P + 3 * step + 2] = 230 + step;
    }
    rf_text_session_info info = rf_text_session_get_info(f.s);
    ck_assert_int_eq(info.row_passes, (row_layers + 1) / LAYERS);
    ck_assert_int_eq(info.key_reads, (row_layers * L + 1) / LAYERS);
    if (ratio == 1.0) { /* all of the response: a pass without the rule */
        range_pass r;
        rf_text_pass pass = rf_text_pass_default();
        make_range(&r, canvas, P, L, L);
        pass = r.pass;
        pass.layers = RF_PASS_VERIFY;
        pass.verify.ratio = 1.0;
        pass.verify.full_layers = 1;
        pass.verify.begin = P;
        pass.verify.end = L;
        run_logits(&f, f.s, &pass, got);
        run_logits(&f, f.s, &r.pass, full);
        rf_assert_close(got, full, G * VOCAB, INFINITY, BOUND);
    }
    rf_free(p);
    close_model(&f);
}
END_TEST

/* --- what a pass costs -----------------------------------------------------------------------------------------------
 */

START_TEST(a_pass_allocates_nothing_and_waits_once) {
    fixture f = open_model("text-llada");
    golden g = open_golden("text-llada", &f.err);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    rf_token_stats stats[MAX];
    range_pass r;
    for (int step = 0; step < 12; step++) {
        make_range(&r, g.tokens, step, g.num - step, g.num);
        r.pass.keep_logits = false;
        rf_memory_counts host = rf_memory_get_counts();
        rf_backend_counts device = rf_backend_get_counts(f.backend);
        run(&f, f.s, &r.pass);
        rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
        rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
        ck_assert_uint_eq(rf_memory_get_counts().num_allocs, host.num_allocs);
        ck_assert_uint_eq(rf_backend_get_counts(f.backend).num_device_allocs, device.num_device_allocs);
        ck_assert_uint_le(rf_backend_get_counts(f.backend).num_syncs, device.num_syncs + 1);
    }
    close_model(&f);
    rf_weights_close(g.w);
}
END_TEST

START_TEST(counts_are_exact) {
    fixture f = open_model("text-llama");
    int32_t tokens[MAX];
    draw_tokens(tokens, 40, 2);
    rf_text_session_options o = options(1, 48);
    f.s = open_session(&f, &o);
    range_pass r;
    make_range(&r, tokens, 0, 10, 10);
    r.pass.mask = RF_MASK_CAUSAL;
    r.head[3] = -1;
    run(&f, f.s, &r.pass);
    rf_text_session_info info = rf_text_session_get_info(f.s);
    ck_assert_int_eq(info.num_passes, 1);
    ck_assert_int_eq(info.row_passes, 10);
    ck_assert_int_eq(info.key_reads, 55);
    ck_assert_int_eq(info.head_rows, 9);
    ck_assert_uint_eq(info.cache_bytes, 2u * LAYERS * 49 * (size_t)f.s->kv_cols * sizeof(float));
    ck_assert_uint_eq(info.plane_bytes, 0);
    ck_assert_uint_gt(info.arena_bytes, info.cache_bytes);
    make_range(&r, tokens, 10, 14, 14);
    r.pass.mask = RF_MASK_BLOCK_CAUSAL;
    r.pass.mask_block = 3; /* rows 10, 11 see 12 keys, rows 12, 13 all 14 */
    run(&f, f.s, &r.pass);
    ck_assert_int_eq(rf_text_session_get_info(f.s).key_reads, 55 + 12 + 12 + 14 + 14);
    rf_text_session_reset_counts(f.s);
    info = rf_text_session_get_info(f.s);
    ck_assert(info.num_passes == 0 && info.row_passes == 0 && info.key_reads == 0 && info.head_rows == 0);
    close_model(&f);
}
END_TEST

/* --- refusals
 * ---------------------------------------------------------------------------------------------------------- */

START_TEST(wrong_passes_are_refused_in_one_line) {
    fixture f = open_model("text-llada");
    int32_t tokens[MAX];
    draw_tokens(tokens, 40, 2);
    rf_text_session_options o = options(1, 32);
    o.max_rows = 20;
    o.max_head_rows = 20;
    f.s = open_session(&f, &o);
    range_pass r;
#define REFUSED(status, part) rf_assert_fails(rf_text_session_forward(f.s, &r.pass, &f.err), f.err, status, part)
#define FRESH()               make_range(&r, tokens, 0, 10, 10)
    make_range(&r, tokens, 0, 21, 21);
    REFUSED(RF_ERR_ARGUMENT, "planned for 20");
    make_range(&r, tokens, 25, 35, 32);
    REFUSED(RF_ERR_ARGUMENT, "capacity");
    FRESH(), r.rows[4] = 3;
    REFUSED(RF_ERR_ARGUMENT, "ascending");
    FRESH(), tokens[7] = VOCAB;
    REFUSED(RF_ERR_ARGUMENT, "token 300");
    tokens[7] = 1;
    FRESH(), r.end[0] = 33;
    REFUSED(RF_ERR_ARGUMENT, "visible_end");
    FRESH(), r.head[0] = 10;
    REFUSED(RF_ERR_ARGUMENT, "head row");
    FRESH(), r.pass.num_bans = 9;
    REFUSED(RF_ERR_ARGUMENT, "banned");
    FRESH(), r.pass.temperature = -1;
    REFUSED(RF_ERR_ARGUMENT, "temperature");
    FRESH(), r.pass.cfg = 1;
    REFUSED(RF_ERR_ARGUMENT, "pairs");
    FRESH(), r.pass.rank_of_ref = true;
    REFUSED(RF_ERR_ARGUMENT, "reference");
    FRESH(), r.pass.mask = RF_MASK_BLOCK_CAUSAL;
    REFUSED(RF_ERR_ARGUMENT, "mask blocks");
    FRESH(), r.pass.mask = RF_MASK_CAUSAL, r.rows[9] = 20;
    r.end[0] = 21;
    REFUSED(RF_ERR_ARGUMENT, "gaps");
    FRESH(), r.pass.layers = RF_PASS_DRIFT;
    REFUSED(RF_ERR_STATE, "keeps no layer inputs");
    FRESH(), r.pass.layers = RF_PASS_VERIFY;
    REFUSED(RF_ERR_STATE, "keeps no increments");
    FRESH(), r.pass.external = RF_EXTERNAL_USE;
    REFUSED(RF_ERR_STATE, "external slots");
    FRESH(), r.pass.visible = r.rows, r.pass.num_visible = 10, r.rows[0] = 1;
    REFUSED(RF_ERR_ARGUMENT, "ascending");
    rf_token_stats stats[MAX];
    rf_assert_fails(rf_text_session_read_stats(f.s, stats, &f.err), f.err, RF_ERR_STATE, "failed or never ran");
    FRESH(), r.pass.keep_logits = false;
    run(&f, f.s, &r.pass);
    rf_assert_ok(rf_text_session_read_stats(f.s, stats, &f.err), f.err);
    float logits[VOCAB];
    rf_assert_fails(rf_text_session_read_logits(f.s, 0, logits, &f.err), f.err, RF_ERR_STATE, "did not keep");
    rf_assert_fails(rf_text_session_read_drift(f.s, NULL, NULL, NULL, &f.err), f.err, RF_ERR_STATE, "drift");

    rf_text_session *s = NULL;
    o.capacity = 100000;
    rf_assert_fails(rf_text_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_ARGUMENT, "capacity");
    o = options(2, 32);
    o.keep_inputs = true;
    rf_assert_fails(rf_text_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_UNSUPPORTED, "batch of 2");
    o = options(1, 32);
    o.residual_dtype = RF_DTYPE_BF16;
    rf_assert_fails(rf_text_session_create(&s, f.model, &o, &f.err), f.err, RF_ERR_DTYPE, "residual");
    ck_assert_ptr_null(s);
    close_model(&f);
}
END_TEST

/* Every failed allocation on the way to a session is an error, and leaves nothing behind. */
START_TEST(sessions_survive_a_lack_of_memory) {
    fixture f = open_model("text-llada");
    rf_text_session_options o = options(1, 32);
    o.keep_inputs = o.keep_increments = true;
    o.external_slots = 8;
    rf_status st = RF_ERR_MEMORY;
    int failures = 0;
    for (uint64_t nth = 1; st != RF_OK; nth++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_memory_fail_nth(nth);
        st = rf_text_session_create(&f.s, f.model, &o, &f.err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        failures++;
    }
    ck_assert_int_gt(failures, 5);
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dlm/forward");
    TCase *tc = tcase_create("forward");
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, logits_are_those_of_the_reference, 0, NUM_FAMILIES);
    tcase_add_loop_test(tc, cached_decoding_is_the_uncached_forward, 0, NUM_FAMILIES);
    tcase_add_test(tc, prefill_without_head_rows);
    tcase_add_loop_test(tc, a_subset_of_rows_is_those_rows, 0, 2);
    tcase_add_test(tc, a_list_of_visible_rows);
    tcase_add_loop_test(tc, a_batch_is_its_sequences, 0, 2);
    tcase_add_test(tc, guidance_combines_pairs);
    tcase_add_test(tc, statistics_are_of_the_logits);
    tcase_add_loop_test(tc, external_attention, 0, sizeof ext_cases / sizeof *ext_cases);
    tcase_add_test(tc, external_rows_may_mix_ages);
    tcase_add_loop_test(tc, drift_passes_follow_the_definition, 0, 8);
    tcase_add_loop_test(tc, verify_passes_follow_the_definition, 0, 5);
    tcase_add_test(tc, a_pass_allocates_nothing_and_waits_once);
    tcase_add_test(tc, counts_are_exact);
    tcase_add_test(tc, wrong_passes_are_refused_in_one_line);
    tcase_add_test(tc, sessions_survive_a_lack_of_memory);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
