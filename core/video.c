/* core/video.c - which format a name means, the writer that all formats stand behind, single PNGs, and reading by content.
 *
 * Single PNGs are written as "<name>.part" and renamed by commit, so that an earlier set of frames stays until the new one is
 * complete. */
#include "core/video.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "core/image_internal.h"
#include "core/memory.h"
#include "core/video_internal.h"

#define MAX_SCALE      64
#define MAX_DIGITS     9
#define MAX_TEMP_TRIES 100

/* ---- names ---- */

/* "frames/%04d.png" taken apart; %% already is one percent sign in the parts. */
typedef struct {
    char before[PATH_MAX]; /* folder included */
    char after[NAME_MAX + 1];
    int digits; /* least number of digits, zero-padded */
} name_pattern;

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool ends_with(const char *s, const char *ending) {
    size_t n = strlen(s), m = strlen(ending);
    return n > m && strcasecmp(s + n - m, ending) == 0;
}

/* The file name is read by hand: a printf format from outside may read and write anywhere. */
static rf_status parse_pattern(const char *path, name_pattern *out, rf_error *err) {
    const char *base = base_name(path);
    size_t used = (size_t)(base - path), num_conversions = 0;
    if (strlen(path) >= sizeof out->before - 32 || strlen(base) >= sizeof out->after) {
        return rf_fail(err, RF_ERR_ARGUMENT, "a file name of %zu bytes is too long", strlen(path));
    }
    *out = (name_pattern){.digits = 1};
    memcpy(out->before, path, used);
    char *part = out->before;
    for (const char *p = base; *p; p++) {
        if (*p != '%' || p[1] == '%') {
            part[used++] = *p;
            if (*p == '%') p++;
            continue;
        }
        const char *start = p++;
        bool padded = *p == '0';
        if (padded) p++;
        int digits = 1;
        if (padded && *p >= '1' && *p <= '0' + MAX_DIGITS)
            digits = *p++ - '0';
        else if (padded)
            digits = 0;
        if (*p != 'd' || digits == 0) {
            return rf_fail(err, RF_ERR_ARGUMENT, "%s: '%.*s' is not %%d or %%0Nd with N from 1 to %d", path,
                           *p ? (int)(p - start) + 1 : (int)(p - start), start, MAX_DIGITS);
        }
        if (++num_conversions > 1) break;
        out->digits = digits;
        part[used] = 0;
        part = out->after;
        used = 0;
    }
    part[used] = 0;
    if (num_conversions == 1) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: a name with %% needs exactly one %%d (frames/%%04d.png), found %s", path,
                   num_conversions ? "more" : "none");
}

rf_status rf_video_format_of(const char *path, rf_video_format *out, rf_error *err) {
    *out = RF_VIDEO_APNG;
    const char *base = base_name(path);
    if (ends_with(base, ".mp4")) {
        *out = RF_VIDEO_MP4;
        return rf_video_check_mp4(path, err);
    }
    if (ends_with(base, ".apng")) return RF_OK;
    if (ends_with(base, ".png")) {
        if (!strchr(base, '%')) return RF_OK;
        *out = RF_VIDEO_FRAMES;
        name_pattern pattern;
        return parse_pattern(path, &pattern, err);
    }
    return rf_fail(err, RF_ERR_ARGUMENT,
                   "%s: a video is x.mp4 (MP4), x.png or x.apng (animated PNG) or frames/%%04d.png (single pictures)",
                   path);
}

static rf_status check_folder(const char *path, rf_error *err) {
    size_t len = (size_t)(base_name(path) - path);
    char folder[PATH_MAX] = ".";
    if (len >= sizeof folder) return rf_fail(err, RF_ERR_ARGUMENT, "a file name of %zu bytes is too long", len);
    if (len > 0) {
        memcpy(folder, path, len);
        folder[len] = 0;
    }
    if (rf_path_is_dir(folder)) {
        if (access(folder, W_OK | X_OK) == 0) return RF_OK;
        return rf_fail(err, RF_ERR_IO, "%s: cannot write here: %s", path, strerror(errno));
    }
    return rf_fail(err, RF_ERR_MISSING, "%s: there is no folder %s (mkdir -p %s makes it)", path, folder, folder);
}

/* ---- a temporary file ---- */

rf_status rf_video_file_open(rf_video_file *f, const char *path, rf_error *err) {
    struct stat info;
    f->fd = -1;
    f->target[0] = f->temp[0] = 0;
    if (strlen(path) >= sizeof f->target) {
        return rf_fail(err, RF_ERR_ARGUMENT, "a file name of %zu bytes is too long", strlen(path));
    }
    bool exists = stat(path, &info) == 0;
    if (exists && !S_ISREG(info.st_mode)) {
        return rf_fail(err, RF_ERR_IO, "%s: %s", path,
                       S_ISDIR(info.st_mode) ? "is a folder, a file name is needed"
                                             : "is not a regular file, which a video needs");
    }
    if (!exists || !realpath(path, f->target)) snprintf(f->target, sizeof f->target, "%s", path);
    for (int i = 0; f->fd < 0 && i < MAX_TEMP_TRIES; i++) {
        snprintf(f->temp, sizeof f->temp, "%s.tmp-%ld-%d", f->target, (long)getpid(), i);
        f->fd = open(f->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (f->fd < 0 && errno != EEXIST) break;
    }
    if (f->fd < 0) {
        f->temp[0] = 0;
        return rf_fail(err, RF_ERR_IO, "%s: cannot write here: %s", path, strerror(errno));
    }
    if (exists) (void)!fchmod(f->fd, info.st_mode & 07777);
    return RF_OK;
}

rf_status rf_video_file_write(rf_video_file *f, const void *bytes, size_t num_bytes, rf_error *err) {
    const char *p = bytes;
    while (num_bytes > 0) {
        ssize_t put = write(f->fd, p, num_bytes);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return rf_fail(err, RF_ERR_IO, "%s: cannot write: %s", f->target, strerror(errno));
        p += put;
        num_bytes -= (size_t)put;
    }
    return RF_OK;
}

rf_status rf_video_file_patch(rf_video_file *f, off_t offset, const void *bytes, size_t num_bytes, rf_error *err) {
    if (lseek(f->fd, offset, SEEK_SET) != offset) {
        return rf_fail(err, RF_ERR_IO, "%s: cannot write at byte %jd: %s", f->target, (intmax_t)offset,
                       strerror(errno));
    }
    return rf_video_file_write(f, bytes, num_bytes, err);
}

/* Best effort: makes the new name itself survive a power cut. */
static void sync_folder_of(const char *path) {
    char folder[PATH_MAX];
    size_t len = (size_t)(base_name(path) - path);
    snprintf(folder, sizeof folder, "%.*s", (int)len, path);
    int fd = open(len ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

rf_status rf_video_file_commit(rf_video_file *f, rf_error *err) {
    int error = fsync(f->fd) != 0 ? errno : 0;
    if (close(f->fd) != 0 && error == 0) error = errno;
    f->fd = -1;
    if (error == 0 && rename(f->temp, f->target) != 0) error = errno;
    if (error == 0) {
        f->temp[0] = 0;
        sync_folder_of(f->target);
        return RF_OK;
    }
    rf_video_file_discard(f);
    return rf_fail(err, RF_ERR_IO, "%s: cannot write: %s", f->target, strerror(error));
}

void rf_video_file_discard(rf_video_file *f) {
    if (f->fd >= 0) close(f->fd);
    if (f->temp[0]) unlink(f->temp);
    f->fd = -1;
    f->temp[0] = 0;
}

void rf_video_fps_fraction(double fps, int limit, int *num, int *den) {
    /* Convergents of the continued fraction, p / q after p0 / q0. */
    double p0 = 0, q0 = 1, p = 1, q = 0, rest = fps;
    for (int i = 0; i < 32; i++) {
        double whole = floor(rest);
        double next_p = whole * p + p0, next_q = whole * q + q0;
        if (next_p > limit || next_q > limit) break;
        p0 = p, q0 = q, p = next_p, q = next_q;
        if (fabs(p / q - fps) <= 1e-9 * fps) break;
        rest = 1 / (rest - whole);
    }
    *num = p < 1 ? 1 : (int)p;
    *den = p < 1 ? (int)fmin(limit, rint(1 / fps)) : (int)q;
}

/* ---- single PNGs ---- */

typedef struct {
    name_pattern pattern;
    int width, height, num;
    rf_png_text *texts; /* strings behind it */
    size_t num_texts;
    char name[2 * PATH_MAX], part[2 * PATH_MAX + 8]; /* of the frame that name_frame was called for */
} png_frames;

static void name_frame(png_frames *s, int index) {
    snprintf(s->name, sizeof s->name, "%s%0*d%s", s->pattern.before, s->pattern.digits, index, s->pattern.after);
    snprintf(s->part, sizeof s->part, "%s.part", s->name);
}

static void frames_discard(void *state) {
    png_frames *s = state;
    for (int i = 0; i < s->num; i++) {
        name_frame(s, i);
        unlink(s->part);
    }
    rf_free(s->texts);
    rf_free(s);
}

/* The caller's texts may not live as long as the writer. */
static rf_png_text *copy_texts(const rf_png_text *texts, size_t num) {
    size_t bytes = num * sizeof *texts;
    for (size_t i = 0; i < num; i++) bytes += strlen(texts[i].keyword) + strlen(texts[i].text) + 2;
    rf_png_text *copy = rf_alloc(bytes);
    if (!copy) return NULL;
    char *pool = (char *)(copy + num);
    for (size_t i = 0; i < num; i++) {
        copy[i].keyword = strcpy(pool, texts[i].keyword);
        pool += strlen(pool) + 1;
        copy[i].text = strcpy(pool, texts[i].text);
        pool += strlen(pool) + 1;
    }
    return copy;
}

static rf_status frames_open(void **state, const char *path, const rf_video_options *options, rf_error *err) {
    *state = NULL;
    png_frames *s = rf_alloc_zero(1, sizeof *s);
    if (!s) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a writer of frames", path);
    s->width = options->width;
    s->height = options->height;
    rf_status st = parse_pattern(path, &s->pattern, err);
    if (st == RF_OK) {
        s->num_texts = options->num_texts;
        s->texts = copy_texts(options->texts, options->num_texts);
        if (!s->texts) st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu texts", path, s->num_texts);
    }
    if (st != RF_OK) {
        frames_discard(s);
        return st;
    }
    *state = s;
    return RF_OK;
}

static rf_status frames_add(void *state, const uint8_t *rgb, rf_error *err) {
    png_frames *s = state;
    const rf_image image = {.width = s->width, .height = s->height, .rgb = (uint8_t *)rgb}; /* only read */
    name_frame(s, s->num);
    RF_TRY(rf_image_save_png(&image, s->part, s->texts, s->num_texts, err));
    s->num++;
    return RF_OK;
}

static rf_status frames_commit(void *state, rf_error *err) {
    png_frames *s = state;
    rf_status st = RF_OK;
    int done = 0;
    for (; done < s->num; done++) {
        name_frame(s, done);
        if (rename(s->part, s->name) == 0) continue;
        st = rf_fail(err, RF_ERR_IO, "%s: cannot rename the finished frame to it: %s", s->name, strerror(errno));
        break;
    }
    for (int i = 0; st != RF_OK && i < done; i++) {
        name_frame(s, i);
        unlink(s->name);
    }
    frames_discard(s);
    return st;
}

static const char *frames_codec(const void *state) {
    return "PNG frames";
}

static const rf_video_sink sink_frames = {frames_open, frames_add, frames_commit, frames_discard, frames_codec};

/* ---- the writer ---- */

struct rf_video_writer {
    const rf_video_sink *sink;
    void *state;
    int width, height, scale;
    int num_frames;
    bool failed;
    uint8_t *large; /* scale > 1: [height * scale][width * scale][3] */
    char name[NAME_MAX + 1];
};

static rf_status check_options(const char *path, const rf_video_options *o, rf_error *err) {
    int scale = o->scale == 0 ? 1 : o->scale;
    if (!(o->fps >= 0.01 && o->fps <= 1000)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: %g frames a second, it must be 0.01 to 1000", path, o->fps);
    }
    if (scale < 1 || scale > MAX_SCALE) {
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: scale %d, it must be 1 to %d (0 is 1)", path, scale, MAX_SCALE);
    }
    rf_status st = rf_image_check_size(o->width, o->height, path, err);
    if (st == RF_OK) st = rf_image_check_size(o->width * scale, o->height * scale, path, err);
    if (st != RF_OK) return rf_fail_prefix(err, RF_ERR_ARGUMENT, "cannot write");
    for (size_t i = 0; i < o->num_texts; i++) {
        bool ascii;
        RF_TRY(rf_png_check_text(&o->texts[i], &ascii, err));
    }
    return RF_OK;
}

rf_status rf_video_writer_open(rf_video_writer **out, const char *path, const rf_video_options *options,
                               rf_error *err) {
    *out = NULL;
    rf_video_format format;
    RF_TRY(rf_video_format_of(path, &format, err));
    RF_TRY(check_options(path, options, err));
    RF_TRY(check_folder(path, err));
    rf_video_writer *w = rf_alloc_zero(1, sizeof *w);
    if (!w) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a video writer", path);
    w->sink = format == RF_VIDEO_MP4    ? &rf_video_sink_mp4
              : format == RF_VIDEO_APNG ? &rf_video_sink_apng
                                        : &sink_frames;
    w->width = options->width;
    w->height = options->height;
    w->scale = options->scale == 0 ? 1 : options->scale;
    snprintf(w->name, sizeof w->name, "%s", base_name(path));
    rf_video_options scaled = *options;
    scaled.width *= w->scale;
    scaled.height *= w->scale;
    rf_status st = RF_OK;
    if (w->scale > 1) {
        w->large = rf_alloc((size_t)scaled.width * (size_t)scaled.height * 3);
        if (!w->large) {
            st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %d x %d pixels", path, scaled.width, scaled.height);
        }
    }
    if (st == RF_OK) st = w->sink->open(&w->state, path, &scaled, err);
    if (st != RF_OK) {
        rf_free(w->large);
        rf_free(w);
        return st;
    }
    *out = w;
    return RF_OK;
}

/* Every pixel of the frame as scale x scale pixels of w->large. */
static void enlarge(const rf_video_writer *w, const uint8_t *rgb) {
    size_t scale = (size_t)w->scale, row_bytes = (size_t)w->width * scale * 3;
    uint8_t *to = w->large;
    for (int y = 0; y < w->height; y++) {
        uint8_t *row = to;
        for (int x = 0; x < w->width; x++, rgb += 3) {
            for (size_t i = 0; i < scale; i++, to += 3) memcpy(to, rgb, 3);
        }
        for (size_t i = 1; i < scale; i++, to += row_bytes) memcpy(to, row, row_bytes);
    }
}

rf_status rf_video_writer_add(rf_video_writer *w, const uint8_t *rgb, rf_error *err) {
    if (w->failed) return rf_fail(err, RF_ERR_STATE, "%s: an earlier frame could not be written", w->name);
    if (w->num_frames == INT_MAX) return rf_fail(err, RF_ERR_ARGUMENT, "%s: too many frames", w->name);
    if (w->scale > 1) enlarge(w, rgb);
    rf_status st = w->sink->add(w->state, w->scale > 1 ? w->large : rgb, err);
    if (st == RF_OK) w->num_frames++;
    w->failed = st != RF_OK;
    return st;
}

rf_status rf_video_writer_commit(rf_video_writer *w, rf_error *err) {
    rf_status st;
    if (w->failed || w->num_frames == 0) {
        st = rf_fail(err, RF_ERR_STATE, "%s: %s, so there is no video", w->name,
                     w->failed ? "a frame could not be written" : "no frame was written");
        w->sink->discard(w->state);
    } else {
        st = w->sink->commit(w->state, err);
    }
    rf_free(w->large);
    rf_free(w);
    return st;
}

void rf_video_writer_discard(rf_video_writer *w) {
    if (!w) return;
    w->sink->discard(w->state);
    rf_free(w->large);
    rf_free(w);
}

const char *rf_video_writer_codec(const rf_video_writer *w) {
    return w->sink->codec(w->state);
}

/* ---- reading ---- */

rf_status rf_video_frames_append(rf_video_frames *f, int width, int height, uint8_t **rgb, rf_error *err) {
    size_t bytes = (size_t)width * (size_t)height * 3;
    if (f->num > 0 && (width != f->images[0].width || height != f->images[0].height)) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: frame %d is %d x %d, the first is %d x %d", f->name, f->num, width,
                       height, f->images[0].width, f->images[0].height);
    }
    if (((uint64_t)f->num + 1) * bytes > RF_VIDEO_MAX_BYTES) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: more than %d frames of %d x %d are over the limit of 4 GiB", f->name,
                       f->num, width, height);
    }
    if (f->num == f->capacity) {
        int capacity = f->capacity == 0 ? 8 : f->capacity > f->max / 2 ? f->max : 2 * f->capacity;
        rf_image *images = rf_realloc(f->images, (size_t)capacity * sizeof *images);
        if (!images) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %d frames", f->name, capacity);
        f->images = images;
        f->capacity = capacity;
    }
    *rgb = rf_alloc(bytes);
    if (!*rgb) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %d x %d pixels", f->name, width, height);
    f->images[f->num++] = (rf_image){.width = width, .height = height, .rgb = *rgb};
    return RF_OK;
}

static rf_status read_picture(rf_video_frames *frames, const char *path, rf_error *err) {
    char *bytes = NULL;
    size_t num_bytes = 0;
    rf_image image = {0};
    uint8_t *rgb = NULL;
    RF_TRY(rf_file_read(path, RF_IMAGE_MAX_FILE_BYTES, &bytes, &num_bytes, err));
    rf_status st;
    if (rf_apng_is_animated(bytes, num_bytes)) {
        st = rf_apng_read(frames, bytes, num_bytes, err);
    } else {
        st = rf_image_load_memory(&image, bytes, num_bytes, path, err);
        if (st == RF_OK) st = rf_video_frames_append(frames, image.width, image.height, &rgb, err);
        if (st == RF_OK) memcpy(rgb, image.rgb, (size_t)image.width * (size_t)image.height * 3);
    }
    rf_image_free(&image);
    rf_free(bytes);
    return st;
}

/* The first bytes, to tell pictures from videos. */
static rf_status read_head(const char *path, unsigned char head[8], rf_error *err) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not block before fstat refuses it */
    if (fd < 0) {
        return rf_fail(err, errno == ENOENT ? RF_ERR_MISSING : RF_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    ssize_t got = regular ? pread(fd, head, 8, 0) : 0;
    int error = errno;
    close(fd);
    if (!regular) return rf_fail(err, RF_ERR_IO, "%s: is not a regular file", path);
    if (got < 0) return rf_fail(err, RF_ERR_IO, "%s: cannot read: %s", path, strerror(error));
    if (got == 0) return rf_fail(err, RF_ERR_FORMAT, "%s: the file is empty", path);
    memset(head + got, 0, 8 - (size_t)got);
    return RF_OK;
}

rf_status rf_video_read(const char *path, int max_frames, rf_image **out, int *num_frames, rf_error *err) {
    *out = NULL;
    *num_frames = 0;
    unsigned char head[8];
    if (max_frames < 1) return rf_fail(err, RF_ERR_ARGUMENT, "%s: cannot read %d frames", path, max_frames);
    RF_TRY(read_head(path, head, err));
    rf_video_frames frames = {.name = path, .max = max_frames};
    bool is_picture = memcmp(head, RF_PNG_SIGNATURE, 8) == 0 || memcmp(head, "\xff\xd8", 2) == 0;
    rf_status st = is_picture ? read_picture(&frames, path, err) : rf_video_read_ffmpeg(&frames, path, err);
    if (st != RF_OK) {
        rf_video_frames_free(frames.images, frames.num);
        return st;
    }
    *out = frames.images;
    *num_frames = frames.num;
    return RF_OK;
}

void rf_video_frames_free(rf_image *frames, int num_frames) {
    for (int i = 0; frames && i < num_frames; i++) rf_image_free(&frames[i]);
    rf_free(frames);
}
