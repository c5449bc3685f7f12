/* samples/refrain/args.c - the option table at work. */
#include "samples/refrain/args.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/text.h"
#include "samples/refrain/program.h"

#define HELP_COLUMNS     80
#define HELP_TEXT_COLUMN 30
#define FAR_AWAY         64 /* more than any distance of two words */

static bool is_near(int distance, size_t word_len) {
    return distance <= 3 && (size_t)distance * 2 <= word_len;
}

const char *args_nearest(const char *word, const char *words, size_t *len) {
    const char *best = NULL;
    int best_distance = FAR_AWAY;
    size_t word_len = strlen(word);
    for (const char *w = words; *w;) {
        size_t w_len = strcspn(w, " ");
        int distance = rf_text_distance(word, word_len, w, w_len);
        if (is_near(distance, word_len) && distance < best_distance) {
            best = w;
            best_distance = distance;
            *len = w_len;
        }
        w += w_len;
        while (*w == ' ') w++;
    }
    return best;
}

static void unknown_option(const arg_spec *spec, const char *shown, const char *name, size_t name_len) {
    const char *best = NULL;
    int best_distance = FAR_AWAY;
    for (size_t i = 0; i < spec->num_options; i++) {
        const char *candidate = spec->options[i].name;
        bool starts = name_len >= 3 && strncmp(candidate, name, name_len) == 0;
        int distance = starts ? 1 : rf_text_distance(name, name_len, candidate, strlen(candidate));
        if (is_near(distance, name_len) && distance < best_distance) {
            best = candidate;
            best_distance = distance;
        }
    }
    if (best) {
        say_error("unknown option %s; did you mean --%s? (%s --help lists all)", shown, best, spec->command);
    } else {
        say_error("unknown option %s (%s --help lists all)", shown, spec->command);
    }
}

static const arg_option *find_long(const arg_spec *spec, const char *name, size_t name_len) {
    for (size_t i = 0; i < spec->num_options; i++) {
        const char *candidate = spec->options[i].name;
        if (strlen(candidate) == name_len && memcmp(candidate, name, name_len) == 0) return &spec->options[i];
    }
    return NULL;
}

static const arg_option *find_short(const arg_spec *spec, char c) {
    for (size_t i = 0; i < spec->num_options; i++) {
        if (spec->options[i].short_name == c) return &spec->options[i];
    }
    return NULL;
}

static bool takes_value(const arg_option *o) {
    return o->kind != ARG_FLAG && o->kind != ARG_COUNT;
}

static bool set_int(const arg_option *o, const char *value) {
    char *end = NULL;
    errno = 0;
    long long v = strtoll(value, &end, 10);
    if (end == value || *end) {
        say_error("--%s: expected a whole number, found '%s'", o->name, value);
        return false;
    }
    if (errno == ERANGE || (double)v < o->min || (double)v > o->max) {
        say_error("--%s: expected %.0f..%.0f, found %s", o->name, o->min, o->max, value);
        return false;
    }
    *(int64_t *)o->target = v;
    return true;
}

static bool set_double(const arg_option *o, const char *value) {
    char *end = NULL;
    double v = strtod(value, &end);
    if (end == value || *end || !isfinite(v)) {
        say_error("--%s: expected a number, found '%s'", o->name, value);
        return false;
    }
    if (v < o->min || v > o->max) {
        say_error("--%s: expected %g..%g, found %s", o->name, o->min, o->max, value);
        return false;
    }
    *(double *)o->target = v;
    return true;
}

static bool set_choice(const arg_option *o, const char *value) {
    size_t value_len = strlen(value);
    for (const char *w = o->choices; *w;) {
        size_t w_len = strcspn(w, " ");
        if (w_len == value_len && memcmp(w, value, w_len) == 0) {
            *(const char **)o->target = value;
            return true;
        }
        w += w_len;
        while (*w == ' ') w++;
    }
    size_t near_len = 0;
    const char *near = args_nearest(value, o->choices, &near_len);
    if (near) {
        say_error("--%s: no '%s'; did you mean %.*s? (one of: %s)", o->name, value, (int)near_len, near, o->choices);
    } else {
        say_error("--%s: no '%s'; one of: %s", o->name, value, o->choices);
    }
    return false;
}

static bool set_value(const arg_option *o, const char *value) {
    switch (o->kind) {
    case ARG_FLAG: *(bool *)o->target = true; return true;
    case ARG_COUNT: *(int *)o->target += 1; return true;
    case ARG_STRING:
        if (!value[0]) {
            say_error("--%s: expected %s, found an empty string", o->name, o->value_name);
            return false;
        }
        *(const char **)o->target = value;
        return true;
    case ARG_INT: return set_int(o, value);
    case ARG_DOUBLE: return set_double(o, value);
    case ARG_CHOICE: return set_choice(o, value);
    case ARG_LIST: {
        arg_list *list = o->target;
        if (list->count == ARG_LIST_MAX) {
            say_error("--%s: given more than %d times", o->name, ARG_LIST_MAX);
            return false;
        }
        list->items[list->count++] = value;
        return true;
    }
    }
    return false;
}

/* One --long argument; *index moves past its value. */
static bool parse_long(const arg_spec *spec, int argc, char **argv, int *index) {
    const char *arg = argv[*index];
    const char *equals = strchr(arg, '=');
    const char *name = arg + 2;
    size_t name_len = equals ? (size_t)(equals - name) : strlen(name);
    const arg_option *o = find_long(spec, name, name_len);
    if (!o) {
        unknown_option(spec, arg, name, name_len);
        return false;
    }
    if (!takes_value(o)) {
        if (equals) {
            say_error("--%s takes no value, found '%s'", o->name, equals + 1);
            return false;
        }
        return set_value(o, "");
    }
    if (equals) return set_value(o, equals + 1);
    if (*index + 1 >= argc) {
        say_error("--%s: expected %s after it, found nothing", o->name, o->value_name);
        return false;
    }
    *index += 1;
    return set_value(o, argv[*index]);
}

/* One -x argument, or flags run together. */
static bool parse_short(const arg_spec *spec, int argc, char **argv, int *index) {
    const char *arg = argv[*index];
    size_t len = strlen(arg + 1);
    for (const char *c = arg + 1; *c; c++) {
        const arg_option *o = find_short(spec, *c);
        /* "-steps" for "--steps" is the usual slip, and not -s with the value "teps". */
        if (!o || (len > 1 && find_long(spec, arg + 1, len))) {
            unknown_option(spec, arg, arg + 1, len);
            return false;
        }
        if (!takes_value(o)) {
            if (!set_value(o, "")) return false;
            continue;
        }
        if (c[1]) return set_value(o, c + 1);
        if (*index + 1 >= argc) {
            say_error("-%c: expected %s after it, found nothing", *c, o->value_name);
            return false;
        }
        *index += 1;
        return set_value(o, argv[*index]);
    }
    return true;
}

args_result args_parse(const arg_spec *spec, int argc, char **argv, const char **positional, int *num_positional) {
    int num = 0;
    bool only_positional = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (!only_positional && strcmp(arg, "--") == 0) {
            only_positional = true;
            continue;
        }
        if (!only_positional && (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0)) {
            args_print_help(spec);
            return ARGS_HELP;
        }
        if (!only_positional && arg[0] == '-' && arg[1] == '-') {
            if (!parse_long(spec, argc, argv, &i)) return ARGS_USAGE_ERROR;
        } else if (!only_positional && arg[0] == '-' && arg[1]) {
            if (!parse_short(spec, argc, argv, &i)) return ARGS_USAGE_ERROR;
        } else if (num < spec->max_positional) {
            positional[num++] = arg;
        } else {
            say_error("'%s' was not expected (%s --help)", arg, spec->command);
            return ARGS_USAGE_ERROR;
        }
    }
    if (num < spec->min_positional) {
        say_error("expected %s, found nothing (%s --help)", spec->positional_name, spec->command);
        return ARGS_USAGE_ERROR;
    }
    if (num_positional) *num_positional = num;
    return ARGS_OK;
}

/* Prints text from column `column`, broken between words at HELP_COLUMNS; the cursor is at that column already. */
static void print_wrapped(const char *text, int column) {
    int at = column;
    while (*text) {
        int word_len = (int)strcspn(text, " ");
        if (at > column && at + 1 + word_len > HELP_COLUMNS) {
            printf("\n%*s", column, "");
            at = column;
        } else if (at > column) {
            putchar(' ');
            at++;
        }
        printf("%.*s", word_len, text);
        at += word_len;
        text += word_len;
        while (*text == ' ') text++;
    }
    putchar('\n');
}

void args_print_help(const arg_spec *spec) {
    printf("usage: %s %s\n", spec->command, spec->usage);
    print_wrapped(spec->about, 0);
    for (size_t i = 0; i < spec->num_options; i++) {
        const arg_option *o = &spec->options[i];
        char left[64];
        char letter[8] = "    ";
        if (o->short_name) snprintf(letter, sizeof letter, "-%c, ", o->short_name);
        snprintf(left, sizeof left, "  %s--%s %s", letter, o->name, o->value_name ? o->value_name : "");
        printf("%-*s", HELP_TEXT_COLUMN, left);
        if (strlen(left) >= HELP_TEXT_COLUMN) printf("\n%*s", HELP_TEXT_COLUMN, "");
        print_wrapped(o->help, HELP_TEXT_COLUMN);
    }
}
