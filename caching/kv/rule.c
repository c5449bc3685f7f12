/* caching/kv/rule.c - rules to text and back, what goes together, and what a rule wants measured. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/kv/demote.h"
#include "caching/kv/kv_internal.h"
#include "core/text.h"

/* ---- keys ---- */

typedef struct {
    rf_policy_option option; /* def: of the plain rule */
    size_t offset;
} key;

#define CHOICE(name, field, def, choices, help)                                                                        \
    { {name, RF_OPTION_CHOICE, def, 0, 0, choices, help}, offsetof(rf_kv_rule, field) }
#define INT(name, field, def, low, high, help)                                                                         \
    { {name, RF_OPTION_INT, def, low, high, NULL, help}, offsetof(rf_kv_rule, field) }
#define REAL(name, field, def, low, high, help)                                                                        \
    { {name, RF_OPTION_DOUBLE, def, low, high, NULL, help}, offsetof(rf_kv_rule, field) }
#define FLAG(name, field, help)                                                                                        \
    { {name, RF_OPTION_BOOL, "false", 0, 1, NULL, help}, offsetof(rf_kv_rule, field) }

/* Enumerations are ints here, which they are for every compiler that this is built with. */
_Static_assert(sizeof(rf_kv_score) == sizeof(int) && sizeof(rf_kv_position) == sizeof(int), "enumerations are ints");

static const key keys[] = {
    CHOICE("score", score, "attention",
           "none position ladder random attention knorm keydiff expected gate recurrence tree",
           "what makes a token worth keeping"),
    CHOICE("queries", queries, "window", "all window last drafted pseudo probes external", "whose attention"),
    CHOICE("reduce", reduce, "mean", "sum mean decay max meanvar visible", "over those queries"),
    CHOICE("pool", pool, "none", "none avg max", "over neighbours"),
    INT("pool_size", pool_size, "5", 1, 63, "of pool; odd"),
    FLAG("pool_after_group", pool_after_group, "pool what the group has reduced"),
    CHOICE("group", group, "mean", "none mean sum max", "over the query heads of a key head"),
    CHOICE("heads", heads, "none", "none mean list", "over the heads of a layer"),
    CHOICE("value", value, "none", "none norm wo caote fastcaote obc-value obc-key obc-joint removal",
           "what values add"),
    CHOICE("alloc", alloc, "uniform", "uniform pyramid cake table flat-heads flat-all class",
           "budgets of layers and heads"),
    CHOICE("action", action, "drop", "drop merge merge-near merge-ems compensate demote select share",
           "what becomes of the rest"),
    CHOICE("schedule", schedule, "prefill", "prefill step every high", "when"),
    CHOICE("position", position, "original", "original cache delta", "positions of what is kept"),
    INT("sinks", sinks, "0", 0, 1048576, "first tokens that always stay"),
    INT("recents", recents, "0", -1, 1048576, "newest tokens that always stay; -1: half of the rest"),
    INT("window", window, "32", 1, 1048576, "queries of the window"),
    FLAG("open_window", open_window, "the window's own tokens may go"),
    FLAG("last", last, "the newest token always stays"),
    INT("block", block, "0", 0, 1048576, "tokens of a prompt between two choices; 0: one behind all"),
    INT("tsp_layer", tsp_layer, "-1", -1, 1023, "the last layer that all tokens pass; -1: half of them less one"),
    REAL("tsp_share", tsp_share, "0", 0, 1, "part of the prompt that later layers see, beside the window; 0, 1: all"),
    INT("skip_layers", skip_layers, "0", 0, 1024, "first layers that are left alone"),
    REAL("alpha", alpha, "0.95", 0, 1, "factor of reduce=decay"),
    REAL("gamma", gamma, "200", 0, 1e9, "of reduce=meanvar"),
    REAL("tau1", tau1, "1.6", 1e-3, 1e3, "of alloc=cake: entropy"),
    REAL("tau2", tau2, "0.4", 1e-3, 1e3, "of alloc=cake: variance"),
    REAL("floor", floor, "0.2", 0, 1, "part of a uniform budget that every head has"),
    INT("beta", beta, "20", 1, 1000000, "of alloc=pyramid"),
    INT("every", every, "32", 1, 1048576, "tokens, of schedule=every"),
    INT("buffer", buffer, "32", 1, 1048576, "tokens over the budget, of schedule=high"),
    INT("drafts", drafts, "8", 1, 1024, "of queries=drafted"),
    INT("pseudo", pseudo, "32", 1, 4096, "of queries=pseudo"),
    FLAG("with_window", with_window, "drafted: with as many of the prompt"),
    REAL("probe_recent", probe_recent, "0.05", 0, 1, "of queries=probes"),
    REAL("probe_random", probe_random, "0.05", 0, 1, "of queries=probes"),
    REAL("activation", activation, "0.0001", 0, 1, "of score=recurrence: p that counts"),
    INT("ladder_span", ladder_span, "0", 0, 1024, "of score=ladder: layers that a token lives in; 0: half of them"),
    INT("ladder_overlap", ladder_overlap, "0", 0, 1024, "of score=ladder"),
    INT("future", future, "512", 1, 1048576, "of score=expected: positions ahead"),
    INT("page", page, "16", 1, 4096, "of crush_share and of paged selection"),
    REAL("crush_share", crush_share, "0", 0, 0.99, "of the open budget, by signature (KVCrush)"),
    REAL("sentence_penalty", sentence_penalty, "0", 0, 1e9, "of sentences said again, x the cosine"),
    REAL("sentence_threshold", sentence_threshold, "0.95", -1, 1, "cosine from which on a sentence is said again"),
    REAL("redundancy", redundancy, "0", 0, 1, "weight of attention against likeness of keys; 0: attention alone"),
    INT("bits", bits, "4", 1, 16, "of action=demote: the better part"),
    INT("low_bits", low_bits, "2", 1, 16, "the rest"),
    INT("group_size", group_size, "32", 1, 4096, "elements that share a scale"),
    INT("residual", residual, "32", 0, 1048576, "newest tokens in full"),
    REAL("high_share", high_share, "0.5", 0, 1, "the better part; of action=share: what is not merged"),
    FLAG("fp8", fp8, "low_bits=8 is e4m3, not integers"),
    CHOICE("selector", selector, "vote", "vote pairs sentences pages", "of action=select: what is ranked"),
    INT("select", select, "256", 1, 1048576, "of action=select: tokens read (a budget counts init and local too)"),
    INT("init", init, "4", 0, 1048576, "first ones always read"),
    INT("local", local, "32", 0, 1048576, "newest ones always read"),
    INT("select_dims", select_dims, "32", 2, 4096, "of selector=pairs: elements of a key that are looked at"),
    INT("delimiter1", delimiters[0], "-1", -1, 2147483647, "of sentences: a token that ends one; -1: none"),
    INT("delimiter2", delimiters[1], "-1", -1, 2147483647, "another"),
    INT("delimiter3", delimiters[2], "-1", -1, 2147483647, "another"),
    INT("delimiter4", delimiters[3], "-1", -1, 2147483647, "another"),
    INT("seed", seed, "0", 0, 4294967295.0, "of score=random"),
};
#define NUM_KEYS ((int)(sizeof keys / sizeof keys[0]))

int rf_kv_num_keys(void) {
    return NUM_KEYS;
}
const rf_policy_option *rf_kv_key_at(int index) {
    return index >= 0 && index < NUM_KEYS ? &keys[index].option : NULL;
}

static bool is_seed(const key *k) {
    return k->offset == offsetof(rf_kv_rule, seed);
}

/* ": did you mean 'x'?" into text. */
static void near_name(char *text, size_t bytes, const char *name, const char *(*at)(int), int num) {
    const char *best = NULL;
    int distance = 4;
    for (int i = 0; i < num; i++) {
        const char *other = at(i);
        int d = rf_text_distance(name, strlen(name), other, strlen(other));
        if (strlen(name) >= 3 && strncmp(other, name, strlen(name)) == 0) d = 1;
        if (d < distance && (size_t)d * 2 <= strlen(name)) best = other, distance = d;
    }
    text[0] = 0;
    if (best) snprintf(text, bytes, "; did you mean '%s'?", best);
}
static const char *key_name(int i) {
    return keys[i].option.name;
}
static const char *method_name(int i) {
    return rf_kv_method_at(i)->name;
}

/* Index of word in a space-separated list, or -1. */
static int choice_of(const char *choices, const char *word) {
    size_t len = strlen(word);
    int index = 0;
    for (const char *at = choices; *at; index++) {
        size_t n = strcspn(at, " ");
        if (n == len && memcmp(at, word, n) == 0) return index;
        at += n;
        while (*at == ' ') at++;
    }
    return -1;
}
static void choice_name(const char *choices, int index, char *text, size_t bytes) {
    const char *at = choices;
    for (; index > 0; index--) {
        at += strcspn(at, " ");
        while (*at == ' ') at++;
    }
    snprintf(text, bytes, "%.*s", (int)strcspn(at, " "), at);
}

static rf_status bad(const key *k, const char *value, const char *wanted, rf_error *err) {
    return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: %s='%.60s' is not %s", k->option.name, value, wanted);
}

rf_status rf_kv_rule_set(rf_kv_rule *rule, const char *name, const char *value, rf_error *err) {
    const key *k = NULL;
    for (int i = 0; i < NUM_KEYS && !k; i++) {
        if (strcmp(keys[i].option.name, name) == 0) k = &keys[i];
    }
    if (!k) {
        char near[96];
        near_name(near, sizeof near, name, key_name, NUM_KEYS);
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: no option '%.60s'%s", name, near);
    }
    const rf_policy_option *o = &k->option;
    char *field = (char *)rule + k->offset, *end = NULL, wanted[256];
    switch (o->type) {
    case RF_OPTION_CHOICE: {
        const char *word = value;
        char head[8] = "";
        size_t digits = strcspn(value, "0123456789");
        if (k->offset == offsetof(rf_kv_rule, pool) && value[digits] && digits < sizeof head) { /* avg5 */
            memcpy(head, value, digits);
            head[digits] = 0;
            word = head;
        }
        int index = choice_of(o->choices, word);
        if (index < 0) {
            snprintf(wanted, sizeof wanted, "one of %s", o->choices);
            return bad(k, value, wanted, err);
        }
        if (word == head) RF_TRY(rf_kv_rule_set(rule, "pool_size", value + digits, err));
        memcpy(field, &index, sizeof index);
        return RF_OK;
    }
    case RF_OPTION_BOOL: {
        bool yes = strcmp(value, "true") == 0 || strcmp(value, "1") == 0 || strcmp(value, "yes") == 0 ||
                   strcmp(value, "on") == 0;
        bool no = strcmp(value, "false") == 0 || strcmp(value, "0") == 0 || strcmp(value, "no") == 0 ||
                  strcmp(value, "off") == 0;
        if (!yes && !no) return bad(k, value, "true or false", err);
        memcpy(field, &yes, sizeof yes);
        return RF_OK;
    }
    case RF_OPTION_INT: {
        snprintf(wanted, sizeof wanted, "an integer in %.0f..%.0f", o->min, o->max);
        errno = 0;
        long long v = strtoll(value, &end, 10);
        if (end == value || *end || errno || !((double)v >= o->min && (double)v <= o->max))
            return bad(k, value, wanted, err);
        if (is_seed(k)) {
            uint64_t seed = (uint64_t)v;
            memcpy(field, &seed, sizeof seed);
        } else {
            int32_t number = (int32_t)v;
            memcpy(field, &number, sizeof number);
        }
        return RF_OK;
    }
    default: {
        snprintf(wanted, sizeof wanted, "a number in %g..%g", o->min, o->max);
        double v = strtod(value, &end);
        if (end == value || *end || !(v >= o->min && v <= o->max)) return bad(k, value, wanted, err);
        memcpy(field, &v, sizeof v);
        return RF_OK;
    }
    }
}

static void value_text(const rf_kv_rule *rule, const key *k, char *text, size_t bytes) {
    const char *field = (const char *)rule + k->offset;
    int32_t integer = 0;
    switch (k->option.type) {
    case RF_OPTION_CHOICE:
        memcpy(&integer, field, sizeof integer);
        choice_name(k->option.choices, integer, text, bytes);
        break;
    case RF_OPTION_BOOL: {
        bool yes;
        memcpy(&yes, field, sizeof yes);
        snprintf(text, bytes, "%s", yes ? "true" : "false");
        break;
    }
    case RF_OPTION_INT:
        if (is_seed(k)) {
            snprintf(text, bytes, "%llu", (unsigned long long)rule->seed);
        } else {
            memcpy(&integer, field, sizeof integer);
            snprintf(text, bytes, "%d", integer);
        }
        break;
    default: { /* the shortest that reads back to the same number */
        double v;
        memcpy(&v, field, sizeof v);
        for (int digits = 1; digits <= 17; digits++) {
            snprintf(text, bytes, "%.*g", digits, v);
            if (strtod(text, NULL) == v) break;
        }
    }
    }
}

/* ---- rules ---- */

static rf_status set_parts(rf_kv_rule *rule, const char *parts, rf_error *err) {
    while (*parts) {
        char part[128];
        size_t len = strcspn(parts, ",");
        if (len >= sizeof part) return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: option '%.40s...' is too long", parts);
        memcpy(part, parts, len);
        part[len] = 0;
        parts += len + (parts[len] == ',');
        char *value = strchr(part, '=');
        if (!value) return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: expected key=value, found '%.60s'", part);
        *value++ = 0;
        RF_TRY(rf_kv_rule_set(rule, part, value, err));
    }
    return RF_OK;
}

rf_status rf_kv_rule_parse(rf_kv_rule *out, const char *spec, rf_error *err) {
    char name[64];
    size_t len = strcspn(spec, ":=,");
    rf_kv_rule rule = rf_kv_rule_plain();
    if (spec[len] == '=') {
        RF_TRY(set_parts(&rule, spec, err));
        *out = rule;
        return RF_OK;
    }
    if (spec[len] == ',')
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: options follow a name behind ':', found '%.60s'", spec);
    snprintf(name, sizeof name, "%.*s", (int)(len < 63 ? len : 63), spec);
    if (!rf_kv_method_find(&rule, name)) {
        char near[96];
        near_name(near, sizeof near, name, method_name, rf_kv_num_methods());
        return rf_fail(err, RF_ERR_ARGUMENT, "no KV policy '%s'%s (`refrain policies` lists them)", name, near);
    }
    if (spec[len] == ':') RF_TRY(set_parts(&rule, spec + len + 1, err));
    *out = rule;
    return RF_OK;
}

size_t rf_kv_rule_describe(const rf_kv_rule *rule, char *text, size_t text_bytes) {
    rf_kv_rule plain = rf_kv_rule_plain(), own = plain;
    if (rule->method[0]) (void)rf_kv_method_find(&own, rule->method);
    size_t used = 0;
    if (text_bytes > 0) text[0] = 0;
    for (int i = -1; i < NUM_KEYS; i++) {
        char value[64], other[64], named[64], part[160];
        if (i < 0) {
            if (!rule->method[0]) continue;
            snprintf(part, sizeof part, "%s", rule->method);
        } else {
            value_text(rule, &keys[i], value, sizeof value);
            value_text(&plain, &keys[i], other, sizeof other);
            value_text(&own, &keys[i], named, sizeof named);
            /* parts alone must have one; a name comes with its own defaults, which a value of the plain rule may undo */
            bool says = strcmp(value, other) != 0 || strcmp(value, named) != 0;
            if (!says && !(i == 0 && !rule->method[0])) continue;
            snprintf(part, sizeof part, "%s%s=%s",
                     used == 0                      ? ""
                     : used == strlen(rule->method) ? ":"
                                                    : ",",
                     keys[i].option.name, value);
        }
        size_t len = strlen(part);
        if (used + 1 < text_bytes) snprintf(text + used, text_bytes - used, "%s", part);
        used += len;
    }
    return used;
}

bool rf_kv_rule_thins(const rf_kv_rule *rule) {
    return rule->tsp_share > 0 && rule->tsp_share < 1;
}

static rf_status missing(const rf_kv_rule *rule, const char *what, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED, "KV policy %s: %s", rule->method[0] ? rule->method : "of parts", what);
}

static bool is_loss(rf_kv_value value) {
    return value >= RF_KV_VALUE_OBC_VALUE;
}
static bool is_caote(rf_kv_value value) {
    return value == RF_KV_VALUE_CAOTE || value == RF_KV_VALUE_FASTCAOTE;
}

static bool has_delimiters(const rf_kv_rule *r) {
    bool ends = false;
    for (int i = 0; i < RF_KV_DELIMITERS; i++) ends |= r->delimiters[i] >= 0;
    return ends;
}

static rf_status check_likeness(const rf_kv_rule *r, rf_error *err) {
    if (r->score != RF_KV_SCORE_ATTENTION || r->queries != RF_KV_QUERIES_WINDOW)
        return missing(r, "redundancy and sentence_penalty want the attention of a window", err);
    if (r->alloc != RF_KV_ALLOC_UNIFORM || r->action != RF_KV_DROP || r->value != RF_KV_VALUE_NONE ||
        r->heads != RF_KV_HEADS_NONE || r->crush_share > 0)
        return missing(r,
                       "redundancy and sentence_penalty go with alloc=uniform,action=drop,heads=none and without value "
                       "terms and crushing",
                       err);
    if (r->sentence_penalty <= 0) return RF_OK;
    if (r->schedule == RF_KV_AT_PREFILL)
        return missing(r, "sentences are known behind the prompt's last layer: sentence_penalty wants schedule=every",
                       err);
    if (!has_delimiters(r))
        return missing(r, "sentence_penalty wants token ids that end a sentence (delimiter1=ID)", err);
    return RF_OK;
}

static rf_status check_blocks(const rf_kv_rule *r, rf_error *err) {
    bool of_keys = r->score == RF_KV_SCORE_KNORM || r->score == RF_KV_SCORE_KEYDIFF;
    bool attention =
        r->score == RF_KV_SCORE_ATTENTION && (r->queries == RF_KV_QUERIES_EXTERNAL ||
                                              r->queries == RF_KV_QUERIES_WINDOW || r->queries == RF_KV_QUERIES_LAST);
    if (r->block == 0) return missing(r, "queries=external wants block=TOKENS", err);
    if (!of_keys && !attention)
        return missing(r, "block wants score=knorm, keydiff or attention of queries=external, window or last", err);
    if (r->schedule != RF_KV_AT_PREFILL || r->action != RF_KV_DROP || r->position != RF_KV_POSITION_ORIGINAL ||
        (r->alloc != RF_KV_ALLOC_UNIFORM && r->alloc != RF_KV_ALLOC_TABLE) || r->crush_share > 0 || rf_kv_rule_thins(r))
        return missing(r,
                       "block goes with schedule=prefill,action=drop,position=original,alloc=uniform or table and "
                       "without tsp_share and crushing",
                       err);
    return RF_OK;
}

static rf_status check_select(const rf_kv_rule *r, rf_error *err) {
    if (r->position != RF_KV_POSITION_ORIGINAL)
        return missing(r, "action=select reads keys as they are turned: position=original", err);
    if (r->alloc != RF_KV_ALLOC_UNIFORM || r->crush_share > 0 || r->value != RF_KV_VALUE_NONE ||
        r->sentence_penalty > 0 || r->redundancy > 0)
        return missing(r, "action=select goes with alloc=uniform and without value terms, crushing and penalties", err);
    if (r->selector != RF_KV_BY_SENTENCES) return RF_OK;
    if (!has_delimiters(r))
        return missing(r, "selector=sentences wants token ids that end a sentence (delimiter1=ID)", err);
    if (r->score != RF_KV_SCORE_ATTENTION || r->queries != RF_KV_QUERIES_WINDOW || r->group == RF_KV_OVER_NONE ||
        r->reduce == RF_KV_REDUCE_DECAY)
        return missing(r, "selector=sentences wants the attention of a window (score=attention,queries=window)", err);
    if (r->pool != RF_KV_POOL_NONE && r->pool_size % 2 == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: pool_size=%d is not odd", r->pool_size);
    return RF_OK;
}

rf_status rf_kv_rule_check(const rf_kv_rule *r, rf_error *err) {
    bool attention = r->score == RF_KV_SCORE_ATTENTION, learned = r->score == RF_KV_SCORE_GATE;
    if (r->block > 0 || (attention && r->queries == RF_KV_QUERIES_EXTERNAL)) RF_TRY(check_blocks(r, err));
    if (strcmp(r->method, "attention-gate") == 0)
        return missing(r, "flags before attention change the prompt's own computation: not offered", err);
    if (rf_kv_rule_thins(r) && (!attention || r->queries != RF_KV_QUERIES_WINDOW || r->schedule != RF_KV_AT_PREFILL ||
                                r->action != RF_KV_DROP || r->alloc != RF_KV_ALLOC_UNIFORM ||
                                r->position != RF_KV_POSITION_ORIGINAL || r->crush_share > 0))
        return missing(r,
                       "tsp_share wants the attention of a window (score=attention,queries=window) and "
                       "schedule=prefill,action=drop,alloc=uniform,position=original",
                       err);
    if (r->heads == RF_KV_HEADS_LIST && (!attention || r->schedule != RF_KV_AT_PREFILL))
        return missing(r, "heads=list wants score=attention,schedule=prefill", err);
    if (r->action == RF_KV_COMPENSATE && (r->schedule != RF_KV_AT_PREFILL || r->position != RF_KV_POSITION_ORIGINAL ||
                                          r->alloc == RF_KV_ALLOC_CAKE || r->alloc == RF_KV_ALLOC_FLAT_ALL))
        return missing(
            r, "action=compensate wants schedule=prefill,position=original and a budget known with each layer", err);
    if (rf_kv_packs(r)) return rf_kv_demote_check(r, err);
    if (r->action == RF_KV_SELECT) return check_select(r, err);
    if (r->sentence_penalty > 0 || r->redundancy > 0) RF_TRY(check_likeness(r, err));
    if (r->position == RF_KV_POSITION_DELTA && r->schedule != RF_KV_AT_PREFILL)
        return missing(r, "position=delta goes with schedule=prefill (while decoding: position=cache)", err);
    if (r->pool != RF_KV_POOL_NONE && r->pool_size % 2 == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy: pool_size=%d is not odd", r->pool_size);
    if (r->alloc == RF_KV_ALLOC_CAKE && !(attention && r->queries == RF_KV_QUERIES_WINDOW))
        return missing(r, "alloc=cake wants the attention of a window (score=attention,queries=window)", err);
    if (r->crush_share > 0 && !attention) return missing(r, "crush_share wants score=attention", err);
    if ((r->value == RF_KV_VALUE_WO || is_loss(r->value) || is_caote(r->value)) && !attention)
        return missing(r, "this value term wants score=attention", err);
    if (r->value == RF_KV_VALUE_NORM && !attention && r->score != RF_KV_SCORE_EXPECTED)
        return missing(r, "value=norm wants scores that are not below 0 (score=attention, score=expected)", err);
    bool of_keys = r->score == RF_KV_SCORE_KNORM || r->score == RF_KV_SCORE_KEYDIFF ||
                   r->score == RF_KV_SCORE_EXPECTED || r->score == RF_KV_SCORE_RANDOM || learned;
    if (of_keys && r->heads != RF_KV_HEADS_NONE)
        return missing(r, "heads=mean wants attention: this score is of each key head", err);
    if (of_keys && r->pool != RF_KV_POOL_NONE) return missing(r, "pool wants score=attention", err);
    if (attention && r->group == RF_KV_OVER_NONE)
        return missing(r, "group=none would keep a set for each query head: caches are of key heads", err);
    bool own_values = r->value == RF_KV_VALUE_NORM || r->value == RF_KV_VALUE_WO ||
                      (is_caote(r->value) && r->queries == RF_KV_QUERIES_ALL && r->schedule != RF_KV_AT_PREFILL);
    if (r->heads != RF_KV_HEADS_NONE && own_values)
        return missing(
            r, "heads=mean and heads=list give all heads of a layer one set: this value term is each head's own", err);
    if ((r->value == RF_KV_VALUE_WO || r->score == RF_KV_SCORE_EXPECTED) && r->schedule != RF_KV_AT_PREFILL)
        return missing(r, "this score is of a prompt: schedule=prefill", err);
    bool structured =
        r->score == RF_KV_SCORE_POSITION || r->score == RF_KV_SCORE_LADDER || r->score == RF_KV_SCORE_TREE;
    bool by_position = r->score == RF_KV_SCORE_POSITION;
    if (structured && r->alloc != RF_KV_ALLOC_UNIFORM &&
        !(by_position && (r->alloc == RF_KV_ALLOC_CLASS || r->alloc == RF_KV_ALLOC_TABLE)))
        return missing(r, "this score goes with alloc=uniform (score=position: also table, class)", err);
    if ((r->score == RF_KV_SCORE_LADDER || r->score == RF_KV_SCORE_TREE) && r->schedule != RF_KV_AT_STEP)
        return missing(r, "this score goes with schedule=step", err);
    if (r->heads != RF_KV_HEADS_NONE && (r->alloc == RF_KV_ALLOC_FLAT_HEADS || r->alloc == RF_KV_ALLOC_FLAT_ALL))
        return missing(r, "heads=mean and heads=list give all heads of a layer one set: alloc=flat-* would tear it",
                       err);
    if (r->reduce == RF_KV_REDUCE_DECAY && attention && r->queries != RF_KV_QUERIES_ALL)
        return missing(r, "reduce=decay wants queries=all", err);
    return RF_OK;
}

/* ---- what is measured ---- */

static unsigned of_score(const rf_kv_rule *r) {
    switch (r->score) {
    case RF_KV_SCORE_KNORM: return RF_KV_NEED_KEY_NORM;
    case RF_KV_SCORE_KEYDIFF: return RF_KV_NEED_KEY_COSINE;
    case RF_KV_SCORE_EXPECTED: return RF_KV_NEED_EXPECTED;
    case RF_KV_SCORE_GATE: return RF_KV_NEED_GATE;
    case RF_KV_SCORE_TREE: return RF_KV_NEED_SUM;
    default: return 0;
    }
}

static bool merges(const rf_kv_rule *r) {
    return r->action == RF_KV_MERGE || r->action == RF_KV_MERGE_EMS;
}

unsigned rf_kv_needs_prefill(const rf_kv_rule *r) {
    unsigned needs = of_score(r);
    if (r->score == RF_KV_SCORE_NONE) return 0;
    if (r->action == RF_KV_SELECT && r->selector != RF_KV_BY_SENTENCES) return 0;
    if (r->score == RF_KV_SCORE_RECURRENCE) needs |= RF_KV_NEED_PEAK;
    if (r->score == RF_KV_SCORE_ATTENTION) {
        if (is_loss(r->value))
            needs |= RF_KV_NEED_REMOVAL;
        else if (r->reduce == RF_KV_REDUCE_MAX)
            needs |= RF_KV_NEED_PEAK;
        else
            needs |= r->reduce == RF_KV_REDUCE_MEANVAR ? RF_KV_NEED_SUM | RF_KV_NEED_SQUARES : RF_KV_NEED_SUM;
        if (is_caote(r->value)) needs |= RF_KV_NEED_KV;
        if (r->value == RF_KV_VALUE_WO) needs |= RF_KV_NEED_WO;
    }
    if (r->value == RF_KV_VALUE_NORM) needs |= RF_KV_NEED_VALUE_NORM;
    if (r->action == RF_KV_SHARE) return 0;
    if (r->alloc == RF_KV_ALLOC_CAKE) needs |= RF_KV_NEED_SUM | RF_KV_NEED_SQUARES | RF_KV_NEED_ENTROPY;
    if (merges(r) || r->redundancy > 0) needs |= RF_KV_NEED_KV;
    if (r->sentence_penalty > 0) needs |= RF_KV_NEED_HIDDEN;
    return needs;
}

unsigned rf_kv_needs_step(const rf_kv_rule *r) {
    if (r->schedule == RF_KV_AT_PREFILL || r->score == RF_KV_SCORE_NONE || r->action == RF_KV_SELECT) return 0;
    unsigned needs = of_score(r);
    if (r->score == RF_KV_SCORE_RECURRENCE) needs |= RF_KV_NEED_SUM;
    if (r->score == RF_KV_SCORE_ATTENTION) {
        /* CAOTE: over sums that go on, by the values of now; else the newest query's own error, which is exact */
        bool newest = is_caote(r->value) && r->queries != RF_KV_QUERIES_ALL;
        needs |= is_loss(r->value) || newest ? RF_KV_NEED_REMOVAL : RF_KV_NEED_SUM;
        if (is_caote(r->value) && !newest) needs |= RF_KV_NEED_KV;
    }
    if (r->value == RF_KV_VALUE_NORM) needs |= RF_KV_NEED_VALUE_NORM;
    if (merges(r) || r->redundancy > 0) needs |= RF_KV_NEED_KV;
    if (r->sentence_penalty > 0) needs |= RF_KV_NEED_HIDDEN;
    return needs;
}
