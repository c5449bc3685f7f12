/* samples/refrain/cmd_sweep.c - `refrain sweep`: speed against quality of many policies, with the control beside them.
 *
 * Order of work: options -> list of settings -> model -> store (a folder of an earlier start goes on where it was) ->
 * the uncached run, once per seed -> every setting: quality from its first run, timings from all -> table, report.
 * The uncached loop is timed again and again between the settings; a setting's speed-up is against the median of the
 * last three timings, so that a machine that slows down or speeds up shows and does not count for or against it. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/image.h"
#include "core/memory.h"
#include "core/metrics.h"
#include "dit/pipeline.h"
#include "samples/refrain/args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/sweep_plan.h"
#include "samples/refrain/sweep_report.h"
#include "samples/refrain/sweep_store.h"

#define DEFAULT_STEPS    50
#define DEFAULT_SEED     42
#define DEFAULT_PICTURES 4
#define MAX_PICTURES     4096
#define MAX_BATCH        64
#define CPU_BATCH_BYTES  ((size_t)512 << 20)
#define GPU_BATCH_BYTES  ((size_t)8 << 30)
#define SHOWN_PICTURES   4    /* saved as PNG for the report */
#define BASE_WINDOW      3    /* timings of the uncached loop that a speed-up is against */
#define BASE_EVERY_MS    2e3  /* at most so often ... */
#define BASE_EVERY_RUNS  2    /* ... and for at most a third of the time */
#define SAME_REFERENCE   1e-3 /* relative L2 at which a stored reference still is this program's */
#define SEARCH_ROUNDS    7

static const char sampler_names[] = "ddpm ddim dpm++2m dpm++2m-sde euler flow-euler";

typedef struct {
    const char *model, *synthetic, *sampler, *device, *dtype, *fewer_steps, *report;
    arg_list policies, classes;
    int64_t num_pictures, num_steps, seed, batch, threads, repeats, width, height;
    double cfg_scale, target_psnr, target_ssim, target_speedup;
    bool json, quiet, force;
} sweep_args;

typedef struct {
    sweep_args args;
    char *model_path, *tuning_path;
    const char *model_name;
    rf_log log;
    rf_backend *backend;
    rf_dtype dtype;
    rf_image_model *model;
    rf_image_options options; /* of the uncached session */
    rf_image_session *base;
    int num_pictures, batch, repeats, num_base_runs;
    int *class_ids;
    uint64_t *seeds;
    char *class_text;
    bool warms_up; /* a first run that does not count */

    sweep_plan plan;
    sweep_store *store;
    sweep_reference reference;
    float *latents, *pictures; /* of the setting at work */
    double based_ms;           /* when the uncached loop was timed last */
    double start_ms;
    int num_done, num_todo; /* in this process */
} sweep_run;

/* --- options ------------------------------------------------------------------------------------------------------ */

static args_result read_args(sweep_args *a, int argc, char **argv) {
    *a = (sweep_args){.device = "auto",
                      .dtype = "auto",
                      .num_pictures = DEFAULT_PICTURES,
                      .num_steps = DEFAULT_STEPS,
                      .seed = DEFAULT_SEED,
                      .cfg_scale = 4};
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: objects)", &a->model),
        arg_strings("policy", 0, "SPEC", "NAME:OPT=A..B/N;OPT2=V,V or all; several add up (default: all)",
                    &a->policies),
        arg_string("fewer-steps", 0, "LIST", "the control: auto or step counts (default: auto)", &a->fewer_steps),
        arg_string("report", 0, "DIR", "results and report.html; a second start goes on there", &a->report),
        arg_int("num", 'n', "N", "pictures, each of its own seed (default: 4)", &a->num_pictures, 1, MAX_PICTURES),
        arg_strings("class", 0, "NAME|ID", "several take turns (default: spread over all)", &a->classes),
        arg_int("steps", 0, "N", "denoising steps (default: 50)", &a->num_steps, 2, 10000),
        arg_double("cfg-scale", 0, "X", "guidance; 1 = off (default: 4)", &a->cfg_scale, 0, 1000),
        arg_choice("sampling-method", 0, "ddpm, ddim, dpm++2m, dpm++2m-sde, euler, flow-euler (default: the model's)",
                   &a->sampler, sampler_names),
        arg_int("seed", 's', "N", "picture i uses N+i (default: 42)", &a->seed, 0, 9e18),
        arg_int("repeat", 'r', "N", "timed runs of a setting (default: 2, on CUDA 3)", &a->repeats, 1, 1000),
        arg_double("target-psnr", 0, "DB", "search: fastest setting with this mean PSNR (default: off)",
                   &a->target_psnr, 1, 99),
        arg_double("target-ssim", 0, "X", "search: and this mean SSIM", &a->target_ssim, 0, 1),
        arg_double("target-speedup", 0, "X", "search: best setting that is so much faster", &a->target_speedup, 1,
                   1000),
        arg_int("width", 'W', "PIXELS", "default: the model's", &a->width, 8, 16384),
        arg_int("height", 'H', "PIXELS", "default: the model's", &a->height, 8, 16384),
        arg_int("batch", 'b', "N", "pictures at once; divides -n (default: by size)", &a->batch, 1, MAX_PICTURES),
        arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &a->device),
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &a->dtype, "auto f32 bf16"),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_string("synthetic-weights", 0, "CONFIG", "random weights: dit-xl-2-256, ...", &a->synthetic),
        arg_flag("force", 0, "also policies that do not fit the sampler or step count", &a->force),
        arg_flag("json", 0, "all results as a JSON object on standard output", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
    };
    const arg_spec spec = {.command = "refrain sweep",
                           .usage = "[options]",
                           .about = "Measures speed and quality of feature caching against the uncached run.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0]};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result == ARGS_OK && a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    return result;
}

static bool is_search(const sweep_args *a) {
    return a->target_psnr > 0 || a->target_ssim > 0 || a->target_speedup > 0;
}

/* A wrong spec is found before anything is loaded. */
static rf_status make_plan(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_status st = RF_OK;
    if (is_search(a) && a->policies.count == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--target-...: expected the policy to search, as --policy NAME");
    if (a->fewer_steps || !is_search(a))
        st = sweep_plan_add_steps(&run->plan, a->fewer_steps ? a->fewer_steps : "auto", (int)a->num_steps, err);
    for (int i = 0; i < a->policies.count && st == RF_OK; i++) {
        if (!is_search(a)) {
            st = sweep_plan_add(&run->plan, a->policies.items[i], err);
            continue;
        }
        sweep_plan fixed = {0};
        sweep_range range;
        st = sweep_plan_search(a->policies.items[i], &fixed, &range, err);
        sweep_plan_free(&fixed);
    }
    if (st == RF_OK && a->policies.count == 0) st = sweep_plan_add(&run->plan, "all", err);
    return st;
}

static rf_status open_model(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    opened_model opened;
    rf_status st =
        open_image_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->model_path = opened.path;
    run->model_name = opened.name;
    run->backend = opened.backend;
    run->dtype = opened.dtype;
    run->model = opened.model;
    if (st != RF_OK) return st;
    run->warms_up = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    run->repeats = a->repeats ? (int)a->repeats : run->warms_up ? 3 : 2;
    return RF_OK;
}

/* The largest divisor of the number of pictures that a memory budget allows: every batch is of one size. */
static rf_status choose_batch(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_model_info info = rf_image_model_get_info(run->model);
    const rf_dit_desc *d = &info.transformer->desc;
    double scale =
        (a->width ? (double)a->width / info.image_width : 1) * (a->height ? (double)a->height / info.image_height : 1);
    double tokens = (double)d->sample_size / d->ph * ((double)d->sample_size / d->pw) * scale;
    double per_picture = 2 * tokens * (double)d->width * 16 * (double)rf_dtype_bytes(run->dtype) + 1;
    double fit = (double)(run->warms_up ? GPU_BATCH_BYTES : CPU_BATCH_BYTES) / per_picture;
    int most = fit < 1 ? 1 : fit > MAX_BATCH ? MAX_BATCH : (int)fit;
    run->num_pictures = (int)a->num_pictures;
    if (a->batch && run->num_pictures % a->batch != 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--batch %jd: expected a divisor of the %d pictures", (intmax_t)a->batch,
                       run->num_pictures);
    run->batch = a->batch ? (int)a->batch : most < run->num_pictures ? most : run->num_pictures;
    while (run->num_pictures % run->batch != 0) run->batch--;
    return RF_OK;
}

static rf_status plan_pictures(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    int num_classes = rf_image_model_get_info(run->model).num_classes, n = run->num_pictures;
    size_t room = (size_t)n * 12 + 1, used = 0;
    run->class_ids = rf_alloc_zero((size_t)n, sizeof *run->class_ids);
    run->seeds = rf_alloc_zero((size_t)n, sizeof *run->seeds);
    run->class_text = rf_alloc_zero(room, 1);
    if (!run->class_ids || !run->seeds || !run->class_text)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a list of %d pictures", n);
    for (int i = 0; i < n; i++) {
        run->seeds[i] = (uint64_t)a->seed + (uint64_t)i;
        run->class_ids[i] = n < num_classes   ? (int)((int64_t)i * num_classes / n)
                            : num_classes > 0 ? i % num_classes
                                              : 0;
        if (a->classes.count > 0) {
            rf_status st =
                rf_image_model_find_class(run->model, a->classes.items[i % a->classes.count], &run->class_ids[i], err);
            if (st != RF_OK) return st;
        }
        used += (size_t)snprintf(run->class_text + used, room - used, "%s%d", i ? " " : "", run->class_ids[i]);
    }
    return RF_OK;
}

static rf_status plan_options(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_options o = rf_image_options_default();
    o.batch = run->batch;
    o.num_steps = (int)a->num_steps;
    o.cfg_scale = a->cfg_scale;
    o.sampler = RF_SAMPLER_COUNT;
    if (a->sampler && !rf_sampler_kind_from_name(a->sampler, &o.sampler))
        return rf_fail(err, RF_ERR_ARGUMENT, "--sampling-method: this build has no %s", a->sampler);
    o.width = (int)a->width;
    o.height = (int)a->height;
    o.force_policy = a->force;
    run->tuning_path = tuning_cache_path(false);
    o.gemm_tuning = run->tuning_path;
    run->options = o;
    return rf_image_options_check(&o, err);
}

static rf_status open_store(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_model_info info = rf_image_model_get_info(run->model);
    rf_sampler_kind sampler = a->sampler ? run->options.sampler : info.scheduler.kind;
    char steps[16], cfg[32], seed[24], pictures[16], size[32], params[24], batch[16], threads[16], date[40] = "";
    time_t now = time(NULL);
    struct tm local;
    snprintf(steps, sizeof steps, "%d", run->options.num_steps);
    snprintf(cfg, sizeof cfg, "%g", a->cfg_scale);
    snprintf(seed, sizeof seed, "%jd", (intmax_t)a->seed);
    snprintf(pictures, sizeof pictures, "%d", run->num_pictures);
    snprintf(size, sizeof size, "%dx%d", a->width ? (int)a->width : info.image_width,
             a->height ? (int)a->height : info.image_height);
    snprintf(params, sizeof params, "%jd", (intmax_t)info.num_params);
    snprintf(batch, sizeof batch, "%d", run->batch);
    snprintf(threads, sizeof threads, "%d", rf_backend_num_threads(run->backend));
    if (localtime_r(&now, &local)) strftime(date, sizeof date, "%Y-%m-%d %H:%M %z", &local);
    /* '_': for people; may differ when a sweep goes on. */
    const sweep_pin pins[] = {
        {"model", (char *)(uintptr_t)run->model_name},
        {"parameters", params},
        {"sampler", (char *)(uintptr_t)rf_sampler_kind_name(sampler)},
        {"steps", steps},
        {"cfg_scale", cfg},
        {"seed", seed},
        {"pictures", pictures},
        {"classes", run->class_text},
        {"size", size},
        {"batch", batch},
        {"device", (char *)(uintptr_t)rf_backend_description(run->backend)},
        {"dtype", (char *)(uintptr_t)rf_dtype_name(run->dtype)},
        {"threads", threads},
        {"_date", date},
        {"_version", (char *)(uintptr_t)RF_VERSION},
    };
    return sweep_store_open(&run->store, a->report, pins, sizeof pins / sizeof pins[0], err);
}

/* --- one run of all pictures -------------------------------------------------------------------------------------- */

static bool keep_going(void *user, int step, int num_steps) {
    (void)user;
    (void)step;
    (void)num_steps;
    return !cancel_requested();
}

typedef struct {
    double ms; /* denoising loops of all batches */
    bool has_cache;
    rf_cache_counts cache; /* summed */
} loop_result;

/* latents, pictures: where to, or both NULL. kinds: of picture 0, [num_steps] or NULL. */
static rf_status run_pictures(sweep_run *run, rf_image_session *session, float *latents, float *pictures,
                              uint8_t *kinds, loop_result *out, rf_error *err) {
    rf_image_session_info s = rf_image_session_get_info(session);
    size_t latent_stride = (size_t)s.latent_channels * (size_t)s.latent_height * (size_t)s.latent_width;
    size_t picture_stride = 3 * (size_t)s.image_height * (size_t)s.image_width;
    rf_status st = RF_OK;
    memset(out, 0, sizeof *out);
    for (int first = 0; first < run->num_pictures && st == RF_OK; first += run->batch) {
        st = rf_image_session_denoise(session, run->class_ids + first, run->seeds + first, NULL, keep_going, NULL, err);
        if (st != RF_OK) break;
        s = rf_image_session_get_info(session);
        out->ms += s.denoise_ms;
        out->has_cache = s.has_cache;
        out->cache.steps_full += s.cache.steps_full;
        out->cache.steps_partial += s.cache.steps_partial;
        out->cache.steps_skipped += s.cache.steps_skipped;
        out->cache.blocks_computed += s.cache.blocks_computed;
        out->cache.blocks_total += s.cache.blocks_total;
        out->cache.rows_computed += s.cache.rows_computed;
        out->cache.rows_total += s.cache.rows_total;
        out->cache.decide_ms += s.cache.decide_ms;
        out->cache.bytes = s.cache.bytes;
        if (kinds && first == 0 && s.step_kinds) memcpy(kinds, s.step_kinds, (size_t)s.num_steps);
        if (!latents) continue;
        st = rf_image_session_read_latents(session, latents + (size_t)first * latent_stride, err);
        if (st == RF_OK) st = rf_image_session_decode(session, pictures + (size_t)first * picture_stride, err);
    }
    if (st == RF_OK && cancel_requested()) st = RF_ERR_CANCELLED;
    if (st == RF_ERR_CANCELLED) {
        return rf_fail(err, st, "interrupted after %d of %d settings%s", run->num_done, run->num_todo,
                       run->args.report ? "; the same command goes on from here" : "");
    }
    return st;
}

/* --- the uncached run --------------------------------------------------------------------------------------------- */

static rf_status save_picture(const sweep_run *run, const float *planar, const char *stem, int index, rf_error *err) {
    char name[64], *path = NULL;
    rf_image image = {0};
    snprintf(name, sizeof name, "%s-%d.png", stem, index);
    rf_status st = sweep_store_picture_path(run->store, name, &path, err);
    if (st == RF_OK) st = rf_image_from_planar(&image, planar, run->reference.image[2], run->reference.image[1], err);
    if (st == RF_OK) st = rf_image_save_png(&image, path, NULL, 0, err);
    rf_image_free(&image);
    rf_free(path);
    return st;
}

static rf_status save_pictures(const sweep_run *run, const float *pictures, const char *stem, rf_error *err) {
    const int *shape = run->reference.image;
    size_t stride = (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2];
    rf_status st = RF_OK;
    for (int i = 0; i < run->num_pictures && i < SHOWN_PICTURES && st == RF_OK && run->args.report; i++)
        st = save_picture(run, pictures + (size_t)i * stride, stem, i, err);
    return st;
}

static rf_status time_base(sweep_run *run, rf_error *err) {
    loop_result r;
    rf_status st = run_pictures(run, run->base, NULL, NULL, NULL, &r, err);
    if (st != RF_OK) return st;
    run->based_ms = now_ms();
    return sweep_store_add_baseline(run->store, r.ms, err);
}

/* Is it time to look at the machine's speed again? */
static rf_status time_base_if_due(sweep_run *run, rf_error *err) {
    double since = now_ms() - run->based_ms, every = BASE_EVERY_RUNS * sweep_store_base_ms(run->store, BASE_WINDOW);
    if (since < BASE_EVERY_MS || since < every) return RF_OK;
    return time_base(run, err);
}

static rf_status make_arrays(sweep_run *run, size_t *num_latents, rf_error *err) {
    rf_image_session_info s = rf_image_session_get_info(run->base);
    sweep_reference *r = &run->reference;
    *r = (sweep_reference){.num = run->num_pictures,
                           .latent = {s.latent_channels, s.latent_height, s.latent_width},
                           .image = {3, s.image_height, s.image_width}};
    size_t latents = (size_t)r->num * (size_t)r->latent[0] * (size_t)r->latent[1] * (size_t)r->latent[2];
    size_t pictures = (size_t)r->num * (size_t)r->image[0] * (size_t)r->image[1] * (size_t)r->image[2];
    r->latents = rf_alloc(latents * sizeof(float));
    r->pictures = rf_alloc(pictures * sizeof(float));
    run->latents = rf_alloc(latents * sizeof(float));
    run->pictures = rf_alloc(pictures * sizeof(float));
    *num_latents = latents;
    if (!r->latents || !r->pictures || !run->latents || !run->pictures)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for %d pictures of %dx%d", r->num, s.image_width, s.image_height);
    return RF_OK;
}

/* A stored reference must be what this program computes now: weights can change under the same name. */
static rf_status use_stored(sweep_run *run, size_t num_latents, rf_error *err) {
    sweep_reference stored;
    rf_status st = sweep_store_load_reference(run->store, &stored, err);
    if (st != RF_OK) return st;
    const sweep_reference *r = &run->reference;
    double apart = INFINITY;
    if (stored.num == r->num && memcmp(stored.latent, r->latent, sizeof r->latent) == 0 &&
        memcmp(stored.image, r->image, sizeof r->image) == 0)
        apart = rf_metric_rel_l2(r->latents, stored.latents, num_latents);
    if (!(apart <= SAME_REFERENCE)) {
        sweep_reference_free(&stored);
        return rf_fail(
            err, RF_ERR_ARGUMENT,
            "%s: its reference is not what this model gives now (relative L2 %.3g): name another --report folder",
            run->args.report, apart);
    }
    if (apart > 0 && !run->args.quiet)
        say("the stored reference differs from the uncached run of now by %.2g (relative L2); the stored one counts",
            apart);
    sweep_reference_free(&run->reference);
    run->reference = stored;
    return RF_OK;
}

static rf_status make_reference(sweep_run *run, rf_error *err) {
    loop_result r;
    size_t num_latents = 0;
    rf_error missing = {0};
    rf_status st = rf_image_session_create(&run->base, run->model, &run->options, err);
    if (st == RF_OK) st = make_arrays(run, &num_latents, err);
    if (st == RF_OK) st = run_pictures(run, run->base, run->reference.latents, run->reference.pictures, NULL, &r, err);
    if (st != RF_OK) return st;
    /* A stored one that is there must load; only its absence is no error. */
    sweep_reference probe;
    st = sweep_store_load_reference(run->store, &probe, &missing);
    if (st == RF_OK) {
        sweep_reference_free(&probe);
        st = use_stored(run, num_latents, err);
    } else if (st == RF_ERR_MISSING && sweep_store_num(run->store) > 0) {
        st = rf_fail(err, RF_ERR_MISSING, "%s: holds results without reference.f32; name another --report folder",
                     run->args.report);
    } else if (st == RF_ERR_MISSING) {
        st = save_pictures(run, run->reference.pictures, "reference", err);
        if (st == RF_OK) st = sweep_store_save_reference(run->store, &run->reference, err);
    } else {
        st = rf_fail(err, st, "%s", missing.message);
    }
    if (st == RF_OK && !run->warms_up) st = sweep_store_add_baseline(run->store, r.ms, err);
    if (st == RF_OK) st = time_base(run, err);
    return st;
}

/* --- a setting ---------------------------------------------------------------------------------------------------- */

/* What a policy may say about a model or a run without being an error of the sweep. */
static bool is_refusal(rf_status st) {
    return st == RF_ERR_UNSUPPORTED || st == RF_ERR_CONFIG || st == RF_ERR_ARGUMENT || st == RF_ERR_MISSING ||
           st == RF_ERR_SHAPE || st == RF_ERR_DEVICE_MEMORY;
}

static bool set_texts(sweep_row *row, const sweep_setting *setting, const char *status, const char *reason) {
    row->key = rf_strdup(setting->key);
    row->policy = rf_strdup(setting->policy);
    row->options = rf_strdup(setting->options);
    row->status = rf_strdup(status);
    row->reason = rf_strdup(reason);
    return row->key && row->policy && row->options && row->status && row->reason;
}

/* "31.2 33.5", and mean, median, and the worst: least for what should be large. */
static bool summarize(const double *values, int num, bool large_is_good, char **each, double *mean, double *median,
                      double *worst) {
    size_t room = (size_t)num * 16 + 1, used = 0;
    char *text = rf_alloc_zero(room, 1);
    if (!text) return false;
    *mean = 0;
    *worst = values[0];
    for (int i = 0; i < num; i++) {
        used += (size_t)snprintf(text + used, room - used, "%s%.6g", i ? " " : "", values[i]);
        *mean += values[i] / num;
        if (large_is_good ? values[i] < *worst : values[i] > *worst) *worst = values[i];
    }
    *median = sweep_median(values, num);
    *each = text;
    return true;
}

static rf_status measure_quality(const sweep_run *run, sweep_row *row, rf_error *err) {
    const sweep_reference *r = &run->reference;
    int n = r->num;
    size_t latent = (size_t)r->latent[0] * (size_t)r->latent[1] * (size_t)r->latent[2];
    size_t picture = (size_t)r->image[0] * (size_t)r->image[1] * (size_t)r->image[2];
    double *values = rf_alloc_zero((size_t)n * 3, sizeof *values);
    if (!values) return rf_fail(err, RF_ERR_MEMORY, "no memory for the quality of %d pictures", n);
    double *psnr = values, *ssim = values + n, *rel = values + 2 * n;
    rf_status st = RF_OK;
    row->max_abs = 0;
    for (int i = 0; i < n && st == RF_OK; i++) {
        rf_picture_metrics m;
        st = rf_metric_picture(run->pictures + (size_t)i * picture, r->pictures + (size_t)i * picture, r->image[0],
                               r->image[1], r->image[2], &m, err);
        if (st != RF_OK) break;
        psnr[i] = isinf(m.psnr_db) || m.psnr_db > SWEEP_EQUAL_DB ? SWEEP_EQUAL_DB : m.psnr_db;
        ssim[i] = m.ssim;
        rel[i] = rf_metric_rel_l2(run->latents + (size_t)i * latent, r->latents + (size_t)i * latent, latent);
        if (m.max_abs > row->max_abs) row->max_abs = m.max_abs;
    }
    bool ok = st != RF_OK ||
              (summarize(psnr, n, true, &row->psnr_each, &row->psnr_mean, &row->psnr_median, &row->psnr_worst) &&
               summarize(ssim, n, true, &row->ssim_each, &row->ssim_mean, &row->ssim_median, &row->ssim_worst) &&
               summarize(rel, n, false, &row->latent_each, &row->latent_mean, &row->latent_median, &row->latent_worst));
    rf_free(values);
    return ok ? st : rf_fail(err, RF_ERR_MEMORY, "no memory for the quality of %d pictures", n);
}

static double share(int64_t part, int64_t whole) {
    return whole > 0 ? (double)part / (double)whole : NAN;
}

static rf_status note_work(sweep_row *row, const loop_result *r, int64_t image_steps, const uint8_t *kinds,
                           int num_steps, int full_steps, rf_error *err) {
    row->steps = num_steps;
    if (!r->has_cache) { /* the control computes all of its steps; shares are of the full run's */
        row->share_steps = row->share_blocks = row->share_rows = (double)num_steps / full_steps;
        row->steps_full = (double)image_steps;
        row->steps_partial = row->steps_skipped = row->cache_bytes = row->decide_ms = 0;
        return RF_OK;
    }
    const rf_cache_counts *c = &r->cache;
    row->steps_full = (double)c->steps_full;
    row->steps_partial = (double)c->steps_partial;
    row->steps_skipped = (double)c->steps_skipped;
    row->share_steps = share(c->steps_full, c->steps_full + c->steps_partial + c->steps_skipped);
    row->share_blocks = share(c->blocks_computed, c->blocks_total);
    row->share_rows = share(c->rows_computed, c->rows_total);
    row->cache_bytes = (double)c->bytes;
    row->decide_ms = c->decide_ms;
    row->kinds = rf_alloc_zero((size_t)num_steps + 1, 1);
    if (!row->kinds) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d steps", num_steps);
    for (int i = 0; i < num_steps; i++)
        row->kinds[i] = kinds[i] == RF_STEP_FULL ? 'F' : kinds[i] == RF_STEP_SKIP ? 's' : 'P';
    return RF_OK;
}

static rf_status measure(sweep_run *run, const sweep_setting *setting, rf_image_session *session, sweep_row *row,
                         rf_error *err) {
    int num_steps = rf_image_session_get_info(session).num_steps;
    uint8_t *kinds = rf_alloc_zero((size_t)num_steps, 1);
    double *times = rf_alloc_zero((size_t)run->repeats, sizeof *times);
    loop_result r;
    rf_status st = kinds && times ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for %d runs", run->repeats);
    if (st == RF_OK && run->warms_up) st = run_pictures(run, session, NULL, NULL, NULL, &r, err);
    for (int i = 0; i < run->repeats && st == RF_OK; i++) {
        bool first = i == 0;
        st = run_pictures(run, session, first ? run->latents : NULL, first ? run->pictures : NULL, first ? kinds : NULL,
                          &r, err);
        times[i] = r.ms;
    }
    if (st == RF_OK)
        st = note_work(row, &r, (int64_t)num_steps * run->num_pictures, kinds, num_steps, run->options.num_steps, err);
    if (st == RF_OK) st = measure_quality(run, row, err);
    if (st == RF_OK) {
        char hash[17];
        row->repeats = run->repeats;
        row->loop_ms = sweep_median(times, run->repeats);
        row->loop_min_ms = row->loop_max_ms = times[0];
        for (int i = 1; i < run->repeats; i++) {
            row->loop_min_ms = fmin(row->loop_min_ms, times[i]);
            row->loop_max_ms = fmax(row->loop_max_ms, times[i]);
        }
        row->base_ms = sweep_store_base_ms(run->store, BASE_WINDOW);
        row->speedup = row->loop_ms > 0 ? row->base_ms / row->loop_ms : NAN;
        sweep_key_hash(setting->key, hash);
        st = save_pictures(run, run->pictures, hash, err);
    }
    rf_free(kinds);
    rf_free(times);
    return st;
}

static void say_row(const sweep_run *run, const sweep_row *row) {
    char left[48] = "";
    double seconds = (now_ms() - run->start_ms) / 1e3;
    int remaining = run->num_todo - run->num_done;
    if (run->num_done > 0 && remaining > 0) {
        double eta = seconds / run->num_done * remaining;
        snprintf(left, sizeof left, eta < 90 ? "; %.0f s left" : "; %.1f min left", eta < 90 ? eta : eta / 60);
    }
    char name[256];
    if (sweep_is_control(row)) {
        snprintf(name, sizeof name, "no cache, %.0f steps", row->steps);
    } else {
        snprintf(name, sizeof name, "%s%s%s", row->policy, row->options[0] ? ":" : "", row->options);
    }
    char done[48];
    if (run->num_todo > 0) {
        snprintf(done, sizeof done, "[%d/%d] ", run->num_done, run->num_todo);
    } else {
        done[0] = 0;
    }
    if (strcmp(row->status, "refused") == 0) {
        say("%s%s refused: %s", done, name, row->reason);
    } else {
        say("%s%s: %.2fx, PSNR %.2f dB, SSIM %.4f, %.0f %% of rows%s", done, name, row->speedup, row->psnr_mean,
            row->ssim_mean, 100 * row->share_rows, left);
    }
}

/* Measures a setting unless the store has it; *index is its row. */
static rf_status run_setting(sweep_run *run, const sweep_setting *setting, int *index, rf_error *err) {
    *index = sweep_store_find(run->store, setting->key);
    if (*index >= 0) return RF_OK;
    rf_image_options o = run->options;
    rf_image_session *session = NULL;
    sweep_row row = {0};
    sweep_row_clear(&row);
    o.policy = setting->object;
    if (setting->num_steps) o.num_steps = setting->num_steps;
    rf_status st = time_base_if_due(run, err);
    if (st != RF_OK) return st;
    st = rf_image_session_create(&session, run->model, &o, err);
    bool refused = setting->object && is_refusal(st);
    if (st == RF_OK) st = measure(run, setting, session, &row, err);
    rf_image_session_destroy(session);
    if (st != RF_OK && !refused) {
        sweep_row_clear(&row);
        return st;
    }
    if (!set_texts(&row, setting, refused ? "refused" : "ok", refused ? err->message : "")) {
        sweep_row_clear(&row);
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a result");
    }
    st = sweep_store_add(run->store, &row, err);
    *index = sweep_store_num(run->store) - 1;
    run->num_done++;
    if (st == RF_OK && !run->args.quiet) say_row(run, sweep_store_at(run->store, *index));
    return st;
}

static rf_status run_plan(sweep_run *run, rf_error *err) {
    rf_status st = RF_OK;
    for (int i = 0; i < run->plan.num && st == RF_OK; i++)
        st = sweep_store_forget_refusal(run->store, run->plan.items[i].key, err);
    run->num_todo = 0;
    for (int i = 0; i < run->plan.num; i++) run->num_todo += sweep_store_find(run->store, run->plan.items[i].key) < 0;
    run->start_ms = now_ms();
    int there = run->plan.num - run->num_todo;
    if (st == RF_OK && there > 0 && !run->args.quiet)
        say("%s holds %d of %d settings already", run->args.report, there, run->plan.num);
    for (int i = 0; i < run->plan.num && st == RF_OK; i++) {
        int index;
        st = run_setting(run, &run->plan.items[i], &index, err);
    }
    if (st == RF_OK && run->num_done > 0) st = time_base(run, err);
    return st;
}

/* --- searches ----------------------------------------------------------------------------------------------------- */

static bool is_ok(const sweep_row *row) {
    return strcmp(row->status, "ok") == 0;
}

static bool good_enough(const sweep_args *a, const sweep_row *row) {
    return is_ok(row) && row->psnr_mean >= a->target_psnr && (a->target_ssim <= 0 || row->ssim_mean >= a->target_ssim);
}

static bool fast_enough(const sweep_args *a, const sweep_row *row) {
    return is_ok(row) && row->speedup >= a->target_speedup;
}

static bool wants_quality(const sweep_args *a) {
    return a->target_psnr > 0 || a->target_ssim > 0;
}

/* Better of two rows; -1 = none. With a quality to keep, the faster one; else the better picture. */
static int better(const sweep_run *run, int a, int b) {
    if (a < 0 || b < 0) return a < 0 ? b : a;
    const sweep_row *x = sweep_store_at(run->store, a), *y = sweep_store_at(run->store, b);
    if (wants_quality(&run->args)) return y->speedup > x->speedup ? b : a;
    return y->psnr_mean > x->psnr_mean ? b : a;
}

typedef struct {
    sweep_run *run;
    const sweep_setting *fixed;
    sweep_range range;
    int best;    /* row that meets everything, -1 = none */
    int nearest; /* row to tell about when nothing does */
} search;

/* How far a row is from what is asked, 0 = met. */
static double shortfall(const sweep_args *a, const sweep_row *row) {
    if (!is_ok(row)) return INFINITY;
    double lack = fmax(0, a->target_psnr - row->psnr_mean) / 10;
    lack += fmax(0, a->target_ssim - row->ssim_mean) * 10;
    return lack + fmax(0, log(a->target_speedup > 0 ? a->target_speedup / row->speedup : 1));
}

/* *mild: the value keeps the quality that is asked for, or (without one) is not yet fast enough. */
static rf_status try_value(search *s, double value, bool *mild, rf_error *err) {
    char text[64];
    sweep_plan one = {0};
    int index = -1;
    const sweep_args *a = &s->run->args;
    snprintf(text, sizeof text, s->range.whole ? "%.0f" : "%.4g", value);
    rf_status st = sweep_plan_add_value(&one, s->fixed, s->range.option, text, err);
    if (st == RF_OK) st = run_setting(s->run, &one.items[0], &index, err);
    sweep_plan_free(&one);
    if (st != RF_OK) return st;
    const sweep_row *row = sweep_store_at(s->run->store, index);
    *mild = wants_quality(a) ? good_enough(a, row) : is_ok(row) && !fast_enough(a, row);
    if (good_enough(a, row) && fast_enough(a, row)) s->best = better(s->run, s->best, index);
    if (s->nearest < 0 || shortfall(a, row) < shortfall(a, sweep_store_at(s->run->store, s->nearest)))
        s->nearest = index;
    return RF_OK;
}

/* Bisection between the two ends; by ratios where both are above 0. */
static rf_status bisect(search *s, rf_error *err) {
    double lo = s->range.mild, hi = s->range.aggressive;
    bool lo_mild = false, hi_mild = false;
    rf_status st = try_value(s, lo, &lo_mild, err);
    if (st == RF_OK) st = try_value(s, hi, &hi_mild, err);
    if (st != RF_OK || !lo_mild || hi_mild) return st;
    for (int round = 0; st == RF_OK && round < (s->range.whole ? 32 : SEARCH_ROUNDS); round++) {
        double middle = lo > 0 && hi > 0 && !s->range.whole ? sqrt(lo * hi) : .5 * (lo + hi);
        bool mild = false;
        if (s->range.whole && fabs(hi - lo) <= 1) break;
        if (s->range.whole) middle = floor(middle);
        st = try_value(s, middle, &mild, err);
        if (mild) {
            lo = middle;
        } else {
            hi = middle;
        }
    }
    return st;
}

static void target_text(const sweep_args *a, char *text, size_t room) {
    size_t used = 0;
    text[0] = 0;
    if (a->target_psnr > 0) used += (size_t)snprintf(text, room, "PSNR %g dB", a->target_psnr);
    if (a->target_ssim > 0)
        used += (size_t)snprintf(text + used, room - used, "%sSSIM %g", used ? ", " : "", a->target_ssim);
    if (a->target_speedup > 0) snprintf(text + used, room - used, "%s%gx", used ? ", " : "", a->target_speedup);
}

static void print_found(const sweep_row *row) {
    char options[2048];
    snprintf(options, sizeof options, "%s", row->options);
    for (char *c = options; *c; c++) {
        if (*c == ';') *c = ',';
    }
    printf("--cache-mode %s%s%s\n", row->policy, options[0] ? " --cache-option " : "", options);
    printf("speed-up %.3f, PSNR %.2f dB (worst %.2f), SSIM %.4f (worst %.4f), relative L2 of the latent %.4f, "
           "%.1f %% of token rows computed, cache %.1f MB\n",
           row->speedup, row->psnr_mean, row->psnr_worst, row->ssim_mean, row->ssim_worst, row->latent_mean,
           100 * row->share_rows, row->cache_bytes / 1e6);
}

static rf_status run_search(sweep_run *run, int *found, rf_error *err) {
    char target[96];
    int nearest = -1;
    rf_status st = run_plan(run, err);
    run->num_todo = 0;
    *found = -1;
    for (int i = 0; i < run->args.policies.count && st == RF_OK; i++) {
        sweep_plan fixed = {0};
        search s = {.run = run, .best = -1, .nearest = -1};
        st = sweep_plan_search(run->args.policies.items[i], &fixed, &s.range, err);
        s.fixed = fixed.items;
        if (st == RF_OK) st = bisect(&s, err);
        sweep_plan_free(&fixed);
        if (st != RF_OK) break;
        *found = better(run, *found, s.best);
        if (nearest < 0 || shortfall(&run->args, sweep_store_at(run->store, s.nearest)) <
                               shortfall(&run->args, sweep_store_at(run->store, nearest)))
            nearest = s.nearest;
    }
    if (st != RF_OK || *found >= 0) return st;
    const sweep_row *row = sweep_store_at(run->store, nearest);
    target_text(&run->args, target, sizeof target);
    if (!is_ok(row)) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s", row->reason);
    return rf_fail(err, RF_ERR_UNSUPPORTED, "%s cannot be reached; nearest: %s:%s with %.2fx, PSNR %.2f dB, SSIM %.4f",
                   target, row->policy, row->options, row->speedup, row->psnr_mean, row->ssim_mean);
}

/* --- the command -------------------------------------------------------------------------------------------------- */

static void say_plan(const sweep_run *run) {
    rf_image_session_info s = rf_image_session_get_info(run->base);
    say("%s on %s in %s: %s, %d steps, cfg %g, %d pictures of %dx%d, %d at once; uncached loop %.2f s; %d settings, %d "
        "run%s each",
        run->model_name, rf_backend_name(run->backend), rf_dtype_name(run->dtype),
        sweep_store_pin(run->store, "sampler"), run->options.num_steps, run->options.cfg_scale, run->num_pictures,
        s.image_width, s.image_height, run->batch, sweep_store_base_ms(run->store, BASE_WINDOW) / 1e3, run->plan.num,
        run->repeats, run->repeats == 1 ? "" : "s");
}

static rf_status print_results(const sweep_run *run, int found, rf_error *err) {
    if (run->args.json) {
        char *text = NULL;
        rf_status st = sweep_store_json(run->store, found, &text, err);
        if (st == RF_OK) puts(text);
        rf_free(text);
        return st;
    }
    if (found >= 0) {
        print_found(sweep_store_at(run->store, found));
        return RF_OK;
    }
    return sweep_print_table(run->store, err);
}

/* Whatever there is, also after a search that failed or a run that was interrupted. */
static rf_status write_files(const sweep_run *run, rf_error *err) {
    if (!run->args.report || !run->store) return RF_OK;
    rf_status st = sweep_store_write_json(run->store, err);
    return st == RF_OK ? sweep_write_report(run->store, err) : st;
}

static void close_run(sweep_run *run) {
    rf_image_session_destroy(run->base);
    rf_image_model_close(run->model);
    rf_backend_close(run->backend);
    sweep_store_close(run->store);
    sweep_plan_free(&run->plan);
    sweep_reference_free(&run->reference);
    rf_free(run->latents);
    rf_free(run->pictures);
    rf_free(run->class_ids);
    rf_free(run->seeds);
    rf_free(run->class_text);
    rf_free(run->model_path);
    rf_free(run->tuning_path);
}

int cmd_sweep(int argc, char **argv) {
    static sweep_run run;
    rf_error err = {0};
    int found = -1;
    args_result parsed = read_args(&run.args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    run.log = program_log(run.args.quiet ? -1 : 0);
    cancel_install();

    rf_status st = make_plan(&run, &err);
    if (st == RF_OK) st = open_model(&run, &err);
    if (st == RF_OK) st = choose_batch(&run, &err);
    if (st == RF_OK) st = plan_pictures(&run, &err);
    if (st == RF_OK) st = plan_options(&run, &err);
    if (st == RF_OK) st = open_store(&run, &err);
    if (st == RF_OK) st = make_reference(&run, &err);
    bool measured = st == RF_OK;
    if (st == RF_OK && !run.args.quiet) say_plan(&run);
    if (st == RF_OK) st = is_search(&run.args) ? run_search(&run, &found, &err) : run_plan(&run, &err);
    rf_error late = {0};
    rf_status written = measured ? write_files(&run, &late) : RF_OK;
    if (st == RF_OK && written != RF_OK) {
        st = written;
        err = late;
    }
    if (st == RF_OK) st = print_results(&run, found, &err);
    if (st == RF_OK && run.args.report && !run.args.quiet) say("wrote %s/report.html", run.args.report);
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    close_run(&run);
    return status;
}
