/* kernels/kv_cpu.c
 * Maths    the operators of kv.h in f32: p = exp(scale q.k - lse).
 * Columns  and losses: a task is a key head and 64 keys, which are transposed once ([c][key]) and meet the queries of the group's
 *          heads 64 rows at a time. Keys lie along the vectors, so that a sum over queries stays in its lane. Where few rows meet
 *          a block (decoding), a score is a dot product and nothing is transposed.
 *          |v - o|^2 is summed from differences: where p is near 1, v is near o, and |v|^2 - 2 v.o + |o|^2 would be noise.
 * Sums     f32 over at most 64 rows, f64 above that; borders depend on shapes alone. Entropies of a block meet in workspace.
 * Memory   a task keeps its tiles on the stack (112 KiB). */
#include "kernels/kv_cpu.h"

#include "kernels/cpu.h"
#include "kernels/kv_checks.h"
#include "kernels/select.h"

enum {
    KEYS = 64,
    ROWS = 64,   /* a multiple of 4 */
    DIMS = 128,  /* of a transposed tile: more are added chunk by chunk */
    FEW_ROWS = 4 /* up to here scores are dot products */
};

static int64_t num_keys_of(const rf_kv_source *s, int64_t head) {
    return s->rows && s->lens ? rf_min64(rf_max64(s->lens[head], 0), s->num_keys) : s->num_keys;
}

static int64_t key_offset(const rf_kv_source *s, int64_t head, int64_t j) {
    return s->rows ? s->rows[head * s->rows_stride + j] * s->row_stride : j * s->row_stride + head * s->head_stride;
}

RF_INLINE float dot_body(const float *a, const float *b, int64_t num) {
    float sum[16] = {0}; /* fixed partial sums, whatever the width of the machine's vectors */
    int64_t i = 0;
    for (; i + 16 <= num; i += 16)
        for (int j = 0; j < 16; j++) sum[j] += a[i + j] * b[i + j];
    for (; i < num; i++) sum[0] += a[i] * b[i];
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}

RF_HOT static float dot(const float *a, const float *b, int64_t num) {
    return dot_body(a, b, num);
}

/* --- products of rows and keys ------------------------------------------------------------------------------------------ */

/* packed[c][j] = keys[j][first + c]; keys past num_keys are zeros. */
RF_HOT static void pack_keys(float *packed, const float *const *keys, int64_t num_keys, int64_t first, int64_t dims) {
    for (int64_t j = 0; j < num_keys; j++)
        for (int64_t c = 0; c < dims; c++) packed[c * KEYS + j] = keys[j][first + c];
    for (int64_t c = 0; c < dims && num_keys < KEYS; c++)
        memset(packed + c * KEYS + num_keys, 0, (size_t)(KEYS - num_keys) * sizeof *packed);
}

typedef struct {
    float a, b, c, d;
} four;

RF_INLINE four load_four(const float *x, int64_t step) {
    return (four){x[0], x[step], x[2 * step], x[3 * step]};
}

RF_INLINE float add_term(float sum, bool distance, float k, float x) {
    return distance ? sum + (k - x) * (k - x) : sum + k * x;
}

RF_INLINE float add_four(float sum, bool distance, four k, four x) {
    sum = add_term(sum, distance, k.a, x.a);
    sum = add_term(sum, distance, k.b, x.b);
    sum = add_term(sum, distance, k.c, x.c);
    return add_term(sum, distance, k.d, x.d);
}

/* out[r][j] = rows[r] . keys[j], or |keys[j] - rows[r]|^2, over dims of head_dim from `first` on; add: onto what is there. Four
 * rows by four elements at a time, in plain loops over the keys: vector types wider than the machine's would live in memory. Rows
 * up to the next multiple of 4 are written. */
RF_INLINE void tile_body(float *out, bool distance, const float *packed, const float *const *rows, int64_t num_rows,
                         int64_t first, int64_t dims, bool add) {
    for (int64_t r = 0; r < num_rows; r += 4) {
        const int64_t last = num_rows - 1;
        const float *x0 = rows[r] + first, *x1 = rows[rf_min64(r + 1, last)] + first;
        const float *x2 = rows[rf_min64(r + 2, last)] + first, *x3 = rows[rf_min64(r + 3, last)] + first;
        float *restrict t0 = out + r * KEYS, *restrict t1 = t0 + KEYS, *restrict t2 = t1 + KEYS,
                        *restrict t3 = t2 + KEYS;
        if (!add) memset(t0, 0, 4 * KEYS * sizeof *out);
        int64_t c = 0;
        for (; c + 4 <= dims; c += 4) {
            const float *restrict k = packed + c * KEYS;
            const four a0 = load_four(x0 + c, 1), a1 = load_four(x1 + c, 1);
            const four a2 = load_four(x2 + c, 1), a3 = load_four(x3 + c, 1);
#pragma omp simd
            for (int j = 0; j < KEYS; j++) {
                const four key = load_four(k + j, KEYS);
                t0[j] = add_four(t0[j], distance, key, a0);
                t1[j] = add_four(t1[j], distance, key, a1);
                t2[j] = add_four(t2[j], distance, key, a2);
                t3[j] = add_four(t3[j], distance, key, a3);
            }
        }
        for (; c < dims; c++) {
            const float *restrict k = packed + c * KEYS;
#pragma omp simd
            for (int j = 0; j < KEYS; j++) {
                t0[j] = add_term(t0[j], distance, k[j], x0[c]);
                t1[j] = add_term(t1[j], distance, k[j], x1[c]);
                t2[j] = add_term(t2[j], distance, k[j], x2[c]);
                t3[j] = add_term(t3[j], distance, k[j], x3[c]);
            }
        }
    }
}

RF_HOT static void tile_products(float *out, const float *packed, const float *const *rows, int64_t num_rows,
                                 int64_t first, int64_t dims, bool add) {
    tile_body(out, false, packed, rows, num_rows, first, dims, add);
}

RF_HOT static void tile_distances(float *out, const float *packed, const float *const *rows, int64_t num_rows,
                                  int64_t first, int64_t dims, bool add) {
    tile_body(out, true, packed, rows, num_rows, first, dims, add);
}

RF_HOT static void few_products(float *out, const float *const *keys, int64_t num_keys, const float *const *rows,
                                int64_t num_rows, int64_t dim) {
    for (int64_t r = 0; r < num_rows; r++) {
        for (int64_t j = 0; j < num_keys; j++) out[r * KEYS + j] = dot_body(rows[r], keys[j], dim);
        for (int64_t j = num_keys; j < KEYS; j++) out[r * KEYS + j] = 0.0f;
    }
}

RF_HOT static void few_distances(float *out, const float *const *keys, int64_t num_keys, const float *const *rows,
                                 int64_t num_rows, int64_t dim) {
    for (int64_t r = 0; r < num_rows; r++) {
        for (int64_t j = 0; j < num_keys; j++) {
            const float *a = keys[j], *b = rows[r];
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < dim; c++) sum += (a[c] - b[c]) * (a[c] - b[c]);
            out[r * KEYS + j] = sum;
        }
        for (int64_t j = num_keys; j < KEYS; j++) out[r * KEYS + j] = 0.0f;
    }
}

/* Rows of keys or values of a block, and their transpose once it is made. */
typedef struct {
    const float *rows[KEYS];
    int64_t num, dim;
    bool is_packed, few;
    float packed[DIMS * KEYS];
} key_block;

static void begin_block(key_block *b, const rf_kv_source *s, const void *base, int64_t head, int64_t first, int64_t num,
                        int64_t dim, bool few) {
    b->num = num;
    b->dim = dim;
    b->is_packed = false;
    b->few = few;
    for (int64_t j = 0; j < num; j++) b->rows[j] = (const float *)base + key_offset(s, head, first + j);
}

static void make_tile(float *out, bool distances, key_block *b, const float *const *rows, int64_t num_rows) {
    if (b->few) {
        if (distances)
            few_distances(out, b->rows, b->num, rows, num_rows, b->dim);
        else
            few_products(out, b->rows, b->num, rows, num_rows, b->dim);
        return;
    }
    for (int64_t c = 0; c < b->dim; c += DIMS) {
        const int64_t dims = rf_min64(DIMS, b->dim - c);
        if (!b->is_packed) pack_keys(b->packed, b->rows, b->num, c, dims);
        b->is_packed = b->dim <= DIMS;
        if (distances)
            tile_distances(out, b->packed, rows, num_rows, c, dims, c > 0);
        else
            tile_products(out, b->packed, rows, num_rows, c, dims, c > 0);
    }
}

/* --- sweeps over the queries -------------------------------------------------------------------------------------------- */

enum { COLUMNS = RF_KV_LOSS_JOINT + 1 }; /* what a sweep makes: this, or one of rf_kv_loss */

typedef struct {
    const rf_kv_source *source;
    const float *q, *o, *lse, *weights;
    int64_t q_row_stride, o_row_stride, lse_stride, num_queries, dim, group;
    float scale;
    bool causal, accumulate;
    int64_t first_position;
    int what;
    float *s1, *s2, *peak; /* a loss: s1 alone */
    int64_t out_stride;
    float *parts; /* entropy [Hq][num_blocks], or NULL */
    int64_t num_blocks, entropy_keys;
} sweep;

/* Queries of a tile, head by head. */
typedef struct {
    const float *q[ROWS], *o[ROWS];
    float lse[ROWS], weight[ROWS];
    int32_t limit[ROWS]; /* last key of the block that the row sees; KEYS or more: all */
} row_set;

typedef struct {
    double sum[KEYS], square[KEYS], entropy[KEYS];
    float peak[KEYS];
} column_sums;

/* ln p of a key for a row. lse is +inf for a row without keys, whose p are 0. */
RF_INLINE float log_prob(float score, float scale, float lse, int32_t j, int32_t limit) {
    const float x = scale * score - lse;
    return j <= limit ? x : -INFINITY;
}

RF_HOT static void add_sums(column_sums *t, const float *scores, const row_set *rows, int64_t begin, int64_t end,
                            float scale) {
    float sum[KEYS] = {0};
    for (int64_t r = begin; r < end; r++) {
        const float *s = scores + r * KEYS, lse = rows->lse[r], w = rows->weight[r];
        const int32_t limit = rows->limit[r];
#pragma omp simd
        for (int32_t j = 0; j < KEYS; j++) sum[j] += w * rf_exp(log_prob(s[j], scale, lse, j, limit));
    }
    for (int j = 0; j < KEYS; j++) t->sum[j] += (double)sum[j];
}

RF_HOT static void add_columns(column_sums *t, const float *scores, const row_set *rows, int64_t begin, int64_t end,
                               float scale) {
    float sum[KEYS] = {0}, square[KEYS] = {0}, entropy[KEYS] = {0}, peak[KEYS];
    memcpy(peak, t->peak, sizeof peak);
    for (int64_t r = begin; r < end; r++) {
        const float *s = scores + r * KEYS, lse = rows->lse[r], w = rows->weight[r];
        const int32_t limit = rows->limit[r];
#pragma omp simd
        for (int32_t j = 0; j < KEYS; j++) {
            const float x = log_prob(s[j], scale, lse, j, limit), p = rf_exp(x), wp = w * p;
            sum[j] += wp;
            square[j] += wp * p;
            peak[j] = p > peak[j] ? p : peak[j];
            entropy[j] -= p * (x < -1e4f ? -1e4f : x); /* 0 times a number */
        }
    }
    memcpy(t->peak, peak, sizeof peak);
    for (int j = 0; j < KEYS; j++) {
        t->sum[j] += (double)sum[j];
        t->square[j] += (double)square[j];
        t->entropy[j] += (double)entropy[j];
    }
}

/* away [row][key] |v - o|^2, inner v.o (joint), vv [key] |v|^2 (value, joint). */
RF_INLINE void losses_body(column_sums *t, int what, const float *scores, const float *away, const float *inner,
                           const float *vv, const row_set *rows, int64_t begin, int64_t end, float scale) {
    float sum[KEYS] = {0}, probs[KEYS], terms[KEYS];
    for (int64_t r = begin; r < end; r++) {
        const float *s = scores + r * KEYS, *d = away + r * KEYS, *u = inner + r * KEYS;
        const float lse = rows->lse[r], w = rows->weight[r];
        const int32_t limit = rows->limit[r];
#pragma omp simd
        for (int32_t j = 0; j < KEYS; j++) {
            const float p = rf_exp(log_prob(s[j], scale, lse, j, limit)), z = scale * s[j];
            probs[j] = p;
            if (what == RF_KV_LOSS_REMOVAL) {
                const float least = p > 1.0f - 1e-4f ? 1.0f - 1e-4f : p, f = least / (1.0f - least);
                terms[j] = w * f * f * d[j];
            } else if (what == RF_KV_LOSS_KEY) {
                terms[j] = w * (p * z) * (p * z) * d[j];
            } else if (what == RF_KV_LOSS_VALUE) {
                terms[j] = w * p * p * vv[j];
            } else { /* |v + z (v - o)|^2 */
                const float square = vv[j] + 2.0f * z * (vv[j] - u[j]) + z * z * d[j];
                terms[j] = w * p * p * (square < 0.0f ? 0.0f : square);
            }
        }
        /* What a row does not see may hold anything. A loop of its own, or it would be a branch. */
#pragma omp simd
        for (int32_t j = 0; j < KEYS; j++) sum[j] += probs[j] != 0.0f ? terms[j] : 0.0f;
    }
    for (int j = 0; j < KEYS; j++) t->sum[j] += (double)sum[j];
}

RF_HOT static void add_losses(column_sums *t, int what, const float *scores, const float *away, const float *inner,
                              const float *vv, const row_set *rows, int64_t begin, int64_t end, float scale) {
    switch (what) {
    case RF_KV_LOSS_REMOVAL:
        losses_body(t, RF_KV_LOSS_REMOVAL, scores, away, inner, vv, rows, begin, end, scale);
        break;
    case RF_KV_LOSS_KEY: losses_body(t, RF_KV_LOSS_KEY, scores, away, inner, vv, rows, begin, end, scale); break;
    case RF_KV_LOSS_VALUE: losses_body(t, RF_KV_LOSS_VALUE, scores, away, inner, vv, rows, begin, end, scale); break;
    default: losses_body(t, RF_KV_LOSS_JOINT, scores, away, inner, vv, rows, begin, end, scale); break;
    }
}

static void store_sums(float *out, const double *sums, int64_t seen, int64_t num, bool accumulate) {
    for (int64_t j = 0; j < seen; j++) out[j] = (float)(accumulate ? (double)out[j] + sums[j] : sums[j]);
    for (int64_t j = seen; j < num; j++) out[j] = 0.0f;
}

/* Columns first .. first + num - 1 of a query head, of which `seen` have a key. */
static void store_head(const sweep *s, int64_t head, int64_t block, int64_t seen, int64_t num, const column_sums *t) {
    const int64_t first = block * KEYS, at = head * s->out_stride + first;
    if (s->s1) store_sums(s->s1 + at, t->sum, seen, num, s->accumulate);
    if (s->s2) store_sums(s->s2 + at, t->square, seen, num, s->accumulate);
    for (int64_t j = 0; j < num && s->peak; j++) {
        float *out = s->peak + at + j, value = j < seen ? t->peak[j] : 0.0f;
        if (!s->accumulate || j >= seen || *out < value) *out = value;
    }
    if (!s->parts) return;
    double entropy = 0;
    for (int64_t j = 0; j < rf_min64(seen, s->entropy_keys - first); j++) entropy += t->entropy[j];
    s->parts[head * s->num_blocks + block] = (float)entropy;
}

static void sweep_block(const sweep *s, int64_t kv_head, int64_t block) {
    const int64_t first = block * KEYS, num = rf_min64(KEYS, s->source->num_keys - first);
    const int64_t seen = rf_min64(rf_max64(num_keys_of(s->source, kv_head) - first, 0), num);
    int64_t first_query = 0;
    if (s->causal) first_query = rf_min64(rf_max64(first - s->first_position, 0), s->num_queries);
    const int64_t each = seen > 0 ? s->num_queries - first_query : 0; /* queries of a head */
    column_sums sums = {0};
    if (each == 0) {
        for (int64_t h = kv_head * s->group; h < (kv_head + 1) * s->group; h++)
            store_head(s, h, block, seen, num, &sums);
        return;
    }
    const bool few = each * s->group <= FEW_ROWS;
    const bool is_loss = s->what != COLUMNS, uses_o = is_loss && s->what != RF_KV_LOSS_VALUE;
    const bool sums_alone = !s->s2 && !s->peak && !s->parts;
    key_block k, v;
    float scores[ROWS * KEYS], away[ROWS * KEYS], inner[ROWS * KEYS], vv[KEYS] = {0};
    begin_block(&k, s->source, s->source->k, kv_head, first, seen, s->dim, few);
    if (is_loss) {
        begin_block(&v, s->source, s->source->v, kv_head, first, seen, s->dim, few);
        for (int64_t j = 0; j < seen; j++) vv[j] = dot(v.rows[j], v.rows[j], s->dim);
    }
    row_set rows;
    const int64_t total = each * s->group;
    for (int64_t r0 = 0; r0 < total; r0 += ROWS) {
        const int64_t n = rf_min64(ROWS, total - r0);
        for (int64_t r = 0; r < n; r++) {
            const int64_t head = kv_head * s->group + (r0 + r) / each, i = first_query + (r0 + r) % each;
            rows.q[r] = s->q + i * s->q_row_stride + head * s->dim;
            rows.o[r] = uses_o ? s->o + i * s->o_row_stride + head * s->dim : NULL;
            const float lse = s->lse[head * s->lse_stride + i];
            rows.lse[r] = lse == -INFINITY ? INFINITY : lse;
            rows.weight[r] = s->weights ? s->weights[i] : 1.0f;
            rows.limit[r] = s->causal ? (int32_t)rf_min64(s->first_position + i - first, KEYS) : KEYS;
        }
        make_tile(scores, false, &k, rows.q, n);
        if (uses_o) make_tile(away, true, &v, rows.o, n);
        if (s->what == RF_KV_LOSS_JOINT) make_tile(inner, false, &v, rows.o, n);
        for (int64_t begin = 0, end; begin < n; begin = end) { /* rows of one head */
            const int64_t head = (r0 + begin) / each, left = (head + 1) * each - r0;
            end = rf_min64(left, n);
            if (is_loss)
                add_losses(&sums, s->what, scores, away, inner, vv, &rows, begin, end, s->scale);
            else if (sums_alone)
                add_sums(&sums, scores, &rows, begin, end, s->scale);
            else
                add_columns(&sums, scores, &rows, begin, end, s->scale);
            if (end < left) continue;
            store_head(s, kv_head * s->group + head, block, seen, num, &sums);
            memset(&sums, 0, sizeof sums);
        }
    }
}

static void run_sweep(rf_stream *stream, const sweep *s, int64_t num_kv_heads) {
    const int64_t tasks = num_kv_heads * s->num_blocks;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(                                                 \
    dynamic) if (s->source->num_keys * s->num_queries * s->group * num_kv_heads * s->dim > 16 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < tasks; task++) sweep_block(s, task % num_kv_heads, task / num_kv_heads);
}

static size_t entropy_bytes(const rf_kv_columns_args *a) {
    return (size_t)a->num_q_heads * (size_t)rf_div_up(a->source.num_keys, KEYS) * sizeof(float);
}

size_t rf_kv_columns_workspace_cpu(rf_backend *backend, const rf_kv_columns_args *a) {
    return rf_kv_columns_check(a, NULL) == RF_OK ? entropy_bytes(a) : 0;
}

rf_status rf_kv_columns_cpu(rf_stream *stream, const rf_kv_columns_args *a, rf_error *err) {
    RF_TRY(rf_kv_columns_check(a, err));
    RF_TRY(rf_check_f32("kv_columns: dtype", a->dtype, err));
    if (!stream || (!a->s1 && !a->s2 && !a->peak && !a->entropy)) return RF_OK;
    if (a->entropy) RF_TRY(rf_check_workspace("kv_columns", a->workspace, a->workspace_bytes, entropy_bytes(a), err));
    const void *const k = a->source.k;
    if (a->source.num_keys > 0) {
        const void *const needed[] = {k, a->num_queries > 0 ? a->q : k, a->num_queries > 0 ? (const void *)a->lse : k};
        RF_TRY(rf_text_pointers("kv_columns", needed, 3, err));
    }
    rf_stream_note_launch(stream, "kv_columns");
    const sweep s = {.source = &a->source,
                     .q = a->q,
                     .lse = a->lse,
                     .weights = a->weights,
                     .q_row_stride = a->q_row_stride,
                     .lse_stride = a->lse_stride,
                     .num_queries = a->num_queries,
                     .dim = a->head_dim,
                     .group = a->num_q_heads / a->num_kv_heads,
                     .scale = a->scale,
                     .causal = a->causal,
                     .accumulate = a->accumulate,
                     .first_position = a->first_position,
                     .what = COLUMNS,
                     .s1 = a->s1,
                     .s2 = a->s2,
                     .peak = a->peak,
                     .out_stride = a->out_stride,
                     .parts = a->entropy ? a->workspace : NULL,
                     .num_blocks = rf_div_up(a->source.num_keys, KEYS),
                     .entropy_keys = a->entropy_keys};
    run_sweep(stream, &s, a->num_kv_heads);
    for (int h = 0; h < a->num_q_heads && a->entropy; h++) {
        double sum = a->accumulate ? (double)a->entropy[h] : 0.0;
        for (int64_t b = 0; b < s.num_blocks; b++) sum += (double)s.parts[h * s.num_blocks + b];
        a->entropy[h] = (float)sum;
    }
    return RF_OK;
}

size_t rf_kv_loss_workspace_cpu(rf_backend *backend, const rf_kv_loss_args *a) {
    return 0;
}

rf_status rf_kv_loss_cpu(rf_stream *stream, const rf_kv_loss_args *a, rf_error *err) {
    RF_TRY(rf_kv_loss_check(a, err));
    RF_TRY(rf_check_f32("kv_loss: dtype", a->dtype, err));
    if (!stream || a->source.num_keys == 0) return RF_OK;
    const void *const k = a->source.k;
    const bool reads = a->num_queries > 0;
    const void *const needed[] = {k,
                                  a->source.v,
                                  a->out,
                                  reads ? a->q : k,
                                  reads ? (const void *)a->lse : k,
                                  reads && a->loss != RF_KV_LOSS_VALUE ? a->o : k};
    RF_TRY(rf_text_pointers("kv_loss", needed, 6, err));
    rf_stream_note_launch(stream, "kv_loss");
    const sweep s = {.source = &a->source,
                     .q = a->q,
                     .o = a->o,
                     .lse = a->lse,
                     .weights = a->weights,
                     .q_row_stride = a->q_row_stride,
                     .o_row_stride = a->o_row_stride,
                     .lse_stride = a->lse_stride,
                     .num_queries = a->num_queries,
                     .dim = a->head_dim,
                     .group = a->num_q_heads / a->num_kv_heads,
                     .scale = a->scale,
                     .causal = a->causal,
                     .accumulate = a->accumulate,
                     .first_position = a->first_position,
                     .what = (int)a->loss,
                     .s1 = a->out,
                     .out_stride = a->out_stride,
                     .num_blocks = rf_div_up(a->source.num_keys, KEYS)};
    run_sweep(stream, &s, a->num_kv_heads);
    return RF_OK;
}

/* --- norms and directions ------------------------------------------------------------------------------------------------ */

/* Columns first .. first + num - 1 (num <= 16) of the sum over keys of k inv. */
RF_HOT static void add_directions(float *anchor, const rf_kv_source *s, int64_t head, int64_t first, int num,
                                  const float *inv) {
    double sum[16] = {0};
    const int64_t len = num_keys_of(s, head);
    for (int64_t j = 0; j < len; j++) {
        const float *k = (const float *)s->k + key_offset(s, head, j) + first;
        if (num == 16)
            for (int c = 0; c < 16; c++) sum[c] += (double)(k[c] * inv[j]);
        else
            for (int c = 0; c < num; c++) sum[c] += (double)(k[c] * inv[j]);
    }
    for (int c = 0; c < num; c++) anchor[c] = (float)sum[c];
}

rf_status rf_kv_norms_cpu(rf_stream *stream, const rf_kv_norms_args *a, rf_error *err) {
    RF_TRY(rf_kv_norms_check(a, err));
    RF_TRY(rf_check_f32("kv_norms: dtype", a->dtype, err));
    const void *const any = a->key_norm     ? (const void *)a->key_norm
                            : a->value_norm ? (const void *)a->value_norm
                                            : a->key_cosine;
    if (!stream || a->source.num_keys == 0 || !any) return RF_OK;
    const void *const needed[] = {a->key_norm || a->key_cosine ? a->source.k : any, a->value_norm ? a->source.v : any,
                                  a->key_cosine ? a->anchor : any};
    RF_TRY(rf_text_pointers("kv_norms", needed, 3, err));
    rf_stream_note_launch(stream, "kv_norms");
    const rf_kv_source *s = &a->source;
    const int64_t d = a->head_dim, blocks = rf_div_up(s->num_keys, KEYS), tasks = a->num_kv_heads * blocks;
    const int64_t chunks = rf_div_up(d, 16);
    /* The place of a cosine holds 1 / |k| until the anchor is there. */
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_kv_heads * s->num_keys * d > RF_SERIAL_WORK)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t h = task / blocks, first = task % blocks * KEYS, len = num_keys_of(s, h);
        for (int64_t j = first; j < rf_min64(first + KEYS, s->num_keys); j++) {
            const int64_t at = h * a->out_stride + j, from = j < len ? key_offset(s, h, j) : 0;
            const float *k = (const float *)s->k + from, *v = (const float *)s->v + from;
            if (a->key_norm || a->key_cosine) {
                const float norm = j < len ? sqrtf(dot(k, k, d)) : 0.0f;
                if (a->key_norm) a->key_norm[at] = norm;
                if (a->key_cosine) a->key_cosine[at] = norm == 0.0f ? 0.0f : 1.0f / norm;
            }
            if (a->value_norm) a->value_norm[at] = j < len ? sqrtf(dot(v, v, d)) : 0.0f;
        }
    }
    if (!a->key_cosine) return RF_OK;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_kv_heads * s->num_keys * d > RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->num_kv_heads * chunks; task++) {
        const int64_t h = task / chunks, c = task % chunks * 16;
        add_directions(a->anchor + h * d + c, s, h, c, (int)rf_min64(16, d - c), a->key_cosine + h * a->out_stride);
    }
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_kv_heads * s->num_keys * d > RF_SERIAL_WORK)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t h = task / blocks, first = task % blocks * KEYS, len = num_keys_of(s, h);
        const float *anchor = a->anchor + h * d, size = sqrtf(dot(anchor, anchor, d));
        for (int64_t j = first; j < rf_min64(first + KEYS, len); j++) {
            float *out = a->key_cosine + h * a->out_stride + j;
            const float *k = (const float *)s->k + key_offset(s, h, j);
            *out = size == 0.0f ? 0.0f : dot(k, anchor, d) * *out / size;
        }
    }
    return RF_OK;
}

/* --- rows that move ------------------------------------------------------------------------------------------------------ */

/* y = x, of which element c turns with c + pairs by sign * the table's angles. */
RF_HOT static void turn_row(float *y, const float *x, int64_t dim, int64_t pairs, const float *table, float sign) {
    for (int64_t c = 0; c < pairs; c++) {
        const float cosine = table[2 * c], sine = sign * table[2 * c + 1], a = x[c], b = x[c + pairs];
        y[c] = a * cosine - b * sine;
        y[c + pairs] = b * cosine + a * sine;
    }
    for (int64_t c = 2 * pairs; c < dim; c++) y[c] = x[c];
}

rf_status rf_kv_copy_cpu(rf_stream *stream, const rf_kv_copy_args *a, rf_error *err) {
    RF_TRY(rf_kv_copy_check(a, err));
    RF_TRY(rf_check_f32("kv_copy: dtype", a->dtype, err));
    if (!stream || a->num == 0) return RF_OK;
    const void *const needed[] = {a->source.k, a->source.v, a->k_out, a->v_out, a->turn ? a->table : a->k_out};
    RF_TRY(rf_text_pointers("kv_copy", needed, 5, err));
    rf_stream_note_launch(stream, "kv_copy");
    const int64_t d = a->head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_kv_heads * a->num * d > RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->num_kv_heads * a->num; task++) {
        const int64_t h = task / a->num, i = task % a->num, at = h * a->list_stride + i;
        if (a->counts && i >= a->counts[h]) continue;
        const int64_t to = a->to ? a->to[at] : i;
        if (to < 0) continue;
        const int64_t from = key_offset(&a->source, h, a->from ? a->from[at] : i);
        const int64_t out = a->to ? to * a->out_row_stride : h * a->out_head_stride + to * d;
        const float *k = (const float *)a->source.k + from;
        if (a->turn) {
            const int64_t turn = a->turn[at], position = turn < 0 ? -turn : turn;
            turn_row((float *)a->k_out + out, k, d, a->pairs, a->table + position * a->pairs * 2,
                     turn < 0 ? -1.0f : 1.0f);
        } else
            memcpy((float *)a->k_out + out, k, (size_t)d * sizeof(float));
        memcpy((float *)a->v_out + out, (const float *)a->source.v + from, (size_t)d * sizeof(float));
    }
    return RF_OK;
}

rf_status rf_kv_append_cpu(rf_stream *stream, const rf_kv_append_args *a, rf_error *err) {
    RF_TRY(rf_kv_append_check(a, err));
    RF_TRY(rf_check_f32("kv_append: dtype", a->dtype, err));
    if (!stream || a->heads == 0) return RF_OK;
    RF_TRY(rf_kv_append_pointers(a, err));
    rf_stream_note_launch(stream, "kv_append");
    const int64_t d = a->head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (a->heads * d > RF_SERIAL_WORK)
    for (int64_t h = 0; h < a->heads; h++) {
        const int32_t row = a->new_rows[h];
        if (row < 0) continue;
        if (a->k) {
            memcpy((float *)a->k_pool + row * d, (const float *)a->k + h * d, (size_t)d * sizeof(float));
            memcpy((float *)a->v_pool + row * d, (const float *)a->v + h * d, (size_t)d * sizeof(float));
        }
        if (!a->lens) continue;
        a->rows[h * a->rows_stride + a->lens[h]] = row;
        a->lens[h]++;
    }
    return RF_OK;
}

/* --- a decode step's victim ---------------------------------------------------------------------------------------------- */

static size_t mass_bytes(const rf_kv_evict_args *a) {
    if (a->mode == RF_KV_EVICT_AGE) return 0;
    return (size_t)a->sequences * (size_t)a->num_kv_heads * (size_t)a->max_len * sizeof(float);
}

size_t rf_kv_evict_workspace_cpu(rf_backend *backend, const rf_kv_evict_args *a) {
    return rf_kv_evict_check(a, NULL) == RF_OK ? mass_bytes(a) : 0;
}

static int64_t unit_len(const rf_kv_evict_args *a, int64_t unit) {
    return rf_min64(rf_max64(a->lens[unit], 0), a->max_len);
}

/* mass[j] = sum over the group's heads of p of key rows[j]. */
RF_HOT static void measure_slots(float *mass, const float *k, const int32_t *rows, int64_t num, const float *q,
                                 const float *lse, int64_t group, int64_t dim, float scale) {
    for (int64_t j = 0; j < num; j++) {
        const float *key = k + rows[j] * dim;
        float sum = 0.0f;
        for (int64_t g = 0; g < group; g++)
            if (lse[g] != -INFINITY) sum += rf_exp(scale * dot_body(q + g * dim, key, dim) - lse[g]);
        mass[j] = sum;
    }
}

static void measure_all(rf_stream *stream, const rf_kv_evict_args *a, float *mass) {
    const int64_t units = a->sequences * a->num_kv_heads, blocks = rf_div_up(a->max_len, KEYS), d = a->head_dim;
    const int64_t group = a->num_q_heads / a->num_kv_heads;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (units * a->max_len * group * d > 16 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < units * blocks; task++) {
        const int64_t unit = task / blocks, first = task % blocks * KEYS, end = rf_min64(first + KEYS, a->max_len);
        const int64_t num = rf_max64(0, rf_min64(end, unit_len(a, unit)) - first);
        float *out = mass + unit * a->max_len + first;
        measure_slots(out, a->k, a->rows + unit * a->rows_stride + first, num, (const float *)a->q + unit * group * d,
                      a->lse + unit * group, group, d, a->scale);
        memset(out + num, 0, (size_t)(end - first - num) * sizeof *out);
    }
}

static void update_scores(const rf_kv_evict_args *a, int64_t unit, const float *mass, int64_t len) {
    const int64_t h = a->num_kv_heads, first = a->over_heads ? unit / h * h : unit, num = a->over_heads ? h : 1;
    const float heads = (float)(a->over_heads ? a->num_q_heads : a->num_q_heads / a->num_kv_heads);
    float *score = a->score + unit * a->rows_stride;
    for (int64_t j = 0; j < len; j++) {
        float p = 0.0f;
        for (int64_t u = first; u < first + num; u++) p += mass[u * a->max_len + j];
        p /= heads;
        score[j] = a->mode == RF_KV_EVICT_SUM && j < len - 1 ? a->decay * score[j] + p : p;
    }
}

static void evict_unit(const rf_kv_evict_args *a, int64_t unit, int64_t len) {
    int32_t *rows = a->rows + unit * a->rows_stride;
    float *score = a->score ? a->score + unit * a->rows_stride : NULL;
    int64_t victim = -1;
    for (int64_t j = a->sinks; j < len - a->recents; j++) {
        if (victim < 0 || rf_float_key(score[j]) <= rf_float_key(score[victim])) victim = j;
        if (a->mode == RF_KV_EVICT_AGE) break;
    }
    if (victim < 0) return;
    const size_t behind = (size_t)(len - 1 - victim);
    a->spare[unit] = rows[victim];
    memmove(rows + victim, rows + victim + 1, behind * sizeof *rows);
    if (score) memmove(score + victim, score + victim + 1, behind * sizeof *score);
    if (a->positions) {
        int32_t *positions = a->positions + unit * a->rows_stride + victim;
        memmove(positions, positions + 1, behind * sizeof *positions);
    }
    a->lens[unit] = (int32_t)len - 1;
}

rf_status rf_kv_evict_cpu(rf_stream *stream, const rf_kv_evict_args *a, rf_error *err) {
    RF_TRY(rf_kv_evict_check(a, err));
    RF_TRY(rf_check_f32("kv_evict: dtype", a->dtype, err));
    if (!stream || a->sequences == 0 || a->max_len == 0) return RF_OK;
    const bool measured = a->mode != RF_KV_EVICT_AGE;
    const void *const any = a->rows;
    const void *const needed[] = {any,
                                  a->lens,
                                  a->spare,
                                  a->budget,
                                  measured ? a->k : any,
                                  measured ? a->q : any,
                                  measured ? (const void *)a->lse : any,
                                  measured ? (const void *)a->score : any};
    RF_TRY(rf_text_pointers("kv_evict", needed, 8, err));
    RF_TRY(rf_check_workspace("kv_evict", a->workspace, a->workspace_bytes, mass_bytes(a), err));
    rf_stream_note_launch(stream, "kv_evict");
    if (measured) measure_all(stream, a, a->workspace);
    const int64_t units = a->sequences * a->num_kv_heads;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (units * a->max_len > RF_SERIAL_WORK)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t len = unit_len(a, unit);
        if (measured) update_scores(a, unit, a->workspace, len);
        if (len > a->budget[unit]) evict_unit(a, unit, len);
    }
    return RF_OK;
}
