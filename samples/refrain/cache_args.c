/* samples/refrain/cache_args.c - from flags to a policy.
 *
 * The policy comes from one of three places: --cache-mode, --replay (the policy `replay` with its file), --cache-preset (the model's
 * cache.json). --cache-option then changes single options of it. */
#include "samples/refrain/cache_args.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "caching/trace.h"
#include "core/memory.h"

#define REPLAY_POLICY "replay"
#define REPLAY_FILE   "file"

static bool is_none(const char *mode) {
    return !mode || strcmp(mode, "none") == 0;
}

bool cache_args_wanted(const cache_args *args) {
    return !is_none(args->mode) || args->replay || args->preset;
}

/* A flag that would do nothing is refused. */
static rf_status check_without_policy(const cache_args *a, rf_error *err) {
    const char *flag = a->options.count > 0 ? "--cache-option" : a->max_drift > 0 ? "--max-drift" : NULL;
    if (!flag && a->force) flag = "--force";
    if (!flag) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: no policy is chosen (--cache-mode, --cache-preset or --replay)", flag);
}

static rf_status set_options(rf_policy *policy, const arg_list *options, rf_error *err) {
    for (int i = 0; i < options->count; i++) {
        rf_status st = rf_policy_set(policy, options->items[i], err);
        if (st != RF_OK) return rf_fail_prefix(err, st, "--cache-option");
    }
    return RF_OK;
}

/* From --cache-mode or --replay. */
static rf_status named_policy(rf_policy **out, const cache_args *a, rf_error *err) {
    rf_policy *policy = NULL;
    rf_status st = rf_policy_create(&policy, a->replay ? REPLAY_POLICY : a->mode, err);
    if (st == RF_ERR_ARGUMENT) st = rf_fail_prefix(err, st, a->replay ? "--replay" : "--cache-mode");
    if (st == RF_OK && a->replay) st = rf_policy_set_one(policy, REPLAY_FILE, a->replay, err);
    if (st == RF_OK) st = set_options(policy, &a->options, err);
    if (st == RF_OK) {
        *out = policy;
        policy = NULL;
    }
    rf_policy_destroy(policy);
    return st;
}

rf_status cache_args_check(const cache_args *a, rf_error *err) {
    const char *first = a->mode ? "--cache-mode" : a->replay ? "--replay" : NULL;
    const char *second = a->preset ? "--cache-preset" : a->mode && a->replay ? "--replay" : NULL;
    if (first && second) return rf_fail(err, RF_ERR_ARGUMENT, "%s and %s exclude each other", first, second);
    if (!cache_args_wanted(a)) return check_without_policy(a, err);
    if (a->preset) return RF_OK;
    const rf_policy_def *def = a->replay ? NULL : rf_policy_find(a->mode);
    if (def && def->rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "--cache-mode %s: a row policy of text models (refrain text)", a->mode);
    rf_policy *policy = NULL;
    rf_status st = named_policy(&policy, a, err);
    rf_policy_destroy(policy);
    if (st != RF_OK || !a->replay) return st;
    rf_trace *trace = NULL; /* read again by the policy: a wrong file should not cost loading a model */
    st = rf_trace_open(&trace, a->replay, err);
    rf_trace_close(trace);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "--replay");
}

rf_status cache_args_policy(rf_policy **out, const cache_args *a, const rf_json_value *calibration, const char *model,
                            rf_preset *preset, rf_error *err) {
    *out = NULL;
    if (!cache_args_wanted(a)) return RF_OK;
    if (!a->preset) return named_policy(out, a, err);
    rf_policy *policy = NULL;
    rf_status st = rf_preset_find(preset, calibration, model, a->preset, err);
    if (st == RF_OK) st = rf_preset_policy(&policy, preset, model, err);
    if (st == RF_OK) st = set_options(policy, &a->options, err);
    if (st == RF_OK) {
        *out = policy;
        policy = NULL;
    }
    rf_policy_destroy(policy);
    return st;
}

/* ---- texts ---- */

static char *whole_description(const rf_policy *policy) {
    size_t bytes = rf_policy_describe(policy, NULL, 0) + 1;
    char *text = rf_alloc(bytes);
    if (text) rf_policy_describe(policy, text, bytes);
    return text;
}

char *cache_options_text(const rf_policy *policy, bool portable) {
    if (!portable) return whole_description(policy);
    rf_policy *copy = rf_policy_clone(policy);
    if (!copy) return NULL;
    const rf_policy_def *def = rf_policy_get_def(copy);
    rf_status st = RF_OK;
    for (int i = 0; i < def->num_options && st == RF_OK; i++) {
        if (def->options[i].type != RF_OPTION_TEXT) continue;
        const char *slash = strrchr(rf_policy_text(copy, i), '/');
        char *last = slash ? rf_strdup(slash + 1) : NULL; /* setting frees the old text */
        if (slash) st = last ? rf_policy_set_one(copy, def->options[i].name, last, NULL) : RF_ERR_MEMORY;
        rf_free(last);
    }
    char *text = st == RF_OK ? whole_description(copy) : NULL;
    rf_policy_destroy(copy);
    return text;
}

void preset_measured_text(const rf_preset_measured *m, char *text, size_t text_bytes) {
    char psnr[64] = "", ssim[32] = "", cfg[32] = "";
    if (isinf(m->psnr_db)) snprintf(psnr, sizeof psnr, " with equal pictures");
    if (isfinite(m->psnr_db)) snprintf(psnr, sizeof psnr, " at PSNR %.1f dB", m->psnr_db);
    if (isfinite(m->ssim)) snprintf(ssim, sizeof ssim, ", SSIM %.3f", m->ssim);
    if (isfinite(m->cfg_scale)) snprintf(cfg, sizeof cfg, ", cfg %g", m->cfg_scale);
    snprintf(text, text_bytes, "%.3gx%s%s on %s, %d steps%s", m->speedup, psnr, ssim, m->device, m->num_steps, cfg);
}
