/* tests/core/test_image.c - pictures out and back in, their texts, hostile files, PSNR and SSIM. */
#include <zlib.h>

#include "core/file.h"
#include "core/image.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_error err;
static char dir[256], path[400];
static rf_image picture;

static void setup(void) {
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/a.png", dir);
    rf_assert_ok(rf_image_create(&picture, 37, 23, (const uint8_t[]){1, 2, 3}, &err), err);
    for (int i = 0; i < 37 * 23 * 3; i++) picture.rgb[i] = (uint8_t)(i * i / 7 + (i % 3) * 40);
}

static void teardown(void) {
    rf_image_free(&picture);
    rf_temp_dir_remove(dir);
}

START_TEST(a_png_comes_back_as_it_was) {
    rf_image back;
    rf_assert_ok(rf_image_save_png(&picture, path, NULL, 0, &err), err);
    rf_assert_ok(rf_image_load(&back, path, &err), err);
    ck_assert(back.width == 37 && back.height == 23);
    ck_assert_mem_eq(back.rgb, picture.rgb, 37 * 23 * 3);
    rf_image_free(&back);
    rf_image_free(&back);
    rf_image_free(NULL);
}
END_TEST

/* Noise does not compress, so the data passes the 64 KiB output buffer several times. */
START_TEST(a_png_of_many_chunks_comes_back) {
    rf_image noise, back;
    rf_assert_ok(rf_image_create(&noise, 401, 300, (const uint8_t[]){0, 0, 0}, &err), err);
    uint32_t x = 1;
    for (int i = 0; i < 401 * 300 * 3; i++) noise.rgb[i] = (uint8_t)((x = x * 1664525u + 1013904223u) >> 24);
    rf_assert_ok(rf_image_save_png(&noise, path, NULL, 0, &err), err);
    rf_assert_ok(rf_image_load(&back, path, &err), err);
    ck_assert_mem_eq(back.rgb, noise.rgb, 401 * 300 * 3);
    rf_image_free(&back);
    rf_image_free(&noise);
}
END_TEST

START_TEST(texts_come_back_in_utf8) {
    const rf_png_text texts[] = {
        {"parameters", "a cube\nSteps: 4"}, {"prompt", "W\xc3\xbcrfel \xf0\x9f\x8e\xb2"}, {"empty", ""}};
    rf_png_text *back;
    size_t num;
    rf_image image;
    rf_assert_ok(rf_image_save_png(&picture, path, texts, 3, &err), err);
    rf_assert_ok(rf_png_read_texts(path, &back, &num, &err), err);
    ck_assert_uint_eq(num, 3);
    for (int i = 0; i < 3; i++) {
        ck_assert_str_eq(back[i].keyword, texts[i].keyword);
        ck_assert_str_eq(back[i].text, texts[i].text);
    }
    rf_free(back);
    rf_assert_ok(rf_image_load(&image, path, &err), err);
    rf_image_free(&image);
}
END_TEST

START_TEST(the_same_picture_gives_the_same_bytes) {
    const rf_png_text text = {"k", "v"};
    char *a, *b;
    size_t na, nb;
    rf_assert_ok(rf_image_save_png(&picture, path, &text, 1, &err), err);
    rf_assert_ok(rf_file_read(path, 1 << 20, &a, &na, &err), err);
    rf_assert_ok(rf_image_save_png(&picture, path, &text, 1, &err), err);
    rf_assert_ok(rf_file_read(path, 1 << 20, &b, &nb, &err), err);
    ck_assert_uint_eq(na, nb);
    ck_assert_mem_eq(a, b, na);
    rf_free(a);
    rf_free(b);
}
END_TEST

START_TEST(bad_texts_are_refused) {
    char longest[81];
    memset(longest, 'k', 80);
    longest[80] = 0;
    const rf_png_text texts[] = {{"", "v"},     {NULL, "v"}, {longest, "v"}, {" k", "v"},
                                 {"a\nb", "v"}, {"k", NULL}, {"k", "\xff"}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        rf_assert_fails(rf_image_save_png(&picture, path, &texts[i], 1, &err), err, RF_ERR_ARGUMENT, "PNG");
        ck_assert(!rf_path_exists(path));
    }
}
END_TEST

/* ---- hostile files ---- */

static size_t put_chunk(unsigned char *out, const char *type, const void *data, size_t num) {
    for (int i = 0; i < 4; i++) out[i] = (unsigned char)(num >> (24 - 8 * i));
    memcpy(out + 4, type, 4);
    memcpy(out + 8, data, num);
    uLong crc = crc32(crc32(0, NULL, 0), out + 4, (uInt)(num + 4));
    for (int i = 0; i < 4; i++) out[8 + num + (size_t)i] = (unsigned char)(crc >> (24 - 8 * i));
    return num + 12;
}

/* A PNG of the given size with one text chunk and one IDAT. */
static size_t build_png(unsigned char *out, uint32_t width, uint32_t height, const char *type, const char *text,
                        size_t text_num, const void *idat, size_t idat_num) {
    unsigned char head[13] = {0};
    size_t n = 8;
    memcpy(out, "\x89PNG\r\n\x1a\n", 8);
    for (int i = 0; i < 4; i++) {
        head[i] = (unsigned char)(width >> (24 - 8 * i));
        head[4 + i] = (unsigned char)(height >> (24 - 8 * i));
    }
    head[8] = 8;
    head[9] = 2;
    n += put_chunk(out + n, "IHDR", head, 13);
    if (type) n += put_chunk(out + n, type, text, text_num);
    if (idat) n += put_chunk(out + n, "IDAT", idat, idat_num);
    return n + put_chunk(out + n, "IEND", "", 0);
}

static const struct {
    const char *type, *text;
    size_t num;
    rf_status status;
    const char *part;
} bad_chunks[] = {
    {"zTXt", "k\0\0x", 4, RF_ERR_UNSUPPORTED, "zTXt"},
    {"iTXt", "k\0\1\0\0\0x", 7, RF_ERR_UNSUPPORTED, "compressed (iTXt)"},
    {"iTXt", "k\0\0\0\0", 5, RF_ERR_FORMAT, "damaged iTXt"},
    {"iTXt", "k\0\0", 3, RF_ERR_FORMAT, "damaged iTXt"},
    {"iTXt", "k\0\0\0\0\0\xff", 7, RF_ERR_FORMAT, "damaged at byte 0"},
    {"tEXt", "no zero", 7, RF_ERR_FORMAT, "no keyword"},
    {"tEXt", "\0v", 2, RF_ERR_FORMAT, "no keyword"},
    {"tEXt", "", 0, RF_ERR_FORMAT, "no keyword"},
    {"tEXt", "k\0a\0b", 5, RF_ERR_FORMAT, "damaged at byte 1"},
};

START_TEST(every_bad_text_chunk_is_refused) {
    unsigned char file[256];
    rf_png_text *texts;
    size_t num, n = build_png(file, 1, 1, bad_chunks[_i].type, bad_chunks[_i].text, bad_chunks[_i].num, NULL, 0);
    rf_assert_fails(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err, bad_chunks[_i].status,
                    bad_chunks[_i].part);
    ck_assert_ptr_null(texts);
}
END_TEST

START_TEST(latin1_becomes_utf8) {
    unsigned char file[256];
    rf_png_text *texts;
    size_t num, n = build_png(file, 1, 1, "tEXt", "Author\0Andr\xe9", 12, NULL, 0);
    rf_assert_ok(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err);
    ck_assert_uint_eq(num, 1);
    ck_assert_str_eq(texts[0].text, "Andr\xc3\xa9");
    rf_free(texts);
}
END_TEST

START_TEST(damaged_pngs_are_refused) {
    unsigned char file[256];
    rf_png_text *texts;
    size_t num, n = build_png(file, 1, 1, "tEXt", "k\0v", 3, NULL, 0);
    for (size_t cut = 0; cut < n; cut++) {
        ck_assert_int_eq(rf_png_read_texts_memory(file, cut, "mem", &texts, &num, &err), RF_ERR_FORMAT);
    }
    file[45] ^= 1;
    rf_assert_fails(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err, RF_ERR_FORMAT, "has CRC");
    file[8] = 0x7f;
    rf_assert_fails(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err, RF_ERR_FORMAT, "are left");
    file[0] = 0;
    rf_assert_fails(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err, RF_ERR_FORMAT, "not a PNG");
    memcpy(file, "\x89PNG\r\n\x1a\n", 8);
    n = 8 + put_chunk(file + 8, "IEND", "", 0);
    rf_assert_fails(rf_png_read_texts_memory(file, n, "mem", &texts, &num, &err), err, RF_ERR_FORMAT, "not IHDR");
}
END_TEST

START_TEST(bad_pictures_are_refused) {
    static unsigned char file[65536], packed[32768], zeros[4000000];
    rf_image image;
    uLongf packed_num = sizeof packed;
    size_t n = build_png(file, 20000, 1, NULL, NULL, 0, "x", 1);
    ck_assert_int_eq(rf_image_load_memory(&image, file, n, "wide", &err), RF_ERR_FORMAT);
    n = build_png(file, 16, 16, NULL, NULL, 0, "garbage", 7);
    rf_assert_fails(rf_image_load_memory(&image, file, n, "junk", &err), err, RF_ERR_FORMAT, "damaged image");
    ck_assert_int_eq(compress(packed, &packed_num, zeros, sizeof zeros), Z_OK);
    n = build_png(file, 1, 1, NULL, NULL, 0, packed, packed_num);
    rf_assert_fails(rf_image_load_memory(&image, file, n, "bomb", &err), err, RF_ERR_FORMAT, "more data than 1 x 1");
    rf_assert_fails(rf_image_load_memory(&image, "GIF89a", 6, "gif", &err), err, RF_ERR_FORMAT, "not a PNG or JPEG");
    rf_assert_fails(rf_image_load_memory(&image, "", 0, "none", &err), err, RF_ERR_FORMAT, "not a PNG or JPEG");
    rf_assert_fails(rf_image_load(&image, path, &err), err, RF_ERR_MISSING, path);
    ck_assert_ptr_null(image.rgb);
}
END_TEST

/* 8 x 8 grey, baseline, every coefficient zero (tests/fuzz/make_corpus.py); the frame header is at byte 71, the first Huffman
 * table at byte 84. */
static const unsigned char jpeg[] = {
    0xff, 0xd8, 0xff, 0xdb, 0x00, 0x43, 0x00, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01,
    0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01,
    0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01,
    0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01, 0xff,
    0xc0, 0x00, 0x0b, 0x08, 0x00, 0x08, 0x00, 0x08, 0x01, 0x01, 0x11, 0x00, 0xff, 0xc4, 0x00, 0x14, 0x00, 0x01,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xc4,
    0x00, 0x14, 0x10, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0xff, 0xda, 0x00, 0x08, 0x01, 0x01, 0x00, 0x00, 0x3f, 0x00, 0x3f, 0xff, 0xd9,
};

static const struct {
    size_t at;
    uint8_t value;
    const char *part;
} bad_jpegs[] = {
    {2, 0x00, "a marker was expected"}, {4, 0xff, "longer than the file"}, {80, 0x03, "wrong length"},
    {82, 0x51, "outside 1 to 4"},       {82, 0x01, "outside 1 to 4"},      {89, 0x09, "a cut Huffman table"},
    {105, 0x10, "DC symbol above 15"},  {140, 0xda, "cut segment"},
};

START_TEST(a_jpeg_opens) {
    rf_image image;
    rf_assert_ok(rf_image_load_memory(&image, jpeg, sizeof jpeg, "jpeg", &err), err);
    ck_assert(image.width == 8 && image.height == 8);
    for (int i = 0; i < 8 * 8 * 3; i++) ck_assert_uint_eq(image.rgb[i], 128);
    rf_image_free(&image);
}
END_TEST

START_TEST(every_bad_jpeg_is_refused) {
    unsigned char file[sizeof jpeg];
    rf_image image;
    memcpy(file, jpeg, sizeof jpeg);
    file[bad_jpegs[_i].at] = bad_jpegs[_i].value;
    rf_assert_fails(rf_image_load_memory(&image, file, sizeof file, "jpeg", &err), err, RF_ERR_FORMAT,
                    bad_jpegs[_i].part);
}
END_TEST

START_TEST(jpeg_tables_and_ratios_that_overrun_are_refused) {
    unsigned char file[1024] = {0xff, 0xd8, 0xff, 0xc4, 0x02, 0x02}; /* 512 bytes of tables */
    rf_image image;
    file[7] = file[8] = 200;
    rf_assert_fails(rf_image_load_memory(&image, file, sizeof file, "jpeg", &err), err, RF_ERR_FORMAT,
                    "more than 256 codes");
    const unsigned char frame[] = {0xff, 0xd8, 0xff, 0xc0, 0, 17, 8, 0, 8, 0, 8, 3, 1, 0x31, 0, 2, 0x21, 0, 3, 0x11, 0};
    rf_assert_fails(rf_image_load_memory(&image, frame, sizeof frame, "jpeg", &err), err, RF_ERR_FORMAT,
                    "no whole ratio");
}
END_TEST

START_TEST(no_cut_of_a_jpeg_opens) {
    rf_image image;
    for (size_t n = 0; n < sizeof jpeg; n++) {
        ck_assert_int_eq(rf_image_load_memory(&image, jpeg, n, "cut", &err), RF_ERR_FORMAT);
    }
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    const rf_png_text text = {"k", "v"};
    rf_image back;
    rf_png_text *texts;
    size_t num;
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1, done = 0; done < 3; n = done == 3 ? n : n + 1) {
        rf_memory_fail_nth(n);
        rf_status st = done == 0   ? rf_image_save_png(&picture, path, &text, 1, &err)
                       : done == 1 ? rf_image_load(&back, path, &err)
                                   : rf_png_read_texts(path, &texts, &num, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) {
            if (done == 1) rf_image_free(&back);
            if (done == 2) rf_free(texts);
            ck_assert_uint_ge(n, 2);
            done++;
            n = 0;
            continue;
        }
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        ck_assert(done > 0 || !rf_path_exists(path));
    }
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
}
END_TEST

/* ---- pixels ---- */

START_TEST(planar_floats_round_half_to_even) {
    /* (x/2 + 1/2) * 255 = 0.5, 1.5, 2.5 and the ends */
    const float planar[] = {-1 + 1 / 255.0f, -1 + 3 / 255.0f, -2, 2, NAN,  1,    0, 0, 0, 0, 0, 0,
                            INFINITY,        -INFINITY,       -1, 1, 0.5f, -0.5f};
    rf_image image;
    rf_assert_ok(rf_image_from_planar(&image, planar, 6, 1, &err), err);
    ck_assert_uint_le(image.rgb[0], 1);
    ck_assert_uint_eq(image.rgb[6], 0);
    ck_assert_uint_eq(image.rgb[9], 255);
    ck_assert_uint_eq(image.rgb[12], 0);
    ck_assert_uint_eq(image.rgb[15], 255);
    ck_assert_uint_eq(image.rgb[1], 128); /* 127.5 to even */
    ck_assert_uint_eq(image.rgb[2], 255);
    ck_assert_uint_eq(image.rgb[5], 0);
    ck_assert_uint_eq(image.rgb[14], 191); /* 191.25 */
    rf_image_free(&image);
    rf_assert_fails(rf_image_from_planar(&image, planar, 0, 1, &err), err, RF_ERR_ARGUMENT, "0 x 1");
    rf_assert_fails(rf_image_create(&image, 1, 16385, (const uint8_t[]){0, 0, 0}, &err), err, RF_ERR_ARGUMENT, "16385");
}
END_TEST

START_TEST(blit_cuts_what_falls_outside) {
    rf_image dst, src;
    rf_image_create(&dst, 4, 4, (const uint8_t[]){0, 0, 0}, &err);
    rf_image_create(&src, 3, 3, (const uint8_t[]){9, 9, 9}, &err);
    const int at[][3] = {{-1, -2, 2}, {3, 3, 1}, {1, 1, 9}, {4, 0, 0}, {INT32_MIN, 0, 0}, {INT32_MAX, INT32_MAX, 0}};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        int num = 0;
        memset(dst.rgb, 0, 48);
        rf_image_blit(&dst, &src, at[i][0], at[i][1]);
        for (int k = 0; k < 16; k++) num += dst.rgb[3 * k] == 9;
        ck_assert_int_eq(num, at[i][2]);
    }
    rf_image_free(&dst);
    rf_image_free(&src);
}
END_TEST

START_TEST(text_is_drawn_inside_the_picture_only) {
    rf_image a, b;
    const uint8_t white[3] = {255, 255, 255};
    rf_image_create(&a, 12, 8, (const uint8_t[]){0, 0, 0}, &err);
    rf_image_create(&b, 12, 8, (const uint8_t[]){0, 0, 0}, &err);
    rf_image_draw_text(&a, 0, 0, 1, white, "I");
    const char *rows[7] = {".###.", "..#..", "..#..", "..#..", "..#..", "..#..", ".###."};
    for (int y = 0; y < 7; y++) {
        for (int x = 0; x < 5; x++) ck_assert_int_eq(a.rgb[3 * (y * 12 + x)] == 255, rows[y][x] == '#');
    }
    rf_image_draw_text(&a, 6, 0, 1, white, "\xc3");
    rf_image_draw_text(&b, 0, 0, 1, white, "I?");
    ck_assert_mem_eq(a.rgb, b.rgb, 12 * 8 * 3);
    rf_image_draw_text(&a, -4, -4, 3, white, "A\nlong line of ~ text\n\n!");
    rf_image_draw_text(&a, INT32_MAX, INT32_MAX, INT32_MAX, white, "##");
    rf_image_draw_text(&a, INT32_MIN, 0, 1, white, "##");
    rf_image_free(&a);
    rf_image_free(&b);
}
END_TEST

START_TEST(equal_pictures_compare_as_equal) {
    double psnr, ssim;
    int max_abs;
    rf_assert_ok(rf_image_compare(&picture, &picture, &psnr, &ssim, &max_abs, &err), err);
    ck_assert(isinf(psnr) && psnr > 0);
    ck_assert_double_eq_tol(ssim, 1, 1e-12);
    ck_assert_int_eq(max_abs, 0);
}
END_TEST

/* Two flat greys: SSIM is its luminance term (2ab + C1) / (a^2 + b^2 + C1), PSNR 20 log10(255 / |a - b|). */
START_TEST(flat_pictures_follow_the_formula) {
    rf_image a, b;
    double psnr, ssim;
    int max_abs;
    rf_image_create(&a, 16, 12, (const uint8_t[]){100, 100, 100}, &err);
    rf_image_create(&b, 16, 12, (const uint8_t[]){120, 120, 120}, &err);
    rf_assert_ok(rf_image_compare(&a, &b, &psnr, &ssim, &max_abs, &err), err);
    double c1 = 2.55 * 2.55;
    ck_assert_double_eq_tol(psnr, 20 * log10(255.0 / 20), 1e-9);
    ck_assert_double_eq_tol(ssim, (2 * 100 * 120 + c1) / (100 * 100 + 120 * 120 + c1), 1e-9);
    ck_assert_int_eq(max_abs, 20);
    rf_image_free(&a);
    rf_image_free(&b);
}
END_TEST

START_TEST(sizes_that_cannot_be_compared_are_refused) {
    rf_image small, other;
    double psnr, ssim;
    rf_image_create(&small, 10, 20, (const uint8_t[]){0, 0, 0}, &err);
    rf_image_create(&other, 20, 10, (const uint8_t[]){0, 0, 0}, &err);
    rf_assert_fails(rf_image_compare(&small, &other, &psnr, NULL, NULL, &err), err, RF_ERR_SHAPE,
                    "10 x 20 and 20 x 10");
    rf_assert_fails(rf_image_compare(&small, &small, &psnr, &ssim, NULL, &err), err, RF_ERR_SHAPE, "at least 11 x 11");
    rf_assert_ok(rf_image_compare(&small, &small, &psnr, NULL, NULL, &err), err);
    rf_image_free(&small);
    rf_image_free(&other);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("image");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, a_png_comes_back_as_it_was);
    tcase_add_test(tc, a_png_of_many_chunks_comes_back);
    tcase_add_test(tc, texts_come_back_in_utf8);
    tcase_add_test(tc, the_same_picture_gives_the_same_bytes);
    tcase_add_test(tc, bad_texts_are_refused);
    tcase_add_loop_test(tc, every_bad_text_chunk_is_refused, 0, sizeof bad_chunks / sizeof *bad_chunks);
    tcase_add_test(tc, latin1_becomes_utf8);
    tcase_add_test(tc, damaged_pngs_are_refused);
    tcase_add_test(tc, bad_pictures_are_refused);
    tcase_add_test(tc, a_jpeg_opens);
    tcase_add_loop_test(tc, every_bad_jpeg_is_refused, 0, sizeof bad_jpegs / sizeof *bad_jpegs);
    tcase_add_test(tc, jpeg_tables_and_ratios_that_overrun_are_refused);
    tcase_add_test(tc, no_cut_of_a_jpeg_opens);
    tcase_add_test(tc, every_failed_allocation_is_survived);
    tcase_add_test(tc, planar_floats_round_half_to_even);
    tcase_add_test(tc, blit_cuts_what_falls_outside);
    tcase_add_test(tc, text_is_drawn_inside_the_picture_only);
    tcase_add_test(tc, equal_pictures_compare_as_equal);
    tcase_add_test(tc, flat_pictures_follow_the_formula);
    tcase_add_test(tc, sizes_that_cannot_be_compared_are_refused);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
