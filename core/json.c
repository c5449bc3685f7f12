/* core/json.c - cJSON behind a scan that refuses what would be expensive or ambiguous.
 *
 * Pitfalls of cJSON that are handled here
 *   - it reads one byte past a text without a closing zero: it is always given a zero-terminated copy;
 *   - nesting recurses and every value is an allocation: depth and number of values are counted before parsing;
 *   - "\u0000" would cut a string short: refused;
 *   - its last error and its allocation hooks are process-wide: a lock around parsing, and hooks that give blocks which
 *     free() takes as well (memory.c), so that another user of cJSON in the same process is not disturbed. */
#include "core/json_internal.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"

#define MAX_TEXT_BYTES ((size_t)64 << 20)
#define MAX_DEPTH      64
#define MAX_VALUES     4000000

struct rf_json {
    cJSON *root;
    char name[]; /* for messages */
};

/* ---- parsing ---- */

static pthread_mutex_t parse_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t hooks_once = PTHREAD_ONCE_INIT;
static _Thread_local bool out_of_memory; /* cJSON says NULL for bad text and for no memory alike */

static void *hook_alloc(size_t bytes) {
    void *p = rf_alloc(bytes);
    if (!p) out_of_memory = true;
    return p;
}

static void install_hooks(void) {
    cJSON_Hooks hooks = {.malloc_fn = hook_alloc, .free_fn = rf_free};
    cJSON_InitHooks(&hooks);
}

size_t rf_utf8_sequence(const char *p, size_t left) {
    const unsigned char *s = (const unsigned char *)p;
    if (left == 0) return 0;
    if (s[0] < 0x80) return 1;
    size_t len = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    uint32_t code = s[0] & (0x7fu >> len);
    if (s[0] < 0xc2 || s[0] > 0xf4 || left < len) return 0;
    for (size_t i = 1; i < len; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
        code = (code << 6) | (s[i] & 0x3f);
    }
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < least[len] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return 0;
    return len;
}

/* One pass over the raw text: depth, number of values, and the inside of strings. */
static rf_status scan(const char *text, size_t text_bytes, const char *name, rf_error *err) {
    size_t depth = 0, num_values = 1;
    bool in_string = false;
    for (size_t i = 0; i < text_bytes;) {
        unsigned char c = (unsigned char)text[i];
        if (!in_string) {
            if (c == '"') in_string = true;
            if (c == '[' || c == '{') depth++;
            if ((c == ']' || c == '}') && depth > 0) depth--;
            if (c == ',' || c == '[' || c == '{') num_values++;
            if (depth > MAX_DEPTH) {
                return rf_fail(err, RF_ERR_FORMAT, "%s: byte %zu: nested deeper than %d levels", name, i, MAX_DEPTH);
            }
            if (num_values > MAX_VALUES) {
                return rf_fail(err, RF_ERR_FORMAT, "%s: byte %zu: more than %d values", name, i, MAX_VALUES);
            }
            i++;
        } else if (c == '"') {
            in_string = false;
            i++;
        } else if (c == '\\') {
            if (text_bytes - i >= 6 && memcmp(text + i, "\\u0000", 6) == 0) {
                return rf_fail(err, RF_ERR_FORMAT, "%s: byte %zu: a zero character inside a string", name, i);
            }
            i += 2;
        } else {
            size_t len = rf_utf8_sequence(text + i, text_bytes - i);
            if (len == 0 || c < 0x20) {
                return rf_fail(err, RF_ERR_FORMAT, "%s: byte %zu: a string that is not valid UTF-8 text (byte 0x%02x)",
                               name, i, c);
            }
            i += len;
        }
    }
    return RF_OK;
}

/* Python's json writes infinities as bare words, and configs in the wild hold them (lambda_min_clipped: -Infinity). They
 * become numbers too large for a double, of the same length. NaN stays refused. */
static void spell_out_infinities(char *text, size_t text_bytes) {
    static const char word[] = "Infinity", number[] = "1e999   ";
    const size_t word_len = sizeof word - 1;
    bool in_string = false;
    for (size_t i = 0; i < text_bytes; i++) {
        if (text[i] == '"') in_string = !in_string;
        if (in_string && text[i] == '\\') i++;
        if (in_string || text[i] != 'I' || text_bytes - i < word_len || memcmp(text + i, word, word_len) != 0) continue;
        size_t start = i > 0 && text[i - 1] == '-' ? i - 1 : i;
        if (start > 0 && strchr(" \t\r\n:,[", text[start - 1])) memcpy(text + i, number, word_len);
    }
}

/* text[text_bytes] is a zero byte; text is changed. */
static rf_status parse_terminated(rf_json **out, char *text, size_t text_bytes, const char *name, rf_error *err) {
    rf_status st = scan(text, text_bytes, name, err);
    if (st != RF_OK) return st;
    spell_out_infinities(text, text_bytes);

    size_t name_bytes = strlen(name) + 1;
    rf_json *doc = rf_alloc(sizeof *doc + name_bytes);
    if (!doc) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory", name);
    memcpy(doc->name, name, name_bytes);

    const char *end = text;
    pthread_once(&hooks_once, install_hooks);
    pthread_mutex_lock(&parse_lock);
    out_of_memory = false;
    doc->root = cJSON_ParseWithLengthOpts(text, text_bytes + 1, &end, true);
    pthread_mutex_unlock(&parse_lock);
    if (!doc->root) {
        if (out_of_memory) {
            st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu bytes of JSON", name, text_bytes);
        } else {
            size_t at = end >= text && end <= text + text_bytes ? (size_t)(end - text) : 0;
            st = rf_fail(err, RF_ERR_FORMAT, "%s: byte %zu of %zu: not valid JSON", name, at, text_bytes);
        }
        rf_free(doc);
        return st;
    }
    *out = doc;
    return RF_OK;
}

static rf_status check_text_bytes(size_t text_bytes, const char *name, rf_error *err) {
    if (text_bytes <= MAX_TEXT_BYTES) return RF_OK;
    return rf_fail(err, RF_ERR_FORMAT, "%s: %zu bytes of JSON, the limit is %zu", name, text_bytes, MAX_TEXT_BYTES);
}

rf_status rf_json_parse(rf_json **out, const char *text, size_t text_bytes, const char *name, rf_error *err) {
    *out = NULL;
    rf_status st = check_text_bytes(text_bytes, name, err);
    if (st != RF_OK) return st;
    char *copy = rf_alloc(text_bytes + 1);
    if (!copy) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu bytes of JSON", name, text_bytes);
    if (text_bytes) memcpy(copy, text, text_bytes);
    copy[text_bytes] = 0;
    st = parse_terminated(out, copy, text_bytes, name, err);
    rf_free(copy);
    return st;
}

rf_status rf_json_open(rf_json **out, const char *path, rf_error *err) {
    *out = NULL;
    char *text = NULL;
    size_t text_bytes = 0;
    rf_status st = rf_file_read(path, MAX_TEXT_BYTES, &text, &text_bytes, err);
    if (st != RF_OK) return st;
    st = parse_terminated(out, text, text_bytes, path, err);
    rf_free(text);
    return st;
}

void rf_json_close(rf_json *doc) {
    if (!doc) return;
    cJSON_Delete(doc->root);
    rf_free(doc);
}

const rf_json_value *rf_json_root(const rf_json *doc) {
    return doc->root;
}
const char *rf_json_name(const rf_json *doc) {
    return doc->name;
}

/* ---- getters ---- */

const rf_json_value *rf_json_get(const rf_json_value *object, const char *key) {
    return cJSON_IsObject(object) ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;
}

bool rf_json_has(const rf_json_value *object, const char *key) {
    const rf_json_value *v = rf_json_get(object, key);
    return v && !cJSON_IsNull(v);
}

static const char *type_name(const rf_json_value *v) {
    if (cJSON_IsNull(v)) return "null";
    if (cJSON_IsBool(v)) return "true or false";
    if (cJSON_IsNumber(v)) return "a number";
    if (cJSON_IsString(v)) return "a string";
    if (cJSON_IsArray(v)) return "an array";
    return "an object";
}

static rf_status fail_missing(const rf_json *doc, const char *key, rf_error *err) {
    return rf_fail(err, RF_ERR_MISSING, "%s: key '%s' is missing", doc->name, key);
}

static rf_status fail_type(const rf_json *doc, const char *key, const char *wanted, const rf_json_value *v,
                           rf_error *err) {
    return rf_fail(err, RF_ERR_CONFIG, "%s: '%s' must be %s, found %s", doc->name, key, wanted, type_name(v));
}

rf_status rf_json_get_int(const rf_json *doc, const rf_json_value *object, const char *key, int64_t min, int64_t max,
                          int64_t *out, rf_error *err) {
    if (!rf_json_has(object, key)) return fail_missing(doc, key, err);
    const rf_json_value *v = rf_json_get(object, key);
    if (!cJSON_IsNumber(v)) return fail_type(doc, key, "a whole number", v, err);
    double d = v->valuedouble;
    /* Beyond 2^53 a double no longer holds every whole number, so what the file says is not known. */
    if (!(d >= -0x1p53 && d <= 0x1p53) || d != floor(d)) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: '%s' must be a whole number, found %.17g", doc->name, key, d);
    }
    int64_t i = (int64_t)d;
    if (i < min || i > max) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: '%s' must be %lld to %lld, found %lld", doc->name, key, (long long)min,
                       (long long)max, (long long)i);
    }
    *out = i;
    return RF_OK;
}

rf_status rf_json_get_double(const rf_json *doc, const rf_json_value *object, const char *key, double min, double max,
                             double *out, rf_error *err) {
    if (!rf_json_has(object, key)) return fail_missing(doc, key, err);
    const rf_json_value *v = rf_json_get(object, key);
    if (!cJSON_IsNumber(v)) return fail_type(doc, key, "a number", v, err);
    double d = v->valuedouble;
    if (!(d >= min && d <= max) || !isfinite(d)) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: '%s' must be %g to %g, found %g", doc->name, key, min, max, d);
    }
    *out = d;
    return RF_OK;
}

rf_status rf_json_get_bool(const rf_json *doc, const rf_json_value *object, const char *key, bool *out, rf_error *err) {
    if (!rf_json_has(object, key)) return fail_missing(doc, key, err);
    const rf_json_value *v = rf_json_get(object, key);
    if (!cJSON_IsBool(v)) return fail_type(doc, key, "true or false", v, err);
    *out = cJSON_IsTrue(v);
    return RF_OK;
}

rf_status rf_json_get_string(const rf_json *doc, const rf_json_value *object, const char *key, const char **out,
                             rf_error *err) {
    if (!rf_json_has(object, key)) return fail_missing(doc, key, err);
    const rf_json_value *v = rf_json_get(object, key);
    if (!cJSON_IsString(v)) return fail_type(doc, key, "a string", v, err);
    *out = v->valuestring;
    return RF_OK;
}

rf_status rf_json_opt_int(const rf_json *doc, const rf_json_value *object, const char *key, int64_t min, int64_t max,
                          int64_t absent, int64_t *out, rf_error *err) {
    if (rf_json_has(object, key)) return rf_json_get_int(doc, object, key, min, max, out, err);
    *out = absent;
    return RF_OK;
}

rf_status rf_json_opt_double(const rf_json *doc, const rf_json_value *object, const char *key, double min, double max,
                             double absent, double *out, rf_error *err) {
    if (rf_json_has(object, key)) return rf_json_get_double(doc, object, key, min, max, out, err);
    *out = absent;
    return RF_OK;
}

rf_status rf_json_opt_bool(const rf_json *doc, const rf_json_value *object, const char *key, bool absent, bool *out,
                           rf_error *err) {
    if (rf_json_has(object, key)) return rf_json_get_bool(doc, object, key, out, err);
    *out = absent;
    return RF_OK;
}

rf_status rf_json_opt_string(const rf_json *doc, const rf_json_value *object, const char *key, const char *absent,
                             const char **out, rf_error *err) {
    if (rf_json_has(object, key)) return rf_json_get_string(doc, object, key, out, err);
    *out = absent;
    return RF_OK;
}

/* ---- walking ---- */

static bool is_container(const rf_json_value *v) {
    return cJSON_IsArray(v) || cJSON_IsObject(v);
}

size_t rf_json_count(const rf_json_value *array_or_object) {
    size_t n = 0;
    for (const rf_json_value *v = rf_json_first(array_or_object); v; v = v->next) n++;
    return n;
}

const rf_json_value *rf_json_at(const rf_json_value *array_or_object, size_t index, const char **key) {
    const rf_json_value *v = rf_json_first(array_or_object);
    while (v && index-- > 0) v = v->next;
    if (key) *key = v ? v->string : NULL;
    return v;
}

const rf_json_value *rf_json_first(const rf_json_value *array_or_object) {
    return is_container(array_or_object) ? array_or_object->child : NULL;
}
const rf_json_value *rf_json_next(const rf_json_value *member) {
    return member->next;
}
const char *rf_json_key(const rf_json_value *member) {
    return member->string;
}

bool rf_json_is_object(const rf_json_value *v) {
    return cJSON_IsObject(v);
}
bool rf_json_is_array(const rf_json_value *v) {
    return cJSON_IsArray(v);
}
bool rf_json_is_string(const rf_json_value *v) {
    return cJSON_IsString(v);
}
bool rf_json_is_number(const rf_json_value *v) {
    return cJSON_IsNumber(v);
}
const char *rf_json_string(const rf_json_value *v) {
    return cJSON_IsString(v) ? v->valuestring : NULL;
}
double rf_json_number(const rf_json_value *v) {
    return cJSON_IsNumber(v) ? v->valuedouble : (double)NAN;
}
