/* tests/fuzz/fuzz_png_texts.c - any bytes as a PNG whose texts are read. Chunk CRCs are repaired first, or no mutation would
 * get past them. */
#include <zlib.h>

#include "core/image.h"
#include "tests/fuzz/fuzz.h"

static void repair_crcs(uint8_t *p, size_t size) {
    for (size_t at = 8; size - at >= 12 && at < size;) {
        size_t len = (size_t)p[at] << 24 | (size_t)p[at + 1] << 16 | (size_t)p[at + 2] << 8 | p[at + 3];
        if (len > size - at - 12) return;
        uLong crc = crc32_z(crc32(0, NULL, 0), p + at + 4, len + 4);
        for (int i = 0; i < 4; i++) p[at + 8 + len + (size_t)i] = (uint8_t)(crc >> (24 - 8 * i));
        at += 12 + len;
    }
}

static void read_texts(const uint8_t *data, size_t size) {
    rf_error err = {0};
    rf_png_text *texts = NULL;
    size_t num = 0, sum = 0;
    fuzz_check_refusal(rf_png_read_texts_memory(data, size, "fuzz", &texts, &num, &err), &err);
    for (size_t i = 0; i < num; i++) sum += strlen(texts[i].keyword) + strlen(texts[i].text);
    if (sum > 3 * size) abort();
    rf_free(texts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t live = rf_memory_get_counts().num_live;
    read_texts(data, size);
    if (size >= 8) {
        uint8_t *copy = malloc(size);
        memcpy(copy, data, size);
        repair_crcs(copy, size);
        read_texts(copy, size);
        free(copy);
    }
    fuzz_check_leaks(live);
    return 0;
}
