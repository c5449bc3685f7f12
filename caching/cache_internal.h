/* caching/cache_internal.h - the runtime's inside, shared by cache.c (planning, on the host) and cache_work.c (what is queued). */
#ifndef RF_CACHING_CACHE_INTERNAL_H
#define RF_CACHING_CACHE_INTERNAL_H

#include "caching/cache.h"

/* What changes from step to step and is uploaded in front of a group's work: one block, the same on host and device.
 * Pointers into the block at `base`; host side or device side. */
typedef struct {
    /* by packed group */
    int32_t *index;        /* [G] state group */
    int32_t *samples;      /* [B] image of packed image */
    int32_t *image_of;     /* [G] image of packed group */
    int32_t *write_output; /* [G] slot * G + state group that a store writes; likewise span, part */
    int32_t *write_span, *write_part;
    int32_t *newest_span; /* [G] slot * G + state group of the newest snapshot */
    int32_t *write_probe, *newest_probe;
    /* by state group */
    int32_t *ages;   /* [G][3] slots of the three newest outputs after this step's store */
    float *gaps;     /* [G][2] */
    float *weights;  /* [G][classes][slots] by slot */
    int32_t *counts; /* [num_attention]: token rows of the blocks with an attention; the step */
} block_view;

/* Device memory of the session. G state groups, N tokens, D width, O outputs. */
typedef struct {
    char *block;
    int32_t *identity;                     /* [G] 0, 1, 2, ... */
    float *input, *input_prev, *input_ref; /* [B, N, in_cols] */
    void *modulated_prev;                  /* [G, N, D] feature dtype */
    float *output_ring, *output_ref;       /* [slots][G, N, O], [G, N, O] */
    void *span_ring[RF_CACHE_MAX_SPANS];   /* [slots][G, N, D] feature dtype */
    void *span_in[RF_CACHE_MAX_SPANS];     /* [G, N, D] residual dtype, packed */
    void *part_ring;                       /* [sites][slots][G, N, D] feature dtype */
    void *probe_in, *probe_x;              /* [G, N, D] residual dtype: packed, by state */
    void *probe_now, *probe_ref;           /* [G, N, D], [slots of depth 1][G, N, D] feature dtype, by state */
    void *scratch[2];                      /* [G, N, max(D, O)] f32 */
    void *verify[2];                       /* [G, N, D] residual dtype, packed */
    float *signals;                        /* [RF_SIGNAL_COUNT][G][4], then drift [streams][G][horizon] */
    int32_t *post_count;                   /* [1] */
    float *reduce_workspace;
    float *curvature_workspace, *kappa;                            /* kappa [streams][G, N] */
    uint8_t *row_class;                                            /* [G, N, class_cells] */
    float *row_scores, *ages, *select_workspace, *score_workspace; /* [num_attention][G, N] */
    float *lse;
    int32_t *rows_packed, *rows_state, *place; /* [num_attention][G * N] */
    void *qkv;                                 /* [blocks with attention][G, N, 3, H, d] */
} device_buffers;

/* One image's side of a run. */
typedef struct {
    void *state; /* the policy's */
    int num_stored;
    int stored[RF_CACHE_MAX_TERMS];
    int signal_steps[RF_SIGNAL_COUNT];
    float signals[RF_SIGNAL_COUNT][2][4];
    float drift[RF_CACHE_MAX_STREAMS * 2][RF_CACHE_MAX_HORIZON];
    bool force;
    bool carried; /* the run began with a snapshot of the run before */
    int64_t base; /* LAST: pushes of earlier runs */
} image_state;

struct rf_cache {
    const rf_policy *policy;
    const rf_policy_def *def;
    rf_cache_shape shape;
    rf_cache_layout layout;
    rf_cache_dtypes dtypes;
    rf_cache_options options;
    rf_stream *stream;
    const rf_ops *ops;

    int all_groups;    /* G */
    int num_sites;     /* parts that have a ring */
    int *site_of;      /* [num_blocks * num_parts]: ring of a part, -1 none */
    int *attention_of; /* [num_blocks]: which SELF part, -1 none; token rows are chosen for each of them */
    int num_attention;
    int part_depth, last_part; /* depth of part rings; index of the last part of all (drift guard), -1 */
    int num_streams;           /* 1..; of the outputs */
    const rf_cache_stream *streams;
    int64_t class_cells;        /* classes of an output row, each for out_cols / class_cells columns */
    int num_slots, num_classes; /* of the weights */
    uint32_t signals;           /* measured */
    bool reads;                 /* somebody looks at them on the host */
    int horizon;

    void *memory;
    size_t memory_bytes;
    device_buffers d;
    block_view on_device;
    size_t block_bytes;

    /* host */
    char *staging; /* page-locked ring of blocks */
    int staging_blocks, staging_next;
    char *last_block; /* what the device has, NULL content = unknown */
    bool last_valid;
    float *history; /* page-locked [num_steps][signal floats]: [RF_SIGNAL_COUNT][G][4], drift [streams][G][horizon] */
    size_t signal_floats;
    int32_t *host_count;   /* page-locked: posts that have arrived */
    int32_t num_posts;     /* that have been queued */
    bool measured, unread; /* something to download; downloads or posts not waited for */
    bool unread_copy;      /* among them a copy */
    bool posted;           /* this step's signals are on their way */
    bool waited;           /* the latest plan read signals back */
    bool head_in;          /* the signals at the start of the next step came with the last download */
    void *states;
    image_state *images;

    /* plans of the run, [num_steps * B], for groups and the trace */
    rf_step_plan *plans;
    uint8_t *plan_parts;
    int32_t *plan_rows;
    bool *plan_forced, *plan_carried;
    uint32_t *plan_measured; /* signals of that image at that step */
    uint8_t *kinds;          /* [B * num_steps] */

    rf_cache_group *groups; /* [2 * B] */
    int *members;           /* [2 * B * B] images of a group */
    int num_groups;
    int step;
    rf_cache_counts counts;
};

/* Elements between two slots of a ring of this many columns. */
static inline int64_t rf_cache_slot_stride(const rf_cache *c, int64_t cols) {
    return c->all_groups * c->shape.tokens * cols;
}

/* Slots of a ring that is to hold `depth` snapshots: with RF_CARRY_FIRST slot 0 is the run's first push, which stays, and the others
 * go round in the rest. */
static inline int rf_cache_slots(const rf_cache *c, int depth) {
    return depth > 0 && c->options.carry == RF_CARRY_FIRST ? depth + 1 : depth;
}

block_view rf_cache_block_view(const rf_cache *cache, char *base);

#endif
