/* samples/refrain/cmd_bench.c - `refrain bench`: time of one forward of the transformer, of whole images, of a world's frames, or of
 * passes of a text model.
 *
 * dit-forward  One forward of `batch` rows (both branches of guidance counted), replayed from a CUDA graph where there are
 *              graphs. Replays are queued back to back between time marks on the stream, so what is timed is the device.
 * image        Denoising and decoding of `batch` pictures, as `refrain image` runs them, by the clock.
 * world        The parts of a new frame of `batch` rollouts, and whole rollouts: bench_world.c.
 * text         Passes of `batch` sequences, by computed rows and kept keys: bench_text.c. With --kv or --kv-policy a step behind a
 *              prompt whose cache is under a budget: bench_kv.c.
 * Warm-up runs come first and are not counted. TFLOP/s counts the transformer's matrix products and attention, two operations
 * a multiply-add; modulation is computed once a run and not counted in a forward.
 * The floor (--floors) is the larger of: the weights read once at the measured speed of a device copy, and the operations at
 * the measured speed of a large GEMM of the same dtype. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dit/pipeline.h"
#include "samples/refrain/args.h"
#include "samples/refrain/bench_run.h"
#include "samples/refrain/bench_table.h"
#include "samples/refrain/flops.h"
#include "samples/refrain/program.h"

#define DEFAULT_RUNS  15
#define MAX_RUNS      10000
#define DEFAULT_STEPS 20
#define WARMUP_DEVICE 20
#define WARMUP_HOST   1
#define NUM_MARKS     16 /* of a stream */
#define COPY_BYTES    ((size_t)1 << 30)
#define HOST_COPY     ((size_t)64 << 20)

static args_result read_args(bench_args *a, int argc, char **argv) {
    *a = (bench_args){.what = "dit-forward",
                      .format = "md",
                      .device = "auto",
                      .dtype = "auto",
                      .residual = "auto",
                      .num_runs = DEFAULT_RUNS,
                      .cfg_scale = 4};
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "folder, or name of a shipped model (default: objects)", &a->model),
        arg_string("synthetic-weights", 0, "CONFIG",
                   "random weights: dit-xl-2-256, oasis-500m, llada-8b, a config.json, ...", &a->synthetic),
        arg_choice("what", 0, "dit-forward, image, world, text (default: dit-forward)", &a->what,
                   "dit-forward image world text"),
        arg_string("rows", 'p', "N[,N...]", "text: computed rows (default: by the model's kind)", &a->rows),
        arg_string("kept", 0, "N[,N...]", "text: keys in front of them (default: likewise)", &a->kept),
        arg_flag("kv", 0, "text: steps under KV policies, a list of the usual ones", &a->is_kv),
        KV_LIST_ROWS(&a->kv, "budget 2048"),
        arg_string("batch-size", 'b', "N[,N...]",
                   "rows with both branches counted; pictures; rollouts; texts (default: 2; worlds, text 1)",
                   &a->batches),
        arg_int("repetitions", 'r', "N", "timed runs after warm-up (default: 15)", &a->num_runs, 1, MAX_RUNS),
        arg_int("steps", 0, "N", "denoising steps (default: images 20, a world's own)", &a->num_steps, 1, 10000),
        arg_int("frames", 0, "N", "world: with the first (default: its window)", &a->num_frames, 2, 100000),
        arg_strings("policy", 0, "SPEC", "world: also rollouts with it, as in refrain sweep", &a->policies),
        arg_flag("no-context-cache", 0, "world: also rollouts that keep no frames", &a->no_context_cache),
        arg_double("cfg-scale", 0, "X", "image: guidance; 1 = one branch (default: 4)", &a->cfg_scale, 0, 1000),
        arg_int("width", 'W', "PIXELS", "default: the model's", &a->width, 8, 16384),
        arg_int("height", 'H', "PIXELS", "default: the model's", &a->height, 8, 16384),
        arg_choice("output", 'o', "format: md, csv, json, jsonl (default: md)", &a->format, "md csv json jsonl"),
        arg_flag("floors", 0, "also measure copy and GEMM speed: the least time", &a->floors),
        arg_flag("tune", 0, "CUDA: time GEMM algorithms first and keep the best", &a->tune),
        arg_string("gemm-tuning", 0, "FILE", "kept choices (default: the user's cache folder)", &a->tuning),
        arg_string("device", 0, "NAME", "auto, cpu, cuda, cuda:N (default: auto)", &a->device),
        arg_choice("dtype", 0, "auto, f32, bf16 (default: bf16 on CUDA, else f32)", &a->dtype, "auto f32 bf16"),
        arg_choice("residual", 0, "dtype of the residual stream: auto, f32, bf16 (default: --dtype)", &a->residual,
                   "auto f32 bf16"),
        arg_int("threads", 't', "N", "CPU threads (default: all)", &a->threads, 1, 1024),
        arg_flag("quiet", 'q', "say nothing but errors and results", &a->quiet),
        arg_count("verbose", 'v', "say more; twice for debugging", &a->verbosity),
    };
    const arg_spec spec = {
        .command = "refrain bench",
        .usage = "[options]",
        .about = "Times a forward of the transformer, whole images, frames of a world, or passes of a text model.",
        .options = options,
        .num_options = sizeof options / sizeof options[0]};
    args_result result = args_parse(&spec, argc, argv, NULL, NULL);
    if (result == ARGS_OK && a->model && a->synthetic) {
        say_error("--model and --synthetic-weights exclude each other");
        return ARGS_USAGE_ERROR;
    }
    if (result == ARGS_OK && strcmp(a->what, "world") != 0 &&
        (a->num_frames || a->policies.count || a->no_context_cache)) {
        say_error("--%s: of --what world", a->num_frames       ? "frames"
                                           : a->policies.count ? "policy"
                                                               : "no-context-cache");
        return ARGS_USAGE_ERROR;
    }
    if (result == ARGS_OK && strcmp(a->what, "text") != 0 && (a->rows || a->kept)) {
        say_error("--%s: of --what text", a->rows ? "rows" : "kept");
        return ARGS_USAGE_ERROR;
    }
    a->is_kv |= kv_args_given(&a->kv);
    if (result == ARGS_OK && a->is_kv && (strcmp(a->what, "text") != 0 || a->rows)) {
        say_error(a->rows ? "--rows: a step under a KV policy has one" : "--kv: of --what text");
        return ARGS_USAGE_ERROR;
    }
    if (result == ARGS_OK && !a->is_kv && (a->kv.budgets || a->kv.ratios || a->kv.options.count)) {
        say_error("--kv-%s: no policy is chosen (--kv-policy, or --kv for the usual ones)", a->kv.budgets  ? "budget"
                                                                                            : a->kv.ratios ? "ratio"
                                                                                                           : "option");
        return ARGS_USAGE_ERROR;
    }
    return result;
}

static bool is_text(const bench *b) {
    return strcmp(b->args.what, "text") == 0;
}

static bool is_world(const bench *b) {
    return strcmp(b->args.what, "world") == 0;
}

rf_status bench_read_numbers(const char *all, const char *option, int min, int max, int *out, int *num, rf_error *err) {
    for (const char *text = all;;) {
        char *end = NULL;
        long v = strtol(text, &end, 10);
        if (end == text || (*end && *end != ',') || v < min || v > max) {
            return rf_fail(err, RF_ERR_ARGUMENT, "--%s: expected numbers %d..%d with commas between, found '%s'",
                           option, min, max, all);
        }
        if (*num == MAX_BATCHES)
            return rf_fail(err, RF_ERR_ARGUMENT, "--%s: more than %d numbers", option, MAX_BATCHES);
        out[(*num)++] = (int)v;
        if (!*end) return RF_OK;
        text = end + 1;
    }
}

static rf_status read_batches(bench *b, rf_error *err) {
    const char *text = b->args.batches ? b->args.batches : is_world(b) || is_text(b) ? "1" : "2";
    return bench_read_numbers(text, "batch-size", 1, 4096, b->batches, &b->num_batches, err);
}

static rf_status open_model(bench *b, rf_error *err) {
    const bench_args *a = &b->args;
    if (is_text(b)) return bench_text_open(b, err);
    if (is_world(b)) {
        opened_world opened;
        rf_status st =
            open_world_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &b->log, err);
        b->model_path = opened.path;
        b->model_name = opened.name;
        b->backend = opened.backend;
        b->dtype = opened.dtype;
        b->world = opened.model;
        return st;
    }
    opened_model opened;
    rf_status st =
        open_image_model(&opened, a->model, a->synthetic, a->device, (int)a->threads, a->dtype, &b->log, err);
    b->model_path = opened.path;
    b->model_name = a->synthetic ? a->synthetic : opened.name;
    b->backend = opened.backend;
    b->dtype = opened.dtype;
    b->model = opened.model;
    return st;
}

static rf_status open_bench(bench *b, rf_error *err) {
    const bench_args *a = &b->args;
    RF_TRY(read_batches(b, err));
    RF_TRY(open_model(b, err));
    if (a->tune && rf_backend_get_kind(b->backend) != RF_BACKEND_CUDA) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--tune chooses CUDA GEMM algorithms; the device is %s",
                       rf_backend_name(b->backend));
    }
    b->tuning_path = a->tuning ? rf_strdup(a->tuning) : tuning_cache_path(a->tune);
    b->times = rf_alloc_zero((size_t)a->num_runs, sizeof *b->times);
    if (!b->times) return rf_fail(err, RF_ERR_MEMORY, "no memory for %jd times", (intmax_t)a->num_runs);
    return RF_OK;
}

/* Latent size of the benchmark and the tokens of one row. */
static rf_status latent_size(const bench *b, int64_t *height, int64_t *width, double *tokens, rf_error *err) {
    rf_image_model_info info = rf_image_model_get_info(b->model);
    const rf_dit_desc *d = &info.transformer->desc;
    int64_t factor = info.image_height / d->sample_size;
    int64_t pixels_h = b->args.height ? b->args.height : info.image_height;
    int64_t pixels_w = b->args.width ? b->args.width : info.image_width;
    if (pixels_h % (factor * d->ph) != 0 || pixels_w % (factor * d->pw) != 0) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--width and --height: expected multiples of %jd, found %jdx%jd",
                       (intmax_t)(factor * d->ph), (intmax_t)pixels_w, (intmax_t)pixels_h);
    }
    *height = pixels_h / factor;
    *width = pixels_w / factor;
    int64_t rows = *height / d->ph, columns = *width / d->pw;
    *tokens = (double)(rows * columns);
    return RF_OK;
}

/* Time of `launch` run num_runs times back to back, each between two marks of the stream. */
typedef rf_status (*launch_function)(void *user, rf_error *err);

static rf_status time_launches(rf_stream *stream, launch_function launch, void *user, double *times, int num_runs,
                               rf_error *err) {
    rf_status st = RF_OK;
    for (int done = 0; done < num_runs && st == RF_OK;) {
        int num = num_runs - done < NUM_MARKS - 1 ? num_runs - done : NUM_MARKS - 1;
        st = launch(user, err); /* keeps the device busy while the first mark is queued */
        if (st == RF_OK) st = rf_stream_mark(stream, 0, err);
        for (int i = 0; i < num && st == RF_OK; i++) {
            st = launch(user, err);
            if (st == RF_OK) st = rf_stream_mark(stream, i + 1, err);
        }
        if (st == RF_OK) st = rf_stream_synchronize(stream, err);
        for (int i = 0; i < num && st == RF_OK; i++) st = rf_stream_elapsed_ms(stream, i, i + 1, &times[done + i], err);
        if (st == RF_OK && cancel_requested())
            st = rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d of %d runs", done, num_runs);
        done += num;
    }
    return st;
}

/* ---- dit-forward ---- */

typedef struct {
    rf_stream *stream;
    rf_dit_session *session;
    rf_graph *graph; /* NULL: run directly */
    float *latent;   /* device */
} forward_run;

static rf_status launch_forward(void *user, rf_error *err) {
    forward_run *f = user;
    if (f->graph) return rf_graph_launch(f->graph, f->stream, err);
    return rf_dit_session_forward(f->session, f->latent, NULL, 0, err);
}

static rf_status record_forward(forward_run *f, rf_error *err) {
    rf_status st = rf_graph_begin(f->stream, err);
    if (st != RF_OK) return st;
    st = rf_dit_session_forward(f->session, f->latent, NULL, 0, err);
    rf_status ended = rf_graph_end(&f->graph, f->stream, st == RF_OK ? err : NULL);
    return st == RF_OK ? ended : st;
}

/* Plans and warms up; times are left to the caller. */
static rf_status prepare_forward(bench *b, forward_run *f, int rows, int64_t height, int64_t width, rf_error *err) {
    const rf_dit_model *dit = rf_image_model_get_info(b->model).transformer;
    rf_dit_session_options o = rf_dit_session_options_default();
    o.branches = rows % 2 == 0 && dit->desc.num_classes > 0 ? 2 : 1;
    o.batch = rows / o.branches;
    o.frames = 1;
    o.height = height;
    o.width = width;
    o.max_steps = 1;
    rf_dtype_from_name(b->args.residual, &o.residual_dtype); /* "auto" is no dtype and leaves the default */
    size_t num_latent = (size_t)o.batch * (size_t)dit->desc.in_channels * (size_t)height * (size_t)width;
    float *noise = rf_alloc(num_latent * sizeof *noise);
    int32_t *labels = rf_alloc_zero((size_t)rows, sizeof *labels);
    const float timestep = 500;
    rf_status st = noise && labels ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for %d rows of latents", rows);
    if (st == RF_OK) rf_rng_normal_at(0, 0, 0, noise, num_latent);
    if (st == RF_OK) st = rf_stream_create(&f->stream, b->backend, err);
    if (st == RF_OK) st = rf_gemm_set_tuning(f->stream, b->args.tune, err);
    if (st == RF_OK && b->tuning_path) st = rf_gemm_tuning_load(f->stream, b->tuning_path, err);
    if (st == RF_OK) st = rf_dit_session_create(&f->session, dit, f->stream, &o, err);
    if (st == RF_OK) st = rf_backend_alloc(b->backend, (void **)&f->latent, num_latent * sizeof *noise, err);
    if (st == RF_OK) st = rf_stream_upload(f->stream, f->latent, noise, num_latent * sizeof *noise, err);
    if (st == RF_OK) st = rf_stream_synchronize(f->stream, err);
    if (st == RF_OK) st = rf_dit_session_begin(f->session, &timestep, 1, labels, err);
    if (st == RF_OK) st = launch_forward(f, err);
    if (st == RF_OK) st = rf_stream_synchronize(f->stream, err);
    if (st == RF_OK && b->args.tune && b->tuning_path && rf_gemm_tuning_changed(f->stream)) {
        st = rf_gemm_tuning_save(f->stream, b->tuning_path, err);
    }
    if (st == RF_OK) rf_stream_set_phase(f->stream, RF_PHASE_RUN);
    if (st == RF_OK && rf_backend_has_graphs(b->backend)) st = record_forward(f, err);
    int warmups = rf_backend_get_kind(b->backend) == RF_BACKEND_CUDA ? WARMUP_DEVICE : WARMUP_HOST;
    for (int i = 0; i < warmups && st == RF_OK; i++) st = launch_forward(f, err);
    if (st == RF_OK) st = rf_stream_synchronize(f->stream, err);
    rf_free(noise);
    rf_free(labels);
    return st;
}

static rf_status bench_forward(bench *b, bench_row *row, rf_error *err) {
    forward_run f = {0};
    int64_t height, width;
    double tokens;
    rf_status st = latent_size(b, &height, &width, &tokens, err);
    if (st == RF_OK) st = prepare_forward(b, &f, row->batch, height, width, err);
    if (st == RF_OK) st = time_launches(f.stream, launch_forward, &f, b->times, (int)b->args.num_runs, err);
    if (st == RF_OK) {
        const rf_dit_model *dit = rf_image_model_get_info(b->model).transformer;
        double flops = forward_flops(&dit->desc, tokens, 1) * row->batch;
        bench_row_set_times(row, b->times, (int)b->args.num_runs);
        row->num_params = rf_params_num_elems(dit->params);
        row->tflops = flops / row->median_ms / 1e9;
        if (b->flops_per_ms > 0) {
            double memory_ms = (double)row->num_params * (double)rf_dtype_bytes(b->dtype) / b->copy_bytes_per_ms;
            double compute_ms = flops / b->flops_per_ms;
            row->floor_ms = memory_ms > compute_ms ? memory_ms : compute_ms;
        }
    }
    rf_graph_destroy(f.graph);
    rf_dit_session_destroy(f.session);
    rf_backend_free(b->backend, f.latent);
    rf_stream_destroy(f.stream);
    return st;
}

/* ---- image ---- */

static bool keep_going(void *user, int step, int num_steps) {
    (void)user;
    (void)step;
    (void)num_steps;
    return !cancel_requested();
}

static rf_status bench_image(bench *b, bench_row *row, rf_error *err) {
    rf_image_model_info info = rf_image_model_get_info(b->model);
    rf_image_options o = rf_image_options_default();
    o.batch = row->batch;
    o.num_steps = b->args.num_steps ? (int)b->args.num_steps : DEFAULT_STEPS;
    o.cfg_scale = b->args.cfg_scale;
    o.tune_gemm = b->args.tune;
    o.gemm_tuning = b->tuning_path;
    o.width = (int)b->args.width;
    o.height = (int)b->args.height;
    int64_t height, width;
    double tokens, denoise_ms = 0;
    rf_image_session *session = NULL;
    int *classes = rf_alloc_zero((size_t)row->batch, sizeof *classes);
    uint64_t *seeds = rf_alloc_zero((size_t)row->batch, sizeof *seeds);
    float *planar = NULL;
    rf_status st = classes && seeds ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for %d pictures", row->batch);
    if (st == RF_OK) st = latent_size(b, &height, &width, &tokens, err);
    if (st == RF_OK) st = rf_image_session_create(&session, b->model, &o, err);
    if (st == RF_OK) {
        rf_image_session_info s = rf_image_session_get_info(session);
        planar = rf_alloc_zero((size_t)row->batch * (size_t)s.image_width * (size_t)s.image_height, 3 * sizeof *planar);
        if (!planar) st = rf_fail(err, RF_ERR_MEMORY, "no memory for %d pictures", row->batch);
    }
    for (int i = 0; st == RF_OK && i < row->batch; i++) {
        classes[i] = info.num_classes > 0 ? i % info.num_classes : 0;
        seeds[i] = (uint64_t)i;
    }
    for (int64_t i = -1; i < b->args.num_runs && st == RF_OK; i++) { /* run -1 warms up */
        double start = now_ms();
        st = rf_image_session_denoise(session, classes, seeds, NULL, keep_going, NULL, err);
        if (st == RF_OK) st = rf_image_session_decode(session, planar, err);
        if (st != RF_OK || i < 0) continue;
        b->times[i] = now_ms() - start;
        denoise_ms += rf_image_session_get_info(session).denoise_ms / (double)b->args.num_runs;
    }
    if (st == RF_OK) {
        int branches = b->args.cfg_scale == 1 ? 1 : 2;
        double flops = forward_flops(&info.transformer->desc, tokens, 1) * row->batch * branches * o.num_steps;
        bench_row_set_times(row, b->times, (int)b->args.num_runs);
        row->num_params = info.num_params;
        row->num_steps = o.num_steps;
        row->tflops = flops / denoise_ms / 1e9;
        row->images_per_s = row->batch / (row->median_ms / 1e3);
    }
    rf_image_session_destroy(session);
    rf_free(planar);
    rf_free(classes);
    rf_free(seeds);
    return st;
}

/* ---- floors ---- */

typedef struct {
    rf_stream *stream;
    char *memory;
    size_t half_bytes;
    const rf_ops *ops;
    rf_gemm_args gemm;
} floor_run;

static rf_status launch_copy(void *user, rf_error *err) {
    floor_run *f = user;
    return rf_stream_copy(f->stream, f->memory, f->memory + f->half_bytes, f->half_bytes, err);
}

static rf_status launch_gemm(void *user, rf_error *err) {
    floor_run *f = user;
    return f->ops->gemm(f->stream, &f->gemm, err);
}

/* Median time of the launch after one warm-up. */
static rf_status median_of(floor_run *f, launch_function launch, double *median_ms, rf_error *err) {
    double times[7];
    bench_row row = {0};
    rf_status st = launch(f, err);
    if (st == RF_OK) st = rf_stream_synchronize(f->stream, err);
    if (st == RF_OK) st = time_launches(f->stream, launch, f, times, 7, err);
    if (st == RF_OK) bench_row_set_times(&row, times, 7);
    *median_ms = row.median_ms;
    return st;
}

static rf_status measure_floors(bench *b, rf_error *err) {
    bool cuda = rf_backend_get_kind(b->backend) == RF_BACKEND_CUDA;
    int64_t side = cuda ? 8192 : 1024;
    size_t matrix_bytes = (size_t)side * (size_t)side * rf_dtype_bytes(b->dtype);
    floor_run f = {.half_bytes = (cuda ? COPY_BYTES : HOST_COPY) / 2, .ops = rf_ops_for(b->backend)};
    size_t bytes = 2 * f.half_bytes > 3 * matrix_bytes ? 2 * f.half_bytes : 3 * matrix_bytes;
    double copy_ms = 0, gemm_ms = 0;
    rf_status st = rf_stream_create(&f.stream, b->backend, err);
    if (st == RF_OK) st = rf_backend_alloc(b->backend, (void **)&f.memory, bytes, err);
    if (st == RF_OK) st = rf_stream_zero(f.stream, f.memory, bytes, err);
    if (st == RF_OK) st = median_of(&f, launch_copy, &copy_ms, err);
    if (st == RF_OK) {
        f.gemm = rf_gemm_args_default(b->dtype, side, side, side);
        f.gemm.x = f.memory;
        f.gemm.w = f.memory + matrix_bytes;
        f.gemm.y = f.memory + 2 * matrix_bytes;
        /* Zeros would draw less power and run faster than real operands. */
        rf_fill_normal_args fill = {.out = f.memory, .dtype = b->dtype, .num = 2 * side * side, .std = 1};
        st = f.ops->fill_normal(f.stream, &fill, err);
        if (st == RF_OK) st = median_of(&f, launch_gemm, &gemm_ms, err);
    }
    if (st == RF_OK) {
        b->copy_bytes_per_ms = 2 * (double)f.half_bytes / copy_ms; /* read and written */
        b->flops_per_ms = 2 * (double)side * (double)side * (double)side / gemm_ms;
        if (!b->args.quiet) {
            say("floors: device copy %.0f GB/s, GEMM %jd^3 in %s %.2f TFLOP/s", b->copy_bytes_per_ms / 1e6,
                (intmax_t)side, rf_dtype_name(b->dtype), b->flops_per_ms / 1e9);
        }
    }
    rf_backend_free(b->backend, f.memory);
    rf_stream_destroy(f.stream);
    return st;
}

static rf_status print_rows(const bench *b, const bench_row *rows, int num, rf_error *err) {
    bench_format format = BENCH_MD;
    if (strcmp(b->args.format, "csv") == 0) format = BENCH_CSV;
    if (strcmp(b->args.format, "json") == 0) format = BENCH_JSON;
    if (strcmp(b->args.format, "jsonl") == 0) format = BENCH_JSONL;
    return bench_print(rows, num, format, err);
}

static rf_status run_table(bench *b, rf_error *err) {
    bench_row *rows = NULL;
    int num = 0;
    if (b->args.floors) RF_TRY(measure_floors(b, err));
    rf_status st = b->args.is_kv ? bench_kv(b, &rows, &num, err)
                   : is_text(b)  ? bench_texts(b, &rows, &num, err)
                                 : bench_worlds(b, &rows, &num, err);
    if (st == RF_OK) st = print_rows(b, rows, num, err);
    rf_free(rows);
    return st;
}

static rf_status run_rows(bench *b, rf_error *err) {
    bench_row rows[MAX_BATCHES] = {0};
    rf_image_model_info info = rf_image_model_get_info(b->model);
    int64_t width = b->args.width ? b->args.width : info.image_width;
    int64_t height = b->args.height ? b->args.height : info.image_height;
    char size[32];
    snprintf(size, sizeof size, "%" PRId64 "x%" PRId64, width, height);
    bool image = strcmp(b->args.what, "image") == 0;
    rf_status st = b->args.floors ? measure_floors(b, err) : RF_OK;
    for (int i = 0; i < b->num_batches && st == RF_OK; i++) {
        rows[i].model = b->model_name;
        rows[i].device = rf_backend_description(b->backend);
        rows[i].dtype = rf_dtype_name(b->dtype);
        rows[i].what = b->args.what;
        rows[i].size = size;
        rows[i].batch = b->batches[i];
        st = image ? bench_image(b, &rows[i], err) : bench_forward(b, &rows[i], err);
    }
    return st == RF_OK ? print_rows(b, rows, b->num_batches, err) : st;
}

int cmd_bench(int argc, char **argv) {
    static bench b;
    rf_error err = {0};
    args_result parsed = read_args(&b.args, argc, argv);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    b.log = program_log(b.args.quiet ? -1 : b.args.verbosity);
    cancel_install();
    rf_status st = open_bench(&b, &err);
    if (st == RF_OK) st = is_world(&b) || is_text(&b) ? run_table(&b, &err) : run_rows(&b, &err);
    int status = st == RF_OK ? EXIT_OK : fail_with(&err);
    rf_image_model_close(b.model);
    rf_world_model_close(b.world);
    kv_settings_free(&b.kv);
    if (is_text(&b)) {
        close_text_model(&b.text); /* with its backend and path */
    } else {
        rf_backend_close(b.backend);
        rf_free(b.model_path);
    }
    rf_free(b.tuning_path);
    rf_free(b.times);
    return status;
}
