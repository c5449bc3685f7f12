/* dlm/chat_value.c - memory and values of chat templates, after Python's. */
#include <cjson/cJSON.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/chat_internal.h"

#define BLOCK_BYTES 16384

struct rf_chat_block {
    rf_chat_block *before;
    max_align_t data[];
};

void *rf_chat_alloc(rf_chat_pool *pool, size_t bytes) {
    pool->over_limit = bytes > RF_CHAT_MAX_BYTES || pool->total_bytes > RF_CHAT_MAX_BYTES - bytes;
    if (pool->over_limit) return NULL;
    bytes = (bytes + sizeof(max_align_t) - 1) / sizeof(max_align_t) * sizeof(max_align_t);
    if (!pool->blocks || pool->size - pool->used < bytes) {
        size_t size = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
        rf_chat_block *block = rf_alloc(sizeof *block + size);
        if (!block) return NULL;
        block->before = pool->blocks;
        pool->blocks = block;
        pool->used = 0;
        pool->size = size;
        pool->total_bytes += size;
    }
    void *p = (char *)pool->blocks->data + pool->used;
    pool->used += bytes;
    return memset(p, 0, bytes);
}

void rf_chat_pool_clear(rf_chat_pool *pool) {
    while (pool->blocks) {
        rf_chat_block *before = pool->blocks->before;
        rf_free(pool->blocks);
        pool->blocks = before;
    }
    *pool = (rf_chat_pool){0};
}

bool rf_str_is(rf_str s, const char *text) {
    return s.num == strlen(text) && memcmp(s.p, text, s.num) == 0;
}

static bool same(rf_str a, rf_str b) {
    return a.num == b.num && (a.num == 0 || memcmp(a.p, b.p, a.num) == 0);
}

/* ---- failures ---- */

rf_status rf_chat_no_memory(const rf_chat_context *x) {
    if (x->pool->over_limit) return rf_chat_refuse(x, "more than %zu MiB of memory", RF_CHAT_MAX_BYTES >> 20);
    return rf_fail(x->err, RF_ERR_MEMORY, "%s: no memory for the chat template", x->name);
}

rf_status rf_chat_refuse(const rf_chat_context *x, const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *p = text; *p; p++) {
        if ((unsigned char)*p < 0x20) *p = ' '; /* one line */
    }
    return rf_fail(x->err, RF_ERR_UNSUPPORTED, "%s: chat template, line %d: %s", x->name, x->line, text);
}

/* ---- containers ---- */

rf_status rf_value_list_new(const rf_chat_context *x, rf_value *out) {
    *out = (rf_value){.kind = RF_VALUE_LIST, .list = rf_chat_alloc(x->pool, sizeof(rf_value_list))};
    return out->list ? RF_OK : rf_chat_no_memory(x);
}

/* Keeps walks over values within the stack. A namespace is not walked into. */
static rf_status deepen(const rf_chat_context *x, int *depth, const rf_value *item) {
    int inside = item->kind == RF_VALUE_LIST || item->kind == RF_VALUE_GENERATOR ? item->list->depth + 1 : 0;
    if (item->kind == RF_VALUE_MAP && !item->map->is_namespace) inside = item->map->depth + 1;
    if (inside > *depth) *depth = inside;
    return inside > RF_CHAT_MAX_DEPTH ? rf_chat_refuse(x, "a value nested deeper than %d", RF_CHAT_MAX_DEPTH) : RF_OK;
}

rf_status rf_value_list_add(const rf_chat_context *x, rf_value_list *list, rf_value item) {
    RF_TRY(deepen(x, &list->depth, &item));
    if (list->num == list->capacity) {
        size_t capacity = list->capacity * 2 + 4;
        rf_value *items = rf_chat_alloc(x->pool, capacity * sizeof *items);
        if (!items) return rf_chat_no_memory(x);
        if (list->num) memcpy(items, list->items, list->num * sizeof *items);
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->num++] = item;
    return RF_OK;
}

rf_status rf_value_map_new(const rf_chat_context *x, rf_value *out) {
    *out = (rf_value){.kind = RF_VALUE_MAP, .map = rf_chat_alloc(x->pool, sizeof(rf_value_map))};
    return out->map ? RF_OK : rf_chat_no_memory(x);
}

rf_status rf_value_map_set(const rf_chat_context *x, rf_value_map *map, rf_str key, rf_value value) {
    RF_TRY(deepen(x, &map->depth, &value));
    for (size_t i = 0; i < map->num; i++) {
        if (!same(map->keys[i], key)) continue;
        map->values[i] = value;
        return RF_OK;
    }
    if (map->num == map->capacity) {
        size_t capacity = map->capacity * 2 + 8;
        rf_str *keys = rf_chat_alloc(x->pool, capacity * sizeof *keys);
        rf_value *values = rf_chat_alloc(x->pool, capacity * sizeof *values);
        if (!keys || !values) return rf_chat_no_memory(x);
        if (map->num) {
            memcpy(keys, map->keys, map->num * sizeof *keys);
            memcpy(values, map->values, map->num * sizeof *values);
        }
        map->keys = keys;
        map->values = values;
        map->capacity = capacity;
    }
    map->keys[map->num] = key;
    map->values[map->num++] = value;
    return RF_OK;
}

const rf_value *rf_value_map_find(const rf_value_map *map, rf_str key) {
    for (size_t i = 0; i < map->num; i++) {
        if (same(map->keys[i], key)) return &map->values[i];
    }
    return NULL;
}

static rf_status copy_string(const rf_chat_context *x, const char *text, rf_str *out) {
    size_t num = strlen(text);
    char *p = rf_chat_alloc(x->pool, num + 1);
    if (!p) return rf_chat_no_memory(x);
    memcpy(p, text, num);
    *out = (rf_str){p, num};
    return RF_OK;
}

/* Recursion is bounded by the JSON reader's limit on depth. A number without a fraction is an integer: JSON text "1.0" is not
 * told from "1". */
rf_status rf_value_from_json(const rf_chat_context *x, const rf_json_value *json, rf_value *out) {
    *out = (rf_value){.kind = RF_VALUE_NONE};
    if (!json || cJSON_IsNull(json)) return RF_OK;
    if (cJSON_IsBool(json)) {
        *out = (rf_value){.kind = RF_VALUE_BOOL, .boolean = cJSON_IsTrue(json)};
    } else if (cJSON_IsNumber(json)) {
        double d = rf_json_number(json);
        bool whole = d == floor(d) && fabs(d) <= 0x1p53;
        *out = whole ? (rf_value){.kind = RF_VALUE_INT, .integer = (int64_t)d}
                     : (rf_value){.kind = RF_VALUE_FLOAT, .number = d};
    } else if (cJSON_IsString(json)) {
        out->kind = RF_VALUE_STRING;
        return copy_string(x, rf_json_string(json), &out->string);
    } else {
        bool is_map = rf_json_is_object(json);
        RF_TRY(is_map ? rf_value_map_new(x, out) : rf_value_list_new(x, out));
        for (const rf_json_value *m = rf_json_first(json); m; m = rf_json_next(m)) {
            rf_value item;
            rf_str key;
            RF_TRY(rf_value_from_json(x, m, &item));
            if (is_map) {
                RF_TRY(copy_string(x, rf_json_key(m), &key));
                RF_TRY(rf_value_map_set(x, out->map, key, item));
            } else {
                RF_TRY(rf_value_list_add(x, out->list, item));
            }
        }
    }
    return RF_OK;
}

/* ---- what Python says of values ---- */

const char *rf_value_kind_name(const rf_value *v) {
    static const char *const names[] = {"undefined", "none",   "a boolean", "an integer",  "a float",
                                        "a string",  "a list", "a mapping", "a generator", "a function"};
    return names[v->kind];
}

bool rf_value_true(const rf_value *v) {
    switch (v->kind) {
    case RF_VALUE_UNDEFINED:
    case RF_VALUE_NONE: return false;
    case RF_VALUE_BOOL: return v->boolean;
    case RF_VALUE_INT: return v->integer != 0;
    case RF_VALUE_FLOAT: return v->number != 0;
    case RF_VALUE_STRING: return v->string.num > 0;
    case RF_VALUE_LIST: return v->list->num > 0;
    case RF_VALUE_MAP: return v->map->is_namespace || v->map->is_loop || v->map->num > 0;
    case RF_VALUE_GENERATOR:
    case RF_VALUE_FUNCTION: return true;
    }
    return false;
}

static bool is_number(const rf_value *v) {
    return v->kind >= RF_VALUE_BOOL && v->kind <= RF_VALUE_FLOAT;
}

static bool equal_numbers(const rf_value *a, const rf_value *b) {
    if (a->kind != RF_VALUE_FLOAT && b->kind != RF_VALUE_FLOAT) {
        int64_t p = a->kind == RF_VALUE_BOOL ? a->boolean : a->integer;
        return p == (b->kind == RF_VALUE_BOOL ? b->boolean : b->integer);
    }
    double p = a->kind == RF_VALUE_FLOAT ? a->number : a->kind == RF_VALUE_INT ? (double)a->integer : a->boolean;
    double q = b->kind == RF_VALUE_FLOAT ? b->number : b->kind == RF_VALUE_INT ? (double)b->integer : b->boolean;
    return p == q;
}

/* Values hold no cycles: a namespace's attribute is set to a value made before it, and namespaces compare by identity. A list
 * that holds another many times over may still take long: `left` comparisons are allowed, 0 at the end means too many; what Python
 * compares in other ways is counted as that. */
static bool equal(const rf_value *a, const rf_value *b, int64_t *left) {
    if (*left <= 0 || --*left <= 0) return false;
    if (is_number(a) && is_number(b)) return equal_numbers(a, b);
    if (a->kind != b->kind) return false;
    switch (a->kind) {
    case RF_VALUE_GENERATOR: return a->list == b->list;
    case RF_VALUE_STRING:
    case RF_VALUE_FUNCTION: return same(a->string, b->string);
    case RF_VALUE_LIST:
        if (a->list == b->list) return true;
        if (a->list->opaque || b->list->opaque) *left = 0;
        if (a->list->num != b->list->num) return false;
        for (size_t i = 0; i < a->list->num; i++) {
            if (!equal(&a->list->items[i], &b->list->items[i], left)) return false;
        }
        return true;
    case RF_VALUE_MAP:
        if (a->map == b->map) return true;
        if (a->map->is_namespace || b->map->is_namespace || a->map->num != b->map->num) return false;
        for (size_t i = 0; i < a->map->num; i++) {
            const rf_value *other = rf_value_map_find(b->map, a->map->keys[i]);
            if (!other || !equal(&a->map->values[i], other, left)) return false;
        }
        return true;
    default: return true;
    }
}

rf_status rf_value_equal(const rf_chat_context *x, const rf_value *a, const rf_value *b, bool *out) {
    int64_t left = RF_CHAT_MAX_STEPS;
    *out = equal(a, b, &left);
    return left > 0 ? RF_OK : rf_chat_refuse(x, "a comparison of these values");
}

rf_status rf_value_concat(const rf_chat_context *x, rf_str a, rf_str b, rf_str *out) {
    char *p = rf_chat_alloc(x->pool, a.num + b.num + 1);
    if (!p) return rf_chat_no_memory(x);
    if (a.num) memcpy(p, a.p, a.num);
    if (b.num) memcpy(p + a.num, b.p, b.num);
    *out = (rf_str){p, a.num + b.num};
    return RF_OK;
}

/* repr of a float: the shortest decimal that reads back the same. Out to at least 40 bytes. */
static void float_text(double d, char *out, size_t out_bytes) {
    if (!isfinite(d)) {
        snprintf(out, out_bytes, "%s", isnan(d) ? "nan" : d > 0 ? "inf" : "-inf");
        return;
    }
    int digits = 1;
    for (; digits < 17; digits++) {
        snprintf(out, out_bytes, "%.*e", digits - 1, d);
        if (strtod(out, NULL) == d) break;
    }
    snprintf(out, out_bytes, "%.*e", digits - 1, d);
    int exponent = atoi(strchr(out, 'e') + 1);
    if (exponent >= -4 && exponent < 16) {
        int decimals = digits - 1 - exponent;
        snprintf(out, out_bytes, "%.*f", decimals > 1 ? decimals : 1, d);
    }
}

rf_status rf_value_to_string(const rf_chat_context *x, const rf_value *v, rf_str *out) {
    char text[64];
    switch (v->kind) {
    case RF_VALUE_UNDEFINED: *out = (rf_str){"", 0}; return RF_OK;
    case RF_VALUE_NONE: *out = RF_STR("None"); return RF_OK;
    case RF_VALUE_BOOL: *out = v->boolean ? RF_STR("True") : RF_STR("False"); return RF_OK;
    case RF_VALUE_STRING: *out = v->string; return RF_OK;
    case RF_VALUE_INT: snprintf(text, sizeof text, "%lld", (long long)v->integer); break;
    case RF_VALUE_FLOAT: float_text(v->number, text, sizeof text); break;
    default: return rf_chat_refuse(x, "the text of %s is not supported", rf_value_kind_name(v));
    }
    return copy_string(x, text, out);
}

/* ---- JSON as Python's json.dumps(ensure_ascii=False) writes it ---- */

typedef struct {
    const rf_chat_context *x;
    char *p; /* in the pool */
    size_t num, capacity;
    int indent;
} json_writer;

static rf_status put(json_writer *w, const char *text, size_t num) {
    if (w->capacity - w->num < num) {
        size_t capacity = w->capacity * 2 + num + 256;
        char *p = rf_chat_alloc(w->x->pool, capacity);
        if (!p) return rf_chat_no_memory(w->x);
        if (w->num) memcpy(p, w->p, w->num);
        w->p = p;
        w->capacity = capacity;
    }
    if (num) memcpy(w->p + w->num, text, num);
    w->num += num;
    return RF_OK;
}

static rf_status put_json_string(json_writer *w, rf_str s) {
    RF_TRY(put(w, "\"", 1));
    for (size_t i = 0; i < s.num; i++) {
        unsigned char c = (unsigned char)s.p[i];
        static const char named[] = "\"\\\n\r\t\b\f", letters[] = "\"\\nrtbf";
        const char *at = c ? strchr(named, c) : NULL;
        char text[8] = {'\\', at ? letters[at - named] : 0};
        if (at) {
            RF_TRY(put(w, text, 2));
        } else if (c < 0x20) {
            snprintf(text, sizeof text, "\\u%04x", c);
            RF_TRY(put(w, text, 6));
        } else {
            RF_TRY(put(w, s.p + i, 1));
        }
    }
    return put(w, "\"", 1);
}

static rf_status put_line(json_writer *w, int depth) {
    if (w->indent < 0) return RF_OK;
    RF_TRY(put(w, "\n", 1));
    for (int i = 0; i < w->indent * depth; i++) RF_TRY(put(w, " ", 1));
    return RF_OK;
}

static rf_status put_json(json_writer *w, const rf_value *v, int depth) {
    rf_str text;
    if (depth > RF_CHAT_MAX_DEPTH)
        return rf_chat_refuse(w->x, "tojson of a value nested deeper than %d", RF_CHAT_MAX_DEPTH);
    switch (v->kind) {
    case RF_VALUE_NONE: return put(w, "null", 4);
    case RF_VALUE_BOOL: return v->boolean ? put(w, "true", 4) : put(w, "false", 5);
    case RF_VALUE_STRING: return put_json_string(w, v->string);
    case RF_VALUE_FLOAT:
        if (!isfinite(v->number)) return rf_chat_refuse(w->x, "tojson of a number that is not finite");
        /* fall through */
    case RF_VALUE_INT: RF_TRY(rf_value_to_string(w->x, v, &text)); return put(w, text.p, text.num);
    case RF_VALUE_LIST:
    case RF_VALUE_MAP: {
        bool is_map = v->kind == RF_VALUE_MAP;
        if (is_map ? v->map->is_namespace || v->map->is_loop : v->list->opaque) break;
        size_t num = is_map ? v->map->num : v->list->num;
        RF_TRY(put(w, is_map ? "{" : "[", 1));
        for (size_t i = 0; i < num; i++) {
            if (i) RF_TRY(put(w, ", ", w->indent < 0 ? 2 : 1));
            RF_TRY(put_line(w, depth + 1));
            if (is_map) {
                RF_TRY(put_json_string(w, v->map->keys[i]));
                RF_TRY(put(w, ": ", 2));
            }
            RF_TRY(put_json(w, is_map ? &v->map->values[i] : &v->list->items[i], depth + 1));
        }
        if (num) RF_TRY(put_line(w, depth));
        return put(w, is_map ? "}" : "]", 1);
    }
    default: break;
    }
    return rf_chat_refuse(w->x, "tojson of %s", rf_value_kind_name(v));
}

rf_status rf_value_to_json(const rf_chat_context *x, const rf_value *v, int indent, rf_str *out) {
    json_writer w = {.x = x, .indent = indent};
    RF_TRY(put_json(&w, v, 0));
    *out = (rf_str){w.p, w.num};
    return RF_OK;
}
