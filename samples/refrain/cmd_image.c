/* samples/refrain/cmd_image.c - `refrain image`: classes in, pictures out.
 *
 * Order of work: options -> are the outputs writable -> device -> model -> classes -> batches of (denoise, decode, write) ->
 * report. Everything that can be refused is refused before the first step. Picture i is drawn from seed + i. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "core/file.h"
#include "core/memory.h"
#include "dit/pipeline.h"
#include "samples/refrain/args.h"
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
    const char *model, *synthetic, *sampler, *scheduler, *rng, *output, *device, *dtype, *preview, *tuning;
    arg_list classes;
    int64_t num_images, num_steps, seed, width, height, batch, threads;
    double cfg_scale, eta;
    bool grid, json, quiet;
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

    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    rf_image_model *model;
    rf_image_options options; /* of the session in use */
    rf_image_session *session;
    int batch; /* pictures at once */

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
    if (result == ARGS_OK && a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    return result;
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
    return st;
}

static rf_status open_model(image_run *run, rf_error *err) {
    const image_args *a = &run->args;
    double start = now_ms();
    rf_status st = RF_OK;
    if (a->synthetic) {
        run->model_path = rf_strdup(a->synthetic);
        if (!run->model_path) st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for its name", a->synthetic);
    } else {
        st = find_model(&run->model_path, a->model, err);
    }
    if (st == RF_OK) st = rf_backend_open(&run->backend, a->device, (int)a->threads, err);
    if (st == RF_OK) {
        rf_backend_set_log(run->backend, &run->log);
        st = dtype_for(&run->dtype, a->dtype, run->backend, err);
    }
    if (st == RF_OK && a->synthetic) {
        st = rf_image_model_synthetic(&run->model, run->backend, a->synthetic, run->dtype, 0, err);
    } else if (st == RF_OK) {
        st = rf_image_model_load(&run->model, run->backend, run->model_path, run->dtype, err);
    }
    if (st != RF_OK) return st;
    size_t len = strlen(run->model_path);
    while (len > 1 && run->model_path[len - 1] == '/') run->model_path[--len] = 0;
    const char *slash = strrchr(run->model_path, '/');
    run->model_name = slash && slash[1] ? slash + 1 : run->model_path;
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

static rf_status plan_options(image_run *run, rf_error *err) {
    const image_args *a = &run->args;
    rf_image_options o = rf_image_options_default();
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
    o.gemm_tuning = run->tuning_path;
    run->batch = a->batch ? (int)a->batch : choose_batch(run);
    if (run->batch > run->num_pictures) run->batch = run->num_pictures;
    o.batch = run->batch;
    run->options = o;
    return rf_image_options_check(&o, err);
}

/* The session for the next `batch` pictures; the last, smaller batch gets its own. */
static rf_status session_for(image_run *run, int batch, rf_error *err) {
    if (run->session && run->options.batch == batch) return RF_OK;
    rf_image_session_destroy(run->session);
    run->session = NULL;
    run->options.batch = batch;
    rf_status st = rf_image_session_create(&run->session, run->model, &run->options, err);
    if (st != RF_OK) return st;
    size_t arena_bytes = rf_image_session_get_info(run->session).arena_bytes;
    if (arena_bytes > run->arena_bytes) run->arena_bytes = arena_bytes;
    return RF_OK;
}

static rf_sampler_kind resolved_sampler(const image_run *run) {
    if (run->options.sampler != RF_SAMPLER_COUNT) return run->options.sampler;
    return rf_image_model_get_info(run->model).scheduler.kind;
}

static const char *resolved_sigmas(const image_run *run) {
    if (run->options.sigmas == RF_SIGMAS_KARRAS) return "karras";
    return rf_image_model_get_info(run->model).scheduler.sigmas == RF_SIGMAS_KARRAS ? "karras" : "default";
}

static void say_plan(const image_run *run) {
    rf_image_model_info info = rf_image_model_get_info(run->model);
    rf_image_session_info s = rf_image_session_get_info(run->session);
    say("%s (%.1f M parameters) on %s in %s: %s, %d steps, cfg %g, seed %" PRIu64 ", %dx%d, %d picture%s, %d at once",
        run->model_name, (double)info.num_params / 1e6, rf_backend_name(run->backend), rf_dtype_name(run->dtype),
        rf_sampler_kind_name(resolved_sampler(run)), run->options.num_steps, run->options.cfg_scale,
        run->pictures[0].seed, s.image_width, s.image_height, run->num_pictures, run->num_pictures == 1 ? "" : "s",
        run->batch);
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

static bool on_progress(void *user, int step, int num_steps) {
    image_run *run = user;
    run->steps_done++;
    progress_update(&run->bar, run->steps_done);
    if (run->preview_path && (step + 1) % run->preview_every == 0 && step + 1 < num_steps) {
        run->preview_status = write_preview(run, &run->preview_error);
        if (run->preview_status != RF_OK) return false;
    }
    return !cancel_requested();
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
                              .height = s.image_height};
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

static rf_status run_batch(image_run *run, int first, int num, rf_error *err) {
    int class_ids[MAX_BATCH_ARG];
    uint64_t seeds[MAX_BATCH_ARG];
    for (int i = 0; i < num; i++) {
        class_ids[i] = run->pictures[first + i].class_id;
        seeds[i] = run->pictures[first + i].seed;
    }
    rf_status st = rf_image_session_denoise(run->session, class_ids, seeds, NULL, on_progress, run, err);
    if (run->preview_status != RF_OK) return rf_fail(err, run->preview_status, "%s", run->preview_error.message);
    if (st == RF_ERR_CANCELLED || (st == RF_OK && cancel_requested())) return cancelled(run, err);
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
    if (!run->args.quiet) say_plan(run);
    int num_batches = (run->num_pictures + run->batch - 1) / run->batch;
    progress_begin(&run->bar, num_batches * run->options.num_steps, run->args.quiet);
    for (int first = 0; first < run->num_pictures && st == RF_OK; first += run->batch) {
        int num = run->num_pictures - first < run->batch ? run->num_pictures - first : run->batch;
        st = cancel_requested() ? cancelled(run, err) : session_for(run, num, err);
        if (st == RF_OK) st = run_batch(run, first, num, err);
    }
    if (st == RF_OK && run->args.grid) st = save_sheet(run, err);
    progress_end(&run->bar);
    return st;
}

static void say_result(const image_run *run, double total_ms) {
    const char *first = run->args.grid ? run->args.output : run->pictures[0].path;
    const char *last = run->args.grid ? first : run->pictures[run->num_pictures - 1].path;
    say("wrote %s%s%s: %d picture%s in %.1f s (load %.1f, denoise %.1f, decode %.1f), seed %" PRIu64, first,
        last == first ? "" : " .. ", last == first ? "" : last, run->num_pictures, run->num_pictures == 1 ? "" : "s",
        total_ms / 1e3, run->load_ms / 1e3, run->denoise_ms / 1e3, run->decode_ms / 1e3, run->pictures[0].seed);
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
                             .num_outputs = num_outputs};
        st = report_print_run(&report, err);
    }
    rf_free(names);
    rf_free(seeds);
    rf_free(outputs);
    return st;
}

static void close_run(image_run *run) {
    contact_sheet_free(&run->sheet);
    rf_image_session_destroy(run->session);
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

    rf_status st = check_outputs_early(&run, &err);
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
