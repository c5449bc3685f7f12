/* samples/refrain/draw.c */
#include "samples/refrain/draw.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"

/* ---- bytes ---- */

void draw_reset(draw_buffer *b) {
    b->len = 0;
    b->failed = false;
}

void draw_free(draw_buffer *b) {
    rf_free(b->bytes);
    *b = (draw_buffer){0};
}

static bool reserve(draw_buffer *b, size_t num_bytes) {
    if (b->failed || b->len + num_bytes <= b->cap) return !b->failed;
    size_t cap = 2 * (b->len + num_bytes);
    char *grown = rf_realloc(b->bytes, cap);
    if (!grown) {
        b->failed = true;
        return false;
    }
    b->bytes = grown;
    b->cap = cap;
    return true;
}

void draw_put(draw_buffer *b, const char *bytes, size_t num_bytes) {
    if (!reserve(b, num_bytes)) return;
    memcpy(b->bytes + b->len, bytes, num_bytes);
    b->len += num_bytes;
}

void draw_printf(draw_buffer *b, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len > 0) draw_put(b, text, (size_t)len < sizeof text ? (size_t)len : sizeof text - 1);
}

static void put_text(draw_buffer *b, const char *text) {
    draw_put(b, text, strlen(text));
}

/* ---- half blocks ---- */

static int square(int x) {
    return x * x;
}

static int distance(const uint8_t a[3], int r, int g, int b) {
    return square(a[0] - r) + square(a[1] - g) + square(a[2] - b);
}

/* xterm's 256 colours: a 6 x 6 x 6 cube of these levels from 16, greys 8, 18, ..., 238 from 232. */
static int nearest_256(const uint8_t rgb[3]) {
    static const int levels[6] = {0, 95, 135, 175, 215, 255};
    int index[3];
    for (int c = 0; c < 3; c++) {
        index[c] = 0;
        for (int i = 1; i < 6; i++) {
            if (abs(rgb[c] - levels[i]) < abs(rgb[c] - levels[index[c]])) index[c] = i;
        }
    }
    int mean = (rgb[0] + rgb[1] + rgb[2]) / 3, step = mean < 8 ? 0 : (mean - 8 + 5) / 10;
    if (step > 23) step = 23;
    int grey = 8 + 10 * step;
    bool is_grey =
        distance(rgb, grey, grey, grey) < distance(rgb, levels[index[0]], levels[index[1]], levels[index[2]]);
    return is_grey ? 232 + step : 16 + 36 * index[0] + 6 * index[1] + index[2];
}

/* Of the 16 colours as xterm shows them: 0..7 and 60..67, to be added to 30 or 40. */
static int nearest_16(const uint8_t rgb[3]) {
    static const uint8_t palette[16][3] = {{0, 0, 0},       {205, 0, 0},   {0, 205, 0},   {205, 205, 0},
                                           {0, 0, 238},     {205, 0, 205}, {0, 205, 205}, {229, 229, 229},
                                           {127, 127, 127}, {255, 0, 0},   {0, 255, 0},   {255, 255, 0},
                                           {92, 92, 255},   {255, 0, 255}, {0, 255, 255}, {255, 255, 255}};
    int best = 0;
    for (int i = 1; i < 16; i++) {
        if (distance(rgb, palette[i][0], palette[i][1], palette[i][2]) <
            distance(rgb, palette[best][0], palette[best][1], palette[best][2]))
            best = i;
    }
    return best < 8 ? best : 60 + best - 8;
}

/* ground: 30 for the glyph, 40 for what is behind it. */
static void put_color(draw_buffer *b, const uint8_t rgb[3], int ground, int num_colors) {
    if (num_colors > 256) {
        draw_printf(b, "\x1b[%d;2;%d;%d;%dm", ground + 8, rgb[0], rgb[1], rgb[2]);
    } else if (num_colors == 256) {
        draw_printf(b, "\x1b[%d;5;%dm", ground + 8, nearest_256(rgb));
    } else {
        draw_printf(b, "\x1b[%dm", ground + nearest_16(rgb));
    }
}

void draw_blocks(draw_buffer *b, const rf_image *picture, int left, int top, int num_colors, draw_cell *shown) {
    int columns = picture->width, rows = picture->height / 2;
    draw_cell set = {.known = false}; /* the colours that the terminal writes with */
    for (int row = 0; row < rows; row++) {
        const uint8_t *upper = picture->rgb + (size_t)(2 * row) * (size_t)columns * 3;
        const uint8_t *lower = upper + (size_t)columns * 3;
        bool at_cell = false;
        for (int column = 0; column < columns; column++, upper += 3, lower += 3) {
            draw_cell *cell = &shown[(size_t)row * (size_t)columns + (size_t)column];
            if (cell->known && memcmp(cell->upper, upper, 3) == 0 && memcmp(cell->lower, lower, 3) == 0) {
                at_cell = false;
                continue;
            }
            if (!at_cell) draw_printf(b, "\x1b[%d;%dH", top + row + 1, left + column + 1);
            if (!set.known || memcmp(set.upper, upper, 3) != 0) put_color(b, upper, 30, num_colors);
            if (!set.known || memcmp(set.lower, lower, 3) != 0) put_color(b, lower, 40, num_colors);
            put_text(b, "▀");
            memcpy(set.upper, upper, 3);
            memcpy(set.lower, lower, 3);
            set.known = at_cell = true;
            *cell = set;
        }
    }
    put_text(b, "\x1b[0m");
}

/* ---- kitty ---- */

#define KITTY_CHUNK 4096 /* bytes of base64 in one escape */

static void put_base64(draw_buffer *b, const uint8_t *bytes, size_t num_bytes) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    if (!reserve(b, (num_bytes + 2) / 3 * 4)) return;
    for (size_t i = 0; i < num_bytes; i += 3) {
        size_t left = num_bytes - i;
        unsigned v =
            (unsigned)bytes[i] << 16 | (left > 1 ? (unsigned)bytes[i + 1] << 8 : 0) | (left > 2 ? bytes[i + 2] : 0);
        char four[4] = {digits[v >> 18], digits[v >> 12 & 63], left > 1 ? digits[v >> 6 & 63] : '=',
                        left > 2 ? digits[v & 63] : '='};
        memcpy(b->bytes + b->len, four, 4);
        b->len += 4;
    }
}

void draw_kitty(draw_buffer *b, const rf_image *picture, int left, int top, int columns, int rows, int number) {
    size_t num_bytes = (size_t)picture->width * (size_t)picture->height * 3, chunk = KITTY_CHUNK / 4 * 3;
    draw_printf(b, "\x1b[%d;%dH", top + 1, left + 1);
    for (size_t at = 0; at < num_bytes; at += chunk) {
        size_t now = num_bytes - at < chunk ? num_bytes - at : chunk;
        int more = at + now < num_bytes;
        if (at == 0) {
            draw_printf(b, "\x1b_Ga=T,f=24,s=%d,v=%d,c=%d,r=%d,i=%d,p=1,q=2,C=1,m=%d;", picture->width, picture->height,
                        columns, rows, number, more);
        } else {
            draw_printf(b, "\x1b_Gm=%d,q=2;", more);
        }
        put_base64(b, picture->rgb + at, now);
        put_text(b, "\x1b\\");
    }
    draw_printf(b, "\x1b_Ga=d,d=I,i=%d,q=2\x1b\\", 3 - number);
}

/* ---- sixel ---- */

enum { REDS = 6, GREENS = 7, BLUES = 6, SIXEL_COLORS = REDS * GREENS * BLUES };

/* A level of `num`, pushed by the dither. */
static int dithered(int value, int num, int threshold) {
    int level = (value * (num - 1) * 16 + threshold * 255) / (255 * 16);
    return level < num ? level : num - 1;
}

static void put_run(draw_buffer *b, int bits, int count) {
    char c = (char)(63 + bits);
    if (count > 3) {
        draw_printf(b, "!%d%c", count, c);
    } else {
        for (int i = 0; i < count; i++) draw_put(b, &c, 1);
    }
}

/* Six rows of one colour: a character a column, its bits are the rows. */
static void put_color_row(draw_buffer *b, const uint8_t *indices, int width, int height, int color) {
    int run_bits = 0, count = 0;
    for (int x = 0; x < width; x++) {
        int bits = 0;
        for (int y = 0; y < height; y++) bits |= (indices[(size_t)y * (size_t)width + (size_t)x] == color) << y;
        if (bits != run_bits && count > 0) {
            put_run(b, run_bits, count);
            count = 0;
        }
        run_bits = bits;
        count++;
    }
    if (run_bits) put_run(b, run_bits, count);
}

void draw_sixel(draw_buffer *b, const rf_image *picture, int left, int top) {
    static const int bayer[4][4] = {{0, 8, 2, 10}, {12, 4, 14, 6}, {3, 11, 1, 9}, {15, 7, 13, 5}};
    int width = picture->width, height = picture->height;
    uint8_t *band = rf_alloc((size_t)width * 6);
    if (!band) {
        b->failed = true;
        return;
    }
    draw_printf(b, "\x1b[%d;%dH\x1bP0;1q\"1;1;%d;%d", top + 1, left + 1, width, height);
    for (int i = 0; i < SIXEL_COLORS; i++) {
        int red = i / (GREENS * BLUES), green = i / BLUES % GREENS, blue = i % BLUES;
        draw_printf(b, "#%d;2;%d;%d;%d", i, red * 100 / (REDS - 1), green * 100 / (GREENS - 1),
                    blue * 100 / (BLUES - 1));
    }
    for (int begin = 0; begin < height; begin += 6) {
        int rows = height - begin < 6 ? height - begin : 6;
        bool used[SIXEL_COLORS] = {false}, first = true;
        for (int y = 0; y < rows; y++) {
            const uint8_t *rgb = picture->rgb + (size_t)(begin + y) * (size_t)width * 3;
            for (int x = 0; x < width; x++, rgb += 3) {
                int t = bayer[(begin + y) & 3][x & 3];
                int index = (dithered(rgb[0], REDS, t) * GREENS + dithered(rgb[1], GREENS, t)) * BLUES +
                            dithered(rgb[2], BLUES, t);
                band[(size_t)y * (size_t)width + (size_t)x] = (uint8_t)index;
                used[index] = true;
            }
        }
        for (int color = 0; color < SIXEL_COLORS; color++) {
            if (!used[color]) continue;
            draw_printf(b, "%s#%d", first ? "" : "$", color);
            put_color_row(b, band, width, rows, color);
            first = false;
        }
        put_text(b, "-");
    }
    put_text(b, "\x1b\\");
    rf_free(band);
}
