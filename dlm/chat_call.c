/* dlm/chat_call.c - filters, tests, functions and methods of chat templates. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "dlm/chat_internal.h"
#include "dlm/tokenizer_internal.h"

static const char *const filters[] = {"trim",   "length",  "count", "upper",   "lower",  "tojson",
                                      "join",   "first",   "last",  "default", "d",      "list",
                                      "string", "replace", "items", "safe",    "select", "reject"};
static const char *const tests[] = {"defined", "undefined", "none",    "string",  "mapping", "iterable", "sequence",
                                    "number",  "integer",   "float",   "boolean", "true",    "false",    "odd",
                                    "even",    "eq",        "equalto", "ne",      "in"};
static const char *const functions[] = {"namespace", "range", "raise_exception", "strftime_now"};

static bool known(rf_str name, const char *const *names, size_t num) {
    for (size_t i = 0; i < num; i++) {
        if (rf_str_is(name, names[i])) return true;
    }
    return false;
}
bool rf_chat_filter_known(rf_str name) {
    return known(name, filters, sizeof filters / sizeof *filters);
}
bool rf_chat_test_known(rf_str name) {
    return known(name, tests, sizeof tests / sizeof *tests);
}
bool rf_chat_function_known(rf_str name) {
    return known(name, functions, sizeof functions / sizeof *functions);
}

/* ---- arguments ---- */

static rf_status wrong_arguments(const rf_chat_context *x, rf_str name) {
    return rf_chat_refuse(x, "the arguments of '%.*s' are not supported", (int)(name.num < 60 ? name.num : 60), name.p);
}

/* At most `most` plain arguments and no named ones but `named` (may be NULL). */
static rf_status check_args(const rf_chat_context *x, rf_str name, const rf_chat_args *args, size_t least, size_t most,
                            const char *named) {
    size_t num_named = args->named ? args->named->num : 0;
    bool ok = args->num >= least && args->num <= most && num_named <= (named ? 1u : 0u);
    if (ok && num_named) ok = rf_str_is(args->named->keys[0], named);
    return ok ? RF_OK : wrong_arguments(x, name);
}

/* Argument `index`, or the one named; NULL if neither is there. */
static const rf_value *arg(const rf_chat_args *args, size_t index, const char *named) {
    if (index < args->num) return &args->items[index];
    if (!named || !args->named) return NULL;
    return rf_value_map_find(args->named, (rf_str){named, strlen(named)});
}

static rf_value string_value(rf_str s) {
    return (rf_value){.kind = RF_VALUE_STRING, .string = s};
}
static rf_value bool_value(bool b) {
    return (rf_value){.kind = RF_VALUE_BOOL, .boolean = b};
}

/* ---- strings ---- */

static uint32_t first_code(rf_str s, size_t *len) {
    return rf_utf8_next((const uint8_t *)s.p, s.num, len);
}

static const char *find(rf_str in, size_t from, rf_str what) {
    if (what.num > in.num || from > in.num - what.num) return NULL;
    return what.num ? memmem(in.p + from, in.num - from, what.p, what.num) : in.p + from;
}

/* Python's str.strip: set NULL strips white space. */
static bool in_set(uint32_t code, const rf_str *set) {
    if (!set) return rf_is_space(code) || (code >= 0x1c && code <= 0x1f);
    rf_str rest = *set;
    while (rest.num) {
        size_t len;
        if (first_code(rest, &len) == code) return true;
        rest = (rf_str){rest.p + len, rest.num - len};
    }
    return false;
}

static rf_str strip(rf_str s, const rf_str *set, bool left, bool right) {
    size_t len;
    while (left && s.num && in_set(first_code(s, &len), set)) s = (rf_str){s.p + len, s.num - len};
    while (right && s.num) {
        len = rf_utf8_last_len((const uint8_t *)s.p, s.num);
        size_t got;
        if (!in_set(first_code((rf_str){s.p + s.num - len, len}, &got), set)) break;
        s.num -= len;
    }
    return s;
}

static rf_status change_case(const rf_chat_context *x, rf_str s, bool upper, rf_value *out) {
    char *p = rf_chat_alloc(x->pool, s.num + 1);
    if (!p) return rf_chat_no_memory(x);
    for (size_t i = 0; i < s.num; i++) {
        char c = s.p[i];
        if ((unsigned char)c >= 0x80) return rf_chat_refuse(x, "upper and lower of letters beyond ASCII");
        if (upper && c >= 'a' && c <= 'z') c = (char)(c - 32);
        if (!upper && c >= 'A' && c <= 'Z') c = (char)(c + 32);
        p[i] = c;
    }
    *out = string_value((rf_str){p, s.num});
    return RF_OK;
}

static rf_status replace(const rf_chat_context *x, rf_str s, const rf_chat_args *args, rf_value *out) {
    if (args->num != 2 || args->named || args->items[0].kind != RF_VALUE_STRING ||
        args->items[1].kind != RF_VALUE_STRING || args->items[0].string.num == 0) {
        return wrong_arguments(x, RF_STR("replace"));
    }
    rf_str from = args->items[0].string, to = args->items[1].string;
    size_t count = 0, at = 0;
    for (const char *p; (p = find(s, at, from)) != NULL; at = (size_t)(p - s.p) + from.num) count++;
    if (to.num > from.num && count > RF_CHAT_MAX_BYTES / (to.num - from.num)) {
        return rf_chat_refuse(x, "too much text");
    }
    char *result = rf_chat_alloc(x->pool, s.num - count * from.num + count * to.num + 1);
    if (!result) return rf_chat_no_memory(x);
    size_t n = 0, done = 0;
    for (const char *p; (p = find(s, done, from)) != NULL;) {
        size_t start = (size_t)(p - s.p);
        memcpy(result + n, s.p + done, start - done);
        n += start - done;
        if (to.num) memcpy(result + n, to.p, to.num);
        n += to.num;
        done = start + from.num;
    }
    if (s.num > done) memcpy(result + n, s.p + done, s.num - done);
    *out = string_value((rf_str){result, n + s.num - done});
    return RF_OK;
}

static rf_status split(const rf_chat_context *x, rf_str s, const rf_chat_args *args, rf_value *out) {
    if (args->named || args->num < 1 || args->num > 2 || args->items[0].kind != RF_VALUE_STRING ||
        args->items[0].string.num == 0 || (args->num == 2 && args->items[1].kind != RF_VALUE_INT)) {
        return wrong_arguments(x, RF_STR("split"));
    }
    rf_str by = args->items[0].string;
    int64_t most = args->num == 2 ? args->items[1].integer : -1;
    RF_TRY(rf_value_list_new(x, out));
    size_t done = 0;
    for (const char *p; most != 0 && (p = find(s, done, by)) != NULL; most--) {
        size_t start = (size_t)(p - s.p);
        RF_TRY(rf_value_list_add(x, out->list, string_value((rf_str){s.p + done, start - done})));
        done = start + by.num;
    }
    return rf_value_list_add(x, out->list, string_value((rf_str){s.p + done, s.num - done}));
}

static rf_status characters(const rf_chat_context *x, rf_str s, rf_value *out) {
    RF_TRY(rf_value_list_new(x, out));
    while (s.num) {
        size_t len;
        first_code(s, &len);
        RF_TRY(rf_value_list_add(x, out->list, string_value((rf_str){s.p, len})));
        s = (rf_str){s.p + len, s.num - len};
    }
    return RF_OK;
}

static rf_status map_items(const rf_chat_context *x, const rf_value_map *map, bool keys, bool values, rf_value *out) {
    RF_TRY(rf_value_list_new(x, out));
    for (size_t i = 0; i < map->num; i++) {
        rf_value item = keys ? string_value(map->keys[i]) : map->values[i];
        if (keys && values) {
            RF_TRY(rf_value_list_new(x, &item));
            RF_TRY(rf_value_list_add(x, item.list, string_value(map->keys[i])));
            RF_TRY(rf_value_list_add(x, item.list, map->values[i]));
        }
        RF_TRY(rf_value_list_add(x, out->list, item));
    }
    return RF_OK;
}

static bool plain_map(const rf_value *v) {
    return v->kind == RF_VALUE_MAP && !v->map->is_namespace && !v->map->is_loop;
}

rf_status rf_chat_method(const rf_chat_context *x, const rf_value *self, rf_str name, const rf_chat_args *args,
                         rf_value *out) {
    if (self->kind == RF_VALUE_STRING) {
        rf_str s = self->string;
        bool left = rf_str_is(name, "lstrip"), right = rf_str_is(name, "rstrip"), both = rf_str_is(name, "strip");
        if (left || right || both) {
            RF_TRY(check_args(x, name, args, 0, 1, NULL));
            const rf_value *set = arg(args, 0, NULL);
            if (set && set->kind != RF_VALUE_STRING && set->kind != RF_VALUE_NONE) return wrong_arguments(x, name);
            *out = string_value(
                strip(s, set && set->kind == RF_VALUE_STRING ? &set->string : NULL, left || both, right || both));
            return RF_OK;
        }
        bool starts = rf_str_is(name, "startswith");
        if (starts || rf_str_is(name, "endswith")) {
            RF_TRY(check_args(x, name, args, 1, 1, NULL));
            if (args->items[0].kind != RF_VALUE_STRING) return wrong_arguments(x, name);
            rf_str part = args->items[0].string;
            bool fits = part.num <= s.num;
            *out = bool_value(fits && memcmp(s.p + (starts ? 0 : s.num - part.num), part.p, part.num) == 0);
            return RF_OK;
        }
        if (rf_str_is(name, "split")) return split(x, s, args, out);
        if (rf_str_is(name, "replace")) return replace(x, s, args, out);
        if (rf_str_is(name, "upper") || rf_str_is(name, "lower")) {
            RF_TRY(check_args(x, name, args, 0, 0, NULL));
            return change_case(x, s, rf_str_is(name, "upper"), out);
        }
    }
    if (plain_map(self)) {
        bool items = rf_str_is(name, "items"), keys = rf_str_is(name, "keys"), values = rf_str_is(name, "values");
        if (items || keys || values) {
            RF_TRY(check_args(x, name, args, 0, 0, NULL));
            RF_TRY(map_items(x, self->map, items || keys, items || values, out));
            out->list->opaque = true;
            return RF_OK;
        }
        if (rf_str_is(name, "get")) {
            RF_TRY(check_args(x, name, args, 1, 2, NULL));
            if (args->items[0].kind != RF_VALUE_STRING) return wrong_arguments(x, name);
            const rf_value *found = rf_value_map_find(self->map, args->items[0].string);
            *out = found ? *found : args->num == 2 ? args->items[1] : (rf_value){.kind = RF_VALUE_NONE};
            return RF_OK;
        }
    }
    return rf_chat_refuse(x, "method '%.*s' of %s is not supported", (int)(name.num < 60 ? name.num : 60), name.p,
                          rf_value_kind_name(self));
}

/* ---- filters ---- */

static rf_status length_of(const rf_chat_context *x, const rf_value *v, rf_value *out) {
    int64_t num = 0;
    if (v->kind == RF_VALUE_STRING) {
        for (size_t i = 0; i < v->string.num; i++) num += ((unsigned char)v->string.p[i] & 0xc0) != 0x80;
    } else if (v->kind == RF_VALUE_LIST) {
        num = (int64_t)v->list->num;
    } else if (plain_map(v)) {
        num = (int64_t)v->map->num;
    } else if (v->kind != RF_VALUE_UNDEFINED) {
        return rf_chat_refuse(x, "the length of %s", rf_value_kind_name(v));
    }
    *out = (rf_value){.kind = RF_VALUE_INT, .integer = num};
    return RF_OK;
}

/* What a for loop would go over, as a list. */
static rf_status to_list(const rf_chat_context *x, const rf_value *v, rf_value *out) {
    if (v->kind == RF_VALUE_LIST || v->kind == RF_VALUE_GENERATOR) {
        RF_TRY(rf_value_list_new(x, out));
        *out->list = *v->list;
        out->list->opaque = false;
        out->list->capacity = out->list->num; /* adding must not write into what both share */
        if (v->kind == RF_VALUE_GENERATOR) v->list->num = 0;
        return RF_OK;
    }
    if (v->kind == RF_VALUE_STRING) return characters(x, v->string, out);
    if (plain_map(v)) return map_items(x, v->map, true, false, out);
    if (v->kind == RF_VALUE_UNDEFINED) return rf_value_list_new(x, out);
    return rf_chat_refuse(x, "%s cannot be gone over", rf_value_kind_name(v));
}

static rf_status join(const rf_chat_context *x, const rf_value *v, const rf_chat_args *args, rf_value *out) {
    rf_value list;
    RF_TRY(check_args(x, RF_STR("join"), args, 0, 1, NULL));
    RF_TRY(to_list(x, v, &list));
    rf_str by = {"", 0};
    if (args->num) RF_TRY(rf_value_to_string(x, &args->items[0], &by));
    size_t total = 0;
    for (size_t i = 0; i < list.list->num; i++) {
        rf_str part;
        RF_TRY(rf_value_to_string(x, &list.list->items[i], &part));
        total += part.num + by.num;
        if (total > RF_CHAT_MAX_BYTES) return rf_chat_refuse(x, "too much text");
    }
    char *p = rf_chat_alloc(x->pool, total + 1);
    if (!p) return rf_chat_no_memory(x);
    size_t n = 0;
    for (size_t i = 0; i < list.list->num; i++) {
        rf_str part;
        RF_TRY(rf_value_to_string(x, &list.list->items[i], &part));
        if (i && by.num) memcpy(p + n, by.p, by.num);
        n += i ? by.num : 0;
        if (part.num) memcpy(p + n, part.p, part.num);
        n += part.num;
    }
    *out = string_value((rf_str){p, n});
    return RF_OK;
}

static rf_status to_json(const rf_chat_context *x, const rf_value *v, const rf_chat_args *args, rf_value *out) {
    int64_t indent = -1;
    const rf_value *given = arg(args, 99, "indent");
    RF_TRY(check_args(x, RF_STR("tojson"), args, 0, 0, "indent"));
    if (given && given->kind != RF_VALUE_NONE) {
        if (given->kind != RF_VALUE_INT || given->integer < 0 || given->integer > 16)
            return wrong_arguments(x, RF_STR("tojson"));
        indent = given->integer;
    }
    out->kind = RF_VALUE_STRING;
    return rf_value_to_json(x, v, (int)indent, &out->string);
}

/* Those of a list that pass a test, given by its name and arguments, or that do not; without a test, by their truth. */
static rf_status select_items(const rf_chat_context *x, const rf_value *v, const rf_chat_args *args, bool wanted,
                              rf_value *out) {
    rf_value list;
    rf_str test = RF_STR("select");
    if (args->named || (args->num && args->items[0].kind != RF_VALUE_STRING)) return wrong_arguments(x, test);
    if (args->num) {
        test = args->items[0].string;
        if (!rf_chat_test_known(test)) {
            return rf_chat_refuse(x, "test '%.*s' is not supported", (int)(test.num < 60 ? test.num : 60), test.p);
        }
    }
    RF_TRY(to_list(x, v, &list));
    RF_TRY(rf_value_list_new(x, out));
    for (size_t i = 0; i < list.list->num; i++) {
        const rf_value *item = &list.list->items[i];
        bool passes = rf_value_true(item);
        if (args->num)
            RF_TRY(rf_chat_test(x, test, item, &(rf_chat_args){args->items + 1, args->num - 1, NULL}, &passes));
        if (passes == wanted) RF_TRY(rf_value_list_add(x, out->list, *item));
    }
    return RF_OK;
}

rf_status rf_chat_filter(const rf_chat_context *x, rf_str name, const rf_value *v, const rf_chat_args *args,
                         rf_value *out) {
    rf_value made = {0};
    if (rf_str_is(name, "tojson")) {
        RF_TRY(to_json(x, v, args, &made));
    } else if (rf_str_is(name, "default") || rf_str_is(name, "d")) {
        RF_TRY(check_args(x, name, args, 0, 2, "boolean"));
        const rf_value *by_truth = arg(args, 1, "boolean");
        bool replaced = v->kind == RF_VALUE_UNDEFINED || (by_truth && rf_value_true(by_truth) && !rf_value_true(v));
        made = !replaced ? *v : args->num ? args->items[0] : string_value((rf_str){"", 0});
    } else if (rf_str_is(name, "length") || rf_str_is(name, "count")) {
        RF_TRY(check_args(x, name, args, 0, 0, NULL));
        RF_TRY(length_of(x, v, &made));
    } else if (rf_str_is(name, "join")) {
        RF_TRY(join(x, v, args, &made));
    } else if (rf_str_is(name, "list")) {
        RF_TRY(check_args(x, name, args, 0, 0, NULL));
        RF_TRY(to_list(x, v, &made));
    } else if (rf_str_is(name, "first") || rf_str_is(name, "last")) {
        rf_value list;
        RF_TRY(check_args(x, name, args, 0, 0, NULL));
        RF_TRY(to_list(x, v, &list));
        if (v->kind == RF_VALUE_GENERATOR) return rf_chat_refuse(x, "the first or last of a generator");
        if (list.list->num) made = list.list->items[rf_str_is(name, "first") ? 0 : list.list->num - 1];
    } else if (rf_str_is(name, "items")) {
        RF_TRY(check_args(x, name, args, 0, 0, NULL));
        if (v->kind == RF_VALUE_UNDEFINED) {
            RF_TRY(rf_value_list_new(x, &made));
        } else if (plain_map(v)) {
            RF_TRY(map_items(x, v->map, true, true, &made));
        } else {
            return rf_chat_refuse(x, "items of %s", rf_value_kind_name(v));
        }
        made.kind = RF_VALUE_GENERATOR;
    } else if (rf_str_is(name, "select") || rf_str_is(name, "reject")) {
        RF_TRY(select_items(x, v, args, rf_str_is(name, "select"), &made));
        made.kind = RF_VALUE_GENERATOR;
    } else { /* of the value's text */
        rf_str s;
        RF_TRY(rf_value_to_string(x, v, &s));
        if (rf_str_is(name, "replace")) {
            RF_TRY(replace(x, s, args, &made));
        } else if (rf_str_is(name, "trim")) {
            RF_TRY(check_args(x, name, args, 0, 1, "chars"));
            const rf_value *set = arg(args, 0, "chars");
            if (set && set->kind == RF_VALUE_NONE) set = NULL;
            if (set && set->kind != RF_VALUE_STRING) return wrong_arguments(x, name);
            made = string_value(strip(s, set ? &set->string : NULL, true, true));
        } else {
            RF_TRY(check_args(x, name, args, 0, 0, NULL));
            made = string_value(s); /* string, safe */
            bool upper = rf_str_is(name, "upper");
            if (upper || rf_str_is(name, "lower")) RF_TRY(change_case(x, s, upper, &made));
        }
    }
    *out = made;
    return RF_OK;
}

/* ---- tests ---- */

rf_status rf_chat_contains(const rf_chat_context *x, const rf_value *container, const rf_value *v, bool *out) {
    *out = false;
    if (container->kind == RF_VALUE_STRING) {
        if (v->kind != RF_VALUE_STRING) return rf_chat_refuse(x, "%s in a string", rf_value_kind_name(v));
        *out = find(container->string, 0, v->string) != NULL;
    } else if (plain_map(container)) {
        bool hashable = v->kind != RF_VALUE_LIST && v->kind != RF_VALUE_MAP;
        if (!hashable) return rf_chat_refuse(x, "%s in a mapping", rf_value_kind_name(v));
        *out = v->kind == RF_VALUE_STRING && rf_value_map_find(container->map, v->string);
    } else if (container->kind == RF_VALUE_LIST) {
        bool hashable = v->kind != RF_VALUE_LIST && v->kind != RF_VALUE_MAP;
        if (container->list->opaque && !hashable) return rf_chat_refuse(x, "%s in keys", rf_value_kind_name(v));
        for (size_t i = 0; i < container->list->num && !*out; i++) {
            RF_TRY(rf_value_equal(x, v, &container->list->items[i], out));
        }
    } else if (container->kind != RF_VALUE_UNDEFINED) {
        return rf_chat_refuse(x, "in %s", rf_value_kind_name(container));
    }
    return RF_OK;
}

rf_status rf_chat_test(const rf_chat_context *x, rf_str name, const rf_value *v, const rf_chat_args *args, bool *out) {
    bool equal = rf_str_is(name, "eq") || rf_str_is(name, "equalto"), unequal = rf_str_is(name, "ne");
    bool in = rf_str_is(name, "in"), odd = rf_str_is(name, "odd");
    rf_value_kind kind = v->kind;
    RF_TRY(check_args(x, name, args, equal || unequal || in, equal || unequal || in, NULL));
    if (equal || unequal) {
        RF_TRY(rf_value_equal(x, v, &args->items[0], out));
        *out = *out == equal;
    } else if (in) {
        RF_TRY(rf_chat_contains(x, &args->items[0], v, out));
    } else if (odd || rf_str_is(name, "even")) {
        if (kind != RF_VALUE_INT) return rf_chat_refuse(x, "whether %s is odd or even", rf_value_kind_name(v));
        *out = (v->integer & 1) == odd;
    } else if (rf_str_is(name, "defined")) {
        *out = kind != RF_VALUE_UNDEFINED;
    } else if (rf_str_is(name, "undefined")) {
        *out = kind == RF_VALUE_UNDEFINED;
    } else if (rf_str_is(name, "none")) {
        *out = kind == RF_VALUE_NONE;
    } else if (rf_str_is(name, "string")) {
        *out = kind == RF_VALUE_STRING;
    } else if (rf_str_is(name, "mapping")) {
        *out = plain_map(v);
    } else if (rf_str_is(name, "iterable") || rf_str_is(name, "sequence")) {
        bool odd_kind = (kind == RF_VALUE_MAP && !plain_map(v)) || (kind == RF_VALUE_LIST && v->list->opaque) ||
                        kind == RF_VALUE_GENERATOR;
        if (odd_kind) return rf_chat_refuse(x, "whether this value is iterable or a sequence");
        *out = kind == RF_VALUE_STRING || kind == RF_VALUE_LIST || kind == RF_VALUE_MAP || kind == RF_VALUE_UNDEFINED;
    } else if (rf_str_is(name, "number")) {
        *out = kind == RF_VALUE_INT || kind == RF_VALUE_FLOAT || kind == RF_VALUE_BOOL;
    } else if (rf_str_is(name, "integer")) {
        *out = kind == RF_VALUE_INT;
    } else if (rf_str_is(name, "float")) {
        *out = kind == RF_VALUE_FLOAT;
    } else if (rf_str_is(name, "boolean")) {
        *out = kind == RF_VALUE_BOOL;
    } else { /* true, false */
        *out = kind == RF_VALUE_BOOL && v->boolean == rf_str_is(name, "true");
    }
    return RF_OK;
}

/* ---- functions ---- */

static rf_status range(const rf_chat_context *x, const rf_chat_args *args, rf_value *out) {
    RF_TRY(check_args(x, RF_STR("range"), args, 1, 3, NULL));
    int64_t from = 0, to = 0, step = 1;
    for (size_t i = 0; i < args->num; i++) {
        const rf_value *v = &args->items[i];
        if (v->kind != RF_VALUE_INT || v->integer < -1000000 || v->integer > 1000000)
            return wrong_arguments(x, RF_STR("range"));
    }
    if (args->num == 1) {
        to = args->items[0].integer;
    } else {
        from = args->items[0].integer;
        to = args->items[1].integer;
        if (args->num == 3) step = args->items[2].integer;
    }
    if (step == 0) return wrong_arguments(x, RF_STR("range"));
    RF_TRY(rf_value_list_new(x, out));
    out->list->opaque = true;
    for (int64_t i = from; step > 0 ? i < to : i > to; i += step) {
        if (out->list->num == 100000) return rf_chat_refuse(x, "a range of more than 100000"); /* Jinja's own limit */
        RF_TRY(rf_value_list_add(x, out->list, (rf_value){.kind = RF_VALUE_INT, .integer = i}));
    }
    return RF_OK;
}

rf_status rf_chat_function(const rf_chat_context *x, rf_str name, const rf_chat_args *args, rf_value *out) {
    if (rf_str_is(name, "namespace")) {
        if (args->num) return wrong_arguments(x, name);
        RF_TRY(rf_value_map_new(x, out));
        for (size_t i = 0; args->named && i < args->named->num; i++) {
            RF_TRY(rf_value_map_set(x, out->map, args->named->keys[i], args->named->values[i]));
        }
        out->map->is_namespace = true;
        return RF_OK;
    }
    if (rf_str_is(name, "range")) return range(x, args, out);
    RF_TRY(check_args(x, name, args, 1, 1, NULL));
    if (args->items[0].kind != RF_VALUE_STRING) return wrong_arguments(x, name);
    rf_str text = args->items[0].string;
    if (rf_str_is(name, "raise_exception")) {
        char line[256];
        snprintf(line, sizeof line, "%.*s", (int)(text.num < 200 ? text.num : 200), text.p);
        for (char *p = line; *p; p++) {
            if ((unsigned char)*p < 0x20) *p = ' ';
        }
        return rf_fail(x->err, RF_ERR_ARGUMENT, "%s: the chat template refuses these messages: %s", x->name, line);
    }
    /* strftime_now: the local date and time */
    char format[64];
    time_t now = time(NULL);
    struct tm local;
    if (text.num == 0 || text.num >= sizeof format || memchr(text.p, 0, text.num) || !localtime_r(&now, &local)) {
        return wrong_arguments(x, name);
    }
    memcpy(format, text.p, text.num);
    format[text.num] = 0;
    /* by parts, so that the format need not be a constant of this program */
    char *result = rf_chat_alloc(x->pool, 1024);
    if (!result) return rf_chat_no_memory(x);
    size_t n = 0;
    for (const char *p = format; *p && n < 900; p++) {
        static const char letters[] = "YmdHMSyjBbAaIp";
        if (*p != '%') {
            result[n++] = *p;
            continue;
        }
        char letter = *++p;
        if (letter == '%') {
            result[n++] = '%';
            continue;
        }
        if (!letter || !strchr(letters, letter))
            return rf_chat_refuse(x, "strftime_now with '%%%c'", letter ? letter : ' ');
        size_t room = 100;
        char *to = result + n;
        switch (letter) {
        case 'Y': n += strftime(to, room, "%Y", &local); break;
        case 'm': n += strftime(to, room, "%m", &local); break;
        case 'd': n += strftime(to, room, "%d", &local); break;
        case 'H': n += strftime(to, room, "%H", &local); break;
        case 'M': n += strftime(to, room, "%M", &local); break;
        case 'S': n += strftime(to, room, "%S", &local); break;
        case 'y': n += (size_t)snprintf(to, room, "%02d", local.tm_year % 100); break;
        case 'j': n += strftime(to, room, "%j", &local); break;
        case 'B': n += strftime(to, room, "%B", &local); break;
        case 'b': n += strftime(to, room, "%b", &local); break;
        case 'A': n += strftime(to, room, "%A", &local); break;
        case 'a': n += strftime(to, room, "%a", &local); break;
        case 'I': n += strftime(to, room, "%I", &local); break;
        default: n += strftime(to, room, "%p", &local); break;
        }
    }
    *out = string_value((rf_str){result, n});
    return RF_OK;
}
