/* core/video_apng.c - animated PNG out and in.
 *
 * Source   PNG (Third Edition), W3C 2025: 11.3.2.2 to 11.3.2.4 and clause 13 (acTL, fcTL, fdAT, disposal and blending).
 * Writer   8-bit RGB, looping for ever. Each frame but the first is the smallest rectangle that holds every changed pixel,
 *          laid over the last frame; a frame without a change is one pixel, so that frames are neither lost nor merged. What is
 *          compressed goes out in chunks of 64 KiB: memory is that of one frame.
 * Reader   8-bit RGB and RGBA without interlacing; all disposal and blending operations, the canvas starting as transparent
 *          black and shown on black.
 * Pitfall  the frame count stands in front of the frames: it is written as 0 and patched by commit.
 * Pitfall  fcTL and fdAT share one sequence of numbers; IDAT has none. */
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/image_internal.h"
#include "core/memory.h"
#include "core/video_internal.h"

#define DATA_BYTES 65536 /* of compressed data a chunk */
#define ACTL_AT    33    /* behind the signature and IHDR */

/* A rectangle of the canvas. */
typedef struct {
    uint32_t x, y, width, height;
} region;

/* ---- writing ---- */

typedef struct {
    rf_video_file file;
    z_stream z;
    bool z_started;
    uint32_t width, height;
    uint32_t num_frames, sequence;
    int delay_num, delay_den;
    uint8_t *last;                      /* the canvas */
    uint8_t *rows;                      /* two rows for the filters, each behind 3 bytes of zero */
    uint8_t *filtered;                  /* five filtered rows */
    uint8_t chunk[12 + DATA_BYTES + 4]; /* length, type, number; compressed data; CRC */
} apng_writer;

static void put_u16(unsigned char out[2], int v) {
    out[0] = (unsigned char)(v >> 8);
    out[1] = (unsigned char)v;
}

/* At most 26 + 12 bytes. Returns the chunk's size. */
static size_t build_chunk(unsigned char *out, const char type[4], const void *data, size_t num_bytes) {
    rf_png_put_u32(out, (uint32_t)num_bytes);
    memcpy(out + 4, type, 4);
    memcpy(out + 8, data, num_bytes);
    rf_png_put_u32(out + 8 + num_bytes, (uint32_t)crc32_z(crc32(0, NULL, 0), out + 4, num_bytes + 4));
    return num_bytes + 12;
}

static size_t build_actl(unsigned char out[20], uint32_t num_frames) {
    unsigned char data[8] = {0}; /* plays: 0, for ever */
    rf_png_put_u32(data, num_frames);
    return build_chunk(out, "acTL", data, sizeof data);
}

static rf_status write_text_chunk(apng_writer *w, const rf_png_text *text, rf_error *err) {
    bool ascii = true;
    char head[RF_PNG_TEXT_HEAD];
    unsigned char start[8], end[4];
    RF_TRY(rf_png_check_text(text, &ascii, err));
    size_t head_bytes = rf_png_text_head(text, ascii, head), text_bytes = strlen(text->text);
    rf_png_put_u32(start, (uint32_t)(head_bytes + text_bytes));
    memcpy(start + 4, ascii ? "tEXt" : "iTXt", 4);
    uLong crc = crc32_z(crc32(0, NULL, 0), start + 4, 4);
    crc = crc32_z(crc, (const unsigned char *)head, head_bytes);
    if (text_bytes) crc = crc32_z(crc, (const unsigned char *)text->text, text_bytes);
    rf_png_put_u32(end, (uint32_t)crc);
    RF_TRY(rf_video_file_write(&w->file, start, sizeof start, err));
    RF_TRY(rf_video_file_write(&w->file, head, head_bytes, err));
    RF_TRY(rf_video_file_write(&w->file, text->text, text_bytes, err));
    return rf_video_file_write(&w->file, end, sizeof end, err);
}

static rf_status write_start(apng_writer *w, const rf_video_options *options, rf_error *err) {
    unsigned char start[8 + 25 + 20], header[13] = {0};
    rf_png_put_u32(header, w->width);
    rf_png_put_u32(header + 4, w->height);
    header[8] = 8; /* bits */
    header[9] = 2; /* RGB */
    memcpy(start, RF_PNG_SIGNATURE, 8);
    build_chunk(start + 8, "IHDR", header, sizeof header);
    build_actl(start + ACTL_AT, 0);
    RF_TRY(rf_video_file_write(&w->file, start, sizeof start, err));
    for (size_t i = 0; i < options->num_texts; i++) RF_TRY(write_text_chunk(w, &options->texts[i], err));
    return RF_OK;
}

static void apng_discard(void *state) {
    apng_writer *w = state;
    if (w->z_started) deflateEnd(&w->z);
    rf_video_file_discard(&w->file);
    rf_free(w->last);
    rf_free(w->rows);
    rf_free(w->filtered);
    rf_free(w);
}

static rf_status apng_open(void **state, const char *path, const rf_video_options *options, rf_error *err) {
    *state = NULL;
    apng_writer *w = rf_alloc_zero(1, sizeof *w);
    if (!w) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a video writer", path);
    w->width = (uint32_t)options->width;
    w->height = (uint32_t)options->height;
    int num, den;
    rf_video_fps_fraction(options->fps, 65535, &num, &den);
    w->delay_num = den;
    w->delay_den = num;
    w->z.zalloc = rf_png_zlib_alloc;
    w->z.zfree = rf_png_zlib_free;
    w->file.fd = -1;
    size_t row_bytes = (size_t)w->width * 3;
    w->last = rf_alloc(row_bytes * w->height);
    w->rows = rf_alloc(2 * (row_bytes + 3));
    w->filtered = rf_alloc(5 * (row_bytes + 1));
    w->z_started = deflateInit(&w->z, Z_DEFAULT_COMPRESSION) == Z_OK;
    rf_status st = RF_OK;
    if (!w->last || !w->rows || !w->filtered || !w->z_started) {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory to compress %u x %u pixels", path, w->width, w->height);
    }
    if (st == RF_OK) st = rf_video_file_open(&w->file, path, err);
    if (st == RF_OK) st = write_start(w, options, err);
    if (st != RF_OK) {
        apng_discard(w);
        return st;
    }
    *state = w;
    return RF_OK;
}

/* The compressed data so far, as IDAT of the first frame or fdAT of the others. */
static rf_status write_data(apng_writer *w, rf_error *err) {
    const bool first = w->num_frames == 0;
    size_t num_bytes = DATA_BYTES - w->z.avail_out;
    uint8_t *start = w->chunk + (first ? 4 : 0);
    uint8_t *end = w->chunk + 12 + num_bytes;
    rf_png_put_u32(start, (uint32_t)(num_bytes + (first ? 0 : 4)));
    memcpy(start + 4, first ? "IDAT" : "fdAT", 4);
    if (!first) rf_png_put_u32(start + 8, w->sequence++);
    uLong crc = crc32_z(crc32(0, NULL, 0), start + 4, (size_t)(end - start) - 4);
    rf_png_put_u32(end, (uint32_t)crc);
    w->z.next_out = w->chunk + 12;
    w->z.avail_out = DATA_BYTES;
    return rf_video_file_write(&w->file, start, (size_t)(end - start) + 4, err);
}

/* The smallest rectangle outside of which rgb is as the last frame; one pixel if all is. */
static region changed_region(const apng_writer *w, const uint8_t *rgb) {
    const size_t row_bytes = (size_t)w->width * 3;
    uint32_t top = 0, bottom = w->height; /* rows top to bottom - 1 */
    while (top < bottom && memcmp(rgb + top * row_bytes, w->last + top * row_bytes, row_bytes) == 0) top++;
    if (top == bottom) return (region){.width = 1, .height = 1};
    while (memcmp(rgb + (bottom - 1) * row_bytes, w->last + (bottom - 1) * row_bytes, row_bytes) == 0) bottom--;
    size_t left = row_bytes, right = 0; /* bytes left to right - 1 */
    for (uint32_t y = top; y < bottom; y++) {
        const uint8_t *a = rgb + y * row_bytes, *b = w->last + y * row_bytes;
        size_t i = 0, j = row_bytes;
        while (i < left && a[i] == b[i]) i++;
        while (j > right && a[j - 1] == b[j - 1]) j--;
        left = i;
        right = j;
    }
    uint32_t x = (uint32_t)(left / 3);
    return (region){.x = x, .y = top, .width = (uint32_t)((right + 2) / 3) - x, .height = bottom - top};
}

static rf_status write_pixels(apng_writer *w, const uint8_t *rgb, region r, rf_error *err) {
    const size_t row_bytes = (size_t)r.width * 3;
    uint8_t *row = w->rows + 3, *above = row + row_bytes + 3;
    memset(w->rows, 0, 2 * (row_bytes + 3));
    if (deflateReset(&w->z) != Z_OK) return rf_fail(err, RF_ERR_STATE, "%s: zlib cannot restart", w->file.target);
    w->z.next_out = w->chunk + 12;
    w->z.avail_out = DATA_BYTES;
    for (uint32_t y = 0; y < r.height; y++) {
        memcpy(row, rgb + ((size_t)(r.y + y) * w->width + r.x) * 3, row_bytes);
        w->z.next_in = (unsigned char *)rf_png_filter(row, above, row_bytes, w->filtered); /* zlib only reads it */
        w->z.avail_in = (uInt)(row_bytes + 1);
        const int flush = y + 1 == r.height ? Z_FINISH : Z_NO_FLUSH;
        int result;
        do {
            result = deflate(&w->z, flush);
            if (result != Z_OK && result != Z_STREAM_END) {
                return rf_fail(err, RF_ERR_STATE, "%s: zlib error %d", w->file.target, result);
            }
            if (w->z.avail_out == 0 || (result == Z_STREAM_END && w->z.avail_out < DATA_BYTES)) {
                RF_TRY(write_data(w, err));
            }
        } while (w->z.avail_in > 0 || (flush == Z_FINISH && result != Z_STREAM_END));
        uint8_t *swap = above;
        above = row;
        row = swap;
    }
    return RF_OK;
}

static rf_status apng_add(void *state, const uint8_t *rgb, rf_error *err) {
    apng_writer *w = state;
    region r = {.width = w->width, .height = w->height};
    if (w->num_frames > 0) r = changed_region(w, rgb);
    if (w->sequence > INT32_MAX / 2) {
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: %u frames are too many for an animated PNG", w->file.target,
                       w->num_frames);
    }
    unsigned char control[26] = {0}, chunk[sizeof control + 12]; /* disposal: none; blending: source */
    rf_png_put_u32(control, w->sequence++);
    rf_png_put_u32(control + 4, r.width);
    rf_png_put_u32(control + 8, r.height);
    rf_png_put_u32(control + 12, r.x);
    rf_png_put_u32(control + 16, r.y);
    put_u16(control + 20, w->delay_num);
    put_u16(control + 22, w->delay_den);
    RF_TRY(rf_video_file_write(&w->file, chunk, build_chunk(chunk, "fcTL", control, sizeof control), err));
    RF_TRY(write_pixels(w, rgb, r, err));
    memcpy(w->last, rgb, (size_t)w->width * w->height * 3);
    w->num_frames++;
    return RF_OK;
}

static rf_status apng_commit(void *state, rf_error *err) {
    apng_writer *w = state;
    unsigned char chunk[20];
    rf_status st = rf_video_file_write(&w->file, chunk, build_chunk(chunk, "IEND", "", 0), err);
    build_actl(chunk, w->num_frames);
    if (st == RF_OK) st = rf_video_file_patch(&w->file, ACTL_AT, chunk, sizeof chunk, err);
    if (st == RF_OK) st = rf_video_file_commit(&w->file, err);
    apng_discard(w);
    return st;
}

static const char *apng_codec(const void *state) {
    return "animated PNG";
}

const rf_video_sink rf_video_sink_apng = {apng_open, apng_add, apng_commit, apng_discard, apng_codec};

/* ---- reading ---- */

bool rf_apng_is_animated(const void *bytes, size_t num_bytes) {
    const unsigned char *p = bytes;
    if (num_bytes < 8 || memcmp(p, RF_PNG_SIGNATURE, 8) != 0) return false;
    for (size_t at = 8; num_bytes - at >= 12;) {
        size_t len = rf_png_get_u32(p + at);
        if (memcmp(p + at + 4, "acTL", 4) == 0) return true;
        if (memcmp(p + at + 4, "IDAT", 4) == 0 || len > num_bytes - at - 12) return false;
        at += 12 + len;
    }
    return false;
}

enum { DISPOSE_NONE, DISPOSE_BACKGROUND, DISPOSE_PREVIOUS };
enum { BLEND_SOURCE, BLEND_OVER };

typedef struct {
    rf_video_frames *out;
    rf_error *err;
    rf_png_reader chunks;
    z_stream z;
    bool z_started;
    uint32_t width, height;
    size_t pixel_bytes;    /* of the file: 3 or 4 */
    uint8_t *canvas;       /* [height][width] RGBA */
    uint8_t *saved;        /* the canvas before a frame whose disposal is DISPOSE_PREVIOUS; made when one comes */
    uint8_t *row, *above;  /* filter byte and pixels, each behind pixel_bytes - 1 more bytes of zero */
    uint8_t *rows;         /* where both lie */
    uint32_t num_stated;   /* acTL */
    uint32_t sequence;     /* the next number */
    bool have_default;     /* IDAT was seen */
    bool frame_is_default; /* the frame's data are in IDAT */
    bool in_frame;         /* between fcTL and the end of its data */
    bool finished;         /* zlib's stream has ended */
    region at;             /* of the frame */
    uint32_t num_rows;     /* that came */
    size_t row_have;       /* bytes of the row that came */
    unsigned dispose, blend;
} apng_reader;

static rf_status bad(const apng_reader *r, const char *what) {
    return rf_fail(r->err, RF_ERR_FORMAT, "%s: frame %d: %s", r->out->name, r->out->num, what);
}

static rf_status read_header(apng_reader *r, const rf_png_chunk *c) {
    if (strcmp(c->type, "IHDR") != 0 || c->num_bytes != 13) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: the first chunk is %s of %zu bytes, not IHDR of 13", r->out->name,
                       c->type, c->num_bytes);
    }
    r->width = rf_png_get_u32(c->data);
    r->height = rf_png_get_u32(c->data + 4);
    const unsigned depth = c->data[8], colour = c->data[9], interlace = c->data[12];
    const uint32_t limit = RF_IMAGE_MAX_SIDE + 1; /* as an int; what is larger is refused just the same */
    RF_TRY(rf_image_check_size((int)(r->width < limit ? r->width : limit), (int)(r->height < limit ? r->height : limit),
                               r->out->name, r->err));
    static const char *const colours[] = {"grey", "?", "RGB", "palette", "grey and alpha", "?", "RGBA"};
    if (depth != 8 || (colour != 2 && colour != 6)) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED,
                       "%s: an animated PNG of colour type %u (%s), %u bits: only RGB and RGBA of 8 bits are read",
                       r->out->name, colour, colour <= 6 ? colours[colour] : "?", depth);
    }
    if (interlace != 0) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: an interlaced animated PNG is not read", r->out->name);
    }
    if (c->data[10] != 0 || c->data[11] != 0) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: IHDR names compression %u and filter %u, not 0", r->out->name,
                       c->data[10], c->data[11]);
    }
    r->pixel_bytes = colour == 2 ? 3 : 4;
    return RF_OK;
}

static rf_status allocate(apng_reader *r) {
    size_t padded = (size_t)r->width * r->pixel_bytes + r->pixel_bytes;
    r->canvas = rf_alloc_zero((size_t)r->width * r->height, 4);
    r->rows = rf_alloc(2 * padded);
    if (r->rows) r->row = r->rows + r->pixel_bytes - 1;
    if (r->rows) r->above = r->row + padded;
    r->z.zalloc = rf_png_zlib_alloc;
    r->z.zfree = rf_png_zlib_free;
    r->z_started = inflateInit(&r->z) == Z_OK;
    if (r->canvas && r->rows && r->z_started) return RF_OK;
    return rf_fail(r->err, RF_ERR_MEMORY, "%s: no memory for %u x %u pixels", r->out->name, r->width, r->height);
}

/* PNG filtering, 9.2: from bytes to pixels in place. row[0] is the filter. */
static rf_status unfilter(const apng_reader *r, size_t row_bytes) {
    const size_t step = r->pixel_bytes;
    uint8_t *row = r->row + 1;
    const uint8_t *above = r->above + 1;
    const uint8_t filter = r->row[0];
    r->row[0] = 0; /* with the bytes in front: the pixel left of the first */
    r->above[0] = 0;
    if (filter > 4) return bad(r, "a row has no valid filter");
    if (filter == 0) return RF_OK;
    for (size_t i = 0; i < row_bytes; i++) {
        const int left = *(row + i - step), up = above[i], up_left = *(above + i - step);
        const int guess = filter == 1   ? left
                          : filter == 2 ? up
                          : filter == 3 ? (left + up) / 2
                                        : rf_png_paeth(left, up, up_left);
        row[i] = (uint8_t)(row[i] + guess);
    }
    return RF_OK;
}

/* PNG 13.16: src over dst, alpha not premultiplied. */
static void blend_over(uint8_t dst[4], const uint8_t src[4]) {
    const unsigned u = src[3] * 255u, v = (255u - src[3]) * dst[3], alpha = u + v;
    if (src[3] == 0) return;
    for (int c = 0; c < 3; c++) dst[c] = (uint8_t)((src[c] * u + dst[c] * v) / alpha);
    dst[3] = (uint8_t)(alpha / 255);
}

static void draw_row(const apng_reader *r) {
    uint8_t *to = r->canvas + ((size_t)(r->at.y + r->num_rows) * r->width + r->at.x) * 4;
    const uint8_t *from = r->row + 1;
    for (uint32_t x = 0; x < r->at.width; x++, to += 4, from += r->pixel_bytes) {
        const uint8_t pixel[4] = {from[0], from[1], from[2], r->pixel_bytes == 4 ? from[3] : 255};
        if (r->blend == BLEND_OVER)
            blend_over(to, pixel);
        else
            memcpy(to, pixel, 4);
    }
}

/* One chunk's share of the frame's compressed rows. */
static rf_status read_data(apng_reader *r, const unsigned char *data, size_t num_bytes) {
    const size_t row_bytes = (size_t)r->at.width * r->pixel_bytes;
    if (!r->in_frame) return RF_OK;       /* a default picture that is no frame */
    r->z.next_in = (unsigned char *)data; /* zlib only reads it */
    r->z.avail_in = (uInt)num_bytes;
    while (!r->finished) {
        uint8_t extra; /* after the last row: a byte that must not come */
        const bool all = r->num_rows == r->at.height;
        r->z.next_out = all ? &extra : r->row + r->row_have;
        r->z.avail_out = all ? 1 : (uInt)(row_bytes + 1 - r->row_have);
        const uInt room = r->z.avail_out;
        const int result = inflate(&r->z, Z_NO_FLUSH);
        if (result == Z_MEM_ERROR) {
            return rf_fail(r->err, RF_ERR_MEMORY, "%s: frame %d: no memory to decompress", r->out->name, r->out->num);
        }
        if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
            return bad(r, "its compressed data are damaged");
        }
        if (all && r->z.avail_out == 0) return bad(r, "holds more data than its size needs");
        r->row_have += all ? 0 : room - r->z.avail_out;
        if (!all && r->row_have == row_bytes + 1) {
            RF_TRY(unfilter(r, row_bytes));
            draw_row(r);
            uint8_t *swap = r->above;
            r->above = r->row;
            r->row = swap;
            r->row_have = 0;
            r->num_rows++;
        }
        r->finished = result == Z_STREAM_END;
        if (result == Z_BUF_ERROR || (r->z.avail_in == 0 && r->z.avail_out > 0)) break;
    }
    if (r->finished && r->z.avail_in > 0) return bad(r, "data behind the end of its compressed data");
    return RF_OK;
}

/* Hands the frame over and prepares the canvas for the next one. */
static rf_status finish_frame(apng_reader *r) {
    uint8_t *rgb;
    const size_t num_pixels = (size_t)r->width * r->height;
    if (!r->in_frame) return RF_OK;
    if (!r->finished || r->num_rows != r->at.height) return bad(r, "its data end before its last row");
    RF_TRY(rf_video_frames_append(r->out, (int)r->width, (int)r->height, &rgb, r->err));
    for (size_t i = 0; i < num_pixels; i++) {
        const uint8_t *p = r->canvas + i * 4;
        for (size_t c = 0; c < 3; c++) rgb[i * 3 + c] = (uint8_t)((p[c] * p[3] + 127) / 255);
    }
    r->in_frame = false;
    for (uint32_t y = 0; y < r->at.height && r->dispose == DISPOSE_BACKGROUND; y++) {
        memset(r->canvas + ((size_t)(r->at.y + y) * r->width + r->at.x) * 4, 0, (size_t)r->at.width * 4);
    }
    if (r->dispose == DISPOSE_PREVIOUS) memcpy(r->canvas, r->saved, num_pixels * 4);
    return RF_OK;
}

static rf_status start_frame(apng_reader *r, const rf_png_chunk *c) {
    const unsigned char *p = c->data;
    RF_TRY(finish_frame(r));
    if (r->out->num == r->out->max) return RF_OK;
    if (c->num_bytes != 26) return bad(r, "its fcTL has not 26 bytes");
    if (rf_png_get_u32(p) != r->sequence++) return bad(r, "its fcTL is out of sequence");
    r->at = (region){.width = rf_png_get_u32(p + 4),
                     .height = rf_png_get_u32(p + 8),
                     .x = rf_png_get_u32(p + 12),
                     .y = rf_png_get_u32(p + 16)};
    r->dispose = p[24];
    r->blend = p[25];
    if (r->at.width == 0 || r->at.height == 0 || r->at.width > r->width || r->at.height > r->height ||
        r->at.x > r->width - r->at.width || r->at.y > r->height - r->at.height) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: frame %d: %u x %u at (%u, %u) is not inside %u x %u", r->out->name,
                       r->out->num, r->at.width, r->at.height, r->at.x, r->at.y, r->width, r->height);
    }
    if (!r->have_default && (r->at.width != r->width || r->at.height != r->height)) {
        return bad(r, "the default picture as a frame must fill the canvas");
    }
    if (r->dispose > DISPOSE_PREVIOUS || r->blend > BLEND_OVER) return bad(r, "unknown disposal or blending");
    if (r->dispose == DISPOSE_PREVIOUS && r->out->num == 0) r->dispose = DISPOSE_BACKGROUND;
    if (r->dispose == DISPOSE_PREVIOUS) {
        const size_t bytes = (size_t)r->width * r->height * 4;
        if (!r->saved) r->saved = rf_alloc(bytes);
        if (!r->saved) {
            return rf_fail(r->err, RF_ERR_MEMORY, "%s: no memory for %u x %u pixels", r->out->name, r->width,
                           r->height);
        }
        memcpy(r->saved, r->canvas, bytes);
    }
    if (inflateReset(&r->z) != Z_OK) return rf_fail(r->err, RF_ERR_STATE, "%s: zlib cannot restart", r->out->name);
    r->in_frame = true;
    r->frame_is_default = !r->have_default;
    r->finished = false;
    r->num_rows = 0;
    r->row_have = 0;
    memset(r->rows, 0, 2 * ((size_t)r->width * r->pixel_bytes + r->pixel_bytes));
    return RF_OK;
}

static rf_status read_chunks(apng_reader *r) {
    rf_png_chunk c;
    RF_TRY(rf_png_next_chunk(&r->chunks, &c));
    RF_TRY(read_header(r, &c));
    RF_TRY(allocate(r));
    while (r->out->num < r->out->max) {
        RF_TRY(rf_png_next_chunk(&r->chunks, &c));
        if (strcmp(c.type, "acTL") == 0) {
            if (c.num_bytes != 8 || r->num_stated > 0) return bad(r, "a second or damaged acTL");
            r->num_stated = rf_png_get_u32(c.data);
            if (r->num_stated == 0) return bad(r, "acTL states no frames");
        } else if (strcmp(c.type, "tRNS") == 0) {
            return rf_fail(r->err, RF_ERR_UNSUPPORTED,
                           "%s: an animated PNG with a transparent colour (tRNS) is not read", r->out->name);
        } else if (strcmp(c.type, "fcTL") == 0) {
            RF_TRY(start_frame(r, &c));
        } else if (strcmp(c.type, "IDAT") == 0) {
            if (r->out->num > 0 || (r->in_frame && !r->frame_is_default)) return bad(r, "IDAT behind the first frame");
            r->have_default = true;
            RF_TRY(read_data(r, c.data, c.num_bytes));
        } else if (strcmp(c.type, "fdAT") == 0) {
            if (!r->have_default || !r->in_frame) return bad(r, "fdAT outside of a frame");
            if (c.num_bytes < 4 || rf_png_get_u32(c.data) != r->sequence++) return bad(r, "fdAT is out of sequence");
            RF_TRY(read_data(r, c.data + 4, c.num_bytes - 4));
        } else if (strcmp(c.type, "IEND") == 0) {
            RF_TRY(finish_frame(r));
            break;
        }
    }
    if (r->out->num == 0) return bad(r, "acTL, but no frame");
    if (r->out->num < r->out->max && (uint32_t)r->out->num < r->num_stated) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: acTL states %u frames, found %d", r->out->name, r->num_stated,
                       r->out->num);
    }
    return RF_OK;
}

rf_status rf_apng_read(rf_video_frames *frames, const void *bytes, size_t num_bytes, rf_error *err) {
    apng_reader r = {.out = frames,
                     .err = err,
                     .chunks = {.name = frames->name, .bytes = bytes, .num_bytes = num_bytes, .at = 8, .err = err}};
    rf_status st = read_chunks(&r);
    if (r.z_started) inflateEnd(&r.z);
    rf_free(r.canvas);
    rf_free(r.saved);
    rf_free(r.rows);
    return st;
}
