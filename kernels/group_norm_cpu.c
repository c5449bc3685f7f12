/* kernels/group_norm_cpu.c
 * Maths    y = (x - mean) / sqrt(var + eps) * weight + bias per (sample, group), then SiLU if asked; see norm.h.
 * Sums     two passes in double per channel, added over the group; the mean is a pair of floats (see norm_cpu.c).
 * Tasks    (sample, run of whole groups that is about 64 channels wide), so that a cache line is read by one task. */
#include "kernels/cpu.h"

#define BLOCK 64 /* channels whose sums are kept at once */

RF_HOT static void add_pixels(double *sums, const float *x, int64_t pixels, int64_t stride, int64_t num) {
    for (int64_t p = 0; p < pixels; p++, x += stride) {
        for (int64_t c = 0; c < num; c++) sums[c] += (double)x[c];
    }
}

RF_HOT static void add_squares(double *sums, const float *x, int64_t pixels, int64_t stride, int64_t num,
                               const float *mean_hi, const float *mean_lo) {
    for (int64_t p = 0; p < pixels; p++, x += stride) {
        for (int64_t c = 0; c < num; c++) {
            double d = (x[c] - mean_hi[c]) - mean_lo[c];
            sums[c] += d * d;
        }
    }
}

RF_HOT static void apply(float *y, const float *x, int64_t pixels, int64_t stride, int64_t num, const float *mean_hi,
                         const float *mean_lo, const float *factor, const float *bias, bool silu) {
    for (int64_t p = 0; p < pixels; p++, x += stride, y += stride) {
        if (silu)
            for (int64_t c = 0; c < num; c++) y[c] = rf_silu(((x[c] - mean_hi[c]) - mean_lo[c]) * factor[c] + bias[c]);
        else
            for (int64_t c = 0; c < num; c++) y[c] = ((x[c] - mean_hi[c]) - mean_lo[c]) * factor[c] + bias[c];
    }
}

/* Groups [group, group + num_groups) of one sample; num_groups * width <= BLOCK, or one group of any width. */
static void norm_groups(const rf_group_norm_args *a, int64_t sample, int64_t group, int64_t num_groups) {
    int64_t width = a->channels / a->num_groups;
    int64_t first = group * width, end = (group + num_groups) * width;
    const float *x = (const float *)a->x + sample * a->pixels * a->channels;
    float *y = (float *)a->y + sample * a->pixels * a->channels;
    double count = (double)a->pixels * (double)width;
    double total[BLOCK] = {0}, sums[BLOCK];
    float mean_hi[BLOCK], mean_lo[BLOCK], factor[BLOCK];
    double means[BLOCK], vars[BLOCK];

    for (int64_t c = first; c < end; c += BLOCK) {
        int64_t num = rf_min64(BLOCK, end - c);
        memset(sums, 0, sizeof sums);
        add_pixels(sums, x + c, a->pixels, a->channels, num);
        for (int64_t i = 0; i < num; i++) total[(c + i) / width - group] += sums[i];
    }
    for (int64_t g = 0; g < num_groups; g++) means[g] = total[g] / count;

    memset(total, 0, sizeof total);
    for (int64_t c = first; c < end; c += BLOCK) {
        int64_t num = rf_min64(BLOCK, end - c);
        memset(sums, 0, sizeof sums);
        for (int64_t i = 0; i < num; i++) {
            double mean = means[(c + i) / width - group];
            mean_hi[i] = (float)mean;
            mean_lo[i] = (float)(mean - mean_hi[i]);
        }
        add_squares(sums, x + c, a->pixels, a->channels, num, mean_hi, mean_lo);
        for (int64_t i = 0; i < num; i++) total[(c + i) / width - group] += sums[i];
    }
    for (int64_t g = 0; g < num_groups; g++) vars[g] = total[g] / count;

    for (int64_t c = first; c < end; c += BLOCK) {
        int64_t num = rf_min64(BLOCK, end - c);
        for (int64_t i = 0; i < num; i++) {
            int64_t g = (c + i) / width - group;
            mean_hi[i] = (float)means[g];
            mean_lo[i] = (float)(means[g] - mean_hi[i]);
            factor[i] = (float)(a->weight[c + i] / sqrt(vars[g] + a->eps));
        }
        apply(y + c, x + c, a->pixels, a->channels, num, mean_hi, mean_lo, factor, a->bias + c, a->silu);
    }
}

rf_status rf_group_norm_cpu(rf_stream *stream, const rf_group_norm_args *a, rf_error *err) {
    RF_TRY(stream ? rf_group_norm_check_run(a, err) : rf_group_norm_check(a, err));
    RF_TRY(rf_check_f32("group_norm: dtype", a->dtype, err));
    if (!stream || a->batch == 0 || a->pixels == 0) return RF_OK;
    int64_t run = rf_max64(1, BLOCK / (a->channels / a->num_groups));
    int64_t runs = rf_div_up(a->num_groups, run);
    rf_stream_note_launch(stream, "group_norm");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t task = 0; task < a->batch * runs; task++) {
        int64_t group = task % runs * run;
        norm_groups(a, task / runs, group, rf_min64(run, a->num_groups - group));
    }
    return RF_OK;
}
