/* samples/refrain/report.c - JSON through cJSON. A failed allocation inside cJSON shows as a NULL that the next call takes
 * silently, so the few calls whose result matters are checked at the end: an object that could not be printed is an error. */
#include "samples/refrain/report.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/program.h"

static cJSON *uint_value(uint64_t value) {
    char digits[24];
    snprintf(digits, sizeof digits, "%" PRIu64, value);
    return cJSON_CreateRaw(digits);
}

void report_add_uint(cJSON *object, const char *name, uint64_t value) {
    cJSON_AddItemToObject(object, name, uint_value(value));
}

/* Milliseconds to the microsecond: more digits are noise. */
static double rounded_ms(double ms) {
    return (double)(int64_t)(ms * 1e3 + 0.5) / 1e3;
}

rf_status report_print_json(cJSON *root, rf_error *err) {
    char *text = root ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    if (!text) return rf_fail(err, RF_ERR_MEMORY, "no memory for the JSON output");
    puts(text);
    cJSON_free(text);
    return RF_OK;
}

static cJSON *output_json(const report_output *output) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "path", output->path);
    if (output->num_images == 1) {
        cJSON_AddStringToObject(o, "class", output->class_names[0]);
        report_add_uint(o, "seed", output->seeds[0]);
    } else {
        cJSON *classes = cJSON_AddArrayToObject(o, "class");
        cJSON *seeds = cJSON_AddArrayToObject(o, "seed");
        for (int i = 0; i < output->num_images; i++) {
            cJSON_AddItemToArray(classes, cJSON_CreateString(output->class_names[i]));
            cJSON_AddItemToArray(seeds, uint_value(output->seeds[i]));
        }
    }
    cJSON_AddNumberToObject(o, "width", output->width);
    cJSON_AddNumberToObject(o, "height", output->height);
    return o;
}

static cJSON *cache_json(const report_cache *cache) {
    const rf_cache_counts *c = &cache->counts;
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "mode", cache->mode);
    cJSON_AddStringToObject(o, "options", cache->options);
    report_add_uint(o, "steps_full", (uint64_t)c->steps_full);
    report_add_uint(o, "steps_partial", (uint64_t)c->steps_partial);
    report_add_uint(o, "steps_skipped", (uint64_t)c->steps_skipped);
    report_add_uint(o, "blocks_computed", (uint64_t)c->blocks_computed);
    report_add_uint(o, "blocks_total", (uint64_t)c->blocks_total);
    report_add_uint(o, "rows_computed", (uint64_t)c->rows_computed);
    report_add_uint(o, "rows_total", (uint64_t)c->rows_total);
    report_add_uint(o, "bytes", c->bytes);
    cJSON_AddNumberToObject(o, "decide_ms", rounded_ms(c->decide_ms));
    return o;
}

/* cJSON writes what is not finite as null. */
static cJSON *quality_json(const report_quality *quality) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "psnr_db", quality->psnr_db);
    cJSON_AddNumberToObject(o, "ssim", quality->ssim);
    cJSON_AddNumberToObject(o, "max_abs", quality->max_abs);
    cJSON_AddNumberToObject(o, "worst_psnr_db", quality->worst_psnr_db);
    cJSON_AddNumberToObject(o, "worst_ssim", quality->worst_ssim);
    return o;
}

rf_status report_print_run(const run_report *report, rf_error *err) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", report->command);
    cJSON_AddStringToObject(root, "model", report->model);
    cJSON_AddStringToObject(root, "device", report->device);
    cJSON_AddStringToObject(root, "dtype", report->dtype);
    report_add_uint(root, "seed", report->seed);
    cJSON_AddNumberToObject(root, "steps", report->num_steps);
    cJSON *time = cJSON_AddObjectToObject(root, "time");
    cJSON_AddNumberToObject(time, "load_ms", rounded_ms(report->load_ms));
    cJSON_AddNumberToObject(time, "denoise_ms", rounded_ms(report->denoise_ms));
    cJSON_AddNumberToObject(time, "decode_ms", rounded_ms(report->decode_ms));
    if (report->quality)
        cJSON_AddNumberToObject(time, "reference_denoise_ms", rounded_ms(report->quality->reference_ms));
    cJSON_AddNumberToObject(time, "total_ms", rounded_ms(report->total_ms));
    cJSON *steps = cJSON_AddArrayToObject(time, "step_ms");
    for (int i = 0; i < report->num_steps; i++) {
        cJSON_AddItemToArray(steps, cJSON_CreateNumber(rounded_ms(report->step_ms[i])));
    }
    cJSON *memory = cJSON_AddObjectToObject(root, "memory");
    report_add_uint(memory, "weights_bytes", report->weights_bytes);
    report_add_uint(memory, "arena_bytes", report->arena_bytes);
    report_add_uint(memory, "peak_device_bytes", report->peak_device_bytes);
    if (report->cache) cJSON_AddItemToObject(root, "cache", cache_json(report->cache));
    if (report->quality) {
        cJSON_AddItemToObject(root, "quality", quality_json(report->quality));
        cJSON_AddNumberToObject(root, "speedup", report->quality->speedup);
    }
    cJSON *outputs = cJSON_AddArrayToObject(root, "outputs");
    for (int i = 0; i < report->num_outputs; i++) cJSON_AddItemToArray(outputs, output_json(&report->outputs[i]));
    return report_print_json(root, err);
}

static char *settings_json(const picture_settings *s) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "version", RF_VERSION);
    cJSON_AddStringToObject(root, "model", s->model);
    cJSON_AddStringToObject(root, "sampling_method", s->sampler);
    cJSON_AddStringToObject(root, "scheduler", s->scheduler);
    cJSON_AddNumberToObject(root, "steps", s->num_steps);
    cJSON_AddNumberToObject(root, "cfg_scale", s->cfg_scale);
    cJSON_AddNumberToObject(root, "eta", s->eta);
    cJSON_AddStringToObject(root, "rng", s->rng);
    cJSON_AddNumberToObject(root, "width", s->width);
    cJSON_AddNumberToObject(root, "height", s->height);
    cJSON_AddStringToObject(root, "device", s->device);
    cJSON_AddStringToObject(root, "dtype", s->dtype);
    if (s->cache_mode) {
        cJSON_AddStringToObject(root, "cache_mode", s->cache_mode);
        cJSON_AddStringToObject(root, "cache_options", s->cache_options);
        if (s->max_drift > 0) cJSON_AddNumberToObject(root, "max_drift", s->max_drift);
    }
    cJSON *images = cJSON_AddArrayToObject(root, "images");
    for (int i = 0; i < s->num_images; i++) {
        cJSON *image = cJSON_CreateObject();
        cJSON_AddStringToObject(image, "class", s->class_names[i]);
        report_add_uint(image, "seed", s->seeds[i]);
        cJSON_AddItemToArray(images, image);
    }
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    return text;
}

/* ", Cache mode: ..." for `parameters`, or "". The options hold commas, so they stand in quotes, as other programs do. rf_free;
 * NULL when memory is out. */
static char *cache_parameters(const picture_settings *s) {
    if (!s->cache_mode) return rf_strdup("");
    size_t bytes = strlen(s->cache_mode) + 2 * strlen(s->cache_options) + 96;
    char *text = rf_alloc(bytes);
    if (!text) return NULL;
    size_t len = (size_t)snprintf(text, bytes, ", Cache mode: %s, Cache options: \"", s->cache_mode);
    for (const char *c = s->cache_options; *c; c++) {
        if (*c == '"' || *c == '\\') text[len++] = '\\';
        text[len++] = (unsigned char)*c < ' ' ? '?' : *c;
    }
    text[len++] = '"';
    text[len] = 0;
    if (s->max_drift > 0) snprintf(text + len, bytes - len, ", Max drift: %g", s->max_drift);
    return text;
}

/* The settings as other programs write them. rf_free; NULL when memory is out. */
static char *parameters_text(const picture_settings *s) {
    char *cache = cache_parameters(s), *text = NULL;
    size_t bytes = 0;
    for (int pass = 0; pass < 2 && cache; pass++) { /* how long, then the text */
        int len =
            snprintf(text, bytes,
                     "%s%s\nSteps: %d, Sampler: %s, Schedule type: %s, CFG scale: %g, Seed: %" PRIu64
                     ", Size: %dx%d, Model: %s, Device: %s, RNG: %s%s, Version: refrain %s",
                     s->class_names[0], s->num_images > 1 ? " and others" : "", s->num_steps, s->sampler, s->scheduler,
                     s->cfg_scale, s->seeds[0], s->width, s->height, s->model, s->device, s->rng, cache, RF_VERSION);
        if (pass > 0 || len < 0) break;
        bytes = (size_t)len + 1;
        text = rf_alloc(bytes);
        if (!text) break;
    }
    rf_free(cache);
    return text;
}

rf_status report_save_png(const rf_image *image, const char *path, const picture_settings *s, rf_error *err) {
    char *parameters = parameters_text(s), *json = settings_json(s);
    rf_status st = RF_OK;
    if (parameters && json) {
        rf_png_text texts[] = {{"parameters", parameters}, {"refrain", json}};
        st = rf_image_save_png(image, path, texts, 2, err);
    } else {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for its embedded settings", path);
    }
    rf_free(parameters);
    cJSON_free(json);
    return st;
}
