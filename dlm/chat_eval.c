/* dlm/chat_eval.c - runs a chat template's tree. A for loop has a scope of its own in every round, as in Jinja. */
#include <math.h>
#include <string.h>

#include "dlm/chat_internal.h"
#include "dlm/tokenizer_internal.h"

typedef struct scope scope;
struct scope {
    rf_value_map *names;
    scope *outer;
    const rf_node *body; /* statements that run in it */
};

typedef enum { FLOW_NEXT = 0, FLOW_BREAK, FLOW_CONTINUE } flow;

typedef struct {
    rf_chat_context x;
    scope *scope;
    rf_text *out;
    size_t out_start;
    int64_t steps;
    flow flow;
    int loops; /* open */
} runner;

static rf_status eval(runner *r, const rf_node *n, rf_value *out);

static rf_status step(runner *r, const rf_node *n) {
    r->x.line = n->line;
    if (++r->steps > RF_CHAT_MAX_STEPS) return rf_chat_refuse(&r->x, "more than %d steps", RF_CHAT_MAX_STEPS);
    return RF_OK;
}

/* ---- expressions ---- */

/* Whether the statements set name on every way through them. */
static bool always_sets(const rf_node *body, rf_str name) {
    for (const rf_node *n = body; n; n = n->next) {
        bool same = n->kind == RF_NODE_SET && !n->name2.num && n->name.num == name.num &&
                    memcmp(n->name.p, name.p, name.num) == 0;
        if (same) return true;
        if (n->kind == RF_NODE_IF && n->list2 && always_sets(n->list, name) && always_sets(n->list2, name)) return true;
    }
    return false;
}

/* In Jinja a name that is set further down around a loop is undefined inside the loop, whatever it is outside before: such
 * a template is refused, as it cannot mean that. */
static rf_status lookup(const runner *r, rf_str name, rf_value *out) {
    for (const scope *s = r->scope; s; s = s->outer) {
        const rf_value *v = rf_value_map_find(s->names, name);
        if (v) {
            *out = *v;
            return RF_OK;
        }
        if (s != r->scope && always_sets(s->body, name)) {
            return rf_chat_refuse(&r->x, "'%.*s' is used in a loop before it is set outside",
                                  (int)(name.num < 60 ? name.num : 60), name.p);
        }
    }
    bool function = rf_chat_function_known(name);
    *out = (rf_value){.kind = function ? RF_VALUE_FUNCTION : RF_VALUE_UNDEFINED, .string = name};
    return RF_OK;
}

static rf_status undefined(const runner *r, const rf_value *v) {
    return rf_chat_refuse(&r->x, "'%.*s' is undefined", (int)(v->string.num < 60 ? v->string.num : 60),
                          v->string.p ? v->string.p : "");
}

static bool is_number(const rf_value *v) {
    return v->kind >= RF_VALUE_BOOL && v->kind <= RF_VALUE_FLOAT;
}
static double as_double(const rf_value *v) {
    return v->kind == RF_VALUE_FLOAT ? v->number : v->kind == RF_VALUE_INT ? (double)v->integer : v->boolean;
}
static int64_t as_int(const rf_value *v) {
    return v->kind == RF_VALUE_INT ? v->integer : v->boolean;
}

static rf_status integer_op(const runner *r, rf_op op, int64_t a, int64_t b, rf_value *out) {
    int64_t n = 0;
    bool over = false;
    switch (op) {
    case RF_OP_ADD: over = __builtin_add_overflow(a, b, &n); break;
    case RF_OP_SUB: over = __builtin_sub_overflow(a, b, &n); break;
    case RF_OP_MUL: over = __builtin_mul_overflow(a, b, &n); break;
    default: /* // and %: towards minus infinity */
        if (b == 0) return rf_chat_refuse(&r->x, "a division by zero");
        over = a == INT64_MIN && b == -1;
        if (over) break;
        n = op == RF_OP_FLOORDIV ? a / b : a % b;
        if (a % b != 0 && ((a < 0) != (b < 0))) n += op == RF_OP_FLOORDIV ? -1 : b;
        break;
    }
    if (over) return rf_chat_refuse(&r->x, "a number that is too large");
    *out = (rf_value){.kind = RF_VALUE_INT, .integer = n};
    return RF_OK;
}

static rf_status binary(runner *r, rf_op op, const rf_value *a, const rf_value *b, rf_value *out) {
    rf_str p, q;
    if (op == RF_OP_CONCAT) {
        RF_TRY(rf_value_to_string(&r->x, a, &p));
        RF_TRY(rf_value_to_string(&r->x, b, &q));
        out->kind = RF_VALUE_STRING;
        return rf_value_concat(&r->x, p, q, &out->string);
    }
    if (a->kind == RF_VALUE_UNDEFINED) return undefined(r, a);
    if (b->kind == RF_VALUE_UNDEFINED) return undefined(r, b);
    if (is_number(a) && is_number(b)) {
        bool whole = a->kind != RF_VALUE_FLOAT && b->kind != RF_VALUE_FLOAT;
        if (whole && op != RF_OP_DIV) return integer_op(r, op, as_int(a), as_int(b), out);
        double x = as_double(a), y = as_double(b), z = 0;
        if (y == 0 && op >= RF_OP_DIV) return rf_chat_refuse(&r->x, "a division by zero");
        switch (op) {
        case RF_OP_ADD: z = x + y; break;
        case RF_OP_SUB: z = x - y; break;
        case RF_OP_MUL: z = x * y; break;
        case RF_OP_DIV: z = x / y; break;
        default: return rf_chat_refuse(&r->x, "// and %% of floats are not supported");
        }
        *out = (rf_value){.kind = RF_VALUE_FLOAT, .number = z};
        return RF_OK;
    }
    if (op == RF_OP_ADD && a->kind == RF_VALUE_STRING && b->kind == RF_VALUE_STRING) {
        out->kind = RF_VALUE_STRING;
        return rf_value_concat(&r->x, a->string, b->string, &out->string);
    }
    bool lists = a->kind == RF_VALUE_LIST && b->kind == RF_VALUE_LIST && !a->list->opaque && !b->list->opaque;
    if (op == RF_OP_ADD && lists) {
        RF_TRY(rf_value_list_new(&r->x, out));
        for (size_t i = 0; i < a->list->num; i++) RF_TRY(rf_value_list_add(&r->x, out->list, a->list->items[i]));
        for (size_t i = 0; i < b->list->num; i++) RF_TRY(rf_value_list_add(&r->x, out->list, b->list->items[i]));
        return RF_OK;
    }
    static const char *const names[] = {"+", "-", "*", "/", "//", "%", "~"};
    return rf_chat_refuse(&r->x, "%s %s %s", rf_value_kind_name(a), names[op], rf_value_kind_name(b));
}

static rf_status compare_one(runner *r, rf_op op, const rf_value *a, const rf_value *b, bool *out) {
    if (op == RF_OP_EQ || op == RF_OP_NE) {
        RF_TRY(rf_value_equal(&r->x, a, b, out));
        *out = *out == (op == RF_OP_EQ);
        return RF_OK;
    }
    if (op == RF_OP_IN || op == RF_OP_NOT_IN) {
        RF_TRY(rf_chat_contains(&r->x, b, a, out));
        *out = *out == (op == RF_OP_IN);
        return RF_OK;
    }
    if (a->kind == RF_VALUE_UNDEFINED) return undefined(r, a);
    if (b->kind == RF_VALUE_UNDEFINED) return undefined(r, b);
    int sign;
    if (is_number(a) && is_number(b)) {
        bool whole = a->kind != RF_VALUE_FLOAT && b->kind != RF_VALUE_FLOAT;
        sign = whole ? (as_int(a) > as_int(b)) - (as_int(a) < as_int(b))
                     : (as_double(a) > as_double(b)) - (as_double(a) < as_double(b));
    } else if (a->kind == RF_VALUE_STRING && b->kind == RF_VALUE_STRING) {
        size_t num = a->string.num < b->string.num ? a->string.num : b->string.num;
        sign = num ? memcmp(a->string.p, b->string.p, num) : 0;
        if (sign == 0) sign = (a->string.num > b->string.num) - (a->string.num < b->string.num);
    } else {
        return rf_chat_refuse(&r->x, "%s and %s cannot be ordered", rf_value_kind_name(a), rf_value_kind_name(b));
    }
    *out = op == RF_OP_LT ? sign < 0 : op == RF_OP_LE ? sign <= 0 : op == RF_OP_GT ? sign > 0 : sign >= 0;
    return RF_OK;
}

static rf_status compare(runner *r, const rf_node *n, rf_value *out) {
    rf_value left, right;
    bool yes = true;
    RF_TRY(eval(r, n->a, &left));
    for (const rf_node *m = n->list; m && yes; m = m->next) {
        RF_TRY(eval(r, m->a, &right));
        RF_TRY(compare_one(r, m->op, &left, &right, &yes));
        left = right;
    }
    *out = (rf_value){.kind = RF_VALUE_BOOL, .boolean = yes};
    return RF_OK;
}

/* a.name, and a[name] with a string */
static rf_status member(runner *r, const rf_value *of, rf_str name, rf_value *out) {
    *out = (rf_value){.kind = RF_VALUE_UNDEFINED, .string = name};
    if (of->kind == RF_VALUE_UNDEFINED) return undefined(r, of);
    if (of->kind != RF_VALUE_MAP) return RF_OK;
    const rf_value *v = rf_value_map_find(of->map, name);
    if (v) {
        *out = *v;
    } else if (of->map->is_loop) {
        return rf_chat_refuse(&r->x, "loop.%.*s is not supported", (int)(name.num < 60 ? name.num : 60), name.p);
    }
    return RF_OK;
}

/* Attributes that Python's own types have, which Jinja finds before a mapping's keys: known only as methods. */
static rf_status attribute(runner *r, const rf_node *n, rf_value *out) {
    static const char *const of_map[] = {"items", "keys",   "values", "get",        "pop",      "popitem",
                                         "copy",  "update", "clear",  "setdefault", "fromkeys", NULL};
    static const char *const of_list[] = {"append", "extend", "insert", "remove",  "pop",  "clear",
                                          "index",  "count",  "sort",   "reverse", "copy", NULL};
    static const char *const of_string[] = {
        "capitalize",   "casefold", "center",    "count",      "encode",     "endswith",
        "expandtabs",   "find",     "format",    "format_map", "index",      "join",
        "ljust",        "lower",    "lstrip",    "maketrans",  "partition",  "removeprefix",
        "removesuffix", "replace",  "rfind",     "rindex",     "rjust",      "rpartition",
        "rsplit",       "rstrip",   "split",     "splitlines", "startswith", "strip",
        "swapcase",     "title",    "translate", "upper",      "zfill",      NULL};
    rf_value of;
    RF_TRY(eval(r, n->a, &of));
    const char *const *methods = of.kind == RF_VALUE_STRING ? of_string : of.kind == RF_VALUE_LIST ? of_list : NULL;
    if (of.kind == RF_VALUE_MAP && !of.map->is_namespace && !of.map->is_loop) methods = of_map;
    for (; methods && *methods; methods++) {
        if (rf_str_is(n->name, *methods)) return rf_chat_refuse(&r->x, "'%s' as a value is not supported", *methods);
    }
    bool python = n->name.num >= 2 && n->name.p[0] == '_' && n->name.p[1] == '_';
    if (python || (of.kind == RF_VALUE_STRING && n->name.num > 2 && memcmp(n->name.p, "is", 2) == 0)) {
        return rf_chat_refuse(&r->x, "'%.*s' as a value is not supported", (int)(n->name.num < 60 ? n->name.num : 60),
                              n->name.p);
    }
    return member(r, &of, n->name, out);
}

static rf_status string_characters(runner *r, const rf_value *v, rf_value *out) {
    rf_chat_args none = {0};
    return rf_chat_filter(&r->x, RF_STR("list"), v, &none, out);
}

static rf_status item(runner *r, const rf_node *n, rf_value *out) {
    rf_value of, key;
    RF_TRY(eval(r, n->list, &of));
    RF_TRY(eval(r, n->a, &key));
    if (key.kind == RF_VALUE_STRING && of.kind != RF_VALUE_STRING && of.kind != RF_VALUE_LIST) {
        return member(r, &of, key.string, out);
    }
    if (of.kind == RF_VALUE_UNDEFINED) return undefined(r, &of);
    if (of.kind == RF_VALUE_STRING && key.kind == RF_VALUE_INT) RF_TRY(string_characters(r, &of, &of));
    if (of.kind == RF_VALUE_LIST && !of.list->opaque && key.kind == RF_VALUE_INT) {
        int64_t num = (int64_t)of.list->num, i = key.integer < 0 ? key.integer + num : key.integer;
        *out =
            i >= 0 && i < num ? of.list->items[i] : (rf_value){.kind = RF_VALUE_UNDEFINED, .string = RF_STR("an item")};
        return RF_OK;
    }
    return rf_chat_refuse(&r->x, "%s with %s as index", rf_value_kind_name(&of), rf_value_kind_name(&key));
}

/* Python's slices. */
static rf_status slice(runner *r, const rf_node *n, rf_value *out) {
    rf_value of, part;
    const rf_node *const parts[3] = {n->a, n->b, n->c};
    int64_t at[3] = {0, 0, 1};
    bool given[3] = {0};
    RF_TRY(eval(r, n->list, &of));
    for (int i = 0; i < 3; i++) {
        if (!parts[i]) continue;
        RF_TRY(eval(r, parts[i], &part));
        if (part.kind == RF_VALUE_NONE) continue;
        if (part.kind != RF_VALUE_INT) return rf_chat_refuse(&r->x, "a slice by %s", rf_value_kind_name(&part));
        at[i] = part.integer;
        given[i] = true;
    }
    bool is_string = of.kind == RF_VALUE_STRING;
    if (is_string) RF_TRY(string_characters(r, &of, &of));
    if (of.kind == RF_VALUE_UNDEFINED) return undefined(r, &of);
    if (of.kind != RF_VALUE_LIST || of.list->opaque)
        return rf_chat_refuse(&r->x, "a slice of %s", rf_value_kind_name(&of));
    if (at[2] == 0) return rf_chat_refuse(&r->x, "a slice with step 0");
    int64_t num = (int64_t)of.list->num, low = at[2] > 0 ? 0 : -1, high = at[2] > 0 ? num : num - 1;
    for (int i = 0; i < 2; i++) {
        if (!given[i]) {
            at[i] = (i == 0) == (at[2] > 0) ? low : high;
            continue;
        }
        if (at[i] < 0) at[i] = at[i] < -num ? low : at[i] + num;
        if (at[i] < low) at[i] = low;
        if (at[i] > high) at[i] = high;
    }
    rf_value list;
    RF_TRY(rf_value_list_new(&r->x, &list));
    int64_t stride = at[2] > num ? num + 1 : at[2] < -num ? -num - 1 : at[2];
    for (int64_t i = at[0]; stride > 0 ? i < at[1] : i > at[1]; i += stride) {
        RF_TRY(rf_value_list_add(&r->x, list.list, of.list->items[i]));
    }
    *out = list;
    rf_chat_args none = {0};
    return is_string ? rf_chat_filter(&r->x, RF_STR("join"), &list, &none, out) : RF_OK;
}

static rf_status arguments(runner *r, const rf_node *list, rf_chat_args *args) {
    rf_value items, named = {0};
    RF_TRY(rf_value_list_new(&r->x, &items));
    for (const rf_node *m = list; m; m = m->next) {
        rf_value v;
        RF_TRY(eval(r, m->a, &v));
        if (m->name.num) {
            if (!named.map) RF_TRY(rf_value_map_new(&r->x, &named));
            RF_TRY(rf_value_map_set(&r->x, named.map, m->name, v));
        } else {
            RF_TRY(rf_value_list_add(&r->x, items.list, v));
        }
    }
    *args = (rf_chat_args){items.list->items, items.list->num, named.map};
    return RF_OK;
}

static rf_status call(runner *r, const rf_node *n, rf_value *out) {
    rf_chat_args args;
    rf_value self;
    if (n->a->kind == RF_NODE_ATTRIBUTE) {
        RF_TRY(eval(r, n->a->a, &self));
        if (self.kind == RF_VALUE_UNDEFINED) return undefined(r, &self);
        RF_TRY(arguments(r, n->list, &args));
        return rf_chat_method(&r->x, &self, n->a->name, &args, out);
    }
    RF_TRY(lookup(r, n->a->name, &self));
    if (self.kind != RF_VALUE_FUNCTION) {
        return rf_chat_refuse(&r->x, "a call of '%.*s', which is %s", (int)(n->a->name.num < 60 ? n->a->name.num : 60),
                              n->a->name.p, rf_value_kind_name(&self));
    }
    RF_TRY(arguments(r, n->list, &args));
    return rf_chat_function(&r->x, n->a->name, &args, out);
}

static rf_status eval(runner *r, const rf_node *n, rf_value *out) {
    rf_value a, b;
    rf_chat_args args;
    RF_TRY(step(r, n));
    *out = (rf_value){0};
    switch (n->kind) {
    case RF_NODE_CONST: *out = n->constant; return RF_OK;
    case RF_NODE_NAME: return lookup(r, n->name, out);
    case RF_NODE_LIST:
        RF_TRY(rf_value_list_new(&r->x, out));
        for (const rf_node *m = n->list; m; m = m->next) {
            RF_TRY(eval(r, m->a, &a));
            RF_TRY(rf_value_list_add(&r->x, out->list, a));
        }
        return RF_OK;
    case RF_NODE_DICT:
        RF_TRY(rf_value_map_new(&r->x, out));
        for (const rf_node *m = n->list; m; m = m->next->next) {
            RF_TRY(eval(r, m->a, &a));
            RF_TRY(eval(r, m->next->a, &b));
            if (a.kind != RF_VALUE_STRING) return rf_chat_refuse(&r->x, "%s as a key", rf_value_kind_name(&a));
            RF_TRY(rf_value_map_set(&r->x, out->map, a.string, b));
        }
        return RF_OK;
    case RF_NODE_NOT:
        RF_TRY(eval(r, n->a, &a));
        *out = (rf_value){.kind = RF_VALUE_BOOL, .boolean = !rf_value_true(&a)};
        return RF_OK;
    case RF_NODE_NEGATE:
        RF_TRY(eval(r, n->a, &a));
        if (a.kind == RF_VALUE_FLOAT) {
            *out = (rf_value){.kind = RF_VALUE_FLOAT, .number = -a.number};
            return RF_OK;
        }
        b = (rf_value){.kind = RF_VALUE_INT};
        return binary(r, RF_OP_SUB, &b, &a, out);
    case RF_NODE_AND:
    case RF_NODE_OR:
        RF_TRY(eval(r, n->a, out));
        return rf_value_true(out) == (n->kind == RF_NODE_AND) ? eval(r, n->b, out) : RF_OK;
    case RF_NODE_BINARY:
        RF_TRY(eval(r, n->a, &a));
        RF_TRY(eval(r, n->b, &b));
        return binary(r, n->op, &a, &b, out);
    case RF_NODE_COMPARE: return compare(r, n, out);
    case RF_NODE_CONDITIONAL:
        RF_TRY(eval(r, n->b, &b));
        if (rf_value_true(&b)) return eval(r, n->a, out);
        return n->c ? eval(r, n->c, out) : RF_OK;
    case RF_NODE_ATTRIBUTE: return attribute(r, n, out);
    case RF_NODE_ITEM: return item(r, n, out);
    case RF_NODE_SLICE: return slice(r, n, out);
    case RF_NODE_CALL: return call(r, n, out);
    case RF_NODE_FILTER:
        RF_TRY(eval(r, n->a, &a));
        RF_TRY(arguments(r, n->list, &args));
        r->x.line = n->line;
        return rf_chat_filter(&r->x, n->name, &a, &args, out);
    case RF_NODE_TEST:
        RF_TRY(eval(r, n->a, &a));
        RF_TRY(arguments(r, n->list, &args));
        out->kind = RF_VALUE_BOOL;
        RF_TRY(rf_chat_test(&r->x, n->name, &a, &args, &out->boolean));
        out->boolean ^= n->negated;
        return RF_OK;
    default: return rf_chat_refuse(&r->x, "a statement in an expression");
    }
}

/* ---- statements ---- */

static rf_status run_list(runner *r, const rf_node *list);

static rf_status write(runner *r, rf_str s) {
    if (s.num > RF_CHAT_MAX_BYTES || r->out->num - r->out_start > RF_CHAT_MAX_BYTES - s.num)
        return rf_chat_refuse(&r->x, "too much text");
    return rf_text_append(r->out, s.p, s.num, r->x.err);
}

static rf_status set(runner *r, const rf_node *n) {
    rf_value v;
    RF_TRY(eval(r, n->a, &v));
    if (!n->name2.num) return rf_value_map_set(&r->x, r->scope->names, n->name, v);
    rf_value space;
    RF_TRY(lookup(r, n->name, &space));
    if (space.kind != RF_VALUE_MAP || !space.map->is_namespace) {
        return rf_chat_refuse(&r->x, "an attribute is set of '%.*s', which is no namespace",
                              (int)(n->name.num < 60 ? n->name.num : 60), n->name.p);
    }
    if (v.kind == RF_VALUE_MAP && v.map->is_namespace) return rf_chat_refuse(&r->x, "a namespace inside a namespace");
    return rf_value_map_set(&r->x, space.map, n->name2, v);
}

static rf_status bind(runner *r, const rf_node *n, const rf_value *v, rf_value_map *names) {
    if (!n->targets->next) return rf_value_map_set(&r->x, names, n->targets->name, *v);
    if (v->kind != RF_VALUE_LIST) return rf_chat_refuse(&r->x, "%s cannot be unpacked", rf_value_kind_name(v));
    size_t i = 0;
    for (const rf_node *t = n->targets; t; t = t->next, i++) {
        if (i >= v->list->num) break;
        RF_TRY(rf_value_map_set(&r->x, names, t->name, v->list->items[i]));
        if (!t->next && i + 1 == v->list->num) return RF_OK;
    }
    return rf_chat_refuse(&r->x, "a list of %zu values does not fit the names of the loop", v->list->num);
}

static rf_status loop_value(runner *r, const rf_value_list *list, size_t i, rf_value *out) {
    const struct {
        const char *name;
        rf_value value;
    } members[] = {
        {"index", {.kind = RF_VALUE_INT, .integer = (int64_t)i + 1}},
        {"index0", {.kind = RF_VALUE_INT, .integer = (int64_t)i}},
        {"revindex", {.kind = RF_VALUE_INT, .integer = (int64_t)(list->num - i)}},
        {"revindex0", {.kind = RF_VALUE_INT, .integer = (int64_t)(list->num - i) - 1}},
        {"first", {.kind = RF_VALUE_BOOL, .boolean = i == 0}},
        {"last", {.kind = RF_VALUE_BOOL, .boolean = i + 1 == list->num}},
        {"length", {.kind = RF_VALUE_INT, .integer = (int64_t)list->num}},
        {"previtem", i ? list->items[i - 1] : (rf_value){.kind = RF_VALUE_UNDEFINED, .string = RF_STR("previtem")}},
        {"nextitem",
         i + 1 < list->num ? list->items[i + 1] : (rf_value){.kind = RF_VALUE_UNDEFINED, .string = RF_STR("nextitem")}},
    };
    RF_TRY(rf_value_map_new(&r->x, out));
    out->map->is_loop = true;
    for (size_t k = 0; k < sizeof members / sizeof *members; k++) {
        RF_TRY(rf_value_map_set(&r->x, out->map, (rf_str){members[k].name, strlen(members[k].name)}, members[k].value));
    }
    return RF_OK;
}

static rf_status run_for(runner *r, const rf_node *n) {
    rf_value over, list, names, keep, loop;
    rf_chat_args none = {0};
    RF_TRY(eval(r, n->a, &over));
    RF_TRY(rf_chat_filter(&r->x, RF_STR("list"), &over, &none, &list));
    scope inner = {.outer = r->scope};
    if (n->b) {
        rf_value kept;
        RF_TRY(rf_value_list_new(&r->x, &kept));
        for (size_t i = 0; i < list.list->num; i++) {
            RF_TRY(rf_value_map_new(&r->x, &names));
            inner.names = names.map;
            RF_TRY(bind(r, n, &list.list->items[i], names.map));
            r->scope = &inner;
            rf_status st = eval(r, n->b, &keep);
            r->scope = inner.outer;
            if (st != RF_OK) return st;
            if (rf_value_true(&keep)) RF_TRY(rf_value_list_add(&r->x, kept.list, list.list->items[i]));
        }
        list = kept;
    }
    bool whole_round = false; /* Jinja's else: no round came to its end, be it for break or continue */
    r->loops++;
    for (size_t i = 0; i < list.list->num; i++) {
        RF_TRY(step(r, n));
        RF_TRY(rf_value_map_new(&r->x, &names));
        RF_TRY(loop_value(r, list.list, i, &loop));
        RF_TRY(rf_value_map_set(&r->x, names.map, RF_STR("loop"), loop));
        RF_TRY(bind(r, n, &list.list->items[i], names.map));
        inner.names = names.map;
        inner.body = n->list;
        r->scope = &inner;
        rf_status st = run_list(r, n->list);
        r->scope = inner.outer;
        if (st != RF_OK) return st;
        whole_round |= r->flow == FLOW_NEXT;
        bool stop = r->flow == FLOW_BREAK;
        r->flow = FLOW_NEXT;
        if (stop) break;
    }
    r->loops--;
    return whole_round ? RF_OK : run_list(r, n->list2);
}

static rf_status run_list(runner *r, const rf_node *list) {
    for (const rf_node *n = list; n && r->flow == FLOW_NEXT; n = n->next) {
        rf_value v;
        rf_str s;
        RF_TRY(step(r, n));
        switch (n->kind) {
        case RF_NODE_TEXT: RF_TRY(write(r, n->name)); break;
        case RF_NODE_OUTPUT:
            RF_TRY(eval(r, n->a, &v));
            r->x.line = n->line;
            RF_TRY(rf_value_to_string(&r->x, &v, &s));
            RF_TRY(write(r, s));
            break;
        case RF_NODE_IF:
            RF_TRY(eval(r, n->a, &v));
            RF_TRY(run_list(r, rf_value_true(&v) ? n->list : n->list2));
            break;
        case RF_NODE_FOR: RF_TRY(run_for(r, n)); break;
        case RF_NODE_SET: RF_TRY(set(r, n)); break;
        case RF_NODE_BREAK:
        case RF_NODE_CONTINUE:
            if (!r->loops) return rf_chat_refuse(&r->x, "break or continue outside a loop");
            r->flow = n->kind == RF_NODE_BREAK ? FLOW_BREAK : FLOW_CONTINUE;
            break;
        default: return rf_chat_refuse(&r->x, "an expression as a statement");
        }
    }
    return RF_OK;
}

rf_status rf_chat_run(const rf_chat_context *x, const rf_node *body, rf_value_map *globals, rf_text *out) {
    rf_value names;
    RF_TRY(rf_value_map_new(x, &names));
    scope given = {.names = globals}, top = {.names = names.map, .outer = &given, .body = body};
    runner r = {.x = *x, .scope = &top, .out = out, .out_start = out->num};
    return run_list(&r, body);
}
