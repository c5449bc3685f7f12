/* samples/refrain/cmd_metadata.c - `refrain metadata`: the texts inside a PNG. */
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/args.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"

/* {"file", "texts": {keyword: text}, "settings": the object refrain wrote, if it did} */
static rf_status print_json(const char *path, const rf_png_text *texts, size_t num_texts, rf_error *err) {
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "metadata");
    cJSON_AddStringToObject(root, "file", path);
    cJSON *all = cJSON_AddObjectToObject(root, "texts");
    cJSON *settings = NULL;
    for (size_t i = 0; i < num_texts; i++) {
        cJSON_AddStringToObject(all, texts[i].keyword, texts[i].text);
        if (strcmp(texts[i].keyword, "refrain") == 0 && !settings) settings = cJSON_Parse(texts[i].text);
    }
    if (settings) cJSON_AddItemToObject(root, "settings", settings);
    return report_print_json(root, err);
}

int cmd_metadata(int argc, char **argv) {
    bool json = false;
    const arg_option options[] = {
        arg_flag("json", 0, "one JSON object: file, texts, settings (default: plain text)", &json),
    };
    const arg_spec spec = {.command = "refrain metadata",
                           .usage = "FILE.png [options]",
                           .about = "Prints the texts embedded in a PNG: the settings that made the picture.",
                           .options = options,
                           .num_options = sizeof options / sizeof options[0],
                           .min_positional = 1,
                           .max_positional = 1,
                           .positional_name = "a PNG file"};
    const char *path = NULL;
    args_result parsed = args_parse(&spec, argc, argv, &path, NULL);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;

    rf_error err = {0};
    rf_png_text *texts = NULL;
    size_t num_texts = 0;
    rf_status st = rf_png_read_texts(path, &texts, &num_texts, &err);
    if (st == RF_OK && json) {
        st = print_json(path, texts, num_texts, &err);
    } else if (st == RF_OK) {
        if (num_texts == 0) say("%s: a PNG without texts", path);
        for (size_t i = 0; i < num_texts; i++) {
            print_clean(texts[i].keyword);
            printf(": ");
            print_clean(texts[i].text);
            putchar('\n');
        }
    }
    rf_free(texts);
    return st == RF_OK ? EXIT_OK : fail_with(&err);
}
