/* caching/policy.c - the list of policies, their options as text, and what all of them share.
 *
 * Options are parsed against the table of a policy (rf_policy_def). A set of several is all or nothing: after an error
 * the policy is as it was. In "k=v,k2=v2" a piece with no '=' goes on with the text value in front of it, so that what
 * rf_policy_describe writes can be set again. */
#include "caching/policy.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/features/features.h"
#include "caching/rows/rows.h"
#include "core/memory.h"
#include "core/text.h"

#define MAX_VALUE_TEXT 4096
#define HUGE_CHANGE    1e30 /* of something that was zero; finite, so that sums of it stay numbers */

static const rf_policy_def *const policies[] = {
    &rf_policy_interval, &rf_policy_teacache,   &rf_policy_easycache,  &rf_policy_magcache, &rf_policy_spectrum,
    &rf_policy_adacache, &rf_policy_worldcache, &rf_policy_fbcache,    &rf_policy_dbcache,  &rf_policy_deltacache,
    &rf_policy_fora,     &rf_policy_taylorseer, &rf_policy_hicache,    &rf_policy_speca,    &rf_policy_pab,
    &rf_policy_toca,     &rf_policy_duca,       &rf_policy_diffsparse, &rf_policy_replay,   &rf_policy_measure,
};

static const rf_policy_def *const row_policies[] = {
    &rf_policy_prefix, &rf_policy_dual,       &rf_policy_window,  &rf_policy_freecache,
    &rf_policy_dkv,    &rf_policy_dllm_cache, &rf_policy_elastic, &rf_policy_vicinity,
};

typedef struct {
    int64_t integer; /* INT, BOOL, CHOICE */
    double number;   /* DOUBLE */
    char *text;      /* TEXT, CHOICE; owned */
} option_value;

struct rf_policy {
    const rf_policy_def *def;
    option_value values[RF_POLICY_MAX_OPTIONS];
};

/* ---- names ---- */

int rf_policy_count(void) {
    return (int)(sizeof policies / sizeof policies[0]);
}

const rf_policy_def *rf_policy_at(int index) {
    return index >= 0 && index < rf_policy_count() ? policies[index] : NULL;
}

int rf_row_policy_count(void) {
    return (int)(sizeof row_policies / sizeof row_policies[0]);
}

const rf_policy_def *rf_row_policy_at(int index) {
    return index >= 0 && index < rf_row_policy_count() ? row_policies[index] : NULL;
}

const rf_policy_def *rf_policy_find(const char *name) {
    for (int i = 0; name && i < rf_policy_count(); i++) {
        if (strcmp(policies[i]->name, name) == 0) return policies[i];
    }
    for (int i = 0; name && i < rf_row_policy_count(); i++) {
        if (strcmp(row_policies[i]->name, name) == 0) return row_policies[i];
    }
    return NULL;
}

/* Cuts at the end of the buffer. */
static void append(char *list, size_t bytes, const char *word, size_t len) {
    size_t used = strlen(list);
    snprintf(list + used, bytes - used, "%s%.*s", used ? ", " : "", (int)len, word);
}

/* Of many words offered one after the other, the one that was meant. */
typedef struct {
    const char *word, *best;
    size_t word_len, best_len;
    int distance;
} nearest;

static nearest nearest_begin(const char *word, size_t len) {
    return (nearest){.word = word, .word_len = len, .distance = 1000};
}

static void nearest_offer(nearest *n, const char *candidate, size_t len) {
    bool starts = n->word_len >= 3 && n->word_len < len && strncmp(candidate, n->word, n->word_len) == 0;
    int distance = starts ? 1 : rf_text_distance(n->word, n->word_len, candidate, len);
    if (distance > 3 || (size_t)distance * 2 > n->word_len || distance >= n->distance) return;
    n->best = candidate;
    n->best_len = len;
    n->distance = distance;
}

static void nearest_say(const nearest *n, char *text, size_t bytes) {
    text[0] = 0;
    if (n->best) snprintf(text, bytes, "; did you mean '%.*s'?", (int)n->best_len, n->best);
}

/* ---- values ---- */

static rf_status bad_value(const rf_policy *p, const rf_policy_option *o, const char *value, const char *want,
                           rf_error *err) {
    return rf_fail(err, RF_ERR_ARGUMENT, "policy %s: %s='%.80s' is not %s", p->def->name, o->name, value, want);
}

static rf_status parse_int(const rf_policy *p, const rf_policy_option *o, const char *value, int64_t *out,
                           rf_error *err) {
    char want[96], *end = NULL;
    snprintf(want, sizeof want, "an integer in %.0f..%.0f", o->min, o->max);
    errno = 0;
    long long v = strtoll(value, &end, 10);
    if (end == value || *end || errno || !((double)v >= o->min && (double)v <= o->max)) {
        return bad_value(p, o, value, want, err);
    }
    *out = v;
    return RF_OK;
}

static rf_status parse_double(const rf_policy *p, const rf_policy_option *o, const char *value, double *out,
                              rf_error *err) {
    char want[96], *end = NULL;
    snprintf(want, sizeof want, "a number in %g..%g", o->min, o->max);
    double v = strtod(value, &end);
    if (end == value || *end || !(v >= o->min && v <= o->max)) return bad_value(p, o, value, want, err);
    *out = v == 0 ? 0 : v; /* no -0 */
    return RF_OK;
}

static rf_status parse_bool(const rf_policy *p, const rf_policy_option *o, const char *value, int64_t *out,
                            rf_error *err) {
    static const char *const words[2][4] = {{"false", "0", "no", "off"}, {"true", "1", "yes", "on"}};
    for (int yes = 0; yes < 2; yes++) {
        for (int i = 0; i < 4; i++) {
            if (strcmp(value, words[yes][i]) == 0) {
                *out = yes;
                return RF_OK;
            }
        }
    }
    return bad_value(p, o, value, "true or false", err);
}

static rf_status parse_choice(const rf_policy *p, const rf_policy_option *o, const char *value, int64_t *out,
                              rf_error *err) {
    size_t len = strlen(value);
    nearest near = nearest_begin(value, len);
    char list[256] = "", hint[96];
    int index = 0;
    for (const char *w = o->choices; *w; index++) {
        size_t w_len = strcspn(w, " ");
        if (w_len == len && memcmp(w, value, len) == 0) {
            *out = index;
            return RF_OK;
        }
        nearest_offer(&near, w, w_len);
        append(list, sizeof list, w, w_len);
        w += w_len;
        w += strspn(w, " ");
    }
    nearest_say(&near, hint, sizeof hint);
    return rf_fail(err, RF_ERR_ARGUMENT, "policy %s: %s='%.80s' is not one of %s%s", p->def->name, o->name, value, list,
                   hint);
}

static rf_status set_value(rf_policy *p, int index, const char *value, rf_error *err) {
    const rf_policy_option *o = &p->def->options[index];
    option_value v = {0};
    rf_status st = RF_OK;
    switch (o->type) {
    case RF_OPTION_INT: st = parse_int(p, o, value, &v.integer, err); break;
    case RF_OPTION_DOUBLE: st = parse_double(p, o, value, &v.number, err); break;
    case RF_OPTION_BOOL: st = parse_bool(p, o, value, &v.integer, err); break;
    case RF_OPTION_CHOICE: st = parse_choice(p, o, value, &v.integer, err); break;
    case RF_OPTION_TEXT:
        if (strlen(value) > MAX_VALUE_TEXT) {
            st = rf_fail(err, RF_ERR_ARGUMENT, "policy %s: %s is longer than %d bytes", p->def->name, o->name,
                         MAX_VALUE_TEXT);
        }
        break;
    }
    if (st != RF_OK) return st;
    if (o->type == RF_OPTION_TEXT || o->type == RF_OPTION_CHOICE) {
        v.text = rf_strdup(value);
        if (!v.text) return rf_fail(err, RF_ERR_MEMORY, "policy %s: no memory for %s", p->def->name, o->name);
    }
    rf_free(p->values[index].text);
    p->values[index] = v;
    return RF_OK;
}

static int find_option(const rf_policy *p, const char *key, size_t len) {
    for (int i = 0; i < p->def->num_options; i++) {
        const char *name = p->def->options[i].name;
        if (strlen(name) == len && memcmp(name, key, len) == 0) return i;
    }
    return -1;
}

static rf_status unknown_option(const rf_policy *p, const char *key, size_t len, rf_error *err) {
    nearest near = nearest_begin(key, len);
    char list[384] = "", hint[96];
    for (int i = 0; i < p->def->num_options; i++) {
        const char *name = p->def->options[i].name;
        nearest_offer(&near, name, strlen(name));
        append(list, sizeof list, name, strlen(name));
    }
    nearest_say(&near, hint, sizeof hint);
    return rf_fail(err, RF_ERR_ARGUMENT, "policy %s has no option '%.*s'%s (options: %s)", p->def->name,
                   (int)(len < 60 ? len : 60), key, hint, list[0] ? list : "none");
}

/* ---- life ---- */

/* Names of one family as a list, each offered as what was meant. */
static void list_names(const rf_policy_def *const *defs, int num, nearest *near, char *list, size_t bytes) {
    list[0] = 0;
    for (int i = 0; i < num; i++) {
        size_t len = strlen(defs[i]->name);
        nearest_offer(near, defs[i]->name, len);
        append(list, bytes, defs[i]->name, len);
    }
}

rf_status rf_policy_create(rf_policy **out, const char *name, rf_error *err) {
    *out = NULL;
    const rf_policy_def *def = rf_policy_find(name);
    if (!def) {
        nearest near = nearest_begin(name, strlen(name));
        char list[384], rows[128], hint[96];
        list_names(policies, rf_policy_count(), &near, list, sizeof list);
        list_names(row_policies, rf_row_policy_count(), &near, rows, sizeof rows);
        nearest_say(&near, hint, sizeof hint);
        return rf_fail(err, RF_ERR_ARGUMENT, "no policy '%.60s'%s (policies: %s) (row policies of text: %s)", name,
                       hint, list, rows);
    }
    if (def->num_options > RF_POLICY_MAX_OPTIONS) {
        return rf_fail(err, RF_ERR_STATE, "policy %s has %d options, at most %d are possible", def->name,
                       def->num_options, RF_POLICY_MAX_OPTIONS);
    }
    rf_policy *p = rf_alloc_zero(1, sizeof *p);
    if (!p) return rf_fail(err, RF_ERR_MEMORY, "policy %s: no memory", def->name);
    p->def = def;
    for (int i = 0; i < def->num_options; i++) {
        rf_status st = set_value(p, i, def->options[i].def, err);
        if (st != RF_OK) {
            rf_policy_destroy(p);
            return st;
        }
    }
    *out = p;
    return RF_OK;
}

static void free_values(rf_policy *policy) {
    for (int i = 0; i < RF_POLICY_MAX_OPTIONS; i++) rf_free(policy->values[i].text);
}

void rf_policy_destroy(rf_policy *policy) {
    if (!policy) return;
    free_values(policy);
    rf_free(policy);
}

rf_policy *rf_policy_clone(const rf_policy *policy) {
    rf_policy *copy = rf_alloc_zero(1, sizeof *copy);
    if (!copy) return NULL;
    *copy = *policy;
    bool whole = true;
    for (int i = 0; i < RF_POLICY_MAX_OPTIONS; i++) {
        const char *text = policy->values[i].text;
        copy->values[i].text = text ? rf_strdup(text) : NULL;
        whole &= !text || copy->values[i].text;
    }
    if (whole) return copy;
    rf_policy_destroy(copy);
    return NULL;
}

/* ---- setting ---- */

rf_status rf_policy_set_one(rf_policy *policy, const char *key, const char *value, rf_error *err) {
    size_t len = strlen(key);
    int index = find_option(policy, key, len);
    if (index < 0) return unknown_option(policy, key, len, err);
    return set_value(policy, index, value, err);
}

static char *trim(char *text) {
    while (isspace((unsigned char)*text)) text++;
    size_t len = strlen(text);
    while (len > 0 && isspace((unsigned char)text[len - 1])) text[--len] = 0;
    return text;
}

/* The end of a piece: the next comma whose right side is a "key=" again, or the end. */
static char *piece_end(const rf_policy *p, char *piece) {
    char *equals = piece + strcspn(piece, "=,");
    char *key = piece;
    while (isspace((unsigned char)*key)) key++;
    size_t len = (size_t)(equals - key);
    while (len > 0 && isspace((unsigned char)key[len - 1])) len--;
    int index = equals > key && *equals == '=' ? find_option(p, key, len) : -1;
    char *end = piece + strcspn(piece, ",");
    if (index < 0 || p->def->options[index].type != RF_OPTION_TEXT) return end;
    while (*end) {
        const char *next = end + 1;
        if (next[strcspn(next, ",=")] == '=') break;
        end += 1 + strcspn(next, ",");
    }
    return end;
}

static rf_status set_pieces(rf_policy *p, char *text, rf_error *err) {
    while (*text) {
        char *end = piece_end(p, text);
        bool more = *end == ',';
        *end = 0;
        char *piece = trim(text), *equals = strchr(piece, '=');
        if (!equals && *piece) {
            size_t len = strlen(piece);
            if (find_option(p, piece, len) < 0) return unknown_option(p, piece, len, err);
            return rf_fail(err, RF_ERR_ARGUMENT, "policy %s: option %s has no value (write %s=VALUE)", p->def->name,
                           piece, piece);
        }
        if (equals) {
            *equals = 0;
            rf_status st = rf_policy_set_one(p, trim(piece), trim(equals + 1), err);
            if (st != RF_OK) return st;
        }
        text = more ? end + 1 : end;
    }
    return RF_OK;
}

rf_status rf_policy_set(rf_policy *policy, const char *options, rf_error *err) {
    if (!options || !options[0]) return RF_OK;
    char *text = rf_strdup(options);
    rf_policy *changed = rf_policy_clone(policy);
    rf_status st = text && changed ? set_pieces(changed, text, err)
                                   : rf_fail(err, RF_ERR_MEMORY, "policy %s: no memory", policy->def->name);
    if (st == RF_OK) {
        rf_policy before = *policy;
        *policy = *changed;
        *changed = before;
    }
    rf_policy_destroy(changed);
    rf_free(text);
    return st;
}

/* ---- getting ---- */

const rf_policy_def *rf_policy_get_def(const rf_policy *policy) {
    return policy->def;
}

int64_t rf_policy_int(const rf_policy *policy, int option) {
    return policy->values[option].integer;
}

double rf_policy_double(const rf_policy *policy, int option) {
    return policy->values[option].number;
}

bool rf_policy_bool(const rf_policy *policy, int option) {
    return policy->values[option].integer != 0;
}

const char *rf_policy_text(const rf_policy *policy, int option) {
    return policy->values[option].text;
}

size_t rf_policy_value_text(const rf_policy *policy, int option, char *text, size_t text_bytes) {
    const option_value *v = &policy->values[option];
    int n = 0;
    switch (policy->def->options[option].type) {
    case RF_OPTION_INT: n = snprintf(text, text_bytes, "%lld", (long long)v->integer); break;
    case RF_OPTION_BOOL: n = snprintf(text, text_bytes, "%s", v->integer ? "true" : "false"); break;
    case RF_OPTION_CHOICE:
    case RF_OPTION_TEXT: n = snprintf(text, text_bytes, "%s", v->text); break;
    case RF_OPTION_DOUBLE: { /* the shortest that reads back to the same number */
        char number[40];
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(number, sizeof number, "%.*g", digits, v->number);
            if (strtod(number, NULL) == v->number) break;
        }
        n = snprintf(text, text_bytes, "%s", number);
        break;
    }
    }
    return n > 0 ? (size_t)n : 0;
}

/* Room left of a buffer after `used`, for snprintf. */
static size_t room(size_t bytes, size_t used) {
    return used < bytes ? bytes - used : 0;
}

size_t rf_policy_describe(const rf_policy *policy, char *text, size_t text_bytes) {
    size_t used = 0;
    if (text_bytes > 0) text[0] = 0;
    for (int i = 0; i < policy->def->num_options; i++) {
        size_t left = room(text_bytes, used);
        int n = snprintf(left ? text + used : NULL, left, "%s%s=", i ? "," : "", policy->def->options[i].name);
        used += n > 0 ? (size_t)n : 0;
        left = room(text_bytes, used);
        used += rf_policy_value_text(policy, i, left ? text + used : NULL, left);
    }
    return used;
}

/* ---- what policies share ---- */

rf_status rf_policy_refuse_stochastic(const rf_policy *policy, const rf_cache_shape *shape, rf_error *err) {
    if (!shape->stochastic || shape->force) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "%s needs a solver that adds no noise between steps, because it takes outputs of earlier steps for "
                   "those of later ones; %s adds noise (force runs it all the same)",
                   policy->def->name, shape->sampler ? shape->sampler : "this one");
}

rf_status rf_policy_refuse_few_steps(const rf_policy *policy, const rf_cache_shape *shape, int min_steps,
                                     rf_error *err) {
    if (shape->num_steps >= min_steps || shape->force) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "%s needs at least %d steps with these options, this run has %d (force runs it all the same)",
                   policy->def->name, min_steps, shape->num_steps);
}

double rf_ctx_rel1(const rf_step_ctx *ctx, rf_signal signal, int branch) {
    double change = ctx->signals[signal][branch][0], size = ctx->signals[signal][branch][1];
    if (change == 0 && size == 0) return 0;
    double rel = size > 0 ? change / size : HUGE_CHANGE;
    return rel <= HUGE_CHANGE ? rel : HUGE_CHANGE; /* and NaN */
}

double rf_ctx_max_rel1(const rf_step_ctx *ctx, rf_signal signal) {
    double most = 0;
    for (int b = 0; b < ctx->shape->branches; b++) {
        double rel = rf_ctx_rel1(ctx, signal, b);
        if (rel > most) most = rel;
    }
    return most;
}
