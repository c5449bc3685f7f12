/* dlm/chat_parse.c - Jinja source to a syntax tree, with the white space rules of trim_blocks and lstrip_blocks.
 *
 * Precedence and white space follow Jinja 3.1: a block tag alone on its line leaves nothing, the newline after a block tag or
 * comment is dropped, and - beside a tag drops all white space on that side. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dlm/chat_internal.h"
#include "dlm/tokenizer_internal.h"

typedef enum {
    TOKEN_END = 0, /* of the tag */
    TOKEN_NAME,
    TOKEN_STRING,
    TOKEN_INT,
    TOKEN_FLOAT,
    TOKEN_OP
} token_kind;

typedef struct {
    token_kind kind;
    rf_str text; /* name, operator, or the string's value */
    int64_t integer;
    double number;
} token;

typedef struct {
    rf_chat_context x;
    const char *p, *end; /* source left */
    bool in_block;       /* the open tag is {% */
    int brackets;        /* open inside the tag */
    bool line_starting;  /* the last tag ended with a newline */
    int depth;
    token now;
} parser;

static rf_status fail(parser *s, const char *what) {
    return rf_chat_refuse(&s->x, "%s", what);
}

static rf_status enter(parser *s) {
    if (++s->depth > RF_CHAT_MAX_DEPTH) return rf_chat_refuse(&s->x, "nested deeper than %d", RF_CHAT_MAX_DEPTH);
    return RF_OK;
}

static rf_status new_node(parser *s, rf_node_kind kind, rf_node **out) {
    *out = rf_chat_alloc(s->x.pool, sizeof **out);
    if (!*out) return rf_chat_no_memory(&s->x);
    (*out)->kind = kind;
    (*out)->line = s->x.line;
    return RF_OK;
}

/* ---- tokens inside a tag ---- */

static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}
/* \s of Python, which the rules of white space around tags go by. */
static bool is_wide_space(uint32_t code) {
    return rf_is_space(code) || (code >= 0x1c && code <= 0x1f);
}
static bool is_name_start(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}
static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static void skip_spaces(parser *s) {
    while (s->p < s->end && is_space(*s->p)) s->x.line += *s->p++ == '\n';
}

/* The tag's end at s->p, with its sign: its length, or 0. */
static size_t tag_end(const parser *s, char *sign) {
    const char *close = s->in_block ? "%}" : "}}";
    size_t left = (size_t)(s->end - s->p);
    *sign = 0;
    if (left >= 3 && (s->p[0] == '-' || (s->p[0] == '+' && s->in_block)) && memcmp(s->p + 1, close, 2) == 0) {
        *sign = s->p[0];
        return 3;
    }
    return left >= 2 && memcmp(s->p, close, 2) == 0 ? 2 : 0;
}

static void after_tag(parser *s, char sign, bool drops_newline) {
    s->line_starting = false;
    if (sign == '-') {
        while (s->p < s->end) {
            size_t len;
            if (!is_wide_space(rf_utf8_next((const uint8_t *)s->p, (size_t)(s->end - s->p), &len))) break;
            s->line_starting = *s->p == '\n';
            s->x.line += s->line_starting;
            s->p += len;
        }
    } else if (sign == 0 && drops_newline && s->p < s->end && *s->p == '\n') {
        s->line_starting = true;
        s->x.line++;
        s->p++;
    }
}

static rf_status read_string(parser *s) {
    char quote = *s->p++;
    const char *start = s->p;
    while (s->p < s->end && *s->p != quote) s->p += *s->p == '\\' && s->end - s->p > 1 ? 2 : 1;
    if (s->p >= s->end) return fail(s, "a string without its end");
    char *out = rf_chat_alloc(s->x.pool, (size_t)(s->p - start) + 4);
    if (!out) return rf_chat_no_memory(&s->x);
    size_t n = 0;
    for (const char *q = start; q < s->p; q++) {
        s->x.line += *q == '\n';
        if (*q != '\\') {
            out[n++] = *q;
            continue;
        }
        static const char names[] = "ntr\\'\"abfv", codes[] = "\n\t\r\\'\"\a\b\f\v";
        const char *name = *++q ? strchr(names, *q) : NULL;
        if (name) {
            out[n++] = codes[name - names];
        } else if (*q == 'x' || *q == 'u') {
            int digits = *q == 'x' ? 2 : 4;
            uint32_t code = 0;
            for (int i = 0; i < digits; i++) {
                char c = q + 1 < s->p ? *++q : 0, low = (char)(c | 32);
                if (!is_digit(c) && !(low >= 'a' && low <= 'f'))
                    return fail(s, "an escape in a string that is not complete");
                code = code * 16 + (uint32_t)(is_digit(c) ? c - '0' : low - 'a' + 10);
            }
            if (code >= 0xd800 && code < 0xe000) return fail(s, "a surrogate in a string");
            n += rf_utf8_put(code, (uint8_t *)out + n); /* no longer than the escape */
        } else if (*q == '\n' || *q == 'N' || *q == 'U' || is_digit(*q)) {
            return fail(s, "an escape in a string that is not supported");
        } else {
            out[n++] = '\\'; /* Python keeps what it does not know */
            out[n++] = *q;
        }
    }
    s->p++;
    s->now = (token){.kind = TOKEN_STRING, .text = {out, n}};
    return RF_OK;
}

static rf_status read_number(parser *s) {
    char text[64];
    size_t n = 0;
    bool fraction = false;
    while (s->p < s->end &&
           (is_digit(*s->p) || (*s->p == '.' && s->end - s->p > 1 && is_digit(s->p[1]) && !fraction))) {
        fraction |= *s->p == '.';
        if (n + 1 >= sizeof text) return fail(s, "a number of too many digits");
        text[n++] = *s->p++;
    }
    text[n] = 0;
    if (s->p < s->end && (is_name_start(*s->p) || (n > 1 && text[0] == '0' && !fraction))) {
        return fail(s, "a number that is not decimal");
    }
    errno = 0;
    s->now = (token){.kind = fraction ? TOKEN_FLOAT : TOKEN_INT, .text = {s->p - n, n}};
    if (fraction) {
        s->now.number = strtod(text, NULL);
    } else {
        s->now.integer = strtoll(text, NULL, 10);
        if (errno) return fail(s, "a number that is too large");
    }
    return RF_OK;
}

static rf_status next(parser *s) {
    skip_spaces(s);
    char sign;
    size_t len = s->brackets == 0 ? tag_end(s, &sign) : 0;
    if (len) {
        s->p += len;
        after_tag(s, sign, s->in_block);
        s->now = (token){.kind = TOKEN_END};
        return RF_OK;
    }
    if (s->p >= s->end) return fail(s, s->in_block ? "{% without %}" : "{{ without }}");
    char c = *s->p;
    if (c == '\'' || c == '"') return read_string(s);
    if (is_digit(c)) return read_number(s);
    if (is_name_start(c)) {
        const char *start = s->p;
        while (s->p < s->end && (is_name_start(*s->p) || is_digit(*s->p))) s->p++;
        s->now = (token){.kind = TOKEN_NAME, .text = {start, (size_t)(s->p - start)}};
        return RF_OK;
    }
    static const char *const ops[] = {"==", "!=", "<=", ">=", "//", "**", "(", ")", "[", "]", "{", "}", "<",
                                      ">",  "=",  "+",  "-",  "*",  "/",  "%", "~", "|", ".", ",", ":"};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        size_t num = strlen(ops[i]);
        if ((size_t)(s->end - s->p) < num || memcmp(s->p, ops[i], num) != 0) continue;
        if (strchr("([{", c)) s->brackets++;
        if (strchr(")]}", c) && s->brackets-- == 0) return fail(s, "a bracket that was not opened");
        s->p += num;
        s->now = (token){.kind = TOKEN_OP, .text = {ops[i], num}};
        return RF_OK;
    }
    return rf_chat_refuse(&s->x, "the character '%c'", c >= ' ' && c <= '~' ? c : '?');
}

static bool is_op(const parser *s, const char *text) {
    return s->now.kind == TOKEN_OP && rf_str_is(s->now.text, text);
}
static bool is_word(const parser *s, const char *text) {
    return s->now.kind == TOKEN_NAME && rf_str_is(s->now.text, text);
}

static rf_status found(parser *s, const char *wanted) {
    static const char *const kinds[] = {"the end of the tag", "", "a string", "a number", "a number", ""};
    bool named = s->now.kind == TOKEN_NAME || s->now.kind == TOKEN_OP;
    return rf_chat_refuse(&s->x, "expected %s, found %.*s", wanted,
                          named ? (int)(s->now.text.num < 60 ? s->now.text.num : 60) : 60,
                          named ? s->now.text.p : kinds[s->now.kind]);
}

static rf_status expect_op(parser *s, const char *text) {
    if (!is_op(s, text)) return found(s, text);
    return next(s);
}

static rf_status expect_end(parser *s) {
    return s->now.kind == TOKEN_END ? RF_OK : found(s, "the end of the tag");
}

/* ---- expressions ---- */

static rf_status parse_expression(parser *s, rf_node **out);
static rf_status parse_unary(parser *s, bool with_filter, rf_node **out);

/* After "(": arguments to ")". */
static rf_status parse_args(parser *s, rf_node **list) {
    rf_node **tail = list;
    bool named = false;
    while (!is_op(s, ")")) {
        if (is_op(s, "*") || is_op(s, "**")) return fail(s, "unpacked arguments are not supported");
        rf_node *arg;
        RF_TRY(parse_expression(s, &arg));
        rf_str keyword = {0};
        if (is_op(s, "=")) {
            if (arg->kind != RF_NODE_NAME) return found(s, ", or )");
            keyword = arg->name;
            RF_TRY(next(s));
            RF_TRY(parse_expression(s, &arg));
            named = true;
        } else if (named) {
            return fail(s, "a plain argument after a named one");
        }
        rf_node *holder; /* an argument may be a NAME, whose name is in use */
        RF_TRY(new_node(s, RF_NODE_LIST, &holder));
        holder->a = arg;
        holder->name = keyword;
        *tail = holder;
        tail = &holder->next;
        if (is_op(s, ")")) break;
        RF_TRY(expect_op(s, ","));
    }
    return next(s);
}

/* Items to the closing bracket, which is left for the caller. */
static rf_status parse_items(parser *s, const char *close, rf_node **list) {
    rf_node **tail = list;
    while (!is_op(s, close)) {
        rf_node *item, *holder;
        RF_TRY(parse_expression(s, &item));
        RF_TRY(new_node(s, RF_NODE_LIST, &holder));
        holder->a = item;
        *tail = holder;
        tail = &holder->next;
        if (is_op(s, close)) break;
        RF_TRY(expect_op(s, ","));
    }
    return RF_OK;
}

static rf_status parse_dict(parser *s, rf_node *dict) {
    rf_node **tail = &dict->list;
    while (!is_op(s, "}")) {
        for (int part = 0; part < 2; part++) {
            rf_node *item, *holder;
            RF_TRY(parse_expression(s, &item));
            RF_TRY(new_node(s, RF_NODE_LIST, &holder));
            holder->a = item;
            *tail = holder;
            tail = &holder->next;
            if (part == 0) RF_TRY(expect_op(s, ":"));
        }
        if (is_op(s, "}")) break;
        RF_TRY(expect_op(s, ","));
    }
    return RF_OK;
}

static rf_status parse_constant(parser *s, rf_value value, rf_node **out) {
    RF_TRY(new_node(s, RF_NODE_CONST, out));
    (*out)->constant = value;
    return next(s);
}

static rf_status parse_primary(parser *s, rf_node **out) {
    token t = s->now;
    switch (t.kind) {
    case TOKEN_INT: return parse_constant(s, (rf_value){.kind = RF_VALUE_INT, .integer = t.integer}, out);
    case TOKEN_FLOAT: return parse_constant(s, (rf_value){.kind = RF_VALUE_FLOAT, .number = t.number}, out);
    case TOKEN_STRING: {
        RF_TRY(next(s));
        rf_str text = t.text;
        while (s->now.kind == TOKEN_STRING) { /* neighbours are one string */
            RF_TRY(rf_value_concat(&s->x, text, s->now.text, &text));
            RF_TRY(next(s));
        }
        RF_TRY(new_node(s, RF_NODE_CONST, out));
        (*out)->constant = (rf_value){.kind = RF_VALUE_STRING, .string = text};
        return RF_OK;
    }
    case TOKEN_NAME: {
        bool yes = rf_str_is(t.text, "true") || rf_str_is(t.text, "True");
        if (yes || rf_str_is(t.text, "false") || rf_str_is(t.text, "False")) {
            return parse_constant(s, (rf_value){.kind = RF_VALUE_BOOL, .boolean = yes}, out);
        }
        if (rf_str_is(t.text, "none") || rf_str_is(t.text, "None")) {
            return parse_constant(s, (rf_value){.kind = RF_VALUE_NONE}, out);
        }
        static const char *const words[] = {"and", "or", "not", "in", "is", "if", "else", "elif", "for"};
        for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
            if (rf_str_is(t.text, words[i])) return found(s, "an expression");
        }
        /* what Jinja has beside those that are supported */
        static const char *const globals[] = {"dict",  "lipsum", "cycler",  "joiner", "self",
                                              "super", "caller", "varargs", "kwargs"};
        for (size_t i = 0; i < sizeof globals / sizeof *globals; i++) {
            if (rf_str_is(t.text, globals[i])) return rf_chat_refuse(&s->x, "'%s' is not supported", globals[i]);
        }
        RF_TRY(new_node(s, RF_NODE_NAME, out));
        (*out)->name = t.text;
        return next(s);
    }
    case TOKEN_OP:
        if (is_op(s, "(")) {
            RF_TRY(next(s));
            if (is_op(s, ")")) return fail(s, "an empty tuple is not supported");
            RF_TRY(parse_expression(s, out));
            if (is_op(s, ",")) { /* a tuple, read like a list */
                rf_node *list, *holder;
                RF_TRY(new_node(s, RF_NODE_LIST, &list));
                RF_TRY(new_node(s, RF_NODE_LIST, &holder));
                holder->a = *out;
                list->list = holder;
                RF_TRY(next(s));
                RF_TRY(parse_items(s, ")", &holder->next));
                *out = list;
            }
            return expect_op(s, ")");
        }
        if (is_op(s, "[")) {
            RF_TRY(next(s));
            RF_TRY(new_node(s, RF_NODE_LIST, out));
            RF_TRY(parse_items(s, "]", &(*out)->list));
            return next(s);
        }
        if (is_op(s, "{")) {
            RF_TRY(next(s));
            RF_TRY(new_node(s, RF_NODE_DICT, out));
            RF_TRY(parse_dict(s, *out));
            return next(s);
        }
        break;
    case TOKEN_END: break;
    }
    return found(s, "an expression");
}

static rf_status parse_subscript(parser *s, rf_node *of, rf_node **out) {
    rf_node *parts[3] = {0};
    int num_colons = 0;
    while (!is_op(s, "]")) {
        if (is_op(s, ":")) {
            if (++num_colons > 2) return found(s, "]");
            RF_TRY(next(s));
        } else if (parts[num_colons]) {
            return found(s, "]");
        } else {
            RF_TRY(parse_expression(s, &parts[num_colons]));
        }
    }
    if (num_colons == 0 && !parts[0]) return found(s, "an expression");
    RF_TRY(new_node(s, num_colons ? RF_NODE_SLICE : RF_NODE_ITEM, out));
    (*out)->a = parts[0];
    (*out)->b = parts[1];
    (*out)->c = parts[2];
    (*out)->list = of;
    return next(s);
}

static rf_status parse_call(parser *s, rf_node *of, rf_node **out) {
    if (of->kind == RF_NODE_NAME && !rf_chat_function_known(of->name)) {
        return rf_chat_refuse(&s->x, "function '%.*s' is not supported", (int)(of->name.num < 60 ? of->name.num : 60),
                              of->name.p);
    }
    if (of->kind != RF_NODE_NAME && of->kind != RF_NODE_ATTRIBUTE) return fail(s, "a call of what is no function");
    RF_TRY(new_node(s, RF_NODE_CALL, out));
    (*out)->a = of;
    RF_TRY(next(s));
    return parse_args(s, &(*out)->list);
}

static rf_status parse_postfix(parser *s, rf_node **node) {
    for (int links = 0;; links++) {
        rf_node *of = *node;
        if (links > RF_CHAT_MAX_DEPTH) return rf_chat_refuse(&s->x, "more than %d links", RF_CHAT_MAX_DEPTH);
        if (is_op(s, ".")) {
            RF_TRY(next(s));
            if (s->now.kind != TOKEN_NAME) return found(s, "a name after the dot");
            RF_TRY(new_node(s, RF_NODE_ATTRIBUTE, node));
            (*node)->name = s->now.text;
            (*node)->a = of;
            RF_TRY(next(s));
        } else if (is_op(s, "[")) {
            RF_TRY(next(s));
            RF_TRY(parse_subscript(s, of, node));
        } else if (is_op(s, "(")) {
            RF_TRY(parse_call(s, of, node));
        } else {
            return RF_OK;
        }
    }
}

static rf_status parse_test(parser *s, rf_node *of, rf_node **out) {
    RF_TRY(new_node(s, RF_NODE_TEST, out));
    rf_node *test = *out;
    test->a = of;
    if (is_word(s, "not")) {
        test->negated = true;
        RF_TRY(next(s));
    }
    if (s->now.kind != TOKEN_NAME) return found(s, "a test");
    test->name = s->now.text;
    if (!rf_chat_test_known(test->name)) {
        return rf_chat_refuse(&s->x, "test '%.*s' is not supported", (int)(test->name.num < 60 ? test->name.num : 60),
                              test->name.p);
    }
    RF_TRY(next(s));
    if (is_op(s, "(")) {
        RF_TRY(next(s));
        return parse_args(s, &test->list);
    }
    if (is_word(s, "is")) return fail(s, "a test after a test");
    bool word_ends = is_word(s, "else") || is_word(s, "or") || is_word(s, "and"); /* Jinja's rule: not so before if */
    bool begins = s->now.kind == TOKEN_NAME || s->now.kind == TOKEN_STRING || s->now.kind == TOKEN_INT ||
                  s->now.kind == TOKEN_FLOAT || is_op(s, "[") || is_op(s, "{");
    if (begins && !word_ends) {
        rf_node *holder;
        RF_TRY(new_node(s, RF_NODE_LIST, &holder));
        RF_TRY(parse_primary(s, &holder->a));
        RF_TRY(parse_postfix(s, &holder->a));
        test->list = holder;
        if (is_word(s, "is")) return fail(s, "a test after a test");
    }
    return RF_OK;
}

static rf_status parse_filters(parser *s, rf_node **node) {
    for (int links = 0;; links++) {
        rf_node *of = *node;
        if (links > RF_CHAT_MAX_DEPTH) return rf_chat_refuse(&s->x, "more than %d links", RF_CHAT_MAX_DEPTH);
        if (is_op(s, "|")) {
            RF_TRY(next(s));
            if (s->now.kind != TOKEN_NAME) return found(s, "a filter");
            if (!rf_chat_filter_known(s->now.text)) {
                return rf_chat_refuse(&s->x, "filter '%.*s' is not supported",
                                      (int)(s->now.text.num < 60 ? s->now.text.num : 60), s->now.text.p);
            }
            RF_TRY(new_node(s, RF_NODE_FILTER, node));
            (*node)->name = s->now.text;
            (*node)->a = of;
            RF_TRY(next(s));
            if (is_op(s, "(")) {
                RF_TRY(next(s));
                RF_TRY(parse_args(s, &(*node)->list));
            }
        } else if (is_word(s, "is")) {
            RF_TRY(next(s));
            RF_TRY(parse_test(s, of, node));
        } else if (is_op(s, "(")) {
            return fail(s, "a call of what is no function");
        } else {
            return RF_OK;
        }
    }
}

static rf_status parse_unary(parser *s, bool with_filter, rf_node **out) {
    RF_TRY(enter(s));
    if (is_op(s, "-")) {
        RF_TRY(next(s));
        rf_node *of;
        RF_TRY(parse_unary(s, false, &of));
        RF_TRY(new_node(s, RF_NODE_NEGATE, out));
        (*out)->a = of;
    } else if (is_op(s, "+")) {
        return fail(s, "a plus sign before a value is not supported");
    } else {
        RF_TRY(parse_primary(s, out));
    }
    RF_TRY(parse_postfix(s, out));
    if (is_op(s, "**")) return fail(s, "** is not supported");
    if (with_filter) RF_TRY(parse_filters(s, out));
    s->depth--;
    return RF_OK;
}

/* Left to right: level 0 + -, 1 ~, 2 * / // %. */
static rf_status parse_math(parser *s, int level, rf_node **out) {
    static const struct {
        const char *text;
        rf_op op;
        int level;
    } ops[] = {{"+", RF_OP_ADD, 0}, {"-", RF_OP_SUB, 0},       {"~", RF_OP_CONCAT, 1}, {"*", RF_OP_MUL, 2},
               {"/", RF_OP_DIV, 2}, {"//", RF_OP_FLOORDIV, 2}, {"%", RF_OP_MOD, 2}};
    if (level == 3) return parse_unary(s, true, out);
    RF_TRY(parse_math(s, level + 1, out));
    for (int links = 0;; links++) {
        size_t i = 0;
        while (i < sizeof ops / sizeof *ops && !(ops[i].level == level && is_op(s, ops[i].text))) i++;
        if (i == sizeof ops / sizeof *ops) return RF_OK;
        if (links > RF_CHAT_MAX_DEPTH) return rf_chat_refuse(&s->x, "more than %d links", RF_CHAT_MAX_DEPTH);
        rf_node *left = *out, *node;
        RF_TRY(new_node(s, RF_NODE_BINARY, &node));
        RF_TRY(next(s));
        node->op = ops[i].op;
        node->a = left;
        RF_TRY(parse_math(s, level + 1, &node->b));
        *out = node;
    }
}

static rf_status parse_compare(parser *s, rf_node **out) {
    static const struct {
        const char *text;
        rf_op op;
    } ops[] = {{"==", RF_OP_EQ}, {"!=", RF_OP_NE}, {"<=", RF_OP_LE},
               {">=", RF_OP_GE}, {"<", RF_OP_LT},  {">", RF_OP_GT}};
    RF_TRY(parse_math(s, 0, out));
    rf_node *compare = NULL, **tail = NULL;
    for (;;) {
        rf_op op = RF_OP_IN;
        size_t i = 0;
        while (i < sizeof ops / sizeof *ops && !is_op(s, ops[i].text)) i++;
        if (i < sizeof ops / sizeof *ops) {
            op = ops[i].op;
        } else if (is_word(s, "not")) { /* only "not in" can follow a value */
            RF_TRY(next(s));
            if (!is_word(s, "in")) return found(s, "in after not");
            op = RF_OP_NOT_IN;
        } else if (!is_word(s, "in")) {
            return RF_OK;
        }
        RF_TRY(next(s));
        if (!compare) {
            RF_TRY(new_node(s, RF_NODE_COMPARE, &compare));
            compare->a = *out;
            tail = &compare->list;
            *out = compare;
        }
        rf_node *holder;
        RF_TRY(new_node(s, RF_NODE_LIST, &holder));
        holder->op = op;
        RF_TRY(parse_math(s, 0, &holder->a));
        *tail = holder;
        tail = &holder->next;
    }
}

static rf_status parse_not(parser *s, rf_node **out) {
    if (!is_word(s, "not")) return parse_compare(s, out);
    RF_TRY(enter(s));
    RF_TRY(next(s));
    RF_TRY(new_node(s, RF_NODE_NOT, out));
    RF_TRY(parse_not(s, &(*out)->a));
    s->depth--;
    return RF_OK;
}

/* level 0 or, 1 and */
static rf_status parse_logic(parser *s, int level, rf_node **out) {
    if (level == 2) return parse_not(s, out);
    RF_TRY(parse_logic(s, level + 1, out));
    for (int links = 0; is_word(s, level == 0 ? "or" : "and"); links++) {
        if (links > RF_CHAT_MAX_DEPTH) return rf_chat_refuse(&s->x, "more than %d links", RF_CHAT_MAX_DEPTH);
        rf_node *left = *out;
        RF_TRY(new_node(s, level == 0 ? RF_NODE_OR : RF_NODE_AND, out));
        (*out)->a = left;
        rf_node *node = *out;
        RF_TRY(next(s));
        RF_TRY(parse_logic(s, level + 1, &node->b));
    }
    return RF_OK;
}

static rf_status parse_expression(parser *s, rf_node **out) {
    RF_TRY(enter(s));
    RF_TRY(parse_logic(s, 0, out));
    while (is_word(s, "if")) {
        rf_node *node;
        RF_TRY(new_node(s, RF_NODE_CONDITIONAL, &node));
        node->a = *out;
        RF_TRY(next(s));
        RF_TRY(parse_logic(s, 0, &node->b));
        if (is_word(s, "else")) {
            RF_TRY(next(s));
            RF_TRY(parse_expression(s, &node->c));
        }
        *out = node;
        if (node->c) break;
    }
    s->depth--;
    return RF_OK;
}

/* ---- statements ---- */

static rf_status parse_body(parser *s, rf_node **list, const char *const *ends, rf_str *end);

/* The text up to the next tag. *kind: the tag's second character, 0 at the end of the source. */
static rf_status read_text(parser *s, rf_str *text, char *kind) {
    const char *start = s->p, *q = s->p;
    *kind = 0;
    while (q < s->end) {
        q = memchr(q, '{', (size_t)(s->end - q));
        if (!q) q = s->end;
        if (s->end - q >= 2 && (q[1] == '{' || q[1] == '%' || q[1] == '#')) {
            *kind = q[1];
            break;
        }
        if (q < s->end) q++;
    }
    *text = (rf_str){start, (size_t)(q - start)};
    for (const char *r = start; r < q; r++) s->x.line += *r == '\n';
    s->p = q;
    if (!*kind) return RF_OK;
    s->p += 2;
    char sign = s->p < s->end && (*s->p == '-' || *s->p == '+') ? *s->p : 0;
    if (sign == '+' && *kind == '{') sign = 0; /* an expression's own sign */
    if (sign) s->p++;
    if (sign == '+' || (!sign && *kind == '{')) return RF_OK;
    size_t from = text->num; /* of the white space before the tag, without "-" of its line */
    while (from && (sign == '-' || text->p[from - 1] != '\n')) {
        size_t len = rf_utf8_last_len((const uint8_t *)text->p, from);
        if (!is_wide_space(rf_utf8_next((const uint8_t *)text->p + from - len, len, &len))) break;
        from -= len;
    }
    if (sign == '-' || (from ? text->p[from - 1] == '\n' : s->line_starting)) text->num = from;
    return RF_OK;
}

static rf_status skip_comment(parser *s) {
    const char *start = s->p;
    for (; s->end - s->p >= 2; s->p++) {
        if (s->p[0] == '#' && s->p[1] == '}') {
            char sign = s->p > start && (s->p[-1] == '-' || s->p[-1] == '+') ? s->p[-1] : 0;
            s->p += 2;
            after_tag(s, sign, true);
            return RF_OK;
        }
        s->x.line += *s->p == '\n';
    }
    return fail(s, "{# without #}");
}

static rf_status parse_if(parser *s, rf_node **out) {
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    static const char *const last[] = {"endif", NULL};
    RF_TRY(enter(s));
    rf_str end;
    RF_TRY(new_node(s, RF_NODE_IF, out));
    RF_TRY(parse_logic(s, 0, &(*out)->a)); /* no conditional, as in Jinja */
    RF_TRY(expect_end(s));
    RF_TRY(parse_body(s, &(*out)->list, ends, &end));
    if (rf_str_is(end, "elif")) {
        RF_TRY(next(s));
        RF_TRY(parse_if(s, &(*out)->list2));
    } else {
        RF_TRY(next(s));
        RF_TRY(expect_end(s));
        if (rf_str_is(end, "else")) {
            RF_TRY(parse_body(s, &(*out)->list2, last, &end));
            RF_TRY(next(s));
            RF_TRY(expect_end(s));
        }
    }
    s->depth--;
    return RF_OK;
}

static rf_status parse_for(parser *s, rf_node **out) {
    static const char *const ends[] = {"else", "endfor", NULL};
    static const char *const last[] = {"endfor", NULL};
    RF_TRY(new_node(s, RF_NODE_FOR, out));
    rf_node **tail = &(*out)->targets;
    for (;;) {
        if (s->now.kind != TOKEN_NAME) return found(s, "a name after for");
        RF_TRY(new_node(s, RF_NODE_NAME, tail));
        (*tail)->name = s->now.text;
        tail = &(*tail)->next;
        RF_TRY(next(s));
        if (!is_op(s, ",")) break;
        RF_TRY(next(s));
    }
    if (!is_word(s, "in")) return found(s, "in");
    RF_TRY(next(s));
    /* without a conditional: its if filters */
    RF_TRY(parse_logic(s, 0, &(*out)->a));
    if (is_word(s, "if")) {
        RF_TRY(next(s));
        RF_TRY(parse_expression(s, &(*out)->b));
    }
    if (is_word(s, "recursive")) return fail(s, "a recursive for is not supported");
    RF_TRY(expect_end(s));
    rf_str end;
    RF_TRY(parse_body(s, &(*out)->list, ends, &end));
    RF_TRY(next(s));
    RF_TRY(expect_end(s));
    if (rf_str_is(end, "else")) {
        RF_TRY(parse_body(s, &(*out)->list2, last, &end));
        RF_TRY(next(s));
        RF_TRY(expect_end(s));
    }
    return RF_OK;
}

static rf_status parse_set(parser *s, rf_node **out) {
    RF_TRY(new_node(s, RF_NODE_SET, out));
    if (s->now.kind != TOKEN_NAME) return found(s, "a name after set");
    (*out)->name = s->now.text;
    RF_TRY(next(s));
    if (is_op(s, ".")) {
        RF_TRY(next(s));
        if (s->now.kind != TOKEN_NAME) return found(s, "a name after the dot");
        (*out)->name2 = s->now.text;
        RF_TRY(next(s));
    }
    if (!is_op(s, "=")) return fail(s, "set without one name and = is not supported");
    RF_TRY(next(s));
    RF_TRY(parse_expression(s, &(*out)->a));
    return expect_end(s);
}

static rf_status parse_statement(parser *s, rf_node **out) {
    static const char *const generation_ends[] = {"endgeneration", NULL};
    rf_str name = s->now.text;
    *out = NULL;
    if (s->now.kind != TOKEN_NAME) return found(s, "a statement");
    RF_TRY(next(s));
    if (rf_str_is(name, "if")) return parse_if(s, out);
    if (rf_str_is(name, "for")) return parse_for(s, out);
    if (rf_str_is(name, "set")) return parse_set(s, out);
    if (rf_str_is(name, "break") || rf_str_is(name, "continue")) {
        RF_TRY(new_node(s, rf_str_is(name, "break") ? RF_NODE_BREAK : RF_NODE_CONTINUE, out));
        return expect_end(s);
    }
    if (rf_str_is(name, "generation")) { /* marks what the assistant says; its text counts as it stands */
        rf_str end;
        RF_TRY(expect_end(s));
        RF_TRY(new_node(s, RF_NODE_IF, out));
        RF_TRY(new_node(s, RF_NODE_CONST, &(*out)->a));
        (*out)->a->constant = (rf_value){.kind = RF_VALUE_BOOL, .boolean = true};
        RF_TRY(parse_body(s, &(*out)->list, generation_ends, &end));
        RF_TRY(next(s));
        return expect_end(s);
    }
    return rf_chat_refuse(&s->x, "statement '%.*s' is not supported", (int)(name.num < 60 ? name.num : 60), name.p);
}

/* Statements up to a tag that begins with one of ends (its name is then the current token), or with NULL to the end. */
static rf_status parse_body(parser *s, rf_node **list, const char *const *ends, rf_str *end) {
    RF_TRY(enter(s));
    int opened = s->x.line;
    for (;;) {
        rf_str text;
        char kind;
        RF_TRY(read_text(s, &text, &kind));
        if (text.num) {
            RF_TRY(new_node(s, RF_NODE_TEXT, list));
            (*list)->name = text;
            list = &(*list)->next;
        }
        if (!kind) break;
        if (kind == '#') {
            RF_TRY(skip_comment(s));
            continue;
        }
        s->in_block = kind == '%';
        s->brackets = 0;
        RF_TRY(next(s));
        if (kind == '{') {
            RF_TRY(new_node(s, RF_NODE_OUTPUT, list));
            RF_TRY(parse_expression(s, &(*list)->a));
            RF_TRY(expect_end(s));
            list = &(*list)->next;
            continue;
        }
        for (size_t i = 0; ends && ends[i]; i++) {
            if (!is_word(s, ends[i])) continue;
            *end = s->now.text;
            s->depth--;
            return RF_OK;
        }
        RF_TRY(parse_statement(s, list));
        list = &(*list)->next;
    }
    if (ends) return rf_chat_refuse(&s->x, "the end of the template, and what opened at line %d is not closed", opened);
    s->depth--;
    return RF_OK;
}

rf_status rf_chat_parse(rf_chat_pool *pool, const char *source, size_t num_bytes, const char *name, rf_node **body,
                        rf_error *err) {
    parser s = {.x = {.pool = pool, .name = name, .line = 1, .err = err}, .line_starting = true};
    if (num_bytes > RF_CHAT_MAX_SOURCE) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: a template of %zu bytes, the limit is %zu", name, num_bytes,
                       RF_CHAT_MAX_SOURCE);
    }
    if (rf_utf8_valid((const uint8_t *)source, num_bytes) != num_bytes) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: the template is not valid UTF-8", name);
    }
    char *copy = rf_chat_alloc(pool, num_bytes + 1);
    if (!copy) return rf_chat_no_memory(&s.x);
    size_t n = 0;
    for (size_t i = 0; i < num_bytes; i++) { /* every kind of line end is a newline */
        if (source[i] == '\r') {
            if (i + 1 < num_bytes && source[i + 1] == '\n') continue;
            copy[n++] = '\n';
        } else {
            copy[n++] = source[i];
        }
    }
    if (n && copy[n - 1] == '\n') n--; /* keep_trailing_newline is off */
    s.p = copy;
    s.end = copy + n;
    *body = NULL;
    return parse_body(&s, body, NULL, NULL);
}
