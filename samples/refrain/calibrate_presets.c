/* samples/refrain/calibrate_presets.c - presets out of a sweep.
 *
 * Where the sweep was of a world with a simulator, quality is the share of the PSNR to it that is kept; else PSNR to the uncached run. A
 * preset is a policy with options and no more, so settings that carry history or treat a world's context otherwise are passed
 * over; so is what a run of fewer steps gives as fast and as well. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/presets.h"
#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "samples/refrain/calibrate.h"
#include "samples/refrain/program.h"

#define OPTION_BYTES 1024
#define FASTER       1.03 /* than the next milder preset */
#define DOUBTFUL     1.1  /* speed-up times computed share of rows: above it the machine was not steady */

static const double kept_levels[RF_PRESET_COUNT] = {.995, .99, .98, .95};
static const double psnr_levels[RF_PRESET_COUNT] = {45, 40, 35, 30};

typedef struct {
    const char *policy, *options; /* borrowed */
    double speedup, psnr, ssim, kept, share;
    bool control;
} candidate;

static double number_of(const rf_json_value *row, const char *key) {
    const rf_json_value *v = rf_json_get(row, key);
    return v ? rf_json_number(v) : NAN; /* null is not a number either */
}

static const char *text_of(const rf_json_value *row, const char *key) {
    const rf_json_value *v = rf_json_get(row, key);
    const char *text = v ? rf_json_string(v) : NULL;
    return text ? text : "";
}

static bool read_candidate(const rf_json_value *row, candidate *c) {
    *c = (candidate){.policy = text_of(row, "policy"),
                     .options = text_of(row, "options"),
                     .speedup = number_of(row, "speedup"),
                     .psnr = number_of(row, "psnr_mean"),
                     .ssim = number_of(row, "ssim_mean"),
                     .kept = number_of(row, "kept"),
                     .share = number_of(row, "share_rows")};
    c->control = strcmp(c->policy, "steps") == 0;
    if (strcmp(text_of(row, "status"), "ok") != 0 || strcmp(c->policy, "none") == 0) return false;
    if (strstr(c->options, "carry=") || strstr(c->options, "context=")) return false;
    return c->policy[0] && c->speedup > 0 && isfinite(c->psnr);
}

/* Options of a sweep are separated by ';', those of a preset by ','. */
static bool preset_options(const candidate *c, char *text, size_t bytes) {
    rf_policy *policy = NULL;
    if (strlen(c->options) >= bytes) return false;
    snprintf(text, bytes, "%s", c->options);
    for (char *at = text; *at; at++) {
        if (*at == ';') *at = ',';
    }
    rf_status st = rf_policy_create(&policy, c->policy, NULL);
    if (st == RF_OK && text[0]) st = rf_policy_set(policy, text, NULL);
    rf_policy_destroy(policy);
    return st == RF_OK;
}

static double quality_of(const candidate *c, bool by_kept) {
    return by_kept ? c->kept : c->psnr;
}

/* Does the control give as much? */
static bool is_beaten(const rf_json_value *rows, const candidate *c, bool by_kept) {
    for (const rf_json_value *row = rf_json_first(rows); row; row = rf_json_next(row)) {
        candidate other;
        if (read_candidate(row, &other) && other.control && other.speedup >= c->speedup &&
            quality_of(&other, by_kept) >= quality_of(c, by_kept))
            return true;
    }
    return false;
}

static bool find_fastest(const rf_json_value *rows, bool by_kept, double level, bool over_control, candidate *best) {
    bool found = false;
    for (const rf_json_value *row = rf_json_first(rows); row; row = rf_json_next(row)) {
        candidate c;
        char options[OPTION_BYTES];
        if (!read_candidate(row, &c) || c.control || c.speedup <= 1 || !(quality_of(&c, by_kept) >= level)) continue;
        if (!(c.share < 1) || c.speedup * c.share > DOUBTFUL) continue;
        if (found && c.speedup <= best->speedup) continue;
        if ((over_control && is_beaten(rows, &c, by_kept)) || !preset_options(&c, options, sizeof options)) continue;
        *best = c;
        found = true;
    }
    return found;
}

static double rounded(double value, double unit) {
    return round(value / unit) * unit;
}

static cJSON *preset_json(const candidate *c, const rf_json_value *settings) {
    char options[OPTION_BYTES], command[OPTION_BYTES + 256];
    const char *steps = text_of(settings, "steps"), *cfg = text_of(settings, "cfg_scale"),
               *frames = text_of(settings, "frames");
    if (!preset_options(c, options, sizeof options)) return NULL;
    cJSON *preset = cJSON_CreateObject();
    cJSON_AddStringToObject(preset, "mode", c->policy);
    cJSON_AddStringToObject(preset, "options", options);
    cJSON *measured = cJSON_AddArrayToObject(preset, "measured"), *one = cJSON_CreateObject();
    char device[256];
    snprintf(device, sizeof device, "%s, %s", text_of(settings, "device"), text_of(settings, "dtype"));
    cJSON_AddStringToObject(one, "device", device);
    cJSON_AddNumberToObject(one, "steps", atof(steps));
    if (cfg[0]) cJSON_AddNumberToObject(one, "cfg", atof(cfg));
    cJSON_AddNumberToObject(one, "speedup", rounded(c->speedup, .01));
    cJSON_AddNumberToObject(one, "psnr_db", rounded(c->psnr, .01));
    if (isfinite(c->ssim)) cJSON_AddNumberToObject(one, "ssim", rounded(c->ssim, 1e-4));
    if (isfinite(c->kept)) cJSON_AddNumberToObject(one, "kept", rounded(c->kept, 1e-4));
    snprintf(command, sizeof command, "refrain sweep -m %s --steps %s%s%s --policy '%s%s%s'",
             text_of(settings, "model"), steps, frames[0] ? " --frames " : "", frames, c->policy,
             c->options[0] ? ":" : "", c->options);
    cJSON_AddStringToObject(one, "command", command);
    cJSON_AddItemToArray(measured, one);
    return preset;
}

static void say_choice(const char *name, const candidate *c) {
    char kept[48] = "";
    if (isfinite(c->kept)) snprintf(kept, sizeof kept, ", %.1f %% kept", 100 * c->kept);
    say("%s: %s%s%s, %.2fx at PSNR %.1f dB%s", name, c->policy, c->options[0] ? ":" : "", c->options, c->speedup,
        c->psnr, kept);
}

static bool has_kept(const rf_json_value *rows) {
    for (const rf_json_value *row = rf_json_first(rows); row; row = rf_json_next(row)) {
        if (isfinite(number_of(row, "kept"))) return true;
    }
    return false;
}

/* A preset that is hardly faster than a milder one is left out. */
static rf_status fill(cJSON *table, const rf_json_value *rows, const rf_json_value *settings, bool over_control,
                      bool quiet, int *chosen, rf_error *err) {
    bool by_kept = has_kept(rows);
    double fastest = 0;
    *chosen = 0;
    for (int i = 0; i < RF_PRESET_COUNT; i++) {
        candidate best;
        if (!find_fastest(rows, by_kept, by_kept ? kept_levels[i] : psnr_levels[i], over_control, &best)) continue;
        if (best.speedup < fastest * FASTER) continue;
        cJSON *preset = preset_json(&best, settings);
        if (!preset) return rf_fail(err, RF_ERR_MEMORY, "no memory for presets");
        fastest = best.speedup;
        cJSON_AddItemToObject(table, rf_preset_name(i), preset);
        ++*chosen;
        if (!quiet) say_choice(rf_preset_name(i), &best);
    }
    return RF_OK;
}

static rf_status choose(cJSON *table, const rf_json *doc, bool quiet, int *chosen, rf_error *err) {
    const rf_json_value *rows = rf_json_get(rf_json_root(doc), "results"),
                        *settings = rf_json_get(rf_json_root(doc), "settings");
    if (!rows || rf_json_is_object(rows) || !settings || !rf_json_is_object(settings))
        return rf_fail(err, RF_ERR_FORMAT, "%s: expected the results of refrain sweep", rf_json_name(doc));
    RF_TRY(fill(table, rows, settings, true, quiet, chosen, err));
    if (*chosen > 0) return RF_OK;
    RF_TRY(fill(table, rows, settings, false, quiet, chosen, err));
    if (*chosen > 0 && !quiet)
        say("warning: no setting is better than fewer steps without a cache; these are the fastest of the others");
    if (*chosen > 0) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: no setting is faster than the uncached run and good enough (%s)",
                   rf_json_name(doc), has_kept(rows) ? "95 % of the quality kept" : "30 dB");
}

rf_status calibrate_presets(cJSON **table, const char *from, bool quiet, int *chosen, rf_error *err) {
    rf_json *doc = NULL;
    char *path = rf_path_is_dir(from) ? rf_path_join(from, "results.json") : rf_strdup(from);
    *table = cJSON_CreateObject();
    rf_status st = path && *table ? rf_json_open(&doc, path, err) : rf_fail(err, RF_ERR_MEMORY, "no memory for a name");
    if (st == RF_OK) st = choose(*table, doc, quiet, chosen, err);
    rf_json_close(doc);
    rf_free(path);
    return st;
}
