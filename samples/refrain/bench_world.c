/* samples/refrain/bench_world.c - `refrain bench --what world`: what a new frame of a rollout costs, and of what.
 *
 *   step      one denoising step of the newest frame, with so many frames kept in front of it
 *   commit    keys and values of one more frame; rebuild: of the whole window but the newest frame, as after every slide
 *   decode    latent to picture
 *   frame     denoising and context of a frame, mean over a rollout
 *   rollout   all new frames of one by the clock, from one frame on, without decoding
 * Times of parts are the stream's (device events on CUDA). A latent of every frame is read, as a viewer would read its picture. Runs of
 * warm-up come first: a kind of step is captured when it occurs. */
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "core/rng.h"
#include "samples/refrain/bench_run.h"
#include "samples/refrain/flops.h"
#include "samples/refrain/sweep_plan.h"

#define WARMUP_DEVICE 3
#define WARMUP_HOST   1
#define MOST_ROWS     16 /* of a batch, policies apart */

typedef struct {
    bench *b;
    rf_world_model_info info;
    double tokens; /* of a frame */
    int batch, num_steps, window, num_new;
    bool cuda;
    rf_world_session *session;
    float *latents; /* [batch][window - 1][latent] */
    float *actions; /* [batch][action_dim] */
    float *read;    /* [batch][latent] */
    uint64_t *seeds;
    double *context_ms, *decode_ms, *wall_ms; /* [num_runs] */
    bench_row *rows;
    int num_rows, room;
} world_bench;

/* ---- rows ---- */

static bench_row *new_row(world_bench *w, const char *label, double *times) {
    bench *b = w->b;
    if (w->num_rows == w->room) return NULL; /* room is counted beforehand */
    bench_row *row = &w->rows[w->num_rows++];
    rf_world_session_info s = rf_world_session_get_info(w->session);
    *row = (bench_row){.model = b->model_name,
                       .device = rf_backend_description(b->backend),
                       .dtype = rf_dtype_name(b->dtype),
                       .world = true,
                       .num_params = w->info.num_params,
                       .batch = w->batch,
                       .num_steps = w->num_steps,
                       .arena_bytes = s.arena_bytes,
                       .graph_nodes = s.graph_nodes};
    snprintf(row->label, sizeof row->label, "%s", label);
    snprintf(row->size_text, sizeof row->size_text, "%dx%d", w->info.frame_width, w->info.frame_height);
    bench_row_set_times(row, times, (int)b->args.num_runs);
    return row;
}

/* Operations and the least time of `frames` frames of every rollout, each seeing `kept` and itself. */
static void note_work(const world_bench *w, bench_row *row, double frames, double kept) {
    const bench *b = w->b;
    const rf_dit_model *dit = w->info.transformer;
    if (!row) return;
    double flops = forward_flops(&dit->desc, w->tokens, kept + 1) * frames * w->batch;
    row->tflops = flops / row->median_ms / 1e9;
    row->kept = (int)kept;
    if (b->flops_per_ms <= 0) return;
    double elems = (double)rf_params_num_elems(dit->params) - modulation_elems(&dit->desc) +
                   context_elems(&dit->desc, w->tokens) * kept * w->batch;
    double memory_ms = elems * (double)rf_dtype_bytes(b->dtype) / b->copy_bytes_per_ms;
    double compute_ms = flops / b->flops_per_ms;
    row->floor_ms = memory_ms > compute_ms ? memory_ms : compute_ms;
}

/* ---- running ---- */

static rf_status open_session(world_bench *w, const sweep_setting *setting, bool use_graphs, bool context_cache,
                              rf_error *err) {
    const bench *b = w->b;
    rf_world_options o = rf_world_options_default();
    o.batch = w->batch;
    o.num_steps = w->num_steps;
    o.use_graphs = use_graphs;
    o.context_cache = context_cache;
    o.tune_gemm = b->args.tune;
    o.gemm_tuning = b->tuning_path;
    rf_dtype_from_name(b->args.residual, &o.residual_dtype); /* "auto" is no dtype and leaves the default */
    if (setting) {
        o.policy = setting->object;
        o.carry = setting->carry;
        if (setting->context == SWEEP_CONTEXT_OFF) o.context_cache = false;
        if (setting->context < SWEEP_CONTEXT_OFF) o.context = (rf_context_mode)setting->context;
    }
    rf_world_session_destroy(w->session);
    w->session = NULL;
    return rf_world_session_create(&w->session, b->world, &o, err);
}

static rf_status check_cancelled(int run, rf_error *err) {
    return cancel_requested() ? rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d runs", run < 0 ? 0 : run) : RF_OK;
}

static rf_status make_frame(world_bench *w, int frame, rf_error *err) {
    int dim = w->info.action_dim;
    memset(w->actions, 0, (size_t)(w->batch * dim) * sizeof *w->actions);
    for (int r = 0; r < w->batch && dim > 0; r++) w->actions[r * dim + (frame / 4 + r) % dim] = 1;
    RF_TRY(rf_world_session_step(w->session, w->actions, NULL, err));
    return rf_world_session_read_latent(w->session, w->read, err);
}

static int warmups(const world_bench *w) {
    return w->cuda ? WARMUP_DEVICE : WARMUP_HOST;
}

/* A frame with `kept` frames in front: ms a step into b->times, of computing the kept ones into context_ms. */
static rf_status time_step(world_bench *w, int kept, rf_error *err) {
    int num_runs = (int)w->b->args.num_runs;
    for (int i = -warmups(w); i < num_runs; i++) {
        RF_TRY(rf_world_session_start_latents(w->session, w->latents, kept, NULL, w->seeds, err));
        RF_TRY(make_frame(w, i < 0 ? 0 : i, err));
        RF_TRY(check_cancelled(i, err));
        if (i < 0) continue;
        rf_world_session_info s = rf_world_session_get_info(w->session);
        w->b->times[i] = s.denoise_ms / w->num_steps;
        w->context_ms[i] = s.context_ms;
    }
    return RF_OK;
}

/* A rollout of num_new frames from one: ms of a frame into b->times, by the clock into wall_ms; of the last frame's context and, if wanted,
 * its decoding. */
static rf_status time_rollout(world_bench *w, float *picture, rf_error *err) {
    int num_runs = (int)w->b->args.num_runs;
    for (int i = -warmups(w); i < num_runs; i++) {
        RF_TRY(rf_world_session_start_latents(w->session, w->latents, 1, NULL, w->seeds, err));
        double start = now_ms(), sum = 0;
        rf_world_session_info s = {0};
        for (int frame = 0; frame < w->num_new; frame++) {
            RF_TRY(make_frame(w, frame, err));
            RF_TRY(check_cancelled(i, err));
            s = rf_world_session_get_info(w->session);
            sum += s.denoise_ms + s.context_ms;
        }
        double wall = now_ms() - start;
        if (picture) RF_TRY(rf_world_session_read_frame(w->session, picture, err));
        if (i < 0) continue;
        w->b->times[i] = sum / w->num_new;
        w->wall_ms[i] = wall;
        w->context_ms[i] = s.context_ms;
        w->decode_ms[i] = rf_world_session_get_info(w->session).decode_ms;
    }
    return RF_OK;
}

/* ---- what is timed ---- */

static rf_status add_step(world_bench *w, int kept, const char *more, rf_error *err) {
    char label[96];
    RF_TRY(time_step(w, kept, err));
    snprintf(label, sizeof label, "step, %d frame%s kept%s", kept, kept == 1 ? "" : "s", more);
    note_work(w, new_row(w, label, w->b->times), 1, kept);
    return RF_OK;
}

static rf_status add_steps(world_bench *w, rf_error *err) {
    int most = w->window - 1;
    char label[96];
    RF_TRY(add_step(w, 1, "", err));
    if (most > 8) RF_TRY(add_step(w, 8, "", err));
    if (most > 1) RF_TRY(add_step(w, most, "", err));
    snprintf(label, sizeof label, "rebuild of %d frames", most);
    bench_row *row = new_row(w, label, w->context_ms); /* of the last of them */
    note_work(w, row, most, (most - 1) / 2.0);
    if (row) row->kept = 0;
    return RF_OK;
}

static void name_rollout(const world_bench *w, char *label, size_t bytes, const char *more) {
    snprintf(label, bytes, "rollout of %d frames%s", w->num_new, more);
}

/* frame and rollout rows of the open session. */
static bench_row *add_rollout_rows(world_bench *w, const char *more) {
    char label[BENCH_LABEL];
    snprintf(label, sizeof label, "frame%s", more);
    bench_row *frame = new_row(w, label, w->b->times);
    if (frame && frame->median_ms > 0) frame->frames_per_s = w->batch * 1e3 / frame->median_ms;
    name_rollout(w, label, sizeof label, more);
    bench_row *rollout = new_row(w, label, w->wall_ms);
    if (rollout) rollout->frames = w->num_new;
    if (rollout && rollout->median_ms > 0) rollout->frames_per_s = w->batch * w->num_new * 1e3 / rollout->median_ms;
    return rollout;
}

static rf_status add_plain(world_bench *w, float *picture, rf_error *err) {
    char label[96];
    RF_TRY(time_rollout(w, picture, err));
    int kept = w->num_new < w->window - 1 ? w->num_new - 1 : w->window - 2;
    if (w->num_new > w->window - 1) {
        snprintf(label, sizeof label, "context of the last frame");
    } else {
        snprintf(label, sizeof label, "commit of 1 frame, %d kept", kept);
    }
    if (w->num_new > 1) new_row(w, label, w->context_ms);
    bench_row *decode = new_row(w, "decode", w->decode_ms);
    bench_row *rollout = add_rollout_rows(w, "");
    if (decode && rollout && rollout->median_ms > 0) {
        double ms = rollout->median_ms + w->num_new * decode->median_ms;
        decode->frames_per_s = w->batch * w->num_new * 1e3 / ms; /* of rollout and decoding */
    }
    return RF_OK;
}

static rf_status add_variant(world_bench *w, const sweep_setting *setting, bool graphs, bool context_cache,
                             const char *more, rf_error *err) {
    rf_status st = open_session(w, setting, graphs, context_cache, err);
    if (st != RF_OK && setting) return rf_fail_prefix(err, st, "--policy %s%s", setting->policy, more);
    RF_TRY(st);
    if (!setting && context_cache && w->window > 2) RF_TRY(add_step(w, w->window - 1, more, err));
    RF_TRY(time_rollout(w, NULL, err));
    add_rollout_rows(w, more);
    return RF_OK;
}

static rf_status bench_batch(world_bench *w, const sweep_plan *plan, float *picture, rf_error *err) {
    RF_TRY(open_session(w, NULL, true, true, err));
    RF_TRY(add_steps(w, err));
    RF_TRY(add_plain(w, picture, err));
    if (w->cuda) RF_TRY(add_variant(w, NULL, false, true, ", no graphs", err));
    if (w->b->args.no_context_cache) RF_TRY(add_variant(w, NULL, true, false, ", nothing kept", err));
    for (int i = 0; i < plan->num; i++) {
        const sweep_setting *s = &plan->items[i];
        char more[BENCH_LABEL];
        snprintf(more, sizeof more, ", %s%s%s", s->policy, s->options[0] ? ":" : "", s->options);
        RF_TRY(add_variant(w, s, true, true, more, err));
    }
    return RF_OK;
}

/* ---- all ---- */

static rf_status alloc_batch(world_bench *w, float **picture, rf_error *err) {
    size_t latent = (size_t)w->info.latent_channels * (size_t)w->info.latent_height * (size_t)w->info.latent_width;
    size_t frame = 3 * (size_t)w->info.frame_height * (size_t)w->info.frame_width, batch = (size_t)w->batch;
    size_t num_latents = batch * (size_t)(w->window - 1) * latent;
    w->latents = rf_alloc(num_latents * sizeof *w->latents);
    w->actions = rf_alloc_zero(batch * (size_t)w->info.action_dim + 1, sizeof *w->actions);
    w->read = rf_alloc(batch * latent * sizeof *w->read);
    w->seeds = rf_alloc_zero(batch, sizeof *w->seeds);
    *picture = rf_alloc(batch * frame * sizeof **picture);
    if (!w->latents || !w->actions || !w->read || !w->seeds || !*picture)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for %d rollouts", w->batch);
    rf_rng_normal_at(0, 0, 0, w->latents, num_latents);
    for (int i = 0; i < w->batch; i++) w->seeds[i] = (uint64_t)i;
    return RF_OK;
}

static void free_batch(world_bench *w, float *picture) {
    rf_world_session_destroy(w->session);
    w->session = NULL;
    rf_free(w->latents);
    rf_free(w->actions);
    rf_free(w->read);
    rf_free(w->seeds);
    rf_free(picture);
    w->latents = w->actions = w->read = NULL;
    w->seeds = NULL;
}

static rf_status plan_policies(const bench *b, sweep_plan *plan, rf_error *err) {
    for (int i = 0; i < b->args.policies.count; i++)
        RF_TRY(sweep_plan_add_world(plan, b->args.policies.items[i], false, err));
    return RF_OK;
}

static rf_status bench_all(world_bench *w, const sweep_plan *plan, rf_error *err) {
    for (int i = 0; i < w->b->num_batches; i++) {
        float *picture = NULL;
        w->batch = w->b->batches[i];
        rf_status st = alloc_batch(w, &picture, err);
        if (st == RF_OK) st = bench_batch(w, plan, picture, err);
        free_batch(w, picture);
        RF_TRY(st);
    }
    return RF_OK;
}

rf_status bench_worlds(bench *b, bench_row **rows, int *num_rows, rf_error *err) {
    sweep_plan plan = {0};
    world_bench w = {.b = b, .info = rf_world_model_get_info(b->world)};
    const rf_dit_desc *d = &w.info.transformer->desc;
    size_t num_runs = (size_t)b->args.num_runs;
    *rows = NULL;
    *num_rows = 0;
    w.cuda = rf_backend_get_kind(b->backend) == RF_BACKEND_CUDA;
    w.tokens = (double)(w.info.latent_height / d->ph * (w.info.latent_width / d->pw));
    w.num_steps = b->args.num_steps ? (int)b->args.num_steps : w.info.num_steps;
    w.window = w.info.max_frames;
    w.num_new = b->args.num_frames ? (int)b->args.num_frames - 1 : w.window - 1;
    rf_status st = plan_policies(b, &plan, err);
    w.room = b->num_batches * (MOST_ROWS + 2 * plan.num);
    w.rows = rf_alloc_zero((size_t)w.room, sizeof *w.rows);
    w.context_ms = rf_alloc_zero(num_runs, sizeof *w.context_ms);
    w.decode_ms = rf_alloc_zero(num_runs, sizeof *w.decode_ms);
    w.wall_ms = rf_alloc_zero(num_runs, sizeof *w.wall_ms);
    if (st == RF_OK && (!w.rows || !w.context_ms || !w.decode_ms || !w.wall_ms))
        st = rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    if (st == RF_OK) st = bench_all(&w, &plan, err);
    for (int i = 0; i < w.num_rows; i++) {
        w.rows[i].what = w.rows[i].label;
        w.rows[i].size = w.rows[i].size_text;
    }
    *rows = w.rows;
    *num_rows = w.num_rows;
    sweep_plan_free(&plan);
    rf_free(w.context_ms);
    rf_free(w.decode_ms);
    rf_free(w.wall_ms);
    return st;
}
