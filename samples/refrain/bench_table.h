/* samples/refrain/bench_table.h - timings to numbers, and numbers to a table (md, csv, json, jsonl). */
#ifndef REFRAIN_BENCH_TABLE_H
#define REFRAIN_BENCH_TABLE_H

#include "core/status.h"

#define BENCH_LABEL 256

typedef struct {
    const char *model, *device, *dtype, *what, *size;
    int64_t num_params;
    int batch;     /* rows of a forward, or pictures of a run */
    int num_steps; /* 0 for a forward */
    int num_runs;
    double median_ms, mean_ms, sd_ms, min_ms;
    double tflops;       /* of the transformer's matrix work at the median */
    double images_per_s; /* 0: not an image benchmark */
    double floor_ms;     /* 0: not measured */

    /* Rows of a world: another table. 0 where it has no meaning. */
    bool world;
    char label[BENCH_LABEL], size_text[32]; /* for what and size */
    int kept;                               /* frames in front of the newest */
    int frames;                             /* new ones in a timed run */
    double frames_per_s;
    size_t arena_bytes; /* device memory of the session */
    int graph_nodes;    /* of a captured step */

    /* Rows of text: a third table; label, kept (keys in front of the computed rows) and what follows it above count too. */
    bool text;
    int num_rows, head_rows; /* of a sequence: computed, and those that go through the head */
    double gbytes_per_s;     /* weights read once a pass, over the median */

    /* A step under a KV policy: a fourth table; of the rows of text kept (tokens of the prompt) and graph_nodes count. arena_bytes
     * are all that the session took on the device, weights apart. */
    bool kv;
    char policy[BENCH_LABEL];
    int budget; /* tokens a layer and key head; 0 = no limit */
    /* Of the prompt, medians: in all; scoring and moving what is kept, which may go on beside it; what it had to wait for that */
    double prefill_ms, score_ms, score_wait_ms;
    double none_prefill_ms; /* prefill_ms of policy none, the same prompt and batch; 0 = not measured */
    double step_score_ms;   /* of a step: what scoring while decoding made it wait */
    double kept_bytes, full_bytes, evictions; /* behind the prompt, all sequences */
} bench_row;

/* Fills num_runs, median, mean, sd and min from times (sorted in place). */
void bench_row_set_times(bench_row *row, double *times_ms, int num_times);

typedef enum { BENCH_MD = 0, BENCH_CSV, BENCH_JSON, BENCH_JSONL } bench_format;

/* All rows on standard output. RF_ERR_MEMORY. */
rf_status bench_print(const bench_row *rows, int num_rows, bench_format format, rf_error *err);

#endif
