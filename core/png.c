/* core/png.c - a PNG writer over zlib that streams rows, a reader of text chunks, and the pieces of both that video_apng.c
 * shares.
 *
 * Source   PNG (Third Edition), W3C 2025: 9 filtering, 11.3.3 textual information.
 * Each row takes the filter with the smallest sum of absolute differences; zlib runs at its default level. No time stamp or
 * other varying chunk is written, so the bytes depend on pixels and texts (and the zlib release) only.
 * The writer is ours because stb_image_write does not survive a failed allocation. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/file.h"
#include "core/image_internal.h"
#include "core/json_internal.h"
#include "core/memory.h"

#define IDAT_BYTES 65536
#define MAX_CHUNK  ((size_t)INT32_MAX)

void rf_png_put_u32(unsigned char out[4], uint32_t v) {
    out[0] = (unsigned char)(v >> 24);
    out[1] = (unsigned char)(v >> 16);
    out[2] = (unsigned char)(v >> 8);
    out[3] = (unsigned char)v;
}

uint32_t rf_png_get_u32(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* ---- writing ---- */

/* A chunk from up to two pieces. */
static void write_chunk(rf_file_writer *w, const char type[4], const void *a, size_t a_bytes, const void *b,
                        size_t b_bytes) {
    unsigned char word[4];
    uLong crc = crc32(0, (const Bytef *)type, 4);
    if (a_bytes) crc = crc32_z(crc, a, a_bytes);
    if (b_bytes) crc = crc32_z(crc, b, b_bytes);
    rf_png_put_u32(word, (uint32_t)(a_bytes + b_bytes));
    rf_file_writer_write(w, word, 4);
    rf_file_writer_write(w, type, 4);
    rf_file_writer_write(w, a, a_bytes);
    rf_file_writer_write(w, b, b_bytes);
    rf_png_put_u32(word, (uint32_t)crc);
    rf_file_writer_write(w, word, 4);
}

rf_status rf_png_check_text(const rf_png_text *text, bool *ascii, rf_error *err) {
    size_t len = text->keyword ? strlen(text->keyword) : 0;
    bool valid = len >= 1 && len <= 79 && text->keyword[0] != ' ' && text->keyword[len - 1] != ' ';
    for (size_t i = 0; valid && i < len; i++) {
        unsigned char c = (unsigned char)text->keyword[i];
        valid = (c >= 32 && c <= 126) || c >= 161;
    }
    if (!valid) {
        return rf_fail(err, RF_ERR_ARGUMENT, "a PNG keyword must be 1 to 79 printable Latin-1 characters, found '%s'",
                       text->keyword ? text->keyword : "");
    }
    size_t text_len = text->text ? strlen(text->text) : 0;
    if (!text->text || text_len > MAX_CHUNK - 128) {
        return rf_fail(err, RF_ERR_ARGUMENT, "the PNG text '%s' is %s", text->keyword,
                       text->text ? "too long" : "NULL");
    }
    *ascii = true;
    for (size_t i = 0; i < text_len;) {
        size_t sequence = rf_utf8_sequence(text->text + i, text_len - i);
        if (sequence == 0) {
            return rf_fail(err, RF_ERR_ARGUMENT, "the PNG text '%s' is not valid UTF-8 at byte %zu", text->keyword, i);
        }
        if (sequence > 1) *ascii = false;
        i += sequence;
    }
    return RF_OK;
}

size_t rf_png_text_head(const rf_png_text *text, bool ascii, char head[RF_PNG_TEXT_HEAD]) {
    size_t len = strlen(text->keyword);
    memset(head, 0, RF_PNG_TEXT_HEAD);
    memcpy(head, text->keyword, len);
    /* tEXt: keyword, 0, Latin-1 text. iTXt: keyword, 0, compression flag and method 0 0, empty language and translated
     * keyword 0 0, UTF-8 text. */
    return len + (ascii ? 1 : 5);
}

static void write_text(rf_file_writer *w, const rf_png_text *text, bool ascii) {
    char head[RF_PNG_TEXT_HEAD];
    size_t head_bytes = rf_png_text_head(text, ascii, head);
    write_chunk(w, ascii ? "tEXt" : "iTXt", head, head_bytes, text->text, strlen(text->text));
}

int rf_png_paeth(int a, int b, int c) {
    int p = a + b - c;
    int pa = abs(p - a), pb = abs(p - b), pc = abs(p - c);
    return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

/* row and above have 3 bytes of zero before them. out: filter byte, then bytes. Returns the sum of |signed value|. */
static uint64_t filter_row(int filter, const uint8_t *row, const uint8_t *above, size_t bytes, uint8_t *out) {
    uint64_t sum = 0;
    out[0] = (uint8_t)filter;
    for (size_t i = 0; i < bytes; i++) {
        const int a = *(row + i - 3), b = above[i], c = *(above + i - 3);
        const int guess = filter == 0   ? 0
                          : filter == 1 ? a
                          : filter == 2 ? b
                          : filter == 3 ? (a + b) / 2
                                        : rf_png_paeth(a, b, c);
        out[i + 1] = (uint8_t)(row[i] - guess);
        sum += (uint64_t)abs((int8_t)out[i + 1]);
    }
    return sum;
}

const uint8_t *rf_png_filter(const uint8_t *row, const uint8_t *above, size_t row_bytes, uint8_t *scratch) {
    const uint8_t *best = scratch;
    uint64_t best_sum = UINT64_MAX;
    for (int filter = 0; filter < 5; filter++) {
        uint8_t *filtered = scratch + (size_t)filter * (row_bytes + 1);
        uint64_t sum = filter_row(filter, row, above, row_bytes, filtered);
        if (sum < best_sum) {
            best_sum = sum;
            best = filtered;
        }
    }
    return best;
}

void *rf_png_zlib_alloc(void *user, unsigned count, unsigned elem_bytes) {
    return rf_alloc_zero(count, elem_bytes);
}
void rf_png_zlib_free(void *user, void *p) {
    rf_free(p);
}

/* Feeds what is in z, writing a chunk whenever the buffer is full, and at the end. */
static int deflate_some(z_stream *z, int flush, unsigned char *idat, rf_file_writer *w) {
    int result;
    do {
        result = deflate(z, flush);
        if (result != Z_OK && result != Z_STREAM_END) return result;
        if (z->avail_out == 0 || (result == Z_STREAM_END && z->avail_out < IDAT_BYTES)) {
            write_chunk(w, "IDAT", idat, IDAT_BYTES - z->avail_out, NULL, 0);
            z->next_out = idat;
            z->avail_out = IDAT_BYTES;
        }
    } while (z->avail_in > 0 || (flush == Z_FINISH && result != Z_STREAM_END));
    return Z_OK;
}

static rf_status write_pixels(rf_file_writer *w, const rf_image *image, const char *path, rf_error *err) {
    size_t row_bytes = (size_t)image->width * 3;
    size_t padded = row_bytes + 3;
    z_stream z = {.zalloc = rf_png_zlib_alloc, .zfree = rf_png_zlib_free};
    bool started = false;
    rf_status st = RF_OK;
    /* row, row above, five filtered rows, output */
    uint8_t *block = rf_alloc_zero(1, 2 * padded + 5 * (row_bytes + 1) + IDAT_BYTES);
    if (!block || deflateInit(&z, Z_DEFAULT_COMPRESSION) != Z_OK) {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory to compress %d x %d pixels", path, image->width, image->height);
        goto done;
    }
    started = true;
    uint8_t *row = block + 3, *above = row + padded;
    uint8_t *filtered = block + 2 * padded;
    uint8_t *idat = filtered + 5 * (row_bytes + 1);
    z.next_out = idat;
    z.avail_out = IDAT_BYTES;
    for (int y = 0; y < image->height; y++) {
        uint8_t *swap = above;
        above = row;
        row = swap;
        memcpy(row, image->rgb + (size_t)y * row_bytes, row_bytes);
        z.next_in = (unsigned char *)rf_png_filter(row, above, row_bytes, filtered); /* zlib only reads it */
        z.avail_in = (uInt)(row_bytes + 1);
        int result = deflate_some(&z, y == image->height - 1 ? Z_FINISH : Z_NO_FLUSH, idat, w);
        if (result != Z_OK) {
            st = rf_fail(err, RF_ERR_STATE, "%s: zlib error %d", path, result);
            goto done;
        }
    }
done:
    if (started) deflateEnd(&z);
    rf_free(block);
    return st;
}

rf_status rf_image_save_png(const rf_image *image, const char *path, const rf_png_text *texts, size_t num_texts,
                            rf_error *err) {
    bool ascii = true;
    rf_status st = rf_image_check_size(image->width, image->height, path, err);
    if (st != RF_OK) return rf_fail_prefix(err, RF_ERR_ARGUMENT, "cannot write");
    for (size_t i = 0; i < num_texts; i++) {
        st = rf_png_check_text(&texts[i], &ascii, err);
        if (st != RF_OK) return st;
    }
    rf_file_writer *w = NULL;
    st = rf_file_writer_open(&w, path, err);
    if (st != RF_OK) return st;
    unsigned char header[13] = {0};
    rf_png_put_u32(header, (uint32_t)image->width);
    rf_png_put_u32(header + 4, (uint32_t)image->height);
    header[8] = 8; /* bits */
    header[9] = 2; /* RGB */
    rf_file_writer_write(w, RF_PNG_SIGNATURE, 8);
    write_chunk(w, "IHDR", header, sizeof header, NULL, 0);
    for (size_t i = 0; i < num_texts; i++) {
        rf_png_check_text(&texts[i], &ascii, NULL);
        write_text(w, &texts[i], ascii);
    }
    st = write_pixels(w, image, path, err);
    if (st != RF_OK) {
        rf_file_writer_discard(w);
        return st;
    }
    write_chunk(w, "IEND", NULL, 0, NULL, 0);
    return rf_file_writer_commit(w, err);
}

/* ---- reading texts ---- */

rf_status rf_png_next_chunk(rf_png_reader *r, rf_png_chunk *c) {
    size_t left = r->num_bytes - r->at;
    if (left < 12) return rf_fail(r->err, RF_ERR_FORMAT, "%s: byte %zu: the file ends before IEND", r->name, r->at);
    const unsigned char *p = r->bytes + r->at;
    c->num_bytes = rf_png_get_u32(p);
    memcpy(c->type, p + 4, 4);
    c->type[4] = 0;
    c->data = p + 8;
    if (c->num_bytes > left - 12) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: byte %zu: chunk %s states %zu bytes, %zu are left", r->name, r->at,
                       c->type, c->num_bytes, left - 12);
    }
    uint32_t stored = rf_png_get_u32(c->data + c->num_bytes);
    uint32_t found = (uint32_t)crc32_z(crc32(0, NULL, 0), p + 4, c->num_bytes + 4);
    if (stored != found) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: byte %zu: chunk %s has CRC %08x, its bytes give %08x", r->name,
                       r->at, c->type, stored, found);
    }
    r->at += 12 + c->num_bytes;
    return RF_OK;
}

/* One text chunk split into keyword and text, still inside the file. */
typedef struct {
    const unsigned char *keyword;
    size_t keyword_len;
    const unsigned char *text;
    size_t text_len;
    bool latin1;
} raw_text;

static rf_status split_text(const rf_png_reader *r, const rf_png_chunk *c, raw_text *out) {
    const unsigned char *zero = c->num_bytes ? memchr(c->data, 0, c->num_bytes) : NULL;
    size_t len = zero ? (size_t)(zero - c->data) : 0;
    if (len < 1 || len > 79) {
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: chunk %s has no keyword of 1 to 79 bytes", r->name, c->type);
    }
    *out = (raw_text){.keyword = c->data, .keyword_len = len, .latin1 = true};
    const unsigned char *end = c->data + c->num_bytes;
    out->text = zero + 1;
    if (strcmp(c->type, "zTXt") == 0) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: the text '%s' is compressed (zTXt), which is not read", r->name,
                       (const char *)c->data);
    }
    if (strcmp(c->type, "iTXt") == 0) {
        out->latin1 = false;
        if (end - out->text >= 2 && out->text[0] == 1) {
            return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: the text '%s' is compressed (iTXt), which is not read",
                           r->name, (const char *)c->data);
        }
        bool valid = end - out->text >= 4 && out->text[0] == 0 && out->text[1] == 0;
        out->text += valid ? 2 : 0;
        for (int i = 0; valid && i < 2; i++) { /* language, translated keyword */
            const unsigned char *stop = end > out->text ? memchr(out->text, 0, (size_t)(end - out->text)) : NULL;
            valid = stop != NULL;
            if (valid) out->text = stop + 1;
        }
        if (!valid)
            return rf_fail(r->err, RF_ERR_FORMAT, "%s: a damaged iTXt chunk '%s'", r->name, (const char *)c->data);
    }
    out->text_len = (size_t)(end - out->text);
    for (size_t i = 0; i < out->text_len;) {
        const char *p = (const char *)out->text + i;
        size_t sequence = out->latin1 ? 1 : rf_utf8_sequence(p, out->text_len - i);
        if (*p == 0 || sequence == 0) {
            return rf_fail(r->err, RF_ERR_FORMAT, "%s: the text '%s' is damaged at byte %zu", r->name,
                           (const char *)c->data, i);
        }
        i += sequence;
    }
    return RF_OK;
}

/* Bytes of the UTF-8 form, with a closing zero; writes it if out is not NULL. */
static size_t utf8_form(const raw_text *t, char *out) {
    size_t n = 0;
    for (size_t i = 0; i < t->text_len; i++) {
        unsigned char c = t->text[i];
        bool wide = t->latin1 && c >= 0x80;
        if (out && wide) {
            out[n] = (char)(0xc0 | (c >> 6));
            out[n + 1] = (char)(0x80 | (c & 0x3f));
        } else if (out) {
            out[n] = (char)c;
        }
        n += wide ? 2 : 1;
    }
    if (out) out[n] = 0;
    return n + 1;
}

static bool is_text_chunk(const rf_png_chunk *c) {
    return strcmp(c->type, "tEXt") == 0 || strcmp(c->type, "zTXt") == 0 || strcmp(c->type, "iTXt") == 0;
}

/* Walks the file once. texts NULL: counts and sizes; else fills texts, strings going to pool. */
static rf_status walk(rf_png_reader *r, rf_png_text *texts, char *pool, size_t *num, size_t *pool_bytes) {
    rf_png_chunk c;
    rf_status st;
    *num = *pool_bytes = 0;
    r->at = 8;
    for (bool first = true;; first = false) {
        st = rf_png_next_chunk(r, &c);
        if (st != RF_OK) return st;
        if (first && strcmp(c.type, "IHDR") != 0) {
            return rf_fail(r->err, RF_ERR_FORMAT, "%s: the first chunk is %s, not IHDR", r->name, c.type);
        }
        if (strcmp(c.type, "IEND") == 0) return RF_OK;
        if (!is_text_chunk(&c)) continue;
        raw_text raw = {0};
        st = split_text(r, &c, &raw);
        if (st != RF_OK) return st;
        size_t text_bytes = utf8_form(&raw, NULL);
        if (texts) {
            char *keyword = pool + *pool_bytes;
            memcpy(keyword, raw.keyword, raw.keyword_len + 1);
            utf8_form(&raw, keyword + raw.keyword_len + 1);
            texts[*num] = (rf_png_text){.keyword = keyword, .text = keyword + raw.keyword_len + 1};
        }
        *pool_bytes += raw.keyword_len + 1 + text_bytes;
        (*num)++;
    }
}

rf_status rf_png_read_texts_memory(const void *bytes, size_t num_bytes, const char *name, rf_png_text **out,
                                   size_t *out_num, rf_error *err) {
    *out = NULL;
    *out_num = 0;
    rf_png_reader r = {.name = name, .bytes = bytes, .num_bytes = num_bytes, .err = err};
    size_t num, pool_bytes;
    if (num_bytes < 8 || memcmp(bytes, RF_PNG_SIGNATURE, 8) != 0)
        return rf_fail(err, RF_ERR_FORMAT, "%s: not a PNG file", name);
    rf_status st = walk(&r, NULL, NULL, &num, &pool_bytes);
    if (st != RF_OK) return st;
    rf_png_text *texts = rf_alloc(num * sizeof *texts + pool_bytes);
    if (!texts) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu texts", name, num);
    st = walk(&r, texts, (char *)(texts + num), &num, &pool_bytes);
    if (st != RF_OK) {
        rf_free(texts);
        return st;
    }
    *out = texts;
    *out_num = num;
    return RF_OK;
}

rf_status rf_png_read_texts(const char *path, rf_png_text **out, size_t *out_num, rf_error *err) {
    *out = NULL;
    *out_num = 0;
    char *bytes = NULL;
    size_t num_bytes = 0;
    rf_status st = rf_file_read(path, RF_IMAGE_MAX_FILE_BYTES, &bytes, &num_bytes, err);
    if (st != RF_OK) return st;
    st = rf_png_read_texts_memory(bytes, num_bytes, path, out, out_num, err);
    rf_free(bytes);
    return st;
}
