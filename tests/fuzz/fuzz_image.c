/* tests/fuzz/fuzz_image.c - any bytes as a PNG or JPEG picture. */
#include "core/image.h"

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint64_t live = rf_memory_get_counts().num_live;
    rf_error err = {0};
    rf_image image;
    volatile uint8_t sink = 0;
    /* A picture of 16384 x 16384 is allowed but takes seconds: skip PNGs that state more than 2^20 pixels. */
    if (size >= 24 && memcmp(data + 12, "IHDR", 4) == 0 &&
        (data[16] | data[17] | data[20] | data[21] | (data[18] > 4) | (data[22] > 4))) {
        return 0;
    }
    rf_status st = rf_image_load_memory(&image, data, size, "fuzz", &err);
    fuzz_check_refusal(st, &err);
    if (st == RF_OK) {
        size_t bytes = (size_t)image.width * (size_t)image.height * 3;
        sink ^= image.rgb[0];
        sink ^= image.rgb[bytes - 1];
        rf_image_draw_text(&image, -3, 2, 2, (const uint8_t[]){255, 0, 0}, "fuzz");
    }
    (void)sink;
    rf_image_free(&image);
    fuzz_check_leaks(live);
    return 0;
}
