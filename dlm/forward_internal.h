/* dlm/forward_internal.h - what the files of the text executor share. Internal to dlm/.
 *
 * forward.c plans a session and reads results; pass.c checks a pass, writes its control block and launches it;
 * pass_layers.c queues its layers and the head; pass_drift.c, pass_verify.c and external.c hold what is particular to
 * those passes. */
#ifndef RF_DLM_FORWARD_INTERNAL_H
#define RF_DLM_FORWARD_INTERNAL_H

#include "dlm/forward.h"

#define RF_TEXT_STAGED      4  /* control blocks on their way to the device */
#define RF_TEXT_MAX_GRAPHS  64 /* the least recently used one makes room */
#define RF_TEXT_CUDA_LOGITS 64 /* rows whose logits are kept */

/* Everything that operators are told on the host: what a captured pass is made for. Compared bytewise, so zeroed first.
 * Sizes are those of the bucket; on the host those of the pass. */
typedef struct {
    uint64_t seed;
    float temperature, logit_scale, cfg;
    int32_t rows;   /* of a sequence */
    int32_t keys;   /* cache rows (or list entries) that attention is planned for */
    int32_t listed; /* keys come from a list */
    int32_t mask, mask_block;
    int32_t first_layer, end_layer; /* layers [first, end); the head runs if end is the number of layers */
    int32_t head_rows;              /* of all sequences; with cfg: of both halves */
    int32_t has_refs, rank_of_ref, round_logits, num_bans, keep_logits;
    int32_t layers; /* rf_pass_layers */
    /* attention reuse */
    int32_t external, fresh, outside_keys, outside_listed, inside_keys;
    /* drift */
    int32_t full; /* every visible row: nothing to compare */
    int32_t window, over_heads;
    /* verify */
    int32_t segment; /* rows 0..segment-1 of the packed rows */
    int32_t chosen;  /* of them: computed fully in layers from full_layers on */
    int32_t compares, full_layers;
    int32_t zero; /* in place of padding bytes, which a copy need not keep */
} rf_text_shape;
_Static_assert(sizeof(rf_text_shape) == 8 + 30 * 4, "rf_text_shape has padding bytes");

/* Where things stand in the control block, in int32 words. */
typedef struct {
    size_t tokens, positions;  /* [batch * rows] */
    size_t kv_lens, q_offsets; /* [batch] */
    size_t step, visible;      /* [1], [keys] */
    size_t head_rows, head_keys, head_refs, bans;
    size_t fresh_rows, fresh_slots, slots;           /* [fresh], [fresh], [rows] */
    size_t outside, outside_len, inside, inside_len; /* [outside_keys], [1], [inside_keys], [1] */
    size_t tracked, window, allowed;                 /* [num_layers], [window], u8 [keys] */
    size_t pick, pick_positions, iota;               /* [rows] each; the device writes into the first two */
    size_t words;
} rf_text_control;

typedef struct {
    /* state: [layer][batch][C][...] of the model's dtype unless said otherwise */
    char *k, *v;                            /* [Hkv * D] */
    char *inputs;                           /* [hidden] residual dtype */
    char *queries;                          /* [Hq * D] */
    char *attn_increments, *ffn_increments; /* [hidden] */
    float *external_out;                    /* [layer][2 * slots][Hq][D] */
    float *external_lse;                    /* [layer][Hq][2 * slots] */

    /* scratch, R = batch * max_rows */
    void *x;      /* [R, hidden] residual dtype */
    void *x_pick; /* the same: rows that are computed fully (verify) */
    void *h;      /* [R, hidden] normed */
    void *h_pick;
    void *wide; /* [R, max((Hq + 2 Hkv) D, 2 ffn)] */
    void *act;  /* [R, ffn] */
    void *q;    /* [R, Hq * D] */
    void *attn; /* [R, Hq * D] */
    void *y;    /* [R, hidden] */
    float *lse; /* [batch, Hq, max_rows] */
    void *attn_workspace;
    size_t attn_workspace_bytes;

    float *probs_old, *probs_new; /* [Hq, capacity] */
    float *cosine;                /* [max(Hq, capacity)] or [R] */
    float *mass;                  /* [capacity] */
    float *sums;                  /* [num_layers][4] of the similarities */
    int32_t *tracked;             /* [num_layers] index among the keys */
    void *reduce_workspace;
    size_t reduce_workspace_bytes;
    void *values; /* [R, Hkv * D] */

    /* head */
    void *head_h;    /* [head rows, hidden] */
    float *head_f32; /* the same in f32, with cfg or for reading */
    rf_token_stats *stats;
    void *head_workspace;
    size_t head_workspace_bytes;

    int32_t *control;
} rf_text_buffers;

typedef struct {
    rf_text_shape shape;
    rf_graph *graph; /* NULL: operators have chosen their algorithms, nothing is captured */
    uint64_t last_used;
} rf_text_bucket;

struct rf_text_session {
    const rf_text_model *model;
    const rf_ops *ops;
    rf_backend *backend;
    rf_stream *stream;
    rf_text_session_options options;
    bool decides_late; /* the host runs drift passes as a device does (tests) */

    int64_t cache_rows;      /* C = capacity + 1; the last one is the dump row */
    int64_t q_cols, kv_cols; /* Hq * D, Hkv * D */
    int64_t head_chunk;      /* rows of one head_stats call */
    int32_t head_capacity;   /* head rows of a pass in all, padded */

    char *memory;
    size_t memory_bytes, state_bytes, cache_bytes, plane_bytes;
    rf_text_buffers b;
    float *logits,
        *host_logits; /* [logit_rows, vocab] taken with the first pass that keeps logits; device, page-locked */
    int32_t logit_rows;

    /* host, page-locked */
    int32_t *staged; /* [RF_TEXT_STAGED][control_words] */
    size_t control_words;
    int num_staged; /* uploads since the last wait */
    bool busy;      /* work queued since the last wait */
    rf_token_stats *host_stats;
    float *host_sums;
    int32_t *host_tracked;

    /* host */
    int32_t *place;                    /* [batch * max_rows] packed row of a row of the pass */
    int32_t *order;                    /* [max_rows] row of the pass that packed row i is */
    int32_t *visible;                  /* [capacity] key list of the last drift pass */
    float *drift;                      /* [num_layers] */
    uint8_t *slot_filled, *slot_taken; /* [external_slots] */

    rf_text_bucket buckets[RF_TEXT_MAX_GRAPHS];
    int num_buckets;
    uint64_t use_count;

    /* the last pass */
    int32_t num_head_rows; /* of a sequence */
    int32_t num_logit_rows;
    bool has_pass, has_cfg, was_drift, was_listed, has_window;
    int32_t expanded_at;
    int graph_nodes;

    /* counts; by layer, so that rows of some layers only count as parts */
    int64_t num_passes, row_layers, key_layers, head_rows;
};

/* One run over layers: what is queued now. */
typedef struct {
    rf_text_session *s;
    rf_stream *stream; /* NULL: only check */
    rf_text_shape shape;
    rf_text_control at;
    int64_t rows; /* batch * shape.rows */
} rf_text_run;

/* The rows a run packs: those of the pass, or others that hold them. */
typedef struct {
    int32_t num_rows;
    const int32_t *rows, *tokens; /* [batch][num_rows]; tokens NULL: inputs come from a plane */
    const int32_t *order;         /* packed row i is row order[i] of the lists; NULL = i (batch 1) */
    const int32_t *place;         /* row i of the pass is packed row place[i]; NULL = i (batch 1) */
} rf_text_rows;

/* --- forward.c
 * --------------------------------------------------------------------------------------------------------- */

rf_status rf_text_wait(rf_text_session *s, rf_error *err);

/* --- pass.c
 * ------------------------------------------------------------------------------------------------------------ */

rf_text_control rf_text_control_layout(const rf_text_session *s, const rf_text_shape *shape);
int32_t rf_text_bucket_rows(const rf_text_session *s, int32_t rows);
int32_t rf_text_bucket_keys(const rf_text_session *s, int32_t keys);
int32_t rf_text_bucket_head(const rf_text_session *s, int32_t rows);
/* The shape of a pass with `rows` as its rows, all layers. */
rf_text_run rf_text_make_run(rf_text_session *s, const rf_text_pass *pass, const rf_text_rows *rows);
/* Writes the control block and uploads it; waits first if all page-locked blocks are on their way. */
rf_status rf_text_upload(const rf_text_run *run, const rf_text_pass *pass, const rf_text_rows *rows, rf_error *err);
/* As a graph where there is one, captured by the second use of a shape at the latest. */
rf_status rf_text_launch(rf_text_run *run, rf_error *err);
/* Directly; operators may choose their algorithms. */
rf_status rf_text_queue_planned(rf_text_run *run, rf_error *err);
/* Rows computed and keys seen, in some layers. */
void rf_text_count(rf_text_session *s, const rf_text_pass *pass, const rf_text_rows *rows, int64_t num_layers);
/* Statistics and logits of the pass on their way to the host. */
rf_status rf_text_queue_results(rf_text_session *s, const rf_text_pass *pass, rf_error *err);
/* Where entry e = b * h + i of a pass' head rows stands among `num` head rows of a run; with guidance the unconditional
 * half comes first, and the statistics of a pair stand where its unconditional row does. */
int64_t rf_text_head_at(bool guided, int64_t num, int32_t per_sequence, int64_t e);
/* Keys that a row of sequence b sees. */
int64_t rf_text_keys_seen(const rf_text_pass *pass, int b, int32_t position);

/* --- pass_layers.c
 * ----------------------------------------------------------------------------------------------------- */

rf_norm_args rf_text_norm_args(const rf_text_session *s, const void *x, void *y, int64_t m, const float *weight);
/* Into x and h: embedded tokens, or the kept inputs of the first layer, and the first layer's norm. */
rf_status rf_text_queue_inputs(const rf_text_run *run, rf_error *err);
rf_status rf_text_queue_layer(const rf_text_run *run, int layer, rf_error *err);
rf_status rf_text_queue_head(const rf_text_run *run, rf_error *err);
/* All of it. */
rf_status rf_text_queue(const rf_text_run *run, rf_error *err);

static inline int32_t *rf_text_at(const rf_text_run *run, size_t word) {
    return run->s->b.control + word;
}
static inline char *rf_text_plane(const rf_text_session *s, char *plane, int layer, int64_t cols, rf_dtype dtype) {
    return plane +
           (size_t)layer * (size_t)s->options.batch * (size_t)s->cache_rows * (size_t)cols * rf_dtype_bytes(dtype);
}
static inline int rf_text_plane_of(const rf_text_session *s, int layer) {
    return s->options.layer_planes > 0 ? layer % s->options.layer_planes : layer;
}
static inline char *rf_text_keys(const rf_text_session *s, int layer) {
    return rf_text_plane(s, s->b.k, rf_text_plane_of(s, layer), s->kv_cols, s->model->dtype);
}
static inline char *rf_text_values(const rf_text_session *s, int layer) {
    return rf_text_plane(s, s->b.v, rf_text_plane_of(s, layer), s->kv_cols, s->model->dtype);
}

/* y [m, n] = x [m, k] w^T + bias. */
rf_status rf_text_linear(const rf_text_run *run, const void *x, const void *w, const void *bias, void *y, int64_t m,
                         int64_t n, int64_t k, rf_error *err);
/* Copies rows: dst[i] = src[rows[i]] (gather), dst[rows[i]] = src[i] (scatter). */
rf_status rf_text_copy_rows(const rf_text_run *run, bool gather, const void *src, void *dst, const int32_t *rows,
                            rf_dtype dtype, int64_t num, int64_t cols, rf_error *err);
/* x += y, h = norm(x; weight) unless weight is NULL; store != NULL: y is kept there at the rows `store_rows`. */
rf_status rf_text_residual(const rf_text_run *run, void *x, const void *y, void *h, const float *weight, int64_t m,
                           void *store, const int32_t *store_rows, rf_error *err);
/* Splits, turns and keeps packed q|k|v of m rows (of each sequence) in `wide`; q into b.q. */
rf_status rf_text_qkv_rope(const rf_text_run *run, int layer, int64_t m, const int32_t *positions, rf_error *err);
/* Over the visible keys, b.q to b.attn; lse or NULL. */
rf_attention_args rf_text_attention_args(const rf_text_run *run, int layer, int64_t q_len);
rf_status rf_text_attend(const rf_text_run *run, int layer, int64_t m, float *lse, rf_error *err);
/* Feed-forward of m normed rows: h to b.y. */
rf_status rf_text_ffn(const rf_text_run *run, int layer, const void *h, int64_t m, rf_error *err);

/* --- external.c
 * -------------------------------------------------------------------------------------------------------- */

/* Slots of the planes: those of rows, and as many for padding. */
static inline int64_t rf_text_external_slots(const rf_text_session *s) {
    return 2 * (int64_t)s->options.external_slots;
}
rf_status rf_text_external_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err);
void rf_text_external_shape(const rf_text_session *s, const rf_text_pass *pass, rf_text_shape *shape);
void rf_text_external_fill(const rf_text_run *run, const rf_text_pass *pass, int32_t *host);
rf_status rf_text_external_attend(const rf_text_run *run, int layer, rf_error *err);
/* After the pass: counts, and which slots are filled. */
void rf_text_external_done(rf_text_session *s, const rf_text_pass *pass);

/* --- pass_drift.c
 * ------------------------------------------------------------------------------------------------------ */

rf_status rf_text_drift_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err);
void rf_text_drift_fill(const rf_text_run *run, const rf_text_pass *pass, const rf_text_rows *rows, int32_t *host);
rf_status rf_text_drift_forward(rf_text_session *s, const rf_text_pass *pass, rf_error *err);
/* Parts of a layer: before the keys are written, and after attention. */
rf_status rf_text_drift_before(const rf_text_run *run, int layer, rf_error *err);
rf_status rf_text_drift_after(const rf_text_run *run, int layer, rf_error *err);
/* Behind the last layer of a run that ends early: the inputs of the next one are kept. */
rf_status rf_text_drift_end(const rf_text_run *run, rf_error *err);

/* --- pass_verify.c
 * ----------------------------------------------------------------------------------------------------- */

rf_status rf_text_verify_check(const rf_text_session *s, const rf_text_pass *pass, rf_error *err);
rf_status rf_text_verify_forward(rf_text_session *s, const rf_text_pass *pass, rf_error *err);
void rf_text_verify_fill(const rf_text_run *run, int32_t *host);
rf_status rf_text_verify_layer(const rf_text_run *run, int layer, rf_error *err);

#endif
