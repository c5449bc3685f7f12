/* dlm/tokenizer_split.c - the pre-tokenizer: patterns in PCRE2, and how their matches become words.
 *
 * Patterns are written for Oniguruma (Ruby syntax, UTF-8) and translated. What differs, and what is done about it:
 *   \s \S        PCRE2 counts U+180E as a space and Oniguruma does not: spelt out as the White_Space property
 *   \p{..}       PCRE2 may know an older Unicode than the library's 16: what 15 and 16 added is spelt out
 *   \d           \p{Nd}
 *   {n,m}+       possessive in PCRE2, a repeat of a repeat in Oniguruma: refused; so are other doubled quantifiers
 *   ^ $          Oniguruma's match at every line
 *   (?i)         reaches to the end of its group in one and makes an alternation its own group in the other: refused;
 *                (?i:...) is read if no pair of letters inside folds to one character (ss, ff, fi, fl, st)
 * Anything else that the two could read differently is refused by name. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/tokenizer_internal.h"

#define MAX_PATTERN     65536
#define LEAST_MATCH_MAX 10000000u /* PCRE2's own default */

/* ---- memory of PCRE2 ---- */

static void *pcre_alloc(size_t bytes, void *data) {
    (void)data;
    return rf_alloc(bytes);
}
static void pcre_free(void *p, void *data) {
    (void)data;
    rf_free(p);
}

/* ---- translation ---- */

#define SPACES                                                                                                         \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACES                                                                                                     \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}" \
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{d7ff}\\x{e000}-\\x{10ffff}"

typedef struct {
    const char *pattern, *where;
    size_t num, at;
    rf_text out;
    int depth, fold_depth; /* open groups; the depth at which (?i: opened, 0 if none */
    char last_literal;     /* under (?i: */
    rf_error *err;
} translation;

static rf_status refuse(translation *t, const char *what) {
    return rf_fail(t->err, RF_ERR_UNSUPPORTED, "%s: the pattern has %s at byte %zu, which is not supported: %.120s",
                   t->where, what, t->at, t->pattern);
}

static rf_status put(translation *t, const char *text) {
    return rf_text_append(&t->out, text, strlen(text), t->err);
}

static rf_status put_code(translation *t, uint32_t code) {
    char text[16];
    snprintf(text, sizeof text, "\\x{%x}", (unsigned)code);
    return put(t, text);
}

/* The category `name` of characters that PCRE2 may not know: "L" stands for all of L. */
static rf_status put_new_codes(translation *t, const char *name) {
    size_t num;
    const rf_new_codes *codes = rf_unicode_new(&num);
    for (size_t i = 0; i < num; i++) {
        if (strncmp(codes[i].category, name, strlen(name)) != 0) continue;
        RF_TRY(put_code(t, codes[i].first));
        if (codes[i].first == codes[i].last) continue;
        RF_TRY(put(t, "-"));
        RF_TRY(put_code(t, codes[i].last));
    }
    return RF_OK;
}

/* A general category; in_class: inside [...]. */
static rf_status put_property(translation *t, const char *name, bool negated, bool in_class) {
    static const char *const categories[] = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",
                                             "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po",
                                             "S",  "Sm", "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp", "Cc", "Cf"};
    bool known = false;
    for (size_t i = 0; i < sizeof categories / sizeof *categories; i++) known |= strcmp(categories[i], name) == 0;
    if (!known) return refuse(t, "a property other than a general category");
    if (t->fold_depth && (strcmp(name, "Lu") == 0 || strcmp(name, "Ll") == 0 || strcmp(name, "Lt") == 0)) {
        return refuse(t, "a case category without regard to case");
    }
    if (in_class && negated) return refuse(t, "\\P inside a class");
    char text[32];
    snprintf(text, sizeof text, "%s\\p{%s}", in_class ? "" : negated ? "[^" : "[", name);
    RF_TRY(put(t, text));
    RF_TRY(put_new_codes(t, name));
    return in_class ? RF_OK : put(t, "]");
}

/* \x.. or \u.... at t->at, which stands on the letter; leaves it after the last digit. */
static rf_status read_hex(translation *t, uint32_t *code) {
    bool braces = t->pattern[t->at] == 'x' && t->at + 1 < t->num && t->pattern[t->at + 1] == '{';
    size_t most = braces ? 6 : t->pattern[t->at] == 'x' ? 2 : 4, n = 0;
    t->at += braces ? 2 : 1;
    *code = 0;
    for (; n < most && t->at < t->num; n++, t->at++) {
        char c = t->pattern[t->at];
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) break;
        *code = *code * 16 + (uint32_t)digit;
    }
    bool closed = !braces || (t->at < t->num && t->pattern[t->at] == '}');
    if (n == 0 || (!braces && n != most) || !closed || *code > 0x10ffff || (*code >= 0xd800 && *code < 0xe000)) {
        return refuse(t, "a character number");
    }
    if (!braces && t->pattern[t->at - n - 1] == 'x' && *code > 0x7f) return refuse(t, "a byte above \\x7f");
    if (braces) t->at++;
    return RF_OK;
}

/* What follows a backslash. Either a set is written and *is_code is false, or *code is a character. */
static rf_status read_escape(translation *t, bool in_class, bool *is_code, uint32_t *code) {
    if (t->at + 1 >= t->num) return refuse(t, "a backslash at the end");
    char c = t->pattern[++t->at];
    *is_code = true;
    static const char names[] = "rntfvae", codes[] = "\r\n\t\f\v\a\033";
    const char *name = c ? strchr(names, c) : NULL;
    if (name) {
        *code = (uint8_t)codes[name - names];
        t->at++;
        return RF_OK;
    }
    if (c == 'x' || c == 'u') return read_hex(t, code);
    if ((c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~') ||
        c == ' ') {
        *code = (uint8_t)c;
        t->at++;
        return RF_OK;
    }
    *is_code = false;
    if (c == 's' || c == 'S') {
        t->at++;
        const char *set = c == 's' ? SPACES : NOT_SPACES;
        if (in_class) return put(t, set);
        RF_TRY(put(t, c == 's' ? "[" : "[^"));
        return put(t, SPACES "]");
    }
    if (c == 'd' || c == 'D') {
        RF_TRY(put_property(t, "Nd", c == 'D', in_class));
        t->at++;
        return RF_OK;
    }
    if ((c == 'p' || c == 'P') && t->at + 1 < t->num && t->pattern[t->at + 1] == '{') {
        char property[8];
        size_t n = 0, i = t->at + 2;
        bool negated = c == 'P';
        if (i < t->num && t->pattern[i] == '^') {
            negated = !negated;
            i++;
        }
        while (i < t->num && t->pattern[i] != '}' && n + 1 < sizeof property) property[n++] = t->pattern[i++];
        property[n] = 0;
        if (i >= t->num || t->pattern[i] != '}') return refuse(t, "a property other than a general category");
        RF_TRY(put_property(t, property, negated, in_class));
        t->at = i + 1;
        return RF_OK;
    }
    char what[] = "\\?";
    what[1] = c >= ' ' && c <= '~' ? c : '?';
    return refuse(t, what);
}

static rf_status read_class(translation *t) {
    size_t start = ++t->at;
    RF_TRY(put(t, "["));
    if (t->at < t->num && t->pattern[t->at] == '^') {
        RF_TRY(put(t, "^"));
        start = ++t->at;
    }
    bool have_code = false; /* a character that may begin a range */
    uint32_t first = 0;
    for (;;) {
        if (t->at >= t->num) return refuse(t, "a class without its end");
        char c = t->pattern[t->at];
        if (c == ']') {
            if (t->at == start) return refuse(t, "an empty class");
            t->at++;
            return put(t, "]");
        }
        if (c == '[') return refuse(t, "a class inside a class");
        if (c == '&' && t->at + 1 < t->num && t->pattern[t->at + 1] == '&')
            return refuse(t, "an intersection of classes");
        bool is_code = true;
        uint32_t code = 0;
        if (c == '-' && have_code && t->at + 1 < t->num && t->pattern[t->at + 1] != ']') {
            t->at++;
            if (t->pattern[t->at] == '\\') {
                RF_TRY(read_escape(t, true, &is_code, &code));
            } else if (t->pattern[t->at] == '[' || t->pattern[t->at] == '-') {
                return refuse(t, "a range without its end");
            } else {
                size_t len;
                code = rf_utf8_next((const uint8_t *)t->pattern + t->at, t->num - t->at, &len);
                t->at += len;
            }
            if (!is_code || code < first) return refuse(t, "a range without its end");
            RF_TRY(put(t, "-"));
            RF_TRY(put_code(t, code));
            have_code = false;
            continue;
        }
        if (c == '-' && !have_code && t->at != start && t->at + 1 < t->num && t->pattern[t->at + 1] != ']') {
            return refuse(t, "a range after a set");
        }
        if (c == '\\') {
            RF_TRY(read_escape(t, true, &is_code, &code));
        } else {
            size_t len;
            code = rf_utf8_next((const uint8_t *)t->pattern + t->at, t->num - t->at, &len);
            t->at += len;
        }
        if (is_code) {
            if (t->fold_depth && code > 0x7f) return refuse(t, "a letter beyond ASCII without regard to case");
            RF_TRY(put_code(t, code));
        }
        have_code = is_code;
        first = code;
    }
}

static rf_status read_group(translation *t) {
    static const char *const openings[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    const char *rest = t->pattern + t->at;
    size_t left = t->num - t->at;
    t->depth++;
    t->last_literal = 0;
    if (left < 2 || rest[1] != '?') {
        if (left >= 2 && rest[1] == '*') return refuse(t, "(*");
        t->at++;
        return put(t, "(?:");
    }
    for (size_t i = 0; i < sizeof openings / sizeof *openings; i++) {
        size_t len = strlen(openings[i]);
        if (left < len || memcmp(rest, openings[i], len) != 0) continue;
        if (i == 1) {
            if (t->fold_depth) return refuse(t, "(?i: inside (?i:");
            t->fold_depth = t->depth;
        }
        t->at += len;
        return put(t, openings[i]);
    }
    return refuse(t, "a group other than (?: (?i: (?= (?! (?<= (?<! (?>");
}

/* After an item: at most one quantifier. */
static rf_status read_quantifier(translation *t) {
    if (t->at >= t->num) return RF_OK;
    char c = t->pattern[t->at];
    bool braces = c == '{';
    if (c == '?' || c == '*' || c == '+') {
        char text[2] = {c, 0};
        RF_TRY(put(t, text));
        t->at++;
    } else if (braces) {
        unsigned long low = 0, high = 0;
        size_t i = t->at + 1, low_digits = 0, high_digits = 0;
        for (; i < t->num && t->pattern[i] >= '0' && t->pattern[i] <= '9' && low_digits < 5; i++, low_digits++) {
            low = low * 10 + (unsigned long)(t->pattern[i] - '0');
        }
        bool comma = i < t->num && t->pattern[i] == ',';
        if (comma) i++;
        for (; comma && i < t->num && t->pattern[i] >= '0' && t->pattern[i] <= '9' && high_digits < 5;
             i++, high_digits++) {
            high = high * 10 + (unsigned long)(t->pattern[i] - '0');
        }
        bool reversed = high_digits && high < low; /* possessive in Oniguruma */
        if (i >= t->num || t->pattern[i] != '}' || low_digits + high_digits == 0 || reversed || low > 60000 ||
            high > 60000) {
            return refuse(t, "{ that is no quantifier");
        }
        char text[32];
        if (comma && high_digits) {
            snprintf(text, sizeof text, "{%lu,%lu}", low, high);
        } else {
            snprintf(text, sizeof text, comma ? "{%lu,}" : "{%lu}", low);
        }
        RF_TRY(put(t, text));
        t->at = i + 1;
    } else {
        return RF_OK;
    }
    t->last_literal = 0;
    if (t->at < t->num && (t->pattern[t->at] == '?' || t->pattern[t->at] == '+')) {
        if (braces) return refuse(t, "a quantifier after {}");
        char text[2] = {t->pattern[t->at++], 0};
        RF_TRY(put(t, text));
    }
    if (t->at < t->num && (t->pattern[t->at] == '?' || t->pattern[t->at] == '*' || t->pattern[t->at] == '+' ||
                           t->pattern[t->at] == '{')) {
        return refuse(t, "a quantifier after a quantifier");
    }
    return RF_OK;
}

/* Letters that fold to one character together (U+00DF, U+FB00 to U+FB06), which only Oniguruma matches. */
static bool folds_together(char a, char b) {
    return (a == 's' && (b == 's' || b == 't')) || (a == 'f' && (b == 'f' || b == 'i' || b == 'l'));
}

static rf_status translate(translation *t) {
    while (t->at < t->num) {
        char c = t->pattern[t->at];
        bool is_code = false, item = true;
        uint32_t code = 0;
        char literal_before = t->last_literal;
        t->last_literal = 0;
        switch (c) {
        case '\\': RF_TRY(read_escape(t, false, &is_code, &code)); break;
        case '[': RF_TRY(read_class(t)); break;
        case '(':
            RF_TRY(read_group(t));
            item = false;
            break;
        case ')':
            if (t->depth == 0) return refuse(t, "a ) without its (");
            if (t->fold_depth == t->depth) t->fold_depth = 0;
            t->depth--;
            t->at++;
            RF_TRY(put(t, ")"));
            break;
        case '|':
            t->at++;
            item = false;
            RF_TRY(put(t, "|"));
            break;
        case '^':
        case '$':
            t->at++;
            item = false;
            RF_TRY(put(t, c == '^' ? "(?m:^)" : "(?m:$)"));
            break;
        case '.':
            t->at++;
            RF_TRY(put(t, "."));
            break;
        case '?':
        case '*':
        case '+':
        case '{': return refuse(t, "a quantifier after nothing");
        default: {
            size_t len;
            code = rf_utf8_next((const uint8_t *)t->pattern + t->at, t->num - t->at, &len);
            t->at += len;
            is_code = true;
        }
        }
        if (is_code) {
            if (t->fold_depth) {
                if (code > 0x7f) return refuse(t, "a letter beyond ASCII without regard to case");
                char lower = (char)(code >= 'A' && code <= 'Z' ? code + 32 : code);
                if (folds_together(literal_before, lower)) {
                    return refuse(t, "letters without regard to case that fold to one character");
                }
                t->last_literal = lower;
            }
            RF_TRY(put_code(t, code));
        }
        if (item) {
            RF_TRY(read_quantifier(t));
        } else if (t->at < t->num && strchr("?*+{", t->pattern[t->at])) {
            return refuse(t, "a quantifier after nothing");
        }
    }
    return t->depth ? refuse(t, "a ( without its )") : RF_OK;
}

/* ---- stages ---- */

static rf_status compile(rf_split_stage *s, const char *pattern, size_t num, uint32_t options, const char *where,
                         rf_error *err) {
    pcre2_general_context *general = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    pcre2_compile_context *context = general ? pcre2_compile_context_create(general) : NULL;
    int code = PCRE2_ERROR_NOMEMORY;
    PCRE2_SIZE at = 0;
    if (context) {
        pcre2_set_newline(context, PCRE2_NEWLINE_LF);
        s->code = pcre2_compile((PCRE2_SPTR)pattern, num, PCRE2_UTF | options, &code, &at, context);
    }
    pcre2_compile_context_free(context);
    pcre2_general_context_free(general);
    if (!s->code) {
        if (code == PCRE2_ERROR_NOMEMORY || code == PCRE2_ERROR_HEAP_FAILED) {
            return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for the pattern", where);
        }
        PCRE2_UCHAR message[128] = {0};
        pcre2_get_error_message(code, message, sizeof message);
        return rf_fail(err, RF_ERR_CONFIG, "%s: the pattern is not valid: %s", where, (const char *)message);
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(s->code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: the pattern can match nothing", where);
    /* where machine code is not to be had, matching is slower and the same */
    int jit = pcre2_jit_compile(s->code, PCRE2_JIT_COMPLETE);
    (void)jit;
    return RF_OK;
}

rf_status rf_split_stage_init(rf_split_stage *s, const char *pattern, bool literal, const char *where, rf_error *err) {
    size_t num = strlen(pattern);
    if (num == 0 || num > MAX_PATTERN) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: a pattern of %zu bytes, must be 1 to %d", where, num, MAX_PATTERN);
    }
    if (literal) return compile(s, pattern, num, PCRE2_LITERAL, where, err);
    translation t = {.pattern = pattern, .where = where, .num = num, .err = err};
    rf_status st = translate(&t);
    if (st == RF_OK) st = compile(s, t.out.bytes, t.out.num, PCRE2_UCP, where, err);
    rf_text_clear(&t.out);
    return st;
}

void rf_split_stage_clear(rf_split_stage *s) {
    pcre2_code_free(s->code);
    s->code = NULL;
}

void *rf_split_match_data(void) {
    pcre2_general_context *general = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    pcre2_match_data *data = general ? pcre2_match_data_create(1, general) : NULL;
    pcre2_general_context_free(general);
    return data;
}

void rf_split_match_data_free(void *match_data) {
    pcre2_match_data_free(match_data);
}

rf_status rf_text_block_add(rf_text_block **list, rf_text **out, rf_error *err) {
    rf_text_block *block = rf_alloc_zero(1, sizeof *block);
    if (!block) return rf_fail(err, RF_ERR_MEMORY, "no memory for a piece of text");
    block->next = *list;
    *list = block;
    *out = &block->text;
    return RF_OK;
}

void rf_text_blocks_clear(rf_text_block *list) {
    while (list) {
        rf_text_block *next = list->next;
        rf_text_clear(&list->text);
        rf_free(list);
        list = next;
    }
}

/* ---- running ---- */

typedef struct {
    const rf_split_stage *stages;
    int num_stages;
    pcre2_match_data *match_data;
    rf_text_block **blocks;
    rf_bpe_run *bpe;
    rf_error *err;
} split_run;

static rf_status run_stage(const split_run *r, int index, const uint8_t *text, size_t num);

/* How far matching may search: PCRE2's limit is meant for patterns that explode, not for long texts. */
static int match_slowly(const pcre2_code *code, const uint8_t *text, size_t num, size_t from, pcre2_match_data *data) {
    pcre2_general_context *general = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    pcre2_match_context *context = general ? pcre2_match_context_create(general) : NULL;
    int rc = PCRE2_ERROR_NOMEMORY;
    if (context) {
        size_t limit = num > (UINT32_MAX - LEAST_MATCH_MAX) / 16 ? UINT32_MAX : LEAST_MATCH_MAX + 16 * num;
        pcre2_set_match_limit(context, (uint32_t)limit);
        rc = pcre2_match(code, text, num, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, context);
    }
    pcre2_match_context_free(context);
    pcre2_general_context_free(general);
    return rc;
}

/* The next match from `from`; *end = 0 if there is none. */
static rf_status next_match(const split_run *r, const rf_split_stage *s, const uint8_t *text, size_t num, size_t from,
                            size_t *start, size_t *end) {
    int rc = pcre2_match(s->code, text, num, from, PCRE2_NO_UTF_CHECK, r->match_data, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT || rc == PCRE2_ERROR_MATCHLIMIT) {
        rc = match_slowly(s->code, text, num, from, r->match_data);
    }
    *end = 0;
    if (rc == PCRE2_ERROR_NOMATCH) return RF_OK;
    if (rc < 0) {
        if (rc == PCRE2_ERROR_NOMEMORY || rc == PCRE2_ERROR_HEAPLIMIT) {
            return rf_fail(r->err, RF_ERR_MEMORY, "no memory to match the pre-tokenizer's pattern on %zu bytes", num);
        }
        PCRE2_UCHAR message[128] = {0};
        pcre2_get_error_message(rc, message, sizeof message);
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "the pre-tokenizer's pattern gives up at byte %zu: %s", from,
                       (const char *)message);
    }
    const PCRE2_SIZE *ovector = pcre2_get_ovector_pointer(r->match_data);
    *start = ovector[0];
    *end = ovector[1];
    if (*end <= *start || *start < from) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "the pre-tokenizer's pattern matches nothing at byte %zu", *start);
    }
    return RF_OK;
}

/* The pieces that a stage makes of its ranges: each is [start, end) with whether the pattern matched it. */
typedef struct {
    const split_run *run;
    const uint8_t *text;
    int next_stage;
    rf_split_behavior behavior;
    bool held, previous; /* a piece is held back; the match flag of the range before */
    size_t start, end;   /* of the piece held back */
} piece_state;

static rf_status flush(piece_state *p) {
    if (!p->held) return RF_OK;
    p->held = false;
    return run_stage(p->run, p->next_stage, p->text + p->start, p->end - p->start);
}

static rf_status hold(piece_state *p, size_t start, size_t end) {
    RF_TRY(flush(p));
    p->held = true;
    p->start = start;
    p->end = end;
    return RF_OK;
}

static rf_status add_range(piece_state *p, size_t start, size_t end, bool match) {
    bool previous = p->previous;
    p->previous = match;
    switch (p->behavior) {
    case RF_SPLIT_ISOLATED: return hold(p, start, end);
    case RF_SPLIT_REMOVED: return match ? RF_OK : hold(p, start, end);
    case RF_SPLIT_CONTIGUOUS:
        if (match != previous || !p->held) return hold(p, start, end);
        p->end = end;
        return RF_OK;
    case RF_SPLIT_MERGED_WITH_PREVIOUS:
        if (!match || previous || !p->held) return hold(p, start, end);
        p->end = end;
        return RF_OK;
    case RF_SPLIT_MERGED_WITH_NEXT:
        /* a match goes with the range after it, unless that is a match too */
        if (match || !previous || !p->held) return hold(p, start, end);
        p->end = end;
        return RF_OK;
    }
    return RF_OK;
}

static rf_status run_stage(const split_run *r, int index, const uint8_t *text, size_t num) {
    if (index == r->num_stages) return rf_bpe_word(r->bpe, text, num, r->err);
    const rf_split_stage *s = &r->stages[index];
    if (s->prefix_space && text[0] != ' ') {
        rf_text *copy = NULL;
        RF_TRY(rf_text_block_add(r->blocks, &copy, r->err));
        RF_TRY(rf_text_append(copy, " ", 1, r->err));
        RF_TRY(rf_text_append(copy, text, num, r->err));
        text = (const uint8_t *)copy->bytes;
        num = copy->num;
    }
    if (!s->code) return run_stage(r, index + 1, text, num);
    piece_state p = {.run = r, .text = text, .next_stage = index + 1, .behavior = s->behavior};
    size_t at = 0, start = 0, end = 0;
    while (at < num) {
        RF_TRY(next_match(r, s, text, num, at, &start, &end));
        if (!end) break;
        if (start > at) RF_TRY(add_range(&p, at, start, s->invert));
        RF_TRY(add_range(&p, start, end, !s->invert));
        at = end;
    }
    if (at < num) RF_TRY(add_range(&p, at, num, s->invert));
    return flush(&p);
}

rf_status rf_split_run(const rf_split_stage *stages, int num_stages, const uint8_t *text, size_t num, void *match_data,
                       rf_text_block **blocks, rf_bpe_run *bpe, rf_error *err) {
    split_run r = {stages, num_stages, match_data, blocks, bpe, err};
    return run_stage(&r, 0, text, num);
}
