/* core/video.h - frames out as MP4, animated PNG or single PNGs; frames in from a video or a picture.
 *
 * MP4 goes through FFmpeg's libav* where the build found them: H.264 if a software encoder is installed, else MPEG-4, in
 * yuv420p (odd sides are padded by one pixel row or column, and a reader gets the padded size). Animated PNG (APNG, PNG
 * third edition) is written with zlib, losslessly, and opens in every browser; plain PNG readers show its first frame.
 * Reading takes the first video stream of the usual containers (MP4, WebM and Matroska, GIF, AVI, MPEG, Ogg, Y4M) through
 * libav*, animated PNGs, and a PNG or JPEG picture as one frame.
 * Files are written under a temporary name and renamed by commit: a video is complete or not there. */
#ifndef RF_CORE_VIDEO_H
#define RF_CORE_VIDEO_H

#include "core/image.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_VIDEO_MP4 = 0, RF_VIDEO_APNG, RF_VIDEO_FRAMES } rf_video_format;

/* By the file name's ending, in any case: "x.mp4" MP4; "x.png", "x.apng" APNG; a ".png" name with one %d or %0Nd conversion
 * ("frames/%04d.png", counting from 0; %% is a percent sign) single PNGs. The folder part is taken as it is and must exist.
 * Anything else is RF_ERR_ARGUMENT and names these. MP4 in a build without libav* is RF_ERR_UNSUPPORTED and names what to
 * do instead. */
rf_status rf_video_format_of(const char *path, rf_video_format *out, rf_error *err);

typedef struct {
    int width, height;
    double fps; /* 0.01 to 1000 */
    int scale;  /* every pixel becomes scale x scale, 1 to 64; 0 is 1. Many players do not show 64 x 64 well */
    /* Settings. APNG and frames: text chunks (of every frame); MP4: "comment", one "keyword: text" a line. */
    const rf_png_text *texts;
    size_t num_texts;
} rf_video_options;

/* A path and its options are checked here, before anything is computed. After a failed call only discard makes sense. */
typedef struct rf_video_writer rf_video_writer;
rf_status rf_video_writer_open(rf_video_writer **out, const char *path, const rf_video_options *options, rf_error *err);
/* rgb [height][width][3], of the options' size. Memory does not grow with the number of frames. */
rf_status rf_video_writer_add(rf_video_writer *writer, const uint8_t *rgb, rf_error *err);
rf_status rf_video_writer_commit(rf_video_writer *writer, rf_error *err); /* frees the writer in every case */
void rf_video_writer_discard(rf_video_writer *writer); /* removes what was written; NULL is a no-op */
/* "H.264 (libx264)", "MPEG-4", "animated PNG", "PNG frames": for reports. Lives as long as the writer. */
const char *rf_video_writer_codec(const rf_video_writer *writer);

/* The first max_frames frames, all of one size, at most 4 GiB of pixels. *out: array of *num_frames images for
 * rf_video_frames_free. Nothing is returned half read: a file that is damaged, cut off or empty before max_frames is
 * RF_ERR_FORMAT with the frame in its line (MPEG streams do not tell where they should end). Alpha of an animated PNG is
 * shown on black. */
rf_status rf_video_read(const char *path, int max_frames, rf_image **out, int *num_frames, rf_error *err);
void rf_video_frames_free(rf_image *frames, int num_frames); /* NULL is a no-op */

/* "FFmpeg libavcodec 59.37.100, H.264 encoder libx264" or "none (built without FFmpeg)". Static storage. */
const char *rf_video_library(void);

/* Bilinear with antialiasing (a triangle over the source footprint when shrinking) and half-pixel centres, rounded half to
 * even. out may not be in; it is a new image for rf_image_free. */
rf_status rf_image_resize(rf_image *out, const rf_image *in, int width, int height, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
