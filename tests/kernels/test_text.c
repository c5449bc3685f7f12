/* tests/kernels/test_text.c - the operators of text models against plain definitions in double.
 *
 * Bounds: dtype_bound where a result is rounded to the dtype. What comes out in f32 (masses, probabilities, cosines) is within
 * 1e-5 relative L2 whatever the dtype of the operands: those are rounded before the reference sees them.
 * Most heads here multiply eighths of small integers: such logits are exact in f32 and in bf16 inputs, ties are frequent, and
 * every id, rank and rounding has one right answer. */
#include "core/rng.h"
#include "core/types.h"
#include "harness.h"

#define LENGTH(a) (sizeof(a) / sizeof(a)[0])

static void download(void *host, const void *dev, size_t bytes) {
    rf_error err = {0};
    ck_assert_int_eq(rf_stream_download(test_stream(), host, dev, bytes, &err), RF_OK);
    ck_assert_int_eq(rf_stream_synchronize(test_stream(), &err), RF_OK);
}

/* host_doubles as room for integers. */
static int32_t *host_ints(size_t num) {
    return (int32_t *)host_doubles(num);
}

static int32_t uniform_int(int32_t num) {
    return (int32_t)(uniform() * num);
}

static operand of_ones(rf_dtype dtype, size_t num) {
    operand o = op_poison(dtype, num);
    for (size_t i = 0; i < num; i++) o.host[i] = 1;
    op_upload(&o);
    return o;
}

/* ---- embed ---- */

START_TEST(embed_gathers_and_scales) {
    static const int cols[] = {64, 4096, 12, 7, 1};
    for (size_t c = 0; c < LENGTH(cols); c++) {
        for (int to = 0; to < test_num_dtypes(); to++) {
            enum { VOCAB = 40, ROWS = 33 };
            const rf_dtype dtype = test_dtype(_i), out_dtype = test_dtype(to);
            const int64_t d = cols[c];
            operand table = op_normal(dtype, (size_t)(VOCAB * d), 0, 1), out = op_poison(out_dtype, (size_t)(ROWS * d));
            int32_t ids[ROWS];
            for (int r = 0; r < ROWS; r++) ids[r] = uniform_int(VOCAB);
            ids[3] = -1, ids[4] = VOCAB, ids[5] = INT32_MAX, ids[6] = 0, ids[7] = VOCAB - 1;
            const rf_embed_args a = {.table = table.dev,
                                     .ids = dev_i32(ids, ROWS),
                                     .out = out.dev,
                                     .dtype = dtype,
                                     .out_dtype = out_dtype,
                                     .rows = ROWS,
                                     .cols = d,
                                     .vocab = VOCAB,
                                     .scale = c % 2 ? 1.0f : 0.37f};
            expect_ok(test_ops()->embed(NULL, &a, &err));
            expect_ok(test_ops()->embed(test_stream(), &a, &err));
            double *want = host_doubles(out.num);
            for (int64_t r = 0; r < ROWS; r++)
                for (int64_t i = 0; i < d; i++)
                    if (ids[r] >= 0 && ids[r] < VOCAB) want[r * d + i] = (double)a.scale * table.host[ids[r] * d + i];
            expect_close(&out, want, dtype_bound(out_dtype), "embed", "%d columns to %s", cols[c],
                         rf_dtype_name(out_dtype));
        }
    }
}
END_TEST

/* ---- queries, keys, values ---- */

typedef struct {
    int batch, rows, hq, hkv, d, pairs, cache, extra; /* extra: elements of a cache row past its heads */
    int table_rows;                                   /* 0: one for every position */
    bool norm;
} qkv_case;
static const qkv_case qkv_cases[] = {
    {1, 32, 8, 8, 128, 64, 100, 0, 0, false}, {2, 20, 8, 2, 128, 64, 33, 0, 0, true}, /* grouped heads, Qwen3's norm */
    {3, 5, 4, 1, 64, 32, 9, 64, 0, true},     {1, 7, 6, 3, 64, 16, 64, 0, 0, false},  /* half of a head */
    {1, 7, 6, 3, 96, 8, 64, 8, 0, true},      {2, 9, 3, 3, 80, 40, 40, 0, 0, true},   /* lanes that hold nothing */
    {2, 3, 2, 1, 256, 128, 12, 0, 0, true},   {1, 4, 2, 2, 256, 64, 12, 0, 5, false}, /* positions past the table */
    {2, 3, 2, 2, 8, 4, 12, 0, 0, true},                                               /* pairs that fill no vector */
    {2, 6, 2, 1, 72, 36, 12, 0, 0, true},     {2, 6, 2, 1, 16, 3, 12, 5, 0, false},   /* rows that are not aligned */
    {1, 6, 2, 1, 6, 3, 12, 0, 0, true},       {1, 6, 2, 1, 50, 25, 12, 0, 0, true},
    {1, 6, 4, 2, 32, 0, 12, 0, 0, true},                                            /* nothing turns */
    {1, 6, 4, 2, 32, 0, 12, 0, 0, false},     {1, 3, 1, 1, 64, 32, 1, 0, 0, false}, /* only the dump row */
};

/* One head in double: norm if there is a weight, then the turn of element j with j + pairs. */
static void ref_head(double *out, const float *x, const float *weight, double eps, const float *angles, int pairs,
                     int d) {
    double square = 0;
    for (int j = 0; j < d; j++) square += (double)x[j] * x[j];
    double *y = host_doubles((size_t)d);
    for (int j = 0; j < d; j++) y[j] = weight ? x[j] / sqrt(square / d + eps) * weight[j] : (double)x[j];
    for (int j = 0; j < d; j++) out[j] = y[j];
    for (int j = 0; j < pairs; j++) {
        const double c = angles[2 * j], s = angles[2 * j + 1];
        out[j] = c * y[j] - s * y[j + pairs];
        out[j + pairs] = c * y[j + pairs] + s * y[j];
    }
}

static void qkv_run(const qkv_case *c, rf_dtype dtype) {
    const int64_t B = c->batch, n = c->rows, hq = c->hq, hkv = c->hkv, d = c->d, C = c->cache;
    const int64_t width = (hq + 2 * hkv) * d, row_stride = hkv * d + c->extra,
                  batch_stride = C * row_stride + 3 * c->extra;
    const int64_t table_rows = c->table_rows ? c->table_rows : C;
    const float eps = 1e-3f; /* large enough to be seen */
    operand qkv = op_normal(dtype, (size_t)(B * n * width), 0.1, 0.2),
            q_out = op_poison(dtype, (size_t)(B * n * hq * d));
    operand k = op_poison(dtype, (size_t)(B * batch_stride)), v = op_poison(dtype, (size_t)(B * batch_stride));
    operand q_norm = op_normal(RF_DTYPE_F32, (size_t)d, 1, 0.3), k_norm = op_normal(RF_DTYPE_F32, (size_t)d, 1, 0.3);
    operand table = op_poison(RF_DTYPE_F32, (size_t)(table_rows * c->pairs * 2));
    for (size_t i = 0; i < table.num; i += 2) {
        const double angle = 6.283185307179586 * uniform();
        table.host[i] = (float)cos(angle);
        table.host[i + 1] = (float)sin(angle);
    }
    op_upload(&table);
    /* Every sequence's own positions, none twice; each third row is padding, at or past the dump row. */
    int32_t *positions = host_ints((size_t)(B * n)), *order = host_ints((size_t)C);
    for (int64_t b = 0; b < B; b++) {
        random_permutation(order, (int)C - 1, (uint64_t)(b + 7));
        for (int64_t i = 0; i < n; i++)
            positions[b * n + i] = i % 3 == 2 || i >= C - 1 ? (int32_t)(C - 1 + i % 5) : order[i];
    }
    const rf_qkv_rope_args a = {.qkv = qkv.dev,
                                .q_out = q_out.dev,
                                .k = k.dev,
                                .v = v.dev,
                                .dtype = dtype,
                                .batch = B,
                                .rows = n,
                                .num_q_heads = c->hq,
                                .num_kv_heads = c->hkv,
                                .head_dim = c->d,
                                .pairs = c->pairs,
                                .cache_rows = C,
                                .k_batch_stride = batch_stride,
                                .k_row_stride = row_stride,
                                .positions = dev_i32(positions, (size_t)(B * n)),
                                .q_norm = c->norm ? q_norm.dev : NULL,
                                .k_norm = c->norm ? k_norm.dev : NULL,
                                .norm_eps = eps,
                                .table = table.dev,
                                .table_rows = table_rows};
    expect_ok(test_ops()->qkv_rope(NULL, &a, &err));
    expect_ok(test_ops()->qkv_rope(test_stream(), &a, &err));

    double *want_q = host_doubles(q_out.num), *want_k = host_doubles(k.num), *want_v = host_doubles(v.num);
    for (size_t i = 0; i < k.num; i++) want_k[i] = want_v[i] = NAN;
    for (int64_t r = 0; r < B * n; r++) {
        const int64_t b = r / n, pos = positions[r], at = b * batch_stride + pos * row_stride;
        const float *in = qkv.host + r * width;
        const float *angles = table.host + (pos < table_rows ? pos : table_rows - 1) * c->pairs * 2;
        for (int64_t h = 0; h < hq; h++)
            ref_head(want_q + (r * hq + h) * d, in + h * d, c->norm ? q_norm.host : NULL, eps, angles, c->pairs, c->d);
        for (int64_t h = 0; h < hkv && pos < C - 1; h++) {
            ref_head(want_k + at + h * d, in + (hq + h) * d, c->norm ? k_norm.host : NULL, eps, angles, c->pairs, c->d);
            for (int64_t j = 0; j < d; j++) want_v[at + h * d + j] = in[(hq + hkv + h) * d + j];
        }
    }
    /* The dump row holds one padding row or parts of several: any numbers, past its heads nothing. */
    op_download(&k);
    op_download(&v);
    for (int64_t b = 0; b < B; b++) {
        bool padded = false;
        for (int64_t i = 0; i < n; i++) padded = padded || positions[b * n + i] >= C - 1;
        for (int64_t j = 0; j < hkv * d && padded; j++) {
            const int64_t at = b * batch_stride + (C - 1) * row_stride + j;
            ck_assert(isfinite(k.host[at]) && isfinite(v.host[at]));
            want_k[at] = k.host[at];
            want_v[at] = v.host[at];
        }
    }
    char what[160];
    snprintf(what, sizeof what, "b%d n%d h%d/%d d%d pairs %d cache %d +%d norm %d", c->batch, c->rows, c->hq, c->hkv,
             c->d, c->pairs, c->cache, c->extra, c->norm);
    expect_close(&q_out, want_q, dtype_bound(dtype), "qkv_rope q", "%s", what);
    expect_close(&k, want_k, dtype_bound(dtype), "qkv_rope k", "%s", what);
    expect_close(&v, want_v, 0, "qkv_rope v", "%s", what);
}

/* Keys and values to rows of pools, some nowhere: what the caches get, elsewhere. */
START_TEST(qkv_rope_reaches_listed_rows) {
    static const int dims[] = {64, 128, 80, 7};
    for (size_t n = 0; n < LENGTH(dims); n++) {
        enum { B = 3, N = 2, HQ = 4, HKV = 2, POOL = 30 };
        const int d = dims[n], pairs = d / 2, width = (HQ + 2 * HKV) * d;
        const rf_dtype dtype = test_dtype(_i);
        operand qkv = op_normal(dtype, (size_t)(B * N * width), 0, 1),
                q_out = op_poison(dtype, (size_t)(B * N * HQ * d));
        operand k = op_poison(dtype, (size_t)(B * N * HKV * d)), v = op_poison(dtype, (size_t)(B * N * HKV * d));
        operand k_pool = op_poison(dtype, (size_t)(POOL * d)), v_pool = op_poison(dtype, (size_t)(POOL * d));
        operand table = op_normal(RF_DTYPE_F32, (size_t)(N * pairs * 2), 0, 1);
        int32_t positions[B * N], pool_rows[B * N * HKV], order[POOL];
        random_permutation(order, POOL, 5);
        for (int i = 0; i < B * N; i++) positions[i] = i % N;
        for (int i = 0; i < B * N * HKV; i++) pool_rows[i] = i % 5 == 3 ? -1 : order[i];
        rf_qkv_rope_args a = {.qkv = qkv.dev,
                              .q_out = q_out.dev,
                              .k = k.dev,
                              .v = v.dev,
                              .dtype = dtype,
                              .batch = B,
                              .rows = N,
                              .num_q_heads = HQ,
                              .num_kv_heads = HKV,
                              .head_dim = d,
                              .pairs = pairs,
                              .cache_rows = N,
                              .k_batch_stride = N * HKV * d,
                              .k_row_stride = HKV * d,
                              .positions = dev_i32(positions, B * N),
                              .table = table.dev,
                              .table_rows = N};
        expect_ok(test_ops()->qkv_rope(test_stream(), &a, &err));
        op_download(&k);
        op_download(&v);
        a.k = k_pool.dev;
        a.v = v_pool.dev;
        a.pool_rows = dev_i32(pool_rows, B * N * HKV);
        expect_ok(test_ops()->qkv_rope(test_stream(), &a, &err));
        double *want_k = host_doubles(k_pool.num), *want_v = host_doubles(v_pool.num);
        for (size_t i = 0; i < k_pool.num; i++) want_k[i] = want_v[i] = NAN;
        for (int i = 0; i < B * N * HKV; i++)
            for (int x = 0; x < d && pool_rows[i] >= 0; x++) {
                want_k[pool_rows[i] * d + x] = k.host[i * d + x];
                want_v[pool_rows[i] * d + x] = v.host[i * d + x];
            }
        expect_close(&k_pool, want_k, 0, "qkv_rope pool of keys", "%d", d);
        expect_close(&v_pool, want_v, 0, "qkv_rope pool of values", "%d", d);
    }
}
END_TEST

START_TEST(qkv_rope_matches_double) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) qkv_run(&qkv_cases[_i], test_dtype(dtype));
}
END_TEST

/* ---- SwiGLU ---- */

START_TEST(swiglu_matches_double) {
    static const int shapes[][2] = {{32, 1024}, {3, 12288}, {5, 40}, {5, 12}, {4, 7}, {3, 1}, {0, 64}};
    const rf_dtype dtype = test_dtype(_i);
    for (size_t n = 0; n < LENGTH(shapes); n++) {
        for (int interleaved = 0; interleaved < 2; interleaved++) {
            const int64_t rows = shapes[n][0], cols = shapes[n][1];
            operand x = op_normal(dtype, (size_t)(rows * 2 * cols), 0, 2), y = op_poison(dtype, (size_t)(rows * cols));
            const int64_t gate = interleaved ? 2 : 1, up = interleaved ? 1 : cols;
            if (rows > 1 && cols > 1) { /* gates at the ends of the exponential's range */
                x.host[0] = 90, x.host[gate] = -90;
                op_upload(&x);
            }
            const rf_swiglu_args a = {
                .x = x.dev, .y = y.dev, .dtype = dtype, .rows = rows, .cols = cols, .interleaved = interleaved};
            expect_ok(test_ops()->swiglu(NULL, &a, &err));
            expect_ok(test_ops()->swiglu(test_stream(), &a, &err));
            double *want = host_doubles(y.num);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < cols; c++) {
                    const float *at = x.host + r * 2 * cols + c * gate;
                    want[r * cols + c] = ref_act(at[0], RF_ACT_SILU) * at[up];
                }
            expect_close(&y, want, dtype_bound(dtype), "swiglu", "%d rows of %d, interleaved %d", shapes[n][0],
                         shapes[n][1], interleaved);
        }
    }
}
END_TEST

/* ---- the head ---- */

typedef struct {
    operand x, w;
    int64_t rows, d, vocab;
    rf_head_stats_args args;
    const int32_t *bans, *keys, *refs; /* host copies of what args point to */
    int32_t step;
} head;

/* Multiples of 1/8, at most 4 in size, of standard deviation std. */
static operand of_eighths(rf_dtype dtype, size_t num, double std) {
    operand o = op_normal(RF_DTYPE_F32, num, 0, std), out = op_poison(dtype, num);
    for (size_t i = 0; i < num; i++) out.host[i] = fminf(fmaxf(rintf(o.host[i] * 8) / 8, -4), 4);
    op_upload(&out);
    return out;
}

static head make_head(rf_dtype dtype, int64_t rows, int64_t d, int64_t vocab) {
    head h = {.x = of_eighths(dtype, (size_t)(rows * d), 1), .w = of_eighths(dtype, (size_t)(vocab * d), 1)};
    h.rows = rows;
    h.d = d;
    h.vocab = vocab;
    h.args = (rf_head_stats_args){
        .x = h.x.dev, .w = h.w.dev, .dtype = dtype, .rows = rows, .cols = d, .vocab = vocab, .scale = 1};
    return h;
}

static void set_bans(head *h, const int32_t *bans, int num) {
    h->bans = bans;
    h->args.bans = dev_i32(bans, (size_t)num);
    h->args.num_bans = num;
}

static rf_token_stats *run_head(head *h) {
    const size_t bytes = (size_t)h->rows * sizeof(rf_token_stats),
                 need = test_ops()->head_stats_workspace(test_backend(), &h->args);
    rf_token_stats *stats = (rf_token_stats *)host_doubles(bytes / sizeof(double) + 1);
    h->args.out = dev_bytes(bytes);
    h->args.workspace = dev_bytes(need);
    h->args.workspace_bytes = need;
    expect_ok(test_ops()->head_stats(NULL, &h->args, &err));
    expect_ok(test_ops()->head_stats(test_stream(), &h->args, &err));
    download(stats, h->args.out, bytes);
    return stats;
}

/* Logits of a row as the operator defines them. */
static void ref_logits(const head *h, int64_t row, double *z) {
    const float *x = h->x.host + row * h->d;
    for (int64_t v = 0; v < h->vocab; v++) {
        const float *w = h->w.host + v * h->d;
        double sum = 0;
        for (int64_t i = 0; i < h->d; i++) sum += (double)x[i] * w[i];
        z[v] = sum * h->args.scale;
        if (h->args.round_logits) z[v] = rf_bf16_to_f32(rf_f32_to_bf16((float)z[v]));
    }
    for (int i = 0; i < h->args.num_bans; i++)
        if (h->bans[i] >= 0 && h->bans[i] < h->vocab) z[h->bans[i]] = -INFINITY;
}

static void ref_words(const head *h, int64_t row, int64_t v, uint32_t words[4]) {
    const uint32_t counter[4] = {(uint32_t)(v / 4), (uint32_t)(h->keys ? h->keys[row] : row), (uint32_t)h->step, 0};
    const uint32_t key[2] = {(uint32_t)h->args.seed, (uint32_t)(h->args.seed >> 32)};
    rf_philox4x32(counter, key, words);
}

static double ref_gumbel(uint32_t word) {
    return -log(-log((word + 0.5) * 0x1p-32));
}

/* Everything that is said of rows first, first + every, ...; slack: how far a chosen logit may lie below the best. */
static void check_head(const head *h, const rf_token_stats *got, int64_t every, double slack, const char *what) {
    double *z = host_doubles((size_t)h->vocab);
    for (int64_t r = 0; r < h->rows; r += every) {
        ref_logits(h, r, z);
        int64_t best = 0, second = -1;
        for (int64_t v = 1; v < h->vocab; v++)
            if (z[v] > z[best]) best = v;
        for (int64_t v = 0; v < h->vocab; v++)
            if (v != best && (second < 0 || z[v] > z[second])) second = v;
        double sum = 0, weighted = 0;
        for (int64_t v = 0; v < h->vocab; v++) {
            const double e = exp(z[v] - z[best]);
            sum += e;
            if (e > 0) weighted += e * (z[v] - z[best]);
        }
        const rf_token_stats *s = &got[r];
        const double lse = z[best] + log(sum);
        ck_assert_msg(s->best == best ||
                          (s->best >= 0 && s->best < h->vocab && z[best] - z[s->best] <= slack && slack > 0),
                      "%s: row %d: best %d, want %d", what, (int)r, s->best, (int)best);
        int64_t id = s->best;
        if (h->args.temperature > 0) {
            double top = -INFINITY, taken = -INFINITY;
            uint32_t words[4] = {0};
            for (int64_t v = 0; v < h->vocab; v++) {
                if (v % 4 == 0) ref_words(h, r, v, words);
                const double noisy = z[v] + (double)h->args.temperature * ref_gumbel(words[v % 4]);
                if (noisy > top) top = noisy;
                if (v == s->id) taken = noisy;
            }
            ck_assert_msg(taken >= top - 2e-5 - slack, "%s: row %d: drew %d at %.9g, the best is at %.9g", what, (int)r,
                          s->id, taken, top);
            id = s->id;
        }
        ck_assert_msg(s->id == id, "%s: row %d: id %d, best %d", what, (int)r, s->id, s->best);
        const double want[] = {exp(z[id] - lse), exp(z[best] - lse),
                               exp(z[best] - lse) - (second >= 0 ? exp(z[second] - lse) : 0), log(sum) - weighted / sum,
                               lse};
        const double have[] = {s->prob, s->best_prob, s->margin, s->entropy, s->lse};
        const double bound[] = {1e-5, 1e-5, 1e-5, 1e-4, 1e-5};
        static const char *const names[] = {"prob", "best_prob", "margin", "entropy", "lse"};
        for (int i = 0; i < 5; i++) {
            if (i == 2 && h->refs && h->args.rank_of_ref) continue;
            const double size = i < 3 ? 1 : 1 + fabs(want[i]);
            ck_assert_msg(fabs(have[i] - want[i]) <= bound[i] * size + 2 * slack, "%s: row %d: %s is %.9g, want %.9g",
                          what, (int)r, names[i], have[i], want[i]);
        }
        ck_assert_msg(s->entropy >= 0, "%s: row %d: entropy %g", what, (int)r, (double)s->entropy);
        const int32_t ref = h->refs ? h->refs[r] : -1;
        const bool known = ref >= 0 && ref < h->vocab;
        ck_assert_msg(fabs(s->ref_prob - (known ? exp(z[ref] - lse) : 0)) <= 1e-5 + 2 * slack,
                      "%s: row %d: ref_prob %.9g", what, (int)r, (double)s->ref_prob);
        if (known && h->args.rank_of_ref) {
            int64_t above = 0;
            for (int64_t v = 0; v < h->vocab; v++) above += z[v] > z[ref];
            ck_assert_msg(s->margin == (float)above, "%s: row %d: rank %g of id %d, want %d", what, (int)r,
                          (double)s->margin, ref, (int)above);
        }
    }
}

typedef struct {
    int rows, d, vocab, every; /* rows checked: each every-th */
} head_shape;
static const head_shape head_shapes[] = {
    {1, 16, 126464, 1},  {5, 16, 126464, 1}, {40, 16, 126464, 7}, {70, 16, 126464, 23}, /* one chunk, one, two (few rows), two */
    {3, 16, 7, 1},       {3, 16, 1, 1},      {9, 24, 2048, 1},    {9, 24, 2049, 1},     {9, 24, 4095, 1},
    {200, 8, 50001, 41}, {4, 64, 5000, 1},
};

START_TEST(head_stats_match_double) {
    const head_shape s = head_shapes[_i];
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), s.rows, s.d, s.vocab);
        char what[100];
        snprintf(what, sizeof what, "%d rows, width %d, %d ids", s.rows, s.d, s.vocab);
        check_head(&h, run_head(&h), s.every, 0, what);
    }
}
END_TEST

/* Logits as they come: sums round, ids within the rounding. */
START_TEST(head_stats_of_any_numbers) {
    const rf_dtype dtype = test_dtype(_i);
    head h = make_head(dtype, 21, 512, 3001);
    h.x = op_normal(dtype, h.x.num, 0, 1);
    h.w = op_normal(dtype, h.w.num, 0, 0.15);
    h.args.x = h.x.dev;
    h.args.w = h.w.dev;
    h.args.scale = 0.7f;
    check_head(&h, run_head(&h), 1, dtype == RF_DTYPE_F32 ? 2e-5 : 2e-4, "normal draws");
}
END_TEST

/* z[ref] is the logit that is counted, to the bit: the best id has none above it, whatever order its sum was taken in. */
START_TEST(the_best_id_has_rank_zero) {
    const rf_dtype dtype = test_dtype(_i);
    head h = make_head(dtype, 130, 520, 3001);
    h.x = op_normal(dtype, h.x.num, 0, 1);
    h.w = op_normal(dtype, h.w.num, 0, 0.3);
    h.args.x = h.x.dev;
    h.args.w = h.w.dev;
    for (int rounded = 0; rounded < 2; rounded++) {
        h.args.round_logits = rounded;
        h.args.refs = NULL;
        h.args.rank_of_ref = false;
        const rf_token_stats *best = run_head(&h);
        int32_t *refs = host_ints((size_t)h.rows);
        for (int64_t r = 0; r < h.rows; r++) refs[r] = best[r].best;
        h.args.refs = dev_i32(refs, (size_t)h.rows);
        for (int rank = 0; rank < 2; rank++) {
            h.args.rank_of_ref = rank;
            const rf_token_stats *got = run_head(&h);
            int64_t same = 0;
            for (int64_t r = 0; r < h.rows; r++) {
                if (got[r].best != refs[r]) continue; /* ranks take other passes: a tie within the rounding may fall */
                same++;
                ck_assert_float_eq(got[r].ref_prob, got[r].best_prob);
                ck_assert_float_eq(got[r].margin, rank ? 0 : best[r].margin);
            }
            ck_assert_int_ge(same, h.rows - 2);
        }
    }
}
END_TEST

/* Many maxima: the first id wins, wherever tiles end; margin 0. */
START_TEST(ties_go_to_the_lowest_id) {
    enum { V = 126464, D = 8, ROWS = 6 };
    static const int32_t places[ROWS][3] = {{0, 1, V - 1},   {2047, 2048, 2049},     {5, 63231, 63232},
                                            {3, 1023, 1024}, {65535, 65536, 126463}, {126460, 126461, 126462}};
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), ROWS, D, V);
        for (int64_t i = 0; i < ROWS * D; i++) h.x.host[i] = i / D == i % D; /* logits of row r: column r of w */
        for (int64_t v = 0; v < V; v++)
            for (int r = 0; r < ROWS; r++) h.w.host[v * D + r] = fminf(h.w.host[v * D + r], 3.5f);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 3; i++) h.w.host[places[r][i] * D + r] = 3.75f;
        op_upload(&h.x);
        op_upload(&h.w);
        const rf_token_stats *got = run_head(&h);
        for (int r = 0; r < ROWS; r++) {
            ck_assert_int_eq(got[r].id, places[r][0]);
            ck_assert_int_eq(got[r].best, places[r][0]);
            ck_assert_float_eq(got[r].margin, 0);
        }
        check_head(&h, got, 1, 0, "ties");
    }
}
END_TEST

START_TEST(banned_ids_do_not_count) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), 12, 16, 5000);
        const rf_token_stats *free_ids = run_head(&h);
        int32_t bans[8] = {free_ids[0].best, free_ids[1].best, -1, 5000, 0, 4999, free_ids[1].best, 2048};
        set_bans(&h, bans, 8);
        const rf_token_stats *got = run_head(&h);
        ck_assert_int_ne(got[0].best, bans[0]);
        check_head(&h, got, 1, 0, "bans");

        head few = make_head(test_dtype(dtype), 3, 16, 7); /* all but id 4 */
        static const int32_t others[] = {0, 1, 2, 3, 5, 6};
        set_bans(&few, others, 6);
        for (int sampled = 0; sampled < 2; sampled++) {
            few.args.temperature = (float)sampled;
            got = run_head(&few);
            for (int r = 0; r < 3; r++) {
                ck_assert_int_eq(got[r].id, 4);
                ck_assert_int_eq(got[r].best, 4);
                ck_assert_float_eq(got[r].prob, 1);
                ck_assert_float_eq(got[r].best_prob, 1);
                ck_assert_float_eq(got[r].margin, 1);
                ck_assert_float_eq(got[r].entropy, 0);
            }
            check_head(&few, got, 1, 0, "all banned but one");
        }
        static const int32_t all[] = {0, 1, 2, 3, 4, 5, 6};
        set_bans(&few, all, 7);
        for (int sampled = 0; sampled < 2;
             sampled++) { /* nothing is left: no numbers that are none, an id that exists */
            few.args.temperature = (float)sampled;
            got = run_head(&few);
            for (int r = 0; r < 3; r++) {
                ck_assert(got[r].id >= 0 && got[r].id < 7 && got[r].best >= 0 && got[r].best < 7);
                ck_assert(got[r].prob == 0 && got[r].best_prob == 0 && got[r].margin == 0 && got[r].entropy == 0);
                ck_assert(isinf(got[r].lse) && got[r].lse < 0);
            }
        }
    }
}
END_TEST

/* Large logits, and one far above all others. */
START_TEST(head_stats_of_large_logits) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), 6, 16, 9000);
        h.args.scale = 64; /* exact; differences of hundreds */
        check_head(&h, run_head(&h), 1, 0, "times 64");
        h.args.scale = -1;
        check_head(&h, run_head(&h), 1, 0, "times -1");
    }
}
END_TEST

/* Rounded to bf16, distinct logits meet; the sums stay those of the rounded ones. */
START_TEST(round_logits_rounds_first) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), 40, 16, 20000);
        for (size_t i = 0; i < h.x.num; i++) /* half of the columns add 128: logits in steps of 1 */
            if (i % 16 < 8) h.x.host[i] = 4;
        for (size_t i = 0; i < h.w.num; i++)
            if (i % 16 < 8) h.w.host[i] = 4;
        op_upload(&h.x);
        op_upload(&h.w);
        const rf_token_stats *plain = run_head(&h);
        h.args.round_logits = true;
        const rf_token_stats *rounded = run_head(&h);
        check_head(&h, rounded, 1, 0, "rounded");
        int moved = 0;
        for (int r = 0; r < 40; r++) moved += plain[r].best != rounded[r].best;
        ck_assert_msg(moved > 5, "rounding changed the best id of %d rows of 40", moved);
        h.args.scale = 0.3125f;
        check_head(&h, run_head(&h), 1, 0, "scaled, rounded");
    }
}
END_TEST

START_TEST(refs_have_probabilities_and_ranks) {
    static const head_shape shapes[] = {{13, 16, 126464, 4}, {6, 16, 7, 1}, {300, 8, 126464, 97}, {70, 8, 4097, 1}};
    for (size_t n = 0; n < LENGTH(shapes); n++) {
        for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
            const head_shape s = shapes[n];
            head h = make_head(test_dtype(dtype), s.rows, s.d, s.vocab);
            const rf_token_stats *best = run_head(&h);
            int32_t *refs = host_ints((size_t)s.rows);
            for (int r = 0; r < s.rows; r++) refs[r] = r % 3 == 0 ? best[r].best : uniform_int(s.vocab);
            refs[1] = -1, refs[2] = s.vocab, refs[s.rows - 1] = s.vocab - 1;
            h.refs = refs;
            h.args.refs = dev_i32(refs, (size_t)s.rows);
            for (int rank = 0; rank < 2; rank++) {
                h.args.rank_of_ref = rank;
                const rf_token_stats *got = run_head(&h);
                check_head(&h, got, s.every, 0, rank ? "rank" : "refs");
                for (int r = 3; r < s.rows - 1 && rank; r += 3)
                    ck_assert_float_eq(got[r].margin, 0); /* none above the best */
            }
            int32_t bans[1] = {refs[0]}; /* a banned reference has no probability */
            set_bans(&h, bans, 1);
            h.args.rank_of_ref = false;
            const rf_token_stats *got = run_head(&h);
            ck_assert_float_eq(got[0].ref_prob, 0);
            check_head(&h, got, s.every, 0, "banned ref");
        }
    }
}
END_TEST

/* A row says the same alone and among others, and every time. */
START_TEST(head_stats_do_not_depend_on_the_batch) {
    enum { V = 126464, D = 16, ROWS = 70 };
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), ROWS, D, V);
        int32_t keys[ROWS];
        for (int r = 0; r < ROWS; r++) keys[r] = 1000 - r;
        h.args.keys = dev_i32(keys, ROWS);
        h.args.temperature = 1.5f;
        h.args.seed = UINT64_C(0x123456789abcdef);
        const rf_token_stats *all = run_head(&h), *again = run_head(&h);
        ck_assert_mem_eq(all, again, ROWS * sizeof *all);
        for (int r = 0; r < ROWS; r += 23) {
            head one = h;
            one.rows = one.args.rows = 1;
            one.args.x = (const char *)h.x.dev + (size_t)(r * D) * rf_dtype_bytes(h.x.dtype);
            one.args.keys = h.args.keys + r;
            const rf_token_stats *alone = run_head(&one);
            ck_assert_mem_eq(alone, &all[r], sizeof *alone);
        }
    }
}
END_TEST

/* ---- sampling ---- */

START_TEST(sampled_ids_follow_the_noise) {
    static const head_shape shapes[] = {{30, 16, 126464, 7}, {20, 16, 7, 1}, {20, 16, 4099, 1}};
    for (size_t n = 0; n < LENGTH(shapes); n++) {
        for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
            const head_shape s = shapes[n];
            head h = make_head(test_dtype(dtype), s.rows, s.d, s.vocab);
            h.args.seed = UINT64_C(0xfedcba9876543210);
            h.args.temperature = n == 0 ? 4 : 0.8f;
            check_head(&h, run_head(&h), s.every, 0, "row numbers as keys");
            int32_t *keys = host_ints((size_t)s.rows);
            for (int r = 0; r < s.rows; r++) keys[r] = 3 * r + 70000;
            h.keys = keys;
            h.args.keys = dev_i32(keys, (size_t)s.rows);
            h.step = 17;
            h.args.step = dev_i32(&h.step, 1);
            check_head(&h, run_head(&h), s.every, 0, "keys and step");
        }
    }
}
END_TEST

/* Equal logits: the id of the largest word is drawn, however close to u = 1 it lies. Keys from 1815 on: the two largest words are
 * of one u in f32, and the larger has the higher id. */
START_TEST(noise_keeps_its_digits_near_one) {
    enum { V = 126464, D = 8, ROWS = 24 };
    static const int32_t keys[ROWS] = {1815, 1986, 2246, 2261, 0,  1,  2,  3,  4,  5,  6,  7,
                                       8,    9,    10,   11,   12, 13, 14, 15, 16, 17, 18, 19};
    head h = make_head(test_dtype(_i), ROWS, D, V);
    h.keys = keys;
    h.args.keys = dev_i32(keys, ROWS);
    memset(h.w.host, 0, h.w.num * sizeof(float));
    op_upload(&h.w);
    h.args.temperature = 1;
    h.args.seed = 5;
    const rf_token_stats *got = run_head(&h);
    for (int r = 0; r < ROWS; r++) {
        uint32_t words[4] = {0}, top = 0;
        int32_t best = 0;
        for (int32_t v = 0; v < V; v++) {
            if (v % 4 == 0) ref_words(&h, r, v, words);
            if (words[v % 4] > top) top = words[v % 4], best = v;
        }
        ck_assert_msg(got[r].id == best, "row %d: drew %d, the largest word, %u, is that of %d", r, got[r].id, top,
                      best);
    }
}
END_TEST

/* Draws of 12 ids by thousands of rows are distributed as softmax(z / T); another seed or step draws anew. */
START_TEST(sampling_has_the_right_distribution) {
    enum { V = 12, D = 8, ROWS = 6000 };
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) {
        head h = make_head(test_dtype(dtype), ROWS, D, V);
        for (int64_t i = 0; i < ROWS * D; i++) h.x.host[i] = i % D == 0; /* logits: column 0 of w */
        for (int v = 0; v < V; v++) h.w.host[v * D] = (float)(v % 5) / 4;
        op_upload(&h.x);
        op_upload(&h.w);
        int32_t *last = NULL;
        for (int round = 0; round < 3; round++) {
            h.args.seed = round == 1 ? UINT64_C(9) << 32 | 77 : 77; /* the upper half counts */
            h.step = round == 2 ? 1 : 0;
            h.args.step = dev_i32(&h.step, 1);
            h.args.temperature = 0.7f;
            const rf_token_stats *got = run_head(&h);
            double p[V], sum = 0, chi = 0;
            int counts[V] = {0}, same = 0;
            for (int v = 0; v < V; v++) sum += p[v] = exp((double)h.w.host[v * D] / 0.7);
            int32_t *ids = host_ints(ROWS);
            for (int r = 0; r < ROWS; r++) {
                ck_assert(got[r].id >= 0 && got[r].id < V);
                counts[got[r].id]++;
                ids[r] = got[r].id;
                same += last && last[r] == ids[r];
                ck_assert_int_eq(got[r].best, 4);
            }
            for (int v = 0; v < V; v++) {
                const double want = ROWS * p[v] / sum;
                chi += (counts[v] - want) * (counts[v] - want) / want;
            }
            /* 11 degrees of freedom: above 31.3 once in a thousand */
            ck_assert_msg(chi < 31.3 && chi > 0.5, "round %d: chi-square of %d draws is %g", round, ROWS, chi);
            ck_assert_msg(!last || same < ROWS / 4, "round %d: %d of %d draws as before", round, same, ROWS);
            last = ids;
        }
    }
}
END_TEST

START_TEST(head_workspace_grows_with_rows_alone) {
    head h = make_head(test_dtype(_i), 1, 8, 9);
    static const int64_t vocabs[] = {9, 32000, 126464, 151936};
    for (size_t n = 0; n < LENGTH(vocabs); n++) {
        size_t last = 0;
        for (int64_t rows = 1; rows < 3000; rows += rows < 300 ? 1 : 97) {
            rf_head_stats_args a = h.args;
            a.rows = rows;
            a.vocab = vocabs[n];
            const size_t need = test_ops()->head_stats_workspace(test_backend(), &a);
            ck_assert_msg(need >= last, "%d rows of %d ids: %zu bytes after %zu", (int)rows, (int)vocabs[n], need,
                          last);
            last = need;
            a.rank_of_ref = true; /* one workspace serves every call */
            ck_assert_uint_eq(test_ops()->head_stats_workspace(test_backend(), &a), need);
        }
    }
    const size_t need = test_ops()->head_stats_workspace(test_backend(), &h.args);
    if (need == 0) return;
    h.args.out = dev_bytes(sizeof(rf_token_stats));
    h.args.workspace = dev_bytes(need);
    h.args.workspace_bytes = need - 1;
    expect_status(test_ops()->head_stats(test_stream(), &h.args, &err), RF_ERR_WORKSPACE);
}
END_TEST

/* ---- attention seen ---- */

typedef struct {
    int batch, rows, hq, hkv, d, keys, cache, extra; /* cache: rows of a sequence's cache */
    int queries;                                     /* listed query rows; 0: all */
    bool key_list, lens;
} taps_case;
static const taps_case taps_cases[] = {
    {1, 32, 8, 8, 128, 200, 256, 0, 0, false, false},
    {2, 33, 8, 2, 128, 100, 128, 0, 0, false, true}, /* grouped heads, sequences of different lengths */
    {1, 40, 4, 4, 64, 77, 100, 64, 9, false, true},
    {1, 70, 4, 1, 64, 50, 100, 0, 0, true, false}, /* more queries than a tile */
    {1, 20, 20, 4, 96, 64, 100, 0, 5, true, true}, /* more heads than warps */
    {3, 5, 3, 3, 72, 17, 20, 0, 0, false, true},
    {1, 5, 2, 1, 80, 16, 20, 0, 3, false, false},
    {1, 5, 2, 1, 256, 16, 20, 0, 3, true, false},
    {1, 6, 2, 2, 50, 33, 40, 3, 0, false, false}, /* rows that are not aligned */
    {1, 1, 1, 1, 8, 1, 2, 0, 0, false, false},
    {1, 1, 1, 1, 64, 15, 16, 0, 1, false, true},
};

typedef struct {
    operand q, k;
    int32_t *query_rows, *keys, *lens; /* lists as tests use them: filled in whether the case has them or not */
    int64_t row_stride, batch_stride, num_queries;
    double scale;
} taps;

/* Cache rows that no listed key names are not numbers, nor are those past a length. */
static taps make_taps(const taps_case *c, rf_dtype dtype) {
    taps t = {.row_stride = c->hkv * c->d + c->extra, .scale = 1.3 / sqrt(c->d)};
    t.batch_stride = c->cache * t.row_stride;
    t.num_queries = c->queries ? c->queries : c->rows;
    t.q = op_normal(dtype, (size_t)(c->batch * c->rows * c->hq * c->d), 0, 1);
    t.k = op_normal(dtype, (size_t)(c->batch * t.batch_stride), 0, 1);
    t.query_rows = host_ints((size_t)c->rows);
    t.keys = host_ints((size_t)c->cache);
    t.lens = host_ints((size_t)c->batch);
    for (int i = 0; i < c->rows; i++) t.query_rows[i] = i;
    for (int i = 0; i < c->cache; i++) t.keys[i] = i;
    if (c->queries) random_permutation(t.query_rows, c->rows, 21);
    if (c->key_list) random_permutation(t.keys, c->cache, 22);
    for (int b = 0; b < c->batch; b++) t.lens[b] = c->lens ? (c->keys * (b + 2)) / (c->batch + 2) : c->keys;
    if (c->lens && c->batch > 2) t.lens[1] = 0, t.lens[2] = c->keys + 5; /* none, and more than there are */
    for (int b = 0; b < c->batch; b++) {
        bool *seen = (bool *)host_doubles((size_t)c->cache);
        for (int j = 0; j < c->keys && j < t.lens[b]; j++) seen[t.keys[j]] = true;
        for (int64_t r = 0; r < c->cache; r++)
            for (int64_t i = 0; i < t.row_stride; i++)
                if (!seen[r] || i >= c->hkv * c->d) t.k.host[b * t.batch_stride + r * t.row_stride + i] = NAN;
    }
    op_upload(&t.k);
    return t;
}

/* scale * q . k of packed query row `row` of sequence b, head h, key number j. */
static double ref_score(const taps_case *c, const taps *t, int b, int64_t row, int h, int j) {
    const float *q = t->q.host + ((b * c->rows + row) * c->hq + h) * c->d;
    const float *k = t->k.host + b * t->batch_stride + t->keys[j] * t->row_stride + h / (c->hq / c->hkv) * c->d;
    double sum = 0;
    for (int i = 0; i < c->d; i++) sum += (double)q[i] * k[i];
    return sum * t->scale;
}

static void mass_run(const taps_case *c, rf_dtype dtype) {
    const taps t = make_taps(c, dtype);
    const int64_t n = c->rows, heads = c->hq, num_keys = c->keys;
    operand lse = op_poison(RF_DTYPE_F32, (size_t)(c->batch * heads * n)),
            mass = op_poison(RF_DTYPE_F32, (size_t)(c->batch * num_keys));
    operand head_mass = op_poison(RF_DTYPE_F32, (size_t)(c->batch * heads * num_keys));
    double *want = host_doubles(mass.num), *want_head = host_doubles(head_mass.num),
           *score = host_doubles((size_t)num_keys);
    for (int b = 0; b < c->batch; b++) {
        const int seen = t.lens[b] < c->keys ? t.lens[b] : c->keys;
        for (int h = 0; h < heads; h++) {
            for (int64_t i = 0; i < t.num_queries; i++) {
                const int64_t row = t.query_rows[i];
                double sum = 0;
                for (int j = 0; j < seen; j++) sum += exp(score[j] = ref_score(c, &t, b, row, h, j));
                float *l = &lse.host[(b * heads + h) * n + row];
                *l = seen == 0 || (n > 4 && i == 2) ? -INFINITY : (float)log(sum); /* one row that saw nothing */
                for (int j = 0; j < seen; j++) {
                    const double p = *l == -INFINITY ? 0 : exp(score[j] - (double)*l);
                    want[b * num_keys + j] += p;
                    want_head[(b * heads + h) * num_keys + j] += p;
                }
            }
        }
    }
    op_upload(&lse);
    char what[160];
    snprintf(what, sizeof what, "b%d n%d h%d/%d d%d keys %d of %d, queries %d, list %d lens %d", c->batch, c->rows,
             c->hq, c->hkv, c->d, c->keys, c->cache, c->queries, c->key_list, c->lens);
    for (int outs = 1; outs < 4; outs++) { /* the sum, the heads, both */
        rf_attention_mass_args a = {.q = t.q.dev,
                                    .k = t.k.dev,
                                    .lse = lse.dev,
                                    .mass = outs & 1 ? mass.dev : NULL,
                                    .head_mass = outs & 2 ? head_mass.dev : NULL,
                                    .dtype = dtype,
                                    .batch = c->batch,
                                    .rows = n,
                                    .num_queries = t.num_queries,
                                    .num_keys = num_keys,
                                    .num_q_heads = c->hq,
                                    .num_kv_heads = c->hkv,
                                    .head_dim = c->d,
                                    .k_batch_stride = t.batch_stride,
                                    .k_row_stride = t.row_stride,
                                    .query_rows = c->queries ? dev_i32(t.query_rows, (size_t)t.num_queries) : NULL,
                                    .keys = c->key_list ? dev_i32(t.keys, (size_t)num_keys) : NULL,
                                    .kv_lens = c->lens ? dev_i32(t.lens, (size_t)c->batch) : NULL,
                                    .scale = (float)t.scale};
        expect_ok(test_ops()->attention_mass(NULL, &a, &err));
        expect_ok(test_ops()->attention_mass(test_stream(), &a, &err));
        if (outs & 1) expect_close(&mass, want, 1e-5, "attention_mass", "%s", what);
        if (outs & 2) expect_close(&head_mass, want_head, 1e-5, "attention_mass heads", "%s", what);
        operand first = op_clone(outs & 1 ? &mass : &head_mass);
        expect_ok(test_ops()->attention_mass(test_stream(), &a, &err));
        expect_same_bits(&first, outs & 1 ? &mass : &head_mass, "attention_mass", "twice, %s", what);
        if (outs == 2) { /* to be written anew */
            mass = op_poison(RF_DTYPE_F32, mass.num);
            head_mass = op_poison(RF_DTYPE_F32, head_mass.num);
        }
    }
}

START_TEST(attention_mass_matches_double) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) mass_run(&taps_cases[_i], test_dtype(dtype));
}
END_TEST

static void probs_run(const taps_case *full, rf_dtype dtype) {
    taps_case one = *full; /* a batch of one */
    const taps_case *c = &one;
    one.batch = 1;
    const taps t = make_taps(c, dtype);
    const int64_t heads = c->hq, num_keys = c->keys, rows = t.num_queries;
    operand probs = op_poison(RF_DTYPE_F32, (size_t)(rows * heads * num_keys));
    double *want = host_doubles(probs.num);
    const int seen = t.lens[0];
    for (int64_t i = 0; i < rows; i++) {
        for (int h = 0; h < heads; h++) {
            double *p = want + (i * heads + h) * num_keys, top = -INFINITY, sum = 0;
            for (int j = 0; j < seen; j++) top = fmax(top, p[j] = ref_score(c, &t, 0, t.query_rows[i], h, j));
            for (int j = 0; j < seen; j++) sum += p[j] = exp(p[j] - top);
            for (int j = 0; j < seen; j++) p[j] /= sum;
        }
    }
    const rf_attention_probs_args a = {.q = t.q.dev,
                                       .k = t.k.dev,
                                       .probs = probs.dev,
                                       .dtype = dtype,
                                       .num_rows = rows,
                                       .num_keys = num_keys,
                                       .q_row_stride = heads * c->d,
                                       .k_row_stride = t.row_stride,
                                       .q_index = c->queries ? dev_i32(t.query_rows, (size_t)rows) : NULL,
                                       .keys = c->key_list ? dev_i32(t.keys, (size_t)num_keys) : NULL,
                                       .kv_len = c->lens ? dev_i32(t.lens, 1) : NULL,
                                       .num_q_heads = c->hq,
                                       .num_kv_heads = c->hkv,
                                       .head_dim = c->d,
                                       .scale = (float)t.scale};
    expect_ok(test_ops()->attention_probs(NULL, &a, &err));
    expect_ok(test_ops()->attention_probs(test_stream(), &a, &err));
    expect_close(&probs, want, 1e-5, "attention_probs", "%d rows h%d/%d d%d keys %d of %d, list %d lens %d", (int)rows,
                 c->hq, c->hkv, c->d, c->keys, c->cache, c->key_list, c->lens);
}

START_TEST(attention_probs_match_double) {
    for (int dtype = 0; dtype < test_num_dtypes(); dtype++) probs_run(&taps_cases[_i], test_dtype(dtype));
}
END_TEST

/* ---- cosines ---- */

typedef struct {
    int rows, cols, a_ld, b_ld, step, b_count; /* b_count: rows of b that are listed; 0 = no list */
} cosine_case;
static const cosine_case cosine_cases[] = {
    {37, 4096, 4096, 4096, 0, 0}, {37, 256, 264, 256, 1, 50}, {5, 100, 100, 103, 1, 0},
    {9, 7, 7, 8, 0, 4},           {300, 8, 1, 1, 300, 0}, /* over heads: rows are neighbours, columns apart */
    {130, 12, 1, 1, 301, 200},    {6, 10, 33, 40, 3, 0},  /* both apart */
    {1, 1, 1, 1, 1, 0},
};

START_TEST(cosine_rows_match_double) {
    for (size_t n = 0; n < LENGTH(cosine_cases); n++) {
        for (int pair = 0; pair < test_num_dtypes() * test_num_dtypes(); pair++) {
            const cosine_case c = cosine_cases[n];
            const rf_dtype a_dtype = test_dtype(pair % 2), b_dtype = test_dtype(pair / 2);
            const int64_t step = c.step ? c.step : 1, b_rows = c.b_count ? c.b_count : c.rows;
            operand a = op_normal(a_dtype, (size_t)((c.rows - 1) * c.a_ld + (c.cols - 1) * step + 1), 0.3, 1);
            operand b = op_normal(b_dtype, (size_t)((b_rows - 1) * c.b_ld + (c.cols - 1) * step + 1), 0.3, 1);
            operand out = op_poison(RF_DTYPE_F32, (size_t)c.rows);
            for (int64_t i = 0; i < c.cols && c.rows > 4;
                 i++) { /* a row of zeros has no direction; one of tiny numbers has */
                a.host[2 * c.a_ld + i * step] = 0;
                a.host[3 * c.a_ld + i * step] = i % 2 ? 0x1p-20f : 0x1p-21f;
            }
            op_upload(&a);
            int32_t *list = host_ints((size_t)c.rows);
            for (int r = 0; r < c.rows; r++) list[r] = c.b_count ? uniform_int(c.b_count) : r;
            const rf_cosine_rows_args args = {.a = a.dev,
                                              .b = b.dev,
                                              .cosine = out.dev,
                                              .a_dtype = a_dtype,
                                              .b_dtype = b_dtype,
                                              .rows = c.rows,
                                              .cols = c.cols,
                                              .a_ld = c.a_ld,
                                              .b_ld = c.b_ld,
                                              .col_stride = c.step,
                                              .b_rows = c.b_count ? dev_i32(list, (size_t)c.rows) : NULL};
            expect_ok(test_ops()->cosine_rows(NULL, &args, &err));
            expect_ok(test_ops()->cosine_rows(test_stream(), &args, &err));
            double *want = host_doubles(out.num);
            for (int64_t r = 0; r < c.rows; r++) {
                double xy = 0, xx = 0, yy = 0;
                for (int64_t i = 0; i < c.cols; i++) {
                    const double x = a.host[r * c.a_ld + i * step], y = b.host[list[r] * c.b_ld + i * step];
                    xy += x * y;
                    xx += x * x;
                    yy += y * y;
                }
                want[r] = xy / fmax(sqrt(xx) * sqrt(yy), 1e-8);
            }
            expect_abs(&out, want, 2e-6, "cosine_rows", "%d x %d, ld %d %d, step %d, list %d", c.rows, c.cols, c.a_ld,
                       c.b_ld, c.step, c.b_count);
        }
    }
}
END_TEST

/* ---- selections ---- */

static const float *sort_values;
static int by_value(const void *pa, const void *pb) {
    const int32_t a = *(const int32_t *)pa, b = *(const int32_t *)pb;
    const float x = sort_values[a], y = sort_values[b];
    if (isnan(x) != isnan(y)) return isnan(x) ? -1 : 1;
    if (x < y || x > y) return x < y ? -1 : 1;
    return a < b ? -1 : 1;
}
static int by_index(const void *pa, const void *pb) {
    const int32_t a = *(const int32_t *)pa, b = *(const int32_t *)pb;
    return a < b ? -1 : a > b;
}

/* kind 0: all different; 1: few values; 2: both signs of zero, infinities, not-a-numbers; 3: all equal. */
static operand select_values(int kind, int num) {
    operand values = op_normal(RF_DTYPE_F32, (size_t)num, 0, 1);
    static const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-40f, 3.4e38f, -3.4e38f, 1.0f};
    for (int i = 0; i < num; i++) {
        if (kind == 1) values.host[i] = rintf(values.host[i] * 2);
        if (kind == 2) values.host[i] = odd[uniform_int((int)LENGTH(odd))];
        if (kind == 2 && isnan(values.host[i]) && i % 2) values.host[i] = -NAN;
        if (kind == 3) values.host[i] = -2.5f;
    }
    op_upload(&values);
    return values;
}

START_TEST(select_smallest_sorts) {
    static const int nums[] = {1, 2, 31, 33, 1000, 1024, 1025, 4095, 4096, 4097, 32767, 32768};
    for (size_t n = 0; n < LENGTH(nums); n++) {
        for (int kind = 0; kind < 4; kind++) {
            const int num = nums[n], counts[] = {1, num / 3 + 1, num / 2 + 1, num > 1 ? num - 1 : 1, num};
            const operand values = select_values(kind, num);
            int32_t *order = host_ints((size_t)num), *want = host_ints((size_t)num), *got = host_ints((size_t)num + 1);
            for (int i = 0; i < num; i++) order[i] = i;
            sort_values = values.host;
            qsort(order, (size_t)num, sizeof *order, by_value);
            for (size_t k = 0; k < LENGTH(counts); k++) {
                const int count = counts[k];
                memcpy(want, order, (size_t)count * sizeof *want);
                qsort(want, (size_t)count, sizeof *want, by_index);
                rf_select_smallest_args a = {.values = values.dev, .num = num, .count = count};
                a.out = dev_bytes(((size_t)count + 1) * sizeof(int32_t));
                expect_ok(test_ops()->select_smallest(NULL, &a, &err));
                expect_ok(test_ops()->select_smallest(test_stream(), &a, &err));
                download(got, a.out, ((size_t)count + 1) * sizeof *got);
                for (int i = 0; i < count; i++)
                    ck_assert_msg(got[i] == want[i], "%d of %d, kind %d: place %d is %d (%g), want %d (%g)", count, num,
                                  kind, i, got[i], got[i] >= 0 && got[i] < num ? (double)values.host[got[i]] : 0.0,
                                  want[i], (double)values.host[want[i]]);
                ck_assert_int_eq(got[count], -1); /* nothing past the end */
            }
        }
    }
}
END_TEST

static int32_t run_argmax(const rf_argmax_args *args) {
    int32_t out = 0;
    rf_argmax_args a = *args;
    a.out = dev_bytes(sizeof out);
    expect_ok(test_ops()->argmax(NULL, &a, &err));
    expect_ok(test_ops()->argmax(test_stream(), &a, &err));
    download(&out, a.out, sizeof out);
    return out;
}

static const int argmax_nums[] = {1, 31, 100, 1024, 1025, 5000, 40000};

START_TEST(argmax_takes_the_first_allowed) {
    const int num = argmax_nums[_i];
    for (int kind = 0; kind < 4; kind++) {
        operand values = select_values(kind, num);
        if (kind == 2) values.host[0] = values.host[num > 30 ? 30 : 0] = NAN; /* the first that is allowed */
        op_upload(&values);
        uint8_t *allowed = (uint8_t *)host_doubles((size_t)num);
        for (int density = 0; density < 4; density++) { /* no list, half, a few, none */
            for (int i = 0; i < num; i++)
                allowed[i] = density == 1 ? uniform() < 0.5 : density == 2 ? (i % 97 == 30) * 7 : 0;
            const uint8_t *dev = density ? dev_u8(allowed, (size_t)num) : NULL;
            const int32_t limits[] = {num, num / 2, 0, -3, num + 10};
            for (size_t k = 0; k < LENGTH(limits) + 1; k++) {
                const int limit = k == 0 ? num : limits[k - 1] < num ? limits[k - 1] : num;
                int32_t want = -1;
                for (int32_t i = 0; i < limit; i++)
                    if ((!density || allowed[i]) &&
                        (want < 0 || values.host[i] > values.host[want] ||
                         (isnan(values.host[want]) && !isnan(values.host[i])))) /* not-a-numbers are the smallest */
                        want = i;
                const rf_argmax_args a = {
                    .values = values.dev, .allowed = dev, .num = num, .num_dev = k ? dev_i32(&limits[k - 1], 1) : NULL};
                const int32_t got = run_argmax(&a);
                ck_assert_msg(got == want, "%d values, kind %d, allowed %d, limit %d: %d, want %d", num, kind, density,
                              limit, got, want);
            }
        }
    }
    const rf_argmax_args none = {.values = of_ones(RF_DTYPE_F32, 1).dev, .num = 0};
    ck_assert_int_eq(run_argmax(&none), -1);
}
END_TEST

/* ---- arguments ---- */

/* `field = value` in a copy of good arguments makes the operator say why not, at plan time. */
#define expect_refusal(op, good, field, value, status)                                                                 \
    do {                                                                                                               \
        __typeof__(good) bad_ = (good);                                                                                \
        bad_.field = (value);                                                                                          \
        expect_status(test_ops()->op(NULL, &bad_, &err), status);                                                      \
        expect_status(test_ops()->op(test_stream(), &bad_, &err), status);                                             \
    } while (0)

START_TEST(bad_arguments_are_refused) {
    const rf_dtype f32 = RF_DTYPE_F32, other = RF_DTYPE_I32;
    rf_embed_args embed = {.dtype = f32, .out_dtype = f32, .rows = 2, .cols = 8, .vocab = 5, .scale = 1};
    expect_ok(test_ops()->embed(NULL, &embed, &err));
    expect_refusal(embed, embed, dtype, other, RF_ERR_DTYPE);
    expect_refusal(embed, embed, out_dtype, other, RF_ERR_DTYPE);
    expect_refusal(embed, embed, cols, 0, RF_ERR_SHAPE);
    expect_refusal(embed, embed, rows, -1, RF_ERR_SHAPE);
    expect_refusal(embed, embed, vocab, 0, RF_ERR_SHAPE);
    expect_status(test_ops()->embed(test_stream(), &embed, &err), RF_ERR_ARGUMENT);

    rf_qkv_rope_args qkv = {.dtype = f32,
                            .batch = 1,
                            .rows = 2,
                            .num_q_heads = 4,
                            .num_kv_heads = 2,
                            .head_dim = 16,
                            .pairs = 8,
                            .cache_rows = 10,
                            .k_batch_stride = 320,
                            .k_row_stride = 32,
                            .table_rows = 10};
    expect_ok(test_ops()->qkv_rope(NULL, &qkv, &err));
    expect_refusal(qkv_rope, qkv, dtype, other, RF_ERR_DTYPE);
    expect_refusal(qkv_rope, qkv, num_kv_heads, 3, RF_ERR_SHAPE);
    expect_refusal(qkv_rope, qkv, pairs, 9, RF_ERR_SHAPE);
    expect_refusal(qkv_rope, qkv, head_dim, 0, RF_ERR_SHAPE);
    expect_refusal(qkv_rope, qkv, k_row_stride, 31, RF_ERR_SHAPE);
    expect_refusal(qkv_rope, qkv, cache_rows, 0, RF_ERR_SHAPE);
    expect_refusal(qkv_rope, qkv, table_rows, 0, RF_ERR_SHAPE);
    expect_status(test_ops()->qkv_rope(test_stream(), &qkv, &err), RF_ERR_ARGUMENT);
    qkv.qkv = qkv.q_out = qkv.k = qkv.v = &qkv; /* never reached */
    qkv.positions = (const int32_t *)&qkv;
    expect_status(test_ops()->qkv_rope(test_stream(), &qkv, &err), RF_ERR_ARGUMENT); /* no angles */

    rf_swiglu_args swiglu = {.dtype = f32, .rows = 2, .cols = 8};
    expect_ok(test_ops()->swiglu(NULL, &swiglu, &err));
    expect_refusal(swiglu, swiglu, dtype, other, RF_ERR_DTYPE);
    expect_refusal(swiglu, swiglu, cols, 0, RF_ERR_SHAPE);
    expect_refusal(swiglu, swiglu, rows, -2, RF_ERR_SHAPE);
    expect_status(test_ops()->swiglu(test_stream(), &swiglu, &err), RF_ERR_ARGUMENT);

    rf_head_stats_args head_args = {.dtype = f32, .rows = 2, .cols = 8, .vocab = 9, .scale = 1};
    expect_ok(test_ops()->head_stats(NULL, &head_args, &err));
    expect_refusal(head_stats, head_args, dtype, other, RF_ERR_DTYPE);
    expect_refusal(head_stats, head_args, vocab, 0, RF_ERR_SHAPE);
    expect_refusal(head_stats, head_args, rows, -1, RF_ERR_SHAPE);
    expect_refusal(head_stats, head_args, num_bans, 9, RF_ERR_SHAPE);
    expect_refusal(head_stats, head_args, temperature, -1.0f, RF_ERR_ARGUMENT);
    expect_refusal(head_stats, head_args, temperature, NAN, RF_ERR_ARGUMENT);
    expect_refusal(head_stats, head_args, scale, INFINITY, RF_ERR_ARGUMENT);
    if (test_is_cuda()) expect_refusal(head_stats, head_args, cols, 7, RF_ERR_SHAPE);
    expect_status(test_ops()->head_stats(test_stream(), &head_args, &err), RF_ERR_ARGUMENT);
    head_args.x = head_args.w = &qkv; /* never reached */
    head_args.out = (rf_token_stats *)&qkv;
    head_args.num_bans = 1;
    expect_status(test_ops()->head_stats(test_stream(), &head_args, &err), RF_ERR_ARGUMENT); /* no list */
    head_args.num_bans = 0;

    rf_attention_mass_args mass = {.dtype = f32,
                                   .mass = (float *)&qkv, /* never reached */
                                   .batch = 1,
                                   .rows = 4,
                                   .num_queries = 4,
                                   .num_keys = 5,
                                   .num_q_heads = 4,
                                   .num_kv_heads = 2,
                                   .head_dim = 16,
                                   .k_batch_stride = 320,
                                   .k_row_stride = 32,
                                   .scale = 1};
    expect_ok(test_ops()->attention_mass(NULL, &mass, &err));
    expect_refusal(attention_mass, mass, dtype, other, RF_ERR_DTYPE);
    expect_refusal(attention_mass, mass, num_queries, 5, RF_ERR_SHAPE);
    expect_refusal(attention_mass, mass, num_q_heads, 5, RF_ERR_SHAPE);
    expect_refusal(attention_mass, mass, k_row_stride, 8, RF_ERR_SHAPE);
    rf_attention_mass_args listed = mass;
    listed.keys = (const int32_t *)&qkv;
    expect_refusal(attention_mass, listed, batch, 2, RF_ERR_UNSUPPORTED);
    expect_status(test_ops()->attention_mass(test_stream(), &mass, &err), RF_ERR_ARGUMENT);

    rf_attention_probs_args probs = {.dtype = f32,
                                     .num_rows = 2,
                                     .num_keys = 5,
                                     .q_row_stride = 64,
                                     .k_row_stride = 32,
                                     .num_q_heads = 4,
                                     .num_kv_heads = 2,
                                     .head_dim = 16,
                                     .scale = 1};
    expect_ok(test_ops()->attention_probs(NULL, &probs, &err));
    expect_refusal(attention_probs, probs, dtype, other, RF_ERR_DTYPE);
    expect_refusal(attention_probs, probs, q_row_stride, 63, RF_ERR_SHAPE);
    expect_refusal(attention_probs, probs, num_keys, -1, RF_ERR_SHAPE);
    expect_status(test_ops()->attention_probs(test_stream(), &probs, &err), RF_ERR_ARGUMENT);

    rf_cosine_rows_args cosine = {.a_dtype = f32, .b_dtype = f32, .rows = 2, .cols = 8, .a_ld = 8, .b_ld = 8};
    expect_ok(test_ops()->cosine_rows(NULL, &cosine, &err));
    expect_refusal(cosine_rows, cosine, a_dtype, other, RF_ERR_DTYPE);
    expect_refusal(cosine_rows, cosine, b_dtype, other, RF_ERR_DTYPE);
    expect_refusal(cosine_rows, cosine, cols, 0, RF_ERR_SHAPE);
    expect_refusal(cosine_rows, cosine, col_stride, -1, RF_ERR_SHAPE);
    expect_status(test_ops()->cosine_rows(test_stream(), &cosine, &err), RF_ERR_ARGUMENT);

    rf_select_smallest_args select = {.num = 5, .count = 5};
    expect_ok(test_ops()->select_smallest(NULL, &select, &err));
    expect_refusal(select_smallest, select, count, 6, RF_ERR_SHAPE);
    expect_refusal(select_smallest, select, count, 0, RF_ERR_SHAPE);
    expect_refusal(select_smallest, select, num, 32769, RF_ERR_SHAPE);
    expect_status(test_ops()->select_smallest(test_stream(), &select, &err), RF_ERR_ARGUMENT);

    rf_argmax_args argmax = {.num = 5};
    expect_ok(test_ops()->argmax(NULL, &argmax, &err));
    expect_refusal(argmax, argmax, num, -1, RF_ERR_SHAPE);
    expect_status(test_ops()->argmax(test_stream(), &argmax, &err), RF_ERR_ARGUMENT);
    argmax.out = (int32_t *)&qkv; /* never reached */
    expect_status(test_ops()->argmax(test_stream(), &argmax, &err), RF_ERR_ARGUMENT);

    if (test_is_cuda()) return; /* the CPU computes in f32 only */
    expect_refusal(embed, embed, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(qkv_rope, qkv, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(swiglu, swiglu, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(head_stats, head_args, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(attention_mass, mass, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(attention_probs, probs, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(cosine_rows, cosine, b_dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
}
END_TEST

int main(void) {
    const int status = open_test_device();
    if (status != 0) return status;
    Suite *suite = suite_create("text");
    TCase *tcase = kernel_tcase(suite, "text");
    add_for_dtypes(tcase, embed_gathers_and_scales);
    tcase_add_loop_test(tcase, qkv_rope_matches_double, 0, (int)LENGTH(qkv_cases));
    add_for_dtypes(tcase, qkv_rope_reaches_listed_rows);
    add_for_dtypes(tcase, swiglu_matches_double);
    tcase_add_loop_test(tcase, head_stats_match_double, 0, (int)LENGTH(head_shapes));
    add_for_dtypes(tcase, head_stats_of_any_numbers);
    add_for_dtypes(tcase, the_best_id_has_rank_zero);
    tcase_add_test(tcase, ties_go_to_the_lowest_id);
    tcase_add_test(tcase, banned_ids_do_not_count);
    tcase_add_test(tcase, head_stats_of_large_logits);
    tcase_add_test(tcase, round_logits_rounds_first);
    tcase_add_test(tcase, refs_have_probabilities_and_ranks);
    tcase_add_test(tcase, head_stats_do_not_depend_on_the_batch);
    tcase_add_test(tcase, sampled_ids_follow_the_noise);
    add_for_dtypes(tcase, noise_keeps_its_digits_near_one);
    tcase_add_test(tcase, sampling_has_the_right_distribution);
    add_for_dtypes(tcase, head_workspace_grows_with_rows_alone);
    tcase_add_loop_test(tcase, attention_mass_matches_double, 0, (int)LENGTH(taps_cases));
    tcase_add_loop_test(tcase, attention_probs_match_double, 0, (int)LENGTH(taps_cases));
    tcase_add_test(tcase, cosine_rows_match_double);
    tcase_add_test(tcase, select_smallest_sorts);
    tcase_add_loop_test(tcase, argmax_takes_the_first_allowed, 0, (int)LENGTH(argmax_nums));
    tcase_add_test(tcase, bad_arguments_are_refused);
    return run_kernel_suite(suite);
}
