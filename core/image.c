/* core/image.c - pixels in memory: conversion, pasting, text, and how far two images are apart.
 *
 * Source   SSIM: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
 *          similarity", eqs. 13-16. The window is separable, so each output row takes 11 + 11 products a pixel. */
#include "core/image.h"

#include <math.h>
#include <string.h>

#include "core/image_internal.h"
#include "core/memory.h"

/* ---- making ---- */

static rf_status alloc_pixels(rf_image *out, int width, int height, rf_error *err) {
    *out = (rf_image){0};
    rf_status st = rf_image_check_size(width, height, "image", err);
    if (st != RF_OK) return rf_fail_prefix(err, RF_ERR_ARGUMENT, "cannot create");
    uint8_t *rgb = rf_alloc((size_t)width * (size_t)height * 3);
    if (!rgb) return rf_fail(err, RF_ERR_MEMORY, "no memory for an image of %d x %d pixels", width, height);
    *out = (rf_image){.width = width, .height = height, .rgb = rgb};
    return RF_OK;
}

rf_status rf_image_create(rf_image *out, int width, int height, const uint8_t rgb[3], rf_error *err) {
    rf_status st = alloc_pixels(out, width, height, err);
    if (st != RF_OK) return st;
    size_t num_pixels = (size_t)width * (size_t)height;
    for (size_t i = 0; i < num_pixels; i++) memcpy(out->rgb + i * 3, rgb, 3);
    return RF_OK;
}

void rf_image_free(rf_image *image) {
    if (!image) return;
    rf_free(image->rgb);
    *image = (rf_image){0};
}

static uint8_t to_byte(float x) {
    float v = x / 2 + 0.5f;
    if (!(v > 0)) return 0; /* NaN too */
    if (v > 1) v = 1;
    return (uint8_t)lrintf(v * 255); /* half to even */
}

rf_status rf_image_from_planar(rf_image *out, const float *planar, int width, int height, rf_error *err) {
    rf_status st = alloc_pixels(out, width, height, err);
    if (st != RF_OK) return st;
    size_t num_pixels = (size_t)width * (size_t)height;
    for (size_t i = 0; i < num_pixels; i++) {
        for (size_t c = 0; c < 3; c++) out->rgb[i * 3 + c] = to_byte(planar[c * num_pixels + i]);
    }
    return RF_OK;
}

/* ---- pasting and text ---- */

/* Cuts the span [at, at + len) to [0, limit); *skip is what fell off its start. 64 bits: no position overflows. */
static int64_t clip(int64_t at, int64_t len, int64_t limit, int64_t *skip) {
    int64_t begin = at < 0 ? 0 : at;
    int64_t end = at + len > limit ? limit : at + len;
    *skip = begin - at;
    return end > begin ? end - begin : 0;
}

void rf_image_blit(rf_image *dst, const rf_image *src, int x, int y) {
    int64_t skip_x, skip_y;
    int64_t width = clip(x, src->width, dst->width, &skip_x);
    int64_t height = clip(y, src->height, dst->height, &skip_y);
    if (width == 0) return;
    for (int64_t row = 0; row < height; row++) {
        uint8_t *to = dst->rgb + ((y + skip_y + row) * dst->width + x + skip_x) * 3;
        const uint8_t *from = src->rgb + ((skip_y + row) * src->width + skip_x) * 3;
        memmove(to, from, (size_t)width * 3);
    }
}

/* Glyphs of ' ' to '~': eight rows from the top, the last for descenders; bit 4 is the left of five columns. The cell is 6 x 8. */
static const uint8_t font[95][8] = {{0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00},       /* space */
                                    {0x04, 0x04, 0x04, 0x04, 0x04, 0x00, 0x04},       /* ! */
                                    {0x0a, 0x0a, 0x0a, 0x00, 0x00, 0x00, 0x00},       /* " */
                                    {0x0a, 0x0a, 0x1f, 0x0a, 0x1f, 0x0a, 0x0a},       /* # */
                                    {0x04, 0x0f, 0x14, 0x0e, 0x05, 0x1e, 0x04},       /* $ */
                                    {0x19, 0x1a, 0x02, 0x04, 0x08, 0x0b, 0x13},       /* % */
                                    {0x0c, 0x12, 0x14, 0x08, 0x15, 0x12, 0x0d},       /* & */
                                    {0x04, 0x04, 0x08, 0x00, 0x00, 0x00, 0x00},       /* ' */
                                    {0x02, 0x04, 0x08, 0x08, 0x08, 0x04, 0x02},       /* ( */
                                    {0x08, 0x04, 0x02, 0x02, 0x02, 0x04, 0x08},       /* ) */
                                    {0x00, 0x04, 0x15, 0x0e, 0x15, 0x04, 0x00},       /* * */
                                    {0x00, 0x04, 0x04, 0x1f, 0x04, 0x04, 0x00},       /* + */
                                    {0x00, 0x00, 0x00, 0x00, 0x06, 0x04, 0x08},       /* , */
                                    {0x00, 0x00, 0x00, 0x1e, 0x00, 0x00, 0x00},       /* - */
                                    {0x00, 0x00, 0x00, 0x00, 0x00, 0x0c, 0x0c},       /* . */
                                    {0x01, 0x02, 0x02, 0x04, 0x08, 0x08, 0x10},       /* / */
                                    {0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e},       /* 0 */
                                    {0x04, 0x0c, 0x14, 0x04, 0x04, 0x04, 0x1f},       /* 1 */
                                    {0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f},       /* 2 */
                                    {0x0e, 0x11, 0x01, 0x06, 0x01, 0x11, 0x0e},       /* 3 */
                                    {0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02},       /* 4 */
                                    {0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e},       /* 5 */
                                    {0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e},       /* 6 */
                                    {0x1f, 0x01, 0x02, 0x02, 0x04, 0x04, 0x04},       /* 7 */
                                    {0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e},       /* 8 */
                                    {0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c},       /* 9 */
                                    {0x00, 0x0c, 0x0c, 0x00, 0x0c, 0x0c, 0x00},       /* : */
                                    {0x00, 0x0c, 0x0c, 0x00, 0x0c, 0x04, 0x08},       /* ; */
                                    {0x02, 0x04, 0x08, 0x10, 0x08, 0x04, 0x02},       /* < */
                                    {0x00, 0x00, 0x1f, 0x00, 0x1f, 0x00, 0x00},       /* = */
                                    {0x08, 0x04, 0x02, 0x01, 0x02, 0x04, 0x08},       /* > */
                                    {0x0e, 0x11, 0x01, 0x06, 0x04, 0x00, 0x04},       /* ? */
                                    {0x0e, 0x11, 0x17, 0x15, 0x17, 0x10, 0x0f},       /* @ */
                                    {0x04, 0x0a, 0x11, 0x11, 0x1f, 0x11, 0x11},       /* A */
                                    {0x1e, 0x11, 0x11, 0x1e, 0x11, 0x11, 0x1e},       /* B */
                                    {0x0e, 0x11, 0x10, 0x10, 0x10, 0x11, 0x0e},       /* C */
                                    {0x1c, 0x12, 0x11, 0x11, 0x11, 0x12, 0x1c},       /* D */
                                    {0x1f, 0x10, 0x10, 0x1e, 0x10, 0x10, 0x1f},       /* E */
                                    {0x1f, 0x10, 0x10, 0x1e, 0x10, 0x10, 0x10},       /* F */
                                    {0x0e, 0x11, 0x10, 0x13, 0x11, 0x11, 0x0f},       /* G */
                                    {0x11, 0x11, 0x11, 0x1f, 0x11, 0x11, 0x11},       /* H */
                                    {0x0e, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e},       /* I */
                                    {0x07, 0x02, 0x02, 0x02, 0x02, 0x12, 0x0c},       /* J */
                                    {0x11, 0x12, 0x14, 0x18, 0x14, 0x12, 0x11},       /* K */
                                    {0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x1f},       /* L */
                                    {0x11, 0x1b, 0x15, 0x15, 0x11, 0x11, 0x11},       /* M */
                                    {0x11, 0x19, 0x19, 0x15, 0x13, 0x13, 0x11},       /* N */
                                    {0x0e, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e},       /* O */
                                    {0x1e, 0x11, 0x11, 0x1e, 0x10, 0x10, 0x10},       /* P */
                                    {0x0e, 0x11, 0x11, 0x11, 0x15, 0x12, 0x0d},       /* Q */
                                    {0x1e, 0x11, 0x11, 0x1e, 0x14, 0x12, 0x11},       /* R */
                                    {0x0f, 0x10, 0x10, 0x0e, 0x01, 0x01, 0x1e},       /* S */
                                    {0x1f, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04},       /* T */
                                    {0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e},       /* U */
                                    {0x11, 0x11, 0x11, 0x11, 0x0a, 0x0a, 0x04},       /* V */
                                    {0x11, 0x11, 0x11, 0x15, 0x15, 0x1b, 0x11},       /* W */
                                    {0x11, 0x11, 0x0a, 0x04, 0x0a, 0x11, 0x11},       /* X */
                                    {0x11, 0x11, 0x0a, 0x04, 0x04, 0x04, 0x04},       /* Y */
                                    {0x1f, 0x01, 0x02, 0x04, 0x08, 0x10, 0x1f},       /* Z */
                                    {0x0e, 0x08, 0x08, 0x08, 0x08, 0x08, 0x0e},       /* [ */
                                    {0x10, 0x08, 0x08, 0x04, 0x02, 0x02, 0x01},       /* backslash */
                                    {0x0e, 0x02, 0x02, 0x02, 0x02, 0x02, 0x0e},       /* ] */
                                    {0x04, 0x0a, 0x11, 0x00, 0x00, 0x00, 0x00},       /* ^ */
                                    {0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x1f},       /* _ */
                                    {0x08, 0x04, 0x00, 0x00, 0x00, 0x00, 0x00},       /* ` */
                                    {0x00, 0x00, 0x0e, 0x01, 0x0f, 0x11, 0x0f},       /* a */
                                    {0x10, 0x10, 0x1e, 0x11, 0x11, 0x11, 0x1e},       /* b */
                                    {0x00, 0x00, 0x0f, 0x10, 0x10, 0x10, 0x0f},       /* c */
                                    {0x01, 0x01, 0x0f, 0x11, 0x11, 0x11, 0x0f},       /* d */
                                    {0x00, 0x00, 0x0e, 0x11, 0x1f, 0x10, 0x0f},       /* e */
                                    {0x06, 0x08, 0x1e, 0x08, 0x08, 0x08, 0x08},       /* f */
                                    {0x00, 0x00, 0x0f, 0x11, 0x11, 0x0f, 0x01, 0x0e}, /* g */
                                    {0x10, 0x10, 0x1e, 0x11, 0x11, 0x11, 0x11},       /* h */
                                    {0x04, 0x00, 0x0c, 0x04, 0x04, 0x04, 0x0e},       /* i */
                                    {0x02, 0x00, 0x06, 0x02, 0x02, 0x02, 0x12, 0x0c}, /* j */
                                    {0x10, 0x10, 0x12, 0x14, 0x18, 0x14, 0x12},       /* k */
                                    {0x0c, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e},       /* l */
                                    {0x00, 0x00, 0x1a, 0x15, 0x15, 0x15, 0x15},       /* m */
                                    {0x00, 0x00, 0x1e, 0x11, 0x11, 0x11, 0x11},       /* n */
                                    {0x00, 0x00, 0x0e, 0x11, 0x11, 0x11, 0x0e},       /* o */
                                    {0x00, 0x00, 0x1e, 0x11, 0x11, 0x1e, 0x10, 0x10}, /* p */
                                    {0x00, 0x00, 0x0f, 0x11, 0x11, 0x0f, 0x01, 0x01}, /* q */
                                    {0x00, 0x00, 0x16, 0x18, 0x10, 0x10, 0x10},       /* r */
                                    {0x00, 0x00, 0x0f, 0x10, 0x0e, 0x01, 0x1e},       /* s */
                                    {0x08, 0x08, 0x1e, 0x08, 0x08, 0x08, 0x06},       /* t */
                                    {0x00, 0x00, 0x11, 0x11, 0x11, 0x11, 0x0f},       /* u */
                                    {0x00, 0x00, 0x11, 0x11, 0x0a, 0x0a, 0x04},       /* v */
                                    {0x00, 0x00, 0x11, 0x15, 0x15, 0x15, 0x0a},       /* w */
                                    {0x00, 0x00, 0x11, 0x0a, 0x04, 0x0a, 0x11},       /* x */
                                    {0x00, 0x00, 0x11, 0x11, 0x11, 0x0f, 0x01, 0x0e}, /* y */
                                    {0x00, 0x00, 0x1f, 0x02, 0x04, 0x08, 0x1f},       /* z */
                                    {0x02, 0x04, 0x04, 0x08, 0x04, 0x04, 0x02},       /* { */
                                    {0x04, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04},       /* | */
                                    {0x08, 0x04, 0x04, 0x02, 0x04, 0x04, 0x08},       /* } */
                                    {0x00, 0x00, 0x09, 0x15, 0x12, 0x00, 0x00},
                                    /* ~ */};

static void fill(rf_image *dst, int64_t x, int64_t y, int64_t side, const uint8_t rgb[3]) {
    int64_t skip_x, skip_y;
    int64_t width = clip(x, side, dst->width, &skip_x);
    int64_t height = clip(y, side, dst->height, &skip_y);
    for (int64_t row = 0; row < height; row++) {
        uint8_t *to = dst->rgb + ((y + skip_y + row) * dst->width + x + skip_x) * 3;
        for (int64_t i = 0; i < width; i++) memcpy(to + i * 3, rgb, 3);
    }
}

void rf_image_draw_text(rf_image *dst, int x, int y, int scale, const uint8_t rgb[3], const char *text) {
    if (scale < 1) scale = 1;
    int64_t at_x = x, at_y = y;
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '\n') {
            at_x = x;
            at_y += (int64_t)8 * scale;
            continue;
        }
        const uint8_t *glyph = font[(c >= ' ' && c <= '~' ? c : '?') - ' '];
        bool visible = at_x < dst->width && at_y < dst->height && at_x > -(int64_t)6 * scale;
        for (int i = 0; visible && i < 8 * 5; i++) {
            int row = i / 5, column = i % 5;
            if (glyph[row] & (16 >> column)) {
                fill(dst, at_x + (int64_t)column * scale, at_y + (int64_t)row * scale, scale, rgb);
            }
        }
        at_x += (int64_t)6 * scale;
    }
}

/* ---- comparing ---- */

#define WINDOW 11

static void gaussian(double w[WINDOW]) {
    double sum = 0;
    for (int i = 0; i < WINDOW; i++) {
        double d = i - WINDOW / 2;
        w[i] = exp(-d * d / (2 * 1.5 * 1.5));
        sum += w[i];
    }
    for (int i = 0; i < WINDOW; i++) w[i] /= sum;
}

static double luma(const uint8_t *p) {
    return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
}

/* columns [width, 5]: the window's vertical half, of a, b, a^2, b^2 and ab, for the rows from y on. */
static void sum_columns(double *columns, const rf_image *a, const rf_image *b, int y, const double w[WINDOW]) {
    memset(columns, 0, (size_t)a->width * 5 * sizeof *columns);
    for (int i = 0; i < WINDOW; i++) {
        const uint8_t *pa = a->rgb + (size_t)(y + i) * (size_t)a->width * 3;
        const uint8_t *pb = b->rgb + (size_t)(y + i) * (size_t)a->width * 3;
        for (int x = 0; x < a->width; x++) {
            double la = luma(pa + 3 * x), lb = luma(pb + 3 * x);
            double *sums = columns + 5 * x;
            sums[0] += w[i] * la;
            sums[1] += w[i] * lb;
            sums[2] += w[i] * la * la;
            sums[3] += w[i] * lb * lb;
            sums[4] += w[i] * la * lb;
        }
    }
}

static rf_status mean_ssim(const rf_image *a, const rf_image *b, double *ssim, rf_error *err) {
    if (a->width < WINDOW || a->height < WINDOW) {
        return rf_fail(err, RF_ERR_SHAPE, "SSIM needs images of at least %d x %d pixels, found %d x %d", WINDOW, WINDOW,
                       a->width, a->height);
    }
    const double c1 = (0.01 * 255) * (0.01 * 255), c2 = (0.03 * 255) * (0.03 * 255);
    double w[WINDOW], total = 0;
    double *columns = rf_alloc((size_t)a->width * 5 * sizeof *columns);
    if (!columns) return rf_fail(err, RF_ERR_MEMORY, "no memory to compare images of width %d", a->width);
    gaussian(w);
    for (int y = 0; y + WINDOW <= a->height; y++) {
        sum_columns(columns, a, b, y, w);
        for (int x = 0; x + WINDOW <= a->width; x++) {
            double m[5] = {0};
            for (int i = 0; i < WINDOW; i++) {
                for (int k = 0; k < 5; k++) m[k] += w[i] * columns[5 * (x + i) + k];
            }
            double var_a = m[2] - m[0] * m[0], var_b = m[3] - m[1] * m[1], cov = m[4] - m[0] * m[1];
            total +=
                (2 * m[0] * m[1] + c1) * (2 * cov + c2) / ((m[0] * m[0] + m[1] * m[1] + c1) * (var_a + var_b + c2));
        }
    }
    rf_free(columns);
    *ssim = total / ((double)(a->width - WINDOW + 1) * (double)(a->height - WINDOW + 1));
    return RF_OK;
}

rf_status rf_image_compare(const rf_image *a, const rf_image *b, double *psnr_db, double *ssim, int *max_abs,
                           rf_error *err) {
    if (a->width != b->width || a->height != b->height) {
        return rf_fail(err, RF_ERR_SHAPE, "images of %d x %d and %d x %d pixels cannot be compared", a->width,
                       a->height, b->width, b->height);
    }
    size_t num = (size_t)a->width * (size_t)a->height * 3;
    uint64_t squares = 0;
    int largest = 0;
    for (size_t i = 0; i < num; i++) {
        int d = a->rgb[i] - b->rgb[i];
        if (d < 0) d = -d;
        if (d > largest) largest = d;
        squares += (uint64_t)(d * d);
    }
    if (psnr_db) *psnr_db = squares == 0 ? (double)INFINITY : 10 * log10(255.0 * 255.0 * (double)num / (double)squares);
    if (max_abs) *max_abs = largest;
    return ssim ? mean_ssim(a, b, ssim, err) : RF_OK;
}
