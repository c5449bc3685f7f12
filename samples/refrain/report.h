/* samples/refrain/report.h - what a run leaves behind in writing: the --json object and the texts inside a PNG. */
#ifndef REFRAIN_REPORT_H
#define REFRAIN_REPORT_H

#include <cjson/cJSON.h>

#include "caching/cache.h"
#include "core/image.h"

/* One output file of `refrain image`. A grid has num_images > 1 classes and seeds in one file. */
typedef struct {
    const char *path;
    const char *const *class_names; /* [num_images] */
    const uint64_t *seeds;          /* [num_images] */
    int num_images;
    int width, height;
} report_output;

/* What a policy did in the whole run. */
typedef struct {
    const char *mode, *options;
    rf_cache_counts counts; /* summed over the batches; bytes: the largest */
} report_cache;

/* Pictures against those of the uncached run with the same seeds. */
typedef struct {
    double psnr_db, ssim;             /* means over the pictures; psnr_db infinite if one of them is equal */
    double worst_psnr_db, worst_ssim; /* of one picture */
    double max_abs;                   /* largest difference in [0, 1] */
    double speedup;                   /* of the denoising loop: uncached time over cached time */
    double reference_ms;              /* the uncached denoising loop */
} report_quality;

typedef struct {
    const char *command, *model, *device, *dtype;
    uint64_t seed;
    int num_steps;
    double load_ms, denoise_ms, decode_ms, total_ms;
    const double *step_ms; /* [num_steps], summed over the batches of the run */
    size_t weights_bytes, arena_bytes, peak_device_bytes;
    const report_output *outputs;
    int num_outputs;
    const report_cache *cache;     /* NULL: no policy */
    const report_quality *quality; /* NULL: not compared */
} run_report;

/* The object of `refrain image --json` on standard output. A psnr_db or worst_psnr_db of null is infinite: the pictures are
 * equal; an ssim of null: they are smaller than its window. RF_ERR_MEMORY. */
rf_status report_print_run(const run_report *report, rf_error *err);

/* The settings that make a picture again. Nothing here depends on time or place, so equal runs give equal files. */
typedef struct {
    const char *model, *device, *dtype, *sampler, *scheduler, *rng;
    int num_steps;
    double cfg_scale, eta;
    const char *const *class_names; /* [num_images]: more than one in a grid */
    const uint64_t *seeds;          /* [num_images] */
    int num_images;
    int width, height;         /* of one picture */
    const char *cache_mode;    /* NULL = no policy */
    const char *cache_options; /* "k=v,...", all of them */
    double max_drift;          /* 0 = no drift guard */
} picture_settings;

/* Saves the picture with two texts: `parameters` as other programs write it, and `refrain` with the same as JSON. */
rf_status report_save_png(const rf_image *image, const char *path, const picture_settings *settings, rf_error *err);

/* cJSON for 64-bit whole numbers, which a double cannot hold. */
void report_add_uint(cJSON *object, const char *name, uint64_t value);
/* Prints and frees root (NULL = memory was out while it was built). */
rf_status report_print_json(cJSON *root, rf_error *err);

#endif
