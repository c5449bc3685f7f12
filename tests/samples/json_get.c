/* tests/samples/json_get.c - json_get FILE [KEY...]: prints the value under the keys (a number is an array index), as
 * compact JSON or, for a string, as it is; "#" as the last key prints the number of elements. Exit status 1 if the file is not
 * one JSON value or the key is not there. */
#include <cjson/cJSON.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *read_all(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *text = calloc(1, (size_t)1 << 22);
    size_t num = text ? fread(text, 1, ((size_t)1 << 22) - 1, file) : 0;
    fclose(file);
    if (num == 0) {
        free(text);
        return NULL;
    }
    return text;
}

int main(int argc, char **argv) {
    char *text = argc > 1 ? read_all(argv[1]) : NULL;
    cJSON *root = text ? cJSON_ParseWithOpts(text, NULL, 1) : NULL;
    const cJSON *value = root;
    int status = 1;
    for (int i = 2; i < argc && value; i++) {
        if (strcmp(argv[i], "#") == 0) {
            printf("%d\n", cJSON_GetArraySize(value));
            status = 0;
            goto done;
        }
        value = isdigit((unsigned char)argv[i][0]) && cJSON_IsArray(value)
                    ? cJSON_GetArrayItem(value, atoi(argv[i]))
                    : cJSON_GetObjectItemCaseSensitive(value, argv[i]);
    }
    if (value && cJSON_IsString(value)) {
        puts(value->valuestring);
        status = 0;
    } else if (value) {
        char *printed = cJSON_PrintUnformatted(value);
        if (printed) puts(printed);
        status = printed ? 0 : 1;
        cJSON_free(printed);
    }
done:
    cJSON_Delete(root);
    free(text);
    return status;
}
