/* samples/refrain/sweep_run.h - what the files of `refrain sweep` share.
 *
 *   cmd_sweep.c     options, the plan, the loop over settings, searches, what is printed
 *   sweep_images.c  what is measured is a picture: its denoising loop
 *   sweep_worlds.c  what is measured is a new frame of a walk: denoising, and the frames in front of it
 *   sweep_text.c    what is measured is a sample of a task: its decoding
 *   sweep_plan.c    specs to settings; sweep_store.c the results on disk; sweep_report.c, sweep_plot.c, sweep_frames.c the report
 *
 * "Picture" below is any of them. The reference are those of the uncached run, and so many floats that both fit memory. */
#ifndef REFRAIN_SWEEP_RUN_H
#define REFRAIN_SWEEP_RUN_H

#include "samples/refrain/args.h"
#include "samples/refrain/kv_args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/sweep_plan.h"
#include "samples/refrain/sweep_store.h"

#define SWEEP_BASE_WINDOW 3 /* timings of the uncached loop that a speed-up is against */
#define SWEEP_MAX_SHOWN   8

typedef struct {
    const char *model, *synthetic, *sampler, *device, *dtype, *fewer_steps, *report, *context, *tasks, *guide;
    arg_list policies, classes, inits, actions;
    /* 0 = not given, but seed */
    int64_t num_pictures, num_steps, seed, batch, threads, repeats, width, height, num_frames, num_walks, window,
        num_sinks;
    double cfg_scale; /* NaN = not given */
    double target_psnr, target_ssim, target_speedup;
    kv_args kv;
    bool json, quiet, force, is_kv, agnostic; /* is_kv: policies of an autoregressive model's cache */
} sweep_args;

/* All pictures through one session. */
typedef struct {
    float *latents, *pictures; /* where to, or both NULL */
    uint8_t *kinds;            /* [num_steps] steps of one picture, or NULL */
    double ms;                 /* out: without decoding */
    bool has_cache;
    rf_cache_counts cache; /* summed */
    /* worlds, summed over walks; decode_ms only with pictures */
    double denoise_ms, context_ms, decode_ms;
    int64_t frame_forwards;
    size_t arena_bytes;
} sweep_loop;

typedef struct sweep_run sweep_run;

typedef struct {
    /* Device, model, what can be refused, and run->store. */
    rf_status (*open)(sweep_run *run, rf_error *err);
    /* A session of a setting; NULL: the uncached one, which also gives run->reference its shapes. */
    rf_status (*create)(sweep_run *run, const sweep_setting *setting, void **session, rf_error *err);
    void (*destroy)(void *session);
    rf_status (*loop)(sweep_run *run, void *session, sweep_loop *loop, rf_error *err);
    /* run->reference has just been computed or loaded: anything more to measure against? */
    rf_status (*prepare)(sweep_run *run, rf_error *err);
    /* Of run->pictures and run->latents; NULL: as pictures. */
    rf_status (*quality)(sweep_run *run, sweep_row *row, rf_error *err);
    /* What only this kind measures of a setting, whose pictures are in run->pictures. */
    rf_status (*measure)(sweep_run *run, const sweep_loop *loop, sweep_row *row, rf_error *err);
    void (*say_plan)(const sweep_run *run);
    void (*close)(sweep_run *run);
} sweep_kind;
extern const sweep_kind sweep_images, sweep_worlds, sweep_texts;

struct sweep_run {
    sweep_args args;
    const sweep_kind *kind;
    bool is_world, is_text, is_block_causal;
    void *own; /* of the kind */
    char *model_path, *tuning_path;
    const char *model_name;
    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    void *base; /* the uncached session */
    int num_pictures, batch, repeats, num_steps;
    bool slides;                           /* worlds: frames leave the window */
    bool warms_up;                         /* a first run that does not count */
    int shown[SWEEP_MAX_SHOWN], num_shown; /* pictures that are saved for the report */

    kv_settings kv; /* which the plan borrows from */
    sweep_plan plan;
    sweep_store *store;
    sweep_reference reference;
    float *latents, *pictures; /* of the setting at work */
    double based_ms;           /* when the uncached loop was timed last */
    double start_ms;
    int num_done, num_todo; /* in this process */
};

/* RF_ERR_CANCELLED with how far the sweep has come. */
rf_status sweep_interrupted(const sweep_run *run, rf_error *err);
/* pictures/STEM-INDEX.png of a planar picture, where there is a report. */
rf_status sweep_save_picture(const sweep_run *run, const float *planar, const char *stem, int index, rf_error *err);
void sweep_add_counts(rf_cache_counts *sum, const rf_cache_counts *one);
/* --batch, or `most` at most, as a divisor of num. */
rf_status sweep_choose_batch(sweep_run *run, int num, int most, const char *what, rf_error *err);

#endif
