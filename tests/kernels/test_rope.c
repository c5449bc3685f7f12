/* tests/kernels/test_rope.c - rotary positions, attention with them, and the attention of pixels over frames, against
 * loops
 * in double.
 *
 * Bounds: dtype_bound. Attention with rotary positions in bf16 may round turned queries and keys (another 1.1e-3 each,
 * as turning in place would): twice dtype_bound, and LSE within 1e-2 (of one key it is the score). */
#include "core/types.h"
#include "harness.h"

/* ---- tables ---- */

START_TEST(axial_table_has_pixel_frequencies) {
    enum { H = 9, W = 16, N = 16 };
    const double first[3] = {3.14159, 29.7404, 56.3392}; /* linspace(1, 128, 16) * pi */
    static float table[H * W][2 * N][2];
    rf_rope_table_axial(&table[0][0][0], H, W, N, 256);
    for (int i = 0; i < 3; i++) {
        /* the last row and column stand at 1, the first at -1, the middle row at 0 */
        for (int axis = 0; axis < 2; axis++) {
            const float *high = table[H * W - 1][axis * N + i], *low = table[0][axis * N + i];
            ck_assert_double_eq_tol(high[0], cos(first[i]), 1e-4);
            ck_assert_double_eq_tol(high[1], sin(first[i]), 1e-4);
            ck_assert_double_eq_tol(low[0], cos(first[i]), 1e-4);
            ck_assert_double_eq_tol(low[1], -sin(first[i]), 1e-4);
        }
        ck_assert_float_eq(table[H / 2 * W][i][0], 1.0f);
        ck_assert_float_eq(table[H / 2 * W][i][1], 0.0f);
    }
    for (int y = 0; y < H; y++) {
        for (int x = 0; x < W; x++) {
            for (int i = 0; i < 2 * N; i++) {
                double freq = (1 + 127.0 * (i % N) / (N - 1)) * M_PI;
                double pos = i < N ? -1 + 2.0 * y / (H - 1) : -1 + 2.0 * x / (W - 1);
                ck_assert_double_eq_tol(table[y * W + x][i][0], cos(pos * freq), 1e-4);
                ck_assert_double_eq_tol(table[y * W + x][i][1], sin(pos * freq), 1e-4);
            }
        }
    }
}
END_TEST

START_TEST(tables_of_one_row_and_one_pair) {
    float table[3][2][2];
    rf_rope_table_axial(&table[0][0][0], 1, 3, 1, 10);
    for (int x = 0; x < 3; x++) {
        ck_assert_double_eq_tol(table[x][0][0], cos(-M_PI), 1e-6); /* a single position is -1, a single frequency pi */
        ck_assert_double_eq_tol(table[x][1][0], cos((x - 1) * M_PI), 1e-6);
        ck_assert_double_eq_tol(table[x][1][1], sin((x - 1) * M_PI), 1e-6);
    }
}
END_TEST

START_TEST(time_table_counts_frames) {
    enum { P = 62, N = 32 };
    static float table[P][N][2];
    rf_rope_table_time(&table[0][0][0], P, N, 10000);
    for (int p = 0; p < P; p++) {
        for (int i = 0; i < N; i++) {
            double angle = p * pow(10000, -2.0 * i / (2 * N));
            ck_assert_double_eq_tol(table[p][i][0], cos(angle), 1e-5);
            ck_assert_double_eq_tol(table[p][i][1], sin(angle), 1e-5);
        }
    }
}
END_TEST

/* Any angles: operators must not rely on how a table was made. */
static operand any_table(int64_t positions, int num_pairs) {
    operand table = op_poison(RF_DTYPE_F32, (size_t)(positions * num_pairs * 2));
    for (size_t i = 0; i < table.num; i += 2) {
        double angle = 6.283185307179586 * uniform();
        table.host[i] = (float)cos(angle);
        table.host[i + 1] = (float)sin(angle);
    }
    op_upload(&table);
    return table;
}

/* One head, turned, in double. */
static void ref_turn(double *out, const float *x, const float *table_row, int num_pairs, int d) {
    for (int i = 0; i < d; i++) out[i] = x[i];
    for (int i = 0; i < num_pairs; i++) {
        double c = table_row[2 * i], s = table_row[2 * i + 1], a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = c * a - s * b;
        out[2 * i + 1] = s * a + c * b;
    }
}

/* ---- rope ---- */

typedef struct {
    int rows, heads, d, pairs, extra, period; /* extra: columns of a row past its heads */
    bool list;
} rope_case;
static const rope_case rope_cases[] = {
    {144, 32, 64, 32, 16 * 64, 144, false},
    {288, 8, 64, 32, 4 * 64, 144, false},
    {50, 4, 64, 32, 128, 144, true},
    {20, 2, 64, 16, 0, 7, false}, /* half of a head */
    {20, 2, 64, 16, 0, 7, true},
    {33, 3, 128, 64, 8, 33, false},
    {9, 2, 16, 8, 0, 4, true},
    {9, 2, 16, 3, 0, 4, false}, /* plain path: pairs that fill no vector */
    {5, 3, 6, 3, 1, 5, false},
    {7, 2, 64, 32, 3, 5, true}, /* rows that are not aligned */
    {1, 1, 2, 1, 0, 1, false},
    {0, 4, 64, 32, 0, 10, false},
};

START_TEST(rope_matches_double) {
    rf_dtype dtype = test_dtype(_i);
    for (size_t n = 0; n < sizeof rope_cases / sizeof rope_cases[0]; n++) {
        const rope_case c = rope_cases[n];
        int64_t stride = (int64_t)c.heads * c.d + c.extra;
        operand x = op_normal(dtype, (size_t)(c.rows * stride), 0, 1), table = any_table(c.period, c.pairs);
        int32_t *rows = (int32_t *)host_doubles((size_t)c.rows + 1);
        for (int r = 0; r < c.rows; r++) rows[r] = (int32_t)(uniform() * 3 * c.period);
        rf_rope_args a = {.x = x.dev,
                          .dtype = dtype,
                          .num_rows = c.rows,
                          .row_stride = stride,
                          .num_heads = c.heads,
                          .head_dim = c.d,
                          .num_pairs = c.pairs,
                          .table = table.dev,
                          .period = c.period,
                          .rows = c.list ? dev_i32(rows, (size_t)c.rows) : NULL};
        expect_ok(test_ops()->rope(NULL, &a, &err));
        expect_ok(test_ops()->rope(test_stream(), &a, &err));
        double *want = host_doubles(x.num);
        for (size_t i = 0; i < x.num; i++) want[i] = x.host[i];
        for (int r = 0; r < c.rows; r++) {
            int pos = (c.list ? rows[r] : r) % c.period;
            for (int h = 0; h < c.heads; h++)
                ref_turn(want + r * stride + h * c.d, x.host + r * stride + h * c.d, table.host + pos * c.pairs * 2,
                         c.pairs, c.d);
        }
        operand before = op_clone(&x);
        expect_close(&x, want, dtype_bound(dtype), "rope", "%d rows %d heads of %d, %d pairs, +%d, period %d, list %d",
                     c.rows, c.heads, c.d, c.pairs, c.extra, c.period, c.list);
        for (int r = 0; r < c.rows; r++) { /* what is not turned keeps its bits */
            for (int64_t i = 0; i < stride; i++) {
                bool turned = i < c.heads * c.d && i % c.d < 2 * c.pairs;
                if (!turned) ck_assert_float_eq(x.host[r * stride + i], before.host[r * stride + i]);
            }
        }
    }
}
END_TEST

/* ---- temporal attention ---- */

typedef struct {
    int samples, frames, tokens, heads, d, pairs, slots, kept;
    int rows; /* listed rows; 0 = none */
    bool index, store, no_kv;
    double q_std; /* 0 = 1 */
} temporal_case;

#define SIZES(b_, f_, n_, h_, d_, p_, s_, k_)                                                                          \
    .samples = (b_), .frames = (f_), .tokens = (n_), .heads = (h_), .d = (d_), .pairs = (p_), .slots = (s_),           \
    .kept = (k_)
static const temporal_case temporal_cases[] = {
    /* one new frame */
    {SIZES(1, 1, 40, 16, 64, 32, 32, 31)},
    {SIZES(1, 1, 7, 3, 64, 32, 32, 0)},
    {SIZES(1, 1, 7, 3, 64, 32, 32, 1), .store = true},
    {SIZES(2, 1, 5, 4, 64, 32, 9, 5), .store = true},
    {SIZES(2, 1, 5, 4, 64, 32, 32, 31), .index = true, .store = true},
    {SIZES(2, 1, 5, 2, 64, 32, 33, 32)}, /* the new frame begins another chunk */
    {SIZES(1, 1, 9, 3, 64, 32, 62, 40), .store = true},
    {SIZES(1, 1, 3, 2, 64, 32, 62, 61)},
    {SIZES(3, 1, 6, 4, 64, 32, 32, 20), .rows = 11, .store = true},
    {SIZES(2, 1, 8, 2, 64, 16, 32, 12), .rows = 5},
    {SIZES(1, 1, 7, 3, 64, 16, 16, 9), .index = true}, /* half of a head turns */
    {SIZES(1, 1, 7, 3, 64, 0, 16, 9)},
    {SIZES(1, 1, 7, 3, 64, 5, 16, 9)}, /* pairs that fill no vector */
    {SIZES(1, 1, 6, 2, 64, 32, 32, 31), .q_std = 60},
    {SIZES(1, 1, 6, 3, 128, 64, 32, 31), .store = true},
    {SIZES(1, 1, 6, 3, 128, 64, 16, 5), .index = true},
    {SIZES(2, 1, 6, 3, 128, 64, 40, 40), .rows = 7},
    {SIZES(1, 1, 6, 2, 128, 64, 16, 0)},
    {SIZES(1, 1, 6, 3, 16, 8, 32, 31), .store = true},
    {SIZES(2, 1, 6, 3, 40, 20, 8, 5), .index = true, .store = true},
    {SIZES(1, 1, 5, 2, 96, 48, 62, 40), .rows = 3, .store = true},
    {SIZES(1, 1, 5, 2, 6, 3, 6, 4), .store = true}, /* the CPU alone */
    {SIZES(1, 1, 5, 1, 200, 80, 6, 4)},
    {SIZES(1, 1, 4, 2, 64, 32, 0, 0), .no_kv = true},
    /* several */
    {SIZES(1, 2, 5, 3, 64, 32, 8, 0), .store = true},
    {SIZES(1, 31, 6, 4, 64, 32, 32, 0), .store = true},
    {SIZES(2, 32, 3, 2, 64, 32, 32, 0), .index = true, .store = true},
    {SIZES(1, 3, 5, 3, 64, 32, 16, 5), .store = true},
    {SIZES(1, 4, 5, 3, 64, 32, 40, 30), .store = true}, /* across two chunks */
    {SIZES(1, 22, 3, 2, 64, 32, 62, 40), .index = true, .store = true},
    {SIZES(1, 62, 3, 2, 64, 32, 62, 0), .store = true},
    {SIZES(2, 5, 3, 2, 64, 16, 32, 27)},
    {SIZES(1, 31, 3, 2, 128, 64, 32, 0), .store = true},
    {SIZES(2, 3, 4, 2, 128, 64, 48, 40), .index = true},
    {SIZES(1, 7, 4, 2, 16, 8, 12, 5), .store = true},
    {SIZES(1, 40, 2, 2, 72, 36, 62, 22), .store = true},
    {SIZES(2, 9, 4, 2, 64, 32, 0, 0), .no_kv = true},
    {SIZES(0, 1, 4, 2, 64, 32, 4, 1)},
};
#define NUM_TEMPORAL ((int)(sizeof temporal_cases / sizeof temporal_cases[0]))

static void temporal_run(const temporal_case *c, rf_dtype dtype) {
    const int64_t d = c->d, H = c->heads, N = c->tokens, F = c->frames, S = c->slots, width = H * d;
    const int64_t rows = c->rows ? c->rows : c->samples * F * N, states = c->samples + 2;
    char what[200];
    snprintf(what, sizeof what, "b%d f%d n%d h%d d%d pairs %d slots %d kept %d rows %d index %d store %d", c->samples,
             c->frames, c->tokens, c->heads, c->d, c->pairs, c->slots, c->kept, c->rows, c->index, c->store);
    operand qkv = op_normal(dtype, (size_t)(rows * 3 * width), 0, 1), out = op_poison(dtype, (size_t)(rows * width));
    if (c->q_std > 0) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < width; i++) qkv.host[r * 3 * width + i] *= (float)c->q_std;
        for (size_t i = 0; i < qkv.num; i++)
            if (dtype == RF_DTYPE_BF16) qkv.host[i] = rf_bf16_to_f32(rf_f32_to_bf16(qkv.host[i]));
        op_upload(&qkv);
    }
    operand table = any_table(RF_MAX_WINDOW, c->pairs);

    /* Slots in any order; those that hold no kept frame are not a number. */
    int32_t order[64], window[2 + RF_MAX_WINDOW];
    random_permutation(order, (int)S, 99);
    bool is_kept[64] = {false};
    window[0] = c->kept;
    window[1] = c->kept + c->frames;
    for (int j = 0; j < RF_MAX_WINDOW; j++) window[2 + j] = j < window[1] && j < S ? order[j] : 1 << 30;
    for (int j = 0; j < c->kept; j++) is_kept[window[2 + j]] = true;
    operand kv = op_normal(dtype, (size_t)(states * N * H * 2 * S * d), 0.2, 1);
    for (size_t i = 0; i < kv.num; i++)
        if (!is_kept[i / (size_t)d % (size_t)S]) kv.host[i] = NAN;
    op_upload(&kv);

    /* Listed rows in no order, each once; state samples likewise. */
    int32_t *list = (int32_t *)host_doubles((size_t)(states * N)), *index = (int32_t *)host_doubles((size_t)states);
    random_permutation(list, (int)(states * N), 5);
    random_permutation(index, (int)states, 6);
    rf_temporal_attention_args a = {.qkv = qkv.dev,
                                    .out = out.dev,
                                    .kv = c->no_kv ? NULL : kv.dev,
                                    .dtype = dtype,
                                    .samples = c->samples,
                                    .frames = F,
                                    .tokens = N,
                                    .num_rows = c->rows,
                                    .num_heads = c->heads,
                                    .head_dim = c->d,
                                    .num_pairs = c->pairs,
                                    .slots = S,
                                    .window = (const rf_frame_window *)dev_i32(window, 2 + RF_MAX_WINDOW),
                                    .table = table.dev,
                                    .store = c->store};
    if (c->rows) a.rows = dev_i32(list, (size_t)c->rows);
    if (c->index) a.sample_index = dev_i32(index, (size_t)c->samples);
    if (test_is_cuda() && (c->d % 8 != 0 || c->d > 128)) {
        rf_error err = {0};
        rf_status st = test_ops()->temporal_attention(NULL, &a, &err);
        ck_assert_msg(st == RF_ERR_SHAPE || st == RF_ERR_UNSUPPORTED, "%s: %s", what, rf_status_name(st));
        return;
    }
    expect_ok(test_ops()->temporal_attention(NULL, &a, &err));
    expect_ok(test_ops()->temporal_attention(test_stream(), &a, &err));

    double *want = host_doubles(out.num), *want_kv = host_doubles(kv.num);
    double *q = host_doubles((size_t)d), *k = host_doubles((size_t)d), *score = host_doubles(RF_MAX_WINDOW);
    const float **values = (const float **)host_doubles(RF_MAX_WINDOW);
    for (size_t i = 0; i < kv.num; i++) want_kv[i] = kv.host[i];
    for (int64_t r = 0; r < rows; r++) {
        int64_t pixel = r % N, f = r / N % F, sample = r / (N * F), first = r - f * N;
        int64_t state = c->index ? index[sample] : sample;
        if (c->rows) first = r, f = 0, state = list[r] / N, pixel = list[r] % N;
        for (int64_t h = 0; h < H; h++) {
            int64_t head_kv = ((state * N + pixel) * H + h) * 2 * S * d;
            int num = c->kept + (int)f + 1;
            double top = -INFINITY, sum = 0;
            ref_turn(q, qkv.host + r * 3 * width + h * d, table.host + (num - 1) * c->pairs * 2, c->pairs, c->d);
            for (int j = 0; j < num; j++) {
                const float *fresh = qkv.host + (first + (j - c->kept) * N) * 3 * width + width + h * d;
                const float *key = j < c->kept ? kv.host + head_kv + window[2 + j] * d : fresh;
                values[j] = j < c->kept ? key + S * d : key + width;
                ref_turn(k, key, table.host + j * c->pairs * 2, c->pairs, c->d);
                score[j] = 0;
                for (int64_t e = 0; e < d; e++) score[j] += q[e] * k[e] / sqrt((double)d);
                top = fmax(top, score[j]);
            }
            for (int j = 0; j < num; j++) sum += score[j] = exp(score[j] - top);
            for (int64_t e = 0; e < d; e++) {
                double y = 0;
                for (int j = 0; j < num; j++) y += score[j] / sum * (double)values[j][e];
                want[r * width + h * d + e] = y;
            }
            if (!c->store) continue;
            for (int64_t e = 0; e < d; e++) {
                int64_t at = head_kv + window[2 + num - 1] * d + e;
                want_kv[at] = qkv.host[r * 3 * width + width + h * d + e];
                want_kv[at + S * d] = qkv.host[r * 3 * width + 2 * width + h * d + e];
            }
        }
    }
    /* Large logits: an f32 score near 500 is known to 3e-5. */
    expect_close(&out, want, dtype_bound(dtype) + (c->q_std > 0 ? 1e-4 : 0), "temporal_attention", "%s", what);
    expect_close(&kv, want_kv, 0, "temporal_attention kv", "%s", what);
}

START_TEST(temporal_attention_matches_double) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) temporal_run(&temporal_cases[_i], test_dtype(dtype));
}
END_TEST

/* A frame at a time with kept keys is all frames at once. */
START_TEST(frames_one_by_one_are_frames_at_once) {
    rf_dtype dtype = test_dtype(_i);
    enum { F = 40, N = 6, H = 3, D = 64, SLOTS = 45, WIDTH = H * D };
    operand qkv = op_normal(dtype, F * N * 3 * WIDTH, 0, 1), table = any_table(RF_MAX_WINDOW, D / 2);
    operand at_once = op_poison(dtype, F * N * WIDTH), one_by_one = op_poison(dtype, F * N * WIDTH);
    operand kv[2] = {op_poison(dtype, N * H * 2 * SLOTS * D), op_poison(dtype, N * H * 2 * SLOTS * D)};
    int32_t order[SLOTS], window[2 + RF_MAX_WINDOW] = {0, F};
    random_permutation(order, SLOTS, 3);
    for (int j = 0; j < F; j++) window[2 + j] = order[j];
    rf_temporal_attention_args a = {.qkv = qkv.dev,
                                    .out = at_once.dev,
                                    .kv = kv[0].dev,
                                    .dtype = dtype,
                                    .samples = 1,
                                    .frames = F,
                                    .tokens = N,
                                    .num_heads = H,
                                    .head_dim = D,
                                    .num_pairs = D / 2,
                                    .slots = SLOTS,
                                    .window = (const rf_frame_window *)dev_i32(window, 2 + RF_MAX_WINDOW),
                                    .table = table.dev,
                                    .store = true};
    expect_ok(test_ops()->temporal_attention(test_stream(), &a, &err));
    size_t bytes = rf_dtype_bytes(dtype);
    a.frames = 1;
    a.kv = kv[1].dev;
    for (int f = 0; f < F; f++) {
        window[0] = f;
        window[1] = f + 1;
        a.qkv = (const char *)qkv.dev + (size_t)(f * N * 3 * WIDTH) * bytes;
        a.out = (char *)one_by_one.dev + (size_t)(f * N * WIDTH) * bytes;
        a.window = (const rf_frame_window *)dev_i32(window, 2 + RF_MAX_WINDOW);
        expect_ok(test_ops()->temporal_attention(test_stream(), &a, &err));
    }
    op_download(&at_once);
    double *want = host_doubles(at_once.num);
    for (size_t i = 0; i < at_once.num; i++) want[i] = at_once.host[i];
    expect_close(&one_by_one, want, dtype_bound(dtype), "temporal_attention", "one by one, at once");
    expect_same_bits(&kv[0], &kv[1], "temporal_attention kv", "one by one, at once");
}
END_TEST

/* ---- attention with rotary positions ---- */

typedef struct {
    int batch, q_len, kv_len, heads, kv_heads, d, pairs, offset;
    bool list, causal, ranges; /* the CPU alone */
} turned_case;
#define TURNED(b_, q_, k_, hq_, hkv_, d_, p_)                                                                          \
    .batch = (b_), .q_len = (q_), .kv_len = (k_), .heads = (hq_), .kv_heads = (hkv_), .d = (d_), .pairs = (p_)
static const turned_case turned_cases[] = {
    {TURNED(1, 144, 144, 16, 16, 64, 32)},
    {TURNED(31, 144, 144, 16, 16, 64, 32)}, /* a grid that fills any GPU */
    {TURNED(3, 64, 64, 4, 4, 64, 32)},
    {TURNED(40, 64, 64, 8, 8, 64, 32)},
    {TURNED(1, 256, 256, 2, 2, 64, 16)},
    {TURNED(20, 256, 256, 16, 16, 64, 32)},
    {TURNED(20, 200, 200, 16, 16, 64, 32)},
    {TURNED(2, 1, 1, 2, 2, 64, 32)},
    {TURNED(2, 15, 15, 2, 2, 64, 32)},
    {TURNED(1, 17, 17, 3, 3, 64, 4)},
    {TURNED(2, 49, 130, 4, 2, 64, 32)},
    {TURNED(1, 97, 241, 4, 1, 64, 32), .offset = 9},
    {TURNED(1, 144, 144, 4, 4, 128, 64)},
    {TURNED(2, 33, 256, 4, 4, 128, 64)},
    {TURNED(30, 144, 144, 8, 8, 128, 32)},
    {TURNED(1, 20, 0, 2, 2, 64, 32)},
    {TURNED(1, 300, 300, 2, 2, 64, 32)},
    {TURNED(2, 30, 40, 2, 2, 16, 8)},
    {TURNED(1, 30, 40, 2, 2, 72, 36)},
    {TURNED(1, 30, 40, 2, 2, 64, 32), .list = true},
    {TURNED(1, 60, 60, 2, 2, 64, 32), .causal = true, .offset = 2},
    {TURNED(1, 30, 200, 2, 2, 64, 32), .ranges = true},
};
#define NUM_TURNED ((int)(sizeof turned_cases / sizeof turned_cases[0]))

static void turned_run(const turned_case *c, rf_dtype dtype) {
    const int64_t d = c->d, hq = c->heads, hkv = c->kv_heads, q_src = c->list ? 2 * c->q_len : c->q_len;
    char what[200];
    snprintf(what, sizeof what, "b%d q%d kv%d h%d/%d d%d pairs %d +%d list %d causal %d ranges %d", c->batch, c->q_len,
             c->kv_len, c->heads, c->kv_heads, c->d, c->pairs, c->offset, c->list, c->causal, c->ranges);
    operand q = op_normal(dtype, (size_t)(c->batch * q_src * hq * d), 0, 1);
    operand k = op_normal(dtype, (size_t)(c->batch * c->kv_len * hkv * d), 0, 1);
    operand v = op_normal(dtype, (size_t)(c->batch * c->kv_len * hkv * d), 0.3, 1);
    operand out = op_poison(dtype, (size_t)(c->batch * c->q_len * hq * d));
    operand lse = op_poison(RF_DTYPE_F32, (size_t)(c->batch * hq * c->q_len));
    int64_t positions = (q_src > c->kv_len ? q_src : c->kv_len) + c->offset;
    operand table = any_table(positions, c->pairs);
    int32_t *q_rows = (int32_t *)host_doubles((size_t)q_src), *kv_rows = (int32_t *)host_doubles((size_t)c->kv_len + 1);
    random_permutation(q_rows, (int)q_src, 11);
    random_permutation(kv_rows, c->kv_len, 12);
    int64_t kv_num = c->list ? c->kv_len / 2 : c->kv_len;
    rf_attention_args a = {
        .q = q.dev,
        .k = k.dev,
        .v = v.dev,
        .out = out.dev,
        .lse = lse.dev,
        .dtype = dtype,
        .batch = c->batch,
        .num_q_heads = c->heads,
        .num_kv_heads = c->kv_heads,
        .head_dim = c->d,
        .q_len = c->q_len,
        .kv_len = kv_num,
        .q_batch_stride = q_src * hq * d,
        .q_row_stride = hq * d,
        .q_head_stride = d,
        .kv_batch_stride = c->kv_len * hkv * d,
        .kv_row_stride = hkv * d,
        .kv_head_stride = d,
        .out_batch_stride = c->q_len * hq * d,
        .out_row_stride = hq * d,
        .out_head_stride = d,
        .softmax_scale = (float)(1 / sqrt((double)d)),
        .mask = c->causal ? RF_MASK_CAUSAL : RF_MASK_NONE,
        .q_pos_offset = c->offset,
        .rope = table.dev,
        .rope_pairs = c->pairs,
    };
    if (c->list) {
        a.q_rows = dev_i32(q_rows, (size_t)c->q_len);
        a.kv_rows = dev_i32(kv_rows, (size_t)kv_num);
    }
    const rf_key_range ranges[3] = {{0, 3}, {20, 90}, {91, 180}};
    if (c->ranges) {
        a.num_ranges = 3;
        memcpy(a.ranges, ranges, sizeof ranges);
    }
    bool only_cpu =
        dtype == RF_DTYPE_F32 || (c->d != 64 && c->d != 128) || c->kv_len > 256 || c->list || c->causal || c->ranges;
    if (test_is_cuda() && only_cpu) {
        expect_status(test_ops()->attention(NULL, &a, &err), RF_ERR_UNSUPPORTED);
        return;
    }
    expect_ok(test_ops()->attention(NULL, &a, &err));
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));

    double *want = host_doubles(out.num), *want_lse = host_doubles(lse.num), *score = host_doubles(512);
    double *turned_q = host_doubles(q.num), *turned_k = host_doubles(k.num);
    for (int64_t b = 0; b < c->batch; b++) {
        for (int64_t r = 0; r < q_src; r++)
            for (int64_t h = 0; h < hq; h++) {
                int64_t at = ((b * q_src + r) * hq + h) * d;
                ref_turn(turned_q + at, q.host + at, table.host + (r + c->offset) * c->pairs * 2, c->pairs, c->d);
            }
        for (int64_t r = 0; r < c->kv_len; r++)
            for (int64_t h = 0; h < hkv; h++) {
                int64_t at = ((b * c->kv_len + r) * hkv + h) * d;
                ref_turn(turned_k + at, k.host + at, table.host + r * c->pairs * 2, c->pairs, c->d);
            }
        for (int64_t h = 0; h < hq; h++) {
            for (int64_t i = 0; i < c->q_len; i++) {
                int64_t qr = c->list ? q_rows[i] : i, num = 0;
                const double *qi = turned_q + ((b * q_src + qr) * hq + h) * d;
                double top = -INFINITY, sum = 0, *y = want + ((b * c->q_len + i) * hq + h) * d;
                int32_t row_of[512];
                for (int64_t j = 0; j < kv_num; j++) {
                    int32_t kr = c->list ? kv_rows[j] : (int32_t)j;
                    if (c->causal && kr > qr + c->offset) continue;
                    bool in = !c->ranges;
                    for (int g = 0; g < 3 && !in; g++) in = j >= ranges[g].begin && j < ranges[g].end;
                    if (!in) continue;
                    const double *kj = turned_k + ((b * c->kv_len + kr) * hkv + h / (hq / hkv)) * d;
                    double s = 0;
                    for (int64_t e = 0; e < d; e++) s += qi[e] * kj[e];
                    row_of[num] = kr;
                    score[num++] = s / sqrt((double)d);
                    top = fmax(top, s / sqrt((double)d));
                }
                for (int64_t j = 0; j < num; j++) sum += score[j] = exp(score[j] - top);
                want_lse[(b * hq + h) * c->q_len + i] = num > 0 ? top + log(sum) : -INFINITY;
                for (int64_t j = 0; j < num; j++) {
                    const float *vj = v.host + ((b * c->kv_len + row_of[j]) * hkv + h / (hq / hkv)) * d;
                    for (int64_t e = 0; e < d; e++) y[e] += score[j] / sum * (double)vj[e];
                }
            }
        }
    }
    bool f32 = dtype == RF_DTYPE_F32;
    expect_close(&out, want, (f32 ? 1 : 2) * dtype_bound(dtype), "attention, turned", "%s", what);
    expect_abs(&lse, want_lse, f32 ? 1e-5 : 1e-2, "attention lse, turned", "%s", what);

    /* Rows turned in place, then a plain attention: the same but for the order of sums. */
    if (c->offset > 0 || c->kv_len == 0) return;
    rf_rope_args turn = {.x = q.dev,
                         .dtype = dtype,
                         .num_rows = c->batch * q_src,
                         .row_stride = hq * d,
                         .num_heads = c->heads,
                         .head_dim = c->d,
                         .num_pairs = c->pairs,
                         .table = table.dev,
                         .period = q_src};
    expect_ok(test_ops()->rope(test_stream(), &turn, &err));
    turn.x = k.dev;
    turn.num_rows = c->batch * c->kv_len;
    turn.row_stride = hkv * d;
    turn.num_heads = c->kv_heads;
    turn.period = c->kv_len;
    expect_ok(test_ops()->rope(test_stream(), &turn, &err));
    operand plain = op_poison(dtype, out.num), small = op_poison(dtype, out.num);
    a.rope = NULL;
    a.out = plain.dev;
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    op_download(&out);
    for (size_t i = 0; i < out.num; i++) want[i] = out.host[i];
    expect_close(&plain, want, dtype_bound(dtype), "rope and attention", "%s", what);
    if (!test_is_cuda()) return;
    /* The same kernel on turned rows: the same bits. */
    a.kernel = RF_ATTENTION_SMALL;
    a.out = small.dev;
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    expect_close(&small, want, dtype_bound(dtype), "rope and small attention", "%s", what);
    expect_same_bits(&small, &out, "rope and small attention", "%s", what);
}

START_TEST(attention_with_rotary_positions_matches_double) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) turned_run(&turned_cases[_i], test_dtype(dtype));
}
END_TEST

/* ---- arguments ---- */

START_TEST(bad_arguments_are_refused_at_plan_time) {
    const rf_ops *ops = test_ops();
    rf_dtype dtype = test_dtype(_i);
    const void *some = (const void *)64;
#define REFUSED(op, type, change, status)                                                                              \
    do {                                                                                                               \
        type a = good_##op;                                                                                            \
        change;                                                                                                        \
        expect_status(ops->op(NULL, &a, &err), status);                                                                \
    } while (0)
    rf_rope_args good_rope = {
        .dtype = dtype, .num_rows = 8, .row_stride = 384, .num_heads = 4, .head_dim = 64, .num_pairs = 32, .period = 8};
    expect_ok(ops->rope(NULL, &good_rope, &err));
    expect_status(ops->rope(test_stream(), &good_rope, &err), RF_ERR_ARGUMENT); /* no pointers */
    expect_status(ops->rope(NULL, NULL, &err), RF_ERR_ARGUMENT);
    REFUSED(rope, rf_rope_args, a.dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rope, rf_rope_args, a.num_rows = -1, RF_ERR_SHAPE);
    REFUSED(rope, rf_rope_args, a.row_stride = 255, RF_ERR_SHAPE);
    REFUSED(rope, rf_rope_args, a.num_heads = 0, RF_ERR_SHAPE);
    REFUSED(rope, rf_rope_args, a.num_pairs = 33, RF_ERR_SHAPE);
    REFUSED(rope, rf_rope_args, a.num_pairs = 0, RF_ERR_SHAPE);
    REFUSED(rope, rf_rope_args, a.period = 0, RF_ERR_SHAPE);
    if (!test_is_cuda()) REFUSED(rope, rf_rope_args, a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);

    rf_temporal_attention_args good_temporal_attention = {.dtype = dtype,
                                                          .samples = 2,
                                                          .frames = 1,
                                                          .tokens = 6,
                                                          .num_heads = 4,
                                                          .head_dim = 64,
                                                          .num_pairs = 32,
                                                          .slots = 8};
    expect_ok(ops->temporal_attention(NULL, &good_temporal_attention, &err));
    expect_status(ops->temporal_attention(test_stream(), &good_temporal_attention, &err), RF_ERR_ARGUMENT);
    expect_status(ops->temporal_attention(NULL, NULL, &err), RF_ERR_ARGUMENT);
#define REFUSED_T(change, status) REFUSED(temporal_attention, rf_temporal_attention_args, change, status)
    REFUSED_T(a.dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED_T(a.samples = -1, RF_ERR_SHAPE);
    REFUSED_T(a.frames = 0, RF_ERR_SHAPE);
    REFUSED_T(a.frames = RF_MAX_WINDOW + 1, RF_ERR_SHAPE);
    REFUSED_T(a.tokens = 0, RF_ERR_SHAPE);
    REFUSED_T(a.num_heads = 0, RF_ERR_SHAPE);
    REFUSED_T(a.head_dim = 63, RF_ERR_SHAPE);
    REFUSED_T(a.num_pairs = 33, RF_ERR_SHAPE);
    REFUSED_T(a.slots = -1, RF_ERR_SHAPE);
    REFUSED_T((a.rows = some, a.num_rows = -1), RF_ERR_SHAPE);
    REFUSED_T((a.rows = some, a.frames = 2), RF_ERR_ARGUMENT);
    REFUSED_T((a.rows = some, a.sample_index = some), RF_ERR_ARGUMENT);
    if (!test_is_cuda()) REFUSED_T(a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);

    rf_attention_args good_attention = rf_attention_args_packed(dtype, 2, 64, 4, 64, NULL, NULL);
    good_attention.rope = some;
    good_attention.rope_pairs = 32;
#define REFUSED_A(change, status) REFUSED(attention, rf_attention_args, change, status)
    REFUSED_A(a.rope_pairs = 33, RF_ERR_SHAPE);
    REFUSED_A(a.rope_pairs = 0, RF_ERR_SHAPE);
    REFUSED_A(a.q_pos_offset = -1, RF_ERR_ARGUMENT);
    REFUSED_A(a.kernel = RF_ATTENTION_SMALL + 1, RF_ERR_ARGUMENT);
    if (test_is_cuda()) {
        if (dtype == RF_DTYPE_BF16) expect_ok(ops->attention(NULL, &good_attention, &err));
        REFUSED_A(a.kv_rows = some, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.q_rows = some, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.kv_lens = some, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.num_ranges = 1, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.mask = RF_MASK_CAUSAL, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.kv_len = 257, RF_ERR_UNSUPPORTED);
        REFUSED_A((a.head_dim = 48, a.rope_pairs = 16), RF_ERR_UNSUPPORTED);
        REFUSED_A(a.rope_pairs = 30, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.kernel = RF_ATTENTION_MMA, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.kernel = RF_ATTENTION_WGMMA, RF_ERR_UNSUPPORTED);
        REFUSED_A(a.dtype = RF_DTYPE_F32, RF_ERR_UNSUPPORTED);
    } else {
        expect_ok(ops->attention(NULL, &good_attention, &err));
        REFUSED_A(a.kernel = RF_ATTENTION_SMALL, RF_ERR_UNSUPPORTED);
    }
}
END_TEST

int main(void) {
    int st = open_test_device();
    if (st != 0) return st;
    Suite *suite = suite_create("rope");
    TCase *tables = kernel_tcase(suite, "tables");
    tcase_add_test(tables, axial_table_has_pixel_frequencies);
    tcase_add_test(tables, tables_of_one_row_and_one_pair);
    tcase_add_test(tables, time_table_counts_frames);
    TCase *rope = kernel_tcase(suite, "rope");
    add_for_dtypes(rope, rope_matches_double);
    TCase *temporal = kernel_tcase(suite, "temporal_attention");
    tcase_add_loop_test(temporal, temporal_attention_matches_double, 0, NUM_TEMPORAL);
    add_for_dtypes(temporal, frames_one_by_one_are_frames_at_once);
    TCase *turned = kernel_tcase(suite, "attention with rotary positions");
    tcase_add_loop_test(turned, attention_with_rotary_positions_matches_double, 0, NUM_TURNED);
    TCase *arguments = kernel_tcase(suite, "arguments");
    add_for_dtypes(arguments, bad_arguments_are_refused_at_plan_time);
    return run_kernel_suite(suite);
}
