/* tests/kernels/test_kv.c - the operators of a cache under a budget against plain definitions in double.
 *
 * Bounds: what comes out is f32, whatever the dtype of the operands, which are rounded before the reference sees them: 1e-5
 * relative L2 (BOUND). Rows that only move keep their bits; keys that turn are within dtype_bound. */
#include "core/types.h"
#include "harness.h"

#define LENGTH(a) (sizeof(a) / sizeof(a)[0])
#define BOUND     1e-5

static void download(void *host, const void *dev, size_t bytes) {
    rf_error err = {0};
    ck_assert_int_eq(rf_stream_download(test_stream(), host, dev, bytes, &err), RF_OK);
    ck_assert_int_eq(rf_stream_synchronize(test_stream(), &err), RF_OK);
}

static void upload(void *dev, const void *host, size_t bytes) {
    rf_error err = {0};
    ck_assert_int_eq(rf_stream_upload(test_stream(), dev, host, bytes, &err), RF_OK);
    ck_assert_int_eq(rf_stream_synchronize(test_stream(), &err), RF_OK);
}

static int32_t *host_ints(size_t num) {
    return (int32_t *)host_doubles(num);
}

static int32_t uniform_int(int32_t num) {
    return (int32_t)(uniform() * num);
}

/* ---- where keys lie ---- */

typedef enum { PLANE, HEADS, LISTED, RAGGED } layout; /* dense by token or by head; listed, with lens in RAGGED */

typedef struct {
    operand k, v;
    rf_kv_source source;
    int32_t *rows, *lens; /* host */
} keys;

static keys make_keys(rf_dtype dtype, layout how, int64_t num, int hkv, int d, int extra, double std) {
    keys s = {0};
    if (how == PLANE || how == HEADS) {
        s.source.row_stride = how == PLANE ? (int64_t)hkv * d + extra : d + extra;
        s.source.head_stride = how == PLANE ? d : num * s.source.row_stride + extra;
        const size_t size = (size_t)(how == PLANE ? num * s.source.row_stride : hkv * s.source.head_stride);
        s.k = op_normal(dtype, size, 0, std);
        s.v = op_normal(dtype, size, 0.2, 1);
    } else {
        const int64_t pool = hkv * num + 5;
        s.source.row_stride = d + extra;
        s.source.rows_stride = num + 3;
        s.k = op_normal(dtype, (size_t)(pool * s.source.row_stride), 0, std);
        s.v = op_normal(dtype, (size_t)(pool * s.source.row_stride), 0.2, 1);
        int32_t *order = host_ints((size_t)pool);
        random_permutation(order, (int)pool, (uint64_t)num);
        const size_t listed = (size_t)(hkv * s.source.rows_stride);
        s.rows = host_ints(listed);
        s.lens = host_ints((size_t)hkv);
        for (int h = 0; h < hkv; h++) {
            s.lens[h] = how == LISTED ? (int32_t)num
                        : h == 0      ? (int32_t)num
                        : h == 1      ? 0
                                      : 1 + uniform_int((int32_t)num);
            if (how == RAGGED && hkv == 1) s.lens[h] = (int32_t)(num - num / 3);
            for (int64_t j = 0; j < s.source.rows_stride; j++) /* what is not there must not be looked at */
                s.rows[h * s.source.rows_stride + j] = j < s.lens[h] ? order[h * num + j] : INT32_MAX;
        }
        s.source.rows = dev_i32(s.rows, listed);
        if (how == RAGGED) s.source.lens = dev_i32(s.lens, (size_t)hkv);
    }
    s.source.k = s.k.dev;
    s.source.v = s.v.dev;
    s.source.num_keys = num;
    return s;
}

static int64_t num_of(const keys *s, int h) {
    return s->lens ? s->lens[h] : s->source.num_keys;
}

static int64_t offset_of(const keys *s, int h, int64_t j) {
    const rf_kv_source *a = &s->source;
    return a->rows ? s->rows[h * a->rows_stride + j] * a->row_stride : j * a->row_stride + h * a->head_stride;
}

static double product(const float *a, const float *b, int d) {
    double sum = 0;
    for (int c = 0; c < d; c++) sum += (double)a[c] * b[c];
    return sum;
}

static double distance(const float *a, const float *b, int d) {
    double sum = 0;
    for (int c = 0; c < d; c++) sum += ((double)a[c] - b[c]) * ((double)a[c] - b[c]);
    return sum;
}

/* ---- columns and losses ---- */

typedef struct {
    layout how;
    int64_t num_keys, num_queries;
    int hq, hkv, d, extra;
    bool causal;
    int64_t first;
    double scale;
} window_case;
static const window_case window_cases[] = {
    {PLANE, 150, 150, 4, 2, 64, 0, true, 0, 0.125},  {PLANE, 300, 32, 4, 2, 64, 0, true, 268, 0.125},
    {HEADS, 130, 33, 4, 2, 128, 0, false, 0, 0.1},   {LISTED, 200, 5, 4, 2, 64, 0, false, 0, 0.125},
    {RAGGED, 200, 32, 6, 3, 64, 0, false, 0, 0.125}, {RAGGED, 129, 1, 8, 4, 128, 0, false, 0, 0.1},
    {RAGGED, 70, 1, 8, 1, 128, 0, false, 0, 0.1},    {RAGGED, 77, 3, 3, 3, 80, 8, false, 0, 0.1},
    {PLANE, 65, 70, 2, 1, 7, 3, true, 2, 0.4},       {HEADS, 65, 9, 2, 2, 200, 8, false, 0, 0.07},
    {PLANE, 100, 20, 2, 1, 64, 0, true, 30, -0.125}, /* keys that nobody sees */
    {PLANE, 1, 1, 1, 1, 64, 0, true, 0, 0.125},      {PLANE, 64, 64, 8, 1, 96, 0, true, 0, 0.1},
    {PLANE, 64, 0, 2, 1, 64, 0, true, 0, 0.125}, /* no queries: zeros */
    {PLANE, 257, 700, 2, 1, 64, 0, false, 0, 0.125},
};

/* Operands of a window: queries, attention's sums and outputs. */
typedef struct {
    window_case c;
    keys s;
    operand q, o, lse, weights;
    int64_t q_stride, o_stride, lse_stride, group;
} window;

/* What keys there are for query i, and p of one. */
static bool sees(const window *w, int h, int64_t i, int64_t j) {
    return j < num_of(&w->s, (int)(h / w->group)) && (!w->c.causal || j <= w->c.first + i);
}
static double logit(const window *w, int h, int64_t i, int64_t j) {
    return (double)(float)w->c.scale * product(w->q.host + i * w->q_stride + h * w->c.d,
                                               w->s.k.host + offset_of(&w->s, (int)(h / w->group), j), w->c.d);
}
static double prob(const window *w, int h, int64_t i, int64_t j) {
    return sees(w, h, i, j) ? exp(logit(w, h, i, j) - (double)w->lse.host[h * w->lse_stride + i]) : 0;
}

/* Sums are those over all keys that a query sees; o is its output with noise on it (so that removal is no identity here). */
static window make_window(rf_dtype dtype, const window_case *c, double noise) {
    window w = {.c = *c, .group = c->hq / c->hkv};
    w.s = make_keys(dtype, c->how, c->num_keys, c->hkv, c->d, c->extra, 1);
    w.q_stride = c->hq * c->d + c->extra;
    w.o_stride = c->hq * c->d + 2 * c->extra;
    w.lse_stride = c->num_queries + 2;
    w.q = op_normal(dtype, (size_t)(c->num_queries * w.q_stride), 0, 1);
    w.o = op_normal(dtype, (size_t)(c->num_queries * w.o_stride), 0, noise);
    w.lse = op_poison(RF_DTYPE_F32, (size_t)(c->hq * w.lse_stride));
    w.weights = op_poison(RF_DTYPE_F32, (size_t)c->num_queries);
    double *out = host_doubles((size_t)c->d);
    for (int64_t i = 0; i < c->num_queries; i++) {
        w.weights.host[i] = i % 5 == 3 ? 0.0f : (float)uniform();
        for (int h = 0; h < c->hq; h++) {
            double sum = 0;
            memset(out, 0, (size_t)c->d * sizeof *out);
            for (int64_t j = 0; j < c->num_keys; j++) {
                if (!sees(&w, h, i, j)) continue;
                const double e = exp(logit(&w, h, i, j));
                const float *v = w.s.v.host + offset_of(&w.s, (int)(h / w.group), j);
                sum += e;
                for (int x = 0; x < c->d; x++) out[x] += e * (double)v[x];
            }
            w.lse.host[h * w.lse_stride + i] = (float)log(sum);
            float *o = w.o.host + i * w.o_stride + h * c->d;
            for (int x = 0; x < c->d && sum > 0; x++) {
                const float value = (float)((double)o[x] + out[x] / sum);
                o[x] = dtype == RF_DTYPE_BF16 ? rf_bf16_to_f32(rf_f32_to_bf16(value)) : value;
            }
        }
    }
    op_upload(&w.o);
    op_upload(&w.lse);
    op_upload(&w.weights);
    return w;
}

static rf_kv_columns_args columns_args(const window *w) {
    rf_kv_columns_args a = {.source = w->s.source,
                            .q = w->q.dev,
                            .q_row_stride = w->q_stride,
                            .lse = w->lse.dev,
                            .lse_stride = w->lse_stride,
                            .num_queries = w->c.num_queries,
                            .num_q_heads = w->c.hq,
                            .num_kv_heads = w->c.hkv,
                            .head_dim = w->c.d,
                            .dtype = w->q.dtype,
                            .scale = (float)w->c.scale,
                            .causal = w->c.causal,
                            .first_position = w->c.first,
                            .out_stride = w->c.num_keys + 4,
                            .entropy_keys = w->c.num_keys - w->c.num_keys / 4};
    a.source.v = NULL;
    a.workspace_bytes = test_ops()->kv_columns_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    return a;
}

static rf_kv_loss_args loss_args(const window *w, rf_kv_loss loss) {
    rf_kv_loss_args a = {.source = w->s.source,
                         .q = w->q.dev,
                         .o = w->o.dev,
                         .q_row_stride = w->q_stride,
                         .o_row_stride = w->o_stride,
                         .lse = w->lse.dev,
                         .lse_stride = w->lse_stride,
                         .num_queries = w->c.num_queries,
                         .num_q_heads = w->c.hq,
                         .num_kv_heads = w->c.hkv,
                         .head_dim = w->c.d,
                         .dtype = w->q.dtype,
                         .scale = (float)w->c.scale,
                         .causal = w->c.causal,
                         .first_position = w->c.first,
                         .loss = loss,
                         .out_stride = w->c.num_keys + 4};
    a.workspace_bytes = test_ops()->kv_loss_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    return a;
}

/* A buffer of outputs [Hq][stride] with something in its columns, and the wanted values: NaN where nothing may be written. */
static operand make_out(const window *w, bool filled) {
    const int64_t stride = w->c.num_keys + 4;
    operand out = op_poison(RF_DTYPE_F32, (size_t)(w->c.hq * stride));
    for (int64_t at = 0; at < w->c.hq * stride && filled; at++)
        if (at % stride < w->c.num_keys) out.host[at] = (float)uniform();
    op_upload(&out);
    return out;
}

static double *make_want(const window *w, const operand *out, bool accumulate) {
    const int64_t stride = w->c.num_keys + 4;
    double *want = host_doubles(out->num);
    for (int64_t at = 0; at < w->c.hq * stride; at++) {
        const int h = (int)(at / stride / w->group);
        want[at] = at % stride >= w->c.num_keys                   ? NAN
                   : accumulate && at % stride < num_of(&w->s, h) ? (double)out->host[at]
                                                                  : 0;
    }
    return want;
}

static void check_columns(const window *w, bool weighted, bool accumulate) {
    const window_case *c = &w->c;
    rf_kv_columns_args a = columns_args(w);
    operand s1 = make_out(w, true), s2 = make_out(w, true), peak = make_out(w, true);
    operand entropy = op_normal(RF_DTYPE_F32, (size_t)c->hq, 3, 1);
    a.s1 = s1.dev, a.s2 = s2.dev, a.peak = peak.dev, a.entropy = entropy.dev;
    a.weights = weighted ? w->weights.dev : NULL;
    a.accumulate = accumulate;
    double *sum = make_want(w, &s1, accumulate), *square = make_want(w, &s2, accumulate),
           *most = make_want(w, &peak, accumulate), *ent = host_doubles((size_t)c->hq);
    for (int h = 0; h < c->hq; h++) {
        ent[h] = accumulate ? (double)entropy.host[h] : 0;
        for (int64_t j = 0; j < c->num_keys; j++) {
            const int64_t at = h * a.out_stride + j;
            for (int64_t i = 0; i < c->num_queries; i++) {
                const double p = prob(w, h, i, j), x = weighted ? (double)w->weights.host[i] : 1;
                sum[at] += x * p;
                square[at] += x * p * p;
                most[at] = fmax(most[at], p);
                if (p > 0 && j < a.entropy_keys) ent[h] -= p * log(p);
            }
        }
    }
    expect_ok(test_ops()->kv_columns(NULL, &a, &err));
    expect_ok(test_ops()->kv_columns(test_stream(), &a, &err));
    const char *what = accumulate ? "accumulated" : weighted ? "weighted" : "plain";
    const int nth = (int)(w->c.num_keys * 1000 + w->c.num_queries);
    expect_close(&s1, sum, BOUND, "kv_columns s1", "%d %s", nth, what);
    expect_close(&s2, square, BOUND, "kv_columns s2", "%d %s", nth, what);
    expect_close(&peak, most, BOUND, "kv_columns peak", "%d %s", nth, what);
    op_download(&entropy);
    for (int h = 0; h < c->hq; h++) { /* terms near p = 1 are rounding */
        const double got = entropy.host[h], bound = BOUND * fabs(ent[h]) + 1e-6 * (double)c->num_queries;
        ck_assert_msg(fabs(got - ent[h]) <= bound, "entropy of head %d, %d %s: %.9g, want %.9g", h, nth, what, got,
                      ent[h]);
    }

    /* Each alone says the same. */
    operand one = make_out(w, false);
    rf_kv_columns_args alone = a;
    alone.s1 = one.dev, alone.s2 = alone.peak = alone.entropy = NULL, alone.accumulate = false;
    alone.workspace = NULL, alone.workspace_bytes = 0;
    expect_ok(test_ops()->kv_columns(test_stream(), &alone, &err));
    if (accumulate) return;
    expect_close(&one, sum, BOUND, "kv_columns s1 alone", "%d %s", nth, what);
    operand again = make_out(w, false);
    alone.s1 = NULL, alone.s2 = again.dev;
    expect_ok(test_ops()->kv_columns(test_stream(), &alone, &err));
    expect_same_bits(&again, &s2, "kv_columns s2 alone", "%d %s", nth, what);
}

START_TEST(columns_match_double) {
    for (int t = 0; t < test_num_dtypes(); t++) {
        const window w = make_window(test_dtype(t), &window_cases[_i], 0.3);
        check_columns(&w, false, false);
        check_columns(&w, true, false);
        check_columns(&w, true, true);
    }
}
END_TEST

/* A prompt in chunks is the prompt at once. */
START_TEST(chunks_accumulate) {
    window_case c = {PLANE, 220, 220, 4, 2, 64, 0, true, 0, 0.125};
    const window w = make_window(test_dtype(_i), &c, 0.3);
    rf_kv_columns_args a = columns_args(&w);
    operand all = make_out(&w, false), parts = make_out(&w, false);
    operand ent_all = op_poison(RF_DTYPE_F32, 4), ent_parts = op_poison(RF_DTYPE_F32, 4);
    a.s1 = all.dev, a.entropy = ent_all.dev;
    expect_ok(test_ops()->kv_columns(test_stream(), &a, &err));
    a.s1 = parts.dev, a.entropy = ent_parts.dev;
    memset(ent_parts.host, 0, 4 * sizeof(float));
    for (int64_t at = 0; at < 4 * a.out_stride; at++)
        if (at % a.out_stride < 220) parts.host[at] = 0;
    op_upload(&ent_parts);
    op_upload(&parts);
    a.accumulate = true;
    for (int64_t begin = 0; begin < 220; begin += 50) {
        rf_kv_columns_args part = a;
        part.num_queries = begin + 50 < 220 ? 50 : 220 - begin;
        part.first_position = begin;
        part.source.num_keys = begin + part.num_queries; /* the rest is not there yet */
        part.q = (const char *)a.q + (size_t)(begin * a.q_row_stride) * rf_dtype_bytes(a.dtype);
        part.lse = a.lse + begin;
        expect_ok(test_ops()->kv_columns(test_stream(), &part, &err));
    }
    op_download(&all);
    op_download(&ent_all);
    double *want = host_doubles(all.num), *want_entropy = host_doubles(4);
    for (size_t i = 0; i < all.num; i++) want[i] = all.host[i];
    for (int h = 0; h < 4; h++) want_entropy[h] = ent_all.host[h];
    expect_close(&parts, want, 2e-6, "kv_columns", "chunks");
    expect_close(&ent_parts, want_entropy, 2e-6, "kv_columns", "entropy of chunks");
    for (int h = 0; h < 4; h++) { /* every query gives all it has */
        double mass = 0;
        for (int64_t j = 0; j < 220; j++) mass += want[h * a.out_stride + j];
        ck_assert_double_eq_tol(mass, 220, 1e-3);
    }
}
END_TEST

/* Rows of which attention says that they see nothing. */
START_TEST(rows_without_keys_add_nothing) {
    window_case c = {LISTED, 90, 12, 4, 2, 64, 0, false, 0, 0.125};
    window w = make_window(test_dtype(_i), &c, 0.3);
    for (int h = 0; h < c.hq; h++) w.lse.host[h * w.lse_stride + 7] = w.lse.host[h * w.lse_stride] = -INFINITY;
    op_upload(&w.lse);
    operand without = make_out(&w, false), weighted = make_out(&w, false), loss = make_out(&w, false),
            loss_weighted = make_out(&w, false), peak = make_out(&w, false);
    operand entropy = op_poison(RF_DTYPE_F32, 4);
    rf_kv_columns_args a = columns_args(&w);
    a.s1 = without.dev, a.peak = peak.dev, a.entropy = entropy.dev;
    expect_ok(test_ops()->kv_columns(test_stream(), &a, &err));
    rf_kv_loss_args l = loss_args(&w, RF_KV_LOSS_REMOVAL);
    l.out = loss.dev;
    expect_ok(test_ops()->kv_loss(test_stream(), &l, &err));
    op_download(&peak);
    op_download(&entropy);
    for (int h = 0; h < 4; h++) {
        ck_assert(entropy.host[h] > 0 && entropy.host[h] < 12 * 5); /* ln 90 each */
        for (int64_t j = 0; j < 90; j++) ck_assert(peak.host[h * a.out_stride + j] < 1);
    }
    for (int i = 0; i < 12; i++) w.weights.host[i] = i == 7 || i == 0 ? 0.0f : 1.0f;
    op_upload(&w.weights);
    for (int h = 0; h < c.hq; h++) w.lse.host[h * w.lse_stride + 7] = w.lse.host[h * w.lse_stride] = 3;
    op_upload(&w.lse);
    a.s1 = weighted.dev, a.peak = NULL, a.entropy = NULL, a.weights = l.weights = w.weights.dev;
    l.out = loss_weighted.dev;
    expect_ok(test_ops()->kv_columns(test_stream(), &a, &err));
    expect_ok(test_ops()->kv_loss(test_stream(), &l, &err));
    expect_same_bits(&without, &weighted, "kv_columns", "rows without keys");
    expect_same_bits(&loss, &loss_weighted, "kv_loss", "rows without keys");
}
END_TEST

static double term_of(const window *w, rf_kv_loss loss, int h, int64_t i, int64_t j) {
    const double most = (double)(1.0f - 1e-4f);
    const float *v = w->s.v.host + offset_of(&w->s, (int)(h / w->group), j),
                *o = w->o.host + i * w->o_stride + h * w->c.d;
    double p = prob(w, h, i, j), z = logit(w, h, i, j), square = 0;
    switch (loss) {
    case RF_KV_LOSS_REMOVAL: p = fmin(p, most); return p / (1 - p) * (p / (1 - p)) * distance(v, o, w->c.d);
    case RF_KV_LOSS_KEY: return p * z * (p * z) * distance(v, o, w->c.d);
    case RF_KV_LOSS_VALUE: return p * p * product(v, v, w->c.d);
    default:
        for (int c = 0; c < w->c.d; c++) {
            const double x = p * (double)v[c] + p * z * ((double)v[c] - (double)o[c]);
            square += x * x;
        }
        return square;
    }
}

START_TEST(losses_match_double) {
    for (int t = 0; t < test_num_dtypes(); t++) {
        const window w = make_window(test_dtype(t), &window_cases[_i], 0.3);
        for (int loss = 0; loss <= RF_KV_LOSS_JOINT; loss++) {
            for (int mode = 0; mode < 2; mode++) {
                operand out = make_out(&w, true);
                rf_kv_loss_args a = loss_args(&w, (rf_kv_loss)loss);
                a.out = out.dev;
                a.weights = mode ? w.weights.dev : NULL;
                a.accumulate = mode == 1;
                if (loss == RF_KV_LOSS_VALUE) a.o = NULL;
                double *want = make_want(&w, &out, a.accumulate);
                for (int h = 0; h < w.c.hq; h++)
                    for (int64_t j = 0; j < w.c.num_keys; j++)
                        for (int64_t i = 0; i < w.c.num_queries; i++)
                            if (sees(&w, h, i, j))
                                want[h * a.out_stride + j] +=
                                    (mode ? (double)w.weights.host[i] : 1) * term_of(&w, (rf_kv_loss)loss, h, i, j);
                expect_ok(test_ops()->kv_loss(NULL, &a, &err));
                expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
                expect_close(&out, want, BOUND, "kv_loss", "%d, window %d, mode %d", loss, _i, mode);
                operand again = make_out(&w, false);
                a.out = again.dev;
                if (a.accumulate) continue;
                expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
                expect_same_bits(&again, &out, "kv_loss", "%d again", loss);
            }
        }
    }
}
END_TEST

/* |o - o without j| = p / (1 - p) |o - v_j|. */
START_TEST(removal_is_what_attention_loses) {
    window_case c = {LISTED, 40, 1, 4, 2, 64, 0, false, 0, 0.125};
    const rf_dtype dtype = test_dtype(_i);
    const window w = make_window(dtype, &c, 0);
    operand out = make_out(&w, false);
    rf_kv_loss_args a = loss_args(&w, RF_KV_LOSS_REMOVAL);
    a.out = out.dev;
    expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
    op_download(&out);
    for (int h = 0; h < c.hq; h++) {
        for (int64_t j = 0; j < c.num_keys; j++) {
            double with[64] = {0}, without[64] = {0}, sum = 0, rest = 0, moved = 0;
            for (int64_t x = 0; x < c.num_keys; x++) {
                const double e = exp(logit(&w, h, 0, x));
                sum += e;
                rest += x == j ? 0 : e;
                for (int n = 0; n < 64; n++) {
                    const double v = w.s.v.host[offset_of(&w.s, (int)(h / w.group), x) + n];
                    with[n] += e * v;
                    without[n] += x == j ? 0 : e * v;
                }
            }
            for (int n = 0; n < 64; n++) moved += pow(with[n] / sum - without[n] / rest, 2);
            const double got = sqrt((double)out.host[h * a.out_stride + j]), want = sqrt(moved);
            ck_assert_msg(fabs(got - want) <= (dtype == RF_DTYPE_F32 ? BOUND : 4e-3) * want,
                          "head %d, key %d: %.9g, attention loses %.9g", h, (int)j, got, want);
        }
    }
}
END_TEST

/* One key that has nearly everything: v is near o, and few digits of 1 - p are left. */
START_TEST(removal_of_the_only_key_is_bounded) {
    window_case c = {PLANE, 3, 3, 1, 1, 64, 0, true, 0, 0.125};
    const window w = make_window(test_dtype(_i), &c, 0);
    operand out = make_out(&w, false);
    rf_kv_loss_args a = loss_args(&w, RF_KV_LOSS_REMOVAL);
    a.num_queries = 1; /* sees key 0 alone: p = 1, o = v */
    a.out = out.dev;
    expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
    op_download(&out);
    ck_assert_msg(out.host[0] >= 0 && out.host[0] < 1e5f, "%g", (double)out.host[0]); /* 1e8 times rounding */
    ck_assert_float_eq(out.host[1], 0);
    operand other = op_normal(w.q.dtype, 64, 0, 1); /* an o of its own: 0.9999^2 / 0.0001^2 |v - o|^2 */
    a.o = other.dev;
    expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
    double want[7] = {0, 0, 0, NAN, NAN, NAN, NAN};
    const double p = (double)(1.0f - 1e-4f);
    want[0] = pow(p / (1 - p), 2) * distance(w.s.v.host, other.host, 64);
    expect_close(&out, want, BOUND, "kv_loss", "p = 1");
}
END_TEST

/* joint = value + key + 2 sum p^2 z (|v|^2 - v.o). */
START_TEST(joint_loss_is_the_sum_of_its_parts) {
    window_case c = {RAGGED, 90, 16, 4, 2, 64, 0, false, 0, 0.125};
    const window w = make_window(test_dtype(_i), &c, 0.3);
    operand out[4];
    for (int loss = 0; loss <= RF_KV_LOSS_JOINT; loss++) {
        out[loss] = make_out(&w, false);
        rf_kv_loss_args a = loss_args(&w, (rf_kv_loss)loss);
        a.out = out[loss].dev;
        expect_ok(test_ops()->kv_loss(test_stream(), &a, &err));
        op_download(&out[loss]);
    }
    double *want = host_doubles(out[0].num);
    for (size_t at = 0; at < out[0].num; at++) {
        const int h = (int)(at / (size_t)(c.num_keys + 4));
        const int64_t j = (int64_t)at % (c.num_keys + 4);
        want[at] = (double)out[RF_KV_LOSS_VALUE].host[at] + (double)out[RF_KV_LOSS_KEY].host[at];
        for (int64_t i = 0; i < c.num_queries && j < c.num_keys; i++) {
            if (!sees(&w, h, i, j)) continue;
            const float *v = w.s.v.host + offset_of(&w.s, (int)(h / w.group), j),
                        *o = w.o.host + i * w.o_stride + h * c.d;
            const double p = prob(&w, h, i, j);
            want[at] += 2 * p * p * logit(&w, h, i, j) * (product(v, v, c.d) - product(v, o, c.d));
        }
    }
    expect_close(&out[RF_KV_LOSS_JOINT], want, 2 * BOUND, "kv_loss", "joint");
}
END_TEST

/* The same bits for every number of threads, and of keys that come after. */
START_TEST(threads_do_not_change_sums) {
    if (test_is_cuda()) return;
    window_case c = {PLANE, 400, 400, 4, 2, 64, 0, true, 0, 0.125};
    const window w = make_window(RF_DTYPE_F32, &c, 0.3);
    rf_kv_columns_args a = columns_args(&w);
    rf_kv_loss_args l = loss_args(&w, RF_KV_LOSS_JOINT);
    operand sums[2], losses[2], entropies[2];
    for (int t = 0; t < 2; t++) {
        rf_backend *backend;
        rf_stream *stream;
        rf_error err = {0};
        ck_assert_int_eq(rf_backend_open(&backend, "cpu", t ? 3 : 1, &err), RF_OK);
        ck_assert_int_eq(rf_stream_create(&stream, backend, &err), RF_OK);
        sums[t] = make_out(&w, false), losses[t] = make_out(&w, false), entropies[t] = op_poison(RF_DTYPE_F32, 4);
        a.s1 = sums[t].dev, a.entropy = entropies[t].dev, l.out = losses[t].dev;
        ck_assert_int_eq(rf_ops_cpu()->kv_columns(stream, &a, &err), RF_OK);
        ck_assert_int_eq(rf_ops_cpu()->kv_loss(stream, &l, &err), RF_OK);
        rf_stream_destroy(stream);
        rf_backend_close(backend);
    }
    expect_same_bits(&sums[0], &sums[1], "kv_columns", "three threads");
    expect_same_bits(&entropies[0], &entropies[1], "kv_columns entropy", "three threads");
    expect_same_bits(&losses[0], &losses[1], "kv_loss", "three threads");
}
END_TEST

/* ---- norms ---- */

static const window_case norm_cases[] = {
    {PLANE, 300, 0, 2, 2, 64, 0, false, 0, 1},  {HEADS, 70, 0, 2, 2, 128, 8, false, 0, 1},
    {RAGGED, 600, 0, 4, 4, 64, 0, false, 0, 1}, {LISTED, 65, 0, 1, 1, 80, 0, false, 0, 1},
    {RAGGED, 33, 0, 3, 3, 7, 1, false, 0, 1},   {PLANE, 1, 0, 1, 1, 256, 0, false, 0, 1},
    {PLANE, 2500, 0, 2, 2, 64, 0, false, 0, 1},
};

START_TEST(norms_match_double) {
    const window_case *c = &norm_cases[_i];
    for (int t = 0; t < test_num_dtypes(); t++) {
        keys s = make_keys(test_dtype(t), c->how, c->num_keys, c->hkv, c->d, c->extra, 0.7);
        for (size_t i = 0; i < s.k.num; i++) s.k.host[i] += 0.25f; /* directions that agree a little */
        for (size_t i = 0; i < s.k.num && s.k.dtype == RF_DTYPE_BF16; i++)
            s.k.host[i] = rf_bf16_to_f32(rf_f32_to_bf16(s.k.host[i]));
        for (int64_t j = 2; j < num_of(&s, 0); j += 9) /* keys of norm 0 */
            memset(s.k.host + offset_of(&s, 0, j), 0, (size_t)c->d * sizeof(float));
        op_upload(&s.k);
        const int64_t stride = c->num_keys + 3;
        const size_t size = (size_t)(c->hkv * stride);
        operand kn = op_poison(RF_DTYPE_F32, size), vn = op_poison(RF_DTYPE_F32, size),
                kc = op_poison(RF_DTYPE_F32, size), anchor = op_poison(RF_DTYPE_F32, (size_t)(c->hkv * c->d));
        double *want_k = host_doubles(size), *want_v = host_doubles(size), *want_c = host_doubles(size),
               *want_a = host_doubles(anchor.num);
        for (int h = 0; h < c->hkv; h++) {
            double *a = want_a + h * c->d, length = 0;
            for (int64_t j = 0; j < num_of(&s, h); j++) {
                const float *k = s.k.host + offset_of(&s, h, j);
                const double norm = sqrt(product(k, k, c->d));
                for (int x = 0; x < c->d && norm > 0; x++) a[x] += (double)k[x] / norm;
            }
            for (int x = 0; x < c->d; x++) length += a[x] * a[x];
            for (int64_t j = 0; j < stride; j++) {
                const int64_t at = h * stride + j;
                if (j >= c->num_keys) want_k[at] = want_v[at] = want_c[at] = NAN;
                if (j >= num_of(&s, h)) continue;
                const float *k = s.k.host + offset_of(&s, h, j), *v = s.v.host + offset_of(&s, h, j);
                double along = 0;
                for (int x = 0; x < c->d; x++) along += (double)k[x] * a[x];
                want_k[at] = sqrt(product(k, k, c->d));
                want_v[at] = sqrt(product(v, v, c->d));
                want_c[at] = want_k[at] > 0 ? along / (want_k[at] * sqrt(length)) : 0;
            }
        }
        rf_kv_norms_args a = {.source = s.source,
                              .num_kv_heads = c->hkv,
                              .head_dim = c->d,
                              .dtype = s.k.dtype,
                              .key_norm = kn.dev,
                              .value_norm = vn.dev,
                              .key_cosine = kc.dev,
                              .anchor = anchor.dev,
                              .out_stride = stride};
        expect_ok(test_ops()->kv_norms(NULL, &a, &err));
        expect_ok(test_ops()->kv_norms(test_stream(), &a, &err));
        expect_close(&kn, want_k, 2e-6, "kv_norms key", "case %d", _i);
        expect_close(&vn, want_v, 2e-6, "kv_norms value", "case %d", _i);
        expect_close(&kc, want_c, BOUND, "kv_norms cosine", "case %d", _i);
        expect_close(&anchor, want_a, BOUND, "kv_norms anchor", "case %d", _i);
        for (int which = 0; which < 3; which++) { /* each alone */
            operand one = op_poison(RF_DTYPE_F32, size);
            rf_kv_norms_args alone = a;
            alone.key_norm = which == 0 ? one.dev : NULL;
            alone.value_norm = which == 1 ? one.dev : NULL;
            alone.key_cosine = which == 2 ? one.dev : NULL;
            if (which != 2) alone.anchor = NULL;
            if (which != 1) alone.source.v = NULL;
            if (which == 1) alone.source.k = NULL;
            expect_ok(test_ops()->kv_norms(test_stream(), &alone, &err));
            expect_same_bits(&one, which == 0 ? &kn : which == 1 ? &vn : &kc, "kv_norms", "%d alone", which);
        }
    }
}
END_TEST

/* ---- rows that move ---- */

typedef struct {
    layout how;
    bool to_pool, from, turns, counts;
    int64_t num_keys, num;
    int hkv, d, pairs, extra;
} copy_case;
static const copy_case copy_cases[] = {
    {PLANE, true, true, false, true, 90, 40, 2, 64, 0, 0},
    {PLANE, true, true, true, true, 90, 40, 2, 64, 32, 0},
    {RAGGED, false, false, true, true, 70, 70, 3, 64, 32, 0},
    {LISTED, false, true, false, false, 50, 33, 2, 128, 0, 0},
    {LISTED, false, false, true, false, 50, 50, 2, 128, 64, 8},
    {HEADS, true, false, true, false, 60, 50, 2, 80, 12, 0},
    {RAGGED, true, true, true, true, 40, 20, 1, 12, 5, 1},
    {PLANE, false, false, false, false, 9, 9, 1, 7, 0, 3},
    {LISTED, true, true, true, false, 20, 30, 2, 256, 128, 0},
};
enum { POSITIONS = 64 };

static operand make_table(int pairs) {
    operand table = op_poison(RF_DTYPE_F32, (size_t)(POSITIONS * pairs * 2));
    for (int p = 0; p < POSITIONS; p++)
        for (int c = 0; c < pairs; c++) {
            const double angle = p * pow(100, -(double)c / pairs);
            table.host[(p * pairs + c) * 2] = (float)cos(angle);
            table.host[(p * pairs + c) * 2 + 1] = (float)sin(angle);
        }
    op_upload(&table);
    return table;
}

START_TEST(copies_match_double) {
    const copy_case *c = &copy_cases[_i];
    for (int t = 0; t < test_num_dtypes(); t++) {
        const rf_dtype dtype = test_dtype(t);
        keys s = make_keys(dtype, c->how, c->num_keys, c->hkv, c->d, c->extra, 1);
        const int64_t list_stride = c->num + 2, row_stride = c->d + (c->d % 8 == 0 ? 8 : 1);
        const int64_t pool = c->hkv * c->num + 11, head_stride = (c->num + 3) * c->d;
        const int64_t lead = c->to_pool ? row_stride : 0; /* so that row -1 is there to be seen */
        const size_t out_size = (size_t)(c->to_pool ? lead + pool * row_stride : c->hkv * head_stride);
        operand k_out = op_poison(dtype, out_size), v_out = op_poison(dtype, out_size), table = make_table(c->pairs);
        const size_t listed = (size_t)(c->hkv * list_stride);
        int32_t *from = host_ints(listed), *to = host_ints(listed), *turn = host_ints(listed), counts[4] = {0};
        int32_t *order = host_ints((size_t)pool);
        random_permutation(order, (int)pool, 5);
        for (int h = 0; h < c->hkv; h++) {
            const int32_t there = (int32_t)num_of(&s, h);
            counts[h] = !c->counts ? (int32_t)c->num : h == 0 ? (int32_t)c->num + 4 : uniform_int((int32_t)c->num);
            if (c->counts && !c->from && counts[h] > there) counts[h] = there; /* no rows that are not there */
            if (there == 0) counts[h] = 0;
            for (int64_t i = 0; i < list_stride; i++) {
                const int64_t at = h * list_stride + i;
                from[at] = there ? uniform_int(there) : 0;
                to[at] = i % 7 == 4 ? (i % 2 ? -1 : -1 - (int32_t)i) : order[(h * c->num + i) % pool];
                if (to[at] < 0 && c->to_pool) from[at] = INT32_MAX; /* a skipped entry's source must not be looked at */
                turn[at] = i == 1 ? 0 : uniform_int(2 * POSITIONS - 1) - (POSITIONS - 1);
            }
        }
        const rf_kv_copy_args a = {.source = s.source,
                                   .k_out = (char *)k_out.dev + (size_t)lead * rf_dtype_bytes(dtype),
                                   .v_out = (char *)v_out.dev + (size_t)lead * rf_dtype_bytes(dtype),
                                   .out_row_stride = row_stride,
                                   .out_head_stride = head_stride,
                                   .from = c->from ? dev_i32(from, listed) : NULL,
                                   .to = c->to_pool ? dev_i32(to, listed) : NULL,
                                   .turn = c->turns ? dev_i32(turn, listed) : NULL,
                                   .counts = c->counts ? dev_i32(counts, (size_t)c->hkv) : NULL,
                                   .list_stride = list_stride,
                                   .num = c->num,
                                   .table = c->turns ? table.dev : NULL,
                                   .pairs = c->pairs,
                                   .num_kv_heads = c->hkv,
                                   .head_dim = c->d,
                                   .dtype = dtype};
        double *want_k = host_doubles(out_size), *want_v = host_doubles(out_size);
        for (size_t i = 0; i < out_size; i++) want_k[i] = want_v[i] = NAN;
        int moved = 0;
        for (int h = 0; h < c->hkv; h++) {
            for (int64_t i = 0; i < c->num && i < counts[h]; i++) {
                const int64_t at = h * list_stride + i, row = c->to_pool ? to[at] : i;
                if (row < 0) continue;
                const int64_t out = c->to_pool ? lead + row * row_stride : h * head_stride + row * c->d;
                const int64_t source = offset_of(&s, h, c->from ? from[at] : i);
                const int position = c->turns ? turn[at] : 0, p = abs(position);
                for (int x = 0; x < c->d; x++) {
                    want_k[out + x] = s.k.host[source + x];
                    want_v[out + x] = s.v.host[source + x];
                }
                for (int x = 0; x < c->pairs && c->turns; x++) {
                    const float *angle = table.host + (p * c->pairs + x) * 2;
                    const double cosine = angle[0], sine = position < 0 ? -angle[1] : angle[1];
                    const double u = s.k.host[source + x], v = s.k.host[source + x + c->pairs];
                    want_k[out + x] = u * cosine - v * sine;
                    want_k[out + x + c->pairs] = v * cosine + u * sine;
                }
                moved++;
            }
        }
        ck_assert_int_gt(moved, 0);
        expect_ok(test_ops()->kv_copy(NULL, &a, &err));
        expect_ok(test_ops()->kv_copy(test_stream(), &a, &err));
        expect_close(&k_out, want_k, c->turns ? dtype_bound(dtype) : 0, "kv_copy k", "case %d", _i);
        expect_close(&v_out, want_v, 0, "kv_copy v", "case %d", _i);
    }
}
END_TEST

/* Forward and back is where it was. */
START_TEST(turns_undo_each_other) {
    enum { NUM = 60, D = 64 };
    const rf_dtype dtype = test_dtype(_i);
    keys s = make_keys(dtype, PLANE, NUM, 2, D, 0, 1);
    operand table = make_table(D / 2), there = op_poison(dtype, 2 * NUM * D), back = op_poison(dtype, 2 * NUM * D);
    operand v = op_poison(dtype, 2 * NUM * D);
    int32_t turn[2 * NUM], undo[2 * NUM];
    for (int i = 0; i < 2 * NUM; i++) undo[i] = -(turn[i] = (i * 7) % POSITIONS);
    rf_kv_copy_args a = {.source = s.source,
                         .k_out = there.dev,
                         .v_out = v.dev,
                         .out_head_stride = NUM * D,
                         .turn = dev_i32(turn, 2 * NUM),
                         .list_stride = NUM,
                         .num = NUM,
                         .table = table.dev,
                         .pairs = D / 2,
                         .num_kv_heads = 2,
                         .head_dim = D,
                         .dtype = dtype};
    expect_ok(test_ops()->kv_copy(test_stream(), &a, &err));
    a.source = (rf_kv_source){.k = there.dev, .v = v.dev, .row_stride = D, .head_stride = NUM * D, .num_keys = NUM};
    operand v_back = op_poison(dtype, 2 * NUM * D);
    a.k_out = back.dev, a.v_out = v_back.dev, a.turn = dev_i32(undo, 2 * NUM);
    expect_ok(test_ops()->kv_copy(test_stream(), &a, &err));
    double *want = host_doubles(back.num);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < NUM; i++)
            for (int x = 0; x < D; x++) want[(h * NUM + i) * D + x] = s.k.host[offset_of(&s, h, i) + x];
    expect_close(&back, want, 2 * dtype_bound(dtype), "kv_copy", "forward and back");
    expect_same_bits(&v, &v_back, "kv_copy", "values");
    op_download(&there);
    double off = 0;
    for (size_t i = 0; i < back.num; i++) off += fabs((double)there.host[i] - want[i]);
    ck_assert_double_gt(off, 10); /* it did turn */
}
END_TEST

START_TEST(append_puts_tokens_behind) {
    static const int dims[] = {64, 128, 80, 7, 256};
    for (size_t n = 0; n < LENGTH(dims); n++) {
        enum { HEADS_OF = 9, STRIDE = 6, POOL = 40 };
        const int d = dims[n];
        const rf_dtype dtype = test_dtype(_i);
        operand k = op_normal(dtype, (size_t)(HEADS_OF * d), 0, 1), v = op_normal(dtype, (size_t)(HEADS_OF * d), 0, 1);
        int32_t new_rows[HEADS_OF], rows[HEADS_OF * STRIDE], lens[HEADS_OF], order[POOL], got[HEADS_OF * STRIDE];
        random_permutation(order, POOL, 3);
        for (int h = 0; h < HEADS_OF; h++) {
            new_rows[h] = h % 4 == 2 ? -1 : order[h];
            lens[h] = h % STRIDE;
        }
        for (int i = 0; i < HEADS_OF * STRIDE; i++) rows[i] = 1000 + i;
        enum { DATA, DATA_AND_LISTS, LISTS };
        for (int what = DATA; what <= LISTS; what++) {
            const bool listed = what != DATA;
            operand k_pool = op_poison(dtype, (size_t)(POOL * d)), v_pool = op_poison(dtype, (size_t)(POOL * d));
            int32_t *dev_rows = (int32_t *)dev_i32(rows, LENGTH(rows)), *dev_lens = (int32_t *)dev_i32(lens, HEADS_OF);
            const rf_kv_append_args a = {.k = what == LISTS ? NULL : k.dev,
                                         .v = what == LISTS ? NULL : v.dev,
                                         .k_pool = what == LISTS ? NULL : k_pool.dev,
                                         .v_pool = what == LISTS ? NULL : v_pool.dev,
                                         .new_rows = dev_i32(new_rows, HEADS_OF),
                                         .rows = listed ? dev_rows : NULL,
                                         .lens = listed ? dev_lens : NULL,
                                         .rows_stride = STRIDE,
                                         .heads = HEADS_OF,
                                         .head_dim = d,
                                         .dtype = dtype};
            expect_ok(test_ops()->kv_append(NULL, &a, &err));
            expect_ok(test_ops()->kv_append(test_stream(), &a, &err));
            double *want_k = host_doubles(k_pool.num), *want_v = host_doubles(v_pool.num);
            for (size_t i = 0; i < k_pool.num; i++) want_k[i] = want_v[i] = NAN;
            for (int h = 0; h < HEADS_OF; h++)
                for (int x = 0; x < d && new_rows[h] >= 0 && what != LISTS; x++) {
                    want_k[new_rows[h] * d + x] = k.host[h * d + x];
                    want_v[new_rows[h] * d + x] = v.host[h * d + x];
                }
            expect_close(&k_pool, want_k, 0, "kv_append k", "%d", d);
            expect_close(&v_pool, want_v, 0, "kv_append v", "%d", d);
            download(got, dev_rows, sizeof got);
            for (int i = 0; i < HEADS_OF * STRIDE; i++) {
                const int h = i / STRIDE;
                const bool appended = listed && new_rows[h] >= 0 && i % STRIDE == lens[h];
                ck_assert_int_eq(got[i], appended ? new_rows[h] : rows[i]);
            }
            download(got, dev_lens, HEADS_OF * sizeof *got);
            for (int h = 0; h < HEADS_OF; h++) ck_assert_int_eq(got[h], lens[h] + (listed && new_rows[h] >= 0));
        }
    }
}
END_TEST

/* ---- evict ---- */

typedef struct {
    rf_kv_evict_mode mode;
    bool over_heads;
    int32_t sinks, recents, budget;
    int sequences, hq, hkv, d;
    double decay;
    bool ragged;
} evict_case;
static const evict_case evict_cases[] = {
    {RF_KV_EVICT_SUM, false, 0, 0, 24, 2, 4, 2, 64, 1, true},
    {RF_KV_EVICT_SUM, false, 4, 8, 40, 1, 8, 2, 128, 0.9, true},
    {RF_KV_EVICT_SUM, true, 2, 3, 20, 2, 4, 2, 64, 1, false},
    {RF_KV_EVICT_LAST, true, 0, 0, 33, 2, 6, 3, 64, 1, false},
    {RF_KV_EVICT_LAST, false, 0, 1, 70, 1, 4, 4, 64, 1, true},
    {RF_KV_EVICT_LAST, false, 3, 0, 16, 3, 2, 1, 12, 1, true},
    {RF_KV_EVICT_AGE, false, 4, 12, 32, 2, 4, 2, 64, 1, true},
    {RF_KV_EVICT_AGE, false, 0, 0, 1, 1, 2, 1, 64, 1, false},
    {RF_KV_EVICT_LAST, true, 2, 3, 20, 2, 4, 2, 64, 1, true},
    {RF_KV_EVICT_SUM, false, 1, 1, 150, 1, 12, 1, 80, 0.5, false},
    {RF_KV_EVICT_AGE, true, 2, 2, 100, 2, 4, 2, 64, 1, false},
};

typedef struct {
    int32_t row, position;
    double score;
} slot;

/* 200 steps of tokens that come and slots that go, against lists. */
START_TEST(evictions_follow_a_plain_list) {
    enum { STEPS = 200 };
    const evict_case *c = &evict_cases[_i];
    for (int t = 0; t < test_num_dtypes(); t++) {
        const rf_dtype dtype = test_dtype(t);
        const int units = c->sequences * c->hkv, group = c->hq / c->hkv, d = c->d;
        const int stride = c->budget + 6, pool_rows = units * stride;
        const float scale = (float)(1 / sqrt(d));
        operand k_pool = op_poison(dtype, (size_t)(pool_rows * d)), v_pool = op_poison(dtype, (size_t)(pool_rows * d));
        operand k_new = op_poison(dtype, (size_t)(units * d)), q = op_poison(dtype, (size_t)(c->sequences * c->hq * d));
        operand lse = op_poison(RF_DTYPE_F32, (size_t)(c->sequences * c->hq)),
                score = op_poison(RF_DTYPE_F32, (size_t)(units * stride));
        int32_t *rows = host_ints((size_t)(units * stride)), *positions = host_ints((size_t)(units * stride)),
                *lens = host_ints((size_t)units), *spare = host_ints((size_t)units), *budget = host_ints((size_t)units),
                *fresh = host_ints((size_t)units);
        slot *list = (slot *)host_doubles((size_t)(units * stride) * sizeof(slot) / sizeof(double) + 1);
        double *probs = host_doubles((size_t)(c->sequences * c->hq * stride)),
               *pr = host_doubles((size_t)(units * stride));
        for (int u = 0; u < units; u++) {
            budget[u] = c->budget - (c->ragged ? u % 3 : 0);
            spare[u] = -1;
        }
        int32_t *dev_rows = (int32_t *)dev_i32(rows, (size_t)(units * stride)),
                *dev_positions = (int32_t *)dev_i32(positions, (size_t)(units * stride)),
                *dev_lens = (int32_t *)dev_i32(lens, (size_t)units),
                *dev_spare = (int32_t *)dev_i32(spare, (size_t)units);
        rf_kv_append_args append = {.k = k_new.dev,
                                    .v = k_new.dev,
                                    .k_pool = k_pool.dev,
                                    .v_pool = v_pool.dev,
                                    .new_rows = dev_spare,
                                    .rows = dev_rows,
                                    .lens = dev_lens,
                                    .rows_stride = stride,
                                    .heads = units,
                                    .head_dim = d,
                                    .dtype = dtype};
        rf_kv_evict_args a = {.k = k_pool.dev,
                              .q = q.dev,
                              .lse = lse.dev,
                              .rows = dev_rows,
                              .positions = dev_positions,
                              .lens = dev_lens,
                              .spare = dev_spare,
                              .budget = dev_i32(budget, (size_t)units),
                              .score = score.dev,
                              .rows_stride = stride,
                              .sequences = c->sequences,
                              .num_q_heads = c->hq,
                              .num_kv_heads = c->hkv,
                              .head_dim = d,
                              .dtype = dtype,
                              .scale = scale,
                              .decay = (float)c->decay,
                              .mode = c->mode,
                              .over_heads = c->over_heads,
                              .sinks = c->sinks,
                              .recents = c->recents,
                              .max_len = stride - 1};
        a.workspace_bytes = test_ops()->kv_evict_workspace(test_backend(), &a);
        a.workspace = dev_bytes(a.workspace_bytes);
        expect_ok(test_ops()->kv_evict(NULL, &a, &err));
        int evicted = 0, inner = 0;
        for (int step = 0; step < STEPS; step++) {
            /* A new token a unit: into the row that the last one left, or a fresh row. */
            for (int u = 0; u < units; u++)
                if (spare[u] < 0) spare[u] = u * stride + fresh[u]++;
            upload(dev_spare, spare, (size_t)units * sizeof *spare);
            operand normal = {.dtype = RF_DTYPE_F32, .num = k_new.num + q.num};
            float *draws = malloc(normal.num * sizeof *draws);
            ck_assert_ptr_nonnull(draws);
            rf_rng_normal_at(77, (uint64_t)(step + 1000 * _i), 0, draws, normal.num);
            for (size_t i = 0; i < normal.num; i++) {
                float x = draws[i] * 1.5f;
                if (dtype == RF_DTYPE_BF16) x = rf_bf16_to_f32(rf_f32_to_bf16(x));
                *(i < k_new.num ? k_new.host + i : q.host + (i - k_new.num)) = x;
            }
            free(draws);
            op_upload(&k_new);
            op_upload(&q);
            expect_ok(test_ops()->kv_append(test_stream(), &append, &err));
            for (int u = 0; u < units; u++) {
                slot *s = list + u * stride;
                s[lens[u]] = (slot){spare[u], step, 0};
                memcpy(k_pool.host + spare[u] * d, k_new.host + u * d, (size_t)d * sizeof(float));
                upload(dev_positions + u * stride + lens[u], &s[lens[u]].position, sizeof(int32_t));
                lens[u]++;
            }
            /* Attention over what is there. */
            for (int h = 0; h < c->sequences * c->hq; h++) {
                const int u = h / group;
                double *p = probs + h * stride, sum = 0;
                memset(p, 0, (size_t)stride * sizeof *p); /* a slot that this head lacks */
                for (int j = 0; j < lens[u]; j++)
                    sum += p[j] =
                        exp((double)scale * product(q.host + h * d, k_pool.host + list[u * stride + j].row * d, d));
                lse.host[h] = (float)log(sum);
                for (int j = 0; j < lens[u]; j++) p[j] /= exp((double)lse.host[h]);
            }
            op_upload(&lse);
            expect_ok(test_ops()->kv_evict(test_stream(), &a, &err));

            download(rows, dev_rows, (size_t)(units * stride) * sizeof *rows);
            download(positions, dev_positions, (size_t)(units * stride) * sizeof *positions);
            int32_t got_lens[16], got_spare[16];
            download(got_lens, dev_lens, (size_t)units * sizeof *got_lens);
            download(got_spare, dev_spare, (size_t)units * sizeof *got_spare);
            op_download(&score);
            for (int u = 0; u < units; u++) {
                slot *s = list + u * stride;
                const int first_head = c->over_heads ? u / c->hkv * c->hq : u * group,
                          heads = c->over_heads ? c->hq : group;
                for (int j = 0; j < lens[u]; j++) {
                    double p = 0;
                    for (int h = first_head; h < first_head + heads; h++) p += probs[h * stride + j] / heads;
                    pr[u * stride + j] = p;
                    if (c->mode == RF_KV_EVICT_SUM && j < lens[u] - 1)
                        s[j].score = (double)(float)c->decay * s[j].score + p;
                    else if (c->mode != RF_KV_EVICT_AGE)
                        s[j].score = p;
                }
                int victim = -1;
                for (int j = c->sinks; lens[u] > budget[u] && j < lens[u] - c->recents; j++)
                    if (victim < 0 || (c->mode != RF_KV_EVICT_AGE && s[j].score <= s[victim].score)) victim = j;
                if (victim >= 0) {
                    inner += victim > c->sinks && victim < lens[u] - 1;
                    spare[u] = s[victim].row;
                    memmove(s + victim, s + victim + 1, (size_t)(lens[u] - 1 - victim) * sizeof *s);
                    lens[u]--;
                    evicted++;
                }
                ck_assert_int_eq(got_lens[u], lens[u]);
                ck_assert_int_eq(got_spare[u], spare[u]);
                if (victim < 0) spare[u] = -1; /* used up */
                for (int j = 0; j < lens[u]; j++) {
                    const int at = u * stride + j;
                    if (rows[at] != s[j].row || positions[at] != s[j].position)
                        ck_abort_msg("case %d, step %d, unit %d, slot %d: row %d at %d, wanted %d at %d", _i, step, u,
                                     j, rows[at], positions[at], s[j].row, s[j].position);
                    const double got = score.host[at];
                    if (c->mode != RF_KV_EVICT_AGE && !(fabs(got - s[j].score) <= 2 * BOUND * s[j].score))
                        ck_abort_msg("case %d, step %d, unit %d, slot %d: score %.9g, wanted %.9g", _i, step, u, j, got,
                                     s[j].score);
                }
            }
        }
        ck_assert_int_ge(evicted, units * (STEPS - c->budget));
        /* Sums drop what is new if they may. */
        if (c->mode == RF_KV_EVICT_LAST || (c->mode == RF_KV_EVICT_SUM && c->recents > 0))
            ck_assert_int_gt(inner, STEPS / 10);
    }
}
END_TEST

/* A unit of `len` slots with keys as given, one head, D 8; what is left of its rows. */
typedef struct {
    rf_kv_evict_args args;
    operand k, q, lse, score;
    int32_t *rows, *positions, *lens, *spare;
} small_unit;

static small_unit make_small(rf_dtype dtype, int len, int budget, const double *scores) {
    enum { D = 8, STRIDE = 12 };
    small_unit s = {.k = op_poison(dtype, STRIDE * D), .q = op_normal(dtype, D, 0, 1)};
    memset(s.k.host, 0, s.k.num * sizeof(float)); /* all p are equal */
    op_upload(&s.k);
    const double log_len = log(len);
    s.lse = op_values(RF_DTYPE_F32, 1, &log_len);
    double padded[STRIDE] = {0};
    for (int j = 0; j < len && scores; j++) padded[j] = scores[j];
    s.score = op_values(RF_DTYPE_F32, STRIDE, padded);
    int32_t rows[STRIDE], positions[STRIDE], one_len = len, one_budget = budget, none = -5;
    for (int j = 0; j < STRIDE; j++) rows[j] = STRIDE - 1 - j, positions[j] = 10 + j;
    s.rows = (int32_t *)dev_i32(rows, STRIDE);
    s.positions = (int32_t *)dev_i32(positions, STRIDE);
    s.lens = (int32_t *)dev_i32(&one_len, 1);
    s.spare = (int32_t *)dev_i32(&none, 1);
    s.args = (rf_kv_evict_args){.k = s.k.dev,
                                .q = s.q.dev,
                                .lse = s.lse.dev,
                                .rows = s.rows,
                                .positions = s.positions,
                                .lens = s.lens,
                                .spare = s.spare,
                                .budget = dev_i32(&one_budget, 1),
                                .score = s.score.dev,
                                .rows_stride = STRIDE,
                                .sequences = 1,
                                .num_q_heads = 1,
                                .num_kv_heads = 1,
                                .head_dim = D,
                                .dtype = dtype,
                                .scale = 1,
                                .decay = 1,
                                .mode = RF_KV_EVICT_LAST,
                                .max_len = STRIDE};
    s.args.workspace_bytes = test_ops()->kv_evict_workspace(test_backend(), &s.args);
    s.args.workspace = dev_bytes(s.args.workspace_bytes);
    return s;
}

/* The slot that went (-1: none), which is checked to have left no other trace. */
static int run_small(small_unit *s) {
    int32_t before[12], after[12], len, new_len, spare;
    download(before, s->rows, sizeof before);
    download(&len, s->lens, sizeof len);
    expect_ok(test_ops()->kv_evict(test_stream(), &s->args, &err));
    download(after, s->rows, sizeof after);
    download(&new_len, s->lens, sizeof new_len);
    download(&spare, s->spare, sizeof spare);
    if (new_len == len) {
        ck_assert_mem_eq(before, after, sizeof before);
        ck_assert_int_eq(spare, -5);
        return -1;
    }
    ck_assert_int_eq(new_len, len - 1); /* at most one */
    int victim = 0;
    while (victim < new_len && after[victim] == before[victim]) victim++;
    for (int j = victim; j < new_len; j++) ck_assert_int_eq(after[j], before[j + 1]);
    ck_assert_int_eq(spare, before[victim]);
    return victim;
}

START_TEST(of_equals_the_lowest_stay) {
    const rf_dtype dtype = test_dtype(_i);
    small_unit s = make_small(dtype, 9, 8, NULL);
    ck_assert_int_eq(run_small(&s), 8);
    s = make_small(dtype, 9, 8, NULL);
    s.args.recents = 3;
    ck_assert_int_eq(run_small(&s), 5);
    s = make_small(dtype, 9, 2, NULL); /* far too many: still one */
    s.args.sinks = 7;
    s.args.recents = 1;
    ck_assert_int_eq(run_small(&s), 7);
    s = make_small(dtype, 9, 8, NULL);
    s.args.mode = RF_KV_EVICT_AGE;
    s.args.sinks = 3;
    ck_assert_int_eq(run_small(&s), 3);

    /* Sums: slot 2 and 5 are the lowest; the new slot's p is 1/8. */
    const double scores[] = {3, 2, 0.5, 1, 0.75, 0.5, 4, 9};
    s = make_small(dtype, 8, 7, scores);
    s.args.mode = RF_KV_EVICT_SUM;
    s.args.recents = 1;
    ck_assert_int_eq(run_small(&s), 5);
    s.args.recents = 4;
    s.args.positions = NULL;
    int32_t spare = -5, budget = 6;
    upload(s.spare, &spare, sizeof spare);
    upload((void *)s.args.budget, &budget, sizeof budget);
    ck_assert_int_eq(run_small(&s), 2);
    s = make_small(dtype, 8, 7, scores); /* the new one is the lowest of all */
    s.args.mode = RF_KV_EVICT_SUM;
    ck_assert_int_eq(run_small(&s), 7);

    /* Not a number: as good as the best. */
    const double odd[] = {NAN, 2, 3, 4, 5, 6, 7, 8};
    s = make_small(dtype, 8, 7, odd);
    s.args.mode = RF_KV_EVICT_SUM;
    s.args.recents = 1;
    ck_assert_int_eq(run_small(&s), 1);
}
END_TEST

START_TEST(protected_slots_stay) {
    const rf_dtype dtype = test_dtype(_i);
    for (int mode = RF_KV_EVICT_SUM; mode <= RF_KV_EVICT_AGE; mode++) {
        for (int sinks = 0; sinks < 12; sinks += 3) {
            for (int recents = 0; recents < 12; recents += 3) {
                small_unit s = make_small(dtype, 9, 8, (const double[]){1, 1, 1, 1, 1, 1, 1, 1, 1});
                s.args.mode = (rf_kv_evict_mode)mode;
                s.args.sinks = sinks;
                s.args.recents = recents;
                if (mode == RF_KV_EVICT_AGE) s.args.score = NULL, s.args.q = s.args.k = NULL, s.args.lse = NULL;
                const int newest = mode == RF_KV_EVICT_SUM && recents == 0 && sinks <= 8; /* its score is p alone */
                const int expected = mode == RF_KV_EVICT_AGE ? sinks : newest ? 8 : 8 - recents;
                ck_assert_int_eq(run_small(&s), sinks + recents >= 9 ? -1 : expected);
            }
        }
        small_unit fits = make_small(dtype, 8, 8, NULL);
        fits.args.mode = (rf_kv_evict_mode)mode;
        ck_assert_int_eq(run_small(&fits), -1);
    }
}
END_TEST

/* ---- refusals ---- */

#define expect_refusal(op, good, field, value, status)                                                                 \
    do {                                                                                                               \
        __typeof__(good) bad_ = (good);                                                                                \
        bad_.field = (value);                                                                                          \
        expect_status(test_ops()->op(NULL, &bad_, &err), status);                                                      \
        expect_status(test_ops()->op(test_stream(), &bad_, &err), status);                                             \
    } while (0)
/* Missing at run time alone. */
#define expect_missing(op, good, field)                                                                                \
    do {                                                                                                               \
        __typeof__(good) bad_ = (good);                                                                                \
        bad_.field = NULL;                                                                                             \
        expect_ok(test_ops()->op(NULL, &bad_, &err));                                                                  \
        expect_status(test_ops()->op(test_stream(), &bad_, &err), RF_ERR_ARGUMENT);                                    \
    } while (0)

/* What columns and losses share. */
#define expect_window_refusals(op, good)                                                                               \
    do {                                                                                                               \
        expect_refusal(op, good, dtype, RF_DTYPE_F16, RF_ERR_DTYPE);                                                   \
        expect_refusal(op, good, num_q_heads, 3, RF_ERR_SHAPE);                                                        \
        expect_refusal(op, good, num_q_heads, 0, RF_ERR_SHAPE);                                                        \
        expect_refusal(op, good, num_kv_heads, 0, RF_ERR_SHAPE);                                                       \
        expect_refusal(op, good, head_dim, 1, RF_ERR_SHAPE);                                                           \
        expect_refusal(op, good, head_dim, 1025, RF_ERR_SHAPE);                                                        \
        expect_refusal(op, good, num_queries, -1, RF_ERR_SHAPE);                                                       \
        expect_refusal(op, good, q_row_stride, 255, RF_ERR_SHAPE);                                                     \
        expect_refusal(op, good, lse_stride, 2, RF_ERR_SHAPE);                                                         \
        expect_refusal(op, good, out_stride, 9, RF_ERR_SHAPE);                                                         \
        expect_refusal(op, good, scale, NAN, RF_ERR_ARGUMENT);                                                         \
        expect_refusal(op, good, scale, INFINITY, RF_ERR_ARGUMENT);                                                    \
        expect_refusal(op, good, first_position, -1, RF_ERR_SHAPE);                                                    \
        expect_refusal(op, good, source.rows, rows, RF_ERR_ARGUMENT); /* causal */                                     \
        expect_source_refusals(op, good);                                                                              \
    } while (0)
#define expect_source_refusals(op, good)                                                                               \
    do {                                                                                                               \
        expect_refusal(op, good, source.num_keys, -1, RF_ERR_SHAPE);                                                   \
        expect_refusal(op, good, source.row_stride, 63, RF_ERR_SHAPE);                                                 \
        expect_refusal(op, good, source.head_stride, 63, RF_ERR_SHAPE);                                                \
        expect_refusal(op, good, source.lens, rows, RF_ERR_ARGUMENT);                                                  \
        __typeof__(good) listed_ = (good);                                                                             \
        listed_.source.rows = rows;                                                                                    \
        expect_refusal(op, listed_, source.rows_stride, 9, RF_ERR_SHAPE);                                              \
    } while (0)

START_TEST(bad_arguments_are_refused) {
    static const int32_t zeros[64];
    const int32_t *rows = dev_i32(zeros, 64);
    float *some = dev_bytes(1 << 16); /* enough for every operand here */
    const rf_kv_source source = {
        .k = some, .v = some, .row_stride = 128, .head_stride = 64, .rows_stride = 10, .num_keys = 10};
    rf_kv_columns_args columns = {.source = source,
                                  .q = some,
                                  .q_row_stride = 256,
                                  .lse = some,
                                  .lse_stride = 3,
                                  .num_queries = 3,
                                  .num_q_heads = 4,
                                  .num_kv_heads = 2,
                                  .head_dim = 64,
                                  .dtype = RF_DTYPE_F32,
                                  .scale = 1,
                                  .causal = true,
                                  .s1 = some,
                                  .entropy = some,
                                  .out_stride = 10,
                                  .workspace = some,
                                  .workspace_bytes = 1 << 16};
    expect_ok(test_ops()->kv_columns(NULL, &columns, &err));
    expect_window_refusals(kv_columns, columns);
    expect_refusal(kv_columns, columns, entropy_keys, -1, RF_ERR_SHAPE);
    expect_missing(kv_columns, columns, source.k);
    expect_missing(kv_columns, columns, q);
    expect_missing(kv_columns, columns, lse);
    rf_kv_columns_args small = columns;
    small.workspace_bytes = test_ops()->kv_columns_workspace(test_backend(), &columns) - 1;
    expect_status(test_ops()->kv_columns(test_stream(), &small, &err), RF_ERR_WORKSPACE);
    small.workspace_bytes = columns.workspace_bytes;
    small.workspace = NULL;
    expect_status(test_ops()->kv_columns(test_stream(), &small, &err), RF_ERR_WORKSPACE);
    small.s1 = small.entropy = NULL; /* nothing is asked for */
    expect_ok(test_ops()->kv_columns(test_stream(), &small, &err));

    rf_kv_loss_args loss = {.source = source,
                            .q = some,
                            .o = some,
                            .q_row_stride = 256,
                            .o_row_stride = 256,
                            .lse = some,
                            .lse_stride = 3,
                            .num_queries = 3,
                            .num_q_heads = 4,
                            .num_kv_heads = 2,
                            .head_dim = 64,
                            .dtype = RF_DTYPE_F32,
                            .scale = 1,
                            .causal = true,
                            .out = some,
                            .out_stride = 10,
                            .workspace = some,
                            .workspace_bytes = 1 << 16};
    expect_ok(test_ops()->kv_loss(NULL, &loss, &err));
    expect_window_refusals(kv_loss, loss);
    expect_refusal(kv_loss, loss, o_row_stride, 255, RF_ERR_SHAPE);
    expect_refusal(kv_loss, loss, loss, (rf_kv_loss)4, RF_ERR_ARGUMENT);
    expect_missing(kv_loss, loss, source.k);
    expect_missing(kv_loss, loss, source.v);
    expect_missing(kv_loss, loss, q);
    expect_missing(kv_loss, loss, o);
    expect_missing(kv_loss, loss, lse);
    expect_missing(kv_loss, loss, out);

    rf_kv_norms_args norms = {.source = source,
                              .num_kv_heads = 2,
                              .head_dim = 64,
                              .dtype = RF_DTYPE_F32,
                              .key_norm = some,
                              .value_norm = some,
                              .key_cosine = some,
                              .anchor = some,
                              .out_stride = 10};
    expect_ok(test_ops()->kv_norms(NULL, &norms, &err));
    expect_source_refusals(kv_norms, norms);
    expect_refusal(kv_norms, norms, dtype, RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_refusal(kv_norms, norms, num_kv_heads, 0, RF_ERR_SHAPE);
    expect_refusal(kv_norms, norms, head_dim, 0, RF_ERR_SHAPE);
    expect_refusal(kv_norms, norms, head_dim, 1025, RF_ERR_SHAPE);
    expect_refusal(kv_norms, norms, out_stride, 9, RF_ERR_SHAPE);
    expect_missing(kv_norms, norms, source.k);
    expect_missing(kv_norms, norms, source.v);
    expect_missing(kv_norms, norms, anchor);

    rf_kv_copy_args copy = {.source = source,
                            .k_out = some,
                            .v_out = some,
                            .out_row_stride = 64,
                            .out_head_stride = 640,
                            .from = rows,
                            .to = rows,
                            .turn = rows,
                            .list_stride = 10,
                            .num = 10,
                            .table = some,
                            .pairs = 32,
                            .num_kv_heads = 2,
                            .head_dim = 64,
                            .dtype = RF_DTYPE_F32};
    expect_ok(test_ops()->kv_copy(NULL, &copy, &err));
    expect_source_refusals(kv_copy, copy);
    expect_refusal(kv_copy, copy, dtype, RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_refusal(kv_copy, copy, num_kv_heads, 0, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, head_dim, 0, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, num, -1, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, list_stride, 9, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, out_row_stride, 63, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, pairs, 33, RF_ERR_SHAPE);
    expect_refusal(kv_copy, copy, pairs, 0, RF_ERR_SHAPE);
    expect_missing(kv_copy, copy, source.k);
    expect_missing(kv_copy, copy, source.v);
    expect_missing(kv_copy, copy, k_out);
    expect_missing(kv_copy, copy, v_out);
    expect_missing(kv_copy, copy, table);
    rf_kv_copy_args dense = copy;
    dense.to = NULL;
    expect_ok(test_ops()->kv_copy(NULL, &dense, &err));
    expect_refusal(kv_copy, dense, out_head_stride, 639, RF_ERR_SHAPE);
    dense.from = NULL; /* more rows than there are */
    expect_refusal(kv_copy, dense, num, 11, RF_ERR_SHAPE);

    rf_kv_append_args append = {.k = some,
                                .v = some,
                                .k_pool = some,
                                .v_pool = some,
                                .new_rows = rows,
                                .rows = (int32_t *)rows,
                                .lens = (int32_t *)rows,
                                .rows_stride = 4,
                                .heads = 2,
                                .head_dim = 64,
                                .dtype = RF_DTYPE_F32};
    expect_ok(test_ops()->kv_append(NULL, &append, &err));
    expect_refusal(kv_append, append, dtype, RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_refusal(kv_append, append, heads, -1, RF_ERR_SHAPE);
    expect_refusal(kv_append, append, head_dim, 0, RF_ERR_SHAPE);
    expect_refusal(kv_append, append, head_dim, 1025, RF_ERR_SHAPE);
    expect_refusal(kv_append, append, rows_stride, 0, RF_ERR_SHAPE);
    expect_missing(kv_append, append, k);
    expect_missing(kv_append, append, v);
    expect_missing(kv_append, append, k_pool);
    expect_missing(kv_append, append, v_pool);
    expect_missing(kv_append, append, new_rows);
    expect_missing(kv_append, append, rows);

    rf_kv_evict_args evict = {.k = some,
                              .q = some,
                              .lse = some,
                              .rows = (int32_t *)rows,
                              .lens = (int32_t *)rows,
                              .spare = (int32_t *)rows,
                              .budget = rows,
                              .score = some,
                              .rows_stride = 10,
                              .sequences = 2,
                              .num_q_heads = 4,
                              .num_kv_heads = 2,
                              .head_dim = 64,
                              .dtype = RF_DTYPE_F32,
                              .scale = 1,
                              .decay = 1,
                              .over_heads = true,
                              .max_len = 10,
                              .workspace = some,
                              .workspace_bytes = 1 << 16};
    expect_ok(test_ops()->kv_evict(NULL, &evict, &err));
    expect_refusal(kv_evict, evict, dtype, RF_DTYPE_F16, RF_ERR_DTYPE);
    expect_refusal(kv_evict, evict, num_q_heads, 3, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, num_kv_heads, 0, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, head_dim, 1, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, sequences, -1, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, max_len, -1, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, rows_stride, 9, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, sinks, -1, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, recents, -1, RF_ERR_SHAPE);
    expect_refusal(kv_evict, evict, scale, NAN, RF_ERR_ARGUMENT);
    expect_refusal(kv_evict, evict, decay, INFINITY, RF_ERR_ARGUMENT);
    expect_refusal(kv_evict, evict, mode, (rf_kv_evict_mode)3, RF_ERR_ARGUMENT);
    expect_missing(kv_evict, evict, k);
    expect_missing(kv_evict, evict, q);
    expect_missing(kv_evict, evict, lse);
    expect_missing(kv_evict, evict, rows);
    expect_missing(kv_evict, evict, lens);
    expect_missing(kv_evict, evict, spare);
    expect_missing(kv_evict, evict, budget);
    expect_missing(kv_evict, evict, score);
    rf_kv_evict_args cramped = evict;
    cramped.workspace_bytes = test_ops()->kv_evict_workspace(test_backend(), &evict) - 1;
    expect_status(test_ops()->kv_evict(test_stream(), &cramped, &err), RF_ERR_WORKSPACE);

    if (test_is_cuda()) return; /* the CPU computes in f32 only */
    expect_refusal(kv_columns, columns, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(kv_loss, loss, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(kv_norms, norms, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(kv_copy, copy, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(kv_append, append, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
    expect_refusal(kv_evict, evict, dtype, RF_DTYPE_BF16, RF_ERR_DTYPE);
}
END_TEST

int main(void) {
    const int status = open_test_device();
    if (status != 0) return status;
    Suite *suite = suite_create("kv");
    TCase *tcase = kernel_tcase(suite, "kv");
    tcase_add_loop_test(tcase, columns_match_double, 0, (int)LENGTH(window_cases));
    add_for_dtypes(tcase, chunks_accumulate);
    add_for_dtypes(tcase, rows_without_keys_add_nothing);
    tcase_add_loop_test(tcase, losses_match_double, 0, (int)LENGTH(window_cases));
    add_for_dtypes(tcase, removal_is_what_attention_loses);
    add_for_dtypes(tcase, removal_of_the_only_key_is_bounded);
    add_for_dtypes(tcase, joint_loss_is_the_sum_of_its_parts);
    tcase_add_test(tcase, threads_do_not_change_sums);
    tcase_add_loop_test(tcase, norms_match_double, 0, (int)LENGTH(norm_cases));
    tcase_add_loop_test(tcase, copies_match_double, 0, (int)LENGTH(copy_cases));
    add_for_dtypes(tcase, turns_undo_each_other);
    add_for_dtypes(tcase, append_puts_tokens_behind);
    tcase_add_loop_test(tcase, evictions_follow_a_plain_list, 0, (int)LENGTH(evict_cases));
    add_for_dtypes(tcase, of_equals_the_lowest_stay);
    add_for_dtypes(tcase, protected_slots_stay);
    tcase_add_test(tcase, bad_arguments_are_refused);
    return run_kernel_suite(suite);
}
