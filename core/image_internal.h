/* core/image_internal.h - what image.c, image_decode.c and png.c share. */
#ifndef RF_CORE_IMAGE_INTERNAL_H
#define RF_CORE_IMAGE_INTERNAL_H

#include "core/image.h"

#define RF_IMAGE_MAX_FILE_BYTES ((size_t)256 << 20)
#define RF_IMAGE_MAX_SIDE       16384

/* RF_ERR_FORMAT with the sizes if a side is outside 1..RF_IMAGE_MAX_SIDE. */
rf_status rf_image_check_size(int width, int height, const char *name, rf_error *err);

/* Walks a JPEG's segments (the bytes begin with FF D8) and refuses what stb_image might not survive. */
rf_status rf_jpeg_check(const void *bytes, size_t num_bytes, const char *name, rf_error *err);

#endif
