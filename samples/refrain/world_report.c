/* samples/refrain/world_report.c - what a rollout leaves behind in words and numbers. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"
#include "samples/refrain/world_run.h"

#define EQUAL_DB      100.0 /* what an equal frame counts in a mean */
#define GOOD_DB       30.0
#define TABLE_ROWS    40
#define SPARK_COLUMNS 60
#define SPARK_LOW_DB  15.0
#define SPARK_DB      4.0 /* a level of the sparkline */

/* ---- quality ---- */

quality_summary world_summarize(const world_quality *q) {
    quality_summary s = {.worst_psnr_db = (double)INFINITY, .worst_ssim = (double)INFINITY};
    int equal = 0;
    for (int i = 0; i < q->num; i++) {
        double psnr = isnan(q->psnr_db[i]) ? -(double)INFINITY : q->psnr_db[i];
        equal += isinf(psnr) && psnr > 0;
        s.mean_psnr_db += psnr < EQUAL_DB ? psnr : EQUAL_DB;
        s.mean_ssim += q->ssim[i];
        if (psnr < s.worst_psnr_db || s.worst_frame == 0) {
            s.worst_psnr_db = psnr;
            s.worst_frame = i + 1;
        }
        if (!(q->ssim[i] >= s.worst_ssim)) s.worst_ssim = q->ssim[i];
        if (psnr < GOOD_DB && s.first_under_30_db == 0) s.first_under_30_db = i + 1;
    }
    s.mean_psnr_db /= q->num ? q->num : 1;
    s.mean_ssim /= q->num ? q->num : 1;
    if (equal == q->num) s.mean_psnr_db = (double)INFINITY;
    return s;
}

/* One character for one frame or, in a long walk, for the worst of some. */
static void sparkline(const world_quality *q, char *text, size_t text_bytes) {
    static const char *const levels[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    int columns = q->num < SPARK_COLUMNS ? q->num : SPARK_COLUMNS;
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < columns; i++) {
        double worst = (double)INFINITY;
        int end = (int)((int64_t)(i + 1) * q->num / columns);
        for (int j = (int)((int64_t)i * q->num / columns); j < end; j++) {
            if (!(q->psnr_db[j] >= worst)) worst = isnan(q->psnr_db[j]) ? 0 : q->psnr_db[j];
        }
        double level = (worst - SPARK_LOW_DB) / SPARK_DB;
        used += (size_t)snprintf(text + used, text_bytes - used, "%s",
                                 levels[level < 0   ? 0
                                        : level > 7 ? 7
                                                    : (int)level]);
    }
}

/* Where the mean of rows begin .. end - 1 stands. */
static void print_cell(const world_quality *q, int begin, int end) {
    double psnr = 0, ssim = 0;
    if (!q->num) return;
    for (int i = begin; i < end; i++) {
        psnr += q->psnr_db[i] < EQUAL_DB ? q->psnr_db[i] : EQUAL_DB;
        ssim += q->ssim[i];
    }
    psnr /= end - begin;
    ssim /= end - begin;
    char first[16], second[16];
    snprintf(first, sizeof first, psnr >= EQUAL_DB ? "equal" : "%.2f", psnr);
    snprintf(second, sizeof second, isnan(ssim) ? "-" : "%.4f", ssim);
    printf("      %7s  %7s", first, second);
}

void world_print_table(const world_run *run) {
    const world_quality *columns[] = {&run->against_reference, &run->against_simulator,
                                      &run->reference_against_simulator};
    static const char *const names[] = {"to uncached", "to simulator", "uncached to simulator"};
    int num = run->num_made, rows = num < TABLE_ROWS ? num : TABLE_ROWS;
    if (!run->against_reference.num && !run->against_simulator.num) return;
    printf("%-11s%-16s", "", "");
    for (int i = 0; i < 3; i++) {
        if (columns[i]->num) printf("%22s", names[i]);
    }
    printf("\n%-11s%-16s", "frame", rows < num ? "" : "action");
    for (int i = 0; i < 3; i++) {
        if (columns[i]->num) printf("      %7s  %7s", "PSNR dB", "SSIM");
    }
    printf("\n");
    for (int row = 0; row < rows; row++) {
        int begin = (int)((int64_t)row * num / rows), end = (int)((int64_t)(row + 1) * num / rows);
        char frames[32], action[128] = "";
        snprintf(frames, sizeof frames, end - begin > 1 ? "%d-%d" : "%d", begin + 1, end);
        if (rows == num)
            world_action_text(run, run->actions + (size_t)begin * (size_t)run->info.action_dim, action, sizeof action);
        printf("%-11s%-16.16s", frames, action);
        for (int i = 0; i < 3; i++) print_cell(columns[i], begin, end);
        printf("\n");
    }
}

static void say_quality(const world_quality *q, const char *against) {
    char spark[SPARK_COLUMNS * 4 + 1], under[48] = "none under 30 dB", ssim[32] = "";
    quality_summary s = world_summarize(q);
    if (!q->num) return;
    if (isinf(s.mean_psnr_db)) {
        say("against %s: equal frames", against);
        return;
    }
    sparkline(q, spark, sizeof spark);
    if (s.first_under_30_db) snprintf(under, sizeof under, "first under 30 dB: frame %d", s.first_under_30_db);
    if (isfinite(s.mean_ssim)) snprintf(ssim, sizeof ssim, ", SSIM %.4f", s.mean_ssim);
    say("against %s: PSNR %.2f dB%s; worst %.2f dB (frame %d), %s %s", against, s.mean_psnr_db, ssim, s.worst_psnr_db,
        s.worst_frame, under, spark);
}

/* PSNR to the simulator, of what it is without the policy. */
static double psnr_kept(const world_run *run) {
    if (!run->reference_against_simulator.num) return (double)NAN;
    return world_summarize(&run->against_simulator).mean_psnr_db /
           world_summarize(&run->reference_against_simulator).mean_psnr_db;
}

static double speedup(const world_run *run) {
    double ms = run->denoise_ms + run->context_ms;
    return ms > 0 ? run->reference_sum_ms / ms : 0;
}

/* ---- messages ---- */

const char *world_policy_name(const world_run *run) {
    return rf_policy_get_def(run->policy)->name;
}

static void context_text(const world_run *run, char *text, size_t text_bytes) {
    const rf_world_options *o = &run->options;
    char sinks[32] = "";
    if (o->context == RF_CONTEXT_SINKS) snprintf(sinks, sizeof sinks, " (%d)", o->num_sinks);
    snprintf(text, text_bytes, "window %d, context %s%s", o->window,
             o->context_cache ? rf_context_mode_name(o->context) : "computed again every step", sinks);
}

void world_say_plan(const world_run *run) {
    char context[96], measured[512];
    const world_args *a = &run->args;
    for (int i = 0; i < run->num_notes; i++) say("%s", run->notes[i]);
    context_text(run, context, sizeof context);
    say("%s (%.1f M parameters) on %s in %s: %s, %d steps a frame, seed %ju, %s, frames of %dx%d", run->model_name,
        (double)run->info.num_params / 1e6, rf_backend_name(run->backend), rf_dtype_name(run->dtype), run->prompt.text,
        run->options.num_steps, (uintmax_t)run->seed, context, run->info.frame_width, run->info.frame_height);
    if (run->preset.name) {
        say("preset %s of %s is --cache-mode %s%s%s", run->preset.name, run->model_name, run->preset.mode,
            run->preset.options[0] ? " --cache-option " : "", run->preset.options);
    }
    for (int i = 0; i < run->preset.num_measured; i++) {
        preset_measured_text(&run->preset.measured[i], measured, sizeof measured);
        say("preset %s was chosen at %s", run->preset.name, measured);
    }
    rf_world_session_info s = rf_world_session_get_info(run->session);
    if (run->policy) say("cache %s: %s", world_policy_name(run), run->cache_options);
    if (a->verbosity > 0) {
        char weights[32], arena[32];
        format_bytes(weights, sizeof weights, (double)run->info.weights_bytes);
        format_bytes(arena, sizeof arena, (double)s.arena_bytes);
        say("device %s: %s; weights %s, arena %s; video: %s", rf_backend_name(run->backend),
            rf_backend_description(run->backend), weights, arena, rf_video_library());
    }
}

static double percent(int64_t part, int64_t whole) {
    return whole > 0 ? 100.0 * (double)part / (double)whole : 0;
}

static void say_cache(const world_run *run) {
    const rf_cache_counts *c = &run->last.total;
    char partly[48] = "", bytes[32];
    int64_t steps = c->steps_full + c->steps_partial + c->steps_skipped;
    double frames = run->num_made > 0 ? run->num_made : 1;
    if (c->steps_partial > 0) snprintf(partly, sizeof partly, ", %.3g partly", (double)c->steps_partial / frames);
    format_bytes(bytes, sizeof bytes, (double)c->bytes);
    say("cache %s: of %d steps a frame %.3g computed%s, %.3g skipped (%.0f %%); %.1f %% of blocks, %.1f %% of token "
        "rows; %s, decided in %.1f ms",
        world_policy_name(run), run->options.num_steps, (double)c->steps_full / frames, partly,
        (double)c->steps_skipped / frames, percent(c->steps_skipped, steps),
        percent(c->blocks_computed, c->blocks_total), percent(c->rows_computed, c->rows_total), bytes, c->decide_ms);
}

/* Frames through the transformer if every step computed its whole window. */
static int64_t plain_forwards(const world_run *run) {
    int64_t sum = 0, most = run->options.window;
    int64_t context = run->prompt.num < most ? run->prompt.num : most - 1;
    for (int i = 0; i < run->num_made; i++) {
        sum += (context + 1) * run->options.num_steps;
        if (context + 1 < most) {
            context++;
        } else {
            sum += (int64_t)(run->num_made - 1 - i) * most * run->options.num_steps;
            break;
        }
    }
    return sum;
}

static double rate(int frames, double ms) {
    return ms > 0 ? frames * 1e3 / ms : 0;
}

void world_say_result(const world_run *run, double total_ms) {
    double made_ms = run->denoise_ms + run->context_ms;
    char wrote[1024] = "", strip[300] = "";
    if (run->args.strip) snprintf(strip, sizeof strip, " and %.256s", run->args.strip);
    if (run->output) {
        snprintf(wrote, sizeof wrote, "wrote %.256s%s (%s, %d frames of %dx%d, %.4g a second): ", run->output, strip,
                 run->codec, run->num_made + 1, run->info.frame_width * run->scale, run->info.frame_height * run->scale,
                 run->fps);
    }
    say("%s%d new frame%s in %.1f s (load %.1f, denoise %.1f, context %.1f, decode %.1f): %.3g frames/s, with decoding "
        "%.3g",
        wrote, run->num_made, run->num_made == 1 ? "" : "s", total_ms / 1e3, run->load_ms / 1e3, run->denoise_ms / 1e3,
        run->context_ms / 1e3, run->decode_sum_ms / 1e3, rate(run->num_made, made_ms),
        rate(run->num_made, made_ms + run->decode_sum_ms));
    if (run->options.context_cache) {
        say("context %s: %" PRId64 " frames through the transformer, %" PRId64
            " without reuse; %d frame%s left the window",
            rf_context_mode_name(run->options.context), run->last.frame_forwards, plain_forwards(run),
            run->last.frames_slid, run->last.frames_slid == 1 ? "" : "s");
    }
    if (run->policy) say_cache(run);
    say_quality(&run->against_reference, run->policy ? "no policy" : "no reuse");
    if (run->args.compare)
        say("%.2f times as fast (%.2f s, %s %.2f s)", speedup(run), made_ms / 1e3,
            run->policy ? "without the policy" : "computing everything", run->reference_sum_ms / 1e3);
    say_quality(&run->against_simulator, "the simulator");
    if (run->reference_against_simulator.num)
        say("of the uncached PSNR to the simulator (%.2f dB) %.1f %% is kept",
            world_summarize(&run->reference_against_simulator).mean_psnr_db, 100 * psnr_kept(run));
}

/* ---- settings inside files ---- */

static void add_settings(cJSON *root, const world_run *run) {
    const rf_world_options *o = &run->options;
    cJSON_AddStringToObject(root, "init", run->prompt.text);
    cJSON_AddStringToObject(root, "actions", run->actions_text ? run->actions_text : "played");
    cJSON_AddNumberToObject(root, "steps", o->num_steps);
    report_add_uint(root, "seed", run->seed);
    cJSON_AddStringToObject(root, "rng", rf_rng_kind_name(o->rng));
    cJSON_AddNumberToObject(root, "window", o->window);
    cJSON_AddStringToObject(root, "context", rf_context_mode_name(o->context));
    if (o->context == RF_CONTEXT_SINKS) cJSON_AddNumberToObject(root, "sinks", o->num_sinks);
    cJSON_AddBoolToObject(root, "context_cache", o->context_cache);
    cJSON_AddNumberToObject(root, "stabilization", o->stabilization_level);
    if (!run->policy) return;
    cJSON_AddStringToObject(root, "cache_mode", world_policy_name(run));
    cJSON_AddStringToObject(root, "cache_options", run->settings_options);
    cJSON_AddStringToObject(root, "carry", rf_cache_carry_name(run->options.carry));
    if (o->max_drift > 0) cJSON_AddNumberToObject(root, "max_drift", o->max_drift);
}

static char *settings_json(const world_run *run) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "version", RF_VERSION);
    cJSON_AddStringToObject(root, "command", "world");
    cJSON_AddStringToObject(root, "model", run->model_name);
    cJSON_AddStringToObject(root, "device", rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA ? "cuda" : "cpu");
    cJSON_AddStringToObject(root, "dtype", rf_dtype_name(run->dtype));
    cJSON_AddNumberToObject(root, "width", run->info.frame_width);
    cJSON_AddNumberToObject(root, "height", run->info.frame_height);
    cJSON_AddNumberToObject(root, "fps", run->fps);
    if (run->num_actions > 0) cJSON_AddNumberToObject(root, "frames", run->num_actions + 1);
    add_settings(root, run);
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    return text;
}

/* One line of actions, one of numbers, as programs for pictures write it. */
static char *parameters_text(const world_run *run) {
    const char *actions = run->actions_text ? run->actions_text : "played";
    const char *options = run->policy ? run->settings_options : "";
    size_t bytes = strlen(actions) + 2 * strlen(options) + strlen(run->prompt.text) + strlen(run->model_name) + 640;
    char context[96], *text = rf_alloc(bytes);
    if (!text) return NULL;
    context_text(run, context, sizeof context);
    size_t len = (size_t)snprintf(
        text, bytes,
        "%s\nSteps: %d, Sampler: ddim, Seed: %ju, Size: %dx%d, Model: %s, Init: \"%s\", Context: \"%s\", Device: %s, "
        "RNG: %s",
        actions, run->options.num_steps, (uintmax_t)run->seed, run->info.frame_width, run->info.frame_height,
        run->model_name, run->prompt.text, context,
        rf_backend_get_kind(run->backend) == RF_BACKEND_CUDA ? "cuda" : "cpu", rf_rng_kind_name(run->options.rng));
    if (run->policy) {
        len += (size_t)snprintf(text + len, bytes - len, ", Cache mode: %s, Cache options: \"", world_policy_name(run));
        for (const char *c = options; *c; c++) {
            if (*c == '"' || *c == '\\') text[len++] = '\\';
            text[len++] = (unsigned char)*c < ' ' ? '?' : *c;
        }
        text[len++] = '"';
    }
    snprintf(text + len, bytes - len, ", Version: refrain %s", RF_VERSION);
    return text;
}

rf_status world_settings_make(const world_run *run, world_settings *out, rf_error *err) {
    *out = (world_settings){.parameters = parameters_text(run), .json = settings_json(run)};
    if (!out->parameters || !out->json) {
        world_settings_free(out);
        return rf_fail(err, RF_ERR_MEMORY, "no memory for the settings inside files");
    }
    out->texts[0] = (rf_png_text){"parameters", out->parameters};
    out->texts[1] = (rf_png_text){"refrain", out->json};
    return RF_OK;
}

void world_settings_free(world_settings *settings) {
    rf_free(settings->parameters);
    cJSON_free(settings->json);
    *settings = (world_settings){0};
}

/* ---- --json ---- */

/* To the microsecond: more digits are noise. */
static double rounded(double ms) {
    return (double)(int64_t)(ms * 1e3 + 0.5) / 1e3;
}

static void add_times(cJSON *object, const char *name, const double *ms, int num) {
    cJSON *array = cJSON_AddArrayToObject(object, name);
    for (int i = 0; ms && i < num; i++) cJSON_AddItemToArray(array, cJSON_CreateNumber(rounded(ms[i])));
}

/* null: of PSNR, equal frames; of SSIM, frames smaller than its window; of a frame number, none. */
static void add_quality(cJSON *object, const char *name, const world_quality *q) {
    if (!q->num) return;
    quality_summary s = world_summarize(q);
    cJSON *o = cJSON_AddObjectToObject(object, name);
    cJSON_AddNumberToObject(o, "mean_psnr_db", s.mean_psnr_db);
    cJSON_AddNumberToObject(o, "mean_ssim", s.mean_ssim);
    cJSON_AddNumberToObject(o, "worst_psnr_db", s.worst_psnr_db);
    cJSON_AddNumberToObject(o, "worst_ssim", s.worst_ssim);
    cJSON_AddNumberToObject(o, "worst_frame", s.worst_frame);
    cJSON_AddNumberToObject(o, "first_frame_under_30_db", s.first_under_30_db ? s.first_under_30_db : (double)NAN);
    cJSON *psnr = cJSON_AddArrayToObject(o, "psnr_db"), *ssim = cJSON_AddArrayToObject(o, "ssim");
    for (int i = 0; i < q->num; i++) {
        cJSON_AddItemToArray(psnr, cJSON_CreateNumber(q->psnr_db[i]));
        cJSON_AddItemToArray(ssim, cJSON_CreateNumber(q->ssim[i]));
    }
}

static void add_cache(cJSON *object, const world_run *run) {
    const rf_cache_counts *c = &run->last.total;
    cJSON *o = cJSON_AddObjectToObject(object, "cache");
    cJSON_AddStringToObject(o, "mode", world_policy_name(run));
    cJSON_AddStringToObject(o, "options", run->cache_options);
    cJSON_AddStringToObject(o, "carry", rf_cache_carry_name(run->options.carry));
    report_add_uint(o, "steps_full", (uint64_t)c->steps_full);
    report_add_uint(o, "steps_partial", (uint64_t)c->steps_partial);
    report_add_uint(o, "steps_skipped", (uint64_t)c->steps_skipped);
    report_add_uint(o, "blocks_computed", (uint64_t)c->blocks_computed);
    report_add_uint(o, "blocks_total", (uint64_t)c->blocks_total);
    report_add_uint(o, "rows_computed", (uint64_t)c->rows_computed);
    report_add_uint(o, "rows_total", (uint64_t)c->rows_total);
    report_add_uint(o, "bytes", c->bytes);
    cJSON_AddNumberToObject(o, "decide_ms", rounded(c->decide_ms));
}

static void add_context(cJSON *root, const world_run *run) {
    const rf_world_options *o = &run->options;
    cJSON *context = cJSON_AddObjectToObject(root, "context");
    cJSON_AddStringToObject(context, "mode", rf_context_mode_name(o->context));
    cJSON_AddBoolToObject(context, "cache", o->context_cache);
    if (o->context == RF_CONTEXT_SINKS) cJSON_AddNumberToObject(context, "sinks", o->num_sinks);
    cJSON_AddNumberToObject(context, "window", o->window);
    cJSON_AddNumberToObject(context, "prompt_frames", run->prompt.num);
    cJSON_AddNumberToObject(context, "frames_slid", run->last.frames_slid);
    report_add_uint(context, "frame_forwards", (uint64_t)run->last.frame_forwards);
    report_add_uint(context, "frame_forwards_without_reuse", (uint64_t)plain_forwards(run));
    if (run->reference) report_add_uint(context, "reference_frame_forwards", (uint64_t)run->reference_forwards);
}

static void add_time(cJSON *root, const world_run *run, double total_ms) {
    cJSON *time = cJSON_AddObjectToObject(root, "time");
    cJSON_AddNumberToObject(time, "load_ms", rounded(run->load_ms));
    cJSON_AddNumberToObject(time, "prompt_ms", rounded(run->prompt_ms));
    cJSON_AddNumberToObject(time, "denoise_ms", rounded(run->denoise_ms));
    cJSON_AddNumberToObject(time, "context_ms", rounded(run->context_ms));
    cJSON_AddNumberToObject(time, "decode_ms", rounded(run->decode_sum_ms));
    if (run->reference) cJSON_AddNumberToObject(time, "reference_denoise_ms", rounded(run->reference_sum_ms));
    cJSON_AddNumberToObject(time, "total_ms", rounded(total_ms));
    if (!run->frame_ms) return;
    add_times(time, "frame_ms", run->frame_ms, run->num_made);
    add_times(time, "frame_decode_ms", run->decode_ms, run->num_made);
    if (run->reference) add_times(time, "reference_frame_ms", run->reference_ms, run->num_made);
}

rf_status world_print_json(const world_run *run, double total_ms, rf_error *err) {
    double made_ms = run->denoise_ms + run->context_ms;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "world");
    cJSON_AddStringToObject(root, "model", run->model_path);
    cJSON_AddStringToObject(root, "device", rf_backend_name(run->backend));
    cJSON_AddStringToObject(root, "dtype", rf_dtype_name(run->dtype));
    cJSON_AddNumberToObject(root, "frames", run->num_made + 1);
    cJSON_AddItemToObject(root, "settings", cJSON_CreateObject());
    add_settings(cJSON_GetObjectItem(root, "settings"), run);
    cJSON_AddNumberToObject(root, "fps", rounded(rate(run->num_made, made_ms)));
    cJSON_AddNumberToObject(root, "fps_with_decode", rounded(rate(run->num_made, made_ms + run->decode_sum_ms)));
    add_time(root, run, total_ms);
    add_context(root, run);
    cJSON *memory = cJSON_AddObjectToObject(root, "memory");
    report_add_uint(memory, "weights_bytes", run->info.weights_bytes);
    report_add_uint(memory, "arena_bytes", run->last.arena_bytes);
    report_add_uint(memory, "peak_device_bytes", rf_backend_get_counts(run->backend).peak_device_bytes);
    if (run->policy) add_cache(root, run);
    if (run->reference || run->against_simulator.num) {
        cJSON *quality = cJSON_AddObjectToObject(root, "quality");
        add_quality(quality, "uncached", &run->against_reference);
        add_quality(quality, "simulator", &run->against_simulator);
        add_quality(quality, "uncached_to_simulator", &run->reference_against_simulator);
        if (run->reference_against_simulator.num)
            cJSON_AddNumberToObject(quality, "simulator_psnr_kept", psnr_kept(run));
    }
    if (run->reference) cJSON_AddNumberToObject(root, "speedup", speedup(run));
    if (run->output) {
        cJSON *output = cJSON_AddObjectToObject(root, "output");
        cJSON_AddStringToObject(output, "path", run->output);
        cJSON_AddStringToObject(output, "codec", run->codec);
        cJSON_AddNumberToObject(output, "width", run->info.frame_width * run->scale);
        cJSON_AddNumberToObject(output, "height", run->info.frame_height * run->scale);
        cJSON_AddNumberToObject(output, "fps", run->fps);
    }
    if (run->args.strip) cJSON_AddStringToObject(root, "strip", run->args.strip);
    return report_print_json(root, err);
}
