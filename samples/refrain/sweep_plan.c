/* samples/refrain/sweep_plan.c - parsing of settings, and the two tables that belong to it: what "all" stands for and
 * which option of a policy a search turns. A unit test holds both tables against the policies' own. */
#include "samples/refrain/sweep_plan.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/text_args.h"

#define MAX_VALUES       1000 /* of one option */
#define VALUE_BYTES      512
#define AUTO_STEP_COUNTS 10

/* --- the built-in list -------------------------------------------------------------------------------------------- */

/* About four settings a policy, mild to aggressive at 50 steps. Not in it: `replay`, which needs a file, and
 * `measure`, which never skips. */
static const char *const builtin[] = {
    "interval:interval=2,3,4,6",
    "interval:interval=3,5;order=1;first=3",
    "interval:interval=4,6;order=2;first=3;predictor=newton",
    "teacache:threshold=0.02,0.05,0.1,0.2",
    "easycache:threshold=0.005,0.01,0.025,0.05",
    "magcache:threshold=0.03,0.06,0.12,0.24",
    "magcache:threshold=0.24;max_skips=8;retain=0.1",
    "spectrum:flex=0.1,0.3,0.75,3",
    "spectrum:level=output;flex=0.3",
    "adacache:codebook=slow|fast|0.08:2/1:1|long",
    "worldcache:max_skips=2;threshold=0.05,0.2",
    "worldcache:max_skips=4;threshold=0.5",
    "worldcache:max_skips=6;threshold=0.5,2",
    "worldcache:max_skips=2,4;threshold=0.5;floor=1",
    "fbcache:threshold=0.02,0.05,0.1,0.2",
    "dbcache:fn=1;threshold=0.04,0.08,0.15",
    "dbcache:fn=2;bn=1;threshold=0.15",
    "dbcache:threshold=0.1,0.3;max_continuous=6;calibrator=taylor",
    "deltacache:interval=2;fraction=0.5,0.75,0.9",
    "deltacache:interval=3,5;fraction=0.9",
    "fora:interval=2,3,4,6",
    "taylorseer:mode=parts;interval=2,3,4,5",
    "taylorseer:mode=last;interval=3,4,6;order=1",
    "taylorseer:mode=last;interval=4,5,6;order=2;predictor=newton",
    "hicache:mode=parts;interval=3,5;sigma=0.5",
    "hicache:mode=last;interval=3,4,6;sigma=0.5",
    "speca:base=0.03,0.1,0.3;order=2",
    "speca:base=1;max=8;order=1",
    "pab:self=2,4",
    "pab:self=3;mlp=2;lo=0;hi=1000",
    "pab:self=6;mlp=4;lo=0;hi=1000",
    "toca:interval=2,3,5",
    "toca:interval=3;ratio=0.3;attention=rows",
    "duca:interval=2,3,4,6",
    "diffsparse:budget=0.7,0.5,0.35,0.25",
    "diffsparse:budget=0.5;table=uniform",
};

const char *sweep_builtin_spec(int index) {
    return index >= 0 && (size_t)index < sizeof builtin / sizeof builtin[0] ? builtin[index] : NULL;
}

/* Of worlds, at ten steps a frame: every policy still, but warm-ups of two or three steps, and skips of three at most but
 * where a policy decides. The plain run first: it is what published speed-ups are against. */
static const char *const builtin_world[] = {
    "none:context=off",
    "none",
    "interval:interval=2,3,5",
    "interval:interval=2,3,4;order=1;first=2",
    "interval:interval=2,3;order=2;first=3;predictor=newton",
    "interval:interval=2,3;order=1;first=2;level=hidden",
    "teacache:threshold=0.15,0.3,0.5,1",
    "easycache:threshold=0.2,0.4,0.8;first=2",
    "magcache:threshold=0.06,0.12,0.24",
    "spectrum:first=3;span=0;degree=2;flex=0,0.5",
    "spectrum:first=3;span=0;degree=2;level=output",
    "adacache:codebook=slow|fast|0.3:2/1:1",
    "worldcache:warmup=3;max_skips=1;threshold=0.2,2",
    "worldcache:warmup=3;max_skips=2;threshold=0.2,0.5,2",
    "worldcache:warmup=3;max_skips=4;threshold=0.5,2,8",
    "worldcache:warmup=3;max_skips=2,3;skip=interval",
    "fbcache:threshold=0.15,0.3,0.6",
    "dbcache:warmup=2;threshold=0.15,0.3,0.6",
    "dbcache:warmup=2;threshold=0.3,0.6;calibrator=taylor",
    "deltacache:interval=2;fraction=0.5,0.75,0.9",
    "deltacache:interval=3;fraction=0.9",
    "fora:interval=2,3,4",
    "taylorseer:mode=parts;interval=2,3,4",
    "taylorseer:mode=last;interval=2,3,4;order=1",
    "taylorseer:mode=last;interval=2,3;order=2;first=3;predictor=newton",
    "hicache:mode=parts;interval=2,3",
    "hicache:mode=last;interval=2,3,4",
    "speca:first=2;order=1;min=1;base=0.05",
    "speca:first=2;order=1;base=0.05,0.5",
    "pab:self=2;temporal=2,4;lo=0;hi=1000",
    "pab:self=2;temporal=3;mlp=2;lo=0;hi=1000",
    "pab:self=3;temporal=3;mlp=3;lo=0;hi=1000",
    "toca:interval=2,3",
    "toca:interval=3;ratio=0.3;attention=rows",
    "duca:interval=2,3,4",
    "diffsparse:table=uniform;budget=0.7,0.5,0.35",
    /* a frame that begins with the last one's features */
    "interval:interval=3;carry=first,last",
    "fora:interval=4;carry=first,last",
    "worldcache:warmup=3;max_skips=4;threshold=2;carry=first,last",
    "fbcache:threshold=0.3;carry=first,last",
    "taylorseer:mode=last;interval=3;order=1;carry=first",
    /* without exact reuse: where published figures come from */
    "interval:interval=3;order=1;first=2;context=off",
    "worldcache:warmup=3;max_skips=2;threshold=2;context=off",
};

/* Where frames leave the window. */
static const char *const builtin_slides[] = {
    "none:context=keep,sinks",
    "interval:interval=3;order=1;first=2;context=keep",
    "worldcache:warmup=3;max_skips=2;threshold=2;context=keep",
};

/* Of text: each row policy with one token a pass and with the two commit rules that most papers pair them with, then its own knob; the
 * commit rules alone, which are not caching. */
static const char *const builtin_text[] = {
    "none",
    "none+commit=threshold+threshold=0.8,0.9,0.95",
    "none+commit=factor+factor=0.5,1",
    "none+commit=entropy-bound+entropy-bound=0.001,0.1",
    "prefix",
    "prefix+commit=threshold",
    "dual",
    "dual+commit=threshold+threshold=0.8,0.9,0.95",
    "dual+commit=factor",
    "dual+attention-reuse=flashblock",
    "vicinity",
    "vicinity+commit=threshold",
    "window:refresh=8,16,32",
    "window:refresh=8,32+commit=threshold",
    "freecache",
    "freecache+commit=threshold",
    "dkv",
    "dkv+commit=threshold",
    "dllm-cache",
    "dllm-cache+commit=threshold",
    "elastic:threshold=0.8,0.9,0.95",
    "elastic:threshold=0.9+commit=threshold",
};

/* Of block-causal models: finished blocks are exact, rows of the block are what there is to choose. */
static const char *const builtin_blocks[] = {
    "none",
    "none+commit=threshold+threshold=0.8,0.9,0.95",
    "none+commit=factor+factor=0.5,1",
    "none+commit=entropy-bound+entropy-bound=0.001,0.1",
    "none+attention-reuse=flashblock+reuse-refresh=1,2,4",
    "none+attention-reuse=flashblock+reuse-refresh=2,8+reuse-refresh-rows=true",
    "none+attention-reuse=flashblock+commit=threshold",
};

const char *sweep_builtin_text_spec(int index, bool block_causal) {
    int num = (int)(block_causal ? sizeof builtin_blocks / sizeof builtin_blocks[0]
                                 : sizeof builtin_text / sizeof builtin_text[0]);
    if (index < 0 || index >= num) return NULL;
    return block_causal ? builtin_blocks[index] : builtin_text[index];
}

#define NUM_WORLD  (int)(sizeof builtin_world / sizeof builtin_world[0])
#define NUM_SLIDES (int)(sizeof builtin_slides / sizeof builtin_slides[0])

const char *sweep_builtin_world_spec(int index, bool slides) {
    if (index < 0 || index >= NUM_WORLD + (slides ? NUM_SLIDES : 0)) return NULL;
    return index < NUM_WORLD ? builtin_world[index] : builtin_slides[index - NUM_WORLD];
}

typedef struct {
    const char *policy;
    sweep_range range;
} main_option;

/* Ranges for searches: from a value that keeps nearly everything to one that few would want. */
static const main_option main_options[] = {
    {"interval", {"interval", true, 1, 12}},       {"teacache", {"threshold", false, 0.01, 3}},
    {"easycache", {"threshold", false, 0.003, 1}}, {"magcache", {"threshold", false, 0.005, 1}},
    {"spectrum", {"flex", false, 0.05, 6}},        {"worldcache", {"threshold", false, 0.005, 20}},
    {"fbcache", {"threshold", false, 0.01, 2}},    {"dbcache", {"threshold", false, 0.01, 0.99}},
    {"deltacache", {"interval", true, 1, 12}},     {"fora", {"interval", true, 1, 12}},
    {"taylorseer", {"interval", true, 1, 12}},     {"hicache", {"interval", true, 1, 12}},
    {"speca", {"base", false, 0.01, 10}},          {"pab", {"self", true, 1, 12}},
    {"toca", {"interval", true, 1, 12}},           {"duca", {"interval", true, 1, 12}},
    {"diffsparse", {"budget", false, 1, 0.1}},
};

bool sweep_main_option(const char *policy, sweep_range *out) {
    for (size_t i = 0; i < sizeof main_options / sizeof main_options[0]; i++) {
        if (strcmp(main_options[i].policy, policy) != 0) continue;
        *out = main_options[i].range;
        return true;
    }
    return false;
}

/* --- lists -------------------------------------------------------------------------------------------------------- */

void sweep_plan_free(sweep_plan *plan) {
    for (int i = 0; i < plan->num; i++) {
        sweep_setting *s = &plan->items[i];
        rf_free(s->policy);
        rf_free(s->options);
        rf_free(s->key);
        rf_free(s->decode);
        rf_policy_destroy(s->object);
    }
    rf_free(plan->items);
    memset(plan, 0, sizeof *plan);
}

int sweep_plan_find(const sweep_plan *plan, const char *key) {
    for (int i = 0; i < plan->num; i++) {
        if (strcmp(plan->items[i].key, key) == 0) return i;
    }
    return -1;
}

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "no memory for the list of settings");
}

static const char *const carries[] = {"off", "first", "last"};
static const char *const contexts[] = {"rebuild", "keep", "sinks", "off"};

/* "NAME:all options" and what a world's setting says besides, if it does; "steps:N". rf_free. */
static char *key_of(const sweep_setting *s) {
    char more[64];
    if (s->kv) { /* nothing else is resolved */
        size_t num = strlen(s->policy) + strlen(s->options) + 2;
        char *text = rf_alloc(num);
        if (text) snprintf(text, num, "%s:%s", s->policy, s->options);
        return text;
    }
    size_t describe = s->object ? rf_policy_describe(s->object, NULL, 0) : 0, len = strlen(s->policy), used = 0;
    more[0] = 0;
    if (s->num_steps > 0) used += (size_t)snprintf(more, sizeof more, "%d", s->num_steps);
    if (s->carry != RF_CARRY_OFF)
        used += (size_t)snprintf(more + used, sizeof more - used, ";carry=%s", carries[s->carry]);
    if (s->context != SWEEP_CONTEXT_GIVEN)
        snprintf(more + used, sizeof more - used, "%scontext=%s", s->object ? ";" : "", contexts[s->context]);
    const char *decode = s->decode ? s->decode : "";
    size_t room = len + describe + strlen(more) + strlen(decode) + 3;
    char *key = rf_alloc(room);
    if (!key) return NULL;
    memcpy(key, s->policy, len);
    key[len] = ':';
    key[len + 1] = 0;
    if (s->object) rf_policy_describe(s->object, key + len + 1, describe + 1);
    snprintf(key + len + 1 + describe, room - len - 1 - describe, "%s%s%s", more, decode[0] ? "+" : "", decode);
    return key;
}

/* Takes s.object and s.decode; makes the texts. A setting that is there already is dropped. */
static rf_status append(sweep_plan *plan, sweep_setting s, const char *name, const char *options, rf_error *err) {
    rf_policy *object = s.object;
    s.policy = rf_strdup(name);
    s.options = rf_strdup(options);
    s.key = s.policy && s.options ? key_of(&s) : NULL;
    rf_status st = s.policy && s.options && s.key ? RF_OK : no_memory(err);
    bool known = st == RF_OK && sweep_plan_find(plan, s.key) >= 0;
    if (st == RF_OK && !known && plan->num == SWEEP_MAX_SETTINGS)
        st = rf_fail(err, RF_ERR_ARGUMENT, "more than %d settings", SWEEP_MAX_SETTINGS);
    if (st == RF_OK && !known && plan->num == plan->room) {
        int room = plan->room ? 2 * plan->room : 64;
        sweep_setting *items = rf_realloc(plan->items, (size_t)room * sizeof *items);
        if (items) {
            plan->items = items;
            plan->room = room;
        } else {
            st = no_memory(err);
        }
    }
    if (st == RF_OK && !known) {
        bool first = !s.object && s.context == SWEEP_CONTEXT_OFF;
        if (first) memmove(plan->items + 1, plan->items, (size_t)plan->num * sizeof *plan->items);
        plan->items[first ? 0 : plan->num] = s;
        plan->num++;
        return RF_OK;
    }
    rf_free(s.policy);
    rf_free(s.options);
    rf_free(s.key);
    rf_free(s.decode);
    rf_policy_destroy(object);
    return st;
}

/* --- values ------------------------------------------------------------------------------------------------------- */

/* A piece of a spec; `at` is where it begins, for messages. */
typedef struct {
    const char *spec;
    size_t at, len;
} piece;

static rf_status bad(const piece *p, rf_error *err, const char *what) {
    return rf_fail(err, RF_ERR_ARGUMENT, "--policy '%s', character %zu: %s, found '%.*s'", p->spec, p->at + 1, what,
                   (int)p->len, p->spec + p->at);
}

typedef struct {
    char *values[MAX_VALUES];
    int num;
} value_list;

static void free_values(value_list *list) {
    for (int i = 0; i < list->num; i++) rf_free(list->values[i]);
    list->num = 0;
}

static rf_status add_value(value_list *list, const piece *p, const char *text, rf_error *err) {
    for (int i = 0; i < list->num; i++) {
        if (strcmp(list->values[i], text) == 0) return RF_OK;
    }
    if (list->num == MAX_VALUES) return bad(p, err, "expected at most 1000 values of an option");
    char *copy = rf_strdup(text);
    if (!copy) return no_memory(err);
    list->values[list->num++] = copy;
    return RF_OK;
}

/* The whole of text is a finite number. */
static bool read_number(const char *text, size_t len, double *out) {
    char copy[64], *end = NULL;
    if (len == 0 || len >= sizeof copy || isspace((unsigned char)text[0])) return false;
    memcpy(copy, text, len);
    copy[len] = 0;
    *out = strtod(copy, &end);
    return *end == 0 && isfinite(*out);
}

/* A..B, A..B/N or A..B/Ng as numbers; num 0 = not given. */
typedef struct {
    double from, to;
    int num;
    bool geometric;
} number_range;

static rf_status read_range(const piece *p, size_t dots, number_range *out, rf_error *err) {
    const char *text = p->spec + p->at;
    const char *slash = memchr(text, '/', p->len);
    size_t end = slash ? (size_t)(slash - text) : p->len;
    memset(out, 0, sizeof *out);
    if (dots + 2 > end || !read_number(text, dots, &out->from) ||
        !read_number(text + dots + 2, end - dots - 2, &out->to))
        return bad(p, err, "expected a range A..B/N of numbers");
    if (slash) {
        double num;
        size_t len = p->len - end - 1;
        out->geometric = len > 1 && slash[len] == 'g';
        if (!read_number(slash + 1, len - out->geometric, &num) || num != floor(num) || num < 1 || num > MAX_VALUES)
            return bad(p, err, "expected /N or /Ng with N in 1..1000");
        out->num = (int)num;
    }
    if (out->geometric && !(out->from > 0 && out->to > 0)) return bad(p, err, "a geometric range needs ends above 0");
    return RF_OK;
}

static rf_status add_range(value_list *list, const piece *p, size_t dots, bool whole, rf_error *err) {
    number_range r;
    rf_status st = read_range(p, dots, &r, err);
    if (st != RF_OK) return st;
    if (r.num == 0 && !whole) return bad(p, err, "a range of numbers that are not whole needs /N");
    if (r.num == 0 && fabs(r.to - r.from) >= MAX_VALUES)
        return bad(p, err, "expected at most 1000 values of an option");
    if (r.num == 0) r.num = (int)fabs(r.to - r.from) + 1;
    for (int i = 0; i < r.num && st == RF_OK; i++) {
        double x = r.num > 1 ? (double)i / (r.num - 1) : 0;
        double v = r.geometric ? r.from * pow(r.to / r.from, x) : r.from + (r.to - r.from) * x;
        char text[64];
        snprintf(text, sizeof text, whole ? "%.0f" : "%.6g", whole ? nearbyint(v) : v);
        st = add_value(list, p, text, err);
    }
    return st;
}

static rf_status read_values(value_list *list, const piece *p, rf_option_type type, rf_error *err) {
    char separator = type == RF_OPTION_TEXT ? '|' : ',';
    rf_status st = RF_OK;
    for (size_t at = p->at, end = p->at + p->len; st == RF_OK;) {
        const char *stop = memchr(p->spec + at, separator, end - at);
        piece item = {p->spec, at, stop ? (size_t)(stop - p->spec) - at : end - at};
        size_t dots = 0;
        while (dots + 1 < item.len && memcmp(p->spec + at + dots, "..", 2) != 0) dots++;
        bool number = type == RF_OPTION_INT || type == RF_OPTION_DOUBLE;
        if (item.len == 0) {
            st = bad(&item, err, "expected a value");
        } else if (item.len >= VALUE_BYTES) {
            st = bad(&item, err, "the value is too long");
        } else if (number && dots + 1 < item.len) {
            st = add_range(list, &item, dots, type == RF_OPTION_INT, err);
        } else {
            char text[VALUE_BYTES];
            memcpy(text, p->spec + at, item.len);
            text[item.len] = 0;
            st = add_value(list, &item, text, err);
        }
        if (!stop) break;
        at += item.len + 1;
    }
    return st;
}

/* --- specs -------------------------------------------------------------------------------------------------------- */

typedef struct {
    const rf_policy_option *option;
    piece where;
    value_list values;
} axis;

#define MAX_AXES (RF_POLICY_MAX_OPTIONS + 2 + TEXT_MAX_SETTINGS)

typedef enum { OF_IMAGES = 0, OF_WORLDS, OF_TEXT } spec_kind;

typedef struct {
    const char *spec, *name;
    const rf_policy_def *def; /* NULL: no policy */
    rf_policy *base;          /* all defaults; NULL likewise */
    axis *axes;               /* [MAX_AXES] */
    int num_axes;
    spec_kind kind;
} parsed_spec;

enum { CARRY = 0, CONTEXT };
static const rf_policy_option world_options[] = {
    [CARRY] = {"carry", RF_OPTION_CHOICE, "off", 0, 0, "off first last", "what a frame starts with"},
    [CONTEXT] = {"context", RF_OPTION_CHOICE, "rebuild", 0, 0, "rebuild keep sinks off", "what becomes of old frames"},
};

/* Place of text among num names, -1 = none. */
static int find_name(const char *const *names, int num, const char *text) {
    for (int i = 0; i < num; i++) {
        if (strcmp(names[i], text) == 0) return i;
    }
    return -1;
}

/* Place in the table of text settings, -1 = an option of something else. */
static int text_index(const rf_policy_option *option) {
    for (int i = 0; text_setting_at(i); i++) {
        if (text_setting_at(i) == option) return i;
    }
    return -1;
}

/* One value of an option, the world's own or the policy's; of a text setting it is checked only. */
static rf_status set_value(sweep_setting *s, const rf_policy_option *option, const char *value, rf_error *err) {
    int carry = option == &world_options[CARRY] ? find_name(carries, 3, value) : 0;
    int context = option == &world_options[CONTEXT] ? find_name(contexts, 4, value) : 0;
    if (carry < 0 || context < 0) {
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected one of %s, found '%s'", option->name, option->choices,
                       value);
    }
    if (text_index(option) >= 0) return text_setting_check(text_index(option), value, err);
    if (option == &world_options[CARRY]) {
        s->carry = (rf_cache_carry)carry;
    } else if (option == &world_options[CONTEXT]) {
        s->context = (sweep_context)context;
    } else {
        return rf_policy_set_one(s->object, option->name, value, err);
    }
    return RF_OK;
}

static void free_parsed(parsed_spec *parsed) {
    for (int i = 0; i < parsed->num_axes; i++) free_values(&parsed->axes[i].values);
    rf_free(parsed->axes);
    rf_policy_destroy(parsed->base);
}

/* Every value is tried on its own, so that a wrong one is found with its place before anything runs. */
static rf_status check_values(const parsed_spec *parsed, const axis *a, rf_error *err) {
    sweep_setting try = {.object = parsed->base ? rf_policy_clone(parsed->base) : NULL};
    rf_status st = try.object || !parsed->base ? RF_OK : no_memory(err);
    for (int i = 0; i < a->values.num && st == RF_OK; i++) st = set_value(&try, a->option, a->values.values[i], err);
    if (st == RF_ERR_ARGUMENT)
        st = rf_fail_prefix(err, st, "--policy '%s', character %zu", parsed->spec, a->where.at + 1);
    rf_policy_destroy(try.object);
    return st;
}

/* is_decode: a setting of decoding, and not an option of the policy. */
static rf_status read_axis(parsed_spec *parsed, const piece *p, bool is_decode, rf_error *err) {
    const char *text = p->spec + p->at;
    const char *equals = memchr(text, '=', p->len);
    if (!equals || equals == text) return bad(p, err, "expected OPTION=VALUES");
    size_t name_len = (size_t)(equals - text);
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)name_len, text);
    const rf_policy_option *option = NULL;
    if (is_decode) {
        option = text_setting_at(text_setting_find(name));
        if (!option) return bad(p, err, "no such setting of decoding (see refrain text --help)");
    }
    for (int i = 0; parsed->kind == OF_WORLDS && i < 2; i++) {
        if ((i == CONTEXT || parsed->def) && strcmp(world_options[i].name, name) == 0) option = &world_options[i];
    }
    for (int i = 0; !is_decode && parsed->def && i < parsed->def->num_options; i++) {
        if (strcmp(parsed->def->options[i].name, name) == 0) option = &parsed->def->options[i];
    }
    if (!option && !parsed->def)
        return bad(p, err, parsed->kind == OF_TEXT ? "`none` has no options" : "`none` takes the option context");
    if (!option) { /* the policy's own message lists the valid ones */
        rf_status st = rf_policy_set_one(parsed->base, name, equals + 1, err);
        if (st == RF_OK) return bad(p, err, "expected an option of the policy");
        return rf_fail_prefix(err, st, "--policy '%s', character %zu", p->spec, p->at + 1);
    }
    for (int i = 0; i < parsed->num_axes; i++) {
        if (parsed->axes[i].option == option) return bad(p, err, "the option stands twice");
    }
    axis *a = &parsed->axes[parsed->num_axes++];
    *a = (axis){.option = option, .where = {p->spec, p->at + name_len + 1, p->len - name_len - 1}};
    rf_status st = read_values(&a->values, &a->where, option->type, err);
    if (st == RF_OK) st = check_values(parsed, a, err);
    return st;
}

static rf_status find_policy(parsed_spec *parsed, const char *name, rf_error *err) {
    rf_status st = rf_policy_create(&parsed->base, name, err);
    if (st != RF_OK) return rf_fail_prefix(err, st, "--policy '%s'", parsed->spec);
    parsed->def = rf_policy_get_def(parsed->base);
    if (!parsed->def->rows == (parsed->kind != OF_TEXT)) return RF_OK;
    st = rf_fail(err, RF_ERR_ARGUMENT, "--policy '%s': %s", parsed->spec,
                 parsed->def->rows ? "a row policy, for models of text"
                                   : "keeps features of diffusion transformers; this is a model of text");
    rf_policy_destroy(parsed->base);
    parsed->base = NULL;
    return st;
}

static rf_status parse_spec(parsed_spec *parsed, const char *spec, spec_kind kind, rf_error *err) {
    char name[64];
    size_t len = kind == OF_TEXT ? strcspn(spec, "+") : strlen(spec); /* of policy and options */
    size_t name_len = strcspn(spec, ":");
    if (name_len > len) name_len = len;
    memset(parsed, 0, sizeof *parsed);
    parsed->spec = spec;
    parsed->kind = kind;
    piece whole = {spec, 0, name_len};
    if (name_len == 0 || name_len >= sizeof name) return bad(&whole, err, "expected the name of a policy");
    memcpy(name, spec, name_len);
    name[name_len] = 0;
    rf_status st = RF_OK;
    if (kind == OF_IMAGES || strcmp(name, SWEEP_UNCACHED) != 0) RF_TRY(find_policy(parsed, name, err));
    parsed->name = parsed->def ? parsed->def->name : SWEEP_UNCACHED;
    parsed->axes = rf_alloc_zero(MAX_AXES, sizeof *parsed->axes);
    if (!parsed->axes) st = no_memory(err);
    for (size_t at = name_len + 1; st == RF_OK && at <= len && spec[name_len] == ':';) {
        size_t n = strcspn(spec + at, ";");
        piece p = {spec, at, at + n > len ? len - at : n};
        st = read_axis(parsed, &p, false, err);
        at += p.len + 1;
    }
    for (size_t at = len + 1; st == RF_OK && spec[len] == '+';) {
        piece p = {spec, at, strcspn(spec + at, "+")};
        st = read_axis(parsed, &p, true, err);
        at += p.len;
        if (!spec[at]) break;
        at++;
    }
    if (st != RF_OK) free_parsed(parsed);
    return st;
}

/* Appends "SEPARATOR name=value" to a text of `room` bytes. */
static rf_status put_option(char *text, size_t room, const char *separator, const axis *a, const char *value,
                            const char *spec, rf_error *err) {
    size_t used = strlen(text);
    int len = snprintf(text + used, room - used, "%s%s=%s", used ? separator : "", a->option->name, value);
    if (len >= 0 && (size_t)len < room - used) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "--policy '%.100s...': too long", spec);
}

/* The combination that the odometer shows. */
static rf_status add_combination(sweep_plan *plan, const parsed_spec *parsed, const int *at, rf_error *err) {
    char options[2048] = "", decode[1024] = "";
    sweep_setting s = {.object = parsed->base ? rf_policy_clone(parsed->base) : NULL, .context = SWEEP_CONTEXT_GIVEN};
    rf_status st = s.object || !parsed->base ? RF_OK : no_memory(err);
    for (int i = 0; i < parsed->num_axes && st == RF_OK; i++) {
        const axis *a = &parsed->axes[i];
        const char *value = a->values.values[at[i]];
        bool is_decode = text_index(a->option) >= 0;
        st = set_value(&s, a->option, value, err);
        if (st == RF_OK && is_decode) st = put_option(decode, sizeof decode, "+", a, value, parsed->spec, err);
        if (st == RF_OK && !is_decode) st = put_option(options, sizeof options, ";", a, value, parsed->spec, err);
    }
    size_t used = strlen(options);
    if (st == RF_OK && decode[0]) {
        int len = snprintf(options + used, sizeof options - used, "+%s", decode);
        if (len < 0 || (size_t)len >= sizeof options - used)
            st = rf_fail(err, RF_ERR_ARGUMENT, "--policy '%.100s...': too long", parsed->spec);
        s.decode = rf_strdup(decode);
        if (st == RF_OK && !s.decode) st = no_memory(err);
    }
    if (st != RF_OK) {
        rf_free(s.decode);
        rf_policy_destroy(s.object);
        return st;
    }
    return append(plan, s, parsed->name, options, err);
}

static rf_status add_product(sweep_plan *plan, const parsed_spec *parsed, rf_error *err) {
    int at[MAX_AXES] = {0};
    for (;;) {
        rf_status st = add_combination(plan, parsed, at, err);
        if (st != RF_OK) return st;
        int i = parsed->num_axes - 1;
        while (i >= 0 && ++at[i] == parsed->axes[i].values.num) at[i--] = 0;
        if (i < 0) return RF_OK;
    }
}

static rf_status add_spec(sweep_plan *plan, const char *spec, spec_kind kind, rf_error *err) {
    parsed_spec parsed;
    rf_status st = parse_spec(&parsed, spec, kind, err);
    if (st != RF_OK) return st;
    st = add_product(plan, &parsed, err);
    free_parsed(&parsed);
    return st;
}

rf_status sweep_plan_add(sweep_plan *plan, const char *spec, rf_error *err) {
    if (strcmp(spec, "all") != 0) return add_spec(plan, spec, OF_IMAGES, err);
    for (int i = 0; sweep_builtin_spec(i); i++) RF_TRY(add_spec(plan, sweep_builtin_spec(i), OF_IMAGES, err));
    return RF_OK;
}

rf_status sweep_plan_add_world(sweep_plan *plan, const char *spec, bool slides, rf_error *err) {
    if (strcmp(spec, "all") != 0) return add_spec(plan, spec, OF_WORLDS, err);
    for (int i = 0; sweep_builtin_world_spec(i, slides); i++)
        RF_TRY(add_spec(plan, sweep_builtin_world_spec(i, slides), OF_WORLDS, err));
    return RF_OK;
}

rf_status sweep_plan_add_text(sweep_plan *plan, const char *spec, bool block_causal, rf_error *err) {
    if (strcmp(spec, "all") != 0) return add_spec(plan, spec, OF_TEXT, err);
    for (int i = 0; sweep_builtin_text_spec(i, block_causal); i++)
        RF_TRY(add_spec(plan, sweep_builtin_text_spec(i, block_causal), OF_TEXT, err));
    return RF_OK;
}

/* Is the word the name of a policy, so that a spec begins here and not one more value? */
static bool begins_spec(const char *text) {
    char name[64];
    size_t len = strcspn(text, ":+,");
    if (len >= sizeof name) return false;
    memcpy(name, text, len);
    name[len] = 0;
    return strcmp(name, SWEEP_UNCACHED) == 0 || strcmp(name, "all") == 0 || rf_policy_find(name);
}

rf_status sweep_plan_add_text_list(sweep_plan *plan, const char *specs, bool block_causal, rf_error *err) {
    for (const char *at = specs;;) {
        const char *end = at + strcspn(at, ",");
        bool has_values = at + strcspn(at, ":+") < end;
        while (*end && has_values && !begins_spec(end + 1)) end += 1 + strcspn(end + 1, ",");
        char *spec = rf_alloc((size_t)(end - at) + 1);
        if (!spec) return no_memory(err);
        memcpy(spec, at, (size_t)(end - at));
        spec[end - at] = 0;
        rf_status st = sweep_plan_add_text(plan, spec, block_causal, err);
        rf_free(spec);
        RF_TRY(st);
        if (!*end) return RF_OK;
        at = end + 1;
    }
}

rf_status sweep_plan_add_kv(sweep_plan *plan, const char *name, const char *options, const struct kv_setting *kv,
                            rf_error *err) {
    return append(plan, (sweep_setting){.context = SWEEP_CONTEXT_GIVEN, .kv = kv}, name, options, err);
}

/* --- the control -------------------------------------------------------------------------------------------------- */

static rf_status append_steps(sweep_plan *plan, int steps, rf_error *err) {
    return append(plan, (sweep_setting){.num_steps = steps, .context = SWEEP_CONTEXT_GIVEN}, "steps", "", err);
}

rf_status sweep_plan_add_steps(sweep_plan *plan, const char *text, int num_steps, rf_error *err) {
    rf_status st = RF_OK;
    if (strcmp(text, "auto") == 0) {
        int most = (int)(.8 * num_steps + .5), least = most < 5 ? 1 : 5;
        if (most >= num_steps) most = num_steps - 1;
        for (int i = 0; i < AUTO_STEP_COUNTS && most >= least && st == RF_OK; i++) {
            double x = (double)i / (AUTO_STEP_COUNTS - 1);
            st = append_steps(plan, (int)nearbyint(most * pow((double)least / most, x)), err);
        }
        return st;
    }
    for (const char *p = text; st == RF_OK;) {
        char *end = NULL;
        long v = isdigit((unsigned char)*p) ? strtol(p, &end, 10) : 0;
        if (v < 1 || v >= num_steps || (*end && *end != ','))
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "--fewer-steps '%s', character %d: expected auto or numbers 1..%d with commas between", text,
                           (int)(p - text) + 1, num_steps - 1);
        st = append_steps(plan, (int)v, err);
        if (!*end) break;
        p = end + 1;
    }
    return st;
}

/* --- searches ----------------------------------------------------------------------------------------------------- */

rf_status sweep_plan_add_value(sweep_plan *plan, const sweep_setting *fixed, const char *option, const char *value,
                               rf_error *err) {
    char options[2048];
    int len =
        snprintf(options, sizeof options, "%s%s%s=%s", fixed->options, fixed->options[0] ? ";" : "", option, value);
    if (len < 0 || (size_t)len >= sizeof options)
        return rf_fail(err, RF_ERR_ARGUMENT, "--policy '%.100s...': too long", fixed->options);
    sweep_setting s = {.object = rf_policy_clone(fixed->object), .carry = fixed->carry, .context = fixed->context};
    if (!s.object) return no_memory(err);
    rf_status st = rf_policy_set_one(s.object, option, value, err);
    if (st != RF_OK) {
        rf_policy_destroy(s.object);
        return st;
    }
    return append(plan, s, fixed->policy, options, err);
}

/* The spec's own range, from mild to aggressive as the built-in one runs (an option without one: as written). */
static rf_status own_range(const parsed_spec *parsed, int index, sweep_range *range, rf_error *err) {
    const axis *a = &parsed->axes[index];
    const char *text = a->where.spec + a->where.at, *dots = strstr(text, "..");
    number_range r;
    if (!dots || (size_t)(dots - text) >= a->where.len || memchr(text, ',', a->where.len))
        return bad(&a->where, err, "a search takes one range A..B");
    rf_status st = read_range(&a->where, (size_t)(dots - text), &r, err);
    if (st != RF_OK) return st;
    sweep_range known;
    bool falls = sweep_main_option(parsed->def->name, &known) && strcmp(known.option, a->option->name) == 0
                     ? known.aggressive < known.mild
                     : r.to < r.from;
    double low = fmin(r.from, r.to), high = fmax(r.from, r.to);
    *range = (sweep_range){.option = a->option->name,
                           .whole = a->option->type == RF_OPTION_INT,
                           .mild = falls ? high : low,
                           .aggressive = falls ? low : high};
    return RF_OK;
}

/* "a..b" without a count is no list of values; a search only needs its ends, so one is added before parsing. */
static rf_status with_counts(const char *spec, char **out, rf_error *err) {
    const char *dots = strstr(spec, "..");
    size_t len = strlen(spec);
    char *copy = rf_alloc(len + 3);
    if (!copy) return no_memory(err);
    memcpy(copy, spec, len + 1);
    *out = copy;
    if (!dots) return RF_OK;
    size_t end = (size_t)(dots - spec) + strcspn(dots, ";,/");
    if (spec[end] == '/') return RF_OK;
    memmove(copy + end + 2, copy + end, len - end + 1);
    memcpy(copy + end, "/2", 2);
    return RF_OK;
}

rf_status sweep_plan_search(const char *spec, bool world, sweep_plan *fixed, sweep_range *range, rf_error *err) {
    parsed_spec parsed = {0};
    char *text = NULL;
    int ranged = -1;
    if (strcmp(spec, "all") == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--policy all: a search with --target-... turns one option of one policy");
    rf_status st = with_counts(spec, &text, err);
    if (st == RF_OK) st = parse_spec(&parsed, text, world ? OF_WORLDS : OF_IMAGES, err);
    if (st == RF_OK && !parsed.def) {
        free_parsed(&parsed);
        st = rf_fail(err, RF_ERR_ARGUMENT, "--policy '%s': a search turns an option of a policy", spec);
    }
    if (st != RF_OK) {
        rf_free(text);
        return st;
    }
    for (int i = 0; i < parsed.num_axes && st == RF_OK; i++) {
        if (parsed.axes[i].values.num == 1) continue;
        if (ranged >= 0) st = bad(&parsed.axes[i].where, err, "a search turns one option");
        ranged = i;
    }
    if (st == RF_OK && ranged >= 0) {
        st = own_range(&parsed, ranged, range, err);
    } else if (st == RF_OK && !sweep_main_option(parsed.def->name, range)) {
        st = rf_fail(err, RF_ERR_ARGUMENT, "--policy '%s': name the option to search, as %s:OPTION=A..B", spec,
                     parsed.def->name);
    }
    if (st == RF_OK && ranged >= 0) { /* out of the fixed ones */
        free_values(&parsed.axes[ranged].values);
        parsed.axes[ranged] = parsed.axes[--parsed.num_axes];
    }
    for (int i = 0; i < parsed.num_axes && st == RF_OK; i++) {
        if (strcmp(parsed.axes[i].option->name, range->option) == 0)
            st = bad(&parsed.axes[i].where, err, "this is the option that the search turns; expected a range A..B");
    }
    if (st == RF_OK) st = add_product(fixed, &parsed, err);
    free_parsed(&parsed);
    rf_free(text);
    return st;
}
