/* kernels/conv_cpu.c
 * Maths    2-D convolution over NHWC with zero padding, see conv.h.
 * Tasks    blocks of output pixels: their patches are laid out as rows (im2col) in a thread's part of the workspace and
 *          multiplied by the weights, which lie as [out][ky][kx][in]. y is filled with bias and addend first. A 1x1
 *          convolution with stride 1 and no padding reads x in place. */
#include "kernels/cpu.h"

#define PATCH_ELEMS 262144 /* of a block's patches: 1 MiB */
#define MIN_PIXELS  32
#define MAX_PIXELS  256

static int64_t patch_len(const rf_conv2d_args *a) {
    return (int64_t)a->kernel * a->kernel * a->in_channels;
}

static int64_t block_pixels(const rf_conv2d_args *a) {
    return rf_max64(MIN_PIXELS, rf_min64(MAX_PIXELS, PATCH_ELEMS / patch_len(a)));
}

static bool reads_in_place(const rf_conv2d_args *a) {
    return a->kernel == 1 && a->stride == 1 && a->pad_before == 0 && a->pad_after == 0 && !a->upsample;
}

size_t rf_conv2d_workspace_cpu(rf_backend *backend, const rf_conv2d_args *a) {
    if (rf_conv2d_check(a, NULL) != RF_OK || reads_in_place(a)) return 0;
    return (size_t)rf_backend_num_threads(backend) * (size_t)(block_pixels(a) * patch_len(a)) * sizeof(float);
}

/* The patch of one output pixel: kernel x kernel source pixels, zeros outside. */
static void copy_patch(const rf_conv2d_args *a, float *patch, int64_t sample, int64_t oy, int64_t ox) {
    int shift = a->upsample ? 1 : 0; /* a doubled pixel's source is half its position */
    int64_t height = a->height << shift, width = a->width << shift, channels = a->in_channels;
    const float *image = (const float *)a->x + sample * a->height * a->width * channels;
    for (int ky = 0; ky < a->kernel; ky++) {
        int64_t y = oy * a->stride + ky - a->pad_before;
        for (int kx = 0; kx < a->kernel; kx++, patch += channels) {
            int64_t x = ox * a->stride + kx - a->pad_before;
            if (y >= 0 && y < height && x >= 0 && x < width)
                memcpy(patch, image + ((y >> shift) * a->width + (x >> shift)) * channels,
                       (size_t)channels * sizeof(float));
            else
                memset(patch, 0, (size_t)channels * sizeof(float));
        }
    }
}

static void fill_rows(const rf_conv2d_args *a, int64_t first, int64_t num) {
    int64_t channels = a->out_channels;
    for (int64_t i = first; i < first + num; i++) {
        float *y = (float *)a->y + i * channels;
        const float *addend = a->addend ? (const float *)a->addend + i * channels : NULL;
        if (addend && a->bias)
            for (int64_t c = 0; c < channels; c++) y[c] = addend[c] + a->bias[c];
        else if (addend)
            memmove(y, addend, (size_t)channels * sizeof(float));
        else if (a->bias)
            memcpy(y, a->bias, (size_t)channels * sizeof(float));
        else
            memset(y, 0, (size_t)channels * sizeof(float));
    }
}

rf_status rf_conv2d_cpu(rf_stream *stream, const rf_conv2d_args *a, rf_error *err) {
    RF_TRY(stream ? rf_conv2d_check_run(a, err) : rf_conv2d_check(a, err));
    RF_TRY(rf_check_f32("conv2d: dtype", a->dtype, err));
    if (!stream || a->batch == 0) return RF_OK;
    size_t need = rf_conv2d_workspace_cpu(rf_stream_backend(stream), a);
    RF_TRY(rf_check_workspace("conv2d", a->workspace, a->workspace_bytes, need, err));

    int64_t out_h = rf_conv2d_out_size(a, a->height), out_w = rf_conv2d_out_size(a, a->width);
    int64_t len = patch_len(a), block = block_pixels(a), pixels = a->batch * out_h * out_w;
    bool in_place = reads_in_place(a);
    rf_stream_note_launch(stream, "conv2d");
    rf_cpu_blas_single_thread();
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(dynamic)
    for (int64_t task = 0; task < rf_div_up(pixels, block); task++) {
        int64_t first = task * block, num = rf_min64(block, pixels - first);
        const float *patches = (const float *)a->x + first * len;
        if (!in_place) {
            float *room = (float *)a->workspace + rf_cpu_thread_idx() * block * len;
            for (int64_t i = 0; i < num; i++) {
                int64_t pixel = first + i;
                copy_patch(a, room + i * len, pixel / (out_h * out_w), pixel / out_w % out_h, pixel % out_w);
            }
            patches = room;
        }
        fill_rows(a, first, num);
        rf_cpu_sgemm(num, a->out_channels, len, 1.0f, patches, len, a->w, len, true, 1.0f,
                     (float *)a->y + first * a->out_channels, a->out_channels);
    }
    return RF_OK;
}

rf_status rf_upsample2x_cpu(rf_stream *stream, const rf_upsample2x_args *a, rf_error *err) {
    RF_TRY(stream ? rf_upsample2x_check_run(a, err) : rf_upsample2x_check(a, err));
    RF_TRY(rf_check_f32("upsample2x: dtype", a->dtype, err));
    if (!stream || a->batch == 0) return RF_OK;
    rf_stream_note_launch(stream, "upsample2x");
    size_t pixel_bytes = (size_t)a->channels * sizeof(float);
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t line = 0; line < a->batch * 2 * a->height; line++) { /* lines of all samples; 2 * height is even */
        const float *x = (const float *)a->x + line / 2 * a->width * a->channels;
        float *y = (float *)a->y + line * 2 * a->width * a->channels;
        for (int64_t i = 0; i < 2 * a->width; i++) memcpy(y + i * a->channels, x + i / 2 * a->channels, pixel_bytes);
    }
    return RF_OK;
}
