/* core/metrics.h - how far two pictures or two tensors are apart. Everything is computed in floating point and summed in double:
 * squaring 8-bit differences in 8 bits wraps and can show nothing under about 28 dB.
 *
 *   PSNR          10 log10(range^2 / mean (a-b)^2); +infinity if equal
 *   SSIM          Wang et al. 2004: Gaussian window 11 x 11, sigma 1.5, K1 .01, K2 .03, population covariance, only windows that
 *                 lie inside the picture; per channel, then the mean over channels
 *   max abs       max |a-b|
 *   relative L2   |a-b| / |b|; |a-b| if b is zero
 * A NaN on either side is never passed over: it makes every result NaN, except max abs, which is then +infinity. */
#ifndef RF_CORE_METRICS_H
#define RF_CORE_METRICS_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_SSIM_WINDOW 11

/* range: the span of possible values, 1 for [0,1], 2 for [-1,1], 255 for 8 bits. */
double rf_metric_psnr(const float *a, const float *b, size_t num, double range);
double rf_metric_psnr_u8(const uint8_t *a, const uint8_t *b, size_t num);
double rf_metric_max_abs(const float *a, const float *b, size_t num);
double rf_metric_rel_l2(const float *a, const float *b, size_t num); /* b is the reference */

/* Planar [channels, height, width]. A side under 11 is RF_ERR_SHAPE. */
rf_status rf_metric_ssim(const float *a, const float *b, int channels, int height, int width, double range,
                         double *ssim, rf_error *err);

/* A decoded picture against its reference: planar [channels, height, width] in about [-1, 1], each taken to [0, 1] and clipped, as
 * they are when saved, but not rounded to 8 bits. A picture too small for SSIM gets NaN there. RF_ERR_MEMORY. */
typedef struct {
    double psnr_db, ssim, max_abs;
} rf_picture_metrics;
rf_status rf_metric_picture(const float *a, const float *b, int channels, int height, int width,
                            rf_picture_metrics *out, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
