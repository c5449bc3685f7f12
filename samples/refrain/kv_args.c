/* samples/refrain/kv_args.c - specs of KV policies to settings. */
#include "samples/refrain/kv_args.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/kv/demote.h"
#include "core/memory.h"

#define MAX_SIZES   32
#define MOST_BUDGET 1e9

bool kv_args_given(const kv_args *a) {
    return a->policies.count > 0;
}

void kv_settings_free(kv_settings *s) {
    for (int i = 0; i < s->num; i++) rf_free(s->items[i].name);
    rf_free(s->items);
    rf_token_ids_clear(&s->episode);
    *s = (kv_settings){0};
}

bool kv_is_none(const kv_setting *s) {
    return s->rule.score == RF_KV_SCORE_NONE && s->rule.action == RF_KV_DROP;
}

void kv_size_text(const kv_setting *s, char *out, size_t room) {
    if (kv_is_none(s) || (s->budget == 0 && s->ratio <= 0)) {
        snprintf(out, room, "all");
    } else if (s->budget > 0) {
        snprintf(out, room, "%d tokens", (int)s->budget);
    } else {
        snprintf(out, room, "%g", s->ratio);
    }
}

rf_status kv_check_model(const opened_text *t, const char *flag, rf_error *err) {
    if (text_is_causal(t)) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: of autoregressive models (" KV_DEFAULT_MODEL "); %s is %s", flag, t->name,
                   t->model->desc.attention == RF_TEXT_BLOCK_CAUSAL ? "a block diffusion model"
                                                                    : "a masked diffusion model");
}

void kv_apply(const kv_setting *s, rf_decode_options *o) {
    bool sized = s->budget > 0 || s->ratio > 0;
    o->kv = &s->rule;
    o->kv_budget = s->budget;
    /* 0: a selecting rule's own size */
    o->kv_ratio = s->budget > 0 ? 0 : sized ? s->ratio : s->rule.action == RF_KV_SELECT ? 0 : 1;
    o->kv_context = 0;
    o->kv_external = s->episode ? s->episode->ids : NULL;
    o->num_kv_external = s->episode ? (int32_t)s->episode->num : 0;
}

rf_status kv_settings_encode(kv_settings *s, const kv_args *a, const opened_text *text, rf_error *err) {
    const kv_setting *asks = NULL;
    for (int i = 0; i < s->num && !asks; i++) {
        const rf_kv_rule *r = &s->items[i].rule;
        if (r->score == RF_KV_SCORE_ATTENTION && r->queries == RF_KV_QUERIES_EXTERNAL) asks = &s->items[i];
    }
    if (asks && !a->episode)
        return rf_fail(err, RF_ERR_ARGUMENT, "--kv-policy %s: wants a text that asks, --kv-episode TEXT", asks->name);
    if (!a->episode) return RF_OK;
    if (!asks) return rf_fail(err, RF_ERR_ARGUMENT, "--kv-episode: no policy asks it (queries=external, epicache)");
    RF_TRY(text_encode(text, a->episode, strlen(a->episode), false, "--kv-episode", &s->episode, err));
    for (int i = 0; i < s->num; i++) s->items[i].episode = &s->episode;
    return RF_OK;
}

kv_numbers kv_numbers_of(const rf_decode_result *r) {
    return (kv_numbers){.kept_bytes = (double)r->kv_kept_bytes,
                        .full_bytes = (double)r->kv_full_bytes,
                        .evictions = (double)r->kv_evictions,
                        .score_ms = r->kv_score_ms,
                        .step_score_ms = r->kv_step_score_ms,
                        .budget = r->kv_budget};
}

rf_status kv_read_numbers(const char *text, const char *option, double above, double most, bool whole, double *out,
                          int room, int *num, rf_error *err) {
    *num = 0;
    for (const char *at = text;;) {
        char *end = NULL;
        double v = strtod(at, &end);
        bool read = end != at && (!*end || *end == ',') && isfinite(v) && (!whole || v == nearbyint(v));
        if (!read || !(v > above) || v > most)
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected %s over %g, up to %g, found '%.*s'", option,
                           whole ? "a whole number" : "a number", above, most, (int)strcspn(at, ","), at);
        if (*num == room) return rf_fail(err, RF_ERR_ARGUMENT, "%s: more than %d numbers", option, room);
        out[(*num)++] = v;
        if (!*end) return RF_OK;
        at = end + 1;
    }
}

rf_status kv_task_names(char **out, const char *tasks, bool with_policies, bool quiet, rf_error *err) {
    static const char *const aliases[][2] = {{"kv", "kv-long"}, {"vt", "vt-long"}};
    size_t num = 1;
    char said[64] = "";
    for (const char *c = tasks; *c; c++) num += *c == ',';
    size_t room = strlen(tasks) + num * 8 + 1, used = 0;
    *out = rf_alloc_zero(room, 1);
    if (!*out) return rf_fail(err, RF_ERR_MEMORY, "no memory for names of tasks");
    for (const char *at = tasks;; at++) {
        size_t len = strcspn(at, ",");
        const char *name = at;
        int name_len = (int)len;
        for (size_t i = 0; i < sizeof aliases / sizeof aliases[0] && with_policies; i++) {
            if (strlen(aliases[i][0]) != len || strncmp(aliases[i][0], at, len) != 0) continue;
            name = aliases[i][1];
            name_len = (int)strlen(name);
            size_t told = strlen(said);
            snprintf(said + told, sizeof said - told, "%s%s stands for %s", told ? ", " : "", aliases[i][0], name);
        }
        used += (size_t)snprintf(*out + used, room - used, "%s%.*s", at == tasks ? "" : ",", name_len, name);
        at += len;
        if (!*at) break;
    }
    if (said[0] && !quiet) say("of KV policies %s", said);
    return RF_OK;
}

/* ---- policies ---- */

/* Does another spec begin at `text`, behind a comma? An option belongs to a spec that has options. */
static bool begins_spec(const char *text, bool has_options) {
    size_t len = strcspn(text, ":+,");
    return !has_options || !memchr(text, '=', len);
}

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "no memory for a list of KV policies");
}

/* "k=v,k2=v2" of --kv-option. */
static rf_status set_options(rf_kv_rule *rule, const char *text, rf_error *err) {
    char key[64], value[128];
    for (const char *at = text;;) {
        size_t len = strcspn(at, ","), key_len = strcspn(at, "=,");
        if (key_len >= len || key_len == 0 || key_len >= sizeof key || len - key_len - 1 >= sizeof value)
            return rf_fail(err, RF_ERR_ARGUMENT, "--kv-option: expected KEY=VALUE, found '%.*s'", (int)len, at);
        snprintf(key, sizeof key, "%.*s", (int)key_len, at);
        snprintf(value, sizeof value, "%.*s", (int)(len - key_len - 1), at + key_len + 1);
        rf_status st = rf_kv_rule_set(rule, key, value, err);
        if (st != RF_OK) return rf_fail_prefix(err, st, "--kv-option");
        at += len;
        if (!*at) return RF_OK;
        at++;
    }
}

/* spec[len] to a rule and its name. */
static rf_status read_spec(kv_setting *out, const char *spec, size_t len, const kv_args *args, rf_error *err) {
    const arg_list *options = &args->options;
    char *name = rf_alloc(len + 1);
    *out = (kv_setting){0};
    if (!name) return no_memory(err);
    memcpy(name, spec, len);
    name[len] = 0;
    for (char *c = name; *c; c++) {
        if (*c == '+') *c = ',';
    }
    rf_status st = len == 0 ? rf_fail(err, RF_ERR_ARGUMENT, "expected a policy, found nothing")
                            : rf_kv_rule_parse(&out->rule, name, err);
    if (st != RF_OK) st = rf_fail_prefix(err, st, "%s", args->flag ? args->flag : "--kv-policy");
    bool changes = st == RF_OK && options->count > 0 && !kv_is_none(out);
    for (int i = 0; changes && i < options->count && st == RF_OK; i++)
        st = set_options(&out->rule, options->items[i], err);
    if (changes && st == RF_OK) {
        st = rf_kv_rule_check(&out->rule, err);
        if (st != RF_OK) st = rf_fail_prefix(err, st, "--kv-option");
    }
    for (char *c = name; *c; c++) {
        if (*c == ',') *c = '+';
    }
    if (st == RF_OK) {
        out->name = name;
        return RF_OK;
    }
    rf_free(name);
    return st;
}

static rf_status append(kv_settings *s, const kv_setting *like, int32_t budget, double ratio, bool agnostic,
                        rf_error *err) {
    if (s->num == s->room) {
        int room = s->room ? 2 * s->room : 16;
        kv_setting *grown = rf_realloc(s->items, (size_t)room * sizeof *grown);
        if (!grown) return no_memory(err);
        s->items = grown;
        s->room = room;
    }
    kv_setting *item = &s->items[s->num];
    *item = *like;
    item->name = rf_strdup(like->name);
    item->budget = budget;
    item->ratio = ratio;
    item->agnostic = agnostic;
    if (!item->name) return no_memory(err);
    s->num++;
    return RF_OK;
}

typedef struct {
    double budgets[MAX_SIZES], ratios[MAX_SIZES];
    int num_budgets, num_ratios;
    bool given;
} sizes;

static rf_status read_sizes(sizes *s, const kv_args *a, const char *default_ratios, rf_error *err) {
    *s = (sizes){.given = a->budgets || a->ratios};
    if (a->budgets)
        RF_TRY(kv_read_numbers(a->budgets, "--kv-budget", 0, MOST_BUDGET, true, s->budgets, MAX_SIZES, &s->num_budgets,
                               err));
    const char *ratios = a->ratios ? a->ratios : a->budgets ? NULL : default_ratios;
    if (ratios) RF_TRY(kv_read_numbers(ratios, "--kv-ratio", 0, 1, false, s->ratios, MAX_SIZES, &s->num_ratios, err));
    return RF_OK;
}

/* Does the rule say on its own how much stays, or does everything stay? */
static bool needs_no_size(const rf_kv_rule *r) {
    return r->action == RF_KV_SELECT || r->action == RF_KV_DEMOTE || r->action == RF_KV_SHARE ||
           r->alloc == RF_KV_ALLOC_CLASS;
}

static rf_status add_policy(kv_settings *out, const kv_setting *one, const sizes *s, unsigned ways, bool single,
                            rf_error *err) {
    if (kv_is_none(one)) {
        if (single && s->given)
            return rf_fail(err, RF_ERR_ARGUMENT, "--kv-policy none: keeps everything, whatever the budget");
        return append(out, one, 0, 0, false, err);
    }
    bool whole = rf_kv_packs(&one->rule) && !rf_kv_packs_under_budget(&one->rule); /* beside sizes of others: once */
    bool unsized = needs_no_size(&one->rule) && (!s->given || (whole && !single));
    if (single && !s->given && !unsized)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--kv-policy %s: expected how much it may keep, --kv-budget N or --kv-ratio R", one->name);
    for (unsigned way = KV_AWARE; way <= KV_AGNOSTIC; way <<= 1) {
        if (!(ways & way)) continue;
        if (unsized) RF_TRY(append(out, one, 0, 0, way == KV_AGNOSTIC, err));
        for (int i = 0; i < s->num_ratios && !unsized; i++)
            RF_TRY(append(out, one, 0, s->ratios[i], way == KV_AGNOSTIC, err));
        for (int i = 0; i < s->num_budgets && !unsized; i++)
            RF_TRY(append(out, one, (int32_t)s->budgets[i], 0, way == KV_AGNOSTIC, err));
    }
    return RF_OK;
}

rf_status kv_settings_make(kv_settings *out, const kv_args *a, unsigned ways, const char *default_ratios,
                           rf_error *err) {
    const char *size = a->budgets ? "--kv-budget" : a->ratios ? "--kv-ratio" : NULL;
    bool single = !default_ratios;
    sizes s;
    *out = (kv_settings){0};
    if (!kv_args_given(a)) {
        const char *flag = size ? size : a->options.count > 0 ? "--kv-option" : NULL;
        if (!flag) return RF_OK;
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: no policy is chosen (--kv-policy)", flag);
    }
    if (single && a->budgets && a->ratios)
        return rf_fail(err, RF_ERR_ARGUMENT, "--kv-budget and --kv-ratio exclude each other");
    RF_TRY(read_sizes(&s, a, default_ratios, err));
    if (single && s.num_budgets + s.num_ratios > 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected one number, found '%s' (refrain eval takes lists)", size,
                       a->budgets ? a->budgets : a->ratios);
    int num = 0;
    rf_status st = RF_OK;
    for (int i = 0; i < a->policies.count && st == RF_OK; i++) {
        for (const char *at = a->policies.items[i]; st == RF_OK;) {
            const char *end = at + strcspn(at, ",");
            bool has_options = memchr(at, ':', (size_t)(end - at)) || memchr(at, '=', (size_t)(end - at));
            while (*end && !begins_spec(end + 1, has_options)) end += 1 + strcspn(end + 1, ",");
            kv_setting one;
            st = read_spec(&one, at, (size_t)(end - at), a, err);
            if (st == RF_OK && single && ++num > 1)
                st = rf_fail(err, RF_ERR_ARGUMENT,
                             "--kv-policy: expected one policy, found '%s' too (refrain eval takes "
                             "lists)",
                             one.name);
            if (st == RF_OK && single && kv_is_none(&one) && a->options.count > 0)
                st = rf_fail(err, RF_ERR_ARGUMENT, "--kv-option: --kv-policy none has none");
            if (st == RF_OK) st = add_policy(out, &one, &s, ways, single, err);
            rf_free(one.name);
            if (!*end) break;
            at = end + 1;
        }
    }
    return st;
}
