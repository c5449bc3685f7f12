/* samples/refrain/cmd_image.c - `refrain image`: classes in, pictures out.
 *
 * Order of work: options -> are the outputs writable -> device -> model -> classes -> batches of (denoise, decode, write) ->
 * report. Everything that can be refused is refused before the first step. Picture i is drawn from seed + i.
 *
 * --compare: a second session of the same shape without a policy makes every batch again, right after the first one, from the
 * same seeds. Both sessions are warmed up before they are timed: on CUDA by a whole run, in which every kind of step is
 * captured, on the host by a first step, which touches all memory. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "core/file.h"
#include "core/memory.h"
#include "core/metrics.h"
#include "dit/pipeline.h"
#include "samples/refrain/args.h"
#include "samples/refrain/cache_args.h"
#include "samples/refrain/outputs.h"
#include "samples/refrain/program.h"
#include "samples/refrain/progress.h"
#include "samples/refrain/report.h"

#define DEFAULT_STEPS   30
#define DEFAULT_SEED    42
#define MAX_IMAGES      100000
#define MAX_GRID_IMAGES 1024
#define ALL_CLASSES_MAX 64 /* --grid alone shows this many classes at most */
#define CPU_BATCH_BYTES ((size_t)512 << 20)
#define GPU_BATCH_BYTES ((size_t)8 << 30)
#define MAX_BATCH       64   /* chosen */
#define MAX_BATCH_ARG   4096 /* asked for */

static const char sampler_names[] = "ddpm ddim dpm++2m dpm++2m-sde euler flow-euler";

typedef struct {
    const char *model, *synthetic, *sampler, *scheduler, *rng, *output, *device, *dtype, *preview, *tuning, *trace;
    arg_list classes;
    cache_args cache;
    int64_t num_images, num_steps, seed, width, height, batch, threads;
    double cfg_scale, eta;
    bool grid, compare, json, quiet;
    int verbosity;
} image_args;

/* One picture to make. */
typedef struct {
    int class_id;
    char class_name[96]; /* first synonym, or the number */
    uint64_t seed;
    char *path; /* NULL with --grid */
} picture;

typedef struct {
    image_args args;
    char *model_path;       /* as loaded */
    const char *model_name; /* last element of it, for people */
    char *tuning_path;      /* NULL = none */
    char *preview_path;     /* NULL = none */
    int preview_every;

    rf_policy *policy;       /* NULL = none */
    rf_preset preset;        /* with --cache-preset; borrows from the model */
    char *cache_options;     /* all options of the policy as text */
    char *settings_options;  /* the same for the PNG, without folders */
    rf_file_writer *trace;   /* NULL = none */
    rf_cache_counts counts;  /* so far, of all batches */
    int64_t skipped, partly; /* picture-steps so far, for the bar */
    int64_t picture_steps;

    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    rf_image_model *model;
    rf_image_options options; /* of the session in use */
    rf_image_session *session;
    rf_image_session *reference; /* --compare: the same without a policy */
    bool warm;                   /* both have run before */
    int batch;                   /* pictures at once */

    report_quality quality; /* --compare: sums and worst so far */

    picture *pictures;
    int num_pictures;
    int num_written;
    contact_sheet sheet;

    progress_bar bar;
    int steps_done;
    rf_status preview_status;
    rf_error preview_error;

    double start_ms, load_ms, denoise_ms, decode_ms;
    double *step_ms; /* [num_steps] */
    size_t arena_bytes;
} image_run;

static args_result read_args(image_args *a, int argc, char **argv) {
    *a = (image_args){.scheduler = "default",
                      .rng = "counter",
                      .output = "out.png",
                      .device = "auto",
                      .dtype = "auto",
                      .num_steps = DEFAULT_STEPS,
                      .seed = DEFAULT_SEED,
                      .cfg_scale = 4};
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: objects)", &a->model),
        arg_strings("class", 0, "NAME|ID", "several take turns (default: 0, 1, ...)", &a->classes),
        arg_int("num", 'n', "N", "pictures (default: classes named; --grid: all)", &a->num_images, 1, MAX_IMAGES),
        arg_int("steps", 0, "N", "denoising steps (default: 30)", &a->num_steps, 1, 10000),
        arg_double("cfg-scale", 0, "X", "guidance; 1 = off (default: 4)", &a->cfg_scale, 0, 1000),
        arg_choice("sampling-method", 0, "ddpm, ddim, dpm++2m, dpm++2m-sde, euler, flow-euler (default: the model's)",
                   &a->sampler, sampler_names),
        arg_choice("scheduler", 0, "noise levels: default (the model's), karras", &a->scheduler, "default karras"),
        arg_double("eta", 0, "X", "noise in ddim, 0..1 (default: 0)", &a->eta, 0, 1),
        arg_int("seed", 's', "N", "picture i uses N+i; negative: random (default: 42)", &a->seed, -9e18, 9e18),
        arg_choice("rng", 0, "counter, torch-cpu, torch-cuda (default: counter)", &a->rng,
                   "counter torch-cpu torch-cuda"),
        arg_int("width", 'W', "PIXELS", "default: the model's", &a->width, 8, 16384),
        arg_int("height", 'H', "PIXELS", "default: the model's", &a->height, 8, 16384),
        arg_int("batch", 'b', "N", "pictures at once (default: by size and device)", &a->batch, 1, MAX_BATCH_ARG),
        arg_string("output", 'o', "FILE", "PNG; %03d counts pictures (default: out.png)", &a->output),
        arg_flag("grid", 0, "one sheet, a label under each picture", &a->grid),
        arg_string("preview", 0, "FILE[:K]", "the first picture so far, every K steps (K: 5)", &a->preview),
        arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &a->device),
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &a->dtype, "auto f32 bf16"),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_string("synthetic-weights", 0, "CONFIG", "random weights: dit-xl-2-256, ..., a config.json", &a->synthetic),
        CACHE_ARG_ROWS(&a->cache),
        arg_string("trace", 0, "FILE", "what each step computed and reused, JSON lines", &a->trace),
        arg_flag("compare", 0, "also run without the policy: quality and speed-up", &a->compare),
        arg_string("gemm-tuning", 0, "FILE", "GEMM choices of bench --tune (default: the cache)", &a->tuning),
        arg_flag("json", 0, "a JSON object about the run on standard output", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
        arg_count("verbose", 'v', "say more; twice for debugging", &a->verbosity),
    };
    const arg_spec spec = {.command = "refrain image",
                           .usage = "[options]",
                           .about = "Samples pictures of classes and writes them as PNG with the settings inside.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0]};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result != ARGS_OK) return result;
    if (a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    if (a->compare && a->preview) {
        say_error("--compare and --preview exclude each other: previews would be timed");
        return ARGS_USAGE_ERROR;
    }
    if ((a->compare || a->trace) && !cache_args_wanted(&a->cache)) {
        say_error("--%s: no policy is chosen (--cache-mode, --cache-preset or --replay)",
                  a->compare ? "compare" : "trace");
        return ARGS_USAGE_ERROR;
    }
    return ARGS_OK;
}

/* "FILE:10" -> FILE, every 10 steps. A name that ends in ":" and digits is read that way too. */
static rf_status read_preview(image_run *run, rf_error *err) {
    const char *text = run->args.preview;
    run->preview_every = 5;
    if (!text) return RF_OK;
    const char *colon = strrchr(text, ':');
    size_t len = strlen(text);
    if (colon && colon[1] && strspn(colon + 1, "0123456789") == strlen(colon + 1)) {
        long every = strtol(colon + 1, NULL, 10);
        if (every < 1 || every > 10000) {
            return rf_fail(err, RF_ERR_ARGUMENT, "--preview: expected every 1..10000 steps, found %s", colon + 1);
        }
        run->preview_every = (int)every;
        len = (size_t)(colon - text);
    }
    if (len == 0) return rf_fail(err, RF_ERR_ARGUMENT, "--preview: expected a file name before '%s'", colon);
    run->preview_path = rf_strdup(text);
    if (!run->preview_path) return rf_fail(err, RF_ERR_MEMORY, "--preview: no memory for a name");
    run->preview_path[len] = 0;
    return output_check(run->preview_path, err);
}

/* A pattern that is wrong, or a first file that cannot be written, is found before anything is loaded. */
static rf_status check_outputs_early(const image_run *run, rf_error *err) {
    char *path = NULL;
    rf_status st = output_name(&path, run->args.output, 0, 1, err);
    if (st == RF_OK) st = output_check(path, err);
    rf_free(path);
    if (st == RF_OK && run->args.trace) st = output_check(run->args.trace, err);
    return st;
}

static rf_status open_model(image_run *run, rf_error *err) {
    const image_args *a = &run->args;
    double start = now_ms();
    opened_model opened;
    rf_status st =
        open_image_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->model_path = opened.path;
    run->model_name = opened.name;
    run->backend = opened.backend;
    run->dtype = opened.dtype;
    run->model = opened.model;
    if (st != RF_OK) return st;
    run->load_ms = now_ms() - start;
    return RF_OK;
}

static void name_class(const rf_image_model *model, picture *p) {
    const char *names = rf_image_model_class_name(model, p->class_id);
    if (!names || !names[0]) {
        snprintf(p->class_name, sizeof p->class_name, "%d", p->class_id);
        return;
    }
    snprintf(p->class_name, sizeof p->class_name, "%.*s", (int)strcspn(names, ","), names);
}

/* Which class picture i gets: the named ones in turn; without names all classes in order, or, on a sheet that is too small for
 * all of them, evenly spread ones. */
static int class_of(const image_run *run, const int *named, int index, int num_classes) {
    if (run->args.classes.count > 0) return named[index % run->args.classes.count];
    if (num_classes < 1) return 0;
    if (run->args.grid && run->num_pictures < num_classes) {
        return (int)((int64_t)index * num_classes / run->num_pictures);
    }
    return index % num_classes;
}

static uint64_t first_seed(int64_t seed) {
    uint32_t random = 0;
    if (seed >= 0) return (uint64_t)seed;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) random = (uint32_t)(now_ms() * 1e3);
    return random;
}

static rf_status plan_pictures(image_run *run, rf_error *err) {
    const image_args *a = &run->args;
    int num_classes = rf_image_model_get_info(run->model).num_classes;
    static int named[ARG_LIST_MAX];
    for (int i = 0; i < a->classes.count; i++) {
        rf_status st = rf_image_model_find_class(run->model, a->classes.items[i], &named[i], err);
        if (st != RF_OK) return st;
    }
    run->num_pictures = (int)a->num_images;
    if (a->num_images == 0) run->num_pictures = a->classes.count;
    if (run->num_pictures == 0 && a->grid)
        run->num_pictures = num_classes < ALL_CLASSES_MAX ? num_classes : ALL_CLASSES_MAX;
    if (run->num_pictures == 0) run->num_pictures = 1;
    if (a->grid && run->num_pictures > MAX_GRID_IMAGES) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--grid: %d pictures on one sheet, the limit is %d", run->num_pictures,
                       MAX_GRID_IMAGES);
    }
    run->pictures = rf_alloc_zero((size_t)run->num_pictures, sizeof *run->pictures);
    run->step_ms = rf_alloc_zero((size_t)a->num_steps, sizeof *run->step_ms);
    if (!run->pictures || !run->step_ms)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a list of %d pictures", run->num_pictures);
    uint64_t seed = first_seed(a->seed);
    for (int i = 0; i < run->num_pictures; i++) {
        picture *p = &run->pictures[i];
        p->class_id = class_of(run, named, i, num_classes);
        p->seed = seed + (uint64_t)i;
        name_class(run->model, p);
        if (a->grid) continue;
        rf_status st = output_name(&p->path, a->output, i, run->num_pictures, err);
        if (st == RF_OK) st = output_check(p->path, err);
        if (st != RF_OK) return st;
    }
    return RF_OK;
}

/* How many pictures fit a memory budget: rows of tokens times width times the buffers a block keeps, both branches. */
static int choose_batch(const image_run *run) {
    rf_image_model_info info = rf_image_model_get_info(run->model);
    const rf_dit_desc *d = &info.transformer->desc;
    bool cuda = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    double scale_h = run->args.height ? (double)run->args.height / info.image_height : 1;
    double scale_w = run->args.width ? (double)run->args.width / info.image_width : 1;
    double tokens = (double)d->sample_size / d->ph * scale_h * ((double)d->sample_size / d->pw) * scale_w;
    double per_picture = 2 * tokens * (double)d->width * 16 * (double)rf_dtype_bytes(run->dtype) + 1;
    double fit = (double)(cuda ? GPU_BATCH_BYTES : CPU_BATCH_BYTES) / per_picture;
    int most = fit < 1 ? 1 : fit > MAX_BATCH ? MAX_BATCH : (int)fit;
    int num_batches = (run->num_pictures + most - 1) / most;
    return (run->num_pictures + num_batches - 1) / num_batches;
}

/* The policy, and what it is for people. */
static rf_status plan_policy(image_run *run, rf_error *err) {
    const rf_json_value *calibration = rf_image_model_get_info(run->model).calibration;
    rf_status st = cache_args_policy(&run->policy, &run->args.cache, calibration, run->model_name, &run->preset, err);
    if (st != RF_OK || !run->policy) return st;
    run->cache_options = cache_options_text(run->policy, false);
    run->settings_options = cache_options_text(run->policy, true);
    if (!run->cache_options || !run->settings_options)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for the options of a policy");
    return RF_OK;
}

static const char *policy_name(const image_run *run) {
    return rf_policy_get_def(run->policy)->name;
}

static rf_status plan_options(image_run *run, rf_error *err) {
    const image_args *a = &run->args;
    rf_image_options o = rf_image_options_default();
    rf_status st = plan_policy(run, err);
    if (st != RF_OK) return st;
    o.policy = run->policy;
    o.max_drift = a->cache.max_drift;
    o.force_policy = a->cache.force;
    o.num_steps = (int)a->num_steps;
    o.cfg_scale = a->cfg_scale;
    o.sampler = RF_SAMPLER_COUNT;
    if (a->sampler && !rf_sampler_kind_from_name(a->sampler, &o.sampler)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--sampling-method: this build has no %s", a->sampler);
    }
    o.eta = a->eta;
    o.sigmas = strcmp(a->scheduler, "karras") == 0 ? RF_SIGMAS_KARRAS : RF_SIGMAS_DEFAULT;
    if (!rf_rng_kind_from_name(a->rng, &o.rng))
        return rf_fail(err, RF_ERR_ARGUMENT, "--rng: this build has no %s", a->rng);
    o.width = (int)a->width;
    o.height = (int)a->height;
    run->tuning_path = a->tuning ? rf_strdup(a->tuning) : tuning_cache_path(false);
    o.record_trace = a->trace != NULL;
    o.gemm_tuning = run->tuning_path;
    run->batch = a->batch ? (int)a->batch : choose_batch(run);
    if (run->batch > run->num_pictures) run->batch = run->num_pictures;
    o.batch = run->batch;
    run->options = o;
    return rf_image_options_check(&o, err);
}

/* The session, and with --compare its reference, for the next `batch` pictures; the last, smaller batch gets its own. */
static rf_status session_for(image_run *run, int batch, rf_error *err) {
    if (run->session && run->options.batch == batch) return RF_OK;
    rf_image_session_destroy(run->session);
    rf_image_session_destroy(run->reference);
    run->session = run->reference = NULL;
    run->warm = false;
    run->options.batch = batch;
    rf_status st = rf_image_session_create(&run->session, run->model, &run->options, err);
    if (st != RF_OK) return st;
    size_t arena_bytes = rf_image_session_get_info(run->session).arena_bytes;
    if (arena_bytes > run->arena_bytes) run->arena_bytes = arena_bytes;
    if (!run->args.compare) return RF_OK;
    rf_image_options reference = run->options;
    reference.policy = NULL;
    reference.max_drift = 0;
    reference.force_policy = false;
    return rf_image_session_create(&run->reference, run->model, &reference, err);
}

static rf_sampler_kind resolved_sampler(const image_run *run) {
    if (run->options.sampler != RF_SAMPLER_COUNT) return run->options.sampler;
    return rf_image_model_get_info(run->model).scheduler.kind;
}

static const char *resolved_sigmas(const image_run *run) {
    if (run->options.sigmas == RF_SIGMAS_KARRAS) return "karras";
    return rf_image_model_get_info(run->model).scheduler.sigmas == RF_SIGMAS_KARRAS ? "karras" : "default";
}

static void say_policy(const image_run *run) {
    char bytes[32], measured[512];
    if (run->preset.name) {
        say("preset %s of %s is --cache-mode %s%s%s", run->preset.name, run->model_name, run->preset.mode,
            run->preset.options[0] ? " --cache-option " : "", run->preset.options);
    }
    for (int i = 0; i < run->preset.num_measured; i++) {
        preset_measured_text(&run->preset.measured[i], measured, sizeof measured);
        say("preset %s was chosen at %s", run->preset.name, measured);
    }
    format_bytes(bytes, sizeof bytes, (double)rf_image_session_get_info(run->session).cache.bytes);
    say("cache %s keeps %s: %s", policy_name(run), bytes, run->cache_options);
}

static void say_plan(const image_run *run) {
    rf_image_model_info info = rf_image_model_get_info(run->model);
    rf_image_session_info s = rf_image_session_get_info(run->session);
    say("%s (%.1f M parameters) on %s in %s: %s, %d steps, cfg %g, seed %" PRIu64 ", %dx%d, %d picture%s, %d at once",
        run->model_name, (double)info.num_params / 1e6, rf_backend_name(run->backend), rf_dtype_name(run->dtype),
        rf_sampler_kind_name(resolved_sampler(run)), run->options.num_steps, run->options.cfg_scale,
        run->pictures[0].seed, s.image_width, s.image_height, run->num_pictures, run->num_pictures == 1 ? "" : "s",
        run->batch);
    if (run->policy) say_policy(run);
    if (run->args.verbosity > 0) {
        char weights[32], arena[32];
        format_bytes(weights, sizeof weights, (double)info.weights_bytes);
        format_bytes(arena, sizeof arena, (double)s.arena_bytes);
        say("device %s: %s; weights %s, arena %s", rf_backend_name(run->backend), rf_backend_description(run->backend),
            weights, arena);
    }
}

static rf_status write_preview(image_run *run, rf_error *err) {
    rf_image_session_info s = rf_image_session_get_info(run->session);
    size_t num = (size_t)s.image_width * (size_t)s.image_height * 3;
    float *planar = rf_alloc(num * sizeof *planar);
    rf_image image = {0};
    rf_status st = planar ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "--preview: no memory for a picture");
    if (st == RF_OK) st = rf_image_session_preview(run->session, 0, planar, err);
    if (st == RF_OK) st = rf_image_from_planar(&image, planar, s.image_width, s.image_height, err);
    if (st == RF_OK) st = rf_image_save_png(&image, run->preview_path, NULL, 0, err);
    rf_image_free(&image);
    rf_free(planar);
    return st;
}

/* How much was reused so far, beside the bar. */
static void note_reuse(image_run *run, int step) {
    rf_image_session_info s = rf_image_session_get_info(run->session);
    for (int i = 0; i < run->options.batch && s.step_kinds; i++) {
        uint8_t kind = s.step_kinds[(size_t)i * (size_t)s.num_steps + (size_t)step];
        run->skipped += kind == RF_STEP_SKIP;
        run->partly += kind == RF_STEP_PARTIAL;
    }
    run->picture_steps += run->options.batch;
    double skipped = 100.0 * (double)run->skipped / (double)run->picture_steps;
    double partly = 100.0 * (double)run->partly / (double)run->picture_steps;
    if (run->partly > 0) {
        snprintf(run->bar.note, sizeof run->bar.note, "%.0f%% skipped, %.0f%% partly", skipped, partly);
    } else {
        snprintf(run->bar.note, sizeof run->bar.note, "%.0f%% skipped", skipped);
    }
}

static bool on_progress(void *user, int step, int num_steps) {
    image_run *run = user;
    run->steps_done++;
    if (run->policy) note_reuse(run, step);
    progress_update(&run->bar, run->steps_done);
    if (run->preview_path && (step + 1) % run->preview_every == 0 && step + 1 < num_steps) {
        run->preview_status = write_preview(run, &run->preview_error);
        if (run->preview_status != RF_OK) return false;
    }
    return !cancel_requested();
}

static bool on_reference_progress(void *user, int step, int num_steps) {
    (void)step, (void)num_steps;
    image_run *run = user;
    run->steps_done++;
    progress_update(&run->bar, run->steps_done);
    return !cancel_requested();
}

/* user: how many steps are enough. */
static bool on_warm_up(void *user, int step, int num_steps) {
    const int *enough = user;
    (void)num_steps;
    return step + 1 < *enough && !cancel_requested();
}

/* What the PNG says about pictures first .. first + num - 1. names and seeds are arrays of the caller, filled here. */
static picture_settings settings_of(const image_run *run, int first, int num, const char **names, uint64_t *seeds) {
    rf_image_session_info s = rf_image_session_get_info(run->session);
    for (int i = 0; i < num; i++) {
        names[i] = run->pictures[first + i].class_name;
        seeds[i] = run->pictures[first + i].seed;
    }
    return (picture_settings){.model = run->model_name,
                              .device = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA ? "cuda" : "cpu",
                              .dtype = rf_dtype_name(run->dtype),
                              .sampler = rf_sampler_kind_name(resolved_sampler(run)),
                              .scheduler = resolved_sigmas(run),
                              .rng = rf_rng_kind_name(run->options.rng),
                              .num_steps = run->options.num_steps,
                              .cfg_scale = run->options.cfg_scale,
                              .eta = run->options.eta,
                              .class_names = names,
                              .seeds = seeds,
                              .num_images = num,
                              .width = s.image_width,
                              .height = s.image_height,
                              .cache_mode = run->policy ? policy_name(run) : NULL,
                              .cache_options = run->settings_options,
                              .max_drift = run->options.max_drift};
}

/* Writes or places pictures first .. first + num - 1 of the decoded batch. */
static rf_status deliver(image_run *run, int first, int num, const float *planar, rf_error *err) {
    rf_image_session_info s = rf_image_session_get_info(run->session);
    size_t stride = (size_t)s.image_width * (size_t)s.image_height * 3;
    rf_status st = RF_OK;
    for (int i = 0; i < num && st == RF_OK; i++) {
        const picture *p = &run->pictures[first + i];
        rf_image image = {0};
        st = rf_image_from_planar(&image, planar + (size_t)i * stride, s.image_width, s.image_height, err);
        if (st == RF_OK && run->args.grid) {
            st = contact_sheet_place(&run->sheet, first + i, &image, p->class_name, err);
        } else if (st == RF_OK) {
            const char *name;
            uint64_t seed;
            picture_settings settings = settings_of(run, first + i, 1, &name, &seed);
            st = report_save_png(&image, p->path, &settings, err);
            if (st == RF_OK) run->num_written++;
        }
        rf_image_free(&image);
    }
    return st;
}

static rf_status cancelled(const image_run *run, rf_error *err) {
    return rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d of %d steps; %d of %d files written", run->steps_done,
                   run->bar.total, run->num_written, run->args.grid ? 1 : run->num_pictures);
}

/* Before times count; see the head of this file. */
static rf_status warm_up(image_run *run, const int *class_ids, const uint64_t *seeds, rf_error *err) {
    if (run->warm || !run->args.compare) return RF_OK;
    bool whole = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    int enough = whole ? run->options.num_steps + 1 : 1;
    rf_image_session *sessions[] = {run->session, run->reference};
    for (int i = 0; i < 2; i++) {
        rf_status st = rf_image_session_denoise(sessions[i], class_ids, seeds, NULL, on_warm_up, &enough, err);
        if (cancel_requested()) return cancelled(run, err);
        if (st != RF_OK && st != RF_ERR_CANCELLED) return st;
    }
    run->warm = true;
    return RF_OK;
}

static rf_status write_trace_line(void *user, const char *json, rf_error *err) {
    (void)err; /* commit reports what could not be written */
    rf_file_writer_write(user, json, strlen(json));
    rf_file_writer_write(user, "\n", 1);
    return RF_OK;
}

/* What the policy did in the batch that has just run. */
static rf_status collect_cache(image_run *run, int first, rf_error *err) {
    rf_cache_counts *sum = &run->counts;
    if (!run->policy) return RF_OK;
    rf_cache_counts c = rf_image_session_get_info(run->session).cache;
    sum->images += c.images;
    sum->steps = c.steps;
    sum->steps_full += c.steps_full;
    sum->steps_partial += c.steps_partial;
    sum->steps_skipped += c.steps_skipped;
    sum->blocks_computed += c.blocks_computed;
    sum->blocks_total += c.blocks_total;
    sum->rows_computed += c.rows_computed;
    sum->rows_total += c.rows_total;
    sum->decide_ms += c.decide_ms;
    sum->read_backs += c.read_backs;
    if (c.bytes > sum->bytes) sum->bytes = c.bytes;
    if (!run->trace) return RF_OK;
    return rf_image_session_write_trace(run->session, first, write_trace_line, run->trace, err);
}

/* The smaller one; a NaN is below everything. */
static double lower(double a, double b) {
    return isnan(a) || a < b ? a : b;
}

/* Makes the batch again without the policy and adds up how far the pictures are from it. */
static rf_status compare_batch(image_run *run, int num, const int *class_ids, const uint64_t *seeds,
                               const float *planar, rf_error *err) {
    rf_image_session_info s = rf_image_session_get_info(run->reference);
    size_t stride = (size_t)s.image_width * (size_t)s.image_height * 3;
    report_quality *q = &run->quality;
    rf_status st = rf_image_session_denoise(run->reference, class_ids, seeds, NULL, on_reference_progress, run, err);
    if (st == RF_ERR_CANCELLED || (st == RF_OK && cancel_requested())) return cancelled(run, err);
    if (st != RF_OK) return st;
    float *uncached = rf_alloc_zero((size_t)num * stride, sizeof *uncached);
    if (!uncached) return rf_fail(err, RF_ERR_MEMORY, "--compare: no memory for %d pictures", num);
    st = rf_image_session_decode(run->reference, uncached, err);
    q->reference_ms += rf_image_session_get_info(run->reference).denoise_ms;
    for (int i = 0; i < num && st == RF_OK; i++) {
        rf_picture_metrics m;
        size_t at = (size_t)i * stride;
        st = rf_metric_picture(planar + at, uncached + at, 3, s.image_height, s.image_width, &m, err);
        if (st != RF_OK) break;
        q->psnr_db += m.psnr_db;
        q->ssim += m.ssim;
        q->worst_psnr_db = lower(q->worst_psnr_db, m.psnr_db);
        q->worst_ssim = lower(q->worst_ssim, m.ssim);
        if (m.max_abs > q->max_abs) q->max_abs = m.max_abs;
    }
    rf_free(uncached);
    return st;
}

static rf_status run_batch(image_run *run, int first, int num, rf_error *err) {
    int class_ids[MAX_BATCH_ARG];
    uint64_t seeds[MAX_BATCH_ARG];
    for (int i = 0; i < num; i++) {
        class_ids[i] = run->pictures[first + i].class_id;
        seeds[i] = run->pictures[first + i].seed;
    }
    rf_status st = warm_up(run, class_ids, seeds, err);
    if (st != RF_OK) return st;
    st = rf_image_session_denoise(run->session, class_ids, seeds, NULL, on_progress, run, err);
    if (run->preview_status != RF_OK) return rf_fail(err, run->preview_status, "%s", run->preview_error.message);
    if (st == RF_ERR_CANCELLED || (st == RF_OK && cancel_requested())) return cancelled(run, err);
    if (st == RF_OK) st = collect_cache(run, first, err);
    if (st != RF_OK) return st;

    rf_image_session_info s = rf_image_session_get_info(run->session);
    float *planar = rf_alloc_zero((size_t)num * (size_t)s.image_width * (size_t)s.image_height, 3 * sizeof *planar);
    if (!planar)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for %d pictures of %dx%d", num, s.image_width, s.image_height);
    st = rf_image_session_decode(run->session, planar, err);
    if (st == RF_OK) {
        s = rf_image_session_get_info(run->session);
        run->denoise_ms += s.denoise_ms;
        run->decode_ms += s.decode_ms;
        for (int i = 0; i < s.num_steps && i < run->options.num_steps; i++) run->step_ms[i] += s.step_ms[i];
        st = deliver(run, first, num, planar, err);
    }
    if (st == RF_OK && run->args.compare) st = compare_batch(run, num, class_ids, seeds, planar, err);
    rf_free(planar);
    return st;
}

static rf_status save_sheet(image_run *run, rf_error *err) {
    const char *names[MAX_GRID_IMAGES];
    uint64_t seeds[MAX_GRID_IMAGES];
    picture_settings settings = settings_of(run, 0, run->num_pictures, names, seeds);
    rf_status st = report_save_png(&run->sheet.image, run->args.output, &settings, err);
    if (st == RF_OK) run->num_written++;
    return st;
}

static rf_status run_all(image_run *run, rf_error *err) {
    rf_status st = session_for(run, run->batch, err);
    if (st != RF_OK) return st;
    rf_image_session_info s = rf_image_session_get_info(run->session);
    if (run->args.grid) st = contact_sheet_create(&run->sheet, run->num_pictures, s.image_width, s.image_height, err);
    if (st != RF_OK) return st;
    if (run->args.trace) st = rf_file_writer_open(&run->trace, run->args.trace, err);
    if (st != RF_OK) return st;
    if (!run->args.quiet) say_plan(run);
    int num_batches = (run->num_pictures + run->batch - 1) / run->batch;
    int runs = run->args.compare ? 2 : 1;
    progress_begin(&run->bar, runs * num_batches * run->options.num_steps, run->args.quiet);
    run->quality.worst_psnr_db = run->quality.worst_ssim = (double)INFINITY;
    for (int first = 0; first < run->num_pictures && st == RF_OK; first += run->batch) {
        int num = run->num_pictures - first < run->batch ? run->num_pictures - first : run->batch;
        st = cancel_requested() ? cancelled(run, err) : session_for(run, num, err);
        if (st == RF_OK) st = run_batch(run, first, num, err);
    }
    if (st == RF_OK && run->args.grid) st = save_sheet(run, err);
    if (st == RF_OK && run->trace) {
        rf_file_writer *trace = run->trace;
        run->trace = NULL;
        st = rf_file_writer_commit(trace, err);
    }
    progress_end(&run->bar);
    run->quality.psnr_db /= run->num_pictures;
    run->quality.ssim /= run->num_pictures;
    run->quality.speedup = run->denoise_ms > 0 ? run->quality.reference_ms / run->denoise_ms : 0;
    return st;
}

static double percent(int64_t part, int64_t whole) {
    return whole > 0 ? 100.0 * (double)part / (double)whole : 0;
}

/* Steps of one picture: several pictures may differ, so it may be a mean. */
static void steps_text(char *text, size_t text_bytes, int64_t picture_steps, int64_t pictures) {
    double steps = pictures > 0 ? (double)picture_steps / (double)pictures : 0;
    snprintf(text, text_bytes, steps == floor(steps) ? "%.0f" : "%.1f", steps);
}

static void say_cache(const image_run *run) {
    const rf_cache_counts *c = &run->counts;
    char full[32], partial[32], skipped[32], bytes[32], partly[48] = "";
    steps_text(full, sizeof full, c->steps_full, c->images);
    steps_text(partial, sizeof partial, c->steps_partial, c->images);
    steps_text(skipped, sizeof skipped, c->steps_skipped, c->images);
    if (c->steps_partial > 0) snprintf(partly, sizeof partly, ", %s partly", partial);
    format_bytes(bytes, sizeof bytes, (double)c->bytes);
    say("cache %s: %s of %d steps computed%s, %s skipped%s; %.1f %% of blocks, %.1f %% of token rows; %s, decided in "
        "%.1f ms",
        policy_name(run), full, run->options.num_steps, partly, skipped,
        run->num_pictures > 1 ? " (mean of the pictures)" : "", percent(c->blocks_computed, c->blocks_total),
        percent(c->rows_computed, c->rows_total), bytes, c->decide_ms);
}

static void say_quality(const image_run *run) {
    const report_quality *q = &run->quality;
    char ssim[64] = "", worst[64] = "", quality[256] = "equal pictures";
    if (isfinite(q->ssim)) snprintf(ssim, sizeof ssim, ", SSIM %.4f", q->ssim);
    if (run->num_pictures > 1)
        snprintf(worst, sizeof worst, " (worst picture %.2f dB, %.4f)", q->worst_psnr_db, q->worst_ssim);
    if (!(q->max_abs == 0))
        snprintf(quality, sizeof quality, "PSNR %.2f dB%s%s, largest error %.3f", q->psnr_db, ssim, worst, q->max_abs);
    say("against no cache: %s; denoising loop %.2f times as fast (%.2f s, without %.2f s)", quality, q->speedup,
        run->denoise_ms / 1e3, q->reference_ms / 1e3);
}

static void say_result(const image_run *run, double total_ms) {
    const char *first = run->args.grid ? run->args.output : run->pictures[0].path;
    const char *last = run->args.grid ? first : run->pictures[run->num_pictures - 1].path;
    say("wrote %s%s%s: %d picture%s in %.1f s (load %.1f, denoise %.1f, decode %.1f), seed %" PRIu64, first,
        last == first ? "" : " .. ", last == first ? "" : last, run->num_pictures, run->num_pictures == 1 ? "" : "s",
        total_ms / 1e3, run->load_ms / 1e3, run->denoise_ms / 1e3, run->decode_ms / 1e3, run->pictures[0].seed);
    if (run->policy) say_cache(run);
    if (run->args.compare) say_quality(run);
}

static rf_status print_report(const image_run *run, double total_ms, rf_error *err) {
    int num_outputs = run->args.grid ? 1 : run->num_pictures;
    const char **names = rf_alloc_zero((size_t)run->num_pictures, sizeof *names);
    uint64_t *seeds = rf_alloc_zero((size_t)run->num_pictures, sizeof *seeds);
    report_output *outputs = rf_alloc_zero((size_t)num_outputs, sizeof *outputs);
    rf_status st = RF_OK;
    if (!names || !seeds || !outputs) st = rf_fail(err, RF_ERR_MEMORY, "no memory for the report");
    if (st == RF_OK) {
        picture_settings settings = settings_of(run, 0, run->num_pictures, names, seeds);
        for (int i = 0; i < num_outputs; i++) {
            outputs[i] = (report_output){.path = run->pictures[i].path,
                                         .class_names = names + i,
                                         .seeds = seeds + i,
                                         .num_images = 1,
                                         .width = settings.width,
                                         .height = settings.height};
        }
        if (run->args.grid) {
            outputs[0].path = run->args.output;
            outputs[0].num_images = run->num_pictures;
            outputs[0].width = run->sheet.image.width;
            outputs[0].height = run->sheet.image.height;
        }
        report_cache cache = {.options = run->cache_options, .counts = run->counts};
        if (run->policy) cache.mode = policy_name(run);
        run_report report = {.command = "image",
                             .model = run->model_path,
                             .device = rf_backend_name(run->backend),
                             .dtype = rf_dtype_name(run->dtype),
                             .seed = run->pictures[0].seed,
                             .num_steps = run->options.num_steps,
                             .load_ms = run->load_ms,
                             .denoise_ms = run->denoise_ms,
                             .decode_ms = run->decode_ms,
                             .total_ms = total_ms,
                             .step_ms = run->step_ms,
                             .weights_bytes = rf_image_model_get_info(run->model).weights_bytes,
                             .arena_bytes = run->arena_bytes,
                             .peak_device_bytes = rf_backend_get_counts(run->backend).peak_device_bytes,
                             .outputs = outputs,
                             .num_outputs = num_outputs,
                             .cache = run->policy ? &cache : NULL,
                             .quality = run->args.compare ? &run->quality : NULL};
        st = report_print_run(&report, err);
    }
    rf_free(names);
    rf_free(seeds);
    rf_free(outputs);
    return st;
}

static void close_run(image_run *run) {
    contact_sheet_free(&run->sheet);
    rf_file_writer_discard(run->trace);
    rf_image_session_destroy(run->session);
    rf_image_session_destroy(run->reference);
    rf_policy_destroy(run->policy);
    rf_free(run->cache_options);
    rf_free(run->settings_options);
    rf_image_model_close(run->model);
    rf_backend_close(run->backend);
    for (int i = 0; run->pictures && i < run->num_pictures; i++) rf_free(run->pictures[i].path);
    rf_free(run->pictures);
    rf_free(run->step_ms);
    rf_free(run->tuning_path);
    rf_free(run->preview_path);
    rf_free(run->model_path);
}

int cmd_image(int argc, char **argv) {
    static image_run run;
    rf_error err = {0};
    args_result parsed = read_args(&run.args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    run.start_ms = now_ms();
    run.log = program_log(run.args.quiet ? -1 : run.args.verbosity);
    cancel_install();

    rf_status st = cache_args_check(&run.args.cache, &err);
    if (st == RF_OK) st = check_outputs_early(&run, &err);
    if (st == RF_OK) st = read_preview(&run, &err);
    if (st == RF_OK) st = open_model(&run, &err);
    if (st == RF_OK) st = plan_pictures(&run, &err);
    if (st == RF_OK) st = plan_options(&run, &err);
    if (st == RF_OK) st = run_all(&run, &err);
    if (st == RF_OK) {
        double total_ms = now_ms() - run.start_ms;
        if (!run.args.quiet) say_result(&run, total_ms);
        if (run.args.json) st = print_report(&run, total_ms, &err);
    }
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
