/* core/video_ffmpeg.c - MP4 out and any video in through FFmpeg's libavformat, libavcodec and libswscale (4.4 and later).
 *
 * Colour   RGB is converted with the matrix that players assume for the size (BT.601 under 720 rows, else BT.709), in limited
 *          range, and the stream says so; the primaries and transfer are tagged BT.709, which sRGB shares or nearly does.
 * Pitfall  libav reads and writes past a row's end in steps of a vector: pictures pass through its own padded buffers.
 * Pitfall  a playlist can name other files and addresses: only the given file is opened, by content, as one of READ_FORMATS,
 *          and no protocol is allowed.
 * Pitfall  libav's log level is one for the process: every entry sets it to quiet, since the library prints nothing.
 * The decoder runs on one thread; two would need no other code. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libswscale/swscale.h>

#include "core/image_internal.h"
#include "core/memory.h"
#include "core/video_internal.h"

#define SWS_FLAGS        (SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT | SWS_FULL_CHR_H_INP)
#define SMALL_PIXELS     (640 * 480) /* one encoder thread is enough up to here */
#define FIRST_HD_ROW     720
#define MAX_FPS_FRACTION 60000 /* MPEG-4 stores 16 bits */
#define MAX_URL          (PATH_MAX + 80)
#define MPEG4_QUALITY    2   /* qscale: 1 best, 31 worst */
#define BITS_PER_PIXEL   1.5 /* for encoders without a constant quality */
#define LOWEST_BIT_RATE  200000
#define GIF_END          ';'
/* libavformat's names. Hundreds of others are guessed from content too, playlists and subtitles among them. */
#define READ_FORMATS "mov,matroska,gif,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,ogg,asf,yuv4mpegpipe,mxf"

rf_status rf_video_check_mp4(const char *path, rf_error *err) {
    return RF_OK;
}

/* "what: reason", memory told apart from the rest. */
static rf_status fail_av(rf_error *err, rf_status status, int code, const char *path, const char *what) {
    char reason[AV_ERROR_MAX_STRING_SIZE] = "";
    av_strerror(code, reason, sizeof reason);
    if (code == AVERROR(ENOMEM)) status = RF_ERR_MEMORY;
    return rf_fail(err, status, "%s: %s: %s", path, what, reason);
}

/* RGB24 and YUV of a frame's own matrix; either side may be RGB, where the matrix does not matter. */
static void set_matrix(struct SwsContext *sws, int matrix, int from_full, int to_full) {
    const int *table = sws_getCoefficients(matrix);
    /* -1 from formats that need no conversion of colours */
    (void)sws_setColorspaceDetails(sws, table, from_full, table, to_full, 0, 1 << 16, 1 << 16);
}

/* ---- encoders ---- */

/* What is asked for first: constant quality, then what else makes H.264 in software. */
static const char *const preferred_h264[] = {"libx264", "libopenh264"};

/* The index-th software encoder of H.264, then MPEG-4; NULL behind the last. */
static const AVCodec *candidate(int index) {
    const int num_preferred = (int)(sizeof preferred_h264 / sizeof *preferred_h264);
    int at = 0;
    for (int i = 0; i < num_preferred; i++) {
        const AVCodec *codec = avcodec_find_encoder_by_name(preferred_h264[i]);
        if (codec && at++ == index) return codec;
    }
    void *position = NULL;
    for (const AVCodec *codec; (codec = av_codec_iterate(&position));) {
        bool seen = false;
        if (!av_codec_is_encoder(codec) || codec->id != AV_CODEC_ID_H264) continue;
        if (codec->capabilities & (AV_CODEC_CAP_HARDWARE | AV_CODEC_CAP_HYBRID | AV_CODEC_CAP_EXPERIMENTAL)) continue;
        for (int i = 0; i < num_preferred; i++) seen = seen || strcmp(codec->name, preferred_h264[i]) == 0;
        /* These two wrap hardware without saying so. */
        if (seen || strstr(codec->name, "omx") || strstr(codec->name, "videotoolbox")) continue;
        if (at++ == index) return codec;
    }
    const AVCodec *mpeg4 = avcodec_find_encoder_by_name("mpeg4");
    return mpeg4 && at == index ? mpeg4 : NULL;
}

const char *rf_video_library(void) {
    static const char *const lines[] = {
        "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION) ", H.264 encoder libx264",
        "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION) ", H.264 encoder libopenh264",
        "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION) ", another H.264 encoder",
        "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION) ", no H.264 encoder: MPEG-4",
        "FFmpeg libavcodec " AV_STRINGIFY(LIBAVCODEC_VERSION) ", no encoder for MP4",
    };
    const AVCodec *codec = candidate(0);
    if (!codec) return lines[4];
    if (codec->id != AV_CODEC_ID_H264) return lines[3];
    return strcmp(codec->name, "libx264") == 0       ? lines[0]
           : strcmp(codec->name, "libopenh264") == 0 ? lines[1]
                                                     : lines[2];
}

/* ---- writing ---- */

typedef struct {
    rf_video_file file;
    AVFormatContext *format;
    AVCodecContext *encoder;
    AVStream *stream; /* the format's */
    AVFrame *rgb, *yuv;
    AVPacket *packet;
    struct SwsContext *sws;
    int width, height; /* of the frames; the encoder's are even */
    int64_t num_frames;
    char codec[64];
} mp4_writer;

static void mp4_discard(void *state) {
    mp4_writer *w = state;
    if (w->format && w->format->pb) avio_closep(&w->format->pb);
    avcodec_free_context(&w->encoder);
    avformat_free_context(w->format);
    av_frame_free(&w->rgb);
    av_frame_free(&w->yuv);
    av_packet_free(&w->packet);
    sws_freeContext(w->sws);
    rf_video_file_discard(&w->file);
    rf_free(w);
}

static AVFrame *new_frame(enum AVPixelFormat format, int width, int height) {
    AVFrame *frame = av_frame_alloc();
    if (!frame) return NULL;
    frame->format = format;
    frame->width = width;
    frame->height = height;
    if (av_frame_get_buffer(frame, 0) < 0) av_frame_free(&frame);
    return frame;
}

static void set_encoder(AVCodecContext *c, const AVCodec *codec, const mp4_writer *w, double fps,
                        AVDictionary **options) {
    int num, den;
    rf_video_fps_fraction(fps, MAX_FPS_FRACTION, &num, &den);
    c->width = (w->width + 1) & ~1;
    c->height = (w->height + 1) & ~1;
    c->pix_fmt = AV_PIX_FMT_YUV420P;
    c->time_base = (AVRational){den, num};
    c->framerate = (AVRational){num, den};
    c->sample_aspect_ratio = (AVRational){1, 1};
    c->gop_size = fps < 1 ? 1 : (int)rint(fps);
    c->color_range = AVCOL_RANGE_MPEG;
    c->colorspace = c->height < FIRST_HD_ROW ? AVCOL_SPC_SMPTE170M : AVCOL_SPC_BT709;
    c->color_primaries = AVCOL_PRI_BT709;
    c->color_trc = AVCOL_TRC_BT709;
    c->chroma_sample_location = AVCHROMA_LOC_LEFT;
    c->thread_count = c->width * c->height <= SMALL_PIXELS ? 1 : 0;
    c->flags |= AV_CODEC_FLAG_BITEXACT;
    if (w->format->oformat->flags & AVFMT_GLOBALHEADER) c->flags |= AV_CODEC_FLAG_GLOBAL_HEADER;
    if (strcmp(codec->name, "libx264") == 0) {
        av_dict_set(options, "crf", "16", 0);
        av_dict_set(options, "preset", "medium", 0);
    } else if (codec->id == AV_CODEC_ID_MPEG4) {
        c->flags |= AV_CODEC_FLAG_QSCALE;
        c->global_quality = MPEG4_QUALITY * FF_QP2LAMBDA;
    } else {
        double rate = BITS_PER_PIXEL * c->width * c->height * fps;
        c->bit_rate = (int64_t)fmin(fmax(rate, LOWEST_BIT_RATE), INT32_MAX);
    }
}

/* The first encoder that opens: one that is installed may still refuse this size or lack its library. */
static rf_status open_encoder(mp4_writer *w, const char *path, double fps, rf_error *err) {
    int code = AVERROR_ENCODER_NOT_FOUND;
    const AVCodec *codec;
    for (int i = 0; (codec = candidate(i)); i++) {
        AVDictionary *options = NULL;
        w->encoder = avcodec_alloc_context3(codec);
        if (!w->encoder) return fail_av(err, RF_ERR_MEMORY, AVERROR(ENOMEM), path, codec->name);
        set_encoder(w->encoder, codec, w, fps, &options);
        code = avcodec_open2(w->encoder, codec, &options);
        av_dict_free(&options);
        if (code >= 0) {
            if (codec->id == AV_CODEC_ID_H264)
                snprintf(w->codec, sizeof w->codec, "H.264 (%s)", codec->name);
            else
                snprintf(w->codec, sizeof w->codec, "MPEG-4");
            return RF_OK;
        }
        avcodec_free_context(&w->encoder);
    }
    char what[80];
    snprintf(what, sizeof what, "no encoder for an MP4 of %d x %d pixels", w->width, w->height);
    return fail_av(err, RF_ERR_UNSUPPORTED, code, path, what);
}

static rf_status set_comment(mp4_writer *w, const rf_video_options *o, const char *path, rf_error *err) {
    size_t bytes = 1, used = 0;
    if (o->num_texts == 0) return RF_OK;
    for (size_t i = 0; i < o->num_texts; i++) bytes += strlen(o->texts[i].keyword) + strlen(o->texts[i].text) + 3;
    char *comment = rf_alloc(bytes);
    if (!comment) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu texts", path, o->num_texts);
    for (size_t i = 0; i < o->num_texts; i++) {
        used += (size_t)snprintf(comment + used, bytes - used, "%s%s: %s", i ? "\n" : "", o->texts[i].keyword,
                                 o->texts[i].text);
    }
    int code = av_dict_set(&w->format->metadata, "comment", comment, 0);
    rf_free(comment);
    return code < 0 ? fail_av(err, RF_ERR_MEMORY, code, path, "comment") : RF_OK;
}

static rf_status open_muxer(mp4_writer *w, const char *path, const rf_video_options *o, rf_error *err) {
    char url[MAX_URL]; /* with its protocol: a name may hold a colon */
    snprintf(url, sizeof url, "file:%s", w->file.temp);
    int code = avformat_alloc_output_context2(&w->format, NULL, "mp4", url);
    if (code < 0) return fail_av(err, RF_ERR_UNSUPPORTED, code, path, "no writer of MP4");
    w->format->flags |= AVFMT_FLAG_BITEXACT; /* neither time nor release in the file */
    RF_TRY(open_encoder(w, path, o->fps, err));
    w->stream = avformat_new_stream(w->format, NULL);
    if (!w->stream) return fail_av(err, RF_ERR_MEMORY, AVERROR(ENOMEM), path, "stream");
    code = avcodec_parameters_from_context(w->stream->codecpar, w->encoder);
    if (code < 0) return fail_av(err, RF_ERR_MEMORY, code, path, "stream");
    w->stream->time_base = w->encoder->time_base;
    w->stream->avg_frame_rate = w->encoder->framerate;
    RF_TRY(set_comment(w, o, path, err));
    code = avio_open(&w->format->pb, url, AVIO_FLAG_WRITE);
    if (code < 0) return fail_av(err, RF_ERR_IO, code, path, "cannot write");
    AVDictionary *options = NULL;
    av_dict_set(&options, "movflags", "+faststart", 0);
    code = avformat_write_header(w->format, &options);
    av_dict_free(&options);
    return code < 0 ? fail_av(err, RF_ERR_IO, code, path, "cannot write") : RF_OK;
}

static rf_status mp4_open(void **state, const char *path, const rf_video_options *options, rf_error *err) {
    *state = NULL;
    av_log_set_level(AV_LOG_QUIET);
    mp4_writer *w = rf_alloc_zero(1, sizeof *w);
    if (!w) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a video writer", path);
    w->file.fd = -1;
    w->width = options->width;
    w->height = options->height;
    rf_status st = rf_video_file_open(&w->file, path, err);
    if (st == RF_OK) st = open_muxer(w, path, options, err);
    if (st == RF_OK) {
        const AVCodecContext *c = w->encoder;
        w->packet = av_packet_alloc();
        w->rgb = new_frame(AV_PIX_FMT_RGB24, c->width, c->height);
        w->yuv = new_frame(c->pix_fmt, c->width, c->height);
        w->sws = sws_getContext(c->width, c->height, AV_PIX_FMT_RGB24, c->width, c->height, c->pix_fmt, SWS_FLAGS, NULL,
                                NULL, NULL);
        if (!w->packet || !w->rgb || !w->yuv || !w->sws) {
            st = fail_av(err, RF_ERR_MEMORY, AVERROR(ENOMEM), path, "frame");
        } else {
            set_matrix(w->sws, c->colorspace == AVCOL_SPC_BT709 ? SWS_CS_ITU709 : SWS_CS_ITU601, 1, 0);
            w->yuv->color_range = c->color_range;
            w->yuv->colorspace = c->colorspace;
            w->yuv->color_primaries = c->color_primaries;
            w->yuv->color_trc = c->color_trc;
            w->yuv->chroma_location = c->chroma_sample_location;
        }
    }
    if (st != RF_OK) {
        mp4_discard(w);
        return st;
    }
    *state = w;
    return RF_OK;
}

/* A frame, or NULL for the end, to the encoder; what it has ready to the file. */
static rf_status encode(mp4_writer *w, const AVFrame *frame, rf_error *err) {
    int code = avcodec_send_frame(w->encoder, frame);
    if (code < 0) return fail_av(err, RF_ERR_STATE, code, w->file.target, "cannot encode");
    for (;;) {
        code = avcodec_receive_packet(w->encoder, w->packet);
        if (code == AVERROR(EAGAIN) || code == AVERROR_EOF) return RF_OK;
        if (code < 0) return fail_av(err, RF_ERR_STATE, code, w->file.target, "cannot encode");
        /* Without a duration the muxer would give the last frame none. */
        if (w->packet->duration == 0) w->packet->duration = 1;
        av_packet_rescale_ts(w->packet, w->encoder->time_base, w->stream->time_base);
        w->packet->stream_index = w->stream->index;
        code = av_interleaved_write_frame(w->format, w->packet);
        if (code >= 0) code = w->format->pb->error;
        if (code < 0) return fail_av(err, RF_ERR_IO, code, w->file.target, "cannot write");
    }
}

static rf_status mp4_add(void *state, const uint8_t *rgb, rf_error *err) {
    mp4_writer *w = state;
    const size_t row_bytes = (size_t)w->width * 3;
    for (int y = 0; y < w->rgb->height; y++) { /* an odd side repeats its last pixel */
        uint8_t *to = w->rgb->data[0] + (ptrdiff_t)y * w->rgb->linesize[0];
        memcpy(to, rgb + (size_t)(y < w->height ? y : w->height - 1) * row_bytes, row_bytes);
        if (w->rgb->width > w->width) memcpy(to + row_bytes, to + row_bytes - 3, 3);
    }
    int code = av_frame_make_writable(w->yuv); /* the encoder may still hold the last one */
    if (code < 0) return fail_av(err, RF_ERR_MEMORY, code, w->file.target, "frame");
    code = sws_scale(w->sws, (const uint8_t *const *)w->rgb->data, w->rgb->linesize, 0, w->rgb->height, w->yuv->data,
                     w->yuv->linesize);
    if (code < 0) return fail_av(err, RF_ERR_STATE, code, w->file.target, "cannot convert to YUV");
    w->yuv->pts = w->num_frames++;
    return encode(w, w->yuv, err);
}

static rf_status mp4_commit(void *state, rf_error *err) {
    mp4_writer *w = state;
    rf_status st = encode(w, NULL, err);
    if (st == RF_OK) {
        int code = av_write_trailer(w->format);
        const int close_code = avio_closep(&w->format->pb);
        if (code >= 0) code = close_code;
        if (code < 0) st = fail_av(err, RF_ERR_IO, code, w->file.target, "cannot write");
    }
    if (st == RF_OK) st = rf_video_file_commit(&w->file, err);
    mp4_discard(w);
    return st;
}

static const char *mp4_codec(const void *state) {
    return ((const mp4_writer *)state)->codec;
}

const rf_video_sink rf_video_sink_mp4 = {mp4_open, mp4_add, mp4_commit, mp4_discard, mp4_codec};

/* ---- reading ---- */

typedef struct {
    rf_video_frames *out;
    rf_error *err;
    AVIOContext *io;
    AVFormatContext *format;
    AVCodecContext *decoder;
    AVStream *stream;     /* the format's */
    int64_t stated_bytes; /* the size that the file itself names, 0 if it does not */
    AVPacket *packet;
    AVFrame *frame, *rgb;
    struct SwsContext *sws;
} video_reader;

static int refuse_open(AVFormatContext *format, AVIOContext **pb, const char *url, int flags, AVDictionary **options) {
    *pb = NULL;
    return AVERROR(EACCES);
}

static rf_status damaged(const video_reader *r, int code) {
    char what[64];
    snprintf(what, sizeof what, "damaged or cut off at frame %d", r->out->num);
    return fail_av(r->err, RF_ERR_FORMAT, code, r->out->name, what);
}

/* EBML's variable-length number at p: the position of the first set bit of the first byte is its length. All ones: unknown,
 * given as 0 here. *num_bytes 0: not inside. */
static int64_t ebml_number(const uint8_t *p, size_t left, size_t *num_bytes) {
    size_t len = 1;
    while (left > 0 && len <= 8 && !(p[0] & 0x80 >> (len - 1))) len++;
    *num_bytes = left == 0 || len > 8 || len > left ? 0 : len;
    if (*num_bytes == 0) return 0;
    uint64_t value = p[0] & (0x7f >> (len - 1));
    for (size_t i = 1; i < len; i++) value = value << 8 | p[i];
    return value == ((uint64_t)1 << (7 * len)) - 1 ? 0 : (int64_t)value;
}

/* The size that a file's first bytes promise, 0 if they do not: AVI (RIFF) and Matroska, WebM (EBML header, segment). */
static int64_t stated_size(const uint8_t *p, size_t num) {
    if (num >= 12 && memcmp(p, "RIFF", 4) == 0) {
        return 8 + ((int64_t)p[7] << 24 | (int64_t)p[6] << 16 | (int64_t)p[5] << 8 | p[4]);
    }
    if (num < 5 || memcmp(p, "\x1a\x45\xdf\xa3", 4) != 0) return 0;
    size_t at = 4, len;
    const int64_t header = ebml_number(p + at, num - at, &len);
    if (len == 0 || header > (int64_t)num) return 0;
    at += len + (size_t)header;
    if (at + 4 > num || memcmp(p + at, "\x18\x53\x80\x67", 4) != 0) return 0;
    at += 4;
    const int64_t segment = ebml_number(p + at, num - at, &len);
    return segment > 0 ? segment + (int64_t)(at + len) : 0;
}

static rf_status open_stream(video_reader *r) {
    const char *name = r->out->name;
    char url[MAX_URL];
    if (strlen(name) >= PATH_MAX)
        return rf_fail(r->err, RF_ERR_ARGUMENT, "a file name of %zu bytes is too long", strlen(name));
    snprintf(url, sizeof url, "file:%s", name);
    int code = avio_open(&r->io, url, AVIO_FLAG_READ);
    if (code < 0) return fail_av(r->err, RF_ERR_IO, code, name, "cannot open");
    r->format = avformat_alloc_context();
    if (!r->format) return fail_av(r->err, RF_ERR_MEMORY, AVERROR(ENOMEM), name, "cannot open");
    r->format->pb = r->io;
    r->format->flags |= AVFMT_FLAG_CUSTOM_IO;
    r->format->io_open = refuse_open;
    uint8_t head[128]; /* an EBML header is 30 to 60 bytes */
    const int num_head = avio_read(r->io, head, sizeof head);
    r->stated_bytes = stated_size(head, num_head > 0 ? (size_t)num_head : 0);
    if (avio_seek(r->io, 0, SEEK_SET) < 0) return fail_av(r->err, RF_ERR_IO, AVERROR(EIO), name, "cannot read");
    AVDictionary *options = NULL;
    av_dict_set(&options, "protocol_whitelist", "none", 0);
    av_dict_set(&options, "format_whitelist", READ_FORMATS, 0);
    code = avformat_open_input(&r->format, NULL, NULL, &options); /* frees the format if it fails */
    av_dict_free(&options);
    if (code >= 0) code = avformat_find_stream_info(r->format, NULL);
    if (code < 0) return fail_av(r->err, RF_ERR_FORMAT, code, name, "not a video that is read, or a damaged one");
    for (unsigned i = 0; i < r->format->nb_streams && !r->stream; i++) {
        AVStream *stream = r->format->streams[i];
        if (stream->codecpar->codec_type != AVMEDIA_TYPE_VIDEO)
            stream->discard = AVDISCARD_ALL;
        else if (!(stream->disposition & AV_DISPOSITION_ATTACHED_PIC))
            r->stream = stream;
    }
    return r->stream ? RF_OK : rf_fail(r->err, RF_ERR_FORMAT, "%s: holds no video", name);
}

static rf_status open_decoder(video_reader *r) {
    const char *name = r->out->name;
    const AVCodecParameters *p = r->stream->codecpar;
    if (p->codec_id == AV_CODEC_ID_NONE)
        return rf_fail(r->err, RF_ERR_FORMAT, "%s: not a video that is read, or a damaged one", name);
    const AVCodec *codec = avcodec_find_decoder(p->codec_id);
    if (!codec) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: the installed FFmpeg has no decoder for %s", name,
                       avcodec_get_name(p->codec_id));
    }
    RF_TRY(rf_image_check_size(p->width, p->height, name, r->err));
    r->decoder = avcodec_alloc_context3(codec);
    r->packet = av_packet_alloc();
    r->frame = av_frame_alloc();
    if (!r->decoder || !r->packet || !r->frame) return fail_av(r->err, RF_ERR_MEMORY, AVERROR(ENOMEM), name, "decoder");
    int code = avcodec_parameters_to_context(r->decoder, p);
    r->decoder->max_pixels = (int64_t)RF_IMAGE_MAX_SIDE * RF_IMAGE_MAX_SIDE;
    r->decoder->thread_count = 1;
    r->decoder->err_recognition = AV_EF_CRCCHECK;
    r->decoder->pkt_timebase = r->stream->time_base;
    if (code >= 0) code = avcodec_open2(r->decoder, codec, NULL);
    return code < 0 ? fail_av(r->err, RF_ERR_UNSUPPORTED, code, name, codec->name) : RF_OK;
}

/* libav's frame as one more RGB picture. */
static rf_status take_frame(video_reader *r) {
    const AVFrame *f = r->frame;
    const char *name = r->out->name;
    uint8_t *rgb;
    RF_TRY(rf_image_check_size(f->width, f->height, name, r->err));
    RF_TRY(rf_video_frames_append(r->out, f->width, f->height, &rgb, r->err));
    if (!r->rgb) r->rgb = new_frame(AV_PIX_FMT_RGB24, f->width, f->height);
    if (!r->rgb) return fail_av(r->err, RF_ERR_MEMORY, AVERROR(ENOMEM), name, "frame");
    r->sws = sws_getCachedContext(r->sws, f->width, f->height, f->format, f->width, f->height, AV_PIX_FMT_RGB24,
                                  SWS_FLAGS, NULL, NULL, NULL);
    if (!r->sws) return fail_av(r->err, RF_ERR_UNSUPPORTED, AVERROR(ENOSYS), name, "cannot convert its pixels to RGB");
    const bool hd =
        f->colorspace == AVCOL_SPC_BT709 || (f->colorspace == AVCOL_SPC_UNSPECIFIED && f->height >= FIRST_HD_ROW);
    const bool bt2020 = f->colorspace == AVCOL_SPC_BT2020_NCL || f->colorspace == AVCOL_SPC_BT2020_CL;
    const bool full = f->color_range == AVCOL_RANGE_JPEG || f->format == AV_PIX_FMT_YUVJ420P ||
                      f->format == AV_PIX_FMT_YUVJ422P || f->format == AV_PIX_FMT_YUVJ444P;
    set_matrix(r->sws, bt2020 ? SWS_CS_BT2020 : hd ? SWS_CS_ITU709 : SWS_CS_ITU601, full, 1);
    int code =
        sws_scale(r->sws, (const uint8_t *const *)f->data, f->linesize, 0, f->height, r->rgb->data, r->rgb->linesize);
    if (code < 0) return fail_av(r->err, RF_ERR_UNSUPPORTED, code, name, "cannot convert its pixels to RGB");
    const size_t row_bytes = (size_t)f->width * 3;
    for (int y = 0; y < f->height; y++) {
        memcpy(rgb + (size_t)y * row_bytes, r->rgb->data[0] + (ptrdiff_t)y * r->rgb->linesize[0], row_bytes);
    }
    return RF_OK;
}

/* Takes what the decoder has ready, up to the number of frames that are wanted. */
static rf_status drain(video_reader *r) {
    while (r->out->num < r->out->max) {
        int code = avcodec_receive_frame(r->decoder, r->frame);
        if (code == AVERROR(EAGAIN) || code == AVERROR_EOF) return RF_OK;
        if (code >= 0 && (r->frame->decode_error_flags || (r->frame->flags & AV_FRAME_FLAG_CORRUPT))) {
            code = AVERROR_INVALIDDATA;
        }
        if (code < 0) return damaged(r, code);
        rf_status st = take_frame(r);
        av_frame_unref(r->frame);
        if (st != RF_OK) return st;
    }
    return RF_OK;
}

/* libav ends without a word where a file ends too early; what kind of file it is has to tell. */
static bool is_cut_off(const video_reader *r) {
    const int64_t file_bytes = avio_size(r->io);
    if (file_bytes <= 0) return false;
    if (r->io->error < 0 || file_bytes < r->stated_bytes) return true;
    if (strcmp(r->format->iformat->name, "gif") == 0) {
        return avio_seek(r->io, file_bytes - 1, SEEK_SET) < 0 || avio_r8(r->io) != GIF_END;
    }
#if LIBAVFORMAT_VERSION_INT >= AV_VERSION_INT(58, 78, 100)
    /* MP4 and its kin name every frame's place in front. */
    const int num = avformat_index_get_entries_count(r->stream);
    for (int i = 0; i < num; i++) {
        const AVIndexEntry *entry = avformat_index_get_entry(r->stream, i);
        if (entry && entry->pos + entry->size > file_bytes) return true;
    }
#endif
    return false;
}

static rf_status read_frames(video_reader *r) {
    RF_TRY(open_stream(r));
    RF_TRY(open_decoder(r));
    while (r->out->num < r->out->max) {
        int code = av_read_frame(r->format, r->packet);
        const bool end = code == AVERROR_EOF;
        if (code < 0 && !end) return damaged(r, code);
        if (!end && r->packet->stream_index != r->stream->index) {
            av_packet_unref(r->packet);
            continue;
        }
        if (!end && (r->packet->flags & AV_PKT_FLAG_CORRUPT)) return damaged(r, AVERROR_INVALIDDATA);
        code = avcodec_send_packet(r->decoder, end ? NULL : r->packet);
        av_packet_unref(r->packet);
        if (code < 0) return damaged(r, code);
        RF_TRY(drain(r));
        if (!end) continue;
        if (r->out->num < r->out->max && is_cut_off(r)) return damaged(r, AVERROR_EOF);
        break;
    }
    return r->out->num > 0 ? RF_OK : rf_fail(r->err, RF_ERR_FORMAT, "%s: holds no frame", r->out->name);
}

rf_status rf_video_read_ffmpeg(rf_video_frames *frames, const char *path, rf_error *err) {
    av_log_set_level(AV_LOG_QUIET);
    video_reader r = {.out = frames, .err = err};
    rf_status st = read_frames(&r);
    avcodec_free_context(&r.decoder);
    avformat_close_input(&r.format);
    avio_closep(&r.io);
    av_packet_free(&r.packet);
    av_frame_free(&r.frame);
    av_frame_free(&r.rgb);
    sws_freeContext(r.sws);
    return st;
}
