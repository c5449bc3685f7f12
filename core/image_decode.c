/* core/image_decode.c - PNG and JPEG through stb_image, with our allocator and a limit on what one file may make it take.
 *
 * Pitfall  stb_image inflates a PNG's data to its end whatever size the picture states, so a small file could ask for
 *          gigabytes. One block may be at most what the stated size can need; anything larger is refused.
 * Pitfall  it does not initialise its JPEG tables: blocks are given zeroed, so that a table that a file forgot is all zero.
 * Pitfall  release 2.27 writes out of bounds for some JPEGs: jpeg_check.c looks at the file first. */
#include <limits.h>
#include <string.h>

#include "core/file.h"
#include "core/image_internal.h"
#include "core/memory.h"

static _Thread_local size_t max_block_bytes; /* for the decode that runs in this thread */
static _Thread_local bool out_of_memory;     /* the allocator failed, not the file */
static _Thread_local bool block_refused;

static void *decode_alloc(size_t bytes) {
    if (bytes > max_block_bytes) {
        block_refused = true;
        return NULL;
    }
    void *p = rf_alloc_zero(1, bytes);
    if (!p) out_of_memory = true;
    return p;
}

static void *decode_realloc(void *old, size_t bytes) {
    if (bytes > max_block_bytes) {
        block_refused = true;
        return NULL;
    }
    void *p = rf_realloc(old, bytes);
    if (!p) out_of_memory = true;
    return p;
}

#define STBI_MALLOC(bytes)       decode_alloc(bytes)
#define STBI_REALLOC(old, bytes) decode_realloc(old, bytes)
#define STBI_FREE(p)             rf_free(p)
#define STBI_ASSERT(condition)   ((void)0)
#define STBI_MAX_DIMENSIONS      RF_IMAGE_MAX_SIDE
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>

rf_status rf_image_check_size(int width, int height, const char *name, rf_error *err) {
    if (width >= 1 && height >= 1 && width <= RF_IMAGE_MAX_SIDE && height <= RF_IMAGE_MAX_SIDE) return RF_OK;
    return rf_fail(err, RF_ERR_FORMAT, "%s: %d x %d pixels, each side must be 1 to %d", name, width, height,
                   RF_IMAGE_MAX_SIDE);
}

rf_status rf_image_load_memory(rf_image *out, const void *bytes, size_t num_bytes, const char *name, rf_error *err) {
    *out = (rf_image){0};
    int width = 0, height = 0, channels = 0;
    if (num_bytes > RF_IMAGE_MAX_FILE_BYTES) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: %zu bytes, the limit is %zu", name, num_bytes, RF_IMAGE_MAX_FILE_BYTES);
    }
    const bool is_jpeg = num_bytes >= 2 && memcmp(bytes, "\xff\xd8", 2) == 0;
    const bool is_png = num_bytes >= 8 && memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) == 0;
    if (!is_jpeg && !is_png) return rf_fail(err, RF_ERR_FORMAT, "%s: not a PNG or JPEG image", name);
    rf_status st = is_jpeg ? rf_jpeg_check(bytes, num_bytes, name, err) : RF_OK;
    if (st != RF_OK) return st;
    max_block_bytes = (size_t)1 << 20; /* enough for a decoder's own state */
    out_of_memory = block_refused = false;
    bool known = stbi_info_from_memory(bytes, (int)num_bytes, &width, &height, &channels);
    if (!known && out_of_memory) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory to read an image", name);
    if (!known) return rf_fail(err, RF_ERR_FORMAT, "%s: damaged image: %s", name, stbi_failure_reason());
    st = rf_image_check_size(width, height, name, err);
    if (st != RF_OK) return st;

    /* 4 channels of 16 bits, twice over for a margin; sides padded to a JPEG's largest block. */
    max_block_bytes = ((size_t)width + 64) * ((size_t)height + 64) * 16 + ((size_t)1 << 20);
    uint8_t *rgb = stbi_load_from_memory(bytes, (int)num_bytes, &width, &height, &channels, 3);
    if (!rgb && out_of_memory) {
        return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %d x %d pixels", name, width, height);
    }
    if (!rgb && block_refused) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: holds more data than %d x %d pixels can need", name, width, height);
    }
    if (!rgb) return rf_fail(err, RF_ERR_FORMAT, "%s: damaged image: %s", name, stbi_failure_reason());
    *out = (rf_image){.width = width, .height = height, .rgb = rgb};
    return RF_OK;
}

rf_status rf_image_load(rf_image *out, const char *path, rf_error *err) {
    *out = (rf_image){0};
    char *bytes = NULL;
    size_t num_bytes = 0;
    rf_status st = rf_file_read(path, RF_IMAGE_MAX_FILE_BYTES, &bytes, &num_bytes, err);
    if (st != RF_OK) return st;
    st = rf_image_load_memory(out, bytes, num_bytes, path, err);
    rf_free(bytes);
    return st;
}
