/* samples/refrain/sweep_worlds.c - a sweep of a world model: what is measured are the new frames of some walks.
 *
 * A walk is a first frame, a list of actions and a seed of noise. Where the model has a simulator the first frame is drawn by it, and the
 * frames that it would show are at hand: then what counts is how much of the uncached run's PSNR to them a setting keeps. Else
 * the first frame is --init's, or latents of noise for a model that has neither.
 * The reference is the uncached run with the context kept as --context says (rebuild: the same as computing everything). All
 * settings start from the same frames with the same noise and are free to drift: errors compound, as in use. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/memory.h"
#include "core/metrics.h"
#include "samples/refrain/sweep_run.h"
#include "samples/refrain/world_walks.h"

#define DEFAULT_WALKS  2
#define DEFAULT_FRAMES 24
#define FIRST_WORLD    11 /* seeds of the simulator */
#define GOOD_DB        30.0
#define PLAIN_KEY      "none:context=off"

typedef struct {
    rf_world_model *model;
    rf_world_options options; /* of the uncached session */
    world_walks w;
    double truth_db;    /* PSNR of the reference to the simulator, mean */
    float *row_actions; /* [batch][action_dim] */
    float *frame;       /* [batch] of the larger of frame and latent */
} worlds;

/* --- opening ------------------------------------------------------------------------------------------------------ */

static rf_status open_model(sweep_run *run, worlds *own, rf_error *err) {
    const sweep_args *a = &run->args;
    opened_world opened;
    rf_status st =
        open_world_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &run->log, err);
    run->model_path = opened.path;
    run->model_name = opened.name;
    run->backend = opened.backend;
    run->dtype = opened.dtype;
    own->model = opened.model;
    if (st != RF_OK) return st;
    own->w.info = rf_world_model_get_info(own->model);
    run->num_steps = a->num_steps ? (int)a->num_steps : own->w.info.num_steps;
    return RF_OK;
}

static rf_status plan_options(sweep_run *run, worlds *own, rf_error *err) {
    const sweep_args *a = &run->args;
    rf_world_options o = rf_world_options_default();
    int num_frames = a->num_frames ? (int)a->num_frames : DEFAULT_FRAMES;
    own->w.num = a->num_walks ? (int)a->num_walks : DEFAULT_WALKS;
    own->w.num_new = num_frames - 1;
    run->num_pictures = own->w.num * own->w.num_new;
    RF_TRY(sweep_choose_batch(run, own->w.num, 1, "walks", err));
    o.batch = run->batch;
    o.num_steps = run->num_steps;
    o.window = a->window ? (int)a->window : own->w.info.max_frames;
    if (o.window > own->w.info.max_frames)
        return rf_fail(err, RF_ERR_ARGUMENT, "--window: %s was trained with %d frames, the new one included; found %d",
                       run->model_name, own->w.info.max_frames, o.window);
    if (a->context && !rf_context_mode_from_name(a->context, &o.context))
        return rf_fail(err, RF_ERR_ARGUMENT, "--context: this build has no %s", a->context);
    if (a->num_sinks) {
        o.num_sinks = (int)a->num_sinks;
    } else if (o.num_sinks > o.window - 2) {
        o.num_sinks = o.window > 3 ? o.window - 2 : 1;
    }
    o.force_policy = a->force;
    run->tuning_path = tuning_cache_path(false);
    o.gemm_tuning = run->tuning_path;
    run->slides = num_frames > o.window;
    own->options = o;
    return rf_world_options_check(&o, own->model, err);
}

static rf_status plan_walks(sweep_run *run, worlds *own, rf_error *err) {
    const world_walks_options o = {.model_name = run->model_name,
                                   .synthetic = run->args.synthetic,
                                   .inits = &run->args.inits,
                                   .actions = &run->args.actions,
                                   .seed = (uint64_t)run->args.seed,
                                   .first_world = FIRST_WORLD,
                                   .num = own->w.num,
                                   .num_new = own->w.num_new,
                                   .window = own->options.window,
                                   .quiet = run->args.quiet};
    RF_TRY(world_walks_make(&own->w, own->model, &o, err));
    size_t elems = world_walks_frame_elems(&own->w) > world_walks_latent_elems(&own->w)
                       ? world_walks_frame_elems(&own->w)
                       : world_walks_latent_elems(&own->w);
    own->row_actions = rf_alloc_zero((size_t)run->batch * (size_t)own->w.info.action_dim + 1, sizeof *own->row_actions);
    own->frame = rf_alloc_zero((size_t)run->batch * elems, sizeof *own->frame);
    if (!own->row_actions || !own->frame) return rf_fail(err, RF_ERR_MEMORY, "no memory for a frame");
    run->num_shown = own->w.num_new < SWEEP_MAX_SHOWN ? own->w.num_new : SWEEP_MAX_SHOWN;
    for (int i = 0; i < run->num_shown; i++) /* of the first walk, the last frame among them */
        run->shown[i] = (i + 1) * own->w.num_new / run->num_shown - 1;
    return RF_OK;
}

static rf_status open_store(sweep_run *run, worlds *own, rf_error *err) {
    const rf_world_options *o = &own->options;
    char steps[16], frames[16], walks[16], window[16], sinks[32] = "", context[64], seed[24], size[32], params[24],
                                                       batch[16], threads[16], shown[128] = "", date[40] = "";
    time_t now = time(NULL);
    struct tm local;
    size_t used = 0;
    snprintf(steps, sizeof steps, "%d", run->num_steps);
    snprintf(frames, sizeof frames, "%d", own->w.num_new + 1);
    snprintf(walks, sizeof walks, "%d", own->w.num);
    snprintf(window, sizeof window, "%d", o->window);
    if (run->slides) snprintf(sinks, sizeof sinks, ", %d sinks where sinks are kept", o->num_sinks);
    snprintf(context, sizeof context, "%s%s", rf_context_mode_name(o->context), sinks);
    snprintf(seed, sizeof seed, "%jd", (intmax_t)run->args.seed);
    snprintf(size, sizeof size, "%dx%d", own->w.info.frame_width, own->w.info.frame_height);
    snprintf(params, sizeof params, "%jd", (intmax_t)own->w.info.num_params);
    snprintf(batch, sizeof batch, "%d", run->batch);
    snprintf(threads, sizeof threads, "%d", rf_backend_num_threads(run->backend));
    for (int i = 0; i < run->num_shown; i++)
        used += (size_t)snprintf(shown + used, sizeof shown - used, "%s%d", i ? " " : "", run->shown[i] + 1);
    if (localtime_r(&now, &local)) strftime(date, sizeof date, "%Y-%m-%d %H:%M %z", &local);
    const sweep_pin pins[] = {
        {"model", (char *)(uintptr_t)run->model_name},
        {"parameters", params},
        {"steps", steps},
        {"frames", frames},
        {"walks", walks},
        {"window", window},
        {"context", context},
        {"init", own->w.prompt_text},
        {"actions", own->w.action_text},
        {"simulator", (char *)(uintptr_t)(own->w.truth ? own->w.info.simulator : "none")},
        {"seed", seed},
        {"size", size},
        {"batch", batch},
        {"device", (char *)(uintptr_t)rf_backend_description(run->backend)},
        {"dtype", (char *)(uintptr_t)rf_dtype_name(run->dtype)},
        {"threads", threads},
        {"_shown", shown},
        {"_date", date},
        {"_version", (char *)(uintptr_t)RF_VERSION},
    };
    return sweep_store_open(&run->store, run->args.report, pins, sizeof pins / sizeof pins[0], err);
}

static rf_status open_worlds(sweep_run *run, rf_error *err) {
    worlds *own = rf_alloc_zero(1, sizeof *own);
    if (!own) return rf_fail(err, RF_ERR_MEMORY, "no memory for a sweep");
    run->own = own;
    RF_TRY(open_model(run, own, err));
    RF_TRY(plan_options(run, own, err));
    RF_TRY(plan_walks(run, own, err));
    return open_store(run, own, err);
}

/* --- sessions ----------------------------------------------------------------------------------------------------- */

static rf_status create(sweep_run *run, const sweep_setting *setting, void **out, rf_error *err) {
    const worlds *own = run->own;
    rf_world_options o = own->options;
    rf_world_session *session = NULL;
    if (setting) {
        o.policy = setting->object;
        o.carry = setting->carry;
        if (setting->num_steps) o.num_steps = setting->num_steps;
        if (setting->context == SWEEP_CONTEXT_OFF) {
            o.context_cache = false;
            o.context = RF_CONTEXT_REBUILD;
        } else if (setting->context != SWEEP_CONTEXT_GIVEN) {
            o.context = (rf_context_mode)setting->context;
        }
    }
    rf_status st = rf_world_session_create(&session, own->model, &o, err);
    *out = session;
    if (st == RF_OK && !setting) {
        run->reference = (sweep_reference){
            .num = run->num_pictures,
            .latent = {own->w.info.latent_channels, own->w.info.latent_height, own->w.info.latent_width},
            .image = {3, own->w.info.frame_height, own->w.info.frame_width}};
    }
    return st;
}

static void destroy(void *session) {
    rf_world_session_destroy(session);
}

/* The newest frame of a batch of walks to its places. */
static rf_status read_frame(const sweep_run *run, const worlds *own, rf_world_session *session, sweep_loop *loop,
                            int first, int frame, rf_error *err) {
    size_t latent = world_walks_latent_elems(&own->w), picture = world_walks_frame_elems(&own->w);
    RF_TRY(rf_world_session_read_latent(session, own->frame, err)); /* which also makes the times known */
    if (!loop->latents) return RF_OK;
    for (int b = 0; b < run->batch; b++) {
        size_t place = (size_t)((first + b) * own->w.num_new + frame);
        memcpy(loop->latents + place * latent, own->frame + (size_t)b * latent, latent * sizeof(float));
    }
    RF_TRY(rf_world_session_read_frame(session, own->frame, err));
    for (int b = 0; b < run->batch; b++) {
        size_t place = (size_t)((first + b) * own->w.num_new + frame);
        memcpy(loop->pictures + place * picture, own->frame + (size_t)b * picture, picture * sizeof(float));
    }
    loop->decode_ms += rf_world_session_get_info(session).decode_ms;
    return RF_OK;
}

static rf_status loop_walks(sweep_run *run, void *opaque, sweep_loop *loop, rf_error *err) {
    const worlds *own = run->own;
    rf_world_session *session = opaque;
    size_t dim = (size_t)own->w.info.action_dim;
    for (int first = 0; first < own->w.num; first += run->batch) {
        RF_TRY(world_walks_start(&own->w, session, first, err));
        rf_world_session_info s = {0};
        for (int frame = 0; frame < own->w.num_new; frame++) {
            for (int b = 0; b < run->batch; b++)
                memcpy(own->row_actions + (size_t)b * dim, world_walks_actions(&own->w, first + b, frame),
                       dim * sizeof(float));
            RF_TRY(rf_world_session_step(session, own->row_actions, NULL, err));
            RF_TRY(read_frame(run, own, session, loop, first, frame, err));
            s = rf_world_session_get_info(session);
            loop->denoise_ms += s.denoise_ms;
            loop->context_ms += s.context_ms;
            if (cancel_requested()) return sweep_interrupted(run, err);
        }
        loop->has_cache = s.has_cache;
        sweep_add_counts(&loop->cache, &s.total);
        loop->frame_forwards += s.frame_forwards;
        loop->arena_bytes = s.arena_bytes;
        if (loop->kinds && first == 0 && s.step_kinds) memcpy(loop->kinds, s.step_kinds, (size_t)s.num_steps);
    }
    loop->ms = loop->denoise_ms + loop->context_ms;
    return RF_OK;
}

/* --- quality ------------------------------------------------------------------------------------------------------ */

/* PSNR of all frames to the simulator's, each [num_pictures] if not NULL; *mean. */
static rf_status to_simulator(const sweep_run *run, const float *pictures, double *each, double *mean, rf_error *err) {
    const worlds *own = run->own;
    size_t frame = world_walks_frame_elems(&own->w);
    *mean = 0;
    for (int i = 0; i < run->num_pictures; i++) {
        rf_picture_metrics m;
        RF_TRY(rf_metric_picture(pictures + (size_t)i * frame, own->w.truth + (size_t)i * frame, 3,
                                 own->w.info.frame_height, own->w.info.frame_width, &m, err));
        double db = m.psnr_db > SWEEP_EQUAL_DB ? SWEEP_EQUAL_DB : m.psnr_db;
        if (each) each[i] = db;
        *mean += db / run->num_pictures;
    }
    return RF_OK;
}

static rf_status save_truth(const sweep_run *run, const worlds *own, rf_error *err) {
    for (int i = 0; i < run->num_shown && run->args.report; i++)
        RF_TRY(sweep_save_picture(run, own->w.truth + (size_t)run->shown[i] * world_walks_frame_elems(&own->w),
                                  "simulator", i, err));
    return RF_OK;
}

static rf_status prepare(sweep_run *run, rf_error *err) {
    worlds *own = run->own;
    if (!own->w.truth) return RF_OK;
    RF_TRY(to_simulator(run, run->reference.pictures, NULL, &own->truth_db, err));
    return save_truth(run, own, err);
}

static rf_status note_simulator(sweep_run *run, sweep_row *row, rf_error *err) {
    const worlds *own = run->own;
    size_t room = (size_t)run->num_pictures * 16 + 1, used = 0;
    double *each = rf_alloc_zero((size_t)run->num_pictures, sizeof *each);
    row->sim_each = rf_alloc_zero(room, 1);
    rf_status st = each && row->sim_each
                       ? RF_OK
                       : rf_fail(err, RF_ERR_MEMORY, "no memory for the quality of %d frames", run->num_pictures);
    if (st == RF_OK) st = to_simulator(run, run->pictures, each, &row->sim_psnr, err);
    for (int i = 0; i < run->num_pictures && st == RF_OK; i++)
        used += (size_t)snprintf(row->sim_each + used, room - used, "%s%.6g", i ? " " : "", each[i]);
    if (st == RF_OK && own->truth_db > 0) row->kept = row->sim_psnr / own->truth_db;
    rf_free(each);
    return st;
}

/* Numbers of frames: the worst, and the first that is no longer good, of any walk. */
static void note_frames(const worlds *own, sweep_row *row) {
    const char *at = row->psnr_each;
    double worst = INFINITY;
    char *end = NULL;
    for (int i = 0; i < own->w.num * own->w.num_new; i++, at = end) {
        double db = strtod(at, &end);
        if (end == at) return;
        int frame = i % own->w.num_new + 1;
        if (!(db >= worst)) {
            worst = db;
            row->worst_frame = frame;
        }
        if (!(db >= GOOD_DB) && !(row->first_under_30 <= frame)) row->first_under_30 = frame;
    }
}

static rf_status measure(sweep_run *run, const sweep_loop *loop, sweep_row *row, rf_error *err) {
    const worlds *own = run->own;
    row->frame_denoise_ms = loop->denoise_ms / run->num_pictures;
    row->frame_context_ms = loop->context_ms / run->num_pictures;
    row->frame_decode_ms = loop->decode_ms / run->num_pictures;
    double frame_ms = row->loop_ms / run->num_pictures + row->frame_decode_ms;
    row->frames_per_s = frame_ms > 0 ? 1e3 / frame_ms : NAN;
    row->frame_forwards = (double)loop->frame_forwards / own->w.num;
    row->arena_bytes = (double)loop->arena_bytes;
    int plain = sweep_store_find(run->store, PLAIN_KEY);
    const sweep_row *other = plain >= 0 ? sweep_store_at(run->store, plain) : NULL;
    if (strcmp(row->key, PLAIN_KEY) == 0) row->plain_speedup = 1;
    if (other && other->speedup > 0) row->plain_speedup = row->speedup / other->speedup;
    note_frames(own, row);
    return own->w.truth ? note_simulator(run, row, err) : RF_OK;
}

static void say_plan(const sweep_run *run) {
    const worlds *own = run->own;
    char quality[64] = "";
    double ms = sweep_store_base_ms(run->store, SWEEP_BASE_WINDOW);
    if (own->w.truth) snprintf(quality, sizeof quality, ", PSNR to the simulator %.2f dB", own->truth_db);
    say("%s on %s in %s: %d steps a frame, %d walk%s of %d frames of %dx%d, window %d, %d at once; uncached %.2f s, "
        "%.3g new frames/s%s; %d settings, %d run%s each",
        run->model_name, rf_backend_name(run->backend), rf_dtype_name(run->dtype), run->num_steps, own->w.num,
        own->w.num == 1 ? "" : "s", own->w.num_new + 1, own->w.info.frame_width, own->w.info.frame_height,
        own->options.window, run->batch, ms / 1e3, run->num_pictures * 1e3 / ms, quality, run->plan.num, run->repeats,
        run->repeats == 1 ? "" : "s");
}

static void close_worlds(sweep_run *run) {
    worlds *own = run->own;
    if (!own) return;
    world_walks_free(&own->w);
    rf_world_model_close(own->model);
    rf_free(own->row_actions);
    rf_free(own->frame);
    rf_free(own);
}

const sweep_kind sweep_worlds = {.open = open_worlds,
                                 .create = create,
                                 .destroy = destroy,
                                 .loop = loop_walks,
                                 .prepare = prepare,
                                 .measure = measure,
                                 .say_plan = say_plan,
                                 .close = close_worlds};
