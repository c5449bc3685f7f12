/* core/metrics.c - PSNR, SSIM, largest error, relative L2. */
#include "core/metrics.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"

#define WINDOW   RF_SSIM_WINDOW
#define NUM_MAPS 5 /* a, b, a^2, b^2, ab */

static double psnr_of(double squares, size_t num, double range) {
    if (num == 0 || squares == 0) return (double)INFINITY;
    return 10 * log10(range * range * (double)num / squares);
}

double rf_metric_psnr(const float *a, const float *b, size_t num, double range) {
    double squares = 0;
    for (size_t i = 0; i < num; i++) {
        double d = (double)a[i] - (double)b[i];
        squares += d * d;
    }
    return psnr_of(squares, num, range);
}

double rf_metric_psnr_u8(const uint8_t *a, const uint8_t *b, size_t num) {
    double squares = 0;
    for (size_t i = 0; i < num; i++) {
        double d = (double)a[i] - (double)b[i];
        squares += d * d;
    }
    return psnr_of(squares, num, 255);
}

double rf_metric_max_abs(const float *a, const float *b, size_t num) {
    double largest = 0;
    for (size_t i = 0; i < num; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (isnan(d)) return (double)INFINITY;
        if (d > largest) largest = d;
    }
    return largest;
}

double rf_metric_rel_l2(const float *a, const float *b, size_t num) {
    double squares = 0, reference = 0;
    for (size_t i = 0; i < num; i++) {
        double d = (double)a[i] - (double)b[i];
        squares += d * d;
        reference += (double)b[i] * (double)b[i];
    }
    return reference == 0 ? sqrt(squares) : sqrt(squares / reference);
}

static void gaussian(double w[WINDOW]) {
    double sum = 0;
    for (int i = 0; i < WINDOW; i++) {
        double d = i - WINDOW / 2;
        w[i] = exp(-d * d / (2 * 1.5 * 1.5));
        sum += w[i];
    }
    for (int i = 0; i < WINDOW; i++) w[i] /= sum;
}

/* The window's vertical half: columns [NUM_MAPS, width] for the rows from a and b on. */
static void sum_columns(double *columns, const float *a, const float *b, size_t width, const double w[WINDOW]) {
    memset(columns, 0, NUM_MAPS * width * sizeof *columns);
    for (size_t row = 0; row < WINDOW; row++) {
        const float *row_a = a + row * width, *row_b = b + row * width;
        for (size_t x = 0; x < width; x++) {
            double va = (double)row_a[x], vb = (double)row_b[x];
            columns[x] += w[row] * va;
            columns[width + x] += w[row] * vb;
            columns[2 * width + x] += w[row] * va * va;
            columns[3 * width + x] += w[row] * vb * vb;
            columns[4 * width + x] += w[row] * va * vb;
        }
    }
}

/* Sum of the index over the windows of one row of them. */
static double sum_row(const double *columns, size_t width, const double w[WINDOW], double c1, double c2) {
    double total = 0;
    for (size_t x = 0; x + WINDOW <= width; x++) {
        double m[NUM_MAPS] = {0};
        for (size_t k = 0; k < NUM_MAPS; k++) {
            const double *at = columns + k * width + x;
            for (size_t i = 0; i < WINDOW; i++) m[k] += w[i] * at[i];
        }
        double var_a = m[2] - m[0] * m[0], var_b = m[3] - m[1] * m[1], cov = m[4] - m[0] * m[1];
        total += (2 * m[0] * m[1] + c1) * (2 * cov + c2) / ((m[0] * m[0] + m[1] * m[1] + c1) * (var_a + var_b + c2));
    }
    return total;
}

rf_status rf_metric_ssim(const float *a, const float *b, int channels, int height, int width, double range,
                         double *ssim, rf_error *err) {
    if (channels < 1 || width < WINDOW || height < WINDOW) {
        return rf_fail(err, RF_ERR_SHAPE, "SSIM needs pictures of at least %d x %d pixels, found %d x %d", WINDOW,
                       WINDOW, width, height);
    }
    const double c1 = (0.01 * range) * (0.01 * range), c2 = (0.03 * range) * (0.03 * range);
    size_t w = (size_t)width, h = (size_t)height;
    double weights[WINDOW], total = 0;
    double *columns = rf_alloc_zero(NUM_MAPS * w, sizeof *columns);
    if (!columns) return rf_fail(err, RF_ERR_MEMORY, "no memory to compare pictures of width %d", width);
    gaussian(weights);
    for (int c = 0; c < channels; c++) {
        size_t plane = (size_t)c * h * w;
        double of_channel = 0;
        for (size_t y = 0; y + WINDOW <= h; y++) {
            sum_columns(columns, a + plane + y * w, b + plane + y * w, w, weights);
            of_channel += sum_row(columns, w, weights, c1, c2);
        }
        total += of_channel / ((double)(w - WINDOW + 1) * (double)(h - WINDOW + 1));
    }
    rf_free(columns);
    *ssim = total / channels;
    return RF_OK;
}

/* [-1, 1] to [0, 1]; a NaN stays one. */
static void to_unit(float *out, const float *in, size_t num) {
    for (size_t i = 0; i < num; i++) {
        float v = in[i] * 0.5f + 0.5f;
        out[i] = v < 0 ? 0 : v > 1 ? 1 : v;
    }
}

rf_status rf_metric_picture(const float *a, const float *b, int channels, int height, int width,
                            rf_picture_metrics *out, rf_error *err) {
    size_t num = (size_t)channels * (size_t)height * (size_t)width;
    float *unit = rf_alloc_zero(num, 2 * sizeof *unit);
    if (!unit) return rf_fail(err, RF_ERR_MEMORY, "no memory to compare pictures of %d x %d", width, height);
    to_unit(unit, a, num);
    to_unit(unit + num, b, num);
    *out = (rf_picture_metrics){.psnr_db = rf_metric_psnr(unit, unit + num, num, 1),
                                .ssim = (double)NAN,
                                .max_abs = rf_metric_max_abs(unit, unit + num, num)};
    rf_status st = RF_OK;
    if (width >= WINDOW && height >= WINDOW)
        st = rf_metric_ssim(unit, unit + num, channels, height, width, 1, &out->ssim, err);
    rf_free(unit);
    return st;
}
