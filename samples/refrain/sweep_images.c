/* samples/refrain/sweep_images.c - a sweep of a model of images: what is measured is the denoising loop of all pictures. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/memory.h"
#include "dit/pipeline.h"
#include "samples/refrain/sweep_run.h"

#define DEFAULT_PICTURES 4
#define DEFAULT_CFG      4.0
#define MAX_BATCH        64
#define CPU_BATCH_BYTES  ((size_t)512 << 20)
#define GPU_BATCH_BYTES  ((size_t)8 << 30)
#define SHOWN_PICTURES   4

typedef struct {
    rf_image_model *model;
    rf_image_options options; /* of the uncached session */
    int *class_ids;
    uint64_t *seeds;
    char *class_text;
} images;

/* --- opening ------------------------------------------------------------------------------------------------------ */

static rf_status open_model(sweep_run *run, images *own, rf_error *err) {
    const sweep_args *a = &run->args;
    opened_model opened;
    rf_status st =
        open_image_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->model_path = opened.path;
    run->model_name = opened.name;
    run->backend = opened.backend;
    run->dtype = opened.dtype;
    own->model = opened.model;
    return st;
}

/* The largest divisor of the number of pictures that a memory budget allows: every batch is of one size. */
static rf_status choose_batch(sweep_run *run, const images *own, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_model_info info = rf_image_model_get_info(own->model);
    const rf_dit_desc *d = &info.transformer->desc;
    bool cuda = rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA;
    double scale =
        (a->width ? (double)a->width / info.image_width : 1) * (a->height ? (double)a->height / info.image_height : 1);
    double tokens = (double)d->sample_size / d->ph * ((double)d->sample_size / d->pw) * scale;
    double per_picture = 2 * tokens * (double)d->width * 16 * (double)rf_dtype_bytes(run->dtype) + 1;
    double fit = (double)(cuda ? GPU_BATCH_BYTES : CPU_BATCH_BYTES) / per_picture;
    run->num_pictures = a->num_pictures ? (int)a->num_pictures : DEFAULT_PICTURES;
    return sweep_choose_batch(run, run->num_pictures,
                              fit < 1           ? 1
                              : fit > MAX_BATCH ? MAX_BATCH
                                                : (int)fit,
                              "pictures", err);
}

static rf_status plan_pictures(sweep_run *run, images *own, rf_error *err) {
    const sweep_args *a = &run->args;
    int num_classes = rf_image_model_get_info(own->model).num_classes, n = run->num_pictures;
    size_t room = (size_t)n * 12 + 1, used = 0;
    own->class_ids = rf_alloc_zero((size_t)n, sizeof *own->class_ids);
    own->seeds = rf_alloc_zero((size_t)n, sizeof *own->seeds);
    own->class_text = rf_alloc_zero(room, 1);
    if (!own->class_ids || !own->seeds || !own->class_text)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a list of %d pictures", n);
    for (int i = 0; i < n; i++) {
        own->seeds[i] = (uint64_t)a->seed + (uint64_t)i;
        own->class_ids[i] = n < num_classes   ? (int)((int64_t)i * num_classes / n)
                            : num_classes > 0 ? i % num_classes
                                              : 0;
        if (a->classes.count > 0) {
            const char *name = a->classes.items[i % a->classes.count];
            RF_TRY(rf_image_model_find_class(own->model, name, &own->class_ids[i], err));
        }
        used += (size_t)snprintf(own->class_text + used, room - used, "%s%d", i ? " " : "", own->class_ids[i]);
    }
    run->num_shown = n < SHOWN_PICTURES ? n : SHOWN_PICTURES;
    for (int i = 0; i < run->num_shown; i++) run->shown[i] = i;
    return RF_OK;
}

static rf_status plan_options(sweep_run *run, images *own, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_options o = rf_image_options_default();
    o.batch = run->batch;
    o.num_steps = run->num_steps;
    o.cfg_scale = isnan(a->cfg_scale) ? DEFAULT_CFG : a->cfg_scale;
    o.sampler = RF_SAMPLER_COUNT;
    if (a->sampler && !rf_sampler_kind_from_name(a->sampler, &o.sampler))
        return rf_fail(err, RF_ERR_ARGUMENT, "--sampling-method: this build has no %s", a->sampler);
    o.width = (int)a->width;
    o.height = (int)a->height;
    o.force_policy = a->force;
    run->tuning_path = tuning_cache_path(false);
    o.gemm_tuning = run->tuning_path;
    own->options = o;
    return rf_image_options_check(&o, err);
}

static rf_status open_store(sweep_run *run, const images *own, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_image_model_info info = rf_image_model_get_info(own->model);
    rf_sampler_kind sampler = a->sampler ? own->options.sampler : info.scheduler.kind;
    char steps[16], cfg[32], seed[24], pictures[16], size[32], params[24], batch[16], threads[16], date[40] = "";
    time_t now = time(NULL);
    struct tm local;
    snprintf(steps, sizeof steps, "%d", run->num_steps);
    snprintf(cfg, sizeof cfg, "%g", own->options.cfg_scale);
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
        {"classes", own->class_text},
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

static rf_status open_images(sweep_run *run, rf_error *err) {
    images *own = rf_alloc_zero(1, sizeof *own);
    if (!own) return rf_fail(err, RF_ERR_MEMORY, "no memory for a sweep");
    run->own = own;
    RF_TRY(open_model(run, own, err));
    RF_TRY(choose_batch(run, own, err));
    RF_TRY(plan_pictures(run, own, err));
    RF_TRY(plan_options(run, own, err));
    return open_store(run, own, err);
}

/* --- sessions ----------------------------------------------------------------------------------------------------- */

static rf_status create(sweep_run *run, const sweep_setting *setting, void **out, rf_error *err) {
    const images *own = run->own;
    rf_image_options o = own->options;
    rf_image_session *session = NULL;
    if (setting) {
        o.policy = setting->object;
        if (setting->num_steps) o.num_steps = setting->num_steps;
    }
    rf_status st = rf_image_session_create(&session, own->model, &o, err);
    *out = session;
    if (st != RF_OK || setting) return st;
    rf_image_session_info s = rf_image_session_get_info(session);
    run->reference = (sweep_reference){.num = run->num_pictures,
                                       .latent = {s.latent_channels, s.latent_height, s.latent_width},
                                       .image = {3, s.image_height, s.image_width}};
    return RF_OK;
}

static void destroy(void *session) {
    rf_image_session_destroy(session);
}

static bool keep_going(void *user, int step, int num_steps) {
    (void)user;
    (void)step;
    (void)num_steps;
    return !cancel_requested();
}

static rf_status loop_pictures(sweep_run *run, void *opaque, sweep_loop *loop, rf_error *err) {
    const images *own = run->own;
    rf_image_session *session = opaque;
    rf_image_session_info s = rf_image_session_get_info(session);
    size_t latent_stride = (size_t)s.latent_channels * (size_t)s.latent_height * (size_t)s.latent_width;
    size_t picture_stride = 3 * (size_t)s.image_height * (size_t)s.image_width;
    rf_status st = RF_OK;
    for (int first = 0; first < run->num_pictures && st == RF_OK; first += run->batch) {
        st = rf_image_session_denoise(session, own->class_ids + first, own->seeds + first, NULL, keep_going, NULL, err);
        if (st != RF_OK) break;
        s = rf_image_session_get_info(session);
        loop->ms += s.denoise_ms;
        loop->has_cache = s.has_cache;
        sweep_add_counts(&loop->cache, &s.cache);
        if (loop->kinds && first == 0 && s.step_kinds) memcpy(loop->kinds, s.step_kinds, (size_t)s.num_steps);
        if (!loop->latents) continue;
        st = rf_image_session_read_latents(session, loop->latents + (size_t)first * latent_stride, err);
        if (st == RF_OK) st = rf_image_session_decode(session, loop->pictures + (size_t)first * picture_stride, err);
    }
    if (st == RF_ERR_CANCELLED || (st == RF_OK && cancel_requested())) return sweep_interrupted(run, err);
    return st;
}

static rf_status prepare(sweep_run *run, rf_error *err) {
    (void)run;
    (void)err;
    return RF_OK;
}

static rf_status measure(sweep_run *run, const sweep_loop *loop, sweep_row *row, rf_error *err) {
    (void)run;
    (void)loop;
    (void)row;
    (void)err;
    return RF_OK;
}

static void say_plan(const sweep_run *run) {
    const images *own = run->own;
    say("%s on %s in %s: %s, %d steps, cfg %g, %d pictures of %dx%d, %d at once; uncached loop %.2f s; %d settings, %d "
        "run%s each",
        run->model_name, rf_backend_name(run->backend), rf_dtype_name(run->dtype),
        sweep_store_pin(run->store, "sampler"), run->num_steps, own->options.cfg_scale, run->num_pictures,
        run->reference.image[2], run->reference.image[1], run->batch,
        sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW) / 1e3, run->plan.num, run->repeats,
        run->repeats == 1 ? "" : "s");
}

static void close_images(sweep_run *run) {
    images *own = run->own;
    if (!own) return;
    rf_image_model_close(own->model);
    rf_free(own->class_ids);
    rf_free(own->seeds);
    rf_free(own->class_text);
    rf_free(own);
}

const sweep_kind sweep_images = {.open = open_images,
                                 .create = create,
                                 .destroy = destroy,
                                 .loop = loop_pictures,
                                 .prepare = prepare,
                                 .measure = measure,
                                 .say_plan = say_plan,
                                 .close = close_images};
