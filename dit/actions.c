/* dit/actions.c - rows of actions from text, JSON and CSV.
 *
 * Every form ends in add_rows, which owns the limit on rows. Messages say where a wrong word stands: element of the text, element of
 * the JSON array, line and column of the table. Time is linear in the input times the number of names. */
#include "dit/actions.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/text.h"

#define MAX_FILE_BYTES ((size_t)16 << 20)
#define MAX_COLUMNS    4096
#define SHOWN_BYTES    40  /* of a wrong word in a message */
#define LIST_BYTES     240 /* of a list of names in a message */

enum { NOT_FOUND = -1, REST = -2 }; /* REST: "none" for a model that names no such action, a row of zeros */

typedef struct {
    const char *bytes;
    size_t len;
} span;

typedef struct {
    const rf_action_names *names;
    const char *source; /* stands in messages */
    float *rows;
    float *row; /* [dim] the one being made */
    size_t num, cap;
    rf_status bad; /* of what is wrong with the list: ARGUMENT for text, FORMAT for a file */
    rf_error *err;
} builder;

/* ---- words ---- */

/* A word from the input for a message: one line, cut. */
static void show(char out[SHOWN_BYTES + 8], span word) {
    size_t len = word.len < SHOWN_BYTES ? word.len : SHOWN_BYTES;
    /* never the first bytes of a UTF-8 character without its last */
    while (len < word.len && len > 0 && ((unsigned char)word.bytes[len] & 0xc0) == 0x80) len--;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)word.bytes[i];
        out[i] = c < 32 || c == 127 ? '?' : (char)c;
    }
    memcpy(out + len, len < word.len ? "..." : "", len < word.len ? 4 : 1);
}

static span trim(span s) {
    while (s.len > 0 && isspace((unsigned char)s.bytes[0])) s.bytes++, s.len--;
    while (s.len > 0 && isspace((unsigned char)s.bytes[s.len - 1])) s.len--;
    return s;
}

static bool equals(span s, const char *word) {
    return strlen(word) == s.len && memcmp(s.bytes, word, s.len) == 0;
}

static int find_exactly(const rf_action_names *names, span word) {
    for (int i = 0; i < names->dim; i++) {
        if (names->names[i] && equals(word, names->names[i])) return i;
    }
    return NOT_FOUND;
}

/* "none" and "noop" stand for each other. */
static int find_name(const rf_action_names *names, span word) {
    int found = find_exactly(names, word);
    if (found != NOT_FOUND || !(equals(word, "none") || equals(word, "noop"))) return found;
    found = find_exactly(names, (span){equals(word, "none") ? "noop" : "none", 4});
    return found == NOT_FOUND ? REST : found;
}

static void list_names(const rf_action_names *names, char out[LIST_BYTES]) {
    size_t used = 0;
    out[0] = 0;
    for (int i = 0; i < names->dim; i++) {
        if (!names->names[i]) continue;
        char shown[SHOWN_BYTES + 8];
        show(shown, (span){names->names[i], strlen(names->names[i])});
        if (used + strlen(shown) + 8 > LIST_BYTES) {
            snprintf(out + used, LIST_BYTES - used, ", ...");
            return;
        }
        used += (size_t)snprintf(out + used, LIST_BYTES - used, "%s%s", used ? ", " : "", shown);
    }
}

/* where: "element 3", "line 1, column 2". */
static rf_status unknown_name(const builder *b, const char *where, span word) {
    const char *best = NULL;
    int best_distance = INT_MAX;
    for (int i = 0; i < b->names->dim; i++) {
        const char *name = b->names->names[i];
        if (!name) continue;
        int distance = rf_text_distance(word.bytes, word.len, name, strlen(name));
        if (distance <= 3 && (size_t)distance * 2 <= word.len && distance < best_distance) {
            best = name;
            best_distance = distance;
        }
    }
    char shown[SHOWN_BYTES + 8], list[LIST_BYTES];
    show(shown, word);
    if (best) {
        char near[SHOWN_BYTES + 8];
        show(near, (span){best, strlen(best)});
        return rf_fail(b->err, b->bad, "%s: %s: no action '%s'; did you mean %s?", b->source, where, shown, near);
    }
    list_names(b->names, list);
    return rf_fail(b->err, b->bad, "%s: %s: no action '%s'; the model's: %s", b->source, where, shown,
                   list[0] ? list : "(none has a name)");
}

static rf_status not_a_number(const builder *b, const char *where, span word) {
    char shown[SHOWN_BYTES + 8];
    show(shown, word);
    return rf_fail(b->err, b->bad, "%s: %s: expected a finite number, found '%s'", b->source, where, shown);
}

static bool read_number(span word, float *out) {
    char digits[64], *end = NULL;
    if (word.len == 0 || word.len >= sizeof digits) return false;
    memcpy(digits, word.bytes, word.len);
    digits[word.len] = 0;
    double v = strtod(digits, &end);
    *out = (float)v;
    return end == digits + word.len && isfinite(v) && isfinite(*out);
}

/* ---- rows ---- */

static void clear_row(const builder *b) {
    memset(b->row, 0, (size_t)b->names->dim * sizeof *b->row);
}

/* b->row, `count` times. */
static rf_status add_rows(builder *b, const char *where, size_t count) {
    size_t dim = (size_t)b->names->dim;
    if (count > RF_MAX_ACTIONS - b->num) {
        return rf_fail(b->err, b->bad, "%s: %s: more than %d actions, the most of one list", b->source, where,
                       RF_MAX_ACTIONS);
    }
    if (b->num + count > b->cap) {
        size_t cap = b->cap * 2 > b->num + count ? b->cap * 2 : b->num + count;
        if (cap < 64) cap = 64;
        float *grown = cap <= SIZE_MAX / sizeof *grown / dim ? rf_realloc(b->rows, cap * dim * sizeof *grown) : NULL;
        if (!grown) return rf_fail(b->err, RF_ERR_MEMORY, "%s: no memory for %zu actions", b->source, cap);
        b->rows = grown;
        b->cap = cap;
    }
    for (size_t i = 0; i < count; i++) memcpy(b->rows + (b->num + i) * dim, b->row, dim * sizeof *b->row);
    b->num += count;
    return RF_OK;
}

/* ---- text ---- */

/* "forward" or "cameraX=-0.5" into the row. */
static rf_status read_part(const builder *b, const char *where, span part) {
    float value = 1;
    int found = find_name(b->names, part);
    const char *sign = found == NOT_FOUND ? memchr(part.bytes, '=', part.len) : NULL;
    if (sign) {
        span name = trim((span){part.bytes, (size_t)(sign - part.bytes)});
        span number = trim((span){sign + 1, part.len - (size_t)(sign + 1 - part.bytes)});
        found = find_name(b->names, name);
        if (found == NOT_FOUND) return unknown_name(b, where, name);
        if (!read_number(number, &value)) return not_a_number(b, where, number);
    }
    if (found == NOT_FOUND) return unknown_name(b, where, part);
    if (found >= 0) b->row[found] = value;
    return RF_OK;
}

/* "left+forward" into the row. */
static rf_status read_parts(const builder *b, const char *where, span parts) {
    clear_row(b);
    if (parts.len > 0 && find_exactly(b->names, parts) != NOT_FOUND) return read_part(b, where, parts);
    for (;;) {
        const char *plus = parts.len > 0 ? memchr(parts.bytes, '+', parts.len) : NULL;
        span part = trim((span){parts.bytes, plus ? (size_t)(plus - parts.bytes) : parts.len});
        if (part.len == 0)
            return rf_fail(b->err, b->bad, "%s: %s: expected an action, found nothing", b->source, where);
        RF_TRY(read_part(b, where, part));
        if (!plus) return RF_OK;
        parts.len -= (size_t)(plus + 1 - parts.bytes);
        parts.bytes = plus + 1;
    }
}

static rf_status read_count(const builder *b, const char *where, span digits, size_t *out) {
    size_t count = 0;
    bool good = digits.len > 0;
    for (size_t i = 0; i < digits.len && good; i++) {
        good = isdigit((unsigned char)digits.bytes[i]) != 0;
        /* saturates over the limit: that is add_rows' message */
        if (good && count <= RF_MAX_ACTIONS) count = count * 10 + (size_t)(digits.bytes[i] - '0');
    }
    if (!good || count == 0) {
        char shown[SHOWN_BYTES + 8];
        show(shown, digits);
        return rf_fail(b->err, b->bad, "%s: %s: expected a count from 1 after '*', found '%s'", b->source, where,
                       shown);
    }
    *out = count;
    return RF_OK;
}

/* "left+forward*4" into the row and a count. */
static rf_status read_element(const builder *b, const char *where, span element, size_t *count) {
    const char *star = NULL;
    *count = 1;
    for (size_t i = element.len; i > 0 && !star; i--) {
        if (element.bytes[i - 1] == '*') star = element.bytes + i - 1;
    }
    if (star && find_exactly(b->names, element) == NOT_FOUND) {
        span digits = trim((span){star + 1, element.len - (size_t)(star + 1 - element.bytes)});
        RF_TRY(read_count(b, where, digits, count));
        element = trim((span){element.bytes, (size_t)(star - element.bytes)});
    }
    return read_parts(b, where, element);
}

static rf_status parse_text(builder *b, span text) {
    char where[48];
    for (size_t index = 1;; index++) {
        const char *comma = text.len > 0 ? memchr(text.bytes, ',', text.len) : NULL;
        size_t count;
        snprintf(where, sizeof where, "element %zu", index);
        span element = trim((span){text.bytes, comma ? (size_t)(comma - text.bytes) : text.len});
        RF_TRY(read_element(b, where, element, &count));
        RF_TRY(add_rows(b, where, count));
        if (!comma) return RF_OK;
        text.len -= (size_t)(comma + 1 - text.bytes);
        text.bytes = comma + 1;
    }
}

/* ---- JSON ---- */

static rf_status json_number(const builder *b, const char *where, const rf_json_value *v, float *out) {
    double d = rf_json_number(v);
    *out = (float)d;
    if (rf_json_is_number(v) && isfinite(*out)) return RF_OK;
    return rf_fail(b->err, b->bad, "%s: %s: expected a finite number", b->source, where);
}

static rf_status json_array_row(const builder *b, const char *where, const rf_json_value *array) {
    size_t count = rf_json_count(array), i = 0;
    if (count != (size_t)b->names->dim) {
        return rf_fail(b->err, b->bad, "%s: %s: expected %d numbers, one for each place of an action, found %zu",
                       b->source, where, b->names->dim, count);
    }
    for (const rf_json_value *v = rf_json_first(array); v; v = rf_json_next(v))
        RF_TRY(json_number(b, where, v, &b->row[i++]));
    return RF_OK;
}

static rf_status json_object_row(const builder *b, const char *where, const rf_json_value *object) {
    for (const rf_json_value *v = rf_json_first(object); v; v = rf_json_next(v)) {
        const char *key = rf_json_key(v);
        span name = {key ? key : "", key ? strlen(key) : 0};
        int found = find_name(b->names, name);
        float value;
        if (found == NOT_FOUND) return unknown_name(b, where, name);
        RF_TRY(json_number(b, where, v, &value));
        if (found >= 0) b->row[found] = value;
    }
    return RF_OK;
}

/* A name (or what the text form takes as one element), an object or an array; `repeat` times. */
static rf_status json_rows(builder *b, const char *where, const rf_json_value *v, size_t repeat) {
    size_t count = 1;
    clear_row(b);
    if (rf_json_is_string(v)) {
        const char *text = rf_json_string(v);
        RF_TRY(read_element(b, where, trim((span){text, strlen(text)}), &count));
    } else if (rf_json_is_array(v)) {
        RF_TRY(json_array_row(b, where, v));
    } else if (rf_json_is_object(v)) {
        RF_TRY(json_object_row(b, where, v));
    } else {
        return rf_fail(b->err, b->bad, "%s: %s: expected a name, an object of names or an array of %d numbers",
                       b->source, where, b->names->dim);
    }
    return add_rows(b, where, count * repeat); /* both at most 10 * RF_MAX_ACTIONS */
}

/* {"action": ..., "repeat": n} */
static rf_status json_repeated(builder *b, const char *where, const rf_json_value *object) {
    double repeat = 1;
    for (const rf_json_value *v = rf_json_first(object); v; v = rf_json_next(v)) {
        const char *key = rf_json_key(v);
        if (key && strcmp(key, "repeat") == 0) {
            repeat = rf_json_number(v);
            if (!(repeat >= 1 && repeat <= RF_MAX_ACTIONS && repeat == floor(repeat)))
                return rf_fail(b->err, b->bad, "%s: %s: \"repeat\": expected a whole number 1..%d", b->source, where,
                               RF_MAX_ACTIONS);
        } else if (!key || strcmp(key, "action") != 0) {
            char shown[SHOWN_BYTES + 8];
            show(shown, (span){key ? key : "", key ? strlen(key) : 0});
            return rf_fail(b->err, b->bad, "%s: %s: expected \"action\" and \"repeat\", found \"%s\"", b->source, where,
                           shown);
        }
    }
    return json_rows(b, where, rf_json_get(object, "action"), (size_t)repeat);
}

static rf_status parse_json(builder *b, span text) {
    rf_json *doc = NULL;
    RF_TRY(rf_json_parse(&doc, text.bytes, text.len, b->source, b->err));
    const rf_json_value *list = rf_json_root(doc);
    rf_status st = RF_OK;
    size_t index = 0;
    char where[48];
    if (rf_json_is_object(list)) list = rf_json_get(list, "actions");
    if (!list || !rf_json_is_array(list)) {
        st = rf_fail(b->err, b->bad, "%s: expected an array of actions, or an object with such an array as \"actions\"",
                     b->source);
    }
    for (const rf_json_value *v = st == RF_OK ? rf_json_first(list) : NULL; v && st == RF_OK; v = rf_json_next(v)) {
        snprintf(where, sizeof where, "element %zu", ++index);
        bool repeated = rf_json_is_object(v) && rf_json_has(v, "action");
        st = repeated ? json_repeated(b, where, v) : json_rows(b, where, v, 1);
    }
    rf_json_close(doc);
    return st;
}

/* ---- CSV (RFC 4180, fields on one line) ---- */

/* Takes the next field of a line. Quoted: unescaped into `text`, which is as long as the line. False if a quote is not closed or
 * something follows it. */
static bool take_field(span *line, char *text, span *field, bool *last) {
    span s = *line;
    while (s.len > 0 && (s.bytes[0] == ' ' || s.bytes[0] == '\t')) s.bytes++, s.len--;
    if (s.len == 0 || s.bytes[0] != '"') {
        const char *comma = s.len > 0 ? memchr(s.bytes, ',', s.len) : NULL;
        size_t len = comma ? (size_t)(comma - s.bytes) : s.len;
        *field = trim((span){s.bytes, len});
        *last = !comma;
        line->bytes = s.bytes + len + (comma ? 1 : 0);
        line->len = s.len - len - (comma ? 1 : 0);
        return true;
    }
    size_t i = 1, used = 0;
    for (;; i++) {
        if (i >= s.len) return false;
        if (s.bytes[i] == '"' && (i + 1 >= s.len || s.bytes[i + 1] != '"')) break;
        if (s.bytes[i] == '"') i++;
        text[used++] = s.bytes[i];
    }
    i++;
    while (i < s.len && (s.bytes[i] == ' ' || s.bytes[i] == '\t')) i++;
    if (i < s.len && s.bytes[i] != ',') return false;
    *field = trim((span){text, used});
    *last = i >= s.len;
    line->bytes = s.bytes + i + (*last ? 0 : 1);
    line->len = s.len - i - (*last ? 0 : 1);
    return true;
}

typedef struct {
    int *places; /* [num]: place in the row, REST for a column that counts nothing, NOT_FOUND for one without a name */
    int num;
    char *field; /* room for an unescaped field */
} table;

static rf_status csv_field(const builder *b, const table *t, span *line, size_t line_number, int column, span *field,
                           bool *last) {
    if (take_field(line, t->field, field, last)) return RF_OK;
    return rf_fail(b->err, b->bad, "%s: line %zu, column %d: a quote that does not end with the field", b->source,
                   line_number, column + 1);
}

static rf_status csv_header(const builder *b, table *t, span line, size_t line_number) {
    bool last = false, any = false;
    char where[64];
    for (t->num = 0; !last; t->num++) {
        span field;
        int found = NOT_FOUND;
        if (t->num == MAX_COLUMNS) return rf_fail(b->err, b->bad, "%s: more than %d columns", b->source, MAX_COLUMNS);
        RF_TRY(csv_field(b, t, &line, line_number, t->num, &field, &last));
        snprintf(where, sizeof where, "line %zu, column %d", line_number, t->num + 1);
        if (field.len > 0) {
            found = find_name(b->names, field);
            if (found == NOT_FOUND) return unknown_name(b, where, field);
            any = true;
        }
        for (int i = 0; i < t->num && found != NOT_FOUND; i++) {
            if (t->places[i] != found) continue;
            char shown[SHOWN_BYTES + 8];
            show(shown, field);
            return rf_fail(b->err, b->bad, "%s: %s: '%s' is named twice", b->source, where, shown);
        }
        t->places[t->num] = found;
    }
    if (any) return RF_OK;
    return rf_fail(b->err, b->bad, "%s: line %zu: expected the names of actions", b->source, line_number);
}

static rf_status csv_row(builder *b, const table *t, span line, size_t line_number) {
    bool last = false;
    char where[64];
    clear_row(b);
    for (int column = 0; !last; column++) {
        span field;
        float value;
        RF_TRY(csv_field(b, t, &line, line_number, column, &field, &last));
        if (field.len == 0) continue;
        snprintf(where, sizeof where, "line %zu, column %d", line_number, column + 1);
        if (column >= t->num || t->places[column] == NOT_FOUND)
            return rf_fail(b->err, b->bad, "%s: %s: a value in a column without a name", b->source, where);
        if (!read_number(field, &value)) return not_a_number(b, where, field);
        if (t->places[column] >= 0) b->row[t->places[column]] = value;
    }
    snprintf(where, sizeof where, "line %zu", line_number);
    return add_rows(b, where, 1);
}

static rf_status parse_csv(builder *b, span text) {
    table t = {0};
    rf_status st = RF_OK;
    size_t longest = 0, line_number = 0;
    if (text.len >= 3 && memcmp(text.bytes, "\xef\xbb\xbf", 3) == 0) text.bytes += 3, text.len -= 3;
    for (span s = text; s.len > 0;) { /* the longest line is room enough for any field */
        const char *end = memchr(s.bytes, '\n', s.len);
        size_t len = end ? (size_t)(end - s.bytes) : s.len;
        if (len > longest) longest = len;
        s.bytes += len + (end ? 1 : 0);
        s.len -= len + (end ? 1 : 0);
    }
    t.places = rf_alloc(MAX_COLUMNS * sizeof *t.places);
    t.field = rf_alloc(longest + 1);
    if (!t.places || !t.field) st = rf_fail(b->err, RF_ERR_MEMORY, "%s: no memory for a table", b->source);
    while (text.len > 0 && st == RF_OK) {
        const char *end = memchr(text.bytes, '\n', text.len);
        size_t len = end ? (size_t)(end - text.bytes) : text.len;
        span line = trim((span){text.bytes, len});
        line_number++;
        if (line.len > 0) st = t.num == 0 ? csv_header(b, &t, line, line_number) : csv_row(b, &t, line, line_number);
        text.bytes += len + (end ? 1 : 0);
        text.len -= len + (end ? 1 : 0);
    }
    rf_free(t.places);
    rf_free(t.field);
    return st;
}

/* ---- the calls ---- */

static bool ends_with(const char *text, const char *ending) {
    size_t len = strlen(text), ending_len = strlen(ending);
    return len > ending_len && strcasecmp(text + len - ending_len, ending) == 0;
}

rf_status rf_actions_parse_memory(float **out, int *num, const char *bytes, size_t num_bytes, const char *name,
                                  const rf_action_names *names, rf_error *err) {
    *out = NULL;
    *num = 0;
    if (names->dim < 1) return rf_fail(err, RF_ERR_ARGUMENT, "%s: the model takes no actions", name);
    if (num_bytes > MAX_FILE_BYTES) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: %zu bytes, the limit of an action list is %zu", name, num_bytes,
                       MAX_FILE_BYTES);
    }
    bool json = ends_with(name, ".json"), csv = ends_with(name, ".csv");
    builder b = {.names = names, .source = name, .bad = json || csv ? RF_ERR_FORMAT : RF_ERR_ARGUMENT, .err = err};
    b.row = rf_alloc_zero((size_t)names->dim, sizeof *b.row);
    if (!b.row) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for an action of %d numbers", name, names->dim);
    span text = {bytes, num_bytes};
    rf_status st = json ? parse_json(&b, text) : csv ? parse_csv(&b, text) : parse_text(&b, text);
    if (st == RF_OK && b.num == 0) st = rf_fail(err, b.bad, "%s: holds no action", name);
    if (st == RF_OK) {
        *out = b.rows;
        *num = (int)b.num;
        b.rows = NULL;
    }
    rf_free(b.rows);
    rf_free(b.row);
    return st;
}

rf_status rf_actions_parse(float **out, int *num, const char *text, const rf_action_names *names, rf_error *err) {
    *out = NULL;
    *num = 0;
    if (!ends_with(text, ".json") && !ends_with(text, ".csv"))
        return rf_actions_parse_memory(out, num, text, strlen(text), "actions", names, err);
    char *bytes = NULL;
    size_t num_bytes = 0;
    RF_TRY(rf_file_read(text, MAX_FILE_BYTES, &bytes, &num_bytes, err));
    rf_status st = rf_actions_parse_memory(out, num, bytes, num_bytes, text, names, err);
    rf_free(bytes);
    return st;
}
