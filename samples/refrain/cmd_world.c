/* samples/refrain/cmd_world.c - `refrain world`: actions in, frames of a world out. world_run.h says which file does what.
 *
 * Everything that can be refused is refused before the first frame. The noise of frame i follows from --seed and i alone, so runs
 * with other policies, contexts or outputs can be compared frame by frame. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "core/memory.h"
#include "samples/refrain/outputs.h"
#include "samples/refrain/play.h"
#include "samples/refrain/program.h"
#include "samples/refrain/world_run.h"

#define SHORT_SIDE 256 /* of a video, after enlarging */

/* Where the video goes, and that it can: its folder, its ending, its pattern. */
static rf_status check_outputs(world_run *run, rf_error *err) {
    const world_args *a = &run->args;
    if (a->strip) {
        size_t len = strlen(a->strip);
        if (len < 5 || strcasecmp(a->strip + len - 4, ".png") != 0 || strchr(a->strip, '%'))
            return rf_fail(err, RF_ERR_ARGUMENT, "--strip %s: one picture, expected a name in .png without %%",
                           a->strip);
        if (a->output && strcmp(a->strip, a->output) == 0)
            return rf_fail(err, RF_ERR_ARGUMENT, "--strip and --output are the same file, %s", a->strip);
        RF_TRY(output_check(a->strip, err));
    }
    if (a->trace) RF_TRY(output_check(a->trace, err));
    run->output = a->output;
    if (!run->output && !a->play) {
        rf_video_format format;
        run->output = rf_video_format_of("out.mp4", &format, NULL) == RF_OK ? "out.mp4" : "out.png";
    }
    if (!run->output) return RF_OK;
    RF_TRY(rf_video_format_of(run->output, &run->format, err));
    if (run->format != RF_VIDEO_FRAMES) return output_check(run->output, err);
    char *first = NULL;
    RF_TRY(output_name(&first, run->output, 0, 2, err));
    rf_status st = output_check(first, err);
    rf_free(first);
    return st;
}

static rf_status open_model(world_run *run, rf_error *err) {
    const world_args *a = &run->args;
    double start = now_ms();
    opened_world opened;
    rf_status st =
        open_world_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->model_path = opened.path;
    run->model_name = opened.name;
    run->backend = opened.backend;
    run->dtype = opened.dtype;
    run->model = opened.model;
    if (st != RF_OK) return st;
    run->info = rf_world_model_get_info(run->model);
    run->load_ms = now_ms() - start;
    return world_name_actions(run, err);
}

static rf_status plan_policy(world_run *run, rf_error *err) {
    RF_TRY(
        cache_args_policy(&run->policy, &run->args.cache, run->info.calibration, run->model_name, &run->preset, err));
    if (!run->policy) return RF_OK;
    run->cache_options = cache_options_text(run->policy, false);
    run->settings_options = cache_options_text(run->policy, true);
    if (run->cache_options && run->settings_options) return RF_OK;
    return rf_fail(err, RF_ERR_MEMORY, "no memory for the options of a policy");
}

/* What follows from the model's window, in the words of the options. */
static rf_status check_window(const world_run *run, rf_error *err) {
    const rf_world_options *o = &run->options;
    if (o->window > run->info.max_frames) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--window: %s was trained with %d frames, the new one included; found %d",
                       run->model_name, run->info.max_frames, o->window);
    }
    if (o->context == RF_CONTEXT_SINKS && o->num_sinks > o->window - 2) {
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--sinks: a window of %d has room for %d beside the frame before and the "
                       "new one; found %d",
                       o->window, o->window - 2, o->num_sinks);
    }
    return RF_OK;
}

static rf_status plan_options(world_run *run, rf_error *err) {
    const world_args *a = &run->args;
    rf_world_options o = rf_world_options_default();
    RF_TRY(plan_policy(run, err));
    o.num_steps = a->num_steps ? (int)a->num_steps : run->info.num_steps;
    o.stabilization_level = a->stabilization ? (int)a->stabilization : run->info.stabilization_level;
    o.window = a->window ? (int)a->window : run->info.max_frames;
    if (a->context && !rf_context_mode_from_name(a->context, &o.context))
        return rf_fail(err, RF_ERR_ARGUMENT, "--context: this build has no %s", a->context);
    if (a->num_sinks) o.num_sinks = (int)a->num_sinks;
    o.context_cache = !a->no_context_cache;
    if (!rf_rng_kind_from_name(a->rng, &o.rng))
        return rf_fail(err, RF_ERR_ARGUMENT, "--rng: this build has no %s", a->rng);
    if (strcmp(a->residual, "auto") != 0 && !rf_dtype_from_name(a->residual, &o.residual_dtype))
        return rf_fail(err, RF_ERR_ARGUMENT, "--residual-dtype: this build has no %s", a->residual);
    run->tuning_path = tuning_cache_path(false);
    o.gemm_tuning = run->tuning_path;
    o.policy = run->policy;
    if (a->carry && !rf_cache_carry_from_name(a->carry, &o.carry))
        return rf_fail(err, RF_ERR_ARGUMENT, "--carry: this build has no %s", a->carry);
    o.max_drift = a->cache.max_drift;
    o.force_policy = a->cache.force;
    o.record_trace = a->trace != NULL;
    run->options = o;
    RF_TRY(check_window(run, err));
    return rf_world_options_check(&o, run->model, err);
}

/* The reference of --compare: without the policy; where there is none, without keeping the context. */
static rf_status open_sessions(world_run *run, rf_error *err) {
    RF_TRY(rf_world_session_create(&run->session, run->model, &run->options, err));
    if (!run->args.compare) return RF_OK;
    rf_world_options reference = run->options;
    if (!run->policy) {
        reference.context_cache = false;
        reference.context = RF_CONTEXT_REBUILD;
    }
    reference.policy = NULL;
    reference.carry = RF_CARRY_OFF;
    reference.max_drift = 0;
    reference.force_policy = false;
    reference.record_trace = false;
    return rf_world_session_create(&run->reference, run->model, &reference, err);
}

static rf_status plan_run(world_run *run, rf_error *err) {
    const world_args *a = &run->args;
    uint32_t random = 0;
    RF_TRY(plan_options(run, err));
    RF_TRY(world_load_prompt(run, err));
    if (!a->play) RF_TRY(world_load_actions(run, err));
    run->seed = (uint64_t)a->seed;
    if (a->seed < 0) {
        if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) random = (uint32_t)(now_ms() * 1e3);
        run->seed = random;
    }
    int side = run->info.frame_width < run->info.frame_height ? run->info.frame_width : run->info.frame_height;
    run->scale = a->scale ? (int)a->scale : run->format == RF_VIDEO_FRAMES ? 1 : (SHORT_SIDE + side - 1) / side;
    run->fps = a->fps > 0 ? a->fps : run->info.fps;
    RF_TRY(open_sessions(run, err));
    return a->trace ? rf_file_writer_open(&run->trace, a->trace, err) : RF_OK;
}

static void free_quality(world_quality *quality) {
    rf_free(quality->psnr_db);
    rf_free(quality->ssim);
}

static void close_run(world_run *run) {
    rf_video_writer_discard(run->video);
    rf_file_writer_discard(run->trace);
    world_strip_destroy(run->strip);
    rf_world_session_destroy(run->session);
    rf_world_session_destroy(run->reference);
    rf_policy_destroy(run->policy);
    rf_free(run->cache_options);
    rf_free(run->settings_options);
    free_quality(&run->against_reference);
    free_quality(&run->against_simulator);
    free_quality(&run->reference_against_simulator);
    world_free_prompt(&run->prompt);
    rf_free(run->actions);
    rf_free(run->actions_text);
    rf_free(run->action_names);
    rf_free(run->rest);
    rf_free(run->frame_ms);
    rf_free(run->decode_ms);
    rf_free(run->reference_ms);
    rf_free(run->tuning_path);
    rf_world_model_close(run->model);
    rf_backend_close(run->backend);
    rf_free(run->model_path);
}

int cmd_world(int argc, char **argv) {
    static world_run run;
    rf_error err = {0};
    args_result parsed = world_read_args(&run.args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    run.start_ms = now_ms();
    run.log = program_log(run.args.quiet ? -1 : run.args.verbosity);
    cancel_install();

    rf_status st = cache_args_check(&run.args.cache, &err);
    if (st == RF_OK && run.args.play) st = play_check(&err);
    if (st == RF_OK) st = check_outputs(&run, &err);
    if (st == RF_OK) st = open_model(&run, &err);
    if (st == RF_OK) st = plan_run(&run, &err);
    if (st == RF_OK) {
        if (!run.args.quiet) world_say_plan(&run);
        st = run.args.play ? world_play(&run, &err) : world_rollout(&run, &err);
    }
    if (st == RF_OK) {
        double total_ms = now_ms() - run.start_ms;
        if (!run.args.quiet) world_say_result(&run, total_ms);
        if (run.args.json) st = world_print_json(&run, total_ms, &err);
        if (!run.args.json && !run.args.quiet) world_print_table(&run);
    }
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
