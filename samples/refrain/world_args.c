/* samples/refrain/world_args.c - the options of `refrain world`. */
#include "samples/refrain/program.h"
#include "samples/refrain/world_run.h"

#define DEFAULT_SEED 42
#define MAX_FRAMES   (RF_MAX_ACTIONS + 1)
#define NOT_GIVEN    INT64_MIN /* --frames 0 is a wrong number */

/* Rules between options; the first that is broken is told. */
static bool check(const world_args *a) {
    bool has_policy = cache_args_wanted(&a->cache);
    bool sinks = a->context && a->context[0] == 's';
    const char *play_excludes = a->compare             ? "compare"
                                : a->compare_simulator ? "compare-simulator"
                                : a->strip             ? "strip"
                                : a->actions           ? "actions"
                                                       : NULL;
    if (a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
    } else if (a->num_frames != NOT_GIVEN && (a->num_frames < 2 || a->num_frames > MAX_FRAMES)) {
        say_error("--frames: expected 2..%d (the first is the prompt's last; an action list has at most %d rows), "
                  "found %jd",
                  MAX_FRAMES, RF_MAX_ACTIONS, (intmax_t)a->num_frames);
    } else if (a->num_sinks > 0 && !sinks) {
        say_error("--sinks: only --context sinks keeps frames for ever");
    } else if (a->no_context_cache && a->context && a->context[0] != 'r') {
        say_error("--no-context-cache and --context %s exclude each other: everything is computed again", a->context);
    } else if (a->carry && !has_policy) {
        say_error("--carry: no policy is chosen (--cache-mode, --cache-preset or --replay)");
    } else if (a->trace && !has_policy) {
        say_error("--trace: no policy is chosen (--cache-mode, --cache-preset or --replay)");
    } else if (a->compare && !has_policy && a->no_context_cache) {
        say_error("--compare: with --no-context-cache and no policy there is nothing to compare");
    } else if (a->play && play_excludes) {
        say_error("--play and --%s exclude each other", play_excludes);
    } else if (a->draw && !a->play) {
        say_error("--draw: how --play draws; there is no --play");
    } else {
        return true;
    }
    return false;
}

args_result world_read_args(world_args *a, int argc, char **argv) {
    *a = (world_args){.rng = "counter",
                      .device = "auto",
                      .dtype = "auto",
                      .residual = "auto",
                      .num_frames = NOT_GIVEN,
                      .seed = DEFAULT_SEED};
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: maze)", &a->model),
        arg_string("init", 'i', "FILE|SEED", "picture, video, or seed of the simulator", &a->init),
        arg_string("actions", 'a', "LIST|FILE", "\"forward*20,left+forward*4\", .json, .csv", &a->actions),
        arg_int("frames", 'n', "N", "with the prompt's last (default: 1 + actions)", &a->num_frames, -9e18, 9e18),
        arg_int("steps", 0, "N", "denoising steps a frame (default: the model's)", &a->num_steps, 1, 1000),
        arg_int("seed", 's', "N", "of the noise; negative: random (default: 42)", &a->seed, -9e18, 9e18),
        arg_string("output", 'o', "FILE", "x.mp4, x.png (animated), f/%04d.png (out.mp4)", &a->output),
        arg_string("strip", 0, "FILE.png", "a sheet of up to 32 frames and their actions", &a->strip),
        arg_int("scale", 0, "N", "enlarge what is written (default: to 256 pixels)", &a->scale, 1, 64),
        arg_double("fps", 0, "X", "of the video (default: the model's)", &a->fps, 0.01, 1000),
        arg_choice("context", 0, "full window: rebuild, keep, sinks (rebuild)", &a->context, "rebuild keep sinks"),
        arg_int("sinks", 0, "N", "frames that never leave (default: 2)", &a->num_sinks, 1, 4096),
        arg_int("window", 0, "N", "frames seen, the new one too (the model's)", &a->window, 2, 65536),
        arg_int("stabilization", 0, "N", "noise level context is told (default: model's)", &a->stabilization, 1, 1000),
        arg_flag("no-context-cache", 0, "compute the whole window again every step", &a->no_context_cache),
        CACHE_ARG_ROWS(&a->cache),
        arg_choice("carry", 0, "history of the last frame: off, first, last (off)", &a->carry, "off first last"),
        arg_string("trace", 0, "FILE", "what each step computed and reused, JSON lines", &a->trace),
        arg_flag("compare", 0, "also run uncached: quality by frame, speed-up", &a->compare),
        arg_flag("compare-simulator", 0, "quality by frame against the simulator", &a->compare_simulator),
        arg_flag("play", 0, "walk about in the terminal; ? shows the keys", &a->play),
        arg_choice("draw", 0, "--play: auto, blocks, kitty, sixel (default: auto)", &a->draw,
                   "auto blocks kitty sixel"),
        arg_flag("strict", 0, "refuse first frames of another size", &a->strict),
        arg_choice("rng", 0, "counter, torch-cpu, torch-cuda (default: counter)", &a->rng,
                   "counter torch-cpu torch-cuda"),
        arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &a->device),
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &a->dtype, "auto f32 bf16"),
        arg_choice("residual-dtype", 0, "auto, f32, bf16 (default: --dtype)", &a->residual, "auto f32 bf16"),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_string("synthetic-weights", 0, "CONFIG", "random weights: oasis-500m, a config.json", &a->synthetic),
        arg_flag("json", 0, "a JSON object about the run on standard output", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
        arg_count("verbose", 'v', "say more; twice for debugging", &a->verbosity),
    };
    const arg_spec spec = {.command = "refrain world",
                           .usage = "[options]",
                           .about = "Walks through a world model: frames from actions, written as a video.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0]};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result != ARGS_OK) return result;
    if (!check(a)) return ARGS_USAGE_ERROR;
    if (a->num_frames == NOT_GIVEN) a->num_frames = 0;
    return ARGS_OK;
}
