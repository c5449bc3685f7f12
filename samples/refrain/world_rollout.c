/* samples/refrain/world_rollout.c - the loop over frames. Memory does not grow with their number, but for a few numbers of each.
 *
 * With --compare a second session makes every frame right after the first one, from the same noise: nothing of it is kept
 * but the quality. Both are warmed up before they are timed: on CUDA by a walk past the window, so that every kind of step
 * has been captured, on the host by one frame, which touches all memory. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "core/metrics.h"
#include "samples/refrain/outputs.h"
#include "samples/refrain/program.h"
#include "samples/refrain/world_run.h"

/* ---- starting ---- */

rf_status world_start(world_run *run, rf_error *err) {
    int most = run->options.window - 1, num = run->prompt.num < most ? run->prompt.num : most;
    size_t frame = (size_t)run->info.frame_width * (size_t)run->info.frame_height * 3;
    float *planar = rf_alloc_zero((size_t)num, frame * sizeof *planar);
    if (!planar) return rf_fail(err, RF_ERR_MEMORY, "--init: no memory for %d frames", num);
    for (int i = 0; i < num; i++)
        world_to_planar(&run->prompt.frames[run->prompt.num - num + i], planar + (size_t)i * frame);
    double start = now_ms();
    rf_status st = rf_world_session_start(run->session, planar, num, NULL, &run->seed, err);
    run->prompt_ms = now_ms() - start;
    if (st == RF_OK && run->reference) st = rf_world_session_start(run->reference, planar, num, NULL, &run->seed, err);
    rf_free(planar);
    return st;
}

static rf_status warm_up(world_run *run, rf_error *err) {
    if (!run->reference) return RF_OK;
    bool cuda = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    int num = cuda ? 2 * run->options.window : 1;
    if (num > run->num_actions) num = run->num_actions;
    RF_TRY(world_start(run, err));
    for (int i = 0; i < num && !cancel_requested(); i++) {
        const float *row = run->actions + (size_t)i * (size_t)run->info.action_dim;
        RF_TRY(rf_world_session_step(run->session, row, NULL, err));
        RF_TRY(rf_world_session_step(run->reference, row, NULL, err));
    }
    return RF_OK;
}

/* ---- what goes out ---- */

rf_status world_open_video(world_run *run, rf_error *err) {
    world_settings settings;
    if (!run->output) return RF_OK;
    RF_TRY(world_settings_make(run, &settings, err));
    rf_video_options options = {.width = run->info.frame_width,
                                .height = run->info.frame_height,
                                .fps = run->fps,
                                .scale = run->scale,
                                .texts = settings.texts,
                                .num_texts = 2};
    rf_status st = rf_video_writer_open(&run->video, run->output, &options, err);
    if (st == RF_OK) snprintf(run->codec, sizeof run->codec, "%s", rf_video_writer_codec(run->video));
    world_settings_free(&settings);
    return st;
}

static rf_status write_trace_line(void *user, const char *json, rf_error *err) {
    (void)err; /* commit reports what could not be written */
    rf_file_writer_write(user, json, strlen(json));
    rf_file_writer_write(user, "\n", 1);
    return RF_OK;
}

rf_status world_write_trace(world_run *run, int frame, rf_error *err) {
    if (!run->trace) return RF_OK;
    return rf_world_session_write_trace(run->session, frame, write_trace_line, run->trace, err);
}

/* ---- the loop ---- */

/* Room for one frame in every form. */
typedef struct {
    float *made, *reference, *truth; /* planar; the last two only where wanted */
    rf_image truth_picture;
    maze_world simulator;
} buffers;

static rf_status alloc_quality(world_quality *quality, bool wanted, int num, rf_error *err) {
    if (!wanted) return RF_OK;
    quality->psnr_db = rf_alloc_zero((size_t)num, sizeof *quality->psnr_db);
    quality->ssim = rf_alloc_zero((size_t)num, sizeof *quality->ssim);
    if (quality->psnr_db && quality->ssim) return RF_OK;
    return rf_fail(err, RF_ERR_MEMORY, "no memory for the quality of %d frames", num);
}

static rf_status alloc_buffers(world_run *run, buffers *b, rf_error *err) {
    static const uint8_t black[3] = {0, 0, 0};
    bool compare = run->args.compare, simulator = run->args.compare_simulator;
    size_t values = (size_t)run->info.frame_width * (size_t)run->info.frame_height * 3, num = (size_t)run->num_actions;
    run->frame_ms = rf_alloc_zero(num, sizeof *run->frame_ms);
    run->decode_ms = rf_alloc_zero(num, sizeof *run->decode_ms);
    run->reference_ms = rf_alloc_zero(num, sizeof *run->reference_ms);
    b->made = rf_alloc_zero(values, sizeof *b->made);
    b->reference = rf_alloc_zero(compare ? values : 1, sizeof *b->reference);
    b->truth = rf_alloc_zero(simulator ? values : 1, sizeof *b->truth);
    if (!run->frame_ms || !run->decode_ms || !run->reference_ms || !b->made || !b->reference || !b->truth)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a rollout of %d frames", run->num_actions + 1);
    RF_TRY(alloc_quality(&run->against_reference, compare, run->num_actions, err));
    RF_TRY(alloc_quality(&run->against_simulator, simulator, run->num_actions, err));
    RF_TRY(alloc_quality(&run->reference_against_simulator, compare && simulator, run->num_actions, err));
    b->simulator = run->prompt.simulator;
    if (!simulator) return RF_OK;
    return rf_image_create(&b->truth_picture, run->info.frame_width, run->info.frame_height, black, err);
}

static void free_buffers(buffers *b) {
    rf_free(b->made);
    rf_free(b->reference);
    rf_free(b->truth);
    rf_image_free(&b->truth_picture);
}

static rf_status measure(const world_run *run, world_quality *quality, const float *a, const float *b, rf_error *err) {
    rf_picture_metrics m;
    if (!quality->psnr_db) return RF_OK;
    RF_TRY(rf_metric_picture(a, b, 3, run->info.frame_height, run->info.frame_width, &m, err));
    quality->psnr_db[quality->num] = m.psnr_db;
    quality->ssim[quality->num] = m.ssim;
    quality->num++;
    return RF_OK;
}

/* The session's new frame `frame` into b->made, with its times. */
static rf_status make_frame(world_run *run, buffers *b, int frame, const float *row, rf_error *err) {
    RF_TRY(rf_world_session_step(run->session, row, NULL, err));
    RF_TRY(rf_world_session_read_frame(run->session, b->made, err));
    rf_world_session_info s = rf_world_session_get_info(run->session);
    run->frame_ms[frame - 1] = s.denoise_ms + s.context_ms;
    run->decode_ms[frame - 1] = s.decode_ms;
    run->denoise_ms += s.denoise_ms;
    run->context_ms += s.context_ms;
    run->decode_sum_ms += s.decode_ms;
    run->last = s;
    run->num_made = frame;
    return world_write_trace(run, frame, err);
}

static rf_status make_reference(world_run *run, buffers *b, int frame, const float *row, rf_error *err) {
    if (!run->reference) return RF_OK;
    RF_TRY(rf_world_session_step(run->reference, row, NULL, err));
    RF_TRY(rf_world_session_read_frame(run->reference, b->reference, err));
    rf_world_session_info s = rf_world_session_get_info(run->reference);
    run->reference_ms[frame - 1] = s.denoise_ms + s.context_ms;
    run->reference_sum_ms += run->reference_ms[frame - 1];
    run->reference_forwards = s.frame_forwards;
    return measure(run, &run->against_reference, b->made, b->reference, err);
}

static rf_status make_truth(world_run *run, buffers *b, const float *row, rf_error *err) {
    if (!run->args.compare_simulator) return RF_OK;
    maze_step(&b->simulator, world_simulator_action(run, row));
    maze_render(&b->simulator, run->info.frame_width, run->info.frame_height, SIMULATOR_SAMPLES, b->truth_picture.rgb);
    world_to_planar(&b->truth_picture, b->truth);
    RF_TRY(measure(run, &run->against_simulator, b->made, b->truth, err));
    return measure(run, &run->reference_against_simulator, b->reference, b->truth, err);
}

static rf_status place_on_strip(world_run *run, const buffers *b, int frame, const rf_image *made, rf_error *err) {
    char label[128] = "start";
    const double unknown = (double)NAN;
    if (!world_strip_wants(run->strip, frame)) return RF_OK;
    if (frame > 0)
        world_action_text(run, run->actions + (size_t)(frame - 1) * (size_t)run->info.action_dim, label, sizeof label);
    const double *reference = run->against_reference.psnr_db, *simulator = run->against_simulator.psnr_db;
    const double *own = simulator ? simulator : reference;
    RF_TRY(
        world_strip_place(run->strip, STRIP_MODEL, frame, made, label, own && frame ? own[frame - 1] : unknown, err));
    if (run->reference) {
        rf_image picture = {0};
        const double *truth = run->reference_against_simulator.psnr_db;
        if (frame > 0) RF_TRY(rf_image_from_planar(&picture, b->reference, made->width, made->height, err));
        rf_status st = world_strip_place(run->strip, STRIP_REFERENCE, frame, frame ? &picture : made, NULL,
                                         truth && frame ? truth[frame - 1] : unknown, err);
        rf_image_free(&picture);
        RF_TRY(st);
    }
    if (!run->args.compare_simulator) return RF_OK;
    return world_strip_place(run->strip, STRIP_SIMULATOR, frame, frame ? &b->truth_picture : made, NULL, unknown, err);
}

static rf_status deliver(world_run *run, const buffers *b, int frame, const rf_image *made, rf_error *err) {
    if (run->video) RF_TRY(rf_video_writer_add(run->video, made->rgb, err));
    return run->strip ? place_on_strip(run, b, frame, made, err) : RF_OK;
}

/* Frames a second and what was reused so far, beside the bar. */
static void note_speed(world_run *run) {
    const rf_cache_counts *c = &run->last.total;
    double seconds = (now_ms() - run->bar.start_ms) / 1e3;
    int64_t steps = c->steps_full + c->steps_partial + c->steps_skipped;
    char reuse[24] = "";
    if (run->last.has_cache && steps > 0)
        snprintf(reuse, sizeof reuse, ", %.0f%% skipped", 100.0 * (double)c->steps_skipped / (double)steps);
    snprintf(run->bar.note, sizeof run->bar.note, "%.3g frames/s%.24s", seconds > 0 ? run->num_made / seconds : 0,
             reuse);
}

static rf_status cancelled(const world_run *run, rf_error *err) {
    return rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d of %d frames; nothing is written", run->num_made + 1,
                   run->num_actions + 1);
}

static rf_status make_frames(world_run *run, buffers *b, rf_error *err) {
    RF_TRY(world_start(run, err));
    RF_TRY(deliver(run, b, 0, &run->prompt.frames[run->prompt.num - 1], err));
    int sessions = run->reference ? 2 : 1, steps = run->options.num_steps;
    int64_t total = (int64_t)run->num_actions * sessions;
    progress_begin(&run->bar, total * steps > INT32_MAX ? INT32_MAX : (int)(total * steps), run->args.quiet);
    for (int frame = 1; frame <= run->num_actions; frame++) {
        const float *row = run->actions + (size_t)(frame - 1) * (size_t)run->info.action_dim;
        rf_image made = {0};
        if (cancel_requested()) return cancelled(run, err);
        RF_TRY(make_frame(run, b, frame, row, err));
        RF_TRY(make_reference(run, b, frame, row, err));
        RF_TRY(make_truth(run, b, row, err));
        RF_TRY(rf_image_from_planar(&made, b->made, run->info.frame_width, run->info.frame_height, err));
        rf_status st = deliver(run, b, frame, &made, err);
        rf_image_free(&made);
        RF_TRY(st);
        note_speed(run);
        progress_update(&run->bar, frame * sessions * steps);
    }
    return cancel_requested() ? cancelled(run, err) : RF_OK;
}

static rf_status save_strip(world_run *run, rf_error *err) {
    char title[256];
    world_settings settings;
    if (!run->strip) return RF_OK;
    const char *measured = run->args.compare_simulator ? "; dB: PSNR to the simulator"
                           : run->reference            ? "; dB: PSNR to uncached"
                                                       : "";
    snprintf(title, sizeof title, "%s, %s, %d steps a frame, %s%s", run->model_name, run->prompt.text,
             run->options.num_steps, run->policy ? world_policy_name(run) : "no policy", measured);
    RF_TRY(world_settings_make(run, &settings, err));
    rf_status st = world_strip_save(run->strip, run->args.strip, title, settings.texts, 2, err);
    world_settings_free(&settings);
    return st;
}

/* Files appear last: a failure before leaves none of them. */
static rf_status commit(world_run *run, rf_error *err) {
    rf_video_writer *video = run->video;
    rf_file_writer *trace = run->trace;
    RF_TRY(save_strip(run, err));
    run->trace = NULL;
    if (trace) RF_TRY(rf_file_writer_commit(trace, err));
    run->video = NULL;
    return video ? rf_video_writer_commit(video, err) : RF_OK;
}

rf_status world_rollout(world_run *run, rf_error *err) {
    buffers b = {0};
    rf_status st = alloc_buffers(run, &b, err);
    unsigned kinds = 1U << STRIP_MODEL;
    if (run->args.compare) kinds |= 1U << STRIP_REFERENCE;
    if (run->args.compare_simulator) kinds |= 1U << STRIP_SIMULATOR;
    if (st == RF_OK && run->args.strip) {
        st = world_strip_create(&run->strip, run->num_actions + 1, kinds, run->info.frame_width, run->info.frame_height,
                                err);
    }
    if (st == RF_OK) st = warm_up(run, err);
    if (st == RF_OK) st = world_open_video(run, err);
    if (st == RF_OK) st = make_frames(run, &b, err);
    progress_end(&run->bar);
    if (st == RF_OK) st = commit(run, err);
    free_buffers(&b);
    return st;
}
