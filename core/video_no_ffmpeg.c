/* core/video_no_ffmpeg.c - stands in for video_ffmpeg.c in a build without libav*: every use is refused by name. */
#include "core/video_internal.h"

rf_status rf_video_check_mp4(const char *path, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "%s: this build has no FFmpeg for MP4: write x.png (animated PNG) or frames/%%04d.png, or install "
                   "libavcodec-dev, libavformat-dev and libswscale-dev and build again",
                   path);
}

static rf_status refuse_open(void **state, const char *path, const rf_video_options *options, rf_error *err) {
    *state = NULL;
    return rf_video_check_mp4(path, err);
}

static rf_status refuse_add(void *state, const uint8_t *rgb, rf_error *err) {
    return rf_video_check_mp4("a frame", err);
}

static rf_status refuse_commit(void *state, rf_error *err) {
    return rf_video_check_mp4("a video", err);
}

static void nothing(void *state) {}

static const char *no_codec(const void *state) {
    return "none";
}

const rf_video_sink rf_video_sink_mp4 = {refuse_open, refuse_add, refuse_commit, nothing, no_codec};

rf_status rf_video_read_ffmpeg(rf_video_frames *frames, const char *path, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "%s: not a PNG, animated PNG or JPEG, and this build has no FFmpeg to read other videos (install "
                   "libavcodec-dev, libavformat-dev and libswscale-dev and build again)",
                   path);
}

const char *rf_video_library(void) {
    return "none (built without FFmpeg)";
}
