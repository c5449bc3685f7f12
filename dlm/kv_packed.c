/* dlm/kv_packed.c - keys and values in few bits (action=demote), and directions that two layers share (action=share).
 *
 * The book's slots are the raw tokens of a head; beside them lie stores HIGH and LOW of kernels/kvq.h, which get rows from the staging
 * planes behind a prompt and from the pool while decoding. A step attends to the raw slots, then to each store, and joins the
 * results: the joined log-sum is the one that measurements see. Which token goes where is caching/kv/demote.h's.
 * A store's tokens stand in order of arrival. Under a budget those of LOW may go: a new one takes the place.
 * share: the earlier layer's planes are copied aside until the later one's prompt is in; then both get their slots. */
#include <math.h>
#include <string.h>

#include "caching/kv/demote.h"
#include "core/arena.h"
#include "core/memory.h"
#include "dlm/kv_internal.h"

enum { HIGH = 0, LOW, NUM_STORES, MAX_HEADS = 64 };
enum { BALANCE_ROWS = 128 };     /* queries whose channels balance keys */
static const float SLERP = 0.6f; /* MiniCache's t: the later layer's part */

struct rf_kv_packed {
    bool shares, by_ranks, factors_k, factors_v;
    int64_t room[NUM_STORES];
    rf_kvq_store store[NUM_STORES]; /* at unit 0; share: HIGH, codes of pairs, scales of layers from L / 2 on */
    char *memory;
    size_t memory_bytes, store_bytes;
    char *out;
    float *lse, *logits; /* [B][Hq], [U][group][room] */
    float *angles;       /* share: [2][Hkv][list_stride] */
    char *plane_k, *plane_v;
    void *workspace;
    size_t workspace_bytes;
    float *k_factor, *v_factor; /* [L][U][D] */
    int32_t *lens;              /* [2][L][U] */
    int32_t *host_lens;         /* page-locked */
    /* host */
    float *score;           /* [L][U][stride] of raw slots, or NULL */
    int32_t *low_positions; /* [L][U][room], from the first budget on */
    float *low_scores;
    double *preference;  /* [B][L] */
    int32_t *since;      /* [B][L] */
    float *host_logits;  /* [Hq][room] */
    float *host_lse;     /* [Hq] */
    float *q_most;       /* [Hkv][D] of the layer's prompt */
    float *scores;       /* [Hkv][tokens] */
    float *rows, *work;  /* a plane's; [2 Hq max(tokens, ..)] */
    int32_t *lists;      /* [3][Hkv][tokens] */
    int32_t *at;         /* [tokens] */
    uint8_t *now, *next; /* [tokens] */
    int64_t tokens;
};

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "out of memory for packed keys and values");
}

static int64_t all_units(const rf_kv_session *s) {
    return (int64_t)s->num_layers * s->units;
}

/* Under a budget tokens of LOW may go: it is known which they are, and what they received. */
static bool tracks_low(const rf_kv_session *s, int sequence) {
    return s->packed->by_ranks && s->sequences[sequence].budget > 0;
}

static int32_t *lens_of(const rf_kv_session *s, int which, int64_t unit) {
    return s->packed->host_lens + which * all_units(s) + unit;
}

/* --- memory ---------------------------------------------------------------------------------------------------------------- */

static int num_pairs(const rf_kv_session *s) {
    return (s->num_layers - s->num_layers / 2) / 2;
}

static void plan_stores(rf_kv_session *s) {
    struct rf_kv_packed *x = s->packed;
    const rf_kv_rule *r = &s->rule;
    int group = r->group_size < s->head_dim ? r->group_size : s->head_dim;
    rf_kv_demote_room room = {0, s->options.max_prompt, 0};
    if (!x->shares) room = rf_kv_demote_rooms(r, &s->shape, s->options.budget);
    x->room[HIGH] = room.high;
    x->room[LOW] = room.low;
    for (int i = 0; i < NUM_STORES; i++) {
        rf_kvq_store *t = &x->store[i];
        *t = (rf_kvq_store){.format = x->shares ? RF_KVQ_DIRECTION
                                      : r->fp8  ? RF_KVQ_FP8
                                                : RF_KVQ_INT,
                            .bits = i == HIGH ? r->bits : r->low_bits,
                            .group = group,
                            .keys_by_channel = !x->by_ranks && !x->shares,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype};
        if (x->room[i] == 0) continue;
        t->codes_stride = (int64_t)rf_kvq_codes_bytes(t, x->room[i]);
        t->scales_stride = (int64_t)rf_kvq_scales_bytes(t, x->room[i]);
    }
}

static rf_kvq_attention_args attention_args(const rf_kv_session *s, int which, int64_t num, int64_t most) {
    const struct rf_kv_packed *x = s->packed;
    return (rf_kvq_attention_args){.store = x->store[which],
                                   .units = num * s->num_kv_heads,
                                   .most = most,
                                   .group_heads = s->group,
                                   .scale = (float)(1.0 / sqrt((double)s->head_dim)),
                                   .workspace = x->workspace,
                                   .workspace_bytes = x->workspace_bytes};
}

static void plan_workspace(rf_kv_session *s) {
    struct rf_kv_packed *x = s->packed;
    for (int i = 0; i < NUM_STORES; i++) {
        for (int num = 1; x->room[i] > 0 && num <= s->batch; num++) {
            for (int64_t most = 1;; most *= 2) {
                rf_kvq_attention_args a = attention_args(s, i, num, most < x->room[i] ? most : x->room[i]);
                size_t bytes = s->ops->kvq_attention_workspace(s->backend, &a);
                if (bytes > x->workspace_bytes) x->workspace_bytes = bytes;
                if (most >= x->room[i]) break;
            }
        }
    }
}

static rf_status take_buffers(rf_kv_session *s, rf_arena *arena, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    size_t units = (size_t)all_units(s), elem = rf_kv_elem(s), dim = (size_t)s->head_dim;
    size_t batch = (size_t)s->batch, q_heads = (size_t)s->num_q_heads, listed = (size_t)s->list_stride;
    size_t codes = x->shares ? (size_t)num_pairs(s) * (size_t)s->units : units;
    size_t scales = x->shares ? 2 * codes : units, shares = x->shares;
    size_t plane = shares * (size_t)s->stage->cache_rows * (size_t)s->stage->kv_cols;
    for (int i = 0; i < NUM_STORES; i++) {
        rf_kvq_store *t = &x->store[i];
        void **slots[] = {&t->k_codes, &t->v_codes, &t->k_scales, &t->v_scales};
        for (int j = 0; j < 4; j++)
            RF_TRY(rf_arena_take(arena, slots[j], "packed keys and values", j < 2 ? codes : scales,
                                 (size_t)(j < 2 ? t->codes_stride : t->scales_stride), err));
    }
    x->store_bytes = arena->used;
    struct {
        void *slot;
        const char *name;
        size_t count, bytes;
    } list[] = {
        {&x->out, "outputs of packed tokens", batch * q_heads * dim, elem},
        {&x->lse, "log-sums of packed tokens", batch * q_heads, sizeof(float)},
        {&x->logits, "logits of packed tokens", x->by_ranks ? batch * q_heads * (size_t)x->room[LOW] : 0,
         sizeof(float)},
        {&x->angles, "angles", shares * 2 * (size_t)s->num_kv_heads * listed, sizeof(float)},
        {&x->plane_k, "keys of the earlier layer", plane, elem},
        {&x->plane_v, "values of the earlier layer", plane, elem},
        {&x->workspace, "workspace of packed attention", x->workspace_bytes, 1},
        {&x->k_factor, "factors of keys", x->factors_k ? units * dim : 0, sizeof(float)},
        {&x->v_factor, "factors of values", x->factors_v ? units * dim : 0, sizeof(float)},
        {&x->lens, "lengths of packed lists", NUM_STORES * units, sizeof(int32_t)},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        void *p = NULL;
        if (list[i].count > 0) RF_TRY(rf_arena_take(arena, &p, list[i].name, list[i].count, list[i].bytes, err));
        memcpy(list[i].slot, &p, sizeof p);
    }
    for (int i = 0; i < NUM_STORES; i++) {
        x->store[i].k_factor = x->k_factor;
        x->store[i].v_factor = x->v_factor;
    }
    return RF_OK;
}

static rf_status allocate_host(rf_kv_session *s, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    size_t units = (size_t)all_units(s), heads = (size_t)s->num_kv_heads, tokens = (size_t)x->tokens;
    size_t layers = (size_t)s->batch * (size_t)s->num_layers, low = x->by_ranks ? (size_t)x->room[LOW] : 0;
    size_t q_heads = (size_t)s->num_q_heads, prompt = (size_t)s->options.max_prompt;
    bool scored = s->rule.score == RF_KV_SCORE_ATTENTION;
    RF_TRY(rf_backend_alloc_pinned(s->backend, (void **)&x->host_lens, NUM_STORES * units * sizeof(int32_t), err));
    memset(x->host_lens, 0, NUM_STORES * units * sizeof(int32_t));
    struct {
        void *slot;
        size_t count, bytes;
    } list[] = {
        {&x->score, scored ? units * (size_t)s->stride : 0, sizeof(float)},
        {&x->preference, layers, sizeof(double)},
        {&x->since, layers, sizeof(int32_t)},
        {&x->host_logits, q_heads * low, sizeof(float)},
        {&x->host_lse, q_heads, sizeof(float)},
        {&x->q_most, heads * (size_t)s->head_dim, sizeof(float)},
        {&x->scores, scored ? heads * tokens : 0, sizeof(float)},
        {&x->rows, x->factors_k || x->factors_v ? prompt * (size_t)s->stage->kv_cols : 0, sizeof(float)},
        {&x->work, (2 * q_heads + 4) * tokens, sizeof(float)},
        {&x->lists, 3 * heads * tokens, sizeof(int32_t)},
        {&x->at, tokens, sizeof(int32_t)},
        {&x->now, tokens, 1},
        {&x->next, tokens, 1},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (list[i].count == 0) continue;
        void *p = rf_alloc_zero(list[i].count, list[i].bytes);
        if (p == NULL) return no_memory(err);
        memcpy(list[i].slot, &p, sizeof p);
    }
    return RF_OK;
}

rf_status rf_kv_packed_create(rf_kv_session *s, rf_error *err) {
    struct rf_kv_packed *x = s->packed = rf_alloc_zero(1, sizeof *x);
    if (x == NULL) return no_memory(err);
    const rf_kv_rule *r = &s->rule;
    x->shares = r->action == RF_KV_SHARE;
    x->by_ranks = !x->shares && !rf_kv_demotes_blocks(r);
    x->factors_k = x->by_ranks && !r->fp8;
    x->factors_v = !x->shares && !x->by_ranks && r->score == RF_KV_SCORE_ATTENTION;
    x->tokens = (int64_t)s->options.max_prompt + s->options.max_new;
    int group = r->group_size < s->head_dim ? r->group_size : s->head_dim;
    bool by_group = !x->shares && !r->fp8;
    if (s->head_dim % 16 != 0 || s->head_dim > 256 || (by_group && (group % 8 != 0 || s->head_dim % group != 0)))
        return rf_fail(err, RF_ERR_UNSUPPORTED,
                       "kv rule %s: heads of %d columns in groups of %d, expected a multiple of 16 up to 256, and a "
                       "multiple of 8 that divides it",
                       r->method, s->head_dim, group);
    if (s->num_kv_heads > MAX_HEADS)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "kv rule %s: %d key heads, expected at most %d", r->method,
                       s->num_kv_heads, MAX_HEADS);
    plan_stores(s);
    plan_workspace(s);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    RF_TRY(take_buffers(s, &arena, err));
    if (arena.overflow) return rf_fail(err, RF_ERR_ARGUMENT, "these prompts do not fit any address space");
    RF_TRY(rf_backend_alloc(s->backend, (void **)&x->memory, arena.peak, err));
    x->memory_bytes = arena.peak;
    rf_arena_init(&arena, x->memory, x->memory_bytes);
    RF_TRY(take_buffers(s, &arena, err));
    RF_TRY(rf_stream_zero(s->stream, x->memory, x->memory_bytes, err));
    RF_TRY(allocate_host(s, err));
    return rf_kv_wait(s, err);
}

void rf_kv_packed_destroy(rf_kv_session *s) {
    struct rf_kv_packed *x = s->packed;
    if (x == NULL) return;
    void *host[] = {x->score,       x->low_positions, x->low_scores, x->preference, x->since,
                    x->host_logits, x->host_lse,      x->q_most,     x->scores,     x->rows,
                    x->work,        x->lists,         x->at,         x->now,        x->next};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) rf_free(host[i]);
    rf_backend_free_pinned(s->backend, x->host_lens);
    rf_backend_free(s->backend, x->memory);
    rf_free(x);
    s->packed = NULL;
}

/* --- stores ---------------------------------------------------------------------------------------------------------------- */

/* The store as units of a layer from sequence `first` on see it. */
static rf_kvq_store store_at(const rf_kv_session *s, int which, int layer, int first) {
    const struct rf_kv_packed *x = s->packed;
    rf_kvq_store t = x->store[which];
    int64_t unit = rf_kv_unit_at(s, layer, first), codes = unit, scales = unit;
    if (x->shares) {
        int from = layer - s->num_layers / 2;
        codes = rf_kv_unit_at(s, from / 2, first);
        scales = rf_kv_unit_at(s, from, first);
    }
    t.k_codes = (char *)t.k_codes + codes * t.codes_stride;
    t.v_codes = (char *)t.v_codes + codes * t.codes_stride;
    t.k_scales = (char *)t.k_scales + scales * t.scales_stride;
    t.v_scales = (char *)t.v_scales + scales * t.scales_stride;
    if (t.k_factor) t.k_factor += unit * s->head_dim;
    if (t.v_factor) t.v_factor += unit * s->head_dim;
    return t;
}

static rf_status upload_lens(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    int64_t unit = rf_kv_unit_at(s, layer, sequence);
    for (int i = 0; i < NUM_STORES; i++)
        RF_TRY(rf_stream_upload(s->stream, s->packed->lens + i * all_units(s) + unit, lens_of(s, i, unit),
                                (size_t)s->num_kv_heads * sizeof(int32_t), err));
    s->stage->busy = true;
    return RF_OK;
}

/* from [Hkv][tokens], first and counts [Hkv] to the device, for rf_kvq_*_args. */
typedef struct {
    const int32_t *from, *first, *counts;
    int64_t most;
} lists;

static rf_status upload_lists(rf_kv_session *s, const int32_t *from, const int32_t *first, const int32_t *counts,
                              lists *out, rf_error *err) {
    int64_t heads = s->num_kv_heads, stride = s->list_stride, most = 0;
    int32_t *host = s->host_copy, *ends = host + heads * stride;
    RF_TRY(rf_kv_wait(s, err)); /* lists of before may be on their way */
    for (int h = 0; h < heads; h++) {
        memcpy(host + h * stride, from + h * s->packed->tokens, (size_t)counts[h] * sizeof *host);
        ends[h] = first[h];
        ends[heads + h] = counts[h];
        if (counts[h] > most) most = counts[h];
    }
    *out = (lists){s->copy_lists, s->copy_lists + heads * stride, s->copy_lists + heads * (stride + 1), most};
    return rf_stream_upload(s->stream, s->copy_lists, host, (size_t)(heads * (stride + 2)) * sizeof *host, err);
}

typedef struct {
    const void *k, *v;
    int64_t row_stride, head_stride;
} source;

static source of_stage(const rf_kv_session *s, int layer) {
    return (source){rf_text_keys(s->stage, layer), rf_text_values(s->stage, layer), s->stage->kv_cols, s->head_dim};
}
static source of_pool(const rf_kv_session *s) {
    return (source){s->k_pool, s->v_pool, s->head_dim, 0};
}

static rf_status pack(rf_kv_session *s, int which, int layer, int sequence, const source *rows, const int32_t *from,
                      const int32_t *first, const int32_t *counts, rf_error *err) {
    lists l;
    bool any = false;
    for (int h = 0; h < s->num_kv_heads; h++) {
        any |= counts[h] > 0;
        if (first[h] + counts[h] > s->packed->room[which])
            return rf_fail(err, RF_ERR_STATE, "layer %d packs %d + %d tokens of a head, there is room for %lld", layer,
                           first[h], counts[h], (long long)s->packed->room[which]);
    }
    if (!any) return RF_OK;
    RF_TRY(upload_lists(s, from, first, counts, &l, err));
    rf_kvq_pack_args a = {.store = store_at(s, which, layer, sequence),
                          .k = rows->k,
                          .v = rows->v,
                          .row_stride = rows->row_stride,
                          .head_stride = rows->head_stride,
                          .from = l.from,
                          .first = l.first,
                          .counts = l.counts,
                          .list_stride = s->list_stride,
                          .units = s->num_kv_heads,
                          .most = l.most};
    return s->ops->kvq_pack(s->stream, &a, err);
}

/* --- factors --------------------------------------------------------------------------------------------------------------- */

/* Largest |x| of each channel of x [num][Hkv or Hq][D], joined to out [Hkv][D]; each: heads of a row for one of out. */
static void most_of(const float *x, int64_t num, int heads, int each, int64_t dim, float *out) {
    for (int64_t i = 0; i < num; i++) {
        for (int h = 0; h < heads * each; h++) {
            const float *restrict row = x + (i * heads * each + h) * dim;
            float *restrict to = out + (h / each) * dim;
            for (int64_t c = 0; c < dim; c++) to[c] = fabsf(row[c]) > to[c] ? fabsf(row[c]) : to[c];
        }
    }
}

rf_status rf_kv_packed_rows(rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    if (!x->factors_k) return RF_OK;
    if (begin == 0) memset(x->q_most, 0, (size_t)(s->num_kv_heads * s->head_dim) * sizeof *x->q_most);
    int32_t skipped = num - BALANCE_ROWS > begin ? num - BALANCE_ROWS - begin : 0;
    if (skipped >= rows) return RF_OK;
    int64_t cols = s->stage->q_cols, count = (rows - skipped) * cols;
    float *q = rf_alloc((size_t)count * sizeof *q);
    if (q == NULL) return no_memory(err);
    const char *from = (const char *)s->stage->b.q + (size_t)(skipped * cols) * rf_kv_elem(s);
    rf_status st = rf_kv_read_rows(s, from, count, q, err);
    if (st == RF_OK) most_of(q, rows - skipped, s->num_kv_heads, s->group, s->head_dim, x->q_most);
    rf_free(q);
    return st;
}

static float factor(double most, double other) {
    float f = (float)sqrt(most / other);
    return isfinite(f) && f > 0.0f ? f : 1.0f;
}

/* ZipCache: values by sqrt(max |v|). MiKV: keys by sqrt(max |k| / max |q|), of the prompt's last queries, turned. */
static rf_status make_factors(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    if (!x->factors_k && !x->factors_v) return RF_OK;
    int64_t cols = s->stage->kv_cols, unit = rf_kv_unit_at(s, layer, sequence);
    float *to = (x->factors_k ? x->k_factor : x->v_factor) + unit * s->head_dim;
    const void *plane = x->factors_k ? rf_text_keys(s->stage, layer) : rf_text_values(s->stage, layer);
    RF_TRY(rf_kv_read_rows(s, plane, num * cols, x->rows, err));
    float *out = rf_alloc_zero((size_t)cols, sizeof *out);
    if (out == NULL) return no_memory(err);
    most_of(x->rows, num, s->num_kv_heads, 1, s->head_dim, out);
    for (int64_t c = 0; c < cols; c++) out[c] = factor((double)out[c], x->factors_k ? (double)x->q_most[c] : 1.0);
    rf_status st = rf_stream_upload(s->stream, to, out, (size_t)cols * sizeof *out, err);
    if (st == RF_OK) st = rf_kv_wait(s, err);
    rf_free(out);
    return st;
}

/* --- a prompt -------------------------------------------------------------------------------------------------------------- */

static double share_of(const rf_kv_session *s, int layer, int sequence, int done) {
    const double *p = s->packed->preference + (int64_t)sequence * s->num_layers;
    double most = 0;
    for (int l = 0; l < done; l++)
        if (p[l] > most) most = p[l];
    return most > 0 ? p[layer] / most : 1.0;
}

/* Scores of the prompt's tokens that stay raw, and of those that are packed and may go. */
static void keep_scores(rf_kv_session *s, int sequence, int64_t unit, const float *score, int32_t *const *list,
                        const int32_t *counts) {
    struct rf_kv_packed *x = s->packed;
    for (int32_t i = 0; x->score && i < counts[RF_KV_RAW]; i++)
        x->score[unit * s->stride + i] = score[list[RF_KV_RAW][i]];
    for (int32_t i = 0; tracks_low(s, sequence) && i < counts[RF_KV_LOW]; i++) {
        x->low_positions[unit * x->room[LOW] + i] = list[RF_KV_LOW][i];
        x->low_scores[unit * x->room[LOW] + i] = score[list[RF_KV_LOW][i]];
    }
}

static rf_status demote_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, const rf_kv_stats *stats,
                               rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    const rf_kv_rule *r = &s->rule;
    rf_kv_sequence *q = &s->sequences[sequence];
    int64_t at = (int64_t)sequence * s->num_layers + layer, heads = s->num_kv_heads, tokens = x->tokens;
    int32_t counts[RF_KV_NUM_CLASSES][MAX_HEADS] = {{0}}, zero[MAX_HEADS] = {0};
    bool scored = r->score == RF_KV_SCORE_ATTENTION;
    x->since[at] = 0;
    if (tracks_low(s, sequence) && x->low_scores == NULL) {
        size_t low = (size_t)(all_units(s) * x->room[LOW]);
        if (x->low_positions == NULL) x->low_positions = rf_alloc_zero(low, sizeof *x->low_positions);
        if (x->low_positions) x->low_scores = rf_alloc_zero(low, sizeof *x->low_scores);
        if (x->low_scores == NULL) return no_memory(err);
    }
    x->preference[at] = scored ? rf_kv_demote_preference(r, &s->shape, num, stats) : 1.0;
    if (scored) RF_TRY(rf_kv_demote_scores(r, &s->shape, layer, num, stats, x->scores, x->work, err));
    RF_TRY(make_factors(s, layer, sequence, num, err));
    for (int h = 0; h < heads; h++) {
        int64_t unit = rf_kv_unit_at(s, layer, sequence) + h;
        int32_t *list[RF_KV_NUM_CLASSES] = {NULL};
        const float *score = scored ? x->scores + h * num : NULL;
        for (int c = 0; c < RF_KV_GONE; c++) list[c] = x->lists + (c * heads + h) * tokens;
        float *compared = x->work;
        for (int32_t j = 0; scored && j < num; j++) compared[j] = rf_kv_demote_compared(r, score[j], num, j);
        if (x->by_ranks) {
            memset(x->now, RF_KV_RAW, (size_t)num);
            rf_kv_demote_ranked(r, num, q->budget, share_of(s, layer, sequence, layer + 1), x->now, compared, num,
                                x->next, x->work + tokens);
        } else {
            rf_kv_demote_blocks(r, num, 0, 0, scored ? compared : NULL, num, x->next, x->at);
        }
        for (int32_t j = 0; j < num; j++) {
            int c = x->next[j];
            if (c < RF_KV_GONE) list[c][counts[c][h]] = j;
            counts[c][h]++;
        }
        q->evicted += counts[RF_KV_GONE][h];
        int32_t of_head[RF_KV_NUM_CLASSES];
        for (int c = 0; c < RF_KV_NUM_CLASSES; c++) of_head[c] = counts[c][h];
        if (scored && of_head[RF_KV_RAW] <= s->stride) keep_scores(s, sequence, unit, score, list, of_head);
        *lens_of(s, HIGH, unit) = of_head[RF_KV_HIGH];
        *lens_of(s, LOW, unit) = of_head[RF_KV_LOW];
    }
    source rows = of_stage(s, layer);
    RF_TRY(pack(s, HIGH, layer, sequence, &rows, x->lists + heads * tokens, zero, counts[RF_KV_HIGH], err));
    RF_TRY(pack(s, LOW, layer, sequence, &rows, x->lists + 2 * heads * tokens, zero, counts[RF_KV_LOW], err));
    RF_TRY(rf_kv_book_place(q->book, layer, x->lists, counts[RF_KV_RAW], tokens, err));
    return upload_lens(s, layer, sequence, err);
}

/* --- while decoding, and layers whose part shrinks as later ones are known ------------------------------------------------- */

/* Of one head: LOW's tokens in order of position among the raw ones. Returns how many there are; ids: raw slot i as i, packed token
 * i as -1 - i. */
static int32_t list_tokens(const rf_kv_session *s, int layer, int sequence, int head, int32_t *ids, float *score) {
    struct rf_kv_packed *x = s->packed;
    const rf_kv_head *h = rf_kv_book_head(s->sequences[sequence].book, layer, head);
    int64_t unit = rf_kv_unit_at(s, layer, sequence) + head;
    const float *raw = x->score ? x->score + unit * s->stride : NULL;
    int32_t seen = s->sequences[sequence].seen, num = 0, next = 0,
            low = tracks_low(s, sequence) ? *lens_of(s, LOW, unit) : 0;
    const int32_t *positions = low > 0 ? x->low_positions + unit * x->room[LOW] : NULL;
    for (int32_t i = 0; i < low; i++) x->at[positions[i]] = i + 1;
    for (int32_t p = 0; (low > 0 && p <= seen) || next < h->num; p++) {
        if (next < h->num && (low == 0 || h->position[next] == p)) {
            if (raw) score[num] = rf_kv_demote_compared(&s->rule, raw[next], seen, h->position[next]);
            x->now[num] = RF_KV_RAW;
            ids[num++] = next++;
        } else if (low > 0 && p < x->tokens && x->at[p] > 0) {
            int32_t i = x->at[p] - 1;
            score[num] = rf_kv_demote_compared(&s->rule, x->low_scores[unit * x->room[LOW] + i], seen, p);
            x->now[num] = RF_KV_LOW;
            ids[num++] = -1 - i;
        }
    }
    for (int32_t i = 0; i < low; i++) x->at[positions[i]] = 0;
    return num;
}

static void by_number(int32_t *a, int32_t num) { /* insertion: few */
    for (int32_t i = 1; i < num; i++)
        for (int32_t j = i; j > 0 && a[j] < a[j - 1]; j--) {
            int32_t t = a[j];
            a[j] = a[j - 1];
            a[j - 1] = t;
        }
}

/* One head whose classes are next[num] for ids[num]: rows of the raw tokens that take holes are packed, those that come behind LOW's
 * others are put in lists, counts of them in *appended. */
static rf_status apply_ranked(rf_kv_session *s, int layer, int sequence, int head, const int32_t *ids, int32_t num,
                              int32_t *holes, int32_t *appended, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    rf_kv_sequence *q = &s->sequences[sequence];
    const rf_kv_head *h = rf_kv_book_head(q->book, layer, head);
    int64_t unit = rf_kv_unit_at(s, layer, sequence) + head, base = unit * x->room[LOW];
    int32_t num_holes = 0, filled = 0, *len = lens_of(s, LOW, unit), *list = x->lists + head * x->tokens;
    int32_t first[MAX_HEADS] = {0}, one[MAX_HEADS] = {0};
    source rows = of_pool(s);
    for (int32_t i = 0; i < num; i++) {
        if (x->next[i] != RF_KV_GONE) continue;
        q->evicted++;
        if (ids[i] < 0) holes[num_holes++] = -1 - ids[i];
    }
    by_number(holes, num_holes);
    *appended = 0;
    for (int32_t i = 0; i < num; i++) {
        if (x->next[i] != RF_KV_LOW || ids[i] < 0) continue;
        bool fills = filled < num_holes;
        int32_t to = fills ? holes[filled++] : *len + *appended;
        if (to >= x->room[LOW])
            return rf_fail(err, RF_ERR_STATE, "layer %d packs token %d of a head, there is room for %lld", layer, to,
                           (long long)x->room[LOW]);
        if (tracks_low(s, sequence)) {
            x->low_positions[base + to] = h->position[ids[i]];
            x->low_scores[base + to] = x->score[unit * s->stride + ids[i]];
        }
        if (!fills) {
            list[(*appended)++] = h->row[ids[i]];
            continue;
        }
        list[0] = h->row[ids[i]];
        first[head] = to;
        one[head] = 1;
        RF_TRY(pack(s, LOW, layer, sequence, &rows, x->lists, first, one, err));
    }
    /* A cap that stands: as many go from LOW as come, and raw ones are never fewer than they may be. */
    if (filled < num_holes)
        return rf_fail(err, RF_ERR_STATE, "layer %d: %d packed tokens of a head go, and %d take their place", layer,
                       num_holes, filled);
    return RF_OK;
}

/* Raw slots of which classes are in next (ids as list_tokens gives them) go from the book. */
static void release_head(rf_kv_session *s, int layer, int sequence, int head, const int32_t *ids, int32_t num,
                         int32_t *keep) {
    struct rf_kv_packed *x = s->packed;
    float *score = x->score ? x->score + (rf_kv_unit_at(s, layer, sequence) + head) * s->stride : NULL;
    int32_t count = 0;
    for (int32_t i = 0; i < num; i++)
        if (ids[i] >= 0 && x->next[i] == RF_KV_RAW) keep[count++] = ids[i];
    for (int32_t i = 0; score && i < count; i++) score[i] = score[keep[i]];
    rf_kv_book_release(s->sequences[sequence].book, layer, head, keep, count);
}

static rf_status demote_ranked(rf_kv_session *s, int layer, int sequence, int done, bool pools, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    const rf_kv_rule *r = &s->rule;
    rf_kv_sequence *q = &s->sequences[sequence];
    int32_t *ids = x->lists + s->num_kv_heads * x->tokens, *keep = ids + x->tokens;
    float *score = x->work, *pooled = x->work + x->tokens;
    void *work = x->work + 2 * x->tokens;
    int32_t first[MAX_HEADS] = {0}, counts[MAX_HEADS] = {0};
    source rows = of_pool(s);
    for (int h = 0; h < s->num_kv_heads; h++) {
        int32_t num = list_tokens(s, layer, sequence, h, ids, score);
        int32_t window = r->queries == RF_KV_QUERIES_WINDOW && !r->open_window ? r->window : 0;
        if (pools && r->pool != RF_KV_POOL_NONE && num > window) {
            rf_kv_pool_scores(pooled, score, num - window, r->pool, r->pool_size);
            memcpy(score, pooled, (size_t)(num - window) * sizeof *score);
        }
        rf_kv_demote_ranked(r, q->seen, q->budget, share_of(s, layer, sequence, done), x->now, score, num, x->next,
                            work);
        if (memcmp(x->now, x->next, (size_t)num) == 0) continue;
        RF_TRY(apply_ranked(s, layer, sequence, h, ids, num, keep, &counts[h], err));
        first[h] = *lens_of(s, LOW, rf_kv_unit_at(s, layer, sequence) + h);
        *lens_of(s, LOW, rf_kv_unit_at(s, layer, sequence) + h) += counts[h];
        /* Freed rows keep what they hold until the next token is appended, behind the packing. */
        release_head(s, layer, sequence, h, ids, num, keep);
    }
    RF_TRY(pack(s, LOW, layer, sequence, &rows, x->lists, first, counts, err));
    return upload_lens(s, layer, sequence, err);
}

static rf_status demote_blocks(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    const rf_kv_rule *r = &s->rule;
    const rf_kv_sequence *q = &s->sequences[sequence];
    int64_t heads = s->num_kv_heads, tokens = x->tokens, unit = rf_kv_unit_at(s, layer, sequence);
    int32_t first[NUM_STORES][MAX_HEADS], counts[NUM_STORES][MAX_HEADS] = {{0}}, *ids = x->lists, *keep = x->at;
    source rows = of_pool(s);
    for (int h = 0; h < heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(q->book, layer, h);
        float *score = x->score ? x->work : NULL;
        for (int32_t i = 0; score && i < head->num; i++)
            score[i] = rf_kv_demote_compared(r, x->score[(unit + h) * s->stride + i], q->seen, head->position[i]);
        for (int i = 0; i < NUM_STORES; i++) first[i][h] = *lens_of(s, i, unit + h);
        rf_kv_demote_blocks(r, q->seen, first[HIGH][h], first[LOW][h], score, head->num, x->next, x->at);
        for (int32_t i = 0; i < head->num; i++) {
            int which = x->next[i] == RF_KV_HIGH ? HIGH : LOW;
            if (x->next[i] != RF_KV_RAW)
                x->lists[((1 + which) * heads + h) * tokens + counts[which][h]++] = head->row[i];
        }
        for (int32_t i = 0; i < head->num; i++) ids[i] = i;
        release_head(s, layer, sequence, h, ids, head->num, keep); /* as above */
        for (int i = 0; i < NUM_STORES; i++) *lens_of(s, i, unit + h) += counts[i][h];
    }
    for (int i = 0; i < NUM_STORES; i++)
        RF_TRY(pack(s, i, layer, sequence, &rows, x->lists + (1 + i) * heads * tokens, first[i], counts[i], err));
    return upload_lens(s, layer, sequence, err);
}

/* p of the newest query for LOW's tokens: exp(logit - joined log-sum), mean over the group. */
static rf_status follow_low(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    int64_t unit = rf_kv_unit_at(s, layer, sequence), room = x->room[LOW];
    int64_t row = (int64_t)sequence * s->num_q_heads;
    RF_TRY(rf_stream_download(s->stream, x->host_lse, s->step.lse + row, (size_t)s->num_q_heads * sizeof(float), err));
    for (int g = 0; g < s->num_q_heads; g++)
        RF_TRY(rf_stream_download(s->stream, x->host_logits + g * room, x->logits + (row + g) * room,
                                  (size_t)*lens_of(s, LOW, unit + g / s->group) * sizeof(float), err));
    RF_TRY(rf_kv_wait(s, err));
    for (int h = 0; h < s->num_kv_heads; h++) {
        float *score = x->low_scores + (unit + h) * room;
        for (int32_t i = 0; i < *lens_of(s, LOW, unit + h); i++) {
            double sum = 0, most = 0;
            for (int g = h * s->group; g < (h + 1) * s->group; g++) {
                double p = exp((double)x->host_logits[g * room + i] - (double)x->host_lse[g]);
                sum += p;
                most = p > most ? p : most;
            }
            float p = (float)(s->rule.group == RF_KV_OVER_SUM   ? sum
                              : s->rule.group == RF_KV_OVER_MAX ? most
                                                                : sum / s->group);
            score[i] = rf_kv_demote_follow(&s->rule, score[i], p);
        }
    }
    return RF_OK;
}

static rf_status follow_raw(rf_kv_session *s, int layer, int sequence, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    rf_kv_stats stats;
    RF_TRY(rf_kv_measure_step(s, layer, sequence, &stats, err));
    for (int h = 0; h < s->num_kv_heads; h++) {
        int32_t num = rf_kv_book_head(s->sequences[sequence].book, layer, h)->num;
        float *score = x->score + (rf_kv_unit_at(s, layer, sequence) + h) * s->stride;
        rf_kv_demote_probability(&s->rule, &s->shape, h, num, &stats, x->work);
        score[num - 1] = 0;
        for (int32_t i = 0; i < num; i++) score[i] = rf_kv_demote_follow(&s->rule, score[i], x->work[i]);
    }
    return RF_OK;
}

rf_status rf_kv_packed_step(rf_kv_session *s, int layer, int sequence, bool *changed, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    rf_kv_sequence *q = &s->sequences[sequence];
    int32_t *since = &x->since[(int64_t)sequence * s->num_layers + layer];
    *changed = false;
    if (x->shares) return RF_OK;
    ++*since;
    if (s->step_needs) {
        RF_TRY(follow_raw(s, layer, sequence, err));
        if (tracks_low(s, sequence)) RF_TRY(follow_low(s, layer, sequence, err));
    }
    if (!rf_kv_demote_due(&s->rule, *since, rf_kv_book_most(q->book, layer))) return RF_OK;
    *since = 0;
    *changed = true;
    /* decisions behind a layer come before the step has counted its token */
    int32_t seen = q->seen;
    if (s->step_needs) q->seen++;
    rf_status st = x->by_ranks ? demote_ranked(s, layer, sequence, s->num_layers, true, err)
                               : demote_blocks(s, layer, sequence, err);
    q->seen = seen;
    return st;
}

/* --- share ----------------------------------------------------------------------------------------------------------------- */

static rf_status place_all(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    int32_t counts[MAX_HEADS];
    for (int h = 0; h < s->num_kv_heads; h++) {
        counts[h] = num;
        for (int32_t j = 0; j < num; j++) x->lists[h * x->tokens + j] = j;
        *lens_of(s, HIGH, rf_kv_unit_at(s, layer, sequence) + h) = 0;
    }
    RF_TRY(rf_kv_book_place(s->sequences[sequence].book, layer, x->lists, counts, x->tokens, err));
    return upload_lens(s, layer, sequence, err);
}

/* Slots of the earlier layer to their rows of the pool. */
static rf_status copy_earlier(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    const rf_kv_book *book = s->sequences[sequence].book;
    int64_t heads = s->num_kv_heads, stride = s->list_stride;
    int32_t *from = s->host_copy, *to = from + heads * stride, *counts = to + heads * stride;
    int32_t most = rf_kv_book_most(book, layer);
    if (most == 0) return RF_OK;
    RF_TRY(rf_kv_wait(s, err));
    for (int h = 0; h < heads; h++) {
        const rf_kv_head *head = rf_kv_book_head(book, layer, h);
        counts[h] = head->num;
        if (head->num == 0) continue;
        memcpy(from + h * stride, head->position, (size_t)head->num * sizeof *from);
        memcpy(to + h * stride, head->row, (size_t)head->num * sizeof *to);
    }
    RF_TRY(rf_stream_upload(s->stream, s->copy_lists, from, (size_t)(heads * (2 * stride + 1)) * sizeof *from, err));
    rf_kv_copy_args args = {.source = {.k = s->packed->plane_k,
                                       .v = s->packed->plane_v,
                                       .row_stride = s->stage->kv_cols,
                                       .head_stride = s->head_dim,
                                       .num_keys = num},
                            .k_out = s->k_pool,
                            .v_out = s->v_pool,
                            .out_row_stride = s->head_dim,
                            .from = s->copy_lists,
                            .to = s->copy_lists + heads * stride,
                            .counts = s->copy_lists + 2 * heads * stride,
                            .list_stride = stride,
                            .num = most,
                            .table = s->model->rope,
                            .pairs = s->head_dim / 2,
                            .num_kv_heads = s->num_kv_heads,
                            .head_dim = s->head_dim,
                            .dtype = s->model->dtype};
    return s->ops->kv_copy(s->stream, &args, err);
}

/* lists: of unmerged positions, then of merged ones. */
static rf_status share_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    int64_t heads = s->num_kv_heads, tokens = x->tokens;
    int32_t counts[MAX_HEADS], merged[MAX_HEADS], zero[MAX_HEADS] = {0}, *list = x->lists + heads * tokens;
    source rows = of_stage(s, layer);
    lists l;
    for (int h = 0; h < heads; h++) {
        counts[h] = num;
        for (int32_t j = 0; j < num; j++) list[h * tokens + j] = j;
    }
    RF_TRY(upload_lists(s, list, zero, counts, &l, err));
    rf_kvq_direction_args a = {.store = store_at(s, HIGH, layer - 1, sequence),
                               .k = {x->plane_k, rows.k},
                               .v = {x->plane_v, rows.v},
                               .row_stride = rows.row_stride,
                               .head_stride = rows.head_stride,
                               .from = l.from,
                               .first = l.first,
                               .counts = l.counts,
                               .list_stride = s->list_stride,
                               .units = heads,
                               .most = num,
                               .t = SLERP,
                               .angle = x->angles};
    rf_kvq_direction_args angles = a;
    angles.store.k_codes = angles.store.v_codes = NULL;
    RF_TRY(s->ops->kvq_direction(s->stream, &angles, err));
    for (int plane = 0; plane < 2; plane++)
        for (int h = 0; h < heads; h++)
            RF_TRY(rf_stream_download(s->stream, x->work + (plane * heads + h) * tokens,
                                      x->angles + (plane * heads + h) * s->list_stride, (size_t)num * sizeof(float),
                                      err));
    RF_TRY(rf_kv_wait(s, err));
    for (int h = 0; h < heads; h++) {
        rf_kv_share_kept(&s->rule, x->work + h * tokens, x->work + (heads + h) * tokens, num, x->next, x->at);
        counts[h] = merged[h] = 0;
        for (int32_t j = 0; j < num; j++) {
            if (x->next[j])
                x->lists[h * tokens + counts[h]++] = j;
            else
                list[h * tokens + merged[h]++] = j;
        }
        for (int back = 0; back < 2; back++)
            *lens_of(s, HIGH, rf_kv_unit_at(s, layer - back, sequence) + h) = merged[h];
    }
    RF_TRY(upload_lists(s, list, zero, merged, &l, err));
    rf_kvq_store later = store_at(s, HIGH, layer, sequence);
    a.later_k_scales = later.k_scales;
    a.later_v_scales = later.v_scales;
    a.angle = NULL;
    a.most = l.most;
    if (l.most > 0) RF_TRY(s->ops->kvq_direction(s->stream, &a, err));
    for (int back = 1; back >= 0; back--) {
        RF_TRY(rf_kv_book_place(s->sequences[sequence].book, layer - back, x->lists, counts, tokens, err));
        RF_TRY(upload_lens(s, layer - back, sequence, err));
    }
    return copy_earlier(s, layer - 1, sequence, num, err);
}

rf_status rf_kv_packed_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, const rf_kv_stats *stats,
                              rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    if (!x->shares) {
        RF_TRY(demote_prompt(s, layer, sequence, num, stats, err));
        for (int l = 0; s->rule.alloc == RF_KV_ALLOC_CAKE && l < layer; l++)
            RF_TRY(demote_ranked(s, l, sequence, layer + 1, false, err));
        return RF_OK;
    }
    if (rf_kv_share_later(s->num_layers, layer)) return share_prompt(s, layer, sequence, num, err);
    if (!rf_kv_share_earlier(s->num_layers, layer)) return place_all(s, layer, sequence, num, err);
    size_t bytes = (size_t)(num * s->stage->kv_cols) * rf_kv_elem(s);
    RF_TRY(rf_stream_copy(s->stream, x->plane_k, rf_text_keys(s->stage, layer), bytes, err));
    return rf_stream_copy(s->stream, x->plane_v, rf_text_values(s->stage, layer), bytes, err);
}

/* --- attention ------------------------------------------------------------------------------------------------------------- */

static rf_status attend(rf_kv_session *s, int which, int layer, int first, int num, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    int64_t unit = rf_kv_unit_at(s, layer, first), row = (int64_t)first * s->num_q_heads, most = x->room[which];
    if (s->host) { /* a device's graph serves any length */
        most = 0;
        for (int64_t i = 0; i < (int64_t)num * s->num_kv_heads; i++)
            if (*lens_of(s, which, unit + i) > most) most = *lens_of(s, which, unit + i);
    }
    if (most == 0) return RF_OK;
    size_t offset = (size_t)(row * s->head_dim) * rf_kv_elem(s);
    rf_kvq_attention_args a = attention_args(s, which, num, most);
    a.store = store_at(s, which, layer, first);
    a.lens = x->lens + which * all_units(s) + unit;
    a.q = (const char *)s->step.q + offset;
    a.out = x->out + offset;
    a.lse = x->lse + row;
    bool tracked = false;
    for (int b = first; b < first + num; b++) tracked |= tracks_low(s, b);
    if (which == LOW && tracked) {
        a.logits = x->logits + row * x->room[LOW];
        a.logits_stride = x->room[LOW];
    }
    RF_TRY(s->ops->kvq_attention(s->stream, &a, err));
    rf_attention_merge_args join = {.out_a = (char *)s->step.attn + offset,
                                    .out_b = a.out,
                                    .lse_a = s->step.lse + row,
                                    .lse_b = a.lse,
                                    .out = (char *)s->step.attn + offset,
                                    .lse = s->step.lse + row,
                                    .out_a_dtype = s->model->dtype,
                                    .dtype = s->model->dtype,
                                    .rows = (int64_t)num * s->num_q_heads,
                                    .num_heads = 1,
                                    .head_dim = s->head_dim};
    return s->ops->attention_merge(s->stream, &join, err);
}

rf_status rf_kv_packed_attention(rf_kv_session *s, int layer, int first, int num, rf_error *err) {
    struct rf_kv_packed *x = s->packed;
    bool paired = rf_kv_share_earlier(s->num_layers, layer) || rf_kv_share_later(s->num_layers, layer);
    if (x->shares && !paired) return RF_OK;
    for (int i = 0; i < (x->shares ? 1 : NUM_STORES); i++)
        if (x->room[i] > 0) RF_TRY(attend(s, i, layer, first, num, err));
    return RF_OK;
}

/* --- what is known ---------------------------------------------------------------------------------------------------------- */

/* Of num tokens of a unit, without what is allocated beyond them. */
static size_t bytes_of(const rf_kvq_store *t, size_t num) {
    size_t dim = (size_t)t->head_dim;
    if (t->format == RF_KVQ_FP8) return 2 * num * (dim + sizeof(float));
    size_t token = dim * (size_t)t->bits / 8 + dim / (size_t)t->group * 4,
           blocks = (num + RF_KVQ_BLOCK - 1) / RF_KVQ_BLOCK;
    return num * token + (t->keys_by_channel ? blocks * dim * (4 * (size_t)t->bits + 4) : num * token);
}

void rf_kv_packed_info(const rf_kv_session *s, int64_t *tokens, size_t *bytes) {
    const struct rf_kv_packed *x = s->packed;
    size_t dim = (size_t)s->head_dim;
    *tokens = 0;
    *bytes = 0;
    for (int b = 0; b < s->batch; b++) {
        for (int l = 0; s->sequences[b].ready && l < s->num_layers; l++) {
            for (int h = 0; h < s->num_kv_heads; h++) {
                int64_t unit = rf_kv_unit_at(s, l, b) + h;
                for (int i = 0; i < NUM_STORES; i++) {
                    size_t num = (size_t)*lens_of(s, i, unit);
                    *tokens += (int64_t)num;
                    if (!x->shares) *bytes += num ? bytes_of(&x->store[i], num) : 0;
                    /* a direction is half a layer's */
                    if (x->shares) *bytes += num * (dim * rf_kv_elem(s) + 2 * sizeof(float));
                    if (i == LOW && tracks_low(s, b)) *bytes += num * (sizeof(int32_t) + sizeof(float));
                }
                if (x->factors_k || x->factors_v) *bytes += dim * sizeof(float);
            }
        }
    }
}

size_t rf_kv_packed_memory(const rf_kv_session *s, size_t *stores) {
    *stores = s->packed ? s->packed->store_bytes : 0;
    return s->packed ? s->packed->memory_bytes : 0;
}

int32_t rf_kv_packed_count(const rf_kv_session *s, int layer, int sequence, int head, rf_kv_class of) {
    if (of != RF_KV_HIGH && of != RF_KV_LOW) return 0;
    return *lens_of(s, of == RF_KV_HIGH ? HIGH : LOW, rf_kv_unit_at(s, layer, sequence) + head);
}

rf_kvq_store rf_kv_packed_store(const rf_kv_session *s, int layer, int sequence, rf_kv_class of) {
    return store_at(s, of == RF_KV_HIGH ? HIGH : LOW, layer, sequence);
}

double rf_kv_packed_received(const rf_kv_session *s, int layer, int sequence, int head) {
    const struct rf_kv_packed *x = s->packed;
    int64_t unit = rf_kv_unit_at(s, layer, sequence) + head;
    double sum = 0;
    int32_t num = rf_kv_book_head(s->sequences[sequence].book, layer, head)->num;
    for (int32_t i = 0; x->score && i < num; i++) sum += (double)x->score[unit * s->stride + i];
    for (int32_t i = 0; tracks_low(s, sequence) && i < *lens_of(s, LOW, unit); i++)
        sum += (double)x->low_scores[unit * x->room[LOW] + i];
    return sum;
}

void rf_kv_packed_positions(const rf_kv_session *s, int sequence, int layer, int head, int32_t *out, int32_t *num) {
    struct rf_kv_packed *x = s->packed;
    int32_t seen = s->sequences[sequence].seen, count = 0;
    if (!tracks_low(s, sequence)) { /* everything stays */
        for (*num = 0; *num < seen; ++*num) out[*num] = *num;
        return;
    }
    const rf_kv_head *h = rf_kv_book_head(s->sequences[sequence].book, layer, head);
    int64_t unit = rf_kv_unit_at(s, layer, sequence) + head;
    memset(x->now, 0, (size_t)x->tokens);
    for (int32_t i = 0; i < h->num; i++) x->now[h->position[i]] = 1;
    for (int32_t i = 0; i < *lens_of(s, LOW, unit); i++) x->now[x->low_positions[unit * x->room[LOW] + i]] = 1;
    for (int32_t p = 0; p < seen; p++)
        if (x->now[p]) out[count++] = p;
    *num = count;
}
