/* tests/fuzz/fuzz_json.c - any bytes as a config; every getter is tried on every member. */
#include "core/json.h"

#include "tests/fuzz/fuzz.h"

static void visit(const rf_json *doc, const rf_json_value *v, int depth) {
    if (depth > 64) abort();
    size_t n = 0;
    for (const rf_json_value *m = rf_json_first(v); m; m = rf_json_next(m), n++) {
        const char *key = rf_json_key(m), *text;
        rf_error err = {0};
        int64_t i;
        double d;
        bool b;
        if (key) {
            if (!rf_json_get(v, key)) abort();
            if (rf_json_get_int(doc, v, key, -1000, 1000, &i, &err) == RF_OK && (i < -1000 || i > 1000)) abort();
            if (rf_json_get_double(doc, v, key, -1, 1, &d, &err) == RF_OK && !(d >= -1 && d <= 1)) abort();
            rf_json_get_bool(doc, v, key, &b, &err);
            if (rf_json_get_string(doc, v, key, &text, &err) == RF_OK && !text) abort();
            rf_json_opt_int(doc, v, key, INT64_MIN, INT64_MAX, 0, &i, &err);
        }
        rf_json_number(m);
        visit(doc, m, depth + 1);
    }
    if (n != rf_json_count(v)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t live = rf_memory_get_counts().num_live;
    rf_error err = {0};
    rf_json *doc = NULL;
    fuzz_check_refusal(rf_json_parse(&doc, (const char *)data, size, "fuzz", &err), &err);
    if (doc) visit(doc, rf_json_root(doc), 0);
    rf_json_close(doc);
    fuzz_check_leaks(live);
    return 0;
}
