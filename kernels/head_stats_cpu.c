/* kernels/head_stats_cpu.c
 * Maths    statistics of softmax(x w^T) by rows (text.h) over tiles of the vocabulary, merged by (m, Z, S): m the maximum,
 *          Z the sum of e^(z - m), S the sum of e^(z - m) (z - m); entropy = ln Z - S / Z.
 * Tasks    64 rows by 1024 ids each: a BLAS product into the thread's tile, then one partial a row. Partials are merged in
 *          the order of the ids, so results do not depend on the number of threads.
 * Refs     z[ref] is that of the tile it lies in: a dot product of its own would round differently, and a reference that is
 *          the best would have ids above it. A rank wants it before any tile is counted: those tiles are made twice. */
#include "core/rng.h"
#include "kernels/cpu.h"
#include "kernels/text_checks.h"

enum { ROWS = 64, IDS = 1024 };

typedef struct {
    float max, second, best_noisy, noisy_logit, ref_logit;
    int32_t best, noisy;
    int64_t above_ref;
    double z, s;
} partial;

static int64_t num_chunks(const rf_head_stats_args *a) {
    return rf_div_up(a->vocab, IDS);
}

size_t rf_head_stats_workspace_cpu(rf_backend *backend, const rf_head_stats_args *a) {
    if (rf_head_stats_check(a, NULL) != RF_OK || a->rows == 0) return 0;
    const int num = rf_backend_num_threads(backend);
    const size_t threads = (size_t)(num < 1 ? 1 : num);
    return threads * ROWS * IDS * sizeof(float) + (size_t)a->rows * sizeof(float) +
           (size_t)rf_div_up(a->rows, ROWS) * ROWS * (size_t)num_chunks(a) * sizeof(partial);
}

static float round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) < 0x7f800000u) bits += 0x7fffu + (bits >> 16 & 1u);
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static bool ref_is_in(const rf_head_stats_args *a, int64_t row, int64_t first, int64_t num) {
    return a->refs && a->refs[row] >= first && a->refs[row] < first + num;
}

/* Scale, rounding, bans: what every statistic is taken of. */
static void finish_logits(const rf_head_stats_args *a, float *z, int64_t first, int64_t num) {
    for (int64_t v = 0; v < num; v++) {
        z[v] *= a->scale;
        if (a->round_logits) z[v] = round_bf16(z[v]);
        if (isnan(z[v])) z[v] = -INFINITY;
    }
    for (int i = 0; i < a->num_bans; i++)
        if (a->bans[i] >= first && a->bans[i] < first + num) z[a->bans[i] - first] = -INFINITY;
}

RF_HOT static float largest(const float *z, int64_t num) {
    float max = -INFINITY;
    for (int64_t v = 0; v < num; v++) max = z[v] > max ? z[v] : max;
    return max;
}

RF_HOT static void sums(const float *z, int64_t num, float max, float *out_z, float *out_s) {
    float sum = 0.0f, weighted = 0.0f;
    for (int64_t v = 0; v < num; v++) {
        const float d = z[v] - max, e = rf_exp(d);
        sum += e;
        weighted += e * (d < -87.3f ? 0.0f : d);
    }
    *out_z = sum;
    *out_s = weighted;
}

static float gumbel(uint32_t word) {
    const float t = ((float)(word < ~word ? word : ~word) + 0.5f) * 0x1p-32f;
    return -logf(word >> 31 ? -log1pf(-t) : -logf(t));
}

/* argmax of z - T ln(-ln u) over ids first.. of row r. */
static void noisy_best(const rf_head_stats_args *a, const float *z, int64_t first, int64_t num, int64_t r, partial *p) {
    const uint32_t key[2] = {(uint32_t)a->seed, (uint32_t)(a->seed >> 32)};
    uint32_t counter[4] = {0, (uint32_t)(a->keys ? a->keys[r] : (int32_t)r), (uint32_t)(a->step ? *a->step : 0), 0};
    uint32_t word[4] = {0};
    p->best_noisy = -INFINITY;
    p->noisy = -1;
    for (int64_t v = 0; v < num; v++) {
        const uint32_t id = (uint32_t)(first + v);
        if (v == 0 || id % 4 == 0) {
            counter[0] = id / 4;
            rf_philox4x32(counter, key, word);
        }
        const float noisy = z[v] + a->temperature * gumbel(word[id % 4]);
        if (noisy > p->best_noisy) {
            p->best_noisy = noisy;
            p->noisy = (int32_t)id;
            p->noisy_logit = z[v];
        }
    }
}

/* z: finished logits; count_above: those above it count for the rank. */
static void row_partial(const rf_head_stats_args *a, float *z, int64_t first, int64_t num, int64_t r, float count_above,
                        partial *p) {
    *p = (partial){.max = largest(z, num),
                   .second = -INFINITY,
                   .best = (int32_t)first,
                   .best_noisy = -INFINITY,
                   .noisy = -1,
                   .noisy_logit = -INFINITY,
                   .ref_logit = ref_is_in(a, r, first, num) ? z[a->refs[r] - first] : -INFINITY};
    if (p->max > -INFINITY) {
        int64_t best = 0;
        while (z[best] != p->max) best++;
        p->best = (int32_t)(first + best);
        const float kept = z[best];
        z[best] = -INFINITY;
        p->second = largest(z, num);
        z[best] = kept;
        float sum, weighted;
        sums(z, num, p->max, &sum, &weighted);
        p->z = sum;
        p->s = weighted;
    }
    if (a->temperature > 0.0f) noisy_best(a, z, first, num, r, p);
    if (a->refs && a->rank_of_ref)
        for (int64_t v = 0; v < num; v++) p->above_ref += z[v] > count_above;
}

static void merge(partial *a, const partial *b) {
    const float max = a->max > b->max ? a->max : b->max;
    if (max > -INFINITY) {
        const double fa = a->max > -INFINITY ? exp((double)a->max - max) : 0.0;
        const double fb = b->max > -INFINITY ? exp((double)b->max - max) : 0.0;
        const double sa = a->max > -INFINITY ? a->s + a->z * ((double)a->max - max) : 0.0;
        const double sb = b->max > -INFINITY ? b->s + b->z * ((double)b->max - max) : 0.0;
        a->z = a->z * fa + b->z * fb;
        a->s = sa * fa + sb * fb;
    }
    if (b->max > a->max) {
        a->second = a->max > b->second ? a->max : b->second;
        a->best = b->best;
    } else
        a->second = b->max > a->second ? b->max : a->second;
    a->max = max;
    if (b->best_noisy > a->best_noisy) {
        a->best_noisy = b->best_noisy;
        a->noisy = b->noisy;
        a->noisy_logit = b->noisy_logit;
    }
    if (b->ref_logit > a->ref_logit) a->ref_logit = b->ref_logit;
    a->above_ref += b->above_ref;
}

static void finish(const rf_head_stats_args *a, const partial *p, rf_token_stats *out) {
    const double lse = (double)p->max + log(p->z), best = 1.0 / p->z;
    const bool sampled = a->temperature > 0.0f && p->noisy >= 0;
    *out = (rf_token_stats){.id = sampled ? p->noisy : p->best, .best = p->best};
    if (!(p->max > -INFINITY)) { /* everything is banned */
        out->lse = -INFINITY;
        return;
    }
    out->best_prob = (float)best;
    out->prob = sampled ? (float)(best * exp((double)p->noisy_logit - p->max)) : (float)best;
    out->margin = (float)(best * (p->second > -INFINITY ? 1.0 - exp((double)p->second - p->max) : 1.0));
    out->entropy = (float)fmax(0.0, log(p->z) - p->s / p->z);
    out->lse = (float)lse;
    if (a->refs) out->ref_prob = p->ref_logit > -INFINITY ? (float)(best * exp((double)p->ref_logit - p->max)) : 0.0f;
    if (a->refs && a->rank_of_ref) out->margin = (float)p->above_ref;
}

/* Task `task` of blocks x chunks: its rows and ids. */
typedef struct {
    int64_t row, rows, first, ids;
} tile_at;

static tile_at tile_of(const rf_head_stats_args *a, int64_t task) {
    const int64_t row = task / num_chunks(a) * ROWS, first = task % num_chunks(a) * IDS;
    return (tile_at){row, rf_min64(ROWS, a->rows - row), first, rf_min64(IDS, a->vocab - first)};
}

/* tile [rows][ids] = finished logits. */
static void make_tile(const rf_head_stats_args *a, tile_at t, float *tile) {
    rf_cpu_sgemm(t.rows, t.ids, a->cols, 1.0f, (const float *)a->x + t.row * a->cols, a->cols,
                 (const float *)a->w + t.first * a->cols, a->cols, true, 0.0f, tile, t.ids);
    for (int64_t i = 0; i < t.rows; i++) finish_logits(a, tile + i * t.ids, t.first, t.ids);
}

rf_status rf_head_stats_cpu(rf_stream *stream, const rf_head_stats_args *a, rf_error *err) {
    RF_TRY(rf_head_stats_check(a, err));
    RF_TRY(rf_check_f32("head_stats: dtype", a->dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    const void *bans = a->num_bans > 0 ? (const void *)a->bans : a->x;
    RF_TRY(rf_text_pointers("head_stats", (const void *const[]){a->x, a->w, a->out, bans}, 4, err));
    const size_t need = rf_head_stats_workspace_cpu(rf_stream_backend(stream), a);
    RF_TRY(rf_check_workspace("head_stats", a->workspace, a->workspace_bytes, need, err));
    rf_stream_note_launch(stream, "head_stats");
    const int num = rf_cpu_threads(stream);
    const int64_t chunks = num_chunks(a), blocks = rf_div_up(a->rows, ROWS);
    partial *partials = (partial *)a->workspace; /* [block][chunk][ROWS] */
    float *tiles = (float *)(partials + blocks * ROWS * chunks), *refs = tiles + (int64_t)num * ROWS * IDS;
    for (int64_t r = 0; r < a->rows; r++) refs[r] = -INFINITY;
    rf_cpu_blas_single_thread();
    if (a->refs && a->rank_of_ref) {
#pragma omp parallel for num_threads(num) schedule(dynamic)
        for (int64_t task = 0; task < blocks * chunks; task++) {
            const tile_at t = tile_of(a, task);
            float *tile = tiles + (int64_t)rf_cpu_thread_idx() * ROWS * IDS;
            bool made = false;
            for (int64_t i = 0; i < t.rows; i++) {
                if (!ref_is_in(a, t.row + i, t.first, t.ids)) continue;
                if (!made) make_tile(a, t, tile);
                made = true;
                refs[t.row + i] = tile[i * t.ids + a->refs[t.row + i] - t.first];
            }
        }
    }
#pragma omp parallel for num_threads(num) schedule(static)
    for (int64_t task = 0; task < blocks * chunks; task++) {
        const tile_at t = tile_of(a, task);
        float *tile = tiles + (int64_t)rf_cpu_thread_idx() * ROWS * IDS;
        make_tile(a, t, tile);
        for (int64_t i = 0; i < t.rows; i++)
            row_partial(a, tile + i * t.ids, t.first, t.ids, t.row + i, refs[t.row + i], &partials[task * ROWS + i]);
    }
    for (int64_t r = 0; r < a->rows; r++) {
        partial *first = &partials[r / ROWS * chunks * ROWS + r % ROWS];
        for (int64_t chunk = 1; chunk < chunks; chunk++) merge(first, first + chunk * ROWS);
        finish(a, first, &a->out[r]);
    }
    return RF_OK;
}
