/* tests/fuzz/fuzz_apng.c - any bytes as an animated PNG. Chunk CRCs are repaired first, or no mutation would get past them. */
#include <zlib.h>

#include "core/image_internal.h"
#include "core/video_internal.h"
#include "tests/fuzz/fuzz.h"

#define MAX_FRAMES 16

static void repair_crcs(uint8_t *p, size_t size) {
    for (size_t at = 8; size - at >= 12 && at < size;) {
        size_t len = rf_png_get_u32(p + at);
        if (len > size - at - 12) return;
        rf_png_put_u32(p + at + 8 + len, (uint32_t)crc32_z(crc32(0, NULL, 0), p + at + 4, len + 4));
        at += 12 + len;
    }
}

static void read_frames(const uint8_t *data, size_t size) {
    rf_error err = {0};
    rf_video_frames frames = {.name = "fuzz", .max = MAX_FRAMES};
    volatile uint8_t sink = 0;
    rf_status st = rf_apng_read(&frames, data, size, &err);
    fuzz_check_refusal(st, &err);
    if (st == RF_OK && (frames.num < 1 || frames.num > MAX_FRAMES)) abort();
    for (int i = 0; i < frames.num; i++) {
        const rf_image *f = &frames.images[i];
        if (f->width != frames.images[0].width || f->height != frames.images[0].height) abort();
        sink ^= f->rgb[(size_t)f->width * (size_t)f->height * 3 - 1];
    }
    (void)sink;
    rf_video_frames_free(frames.images, frames.num);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t live = rf_memory_get_counts().num_live;
    /* 16384 x 16384 is allowed but takes seconds: skip what states sides of more than 1023 pixels. */
    if (size >= 24 && (data[16] | data[17] | data[20] | data[21] | (data[18] > 3) | (data[22] > 3))) return 0;
    if (!rf_apng_is_animated(data, size)) return 0;
    read_frames(data, size);
    uint8_t *copy = malloc(size);
    memcpy(copy, data, size);
    repair_crcs(copy, size);
    read_frames(copy, size);
    free(copy);
    fuzz_check_leaks(live);
    return 0;
}
