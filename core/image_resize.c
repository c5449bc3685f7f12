/* core/image_resize.c - bilinear resize with antialiasing, separable: rows are summed first, then columns.
 *
 * Weights are a triangle of half-width max(1, source / target) source pixels around the target pixel's centre, cut at the
 * border and normalised, as in PIL's BILINEAR and torch's antialias=True. Sums are float, rounded once. */
#include <math.h>

#include "core/image_internal.h"
#include "core/memory.h"
#include "core/video.h"

/* The source pixels that one target pixel is the weighted mean of. */
typedef struct {
    int first, num;
} footprint;

static int max_taps(int from, int to) {
    return 2 * (int)ceil(fmax(1, (double)from / to)) + 1;
}

static footprint weigh(int from, int to, int at, float *weights) {
    const double ratio = (double)from / to, half = fmax(1, ratio), centre = (at + 0.5) * ratio;
    int first = (int)floor(centre - half + 0.5), end = (int)floor(centre + half + 0.5);
    if (first < 0) first = 0;
    if (end > from) end = from;
    double sum = 0;
    for (int i = first; i < end; i++) {
        const double w = 1 - fabs(i + 0.5 - centre) / half;
        weights[i - first] = (float)fmax(0, w);
        sum += fmax(0, w);
    }
    for (int i = first; i < end; i++) weights[i - first] = (float)(weights[i - first] / sum);
    return (footprint){.first = first, .num = end - first};
}

rf_status rf_image_resize(rf_image *out, const rf_image *in, int width, int height, rf_error *err) {
    *out = (rf_image){0};
    rf_status st = rf_image_check_size(width, height, "image", err);
    if (st != RF_OK) return rf_fail_prefix(err, RF_ERR_ARGUMENT, "cannot resize");
    const size_t taps = (size_t)max_taps(in->width, width);
    const size_t row_values = (size_t)in->width * 3;
    uint8_t *rgb = rf_alloc((size_t)width * (size_t)height * 3);
    float *row = rf_alloc(row_values * sizeof *row); /* one target row at the source's width */
    float *down = rf_alloc((size_t)max_taps(in->height, height) * sizeof *down);
    float *across = rf_alloc((size_t)width * taps * sizeof *across);
    footprint *columns = rf_alloc((size_t)width * sizeof *columns);
    if (!rgb || !row || !down || !across || !columns) {
        st = rf_fail(err, RF_ERR_MEMORY, "no memory to resize %d x %d pixels to %d x %d", in->width, in->height, width,
                     height);
        goto done;
    }
    for (int x = 0; x < width; x++) columns[x] = weigh(in->width, width, x, across + (size_t)x * taps);
    for (int y = 0; y < height; y++) {
        const footprint f = weigh(in->height, height, y, down);
        for (size_t i = 0; i < row_values; i++) row[i] = 0;
        for (int k = 0; k < f.num; k++) {
            const uint8_t *from = in->rgb + (size_t)(f.first + k) * row_values;
            for (size_t i = 0; i < row_values; i++) row[i] += down[k] * from[i];
        }
        uint8_t *to = rgb + (size_t)y * (size_t)width * 3;
        for (int x = 0; x < width; x++) {
            const float *weights = across + (size_t)x * taps, *from = row + (size_t)columns[x].first * 3;
            float sum[3] = {0};
            for (int k = 0; k < columns[x].num; k++) {
                for (int c = 0; c < 3; c++) sum[c] += weights[k] * from[k * 3 + c];
            }
            for (int c = 0; c < 3; c++) *to++ = (uint8_t)lrintf(fminf(255, fmaxf(0, sum[c])));
        }
    }
    *out = (rf_image){.width = width, .height = height, .rgb = rgb};
    rgb = NULL;
done:
    rf_free(rgb);
    rf_free(row);
    rf_free(down);
    rf_free(across);
    rf_free(columns);
    return st;
}
