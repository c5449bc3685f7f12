/* samples/refrain/text_args.c - the table of settings and what they turn into. */
#include "samples/refrain/text_args.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"

enum {
    COMMIT = 0,
    CONFIDENCE,
    THRESHOLD,
    FACTOR,
    ENTROPY_BOUND,
    STEPS,
    BLOCK,
    ALG,
    ALG_TEMP,
    REMASKING,
    CFG_SCALE,
    END,
    REUSE,
    REUSE_REFRESH,
    REUSE_ROWS,
    GUIDE_ACCEPT,
    GUIDE_K,
    GUIDE_THRESHOLD,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    REPEAT_PENALTY,
    NUM_SETTINGS
};

/* In the order of rf_commit_rule, rf_confidence, rf_end_rule, rf_attention_reuse, rf_accept. */
#define COMMIT_NAMES     "topn threshold factor entropy-bound guided schedule origin sequential"
#define CONFIDENCE_NAMES "prob margin entropy random"
#define END_NAMES        "none truncate fill stop"
#define REUSE_NAMES      "none flashblock"
#define ACCEPT_NAMES     "top1 topk prob"
#define ALG_NAMES        "origin maskgit_plus topk_margin entropy"
#define REMASKING_NAMES  "low_confidence random low_confidence_static low_confidence_dynamic"

static const rf_policy_option table[] = {
    [COMMIT] = {"commit", RF_OPTION_CHOICE, "", 0, 0, COMMIT_NAMES, "which masks become tokens (default: topn)"},
    [CONFIDENCE] = {"confidence", RF_OPTION_CHOICE, "", 0, 0, CONFIDENCE_NAMES, "what sure means (default: prob)"},
    [THRESHOLD] = {"threshold", RF_OPTION_DOUBLE, "", 0, 1, NULL, "of --commit threshold (default: 0.9)"},
    [FACTOR] = {"factor", RF_OPTION_DOUBLE, "", 1e-6, 1e6, NULL, "of --commit factor (default: 1)"},
    [ENTROPY_BOUND] = {"entropy-bound", RF_OPTION_DOUBLE, "", 0, 1e6, NULL, "of its commit rule (default: 0.001)"},
    [STEPS] = {"steps", RF_OPTION_INT, "", 1, 1e6, NULL, "passes; of a block model: a block (one a token)"},
    [BLOCK] = {"block", RF_OPTION_INT, "", 1, 1e6, NULL, "tokens a block (default: the model's, else all)"},
    [ALG] = {"alg", RF_OPTION_CHOICE, "", 0, 0, ALG_NAMES, "Dream's names for commit and confidence"},
    [ALG_TEMP] = {"alg-temp", RF_OPTION_DOUBLE, "", 0, 1e6, NULL, "Dream: draw masks (default: 0, the surest)"},
    [REMASKING] = {"remasking", RF_OPTION_CHOICE, "", 0, 0, REMASKING_NAMES, "LLaDA's and SDAR's names likewise"},
    [CFG_SCALE] = {"cfg-scale", RF_OPTION_DOUBLE, "", 0, 1000, NULL, "LLaDA: guidance (default: 0, off)"},
    [END] = {"end", RF_OPTION_CHOICE, "", 0, 0, END_NAMES, "what an end of text does (default: stop)"},
    [REUSE] = {"attention-reuse", RF_OPTION_CHOICE, "", 0, 0, REUSE_NAMES, "keep attention to frozen keys"},
    [REUSE_REFRESH] = {"reuse-refresh", RF_OPTION_INT, "", 0, 1e6, NULL, "renewed after N tokens (default: 2)"},
    [REUSE_ROWS] = {"reuse-refresh-rows", RF_OPTION_BOOL, "", 0, 0, NULL, "renew rows just committed alone"},
    [GUIDE_ACCEPT] = {"guide-accept", RF_OPTION_CHOICE, "", 0, 0, ACCEPT_NAMES, "what the guide accepts (top1)"},
    [GUIDE_K] = {"guide-k", RF_OPTION_INT, "", 1, 1e6, NULL, "of --guide-accept topk (default: 5)"},
    [GUIDE_THRESHOLD] = {"guide-threshold", RF_OPTION_DOUBLE, "", 0, 1, NULL, "of --guide-accept prob (default: 0.1)"},
    [TEMPERATURE] = {"temperature", RF_OPTION_DOUBLE, "", 0, 1000, NULL, "0 = the most probable (default: 0)"},
    [TOP_K] = {"top-k", RF_OPTION_INT, "", 0, 1e9, NULL, "the k most probable; 0 = all (default: 0)"},
    [TOP_P] = {"top-p", RF_OPTION_DOUBLE, "", 1e-9, 1, NULL, "as many as make p together (default: 1)"},
    [MIN_P] = {"min-p", RF_OPTION_DOUBLE, "", 0, 0.999999, NULL, "at least so much of the first (default: 0)"},
    [REPEAT_PENALTY] = {"repeat-penalty", RF_OPTION_DOUBLE, "", 1e-6, 1e6, NULL, "autoregressive models (default: 1)"},
};

const rf_policy_option *text_setting_at(int index) {
    return index >= 0 && index < NUM_SETTINGS ? &table[index] : NULL;
}

int text_setting_find(const char *name) {
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (strcmp(table[i].name, name) == 0) return i;
    }
    return -1;
}

size_t text_setting_rows(text_settings *s, arg_option *rows) {
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const rf_policy_option *o = &table[i];
        if (o->type == RF_OPTION_CHOICE) {
            rows[i] = arg_choice(o->name, 0, o->help, &s->values[i], o->choices);
        } else if (o->type == RF_OPTION_BOOL) {
            rows[i] = arg_flag(o->name, 0, o->help, &s->refresh_rows);
        } else {
            rows[i] = arg_string(o->name, 0, o->type == RF_OPTION_INT ? "N" : "X", o->help, &s->values[i]);
        }
    }
    return NUM_SETTINGS;
}

/* Place of a word in a list with single spaces; -1 = not in it. */
static int word_index(const char *words, const char *word) {
    size_t len = strlen(word);
    for (int i = 0; *words; i++) {
        size_t n = strcspn(words, " ");
        if (n == len && memcmp(words, word, n) == 0) return i;
        words += n + (words[n] == ' ');
    }
    return -1;
}

/* The place of a choice, the number, 0 or 1. */
static rf_status read_value(int index, const char *value, const char *prefix, double *out, rf_error *err) {
    const rf_policy_option *o = &table[index];
    char *end = NULL;
    if (o->type == RF_OPTION_CHOICE || o->type == RF_OPTION_BOOL) {
        const char *words = o->type == RF_OPTION_BOOL ? "false true" : o->choices;
        int at = word_index(words, value);
        if (at < 0) return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: no '%s'; one of: %s", prefix, o->name, value, words);
        *out = at;
        return RF_OK;
    }
    *out = strtod(value, &end);
    if (end == value || *end || !isfinite(*out))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: expected a number, found '%s'", prefix, o->name, value);
    if (o->type == RF_OPTION_INT && *out != nearbyint(*out))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: expected a whole number, found '%s'", prefix, o->name, value);
    if (*out < o->min || *out > o->max)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: expected %g..%g, found %s", prefix, o->name, o->min, o->max, value);
    return RF_OK;
}

rf_status text_setting_check(int index, const char *value, rf_error *err) {
    double number;
    return read_value(index, value, "", &number, err);
}

static void set_alg(rf_decode_options *o, int alg) {
    static const rf_confidence by[] = {RF_CONFIDENCE_PROB, RF_CONFIDENCE_PROB, RF_CONFIDENCE_MARGIN,
                                       RF_CONFIDENCE_NEG_ENTROPY};
    o->commit = alg == 0 ? RF_COMMIT_ORIGIN : RF_COMMIT_SCHEDULE;
    o->confidence = by[alg];
}

static void set_remasking(rf_decode_options *o, int remasking) {
    bool dynamic = remasking == 3;
    o->commit = dynamic ? RF_COMMIT_THRESHOLD : RF_COMMIT_TOPN;
    o->confidence = remasking == 1 ? RF_CONFIDENCE_RANDOM : RF_CONFIDENCE_PROB;
    o->dynamic = o->threshold_strict = dynamic;
}

static void set(rf_decode_options *o, int index, double v) {
    switch (index) {
    case COMMIT: o->commit = (rf_commit_rule)(int)v; break;
    case CONFIDENCE: o->confidence = (rf_confidence)(int)v; break;
    case THRESHOLD: o->threshold = v; break;
    case FACTOR: o->factor = v; break;
    case ENTROPY_BOUND: o->entropy_bound = v; break;
    case STEPS: o->steps = (int32_t)v; break;
    case BLOCK: o->block = (int32_t)v; break;
    case ALG: set_alg(o, (int)v); break;
    case ALG_TEMP: o->alg_temp = v; break;
    case REMASKING: set_remasking(o, (int)v); break;
    case CFG_SCALE: o->cfg_scale = v; break;
    case END: o->end = (rf_end_rule)(int)v; break;
    case REUSE: o->reuse = (rf_attention_reuse)(int)v; break;
    case REUSE_REFRESH: o->reuse_refresh = (int32_t)v; break;
    case REUSE_ROWS: o->reuse_refresh_rows = v != 0; break;
    case GUIDE_ACCEPT: o->accept = (rf_accept)(int)v; break;
    case GUIDE_K: o->accept_k = (int32_t)v; break;
    case GUIDE_THRESHOLD: o->accept_threshold = v; break;
    case TEMPERATURE: o->temperature = v; break;
    case TOP_K: o->top_k = (int32_t)v; break;
    case TOP_P: o->top_p = v; break;
    case MIN_P: o->min_p = v; break;
    case REPEAT_PENALTY: o->repetition_penalty = v; break;
    default: break;
    }
}

/* What must hold for the setting to have an effect; NULL if it does hold. */
static const char *missing_for(int index, const rf_decode_options *o) {
    bool counts = o->commit == RF_COMMIT_TOPN || o->commit == RF_COMMIT_SEQUENTIAL || o->commit == RF_COMMIT_SCHEDULE ||
                  o->commit == RF_COMMIT_ORIGIN || (o->commit == RF_COMMIT_THRESHOLD && o->dynamic);
    switch (index) {
    case THRESHOLD: return o->commit == RF_COMMIT_THRESHOLD ? NULL : "commit threshold";
    case FACTOR: return o->commit == RF_COMMIT_FACTOR ? NULL : "commit factor";
    case ENTROPY_BOUND: return o->commit == RF_COMMIT_ENTROPY_BOUND ? NULL : "commit entropy-bound";
    case STEPS: return counts ? NULL : "a commit rule that counts passes (topn, sequential, schedule, origin)";
    case ALG_TEMP: return o->commit == RF_COMMIT_SCHEDULE ? NULL : "commit schedule (Dream)";
    case REUSE_REFRESH:
    case REUSE_ROWS: return o->reuse == RF_REUSE_FLASHBLOCK ? NULL : "attention-reuse flashblock";
    case GUIDE_ACCEPT: return o->commit == RF_COMMIT_GUIDED ? NULL : "commit guided";
    case GUIDE_K: return o->commit == RF_COMMIT_GUIDED && o->accept == RF_ACCEPT_TOPK ? NULL : "guide-accept topk";
    case GUIDE_THRESHOLD:
        return o->commit == RF_COMMIT_GUIDED && o->accept == RF_ACCEPT_PROB ? NULL : "guide-accept prob";
    default: return NULL;
    }
}

static rf_status exclude(const text_settings *s, const char *prefix, int a, int b, rf_error *err) {
    if (!s->values[a] || !s->values[b]) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s%s and %s%s exclude each other", prefix, table[a].name, prefix,
                   table[b].name);
}

/* Dream's default counts passes in one block; a rule that works block by block takes the place of it where there are blocks. */
static void fit_to_blocks(const text_settings *s, rf_decode_options *o) {
    bool chosen = s->values[COMMIT] || s->values[ALG] || s->values[REMASKING];
    if (!chosen && o->commit == RF_COMMIT_SCHEDULE && o->block > 0 && o->block != o->max_new)
        o->commit = RF_COMMIT_TOPN;
}

rf_status text_settings_apply(const text_settings *s, const char *prefix, const rf_text_model *model,
                              rf_decode_options *o, rf_error *err) {
    bool causal = model->desc.attention == RF_TEXT_CAUSAL;
    double number;
    RF_TRY(exclude(s, prefix, ALG, COMMIT, err));
    RF_TRY(exclude(s, prefix, ALG, CONFIDENCE, err));
    RF_TRY(exclude(s, prefix, ALG, REMASKING, err));
    RF_TRY(exclude(s, prefix, REMASKING, COMMIT, err));
    RF_TRY(exclude(s, prefix, REMASKING, CONFIDENCE, err));
    for (int pass = 0; pass < 2;
         pass++) { /* names for whole rules first: what else is given changes single things of them */
        for (int i = 0; i < NUM_SETTINGS; i++) {
            const char *value = i != REUSE_ROWS ? s->values[i] : s->refresh_rows ? "true" : NULL;
            if (!value || (i == ALG || i == REMASKING) != (pass == 0)) continue;
            if (causal && i < TEMPERATURE)
                return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: of diffusion language models; this one is autoregressive",
                               prefix, table[i].name);
            RF_TRY(read_value(i, value, prefix, &number, err));
            set(o, i, number);
        }
    }
    fit_to_blocks(s, o);
    for (int i = 0; i < NUM_SETTINGS; i++) {
        bool given = i == REUSE_ROWS ? s->refresh_rows : s->values[i] != NULL;
        const char *missing = given ? missing_for(i, o) : NULL;
        if (missing) return rf_fail(err, RF_ERR_ARGUMENT, "%s%s: needs %s", prefix, table[i].name, missing);
    }
    return RF_OK;
}

rf_status text_settings_read(text_settings *s, char *text, rf_error *err) {
    memset(s, 0, sizeof *s);
    for (char *at = text; *at;) {
        char *end = at + strcspn(at, "+"), *equals = memchr(at, '=', (size_t)(end - at));
        bool last = *end == 0;
        *end = 0;
        if (!equals) return rf_fail(err, RF_ERR_ARGUMENT, "'%s': expected SETTING=VALUE", at);
        *equals = 0;
        int index = text_setting_find(at);
        if (index < 0) return rf_fail(err, RF_ERR_ARGUMENT, "no decode setting '%s'", at);
        RF_TRY(text_setting_check(index, equals + 1, err));
        s->values[index] = equals + 1;
        if (index == REUSE_ROWS) s->refresh_rows = strcmp(equals + 1, "true") == 0;
        at = last ? end : end + 1;
    }
    return RF_OK;
}

void text_settings_merge(text_settings *s, const text_settings *more) {
    /* A rule of one's own takes the place of a name for whole rules, and the other way round. */
    if (more->values[COMMIT] || more->values[CONFIDENCE]) s->values[ALG] = s->values[REMASKING] = NULL;
    if (more->values[ALG] || more->values[REMASKING])
        s->values[COMMIT] = s->values[CONFIDENCE] = s->values[ALG] = s->values[REMASKING] = NULL;
    for (int i = 0; i < NUM_SETTINGS; i++) {
        if (more->values[i]) s->values[i] = more->values[i];
    }
    if (more->values[REUSE_ROWS]) {
        s->refresh_rows = more->refresh_rows;
    } else {
        s->refresh_rows |= more->refresh_rows;
    }
}

/* ---- names ---- */

static const char *const commit_names[] = {"topn",   "threshold", "factor", "entropy-bound",
                                           "guided", "schedule",  "origin", "sequential"};
static const char *const end_names[] = {"none", "truncate", "fill", "stop"};

const char *text_commit_name(rf_commit_rule rule) {
    return commit_names[rule];
}

const char *text_end_name(rf_end_rule rule) {
    return end_names[rule];
}

const char *text_reuse_name(rf_attention_reuse reuse) {
    return reuse == RF_REUSE_FLASHBLOCK ? "flashblock" : "none";
}

/* ---- row policies ---- */

static void row_policy_names(char *list, size_t bytes) {
    size_t used = 0;
    for (int i = 0; i < rf_row_policy_count() && used + 1 < bytes; i++)
        used += (size_t)snprintf(list + used, bytes - used, "%s%s", i ? " " : "", rf_row_policy_at(i)->name);
}

rf_status text_row_policy(rf_policy **out, const cache_args *a, rf_error *err) {
    char names[160];
    *out = NULL;
    if (!a->mode || strcmp(a->mode, "none") == 0) {
        const char *flag = a->options.count > 0 ? "--cache-option" : a->force ? "--force" : NULL;
        if (!flag) return RF_OK;
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: no policy is chosen (--cache-mode)", flag);
    }
    row_policy_names(names, sizeof names);
    const rf_policy_def *def = rf_policy_find(a->mode);
    if (def && !def->rows)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--cache-mode %s: keeps features of diffusion transformers; row policies of text: %s", a->mode,
                       names);
    if (!def) {
        size_t len = 0;
        const char *near = args_nearest(a->mode, names, &len);
        return rf_fail(err, RF_ERR_ARGUMENT, "--cache-mode: no row policy '%s'%s%.*s (one of: %s)", a->mode,
                       near ? "; did you mean " : "", near ? (int)len : 0, near ? near : "", names);
    }
    rf_policy *policy = NULL;
    RF_TRY(rf_policy_create(&policy, a->mode, err));
    rf_status st = RF_OK;
    for (int i = 0; i < a->options.count && st == RF_OK; i++) {
        st = rf_policy_set(policy, a->options.items[i], err);
        if (st != RF_OK) st = rf_fail_prefix(err, st, "--cache-option");
    }
    if (st == RF_OK) {
        *out = policy;
        policy = NULL;
    }
    rf_policy_destroy(policy);
    return st;
}
