/* samples/refrain/world_strip.c - evenly chosen frames of a rollout side by side, under each its number and what led to it.
 *
 * Rows of up to 8 columns; with a reference or the simulator a column holds one picture of each, above each other. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/world_run.h"

#define MAX_SHOWN    32
#define MAX_COLUMNS  8
#define MARGIN       8
#define GAP          3 /* between the pictures of a column */
#define GLYPH_WIDTH  6
#define GLYPH_HEIGHT 8
#define MIN_PICTURE  120 /* pixels: a narrower picture is enlarged, so that labels fit under it */

static const uint8_t paper[3] = {255, 255, 255}, ink[3] = {30, 30, 30}, faint[3] = {130, 130, 130};

struct world_strip {
    rf_image image;
    int num_frames, num_shown, columns, zoom, width, height; /* width, height: of an enlarged picture */
    int num_kinds, row_of_kind[STRIP_KINDS];                 /* -1 = not shown */
    int left, top, cell_width, cell_height;
};

/* Which frame column `index` shows. */
static int shown_frame(const world_strip *s, int index) {
    if (s->num_shown < 2) return 0;
    return (int)(((int64_t)index * (s->num_frames - 1) + (s->num_shown - 1) / 2) / (s->num_shown - 1));
}

static int index_of(const world_strip *s, int frame) {
    int guess = s->num_frames > 1 ? (int)((int64_t)frame * (s->num_shown - 1) / (s->num_frames - 1)) : 0;
    for (int i = guess > 0 ? guess - 1 : 0; i < s->num_shown && i <= guess + 1; i++) {
        if (shown_frame(s, i) == frame) return i;
    }
    return -1;
}

bool world_strip_wants(const world_strip *s, int frame) {
    return s && index_of(s, frame) >= 0;
}

rf_status world_strip_create(world_strip **out, int num_frames, unsigned kinds, int width, int height, rf_error *err) {
    static const char *const names[STRIP_KINDS] = {"simulator", "uncached", "cached"};
    world_strip *s = rf_alloc_zero(1, sizeof *s);
    if (!s) return rf_fail(err, RF_ERR_MEMORY, "--strip: no memory");
    s->num_frames = num_frames;
    s->num_shown = num_frames < MAX_SHOWN ? num_frames : MAX_SHOWN;
    s->columns = s->num_shown < MAX_COLUMNS ? s->num_shown : MAX_COLUMNS;
    s->zoom = 1;
    while (width * s->zoom < MIN_PICTURE) s->zoom++;
    s->width = width * s->zoom;
    s->height = height * s->zoom;
    for (int kind = 0; kind < STRIP_KINDS; kind++) s->row_of_kind[kind] = kinds >> kind & 1 ? s->num_kinds++ : -1;
    s->left = MARGIN + (s->num_kinds > 1 ? 11 * GLYPH_WIDTH : 0);
    s->top = MARGIN + 2 * GLYPH_HEIGHT;
    s->cell_width = s->width + MARGIN;
    s->cell_height = s->num_kinds * (s->height + GAP) + 2 * GLYPH_HEIGHT + MARGIN;
    int bands = (s->num_shown + s->columns - 1) / s->columns;
    rf_status st =
        rf_image_create(&s->image, s->left + s->columns * s->cell_width, s->top + bands * s->cell_height, paper, err);
    if (st != RF_OK) {
        rf_free(s);
        return rf_fail_prefix(err, st, "--strip");
    }
    for (int band = 0; band < bands && s->num_kinds > 1; band++) {
        for (int kind = 0; kind < STRIP_KINDS; kind++) {
            int y = s->top + band * s->cell_height + s->row_of_kind[kind] * (s->height + GAP) + s->height / 2;
            if (s->row_of_kind[kind] >= 0)
                rf_image_draw_text(&s->image, MARGIN, y - GLYPH_HEIGHT / 2, 1, ink, names[kind]);
        }
    }
    *out = s;
    return RF_OK;
}

/* White on a dark ground, in the lower right corner of a picture. */
static void draw_value(world_strip *s, int x, int y, double psnr_db) {
    static const uint8_t white[3] = {255, 255, 255};
    char text[32];
    snprintf(text, sizeof text, isinf(psnr_db) ? "equal" : "%.1f dB", psnr_db);
    int width = (int)strlen(text) * GLYPH_WIDTH + 3, height = GLYPH_HEIGHT + 2;
    int left = x + s->width - width, top = y + s->height - height;
    for (int row = top; row < top + height; row++) {
        uint8_t *pixels = s->image.rgb + ((size_t)row * (size_t)s->image.width + (size_t)left) * 3;
        for (int i = 0; i < width * 3; i++) pixels[i] = (uint8_t)(pixels[i] / 4);
    }
    rf_image_draw_text(&s->image, left + 2, top + 1, 1, white, text);
}

rf_status world_strip_place(world_strip *s, int kind, int frame, const rf_image *picture, const char *label,
                            double psnr_db, rf_error *err) {
    int index = index_of(s, frame), row = s->row_of_kind[kind];
    rf_image large;
    if (index < 0 || row < 0) return RF_OK;
    int x = s->left + index % s->columns * s->cell_width;
    int top = s->top + index / s->columns * s->cell_height, y = top + row * (s->height + GAP);
    RF_TRY(rf_image_create(&large, s->width, s->height, paper, err));
    for (int i = 0; i < s->height; i++) {
        const uint8_t *from = picture->rgb + (size_t)(i / s->zoom) * (size_t)picture->width * 3;
        uint8_t *to = large.rgb + (size_t)i * (size_t)s->width * 3;
        for (int j = 0; j < s->width; j++) memcpy(to + (size_t)j * 3, from + (size_t)(j / s->zoom) * 3, 3);
    }
    rf_image_blit(&s->image, &large, x, y);
    rf_image_free(&large);
    if (!isnan(psnr_db)) draw_value(s, x, y, psnr_db);
    if (!label) return RF_OK;
    char number[16], text[128];
    int room = s->width / GLYPH_WIDTH, used = snprintf(number, sizeof number, "%d ", frame);
    snprintf(text, sizeof text, "%s", label);
    if (room - used < (int)sizeof text) text[room > used ? room - used : 0] = 0;
    int label_y = top + s->num_kinds * (s->height + GAP) + 2;
    rf_image_draw_text(&s->image, x, label_y, 1, faint, number);
    rf_image_draw_text(&s->image, x + used * GLYPH_WIDTH, label_y, 1, ink, text);
    return RF_OK;
}

rf_status world_strip_save(world_strip *s, const char *path, const char *title, const rf_png_text *texts,
                           size_t num_texts, rf_error *err) {
    char text[512];
    int room = (s->image.width - 2 * MARGIN) / GLYPH_WIDTH;
    snprintf(text, sizeof text, "%s", title);
    if (room < (int)sizeof text) text[room > 0 ? room : 0] = 0;
    rf_image_draw_text(&s->image, MARGIN, MARGIN, 1, ink, text);
    return rf_image_save_png(&s->image, path, texts, num_texts, err);
}

void world_strip_destroy(world_strip *s) {
    if (!s) return;
    rf_image_free(&s->image);
    rf_free(s);
}
