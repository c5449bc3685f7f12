/* samples/worlds/maze_main.c - writes a contact sheet of training walks.
 *
 * Usage    maze OUT.png [SEED [WALKS [COLUMNS [EVERY [SIZE]]]]]
 *          A row is one walk of COLUMNS pictures, one of EVERY frames; pictures are SIZE pixels a side. The actions are
 *          printed, a line for each row.
 * Build    cc -O3 -fopenmp maze_main.c maze.c -o maze -lm        (stb_image_write.h: package libstb-dev) */
#include "maze.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>

enum { SAMPLES = 3 };

static int parse_number(const char *text, long lo, long hi, long *out) {
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < lo || value > hi) {
        fprintf(stderr, "maze: '%s' is not a number between %ld and %ld\n", text, lo, hi);
        return -1;
    }
    *out = value;
    return 0;
}

/* "forward*4,left*2" */
static void print_actions(const uint8_t *actions, size_t length) {
    for (size_t i = 0; i < length;) {
        size_t run = 1;
        while (i + run < length && actions[i + run] == actions[i]) run++;
        printf("%s%s*%zu", i > 0 ? "," : "", maze_action_name(actions[i]), run);
        i += run;
    }
    printf("\n");
}

int main(int argc, char **argv) {
    long seed = 0, walks = 8, columns = 12, every = 4, size = 64;
    if (argc < 2 || argc > 7) {
        fprintf(stderr, "usage: %s OUT.png [SEED [WALKS [COLUMNS [EVERY [SIZE]]]]]\n", argv[0]);
        return 2;
    }
    if (argc > 2 && parse_number(argv[2], 0, 1000000000, &seed)) return 2;
    if (argc > 3 && parse_number(argv[3], 1, 64, &walks)) return 2;
    if (argc > 4 && parse_number(argv[4], 1, 64, &columns)) return 2;
    if (argc > 5 && parse_number(argv[5], 1, 64, &every)) return 2;
    if (argc > 6 && parse_number(argv[6], 8, 512, &size)) return 2;

    const size_t side = (size_t)size, length = (size_t)((columns - 1) * every + 1), row_bytes = 3 * side;
    const size_t sheet_bytes = row_bytes * (size_t)columns; /* a row of pixels of the sheet */
    uint8_t *frames = malloc(length * side * row_bytes), *actions = malloc(length);
    uint8_t *sheet = malloc(sheet_bytes * side * (size_t)walks);
    int status = 1;
    if (!frames || !actions || !sheet) {
        fprintf(stderr, "maze: out of memory\n");
        goto done;
    }
    for (size_t walk = 0; walk < (size_t)walks; walk++) {
        if (maze_clips(frames, actions, (uint64_t)seed, walk, 1, (int)length, (int)size, (int)size, SAMPLES) != 0)
            goto done;
        print_actions(actions + 1, length - 1);
        for (size_t column = 0; column < (size_t)columns; column++)
            for (size_t y = 0; y < side; y++)
                memcpy(sheet + (walk * side + y) * sheet_bytes + column * row_bytes,
                       frames + (column * (size_t)every * side + y) * row_bytes, row_bytes);
    }
    if (!stbi_write_png(argv[1], (int)(size * columns), (int)(size * walks), 3, sheet, (int)sheet_bytes)) {
        fprintf(stderr, "maze: cannot write %s\n", argv[1]);
        goto done;
    }
    status = 0;
done:
    free(frames);
    free(actions);
    free(sheet);
    return status;
}
