/* tests/fuzz/fuzz_weights.c - any bytes as a safetensors file; every tensor's first and last byte is touched. */
#include "core/weights.h"

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t live = rf_memory_get_counts().num_live;
    rf_error err = {0};
    rf_weights *w = NULL;
    volatile char sink = 0;
    fuzz_check_refusal(rf_weights_open_memory(&w, data, size, "fuzz", &err), &err);
    for (size_t i = 0; w && i < rf_weights_count(w); i++) {
        rf_tensor t;
        const char *name = rf_weights_name(w, i);
        if (!rf_weights_has(w, name)) abort();
        rf_status st = rf_weights_get(w, name, &t, &err);
        fuzz_check_refusal(st, &err);
        size_t bytes = st == RF_OK ? rf_tensor_bytes(&t) : 0;
        if (bytes == 0) continue;
        if ((uintptr_t)t.data % rf_dtype_bytes(t.dtype) != 0) abort();
        sink ^= ((const char *)t.data)[0];
        sink ^= ((const char *)t.data)[bytes - 1];
        rf_weights_get_shaped(w, name, 2, (const int64_t[]){-1, 3}, &t, &err);
    }
    if (w) rf_weights_metadata(w, "format");
    (void)sink;
    rf_weights_close(w);
    fuzz_check_leaks(live);
    return 0;
}
