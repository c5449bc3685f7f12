/* samples/refrain/bench_run.h - what the files of `refrain bench` share: cmd_bench.c (forwards and images), bench_world.c (worlds),
 * bench_text.c (passes of text models), bench_kv.c (steps of autoregressive ones under a KV policy). */
#ifndef REFRAIN_BENCH_RUN_H
#define REFRAIN_BENCH_RUN_H

#include "samples/refrain/args.h"
#include "samples/refrain/bench_table.h"
#include "samples/refrain/kv_args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/text_model.h"

#define MAX_BATCHES 32

typedef struct {
    const char *model, *synthetic, *what, *batches, *format, *device, *dtype, *residual, *tuning, *rows, *kept;
    arg_list policies;
    kv_args kv;
    int64_t num_runs, num_steps, width, height, threads, num_frames; /* num_steps, num_frames: 0 = not given */
    double cfg_scale;
    bool tune, floors, quiet, no_context_cache, is_kv; /* is_kv: policies of the cache */
    int verbosity;
} bench_args;

typedef struct {
    bench_args args;
    int batches[MAX_BATCHES];
    int num_batches;
    char *model_path;
    const char *model_name;
    char *tuning_path; /* NULL = none */
    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    rf_image_model *model;
    rf_world_model *world;
    opened_text text;                       /* --what text */
    kv_settings kv;                         /* --kv */
    double copy_bytes_per_ms, flops_per_ms; /* measured; 0 = not asked for */
    double *times;                          /* [num_runs] */
} bench;

/* --what text: rows and kept keys to be timed, and the model for them. */
rf_status bench_text_open(bench *b, rf_error *err);
/* All rows of text; *rows is rf_alloc'ed, also after a failure. */
rf_status bench_texts(bench *b, bench_row **rows, int *num_rows, rf_error *err);
/* --what text with policies of the cache: the settings, and the rows as above. The most positions that are wanted, 0 = as many as the
 * model has. */
rf_status bench_kv_plan(bench *b, int64_t *most, rf_error *err);
rf_status bench_kv(bench *b, bench_row **rows, int *num_rows, rf_error *err);
/* "2,16,64": numbers min..max, at most MAX_BATCHES. option: for messages. */
rf_status bench_read_numbers(const char *text, const char *option, int min, int max, int *out, int *num, rf_error *err);

/* All rows of worlds; *rows is rf_alloc'ed, also after a failure. */
rf_status bench_worlds(bench *b, bench_row **rows, int *num_rows, rf_error *err);

#endif
