/* samples/refrain/args.h - command line options from a table: parsing, checking and the --help text come from one place.
 *
 * A command fills an array of arg_option whose `target` points at its own variables (already holding the defaults) and
 * calls args_parse. Accepted forms: --name VALUE, --name=VALUE, -x VALUE, -xVALUE, flags run together (-qv), and -- before
 * arguments that begin with a dash. The value of an option is the next argument whatever it looks like: -s -1 works. */
#ifndef REFRAIN_ARGS_H
#define REFRAIN_ARGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    ARG_FLAG = 0, /* bool *: set to true */
    ARG_COUNT,    /* int *: one more each time */
    ARG_STRING,   /* const char **: borrowed from argv */
    ARG_INT,      /* int64_t *: min..max */
    ARG_DOUBLE,   /* double *: min..max */
    ARG_CHOICE,   /* const char **: one word of `choices` */
    ARG_LIST      /* arg_list *: one more string each time */
} arg_kind;

#define ARG_LIST_MAX 1024

typedef struct {
    const char *items[ARG_LIST_MAX];
    int count;
} arg_list;

typedef struct {
    const char *name; /* without the dashes */
    char short_name;  /* 0 = none */
    arg_kind kind;
    const char *value_name; /* in --help; NULL for flags */
    const char *help;       /* one short line; a default is written in it */
    void *target;           /* see arg_kind */
    double min, max;        /* ARG_INT, ARG_DOUBLE: both inside the range */
    const char *choices;    /* ARG_CHOICE: words separated by single spaces */
} arg_option;

/* Rows of the table, so that a target cannot have the wrong type. */
static inline arg_option arg_flag(const char *name, char letter, const char *help, bool *target) {
    return (arg_option){.name = name, .short_name = letter, .kind = ARG_FLAG, .help = help, .target = target};
}
static inline arg_option arg_count(const char *name, char letter, const char *help, int *target) {
    return (arg_option){.name = name, .short_name = letter, .kind = ARG_COUNT, .help = help, .target = target};
}
static inline arg_option arg_string(const char *name, char letter, const char *value, const char *help,
                                    const char **target) {
    return (arg_option){
        .name = name, .short_name = letter, .kind = ARG_STRING, .value_name = value, .help = help, .target = target};
}
static inline arg_option arg_strings(const char *name, char letter, const char *value, const char *help,
                                     arg_list *target) {
    return (arg_option){
        .name = name, .short_name = letter, .kind = ARG_LIST, .value_name = value, .help = help, .target = target};
}
static inline arg_option arg_choice(const char *name, char letter, const char *help, const char **target,
                                    const char *choices) {
    return (arg_option){.name = name,
                        .short_name = letter,
                        .kind = ARG_CHOICE,
                        .value_name = "NAME",
                        .help = help,
                        .target = target,
                        .choices = choices};
}
static inline arg_option arg_int(const char *name, char letter, const char *value, const char *help, int64_t *target,
                                 double min, double max) {
    return (arg_option){.name = name,
                        .short_name = letter,
                        .kind = ARG_INT,
                        .value_name = value,
                        .help = help,
                        .target = target,
                        .min = min,
                        .max = max};
}
static inline arg_option arg_double(const char *name, char letter, const char *value, const char *help, double *target,
                                    double min, double max) {
    return (arg_option){.name = name,
                        .short_name = letter,
                        .kind = ARG_DOUBLE,
                        .value_name = value,
                        .help = help,
                        .target = target,
                        .min = min,
                        .max = max};
}

typedef struct {
    const char *command; /* "refrain image" */
    const char *usage;   /* what follows it: "[options]" */
    const char *about;   /* a sentence or two, ends without newline */
    const arg_option *options;
    size_t num_options;
    int min_positional, max_positional; /* how many plain arguments */
    const char *positional_name;        /* "MODEL", for messages */
} arg_spec;

typedef enum { ARGS_OK = 0, ARGS_HELP, ARGS_USAGE_ERROR } args_result;

/* argv[0] is the command's name. Plain arguments are written to positional (max_positional entries, in order).
 * ARGS_HELP: --help or -h was there and has been printed to standard output. ARGS_USAGE_ERROR: the message is out. */
args_result args_parse(const arg_spec *spec, int argc, char **argv, const char **positional, int *num_positional);

/* The help text as args_parse prints it. */
void args_print_help(const arg_spec *spec);

/* The word of a space-separated list that is nearest to `word` by edit distance, or NULL if none is near. The length goes
 * to *len: the list's words are not zero-terminated. */
const char *args_nearest(const char *word, const char *words, size_t *len);

#endif
