/* samples/refrain/world_run.h - what the files of `refrain world` share.
 *
 *   cmd_world.c      order of work: options -> outputs writable? -> model -> first frames -> actions -> rollout or play -> report
 *   world_args.c     the option table and what excludes what
 *   world_init.c     first frames from a picture, a video or the simulator; action lists and the demonstration walk
 *   world_rollout.c  the loop over frames, with its reference run and its simulator
 *   world_report.c   --json, the settings inside PNGs, the quality table
 *   world_strip.c    the contact sheet
 *   play.c           --play; terminal.c and draw.c below it
 *
 * Frame 0 is the last frame of the prompt; frame i was made by row i - 1 of the actions. */
#ifndef REFRAIN_WORLD_RUN_H
#define REFRAIN_WORLD_RUN_H

#include <cjson/cJSON.h>

#include "caching/presets.h"
#include "core/file.h"
#include "core/video.h"
#include "dit/actions.h"
#include "dit/world.h"
#include "samples/refrain/args.h"
#include "samples/refrain/cache_args.h"
#include "samples/refrain/progress.h"
#include "samples/worlds/maze.h"

#define SIMULATOR_SAMPLES 3 /* rays a pixel side: what the shipped model was trained on */

typedef struct {
    const char *model, *synthetic, *init, *actions, *context, *carry, *rng, *residual, *output, *strip, *draw, *device,
        *dtype, *trace;
    cache_args cache;
    int64_t num_frames, num_steps, seed, window, num_sinks, stabilization, scale, threads; /* 0 = not given */
    double fps;                                                                            /* 0 = the model's */
    bool no_context_cache, compare, compare_simulator, play, strict, json, quiet;
    int verbosity;
} world_args;

/* The first frames, in the model's size. */
typedef struct {
    rf_image *frames; /* [num] */
    int num;
    bool simulated; /* from a seed: `simulator` is its state */
    maze_world simulator;
    char text[160]; /* "seed 3", "picture a.png", ... for people and settings */
} world_prompt;

/* One kind of comparison over the frames made. Unset until compared: num = 0. */
typedef struct {
    int num;
    double *psnr_db, *ssim; /* [frames made]; psnr_db infinite where equal, ssim NaN where frames are too small */
} world_quality;

typedef struct {
    double mean_psnr_db, mean_ssim, worst_psnr_db, worst_ssim;
    int worst_frame, first_under_30_db; /* frame numbers; first_under_30_db 0 = none */
} quality_summary;

/* What the rows of a strip show. */
enum { STRIP_SIMULATOR = 0, STRIP_REFERENCE, STRIP_MODEL, STRIP_KINDS };
typedef struct world_strip world_strip;

typedef struct {
    world_args args;
    char *model_path;
    const char *model_name; /* last element of it */
    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    rf_world_model *model;
    rf_world_model_info info;
    const char **action_names; /* [action_dim], entries may be NULL */
    float *rest;               /* [action_dim] what stands for doing nothing */

    world_prompt prompt;
    float *actions;     /* [num_actions][action_dim] */
    int num_actions;    /* = num_frames - 1 of a rollout */
    char *actions_text; /* the same in the text form, cut if it is very long */
    uint64_t seed;

    rf_policy *policy; /* NULL = none */
    rf_preset preset;
    char *cache_options, *settings_options; /* of the policy as text; the second without folders */
    rf_world_options options;
    rf_world_session *session, *reference; /* reference: --compare */

    rf_file_writer *trace;
    rf_video_writer *video;
    rf_video_format format;
    const char *output; /* NULL: nothing is written (--play) */
    char *tuning_path;
    int scale;
    double fps;
    char codec[64];
    world_strip *strip;
    progress_bar bar;

    int num_made;                                /* frames made by the session; also by --play */
    double *frame_ms, *decode_ms, *reference_ms; /* [num_actions] denoising and context; NULL while playing */
    double denoise_ms, context_ms, decode_sum_ms, reference_sum_ms;
    rf_world_session_info last; /* after the last frame */
    int64_t reference_forwards;
    /* this run against the reference; both against the simulator */
    world_quality against_reference, against_simulator, reference_against_simulator;

    double start_ms, load_ms, prompt_ms;
    char notes[4][256]; /* said when nothing can be refused any more: a refusal is one line */
    int num_notes;
} world_run;

void world_note(world_run *run, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- world_args.c ---- */

args_result world_read_args(world_args *args, int argc, char **argv);

/* ---- world_init.c ---- */

/* A value at a place of an action row; place -1 = there is none. */
typedef struct {
    int place;
    float value;
} world_act;
/* The first of some words ("turn-left left", "cameraX=-0.25") that is a name of the model. */
world_act world_find_act(const world_run *run, const char *words);
#define WORLD_TURN_LEFT  "turn-left turn_left cameraX=-0.25 left"
#define WORLD_TURN_RIGHT "turn-right turn_right cameraX=0.25 right"

/* Names of the model's actions and its row for rest. */
rf_status world_name_actions(world_run *run, rf_error *err);
rf_status world_load_prompt(world_run *run, rf_error *err);
void world_free_prompt(world_prompt *prompt);
/* [3][H][W] in [-1, 1] */
void world_to_planar(const rf_image *image, float *planar);
/* run->actions for the number of frames that was asked for. */
rf_status world_load_actions(world_run *run, rf_error *err);
/* A row as text: "left+forward", "cameraX=-0.5"; "none" for zeros. Cut to text_bytes. */
void world_action_text(const world_run *run, const float *row, char *text, size_t text_bytes);
/* The simulator's action of a row, or -1 if it has none. */
int world_simulator_action(const world_run *run, const float *row);

/* ---- world_rollout.c ---- */

rf_status world_rollout(world_run *run, rf_error *err);
/* Starts the session (and --compare's) from the prompt. */
rf_status world_start(world_run *run, rf_error *err);
/* run->video, where run->output is set. */
rf_status world_open_video(world_run *run, rf_error *err);
/* The line of the newest frame, where --trace is given. */
rf_status world_write_trace(world_run *run, int frame, rf_error *err);

/* ---- world_report.c ---- */

/* The settings as texts of a PNG: texts[0], texts[1] and what they borrow. */
typedef struct {
    rf_png_text texts[2];
    char *parameters, *json;
} world_settings;
rf_status world_settings_make(const world_run *run, world_settings *out, rf_error *err);
void world_settings_free(world_settings *settings);
quality_summary world_summarize(const world_quality *quality);
void world_say_plan(const world_run *run);
void world_say_result(const world_run *run, double total_ms);
void world_print_table(const world_run *run);
rf_status world_print_json(const world_run *run, double total_ms, rf_error *err);
/* "keep", "rebuild", "2 sinks"... and the window, for people. */
const char *world_policy_name(const world_run *run);

/* ---- world_strip.c ---- */

/* num_frames of the whole rollout, frame 0 included. kinds: bits 1 << STRIP_... */
rf_status world_strip_create(world_strip **out, int num_frames, unsigned kinds, int width, int height, rf_error *err);
/* Does the strip show this frame? */
bool world_strip_wants(const world_strip *strip, int frame);
/* label: under the column, may be NULL; value: beside it for this picture, NaN = none. */
rf_status world_strip_place(world_strip *strip, int kind, int frame, const rf_image *picture, const char *label,
                            double psnr_db, rf_error *err);
rf_status world_strip_save(world_strip *strip, const char *path, const char *title, const rf_png_text *texts,
                           size_t num_texts, rf_error *err);
void world_strip_destroy(world_strip *strip); /* NULL is a no-op */

/* ---- play.c ---- */

rf_status world_play(world_run *run, rf_error *err);

#endif
