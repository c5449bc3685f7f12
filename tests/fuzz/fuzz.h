/* tests/fuzz/fuzz.h - what each libFuzzer target shares. */
#ifndef RF_TESTS_FUZZ_FUZZ_H
#define RF_TESTS_FUZZ_FUZZ_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "core/status.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A refusal must come with its status and one line; nothing may be left allocated. */
static inline void fuzz_check_refusal(rf_status st, const rf_error *err) {
    if (st == RF_OK) return;
    if (err->status != st || err->message[0] == 0 || strchr(err->message, '\n')) abort();
}

static inline void fuzz_check_leaks(uint64_t live_before) {
    if (rf_memory_get_counts().num_live != live_before) abort();
}

#endif
