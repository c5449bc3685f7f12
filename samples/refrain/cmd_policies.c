/* samples/refrain/cmd_policies.c - `refrain policies`: which ways there are to reuse work between steps and to keep less of a cache, the
 * options of one, and the presets of a model (its cache.json alone is read, not its weights). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/kv/kv.h"
#include "caching/presets.h"
#include "core/file.h"
#include "core/memory.h"
#include "samples/refrain/args.h"
#include "samples/refrain/cache_args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"

#define COLUMNS     80
#define NAME_WIDTH  12
#define LEVEL_WIDTH 8
#define PAPER_WIDTH 12
#define TEXT_WIDTH  10 /* of the headings of one policy */
#define VALUE_WIDTH 26
#define KV_WIDTH    18 /* names of KV methods */

/* Text from column `column` on, broken between words; the cursor is there already. */
static void print_wrapped(const char *text, int column) {
    int at = column;
    while (*text) {
        int word_len = (int)strcspn(text, " ");
        if (at > column && at + 1 + word_len > COLUMNS) {
            printf("\n%*s", column, "");
            at = column;
        } else if (at > column) {
            putchar(' ');
            at++;
        }
        printf("%.*s", word_len, text);
        at += word_len;
        text += word_len;
        text += strspn(text, " ");
    }
    putchar('\n');
}

/* ---- the list ---- */

/* The arXiv number of a paper: "Title, arXiv 2603.06331" or with more after it; "-" if it has none. */
static void paper_number(const char *paper, char *text, size_t text_bytes) {
    const char *number = strstr(paper, ", arXiv ");
    number = number ? number + strlen(", arXiv ") : "";
    size_t len = strspn(number, "0123456789.");
    snprintf(text, text_bytes, "%.*s", len ? (int)len : 1, len ? number : "-");
}

static void print_line(const rf_policy_def *def) {
    char number[32];
    paper_number(def->paper, number, sizeof number);
    printf("%-*s%-*s%-*s", NAME_WIDTH, def->name, LEVEL_WIDTH, def->level, PAPER_WIDTH, number);
    print_wrapped(def->summary, NAME_WIDTH + LEVEL_WIDTH + PAPER_WIDTH);
}

static void print_method(const rf_kv_method *m) {
    char number[32];
    paper_number(m->source, number, sizeof number);
    printf("%-*s%-*s", KV_WIDTH, m->name, PAPER_WIDTH, number);
    print_wrapped(m->about, KV_WIDTH + PAPER_WIDTH);
}

static void print_list(void) {
    printf("%-*s%-*s%-*s%s\n", NAME_WIDTH, "name", LEVEL_WIDTH, "level", PAPER_WIDTH, "arXiv", "what it does");
    for (int i = 0; i < rf_policy_count(); i++) print_line(rf_policy_at(i));
    printf("\nRows of a text (refrain text --cache-mode NAME):\n");
    for (int i = 0; i < rf_row_policy_count(); i++) print_line(rf_row_policy_at(i));
    printf("\nKeys and values of an autoregressive model (refrain text --kv-policy NAME):\n");
    for (int i = 0; i < rf_kv_num_methods(); i++) print_method(rf_kv_method_at(i));
    printf("Parts of one can be changed, or put together anew: snapkv:window=16+alloc=cake,\n"
           "score=attention,queries=window. refrain policies kv lists all of them.\n");
    printf("\nrefrain policies NAME shows one with its options; refrain policies -m MODEL the\n"
           "presets of a model; refrain image --cache-mode NAME --cache-option K=V uses one,\n"
           "refrain world too: all of them fit worlds, but for those of text.\n");
}

/* ---- one policy ---- */

/* "0..10", "on | off": what a value may be. */
static void range_text(const rf_policy_option *o, char *text, size_t text_bytes) {
    switch (o->type) {
    case RF_OPTION_INT: snprintf(text, text_bytes, "whole number %.0f..%.0f", o->min, o->max); return;
    case RF_OPTION_DOUBLE: snprintf(text, text_bytes, "number %g..%g", o->min, o->max); return;
    case RF_OPTION_BOOL: snprintf(text, text_bytes, "true | false"); return;
    case RF_OPTION_TEXT: snprintf(text, text_bytes, "text"); return;
    case RF_OPTION_CHOICE: break;
    }
    size_t used = 0;
    for (const char *c = o->choices; *c && used + 4 < text_bytes; c++) {
        used += (size_t)snprintf(text + used, text_bytes - used, *c == ' ' ? " | " : "%c", *c);
    }
}

static void print_heading(const char *heading, const char *text) {
    printf("  %-*s", TEXT_WIDTH, heading);
    print_wrapped(text, 2 + TEXT_WIDTH);
}

static void print_option(const rf_policy_option *o) {
    char left[128], range[512] = "", right[1024];
    snprintf(left, sizeof left, "  %s=%s", o->name, o->def);
    printf("%-*s", VALUE_WIDTH, left);
    if (strlen(left) >= VALUE_WIDTH) printf("\n%*s", VALUE_WIDTH, "");
    range_text(o, range, sizeof range);
    snprintf(right, sizeof right, "%s; %s", o->help, range);
    print_wrapped(right, VALUE_WIDTH);
}

static void print_policy(const rf_policy_def *def) {
    printf("%s (%s level)\n", def->name, def->level);
    print_heading("does", def->summary);
    print_heading("paper", def->paper);
    print_heading("fits", def->fits);
    if (!def->rows) {
        print_heading("worlds", def->carries
                                    ? "inside the steps of a frame; --carry starts a frame with the last one's features"
                                    : "inside the steps of a frame");
    }
    printf("\noptions, with their defaults%s\n", def->num_options ? ":" : ": none");
    for (int i = 0; i < def->num_options; i++) print_option(&def->options[i]);
}

/* ---- KV methods ---- */

static const rf_kv_method *find_method(const char *name) {
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        if (strcmp(rf_kv_method_at(i)->name, name) == 0) return rf_kv_method_at(i);
    }
    return NULL;
}

/* What it stands for, as a user would write it. */
static rf_status method_rule(const rf_kv_method *m, char *text, size_t room, rf_error *err) {
    rf_kv_rule rule;
    RF_TRY(rf_kv_rule_parse(&rule, m->name, err));
    rf_kv_rule_describe(&rule, text, room);
    return RF_OK;
}

/* Breaks behind commas, where print_wrapped breaks between words. */
static void print_rule(const char *rule) {
    char spaced[1024];
    size_t used = 0;
    for (; *rule && used + 3 < sizeof spaced; rule++) {
        spaced[used++] = *rule;
        if (*rule == ',') spaced[used++] = ' ';
    }
    spaced[used] = 0;
    print_heading("is", spaced);
}

static rf_status print_one_method(const rf_kv_method *m, rf_error *err) {
    char rule[1024];
    RF_TRY(method_rule(m, rule, sizeof rule, err));
    printf("%s (keys and values of an autoregressive model)\n", m->name);
    print_heading("does", m->about);
    print_heading("source", m->source);
    print_rule(rule);
    print_heading("use", "refrain text --kv-policy NAME --kv-budget N or --kv-ratio R; --kv-option KEY=VALUE changes "
                         "what it is, keys: refrain policies kv");
    return RF_OK;
}

static void print_kv_keys(void) {
    printf("Methods (--kv-policy NAME)\n");
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        const rf_kv_method *m = rf_kv_method_at(i);
        print_method(m);
        printf("%*s", KV_WIDTH + PAPER_WIDTH, "");
        print_wrapped(m->source, KV_WIDTH + PAPER_WIDTH);
    }
    printf("\nKeys (--kv-policy NAME:KEY=VALUE+KEY=VALUE, --kv-option KEY=VALUE), with the\n"
           "defaults of a rule that is put together from parts:\n");
    for (int i = 0; i < rf_kv_num_keys(); i++) print_option(rf_kv_key_at(i));
}

/* ---- JSON ---- */

static const char *type_name(rf_option_type type) {
    switch (type) {
    case RF_OPTION_INT: return "int";
    case RF_OPTION_DOUBLE: return "double";
    case RF_OPTION_BOOL: return "bool";
    case RF_OPTION_CHOICE: return "choice";
    case RF_OPTION_TEXT: break;
    }
    return "text";
}

static cJSON *choices_json(const char *choices) {
    cJSON *array = cJSON_CreateArray();
    while (*choices) {
        char word[64];
        size_t len = strcspn(choices, " ");
        snprintf(word, sizeof word, "%.*s", (int)len, choices);
        cJSON_AddItemToArray(array, cJSON_CreateString(word));
        choices += len + strspn(choices + len, " ");
    }
    return array;
}

/* Every key is always there; what has no meaning for the type is null. */
static cJSON *option_json(const rf_policy_option *o) {
    cJSON *object = cJSON_CreateObject();
    bool number = o->type == RF_OPTION_INT || o->type == RF_OPTION_DOUBLE;
    cJSON_AddStringToObject(object, "name", o->name);
    cJSON_AddStringToObject(object, "type", type_name(o->type));
    if (number) {
        cJSON_AddNumberToObject(object, "default", strtod(o->def, NULL));
    } else if (o->type == RF_OPTION_BOOL) {
        cJSON_AddBoolToObject(object, "default", strcmp(o->def, "true") == 0);
    } else {
        cJSON_AddStringToObject(object, "default", o->def);
    }
    cJSON_AddItemToObject(object, "min", number ? cJSON_CreateNumber(o->min) : cJSON_CreateNull());
    cJSON_AddItemToObject(object, "max", number ? cJSON_CreateNumber(o->max) : cJSON_CreateNull());
    bool choice = o->type == RF_OPTION_CHOICE;
    cJSON_AddItemToObject(object, "choices", choice ? choices_json(o->choices) : cJSON_CreateNull());
    return object;
}

static cJSON *policy_json(const rf_policy_def *def) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", def->name);
    cJSON_AddStringToObject(object, "family", def->family);
    cJSON_AddStringToObject(object, "level", def->level);
    cJSON_AddStringToObject(object, "paper", def->paper);
    cJSON *options = cJSON_AddArrayToObject(object, "options");
    for (int i = 0; i < def->num_options; i++) cJSON_AddItemToArray(options, option_json(&def->options[i]));
    return object;
}

/* The keys are the same of every method: they stand once, under the name "kv". */
static cJSON *method_json(const rf_kv_method *m, const char *rule) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", m->name);
    cJSON_AddStringToObject(object, "family", "kv");
    cJSON_AddStringToObject(object, "level", "cache");
    cJSON_AddStringToObject(object, "paper", m->source);
    cJSON_AddStringToObject(object, "about", m->about);
    cJSON_AddStringToObject(object, "rule", rule);
    return object;
}

static cJSON *keys_json(void) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", "kv");
    cJSON_AddStringToObject(object, "family", "kv");
    cJSON_AddStringToObject(object, "level", "keys");
    cJSON *options = cJSON_AddArrayToObject(object, "options");
    for (int i = 0; i < rf_kv_num_keys(); i++) cJSON_AddItemToArray(options, option_json(rf_kv_key_at(i)));
    return object;
}

/* Of a method, or of all (NULL). */
static rf_status add_methods(cJSON *root, const rf_kv_method *only, rf_error *err) {
    char rule[1024];
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        const rf_kv_method *m = rf_kv_method_at(i);
        if (only && m != only) continue;
        RF_TRY(method_rule(m, rule, sizeof rule, err));
        cJSON_AddItemToArray(root, method_json(m, rule));
    }
    return RF_OK;
}

static rf_status print_kv_json(const rf_kv_method *only, rf_error *err) {
    cJSON *root = cJSON_CreateArray();
    rf_status st = add_methods(root, only, err);
    if (st == RF_OK && !only) cJSON_AddItemToArray(root, keys_json());
    if (st == RF_OK) return report_print_json(root, err);
    cJSON_Delete(root);
    return st;
}

/* only: NULL = all of them, but for KV methods, which are no --cache-mode. */
static rf_status print_json(const rf_policy_def *only, rf_error *err) {
    cJSON *root = cJSON_CreateArray();
    for (int i = 0; i < rf_policy_count() + rf_row_policy_count(); i++) {
        const rf_policy_def *def = i < rf_policy_count() ? rf_policy_at(i) : rf_row_policy_at(i - rf_policy_count());
        if (!only || def == only) cJSON_AddItemToArray(root, policy_json(def));
    }
    return report_print_json(root, err);
}

/* ---- presets of a model ---- */

static void print_preset(const rf_preset *preset) {
    char text[4096];
    snprintf(text, sizeof text, "%-8s--cache-mode %s%s%s", preset->name, preset->mode,
             preset->options[0] ? " --cache-option " : "", preset->options);
    print_clean(text);
    putchar('\n');
    for (int i = 0; i < preset->num_measured; i++) {
        preset_measured_text(&preset->measured[i], text, sizeof text);
        fputs("          measured: ", stdout);
        print_clean(text);
        putchar('\n');
        if (!preset->measured[i].command[0]) continue;
        fputs("          by: ", stdout);
        print_clean(preset->measured[i].command);
        putchar('\n');
    }
}

static cJSON *preset_json(const rf_preset *preset) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "name", preset->name);
    cJSON_AddStringToObject(object, "mode", preset->mode);
    cJSON_AddStringToObject(object, "options", preset->options);
    cJSON *measured = cJSON_AddArrayToObject(object, "measured");
    for (int i = 0; i < preset->num_measured; i++) {
        const rf_preset_measured *m = &preset->measured[i];
        cJSON *item = cJSON_CreateObject();
        cJSON_AddStringToObject(item, "device", m->device);
        cJSON_AddNumberToObject(item, "steps", m->num_steps);
        if (isfinite(m->cfg_scale)) cJSON_AddNumberToObject(item, "cfg", m->cfg_scale);
        cJSON_AddNumberToObject(item, "speedup", m->speedup);
        if (!isnan(m->psnr_db)) cJSON_AddNumberToObject(item, "psnr_db", m->psnr_db);
        if (isfinite(m->ssim)) cJSON_AddNumberToObject(item, "ssim", m->ssim);
        if (m->command[0]) cJSON_AddStringToObject(item, "command", m->command);
        cJSON_AddItemToArray(measured, item);
    }
    return object;
}

/* Every preset is read and tried before anything is printed, so that a damaged file gives its message and nothing else. */
static rf_status print_presets_of(const rf_json_value *calibration, const char *model, bool json, rf_error *err) {
    rf_preset presets[RF_PRESET_COUNT];
    int num = 0;
    for (int i = 0; i < RF_PRESET_COUNT; i++) {
        if (!rf_preset_exists(calibration, rf_preset_name(i))) continue;
        rf_policy *policy = NULL;
        rf_status st = rf_preset_find(&presets[num], calibration, model, rf_preset_name(i), err);
        if (st == RF_OK) st = rf_preset_policy(&policy, &presets[num], model, err);
        rf_policy_destroy(policy);
        if (st != RF_OK) return st;
        num++;
    }
    if (json) {
        cJSON *root = cJSON_CreateArray();
        for (int i = 0; i < num; i++) cJSON_AddItemToArray(root, preset_json(&presets[i]));
        return report_print_json(root, err);
    }
    if (num == 0) say("%s has no cache presets: nobody has measured any for it", model);
    for (int i = 0; i < num; i++) print_preset(&presets[i]);
    return RF_OK;
}

static rf_status print_presets(const char *model, bool json, rf_error *err) {
    char *folder = NULL;
    rf_json *doc = NULL;
    rf_status st = find_model(&folder, model, err);
    char *path = folder ? rf_path_join(folder, "cache.json") : NULL;
    if (st == RF_OK && !path) st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a name", model);
    if (st == RF_OK && !rf_path_is_dir(folder)) st = rf_fail(err, RF_ERR_MISSING, "%s: not a model folder", folder);
    if (st == RF_OK && rf_path_exists(path)) st = rf_json_open(&doc, path, err);
    if (st == RF_OK) st = print_presets_of(doc ? rf_json_root(doc) : NULL, model, json, err);
    rf_json_close(doc);
    rf_free(path);
    rf_free(folder);
    return st;
}

int cmd_policies(int argc, char **argv) {
    const char *name = NULL, *model = NULL;
    bool json = false;
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "the presets of this model (default: policies are listed)", &model),
        arg_flag("json", 0, "a JSON list", &json),
    };
    const arg_spec spec = {.command = "refrain policies",
                           .usage = "[NAME] [options]",
                           .about =
                               "Lists the policies of --cache-mode and --kv-policy, or shows one with its options.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0],
                           .max_positional = 1,
                           .positional_name = "a policy"};
    args_result parsed = args_parse(&spec, argc, argv, &name, NULL);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    if (name && model) {
        say_error("a policy and --model exclude each other");
        return EXIT_USAGE;
    }

    rf_error err = {0};
    rf_policy *policy = NULL; /* made for the message where there is none of that name */
    const rf_kv_method *method = name ? find_method(name) : NULL;
    bool kv = method || (name && strcmp(name, "kv") == 0);
    rf_status st = name && !kv ? rf_policy_create(&policy, name, &err) : RF_OK;
    const rf_policy_def *def = policy ? rf_policy_get_def(policy) : NULL;
    if (kv) {
        st = json ? print_kv_json(method, &err) : method ? print_one_method(method, &err) : RF_OK;
        if (!json && !method) print_kv_keys();
    } else if (st == RF_OK && model) {
        st = print_presets(model, json, &err);
    } else if (st == RF_OK && json) {
        st = print_json(def, &err);
    } else if (st == RF_OK && def) {
        print_policy(def);
    } else if (st == RF_OK) {
        print_list();
    }
    rf_policy_destroy(policy);
    return st == RF_OK ? EXIT_OK : fail_with(&err);
}
