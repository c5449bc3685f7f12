/* tests/core/test_video.c - frames out as animated PNG, MP4 and single PNGs and back in, hostile files, resizing. */
#include <dirent.h>
#include <sys/stat.h>
#include <zlib.h>

#include "core/file.h"
#include "core/image_internal.h"
#include "core/memory.h"
#include "core/video.h"
#include "core/video_internal.h"
#include "tests/test_util.h"

static rf_error err;
static char dir[256], path[400];

static void setup(void) {
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
}

static void teardown(void) {
    rf_temp_dir_remove(dir);
}

static const char *in_dir(const char *name) {
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static int files_in_dir(void) {
    DIR *d = opendir(dir);
    int num = 0;
    for (const struct dirent *e; (e = readdir(d));) num += e->d_name[0] != '.';
    closedir(d);
    return num;
}

static bool have_mp4(void) {
    rf_video_format format;
    return rf_video_format_of("x.mp4", &format, NULL) == RF_OK;
}

/* Frame t of a smooth picture with a square that moves; every third frame repeats the one before. */
static void paint(uint8_t *rgb, int width, int height, int t) {
    const int step = t - t / 3;
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++, rgb += 3) {
            const bool inside = x >= 4 + 2 * step && x < 12 + 2 * step && y >= 20 && y < 28;
            rgb[0] = (uint8_t)(x * 200 / width);
            rgb[1] = (uint8_t)(y * 200 / height);
            rgb[2] = inside ? 220 : 90;
        }
    }
}

static rf_status write_video(const char *name, int width, int height, int num, int scale, rf_video_writer **keep) {
    rf_video_writer *w = NULL;
    const rf_png_text texts[] = {{"prompt", "W\xc3\xbcrfel"}, {"seed", "7"}};
    const rf_video_options options = {
        .width = width, .height = height, .fps = 20, .scale = scale, .texts = texts, .num_texts = 2};
    RF_TRY(rf_video_writer_open(&w, name, &options, &err));
    uint8_t *rgb = malloc((size_t)width * (size_t)height * 3);
    rf_status st = RF_OK;
    for (int t = 0; t < num && st == RF_OK; t++) {
        paint(rgb, width, height, t);
        st = rf_video_writer_add(w, rgb, &err);
    }
    free(rgb);
    if (st != RF_OK) {
        rf_video_writer_discard(w);
        return st;
    }
    if (keep)
        *keep = w;
    else
        st = rf_video_writer_commit(w, &err);
    return st;
}

static void assert_frames(const rf_image *frames, int num, int width, int height) {
    const size_t bytes = (size_t)width * (size_t)height * 3;
    uint8_t *rgb = malloc(bytes);
    for (int t = 0; t < num; t++) {
        ck_assert(frames[t].width == width && frames[t].height == height);
        paint(rgb, width, height, t);
        ck_assert_msg(memcmp(frames[t].rgb, rgb, bytes) == 0, "frame %d of %d x %d", t, width, height);
    }
    free(rgb);
}

/* ---- names ---- */

static const struct {
    const char *name;
    rf_status status;
    rf_video_format format;
    const char *part;
} names[] = {
    {"a.png", RF_OK, RF_VIDEO_APNG, ""},
    {"a.APNG", RF_OK, RF_VIDEO_APNG, ""},
    {"50%d/a.png", RF_OK, RF_VIDEO_APNG, ""},
    {"f/%d.png", RF_OK, RF_VIDEO_FRAMES, ""},
    {"f/a%04d.PNG", RF_OK, RF_VIDEO_FRAMES, ""},
    {"f/100%%-%09d.png", RF_OK, RF_VIDEO_FRAMES, ""},
    {"f/%s.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%s' is not %d"},
    {"f/%n.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%n' is not %d"},
    {"f/%*d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%*' is not %d"},
    {"f/%4d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%4' is not %d"},
    {"f/%0d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%0d' is not %d"},
    {"f/%00d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%00' is not %d"},
    {"f/%012d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%012' is not %d"},
    {"f/%ld.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%l' is not %d"},
    {"f/%d%d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "exactly one %d"},
    {"f/%%d.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "found none"},
    {"%.png", RF_ERR_ARGUMENT, RF_VIDEO_FRAMES, "'%.' is not"},
    {"a.webm", RF_ERR_ARGUMENT, RF_VIDEO_APNG, "x.mp4"},
    {".png", RF_ERR_ARGUMENT, RF_VIDEO_APNG, "x.mp4"},
    {"png", RF_ERR_ARGUMENT, RF_VIDEO_APNG, "x.mp4"},
    {"", RF_ERR_ARGUMENT, RF_VIDEO_APNG, "x.mp4"},
    {"a.png/", RF_ERR_ARGUMENT, RF_VIDEO_APNG, "x.mp4"},
};

START_TEST(a_name_states_the_format) {
    rf_video_format format;
    if (names[_i].status == RF_OK) {
        rf_assert_ok(rf_video_format_of(names[_i].name, &format, &err), err);
        ck_assert_int_eq(format, names[_i].format);
    } else {
        rf_assert_fails(rf_video_format_of(names[_i].name, &format, &err), err, names[_i].status, names[_i].part);
    }
}
END_TEST

START_TEST(bad_options_are_refused_before_anything_is_written) {
    static const rf_png_text empty_keyword = {"", "x"};
    static const rf_video_options bad[] = {
        {.width = 8, .height = 8, .fps = 0},
        {.width = 8, .height = 8, .fps = NAN},
        {.width = 8, .height = 8, .fps = 1e6},
        {.width = 0, .height = 8, .fps = 20},
        {.width = 8, .height = -1, .fps = 20},
        {.width = 8, .height = 8, .fps = 20, .scale = -1},
        {.width = 8, .height = 8, .fps = 20, .scale = 65},
        {.width = 16384, .height = 8, .fps = 20, .scale = 2},
        {.width = 8, .height = 8, .fps = 20, .texts = &empty_keyword, .num_texts = 1},
    };
    rf_video_writer *w;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ck_assert_int_eq(rf_video_writer_open(&w, in_dir("a.png"), &bad[i], &err), RF_ERR_ARGUMENT);
        ck_assert_ptr_null(w);
    }
    const rf_video_options good = {.width = 8, .height = 8, .fps = 20};
    rf_assert_fails(rf_video_writer_open(&w, in_dir("none/%d.png"), &good, &err), err, RF_ERR_MISSING, "mkdir -p ");
    rf_assert_fails(rf_video_writer_open(&w, in_dir("none/a.png"), &good, &err), err, RF_ERR_MISSING, "mkdir -p ");
    ck_assert_int_eq(mkdir(in_dir("b.png"), 0777), 0);
    rf_assert_fails(rf_video_writer_open(&w, path, &good, &err), err, RF_ERR_IO, "is a folder");
    rf_assert_fails(rf_video_writer_open(&w, "/dev/null/a.png", &good, &err), err, RF_ERR_MISSING, "no folder");
    ck_assert_int_eq(files_in_dir(), 1);
}
END_TEST

START_TEST(fps_becomes_a_fraction) {
    static const struct {
        double fps;
        int num, den;
    } cases[] = {{20, 20, 1},     {29.97, 2997, 100}, {24000 / 1001.0, 24000, 1001}, {0.01, 1, 100}, {12.5, 25, 2},
                 {1000, 1000, 1}, {1 / 3.0, 1, 3}};
    int num, den;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_video_fps_fraction(cases[i].fps, 60000, &num, &den);
        ck_assert_msg(num == cases[i].num && den == cases[i].den, "%g is %d/%d", cases[i].fps, num, den);
    }
    for (int i = 0; i <= 800; i++) {
        const double fps = 0.01 * pow(1e5, i / 800.0);
        rf_video_fps_fraction(fps, 60000, &num, &den);
        ck_assert(num >= 1 && den >= 1 && num <= 60000 && den <= 60000);
        ck_assert(fabs((double)num / den - fps) <= 1e-3 * fps);
    }
}
END_TEST

/* ---- animated PNG ---- */

static const struct {
    int width, height, num;
} sizes[] = {{1, 1, 4}, {65, 63, 9}, {2, 1, 3}, {64, 64, 1}, {300, 200, 4}};

START_TEST(an_animated_png_comes_back_bit_by_bit) {
    const int width = sizes[_i].width, height = sizes[_i].height, num = sizes[_i].num;
    rf_image *frames;
    rf_image first;
    int num_read;
    rf_assert_ok(write_video(in_dir("a.png"), width, height, num, 0, NULL), err);
    ck_assert_int_eq(files_in_dir(), 1);
    rf_assert_ok(rf_video_read(path, 1000, &frames, &num_read, &err), err);
    ck_assert_int_eq(num_read, num);
    assert_frames(frames, num, width, height);
    rf_video_frames_free(frames, num_read);
    /* A plain PNG reader sees the first frame, and the settings. */
    rf_png_text *texts;
    size_t num_texts;
    rf_assert_ok(rf_image_load(&first, path, &err), err);
    assert_frames(&first, 1, width, height);
    rf_image_free(&first);
    rf_assert_ok(rf_png_read_texts(path, &texts, &num_texts, &err), err);
    ck_assert_uint_eq(num_texts, 2);
    ck_assert_str_eq(texts[0].text, "W\xc3\xbcrfel");
    rf_free(texts);
    /* The first frames only. */
    rf_assert_ok(rf_video_read(path, 1, &frames, &num_read, &err), err);
    ck_assert_int_eq(num_read, 1);
    assert_frames(frames, 1, width, height);
    rf_video_frames_free(frames, num_read);
}
END_TEST

/* Noise passes the 64 KiB of one chunk in each frame. */
START_TEST(frames_of_many_chunks_come_back) {
    enum { WIDTH = 251, HEIGHT = 203, NUM = 3, BYTES = WIDTH * HEIGHT * 3 };
    const rf_video_options options = {.width = WIDTH, .height = HEIGHT, .fps = 29.97};
    uint8_t *rgb = malloc((size_t)NUM * BYTES);
    uint32_t x = 1;
    for (int i = 0; i < NUM * BYTES; i++) rgb[i] = (uint8_t)((x = x * 1664525u + 1013904223u) >> 24);
    rf_video_writer *w;
    rf_assert_ok(rf_video_writer_open(&w, in_dir("a.apng"), &options, &err), err);
    ck_assert_str_eq(rf_video_writer_codec(w), "animated PNG");
    for (int t = 0; t < NUM; t++) rf_assert_ok(rf_video_writer_add(w, rgb + (ptrdiff_t)t * BYTES, &err), err);
    rf_assert_ok(rf_video_writer_commit(w, &err), err);
    rf_image *frames;
    int num;
    rf_assert_ok(rf_video_read(path, NUM, &frames, &num, &err), err);
    ck_assert_int_eq(num, NUM);
    for (int t = 0; t < NUM; t++) ck_assert_mem_eq(frames[t].rgb, rgb + (ptrdiff_t)t * BYTES, BYTES);
    rf_video_frames_free(frames, num);
    free(rgb);
}
END_TEST

START_TEST(equal_frames_cost_next_to_nothing) {
    struct stat one, many;
    uint8_t *rgb = malloc(64 * 64 * 3);
    paint(rgb, 64, 64, 0);
    for (int k = 0; k < 2; k++) {
        const rf_video_options options = {.width = 64, .height = 64, .fps = 20};
        rf_video_writer *w;
        rf_assert_ok(rf_video_writer_open(&w, in_dir("a.png"), &options, &err), err);
        for (int t = 0; t < (k ? 11 : 1); t++) rf_assert_ok(rf_video_writer_add(w, rgb, &err), err);
        rf_assert_ok(rf_video_writer_commit(w, &err), err);
        ck_assert_int_eq(stat(path, k ? &many : &one), 0);
    }
    ck_assert_int_lt(many.st_size - one.st_size, 10 * 80);
    rf_image *frames;
    int num;
    rf_assert_ok(rf_video_read(path, 100, &frames, &num, &err), err);
    ck_assert_int_eq(num, 11);
    for (int t = 0; t < num; t++) ck_assert_mem_eq(frames[t].rgb, rgb, 64 * 64 * 3);
    rf_video_frames_free(frames, num);
    free(rgb);
}
END_TEST

START_TEST(memory_does_not_grow_with_frames) {
    const rf_video_options options = {.width = 16, .height = 16, .fps = 20};
    uint8_t rgb[16 * 16 * 3];
    rf_video_writer *w;
    rf_assert_ok(rf_video_writer_open(&w, in_dir("a.png"), &options, &err), err);
    const rf_memory_counts before = rf_memory_get_counts();
    for (int t = 0; t < 2000; t++) {
        memset(rgb, t, sizeof rgb);
        rf_assert_ok(rf_video_writer_add(w, rgb, &err), err);
    }
    ck_assert_uint_eq(rf_memory_get_counts().num_allocs, before.num_allocs);
    rf_assert_ok(rf_video_writer_commit(w, &err), err);
}
END_TEST

START_TEST(scale_repeats_pixels) {
    rf_image *frames;
    int num;
    uint8_t rgb[5 * 3 * 3];
    paint(rgb, 5, 3, 0);
    rf_assert_ok(write_video(in_dir("a.png"), 5, 3, 2, 4, NULL), err);
    rf_assert_ok(rf_video_read(path, 9, &frames, &num, &err), err);
    ck_assert(num == 2 && frames[0].width == 20 && frames[0].height == 12);
    for (int y = 0; y < 12; y++) {
        for (int x = 0; x < 20; x++) {
            ck_assert_mem_eq(frames[0].rgb + (y * 20 + x) * 3, rgb + (y / 4 * 5 + x / 4) * 3, 3);
        }
    }
    rf_video_frames_free(frames, num);
}
END_TEST

/* ---- complete or not there ---- */

static const char *const kinds[] = {"a.png", "f%03d.png", "a.mp4"};

START_TEST(a_discarded_video_leaves_nothing) {
    rf_video_writer *w = NULL;
    if (strcmp(kinds[_i], "a.mp4") == 0 && !have_mp4()) return;
    rf_assert_ok(write_video(in_dir(kinds[_i]), 32, 32, 3, 0, &w), err);
    ck_assert(!rf_path_exists(in_dir("a.png")) && !rf_path_exists(in_dir("f000.png")) &&
              !rf_path_exists(in_dir("a.mp4")));
    ck_assert_int_ge(files_in_dir(), 1);
    rf_video_writer_discard(w);
    rf_video_writer_discard(NULL);
    ck_assert_int_eq(files_in_dir(), 0);
    rf_assert_fails(write_video(in_dir(kinds[_i]), 32, 32, 0, 0, NULL), err, RF_ERR_STATE, "no frame");
    ck_assert_int_eq(files_in_dir(), 0);
}
END_TEST

START_TEST(frames_get_their_numbers_and_texts) {
    rf_image image;
    rf_png_text *texts;
    size_t num_texts;
    rf_assert_ok(write_video(in_dir("f%03d-%%.png"), 33, 31, 3, 0, NULL), err);
    ck_assert_int_eq(files_in_dir(), 3);
    rf_assert_ok(rf_image_load(&image, in_dir("f002-%.png"), &err), err);
    uint8_t rgb[33 * 31 * 3];
    paint(rgb, 33, 31, 2);
    ck_assert_mem_eq(image.rgb, rgb, sizeof rgb);
    rf_image_free(&image);
    rf_assert_ok(rf_png_read_texts(path, &texts, &num_texts, &err), err);
    ck_assert_uint_eq(num_texts, 2);
    rf_free(texts);
    rf_image *frames;
    int num;
    rf_assert_ok(rf_video_read(path, 5, &frames, &num, &err), err);
    ck_assert_int_eq(num, 1);
    rf_video_frames_free(frames, num);
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    if (strcmp(kinds[_i], "a.mp4") == 0 && !have_mp4()) return;
    char name[400];
    snprintf(name, sizeof name, "%s", in_dir(kinds[_i]));
    const char *read_name = strchr(kinds[_i], '%') ? "f000.png" : kinds[_i];
    const uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1;; n++) {
        rf_memory_fail_nth(n);
        rf_status st = write_video(name, 32, 32, 2, 2, NULL);
        rf_memory_fail_nth(0);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) {
            ck_assert_uint_ge(n, 3);
            break;
        }
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
        ck_assert_int_eq(files_in_dir(), 0);
    }
    for (uint64_t n = 1;; n++) {
        rf_image *frames = NULL;
        int num = 0;
        rf_memory_fail_nth(n);
        rf_status st = rf_video_read(in_dir(read_name), 9, &frames, &num, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) {
            rf_video_frames_free(frames, num);
            ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
            break;
        }
        ck_assert_ptr_null(frames);
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
}
END_TEST

/* A folder stands where the third frame should go. */
START_TEST(a_failed_frame_leaves_nothing) {
    rf_video_writer *w = NULL;
    uint8_t rgb[32 * 32 * 3] = {0};
    rf_assert_ok(write_video(in_dir("%d.png"), 32, 32, 2, 0, &w), err);
    ck_assert_int_eq(mkdir(in_dir("2.png.part"), 0777), 0); /* in the way of the third */
    ck_assert_int_eq(rf_video_writer_add(w, rgb, &err), RF_ERR_IO);
    rf_assert_fails(rf_video_writer_add(w, rgb, &err), err, RF_ERR_STATE, "earlier frame");
    rf_assert_fails(rf_video_writer_commit(w, &err), err, RF_ERR_STATE, "no video");
    ck_assert_int_eq(files_in_dir(), 1);
}
END_TEST

/* ---- hostile animated PNGs ---- */

static rf_status read_memory(const unsigned char *bytes, size_t num_bytes, int max, rf_image **out, int *num) {
    rf_video_frames frames = {.name = "mem", .max = max};
    rf_status st = rf_apng_read(&frames, bytes, num_bytes, &err);
    *out = frames.images;
    *num = frames.num;
    return st;
}

static size_t put_chunk(unsigned char *out, const char *type, const void *data, size_t num) {
    rf_png_put_u32(out, (uint32_t)num);
    memcpy(out + 4, type, 4);
    memcpy(out + 8, data, num);
    rf_png_put_u32(out + 8 + num, (uint32_t)crc32(crc32(0, NULL, 0), out + 4, (uInt)(num + 4)));
    return num + 12;
}

/* A file in the making. */
typedef struct {
    unsigned char bytes[4096];
    size_t num;
    uint32_t sequence;
    size_t pixel_bytes;
} builder;

static void start(builder *b, int width, int height, int colour, uint32_t num_frames) {
    unsigned char head[13] = {0}, control[8] = {0};
    *b = (builder){.num = 8, .pixel_bytes = colour == 6 ? 4 : 3};
    memcpy(b->bytes, RF_PNG_SIGNATURE, 8);
    rf_png_put_u32(head, (uint32_t)width);
    rf_png_put_u32(head + 4, (uint32_t)height);
    head[8] = 8;
    head[9] = (unsigned char)colour;
    rf_png_put_u32(control, num_frames);
    b->num += put_chunk(b->bytes + b->num, "IHDR", head, sizeof head);
    b->num += put_chunk(b->bytes + b->num, "acTL", control, sizeof control);
}

static void add_control(builder *b, int x, int y, int width, int height, int dispose, int blend) {
    unsigned char c[26] = {0};
    rf_png_put_u32(c, b->sequence++);
    rf_png_put_u32(c + 4, (uint32_t)width);
    rf_png_put_u32(c + 8, (uint32_t)height);
    rf_png_put_u32(c + 12, (uint32_t)x);
    rf_png_put_u32(c + 16, (uint32_t)y);
    c[24] = (unsigned char)dispose;
    c[25] = (unsigned char)blend;
    b->num += put_chunk(b->bytes + b->num, "fcTL", c, sizeof c);
}

/* Pixels of one colour, every row unfiltered. */
static void add_data(builder *b, bool first, int width, int height, const uint8_t *pixel) {
    unsigned char raw[1024], data[1024];
    size_t n = 0;
    for (int y = 0; y < height; y++) {
        raw[n++] = 0;
        for (int x = 0; x < width; x++, n += b->pixel_bytes) memcpy(raw + n, pixel, b->pixel_bytes);
    }
    uLongf num = sizeof data - 4;
    ck_assert_int_eq(compress(data + 4, &num, raw, n), Z_OK);
    if (!first) rf_png_put_u32(data, b->sequence++);
    b->num += put_chunk(b->bytes + b->num, first ? "IDAT" : "fdAT", first ? data + 4 : data, num + (first ? 0 : 4));
}

static void finish(builder *b) {
    b->num += put_chunk(b->bytes + b->num, "IEND", "", 0);
}

/* Frames on 4 x 1 pixels: disposal and blending as in the specification. */
START_TEST(disposal_and_blending_follow_the_specification) {
    static const uint8_t red[4] = {200, 0, 0, 255}, green[4] = {0, 100, 0, 255}, half[4] = {0, 0, 255, 128},
                         clear[4] = {9, 9, 9, 0};
    builder b;
    rf_image *f;
    int num;
    start(&b, 4, 1, 6, 6);
    add_control(&b, 0, 0, 4, 1, 0, 0); /* 0: all red */
    add_data(&b, true, 4, 1, red);
    add_control(&b, 1, 0, 1, 1, 2, 0); /* 1: R G R R, then what was before */
    add_data(&b, false, 1, 1, green);
    add_control(&b, 2, 0, 2, 1, 1, 0); /* 2: R R G G, then nothing where G was */
    add_data(&b, false, 2, 1, green);
    add_control(&b, 0, 0, 1, 1, 0, 1); /* 3: blue at half over red */
    add_data(&b, false, 1, 1, half);
    add_control(&b, 3, 0, 1, 1, 0, 1); /* 4: blue at half over nothing */
    add_data(&b, false, 1, 1, half);
    add_control(&b, 1, 0, 1, 1, 0, 0); /* 5: clear replaces */
    add_data(&b, false, 1, 1, clear);
    finish(&b);
    rf_assert_ok(read_memory(b.bytes, b.num, 99, &f, &num), err);
    ck_assert_int_eq(num, 6);
    static const uint8_t want[6][12] = {
        {200, 0, 0, 200, 0, 0, 200, 0, 0, 200, 0, 0}, {200, 0, 0, 0, 100, 0, 200, 0, 0, 200, 0, 0},
        {200, 0, 0, 200, 0, 0, 0, 100, 0, 0, 100, 0}, {99, 0, 128, 200, 0, 0, 0, 0, 0, 0, 0, 0},
        {99, 0, 128, 200, 0, 0, 0, 0, 0, 0, 0, 128},  {99, 0, 128, 0, 0, 0, 0, 0, 0, 0, 0, 128},
    };
    for (int t = 0; t < 6; t++) {
        for (int i = 0; i < 12; i++) {
            ck_assert_msg(f[t].rgb[i] == want[t][i], "frame %d byte %d: %d, not %d", t, i, f[t].rgb[i], want[t][i]);
        }
    }
    rf_video_frames_free(f, num);
}
END_TEST

START_TEST(a_default_picture_need_not_be_a_frame) {
    static const uint8_t red[3] = {200, 0, 0}, green[3] = {0, 100, 0};
    builder b;
    rf_image *f;
    int num;
    start(&b, 2, 2, 2, 1);
    add_data(&b, true, 2, 2, red);
    add_control(&b, 1, 1, 1, 1, 0, 0);
    add_data(&b, false, 1, 1, green);
    finish(&b);
    rf_assert_ok(read_memory(b.bytes, b.num, 99, &f, &num), err);
    ck_assert_int_eq(num, 1);
    ck_assert_mem_eq(f[0].rgb, ((uint8_t[]){0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 0}), 12);
    rf_video_frames_free(f, num);
}
END_TEST

/* Breaks one thing of a good file of 2 x 2 pixels and two frames. */
static rf_status read_broken(int what) {
    static const uint8_t grey[4] = {50, 60, 70, 255};
    builder b;
    rf_image *f = NULL;
    int num = 0;
    start(&b, 2, 2, what == 0 ? 3 : what == 1 ? 4 : 2, what == 2 ? 0 : what == 3 ? 3 : 2);
    if (what == 4) b.num += put_chunk(b.bytes + b.num, "acTL", "\0\0\0\1\0\0\0\0", 8);
    if (what == 5) b.num += put_chunk(b.bytes + b.num, "tRNS", "\0\1\0\1\0\1", 6);
    if (what == 6) add_data(&b, false, 2, 2, grey);
    add_control(&b, 0, 0, what == 7 ? 1 : 2, 2, 0, 0);
    if (what == 8) add_data(&b, false, 2, 2, grey);
    add_data(&b, true, 2, what == 9 ? 1 : what == 10 ? 3 : 2, grey);
    if (what == 11) b.sequence++;
    if (what == 12) add_data(&b, false, 1, 1, grey);
    add_control(&b,
                what == 13   ? 2
                : what == 14 ? -1
                             : 1,
                0,
                what == 15   ? 0
                : what == 16 ? INT32_MIN
                             : 1,
                1, what == 17 ? 3 : 0, what == 18 ? 2 : 0);
    if (what == 19) b.sequence--;
    if (what == 20) add_data(&b, true, 1, 1, grey);
    if (what != 21) add_data(&b, false, 1, 1, grey);
    if (what == 22) add_data(&b, false, 1, 1, grey);
    if (what == 23) b.num += put_chunk(b.bytes + b.num, "fdAT", "\0\0", 2);
    if (what == 24) b.num += put_chunk(b.bytes + b.num, "fcTL", "\0\0", 2);
    if (what != 25) finish(&b);
    rf_status st = read_memory(b.bytes, b.num, 99, &f, &num);
    rf_video_frames_free(f, num);
    return st;
}

static const struct {
    int what;
    rf_status status;
    const char *part;
} broken[] = {
    {0, RF_ERR_UNSUPPORTED, "palette"},
    {1, RF_ERR_UNSUPPORTED, "grey and alpha"},
    {2, RF_ERR_FORMAT, "states no frames"},
    {3, RF_ERR_FORMAT, "acTL states 3 frames, found 2"},
    {4, RF_ERR_FORMAT, "second or damaged acTL"},
    {5, RF_ERR_UNSUPPORTED, "tRNS"},
    {6, RF_ERR_FORMAT, "fdAT outside of a frame"},
    {7, RF_ERR_FORMAT, "must fill the canvas"},
    {8, RF_ERR_FORMAT, "fdAT outside of a frame"},
    {9, RF_ERR_FORMAT, "frame 0: its data end before its last row"},
    {10, RF_ERR_FORMAT, "more data"},
    {11, RF_ERR_FORMAT, "fcTL is out of sequence"},
    {12, RF_ERR_FORMAT, "frame 0: data behind the end"},
    {13, RF_ERR_FORMAT, "frame 1: 1 x 1 at (2, 0) is not inside 2 x 2"},
    {14, RF_ERR_FORMAT, "is not inside"},
    {15, RF_ERR_FORMAT, "is not inside"},
    {16, RF_ERR_FORMAT, "is not inside"},
    {17, RF_ERR_FORMAT, "disposal"},
    {18, RF_ERR_FORMAT, "blending"},
    {19, RF_ERR_FORMAT, "fdAT is out of sequence"},
    {20, RF_ERR_FORMAT, "IDAT behind"},
    {21, RF_ERR_FORMAT, "frame 1: its data end before its last row"},
    {22, RF_ERR_FORMAT, "frame 1: data behind the end"},
    {23, RF_ERR_FORMAT, "fdAT is out of sequence"},
    {24, RF_ERR_FORMAT, "26 bytes"},
    {25, RF_ERR_FORMAT, "ends before IEND"},
    {26, RF_OK, ""},
};

START_TEST(every_broken_animation_is_refused) {
    const uint64_t live = rf_memory_get_counts().num_live;
    if (broken[_i].status == RF_OK)
        rf_assert_ok(read_broken(broken[_i].what), err);
    else
        rf_assert_fails(read_broken(broken[_i].what), err, broken[_i].status, broken[_i].part);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
}
END_TEST

static void repair_crcs(unsigned char *p, size_t size) {
    for (size_t at = 8; size - at >= 12 && at < size;) {
        size_t len = rf_png_get_u32(p + at);
        if (len > size - at - 12) return;
        rf_png_put_u32(p + at + 8 + len, (uint32_t)crc32_z(crc32(0, NULL, 0), p + at + 4, len + 4));
        at += 12 + len;
    }
}

/* Any end: the file is cut at every byte; each byte is changed, with the old and with repaired checksums. */
START_TEST(no_damage_to_an_animation_goes_wrong) {
    char *bytes;
    size_t num_bytes;
    rf_image *f;
    int num;
    const uint64_t before = rf_memory_get_counts().num_live;
    rf_assert_ok(write_video(in_dir("a.png"), 9, 7, 3, 0, NULL), err);
    rf_assert_ok(rf_file_read(path, 1 << 20, &bytes, &num_bytes, &err), err);
    unsigned char *copy = malloc(num_bytes);
    for (size_t n = 8; n < num_bytes; n++) {
        memcpy(copy, bytes, n);
        ck_assert_int_eq(read_memory(copy, n, 99, &f, &num), RF_ERR_FORMAT);
        rf_video_frames_free(f, num);
        ck_assert(!strchr(err.message, '\n'));
    }
    for (size_t at = 8; at < num_bytes; at++) {
        for (int k = 0; k < 16; k++) {
            memcpy(copy, bytes, num_bytes);
            copy[at] = (unsigned char)(k < 8 ? copy[at] ^ 1 << k : copy[at] ^ 1 << (k - 8));
            if (k >= 8) repair_crcs(copy, num_bytes);
            /* sides of thousands of pixels are allowed, and slow */
            if (at >= 16 && at < 24 && (copy[18] | copy[22])) continue;
            rf_status st = read_memory(copy, num_bytes, 99, &f, &num);
            rf_video_frames_free(f, num);
            ck_assert_msg(st != RF_OK || k >= 8, "byte %zu bit %d", at, k);
            ck_assert(st == RF_OK || (err.message[0] && !strchr(err.message, '\n')));
        }
    }
    free(copy);
    rf_free(bytes);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, before);
}
END_TEST

START_TEST(bad_files_are_refused) {
    rf_image *f;
    int num;
    rf_assert_fails(rf_video_read(in_dir("none.mp4"), 9, &f, &num, &err), err, RF_ERR_MISSING, "none.mp4");
    rf_assert_fails(rf_video_read(dir, 9, &f, &num, &err), err, RF_ERR_IO, "not a regular file");
    rf_assert_ok(rf_file_write(in_dir("a"), "", 0, &err), err);
    rf_assert_fails(rf_video_read(path, 9, &f, &num, &err), err, RF_ERR_FORMAT, "is empty");
    rf_assert_fails(rf_video_read(path, 0, &f, &num, &err), err, RF_ERR_ARGUMENT, "0 frames");
    rf_assert_ok(rf_file_write(in_dir("a"), "no video at all, just words", 27, &err), err);
    rf_assert_fails(rf_video_read(path, 9, &f, &num, &err), err, have_mp4() ? RF_ERR_FORMAT : RF_ERR_UNSUPPORTED,
                    have_mp4() ? "not a video" : "no FFmpeg");
    ck_assert_ptr_null(f);
    rf_video_frames_free(NULL, 3);
    /* Playlists name other files. */
    static const char list[] = "ffconcat version 1.0\nfile 'b.mp4'\nfile 'b.mp4'\n";
    rf_assert_ok(rf_file_write(in_dir("list"), list, sizeof list - 1, &err), err);
    ck_assert_int_ne(rf_video_read(path, 9, &f, &num, &err), RF_OK);
}
END_TEST

/* ---- MP4 ---- */

static const struct {
    int width, height, scale;
} mp4_sizes[] = {{64, 64, 0}, {65, 63, 0}, {16, 16, 4}, {2, 2, 0}, {1, 1, 0}, {640, 368, 0}, {1280, 720, 0}};

START_TEST(an_mp4_comes_back_nearly_as_it_was) {
    const int width = mp4_sizes[_i].width, height = mp4_sizes[_i].height, num = width > 1000 ? 4 : 30;
    const int scale = mp4_sizes[_i].scale ? mp4_sizes[_i].scale : 1;
    const int read_width = (width * scale + 1) & ~1, read_height = (height * scale + 1) & ~1;
    rf_image *frames;
    int num_read;
    if (!have_mp4()) {
        rf_video_format format;
        rf_assert_fails(rf_video_format_of("x.mp4", &format, &err), err, RF_ERR_UNSUPPORTED, "no FFmpeg");
        rf_assert_fails(write_video(in_dir("a.mp4"), width, height, num, scale, NULL), err, RF_ERR_UNSUPPORTED,
                        "animated PNG");
        ck_assert_str_eq(rf_video_library(), "none (built without FFmpeg)");
        return;
    }
    ck_assert_ptr_nonnull(strstr(rf_video_library(), "libavcodec"));
    rf_assert_ok(write_video(in_dir("a.mp4"), width, height, num, scale, NULL), err);
    ck_assert_int_eq(files_in_dir(), 1);
    rf_assert_ok(rf_video_read(path, 1000, &frames, &num_read, &err), err);
    ck_assert_int_eq(num_read, num);
    rf_image want = {.width = read_width, .height = read_height, .rgb = malloc((size_t)(read_width * read_height) * 3)};
    uint8_t *rgb = malloc((size_t)(width * height) * 3);
    for (int t = 0; t < num; t++) {
        double psnr = 0;
        paint(rgb, width, height, t);
        for (int y = 0; y < read_height; y++) {
            for (int x = 0; x < read_width; x++) {
                const int from_y = y / scale < height ? y / scale : height - 1;
                const int from_x = x / scale < width ? x / scale : width - 1;
                memcpy(want.rgb + (y * read_width + x) * 3, rgb + (from_y * width + from_x) * 3, 3);
            }
        }
        rf_assert_ok(rf_image_compare(&want, &frames[t], &psnr, NULL, NULL, &err), err);
        ck_assert_msg(psnr > 30 || width < 8, /* where two or one colour is all that is left */
                      "frame %d: %.2f dB", t, psnr);
    }
    rf_video_frames_free(frames, num_read);
    rf_assert_ok(rf_video_read(path, 2, &frames, &num_read, &err), err);
    ck_assert_int_eq(num_read, 2);
    rf_video_frames_free(frames, num_read);
    free(want.rgb);
    free(rgb);
}
END_TEST

START_TEST(colours_survive_an_mp4) {
    static const uint8_t colours[][3] = {{255, 255, 255}, {0, 0, 0},     {230, 20, 20},
                                         {20, 230, 20},   {20, 20, 230}, {128, 128, 128}};
    static const int heights[] = {64, 720};
    if (!have_mp4()) return;
    for (int h = 0; h < 2; h++) {
        const rf_video_options options = {.width = 64, .height = heights[h], .fps = 2.5};
        rf_video_writer *w;
        rf_image *frames;
        rf_image image;
        int num;
        rf_assert_ok(rf_video_writer_open(&w, in_dir("a:b.mp4"), &options, &err), err);
        for (int t = 0; t < 6; t++) {
            rf_assert_ok(rf_image_create(&image, 64, heights[h], colours[t], &err), err);
            rf_assert_ok(rf_video_writer_add(w, image.rgb, &err), err);
            rf_image_free(&image);
        }
        rf_assert_ok(rf_video_writer_commit(w, &err), err);
        rf_assert_ok(rf_video_read(path, 99, &frames, &num, &err), err);
        ck_assert_int_eq(num, 6);
        for (int t = 0; t < 6; t++) {
            for (int c = 0; c < 3; c++) {
                const int got = frames[t].rgb[(32 * 64 + 32) * 3 + c];
                ck_assert_msg(abs(got - colours[t][c]) <= 4, "height %d colour %d channel %d: %d, not %d", heights[h],
                              t, c, got, colours[t][c]);
            }
        }
        rf_video_frames_free(frames, num);
    }
}
END_TEST

/* Cut anywhere, a video is refused or, where only frames that were not asked for are missing, read. */
START_TEST(a_cut_off_mp4_is_refused) {
    char *bytes;
    size_t num_bytes;
    rf_image *f;
    int num;
    if (!have_mp4()) return;
    rf_assert_ok(write_video(in_dir("a.mp4"), 64, 64, 30, 0, NULL), err);
    rf_assert_ok(rf_file_read(path, 1 << 24, &bytes, &num_bytes, &err), err);
    for (size_t n = 1; n < num_bytes; n += n < 64 ? 7 : 97) {
        rf_assert_ok(rf_file_write(in_dir("cut.mp4"), bytes, n, &err), err);
        ck_assert_msg(rf_video_read(path, 30, &f, &num, &err) == RF_ERR_FORMAT, "cut at %zu: %s", n, err.message);
        ck_assert(f == NULL && num == 0 && strstr(err.message, "cut.mp4") && !strchr(err.message, '\n'));
    }
    rf_assert_ok(rf_file_write(in_dir("cut.mp4"), bytes, num_bytes - 1, &err), err);
    rf_assert_fails(rf_video_read(path, 31, &f, &num, &err), err, RF_ERR_FORMAT, "at frame ");
    rf_assert_ok(rf_video_read(path, 3, &f, &num, &err), err);
    rf_video_frames_free(f, num);
    rf_free(bytes);
}
END_TEST

/* One red pixel, by hand; libav does not mind that a GIF ends too early. */
START_TEST(a_gif_is_read_whole_or_not_at_all) {
    static const unsigned char gif[] = "GIF89a\1\0\1\0\x80\0\0\xff\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;";
    const size_t num_bytes = sizeof gif - 1;
    rf_image *f;
    int num;
    if (!have_mp4()) return;
    rf_assert_ok(rf_file_write(in_dir("a.gif"), gif, num_bytes, &err), err);
    rf_assert_ok(rf_video_read(path, 9, &f, &num, &err), err);
    ck_assert(num == 1 && f[0].width == 1 && f[0].height == 1);
    ck_assert_mem_eq(f[0].rgb, "\xff\0\0", 3);
    rf_video_frames_free(f, num);
    for (size_t n = 1; n < num_bytes; n++) {
        rf_assert_ok(rf_file_write(path, gif, n, &err), err);
        ck_assert_int_ne(rf_video_read(path, 9, &f, &num, &err), RF_OK);
        ck_assert(!strchr(err.message, '\n'));
    }
}
END_TEST

/* ---- resizing ---- */

START_TEST(resizing_to_the_same_size_changes_nothing) {
    rf_image in, out;
    rf_assert_ok(rf_image_create(&in, 65, 63, (const uint8_t[]){0, 0, 0}, &err), err);
    for (int i = 0; i < 65 * 63 * 3; i++) in.rgb[i] = (uint8_t)(i * i / 7 + (i % 3) * 40);
    rf_assert_ok(rf_image_resize(&out, &in, 65, 63, &err), err);
    ck_assert_mem_eq(in.rgb, out.rgb, 65 * 63 * 3);
    rf_image_free(&out);
    rf_assert_fails(rf_image_resize(&out, &in, 0, 63, &err), err, RF_ERR_ARGUMENT, "0 x 63");
    rf_image_free(&in);
}
END_TEST

START_TEST(a_constant_stays_constant) {
    static const int to[][2] = {{1, 1}, {7, 200}, {200, 7}, {64, 64}, {1, 300}, {33, 31}};
    const uint8_t rgb[3] = {1, 128, 255};
    rf_image in, out;
    rf_assert_ok(rf_image_create(&in, 61, 67, rgb, &err), err);
    for (size_t k = 0; k < sizeof to / sizeof *to; k++) {
        rf_assert_ok(rf_image_resize(&out, &in, to[k][0], to[k][1], &err), err);
        ck_assert(out.width == to[k][0] && out.height == to[k][1]);
        for (int i = 0; i < out.width * out.height * 3; i++) ck_assert_uint_eq(out.rgb[i], rgb[i % 3]);
        rf_image_free(&out);
    }
    rf_image_free(&in);
}
END_TEST

/* By hand: halving weighs 1 3 3 1 eighths, cut and normalised at the border (3 3 1 sevenths); doubling 1/4 and 3/4. */
START_TEST(weights_are_the_triangles) {
    rf_image in, out;
    rf_assert_ok(rf_image_create(&in, 6, 1, (const uint8_t[]){0, 0, 0}, &err), err);
    static const int values[6] = {0, 70, 210, 240, 16, 80};
    for (int x = 0; x < 6; x++) memset(in.rgb + (ptrdiff_t)x * 3, values[x], 3);
    rf_assert_ok(rf_image_resize(&out, &in, 3, 1, &err), err);
    const double half[3] = {(3 * 0 + 3 * 70 + 210) / 7.0, (70 + 3 * 210 + 3 * 240 + 16) / 8.0,
                            (240 + 3 * 16 + 3 * 80) / 7.0};
    for (int x = 0; x < 3; x++) ck_assert_int_eq(out.rgb[x * 3], (int)rint(half[x]));
    rf_image_free(&out);
    rf_assert_ok(rf_image_resize(&out, &in, 12, 1, &err), err);
    for (int x = 0; x < 12; x++) {
        const int near = x / 2, other = x % 2 ? near + 1 : near - 1;
        const double want = other < 0 || other > 5 ? values[near] : 0.75 * values[near] + 0.25 * values[other];
        ck_assert_int_eq(out.rgb[x * 3 + 1], (int)rint(want));
    }
    rf_image_free(&out);
    rf_image_free(&in);
}
END_TEST

START_TEST(resizing_survives_failed_allocations) {
    rf_image in, out;
    rf_assert_ok(rf_image_create(&in, 9, 9, (const uint8_t[]){0, 0, 0}, &err), err);
    const uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1; n <= 5; n++) {
        rf_memory_fail_nth(n);
        ck_assert_int_eq(rf_image_resize(&out, &in, 4, 4, &err), RF_ERR_MEMORY);
        rf_memory_fail_nth(0);
        ck_assert_ptr_null(out.rgb);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    rf_image_free(&in);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("video");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, a_name_states_the_format, 0, sizeof names / sizeof *names);
    tcase_add_test(tc, bad_options_are_refused_before_anything_is_written);
    tcase_add_test(tc, fps_becomes_a_fraction);
    tcase_add_loop_test(tc, an_animated_png_comes_back_bit_by_bit, 0, sizeof sizes / sizeof *sizes);
    tcase_add_test(tc, frames_of_many_chunks_come_back);
    tcase_add_test(tc, equal_frames_cost_next_to_nothing);
    tcase_add_test(tc, memory_does_not_grow_with_frames);
    tcase_add_test(tc, scale_repeats_pixels);
    tcase_add_loop_test(tc, a_discarded_video_leaves_nothing, 0, sizeof kinds / sizeof *kinds);
    tcase_add_test(tc, frames_get_their_numbers_and_texts);
    tcase_add_loop_test(tc, every_failed_allocation_is_survived, 0, sizeof kinds / sizeof *kinds);
    tcase_add_test(tc, a_failed_frame_leaves_nothing);
    tcase_add_test(tc, disposal_and_blending_follow_the_specification);
    tcase_add_test(tc, a_default_picture_need_not_be_a_frame);
    tcase_add_loop_test(tc, every_broken_animation_is_refused, 0, sizeof broken / sizeof *broken);
    tcase_add_test(tc, no_damage_to_an_animation_goes_wrong);
    tcase_add_test(tc, bad_files_are_refused);
    tcase_add_loop_test(tc, an_mp4_comes_back_nearly_as_it_was, 0, sizeof mp4_sizes / sizeof *mp4_sizes);
    tcase_add_test(tc, colours_survive_an_mp4);
    tcase_add_test(tc, a_cut_off_mp4_is_refused);
    tcase_add_test(tc, a_gif_is_read_whole_or_not_at_all);
    tcase_add_test(tc, resizing_to_the_same_size_changes_nothing);
    tcase_add_test(tc, a_constant_stays_constant);
    tcase_add_test(tc, weights_are_the_triangles);
    tcase_add_test(tc, resizing_survives_failed_allocations);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
