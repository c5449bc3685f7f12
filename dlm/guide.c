/* dlm/guide.c - guided commits. */
#include "dlm/guide.h"

#include <string.h>

#include "core/memory.h"

struct rf_guide {
    rf_text_session *session;
    int32_t capacity, chunk;
    int32_t num_cached;    /* rows whose keys and values are those of the tokens below */
    int32_t *cached;       /* [capacity] */
    int32_t *rows;         /* [capacity] 0, 1, 2, ... */
    int32_t *head, *refs;  /* [chunk + 1] lists of a pass */
    rf_token_stats *stats; /* [chunk] */
};

rf_status rf_guide_create(rf_guide **out, const rf_text_model *model, const rf_decode_options *o, int32_t capacity,
                          rf_error *err) {
    *out = NULL;
    if (model->desc.attention != RF_TEXT_CAUSAL)
        return rf_fail(err, RF_ERR_CONFIG, "the guide is a %s model: it must be autoregressive", model->desc.family);
    rf_guide *g = rf_alloc_zero(1, sizeof *g);
    if (!g) return rf_fail(err, RF_ERR_MEMORY, "guide: out of memory");
    g->capacity = capacity;
    g->chunk = o->guide_chunk;
    const size_t most = (size_t)g->chunk + 1;
    g->cached = rf_alloc_zero((size_t)capacity, sizeof *g->cached);
    g->rows = rf_alloc((size_t)capacity * sizeof *g->rows);
    g->head = rf_alloc_zero(2 * most, sizeof *g->head);
    g->stats = rf_alloc_zero(most, sizeof *g->stats);
    rf_text_session_options so = rf_text_session_options_default();
    so.capacity = capacity;
    so.max_rows = 0;
    so.max_head_rows = g->chunk;
    so.use_graphs = o->use_graphs;
    so.tune_gemm = o->tune_gemm;
    so.gemm_tuning = o->gemm_tuning;
    rf_status st = RF_OK;
    if (!g->cached || !g->rows || !g->head || !g->stats)
        st = rf_fail(err, RF_ERR_MEMORY, "guide: out of memory for %d rows", (int)capacity);
    if (st == RF_OK) {
        for (int32_t i = 0; i < capacity; i++) g->rows[i] = i;
        g->refs = g->head + most;
        st = rf_text_session_create(&g->session, model, &so, err);
        if (st != RF_OK) st = rf_fail_prefix(err, st, "guide");
    }
    if (st != RF_OK) {
        rf_guide_destroy(g);
        return st;
    }
    *out = g;
    return RF_OK;
}

void rf_guide_destroy(rf_guide *g) {
    if (!g) return;
    rf_text_session_destroy(g->session);
    rf_free(g->cached);
    rf_free(g->rows);
    rf_free(g->head);
    rf_free(g->stats);
    rf_free(g);
}

void rf_guide_reset(rf_guide *g) {
    g->num_cached = 0;
    rf_text_session_reset_counts(g->session);
}

int64_t rf_guide_forwards(const rf_guide *g) {
    return rf_text_session_get_info(g->session).num_passes;
}

size_t rf_guide_bytes(const rf_guide *g) {
    return rf_text_session_get_info(g->session).arena_bytes;
}

/* Rows [begin, end) in one causal pass, with the probability of the token behind each of the last num_heads rows. */
static rf_status pass(rf_guide *g, const int32_t *tokens, int32_t begin, int32_t end, int32_t num_heads, bool rank,
                      rf_error *err) {
    rf_text_pass p = rf_text_pass_default();
    p.num_rows = end - begin;
    p.rows = g->rows + begin;
    p.tokens = tokens + begin;
    p.visible_end = &end;
    p.mask = RF_MASK_CAUSAL;
    for (int32_t i = 0; i < num_heads; i++) {
        g->head[i] = p.num_rows - num_heads + i;
        g->refs[i] = tokens[end - num_heads + i + 1];
    }
    p.num_head_rows = num_heads;
    p.head_rows = g->head;
    p.head_refs = num_heads > 0 ? g->refs : NULL;
    p.rank_of_ref = rank;
    RF_TRY(rf_text_session_forward(g->session, &p, err));
    if (num_heads > 0) RF_TRY(rf_text_session_read_stats(g->session, g->stats, err));
    memcpy(g->cached + begin, tokens + begin, (size_t)(end - begin) * sizeof *tokens);
    g->num_cached = end;
    return RF_OK;
}

static bool accepts(const rf_decode_options *o, const rf_token_stats *s, int32_t token) {
    switch (o->accept) {
    case RF_ACCEPT_TOP1: return s->best == token;
    case RF_ACCEPT_TOPK: return s->margin < (float)o->accept_k; /* ids that are larger */
    case RF_ACCEPT_PROB: return s->ref_prob > (float)o->accept_threshold;
    }
    return false;
}

rf_status rf_guide_accept(rf_guide *g, const rf_decode_options *o, const int32_t *tokens, const uint8_t *pending,
                          int32_t first, int32_t end, int32_t *accepted, rf_error *err) {
    /* rows whose token has changed since they were computed are computed again */
    int32_t valid = 0;
    while (valid < g->num_cached && valid < first - 1 && g->cached[valid] == tokens[valid]) valid++;
    *accepted = first + 1;
    /* what lies in front of the first row that has to predict goes in one pass of its own where it is long */
    if (first - 1 - valid > g->chunk) {
        RF_TRY(pass(g, tokens, valid, first - 1, 0, false, err));
        valid = first - 1;
    }
    for (int32_t from = first; from < end;) {
        const int32_t to = end - from < g->chunk ? end : from + g->chunk; /* positions [from, to) are judged */
        RF_TRY(pass(g, tokens, valid, to - 1, to - from, o->accept == RF_ACCEPT_TOPK, err));
        int32_t j = from;
        for (; j < to; j++)
            if (pending[j] && !accepts(o, &g->stats[j - from], tokens[j])) break;
        if (j > *accepted) *accepted = j;
        if (j < to) break;
        valid = to - 1;
        from = to;
    }
    return RF_OK;
}
