/* core/video_internal.h - what video.c, video_apng.c and video_ffmpeg.c (or video_no_ffmpeg.c) share. */
#ifndef RF_CORE_VIDEO_INTERNAL_H
#define RF_CORE_VIDEO_INTERNAL_H

#include <limits.h>
#include <sys/types.h>

#include "core/video.h"

#define RF_VIDEO_MAX_BYTES ((uint64_t)4 << 30) /* of pixels that one read returns */

/* ---- writing ---- */

/* A format. Options come checked and with scale applied: frames are of the size that they name. Each add after a failed one
 * is not called; commit (at least one frame was added) and discard free the state. */
typedef struct {
    rf_status (*open)(void **state, const char *path, const rf_video_options *options, rf_error *err);
    rf_status (*add)(void *state, const uint8_t *rgb, rf_error *err);
    rf_status (*commit)(void *state, rf_error *err);
    void (*discard)(void *state);
    const char *(*codec)(const void *state);
} rf_video_sink;

extern const rf_video_sink rf_video_sink_mp4, rf_video_sink_apng;

/* A temporary file beside its target, open for writing; a link's target is resolved. Kept apart from rf_file_writer because
 * APNG writes its frame count last, at the start, and libav opens the file by name. */
typedef struct {
    int fd; /* -1: closed */
    char target[PATH_MAX];
    char temp[PATH_MAX + 64]; /* empty: renamed or removed */
} rf_video_file;

rf_status rf_video_file_open(rf_video_file *f, const char *path, rf_error *err);
rf_status rf_video_file_write(rf_video_file *f, const void *bytes, size_t num_bytes, rf_error *err);
/* Over what was written, num_bytes at offset. */
rf_status rf_video_file_patch(rf_video_file *f, off_t offset, const void *bytes, size_t num_bytes, rf_error *err);
rf_status rf_video_file_commit(rf_video_file *f, rf_error *err); /* removes the temporary file if it fails */
void rf_video_file_discard(rf_video_file *f);

/* The closest fraction with both parts in 1..limit. fps as rf_video_options has it. */
void rf_video_fps_fraction(double fps, int limit, int *num, int *den);

/* ---- reading ---- */

/* Frames as they come. After a failure: rf_video_frames_free(images, num). */
typedef struct {
    const char *name; /* for messages */
    rf_image *images;
    int num, capacity, max;
} rf_video_frames;

/* Room for one more picture, counted in num, its pixels not set. Refuses another size than the first one's and more than
 * RF_VIDEO_MAX_BYTES. */
rf_status rf_video_frames_append(rf_video_frames *frames, int width, int height, uint8_t **rgb, rf_error *err);

/* Does this PNG (with its signature) have an acTL chunk before its pixels? No check of anything else. */
bool rf_apng_is_animated(const void *bytes, size_t num_bytes);
rf_status rf_apng_read(rf_video_frames *frames, const void *bytes, size_t num_bytes, rf_error *err);

/* Anything else than PNG and JPEG. */
rf_status rf_video_read_ffmpeg(rf_video_frames *frames, const char *path, rf_error *err);

/* RF_OK, or RF_ERR_UNSUPPORTED in a build without FFmpeg. */
rf_status rf_video_check_mp4(const char *path, rf_error *err);

#endif
