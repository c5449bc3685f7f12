/* dlm/kv_internal.h - what the files of the budgeted executor share. Internal to dlm/.
 *
 * kv_session.c plans a session, takes prompts and reads results; kv_prefill.c runs a prompt layer by layer; kv_measure.c
 * makes what a rule wants to know; kv_blocks.c runs a prompt in blocks, kv_sentences.c cuts sequences into sentences;
 * kv_packed.c keeps tokens in few bits; kv_step.c runs tokens behind it; kv_select.c lets their attention read a few of all slots;
 * kv_slide.c keeps positions of a cache whose ends alone stay.
 * Units u = sequence * Hkv + key head: a layer's lists stand in that order. */
#ifndef RF_DLM_KV_INTERNAL_H
#define RF_DLM_KV_INTERNAL_H

#include "caching/kv/demote.h"
#include "dlm/forward_internal.h"
#include "dlm/kv_session.h"
#include "dlm/kv_tables.h"
#include "kernels/kv.h"

#define RF_KV_GRAPHS 24 /* one for each power of two of keys */

/* What is measured, f32: the same layout on the device and on the host (there the same memory). NULL: not wanted. */
typedef struct {
    float *s1, *s2, *peak, *removal, *wo_norm, *expected; /* [Hq][stride] */
    float *key_norm, *value_norm, *key_cosine;            /* [Hkv][stride] */
    float *entropy;                                       /* [Hq] */
} rf_kv_measures;

/* Of one sequence, on the host. */
typedef struct {
    rf_kv_book *book;
    rf_kv_book *draft_book; /* drafted queries: of the compressed copy that they are decoded on */
    int32_t compressed;     /* tokens of the prompt behind which the book chose */
    int32_t seen;           /* tokens so far: the next one's true position */
    int32_t appended;       /* seen - compressed: at most max_new */
    int32_t made;           /* steps since the prompt: the RNG's step */
    int32_t budget;         /* 0 = no limit */
    int32_t *shift;         /* [L] DELTA: the next token's position less its true one */
    bool ready;
    struct rf_kv_sentences *sentences; /* rules that penalise those said again, or NULL */
    /* lists that live on the device: what is known of them here */
    int32_t *lens;  /* [L * Hkv] slots now */
    bool has_spare; /* an evicted slot's row takes the next token */
    int32_t *free_rows, num_free;
    int64_t evicted;
    int32_t frame; /* slides: keys are turned at their true positions less this */
    bool slid;     /* tokens have gone: the sinks are turned anew at each step */
} rf_kv_sequence;

/* In int32 words of the block that a step uploads; entries of all sequences. */
typedef struct {
    size_t tokens, keys, steps; /* [B] */
    size_t positions;           /* [L][B] */
    size_t new_rows;            /* [L][U] */
    size_t slots,
        slot_positions;        /* on_device: [L][U] entry of `positions` that the new slot has, and what goes there */
    size_t turns, turn_counts; /* slides: [L][U][sinks], [L][U] */
    size_t words;
} rf_kv_control;

/* R = B rows. */
typedef struct {
    void *x, *h, *wide, *act, *q, *attn, *y;
    void *k_new, *v_new; /* [U][D] turned keys of the new tokens, values */
    void *k_raw;         /* [U][D] CACHE: unturned */
    float *lse;          /* [B][Hq] */
    void *attn_workspace;
    size_t attn_workspace_bytes;
} rf_kv_step_buffers;

/* Calibration looks at attention: probabilities p [Hq][stats_stride] (host) of the prompt's row `position` over keys 0..position. */
typedef struct {
    void *user;
    bool (*wants)(void *user, int32_t position);
    rf_status (*take)(void *user, rf_kv_session *s, int layer, int32_t position, const float *p, rf_error *err);
} rf_kv_probe;

struct rf_kv_session {
    const rf_text_model *model;
    const rf_ops *ops;
    rf_backend *backend;
    rf_stream *stream;      /* the staging session's */
    rf_text_session *stage; /* one sequence, planes of one layer or, s->overlaps, of two */
    rf_kv_session_options options;
    rf_kv_rule rule;
    rf_kv_shape shape;
    unsigned prefill_needs, step_needs;
    rf_kv_tables tables;
    const rf_kv_probe *probe; /* NULL: nobody looks; the rule measures sums, the budget keeps everything */
    unsigned needs;           /* of the prompt that is computed now */
    rf_kv_rule draft_rule;    /* drafted queries: SnapKV, behind which they are decoded */
    unsigned draft_needs;
    int32_t draft_at; /* the token that is drafted now, -1: none */
    int32_t num_drafted;
    bool on_device; /* slots are chosen by kv_evict; the books end with the prompt */
    bool slides;    /* positions inside the cache by kv_slide.c */
    bool
        overlaps; /* a prompt's layer is chosen while the next one is computed: two planes of everything that a choice reads */
    bool ahead; /* this prompt is */
    bool host;  /* the backend is the host's */
    rf_kv_evict_mode evict_mode;

    int num_layers, num_q_heads, num_kv_heads, head_dim, group, batch, units;
    int32_t extra_rows;     /* pseudo queries */
    int32_t default_budget; /* as it was asked for: 0 = by options.ratio; options.budget is the largest */
    int64_t stride;         /* slots of a list */
    int64_t pool_rows;      /* of a sequence */
    int64_t stats_stride, list_stride;

    char *memory;
    size_t memory_bytes, pool_bytes;
    char *k_pool, *v_pool; /* [batch * pool_rows][D] */
    char *k_raw_plane;     /* CACHE, EXPECTED: unturned keys, as the staging planes: rf_kv_unturned() */
    char *x_plane;         /* [max_prompt + chunk][hidden], then [extra + chunk][hidden] */
    char *q_raw;           /* [chunk][Hq * D] */
    char *draft_q;         /* [L][drafts][Hq * D] turned queries of drafted tokens */
    char *k_read, *v_read; /* [U][stride][D] CACHE, or measuring of keys: slots in order; slides: [Hkv].. */
    char *sink_k, *sink_v; /* slides: [L][U][sinks][D], keys unturned */
    int32_t *sink_rows;    /* slides: [L][U][sinks] of the pool */
    int32_t *iota_rows;    /* [U][stride] u * stride + j: lists over them */
    int32_t *iota_slots;   /* CACHE: [Hkv][stride] j */
    int32_t *rows, *lens;  /* [L][U][stride], [L][U] */
    int32_t *positions, *spare, *budgets;             /* on_device: [L][U][stride], [L][U], [L][U] */
    float *scores;                                    /* on_device: [L][U][stride] */
    int32_t *copy_lists;                              /* from, to, turn: [3][Hkv][list_stride], counts [Hkv] */
    float *lse, *weights;                             /* [Hq][chunk], [max_prompt + extra] */
    rf_kv_measures measured, host_measured, host_odd; /* host_odd: of odd layers, with overlaps */
    rf_kv_stats layer_stats[2];
    float *anchor;                    /* [Hkv][D] */
    char *mean_k, *mean_v, *mean_out; /* COMPENSATE: [L][U][D] twice, [B][Hq * D] */
    float *mean_logs, *mean_lse;      /* [L][B][Hq] ln of how many, [B][Hq] */
    float *measure_block;             /* all of measured */
    size_t measure_floats;
    void *workspace;
    size_t workspace_bytes;
    rf_kv_step_buffers step;
    int32_t *control, *prompt_control; /* prompt_control: [chunks of a prompt, pseudo rows][stage->control_words] */
    rf_kv_control at;
    char *head_h; /* [B][hidden] */
    rf_token_stats *stats;
    void *head_workspace;
    size_t head_workspace_bytes;
    float *logits, *host_logits; /* [B][vocab], with keep_logits */

    /* host, page-locked */
    int32_t *host_control, *host_rows, *host_lens, *host_copy, *host_state;
    float *host_weights, *host_measure_block, *host_scores;
    rf_token_stats *host_stats;
    /* host */
    rf_kv_sequence *sequences;
    float *host_k, *host_v; /* [Hkv][stats_stride][D], with RF_KV_NEED_KV */
    char *bounce;           /* rows on their way, model's dtype */
    size_t bounce_bytes;
    float *gate_values, *gate_rows; /* GATE: [Hkv][stats_stride], [chunk or B][hidden + Hkv] and work */
    float *step_gates;              /* [B][Hkv] of the newest tokens */
    int32_t *received;              /* device, [max_prompt]: positions of rows of a prompt that later layers see */
    bool thinned;                   /* rows stand close together, positions in received */
    int32_t *external;              /* [extra_rows] host: tokens of queries=external */
    int32_t *plane_positions;       /* [Hkv][list_stride] host, blocks: positions of the planes' rows */
    float *rope_mean;               /* EXPECTED: [D / 2][2] */
    double *moments;                /* EXPECTED: [Hq][D + D * D] */
    double moment_rows;
    int32_t *prompt_positions; /* 0, 1, 2, ... */

    struct rf_kv_packed *packed; /* rules that keep few bits, or NULL */
    struct rf_kv_select *select; /* rules that read a few of all slots, or NULL */

    rf_graph *graphs[RF_KV_GRAPHS];
    bool graph_planned[RF_KV_GRAPHS];

    rf_kv_draw draw;
    int last_sequence; /* of the last prefill, -1: the last was a step */
    bool has_result;
    rf_kv_session_info info;
    int64_t key_layers, row_layers;
};

static inline size_t rf_kv_elem(const rf_kv_session *s) {
    return rf_dtype_bytes(s->model->dtype);
}
static inline rf_text_run rf_kv_run(const rf_kv_session *s) {
    return (rf_text_run){.s = s->stage, .stream = s->stream};
}
static inline bool rf_kv_in_cache_order(const rf_kv_session *s) {
    return s->rule.position == RF_KV_POSITION_CACHE && !s->slides;
}
static inline bool rf_kv_keeps_unturned(const rf_kv_session *s) {
    return rf_kv_in_cache_order(s) || (s->prefill_needs & RF_KV_NEED_EXPECTED) != 0;
}
static inline char *rf_kv_unturned(const rf_kv_session *s, int layer) {
    return rf_text_plane(s->stage, s->k_raw_plane, rf_text_plane_of(s->stage, layer), s->stage->kv_cols,
                         s->model->dtype);
}
/* Budgets of layers that are known after later ones. */
static inline bool rf_kv_decides_late(const rf_kv_session *s) {
    return s->rule.alloc == RF_KV_ALLOC_CAKE || s->rule.alloc == RF_KV_ALLOC_FLAT_ALL;
}
static inline int64_t rf_kv_unit_at(const rf_kv_session *s, int layer, int sequence) {
    return ((int64_t)layer * s->batch + sequence) * s->num_kv_heads;
}

/* --- kv_session.c --- */

rf_status rf_kv_session_create_as(rf_kv_session **out, const rf_text_model *model, const rf_kv_session_options *options,
                                  bool may_use_device, rf_error *err);
/* may_overlap: if the rule's choice needs nothing that is only there inside of a layer. As: where there is a device. */
rf_status rf_kv_session_create_with(rf_kv_session **out, const rf_text_model *model,
                                    const rf_kv_session_options *options, bool may_use_device, bool may_overlap,
                                    rf_error *err);
rf_status rf_kv_wait(rf_kv_session *s, rf_error *err);
double rf_kv_now_ms(void);
/* Lists and lengths of layers [first, end) of a sequence, from its book. */
rf_status rf_kv_upload_lists(rf_kv_session *s, int sequence, int first, int end, rf_error *err);
/* Statistics (and logits) of x [num][hidden] as those of sequences first.. */
rf_status rf_kv_queue_head(rf_kv_session *s, const void *x, int first, int num, rf_error *err);
rf_status rf_kv_download_head(rf_kv_session *s, int first, int num, rf_error *err);
/* Device rows of the model's dtype as host floats, and back. Wait. */
rf_status rf_kv_read_rows(rf_kv_session *s, const void *device, int64_t num, float *out, rf_error *err);
rf_status rf_kv_write_rows(rf_kv_session *s, void *device, int64_t num, const float *in, rf_error *err);

/* --- kv_prefill.c --- */

/* The first num tokens of a sequence: layers, choice, pool, lists. With want_head its last row's statistics. */
rf_status rf_kv_prefill(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, bool want_head,
                        rf_error *err);

typedef struct {
    int32_t begin, rows; /* rows of the layer's planes of keys and values; without blocks they are positions */
    int32_t position;    /* where s->received has the positions of the rows */
    bool pseudo;
} rf_kv_chunk;
/* A chunk through a layer: residual rows in s->stage->b.x, num rows of the planes. tokens NULL: its lists are on the device. goes_on: later layers or the head want them. */
rf_status rf_kv_chunk_layer(rf_kv_session *s, int layer, const rf_kv_chunk *c, const int32_t *tokens, int32_t num,
                            bool goes_on, rf_error *err);
/* Slots of a layer's heads from the planes' rows to their rows of the pool. plane: positions of num rows, ascending, those of head h at
 * plane + h * plane_stride; NULL: rows are positions. */
rf_status rf_kv_copy_kept(rf_kv_session *s, int layer, int sequence, const int32_t *plane, int64_t plane_stride,
                          int32_t num, rf_error *err);

/* --- kv_blocks.c --- prompts in blocks (rule.block) */

rf_status rf_kv_blocks_open(rf_kv_session *s, rf_error *err);
/* Rows of x_plane behind those of a prompt and a chunk. */
int64_t rf_kv_blocks_rows(const rf_kv_session *s);
bool rf_kv_comes_in_blocks(const rf_kv_session *s, int sequence);
/* As rf_kv_prefill, without the head. */
rf_status rf_kv_prefill_blocks(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, bool want_head,
                               rf_error *err);

/* --- kv_measure.c --- */

/* Before a prompt: what the rule wants of it (nothing, if nothing will be dropped), and weights of its queries. */
rf_status rf_kv_measure_begin(rf_kv_session *s, const rf_kv_sequence *sequence, rf_error *err);
rf_status rf_kv_measure_layer_begin(rf_kv_session *s, rf_error *err);
/* Rows begin..begin + rows - 1 of the prompt have passed attention in a run of run_rows; pseudo: rows behind the prompt. */
bool rf_kv_measures_rows(const rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, bool pseudo);
rf_status rf_kv_measure_rows(rf_kv_session *s, int layer, int32_t num, int32_t begin, int32_t rows, int64_t run_rows,
                             bool pseudo, rf_error *err);
/* Unturned queries of rows that are no sinks. */
rf_status rf_kv_measure_queries(rf_kv_session *s, int32_t begin, int32_t rows, rf_error *err);
/* Drafted queries over the layer's keys. */
rf_status rf_kv_measure_drafts(rf_kv_session *s, int layer, int32_t num, rf_error *err);
/* Everything else of the layer; *stats is host memory until the next layer. */
rf_status rf_kv_measure_layer(rf_kv_session *s, int layer, int32_t num, rf_kv_stats *stats, rf_error *err);
/* The same, queued: *stats is to be read behind what is queued now, until the layer after the next. For rules that overlap. */
rf_status rf_kv_measure_ahead(rf_kv_session *s, int layer, int32_t num, rf_kv_stats *stats, rf_error *err);
bool rf_kv_can_overlap(const rf_kv_rule *rule);
/* Of a step's query of one sequence. Waits. */
rf_status rf_kv_measure_step(rf_kv_session *s, int layer, int sequence, rf_kv_stats *stats, rf_error *err);
/* GATE: retention of rows [num][hidden] of h, of a prompt's positions begin.. or of sequences first.. of a step. Wait. */
rf_status rf_kv_gate_prompt(rf_kv_session *s, int layer, const void *h, int32_t begin, int32_t rows, rf_error *err);
rf_status rf_kv_gate_step(rf_kv_session *s, int layer, const void *h, int first, int num, rf_error *err);
/* Joins of a book on the layer's planes of keys and values. */
rf_status rf_kv_join_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err);
rf_status rf_kv_join_pool(rf_kv_session *s, int layer, int sequence, rf_error *err);
/* Bytes that the operators want as workspace, for this session's sizes. */
size_t rf_kv_measure_workspace(const rf_kv_session *s);

/* --- kv_mean.c --- COMPENSATE; nothing for other actions */

/* Behind the book's choice of a prompt's layer. Waits. */
rf_status rf_kv_mean_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, rf_error *err);
/* Behind a step's attention: its outputs and lse with the mean slots. */
rf_status rf_kv_join_mean(rf_kv_session *s, int layer, int first, int num, rf_error *err);
rf_attention_args rf_kv_mean_attention(const rf_kv_session *s, int layer, int first, int num);

/* --- kv_calibrate.c --- */

/* Shows the probe the rows that it wants, behind their attention in a run of run_rows. Waits. */
rf_status rf_kv_probe_rows(rf_kv_session *s, int layer, int32_t begin, int32_t rows, int64_t run_rows, rf_error *err);

/* --- kv_select.c --- */

/* For rules of action SELECT: session.select. mirrors: keys have a copy on the host even where the pool lies there. */
rf_status rf_kv_select_create(rf_kv_session *s, bool mirrors, rf_error *err);
void rf_kv_select_destroy(rf_kv_session *s);
/* A prompt's rows begin.. of a layer, queries turned in the staging session: those that a rule calibrates on are kept. */
rf_status rf_kv_select_rows(rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, rf_error *err);
/* Behind the choice of a prompt's layer: what selection wants to know of its keys. */
rf_status rf_kv_select_prompt(rf_kv_session *s, int layer, int sequence, const int32_t *tokens, int32_t num,
                              const rf_kv_stats *stats, rf_error *err);
/* Behind the append of a step: lists of what this layer's attention reads, of sequences first... Waits. */
rf_status rf_kv_select_step(rf_kv_session *s, int layer, int first, int num, rf_error *err);
/* Those lists in place of all slots. */
void rf_kv_select_attention(const rf_kv_session *s, int first, rf_attention_args *args);
/* What is kept beside the slots. */
size_t rf_kv_select_bytes(const rf_kv_session *s);
/* Slots that the last step's last layer read of a unit (kv_step.c), for tests. */
const int32_t *rf_kv_select_last(const rf_kv_session *s, int64_t unit, int32_t *num);

/* --- kv_slide.c --- for sessions that slide */

/* A new prompt. */
void rf_kv_slide_start(rf_kv_session *s, int sequence);
/* Before a step to `slots` slots, the new one included: where the new token stands, and the sinks' turns in the control block. Waits
 * when the first token has gone and when the frame is used up. */
rf_status rf_kv_slide_place(rf_kv_session *s, int sequence, int32_t slots, int32_t *position, rf_error *err);
/* Turns the sinks of all sequences as the control block says. */
rf_status rf_kv_slide_sinks(rf_kv_session *s, rf_error *err);

/* --- kv_sentences.c --- rules with a penalty of sentences; nothing for others */

rf_status rf_kv_sentences_open(rf_kv_session *s, rf_error *err);
/* Is the sequence cut into sentences? Then all rows of its prompt pass the last layer. */
bool rf_kv_wants_sentences(const rf_kv_session *s, int sequence);
/* Behind a prompt's last layer, and behind a step's. Wait. */
rf_status rf_kv_sentences_prompt(rf_kv_session *s, int sequence, const int32_t *tokens, int32_t num, rf_error *err);
rf_status rf_kv_sentences_step(rf_kv_session *s, int first, int num, rf_error *err);
/* What is known by now. */
void rf_kv_sentences_show(const rf_kv_session *s, int sequence, rf_kv_stats *stats);

/* --- kv_packed.c --- */

/* For rules that pack (caching/kv/demote.h): session.packed. */
rf_status rf_kv_packed_create(rf_kv_session *s, rf_error *err);
void rf_kv_packed_destroy(rf_kv_session *s);
/* Rows begin.. of a prompt of num in a layer, queries turned in the staging session. Waits, where a rule looks at them. */
rf_status rf_kv_packed_rows(rf_kv_session *s, int32_t num, int32_t begin, int32_t rows, rf_error *err);
/* Behind a prompt's layer: chooses, packs, and gives the book its raw slots, whose rows are yet to be copied. */
rf_status rf_kv_packed_prompt(rf_kv_session *s, int layer, int sequence, int32_t num, const rf_kv_stats *stats,
                              rf_error *err);
/* Behind a step's attention to raw slots: that to packed tokens, joined. */
rf_status rf_kv_packed_attention(rf_kv_session *s, int layer, int first, int num, rf_error *err);
/* Behind a layer's attention, or behind the step where nothing is measured. *changed: raw slots went. */
rf_status rf_kv_packed_step(rf_kv_session *s, int layer, int sequence, bool *changed, rf_error *err);
/* Of all sequences now: packed tokens, and bytes of codes, scales, factors and what rules keep with them. */
void rf_kv_packed_info(const rf_kv_session *s, int64_t *tokens, size_t *bytes);
/* Device bytes, stores among them; 0 without. */
size_t rf_kv_packed_memory(const rf_kv_session *s, size_t *stores);
/* Tokens of a store; for tests. */
int32_t rf_kv_packed_count(const rf_kv_session *s, int layer, int sequence, int head, rf_kv_class of);
rf_kvq_store rf_kv_packed_store(const rf_kv_session *s, int layer, int sequence, rf_kv_class of);
/* Sum of the scores of what a head has and may lose; for tests. */
double rf_kv_packed_received(const rf_kv_session *s, int layer, int sequence, int head);
void rf_kv_packed_positions(const rf_kv_session *s, int sequence, int layer, int head, int32_t *out, int32_t *num);

/* --- kv_step.c --- */

/* One token each of sequences first..first + num - 1. head: statistics too. */
rf_status rf_kv_step_range(rf_kv_session *s, int first, int num, const int32_t *tokens, bool head, rf_error *err);
/* Algorithms for steps of one and of all sequences, on a device. */
rf_status rf_kv_plan_steps(rf_kv_session *s, rf_error *err);
/* Device lists of a sequence as its book left them. */
rf_status rf_kv_start_device(rf_kv_session *s, int sequence, rf_error *err);
rf_attention_args rf_kv_step_attention(const rf_kv_session *s, int layer, int first, int num, int64_t kv_len);

#endif
