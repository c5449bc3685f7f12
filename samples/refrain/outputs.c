/* samples/refrain/outputs.c */
#include "samples/refrain/outputs.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "core/memory.h"

#define MARGIN          6
#define GLYPH_WIDTH     6
#define GLYPH_HEIGHT    8
#define MIN_CELL_PIXELS 96    /* narrower pictures are enlarged */
#define MAX_SHEET       16384 /* pixels a side: what image readers take */

static const uint8_t paper[3] = {255, 255, 255};
static const uint8_t ink[3] = {40, 40, 40};

/* A conversion in a pattern: %d, %3d or %03d. */
typedef struct {
    size_t start, len;
    int digits;
    bool zeros;
} place;

static bool read_place(const char *pattern, size_t at, place *out) {
    size_t i = at + 1;
    out->start = at;
    out->zeros = pattern[i] == '0';
    out->digits = 0;
    while (isdigit((unsigned char)pattern[i])) {
        out->digits = out->digits * 10 + (pattern[i] - '0');
        if (out->digits > 9) return false;
        i++;
    }
    out->len = i + 1 - at;
    return pattern[i] == 'd';
}

static rf_status check_extension(const char *pattern, rf_error *err) {
    static const char *const others[] = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"};
    const char *dot = strrchr(pattern, '.');
    for (size_t i = 0; dot && i < sizeof others / sizeof others[0]; i++) {
        if (strcasecmp(dot, others[i]) == 0) {
            return rf_fail(err, RF_ERR_ARGUMENT, "--output %s: only PNG is written, expected a name in .png", pattern);
        }
    }
    return RF_OK;
}

/* Where "_000" goes: before the extension of the last path element. */
static size_t stem_len(const char *path) {
    const char *slash = strrchr(path, '/');
    const char *dot = strrchr(path, '.');
    const char *name = slash ? slash + 1 : path;
    return dot && dot > name ? (size_t)(dot - path) : strlen(path);
}

rf_status output_name(char **out, const char *pattern, int index, int num_images, rf_error *err) {
    *out = NULL;
    rf_status st = check_extension(pattern, err);
    if (st != RF_OK) return st;
    size_t room = strlen(pattern) + 32;
    char *name = rf_alloc(room);
    if (!name) return rf_fail(err, RF_ERR_MEMORY, "--output %s: no memory for a name", pattern);
    size_t used = 0;
    int num_places = 0;
    for (size_t i = 0; pattern[i];) {
        place p;
        if (pattern[i] != '%') {
            name[used++] = pattern[i++];
        } else if (pattern[i + 1] == '%') {
            name[used++] = '%';
            i += 2;
        } else if (read_place(pattern, i, &p) && num_places == 0) {
            used += (size_t)snprintf(name + used, room - used, p.zeros ? "%0*d" : "%*d", p.digits, index);
            num_places++;
            i += p.len;
        } else {
            rf_free(name);
            return rf_fail(err, RF_ERR_ARGUMENT, "--output %s: expected one %%d or %%03d and no other %% sign",
                           pattern);
        }
    }
    name[used] = 0;
    if (num_places == 0 && num_images > 1) {
        size_t stem = stem_len(name);
        char tail[16];
        int tail_len = snprintf(tail, sizeof tail, "_%03d", index);
        memmove(name + stem + tail_len, name + stem, used - stem + 1);
        memcpy(name + stem, tail, (size_t)tail_len);
    }
    *out = name;
    return RF_OK;
}

rf_status output_check(const char *path, rf_error *err) {
    struct stat info;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode)) {
        /* Opening a pipe only to look would be seen at its other end. */
        if (access(path, W_OK) == 0) return RF_OK;
        return rf_fail(err, RF_ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    }
    rf_file_writer *writer = NULL;
    rf_status st = rf_file_writer_open(&writer, path, err);
    rf_file_writer_discard(writer);
    return st;
}

rf_status contact_sheet_create(contact_sheet *out, int num_images, int width, int height, rf_error *err) {
    memset(out, 0, sizeof *out);
    contact_sheet s = {.columns = 1, .zoom = 1};
    while (s.columns * s.columns < num_images) s.columns++;
    s.rows = (num_images + s.columns - 1) / s.columns;
    while (width * s.zoom < MIN_CELL_PIXELS) s.zoom++;
    s.text_scale = 1 + width * s.zoom / 256;
    s.cell_width = width * s.zoom + MARGIN;
    s.cell_height = height * s.zoom + MARGIN + (GLYPH_HEIGHT + 4) * s.text_scale;
    int64_t sheet_width = (int64_t)s.columns * s.cell_width + MARGIN;
    int64_t sheet_height = (int64_t)s.rows * s.cell_height + MARGIN;
    if (sheet_width > MAX_SHEET || sheet_height > MAX_SHEET) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--grid: %d pictures of %dx%d need a sheet of %jdx%jd, the limit is %dx%d",
                       num_images, width, height, (intmax_t)sheet_width, (intmax_t)sheet_height, MAX_SHEET, MAX_SHEET);
    }
    rf_status st = rf_image_create(&s.image, (int)sheet_width, (int)sheet_height, paper, err);
    if (st == RF_OK) *out = s;
    return st;
}

rf_status contact_sheet_place(contact_sheet *sheet, int index, const rf_image *picture, const char *label,
                              rf_error *err) {
    int x = MARGIN + index % sheet->columns * sheet->cell_width;
    int y = MARGIN + index / sheet->columns * sheet->cell_height;
    rf_image enlarged;
    rf_status st = rf_image_create(&enlarged, picture->width * sheet->zoom, picture->height * sheet->zoom, paper, err);
    if (st != RF_OK) return st;
    for (int row = 0; row < enlarged.height; row++) {
        const uint8_t *from = picture->rgb + (size_t)(row / sheet->zoom) * (size_t)picture->width * 3;
        uint8_t *to = enlarged.rgb + (size_t)row * (size_t)enlarged.width * 3;
        for (int column = 0; column < enlarged.width; column++)
            memcpy(to + column * 3, from + column / sheet->zoom * 3, 3);
    }
    rf_image_blit(&sheet->image, &enlarged, x, y);

    char text[128];
    int room = enlarged.width / (GLYPH_WIDTH * sheet->text_scale);
    snprintf(text, sizeof text, "%s", label);
    if (room < (int)sizeof text) text[room] = 0;
    int text_width = (int)strlen(text) * GLYPH_WIDTH * sheet->text_scale;
    rf_image_draw_text(&sheet->image, x + (enlarged.width - text_width) / 2,
                       y + enlarged.height + 2 * sheet->text_scale, sheet->text_scale, ink, text);
    rf_image_free(&enlarged);
    return RF_OK;
}

void contact_sheet_free(contact_sheet *sheet) {
    rf_image_free(&sheet->image);
}
