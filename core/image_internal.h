/* core/image_internal.h - what image.c, image_decode.c, png.c and the video files share. */
#ifndef RF_CORE_IMAGE_INTERNAL_H
#define RF_CORE_IMAGE_INTERNAL_H

#include "core/image.h"

#define RF_IMAGE_MAX_FILE_BYTES ((size_t)256 << 20)
#define RF_IMAGE_MAX_SIDE       16384

/* RF_ERR_FORMAT with the sizes if a side is outside 1..RF_IMAGE_MAX_SIDE. */
rf_status rf_image_check_size(int width, int height, const char *name, rf_error *err);

/* Walks a JPEG's segments (the bytes begin with FF D8) and refuses what stb_image might not survive. */
rf_status rf_jpeg_check(const void *bytes, size_t num_bytes, const char *name, rf_error *err);

/* ---- PNG pieces (png.c) ---- */

#define RF_PNG_SIGNATURE "\x89PNG\r\n\x1a\n"
#define RF_PNG_TEXT_HEAD (79 + 5)

void rf_png_put_u32(unsigned char out[4], uint32_t v); /* big-endian */
uint32_t rf_png_get_u32(const unsigned char *p);

/* RF_ERR_ARGUMENT if a keyword or text may not stand in a PNG. *ascii: the text fits a tEXt chunk, else it needs iTXt. */
rf_status rf_png_check_text(const rf_png_text *text, bool *ascii, rf_error *err);
/* What stands before the text in its chunk; the number of bytes. */
size_t rf_png_text_head(const rf_png_text *text, bool ascii, char head[RF_PNG_TEXT_HEAD]);

/* The row, filter byte first (row_bytes + 1), in the filter with the smallest sum of absolute differences. RGB, 8 bits: row
 * and above have 3 bytes of zero before them. scratch: 5 * (row_bytes + 1); the result lies there. */
const uint8_t *rf_png_filter(const uint8_t *row, const uint8_t *above, size_t row_bytes, uint8_t *scratch);
int rf_png_paeth(int left, int up, int up_left);

/* For z_stream: zlib's memory from core/memory.h. */
void *rf_png_zlib_alloc(void *user, unsigned count, unsigned elem_bytes);
void rf_png_zlib_free(void *user, void *p);

typedef struct {
    const char *name; /* for messages */
    const unsigned char *bytes;
    size_t num_bytes;
    size_t at; /* 8: behind the signature */
    rf_error *err;
} rf_png_reader;

typedef struct {
    char type[5];
    const unsigned char *data;
    size_t num_bytes;
} rf_png_chunk;

/* The chunk at r->at, its length and CRC checked; steps over it. */
rf_status rf_png_next_chunk(rf_png_reader *r, rf_png_chunk *c);

#endif
