/* caching/presets.c - reading them out of cache.json. */
#include "caching/presets.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define MAX_TEXT 2000 /* bytes of a string that is shown to people */

static const char *const preset_names[RF_PRESET_COUNT] = {"slow", "medium", "fast", "ultra"};

const char *rf_preset_name(int index) {
    return index >= 0 && index < RF_PRESET_COUNT ? preset_names[index] : NULL;
}

/* Where a value is, for messages. */
typedef struct {
    const char *model, *preset;
    int measured; /* -1 = in the preset itself */
} place;

static rf_status wrong(const place *at, const char *key, const char *expected, rf_error *err) {
    if (at->measured < 0)
        return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: preset %s: '%s' must be %s", at->model, at->preset, key,
                       expected);
    return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: preset %s: measured %d: '%s' must be %s", at->model, at->preset,
                   at->measured, key, expected);
}

/* absent NULL: the key must be there. */
static rf_status read_text(const rf_json_value *object, const char *key, const char *absent, const place *at,
                           const char **out, rf_error *err) {
    *out = absent;
    if (!rf_json_has(object, key) && absent) return RF_OK;
    *out = rf_json_string(rf_json_get(object, key));
    if (!*out || strlen(*out) > MAX_TEXT) return wrong(at, key, "a string of at most 2000 bytes", err);
    return RF_OK;
}

static rf_status read_number(const rf_json_value *object, const char *key, bool required, double min, double max,
                             const place *at, double *out, rf_error *err) {
    *out = (double)NAN;
    if (!rf_json_has(object, key) && !required) return RF_OK;
    double v = rf_json_number(rf_json_get(object, key));
    if (v >= min && v <= max) {
        *out = v;
        return RF_OK;
    }
    char expected[64];
    snprintf(expected, sizeof expected, "a number %g..%g", min, max);
    return wrong(at, key, expected, err);
}

static rf_status read_measured(const rf_json_value *object, const place *at, rf_preset_measured *out, rf_error *err) {
    if (!rf_json_is_object(object)) return wrong(at, "measured", "an array of objects", err);
    double steps = 0;
    rf_status st = read_text(object, "device", NULL, at, &out->device, err);
    if (st == RF_OK) st = read_text(object, "command", "", at, &out->command, err);
    if (st == RF_OK) st = read_number(object, "steps", true, 1, 10000, at, &steps, err);
    if (st == RF_OK) st = read_number(object, "cfg", false, 0, 1000, at, &out->cfg_scale, err);
    if (st == RF_OK) st = read_number(object, "speedup", true, 0, 1e6, at, &out->speedup, err);
    if (st == RF_OK) st = read_number(object, "psnr_db", false, -1000, 1000, at, &out->psnr_db, err);
    if (st == RF_OK) st = read_number(object, "ssim", false, -1, 1, at, &out->ssim, err);
    if (st != RF_OK) return st;
    if (steps != floor(steps)) return wrong(at, "steps", "a whole number", err);
    out->num_steps = (int)steps;
    if (rf_json_get(object, "psnr_db") && !rf_json_has(object, "psnr_db")) out->psnr_db = (double)INFINITY; /* null */
    return RF_OK;
}

static const rf_json_value *preset_object(const rf_json_value *calibration, const char *name) {
    return rf_json_get(rf_json_get(calibration, "presets"), name);
}

bool rf_preset_exists(const rf_json_value *calibration, const char *name) {
    return preset_object(calibration, name) != NULL;
}

static rf_status no_such_preset(const rf_json_value *calibration, const char *model, const char *name, rf_error *err) {
    char have[64] = "";
    for (int i = 0; i < RF_PRESET_COUNT; i++) {
        size_t len = strlen(have);
        if (rf_preset_exists(calibration, preset_names[i]))
            snprintf(have + len, sizeof have - len, "%s%s", len ? ", " : "", preset_names[i]);
    }
    if (!have[0])
        return rf_fail(err, RF_ERR_ARGUMENT, "%s has no cache presets: nobody has measured any for it", model);
    return rf_fail(err, RF_ERR_ARGUMENT, "%s has no cache preset '%s'; it has: %s", model, name, have);
}

rf_status rf_preset_find(rf_preset *out, const rf_json_value *calibration, const char *model, const char *name,
                         rf_error *err) {
    *out = (rf_preset){0};
    const rf_json_value *object = preset_object(calibration, name);
    if (!object) return no_such_preset(calibration, model, name, err);
    place at = {.model = model, .preset = name, .measured = -1};
    if (!rf_json_is_object(object))
        return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: preset %s must be an object", model, name);
    out->name = rf_json_key(object);
    rf_status st = read_text(object, "mode", NULL, &at, &out->mode, err);
    if (st == RF_OK) st = read_text(object, "options", "", &at, &out->options, err);
    if (st != RF_OK) return st;
    if (!rf_json_has(object, "measured")) return RF_OK;
    const rf_json_value *measured = rf_json_get(object, "measured");
    if (!rf_json_is_array(measured)) return wrong(&at, "measured", "an array of objects", err);
    for (const rf_json_value *m = rf_json_first(measured); m; m = rf_json_next(m)) {
        if (out->num_measured == RF_PRESET_MAX_MEASURED)
            return wrong(&at, "measured", "an array of at most 32 objects", err);
        at.measured = out->num_measured;
        st = read_measured(m, &at, &out->measured[out->num_measured], err);
        if (st != RF_OK) return st;
        out->num_measured++;
    }
    return RF_OK;
}

/* Of a model's choice no file is opened: not by replay, and not by an option that may name one. */
static rf_status check_opens_no_file(const rf_policy *policy, const rf_preset *preset, const char *model,
                                     rf_error *err) {
    const rf_policy_def *def = rf_policy_get_def(policy);
    if (strcmp(def->level, "replay") == 0)
        return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: preset %s: '%s' reads a file and cannot be a preset", model,
                       preset->name, preset->mode);
    for (int i = 0; i < def->num_options; i++) {
        if (def->options[i].type == RF_OPTION_TEXT && strchr(rf_policy_text(policy, i), '/'))
            return rf_fail(err, RF_ERR_CONFIG, "%s: cache.json: preset %s: option %s must not name a file", model,
                           preset->name, def->options[i].name);
    }
    return RF_OK;
}

rf_status rf_preset_policy(rf_policy **out, const rf_preset *preset, const char *model, rf_error *err) {
    *out = NULL;
    rf_policy *policy = NULL;
    rf_status st = rf_policy_create(&policy, preset->mode, err);
    if (st == RF_OK) st = rf_policy_set(policy, preset->options, err);
    if (st == RF_ERR_ARGUMENT)
        st = rf_fail_prefix(err, RF_ERR_CONFIG, "%s: cache.json: preset %s", model, preset->name);
    if (st == RF_OK) st = check_opens_no_file(policy, preset, model, err);
    if (st == RF_OK) {
        *out = policy;
        policy = NULL;
    }
    rf_policy_destroy(policy);
    return st;
}
