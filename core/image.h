/* core/image.h - pictures in (PNG, JPEG), PNG out with settings in its text chunks.
 *
 * Pixels are interleaved RGB, 8 bits, rows from the top. Reading limits: 256 MiB file, 16384 x 16384 pixels. */
#ifndef RF_CORE_IMAGE_H
#define RF_CORE_IMAGE_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int width;
    int height;
    uint8_t *rgb; /* [height, width, 3], rf_free */
} rf_image;

typedef struct {
    const char *keyword; /* 1..79 Latin-1 characters */
    const char *text;    /* UTF-8: tEXt if ASCII, else iTXt */
} rf_png_text;

rf_status rf_image_load(rf_image *out, const char *path, rf_error *err);
/* The same from bytes; name stands in messages. */
rf_status rf_image_load_memory(rf_image *out, const void *bytes, size_t num_bytes, const char *name, rf_error *err);
void rf_image_free(rf_image *image); /* frees rgb, zeroes the struct */

/* Written to a temporary name and renamed. Bits depend on pixels and texts only. */
rf_status rf_image_save_png(const rf_image *image, const char *path, const rf_png_text *texts, size_t num_texts,
                            rf_error *err);

/* Reads the tEXt, zTXt (refused with a line) and iTXt chunks of a PNG, checking lengths and CRCs. The arrays are one
 * allocation owned by *out; rf_free(*out). */
rf_status rf_png_read_texts(const char *path, rf_png_text **out, size_t *out_num, rf_error *err);
rf_status rf_png_read_texts_memory(const void *bytes, size_t num_bytes, const char *name, rf_png_text **out,
                                   size_t *out_num, rf_error *err);

/* Planar float [3, height, width] in [-1, 1] to 8-bit: clamp(x/2 + 1/2), times 255, rounded half to even as numpy. */
rf_status rf_image_from_planar(rf_image *out, const float *planar, int width, int height, rf_error *err);

/* Pastes src into dst with its top left corner at (x, y); what falls outside is cut. */
void rf_image_blit(rf_image *dst, const rf_image *src, int x, int y);
/* Draws ASCII text with a built-in 6x8 pixel font scaled by an integer (1 or more); a newline starts the next line at x,
 * other bytes show as '?'. */
void rf_image_draw_text(rf_image *dst, int x, int y, int scale, const uint8_t rgb[3], const char *text);
rf_status rf_image_create(rf_image *out, int width, int height, const uint8_t rgb[3], rf_error *err);

/* Quality of b against a, both of one size: PSNR in dB over all channels (infinity if equal) and mean SSIM on luma
 * (Wang et al. 2004: 11x11 Gaussian of sigma 1.5, K1 .01, K2 .03, only windows that lie inside the image; luma is
 * .299 R + .587 G + .114 B, unrounded). Any of the three may be NULL; with ssim, a side under 11 is RF_ERR_SHAPE. */
rf_status rf_image_compare(const rf_image *a, const rf_image *b, double *psnr_db, double *ssim, int *max_abs,
                           rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
