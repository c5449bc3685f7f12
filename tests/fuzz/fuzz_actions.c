/* tests/fuzz/fuzz_actions.c - any bytes as an action list, in each of its three forms. */
#include "dit/actions.h"

#include <math.h>

#include "tests/fuzz/fuzz.h"

#define DIM 5

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const forms[] = {"text", "list.json", "list.csv"};
    static const char *const places[DIM] = {"noop", "forward", "left", NULL, "cameraX"};
    const rf_action_names names = {DIM, places};
    for (int i = 0; i < 3; i++) {
        uint64_t live = rf_memory_get_counts().num_live;
        rf_error err = {0};
        float *rows = NULL;
        int num = 0;
        rf_status st = rf_actions_parse_memory(&rows, &num, (const char *)data, size, forms[i], &names, &err);
        fuzz_check_refusal(st, &err);
        if (st == RF_OK ? num < 1 || num > RF_MAX_ACTIONS : num != 0 || rows) abort();
        for (int j = 0; j < num * DIM; j++) {
            if (!isfinite(rows[j])) abort();
        }
        rf_free(rows);
        fuzz_check_leaks(live);
    }
    return 0;
}
