/* samples/train/objects_main.c - writes a contact sheet of the training pictures.
 *
 * Usage    objects OUT.png [SEED [SIZE [ROWS_PER_CLASS]]]
 *          Columns are the 36 classes in six rows of six; ROWS_PER_CLASS repeats the sheet downwards with new pictures.
 * Build    cc -O3 -fopenmp objects_main.c objects.c -o objects -lm        (stb_image_write.h: package libstb-dev) */
#include "objects.h"

#include <stdio.h>
#include <stdlib.h>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>

static int parse_number(const char *text, long lo, long hi, long *out) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < lo || value > hi) {
        fprintf(stderr, "objects: '%s' is not a number between %ld and %ld\n", text, lo, hi);
        return -1;
    }
    *out = value;
    return 0;
}

int main(int argc, char **argv) {
    long seed = 0, size = 128, repeats = 1;
    if (argc < 2 || argc > 5) {
        fprintf(stderr, "usage: %s OUT.png [SEED [SIZE [ROWS_PER_CLASS]]]\n", argv[0]);
        return 2;
    }
    if (argc > 2 && parse_number(argv[2], 0, 1000000000, &seed)) return 2;
    if (argc > 3 && parse_number(argv[3], 1, 512, &size)) return 2;
    if (argc > 4 && parse_number(argv[4], 1, 16, &repeats)) return 2;

    const int columns = OBJ_NUM_MATERIALS, rows = OBJ_NUM_SHAPES * (int)repeats;
    const size_t side = (size_t)size, sheet_width = side * (size_t)columns;
    float *image = (float *)malloc(3 * side * side * sizeof *image);
    unsigned char *sheet = (unsigned char *)malloc(3 * sheet_width * side * (size_t)rows);
    int status = 1;
    if (!image || !sheet) {
        fprintf(stderr, "objects: out of memory\n");
        goto done;
    }
    for (int row = 0; row < rows; ++row)
        for (int column = 0; column < columns; ++column) {
            int index = row * columns + column;
            int32_t class_id = index % OBJ_NUM_CLASSES;
            if (obj_render_host(image, &class_id, (uint64_t)seed, (uint64_t)index, 1, (int)size, 3) != 0) goto done;
            for (size_t y = 0; y < side; ++y)
                for (size_t x = 0; x < side; ++x)
                    for (size_t c = 0; c < 3; ++c) {
                        float level = image[(c * side + y) * side + x] * 127.5f + 128.0f;
                        size_t at = ((size_t)row * side + y) * sheet_width + (size_t)column * side + x;
                        sheet[3 * at + c] = (unsigned char)(level < 0.0f ? 0.0f : level > 255.0f ? 255.0f : level);
                    }
        }
    if (!stbi_write_png(argv[1], (int)sheet_width, (int)size * rows, 3, sheet, (int)(3 * sheet_width))) {
        fprintf(stderr, "objects: cannot write %s\n", argv[1]);
        goto done;
    }
    status = 0;
done:
    free(image);
    free(sheet);
    return status;
}
