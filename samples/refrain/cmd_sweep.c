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

#include "core/file.h"
#include "core/image.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/metrics.h"
#include "dlm/model.h"
#include "samples/refrain/args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/sweep_report.h"
#include "samples/refrain/sweep_run.h"

#define DEFAULT_STEPS   50
#define DEFAULT_SEED    42
#define MAX_PICTURES    4096
#define MAX_WALKS       256
#define MAX_FRAMES      4096
#define BASE_EVERY_MS   2e3  /* the uncached loop is timed at most so often ... */
#define BASE_EVERY_RUNS 2    /* ... and for at most a third of the time */
#define SAME_REFERENCE  1e-3 /* relative L2 at which a stored reference still is this program's */
#define SEARCH_ROUNDS   7
#define EVERY_STEP      12 /* worlds of up to so many steps have every number of fewer steps as control */

/* One of each way to choose, and what papers compare with. */
#define KV_POLICIES "streaming,random,h2o,tova,snapkv,pyramidkv,adakv,knorm,keydiff,expected,cake,obcache,caote"
#define KV_RATIOS   "0.75,0.5,0.35,0.25,0.125,0.0625"

static const char sampler_names[] = "ddpm ddim dpm++2m dpm++2m-sde euler flow-euler";

/* --- options ------------------------------------------------------------------------------------------------------ */

/* A sweep of KV policies, which are then the ones of --policy, has no control. */
static args_result check_kv(sweep_args *a) {
    const char *needs = a->kv.budgets ? "kv-budget" : a->kv.ratios ? "kv-ratio" : a->agnostic ? "agnostic" : NULL;
    const char *other = a->fewer_steps ? "fewer-steps" : a->guide ? "guide" : a->synthetic ? "synthetic-weights" : NULL;
    if (!a->is_kv && needs) {
        say_error("--%s: of policies of a cache, --kv", needs);
        return ARGS_USAGE_ERROR;
    }
    if (a->is_kv && other) {
        say_error("--kv and --%s exclude each other", other);
        return ARGS_USAGE_ERROR;
    }
    if (!a->is_kv) return ARGS_OK;
    a->kv.policies = a->policies;
    a->kv.flag = "--policy";
    a->policies.count = 0;
    if (!a->model) a->model = KV_DEFAULT_MODEL;
    return ARGS_OK;
}

static args_result read_args(sweep_args *a, int argc, char **argv) {
    *a = (sweep_args){.device = "auto", .dtype = "auto", .seed = DEFAULT_SEED, .cfg_scale = NAN};
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "of images, a world or text; a shipped one's name", &a->model),
        arg_strings("policy", 0, "SPEC", "NAME:OPT=A..B/N;OPT2=V,V or all; repeatable (all)", &a->policies),
        arg_string("fewer-steps", 0, "LIST", "the control: auto or step counts (default: auto)", &a->fewer_steps),
        arg_string("report", 0, "DIR", "for results, report.html; goes on where it was", &a->report),
        arg_int("num", 'n', "N", "pictures, or samples of each task (default: 4)", &a->num_pictures, 1, MAX_PICTURES),
        arg_string("task", 0, "LIST", "of text: all, long, names (total,eval,trace)", &a->tasks),
        arg_string("guide", 0, "MODEL", "of text: for commit=guided (default: none)", &a->guide),
        arg_flag("kv", 0, "of text-ar: --policy is of its cache: snapkv,h2o", &a->is_kv),
        arg_string("kv-budget", 0, "N,...", "of that: tokens a layer and key head", &a->kv.budgets),
        arg_string("kv-ratio", 0, "R,...", "or shares of the prompt (six from 0.75 to 0.06)", &a->kv.ratios),
        arg_flag("agnostic", 0, "of --kv: compress before the question", &a->agnostic),
        arg_strings("class", 0, "NAME|ID", "several take turns (default: spread over all)", &a->classes),
        arg_int("steps", 0, "N", "denoising steps (default: 50; a world's own)", &a->num_steps, 2, 10000),
        arg_double("cfg-scale", 0, "X", "guidance; 1 = off (default: 4)", &a->cfg_scale, 0, 1000),
        arg_choice("sampling-method", 0, "ddpm, dpm++2m, euler, ... (default: the model's)", &a->sampler,
                   sampler_names),
        arg_int("width", 'W', "PIXELS", "of pictures (default: the model's)", &a->width, 8, 16384),
        arg_int("height", 'H', "PIXELS", "default: the model's", &a->height, 8, 16384),
        arg_int("frames", 0, "N", "of a walk, with the first (default: 24)", &a->num_frames, 2, MAX_FRAMES),
        arg_int("walks", 0, "N", "of a world, one after the other (default: 2)", &a->num_walks, 1, MAX_WALKS),
        arg_strings("init", 'i', "FILE|SEED", "first frames of walks, as refrain world; in turns", &a->inits),
        arg_strings("actions", 'a', "LIST|FILE", "of walks; in turns (default: built-in scripts)", &a->actions),
        arg_int("window", 0, "N", "frames seen, the new one too (the model's)", &a->window, 2, 65536),
        arg_choice("context", 0, "full window: rebuild, keep, sinks (rebuild)", &a->context, "rebuild keep sinks"),
        arg_int("sinks", 0, "N", "frames that never leave (default: 2)", &a->num_sinks, 1, 4096),
        arg_int("seed", 's', "N", "picture or walk i uses N+i (default: 42)", &a->seed, 0, 9e18),
        arg_int("repeat", 'r', "N", "timed runs of a setting (default: 2, on CUDA 3)", &a->repeats, 1, 1000),
        arg_double("target-psnr", 0, "DB", "search: fastest with this mean PSNR (default: off)", &a->target_psnr, 1,
                   99),
        arg_double("target-ssim", 0, "X", "search: and this mean SSIM", &a->target_ssim, 0, 1),
        arg_double("target-speedup", 0, "X", "search: best setting that is so much faster", &a->target_speedup, 1,
                   1000),
        arg_int("batch", 'b', "N", "at once; divides -n or --walks (by size; walks 1)", &a->batch, 1, MAX_PICTURES),
        arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &a->device),
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &a->dtype, "auto f32 bf16"),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_string("synthetic-weights", 0, "CONFIG", "random weights: dit-xl-2-256, oasis-500m, ...", &a->synthetic),
        arg_flag("force", 0, "also policies that do not fit sampler or steps", &a->force),
        arg_flag("json", 0, "all results as a JSON object on standard output", &a->json),
        arg_flag("quiet", 'q', "say nothing but errors", &a->quiet),
    };
    const arg_spec spec = {.command = "refrain sweep",
                           .usage = "[options]",
                           .about = "Measures speed and quality of caching policies against the uncached run.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0]};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result == ARGS_OK && a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    return result == ARGS_OK ? check_kv(a) : result;
}

/* An option that would do nothing is refused. */
static rf_status check_kind(const sweep_run *run, rf_error *err) {
    enum { IMAGES = 1, WORLDS = 2, TEXTS = 4 };
    const sweep_args *a = &run->args;
    bool searches = a->target_psnr > 0 || a->target_ssim > 0 || a->target_speedup > 0;
    const struct {
        bool given;
        const char *name;
        unsigned of;
    } options[] = {
        {a->num_pictures != 0, "num", IMAGES | TEXTS},
        {a->classes.count != 0, "class", IMAGES},
        {!isnan(a->cfg_scale), "cfg-scale", IMAGES},
        {a->sampler != NULL, "sampling-method", IMAGES},
        {a->width != 0, "width", IMAGES},
        {a->height != 0, "height", IMAGES},
        {a->num_frames != 0, "frames", WORLDS},
        {a->num_walks != 0, "walks", WORLDS},
        {a->inits.count != 0, "init", WORLDS},
        {a->actions.count != 0, "actions", WORLDS},
        {a->window != 0, "window", WORLDS},
        {a->context != NULL, "context", WORLDS},
        {a->num_sinks != 0, "sinks", WORLDS},
        {a->num_steps != 0, "steps", IMAGES | WORLDS},
        {a->batch != 0, "batch", IMAGES | WORLDS},
        {searches, "target-...", IMAGES | WORLDS},
        {a->tasks != NULL, "task", TEXTS},
        {a->guide != NULL, "guide", TEXTS},
        {a->is_kv, "kv", TEXTS},
    };
    unsigned kind = run->is_text ? TEXTS : run->is_world ? WORLDS : IMAGES;
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        if (!options[i].given || options[i].of & kind) continue;
        return rf_fail(err, RF_ERR_ARGUMENT, "--%s: of a model of %s; this is %s", options[i].name,
                       options[i].of & IMAGES   ? "images"
                       : options[i].of & WORLDS ? "worlds"
                                                : "text",
                       run->is_text    ? "one of text"
                       : run->is_world ? "a world"
                                       : "one of images");
    }
    return RF_OK;
}

static bool is_world_config(const char *config) {
    rf_json *doc = NULL;
    const char *name = "";
    bool is_world = strncmp(config, "oasis", 5) == 0 && !rf_path_exists(config);
    if (rf_path_exists(config) && rf_json_open(&doc, config, NULL) == RF_OK &&
        rf_json_opt_string(doc, rf_json_root(doc), "_class_name", "", &name, NULL) == RF_OK)
        is_world = strcmp(name, "OasisWorld") == 0;
    rf_json_close(doc);
    return is_world;
}

static rf_status find_kind(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    char *path = NULL;
    if (a->synthetic) {
        rf_text_desc desc;
        run->is_world = is_world_config(a->synthetic);
        if (rf_text_config_builtin(&desc, a->synthetic, NULL) == RF_OK)
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "--synthetic-weights %s: a sweep of text is scored on tasks, which random "
                           "weights cannot do",
                           a->synthetic);
    } else {
        RF_TRY(find_model(&path, a->model, err));
        run->is_world = rf_world_is_world(path);
        run->is_text = !run->is_world && rf_text_is_text(path);
        rf_free(path);
    }
    run->kind = run->is_text ? &sweep_texts : run->is_world ? &sweep_worlds : &sweep_images;
    return check_kind(run, err);
}

static bool is_search(const sweep_args *a) {
    return a->target_psnr > 0 || a->target_ssim > 0 || a->target_speedup > 0;
}

static rf_status add_spec(sweep_run *run, const char *spec, rf_error *err) {
    if (run->is_text) return sweep_plan_add_text(&run->plan, spec, run->is_block_causal, err);
    return run->is_world ? sweep_plan_add_world(&run->plan, spec, run->slides, err)
                         : sweep_plan_add(&run->plan, spec, err);
}

/* Worlds take few steps: every number of them is in the control. Of text, where
 * steps are passes a block: the half, and the half of that. */
static rf_status add_control(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    const char *text = a->fewer_steps ? a->fewer_steps : "auto";
    char every[8 * EVERY_STEP] = "";
    size_t used = 0;
    if (!a->fewer_steps && is_search(a)) return RF_OK;
    if (run->is_world && strcmp(text, "auto") == 0 && run->num_steps <= EVERY_STEP) {
        for (int i = run->num_steps - 1; i > 0; i--)
            used += (size_t)snprintf(every + used, sizeof every - used, "%s%d", used ? "," : "", i);
        if (used) text = every;
    }
    for (int i = run->num_steps / 2; run->is_text && strcmp(text, "auto") == 0 && i > 0; i /= 2)
        used += (size_t)snprintf(every + used, sizeof every - used, "%s%d", used ? "," : "", i);
    if (run->is_text && used) text = every;
    return sweep_plan_add_steps(&run->plan, text, run->num_steps, err);
}

static rf_status make_kv_settings(sweep_run *run, rf_error *err) {
    kv_args args = run->args.kv;
    if (!kv_args_given(&args)) {
        args.policies.count = 1;
        args.policies.items[0] = KV_POLICIES;
    }
    return kv_settings_make(&run->kv, &args, run->args.agnostic ? KV_AGNOSTIC : KV_AWARE, KV_RATIOS, err);
}

/* The uncached run, then policy by policy with falling sizes. */
static rf_status make_kv_plan(sweep_run *run, rf_error *err) {
    RF_TRY(add_spec(run, SWEEP_UNCACHED, err));
    for (int i = 0; i < run->kv.num; i++) {
        const kv_setting *kv = &run->kv.items[i];
        char size[32] = "";
        if (kv_is_none(kv)) continue;
        if (kv->budget > 0) snprintf(size, sizeof size, "budget=%d", (int)kv->budget);
        if (kv->ratio > 0) snprintf(size, sizeof size, "ratio=%g", kv->ratio);
        RF_TRY(sweep_plan_add_kv(&run->plan, kv->name, size, kv, err));
    }
    return RF_OK;
}

static rf_status make_plan(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    if (a->is_kv) return make_kv_plan(run, err);
    if (is_search(a) && a->policies.count == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--target-...: expected the policy to search, as --policy NAME");
    if (run->is_text) RF_TRY(add_spec(run, SWEEP_UNCACHED, err)); /* what the table is read against */
    if (run->num_steps > 0) RF_TRY(add_control(run, err));
    for (int i = 0; i < a->policies.count; i++) {
        if (!is_search(a)) {
            RF_TRY(add_spec(run, a->policies.items[i], err));
            continue;
        }
        sweep_plan fixed = {0};
        sweep_range range;
        rf_status st = sweep_plan_search(a->policies.items[i], run->is_world, &fixed, &range, err);
        sweep_plan_free(&fixed);
        RF_TRY(st);
    }
    return a->policies.count == 0 ? add_spec(run, "all", err) : RF_OK;
}

/* A wrong spec is found before anything is loaded; the numbers of steps of a world are known then. */
static rf_status open_run(sweep_run *run, rf_error *err) {
    const sweep_args *a = &run->args;
    if (a->is_kv) RF_TRY(make_kv_settings(run, err));
    RF_TRY(find_kind(run, err));
    bool known_later = run->is_world || run->is_text;
    run->num_steps = a->num_steps ? (int)a->num_steps : known_later ? 0 : DEFAULT_STEPS;
    RF_TRY(make_plan(run, err));
    RF_TRY(run->kind->open(run, err));
    run->warms_up = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    run->repeats = a->repeats ? (int)a->repeats : run->warms_up ? 3 : run->is_text ? 1 : 2;
    if (!known_later) return RF_OK;
    sweep_plan_free(&run->plan);
    return make_plan(run, err);
}

rf_status sweep_choose_batch(sweep_run *run, int num, int most, const char *what, rf_error *err) {
    int given = (int)run->args.batch;
    if (given && num % given != 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--batch %d: expected a divisor of the %d %s", given, num, what);
    run->batch = given ? given : most < num ? most : num;
    while (num % run->batch != 0) run->batch--;
    return RF_OK;
}

/* --- one run of all pictures -------------------------------------------------------------------------------------- */

rf_status sweep_interrupted(const sweep_run *run, rf_error *err) {
    return rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d of %d settings%s", run->num_done, run->num_todo,
                   run->args.report ? "; the same command goes on from here" : "");
}

void sweep_add_counts(rf_cache_counts *sum, const rf_cache_counts *one) {
    sum->steps_full += one->steps_full;
    sum->steps_partial += one->steps_partial;
    sum->steps_skipped += one->steps_skipped;
    sum->blocks_computed += one->blocks_computed;
    sum->blocks_total += one->blocks_total;
    sum->rows_computed += one->rows_computed;
    sum->rows_total += one->rows_total;
    sum->decide_ms += one->decide_ms;
    sum->bytes = one->bytes;
}

/* --- the uncached run --------------------------------------------------------------------------------------------- */

rf_status sweep_save_picture(const sweep_run *run, const float *planar, const char *stem, int index, rf_error *err) {
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
    for (int i = 0; i < run->num_shown && st == RF_OK && run->args.report; i++)
        st = sweep_save_picture(run, pictures + (size_t)run->shown[i] * stride, stem, i, err);
    return st;
}

static rf_status time_base(sweep_run *run, rf_error *err) {
    sweep_loop r = {0};
    RF_TRY(run->kind->loop(run, run->base, &r, err));
    run->based_ms = now_ms();
    return sweep_store_add_baseline(run->store, r.ms, err);
}

/* Is it time to look at the machine's speed again? */
static rf_status time_base_if_due(sweep_run *run, rf_error *err) {
    double since = now_ms() - run->based_ms,
           every = BASE_EVERY_RUNS * sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW);
    if (since < BASE_EVERY_MS || since < every) return RF_OK;
    return time_base(run, err);
}

static rf_status make_arrays(sweep_run *run, size_t *num_latents, rf_error *err) {
    sweep_reference *r = &run->reference;
    size_t latents = (size_t)r->num * (size_t)r->latent[0] * (size_t)r->latent[1] * (size_t)r->latent[2];
    size_t pictures = (size_t)r->num * (size_t)r->image[0] * (size_t)r->image[1] * (size_t)r->image[2];
    r->latents = rf_alloc(latents * sizeof(float));
    r->pictures = rf_alloc(pictures * sizeof(float));
    run->latents = rf_alloc(latents * sizeof(float));
    run->pictures = rf_alloc(pictures * sizeof(float));
    *num_latents = latents;
    if (!r->latents || !r->pictures || !run->latents || !run->pictures)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for %d pictures of %dx%d", r->num, r->image[2], r->image[1]);
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
    size_t num_latents = 0;
    rf_error missing = {0};
    RF_TRY(run->kind->create(run, NULL, &run->base, err));
    RF_TRY(make_arrays(run, &num_latents, err));
    sweep_loop r = {.latents = run->reference.latents, .pictures = run->reference.pictures};
    rf_status st = run->kind->loop(run, run->base, &r, err);
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
    if (st == RF_OK) st = run->kind->prepare(run, err);
    if (st == RF_OK && !run->warms_up) st = sweep_store_add_baseline(run->store, r.ms, err);
    /* One token a pass is slow and its time needs no second look before the first setting. */
    if (st == RF_OK && (!run->is_text || run->warms_up)) st = time_base(run, err);
    if (st == RF_OK) run->based_ms = now_ms();
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

static rf_status note_work(sweep_row *row, const sweep_loop *r, int64_t image_steps, const uint8_t *kinds,
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

/* Once is enough for what computes everything in every step. */
static int repeats_of(const sweep_run *run, const sweep_setting *setting) {
    return run->is_world && setting->context == SWEEP_CONTEXT_OFF ? 1 : run->repeats;
}

static rf_status measure(sweep_run *run, const sweep_setting *setting, void *session, sweep_row *row, rf_error *err) {
    int num_steps = setting->num_steps ? setting->num_steps : run->num_steps, repeats = repeats_of(run, setting);
    uint8_t *kinds = rf_alloc_zero((size_t)num_steps, 1);
    double *times = rf_alloc_zero((size_t)repeats, sizeof *times);
    sweep_loop r = {0}, first = {0};
    rf_status st = kinds && times ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for %d runs", repeats);
    if (st == RF_OK && run->warms_up) st = run->kind->loop(run, session, &r, err);
    for (int i = 0; i < repeats && st == RF_OK; i++) {
        r = (sweep_loop){0};
        if (i == 0) r = (sweep_loop){.latents = run->latents, .pictures = run->pictures, .kinds = kinds};
        st = run->kind->loop(run, session, &r, err);
        if (i == 0) first = r;
        times[i] = r.ms;
    }
    if (st == RF_OK)
        st = note_work(row, &r, (int64_t)num_steps * run->num_pictures, kinds, num_steps, run->num_steps, err);
    if (st == RF_OK) st = run->kind->quality ? run->kind->quality(run, row, err) : measure_quality(run, row, err);
    if (st == RF_OK) {
        char hash[17];
        row->repeats = repeats;
        row->loop_ms = sweep_median(times, repeats);
        row->loop_min_ms = row->loop_max_ms = times[0];
        for (int i = 1; i < repeats; i++) {
            row->loop_min_ms = fmin(row->loop_min_ms, times[i]);
            row->loop_max_ms = fmax(row->loop_max_ms, times[i]);
        }
        row->base_ms = sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW);
        row->speedup = row->loop_ms > 0 ? row->base_ms / row->loop_ms : NAN;
        r.decode_ms = first.decode_ms;
        st = run->kind->measure(run, &r, row, err);
        sweep_key_hash(setting->key, hash);
        if (st == RF_OK) st = save_pictures(run, run->pictures, hash, err);
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
    char name[256], done[48], kept[48] = "";
    sweep_row_name(row, name, sizeof name);
    if (isfinite(row->kept)) snprintf(kept, sizeof kept, ", %.1f %% kept", 100 * row->kept);
    if (isfinite(row->frames_per_s))
        snprintf(kept + strlen(kept), sizeof kept - strlen(kept), ", %.3g frames/s", row->frames_per_s);
    if (run->num_todo > 0) {
        snprintf(done, sizeof done, "[%d/%d] ", run->num_done, run->num_todo);
    } else {
        done[0] = 0;
    }
    if (strcmp(row->status, "refused") == 0) {
        say("%s%s refused: %s", done, name, row->reason);
    } else if (run->args.is_kv) {
        say("%s%s: %.1f %% right, %.1f %% of tokens agree, %.1f %% of the cache kept, %.1f tokens/s%s", done, name,
            100 * row->score, 100 * row->agreement, 100 * row->kept_bytes / row->full_bytes, row->tok_s, left);
    } else if (run->is_text) {
        say("%s%s: %.2fx, %.1f %% right, %.1f %% of tokens agree, %.1f tokens/s, %.1f %% of row-passes%s", done, name,
            row->speedup, 100 * row->score, 100 * row->agreement, row->tok_s, 100 * row->share_rows, left);
    } else {
        say("%s%s: %.2fx, PSNR %.2f dB, SSIM %.4f%s, %.0f %% of rows%s", done, name, row->speedup, row->psnr_mean,
            row->ssim_mean, kept, 100 * row->share_rows, left);
    }
}

/* Measures a setting unless the store has it; *index is its row. */
static rf_status run_setting(sweep_run *run, const sweep_setting *setting, int *index, rf_error *err) {
    *index = sweep_store_find(run->store, setting->key);
    if (*index >= 0) return RF_OK;
    void *session = NULL;
    sweep_row row = {0};
    sweep_row_clear(&row);
    RF_TRY(time_base_if_due(run, err));
    rf_status st = run->kind->create(run, setting, &session, err);
    bool refused = (setting->object || run->is_world || run->is_text) && is_refusal(st);
    if (st != RF_OK && !refused) return st;
    if (!set_texts(&row, setting, refused ? "refused" : "ok", refused ? err->message : "")) {
        st = rf_fail(err, RF_ERR_MEMORY, "no memory for a result");
    } else {
        st = refused ? RF_OK : measure(run, setting, session, &row, err);
    }
    run->kind->destroy(session);
    if (st != RF_OK && run->is_text && is_refusal(st)) { /* a row policy is asked when a decode begins */
        sweep_row_clear(&row);
        st = set_texts(&row, setting, "refused", err->message) ? RF_OK
                                                               : rf_fail(err, RF_ERR_MEMORY, "no memory for a result");
    }
    if (st != RF_OK) {
        sweep_row_clear(&row);
        return st;
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
    if (st == RF_OK && run->num_done > 0 && !run->is_text) st = time_base(run, err);
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

/* As options of the other commands: what a world's setting says besides has flags of its own. */
static void print_found(const sweep_row *row) {
    char flags[256] = "";
    const char *before = " --cache-option ";
    printf("--cache-mode %s", row->policy);
    for (const char *at = row->options; *at;) {
        int len = (int)strcspn(at, ";");
        size_t used = strlen(flags);
        if (strncmp(at, "carry=", 6) == 0) {
            snprintf(flags + used, sizeof flags - used, " --carry %.*s", len - 6, at + 6);
        } else if (strncmp(at, "context=off", 11) == 0) {
            snprintf(flags + used, sizeof flags - used, " --no-context-cache");
        } else if (strncmp(at, "context=", 8) == 0) {
            snprintf(flags + used, sizeof flags - used, " --context %.*s", len - 8, at + 8);
        } else {
            printf("%s%.*s", before, len, at);
            before = ",";
        }
        at += len;
        if (*at) at++;
    }
    printf("%s\n", flags);
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
        st = sweep_plan_search(run->args.policies.items[i], run->is_world, &fixed, &s.range, err);
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
    if (run->base) run->kind->destroy(run->base);
    if (run->kind) run->kind->close(run);
    rf_backend_close(run->backend);
    sweep_store_close(run->store);
    sweep_plan_free(&run->plan);
    kv_settings_free(&run->kv);
    sweep_reference_free(&run->reference);
    rf_free(run->latents);
    rf_free(run->pictures);
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

    rf_status st = open_run(&run, &err);
    if (st == RF_OK) st = make_reference(&run, &err);
    bool measured = st == RF_OK;
    if (st == RF_OK && !run.args.quiet) run.kind->say_plan(&run);
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
