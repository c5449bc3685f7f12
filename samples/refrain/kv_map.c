/* samples/refrain/kv_map.c */
#include "samples/refrain/kv_map.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/image.h"
#include "core/memory.h"

#define GLYPH_WIDTH  6
#define GLYPH_HEIGHT 8
#define SCALE        2 /* of text */
#define TEXT_WIDTH   (GLYPH_WIDTH * SCALE)
#define TEXT_HEIGHT  (GLYPH_HEIGHT * SCALE)
#define LEFT         100
#define RIGHT        24
#define LEGEND       76 /* above the rows: two lines and the scale of colours */
#define PLOT_WIDTH   1200
#define LEAST_WIDTH  920 /* for the legend */
#define TICK         6
#define MEAN_HEIGHT  28
#define MEAN_GAP     10

static const uint8_t white[3] = {255, 255, 255}, ink[3] = {33, 37, 41}, faint[3] = {134, 142, 150},
                     mark[3] = {224, 49, 49}, between[3] = {206, 212, 218};

void kv_map_free(kv_map *map) {
    rf_free(map->kept);
    *map = (kv_map){0};
}

rf_status kv_map_read(kv_map *out, rf_decoder *decoder, const opened_text *t, int32_t num_prompt, int32_t num_made,
                      rf_error *err) {
    const rf_text_desc *d = &t->model->desc;
    *out = (kv_map){.num_layers = d->num_layers,
                    .num_heads = d->num_kv_heads,
                    .num_prompt = num_prompt,
                    .num_positions = num_prompt + (num_made > 1 ? num_made - 1 : 0),
                    .model = t->name};
    size_t rows = (size_t)out->num_layers * (size_t)out->num_heads, length = (size_t)out->num_positions;
    rf_kv_session *session = rf_decoder_kv(decoder);
    if (!session) return rf_fail(err, RF_ERR_STATE, "the decoder has no KV policy");
    int32_t *list = rf_alloc_zero(2 * (length + (size_t)num_made), sizeof *list);
    out->kept = rf_alloc_zero(rows * length, 1);
    rf_status st = list && out->kept ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for a map of %zu rows", rows);
    for (size_t row = 0; row < rows && st == RF_OK; row++) {
        int32_t num = 0;
        st = rf_kv_session_read_positions(session, 0, (int)(row / (size_t)out->num_heads),
                                          (int)(row % (size_t)out->num_heads), list, &num, err);
        for (int32_t i = 0; i < num && st == RF_OK; i++) {
            if (list[i] >= 0 && list[i] < out->num_positions) out->kept[row * length + (size_t)list[i]] = 1;
        }
    }
    rf_free(list);
    return st;
}

/* ---- drawing ---- */

static void fill(rf_image *image, int x, int y, int width, int height, const uint8_t rgb[3]) {
    for (int j = y < 0 ? 0 : y; j < y + height && j < image->height; j++) {
        for (int i = x < 0 ? 0 : x; i < x + width && i < image->width; i++)
            memcpy(image->rgb + 3 * ((size_t)j * (size_t)image->width + (size_t)i), rgb, 3);
    }
}

/* A share 0..1: nothing kept is pale, all dark blue; even a single kept position among many shows. */
static void color_of(double share, uint8_t rgb[3]) {
    static const double stops[][3] = {{241, 243, 245}, {165, 216, 255}, {51, 154, 240}, {24, 100, 171}, {8, 42, 94}};
    double at = share <= 0 ? 0 : (0.15 + 0.85 * (share > 1 ? 1 : share)) * 4;
    int i = at >= 4 ? 3 : (int)at;
    for (int c = 0; c < 3; c++) rgb[c] = (uint8_t)(stops[i][c] + (stops[i + 1][c] - stops[i][c]) * (at - i) + .5);
}

/* First column of a position; columns of one position where there are more columns than positions. */
static int column_of(const kv_map *m, int width, int64_t position) {
    return (int)(position * width / m->num_positions);
}

/* Share kept of the positions that column x shows. */
static double share_at(const kv_map *m, const uint8_t *kept, int width, int x) {
    int64_t begin = (int64_t)x * m->num_positions / width, end = ((int64_t)x + 1) * m->num_positions / width;
    int64_t sum = 0;
    if (end <= begin) end = begin + 1;
    for (int64_t p = begin; p < end; p++) sum += kept[p];
    return (double)sum / (double)(end - begin);
}

static void draw_text(rf_image *image, int x, int y, const uint8_t rgb[3], const char *text) {
    rf_image_draw_text(image, x, y, SCALE, rgb, text);
}

/* 1, 2 or 5 times a power of ten, about a tenth of the positions. */
static int64_t tick_step(int64_t num) {
    int64_t step = 1;
    for (int i = 0; num / step > 10; i++) step = i % 3 == 1 ? step / 2 * 5 : step * 2;
    return step;
}

typedef struct {
    int width, row_height, gap; /* of the plot; gap between layers */
    int top, rows_height, mean_top;
} layout;

static layout layout_of(const kv_map *m) {
    int rows = m->num_layers * m->num_heads;
    layout l = {.width = m->num_positions < PLOT_WIDTH
                             ? (int)(PLOT_WIDTH / m->num_positions * m->num_positions) /* whole columns */
                             : PLOT_WIDTH,
                .row_height = rows <= 24    ? 20
                              : rows <= 64  ? 10
                              : rows <= 160 ? 6
                                            : 4,
                .gap = 3,
                .top = LEGEND};
    l.rows_height = rows * l.row_height + (m->num_layers - 1) * l.gap;
    l.mean_top = l.top + l.rows_height + MEAN_GAP;
    return l;
}

/* Where the rows of a layer begin. */
static int layer_top(const kv_map *m, const layout *l, int layer) {
    return l->top + layer * (m->num_heads * l->row_height + l->gap);
}

static void draw_legend(rf_image *image, const kv_map *m, int64_t num_kept) {
    char text[320];
    double all = (double)m->num_positions * m->num_layers * m->num_heads;
    char budget[48] = "";
    if (m->budget > 0) snprintf(budget, sizeof budget, ", budget %d", (int)m->budget);
    int room = (image->width - 20) / TEXT_WIDTH;
    snprintf(text, sizeof text, "%.120s on %.60s%s: %.1f %% kept", m->policy ? m->policy : "", m->model ? m->model : "",
             budget, 100 * (double)num_kept / all);
    if (room < (int)sizeof text) text[room] = 0;
    draw_text(image, 10, 8, ink, text);
    int x = LEFT, y = 8 + TEXT_HEIGHT + 12, steps = 96;
    draw_text(image, x - 4 * TEXT_WIDTH, y, faint, "0 %");
    for (int i = 0; i < steps; i++) {
        uint8_t rgb[3];
        color_of((double)i / (steps - 1), rgb);
        fill(image, x + i, y, 1, TEXT_HEIGHT, rgb);
    }
    snprintf(text, sizeof text, "100 %% kept; a row a key head; red: end of the prompt (%d)", (int)m->num_prompt);
    draw_text(image, x + steps + TEXT_WIDTH, y, faint, text);
}

static void draw_rows(rf_image *image, const kv_map *m, const layout *l) {
    size_t length = (size_t)m->num_positions;
    int label_every = 1;
    while (label_every * (m->num_heads * l->row_height + l->gap) < TEXT_HEIGHT + 2) label_every++;
    for (int layer = 0; layer < m->num_layers; layer++) {
        int top = layer_top(m, l, layer), height = m->num_heads * l->row_height;
        for (int head = 0; head < m->num_heads; head++) {
            const uint8_t *kept = m->kept + ((size_t)layer * (size_t)m->num_heads + (size_t)head) * length;
            int y = top + head * l->row_height;
            for (int x = 0; x < l->width; x++) {
                uint8_t rgb[3];
                color_of(share_at(m, kept, l->width, x), rgb);
                fill(image, LEFT + x, y, 1, l->row_height - (head + 1 < m->num_heads && l->row_height >= 6), rgb);
            }
        }
        fill(image, LEFT - TICK, top, 2, height, between);
        if (layer % label_every != 0) continue;
        char text[24];
        snprintf(text, sizeof text, "%d", layer);
        int y = top + (label_every > 1 ? 0 : (height - TEXT_HEIGHT) / 2);
        draw_text(image, LEFT - 10 - TEXT_WIDTH * (int)strlen(text), y, ink, text);
    }
    draw_text(image, 6, l->top, faint, "layer");
}

static void draw_mean(rf_image *image, const kv_map *m, const layout *l) {
    size_t length = (size_t)m->num_positions, rows = (size_t)m->num_layers * (size_t)m->num_heads;
    for (int x = 0; x < l->width; x++) {
        double sum = 0;
        uint8_t rgb[3];
        for (size_t row = 0; row < rows; row++) sum += share_at(m, m->kept + row * length, l->width, x);
        color_of(sum / (double)rows, rgb);
        fill(image, LEFT + x, l->mean_top, 1, MEAN_HEIGHT, rgb);
    }
    draw_text(image, LEFT - 10 - 4 * TEXT_WIDTH, l->mean_top + (MEAN_HEIGHT - TEXT_HEIGHT) / 2, ink, "mean");
}

static void draw_scale(rf_image *image, const kv_map *m, const layout *l) {
    int y = l->mean_top + MEAN_HEIGHT + 2;
    int64_t step = tick_step(m->num_positions);
    fill(image, LEFT, y, l->width, 1, faint);
    for (int64_t p = 0; p < m->num_positions; p += step) {
        char text[24];
        int len = snprintf(text, sizeof text, "%lld", (long long)p), x = LEFT + column_of(m, l->width, p);
        fill(image, x, y, 2, TICK, faint);
        if (x + len * TEXT_WIDTH / 2 < image->width)
            draw_text(image, x - len * TEXT_WIDTH / 2 + 1, y + TICK + 4, ink, text);
    }
    static const char name[] = "position";
    draw_text(image, LEFT + (l->width - (int)(sizeof name - 1) * TEXT_WIDTH) / 2, y + TICK + 8 + TEXT_HEIGHT, faint,
              name);
    if (m->num_prompt < m->num_positions)
        fill(image, LEFT + column_of(m, l->width, m->num_prompt) - 1, l->top - 6, 2, y - l->top + 8, mark);
}

rf_status kv_map_draw(rf_image *out, const kv_map *m, rf_error *err) {
    layout l = layout_of(m);
    int64_t num_kept = 0;
    size_t all = (size_t)m->num_layers * (size_t)m->num_heads * (size_t)m->num_positions;
    for (size_t i = 0; i < all; i++) num_kept += m->kept[i];
    int height = l.mean_top + MEAN_HEIGHT + 2 + TICK + 8 + 2 * TEXT_HEIGHT + 8;
    int width = LEFT + l.width + RIGHT;
    RF_TRY(rf_image_create(out, width < LEAST_WIDTH ? LEAST_WIDTH : width, height, white, err));
    draw_legend(out, m, num_kept);
    draw_rows(out, m, &l);
    draw_mean(out, m, &l);
    draw_scale(out, m, &l);
    return RF_OK;
}

rf_status kv_map_save(const kv_map *m, const char *path, rf_error *err) {
    rf_image image = {0};
    char budget[24];
    snprintf(budget, sizeof budget, "%d", (int)m->budget);
    const rf_png_text texts[] = {{"refrain kv-map", m->model}, {"policy", m->policy}, {"budget", budget}};
    rf_status st = kv_map_draw(&image, m, err);
    if (st == RF_OK) st = rf_image_save_png(&image, path, texts, sizeof texts / sizeof texts[0], err);
    rf_image_free(&image);
    return st;
}
