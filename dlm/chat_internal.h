/* dlm/chat_internal.h - the syntax tree and the values of chat templates. */
#ifndef RF_DLM_CHAT_INTERNAL_H
#define RF_DLM_CHAT_INTERNAL_H

#include "core/json.h"
#include "dlm/chat_template.h"

#define RF_CHAT_MAX_SOURCE ((size_t)1 << 20)
#define RF_CHAT_MAX_DEPTH  100 /* of nesting, in the template and in its values */
#define RF_CHAT_MAX_STEPS  10000000
#define RF_CHAT_MAX_BYTES  ((size_t)256 << 20)

/* Memory freed at once. */
typedef struct rf_chat_block rf_chat_block;
typedef struct {
    rf_chat_block *blocks;
    size_t used, size;  /* of the newest block */
    size_t total_bytes; /* of all */
    bool over_limit;    /* an allocation was refused for RF_CHAT_MAX_BYTES */
} rf_chat_pool;
void *rf_chat_alloc(rf_chat_pool *pool, size_t bytes); /* zeroed; NULL: no memory, or past RF_CHAT_MAX_BYTES */
void rf_chat_pool_clear(rf_chat_pool *pool);

typedef struct {
    const char *p;
    size_t num;
} rf_str;
#define RF_STR(literal) ((rf_str){literal, sizeof(literal) - 1})
bool rf_str_is(rf_str s, const char *text);

/* ---- values ---- */

typedef enum {
    RF_VALUE_UNDEFINED = 0,
    RF_VALUE_NONE,
    RF_VALUE_BOOL,
    RF_VALUE_INT,
    RF_VALUE_FLOAT,
    RF_VALUE_STRING,
    RF_VALUE_LIST,
    RF_VALUE_MAP,
    RF_VALUE_GENERATOR, /* a list that can be gone over once: of items, select and reject */
    RF_VALUE_FUNCTION
} rf_value_kind;

typedef struct rf_value rf_value;
typedef struct {
    rf_value *items;
    size_t num, capacity;
    int depth;   /* of the values inside */
    bool opaque; /* of range and a mapping's items(), keys(), values(): to be gone over, but no list to Python */
} rf_value_list;
typedef struct rf_value_map rf_value_map;

struct rf_value {
    rf_value_kind kind;
    union {
        bool boolean;
        int64_t integer;
        double number;
        rf_str string; /* also the name of a function, and of what was undefined */
        rf_value_list *list;
        rf_value_map *map;
    };
};

struct rf_value_map {
    rf_str *keys;
    rf_value *values;
    size_t num, capacity;
    int depth;         /* as above */
    bool is_namespace; /* attributes can be set */
    bool is_loop;      /* unknown attributes are refused */
};

/* ---- syntax tree ---- */

typedef enum {
    RF_NODE_TEXT = 0, /* statements */
    RF_NODE_OUTPUT,
    RF_NODE_IF,
    RF_NODE_FOR,
    RF_NODE_SET,
    RF_NODE_BREAK,
    RF_NODE_CONTINUE,
    RF_NODE_CONST, /* expressions */
    RF_NODE_NAME,
    RF_NODE_LIST,
    RF_NODE_DICT,
    RF_NODE_NOT,
    RF_NODE_NEGATE,
    RF_NODE_AND,
    RF_NODE_OR,
    RF_NODE_BINARY,
    RF_NODE_COMPARE,
    RF_NODE_CONDITIONAL,
    RF_NODE_ATTRIBUTE,
    RF_NODE_ITEM,
    RF_NODE_SLICE,
    RF_NODE_CALL,
    RF_NODE_FILTER,
    RF_NODE_TEST
} rf_node_kind;

typedef enum {
    RF_OP_ADD = 0,
    RF_OP_SUB,
    RF_OP_MUL,
    RF_OP_DIV,
    RF_OP_FLOORDIV,
    RF_OP_MOD,
    RF_OP_CONCAT,
    RF_OP_EQ,
    RF_OP_NE,
    RF_OP_LT,
    RF_OP_LE,
    RF_OP_GT,
    RF_OP_GE,
    RF_OP_IN,
    RF_OP_NOT_IN
} rf_op;

typedef struct rf_node rf_node;
struct rf_node {
    rf_node_kind kind;
    rf_op op;     /* BINARY; of each operand of a COMPARE */
    bool negated; /* TEST */
    int line;
    rf_str name;  /* NAME, ATTRIBUTE, FILTER, TEST, SET; of a keyword argument */
    rf_str name2; /* SET: attribute of a namespace */
    rf_value constant;
    rf_node *a, *b, *c; /* operands; CONDITIONAL: value, condition, otherwise; SLICE: from, to, step of `list`;
                            * FOR: iterable, filter */
    rf_node *list,
        *list2;       /* statements of IF and FOR and of their else; items; arguments; key, value, key, ... of DICT */
    rf_node *targets; /* FOR: names */
    rf_node *next;    /* in the list that it is part of */
};

struct rf_chat_template {
    rf_chat_pool pool;
    rf_node *body;
    rf_value_map *tokens; /* bos_token, ... */
    const char *name;
};

/* chat_parse.c: the tree of source, in pool. */
rf_status rf_chat_parse(rf_chat_pool *pool, const char *source, size_t num_bytes, const char *name, rf_node **body,
                        rf_error *err);

/* chat_value.c */
typedef struct {
    rf_chat_pool *pool;
    const char *name; /* of the template */
    int line;
    rf_error *err;
} rf_chat_context;
rf_status rf_chat_no_memory(const rf_chat_context *x);
rf_status rf_chat_refuse(const rf_chat_context *x, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;
rf_status rf_value_list_new(const rf_chat_context *x, rf_value *out);
rf_status rf_value_list_add(const rf_chat_context *x, rf_value_list *list, rf_value item);
rf_status rf_value_map_new(const rf_chat_context *x, rf_value *out);
rf_status rf_value_map_set(const rf_chat_context *x, rf_value_map *map, rf_str key, rf_value value);
const rf_value *rf_value_map_find(const rf_value_map *map, rf_str key); /* NULL if absent */
rf_status rf_value_from_json(const rf_chat_context *x, const rf_json_value *json, rf_value *out);
bool rf_value_true(const rf_value *v);
rf_status rf_value_equal(const rf_chat_context *x, const rf_value *a, const rf_value *b, bool *out);
const char *rf_value_kind_name(const rf_value *v);
/* A string in pool memory; undefined is "". */
rf_status rf_value_to_string(const rf_chat_context *x, const rf_value *v, rf_str *out);
rf_status rf_value_to_json(const rf_chat_context *x, const rf_value *v, int indent,
                           rf_str *out); /* indent -1: one line */
rf_status rf_value_concat(const rf_chat_context *x, rf_str a, rf_str b, rf_str *out);

/* chat_call.c */
bool rf_chat_filter_known(rf_str name);
bool rf_chat_test_known(rf_str name);
bool rf_chat_function_known(rf_str name);
typedef struct {
    const rf_value *items; /* positional */
    size_t num;
    const rf_value_map *named;
} rf_chat_args;
rf_status rf_chat_filter(const rf_chat_context *x, rf_str name, const rf_value *v, const rf_chat_args *args,
                         rf_value *out);
rf_status rf_chat_test(const rf_chat_context *x, rf_str name, const rf_value *v, const rf_chat_args *args, bool *out);
rf_status rf_chat_function(const rf_chat_context *x, rf_str name, const rf_chat_args *args, rf_value *out);
rf_status rf_chat_method(const rf_chat_context *x, const rf_value *self, rf_str name, const rf_chat_args *args,
                         rf_value *out);
rf_status rf_chat_contains(const rf_chat_context *x, const rf_value *container, const rf_value *v, bool *out);

/* chat_eval.c */
rf_status rf_chat_run(const rf_chat_context *x, const rf_node *body, rf_value_map *globals, rf_text *out);

#endif
